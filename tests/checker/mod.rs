//! An independent checker of everything in overlaybd's formats.
//!
//! It is written from the specification alone and shares no code with the crate: it detects an error that the
//! crate's writer and reader have in common. It is slow and holds all data in memory. Every rule that
//! upstream's readers check or rely on is a call of [`Report::hold`] under the rule's name; a broken rule is
//! recorded and the check continues as far as it can, so that a test of the checker sees every rule that is
//! broken.
//!
//! Contents: [`writer`] writes forms that turbobd does not write, [`mutations`] proves that every rule can
//! break, [`field`] numbers and checksums, [`inflate`] deflate by the specification (RFC 1951), [`archive`]
//! tar archives, [`zfile`] and [`lsmt`] the containers, [`index`] the gzip index and its sidecar,
//! [`segments`] the sidecar of other layers, [`stack`] layers as one disk, [`image`] manifests.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod archive;
pub mod field;
pub mod image;
pub mod index;
pub mod inflate;
pub mod lsmt;
mod mutations;
pub mod segments;
pub mod stack;
pub mod writer;
pub mod zfile;

use std::collections::{BTreeMap, BTreeSet};

/// The checked rules, and the broken ones.
#[derive(Debug, Default)]
pub struct Report {
    /// Every checked rule, with its number of checks.
    pub checked: BTreeMap<&'static str, u64>,
    /// Rules that are broken, each with the first example.
    pub broken: BTreeMap<&'static str, String>,
}

impl Report {
    /// Records a check of `rule`.
    pub fn hold(
        &mut self,
        rule: &'static str,
        holds: bool,
        detail: impl FnOnce() -> String,
    ) -> bool {
        *self.checked.entry(rule).or_default() += 1;
        if !holds {
            self.broken.entry(rule).or_insert_with(detail);
        }
        holds
    }

    /// The value of `result`; an error breaks `rule`.
    pub fn ok<T, E: std::fmt::Display>(
        &mut self,
        rule: &'static str,
        result: Result<T, E>,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.hold(rule, true, String::new);
                Some(value)
            }
            Err(error) => {
                self.hold(rule, false, || error.to_string());
                None
            }
        }
    }

    /// Names of the broken rules.
    pub fn names(&self) -> BTreeSet<&'static str> {
        self.broken.keys().copied().collect()
    }

    /// Panics unless every rule holds.
    #[track_caller]
    pub fn clean(&self, what: &str) {
        assert!(self.broken.is_empty(), "{what}: {:#?}", self.broken);
        assert!(!self.checked.is_empty(), "{what}: nothing was checked");
    }
}
