//! The body of a request: bytes in memory, or pieces that a caller's thread reads while they are
//! sent.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use threads::Counter;
use tokio::sync::mpsc;

/// Progress of an upload, as seen from the I/O thread.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    pub(super) sent: Counter,
    /// The reader has not produced the next piece yet, so the delay is not the server's fault.
    pub(super) starved: AtomicBool,
    pub(super) done: AtomicBool,
}

/// The body of a request.
#[derive(Debug)]
pub(super) enum RequestBody {
    Memory(Bytes),
    Stream { pieces: mpsc::Receiver<io::Result<Bytes>>, left: u64, gauge: Arc<Gauge> },
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Self::Memory(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Memory(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Stream { pieces, left, gauge } => {
                let next = pieces.poll_recv(cx);
                gauge.starved.store(next.is_pending() && *left > 0, Ordering::Relaxed);
                let Poll::Ready(piece) = next else { return Poll::Pending };
                let Some(piece) = piece.transpose()? else { return Poll::Ready(None) };
                *left -= (piece.len() as u64).min(*left);
                gauge.sent.add(piece.len() as u64);
                gauge.done.store(*left == 0, Ordering::Relaxed);
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Memory(bytes) => bytes.is_empty(),
            Self::Stream { left, .. } => *left == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Memory(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream { left, .. } => SizeHint::with_exact(*left),
        }
    }
}
