//! The image config: JSON with the settings to run the image, and the digests of its unpacked layers.
//!
//! A converted image has other layers, so `rootfs.diff_ids` must change, and all else must stay. Upstream
//! reads the config into a structure and writes that again; it loses the fields that the structure lacks
//! (health checks, `OnBuild`, `Shell`). Here the config stays *text*. The array is found in the text and
//! replaced. Every other byte is kept: order, blanks, numbers of any size.

use std::ops::Range;

use serde_json::Value;
use thiserror::Error;

use crate::oci::digest::{Digest, DigestError};
use crate::oci::manifest::{DOCUMENT_LIMIT, Platform};

/// Reasons to refuse a config.
#[derive(Debug, Error)]
pub enum ImageConfigError {
    /// Larger than [`DOCUMENT_LIMIT`].
    #[error("The image config has {0} bytes; at most {DOCUMENT_LIMIT} are read")]
    Large(usize),
    /// Not JSON.
    #[error("The image config is not JSON text")]
    Json(#[source] serde_json::Error),
    /// A field that is missing, repeated or of the wrong type.
    #[error("The image config has no usable {field}: {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// The fault.
        reason: &'static str,
    },
    /// An entry that is not a digest.
    #[error("The image config has a bad entry in rootfs.diff_ids")]
    DiffId(#[source] DigestError),
}

/// An image config.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    text: String,
    value: Value,
    diff_ids: Vec<Digest>,
    /// Range of the array of digests in the text.
    place: Range<usize>,
}

impl ImageConfig {
    /// Reads a config.
    ///
    /// # Errors
    /// [`ImageConfigError`], also if `rootfs.diff_ids` occurs twice: readers would disagree on which one counts.
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageConfigError> {
        if bytes.len() as u64 > DOCUMENT_LIMIT {
            return Err(ImageConfigError::Large(bytes.len()));
        }
        let value: Value = serde_json::from_slice(bytes).map_err(ImageConfigError::Json)?;
        let field = |reason| ImageConfigError::Field { field: "rootfs.diff_ids", reason };
        let text = String::from_utf8(bytes.to_vec()).map_err(|_| field("the text is not UTF-8"))?;
        let whole = 0..text.len();
        let rootfs = member(&text, whole, "rootfs").map_err(field)?;
        let place = member(&text, rootfs, "diff_ids").map_err(field)?;
        let listed = value
            .pointer("/rootfs/diff_ids")
            .and_then(Value::as_array)
            .ok_or(field("it is not an array"))?;
        let mut diff_ids = Vec::with_capacity(listed.len());
        for id in listed {
            let id = id.as_str().ok_or(field("an entry is not text"))?;
            diff_ids.push(id.parse().map_err(ImageConfigError::DiffId)?);
        }
        Ok(Self { text, value, diff_ids, place })
    }

    /// The digests of the unpacked layers, lowest first.
    #[must_use]
    pub fn diff_ids(&self) -> &[Digest] {
        &self.diff_ids
    }

    /// The config as read.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.text.as_bytes()
    }

    /// The config as a JSON value, for access to other fields.
    #[must_use]
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The platform, if the config names one.
    #[must_use]
    pub fn platform(&self) -> Option<Platform> {
        let text =
            |key: &str| self.value.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        Some(Platform::new(text("os")?, text("architecture")?, text("variant")))
    }

    /// The bytes of this config with other layers. Every byte outside `rootfs.diff_ids` is kept.
    #[must_use]
    pub fn with_diff_ids(&self, diff_ids: &[Digest]) -> Vec<u8> {
        let quoted: Vec<String> = diff_ids.iter().map(|id| format!("\"{id}\"")).collect();
        let (before, after) = (&self.text[..self.place.start], &self.text[self.place.end..]);
        format!("{before}[{}]{after}", quoted.join(",")).into_bytes()
    }
}

impl ImageConfig {
    /// The bytes of this config with one more layer on top, and one more entry of its history if it has one.
    /// Every other byte is kept.
    #[must_use]
    pub fn with_layer(&self, diff_id: Digest, history: &Value) -> Vec<u8> {
        let mut diff_ids = self.diff_ids.clone();
        diff_ids.push(diff_id);
        let bytes = self.with_diff_ids(&diff_ids);
        // The bytes were text before, so the edited bytes are text too.
        let Ok(text) = String::from_utf8(bytes.clone()) else { return bytes };
        let Ok(place) = member(&text, 0..text.len(), "history") else { return bytes };
        let Some(list) = text[place.clone()].strip_suffix(']').filter(|list| list.starts_with('['))
        else {
            return bytes;
        };
        let comma = if list[1..].trim().is_empty() { "" } else { "," };
        let end = place.start + list.len();
        format!("{}{comma}{history}{}", &text[..end], &text[end..]).into_bytes()
    }
}

