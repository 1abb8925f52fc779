//! Turns between devices.
//!
//! Fetch and decode threads are shared by all devices. One queue in the order of the requests would serve a device with a
//! thousand waiting reads a thousand times before another's single one. So each device has a *line* of its own, and the
//! lines take turns by cost, in bytes (start-time fair queueing): a line's turn comes later by what it was served, and
//! the line with the earliest turn is served next. A line that was empty begins at the present turn: rest is not saved up.
//!
//! Turns are not enough, because work that was begun is not interrupted: with all threads busy for one device, another's
//! read waits for the end of a long piece. So [`Shares`] bounds the threads that one device has while several are active.
//! Of the fetch threads, which wait for a network and not for a core, some stay free at any time for a device that has
//! none.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// A device, for the turns: all work without one is one more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow(pub u32);

/// Number of lines above which those without work are forgotten.
const MANY_LINES: usize = 64;

/// Time that a device counts as active after its last work: a reader asks for the next piece when it has got one.
const ACTIVE: Duration = Duration::from_secs(1);

/// Work of several devices, in lines.
#[derive(Debug)]
pub(super) struct Lines<T> {
    lines: Vec<DeviceLine<T>>,
    /// The turn of the line that was served last.
    now: u64,
    len: usize,
}

#[derive(Debug)]
struct DeviceLine<T> {
    flow: Flow,
    turn: u64,
    items: VecDeque<T>,
}

impl<T> Default for Lines<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), now: 0, len: 0 }
    }
}

impl<T> Lines<T> {
    /// Number of items.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds an item at the end of its line.
    pub(super) fn push(&mut self, flow: Flow, item: T) {
        let now = self.now;
        self.len += 1;
        if let Some(line) = self.lines.iter_mut().find(|line| line.flow == flow) {
            if line.items.is_empty() {
                line.turn = line.turn.max(now);
            }
            line.items.push_back(item);
            return;
        }
        if self.lines.len() >= MANY_LINES {
            self.lines.retain(|line| !line.items.is_empty() || line.turn > now);
        }
        self.lines.push(DeviceLine { flow, turn: now, items: VecDeque::from([item]) });
    }

    /// Takes the first item of the line with the earliest turn; only lines whose first item `may` be taken.
    pub(super) fn pop(&mut self, may: &mut dyn FnMut(Flow, &T) -> bool) -> Option<(Flow, T)> {
        let turn = |(at, line): (usize, &DeviceLine<T>)| {
            line.items.front().filter(|item| may(line.flow, item)).map(|_| (line.turn, at))
        };
        let (_, at) = self.lines.iter().enumerate().filter_map(turn).min()?;
        let line = self.lines.get_mut(at)?;
        let item = line.items.pop_front()?;
        self.now = self.now.max(line.turn);
        self.len -= 1;
        Some((line.flow, item))
    }

    /// Counts the cost of what a line was given.
    pub(super) fn charge(&mut self, flow: Flow, cost: u64) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.flow == flow) {
            line.turn = line.turn.saturating_add(cost);
        }
    }

    /// Takes the first item that `is` true of, with its line.
    pub(super) fn remove(&mut self, is: &dyn Fn(&T) -> bool) -> Option<T> {
        for line in &mut self.lines {
            if let Some(item) = line.items.iter().position(is).and_then(|at| line.items.remove(at))
            {
                self.len -= 1;
                return Some(item);
            }
        }
        None
    }

    /// Moves an item that another device waits for too into that device's line, if it is served sooner there.
    pub(super) fn hasten(&mut self, flow: Flow, is: &dyn Fn(&T) -> bool) {
        let own =
            self.lines.iter().find(|line| line.flow == flow).map_or(0, |line| line.items.len());
        let later = self.lines.iter_mut().filter(|line| line.flow != flow).find_map(|line| {
            let at = line.items.iter().position(is)?;
            (at > own).then(|| line.items.remove(at)).flatten()
        });
        if let Some(item) = later {
            self.len -= 1;
            self.push(flow, item);
        }
    }

    /// All items, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.lines.iter().flat_map(|line| &line.items)
    }

    /// Takes all items.
    pub(super) fn drain(&mut self) -> Vec<T> {
        self.len = 0;
        self.lines.drain(..).flat_map(|line| line.items).collect()
    }
}

/// The threads that devices have at present.
#[derive(Debug, Default)]
pub(super) struct Shares {
    flows: HashMap<Flow, Share>,
    /// Pieces of work under way.
    total: usize,
    /// Their bytes.
    bytes: u64,
}

#[derive(Debug)]
struct Share {
    /// Pieces of work under way.
    count: usize,
    bytes: u64,
    /// End of the last one.
    last: Instant,
}

/// Bounds of [`Shares`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Number of threads.
    pub(super) threads: usize,
    /// Those of them that are for devices without one.
    pub(super) reserved: usize,
    /// Part of the threads that each device gets while several are active: one in so many, beside the number of active
    /// devices.
    pub(super) divisor: usize,
    /// Least threads of a device while several are active.
    pub(super) least: usize,
    /// Bytes under way.
    pub(super) bytes: u64,
}

impl Shares {
    /// Number of devices with work now, or a moment ago; others with waiting work are counted by the caller's reading of
    /// their lines when they begin.
    pub(super) fn active(&self) -> usize {
        let now = Instant::now();
        let is_active = |share: &&Share| share.count > 0 || now - share.last < ACTIVE;
        self.flows.values().filter(is_active).count()
    }

