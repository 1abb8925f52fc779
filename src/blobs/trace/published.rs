//! Traces that travel with an image.
//!
//! A first start without a trace fetches more than it needs and requests it too late. The recording of one
//! host avoids that for every other: a trace is pushed as a *referrer* of the image's manifest (OCI 1.1), so
//! that the image, its digest and its tags stay unchanged, and a registry that copies or deletes the image
//! does the same with its trace. It is one blob in the [format](formats::trace) of this project under a
//! manifest of the artifact type [`ARTIFACT_TYPE`], in the form that old clients of registries can create
//! too.
//!
//! There may be several traces, because a client cannot replace a referrer in a registry. The newest counts,
//! by the annotation that OCI defines for the time.
//!
//! A trace names blobs and decoded bytes, so a trace of the plain image serves its meta image too, for any
//! span.

use jiff::Timestamp;
use thiserror::Error;

use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest, Document, Manifest, ManifestError};
use formats::trace::{MAX_FILE, Trace, TraceError};
use registry::store::{ImageStore, Selector, StoreError, StoredManifest, referrers};

/// `artifactType` of the manifest, and media type of its one layer.
pub const ARTIFACT_TYPE: &str = "application/vnd.turbobd.trace.v1";

/// Time of the publication, in RFC 3339 (OCI image specification, "Pre-Defined Annotation Keys").
const CREATED: &str = "org.opencontainers.image.created";

/// Content of the config that stands for no config (OCI image specification, "Guidance for an Empty
/// Descriptor").
const EMPTY: &[u8] = b"{}";

/// Number of the newest traces that are tried: broken ones are skipped, but only so many.
const TRIED: usize = 3;

/// Reasons to skip a published trace.
#[derive(Debug, Error)]
enum Unusable {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("Its manifest is an index")]
    Index,
    #[error("Its manifest has {0} blobs instead of one")]
    Blobs(usize),
    #[error("Its blob is of the type {0:?}")]
    Type(String),
    #[error("Its blob has {0} bytes, more than the limit of {MAX_FILE}")]
    Large(u64),
}

/// Result of a publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// It is published now.
    Now,
    /// The newest published trace is equal.
    Before,
}

/// Pushes `trace` beside the manifest `subject` of `store`, with the time `now`; the blob first, so that a
/// visible trace is always complete.
///
/// # Errors
/// Returns [`StoreError`]; the image then has no new referrer.
pub fn publish(
    store: &dyn ImageStore,
    subject: &StoredManifest,
    trace: &Trace,
    now: Timestamp,
) -> Result<Published, StoreError> {
    let bytes = trace.to_bytes();
    let layer = Descriptor::of(ARTIFACT_TYPE, &bytes);
    let known = entries(store, &subject.digest)?;
    if known.first().is_some_and(|newest| layer_of(store, newest).is_ok_and(|known| known == layer))
    {
        return Ok(Published::Before);
    }
    store.put_blob(&bytes)?;
    store.put_blob(EMPTY)?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.to_owned()),
        artifact_type: Some(ARTIFACT_TYPE.to_owned()),
        config: Descriptor::of(media::OCI_EMPTY, EMPTY),
        layers: vec![layer],
        subject: Some(Descriptor::of(&subject.media_type, &subject.bytes)),
        annotations: [(CREATED.to_owned(), now.to_string())].into(),
        other: serde_json::Map::new(),
    };
    let bytes = manifest.to_bytes();
    store.put_manifest(None, media::OCI_MANIFEST, &bytes)?;
    let mut entry = Descriptor::of(media::OCI_MANIFEST, &bytes);
    entry.artifact_type = manifest.artifact_type;
    entry.annotations = manifest.annotations;
    referrers::add(store, &subject.digest, entry, is_trace)?;
    Ok(Published::Now)
}

