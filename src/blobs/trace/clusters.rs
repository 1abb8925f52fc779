//! Chunks of a trace that are fetched by one request.
//!
//! Each request costs a round trip, each byte its time on the line. So chunks of a trace that lie near each
//! other in a blob make a *cluster*: one range, including the chunks between them. The shortest gaps are
//! bridged first, as long as all bridges together stay a small part of the bytes that the trace lists. A
//! cluster is no longer than one request, and takes the place of its earliest chunk in the order.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::fetch::{Blob, Key, MOST_BYTES};

/// Limit on the encoded bytes of a gap that is bridged, 1 MiB: 8 ms at a gigabit, the time of a request to a
/// registry nearby.
const WIDEST: u64 = 1 << 20;

/// Divisor of the listed bytes for the bytes of bridges. With a sixth, a start of a large framework makes 0.2
/// requests for each chunk that it touches; without bridges, 0.5.
const SPENT: u64 = 6;

/// Chunks of one blob that are fetched together.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) blob: Arc<Blob>,
    pub(crate) chunks: Range<u32>,
    /// Number of chunks that the trace lists; the others are bridges.
    pub(crate) listed: u32,
    /// Place of its earliest chunk in the order.
    place: usize,
}

impl Cluster {
    /// Bytes of the cache that its chunks take.
    pub(crate) fn room(&self) -> u64 {
        self.chunks.clone().map(|chunk| self.blob.source().room(chunk) as u64).sum()
    }
}

/// The clusters of `order`, which names no chunk twice, in the order of their earliest chunks.
pub(crate) fn clusters(order: &[(&Arc<Blob>, u32)]) -> Vec<Cluster> {
    let mut by_blob: HashMap<Key, Vec<Listed<'_>>> = HashMap::new();
    for (place, &(blob, chunk)) in order.iter().enumerate() {
        let listed = Listed { blob, chunk, place, bytes: encoded(blob, chunk), joined: false };
        by_blob.entry(blob.key(0)).or_default().push(listed);
    }
    let mut blobs: Vec<Vec<Listed<'_>>> = by_blob.into_values().collect();
    blobs.sort_unstable_by_key(|listed| listed.iter().map(|listed| listed.place).min());
    for listed in &mut blobs {
        listed.sort_unstable_by_key(|listed| listed.chunk);
    }
    bridge(&mut blobs);
    let mut clusters: Vec<Cluster> =
        blobs.iter().flat_map(|listed| clusters_of_one(listed)).collect();
    clusters.sort_unstable_by_key(|cluster| cluster.place);
    clusters
}

/// A chunk of the trace.
struct Listed<'b> {
    blob: &'b Arc<Blob>,
    chunk: u32,
    place: usize,
    /// Encoded bytes.
    bytes: u64,
    /// True if it may join the chunk before.
    joined: bool,
}

/// Encoded bytes of a chunk; more than any bound for one that cannot be located.
fn encoded(blob: &Blob, chunk: u32) -> u64 {
    blob.source().encoded(chunk).map_or(u64::MAX, |place| place.len() as u64)
}

/// Encoded bytes between a chunk and a later one; `None` for more than may be bridged at all.
fn gap(before: &Listed<'_>, after: &Listed<'_>) -> Option<u64> {
    // A near chunk costs no request.
    if before.blob.source().blob().is_local() && after.chunk > before.chunk + 1 {
        return None;
    }
    let mut bytes = 0u64;
    for chunk in before.chunk + 1..after.chunk {
        bytes = bytes.saturating_add(encoded(before.blob, chunk));
        if bytes > WIDEST {
            return None;
        }
    }
    Some(bytes)
}

