//! Parses the text of a configuration to values. Each key is taken once; the remaining keys are unknown.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::{Map, Value};

use super::{Config, Download, Lower, Upper};
use crate::DiskError;

/// Remarks about the configuration.
#[derive(Default)]
struct Notes {
    warnings: RefCell<Vec<String>>,
    /// Paths of all keys that were asked for, with `[]` for any element.
    known: RefCell<Vec<String>>,
}

/// An object of the configuration; its keys are taken one by one.
struct Object {
    file: String,
    /// Path of the object: empty, or `lowers[2].`.
    path: String,
    map: Map<String, Value>,
    notes: Rc<Notes>,
}

impl Object {
    fn remove(&mut self, key: &str) -> Option<Value> {
        if cfg!(test) {
            self.notes.known.borrow_mut().push(format!("{}{key}", self.path));
        }
        self.map.remove(key)
    }

    fn warn(&self, key: &str, rule: &str) {
        let (path, file) = (&self.path, &self.file);
        self.notes.warnings.borrow_mut().push(format!("Key {path}{key} of {file} is {rule}"));
    }

    fn error(&self, key: &str, rule: String) -> DiskError {
        DiskError::Config { file: self.file.clone(), key: format!("{}{key}", self.path), rule }
    }

    fn wrong_type(&self, key: &str, wanted: &str, found: &Value) -> DiskError {
        let found = match found {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        self.error(key, format!("it must be {wanted}, not {found}"))
    }

    fn string(&mut self, key: &str) -> Result<String, DiskError> {
        match self.remove(key) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(self.wrong_type(key, "a string", &other)),
        }
    }

    fn u64(&mut self, key: &str) -> Result<u64, DiskError> {
        match self.remove(key) {
            None => Ok(0),
            Some(value) => {
                value.as_u64().ok_or_else(|| self.wrong_type(key, "a whole number", &value))
            }
        }
    }

    fn bool(&mut self, key: &str) -> Result<bool, DiskError> {
        match self.remove(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(self.wrong_type(key, "true or false", &other)),
        }
    }

    fn object(&mut self, key: &str) -> Result<Option<Object>, DiskError> {
        match self.remove(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Object {
                file: self.file.clone(),
                path: format!("{}{key}.", self.path),
                map,
                notes: self.notes.clone(),
            })),
            Some(other) => Err(self.wrong_type(key, "an object", &other)),
        }
    }

    fn objects(&mut self, key: &str) -> Result<Vec<Object>, DiskError> {
        let values = match self.remove(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.wrong_type(key, "an array", &other)),
        };
        let element = |(number, value)| {
            let key = format!("{key}[{number}]");
            match value {
                Value::Object(map) => Ok(Object {
                    file: self.file.clone(),
                    path: format!("{}{key}.", self.path),
                    map,
                    notes: self.notes.clone(),
                }),
                other => Err(self.wrong_type(&key, "an object", &other)),
            }
        };
        values.into_iter().enumerate().map(element).collect()
    }

    /// Warns of a key that is set and changes nothing. Call it before the key is taken.
    fn without_effect(&self, key: &str) {
        if self.map.contains_key(key) {
            self.warn(key, "accepted, without effect here");
        }
    }

    /// Warns of keys that were not taken.
    fn end(self) {
        for key in self.map.keys() {
            self.warn(key, "unknown and ignored");
        }
    }
}

impl Config {
    /// Reads a configuration; `file` is its name for messages. Warnings are logged.
    ///
    /// # Errors
    /// [`DiskError::Config`] with the key, or if the text is not JSON.
    pub fn parse(text: &str, file: &str) -> Result<Self, DiskError> {
        let notes = Rc::<Notes>::default();
        let config = Self::take(text, file, &notes)?;
        for warning in notes.warnings.take() {
            tracing::warn!("{warning}");
        }
        Ok(config)
    }

