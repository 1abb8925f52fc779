//! Any bytes as the tars of two layers: parsed, applied, written as ext4 and as LSMT.
#![no_main]

#[path = "checksums.rs"]
mod checksums;

use convert::apply::{ApplyError, LayerApply};
use formats::ext4::{FilesystemIdentity, Geometry, Image, LayerRun, Tree};
use formats::lsmt::{LsmtLayer, TagMeaning, WarpWriter};
use formats::tar::{Parser, TarError, TarEvent};
use libfuzzer_sys::fuzz_target;
use source::MemorySource;

/// The smallest disk.
const DISK: Geometry = Geometry { size: Geometry::MIN };

#[derive(Debug)]
#[allow(dead_code)] // for the message of a crash
enum Refused {
    Tar(TarError),
    Apply(ApplyError),
}

impl From<TarError> for Refused {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

fn apply(tree: &mut Tree, tar: &[u8]) -> Result<(), Refused> {
    let mut layer = LayerApply::new(tree);
    let mut parser = Parser::with_data();
    for piece in tar.chunks(1000) {
        parser.feed(piece, &mut |event| match event {
            TarEvent::Entry(entry) => layer.entry(entry).map_err(Refused::Apply),
            TarEvent::Data(bytes) => {
                layer.data(bytes);
                Ok(())
            }
        })?;
    }
    parser.finish()?;
    layer.finish().map_err(Refused::Apply)?;
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    // The first byte is the position of the second layer.
    let Some((&split, tars)) = data.split_first() else { return };
    let mut tars = tars.to_vec();
    checksums::tar(&mut tars);
    let (lower, upper) = tars.split_at((usize::from(split) * 512).min(tars.len()));
    let mut tree = Tree::new();
    let mut image = Image::new(DISK, FilesystemIdentity::default()).unwrap();
    for tar in [lower, upper] {
        if apply(&mut tree, tar).is_err() {
            return;
        }
        let Ok(blocks) = image.commit_layer(&tree) else { return };
        let mut writer = WarpWriter::new(DISK.size).unwrap();
        for run in blocks.runs() {
            match run {
                LayerRun::Metadata { lba, bytes } => writer.metadata(lba, bytes).unwrap(),
                LayerRun::Remote { lba, count, target } => {
                    writer.remote(lba, count, target).unwrap()
                }
                LayerRun::Zeroed { lba, count } => writer.zeroed(lba, count).unwrap(),
            }
        }
        let mut lsmt = Vec::new();
        writer.finish(&mut lsmt).unwrap();
        LsmtLayer::open(&MemorySource::new("fuzz", lsmt), TagMeaning::Warp).unwrap();
    }
});
