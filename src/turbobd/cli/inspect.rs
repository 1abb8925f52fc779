//! `turbobd inspect`: the layers of an image, their sizes and indexes.

use std::process::ExitCode;

use serde_json::json;

use super::{Failure, Outcome, Service, image, stdout, table};
use blobs::cache::Cache;
use disk::image::LayerInfo;
use disk::volume::Volume as _;
use host::images::{self, Registries};

#[derive(Debug, clap::Args)]
#[command(mut_arg("publish", |arg| arg.hide(true)))]
pub(super) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    image: image::Args,
}

/// Inspects.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    let registries = Registries::new(service.load()?);
    let cache = Cache::new(registries.service().turbobd.memory_cache, 1);
    let opened =
        images::open::open(&args.image.spec()?, &registries, cache).map_err(Failure::open)?;
    let Some(digest) = &opened.digest else {
        return Err(Failure::Usage(
            "inspect takes an IMAGE; a device config names only local files".into(),
        ));
    };
    if args.json {
        table::print_json(&json!({
            "digest": digest,
            "vsize": opened.disk.size(),
            "layers": opened.layers,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    stdout::line(format_args!("digest  {digest}"))?;
    stdout::line(format_args!("vsize   {}", table::size(opened.disk.size())))?;
    let head = [
        "#",
        "kind",
        "meta",
        "size",
        "verified by",
        "target",
        "size",
        "as",
        "tar",
        "share",
        "fs",
        "index",
        "sidecar",
        "span",
        "segments",
        "long frame",
    ];
    let rows: Vec<_> =
        opened.layers.iter().enumerate().map(|(number, layer)| row(number, layer)).collect();
    table::print(&head, &rows)?;
    Ok(ExitCode::SUCCESS)
}

fn row(number: usize, layer: &LayerInfo) -> Vec<String> {
    let mut row = vec![
        number.to_string(),
        layer.kind.into(),
        table::short(&layer.digest),
        table::size(layer.size),
        layer.data.verified_by.name().into(),
    ];
    if let Some(target) = &layer.target {
        row.extend([
            table::short(&target.digest),
            table::size(target.size),
            target.encoding.into(),
            table::size(target.uncompressed),
            table::percent(layer.size, target.size),
            table::size(target.fs_meta),
            table::size(target.gzip_meta),
            table::size(target.sidecar),
            table::size(target.span),
            target.segments.to_string(),
            match target.longest_frame {
                0 => "-".into(),
                len => table::size(len),
            },
        ]);
    }
    row
}
