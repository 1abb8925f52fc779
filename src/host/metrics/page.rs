//! One page of metrics, in Prometheus' text format (version 0.0.4).

use std::collections::HashMap;
use std::fmt::Write as _;

use super::{BOUNDS, Metric, MetricKind, Reading};

/// Name and value of a label.
pub type Label<'a> = (&'a str, &'a str);

/// Samples, grouped by name as the format requires, in whatever order they are added.
#[derive(Default)]
pub struct Page {
    families: Vec<Family>,
    /// Index of each name in `families`.
    places: HashMap<&'static str, usize>,
}

struct Family {
    name: &'static str,
    kind: MetricKind,
    help: &'static str,
    samples: String,
}

impl Page {
    /// An empty page.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the counters of a part: each metric of its table, with `labels` that identify the part.
    pub fn put<T: ?Sized>(&mut self, metrics: &[Metric<T>], part: &T, labels: &[Label<'_>]) {
        for metric in metrics {
            let labels: Vec<Label<'_>> = labels.iter().chain(metric.labels).copied().collect();
            match (metric.read)(part) {
                Reading::Absent => {}
                reading => self.sample(metric, &labels, &reading),
            }
        }
    }

    fn sample<T: ?Sized>(&mut self, metric: &Metric<T>, labels: &[Label<'_>], reading: &Reading) {
        let Metric { name, kind, help, .. } = *metric;
        let place = *self.places.entry(name).or_insert_with(|| {
            self.families.push(Family { name, kind, help, samples: String::new() });
            self.families.len() - 1
        });
        let text = &mut self.families[place].samples;
        match reading {
            Reading::Absent => {}
            Reading::Whole(value) => line(text, name, "", labels, None, value),
            Reading::Real(value) => line(text, name, "", labels, None, value),
            Reading::Times(times) => {
                let mut below = 0;
                for (bound, count) in BOUNDS.iter().zip(&times.buckets) {
                    below += count;
                    let bound = (*bound as f64 / 1e6).to_string();
                    line(text, name, "_bucket", labels, Some(&bound), &below);
                }
                line(text, name, "_bucket", labels, Some("+Inf"), &times.count());
                line(text, name, "_sum", labels, None, &(times.sum as f64 / 1e6));
                line(text, name, "_count", labels, None, &times.count());
            }
        }
    }

    /// The text of the page.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for Family { name, kind, help, samples } in &self.families {
            let kind = kind.name();
            // Help texts are constants without characters to escape; writing to a String cannot fail.
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

/// One sample.
fn line(
    text: &mut String,
    name: &str,
    suffix: &str,
    labels: &[Label<'_>],
    bound: Option<&str>,
    value: &dyn std::fmt::Display,
) {
    text.push_str(name);
    text.push_str(suffix);
    let bound = bound.map(|bound| ("le", bound));
    for (number, (label, value)) in labels.iter().copied().chain(bound).enumerate() {
        text.push(if number == 0 { '{' } else { ',' });
        text.push_str(label);
        text.push_str("=\"");
        for letter in value.chars() {
            match letter {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    if !labels.is_empty() || bound.is_some() {
        text.push('}');
    }
    let _ = writeln!(text, " {value}");
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use blobs::Histogram;

    struct CountedPart {
        count: u64,
        waits: Histogram,
    }

    const TABLE: &[Metric<CountedPart>] = &[
        Metric {
            name: "t_count_total",
            kind: MetricKind::Counter,
            labels: &[("class", "demand")],
            help: "Things",
            read: |part| part.count.into(),
        },
        Metric {
            name: "t_wait_seconds",
            kind: MetricKind::Histogram,
            labels: &[],
            help: "Waits",
            read: |part| (&part.waits).into(),
        },
    ];

    #[test]
    fn samples_of_a_name_stay_together_and_labels_are_escaped() {
        let mut page = Page::new();
        for (count, image) in [(1, "a\"b\\c\nd"), (2, "e")] {
            let part = CountedPart { count, waits: Histogram::default() };
            part.waits.add(Duration::from_millis(7));
            page.put(TABLE, &part, &[("image", image)]);
        }
        let text = page.text();
        let begin = "# HELP t_count_total Things\n# TYPE t_count_total counter\n\
            t_count_total{image=\"a\\\"b\\\\c\\nd\",class=\"demand\"} 1\n\
            t_count_total{image=\"e\",class=\"demand\"} 2\n\
            # HELP t_wait_seconds Waits\n# TYPE t_wait_seconds histogram\n\
            t_wait_seconds_bucket{image=\"a\\\"b\\\\c\\nd\",le=\"0.0001\"} 0\n";
        assert!(text.starts_with(begin), "{text}");
        for line in [
            "t_wait_seconds_bucket{image=\"e\",le=\"0.005\"} 0\n",
            "t_wait_seconds_bucket{image=\"e\",le=\"0.01\"} 1\n",
            "t_wait_seconds_bucket{image=\"e\",le=\"+Inf\"} 1\n",
            "t_wait_seconds_sum{image=\"e\"} 0.007\n",
            "t_wait_seconds_count{image=\"e\"} 1\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
