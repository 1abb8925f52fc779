//! One pass over one layer.
//!
//! Three threads take part: one reads the blob in pieces, one (the caller's) inflates, parses and applies,
//! one hashes. The hasher gets each piece *after* the scan, together with the segment boundaries that became
//! final since the last one, because it needs them to know the ends of segments.
//!
//! The compression of the layer is detected from its first bytes, because media types can be wrong (spec
//! turbooci 3.5).
//!
//! One pass makes up to two results: a TurboOCI layer, and a [native](super::native) one with compression on
//! threads of its own. Without either, the layer still changes the tree for the layers above it; a layer that
//! was converted before is read only for that.
//!
//! If parsing fails, reading and hashing continue to the end. If the digest is wrong, the damaged transfer is
//! the error to report, not the parsing error that it caused.

use std::io::{Cursor, Read, Write as _};
use std::ops::Range;
use std::thread;

use super::apply::{ApplyReport, LayerApply};
use super::native::{Hashing, NativeBlob, NativeBuilder, NativeLayer};
use super::{ConvertLayerError, ConvertOptions, Progress};
use bytes::{Bytes as Piece, BytesMut};
use crossbeam_channel::{Receiver, Sender, bounded};
use formats::archive::{FS_META_NAME, MARKER_NAME};
use formats::ext4::{Image, LayerBlocks, LayerRun, Tree};
use formats::gzip::{self, Boundary, GZIP_META_NAME, SIDECAR_NAME, Sidecar};
use formats::lsmt::WarpWriter;
use formats::oci::{Descriptor, Digest};
use formats::segments::{self, FramesScanner, PlainScanner};
use formats::tar::{self, TarEvent};
use formats::units::Bytes;
use formats::{zfile, zstandard};
use sha2::{Digest as _, Sha256};

/// Number of bytes read at a time: large enough that the cost of passing a piece on is negligible.
const PIECE: usize = 256 << 10;
/// Number of pieces in transit between two threads: 8 MiB, enough to cover a burst of the network.
const PIECES_AHEAD: usize = 32;

/// Compression of the original blob, by its content and not by its media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetEncoding {
    /// gzip, one member or many.
    Gzip,
    /// None: a bare tar.
    Plain,
    /// zstd, which upstream's TurboOCI does not support: its index is only in the sidecar.
    Zstd,
}

impl TargetEncoding {
    /// True if the target is annotated as gzip; otherwise as a plain tar. Every compressed layer is, because
    /// upstream takes other annotations for plain.
    #[must_use]
    pub fn is_annotated_gzip(self) -> bool {
        self != Self::Plain
    }
}

/// Results to make of a layer.
#[derive(Clone, Debug, Default)]
pub struct WantedForms {
    /// A `TurboOCI` layer.
    pub turbo: bool,
    /// A native layer.
    pub native: Option<NativeLayer>,
}

/// Results of a layer. The native blob's digest may still be in computation.
pub(super) struct Converted {
    pub(super) turbo: Option<BuiltLayer>,
    pub(super) native: Option<Hashing>,
    /// Length of the uncompressed tar, bytes.
    pub(super) tar_len: u64,
}

/// A converted layer.
pub struct BuiltLayer {
    /// The new blob: a gzip-compressed tar archive.
    pub archive: Vec<u8>,
    /// SHA-256 of the archive's tar.
    pub diff_id: Digest,
    /// Compression of the original.
    pub target: TargetEncoding,
    /// Sizes of the parts, in bytes.
    pub sizes: LayerSizes,
    /// Summary of the applied entries.
    pub applied: ApplyReport,
}

/// Sizes of the parts of a meta image's layer.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct LayerSizes {
    /// The original blob.
    pub blob: u64,
    /// The original, uncompressed.
    pub tar: u64,
    /// `ext4.fs.meta`.
    pub fs_meta: u64,
    /// `gzip.meta`; 0 if there is none.
    pub gzip_meta: u64,
    /// The sidecar; 0 if there is none.
    pub sidecar: u64,
    /// The archive, which is stored and downloaded.
    pub archive: u64,
}