/// Joins chunks to those before them in their blobs, over the shortest gaps first.
fn bridge(blobs: &mut [Vec<Listed<'_>>]) {
    let listed = blobs.iter().flatten().map(|listed| listed.bytes).fold(0, u64::saturating_add);
    let mut gaps = Vec::new();
    for (number, listed) in blobs.iter().enumerate() {
        let between = listed.windows(2).zip(1..);
        gaps.extend(between.filter_map(|(pair, at)| Some((gap(&pair[0], &pair[1])?, number, at))));
    }
    gaps.sort_unstable();
    let mut left = listed / SPENT;
    for (bytes, number, at) in gaps {
        if bytes > left {
            break;
        }
        left -= bytes;
        blobs[number][at].joined = true;
    }
}

/// Clusters of the chunks of one blob, which ascend.
fn clusters_of_one(listed: &[Listed<'_>]) -> Vec<Cluster> {
    let mut clusters: Vec<Cluster> = Vec::new();
    let mut bytes = 0u64;
    for (number, next) in listed.iter().enumerate() {
        let bridge = if next.joined { gap(&listed[number - 1], next) } else { None };
        let longer = bridge.map(|gap| bytes.saturating_add(gap).saturating_add(next.bytes));
        match (clusters.last_mut(), longer.filter(|&longer| longer <= MOST_BYTES)) {
            (Some(cluster), Some(longer)) => {
                cluster.chunks.end = next.chunk + 1;
                cluster.listed += 1;
                cluster.place = cluster.place.min(next.place);
                bytes = longer;
            }
            _ => {
                clusters.push(Cluster {
                    blob: next.blob.clone(),
                    chunks: next.chunk..next.chunk + 1,
                    listed: 1,
                    place: next.place,
                });
                bytes = next.bytes;
            }
        }
    }
    clusters
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cache::Cache;
    use source::chunk::PlainChunks;
    use source::{ByteSource, SourceError};

    const CHUNK: u64 = PlainChunks::CHUNK;
    const COUNT: u32 = 400;

    /// A remote blob that is never read.
    struct UnreadBlob(&'static str);

    impl ByteSource for UnreadBlob {
        fn name(&self) -> &str {
            self.0
        }
        fn len(&self) -> u64 {
            u64::from(COUNT) * CHUNK
        }
        fn is_local(&self) -> bool {
            false
        }
        fn read_exact_at(&self, _: &mut [u8], _: u64) -> Result<(), SourceError> {
            unreachable!("nothing is read")
        }
    }

    fn blob(cache: &Arc<Cache>, name: &'static str) -> Arc<Blob> {
        cache.open(Arc::new(PlainChunks::new(name, Arc::new(UnreadBlob(name)))))
    }

    fn of(blob: &Arc<Blob>, chunks: &[u32]) -> Vec<(Range<u32>, u32)> {
        let order: Vec<_> = chunks.iter().map(|&chunk| (blob, chunk)).collect();
        clusters(&order).into_iter().map(|cluster| (cluster.chunks, cluster.listed)).collect()
    }

    #[test]
    fn neighbours_come_together_in_the_place_of_the_earliest() {
        let blob = blob(&Cache::new(1 << 20, 1), "a");
        assert_eq!(
            of(&blob, &[70, 12, 71, 10, 11, 300]),
            [(70..72, 2), (10..13, 3), (300..301, 1)]
        );
    }

    #[test]
    fn the_shortest_gaps_are_bridged_and_only_as_many_as_may_be() {
        let blob = blob(&Cache::new(1 << 20, 1), "a");
        // Twelve are listed: two may be spent, on the gaps of one and not on that of three.
        let listed = [0, 2, 10, 14, 30, 32, 50, 52, 60, 100, 120, 140];
        let bridged: u32 = of(&blob, &listed).iter().map(|(c, n)| c.len() as u32 - n).sum();
        assert_eq!(bridged, 2);
        assert!(of(&blob, &listed).contains(&(10..11, 1)));
    }

    proptest! {
        #[test]
        fn every_listed_chunk_is_in_one_cluster_and_little_else(
            listed in proptest::collection::hash_set((0..2_u8, 0..COUNT), 1..200),
        ) {
            let cache = Cache::new(1 << 20, 1);
            let blobs = [blob(&cache, "a"), blob(&cache, "b")];
            let order: Vec<_> = listed.iter().map(|&(of, chunk)| (&blobs[of as usize], chunk)).collect();
            let mut seen = std::collections::HashSet::new();
            let (mut bytes, mut bridges) = (0, 0);
            for cluster in clusters(&order) {
                let size: u64 = cluster.chunks.clone().map(|c| encoded(&cluster.blob, c)).sum();
                prop_assert!(size <= MOST_BYTES || cluster.chunks.len() == 1);
                let mut of_it = 0;
                for chunk in cluster.chunks.clone() {
                    let key = cluster.blob.key(chunk);
                    prop_assert!(seen.insert(key), "twice");
                    let is_listed = order.iter().any(|(blob, chunk)| blob.key(*chunk) == key);
                    of_it += u32::from(is_listed);
                    *(if is_listed { &mut bytes } else { &mut bridges }) += encoded(&cluster.blob, chunk);
                }
                prop_assert_eq!(of_it, cluster.listed);
            }
            prop_assert!(order.iter().all(|(blob, chunk)| seen.contains(&blob.key(*chunk))));
            prop_assert!(bridges <= bytes / SPENT, "{} of {}", bridges, bytes);
        }
    }
}
