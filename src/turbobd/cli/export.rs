//! `turbobd export`: the whole virtual disk as a file or digest, without a block device.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use super::output::OutputFile;
use super::{Failure, Outcome, Service, image, stdout};
use blobs::cache::Cache;
use disk::volume::Volume as _;
use disk::{Disk, digest, scan};
use host::images::{self, Registries};

#[derive(Debug, clap::Args)]
#[command(mut_arg("publish", |arg| arg.hide(true)))]
pub(super) struct Args {
    /// Write the disk to this sparse file. A device or FIFO gets every byte of the disk, and so does stdout: `-`.
    #[arg(short, long, value_name = "RAW", required_unless_present = "digest")]
    output: Option<PathBuf>,
    /// Replace an existing file.
    #[arg(short, long, requires = "output")]
    force: bool,
    /// Print `content_sha256=… vsize=…`: the digest of all blocks that are not zero, and the size in bytes.
    #[arg(long)]
    digest: bool,
    #[command(flatten)]
    image: image::Args,
}

/// Exports.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    if args.digest && args.output.as_deref() == Some("-".as_ref()) {
        return Err(Failure::Usage("--digest and -o - would both write to stdout".into()));
    }
    let output = args.output.as_deref().map(|path| OutputFile::open(path, args.force));
    let output = output.transpose()?;
    let registries = Registries::new(service.load()?);
    let used = if args.image.is_local() { scan::MEMORY } else { scan::MEMORY_FAR };
    let budget = registries.service().turbobd.memory_cache.min(used);
    let cache = Cache::new(budget, loader_threads());
    let start = Instant::now();
    let opened =
        images::open::open(&args.image.spec()?, &registries, cache).map_err(Failure::open)?;
    tracing::info!("opened in {:.2?}", start.elapsed());
    if let Some(output) = output {
        export(&opened.disk, output)?;
    }
    if args.digest {
        let (digest, size) =
            digest::content_digest(&opened.disk, opened.disk.mapped()).map_err(Failure::because)?;
        stdout::line(format_args!("content_sha256={} vsize={size}", digest.hex()))?;
    }
    tracing::info!("read in {:.2?}", start.elapsed());
    Ok(ExitCode::SUCCESS)
}

/// Writes the disk: a new file with holes for zeros, anything else from the first byte to the last.
fn export(disk: &Disk, output: OutputFile) -> Result<(), Failure> {
    if output.is_new() {
        digest::export_raw(disk, output.file()).map_err(Failure::because)?;
    } else {
        output.has_room_for(disk.size())?;
        digest::export_stream(disk, &mut output.file()).map_err(Failure::because)?;
    }
    output.finish()
}

/// Number of loaders: one for each core, because they only decode.
pub(super) fn loader_threads() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get)
}
