//! An image's file: `perf/sat/images/NAME.json`.

use std::fs;

use serde::Deserialize;

use crate::failure::{Attempt as _, Failure};
use crate::place::Place;

/// An image as its file describes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Definition {
    /// The name of the file.
    #[serde(skip)]
    pub(crate) name: String,
    /// What it stands for, in a few words.
    pub(crate) like: String,
    /// True for the images of the published table, which are measured most often.
    #[serde(default)]
    pub(crate) published: bool,
    /// Folders of perf/sat/images/layers, the lowest first.
    pub(crate) layers: Vec<String>,
    /// Program and arguments of the service. It listens on the port in `$PORT`.
    pub(crate) command: Vec<String>,
    /// Environment, `NAME=VALUE`.
    #[serde(default)]
    pub(crate) environment: Vec<String>,
    /// Path of the request.
    pub(crate) path: String,
    /// Text that only a working service answers.
    pub(crate) expect: String,
    /// File of perf/sat/images that is posted; without it the request is a GET.
    #[serde(default)]
    pub(crate) post: Option<String>,
    /// Disk that building and measuring it takes at most, in MB: layers, registry, the largest store.
    pub(crate) disk_mb: u64,
}

impl Definition {
    /// All images, in the order of a full run: those of the published table first, then by size.
    pub(crate) fn all(place: &Place) -> Result<Vec<Self>, Failure> {
        let dir = place.images();
        let entries = fs::read_dir(&dir).attempt(|| format!("read {}", dir.display()))?;
        let mut all = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read_to_string(&path).attempt(|| format!("read {}", path.display()))?;
            let mut found: Self =
                serde_json::from_str(&text).attempt(|| format!("understand {}", path.display()))?;
            found.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            all.push(found);
        }
        all.sort_by_key(|image| (!image.published, image.disk_mb, image.name.clone()));
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_of_the_repository_is_understood_and_has_its_layers() {
        let place = Place::new().unwrap();
        let all = Definition::all(&place).unwrap();
        assert!(!all.is_empty());
        for image in all {
            assert!(!image.layers.is_empty() && !image.command.is_empty(), "{}", image.name);
            assert!(image.path.starts_with('/') && !image.expect.is_empty(), "{}", image.name);
            for layer in &image.layers {
                let script = place.images().join("layers").join(layer).join("build");
                assert!(script.is_file(), "{} has no {}", image.name, script.display());
            }
        }
    }
}
