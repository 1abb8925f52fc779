//! One line of the log and one count for each pull: was it lazy, and if not, why?
//!
//! containerd asks for one layer after the other and never says that a pull has ended. It has ended with its topmost layer, where the
//! labels tell that, and else when nothing was asked for during [`QUIET`].
//!
//! Counts go to a file in the format of Prometheus' text ([`METRICS_NAME`] in the root, for the textfile collector of its node
//! exporter): the snapshotter opens no port.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::lazy::OrdinaryReason;
use crate::labels::PullLabels;

/// Time without another layer after which a pull counts as ended.
pub const QUIET: Duration = Duration::from_secs(10);

/// Name of the file with the counts.
pub const METRICS_NAME: &str = "metrics.prom";

/// Name in messages of an image that containerd did not name.
const UNNAMED: &str = "an image without a name";

/// What became of a layer.
#[derive(Clone, Debug)]
pub enum LayerOutcome {
    /// Neither fetched nor unpacked; the kind of its content.
    Lazy(&'static str),
    /// It was here already.
    Known,
    /// containerd fetches and unpacks it.
    Unpacked(OrdinaryReason),
}

impl LayerOutcome {
    fn word(&self) -> &'static str {
        match self {
            Self::Lazy(kind) => kind,
            Self::Known => "known",
            Self::Unpacked(reason) => reason.word(),
        }
    }
}

/// The pulls of a snapshotter.
#[derive(Debug, Default)]
pub struct Pulls {
    state: Mutex<PullCounts>,
    file: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct PullCounts {
    running: HashMap<String, RunningPull>,
    /// By `all`, `part` and `none`.
    pulls: BTreeMap<&'static str, u64>,
    /// By the answer, and the kind or the reason.
    layers: BTreeMap<(&'static str, &'static str), u64>,
}

#[derive(Debug)]
struct RunningPull {
    layers: Vec<LayerOutcome>,
    last: Instant,
}

impl Pulls {
    /// No pull yet; counts are written to a file in `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { state: Mutex::default(), file: Some(root.join(METRICS_NAME)) }
    }

    /// A pull got this answer for a layer.
    pub fn layer(&self, pull: &PullLabels, outcome: LayerOutcome) {
        let name = pull.image_ref.as_deref().unwrap_or(UNNAMED);
        let answer = if matches!(outcome, LayerOutcome::Unpacked(_)) { "unpacked" } else { "lazy" };
        let mut state = self.state.lock();
        *state.layers.entry((answer, outcome.word())).or_default() += 1;
        let new = || RunningPull { layers: Vec::new(), last: Instant::now() };
        let running = state.running.entry(name.to_owned()).or_insert_with(new);
        running.layers.push(outcome);
        running.last = Instant::now();
        if pull.remaining == Some(1) {
            self.end(&mut state, |other, _| other == name);
        }
    }

    /// Ends the pulls that have been quiet for `quiet`.
    pub fn end_quiet(&self, quiet: Duration) {
        self.end(&mut self.state.lock(), |_, pull| pull.last.elapsed() >= quiet);
    }

    fn end(&self, state: &mut PullCounts, has_ended: impl Fn(&str, &RunningPull) -> bool) {
        let names: Vec<String> = state
            .running
            .iter()
            .filter(|(name, pull)| has_ended(name, pull))
            .map(|(name, _)| name.clone())
            .collect();
        if names.is_empty() {
            return;
        }
        for name in names {
            let Some(pull) = state.running.remove(&name) else { continue };
            *state.pulls.entry(pull.share()).or_default() += 1;
            let line = pull.line(&name);
            if pull.is_as_intended() {
                tracing::info!("{line}");
            } else {
                tracing::warn!("{line}");
            }
        }
        if let Some(file) = &self.file
            && let Err(error) = write(file, &state.page())
        {
            tracing::warn!(%error, "{} cannot be written", file.display());
        }
    }

    /// The counts, as Prometheus' text.
    #[must_use]
    pub fn page(&self) -> String {
        self.state.lock().page()
    }
}

/// Replaces a file as a whole.
fn write(file: &Path, page: &str) -> io::Result<()> {
    let new = file.with_extension("new");
    std::fs::write(&new, page)?;
    std::fs::rename(new, file)
}

impl PullCounts {
    fn page(&self) -> String {
        let mut page = String::new();
        page.push_str("# HELP turbobd_snapshotter_pulls_total Pulls, by the share of their layers that was not fetched\n");
        page.push_str("# TYPE turbobd_snapshotter_pulls_total counter\n");
        for (share, count) in &self.pulls {
            let _ = writeln!(page, "turbobd_snapshotter_pulls_total{{lazy=\"{share}\"}} {count}");
        }
        page.push_str("# HELP turbobd_snapshotter_layers_total Layers of pulls, by the answer, and its kind or reason\n");
        page.push_str("# TYPE turbobd_snapshotter_layers_total counter\n");
        for ((answer, why), count) in &self.layers {
            let _ = writeln!(
                page,
                "turbobd_snapshotter_layers_total{{answer=\"{answer}\",why=\"{why}\"}} {count}"
            );
        }
        page
    }
}

