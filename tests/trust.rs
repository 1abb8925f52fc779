//! Trust: no image, registry or user decides what another's container reads.

mod identity;
