//! Layers on top of filesystems of other programs: mkfs and the kernel here, upstream's tools in
//! `tests/interop`.
//!
//! The oracle is the kernel: a copy of the lower filesystem is mounted for writing, the names that the layer
//! hides are removed, and GNU tar unpacks the layer into it. The resulting tree must equal that of the disk
//! after turbobd's layer, and e2fsck must find no new problem.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::image;
use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::image::{Images, OCI_GZIP, done, gzip, lower, refused, tar_of, upper};
use crate::listing::{differences, list};
use crate::machine::{Mounted, need_root, output, run};
use convert::apply::LayerApply;
use formats::ext4::{Image, LayerRun, ReadError, Tree, read};
use formats::oci::Digest;
use formats::tar::{Parser, TarEvent};
use formats::units::Sectors;
use serde_json::{Value, json};
use source::{ByteSource, SourceError};

/// A file as the bytes of a disk.
struct FileBytes(File);

impl ByteSource for FileBytes {
    fn len(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.0.read_exact_at(buf, offset).unwrap();
        Ok(())
    }

    fn name(&self) -> &str {
        "a file"
    }
}

/// Runs of sectors that a file has data for.
fn written(file: &File) -> Vec<(Sectors, Sectors)> {
    use rustix::fs::{SeekFrom, seek};
    let mut runs = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        runs.push((Sectors(start / 512), Sectors((at - start).div_ceil(512))));
    }
    runs
}

/// e2fsck's complaints about a disk, without the figures of its last line.
fn complaints(disk: &Path) -> BTreeSet<String> {
    let done = output(Command::new("e2fsck").arg("-fn").arg(disk));
    let text = String::from_utf8_lossy(&done.stdout).replace(disk.to_str().unwrap(), "disk");
    let is_remark = |line: &&str| line.contains('?') || line.contains("WARNING");
    let mut found: BTreeSet<String> = text.lines().filter(is_remark).map(str::to_owned).collect();
    if found.is_empty() && !done.status.success() {
        found.insert(text + &String::from_utf8_lossy(&done.stderr));
    }
    found
}

/// A disk image in a file, with its earlier state.
struct Lower {
    work: tempfile::TempDir,
    disk: PathBuf,
    before: BTreeSet<String>,
}

impl Lower {
    /// Creates a filesystem of 256 MiB and fills it through the kernel.
    fn mkfs(program: &str, options: &[&str]) -> Self {
        let work = tempfile::tempdir().unwrap();
        let disk = work.path().join("disk");
        File::create(&disk).unwrap().set_len(256 << 20).unwrap();
        run(Command::new(program).args(["-q", "-F"]).args(options).arg(&disk));
        in_rw_mount(&disk, |root| {
            run(Command::new("python3").arg("-c").arg(POPULATE).arg(root));
        });
        Self::of(work, disk)
    }

    fn of(work: tempfile::TempDir, disk: PathBuf) -> Self {
        let before = complaints(&disk);
        Self { work, disk, before }
    }

    /// Adds a layer; the kernel and GNU tar do the same to a copy, and both must look the same.
    fn layer(&self, script: &str) {
        let tar = self.work.path().join("layer.tar");
        run(Command::new("python3").arg("-c").arg(LAYER_HEAD.to_owned() + script).arg(&tar));
        let copy = self.work.path().join("copy");
        run(Command::new("cp").arg("--sparse=always").arg(&self.disk).arg(&copy));
        in_rw_mount(&copy, |root| unpack(&tar, root));

        let file = File::options().read(true).write(true).open(&self.disk).unwrap();
        let volume = FileBytes(file.try_clone().unwrap());
        let (mut tree, mut image) = read(&volume, written(&file)).unwrap();
        apply_and_write(&mut tree, &mut image, &fs::read(&tar).unwrap(), &file);
        drop(file);

        let new: Vec<_> = complaints(&self.disk).difference(&self.before).cloned().collect();
        assert!(new.is_empty(), "{}", new.join("\n"));
        let (ours, theirs) = (Mounted::ext4(&self.disk), Mounted::ext4(&copy));
        let (ours, theirs) = (list(ours.path()), list(theirs.path()));
        let found = differences(&ours, &theirs, &|name| name == ".", &|_, listed| listed.directory);
        assert!(found.is_empty(), "{} differences\n{}", found.len(), found.join("\n"));
        assert!(ours.len() > 40, "only {} files", ours.len());
    }
}

