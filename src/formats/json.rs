//! A JSON document of settings, strictly read: an object whose keys are taken one by one, each with its type.
//!
//! A wrong type is an error that names the path of the key. The keys that are left at the end are unknown, and give
//! a warning. Absent sections are taken as empty ones, so that every run asks for every key that the parser knows:
//! that is how a test compares the keys of a page with those of the code.
//!
//! The error is the caller's: any `E` that a [`JsonError`] converts to.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde_json::{Map, Value};
use thiserror::Error;

/// Reason why a document was refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum JsonError {
    /// The text is no JSON object.
    #[error("{file} is not a JSON object: {rule}")]
    NotAnObject {
        /// Name of the document.
        file: String,
        /// Finding of the parser.
        rule: String,
    },
    /// A key breaks a rule.
    #[error("Key {key} of {file} is invalid: {rule}")]
    Key {
        /// Name of the document.
        file: String,
        /// Path of the key, like `lowers[2].size`.
        key: String,
        /// The broken rule, and the value found.
        rule: String,
    },
}

/// Findings of a parse.
#[derive(Default)]
pub struct Notes {
    warnings: RefCell<Vec<String>>,
    known: RefCell<Vec<String>>,
}

impl Notes {
    /// Warnings, in the order in which the sections ended.
    #[must_use]
    pub fn into_warnings(self) -> Vec<String> {
        self.warnings.into_inner()
    }

    /// Paths of all keys that the parser asked for, and the warnings. An element of a list has its number.
    #[must_use]
    pub fn into_parts(self) -> (Vec<String>, Vec<String>) {
        (self.known.into_inner(), self.warnings.into_inner())
    }
}

/// An object whose keys are taken one by one.
pub struct Object<'a, E> {
    file: &'a str,
    /// Path of the object: empty, or `cacheConfig.`.
    path: String,
    map: Map<String, Value>,
    present: bool,
    notes: &'a Notes,
    error: PhantomData<fn() -> E>,
}

impl<'a, E: From<JsonError>> Object<'a, E> {
    /// Takes a parsed object that stands at `path` of the document: empty, or with a dot at its end.
    pub fn new(file: &'a str, path: &str, map: Map<String, Value>, notes: &'a Notes) -> Self {
        Self::of(file, path.to_owned(), Some(map), notes)
    }

    fn of(file: &'a str, path: String, map: Option<Map<String, Value>>, notes: &'a Notes) -> Self {
        let present = map.is_some();
        Self { file, path, map: map.unwrap_or_default(), present, notes, error: PhantomData }
    }

