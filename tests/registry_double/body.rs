//! A body that stops at a chosen place.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::time::{Sleep, sleep};

pub enum Step {
    Data(Bytes),
    /// No more bytes, and no end either.
    Stall,
    /// The connection breaks.
    Break,
}

pub struct Scripted {
    steps: VecDeque<Step>,
    /// Time for the bytes before a break to reach the other side.
    flush: Option<Pin<Box<Sleep>>>,
}

impl Scripted {
    /// `bytes` in frames of 16 KiB, so that a break has a middle.
    pub fn new(bytes: &Bytes, end: Option<Step>) -> Self {
        let pieces = bytes.chunks(16 << 10).map(|piece| Step::Data(bytes.slice_ref(piece)));
        Self { steps: pieces.chain(end).collect(), flush: None }
    }
}

impl Body for Scripted {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.steps.front() {
            Some(Step::Stall) => return Poll::Pending,
            Some(Step::Break) => {
                let flush =
                    self.flush.get_or_insert_with(|| Box::pin(sleep(Duration::from_millis(20))));
                ready!(flush.as_mut().poll(cx));
            }
            _ => {}
        }
        Poll::Ready(self.steps.pop_front().map(|step| match step {
            Step::Data(bytes) => Ok(Frame::data(bytes)),
            Step::Stall | Step::Break => Err(io::Error::other("a fault was asked for")),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.steps.is_empty()
    }
}
