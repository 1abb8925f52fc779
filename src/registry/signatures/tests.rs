//! Signatures are made here by rustls' own signer; `tests/trust/pinned.rs` has some that openssl makes, and
//! `scripts/cosign-tests` has those of cosign itself.

use std::path::Path;

use rustls::SignatureScheme;
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};

use super::*;
use crate::testing::MemoryStore;
use formats::oci::ImageIndex;
use formats::oci::manifest::media;

/// Two pairs, of these tests alone.
const OURS: (&str, &str) = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgd5DNVbBxwbNjhZf0HalybAvGMjkn2Jw8haN6Ttc0yqGhRANCAAT0kqQq2s94J39LaHw9oyRIAjw8Z9Jn8arU0mZxKmV07JBdRrOcYmUOsdTvIJEZG30tyFOodf4VuFNq9dumONx9",
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE9JKkKtrPeCd/S2h8PaMkSAI8PGfSZ/Gq1NJmcSpldOyQXUaznGJlDrHU7yCRGRt9LchTqHX+FbhTavXbpjjcfQ==",
);
const OTHERS: (&str, &str) = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgVt/9SH+KbK4DzXcbAJZJ3gPwK9FePi2vxUR8Ln8WoDqhRANCAAThdWw2m50ims/9YxiVqzDTU+J3agaPg8o1oRAJ2U8jfe6Fv0bAJuoNcMOnX/V30bar8d8f3A+neBEnut62Trf5",
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE4XVsNpudIprP/WMYlasw01Pid2oGj4PKNaEQCdlPI33uhb9GwCbqDXDDp1/1d9G2q/HfH9wPp3gRJ7retk63+Q==",
);

/// A key over another curve.
const P384: &str = "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEA129rGhQIyZNd+U4ulGyDM+9cYmcrUI3WQa3dKNgljMw3nmpANRqC8juWfshiBzKvIKug0dft/tPHKGVBbs58YjVCXjNIIj5ApnfEZgntHqR09vVV/0G+f93aalncVvF";

fn pem(public: &str) -> String {
    format!("-----BEGIN PUBLIC KEY-----\n{public}\n-----END PUBLIC KEY-----\n")
}

fn key(public: &str) -> Result<PublicKey, KeyError> {
    PublicKey::from_pem(pem(public).as_bytes(), Path::new("/keys/ours.pub"))
}

fn signers() -> Signers {
    Signers(vec![key(OTHERS.1).unwrap(), key(OURS.1).unwrap()])
}

fn sign(private: &str, message: &[u8]) -> Vec<u8> {
    let der = PrivateKeyDer::Pkcs8(BASE64.decode(private).unwrap().into());
    let key = any_ecdsa_type(&der).unwrap();
    key.choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]).unwrap().sign(message).unwrap()
}

fn signed_digest() -> Digest {
    Digest::of(b"the manifest")
}

/// The text that version 2 signs.
fn simple_text(digest: &Digest, kind: &str) -> Vec<u8> {
    json!({
        "critical": {
            "identity": { "docker-reference": "registry.example/app" },
            "image": { "docker-manifest-digest": digest.to_string() },
            "type": kind,
        },
        "optional": null,
    })
    .to_string()
    .into_bytes()
}

/// A signature of version 2 in a store: of `text`, by `private`.
fn put_simple(store: &MemoryStore, subject: &Digest, text: &[u8], private: &str) {
    put_simple_layers(store, subject, &[(text, &sign(private, text)[..])]);
}

fn put_simple_layers(store: &MemoryStore, subject: &Digest, layers: &[(&[u8], &[u8])]) {
    let layers = layers.iter().map(|(text, signature)| {
        store.put_blob(text).unwrap();
        let mut layer = Descriptor::of(SIMPLE_SIGNING, text);
        layer.annotations.insert(SIGNATURE.into(), BASE64.encode(signature));
        layer
    });
    let layers: Vec<Descriptor> = layers.collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media::OCI_MANIFEST,
        "config": Descriptor::of(media::OCI_CONFIG, b"{}"),
        "layers": layers,
    });
    let tag = format!("sha256-{}.sig", subject.hex());
    store.put_manifest(Some(&tag), media::OCI_MANIFEST, manifest.to_string().as_bytes()).unwrap();
}

