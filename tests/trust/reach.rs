//! An image, and the registry that it comes from, send this host nowhere but where its operator lets it go.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use formats::oci::Digest;
use registry::{
    ClientCertificate, ClientOptions, Credential, Proxies, RegistryClient, RegistryError,
    Repository, RetryPolicy,
};
use serde_json::{Value, json};
use source::ByteSource as _;

use crate::image::{Images, done, end, is_refusal, noise, refused, turbobd};
use crate::registry_double::tls_front::{Authority, TlsFront};
use crate::registry_double::{Access, Double, Fault};
use crate::serve::serve;

const ORIGIN: &str = "dev.turbobd.origin";

/// A meta image in registry `a` without its original layers, which are in the private repository of `b`, and in a folder.
struct Deputy {
    images: Images,
    a: Double,
    b: Double,
    digest: String,
}

impl Deputy {
    fn new() -> Self {
        let images = Images::converted();
        let digest = done(&["export", &images.name("turbo"), "--digest"]);
        let (a, b) = (Double::start(), Double::start());
        serve(&images, &b, "private/secret");
        b.set_access(Access::Basic("hostuser:hostword".into()));
        Self { images, a, b, digest }
    }

    /// Name of the image in `a` that names `origin`, without its original layers there.
    fn naming(&self, origin: &str) -> String {
        let mut manifest = self.images.manifest("turbo");
        manifest["annotations"][ORIGIN] = origin.into();
        self.images.set_manifest("forged", &manifest);
        serve(&self.images, &self.a, "app");
        for number in 0..2 {
            let layer = self.images.layer("latest", number).parse().unwrap();
            self.a.remove_blob("app", &layer);
        }
        format!("{}/app:forged", self.a.host())
    }

    fn private(&self) -> String {
        format!("{}/private/secret", self.b.host())
    }

    /// Exports with the host's credentials for `b` and these keys of `turbobd` in the configuration.
    fn export(&self, name: &str, turbobd_keys: &Value, more: &[&str]) -> crate::image::Ended {
        let folder = tempfile::tempdir().unwrap();
        let (credentials, service) =
            (folder.path().join("cred.json"), folder.path().join("service.json"));
        let login =
            json!({"auths": {self.b.host(): {"username": "hostuser", "password": "hostword"}}});
        fs::write(&credentials, login.to_string()).unwrap();
        let base = include_str!("../machine/service.json");
        let mut config: Value = serde_json::from_str(base).unwrap();
        config["credentialConfig"] = json!({"mode": "file", "path": credentials});
        for (key, value) in turbobd_keys.as_object().unwrap() {
            config["turbobd"][key] = value.clone();
        }
        fs::write(&service, config.to_string()).unwrap();
        let args = [&["export", name, "--digest"][..], more].concat();
        end(turbobd().env("TURBOBD_SERVICE_CONFIG", service).args(args))
    }

    #[track_caller]
    fn is_right(&self, ended: &crate::image::Ended) {
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert_eq!(ended.stdout.trim_end(), self.digest);
    }

    fn credentials_shown(&self) -> usize {
        self.b.log().iter().filter(|seen| seen.authorization.is_some()).count()
    }
}

#[test]
fn an_image_of_a_registry_never_sends_the_host_to_a_folder() {
    let deputy = Deputy::new();
    let place = deputy.images.place();
    let name = deputy.naming(&place);
    // Not even if the list has it: the list of folders is for images of a layout.
    for keys in [json!({}), json!({"origins": ["oci:/", &place]})] {
        let ended = deputy.export(&name, &keys, &[]);
        is_refusal(&ended, &["export"], &["a folder of this host", "--origin"]);
    }
    deputy.is_right(&deputy.export(&name, &json!({}), &["--origin", &place]));
    let link =
        format!("{place}/../{}", deputy.images.path().file_name().unwrap().to_str().unwrap());
    let ended = deputy.export(&deputy.naming(&link), &json!({}), &[]);
    is_refusal(&ended, &["export"], &["a folder of this host"]);
}

