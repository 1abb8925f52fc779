//! Meta images that lie in each kind of field, with digests and checksums that fit.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use disk::volume::VolumeSource;
use flate2::{Compression, read};
use formats::ext4::{self, ImageKind, check_mountable};
use serde_json::{Value, json};
use source::failure::with_causes;

use super::{
    BUDGET, Dice, NOTE, Specimen, Watch, cache, cases, opened, peak, quick_gzip, read_some,
    tar_of_members,
};
use crate::checker::Report;
use crate::checker::field::{crc32, le32, le64, raw_crc32c};
use crate::checker::writer::{ZFileOptions, zfile as packed};
use crate::checker::zfile;

type Change = fn(&mut Specimen, &mut Dice);

const FS_META: &str = "ext4.fs.meta";
const GZIP_META: &str = "gzip.meta";
const SIDECAR: &str = "turbobd.segments";

const KINDS: [(&str, Change); 12] = [
    ("annotations", annotations),
    ("layers", layers),
    ("members", members),
    ("tar headers", tar_headers),
    ("LSMT records", lsmt_records),
    ("LSMT mappings", lsmt_mappings),
    ("superblock", superblock),
    ("ext4 metadata", ext4_metadata),
    ("ZFile", raw_zfile),
    ("checkpoints", checkpoints),
    ("windows", windows),
    ("segments", segments),
];

/// Numbers at which code goes wrong.
fn number(dice: &mut Dice) -> u64 {
    const EDGES: [u64; 22] = [
        0,
        1,
        2,
        3,
        7,
        8,
        255,
        511,
        512,
        513,
        4095,
        4096,
        65_535,
        65_536,
        1 << 20,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 40,
        (1 << 50) - 1,
        i64::MAX as u64,
        u64::MAX,
    ];
    match dice.below(4) {
        0 => dice.next() >> dice.below(64),
        _ => EDGES[dice.below(EDGES.len())],
    }
}

/// Changes a number of 1 to 8 bytes at a place that is a multiple of `step`, at or behind `from` and before `end`.
fn damage(bytes: &mut [u8], (from, end): (usize, usize), step: usize, dice: &mut Dice) {
    let end = end.min(bytes.len());
    if from >= end {
        return;
    }
    let at = from + dice.below((end - from).div_ceil(step)) * step;
    let width = (1 << dice.below(4)).min(end - at);
    match dice.below(3) {
        0 => bytes[at] ^= 1 << dice.below(8),
        1 => {
            let mut old = [0; 8];
            old[..width].copy_from_slice(&bytes[at..at + width]);
            let near = u64::from_le_bytes(old).wrapping_add(dice.next() % 5).wrapping_sub(2);
            bytes[at..at + width].copy_from_slice(&near.to_le_bytes()[..width]);
        }
        _ => bytes[at..at + width].copy_from_slice(&number(dice).to_le_bytes()[..width]),
    }
}

/// A ZFile without checksums of its blocks and of itself, so that a change comes through.
fn bare(stream: &[u8]) -> Vec<u8> {
    packed(stream, &ZFileOptions { algo: 1, block_size: 4096, verify: false })
}

/// The content of a ZFile; `None` if an earlier change broke it. The checker takes memory as the file says.
fn unpacked(file: &[u8]) -> Option<Vec<u8>> {
    let trailer = file.len().checked_sub(512)?;
    let is_small = |record: usize| {
        file.len() >= record + 80
            && le64(file, record + 56) < 1 << 26
            && le32(file, record + 72) < 1 << 20
    };
    if !is_small(0) || !is_small(trailer) {
        return None;
    }
    let checked = catch_unwind(|| zfile::check(file, false, &mut Report::default()));
    checked.ok().flatten().map(|(stream, _)| stream)
}

fn some_layer(specimen: &Specimen, dice: &mut Dice) -> usize {
    dice.below(specimen.archives.len())
}

