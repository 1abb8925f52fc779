//! The writable layer of a device config: read by every reader of the disk, written over a device, and, while
//! that device is in use, sealed and followed by another. The kernel's ext4, e2fsck and a copy of the tree
//! are the oracles.
//!
//! Where this machine has no ublk, [`in_a_guest_with_ublk`] runs the tests named after it inside `scripts/vm`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::block;
use crate::machine;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::block::{alone, ublk_here};
use crate::image::{Images, OCI_GZIP, done, end, gzip, noise, refused, tar_of};
use crate::listing::same_trees;
use crate::machine::run;
use crate::run_dir::RunDir;
use disk::writable::{WritableFiles, WritableLayer};
use formats::lsmt::layer::LsmtHeader;
use formats::lsmt::{LayerIdentity, Uuid};
use formats::units::Bytes;
use serde_json::{Value, json};

/// Bytes of the disk.
const DISK: u64 = 1 << 30;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Appended,
    Sparse,
}

/// A native image unpacked into layer files, and device configs over them.
struct Disks {
    work: RunDir,
    images: Images,
}

impl Disks {
    /// Creates them in a folder that keeps everything that `cp -a` keeps, in a guest too.
    fn new(frontend: &str) -> Self {
        let work = match frontend {
            "ublk" => tempfile::tempdir().unwrap(),
            _ => tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        };
        let images = Images::new();
        let files: &[(&str, &[u8])] =
            &[("etc/", b""), ("etc/name", b"old\n"), ("data", &noise(1, 3_000_000))];
        images.add("latest", &[(OCI_GZIP, gzip(&tar_of(files)))]);
        let place = images.place();
        done(&["convert", "-r", &place, "-i", "latest", "--vsize", "1", "--overlaybd", "obd"]);
        Self { work: RunDir::of(work), images }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.work.at(name)
    }

    /// The image's layers.
    fn lowers(&self) -> Vec<Value> {
        let count = self.images.manifest("obd")["layers"].as_array().unwrap().len();
        let file = |number| self.images.blob_path(&self.images.layer("obd", number));
        (0..count).map(|number| json!({ "file": file(number) })).collect()
    }

    /// Makes an empty writable layer.
    fn layer(&self, kind: Kind, name: &str) -> WritableFiles {
        let files = WritableFiles::in_dir(&self.at(name));
        match kind {
            Kind::Appended => {
                drop(WritableLayer::create(&files, Bytes(DISK), LayerIdentity::default()).unwrap());
            }
            // Created in the way of `overlaybd-create -s` (spec lsmt 7), with the size of the layer below.
            Kind::Sparse => {
                fs::create_dir(self.at(name)).unwrap();
                let (uuid, parent) = (Uuid([7; 16]), Uuid::NULL);
                let header = LsmtHeader {
                    flags: 0x13,
                    index_offset: 0,
                    index_size: 0,
                    virtual_size: 0,
                    uuid,
                    parent,
                    user_tag: Vec::new(),
                };
                fs::write(&files.data, header.encode()).unwrap();
                fs::write(&files.index, b"").unwrap();
            }
        }
        files
    }

