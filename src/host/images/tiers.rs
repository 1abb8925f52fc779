//! The caches that the service configuration asks for.

use std::sync::Arc;

use blobs::cache::{Cache, CacheOptions};
use blobs::fetch::{FetchOptions, FillOptions};
use blobs::tier::{Tier, TierKind, TierOptions, Tiers, Usage};
use source::MemoryBudget;
use source::failure::with_causes;

use crate::config::{CacheConfig, CacheType, DownloadConfig, ServiceConfig};

/// The memory of open images and of conversions: the part of the budget that is not of fixed size.
pub(super) fn images_budget(config: &ServiceConfig) -> MemoryBudget {
    MemoryBudget::new(config.turbobd.memory_budget.saturating_sub(config.turbobd.fixed_memory()))
}

/// One cache for all devices, and the memory that their images may take.
pub(super) fn new_cache(config: &ServiceConfig, images: MemoryBudget) -> Arc<Cache> {
    let fetch = FetchOptions {
        connections: config.turbobd.connections,
        ahead: config.prefetch.concurrency,
        ..FetchOptions::default()
    };
    let options = CacheOptions { budget: config.turbobd.memory_cache, fetch };
    Cache::within(options, open_tiers(config), images)
}

/// Where the configuration wants chunks on disk, and how many.
pub fn tier_options(config: &ServiceConfig) -> Vec<(TierKind, TierOptions)> {
    let floor = config.turbobd.free_space_floor;
    let CacheConfig { kind, dir, size, .. } = &config.cache;
    let encoded = (*kind != CacheType::Download).then(|| (TierKind::Encoded, dir.clone(), *size));
    let gzip = &config.gzip_cache;
    let decoded = gzip.enable.then(|| (TierKind::Decoded, gzip.dir.clone(), gzip.size));
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
                    TierKind::Encoded => &mut tiers.encoded,
                    TierKind::Decoded => &mut tiers.decoded,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> ServiceConfig {
        ServiceConfig::parse(text, "c.json").unwrap().0
    }

    #[test]
    fn compressed_bytes_are_kept_with_every_cache_type_but_download() {
        let kinds = |cache_type: &str| {
            let text =
                format!(r#"{{"cacheConfig": {{"cacheType": "{cache_type}", "cacheDir": "/c"}}}}"#);
            let options = tier_options(&config(&text)).into_iter();
            options.map(|(kind, options)| (kind, options.dir, options.capacity)).collect::<Vec<_>>()
        };
        let decoded = (TierKind::Decoded, "/var/lib/turbobd/cache".into(), 4 << 30);
        let encoded = (TierKind::Encoded, "/c".into(), 4 << 30);
        assert_eq!(kinds("file"), [decoded.clone(), encoded.clone()]);
        assert_eq!(kinds("ocf"), [decoded.clone(), encoded]);
        assert_eq!(kinds("download"), [decoded]);
    }

    #[test]
    fn a_fill_is_as_the_download_section_says() {
        let text = r#"{"download": {"enable": true, "delay": 7, "delayExtra": 8, "maxMBps": 9, "tryCnt": 10, "blockSize": 11}}"#;
        let seconds = std::time::Duration::from_secs;
        let expected = FillOptions {
            delay: seconds(7),
            delay_extra: seconds(8),
            rate: Some(9 << 20),
            tries: 10,
            block: 11,
        };
        assert_eq!(fill_options(&config(text).download), Some(expected));
        assert_eq!(fill_options(&config(r#"{"download": {"enable": false}}"#).download), None);
    }
}