fn annotations(specimen: &mut Specimen, dice: &mut Dice) {
    let layer = some_layer(specimen, dice);
    let targets: Vec<String> = specimen.layers.keys().map(ToString::to_string).collect();
    let values = [
        json!(targets[dice.below(targets.len())]),
        json!(""),
        json!("sha256:0"),
        json!("application/vnd.oci.image.layer.v1.tar+gzip"),
        json!("application/vnd.oci.image.layer.v1.tar"),
        json!("x".repeat(100_000)),
        Value::Null,
        json!(number(dice)),
    ];
    let value = values[dice.below(values.len())].clone();
    let Some(layer) = specimen.manifest["layers"].get_mut(layer) else { return };
    let keys: Vec<String> = layer["annotations"]
        .as_object()
        .map_or_else(Vec::new, |notes| notes.keys().cloned().collect());
    match dice.below(6) {
        0 => layer["mediaType"] = value,
        1 => layer["annotations"] = value,
        2 if !keys.is_empty() => {
            layer["annotations"][format!("{NOTE}/turbo-oci/target-digest")] = value;
        }
        _ if keys.is_empty() => layer["size"] = value,
        _ => layer["annotations"][keys[dice.below(keys.len())].as_str()] = value,
    }
}

fn layers(specimen: &mut Specimen, dice: &mut Dice) {
    let at = some_layer(specimen, dice);
    match dice.below(4) {
        0 => specimen.archives.swap(0, at),
        1 => {
            let times = [1, 2, 253, 254, 300][dice.below(5)];
            let Some(list) = specimen.manifest["layers"].as_array_mut() else { return };
            let Some(copied) = list.get(at).cloned() else { return };
            list.extend(vec![copied; times]);
        }
        2 => {
            specimen.manifest["layers"].as_array_mut().map(|list| list.truncate(at));
        }
        _ => {
            if let Some(list) = specimen.manifest["layers"].as_array_mut()
                && at < list.len()
            {
                list.swap(0, at);
            }
        }
    }
}

fn members(specimen: &mut Specimen, dice: &mut Dice) {
    let (layer, other) = (some_layer(specimen, dice), some_layer(specimen, dice));
    let foreign = specimen.archives[other].clone();
    let archive = &mut specimen.archives[layer];
    if archive.is_empty() {
        return;
    }
    let at = dice.below(archive.len());
    match dice.below(7) {
        0 => drop(archive.remove(at)),
        1 => archive[at].1.clear(),
        2 => {
            let len = dice.below(archive[at].1.len() + 1);
            archive[at].1.truncate(len);
        }
        3 => archive.push(archive[at].clone()),
        4 => {
            archive[at].0 =
                [FS_META, GZIP_META, SIDECAR, "erofs.fs.meta", "x"][dice.below(5)].into()
        }
        5 => {
            let len = archive[at].1.len() + dice.below(1 << 20);
            archive[at].1.resize(len, 0);
        }
        _ => {
            if let Some(one) = foreign.get(at) {
                archive[at] = one.clone();
            }
        }
    }
}

