//! An identity is what verifies it, never a claim: two images share bytes only by a proof that each of them brings, and
//! none reads by another's way.

use std::collections::HashSet;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::image::{Images, OCI_GZIP, OCI_TAR, done, noise, tar_of};
use crate::registry_double::{Access, Double, Fault};
use crate::serve::serve;
use blobs::cache::{Cache, CacheOptions};
use blobs::fetch::{FetchOptions, FillOptions};
use blobs::identity::VerifiedBy;
use blobs::tier::{Tier, TierKind, TierOptions, Tiers};
use blobs::trace::{LearnOptions, Traces};
use disk::Disk;
use disk::image::{host_manifest, open_image};
use disk::volume::{Volume as _, VolumeError};
use formats::oci::Digest;
use registry::store::{self, ImageStore};
use registry::{ClientOptions, Credential, RegistryClient, RetryPolicy, Timeouts};

const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const TARGET: &str = "containerd.io/snapshot/overlaybd/turbo-oci/target-digest";
const MIB: usize = 1 << 20;

/// Forms of a layer and of its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A bare tar, with a table of checksums.
    Tar,
    /// gzip, with a table.
    Gzip,
    /// gzip, with upstream's index alone.
    Upstream,
    /// zstd in frames, with a table.
    Zstd,
    /// zstd in one frame that is one chunk, with a table.
    OneFrame,
    /// zstd in one long frame of many chunks, with a table.
    LongFrame,
    /// A native layer.
    Native,
}

const FORMS: [Form; 6] =
    [Form::Tar, Form::Gzip, Form::Upstream, Form::Zstd, Form::OneFrame, Form::Native];

impl Form {
    /// True if the image brings checksums that prove each chunk.
    fn is_proved(self) -> bool {
        !matches!(self, Self::Upstream | Self::Native)
    }

    /// The layer of a tar: equally long, and equally cut, for tars that differ in bytes that do not compress.
    fn layer(self, tar: &[u8]) -> (&'static str, Vec<u8>) {
        let stored = || {
            let none = flate2::Compression::none();
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), none);
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        };
        let zstd = |part: &[u8]| zstd::encode_all(part, 1).unwrap();
        match self {
            Self::Tar | Self::Native => (OCI_TAR, tar.to_vec()),
            Self::Gzip | Self::Upstream => (OCI_GZIP, stored()),
            Self::Zstd => (OCI_ZSTD, tar.chunks(300_000).flat_map(zstd).collect()),
            Self::OneFrame | Self::LongFrame => (OCI_ZSTD, zstd(tar)),
        }
    }
}

/// An image whose file `app` says a word, converted, and its layer's digest and bytes.
struct Saying {
    images: Images,
    layer: Vec<u8>,
    digest: Digest,
}

fn saying(form: Form, word: u8) -> Saying {
    let mut app = vec![b'#'; 4096];
    app[..4].fill(word);
    // A frame is long, and has chunks inside, from 4 MiB on.
    let len = if form == Form::LongFrame { 5 * MIB } else { 3 * MIB };
    let tar = tar_of(&[("app", &app), ("data", &noise(1, len))]);
    let images = Images::new();
    let (media_type, layer) = form.layer(&tar);
    images.add("latest", &[(media_type, layer.clone())]);
    if form == Form::Native {
        let place = images.place();
        let args =
            ["convert", "-r", &place, "-i", "latest", "--overlaybd", "turbo", "--vsize", "1"];
        done(&args);
        let digest = images.layer("turbo", 0);
        let layer = images.blob(&digest);
        return Saying { images, layer, digest: digest.parse().unwrap() };
    }
    images.convert(&["--span", "256"]);
    if form == Form::Upstream {
        images.forge("turbo", 0, |members| members.retain(|(name, _)| name != "turbobd.segments"));
    }
    let digest = Digest::of(&layer);
    Saying { images, layer, digest }
}

/// Serves the image that says a word.
fn honest(form: Form, word: u8, registry: &Double, repository: &str) -> Saying {
    let image = saying(form, word);
    serve(&image.images, registry, repository);
    image
}

