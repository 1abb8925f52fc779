//! Names that a user gives for images.
//!
//! `[host[:port]/]name[:tag|@digest]` names an image in a registry, `oci:DIR[:TAG|@DIGEST]` one in an image layout
//! directory. Registry names follow Docker: `debian` is `docker.io/library/debian:latest`. The grammar is
//! that of the distribution specification; a name outside it is refused, without a guess.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use crate::oci::digest::{Digest, DigestError};

/// The registry of a name without a host.
pub const DEFAULT_HOST: &str = "docker.io";

/// The tag of a name without one.
pub const DEFAULT_TAG: &str = "latest";

/// The folder of Docker's official images; their names omit it.
const OFFICIAL: &str = "library/";

/// Prefix of a layout name.
const LAYOUT_PREFIX: &str = "oci:";

/// Largest number of bytes in host and repository together, by the distribution specification.
const NAME_LIMIT: usize = 255;

/// A text that is not an image name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is not an image name: {reason}")]
pub struct ReferenceError {
    /// The text.
    pub text: String,
    /// The rule that it breaks.
    pub reason: ReferenceRule,
}

/// Rules for names.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum ReferenceRule {
    #[error("it is empty")]
    Empty,
    #[error("it has no directory after oci:")]
    NoDirectory,
    #[error("it starts with a scheme; write host/name alone")]
    Scheme,
    #[error("the host {0:?} must be a host name or address with an optional port")]
    Host(String),
    #[error(
        "the repository {0:?} must be lower-case letters and digits, joined by single . or _, __, - or /"
    )]
    Repository(String),
    #[error("host and repository have {0} bytes; {NAME_LIMIT} are allowed")]
    Long(usize),
    #[error("the tag {0:?} must be 1 to 128 letters, digits, _, . and -, with no . or - in front")]
    Tag(String),
    #[error("the tag {0:?} of a layout must be letters and digits joined by -._:@+/")]
    LayoutTag(String),
    #[error(transparent)]
    Digest(#[from] DigestError),
    #[error("this must be a repository, without a tag or digest")]
    NotRepository,
}

/// An image in a registry or in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ImageName {
    /// An image in a registry.
    Registry(RegistryName),
    /// An image in an image layout directory.
    Layout(LayoutName),
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryName {
    /// Host with port, as written; `docker.io` by default.
    pub host: String,
    /// The repository: `library/debian`.
    pub repository: String,
    /// The tag, if given.
    pub tag: Option<String>,
    /// The digest of the manifest, if given. It alone then selects the manifest; the tag has no effect.
    pub digest: Option<Digest>,
}

/// An image in an image layout directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayoutName {
    /// The directory. It cannot contain a colon, because a colon starts the tag.
    pub dir: PathBuf,
    /// The reference name (`org.opencontainers.image.ref.name`), if given.
    pub tag: Option<String>,
    /// The digest of the manifest, if given. It alone then selects the manifest; the tag has no effect.
    pub digest: Option<Digest>,
}

/// A place for images: the name of an image without its tag.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RepositoryName {
    /// A repository of a registry.
    Registry {
        /// Host with port.
        host: String,
        /// The repository.
        repository: String,
    },
    /// An image layout directory.
    Layout(PathBuf),
}

impl RegistryName {
    /// The reference to request from the registry: the digest, else the tag, else `latest`.
    #[must_use]
    pub fn reference(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }
}

impl ImageName {
    /// The place of the image, without its tag.
    #[must_use]
    pub fn repository(&self) -> RepositoryName {
        match self {
            Self::Registry(name) => RepositoryName::Registry {
                host: name.host.clone(),
                repository: name.repository.clone(),
            },
            Self::Layout(name) => RepositoryName::Layout(name.dir.clone()),
        }
    }
}

