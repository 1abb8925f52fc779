//! A registry at the end of a line: an OCI layout served over loopback with a delay for each request and
//! one bandwidth for all connections together.

#![allow(unreachable_pub, dead_code, reason = "each benchmark uses a part")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes written at a time: the unit of the line's clock.
const PIECE: usize = 64 << 10;

/// Requests to the registry.
#[derive(Default)]
pub struct Asked {
    /// Requests for ranges of blobs.
    pub ranges: AtomicU64,
    /// Bytes of their answers.
    pub bytes: AtomicU64,
}

/// One bandwidth for all senders.
pub struct Clock {
    /// Bytes a second.
    rate: f64,
    /// Time at which the line is free again.
    free: Mutex<Instant>,
}

impl Clock {
    pub fn new(rate: f64) -> Self {
        Self { rate, free: Mutex::new(Instant::now()) }
    }

    /// Time at which the line will have carried so many bytes, after those sent before.
    pub fn carry(&self, bytes: usize) -> Instant {
        let mut free = self.free.lock().unwrap();
        *free = (*free).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / self.rate);
        *free
    }
}

/// The registry. It serves until the process ends.
pub struct Line {
    /// `127.0.0.1:port`.
    pub host: String,
    pub asked: Arc<Asked>,
}

struct Served {
    layout: PathBuf,
    tags: HashMap<String, (String, String)>,
    delay: Duration,
    clock: Clock,
    asked: Arc<Asked>,
}

impl Line {
    /// Serves `layout` as the repository `perf`.
    pub fn start(layout: &Path, delay: Duration, rate: f64) -> Self {
        let index: serde_json::Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        let mut tags = HashMap::new();
        for entry in index["manifests"].as_array().unwrap() {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            let tag = text(&entry["annotations"]["org.opencontainers.image.ref.name"]);
            tags.insert(tag, (text(&entry["digest"]), text(&entry["mediaType"])));
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let asked = Arc::<Asked>::default();
        let served = Arc::new(Served {
            layout: layout.to_owned(),
            tags,
            delay,
            clock: Clock::new(rate),
            asked: asked.clone(),
        });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                std::thread::spawn(move || served.converse(&stream));
            }
        });
        Self { host, asked }
    }
}

impl Served {
    fn converse(&self, stream: &TcpStream) -> Option<()> {
        stream.set_nodelay(true).ok()?;
        let mut reader = BufReader::new(stream);
        loop {
            let (mut head, mut range) = (String::new(), None);
            reader.read_line(&mut head).ok().filter(|len| *len > 0)?;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).ok()?;
                let lower = line.trim().to_ascii_lowercase();
                if let Some(value) = lower.strip_prefix("range: bytes=") {
                    let (first, last) = value.split_once('-')?;
                    range = Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?));
                }
                if lower.is_empty() {
                    break;
                }
            }
            let mut words = head.split(' ');
            let (method, path) = (words.next()?, words.next()?);
            std::thread::sleep(self.delay);
            self.answer(stream, method, path, range)?;
        }
    }

    fn answer(
        &self,
        mut stream: &TcpStream,
        method: &str,
        path: &str,
        range: Option<(u64, u64)>,
    ) -> Option<()> {
        let name = path.rsplit('/').next()?;
        let (digest, media_type) = self
            .tags
            .get(name)
            .cloned()
            .unwrap_or((name.to_owned(), "application/octet-stream".to_owned()));
        let file = self.layout.join("blobs").join(digest.replace(':', "/"));
        let Ok(file) = File::open(file) else {
            return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").ok();
        };
        let size = file.metadata().ok()?.len();
        let (first, last) = range.unwrap_or((0, size.saturating_sub(1)));
        let len = if size == 0 { 0 } else { last.min(size - 1) + 1 - first };
        let status = match range {
            Some(_) => format!("206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}"),
            None => "200 OK".to_owned(),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nContent-Type: {media_type}\r\nDocker-Content-Digest: {digest}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).ok()?;
        if method == "HEAD" {
            return Some(());
        }
        if range.is_some() {
            self.asked.ranges.fetch_add(1, Ordering::Relaxed);
            self.asked.bytes.fetch_add(len, Ordering::Relaxed);
        }
        let (mut at, mut left) = (first, len);
        let mut piece = vec![0; PIECE];
        while left > 0 {
            let now = piece.len().min(left as usize);
            file.read_exact_at(&mut piece[..now], at).ok()?;
            std::thread::sleep(self.clock.carry(now).saturating_duration_since(Instant::now()));
            stream.write_all(&piece[..now]).ok()?;
            at += now as u64;
            left -= now as u64;
        }
        Some(())
    }
}