/// Serves an image that says a word, and names the layer of `victim` for it: the descriptor, the sidecar, and the bytes
/// that the registry sends for that digest. All of it is what its author chooses.
fn liar(form: Form, word: u8, victim: &Saying, registry: &Double, repository: &str) {
    let Saying { images, layer, digest } = saying(form, word);
    let named = victim.digest.to_string();
    if form == Form::Native {
        let mut manifest = images.manifest("turbo");
        manifest["layers"][0]["digest"] = named.as_str().into();
        manifest["layers"][0]["annotations"]["containerd.io/snapshot/overlaybd/blob-digest"] =
            named.as_str().into();
        images.set_manifest("turbo", &manifest);
    } else {
        images.forge("turbo", 0, |members| {
            for (_, sidecar) in members.iter_mut().filter(|(name, _)| name == "turbobd.segments") {
                assert_eq!(sidecar[16..48], digest.0);
                sidecar[16..48].copy_from_slice(&victim.digest.0);
                let end = sidecar.len() - 4;
                let crc = crc32fast::hash(&sidecar[..end]);
                sidecar[end..].copy_from_slice(&crc.to_le_bytes());
            }
        });
        let mut manifest = images.manifest("turbo");
        manifest["layers"][0]["annotations"][TARGET] = named.into();
        images.set_manifest("turbo", &manifest);
    }
    serve(&images, registry, repository);
    registry.add_lie(repository, &victim.digest, &layer);
}

/// One daemon's cache.
fn cache(tiers: Tiers, connections: usize) -> Arc<Cache> {
    let fetch = FetchOptions { workers: 2, connections, ahead: None };
    Cache::over(CacheOptions { budget: 64 << 20, fetch }, tiers)
}

fn tiers(dir: &Path) -> Tiers {
    let tier = |kind: TierKind| {
        let options = TierOptions { dir: dir.join(kind.name()), capacity: 1 << 30, floor: 0 };
        Some(Arc::new(Tier::open(kind, &options).unwrap()))
    };
    Tiers { encoded: tier(TierKind::Encoded), decoded: tier(TierKind::Decoded) }
}

fn flush(tiers: &Tiers) {
    // A chunk is offered to its tier after its reader has it.
    std::thread::sleep(Duration::from_millis(300));
    for tier in [&tiers.encoded, &tiers.decoded].into_iter().flatten() {
        tier.flush();
    }
}

/// A client whose reads end after three seconds.
fn options() -> ClientOptions {
    let pause = Duration::from_millis(50);
    let deadline = Duration::from_secs(3);
    let read_retry =
        RetryPolicy { max_tries: u32::MAX, deadline, first_pause: pause, max_pause: pause };
    let second = Duration::from_secs(20);
    let timeouts = Timeouts { connect: second, head: second, idle: second };
    ClientOptions { read_retry, timeouts, ..ClientOptions::default() }
}

fn open_with(options: ClientOptions, registry: &Double, place: &str, cache: &Arc<Cache>) -> Disk {
    let client = RegistryClient::new(options).unwrap();
    open_by(&client, registry, place, cache)
}

fn open_by(client: &RegistryClient, registry: &Double, place: &str, cache: &Arc<Cache>) -> Disk {
    let name = format!("{}/{place}", registry.host()).parse().unwrap();
    let (store, selector) = store::open(&name, client).unwrap();
    let (_, manifest) = host_manifest(&*store, &selector).unwrap();
    let targets: Arc<dyn ImageStore> = store.clone();
    open_image(&*store, &*targets, &manifest, cache.clone()).unwrap().disk
}

fn open(registry: &Double, place: &str, cache: &Arc<Cache>) -> Disk {
    open_with(options(), registry, place, cache)
}

/// What the file `app` says: all data of the disk is read, and its first bytes are looked for.
fn word(disk: &Disk) -> Result<u8, VolumeError> {
    let mut word = None;
    let mut block = [0; 4096];
    for (first, len) in disk.mapped() {
        let (mut at, end) = (first.bytes().0, (first + len).bytes().0);
        while at < end {
            let part = &mut block[..(end - at).min(4096) as usize];
            disk.read_at(part, at)?;
            if part.len() > 16 && part[4..16] == [b'#'; 12] {
                word = Some(part[0]);
            }
            at += part.len() as u64;
        }
    }
    Ok(word.expect("the disk has the file"))
}

/// The first byte on the disk of each chunk.
fn places(disk: &Disk) -> Vec<u64> {
    crate::image::chunks(disk).into_iter().map(|(offset, ..)| offset).collect()
}

fn page(disk: &Disk, at: u64) -> Result<[u8; 512], VolumeError> {
    let mut page = [0; 512];
    disk.read_at(&mut page, at).map(|()| page)
}

