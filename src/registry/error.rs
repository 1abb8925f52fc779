//! Errors of a registry, sorted by the caller's possible reactions.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

/// Reasons why a registry did not do what was asked. `what` is the requested object with its place,
/// such as `blob sha256:… of registry.example/team/app`. Cheap to clone: one failed read has many
/// waiters.
#[derive(Clone, Debug, Error)]
pub enum RegistryError {
    /// 404: no such manifest or blob, or a repository that this user may not see.
    #[error(
        "Not found: {what}; check the name, and log in if the repository is private: some registries hide private repositories"
    )]
    NotFound {
        /// The requested object and its place.
        what: String,
    },
    /// 401 or 403, after a fresh token.
    #[error(
        "Access to {what} was denied: {reason}; log in with docker login {host}, or give -u USER --password-stdin"
    )]
    Denied {
        /// The requested object and its place.
        what: String,
        /// The registry that wants credentials.
        host: String,
        /// Text from it or from its token service.
        reason: String,
    },
    /// 429, and 503 with `Retry-After`.
    #[error("The registry limits the rate of requests for {what}{}; wait, log in, or use a mirror", after(*.retry_after))]
    RateLimited {
        /// The requested object and its place.
        what: String,
        /// Pause that it asks for.
        retry_after: Option<Duration>,
    },
    /// No connection, a broken connection, or no answer in time.
    #[error("Cannot reach {host} for {what}: {reason}")]
    Unreachable {
        /// The requested object and its place.
        what: String,
        /// The host that was asked: the registry or the target of its redirect.
        host: String,
        /// Reason of the failure.
        reason: String,
    },
    /// A redirect, a token service or an upload leads to an address of this host, to a link-local one, or away from TLS.
    #[error("{what} is not read: {reason}")]
    OutOfReach {
        /// The requested object and its place.
        what: String,
        /// The host, and the reason against it.
        reason: String,
    },
    /// The server's certificate does not lead to a trusted authority.
    #[error(
        "The certificate of {host} is not trusted ({reason}): give the authority's certificate with --root-ca FILE, \
         use --plain for a registry without TLS, or --insecure to skip the check"
    )]
    Untrusted {
        /// The host.
        host: String,
        /// The check that failed.
        reason: String,
    },
    /// 5xx, or any status without a meaning here.
    #[error("{host} answered {status} for {what}{}", said(.reason))]
    Server {
        /// The requested object and its place.
        what: String,
        /// The host that answered.
        host: String,
        /// The HTTP status.
        status: u16,
        /// Text from the host, or empty.
        reason: String,
    },
    /// An answer that breaks a rule of HTTP or of the distribution specification.
    #[error("{host} gave a wrong answer for {what}: {rule}")]
    Protocol {
        /// The requested object and its place.
        what: String,
        /// The host that answered.
        host: String,
        /// The broken rule, and the deviation.
        rule: String,
    },
    /// 200 to a range request: the server sent the whole blob instead of a piece.
    #[error(
        "The registry ignores range requests: {host} answered 200 to a range of {what}; \
         it, or a proxy before it, cannot serve images lazily"
    )]
    RangeIgnored {
        /// The requested object and its place.
        what: String,
        /// The host that answered.
        host: String,
    },
    /// The blob has another size than its descriptor states, so no read of it can be right.
    #[error(
        "{host} has {actual} bytes of {what}, but its descriptor says {expected}: the manifest is wrong, or the server"
    )]
    SizeMismatch {
        /// The requested object and its place.
        what: String,
        /// The host that answered.
        host: String,
        /// Size in bytes by the descriptor.
        expected: u64,
        /// Size in bytes by the server.
        actual: u64,
    },
    /// The received bytes have another digest than the requested one.
    #[error("The registry sent wrong bytes for {what}: expected {expected}, got {actual}")]
    DigestMismatch {
        /// The requested object and its place.
        what: String,
        /// The requested digest.
        expected: String,
        /// The digest of the received bytes.
        actual: String,
    },
    /// The answer is larger than a manifest, token or error page may be.
    #[error("{what} is larger than {limit} bytes, the most that is accepted")]
    TooLarge {
        /// The requested object and its place.
        what: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// The content to upload could not be read.
    #[error("Cannot read the content to upload as {what}")]
    Upload {
        /// The uploaded object and its destination.
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
        /// The expected form.
        expected: &'static str,
    },
    /// An unusable option of this client: a certificate, a key, a proxy.
    #[error("Cannot set up the registry client: {reason}")]
    Setup {
        /// The option, and the reason.
        reason: String,
    },
    /// The retry budget is used up; `last` is the result of the last try.
    #[error("{last} (gave up after {tries} tries in {:.1} s)", .elapsed.as_secs_f64())]
    GaveUp {
        /// Number of tries.
        tries: u32,
        /// Time since the first try.
        elapsed: Duration,
        /// Error of the last try.
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
    /// True if the same request may succeed a moment later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. } | Self::Unreachable { .. } | Self::Protocol { .. } => true,
            Self::Server { status, .. } => *status >= 500 || *status == 408,
            _ => false,
        }
    }

    /// The error without the count of tries.
    #[must_use]
    pub fn root(&self) -> &Self {
        match self {
            Self::GaveUp { last, .. } => last.root(),
            other => other,
        }
    }

    /// Pause that the server asked for.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
