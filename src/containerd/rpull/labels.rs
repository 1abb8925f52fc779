//! Labels that a pull sets on blobs and snapshots, as containerd's own pulls do.

use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest, RegistryName};

use crate::labels::{
    CRI_IMAGE_REF, CRI_LAYER, CRI_LAYERS, CRI_MANIFEST, DIFF_ID, GID_MAPPING, IMAGE_REF, Labels,
    PARENT_CHAIN, REF, UID_MAPPING,
};

/// Longest label: key and value together, in bytes (`pkg/labels/validate.go` of containerd).
const LONGEST_LABEL: usize = 4096;

/// Digest of the tar in a layer's blob.
pub(super) const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Prefix of annotations that a snapshotter is told.
const INHERITED: &str = "containerd.io/snapshot/";

/// The label that names the repositories of a registry that have a blob. A push to the registry then takes it from there.
#[derive(Clone, Debug)]
pub(super) struct DistributionSource {
    key: String,
    repository: String,
}

/// The label for blobs of this image.
pub(super) fn distribution_source(image: &RegistryName) -> DistributionSource {
    // containerd leaves out the port.
    let host = match image.host.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => &image.host,
    };
    DistributionSource {
        key: format!("containerd.io/distribution.source.{}", host.trim_matches(['[', ']'])),
        repository: image.repository.clone(),
    }
}

impl DistributionSource {
    /// Adds the repository to those that the label in `known` names. A label that would be too long is left out.
    pub(super) fn add(&self, labels: &mut Labels, known: &Labels) {
        let known = known.get(&self.key).map_or("", String::as_str);
        let mut repositories: Vec<&str> =
            known.split(',').filter(|name| !name.is_empty()).collect();
        repositories.push(&self.repository);
        repositories.sort_unstable();
        repositories.dedup();
        let value = repositories.join(",");
        if self.key.len() + value.len() <= LONGEST_LABEL {
            labels.insert(self.key.clone(), value);
        }
    }
}

/// Labels by which the garbage collection finds the parts of a manifest or an index.
pub(super) fn children(config: Option<&Descriptor>, parts: &[Descriptor]) -> Labels {
    let mut labels = Labels::new();
    if let Some(config) = config {
        labels.insert("containerd.io/gc.ref.content.config".to_owned(), config.digest.to_string());
    }
    let (mut manifests, mut layers) = (0, 0);
    for part in parts {
        let (kind, count) = match part.media_type.as_str() {
            media::OCI_MANIFEST | media::DOCKER_MANIFEST => ("m", &mut manifests),
            _ => ("l", &mut layers),
        };
        labels.insert(
            format!("containerd.io/gc.ref.content.{kind}.{count}"),
            part.digest.to_string(),
        );
        *count += 1;
    }
    labels
}

/// The label by which the garbage collection keeps the snapshots of an image as long as its config.
pub(super) fn snapshots(snapshotter: &str, top: Digest) -> Labels {
    Labels::from([(format!("containerd.io/gc.ref.snapshot.{snapshotter}"), top.to_string())])
}

/// Digest that names a layer with all layers below it (OCI image specification, "Layer ChainID"), for each layer.
pub(super) fn chain_ids(tars: &[Digest]) -> Vec<Digest> {
    let mut chains: Vec<Digest> = Vec::with_capacity(tars.len());
    for tar in tars {
        let chain = match chains.last() {
            Some(below) => Digest::of(format!("{below} {tar}").as_bytes()),
            None => *tar,
        };
        chains.push(chain);
    }
    chains
}

/// A layer of an image, and what a snapshotter is told of it.
pub(super) struct LayerPlace<'a> {
    /// Name of the image.
    pub(super) image_ref: &'a str,
    /// Digest of its manifest.
    pub(super) manifest: Digest,
    /// Its layers, lowest first.
    pub(super) layers: &'a [Descriptor],
    /// Digests of their tars.
    pub(super) tars: &'a [Digest],
    /// Their chain IDs.
    pub(super) chains: &'a [Digest],
    /// Number of the layer.
    pub(super) number: usize,
}

impl LayerPlace<'_> {
    /// Labels of the layer's snapshot, at Prepare and at Commit.
    pub(super) fn labels(&self) -> Labels {
        let layer = &self.layers[self.number];
        // An image that brings the last two would choose who owns its files.
        let inherited = layer.annotations.iter().filter(|(key, _)| {
            key.starts_with(INHERITED) && ![UID_MAPPING, GID_MAPPING].contains(&key.as_str())
        });
        let mut labels: Labels =
            inherited.map(|(key, value)| (key.clone(), value.clone())).collect();
        let mut set = |key: &str, value: String| labels.insert(key.to_owned(), value);
        set(REF, self.chains[self.number].to_string());
        set(DIFF_ID, self.tars[self.number].to_string());
        if let Some(below) = self.number.checked_sub(1) {
            set(PARENT_CHAIN, self.chains[below].to_string());
        }
        set(IMAGE_REF, self.image_ref.to_owned());
        set(CRI_IMAGE_REF, self.image_ref.to_owned());
        set(CRI_MANIFEST, self.manifest.to_string());
        set(CRI_LAYER, layer.digest.to_string());
        set(CRI_LAYERS, listed(&self.layers[self.number..]));
        labels
    }
}

