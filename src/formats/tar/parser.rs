//! The push parser: a state machine ([`ParserState`]).

use crate::tar::entry::{EntryKind, TarEntry};
use crate::tar::header::{Header, number, until_nul};
use crate::tar::join::{Current, Draft, Pending};
use crate::tar::pax::Records;
use crate::tar::sparse::{self, SparseKind};
use crate::tar::{BLOCK, TarError, shown};
use crate::units::Bytes;

/// Largest size of the pax records, the long name or the sparse map of one entry: 1 MiB. They are kept in
/// memory, and a header can claim any length. Go's reader, which containerd uses to unpack, has the same
/// limit.
pub const METADATA_LIMIT: u64 = 1 << 20;

/// An event that the parser reports.
#[derive(Debug)]
pub enum TarEvent<'a> {
    /// An entry; its data, if any, follows.
    Entry(TarEntry),
    /// A piece of the last entry's stored data: not empty, no padding. Reported only by a parser made with
    /// [`with_data`](Parser::with_data).
    Data(&'a [u8]),
}

/// Reads a tar that arrives in pieces.
///
/// After an error the parser must be dropped.
pub struct Parser {
    with_data: bool,
    /// Bytes fed so far.
    position: u64,
    state: ParserState,
    /// The block that is being collected, and the number of its bytes that are present.
    block: Box<[u8; BLOCK]>,
    filled: usize,
    /// pax records of `g` headers; they apply to all entries that follow.
    global: Records,
    pending: Pending,
    /// The entry (or extra entry) that is being read, for messages.
    current: Current,
}

/// Position of the parser in the tar's structure. The first group collects whole blocks.
enum ParserState {
    /// Before an entry or the end.
    Header,
    /// Behind one zero block.
    SecondZeroBlock,
    /// Behind the header of a hard link that claims this many bytes of data.
    LinkData(u64),
    /// In the extra blocks of an old sparse map.
    OldSparse(Box<Draft>, sparse::Pairs),
    /// In the sparse map at the start of the data; `.2` is the length of the map so far.
    LineMap(Box<Draft>, sparse::LineMap, u64),

    /// In the payload of an extra entry, with its kind and length.
    Payload(Extra, usize, Vec<u8>),
    /// In file data, with the number of bytes left.
    Data(u64),
    /// In bytes without meaning, with the number of bytes left.
    Padding(u64),
    /// Behind the end marker.
    End,
}

/// An entry that describes another.
#[derive(Clone, Copy)]
enum Extra {
    Local,
    Global,
    LongName,
    LongLink,
}

impl Extra {
    fn from_flag(flag: u8) -> Option<Self> {
        match flag {
            b'x' => Some(Self::Local),
            b'g' => Some(Self::Global),
            b'L' => Some(Self::LongName),
            b'K' => Some(Self::LongLink),
            _ => None,
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Local | Self::Global => "pax records",
            Self::LongName | Self::LongLink => "a long name",
        }
    }
}

