//! The distribution client against a registry with injected faults, and against a real one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::machine;
use crate::registry_double::real;
use crate::registry_double::tls_front;
use std::error::Error as _;
use std::io::{self, Cursor, Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::registry_double::{Access, Double, Fault};
use bytes::Bytes;
use formats::oci::Digest;
use registry::{
    ClientCertificate, ClientOptions, Credential, Proxies, RegistryClient, RegistryError,
    RemoteBlob, Repository, RetryPolicy, Timeouts,
};
use source::{ByteSource as _, SourceError};

const REPOSITORY: &str = "team/app";

/// No files of this machine, no proxies, short pauses.
fn options() -> ClientOptions {
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
            head: Duration::from_secs(2),
            idle: Duration::from_millis(400),
        },
        ..ClientOptions::default()
    }
}

fn repository_with(registry: &Double, options: ClientOptions) -> Repository {
    RegistryClient::new(options).unwrap().repository(&registry.host(), REPOSITORY).unwrap()
}

fn repository(registry: &Double) -> Repository {
    repository_with(registry, options())
}

fn login(text: &str) -> ClientOptions {
    ClientOptions { credential: Some(Credential::from_user_password(text)), ..options() }
}

/// Bytes that differ everywhere: a piece from the wrong place is detected.
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

/// A registry with one blob, and a reader of it.
fn one_blob(length: usize) -> (Double, Vec<u8>, RemoteBlob) {
    let registry = Double::start();
    let bytes = noise(length);
    let digest = registry.add_blob(REPOSITORY, &bytes);
    let blob = repository(&registry).blob(&digest, length as u64).unwrap();
    (registry, bytes, blob)
}

fn read(blob: &RemoteBlob, offset: u64, length: usize) -> Result<Vec<u8>, SourceError> {
    let mut buf = vec![0; length];
    blob.read_exact_at(&mut buf, offset).map(|()| buf)
}

