//! Proof that the checker can fail: for every rule there is a change of valid bytes that breaks it.

use std::collections::{BTreeSet, HashMap};
use std::io::{Read as _, Write as _};

use serde_json::{Value, json};

use super::Report;
use super::archive::{members, unwrap};
use super::field::{digest, le64};
use super::image::{Blobs, check_fs_meta, check_manifest, check_native};
use super::index::{check_meta, check_sidecar};
use super::inflate;
use super::lsmt::{self, Made, Mapping};
use super::segments::check_segments;
use super::stack::{Stacked, content};
use super::zfile;
use crate::image::{Images, gunzip, gzip, members_of, prose, tar_of};

const SNAPSHOT: &str = "containerd.io/snapshot/overlaybd";

/// Rules that were broken, and all rules.
#[derive(Default)]
struct Seen {
    fired: BTreeSet<&'static str>,
    known: BTreeSet<&'static str>,
}

impl Seen {
    /// `check` must find `rule` broken.
    #[track_caller]
    fn fires(&mut self, rule: &'static str, check: impl FnOnce(&mut Report)) {
        let mut report = Report::default();
        check(&mut report);
        assert!(report.broken.contains_key(rule), "{rule} did not fire, but {:#?}", report.broken);
        self.known.extend(report.checked.keys());
        self.fired.insert(rule);
    }

    /// `check` must find nothing.
    #[track_caller]
    fn good(&mut self, what: &str, check: impl FnOnce(&mut Report)) {
        let mut report = Report::default();
        check(&mut report);
        report.clean(what);
        self.known.extend(report.checked.keys());
    }