impl RepositoryName {
    /// The image with this tag in this place.
    ///
    /// # Errors
    /// [`ReferenceError`] if `tag` is not a valid tag.
    pub fn with_tag(&self, tag: &str) -> Result<ImageName, ReferenceError> {
        let checked = match self {
            Self::Registry { .. } => {
                is_tag(tag).then_some(()).ok_or(ReferenceRule::Tag(tag.to_owned()))
            }
            Self::Layout(_) => {
                is_layout_tag(tag).then_some(()).ok_or(ReferenceRule::LayoutTag(tag.to_owned()))
            }
        };
        checked.map_err(|reason| ReferenceError { text: format!("{self}:{tag}"), reason })?;
        let tag = Some(tag.to_owned());
        Ok(match self {
            Self::Registry { host, repository } => {
                let (host, repository) = (host.clone(), repository.clone());
                ImageName::Registry(RegistryName { host, repository, tag, digest: None })
            }
            Self::Layout(dir) => {
                ImageName::Layout(LayoutName { dir: dir.clone(), tag, digest: None })
            }
        })
    }
}

impl ImageName {
    /// Makes the directory absolute, so that a process with another working directory finds the same image.
    ///
    /// # Errors
    /// If this process has no working directory.
    pub fn absolute(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Layout(name) => Self::Layout(LayoutName {
                dir: std::path::absolute(&name.dir)?,
                tag: name.tag.clone(),
                digest: name.digest,
            }),
            Self::Registry(_) => self.clone(),
        })
    }
}

impl RepositoryName {
    /// Makes the directory absolute, so that a process with another working directory finds the same place.
    ///
    /// # Errors
    /// If this process has no working directory.
    pub fn absolute(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Layout(dir) => Self::Layout(std::path::absolute(dir)?),
            Self::Registry { .. } => self.clone(),
        })
    }
}

impl FromStr for ImageName {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let parsed = match text.strip_prefix(LAYOUT_PREFIX) {
            Some(rest) => layout_name(rest).map(Self::Layout),
            None => registry_name(text).map(Self::Registry),
        };
        parsed.map_err(|reason| ReferenceError { text: shortened(text), reason })
    }
}

impl FromStr for RepositoryName {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let is_bare = match text.parse::<ImageName>()? {
            ImageName::Registry(RegistryName { tag, digest, .. }) => {
                tag.is_none() && digest.is_none()
            }
            ImageName::Layout(LayoutName { tag, digest, .. }) => tag.is_none() && digest.is_none(),
        };
        if !is_bare {
            return Err(ReferenceError {
                text: shortened(text),
                reason: ReferenceRule::NotRepository,
            });
        }
        text.parse::<ImageName>().map(|name| name.repository())
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        match (&self.tag, &self.digest) {
            (Some(tag), Some(digest)) => write!(f, ":{tag}@{digest}"),
            (Some(tag), None) => write!(f, ":{tag}"),
            (None, Some(digest)) => write!(f, "@{digest}"),
            (None, None) => write!(f, ":{DEFAULT_TAG}"),
        }
    }
}

impl fmt::Display for LayoutName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{LAYOUT_PREFIX}{}", self.dir.display())?;
        self.tag.iter().try_for_each(|tag| write!(f, ":{tag}"))?;
        self.digest.iter().try_for_each(|digest| write!(f, "@{digest}"))
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(name) => name.fmt(f),
            Self::Layout(name) => name.fmt(f),
        }
    }
}

impl fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry { host, repository } => write!(f, "{host}/{repository}"),
            Self::Layout(dir) => write!(f, "{LAYOUT_PREFIX}{}", dir.display()),
        }
    }
}

/// Shortens a text for a message.
fn shortened(text: &str) -> String {
    text.chars().take(300).collect()
}

fn layout_name(text: &str) -> Result<LayoutName, ReferenceRule> {
    // A tag may have an `@` in it, but what ends like a digest is one.
    let (text, digest) = match text.rsplit_once('@') {
        Some((rest, digest)) if digest.starts_with("sha256:") => {
            (rest, Some(digest.parse::<Digest>()?))
        }
        _ => (text, None),
    };
    let (dir, tag) = match text.split_once(':') {
        Some((dir, tag)) => (dir, Some(tag)),
        None => (text, None),
    };
    if dir.is_empty() {
        return Err(ReferenceRule::NoDirectory);
    }
    match tag {
        Some(tag) if !is_layout_tag(tag) => Err(ReferenceRule::LayoutTag(shortened(tag))),
        tag => Ok(LayoutName { dir: PathBuf::from(dir), tag: tag.map(str::to_owned), digest }),
    }
}

