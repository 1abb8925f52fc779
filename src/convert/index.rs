//! Images of many platforms, skipped entries, and publishing.
//!
//! A multi-platform index is converted entry by entry, including nested indexes. Each entry keeps all its
//! fields except digest, size and media type. Attestations describe the original's bytes and would be wrong
//! for the result, so they are skipped, as upstream does (spec turbooci 2).
//!
//! Publishing goes from the leaves up: layers, config, manifest, index, and the tag last. So a visible tag
//! always names a complete image.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;

use super::image::{ConvertedFormats, ConvertedImage, LayerReport, convert_image, subject};
use super::{ConvertError, ConvertOptions, ImageFormat, KnownLayers, Progress};
use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest, Document, ImageIndex};
use registry::store::{ImageStore, Selector, StoredManifest};

/// Result of a conversion that was published.
#[derive(Debug, serde::Serialize)]
pub struct Conversion {
    /// Digest of the published manifest or index: of the TurboOCI image if there is one.
    pub digest: Digest,
    /// Digest of the native image's manifest or index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<Digest>,
    /// The images below it.
    pub images: Vec<ConvertedPlatform>,
}

/// One image of a conversion.
#[derive(Debug, serde::Serialize)]
pub struct ConvertedPlatform {
    /// Platform such as `linux/arm64`, or `-` if the index names none.
    pub platform: String,
    /// Its layers, bottom first.
    pub layers: Vec<LayerReport>,
}

/// Tags of the results. A form without a tag is built and not published.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tags<'a> {
    /// Tag of the TurboOCI image.
    pub turbo: Option<&'a str>,
    /// Tag of the native image.
    pub native: Option<&'a str>,
}

impl Tags<'_> {
    fn of(&self, format: ImageFormat) -> Option<&str> {
        match format {
            ImageFormat::Turbo => self.turbo,
            ImageFormat::Native => self.native,
        }
    }
}

/// Converts the image of `selector` in `store` to the forms in `options`, and publishes it in `into` under
/// `tags`. Without a tag it is not published, and the digest is the one that it would have.
///
/// # Errors
/// [`ConvertError`]. An image is published only after everything was built.
pub fn convert(
    store: &dyn ImageStore,
    selector: &Selector,
    into: &dyn ImageStore,
    tags: Tags<'_>,
    options: &ConvertOptions,
    known: &KnownLayers,
    progress: &dyn Progress,
) -> Result<Conversion, ConvertError> {
    let root = plan(store, store.manifest(selector)?)?;
    let built = build(store, &root, options, known, progress)?;
    let mut images = Vec::new();
    collect_reports(&root, &built, &mut images);
    let (mut turbo, mut native) = (Vec::new(), Vec::new());
    for formats in built {
        turbo.push(formats.turbo);
        native.push(formats.native);
    }
    let mut digests = Vec::new();
    for format in options.formats() {
        let mut built =
            std::mem::take(if format == ImageFormat::Turbo { &mut turbo } else { &mut native });
        let target = tags.of(format).map(|_| into);
        let (media_type, bytes) = assemble(&root, &mut built, format, options, target)?;
        if let Some(tag) = tags.of(format) {
            into.put_manifest(Some(tag), &media_type, &bytes)?;
        }
        digests.push((format, Digest::of(&bytes)));
    }
    let nothing = || ConvertError::Manifest {
        what: "Manifest",
        digest: root.source().digest,
        reason: "no form of image was requested".into(),
    };
    let native = digests.iter().find(|(format, _)| *format == ImageFormat::Native);
    Ok(Conversion {
        digest: digests.first().ok_or_else(nothing)?.1,
        native: native.map(|&(_, digest)| digest),
        images,
    })
}

/// The images below a manifest or index, in order.
enum ImageNode {
    Image { source: StoredManifest, platform: String, number: usize },
    Index { source: StoredManifest, index: Box<ImageIndex>, children: Vec<(Descriptor, ImageNode)> },
}

impl ImageNode {
    fn source(&self) -> &StoredManifest {
        match self {
            ImageNode::Image { source, .. } | ImageNode::Index { source, .. } => source,
        }
    }
}

/// Reads the whole hierarchy.
fn plan(store: &dyn ImageStore, root: StoredManifest) -> Result<ImageNode, ConvertError> {
    plan_node(store, root, "-", &mut 0, 0)
}

/// Greatest depth of nested indexes that is accepted. A cycle is impossible because of the digests; a long
/// chain is possible.
const MAX_DEPTH: usize = 8;

