//! Credentials per registry.
//!
//! The sources, in this order: the command line (`-u user:password`), a credential service
//! ([`credential_service`](super::credential_service)), then files of docker's form; the first that
//! has the repository wins. A file is `{"auths": {"host" | "host/path": {"auth": base64} |
//! {"username", "password"}}}`; overlaybd's `/opt/overlaybd/cred.json` has the same form (spec
//! runtime 3). Within a file the **longest** key that is the repository or a folder above it wins,
//! in any order of keys; docker's credential programs (`credHelpers`, `credsStore`) are asked
//! before its `auths`.
//!
//! Files are read again for every token, so a rotated password is found. No part of a secret is
//! ever in a message, a log line or a `Debug` text.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use thiserror::Error;

use super::auth::Scope;
use super::credential_service::CredentialService;

/// Time limit for a credential program, which is stopped after it. Some programs ask a cloud's
/// metadata server.
const HELPER_TIMEOUT: Duration = Duration::from_secs(15);

/// Keys of docker's hub in `auths`, and the host that serves it.
const HUB_KEYS: [&str; 3] = ["index.docker.io", "docker.io", "registry-1.docker.io"];

/// A credential.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// A name and its password, or an access token used as one.
    Password {
        /// User name.
        user: String,
        /// Its secret.
        password: String,
    },
    /// A refresh token that the registry's token service exchanges for access tokens (docker's
    /// `identitytoken`).
    IdentityToken(String),
}

impl Credential {
    /// Reads `user:password`, the form of `-u`. A password may contain colons and may be missing.
    #[must_use]
    pub fn from_user_password(text: &str) -> Self {
        let (user, password) = text.split_once(':').unwrap_or((text, ""));
        Self::Password { user: user.to_owned(), password: password.to_owned() }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Credential::Password(hidden)",
            Self::IdentityToken(_) => "Credential::IdentityToken(hidden)",
        })
    }
}

/// Reasons why a source of credentials is unusable.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CredentialError {
    /// The file exists but cannot be read.
    #[error("Cannot read the credentials in {}: {reason}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// The file is not in docker's form. The text is never quoted: it may hold secrets.
    #[error("The credentials in {} are not in docker's form: {rule}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        rule: String,
    },
    /// A credential service failed.
    #[error("The credential service {address} failed: {reason}")]
    Service {
        /// Its URL or socket.
        address: String,
        /// Reason of the failure.
        reason: String,
    },
    /// A credential program failed.
    #[error("The credential program docker-credential-{name} (named in {}) failed: {reason}", .path.display())]
    Helper {
        /// Its name without the prefix.
        name: String,
        /// The file that names it.
        path: PathBuf,
        /// Reason of the failure.
        reason: String,
    },
}

/// The sources, in order.
#[derive(Clone, Debug, Default)]
pub struct CredentialStore {
    /// Credential from the command line; used for every registry that asks for one.
    pub explicit: Option<Credential>,
    /// A service to ask before any file.
    pub service: Option<CredentialService>,
    /// Files of docker's form; missing files are skipped.
    pub files: Vec<PathBuf>,
}

impl CredentialStore {
    /// Files that docker, podman and overlaybd use on this machine.
    #[must_use]
    pub fn default_files() -> Vec<PathBuf> {
        let variable = |name: &str| {
            std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
        };
        let home = variable("HOME").map(|home| home.join(".docker"));
        let docker = variable("DOCKER_CONFIG").or(home).map(|folder| folder.join("config.json"));
        let podman = variable("REGISTRY_AUTH_FILE")
            .or_else(|| variable("XDG_RUNTIME_DIR").map(|run| run.join("containers/auth.json")));
        docker
            .into_iter()
            .chain(podman)
            .chain([PathBuf::from("/opt/overlaybd/cred.json")])
            .collect()
    }

    /// The credential for a repository of a host, or `None` for anonymous access. A credential
    /// given for the registry is not used for its mirrors.
    ///
    /// # Errors
    /// Returns the error of the first unusable source, when no other source has an answer.
    pub(super) fn find(&self, scope: &Scope) -> Result<Option<Credential>, CredentialError> {
        let (host, repository) = (scope.host.as_str(), scope.repository.as_str());
        if let Some(credential) = self.explicit.as_ref().filter(|_| !scope.is_mirror) {
            return Ok(Some(credential.clone()));
        }
        let mut problem = None;
        if let Some(service) = &self.service {
            match service.find(scope) {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => problem = Some(error),
            }
        }
        for path in &self.files {
            match find_in_file(path, host, repository) {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => {
                    problem.get_or_insert(error);
                }
            }
        }
        problem.map_or(Ok(None), Err)
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct AuthFile {
    auths: std::collections::BTreeMap<String, AuthEntry>,
    #[serde(rename = "credHelpers")]
    helpers: std::collections::BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

fn find_in_file(
    path: &Path,
    host: &str,
    repository: &str,
) -> Result<Option<Credential>, CredentialError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(CredentialError::Unreadable {
                path: path.to_owned(),
                reason: error.to_string(),
            });
        }
    };
    let file: AuthFile =
        serde_json::from_slice(&text).map_err(|error| CredentialError::Malformed {
            path: path.to_owned(),
            // Only the position: serde's text may quote the value.
            rule: format!("line {}, column {}", error.line(), error.column()),
        })?;
    if let Some(name) = longest_match(&file.helpers, host, repository) {
        return ask_helper(path, name, host);
    }
    if let Some(name) = file.store.as_deref().filter(|name| !name.is_empty()) {
        match ask_helper(path, name, host) {
            Ok(None) => {}
            found => return found,
        }
    }
    longest_match(&file.auths, host, repository).map_or(Ok(None), |entry| read_entry(path, entry))
}