/// The newest readable trace that refers to the manifest `subject` of `store`.
///
/// # Errors
/// Returns [`StoreError`] when the store cannot list the referrers of the manifest.
pub fn find(store: &dyn ImageStore, subject: &Digest) -> Result<Option<Trace>, StoreError> {
    let entries = entries(store, subject)?;
    Ok(entries.iter().take(TRIED).find_map(|entry| {
        read(store, entry)
            .inspect_err(|error| {
                let error = error as &dyn std::error::Error;
                tracing::warn!(trace = %entry.digest, error, "A published trace is skipped");
            })
            .ok()
    }))
}

fn is_trace(entry: &Descriptor) -> bool {
    entry.artifact_type.as_deref() == Some(ARTIFACT_TYPE)
}

/// The manifests of traces, the newest first.
fn entries(store: &dyn ImageStore, subject: &Digest) -> Result<Vec<Descriptor>, StoreError> {
    let mut entries = referrers::list(store, subject)?;
    entries.retain(is_trace);
    let created = |entry: &Descriptor| {
        entry.annotations.get(CREATED).and_then(|time| time.parse::<Timestamp>().ok())
    };
    entries.sort_by_key(|entry| std::cmp::Reverse((created(entry), entry.digest)));
    Ok(entries)
}

fn read(store: &dyn ImageStore, entry: &Descriptor) -> Result<Trace, Unusable> {
    Ok(Trace::parse(&store.read_blob(&layer_of(store, entry)?)?)?)
}

