//! Sources of a blob: mirrors, peers, second requests, credential services.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::registry_double::tls_front;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::registry_double::{Access, Double, Fault};
use formats::oci::Digest;
use host::config::ServiceConfig;
use host::images::registries::options_of;
use registry::{
    ClientOptions, Credential, Network, Proxies, RegistryClient, RemoteBlob, RetryPolicy, Timeouts,
};
use source::{ByteSource as _, Class, OneBuffer, SourceError};

const REPOSITORY: &str = "team/app";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn settings(text: &str) -> ServiceConfig {
    let (config, warnings) = ServiceConfig::parse(text, "test.json").unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    config
}

/// Client options from a host's configuration, without the files of this machine, and with short pauses.
fn options(text: &str) -> ClientOptions {
    let retry = RetryPolicy {
        max_tries: 4,
        deadline: Duration::from_secs(10),
        first_pause: Duration::from_millis(2),
        max_pause: Duration::from_millis(20),
    };
    ClientOptions {
        credential_files: Vec::new(),
        proxies: Proxies::Direct,
        retry,
        read_retry: retry,
        timeouts: Timeouts {
            connect: Duration::from_secs(2),
            head: Duration::from_secs(5),
            idle: Duration::from_secs(5),
        },
        ..options_of(&settings(text))
    }
}

/// A registry's mirrors, as the configuration names them.
fn mirrored(registry: &Double, mirrors: &[&Double]) -> ClientOptions {
    let urls: Vec<_> = mirrors.iter().map(|mirror| mirror.base_url()).collect();
    let mirrors = serde_json::json!({"turbobd": {"mirrors": {registry.host(): urls}}});
    options(&mirrors.to_string())
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(step).collect()
}

fn blob(options: ClientOptions, registry: &str, bytes: &[u8]) -> RemoteBlob {
    let repository =
        RegistryClient::new(options).unwrap().repository(registry, REPOSITORY).unwrap();
    repository.blob(&Digest::of(bytes), bytes.len() as u64).unwrap()
}

fn read(blob: &RemoteBlob, offset: usize, length: usize) -> Result<Vec<u8>, SourceError> {
    let mut buf = vec![0; length];
    blob.read_exact_at(&mut buf, offset as u64).map(|()| buf)
}

fn prefetch(blob: &RemoteBlob, class: Class, offset: usize, length: usize) -> Vec<u8> {
    let mut buf = vec![0; length];
    let range = offset as u64..(offset + length) as u64;
    blob.read_run(range, class, &mut OneBuffer::new(&mut buf)).unwrap();
    buf
}

#[track_caller]
fn assert_reads(blob: &RemoteBlob, bytes: &[u8], offset: usize, length: usize) {
    let got = read(blob, offset, length).unwrap();
    assert!(got == bytes[offset..offset + length], "wrong bytes at {offset}");
}

/// Registries that all have the same blob.
fn registries<const N: usize>(bytes: &[u8]) -> [Double; N] {
    std::array::from_fn(|_| {
        let registry = Double::start();
        registry.add_blob(REPOSITORY, bytes);
        registry
    })
}

// Mirrors.

#[test]
fn mirrors_are_asked_in_order_before_the_registry_and_told_whom_they_stand_for() {
    let bytes = noise(10_000);
    let [registry, first, second] = registries(&bytes);
    first.add_manifest(REPOSITORY, "v1", MANIFEST, b"{}");
    let options = mirrored(&registry, &[&first, &second]);
    let repository = RegistryClient::new(options.clone())
        .unwrap()
        .repository(&registry.host(), REPOSITORY)
        .unwrap();
    assert_eq!(repository.manifest("v1").unwrap().bytes, b"{}");
    let blob = blob(options, &registry.host(), &bytes);
    assert_reads(&blob, &bytes, 100, 50);
    assert_eq!((first.log().len(), second.log().len(), registry.log().len()), (2, 0, 0));
    let told = format!("?ns={}", registry.host().replace('.', "%2E").replace(':', "%3A"));
    assert!(first.log().iter().all(|seen| seen.line.ends_with(&told)), "{:?}", first.log());
}

#[test]
fn a_mirror_with_a_path_stands_for_all_of_v2() {
    let bytes = noise(1000);
    let registry = Double::start();
    let mirror = Double::start();
    mirror.add_blob(&format!("hub/{REPOSITORY}"), &bytes);
    let url = format!("{}/v2/hub", mirror.base_url());
    let text = serde_json::json!({"turbobd": {"mirrors": {"*": [url]}}}).to_string();
    assert_reads(&blob(options(&text), &registry.host(), &bytes), &bytes, 10, 10);
    assert_eq!(registry.log().len(), 0);
}

