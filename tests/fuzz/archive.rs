//! Any bytes as an unpacked layer archive, whose members are opened in the same way as by a reader of the
//! image.
#![no_main]

#[path = "checksums.rs"]
mod checksums;

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use formats::gzip::{GZIP_META_NAME, SIDECAR_NAME, merge};
use formats::lsmt::{LsmtLayer, TagMeaning};
use formats::zfile;
use source::MemorySource;

fuzz_target!(|data: &[u8]| {
    let mut data = data.to_vec();
    checksums::tar(&mut data);
    let Ok(members) = formats::tar::archive::read_members(&data) else { return };
    let member = |wanted: &str| {
        let range = members.iter().find(|(name, _)| name == wanted).map(|(_, range)| range.clone());
        range.map(|range| &data[range])
    };
    for (_, range) in &members {
        assert!(data.get(range.clone()).is_some());
    }
    let _ = merge(member(GZIP_META_NAME), member(SIDECAR_NAME));
    let Some(fs_meta) = member("ext4.fs.meta") else { return };
    let Ok(payload) = zfile::open(Arc::new(MemorySource::new("fuzz", fs_meta))) else { return };
    if payload.source().len() < 1 << 20
        && let Ok(plain) = payload.read_all()
    {
        let _ = LsmtLayer::open(&MemorySource::new("fuzz", plain), TagMeaning::Warp);
    }
});
