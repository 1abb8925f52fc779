//! Bars of phases: one row a bar, the median run's phases one behind the other, the time at its end.

use super::Group;
use super::statistics::middle;
use super::svg::{Anchor, Picture, step};

/// Phases and their colours, chosen to differ for the colour-blind too (Okabe and Ito).
const COLOURS: [(&str, &str, &str); 7] = [
    ("pull", "#56b4e9", "pull: resolve, download, unpack"),
    ("open", "#0072b2", "open: resolve, meta image"),
    ("device", "#009e73", "attach the device"),
    ("mount", "#f0e442", "mount"),
    ("overlay", "#cc79a7", "overlay"),
    ("container", "#e69f00", "container start"),
    ("answer", "#d55e00", "to the first answer"),
];

/// Colour of a phase that has none of its own.
const OTHER: &str = "#999999";

const WIDTH: f64 = 900.0;
/// Where the bars begin: titles stand before it.
const LEFT: f64 = 300.0;
/// Where the longest bar ends: its time stands behind it.
const RIGHT: f64 = 760.0;
const TOP: f64 = 64.0;
const BAR: f64 = 20.0;
const GAP: f64 = 10.0;

/// The picture of a group.
pub(super) fn draw(group: &Group<'_>) -> String {
    let rows: Vec<_> = group
        .rows
        .iter()
        .filter_map(|(_, row)| {
            let measured = row.middle()?.measured.as_ref()?;
            Some((row.title(), measured, middle(row.values(|m| m.available))?))
        })
        .collect();
    let longest = rows.iter().map(|(_, _, time)| time.high).fold(0.0, f64::max).max(1e-3);
    let height = TOP + rows.len() as f64 * (BAR + GAP) + 74.0;
    let bottom = TOP + rows.len() as f64 * (BAR + GAP);
    let at = |seconds: f64| LEFT + seconds / longest * (RIGHT - LEFT);
    let mut picture = Picture::new(WIDTH, height);
    picture.text(
        16.0,
        26.0,
        17.0,
        Anchor::Start,
        &format!("Service-available time: {}", group.heading()),
    );
    picture.text(
        16.0,
        46.0,
        12.0,
        Anchor::Start,
        "seconds, phases of the median run; the thin line is the lowest to the highest run",
    );
    let step = step(longest);
    let mut tick = 0.0;
    while tick <= longest * 1.0001 {
        picture.line((at(tick), TOP - 6.0), (at(tick), bottom), "#dddddd");
        picture.text(at(tick), bottom + 14.0, 11.0, Anchor::Middle, &number(tick, step));
        tick += step;
    }
    for (number, (title, measured, time)) in rows.iter().enumerate() {
        let y = TOP + number as f64 * (BAR + GAP);
        picture.text(LEFT - 8.0, y + 14.0, 12.0, Anchor::End, title);
        // With several containers the phases are container 0's; the rest is the others'.
        let told: f64 = measured.phases.iter().map(|(_, seconds)| seconds).sum();
        let rest = ("other containers".to_owned(), (measured.available - told).max(0.0));
        let mut from = 0.0;
        for (name, seconds) in measured.phases.iter().chain([&rest]) {
            let fill =
                COLOURS.iter().find(|(known, _, _)| known == name).map_or(OTHER, |found| found.1);
            let tip = format!("{name}: {seconds:.3} s");
            picture.rectangle(at(from), y, at(from + seconds) - at(from), BAR, fill, &tip);
            from += seconds;
        }
        let middle = y + BAR / 2.0;
        picture.line((at(time.low), middle), (at(time.high), middle), "#222222");
        let end = at(from.max(time.high)) + 6.0;
        picture.text(end, y + 14.0, 12.0, Anchor::Start, &format!("{:.2} s", time.median));
    }
    // Only phases that occur are explained.
    let occurs = |name: &str| {
        rows.iter().any(|(_, measured, _)| measured.phases.iter().any(|(known, _)| known == name))
    };
    let mut x = 16.0;
    let mut y = bottom + 36.0;
    for (_, fill, text) in COLOURS.iter().filter(|(name, _, _)| occurs(name)) {
        let width = 24.0 + text.len() as f64 * 7.4;
        if x + width > WIDTH {
            x = 16.0;
            y += 18.0;
        }
        picture.rectangle(x, y - 10.0, 12.0, 12.0, fill, "");
        picture.text(x + 17.0, y, 12.0, Anchor::Start, text);
        x += width;
    }
    picture.finish()
}

/// A number of the axis, with as many digits as its step has.
fn number(value: f64, step: f64) -> String {
    match step {
        step if step >= 1.0 => format!("{value:.0}"),
        step if step >= 0.1 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::sample;
    use crate::report::Row;

    #[test]
    fn each_row_that_was_measured_has_its_bar_and_its_time() {
        let runs = [sample("overlayfs", 0, Some(4.0)), sample("nydus-zran", 0, None)];
        let rows = vec![
            ("overlayfs", Row { records: vec![&runs[0]] }),
            ("nydus-zran", Row { records: vec![&runs[1]] }),
        ];
        let drawn = draw(&Group { image: "web", network: "cloud", count: 1, rows });
        assert!(drawn.contains("title of overlayfs") && drawn.contains("4.00 s"));
        assert!(!drawn.contains("title of nydus-zran"));
        assert!(drawn.contains("<title>pull: 3.000 s</title>"));
        assert!(drawn.starts_with("<svg ") && drawn.ends_with("</svg>\n"));
    }

    #[test]
    fn a_group_without_a_run_is_drawn_empty() {
        let drawn = draw(&Group { image: "web", network: "cloud", count: 1, rows: Vec::new() });
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
    }
}
