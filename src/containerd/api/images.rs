//! `containerd.services.images.v1`: names of images.

use std::collections::BTreeMap;

use prost_types::FieldMask;

use super::types::BlobDescriptor;

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod stubs {
    include!(concat!(env!("OUT_DIR"), "/containerd.services.images.v1.Images.rs"));
}

pub use stubs::images_client;

/// An image: a name for a manifest or an index.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageRecord {
    /// Name, as `ctr images ls` shows it.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Labels.
    #[prost(btree_map = "string, string", tag = "2")]
    pub labels: BTreeMap<String, String>,
    /// The manifest or index.
    #[prost(message, optional, tag = "3")]
    pub target: Option<BlobDescriptor>,
}

/// Request of Get.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct GetImageRequest {
    /// Name of the image.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// Reply to Get.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetImageResponse {
    /// The image.
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageRecord>,
}

/// Request of Create.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateImageRequest {
    /// The new image.
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageRecord>,
}

/// Reply to Create.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateImageResponse {
    /// The image.
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageRecord>,
}

/// Request of Update.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateImageRequest {
    /// Name and new values.
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageRecord>,
    /// Fields to set: `target`, `labels`, `labels.KEY`.
    #[prost(message, optional, tag = "2")]
    pub update_mask: Option<FieldMask>,
}

/// Reply to Update.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateImageResponse {
    /// The image as it is now.
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageRecord>,
}