/// Digests of as many layers as fit a label.
fn listed(layers: &[Descriptor]) -> String {
    let mut list = String::new();
    for layer in layers {
        let digest = layer.digest.to_string();
        if CRI_LAYERS.len() + list.len() + 1 + digest.len() > LONGEST_LABEL {
            break;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(&digest);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(count: usize) -> Vec<Descriptor> {
        (0..count).map(|n| Descriptor::of(media::OCI_LAYER, n.to_string().as_bytes())).collect()
    }

    /// The vector of the Go package `github.com/opencontainers/image-spec/identity`.
    #[test]
    fn chain_ids_are_those_of_the_specification() {
        let tars = [Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c")];
        let chains = chain_ids(&tars);
        assert_eq!(chains[0], tars[0]);
        assert_eq!(chains[1], Digest::of(format!("{} {}", tars[0], tars[1]).as_bytes()));
        assert_eq!(chains[2], Digest::of(format!("{} {}", chains[1], tars[2]).as_bytes()));
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn a_snapshotter_is_told_the_image_and_the_layer_but_no_owner_that_the_image_names() {
        let mut layers = layers(100);
        for (key, value) in [
            ("containerd.io/snapshot/overlaybd/blob-size", "1"),
            ("containerd.io/snapshot/uidmapping", "0:0:1"),
            ("containerd.io/snapshot/cri.image-ref", "another"),
            ("org.example", "x"),
        ] {
            layers[1].annotations.insert(key.to_owned(), value.to_owned());
        }
        let tars: Vec<Digest> = layers.iter().map(|layer| layer.digest).collect();
        let chains = chain_ids(&tars);
        let place = |number| LayerPlace {
            image_ref: "r.example/a:b",
            manifest: Digest::of(b"m"),
            layers: &layers,
            tars: &tars,
            chains: &chains,
            number,
        };
        let labels = place(1).labels();
        assert_eq!(labels["containerd.io/snapshot.ref"], chains[1].to_string());
        assert_eq!(labels["containerd.io/snapshot/parent-chain-id"], chains[0].to_string());
        assert_eq!(labels["containerd.io/snapshot/overlaybd/blob-size"], "1");
        assert_eq!(labels["containerd.io/snapshot/cri.image-ref"], "r.example/a:b");
        assert!(!labels.contains_key("containerd.io/snapshot/uidmapping"));
        assert!(!labels.contains_key("org.example"));
        let list = &labels["containerd.io/snapshot/cri.image-layers"];
        assert!(list.starts_with(&layers[1].digest.to_string()));
        assert!(list.len() + CRI_LAYERS.len() <= LONGEST_LABEL && list.split(',').count() > 50);
        assert!(!place(0).labels().contains_key("containerd.io/snapshot/parent-chain-id"));
    }

    #[test]
    fn a_blob_keeps_the_repositories_that_it_is_known_to_be_in() {
        let image: RegistryName = match "h.example:5000/team/app:v1".parse().unwrap() {
            formats::oci::ImageName::Registry(name) => name,
            formats::oci::ImageName::Layout(_) => unreachable!(),
        };
        let source = distribution_source(&image);
        let key = "containerd.io/distribution.source.h.example";
        let known = Labels::from([(key.to_owned(), "b,zoo".to_owned())]);
        let mut labels = Labels::new();
        source.add(&mut labels, &known);
        assert_eq!(labels[key], "b,team/app,zoo");
        let again = labels.clone();
        source.add(&mut labels, &again);
        assert_eq!(labels[key], "b,team/app,zoo");
        let full = Labels::from([(key.to_owned(), "x".repeat(4090))]);
        let mut labels = Labels::new();
        source.add(&mut labels, &full);
        assert!(labels.is_empty());
    }

    #[test]
    fn the_parts_of_a_document_are_counted_by_kind() {
        let config = Descriptor::of(media::OCI_CONFIG, b"c");
        let layers = layers(2);
        let labels = children(Some(&config), &layers);
        assert_eq!(labels["containerd.io/gc.ref.content.config"], config.digest.to_string());
        assert_eq!(labels["containerd.io/gc.ref.content.l.1"], layers[1].digest.to_string());
        let manifest = Descriptor::of(media::OCI_MANIFEST, b"m");
        let labels = children(None, std::slice::from_ref(&manifest));
        assert_eq!(labels["containerd.io/gc.ref.content.m.0"], manifest.digest.to_string());
    }
}
