//! From an error to its code.
//!
//! An error of an inner crate does not know how a program should react to it. [`code_of`] walks from the error to its
//! root and takes the code of the first one that it knows; so an error keeps its code however often it is wrapped.

use std::error::Error;
use std::io;

use client::Code;
use client::error::code_of_io;
use convert::child::ChildError;
use convert::{BaseError, ConvertError};
use disk::DiskError;
use disk::image::{ImageError, OpenLayerError};
use disk::writable::WritableError;
use formats::ext4::{Ext4Error, MountableError};
use formats::gzip::GzipError;
use formats::lsmt::LsmtError;
use formats::oci::{ManifestError, ReferenceError};
use formats::zfile::ZFileError;
use frontends::looped::LoopedError;
use frontends::ublk::UblkError;
use registry::store::StoreError;
use registry::{LayoutError, RegistryError};
use source::SourceError;

/// Kind of a failure: that of the first error in the chain that has one.
#[must_use]
pub fn code_of(error: &(dyn Error + 'static)) -> Code {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = own_code(error) {
            return code;
        }
        next = error.source();
    }
    Code::Internal
}

/// Kind of one error; `None` if it is its cause that decides, or an unknown error.
fn own_code(error: &(dyn Error + 'static)) -> Option<Code> {
    if let Some(error) = error.downcast_ref::<RegistryError>() {
        return Some(of_registry(error));
    }
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return of_store(error);
    }
    if let Some(error) = error.downcast_ref::<SourceError>() {
        return of_source(error);
    }
    if let Some(error) = error.downcast_ref::<ImageError>() {
        return match error {
            ImageError::Store(error) => of_store(error),
            ImageError::Document { .. } => Some(Code::Damaged),
            ImageError::Disk(error) => of_disk(error),
            ImageError::Layer { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref::<OpenLayerError>() {
        return match error {
            OpenLayerError::Store(error) => of_store(error),
            OpenLayerError::NotConverted => Some(Code::Unsupported),
            OpenLayerError::Budget(_)
            | OpenLayerError::ZFile(ZFileError::Budget(_))
            | OpenLayerError::Lsmt(LsmtError::Budget(_)) => Some(Code::Exhausted),
            _ => Some(Code::Damaged),
        };
    }
    if let Some(error) = error.downcast_ref::<DiskError>() {
        return of_disk(error);
    }
    if let Some(error) = error.downcast_ref::<ConvertError>() {
        return match error {
            ConvertError::Store(error) => of_store(error),
            ConvertError::Manifest { .. } => Some(Code::Damaged),
            ConvertError::Disk(_) => Some(Code::Invalid),
            ConvertError::Keep(_) | ConvertError::Base { .. } | ConvertError::Layer { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref::<MountableError>() {
        return match error {
            MountableError::Source(error) => of_source(error),
            MountableError::NoFilesystem | MountableError::Refused(_) => Some(Code::Damaged),
        };
    }
    if let Some(error) = error.downcast_ref::<ChildError>() {
        return match error {
            ChildError::Budget(_) | ChildError::Memory { .. } => Some(Code::Exhausted),
            ChildError::Refused(_) => Some(Code::Damaged),
            ChildError::Store(error) => of_store(error),
            ChildError::Start(error) => Some(code_of_io(error)),
            ChildError::Ended { .. } => Some(Code::Internal),
        };
    }
    if let Some(error) = error.downcast_ref::<WritableError>() {
        return match error {
            WritableError::Busy { .. } => Some(Code::Busy),
            WritableError::Full | WritableError::Memory(_) => Some(Code::Exhausted),
            WritableError::Invalid { .. } | WritableError::Range { .. } => Some(Code::Invalid),
            WritableError::Broken { .. } => Some(Code::Damaged),
            WritableError::Io { .. } => None,
            WritableError::Commit(error) => Some(of_lsmt(error)),
        };
    }
    if let Some(error) = error.downcast_ref::<UblkError>() {
        return match error {
            UblkError::Unavailable { .. } | UblkError::KnownBadKernel { .. } => {
                Some(Code::Unsupported)
            }
            UblkError::Option { .. } => Some(Code::Invalid),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<LoopedError>() {
        return match error {
            LoopedError::Size(_) => Some(Code::Invalid),
            LoopedError::Busy { .. } => Some(Code::Busy),
            LoopedError::NoFreeDevice(_) => Some(Code::Exhausted),
            LoopedError::Step { .. } => None,
        };
    }
    if error.is::<ReferenceError>() {
        return Some(Code::Invalid);
    }
    let damaged = error.is::<LsmtError>()
        || error.is::<ZFileError>()
        || error.is::<GzipError>()
        || error.is::<ManifestError>()
        || error.is::<Ext4Error>()
        || error.is::<BaseError>();
    if damaged && error.source().is_none() {
        return Some(Code::Damaged);
    }
    if let Some(error) = error.downcast_ref::<LayoutError>() {
        return of_layout(error);
    }
    error.downcast_ref::<io::Error>().map(code_of_io)
}

fn of_registry(error: &RegistryError) -> Code {
    match error.root() {
        RegistryError::NotFound { .. } => Code::NotFound,
        RegistryError::Denied { .. }
        | RegistryError::Untrusted { .. }
        | RegistryError::OutOfReach { .. } => Code::Denied,
        RegistryError::RateLimited { .. } | RegistryError::Unreachable { .. } => Code::Unavailable,
        RegistryError::Server { status, .. } if *status >= 500 => Code::Unavailable,
        RegistryError::SizeMismatch { .. } | RegistryError::DigestMismatch { .. } => Code::Damaged,
        RegistryError::RangeIgnored { .. } => Code::Unsupported,
        RegistryError::TooLarge { .. } => Code::Exhausted,
        RegistryError::BadName { .. } | RegistryError::Setup { .. } => Code::Invalid,
        _ => Code::Internal,
    }
}

fn of_store(error: &StoreError) -> Option<Code> {
    match error {
        StoreError::Registry(error) => Some(of_registry(error)),
        StoreError::Layout(error) => of_layout(error),
        StoreError::Source(error) => of_source(error),
        StoreError::Damaged { .. } => Some(Code::Damaged),
        StoreError::TooLarge { .. } => Some(Code::Exhausted),
        _ => None,
    }
}

fn of_layout(error: &LayoutError) -> Option<Code> {
    match error {
        LayoutError::Io { source, .. } => Some(code_of_io(source)),
        LayoutError::NotLayout { .. } => Some(Code::NotFound),
        LayoutError::Link { .. } => Some(Code::Denied),
        _ => None,
    }
}

fn of_source(error: &SourceError) -> Option<Code> {
    match error {
        SourceError::Io { source, .. } => Some(code_of_io(source)),
        SourceError::PastEnd { .. } => Some(Code::Damaged),
        SourceError::Remote { lasting, .. } => {
            Some(if *lasting { Code::Damaged } else { Code::Unavailable })
        }
    }
}

fn of_disk(error: &DiskError) -> Option<Code> {
    match error {
        DiskError::Lsmt(error) => Some(of_lsmt(error)),
        DiskError::Source(error) => of_source(error),
        DiskError::Config { .. } => Some(Code::Invalid),
        DiskError::Budget(_) | DiskError::ZFile(ZFileError::Budget(_)) => Some(Code::Exhausted),
        DiskError::PastTarget { .. }
        | DiskError::Layer { .. }
        | DiskError::PastDisk { .. }
        | DiskError::Chain { .. }
        | DiskError::ZFile(_) => Some(Code::Damaged),
        _ => None,
    }
}

fn of_lsmt(error: &LsmtError) -> Code {
    match error {
        LsmtError::Source(error) => of_source(error).unwrap_or(Code::Internal),
        LsmtError::TooManyMappings { .. } | LsmtError::Budget(_) => Code::Exhausted,
        LsmtError::Size { .. } => Code::Invalid,
        LsmtError::Write(error) => code_of_io(error),
        _ => Code::Damaged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("wrapped")]
    struct Wrapped(#[source] Box<dyn Error + Send + Sync>);

    #[test]
    fn a_failure_keeps_its_code_however_often_it_is_wrapped() {
        let gone = RegistryError::NotFound { what: "manifest v1".into() };
        let denied = RegistryError::GaveUp {
            tries: 2,
            elapsed: std::time::Duration::from_secs(1),
            last: Box::new(RegistryError::Denied {
                what: "blob".into(),
                host: "h".into(),
                reason: "no".into(),
            }),
        };
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let cases: [(Box<dyn Error + Send + Sync>, Code); 4] = [
            (Box::new(StoreError::Registry(gone)), Code::NotFound),
            (Box::new(ImageError::Store(StoreError::Registry(denied))), Code::Denied),
            (Box::new(full), Code::Exhausted),
            ("a text".into(), Code::Internal),
        ];
        for (error, code) in cases {
            let error = Wrapped(Box::new(Wrapped(error)));
            assert_eq!(code_of(&error), code, "{error:?}");
        }
    }
}
