//! From the records of an image's layers to the device that shows them.
//!
//! Layers of files lie on top of a device, never below it: the blocks of a native or TurboOCI layer are changes of the
//! file system of the layers below, so those are blocks too. A streamed layer names an image with all its layers, and
//! needs no record below it. So the topmost layer that is no folder of files decides the device, and the folders above
//! it are lower folders of the same overlay.
//!
//! A device is named by its content ([`DeviceKey`]): the blobs and their repository, not the snapshots. All containers, tags and
//! namespaces that show the same have one device, one mount and one page cache. A layer whose blob has no name, because it
//! was unpacked here, counts by its snapshot.

use std::fmt;
use std::path::PathBuf;

use client::ImageSpec;
use formats::oci::{Digest, ImageName};
use registry::proxy::is_loopback;
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::layer::{BlobRepository, LayerContent, StreamedImage, index_names, metadata_name};

/// Hexadecimal digits of a key: 128 bits, and a path that stays short.
const KEY_DIGITS: usize = 32;

/// Host that serves the images of `docker.io`.
const DOCKER_HOST: &str = "registry-1.docker.io";

/// A layer of a chain.
#[derive(Clone, Debug)]
pub struct ChainLink {
    /// Number of its snapshot.
    pub id: u64,
    /// Its content.
    pub content: LayerContent,
    /// Folder of its files.
    pub files: PathBuf,
}

/// How the layers of a chain are shown.
#[derive(Clone, Debug)]
pub struct LayerStack {
    /// Folders of files, the topmost first.
    pub folders: Vec<PathBuf>,
    /// The device below them.
    pub device: Option<DeviceSource>,
}

/// What a device shows.
#[derive(Clone, Debug)]
pub struct DeviceSource {
    /// Name of its content.
    pub key: DeviceKey,
    /// Where the daemon finds it.
    pub image: DeviceImage,
    /// Name of the image in messages.
    pub name: String,
}

/// Where the daemon finds the content of a device.
#[derive(Clone, Debug)]
pub enum DeviceImage {
    /// The text of a device config.
    Config(String),
    /// An image in a registry.
    Reference(Box<ImageSpec>),
}

/// Name of a device's content.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceKey(String);

impl DeviceKey {
    fn of(content: &Value) -> Self {
        Self(Digest::of(content.to_string().as_bytes()).hex()[..KEY_DIGITS].to_owned())
    }

    /// The key that names a folder of a device; `None` if it does not.
    #[must_use]
    pub fn of_folder(name: &str) -> Option<Self> {
        let hex = name.len() == KEY_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        hex.then(|| Self(name.to_owned()))
    }
}

impl fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A chain that cannot be shown.
#[derive(Debug, Error)]
pub enum ChainError {
    /// A layer of blocks stands on one of files.
    #[error(
        "The {upper} layer of snapshot {id} stands on a {lower} layer, which is not of its image: remove the image and pull it again"
    )]
    Mixed {
        /// Number of the upper layer's snapshot.
        id: u64,
        /// Its kind.
        upper: &'static str,
        /// Kind of the lower one.
        lower: &'static str,
    },
    /// The folder of a TurboOCI layer has lost its metadata.
    #[error("The metadata of snapshot {id} is not in {folder}", folder = folder.display())]
    Metadata {
        /// Number of the snapshot.
        id: u64,
        /// Its folder.
        folder: PathBuf,
    },
    /// A trace stands on nothing.
    #[error("Snapshot {0} is a trace, and has no layer below it")]
    TraceAlone(u64),
}

/// Settings of a host that decide how a chain is shown.
#[derive(Clone, Debug, Default)]
pub struct ChainOptions {
    /// Take erofs metadata where a TurboOCI layer has both forms.
    pub erofs: bool,
    /// Registries that are spoken to without TLS, besides those of this host.
    pub plain_http: Vec<String>,
}

