//! A Prepare that is a pull: is the layer there already, in a way that containerd need not fetch it?
//!
//! containerd asks for the layers of an image from the lowest, each with its chain ID in the label `containerd.io/snapshot.ref`. The
//! answer is one of two:
//!
//! * *AlreadyExists*, after a committed snapshot with that label and the request's parent is in the store. containerd looks it up by
//!   these two, takes any name ([`lazy_name`]), and neither fetches nor unpacks the layer.
//! * *ordinary mounts*. containerd fetches the layer and unpacks it. This is always right, so it is the answer to everything
//!   that is unknown, contradicts itself, fails or takes too long. A pull never fails here.
//!
//! | layer, by its labels | answer |
//! |---|---|
//! | known: committed here with this chain ID and parent | lazy, whatever it is |
//! | native, with the name of the image | lazy: the record is all there is |
//! | TurboOCI | ordinary: its metadata is 1 % of the data, is fetched by containerd, and is recognised at Commit |
//! | acceleration | ordinary: the trace is unpacked |
//! | plain, with image and manifest, and `plain` = `stream` | lazy once the daemon has the whole image open; ordinary if it cannot, or not in time |
//! | anything with a chain ID below and no parent (`rebase`) | ordinary: containerd 2.4 would lose the layers below |
//!
//! For a plain image the daemon finds the meta image, or builds it while it streams the layers. That is begun at the lowest layer, for
//! all of them, and waited for once; layers that come after a late or failed opening are unpacked without another wait, and
//! as soon as the device is there the rest is lazy. A lazy layer may stand on unpacked ones: its device has all layers below.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::oci::Digest;
use parking_lot::Mutex;
use source::failure::with_causes;

use super::chain::{ChainOptions, DeviceKey, streamed};
use super::devices::{ContentDevices, DeviceError, Readiness};
use super::layer::{BlobRepository, LayerContent, RepositoryBlob, StreamedImage};
use crate::labels::{LabelError, Labels, LayerLabels, PullLabels};

/// Longest time that the first layer of a plain image waits for its device. containerd holds a lock meanwhile, which the collection of
/// garbage waits for, and behind that all snapshots of this snapshotter.
const PATIENCE: Duration = Duration::from_secs(8);

/// Time after which a device that failed or was late is waited for again.
const AGAIN: Duration = Duration::from_secs(60);

/// What is done with a plain image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlainImages {
    /// The daemon streams it, with a meta image that it finds or builds.
    #[default]
    Stream,
    /// containerd fetches and unpacks it.
    Unpack,
}

/// Why a layer is unpacked.
#[derive(Clone, Debug)]
pub enum OrdinaryReason {
    /// containerd says neither image nor manifest.
    Unnamed,
    /// containerd unpacks layers beside each other.
    Rebase,
    /// It is the small metadata of a TurboOCI layer, or a trace.
    Small,
    /// The configuration wants it.
    Configured,
    /// Its labels contradict themselves.
    Labels(LabelError),
    /// It is a layer of blocks on a layer of files.
    OnFiles,
    /// It is a layer of files on a layer of blocks.
    OnBlocks,
    /// The daemon is still opening the image.
    Late,
    /// The daemon cannot open the image.
    Failed(DeviceError),
}

impl OrdinaryReason {
    /// The word in metrics.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unnamed => "no_annotations",
            Self::Rebase => "rebase",
            Self::Small => "metadata",
            Self::Configured => "configured",
            Self::Labels(_) => "labels",
            Self::OnFiles => "on_files",
            Self::OnBlocks => "on_blocks",
            Self::Late => "late",
            Self::Failed(_) => "failed",
        }
    }

    /// True if nothing is wrong with it.
    #[must_use]
    pub fn is_intended(&self) -> bool {
        matches!(self, Self::Small | Self::Configured | Self::OnBlocks)
    }

    /// The reason as part of a sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self {
            Self::Unnamed => "containerd did not say which image it is of: set disable_snapshot_annotations = false for CRI, and exports.enable_remote_snapshot_annotations = \"true\" of the proxy plugin for other clients".into(),
            Self::Rebase => "containerd unpacks layers beside each other: take the capability rebase from the proxy plugin".into(),
            Self::Small => "it is metadata, which is small".into(),
            Self::Configured => "the setting plain is unpack".into(),
            Self::Labels(error) => error.to_string(),
            Self::OnFiles => "the layer below was unpacked".into(),
            Self::OnBlocks => "the layer below is on a device, and this one is an ordinary tar".into(),
            Self::Late => "the daemon is still opening the image".into(),
            Self::Failed(error) => with_causes(error),
        }
    }
}

