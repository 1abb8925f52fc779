//! The places where a meta image of a plain image may be.

use std::path::Path;
use std::sync::Arc;

use super::trust::{MetaPlace, NamedImage};
use super::{MetaOrigin, Plain, built};
use formats::oci::annotations::{ARTIFACT_TYPE_TURBO, LayerKind};
use formats::oci::{Descriptor, Digest, Document, Manifest, Platform};
use registry::signatures::{Signed, Signers};
use registry::store::referrers::{self, fallback_tag};
use registry::store::{ImageStore, LayoutStore, Selector, StoredManifest};

/// Usual suffixes of a tag for the converted form: those of upstream's documentation and of this program's.
pub const TAG_SUFFIXES: [&str; 3] = ["_turbo", "-turbo", "_obd"];

/// Most entries of a list that are examined, 16. An image has one meta image or a few; each entry costs a request, and
/// with keys two more, and the list comes from a registry.
const MOST_ENTRIES: usize = 16;

/// A meta image that fits the plain image, and what it needs to be used.
pub(super) struct MetaCandidate {
    pub(super) store: Arc<dyn ImageStore>,
    pub(super) stored: StoredManifest,
    pub(super) manifest: Manifest,
    pub(super) found: MetaOrigin,
    pub(super) named: NamedImage,
    pub(super) place: MetaPlace,
    /// Digests of the indexes that name it, the nearest last: a signature of one of them covers it.
    indexes: Vec<Digest>,
}

impl MetaCandidate {
    /// The signature of it, or of an index that names it.
    pub(super) fn signed(&self, signers: &Signers) -> Option<Signed> {
        std::iter::once(&self.stored.digest)
            .chain(self.indexes.iter().rev())
            .find_map(|digest| signers.find(&*self.store, digest))
    }
}

/// A place to look.
struct Looked<'p> {
    store: &'p Arc<dyn ImageStore>,
    found: MetaOrigin,
    named: NamedImage,
    place: MetaPlace,
}

/// The meta images that fit, the cheapest to find first. A place is searched when the ones before it are exhausted; one
/// that cannot be searched has none.
pub(super) fn candidates<'p>(
    plain: &'p Plain<'p>,
    local: &'p Path,
) -> impl Iterator<Item = MetaCandidate> + 'p {
    let named = if plain.pinned { NamedImage::Digest } else { NamedImage::Tag };
    in_local_store(plain, local)
        .into_iter()
        .chain(lazily(move || in_index(plain)))
        .chain(lazily(move || among_referrers(plain, named)))
        .chain(lazily(move || by_tag(plain, named)))
}

fn lazily<I: IntoIterator>(search: impl FnOnce() -> I) -> impl Iterator<Item = I::Item> {
    std::iter::once_with(search).flatten()
}

/// The meta image in the local store: the one that was built here, or else one that came there in another way.
pub(super) fn in_local_store(plain: &Plain<'_>, local: &Path) -> Option<MetaCandidate> {
    if !local.join("index.json").exists() {
        return None;
    }
    let store = LayoutStore::open(local)
        .inspect_err(|error| tracing::warn!(%error, "The local store is skipped"))
        .ok()?;
    let store: Arc<dyn ImageStore> = Arc::new(store);
    let named = if plain.pinned { NamedImage::Digest } else { NamedImage::Tag };
    let find = |selector: &Selector, place| {
        let stored = store.manifest(selector).ok()?;
        let looked = Looked { store: &store, found: MetaOrigin::Local, named, place };
        fitting(plain, &looked, stored, Vec::new())
    };
    let built = built::find(local, &plain.stored.digest);
    built
        .and_then(|meta| find(&Selector::Digest(meta), MetaPlace::Built))
        .or_else(|| find(&Selector::Tag(fallback_tag(&plain.stored.digest)), MetaPlace::Elsewhere))
}

