//! Tables, JSON and pictures of what is recorded, below `target/sat/report`.
//!
//! # Contents
//!
//! * [`statistics`] the median of few runs, and its interval
//! * [`table`]      a page in Markdown, as perf/RESULTS.md is one
//! * [`svg`]        the few elements of SVG that the pictures need
//! * [`chart`]      bars of phases, one a row
//! * [`timeline`]   bytes on the line over the time of one run

mod chart;
mod statistics;
mod svg;
mod table;
mod timeline;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::arguments::Arguments;
use crate::failure::{Attempt as _, Failure};
use crate::place::Place;
use crate::record::{Cell, Records, RunRecord};
use crate::systems;

/// The runs of one cell.
#[derive(Clone, Debug)]
pub(crate) struct Row<'a> {
    /// Its records, those that failed included.
    pub(crate) records: Vec<&'a RunRecord>,
}

impl<'a> Row<'a> {
    /// Title of the row.
    pub(crate) fn title(&self) -> &'a str {
        self.records.first().map_or("", |record| record.title.as_str())
    }

    /// Values of the runs that did not fail.
    pub(crate) fn values(&self, of: impl Fn(&crate::measure::Measured) -> f64) -> Vec<f64> {
        self.records.iter().filter_map(|record| record.measured.as_ref()).map(of).collect()
    }

    /// The run whose time is the median: the one that pictures show.
    pub(crate) fn middle(&self) -> Option<&'a RunRecord> {
        let mut done: Vec<_> =
            self.records.iter().copied().filter(|record| record.measured.is_some()).collect();
        let time = |record: &RunRecord| record.measured.as_ref().map_or(0.0, |m| m.available);
        done.sort_by(|a, b| time(a).total_cmp(&time(b)));
        done.get(done.len().saturating_sub(1) / 2).copied()
    }

    /// Why the last run that failed did so.
    pub(crate) fn failed(&self) -> Option<&'a str> {
        let failed = self.records.iter().rev().find(|record| record.measured.is_none());
        failed.map(|record| record.failed.as_str())
    }
}

/// One image on one network with one number of containers: the rows that are compared.
#[derive(Clone, Debug)]
pub(crate) struct Group<'a> {
    /// Name of the image.
    pub(crate) image: &'a str,
    /// Name of the network.
    pub(crate) network: &'a str,
    /// Containers at once.
    pub(crate) count: u32,
    /// The rows, in the order of the table.
    pub(crate) rows: Vec<(&'a str, Row<'a>)>,
}

impl Group<'_> {
    /// Name of the group in names of files.
    pub(crate) fn file(&self) -> String {
        format!("{}-{}-{}", self.image, self.network, self.count)
    }

    /// What is compared, as a heading says it.
    pub(crate) fn heading(&self) -> String {
        match self.count {
            1 => format!("{} on {}", self.image, self.network),
            count => format!("{} on {}, {count} containers at once", self.image, self.network),
        }
    }
}

/// Records by what is compared, the images with most records of the published table first.
fn groups(records: &Records) -> Vec<Group<'_>> {
    let order: BTreeMap<&str, usize> =
        systems::all().iter().enumerate().map(|(number, row)| (row.name(), number)).collect();
    let mut cells: BTreeMap<&Cell, Vec<&RunRecord>> = BTreeMap::new();
    for record in records.all() {
        cells.entry(&record.cell).or_default().push(record);
    }
    let mut groups: Vec<Group<'_>> = Vec::new();
    for (cell, records) in cells {
        let same = |group: &Group<'_>| {
            (group.image, group.network, group.count) == (&cell.image, &cell.network, cell.count)
        };
        if !groups.last().is_some_and(same) {
            let Cell { image, network, count, .. } = cell;
            groups.push(Group { image, network, count: *count, rows: Vec::new() });
        }
        if let Some(group) = groups.last_mut() {
            group.rows.push((&cell.system, Row { records }));
        }
    }
    for group in &mut groups {
        group.rows.sort_by_key(|(system, _)| order.get(system).copied().unwrap_or(usize::MAX));
    }
    groups
}

/// Writes the report; its page.
pub(crate) fn write(
    place: &Place,
    records: &Records,
    arguments: &Arguments,
) -> Result<PathBuf, Failure> {
    let dir = place.folder(if arguments.image.is_some() { "report-yours" } else { "report" })?;
    let groups = groups(records);
    for group in &groups {
        let file = dir.join(format!("{}.svg", group.file()));
        fs::write(&file, chart::draw(group)).attempt(|| format!("write {}", file.display()))?;
        for (system, row) in &group.rows {
            let Some(measured) = row.middle().and_then(|record| record.measured.as_ref()) else {
                continue;
            };
            let file = dir.join(format!("{}-{system}-timeline.svg", group.file()));
            let title = format!("{}: {}", group.heading(), row.title());
            fs::write(&file, timeline::draw(&title, measured))
                .attempt(|| format!("write {}", file.display()))?;
        }
    }
    let raw: Vec<&RunRecord> = records.all().collect();
    let text = serde_json::to_string_pretty(&json!({ "runs": raw }))
        .attempt(|| "write the records as JSON".into())?;
    let file = dir.join("results.json");
    fs::write(&file, text).attempt(|| format!("write {}", file.display()))?;
    let page = table::page(&groups);
    let file = dir.join("RESULTS.md");
    for target in std::iter::once(&file).chain(&arguments.page) {
        fs::write(target, &page).attempt(|| format!("write {}", target.display()))?;
    }
    print!("{page}");
    Ok(file)
}
