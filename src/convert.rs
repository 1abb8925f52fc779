//! Layer stream to meta image.