fn registry_name(text: &str) -> Result<RegistryName, ReferenceRule> {
    if text.is_empty() {
        return Err(ReferenceRule::Empty);
    }
    if text.contains("://") {
        return Err(ReferenceRule::Scheme);
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
        None => (text, None),
    };
    // A colon in the last part starts a tag; a colon in an earlier part starts a port.
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest[last..].split_once(':') {
        Some((_, tag)) => (&rest[..rest.len() - tag.len() - 1], Some(tag)),
        None => (rest, None),
    };
    let (host, repository) = match name.split_once('/') {
        Some((host, repository)) if is_like_host(host) => (host, repository.to_owned()),
        _ => (DEFAULT_HOST, name.to_owned()),
    };
    let host = if host == "index.docker.io" { DEFAULT_HOST } else { host };
    let is_official = host == DEFAULT_HOST && !repository.contains('/');
    let repository = if is_official { format!("{OFFICIAL}{repository}") } else { repository };

    if !is_host(host) {
        return Err(ReferenceRule::Host(shortened(host)));
    }
    if !is_repository(&repository) {
        return Err(ReferenceRule::Repository(shortened(&repository)));
    }
    if host.len() + 1 + repository.len() > NAME_LIMIT {
        return Err(ReferenceRule::Long(host.len() + 1 + repository.len()));
    }
    match tag {
        Some(tag) if !is_tag(tag) => Err(ReferenceRule::Tag(shortened(tag))),
        tag => Ok(RegistryName {
            host: host.to_owned(),
            repository,
            tag: tag.map(str::to_owned),
            digest,
        }),
    }
}

