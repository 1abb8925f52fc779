//! Answers of the double.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use formats::oci::Digest;
use http_body_util::{BodyExt as _, Collected};
use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, LOCATION,
    PROXY_AUTHORIZATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{Method, Request, Response};

use super::body::{Scripted, Step};
use super::{Access, Fault, Seen, Shared, State, StoredManifest, lock};

/// The parts of a request that matter here.
#[derive(Clone)]
struct Asked {
    method: Method,
    path: String,
    query: String,
    range: Option<String>,
    authorization: Option<String>,
    proxy_authorization: Option<String>,
    content_type: String,
    body: Bytes,
    here: SocketAddr,
}

impl Asked {
    fn line(&self) -> String {
        let joint = if self.query.is_empty() { "" } else { "?" };
        format!("{} {}{joint}{}", self.method, self.path, self.query)
    }

    fn parameter(&self, name: &str) -> Option<String> {
        let mut pairs = self.query.split('&').filter_map(|pair| pair.split_once('='));
        let (_, value) = pairs.find(|(key, _)| *key == name)?;
        Some(percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned())
    }
}

/// An answer before faults are applied to its body.
struct Answer {
    status: u16,
    headers: Vec<(HeaderName, String)>,
    body: Bytes,
    /// Offset in the blob of the body's first byte.
    offset: u64,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Bytes::new(), offset: 0 }
    }

    fn error(status: u16, code: &str) -> Self {
        let text = format!(r#"{{"errors":[{{"code":"{code}","message":"told by the double"}}]}}"#);
        Self { body: text.into(), ..Self::new(status) }
    }

    fn with(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value.into()));
        self
    }

    fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }
}

pub async fn answer(
    request: Request<Incoming>,
    here: SocketAddr,
    state: Shared,
    origin: Shared,
) -> Result<Response<Scripted>, Infallible> {
    let (parts, incoming) = request.into_parts();
    let field =
        |name: HeaderName| parts.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let body = incoming.collect().await.map(Collected::to_bytes);
    let asked = Asked {
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        range: field(RANGE),
        authorization: field(AUTHORIZATION),
        proxy_authorization: field(PROXY_AUTHORIZATION),
        content_type: field(CONTENT_TYPE).unwrap_or_default(),
        method: parts.method,
        // A broken upload is not an upload.
        body: body.unwrap_or_default(),
        here,
    };
    let faults = take_faults(&mut lock(&state), &asked.line());
    for fault in &faults {
        match fault {
            Fault::Delay(time) => tokio::time::sleep(*time).await,
            Fault::RevokeTokens => lock(&state).tokens.clear(),
            _ => {}
        }
    }
    let plain = if parts.headers.get(RANGE).is_some()
        && faults.iter().any(|fault| matches!(fault, Fault::IgnoreRange))
    {
        Asked { range: None, ..asked }
    } else {
        asked
    };
    let answer = match faults.iter().find_map(|fault| instead(fault, &plain, &origin)) {
        Some(answer) => answer,
        None if plain.path.starts_with("/accelerator/") => from_peer(&plain, &origin),
        None if plain.path.starts_with("/storage/") => from_storage(&plain, &origin),
        None => route(&plain, &mut lock(&state)),
    };
    Ok(send(answer, &plain, &faults, &state))
}

fn take_faults(state: &mut State, line: &str) -> Vec<Fault> {
    let mut taken = Vec::new();
    for (pattern, fault, times) in &mut state.faults {
        if *times > 0 && line.contains(pattern.as_str()) {
            *times -= 1;
            taken.push(fault.clone());
        }
    }
    taken
}

/// The answer of a fault that replaces it.
fn instead(fault: &Fault, asked: &Asked, origin: &Shared) -> Option<Answer> {
    match fault {
        Fault::Status(status) => Some(Answer::error(*status, "FAULT")),
        Fault::LoginPage => {
            Some(Answer::new(200).with(CONTENT_TYPE, "text/html").body("<html>log in</html>"))
        }
        Fault::RetryAfter(status, text) => {
            Some(Answer::error(*status, "TOOMANYREQUESTS").with(RETRY_AFTER, text))
        }
        Fault::Location(location) => Some(Answer::new(307).with(LOCATION, location)),
        Fault::Redirect(base, seconds) => {
            // Only a client that may read the blob is redirected to it.
            let mut state = lock(origin);
            if let Some(refusal) = refuse(asked, &mut state) {
                return Some(refusal);
            }
            let signature = format!("sig{}", state.next_number());
            let life = Duration::from_secs(*seconds);
            state.signatures.insert(signature.clone(), Instant::now() + life);
            let at = (SystemTime::now() + life).duration_since(UNIX_EPOCH).unwrap().as_secs();
            let blob = asked.path.trim_start_matches("/v2/").replace("/blobs/", "/");
            Some(Answer::new(307).with(
                LOCATION,
                format!("{base}/storage/{blob}?Expires={at}&signature={signature}"),
            ))
        }
        _ => None,
    }
}

