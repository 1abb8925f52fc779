//! overlaybd's own daemons: a TCMU or ublk device of a converted image, by accelerated-container-image's snapshotter.
//!
//! They need a kernel with TCMU or ublk, and are in no package.

use std::path::Path;
use std::time::Duration;

use super::{Converted, Running, Site, System, containerd, programs};
use crate::failure::Failure;
use crate::images::Image;
use crate::measure::group::Group;
use crate::place::Place;
use crate::program;

struct Overlaybd {
    native: bool,
}

/// The rows of this system.
pub(super) fn rows() -> Vec<Box<dyn System>> {
    [false, true].map(|native| Box::new(Overlaybd { native }) as Box<dyn System>).into()
}

impl System for Overlaybd {
    fn name(&self) -> &'static str {
        if self.native { "overlaybd-native" } else { "overlaybd-turbo" }
    }

    fn title(&self) -> String {
        if self.native { "overlaybd native, overlaybd-tcmu" } else { "TurboOCI, overlaybd-tcmu" }
            .into()
    }

    fn peer(&self) -> &'static str {
        "overlaybd"
    }

    fn install(&self, place: &Place) -> Result<(), Failure> {
        containerd::installed(place)?;
        let kernel =
            ["/sys/kernel/config/target", "/sys/module/target_core_user", "/dev/ublk-control"];
        if !kernel.iter().any(|path| Path::new(path).exists()) {
            let why = "this kernel has neither TCMU (target_core_user) nor ublk";
            return Err(Failure::cannot("make overlaybd's devices", why));
        }
        let remedy = "no package has it: build it from its public source and put it on the PATH";
        for name in ["overlaybd-tcmu", "overlaybd-snapshotter", "overlaybd-convertor"] {
            program::find(name, &programs(place)).ok_or_else(|| Failure::missing(name, remedy))?;
        }
        // Its rows are measured in a guest that has TCMU; there is none of the kind yet in which containerd runs.
        let why = "the harness has been run on no kernel with TCMU yet, so this row is not written";
        Err(Failure::cannot("measure overlaybd", why))
    }

    fn versions(&self, place: &Place) -> Vec<String> {
        let Some(file) = program::find("overlaybd-tcmu", &programs(place)) else {
            return Vec::new();
        };
        let said =
            program::run(std::process::Command::new(file).arg("--version"), Duration::from_secs(5));
        said.into_iter().map(|text| text.trim().to_owned()).collect()
    }

    fn convert(&self, _: &Site, _: &Image, _: &str) -> Result<Converted, Failure> {
        Err(Failure::missing("overlaybd-convertor", "its public source"))
    }

    fn start(&self, _: &Site, _: &Image, _: &Group, _: &Path) -> Result<Box<dyn Running>, Failure> {
        Err(Failure::missing("overlaybd-tcmu", "its public source"))
    }
}
