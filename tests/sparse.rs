//! Files with holes, in every form that tar has for them: the tree of the converted image, mounted by the
//! kernel, must equal the tree that other programs unpack.
//!
//! containerd cannot unpack the old GNU form (Go's reader reports it as a type that containerd does not
//! handle), so here GNU tar is the oracle. It pads every piece to whole blocks in the archive; Go, Python,
//! libarchive and this program expect pieces without padding between them. GNU tar itself only writes pieces
//! of whole blocks, for which both readings agree; for all others Python is the oracle.

use crate::machine;
use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::listing::{differences, list};
use crate::machine::{Mounted, layout, run, turbobd};

/// Converts one layer, and mounts the result.
fn converted(work: &Path, tar: &[u8]) -> Mounted {
    let layer = work.join("layer.tar.gz");
    let mut gzip =
        flate2::write::GzEncoder::new(File::create(&layer).unwrap(), flate2::Compression::fast());
    gzip.write_all(tar).unwrap();
    gzip.finish().unwrap();
    let repository = layout(&work.join("oci"), "latest", &[layer]);
    run(turbobd().args(["convert", "-r", &repository, "-i", "latest", "--turboOCI", "turbo"]));
    let raw = work.join("raw");
    run(turbobd().args(["export", &format!("{repository}:turbo"), "-o"]).arg(&raw));
    run(Command::new("e2fsck").arg("-fn").arg(&raw));
    Mounted::ext4(&raw)
}

/// Asserts that the mounted tree equals the unpacked one, apart from the roots; returns the number of
/// unpacked names.
fn compare(mounted: &Mounted, unpacked: &Path, compare_times: bool) -> usize {
    let (ours, theirs) = (list(mounted.path()), list(unpacked));
    let skip = |path: &str| path == "." || path == "lost+found";
    let found = differences(&ours, &theirs, &skip, &|_, _| !compare_times);
    assert!(found.is_empty(), "{} differences\n{}", found.len(), found.join("\n"));
    theirs.len()
}

/// Data of a file, with their positions.
type Pieces = Vec<(u64, Vec<u8>)>;

/// Creates files with holes; returns the folder.
fn files_with_holes(work: &Path) -> PathBuf {
    let holes: Pieces = (0..100).map(|i| (i * 65_536, vec![i as u8 + 1; 4096])).collect();
    let shapes: [(&str, u64, Pieces); 6] = [
        ("hole-first", 0, vec![(1 << 20, b"end".to_vec())]),
        ("hole-last", 3 << 20, vec![(0, b"start".to_vec())]),
        ("holes", 0, holes),
        (
            "uneven",
            0,
            vec![
                (5000, vec![b'x'; 5000]),
                (1 << 20, vec![b'y'; 12_345]),
                ((2 << 20) + 777, vec![b'z'; 100]),
            ],
        ),
        ("all-hole", 1 << 20, vec![]),
        ("large", 0, vec![(300 << 20, b"far away".to_vec())]),
    ];
    let folder = work.join("files");
    fs::create_dir(&folder).unwrap();
    for (name, size, pieces) in shapes {
        let mut file = File::create(folder.join(name)).unwrap();
        for (offset, bytes) in pieces {
            file.seek(SeekFrom::Start(offset)).unwrap();
            file.write_all(&bytes).unwrap();
        }
        file.set_len(file.metadata().unwrap().len().max(size)).unwrap();
    }
    folder
}

#[test]
fn files_with_holes_are_what_gnu_tar_unpacks() {
    machine::need_root();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = files_with_holes(work.path());
    for (name, options) in [
        ("gnu", &["--format=gnu"][..]),
        ("pax00", &["--format=pax", "--sparse-version=0.0"]),
        ("pax01", &["--format=pax", "--sparse-version=0.1"]),
        ("pax10", &["--format=pax", "--sparse-version=1.0"]),
    ] {
        let work = work.path().join(name);
        let unpacked = work.join("unpacked");
        fs::create_dir_all(&unpacked).unwrap();
        let tar = work.join("tar");
        run(Command::new("tar")
            .arg("--sparse")
            .args(options)
            .arg("-C")
            .arg(&folder)
            .arg("-cf")
            .arg(&tar)
            .arg("."));
        run(Command::new("tar").args(["--sparse", "-p", "-C"]).arg(&unpacked).arg("-xf").arg(&tar));
        let tar = fs::read(&tar).unwrap();
        assert!(tar.len() < 2 << 20, "{name}: the holes are in the archive");
        let names = compare(&converted(&work, &tar), &unpacked, true);
        assert_eq!(names, 7, "{name}");
    }
}

/// A file of `size` bytes whose pieces (offset, length) are not whole sectors.
struct Uneven {
    name: &'static str,
    size: u64,
    pieces: &'static [(u64, u64)],
}

const UNEVEN: [Uneven; 7] = [
    Uneven { name: "odd-everywhere", size: 10_001, pieces: &[(100, 5), (1000, 700), (5000, 3000)] },
    Uneven { name: "same-phase", size: 9000, pieces: &[(0, 100), (1124, 2000), (8000, 1000)] },
    Uneven { name: "single-bytes", size: 4096, pieces: &[(0, 1), (2, 1), (4, 1), (700, 512)] },
    Uneven {
        name: "one-block",
        size: 5000,
        pieces: &[(0, 512), (600, 10), (1024, 502), (2048, 2952)],
    },
    Uneven { name: "long", size: 400_000, pieces: &[(1, 300_000), (399_999, 1)] },
    Uneven { name: "block-ends", size: 20_000, pieces: &[(4090, 12), (8191, 2), (12_288, 4097)] },
    Uneven { name: "tail", size: 70_077, pieces: &[(4096, 4096), (65_536, 4541)] },
];

