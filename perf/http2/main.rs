//! `cargo run --release --manifest-path perf/http2/Cargo.toml`: ranges of a blob by parallel HTTP/1.1 connections against streams of one HTTP/2
//! connection, both by hyper in clear text, from a registry 20 ms away behind one line for all connections.
//!
//! The transfer runs at a gigabit, and at full speed of both ends, which shows the receiver's cost of a byte.
//! Beside the transfer a second reader requests a segment now and then, as demand does beside read-ahead.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

#[path = "../layer.rs"]
mod layer;
#[path = "../line.rs"]
mod line;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::{http1 as client1, http2 as client2};
use hyper::header::RANGE;
use hyper::server::conn::{http1 as server1, http2 as server2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use layer::median;
use line::Clock;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

const BLOB: u64 = 256 << 20;
/// Length of a read-ahead request, and number of them in flight.
const RANGE_LEN: u64 = 2 << 20;
const PARALLEL: usize = 8;
/// Compressed bytes of a usual segment.
const SEGMENT: u64 = 340 << 10;
const PIECE: usize = 64 << 10;
const DELAY: Duration = Duration::from_millis(20);
const GIGABIT: f64 = 1e9 / 8.0;
const ROUNDS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Protocol {
    Http1,
    /// With hyper's windows: 2 MiB a stream, 5 MiB a connection.
    Http2,
    /// With windows that never fill, and frames of a mebibyte.
    Http2Wide,
}

/// A body whose pieces are sent when the line has room for them.
struct Pieces(mpsc::Receiver<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

async fn answer(
    request: Request<Incoming>,
    line: Arc<Clock>,
) -> Result<Response<Pieces>, Infallible> {
    let range = request.headers()[RANGE].to_str().unwrap();
    let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let mut left = last.parse::<usize>().unwrap() + 1 - first.parse::<usize>().unwrap();
    sleep(DELAY).await;
    let (pieces, body) = mpsc::channel(2);
    tokio::spawn(async move {
        let piece = Bytes::from(vec![7; PIECE]);
        while left > 0 {
            let now = PIECE.min(left);
            let until = Instant::from_std(line.carry(now));
            // tokio's timers are no finer; a wait that is skipped is made up for by the next one.
            if until > Instant::now() + Duration::from_millis(1) {
                sleep_until(until).await;
            }
            if pieces.send(piece.slice(..now)).await.is_err() {
                return;
            }
            left -= now;
        }
    });
    Ok(Response::new(Pieces(body)))
}

/// Serves until the process ends.
fn serve(protocol: Protocol, rate: f64) -> SocketAddr {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        Builder::new_current_thread().enable_all().build().unwrap().block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            let line = Arc::new(Clock::new(rate));
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let line = line.clone();
                let service = service_fn(move |request| answer(request, line.clone()));
                let stream = TokioIo::new(stream);
                tokio::spawn(async move {
                    if protocol == Protocol::Http1 {
                        let _ = server1::Builder::new().serve_connection(stream, service).await;
                    } else {
                        let mut builder = server2::Builder::new(TokioExecutor::new());
                        let served = builder.max_send_buf_size(4 << 20);
                        let _ = served.serve_connection(stream, service).await;
                    }
                });
            }
        });
    });
    told.recv().unwrap()
}

/// A sender of requests: one connection, or a stream of one.
#[derive(Debug)]
enum Sender {
    One(client1::SendRequest<Empty<Bytes>>),
    Two(client2::SendRequest<Empty<Bytes>>),
}

impl Sender {
    async fn fetch(&mut self, first: u64, len: u64) {
        let request = Request::get("http://localhost/blob")
            .header(RANGE, format!("bytes={first}-{}", first + len - 1))
            .body(Empty::new())
            .unwrap();
        let answer = match self {
            Self::One(sender) => {
                sender.ready().await.unwrap();
                sender.send_request(request).await
            }
            Self::Two(sender) => sender.send_request(request).await,
        };
        let (mut body, mut found) = (answer.unwrap().into_body(), 0);
        while let Some(frame) = body.frame().await {
            found += frame.unwrap().into_data().map_or(0, |data| data.len() as u64);
        }
        assert_eq!(found, len);
    }
}

async fn connect(protocol: Protocol, address: SocketAddr, number: usize) -> Vec<Sender> {
    let stream = || async {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        TokioIo::new(stream)
    };
    let mut senders = Vec::new();
    if protocol == Protocol::Http1 {
        for _ in 0..number {
            let (sender, connection) = client1::handshake(stream().await).await.unwrap();
            tokio::spawn(connection);
            senders.push(Sender::One(sender));
        }
    } else {
        let mut builder = client2::Builder::new(TokioExecutor::new());
        if protocol == Protocol::Http2Wide {
            builder.initial_stream_window_size(16 << 20).initial_connection_window_size(256 << 20);
            builder.max_frame_size(1 << 20);
        }
        let (sender, connection) = builder.handshake(stream().await).await.unwrap();
        tokio::spawn(connection);
        senders.extend((0..number).map(|_| Sender::Two(sender.clone())));
    }
    senders
}

/// Seconds of wall time and of the receiver's processor time for the blob, and the median milliseconds of a
/// segment requested during the transfer.
fn transfer(protocol: Protocol, address: SocketAddr) -> [f64; 3] {
    let work = async move {
        let mut senders = connect(protocol, address, PARALLEL + 1).await;
        let mut demand = senders.pop().unwrap();
        let (next, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let over = ended.clone();
        let demand = tokio::spawn(async move {
            let mut times = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                demand.fetch(0, SEGMENT).await;
                times.push(start.elapsed().as_secs_f64() * 1e3);
                sleep(Duration::from_millis(50)).await;
            }
            median(times)
        });
        let start = Instant::now();
        let tasks: Vec<_> = senders
            .into_iter()
            .map(|mut sender| {
                let next = next.clone();
                tokio::spawn(async move {
                    loop {
                        let first = next.fetch_add(RANGE_LEN, Ordering::Relaxed);
                        if first >= BLOB {
                            return;
                        }
                        sender.fetch(first, RANGE_LEN).await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let wall = start.elapsed().as_secs_f64();
        ended.store(true, Ordering::Relaxed);
        [wall, demand.await.unwrap()]
    };
    let receiver = std::thread::spawn(move || {
        let [wall, demand] =
            Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        [wall, cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9, demand]
    });
    receiver.join().unwrap()
}

fn main() {
    for (line, rate) in [("1 Gbit/s", GIGABIT), ("as fast as it goes", 1e12)] {
        let protocols = [Protocol::Http1, Protocol::Http2, Protocol::Http2Wide];
        let servers = protocols.map(|protocol| (protocol, serve(protocol, rate)));
        let mut seen = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            for (seen, (protocol, address)) in seen.iter_mut().zip(servers) {
                seen.push(transfer(protocol, address));
            }
        }
        println!("{} MB by {PARALLEL} ranges of 2 MiB at a time, 20 ms each, {line}:", BLOB >> 20);
        let figure =
            |runs: &[[f64; 3]], part: usize| median(runs.iter().map(|run| run[part]).collect());
        let base = figure(&seen[0], 0);
        for ((protocol, _), seen) in servers.iter().zip(&seen) {
            println!(
                "  {:<10} {:.2} s ({:.2} of HTTP/1.1's), the receiver's CPU {:.2} s; a segment meanwhile {:.0} ms",
                format!("{protocol:?}"),
                figure(seen, 0),
                figure(seen, 0) / base,
                figure(seen, 1),
                figure(seen, 2)
            );
        }
    }
}