    /// Parses a document; `file` is its name for messages.
    ///
    /// # Errors
    /// [`JsonError::NotAnObject`].
    pub fn parse(text: &str, file: &'a str, notes: &'a Notes) -> Result<Self, E> {
        let refused = |rule| E::from(JsonError::NotAnObject { file: file.to_owned(), rule });
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self::new(file, "", map, notes)),
            Ok(other) => {
                Err(refused(format!("it must be an object, not {}", found("an object", &other))))
            }
            Err(error) => Err(refused(error.to_string())),
        }
    }

    /// True if the object is in the file.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.present
    }

    /// The error that a key of this object breaks a rule.
    pub fn error(&self, key: &str, rule: impl Into<String>) -> E {
        E::from(JsonError::Key {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.path),
            rule: rule.into(),
        })
    }

    fn take<T>(
        &mut self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, E> {
        self.notes.known.borrow_mut().push(format!("{}{key}", self.path));
        let Some(value) = self.map.remove(key) else { return Ok(None) };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => {
                let found = found(wanted, &value);
                Err(self.error(key, format!("it must be {wanted}, not {found}")))
            }
        }
    }

    /// A text; an empty one counts as absent, as in overlaybd.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type.
    pub fn text(&mut self, key: &str) -> Result<Option<String>, E> {
        let text = self.take(key, "a string", |value| value.as_str().map(str::to_owned))?;
        Ok(text.filter(|text| !text.is_empty()))
    }

    /// A boolean.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type.
    pub fn bool(&mut self, key: &str) -> Result<Option<bool>, E> {
        self.take(key, "true or false", Value::as_bool)
    }

    /// A whole number, not negative.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type.
    pub fn number(&mut self, key: &str) -> Result<Option<u64>, E> {
        self.take(key, "a whole number", Value::as_u64)
    }

    /// A whole number of at most `most`.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type, and above the limit.
    pub fn bounded(&mut self, key: &str, most: u64) -> Result<Option<u64>, E> {
        match self.number(key)? {
            Some(number) if number > most => {
                Err(self.error(key, format!("it is at most {most}, not {number}")))
            }
            other => Ok(other),
        }
    }

    /// A whole number of `unit` bytes, as bytes.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type, and for more bytes than a `u64` holds.
    pub fn size(&mut self, key: &str, unit: u64) -> Result<Option<u64>, E> {
        Ok(self.bounded(key, u64::MAX / unit)?.map(|number| number * unit))
    }

    /// An array of texts; an empty one when it is absent.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type.
    pub fn texts(&mut self, key: &str) -> Result<Vec<String>, E> {
        Ok(self.take(key, "an array of strings", texts)?.unwrap_or_default())
    }

    /// An object of arrays of texts; an empty one when it is absent.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type.
    pub fn lists(&mut self, key: &str) -> Result<BTreeMap<String, Vec<String>>, E> {
        let read = |value: &Value| {
            let lists = value.as_object()?.iter();
            lists.map(|(name, list)| Some((name.clone(), texts(list)?))).collect()
        };
        Ok(self.take(key, "an object of arrays of strings", read)?.unwrap_or_default())
    }

    /// A section; an empty one when it is absent.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type.
    pub fn section(&mut self, key: &str) -> Result<Self, E> {
        let map = match self.map.remove(key) {
            None => None,
            Some(value) => Some(self.object(key, value)?),
        };
        Ok(Self::of(self.file, format!("{}{key}.", self.path), map, self.notes))
    }

    /// An array of sections; an empty one when it is absent.
    ///
    /// # Errors
    /// [`JsonError::Key`] for another type.
    pub fn sections(&mut self, key: &str) -> Result<Vec<Self>, E> {
        let array = |value: &Value| value.as_array().cloned();
        let elements = self.take(key, "an array", array)?.unwrap_or_default();
        let element = |(number, value)| {
            let key = format!("{key}[{number}]");
            let map = self.object(&key, value)?;
            Ok(Self::of(self.file, format!("{}{key}.", self.path), Some(map), self.notes))
        };
        elements.into_iter().enumerate().map(element).collect()
    }

    fn object(&self, key: &str, value: Value) -> Result<Map<String, Value>, E> {
        match value {
            Value::Object(map) => Ok(map),
            other => Err(self
                .error(key, format!("it must be an object, not {}", found("an object", &other)))),
        }
    }

    /// Takes a key of any type, and drops its value.
    pub fn skip(&mut self, key: &str) {
        self.notes.known.borrow_mut().push(format!("{}{key}", self.path));
        self.map.remove(key);
    }

    /// Name of the document, for messages.
    #[must_use]
    pub fn file(&self) -> &str {
        self.file
    }

    /// Adds a warning.
    pub fn warn(&self, warning: String) {
        self.notes.warnings.borrow_mut().push(warning);
    }

    /// Warns of a key that is set and changes nothing. Call it before the key is taken.
    pub fn without_effect(&self, key: &str) {
        if self.map.contains_key(key) {
            let (path, file) = (&self.path, self.file);
            self.warn(format!("Key {path}{key} of {file} is accepted, without effect here"));
        }
    }

    /// Warns of the keys that were not taken.
    pub fn end(self) {
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

/// Kind of `value` in a message that wants `wanted`: "such an array" for one with other elements than wanted.
fn found(wanted: &str, value: &Value) -> String {
    let found = kind(value);
    if wanted.starts_with(&found) { format!("such {found}") } else { found }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(number) => format!("the number {number}"),
        // Never the text itself: it may be a secret.
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_named_by_their_path_and_those_left_over_are_warned_of() {
        let notes = Notes::default();
        let text = r#"{"list": [{"size": 1, "odd": 0}, {"size": "1"}], "none": {}, "rest": 1}"#;
        let mut root: Object<'_, JsonError> = Object::parse(text, "c.json", &notes).unwrap();
        let mut list = root.sections("list").unwrap().into_iter();
        let mut first = list.next().unwrap();
        assert_eq!(first.number("size"), Ok(Some(1)));
        first.end();
        assert_eq!(
            list.next().unwrap().number("size").unwrap_err().to_string(),
            "Key list[1].size of c.json is invalid: it must be a whole number, not a string"
        );
        let mut absent = root.section("absent").unwrap();
        assert_eq!((absent.is_present(), absent.bool("key")), (false, Ok(None)));
        absent.end();
        assert!(root.section("none").unwrap().is_present());
        root.end();
        let (known, warnings) = notes.into_parts();
        assert_eq!(known, ["list", "list[0].size", "list[1].size", "absent.key"]);
        assert_eq!(
            warnings,
            [
                "Key list[0].odd of c.json is unknown and ignored",
                "Key rest of c.json is unknown and ignored"
            ]
        );
    }
}