/// The error of a read.
#[track_caller]
fn failure(blob: &RemoteBlob, offset: u64, length: usize) -> String {
    match read(blob, offset, length) {
        Ok(_) => panic!("a read at {offset} succeeded"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn assert_reads(blob: &RemoteBlob, bytes: &[u8], offset: usize, length: usize) {
    assert!(
        read(blob, offset as u64, length).unwrap() == bytes[offset..offset + length],
        "wrong bytes at {offset}"
    );
}

fn bearer(login: Option<&str>, life: Duration, refusal: u16) -> Access {
    let stated_life = Duration::from_secs(300);
    Access::Bearer { login: login.map(Into::into), stated_life, real_life: life, refusal }
}

const LONG: Duration = Duration::from_secs(600);

// Ranges.

#[test]
fn a_range_costs_one_request_and_its_own_bytes() {
    let (registry, bytes, blob) = one_blob(1 << 20);
    assert_reads(&blob, &bytes, 0, 10);
    assert_reads(&blob, &bytes, 300_000, 500_000);
    assert_reads(&blob, &bytes, (1 << 20) - 1, 1);
    assert_reads(&blob, &bytes, 0, 1 << 20);
    assert_eq!(registry.log().len(), 4, "no probe, no HEAD");
    assert_eq!(registry.log()[1].range.as_deref(), Some("bytes=300000-799999"));
    assert_eq!(blob.stats().bytes.get(), 500_011 + (1 << 20));
    assert_eq!(blob.stats().requests.get(), 4);
}

#[test]
fn a_read_past_the_end_asks_nothing() {
    let (registry, _, blob) = one_blob(100);
    assert!(matches!(read(&blob, 99, 2), Err(SourceError::PastEnd { .. })));
    assert!(matches!(read(&blob, u64::MAX, 2), Err(SourceError::PastEnd { .. })));
    assert!(read(&blob, 100, 0).is_ok());
    assert_eq!(registry.log().len(), 0);
}

#[test]
fn two_hundred_to_a_range_is_an_error_not_the_blobs_first_bytes() {
    let (registry, bytes, blob) = one_blob(1000);
    registry.fault("GET", Fault::IgnoreRange, 100);
    for (offset, length) in [(500, 10), (0, 10)] {
        let error = failure(&blob, offset, length);
        assert!(error.contains("The registry ignores range requests"), "{error}");
    }
    assert_eq!(registry.log().len(), 2, "this can never succeed: no retries");
    assert_reads(&blob, &bytes, 0, 1000);
}

#[test]
fn short_long_and_misplaced_bodies_are_retried_and_never_served() {
    for fault in [
        Fault::ShortBody(1),
        Fault::ShortBody(200_000),
        Fault::LongBody(1),
        Fault::DropAfter(0),
        Fault::DropAfter(70_000),
        Fault::StallAfter(70_000),
        Fault::ContentRange("bytes 0-199999/400000".into()),
        Fault::ContentRange("bytes 100-200100/400000".into()),
        Fault::ContentRange("bytes 100-200099/*".into()),
        Fault::ContentRange("nonsense".into()),
        Fault::Status(500),
        Fault::Status(502),
        Fault::RetryAfter(503, "0".into()),
        Fault::RetryAfter(429, "0".into()),
        Fault::Location("ftp://127.0.0.1/".into()),
    ] {
        let (registry, bytes, blob) = one_blob(400_000);
        registry.fault("GET", fault.clone(), 2);
        assert_reads(&blob, &bytes, 100, 200_000);
        assert_eq!(blob.stats().retries.get(), 2, "{fault:?}");
        registry.fault("GET", fault.clone(), 100);
        if matches!(fault, Fault::DropAfter(70_000) | Fault::StallAfter(70_000)) {
            assert_reads(&blob, &bytes, 100, 200_000); // in three pieces
            continue;
        }
        let text = failure(&blob, 100, 200_000);
        assert!(text.starts_with("Cannot fetch bytes 100..200100 of sha256:"), "{text}");
        assert!(text.contains("gave up after 4 tries"), "{fault:?}: {text}");
    }
}

#[test]
fn what_arrived_before_a_break_is_not_fetched_again() {
    let (registry, bytes, blob) = one_blob(400_000);
    registry.fault("GET", Fault::DropAfter(300_000), 1);
    assert_reads(&blob, &bytes, 0, 399_999);
    let second = registry.log()[1].range.clone().unwrap();
    let start: usize =
        second.trim_start_matches("bytes=").split('-').next().unwrap().parse().unwrap();
    assert!(start > 100_000, "{second}");
}

#[test]
fn another_size_than_the_descriptors_fails_at_once() {
    let (registry, bytes, _) = one_blob(1000);
    let wrong = repository(&registry).blob(&Digest::of(&bytes), 2000).unwrap();
    for (offset, length) in [(0, 10), (0, 2000)] {
        let error = failure(&wrong, offset, length);
        assert!(
            error.contains("has 1000 bytes of this blob, but its descriptor says 2000"),
            "{error}"
        );
    }
    assert_eq!(registry.log().len(), 2);
}

#[test]
fn what_can_never_succeed_fails_after_one_request() {
    let (registry, _, _) = one_blob(10);
    let blob = repository(&registry).blob(&Digest::of(b"no such blob"), 10).unwrap();
    let error = failure(&blob, 0, 5);
    assert!(error.contains("Not found: this blob"), "{error}");
    assert_eq!(registry.log().len(), 1);
    assert_eq!(blob.stats().failures.get(), 1);
}

#[test]
fn retry_after_is_honoured_within_the_deadline_only() {
    let (registry, bytes, blob) = one_blob(1000);
    registry.fault("GET", Fault::RetryAfter(429, "1".into()), 1);
    let started = Instant::now();
    assert_reads(&blob, &bytes, 1, 10);
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());

    registry.fault("GET", Fault::RetryAfter(503, "3600".into()), 1);
    let started = Instant::now();
    let error = failure(&blob, 1, 10);
    assert!(error.contains("limits the rate") && error.contains("3600 s"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1), "an hour does not fit in ten seconds");
}

#[test]
fn a_read_ends_by_its_deadline_whatever_the_server_does() {
    let registry = Double::start();
    let digest = registry.add_blob(REPOSITORY, &noise(1000));
    let mut options = options();
    options.read_retry.deadline = Duration::from_millis(600);
    options.read_retry.max_tries = 1000;
    let blob = repository_with(&registry, options).blob(&digest, 1000).unwrap();
    registry.fault("GET", Fault::Delay(Duration::from_secs(30)), 1000);
    let started = Instant::now();
    let error = failure(&blob, 1, 10);
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    assert!(error.contains("while waiting for an answer"), "{error}");
}

#[test]
fn many_threads_read_one_blob() {
    let (registry, bytes, blob) = one_blob(2_000_000);
    registry.set_access(bearer(None, LONG, 401));
    let (blob, bytes) = (Arc::new(blob), Arc::new(bytes));
    let readers = (0..16).map(|reader: usize| {
        let (blob, bytes) = (blob.clone(), bytes.clone());
        thread::spawn(move || {
            for turn in 0..8 {
                let offset = (reader * 8 + turn) * 15_000;
                assert_reads(&blob, &bytes, offset, 15_001);
            }
        })
    });
    readers.collect::<Vec<_>>().into_iter().for_each(|reader| reader.join().unwrap());
    assert_eq!(registry.count("/token"), 1, "one thread fetches the token, the others take it");
}

#[test]
fn no_server_at_all_is_said_with_its_name() {
    let gone = Double::start();
    let host = gone.host();
    drop(gone);
    let repository = RegistryClient::new(options()).unwrap().repository(&host, REPOSITORY).unwrap();
    let error = repository.manifest("latest").unwrap_err();
    assert!(matches!(error.root(), RegistryError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&host) && text.contains("manifest latest") && text.contains("4 tries"),
        "{text}"
    );
}

// Redirects.

#[test]
fn redirects_are_kept_and_credentials_stay_home() {
    let (registry, bytes, _) = one_blob(1000);
    let store = Double::start_storage_of(&registry);
    registry.set_access(bearer(Some("me:secret"), LONG, 401));
    registry.fault("/blobs/sha256", Fault::Redirect(store.base_url(), 600), 100);
    let blob =
        repository_with(&registry, login("me:secret")).blob(&Digest::of(&bytes), 1000).unwrap();
    for offset in [0, 100, 200, 300] {
        assert_reads(&blob, &bytes, offset, 50);
    }
    assert_eq!(store.log().len(), 4);
    assert!(
        store.log().iter().all(|seen| seen.authorization.is_none()),
        "a token went to another host"
    );
    assert_eq!(registry.count("/token"), 1);
    assert_eq!(
        registry.count("/blobs/"),
        2,
        "401, then the redirect; after that straight to the store"
    );
}

#[test]
fn an_expired_url_is_not_used_and_a_refused_one_is_replaced() {
    let (registry, bytes, blob) = one_blob(1000);
    let store = Double::start_storage_of(&registry);
    registry.fault("/blobs/", Fault::Redirect(store.base_url(), 600), 100);
    assert_reads(&blob, &bytes, 10, 5);
    registry.revoke_signatures();
    assert_reads(&blob, &bytes, 20, 5);
    assert_eq!(store.log().iter().map(|seen| seen.status).collect::<Vec<_>>(), [206, 403, 206]);
    assert_eq!(blob.stats().retries.get(), 0, "replaced within the same try");

    let (registry, bytes, blob) = one_blob(1000);
    let store = Double::start_storage_of(&registry);
    registry.fault("/blobs/", Fault::Redirect(store.base_url(), 2), 100);
    assert_reads(&blob, &bytes, 10, 5);
    thread::sleep(Duration::from_millis(2100));
    assert_reads(&blob, &bytes, 20, 5);
    assert!(store.log().iter().all(|seen| seen.status == 206), "an expired URL was tried");
}

#[test]
fn a_redirect_in_a_circle_ends() {
    let (registry, _, blob) = one_blob(100);
    registry.fault("GET", Fault::Location("?again".into()), 1000);
    let error = failure(&blob, 1, 5);
    assert!(error.contains("redirects more than 5 times"), "{error}");
    assert_eq!(registry.log().len(), 6 * 4);
}

#[test]
fn faults_of_the_store_are_met_as_those_of_the_registry() {
    for fault in [Fault::IgnoreRange, Fault::Status(500), Fault::ShortBody(1), Fault::Status(404)] {
        let (registry, bytes, blob) = one_blob(1000);
        let store = Double::start_storage_of(&registry);
        registry.fault("/blobs/", Fault::Redirect(store.base_url(), 600), 100);
        store.fault("GET", fault.clone(), 1);
        let first = read(&blob, 10, 5);
        assert_eq!(first.is_err(), matches!(fault, Fault::IgnoreRange), "{fault:?} {first:?}");
        assert_reads(&blob, &bytes, 20, 5);
    }
}

// Authentication.

#[test]
fn a_token_is_fetched_with_encoded_values_and_used_for_all() {
    let (registry, bytes, _) = one_blob(1000);
    registry.add_manifest(
        REPOSITORY,
        "latest",
        "application/vnd.oci.image.manifest.v1+json",
        b"{}",
    );
    registry.set_access(bearer(Some("me:p:w"), LONG, 401));
    let repository = repository_with(&registry, login("me:p:w"));
    let blob = repository.blob(&Digest::of(&bytes), 1000).unwrap();
    repository.manifest("latest").unwrap();
    assert_reads(&blob, &bytes, 10, 5);
    let tokens: Vec<_> =
        registry.log().into_iter().filter(|seen| seen.line.contains("/token")).collect();
    assert_eq!(tokens.len(), 1);
    let line = "GET /token?service=the%20double%20%26%20co&scope=repository%3Ateam%2Fapp%3Apull";
    assert_eq!(tokens[0].line, line);
}

#[test]
fn a_token_that_ran_out_is_replaced_on_401_and_on_403() {
    for refusal in [401, 403] {
        let (registry, bytes, _) = one_blob(1000);
        registry.set_access(bearer(Some("me:secret"), LONG, refusal));
        let blob =
            repository_with(&registry, login("me:secret")).blob(&Digest::of(&bytes), 1000).unwrap();
        assert_reads(&blob, &bytes, 10, 5);
        registry.revoke_tokens();
        assert_reads(&blob, &bytes, 20, 5);
        assert_eq!(registry.count("/token"), 2);
        assert_eq!(blob.stats().retries.get(), 0);
    }
}

#[test]
fn a_token_is_replaced_before_it_runs_out() {
    let (registry, bytes, blob) = one_blob(1000);
    let life = Duration::from_secs(1);
    registry.set_access(Access::Bearer {
        login: None,
        stated_life: life,
        real_life: life,
        refusal: 401,
    });
    assert_reads(&blob, &bytes, 10, 5);
    thread::sleep(Duration::from_millis(850));
    assert_reads(&blob, &bytes, 20, 5);
    let refused = registry.log().iter().filter(|seen| seen.status == 401).count();
    assert_eq!(
        (refused, registry.count("/token")),
        (1, 2),
        "the second token came before a refusal"
    );
}

#[test]
fn a_refusal_after_a_new_token_is_final_and_says_what_to_do() {
    let (registry, bytes, _) = one_blob(1000);
    registry.set_access(bearer(None, Duration::ZERO, 403));
    let repository = repository(&registry);
    let error = failure(&repository.blob(&Digest::of(&bytes), 1000).unwrap(), 1, 5);
    assert!(
        error.contains("was denied: DENIED told by the double")
            && error.contains("-u USER --password-stdin"),
        "{error}"
    );
    assert_eq!((registry.count("/token"), registry.count("/blobs/")), (1, 2));

    registry.set_access(bearer(Some("me:secret"), LONG, 401));
    let error = repository.manifest("latest").unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("the token service")
            && text.contains("no credentials were found for 127.0.0.1"),
        "{text}"
    );
}

#[test]
fn basic_is_answered_with_the_password_and_without_one_the_remedy_is_named() {
    let (registry, bytes, blob) = one_blob(1000);
    registry.set_access(Access::Basic("me:secret".into()));
    let error = failure(&blob, 1, 5);
    assert!(error.contains("wants a user name and a password"), "{error}");
    let known =
        repository_with(&registry, login("me:secret")).blob(&Digest::of(&bytes), 1000).unwrap();
    assert_reads(&known, &bytes, 1, 5);
    let wrong =
        repository_with(&registry, login("me:guess")).blob(&Digest::of(&bytes), 1000).unwrap();
    let error = read(&wrong, 1, 5).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("guess"), "{error}");
}

