//! A proxy that shapes and counts the HTTP/1.1 between the systems and the registry.
//!
//! One thread a connection. A request head is read, delayed and passed on as it is; of the answer the head is read to
//! know where the body ends, and everything is sent by the line's timetable. Only GET and HEAD pass: what is measured
//! reads. Each answer is logged with its times and bytes.

use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::shape::{Shape, Timetable};
use crate::failure::{Attempt as _, Failure};

/// Longest head of a request or an answer: the servers' own bounds are lower.
const LONGEST_HEAD: u64 = 64 << 10;

/// Bytes of an answer that are sent at once. At 25 Mbit/s a piece takes 5 ms.
const PIECE: usize = 16 << 10;

/// One answer that passed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Milliseconds from the start of the run to the request.
    pub(crate) asked: f64,
    /// The same to the end of the answer.
    pub(crate) ended: f64,
    /// Bytes of the answer, head and body.
    pub(crate) bytes: u64,
    /// `blob`, `manifest` or `other`.
    pub(crate) kind: String,
    /// Value of the request's Range header; empty: none.
    pub(crate) range: String,
}

/// What the connections share.
#[derive(Debug)]
struct Line {
    shape: Shape,
    seed: u64,
    start: Instant,
    timetable: Timetable,
    /// Requests since the start: their number decides which are slow.
    asked: u64,
    answers: Vec<Answer>,
    /// Bytes on the wire since the start, also of answers that have not ended.
    bytes: u64,
}

/// The proxy; it listens until the process ends.
#[derive(Clone, Debug)]
pub(crate) struct Proxy {
    line: Arc<Mutex<Line>>,
    address: SocketAddr,
}

/// What passed since the line was set.
#[derive(Clone, Debug, Default)]
pub(crate) struct Passed {
    /// Bytes of answers on the wire.
    pub(crate) bytes: u64,
    /// Requests.
    pub(crate) requests: u64,
    /// Answers that have ended.
    pub(crate) answers: Vec<Answer>,
}