/// Answer to a pull's Prepare.
#[derive(Clone, Debug)]
pub enum PullAnswer {
    /// Commit a snapshot with this content, and say that it exists.
    Lazy(LayerContent),
    /// Prepare it for being unpacked.
    Ordinary(OrdinaryReason),
}

/// The layer that a pull wants, and what it stands on.
#[derive(Clone, Copy, Debug)]
pub struct WantedLayer<'w> {
    /// What the pull says.
    pub pull: &'w PullLabels,
    /// All labels of the request.
    pub labels: &'w Labels,
    /// Content of the parent; `None`: there is none.
    pub parent: Option<&'w LayerContent>,
    /// Number of the layers below.
    pub below: usize,
}

/// Decides about layers.
#[derive(Debug)]
pub struct LazyLayers {
    plain: PlainImages,
    options: ChainOptions,
    devices: Arc<ContentDevices>,
    /// Devices that were late or failed, and when.
    disappointed: Mutex<HashMap<DeviceKey, Instant>>,
}

impl LazyLayers {
    /// Decides with these settings, over these devices.
    #[must_use]
    pub fn new(plain: PlainImages, options: ChainOptions, devices: Arc<ContentDevices>) -> Self {
        Self { plain, options, devices, disappointed: Mutex::default() }
    }

    /// The answer for a layer that is not known; waits until `deadline` at most.
    #[must_use]
    pub fn answer(&self, wanted: &WantedLayer<'_>, deadline: Instant) -> PullAnswer {
        self.content(wanted, deadline).map_or_else(PullAnswer::Ordinary, PullAnswer::Lazy)
    }

    fn content(
        &self,
        wanted: &WantedLayer<'_>,
        deadline: Instant,
    ) -> Result<LayerContent, OrdinaryReason> {
        let WantedLayer { pull, labels, parent, below } = *wanted;
        if parent.is_none() && pull.parent_chain.is_some() {
            return Err(OrdinaryReason::Rebase);
        }
        let on_blocks = matches!(
            parent,
            Some(
                LayerContent::Native { .. }
                    | LayerContent::TurboOci { .. }
                    | LayerContent::Acceleration
            )
        );
        match LayerLabels::of(labels).map_err(OrdinaryReason::Labels)? {
            LayerLabels::TurboOci { .. } | LayerLabels::Acceleration => Err(OrdinaryReason::Small),
            LayerLabels::Native { blob, size } => {
                let image = pull.image_ref.as_deref().ok_or(OrdinaryReason::Unnamed)?;
                let repository = BlobRepository::of(image).ok_or(OrdinaryReason::Unnamed)?;
                if parent.is_some() && !on_blocks {
                    return Err(OrdinaryReason::OnFiles);
                }
                let blob = RepositoryBlob { repository, digest: blob, size };
                Ok(LayerContent::Native { blob: Some(blob) })
            }
            LayerLabels::Plain if on_blocks => Err(OrdinaryReason::OnBlocks),
            LayerLabels::Plain if self.plain == PlainImages::Unpack => {
                Err(OrdinaryReason::Configured)
            }
            LayerLabels::Plain => {
                let named = pull.image_ref.as_deref().zip(pull.manifest);
                let (image, manifest) = named.ok_or(OrdinaryReason::Unnamed)?;
                BlobRepository::of(image).ok_or(OrdinaryReason::Unnamed)?;
                self.plain_image(pull, image, manifest, below, deadline)
            }
        }
    }

    /// A layer of a plain image, if the daemon has it open in time.
    fn plain_image(
        &self,
        pull: &PullLabels,
        image: &str,
        manifest: Digest,
        below: usize,
        deadline: Instant,
    ) -> Result<LayerContent, OrdinaryReason> {
        let lowest = |layers| StreamedImage { reference: image.to_owned(), manifest, layers };
        let total = pull.remaining.and_then(|remaining| NonZeroUsize::new(below + remaining));
        let whole = streamed(&lowest(total), &self.options);
        self.wait(&whole.key, || {
            self.devices.ensure(&whole, deadline.min(Instant::now() + PATIENCE)).map(|_| ())
        })?;
        Ok(LayerContent::Streamed(lowest(NonZeroUsize::new(below + 1))))
    }

