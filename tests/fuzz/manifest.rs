//! Any bytes as a manifest, an index and an image config.
#![no_main]

use formats::oci::annotations::LayerKind;
use formats::oci::{Digest, Document, ImageConfig, Platform};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match Document::parse(data, None) {
        Ok(Document::Manifest(manifest)) => {
            for layer in &manifest.layers {
                let _ = LayerKind::of(layer);
            }
            let bytes = manifest.to_bytes();
            let Ok(Document::Manifest(again)) =
                Document::parse(&bytes, Some(manifest.media_type()))
            else {
                panic!("a manifest that was read cannot be read again");
            };
            assert_eq!(again.to_bytes(), bytes);
        }
        Ok(Document::Index(index)) => {
            let _ = index.select(&Platform::new("linux", "arm64", Some("v8")));
            let bytes = index.to_bytes();
            let Ok(Document::Index(again)) = Document::parse(&bytes, Some(index.media_type()))
            else {
                panic!("an index that was read cannot be read again");
            };
            assert_eq!(again.to_bytes(), bytes);
        }
        Err(_) => {}
    }
    if let Ok(config) = ImageConfig::parse(data) {
        let _ = config.platform();
        // Replaced twice, the digests leave everything else unchanged.
        let ids = config.diff_ids().to_vec();
        let other = ImageConfig::parse(&config.with_diff_ids(&[Digest::of(b"other")])).unwrap();
        assert_eq!(other.diff_ids(), [Digest::of(b"other")]);
        assert_eq!(other.with_diff_ids(&ids), config.with_diff_ids(&ids));
    }
});
