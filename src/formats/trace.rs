//! A trace and its file.
//!
//! All numbers are little-endian; *varint* is LEB128 of at most 64 bits, *signed* is a varint with the sign
//! folded into the lowest bit.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `turbotrc` |
//! | 2 | version, 1 |
//! | 2 | zero |
//! | 4 | number of starts that were merged into it |
//! | 4 | number of blobs |
//! | 4 | number of touches |
//! | 32 each | SHA-256 digests of the blobs |
//! | varints | for each touch: blob, *signed* distance of its start from the end of the last touch of this blob (from 0 for the first), length, time since the last touch in units of 10 ms, weight |
//! | 4 | CRC-32 of all before |
//!
//! A touch takes about seven bytes, a start of 300 segments two KiB.

mod merge;

use thiserror::Error;

use crate::oci::Digest;

/// First bytes of a trace file.
pub const MAGIC: [u8; 8] = *b"turbotrc";
/// Version of the format.
pub const VERSION: u16 = 1;
/// Limit on the blobs of a trace: more than the layers that a disk may have, as images change.
pub const MAX_BLOBS: usize = 4096;
/// Limit on touches: 32 GiB in chunks of 128 KiB.
pub const MAX_TOUCHES: usize = 1 << 18;
/// Longest file that is read, in bytes.
pub const MAX_FILE: usize = 16 << 20;
/// Limit on a weight; see [`Trace::merge`].
pub const MAX_WEIGHT: u8 = 4;

/// Unit of time in the file, in milliseconds.
const TICK: u32 = 10;
const HEAD: usize = 24;

/// Reasons why bytes are not a trace.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TraceError {
    /// It begins with something else.
    #[error("This is not a trace: it does not begin with turbotrc")]
    Magic,
    /// A later program wrote it.
    #[error("The trace has version {0}, and this program reads version {VERSION}: record it again")]
    Version(u16),
    /// It ends too early.
    #[error("The trace ends within {0}")]
    Short(&'static str),
    /// It was changed after it was written.
    #[error("The trace is damaged: its checksum is {found:08x}, and {expected:08x} was written")]
    Checksum {
        /// Checksum of the bytes.
        found: u32,
        /// Checksum in the file.
        expected: u32,
    },
    /// A number is out of its bounds.
    #[error("Touch {touch} of the trace is invalid: {rule}")]
    Touch {
        /// Number of the touch, from 0.
        touch: usize,
        /// The broken rule.
        rule: &'static str,
    },
    /// A part is too large, or bytes follow the end.
    #[error("The trace is invalid: {0}")]
    Invalid(&'static str),
    /// Upstream's format, which the crate `blobs` reads and writes.
    #[error("Upstream's trace is invalid: {0}")]
    Upstream(String),
}

/// A piece of a blob that a start touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Touch {
    /// Index into [`Trace::blobs`].
    pub blob: u32,
    /// Position of its first decoded byte.
    pub start: u64,
    /// Number of decoded bytes, never 0.
    pub len: u64,
    /// Time of its first touch: milliseconds since the first touch of the start, in steps of 10.
    pub at: u32,
    /// Number of starts without it until it is forgotten, 1 to [`MAX_WEIGHT`].
    pub weight: u8,
}

impl Touch {
    /// One past the last decoded byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// The pieces that a start reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Trace {
    /// Number of starts that were merged into this.
    pub starts: u32,
    /// The blobs that hold the data.
    pub blobs: Vec<Digest>,
    /// The touches, in the order of their times.
    pub touches: Vec<Touch>,
}

