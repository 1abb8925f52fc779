//! Folders and files of this process that no other user can replace.
//!
//! Sockets, logs, caches, traces and meta images lie in folders that the operator chooses. If another user can write to such a
//! folder, that user can put a link in the place of a file and have this process, which is root, write or read elsewhere; or
//! replace the content. So a folder is used only if it belongs to this user or to root and is not writable by others, and a link on the
//! way to it is followed only if one of the two made it (as the kernel's `fs.protected_symlinks` does for sticky folders). A
//! file in a folder that is not ours, such as a log in `/tmp`, is opened without following a link, and must be ours.
//!
//! What is above the folder is not examined: a user who can rename the parents of a folder of root is trusted by the
//! operator who put it there.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

/// Mode of folders of this process.
pub const FOLDER_MODE: u32 = 0o700;

/// Mode of its files.
pub const FILE_MODE: u32 = 0o600;

/// Bits of a mode that let others than the owner write.
const OTHERS_WRITE: u32 = 0o022;

/// Links that are followed on the way to a folder, as many as the kernel follows.
const MOST_LINKS: usize = 40;

/// Makes `dir` with its missing parents for this user alone, and examines it.
///
/// # Errors
/// The system's; [`io::ErrorKind::PermissionDenied`], with a sentence of what to do, if others can change what is in it.
pub fn folder(dir: &Path) -> io::Result<()> {
    if !dir.is_dir() {
        DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(dir)?;
    }
    examine_links(dir)?;
    let meta = fs::metadata(dir)?;
    match others_can_write(&meta) {
        None => Ok(()),
        Some(why) => Err(refused(
            dir,
            &format!(
                "{why}, so that its files can be replaced or be links: `chown {} {dir}; chmod go-w {dir}`, or choose another folder",
                rustix::process::geteuid().as_raw(),
                dir = dir.display()
            ),
        )),
    }
}

/// Opens a file of this process; one that it makes has the mode [`FILE_MODE`]. In a folder that others can write, it must be no
/// link, and must be ours.
///
/// # Errors
/// The system's; [`io::ErrorKind::PermissionDenied`], with a sentence, if it is another user's.
pub fn open(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let shared = fs::metadata(folder.unwrap_or(Path::new(".")))
        .is_ok_and(|meta| others_can_write(&meta).is_some());
    let mut options = options.clone();
    options.mode(FILE_MODE);
    if !shared {
        return options.open(path);
    }
    // A pipe of another user must not make this wait.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = options.custom_flags(flags.bits() as i32).open(path)?;
    let meta = file.metadata()?;
    if !is_trusted(meta.uid()) || meta.nlink() > 1 {
        let why = "it lies in a folder that others can write, and is another user's or has other names: remove it, or choose another folder";
        return Err(refused(path, why));
    }
    Ok(file)
}

fn refused(path: &Path, why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("{} is not used: {why}", path.display()),
    )
}

/// True for root and for this process.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// The reason why others than root and this user can change the content of a folder.
fn others_can_write(meta: &Metadata) -> Option<String> {
    let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
    if !is_trusted(uid) {
        return Some(format!("it belongs to the user {uid}"));
    }
    (mode & OTHERS_WRITE != 0)
        .then(|| format!("others than its owner can write to it (its mode is {mode:o})"))
}

/// Refuses a path with a link that another user made.
fn examine_links(path: &Path) -> io::Result<()> {
    let mut rest: Vec<PathBuf> = Vec::new();
    let push = |rest: &mut Vec<PathBuf>, path: &Path| {
        rest.extend(path.components().rev().map(|part| PathBuf::from(part.as_os_str())));
    };
    push(&mut rest, &std::path::absolute(path)?);
    let (mut at, mut links) = (PathBuf::new(), 0);
    while let Some(part) = rest.pop() {
        match part.components().next() {
            Some(Component::ParentDir) => _ = at.pop(),
            Some(_) => at.push(&part),
            None => {}
        }
        let meta = match fs::symlink_metadata(&at) {
            Ok(meta) if meta.is_symlink() => meta,
            _ => continue,
        };
        if !is_trusted(meta.uid()) {
            let why = format!(
                "{} is a link that the user {} made: name the folder itself",
                at.display(),
                meta.uid()
            );
            return Err(refused(path, &why));
        }
        links += 1;
        if links > MOST_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let target = fs::read_link(&at)?;
        at.pop();
        push(&mut rest, &target);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_folder_is_made_for_its_user_alone_and_one_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("a/b");
        folder(&made).unwrap();
        assert_eq!((mode(&made), mode(made.parent().unwrap())), (0o700, 0o700));
        for open in [0o777, 0o720, 0o702, 0o1777] {
            chmod(&made, open);
            let refused = folder(&made).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            assert!(refused.to_string().contains("chmod go-w"), "{refused}");
        }
        chmod(&made, 0o755);
        folder(&made).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(&made, Some(1234), None).unwrap();
            assert!(folder(&made).unwrap_err().to_string().contains("belongs to the user 1234"));
        }
    }

    #[test]
    fn a_link_on_the_way_is_followed_only_if_root_or_this_user_made_it() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        folder(&target).unwrap();
        symlink("target", &link).unwrap();
        folder(&link).unwrap();
        folder(&link.join("below")).unwrap();
        if rustix::process::geteuid().is_root() {
            lchown(&link, Some(1234), None).unwrap();
            for path in [link.clone(), link.join("below"), dir.path().join("target/../link/below")]
            {
                assert!(
                    folder(&path)
                        .unwrap_err()
                        .to_string()
                        .contains("a link that the user 1234 made")
                );
            }
        }
    }

    #[test]
    fn a_file_in_a_shared_folder_is_opened_through_no_link_and_must_be_ours() {
        let dir = tempfile::tempdir().unwrap();
        let options = OpenOptions::new().append(true).create(true).clone();
        let (own, link, other) =
            (dir.path().join("own"), dir.path().join("link"), dir.path().join("other"));
        symlink(&own, &link).unwrap();
        open(&link, &options).unwrap();
        assert_eq!(mode(&own), 0o600);
        chmod(dir.path(), 0o1777);
        open(&own, &options).unwrap();
        assert!(open(&link, &options).is_err(), "a link in a folder that others can write");
        fs::hard_link(&own, &other).unwrap();
        assert!(open(&other, &options).is_err(), "another name of a file");
        fs::remove_file(&other).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(&own, Some(1234), None).unwrap();
            assert!(open(&own, &options).is_err(), "another user's");
        }
    }
}
