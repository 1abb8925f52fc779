//! Tar archives: of a TurboOCI layer (spec turbooci 3.1), and around a native layer (spec zfile 8).

use super::Report;
use super::field::is_zero;

/// A member of an archive.
pub struct Member {
    pub name: String,
    pub data: Vec<u8>,
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

fn checksum_holds(header: &[u8]) -> bool {
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(at, &byte)| if (148..156).contains(&at) { 32 } else { u64::from(byte) })
        .sum();
    octal(&header[148..156]) == Some(sum)
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field.split(|&byte| byte == 0).next().unwrap()).into_owned()
}

/// Members of the layer archive `tar`, in Go's plain ustar form.
pub fn members(tar: &[u8], report: &mut Report) -> Vec<Member> {
    let mut members = Vec::new();
    let mut at = 0;
    loop {
        let Some(header) = tar.get(at..at + 512) else {
            report.hold("archive.ends-with-two-zero-blocks", false, || format!("byte {at}"));
            return members;
        };
        if is_zero(header) {
            let rest = &tar[at..];
            report.hold(
                "archive.ends-with-two-zero-blocks",
                rest.len() == 1024 && is_zero(rest),
                || format!("{} bytes from byte {at}", rest.len()),
            );
            return members;
        }
        let name = text(&header[..100]);
        let detail = || format!("{name:?} at byte {at}");
        report.hold("archive.header-checksum", checksum_holds(header), detail);
        report.hold("archive.header-is-ustar", &header[257..265] == b"ustar\x0000", detail);
        report.hold("archive.member-is-regular", header[156] == b'0', detail);
        report.hold("archive.mode-is-0644", octal(&header[100..108]) == Some(0o644), detail);
        let zero = [108..116, 116..124, 136..148, 329..337, 337..345]
            .iter()
            .all(|range| octal(&header[range.clone()]) == Some(0));
        let empty =
            is_zero(&header[157..257]) && is_zero(&header[265..329]) && is_zero(&header[345..]);
        report.hold("archive.other-fields-are-zero", zero && empty, detail);
        let Some(size) = octal(&header[124..136]) else {
            report.hold("archive.member-lies-inside", false, detail);
            return members;
        };
        let end = at as u64 + 512 + size;
        if !report.hold("archive.member-lies-inside", end <= tar.len() as u64, detail) {
            return members;
        }
        let data = tar[at + 512..end as usize].to_vec();
        let next = (end as usize).next_multiple_of(512).min(tar.len());
        report.hold("archive.padding-is-zero", is_zero(&tar[end as usize..next]), detail);
        members.push(Member { name, data });
        at = next;
    }
}

/// Wrapping of a layer file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapped {
    /// Not at all.
    Bare,
    /// pax header, then the member: form A.
    Pax,
    /// One header: form B.
    Ustar,
}

/// The layer in `file`, without its tar if it is in one (spec zfile 8).
pub fn unwrap<'a>(file: &'a [u8], report: &mut Report) -> (&'a [u8], Wrapped) {
    if file.len() < 512 || &file[257..262] != b"ustar" || &file[263..265] != b"00" {
        return (file, Wrapped::Bare);
    }
    let header = &file[..512];
    if !report.hold("wrap.header-checksum", checksum_holds(header), || "the first header".into()) {
        return (file, Wrapped::Bare); // upstream does not treat such a file as a tar
    }
    let (from, size, form) = if header[156] == b'x' {
        let len = octal(&header[124..136]).unwrap_or(u64::MAX);
        if !report.hold("wrap.pax-record-fits-a-block", len <= 512 && file.len() >= 1536, || {
            len.to_string()
        }) {
            return (file, Wrapped::Bare);
        }
        let record = String::from_utf8_lossy(&file[512..512 + len as usize]).into_owned();
        let size = record
            .strip_suffix('\n')
            .and_then(|r| r.strip_prefix(&format!("{len} size="))?.parse().ok());
        report.hold("wrap.pax-record-is-the-size", size.is_some(), || record.clone());
        report.hold("wrap.pax-padding-is-zero", is_zero(&file[512 + len as usize..1024]), || {
            "pax".into()
        });
        report.hold("wrap.header-checksum", checksum_holds(&file[1024..1536]), || {
            "the second header".into()
        });
        report.hold(
            "wrap.member-is-overlaybd-commit",
            text(&file[1024..1124]) == "overlaybd.commit",
            || text(&file[1024..1124]),
        );
        (1536_usize, size.unwrap_or(0), Wrapped::Pax)
    } else {
        report.hold(
            "wrap.member-is-overlaybd-commit",
            text(&header[..100]) == "overlaybd.commit",
            || text(&header[..100]),
        );
        (512_usize, octal(&header[124..136]).unwrap_or(0), Wrapped::Ustar)
    };
    let end = from as u64 + size;
    let whole = end.next_multiple_of(512) + 1024 == file.len() as u64;
    if !report.hold("wrap.member-and-two-zero-blocks-are-all", whole, || {
        format!("{size} bytes of {}", file.len())
    }) {
        return (file.get(from..end as usize).unwrap_or_default(), form);
    }
    report.hold("wrap.tail-is-zero", is_zero(&file[end as usize..]), || format!("from byte {end}"));
    (&file[from..end as usize], form)
}
