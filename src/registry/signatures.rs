//! Signatures of manifests by keys that the operator lists: cosign's key pairs, in both forms that cosign writes.
//!
//! A signature says that the owner of a key vouches for the manifest of one digest. cosign stores it beside the
//! image, in the same repository, and where depends on its version:
//!
//! | | version 2 | version 3 |
//! |---|---|---|
//! | where | tag `sha256-<digest>.sig` | a referrer of the manifest: by the registry's list, or under the fallback tag |
//! | layer | the signed text; its annotation has the signature | a *bundle*: envelope with text and signature |
//! | signed text | "simple signing": `critical.image.docker-manifest-digest` | in-toto statement: `subject[].digest.sha256` |
//!
//! What is signed must name this manifest's digest *and* say that it is a signature: the same keys sign statements
//! of other kinds, and "this image failed its test" is signed by the same hand. Names of repositories are not
//! compared (version 3 has none): the digest already names one manifest wherever it lies, and a mirrored image keeps
//! its signatures. Transparency logs are not asked.
//!
//! All of it comes from the registry and is bounded: [`MOST`] candidates are examined, each of [`TEXT_LIMIT`] bytes
//! at most. Text is parsed only after its signature has been verified, except for the base64 around it. A flood of
//! false candidates can hide a right one, which has the effect of no signature.
//!
//! * [`key`]       one public key: PEM file, verification
//! * `statement`   what a signed text must say

pub mod key;
mod statement;

use std::fmt;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use crate::store::{ImageStore, Selector, StoredManifest, referrers};
use formats::oci::{Descriptor, Digest, Document, Manifest};
pub use key::{KeyError, PublicKey};

/// Most signatures of one manifest that are examined, of either form. Images are signed by a few parties; each
/// candidate costs one or two requests.
const MOST: usize = 32;

/// Most bytes of a signed text or a bundle, 256 KiB. cosign writes 300 bytes and 660; a bundle with certificates and
/// proofs of a log has some ten KiB.
const TEXT_LIMIT: u64 = 256 << 10;

/// Media type of the signed text of version 2.
const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

/// Annotation with the signature of a layer of version 2.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// Artifact type of the manifest, and media type of the layer, of version 3.
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// The keys whose signatures count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signers(Vec<PublicKey>);

/// A signature that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// The signed manifest or index.
    pub digest: Digest,
    /// File of the key.
    pub key: PathBuf,
}

impl fmt::Display for Signed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "signed by {}", self.key.display())
    }
}

impl Signers {
    /// Reads the public keys in these PEM files.
    ///
    /// # Errors
    /// [`KeyError`] with the first file that cannot be used.
    pub fn load(files: &[PathBuf]) -> Result<Self, KeyError> {
        let keys = files.iter().map(|file| PublicKey::load(file)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self(keys))
    }

    /// True if no key is listed: then no signature counts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first good signature of a document of `store` by one of these keys. Without keys the store is not asked.
    /// What cannot be read is no signature.
    #[must_use]
    pub fn find(&self, store: &dyn ImageStore, digest: &Digest) -> Option<Signed> {
        if self.is_empty() {
            return None;
        }
        let key = self.simple(store, digest).or_else(|| self.bundled(store, digest))?;
        Some(Signed { digest: *digest, key: key.file().to_owned() })
    }

    /// Looks for the form of version 2.
    fn simple(&self, store: &dyn ImageStore, digest: &Digest) -> Option<&PublicKey> {
        let stored = store.manifest(&Selector::Tag(signature_tag(digest))).ok()?;
        let manifest = manifest_of(&stored)?;
        manifest.layers.iter().take(MOST).find_map(|layer| {
            let signature = layer.annotations.get(SIGNATURE)?;
            if layer.media_type != SIMPLE_SIGNING {
                return None;
            }
            let signature = BASE64.decode(signature).ok()?;
            let text = small_blob(store, layer)?;
            let key = self.verified_by(&text, &signature)?;
            statement::simple_names(&text, digest).then_some(key)
        })
    }

    /// Looks for the form of version 3. Entries are chosen by their artifact type and by the manifest: under the fallback
    /// tag, cosign's own entry has no annotations.
    fn bundled(&self, store: &dyn ImageStore, digest: &Digest) -> Option<&PublicKey> {
        let listed = referrers::list(store, digest).ok()?;
        let bundles =
            listed.iter().filter(|entry| entry.artifact_type.as_deref() == Some(BUNDLE)).take(MOST);
        bundles
            .filter_map(|entry| store.manifest(&Selector::Digest(entry.digest)).ok())
            .filter_map(|stored| manifest_of(&stored))
            .filter_map(|manifest| manifest.layers.into_iter().next())
            .filter(|layer| layer.media_type == BUNDLE)
            .find_map(|layer| self.of_bundle(&small_blob(store, &layer)?, digest))
    }

    /// The key that signed the statement of a bundle about this digest.
    fn of_bundle(&self, bundle: &[u8], digest: &Digest) -> Option<&PublicKey> {
        let Envelope { payload, payload_type, signatures } =
            serde_json::from_slice::<Bundle>(bundle).ok()?.dsse_envelope;
        let payload = BASE64.decode(payload).ok()?;
        let signed = statement::pre_authentication_encoding(&payload_type, &payload);
        let key = signatures.iter().take(MOST).find_map(|signature| {
            self.verified_by(&signed, &BASE64.decode(&signature.sig).ok()?)
        })?;
        statement::in_toto_names(&payload_type, &payload, digest).then_some(key)
    }

    fn verified_by(&self, text: &[u8], signature: &[u8]) -> Option<&PublicKey> {
        self.0.iter().find(|key| key.verifies(text, signature))
    }
}

/// The tag of version 2.
fn signature_tag(digest: &Digest) -> String {
    format!("{}.sig", referrers::fallback_tag(digest))
}

fn manifest_of(stored: &StoredManifest) -> Option<Manifest> {
    match Document::parse(&stored.bytes, Some(&stored.media_type)).ok()? {
        Document::Manifest(manifest) => Some(manifest),
        Document::Index(_) => None,
    }
}

/// Reads a blob that may be a signature.
fn small_blob(store: &dyn ImageStore, blob: &Descriptor) -> Option<Vec<u8>> {
    if blob.size > TEXT_LIMIT { None } else { store.read_blob(blob).ok() }
}

/// A bundle of version 3, as far as it is needed. Its hint of a key is not: all keys are tried.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    dsse_envelope: Envelope,
}

/// The signed envelope (DSSE).
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Deserialize)]
struct EnvelopeSignature {
    sig: String,
}

#[cfg(test)]
mod tests;
