//! Layers as one disk (spec lsmt 6), and its contents.

use std::collections::BTreeSet;

use sha2::{Digest as _, Sha256};

use super::Report;
use super::field::{hex, is_zero};
use super::lsmt::{Layer, Mapping};

const SECTOR: usize = 512;

/// A layer and, if it is a TurboOCI layer, the uncompressed tar that it points into.
pub struct Stacked {
    pub layer: Layer,
    pub target: Option<Vec<u8>>,
}

/// Content digest (interop/README) and size of the disk.
pub fn content(layers: &[Stacked], report: &mut Report) -> (String, u64) {
    report.hold("stack.has-1-to-255-layers", (1..=255).contains(&layers.len()), || {
        layers.len().to_string()
    });
    let vsize =
        layers.iter().rev().map(|stacked| stacked.layer.vsize).find(|&size| size > 0).unwrap_or(0);
    report.hold("stack.has-a-size", vsize > 0, || "no layer gives one".into());
    for (number, stacked) in layers.iter().enumerate() {
        check_bounds(number, stacked, vsize, report);
    }
    let mut blocks = BTreeSet::new();
    for stacked in layers {
        for mapping in stacked.layer.mappings.iter().filter(|mapping| !mapping.zeroed) {
            blocks.extend(mapping.lba / 8..mapping.end().div_ceil(8));
        }
    }
    let mut hasher = Sha256::new();
    for block in blocks {
        let mut bytes = vec![0; 4096];
        for (number, sector) in bytes.chunks_mut(SECTOR).enumerate() {
            let lba = block * 8 + number as u64;
            if lba < vsize / SECTOR as u64 {
                read_sector(layers, lba, sector);
            }
        }
        if !is_zero(&bytes) {
            hasher.update((block * 4096).to_le_bytes());
            hasher.update(&bytes);
        }
    }
    (hex(&hasher.finalize()), vsize)
}

fn check_bounds(number: usize, stacked: &Stacked, vsize: u64, report: &mut Report) {
    for mapping in &stacked.layer.mappings {
        let detail = || format!("layer {number}: {mapping:?}");
        report.hold(
            "stack.mapping-lies-on-the-disk",
            mapping.end() <= vsize / SECTOR as u64,
            detail,
        );
        if mapping.tag == 1 {
            // Upstream reads missing bytes as zeros, so only padding may be missing.
            let end =
                stacked.target.as_ref().map_or(0, |tar| (tar.len() as u64).next_multiple_of(4096));
            let inside = (mapping.moffset + mapping.len) * SECTOR as u64 <= end;
            report.hold("stack.remote-mapping-lies-in-the-tar", inside, detail);
        }
    }
}

/// Reads a sector from the topmost layer that has an entry for it.
fn read_sector(layers: &[Stacked], lba: u64, sector: &mut [u8]) {
    for stacked in layers.iter().rev() {
        let Some(mapping) = find(&stacked.layer.mappings, lba) else { continue };
        if !mapping.zeroed {
            let at = (mapping.moffset + (lba - mapping.lba)) as usize * SECTOR;
            let file: &[u8] = match (mapping.tag, &stacked.target) {
                (1, Some(tar)) => tar,
                _ => &stacked.layer.stream,
            };
            let data = file.get(at..).unwrap_or_default();
            let len = data.len().min(SECTOR);
            sector[..len].copy_from_slice(&data[..len]);
        }
        return;
    }
}

fn find(mappings: &[Mapping], lba: u64) -> Option<&Mapping> {
    let at = mappings.partition_point(|mapping| mapping.lba <= lba).checked_sub(1)?;
    Some(&mappings[at]).filter(|mapping| lba < mapping.end())
}