    /// Waits for a device as `ensure` does, unless that was in vain a short time ago.
    fn wait(
        &self,
        key: &DeviceKey,
        ensure: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), OrdinaryReason> {
        let before = self.disappointed.lock().get(key).copied();
        if before.is_some_and(|at| at.elapsed() < AGAIN) {
            match self.devices.state(key) {
                Readiness::Ready => {}
                Readiness::Failed(error) => return Err(OrdinaryReason::Failed(error)),
                Readiness::Working | Readiness::Absent => return Err(OrdinaryReason::Late),
            }
        }
        let result = ensure();
        let mut disappointed = self.disappointed.lock();
        disappointed.retain(|other, at| other != key && at.elapsed() < AGAIN);
        let Err(error) = result else { return Ok(()) };
        disappointed.insert(key.clone(), Instant::now());
        Err(match error {
            DeviceError::Late { .. } => OrdinaryReason::Late,
            error => OrdinaryReason::Failed(error),
        })
    }
}

/// Name of the snapshot of a lazy layer. The same layer on another parent, which another namespace may have unpacked, is
/// another snapshot; a chain ID alone, as other snapshotters name it, would make the two collide.
#[must_use]
pub fn lazy_name(parent: Option<&str>, chain: &str, content: &LayerContent) -> String {
    let parts = [parent.unwrap_or_default(), chain, content.name()].join("\0");
    format!("turbobd/{}/{}", content.name(), Digest::of(parts.as_bytes()).hex())
}

#[cfg(test)]
mod tests {
    use super::super::devices::memory::{AttachPlan, FaultyHost, MemoryHost};
    use super::*;
    use crate::labels::{CRI_IMAGE_REF, CRI_LAYERS, CRI_MANIFEST, PARENT_CHAIN, REF};
    use client::Code;
    use formats::oci::annotations;

    const SOON: Duration = Duration::from_secs(30);

    fn native_labels() -> Labels {
        let blob = Digest::of(b"blob").to_string();
        let pairs = [(annotations::BLOB_DIGEST, blob), (annotations::BLOB_SIZE, "9".into())];
        pairs.map(|(key, value)| (key.to_owned(), value)).into()
    }

    fn plain_labels() -> Labels {
        let layer = Digest::of(b"layer").to_string();
        let pairs = [
            (CRI_IMAGE_REF, "reg.example/team/app:1".to_owned()),
            (CRI_MANIFEST, Digest::of(b"manifest").to_string()),
            (CRI_LAYERS, [layer.clone(), layer].join(",")),
        ];
        pairs.map(|(key, value)| (key.to_owned(), value)).into()
    }

    fn image_label() -> (String, String) {
        (CRI_IMAGE_REF.into(), "reg.example/team/app:1".into())
    }

    struct Scene {
        _dir: tempfile::TempDir,
        lazy: LazyLayers,
    }

    impl Scene {
        fn new(host: Arc<dyn super::super::devices::host::DeviceHost>, plain: PlainImages) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let devices = ContentDevices::open(dir.path().join("devices"), host).unwrap();
            let lazy = LazyLayers::new(plain, ChainOptions::default(), devices);
            Self { _dir: dir, lazy }
        }

