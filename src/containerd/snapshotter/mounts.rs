//! What Prepare, View and Mounts answer: a pure function of a snapshot and the folders below it.
//!
//! Only `bind` and `overlay` mounts of existing folders are returned, because every consumer can make them: containerd 1.x, image volumes
//! and user look-up know no others. An answer to a pull must never be read-only: containerd 2.4 takes a read-only last
//! mount of an extraction for a layer that is there already.

use std::path::Path;

use crate::api::types::Mount;
use crate::snapshotter::store::record::SnapshotKind;

/// File that exists if this kernel's overlayfs knows the option `index`.
const INDEX_PARAMETER: &str = "/sys/module/overlay/parameters/index";

/// Options of every overlay mount on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverlayOptions {
    /// `index=off` on kernels that know it: with an index, a folder that was the upper of another mount is refused.
    pub index_off: bool,
}

impl OverlayOptions {
    /// The options for this kernel.
    #[must_use]
    pub fn of_this_host() -> Self {
        Self { index_off: Path::new(INDEX_PARAMETER).exists() }
    }
}

/// Where a snapshot's own files are, and what lies below them.
#[derive(Clone, Debug)]
pub struct MountPlan<'a> {
    /// What the snapshot is; a committed one is mounted as a view.
    pub kind: SnapshotKind,
    /// Its folder of files.
    pub upper: &'a Path,
    /// Its folder for overlayfs, on the same filesystem.
    pub work: &'a Path,
    /// Folders below it, from the top to the base; without any, the snapshot is its own folder.
    pub lowers: &'a [&'a Path],
    /// Options of the host.
    pub options: &'a OverlayOptions,
}

impl MountPlan<'_> {
    /// The mounts.
    #[must_use]
    pub fn mounts(&self) -> Vec<Mount> {
        let writable = self.kind == SnapshotKind::Active;
        match (self.lowers, writable) {
            ([], true) => vec![bind(self.upper, "rw")],
            ([], false) => vec![bind(self.upper, "ro")],
            // overlayfs needs two folders to merge.
            ([only], false) => vec![bind(only, "ro")],
            (lowers, _) => vec![self.overlay(lowers, writable)],
        }
    }

    fn overlay(&self, lowers: &[&Path], writable: bool) -> Mount {
        let mut options = Vec::with_capacity(4);
        if writable {
            options.push(format!("workdir={}", self.work.display()));
            options.push(format!("upperdir={}", self.upper.display()));
        }
        let lowers: Vec<String> = lowers.iter().map(|path| path.display().to_string()).collect();
        options.push(format!("lowerdir={}", lowers.join(":")));
        if self.options.index_off {
            options.push("index=off".to_owned());
        }
        Mount {
            r#type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options,
        }
    }
}

fn bind(folder: &Path, mode: &str) -> Mount {
    Mount {
        r#type: "bind".to_owned(),
        source: folder.display().to_string(),
        target: String::new(),
        options: vec![mode.to_owned(), "rbind".to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(kind: SnapshotKind, lowers: &[&str], index_off: bool) -> Vec<String> {
        let lowers: Vec<&Path> = lowers.iter().map(Path::new).collect();
        let plan = MountPlan {
            kind,
            upper: Path::new("/r/9/fs"),
            work: Path::new("/r/9/work"),
            lowers: &lowers,
            options: &OverlayOptions { index_off },
        };
        let line = |mount: Mount| {
            assert!(mount.target.is_empty());
            format!("{} {} {}", mount.r#type, mount.source, mount.options.join(","))
        };
        plan.mounts().into_iter().map(line).collect()
    }

    #[test]
    fn plain_layers_are_mounted_as_the_overlayfs_snapshotter_mounts_them() {
        use SnapshotKind::{Active, View};
        let cases: [(SnapshotKind, &[&str], &str); 6] = [
            (Active, &[], "bind /r/9/fs rw,rbind"),
            (View, &[], "bind /r/9/fs ro,rbind"),
            (
                Active,
                &["/r/1/fs"],
                "overlay overlay workdir=/r/9/work,upperdir=/r/9/fs,lowerdir=/r/1/fs",
            ),
            (View, &["/r/1/fs"], "bind /r/1/fs ro,rbind"),
            (
                Active,
                &["/r/2/fs", "/r/1/fs"],
                "overlay overlay workdir=/r/9/work,upperdir=/r/9/fs,lowerdir=/r/2/fs:/r/1/fs",
            ),
            (View, &["/r/2/fs", "/r/1/fs"], "overlay overlay lowerdir=/r/2/fs:/r/1/fs"),
        ];
        for (kind, lowers, expected) in cases {
            assert_eq!(lines(kind, lowers, false), [expected]);
            let with_index = if expected.starts_with("overlay") {
                format!("{expected},index=off")
            } else {
                expected.to_owned()
            };
            assert_eq!(lines(kind, lowers, true), [with_index]);
        }
    }
}