#[test]
fn credentials_come_from_files_and_a_changed_file_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cred.json");
    let (registry, bytes, _) = one_blob(1000);
    let write = |login: &str| {
        let (user, password) = login.split_once(':').unwrap();
        let key = format!("{}/team", registry.host());
        let auths = serde_json::json!({"auths": {key: {"username": user, "password": password}, "other": {}}});
        std::fs::write(&file, auths.to_string()).unwrap();
    };
    write("me:old");
    registry.set_access(bearer(Some("me:old"), LONG, 401));
    let options = ClientOptions { credential_files: vec![file.clone()], ..options() };
    let blob = repository_with(&registry, options).blob(&Digest::of(&bytes), 1000).unwrap();
    assert_reads(&blob, &bytes, 10, 5);
    registry.set_access(bearer(Some("me:new"), LONG, 403));
    registry.revoke_tokens();
    write("me:new");
    assert_reads(&blob, &bytes, 20, 5);
}

#[test]
fn an_identity_token_is_changed_for_an_access_token() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    let (registry, bytes, _) = one_blob(1000);
    let auths = serde_json::json!({"auths": {registry.host(): {"identitytoken": "refresh+me"}}});
    std::fs::write(&file, auths.to_string()).unwrap();
    registry.set_access(bearer(Some("nobody:knows"), LONG, 401));
    let options = ClientOptions { credential_files: vec![file], ..options() };
    let blob = repository_with(&registry, options).blob(&Digest::of(&bytes), 1000).unwrap();
    assert_reads(&blob, &bytes, 10, 5);
    assert_eq!(registry.count("POST /token"), 1);
}

