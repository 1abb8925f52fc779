//! Single bits that change: in the network, in a registry, on the disk of this host.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blobs::tier::{Tier, TierKind, TierOptions, Tiers};
use blobs::trace::replay;
use formats::oci::{Digest, Manifest};
use formats::trace::{Touch, Trace};

use super::{Dice, Flip, Specimen, SpecimenStore, Watch, cache, cases, opened, shown};

/// Flips of each kind, without a number of the operator's.
const USUAL: u64 = 40;

/// Counts of what became of flips.
#[derive(Debug, Default)]
struct Told {
    caught: u64,
    harmless: u64,
}

impl Told {
    fn add(&mut self, result: &Result<Digest, String>, right: Digest, what: &str) {
        match result {
            Err(_) => self.caught += 1,
            Ok(digest) => {
                assert_eq!(*digest, right, "{what}: other bytes are shown");
                self.harmless += 1;
            }
        }
    }
}

struct Scene {
    specimen: Specimen,
    manifest: Manifest,
    store: SpecimenStore,
    right: Digest,
}

impl Scene {
    fn new() -> Self {
        let specimen = Specimen::new();
        let (manifest, store) = specimen.build().unwrap();
        let (cache, _) = cache(Tiers::default());
        let right = shown(&opened(&manifest, &store, &cache).unwrap()).unwrap();
        Self { specimen, manifest, store, right }
    }
}

fn show(manifest: &Manifest, store: &SpecimenStore, tiers: Tiers) -> Result<Digest, String> {
    let (cache, _) = cache(tiers);
    shown(&opened(manifest, store, &cache)?)
}

#[test]
fn a_flipped_bit_of_a_layer_is_caught_and_healed_where_it_comes_right_again() {
    let scene = Scene::new();
    let watch = Watch::new("flip of a layer");
    let mut layers: Vec<_> = scene.specimen.layers.iter().collect();
    layers.sort();
    let mut told = Told::default();
    let count = cases(USUAL);
    for case in 0..count {
        watch.begin(case);
        let mut dice = Dice::new(case);
        let (layer, bytes) = layers[dice.below(layers.len())];
        let flip = Flip {
            layer: *layer,
            at: dice.below(bytes.len()),
            mask: 1 << dice.below(8),
            times: u64::MAX,
        };
        let lying = SpecimenStore { flip: Some(flip), ..scene.store.clone() };
        told.add(&show(&scene.manifest, &lying, Tiers::default()), scene.right, "a layer");
        // Wrong once: the next delivery is a good copy.
        let once = SpecimenStore { flip: Some(Flip { times: 1, ..flip }), ..scene.store.clone() };
        assert_eq!(show(&scene.manifest, &once, Tiers::default()), Ok(scene.right), "{case}");
    }
    println!("{count} flips of layers: {told:?}, all healed by a good copy");
    assert!(told.caught > told.harmless);
}

/// Flips in a member of an archive. `fitting` corrects the digest of the archive.
fn flips_in(scene: &Scene, name: &str, fitting: bool) -> Told {
    let holders: Vec<usize> = (0..scene.specimen.archives.len())
        .filter(|&layer| scene.specimen.clone().member(layer, name).is_some())
        .collect();
    let watch = Watch::new("flip of a member");
    let mut told = Told::default();
    for case in 0..cases(USUAL) {
        watch.begin(case);
        let mut dice = Dice::new(case);
        let mut changed = scene.specimen.clone();
        let bytes = changed.member(holders[dice.below(holders.len())], name).unwrap();
        let at = dice.below(bytes.len());
        bytes[at] ^= 1 << dice.below(8);
        let (manifest, store) = changed.build().unwrap();
        let result = if fitting {
            show(&manifest, &store, Tiers::default())
        } else {
            // The manifest names the archives as they were; the registry sends the changed ones.
            let mut blobs = (*store.blobs).clone();
            for (named, sent) in scene.manifest.layers.iter().zip(&manifest.layers) {
                let sent = blobs[&sent.digest].clone();
                blobs.insert(named.digest, sent);
            }
            show(&scene.manifest, &SpecimenStore::of(blobs), Tiers::default())
        };
        told.add(&result, scene.right, name);
    }
    told
}

#[test]
fn a_flipped_bit_of_an_index_or_of_metadata_is_caught_or_harmless() {
    let scene = Scene::new();
    for name in ["gzip.meta", "turbobd.segments", "ext4.fs.meta"] {
        let as_sent = flips_in(&scene, name, false);
        assert_eq!(as_sent.harmless, 0, "the digest of the archive covers {name}");
        let told = flips_in(&scene, name, true);
        println!("flips of {name}: {as_sent:?}, with a digest that fits {told:?}");
        assert!(told.caught > 0);
    }
}