/// Range of the value of `key` in the JSON object that spans `object`, in text already known to be JSON.
fn member(text: &str, object: Range<usize>, key: &str) -> Result<Range<usize>, &'static str> {
    let mut scanner = JsonScanner { text: text.as_bytes(), at: object.start };
    if scanner.peek() != Some(b'{') {
        return Err("it is not within an object");
    }
    scanner.at += 1;
    let mut found = None;
    while scanner.peek().is_some_and(|byte| byte != b'}') {
        if scanner.peek() == Some(b',') {
            scanner.at += 1;
            continue;
        }
        let name = scanner.value();
        // The colon.
        scanner.peek();
        scanner.at += 1;
        let value = scanner.value();
        // A key may be written with escapes.
        let name: String =
            serde_json::from_str(text.get(name).unwrap_or_default()).unwrap_or_default();
        if name == key && found.replace(value).is_some() {
            return Err("it occurs twice");
        }
    }
    found.ok_or("it is missing")
}

/// Finds the ends of values in JSON that has been checked before. On other text its answers are wrong, but it
/// always moves on and never leaves the text.
struct JsonScanner<'a> {
    text: &'a [u8],
    at: usize,
}

impl JsonScanner<'_> {
    /// The next byte that is not blank.
    fn peek(&mut self) -> Option<u8> {
        while matches!(self.text.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    /// The range of the next value.
    fn value(&mut self) -> Range<usize> {
        let first = self.peek();
        let start = self.at.min(self.text.len());
        match first {
            Some(b'"') => self.string(),
            Some(b'{' | b'[') => {
                let mut depth = 0usize;
                while let Some(&byte) = self.text.get(self.at) {
                    match byte {
                        b'"' => self.string(),
                        _ => self.at += 1,
                    }
                    match byte {
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            _ => {
                while self.text.get(self.at).is_some_and(|byte| !b",}] \t\r\n".contains(byte)) {
                    self.at += 1;
                }
            }
        }
        start..self.at.min(self.text.len())
    }

    /// Skips a string.
    fn string(&mut self) {
        self.at += 1;
        while let Some(&byte) = self.text.get(self.at) {
            self.at += if byte == b'\\' { 2 } else { 1 };
            if byte == b'"' {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(rootfs: &str) -> String {
        format!(
            "{{ \"architecture\":\"amd64\",\t\"os\": \"linux\",\n \"decoy\":\"rootfs\\\"{{\", \"n\": [1e400, -0.10, 123456789012345678901234567890],\n\
             \"config\":{{\"Healthcheck\":{{\"Test\":[\"a}}]\"]}}, \"rootfs\":1}}, {rootfs} , \"last\":\"<&\\u00e9\"}}\n"
        )
    }

    #[test]
    fn only_the_array_changes_and_every_other_byte_stays() {
        let (old, new) = (Digest::of(b"old"), [Digest::of(b"1"), Digest::of(b"2")]);
        let array = format!("[ \"{old}\" ]");
        let text = config(&format!(
            "\"rootfs\" : {{\"type\":\"layers\",\"diff_ids\":{array}, \"x\":{{}}}}"
        ))
        .replace("1e400", "1e40");
        let parsed = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(parsed.diff_ids(), [old]);
        assert_eq!(parsed.platform().unwrap().to_string(), "linux/amd64");
        let expected = text.replace(&array, &format!("[\"{}\",\"{}\"]", new[0], new[1]));
        let written = parsed.with_diff_ids(&new);
        assert_eq!(String::from_utf8(written.clone()).unwrap(), expected);
        assert_eq!(ImageConfig::parse(&written).unwrap().diff_ids(), new);
        // Keys may be escaped.
        let escaped = text.replace("\"rootfs\" :", "\"root\\u0066s\" :");
        assert_eq!(ImageConfig::parse(escaped.as_bytes()).unwrap().diff_ids(), [old]);
    }

    #[test]
    fn a_config_without_one_list_of_layers_is_refused() {
        for rootfs in [
            "\"x\":1",
            "\"rootfs\":1",
            "\"rootfs\":{}",
            "\"rootfs\":{\"diff_ids\":1}",
            "\"rootfs\":{\"diff_ids\":[1]}",
            "\"rootfs\":{\"diff_ids\":[\"x\"]}",
            "\"rootfs\":{\"diff_ids\":[],\"diff_ids\":[]}",
            "\"rootfs\":{\"diff_ids\":[]},\"rootfs\":{\"diff_ids\":[]}",
        ] {
            assert!(
                ImageConfig::parse(config(rootfs).replace("1e400", "1").as_bytes()).is_err(),
                "{rootfs}"
            );
        }
        for text in ["", "[]", "null", "{}", "{", "\"rootfs\""] {
            assert!(ImageConfig::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn the_scanner_never_leaves_the_text(text in "[\\[\\]{}\",:a\\\\ ]{0,40}") {
            let _ = member(&text, 0..text.len(), "a");
        }
    }
}