// Manifests.

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[test]
fn manifests_are_found_by_tag_and_digest_and_verified() {
    let registry = Double::start();
    let digest = registry.add_manifest(REPOSITORY, "v1.0", OCI_MANIFEST, br#"{"a":1}"#);
    let repository = repository(&registry);
    for reference in ["v1.0".to_owned(), digest.to_string()] {
        let manifest = repository.manifest(&reference).unwrap();
        assert_eq!(
            (manifest.bytes.as_slice(), manifest.digest),
            (br#"{"a":1}"#.as_slice(), digest)
        );
        assert_eq!(manifest.media_type, OCI_MANIFEST);
    }
    registry.fault("/manifests/", Fault::Garbage(b"{}".to_vec()), 2);
    for reference in ["v1.0".to_owned(), digest.to_string()] {
        let error = repository.manifest(&reference).unwrap_err();
        assert!(matches!(error, RegistryError::DigestMismatch { .. }), "{error}");
        assert!(error.to_string().contains(&registry.host()), "{error}");
    }
    registry.fault("/manifests/", Fault::Garbage(vec![b' '; (4 << 20) + 1]), 1);
    assert!(matches!(
        repository.manifest("v1.0"),
        Err(RegistryError::TooLarge { limit: 4_194_304, .. })
    ));
    assert!(matches!(repository.manifest("none"), Err(RegistryError::NotFound { .. })));
    assert!(matches!(repository.manifest("../x"), Err(RegistryError::BadName { .. })));
}

#[test]
fn a_manifest_survives_a_few_server_errors() {
    let registry = Double::start();
    registry.add_manifest(REPOSITORY, "v1", OCI_MANIFEST, b"{}");
    registry.fault("/manifests/", Fault::Status(503), 2);
    repository(&registry).manifest("v1").unwrap();
    assert_eq!(registry.log().len(), 3);
}

#[test]
fn referrers_are_found_by_api_and_by_fallback_tag() {
    let registry = Double::start();
    let repository = repository(&registry);
    let subject = registry.add_manifest(REPOSITORY, "v1", OCI_MANIFEST, b"{}");
    let referrer = serde_json::json!({"subject": {"digest": subject.to_string()}}).to_string();
    let referrer = registry.add_manifest(REPOSITORY, "x", OCI_MANIFEST, referrer.as_bytes());
    let index = repository.referrers(&subject).unwrap().unwrap();
    assert!(String::from_utf8(index.bytes).unwrap().contains(&referrer.to_string()));

    let index_type = "application/vnd.oci.image.index.v1+json";
    for useless in [Fault::Status(404), Fault::LoginPage] {
        let registry = Double::start();
        let repository = repository_with(&registry, options());
        registry.fault("/referrers/", useless, 2);
        assert!(repository.referrers(&subject).unwrap().is_none());
        registry.add_manifest(REPOSITORY, &format!("sha256-{}", subject.hex()), index_type, b"{}");
        assert!(repository.referrers(&subject).unwrap().is_some());
    }
}

// Uploads.

#[test]
fn a_blob_is_pushed_once_and_a_manifest_after_it() {
    let registry = Double::start();
    registry.set_access(bearer(Some("me:secret"), LONG, 401));
    let repository = repository_with(&registry, login("me:secret"));
    let bytes = Bytes::from(noise(1_000_000));
    let digest = Digest::of(&bytes);
    assert!(!repository.blob_exists(&digest).unwrap());
    assert!(repository.push_blob(&digest, &bytes).unwrap());
    assert!(!repository.push_blob(&digest, &bytes).unwrap(), "it is there already");
    assert_eq!(registry.blob(REPOSITORY, &digest), Some(bytes));
    let named = repository.put_manifest("v1", OCI_MANIFEST, b"{}").unwrap();
    assert_eq!(registry.manifest(REPOSITORY, "v1").unwrap().0, OCI_MANIFEST);
    assert_eq!(repository.manifest("v1").unwrap().digest, named);
    assert_eq!((registry.count("POST /v2"), registry.count("PUT /v2/team/app/blobs")), (2, 1));
    assert_eq!(registry.count("PATCH"), 0);
}

#[test]
fn a_registry_without_monolithic_uploads_gets_a_patch() {
    let registry = Double::start();
    let repository = repository(&registry);
    registry.fault("PUT /v2/team/app/blobs/uploads/", Fault::Status(405), 1);
    let bytes = noise(700_000);
    let digest = Digest::of(&bytes);
    repository
        .push_blob_from(&digest, 700_000, &mut || Ok(Box::new(Cursor::new(bytes.clone()))))
        .unwrap();
    assert_eq!(registry.blob(REPOSITORY, &digest).unwrap(), bytes);
    assert_eq!(registry.count("PATCH"), 1);
    registry.fault("PUT /v2/team/app/blobs/uploads/", Fault::Status(405), 1);
    repository.push_blob(&Digest::of(b""), &Bytes::new()).unwrap();
}

#[test]
fn an_upload_that_breaks_starts_again_from_a_new_reader() {
    let registry = Double::start();
    let repository = repository(&registry);
    registry.fault("PUT /v2/team/app/blobs/uploads/", Fault::Status(500), 1);
    registry.fault("POST", Fault::Status(502), 1);
    let bytes = noise(300_000);
    let mut opened = 0;
    let digest = Digest::of(&bytes);
    repository
        .push_blob_from(&digest, 300_000, &mut || {
            opened += 1;
            Ok(Box::new(Cursor::new(bytes.clone())))
        })
        .unwrap();
    assert_eq!(opened, 2);
    assert_eq!(registry.blob(REPOSITORY, &digest).unwrap(), bytes);
}

#[test]
fn a_reader_that_fails_or_ends_early_stores_nothing() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the disk is gone"))
        }
    }
    let registry = Double::start();
    let repository = repository(&registry);
    let digest = Digest::of(b"x");
    let error =
        repository.push_blob_from(&digest, 600_000, &mut || Ok(Box::new(Failing))).unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "the disk is gone");
    let short = noise(500_000);
    let error = repository
        .push_blob_from(&digest, 600_000, &mut || Ok(Box::new(Cursor::new(short.clone()))));
    assert!(matches!(error, Err(RegistryError::Upload { .. })), "{error:?}");
    assert!(registry.blob(REPOSITORY, &digest).is_none());
    let wrong = repository.push_blob(&digest, &Bytes::from_static(b"y")).unwrap_err();
    assert!(wrong.to_string().contains("DIGEST_INVALID"), "{wrong}");
}