/// The value under the longest key that is `host/repository` or a folder above it.
fn longest_match<'a, V>(
    map: &'a std::collections::BTreeMap<String, V>,
    host: &str,
    repository: &str,
) -> Option<&'a V> {
    let hub = HUB_KEYS.contains(&host);
    let hosts: &[&str] = if hub { &HUB_KEYS } else { &[host] };
    let best = map
        .iter()
        .filter_map(|(key, value)| {
            let key = normal_key(key);
            let matches = hosts.iter().any(|host| {
                let target = format!("{host}/{repository}");
                target
                    .strip_prefix(key)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            });
            (matches && !key.is_empty()).then_some((key.len(), value))
        })
        .max_by_key(|(length, _)| *length)?;
    Some(best.1)
}

/// `https://index.docker.io/v1/` → `index.docker.io`: docker writes old URLs, other tools bare
/// hosts.
fn normal_key(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key)
}

/// The credential in `auths` of docker's form; `name` is the file or service that holds them.
pub(super) fn find_in_auths(
    name: &Path,
    auths: serde_json::Value,
    scope: &Scope,
) -> Result<Option<Credential>, CredentialError> {
    let auths: std::collections::BTreeMap<String, AuthEntry> = serde_json::from_value(auths)
        .map_err(|_| CredentialError::Malformed {
            path: name.to_owned(),
            rule: "auths is not an object of credentials".to_owned(),
        })?;
    longest_match(&auths, &scope.host, &scope.repository)
        .map_or(Ok(None), |entry| read_entry(name, entry))
}