/// Result of the stream of one layer, before anything is written.
struct Streamed {
    hasher: BlobHasher,
    parsed: Result<Parsed, ConvertLayerError>,
    /// The rest of the layer was not read.
    is_cut: bool,
}

struct Parsed {
    native: Option<NativeBuilder>,
    encoding: TargetEncoding,
    index: LayerIndex,
    tar_len: Bytes,
    applied: ApplyReport,
}

/// Positions of the layer's segments, if needed.
enum LayerIndex {
    None,
    Gzip(gzip::GzipIndex),
    Segments(segments::ScannedLayer),
}

/// Positions of the segments with the digest of each.
enum SealedIndex {
    None,
    Gzip(gzip::GzipIndex),
    Segments(segments::SegmentIndex),
}

impl LayerIndex {
    fn seal(self, hasher: BlobHasher) -> Result<SealedIndex, ConvertLayerError> {
        Ok(match (self, hasher) {
            (Self::Gzip(mut index), BlobHasher::Gzip(hasher)) => {
                hasher.finish(&mut index)?;
                SealedIndex::Gzip(index)
            }
            (Self::Segments(scanned), BlobHasher::Segments(hasher)) => {
                SealedIndex::Segments(scanned.with_digests(hasher)?)
            }
            // An empty blob has no piece that decides which hasher it needs.
            (Self::Segments(scanned), BlobHasher::Whole(..)) if scanned.segments.is_empty() => {
                SealedIndex::Segments(scanned.with_digests(segments::SegmentHasher::new())?)
            }
            _ => SealedIndex::None,
        })
    }
}

