//! `turbobd convert`: build the meta image of an OCI image, or a native image, or both, beside it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use super::bars::Bars;
use super::{Failure, Outcome, Service, registry_flags, stderr, stdout, table};
use ::convert::{ConvertOptions, KnownLayers, LocalLayers, Tags, convert};
use ::registry::RegistryClient;
use ::registry::store::{self, ImageStore, Selector};
use disk::image::host_manifest;
use formats::oci::{Digest, ImageName, RepositoryName};
use formats::units::Bytes;
use formats::zfile;
use host::images::Registries;

/// Heading of the options of native layers.
pub(super) const NATIVE: &str = "Native layers";
/// Heading of the options of meta images.
const META: &str = "Meta image and disk";
/// Heading of the options for layers from earlier conversions.
const EARLIER: &str = "Layers of earlier conversions";

/// Flags of upstream's `convertor` have the same meaning here (spec turbooci 2), `--algorithm` and `--bs` that of its
/// `overlaybd-commit`. `--span`, `--to`, `--reuse`, `--base`, `--anew`, `--layer-store` and `--json` exist only here.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Repository of the image and of the result: `host/name` or `oci:DIR`.
    #[arg(short, long, value_name = "REPO")]
    repository: String,
    /// Tag of the image to convert.
    #[arg(short, long, value_name = "TAG", required_unless_present = "input_digest")]
    input_tag: Option<String>,
    /// Digest of the image to convert.
    #[arg(short = 'g', long, value_name = "DIGEST", conflicts_with = "input_tag")]
    input_digest: Option<Digest>,
    /// Tag of the meta image to build (TurboOCI): metadata and an index, without file data.
    #[arg(long = "turboOCI", visible_alias = "fastoci", value_name = "TAG")]
    turbo_oci: Option<String>,
    /// Tag of the native overlaybd image to build, which contains all file data.
    #[arg(short = 'o', long = "overlaybd", visible_alias = "output-tag", value_name = "TAG")]
    native: Option<String>,
    /// Repository of the result, if it is another: `host/name` or `oci:DIR`. The result is then attached with `--origin` and the
    /// repository of the original.
    #[arg(long, value_name = "REPO")]
    to: Option<String>,
    /// Write OCI media types. The default is Docker's media types, as in upstream's convertor.
    #[arg(long)]
    oci: bool,
    /// Set the original as the subject of the result: registries list the result among the referrers of the original.
    /// Implies --oci.
    #[arg(long)]
    referrer: bool,
    /// Number of platforms to convert at the same time; 0 means all.
    #[arg(long, value_name = "N", default_value_t = 4)]
    concurrency_limit: usize,
    /// Move a target tag that names an image which is not converted.
    #[arg(long)]
    force: bool,
    /// Build everything, and store nothing in the repository.
    #[arg(long)]
    no_upload: bool,
    /// Print a report of the result as JSON.
    #[arg(long)]
    json: bool,
    /// Size of the virtual disk in GiB.
    #[arg(long, value_name = "GiB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=16 << 10),
          help_heading = META)]
    vsize: u64,
    /// Filesystem of the disk. erofs is an option of upstream's convertor only.
    #[arg(long, default_value = "ext4", value_parser = ["ext4"], help_heading = META)]
    fstype: String,
    /// Distance of gzip checkpoints in KiB of the tar, 64 to 16384. A shorter span makes first reads smaller and the meta
    /// image larger.
    #[arg(long, value_name = "KiB", default_value_t = formats::gzip::DEFAULT_SPAN.get() >> 10,
          value_parser = clap::value_parser!(u64).range(64..=formats::gzip::MAX_SPAN.get() >> 10), help_heading = META)]
    span: u64,
    #[command(flatten)]
    compression: Compression,
    /// Directory for native layers until they are stored [default: the system's directory for temporary files].
    #[arg(short, long, value_name = "DIR", help_heading = NATIVE)]
    dir: Option<PathBuf>,
    /// Reuse equal layers of this converted image: a tag of the target, or an image name. The option may be repeated.
    /// The images under the target tags are searched without it.
    #[arg(long, value_name = "TAG|IMAGE", help_heading = EARLIER)]
    reuse: Vec<String>,
    /// Use the layers of this converted image (a tag of the target, or an image name) as the lowest layers of the result.
    /// Its source layers must be the lowest layers of the image. Meta images and native images fit, also those from
    /// upstream's tools. An image of upstream's tools under a target tag is used without this option.
    #[arg(long, value_name = "TAG|IMAGE", help_heading = EARLIER)]
    base: Option<String>,
    /// Do not use the layers of the images under the target tags.
    #[arg(long, conflicts_with_all = ["base", "reuse"], help_heading = EARLIER)]
    anew: bool,
    /// Directory of converted layers: new layers are kept in it, and layers of earlier conversions are taken from it.
    #[arg(long, value_name = "DIR", help_heading = EARLIER)]
    layer_store: Option<PathBuf>,
    #[command(flatten)]
    registry: registry_flags::Args,
    #[command(flatten)]
    upstream: UpstreamOnly,
}

