//! Layer stream to meta image.

pub mod apply;