fn statement(digest: &Digest, predicate: &str) -> Value {
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{ "digest": { "sha256": digest.hex() } }],
        "predicateType": predicate,
        "predicate": {},
    })
}

const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";
const IN_TOTO: &str = "application/vnd.in-toto+json";

/// A signature of version 3 in a store: the bundle as a referrer, listed without annotations.
fn put_bundle(store: &MemoryStore, subject: &Digest, payload: &Value, kind: &str, private: &str) {
    let payload = payload.to_string().into_bytes();
    let signed = statement::pre_authentication_encoding(kind, &payload);
    let bundle = json!({
        "mediaType": BUNDLE,
        "verificationMaterial": { "publicKey": { "hint": "none" } },
        "dsseEnvelope": {
            "payload": BASE64.encode(&payload),
            "payloadType": kind,
            "signatures": [{ "sig": BASE64.encode(sign(private, &signed)) }],
        },
    })
    .to_string();
    store.put_blob(bundle.as_bytes()).unwrap();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media::OCI_MANIFEST,
        "artifactType": BUNDLE,
        "config": Descriptor::of(media::OCI_EMPTY, b"{}"),
        "layers": [Descriptor::of(BUNDLE, bundle.as_bytes())],
        "subject": Descriptor::new(media::OCI_MANIFEST, *subject, 12),
    })
    .to_string();
    store.put_manifest(None, media::OCI_MANIFEST, manifest.as_bytes()).unwrap();
    let mut entry = Descriptor::of(media::OCI_MANIFEST, manifest.as_bytes());
    entry.artifact_type = Some(BUNDLE.into());
    referrers::add(store, subject, entry, |_| false).unwrap();
}

#[test]
fn a_signature_of_each_form_is_found_and_names_its_key() {
    let digest = signed_digest();
    let simple = MemoryStore::new();
    let text = simple_text(&digest, "cosign container image signature");
    put_simple(&simple, &digest, &text, OURS.0);
    let bundled = MemoryStore::new();
    put_bundle(&bundled, &digest, &statement(&digest, SIGN), IN_TOTO, OURS.0);
    let expected = Some(Signed { digest, key: "/keys/ours.pub".into() });
    assert_eq!(signers().find(&simple, &digest), expected);
    assert_eq!(signers().find(&bundled, &digest), expected);
}

#[test]
fn a_good_signature_is_found_behind_bad_ones() {
    let digest = signed_digest();
    let store = MemoryStore::new();
    let text = simple_text(&digest, "cosign container image signature");
    let good = sign(OURS.0, &text);
    let bad = (&text[..], &b"no DER"[..]);
    let other = (&b"another text"[..], &good[..]);
    put_simple_layers(&store, &digest, &[bad, other, (&text[..], &good[..])]);
    assert!(signers().find(&store, &digest).is_some());
    let store = MemoryStore::new();
    put_bundle(&store, &digest, &statement(&Digest::of(b"other"), SIGN), IN_TOTO, OURS.0);
    put_bundle(&store, &digest, &statement(&digest, SIGN), IN_TOTO, OURS.0);
    assert!(signers().find(&store, &digest).is_some());
}

#[test]
fn a_signature_by_a_key_that_is_not_listed_does_not_count() {
    let digest = signed_digest();
    let store = MemoryStore::new();
    put_simple(
        &store,
        &digest,
        &simple_text(&digest, "cosign container image signature"),
        OTHERS.0,
    );
    put_bundle(&store, &digest, &statement(&digest, SIGN), IN_TOTO, OTHERS.0);
    assert_eq!(Signers(vec![key(OURS.1).unwrap()]).find(&store, &digest), None);
    assert_eq!(Signers::default().find(&store, &digest), None);
    assert!(signers().find(&store, &digest).is_some());
}