/// Compression of native layers.
#[derive(Debug, clap::Args)]
pub(super) struct Compression {
    /// Compression of native layers.
    #[arg(long, value_name = "NAME", default_value = "lz4", value_parser = ["lz4", "zstd"], help_heading = NATIVE)]
    algorithm: String,
    /// Block size of native layers in KiB. 64 works only if every block becomes smaller by compression.
    #[arg(long, value_name = "KiB", default_value = "4", value_parser = ["4", "8", "16", "32", "64"],
          help_heading = NATIVE)]
    bs: String,
}

impl Compression {
    /// Options of the writer.
    pub(super) fn zfile(&self) -> zfile::Options {
        let algo = if self.algorithm == "zstd" { zfile::Algo::Zstd } else { zfile::Algo::Lz4 };
        // clap accepts no other values.
        let block_size = self.bs.parse::<u32>().map_or(4096, |kib| kib << 10);
        zfile::Options { algo, block_size, ..zfile::Options::default() }
    }
}

/// Heading of the flags that only upstream's `convertor` implements.
const UPSTREAM: &str = "Compatibility with upstream's convertor";

/// Flags of upstream's `convertor` without effect here. A script that passes them gets a warning, or an error if the
/// result would be another.
#[derive(Debug, clap::Args)]
struct UpstreamOnly {
    /// Accepted as true only: the first layer always contains the filesystem.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, help_heading = UPSTREAM)]
    mkfs: bool,
    /// Ignored: a conversion has no work directory to keep.
    #[arg(long, help_heading = UPSTREAM)]
    reserve: bool,
    /// Ignored: a conversion has no writable layer.
    #[arg(long, help_heading = UPSTREAM)]
    disable_sparse: bool,
    /// Refused: there is no database. Use --reuse or --layer-store.
    #[arg(long, value_name = "TYPE", help_heading = UPSTREAM)]
    db_type: Option<String>,
    /// Refused, like --db-type.
    #[arg(long, value_name = "DSN", help_heading = UPSTREAM)]
    db_str: Option<String>,
}

impl UpstreamOnly {
    fn check(&self) -> Result<(), Failure> {
        let refused = [
            (
                !self.mkfs,
                "--mkfs=false: there is no shared base layer; the first layer contains the filesystem",
            ),
            (
                self.db_type.is_some() || self.db_str.is_some(),
                "--db-type: there is no database; --reuse and --layer-store find layers of earlier conversions",
            ),
        ];
        if let Some((_, why)) = refused.iter().find(|(given, _)| *given) {
            return Err(Failure::Usage((*why).to_owned()));
        }
        for (given, flag) in
            [(self.reserve, "--reserve"), (self.disable_sparse, "--disable-sparse")]
        {
            if given {
                tracing::warn!("{flag} is ignored: a conversion has no such work files");
            }
        }
        Ok(())
    }
}

impl Args {
    /// Layers of earlier conversions.
    fn known_layers(
        &self,
        into: &Arc<dyn ImageStore>,
        client: &RegistryClient,
    ) -> Result<KnownLayers, Failure> {
        let local = match &self.layer_store {
            Some(dir) => Some(LocalLayers::open_or_create(dir).map_err(Failure::because)?),
            None => None,
        };
        let mut known = KnownLayers::with_local(local);
        let tags = [&self.turbo_oci, &self.native].into_iter().flatten();
        for tag in tags.filter(|_| !self.anew) {
            // Not an error: most conversions are the first under their tag.
            if let Err(error) = known.learn(into, &Selector::Tag(tag.clone())) {
                tracing::debug!(%tag, %error, "no earlier conversion to take layers from");
            }
        }
        for name in &self.reuse {
            let (from, selector) = self.named(name, into, client)?;
            let count = known.learn(&from, &selector).map_err(Failure::because)?;
            tracing::info!("{name} has {count} layers that can be reused");
        }
        if let Some(name) = &self.base {
            let (from, selector) = self.named(name, into, client)?;
            known.build_on(&from, &selector).map_err(Failure::because)?;
        }
        Ok(known)
    }

    /// Refuses a target tag that names an image of layers which are not converted: moving it would lose the image's name.
    fn keeps_original(&self, tag: &str, into: &dyn ImageStore) -> Result<(), Failure> {
        let is_input = self.to.is_none() && self.input_tag.as_deref() == Some(tag);
        let is_plain = |(_, manifest): (_, _)| ::convert::meta::is_plain(&manifest);
        if is_input || host_manifest(into, &Selector::Tag(tag.to_owned())).is_ok_and(is_plain) {
            return Err(Failure::Failed(format!(
                "The tag {tag} names an image that is not converted: give the result another tag, for example {tag}-turbo \
                 (--force moves {tag} to the result)"
            )));
        }
        Ok(())
    }

