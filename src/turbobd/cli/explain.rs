//! `turbobd explain`: the layer, blob and segment behind a file or byte of a device, and the reads that wait.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Failure, Outcome, ls, stderr, stdout, table};
use client::protocol::{
    self, BlobRecord, ChunkState, Explanation, FailureRecord, PartKind, PlacedRecord, RetryRecord,
    WaitingRecord,
};
use client::{DaemonClient, DeviceRecord, find, mounts};
use formats::units::SECTOR;
use sys::extents;

/// Largest number of places in one answer: enough for a file of several GB in segments of 1 MiB; the answer has a few MB.
const MOST_PLACES: usize = 20_000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device, its mount point, or its image.
    #[arg(value_name = "DEVICE")]
    device: String,
    /// File or directory of the image: a path in the image, or a path below its mount point.
    #[arg(conflicts_with = "offset")]
    path: Option<PathBuf>,
    /// Offset on the disk in bytes, instead of a file.
    #[arg(long, value_name = "BYTES")]
    offset: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A part of the requested file or range, with its place in the file.
#[derive(serde::Serialize)]
struct ExplainedPart {
    /// First byte in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    file_offset: Option<u64>,
    #[serde(flatten)]
    place: PlacedRecord,
}

#[derive(serde::Serialize)]
struct ExplainAnswer {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parts: Vec<ExplainedPart>,
    #[serde(flatten)]
    explanation: Explanation,
}

/// Explains.
pub(super) fn run(args: &Args) -> Outcome {
    let none =
        || Failure::Failed(format!("{} is not attached: no daemon runs on this host", args.device));
    let mut client =
        DaemonClient::connect(&protocol::run_dir()).map_err(Failure::because)?.ok_or_else(none)?;
    let device = named(&mut client, &args.device)?;
    let (ranges, of_file) = match (&args.path, args.offset) {
        (Some(path), _) => file_ranges(&device, path)?,
        (None, Some(offset)) => {
            if offset >= device.size_bytes {
                let text =
                    format!("{offset} lies behind the disk, which has {} bytes", device.size_bytes);
                return Err(Failure::Usage(text));
            }
            (vec![(offset / SECTOR * SECTOR, SECTOR)], Vec::new())
        }
        (None, None) => Default::default(),
    };
    let mut explanation =
        client.explain(device.id, ranges, MOST_PLACES).map_err(Failure::because)?;
    let cut = explanation.places.len() >= MOST_PLACES;
    let places = std::mem::take(&mut explanation.places);
    let parts: Vec<ExplainedPart> = places
        .into_iter()
        .map(|place| ExplainedPart {
            file_offset: file_offset(&of_file, place.offset_bytes),
            place,
        })
        .collect();
    if args.json {
        return table::print_json(&ExplainAnswer { parts, explanation })
            .map(|()| ExitCode::SUCCESS);
    }
    if args.path.is_some() || args.offset.is_some() {
        print_parts(&parts, &explanation.blobs)?;
        if parts.is_empty() {
            stderr::line(
                "turbobd: explain: the file has no blocks: it is empty, or its content is in the inode",
            );
        }
        if cut {
            stderr::line(format_args!(
                "turbobd: explain: only the first {MOST_PLACES} parts are shown"
            ));
        }
        let about = |blob: &BlobRecord| {
            parts
                .iter()
                .any(|part| part.place.chunk.as_ref().is_some_and(|chunk| chunk.blob == blob.blob))
        };
        explanation.blobs.retain(about);
    } else {
        print_device(&explanation)?;
    }
    print_blobs(&explanation.blobs)?;
    Ok(ExitCode::SUCCESS)
}

/// Finds the device that the user names.
fn named(client: &mut DaemonClient, what: &str) -> Result<DeviceRecord, Failure> {
    let records = client.list().map_err(Failure::because)?;
    let absolute =
        what.parse::<formats::oci::ImageName>().ok().and_then(|name| name.absolute().ok());
    let by_image = absolute.and_then(|name| find(&records, &name.to_string()).ok());
    match find(&records, what) {
        Ok(record) => Ok(record.clone()),
        Err(error) => by_image.cloned().ok_or_else(|| Failure::because(error)),
    }
}

type FileRange = (u64, u64, u64);

/// Ranges of a file on the disk of a mounted device; and the same with the offsets in the file.
fn file_ranges(
    device: &DeviceRecord,
    path: &std::path::Path,
) -> Result<(Vec<(u64, u64)>, Vec<FileRange>), Failure> {
    let mounted = mounts::mounted_from(&device.device).map_err(Failure::because)?;
    let root = mounted.iter().find(|place| path.starts_with(place)).or(mounted.first());
    let Some(root) = root else {
        return Err(Failure::Failed(format!(
            "{} is not mounted here, so its files have no names: mount it, or give --offset",
            device.device.display()
        )));
    };
    let file = extents::open_inside(root, path).map_err(|error| {
        Failure::Failed(format!("Cannot open {} in the image: {error}", path.display()))
    })?;
    let found = extents::extents(&file).map_err(|error| {
        Failure::Failed(format!("{} has no places on the disk: {error}", path.display()))
    })?;
    let parts = found.iter().filter_map(|part| Some((part.place?, part.len, part.offset)));
    let of_file: Vec<FileRange> = parts.collect();
    Ok((of_file.iter().map(|&(place, len, _)| (place, len)).collect(), of_file))
}

/// Offset in the file of a byte of the disk.
fn file_offset(of_file: &[FileRange], byte: u64) -> Option<u64> {
    let part = of_file.iter().find(|(place, len, _)| (*place..place + len).contains(&byte))?;
    Some(part.2 + (byte - part.0))
}

