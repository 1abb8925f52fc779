//! What refers to a manifest: OCI 1.1's list of *referrers*.
//!
//! A registry that knows the list keeps it by itself, from the `subject` of each manifest that it takes. For one
//! that does not, and for a layout directory, clients keep it, as an index under the tag `sha256-<digest>` of
//! the subject (distribution specification, "Unavailable Referrers API").

use super::{ImageStore, StoreError};
use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest, Document, Index};

/// The descriptors of the manifests that refer to `subject`; none where there is no list.
///
/// # Errors
/// [`StoreError`] when the store cannot say.
pub fn list(store: &dyn ImageStore, subject: &Digest) -> Result<Vec<Descriptor>, StoreError> {
    let listed = store.referrers(subject)?;
    let index =
        listed.and_then(|listed| match Document::parse(&listed.bytes, Some(&listed.media_type)) {
            Ok(Document::Index(index)) => Some(index.manifests),
            _ => None,
        });
    Ok(index.unwrap_or_default())
}

/// Lists `entry`, the descriptor of a manifest that was put into the store and names `subject`, unless the store
/// does so itself. What it `replaces` is then listed no more.
///
/// # Errors
/// [`StoreError`]; the list is then as it was.
pub fn add(
    store: &dyn ImageStore,
    subject: &Digest,
    entry: Descriptor,
    replaces: impl Fn(&Descriptor) -> bool,
) -> Result<(), StoreError> {
    let mut entries = list(store, subject)?;
    if entries.iter().any(|other| other.digest == entry.digest) {
        return Ok(());
    }
    entries.retain(|other| !replaces(other));
    entries.push(entry);
    let index = Index::of(entries).to_bytes();
    store.put_manifest(Some(&fallback_tag(subject)), media::OCI_INDEX, &index)
}

/// The tag under which the list stands where nobody else keeps it.
#[must_use]
pub fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}
