//! `turbobd commit`: make a native layer from a writable layer, and an image with it on top.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;

use super::output::OutputFile;
use super::{Failure, Outcome, Service, convert, registry_flags, stderr, stdout};
use ::convert::chain::CHAINS;
use ::convert::native::{NativeBlob, commit_layer};
use ::registry::RegistryClient;
use ::registry::store::{self, ImageStore, Selector, StoreError};
use disk::image::host_manifest;
use disk::writable::{WritableFiles, WritableLayer};
use formats::lsmt::{LayerIdentity, Uuid};
use formats::oci::manifest::media;
use formats::oci::{Descriptor, ImageConfig, RepositoryName, annotations};
use host::images::Registries;

/// `-m`, `--uuid`, `-p`, `-f`, `--algorithm` and `--bs` have their meaning from upstream's `overlaybd-commit`.
/// The layer is always a `ZFile` in a tar (upstream's `-z -t`), the form of a layer in a registry.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory of the writable layer, as in `attach --upper`. Detach its device first.
    upper: PathBuf,
    /// Write the layer to this file; `-` is stdout, and the digest is then not printed.
    #[arg(short, long, value_name = "FILE", required_unless_present = "tag")]
    output: Option<PathBuf>,
    /// Replace an existing file.
    #[arg(short, long)]
    force: bool,
    /// Repository of the image below and of the new image: `host/name` or `oci:DIR`.
    #[arg(short, long, value_name = "REPO", requires_all = ["input_tag", "tag"])]
    repository: Option<String>,
    /// Tag of the image below: the image of the device.
    #[arg(short, long, value_name = "TAG", requires = "repository")]
    input_tag: Option<String>,
    /// Tag of the new image: the image below with this layer on top.
    #[arg(short, long, value_name = "TAG", requires = "repository")]
    tag: Option<String>,
    /// Message for the layer and for the history of the image; at most 256 bytes.
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// UUID of the layer [default: the UUID of the writable layer].
    #[arg(long, value_name = "UUID", value_parser = uuid, help_heading = convert::NATIVE)]
    uuid: Option<Uuid>,
    /// UUID of the layer below [default: the parent's UUID in the writable layer].
    #[arg(short, long, value_name = "UUID", value_parser = uuid, help_heading = convert::NATIVE)]
    parent_uuid: Option<Uuid>,
    #[command(flatten)]
    compression: convert::Compression,
    /// Directory for the layer until it is stored [default: the system's directory for temporary files].
    #[arg(short, long, value_name = "DIR", help_heading = convert::NATIVE)]
    dir: Option<PathBuf>,
    #[command(flatten)]
    registry: registry_flags::Args,
}

fn uuid(text: &str) -> Result<Uuid, String> {
    text.parse().map_err(|()| {
        "a UUID is 8-4-4-4-12 hexadecimal digits, for example 01234567-89ab-cdef-0123-456789abcdef"
            .into()
    })
}

/// Commits; prints the digest of the image, or of the layer if no image was made.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    let message = args.message.clone().unwrap_or_default();
    if message.len() > 256 {
        return Err(Failure::Usage("the message has more than 256 bytes".into()));
    }
    let mut layer =
        WritableLayer::open(&WritableFiles::in_dir(&args.upper)).map_err(Failure::because)?;
    if layer.cut() > 0 {
        stderr::line(format_args!(
            "turbobd: commit: {} bytes at the end of the index were not flushed and are left out",
            layer.cut()
        ));
    }
    let output = args.output.as_deref().map(|path| OutputFile::open(path, args.force));
    let output = output.transpose()?;
    let (uuid, parent) = layer.uuids();
    let identity = LayerIdentity {
        uuid: args.uuid.unwrap_or(uuid),
        parent: args.parent_uuid.unwrap_or(parent),
        user_tag: message.clone().into_bytes(),
    };
    let size = layer.virtual_size();
    let blob =
        commit_layer(&mut layer, size, identity, args.compression.zfile(), args.dir.as_deref())
            .map_err(Failure::because)?;
    if let Some(output) = output {
        let mut file = output.file();
        blob.reader()
            .and_then(|mut reader| io::copy(&mut reader, &mut file))
            .map_err(output.cannot())?;
        output.finish()?;
    }
    match (&args.repository, &args.input_tag, &args.tag) {
        (Some(repository), Some(base), Some(tag)) => {
            let client = Registries::new(service.load()?)
                .writing_client(&args.registry.spec()?)
                .map_err(Failure::because)?;
            stdout::line(publish(repository, base, tag, &message, &blob, &client)?)?;
        }
        _ if args.output.as_deref() == Some("-".as_ref()) => {}
        _ => stdout::line(blob.digest())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Puts the layer on top of the image `base`, as the image `tag`; returns its digest.
fn publish(
    repository: &str,
    base: &str,
    tag: &str,
    message: &str,
    blob: &NativeBlob,
    client: &RegistryClient,
) -> Result<formats::oci::Digest, Failure> {
    let place: RepositoryName = repository.parse().map_err(Failure::usage)?;
    let store: Arc<dyn ImageStore> =
        store::open_repository(&place, client).map_err(Failure::because)?;
    let selector = Selector::Tag(base.to_owned());
    let (stored, mut manifest) = host_manifest(&*store, &selector).map_err(Failure::because)?;
    if ::convert::meta::is_plain(&manifest) {
        return Err(Failure::Failed(format!(
            "{base} is a plain image: name the tag of its converted image (turbobd convert), which the device \
             is made from"
        )));
    }
    let is_docker = media::is_docker(manifest.media_type());
    let config = store.read_blob(&manifest.config).map_err(Failure::because)?;
    let config = ImageConfig::parse(&config).map_err(Failure::because)?;
    let history = json!({"created_by": "turbobd commit", "comment": message});
    let config = config.with_layer(blob.digest(), &history);
    let kind = if is_docker { media::DOCKER_LAYER } else { media::OCI_LAYER };
    let mut layer = Descriptor::new(kind, blob.digest(), blob.size());
    layer.annotations = annotations::native(&blob.digest(), blob.size()).into_iter().collect();
    manifest.layers.push(layer);
    manifest.config = Descriptor::of(&manifest.config.media_type, &config);
    // The new image is no conversion of the original, and has a layer more.
    manifest.annotations.remove(CHAINS);
    (manifest.subject, manifest.artifact_type) = (None, None);
    let bytes = manifest.to_bytes();
    let digest = blob.digest();
    store
        .put_blob_from(&digest, blob.size(), &mut || match blob.reader() {
            Ok(reader) => Ok(Box::new(reader)),
            Err(source) => {
                Err(StoreError::Broken { store: "the work folder".into(), digest, source })
            }
        })
        .map_err(Failure::because)?;
    store.put_blob(&config).map_err(Failure::because)?;
    store.put_manifest(Some(tag), &stored.media_type, &bytes).map_err(Failure::because)?;
    Ok(formats::oci::Digest::of(&bytes))
}
