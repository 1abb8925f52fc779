//! Many layers as one disk: merged once, then looked up by sector (spec lsmt 6).
//!
//! The merge makes one flat array of extents, ascending and without overlap. Each sector comes from the
//! topmost layer with a mapping for it. Runs that continue each other in the same file are joined: upstream's
//! index cuts them at 16383 sectors.
//!
//! A look-up is a binary search over the first sectors only (eight bytes each, so the upper levels of the
//! search stay in the cache), then a walk.

use super::layer::TagMeaning;
use super::{LsmtError, LsmtLayer, MAX_LAYERS};
use crate::units::{Bytes, SECTOR, Sectors};

/// Most entries of all layers together (upstream's limit for its merged index), so that a hostile image
/// cannot take all memory.
const MAX_ENTRIES: usize = 128_000_000;

/// Position of a run of disk sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunPlace {
    /// No layer maps the run, or the topmost mapping of it is zeroed.
    Zero,
    /// At this sector of the layer's own LSMT stream.
    Own(Sectors),
    /// At this sector of the uncompressed tar that the layer describes.
    Remote(Sectors),
}

impl RunPlace {
    /// The place that is `by` sectors further.
    fn advance(self, by: u64) -> Self {
        match self {
            RunPlace::Zero => RunPlace::Zero,
            RunPlace::Own(at) => RunPlace::Own(Sectors(at.0 + by)),
            RunPlace::Remote(at) => RunPlace::Remote(Sectors(at.0 + by)),
        }
    }
}

/// A run of disk sectors from one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First disk sector.
    pub lba: Sectors,
    /// Number of sectors, never 0.
    pub len: Sectors,
    /// The layer, 0 lowest.
    pub layer: u8,
    /// Position of the run.
    pub place: RunPlace,
}

impl Extent {
    /// One past the last disk sector.
    #[must_use]
    pub const fn end(&self) -> Sectors {
        Sectors(self.lba.0 + self.len.0)
    }

    /// The part inside `from..to`, which must overlap it.
    fn clip(&self, from: u64, to: u64) -> Self {
        let start = self.lba.0.max(from);
        let end = self.end().0.min(to);
        Self {
            lba: Sectors(start),
            len: Sectors(end - start),
            layer: self.layer,
            place: self.place.advance(start - self.lba.0),
        }
    }
}

/// Part of a looked-up range. Unlike an [`Extent`], it can be a hole that no layer maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackRun {
    /// First disk sector.
    pub lba: Sectors,
    /// Number of sectors, never 0.
    pub len: Sectors,
    /// The layer that it comes from, 0 lowest; 0 for a hole.
    pub layer: u8,
    /// Position of the run.
    pub place: RunPlace,
}

/// An extent without its first sector.
#[derive(Clone, Copy)]
struct ExtentBody {
    at: u64,
    len: u32,
    layer: u8,
    file: u8,
}

const ZERO: u8 = 0;
const OWN: u8 = 1;
const REMOTE: u8 = 2;

/// The merged index of all layers.
pub struct Stack {
    starts: Vec<u64>,
    bodies: Vec<ExtentBody>,
    virtual_size: Bytes,
}

impl Stack {
    /// Merges layers, the lowest first.
    ///
    /// The size of the disk is that of the topmost layer with a size; a remainder below a whole sector is
    /// dropped.
    ///
    /// # Errors
    /// [`LsmtError::Stack`] for no layer, for more than 255, or if no layer has a size.
    pub fn merge(layers: &[&LsmtLayer]) -> Result<Self, LsmtError> {
        let refuse = |rule| Err(LsmtError::Stack { layers: layers.len(), rule });
        if layers.is_empty() {
            return refuse("an image has at least one layer");
        }
        if layers.len() > MAX_LAYERS {
            return refuse("an image has at most 255 layers");
        }
        let Some(size) =
            layers.iter().rev().map(|layer| layer.virtual_size().0).find(|&size| size > 0)
        else {
            return refuse("none of them has the size of the disk");
        };
        if layers.iter().map(|layer| layer.mappings().len()).sum::<usize>() > MAX_ENTRIES {
            return refuse("together they have more than 128000000 index entries");
        }
        let extents = merge_from(layers, 0);
        let mut stack = Self {
            starts: Vec::with_capacity(extents.len()),
            bodies: Vec::with_capacity(extents.len()),
            virtual_size: Bytes(size / SECTOR * SECTOR),
        };
        for extent in extents {
            stack.push(extent);
        }
        Ok(stack)
    }

    /// Size of the disk, a multiple of 512.
    #[must_use]
    pub fn virtual_size(&self) -> Bytes {
        self.virtual_size
    }

