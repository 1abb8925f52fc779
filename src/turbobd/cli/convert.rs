//! `turbobd convert`: build the meta image of an OCI image, or a native image, or both, beside it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use super::bars::Bars;
use super::{Failure, Outcome, Service, registry_flags, stderr, stdout, table};
use ::convert::{ConvertOptions, KnownLayers, LocalLayers, Tags, convert};
use ::registry::Client;
use ::registry::store::{self, ImageStore, Selector};
use formats::oci::{Digest, ImageName, RepositoryName};
use formats::units::Bytes;
use formats::zfile;
use host::images::Registries;

/// Flags of upstream's `convertor` mean the same here (spec turbooci 2), and `--algorithm` and `--bs` what
/// they mean to its `overlaybd-commit`; `--span`, `--to`, `--reuse`, `--layer-store` and `--json` are ours.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where the image is and the result goes: `host/name` or `oci:DIR`.
    #[arg(short, long, value_name = "REPO")]
    repository: String,
    /// Tag of the image to convert.
    #[arg(short, long, value_name = "TAG", required_unless_present = "input_digest")]
    input_tag: Option<String>,
    /// Digest of the image to convert.
    #[arg(short = 'g', long, value_name = "DIGEST", conflicts_with = "input_tag")]
    input_digest: Option<Digest>,
    /// Tag of the TurboOCI image to make.
    #[arg(long = "turboOCI", visible_alias = "fastoci", value_name = "TAG")]
    turbo_oci: Option<String>,
    /// Tag of the native overlaybd image to make, which holds all data.
    #[arg(short = 'o', long = "overlaybd", visible_alias = "output-tag", value_name = "TAG")]
    native: Option<String>,
    #[command(flatten)]
    compression: Compression,
    /// Where native layers lie until they are stored; else the system's folder for temporary files.
    #[arg(short, long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Take layers from this image converted before (a tag of the target, or an image name) where they are
    /// the same. What stands under the target tags is always looked at.
    #[arg(long, value_name = "TAG|IMAGE")]
    reuse: Vec<String>,
    /// Put new layers on top of those of this converted image (a tag of the target, or an image name), made by
    /// turbobd or by upstream's tools in either format, where its sources are the image's lowest layers.
    /// An image of others under a target tag is used so without being named.
    #[arg(long, value_name = "TAG|IMAGE")]
    base: Option<String>,
    /// Convert all layers anew, whatever stands under the target tags.
    #[arg(long, conflicts_with_all = ["base", "reuse"])]
    anew: bool,
    /// Keep converted layers in this folder, and take those of earlier conversions from it.
    #[arg(long, value_name = "DIR")]
    layer_store: Option<PathBuf>,
    /// Write the result to this place instead: `oci:DIR` or `host/name`.
    #[arg(long, value_name = "REPO")]
    to: Option<String>,
    /// Size of the virtual disk in GiB.
    #[arg(long, value_name = "GB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=16 << 10))]
    vsize: u64,
    /// Filesystem of the meta image; upstream also makes erofs.
    #[arg(long, default_value = "ext4", value_parser = ["ext4"])]
    fstype: String,
    /// Distance of gzip checkpoints in KiB: smaller means smaller first reads and a larger meta image.
    #[arg(long, value_name = "KIB", default_value_t = formats::gzip::DEFAULT_SPAN.get() >> 10,
          value_parser = clap::value_parser!(u64).range(64..=65536))]
    span: u64,
    /// Write OCI media types; without it Docker's are written, as upstream does.
    #[arg(long)]
    oci: bool,
    /// Name the original as `subject`, so that registries list the result among its referrers (implies --oci).
    #[arg(long)]
    referrer: bool,
    /// Platforms converted at the same time (0: all).
    #[arg(long, value_name = "N", default_value_t = 4)]
    concurrency_limit: usize,
    /// Build everything, publish nothing.
    #[arg(long)]
    no_upload: bool,
    /// Print what was built as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    registry: registry_flags::Args,
    #[command(flatten)]
    upstream: UpstreamOnly,
}