#[test]
fn a_flipped_bit_of_an_archive_is_caught() {
    let scene = Scene::new();
    let watch = Watch::new("flip of an archive");
    let mut told = Told::default();
    for case in 0..cases(USUAL) {
        watch.begin(case);
        let mut dice = Dice::new(case);
        let layers = &scene.manifest.layers;
        let digest = layers[dice.below(layers.len())].digest;
        let mut blobs = (*scene.store.blobs).clone();
        let mut bytes = blobs[&digest].to_vec();
        let at = dice.below(bytes.len());
        bytes[at] ^= 1 << dice.below(8);
        blobs.insert(digest, bytes.into());
        let result = show(&scene.manifest, &SpecimenStore::of(blobs), Tiers::default());
        told.add(&result, scene.right, "an archive");
    }
    println!("flips of archives: {told:?}");
    assert_eq!(told.harmless, 0, "its digest covers each bit");
}

fn tiers(dir: &Path) -> Tiers {
    let tier = |kind: TierKind| {
        let options = TierOptions { dir: dir.join(kind.name()), capacity: 1 << 30, floor: 0 };
        Some(Arc::new(Tier::open(kind, &options).unwrap()))
    };
    Tiers { encoded: tier(TierKind::Encoded), decoded: tier(TierKind::Decoded) }
}

fn both(tiers: &Tiers) -> impl Iterator<Item = &Arc<Tier>> {
    [&tiers.encoded, &tiers.decoded].into_iter().flatten()
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if fs::metadata(&path).unwrap().len() > 0 {
            found.push(path);
        }
    }
}

/// Reads the image over the tiers in `dir`, and waits until they have taken its chunks.
fn fill(scene: &Scene, dir: &Path) -> Result<Digest, String> {
    let tiers = tiers(dir);
    let result = show(&scene.manifest, &scene.store, tiers.clone());
    let begun = Instant::now();
    while both(&tiers).any(|tier| tier.usage().chunks == 0) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the tiers take nothing");
        both(&tiers).for_each(|tier| tier.flush());
        std::thread::sleep(Duration::from_millis(10));
    }
    both(&tiers).for_each(|tier| tier.flush());
    result
}

#[test]
fn a_flipped_bit_of_a_disk_tier_is_dropped_and_fetched_again() {
    let scene = Scene::new();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = folder.path();
    let watch = Watch::new("flip of a tier");
    let count = cases(USUAL);
    let mut unopened = 0;
    for case in 0..count {
        watch.begin(case);
        // What an earlier flip had dropped is there again.
        assert_eq!(fill(&scene, dir), Ok(scene.right));
        let mut dice = Dice::new(case);
        let mut found = Vec::new();
        files(dir, &mut found);
        found.sort();
        let path = &found[dice.below(found.len())];
        let mut bytes = fs::read(path).unwrap();
        let at = dice.below(bytes.len());
        bytes[at] ^= 1 << dice.below(8);
        fs::write(path, &bytes).unwrap();
        match std::panic::catch_unwind(|| tiers(dir)) {
            Ok(tiers) => {
                assert_eq!(show(&scene.manifest, &scene.store, tiers), Ok(scene.right), "{case}");
            }
            Err(_) => {
                // The host goes on without it.
                unopened += 1;
                fs::remove_dir_all(dir.join("encoded")).unwrap();
                fs::remove_dir_all(dir.join("decoded")).unwrap();
            }
        }
    }
    println!("{count} flips of disk tiers: all read right, {unopened} not opened");
}

#[test]
fn a_flipped_bit_of_a_trace_is_caught_or_harmless() {
    let scene = Scene::new();
    let mut trace = Trace { starts: 3, ..Trace::default() };
    for (number, (digest, bytes)) in scene.specimen.layers.iter().enumerate() {
        let blob = trace.blob(*digest).unwrap();
        for step in 0..20 {
            let start = step * bytes.len() as u64 / 20;
            trace.touches.push(Touch { blob, start, len: 4096, at: number as u32 * 10, weight: 3 });
        }
    }
    let file = trace.to_bytes();
    assert_eq!(Trace::parse(&file).unwrap(), trace);
    let watch = Watch::new("flip of a trace");
    let parsed = AtomicU64::new(0);
    let mut told = Told::default();
    let count = cases(USUAL);
    for case in 0..count {
        watch.begin(case);
        let mut dice = Dice::new(case);
        let mut bytes = file.clone();
        let at = dice.below(bytes.len());
        bytes[at] ^= 1 << dice.below(8);
        // As if its checksum were forged too, in every second case.
        if case % 2 == 1 {
            let body = bytes.len() - 4;
            let sum = crc32fast::hash(&bytes[..body]);
            bytes[body..].copy_from_slice(&sum.to_le_bytes());
        }
        let Ok(trace) = Trace::parse(&bytes) else {
            told.caught += 1;
            continue;
        };
        parsed.fetch_add(1, Ordering::Relaxed);
        let (cache, _) = cache(Tiers::default());
        let disk = opened(&scene.manifest, &scene.store, &cache).unwrap();
        replay::replay(&trace, &cache, &disk.blobs(), 4 << 20);
        told.add(&shown(&disk), scene.right, "a trace");
    }
    println!("{count} flips of traces: {told:?}");
    assert!(told.caught >= count / 2, "its checksum covers each bit");
}
