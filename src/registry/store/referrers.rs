//! Manifests that refer to a manifest: OCI 1.1's list of *referrers*.
//!
//! A registry that supports the list keeps it by itself, from the `subject` of each manifest that it
//! receives. For a registry that does not, and for a layout directory, clients keep the list, as an index
//! under the tag `sha256-<digest>` of the subject (distribution specification, "Unavailable Referrers API").

use super::{ImageStore, StoreError};
use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest, Document, ImageIndex};

/// The descriptors of the manifests that refer to `subject`; empty if there is no list.
///
/// # Errors
/// Returns [`StoreError`] when the store cannot answer.
pub fn list(store: &dyn ImageStore, subject: &Digest) -> Result<Vec<Descriptor>, StoreError> {
    let listed = store.referrers(subject)?;
    let index =
        listed.and_then(|listed| match Document::parse(&listed.bytes, Some(&listed.media_type)) {
            Ok(Document::Index(index)) => Some(index.manifests),
            _ => None,
        });
    Ok(index.unwrap_or_default())
}

/// Adds `entry` to the list, unless the store does so itself. `entry` is the descriptor of a manifest that
/// was put into the store and names `subject`. The manifests that it `replaces` are removed from the list.
///
/// # Errors
/// Returns [`StoreError`]; the list is then unchanged.
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
    let index = ImageIndex::of(entries).to_bytes();
    store.put_manifest(Some(&fallback_tag(subject)), media::OCI_INDEX, &index)
}

/// Tag of the list in a store that does not keep the list itself.
#[must_use]
pub fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}
