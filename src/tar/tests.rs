//! The parser against GNU tar and Python's tarfile, which wrote none of it.