#[test]
fn a_mirror_that_is_down_or_has_not_the_blob_costs_one_question() {
    let bytes = noise(100_000);
    let [registry, broken] = registries(&bytes);
    let (gone, empty) = (Double::start(), Double::start());
    broken.fault("GET", Fault::Status(503), 100);
    let options = mirrored(&registry, &[&gone, &empty, &broken]);
    drop(gone);
    let network = options.network.clone();
    let blob = blob(options, &registry.host(), &bytes);
    for offset in 0..5 {
        assert_reads(&blob, &bytes, offset * 100, 50);
    }
    assert_eq!((empty.log().len(), broken.log().len(), registry.log().len()), (1, 1, 5));
    assert_eq!(blob.stats().retries.get(), 0, "all within one try, without a pause");
    let well = network.hosts().iter().filter(|host| host.is_healthy()).count();
    assert_eq!(well, 2, "the registry and the mirror that only lacks a blob");
}

#[test]
fn a_mirror_that_breaks_off_is_followed_by_the_next_and_nothing_is_fetched_twice() {
    let bytes = noise(400_000);
    let [registry, mirror] = registries(&bytes);
    mirror.fault("GET", Fault::DropAfter(300_000), 1);
    let blob = blob(mirrored(&registry, &[&mirror]), &registry.host(), &bytes);
    assert_reads(&blob, &bytes, 0, 399_999);
    let rest = registry.log()[0].range.clone().unwrap();
    let start: usize =
        rest.trim_start_matches("bytes=").split('-').next().unwrap().parse().unwrap();
    assert!(start > 100_000, "{rest}");
}

#[test]
fn a_mirror_that_lied_is_passed_over() {
    let bytes = noise(10_000);
    let [registry, mirror] = registries(&bytes);
    mirror.fault("GET", Fault::Flip(120, 1), 100);
    let options = mirrored(&registry, &[&mirror]);
    let network = options.network.clone();
    let blob = blob(options, &registry.host(), &bytes);
    assert_ne!(read(&blob, 100, 50).unwrap(), &bytes[100..150], "only checksums see it");
    blob.distrust(100..150);
    assert_reads(&blob, &bytes, 100, 50);
    assert_eq!((mirror.log().len(), registry.log().len()), (1, 1));
    let hosts = network.hosts();
    let liar = hosts.iter().find(|host| host.name() == mirror.host()).unwrap();
    assert_eq!(liar.stats().distrusted.get(), 1);
}

#[test]
fn when_all_fail_the_registrys_reason_is_told_and_all_are_asked_again() {
    let bytes = noise(1000);
    let [registry, mirror] = registries(&bytes);
    registry.fault("GET", Fault::Status(500), 100);
    mirror.fault("GET", Fault::Status(502), 2);
    let blob = blob(mirrored(&registry, &[&mirror]), &registry.host(), &bytes);
    assert_reads(&blob, &bytes, 10, 10);
    assert_eq!(blob.stats().retries.get(), 2);
    mirror.fault("GET", Fault::Status(502), 100);
    let error = read(&blob, 10, 10).unwrap_err().to_string();
    assert!(error.contains(&registry.host()) && error.contains("500"), "{error}");
}

#[test]
fn what_is_for_the_registry_never_goes_to_a_mirror() {
    let bytes = noise(1000);
    let [registry, mirror] = registries(&bytes);
    mirror.set_access(Access::Basic("me:secret".into()));
    registry.set_access(Access::Basic("me:secret".into()));
    let given = ClientOptions {
        credential: Some(Credential::from_user_password("me:secret")),
        ..mirrored(&registry, &[&mirror])
    };
    assert_reads(&blob(given, &registry.host(), &bytes), &bytes, 10, 10);
    assert!(mirror.log().iter().all(|seen| seen.authorization.is_none()), "{:?}", mirror.log());

    // Credentials of a file for the mirror's own host are used for the mirror.
    let file = tempfile::NamedTempFile::new().unwrap();
    let auths =
        serde_json::json!({"auths": {mirror.host(): {"username": "me", "password": "secret"}}});
    std::fs::write(file.path(), auths.to_string()).unwrap();
    let known = ClientOptions {
        credential_files: vec![file.path().to_owned()],
        ..mirrored(&registry, &[&mirror])
    };
    registry.clear_log();
    assert_reads(&blob(known, &registry.host(), &bytes), &bytes, 10, 10);
    assert_eq!(registry.log().len(), 0);
}

