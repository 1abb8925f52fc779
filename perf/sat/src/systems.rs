//! The systems under test: one file a system.
//!
//! A system is asked the same things in the same order. Once an image: *convert* makes what the system wants beside
//! the image, in a repository that only this row uses. Each run: *start* brings up its daemons over an empty store,
//! which is not timed; *pull* makes the image usable; *run* starts a container. Containers are started by containerd
//! in each case: by `ctr run` from a snapshotter's image, or by `ctr run --rootfs` from a mounted tree.
//!
//! What a system cannot do here, it says by a [`Failure`], and that text is its cell.
//!
//! # Contents
//!
//! * [`containerd`] containerd and `ctr`; overlayfs, the row that all others are compared with
//! * [`turbobd`]    turbobd: the image as it is, its meta image, traces, the native format
//! * [`soci`]       SOCI: lazy, with prefetch, parallel pull
//! * [`stargz`]     stargz: eStargz converted and optimized, plain gzip
//! * [`nydus`]      Nydus: the image with an index (zran), the native format
//! * [`overlaybd`]  overlaybd's own daemons, which need TCMU or ublk

pub(crate) mod containerd;
pub(crate) mod nydus;
pub(crate) mod overlaybd;
pub(crate) mod soci;
pub(crate) mod stargz;
pub(crate) mod turbobd;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::images::Image;
use crate::measure::group::Group;
use crate::network::proxy::Proxy;
use crate::network::registry::Registry;
use crate::place::Place;

/// What all systems share.
#[derive(Debug)]
pub(crate) struct Site {
    /// Folders.
    pub(crate) place: Place,
    /// The registry, without shaping: for conversions.
    pub(crate) registry: Registry,
    /// The line to it: for what is measured.
    pub(crate) proxy: Proxy,
}

impl Site {
    /// Folders with the programs of peers that were built for the harness.
    pub(crate) fn programs(&self) -> Vec<PathBuf> {
        programs(&self.place)
    }
}

/// Folders with the programs of peers that were built for the harness; the PATH comes after them.
pub(crate) fn programs(place: &Place) -> Vec<PathBuf> {
    vec![place.base.join("programs")]
}

/// What a row needs beside the image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Converted {
    /// Tag that is pulled.
    pub(crate) tag: String,
    /// Bytes of everything that the row has in the registry, the layers included where it uses them.
    pub(crate) bytes: u64,
    /// Seconds of the conversion, upload included; none: there is none.
    pub(crate) seconds: Option<f64>,
}

/// A row of the table: one way in which a system starts a container.
pub(crate) trait System: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;
    /// Name in tables: the image's format, and what is done with it.
    fn title(&self) -> String;
    /// System that it belongs to, as `--peers` names it.
    fn peer(&self) -> &'static str;
    /// Finds the programs; a failure says what is missing.
    fn install(&self, place: &Place) -> Result<(), Failure>;
    /// Programs and their versions.
    fn versions(&self, place: &Place) -> Vec<String>;
    /// Makes what the row needs beside the image, once. The image is in the row's repository already, as
    /// [`TAG`](crate::images::TAG).
    fn convert(&self, site: &Site, image: &Image, repository: &str) -> Result<Converted, Failure>;
    /// Starts the daemons over an empty store.
    fn start(
        &self,
        site: &Site,
        image: &Image,
        group: &Group,
        store: &Path,
    ) -> Result<Box<dyn Running>, Failure>;
}

/// A phase of a start that a system can tell apart, and its seconds.
pub(crate) type Phase = (String, f64);

/// A system whose daemons run.
pub(crate) trait Running: Sync {
    /// Makes the image of this reference usable; the phases that the system tells apart, or none.
    fn pull(&mut self, reference: &str) -> Result<Vec<Phase>, Failure>;
    /// Starts a container of it; the phases likewise. Containers of one image may be started at the same time.
    fn run(&self, image: &Image, reference: &str, number: u32) -> Result<Vec<Phase>, Failure>;
    /// Output of a container that gave no answer.
    fn said(&self, number: u32) -> String;
    /// Ends containers, mounts and daemons.
    fn stop(self: Box<Self>) -> Result<(), Failure>;
}

/// All rows, in the order of the table.
pub(crate) fn all() -> Vec<Box<dyn System>> {
    let mut all: Vec<Box<dyn System>> = Vec::new();
    all.extend(containerd::rows());
    all.extend(turbobd::rows());
    all.extend(soci::rows());
    all.extend(stargz::rows());
    all.extend(nydus::rows());
    all.extend(overlaybd::rows());
    all
}

/// Unpacks the layers of an image below `root`, whiteouts applied, for conversions that need its files.
pub(crate) fn unpacked(image: &Image, root: &Path) -> Result<(), Failure> {
    crate::images::layout::unpack(&image.layout, root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_names_of_their_own() {
        let names: Vec<&str> = all().iter().map(|row| row.name()).collect();
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "{names:?}");
        // Each is a part of a repository's name and of a file's.
        let plain = |name: &&str| {
            name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        assert!(names.iter().all(plain), "{names:?}");
    }
}
