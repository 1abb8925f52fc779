//! What an image, a meta image, a registry and a user of the host can never do: each file is named after a sentence of
//! the threat model.

mod identity;
mod pinned;
