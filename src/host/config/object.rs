//! Sections of the service configuration.

use std::path::PathBuf;

use formats::json::{self, JsonError};

use super::ServiceConfigError;

/// A section, or the whole configuration.
pub(super) type Object<'a> = json::Object<'a, ServiceConfigError>;

/// A section that may hold paths.
pub(super) trait Paths {
    /// A path; an empty text counts as absent.
    fn path(&mut self, key: &str) -> Result<Option<PathBuf>, ServiceConfigError>;
}

impl Paths for Object<'_> {
    fn path(&mut self, key: &str) -> Result<Option<PathBuf>, ServiceConfigError> {
        Ok(self.text(key)?.map(PathBuf::from))
    }
}

impl From<JsonError> for ServiceConfigError {
    fn from(error: JsonError) -> Self {
        match error {
            JsonError::NotAnObject { file, rule } => Self::NotJson { file, rule },
            JsonError::Key { file, key, rule } => Self::Key { file, key, rule },
        }
    }
}