impl Proxy {
    /// Listens on a port of loopback, 0 for any, in front of `upstream`.
    pub(crate) fn start(port: u16, upstream: SocketAddr) -> Result<Self, Failure> {
        let listener = TcpListener::bind(("127.0.0.1", port))
            .attempt(|| format!("listen on port {port} for the proxy"))?;
        let address = listener.local_addr().attempt(|| "ask for the proxy's port".into())?;
        let now = Instant::now();
        let shape = super::shape::SHAPES[0];
        let line = Arc::new(Mutex::new(Line {
            shape,
            seed: 0,
            start: now,
            timetable: Timetable::new(None, now),
            asked: 0,
            answers: Vec::new(),
            bytes: 0,
        }));
        let proxy = Self { line, address };
        let accepting = proxy.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let proxy = accepting.clone();
                // A connection that breaks is its client's concern.
                std::thread::spawn(move || drop(proxy.serve(&stream, upstream)));
            }
        });
        Ok(proxy)
    }

    /// Host and port, as a reference of an image names them.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    /// Gives the line a shape, and begins to count anew.
    pub(crate) fn set(&self, shape: Shape, seed: u64) {
        let now = Instant::now();
        let mut line = self.lock();
        *line = Line {
            shape,
            seed,
            start: now,
            timetable: Timetable::new(shape.bandwidth, now),
            asked: 0,
            answers: Vec::new(),
            bytes: 0,
        };
    }

    /// What passed since the line was set.
    pub(crate) fn passed(&self) -> Passed {
        let line = self.lock();
        Passed { bytes: line.bytes, requests: line.asked, answers: line.answers.clone() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection until one side closes it.
    fn serve(&self, client: &TcpStream, upstream: SocketAddr) -> io::Result<()> {
        client.set_nodelay(true)?;
        let trip = self.lock().shape.round_trip;
        std::thread::sleep(trip);
        let mut requests = BufReader::new(client);
        let mut server: Option<BufReader<TcpStream>> = None;
        while let Some(request) = head(&mut requests)? {
            let (asked, delay) = {
                let mut line = self.lock();
                line.asked += 1;
                (Instant::now(), line.shape.delay(line.asked, line.seed))
            };
            std::thread::sleep(delay);
            let request = Head::new(&request);
            if !matches!(request.method(), "GET" | "HEAD") {
                let refusal = "HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                return self.send(client, refusal.as_bytes());
            }
            // A connection that the registry has closed meanwhile is replaced, once.
            let mut answer = None;
            for fresh in [false, true] {
                if fresh || server.is_none() {
                    let stream = TcpStream::connect(upstream)?;
                    stream.set_nodelay(true)?;
                    server = Some(BufReader::new(stream));
                }
                let Some(server) = server.as_mut() else { continue };
                let written = server.get_ref().write_all(request.text.as_bytes());
                answer = written.and_then(|()| head(server)).ok().flatten();
                if answer.is_some() {
                    break;
                }
            }
            let (Some(answer), Some(from)) = (answer, server.as_mut()) else {
                client.shutdown(Shutdown::Both)?;
                return Ok(());
            };
            let answer = Head::new(&answer);
            let mut bytes = answer.text.len() as u64;
            self.send(client, answer.text.as_bytes())?;
            let passed = self.body(client, from, &request, &answer, &mut bytes);
            self.log(&request, asked, bytes);
            passed?;
            if answer.closes() || request.closes() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Passes on the body of an answer, by its length, its chunks, or to the end of the connection.
    fn body(
        &self,
        client: &TcpStream,
        from: &mut BufReader<TcpStream>,
        request: &Head<'_>,
        answer: &Head<'_>,
        bytes: &mut u64,
    ) -> io::Result<()> {
        let status = answer.text.split(' ').nth(1).unwrap_or_default();
        if request.method() == "HEAD" || matches!(status, "204" | "304") {
            return Ok(());
        }
        if answer.value("transfer-encoding").is_some_and(|how| how.contains("chunked")) {
            loop {
                let mut size = Vec::new();
                from.by_ref().take(LONGEST_HEAD).read_until(b'\n', &mut size)?;
                let text = String::from_utf8_lossy(&size);
                let digits = text.trim().split(';').next().unwrap_or_default();
                let length = u64::from_str_radix(digits, 16).map_err(io::Error::other)?;
                self.send(client, &size)?;
                // The last chunk is empty; the servers here send no trailers behind it. Two bytes end a chunk.
                self.copy(client, from, length + 2, bytes)?;
                *bytes += size.len() as u64;
                if length == 0 {
                    return Ok(());
                }
            }
        }
        let length = answer.value("content-length").map_or(Ok(u64::MAX), str::parse);
        self.copy(client, from, length.map_err(io::Error::other)?, bytes)
    }

    /// Passes on `length` bytes, or all to the end for `u64::MAX`.
    fn copy(
        &self,
        client: &TcpStream,
        from: &mut BufReader<TcpStream>,
        length: u64,
        bytes: &mut u64,
    ) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        let mut left = length;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let read = from.read(&mut piece[..most])?;
            if read == 0 {
                // The end, or a registry that broke off: the client sees which by its length.
                return if length == u64::MAX { Ok(()) } else { client.shutdown(Shutdown::Both) };
            }
            self.send(client, &piece[..read])?;
            *bytes += read as u64;
            left -= read as u64;
        }
        Ok(())
    }

    /// Sends bytes when the line has room for them.
    fn send(&self, mut client: &TcpStream, bytes: &[u8]) -> io::Result<()> {
        let passed = {
            let mut line = self.lock();
            line.bytes += bytes.len() as u64;
            line.timetable.passed(bytes.len(), Instant::now())
        };
        // A sleep takes some 60 µs more than it is told; below that the next piece makes up for it.
        let ahead = passed.saturating_duration_since(Instant::now());
        if ahead > Duration::from_micros(300) {
            std::thread::sleep(ahead);
        }
        client.write_all(bytes)
    }

    fn log(&self, request: &Head<'_>, asked: Instant, bytes: u64) {
        let kind = match request.text.split(' ').nth(1).unwrap_or_default() {
            path if path.contains("/blobs/") => "blob",
            path if path.contains("/manifests/") => "manifest",
            _ => "other",
        };
        let mut line = self.lock();
        // An answer to a request of an earlier run is not one of this run.
        let Some(since) = asked.checked_duration_since(line.start) else { return };
        let answer = Answer {
            asked: since.as_secs_f64() * 1e3,
            ended: line.start.elapsed().as_secs_f64() * 1e3,
            bytes,
            kind: kind.into(),
            range: request.value("range").unwrap_or_default().to_owned(),
        };
        line.answers.push(answer);
    }
}

/// The lines of a head, to the empty one; none at the end of the connection.
fn head(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut text = Vec::new();
    let mut limited = from.take(LONGEST_HEAD);
    loop {
        let before = text.len();
        limited.read_until(b'\n', &mut text)?;
        match &text[before..] {
            [] if text.is_empty() => return Ok(None),
            b"\r\n" | b"\n" => break,
            line if line.ends_with(b"\n") => {}
            _ => return Err(io::Error::other("a head without an end")),
        }
    }
    String::from_utf8(text).map(Some).map_err(io::Error::other)
}

/// The head of a request or an answer.
#[derive(Clone, Copy, Debug)]
struct Head<'t> {
    text: &'t str,
}

