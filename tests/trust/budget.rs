//! Memory that an image claims: reserved before it is taken, and refused with the figures.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blobs::cache::{Cache, CacheOptions};
use blobs::fetch::FetchOptions;
use blobs::tier::Tiers;
use disk::image::{host_manifest, open_image};
use formats::oci::Digest;
use registry::store::{LayoutStore, Selector};
use serde_json::json;
use source::MemoryBudget;
use source::failure::with_causes;

use crate::image::{
    Images, OCI_CONFIG, OCI_GZIP, OCI_MANIFEST, OCI_TAR, end, gunzip, gzip, members_of, tar_of,
    upper,
};
use crate::machine;
use crate::run_dir::RunDir;

const MIB: u64 = 1 << 20;

/// Opens an image of a layout within a budget; the error, or the bytes that stay reserved while it is open.
fn opened(images: &Images, tag: &str, budget: u64) -> Result<u64, String> {
    let store = LayoutStore::open(images.path()).unwrap();
    let (_, manifest) = host_manifest(&store, &Selector::Tag(tag.into())).unwrap();
    let fetch = FetchOptions { workers: 1, connections: 1, ahead: None };
    let budget = MemoryBudget::new(budget);
    let options = CacheOptions { budget: MIB, fetch };
    let cache = Cache::within(options, Tiers::default(), budget.clone());
    let result = open_image(&store, &store, &manifest, cache);
    let result = result.map_err(|error| with_causes(&error)).map(|image| (budget.used(), image));
    let used = result.map(|(used, image)| {
        drop(image);
        used
    });
    assert_eq!(budget.used(), 0, "an image that is closed, or was refused, gives its memory back");
    used
}

/// Refused for its memory, with both figures and the setting.
#[track_caller]
fn over_budget(result: Result<u64, String>, what: &str) {
    let text = result.expect_err("it fits");
    for needle in [what, " bytes of memory; ", " bytes are free", "turbobd.memoryBudgetMB"] {
        assert!(text.contains(needle), "no {needle:?} in: {text}");
    }
}

#[test]
fn an_open_image_takes_its_part_of_the_budget_and_one_without_room_is_refused() {
    let images = Images::converted();
    let used = opened(&images, "turbo", 64 * MIB).unwrap();
    assert!(used > 0);
    over_budget(opened(&images, "turbo", used / 2), "");
}

#[test]
fn an_archive_is_refused_at_the_header_of_a_member_that_does_not_fit() {
    let images = Images::converted();
    let mut archive = formats::tar::archive::header("ext4.fs.meta", 3 << 30).unwrap().to_vec();
    archive.extend([0; 4096]); // the rest never comes
    images.forge_blob("bomb", 0, &gzip(&archive));
    over_budget(opened(&images, "bomb", 64 * MIB), "The archive of layer");
}

#[test]
fn an_archive_that_unpacks_further_than_its_members_say_is_refused_too() {
    let images = Images::converted();
    let mut archive = gunzip(&images.blob(&images.layer("turbo", 0)));
    archive.resize(80 << 20, 0);
    images.forge_blob("bomb", 0, &gzip(&archive));
    over_budget(opened(&images, "bomb", 64 * MIB), "The archive of layer");
}

#[test]
fn an_archive_of_very_many_members_is_refused() {
    let images = Images::converted();
    images.forge("bomb", 0, |members| {
        members.extend((0..2000).map(|number| (format!("member{number}"), Vec::new())));
    });
    let text = opened(&images, "bomb", 64 * MIB).unwrap_err();
    assert!(text.contains("at most 64"), "{text}");
}

