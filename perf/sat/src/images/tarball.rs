//! The upper directory of an overlay as a layer: a tar in gzip, the same bytes for the same tree.
//!
//! A device 0:0 of the overlay becomes a whiteout file, an opaque folder gets the opaque whiteout. Names are sorted.
//! Times behind [`LATEST`] are of the build, so they become that time; earlier ones came with a package and stay.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

use super::layer::hex;
use crate::failure::{Attempt as _, Failure};

/// The latest time in a layer, 2026-11-01: behind the packages' own times, before any build.
const LATEST: u64 = 1_793_491_200;

/// A packed layer.
#[derive(Debug)]
pub(super) struct Packed {
    /// Digest of the gzip file.
    pub(super) digest: String,
    /// Its bytes.
    pub(super) size: u64,
    /// Digest of the tar.
    pub(super) diff_id: String,
    /// Its bytes.
    pub(super) unpacked: u64,
}

/// Counts and hashes what is written through it.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Hashed<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Packs the tree into `file`.
pub(super) fn pack(tree: &Path, file: &Path) -> Result<Packed, Failure> {
    packed(tree, file).attempt(|| format!("pack {}", tree.display()))
}

fn packed(tree: &Path, file: &Path) -> io::Result<Packed> {
    let out = Hashed::new(BufWriter::with_capacity(1 << 20, File::create(file)?));
    // The level and the header of docker: no name, no time.
    let gzip = Hashed::new(GzEncoder::new(out, Compression::new(6)));
    let mut archive = tar::Builder::new(gzip);
    let mut linked = HashMap::new();
    add_folder(&mut archive, tree, Path::new(""), &mut linked)?;
    let tar = archive.into_inner()?;
    let (diff_id, unpacked) = (tar.hash, tar.bytes);
    let mut out = tar.inner.finish()?;
    out.flush()?;
    let name = |hash: Sha256| format!("sha256:{}", hex(&hash.finalize()));
    Ok(Packed { digest: name(out.hash), size: out.bytes, diff_id: name(diff_id), unpacked })
}

type Archive<W> = tar::Builder<W>;

/// Adds what is in a folder, in the order of names.
fn add_folder<W: Write>(
    archive: &mut Archive<W>,
    tree: &Path,
    folder: &Path,
    linked: &mut HashMap<u64, PathBuf>,
) -> io::Result<()> {
    let mut names: Vec<_> = fs::read_dir(tree.join(folder))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    names.sort();
    for name in names {
        let path = folder.join(&name);
        let on_disk = tree.join(&path);
        let found = fs::symlink_metadata(&on_disk)?;
        let kind = found.file_type();
        let mut header = Header::new_gnu();
        header.set_mode(found.mode() & 0o7777);
        header.set_uid(found.uid().into());
        header.set_gid(found.gid().into());
        header.set_mtime(u64::try_from(found.mtime()).unwrap_or(0).min(LATEST));
        header.set_size(0);
        if kind.is_char_device() && found.rdev() == 0 {
            header.set_entry_type(EntryType::Regular);
            header.set_mtime(LATEST);
            let mut whiteout = std::ffi::OsString::from(".wh.");
            whiteout.push(&name);
            archive.append_data(&mut header, folder.join(whiteout), io::empty())?;
            continue;
        }
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            archive.append_data(&mut header, path.join(""), io::empty())?;
            if is_opaque(&on_disk) {
                let mut header = Header::new_gnu();
                header.set_entry_type(EntryType::Regular);
                header.set_mode(0o644);
                header.set_size(0);
                header.set_mtime(LATEST);
                archive.append_data(&mut header, path.join(".wh..wh..opq"), io::empty())?;
            }
            add_folder(archive, tree, &path, linked)?;
        } else if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            archive.append_link(&mut header, &path, fs::read_link(&on_disk)?)?;
        } else if kind.is_file() {
            if found.nlink() > 1 {
                if let Some(first) = linked.get(&found.ino()) {
                    header.set_entry_type(EntryType::Link);
                    archive.append_link(&mut header, &path, first)?;
                    continue;
                }
                linked.insert(found.ino(), path.clone());
            }
            if let Some(capability) = attribute(&on_disk, "security.capability") {
                let entry = ("SCHILY.xattr.security.capability", capability.as_slice());
                archive.append_pax_extensions([entry])?;
            }
            header.set_entry_type(EntryType::Regular);
            header.set_size(found.len());
            archive.append_data(&mut header, &path, File::open(&on_disk)?)?;
        }
        // Sockets, pipes and devices of a build do not belong to an image.
    }
    Ok(())
}

/// True if the folder hides the one below it.
fn is_opaque(folder: &Path) -> bool {
    attribute(folder, "trusted.overlay.opaque").is_some_and(|value| value == b"y")
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    // A capability has 24 bytes, the mark of an overlay one.
    let mut value = [0; 64];
    let length = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
    value.get(..length).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_bytes_at_any_time() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let tree = dir.path().join(name);
            fs::create_dir_all(tree.join("b/c")).unwrap();
            fs::write(tree.join("b/z"), "text").unwrap();
            fs::write(tree.join("a"), vec![7; 100_000]).unwrap();
            fs::hard_link(tree.join("a"), tree.join("b/a")).unwrap();
            std::os::unix::fs::symlink("../a", tree.join("b/link")).unwrap();
            tree
        };
        let first = pack(&make("first"), &dir.path().join("1.tar.gz")).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let second = pack(&make("second"), &dir.path().join("2.tar.gz")).unwrap();
        assert_eq!(first.digest, second.digest);
        assert_eq!(first.size, fs::metadata(dir.path().join("1.tar.gz")).unwrap().len());
        let file = File::open(dir.path().join("1.tar.gz")).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
        let names: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                assert_eq!(entry.header().mtime().unwrap(), LATEST);
                let name = entry.path().unwrap().display().to_string();
                match entry.link_name().unwrap() {
                    Some(to) => format!("{name} -> {}", to.display()),
                    None => name,
                }
            })
            .collect();
        assert_eq!(names, ["a", "b/", "b/a -> a", "b/c/", "b/link -> ../a", "b/z"]);
    }
}