impl Trace {
    /// Decoded bytes of all touches.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.touches.iter().fold(0, |sum, touch| sum.saturating_add(touch.len))
    }

    /// Number of a blob, which is added if it is new; `None` if there are too many.
    pub fn blob(&mut self, digest: Digest) -> Option<u32> {
        let at = self.blobs.iter().position(|blob| *blob == digest);
        if at.is_none() {
            if self.blobs.len() == MAX_BLOBS {
                return None;
            }
            self.blobs.push(digest);
        }
        Some(at.unwrap_or(self.blobs.len() - 1) as u32)
    }

    /// Encodes the file of this trace. Touches past [`MAX_TOUCHES`], and of blobs that it does not have, are
    /// left out.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let is_known = |touch: &&Touch| (touch.blob as usize) < self.blobs.len();
        let touches: Vec<_> = self.touches.iter().filter(is_known).take(MAX_TOUCHES).collect();
        let mut out = Vec::with_capacity(HEAD + self.blobs.len() * 32 + touches.len() * 8);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        for number in [self.starts, self.blobs.len() as u32, touches.len() as u32] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        self.blobs.iter().for_each(|blob| out.extend_from_slice(&blob.0));
        let mut ends = vec![0_u64; self.blobs.len()];
        let mut tick = 0;
        for touch in touches {
            put(&mut out, touch.blob.into());
            let end = &mut ends[touch.blob as usize];
            let distance = touch.start.wrapping_sub(*end) as i64;
            put(&mut out, ((distance << 1) ^ (distance >> 63)) as u64);
            *end = touch.end();
            put(&mut out, touch.len);
            let now = (touch.at / TICK).max(tick);
            put(&mut out, (now - tick).into());
            tick = now;
            put(&mut out, touch.weight.into());
        }
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Reads a trace file.
    ///
    /// # Errors
    /// Returns a [`TraceError`] with the rule that the bytes break.
    pub fn parse(bytes: &[u8]) -> Result<Self, TraceError> {
        if bytes.len() > MAX_FILE {
            return Err(TraceError::Invalid("it is larger than 16 MiB"));
        }
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(TraceError::Magic);
        }
        let mut rest = Rest { bytes: &bytes[8..] };
        let [low, high, zero @ ..] = rest.array::<4>("its head")?;
        match u16::from_le_bytes([low, high]) {
            VERSION if zero == [0, 0] => {}
            VERSION => return Err(TraceError::Invalid("two bytes of its head must be zero")),
            other => return Err(TraceError::Version(other)),
        }
        let (body, sum) = bytes.split_at(bytes.len().saturating_sub(4));
        let expected = u32::from_le_bytes(sum.try_into().unwrap_or_default());
        let starts = rest.u32()?;
        let (blob_count, touch_count) = (rest.u32()? as usize, rest.u32()? as usize);
        if blob_count > MAX_BLOBS || touch_count > MAX_TOUCHES {
            return Err(TraceError::Invalid("it has more than 4096 blobs or 262144 touches"));
        }
        let found = crc32fast::hash(body);
        if found != expected {
            return Err(TraceError::Checksum { found, expected });
        }
        let blobs: Vec<Digest> = (0..blob_count)
            .map(|_| rest.array("its blobs").map(Digest))
            .collect::<Result<_, _>>()?;
        let mut touches = Vec::with_capacity(touch_count.min(rest.bytes.len()));
        let mut ends = vec![0_u64; blobs.len()];
        let mut tick = 0_u32;
        for number in 0..touch_count {
            let touch = rest.touch(&mut ends, &mut tick).map_err(|error| match error {
                TraceError::Touch { rule, .. } => TraceError::Touch { touch: number, rule },
                other => other,
            })?;
            touches.push(touch);
        }
        match rest.bytes.len() {
            4 => Ok(Self { starts, blobs, touches }),
            0..4 => Err(TraceError::Short("its last touch")),
            _ => Err(TraceError::Invalid("bytes follow its last touch")),
        }
    }
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// The bytes that are left to be read.
struct Rest<'a> {
    bytes: &'a [u8],
}

impl Rest<'_> {
    fn array<const N: usize>(&mut self, part: &'static str) -> Result<[u8; N], TraceError> {
        let (array, rest) = self.bytes.split_first_chunk().ok_or(TraceError::Short(part))?;
        self.bytes = rest;
        Ok(*array)
    }

    fn u32(&mut self) -> Result<u32, TraceError> {
        self.array("its head").map(u32::from_le_bytes)
    }

    fn varint(&mut self) -> Result<u64, TraceError> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array("a touch")?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(invalid("a number has more than 64 bits"))
    }

    fn touch(&mut self, ends: &mut [u64], tick: &mut u32) -> Result<Touch, TraceError> {
        let blob = self.varint()?;
        let end = usize::try_from(blob).ok().and_then(|blob| ends.get_mut(blob));
        let end = end.ok_or_else(|| invalid("it is of a blob that the trace does not have"))?;
        let folded = self.varint()?;
        let distance = (folded >> 1) as i64 ^ -((folded & 1) as i64);
        let start = end.wrapping_add(distance as u64);
        let len = self.varint()?;
        if len == 0 || start.checked_add(len).is_none() {
            return Err(invalid("it has no bytes, or more than there can be"));
        }
        *end = start + len;
        let wait = u32::try_from(self.varint()?).ok();
        let now =
            wait.and_then(|wait| tick.checked_add(wait)).filter(|now| *now <= u32::MAX / TICK);
        *tick = now.ok_or_else(|| invalid("its time is later than 49 days after the start"))?;
        let weight = u8::try_from(self.varint()?).unwrap_or(0);
        if weight == 0 || weight > MAX_WEIGHT {
            return Err(invalid("its weight is not 1 to 4"));
        }
        Ok(Touch { blob: blob as u32, start, len, at: *tick * TICK, weight })
    }
}

