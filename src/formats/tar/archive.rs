//! The small tar of upstream's layer format: a few named members only.
//!
//! A TurboOCI layer blob is a gzip of such an archive (spec turbooci 3.1), and its `diff_id` is the digest of
//! exactly these bytes. So the writer is deterministic. It writes the bytes that Go's `archive/tar` writes
//! for a header with only a name, mode 0644 and a size.

use std::io::{self, Write};
use std::ops::Range;

use thiserror::Error;

use crate::tar::entry::{EntryContent, EntryKind};
use crate::tar::{BLOCK, Parser, TarError, TarEvent, shown};
use crate::units::Bytes;

/// Permission bits of a member: a file made under the usual umask 022.
const MODE: u64 = 0o644;

/// Largest size that 11 octal digits hold.
const SIZE_LIMIT: u64 = 0o777_7777_7777;

/// Most members of an archive that is read: a layer archive has four.
const MOST_MEMBERS: usize = 64;

/// Error of reading an archive.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ArchiveError {
    /// Not a tar.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A member that is not a regular file in the top folder.
    #[error("Member {name} at byte {offset} of the layer archive {reason}")]
    Member {
        /// Its name.
        name: String,
        /// Offset of its header.
        offset: u64,
        /// The broken rule.
        reason: &'static str,
    },
}

/// The writer of layer archives.
pub struct Archive;

impl Archive {
    /// Writes an archive of `members` (name, content) in this order, with the end marker.
    ///
    /// # Errors
    /// The errors of `out`; `InvalidInput` for a name that is empty or longer than 100 bytes, or for a member
    /// of 8 GiB or more.
    pub fn write(out: &mut impl Write, members: &[(&str, &[u8])]) -> io::Result<()> {
        for (name, content) in members {
            out.write_all(&header(name, content.len() as u64)?)?;
            out.write_all(content)?;
            out.write_all(&[0; BLOCK][..padding(content.len())])?;
        }
        out.write_all(&[0; 2 * BLOCK])
    }

    /// Length of the archive of members with these sizes.
    #[must_use]
    pub fn len_of(sizes: &[Bytes]) -> Bytes {
        let block = BLOCK as u64;
        Bytes(
            sizes.iter().map(|size| block + size.get().div_ceil(block) * block).sum::<u64>()
                + 2 * block,
        )
    }
}

fn padding(len: usize) -> usize {
    len.wrapping_neg() % BLOCK
}

/// The header block of one member. Public for the writers of this crate that stream a member's content.
///
/// # Errors
/// `InvalidInput` for a name that is empty or longer than 100 bytes, or for a size of 8 GiB or more.
pub fn header(name: &str, size: u64) -> io::Result<[u8; BLOCK]> {
    let invalid = |reason: &str| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("Member {name:?} of a layer archive {reason}"),
        )
    };
    if name.is_empty() || name.len() > 100 || name.contains('\0') {
        return Err(invalid("needs a name of 1 to 100 bytes without NUL"));
    }
    if size > SIZE_LIMIT {
        return Err(invalid("is 8 GiB or more"));
    }
    let mut block = [0u8; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, format!("{MODE:07o}\0").as_bytes());
    put(108, b"0000000\0"); // uid
    put(116, b"0000000\0"); // gid
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"00000000000\0"); // mtime
    put(148, b"        "); // the checksum field counts as blanks
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(329, b"0000000\0"); // major
    put(337, b"0000000\0"); // minor
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

