//! overlaybd's layer format.
