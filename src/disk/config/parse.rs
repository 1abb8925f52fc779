//! Parses the text of a configuration to values. Each key is taken once; the remaining keys are unknown.

use formats::json::{JsonError, Notes};

use super::{DeviceConfig, DeviceDownload, LowerConfig, UpperConfig};
use crate::DiskError;

type Object<'a> = formats::json::Object<'a, DiskError>;

impl From<JsonError> for DiskError {
    fn from(error: JsonError) -> Self {
        match error {
            JsonError::NotAnObject { file, rule } => {
                let rule = format!("it is not a JSON object: {rule}");
                Self::Config { file, key: "(all)".to_owned(), rule }
            }
            JsonError::Key { file, key, rule } => Self::Config { file, key, rule },
        }
    }
}

impl DeviceConfig {
    /// Reads a configuration; `file` is its name for messages. Warnings are logged.
    ///
    /// # Errors
    /// [`DiskError::Config`] with the key, or if the text is not JSON.
    pub fn parse(text: &str, file: &str) -> Result<Self, DiskError> {
        let notes = Notes::default();
        let config = Self::take(text, file, &notes)?;
        for warning in notes.into_warnings() {
            tracing::warn!("{warning}");
        }
        Ok(config)
    }

    fn take(text: &str, file: &str, notes: &Notes) -> Result<Self, DiskError> {
        let mut object = Object::parse(text, file, notes)?;
        let config = Self {
            repo_blob_url: string(&mut object, "repoBlobUrl")?,
            lowers: object
                .sections("lowers")?
                .into_iter()
                .map(LowerConfig::take)
                .collect::<Result<_, _>>()?,
            upper: UpperConfig::take(object.section("upper")?)?,
            result_file: string(&mut object, "resultFile")?,
            download: DeviceDownload::take(object.section("download")?)?,
            acceleration_layer: object.bool("accelerationLayer")?.unwrap_or_default(),
            record_trace_path: string(&mut object, "recordTracePath")?,
        };
        object.end();
        Ok(config)
    }
}

/// A text; an absent one is empty.
fn string(object: &mut Object<'_>, key: &str) -> Result<String, DiskError> {
    Ok(object.text(key)?.unwrap_or_default())
}

impl LowerConfig {
    fn take(mut object: Object<'_>) -> Result<Self, DiskError> {
        let lower = Self {
            file: string(&mut object, "file")?,
            dir: string(&mut object, "dir")?,
            digest: string(&mut object, "digest")?,
            size: object.number("size")?.unwrap_or_default(),
            target_file: string(&mut object, "targetFile")?,
            target_digest: string(&mut object, "targetDigest")?,
            gzip_index: string(&mut object, "gzipIndex")?,
            gzip_sidecar: string(&mut object, "gzipSidecar")?,
        };
        object.end();
        Ok(lower)
    }
}

/// Seconds of a wait, and megabytes a second, at most: a year, and what a u64 holds in bytes.
const LONGEST_WAIT: u64 = 365 * 86_400;
const MOST_MBPS: u64 = u64::MAX >> 20;

impl DeviceDownload {
    fn take(mut object: Object<'_>) -> Result<Option<Self>, DiskError> {
        let download = Self {
            enable: object.bool("enable")?,
            delay: object.bounded("delay", LONGEST_WAIT)?,
            delay_extra: object.bounded("delayExtra", LONGEST_WAIT)?,
            max_mbps: object.bounded("maxMBps", MOST_MBPS)?,
            tries: object.number("tryCnt")?,
            block_size: object.number("blockSize")?,
        };
        let is_present = object.is_present();
        object.end();
        Ok(is_present.then_some(download))
    }
}

impl UpperConfig {
    fn take(mut object: Object<'_>) -> Result<Self, DiskError> {
        // The snapshotter writes a size; upstream does not read it either. The layer says how large it is.
        object.without_effect("vsize");
        object.skip("vsize");
        // With upper.target the configuration is refused, and without it there is nothing that it is an index of.
        object.without_effect("gzipIndex");
        let upper = Self {
            index: string(&mut object, "index")?,
            data: string(&mut object, "data")?,
            target: string(&mut object, "target")?,
            gzip_index: string(&mut object, "gzipIndex")?,
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
        let page = page.split("\n## ").next().unwrap();
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
        let notes = Notes::default();
        DeviceConfig::take(&with(&keys), "c.json", &notes).unwrap();
        let (known, warnings) = notes.into_parts();
        let mut known: Vec<String> =
            known.into_iter().map(|key| key.replace("[0]", "[]")).collect();
        known.iter_mut().filter(|key| *key == "lowers").for_each(|key| key.push_str("[]"));
        known.sort();
        known.dedup();
        let mut written = keys;
        written.sort_unstable();
        assert_eq!(known, written);
        assert!(!warnings.iter().any(|warning| warning.contains("unknown")), "{warnings:?}");
    }

    #[test]
    fn each_key_changes_the_configuration_or_is_said_to_have_no_effect() {
        for (key, meaning) in page().iter().filter(|(key, _)| key != "lowers[]") {
            let notes = Notes::default();
            let config = DeviceConfig::take(&with(&[key]), "c.json", &notes).unwrap();
            // What an empty section is, with no key in it.
            let empty = with(&[key]).split_once(": ").map(|(section, _)| match section {
                "{\"lowers\"" => r#"{"lowers": [{}]}"#,
                "{\"download\"" => r#"{"download": {}}"#,
                _ => "{}",
            });
            let empty = DeviceConfig::take(empty.unwrap(), "c.json", &Notes::default()).unwrap();
            let path = key.replace("[]", "[0]");
            let warning = format!("Key {path} of c.json is accepted, without effect here");
            let expected = meaning.starts_with("accepted, without effect here");
            assert_eq!(notes.into_warnings(), Vec::from_iter(expected.then_some(warning)));
            assert!(expected || config != empty, "{key} changes nothing, and nothing says so");
        }
    }

    #[test]
    fn a_wait_that_cannot_be_meant_is_an_error_that_names_the_key() {
        let error =
            DeviceConfig::parse(r#"{"download": {"delay": 18446744073709551615}}"#, "c.json");
        assert_eq!(
            error.unwrap_err().to_string(),
            "Key download.delay of c.json is invalid: it is at most 31536000, not 18446744073709551615"
        );
        assert!(
            DeviceConfig::parse(r#"{"download": {"maxMBps": 17592186044416}}"#, "c.json").is_err()
        );
    }

    #[test]
    fn a_wrong_type_is_an_error_that_names_the_key_and_an_unknown_key_is_none() {
        let parse = |text| DeviceConfig::parse(text, "c.json");
        let config = parse(
            r#"{"lowers": [{"file": "a", "size": 5, "new": 1}], "upper": {"vsize": 64}, "x": []}"#,
        );
        assert_eq!(
            config.unwrap().lowers,
            [LowerConfig { file: "a".into(), size: 5, ..LowerConfig::default() }]
        );
        let cases = [
            (
                r#"{"lowers": [{}, {"size": "5"}]}"#,
                "Key lowers[1].size of c.json is invalid: it must be a whole number, not a string",
            ),
            (
                r#"{"lowers": [7]}"#,
                "Key lowers[0] of c.json is invalid: it must be an object, not the number 7",
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
                "Key accelerationLayer of c.json is invalid: it must be true or false, not the number 1",
            ),
            (
                "[]",
                "Key (all) of c.json is invalid: it is not a JSON object: it must be an object, not an array",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(parse(text).unwrap_err().to_string(), message);
        }
        assert!(parse("{").is_err());
    }
}
