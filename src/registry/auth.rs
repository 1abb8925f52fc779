//! Challenges and tokens.
//!
//! A registry answers 401 with one or more challenges (RFC 9110 11.6.1). The answer to `Basic` is
//! the password itself. `Bearer` names a token service (`realm`) that turns the password, or
//! nothing, into a token for a scope such as `repository:team/app:pull`.
//!
//! Tokens are kept per registry, repository and action, and replaced a little before they expire.
//! When a registry still refuses one (401, or 403: some registries answer an expired token so), it
//! is replaced once. If many threads are refused at the same time, one fetches the new token and
//! the others use it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT, WWW_AUTHENTICATE,
};
use hyper::{HeaderMap, Method, Request, Uri};
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::client::Services;
use super::credentials::Credential;
use super::error::RegistryError;
use super::reach::Reach;
use super::redirect::same_origin;

/// Characters of a query value that are percent-encoded: all but the unreserved ones of RFC 3986.
const QUERY_VALUE: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Lifetime of a token whose answer states none (distribution specification, token authentication).
const DEFAULT_TOKEN_LIFE: Duration = Duration::from_secs(60);

/// Pause between two attempts to replace a token that has not been refused yet.
const REPLACE_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Limit on a token service's answer in bytes. Tokens are a few KiB; some carry a list of groups.
const TOKEN_ANSWER_LIMIT: usize = 256 << 10;

/// One authentication method that a server offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// A token from a token service.
    Bearer {
        /// URL of the service.
        realm: String,
        /// Name of this registry as the token service knows it.
        service: Option<String>,
        /// Scope that the token must have.
        scope: Option<String>,
    },
    /// The password itself.
    Basic,
}

/// All challenges in the `WWW-Authenticate` fields of an answer; unknown schemes are skipped.
#[must_use]
pub fn parse_challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let fields = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    fields.flat_map(parse_field).collect()
}

/// One field: `Scheme name=token, name="quoted", Scheme2 …`.
fn parse_field(field: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, HashMap<String, String>)> = Vec::new();
    let mut rest = field.trim_start_matches([' ', '\t', ',']);
    while !rest.is_empty() {
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let next = after.trim_start_matches([' ', '\t']);
        if let (Some(value), false) = (next.strip_prefix('='), word.is_empty()) {
            let (text, after) = parse_value(value.trim_start_matches([' ', '\t']));
            if let Some((_, parameters)) = found.last_mut() {
                parameters.entry(word.to_ascii_lowercase()).or_insert(text);
            }
            rest = after;
        } else {
            if !word.is_empty() {
                found.push((word.to_ascii_lowercase(), HashMap::new()));
            }
            rest = next.strip_prefix('=').unwrap_or(next);
        }
        rest = rest.trim_start_matches([' ', '\t', ',']);
    }
    found.into_iter().filter_map(|(scheme, parameters)| challenge(&scheme, parameters)).collect()
}

/// Splits off a token, or a quoted string without its escapes; returns it and the rest.
fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

fn challenge(scheme: &str, mut parameters: HashMap<String, String>) -> Option<Challenge> {
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: parameters.remove("realm")?,
            service: parameters.remove("service"),
            scope: parameters.remove("scope"),
        }),
        _ => None,
    }
}

/// Purpose of a token: a repository of a registry, and an action.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Scope {
    /// The registry's origin, such as `https://registry.example`.
    pub(super) origin: String,
    /// Host with its port: the key for credentials.
    pub(super) host: String,
    pub(super) repository: String,
    /// `pull` or `pull,push`.
    pub(super) actions: &'static str,
    /// True if the host is a mirror of another registry.
    pub(super) is_mirror: bool,
}

/// Tokens by [`Scope`].
#[derive(Default)]
pub(super) struct TokenCache {
    slots: Mutex<HashMap<Scope, Arc<Mutex<TokenSlot>>>>,
}

#[derive(Default)]
struct TokenSlot {
    header: Option<HeaderValue>,
    replace_at: Option<Instant>,
    /// The last challenge, for a refresh ahead of time and after a 403 without a challenge.
    challenges: Vec<Challenge>,
}

impl TokenCache {
    fn slot(&self, scope: &Scope) -> Arc<Mutex<TokenSlot>> {
        self.slots.lock().entry(scope.clone()).or_default().clone()
    }

