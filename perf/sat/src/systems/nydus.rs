//! Nydus: an image of RAFS metadata over the original gzip layers (zran), or converted whole.
//!
//! Its programs are in no package: `nydusd`, `nydus-image`, `containerd-nydus-grpc` and `nydusify` are taken from the
//! PATH. nydusify makes both forms from the image in the registry and pushes them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::containerd::{self, Snapshotter};
use super::{Converted, Running, Site, System, programs};
use crate::failure::{Attempt as _, Failure};
use crate::images::{Image, TAG};
use crate::measure::group::Group;
use crate::place::Place;
use crate::program;

/// Longest conversion.
const CONVERT: Duration = Duration::from_secs(3600);

/// Tag of the converted image.
const CONVERTED: &str = "nydus";

struct Nydus {
    zran: bool,
}

/// The rows of this system.
pub(super) fn rows() -> Vec<Box<dyn System>> {
    [true, false].map(|zran| Box::new(Nydus { zran }) as Box<dyn System>).into()
}

impl System for Nydus {
    fn name(&self) -> &'static str {
        if self.zran { "nydus-zran" } else { "nydus-native" }
    }

    fn title(&self) -> String {
        if self.zran { "OCI gzip + Nydus zran" } else { "Nydus native (RAFS v6)" }.into()
    }

    fn peer(&self) -> &'static str {
        "nydus"
    }

    fn install(&self, place: &Place) -> Result<(), Failure> {
        containerd::installed(place)?;
        containerd::need_second(place, "tells Nydus which layer it prepares")?;
        let remedy = "no package has it: build it from its public source and put it on the PATH";
        for name in ["nydusd", "nydus-image", "nydusify", "containerd-nydus-grpc"] {
            program::find(name, &programs(place)).ok_or_else(|| Failure::missing(name, remedy))?;
        }
        Ok(())
    }

    fn versions(&self, place: &Place) -> Vec<String> {
        let ask = |name: &str| {
            let file = program::find(name, &programs(place))?;
            let said =
                program::run(Command::new(file).arg("--version"), Duration::from_secs(5)).ok()?;
            let version =
                said.split_whitespace().find(|word| word.starts_with('v') && word.len() > 2)?;
            Some(format!("{name} {version}"))
        };
        ["nydusd", "containerd-nydus-grpc"].iter().filter_map(|name| ask(name)).collect()
    }

    fn convert(&self, site: &Site, _image: &Image, repository: &str) -> Result<Converted, Failure> {
        let folders = site.programs();
        let found = |name: &str| {
            program::find(name, &folders).ok_or_else(|| Failure::missing(name, "its public source"))
        };
        let registry = site.registry.address();
        let start = Instant::now();
        let mut command = Command::new(found("nydusify")?);
        command.args(["convert", "--source-insecure", "--target-insecure", "--fs-version", "6"]);
        if self.zran {
            command.arg("--oci-ref");
        }
        command.args(["--source", &format!("{registry}/{repository}:{TAG}")]);
        command.args(["--target", &format!("{registry}/{repository}:{CONVERTED}")]);
        command.arg("--nydus-image").arg(found("nydus-image")?);
        command.arg("--work-dir").arg(site.place.folder("work")?.join("nydusify"));
        program::run(&command, CONVERT)?;
        site.place.clean()?;
        let seconds = start.elapsed().as_secs_f64();
        let (_, bytes) = site.registry.blobs(repository, CONVERTED);
        Ok(Converted { tag: CONVERTED.into(), bytes, seconds: Some(seconds) })
    }

    fn start(
        &self,
        site: &Site,
        _image: &Image,
        group: &Group,
        store: &Path,
    ) -> Result<Box<dyn Running>, Failure> {
        let folders = site.programs();
        let found = |name: &str| {
            program::find(name, &folders).ok_or_else(|| Failure::missing(name, "its public source"))
        };
        let dir = store.join("nydus");
        fs::create_dir_all(&dir).attempt(|| format!("make {}", dir.display()))?;
        let socket = dir.join("sock");
        let config = dir.join("nydusd.json");
        let text = "{\"device\": {\"backend\": {\"type\": \"registry\", \"config\": {\"scheme\": \"http\", \
                    \"skip_verify\": true, \"timeout\": 5, \"connect_timeout\": 5, \"retry_limit\": 4}}, \
                    \"cache\": {\"type\": \"blobcache\"}}, \"mode\": \"direct\", \"digest_validate\": false, \
                    \"fs_prefetch\": {\"enable\": true, \"threads_count\": 8, \"merging_size\": 1048576}}";
        fs::write(&config, text).attempt(|| format!("write {}", config.display()))?;
        let mut command = Command::new(found("containerd-nydus-grpc")?);
        command.arg("--address").arg(&socket).arg("--root").arg(dir.join("root"));
        command.arg("--nydusd").arg(found("nydusd")?).arg("--nydusd-config").arg(&config);
        command.args(["--log-to-stdout", "--fs-driver", "fusedev"]);
        Ok(Box::new(Snapshotter::behind(site, group, store, "nydus", (&command, &dir))?))
    }
}
