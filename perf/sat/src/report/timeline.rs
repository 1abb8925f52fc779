//! One run over its time: bytes that came over the line, and each answer as a bar from its request to its end.

use super::svg::{Anchor, Picture, step};
use crate::measure::Measured;

const WIDTH: f64 = 900.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 880.0;
const TOP: f64 = 56.0;
/// Height of the curve of bytes.
const CURVE: f64 = 200.0;
/// Height of the answers: one line each, up to this.
const ANSWERS: f64 = 240.0;
/// Colours of the phases' background, in turns.
const BANDS: [&str; 2] = ["#f3f6fa", "#e4ebf3"];

/// The picture of a run.
pub(super) fn draw(title: &str, measured: &Measured) -> String {
    let span = measured.available.max(1e-3) * 1e3;
    let at = |milliseconds: f64| LEFT + (milliseconds / span).clamp(0.0, 1.0) * (RIGHT - LEFT);
    let bottom = TOP + CURVE + 12.0 + ANSWERS;
    let mut picture = Picture::new(WIDTH, bottom + 44.0);
    picture.text(16.0, 22.0, 15.0, Anchor::Start, title);
    let mut from = 0.0;
    let mut band = 0;
    for (name, seconds) in &measured.phases {
        let to = from + seconds * 1e3;
        picture.rectangle(
            at(from),
            TOP,
            at(to) - at(from),
            bottom - TOP,
            BANDS[band % 2],
            &format!("{name}: {seconds:.3} s"),
        );
        // A phase that is too short for its name has none.
        if at(to) - at(from) > name.len() as f64 * 7.0 {
            picture.text(f64::midpoint(at(from), at(to)), TOP - 6.0, 11.0, Anchor::Middle, name);
        }
        // Phases that are too short to be seen change no colour.
        band += usize::from(at(to) - at(from) > 1.0);
        from = to;
    }
    let mut answers = measured.answers.clone();
    answers.sort_by(|a, b| a.asked.total_cmp(&b.asked));
    let all = answers.iter().map(|answer| answer.bytes).sum::<u64>().max(measured.wire_bytes).max(1)
        as f64;
    let high = |bytes: f64| TOP + CURVE - bytes / all * CURVE;
    let marks = step(all / 1e6);
    let mut mark = 0.0;
    while mark * 1e6 <= all {
        picture.line((LEFT, high(mark * 1e6)), (RIGHT, high(mark * 1e6)), "#cccccc");
        picture.text(LEFT - 6.0, high(mark * 1e6) + 4.0, 11.0, Anchor::End, &format!("{mark} MB"));
        mark += marks;
    }
    // Within an answer its bytes are taken to come evenly.
    let mut moments: Vec<f64> =
        answers.iter().flat_map(|answer| [answer.asked, answer.ended]).collect();
    moments.extend([0.0, span]);
    moments.sort_by(f64::total_cmp);
    let come = |moment: f64| -> f64 {
        let of = |answer: &crate::network::proxy::Answer| {
            let share = (moment - answer.asked) / (answer.ended - answer.asked).max(1e-6);
            share.clamp(0.0, 1.0) * answer.bytes as f64
        };
        answers.iter().map(of).sum()
    };
    let points: Vec<_> = moments.iter().map(|&moment| (at(moment), high(come(moment)))).collect();
    picture.curve(&points, "#0072b2");
    let first = TOP + CURVE + 12.0;
    let each = (ANSWERS / answers.len().max(1) as f64).min(8.0);
    for (number, answer) in answers.iter().enumerate() {
        let y = first + number as f64 * each;
        let fill = if answer.kind == "blob" { "#d55e00" } else { "#009e73" };
        let tip = format!(
            "{} {} {:.1} KB, {:.1} to {:.1} ms",
            answer.kind,
            answer.range,
            answer.bytes as f64 / 1e3,
            answer.asked,
            answer.ended
        );
        picture.rectangle(
            at(answer.asked),
            y,
            (at(answer.ended) - at(answer.asked)).max(1.0),
            (each * 0.8).max(0.5),
            fill,
            &tip,
        );
    }
    let marks = step(span / 1e3);
    let mut mark = 0.0;
    while mark <= span / 1e3 * 1.0001 {
        picture.text(at(mark * 1e3), bottom + 16.0, 11.0, Anchor::Middle, &format!("{mark:.2} s"));
        mark += marks;
    }
    let legend = format!(
        "above: {:.1} MB that came; below: {} answers from request to end, blobs orange, other green",
        measured.wire_bytes as f64 / 1e6,
        answers.len()
    );
    picture.text(LEFT, bottom + 36.0, 12.0, Anchor::Start, &legend);
    picture.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::proxy::Answer;

    #[test]
    fn each_answer_has_its_bar() {
        let answer = |kind: &str, asked: f64, ended: f64| Answer {
            asked,
            ended,
            bytes: 1_000_000,
            kind: kind.into(),
            range: "bytes=0-9".into(),
        };
        let measured = Measured {
            available: 2.0,
            phases: vec![("pull".into(), 1.5), ("answer".into(), 0.5)],
            wire_bytes: 2_000_000,
            answers: vec![answer("manifest", 0.0, 10.0), answer("blob", 20.0, 900.0)],
            ..Measured::default()
        };
        let drawn = draw("t", &measured);
        assert_eq!(drawn.matches("bytes=0-9").count(), 2);
        assert!(drawn.contains("2.0 MB that came; below: 2 answers"));
        let empty = draw("t", &Measured::default());
        assert!(!empty.contains("NaN") && !empty.contains("inf"), "{empty}");
    }
}
