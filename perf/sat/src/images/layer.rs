//! Runs a layer's script and keeps the result.
//!
//! The lower layers are the lower directories of an overlay and the new one is its upper directory, so that what the
//! script changed is there at once, deletions included. A layer is kept under the digest of everything that made it:
//! its folder, the functions that scripts share, and the layer below.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::tarball;
use crate::failure::{Attempt as _, Failure};
use crate::place::{Place, unmount_below};
use crate::program;

/// Longest run of a script: hundreds of packages are downloaded and configured.
const BUILD: Duration = Duration::from_secs(1800);

/// A layer that is built.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Layer {
    /// Digest of what made it, in hexadecimal.
    pub(crate) identity: String,
    /// Digest of the gzip blob.
    pub(crate) digest: String,
    /// Its bytes.
    pub(crate) size: u64,
    /// Digest of the tar in it.
    pub(crate) diff_id: String,
    /// Its bytes.
    pub(crate) unpacked: u64,
    /// The folder with `tree` and `layer.tar.gz`.
    #[serde(skip)]
    pub(crate) dir: PathBuf,
}

impl Layer {
    /// The gzip blob.
    pub(crate) fn blob(&self) -> PathBuf {
        self.dir.join("layer.tar.gz")
    }
}

/// Builds the layer of this name on `lower`, or takes it from an earlier run.
pub(crate) fn build(place: &Place, name: &str, lower: &[Layer]) -> Result<Layer, Failure> {
    let source = place.images().join("layers").join(name);
    let shared = place.images().join("layers/steps.sh");
    let below = lower.last().map_or("", |layer| &layer.identity);
    let identity = identity(&source, &shared, below)?;
    let dir = place.folder("layers")?.join(&identity);
    let facts = dir.join("layer.json");
    if let Ok(text) = fs::read_to_string(&facts) {
        let mut layer: Layer =
            serde_json::from_str(&text).attempt(|| format!("understand {}", facts.display()))?;
        layer.dir = dir;
        return Ok(layer);
    }
    let start = Instant::now();
    eprintln!("building the layer {name}");
    if dir.exists() {
        fs::remove_dir_all(&dir).attempt(|| format!("remove {}", dir.display()))?;
    }
    let tree = dir.join("tree");
    fs::create_dir_all(&tree).attempt(|| format!("make {}", tree.display()))?;
    let root = place.folder("build/root")?;
    let built = overlay(place, &tree, lower, &root).and_then(|()| {
        let mut command = Command::new("sh");
        command.args(["-eu", "-c", ". \"$STEPS\"; . ./build; tidy"]).current_dir(&source);
        command.env("STEPS", &shared).env("ROOT", &root);
        command.env("DOWNLOADS", place.folder("downloads")?);
        program::run(&command, BUILD)
    });
    unmount_below(&root)?;
    built?;
    let packed = tarball::pack(&tree, &dir.join("layer.tar.gz"))?;
    let layer = Layer {
        identity,
        digest: packed.digest,
        size: packed.size,
        diff_id: packed.diff_id,
        unpacked: packed.unpacked,
        dir,
    };
    let text = serde_json::to_string_pretty(&layer).attempt(|| "write a layer's facts".into())?;
    // The facts are last: without them the layer is built again.
    fs::write(&facts, text).attempt(|| format!("write {}", facts.display()))?;
    eprintln!(
        "  {:.1} MB, {:.1} MB in gzip, {:.0} s",
        layer.unpacked as f64 / 1e6,
        layer.size as f64 / 1e6,
        start.elapsed().as_secs_f64()
    );
    Ok(layer)
}

/// Mounts the lower layers with `tree` on top; for the lowest layer, `tree` itself.
fn overlay(place: &Place, tree: &Path, lower: &[Layer], root: &Path) -> Result<(), Failure> {
    let cannot = || format!("mount the layers at {} (root is needed)", root.display());
    if lower.is_empty() {
        return rustix::mount::mount_bind(tree, root).attempt(cannot);
    }
    let work = place.folder("build/overlay")?;
    // Shorter than the full paths, for the kernel takes a page of options.
    let lowers: Vec<_> =
        lower.iter().rev().map(|layer| layer.dir.join("tree").display().to_string()).collect();
    // Without these two, the upper directory would refer to the lower ones instead of having everything.
    let options = format!(
        "lowerdir={},upperdir={},workdir={},redirect_dir=off,metacopy=off",
        lowers.join(":"),
        tree.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options).attempt(cannot)?;
    mount("overlay", root, "overlay", MountFlags::empty(), Some(options.as_c_str())).map_err(
        |error| {
            let remedy = "an overlay needs a file system such as ext4 or xfs: name a folder on one by SAT_DIR";
            Failure::cannot(cannot(), format!("{error}; {remedy}"))
        },
    )
}

/// Digest of everything that makes a layer.
fn identity(source: &Path, shared: &Path, below: &str) -> Result<String, Failure> {
    let mut hash = Sha256::new();
    hash.update(below);
    let mut files: Vec<PathBuf> = fs::read_dir(source)
        .attempt(|| format!("read the layer {}", source.display()))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.push(shared.to_owned());
    files.sort();
    for file in files {
        let bytes = fs::read(&file).attempt(|| format!("read {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hash.update(format!("\0{name}\0{}\0", bytes.len()));
        hash.update(bytes);
    }
    Ok(hex(&hash.finalize())[..16].to_owned())
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_or_lower_layer_is_another_layer() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("steps.sh");
        let source = dir.path().join("layer");
        fs::create_dir(&source).unwrap();
        fs::write(&shared, "a").unwrap();
        fs::write(source.join("build"), "b").unwrap();
        let first = identity(&source, &shared, "").unwrap();
        assert_eq!(first, identity(&source, &shared, "").unwrap());
        assert_ne!(first, identity(&source, &shared, "x").unwrap());
        fs::write(source.join("app.py"), "c").unwrap();
        assert_ne!(first, identity(&source, &shared, "").unwrap());
    }
}
