//! What an image, a meta image, a registry and a user of the host can never do: each sentence of `SECURITY.md` names a
//! test of this folder.

mod identity;
mod pinned;
mod privilege;
mod reach;