/// `/storage/<repository>/<digest>?signature=…`.
fn from_storage(asked: &Asked, origin: &Shared) -> Answer {
    let state = lock(origin);
    let signature = asked.parameter("signature").unwrap_or_default();
    if state.signatures.get(&signature).is_none_or(|until| *until <= Instant::now()) {
        return Answer::error(403, "AccessDenied");
    }
    if asked.authorization.is_some() {
        return Answer::error(400, "InvalidArgument"); // Object stores answer so to two proofs at once.
    }
    let name = asked.path.trim_start_matches("/storage/");
    let Some((repository, digest)) = name.rsplit_once('/') else {
        return Answer::error(404, "NoSuchKey");
    };
    blob_answer(asked, &state, repository, digest)
}

/// `/accelerator/http://host/v2/…` or `…/storage/…`: the answer of the registry or its store.
fn from_peer(asked: &Asked, origin: &Shared) -> Answer {
    let at = |part: &str| asked.path.find(part).map(|at| asked.path[at..].to_owned());
    let path = at("/storage/").or_else(|| at("/v2/")).unwrap_or_default();
    let within = Asked { path, ..asked.clone() };
    if within.path.starts_with("/storage/") {
        return from_storage(&within, origin);
    }
    route(&within, &mut lock(origin))
}

fn route(asked: &Asked, state: &mut State) -> Answer {
    if asked.path == "/token" {
        return token(asked, state);
    }
    let Some(path) = asked.path.strip_prefix("/v2/") else { return Answer::error(404, "UNKNOWN") };
    if let Some(refusal) = refuse(asked, state) {
        return refusal;
    }
    if path.is_empty() {
        return Answer::new(200);
    }
    let reading = matches!(asked.method, Method::GET | Method::HEAD);
    if let Some((repository, session)) = path.split_once("/blobs/uploads/") {
        upload(asked, state, repository, session)
    } else if let Some((repository, digest)) = path.split_once("/blobs/") {
        blob_answer(asked, state, repository, digest)
    } else if let Some((repository, reference)) = path.split_once("/manifests/") {
        if reading {
            manifest(state, repository, reference)
        } else {
            put_manifest(asked, state, repository, reference)
        }
    } else if let Some((repository, digest)) = path.split_once("/referrers/") {
        referrers(state, repository, digest)
    } else {
        Answer::error(404, "UNKNOWN")
    }
}

fn refuse(asked: &Asked, state: &mut State) -> Option<Answer> {
    let given = asked.authorization.as_deref().unwrap_or_default();
    match state.access.clone().unwrap_or(Access::Open) {
        Access::Open => None,
        Access::Basic(login) => {
            let expected = format!("Basic {}", STANDARD.encode(login));
            let challenge = r#"Basic realm="the double""#;
            (given != expected)
                .then(|| Answer::error(401, "UNAUTHORIZED").with(WWW_AUTHENTICATE, challenge))
        }
        Access::Bearer { refusal, .. } => {
            let token = given.strip_prefix("Bearer ").unwrap_or_default();
            if state.tokens.get(token).is_some_and(|until| *until > Instant::now()) {
                return None;
            }
            if refusal == 403 && !given.is_empty() {
                return Some(Answer::error(403, "DENIED"));
            }
            let name = asked.path.trim_start_matches("/v2/");
            let end = ["/blobs/", "/manifests/", "/referrers/"]
                .iter()
                .filter_map(|part| name.find(part))
                .min();
            let repository = &name[..end.unwrap_or(0)];
            let reading = matches!(asked.method, Method::GET | Method::HEAD);
            let actions = if reading { "pull" } else { "pull,push" };
            let challenge = format!(
                r#"Bearer realm="http://{}/token",service="the double & co",scope="repository:{repository}:{actions}""#,
                asked.here
            );
            Some(Answer::error(401, "UNAUTHORIZED").with(WWW_AUTHENTICATE, challenge))
        }
    }
}