fn read_entry(path: &Path, entry: &AuthEntry) -> Result<Option<Credential>, CredentialError> {
    let present = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    if let Some(token) = present(&entry.identitytoken) {
        return Ok(Some(Credential::IdentityToken(token)));
    }
    if let Some(encoded) = present(&entry.auth) {
        let malformed = |rule: &str| CredentialError::Malformed {
            path: path.to_owned(),
            rule: rule.to_owned(),
        };
        let encoded = encoded.trim();
        let decoded = STANDARD
            .decode(encoded)
            .or_else(|_| STANDARD_NO_PAD.decode(encoded))
            .map_err(|_| malformed("a value of auth is not base64"))?;
        let text =
            String::from_utf8(decoded).map_err(|_| malformed("a value of auth is not UTF-8"))?;
        let text = text.trim_end_matches('\0');
        if !text.contains(':') {
            return Err(malformed("a value of auth is not user:password"));
        }
        return Ok(Some(Credential::from_user_password(text)));
    }
    Ok(present(&entry.username).map(|user| Credential::Password {
        user,
        password: entry.password.clone().unwrap_or_default(),
    }))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// Runs `docker-credential-NAME get` with the server on stdin (docker's credential helper protocol).
fn ask_helper(path: &Path, name: &str, host: &str) -> Result<Option<Credential>, CredentialError> {
    let failed = |reason: &str| CredentialError::Helper {
        name: name.to_owned(),
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let plain_name =
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if !plain_name {
        return Err(failed("its name may hold letters, digits, '.', '_' and '-' only"));
    }
    let server = if HUB_KEYS.contains(&host) { "https://index.docker.io/v1/" } else { host };
    let program = Command::new(format!("docker-credential-{name}"));
    run_helper(program, server)
        .and_then(|(success, output)| read_answer(success, &output))
        .map_err(|reason| failed(&reason))
}

/// Interprets a credential program's output.
fn read_answer(success: bool, output: &[u8]) -> Result<Option<Credential>, String> {
    if !success {
        // The protocol says "credentials not found in native keychain" for "none".
        let none = String::from_utf8_lossy(output).contains("credentials not found");
        return if none { Ok(None) } else { Err("it ended with an error".to_owned()) };
    }
    let answer: HelperAnswer = serde_json::from_slice(output)
        .map_err(|_| "its answer does not follow the protocol".to_owned())?;
    Ok(Some(if answer.username == "<token>" {
        Credential::IdentityToken(answer.secret)
    } else {
        Credential::Password { user: answer.username, password: answer.secret }
    }))
}

fn run_helper(mut program: Command, server: &str) -> Result<(bool, Vec<u8>), String> {
    let mut child = program
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("it cannot be started: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input is judged by its output.
        let _ = stdin.write_all(server.as_bytes());
    }
    let started = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if started.elapsed() < HELPER_TIMEOUT => {
                thread::sleep(Duration::from_millis(5));
            }
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it did not answer in {} s", HELPER_TIMEOUT.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        }
    };
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // The pipe holds all output: the program has ended, and an answer is a few hundred bytes.
        let _ = stdout.take(64 << 10).read_to_end(&mut output);
    }
    Ok((status.success(), output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(text: &str) -> (tempfile::TempDir, CredentialStore) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        (
            folder,
            CredentialStore {
                explicit: None,
                service: None,
                files: vec![PathBuf::from("/nowhere/at/all.json"), path],
            },
        )
    }

    fn find(
        store: &CredentialStore,
        host: &str,
        repository: &str,
    ) -> Result<Option<Credential>, CredentialError> {
        store.find(&Scope {
            origin: format!("https://{host}"),
            host: host.into(),
            repository: repository.into(),
            actions: "pull",
            is_mirror: false,
        })
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.into(), password: password.into() })
    }

    #[test]
    fn the_longest_prefix_wins_whatever_the_order() {
        let (_folder, store) = store(
            r#"{"auths": {
                "r.example": {"auth": "aG9zdDpwOjE="},
                "https://r.example/team/app/": {"username": "app", "password": "p"},
                "r.example/team": {"auth": "dGVhbTpw"},
                "r.example:5000": {"auth": "cG9ydDpw"},
                "https://index.docker.io/v1/": {"auth": "aHViOnA"},
                "id.example": {"identitytoken": "refresh"}
            }, "unknown": [1]}"#,
        );
        let find = |host: &str, name: &str| find(&store, host, name).unwrap();
        assert_eq!(find("r.example", "other"), password("host", "p:1"));
        assert_eq!(find("r.example", "team/app"), password("app", "p"));
        assert_eq!(find("r.example", "team/app2"), password("team", "p"));
        assert_eq!(find("r.example:5000", "team/app"), password("port", "p"));
        assert_eq!(find("registry-1.docker.io", "library/x"), password("hub", "p"));
        assert_eq!(find("id.example", "a"), Some(Credential::IdentityToken("refresh".into())));
        assert_eq!(find("r.example.evil", "team/app"), None);
    }

    #[test]
    fn a_secret_is_in_no_text() {
        let credential = Credential::from_user_password("user:hunter2");
        assert!(!format!("{credential:?}").contains("hunter2"));
        let (_folder, broken) = store(r#"{"auths": {"r": {"auth": "hunter2"}}}"#);
        let error = find(&broken, "r", "a").unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("not in docker's form: a value of auth is not user:password")
                || error.to_string().contains("base64"),
            "{error}"
        );
        let (_folder, broken) = store(r#"{"auths": {"r": "hunter2"}}"#);
        let error = find(&broken, "r", "a").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    }

    #[test]
    fn the_command_line_comes_first() {
        let (_folder, mut store) = store(r#"{"auths": {"r": {"auth": "dGVhbTpw"}}}"#);
        store.explicit = Some(Credential::from_user_password("me:a:b"));
        assert_eq!(find(&store, "r", "x").unwrap(), password("me", "a:b"));
    }

    #[test]
    fn a_helper_with_a_path_in_its_name_is_not_run() {
        let (_folder, store) = store(r#"{"credHelpers": {"r": "../../bin/sh"}}"#);
        assert!(
            find(&store, "r", "x").unwrap_err().to_string().contains("its name may hold letters")
        );
    }

    #[test]
    fn a_helper_is_asked_by_dockers_protocol() {
        let ask = |script: &str| {
            let mut program = Command::new("sh");
            program.args(["-c", script]);
            run_helper(program, "r.example:5000")
                .and_then(|(success, output)| read_answer(success, &output))
        };
        let found = ask(
            r#"read host; echo "{\"ServerURL\":\"$host\",\"Username\":\"me\",\"Secret\":\"for $host\"}""#,
        );
        assert_eq!(found, Ok(password("me", "for r.example:5000")));
        let token = ask(r#"echo '{"Username":"<token>","Secret":"t"}'"#);
        assert_eq!(token, Ok(Some(Credential::IdentityToken("t".into()))));
        assert_eq!(ask("echo credentials not found in native keychain; exit 1"), Ok(None));
        assert_eq!(ask("echo secret; exit 1"), Err("it ended with an error".into()));
        assert_eq!(ask("echo secret"), Err("its answer does not follow the protocol".into()));
    }
}