#[test]
fn an_image_sends_the_host_to_no_repository_that_its_operator_did_not_name() {
    let deputy = Deputy::new();
    let private = deputy.private();
    let name = deputy.naming(&private);
    for keys in [json!({}), json!({"origins": [format!("{private}s"), "registry.example"]})] {
        let ended = deputy.export(&name, &keys, &[]);
        is_refusal(&ended, &["export"], &[&private, "turbobd.origins"]);
    }
    let ended =
        deputy.export(&name, &json!({}), &["--origin", &format!("{}/other", deputy.b.host())]);
    is_refusal(&ended, &["export"], &[&private]);
    assert_eq!(deputy.b.log().len(), 0, "it was asked");
    deputy.is_right(&deputy.export(&name, &json!({}), &["--origin", &private]));
}

#[test]
fn a_listed_repository_is_read_without_the_credentials_of_the_host() {
    let deputy = Deputy::new();
    let name = deputy.naming(&deputy.private());
    let listed = json!({"origins": [format!("{}/private", deputy.b.host())]});
    let ended = deputy.export(&name, &listed, &[]);
    is_refusal(&ended, &["export"], &["denied"]);
    let ended = deputy.export(&name, &listed, &["-u", "hostuser:hostword"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert_eq!(deputy.credentials_shown(), 0);
    deputy.b.set_access(Access::Open);
    deputy.is_right(&deputy.export(&name, &listed, &[]));
    assert_eq!(deputy.credentials_shown(), 0);
    // The command's own repository is the command's, with all that belongs to it.
    deputy.b.set_access(Access::Basic("hostuser:hostword".into()));
    deputy.is_right(&deputy.export(&name, &json!({}), &["--origin", &deputy.private()]));
    assert!(deputy.credentials_shown() > 0);
}

#[test]
fn an_image_of_a_layout_is_followed_only_where_its_operator_lets_it_go() {
    let deputy = Deputy::new();
    let copy = Images::new();
    for origin in [deputy.images.place(), deputy.private()] {
        let mut manifest = deputy.images.manifest("turbo");
        for blob in manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]) {
            copy.put(&deputy.images.blob(blob["digest"].as_str().unwrap()));
        }
        manifest["annotations"][ORIGIN] = origin.clone().into();
        let document = copy.descriptor(crate::image::OCI_MANIFEST, manifest.to_string().as_bytes());
        copy.tag("forged", &document);
        let name = copy.name("forged");
        is_refusal(
            &deputy.export(&name, &json!({}), &[]),
            &["export"],
            &[&origin, "turbobd.origins"],
        );
        assert_eq!(deputy.b.log().len(), 0, "it was asked");
        deputy.is_right(&deputy.export(&name, &json!({}), &["--origin", &origin]));
        deputy.b.clear_log();
    }
    let keys = json!({"origins": [deputy.images.place()]});
    let mut manifest = copy.manifest("forged");
    manifest["annotations"][ORIGIN] = deputy.images.place().into();
    copy.set_manifest("forged", &manifest);
    deputy.is_right(&deputy.export(&copy.name("forged"), &keys, &[]));
}

// Redirects, and other places that a registry names.

const REPOSITORY: &str = "team/app";

fn options() -> ClientOptions {
    let retry = RetryPolicy {
        max_tries: 2,
        deadline: Duration::from_secs(5),
        first_pause: Duration::from_millis(2),
        max_pause: Duration::from_millis(10),
    };
    ClientOptions {
        credential_files: Vec::new(),
        proxies: Proxies::Direct,
        retry,
        read_retry: retry,
        ..ClientOptions::default()
    }
}

/// The double as a registry that is not on this machine: it is reached through a proxy, which it is itself.
fn elsewhere(double: &Double) -> Repository {
    let http = format!("http://{}", double.host());
    let proxies = Proxies::Explicit { http, https: String::new(), no: String::new() };
    let client = RegistryClient::new(ClientOptions { plain: true, proxies, ..options() }).unwrap();
    client.repository("registry.invalid:5000", REPOSITORY).unwrap()
}

fn read(repository: &Repository, digest: &Digest, len: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; len - 1];
    let blob = repository.blob(digest, len as u64).unwrap();
    blob.read_exact_at(&mut bytes, 0).map(|()| bytes).map_err(|error| error.to_string())
}

