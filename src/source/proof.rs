//! What proves the bytes of chunks.

/// What decides that the decoded bytes of a blob's chunks are right.
///
/// A digest that an image *names* proves nothing about a chunk: a chunk is read by range, so the whole blob is not
/// hashed. Bytes are shared between images only by a proof that each image brings itself, and never by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Proof {
    /// A table with a SHA-256 of the encoded bytes of each chunk, and everything else that decides its decoded bytes:
    /// its position, its length, its window. This is the SHA-256 of the table. Two blobs with one table have the same
    /// chunks, whatever their names.
    Table([u8; 32]),
    /// An index without such checksums: it only says where chunks lie. This is its SHA-256.
    Index([u8; 32]),
    /// Nothing: the chunks are pieces of one size.
    Nothing,
}

impl Proof {
    /// True if each chunk is proved before it is used.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Table(_))
    }
}
