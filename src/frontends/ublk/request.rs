//! What the driver asks for: a tag's descriptor, read.

use libublk::sys;

use formats::units::SECTOR;

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Give bytes.
    Read,
    /// Take bytes; `durable` (FUA): and be sure of them before the answer.
    Write { durable: bool },
    /// Make durable what was answered.
    Flush,
    /// DISCARD and WRITE_ZEROES: the writable layer makes zeros of both, and stores none.
    Zero,
    /// Something that we did not ask for.
    Other,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) op: Op,
    /// First byte of the disk.
    pub(super) offset: u64,
    /// Number of bytes. A read or a write has at most the device's chunk.
    pub(super) len: u64,
}

impl Request {
    /// The request in a descriptor (`struct ublksrv_io_desc` of `ublk_cmd.h`).
    pub(super) fn of(descriptor: &sys::ublksrv_io_desc) -> Self {
        let op = match descriptor.op_flags & 0xff {
            sys::UBLK_IO_OP_READ => Op::Read,
            sys::UBLK_IO_OP_WRITE => {
                Op::Write { durable: descriptor.op_flags & sys::UBLK_IO_F_FUA != 0 }
            }
            sys::UBLK_IO_OP_FLUSH => Op::Flush,
            sys::UBLK_IO_OP_DISCARD | sys::UBLK_IO_OP_WRITE_ZEROES => Op::Zero,
            _ => Op::Other,
        };
        let offset = descriptor.start_sector.saturating_mul(SECTOR);
        Self { op, offset, len: u64::from(descriptor.nr_sectors) * SECTOR }
    }

    /// Offset and length of a read.
    pub(super) fn range(&self) -> (u64, usize) {
        (self.offset, self.len as usize)
    }
}