type Callback<'c, E> = &'c mut dyn FnMut(TarEvent<'_>) -> Result<(), E>;

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// A parser at the start of a tar that reports only entries.
    #[must_use]
    pub fn new() -> Self {
        Self {
            with_data: false,
            position: 0,
            state: ParserState::Header,
            block: Box::new([0; BLOCK]),
            filled: 0,
            global: Records::default(),
            pending: Pending::default(),
            current: Current::default(),
        }
    }

    /// A parser that also reports file data.
    #[must_use]
    pub fn with_data() -> Self {
        Self { with_data: true, ..Self::new() }
    }

    /// Bytes fed so far.
    #[must_use]
    pub fn position(&self) -> Bytes {
        Bytes(self.position)
    }

    /// Takes the next bytes of the stream, in pieces of any size, and reports the events that they complete.
    ///
    /// # Errors
    /// [`TarError`] if the stream breaks a rule, or the error of `on`. After an error, no event is reported.
    pub fn feed<E: From<TarError>>(
        &mut self,
        mut bytes: &[u8],
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            let taken = match &mut self.state {
                ParserState::Data(left) | ParserState::Padding(left) => {
                    let taken = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= taken as u64;
                    let done = *left == 0;
                    let is_data = matches!(self.state, ParserState::Data(_));
                    if is_data && self.with_data {
                        on(TarEvent::Data(&bytes[..taken]))?;
                    }
                    self.position += taken as u64;
                    if done {
                        self.state =
                            if is_data { padding(self.position) } else { ParserState::Header };
                    }
                    bytes = &bytes[taken..];
                    continue;
                }
                ParserState::Payload(_, len, payload) => {
                    let taken = bytes.len().min(*len - payload.len());
                    payload.extend_from_slice(&bytes[..taken]);
                    taken
                }
                ParserState::End => match bytes.iter().position(|&byte| byte != 0) {
                    Some(at) => {
                        return Err(TarError::Trailing { offset: self.position + at as u64 }.into());
                    }
                    None => bytes.len(),
                },
                _ => {
                    let taken = bytes.len().min(BLOCK - self.filled);
                    self.block[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
                    self.filled += taken;
                    taken
                }
            };
            self.position += taken as u64;
            bytes = &bytes[taken..];
            if self.filled == BLOCK {
                self.filled = 0;
                self.take_block(on)?;
            } else if matches!(&self.state, ParserState::Payload(_, len, payload) if payload.len() == *len)
            {
                self.take_payload()?;
            }
        }
        Ok(())
    }

    /// Ends the stream and returns its length.
    ///
    /// If the last entry is complete, a missing end marker is accepted; containerd and (with a warning) GNU
    /// tar do so too. The padding of the entry must be present, because the disk maps whole sectors of the
    /// tar.
    ///
    /// # Errors
    /// [`TarError::Truncated`] or [`TarError::Dangling`].
    pub fn finish(self) -> Result<Bytes, TarError> {
        let what = match self.state {
            ParserState::Header if self.filled > 0 => Some("a header"),
            ParserState::SecondZeroBlock | ParserState::LinkData(_) if self.filled > 0 => {
                Some("the block behind")
            }
            ParserState::Header
            | ParserState::SecondZeroBlock
            | ParserState::LinkData(_)
            | ParserState::End => None,
            ParserState::OldSparse(..) | ParserState::LineMap(..) => Some("the sparse map"),
            ParserState::Payload(extra, ..) => Some(extra.what()),
            ParserState::Data(_) => Some("the data"),
            ParserState::Padding(_) => Some("the padding"),
        };
        if let Some(what) = what {
            let Current { offset, name } = self.current;
            return Err(TarError::Truncated {
                offset,
                name: shown(&name),
                what,
                total: self.position,
            });
        }
        match self.pending.offset {
            Some(offset) => Err(TarError::Dangling { offset }),
            None => Ok(Bytes(self.position)),
        }
    }

    /// Handles a complete block, in one of the states that collect blocks.
    fn take_block<E: From<TarError>>(&mut self, on: Callback<'_, E>) -> Result<(), E> {
        let block = *self.block;
        let start = self.position - BLOCK as u64;
        let is_zero = block == [0; BLOCK];
        match std::mem::replace(&mut self.state, ParserState::Header) {
            ParserState::SecondZeroBlock if is_zero => self.state = ParserState::End,
            ParserState::SecondZeroBlock => {
                return Err(TarError::LoneZeroBlock { offset: start - BLOCK as u64 }.into());
            }
            ParserState::LinkData(len) if !is_zero && Header::new(&block).is_none() => {
                let rest =
                    len.div_ceil(BLOCK as u64).saturating_sub(1).saturating_mul(BLOCK as u64);
                self.state =
                    if rest > 0 { ParserState::Padding(rest) } else { ParserState::Header };
            }
            ParserState::OldSparse(draft, pairs) => {
                self.old_sparse_block(&block, draft, pairs, on)?
            }
            ParserState::LineMap(draft, map, len) => {
                self.line_map_block(&block, draft, map, len, on)?
            }
            _ if is_zero => match self.pending.offset {
                Some(offset) => return Err(TarError::Dangling { offset }.into()),
                None => self.state = ParserState::SecondZeroBlock,
            },
            _ => {
                let header = Header::new(&block).ok_or(TarError::Checksum { offset: start })?;
                self.take_header(header, start, on)?;
            }
        }
        Ok(())
    }

    fn take_header<E: From<TarError>>(
        &mut self,
        header: Header<'_>,
        start: u64,
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        self.current =
            Current { offset: self.pending.offset.unwrap_or(start), name: header.name() };
        if let Some(extra) = Extra::from_flag(header.flag()) {
            return Ok(self.start_payload(extra, header, start)?);
        }
        if header.flag() == b'V' {
            // GNU's name for the whole archive. It is not a file, and the extra entries before it describe no
            // file.
            self.pending = Pending::default();
            let len = self.current.unsigned("size", header.size(), i64::MAX as u64)?;
            self.state = if len > 0 {
                ParserState::Padding(len.next_multiple_of(BLOCK as u64))
            } else {
                ParserState::Header
            };
            return Ok(());
        }
        self.take_entry(header, on)
    }

    fn start_payload(
        &mut self,
        extra: Extra,
        header: Header<'_>,
        start: u64,
    ) -> Result<(), TarError> {
        let len = self.current.unsigned("size", header.size(), i64::MAX as u64)?;
        if len > METADATA_LIMIT {
            return Err(self.current.too_long(extra.what(), len));
        }
        if !matches!(extra, Extra::Global) {
            self.pending.offset.get_or_insert(start);
        }
        let len = len as usize;
        self.state = ParserState::Payload(extra, len, Vec::with_capacity(len));
        if len == 0 { self.take_payload() } else { Ok(()) }
    }

    fn take_payload(&mut self) -> Result<(), TarError> {
        let state = std::mem::replace(&mut self.state, padding(self.position));
        let ParserState::Payload(extra, _, payload) = state else { return Ok(()) };
        let long_name = |payload: &[u8]| {
            let name = until_nul(payload);
            match payload[name.len()..].iter().all(|&byte| byte == 0) {
                true => Ok(Some(name.to_vec()).filter(|name| !name.is_empty())),
                false => Err(self.current.field("long name", "it contains a NUL byte")),
            }
        };
        match extra {
            Extra::Local => self.pending.records = Some(payload),
            Extra::Global => {
                self.global.merge_global(&payload).map_err(|error| self.current.pax(error))?;
            }
            Extra::LongName => self.pending.name = long_name(&payload)?,
            Extra::LongLink => self.pending.link = long_name(&payload)?,
        }
        Ok(())
    }

    /// Handles the header of an entry proper.
    fn take_entry<E: From<TarError>>(
        &mut self,
        header: Header<'_>,
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        let pending = std::mem::take(&mut self.pending);
        let (draft, sparse) = self.current.join(header, pending, &self.global, self.position)?;
        match sparse {
            SparseKind::No => self.emit(draft.entry, draft.stored, on),
            SparseKind::Old => self.start_old_sparse(header, draft, on),
            SparseKind::Pairs(pairs) => self.emit_sparse(draft, &pairs, on),
            SparseKind::Lines => {
                self.state = ParserState::LineMap(Box::new(draft), sparse::LineMap::default(), 0);
                Ok(())
            }
        }
    }

    /// Reports an entry and moves on to its data: `stored` bytes if the header is correct.
    fn emit<E: From<TarError>>(
        &mut self,
        mut entry: TarEntry,
        stored: u64,
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        // The size of an entry that has no data is ignored, as in Go and GNU tar. There are two exceptions. A
        // directory of a GNU dump has data. A hard link may have data: pax can store the file again with each
        // link, while older tars give the size of the file and store no data. Only the next block shows
        // which.
        let is_dump = entry.kind == EntryKind::Directory && self.block[156] == b'D';
        self.state = match &entry.kind {
            EntryKind::Regular => data(self.position, stored),
            EntryKind::HardLink(_) if stored > 0 => ParserState::LinkData(stored),
            _ if is_dump && stored > 0 => match stored.checked_next_multiple_of(BLOCK as u64) {
                Some(len) => ParserState::Padding(len),
                None => return Err(self.current.field("size", "it exceeds 64 bits").into()),
            },
            _ => ParserState::Header,
        };
        if entry.kind != EntryKind::Regular {
            entry.stored_len = Bytes::ZERO;
        }
        if self.position.checked_add(stored).is_none_or(|end| end > i64::MAX as u64) {
            return Err(self.current.field("size", "the data would end past 63 bits").into());
        }
        on(TarEvent::Entry(entry))
    }

    fn start_old_sparse<E: From<TarError>>(
        &mut self,
        header: Header<'_>,
        mut draft: Draft,
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        let (field, is_extended, real_size) = header.old_sparse();
        let real_size = number(real_size);
        draft.size = self.current.unsigned("sparse file size", real_size, i64::MAX as u64)?;
        let mut pairs = Vec::new();
        sparse::old_pairs(field, &mut pairs)
            .map_err(|reason| self.current.field("sparse map", reason))?;
        if is_extended {
            self.state = ParserState::OldSparse(Box::new(draft), pairs);
            return Ok(());
        }
        self.emit_sparse(draft, &pairs, on)
    }

    fn old_sparse_block<E: From<TarError>>(
        &mut self,
        block: &[u8; BLOCK],
        draft: Box<Draft>,
        mut pairs: sparse::Pairs,
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        /// 21 pairs of 24 bytes, then the flag.
        const FLAG: usize = 504;
        sparse::old_pairs(&block[..FLAG], &mut pairs)
            .map_err(|reason| self.current.field("sparse map", reason))?;
        let len = self.position - draft.entry.data_offset.get();
        if len > METADATA_LIMIT {
            return Err(self.current.too_long("a sparse map", len).into());
        }
        if block[FLAG] != 0 {
            self.state = ParserState::OldSparse(draft, pairs);
            return Ok(());
        }
        self.emit_sparse(*draft, &pairs, on)
    }

    fn line_map_block<E: From<TarError>>(
        &mut self,
        block: &[u8; BLOCK],
        mut draft: Box<Draft>,
        mut map: sparse::LineMap,
        len: u64,
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        let len = len + BLOCK as u64;
        if len > METADATA_LIMIT {
            return Err(self.current.too_long("a sparse map", len).into());
        }
        let pairs = map.block(block).map_err(|reason| self.current.field("sparse map", reason))?;
        let Some(pairs) = pairs else {
            self.state = ParserState::LineMap(draft, map, len);
            return Ok(());
        };
        let too_short = || {
            self.current
                .field("size", "the sparse map at the start of the data is longer than the data")
        };
        draft.stored = draft.stored.checked_sub(len).ok_or_else(too_short)?;
        self.emit_sparse(*draft, &pairs, on)
    }

    /// Reports a sparse file with a complete map; its data starts here.
    fn emit_sparse<E: From<TarError>>(
        &mut self,
        draft: Draft,
        pairs: &[u64],
        on: Callback<'_, E>,
    ) -> Result<(), E> {
        let Draft { mut entry, size, stored } = draft;
        entry.data_offset = Bytes(self.position);
        entry.stored_len = Bytes(stored);
        entry.content = sparse::content(pairs, size, self.position, stored)
            .map_err(|reason| self.current.field("sparse map", reason))?;
        self.emit(entry, stored, on)
    }
}

/// The state for `len` bytes of data that start at `position`, a multiple of the block size.
fn data(position: u64, len: u64) -> ParserState {
    if len > 0 { ParserState::Data(len) } else { padding(position) }
}

/// The state for the padding that fills the block with `position` in it.
fn padding(position: u64) -> ParserState {
    match position % BLOCK as u64 {
        0 => ParserState::Header,
        past => ParserState::Padding(BLOCK as u64 - past),
    }
}
