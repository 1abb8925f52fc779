//! What holds for layers as a whole.