/// Applies a tar and writes the layer's data over the disk, as a stack of layers would be read.
fn apply_and_write(tree: &mut Tree, image: &mut Image, tar: &[u8], disk: &File) {
    let mut layer = LayerApply::new(tree);
    let mut parser = Parser::with_data();
    parser
        .feed(tar, &mut |event| match event {
            TarEvent::Entry(entry) => {
                layer.entry(entry).unwrap();
                Ok::<(), formats::tar::TarError>(())
            }
            TarEvent::Data(bytes) => {
                layer.data(bytes);
                Ok(())
            }
        })
        .unwrap();
    parser.finish().unwrap();
    layer.finish().unwrap();
    for run in image.commit_layer(tree).unwrap().runs() {
        let at = run.lba().bytes().0;
        match run {
            LayerRun::Metadata { bytes, .. } => disk.write_all_at(bytes, at).unwrap(),
            LayerRun::Zeroed { count, .. } => {
                disk.write_all_at(&vec![0; count.bytes().0 as usize], at).unwrap();
            }
            LayerRun::Remote { count, target, .. } => {
                let start = target.bytes().0 as usize;
                disk.write_all_at(&tar[start..start + count.bytes().0 as usize], at).unwrap();
            }
        }
    }
}

/// Mounts a disk for writing while `work` goes on.
fn in_rw_mount(disk: &Path, work: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    run(Command::new("mount")
        .args(["-t", "ext4", "-o", "loop,acl,user_xattr"])
        .arg(disk)
        .arg(dir.path()));
    work(dir.path());
    run(Command::new("umount").arg(dir.path()));
}

/// The tree of a layer by the kernel and GNU tar: whiteouts first, because they name files of the layers
/// below.
fn unpack(tar: &Path, root: &Path) {
    for name in run(Command::new("tar").arg("-tf").arg(tar)).lines() {
        let (dir, base) = name.rsplit_once('/').unwrap_or((".", name));
        let dir = root.join(dir);
        if base == ".wh..wh..opq" {
            for entry in fs::read_dir(&dir).unwrap() {
                remove(&entry.unwrap().path());
            }
        } else if let Some(hidden) = base.strip_prefix(".wh.") {
            remove(&dir.join(hidden));
        }
    }
    run(Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "-xpf"])
        .arg(tar)
        .args(["--exclude=.wh.*", "-C"])
        .arg(root));
    run(Command::new("python3").arg("-c").arg(LINK_ATTRIBUTES).arg(tar).arg(root));
}