/// The blob with the trace.
fn layer_of(store: &dyn ImageStore, entry: &Descriptor) -> Result<Descriptor, Unusable> {
    let stored = store.manifest(&Selector::Digest(entry.digest))?;
    let Document::Manifest(manifest) = Document::parse(&stored.bytes, Some(&stored.media_type))?
    else {
        return Err(Unusable::Index);
    };
    match &manifest.layers[..] {
        [layer] if layer.media_type != ARTIFACT_TYPE => {
            Err(Unusable::Type(layer.media_type.clone()))
        }
        [layer] if layer.size > MAX_FILE as u64 => Err(Unusable::Large(layer.size)),
        [layer] => Ok(layer.clone()),
        layers => Err(Unusable::Blobs(layers.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use formats::oci::ImageIndex;
    use formats::trace::Touch;
    use registry::testing::{FaultyStore, MemoryStore};

    fn trace(start: u64) -> Trace {
        let touches = vec![Touch { blob: 0, start, len: 4096, at: 0, weight: 1 }];
        Trace { starts: 1, blobs: vec![Digest::of(b"a layer")], touches }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A store with an image's manifest.
    fn image() -> (MemoryStore, StoredManifest) {
        let store = MemoryStore::default();
        let bytes = br#"{"schemaVersion":2}"#.to_vec();
        store.put_manifest(None, media::OCI_MANIFEST, &bytes).unwrap();
        let media_type = media::OCI_MANIFEST.to_owned();
        (store, StoredManifest { media_type, digest: Digest::of(&bytes), bytes })
    }

    fn listed(store: &MemoryStore, subject: &StoredManifest) -> Vec<Descriptor> {
        referrers::list(store, &subject.digest).unwrap()
    }

    #[test]
    fn the_newest_is_found_the_same_is_not_pushed_twice_and_what_others_say_stays() {
        let (store, image) = image();
        assert_eq!(find(&store, &image.digest).unwrap(), None);
        let mut signature = Descriptor::of(media::OCI_MANIFEST, b"a signature");
        signature.artifact_type = Some("application/vnd.example.signature".to_owned());
        referrers::add(&store, &image.digest, signature.clone(), |_| false).unwrap();

        let publish = |start, second| publish(&store, &image, &trace(start), at(second)).unwrap();
        assert_eq!(publish(0, 100), Published::Now);
        assert_eq!(publish(0, 200), Published::Before);
        assert_eq!(find(&store, &image.digest).unwrap(), Some(trace(0)));
        assert_eq!(publish(4096, 300), Published::Now);
        assert_eq!(find(&store, &image.digest).unwrap(), Some(trace(4096)));
        // In a store where this code keeps the list, the old trace is removed from it.
        let listed = listed(&store, &image);
        assert_eq!((listed.len(), &listed[0]), (2, &signature));
    }

    #[test]
    fn of_several_that_a_registry_lists_the_newest_that_can_be_read_counts() {
        let (store, image) = image();
        let mut all = Vec::new();
        for second in [30, 1, 200, 5] {
            publish(&store, &image, &trace(second * 4096), at(second as i64)).unwrap();
            all.extend(listed(&store, &image));
        }
        let fake = |layers: Vec<Descriptor>, second| {
            let manifest = Manifest {
                schema_version: 2,
                media_type: None,
                artifact_type: Some(ARTIFACT_TYPE.to_owned()),
                config: Descriptor::of(media::OCI_EMPTY, EMPTY),
                layers,
                subject: None,
                annotations: [(CREATED.to_owned(), at(second).to_string())].into(),
                other: serde_json::Map::new(),
            };
            store.put_manifest(None, media::OCI_MANIFEST, &manifest.to_bytes()).unwrap();
            let mut entry = Descriptor::of(media::OCI_MANIFEST, &manifest.to_bytes());
            (entry.artifact_type, entry.annotations) =
                (manifest.artifact_type, manifest.annotations);
            entry
        };
        let list = |entries: &[Descriptor]| {
            let tag = referrers::fallback_tag(&image.digest);
            let index = ImageIndex::of(entries.to_vec()).to_bytes();
            store.put_manifest(Some(&tag), media::OCI_INDEX, &index).unwrap();
        };
        store.put_blob(b"no trace").unwrap();
        let large = Descriptor::new(ARTIFACT_TYPE, Digest::of(b"large"), MAX_FILE as u64 + 1);
        all.push(fake(vec![Descriptor::of(ARTIFACT_TYPE, b"no trace")], 900));
        all.push(fake(vec![large], 800));
        list(&all);
        assert_eq!(find(&store, &image.digest).unwrap(), Some(trace(200 * 4096)));
        // A flood of entries in the list has only one effect: no trace is found.
        all.push(fake(Vec::new(), 700));
        list(&all);
        assert_eq!(find(&store, &image.digest).unwrap(), None);
    }

    #[test]
    fn a_publication_that_fails_at_any_call_leaves_the_trace_of_before() {
        let mut failed = 0;
        for call in 0.. {
            let (store, image) = image();
            publish(&store, &image, &trace(0), at(1)).unwrap();
            let store = FaultyStore::failing(store, Some(call));
            let result = publish(&store, &image, &trace(4096), at(2));
            // A failure to read the trace of before is passed over: the new one is published in any case.
            let expected = if result.is_ok() { trace(4096) } else { trace(0) };
            let published = find(store.inner(), &image.digest).unwrap();
            assert_eq!(published, Some(expected), "after a failure of call {call}");
            failed += usize::from(result.is_err());
            if store.calls() <= call {
                break;
            }
        }
        assert!(failed >= 5, "two lists, two blobs, a manifest and the list of after: {failed}");
    }

    #[test]
    fn one_of_unknown_age_is_the_oldest() {
        let (store, image) = image();
        publish(&store, &image, &trace(0), at(1)).unwrap();
        let mut first = listed(&store, &image);
        publish(&store, &image, &trace(4096), at(2)).unwrap();
        let mut second = listed(&store, &image);
        second[0].annotations.clear();
        first.append(&mut second);
        let index = ImageIndex::of(first).to_bytes();
        let tag = referrers::fallback_tag(&image.digest);
        store.put_manifest(Some(&tag), media::OCI_INDEX, &index).unwrap();
        assert_eq!(find(&store, &image.digest).unwrap(), Some(trace(0)));
    }
}
