//! The first correct answer of a service.
//!
//! A service is available when a request gets an answer with status 200 that contains the text that only a working
//! service knows. A refused connection, another status, an answer that ends early: not yet.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Pause between two attempts: what it adds to a time is below what is shown.
const PAUSE: Duration = Duration::from_millis(2);

/// Longest wait for one answer; the service computes it, on a busy machine.
const ONE: Duration = Duration::from_secs(60);

/// Largest answer that is read.
const LARGEST: u64 = 1 << 20;

/// A request, and what its answer must contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// Port on this host.
    pub(crate) port: u16,
    /// Path and query.
    pub(crate) path: String,
    /// Body of a POST; without it the request is a GET.
    pub(crate) body: Option<Vec<u8>>,
    /// Text in a correct answer; empty: any.
    pub(crate) expect: String,
}

impl Question {
    /// True if no other program answers at the port.
    pub(crate) fn port_is_free(&self) -> bool {
        TcpListener::bind(self.address()).is_ok()
    }

    fn address(&self) -> SocketAddr {
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Asks until the answer is correct; the moment it was, or the last thing seen.
    pub(crate) fn wait(&self, until: Instant) -> Result<Instant, String> {
        loop {
            let seen = match self.ask() {
                Ok(()) => return Ok(Instant::now()),
                Err(seen) => seen,
            };
            if Instant::now() >= until {
                return Err(seen);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn ask(&self) -> Result<(), String> {
        let mut stream = TcpStream::connect_timeout(&self.address(), Duration::from_secs(1))
            .map_err(|error| error.to_string())?;
        let _ = stream.set_read_timeout(Some(ONE));
        let _ = stream.set_nodelay(true);
        let body = self.body.as_deref().unwrap_or_default();
        let method = if self.body.is_some() { "POST" } else { "GET" };
        let mut request = format!(
            "{method} {} HTTP/1.0\r\nHost: 127.0.0.1:{}\r\nContent-Length: {}\r\n\r\n",
            self.path,
            self.port,
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        let mut answer = Vec::new();
        stream
            .write_all(&request)
            .and_then(|()| stream.take(LARGEST).read_to_end(&mut answer))
            .map_err(|error| error.to_string())?;
        judge(&answer, &self.expect)
    }
}

/// Whether an answer is correct; else what is wrong with it.
fn judge(answer: &[u8], expect: &str) -> Result<(), String> {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return Err(format!("{} bytes that are no HTTP answer", answer.len()));
    };
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("the answer {status:?}"));
    }
    if !body.contains(expect) {
        let start: String = body.chars().take(80).collect();
        return Err(format!("an answer without {expect:?}: {start:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_status_200_with_the_expected_text_is_correct() {
        assert_eq!(judge(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nall 42 rows", "42"), Ok(()));
        assert!(judge(b"HTTP/1.0 200 OK\r\nA: 42\r\n\r\nall rows", "42").is_err());
        assert!(judge(b"HTTP/1.0 502 Bad Gateway\r\n\r\n42", "42").is_err());
        assert!(judge(b"HTTP/1.0 200 OK\r\n", "").is_err());
        assert!(judge(b"", "").is_err());
    }

    #[test]
    fn the_wait_ends_at_its_limit_and_says_what_was_seen() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let question = Question { port, path: "/".into(), body: None, expect: String::new() };
        let seen = question.wait(Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert!(seen.contains("refused"), "{seen}");
    }
}