impl<'t> Head<'t> {
    fn new(text: &'t str) -> Self {
        Self { text }
    }

    fn method(&self) -> &'t str {
        self.text.split(' ').next().unwrap_or_default()
    }

    /// The value of a header, whatever the case of its name; `name` is in lower case.
    fn value(&self, name: &str) -> Option<&'t str> {
        let lines = self.text.lines().skip(1).filter_map(|line| line.split_once(':'));
        let mut found = lines.filter(|(header, _)| header.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value.trim())
    }

    fn closes(&self) -> bool {
        self.value("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers each connection's requests by these answers in turn, and keeps the heads it got.
    fn server(answers: &'static [&'static str]) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let kept = heads.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                for answer in answers {
                    let Ok(Some(head)) = head(&mut reader) else { break };
                    kept.lock().unwrap().push(head);
                    stream.write_all(answer.as_bytes()).unwrap();
                }
            }
        });
        (address, heads)
    }

    fn ask(proxy: &Proxy, requests: &str) -> String {
        let mut stream = TcpStream::connect(proxy.address).unwrap();
        stream.write_all(requests.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn bodies_pass_by_length_and_by_chunks_and_are_counted() {
        const ONE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        const TWO: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let (address, heads) = server(&[ONE, TWO]);
        let proxy = Proxy::start(0, address).unwrap();
        let asked = "GET /v2/a/blobs/x HTTP/1.1\r\nrange: bytes=0-4\r\n\r\nGET /v2/a/manifests/y HTTP/1.1\r\n\r\n";
        assert_eq!(ask(&proxy, asked), format!("{ONE}{TWO}"));
        assert!(heads.lock().unwrap()[0].contains("range: bytes=0-4"));
        let passed = proxy.passed();
        assert_eq!((passed.requests, passed.bytes), (2, (ONE.len() + TWO.len()) as u64));
        let kinds: Vec<_> = passed.answers.iter().map(|answer| answer.kind.as_str()).collect();
        assert_eq!(kinds, ["blob", "manifest"]);
        assert_eq!(passed.answers[0].range, "bytes=0-4");
        assert_eq!(passed.answers[0].bytes, ONE.len() as u64);
    }

    #[test]
    fn an_upload_is_refused() {
        let (address, _) = server(&[]);
        let proxy = Proxy::start(0, address).unwrap();
        let answer = ask(&proxy, "PUT /v2/a/manifests/y HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }

    #[test]
    fn a_request_takes_its_round_trip_and_a_body_its_bandwidth() {
        const BODY: &str = concat!(
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 20\r\n\r\n",
            "01234567890123456789"
        );
        let (address, _) = server(&[BODY]);
        let proxy = Proxy::start(0, address).unwrap();
        let shape = Shape {
            name: "test",
            round_trip: Duration::from_millis(40),
            bandwidth: Some(BODY.len() as u64 * 10),
            slow_per_mille: 0,
        };
        proxy.set(shape, 0);
        let start = Instant::now();
        assert_eq!(ask(&proxy, "GET / HTTP/1.1\r\n\r\n"), BODY);
        // The connection and the request 40 ms each, the answer 100 ms.
        assert!(start.elapsed() >= Duration::from_millis(180), "{:?}", start.elapsed());
    }
}