/// Docker's rule: the first part is a host if it cannot be a name on Docker Hub.
fn is_like_host(part: &str) -> bool {
    part == "localhost"
        || part.contains(['.', ':', '['])
        || part.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn is_host(host: &str) -> bool {
    let (name, port) = match (host.starts_with('['), host.rfind(':')) {
        // The last colon of `[::1]` is part of the address.
        (true, Some(colon)) if host[colon..].contains(']') => (host, None),
        (_, Some(colon)) => (&host[..colon], Some(&host[colon + 1..])),
        (_, None) => (host, None),
    };
    let is_port = |port: &str| {
        port.bytes().all(|byte| byte.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    };
    let is_address = |name: &str| {
        let inner = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
        inner.is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok())
    };
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty()
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    port.is_none_or(is_port) && (is_address(name) || name.split('.').all(is_label))
}

fn is_repository(repository: &str) -> bool {
    repository.split('/').all(|part| {
        is_joined(part.as_bytes(), |byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    })
}

/// True if `part` is runs of `is_plain` bytes joined by one `.`, one or two `_`, or any number of `-`.
fn is_joined(part: &[u8], is_plain: impl Fn(u8) -> bool + Copy) -> bool {
    let is_separator =
        |run: &[u8]| matches!(run, b"." | b"_" | b"__") || run.iter().all(|&byte| byte == b'-');
    let ends_plain = |byte: Option<&u8>| byte.is_some_and(|&byte| is_plain(byte));
    ends_plain(part.first())
        && ends_plain(part.last())
        && part
            .chunk_by(|&a, &b| is_plain(a) == is_plain(b))
            .all(|run| is_plain(run[0]) || is_separator(run))
}

/// `[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}`
fn is_tag(tag: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=128).contains(&tag.len())
        && tag.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
        && tag.bytes().next().is_some_and(is_word)
}

/// The grammar of `org.opencontainers.image.ref.name`, slightly relaxed: separators may repeat.
fn is_layout_tag(tag: &str) -> bool {
    let ends_plain =
        |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:@+/".contains(&byte))
        && ends_plain(tag.bytes().next())
        && ends_plain(tag.bytes().last())
        && tag.len() <= 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn shown(text: &str) -> String {
        match text.parse::<ImageName>() {
            Ok(name) => name.to_string(),
            Err(error) => error.reason.to_string(),
        }
    }

    #[test]
    fn a_short_name_means_what_docker_means() {
        for (text, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("me/app", "docker.io/me/app:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b__c/d-e---f:v1.0_x", "localhost:5000/a/b__c/d-e---f:v1.0_x"),
            ("registry.example.com/a.b/c", "registry.example.com/a.b/c:latest"),
            ("Host/a", "Host/a:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("[::1]/a:b", "[::1]/a:b"),
            ("127.0.0.1:80/a", "127.0.0.1:80/a:latest"),
            ("oci:dir", "oci:dir"),
            ("oci:/a/b:12", "oci:/a/b:12"),
            ("oci:./x:docker.io/library/debian:12", "oci:./x:docker.io/library/debian:12"),
        ] {
            assert_eq!(shown(text), full);
            assert_eq!(shown(full), full);
        }
        let with_digest = format!("a.b/c@{DIGEST}");
        assert_eq!(shown(&with_digest), with_digest);
        let with_both = format!("a.b/c:tag@{DIGEST}");
        assert_eq!(shown(&with_both), with_both);
        let ImageName::Registry(name) = with_both.parse().unwrap() else { panic!() };
        assert_eq!((name.reference(), name.tag.as_deref()), (DIGEST.to_owned(), Some("tag")));
        for (text, tag) in [("oci:./d", None), ("oci:./d:a@b", Some("a@b"))] {
            let pinned = format!("{text}@{DIGEST}");
            assert_eq!(shown(&pinned), pinned);
            let ImageName::Layout(name) = pinned.parse().unwrap() else { panic!() };
            assert_eq!((name.dir.to_str(), name.tag.as_deref()), (Some("./d"), tag));
            assert_eq!(name.digest.map(|digest| digest.to_string()).as_deref(), Some(DIGEST));
        }
    }

    #[test]
    fn a_text_outside_the_grammar_is_refused() {
        for text in [
            "",
            ":",
            "a:",
            "a:-b",
            ":tag",
            "a b",
            "A",
            "a/B",
            "a//b",
            "a/",
            "/a",
            "a._b",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "a@sha256:00",
            "a@",
            "https://a.b/c",
            "h:x/a",
            "h:0/a",
            "h:99999/a",
            "h:+1/a",
            "-h.x/a",
            "a.b.",
            "a.b/",
            "oci:",
            "oci::tag",
            "oci:d:",
            "oci:d:-x",
            "oci:d@sha256:00",
            "oci:@sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "ä",
            "[x]/a",
            "é.com/a",
        ] {
            assert!(text.parse::<ImageName>().is_err(), "{text:?}");
        }
        assert!(format!("a:{}", "t".repeat(129)).parse::<ImageName>().is_err());
        assert!(format!("h.x/{}", "r".repeat(252)).parse::<ImageName>().is_err());
        assert_eq!(
            shown("a/B"),
            "the repository \"a/B\" must be lower-case letters and digits, joined by single . or _, __, - or /"
        );
    }

    #[test]
    fn a_repository_has_no_tag_and_takes_one() {
        let repository: RepositoryName = "localhost:5000/a".parse().unwrap();
        assert_eq!(repository.with_tag("b").unwrap().to_string(), "localhost:5000/a:b");
        assert!(repository.with_tag("b/c").is_err());
        let layout: RepositoryName = "oci:dir".parse().unwrap();
        assert_eq!(layout.with_tag("b").unwrap().to_string(), "oci:dir:b");
        assert_eq!(layout.to_string(), "oci:dir");
        for text in ["a:b", "oci:d:b"] {
            assert_eq!(
                text.parse::<RepositoryName>().unwrap_err().reason,
                ReferenceRule::NotRepository
            );
        }
    }
}
