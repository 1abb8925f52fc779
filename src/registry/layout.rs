//! The image layout directory: images as files, without a registry.
//!
//! ```text
//! DIR/oci-layout                  {"imageLayoutVersion":"1.0.0"}
//! DIR/index.json                  the images: an index whose entries carry their tags as annotations
//! DIR/blobs/sha256/<64 digits>    every document and layer, named by its digest
//! ```
//!
//! Other programs may read the directory at any time. So a blob is written under a temporary name, synced to
//! the disk and renamed. `index.json` is replaced in the same way, by one writer at a time; the lock is on
//! the file `oci-layout`, which never changes. Entries and fields of `index.json` that this program did not
//! write stay unchanged.
//!
//! A layout may come from an archive that others packed. So its files are opened without following links: a blob
//! that is a link to `/etc/shadow`, or a folder `blobs` that is one, would make this process, which runs as root, read what
//! the layout's author cannot. Only the directory itself, which the user named, may be reached through links.

use std::fs::{self, File};
use std::io::{self, BufRead as _, Read as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;
use thiserror::Error;

use formats::oci::annotations::{CONTAINERD_IMAGE_NAME, REF_NAME};
use formats::oci::digest::Digest;
use formats::oci::manifest::{
    DOCUMENT_LIMIT, Descriptor, Document, ImageIndex, ManifestError, Platform, media,
};

/// The only version of the layout that exists.
const LAYOUT_VERSION: &str = "1.0.0";

/// Mode of new files, before the umask.
const FILE_MODE: u32 = 0o644;

/// Number of bytes per read of a whole blob.
const READ_SIZE: usize = 256 << 10;

/// Number of nested indexes that are followed. One is usual; two occur.
const INDEX_DEPTH: usize = 4;

/// Error of reading or writing a layout.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// The operating system refused.
    #[error("Cannot {action} {path}")]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The directory is not an image layout.
    #[error("{dir} is not an OCI image layout: {reason}")]
    NotLayout {
        /// The directory.
        dir: PathBuf,
        /// The part that it lacks.
        reason: &'static str,
    },
    /// A document of the layout that cannot be read.
    #[error("{path} is not a valid document")]
    Document {
        /// The file.
        path: PathBuf,
        /// The fault.
        #[source]
        source: ManifestError,
    },
    /// A blob whose bytes do not match its name.
    #[error(
        "{path} is damaged: it should have {size} bytes with the digest in its name, and has {found}"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The size in its descriptor.
        size: u64,
        /// The digest or size found.
        found: String,
    },
    /// A file of the layout that is a link, or lies behind one.
    #[error(
        "{path} is or lies behind a symbolic link, or is no regular file: the files of a layout are opened without following \
         links; put the file itself there"
    )]
    Link {
        /// The file.
        path: PathBuf,
    },
    /// A document above the size limit.
    #[error("{path} has {size} bytes; a document may have at most {DOCUMENT_LIMIT}")]
    Large {
        /// The file.
        path: PathBuf,
        /// Its size in its descriptor.
        size: u64,
    },
    /// The layout has no image with this tag.
    #[error("{dir} has no image {tag:?}; it has {found}")]
    NoTag {
        /// The directory.
        dir: PathBuf,
        /// The requested tag.
        tag: String,
        /// The tags in the layout.
        found: String,
    },
    /// A name that matches several images.
    #[error("{dir} has several images for {wanted}; name one of {found}")]
    Ambiguous {
        /// The directory.
        dir: PathBuf,
        /// The requested name.
        wanted: String,
        /// The tags in the layout.
        found: String,
    },
}

/// An image layout directory.
#[derive(Clone, Debug)]
pub struct LayoutDirectory {
    dir: PathBuf,
}

