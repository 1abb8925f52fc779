//! `turbobd convert`: build the meta image of an OCI image, beside it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use super::bars::Bars;
use super::{Failure, Outcome, Service, registry, table};
use crate::convert::{ConvertOptions, convert};
use crate::oci::{Digest, RepositoryName};
use crate::store::{self, Selector};
use crate::units::Bytes;

/// Flags of upstream's `convertor` mean the same here (spec turbooci 2); `--span`, `--to` and
/// `--json` are ours.
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
    #[arg(long, value_name = "KIB", default_value_t = crate::gzip::DEFAULT_SPAN.get() >> 10,
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
    registry: registry::Args,
    #[command(flatten)]
    upstream: UpstreamOnly,
}

/// Flags of upstream's `convertor` that mean nothing here, or nothing yet: a script that passes them
/// is told so instead of being misunderstood.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Of upstream's convertor")]
struct UpstreamOnly {
    /// Native overlaybd images are read but not written yet.
    #[arg(short = 'o', long = "overlaybd", value_name = "TAG")]
    native: Option<String>,
    /// Only `true`: the filesystem is always made in the first layer.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    mkfs: bool,
    /// Not needed: nothing of a layer is written to disk.
    #[arg(short, long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Not needed: there are no work files.
    #[arg(long)]
    reserve: bool,
    /// Not needed: there is no writable layer.
    #[arg(long)]
    disable_sparse: bool,
    /// Deduplication through a database is for native images, which are not written yet.
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
                self.native.is_some(),
                "--overlaybd: native images are read but not written yet; --turboOCI makes a meta image",
            ),
            (
                !self.mkfs,
                "--mkfs=false: there is no shared base layer; the filesystem is made in the first layer",
            ),
            (
                self.db_type.is_some() || self.db_str.is_some(),
                "--db-type: there is no deduplication through a database",
            ),
        ];
        if let Some((_, why)) = refused.iter().find(|(given, _)| *given) {
            return Err(Failure::Usage((*why).to_owned()));
        }
        for (given, flag) in [
            (self.dir.is_some(), "--dir"),
            (self.reserve, "--reserve"),
            (self.disable_sparse, "--disable-sparse"),
        ] {
            if given {
                tracing::warn!("{flag} is ignored: a conversion here has no work files");
            }
        }
        Ok(())
    }
}

/// Converts.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    args.upstream.check()?;
    let tag = match (&args.turbo_oci, args.no_upload) {
        (Some(tag), false) => Some(tag.as_str()),
        (_, true) => None,
        (None, false) => {
            return Err(Failure::Usage(
                "name the result with --turboOCI TAG, or pass --no-upload".into(),
            ));
        }
    };
    let client = args.registry.client(&*service.load()?)?;
    let source: RepositoryName = args.repository.parse().map_err(Failure::usage)?;
    let store = store::open_repository(&source, &client).map_err(Failure::because)?;
    let into = match &args.to {
        // A place that nothing is written to is not made either.
        _ if tag.is_none() => store.clone(),
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
    };
    let start = Instant::now();
    let done = convert(&*store, &selector, &*into, tag, &options, &Bars::new())
        .map_err(Failure::because)?;
    tracing::info!("converted in {:.2?}", start.elapsed());
    if args.json {
        table::print_json(&done)?;
    } else {
        report(&done);
        println!("{}", done.digest);
    }
    Ok(ExitCode::SUCCESS)
}

/// What was built, on stderr: stdout carries only the digest.
fn report(done: &crate::convert::Conversion) {
    for image in &done.images {
        for layer in &image.layers {
            let sizes = &layer.sizes;
            eprintln!(
                "{} {}: {} -> {} ({}), tar {}, {} ms",
                image.platform,
                table::short(&layer.source),
                table::size(sizes.blob),
                table::size(sizes.archive),
                table::percent(sizes.archive, sizes.blob),
                table::size(sizes.tar),
                layer.millis,
            );
        }
    }
}
