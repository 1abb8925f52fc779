//! Progress bars on a terminal; silent elsewhere.

use std::collections::HashMap;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::table::short;
use ::convert::Progress;
use formats::oci::Digest;

/// One bar for each layer.
pub(super) struct Bars {
    group: MultiProgress,
    style: ProgressStyle,
    bars: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    /// Bars on stderr, drawn only if that is a terminal.
    pub(super) fn new() -> Self {
        let style = ProgressStyle::with_template(
            "{prefix} {bar:32} {binary_bytes:>11}/{binary_total_bytes} {binary_bytes_per_sec}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { group: MultiProgress::new(), style, bars: Mutex::default() }
    }

    fn with(&self, layer: &Digest, act: impl FnOnce(&ProgressBar)) {
        if let Some(bar) = self.bars.lock().get(layer) {
            act(bar);
        }
    }
}

impl Progress for Bars {
    fn start(&self, layer: &Digest, size: u64) {
        let bar = self.group.add(ProgressBar::new(size).with_style(self.style.clone()));
        bar.set_prefix(short(&layer.to_string()));
        self.bars.lock().insert(*layer, bar);
    }

    fn advance(&self, layer: &Digest, bytes: u64) {
        self.with(layer, |bar| bar.inc(bytes));
    }

    fn finish(&self, layer: &Digest) {
        self.with(layer, ProgressBar::finish);
    }
}
