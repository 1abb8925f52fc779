//! What the command line asks for.

use std::path::PathBuf;

/// The service-available time of systems that start containers, side by side.
///
/// Each system starts a container from an image in a registry, on a host that has nothing of it. The time from the
/// first command to the first correct HTTP answer is measured. Results are in `target/sat/report`.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "sat", max_term_width = 110)]
pub(crate) struct Arguments {
    /// One small image, one network, turbobd's rows and overlayfs, one run: some minutes.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Images to start, by name; `all` means each of perf/sat/images [default: the order of a full run].
    #[arg(long, value_delimiter = ',', value_name = "NAME", conflicts_with = "image")]
    pub(crate) images: Vec<String>,
    /// Rows to measure, by name, such as `turbobd-first`; see --list.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) formats: Vec<String>,
    /// Networks between host and registry: loopback, lan, cloud, far, edge.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) net: Vec<String>,
    /// Systems to measure, all of their rows: containerd, turbobd, soci, stargz, nydus, overlaybd.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) peers: Vec<String>,
    /// Runs of each cell [default: 5 for the four published images, 3 for others; 1 with --quick].
    #[arg(long, value_name = "N")]
    pub(crate) rounds: Option<u32>,
    /// Containers of one image that are started at once.
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1")]
    pub(crate) count: Vec<u32>,
    /// Measure this image instead: `oci:DIR:TAG`, or `docker://HOST/NAME:TAG` as skopeo writes it.
    #[arg(long, value_name = "REF", requires = "ready")]
    pub(crate) image: Option<String>,
    /// Program and arguments of its container, in one string [default: those of the image].
    #[arg(long, value_name = "COMMAND", requires = "image")]
    pub(crate) cmd: Option<String>,
    /// Address at which its service answers, on this host: `http://127.0.0.1:PORT/PATH`.
    #[arg(long, value_name = "URL", requires = "image")]
    pub(crate) ready: Option<String>,
    /// Text that a correct answer contains [default: any answer with status 200].
    #[arg(long, value_name = "TEXT", requires = "image")]
    pub(crate) expect: Option<String>,
    /// Measure again what is recorded already.
    #[arg(long)]
    pub(crate) again: bool,
    /// Longest wait for an answer, in seconds; a run that takes longer has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) patience: u64,
    /// Write the report to this page too, as perf/RESULTS.md is written.
    #[arg(long, value_name = "FILE")]
    pub(crate) page: Option<PathBuf>,
    /// Only make the report, of what is recorded.
    #[arg(long)]
    pub(crate) report: bool,
    /// List images, systems with their rows and what they lack here, and networks.
    #[arg(long)]
    pub(crate) list: bool,
    /// Remove what a killed run left: processes, mounts, stores.
    #[arg(long)]
    pub(crate) clean: bool,
}
