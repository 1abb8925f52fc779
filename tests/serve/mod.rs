//! Copies a layout directory into the registry double.

#![allow(clippy::unwrap_used, unreachable_pub)]

use std::fs;

use formats::oci::Digest;
use serde_json::Value;

use crate::image::{Images, REF_NAME};
use crate::registry_double::Double;

/// Puts a layout's blobs, documents and tags into a repository of the double.
pub fn serve(images: &Images, registry: &Double, repository: &str) {
    for entry in fs::read_dir(images.path().join("blobs/sha256")).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        registry.add_blob(repository, &bytes);
        let Ok(document) = serde_json::from_slice::<Value>(&bytes) else { continue };
        if let Some(media_type) = document["mediaType"].as_str() {
            registry.add_manifest(repository, &Digest::of(&bytes).to_string(), media_type, &bytes);
        }
    }
    let top: Value =
        serde_json::from_slice(&fs::read(images.path().join("index.json")).unwrap()).unwrap();
    for entry in top["manifests"].as_array().unwrap() {
        let bytes = images.blob(entry["digest"].as_str().unwrap());
        let tag = entry["annotations"][REF_NAME].as_str().unwrap();
        registry.add_manifest(repository, tag, entry["mediaType"].as_str().unwrap(), &bytes);
    }
}