fn print_parts(parts: &[ExplainedPart], blobs: &[BlobRecord]) -> Result<(), Failure> {
    let head = [
        "FILE",
        "DISK",
        "LENGTH",
        "LAYER",
        "WHAT",
        "BLOB",
        "AT",
        "SEGMENT",
        "STORED AT",
        "HELD",
        "FROM",
    ];
    let row = |part: &ExplainedPart| {
        let place = &part.place;
        let chunk = place.chunk.as_ref();
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let blob = |name: &str| blobs.iter().find(|blob| blob.blob == name);
        let host = chunk
            .and_then(|chunk| blob(&chunk.blob))
            .map(|blob| blob.host.clone().unwrap_or_else(|| "local file".into()));
        vec![
            text(part.file_offset.map(|offset| offset.to_string())),
            place.offset_bytes.to_string(),
            place.length_bytes.to_string(),
            text(place.layer.map(|layer| layer.to_string())),
            what(place.what).into(),
            text(chunk.map(|chunk| table::short(&chunk.blob))),
            text(chunk.map(|chunk| chunk.at_bytes.to_string())),
            text(chunk.map(|chunk| match chunk.decoded_from {
                Some(first) => format!("{} from {first}", chunk.index),
                None => chunk.index.to_string(),
            })),
            text(chunk.map(|chunk| format!("{}..{}", chunk.start_bytes, chunk.end_bytes))),
            text(chunk.map(|chunk| held(chunk.held).to_owned())),
            text(host),
        ]
    };
    table::print(&head, &parts.iter().map(row).collect::<Vec<_>>())
}

fn what(what: PartKind) -> &'static str {
    match what {
        PartKind::Hole => "hole",
        PartKind::Metadata => "metadata",
        PartKind::Data => "data",
        PartKind::Padding => "padding",
    }
}

fn held(held: ChunkState) -> &'static str {
    match held {
        ChunkState::Memory => "memory",
        ChunkState::Disk => "disk",
        ChunkState::Remote => "no",
    }
}

fn print_device(explanation: &Explanation) -> Result<(), Failure> {
    let device = &explanation.device;
    let state = ls::state(device);
    stdout::line(format_args!("{}: {}, {state}", device.device.display(), device.image))?;
    stdout::line(format_args!(
        "read {}, fetched {}, cached {}; {} retries, {} errors",
        table::size(device.bytes_read),
        table::size(device.bytes_fetched),
        table::size(device.bytes_cached),
        device.retries,
        device.errors
    ))?;
    match device.waiting {
        0 => stdout::line("no read waits")?,
        1 => stdout::line("1 read waits:")?,
        many => stdout::line(format_args!("{many} reads wait:"))?,
    }
    for read in &explanation.waiting {
        stdout::line(format_args!("  {}", waiting(read)))?;
    }
    Ok(())
}

fn waiting(read: &WaitingRecord) -> String {
    let WaitingRecord { offset_bytes, length_bytes, waits_ms, .. } = read;
    let mut text =
        format!("{length_bytes} bytes at {offset_bytes} for {}", table::duration(*waits_ms));
    let chunks = read.places.iter().filter_map(|place| place.chunk.as_ref());
    let mut names: Vec<String> = chunks
        .filter(|chunk| chunk.held != ChunkState::Memory)
        .map(|chunk| format!("segment {} of {}", chunk.index, table::short(&chunk.blob)))
        .collect();
    names.dedup();
    if !names.is_empty() {
        text.push_str(&format!(": {}", names.join(", ")));
    }
    if let Some(error) = &read.error {
        text.push_str(&format!("; failed {} times, last: {error}", read.tries));
    }
    if let Some(next) = read.next_ms {
        text.push_str(&format!("; asked for again in {}", table::duration(next)));
    }
    text
}

fn print_blobs(blobs: &[BlobRecord]) -> Result<(), Failure> {
    for blob in blobs {
        stdout::line(&blob.source)?;
        stdout::line(format_args!("  {}", shared(blob)))?;
        stdout::line(format_args!(
            "  from {}: {} in {} requests, {} of them repeated; {} in memory",
            blob.host.as_deref().unwrap_or("a local file"),
            table::size(blob.fetched_bytes),
            blob.requests,
            blob.retries,
            table::size(blob.cached_bytes)
        ))?;
        for RetryRecord { start_bytes, end_bytes, waits_ms, tries, error, next_ms } in
            &blob.trying_again
        {
            stdout::line(format_args!(
                "  trying again: bytes {start_bytes}..{end_bytes}, for {}, {tries} failed tries, next in {}: {error}",
                table::duration(*waits_ms),
                table::duration(*next_ms)
            ))?;
        }
        for FailureRecord { at_unix_ms, chunk, again, reason } in &blob.failures {
            let ago = table::duration(now().saturating_sub(*at_unix_ms));
            let then = if *again { ", fetched again" } else { "" };
            stdout::line(format_args!("  {ago} ago, segment {chunk}{then}: {reason}"))?;
        }
    }
    Ok(())
}

/// What verifies the chunks of a blob, and who shares them.
fn shared(blob: &BlobRecord) -> String {
    let BlobRecord { verified_by, shared_by, .. } = blob;
    match verified_by.as_str() {
        "table" => format!(
            "verified by a SHA-256 of each segment; shared with images that bring the same table, {}",
            table::short(shared_by)
        ),
        "blob" => format!(
            "verified as a whole by its digest; shared with images that name it, {}",
            table::short(shared_by)
        ),
        "checksum" => {
            format!("checksums find damage and prove nothing; shared within {shared_by} only")
        }
        _ => format!("not verified; shared within {shared_by} only"),
    }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