    /// A tag of the target, or an image anywhere.
    fn named(
        &self,
        name: &str,
        into: &Arc<dyn ImageStore>,
        client: &RegistryClient,
    ) -> Result<(Arc<dyn ImageStore>, Selector), Failure> {
        if !name.contains('/') && !name.starts_with("oci:") {
            return Ok((into.clone(), Selector::Tag(name.to_owned())));
        }
        let image: ImageName = name.parse().map_err(Failure::usage)?;
        store::open(&image, client).map_err(Failure::because)
    }
}

/// Converts.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    args.upstream.check()?;
    if args.turbo_oci.is_none() && args.native.is_none() && !args.no_upload {
        return Err(Failure::Usage(
            "name the result with --turboOCI TAG or --overlaybd TAG, or pass --no-upload".into(),
        ));
    }
    if args.turbo_oci.is_some() && args.turbo_oci == args.native {
        return Err(Failure::Usage(
            "--turboOCI and --overlaybd name two images: give two tags".into(),
        ));
    }
    let tags = Tags {
        turbo: args.turbo_oci.as_deref().filter(|_| !args.no_upload),
        native: args.native.as_deref().filter(|_| !args.no_upload),
    };
    let client = Registries::new(service.load()?)
        .writing_client(&args.registry.spec()?)
        .map_err(Failure::because)?;
    let source: RepositoryName = args.repository.parse().map_err(Failure::usage)?;
    let store = store::open_repository(&source, &client).map_err(Failure::because)?;
    let into = match &args.to {
        // Nothing is written, so the target is not created.
        _ if args.no_upload => store.clone(),
        None => store.clone(),
        Some(to) => {
            let to: RepositoryName = to.parse().map_err(Failure::usage)?;
            store::create_repository(&to, &client).map_err(Failure::because)?
        }
    };
    let selector = match (&args.input_digest, &args.input_tag) {
        (Some(digest), _) => Selector::Digest(*digest),
        (None, Some(tag)) => Selector::Tag(tag.clone()),
        (None, None) => {
            return Err(Failure::Usage("name the image with -i TAG or -g DIGEST".into()));
        }
    };
    for tag in [tags.turbo, tags.native].into_iter().flatten().filter(|_| !args.force) {
        args.keeps_original(tag, &*into)?;
    }
    let options = ConvertOptions {
        disk_size: Bytes(args.vsize << 30),
        span: Bytes(args.span << 10),
        oci_types: args.oci,
        referrer: args.referrer,
        concurrency: if args.concurrency_limit == 0 { usize::MAX } else { args.concurrency_limit },
        origin: args
            .to
            .as_ref()
            .map(|_| source.absolute().map(|place| place.to_string()))
            .transpose()
            .map_err(Failure::because)?,
        turbo: args.turbo_oci.is_some() || args.native.is_none(),
        native: args.native.as_ref().map(|_| args.compression.zfile()),
        work_dir: args.dir.clone(),
    };
    if let Some(dir) = &args.dir {
        std::fs::create_dir_all(dir).map_err(Failure::because)?;
    }
    let known = args.known_layers(&into, &client)?;
    let start = Instant::now();
    let done = convert(&*store, &selector, &*into, tags, &options, &known, &Bars::new())
        .map_err(Failure::because)?;
    tracing::info!("converted in {:.2?}", start.elapsed());
    if args.json {
        table::print_json(&done)?;
    } else {
        report(&done);
        stdout::line(done.digest)?;
        if let Some(native) = done.native.filter(|native| *native != done.digest) {
            stdout::line(native)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the report on stderr: stdout carries only the digest.
fn report(done: &::convert::Conversion) {
    for image in &done.images {
        for layer in &image.layers {
            let sizes = &layer.sizes;
            if layer.reused {
                stderr::line(format_args!(
                    "{} {}: converted before, used again",
                    image.platform,
                    table::short(&layer.source)
                ));
                continue;
            }
            let mut made = Vec::new();
            if sizes.archive > 0 {
                let share = table::percent(sizes.archive, sizes.blob);
                made.push(format!("{} ({share})", table::size(sizes.archive)));
            }
            if let Some(native) = &layer.native {
                made.push(format!("native {}", table::size(native.size)));
            }
            stderr::line(format_args!(
                "{} {}: {} -> {}, tar {}, {} ms",
                image.platform,
                table::short(&layer.source),
                table::size(sizes.blob),
                made.join(", "),
                table::size(sizes.tar),
                layer.millis
            ));
        }
    }
}