#[test]
fn a_signature_of_another_digest_or_of_another_kind_of_statement_does_not_count() {
    let (digest, other) = (signed_digest(), Digest::of(b"another manifest"));
    let kind = "cosign container image signature";
    for text in [simple_text(&other, kind), simple_text(&digest, "atomic container signature")] {
        let store = MemoryStore::new();
        put_simple(&store, &digest, &text, OURS.0);
        assert_eq!(signers().find(&store, &digest), None);
    }
    let mut old = statement(&digest, SIGN);
    old["_type"] = "https://in-toto.io/Statement/v0.1".into();
    for (payload, kind) in [
        (statement(&other, SIGN), IN_TOTO),
        (statement(&digest, "https://example.org/failed-the-scan/v1"), IN_TOTO),
        (statement(&digest, SIGN), "application/json"),
        (old, IN_TOTO),
    ] {
        let store = MemoryStore::new();
        put_bundle(&store, &digest, &payload, kind, OURS.0);
        assert_eq!(signers().find(&store, &digest), None, "{payload}");
    }
}

#[test]
fn a_signature_over_the_payload_alone_does_not_count() {
    let payload = statement(&signed_digest(), SIGN).to_string();
    let envelope = |signed: &[u8]| {
        let sig = BASE64.encode(sign(OURS.0, signed));
        let payload = BASE64.encode(&payload);
        json!({"dsseEnvelope": {"payload": payload, "payloadType": IN_TOTO, "signatures": [{"sig": sig}]}})
            .to_string()
    };
    let whole = statement::pre_authentication_encoding(IN_TOTO, payload.as_bytes());
    let digest = signed_digest();
    assert!(signers().of_bundle(envelope(&whole).as_bytes(), &digest).is_some());
    assert!(signers().of_bundle(envelope(payload.as_bytes()).as_bytes(), &digest).is_none());
}

#[test]
fn a_signed_text_above_the_limit_is_not_read() {
    let digest = signed_digest();
    let store = MemoryStore::new();
    let mut text = simple_text(&digest, "cosign container image signature");
    text.resize(TEXT_LIMIT as usize + 1, b' ');
    put_simple(&store, &digest, &text, OURS.0);
    assert_eq!(signers().find(&store, &digest), None);
    text.truncate(TEXT_LIMIT as usize);
    put_simple(&store, &digest, &text, OURS.0);
    assert!(signers().find(&store, &digest).is_some());
}

#[test]
fn the_signatures_of_a_layout_are_found_too() {
    // A layout keeps no list of referrers: the index under the fallback tag is it.
    let digest = signed_digest();
    let store = MemoryStore::new();
    put_bundle(&store, &digest, &statement(&digest, SIGN), IN_TOTO, OURS.0);
    let listed = store.referrers(&digest).unwrap().unwrap();
    let Ok(Document::Index(ImageIndex { manifests, .. })) =
        Document::parse(&listed.bytes, Some(&listed.media_type))
    else {
        panic!("not an index");
    };
    let dir = tempfile::tempdir().unwrap();
    let layout = crate::store::LayoutStore::open_or_create(dir.path()).unwrap();
    for entry in manifests {
        let stored = store.manifest(&Selector::Digest(entry.digest)).unwrap();
        for layer in manifest_of(&stored).unwrap().layers {
            layout.put_blob(&store.read_blob(&layer).unwrap()).unwrap();
        }
        layout.put_manifest(None, &stored.media_type, &stored.bytes).unwrap();
        referrers::add(&layout, &digest, entry, |_| false).unwrap();
    }
    assert!(signers().find(&layout, &digest).is_some());
}

#[test]
fn a_file_that_is_not_one_key_of_cosign_is_refused_by_name() {
    let of = |text: &str| PublicKey::from_pem(text.as_bytes(), Path::new("/k")).unwrap_err();
    let private = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", OURS.0);
    let cases = [
        (String::new(), "holds no public key"),
        ("not PEM".to_owned(), "holds no public key"),
        (private, "holds no public key"),
        (pem(P384), "holds a key of another kind"),
        (pem("AAAA"), "holds a key of another kind"),
        (pem(OURS.1) + &pem(OTHERS.1), "holds several public keys"),
    ];
    for (text, rule) in cases {
        let error = of(&text).to_string();
        assert!(
            error.starts_with(&format!("/k {rule}")) && error.contains("cosign.pub"),
            "{error}"
        );
    }
    let missing = Signers::load(&["/no/such/key.pub".into()]).unwrap_err();
    assert!(missing.to_string().contains("/no/such/key.pub"), "{missing}");
}