#[test]
fn a_registry_elsewhere_sends_the_host_neither_to_itself_nor_to_a_metadata_service() {
    let (registry, inside) = (Double::start(), Double::start());
    let bytes = noise(1, 1000);
    let digest = registry.add_blob(REPOSITORY, &bytes);
    inside.add_blob(REPOSITORY, &bytes);
    let path = format!("/v2/{REPOSITORY}/blobs/{digest}");
    let port = inside.host().split(':').next_back().unwrap().to_owned();
    let repository = elsewhere(&registry);
    let ask = |location: String| {
        registry.clear_faults();
        registry.fault("GET", Fault::Location(location), 9);
        let manifest = repository.manifest(&digest.to_string());
        assert!(matches!(manifest, Err(RegistryError::OutOfReach { .. })), "{manifest:?}");
        read(&repository, &digest, bytes.len()).unwrap_err()
    };
    for host in [
        "127.0.0.1",
        "localhost",
        "LocalHost",
        "127.1",
        "2130706433",
        "0x7f.1",
        "0",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:0:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[::7f00:1]",
    ] {
        let error = ask(format!("http://{host}:{port}{path}"));
        assert!(
            error.contains("is this host itself") && error.contains("must not send"),
            "{error}"
        );
        let error = ask(format!("https://{host}:{port}{path}"));
        assert!(error.contains("is this host itself"), "{error}");
    }
    for host in [
        "169.254.169.254",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2::254]",
        "2852039166",
    ] {
        let error = ask(format!("http://{host}/latest/meta-data/"));
        assert!(error.contains("metadata service"), "{error}");
    }
    assert_eq!(inside.log().len(), 0);
    // To another host it may: object stores are used so.
    registry.clear_faults();
    registry.fault("GET", Fault::Location(format!("http://cdn.invalid{path}")), 1);
    assert_eq!(read(&repository, &digest, bytes.len()).unwrap(), bytes[..bytes.len() - 1]);
}

#[test]
fn a_host_that_the_operator_trusts_may_be_this_one() {
    let (registry, inside) = (Double::start(), Double::start());
    let bytes = noise(3, 1000);
    let digest = registry.add_blob(REPOSITORY, &bytes);
    inside.add_blob(REPOSITORY, &bytes);
    let there = format!("{}/v2/{REPOSITORY}/blobs/{digest}", inside.base_url());
    registry.fault("GET", Fault::Location(there), 9);
    let http = format!("http://{}", registry.host());
    let proxies = Proxies::Explicit { http, https: String::new(), no: String::new() };
    let trusted = vec!["127.0.0.1".to_owned()];
    let client =
        RegistryClient::new(ClientOptions { plain: true, proxies, trusted, ..options() }).unwrap();
    let repository = client.repository("registry.invalid:5000", REPOSITORY).unwrap();
    assert_eq!(read(&repository, &digest, bytes.len()).unwrap(), bytes[..bytes.len() - 1]);
    assert!(inside.log().iter().all(|seen| seen.authorization.is_none()));
}

#[test]
fn a_registry_on_this_machine_sends_the_host_to_no_metadata_service() {
    let registry = Double::start();
    let digest = registry.add_blob(REPOSITORY, b"bytes");
    registry.fault("GET", Fault::Location("http://169.254.169.254/".into()), 9);
    let client = RegistryClient::new(options()).unwrap();
    let repository = client.repository(&registry.host(), REPOSITORY).unwrap();
    let error = read(&repository, &digest, 5).unwrap_err();
    assert!(error.contains("metadata service"), "{error}");
}

#[test]
fn a_registry_elsewhere_has_no_token_service_on_this_host() {
    let registry = Double::start();
    registry.set_access(Access::Bearer {
        login: None,
        stated_life: Duration::from_secs(300),
        real_life: Duration::from_secs(300),
        refusal: 401,
    });
    // The double names a token service at 127.0.0.1.
    let error = elsewhere(&registry).manifest("v1").unwrap_err();
    assert!(matches!(error, RegistryError::OutOfReach { .. }), "{error}");
    assert_eq!(registry.count("/token"), 0);
}