/// How the layers of `chain`, the topmost first, are shown.
///
/// # Errors
/// [`ChainError`].
pub fn stack(chain: &[ChainLink], options: &ChainOptions) -> Result<LayerStack, ChainError> {
    let split = chain.iter().position(|link| link.content.needs_device()).unwrap_or(chain.len());
    let (folders, blocks) = chain.split_at(split);
    let device = match blocks.first() {
        None => None,
        Some(ChainLink { content: LayerContent::Streamed(image), .. }) => {
            Some(streamed(image, options))
        }
        Some(_) => Some(configured(blocks, options)?),
    };
    Ok(LayerStack { folders: folders.iter().map(|link| link.files.clone()).collect(), device })
}

/// The device of a plain image.
#[must_use]
pub fn streamed(image: &StreamedImage, options: &ChainOptions) -> DeviceSource {
    let StreamedImage { reference, manifest, layers } = image;
    let name: Option<ImageName> = reference.parse().ok();
    let pinned = match &name {
        Some(ImageName::Registry(name)) => name.digest.is_some(),
        _ => false,
    };
    let repository = BlobRepository::of(reference);
    // Tags share a device; a name by digest does not: another meta image may serve it.
    let place = repository.as_ref().map_or(reference.clone(), ToString::to_string);
    let count = layers.map(std::num::NonZeroUsize::get);
    let key = DeviceKey::of(&json!(["streamed", place, pinned, manifest, count]));
    let mut spec = ImageSpec::of_reference(reference);
    spec.manifest = Some(*manifest);
    spec.layers = *layers;
    spec.registry.plain_http =
        repository.is_some_and(|repository| options.plain_http.contains(&repository.host));
    DeviceSource { key, name: reference.clone(), image: DeviceImage::Reference(Box::new(spec)) }
}

/// The device of native and TurboOCI layers.
fn configured(blocks: &[ChainLink], options: &ChainOptions) -> Result<DeviceSource, ChainError> {
    let mut config = Map::new();
    let trace = matches!(blocks, [ChainLink { content: LayerContent::Acceleration, .. }, ..]);
    if trace && blocks.len() == 1 {
        return Err(ChainError::TraceAlone(blocks[0].id));
    }
    // Every layer of an image is in the image's repository, so the topmost one's has them all.
    let repository = blocks.iter().find_map(|link| match &link.content {
        LayerContent::Native { blob: Some(blob) } => Some(&blob.repository),
        LayerContent::TurboOci { repository, .. } => Some(repository),
        _ => None,
    });
    if let Some(repository) = repository {
        config.insert("repoBlobUrl".into(), repository.blobs(options).into());
    }
    let (mut lowers, mut names) = (Vec::new(), Vec::new());
    let mut erofs = options.erofs;
    for (number, link) in blocks.iter().rev().enumerate() {
        let topmost = number + 1 == blocks.len();
        let dir = || Value::from(link.files.to_string_lossy());
        let here = || json!(["folder", link.files]);
        let (lower, name) = match &link.content {
            LayerContent::Native { blob: Some(blob) } => {
                let name = json!(["native", blob.digest]);
                (json!({"digest": blob.digest, "size": blob.size, "dir": dir()}), name)
            }
            LayerContent::Native { blob: None } => (json!({"dir": dir()}), here()),
            LayerContent::TurboOci { blob, target, is_gzip, .. } => {
                let lost = || ChainError::Metadata { id: link.id, folder: link.files.clone() };
                let file = metadata_name(&link.files, erofs).ok_or_else(lost)?;
                // One file system has one format: the lowest layer chooses it.
                erofs = file == formats::archive::EROFS_META_NAME;
                let name = match blob {
                    Some(blob) => json!(["turbo-oci", blob, target, file]),
                    None => here(),
                };
                (turbo(link, file, target, *is_gzip), name)
            }
            LayerContent::Acceleration if topmost => (json!({"dir": dir()}), here()),
            other => {
                let (id, upper) = (blocks[0].id, blocks[0].content.name());
                return Err(ChainError::Mixed { id, upper, lower: other.name() });
            }
        };
        lowers.push(lower);
        names.push(name);
    }
    config.insert("lowers".into(), lowers.into());
    if trace {
        config.insert("accelerationLayer".into(), true.into());
    }
    let place = repository.map(ToString::to_string);
    let key = DeviceKey::of(&json!(["config", place, names]));
    let name = place.unwrap_or_else(|| format!("snapshot {}", blocks[0].id));
    Ok(DeviceSource { key, name, image: DeviceImage::Config(Value::from(config).to_string()) })
}