// Whole blobs.

fn read_all(registry: &Double, digest: &Digest, length: usize) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    repository(registry)
        .blob_stream(digest, length as u64, &[])
        .unwrap()
        .read_to_end(&mut all)
        .map(|_| all)
}

#[test]
fn a_stream_goes_on_where_it_broke() {
    let (registry, bytes, _) = one_blob(3_000_000);
    let digest = Digest::of(&bytes);
    assert!(read_all(&registry, &digest, bytes.len()).unwrap() == bytes);
    for end in [Fault::DropAfter(500_000), Fault::StallAfter(500_000)] {
        registry.clear_log();
        registry.fault("GET", end, 5); // more often than a read may be tried, but with progress in between
        assert!(read_all(&registry, &digest, bytes.len()).unwrap() == bytes);
        let (requests, _) = registry.traffic(&digest);
        assert_eq!(requests, 6);
        assert!(registry.log()[0].range.is_none());
        assert!(
            registry.log()[1].range.as_ref().unwrap().ends_with("-2999999"),
            "only what is missing"
        );
    }
}

#[test]
fn a_stream_from_a_registry_without_ranges_is_fetched_again_and_whole() {
    let (registry, bytes, _) = one_blob(300_000);
    registry.fault("GET", Fault::DropAfter(200_000), 1);
    registry.fault("GET", Fault::IgnoreRange, 100);
    assert!(read_all(&registry, &Digest::of(&bytes), bytes.len()).unwrap() == bytes);
}