impl LayoutDirectory {
    /// Opens an existing layout.
    ///
    /// # Errors
    /// [`LayoutError::NotLayout`] if `dir` is not a layout, or is one of another version.
    pub fn open(dir: &Path) -> Result<Self, LayoutError> {
        let not = |reason| LayoutError::NotLayout { dir: dir.to_owned(), reason };
        let marker = match read_small(dir, "oci-layout") {
            Err(LayoutError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(not("it has no file oci-layout"));
            }
            marker => marker?,
        };
        let version: Value = serde_json::from_slice(&marker)
            .map_err(|_| not("its file oci-layout is not JSON text"))?;
        if version.get("imageLayoutVersion").and_then(Value::as_str) != Some(LAYOUT_VERSION) {
            return Err(not("its version is not 1.0.0"));
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// Opens a layout, or makes an empty one in a missing or empty directory.
    ///
    /// # Errors
    /// The errors of [`open`](Self::open), and [`LayoutError::NotLayout`] if `dir` holds other files.
    pub fn open_or_create(dir: &Path) -> Result<Self, LayoutError> {
        if dir.join("oci-layout").exists() {
            let layout = Self::open(dir)?;
            return layout.make_folders().map(|()| layout);
        }
        let layout = Self { dir: dir.to_owned() };
        fs::create_dir_all(dir).map_err(io_error("make", dir))?;
        let mut others = fs::read_dir(dir).map_err(io_error("list", dir))?.filter_map(Result::ok);
        // Another process that makes this layout, now or until it was interrupted, leaves only these files.
        if others.any(|entry| {
            let name = entry.file_name();
            name != "blobs"
                && name != "index.json"
                && name != "oci-layout"
                && !name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes())
        }) {
            return Err(LayoutError::NotLayout {
                dir: dir.to_owned(),
                reason: "it has other files and no file oci-layout",
            });
        }
        layout.make_folders()?;
        let index = json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [] });
        let place = dir.join("index.json");
        let mut file = temporary(dir)?;
        file.write_all(index.to_string().as_bytes()).map_err(io_error("write", &place))?;
        match persist(file, &place, Overwrite::Never) {
            Err(LayoutError::Io { source, .. })
                if source.kind() == io::ErrorKind::AlreadyExists => {}
            done => done?,
        }
        // This file comes last: with it, the directory is a layout.
        write_atomically(
            &dir.join("oci-layout"),
            json!({ "imageLayoutVersion": LAYOUT_VERSION }).to_string().as_bytes(),
        )?;
        Ok(layout)
    }

    fn make_folders(&self) -> Result<(), LayoutError> {
        let blobs = self.blobs();
        fs::create_dir_all(&blobs).map_err(io_error("make", &blobs))
    }

    fn blobs(&self) -> PathBuf {
        self.dir.join("blobs/sha256")
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Path of the blob with this digest, present or not.
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    /// True if a blob with this digest and size is present. Its bytes are not read.
    #[must_use]
    pub fn has_blob(&self, digest: &Digest, size: u64) -> bool {
        self.open_file(digest)
            .and_then(|blob| blob.metadata().map_err(io_error("examine", &self.blob_path(digest))))
            .is_ok_and(|blob| blob.len() == size)
    }

    /// Opens the blob with this digest to read it. Its bytes are not verified.
    ///
    /// # Errors
    /// [`LayoutError::Link`] if it is or lies behind a link, [`LayoutError::Io`].
    pub fn open_file(&self, digest: &Digest) -> Result<File, LayoutError> {
        open_below(&self.dir, &["blobs", "sha256", &digest.hex()])
    }

    /// Reads a document (manifest, index, config), verified by size and digest.
    ///
    /// # Errors
    /// [`LayoutError`]; bytes that do not match the descriptor are never returned.
    pub fn read_blob(&self, blob: &Descriptor) -> Result<Vec<u8>, LayoutError> {
        let path = self.blob_path(&blob.digest);
        if blob.size > DOCUMENT_LIMIT {
            return Err(LayoutError::Large { path, size: blob.size });
        }
        let file = self.open_file(&blob.digest)?;
        let mut bytes = Vec::new();
        file.take(blob.size + 1).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
        let found = Digest::of(&bytes);
        self.check(&path, blob, bytes.len() as u64, found)?;
        Ok(bytes)
    }

    /// Reads all of a blob of any size and verifies it.
    ///
    /// # Errors
    /// [`LayoutError::Damaged`] if its bytes do not match its name.
    pub fn verify_blob(&self, blob: &Descriptor) -> Result<(), LayoutError> {
        let path = self.blob_path(&blob.digest);
        let file = self.open_file(&blob.digest)?;
        let mut reader = io::BufReader::with_capacity(READ_SIZE, file);
        let (mut hasher, mut size) = (Sha256::new(), 0);
        loop {
            let bytes = reader.fill_buf().map_err(io_error("read", &path))?;
            let len = bytes.len();
            if len == 0 {
                break;
            }
            hasher.update(bytes);
            size += len as u64;
            reader.consume(len);
        }
        self.check(&path, blob, size, Digest::from_hasher(hasher))
    }

    fn check(
        &self,
        path: &Path,
        blob: &Descriptor,
        size: u64,
        digest: Digest,
    ) -> Result<(), LayoutError> {
        if size == blob.size && digest == blob.digest {
            return Ok(());
        }
        let found =
            if size == blob.size { digest.to_string() } else { format!("{size} bytes or more") };
        Err(LayoutError::Damaged { path: path.to_owned(), size: blob.size, found })
    }

    /// Starts a blob whose digest is not known yet.
    ///
    /// # Errors
    /// [`LayoutError::Io`].
    pub fn blob_writer(&self) -> Result<BlobWriter, LayoutError> {
        self.make_folders()?;
        Ok(BlobWriter {
            file: temporary(&self.blobs())?,
            blobs: self.blobs(),
            hasher: Sha256::new(),
            size: 0,
        })
    }

    /// Writes a blob.
    ///
    /// # Errors
    /// [`LayoutError::Io`].
    pub fn write_blob(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor, LayoutError> {
        let mut writer = self.blob_writer()?;
        writer.write_all(bytes).map_err(io_error("write", writer.file.path()))?;
        writer.commit(media_type)
    }

    /// The images of the layout in the order of `index.json`: tag and descriptor.
    ///
    /// # Errors
    /// [`LayoutError::Document`] if `index.json` is not an index.
    pub fn list(&self) -> Result<Vec<(Option<String>, Descriptor)>, LayoutError> {
        let index = self.index()?;
        Ok(index
            .manifests
            .into_iter()
            .map(|image| (tag_of(&image).map(str::to_owned), image))
            .collect())
    }

    fn index(&self) -> Result<ImageIndex, LayoutError> {
        let path = self.dir.join("index.json");
        let document = |source| LayoutError::Document { path: path.clone(), source };
        match Document::parse(&read_small(&self.dir, "index.json")?, Some(media::OCI_INDEX))
            .map_err(document)?
        {
            Document::Index(index) => Ok(index),
            Document::Manifest(_) => {
                Err(document(ManifestError::Kind("a manifest, not an index".to_owned())))
            }
        }
    }

    /// The image with a tag: an entry with this reference name, or else with this full name (containerd's
    /// export has both). Without a tag: the only image, or the one called `latest`.
    ///
    /// # Errors
    /// [`LayoutError::NoTag`] and [`LayoutError::Ambiguous`]; both list the tags.
    pub fn resolve(&self, tag: Option<&str>) -> Result<Descriptor, LayoutError> {
        let images: Vec<Descriptor> = self.index()?.images().cloned().collect();
        let by = |key: &str, value: &str| -> Vec<&Descriptor> {
            images
                .iter()
                .filter(|image| image.annotations.get(key).is_some_and(|text| text == value))
                .collect()
        };
        let fitting = match tag {
            Some(tag) => Some(by(REF_NAME, tag))
                .filter(|found| !found.is_empty())
                .unwrap_or_else(|| by(CONTAINERD_IMAGE_NAME, tag)),
            None if images.len() == 1 => images.iter().collect(),
            None => Some(by(REF_NAME, "latest"))
                .filter(|found| !found.is_empty())
                .unwrap_or_else(|| images.iter().collect()),
        };
        let dir = self.dir.clone();
        let found = || {
            let tags: Vec<&str> = images
                .iter()
                .map(|image| tag_of(image).unwrap_or("an image without a tag"))
                .collect();
            if tags.is_empty() { "no image".to_owned() } else { tags.join(", ") }
        };
        match fitting[..] {
            [] => Err(LayoutError::NoTag {
                dir,
                tag: tag.unwrap_or("latest").to_owned(),
                found: found(),
            }),
            [first, ref rest @ ..] if rest.iter().all(|other| other.digest == first.digest) => {
                Ok(first.clone())
            }
            _ => {
                let wanted = tag.map_or("no tag".to_owned(), |tag| format!("{tag:?}"));
                Err(LayoutError::Ambiguous { dir, wanted, found: found() })
            }
        }
    }

    /// Reads the manifest or index that a descriptor names.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn document(&self, blob: &Descriptor) -> Result<Document, LayoutError> {
        let bytes = self.read_blob(blob)?;
        let path = self.blob_path(&blob.digest);
        Document::parse(&bytes, Some(&blob.media_type))
            .map_err(|source| LayoutError::Document { path, source })
    }

    /// The descriptor of the image manifest for a platform, found through the indexes in between.
    ///
    /// # Errors
    /// [`LayoutError::Document`] with [`ManifestError::NoPlatform`] if no image fits.
    pub fn select(
        &self,
        image: &Descriptor,
        platform: &Platform,
    ) -> Result<Descriptor, LayoutError> {
        let mut image = image.clone();
        for _ in 0..INDEX_DEPTH {
            let path = self.blob_path(&image.digest);
            let document = |source| LayoutError::Document { path: path.clone(), source };
            match self.document(&image)? {
                Document::Manifest(_) => return Ok(image),
                Document::Index(index) => image = index.select(platform).map_err(document)?.clone(),
            }
        }
        let path = self.blob_path(&image.digest);
        let reason = format!("an index more than {INDEX_DEPTH} indexes deep");
        Err(LayoutError::Document { path, source: ManifestError::Kind(reason) })
    }

    /// Gives an image its tag: the entry with this tag in `index.json` becomes `image`, or is added. All
    /// other entries and fields stay.
    ///
    /// # Errors
    /// [`LayoutError`]; `index.json` is then unchanged.
    pub fn put(&self, tag: &str, image: &Descriptor) -> Result<(), LayoutError> {
        let lock_path = self.dir.join("oci-layout");
        let lock = File::open(&lock_path).map_err(io_error("open", &lock_path))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| io_error("lock", &lock_path)(error.into()))?;
        self.index()?; // the replaced file must be an index
        let path = self.dir.join("index.json");
        let json = |source| LayoutError::Document {
            path: path.clone(),
            source: ManifestError::Json { what: "index", source },
        };
        let mut index: Value =
            serde_json::from_slice(&read_small(&self.dir, "index.json")?).map_err(json)?;
        let mut named = image.clone();
        named.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
        let mut entry = Some(serde_json::to_value(&named).map_err(json)?);
        let not_list = || ManifestError::Kind("an index without a list of manifests".to_owned());
        let manifests = index.get_mut("manifests").and_then(Value::as_array_mut);
        let manifests = manifests
            .ok_or_else(|| LayoutError::Document { path: path.clone(), source: not_list() })?;
        // The first entry with the tag is replaced in its place. Further entries with this tag are removed:
        // they would name another image.
        manifests.retain_mut(|present| {
            let is_same = present
                .pointer("/annotations")
                .and_then(|all| all.get(REF_NAME))
                .and_then(Value::as_str)
                == Some(tag);
            match (is_same, entry.is_some()) {
                (true, true) => entry.take().map(|entry| *present = entry).is_some(),
                (is_same, _) => !is_same,
            }
        });
        manifests.extend(entry);
        write_atomically(&path, index.to_string().as_bytes())
        // Closing the file releases the lock.
    }
}