    fn config(&self, name: &str, lowers: &[Value], upper: Option<&WritableFiles>) -> String {
        let upper =
            upper.map_or(json!({}), |upper| json!({"index": upper.index, "data": upper.data}));
        let path = self.at(name);
        fs::write(&path, json!({"lowers": lowers, "upper": upper}).to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Attaches and mounts; returns the device.
    fn attach(&self, frontend: &str, config: &str, more: &[&str]) -> String {
        let args = ["attach", "--frontend", frontend, "--config", config, "--mount"];
        let ended = end(self.work.turbobd(&args).arg(self.at("mnt")).args(more));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.stdout.split_whitespace().next().unwrap().to_owned()
    }

    fn detach(&self, device: &str) {
        let ended = end(&mut self.work.turbobd(&["detach", device]));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }

    /// Exports the disk, and returns its tree.
    fn exported(&self, config: &str, clean: bool) -> machine::Mounted {
        let raw = self.at("raw");
        done(&["export", "--config", config, "-f", "-o", raw.to_str().unwrap()]);
        if clean {
            run(Command::new("e2fsck").arg("-fn").arg(&raw));
        }
        machine::Mounted::ext4(&raw)
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    run(Command::new("cp").arg("-a").arg(from.join(".")).arg(to));
}

fn is_written_and_read_again(frontend: &str) {
    let disks = Disks::new(frontend);
    for kind in [Kind::Appended, Kind::Sparse] {
        let name = format!("{kind:?}");
        let upper = disks.layer(kind, &name);
        let config = disks.config(&format!("{name}.json"), &disks.lowers(), Some(&upper));
        if kind == Kind::Appended {
            // An empty one changes nothing.
            let bare = disks.config("bare.json", &disks.lowers(), None);
            let digest = |config: &str| done(&["export", "--config", config, "--digest"]);
            assert_eq!(digest(&config), digest(&bare));
        }
        let device = disks.attach(frontend, &config, &[]);
        let mnt = disks.at("mnt");
        fs::write(mnt.join("etc/name"), "new\n").unwrap();
        fs::remove_file(mnt.join("data")).unwrap();
        for number in 0..300 {
            fs::write(mnt.join(format!("file{number}")), noise(number, 77 * number as usize))
                .unwrap();
        }
        fs::write(mnt.join("large"), noise(7, 20_000_000)).unwrap();
        let before = disks.at(&format!("{name}-copy"));
        copy(&mnt, &before);
        disks.detach(&device);
        // Another reader of the disk finds the layer, and changes nothing of it.
        let state = |path: &Path| (fs::read(path).unwrap(), fs::metadata(path).unwrap().modified());
        let files = state(&upper.index).0;
        same_trees(disks.exported(&config, true).path(), &before);
        assert!(state(&upper.index).0 == files);
        // So does the next device.
        let device = disks.attach(frontend, &config, &[]);
        same_trees(&mnt, &before);
        fs::remove_file(mnt.join("large")).unwrap();
        disks.detach(&device);
        fs::remove_file(before.join("large")).unwrap();
        let again = disks.exported(&config, true);
        assert!(!again.path().join("large").exists() && again.path().join("file299").exists());
        let missing = disks.at("missing");
        let absent = WritableFiles { data: missing.clone(), index: missing.clone() };
        let absent = disks.config("absent.json", &disks.lowers(), Some(&absent));
        refused(&["export", "--config", &absent, "--digest"], &["missing", "Cannot open"]);
    }
}

/// Requests a snapshot; returns the status and the answer.
fn snapshot(port: u16, query: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "POST /snapshot?{query} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap())
}

fn continues_on_another(frontend: &str) {
    for (first, second) in [(Kind::Appended, Kind::Sparse), (Kind::Sparse, Kind::Appended)] {
        let disks = Disks::new(frontend);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let service = disks.at("service.json");
        let own = json!({"enable": true, "address": format!("http://127.0.0.1:{port}")});
        fs::write(&service, json!({"serviceConfig": own}).to_string()).unwrap();
        let (one, two) = (disks.layer(first, "one"), disks.layer(second, "two"));
        let config = disks.config("config.v1.json", &disks.lowers(), Some(&one));
        let more = ["--dev-id", "box", "--service-config", service.to_str().unwrap()];
        let device = disks.attach(frontend, &config, &more);
        let mnt = disks.at("mnt");
        let sync = || run(Command::new("sync").arg("-f").arg(&mnt));
        fs::write(mnt.join("before"), noise(3, 5_000_000)).unwrap();
        sync();
        copy(&mnt, &disks.at("first"));

        // A refused snapshot leaves everything unchanged.
        let same = disks.config("same.json", &disks.lowers(), Some(&one));
        let (status, told) = snapshot(port, &format!("dev_id=box&config={same}"));
        assert_eq!((status, &told["success"]), (500, &json!(false)), "{told}");
        assert!(told["message"].as_str().unwrap().contains("in use"), "{told}");
        assert_eq!(snapshot(port, &format!("dev_id=nobody&config={same}")).0, 404);
        assert_eq!(snapshot(port, "dev_id=box").0, 400);
        assert!(Path::new(&same).exists());
        refused(
            &["export", "--config", disks.at("none.json").to_str().unwrap(), "--digest"],
            &["none.json"],
        );

        let mut lowers = disks.lowers();
        lowers.push(json!({"file": one.data}));
        let next = disks.config("next.json", &lowers, Some(&two));
        let open = fs::File::open(mnt.join("before")).unwrap();
        let (status, told) = snapshot(port, &format!("dev_id=box&config={next}"));
        assert_eq!((status, &told["success"]), (200, &json!(true)), "{told}");
        assert!(!Path::new(&next).exists(), "the new configuration is the device's");
        let text = fs::read_to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["lowers"], json!(lowers));
        drop(open);
        fs::write(mnt.join("after"), noise(4, 5_000_000)).unwrap();
        fs::remove_file(mnt.join("etc/name")).unwrap();
        copy(&mnt, &disks.at("second"));
        disks.detach(&device);

        // The snapshot has the old contents, the device continues with its own, and the sealed layer accepts
        // no writes.
        let frozen = disks.config("frozen.json", &lowers, None);
        same_trees(disks.exported(&frozen, false).path(), &disks.at("first"));
        same_trees(disks.exported(&config, true).path(), &disks.at("second"));
        let device = disks.attach(frontend, &config, &[]);
        same_trees(&mnt, &disks.at("second"));
        disks.detach(&device);
        let sealed = disks.config("sealed.json", &disks.lowers(), Some(&one));
        let args = ["attach", "--frontend", frontend, "--config", &sealed];
        let ended = end(&mut disks.work.turbobd(&args));
        assert_eq!(ended.code, Some(1));
        assert!(ended.stderr.contains("it was sealed"), "{}", ended.stderr);
    }
}

#[test]
fn the_writable_layer_of_a_config_is_written_over_loop_and_read_again() {
    machine::need_root();
    let _alone = alone();
    is_written_and_read_again("loop");
}

#[test]
fn a_device_in_use_continues_on_another_layer_over_loop() {
    machine::need_root();
    let _alone = alone();
    continues_on_another("loop");
}

#[test]
fn the_writable_layer_of_a_config_is_written_over_ublk_and_read_again() {
    if !ublk_here() {
        println!("not run here: no ublk; in_a_guest_with_ublk runs it in scripts/vm");
        return;
    }
    let _alone = alone();
    is_written_and_read_again("ublk");
}

#[test]
fn a_device_in_use_continues_on_another_layer_over_ublk() {
    if !ublk_here() {
        println!("not run here: no ublk; in_a_guest_with_ublk runs it in scripts/vm");
        return;
    }
    let _alone = alone();
    continues_on_another("ublk");
}

#[test]
fn in_a_guest_with_ublk() {
    block::in_a_guest_with_ublk(module_path!(), &["over_ublk"], 2);
}
