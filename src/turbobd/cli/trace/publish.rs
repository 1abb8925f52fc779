//! `turbobd trace publish`: push a trace beside its image, for every host.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use jiff::Timestamp;

use super::super::{Failure, Outcome, Service, image, stderr, table};
use blobs::cache::Cache;
use blobs::trace::{self, published, upstream};
use formats::trace::Trace;
use host::images::{self, Registries};
use registry::store::Selector;

#[derive(Debug, clap::Args)]
#[command(mut_arg("publish", |arg| arg.hide(true)))]
pub(super) struct PublishArgs {
    /// Trace file, from `trace record` or learned by this host.
    #[arg(short, long, value_name = "FILE", default_value = "turbobd.trace")]
    trace: PathBuf,
    #[command(flatten)]
    image: image::Args,
}

pub(super) fn run(args: &PublishArgs, service: &Service) -> Outcome {
    let name = args.image.name();
    if args.image.config.is_some() || name.starts_with('/') {
        return Err(Failure::Usage(format!(
            "name the image rather than {name}: a trace is published in its repository"
        )));
    }
    let trace = read(&args.trace)?;
    let opened = images::open::open(
        &args.image.spec()?,
        &Registries::new(service.load()?),
        Cache::new(0, 1),
    )
    .map_err(Failure::open)?;
    let blobs = opened.disk.blobs();
    let names: Vec<_> =
        blobs.iter().flatten().map(|blob| trace::blob_name(&**blob.source())).collect();
    let fitting = trace.touches.iter().filter(|touch| {
        trace.blobs.get(touch.blob as usize).is_some_and(|blob| names.contains(blob))
    });
    let fitting = fitting.count();
    if fitting == 0 {
        return Err(Failure::Failed(format!(
            "None of the {} pieces in {} belongs to a layer of {name}: record a start of this image",
            trace.touches.len(),
            args.trace.display()
        )));
    }
    let Some((store, manifest)) = opened.named else {
        return Err(Failure::Failed(format!("{name} is in no repository")));
    };
    let subject = store.manifest(&Selector::Digest(manifest)).map_err(Failure::because)?;
    let done = published::publish(&*store, &subject, &trace, Timestamp::now())
        .map_err(Failure::because)?;
    let done = match done {
        published::Published::Now => "published beside",
        published::Published::Before => "published already beside",
    };
    stderr::line(format_args!(
        "turbobd: trace: {fitting} pieces of its layers, {}, {done} {name}",
        table::size(trace.bytes())
    ));
    Ok(ExitCode::SUCCESS)
}

fn read(file: &PathBuf) -> Result<Trace, Failure> {
    let name = file.display();
    let failed = |why: String| Failure::Failed(format!("Cannot publish {name}: {why}"));
    let bytes = fs::read(file).map_err(|error| failed(error.to_string()))?;
    if upstream::is_trace(&bytes) {
        return Err(failed(
            "it is in overlaybd's format, which names no layers: record with --format turbobd"
                .into(),
        ));
    }
    Trace::parse(&bytes).map_err(|error| failed(error.to_string()))
}
