//! A body that stops where it is told to.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame};

pub enum Step {
    Data(Bytes),
    /// Never again a byte, but no end either.
    Stall,
    /// The connection breaks.
    Break,
}

pub struct Scripted(VecDeque<Step>);

impl Scripted {
    /// `bytes` in frames of 16 KiB, so that a break has a middle.
    pub fn new(bytes: Bytes, end: Option<Step>) -> Self {
        let pieces = bytes.chunks(16 << 10).map(|piece| Step::Data(bytes.slice_ref(piece)));
        Self(pieces.chain(end).collect())
    }
}

impl Body for Scripted {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(Step::Stall) = self.0.front() {
            return Poll::Pending;
        }
        Poll::Ready(self.0.pop_front().map(|step| match step {
            Step::Data(bytes) => Ok(Frame::data(bytes)),
            Step::Stall | Step::Break => Err(io::Error::other("a fault was asked for")),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }
}