fn tar_headers(specimen: &mut Specimen, dice: &mut Dice) {
    let layer = some_layer(specimen, dice);
    let mut tar = tar_of_members(&specimen.archives[layer]);
    let mut at = 0;
    // The headers lie behind each other's content.
    let headers: Vec<usize> = specimen.archives[layer]
        .iter()
        .map(|(_, data)| {
            let here = at;
            at += 512 + data.len().next_multiple_of(512);
            here
        })
        .collect();
    if headers.is_empty() {
        return;
    }
    let header = headers[dice.below(headers.len())];
    match dice.below(3) {
        0 => {
            let text = format!("{:011o}", number(dice) & 0x1_ffff_ffff);
            tar[header + 124..header + 135].copy_from_slice(text.as_bytes());
        }
        1 => tar[header + 156] = b"0123456789LKSxgV"[dice.below(16)],
        _ => damage(&mut tar, (header, header + 512), 1, dice),
    }
    tar[header + 148..header + 156].fill(b' ');
    let sum: u32 = tar[header..header + 512].iter().map(|&byte| u32::from(byte)).sum();
    tar[header + 148..header + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    if dice.below(8) == 0 {
        tar.truncate(dice.below(tar.len()));
    }
    specimen.raw.insert(layer, quick_gzip(&tar));
}

/// Changes the unpacked `ext4.fs.meta` of a layer.
fn in_stream(
    specimen: &mut Specimen,
    dice: &mut Dice,
    change: impl FnOnce(&mut Vec<u8>, &mut Dice),
) {
    let layer = some_layer(specimen, dice);
    let Some(file) = specimen.member(layer, FS_META) else { return };
    let Some(mut stream) = unpacked(file) else { return };
    change(&mut stream, dice);
    *file = bare(&stream);
}

fn lsmt_records(specimen: &mut Specimen, dice: &mut Dice) {
    in_stream(specimen, dice, |stream, dice| {
        let start = if dice.below(2) == 0 { 0 } else { stream.len().saturating_sub(4096) };
        damage(stream, (start, start + 140), 4, dice);
    });
}

fn lsmt_mappings(specimen: &mut Specimen, dice: &mut Dice) {
    in_stream(specimen, dice, |stream, dice| {
        let Some(trailer) = stream.len().checked_sub(4096) else { return };
        let index = le64(stream, trailer + 32) as usize;
        for _ in 0..=dice.below(4) {
            damage(stream, (index, trailer), 8, dice);
        }
    });
}

fn superblock(specimen: &mut Specimen, dice: &mut Dice) {
    in_stream(specimen, dice, |stream, dice| {
        let is_one = |at: &usize| stream.get(at + 56..at + 58) == Some(&[0x53, 0xef]);
        let Some(at) = (0..stream.len()).step_by(512).find(is_one) else { return };
        match dice.below(3) {
            // What of it is right stays under a checksum that fits.
            0 => damage(stream, (at, at + 1020), 2, dice),
            1 => damage(stream, (at, at + 108), 4, dice),
            _ => damage(stream, (at + 3072, at + 3072 + 64), 4, dice),
        }
        if at + 1024 <= stream.len() {
            let sum = raw_crc32c(u32::MAX, &stream[at..at + 1020]);
            stream[at + 1020..at + 1024].copy_from_slice(&sum.to_le_bytes());
        }
    });
}

fn ext4_metadata(specimen: &mut Specimen, dice: &mut Dice) {
    in_stream(specimen, dice, |stream, dice| {
        let end = stream.len().saturating_sub(4096);
        for _ in 0..=dice.below(8) {
            damage(stream, (4096, end), 4, dice);
        }
    });
}

fn raw_zfile(specimen: &mut Specimen, dice: &mut Dice) {
    let layer = some_layer(specimen, dice);
    let Some(file) = specimen.member(layer, FS_META) else { return };
    if let Some(stream) = unpacked(file) {
        *file = bare(&stream);
    }
    let Some(trailer) = file.len().checked_sub(512) else { return };
    match dice.below(4) {
        0 => damage(file, (0, 90), 4, dice),
        1 => damage(file, (trailer, trailer + 90), 4, dice),
        2 => {
            let table = le64(file, trailer + 40) as usize;
            damage(file, (table, trailer), 4, dice);
        }
        _ => damage(file, (512, trailer), 1, dice),
    }
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    read::ZlibEncoder::new(bytes, Compression::fast()).read_to_end(&mut out).unwrap();
    out
}

fn unzlib(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let _ = read::ZlibDecoder::new(bytes).take(1 << 24).read_to_end(&mut out);
    out
}

/// Corrects the checksum of the header of a `gzip.meta`.
fn close_gzip_meta(file: &mut [u8]) {
    if file.len() >= 333 {
        let sum = raw_crc32c(0, &file[..329]);
        file[329..333].copy_from_slice(&sum.to_le_bytes());
    }
}

fn checkpoints(specimen: &mut Specimen, dice: &mut Dice) {
    let Some(file) = specimen.member(0, GZIP_META).filter(|file| file.len() > 400) else { return };
    if dice.below(3) == 0 {
        damage(file, (8, 329), 4, dice);
        return close_gzip_meta(file);
    }
    let start = le64(file, 313) as usize;
    if start >= file.len() {
        return;
    }
    let mut table = unzlib(&file[start..]);
    for _ in 0..=dice.below(3) {
        let len = table.len();
        damage(&mut table, (0, len), 1, dice);
    }
    let table = zlib(&table);
    file.truncate(start);
    file.extend_from_slice(&table);
    file[321..329].copy_from_slice(&(table.len() as u64).to_le_bytes());
    if dice.below(2) == 0 {
        let len = file.len() as u64;
        file[41..49].copy_from_slice(&len.to_le_bytes());
    }
    close_gzip_meta(file);
}

fn windows(specimen: &mut Specimen, dice: &mut Dice) {
    let Some(file) = specimen.member(0, GZIP_META).filter(|file| file.len() > 400) else { return };
    let start = (le64(file, 313) as usize).min(file.len());
    damage(file, (333, start), 1, dice);
}

fn segments(specimen: &mut Specimen, dice: &mut Dice) {
    let layer = some_layer(specimen, dice);
    let Some(file) = specimen.member(layer, SIDECAR).filter(|file| file.len() > 84) else { return };
    let body = file.len() - 4;
    match dice.below(4) {
        0 => damage(file, (8, 80), 4, dice),
        1 => {
            let count = le32(file, 12) as usize;
            damage(file, (72, 80 + 4 * count), 1, dice);
        }
        2 => damage(file, (72, body), 1, dice),
        _ => {
            let keep = 12 + dice.below(body - 12);
            file.truncate(keep);
            file.extend([0; 4]);
        }
    }
    let body = file.len() - 4;
    let sum = crc32(&file[..body]);
    file[body..].copy_from_slice(&sum.to_le_bytes());
}

/// What became of a case.
fn outcome(specimen: &Specimen) -> &'static str {
    let Ok((manifest, store)) = specimen.build() else { return "no manifest" };
    let (cache, budget) = cache(Default::default());
    let told = match opened(&manifest, &store, &cache) {
        Err(_) => "refused when it is opened",
        Ok(disk) => {
            assert!(budget.used() <= BUDGET);
            let mountable = check_mountable(&VolumeSource(&disk), ImageKind::Meta);
            let tree = ext4::read(&VolumeSource(&disk), disk.mapped());
            let read = read_some(&disk, 32 << 20);
            match (mountable, tree, read) {
                (Err(_), ..) => "not given to the kernel",
                (_, _, Err(_)) => "an error of a read",
                (_, Err(error), _) => {
                    assert!(!with_causes(&error).is_empty());
                    "no tree"
                }
                (Ok(()), Ok(_), Ok(())) => "read whole",
            }
        }
    };
    drop(cache);
    assert_eq!(budget.used(), 0, "memory is given back");
    told
}