/// Examines the entries of an index that have the artifact type of a meta image.
fn among<'p>(
    plain: &'p Plain<'p>,
    entries: Vec<Descriptor>,
    looked: Looked<'p>,
    indexes: &'p [Digest],
) -> impl Iterator<Item = MetaCandidate> + 'p {
    let turbo = entries.into_iter().filter(move |entry| {
        entry.artifact_type.as_deref() == Some(ARTIFACT_TYPE_TURBO)
            && entry.digest != plain.stored.digest
    });
    turbo
        .take(MOST_ENTRIES)
        .filter_map(move |entry| plain.store.manifest(&Selector::Digest(entry.digest)).ok())
        .filter_map(move |stored| fitting(plain, &looked, stored, indexes.to_vec()))
}

/// The index lists both: who names it by digest names the meta image too.
fn in_index<'p>(plain: &'p Plain<'p>) -> impl Iterator<Item = MetaCandidate> + 'p {
    let named = if plain.pinned { NamedImage::Meta } else { NamedImage::Tag };
    let entries = plain.index.map(|index| index.manifests.clone()).unwrap_or_default();
    let looked =
        Looked { store: plain.store, found: MetaOrigin::Index, named, place: MetaPlace::Beside };
    among(plain, entries, looked, plain.indexes)
}

fn among_referrers<'p>(
    plain: &'p Plain<'p>,
    named: NamedImage,
) -> impl Iterator<Item = MetaCandidate> + 'p {
    let listed = referrers::list(&**plain.store, &plain.stored.digest)
        .inspect_err(|error| tracing::debug!(%error, "The referrers cannot be listed"))
        .unwrap_or_default();
    let looked =
        Looked { store: plain.store, found: MetaOrigin::Referrer, named, place: MetaPlace::Beside };
    among(plain, listed, looked, &[])
}

fn by_tag<'p>(plain: &'p Plain<'p>, named: NamedImage) -> impl Iterator<Item = MetaCandidate> + 'p {
    plain.tag.into_iter().flat_map(move |tag| {
        TAG_SUFFIXES
            .iter()
            .filter_map(move |suffix| of_tag(plain, named, &format!("{tag}{suffix}")))
    })
}

fn of_tag(plain: &Plain<'_>, named: NamedImage, tag: &str) -> Option<MetaCandidate> {
    let mut stored = plain.store.manifest(&Selector::Tag(tag.to_owned())).ok()?;
    let mut indexes = Vec::new();
    if let Document::Index(index) = Document::parse(&stored.bytes, Some(&stored.media_type)).ok()? {
        indexes.push(stored.digest);
        let host = index.select(&Platform::host()).ok()?.digest;
        stored = plain.store.manifest(&Selector::Digest(host)).ok()?;
    }
    let looked =
        Looked { store: plain.store, found: MetaOrigin::Tag, named, place: MetaPlace::Beside };
    fitting(plain, &looked, stored, indexes)
}

/// A manifest as a meta image of `plain`, if it matches: its layers name the plain image's, all of them in their order.
fn fitting(
    plain: &Plain<'_>,
    looked: &Looked<'_>,
    stored: StoredManifest,
    indexes: Vec<Digest>,
) -> Option<MetaCandidate> {
    let manifest = fits(plain, &stored)?;
    let &Looked { store, found, named, place } = looked;
    Some(MetaCandidate { store: store.clone(), stored, manifest, found, named, place, indexes })
}

/// The manifest, if its layers are made of those of `plain`.
pub(super) fn fits(plain: &Plain<'_>, stored: &StoredManifest) -> Option<Manifest> {
    let Ok(Document::Manifest(manifest)) = Document::parse(&stored.bytes, Some(&stored.media_type))
    else {
        return None;
    };
    let targets = manifest.layers.iter().map(|layer| match LayerKind::of(layer) {
        Ok(LayerKind::Turbo { target, .. }) => Some(target),
        _ => None,
    });
    let fits = targets.eq(plain.manifest.layers.iter().map(|layer| Some(layer.digest)));
    fits.then_some(manifest)
}
