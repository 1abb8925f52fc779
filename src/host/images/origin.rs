//! The place of an image's original layers, where the image names another than its own repository.
//!
//! A meta image that `turbobd convert --to` writes elsewhere carries the repository of its original layers in the
//! annotation `dev.turbobd.origin`. The image's author wrote it, and the daemon that would follow it is root and has the
//! host's credentials. So the annotation alone reaches nothing: it is followed to the image's own repository, to what the
//! command names (`--origin`), and to what the operator lists (`turbobd.origins`).
//!
//! | the annotation names | named by the command | listed | neither |
//! |---|---|---|---|
//! | the image's own repository | followed | followed | followed |
//! | another repository | followed, as the command's own | followed, without credentials | refused |
//! | a folder of this host, in an image of a layout | followed | followed | refused |
//! | a folder of this host, in an image of a registry | followed | refused | refused |
//!
//! The credentials of the host, its client certificate and the flags of the command (`--plain`, `--insecure`) belong to the
//! repository that the command named. A listed one is asked as by a stranger.

use std::path::Path;
use std::sync::Arc;

use client::{ImageSpec, RegistrySpec};
use formats::oci::RepositoryName;
use registry::RegistryClient;
use registry::store::{self, ImageStore};
use thiserror::Error;

use super::open::OpenError;
use super::registries::Registries;

/// An origin that is not followed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OriginError {
    /// A folder, named by an image of a registry.
    #[error(
        "The image names a folder of this host as the place of its original layers ({0}): an image from a registry does \
         not choose files here; give --origin {0} if you mean it"
    )]
    Folder(String),
    /// A place that neither the command nor the configuration names.
    #[error(
        "The image has its original layers elsewhere, in {0}, which neither the command nor turbobd.origins of the service \
         configuration names: give --origin {0}, or list it there"
    )]
    Unlisted(String),
}

/// The store of the original layers of an image that names `origin`; `own` is that of the image.
///
/// # Errors
/// [`OpenError::Origin`] if it must not be followed, and the errors of opening it.
pub(super) fn follow(
    origin: &str,
    spec: &ImageSpec,
    own: (&RepositoryName, &Arc<dyn ImageStore>),
    (registries, client): (&Registries, &RegistryClient),
) -> Result<Arc<dyn ImageStore>, OpenError> {
    let place: RepositoryName = origin.parse()?;
    let (own_place, own_store) = own;
    if place == *own_place {
        return Ok(own_store.clone());
    }
    if let Some(named) = &spec.origin
        && named.parse::<RepositoryName>()? == place
    {
        return Ok(store::open_repository(&place, client)?);
    }
    let from_registry = matches!(own_place, RepositoryName::Registry { .. });
    if from_registry && matches!(place, RepositoryName::Layout(_)) {
        return Err(OriginError::Folder(place.to_string()).into());
    }
    if !is_listed(&registries.service().turbobd.origins, &place) {
        return Err(OriginError::Unlisted(place.to_string()).into());
    }
    let stranger = registries.anonymous(&RegistrySpec::default())?;
    Ok(store::open_repository(&place, &stranger)?)
}

/// True if an entry is the place, or a folder above it: `registry.example`, `registry.example/team`, `oci:/srv/images`.
fn is_listed(list: &[String], place: &RepositoryName) -> bool {
    list.iter().any(|entry| match (entry.strip_prefix("oci:"), place) {
        // A path with .. in it leads out of the folder that it seems to be in.
        (Some(folder), RepositoryName::Layout(dir)) => {
            dir.starts_with(Path::new(folder))
                && dir.components().all(|part| part != std::path::Component::ParentDir)
        }
        (None, RepositoryName::Registry { host, repository }) => {
            let target = format!("{host}/{repository}");
            let rest = target.strip_prefix(entry.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_lists_itself_and_what_is_below_it() {
        let list: Vec<String> =
            ["r.example/team", "oci:/srv/images", "whole.example"].map(Into::into).into();
        let listed = |name: &str| is_listed(&list, &name.parse().unwrap());
        for name in [
            "r.example/team",
            "r.example/team/app",
            "whole.example/any/thing",
            "oci:/srv/images",
            "oci:/srv/images/a",
        ] {
            assert!(listed(name), "{name}");
        }
        for name in [
            "r.example/teams",
            "r.example/other",
            "whole.example.evil/x",
            "oci:/srv/images2",
            "oci:/srv/images/../x",
            "oci:/etc",
        ] {
            assert!(!listed(name), "{name}");
        }
    }
}
