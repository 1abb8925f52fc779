//! A plain image finds its meta image, and gets one when there is none.

use crate::image;
use std::path::Path;
use std::sync::Arc;

use crate::image::Images;
use convert::child::Builder;
use convert::meta::{MetaError, MetaImage, MetaImages, MetaOrigin, MetaTrust, Plain, is_plain};
use convert::{ConvertOptions, Silent};
use disk::image::host_manifest;
use formats::oci::annotations::ARTIFACT_TYPE_TURBO;
use formats::oci::manifest::media;
use formats::oci::{Descriptor, ImageIndex, Manifest};
use registry::signatures::Signers;
use registry::store::{ImageStore, LayoutStore, Selector, StoredManifest};

/// A layout, and a local store that is empty at first.
struct Host {
    images: Images,
    local: tempfile::TempDir,
}

impl Host {
    fn new(images: Images) -> Self {
        Self { images, local: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    fn store(&self) -> Arc<dyn ImageStore> {
        Arc::new(LayoutStore::open(self.images.path()).unwrap())
    }

    fn plain(&self) -> (StoredManifest, Manifest) {
        let (stored, manifest) =
            host_manifest(&*self.store(), &Selector::Tag("latest".into())).unwrap();
        assert!(is_plain(&manifest));
        (stored, manifest)
    }

    fn meta(&self, publish: bool, index: Option<&ImageIndex>) -> Result<MetaImage, MetaError> {
        let (stored, manifest) = self.plain();
        let plain = Plain {
            store: &self.store(),
            tag: Some("latest"),
            pinned: false,
            index,
            indexes: &[],
            stored: &stored,
            manifest: &manifest,
        };
        let local = self.local.path().join("meta");
        let options = ConvertOptions {
            disk_size: formats::units::Bytes(1 << 30),
            ..ConvertOptions::default()
        };
        let (trust, signers, builder) = (MetaTrust::Verify, Signers::default(), Builder::Here);
        MetaImages { local, publish, options, builder, trust, signers }.of(&plain, &Silent)
    }

    fn forget_local(&self) {
        std::fs::remove_dir_all(self.local.path().join("meta")).unwrap();
    }
}

fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_image_without_a_meta_image_gets_one_and_keeps_it() {
    let host = Host::new(Images::sample());
    let first = host.meta(false, None).unwrap();
    assert_eq!(first.found, MetaOrigin::Built);
    assert_eq!(first.manifest.layers.len(), 2);
    assert!(!is_plain(&first.manifest));
    let again = host.meta(false, None).unwrap();
    assert_eq!((again.found, again.stored.digest), (MetaOrigin::Local, first.stored.digest));
    // Nothing was written beside the image, and no lock is left.
    assert!(
        LayoutStore::open(host.images.path()).unwrap().referrers(&host.plain().0.digest).is_ok()
    );
    let local = host.local.path().join("meta");
    assert_eq!(files(&local), ["blobs", "built", "index.json", "oci-layout"]);
    assert_eq!(files(&host.images.path().join("blobs/sha256")).len(), 4);
}

#[test]
fn what_one_host_publishes_the_next_one_finds() {
    let host = Host::new(Images::sample());
    let built = host.meta(true, None).unwrap();
    host.forget_local();
    let found = host.meta(false, None).unwrap();
    assert_eq!((found.found, found.stored.digest), (MetaOrigin::Referrer, built.stored.digest));
    // A second publication does not list it twice.
    host.meta(true, None).unwrap();
    let listed = host.store().referrers(&host.plain().0.digest).unwrap().unwrap();
    let listed = String::from_utf8(listed.bytes).unwrap();
    assert_eq!(listed.matches(&built.stored.digest.to_string()).count(), 1, "{listed}");
}

#[test]
fn the_tag_of_a_converted_image_is_tried_and_one_that_moved_on_is_passed_over() {
    let images = Images::sample();
    let place = images.place();
    image::done(&[
        "convert",
        "-r",
        &place,
        "-i",
        "latest",
        "--turboOCI",
        "latest_turbo",
        "--vsize",
        "1",
    ]);
    let host = Host::new(images);
    assert_eq!(host.meta(false, None).unwrap().found, MetaOrigin::Tag);
    // The plain tag moves to another image: the converted one no longer matches.
    host.images.add("latest", &[(media::OCI_LAYER_GZIP, image::gzip(&image::upper()))]);
    assert_eq!(host.meta(false, None).unwrap().found, MetaOrigin::Built);
}

#[test]
fn an_entry_of_the_images_own_index_is_used_if_it_fits() {
    let host = Host::new(Images::sample());
    let meta = host.meta(false, None).unwrap();
    let store = host.store();
    for blob in &meta.manifest.layers {
        store.put_blob(&meta.store.read_blob(blob).unwrap()).unwrap();
    }
    store.put_blob(&meta.stored.bytes).unwrap();
    host.forget_local();
    let entry = |stored: &StoredManifest| Descriptor {
        artifact_type: Some(ARTIFACT_TYPE_TURBO.to_owned()),
        ..Descriptor::of(&stored.media_type, &stored.bytes)
    };
    // First one that is not a meta image of this image, whatever its annotations say.
    let (plain, _) = host.plain();
    let other = ImageIndex::of(vec![entry(&plain)]);
    assert_eq!(host.meta(false, Some(&other)).unwrap().found, MetaOrigin::Built);
    host.forget_local();
    let index = ImageIndex::of(vec![entry(&plain), entry(&meta.stored)]);
    let found = host.meta(false, Some(&index)).unwrap();
    assert_eq!((found.found, found.stored.digest), (MetaOrigin::Index, meta.stored.digest));
}

#[test]
fn an_image_that_cannot_be_built_leaves_nothing_in_the_local_store() {
    let images = Images::new();
    images
        .add("latest", &[(media::OCI_LAYER_GZIP, image::gzip(b"no tar at all, but long enough"))]);
    let host = Host::new(images);
    let error = host.meta(false, None).err().unwrap();
    assert!(matches!(error, MetaError::Build(_)), "{error}");
    let local = host.local.path().join("meta");
    assert!(LayoutStore::open(&local).unwrap().manifest(&Selector::Default).is_err());
    assert_eq!(files(&local.join("blobs/sha256")), [""; 0]);
    assert_eq!(files(&local), ["blobs", "index.json", "oci-layout"]);
}
