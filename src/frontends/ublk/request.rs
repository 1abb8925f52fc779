//! Requests of the driver: decoding of a tag's descriptor.

use libublk::sys;

use disk::DiskRange;
use formats::units::SECTOR;

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Read bytes.
    Read,
    /// Write bytes; `durable` (FUA): they must be durable before the answer.
    Write { durable: bool },
    /// Make all answered writes durable.
    Flush,
    /// DISCARD and WRITE_ZEROES: the writable layer writes zeros for both, and stores none.
    Zero,
    /// An operation that the device did not announce.
    Other,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockRequest {
    pub(super) op: Op,
    /// Its bytes of the disk. A read or a write has at most the device's chunk.
    pub(super) range: DiskRange,
}

impl BlockRequest {
    /// Decodes a descriptor (`struct ublksrv_io_desc` of `ublk_cmd.h`).
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
        Self { op, range: DiskRange::new(offset, u64::from(descriptor.nr_sectors) * SECTOR) }
    }
}
