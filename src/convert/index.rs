//! Many platforms; what is passed over; publishing.
//!
//! A multi-platform index is converted entry by entry, nested indexes too. Each entry keeps all its
//! fields but digest, size and media type. Attestations describe the original's bytes and would be
//! wrong for the result, so they are passed over, as upstream does (spec turbooci 2).
//!
//! Publishing goes from the leaves up: layers, config, manifest, index, and the tag last. Whoever
//! sees the tag sees a whole image.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::image::{ConvertedImage, LayerReport, convert_image, subject};
use super::{ConvertError, ConvertOptions, Progress};
use crate::oci::manifest::media;
use crate::oci::{Descriptor, Digest, Document, Index, annotations};
use crate::store::{ImageStore, Selector, StoredManifest};

/// What was converted and published.
#[derive(Debug, serde::Serialize)]
pub struct Conversion {
    /// Digest of the published manifest or index.
    pub digest: Digest,
    /// The images below it.
    pub images: Vec<ConvertedPlatform>,
}

/// One image of a conversion.
#[derive(Debug, serde::Serialize)]
pub struct ConvertedPlatform {
    /// As in `linux/arm64`, or `-` when the index names none.
    pub platform: String,
    /// Its layers, bottom first.
    pub layers: Vec<LayerReport>,
}

/// Converts what `selector` names in `store` and publishes it in `into` as `tag`; without a tag
/// nothing is published and the digest is what it would be.
///
/// # Errors
/// [`ConvertError`]; nothing is published unless everything was built.
pub fn convert(
    store: &dyn ImageStore,
    selector: &Selector,
    into: &dyn ImageStore,
    tag: Option<&str>,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Conversion, ConvertError> {
    let root = plan(store, store.manifest(selector)?)?;
    let built = build(store, &root, options, progress)?;
    let mut images = Vec::new();
    let (media_type, bytes) =
        assemble(&root, built, options, &mut images, &mut |item| match (tag, item) {
            (None, _) => Ok(()),
            (Some(_), Item::Blob(bytes)) => Ok(into.put_blob(bytes)?),
            (Some(_), Item::Manifest(media_type, bytes)) => {
                Ok(into.put_manifest(None, media_type, bytes)?)
            }
        })?;
    if let Some(tag) = tag {
        into.put_manifest(Some(tag), &media_type, &bytes)?;
    }
    Ok(Conversion { digest: Digest::of(&bytes), images })
}

/// The images below a manifest or index, in order.
enum Node {
    Image { source: StoredManifest, platform: String, number: usize },
    Index { source: StoredManifest, index: Box<Index>, children: Vec<(Descriptor, Node)> },
}

/// Reads the whole hierarchy.
fn plan(store: &dyn ImageStore, root: StoredManifest) -> Result<Node, ConvertError> {
    plan_node(store, root, "-", &mut 0, 0)
}

/// Depth of nested indexes that is believable; a cycle is impossible (digests), a chain is not.
const MAX_DEPTH: usize = 8;

fn plan_node(
    store: &dyn ImageStore,
    source: StoredManifest,
    platform: &str,
    count: &mut usize,
    depth: usize,
) -> Result<Node, ConvertError> {
    let broken =
        |reason: String| ConvertError::Manifest { what: "Index", digest: source.digest, reason };
    let index = match Document::parse(&source.bytes, Some(&source.media_type)) {
        Ok(Document::Index(index)) => index,
        Ok(Document::Manifest(_)) => {
            *count += 1;
            return Ok(Node::Image { source, platform: platform.to_owned(), number: *count - 1 });
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
    Ok(Node::Index { source, index: Box::new(index), children })
}

/// Converts all images of the plan, several at a time.
fn build(
    store: &dyn ImageStore,
    root: &Node,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Vec<ConvertedImage>, ConvertError> {
    let mut sources = Vec::new();
    collect_images(root, &mut sources);
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Result<ConvertedImage, ConvertError>>>> =
        Mutex::new(sources.iter().map(|_| None).collect());
    thread::scope(|scope| {
        for _ in 0..options.concurrency.clamp(1, sources.len()) {
            scope.spawn(|| {
                while let Some((number, source)) = {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    sources.get(number).map(|source| (number, source))
                } {
                    let result = convert_image(store, source, options, progress);
                    if result.is_err() {
                        next.store(sources.len(), Ordering::Relaxed);
                    }
                    if let Ok(mut results) = results.lock() {
                        results[number] = Some(result);
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    // One that was not begun is missing only because another failed, and that error is returned here.
    results.into_iter().flatten().collect()
}

fn collect_images<'n>(node: &'n Node, sources: &mut Vec<&'n StoredManifest>) {
    match node {
        Node::Image { source, .. } => sources.push(source),
        Node::Index { children, .. } => {
            children.iter().for_each(|(_, child)| collect_images(child, sources));
        }
    }
}

/// Something to store, children before parents.
enum Item<'a> {
    Blob(&'a [u8]),
    Manifest(&'a str, &'a [u8]),
}

/// Media type and bytes of a node's converted manifest, after everything below it was stored.
fn assemble(
    node: &Node,
    built: Vec<ConvertedImage>,
    options: &ConvertOptions,
    images: &mut Vec<ConvertedPlatform>,
    store: &mut dyn FnMut(Item<'_>) -> Result<(), ConvertError>,
) -> Result<(String, Vec<u8>), ConvertError> {
    let mut built: Vec<Option<ConvertedImage>> = built.into_iter().map(Some).collect();
    assemble_node(node, &mut built, options, images, store)
}

fn assemble_node(
    node: &Node,
    built: &mut [Option<ConvertedImage>],
    options: &ConvertOptions,
    images: &mut Vec<ConvertedPlatform>,
    store: &mut dyn FnMut(Item<'_>) -> Result<(), ConvertError>,
) -> Result<(String, Vec<u8>), ConvertError> {
    match node {
        Node::Image { source, platform, number } => {
            let lost = || ConvertError::Manifest {
                what: "Manifest",
                digest: source.digest,
                reason: "its conversion was abandoned after another one failed".into(),
            };
            let image = built.get_mut(*number).and_then(Option::take).ok_or_else(lost)?;
            for layer in &image.layers {
                store(Item::Blob(layer))?;
            }
            store(Item::Blob(&image.config))?;
            images.push(ConvertedPlatform { platform: platform.clone(), layers: image.report });
            Ok((image.media_type.to_owned(), image.manifest))
        }
        Node::Index { source, index, children } => {
            let mut manifests = Vec::new();
            for (entry, child) in children {
                let (media_type, bytes) = assemble_node(child, built, options, images, store)?;
                store(Item::Manifest(&media_type, &bytes))?;
                let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
                manifests.push(Descriptor { media_type, digest, size, ..entry.clone() });
            }
            let index = Index { manifests, ..converted_index(source, index, options) };
            Ok((index.media_type().to_owned(), index.to_bytes()))
        }
    }
}

/// The index but for its entries: other fields stay, the media type too unless OCI types are asked for.
fn converted_index(source: &StoredManifest, index: &Index, options: &ConvertOptions) -> Index {
    let mut index = index.clone();
    if options.oci_types || options.referrer {
        index.media_type = Some(media::OCI_INDEX.to_owned());
    }
    if options.referrer {
        index.artifact_type = Some(annotations::ARTIFACT_TYPE_TURBO.to_owned());
        index.subject = Some(subject(source));
    }
    index
}
