//! What no image, registry or user can do: each sentence of `SECURITY.md` names a test of this folder.
//!
//! * [`reach`]     an image reaches only its own repository
//! * [`privilege`] the daemon has the rights that it needs, and no more

mod privilege;
mod reach;