fn remove(path: &Path) {
    match path.symlink_metadata() {
        Ok(file) if file.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// GNU tar leaves the attributes of a link's target alone; containerd does not.
const LINK_ATTRIBUTES: &str = r"
import os, sys, tarfile
os.chdir(sys.argv[2])
for info in tarfile.open(sys.argv[1]):
    if info.islnk():
        os.chown(info.name, info.uid, info.gid)
        for key, value in info.pax_headers.items():
            if key.startswith('SCHILY.xattr.'):
                os.setxattr(info.name, key[13:], value.encode())
        os.chmod(info.name, info.mode)
        os.utime(info.name, (info.mtime, info.mtime))
";

/// Every feature of a filesystem, some of it created and deleted again.
const POPULATE: &str = r#"
import os, socket, stat, struct, sys
os.chdir(sys.argv[1])
def write(name, data, mode=0o644):
    with open(name, 'wb') as file:
        file.write(data)
    os.chmod(name, mode)
for i in range(300):
    write(f'gone{i}', os.urandom(9000))
for d in ('a', 'a/b', 'a/b/c', 'big', 'many', 'opaque', 'opaque/inner', 'replaced', 'empty'):
    os.mkdir(d)
for i in range(300):
    os.unlink(f'gone{i}')
for size in (0, 1, 511, 4095, 4096, 5000, 1 << 20, 5 << 20):
    write(f'a/size{size}', (b'%d ' % size) * (size // 2 + 1), 0o640)
    os.truncate(f'a/size{size}', size)
for i in range(3000):
    write(f'big/a-name-that-is-long-enough-to-fill-blocks-{i:05}', b'%d' % i if i % 100 == 0 else b'')
for i in range(200):
    os.symlink('t' * (i % 60 + 1), f'many/{i}')
    os.mkdir(f'many/d{i}')
for n in (1, 58, 59, 60, 61, 1000, 4000):
    os.symlink('x' * n, f'a/link{n}')
with open('a/sparse', 'wb') as file:
    for i in range(800):
        file.seek(i * 8192)
        file.write(b'%05d' % i * 800)
    file.truncate(20 << 20)
with open('a/unwritten', 'wb') as file:
    os.posix_fallocate(file.fileno(), 0, 1 << 20)
    file.write(b'start')
os.link('a/size5000', 'a/b/hard'); os.link('a/size5000', 'hard2')
os.mknod('a/null', stat.S_IFCHR | 0o666, os.makedev(1, 3))
os.mknod('a/blk', stat.S_IFBLK | 0o660, os.makedev(259, 70000))
os.mkfifo('a/fifo')
socket.socket(socket.AF_UNIX).bind('a/socket')
for i in range(6):
    write(f'opaque/shared{i}', b's')
    os.setxattr(f'opaque/shared{i}', 'user.big', b'B' * 2000)
    write(f'a/shared{i}', b's')
    os.setxattr(f'a/shared{i}', 'user.big', b'B' * 2000)
write('a/attr', b'x'); os.setxattr('a/attr', 'user.small', b'v'); os.setxattr('a/attr', 'security.capability', bytes.fromhex('0100000200040000000000000000000000000000'))
os.setxattr('a/b', 'user.on-dir', b'd' * 500); os.setxattr('a/b/c', 'trusted.t', b'')
acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *e) for e in ((1, 7, 0xffffffff), (2, 5, 1234), (4, 5, 0xffffffff), (16, 7, 0xffffffff), (32, 4, 0xffffffff)))
os.setxattr('a/attr', 'system.posix_acl_access', acl); os.setxattr('a/b/c', 'system.posix_acl_default', acl)
for i, ns in enumerate((0, 1, 1_600_000_000_123_456_789, 5_000_000_000_000_000_001, -86400 * 10**9)):
    write(f'a/time{i}', b't'); os.utime(f'a/time{i}', ns=(ns, ns))
os.chown('a/size1', 70000, 80000); os.chown('a/b', 1, 2); os.chmod('a/b', 0o2771)
for i in range(5):
    write(f'replaced/{i}', os.urandom(20000))
"#;

/// Functions that write layers: `add(name, data)`, `directory`, `link`, `symlink`, `gone`.
const LAYER_HEAD: &str = r"
import io, sys, tarfile
out = tarfile.open(sys.argv[1], 'w', format=tarfile.PAX_FORMAT)
def put(name, type, data=b'', **more):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime, info.mode, info.uid, info.gid = type, len(data), 1700000000, 0o644, 3, 4
    for key, value in more.items():
        setattr(info, key, value)
    out.addfile(info, io.BytesIO(data))
def add(name, data=b'', **more): put(name, tarfile.REGTYPE, data, **more)
def directory(name, mode=0o755, **more): put(name, tarfile.DIRTYPE, mode=mode, **more)
def link(name, target, **more): put(name, tarfile.LNKTYPE, linkname=target, **more)
def symlink(name, target): put(name, tarfile.SYMTYPE, linkname=target, mode=0o777)
def gone(name): add(name.rpartition('/')[0] + '/.wh.' + name.rpartition('/')[2] if '/' in name else '.wh.' + name)
";

/// Replaces, removes, links to, and extends files of [`POPULATE`].
const CHANGES: &str = r"
gone('a/size1048576'); gone('a/fifo'); gone('a/link4000'); gone('a/sparse'); gone('many'); gone('nothing')
directory('opaque'); add('opaque/.wh..wh..opq'); add('opaque/new', b'n' * 10000)
directory('replaced'); add('replaced/0', b'other' * 3000); symlink('replaced/1', 'y' * 100); directory('replaced/2'); add('replaced/2/in', b'in')
gone('empty'); add('empty', b'a file now')
directory('a', 0o700, uid=9, gid=9)
link('newhard', 'a/size5242880', mode=0o600, uid=5, gid=6); link('a/b/newhard', 'a/time2', mode=0o751)
gone('hard2'); gone('a/shared0'); link('s1', 'a/shared1', pax_headers={'SCHILY.xattr.user.big': 'other' * 300})
directory('big')
for i in range(2000):
    add(f'big/one-more-name-that-is-rather-long-{i:05}', b'z' * (i % 3))
for i in range(0, 3000, 7):
    gone(f'big/a-name-that-is-long-enough-to-fill-blocks-{i:05}')
directory('fresh'); directory('fresh/htree')
for i in range(400):
    directory(f'fresh/htree/directory-{i}')
add('fresh/attr', b'x', pax_headers={'SCHILY.xattr.user.long': 'l' * 3000, 'SCHILY.xattr.user.short': 's'})
add('fresh/large', bytes(range(256)) * 40000)
symlink('fresh/long', 'q' * 2000)
put('fresh/dev', tarfile.CHRTYPE, devmajor=300, devminor=70000)
put('fresh/pipe', tarfile.FIFOTYPE)
";

/// Further changes, on top of [`CHANGES`].
const MORE_CHANGES: &str = r"
gone('fresh/htree'); gone('newhard'); gone('a/b/hard'); gone('a/size5000')
for i in range(1, 6):
    gone(f'a/shared{i}')
directory('big'); add('big/.wh..wh..opq'); add('big/last', b'l')
add('fresh/large', b'small'); link('again', 'fresh/attr', pax_headers={'SCHILY.xattr.user.short': 't'})
directory('lost+found', 0o755); add('lost+found/file', b'own')
";

/// Every usual set of mkfs features.
const FILESYSTEMS: [(&str, &[&str]); 14] = [
    ("mkfs.ext4", &[]),
    (
        "mkfs.ext4",
        &["-O", "^has_journal,^metadata_csum,^uninit_bg,sparse_super2,^resize_inode", "-G", "1"],
    ),
    ("mkfs.ext4", &["-O", "^64bit,^metadata_csum,uninit_bg"]),
    ("mkfs.ext4", &["-O", "64bit,^metadata_csum,uninit_bg,^flex_bg"]),
    ("mkfs.ext4", &["-O", "^64bit,metadata_csum"]),
    ("mkfs.ext4", &["-O", "metadata_csum,metadata_csum_seed,orphan_file"]),
    ("mkfs.ext4", &["-O", "^extent,^64bit,^flex_bg,^metadata_csum"]),
    ("mkfs.ext4", &["-I", "128"]),
    ("mkfs.ext4", &["-I", "1024", "-O", "metadata_csum"]),
    ("mkfs.ext4", &["-O", "meta_bg,^resize_inode", "-g", "2048"]),
    ("mkfs.ext4", &["-O", "^dir_index", "-g", "8192", "-N", "20000"]),
    ("mkfs.ext4", &["-O", "large_dir", "-E", "lazy_itable_init=1"]),
    ("mkfs.ext3", &["-b", "4096"]),
    ("mkfs.ext2", &["-b", "4096"]),
];

#[test]
fn layers_go_on_top_of_every_filesystem_of_mkfs() {
    need_root();
    for (program, options) in FILESYSTEMS {
        println!("{program} {options:?}");
        let mut all = vec!["-b", "4096"];
        all.extend(options);
        let lower = Lower::mkfs(program, &all);
        assert!(lower.before.is_empty(), "{:?}", lower.before);
        lower.layer(CHANGES);
        lower.layer(MORE_CHANGES);
    }
}

#[test]
fn what_cannot_be_continued_is_refused_by_name() {
    need_root();
    let refused = |options: &[&str]| {
        let work = tempfile::tempdir().unwrap();
        let disk = work.path().join("disk");
        File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).args(options).arg(&disk));
        let file = File::open(&disk).unwrap();
        read(&FileBytes(file.try_clone().unwrap()), written(&file)).unwrap_err().to_string()
    };
    for (options, expected) in [
        (&["-b", "1024"][..], "blocks of 1024 B"),
        (&["-b", "2048"], "blocks of 2048 B"),
        (&["-b", "4096", "-O", "bigalloc"], "bigalloc"),
        (&["-b", "4096", "-O", "inline_data"], "inline_data"),
        (&["-b", "4096", "-O", "encrypt"], "encrypt"),
        (&["-b", "4096", "-O", "casefold"], "casefold"),
        (&["-b", "4096", "-O", "quota"], "quota"),
        (&["-b", "4096", "-O", "ea_inode"], "ea_inode"),
        (&["-b", "4096", "-O", "mmp"], "mmp"),
        (&["-b", "4096", "-O", "verity"], "verity"),
    ] {
        let text = refused(options);
        assert!(text.contains(expected), "{options:?}: {text}");
    }
    let zeros = tempfile::tempfile().unwrap();
    zeros.set_len(1 << 20).unwrap();
    assert!(matches!(read(&FileBytes(zeros), []), Err(ReadError::NotExt4)));
}