/// A blob that is being written. If it is dropped without [`commit`](Self::commit), nothing remains.
#[derive(Debug)]
pub struct BlobWriter {
    file: NamedTempFile,
    blobs: PathBuf,
    hasher: Sha256,
    size: u64,
}

impl BlobWriter {
    /// Bytes written so far.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gives the blob its name, after its bytes have reached the disk. An existing blob of this name is
    /// replaced by the same bytes, which repairs a damaged one.
    ///
    /// # Errors
    /// [`LayoutError::Io`].
    pub fn commit(self, media_type: &str) -> Result<Descriptor, LayoutError> {
        let digest = Digest::from_hasher(self.hasher);
        persist(self.file, &self.blobs.join(digest.hex()), Overwrite::Allowed)?;
        Ok(Descriptor::new(media_type, digest, self.size))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The name to show for an image.
fn tag_of(image: &Descriptor) -> Option<&str> {
    image
        .annotations
        .get(REF_NAME)
        .or_else(|| image.annotations.get(CONTAINERD_IMAGE_NAME))
        .map(String::as_str)
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LayoutError {
    let path = path.to_owned();
    move |source| LayoutError::Io { action, path, source }
}

/// Opens a regular file below `dir` to read it; no part of its name may be a link.
fn open_below(dir: &Path, parts: &[&str]) -> Result<File, LayoutError> {
    let path = parts.iter().fold(dir.to_owned(), |path, part| path.join(part));
    let refused = |error: Errno| match error {
        // A link in the place of the file; one in the place of a folder.
        Errno::LOOP | Errno::NOTDIR => LayoutError::Link { path: path.clone() },
        error => io_error("open", &path)(error.into()),
    };
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // The user named this folder, by whatever links.
    let mut at = openat(CWD, dir, folder, Mode::empty())
        .map_err(|error| io_error("open", &path)(error.into()))?;
    let (name, folders) = parts.split_last().unwrap_or((&"", &[]));
    for part in folders {
        at = openat(at, *part, folder | OFlags::NOFOLLOW, Mode::empty()).map_err(refused)?;
    }
    // A pipe must not make this wait.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(at, *name, flags, Mode::empty()).map_err(refused)?);
    match file.metadata() {
        Ok(meta) if meta.is_file() => Ok(file),
        Ok(_) => Err(LayoutError::Link { path }),
        Err(error) => Err(io_error("examine", &path)(error)),
    }
}

/// Reads a file of the layout itself.
fn read_small(dir: &Path, name: &str) -> Result<Vec<u8>, LayoutError> {
    let path = dir.join(name);
    let mut bytes = Vec::new();
    let file = open_below(dir, &[name])?;
    file.take(DOCUMENT_LIMIT + 1).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
    match bytes.len() as u64 {
        size if size > DOCUMENT_LIMIT => Err(LayoutError::Large { path, size }),
        _ => Ok(bytes),
    }
}

/// Prefix of the temporary names of unfinished files.
const TEMPORARY: &str = ".turbobd-";

fn temporary(folder: &Path) -> Result<NamedTempFile, LayoutError> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY).permissions(fs::Permissions::from_mode(FILE_MODE));
    builder.tempfile_in(folder).map_err(io_error("make a file in", folder))
}

#[derive(Clone, Copy)]
enum Overwrite {
    Allowed,
    Never,
}

/// Syncs a file to the disk and gives it its name.
fn persist(file: NamedTempFile, place: &Path, overwrite: Overwrite) -> Result<(), LayoutError> {
    file.as_file().sync_all().map_err(io_error("write", place))?;
    let done = match overwrite {
        Overwrite::Allowed => file.persist(place),
        Overwrite::Never => file.persist_noclobber(place),
    };
    done.map_err(|error| io_error("write", place)(error.error))?;
    let folder = place.parent().unwrap_or(place);
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("write", folder))
}