/// How a native layer is compressed.
#[derive(Debug, clap::Args)]
pub(super) struct Compression {
    /// Compression of a native layer.
    #[arg(long, value_name = "NAME", default_value = "lz4", value_parser = ["lz4", "zstd"])]
    algorithm: String,
    /// Block size of a native layer in KiB: 4, 8, 16, 32, or 64, which only fits what compresses everywhere.
    #[arg(long, value_name = "KIB", default_value = "4", value_parser = ["4", "8", "16", "32", "64"])]
    bs: String,
}

impl Compression {
    /// The same for the writer.
    pub(super) fn zfile(&self) -> zfile::Options {
        let algo = if self.algorithm == "zstd" { zfile::Algo::Zstd } else { zfile::Algo::Lz4 };
        // clap has let nothing else through.
        let block_size = self.bs.parse::<u32>().map_or(4096, |kib| kib << 10);
        zfile::Options { algo, block_size, ..zfile::Options::default() }
    }
}

/// Flags of upstream's `convertor` that mean nothing here, or nothing yet: a script that passes them
/// is told so instead of being misunderstood.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Of upstream's convertor")]
struct UpstreamOnly {
    /// Only `true`: the filesystem is always made in the first layer.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    mkfs: bool,
    /// Not needed: work files have no name and are gone with the process.
    #[arg(long)]
    reserve: bool,
    /// Not needed: there is no writable layer.
    #[arg(long)]
    disable_sparse: bool,
    /// There is no database: see --reuse and --layer-store.
    #[arg(long, value_name = "TYPE")]
    db_type: Option<String>,
    /// See --db-type.
    #[arg(long, value_name = "DSN")]
    db_str: Option<String>,
}

impl UpstreamOnly {
    fn check(&self) -> Result<(), Failure> {
        let refused = [
            (
                !self.mkfs,
                "--mkfs=false: there is no shared base layer; the filesystem is made in the first layer",
            ),
            (
                self.db_type.is_some() || self.db_str.is_some(),
                "--db-type: there is no database; --reuse and --layer-store find layers that were converted before",
            ),
        ];
        if let Some((_, why)) = refused.iter().find(|(given, _)| *given) {
            return Err(Failure::Usage((*why).to_owned()));
        }
        for (given, flag) in
            [(self.reserve, "--reserve"), (self.disable_sparse, "--disable-sparse")]
        {
            if given {
                tracing::warn!(
                    "{flag} is ignored: it concerns work files that a conversion here does not have"
                );
            }
        }
        Ok(())
    }
}

impl Args {
    /// Layers that were converted before.
    fn known_layers(
        &self,
        into: &Arc<dyn ImageStore>,
        client: &Client,
    ) -> Result<KnownLayers, Failure> {
        let local = match &self.layer_store {
            Some(dir) => Some(LocalLayers::open_or_create(dir).map_err(Failure::because)?),
            None => None,
        };
        let mut known = KnownLayers::with_local(local);
        let tags = [&self.turbo_oci, &self.native].into_iter().flatten();
        for tag in tags.filter(|_| !self.anew) {
            // Most conversions are the first under their tag.
            if let Err(error) = known.learn(into, &Selector::Tag(tag.clone())) {
                tracing::debug!(%tag, %error, "no earlier conversion to take layers from");
            }
        }
        for name in &self.reuse {
            let (from, selector) = self.named(name, into, client)?;
            let learnt = known.learn(&from, &selector).map_err(Failure::because)?;
            tracing::info!("{name} has {learnt} layers that can be used again");
        }
        if let Some(name) = &self.base {
            let (from, selector) = self.named(name, into, client)?;
            known.build_on(&from, &selector).map_err(Failure::because)?;
        }
        Ok(known)
    }

    /// A tag of the target, or an image anywhere.
    fn named(
        &self,
        name: &str,
        into: &Arc<dyn ImageStore>,
        client: &Client,
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
        // A place that nothing is written to is not made either.
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

/// What was built, on stderr: stdout carries only the digest.
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
