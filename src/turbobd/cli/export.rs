//! `turbobd export`: the whole virtual disk as a file or digest, without a block device.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use super::{Failure, Outcome, Service, image, stdout};
use blobs::cache::Cache;
use disk::{Disk, digest, scan};
use host::images::{self, Registries};

#[derive(Debug, clap::Args)]
#[command(mut_arg("publish", |arg| arg.hide(true)))]
pub(super) struct Args {
    /// Write the disk to this sparse file.
    #[arg(short, long, value_name = "RAW", required_unless_present = "digest")]
    output: Option<PathBuf>,
    /// Print `content_sha256=… vsize=…`: the digest of all blocks that are not zero, and the size in bytes.
    #[arg(long)]
    digest: bool,
    #[command(flatten)]
    image: image::Args,
}

/// Exports.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    let registries = Registries::new(service.load()?);
    let used = if args.image.is_local() { scan::MEMORY } else { scan::MEMORY_FAR };
    let budget = registries.service().turbobd.memory_cache.min(used);
    let cache = Cache::new(budget, loader_threads());
    let start = Instant::now();
    let opened =
        images::open::open(&args.image.spec()?, &registries, cache).map_err(Failure::open)?;
    tracing::info!("opened in {:.2?}", start.elapsed());
    if let Some(path) = &args.output {
        export(&opened.disk, path)?;
    }
    if args.digest {
        let (digest, size) =
            digest::content_digest(&opened.disk, opened.disk.mapped()).map_err(Failure::because)?;
        stdout::line(format_args!("content_sha256={} vsize={size}", digest.hex()))?;
    }
    tracing::info!("read in {:.2?}", start.elapsed());
    Ok(ExitCode::SUCCESS)
}

/// Writes the disk to a temporary file beside `path`, and renames it to `path` when it is complete.
fn export(disk: &Disk, path: &Path) -> Result<(), Failure> {
    let cannot = |error: std::io::Error| {
        Failure::Failed(format!("Cannot write {}: {error}", path.display()))
    };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file =
        tempfile::Builder::new().prefix(".turbobd-export").tempfile_in(dir).map_err(cannot)?;
    digest::export_raw(disk, file.as_file()).map_err(Failure::because)?;
    file.persist(path).map_err(|error| cannot(error.error))?;
    Ok(())
}

/// Number of loaders: one for each core, because they only decode.
pub(super) fn loader_threads() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get)
}