#[test]
fn no_image_decides_the_bytes_of_another_whatever_digest_it_names() {
    for form in FORMS {
        let (a, b) = (Double::start(), Double::start());
        let victim = honest(form, b'G', &b, "x");
        liar(form, b'E', &victim, &a, "x");
        // The same in another repository of the victim's registry.
        liar(form, b'E', &victim, &b, "y");
        for on_disk in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let tiers = if on_disk { tiers(dir.path()) } else { Tiers::default() };
            let cache = cache(tiers, 8);
            for liar in [open(&a, "x:turbo", &cache), open(&b, "y:turbo", &cache)] {
                assert_eq!(word(&liar).ok(), Some(b'E'), "{form:?}: its own bytes are its own");
            }
            let beside = open(&a, "x:turbo", &cache);
            let own = open(&b, "x:turbo", &cache);
            assert_eq!(word(&own).ok(), Some(b'G'), "{form:?}, tiers: {on_disk}");
            // The other way round: the victim's bytes are in memory by now.
            assert_eq!(word(&beside).ok(), Some(b'E'), "{form:?}, tiers: {on_disk}");
        }
    }
}

#[test]
fn what_an_image_left_on_disk_is_not_read_by_another_after_a_restart() {
    for form in FORMS {
        let (a, b) = (Double::start(), Double::start());
        let victim = honest(form, b'G', &b, "x");
        liar(form, b'E', &victim, &a, "x");
        let dir = tempfile::tempdir().unwrap();
        {
            let tiers = tiers(dir.path());
            let cache = cache(tiers.clone(), 8);
            assert_eq!(word(&open(&a, "x:turbo", &cache)).ok(), Some(b'E'), "{form:?}");
            flush(&tiers);
            let kept: usize = [&tiers.encoded, &tiers.decoded]
                .map(|tier| tier.as_ref().map_or(0, |tier| tier.usage().chunks))
                .iter()
                .sum();
            assert!(kept > 0, "{form:?}: nothing was kept");
        }
        let tiers = tiers(dir.path());
        let cache = cache(tiers, 8);
        assert_eq!(word(&open(&b, "x:turbo", &cache)).ok(), Some(b'G'), "{form:?}");
    }
}

#[test]
fn images_of_two_registries_share_what_one_table_proves_in_memory_and_on_disk() {
    for form in FORMS.into_iter().filter(|form| form.is_proved()) {
        let (a, b) = (Double::start(), Double::start());
        let image = honest(form, b'G', &a, "x");
        serve(&image.images, &b, "y");
        let dir = tempfile::tempdir().unwrap();
        {
            let tiers = tiers(dir.path());
            let cache = cache(tiers.clone(), 8);
            let (first, second) = (open(&a, "x:turbo", &cache), open(&b, "y:turbo", &cache));
            assert_eq!(word(&first).unwrap(), b'G');
            assert_eq!(word(&second).unwrap(), b'G');
            assert!(a.traffic(&image.digest).1 > 0, "{form:?}");
            assert_eq!(b.traffic(&image.digest), (0, 0), "{form:?}: it was in memory");
            flush(&tiers);
        }
        let cache = cache(tiers(dir.path()), 8);
        assert_eq!(word(&open(&b, "y:turbo", &cache)).unwrap(), b'G');
        assert_eq!(b.traffic(&image.digest), (0, 0), "{form:?}: it was on the disk");
    }
}

#[test]
fn what_nothing_proves_is_shared_within_one_repository_and_trust_only() {
    for form in FORMS.into_iter().filter(|form| !form.is_proved()) {
        let registry = Double::start();
        let image = honest(form, b'G', &registry, "x");
        serve(&image.images, &registry, "y");
        image.images.tag("again", &image.images.tagged("turbo"));
        serve(&image.images, &registry, "x");
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(tiers(dir.path()), 8);
        let client = RegistryClient::new(options()).unwrap();
        let fetched = || registry.traffic(&image.digest).1;
        // Opening a native layer reads its index; here the reading of its data counts.
        let cost = |client: &RegistryClient, place: &str| {
            let disk = open_by(client, &registry, place, &cache);
            let before = fetched();
            assert_eq!(word(&disk).unwrap(), b'G');
            fetched() - before
        };
        assert!(cost(&client, "x:turbo") > 3 * MIB, "{form:?}");
        assert!(cost(&client, "x:again") < MIB / 2, "{form:?}: another tag of the repository");
        assert!(cost(&client, "y:turbo") > 3 * MIB, "{form:?}: another repository");
        let credential = Some(Credential::from_user_password("someone:secret"));
        let other = RegistryClient::new(ClientOptions { credential, ..options() }).unwrap();
        assert!(cost(&other, "x:turbo") > 3 * MIB, "{form:?}: another user");
        let insecure = RegistryClient::new(ClientOptions { insecure: true, ..options() }).unwrap();
        assert!(cost(&insecure, "x:turbo") > 3 * MIB, "{form:?}: another trust");
    }
}

