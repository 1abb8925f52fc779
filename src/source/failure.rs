//! An error and its causes as one line.

use std::error::Error;

/// The text of `error` and of all its causes, from the effect to the root, joined by `: `.
///
/// A cause whose text ends the line already is left out: a transparent wrapper would say the same twice.
///
/// ```
/// let error = std::io::Error::other("the disk is full");
/// assert_eq!(turbobd_source::failure::with_causes(&error), "the disk is full");
/// ```
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    parts(error).join(": ")
}

/// The texts of `error` and of its causes, from the effect to the root: the parts of [`with_causes`].
#[must_use]
pub fn parts(error: &dyn Error) -> Vec<String> {
    let mut parts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if parts.last().is_none_or(|last| !last.ends_with(&part)) {
            parts.push(part);
        }
        cause = error.source();
    }
    parts
}
