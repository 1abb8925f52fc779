//! One committed or sealed layer: header, trailer, index (spec lsmt 3, 5 and 9).

use std::fmt;
use std::str::FromStr;

use super::mapping::{ENTRY, Mapping};
use super::{FIRST_SECTOR, LsmtError, MAX_ENTRIES, RECORD};
use crate::units::{Bytes, SECTOR};
use source::{ByteSource, Reserved};

/// "LSMT", 0, 1, 2, 0, then a fixed UUID.
pub const MAGIC: [u8; 24] = [
    0x4c, 0x53, 0x4d, 0x54, 0x00, 0x01, 0x02, 0x00, 0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08, 0x4c,
    0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
];

/// Set in the record at the beginning, clear in the one at the end.
pub const FLAG_HEADER: u32 = 1;
/// A data file, not an index log.
pub const FLAG_DATA: u32 = 1 << 1;
/// Complete. In a file sealed in place, only the trailer has this flag.
pub const FLAG_SEALED: u32 = 1 << 2;

/// Largest virtual disk: an index entry must be able to hold the number of every sector.
const MAX_VIRTUAL_SIZE: u64 = super::mapping::LBA_LIMIT * SECTOR;

/// Index bytes read at a time.
const INDEX_STEP: u64 = 1 << 20;

/// A layer's identity. It is advisory: upstream never checks it when it opens an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// No identity: the parent of a layer without a parent.
    pub const NULL: Self = Self([0; 16]);
}

impl fmt::Display for Uuid {
    /// 36 characters, in upper case like upstream's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02X}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.as_bytes();
        if text.len() != 36 {
            return Err(());
        }
        let mut digits = [0_u8; 32];
        let mut filled = 0;
        for (at, &byte) in text.iter().enumerate() {
            if matches!(at, 8 | 13 | 18 | 23) {
                if byte != b'-' {
                    return Err(());
                }
                continue;
            }
            digits[filled] = char::from(byte).to_digit(16).ok_or(())? as u8;
            filled += 1;
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(bytes))
    }
}

/// Bytes of memory for an entry of an index: the mapping, and up to two extents with their first sectors once it is merged
/// with the indexes of other layers, which can cut it.
const ENTRY_MEMORY: u64 = size_of::<Mapping>() as u64 + 2 * 24;

/// Meaning of a layer's tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagMeaning {
    /// All data is in the layer; tags have no meaning (`overlaybd-merge` leaves some).
    Plain,
    /// TurboOCI: tag 0 is the layer's own metadata, 1 the original layer's uncompressed tar.
    Warp,
}

/// A header or trailer, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LsmtHeader {
    /// The flag bits.
    pub flags: u32,
    /// First byte of the index; has a meaning only in a trailer.
    pub index_offset: u64,
    /// Entries of the index, padding included; has a meaning only in a trailer.
    pub index_size: u64,
    /// Bytes of the virtual disk; 0 for the size given by the layer below.
    pub virtual_size: u64,
    /// Identity of this layer.
    pub uuid: Uuid,
    /// Identity of the layer below.
    pub parent: Uuid,
    /// The commit message, without trailing NULs.
    pub user_tag: Vec<u8>,
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl LsmtHeader {
    /// Reads a header or trailer.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn parse(bytes: &[u8; RECORD as usize]) -> Result<Self, &'static str> {
        if bytes[..24] != MAGIC {
            return Err("its first 24 bytes are not the magic");
        }
        // Upstream logs an identity that it cannot parse and continues without one.
        let uuid = |at: usize| {
            std::str::from_utf8(&bytes[at..at + 36])
                .ok()
                .and_then(|text| text.parse().ok())
                .unwrap_or(Uuid::NULL)
        };
        let tag = &bytes[134..390];
        let tag_len = tag.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let mut flags = [0; 4];
        flags.copy_from_slice(&bytes[28..32]);
        Ok(Self {
            flags: u32::from_le_bytes(flags),
            index_offset: le64(bytes, 32),
            index_size: le64(bytes, 40),
            virtual_size: le64(bytes, 48),
            uuid: uuid(56),
            parent: uuid(93),
            user_tag: tag[..tag_len].to_vec(),
        })
    }

    /// The 4096 bytes. A user tag is truncated to 256 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; RECORD as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(24, &390_u32.to_le_bytes());
        put(28, &self.flags.to_le_bytes());
        put(32, &self.index_offset.to_le_bytes());
        put(40, &self.index_size.to_le_bytes());
        put(48, &self.virtual_size.to_le_bytes());
        put(56, self.uuid.to_string().as_bytes());
        put(93, self.parent.to_string().as_bytes());
        put(132, &[1, 1]); // version 1.1
        put(134, &self.user_tag[..self.user_tag.len().min(256)]);
        bytes
    }
}