#[test]
fn a_whole_blob_comes_from_a_mirror_too() {
    let bytes = noise(300_000);
    let [registry, mirror] = registries(&bytes);
    mirror.fault("GET", Fault::DropAfter(100_000), 1);
    let client = RegistryClient::new(mirrored(&registry, &[&mirror])).unwrap();
    let repository = client.repository(&registry.host(), REPOSITORY).unwrap();
    let mut all = Vec::new();
    let mut stream = repository.blob_stream(&Digest::of(&bytes), bytes.len() as u64, &[]).unwrap();
    stream.read_to_end(&mut all).unwrap();
    assert!(all == bytes);
    assert_eq!((mirror.log().len(), registry.log().len()), (1, 1));
}

// Peers.

fn with_peer(peer: &Double) -> ClientOptions {
    let address = format!("{}/accelerator", peer.base_url());
    let text = serde_json::json!({"p2pConfig": {"enable": true, "address": address}});
    options(&text.to_string())
}

#[test]
fn a_peer_is_given_the_actual_url() {
    let bytes = noise(10_000);
    let [registry] = registries(&bytes);
    let peer = Double::start_peer_of(&registry);
    let blob = blob(with_peer(&peer), &registry.host(), &bytes);
    for offset in [100, 200, 300] {
        assert_reads(&blob, &bytes, offset, 50);
    }
    assert_eq!(registry.log().len(), 1, "where the bytes are is asked once");
    let line = &peer.log()[0].line;
    let expected = format!("GET /accelerator/http://{}/v2/team/app/blobs/", registry.host());
    assert!(line.starts_with(&expected), "{line}");
    assert_eq!(peer.log().len(), 3);

    // After a redirect it is the signed URL.
    let [registry] = registries(&bytes);
    let store = Double::start_storage_of(&registry);
    let peer = Double::start_peer_of(&registry);
    registry.fault("/blobs/", Fault::Redirect(store.base_url(), 600), 100);
    let blob = self::blob(with_peer(&peer), &registry.host(), &bytes);
    for offset in [100, 200, 300] {
        assert_reads(&blob, &bytes, offset, 50);
    }
    assert_eq!((registry.log().len(), store.log().len(), peer.log().len()), (1, 1, 3));
    let expected = format!("GET /accelerator/http://{}/storage/", store.host());
    assert!(peer.log()[2].line.starts_with(&expected), "{:?}", peer.log());
}

#[test]
fn a_peer_that_is_gone_or_errs_is_gone_past_within_the_read() {
    for fault in [
        Fault::Status(502),
        Fault::Status(404),
        Fault::IgnoreRange,
        Fault::ContentRange("bytes 0-9/10000".into()),
        Fault::DropAfter(1000),
        Fault::ShortBody(3),
    ] {
        let bytes = noise(10_000);
        let [registry] = registries(&bytes);
        let peer = Double::start_peer_of(&registry);
        let blob = blob(with_peer(&peer), &registry.host(), &bytes);
        assert_reads(&blob, &bytes, 100, 50);
        peer.fault("GET", fault.clone(), 100);
        assert_reads(&blob, &bytes, 100, 5000);
        assert_reads(&blob, &bytes, 200, 5000);
        assert_eq!(peer.log().len(), 2, "{fault:?}: it is passed over for a while");
        assert_eq!(blob.stats().retries.get(), 0, "{fault:?}");
    }
    let bytes = noise(10_000);
    let [registry] = registries(&bytes);
    let peer = Double::start_peer_of(&registry);
    let blob = blob(with_peer(&peer), &registry.host(), &bytes);
    assert_reads(&blob, &bytes, 100, 50);
    drop(peer);
    assert_reads(&blob, &bytes, 100, 5000);
    assert_eq!(blob.stats().retries.get(), 0);
}

#[test]
fn a_peer_that_comes_back_is_used_again() {
    let bytes = noise(10_000);
    let [registry] = registries(&bytes);
    let peer = Double::start_peer_of(&registry);
    let blob = blob(with_peer(&peer), &registry.host(), &bytes);
    peer.fault("GET", Fault::Status(503), 1);
    assert_reads(&blob, &bytes, 100, 50);
    thread::sleep(Duration::from_millis(1050));
    assert_reads(&blob, &bytes, 100, 50);
    assert_eq!(peer.log().iter().map(|seen| seen.status).collect::<Vec<_>>(), [503, 206]);
}

