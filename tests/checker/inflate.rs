//! Deflate by the specification (RFC 1951 and 1952), from any bit of a stream with any window.

use super::field::{crc32, le32};

/// Longest code in bits.
const LONGEST: usize = 15;

const LENGTHS: [(u16, u8); 29] = [
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 1),
    (13, 1),
    (15, 1),
    (17, 1),
    (19, 2),
    (23, 2),
    (27, 2),
    (31, 2),
    (35, 3),
    (43, 3),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 4),
    (115, 4),
    (131, 5),
    (163, 5),
    (195, 5),
    (227, 5),
    (258, 0),
];

/// A canonical code: for every 15 bits of input, the symbol and its length.
struct Code(Vec<(u16, u8)>);

impl Code {
    fn new(lengths: &[u8]) -> Self {
        let mut table = vec![(0, 0); 1 << LONGEST];
        let mut code = 0_usize;
        for length in 1..=LONGEST {
            for (symbol, _) in
                lengths.iter().enumerate().filter(|(_, l)| usize::from(**l) == length)
            {
                // The input has the first bit of a code lowest.
                let reversed = code.reverse_bits() >> (usize::BITS as usize - length);
                for rest in 0..1 << (LONGEST - length) {
                    if let Some(entry) = table.get_mut(reversed | rest << length) {
                        *entry = (symbol as u16, length as u8);
                    }
                }
                code += 1;
            }
            code <<= 1;
        }
        Self(table)
    }
}

/// Reads bits and produces bytes.
struct Stream<'a> {
    bytes: &'a [u8],
    bit: u64,
    out: Vec<u8>,
    /// Number of bytes at the beginning of `out` that are not output of this stream, or belong to another
    /// member.
    floor: usize,
}

