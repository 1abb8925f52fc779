//! An opened image.