#[test]
fn a_disk_that_is_still_mounted_is_refused() {
    need_root();
    let lower = Lower::mkfs("mkfs.ext4", &["-b", "4096"]);
    let copy = lower.work.path().join("live");
    in_rw_mount(&lower.disk, |root| {
        fs::write(root.join("more"), b"more").unwrap();
        run(Command::new("sync").arg("-f").arg(root));
        fs::copy(&lower.disk, &copy).unwrap();
    });
    let file = File::open(&copy).unwrap();
    let error = read(&FileBytes(file.try_clone().unwrap()), written(&file)).unwrap_err();
    assert!(error.to_string().contains("not unmounted cleanly"), "{error}");
}

/// A further layer above `tests/interop/upper.tar.gz`.
const TOP: &str = r"
gone('files/t3000000'); gone('many/file-with-some-name-00011'); gone('usr'); gone('swap')
link('newlink', 'files/r1000003', mode=0o640, uid=7, gid=8); link('files/again', 'files/new2m')
add('files/r65536', b'replaced' * 5000); add('files/t1', b''); symlink('files/r59', 'q' * 500)
directory('wh', 0o700); directory('wh/opq'); add('wh/opq/.wh..wh..opq'); add('wh/opq/only', b'only' * 2000)
directory('many')
for i in range(1500):
    add(f'many/further-file-with-a-longer-name-{i:05}', b'%d' % i * (i % 5))