impl RunningPull {
    fn unpacked(&self) -> impl Iterator<Item = (usize, &OrdinaryReason)> {
        self.layers.iter().enumerate().filter_map(|(number, outcome)| match outcome {
            LayerOutcome::Unpacked(reason) => Some((number, reason)),
            LayerOutcome::Lazy(_) | LayerOutcome::Known => None,
        })
    }

    /// The metadata of TurboOCI layers is fetched, and their data is not: such a layer is lazy.
    fn fetched(&self) -> usize {
        self.unpacked().filter(|(_, reason)| !matches!(reason, OrdinaryReason::Small)).count()
    }

    fn share(&self) -> &'static str {
        match self.fetched() {
            0 => "all",
            count if count < self.layers.len() => "part",
            _ => "none",
        }
    }

    fn is_as_intended(&self) -> bool {
        self.unpacked().all(|(_, reason)| reason.is_intended())
    }

    /// `reg/a:1 pulled, layers: 3; lazy: 2 streamed; unpacked: 3 (…)`; layers count from 1, the lowest.
    fn line(&self, name: &str) -> String {
        let mut line = format!("{name} pulled, layers: {}", self.layers.len());
        let mut lazy = BTreeMap::<&str, usize>::new();
        for outcome in &self.layers {
            if !matches!(outcome, LayerOutcome::Unpacked(_)) {
                *lazy.entry(outcome.word()).or_default() += 1;
            }
        }
        let lazy: Vec<String> =
            lazy.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        if !lazy.is_empty() {
            let _ = write!(line, "; lazy: {}", lazy.join(", "));
        }
        let mut reasons = Vec::<(String, Vec<String>)>::new();
        for (number, reason) in self.unpacked() {
            let (sentence, number) = (reason.sentence(), (number + 1).to_string());
            match reasons.iter_mut().find(|(other, _)| *other == sentence) {
                Some((_, numbers)) => numbers.push(number),
                None => reasons.push((sentence, vec![number])),
            }
        }
        for (sentence, numbers) in reasons {
            let _ = write!(line, "; unpacked: {} ({sentence})", numbers.join(", "));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::{CRI_IMAGE_REF, CRI_LAYERS, Labels, REF};

    fn pull(image: &str, remaining: usize) -> PullLabels {
        let layers = vec!["sha256:a"; remaining].join(",");
        let pairs = [(REF, "c"), (CRI_IMAGE_REF, image), (CRI_LAYERS, &*layers)];
        let labels: Labels =
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        PullLabels::of(&labels).unwrap()
    }

    #[test]
    fn a_pull_is_counted_once_when_its_topmost_layer_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let pulls = Pulls::new(dir.path());
        pulls.layer(&pull("a", 3), LayerOutcome::Known);
        pulls.layer(&pull("b", 2), LayerOutcome::Lazy("native"));
        pulls.layer(&pull("a", 2), LayerOutcome::Lazy("streamed"));
        assert!(!pulls.page().contains("pulls_total{"), "{}", pulls.page());
        pulls.layer(&pull("a", 1), LayerOutcome::Unpacked(OrdinaryReason::Late));
        let page = std::fs::read_to_string(dir.path().join(METRICS_NAME)).unwrap();
        assert_eq!(page, pulls.page());
        assert!(page.contains("turbobd_snapshotter_pulls_total{lazy=\"part\"} 1\n"), "{page}");
        let late = "turbobd_snapshotter_layers_total{answer=\"unpacked\",why=\"late\"} 1\n";
        assert!(page.contains(late), "{page}");
        pulls.end_quiet(Duration::ZERO);
        assert!(pulls.page().contains("{lazy=\"all\"} 1\n"), "{}", pulls.page());
    }

    #[test]
    fn the_line_names_each_reason_once_with_its_layers() {
        let unpacked = |reason| LayerOutcome::Unpacked(reason);
        let layers = vec![
            unpacked(OrdinaryReason::Late),
            unpacked(OrdinaryReason::Late),
            LayerOutcome::Lazy("streamed"),
            unpacked(OrdinaryReason::Small),
        ];
        let pull = RunningPull { layers, last: Instant::now() };
        assert_eq!(
            pull.line("reg/a:1"),
            "reg/a:1 pulled, layers: 4; lazy: 1 streamed; unpacked: 1, 2 (the daemon is still opening the image); \
             unpacked: 4 (it is metadata, which is small)"
        );
        assert_eq!((pull.share(), pull.is_as_intended()), ("part", false));
        let meta =
            RunningPull { layers: vec![unpacked(OrdinaryReason::Small)], last: Instant::now() };
        assert_eq!((meta.share(), meta.is_as_intended()), ("all", true));
    }
}
