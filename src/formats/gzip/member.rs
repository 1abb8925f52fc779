//! The header of a gzip member (RFC 1952, 2.3).

use super::GzipError;

/// Longest header that is accepted. Names and comments have no length field, so without a limit a hostile
/// stream could make the reader keep all of it. The fixed parts and the longest extra field take 65,549
/// bytes.
const MAX_HEADER: usize = 1 << 20;

const FHCRC: u8 = 1 << 1;
const FEXTRA: u8 = 1 << 2;
const FNAME: u8 = 1 << 3;
const FCOMMENT: u8 = 1 << 4;

/// Length of the header at the start of `bytes`, which lie at `offset` of the blob; `None` if more bytes are
/// needed.
pub(super) fn header_len(bytes: &[u8], offset: u64) -> Result<Option<usize>, GzipError> {
    let damaged = |at: usize, reason| Err(GzipError::damaged(offset + at as u64, reason));
    for (at, (&byte, expected)) in bytes.iter().zip([0x1f, 0x8b, 8]).enumerate() {
        if byte != expected {
            return damaged(
                at,
                if at < 2 { "this is not a gzip member" } else { "the method is not deflate" },
            );
        }
    }
    let Some(&flags) = bytes.get(3) else { return Ok(None) };
    if flags & 0xe0 != 0 {
        return damaged(3, "reserved header flags are set");
    }
    let mut at = 10;
    if flags & FEXTRA != 0 {
        let Some(&[low, high]) = bytes.get(at..at + 2).and_then(<[u8]>::first_chunk) else {
            return Ok(None);
        };
        at += 2 + usize::from(u16::from_le_bytes([low, high]));
    }
    for flag in [FNAME, FCOMMENT] {
        if flags & flag != 0 {
            let Some(rest) = bytes.get(at..) else { return Ok(None) };
            match rest.iter().take(MAX_HEADER).position(|&byte| byte == 0) {
                Some(end) => at += end + 1,
                None if rest.len() >= MAX_HEADER => {
                    return damaged(at, "a name or comment has no end");
                }
                None => return Ok(None),
            }
        }
    }
    if flags & FHCRC != 0 {
        let Some(&[low, high]) = bytes.get(at..at + 2).and_then(<[u8]>::first_chunk) else {
            return Ok(None);
        };
        if crc32fast::hash(&bytes[..at]) as u16 != u16::from_le_bytes([low, high]) {
            return damaged(at, "the header does not match its checksum");
        }
        at += 2;
    }
    Ok((at <= bytes.len()).then_some(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_optional_field_is_skipped_and_every_prefix_asks_for_more() {
        let mut header = vec![0x1f, 0x8b, 8, FHCRC | FEXTRA | FNAME | FCOMMENT, 0, 0, 0, 0, 0, 3];
        header.extend([3, 0, 1, 0, 2]);
        header.extend(b"name\0comment\0");
        header.extend((crc32fast::hash(&header) as u16).to_le_bytes());
        let len = header.len();
        for cut in 0..len {
            assert_eq!(header_len(&header[..cut], 0), Ok(None), "{cut}");
        }
        header.push(0xff);
        assert_eq!(header_len(&header, 0), Ok(Some(len)));
        header[11] ^= 1;
        header[12] ^= 4;
        assert!(header_len(&header, 0).is_err() || header_len(&header, 0) == Ok(None));
    }

    #[test]
    fn what_is_not_gzip_is_named_with_its_offset() {
        let error = header_len(b"PK\x03\x04", 7).unwrap_err();
        assert_eq!(
            error.to_string(),
            "The gzip stream is damaged at compressed byte 7: this is not a gzip member"
        );
        assert!(header_len(&[0x1f, 0x8b, 8, 0x80], 0).is_err());
        assert!(header_len(&[0x1f, 0x8b, 7], 0).is_err());
    }
}
