//! `turbobd rpull`: pull an image into containerd without its layers' data.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::bars::Bars;
use super::{Failure, Outcome, Service, registry_flags, stderr, stdout, table};
use ::convert::Progress as _;
use ::registry::store;
use containerd::rpull::{self, PullEvent, PullOutcome, PullTarget, PulledImage, Report};
use formats::oci::ImageName;
use host::images::Registries;

/// Socket of a containerd that is installed as usual.
const SOCKET: &str = "/run/containerd/containerd.sock";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Image in a registry: `[host[:port]/]name[:tag|@digest]`.
    image: String,
    /// Name of the snapshotter in containerd's configuration.
    #[arg(long, value_name = "NAME", default_value = "overlaybd")]
    snapshotter: String,
    /// Fetch the blobs of all layers into containerd's content store. Without them an image with lazy layers can be run, but
    /// not be pushed, saved, committed or used with another snapshotter.
    #[arg(long)]
    download: bool,
    /// Socket of containerd [default: $CONTAINERD_ADDRESS, or /run/containerd/containerd.sock].
    #[arg(short = 'a', long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Namespace of containerd; CRI's is k8s.io [default: $CONTAINERD_NAMESPACE, or default].
    #[arg(short = 'n', long, value_name = "NAME")]
    namespace: Option<String>,
    #[command(flatten)]
    registry: registry_flags::Args,
}

impl Args {
    fn target(&self) -> PullTarget {
        // An empty variable counts as unset, as for ctr.
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let address =
            self.address.clone().or_else(|| variable("CONTAINERD_ADDRESS").map(Into::into));
        let namespace = self.namespace.clone().or_else(|| {
            variable("CONTAINERD_NAMESPACE").map(|value| value.to_string_lossy().into_owned())
        });
        PullTarget {
            socket: address.unwrap_or_else(|| SOCKET.into()),
            namespace: namespace.unwrap_or_else(|| "default".to_owned()),
            snapshotter: self.snapshotter.clone(),
            download: self.download,
        }
    }
}

/// Pulls; prints the digest that the name stands for on stdout, and what became of the layers on stderr.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    let image: ImageName = args.image.parse().map_err(Failure::usage)?;
    let ImageName::Registry(name) = &image else {
        let text = "rpull takes an image in a registry; `ctr images import` takes one in a layout";
        return Err(Failure::Usage(text.into()));
    };
    let registries = Registries::new(service.load()?);
    let client = registries.client(&args.registry.spec()?).map_err(Failure::because)?;
    let (images, _) = store::open(&image, &client).map_err(Failure::because)?;
    let pulled = rpull::rpull(name, images, &args.target(), bars()).map_err(Failure::because)?;
    stderr::line(summary(&pulled));
    stdout::line(pulled.digest)?;
    Ok(ExitCode::SUCCESS)
}

/// A bar for each layer that is fetched.
fn bars() -> Report {
    let bars = Bars::new();
    Arc::new(move |event| match event {
        PullEvent::Begun(layer, size) => bars.start(&layer, size),
        PullEvent::Advanced(layer, bytes) => bars.advance(&layer, bytes),
        PullEvent::Done(layer) => bars.finish(&layer),
    })
}

/// `NAME: layers: 2 lazy, 1 unpacked; 12.0 MiB fetched of 340 MiB`
fn summary(pulled: &PulledImage) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for layer in &pulled.layers {
        let outcome = match layer.outcome {
            PullOutcome::Present => "there already",
            PullOutcome::Lazy => "lazy",
            PullOutcome::Unpacked => "unpacked",
        };
        *counts.entry(outcome).or_default() += 1;
    }
    if counts.is_empty() {
        return format!("{}: it has no layers", pulled.name);
    }
    let counts: Vec<String> =
        counts.iter().map(|(outcome, count)| format!("{count} {outcome}")).collect();
    format!(
        "{}: layers: {}; {} fetched of {}",
        pulled.name,
        counts.join(", "),
        table::size(pulled.fetched),
        table::size(pulled.layers.iter().map(|layer| layer.size).sum()),
    )
}
