//! The distribution client, and the stores of images: registries and layout directories.
//!
//! A registry is an HTTP server that serves manifests by tag and blobs by digest. A client needs
//! more than `GET`, and a program that starts containers *while* it downloads them meets each of
//! these needs in the middle of a page fault:
//!
//! * **Authentication.** A registry answers 401 with a challenge; a token service turns a password
//!   (or nothing) into a token for one repository. Tokens expire while a container runs, and some
//!   registries then answer 403. In both cases the client fetches a new token, once, and repeats
//!   the request ([`auth`]). Passwords come from the command line, from files in docker's form, or
//!   from docker's credential programs ([`credentials`]); they are looked up again for every token,
//!   so a rotated password is found.
//! * **Redirects.** Most registries answer a blob request with a redirect to a signed URL of an
//!   object store. This client follows redirects itself: `Authorization` never leaves the
//!   registry's own origin, and the signed URL is kept until it expires ([`redirect`]).
//! * **Checked answers.** A range read requires status 206, exactly the requested `Content-Range`
//!   and exactly that many bytes. Without this check, a proxy that answers 200 with the whole blob
//!   would put the blob's first bytes in the place of others ([`RemoteBlob`]).
//! * **Mirrors and peers.** Mirrors are asked before the registry, and a peer-to-peer proxy before
//!   both, as long as they answer and send right bytes ([`host`]). A demand read that waits longer
//!   than usual gets a second request, at another host if there is one, and the first answer wins
//!   (`race`).
//! * **Failures.** Every read has a deadline and a maximum number of tries ([`RetryPolicy`]); an
//!   error that no retry can mend (404, 403 after a new token) fails at once.
//!
//! # Threads
//!
//! The callers are plain threads that want bytes: fetch threads, frame threads, a converter, a connection of the daemon. The
//! sockets belong to one or two I/O threads of this process, and [`transport`] is their synchronous
//! interface: a request goes over, a head comes back, and the body follows through a bounded
//! channel. So a layer of 10 GB is streamed in a few hundred KiB of memory, and a slow reader slows
//! the sender.
//!
//! # Contents
//!
//! * [`store`]       one trait for the places where images are; [`layout`] the image layout directory
//! * [`client`]      [`RegistryClient`] and its options; one authorised exchange with retries
//! * [`repository`]  [`Repository`]: manifests and uploads
//! * [`blob`]        [`RemoteBlob`]: range reads of one blob, a [`ByteSource`](source::ByteSource)
//! * [`reach`]       addresses that a registry or an image may send this host to
//! * `way`           one source of a blob: the registry, a mirror, a peer; `race` one read of it
//! * [`stream`]      [`BlobReader`]: one blob from front to end, resumed after a broken connection
//! * [`auth`]        challenges and tokens
//! * [`credentials`] credentials per registry; [`credential_service`] a service that gives them
//! * [`host`]        state of each host: health, patience, retries; [`rate`] limits
//! * [`redirect`]    target and lifetime of a `Location`
//! * [`signatures`]  signatures of manifests by listed keys
//! * [`retry`]       retry policy: pauses, deadlines, numbers of tries
//! * [`transport`]   the I/O threads (`payload`: request bodies); [`tls`] trust; [`proxy`] proxies
//! * [`error`]       [`RegistryError`]
//!
//! ```
//! use turbobd_registry::LayoutDirectory;
//! let dir = tempfile::tempdir()?;
//! let layout = LayoutDirectory::open_or_create(dir.path())?;
//! let blob = layout.write_blob("text/plain", b"bytes")?;
//! assert_eq!(layout.read_blob(&blob)?, b"bytes");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod auth;
pub mod blob;
pub mod client;
pub mod credential_service;
pub mod credentials;
pub mod downloads;
pub mod error;
pub mod host;
pub mod layout;
mod payload;
pub mod proxy;
mod race;
pub mod rate;
pub mod reach;
pub mod redirect;
pub mod repository;
pub mod retry;
pub mod signatures;
pub mod store;
pub mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tls;
pub mod transport;
mod wait;
mod way;

pub use blob::{RemoteBlob, RemoteStats};
pub use client::{ClientOptions, RegistryClient};
pub use credential_service::{CredentialPlace, CredentialService};
pub use credentials::{Credential, CredentialStore};
pub use downloads::{Download, DownloadLog};
pub use error::RegistryError;
pub use host::{Hedging, Host, HostStats, Network, NetworkOptions};
pub use layout::{LayoutDirectory, LayoutError};
pub use proxy::Proxies;
pub use repository::{FetchedManifest, Repository};
pub use retry::RetryPolicy;
pub use stream::BlobReader;
pub use tls::ClientCertificate;
pub use transport::Timeouts;