    /// Each change of `bytes` makes its rule fire.
    #[track_caller]
    fn all(
        &mut self,
        bytes: &[u8],
        check: &dyn Fn(&[u8], &mut Report),
        changes: &[(&'static str, &dyn Fn(&mut Vec<u8>))],
    ) {
        self.good("unchanged", |report| check(bytes, report));
        for (rule, change) in changes {
            let mut changed = bytes.to_vec();
            change(&mut changed);
            self.fires(rule, |report| check(&changed, report));
        }
    }
}

/// Flips the bits `mask` of byte `at`, counted from the end if negative.
fn flip(at: i64, mask: u8) -> impl Fn(&mut Vec<u8>) {
    move |bytes| {
        let at = if at < 0 { bytes.len() - at.unsigned_abs() as usize } else { at as usize };
        bytes[at] ^= mask;
    }
}

/// Overwrites from byte `at` on, counted from the end if negative.
fn put(at: i64, value: &[u8]) -> impl Fn(&mut Vec<u8>) + use<> {
    let value = value.to_vec();
    move |bytes| {
        let at = if at < 0 { bytes.len() - at.unsigned_abs() as usize } else { at as usize };
        bytes[at..at + value.len()].copy_from_slice(&value);
    }
}

/// A TurboOCI image by the program under test, taken apart.
struct Sample {
    target: Vec<u8>,
    archive: Vec<u8>,
    tar: Vec<u8>,
    parts: HashMap<String, Vec<u8>>,
    manifest: Value,
    blobs: Memory,
}

struct Memory(HashMap<String, Vec<u8>>);

impl Blobs for Memory {
    fn blob(&self, digest: &str) -> Option<Vec<u8>> {
        self.0.get(digest).cloned()
    }
}

impl Memory {
    fn put(&mut self, bytes: &[u8]) -> String {
        self.0.insert(digest(bytes), bytes.to_vec());
        digest(bytes)
    }
}

fn sample() -> Sample {
    let images = Images::new();
    let tar = tar_of(&[("a", &prose(5, 700_000)), ("b", b"b\n")]);
    images.add("latest", &[("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&tar))]);
    images.convert(&["--referrer", "--span", "64"]);
    let manifest = images.manifest("turbo");
    let archive = images.blob(&images.layer("turbo", 0));
    let target = images.blob(&images.layer("latest", 0));
    let mut blobs = Memory(HashMap::new());
    for entry in std::fs::read_dir(images.path().join("blobs/sha256")).unwrap() {
        blobs.put(&std::fs::read(entry.unwrap().path()).unwrap());
    }
    let tar = gunzip(&archive);
    Sample { target, parts: members_of(&tar).into_iter().collect(), tar, archive, manifest, blobs }
}

#[test]
fn every_rule_of_the_checker_fires_on_a_change() {
    let sample = sample();
    let native =
        std::fs::read(crate::formats::interop().join("blobs/native-2-L0-overlaybd.commit"))
            .unwrap();
    let mut seen = Seen::default();
    zfile_rules(&mut seen, &sample.parts["ext4.fs.meta"]);
    lsmt_rules(&mut seen, &sample.parts["ext4.fs.meta"]);
    archive_rules(&mut seen, &sample.tar);
    wrap_rules(&mut seen, &native);
    meta_rules(&mut seen, &sample.parts["gzip.meta"], &sample.target);
    sidecar_rules(&mut seen, &sample);
    segments_rules(&mut seen);
    manifest_rules(&mut seen, &sample);
    native_rules(&mut seen, &native);
    stack_rules(&mut seen, &sample.parts["ext4.fs.meta"]);
    let silent: Vec<_> = seen.known.difference(&seen.fired).collect();
    assert!(silent.is_empty(), "never fired: {silent:?}");
    println!("{} rules fired", seen.fired.len());
}

fn zfile_rules(seen: &mut Seen, file: &[u8]) {
    let (at, size) = (le64(file, 40) as i64, le64(file, 56));
    let check = |bytes: &[u8], report: &mut Report| drop(zfile::check(bytes, false, report));
    let both = |offset: i64, value: Vec<u8>| {
        let value2 = value.clone();
        move |bytes: &mut Vec<u8>| {
            put(offset, &value)(bytes);
            put(offset - 512, &value2)(bytes);
        }
    };
    seen.all(
        file,
        &check,
        &[
            ("zfile.has-room-for-two-records", &|bytes| bytes.truncate(1000)),
            ("zfile.header-magic", &flip(5, 1)),
            ("zfile.header-bits", &flip(32, 1)),
            ("zfile.trailer-magic", &flip(-512, 1)),
            ("zfile.trailer-bits", &flip(-480, 4)),
            ("zfile.flags-are-known", &flip(33, 1)),
            ("zfile.header-digest", &flip(28, 1)),
            ("zfile.trailer-digest", &flip(-484, 1)),
            ("zfile.padding-is-zero", &flip(-1, 1)),
            ("zfile.record-size", &flip(24, 1)),
            ("zfile.options-agree", &flip(-436, 3)),
            ("zfile.header-says-what-the-trailer-says", &flip(-430, 1)),
            ("zfile.block-size", &both(72, 5000_u32.to_le_bytes().to_vec())),
            ("zfile.algo-is-lz4-or-zstd", &put(76, &[3])),
            ("zfile.no-dictionary", &put(84, &[1])),
            ("zfile.blocks-cover-the-size", &both(56, (size + (1 << 20)).to_le_bytes().to_vec())),
            ("zfile.index-ends-at-the-trailer", &both(40, (at as u64 + 4).to_le_bytes().to_vec())),
            ("zfile.index-crc", &flip(64, 1)),
            ("zfile.entry-has-bytes", &put(at, &4_u32.to_le_bytes())),
            ("zfile.entry-fits-upstreams-buffer", &put(at, &70_000_u32.to_le_bytes())),
            ("zfile.group-sum-fits-16-bits", &put(at, &65_536_u32.to_le_bytes())),
            ("zfile.index-follows-the-last-block", &flip(at, 1)),
            ("zfile.block-crc", &flip(520, 1)),
            ("zfile.block-decodes", &flip(512, 0xff)),
            ("zfile.block-has-its-length", &both(56, (size - 1).to_le_bytes().to_vec())),
        ],
    );
}

fn lsmt_rules(seen: &mut Seen, fs_meta: &[u8]) {
    let (stream, _) = zfile::check(fs_meta, false, &mut Report::default()).unwrap();
    let (end, index) = (stream.len(), le64(&stream, stream.len() - 4096 + 32) as usize);
    let entries: Vec<usize> = (index..end - 4096).step_by(16).collect();
    // The lowest byte of an entry's second half begins its moffset, the highest is the tag.
    let own =
        *entries.iter().find(|&&at| stream[at + 15] == 0 && stream[at + 14] & 0x80 == 0).unwrap();
    let remote = *entries.iter().find(|&&at| stream[at + 15] == 1).unwrap();
    let word = |at: usize, value: u64| put(at as i64, &value.to_le_bytes());
    let a = |at: usize| le64(&stream, at);
    const LBA: u64 = (1 << 50) - 1;
    let check =
        |bytes: &[u8], report: &mut Report| drop(lsmt::check(bytes.to_vec(), Made::Warp, report));
    seen.all(
        &stream,
        &check,
        &[
            ("lsmt.has-room-for-two-records", &|bytes| bytes.truncate(8000)),
            ("lsmt.header-magic", &flip(0, 1)),
            ("lsmt.trailer-magic", &flip(-4096, 1)),
            ("lsmt.header-is-of-a-data-file", &flip(28, 2)),
            ("lsmt.trailer-is-sealed", &flip(-4068, 4)),
            ("lsmt.committed-flags", &flip(28, 16)),
            ("lsmt.record-size", &flip(24, 1)),
            ("lsmt.header-has-no-index", &flip(33, 1)),
            ("lsmt.version-is-1.1", &flip(133, 3)),
            ("lsmt.header-and-trailer-have-one-identity", &flip(60, 1)),
            ("lsmt.record-padding-is-zero", &flip(-1, 1)),
            ("lsmt.uuid-is-upper-case", &put(-4040, b"a")),
            ("lsmt.warp-has-no-identity", &put(-4040, b"A")),
            ("lsmt.vsize-is-whole-sectors", &flip(-4048, 1)),
            ("lsmt.index-has-at-most-a-million-entries", &put(-4056, &1_000_001_u64.to_le_bytes())),
            ("lsmt.index-lies-before-the-trailer", &put(-4064, &u64::MAX.to_le_bytes())),
            (
                "lsmt.index-ends-at-the-trailer",
                &put(-4056, &(entries.len() as u64 - 1).to_le_bytes()),
            ),
            ("lsmt.padding-comes-last", &word(entries[0], LBA)),
            ("lsmt.padding-is-as-upstream-writes-it", &word(entries[0], LBA | 1 << 50)),
            ("lsmt.warp-has-a-metadata-entry", &|bytes| {
                entries.iter().for_each(|&at| bytes[at + 15] = 1)
            }),
            ("lsmt.entry-has-a-length", &word(own, a(own) & LBA)),
            ("lsmt.entries-are-ordered", &word(entries[1], a(entries[0]))),
            (
                "lsmt.entry-lies-on-the-disk",
                &word(entries[entries.len() - 1], (LBA - 100) | (1 << 50)),
            ),
            ("lsmt.warp-tags-are-0-and-1", &flip(remote as i64 + 15, 3)),
            ("lsmt.remote-entry-is-not-zeroed", &flip(remote as i64 + 14, 0x80)),
            ("lsmt.entry-points-into-the-payload", &word(own + 8, 7)),
            ("lsmt.data-entry-begins-in-the-payload", &word(own + 8, index as u64 / 512)),
        ],
    );
    seen.fires("lsmt.native-index-is-padded", |report| {
        lsmt::check(stream.clone(), Made::Native, report);
    });
}

/// Corrects the checksum of the tar header at `at`.
fn fix_checksum(bytes: &mut [u8], at: usize) {
    bytes[at + 148..at + 156].fill(b' ');
    let sum: u32 = bytes[at..at + 512].iter().map(|&byte| u32::from(byte)).sum();
    bytes[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn archive_rules(seen: &mut Seen, tar: &[u8]) {
    let size = std::str::from_utf8(&tar[124..135]).unwrap();
    let end = 512 + u64::from_str_radix(size, 8).unwrap() as i64;
    assert_ne!(end % 512, 0, "the first member fills its last block");
    let check = |bytes: &[u8], report: &mut Report| drop(members(bytes, report));
    seen.all(
        tar,
        &check,
        &[
            ("archive.header-checksum", &flip(0, 1)),
            ("archive.header-is-ustar", &flip(263, 1)),
            ("archive.member-is-regular", &put(156, b"5")),
            ("archive.mode-is-0644", &put(100, b"0000600")),
            ("archive.other-fields-are-zero", &put(108, b"0000001")),
            ("archive.member-lies-inside", &put(124, b"77777777777")),
            ("archive.padding-is-zero", &flip(end, 1)),
            ("archive.ends-with-two-zero-blocks", &|bytes| bytes.truncate(bytes.len() - 512)),
        ],
    );
}

fn wrap_rules(seen: &mut Seen, file: &[u8]) {
    let check = |bytes: &[u8], report: &mut Report| {
        let _ = unwrap(bytes, report);
    };
    seen.all(
        file,
        &check,
        &[
            ("wrap.header-checksum", &flip(0, 1)),
            ("wrap.pax-record-fits-a-block", &|bytes| {
                bytes[124..135].copy_from_slice(b"       2000");
                fix_checksum(bytes, 0);
            }),
            ("wrap.pax-record-is-the-size", &flip(516, 1)),
            ("wrap.pax-padding-is-zero", &flip(1000, 1)),
            ("wrap.member-is-overlaybd-commit", &flip(1024, 1)),
            ("wrap.member-and-two-zero-blocks-are-all", &|bytes| bytes.truncate(bytes.len() - 512)),
            ("wrap.tail-is-zero", &flip(-1, 1)),
        ],
    );
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn unzlib(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    flate2::read::ZlibDecoder::new(bytes).read_to_end(&mut out).unwrap();
    out
}

/// Changes the entry table of a `gzip.meta`, and appends `window` to the others.
fn edit_table(file: &mut Vec<u8>, window: &[u8], edit: impl FnOnce(&mut Vec<u8>, u64)) {
    let start = le64(file, 313) as usize;
    let mut table = unzlib(&file[start..]);
    edit(&mut table, start as u64);
    file.truncate(start);
    file.extend_from_slice(window);
    let (start, table) = (file.len(), zlib(&table));
    file[313..321].copy_from_slice(&(start as u64).to_le_bytes());
    file[321..329].copy_from_slice(&(table.len() as u64).to_le_bytes());
    file.extend_from_slice(&table);
}

fn meta_rules(seen: &mut Seen, file: &[u8], blob: &[u8]) {
    let whole = inflate::whole(blob).unwrap();
    let check = |bytes: &[u8], report: &mut Report| drop(check_meta(bytes, blob, &whole, report));
    let table = |at: usize, value: u64| {
        move |file: &mut Vec<u8>| {
            edit_table(file, b"", |table, _| {
                table[at..at + 8].copy_from_slice(&value.to_le_bytes())
            });
        }
    };
    let other_window = |plain: &'static [u8]| {
        move |file: &mut Vec<u8>| {
            let window = zlib(plain);
            edit_table(file, &window, |table, at| {
                table[29 + 16..29 + 24].copy_from_slice(&at.to_le_bytes());
                table[29 + 25..29 + 29].copy_from_slice(&(window.len() as u32).to_le_bytes());
            });
        }
    };
    let start = le64(file, 313);
    let second = unzlib(&file[start as usize..]);
    assert!(second.len() >= 3 * 29, "the sample has few checkpoints");
    let window = le64(&second, 29 + 16) as i64;
    seen.all(
        file,
        &check,
        &[
            ("ddgzidx.has-room-for-a-header", &|bytes| bytes.truncate(332)),
            ("ddgzidx.magic", &flip(0, 1)),
            ("ddgzidx.major-version-is-1", &flip(8, 3)),
            ("ddgzidx.windows-are-raw-or-zlib", &put(10, &[2])),
            ("ddgzidx.flag-is-0", &flip(12, 1)),
            ("ddgzidx.span-is-at-least-64-KiB", &put(13, &1000_u32.to_le_bytes())),
            ("ddgzidx.window-is-32-KiB", &flip(18, 1)),
            ("ddgzidx.entry-has-29-bytes", &flip(21, 1)),
            ("ddgzidx.knows-the-blobs-size", &flip(33, 1)),
            ("ddgzidx.knows-its-own-size", &flip(41, 1)),
            ("ddgzidx.knows-the-tars-size", &flip(49, 1)),
            ("ddgzidx.reserve-is-zero", &flip(100, 1)),
            ("ddgzidx.header-crc", &flip(329, 1)),
            ("ddgzidx.table-ends-the-file", &flip(313, 1)),
            ("ddgzidx.table-unpacks", &flip(start as i64 + 3, 0x55)),
            ("ddgzidx.table-has-all-entries", &flip(25, 1)),
            ("ddgzidx.bits-are-0-to-7", &|file| {
                edit_table(file, b"", |table, _| table[29 + 24] = 8)
            }),
            ("ddgzidx.entry-lies-in-the-blob", &table(29 + 8, 1 << 40)),
            ("ddgzidx.window-lies-in-its-area", &table(29 + 16, 1)),
            ("ddgzidx.window-unpacks", &flip(window + 2, 0x55)),
            ("ddgzidx.window-is-whole", &other_window(&[0; 100])),
            ("ddgzidx.window-serves-its-segment", &other_window(&[0; 32_768])),
            ("ddgzidx.first-entry-is-at-0", &table(0, 1)),
            ("ddgzidx.entries-are-ordered", &table(29, 1 << 40)),
            ("ddgzidx.entry-is-a-block-boundary", &table(29, 77)),
        ],
    );
    let twice = [gzip(b"one"), gzip(b"two")].concat();
    seen.fires("ddgzidx.blob-has-one-member", |report| {
        check_meta(file, &twice, &inflate::whole(&twice).unwrap(), report);
    });
}

fn varint_end(file: &[u8], mut at: usize) -> usize {
    while file[at] & 0x80 != 0 {
        at += 1;
    }
    at + 1
}

fn sidecar_rules(seen: &mut Seen, sample: &Sample) {
    let file = &sample.parts["turbobd.segments"];
    let whole = inflate::whole(&sample.target).unwrap();
    let meta =
        check_meta(&sample.parts["gzip.meta"], &sample.target, &whole, &mut Report::default());
    let check = |bytes: &[u8], report: &mut Report| {
        check_sidecar(bytes, &sample.target, &whole, meta.as_deref(), report);
    };
    let count = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let outs = (0..count).fold(80, |at, _| varint_end(file, at));
    let kinds = (0..count).fold(outs, |at, _| varint_end(file, at));
    let second_out = varint_end(file, outs);
    let (sha, crc) = (kinds + count, kinds + count + 32 * count);
    seen.all(
        file,
        &check,
        &[
            ("sidecar.has-room-for-a-header", &|bytes| bytes.truncate(83)),
            ("sidecar.crc", &flip(-1, 1)),
            ("sidecar.magic", &flip(0, 1)),
            ("sidecar.version-is-1", &flip(8, 2)),
            ("sidecar.has-both-checksums", &flip(11, 1)),
            ("sidecar.shares-windows-with-gzip-meta", &flip(10, 1)),
            ("sidecar.names-the-blob", &flip(16, 1)),
            ("sidecar.knows-the-blobs-size", &flip(48, 1)),
            ("sidecar.knows-the-tars-size", &flip(56, 1)),
            ("sidecar.counts-the-members", &flip(72, 1)),
            ("sidecar.has-all-columns", &put(12, &u32::MAX.to_le_bytes())),
            ("sidecar.ends-with-its-crc", &|bytes| bytes.insert(bytes.len() - 4, 0)),
            ("sidecar.first-checkpoint-is-at-0", &flip(outs as i64, 1)),
            ("sidecar.checkpoints-are-ordered", &|bytes| {
                let end = varint_end(bytes, second_out);
                bytes.splice(second_out..end, [0]);
            }),
            ("sidecar.segment-sha256", &flip(sha as i64, 1)),
            ("sidecar.segment-crc32", &flip(crc as i64, 1)),
            ("sidecar.kind-is-what-lies-there", &put(kinds as i64, &[1])),
            ("sidecar.segment-decodes-alone", &flip(80, 1)),
            ("sidecar.shared-window-is-in-gzip-meta", &flip(outs as i64, 1)),
        ],
    );
}

/// The sidecar of a layer of one long frame, after a small one.
fn segments_rules(seen: &mut Seen) {
    let images = Images::new();
    let tar = tar_of(&[("a", &prose(5, 5 << 20)), ("b", b"b\n")]);
    let (small, long) = tar.split_at(600);
    let blob = [zstd::encode_all(small, 3).unwrap(), zstd::encode_all(long, 3).unwrap()].concat();
    images.add("latest", &[("application/vnd.oci.image.layer.v1.tar+zstd", blob.clone())]);
    images.convert(&[]);
    let archive = gunzip(&images.blob(&images.layer("turbo", 0)));
    let parts: HashMap<_, _> = members_of(&archive).into_iter().collect();
    let file = &parts["turbobd.segments"];
    let check = |bytes: &[u8], report: &mut Report| check_segments(bytes, &blob, &tar, 2, report);
    let count = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let columns = |n: usize| (0..n * count).fold(72, |at, _| varint_end(file, at));
    let kinds = columns(3);
    let (sha, crc) = (kinds + count, kinds + count + 32 * count);
    seen.all(
        file,
        &check,
        &[
            ("segments.has-room-for-a-header", &|bytes| bytes.truncate(75)),
            ("segments.crc", &flip(-1, 1)),
            ("segments.magic", &flip(0, 1)),
            ("segments.version-is-2", &flip(8, 3)),
            ("segments.encoding-is-the-blobs", &flip(10, 3)),
            ("segments.names-the-blob", &flip(16, 1)),
            ("segments.knows-the-blobs-size", &flip(48, 1)),
            ("segments.knows-the-tars-size", &flip(56, 1)),
            ("segments.has-all-columns", &put(12, &u32::MAX.to_le_bytes())),
            ("segments.ends-with-its-crc", &|bytes| bytes.insert(bytes.len() - 4, 0)),
            ("segments.cover-the-tar-and-lie-in-the-blob", &flip(columns(2) as i64, 1)),
            ("segments.first-decodes-alone", &put(kinds as i64, &[1])),
            ("segments.sha256", &flip(sha as i64, 1)),
            ("segments.crc32", &flip(crc as i64, 1)),
            ("segments.decode-to-the-tar", &put(kinds as i64 + 2, &[0])),
        ],
    );
    // The whole image, for the rules of zstd layers only.
    let mut blobs = Memory(HashMap::new());
    for entry in std::fs::read_dir(images.path().join("blobs/sha256")).unwrap() {
        blobs.put(&std::fs::read(entry.unwrap().path()).unwrap());
    }
    let manifest = images.manifest("turbo").to_string();
    seen.good("a zstd image", |report| drop(check_manifest(&blobs, manifest.as_bytes(), report)));
    let cut = &blob[..blob.len() - 5];
    blobs.0.insert(digest(&blob), cut.to_vec());
    seen.fires("blob.is-whole-zstd", |report| {
        drop(check_manifest(&blobs, manifest.as_bytes(), report));
    });
}

fn manifest_rules(seen: &mut Seen, sample: &Sample) {
    type Change<'a> = &'a dyn Fn(&mut Value, &mut Memory);
    let copy = || (sample.manifest.clone(), Memory(sample.blobs.0.clone()));
    let check = |manifest: &Value, blobs: &Memory, report: &mut Report| {
        check_manifest(blobs, manifest.to_string().as_bytes(), report);
    };
    seen.good("unchanged", |report| check(&sample.manifest, &sample.blobs, report));
    seen.fires("manifest.is-json", |report| drop(check_manifest(&sample.blobs, b"{", report)));
    let note = |key: &str, value: &str| {
        let (key, value) = (format!("{SNAPSHOT}/{key}"), value.to_owned());
        move |manifest: &mut Value, _: &mut Memory| {
            manifest["layers"][0]["annotations"][key.as_str()] = value.as_str().into();
        }
    };
    // Another archive, with everything that names it corrected.
    let archive = |bytes: Vec<u8>| {
        move |manifest: &mut Value, blobs: &mut Memory| {
            let name = blobs.put(&bytes);
            let layer = &mut manifest["layers"][0];
            layer["digest"] = name.as_str().into();
            layer["size"] = bytes.len().into();
            layer["annotations"][format!("{SNAPSHOT}/blob-digest").as_str()] = name.into();
            layer["annotations"][format!("{SNAPSHOT}/blob-size").as_str()] =
                bytes.len().to_string().into();
        }
    };
    let members = |edit: &dyn Fn(&mut Vec<(String, Vec<u8>)>)| {
        let mut members = members_of(&sample.tar);
        edit(&mut members);
        let list: Vec<(&str, &[u8])> = members.iter().map(|(n, d)| (n.as_str(), &d[..])).collect();
        gzip(&tar_of(&list))
    };
    let broken_target = |_: &mut Value, blobs: &mut Memory| {
        let name = digest(&sample.target);
        blobs.0.get_mut(&name).unwrap()[100] ^= 0x55;
    };
    let layer = digest(&sample.archive);
    let named =
        [&sample.archive[..3], &[8], &sample.archive[4..10], b"name\0", &sample.archive[10..]]
            .concat();
    let no_size = {
        let (mut stream, _) =
            zfile::check(&sample.parts["ext4.fs.meta"], false, &mut Report::default()).unwrap();
        let end = stream.len();
        for at in [48, end - 4096 + 48] {
            stream[at..at + 8].fill(0);
        }
        stream
    };
    let changes: &[(&'static str, Change<'_>)] = &[
        ("manifest.schema-version-is-2", &|manifest, _| manifest["schemaVersion"] = 1.into()),
        ("manifest.media-types-are-of-one-family", &|manifest, _| {
            manifest["config"]["mediaType"] = "x".into()
        }),
        ("manifest.referrer-is-oci", &|manifest, _| {
            manifest["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json".into();
            manifest["config"]["mediaType"] =
                "application/vnd.docker.container.image.v1+json".into();
        }),
        ("config.has-a-diff-id-for-each-layer", &|manifest, _| {
            let layer = manifest["layers"][0].clone();
            manifest["layers"].as_array_mut().unwrap().push(layer);
        }),
        ("blob.is-there", &|manifest, _| manifest["layers"][0]["digest"] = digest(b"none").into()),
        ("blob.has-its-digest", &|_, blobs| blobs.0.get_mut(&layer).unwrap()[20] ^= 1),
        ("blob.has-its-size", &|manifest, _| manifest["layers"][0]["size"] = 5.into()),
        ("annotation.blob-digest", &note("blob-digest", "sha256:0")),
        ("annotation.blob-size", &note("blob-size", "1")),
        ("annotation.version", &note("version", "0.1.0")),
        ("annotation.target-is-in-the-repository", &note("turbo-oci/target-digest", "sha256:0")),
        (
            "annotation.target-media-type-is-of-the-content",
            &note("turbo-oci/target-media-type", "text/plain"),
        ),
        ("layer.turbo-is-gzip", &|manifest, _| manifest["layers"][0]["mediaType"] = "x".into()),
        ("archive.is-gzip", &archive(sample.archive[..sample.archive.len() - 9].to_vec())),
        ("archive.gzip-has-no-name-and-time", &archive(named)),
        ("archive.diff-id-is-of-its-tar", &archive(gzip(&tar_of(&[("x", b"")])))),
        ("archive.members-and-their-order", &archive(members(&|members| members.swap(0, 1)))),
        ("archive.marker-is-empty", &archive(members(&|members| members[1].1.push(1)))),
        ("blob.is-whole-gzip", &broken_target),
        ("layer.fs-meta-is-a-bare-zfile", &archive(members(&|members| members[0].1[0] ^= 1))),
        (
            "lsmt.warp-gives-the-disks-size",
            &archive(members(&|members| members[0].1 = bare_zfile(&no_size))),
        ),
    ];
    for (rule, change) in changes {
        let (mut manifest, mut blobs) = copy();
        change(&mut manifest, &mut blobs);
        seen.fires(rule, |report| check(&manifest, &blobs, report));
    }
}

/// A ZFile of LZ4 blocks without checksums, by the specification.
pub fn bare_zfile(plain: &[u8]) -> Vec<u8> {
    super::writer::zfile(
        plain,
        &super::writer::ZFileOptions { algo: 1, block_size: 4096, verify: false },
    )
}

fn native_rules(seen: &mut Seen, file: &[u8]) {
    let image = |file: &[u8], media_type: &str, diff_id: &str| {
        let mut blobs = Memory(HashMap::new());
        let name = blobs.put(file);
        let config = json!({"rootfs": {"diff_ids": [diff_id]}}).to_string();
        let config_name = blobs.put(config.as_bytes());
        let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_name, "size": config.len()},
            "layers": [{"mediaType": media_type, "digest": name, "size": file.len(), "annotations": {
                (format!("{SNAPSHOT}/version")): "0.1.0", (format!("{SNAPSHOT}/blob-digest")): name,
                (format!("{SNAPSHOT}/blob-size")): file.len().to_string()}}]});
        (blobs, manifest.to_string())
    };
    let kind = "application/vnd.oci.image.layer.v1.tar";
    let check = |image: (Memory, String), report: &mut Report| {
        check_manifest(&image.0, image.1.as_bytes(), report);
    };
    seen.good("native", |report| check(image(file, kind, &digest(file)), report));
    seen.fires("layer.native-is-a-tar", |report| check(image(file, "x", &digest(file)), report));
    seen.fires("layer.native-diff-id-is-its-digest", |report| {
        check(image(file, kind, "x"), report)
    });
    let bare = unwrap(file, &mut Report::default()).0.to_vec();
    seen.fires("layer.native-is-wrapped", |report| {
        check(image(&bare, kind, &digest(&bare)), report)
    });
    let mut other = file.to_vec();
    other[1536] ^= 1;
    seen.fires("layer.native-is-a-zfile", |report| drop(check_native(&other, report)));
}

fn stack_rules(seen: &mut Seen, fs_meta: &[u8]) {
    let layer = |change: &dyn Fn(&mut lsmt::Layer)| {
        let mut layer = check_fs_meta(fs_meta, &mut Report::default()).unwrap();
        change(&mut layer);
        [Stacked { layer, target: Some(vec![0; 1 << 20]) }]
    };
    seen.good("unchanged", |report| drop(content(&layer(&|_| ()), report)));
    seen.fires("stack.has-1-to-255-layers", |report| drop(content(&[], report)));
    seen.fires("stack.has-a-size", |report| {
        drop(content(&layer(&|layer| layer.vsize = 0), report))
    });
    let far = |moffset, lba| Mapping { lba, len: 1, moffset, zeroed: true, tag: 1 };
    seen.fires("stack.mapping-lies-on-the-disk", |report| {
        drop(content(&layer(&|layer| layer.mappings.push(far(0, layer.vsize / 512))), report));
    });
    seen.fires("stack.remote-mapping-lies-in-the-tar", |report| {
        drop(content(
            &layer(&|layer| layer.mappings.push(far(2048, layer.vsize / 512 - 1))),
            report,
        ));
    });
}