#[test]
fn a_peer_with_wrong_bytes_is_not_asked_for_this_blob_again() {
    let bytes = noise(10_000);
    let [registry] = registries(&bytes);
    let peer = Double::start_peer_of(&registry);
    peer.fault("GET", Fault::Flip(120, 1), 100);
    let blob = blob(with_peer(&peer), &registry.host(), &bytes);
    assert_ne!(read(&blob, 100, 50).unwrap(), &bytes[100..150]);
    blob.distrust(100..150);
    assert_reads(&blob, &bytes, 100, 50);
    assert_eq!(peer.log().len(), 1);
}

#[test]
fn a_token_that_ran_out_is_renewed_past_the_peer() {
    let bytes = noise(10_000);
    let [registry] = registries(&bytes);
    let long = Duration::from_secs(600);
    registry.set_access(Access::Bearer {
        login: None,
        stated_life: long,
        real_life: long,
        refusal: 401,
    });
    let peer = Double::start_peer_of(&registry);
    let blob = blob(with_peer(&peer), &registry.host(), &bytes);
    assert_reads(&blob, &bytes, 100, 50);
    assert_eq!(peer.log()[0].status, 206, "the peer is given the token");
    registry.revoke_tokens();
    assert_reads(&blob, &bytes, 200, 50);
    assert_eq!(registry.count("/token"), 2);
}

// Second requests.

/// Reads until the host's usual wait is known.
fn warm(blob: &RemoteBlob, bytes: &[u8]) {
    for turn in 0..12 {
        assert_reads(blob, bytes, turn * 10, 10);
    }
}

#[test]
fn a_straggler_is_asked_for_twice_and_the_first_answer_wins() {
    let bytes = noise(1 << 20);
    let [registry] = registries(&bytes);
    let blob = blob(options("{}"), &registry.host(), &bytes);
    warm(&blob, &bytes);
    registry.clear_log();
    registry.fault("GET", Fault::Delay(Duration::from_secs(3)), 1);
    let begun = Instant::now();
    assert_reads(&blob, &bytes, 5000, 100_000);
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!((blob.stats().hedges.get(), blob.stats().hedges_won.get()), (1, 1));
    assert_eq!(blob.stats().retries.get(), 0);
}

#[test]
fn the_second_request_goes_to_another_way_if_there_is_one() {
    let bytes = noise(1 << 20);
    let [registry, mirror] = registries(&bytes);
    let blob = blob(mirrored(&registry, &[&mirror]), &registry.host(), &bytes);
    warm(&blob, &bytes);
    mirror.fault("GET", Fault::Delay(Duration::from_secs(3)), 1);
    let begun = Instant::now();
    assert_reads(&blob, &bytes, 5000, 100_000);
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!(registry.log().len(), 1);
}

#[test]
fn a_stall_in_the_middle_is_asked_around_for_the_rest_only() {
    let bytes = noise(1 << 20);
    let [registry] = registries(&bytes);
    let blob = blob(options("{}"), &registry.host(), &bytes);
    warm(&blob, &bytes);
    registry.clear_log();
    registry.fault("GET", Fault::StallAfter(200_000), 1);
    let begun = Instant::now();
    assert_reads(&blob, &bytes, 0, 500_000);
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!(blob.stats().hedges_won.get(), 1);
    let second = registry.log()[1].range.clone().unwrap();
    let start: usize =
        second.trim_start_matches("bytes=").split('-').next().unwrap().parse().unwrap();
    assert!(start > 50_000, "{second}");
}

#[test]
fn what_nobody_waits_for_is_asked_for_once() {
    let bytes = noise(1 << 20);
    let [registry] = registries(&bytes);
    let blob = blob(options("{}"), &registry.host(), &bytes);
    warm(&blob, &bytes);
    registry.clear_log();
    registry.fault("GET", Fault::Delay(Duration::from_millis(300)), 1);
    assert!(prefetch(&blob, Class::Prefetch, 5000, 1000) == bytes[5000..6000]);
    assert_eq!((registry.log().len(), blob.stats().hedges.get()), (1, 0));
}