#[test]
fn what_was_fetched_whole_and_has_its_digest_is_shared_and_a_lie_is_told() {
    let (a, b, c) = (Double::start(), Double::start(), Double::start());
    let victim = honest(Form::Native, b'G', &b, "x");
    liar(Form::Native, b'E', &victim, &a, "x");
    serve(&victim.images, &c, "x");
    let dir = tempfile::tempdir().unwrap();
    let fill = |disk: &Disk, cache: &Arc<Cache>| {
        let blobs = disk.blobs().into_iter().flatten().collect();
        let filling = cache.fill(blobs, FillOptions::default());
        let begun = Instant::now();
        while !filling.progress().ended {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", filling.progress());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let verified = |disk: &Disk| disk.blobs()[0].as_ref().unwrap().verification().verified_by;
    {
        let tiers = tiers(dir.path());
        let cache = cache(tiers.clone(), 8);
        let (lie, truth) = (open(&a, "x:turbo", &cache), open(&b, "x:turbo", &cache));
        fill(&lie, &cache);
        let counters = cache.fetched();
        assert_eq!((counters.whole_blobs.get(), counters.whole_wrong.get()), (0, 1));
        let failures = lie.blobs()[0].as_ref().unwrap().failures().now();
        assert!(
            failures.iter().any(|failure| failure.reason.contains("whole blob")),
            "{failures:?}"
        );
        assert_eq!(verified(&truth), VerifiedBy::Checksum);
        fill(&truth, &cache);
        assert_eq!((counters.whole_blobs.get(), counters.whole_wrong.get()), (1, 1));
        assert_eq!(verified(&truth), VerifiedBy::Blob);
        flush(&tiers);
    }
    let cache = cache(tiers(dir.path()), 8);
    let other = open(&c, "x:turbo", &cache);
    let before = c.traffic(&victim.digest);
    assert_eq!((word(&other).unwrap(), verified(&other)), (b'G', VerifiedBy::Blob));
    assert_eq!(c.traffic(&victim.digest), before, "its index was read, and no data");
}

/// Faults by which the way of an image is lost, and the form of its layer.
fn lost_ways() -> Vec<(Form, Fault)> {
    let faults = [
        Fault::Status(503),
        Fault::Status(401),
        Fault::Status(404),
        Fault::Delay(Duration::from_secs(15)),
        Fault::StallAfter(100),
    ];
    let mut all: Vec<_> = faults.into_iter().map(|fault| (Form::Gzip, fault)).collect();
    all.push((Form::Tar, Fault::Status(503)));
    all.push((Form::LongFrame, Fault::Delay(Duration::from_secs(15))));
    all
}

#[test]
fn a_way_that_is_lost_or_slow_fails_its_own_readers_only() {
    for (form, fault) in lost_ways() {
        let (a, b) = (Double::start(), Double::start());
        let image = honest(form, b'G', &a, "x");
        serve(&image.images, &b, "x");
        let cache = cache(Tiers::default(), 4);
        let (first, second) = (Arc::new(open(&a, "x:turbo", &cache)), open(&b, "x:turbo", &cache));
        let places = places(&first);
        assert!(places.len() > 2, "{form:?}: {places:?}");
        a.fault(&image.digest.to_string(), fault.clone(), 1_000_000);
        // More readers than there are connections, and each waits for a chunk that the second image wants too.
        let stuck: Vec<_> = places
            .iter()
            .map(|&at| {
                let disk = first.clone();
                std::thread::spawn(move || page(&disk, at).is_ok())
            })
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        let begun = Instant::now();
        for &at in &places {
            page(&second, at).unwrap_or_else(|error| panic!("{form:?}, {fault:?}: {error}"));
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_millis(2500), "{form:?}, {fault:?}: it waited {took:?}");
        // What the second image has brought is proved, and the first one's readers get it as well.
        page(&first, places[0]).unwrap();
        stuck.into_iter().for_each(|reader| _ = reader.join().unwrap());
    }
}

#[test]
fn an_image_does_not_read_with_anothers_credentials() {
    for form in [Form::Gzip, Form::Native] {
        let (a, b) = (Double::start(), Double::start());
        let image = honest(form, b'G', &a, "x");
        serve(&image.images, &b, "x");
        let cache = cache(Tiers::default(), 8);
        a.set_access(Access::Basic("ann:secret".into()));
        b.set_access(Access::Basic("bob:secret".into()));
        let login = |text: &str| ClientOptions {
            credential: Some(Credential::from_user_password(text)),
            ..options()
        };
        let first = open_with(login("ann:secret"), &a, "x:turbo", &cache);
        let second = open_with(login("bob:secret"), &b, "x:turbo", &cache);
        let places = places(&first);
        page(&first, places[0]).unwrap();
        b.set_access(Access::Basic("bob:another".into()));
        b.clear_log();
        let before = a.log().len();
        let last = *places.last().unwrap();
        let refused = page(&second, last).unwrap_err();
        let told = source::failure::with_causes(&refused);
        assert!(told.contains(&b.host()), "{form:?}: {told}");
        assert_eq!(a.log().len(), before, "{form:?}: it asked the other's registry");
        assert!(b.count(&image.digest.to_string()) > 0, "{form:?}");
        let sent: HashSet<_> = b.log().into_iter().filter_map(|seen| seen.authorization).collect();
        let of = |login: &str| {
            use base64::Engine as _;
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login))
        };
        assert!(!sent.contains(&of("ann:secret")), "{form:?}: {sent:?}");
        // And the first one's still works.
        page(&first, last).unwrap();
    }
}

