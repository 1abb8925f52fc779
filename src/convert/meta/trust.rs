//! Which meta image may serve which reference.
//!
//! A meta image decides the file system that a container sees, and nothing in it proves that it was made from the
//! layers that it names. So the question is who vouches for it: the user, who named it; the repository, if the user left
//! the choice to it by naming a tag; the owner of a listed key; this host, which built it. A reference by digest leaves
//! no choice: it asks for the contents of that image, and a meta image that lies beside it is not part of it.
//!
//! | the reference | the meta image | `verify` | `signed` | `any` |
//! |---|---|---|---|---|
//! | names the meta image, or by digest an index that holds both | that one | used | if signed | used |
//! | a tag | beside the image, in its repository | used | if signed | used |
//! | a digest | beside the image, signed | used | used | used |
//! | a digest | beside the image, unsigned | not used | not used | used |
//! | any | from elsewhere | if signed | if signed | used |
//!
//! A meta image that this host built is used in every case. What is not used is built instead.

use std::fmt;
use std::str::FromStr;

use registry::signatures::Signed;

/// The policy of the host: `turbobd.metaTrust`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MetaTrust {
    /// A reference by digest shows what the layers contain; a tag is what its repository says.
    #[default]
    Verify,
    /// Only what a listed key has signed, or what this host has built.
    Signed,
    /// Whatever is found.
    Any,
}

impl MetaTrust {
    /// All policies.
    pub const ALL: [Self; 3] = [Self::Verify, Self::Signed, Self::Any];

    /// Name in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Verify => "verify",
            Self::Signed => "signed",
            Self::Any => "any",
        }
    }

    /// The reason to use a meta image that was found; `None` if it must not be used. `signed` looks for a signature; it
    /// is called only if that decides.
    pub fn reason(
        self,
        named: NamedImage,
        place: MetaPlace,
        signed: impl FnOnce() -> Option<Signed>,
    ) -> Option<MetaReason> {
        let free = match (self, named, place) {
            (_, _, MetaPlace::Built) => Some(MetaReason::Built),
            (Self::Any, ..) => Some(MetaReason::Policy),
            (Self::Verify, NamedImage::Meta, MetaPlace::Beside) => Some(MetaReason::NamedImage),
            (Self::Verify, NamedImage::Tag, MetaPlace::Beside) => Some(MetaReason::Repository),
            _ => None,
        };
        free.or_else(|| signed().map(MetaReason::Signed))
    }
}

impl fmt::Display for MetaTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for MetaTrust {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|trust| trust.name() == text).ok_or(())
    }
}

/// What the user's reference names, seen from a meta image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedImage {
    /// The meta image: by its own tag or digest, or by the digest of an index that lists it.
    Meta,
    /// The plain image, by a tag.
    Tag,
    /// The plain image, by its digest or that of an index that does not list the meta image.
    Digest,
}

/// Place of a meta image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaPlace {
    /// This host's store, with this host's record of its building.
    Built,
    /// The repository of the named image.
    Beside,
    /// Anywhere else: this host's store without such a record.
    Elsewhere,
}

/// Reason why a meta image is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaReason {
    /// This host built it from the layers.
    Built,
    /// The reference names it.
    NamedImage,
    /// The reference is a tag, and the repository has it beside the image.
    Repository,
    /// A listed key has signed it.
    Signed(Signed),
    /// The policy is `any`.
    Policy,
}

impl MetaReason {
    /// True if its contents are known to be those of the layers, as far as this host's word and the keys' go.
    #[must_use]
    pub fn is_proof(&self) -> bool {
        matches!(self, Self::Built | Self::Signed(_))
    }
}

impl fmt::Display for MetaReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Built => f.write_str("built on this host from the layers"),
            Self::NamedImage => f.write_str("named by the reference"),
            Self::Repository => {
                f.write_str("found beside the tag, and not compared with the layers")
            }
            Self::Signed(signed) => signed.fmt(f),
            Self::Policy => f.write_str("found, and used because turbobd.metaTrust is any"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use formats::oci::Digest;

    fn signed() -> Signed {
        Signed { digest: Digest::of(b"m"), key: "/k.pub".into() }
    }

    fn is_used(trust: MetaTrust, named: NamedImage, place: MetaPlace, is_signed: bool) -> bool {
        trust.reason(named, place, || is_signed.then(signed)).is_some()
    }

    #[test]
    fn the_policy_decides_as_its_table_says() {
        use MetaPlace::{Beside, Built, Elsewhere};
        use MetaTrust::{Any, Signed, Verify};
        use NamedImage::{Digest, Meta, Tag};
        // Unsigned: used under verify, signed, any.
        let table = [
            (Meta, Beside, [true, false, true]),
            (Tag, Beside, [true, false, true]),
            (Digest, Beside, [false, false, true]),
            (Meta, Elsewhere, [false, false, true]),
            (Tag, Elsewhere, [false, false, true]),
            (Digest, Elsewhere, [false, false, true]),
            (Tag, Built, [true, true, true]),
            (Digest, Built, [true, true, true]),
        ];
        for (named, place, used) in table {
            for (trust, used) in [Verify, Signed, Any].into_iter().zip(used) {
                assert_eq!(
                    is_used(trust, named, place, false),
                    used,
                    "{trust} {named:?} {place:?}"
                );
                assert!(is_used(trust, named, place, true), "{trust} {named:?} {place:?}");
            }
        }
    }

    #[test]
    fn a_signature_is_looked_for_only_where_it_decides() {
        let never = || panic!("it is not needed");
        MetaTrust::Verify.reason(NamedImage::Tag, MetaPlace::Beside, never);
        MetaTrust::Any.reason(NamedImage::Digest, MetaPlace::Elsewhere, never);
        MetaTrust::Signed.reason(NamedImage::Digest, MetaPlace::Built, never);
    }

    #[test]
    fn a_policy_has_the_name_that_it_is_parsed_from() {
        for trust in MetaTrust::ALL {
            assert_eq!(trust.name().parse(), Ok(trust));
        }
        assert_eq!("Verify".parse::<MetaTrust>(), Err(()));
        assert_eq!(MetaTrust::default(), MetaTrust::Verify);
    }
}
