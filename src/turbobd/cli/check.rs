//! `turbobd check`: verify an image.
//!
//! Opening the image verifies the meta image: digests, checksums, indexes, that they fit together, and that no
//! mapping leaves its target. Then the layers are streamed, and what the meta image shows is compared with what they
//! contain ([`convert::compare`]). `--data` decodes every chunk of every layer, verifies its checksum, and verifies the
//! digest of every original blob and of every native layer. It says what each was verified by.

use std::io::Read as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use sha2::{Digest as _, Sha256};

use super::{Failure, Outcome, Service, export, image, stdout, table};
use blobs::cache::Cache;
use blobs::identity::{Verification, VerifiedBy};
use convert::Silent;
use convert::compare::CompareError;
use convert::meta::MetaReason;
use formats::oci::{Descriptor, Digest};
use host::images::{self, OpenImage, Registries};
use registry::store::ImageStore;
use source::chunk::ChunkSource;

#[derive(Debug, clap::Args)]
#[command(mut_arg("publish", |arg| arg.hide(true)))]
pub(super) struct Args {
    /// Also read and verify all data of the layers.
    #[arg(long)]
    data: bool,
    #[command(flatten)]
    image: image::Args,
}

/// Verifies, and prints each verified part.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    let registries = Registries::new(service.load()?);
    let cache = Cache::new(registries.service().turbobd.memory_cache, 1);
    let opened =
        images::open::open(&args.image.spec()?, &registries, cache).map_err(Failure::open)?;
    stdout::line(format_args!("meta image: ok ({} layers)", opened.disk.layer_count()))?;
    if args.data {
        verify_data(&opened)?;
    }
    compare(&opened)?;
    Ok(ExitCode::SUCCESS)
}

/// Verifies every chunk and every original blob, and prints them.
fn verify_data(opened: &OpenImage) -> Result<(), Failure> {
    for (number, source) in opened.disk.chunk_sources().into_iter().enumerate() {
        let Some(source) = source else { continue };
        load_every_chunk(&source)?;
        stdout::line(format_args!(
            "layer {number}: {} in {} chunks: ok, {}",
            table::size(source.decoded_len()),
            source.chunk_count(),
            by(&*source)
        ))?;
    }
    let native = opened.layers.iter().filter(|layer| layer.target.is_none());
    if let Some((store, _)) = &opened.named {
        for layer in native {
            verify_blob(&**store, "native layer", &layer.digest, layer.size)?;
            stdout::line(format_args!("{}: ok, as a whole", layer.digest))?;
        }
    }
    if let Some(targets) = &opened.targets {
        for target in opened.layers.iter().filter_map(|layer| layer.target.as_ref()) {
            verify_blob(&**targets, "original layer", &target.digest, target.size)?;
            stdout::line(format_args!("{}: ok, as a whole", target.digest))?;
        }
    }
    Ok(())
}

/// Compares the files of the meta image with the contents of its layers.
fn compare(opened: &OpenImage) -> Result<(), Failure> {
    let (Some(manifest), Some(targets)) = (&opened.manifest, &opened.targets) else {
        let text = "contents: not compared (a device config names no manifest)";
        return stdout::line(format_args!("{text}"));
    };
    if let Some(reason) = opened.reason.as_ref().filter(|reason| **reason == MetaReason::Built) {
        return stdout::line(format_args!("contents: {reason}"));
    }
    match convert::compare::with_layers(&opened.disk, manifest, &**targets, &Silent) {
        Ok(differences) if differences.is_empty() => {
            stdout::line(format_args!("contents: those of the layers"))
        }
        Ok(differences) => {
            let listed: Vec<String> = differences.iter().map(ToString::to_string).collect();
            Err(Failure::Failed(format!(
                "The meta image does not show what its layers contain: {}",
                listed.join("; ")
            )))
        }
        Err(error @ (CompareError::Native(_) | CompareError::NoExt4)) => {
            stdout::line(format_args!("contents: not compared ({error})"))
        }
        Err(error) => Err(Failure::because(error)),
    }
}

/// What the chunks of a layer were verified by.
fn by(source: &dyn ChunkSource) -> &'static str {
    match Verification::of(source).verified_by {
        VerifiedBy::Table => "by the SHA-256 of each",
        VerifiedBy::Blob => "by the digest of the whole",
        VerifiedBy::Checksum => "by checksums, which find damage and prove nothing",
        VerifiedBy::Nothing => "with no checksum to verify them by",
    }
}

/// Decodes all chunks on all cores; the chunks of one long frame on one core.
fn load_every_chunk(source: &Arc<dyn ChunkSource>) -> Result<(), Failure> {
    let next = AtomicU32::new(0);
    let load = |index: u32| match (source.serial(), source.frame(index)) {
        (Some(serial), frame) if frame.len() > 1 && frame.start == index => {
            serial.load_frame(frame, &mut |_| ())
        }
        (Some(_), frame) if frame.len() > 1 => Ok(()), // decoded with the first chunk of its frame
        _ => source.load(index).map(drop),
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..export::loader_threads())
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= source.chunk_count() {
                            return Ok(());
                        }
                        load(index)?;
                    }
                })
            })
            .collect();
        for worker in workers {
            let lost = |_| Failure::Failed("A checking thread ended early".into());
            worker
                .join()
                .map_err(lost)?
                .map_err(|error: source::chunk::ChunkError| Failure::because(error))?;
        }
        Ok(())
    })
}

/// Reads a blob from end to end and compares its digest.
fn verify_blob(store: &dyn ImageStore, kind: &str, digest: &str, size: u64) -> Result<(), Failure> {
    let digest: Digest = digest.parse().map_err(Failure::because)?;
    let mut blob = store.open_blob(&Descriptor::new("", digest, size)).map_err(Failure::because)?;
    let mut hasher = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    loop {
        match blob.read(&mut buf).map_err(Failure::because)? {
            0 => break,
            n => hasher.update(&buf[..n]),
        }
    }
    let got = Digest::from_hasher(hasher);
    if got != digest {
        return Err(Failure::Failed(format!(
            "The {kind} {digest} is damaged: its bytes have digest {got}"
        )));
    }
    Ok(())
}
