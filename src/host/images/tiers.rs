//! The caches that the service configuration asks for.

use std::sync::Arc;

use blobs::cache::{Cache, CacheOptions};
use blobs::fetch::{FetchOptions, FillOptions};
use blobs::tier::{Kind, Tier, TierOptions, Tiers, Usage};
use source::failure::with_causes;

use crate::config::{CacheConfig, CacheType, DownloadConfig, ServiceConfig};

/// One cache for all devices.
pub(super) fn new_cache(config: &ServiceConfig) -> Arc<Cache> {
    let fetch = FetchOptions { connections: config.turbobd.connections, ..FetchOptions::default() };
    let options = CacheOptions { budget: config.turbobd.memory_cache, fetch };
    Cache::over(options, open_tiers(config))
}

/// Where the configuration wants chunks on disk, and how many.
pub fn tier_options(config: &ServiceConfig) -> Vec<(Kind, TierOptions)> {
    let floor = config.turbobd.free_space_floor;
    let CacheConfig { kind, dir, size, .. } = &config.cache;
    let encoded = (*kind == CacheType::File).then(|| (Kind::Encoded, dir.clone(), *size));
    let gzip = &config.gzip_cache;
    let decoded = gzip.enable.then(|| (Kind::Decoded, gzip.dir.clone(), gzip.size));
    let wanted = decoded.into_iter().chain(encoded).filter(|(_, _, capacity)| *capacity > 0);
    wanted.map(|(kind, dir, capacity)| (kind, TierOptions { dir, capacity, floor })).collect()
}

/// A tier that cannot be had is missed, not waited for.
fn open_tiers(config: &ServiceConfig) -> Tiers {
    let mut tiers = Tiers::default();
    for (kind, options) in tier_options(config) {
        match Tier::open(kind, &options) {
            Ok(tier) => {
                let Usage { bytes, chunks, .. } = tier.usage();
                let (name, dir) = (kind.name(), options.dir.display());
                tracing::info!("The {name} cache in {dir} has {chunks} chunks in {bytes} bytes");
                let place = match kind {
                    Kind::Encoded => &mut tiers.encoded,
                    Kind::Decoded => &mut tiers.decoded,
                };
                *place = Some(Arc::new(tier));
            }
            Err(error) => {
                tracing::warn!("No {} cache on disk: {}", kind.name(), with_causes(&error));
            }
        }
    }
    tiers
}

/// How the layers of a device are fetched in the background; `None`: not at all.
pub(super) fn fill_options(download: &DownloadConfig) -> Option<FillOptions> {
    let DownloadConfig { enable, delay, delay_extra, max_bytes_per_second, tries, block } =
        download.clone();
    let rate = max_bytes_per_second;
    enable.then_some(FillOptions { delay, delay_extra, rate, tries, block })
}