directory('new'); directory('new/dir'); add('new/dir/large', bytes(range(256)) * 12345)
add('new/attr', b'x', pax_headers={'SCHILY.xattr.user.long': 'l' * 3000})
";

fn interop(name: &str) -> Option<PathBuf> {
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(name);
    let extra = env::var_os("TURBOBD_INTEROP_EXTRA")
        .map(|extra| Path::new(&extra).join(Path::new(name).file_name().unwrap()));
    [Some(stored), extra].into_iter().flatten().find(|path| path.exists())
}

/// An upstream's image in a layout, in the form of its converter's output; an error names the missing file.
fn upstreams_image(images: &Images, case: &Value) -> Result<(), String> {
    const KEY: &str = "containerd.io/snapshot/overlaybd";
    let read = |name: &Value| {
        let name = name.as_str().unwrap();
        interop(name).map(|path| fs::read(path).unwrap()).ok_or_else(|| name.to_owned())
    };
    let (mut layers, mut ids) = (Vec::new(), Vec::new());
    for lower in case["config"]["lowers"].as_array().unwrap() {
        let file = read(&lower["file"])?;
        let (blob, mut notes) = match lower.get("targetDigest") {
            None => (file, json!({})),
            Some(target) => {
                let index = read(&lower["gzipIndex"])?;
                let members: [(&str, &[u8]); 3] =
                    [("ext4.fs.meta", &file), (".turbo.ociv1", b""), ("gzip.meta", &index)];
                let notes = json!({
                    format!("{KEY}/turbo-oci/target-digest"): target,
                    format!("{KEY}/turbo-oci/target-media-type"): OCI_GZIP,
                });
                (gzip(&tar_of(&members)), notes)
            }
        };
        let mut layer = images.descriptor(OCI_GZIP, &blob);
        notes[format!("{KEY}/blob-digest")] = layer["digest"].clone();
        notes[format!("{KEY}/blob-size")] = blob.len().to_string().into();
        notes[format!("{KEY}/version")] =
            if lower.get("targetDigest").is_some() { "0.1.0-turbo.ociv1" } else { "0.1.0" }.into();
        layer["annotations"] = notes;
        layers.push(layer);
        ids.push(Digest::of(&blob).to_string());
    }
    let config = json!({"architecture": image::host_architecture(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": ids}});
    let config = images.descriptor(image::OCI_CONFIG, config.to_string().as_bytes());
    images.set_manifest(
        "upstream",
        &json!({"schemaVersion": 2, "mediaType": image::OCI_MANIFEST, "config": config, "layers": layers}),
    );
    Ok(())
}

/// Exports an image to a raw file in `work`.
fn export(images: &Images, tag: &str, work: &Path) -> PathBuf {
    let raw = work.join(tag);
    let _ = fs::remove_file(&raw);
    done(&["export", &images.name(tag), "-o", raw.to_str().unwrap()]);
    raw
}

#[test]
fn layers_go_on_top_of_every_disk_of_upstream_in_both_formats() {
    need_root();
    let cases: Value = serde_json::from_slice(
        &fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/cases.json")).unwrap(),
    )
    .unwrap();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let tar = work.path().join("top.tar");
    run(Command::new("python3").arg("-c").arg(LAYER_HEAD.to_owned() + TOP).arg(&tar));
    let mut ran = 0;
    for (name, case) in cases.as_object().unwrap() {
        println!("{name}");
        let images = Images::new();
        let blob =
            |name: &str| fs::read(interop(&format!("blobs/{name}.tar.gz")).unwrap()).unwrap();
        let sources = [blob("base"), blob("upper"), gzip(&fs::read(&tar).unwrap())];
        images.add("latest", &sources.map(|layer| (OCI_GZIP, layer)));
        if let Err(file) = upstreams_image(&images, case) {
            println!("not run: {file} is not stored here; set TURBOBD_INTEROP_EXTRA");
            continue;
        }
        ran += 1;
        let place = images.place();
        let convert = |tag: &str| {
            done(&[
                "convert",
                "-r",
                &place,
                "-i",
                "latest",
                "--base",
                "upstream",
                "--oci",
                "--turboOCI",
                tag,
                "--overlaybd",
                "native",
            ])
        };
        let first = convert("turbo");
        assert_eq!(first, convert("turbo-again"), "the same base and layers are the same bytes");
        let lowers = case["config"]["lowers"].as_array().unwrap().len();
        for tag in ["turbo", "native"] {
            let layers = images.manifest(tag)["layers"].as_array().unwrap().clone();
            assert_eq!(layers.len(), lowers + 1);
            assert_eq!(
                layers[..lowers],
                images.manifest("upstream")["layers"].as_array().unwrap()[..]
            );
        }

        let below = export(&images, "upstream", work.path());
        let before = complaints(&below);
        in_rw_mount(&below, |root| unpack(&tar, root));
        let theirs = list(Mounted::ext4(&below).path());
        for tag in ["turbo", "native"] {
            let raw = export(&images, tag, work.path());
            let new: Vec<_> = complaints(&raw).difference(&before).cloned().collect();
            assert!(new.is_empty(), "{name} {tag}: {}", new.join("\n"));
            let ours = list(Mounted::ext4(&raw).path());
            let found =
                differences(&ours, &theirs, &|name| name == ".", &|_, listed| listed.directory);
            assert!(found.is_empty(), "{} differences\n{}", found.len(), found.join("\n"));
            assert!(ours.len() > 2000, "only {} files", ours.len());
        }
    }
    assert!(ran >= 4, "only {ran} cases ran");
}

/// The sample image and a third layer.
fn three_layers() -> Images {
    let images = Images::new();
    let third = tar_of(&[("etc/.wh.last", b""), ("page", b"third"), ("third", &[7; 9000])]);
    let layers = [lower(), upper(), third].map(|tar| (OCI_GZIP, gzip(&tar)));
    images.add("two", &layers[..2]);
    images.add("three", &layers);
    images
}

fn convert(images: &Images, source: &str, more: &[&str]) -> String {
    let place = images.place();
    let mut args = vec!["convert", "-r", &place, "-i", source, "--vsize", "1"];
    args.extend(more);
    done(&args)
}

#[test]
fn a_conversion_that_reads_its_lower_layers_back_gives_the_bytes_of_one_go_and_reads_none_of_them()
{
    let (images, fresh) = (three_layers(), three_layers());
    let expected = convert(&fresh, "three", &["--turboOCI", "turbo"]);
    convert(&images, "two", &["--turboOCI", "turbo"]);
    // Reading back needs only the metadata of a TurboOCI layer: damage in the data is not noticed.
    let lowest = images.layer("three", 0);
    let mut blob = images.blob(&lowest);
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    fs::write(images.blob_path(&lowest), blob).unwrap();
    assert_eq!(convert(&images, "three", &["--turboOCI", "turbo"]), expected);
    refused(
        &[
            "convert",
            "-r",
            &images.place(),
            "-i",
            "three",
            "--turboOCI",
            "x",
            "--vsize",
            "1",
            "--anew",
        ],
        &["Layer 0"],
    );
}

#[test]
fn new_layers_of_one_format_go_on_top_of_the_other() {
    for (below, above) in [("--overlaybd", "--turboOCI"), ("--turboOCI", "--overlaybd")] {
        let images = three_layers();
        convert(&images, "two", &[below, "below"]);
        convert(&images, "three", &[above, "mixed", "--base", "below"]);
        convert(&images, "three", &["--turboOCI", "whole"]);
        assert_eq!(images.layer("mixed", 0), images.layer("below", 0));
        if above == "--turboOCI" {
            assert_eq!(images.layer("mixed", 2), images.layer("whole", 2), "the disk is the same");
        }
        let digest = |tag: &str| done(&["export", &images.name(tag), "--digest"]);
        assert_eq!(digest("mixed"), digest("whole"), "{above} on {below}");
        // An image on a base is found again under its tag, and has the same result when it is created again.
        let once = images.tagged("mixed");
        convert(&images, "three", &[above, "mixed"]);
        assert_eq!(images.tagged("mixed"), once);
    }
}

#[test]
fn a_base_of_other_layers_is_refused_and_says_which() {
    let images = three_layers();
    let other = [(OCI_GZIP, gzip(&tar_of(&[("other", b"other")])))];
    images.add("other", &other);
    for format in ["--turboOCI", "--overlaybd"] {
        convert(&images, "other", &[format, "converted"]);
        let place = images.place();
        let args = ["convert", "-r", &place, "-i", "three", format, "x", "--base", "converted"];
        refused(&args, &["base image", "no layer in common", &images.layer("three", 0)]);
    }
    let place = images.place();
    let args = ["convert", "-r", &place, "-i", "three", "--turboOCI", "x", "--base", "two"];
    refused(&args, &["base image", "is not converted"]);
}