    /// The `Authorization` header to send, if one is known; a token about to expire is replaced
    /// first.
    pub(super) fn current(
        &self,
        services: &Services,
        scope: &Scope,
        deadline: Instant,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let slot = self.slot(scope);
        let mut slot = slot.lock();
        if slot.replace_at.is_some_and(|at| at <= Instant::now()) {
            let challenges = slot.challenges.clone();
            if let Err(error) = answer(services, scope, &challenges, deadline, &mut slot) {
                // The token may still be valid; if it is not, the registry answers 401.
                tracing::warn!(%error, "registry: keeping a token that could not be replaced ahead of time");
                slot.replace_at = Some(Instant::now() + REPLACE_AGAIN_AFTER);
            }
        }
        Ok(slot.header.clone())
    }

    /// A new `Authorization` after `refused` was answered with 401 or 403; `None` when there is
    /// nothing new to try, and an error with the reason when the new one could not be obtained.
    pub(super) fn renew(
        &self,
        services: &Services,
        scope: &Scope,
        refused: Option<&HeaderValue>,
        challenges: Vec<Challenge>,
        deadline: Instant,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let slot = self.slot(scope);
        let mut slot = slot.lock();
        if let Some(header) = &slot.header
            && Some(header) != refused
        {
            return Ok(Some(header.clone())); // Another thread has already renewed it.
        }
        let challenges = if challenges.is_empty() { slot.challenges.clone() } else { challenges };
        if challenges.is_empty() {
            return Ok(None);
        }
        let header = answer(services, scope, &challenges, deadline, &mut slot)?;
        Ok(Some(header).filter(|header| Some(header) != refused))
    }
}

/// Answers the strongest of `challenges` and stores the answer in `slot`.
fn answer(
    services: &Services,
    scope: &Scope,
    challenges: &[Challenge],
    deadline: Instant,
    slot: &mut TokenSlot,
) -> Result<HeaderValue, RegistryError> {
    let (credential, problem) = match services.credentials.find(scope) {
        Ok(credential) => (credential, None),
        Err(problem) => {
            tracing::warn!(%problem, "registry: continuing without credentials");
            (None, Some(problem.to_string()))
        }
    };
    let asker = Asker { services, scope, credential, problem, deadline };
    let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
    let (header, life) = match bearer.or(challenges.first()) {
        Some(Challenge::Bearer { realm, service, scope }) => {
            asker.token(realm, service.as_deref(), scope.as_deref())?
        }
        Some(Challenge::Basic) => (asker.basic_header()?, None),
        None => {
            return Err(
                asker.denied("it offers no way to log in that is supported (Bearer, Basic)")
            );
        }
    };
    *slot = TokenSlot {
        header: Some(header.clone()),
        replace_at: life
            .map(|life| Instant::now() + life - (life / 4).min(Duration::from_secs(30))),
        challenges: challenges.to_vec(),
    };
    Ok(header)
}