fn invalid(rule: &'static str) -> TraceError {
    TraceError::Touch { touch: 0, rule }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) fn any_trace() -> impl Strategy<Value = Trace> {
        let touch = (any::<u8>(), 0..u64::MAX / 2, 1..u64::MAX / 2, 0..5000_u32, 1..=MAX_WEIGHT);
        (any::<u32>(), 1..5_usize, proptest::collection::vec(touch, 0..60)).prop_map(
            |(starts, blobs, touches)| {
                let mut at = 0;
                let touches = touches.into_iter().map(|(blob, start, len, wait, weight)| {
                    at += wait / TICK * TICK;
                    Touch { blob: u32::from(blob) % blobs as u32, start, len, at, weight }
                });
                let touches = touches.collect();
                let blobs = (0..blobs).map(|number| Digest::of(&[number as u8])).collect();
                Trace { starts, blobs, touches }
            },
        )
    }

    fn small() -> Trace {
        let touch = |start, at| Touch { blob: 0, start, len: 1 << 20, at, weight: 2 };
        Trace {
            starts: 1,
            blobs: vec![Digest::of(b"a")],
            touches: vec![touch(5 << 20, 0), touch(6 << 20, 40), touch(1 << 20, 40)],
        }
    }

    /// Corrects the checksum.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let len = bytes.len() - 4;
        let sum = crc32fast::hash(&bytes[..len]);
        bytes[len..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn a_touch_takes_a_few_bytes() {
        let mut trace = small();
        trace.touches = (0..300).map(|n| Touch { start: n << 20, ..trace.touches[0] }).collect();
        assert!(trace.to_bytes().len() < 60 + 300 * 9, "{}", trace.to_bytes().len());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let good = small().to_bytes();
        assert_eq!(Trace::parse(b"hello"), Err(TraceError::Magic));
        assert_eq!(Trace::parse(&good[..10]), Err(TraceError::Short("its head")));
        let mut other = good.clone();
        other[8] = 2;
        assert_eq!(Trace::parse(&other), Err(TraceError::Version(2)));
        let mut other = good.clone();
        other[60] ^= 1;
        assert!(matches!(Trace::parse(&other), Err(TraceError::Checksum { .. })));
        assert!(matches!(Trace::parse(&good[..good.len() - 1]), Err(TraceError::Checksum { .. })));
        let mut other = good.clone();
        other[56] = 1; // the blob of the first touch
        assert_eq!(
            Trace::parse(&sealed(other)).unwrap_err().to_string(),
            "Touch 0 of the trace is invalid: it is of a blob that the trace does not have"
        );
        let longer = sealed([&good[..good.len() - 4], &[0; 9]].concat());
        assert_eq!(Trace::parse(&longer), Err(TraceError::Invalid("bytes follow its last touch")));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(trace in any_trace()) {
            prop_assert_eq!(Trace::parse(&trace.to_bytes()), Ok(trace));
        }

        #[test]
        fn no_bytes_are_too_bad_to_be_refused(
            trace in any_trace(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(), seal in any::<bool>(),
        ) {
            let mut bytes = trace.to_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= byte;
            bytes.truncate(4.max(cut.index(2 * bytes.len())));
            let bytes = if seal { sealed(bytes) } else { bytes };
            if let Ok(read) = Trace::parse(&bytes) {
                prop_assert_eq!(Trace::parse(&read.to_bytes()), Ok(read));
            }
        }
    }
}
