//! The name under which chunks are shared: what proves them, or who answers for them.
//!
//! Two images share chunks, in memory and on disk, only if both bring the same table of checksums: then each would
//! accept exactly the same bytes ([`Proof::Table`]). Where there is no such table, an image believes its origin: the
//! repository, with the user and the trust by which it is reached. Such chunks are shared between images of one origin,
//! and with none of another, whatever digest they name; until the background fill has fetched the whole blob, and its
//! bytes have the digest that they are named by.

use formats::oci::Digest;
use source::Proof;
use source::chunk::ChunkSource;

/// What verifies the chunks of a blob, for people.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verification {
    /// What verifies a chunk before it is used.
    pub verified_by: VerifiedBy,
    /// What images must have in common to share the chunks: the table of checksums, by its digest; or the origin.
    pub shared_by: String,
}

/// What verifies a chunk before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifiedBy {
    /// The SHA-256 of its encoded bytes, in a table that the image brings.
    Table,
    /// The digest of the whole blob, after it was fetched to its end.
    Blob,
    /// A checksum beside its bytes: it finds damage, and proves nothing.
    Checksum,
    /// Nothing: it decodes, if it is encoded at all.
    Nothing,
}

impl VerifiedBy {
    /// Its name in listings and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Blob => "blob",
            Self::Checksum => "checksum",
            Self::Nothing => "nothing",
        }
    }
}

impl Verification {
    /// What verifies the chunks of `source`.
    #[must_use]
    pub fn of(source: &dyn ChunkSource) -> Self {
        if let Proof::Table(table) = source.proof() {
            let shared_by = Digest(table).to_string();
            return Self { verified_by: VerifiedBy::Table, shared_by };
        }
        // A source with checksums refuses bytes that cannot be a chunk; one without has no opinion.
        let checked = source.chunk_count() > 0
            && (source.verify(0, &[]).is_some() || source.verify_decoded(0, &[]).is_some());
        let verified_by = if checked { VerifiedBy::Checksum } else { VerifiedBy::Nothing };
        Self { verified_by, shared_by: source.blob().origin().name }
    }
}

/// The digest of the whole blob that `id` claims.
pub(crate) fn claimed(id: &str) -> Option<Digest> {
    id.find("sha256:").and_then(|at| id.get(at..at + 71)?.parse().ok())
}

/// Name on the disk of the chunks of a whole blob that was read from end to end and has the digest that it is named by.
/// `None` for a blob that brings a table, and for one without a digest.
pub(crate) fn of_whole(source: &dyn ChunkSource) -> Option<String> {
    let index = match source.proof() {
        Proof::Table(_) => return None,
        Proof::Index(index) => Digest(index).hex(),
        Proof::Nothing => String::new(),
    };
    let (id, _) = (source.id(), claimed(source.id())?);
    Some(format!("{id}={}", Digest::of(format!("whole\n{index}").as_bytes()).hex()))
}

/// The names of a blob's chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlobIdentity {
    /// In this process.
    pub(crate) here: String,
    /// On the disk, where it is the same after a restart.
    pub(crate) lasting: String,
}

impl BlobIdentity {
    /// The names of the chunks of `source`.
    pub(crate) fn of(source: &dyn ChunkSource) -> Self {
        let (id, origin) = (source.id(), source.blob().origin());
        let index = match source.proof() {
            Proof::Table(table) => {
                let lasting = format!("{id}@{}", Digest(table).hex());
                return Self { here: lasting.clone(), lasting };
            }
            Proof::Index(index) => Digest(index).hex(),
            Proof::Nothing => String::new(),
        };
        let claim = Digest::of(format!("{index}\n{}", origin.name).as_bytes());
        let lasting = format!("{id}~{}", claim.hex());
        // The name of an origin holds no secret, so that it may stand on the disk; its client does.
        Self { here: format!("{lasting}~{}", origin.client), lasting }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Arc;

    use super::*;
    use source::chunk::{ChunkError, ChunkSpan, EncodedChunk, EncodedRange};
    use source::{ByteSource, MemorySource, Origin, SourceError};

    /// Bytes of an origin.
    struct OriginAlone(Origin);

    impl ByteSource for OriginAlone {
        fn name(&self) -> &'static str {
            "told"
        }
        fn len(&self) -> u64 {
            0
        }
        fn read_exact_at(&self, _: &mut [u8], _: u64) -> Result<(), SourceError> {
            Ok(())
        }
        fn origin(&self) -> Origin {
            self.0.clone()
        }
    }

    /// A blob with a proof.
    struct Proved(Proof, Arc<dyn ByteSource>);

    impl ChunkSource for Proved {
        fn id(&self) -> &'static str {
            "sha256:5#x"
        }
        fn proof(&self) -> Proof {
            self.0
        }
        fn decoded_len(&self) -> u64 {
            0
        }
        fn chunk_count(&self) -> u32 {
            0
        }
        fn chunk_at(&self, _: u64) -> Option<ChunkSpan> {
            None
        }
        fn blob(&self) -> &Arc<dyn ByteSource> {
            &self.1
        }
        fn encoded(&self, _: u32) -> Result<EncodedRange, ChunkError> {
            Ok(EncodedRange { range: 0..0, head: 0, tail: 0 })
        }
        fn room(&self, _: u32) -> usize {
            0
        }
        fn decode(
            &self,
            _: u32,
            _: &mut EncodedChunk,
            _: &mut [u8],
        ) -> Result<Range<usize>, ChunkError> {
            Ok(0..0)
        }
    }

    fn of(proof: Proof, name: &str, client: u64) -> BlobIdentity {
        let origin = Origin { name: name.to_owned(), client };
        BlobIdentity::of(&Proved(proof, Arc::new(OriginAlone(origin))))
    }

    #[test]
    fn a_table_is_shared_by_all_and_another_table_by_none() {
        let table = |byte| Proof::Table([byte; 32]);
        assert_eq!(of(table(1), "a", 1), of(table(1), "b", 2));
        assert_ne!(of(table(1), "a", 1).here, of(table(2), "a", 1).here);
        assert_ne!(of(table(1), "a", 1).lasting, of(table(2), "a", 1).lasting);
    }

    #[test]
    fn what_nothing_proves_is_shared_within_its_origin_only() {
        for proof in [Proof::Index([1; 32]), Proof::Nothing] {
            assert_eq!(of(proof, "a", 1), of(proof, "a", 1));
            assert_ne!(of(proof, "a", 1).lasting, of(proof, "b", 1).lasting);
            let (one, other) = (of(proof, "a", 1), of(proof, "a", 2));
            assert_ne!(one.here, other.here, "another secret");
            assert_eq!(one.lasting, other.lasting);
            // A claim never looks like a proof.
            assert_ne!(one.lasting, of(Proof::Table([1; 32]), "a", 1).lasting);
        }
        assert_ne!(
            of(Proof::Index([1; 32]), "a", 1).lasting,
            of(Proof::Index([2; 32]), "a", 1).lasting
        );
        let memory = Arc::new(MemorySource::new("m", vec![]));
        assert_eq!(memory.origin().name, "m");
    }
}
