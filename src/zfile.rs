//! overlaybd's seekable compressed container.
