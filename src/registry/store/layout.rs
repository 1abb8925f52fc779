//! An image layout directory as a store.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use super::{ImageStore, Selector, StoreError, StoredManifest};
use crate::layout::{LayoutDirectory, LayoutError};
use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest, Document, ImageIndex};
use source::{ByteSource, FileSource};

/// `oci:DIR`.
pub struct LayoutStore {
    name: String,
    layout: LayoutDirectory,
}

impl LayoutStore {
    /// Opens the existing layout in `dir`.
    ///
    /// # Errors
    /// Returns [`StoreError::Layout`] when there is none.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Ok(Self::over(LayoutDirectory::open(dir)?))
    }

    /// Opens the layout in `dir`, or creates an empty one.
    ///
    /// # Errors
    /// Returns [`StoreError::Layout`] when `dir` holds something else.
    pub fn open_or_create(dir: &Path) -> Result<Self, StoreError> {
        Ok(Self::over(LayoutDirectory::open_or_create(dir)?))
    }

    fn over(layout: LayoutDirectory) -> Self {
        Self { name: format!("oci:{}", layout.dir().display()), layout }
    }

    fn missing(&self, digest: &Digest) -> StoreError {
        StoreError::NotFound { store: self.name.clone(), what: format!("blob {digest}") }
    }

    /// Opens a blob; the error of a missing one names its digest.
    fn open_file(&self, digest: &Digest) -> Result<FileSource, StoreError> {
        let file = self.layout.open_file(digest).map_err(|error| match error {
            LayoutError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                self.missing(digest)
            }
            error => error.into(),
        })?;
        let path = self.layout.blob_path(digest);
        Ok(FileSource::new(&path, path.display().to_string(), file)?)
    }
}

impl ImageStore for LayoutStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError> {
        let descriptor = match selector {
            Selector::Tag(tag) => self.layout.resolve(Some(tag))?,
            Selector::Default => self.layout.resolve(None)?,
            Selector::Digest(digest) => Descriptor::new("", *digest, self.open_file(digest)?.len()),
        };
        let bytes = self.layout.read_blob(&descriptor)?;
        let given = Some(descriptor.media_type.as_str()).filter(|text| !text.is_empty());
        let document = Document::parse(&bytes, given).map_err(|source| StoreError::Document {
            store: self.name.clone(),
            digest: descriptor.digest,
            source,
        })?;
        let media_type = match &document {
            Document::Manifest(manifest) => manifest.media_type(),
            Document::Index(index) => index.media_type(),
        };
        Ok(StoredManifest { media_type: media_type.to_owned(), digest: descriptor.digest, bytes })
    }

    /// A directory has no service that lists referrers: the list is the tagged manifests that name `digest`
    /// as their subject, and the index under the fallback tag.
    fn referrers(&self, digest: &Digest) -> Result<Option<StoredManifest>, StoreError> {
        let fallback = self.manifest(&Selector::Tag(super::referrers::fallback_tag(digest))).ok();
        if fallback.is_some() {
            return Ok(fallback);
        }
        let mut found = Vec::new();
        for (_, entry) in self.layout.list()? {
            let Ok(Document::Manifest(manifest)) = self.layout.document(&entry) else { continue };
            if manifest.subject.as_ref().is_some_and(|subject| subject.digest == *digest) {
                found.push(Descriptor { artifact_type: manifest.artifact_type, ..entry });
            }
        }
        let bytes = ImageIndex::of(found).to_bytes();
        let media_type = media::OCI_INDEX.to_owned();
        Ok(Some(StoredManifest { media_type, digest: Digest::of(&bytes), bytes }))
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        Ok(Box::new(self.open_file(&blob.digest)?.into_file()))
    }

    fn blob_source(
        &self,
        digest: &Digest,
        _: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        Ok(Arc::new(self.open_file(digest)?))
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError> {
        if !self.layout.has_blob(&Digest::of(bytes), bytes.len() as u64) {
            self.layout.write_blob("", bytes)?;
        }
        Ok(())
    }

    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        if self.layout.has_blob(digest, size) {
            return Ok(());
        }
        let broken =
            |source| StoreError::Broken { store: self.name.clone(), digest: *digest, source };
        let mut writer = self.layout.blob_writer()?;
        std::io::copy(&mut open()?.take(size + 1), &mut writer).map_err(broken)?;
        let written = writer.commit("")?;
        if written.digest != *digest {
            let got = written.digest;
            return Err(StoreError::Damaged { store: self.name.clone(), digest: *digest, got });
        }
        Ok(())
    }

    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, StoreError> {
        Ok(self.layout.has_blob(digest, size))
    }

    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        self.put_blob(bytes)?;
        if let Some(tag) = tag {
            self.layout.put(tag, &Descriptor::of(media_type, bytes))?;
        }
        Ok(())
    }
}