struct Asker<'a> {
    services: &'a Services,
    scope: &'a Scope,
    credential: Option<Credential>,
    problem: Option<String>,
    deadline: Instant,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Asker<'_> {
    fn denied(&self, reason: &str) -> RegistryError {
        let hint = match (&self.problem, &self.credential) {
            (Some(problem), _) => format!("; {problem}"),
            (None, None) => format!("; no credentials were found for {}", self.scope.host),
            (None, Some(_)) => String::new(),
        };
        RegistryError::Denied {
            what: format!("{}/{}", self.scope.host, self.scope.repository),
            host: self.scope.host.clone(),
            reason: format!("{reason}{hint}"),
        }
    }

    fn basic_header(&self) -> Result<HeaderValue, RegistryError> {
        let Some(Credential::Password { user, password }) = &self.credential else {
            return Err(self.denied("it wants a user name and a password"));
        };
        secret_header(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            .ok_or_else(|| self.denied("the password cannot be sent"))
    }

    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<(HeaderValue, Option<Duration>), RegistryError> {
        let what = format!("a token for {}/{}", self.scope.host, self.scope.repository);
        let request = self.token_request(realm, service, scope)?;
        let host = request.uri().authority().map_or_else(String::new, ToString::to_string);
        // The service is named by the registry.
        let reach = self.reach(request.uri());
        let reply = self
            .services
            .transport
            .send(request, reach, Some(self.deadline))
            .map_err(|error| self.services.broken(&what, &host, &error))?;
        if reply.status == 401 || reply.status == 403 {
            let text = super::client::read_complaint(reply.body);
            return Err(self.denied(&format!("the token service {host} refused{}", join(&text))));
        }
        if reply.status != 200 {
            return Err(super::client::refusal(&what, &host, &self.scope.host, reply));
        }
        let body = reply
            .body
            .collect(TOKEN_ANSWER_LIMIT)
            .map_err(|error| self.services.broken(&what, &host, &error))?;
        let protocol = |rule: &str| RegistryError::Protocol {
            what: what.clone(),
            host: host.clone(),
            rule: rule.into(),
        };
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| protocol("the token service's answer is not valid JSON of a token"))?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| protocol("the token service's answer holds no token"))?;
        let header = secret_header(format!("Bearer {token}"))
            .ok_or_else(|| protocol("the token holds characters that cannot be sent"))?;
        let life = answer
            .expires_in
            .filter(|seconds| *seconds > 0)
            .map_or(DEFAULT_TOKEN_LIFE, Duration::from_secs);
        // A day at most: the clock arithmetic has a bound, and a wrong number does no harm.
        Ok((header, Some(life.min(Duration::from_secs(86_400)))))
    }

    fn token_request(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<Request<Bytes>, RegistryError> {
        let wrong = || RegistryError::Protocol {
            what: format!("a token for {}/{}", self.scope.host, self.scope.repository),
            host: self.scope.host.clone(),
            rule: format!("its token service {realm:?} is not a usable URL"),
        };
        let own_scope = format!("repository:{}:{}", self.scope.repository, self.scope.actions);
        let scopes = scope.filter(|scope| !scope.is_empty()).unwrap_or(&own_scope);
        let mut query = String::new();
        let mut add = |name: &str, value: &str| {
            let joint = if query.is_empty() { "" } else { "&" };
            query.push_str(&format!("{joint}{name}={}", utf8_percent_encode(value, QUERY_VALUE)));
        };
        if let Some(service) = service {
            add("service", service);
        }
        let refresh = matches!(self.credential, Some(Credential::IdentityToken(_)));
        if refresh {
            add("scope", scopes);
        } else {
            // Several scopes of one challenge become several parameters (distribution,
            // token/scope).
            scopes.split_ascii_whitespace().for_each(|scope| add("scope", scope));
        }
        if let Some(Credential::IdentityToken(token)) = &self.credential {
            add("grant_type", "refresh_token");
            add("client_id", "turbobd");
            add("refresh_token", token);
        }
        let base: Uri = realm.parse().map_err(|_| wrong())?;
        self.check_realm(&base).ok_or_else(wrong)?;
        let joint = if realm.contains('?') { '&' } else { '?' };
        let request = Request::builder()
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, &self.services.user_agent);
        let built = if refresh {
            request
                .method(Method::POST)
                .uri(base)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(query.into())
        } else {
            let mut request = request.method(Method::GET).uri(format!("{realm}{joint}{query}"));
            if let Some(Credential::Password { .. }) = &self.credential {
                request = request.header(AUTHORIZATION, self.basic_header()?);
            }
            request.body(Bytes::new())
        };
        built.map_err(|_| wrong())
    }

    fn reach(&self, url: &Uri) -> Reach {
        let trusted = &self.services.trusted;
        let origin = self.scope.origin.parse();
        origin.map_or(Reach::OfRegistry, |origin| Reach::from(&origin, url, trusted))
    }

    /// Refuses a realm in clear text for a registry reached by TLS: it would make this client send
    /// a password in clear text, and take a token from it.
    fn check_realm(&self, realm: &Uri) -> Option<()> {
        let origin: Uri = self.scope.origin.parse().ok()?;
        let clear = realm.scheme_str() == Some("http");
        let known = clear || realm.scheme_str() == Some("https");
        let loopback = realm.host().is_some_and(super::proxy::is_loopback);
        let harmless =
            origin.scheme_str() == Some("http") || loopback || same_origin(realm, &origin);
        (known && realm.host().is_some() && (!clear || harmless)).then_some(())
    }
}

fn secret_header(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn join(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        }
    }

    #[test]
    fn several_challenges_in_one_field_are_told_apart() {
        let field = r#"Negotiate, Digest realm="x", qop="auth, int", Basic realm="r, \"q\"", Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push""#;
        let expected = vec![
            Challenge::Basic,
            bearer("https://a/t", Some("s"), Some("repository:a/b:pull,push")),
        ];
        assert_eq!(parse_field(field), expected);
        let spaced = "bearer  realm = https://a/t , SERVICE=s";
        assert_eq!(parse_field(spaced), vec![bearer("https://a/t", Some("s"), None)]);
    }

    #[test]
    fn no_text_of_a_server_makes_the_parser_fail() {
        for text in [
            "",
            ",",
            "=",
            "Bearer",
            "Bearer realm",
            "Bearer realm=",
            "Bearer realm=\"",
            "==,=,\"",
            "é é=é",
            "Basic =",
        ] {
            let _ = parse_field(text);
        }
        assert_eq!(parse_field("Bearer service=\"s\""), vec![], "a realm is required");
    }
}

#[cfg(test)]
mod properties {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_field_is_parsed_to_its_end(text in ".{0,80}") {
            let _ = super::parse_field(&text);
        }
    }
}
