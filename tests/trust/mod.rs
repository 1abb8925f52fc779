//! What no image, registry or user can do: each sentence of `SECURITY.md` names a test of this folder.
//!
//! * [`budget`]    memory that an image claims is reserved, or refused
//! * [`fairness`]  devices take turns
//! * [`hostile`]   images whose bytes were changed, on purpose or by accident
//! * [`identity`]  chunks are shared by what proves them
//! * [`pinned`]    an image named by digest shows its layers
//! * [`reach`]     an image reaches only its own repository
//! * [`privilege`] the daemon has the rights that it needs, and no more

mod budget;
mod fairness;
mod hostile;
mod identity;
mod pinned;
mod privilege;
mod reach;
