//! What a snapshot holds.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Content of a snapshot, as its record keeps it. A kind that a newer release has written is kept as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LayerContent {
    /// Files of its own in its folder, as the overlayfs snapshotter has them.
    #[default]
    Plain,
    /// Anything that this release does not know.
    #[serde(untagged)]
    Unknown(Map<String, Value>),
}

impl LayerContent {
    /// Name of a kind that this release does not know.
    #[must_use]
    pub fn unknown_kind(&self) -> Option<&str> {
        match self {
            Self::Unknown(object) => {
                Some(object.get("kind").and_then(Value::as_str).unwrap_or("without a name"))
            }
            Self::Plain => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_of_a_newer_release_survives_unchanged() {
        let text = r#"{"kind":"hologram","depth":3}"#;
        let content: LayerContent = serde_json::from_str(text).unwrap();
        assert_eq!(content.unknown_kind(), Some("hologram"));
        assert_eq!(serde_json::to_string(&content).unwrap(), text);
        let plain: LayerContent = serde_json::from_str(r#"{"kind":"plain"}"#).unwrap();
        assert_eq!(plain, LayerContent::Plain);
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"kind":"plain"}"#);
    }
}