/// Reads `blob`, applies it to `tree` and makes a `TurboOCI` layer of the changes.
///
/// # Errors
/// [`ConvertLayerError`]; `tree` and `image` are then partly changed and must be dropped.
pub fn build_layer(
    blob: Box<dyn Read + Send>,
    descriptor: &Descriptor,
    tree: &mut Tree,
    image: &mut Image,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<BuiltLayer, ConvertLayerError> {
    let wanted = WantedForms { turbo: true, native: None };
    let converted = convert_layer(blob, descriptor, wanted, tree, image, options, progress)?;
    let lost = || ConvertLayerError::Read(std::io::Error::other("no TurboOCI layer was made"));
    converted.turbo.ok_or_else(lost) // it is present unless the pass has failed
}

/// Reads `blob`, applies it to `tree` and makes a native layer of the changes.
///
/// # Errors
/// The errors of [`build_layer`].
pub fn build_native_layer(
    blob: Box<dyn Read + Send>,
    descriptor: &Descriptor,
    wanted: WantedForms,
    tree: &mut Tree,
    image: &mut Image,
    options: &ConvertOptions,
) -> Result<(Option<BuiltLayer>, Option<NativeBlob>), ConvertLayerError> {
    let converted = convert_layer(blob, descriptor, wanted, tree, image, options, &super::Silent)?;
    Ok((converted.turbo, converted.native.map(Hashing::done).transpose()?))
}

/// Reads `blob`, applies it to `tree` and makes the requested results of the changes.
pub(super) fn convert_layer(
    blob: Box<dyn Read + Send>,
    descriptor: &Descriptor,
    wanted: WantedForms,
    tree: &mut Tree,
    image: &mut Image,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Converted, ConvertLayerError> {
    progress.start(&descriptor.digest, descriptor.size);
    let builder = match wanted.native {
        Some(layer) => Some(NativeBuilder::begin(layer, options.work_dir.as_deref())?),
        None => None,
    };
    let parser = LayerParser::new(tree, builder, wanted.turbo, options);
    let streamed = stream(blob, descriptor, parser, progress)?;
    let (got, got_size) = streamed.hasher.whole();
    if !streamed.is_cut && (got != descriptor.digest || got_size != descriptor.size) {
        return Err(ConvertLayerError::Mismatch { got, got_size, want_size: descriptor.size });
    }
    let mut parsed = streamed.parsed?;
    let index = std::mem::replace(&mut parsed.index, LayerIndex::None).seal(streamed.hasher)?;
    let tar_len = parsed.tar_len.get();
    let blocks = image.commit_layer(tree)?;
    let native = match parsed.native.take() {
        Some(builder) => Some(builder.finish(&blocks)?.hash()?),
        None => None,
    };
    let turbo = if wanted.turbo {
        Some(write_archive(&write_fs_meta(&blocks, options)?, parsed, &index, descriptor)?)
    } else {
        None
    };
    progress.finish(&descriptor.digest);
    Ok(Converted { turbo, native, tar_len })
}

/// Runs the three threads over the blob.
fn stream(
    blob: Box<dyn Read + Send>,
    descriptor: &Descriptor,
    parser: LayerParser<'_>,
    progress: &dyn Progress,
) -> Result<Streamed, ConvertLayerError> {
    let (piece_tx, piece_rx) = bounded(PIECES_AHEAD);
    let (hash_tx, hash_rx) = bounded(PIECES_AHEAD);
    thread::scope(|scope| {
        let reader = scope.spawn(move || read_pieces(blob, &piece_tx));
        let hasher = scope.spawn(move || hash_pieces(&hash_rx));
        let (parsed, is_cut) = parse_pieces(&piece_rx, &hash_tx, descriptor, parser, progress);
        drop((piece_rx, hash_tx)); // ends the other two threads, also if parsing failed
        let lost = |_| {
            ConvertLayerError::Read(std::io::Error::other("a thread of the conversion ended early"))
        };
        reader.join().map_err(lost)?.map_err(ConvertLayerError::Read)?;
        let hasher = hasher.join().map_err(lost)?;
        Ok(Streamed { hasher, parsed, is_cut })
    })
}

/// Thread 1: reads the blob in pieces.
fn read_pieces(mut blob: Box<dyn Read + Send>, pieces: &Sender<Piece>) -> std::io::Result<()> {
    loop {
        let mut piece = BytesMut::zeroed(PIECE);
        let mut filled = 0;
        while filled < piece.len() {
            match blob.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let last = filled < piece.len();
        piece.truncate(filled);
        if filled > 0 && pieces.send(piece.freeze()).is_err() {
            return Ok(()); // the parser has ended, and its own error is reported
        }
        if last {
            return Ok(());
        }
    }
}

/// A piece that the scan has passed, and the boundaries that became final with it.
struct ScannedPiece {
    piece: Piece,
    cuts: Cuts,
}

/// Ends of segments.
enum Cuts {
    /// None: no index is needed.
    None,
    /// At these boundaries, in bits.
    Gzip(Vec<Boundary>),
    /// These are segments, and no later one begins before that byte.
    Segments(Vec<Range<u64>>, u64),
}

/// The SHA-256 of a blob, and of its segments if needed. Hashing of segments keeps the pieces until the next
/// boundary, so a blob without boundaries must not be hashed that way.
enum BlobHasher {
    Gzip(gzip::GzipSegmentHasher),
    Segments(segments::SegmentHasher),
    Whole(Sha256, u64),
}

impl BlobHasher {
    fn new(cuts: &Cuts) -> Self {
        match cuts {
            Cuts::Gzip(_) => Self::Gzip(gzip::GzipSegmentHasher::new()),
            Cuts::Segments(..) => Self::Segments(segments::SegmentHasher::new()),
            Cuts::None => Self::Whole(Sha256::new(), 0),
        }
    }

    /// Digest and length in bytes.
    fn whole(&self) -> (Digest, u64) {
        match self {
            Self::Gzip(hasher) => hasher.whole(),
            Self::Segments(hasher) => hasher.whole(),
            Self::Whole(hasher, len) => (Digest::from_hasher(hasher.clone()), *len),
        }
    }

    fn push(&mut self, ScannedPiece { piece, cuts }: ScannedPiece) {
        match self {
            Self::Gzip(hasher) => {
                hasher.push(piece);
                if let Cuts::Gzip(boundaries) = cuts {
                    boundaries.into_iter().for_each(|boundary| hasher.boundary(boundary));
                }
            }
            Self::Segments(hasher) => {
                hasher.push(piece);
                if let Cuts::Segments(segments, keep_from) = cuts {
                    segments.iter().for_each(|range| hasher.segment(range));
                    hasher.forget_before(keep_from);
                }
            }
            Self::Whole(hasher, len) => {
                hasher.update(&piece);
                *len += piece.len() as u64;
            }
        }
    }
}

/// Thread 3: SHA-256 of the blob and of each segment.
fn hash_pieces(scanned: &Receiver<ScannedPiece>) -> BlobHasher {
    let mut hasher = None;
    for scanned in scanned {
        hasher.get_or_insert_with(|| BlobHasher::new(&scanned.cuts)).push(scanned);
    }
    hasher.unwrap_or_else(|| BlobHasher::new(&Cuts::None))
}

/// Most bytes that are read behind a failure of the parser. If the layer then has another digest than it should, that is the
/// reason to tell: the bytes were damaged on their way. More are not read: a layer of petabytes ends at the byte that is wrong.
const READ_ON: u64 = 64 << 20;

/// Thread 2, the caller's: scans, parses and applies a piece, then passes it on. With the result comes true if the rest of
/// the layer was not read.
fn parse_pieces(
    pieces: &Receiver<Piece>,
    hashed: &Sender<ScannedPiece>,
    descriptor: &Descriptor,
    mut parser: LayerParser<'_>,
    progress: &dyn Progress,
) -> (Result<Parsed, ConvertLayerError>, bool) {
    let mut failed = None;
    let mut left = descriptor.size;
    for piece in pieces {
        progress.advance(&descriptor.digest, piece.len() as u64);
        left = left.saturating_sub(piece.len() as u64);
        let mut cuts = Cuts::None;
        if failed.is_none() {
            match parser.feed(&piece) {
                Ok(()) => cuts = parser.take_cuts(),
                Err(error) if left > READ_ON => return (Err(error), true),
                Err(error) => failed = Some(error),
            }
        }
        let _ = hashed.send(ScannedPiece { piece, cuts }); // the receiver is gone only if it panicked, which join reports
    }
    let parsed = match failed {
        Some(error) => Err(error),
        None => parser.finish(),
    };
    (parsed, false)
}

/// Processes compressed pieces to entries in the tree, and to the native layer's data.
struct LayerParser<'t> {
    /// Decoder of the layer, once its first piece has arrived.
    scan: Option<Scan>,
    /// True if a `TurboOCI` layer is requested: then the segments are hashed.
    turbo: bool,
    span: Bytes,
    tar: tar::Parser,
    apply: LayerApply<'t>,
    native: Option<NativeBuilder>,
}

/// The scan of a layer, by its encoding.
enum Scan {
    Gzip(Box<gzip::Scanner>),
    Plain(PlainScanner),
    Zstd(Box<FramesScanner>),
}

impl Scan {
    /// Starts the scan of a layer that begins with `piece`.
    fn begin(piece: &[u8], span: Bytes) -> Result<Self, ConvertLayerError> {
        Ok(match detect(piece)? {
            TargetEncoding::Gzip => {
                Self::Gzip(Box::new(gzip::Scanner::new(gzip::ScanOptions { span })))
            }
            TargetEncoding::Plain => Self::Plain(PlainScanner::default()),
            TargetEncoding::Zstd => Self::Zstd(Box::new(FramesScanner::new(span)?)),
        })
    }

    fn feed(
        &mut self,
        piece: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), ConvertLayerError>,
    ) -> Result<(), ConvertLayerError> {
        match self {
            Self::Gzip(scanner) => scanner.feed(piece, sink),
            Self::Zstd(scanner) => scanner.feed(piece, sink),
            Self::Plain(scanner) => {
                scanner.feed(piece);
                sink(piece)
            }
        }
    }

    fn take_cuts(&mut self) -> Cuts {
        match self {
            Self::Gzip(scanner) => Cuts::Gzip(scanner.take_boundaries()),
            Self::Zstd(scanner) => {
                let segments = scanner.take_segments();
                Cuts::Segments(segments, scanner.keep_from())
            }
            Self::Plain(scanner) => Cuts::Segments(scanner.take_segments(), 0),
        }
    }

    fn finish(self) -> Result<(TargetEncoding, LayerIndex), ConvertLayerError> {
        Ok(match self {
            Self::Gzip(scanner) => (TargetEncoding::Gzip, LayerIndex::Gzip(scanner.finish()?)),
            Self::Zstd(scanner) => (TargetEncoding::Zstd, LayerIndex::Segments(scanner.finish()?)),
            Self::Plain(scanner) => (TargetEncoding::Plain, LayerIndex::Segments(scanner.finish())),
        })
    }
}

impl<'t> LayerParser<'t> {
    fn new(
        tree: &'t mut Tree,
        native: Option<NativeBuilder>,
        turbo: bool,
        options: &ConvertOptions,
    ) -> Self {
        Self {
            scan: None,
            turbo,
            // Without an index, checkpoints need not be found.
            span: if turbo { options.span } else { gzip::MAX_SPAN },
            tar: tar::Parser::with_data(),
            apply: LayerApply::new(tree),
            native,
        }
    }

    fn feed(&mut self, piece: &[u8]) -> Result<(), ConvertLayerError> {
        let (tar, apply, native) = (&mut self.tar, &mut self.apply, &mut self.native);
        let mut sink = |bytes: &[u8]| -> Result<(), ConvertLayerError> {
            tar.feed(bytes, &mut |event| match event {
                TarEvent::Entry(entry) => {
                    if let Some(native) = native {
                        native.start(entry.data_offset)?;
                    }
                    apply.entry(entry).map_err(ConvertLayerError::from)
                }
                TarEvent::Data(bytes) => {
                    apply.data(bytes);
                    native.as_mut().map_or(Ok(()), |native| native.data(bytes))
                }
            })
        };
        let scan = match &mut self.scan {
            Some(scan) => scan,
            none => none.insert(Scan::begin(piece, self.span)?),
        };
        scan.feed(piece, &mut sink)
    }

    /// Takes the cuts that became final, if the segments are hashed.
    fn take_cuts(&mut self) -> Cuts {
        self.scan.as_mut().filter(|_| self.turbo).map_or(Cuts::None, Scan::take_cuts)
    }

    fn finish(self) -> Result<Parsed, ConvertLayerError> {
        let scan = self.scan.unwrap_or_else(|| Scan::Plain(PlainScanner::default()));
        let (encoding, index) = scan.finish()?;
        let index = if self.turbo { index } else { LayerIndex::None };
        let tar_len = self.tar.finish()?;
        let applied = self.apply.finish()?;
        Ok(Parsed { native: self.native, encoding, index, tar_len, applied })
    }
}

/// The compression of a layer by its first bytes (media types can be wrong: spec turbooci 3.5).
fn detect(piece: &[u8]) -> Result<TargetEncoding, ConvertLayerError> {
    match piece {
        [0x1f, 0x8b, ..] => Ok(TargetEncoding::Gzip),
        _ if zstandard::is_zstd(piece) => Ok(TargetEncoding::Zstd),
        [b'B', b'Z', b'h', ..] => Err(ConvertLayerError::Compression("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err(ConvertLayerError::Compression("xz")),
        _ => Ok(TargetEncoding::Plain),
    }
}

/// The changes of a layer, as a `ZFile` of a warp LSMT layer (spec turbooci 3.4).
fn write_fs_meta(
    blocks: &LayerBlocks,
    options: &ConvertOptions,
) -> Result<Vec<u8>, ConvertLayerError> {
    let mut writer = WarpWriter::new(options.disk_size)?;
    for run in blocks.runs() {
        match run {
            LayerRun::Metadata { lba, bytes } => writer.metadata(lba, bytes)?,
            LayerRun::Remote { lba, count, target } => writer.remote(lba, count, target)?,
            LayerRun::Zeroed { lba, count } => writer.zeroed(lba, count)?,
        }
    }
    let mut lsmt = Vec::new();
    writer.finish(&mut lsmt)?;
    let mut writer = zfile::ZFileWriter::new(Cursor::new(Vec::new()), FS_META_ZFILE)?;
    writer.write_all(&lsmt).map_err(zfile::ZFileError::from)?;
    Ok(writer.finish()?.0.into_inner())
}

/// Options of the `ZFile` around the metadata. zstd in 32 KiB blocks takes little more than half of
/// upstream's LZ4 in 4 KiB blocks, upstream's readers accept both, and this program decodes it whole at
/// attach anyway. Above level 6 the size falls little: level 19 saves another 4 % and takes longer than all
/// the rest of a layer.
const FS_META_ZFILE: zfile::Options =
    zfile::Options { algo: zfile::Algo::Zstd, level: 6, block_size: 32 << 10, verify: true };

/// Packs the members into the blob that a registry stores (spec turbooci 3.1).
fn write_archive(
    fs_meta: &[u8],
    parsed: Parsed,
    index: &SealedIndex,
    descriptor: &Descriptor,
) -> Result<BuiltLayer, ConvertLayerError> {
    let (gzip_meta, sidecar) = match index {
        SealedIndex::Gzip(index) => {
            // Without a gzip.meta upstream refuses the layer when it opens it; with an incomplete one it
            // would return zeros.
            let gzip_meta = gzip::ddgzidx::write(index).ok();
            let sidecar = Sidecar::write(index, descriptor.digest, gzip_meta.is_some())?;
            (gzip_meta, Some(sidecar))
        }
        SealedIndex::Segments(index) => (None, Some(segments::sidecar::write(index))),
        SealedIndex::None => (None, None),
    };
    let mut members: Vec<(&str, &[u8])> = vec![(FS_META_NAME, fs_meta), (MARKER_NAME, b"")];
    if let Some(bytes) = &gzip_meta {
        members.push((GZIP_META_NAME, bytes));
    }
    if let Some(bytes) = &sidecar {
        members.push((SIDECAR_NAME, bytes));
    }
    let mut tar = Vec::new();
    tar::archive::Archive::write(&mut tar, &members).map_err(ConvertLayerError::Read)?;
    let archive = gzip_bytes(&tar);
    let len = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
    Ok(BuiltLayer {
        diff_id: Digest::of(&tar),
        target: parsed.encoding,
        sizes: LayerSizes {
            blob: descriptor.size,
            tar: parsed.tar_len.get(),
            fs_meta: fs_meta.len() as u64,
            gzip_meta: len(&gzip_meta),
            sidecar: len(&sidecar),
            archive: archive.len() as u64,
        },
        archive,
        applied: parsed.applied,
    })
}

/// gzip without name and time, by a pinned encoder: equal input gives an equal digest.
fn gzip_bytes(bytes: &[u8]) -> Vec<u8> {
    let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
    let mut out = vec![0; compressor.gzip_compress_bound(bytes.len())];
    // The encoder guarantees this bound; an empty archive would be refused by every reader.
    let len = compressor.gzip_compress(bytes, &mut out).unwrap_or(0);
    out.truncate(len);
    out
}
