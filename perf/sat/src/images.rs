//! Images, built by scripts from packages of Debian, PyPI and npm alone.
//!
//! An image is a file of perf/sat/images: its layers, its command, and the answer by which its service is known to
//! work. A layer is a folder of perf/sat/images/layers with a script `build`, which changes a root that has all lower
//! layers; the difference is the layer. The same packages give the same bytes: names are sorted, owners are numbers,
//! and no time is later than a fixed one.
//!
//! # Contents
//!
//! * [`definition`] an image's file
//! * [`layer`]      runs a layer's script, keeps the result by the identity of what made it
//! * [`tarball`]    the difference as a tar, in gzip
//! * [`layout`]     layers as an OCI image layout; the user's own image

pub(crate) mod definition;
pub(crate) mod layer;
pub(crate) mod layout;
mod tarball;

use std::path::PathBuf;

use crate::failure::Failure;
use crate::measure::answer::Question;
use crate::place::Place;

pub(crate) use definition::Definition;

/// An image that is built: where it is, and how its container is started.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// Name on the command line and in tables; also its repository.
    pub(crate) name: String,
    /// What it stands for.
    pub(crate) like: String,
    /// The layout's folder; the image has the tag [`TAG`].
    pub(crate) layout: PathBuf,
    /// Compressed bytes of its layers.
    pub(crate) compressed: u64,
    /// Bytes of its layers as tar.
    pub(crate) unpacked: u64,
    /// Number of its layers.
    pub(crate) layers: usize,
    /// Program and arguments.
    pub(crate) command: Vec<String>,
    /// Environment, `NAME=VALUE`.
    pub(crate) environment: Vec<String>,
    /// Working directory; empty: the root.
    pub(crate) directory: String,
    /// User in the form of `ctr run --user`; empty: root.
    pub(crate) user: String,
    /// The question to container 0; container N listens N ports higher.
    pub(crate) question: Question,
    /// Variable that gives a container its port; empty: the service has one port only.
    pub(crate) port_variable: String,
}

/// Tag of an image in its layout and in its repositories.
pub(crate) const TAG: &str = "v1";

impl Image {
    /// The question to a container.
    pub(crate) fn question(&self, container: u32) -> Question {
        let offset = u16::try_from(container).unwrap_or(0);
        let mut question = self.question.clone();
        question.port = question.port.saturating_add(offset);
        question
    }

    /// Builds the image, or takes what an earlier run has built.
    pub(crate) fn build(place: &Place, definition: &Definition) -> Result<Self, Failure> {
        let mut layers: Vec<layer::Layer> = Vec::new();
        for name in &definition.layers {
            let layer = layer::build(place, name, &layers)?;
            layers.push(layer);
        }
        layout::from_layers(place, definition, &layers)
    }
}