fn plan_node(
    store: &dyn ImageStore,
    source: StoredManifest,
    platform: &str,
    count: &mut usize,
    depth: usize,
) -> Result<ImageNode, ConvertError> {
    let broken =
        |reason: String| ConvertError::Manifest { what: "Index", digest: source.digest, reason };
    let index = match Document::parse(&source.bytes, Some(&source.media_type)) {
        Ok(Document::Index(index)) => index,
        Ok(Document::Manifest(_)) => {
            *count += 1;
            return Ok(ImageNode::Image {
                source,
                platform: platform.to_owned(),
                number: *count - 1,
            });
        }
        Err(error) => return Err(broken(error.to_string())),
    };
    if depth == MAX_DEPTH {
        return Err(broken(format!("indexes are nested more than {MAX_DEPTH} deep")));
    }
    let mut children = Vec::new();
    for entry in index.images() {
        let child = store.manifest(&Selector::Digest(entry.digest))?;
        let platform = entry.platform.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        children.push((entry.clone(), plan_node(store, child, &platform, count, depth + 1)?));
    }
    if children.is_empty() {
        return Err(broken("it lists no image".into()));
    }
    Ok(ImageNode::Index { source, index: Box::new(index), children })
}

/// Converts all images of the plan, several at a time.
fn build(
    store: &dyn ImageStore,
    root: &ImageNode,
    options: &ConvertOptions,
    known: &KnownLayers,
    progress: &dyn Progress,
) -> Result<Vec<ConvertedFormats>, ConvertError> {
    let mut sources = Vec::new();
    collect_images(root, &mut sources);
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Result<ConvertedFormats, ConvertError>>>> =
        Mutex::new(sources.iter().map(|_| None).collect());
    thread::scope(|scope| {
        for _ in 0..options.concurrency.clamp(1, sources.len()) {
            scope.spawn(|| {
                while let Some((number, source)) = {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    sources.get(number).map(|source| (number, source))
                } {
                    let result = convert_image(store, source, options, known, progress);
                    if result.is_err() {
                        next.store(sources.len(), Ordering::Relaxed);
                    }
                    results.lock()[number] = Some(result);
                }
            });
        }
    });
    let results = results.into_inner();
    // A result is missing only if another one failed, and that error is returned here.
    results.into_iter().flatten().collect()
}

fn collect_images<'n>(node: &'n ImageNode, sources: &mut Vec<&'n StoredManifest>) {
    match node {
        ImageNode::Image { source, .. } => sources.push(source),
        ImageNode::Index { children, .. } => {
            children.iter().for_each(|(_, child)| collect_images(child, sources));
        }
    }
}

/// Reports of each image, in order.
fn collect_reports(
    node: &ImageNode,
    built: &[ConvertedFormats],
    images: &mut Vec<ConvertedPlatform>,
) {
    match node {
        ImageNode::Image { platform, number, .. } => {
            let layers = built.get(*number).map_or_else(Vec::new, |built| built.report.clone());
            images.push(ConvertedPlatform { platform: platform.clone(), layers });
        }
        ImageNode::Index { children, .. } => {
            children.iter().for_each(|(_, child)| collect_reports(child, built, images));
        }
    }
}

/// Media type and bytes of a node's converted manifest, after all nodes below it were stored in `into`.
fn assemble(
    node: &ImageNode,
    built: &mut [Option<ConvertedImage>],
    format: ImageFormat,
    options: &ConvertOptions,
    into: Option<&dyn ImageStore>,
) -> Result<(String, Vec<u8>), ConvertError> {
    match node {
        ImageNode::Image { source, number, .. } => {
            let lost = || ConvertError::Manifest {
                what: "Manifest",
                digest: source.digest,
                reason: "its conversion was stopped because another one failed".into(),
            };
            let image = built.get_mut(*number).and_then(Option::take).ok_or_else(lost)?;
            if let Some(into) = into {
                image.put_blobs(into)?;
            }
            Ok((image.media_type.to_owned(), image.manifest))
        }
        ImageNode::Index { source, index, children } => {
            let mut manifests = Vec::new();
            for (entry, child) in children {
                let (media_type, bytes) = assemble(child, built, format, options, into)?;
                if let Some(into) = into {
                    into.put_manifest(None, &media_type, &bytes)?;
                }
                let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
                manifests.push(Descriptor { media_type, digest, size, ..entry.clone() });
            }
            let index = ImageIndex { manifests, ..converted_index(source, index, format, options) };
            Ok((index.media_type().to_owned(), index.to_bytes()))
        }
    }
}

/// The index without its entries. Other fields stay; the media type stays too, unless OCI types are
/// requested.
fn converted_index(
    source: &StoredManifest,
    index: &ImageIndex,
    format: ImageFormat,
    options: &ConvertOptions,
) -> ImageIndex {
    let mut index = index.clone();
    if options.oci_types || options.referrer {
        index.media_type = Some(media::OCI_INDEX.to_owned());
    }
    if options.referrer {
        index.artifact_type = Some(format.artifact_type().to_owned());
        index.subject = Some(subject(source));
    }
    index
}