fn token(asked: &Asked, state: &mut State) -> Answer {
    let Some(Access::Bearer { login, stated_life, real_life, .. }) = state.access.clone() else {
        return Answer::error(404, "UNKNOWN");
    };
    let expected = login.map(|login| format!("Basic {}", STANDARD.encode(login)));
    if asked.method == Method::GET && expected.is_some() && asked.authorization != expected {
        return Answer::error(401, "UNAUTHORIZED");
    }
    if asked.method == Method::POST
        && !String::from_utf8_lossy(&asked.body).contains("refresh_token=refresh%2Bme")
    {
        return Answer::error(401, "UNAUTHORIZED");
    }
    let token = format!("token-{}", state.next_number());
    state.tokens.insert(token.clone(), Instant::now() + real_life);
    let name = if asked.method == Method::POST { "access_token" } else { "token" };
    Answer::new(200)
        .body(format!(r#"{{"{name}":"{token}","expires_in":{}}}"#, stated_life.as_secs()))
}

fn blob_answer(asked: &Asked, state: &State, repository: &str, digest: &str) -> Answer {
    let blob = digest
        .parse()
        .ok()
        .and_then(|digest: Digest| state.blobs.get(&(repository.to_owned(), digest)));
    let Some(blob) = blob else { return Answer::error(404, "BLOB_UNKNOWN") };
    let whole = Answer::new(200).with(CONTENT_TYPE, "application/octet-stream").body(blob.clone());
    let Some(range) = &asked.range else { return whole };
    let (first, last) =
        range.strip_prefix("bytes=").and_then(|range| range.split_once('-')).unwrap();
    let first: usize = first.parse().unwrap();
    let last = last.parse().unwrap_or(usize::MAX).min(blob.len() - 1);
    if first > last {
        return Answer::error(416, "RANGE");
    }
    let stated = format!("bytes {first}-{last}/{}", blob.len());
    let part = Answer { offset: first as u64, status: 206, ..whole };
    part.with(CONTENT_RANGE, stated).body(blob.slice(first..=last))
}

fn manifest(state: &State, repository: &str, reference: &str) -> Answer {
    let Some(found) = state.manifests.get(&(repository.to_owned(), reference.to_owned())) else {
        return Answer::error(404, "MANIFEST_UNKNOWN");
    };
    Answer::new(200)
        .with(CONTENT_TYPE, &found.media_type)
        .with(
            HeaderName::from_static("docker-content-digest"),
            Digest::of(&found.bytes).to_string(),
        )
        .body(found.bytes.clone())
}

fn put_manifest(asked: &Asked, state: &mut State, repository: &str, reference: &str) -> Answer {
    let digest = Digest::of(&asked.body);
    store_manifest(state, repository, reference, &asked.content_type, &asked.body);
    Answer::new(201)
        .with(LOCATION, format!("/v2/{repository}/manifests/{digest}"))
        .with(HeaderName::from_static("docker-content-digest"), digest.to_string())
}

pub fn store_manifest(
    state: &mut State,
    repository: &str,
    reference: &str,
    media_type: &str,
    bytes: &Bytes,
) {
    let digest = Digest::of(bytes).to_string();
    for name in [reference, &digest] {
        let stored = StoredManifest { media_type: media_type.to_owned(), bytes: bytes.clone() };
        state.manifests.insert((repository.to_owned(), name.to_owned()), stored);
    }
}

/// An index of the manifests whose `subject` is `digest`.
fn referrers(state: &State, repository: &str, digest: &str) -> Answer {
    let refers = |bytes: &[u8]| {
        let json: Option<serde_json::Value> = serde_json::from_slice(bytes).ok();
        json.is_some_and(|json| json["subject"]["digest"] == digest)
    };
    let found = state.manifests.iter().filter(|((place, name), stored)| {
        place == repository && name.starts_with("sha256:") && refers(&stored.bytes)
    });
    let manifests: Vec<_> = found
        .map(|((_, name), stored)| {
            let manifest: serde_json::Value =
                serde_json::from_slice(&stored.bytes).unwrap_or_default();
            serde_json::json!({
                "mediaType": stored.media_type, "digest": name, "size": stored.bytes.len(),
                // Distribution specification, "Listing Referrers": taken from the manifest.
                "artifactType": manifest["artifactType"], "annotations": manifest["annotations"],
            })
        })
        .collect();
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
    Answer::new(200).with(CONTENT_TYPE, media_type).body(index.to_string())
}

fn upload(asked: &Asked, state: &mut State, repository: &str, session: &str) -> Answer {
    let goes_on = |state: &State, session: &str| {
        let length = state.uploads[session].len();
        Answer::new(202)
            .with(LOCATION, format!("/v2/{repository}/blobs/uploads/{session}?state={length}"))
            .with(RANGE, format!("0-{}", length.saturating_sub(1)))
    };
    match asked.method {
        Method::POST => {
            let mount = asked.parameter("mount").and_then(|digest| digest.parse::<Digest>().ok());
            if let (Some(digest), Some(from)) = (mount, asked.parameter("from"))
                && let Some(bytes) = state.blobs.get(&(from, digest)).cloned()
            {
                state.blobs.insert((repository.to_owned(), digest), bytes);
                return Answer::new(201).with(LOCATION, format!("/v2/{repository}/blobs/{digest}"));
            }
            let session = format!("session{}", state.next_number());
            state.uploads.insert(session.clone(), Vec::new());
            goes_on(state, &session)
        }
        Method::PATCH | Method::PUT => {
            let Some(known) = state.uploads.get_mut(session) else {
                return Answer::error(404, "BLOB_UPLOAD_UNKNOWN");
            };
            known.extend_from_slice(&asked.body);
            if asked.method == Method::PATCH {
                return goes_on(state, session);
            }
            let bytes = Bytes::from(state.uploads.remove(session).unwrap_or_default());
            let digest = Digest::of(&bytes);
            if asked.parameter("digest") != Some(digest.to_string()) {
                return Answer::error(400, "DIGEST_INVALID");
            }
            state.blobs.insert((repository.to_owned(), digest), bytes);
            Answer::new(201)
                .with(LOCATION, format!("/v2/{repository}/blobs/{digest}"))
                .with(HeaderName::from_static("docker-content-digest"), digest.to_string())
        }
        _ => Answer::error(405, "UNSUPPORTED"),
    }
}

/// Applies the faults of the body, records the request, and sends.
fn send(mut answer: Answer, asked: &Asked, faults: &[Fault], state: &Shared) -> Response<Scripted> {
    let mut end = None;
    let mut stated = Some(answer.body.len());
    for fault in faults {
        let length = answer.body.len();
        match fault {
            Fault::ShortBody(less) => {
                answer.body.truncate(length.saturating_sub(*less));
                stated = Some(answer.body.len());
            }
            Fault::LongBody(more) => {
                answer.body = [&answer.body[..], &vec![0xEE; *more]].concat().into();
                stated = None;
            }
            Fault::DropAfter(count) => {
                answer.body.truncate(*count);
                end = Some(Step::Break);
            }
            Fault::StallAfter(count) => {
                answer.body.truncate(*count);
                end = Some(Step::Stall);
            }
            Fault::ContentRange(text) => answer = answer.with(CONTENT_RANGE, text),
            Fault::Flip(at, bits) => {
                let mut bytes = answer.body.to_vec();
                if let Some(byte) =
                    at.checked_sub(answer.offset).and_then(|at| bytes.get_mut(at as usize))
                {
                    *byte ^= bits;
                }
                answer.body = bytes.into();
            }
            Fault::Garbage(bytes) => {
                answer.body = bytes.clone().into();
                stated = Some(bytes.len());
            }
            _ => {}
        }
    }
    let head = asked.method == Method::HEAD;
    let body = if head { Bytes::new() } else { answer.body };
    lock(state).log.push(Seen {
        line: asked.line(),
        range: asked.range.clone(),
        authorization: asked.authorization.clone(),
        proxy_authorization: asked.proxy_authorization.clone(),
        status: answer.status,
        sent: body.len(),
    });
    let mut response = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        response = response.header(name, value);
    }
    if let Some(stated) = stated {
        response = response.header(CONTENT_LENGTH, stated);
    }
    response.body(Scripted::new(&body, end)).unwrap()
}
