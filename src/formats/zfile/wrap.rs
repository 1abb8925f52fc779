//! The tar archive around a layer (spec zfile 8).
//!
//! A native layer in a registry is a tar archive with one member. Upstream's reader accepts exactly two
//! forms, and so does this one: *B*, one ustar header and the data behind it; *A*, a pax header with the
//! member's size in front of a member header whose own size field is 0.

use std::io::{self, Write};
use std::sync::Arc;

use super::ZFileError;
use source::{ByteSource, SubSource};

/// Bytes in a tar record.
const BLOCK: u64 = 512;

/// Wrapping of the bytes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapping {
    /// None.
    Raw,
    /// A pax header and a member header: 1536 bytes (form A).
    TarPax,
    /// A member header: 512 bytes (form B).
    Tar,
}

/// The member of a one-member tar archive, or the source unchanged.
///
/// # Errors
/// [`ZFileError::Invalid`] if the archive has another form, or its member does not fit.
pub fn unwrap(source: Arc<dyn ByteSource>) -> Result<(Arc<dyn ByteSource>, Wrapping), ZFileError> {
    if source.len() < BLOCK {
        return Ok((source, Wrapping::Raw));
    }
    let mut header = [0; BLOCK as usize];
    source.read_exact_at(&mut header, 0)?;
    if !is_ustar(&header) {
        return Ok((source, Wrapping::Raw));
    }
    let invalid = |offset: u64, rule: String| ZFileError::Invalid {
        name: source.name().to_owned(),
        part: "Tar header",
        offset,
        rule,
    };
    let field_size = number(&header[124..136])
        .ok_or_else(|| invalid(0, "its size is not an octal number".to_owned()))?;
    let (start, len, wrapping) = match header[156] {
        b'x' => {
            if field_size > BLOCK {
                return Err(invalid(
                    0,
                    format!("a pax record of {field_size} bytes is longer than {BLOCK}"),
                ));
            }
            let mut record = [0; BLOCK as usize];
            source.read_exact_at(&mut record, BLOCK)?;
            let size = pax_size(&record[..field_size as usize])
                .ok_or_else(|| invalid(BLOCK, "its pax record has no size".to_owned()))?;
            source.read_exact_at(&mut header, 2 * BLOCK)?;
            if !is_ustar(&header) || !matches!(header[156], b'0' | 0) {
                return Err(invalid(
                    2 * BLOCK,
                    "no regular member follows the pax header".to_owned(),
                ));
            }
            (3 * BLOCK, size, Wrapping::TarPax)
        }
        b'0' | 0 => (BLOCK, field_size, Wrapping::Tar),
        other => {
            return Err(invalid(
                0,
                format!("the first member of a layer cannot have type {:?}", char::from(other)),
            ));
        }
    };
    if start.checked_add(len).is_none_or(|end| end > source.len()) {
        return Err(invalid(
            0,
            format!("its member of {len} bytes ends past byte {}", source.len()),
        ));
    }
    Ok((Arc::new(SubSource::new(source, start, len)?), wrapping))
}

/// True if a block is a ustar header with a correct checksum (upstream `tar_file.cpp:is_tar_file`).
fn is_ustar(header: &[u8; BLOCK as usize]) -> bool {
    if &header[257..262] != b"ustar" || &header[263..265] != b"00" {
        return false;
    }
    // Upstream compares the magic up to a NUL; a GNU header has a space there.
    if header[262] != 0 {
        return false;
    }
    let Some(stored) = number(&header[148..156]) else { return false };
    let unsigned = checksum(header, u64::from);
    let signed = checksum(header, |byte| i64::from(byte.cast_signed()).cast_unsigned());
    stored == unsigned || stored == signed
}

/// Sum of a header's bytes, with spaces in place of the checksum field.
fn checksum(header: &[u8; BLOCK as usize], value: impl Fn(u8) -> u64) -> u64 {
    let byte =
        |(at, &byte): (usize, &u8)| value(if (148..156).contains(&at) { b' ' } else { byte });
    header.iter().enumerate().map(byte).fold(0, u64::wrapping_add)
}

/// Reads an octal field: spaces, digits, then any bytes after a space or NUL. `None` without a digit.
fn number(field: &[u8]) -> Option<u64> {
    let digits = field.trim_ascii_start();
    let len =
        digits.iter().position(|digit| !(b'0'..=b'7').contains(digit)).unwrap_or(digits.len());
    let text = std::str::from_utf8(&digits[..len]).ok()?;
    u64::from_str_radix(text, 8).ok()
}

/// The value of `size` in a pax record.
fn pax_size(mut record: &[u8]) -> Option<u64> {
    let mut size = None;
    while !record.is_empty() && record[0] != 0 {
        let space = record.iter().position(|&byte| byte == b' ')?;
        let len: usize = std::str::from_utf8(&record[..space]).ok()?.parse().ok()?;
        let line = record.get(space + 1..len)?.strip_suffix(b"\n")?;
        if let Some(value) = line.strip_prefix(b"size=") {
            size = Some(std::str::from_utf8(value).ok()?.parse().ok()?);
        }
        record = &record[len..];
    }
    size
}

/// The 1536 bytes in front of a `ZFile` of `len` bytes in form A, equal to the output of `overlaybd-commit -z
/// -t` under umask 022 as root.
#[must_use]
pub fn head(len: u64) -> Vec<u8> {
    let mut text = String::new();
    // The length of a pax record includes its own digits; the record has at most 28 bytes, so two digits
    // always suffice.
    for digits in 1..=2 {
        let total = digits + " size=\n".len() + len.to_string().len();
        text = format!("{total} size={len}\n");
        if text.len() == total {
            break;
        }
    }
    let mut pax = [0; BLOCK as usize];
    pax[..13].copy_from_slice(b"overlaybd.pax");
    pax[124..136].copy_from_slice(format!("{:>11o} ", text.len()).as_bytes());
    pax[156] = b'x';
    seal(&mut pax);
    let mut member = [0; BLOCK as usize];
    member[..16].copy_from_slice(b"overlaybd.commit");
    member[100..108].copy_from_slice(b"100644 \0");
    member[108..116].copy_from_slice(b"     0 \0");
    member[116..124].copy_from_slice(b"     0 \0");
    member[124..136].copy_from_slice(b"          0 ");
    member[136..148].copy_from_slice(b"          0 ");
    member[156] = b'0';
    member[265..269].copy_from_slice(b"root");
    member[297..301].copy_from_slice(b"root");
    seal(&mut member);
    let mut head = pax.to_vec();
    head.extend_from_slice(text.as_bytes());
    head.resize(2 * BLOCK as usize, 0);
    head.extend_from_slice(&member);
    head
}

/// Fills in magic, version and checksum.
fn seal(header: &mut [u8; BLOCK as usize]) {
    header[257..263].copy_from_slice(b"ustar\0");
    header[263..265].copy_from_slice(b"00");
    let sum = checksum(header, u64::from);
    header[148..156].copy_from_slice(format!("{sum:>6o} \0").as_bytes());
}

/// Writes the bytes behind a `ZFile` of `len` bytes in a tar archive: padding and two zero records.
///
/// # Errors
/// The errors of the output.
pub fn write_tail(len: u64, out: &mut impl Write) -> io::Result<()> {
    let padding = len.next_multiple_of(BLOCK) - len + 2 * BLOCK;
    out.write_all(&vec![0; padding as usize])
}