/// An opened layer without its payload.
#[derive(Clone, Debug)]
pub struct LsmtLayer {
    name: String,
    kind: TagMeaning,
    trailer: LsmtHeader,
    mappings: Vec<Mapping>,
}

impl LsmtLayer {
    /// Reads and checks the header, trailer and index of an LSMT stream, whose length must be exact.
    ///
    /// # Errors
    /// [`LsmtError`] with the record or the index entry and the broken rule.
    pub fn open(source: &dyn ByteSource, kind: TagMeaning) -> Result<Self, LsmtError> {
        Self::open_within(source, kind, &mut Reserved::unbounded())
    }

    /// As [`open`](Self::open), with the memory of the index, alone and merged with those of other layers, added to
    /// `part` before it is taken.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`LsmtError::Budget`].
    pub fn open_within(
        source: &dyn ByteSource,
        kind: TagMeaning,
        part: &mut Reserved,
    ) -> Result<Self, LsmtError> {
        let trailer = read_trailer(source)?;
        let index = trailer.index_size.saturating_mul(ENTRY_MEMORY);
        part.add(index, &format!("The index of {}", source.name()))?;
        let mappings = read_index(source, kind, &trailer)?;
        let layer = Self { name: source.name().to_owned(), kind, trailer, mappings };
        layer.check_mappings()?;
        Ok(layer)
    }

    /// A layer whose index is not in its file, because the layer still changes.
    ///
    /// # Errors
    /// [`LsmtError::Entry`].
    pub fn of_mappings(
        name: String,
        trailer: LsmtHeader,
        mappings: Vec<Mapping>,
    ) -> Result<Self, LsmtError> {
        let layer = Self { name, kind: TagMeaning::Plain, trailer, mappings };
        layer.check_mappings()?;
        Ok(layer)
    }

    /// A layer with the size of the disk and no mappings.
    #[must_use]
    pub fn emptied(self) -> Self {
        Self { mappings: Vec::new(), ..self }
    }

    /// Name of the layer in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Meaning of its tags.
    #[must_use]
    pub fn kind(&self) -> TagMeaning {
        self.kind
    }

    /// The trailer: identity and positions.
    #[must_use]
    pub fn trailer(&self) -> &LsmtHeader {
        &self.trailer
    }

    /// Size of the disk by this layer, or 0.
    #[must_use]
    pub fn virtual_size(&self) -> Bytes {
        Bytes(self.trailer.virtual_size)
    }

    /// One past the last payload byte of the LSMT stream.
    #[must_use]
    pub fn payload_end(&self) -> Bytes {
        Bytes(self.trailer.index_offset)
    }

    /// The index: ascending, without overlap, padding dropped, tags normalised to 0 and 1.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Checks order and bounds of all entries (upstream `index.cpp:create_memory_index` and `within`).
    fn check_mappings(&self) -> Result<(), LsmtError> {
        let limit = self.payload_end().sector();
        let mut free = 0;
        for (entry, mapping) in self.mappings.iter().enumerate() {
            // Upstream never checks the position of a zeroed run of a warp layer, nor remote runs. The end of
            // a remote run is known only together with its target, so the disk checks it.
            let bounded = match self.kind {
                TagMeaning::Plain => true,
                TagMeaning::Warp => mapping.tag == 0 && !mapping.zeroed,
            };
            let rule = if mapping.len == 0 {
                "it has no sectors"
            } else if mapping.lba.0 < free {
                "it begins before the end of the previous entry"
            } else if bounded && (mapping.moffset < FIRST_SECTOR || mapping.moffset_end() > limit) {
                "it points outside the layer's payload"
            } else if mapping.tag > 1 {
                "its tag names neither of the two files"
            } else {
                free = mapping.end().0;
                continue;
            };
            return Err(LsmtError::Entry {
                name: self.name.clone(),
                entry: entry as u64,
                mapping: *mapping,
                rule,
            });
        }
        Ok(())
    }
}