#[test]
fn a_credential_is_shown_to_no_other_repository_of_its_registry() {
    let registry = Double::start();
    let bytes = noise(2, 1000);
    let digest = registry.add_blob(REPOSITORY, &bytes);
    registry.add_blob("private/secret", &bytes);
    registry.set_access(Access::Basic("me:secret".into()));
    let credential = Some(Credential::from_user_password("me:secret"));
    let client = RegistryClient::new(ClientOptions { credential, ..options() }).unwrap();
    let repository = client.repository(&registry.host(), REPOSITORY).unwrap();
    assert!(read(&repository, &digest, bytes.len()).is_ok(), "the credential is right");
    let own = format!("GET /v2/{REPOSITORY}/");
    for path in [
        "/v2/private/secret/blobs/",
        "/v2/team/app/../../private/secret/blobs/",
        "/x/../v2/private/secret/blobs/",
        "/v2/team/app/%2e%2e/%2E%2E/private/secret/blobs/",
        "/v2/team/apps/blobs/",
        "/v2//private/secret/blobs/",
    ] {
        registry.clear_log();
        registry.clear_faults();
        registry.fault(
            &format!("{own}blobs/{digest}"),
            Fault::Location(format!("{path}{digest}")),
            9,
        );
        assert!(read(&repository, &digest, bytes.len()).is_err(), "{path}");
        let log = registry.log();
        let others: Vec<_> = log
            .iter()
            .filter(|seen| !seen.line.starts_with(&format!("{own}blobs/{digest}")))
            .collect();
        assert!(!others.is_empty(), "{path}: {log:?}");
        assert!(others.iter().all(|seen| seen.authorization.is_none()), "{path}: {others:?}");
    }
    // Within the repository it stays.
    let (short, blobs) =
        (format!("{own}blobs/{digest}"), format!("/v2/{REPOSITORY}/blobs/{digest}?there"));
    registry.clear_faults();
    registry.fault(&short, Fault::Location(blobs), 1);
    assert!(read(&repository, &digest, bytes.len()).is_ok());
}

#[test]
fn tls_is_left_only_for_bytes_that_a_digest_covers() {
    let Some(authority) = Authority::make() else { return };
    let images = Images::converted();
    let place = images.place();
    done(&["convert", "-r", &place, "-i", "latest", "--overlaybd", "obd", "--vsize", "1"]);
    let (registry, clear) = (Double::start(), Double::start());
    serve(&images, &registry, "app");
    serve(&images, &clear, "app");
    let front = TlsFront::start(&authority, &registry.host(), false);
    let ca = authority.certificate();
    let export = |tag: &str| {
        let name = format!("{}/app:{tag}", front.host());
        end(turbobd().args(["export", &name, "--digest", "--root-ca", ca.to_str().unwrap()]))
    };
    for tag in ["latest", "obd"] {
        for number in 0..2 {
            let path = format!("/v2/app/blobs/{}", images.layer(tag, number));
            let there = format!("{}{path}", clear.base_url());
            registry.fault(&format!("GET {path}"), Fault::Location(there), u32::MAX);
        }
    }
    let turbo = export("turbo");
    assert_eq!(turbo.code, Some(0), "{}", turbo.stderr);
    assert_eq!(turbo.stdout.trim_end(), done(&["export", &images.name("turbo"), "--digest"]));
    assert!(clear.count("GET /v2/app/blobs/") > 0, "it was not sent there");
    let before = clear.log().len();
    is_refusal(&export("obd"), &["export"], &["redirects from TLS to plain HTTP"]);
    assert_eq!(clear.log().len(), before, "a byte without a digest came over plain HTTP");
}

// The `urls` of a layer.

/// Reads a blob whose each byte is covered, as far as a registry and these URLs give it.
fn read_covered(
    repository: &Repository,
    (digest, bytes): (&Digest, &[u8]),
    urls: &[String],
) -> Result<Vec<u8>, String> {
    let mut read = vec![0; bytes.len() - 1];
    let blob = repository.covered_blob(digest, bytes.len() as u64, urls).unwrap();
    blob.read_exact_at(&mut read, 0).map(|()| read).map_err(|error| error.to_string())
}