fn write_atomically(place: &Path, bytes: &[u8]) -> Result<(), LayoutError> {
    let mut file = temporary(place.parent().unwrap_or(place))?;
    file.write_all(bytes).map_err(io_error("write", place))?;
    persist(file, place, Overwrite::Allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, LayoutDirectory) {
        let dir = tempfile::tempdir().unwrap();
        let layout = LayoutDirectory::open_or_create(&dir.path().join("new/layout")).unwrap();
        (dir, layout)
    }

    fn image(layout: &LayoutDirectory, name: &str) -> Descriptor {
        let config = layout.write_blob(media::OCI_CONFIG, name.as_bytes()).unwrap();
        let config = serde_json::to_string(&config).unwrap();
        let manifest = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#);
        layout.write_blob(media::OCI_MANIFEST, manifest.as_bytes()).unwrap()
    }

    fn files(layout: &LayoutDirectory) -> usize {
        fs::read_dir(layout.blobs()).unwrap().count()
    }

    #[test]
    fn what_is_put_under_a_tag_is_found_there() {
        let (_dir, layout) = layout();
        let (a, b) = (image(&layout, "a"), image(&layout, "b"));
        layout.put("1", &a).unwrap();
        assert_eq!(layout.resolve(None).unwrap().digest, a.digest);
        layout.put("docker.io/library/x:2", &b).unwrap();
        let again = LayoutDirectory::open(layout.dir()).unwrap();
        assert_eq!(again.resolve(Some("1")).unwrap().digest, a.digest);
        assert_eq!(again.resolve(Some("docker.io/library/x:2")).unwrap().digest, b.digest);
        assert!(matches!(again.document(&a).unwrap(), Document::Manifest(_)));
        layout.put("1", &b).unwrap();
        assert_eq!(again.resolve(None).unwrap().digest, b.digest, "both tags are the same image");
        assert_eq!(again.list().unwrap().len(), 2);
        let error = again.resolve(Some("3")).unwrap_err().to_string();
        assert!(error.ends_with(r#"has no image "3"; it has 1, docker.io/library/x:2"#), "{error}");
    }

    #[test]
    fn other_entries_and_fields_of_the_index_stay() {
        let (_dir, layout) = layout();
        let (a, b) = (image(&layout, "a"), image(&layout, "b"));
        let path = layout.dir().join("index.json");
        let entry = |tag: &str| {
            format!(
                r#"{{"mediaType":"{}","digest":"{}","size":{},"annotations":{{"io.containerd.image.name":"docker.io/x:{tag}","org.opencontainers.image.ref.name":"{tag}"}},"strange":1.5}}"#,
                media::OCI_MANIFEST,
                a.digest,
                a.size
            )
        };
        let index = |second: &str| {
            format!(
                r#"{{"schemaVersion":2,"manifests":[{}{second}],"annotations":{{"k":"v"}},"zzz":[18446744073709551615]}}"#,
                entry("1")
            )
        };
        fs::write(&path, index("")).unwrap();
        assert_eq!(layout.resolve(Some("docker.io/x:1")).unwrap().digest, a.digest);
        layout.put("2", &b).unwrap();
        let named = Descriptor { annotations: [(REF_NAME.to_owned(), "2".to_owned())].into(), ..b };
        let expected = index(&format!(",{}", serde_json::to_string(&named).unwrap()));
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
        assert!(matches!(layout.resolve(None), Err(LayoutError::Ambiguous { .. })));
    }

    #[test]
    fn a_blob_is_read_whole_and_right_or_not_at_all() {
        let (_dir, layout) = layout();
        let blob = layout.write_blob("x/y", b"content").unwrap();
        assert_eq!(layout.read_blob(&blob).unwrap(), b"content");
        assert!(layout.has_blob(&blob.digest, 7) && !layout.has_blob(&blob.digest, 8));
        layout.verify_blob(&blob).unwrap();
        for damage in [&b"Content"[..], b"conten", b"content and more"] {
            fs::write(layout.blob_path(&blob.digest), damage).unwrap();
            assert!(matches!(layout.read_blob(&blob), Err(LayoutError::Damaged { .. })));
            assert!(matches!(layout.verify_blob(&blob), Err(LayoutError::Damaged { .. })));
        }
        layout.write_blob("x/y", b"content").unwrap();
        assert_eq!(layout.read_blob(&blob).unwrap(), b"content", "writing it again repairs it");
        let huge = Descriptor { size: u64::MAX, ..blob };
        assert!(matches!(layout.read_blob(&huge), Err(LayoutError::Large { .. })));
    }

    #[test]
    fn a_blob_that_is_not_finished_leaves_nothing() {
        let (_dir, layout) = layout();
        let mut writer = layout.blob_writer().unwrap();
        writer.write_all(b"half").unwrap();
        assert_eq!((writer.size(), files(&layout)), (4, 1));
        drop(writer);
        assert_eq!(files(&layout), 0);
    }

    #[test]
    fn writers_at_the_same_time_lose_nothing() {
        let (_dir, layout) = layout();
        let image = image(&layout, "a");
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let (layout, image) = (&layout, &image);
                scope.spawn(move || {
                    (0..5).for_each(|tag| layout.put(&format!("{writer}-{tag}"), image).unwrap());
                });
            }
        });
        assert_eq!(layout.list().unwrap().len(), 20);
        assert_eq!(fs::read_dir(layout.dir()).unwrap().count(), 3);
    }

    #[test]
    fn a_directory_of_other_things_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "x").unwrap();
        assert!(matches!(
            LayoutDirectory::open_or_create(dir.path()),
            Err(LayoutError::NotLayout { .. })
        ));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(LayoutDirectory::open(dir.path()), Err(LayoutError::NotLayout { .. })));
        assert!(matches!(
            LayoutDirectory::open(Path::new("/nonexistent")),
            Err(LayoutError::NotLayout { .. })
        ));
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"9"}"#).unwrap();
        assert!(matches!(LayoutDirectory::open(dir.path()), Err(LayoutError::NotLayout { .. })));
    }

    #[test]
    fn an_index_leads_to_the_manifest_of_the_platform() {
        let (_dir, layout) = layout();
        let wanted = Platform::new("linux", "amd64", None);
        let image = Descriptor { platform: Some(wanted.clone()), ..image(&layout, "a") };
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            serde_json::to_string(&image).unwrap()
        );
        let index = layout.write_blob(media::OCI_INDEX, index.as_bytes()).unwrap();
        assert_eq!(layout.select(&index, &wanted).unwrap().digest, image.digest);
        assert!(layout.select(&index, &Platform::new("linux", "s390x", None)).is_err());
    }
}
