//! What a signed text must say to be the signature of a manifest.

use serde::Deserialize;

use formats::oci::Digest;

/// `critical.type` of a signature of version 2.
const SIMPLE_TYPE: &str = "cosign container image signature";

/// Payload type of an envelope with an in-toto statement.
const IN_TOTO: &str = "application/vnd.in-toto+json";

/// Kind of the statement.
const STATEMENT: &str = "https://in-toto.io/Statement/v1";

/// What a statement says that is a signature and nothing else.
const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";

#[derive(Deserialize)]
struct Simple {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: SimpleImage,
    r#type: String,
}

#[derive(Deserialize)]
struct SimpleImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// True if a text of version 2 is a signature of the manifest with this digest.
pub(super) fn simple_names(text: &[u8], digest: &Digest) -> bool {
    serde_json::from_slice::<Simple>(text).is_ok_and(|Simple { critical }| {
        critical.r#type == SIMPLE_TYPE && critical.image.digest == digest.to_string()
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    predicate_type: String,
    subject: Vec<StatementSubject>,
}

#[derive(Deserialize)]
struct StatementSubject {
    digest: SubjectDigest,
}

#[derive(Deserialize)]
struct SubjectDigest {
    sha256: Option<String>,
}

/// True if the payload of an envelope is a signature of the manifest with this digest.
pub(super) fn in_toto_names(payload_type: &str, payload: &[u8], digest: &Digest) -> bool {
    let hex = digest.hex();
    payload_type == IN_TOTO
        && serde_json::from_slice::<Statement>(payload).is_ok_and(|statement| {
            statement.kind == STATEMENT
                && statement.predicate_type == SIGN
                && statement.subject.iter().any(|one| one.digest.sha256.as_ref() == Some(&hex))
        })
}

/// The bytes over which an envelope is signed (DSSE's PAE): with the type, so that a payload of one kind is never taken
/// for another.
pub(super) fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes =
        format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}