#[test]
fn filesystem_metadata_that_claims_gigabytes_is_refused_before_they_are_unpacked() {
    let images = Images::converted();
    images.forge("bomb", 0, |members| {
        let fs_meta = &mut members.iter_mut().find(|(name, _)| name == "ext4.fs.meta").unwrap().1;
        // An LZ4 block of 64 KiB of zeros, 65,536 times.
        let block = block_of_zeros();
        let count = 65_536_u64;
        let record = |flags: u64, table: u64| {
            let mut record = [0; 512];
            record[..24].copy_from_slice(b"ZFile\0\x01\0tuji.yyf@Alibaba");
            record[24..28].copy_from_slice(&96_u32.to_le_bytes());
            for (at, word) in [(32, flags), (40, table), (48, count), (56, count << 16)] {
                record[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            record[72..76].copy_from_slice(&65_536_u32.to_le_bytes());
            record[76] = 1;
            record
        };
        let mut file = record(3, 0).to_vec();
        (0..count).for_each(|_| file.extend(&block));
        let table = file.len() as u64;
        (0..count).for_each(|_| file.extend((block.len() as u32).to_le_bytes()));
        file.extend(record(6, table));
        *fs_meta = file;
    });
    over_budget(opened(&images, "bomb", 256 * MIB), "ext4.fs.meta of");
}

/// An LZ4 block of 65,536 zeros.
fn block_of_zeros() -> Vec<u8> {
    let extent = 65_536 - 1 - 5 - 4 - 15;
    let mut block = vec![0x1f, 0, 1, 0];
    block.resize(block.len() + extent / 255, 0xff);
    block.extend([(extent % 255) as u8, 0x50]);
    block.extend([0; 5]);
    block
}

#[test]
fn an_index_that_claims_millions_of_segments_is_refused_before_it_is_read() {
    let images = Images::converted();
    images.forge("bomb", 0, |members| {
        let sidecar =
            &mut members.iter_mut().find(|(name, _)| name == "turbobd.segments").unwrap().1;
        // The count fits the file, which is small once it is packed.
        sidecar.truncate(sidecar.len() - 4);
        sidecar[12..16].copy_from_slice(&4_000_000_u32.to_le_bytes());
        sidecar.resize(80 + 3 * 4_000_000, 1);
        let crc = crc32fast::hash(sidecar);
        sidecar.extend(crc.to_le_bytes());
    });
    over_budget(opened(&images, "bomb", 256 * MIB), "The index of layer");
}

/// A configuration with the least budget.
fn small_budget(dir: &RunDir) -> std::path::PathBuf {
    let file = dir.at("service.json");
    let text = format!(
        r#"{{"cacheConfig": {{"cacheSizeGB": 0}}, "gzipCacheConfig": {{"enable": false}},
            "download": {{"enable": false}},
            "turbobd": {{"traces": {{"enable": false}}, "connections": 1, "memoryCacheMB": 16,
                         "memoryBudgetMB": 276, "metaDir": "{}"}}}}"#,
        dir.at("meta").display()
    );
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn a_plain_image_of_very_many_files_ends_its_own_conversion_and_not_the_daemon() {
    machine::need_root();
    let _turn = crate::block::alone();
    let images = Images::sample();
    // Headers only: 150,000 empty files.
    let one = tar_of(&[("a/000000", b"")]);
    let header = &one[..512];
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for number in 0..150_000 {
        let mut header = tar::Header::from_byte_slice(header).clone();
        header.set_path(format!("a/{number:06}")).unwrap();
        header.set_cksum();
        packer.write_all(header.as_bytes()).unwrap();
    }
    packer.write_all(&[0; 1024]).unwrap();
    images.add("many", &[(OCI_GZIP, packer.finish().unwrap())]);

    let dir = RunDir::new();
    let service = small_budget(&dir);
    let run = |args: &[&str]| end(dir.turbobd(args).env("TURBOBD_SERVICE_CONFIG", &service));
    let mnt = dir.mnt();
    let attached = run(&["attach", &images.name("latest"), "--mount", mnt.to_str().unwrap()]);
    assert_eq!(attached.code, Some(0), "{}", attached.stderr);
    let refused = run(&["attach", &images.name("many")]);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("bytes of memory, which one conversion may take"),
        "{}",
        refused.stderr
    );
    assert!(refused.stderr.contains("turbobd.memoryBudgetMB"), "{}", refused.stderr);
    let listed = run(&["ls"]);
    assert!(listed.stdout.contains("latest"), "{}", listed.stdout);
    let (name, data) = members_of(&upper())
        .into_iter()
        .find(|(name, _)| name == "page")
        .expect("a file of the upper layer");
    assert!(fs::read(mnt.join(name)).unwrap() == data);
}

/// A registry with one plain image, `app:latest`, whose bare tar is made while it is sent.
struct Endless {
    host: String,
    /// Bytes of the layer that were sent.
    sent: Arc<AtomicU64>,
}

