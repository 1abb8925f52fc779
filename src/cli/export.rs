//! `turbobd export`: the whole virtual disk without any kernel.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use super::{Failure, Outcome, opener};
use crate::cache::Cache;
use crate::disk::digest;
use crate::volume::Volume as _;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    image: opener::Args,
    /// Write the disk to this file, sparse.
    #[arg(short, long, value_name = "RAW", required_unless_present = "digest")]
    output: Option<PathBuf>,
    /// Print `content_sha256=… vsize=…`: a digest of all blocks that are not zero.
    #[arg(long)]
    digest: bool,
}

/// Exports.
pub(super) fn run(args: &Args) -> Outcome {
    let cache = Cache::new(opener::CACHE_BUDGET, loader_threads());
    let start = Instant::now();
    let opened = args.image.open(cache)?;
    tracing::info!("opened in {:.2?}", start.elapsed());
    if let Some(path) = &args.output {
        digest::export_raw(&opened.disk, path).map_err(Failure::because)?;
    }
    if args.digest {
        let digest = digest::content_digest(&opened.disk).map_err(Failure::because)?;
        println!("content_sha256={} vsize={}", digest.hex(), opened.disk.size());
    }
    tracing::info!("read in {:.2?}", start.elapsed());
    Ok(ExitCode::SUCCESS)
}

/// One loader a core: inflating is all they do here.
pub(super) fn loader_threads() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get)
}
