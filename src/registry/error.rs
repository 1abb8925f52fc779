//! What can go wrong with a registry, by what the caller can do about it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

/// Why a registry did not do what was asked. `what` is the thing asked for with its place, such as
/// `blob sha256:… of registry.example/team/app`. Cheap to clone: one failed read has many waiters.
#[derive(Clone, Debug, Error)]
pub enum RegistryError {
    /// 404: no such manifest or blob, or a repository that is hidden from us.
    #[error(
        "Not found: {what}; check the name, and log in if the repository is private: some registries hide those"
    )]
    NotFound {
        /// What was asked for, and where.
        what: String,
    },
    /// 401 or 403, after a fresh token.
    #[error(
        "Access to {what} was denied: {reason}; log in with docker login {host}, or give -u USER:PASSWORD"
    )]
    Denied {
        /// What was asked for, and where.
        what: String,
        /// Which registry wants credentials.
        host: String,
        /// What it or its token service said.
        reason: String,
    },
    /// 429, and 503 with `Retry-After`.
    #[error("The registry limits the rate of requests for {what}{}; wait, log in, or use a mirror", after(*.retry_after))]
    RateLimited {
        /// What was asked for, and where.
        what: String,
        /// How long it asked us to wait.
        retry_after: Option<Duration>,
    },
    /// No connection, or it broke, or nothing came in time.
    #[error("Cannot reach {host} for {what}: {reason}")]
    Unreachable {
        /// What was asked for, and where.
        what: String,
        /// The host that was spoken to: the registry or where it redirected.
        host: String,
        /// What happened.
        reason: String,
    },
    /// The server's certificate does not lead to an authority we trust.
    #[error(
        "The certificate of {host} is not trusted ({reason}): give the authority's certificate with --root-ca FILE, \
         use --plain for a registry without TLS, or --insecure to skip the check"
    )]
    Untrusted {
        /// The host.
        host: String,
        /// Which check failed.
        reason: String,
    },
    /// 5xx, or any status that has no meaning here.
    #[error("{host} answered {status} for {what}{}", said(.reason))]
    Server {
        /// What was asked for, and where.
        what: String,
        /// Who answered.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What it said, or nothing.
        reason: String,
    },
    /// An answer that breaks a rule of HTTP or of the distribution specification.
    #[error("{host} gave a wrong answer for {what}: {rule}")]
    Protocol {
        /// What was asked for, and where.
        what: String,
        /// Who answered.
        host: String,
        /// Which rule, and how it was broken.
        rule: String,
    },
    /// 200 to a ranged request: the whole blob was sent instead of a piece.
    #[error(
        "The registry ignores range requests: {host} answered 200 to a range of {what}; \
         it, or a proxy before it, cannot serve images lazily"
    )]
    RangeIgnored {
        /// What was asked for, and where.
        what: String,
        /// Who answered.
        host: String,
    },
    /// The blob has another size than its descriptor says, so no read of it can be right.
    #[error(
        "{host} has {actual} bytes of {what}, but its descriptor says {expected}: the manifest is wrong, or the server"
    )]
    SizeMismatch {
        /// What was asked for, and where.
        what: String,
        /// Who answered.
        host: String,
        /// Bytes by the descriptor.
        expected: u64,
        /// Bytes by the server.
        actual: u64,
    },
    /// The bytes are not the ones that were named.
    #[error("The registry sent wrong bytes for {what}: expected {expected}, got {actual}")]
    DigestMismatch {
        /// What was asked for, and where.
        what: String,
        /// The digest asked for.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// Larger than a manifest, token or error page may be.
    #[error("{what} is larger than {limit} bytes, the most that is accepted")]
    TooLarge {
        /// What was asked for, and where.
        what: String,
        /// The bound in bytes.
        limit: usize,
    },
    /// What was to be uploaded could not be read.
    #[error("Cannot read what is to be uploaded as {what}")]
    Upload {
        /// What was uploaded, and whereto.
        what: String,
        /// The reader's reason.
        #[source]
        source: Arc<io::Error>,
    },
    /// A host, repository or reference that cannot be part of a registry's URL.
    #[error("{text:?} is not {expected}")]
    BadName {
        /// The text given.
        text: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// An option of this client that cannot be used: a certificate, a key, a proxy.
    #[error("Cannot set up the registry client: {reason}")]
    Setup {
        /// Which option, and why.
        reason: String,
    },
    /// The retry budget is used up; `last` is how the last try ended.
    #[error("{last} (gave up after {tries} tries in {:.1} s)", .elapsed.as_secs_f64())]
    GaveUp {
        /// How often it was tried.
        tries: u32,
        /// From the first try on.
        elapsed: Duration,
        /// How the last try ended.
        last: Box<RegistryError>,
    },
}

fn after(retry_after: Option<Duration>) -> String {
    retry_after.map_or_else(String::new, |wait| format!(" (it asks to wait {} s)", wait.as_secs()))
}

fn said(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

impl RegistryError {
    /// Whether the same request may succeed a moment later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. } | Self::Unreachable { .. } | Self::Protocol { .. } => true,
            Self::Server { status, .. } => *status >= 500 || *status == 408,
            _ => false,
        }
    }

    /// How the matter ended when the tries are set aside.
    #[must_use]
    pub fn root(&self) -> &Self {
        match self {
            Self::GaveUp { last, .. } => last.root(),
            other => other,
        }
    }

    /// What the server asked us to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
