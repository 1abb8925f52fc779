//! Named lines between host and registry.
//!
//! A request waits one round trip before the registry sees it; so does a new connection. All answers share the
//! bandwidth. A slow request waits ten round trips, as one that met a full queue or a cold object store. TCP's slow
//! start and losses are not part of it.

use std::time::{Duration, Instant};

/// How a line behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    /// Name on the command line and in tables.
    pub(crate) name: &'static str,
    /// Time from a request to the first byte of its answer, beside the registry's own.
    pub(crate) round_trip: Duration,
    /// Bytes a second of all answers together; none: as fast as it goes.
    pub(crate) bandwidth: Option<u64>,
    /// Of a thousand requests, those that take ten round trips.
    pub(crate) slow_per_mille: u32,
}

const fn line(name: &'static str, microseconds: u64, mbit: u64, slow_per_mille: u32) -> Shape {
    Shape {
        name,
        round_trip: Duration::from_micros(microseconds),
        bandwidth: Some(mbit * 1_000_000 / 8),
        slow_per_mille,
    }
}

/// All lines.
pub(crate) const SHAPES: [Shape; 5] = [
    Shape { name: "loopback", round_trip: Duration::ZERO, bandwidth: None, slow_per_mille: 0 },
    line("lan", 500, 1000, 0),
    line("cloud", 5_000, 1000, 10),
    line("far", 40_000, 100, 0),
    line("edge", 20_000, 25, 0),
];

/// Factor of the round trip of a slow request.
const SLOW: u32 = 10;

impl Shape {
    /// The line of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// What it is, for a heading.
    pub(crate) fn told(&self) -> String {
        let rate = self.bandwidth.map_or("as fast as loopback goes".into(), |bytes| {
            match bytes * 8 / 1_000_000 {
                mbit if mbit >= 1000 => format!("{} Gbit/s", mbit / 1000),
                mbit => format!("{mbit} Mbit/s"),
            }
        });
        let trip = self.round_trip.as_secs_f64() * 1e3;
        let slow = match self.slow_per_mille {
            0 => String::new(),
            share => format!(", {} % of requests at {SLOW} ×", f64::from(share) / 10.0),
        };
        format!("{rate}, {trip} ms a round trip{slow}")
    }

    /// Delay of request `number` of the run with this seed. The same numbers are slow for all systems of a round.
    pub(crate) fn delay(&self, number: u64, seed: u64) -> Duration {
        let slow = mix(number ^ (seed << 32)) % 1000 < u64::from(self.slow_per_mille);
        self.round_trip * if slow { SLOW } else { 1 }
    }
}

/// The finalizer of SplitMix64: every bit of the result depends on every bit of the input.
fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A line's bandwidth, as a timetable: each piece is sent when all before it have passed.
#[derive(Debug)]
pub(crate) struct Timetable {
    bandwidth: Option<u64>,
    free: Instant,
}

impl Timetable {
    /// An idle line.
    pub(crate) fn new(bandwidth: Option<u64>, now: Instant) -> Self {
        Self { bandwidth, free: now }
    }

    /// The moment at which a piece of `bytes` that is sent `now` has passed.
    pub(crate) fn passed(&mut self, bytes: usize, now: Instant) -> Instant {
        let Some(bandwidth) = self.bandwidth else { return now };
        self.free = self.free.max(now) + Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
        self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_pass_one_after_the_other_and_an_idle_line_saves_nothing_up() {
        let start = Instant::now();
        let mut line = Timetable::new(Some(1000), start);
        let second = Duration::from_secs(1);
        assert_eq!(line.passed(1000, start), start + second);
        assert_eq!(line.passed(1000, start), start + 2 * second);
        assert_eq!(line.passed(500, start + 10 * second), start + 10 * second + second / 2);
        assert_eq!(Timetable::new(None, start).passed(1 << 40, start), start);
    }

    #[test]
    fn about_one_request_of_a_hundred_is_slow_and_the_same_ones_for_all() {
        let cloud = Shape::named("cloud").unwrap();
        let slow = |seed| {
            let numbers = 0..10_000;
            numbers.filter(|&n| cloud.delay(n, seed) > cloud.round_trip).collect::<Vec<_>>()
        };
        assert!((60..140).contains(&slow(1).len()), "{}", slow(1).len());
        assert_eq!(slow(1), slow(1));
        assert_ne!(slow(1), slow(2));
        assert!((0..1000).all(|n| Shape::named("lan").unwrap().delay(n, 1).as_micros() == 500));
    }

    #[test]
    fn a_line_is_told_in_the_units_of_people() {
        let told = |name| Shape::named(name).unwrap().told();
        assert_eq!(told("lan"), "1 Gbit/s, 0.5 ms a round trip");
        assert_eq!(told("cloud"), "1 Gbit/s, 5 ms a round trip, 1 % of requests at 10 ×");
        assert_eq!(told("edge"), "25 Mbit/s, 20 ms a round trip");
    }
}