impl Uneven {
    /// The bytes of the pieces, one after the other.
    fn stored(&self) -> Vec<u8> {
        let len: u64 = self.pieces.iter().map(|&(_, len)| len).sum();
        (0..len).map(|at| (at * 7 % 251) as u8 + 1).collect()
    }

    /// The file.
    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.size as usize];
        let stored = self.stored();
        let mut rest = &stored[..];
        for &(offset, len) in self.pieces {
            let (piece, more) = rest.split_at(len as usize);
            content[offset as usize..][..piece.len()].copy_from_slice(piece);
            rest = more;
        }
        content
    }

    fn numbers(&self, separator: &str) -> String {
        let pairs = self.pieces.iter().map(|(offset, len)| format!("{offset}{separator}{len}"));
        pairs.collect::<Vec<_>>().join(separator)
    }

    fn header(&self, folder: &str, len: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_path(format!("{folder}-{}", self.name)).unwrap();
        header.set_size(len as u64);
        header.set_mode(0o644);
        header
    }

    fn append_old_gnu(&self, tar: &mut tar::Builder<Vec<u8>>) {
        let stored = self.stored();
        let mut header = self.header("gnu", stored.len());
        header.set_entry_type(tar::EntryType::GNUSparse);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.set_real_size(self.size);
        for (place, &(offset, len)) in gnu.sparse.iter_mut().zip(self.pieces) {
            place.set_offset(offset);
            place.set_length(len);
        }
        header.set_cksum();
        tar.append(&header, &stored[..]).unwrap();
    }

    fn append_pax01(&self, tar: &mut tar::Builder<Vec<u8>>) {
        let stored = self.stored();
        let (size, count) = (self.size.to_string(), self.pieces.len().to_string());
        tar.append_pax_extensions([
            ("GNU.sparse.size", size.as_bytes()),
            ("GNU.sparse.numblocks", count.as_bytes()),
            ("GNU.sparse.map", self.numbers(",").as_bytes()),
        ])
        .unwrap();
        let mut header = self.header("pax01", stored.len());
        header.set_cksum();
        tar.append(&header, &stored[..]).unwrap();
    }

    fn append_pax10(&self, tar: &mut tar::Builder<Vec<u8>>) {
        let mut stored = format!("{}\n{}\n", self.pieces.len(), self.numbers("\n")).into_bytes();
        stored.resize(stored.len().next_multiple_of(512), 0);
        stored.extend(self.stored());
        let (size, name) = (self.size.to_string(), format!("pax10-{}", self.name));
        tar.append_pax_extensions([
            ("GNU.sparse.major", "1".as_bytes()),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", name.as_bytes()),
            ("GNU.sparse.realsize", size.as_bytes()),
        ])
        .unwrap();
        let mut header = self.header("GNUSparseFile.0/pax10", stored.len());
        header.set_cksum();
        tar.append(&header, &stored[..]).unwrap();
    }
}

#[test]
fn pieces_that_are_not_whole_sectors_are_what_python_unpacks() {
    machine::need_root();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    for file in &UNEVEN {
        file.append_old_gnu(&mut tar);
        file.append_pax01(&mut tar);
        file.append_pax10(&mut tar);
    }
    let tar = tar.into_inner().unwrap();
    let mounted = converted(work.path(), &tar);
    for file in &UNEVEN {
        for form in ["gnu", "pax01", "pax10"] {
            let name = format!("{form}-{}", file.name);
            assert!(fs::read(mounted.path().join(&name)).unwrap() == file.content(), "{name}");
        }
    }
    let (path, unpacked) = (work.path().join("tar"), work.path().join("unpacked"));
    fs::write(&path, &tar).unwrap();
    run(Command::new("python3").args(["-m", "tarfile", "-e"]).arg(&path).arg(&unpacked));
    assert_eq!(compare(&mounted, &unpacked, false), 3 * UNEVEN.len() + 1);
}

/// More than the 8192 extents that upstream's converter reads back of one file, losing the rest without an
/// error (spec turbooci 3.3).
const MANY_PIECES: u64 = 10_000;

#[test]
fn a_file_of_more_than_8192_extents_is_whole() {
    machine::need_root();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = work.path().join("files");
    fs::create_dir(&folder).unwrap();
    let mut file = File::create(folder.join("many")).unwrap();
    for number in 0..MANY_PIECES {
        file.seek(SeekFrom::Start(number * 8192)).unwrap();
        file.write_all(&[number as u8 | 1; 4096]).unwrap();
    }
    drop(file);
    let (tar, unpacked) = (work.path().join("tar"), work.path().join("unpacked"));
    fs::create_dir(&unpacked).unwrap();
    // By its zeros: a filesystem that keeps no holes of one block has none to find.
    let sparse = ["--sparse", "--hole-detection=raw", "-C"];
    run(Command::new("tar").args(sparse).arg(&folder).arg("-cf").arg(&tar).arg("."));
    run(Command::new("tar").args(["--sparse", "-p", "-C"]).arg(&unpacked).arg("-xf").arg(&tar));
    let mounted = converted(work.path(), &fs::read(&tar).unwrap());
    assert_eq!(compare(&mounted, &unpacked, true), 2);
    let told = run(Command::new("filefrag").arg("-v").arg(mounted.path().join("many")));
    // "  ext:     logical_offset:        physical_offset: length:" and the lines after it.
    let extents = told.lines().filter(|line| line.contains("..")).count() as u64;
    assert_eq!(extents, MANY_PIECES, "{told}");
}