impl Stream<'_> {
    fn peek(&self) -> u64 {
        let at = (self.bit / 8) as usize;
        let mut word = [0; 8];
        let tail = self.bytes.get(at..).unwrap_or_default();
        let n = tail.len().min(8);
        word[..n].copy_from_slice(&tail[..n]);
        u64::from_le_bytes(word) >> (self.bit % 8)
    }

    fn bits(&mut self, n: u32) -> Result<u32, String> {
        let value = self.peek() & ((1 << n) - 1);
        self.bit += u64::from(n);
        if self.bit > self.bytes.len() as u64 * 8 {
            return Err("the stream ends too early".into());
        }
        Ok(value as u32)
    }

    fn symbol(&mut self, code: &Code) -> Result<u16, String> {
        let (symbol, length) = code.0[(self.peek() & 0x7fff) as usize];
        if length == 0 {
            return Err(format!("no code begins at bit {}", self.bit));
        }
        self.bits(u32::from(length))?;
        Ok(symbol)
    }

    /// Type bits and codes of a block.
    fn header(&mut self) -> Result<(bool, Option<(Code, Code)>), String> {
        let last = self.bits(1)? == 1;
        Ok((
            last,
            match self.bits(2)? {
                0 => None,
                1 => {
                    let lengths: Vec<u8> = (0..288)
                        .map(|n| match n {
                            144..256 => 9,
                            256..280 => 7,
                            _ => 8,
                        })
                        .collect();
                    Some((Code::new(&lengths), Code::new(&[5; 30])))
                }
                2 => Some(self.dynamic()?),
                _ => return Err(format!("a reserved block type before bit {}", self.bit)),
            },
        ))
    }

    fn dynamic(&mut self) -> Result<(Code, Code), String> {
        let literals = self.bits(5)? as usize + 257;
        let distances = self.bits(5)? as usize + 1;
        let count = self.bits(4)? as usize + 4;
        let mut lengths = [0; 19];
        for at in
            [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15].iter().take(count)
        {
            lengths[*at] = self.bits(3)? as u8;
        }
        let code = Code::new(&lengths);
        let mut all: Vec<u8> = Vec::new();
        while all.len() < literals + distances {
            let (value, times) = match self.symbol(&code)? {
                symbol @ 0..16 => (symbol as u8, 1),
                16 => (*all.last().ok_or("a repeat of nothing")?, self.bits(2)? + 3),
                17 => (0, self.bits(3)? + 3),
                _ => (0, self.bits(7)? + 11),
            };
            all.extend(std::iter::repeat_n(value, times as usize));
        }
        if all.len() != literals + distances {
            return Err("more code lengths than codes".into());
        }
        Ok((Code::new(&all[..literals]), Code::new(&all[literals..])))
    }

    /// Decodes the body of a block, until it ends or there are `enough` bytes; returns true if it ended.
    fn body(&mut self, codes: Option<&(Code, Code)>, enough: usize) -> Result<bool, String> {
        let Some((literals, distances)) = codes else {
            self.bit = self.bit.next_multiple_of(8);
            let at = (self.bit / 8) as usize;
            let head = self.bytes.get(at..at + 4).ok_or("a stored block ends too early")?;
            let len = usize::from(u16::from_le_bytes([head[0], head[1]]));
            if len as u16 != !u16::from_le_bytes([head[2], head[3]]) {
                return Err("a stored block's lengths disagree".into());
            }
            let data =
                self.bytes.get(at + 4..at + 4 + len).ok_or("a stored block ends too early")?;
            self.out.extend_from_slice(data);
            self.bit += 8 * (4 + len as u64);
            return Ok(true);
        };
        while self.out.len() < enough {
            match self.symbol(literals)? {
                256 => return Ok(true),
                byte @ 0..256 => self.out.push(byte as u8),
                symbol => {
                    let (base, extra) =
                        *LENGTHS.get(usize::from(symbol) - 257).ok_or("an impossible length")?;
                    let len = u32::from(base) + self.bits(u32::from(extra))?;
                    let symbol = u32::from(self.symbol(distances)?);
                    let extra = (symbol / 2).saturating_sub(1);
                    let base = if symbol < 4 { symbol } else { (2 + symbol % 2) << extra };
                    let distance = (base + 1 + self.bits(extra)?) as usize;
                    if distance > self.out.len() - self.floor {
                        return Err(format!(
                            "a match reaches before the window at bit {}",
                            self.bit
                        ));
                    }
                    for _ in 0..len {
                        self.out.push(self.out[self.out.len() - distance]);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Skips a gzip header (RFC 1952).
    fn gzip_header(&mut self) -> Result<(), String> {
        let at = (self.bit / 8) as usize;
        let head = self.bytes.get(at..at + 10).ok_or("a gzip header ends too early")?;
        if head[..3] != [0x1f, 0x8b, 8] {
            return Err(format!("no gzip header at byte {at}"));
        }
        let mut end = at + 10;
        if head[3] & 4 != 0 {
            let extra = self.bytes.get(end..end + 2).ok_or("a gzip header ends too early")?;
            end += 2 + usize::from(u16::from_le_bytes([extra[0], extra[1]]));
        }
        for flag in [8, 16] {
            if head[3] & flag != 0 {
                let tail = self.bytes.get(end..).ok_or("a gzip header ends too early")?;
                end += 1 + tail.iter().position(|&b| b == 0).ok_or("a gzip name has no end")?;
            }
        }
        end += if head[3] & 2 != 0 { 2 } else { 0 };
        self.bit = end as u64 * 8;
        Ok(())
    }

    /// Moves from the end of the last block of a member to the next member's first; false at the end of all.
    fn next_member(&mut self, check: bool) -> Result<bool, String> {
        self.bit = self.bit.next_multiple_of(8);
        let at = (self.bit / 8) as usize;
        let tail = self.bytes.get(at..at + 8).ok_or("a gzip trailer ends too early")?;
        if check {
            let data = &self.out[self.floor..];
            if le32(tail, 0) != crc32(data) || le32(tail, 4) != data.len() as u32 {
                return Err(format!("the gzip trailer at byte {at} is wrong"));
            }
        }
        self.floor = self.out.len();
        self.bit += 64;
        if at + 8 == self.bytes.len() {
            return Ok(false);
        }
        self.gzip_header()?;
        Ok(true)
    }
}

/// A gzip file decoded from its beginning.
pub struct Whole {
    /// All output.
    pub out: Vec<u8>,
    /// Positions of blocks: bit, output position.
    pub blocks: Vec<(u64, u64)>,
    /// Output position of each member.
    pub members: Vec<u64>,
}

/// Decodes all members, trailers included.
pub fn whole(bytes: &[u8]) -> Result<Whole, String> {
    let mut stream = Stream { bytes, bit: 0, out: Vec::new(), floor: 0 };
    let (mut blocks, mut members) = (Vec::new(), vec![0]);
    stream.gzip_header()?;
    loop {
        blocks.push((stream.bit, stream.out.len() as u64));
        let (last, codes) = stream.header()?;
        stream.body(codes.as_ref(), usize::MAX)?;
        if !last {
            continue;
        }
        if !stream.next_member(true)? {
            return Ok(Whole { out: stream.out, blocks, members });
        }
        members.push(stream.out.len() as u64);
    }
}

/// A block header given apart: its bytes and its length in bits.
pub type Header<'a> = (&'a [u8], u64);

/// The first `want` bytes of output from bit `bit` on, after the bytes of `window`: raw inflate, primed as
/// upstream primes zlib. With `header` the bit lies in the block that has this header.
pub fn from(
    bytes: &[u8],
    bit: u64,
    window: &[u8],
    header: Option<Header<'_>>,
    want: usize,
) -> Result<Vec<u8>, String> {
    let mut stream = Stream { bytes, bit, out: window.to_vec(), floor: 0 };
    let enough = window.len() + want;
    let mut given = match header {
        None => None,
        Some((bytes, bits)) => {
            let mut head = Stream { bytes, bit: 0, out: Vec::new(), floor: 0 };
            let header = head.header()?;
            if head.bit != bits {
                return Err("a block header has another length".into());
            }
            Some(header)
        }
    };
    while stream.out.len() < enough {
        let (last, codes) = match given.take() {
            Some(header) => header,
            None => stream.header()?,
        };
        if stream.body(codes.as_ref(), enough)? && last && !stream.next_member(false)? {
            break;
        }
    }
    if stream.out.len() < enough {
        return Err(format!("only {} of {want} bytes come", stream.out.len() - window.len()));
    }
    stream.out.truncate(enough);
    Ok(stream.out.split_off(window.len()))
}