#[test]
fn a_stream_that_makes_no_progress_ends_with_the_reason() {
    let (registry, bytes, _) = one_blob(300_000);
    registry.fault("GET", Fault::DropAfter(10), 1000);
    let error = read_all(&registry, &Digest::of(&bytes), bytes.len()).unwrap_err();
    assert!(error.to_string().contains("gave up after 4 tries"), "{error}");
    let reason = error.get_ref().and_then(|inner| inner.downcast_ref::<RegistryError>()).unwrap();
    assert!(matches!(reason.root(), RegistryError::Unreachable { .. }));
    registry.clear_faults();
    registry.fault("GET", Fault::LongBody(5), 1000);
    assert!(
        read_all(&registry, &Digest::of(&bytes), bytes.len()).is_err(),
        "a longer blob is another blob"
    );
}

#[test]
fn a_slow_reader_slows_the_sender_and_loses_nothing() {
    let (registry, bytes, _) = one_blob(40 << 20);
    let mut reader =
        repository(&registry).blob_stream(&Digest::of(&bytes), bytes.len() as u64, &[]).unwrap();
    let mut start = vec![0; 1000];
    reader.read_exact(&mut start).unwrap();
    thread::sleep(Duration::from_millis(900)); // twice the idle limit
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert!(start == bytes[..1000] && rest == bytes[1000..]);
    assert_eq!(registry.log().len(), 1, "the connection was held, not broken");
}

// Connections.

#[test]
fn a_plain_proxy_is_used_and_given_its_password() {
    let proxy = Double::start();
    proxy.add_manifest(REPOSITORY, "v1", OCI_MANIFEST, b"{}");
    let http = format!("http://me:secret@{}", proxy.host());
    let proxies = Proxies::Explicit { http, https: String::new(), no: "direct.invalid".into() };
    let client = RegistryClient::new(ClientOptions { plain: true, proxies, ..options() }).unwrap();
    client.repository("registry.invalid:5000", REPOSITORY).unwrap().manifest("v1").unwrap();
    let seen = &proxy.log()[0];
    assert_eq!(seen.proxy_authorization.as_deref(), Some("Basic bWU6c2VjcmV0"));
    assert_eq!(seen.authorization, None);
    let local = Double::start();
    local.add_manifest(REPOSITORY, "v1", OCI_MANIFEST, b"{}");
    client.repository(&local.host(), REPOSITORY).unwrap().manifest("v1").unwrap();
    assert_eq!(proxy.log().len(), 1, "this machine is reached straight");
}