impl Endless {
    /// `next` gives the pieces of the tar until it has no more; the layer claims `size` bytes.
    fn start(
        size: u64,
        make: impl Fn() -> Box<dyn Iterator<Item = Vec<u8>>> + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let sent = Arc::new(AtomicU64::new(0));
        // It is never read to its end, so its digest is not known either.
        let layer = Digest::of(b"endless").to_string();
        let config = json!({
            "architecture": crate::image::host_architecture(), "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer]},
        })
        .to_string();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": OCI_CONFIG, "digest": Digest::of(config.as_bytes()).to_string(), "size": config.len()
            },
            "layers": [{"mediaType": OCI_TAR, "digest": layer, "size": size}],
        })
        .to_string();
        let counter = sent.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut asked = BufReader::new(stream.try_clone().unwrap());
                let mut line = String::new();
                while asked.read_line(&mut line).is_ok_and(|len| len > 0) {
                    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                    while line.trim() != "" {
                        line.clear();
                        if !asked.read_line(&mut line).is_ok_and(|len| len > 0) {
                            break;
                        }
                    }
                    line.clear();
                    let (status, kind, body) = if path.contains("/manifests/latest") {
                        ("200 OK", OCI_MANIFEST, manifest.as_str())
                    } else if path.ends_with(&Digest::of(config.as_bytes()).to_string()) {
                        ("200 OK", "application/octet-stream", config.as_str())
                    } else if path.ends_with(&layer) {
                        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
                        for piece in std::iter::once(head.into_bytes()).chain(make()) {
                            if stream.write_all(&piece).is_err() {
                                break;
                            }
                            counter.fetch_add(piece.len() as u64, Ordering::Relaxed);
                        }
                        break;
                    } else {
                        ("404 Not Found", "application/json", "{}")
                    };
                    let head = format!(
                        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
                        body.len()
                    );
                    if stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).is_err() {
                        break;
                    }
                }
            }
        });
        Self { host, sent }
    }

    /// Attaches it to a daemon; what the refusal says, and the bytes of the layer that were read until then.
    fn refused(&self, dir: &RunDir, service: &Path) -> (String, u64) {
        let name = format!("{}/app:latest", self.host);
        let ended = end(dir.turbobd(&["attach", &name]).env("TURBOBD_SERVICE_CONFIG", service));
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        (ended.stderr, self.sent.load(Ordering::Relaxed))
    }
}

/// With `TURBOBD_CASES`, within the memory of the defaults; else within a small one, which ends sooner.
#[test]
fn a_layer_of_ten_million_files_is_refused_with_the_figure_and_its_rest_is_not_read() {
    machine::need_root();
    let _turn = crate::block::alone();
    const FILES: u64 = 10_000_000;
    let endless = Endless::start(FILES * 512 + 1024, || {
        let one = tar_of(&[("a/00000000", b"")]);
        let header = move |number: u64| {
            let mut header = tar::Header::from_byte_slice(&one[..512]).clone();
            header.set_path(format!("a/{number:08}")).unwrap();
            header.set_cksum();
            header.as_bytes().to_vec()
        };
        let groups = (0..FILES).step_by(1000);
        Box::new(groups.map(move |first| (first..first + 1000).flat_map(&header).collect()))
    });
    let dir = RunDir::new();
    let service = match std::env::var_os("TURBOBD_CASES") {
        Some(_) => dir.at("default.json"),
        None => small_budget(&dir),
    };
    if !service.exists() {
        fs::write(&service, json!({"turbobd": {"metaDir": dir.at("meta")}}).to_string()).unwrap();
    }
    let begun = std::time::Instant::now();
    let (said, sent) = endless.refused(&dir, &service);
    println!("refused after {} files in {:.1?}: {said}", sent / 512, begun.elapsed());
    assert!(said.contains("bytes of memory, which one conversion may take"), "{said}");
    assert!(sent < FILES * 512, "all of it was read");
}

#[test]
fn a_file_of_petabytes_is_refused_with_the_figure_at_its_header() {
    machine::need_root();
    let _turn = crate::block::alone();
    const SIZE: u64 = 3 << 50;
    let headers: [fn(&mut tar::Header); 2] = [
        |header| header.set_entry_type(tar::EntryType::Regular),
        |header| {
            // GNU's sparse form: no byte of data, and the real size.
            header.set_entry_type(tar::EntryType::GNUSparse);
            let gnu = header.as_gnu_mut().unwrap();
            gnu.realsize[0] = 0x80;
            gnu.realsize[4..].copy_from_slice(&SIZE.to_be_bytes());
        },
    ];
    for (form, change) in headers.into_iter().enumerate() {
        let endless = Endless::start(SIZE + 4096, move || {
            let mut header = tar::Header::new_gnu();
            header.set_path("petabytes").unwrap();
            header.set_mode(0o644);
            header.set_size(if form == 0 { SIZE } else { 0 });
            change(&mut header);
            header.set_cksum();
            let first = header.as_bytes().to_vec();
            Box::new(std::iter::once(first).chain(std::iter::repeat_with(|| vec![0; 64 << 10])))
        });
        let dir = RunDir::new();
        let (said, sent) = endless.refused(&dir, &small_budget(&dir));
        println!("form {form}: refused after {sent} bytes: {said}");
        assert!(said.contains("a file of ext4 has"), "{said}");
        assert!(sent < 64 << 20, "{sent} bytes were sent");
    }
}