#[test]
fn second_requests_can_be_switched_off_and_have_a_budget() {
    let bytes = noise(100_000);
    let [registry] = registries(&bytes);
    let off = r#"{"turbobd": {"hedge": {"enable": false}}}"#;
    let blob = blob(options(off), &registry.host(), &bytes);
    warm(&blob, &bytes);
    registry.fault("GET", Fault::Delay(Duration::from_millis(300)), 1);
    assert_reads(&blob, &bytes, 500, 100);
    assert_eq!(blob.stats().hedges.get(), 0);

    // A host that is slow as a whole does not get every request twice.
    let [registry] = registries(&bytes);
    let blob = self::blob(options("{}"), &registry.host(), &bytes);
    warm(&blob, &bytes);
    registry.fault("GET", Fault::Delay(Duration::from_millis(100)), 1000);
    for turn in 0..30 {
        assert_reads(&blob, &bytes, 500 + turn, 100);
    }
    assert!(blob.stats().hedges.get() <= 10, "{:?}", blob.stats());
}

// Outages and limits.

#[test]
fn the_readers_of_a_dead_registry_do_not_storm_it() {
    let bytes = noise(1000);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut options = options("{}");
    options.read_retry.max_tries = 100_000;
    options.read_retry.deadline = Duration::from_millis(1500);
    let blob = Arc::new(blob(options, &host, &bytes));
    let readers = (0..16).map(|_| {
        let blob = blob.clone();
        thread::spawn(move || read(&blob, 10, 10).unwrap_err())
    });
    readers.collect::<Vec<_>>().into_iter().for_each(|reader| drop(reader.join().unwrap()));
    // 16 first tries, 16 of the burst and 6 of the time; a connection may be opened ahead for each.
    let made = connections.load(Ordering::Relaxed);
    assert!((32..90).contains(&made), "{made} connections; without turns it is some thousand");
}

#[test]
fn limits_are_for_what_nobody_waits_for() {
    let bytes = noise(1 << 20);
    let [registry] = registries(&bytes);
    let limited = r#"{"turbobd": {"rateLimitMBps": 1}}"#;
    let blob = blob(options(limited), &registry.host(), &bytes);
    let timed = |class| {
        let begun = Instant::now();
        for turn in 0..3 {
            prefetch(&blob, class, turn * 200_000, 200_000);
        }
        begun.elapsed().as_secs_f64()
    };
    assert!(timed(Class::Demand) < 0.3);
    let ahead = timed(Class::Prefetch);
    assert!((0.4..2.0).contains(&ahead), "600 kB, 100 of them at once, at 1 MB/s took {ahead} s");
    assert!(timed(Class::Demand) < 0.3, "a debt of others is not demand's");
    assert!(
        Network::default().limits().wait(Class::Fill, 1 << 30).is_zero(),
        "no limit by default"
    );
}

// Sources of passwords.

/// Answers every request on `stream` once with `body`; returns the requests.
fn answer(mut stream: impl Read + Write, body: &str) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read_exact(&mut byte).is_err() {
            break;
        }
        head.push(byte[0]);
    }
    let text = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.write_all(text.as_bytes());
    String::from_utf8_lossy(&head).into_owned()
}

fn service_answer(registry: &Double) -> String {
    // The longest match wins, in any order.
    serde_json::json!({"traceId": "1", "success": true, "data": {"auths": {
        registry.host(): {"username": "me", "password": "wrong"},
        format!("{}/team", registry.host()): {"username": "me", "password": "secret"},
    }}})
    .to_string()
}

fn serve_http(body: String, times: usize) -> (String, thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve =
        move || (0..times).map(|_| answer(listener.accept().unwrap().0, &body)).collect::<Vec<_>>();
    (address, thread::spawn(serve))
}

fn locked() -> (Double, Vec<u8>) {
    let bytes = noise(1000);
    let [registry] = registries(&bytes);
    registry.set_access(Access::Basic("me:secret".into()));
    (registry, bytes)
}

fn credential_config(mode: &str, path: &str, more: serde_json::Value) -> String {
    let mut config = serde_json::json!({"mode": mode, "path": path});
    if let (Some(config), serde_json::Value::Object(more)) = (config.as_object_mut(), more) {
        config.extend(more);
    }
    serde_json::json!({"credentialConfig": config}).to_string()
}