#[test]
fn an_unknown_authority_is_refused_with_the_remedy_and_accepted_when_given() {
    let Some(authority) = tls_front::Authority::make() else { return };
    let (registry, bytes, _) = one_blob(100_000);
    let front = tls_front::TlsFront::start(&authority, &registry.host(), false);
    let host = format!("https://{}", front.host());
    let blob = |options: ClientOptions| {
        let repository =
            RegistryClient::new(options).unwrap().repository(&host, REPOSITORY).unwrap();
        repository.blob(&Digest::of(&bytes), 100_000).unwrap()
    };
    let error = failure(&blob(options()), 5, 5);
    assert!(error.contains("is not trusted") && error.contains("--root-ca FILE"), "{error}");
    assert!(!error.contains("tries"), "a certificate does not get better by waiting: {error}");

    let trusting = ClientOptions { authorities: vec![authority.certificate()], ..options() };
    assert_reads(&blob(trusting.clone()), &bytes, 5, 50_000);
    assert_reads(&blob(ClientOptions { insecure: true, ..options() }), &bytes, 5, 50_000);

    // With an authority given, this machine is reached by TLS without an option.
    let repository = RegistryClient::new(trusting.clone())
        .unwrap()
        .repository(&front.host(), REPOSITORY)
        .unwrap();
    assert!(repository.blob_exists(&Digest::of(&bytes)).unwrap());

    let missing =
        ClientOptions { authorities: vec![PathBuf::from("/nowhere/ca.pem")], ..options() };
    let error = RegistryClient::new(missing).err().unwrap().to_string();
    assert!(error.contains("/nowhere/ca.pem"), "{error}");
}

#[test]
fn a_client_certificate_is_shown_to_who_asks() {
    let Some(authority) = tls_front::Authority::make() else { return };
    let (registry, bytes, _) = one_blob(1000);
    let front = tls_front::TlsFront::start(&authority, &registry.host(), true);
    let without = ClientOptions { authorities: vec![authority.certificate()], ..options() };
    let (certificate, key) = authority.client();
    let with = ClientOptions {
        certificate: Some(ClientCertificate { certificate, key }),
        ..without.clone()
    };
    let blob = |options: ClientOptions| {
        let repository =
            RegistryClient::new(options).unwrap().repository(&front.host(), REPOSITORY).unwrap();
        repository.blob(&Digest::of(&bytes), 1000).unwrap()
    };
    assert!(read(&blob(without), 5, 5).is_err());
    assert_reads(&blob(with), &bytes, 5, 5);
}

/// A proxy that opens one tunnel, to `target` for any request; returns its address, and later the request.
fn tunnel_to(target: String) -> (String, thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let thread = thread::spawn(move || {
        let (mut near, _) = listener.accept().unwrap();
        let head = read_head(&mut near).unwrap();
        near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        let far = TcpStream::connect(target).unwrap();
        let (mut up, mut down) =
            ((near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near));
        thread::spawn(move || io::copy(&mut up.0, &mut up.1));
        let _ = io::copy(&mut down.0, &mut down.1);
        head
    });
    (address, thread)
}

fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8(head).unwrap())
}

/// Runs the program for an image that no registry has, with `file` as this machine's authorities.
fn ask_for_nothing(image: &str, file: &Path, proxy: Option<&str>) -> String {
    let mut asked = machine::turbobd();
    asked.args(["-v", "inspect", image]).env("SSL_CERT_FILE", file);
    for other in ["SSL_CERT_DIR", "https_proxy", "NO_PROXY", "no_proxy"] {
        asked.env_remove(other);
    }
    asked.envs(proxy.map(|proxy| ("HTTPS_PROXY", format!("http://{proxy}"))));
    String::from_utf8(machine::output(&mut asked).stderr).unwrap()
}

#[test]
fn this_machines_authorities_are_believed_and_read_only_for_tls() {
    let Some(authority) = tls_front::Authority::make() else { return };
    let registry = Double::start();
    let front = tls_front::TlsFront::start(&authority, &registry.host(), false);
    let tls = |file: &Path| {
        let (proxy, _) = tunnel_to(front.host());
        ask_for_nothing("registry.invalid/app:none", file, Some(&proxy))
    };
    let said = tls(&authority.certificate());
    assert!(said.contains("Not found") && !said.contains("authorities"), "{said}");
    let missing = Path::new("/nowhere/ca.pem");
    let said = tls(missing);
    assert!(said.contains("/nowhere/ca.pem") && said.contains("is not trusted"), "{said}");
    let said = ask_for_nothing(&format!("{}/app:none", registry.host()), missing, None);
    assert!(said.contains("Not found") && !said.contains("/nowhere/ca.pem"), "{said}");
}

