//! Lines on the socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ClientError, step};
use crate::protocol::MAX_LINE;

/// One end of a connection.
pub struct Connection {
    reader: BufReader<UnixStream>,
    path: PathBuf,
}

impl Connection {
    /// One end of `stream`; `path` is the name of its socket in messages.
    #[must_use]
    pub fn new(stream: UnixStream, path: PathBuf) -> Self {
        Self { reader: BufReader::new(stream), path }
    }

    /// Bounds each later read and write; `None`: no bound. A longer one fails with [`is_late`](crate::error::is_late).
    pub(crate) fn set_patience(&self, patience: Option<Duration>) -> Result<(), ClientError> {
        let stream = self.reader.get_ref();
        stream
            .set_read_timeout(patience)
            .and_then(|()| stream.set_write_timeout(patience))
            .map_err(step("set the deadline of", &self.path))
    }

    /// True if nothing has come from the other side, not even its end.
    pub(crate) fn is_quiet(&self) -> bool {
        let mut fds = [PollFd::new(self.reader.get_ref(), PollFlags::IN)];
        self.reader.buffer().is_empty()
            && matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
    }

    /// Sends one message.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), ClientError> {
        let send = |stream: &mut UnixStream| {
            let mut line = serde_json::to_vec(message)?;
            line.push(b'\n');
            stream.write_all(&line)
        };
        send(self.reader.get_mut()).map_err(step("write to", &self.path))
    }

    /// The next message; `None` at the end of the connection.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        let mut line = Vec::new();
        let read = (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut line);
        if read.map_err(step("read from", &self.path))? == 0 {
            return Ok(None);
        }
        let wrong = |what: String| ClientError::Protocol { path: self.path.clone(), what };
        if line.last() != Some(&b'\n') {
            return Err(wrong(format!("a line without an end after {} bytes", line.len())));
        }
        serde_json::from_slice(&line).map(Some).map_err(|error| wrong(error.to_string()))
    }
}