#[test]
fn a_hostile_meta_image_is_refused_or_read_and_takes_neither_the_daemon_nor_its_memory() {
    let specimen = Specimen::new();
    assert_eq!(outcome(&specimen), "read whole");
    let (watch, before) = (Watch::new("mutation"), peak());
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut by_kind: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let count = cases(240);
    for case in 0..count {
        watch.begin(case);
        let mut dice = Dice::new(case);
        let (kind, change) = KINDS[(case % KINDS.len() as u64) as usize];
        let mut changed = specimen.clone();
        for _ in 0..=dice.below(2) {
            change(&mut changed, &mut dice);
        }
        if dice.below(8) == 0 {
            KINDS[dice.below(KINDS.len())].1(&mut changed, &mut dice);
        }
        let told = catch_unwind(AssertUnwindSafe(|| outcome(&changed))).unwrap_or_else(|panic| {
            eprintln!("mutation {case} of {kind} panics");
            resume_unwind(panic)
        });
        *seen.entry(told).or_default() += 1;
        *by_kind.entry((kind, told)).or_default() += 1;
    }
    drop(watch);
    let grown = peak() - before;
    println!("{count} cases, {} MiB more memory at most: {seen:#?} {by_kind:#?}", grown >> 20);
    for told in
        ["refused when it is opened", "not given to the kernel", "an error of a read", "read whole"]
    {
        assert!(seen.contains_key(told), "no case was {told}");
    }
    // With other tests in this process, their memory counts too.
    if std::env::var_os("TURBOBD_CASES").is_some() {
        assert!(grown < BUDGET + (64 << 20), "{} MiB", grown >> 20);
    }
}