/// Reads header and trailer; only the trailer is used (spec lsmt 2).
fn read_trailer(source: &dyn ByteSource) -> Result<LsmtHeader, LsmtError> {
    let name = source.name();
    let record = |part, offset, rule: &str| LsmtError::Record {
        name: name.to_owned(),
        part,
        offset,
        rule: rule.to_owned(),
    };
    let len = source.len();
    if len < 2 * RECORD {
        return Err(record("Header", 0, "a layer has at least 8192 bytes"));
    }
    let mut bytes = [0; RECORD as usize];
    source.read_exact_at(&mut bytes, 0)?;
    let header = LsmtHeader::parse(&bytes).map_err(|rule| record("Header", 0, rule))?;
    if header.flags & (FLAG_HEADER | FLAG_DATA) != FLAG_HEADER | FLAG_DATA {
        return Err(record("Header", 0, "its flags are not those of a data file's header"));
    }
    let at = len - RECORD;
    source.read_exact_at(&mut bytes, at)?;
    let trailer = LsmtHeader::parse(&bytes).map_err(|rule| record("Trailer", at, rule))?;
    if trailer.flags & (FLAG_HEADER | FLAG_DATA | FLAG_SEALED) != FLAG_DATA | FLAG_SEALED {
        return Err(record(
            "Trailer",
            at,
            "its flags are not those of a sealed data file's trailer",
        ));
    }
    if trailer.index_size > MAX_ENTRIES {
        let rule = format!("{} index entries are more than {MAX_ENTRIES}", trailer.index_size);
        return Err(record("Trailer", at, &rule));
    }
    let end = trailer.index_offset.checked_add(trailer.index_size * ENTRY);
    if trailer.index_offset < RECORD || end.is_none_or(|end| end > at) {
        let (from, size) = (trailer.index_offset, trailer.index_size);
        let rule = format!(
            "an index of {size} entries at byte {from} does not lie between header and trailer"
        );
        return Err(record("Trailer", at, &rule));
    }
    if trailer.virtual_size > MAX_VIRTUAL_SIZE {
        let rule = format!("a virtual disk cannot have {} bytes", trailer.virtual_size);
        return Err(record("Trailer", at, &rule));
    }
    Ok(trailer)
}

/// Reads the index without padding. Its size was checked against the file.
fn read_index(
    source: &dyn ByteSource,
    kind: TagMeaning,
    trailer: &LsmtHeader,
) -> Result<Vec<Mapping>, LsmtError> {
    let mut left = trailer.index_size * ENTRY;
    let mut at = trailer.index_offset;
    let mut mappings = Vec::with_capacity(trailer.index_size as usize);
    let mut step = vec![0; INDEX_STEP.min(left) as usize];
    while left > 0 {
        let bytes = &mut step[..INDEX_STEP.min(left) as usize];
        source.read_exact_at(bytes, at)?;
        mappings.extend(
            bytes
                .as_chunks::<{ ENTRY as usize }>()
                .0
                .iter()
                .filter_map(|&entry| Mapping::decode(entry)),
        );
        at += bytes.len() as u64;
        left -= bytes.len() as u64;
    }
    // Tags count from the smallest in the file: each writer uses its own number (spec lsmt 9).
    let lowest = mappings.iter().map(|mapping| mapping.tag).min().unwrap_or(0);
    for mapping in &mut mappings {
        mapping.tag = match kind {
            TagMeaning::Plain => 0,
            TagMeaning::Warp => mapping.tag - lowest,
        };
    }
    Ok(mappings)
}
