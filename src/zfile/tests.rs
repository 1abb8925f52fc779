//! What holds for `ZFile`s as a whole.