    /// True if a device may begin one more piece of `bytes`. `active` is [`active`](Self::active), taken once for many
    /// questions.
    pub(super) fn may_begin(&self, flow: Flow, bytes: u64, active: usize, bounds: Bounds) -> bool {
        if self.total == 0 {
            return true;
        }
        if self.bytes.saturating_add(bytes) > bounds.bytes {
            return false;
        }
        let Some(share) = self.flows.get(&flow).filter(|share| share.count > 0) else {
            return true;
        };
        // Bytes wait in memory: one device must leave room for others.
        if share.bytes.saturating_add(bytes) > bounds.bytes / 2 {
            return false;
        }
        let shared = bounds.threads.saturating_sub(bounds.reserved);
        let most = match active {
            0 | 1 => shared,
            active => (bounds.threads / (bounds.divisor * active)).max(bounds.least),
        };
        share.count < most && self.total < shared
    }

    /// Notes that a device begins a piece of work.
    pub(super) fn begin(&mut self, flow: Flow, bytes: u64) {
        let now = Instant::now();
        if self.flows.len() >= MANY_LINES {
            self.flows.retain(|_, share| share.count > 0 || now - share.last < ACTIVE);
        }
        let share = self.flows.entry(flow).or_insert(Share { count: 0, bytes: 0, last: now });
        share.count += 1;
        share.bytes += bytes;
        self.total += 1;
        self.bytes += bytes;
    }

    /// Notes that a piece of work has ended.
    pub(super) fn end(&mut self, flow: Flow, bytes: u64) {
        if let Some(share) = self.flows.get_mut(&flow) {
            share.count = share.count.saturating_sub(1);
            share.bytes = share.bytes.saturating_sub(bytes);
            share.last = Instant::now();
        }
        self.total = self.total.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(lines: &mut Lines<u32>, cost: u64) -> Vec<u32> {
        std::iter::from_fn(|| {
            let (flow, item) = lines.pop(&mut |_, _| true)?;
            lines.charge(flow, cost);
            Some(item)
        })
        .collect()
    }

    #[test]
    fn a_device_with_one_request_waits_for_one_of_another_with_a_thousand() {
        let mut lines = Lines::default();
        (0..1000).for_each(|item| lines.push(Flow(1), item));
        for _ in 0..10 {
            let (flow, _) = lines.pop(&mut |_, _| true).unwrap();
            lines.charge(flow, 1 << 20);
        }
        lines.push(Flow(2), 5000);
        let place = order(&mut lines, 1 << 20).iter().position(|&item| item == 5000).unwrap();
        assert!(place <= 1, "{place}");
    }

    #[test]
    fn turns_are_by_cost_and_rest_is_not_saved_up() {
        let mut lines = Lines::default();
        let serve = |lines: &mut Lines<u32>, rounds: usize| {
            let mut served = [0u64; 3];
            for _ in 0..rounds {
                let (flow, cost) = lines.pop(&mut |_, _| true).unwrap();
                lines.charge(flow, u64::from(cost));
                lines.push(flow, cost);
                served[flow.0 as usize] += u64::from(cost);
            }
            served
        };
        lines.push(Flow(1), 32);
        serve(&mut lines, 100);
        lines.push(Flow(2), 1);
        let served = serve(&mut lines, 330);
        assert!(served[1].abs_diff(served[2]) <= 64, "{served:?}");
    }

    #[test]
    fn what_another_device_waits_for_too_comes_with_its_turn() {
        let mut lines = Lines::default();
        (0..100).for_each(|item| lines.push(Flow(1), item));
        lines.hasten(Flow(2), &|&item| item == 99);
        lines.hasten(Flow(2), &|&item| item == 500);
        assert_eq!(lines.len(), 100);
        let place = order(&mut lines, 1).iter().position(|&item| item == 99).unwrap();
        assert!(place <= 1, "{place}");
    }

    #[test]
    fn a_device_never_has_all_threads_and_beside_others_only_its_part() {
        let bounds = Bounds { threads: 24, reserved: 6, divisor: 3, least: 2, bytes: 1000 };
        let mut shares = Shares::default();
        let take = |shares: &mut Shares, flow: Flow, bytes| {
            let mut count = 0;
            while shares.may_begin(flow, bytes, shares.active(), bounds) {
                shares.begin(flow, bytes);
                count += 1;
            }
            count
        };
        assert_eq!(take(&mut shares, Flow(1), 1), 18);
        assert_eq!(take(&mut shares, Flow(2), 1), 1, "there is always one for another");
        (0..18).for_each(|_| shares.end(Flow(1), 1));
        assert_eq!(take(&mut shares, Flow(1), 1), 4);
        assert_eq!(take(&mut shares, Flow(2), 1), 3);
    }

    #[test]
    fn bytes_under_way_are_bounded_and_one_piece_always_may() {
        let bounds = Bounds { threads: 8, reserved: 0, divisor: 1, least: 1, bytes: 100 };
        let mut shares = Shares::default();
        assert!(shares.may_begin(Flow(1), 10_000, 0, bounds));
        shares.begin(Flow(1), 60);
        assert!(!shares.may_begin(Flow(1), 10, 1, bounds), "half is for others");
        assert!(shares.may_begin(Flow(2), 40, 1, bounds));
        assert!(!shares.may_begin(Flow(2), 41, 1, bounds));
    }
}
