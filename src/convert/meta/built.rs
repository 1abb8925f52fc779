//! Records of what this host has built.
//!
//! The local store is an image layout, and anything can get into a layout: a tool copies images, a backup is unpacked,
//! an older version left its own. So a tag in it proves nothing. When this host has built a meta image, it writes a small
//! file of its own, named by the digest of the *plain* manifest, which names the digest of the meta image. Only what such a
//! record names counts as built here, and it is read by its digest, never by a tag.
//!
//! ```text
//! DIR/built/<64 digits of the plain manifest>.json   {"plain": …, "meta": …, "layout": 2}
//! ```
//!
//! A record counts if it belongs to the user of this process and only that user can write it. A record of a conversion
//! whose output has changed since is of no use: the image is built again.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use formats::oci::Digest;

/// Folder of the records in the local store.
const FOLDER: &str = "built";

/// Most bytes of a record: it has some 200.
const RECORD_LIMIT: u64 = 4096;

/// Version of the conversion that a record speaks of. It is raised with a fault of the conversion that must not live
/// on in the stores of hosts; 1 was the store without records.
const LAYOUT: u32 = 2;

/// A record.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct BuiltRecord {
    plain: Digest,
    meta: Digest,
    layout: u32,
}

fn file(dir: &Path, plain: &Digest) -> PathBuf {
    dir.join(FOLDER).join(format!("{}.json", plain.hex()))
}

/// The meta image that this host has built for the plain manifest in the store in `dir`.
pub(super) fn find(dir: &Path, plain: &Digest) -> Option<Digest> {
    let record = read(&file(dir, plain))
        .inspect_err(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%plain, %error, "The record of a meta image is ignored");
            }
        })
        .ok()?;
    (record.plain == *plain && record.layout == LAYOUT).then_some(record.meta)
}

fn read(path: &Path) -> io::Result<BuiltRecord> {
    let folder = path.parent().unwrap_or(path);
    own(folder, &std::fs::symlink_metadata(folder)?)?;
    // A link could name a file of another user.
    let flags = OFlags::NOFOLLOW.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    own(path, &file.metadata()?)?;
    let mut text = Vec::new();
    file.take(RECORD_LIMIT).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Refuses what another user owns or can write.
fn own(path: &Path, meta: &std::fs::Metadata) -> io::Result<()> {
    let is_own = meta.uid() == rustix::process::geteuid().as_raw();
    if is_own && meta.permissions().mode() & 0o022 == 0 && !meta.is_symlink() {
        return Ok(());
    }
    Err(io::Error::other(format!("other users can write {}", path.display())))
}

/// Records that this host has built `meta` for `plain`. The meta image must be in the store by then.
///
/// # Errors
/// The system's reason.
pub(super) fn keep(dir: &Path, plain: &Digest, meta: &Digest) -> io::Result<()> {
    let folder = dir.join(FOLDER);
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    own(&folder, &std::fs::symlink_metadata(&folder)?)?;
    let record = BuiltRecord { plain: *plain, meta: *meta, layout: LAYOUT };
    let mut new = tempfile::NamedTempFile::new_in(&folder)?; // mode 0600
    serde_json::to_writer(&mut new, &record)?;
    new.write_all(b"\n")?;
    new.as_file().sync_all()?;
    new.persist(file(dir, plain))?;
    File::open(&folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> (tempfile::TempDir, Digest, Digest) {
        let dir = tempfile::tempdir().unwrap();
        let (plain, meta) = (Digest::of(b"plain"), Digest::of(b"meta"));
        keep(dir.path(), &plain, &meta).unwrap();
        (dir, plain, meta)
    }

    #[test]
    fn a_record_names_what_was_built_and_the_last_one_counts() {
        let (dir, plain, meta) = kept();
        assert_eq!(find(dir.path(), &plain), Some(meta));
        assert_eq!(find(dir.path(), &meta), None);
        let other = Digest::of(b"other");
        keep(dir.path(), &plain, &other).unwrap();
        assert_eq!(find(dir.path(), &plain), Some(other));
    }

    #[test]
    fn a_record_that_others_can_write_or_that_is_a_link_does_not_count() {
        let (dir, plain, meta) = kept();
        let path = file(dir.path(), &plain);
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&path, 0o666);
        assert_eq!(find(dir.path(), &plain), None);
        mode(&path, 0o600);
        assert_eq!(find(dir.path(), &plain), Some(meta));
        mode(&dir.path().join(FOLDER), 0o777);
        assert_eq!(find(dir.path(), &plain), None);
        mode(&dir.path().join(FOLDER), 0o700);
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert_eq!(find(dir.path(), &plain), None);
    }

    #[test]
    fn a_record_under_another_name_or_of_another_version_does_not_count() {
        let (dir, plain, meta) = kept();
        let path = file(dir.path(), &plain);
        let other = Digest::of(b"other");
        std::fs::copy(&path, file(dir.path(), &other)).unwrap();
        assert_eq!(find(dir.path(), &other), None);
        for text in [
            format!("{{\"plain\": \"{plain}\", \"meta\": \"{meta}\", \"layout\": 1}}"),
            "{}".to_owned(),
            String::new(),
        ] {
            std::fs::write(&path, &text).unwrap();
            assert_eq!(find(dir.path(), &plain), None, "{text}");
        }
    }
}
