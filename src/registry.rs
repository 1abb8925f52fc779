//! The distribution client: names, credentials, ranges, uploads.
//!
//! A registry is an HTTP server that hands out manifests by tag and blobs by digest. What makes a
//! client of it more than a `GET` is everything that happens in between, and in a program that
//! starts containers *while* it downloads them, each of these is met in the middle of a page fault:
//!
//! * **Who may read.** A registry answers 401 with a challenge; a token service turns a password
//!   (or nothing) into a token for one repository. Tokens run out while a container runs, and some
//!   registries then say 403. Both mean: fetch a new token, once, and ask again ([`auth`]).
//!   Passwords come from the command line, from files in docker's form, or from docker's credential
//!   programs ([`credentials`]); they are looked up anew for every token, so a rotated one is found.
//! * **Where the bytes are.** Blobs are mostly answered by a redirect to a signed URL of an object
//!   store. Redirects are followed here, by hand: `Authorization` never leaves the registry's own
//!   origin, and the signed URL is kept until it expires ([`redirect`]).
//! * **What arrives.** A range read needs 206, the very `Content-Range` asked for and exactly that many
//!   bytes. A proxy that answers 200 with the whole blob would otherwise put the blob's first bytes
//!   where others belong ([`RemoteBlob`]).
//! * **Who is asked.** Mirrors come before the registry, a peer-to-peer proxy before both, each as long as
//!   it answers and tells the truth ([`host`]). A demand that is kept waiting longer than usual is asked for
//!   a second time, elsewhere if there is an elsewhere, and the first answer wins (`race`).
//! * **When it does not arrive.** Every read has a deadline and a number of tries ([`RetryPolicy`]);
//!   what can never succeed (404, 403 after a new token) fails at once.
//!
//! # Threads
//!
//! Callers are plain threads that want bytes: queue workers, inflate workers, a converter. The sockets
//! live on one or two I/O threads of this process, and [`transport`] is the synchronous face of
//! them: a request goes over, a head comes back, and the body follows through a bounded channel. So
//! a 10 GB layer is streamed in a few hundred KiB of memory, and a slow reader slows the sender.
//!
//! # Contents
//!
//! * [`client`]      [`Client`] and its options; one authorised exchange with retries
//! * [`repository`]  [`Repository`]: manifests and uploads
//! * [`blob`]        [`RemoteBlob`]: range reads of one blob, a [`ByteSource`](crate::source::ByteSource)
//! * `way`           where a blob can be had: the registry, a mirror, a peer; `race` one read of it
//! * [`stream`]      [`BlobReader`]: one blob from front to end, resumed where it broke
//! * [`auth`]        challenges and tokens
//! * [`credentials`] who we are to which registry; [`credential_service`] who knows it
//! * [`host`]        what is known of hosts: health, patience, retries; [`rate`] limits
//! * [`redirect`]    where a `Location` leads and how long it holds
//! * [`retry`]       when to try again, and when to stop
//! * [`transport`]   the I/O threads (`payload`: what is sent); [`tls`] trust; [`proxy`] the way out
//! * [`error`]       [`RegistryError`]

pub mod auth;
pub mod blob;
pub mod client;
pub mod credential_service;
pub mod credentials;
pub mod downloads;
pub mod error;
pub mod host;
mod payload;
pub mod proxy;
mod race;
pub mod rate;
pub mod redirect;
pub mod repository;
pub mod retry;
pub mod stream;
pub mod tls;
pub mod transport;
mod wait;
mod way;

pub use blob::{RemoteBlob, RemoteStats};
pub use client::{Client, ClientOptions};
pub use credential_service::CredentialService;
pub use credentials::{Credential, CredentialStore};
pub use downloads::{Download, DownloadLog};
pub use error::RegistryError;
pub use host::{Host, HostStats, Network};
pub use proxy::Proxies;
pub use repository::{Manifest, Repository};
pub use retry::RetryPolicy;
pub use stream::BlobReader;
pub use tls::ClientCertificate;
pub use transport::Timeouts;
