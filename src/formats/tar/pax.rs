//! Pax records: `LENGTH KEY=VALUE\n`, repeated.
//!
//! The decimal length counts its own digits too, so a value can contain any byte, newlines and NULs included.
//! An empty value cancels the value of an earlier header; an extended attribute is an exception, it can be
//! empty. POSIX `pax` defines the standard keys; `SCHILY.xattr.NAME` holds an extended attribute as raw
//! bytes, `LIBARCHIVE.xattr.NAME` the same with a URL-encoded name and a base64 value, `GNU.sparse.*` a
//! sparse map.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use crate::tar::Timestamp;

const SCHILY_XATTR: &[u8] = b"SCHILY.xattr.";
const LIBARCHIVE_XATTR: &[u8] = b"LIBARCHIVE.xattr.";

/// Keys allowed in a global header. Attributes and sparse maps belong to one file, and other keys have no
/// meaning here.
const GLOBAL_KEYS: [&[u8]; 6] = [b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"];

/// Extended attributes: name and value.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// libarchive writes no padding; other writers may.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A fault in pax records: the key (empty if unknown) and the broken rule.
pub(super) struct PaxError {
    pub(super) key: String,
    pub(super) reason: String,
}

impl PaxError {
    pub(super) fn new(key: &[u8], reason: impl Into<String>) -> Self {
        Self { key: format!("pax record {}", String::from_utf8_lossy(key)), reason: reason.into() }
    }
}

/// The records that apply to an entry.
#[derive(Clone, Default)]
pub(super) struct Records {
    /// Shared, so that the records of a global header cost little per entry.
    values: BTreeMap<Vec<u8>, Arc<[u8]>>,
    /// Keys of extended attributes in the order of their records.
    xattr_keys: Vec<Vec<u8>>,
    /// `GNU.sparse.offset` and `.numbytes`, which repeat (sparse format 0.0), in order.
    pub(super) sparse_pairs: Vec<u64>,
}

impl Records {
    /// Adds the records of an extended header, which override the present ones.
    pub(super) fn merge(&mut self, payload: &[u8]) -> Result<(), PaxError> {
        self.merge_if(payload, |_| true)
    }

    /// Adds the records of a global header, which apply to all entries that follow.
    pub(super) fn merge_global(&mut self, payload: &[u8]) -> Result<(), PaxError> {
        self.merge_if(payload, |key| GLOBAL_KEYS.contains(&key))
    }

    fn merge_if(
        &mut self,
        mut payload: &[u8],
        is_wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<(), PaxError> {
        while !payload.is_empty() {
            let PaxRecord { key, value, rest } = PaxRecord::split(payload)?;
            if is_wanted(key) {
                self.insert(key, value)?;
            }
            payload = rest;
        }
        Ok(())
    }

    fn insert(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        let is_xattr = key.starts_with(SCHILY_XATTR) || key.starts_with(LIBARCHIVE_XATTR);
        match key {
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                // The two halves of a pair alternate; another order has no meaning.
                let expects_offset = self.sparse_pairs.len().is_multiple_of(2);
                if expects_offset != (key == b"GNU.sparse.offset") {
                    return Err(PaxError::new(key, "offsets and lengths do not alternate"));
                }
                self.sparse_pairs.push(decimal(key, value)?);
            }
            _ if value.is_empty() && !is_xattr => {
                self.values.remove(key);
            }
            _ => {
                if is_xattr && !self.values.contains_key(key) {
                    self.xattr_keys.push(key.to_vec());
                }
                self.values.insert(key.to_vec(), value.into());
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.values.get(key.as_bytes()).map(AsRef::as_ref)
    }

    /// A number of at most 63 bits.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, PaxError> {
        self.get(key).map(|value| decimal(key.as_bytes(), value)).transpose()
    }

    pub(super) fn time(&self, key: &str) -> Result<Option<Timestamp>, PaxError> {
        let parse = |value| {
            time(value).ok_or_else(|| PaxError::new(key.as_bytes(), "it is not a decimal time"))
        };
        self.get(key).map(parse).transpose()
    }

    /// A name or link target: no NUL.
    pub(super) fn path(&self, key: &str) -> Result<Option<Vec<u8>>, PaxError> {
        match self.get(key) {
            Some(value) if value.contains(&0) => {
                Err(PaxError::new(key.as_bytes(), "it contains a NUL byte"))
            }
            value => Ok(value.map(<[u8]>::to_vec)),
        }
    }

    /// The extended attributes. An attribute often has both spellings (bsdtar writes both); the raw one
    /// counts, because containerd reads only that one.
    pub(super) fn xattrs(&self) -> Result<Xattrs, PaxError> {
        let mut xattrs = Xattrs::with_capacity(self.xattr_keys.len());
        let mut places: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        for key in &self.xattr_keys {
            let Some(value) = self.values.get(key) else { continue };
            let (name, value) = if let Some(name) = key.strip_prefix(SCHILY_XATTR) {
                (name.to_vec(), value.to_vec())
            } else {
                let name = url_decoded(key.strip_prefix(LIBARCHIVE_XATTR).unwrap_or_default());
                if self.values.contains_key(&[SCHILY_XATTR, &name].concat()) {
                    continue;
                }
                let value = BASE64
                    .decode(value)
                    .map_err(|_| PaxError::new(key, "its value is not base64"))?;
                (name, value)
            };
            if name.is_empty() || name.contains(&0) {
                return Err(PaxError::new(key, "it names no attribute"));
            }
            match places.get(&name).and_then(|&place| xattrs.get_mut(place)) {
                Some(known) => known.1 = value,
                None => {
                    places.insert(name.clone(), xattrs.len());
                    xattrs.push((name, value));
                }
            }
        }
        Ok(xattrs)
    }
}

/// A record, and the bytes behind it.
struct PaxRecord<'a> {
    key: &'a [u8],
    value: &'a [u8],
    rest: &'a [u8],
}

impl<'a> PaxRecord<'a> {
    fn split(payload: &'a [u8]) -> Result<Self, PaxError> {
        let bad = |reason: &str| PaxError::new(b"", reason);
        let blank = payload.iter().take(20).position(|&byte| byte == b' ');
        let blank =
            blank.ok_or_else(|| bad("a record does not start with its length and a blank"))?;
        let len = decimal(b"", &payload[..blank])?;
        let len = usize::try_from(len).ok().filter(|&len| len > blank + 1 && len <= payload.len());
        let len = len.ok_or_else(|| bad("a record is longer than its header"))?;
        let (record, rest) = payload.split_at(len);
        let (body, end) = record[blank + 1..].split_at(len - blank - 2);
        if end != b"\n" {
            return Err(bad("a record does not end with a newline where its length says"));
        }
        let equals = body.iter().position(|&byte| byte == b'=');
        let equals = equals.filter(|&at| at > 0).ok_or_else(|| bad("a record has no key"))?;
        let (key, value) = (&body[..equals], &body[equals + 1..]);
        if key.contains(&0) {
            return Err(bad("a key contains a NUL byte"));
        }
        Ok(Self { key, value, rest })
    }
}

/// An unsigned decimal number of at most 63 bits, digits only.
pub(super) fn decimal(key: &[u8], text: &[u8]) -> Result<u64, PaxError> {
    let bad = || PaxError::new(key, "it is not a decimal number of at most 63 bits");
    if text.is_empty() || text.len() > 19 || !text.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let value = text.iter().fold(0u64, |value, digit| value * 10 + u64::from(digit - b'0'));
    i64::try_from(value).map(i64::cast_unsigned).map_err(|_| bad())
}

/// `[-]SECONDS[.FRACTION]`, truncated (not rounded) to nanoseconds.
fn time(text: &[u8]) -> Option<Timestamp> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let secs = i64::try_from(decimal(b"", parts.next()?).ok()?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0u32, |nanos, at| {
        nanos * 10 + fraction.get(at).map_or(0, |digit| u32::from(digit - b'0'))
    });
    Some(match (negative, nanos) {
        (false, nanos) => Timestamp { secs, nanos },
        (true, 0) => Timestamp { secs: -secs, nanos: 0 },
        // -1.25 s is 0.75 s after -2 s.
        (true, nanos) => Timestamp { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

/// Decodes `%41` to `A`; other text stays unchanged.
fn url_decoded(text: &[u8]) -> Vec<u8> {
    percent_encoding::percent_decode(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let len = (1..).find(|digits| (body.len() + digits).to_string().len() == *digits).unwrap()
            + body.len();
        [len.to_string().as_bytes(), &body].concat()
    }

    #[test]
    fn a_time_before_1970_counts_its_fraction_forward() {
        let at = |text: &str| time(text.as_bytes()).map(|time| (time.secs, time.nanos));
        assert_eq!(at("1700000000.25"), Some((1_700_000_000, 250_000_000)));
        assert_eq!(at("1.1234567899"), Some((1, 123_456_789)));
        assert_eq!(at("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(at("-7"), Some((-7, 0)));
        assert_eq!(at("5."), Some((5, 0)));
        for bad in ["", "-", "1.-5", "--1", "1e3", "+1", " 1", "99999999999999999999"] {
            assert_eq!(at(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_empty_value_withdraws_a_record_but_an_attribute_may_be_empty() {
        let mut records = Records::default();
        let payload =
            [record("path", b"a"), record("path", b""), record("SCHILY.xattr.user.e", b"")]
                .concat();
        assert!(records.merge(&payload).is_ok());
        assert_eq!(records.get("path"), None);
        assert_eq!(records.xattrs().ok().unwrap(), [(b"user.e".to_vec(), vec![])]);
    }

    #[test]
    fn the_raw_spelling_of_an_attribute_beats_the_encoded_one() {
        let mut records = Records::default();
        let payload = [
            record("LIBARCHIVE.xattr.user.a%20b", b"eHg"),
            record("LIBARCHIVE.xattr.user.c", b"eHg="),
            record("SCHILY.xattr.user.c", b"raw\0"),
        ];
        assert!(records.merge(&payload.concat()).is_ok());
        let expected =
            [(b"user.a b".to_vec(), b"xx".to_vec()), (b"user.c".to_vec(), b"raw\0".to_vec())];
        assert_eq!(records.xattrs().ok().unwrap(), expected);
    }

    #[test]
    fn a_malformed_record_is_refused() {
        for bad in [
            "x",
            "6 a=b",
            "5 a=b\n",
            "7 a=b\n",
            "6a=b\n",
            "4 =\n",
            "3 \n",
            "999999999999999999999 a=b\n",
            "0 ",
        ] {
            assert!(Records::default().merge(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(Records::default().merge(b"6 a=b\n").is_ok());
    }
}
