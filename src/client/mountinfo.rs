//! Rows of `/proc/PID/mountinfo`, the list of mounts of a process's mount namespace.
//!
//! The format is that of proc(5): fields separated by blanks; the third is `major:minor`, the fifth the mount point, with
//! blanks, tabs, line ends and backslashes as octal `\ooo`. Optional fields such as `shared:7` follow the sixth and end at `-`.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountRow {
    /// Number of the mount in its namespace.
    pub id: u64,
    /// Number of the mount that it lies on.
    pub parent: u64,
    /// Major and minor number of the file system's device.
    pub number: (u32, u32),
    /// Directory of the file system that is the root of the mount.
    pub root: PathBuf,
    /// Mount point.
    pub place: PathBuf,
    /// Options of the mount, separated by commas.
    pub options: String,
    /// The mount is in a peer group: what is unmounted on it is unmounted on its copies in other namespaces too.
    pub is_shared: bool,
    /// Type of the file system.
    pub kind: String,
    /// What is mounted: the device of an ext4, a free text of other file systems.
    pub source: String,
    /// Options of the file system, separated by commas.
    pub super_options: String,
}

impl MountRow {
    /// True if one of the options of the mount is this one.
    #[must_use]
    pub fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|one| one == option)
    }
}

/// The mounts that a process sees, in the order of the mounts; `process` is a folder of `/proc`.
///
/// # Errors
/// The system's, for example when the process has ended.
pub fn mounts_of(process: &Path) -> io::Result<Vec<MountRow>> {
    Ok(parse(&std::fs::read(process.join("mountinfo"))?))
}

/// The rows of a list; lines of another form are passed over.
#[must_use]
pub fn parse(mountinfo: &[u8]) -> Vec<MountRow> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(row).collect()
}

fn row(line: &[u8]) -> Option<MountRow> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let text = |at: usize| fields.get(at).map(|field| String::from_utf8_lossy(field).into_owned());
    let number = text(2)?;
    let (major, minor) = number.split_once(':')?;
    let end = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    Some(MountRow {
        id: text(0)?.parse().ok()?,
        parent: text(1)?.parse().ok()?,
        number: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(fields.get(3)?).into(),
        place: unescape(fields.get(4)?).into(),
        options: text(5)?,
        is_shared: fields[6..end].iter().any(|field| field.starts_with(b"shared:")),
        kind: text(end + 1)?,
        source: unescape(fields.get(end + 2)?).to_string_lossy().into_owned(),
        super_options: text(end + 3).unwrap_or_default(),
    })
}

fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match rest {
            [b'\\', digits @ ..] => digits.get(..3).and_then(|digits| {
                let digits = std::str::from_utf8(digits).ok()?;
                u8::from_str_radix(digits, 8).ok()
            }),
            _ => None,
        };
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_taken_apart_and_unescaped() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
                     40 36 7:3 / /a\\040b\\134c ro,nosuid shared:4 master:1 - ext4 /dev/loop3 ro,norecovery\nshort line\n";
        let rows = parse(text);
        assert_eq!(rows.len(), 2);
        assert_eq!(
            (rows[0].number, rows[0].is_shared, rows[0].root.as_path()),
            ((98, 0), false, Path::new("/mnt1"))
        );
        let second = &rows[1];
        assert_eq!((second.id, second.parent, second.number), (40, 36, (7, 3)));
        assert_eq!((second.place.as_path(), second.is_shared), (Path::new("/a b\\c"), true));
        assert!(second.has("nosuid") && !second.has("nosui"));
        assert_eq!(
            (second.kind.as_str(), second.super_options.as_str()),
            ("ext4", "ro,norecovery")
        );
        assert_eq!(unescape(b"\\9\\"), OsString::from("\\9\\"));
    }
}