    fn take(text: &str, file: &str, notes: &Rc<Notes>) -> Result<Self, DiskError> {
        let whole = |rule: String| DiskError::Config {
            file: file.to_owned(),
            key: "(all)".to_owned(),
            rule,
        };
        let map = match serde_json::from_str(text) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(whole("it must be an object".to_owned())),
            Err(error) => return Err(whole(format!("it is not JSON: {error}"))),
        };
        let (path, notes) = (String::new(), notes.clone());
        let mut object = Object { file: file.to_owned(), path, map, notes };
        let config = Self {
            repo_blob_url: object.string("repoBlobUrl")?,
            lowers: object
                .objects("lowers")?
                .into_iter()
                .map(Lower::take)
                .collect::<Result<_, _>>()?,
            upper: object.object("upper")?.map(Upper::take).transpose()?.unwrap_or_default(),
            result_file: object.string("resultFile")?,
            download: object.object("download")?.map(Download::take).transpose()?,
            acceleration_layer: object.bool("accelerationLayer")?,
            record_trace_path: object.string("recordTracePath")?,
        };
        object.end();
        Ok(config)
    }
}

impl Lower {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        let lower = Self {
            file: object.string("file")?,
            dir: object.string("dir")?,
            digest: object.string("digest")?,
            size: object.u64("size")?,
            target_file: object.string("targetFile")?,
            target_digest: object.string("targetDigest")?,
            gzip_index: object.string("gzipIndex")?,
            gzip_sidecar: object.string("gzipSidecar")?,
        };
        object.end();
        Ok(lower)
    }
}

/// Seconds of a wait, and megabytes a second, at most: a year, and what a u64 holds in bytes.
const LONGEST_WAIT: u64 = 365 * 86_400;
const MOST_MBPS: u64 = u64::MAX >> 20;

impl Download {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        let enable = match object.map.get("enable") {
            None => None,
            Some(_) => Some(object.bool("enable")?),
        };
        let mut number = |key: &str, most: u64| match object.map.get(key) {
            None => Ok(None),
            Some(_) => match object.u64(key)? {
                number if number > most => {
                    Err(object.error(key, format!("it is at most {most}, not {number}")))
                }
                number => Ok(Some(number)),
            },
        };
        let download = Self {
            enable,
            delay: number("delay", LONGEST_WAIT)?,
            delay_extra: number("delayExtra", LONGEST_WAIT)?,
            max_mbps: number("maxMBps", MOST_MBPS)?,
            tries: number("tryCnt", u64::MAX)?,
            block_size: number("blockSize", u64::MAX)?,
        };
        object.end();
        Ok(download)
    }
}

impl Upper {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        // The snapshotter writes a size; upstream does not read it either. The layer says how large it is.
        object.without_effect("vsize");
        object.remove("vsize");
        // With upper.target the configuration is refused, and without it there is nothing that it is an index of.
        object.without_effect("gzipIndex");
        let upper = Self {
            index: object.string("index")?,
            data: object.string("data")?,
            target: object.string("target")?,
            gzip_index: object.string("gzipIndex")?,
        };
        object.end();
        Ok(upper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of the page's table of a device config: key, and what it means.
    fn page() -> Vec<(String, String)> {
        let page = include_str!("../../../CONFIG.md").split("## Device config").nth(1).unwrap();
        let rows = page.lines().filter(|line| line.starts_with("| `"));
        rows.map(|row| {
            let mut cells = row.trim_matches('|').split('|').map(str::trim);
            let key = cells.next().unwrap().trim_matches('`').to_owned();
            (key, cells.next_back().unwrap_or_default().to_owned())
        })
        .collect()
    }

    /// A value that the key may have.
    fn value(key: &str) -> &'static str {
        match key.rsplit('.').next().unwrap() {
            "size" | "vsize" | "delay" | "delayExtra" | "maxMBps" | "tryCnt" | "blockSize" => "7",
            "enable" | "accelerationLayer" => "true",
            "lowers[]" => "[]",
            _ => "\"a\"",
        }
    }

    /// A configuration in which these keys are set.
    fn with(keys: &[&str]) -> String {
        let inside = |section: &str| {
            let keys = keys.iter().filter_map(|key| Some((key, key.strip_prefix(section)?)));
            let keys: Vec<_> =
                keys.map(|(key, name)| format!("\"{name}\": {}", value(key))).collect();
            (!keys.is_empty()).then(|| format!("{{{}}}", keys.join(", ")))
        };
        let mut parts = Vec::new();
        parts.extend(inside("lowers[].").map(|lower| format!("\"lowers\": [{lower}]")));
        for section in ["upper", "download"] {
            let object = inside(&format!("{section}."));
            parts.extend(object.map(|object| format!("\"{section}\": {object}")));
        }
        for key in keys.iter().filter(|key| !key.contains('.') && !key.contains('[')) {
            parts.push(format!("\"{key}\": {}", value(key)));
        }
        format!("{{{}}}", parts.join(", "))
    }

