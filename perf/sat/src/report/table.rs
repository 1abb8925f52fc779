//! The page in Markdown: one table for each image, network and number of containers.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::statistics::middle;
use super::{Group, Row};
use crate::network::shape::Shape;

/// The row to which ratios are.
const BASE: &str = "overlayfs";

/// The page of these groups.
pub(super) fn page(groups: &[Group<'_>]) -> String {
    let mut page = String::from(
        "# Service-available time\n\n\
         From the first command to the first correct HTTP answer of the container, on a host that has nothing of the \
         image: stores empty, page cache dropped. All containers are started by containerd's `ctr run`; turbobd's on \
         an overlay over its mount. Times are medians, in brackets the lowest and the highest run. The page is made \
         by `perf/sat/run`; perf/sat/README.md says what each column is.\n",
    );
    let records = || groups.iter().flat_map(|group| &group.rows).flat_map(|(_, row)| &row.records);
    let machines: BTreeSet<&str> = records().map(|record| record.machine.as_str()).collect();
    let versions: BTreeSet<&str> =
        records().flat_map(|record| &record.versions).map(String::as_str).collect();
    let list = |names: BTreeSet<&str>| names.into_iter().collect::<Vec<_>>().join("; ");
    let _ = write!(page, "\nMachine: {}.\nVersions: {}.\n", list(machines), list(versions));
    if groups.is_empty() {
        page += "\nNothing is measured yet.\n";
    }
    for group in groups {
        page += &section(group);
    }
    page
}

/// One table.
fn section(group: &Group<'_>) -> String {
    let mut text = format!("\n## {}\n\n", group.heading());
    let about = group.rows.iter().flat_map(|(_, row)| &row.records).map(|record| &record.about);
    if let Some(about) = about.max_by_key(|about| about.compressed) {
        let unpacked = match about.unpacked {
            0 => String::new(),
            bytes => format!(", {} unpacked", megabytes(bytes as f64)),
        };
        let layers = if about.layers == 1 { "layer" } else { "layers" };
        let _ = write!(
            text,
            "{}: {} in gzip{unpacked}, {} {layers}. ",
            about.like,
            megabytes(about.compressed as f64),
            about.layers
        );
    }
    if let Some(shape) = Shape::named(group.network) {
        let _ = writeln!(text, "Line: {}.", shape.told());
    }
    text += "\n| Image Format | Image Size | Service Available Time | of OCI gzip | on the wire | requests | CPU | \
             peak memory | written | stored | runs |\n|---|---|---|---|---|---|---|---|---|---|---|\n";
    let base = group.rows.iter().find(|(system, _)| *system == BASE);
    let base = base.and_then(|(_, row)| middle(row.values(|m| m.available)));
    for (_, row) in &group.rows {
        text += &line(row, base.map(|base| base.median));
    }
    text
}

/// One row of a table.
fn line(row: &Row<'_>, base: Option<f64>) -> String {
    let title = row.title().replace('|', "\\|");
    let Some(time) = middle(row.values(|m| m.available)) else {
        let why = row.failed().unwrap_or("no run").replace(['|', '\n'], " ");
        return format!("| {title} | – | not measured: {why} | – | – | – | – | – | – | – | – |\n");
    };
    let one = |of: &dyn Fn(&crate::measure::Measured) -> f64| {
        middle(row.values(of)).map_or(0.0, |middle| middle.median)
    };
    let size = row.records.iter().map(|record| record.about.row_bytes).max().unwrap_or(0);
    let interval = match row.values(|m| m.available).len() {
        1 => String::new(),
        _ => format!(" ({:.2}–{:.2})", time.low, time.high),
    };
    let ratio = base.map_or("–".into(), |base| format!("{:.2}", time.median / base));
    let failures = row.records.iter().filter(|record| record.measured.is_none()).count();
    let done = row.records.len() - failures;
    let failed = if failures == 0 { String::new() } else { format!(", {failures} failed") };
    // Cells may be of several days: the last one's date, and each commit.
    let measured = || row.records.iter().filter(|record| record.measured.is_some());
    let date = measured().map(|record| record.date.get(..10).unwrap_or_default()).max();
    let commits: BTreeSet<&str> = measured().map(|record| record.commit.as_str()).collect();
    format!(
        "| {title} | {} | **{:.2} s**{interval} | {ratio} | {} | {:.0} | {:.2} s | {} | {} | {} | {done}{failed}, {}, {} |\n",
        megabytes(size as f64),
        time.median,
        megabytes(one(&|m| m.wire_bytes as f64)),
        one(&|m| f64::from(u32::try_from(m.requests).unwrap_or(u32::MAX))),
        one(&crate::measure::Measured::cpu),
        megabytes(one(&|m| m.peak_memory as f64)),
        megabytes(one(&|m| m.written_bytes as f64)),
        megabytes(one(&|m| m.store_bytes as f64)),
        date.unwrap_or_default(),
        commits.into_iter().collect::<Vec<_>>().join(" "),
    )
}

/// Bytes in megabytes, with a digit behind the point where that says something.
fn megabytes(bytes: f64) -> String {
    let value = bytes / 1e6;
    if value < 10.0 { format!("{value:.1} MB") } else { format!("{value:.0} MB") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::sample;

    #[test]
    fn a_table_has_medians_ratios_and_the_reasons_of_what_is_missing() {
        let runs = [
            sample("overlayfs", 0, Some(4.0)),
            sample("overlayfs", 1, Some(3.0)),
            sample("overlayfs", 2, Some(5.0)),
            sample("turbobd-first", 0, Some(1.0)),
            sample("turbobd-first", 1, None),
            sample("nydus-zran", 0, None),
        ];
        let row = |from: usize, to: usize| Row { records: runs[from..to].iter().collect() };
        let rows =
            vec![("overlayfs", row(0, 3)), ("turbobd-first", row(3, 5)), ("nydus-zran", row(5, 6))];
        let page = page(&[Group { image: "web", network: "cloud", count: 1, rows }]);
        assert!(page.contains("| **4.00 s** (3.00–5.00) | 1.00 |"), "{page}");
        assert!(page.contains("| **1.00 s** | 0.25 | 12 MB | 9 |"), "{page}");
        assert!(page.contains("1, 1 failed, 2026-11-01, abc |"), "{page}");
        assert!(page.contains("not measured: nydusd is missing"), "{page}");
        assert!(page.contains("Machine: a machine."), "{page}");
        // Each line of the table has the columns of its head.
        let bars = |line: &str| line.matches('|').count();
        let table: Vec<&str> = page.lines().filter(|line| line.starts_with('|')).collect();
        assert!(table.iter().all(|line| bars(line) == bars(table[0])), "{page}");
    }
}