#[test]
fn tls_goes_through_a_proxy_in_a_tunnel() {
    let Some(authority) = tls_front::Authority::make() else { return };
    let (registry, bytes, _) = one_blob(1000);
    let front = tls_front::TlsFront::start(&authority, &registry.host(), false);
    let (proxy, asked) = tunnel_to(front.host());
    let https = format!("http://me:secret@{proxy}");
    let proxies = Proxies::Explicit { http: String::new(), https, no: String::new() };
    let options =
        ClientOptions { proxies, authorities: vec![authority.certificate()], ..options() };
    let repository =
        RegistryClient::new(options).unwrap().repository("registry.invalid", REPOSITORY).unwrap();
    assert_reads(&repository.blob(&Digest::of(&bytes), 1000).unwrap(), &bytes, 5, 5);
    let head = asked.join().unwrap();
    assert!(head.starts_with("CONNECT registry.invalid:443 HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("Proxy-Authorization: Basic bWU6c2VjcmV0"), "{head}");
}

#[test]
fn an_early_answer_ends_an_upload_that_nobody_reads() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let refuse = |mut stream: TcpStream| {
        while let Ok(head) = read_head(&mut stream) {
            let answer: &[u8] = match head.split(' ').next().unwrap() {
                "HEAD" => b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
                "POST" => b"HTTP/1.1 202 Accepted\r\nlocation: /up\r\ncontent-length: 0\r\n\r\n",
                _ => b"HTTP/1.1 413 Too Large\r\ncontent-length: 4\r\n\r\nfull",
            };
            stream.write_all(answer).unwrap();
            if head.starts_with("PUT") {
                thread::sleep(Duration::from_secs(10)); // and never read a byte of the body
            }
        }
    };
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || refuse(stream.unwrap()));
        }
    });
    let repository = RegistryClient::new(options()).unwrap().repository(&host, REPOSITORY).unwrap();
    let started = Instant::now();
    let bytes = Bytes::from(vec![0; 64 << 20]);
    let error = repository.push_blob(&Digest::of(b"any"), &bytes).unwrap_err();
    assert!(matches!(error, RegistryError::Server { status: 413, .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[test]
fn an_upload_is_sent_again_with_a_new_token() {
    let registry = Double::start();
    registry.set_access(bearer(None, LONG, 401));
    let repository = repository(&registry);
    // The token of the session is refused for the bytes.
    registry.fault("PUT /v2", Fault::RevokeTokens, 1);
    let bytes = Bytes::from(noise(500_000));
    let digest = Digest::of(&bytes);
    repository.push_blob(&digest, &bytes).unwrap();
    assert_eq!(registry.blob(REPOSITORY, &digest), Some(bytes));
    assert_eq!(
        (registry.count("PUT"), registry.count("POST /v2"), registry.count("/token")),
        (2, 2, 3)
    );
}

// An independent registry.

#[test]
fn the_reference_registry_takes_and_gives_what_the_double_does() {
    let Some(registry) = real::start() else { return };
    let repository =
        RegistryClient::new(options()).unwrap().repository(&registry.host(), REPOSITORY).unwrap();
    let bytes = noise(3_000_000);
    let digest = Digest::of(&bytes);
    assert!(repository.push_blob(&digest, &Bytes::from(bytes.clone())).unwrap());
    assert!(repository.blob_exists(&digest).unwrap());
    assert!(!repository.push_blob(&digest, &Bytes::from(bytes.clone())).unwrap());
    let config = b"{}";
    let config_digest = Digest::of(config);
    repository.push_blob_from(&config_digest, 2, &mut || Ok(Box::new(&config[..]))).unwrap();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest.to_string(), "size": 2},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest.to_string(), "size": bytes.len()}],
    });
    let stored =
        repository.put_manifest("v1", OCI_MANIFEST, manifest.to_string().as_bytes()).unwrap();
    for reference in ["v1".to_owned(), stored.to_string()] {
        let got = repository.manifest(&reference).unwrap();
        assert_eq!((got.digest, got.media_type.as_str()), (stored, OCI_MANIFEST));
    }
    let blob = repository.blob(&digest, bytes.len() as u64).unwrap();
    for (offset, length) in [(0, 1), (1_234_567, 1_000_000), (2_999_999, 1), (0, 3_000_000)] {
        assert_reads(&blob, &bytes, offset, length);
    }
    let mut all = Vec::new();
    repository
        .blob_stream(&digest, bytes.len() as u64, &[])
        .unwrap()
        .read_to_end(&mut all)
        .unwrap();
    assert!(all == bytes);
    let none = repository.blob(&Digest::of(b"none"), 4).unwrap();
    assert!(failure(&none, 0, 2).contains("Not found"));
    assert!(repository.referrers(&stored).unwrap().is_none());
}