#[test]
fn the_urls_of_a_layer_are_asked_without_a_credential_for_what_the_registry_has_not() {
    let (registry, other) = (Double::start(), Double::start());
    let bytes = noise(4, 1000);
    let digest = registry.add_blob(REPOSITORY, &bytes);
    other.add_blob("store", &bytes);
    registry.set_access(Access::Basic("me:secret".into()));
    // The second is at the registry itself, in a repository that the command did not name.
    registry.add_blob("private/secret", &bytes);
    let at = |base: String, name: &str| format!("{base}/v2/{name}/blobs/{digest}");
    let urls = [at(other.base_url(), "store")];
    let private = [at(registry.base_url(), "private/secret")];
    let credential = Some(Credential::from_user_password("me:secret"));
    let client = RegistryClient::new(ClientOptions { credential, ..options() }).unwrap();
    let repository = || client.repository(&registry.host(), REPOSITORY).unwrap();
    let covered = |urls: &[String]| read_covered(&repository(), (&digest, &bytes), urls);
    let expected = Ok(bytes[..bytes.len() - 1].to_vec());
    assert_eq!(covered(&urls), expected);
    assert_eq!(other.log().len(), 0, "the registry has it");
    registry.remove_blob(REPOSITORY, &digest);
    assert_eq!(covered(&urls), expected);
    assert!(other.log().iter().all(|seen| seen.authorization.is_none()));
    other.set_access(Access::Basic("me:secret".into()));
    assert!(covered(&urls).unwrap_err().contains("descriptor"));
    assert!(other.log().iter().all(|seen| seen.authorization.is_none()));
    registry.clear_log();
    assert!(covered(&private).is_err());
    let log = registry.log();
    let there: Vec<_> = log.iter().filter(|seen| seen.line.contains("private")).collect();
    assert!(
        !there.is_empty() && there.iter().all(|seen| seen.authorization.is_none()),
        "{there:?}"
    );
    // Bytes that no digest covers are read at no URL of an image.
    other.set_access(Access::Open);
    other.clear_log();
    assert!(read(&repository(), &digest, bytes.len()).is_err());
    assert_eq!(other.log().len(), 0);
}

#[test]
fn the_urls_of_a_layer_lead_a_registry_elsewhere_neither_to_this_host_nor_to_a_metadata_service() {
    let (registry, inside) = (Double::start(), Double::start());
    let bytes = noise(5, 1000);
    let digest = registry.add_blob("store", &bytes);
    inside.add_blob("store", &bytes);
    let path = format!("/v2/store/blobs/{digest}");
    let port = inside.host().split(':').next_back().unwrap().to_owned();
    let ask = |url: &str| read_covered(&elsewhere(&registry), (&digest, &bytes), &[url.to_owned()]);
    for host in
        ["127.0.0.1", "localhost", "127.1", "2130706433", "0", "[::1]", "[::ffff:127.0.0.1]"]
    {
        for scheme in ["http", "https"] {
            let error = ask(&format!("{scheme}://{host}:{port}{path}")).unwrap_err();
            assert!(error.contains("is this host itself"), "{host}: {error}");
        }
    }
    for host in ["169.254.169.254", "[fe80::1]", "2852039166"] {
        let error = ask(&format!("http://{host}{path}")).unwrap_err();
        assert!(error.contains("metadata service"), "{host}: {error}");
    }
    for no_url in ["", path.as_str(), "file:///etc/passwd", "ftp://a/b", "http://u:p@cdn.invalid/x"]
    {
        assert!(ask(no_url).is_err(), "{no_url}");
    }
    // Another host may be asked, and its redirects lead no farther.
    let there = format!("http://cdn.invalid{path}");
    assert_eq!(ask(&there).unwrap(), bytes[..bytes.len() - 1]);
    registry.fault(
        &format!("GET {path}"),
        Fault::Location(format!("{}{path}", inside.base_url())),
        9,
    );
    let error = ask(&there).unwrap_err();
    assert!(error.contains("is this host itself"), "{error}");
    assert_eq!(inside.log().len(), 0);
}

