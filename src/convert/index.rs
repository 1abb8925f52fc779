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

use serde_json::{Value, json};

use super::image::{ConvertedImage, LayerReport, convert_image, subject};
use super::{ConvertError, ConvertOptions, Progress};
use crate::oci::{Descriptor, Digest, annotations, media_type};
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
    let (media_type, bytes) = assemble(&root, built, options, &mut images, &mut |item| match (tag, item) {
        (None, _) => Ok(()),
        (Some(_), Item::Blob(bytes)) => Ok(into.put_blob(bytes)?),
        (Some(_), Item::Manifest(media_type, bytes)) => Ok(into.put_manifest(None, media_type, bytes)?),
    })?;
    if let Some(tag) = tag {
        into.put_manifest(Some(tag), &media_type, &bytes)?;
    }
    Ok(Conversion { digest: Digest::of(&bytes), images })
}

/// The images below a manifest or index, in order.
enum Node {
    Image { source: StoredManifest, platform: String, number: usize },
    Index { source: StoredManifest, entries: Vec<(Value, Node)> },
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
    let broken = |reason: String| ConvertError::Manifest { what: "Index", digest: source.digest, reason };
    if !media_type::is_index(&source.media_type) {
        *count += 1;
        return Ok(Node::Image { source, platform: platform.to_owned(), number: *count - 1 });
    }
    if depth == MAX_DEPTH {
        return Err(broken(format!("indexes are nested more than {MAX_DEPTH} deep")));
    }
    let index: Value = serde_json::from_slice(&source.bytes).map_err(|error| broken(error.to_string()))?;
    let listed = index.get("manifests").and_then(Value::as_array).ok_or_else(|| broken("it lists no manifests".into()))?;
    let mut entries = Vec::new();
    for entry in listed {
        let descriptor: Descriptor =
            serde_json::from_value(entry.clone()).map_err(|error| broken(error.to_string()))?;
        if annotations::is_attestation(&descriptor) {
            continue;
        }
        let child = store.manifest(&Selector::Digest(descriptor.digest))?;
        let platform = descriptor.platform.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        entries.push((entry.clone(), plan_node(store, child, &platform, count, depth + 1)?));
    }
    if entries.is_empty() {
        return Err(broken("it lists no image".into()));
    }
    Ok(Node::Index { source, entries })
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
        Node::Index { entries, .. } => entries.iter().for_each(|(_, child)| collect_images(child, sources)),
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
        Node::Index { source, entries } => {
            let mut list = Vec::new();
            for (entry, child) in entries {
                let (media_type, bytes) = assemble_node(child, built, options, images, store)?;
                store(Item::Manifest(&media_type, &bytes))?;
                let mut entry = entry.clone();
                entry["mediaType"] = json!(media_type);
                entry["digest"] = json!(Digest::of(&bytes).to_string());
                entry["size"] = json!(bytes.len());
                list.push(entry);
            }
            write_index(source, list, options)
        }
    }
}

/// The index with its entries replaced: other fields stay, the media type too unless OCI types are asked for.
fn write_index(
    source: &StoredManifest,
    entries: Vec<Value>,
    options: &ConvertOptions,
) -> Result<(String, Vec<u8>), ConvertError> {
    let mut index: Value = serde_json::from_slice(&source.bytes).map_err(|error| ConvertError::Manifest {
        what: "Index",
        digest: source.digest,
        reason: error.to_string(),
    })?;
    let oci = options.oci_types || options.referrer;
    let media_type = if oci { media_type::OCI_INDEX } else { source.media_type.as_str() };
    index["mediaType"] = json!(media_type);
    index["manifests"] = Value::Array(entries);
    if options.referrer {
        index["artifactType"] = json!(annotations::ARTIFACT_TYPE_TURBO);
        index["subject"] = subject(source);
    }
    Ok((media_type.to_owned(), index.to_string().into_bytes()))
}
