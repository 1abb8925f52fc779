//! An object of the configuration, whose keys are taken one by one.
//!
//! The keys that are left at the end are unknown. Absent sections are taken as empty ones, so that every run
//! asks for every key that the parser knows: that is how the test of `CONFIG.md` learns them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::ConfigError;

/// Findings during the parse.
#[derive(Default)]
pub(super) struct Notes {
    warnings: RefCell<Vec<String>>,
    known: RefCell<Vec<String>>,
}

impl Notes {
    pub(super) fn into_warnings(self) -> Vec<String> {
        self.warnings.into_inner()
    }

    /// Paths of all keys that were asked for.
    #[cfg(test)]
    pub(super) fn into_known(self) -> Vec<String> {
        self.known.into_inner()
    }
}

pub(super) struct Object<'a> {
    file: &'a str,
    /// Path of the object: empty, or `cacheConfig.`.
    path: String,
    map: Map<String, Value>,
    present: bool,
    notes: &'a Notes,
}

impl<'a> Object<'a> {
    pub(super) fn new(
        file: &'a str,
        path: &str,
        map: Map<String, Value>,
        notes: &'a Notes,
    ) -> Self {
        Self { file, path: path.to_owned(), map, present: true, notes }
    }

    pub(super) fn parse(text: &str, file: &'a str, notes: &'a Notes) -> Result<Self, ConfigError> {
        let not_json = |rule: String| ConfigError::NotJson { file: file.to_owned(), rule };
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self::new(file, "", map, notes)),
            Ok(other) => Err(not_json(format!("it is {}", kind(&other)))),
            Err(error) => Err(not_json(error.to_string())),
        }
    }

    /// True if the object is in the file.
    pub(super) fn is_present(&self) -> bool {
        self.present
    }

    pub(super) fn error(&self, key: &str, rule: impl Into<String>) -> ConfigError {
        ConfigError::Key {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.path),
            rule: rule.into(),
        }
    }

    fn take<T>(
        &mut self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.notes.known.borrow_mut().push(format!("{}{key}", self.path));
        let Some(value) = self.map.remove(key) else { return Ok(None) };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.error(key, format!("it must be {wanted}, not {}", kind(&value)))),
        }
    }

    /// A text; an empty one counts as absent, as in overlaybd.
    pub(super) fn text(&mut self, key: &str) -> Result<Option<String>, ConfigError> {
        let text = self.take(key, "a string", |value| value.as_str().map(str::to_owned))?;
        Ok(text.filter(|text| !text.is_empty()))
    }

    pub(super) fn path(&mut self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        Ok(self.text(key)?.map(PathBuf::from))
    }

    pub(super) fn bool(&mut self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.take(key, "true or false", Value::as_bool)
    }

    /// A whole number, not negative.
    pub(super) fn number(&mut self, key: &str) -> Result<Option<u64>, ConfigError> {
        self.take(key, "a whole number", Value::as_u64)
    }

    /// A whole number of at most `most`.
    pub(super) fn bounded(&mut self, key: &str, most: u64) -> Result<Option<u64>, ConfigError> {
        match self.number(key)? {
            Some(number) if number > most => {
                Err(self.error(key, format!("it is at most {most}, not {number}")))
            }
            other => Ok(other),
        }
    }

    /// A whole number of `unit` bytes, as bytes.
    pub(super) fn size(&mut self, key: &str, unit: u64) -> Result<Option<u64>, ConfigError> {
        Ok(self.bounded(key, u64::MAX / unit)?.map(|number| number * unit))
    }

    pub(super) fn texts(&mut self, key: &str) -> Result<Vec<String>, ConfigError> {
        Ok(self.take(key, "an array of strings", texts)?.unwrap_or_default())
    }

    pub(super) fn lists(
        &mut self,
        key: &str,
    ) -> Result<BTreeMap<String, Vec<String>>, ConfigError> {
        let read = |value: &Value| {
            let lists = value.as_object()?.iter();
            lists.map(|(name, list)| Some((name.clone(), texts(list)?))).collect()
        };
        Ok(self.take(key, "an object of arrays of strings", read)?.unwrap_or_default())
    }

    /// A section; an empty one when it is absent.
    pub(super) fn section(&mut self, key: &str) -> Result<Object<'a>, ConfigError> {
        let map = match self.map.remove(key) {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(other) => {
                return Err(self.error(key, format!("it must be an object, not {}", kind(&other))));
            }
        };
        Ok(Object {
            file: self.file,
            path: format!("{}{key}.", self.path),
            present: map.is_some(),
            map: map.unwrap_or_default(),
            notes: self.notes,
        })
    }

    /// Name of the configuration, for messages.
    pub(super) fn file(&self) -> &str {
        self.file
    }

    /// Adds a warning.
    pub(super) fn warn(&self, warning: String) {
        self.notes.warnings.borrow_mut().push(warning);
    }

    /// Warns of a key that is set and changes nothing. Call it before the key is taken.
    pub(super) fn without_effect(&self, key: &str) {
        if self.map.contains_key(key) {
            let (path, file) = (&self.path, self.file);
            self.warn(format!("Key {path}{key} of {file} is accepted, without effect here"));
        }
    }

    /// Warns of the keys that were not taken.
    pub(super) fn end(self) {
        let mut warnings = self.notes.warnings.borrow_mut();
        for key in self.map.keys() {
            let (path, file) = (&self.path, self.file);
            warnings.push(format!("Key {path}{key} of {file} is unknown and ignored"));
        }
    }
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(number) => format!("the number {number}"),
        // Never the text itself: it may be a secret.
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "such an array".to_owned(),
        Value::Object(_) => "such an object".to_owned(),
    }
}