    #[test]
    fn every_key_of_the_page_is_known_and_every_known_key_is_in_the_page() {
        let page = page();
        let keys: Vec<&str> = page.iter().map(|(key, _)| key.as_str()).collect();
        let notes = Rc::<Notes>::default();
        Config::take(&with(&keys), "c.json", &notes).unwrap();
        let mut known: Vec<String> =
            notes.known.take().into_iter().map(|key| key.replace("[0]", "[]")).collect();
        known.iter_mut().filter(|key| *key == "lowers").for_each(|key| key.push_str("[]"));
        // The sections have rows for their keys.
        known.retain(|key| key != "upper" && key != "download");
        known.sort();
        known.dedup();
        let mut written = keys;
        written.sort_unstable();
        assert_eq!(known, written);
        let unknown: Vec<_> = notes.warnings.take();
        assert!(!unknown.iter().any(|warning| warning.contains("unknown")), "{unknown:?}");
    }

    #[test]
    fn each_key_changes_the_configuration_or_is_said_to_have_no_effect() {
        for (key, meaning) in page().iter().filter(|(key, _)| key != "lowers[]") {
            let notes = Rc::<Notes>::default();
            let config = Config::take(&with(&[key]), "c.json", &notes).unwrap();
            // What an empty section is, with no key in it.
            let empty = with(&[key]).split_once(": ").map(|(section, _)| match section {
                "{\"lowers\"" => r#"{"lowers": [{}]}"#,
                "{\"download\"" => r#"{"download": {}}"#,
                _ => "{}",
            });
            let empty = Config::take(empty.unwrap(), "c.json", &Rc::default()).unwrap();
            let path = key.replace("[]", "[0]");
            let warning = format!("Key {path} of c.json is accepted, without effect here");
            let expected = meaning.starts_with("accepted, without effect here");
            assert_eq!(notes.warnings.take(), Vec::from_iter(expected.then_some(warning)));
            assert!(expected || config != empty, "{key} changes nothing, and nothing says so");
        }
    }

    #[test]
    fn a_wait_that_cannot_be_meant_is_an_error_that_names_the_key() {
        let error = Config::parse(r#"{"download": {"delay": 18446744073709551615}}"#, "c.json");
        assert_eq!(
            error.unwrap_err().to_string(),
            "Key download.delay of c.json is invalid: it is at most 31536000, not 18446744073709551615"
        );
        assert!(Config::parse(r#"{"download": {"maxMBps": 17592186044416}}"#, "c.json").is_err());
    }

    #[test]
    fn a_wrong_type_is_an_error_that_names_the_key_and_an_unknown_key_is_none() {
        let parse = |text| Config::parse(text, "c.json");
        let config = parse(
            r#"{"lowers": [{"file": "a", "size": 5, "new": 1}], "upper": {"vsize": 64}, "x": []}"#,
        );
        assert_eq!(
            config.unwrap().lowers,
            [Lower { file: "a".into(), size: 5, ..Lower::default() }]
        );
        let cases = [
            (
                r#"{"lowers": [{}, {"size": "5"}]}"#,
                "Key lowers[1].size of c.json is invalid: it must be a whole number, not a string",
            ),
            (
                r#"{"lowers": [7]}"#,
                "Key lowers[0] of c.json is invalid: it must be an object, not a number",
            ),
            (
                r#"{"lowers": {}}"#,
                "Key lowers of c.json is invalid: it must be an array, not an object",
            ),
            (
                r#"{"upper": {"data": null}}"#,
                "Key upper.data of c.json is invalid: it must be a string, not null",
            ),
            (
                r#"{"accelerationLayer": 1}"#,
                "Key accelerationLayer of c.json is invalid: it must be true or false, not a number",
            ),
            ("[]", "Key (all) of c.json is invalid: it must be an object"),
        ];
        for (text, message) in cases {
            assert_eq!(parse(text).unwrap_err().to_string(), message);
        }
        assert!(parse("{").is_err());
    }
}
