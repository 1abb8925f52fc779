//! `cargo bench --bench native`: a native conversion of one layer, alone and with the meta image in the same
//! pass, against the meta image alone and `gzip -dc`.

#[path = "layer.rs"]
mod layer;

use std::fs::File;
use std::time::Instant;

use convert::ConvertOptions;
use convert::layer::{WantedForms, build_native_layer};
use convert::native::{NativeBlob, NativeLayer};
use formats::ext4::{FilesystemIdentity, Geometry, Image, Tree};
use formats::lsmt;
use formats::oci::Descriptor;
use formats::zfile::{Algo, Options};
use layer::{gzip_dc, median};

/// Cost of a run.
struct Run {
    wall: f64,
    cpu: f64,
    blob: Option<NativeBlob>,
}

/// CPU seconds of this process so far.
fn cpu() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

fn main() {
    let path = layer::layer();
    let bytes = std::fs::read(&path).unwrap(); // in the page cache from here on
    let descriptor = Descriptor::of("", &bytes);
    drop(bytes);
    let options = ConvertOptions {
        work_dir: std::env::var_os("TURBOBD_BENCH_DIR").map(Into::into),
        ..ConvertOptions::default()
    };
    let run = |turbo: bool, zfile: Option<Options>| -> Run {
        let (mut tree, mut image) = (
            Tree::new(),
            Image::new(Geometry { size: options.disk_size }, FilesystemIdentity::default())
                .unwrap(),
        );
        let native = zfile.map(|zfile| NativeLayer {
            virtual_size: options.disk_size,
            identity: lsmt::LayerIdentity::default(),
            has_lower: false,
            zfile,
        });
        let wanted = WantedForms { turbo, native };
        let (start, cpu_before) = (Instant::now(), cpu());
        let blob = Box::new(File::open(&path).unwrap());
        let (_, blob) =
            build_native_layer(blob, &descriptor, wanted, &mut tree, &mut image, &options).unwrap();
        Run { wall: start.elapsed().as_secs_f64(), cpu: cpu() - cpu_before, blob }
    };
    let lz4 = Options::default();
    let tar = {
        let output = std::process::Command::new("sh")
            .args(["-c", "gzip -dc \"$0\" | wc -c"])
            .arg(&path)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse::<f64>().unwrap()
    };
    println!("layer {} ({} bytes, {tar} of tar)", path.display(), descriptor.size);
    let (mut alone_rate, mut together, mut meta, mut gzip) = (vec![], vec![], vec![], vec![]);
    for _ in 0..5 {
        let baseline = gzip_dc(&path).as_secs_f64();
        let turbo = run(true, None);
        let alone = run(false, Some(lz4));
        let both = run(true, Some(lz4));
        let rate = |run: &Run| tar / run.wall / 1e6;
        println!(
            "gzip -dc {baseline:.2} s; meta image {:.2} s; native {:.2} s (cpu {:.2}), {:.0} MB/s; both {:.2} s (cpu {:.2}), ratio {:.2}",
            turbo.wall,
            alone.wall,
            alone.cpu,
            rate(&alone),
            both.wall,
            both.cpu,
            both.wall / alone.wall
        );
        alone_rate.push(rate(&alone));
        together.push(both.wall / alone.wall);
        meta.push(alone.wall / turbo.wall);
        gzip.push(alone.wall / baseline);
    }
    println!(
        "native: median {:.0} MB/s of tar (bar 300), {:.2} of gzip -dc, {:.2} of the meta image; both: {:.2} of native alone (bar 1.4)",
        median(alone_rate),
        median(gzip),
        median(meta),
        median(together)
    );

    println!("recipe          size  of the blob  MB/s of tar");
    let recipes =
        [(Algo::Lz4, 4), (Algo::Lz4, 32), (Algo::Zstd, 4), (Algo::Zstd, 16), (Algo::Zstd, 32)];
    for (algo, kib) in recipes {
        let done = run(false, Some(Options { algo, block_size: kib << 10, ..lz4 }));
        let size = done.blob.map_or(0, |blob| blob.size());
        let name = format!("{algo:?} {kib} KiB").to_lowercase();
        let share = size as f64 / descriptor.size as f64;
        println!("{name:<12} {size:>10}  {share:>11.2}  {:>11.0}", tar / done.wall / 1e6);
    }
}