#[test]
fn the_image_that_is_left_reads_on_when_another_of_its_layer_is_deleted_and_detached() {
    let (a, b) = (Double::start(), Double::start());
    let image = honest(Form::Gzip, b'G', &a, "x");
    serve(&image.images, &b, "x");
    let cache = cache(Tiers::default(), 8);
    let (first, second) = (open(&a, "x:turbo", &cache), open(&b, "x:turbo", &cache));
    let places = places(&first);
    page(&first, places[0]).unwrap();
    a.remove_blob("x", &image.digest);
    page(&second, places[places.len() / 2]).unwrap();
    drop(first);
    assert_eq!(word(&second).unwrap(), b'G');
    let counters = cache.fetched();
    assert_eq!(counters.failed.get(), 0);
}

#[test]
fn a_trace_is_learned_for_one_repository_and_fetches_for_no_other() {
    let (a, b) = (Double::start(), Double::start());
    let image = honest(Form::Gzip, b'G', &a, "x");
    serve(&image.images, &a, "y");
    serve(&image.images, &b, "x");
    let cache = cache(Tiers::default(), 8);
    let traces = Traces::new(LearnOptions { dir: "/nowhere".into(), ..LearnOptions::default() });
    let path = |disk: &Disk| traces.path(disk.recorders());
    let own = path(&open(&a, "x:turbo", &cache));
    assert_eq!(own, path(&open(&a, "x:turbo", &cache)));
    assert_ne!(own, path(&open(&a, "y:turbo", &cache)));
    assert_ne!(own, path(&open(&b, "x:turbo", &cache)));
}

#[test]
fn inspect_and_check_tell_what_was_verified_by_what() {
    let told = |form: Form| {
        let image = saying(form, b'G');
        let name = image.images.name("turbo");
        let json: serde_json::Value =
            serde_json::from_str(&done(&["inspect", &name, "--json"])).unwrap();
        let layer = json["layers"][0].clone();
        (layer, done(&["check", "--data", &name]), image)
    };
    for form in FORMS {
        let (layer, checked, image) = told(form);
        let (verified_by, how) = match form {
            Form::Native => ("checksum", "by checksums, which find damage and prove nothing"),
            Form::Upstream => ("nothing", "with no checksum to verify them by"),
            _ => ("table", "by the SHA-256 of each"),
        };
        assert_eq!(layer["verified_by"], verified_by, "{form:?}: {layer}");
        let shared_by = layer["shared_by"].as_str().unwrap();
        let of_table = shared_by.parse::<Digest>().is_ok();
        assert_eq!(of_table, form.is_proved(), "{form:?}: {shared_by}");
        if !form.is_proved() {
            assert!(shared_by.contains(image.images.path().to_str().unwrap()), "{shared_by}");
        }
        assert!(checked.contains(&format!("ok, {how}")), "{form:?}: {checked}");
        let whole = format!("{}: ok, as a whole", image.digest);
        assert!(checked.contains(&whole), "{form:?}: {checked}");
    }
}