        fn answer(
            &self,
            mut labels: Labels,
            parent: Option<&LayerContent>,
            time: Duration,
        ) -> Result<LayerContent, &'static str> {
            labels.insert(REF.into(), "sha256:chain".into());
            let pull = PullLabels::of(&labels).unwrap();
            let below = usize::from(parent.is_some());
            let wanted = WantedLayer { pull: &pull, labels: &labels, parent, below };
            match self.lazy.answer(&wanted, Instant::now() + time) {
                PullAnswer::Lazy(content) => Ok(content),
                PullAnswer::Ordinary(reason) => {
                    assert!(!reason.sentence().is_empty());
                    Err(reason.word())
                }
            }
        }
    }

    #[test]
    fn a_native_layer_is_lazy_if_its_image_is_known_and_it_stands_on_blocks() {
        let host = Arc::new(MemoryHost::new());
        let scene = Scene::new(host.clone(), PlainImages::Unpack);
        assert_eq!(scene.answer(native_labels(), None, SOON), Err("no_annotations"));
        let mut labels = native_labels();
        labels.extend([image_label()]);
        let lower = scene.answer(labels.clone(), None, SOON).unwrap();
        assert!(matches!(&lower, LayerContent::Native { blob: Some(blob) } if blob.size == 9));
        assert!(scene.answer(labels.clone(), Some(&lower), SOON).is_ok());
        assert_eq!(scene.answer(labels, Some(&LayerContent::Plain), SOON), Err("on_files"));
        assert!(host.attached().is_empty(), "a pull of native layers asks no registry");
    }

    #[test]
    fn a_layer_whose_parent_is_named_and_not_given_is_never_lazy() {
        let scene = Scene::new(Arc::new(MemoryHost::new()), PlainImages::Stream);
        for mut labels in [native_labels(), plain_labels()] {
            labels.extend([image_label(), (PARENT_CHAIN.to_owned(), "sha256:below".to_owned())]);
            assert_eq!(scene.answer(labels.clone(), None, SOON), Err("rebase"));
        }
    }

    #[test]
    fn layers_of_a_plain_image_are_lazy_with_one_device_of_the_whole_image() {
        let host = Arc::new(MemoryHost::new());
        let scene = Scene::new(host.clone(), PlainImages::Stream);
        let lower = scene.answer(plain_labels(), None, SOON).unwrap();
        let LayerContent::Streamed(image) = &lower else { panic!("{lower:?}") };
        assert_eq!(image.layers, NonZeroUsize::new(1));
        let mut top = plain_labels();
        top.insert(CRI_LAYERS.into(), Digest::of(b"layer").to_string());
        let upper = scene.answer(top, Some(&lower), SOON).unwrap();
        let LayerContent::Streamed(image) = &upper else { panic!("{upper:?}") };
        assert_eq!(image.layers, NonZeroUsize::new(2));
        let attached = host.attached();
        assert_eq!(attached.len(), 1);
        assert_eq!(attached[0].image.layers, NonZeroUsize::new(2));
        assert_eq!(attached[0].image.manifest, Some(Digest::of(b"manifest")));
    }

    #[test]
    fn a_plain_image_is_unpacked_if_it_has_no_name_or_the_setting_says_so() {
        let host = Arc::new(MemoryHost::new());
        let scene = Scene::new(host.clone(), PlainImages::Stream);
        assert_eq!(scene.answer(Labels::new(), None, SOON), Err("no_annotations"));
        let scene = Scene::new(host, PlainImages::Unpack);
        assert_eq!(scene.answer(plain_labels(), None, SOON), Err("configured"));
    }

    #[test]
    fn a_registry_that_fails_or_is_slow_leads_to_ordinary_mounts_and_is_waited_for_once() {
        let host = Arc::new(FaultyHost::new(AttachPlan::Refuse(Code::Unavailable)));
        let scene = Scene::new(host.clone(), PlainImages::Stream);
        assert_eq!(scene.answer(plain_labels(), None, SOON), Err("failed"));
        let host = Arc::new(FaultyHost::new(AttachPlan::Wait));
        let scene = Scene::new(host.clone(), PlainImages::Stream);
        assert_eq!(scene.answer(plain_labels(), None, Duration::from_millis(20)), Err("late"));
        // Were it waited for again, this would hang.
        assert_eq!(scene.answer(plain_labels(), None, SOON), Err("late"));
        host.set_plan(AttachPlan::Work);
        let ready = || scene.answer(plain_labels(), Some(&LayerContent::Plain), SOON);
        let end = Instant::now() + SOON;
        while ready().is_err() {
            assert!(Instant::now() < end, "the device was opened, and no layer is lazy");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_layer_on_another_parent_has_another_name() {
        let native = LayerContent::Native { blob: None };
        let names = [
            lazy_name(None, "sha256:c", &native),
            lazy_name(Some("p"), "sha256:c", &native),
            lazy_name(Some("q"), "sha256:c", &native),
            lazy_name(Some("p"), "sha256:d", &native),
            lazy_name(Some("p"), "sha256:c", &LayerContent::Acceleration),
        ];
        let different: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len());
        assert_eq!(names[1], lazy_name(Some("p"), "sha256:c", &native));
    }
}