/// The members of an archive and the ranges of their contents in it, in order.
///
/// # Errors
/// [`ArchiveError`] for a damaged archive, a member that is not a regular file in the top folder, or two
/// members of one name.
pub fn read_members(archive: &[u8]) -> Result<Vec<(String, Range<usize>)>, ArchiveError> {
    let mut members: Vec<(String, Range<usize>)> = Vec::new();
    let mut parser = Parser::new();
    parser.feed(archive, &mut |event| {
        let TarEvent::Entry(entry) = event else { return Ok(()) };
        let bad = |reason| ArchiveError::Member {
            name: shown(&entry.name),
            offset: entry.header_offset.get(),
            reason,
        };
        if entry.kind != EntryKind::Regular || entry.content != EntryContent::Plain {
            return Err(bad("is not a regular file"));
        }
        let name =
            std::str::from_utf8(&entry.name).map_err(|_| bad("has a name that is not UTF-8"))?;
        // GNU tar writes `./name` if told to pack `.`.
        let name = name.strip_prefix("./").unwrap_or(name);
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return Err(bad("is not in the top folder"));
        }
        if members.len() == MOST_MEMBERS {
            return Err(bad("is one too many: a layer archive has at most 64"));
        }
        if members.iter().any(|(known, _)| known == name) {
            return Err(bad("occurs twice"));
        }
        let place = usize::try_from(entry.data_offset.get())
            .ok()
            .zip(usize::try_from(entry.stored_len.get()).ok());
        let range = place.and_then(|(start, len)| Some(start..start.checked_add(len)?));
        let range = range.ok_or_else(|| bad("lies past the addresses of this machine"))?;
        members.push((name.to_owned(), range));
        Ok(())
    })?;
    parser.finish()?; // refuses a member that is cut short: every range lies in the archive
    Ok(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut out = Vec::new();
        let members: [(&str, &[u8]); 3] =
            [("ext4.fs.meta", &[7; 700]), (".turbo.ociv1", b""), ("gzip.meta", &[9; 512])];
        Archive::write(&mut out, &members).unwrap();
        out
    }

    #[test]
    fn members_read_back_where_they_were_written() {
        let archive = sample();
        assert_eq!(
            archive.len() as u64,
            Archive::len_of(&[Bytes(700), Bytes(0), Bytes(512)]).get()
        );
        let members = read_members(&archive).unwrap();
        let names: Vec<_> = members.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["ext4.fs.meta", ".turbo.ociv1", "gzip.meta"]);
        assert_eq!(archive[members[0].1.clone()], [7; 700]);
        assert!(members[1].1.is_empty());
        assert_eq!(archive[members[2].1.clone()], [9; 512]);
    }

    #[test]
    fn gnu_tar_lists_the_archive_without_complaint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, sample()).unwrap();
        let output = std::process::Command::new("tar")
            .args(["-tvf"])
            .arg(&path)
            .env("TZ", "UTC")
            .output()
            .unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.starts_with("-rw-r--r-- 0/0             700 1970-01-01 00:00 ext4.fs.meta\n"),
            "{text}"
        );
    }

    #[test]
    fn a_header_is_byte_for_byte_what_go_writes() {
        let block = header("ext4.fs.meta", 4096).unwrap();
        assert_eq!(&block[..12], b"ext4.fs.meta");
        assert_eq!(
            &block[100..156],
            b"0000644\x000000000\x000000000\x0000000010000\x0000000000000\x00011337\x00 "
        );
        assert_eq!(&block[156..158], b"0\0");
        assert_eq!(&block[257..265], b"ustar\x0000");
        assert_eq!(&block[329..345], b"0000000\x000000000\x00");
        assert!(block[265..329].iter().chain(&block[345..]).all(|&byte| byte == 0));
    }

    #[test]
    fn a_member_that_is_missing_bytes_or_repeated_is_refused() {
        let archive = sample();
        assert!(matches!(
            read_members(&archive[..600]),
            Err(ArchiveError::Tar(TarError::Truncated { .. }))
        ));
        let mut twice = Vec::new();
        Archive::write(&mut twice, &[("a", b"1"), ("a", b"2")]).unwrap();
        let error = read_members(&twice).unwrap_err().to_string();
        assert_eq!(error, "Member \"a\" at byte 1024 of the layer archive occurs twice");
        assert!(Archive::write(&mut Vec::new(), &[("", b"")]).is_err());
    }
}