fn turbo(link: &ChainLink, file: &str, target: &Digest, is_gzip: bool) -> Value {
    let at = |name: &str| Value::from(link.files.join(name).to_string_lossy());
    let mut lower = Map::new();
    lower.insert("file".into(), at(file));
    lower.insert("targetDigest".into(), target.to_string().into());
    let [gzip_meta, sidecar] = index_names(&link.files);
    if let Some(name) = gzip_meta.filter(|_| is_gzip) {
        lower.insert("gzipIndex".into(), at(name));
    }
    if let Some(name) = sidecar {
        lower.insert("gzipSidecar".into(), at(name));
    }
    lower.into()
}

impl BlobRepository {
    /// URL of its blobs, as a device config has it.
    fn blobs(&self, options: &ChainOptions) -> String {
        let Self { host, path } = self;
        let bare = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name);
        let plain = options.plain_http.contains(host) || is_loopback(bare);
        let (scheme, host) = match host.as_str() {
            "docker.io" => ("https", DOCKER_HOST),
            _ if plain => ("http", host.as_str()),
            _ => ("https", host.as_str()),
        };
        format!("{scheme}://{host}/v2/{path}/blobs")
    }
}

impl fmt::Display for BlobRepository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::num::NonZeroUsize;
    use std::path::Path;

    use super::super::layer::RepositoryBlob;
    use super::*;
    use formats::archive::{EROFS_META_NAME, FS_META_NAME, GZIP_META_NAME};

    fn link(id: u64, content: LayerContent) -> ChainLink {
        ChainLink { id, content, files: Path::new("/s").join(id.to_string()).join("fs") }
    }

    fn repository(host: &str) -> BlobRepository {
        BlobRepository { host: host.into(), path: "team/app".into() }
    }

    fn native(id: u64, blob: &str) -> ChainLink {
        let repository = repository("127.0.0.1:5000");
        let blob = RepositoryBlob { repository, digest: Digest::of(blob.as_bytes()), size: 7 };
        link(id, LayerContent::Native { blob: Some(blob) })
    }

    fn config(source: &DeviceSource) -> Value {
        let DeviceImage::Config(text) = &source.image else { panic!("{source:?}") };
        serde_json::from_str(text).unwrap()
    }

    fn streamed_link(id: u64, reference: &str, layers: usize) -> ChainLink {
        let image = StreamedImage {
            reference: reference.into(),
            manifest: Digest::of(b"m"),
            layers: NonZeroUsize::new(layers),
        };
        link(id, LayerContent::Streamed(image))
    }

    fn device(chain: &[ChainLink]) -> DeviceSource {
        stack(chain, &ChainOptions::default()).unwrap().device.unwrap()
    }

    #[test]
    fn layers_of_files_alone_need_no_device() {
        let chain = [link(2, LayerContent::Plain), link(1, LayerContent::Plain)];
        let stack = stack(&chain, &ChainOptions::default()).unwrap();
        assert!(stack.device.is_none());
        assert_eq!(stack.folders, [PathBuf::from("/s/2/fs"), "/s/1/fs".into()]);
    }

    #[test]
    fn native_layers_are_a_config_with_the_lowest_first_and_the_snapshots_do_not_name_it() {
        let one = device(&[native(2, "upper"), native(1, "lower")]);
        let config = config(&one);
        assert_eq!(config["repoBlobUrl"], "http://127.0.0.1:5000/v2/team/app/blobs");
        assert_eq!(config["lowers"][0]["digest"], Digest::of(b"lower").to_string());
        assert_eq!(config["lowers"][1]["size"], 7);
        assert_eq!(one.key, device(&[native(9, "upper"), native(8, "lower")]).key);
        assert_ne!(one.key, device(&[native(2, "other"), native(1, "lower")]).key);
        assert_ne!(one.key, device(&[native(1, "lower")]).key);
    }

    #[test]
    fn turbo_layers_take_the_file_system_of_the_lowest_one() {
        let dir = tempfile::tempdir().unwrap();
        let layer = |id: u64, names: &[&str]| {
            let files = dir.path().join(id.to_string());
            fs::create_dir(&files).unwrap();
            for name in names {
                fs::write(files.join(name), b"x").unwrap();
            }
            let target = Digest::of(&id.to_le_bytes());
            let repository = repository("registry.example");
            let content = LayerContent::TurboOci { repository, blob: None, target, is_gzip: true };
            ChainLink { id, content, files }
        };
        let lower = layer(1, &[EROFS_META_NAME, GZIP_META_NAME]);
        let upper = layer(2, &[FS_META_NAME, EROFS_META_NAME]);
        let config = config(&device(&[upper, lower]));
        assert_eq!(config["repoBlobUrl"], "https://registry.example/v2/team/app/blobs");
        for lower in config["lowers"].as_array().unwrap() {
            assert!(lower["file"].as_str().unwrap().ends_with(EROFS_META_NAME), "{lower}");
        }
        assert!(config["lowers"][0]["gzipIndex"].as_str().unwrap().ends_with(GZIP_META_NAME));
        let lost = layer(3, &[]);
        let lost = stack(&[lost], &ChainOptions::default());
        assert!(matches!(lost, Err(ChainError::Metadata { id: 3, .. })));
    }

    #[test]
    fn a_streamed_layer_needs_nothing_below_it_and_tags_of_a_repository_share_a_device() {
        let plain = link(1, LayerContent::Plain);
        let one = device(&[streamed_link(2, "reg.example/a:1", 2), plain.clone()]);
        let DeviceImage::Reference(spec) = &one.image else { panic!("{one:?}") };
        assert_eq!(spec.layers, NonZeroUsize::new(2));
        assert_eq!(spec.manifest, Some(Digest::of(b"m")));
        assert_eq!(one.key, device(&[streamed_link(7, "reg.example/a:2", 2)]).key);
        assert_ne!(one.key, device(&[streamed_link(7, "reg.example/a:2", 1)]).key);
        assert_ne!(one.key, device(&[streamed_link(7, "reg.example/b:2", 2)]).key);
        let pinned = format!("reg.example/a@{}", Digest::of(b"m"));
        assert_ne!(one.key, device(&[streamed_link(7, &pinned, 2)]).key);
    }

    #[test]
    fn folders_lie_over_a_device_and_blocks_never_over_folders() {
        let chain = [link(3, LayerContent::Plain), streamed_link(2, "reg.example/a:1", 1)];
        let shown = stack(&chain, &ChainOptions::default()).unwrap();
        assert_eq!(shown.folders, [PathBuf::from("/s/3/fs")]);
        assert!(shown.device.is_some());
        let mixed = [native(2, "upper"), link(1, LayerContent::Plain)];
        let mixed = stack(&mixed, &ChainOptions::default());
        assert!(matches!(mixed, Err(ChainError::Mixed { id: 2, upper: "native", lower: "plain" })));
    }

    #[test]
    fn a_trace_is_the_last_entry_and_needs_layers() {
        let trace = link(3, LayerContent::Acceleration);
        let config = config(&device(&[trace.clone(), native(1, "lower")]));
        assert_eq!(config["accelerationLayer"], true);
        assert_eq!(config["lowers"][1]["dir"], "/s/3/fs");
        let alone = stack(&[trace], &ChainOptions::default());
        assert!(matches!(alone, Err(ChainError::TraceAlone(3))));
    }

    #[test]
    fn a_registry_without_tls_is_one_of_this_host_or_of_the_settings() {
        let options = ChainOptions { plain_http: vec!["old.example".into()], ..Default::default() };
        for (host, url) in [
            ("docker.io", "https://registry-1.docker.io/v2/team/app/blobs"),
            ("localhost:5000", "http://localhost:5000/v2/team/app/blobs"),
            ("[::1]:5000", "http://[::1]:5000/v2/team/app/blobs"),
            ("old.example", "http://old.example/v2/team/app/blobs"),
            ("new.example:80", "https://new.example:80/v2/team/app/blobs"),
        ] {
            assert_eq!(repository(host).blobs(&options), url);
        }
    }
}