#[test]
fn a_service_is_asked_for_credentials_over_http() {
    let (registry, bytes) = locked();
    let (address, asked) = serve_http(service_answer(&registry), 1);
    let config =
        credential_config("http", &format!("http://{address}/auth"), serde_json::json!({}));
    assert_reads(&blob(options(&config), &registry.host(), &bytes), &bytes, 10, 10);
    let head = &asked.join().unwrap()[0];
    let url = format!("http://{}/v2/team/app/blobs/", registry.host());
    let line = head.lines().next().unwrap();
    let query = line.strip_prefix("GET /auth?remote_url=").unwrap().split(' ').next().unwrap();
    assert_eq!(percent_encoding::percent_decode_str(query).decode_utf8_lossy(), url);
}

#[test]
fn a_service_is_asked_for_credentials_over_a_socket() {
    let (registry, bytes) = locked();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("auth.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let body = service_answer(&registry);
    let asked = thread::spawn(move || answer(listener.accept().unwrap().0, &body));
    let config = credential_config("uds", path.to_str().unwrap(), serde_json::json!({}));
    assert_reads(&blob(options(&config), &registry.host(), &bytes), &bytes, 10, 10);
    let head = asked.join().unwrap();
    assert!(
        head.starts_with("GET /auth?remote_url=") && head.contains("host: localhost"),
        "{head}"
    );
}

#[test]
fn a_service_is_asked_for_credentials_over_tls_with_our_certificate() {
    let Some(authority) = tls_front::Authority::make() else { return };
    let (registry, bytes) = locked();
    let (address, _asked) = serve_http(service_answer(&registry), 1);
    let front = tls_front::TlsFront::start(&authority, &address, true);
    let (certificate, key) = authority.client();
    let more = serde_json::json!({
        "timeout": 5, "server_ca_path": authority.certificate(),
        "client_cert_path": certificate, "client_key_path": key,
    });
    let config = credential_config("https", &format!("https://{}/auth", front.host()), more);
    assert_reads(&blob(options(&config), &registry.host(), &bytes), &bytes, 10, 10);
}

#[test]
fn a_file_is_asked_for_credentials() {
    let (registry, bytes) = locked();
    let file = tempfile::NamedTempFile::new().unwrap();
    let auths =
        serde_json::json!({"auths": {registry.host(): {"username": "me", "password": "secret"}}});
    std::fs::write(file.path(), auths.to_string()).unwrap();
    let path = file.path().to_str().unwrap();
    for text in [
        credential_config("file", path, serde_json::json!({})),
        serde_json::json!({"credentialFilePath": path}).to_string(),
    ] {
        let given = ClientOptions {
            credential_files: options_of(&settings(&text)).credential_files,
            ..options(&text)
        };
        assert_eq!(given.credential_files[0], file.path());
        assert_reads(&blob(given, &registry.host(), &bytes), &bytes, 10, 10);
    }
}

#[test]
fn a_service_that_fails_is_named_when_access_is_denied_and_no_secret_is() {
    let (registry, bytes) = locked();
    for (body, reason) in [
        (r#"{"success": false}"#, "its answer says that it failed"),
        (r#"{"success": true, "data": {"auths": {"x": "hunter2"}}}"#, "not in docker's form"),
        ("hunter2", "its answer is not valid JSON of credentials"),
    ] {
        let (address, asked) = serve_http(body.to_owned(), 1);
        let config = credential_config("http", &address, serde_json::json!({}));
        let error = read(&blob(options(&config), &registry.host(), &bytes), 10, 10).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(text.contains(reason) && text.contains(&address), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
        asked.join().unwrap();
    }
    // Without an answer, it is given up after its timeout.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let config = credential_config("http", &address, serde_json::json!({}));
    let begun = Instant::now();
    let error = read(&blob(options(&config), &registry.host(), &bytes), 10, 10).unwrap_err();
    assert!(error.to_string().contains("The credential service"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    drop(TcpStream::connect(address));
}

#[test]
fn the_hosts_certificate_and_authority_are_used_for_registries() {
    let Some(authority) = tls_front::Authority::make() else { return };
    let bytes = noise(1000);
    let [registry] = registries(&bytes);
    let front = tls_front::TlsFront::start(&authority, &registry.host(), true);
    let (certificate, key) = authority.client();
    let text = serde_json::json!({
        "certConfig": {"certFile": certificate, "keyFile": key},
        "turbobd": {"authorities": [authority.certificate()]}, "userAgent": "fleet/7",
    })
    .to_string();
    let host = format!("https://{}", front.host());
    assert_reads(&blob(options(&text), &host, &bytes), &bytes, 10, 10);
    // A registry on this machine is still reached in clear text.
    assert_reads(&blob(options(&text), &registry.host(), &bytes), &bytes, 10, 10);
}
