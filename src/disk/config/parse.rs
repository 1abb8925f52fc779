//! Parses the text of a configuration to values. Each key is taken once; the remaining keys are unknown.

use serde_json::{Map, Value};

use super::{Config, Download, Lower, Upper};
use crate::DiskError;

/// An object of the configuration; its keys are taken one by one.
struct Object {
    file: String,
    /// Path of the object: empty, or `lowers[2].`.
    path: String,
    map: Map<String, Value>,
}

impl Object {
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
        match self.map.remove(key) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(self.wrong_type(key, "a string", &other)),
        }
    }

    fn u64(&mut self, key: &str) -> Result<u64, DiskError> {
        match self.map.remove(key) {
            None => Ok(0),
            Some(value) => {
                value.as_u64().ok_or_else(|| self.wrong_type(key, "a whole number", &value))
            }
        }
    }

    fn bool(&mut self, key: &str) -> Result<bool, DiskError> {
        match self.map.remove(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(self.wrong_type(key, "true or false", &other)),
        }
    }

    fn object(&mut self, key: &str) -> Result<Option<Object>, DiskError> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Object {
                file: self.file.clone(),
                path: format!("{}{key}.", self.path),
                map,
            })),
            Some(other) => Err(self.wrong_type(key, "an object", &other)),
        }
    }

    fn objects(&mut self, key: &str) -> Result<Vec<Object>, DiskError> {
        let values = match self.map.remove(key) {
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
                }),
                other => Err(self.wrong_type(&key, "an object", &other)),
            }
        };
        values.into_iter().enumerate().map(element).collect()
    }

    /// Warns of keys that were not taken.
    fn end(self) {
        for key in self.map.keys() {
            tracing::warn!("Key {}{key} of {} is unknown and ignored", self.path, self.file);
        }
    }
}

impl Config {
    /// Reads a configuration; `file` is its name for messages.
    ///
    /// # Errors
    /// [`DiskError::Config`] with the key, or if the text is not JSON.
    pub fn parse(text: &str, file: &str) -> Result<Self, DiskError> {
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
        let mut object = Object { file: file.to_owned(), path: String::new(), map };
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

impl Download {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        let enable = match object.map.get("enable") {
            None => None,
            Some(_) => Some(object.bool("enable")?),
        };
        let mut number = |key: &str| match object.map.get(key) {
            None => Ok(None),
            Some(_) => object.u64(key).map(Some),
        };
        let download = Self {
            enable,
            delay: number("delay")?,
            delay_extra: number("delayExtra")?,
            max_mbps: number("maxMBps")?,
            tries: number("tryCnt")?,
            block_size: number("blockSize")?,
        };
        object.end();
        Ok(download)
    }
}

impl Upper {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        // The snapshotter writes a size that is never read.
        object.map.remove("vsize");
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