    /// Number of extents after merging and joining.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// True if no layer maps any sector.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// All extents in ascending order, including zeroed ones; some can lie past the end of the disk.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        (0..self.starts.len()).map(|number| self.extent(number))
    }

    /// The runs of `count` sectors from `lba` on, including holes, without a gap.
    #[must_use]
    pub fn look_up(&self, lba: Sectors, count: Sectors) -> LookUp<'_> {
        let after = self.starts.partition_point(|&start| start <= lba.0);
        LookUp {
            stack: self,
            next: after.saturating_sub(1),
            at: lba.0,
            end: lba.0.saturating_add(count.0),
        }
    }

    fn extent(&self, number: usize) -> Extent {
        let body = self.bodies[number];
        let at = Sectors(body.at);
        Extent {
            lba: Sectors(self.starts[number]),
            len: Sectors(u64::from(body.len)),
            layer: body.layer,
            place: match body.file {
                ZERO => RunPlace::Zero,
                OWN => RunPlace::Own(at),
                _ => RunPlace::Remote(at),
            },
        }
    }

    /// Appends an extent, or lengthens the last one if this one continues it.
    fn push(&mut self, extent: Extent) {
        let (file, at) = match extent.place {
            RunPlace::Zero => (ZERO, 0),
            RunPlace::Own(at) => (OWN, at.0),
            RunPlace::Remote(at) => (REMOTE, at.0),
        };
        if let (Some(&start), Some(last)) = (self.starts.last(), self.bodies.last_mut()) {
            let len = u64::from(last.len);
            let continues = start + len == extent.lba.0
                && last.layer == extent.layer
                && last.file == file
                && (file == ZERO || last.at + len == at);
            if let (true, Ok(len)) = (continues, u32::try_from(len + extent.len.0)) {
                last.len = len;
                return;
            }
        }
        self.starts.push(extent.lba.0);
        // A single extent comes from one index entry: at most 16383 sectors.
        self.bodies.push(ExtentBody { at, len: extent.len.0 as u32, layer: extent.layer, file });
    }
}

/// The merged extents of `layers`; the lowest layer has number `first`. Merges by halves, so that each
/// mapping is copied log(layers) times.
fn merge_from(layers: &[&LsmtLayer], first: u8) -> Vec<Extent> {
    match layers {
        [] => Vec::new(),
        [layer] => extents_of(layer, first).collect(),
        _ => {
            let half = layers.len() / 2;
            let (lower, upper) = layers.split_at(half);
            // `half` is below 255, like the number of layers.
            lay_over(&merge_from(upper, first + half as u8), &merge_from(lower, first))
        }
    }
}

fn extents_of<'a>(layer: &'a LsmtLayer, number: u8) -> impl Iterator<Item = Extent> + 'a {
    layer.mappings().iter().map(move |mapping| Extent {
        lba: mapping.lba,
        len: Sectors(u64::from(mapping.len)),
        layer: number,
        place: match (mapping.zeroed, layer.kind(), mapping.tag) {
            (true, ..) => RunPlace::Zero,
            (_, TagMeaning::Warp, 1) => RunPlace::Remote(mapping.moffset),
            _ => RunPlace::Own(mapping.moffset),
        },
    })
}

/// All extents of `upper`, and the parts of `lower` that `upper` does not cover.
fn lay_over(upper: &[Extent], lower: &[Extent]) -> Vec<Extent> {
    let mut merged = Vec::with_capacity(upper.len() + lower.len());
    let mut below = lower.iter().copied().peekable();
    // Everything before `free` is decided.
    let mut free = 0;
    for over in upper {
        fill_gap(&mut merged, &mut below, free, over.lba.0);
        merged.push(*over);
        free = over.end().0;
    }
    fill_gap(&mut merged, &mut below, free, u64::MAX);
    merged
}

/// Moves the parts of `below` inside `from..to` to `merged`; extents that end at or before `to` are removed.
fn fill_gap(
    merged: &mut Vec<Extent>,
    below: &mut std::iter::Peekable<impl Iterator<Item = Extent>>,
    from: u64,
    to: u64,
) {
    while let Some(&next) = below.peek() {
        if next.lba.0 >= to {
            return;
        }
        if next.end().0 > from && from < to {
            merged.push(next.clip(from, to));
        }
        if next.end().0 > to {
            return;
        }
        below.next();
    }
}

/// Iterator of [`Stack::look_up`].
pub struct LookUp<'a> {
    stack: &'a Stack,
    next: usize,
    at: u64,
    end: u64,
}

impl Iterator for LookUp<'_> {
    type Item = StackRun;

    fn next(&mut self) -> Option<StackRun> {
        if self.at >= self.end {
            return None;
        }
        let starts = &self.stack.starts;
        // The search can find an extent that ends before the range.
        while self.next < starts.len() && self.stack.extent(self.next).end().0 <= self.at {
            self.next += 1;
        }
        let from = self.at;
        if let Some(&start) = starts.get(self.next).filter(|&&start| start < self.end) {
            if start <= from {
                let part = self.stack.extent(self.next).clip(from, self.end);
                self.at = part.end().0;
                return Some(StackRun {
                    lba: part.lba,
                    len: part.len,
                    layer: part.layer,
                    place: part.place,
                });
            }
            self.at = start;
        } else {
            self.at = self.end;
        }
        Some(StackRun {
            lba: Sectors(from),
            len: Sectors(self.at - from),
            layer: 0,
            place: RunPlace::Zero,
        })
    }
}