#[test]
fn the_certificate_of_the_host_is_for_registries_and_not_for_the_urls_of_a_layer() {
    let Some(authority) = Authority::make() else { return };
    let (registry, other) = (Double::start(), Double::start());
    let bytes = noise(6, 1000);
    let digest = other.add_blob("store", &bytes);
    let fronts = [(&registry, true), (&other, false), (&other, true)];
    let [home, open, asking] =
        fronts.map(|(double, asks)| TlsFront::start(&authority, &double.host(), asks));
    let (certificate, key) = authority.client();
    let certificate = Some(ClientCertificate { certificate, key });
    let authorities = vec![authority.certificate()];
    let client =
        RegistryClient::new(ClientOptions { certificate, authorities, ..options() }).unwrap();
    let repository = client.repository(&home.host(), REPOSITORY).unwrap();
    let ask = |front: &TlsFront| {
        let url = format!("https://{}/v2/store/blobs/{digest}", front.host());
        read_covered(&repository, (&digest, &bytes), &[url])
    };
    assert_eq!(ask(&open).unwrap(), bytes[..bytes.len() - 1]);
    assert!(registry.count("GET") > 0, "the registry was shown the certificate");
    assert!(ask(&asking).is_err(), "the other host was shown it");
}

#[test]
fn a_layer_that_only_its_urls_have_is_converted_and_shown_and_a_wrong_byte_of_it_is_not() {
    let images = Images::converted();
    let (registry, files) = (Double::start(), Double::start());
    serve(&images, &files, "store");
    let mut manifest = images.manifest("latest");
    for layer in manifest["layers"].as_array_mut().unwrap() {
        let digest = layer["digest"].as_str().unwrap().to_owned();
        layer["urls"] = json!([format!("{}/v2/store/blobs/{digest}", files.base_url())]);
    }
    images.set_manifest("foreign", &manifest);
    serve(&images, &registry, "app");
    let layers: Vec<Digest> =
        (0..2).map(|number| images.layer("latest", number).parse().unwrap()).collect();
    layers.iter().for_each(|layer| registry.remove_blob("app", layer));
    let name = format!("{}/app:foreign", registry.host());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let export = |meta: &str| {
        let meta = folder.path().join(meta);
        end(turbobd().args(["export", &name, "--digest", "--meta-dir"]).arg(meta))
    };
    let here = folder.path().join("here");
    let plain = ["export", &images.name("latest"), "--digest", "--meta-dir"];
    let right = done(&[&plain[..], &[here.to_str().unwrap()]].concat());
    for again in ["built", "found"] {
        let ended = export("one");
        assert_eq!(ended.code, Some(0), "{again}: {}", ended.stderr);
        assert_eq!(ended.stdout.trim_end(), right, "{again}");
    }
    let mut wrong = images.blob(&layers[0].to_string());
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    files.add_lie("store", &layers[0], &wrong);
    for meta in ["one", "two"] {
        let ended = export(meta);
        assert_eq!(ended.code, Some(1), "{meta}: {}", ended.stdout);
    }
}

// Layouts.

#[test]
fn the_files_of_a_layout_are_opened_without_following_links() {
    let images = Images::converted();
    let name = images.name("turbo");
    let elsewhere = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let blobs = ["latest", "turbo"].map(|tag| images.blob_path(&images.layer(tag, 0)));
    let manifest = images.blob_path(images.tagged("turbo")["digest"].as_str().unwrap());
    let places = blobs.into_iter().chain([
        manifest,
        images.path().join("blobs/sha256"),
        images.path().join("blobs"),
        images.path().join("index.json"),
        images.path().join("oci-layout"),
    ]);
    for path in places {
        let target = elsewhere.path().join("target");
        fs::rename(&path, &target).unwrap();
        symlink(&target, &path).unwrap();
        let said = refused(&["export", &name, "--digest"], &["without following links"]);
        assert!(said.contains(path.to_str().unwrap()), "{said}");
        fs::remove_file(&path).unwrap();
        fs::rename(&target, &path).unwrap();
    }
    done(&["export", &name, "--digest"]);
    // The folder itself is what the user named.
    symlink(images.path(), elsewhere.path().join("named")).unwrap();
    done(&[
        "export",
        &format!("oci:{}:turbo", elsewhere.path().join("named").display()),
        "--digest",
    ]);
}
