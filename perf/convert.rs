//! `cargo bench --bench convert`: a layer's whole pass against `gzip -dc`, and the meta image's split.

#[path = "layer.rs"]
mod layer;

use std::fs::File;
use std::time::Instant;

use convert::layer::{BuiltLayer, build_layer};
use convert::{ConvertOptions, Silent};
use formats::ext4::{FilesystemIdentity, Geometry, Image, Tree};
use formats::oci::Descriptor;
use formats::units::Bytes;
use layer::{gzip_dc, median};

fn main() {
    let path = layer::layer();
    let bytes = std::fs::read(&path).unwrap(); // in the page cache from here on
    let descriptor = Descriptor::of("", &bytes);
    drop(bytes);
    let build = |span: u64| -> (f64, BuiltLayer) {
        let options = ConvertOptions { span: Bytes(span), ..ConvertOptions::default() };
        let (mut tree, mut image) = (
            Tree::new(),
            Image::new(Geometry { size: options.disk_size }, FilesystemIdentity::default())
                .unwrap(),
        );
        let start = Instant::now();
        let blob = Box::new(File::open(&path).unwrap());
        let built =
            build_layer(blob, &descriptor, &mut tree, &mut image, &options, &Silent).unwrap();
        (start.elapsed().as_secs_f64(), built)
    };

    println!("layer {} ({} bytes)", path.display(), descriptor.size);
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let gzip = gzip_dc(&path).as_secs_f64();
        let (convert, built) = build(1 << 20);
        let rate = built.sizes.tar as f64 / convert / 1e6;
        println!(
            "gzip -dc {gzip:.2} s, convert {convert:.2} s: ratio {:.3}, {rate:.0} MB/s of tar",
            convert / gzip
        );
        ratios.push(convert / gzip);
        rates.push(rate);
    }
    println!("median ratio {:.3} (bar 0.35), {:.0} MB/s", median(ratios), median(rates));

    println!("span      fs.meta  gzip.meta  sidecar  archive  share of the blob");
    for span in [256 << 10, 512 << 10, 1 << 20, 2 << 20] {
        let (_, first) = build(span);
        let (_, again) = build(span);
        assert!(first.archive == again.archive, "two conversions differ");
        let s = first.sizes;
        println!(
            "{:>5} KiB {:>8} {:>9} {:>8} {:>8}  {:.3} % (bar 1.0 %)",
            span >> 10,
            s.fs_meta,
            s.gzip_meta,
            s.sidecar,
            s.archive,
            s.archive as f64 * 100.0 / s.blob as f64
        );
    }
}
