//! The socket of the service, and what systemd is told.
//!
//! With socket activation systemd makes the socket and keeps it while this process restarts: containerd's calls wait
//! instead of failing. Without it, the process makes the socket itself. A file that a dead process left is removed; a
//! socket that answers belongs to a living one, and is refused by its name.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use sd_notify::NotifyState;
use thiserror::Error;

/// Failure to take the socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another process answers on it.
    #[error(
        "{0} is in use: another snapshotter answers there; stop it first, or choose another --address"
    )]
    Taken(PathBuf),
    /// Something that is no socket has its name.
    #[error("{0} is no socket: remove it, or choose another --address")]
    NoSocket(PathBuf),
    /// systemd passed something else, or several sockets.
    #[error("LISTEN_FDS passes {0}: the unit must have one ListenStream= with a path")]
    Passed(String),
    /// The system refuses.
    #[error("Cannot {what} {path}", path = path.display())]
    System {
        /// Step that was tried.
        what: &'static str,
        /// The socket, or its folder.
        path: PathBuf,
        /// Answer of the system.
        #[source]
        source: io::Error,
    },
}

/// A socket that listens. Its file is removed at the end, if this process made it.
#[derive(Debug)]
pub struct ServiceSocket {
    listener: UnixListener,
    own: Option<OwnFile>,
}

/// A socket file of this process: its path and its inode.
#[derive(Debug)]
struct OwnFile {
    path: PathBuf,
    inode: u64,
}

impl ServiceSocket {
    /// Takes the socket that systemd passes, else makes one at `address`, for root alone.
    ///
    /// # Errors
    /// Returns [`SocketError`].
    pub fn take(address: &Path) -> Result<Self, SocketError> {
        match passed()? {
            Some(listener) => Ok(Self { listener, own: None }),
            None => Self::bind(address),
        }
    }

    /// Makes the socket at `address`.
    ///
    /// # Errors
    /// Returns [`SocketError`].
    pub fn bind(address: &Path) -> Result<Self, SocketError> {
        let failed =
            |what| move |source| SocketError::System { what, path: address.to_owned(), source };
        if let Some(folder) = address.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            sys::private::folder(folder).map_err(|source| SocketError::System {
                what: "use the folder",
                path: folder.to_owned(),
                source,
            })?;
        }
        match std::fs::symlink_metadata(address) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("examine")(error)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(SocketError::NoSocket(address.to_owned()));
            }
            Ok(_) => match UnixStream::connect(address) {
                Ok(_) => return Err(SocketError::Taken(address.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(address).map_err(failed("remove the old socket"))?;
                }
                // Its queue is full: it lives.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(SocketError::Taken(address.to_owned()));
                }
                Err(error) => return Err(failed("ask")(error)),
            },
        }
        let listener = UnixListener::bind(address).map_err(failed("make the socket"))?;
        let mode = std::fs::Permissions::from_mode(sys::private::FILE_MODE);
        std::fs::set_permissions(address, mode).map_err(failed("protect the socket"))?;
        let inode = std::fs::symlink_metadata(address).map_err(failed("examine"))?.ino();
        Ok(Self { listener, own: Some(OwnFile { path: address.to_owned(), inode }) })
    }

    /// A second handle of the listening socket.
    ///
    /// # Errors
    /// The system's.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for ServiceSocket {
    fn drop(&mut self) {
        let Some(own) = &self.own else { return };
        // A successor may have made its own already.
        if std::fs::symlink_metadata(&own.path).is_ok_and(|meta| meta.ino() == own.inode) {
            let _ = std::fs::remove_file(&own.path);
        }
    }
}

/// The one socket that systemd passes.
fn passed() -> Result<Option<UnixListener>, SocketError> {
    let mut passed = ListenFd::from_env();
    match passed.len() {
        0 => Ok(None),
        1 => {
            let listener = passed
                .take_unix_listener(0)
                .map_err(|error| SocketError::Passed(format!("no Unix socket ({error})")))?;
            Ok(listener)
        }
        several => Err(SocketError::Passed(format!("{several} sockets"))),
    }
}

/// Tells systemd that calls are answered. Without systemd, nothing.
pub fn tell_ready() {
    tell(&[NotifyState::Ready]);
}

/// Tells systemd that the process ends.
pub fn tell_stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("NOTIFY_SOCKET cannot be reached: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_answers_is_refused_by_name_and_one_of_a_dead_process_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("below/s");
        let socket = ServiceSocket::bind(&address).unwrap();
        let mode = std::fs::metadata(&address).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let refused = ServiceSocket::bind(&address).unwrap_err();
        assert!(refused.to_string().contains(address.to_str().unwrap()), "{refused}");
        assert!(matches!(refused, SocketError::Taken(_)));
        drop(socket);
        assert!(!address.exists());
        // A dead process closes its socket and leaves the file.
        drop(UnixListener::bind(&address).unwrap());
        drop(ServiceSocket::bind(&address).unwrap());
        std::fs::write(&address, b"a file").unwrap();
        assert!(matches!(ServiceSocket::bind(&address).unwrap_err(), SocketError::NoSocket(_)));
        assert_eq!(std::fs::read(&address).unwrap(), b"a file");
    }

    #[test]
    fn a_successors_socket_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("s");
        let old = ServiceSocket::bind(&address).unwrap();
        std::fs::remove_file(&address).unwrap();
        let new = ServiceSocket::bind(&address).unwrap();
        drop(old);
        assert!(address.exists());
        drop(new);
        assert!(!address.exists());
    }
}
