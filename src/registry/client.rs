//! A client, its options, and one authorised exchange.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hyper::header::{
    ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, LOCATION, RETRY_AFTER, USER_AGENT,
};
use hyper::http::uri::Authority;
use hyper::{HeaderMap, Method, Request, Uri};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use source::Origin;

use super::auth::{Scope, TokenCache, parse_challenges};
use super::credential_service::CredentialService;
use super::credentials::{Credential, CredentialStore};
use super::error::RegistryError;
use super::host::{Host, Network};
use super::proxy::{Proxies, is_loopback};
use super::reach::Reach;
use super::redirect::{MAX_HOPS, resolve, same_origin};
use super::repository::Repository;
use super::retry::{RetryPolicy, parse_retry_after};
use super::tls::{self, ClientCertificate};
use super::transport::{HttpReply, ReplyBody, Timeouts, Transport, TransportError};
use super::wait::block_on;

/// Options of a client. The default is docker's behaviour on this machine.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Use HTTP without TLS. Hosts of this machine are reached without TLS even if this is false,
    /// unless authorities or a client certificate are given.
    pub plain: bool,
    /// Accept any certificate.
    pub insecure: bool,
    /// Authorities to trust besides the platform's: PEM files, or directories of them.
    pub authorities: Vec<PathBuf>,
    /// Certificate for registries that require one.
    pub certificate: Option<ClientCertificate>,
    /// Credential for every registry that asks for one; it comes before any file.
    pub credential: Option<Credential>,
    /// Files of docker's form, in order.
    pub credential_files: Vec<PathBuf>,
    /// Proxies between this machine and the registries.
    pub proxies: Proxies,
    /// Limit of silence for each stage.
    pub timeouts: Timeouts,
    /// Tries and deadline of a command's request: manifests, uploads.
    pub retry: RetryPolicy,
    /// Tries and deadline of blob reads, which block processes.
    pub read_retry: RetryPolicy,
    /// `User-Agent` of this client.
    pub user_agent: String,
    /// True to reach hosts of this machine without TLS; with `None`, they are reached without TLS
    /// unless authorities or a client certificate are given.
    pub plain_loopback: Option<bool>,
    /// A service that gives credentials, asked before any file.
    pub credential_service: Option<CredentialService>,
    /// Mirrors by the registry's host as it is named, or `*` for any other host: URLs to ask first,
    /// in order.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// A peer-to-peer proxy for blobs: the actual URL is appended to this one.
    pub p2p: Option<String>,
    /// Hosts to which any registry may send this client, at whatever address: those of the operator.
    pub trusted: Vec<String>,
    /// State shared with other clients of this process.
    pub network: Arc<Network>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            plain: false,
            insecure: false,
            authorities: Vec::new(),
            certificate: None,
            credential: None,
            credential_files: CredentialStore::default_files(),
            proxies: Proxies::Environment,
            timeouts: Timeouts::default(),
            retry: RetryPolicy::COMMAND,
            read_retry: RetryPolicy::READ,
            user_agent: concat!("turbobd/", env!("CARGO_PKG_VERSION")).to_owned(),
            plain_loopback: None,
            credential_service: None,
            mirrors: BTreeMap::new(),
            p2p: None,
            trusted: Vec::new(),
            network: Arc::default(),
        }
    }
}

/// A pool of connections and tokens. Clones share both.
#[derive(Clone)]
pub struct RegistryClient {
    options: Arc<ClientOptions>,
    services: Arc<OnceLock<Arc<Services>>>,
}

/// State shared by all repositories of a client.
pub(super) struct Services {
    pub(super) transport: Transport,
    /// The same without the client's certificate, for hosts that an image names; `None` if there is no certificate.
    without_certificate: Option<Transport>,
    pub(super) credentials: CredentialStore,
    pub(super) tokens: TokenCache,
    pub(super) user_agent: HeaderValue,
    pub(super) retry: RetryPolicy,
    pub(super) read_retry: RetryPolicy,
    plain: bool,
    /// Reach hosts of this machine without TLS by default.
    plain_loopback: bool,
    pub(super) network: Arc<Network>,
    mirrors: BTreeMap<String, Vec<String>>,
    pub(super) trusted: Vec<String>,
    pub(super) p2p: Option<P2p>,
    /// Number of this client in this process: it stands for the secrets, which an [`Origin`] does not hold.
    number: u64,
    /// The user and the trust with which this client reaches a registry, as the end of a sentence.
    trust: String,
}

/// Number of the next client.
static NEXT_CLIENT: AtomicU64 = AtomicU64::new(1);

/// The peer-to-peer proxy.
pub(super) struct P2p {
    pub(super) address: String,
    pub(super) host: Arc<Host>,
}

impl RegistryClient {
    /// Creates a client with these options.
    ///
    /// # Errors
    /// Returns [`RegistryError::Setup`] naming the certificate, key or authority that cannot be
    /// used.
    pub fn new(options: ClientOptions) -> Result<Self, RegistryError> {
        let checked = !options.authorities.is_empty() || options.certificate.is_some();
        let client = Self { options: Arc::new(options), services: Arc::default() };
        // The user's own files are read at once. The platform's authorities, whose reading takes
        // half of the time to open an image in a local directory, are read when a registry is
        // named.
        if checked {
            client.services()?;
        }
        Ok(client)
    }

    fn services(&self) -> Result<&Arc<Services>, RegistryError> {
        if let Some(services) = self.services.get() {
            return Ok(services);
        }
        let made = Arc::new(Services::new(&self.options)?);
        Ok(self.services.get_or_init(|| made))
    }

    /// State of the hosts asked so far.
    #[must_use]
    pub fn network(&self) -> &Arc<Network> {
        &self.options.network
    }

    /// The repository `name` on `host`: `registry.example`, `127.0.0.1:5000`, `docker.io`. A host
    /// may be given as `http://…` or `https://…` to choose between clear text and TLS.
    ///
    /// # Errors
    /// Returns [`RegistryError::BadName`] when the two cannot be part of a URL;
    /// [`RegistryError::Setup`].
    pub fn repository(&self, host: &str, name: &str) -> Result<Repository, RegistryError> {
        let services = self.services()?;
        let place = Arc::new(RepositoryPlace::new(services.clone(), host, name)?);
        let urls = services.mirrors.get(&place.host).or_else(|| services.mirrors.get("*"));
        let mirrors = urls.into_iter().flatten().map(|url| place.mirror(url).map(Arc::new));
        Ok(Repository::new(place.clone(), mirrors.collect::<Result<_, _>>()?))
    }
}

impl P2p {
    fn new(address: &str, network: &Network) -> Result<Self, RegistryError> {
        let address = address.trim_end_matches('/').to_owned();
        let authority = address.parse::<Uri>().ok().and_then(|uri| uri.into_parts().authority);
        let Some(authority) = authority else {
            return Err(RegistryError::BadName { text: address, expected: "the URL of a proxy" });
        };
        Ok(Self { host: network.host(authority.as_str()), address })
    }

    /// The URL at the proxy that stands for `url`.
    pub(super) fn wrap(&self, url: &Uri) -> Result<Uri, RegistryError> {
        let text = format!("{}/{url}", self.address);
        text.parse().map_err(|_| RegistryError::BadName { text, expected: "a URL" })
    }
}

impl Services {
    fn new(options: &ClientOptions) -> Result<Self, RegistryError> {
        let network = &options.network;
        let tls =
            tls::configure(&options.authorities, options.certificate.as_ref(), options.insecure)?;
        let anonymous = match options.certificate {
            Some(_) => Some(tls::configure(&options.authorities, None, options.insecure)?),
            None => None,
        };
        let transport = |tls| Transport::new(tls, &options.proxies, options.timeouts);
        let user_agent = HeaderValue::try_from(&options.user_agent).map_err(|_| {
            RegistryError::Setup { reason: "the user agent cannot be sent in a header".to_owned() }
        })?;
        Ok(Self {
            transport: transport(&tls),
            without_certificate: anonymous.as_ref().map(transport),
            credentials: CredentialStore {
                explicit: options.credential.clone(),
                service: options.credential_service.clone(),
                files: options.credential_files.clone(),
            },
            tokens: TokenCache::default(),
            user_agent,
            retry: options.retry,
            read_retry: options.read_retry,
            plain: options.plain,
            plain_loopback: options
                .plain_loopback
                .unwrap_or(options.authorities.is_empty() && options.certificate.is_none()),
            p2p: options.p2p.as_deref().map(|address| P2p::new(address, network)).transpose()?,
            mirrors: options.mirrors.clone(),
            trusted: options.trusted.clone(),
            network: network.clone(),
            number: NEXT_CLIENT.fetch_add(1, Ordering::Relaxed),
            trust: trust(options),
        })
    }

    /// The [`RegistryError`] for a failed exchange with `host`.
    pub(super) fn broken(&self, what: &str, host: &str, error: &TransportError) -> RegistryError {
        let (what, host) = (what.to_owned(), host.to_owned());
        match error {
            TransportError::Untrusted(reason) => {
                RegistryError::Untrusted { host, reason: reason.clone() }
            }
            TransportError::OutOfReach(reason) => {
                RegistryError::OutOfReach { what, reason: reason.to_string() }
            }
            TransportError::TooLarge(limit) => RegistryError::TooLarge { what, limit: *limit },
            TransportError::Reader(source) => {
                RegistryError::Upload { what, source: source.clone() }
            }
            other => RegistryError::Unreachable { what, host, reason: other.to_string() },
        }
    }
}

/// The user and the trust of a client, without any secret.
fn trust(options: &ClientOptions) -> String {
    let mut text = String::new();
    match &options.credential {
        Some(Credential::Password { user, .. }) => text.push_str(&format!(" as {user}")),
        Some(Credential::IdentityToken(_)) => text.push_str(" by a token"),
        None => {}
    }
    if options.insecure {
        text.push_str(" with any certificate");
    }
    for authority in &options.authorities {
        text.push_str(&format!(" trusting {}", authority.display()));
    }
    if let Some(shown) = &options.certificate {
        text.push_str(&format!(" showing {}", shown.certificate.display()));
    }
    text
}

/// Who named a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PlaceRole {
    /// The user: the registry itself.
    Registry,
    /// The operator: a mirror of it.
    Mirror,
    /// An image: the `urls` of a layer's descriptor.
    Elsewhere,
}

/// One repository of one registry.
pub(super) struct RepositoryPlace {
    pub(super) services: Arc<Services>,
    /// The registry as the user names it, with its port.
    pub(super) host: String,
    /// Scheme and authority to connect to.
    pub(super) origin: Uri,
    pub(super) name: String,
    /// Query for a mirror, which names the registry that it mirrors.
    query: String,
    /// Who named it.
    pub(super) role: PlaceRole,
    /// URL under which repositories lie, such as `https://registry.example/v2`.
    base: String,
    /// Health and counters of the host.
    pub(super) state: Arc<Host>,
}

impl RepositoryPlace {
    fn new(services: Arc<Services>, host: &str, name: &str) -> Result<Self, RegistryError> {
        let bad_host = || RegistryError::BadName {
            text: host.to_owned(),
            expected: "a registry host with an optional port",
        };
        let (scheme, bare) = match host.split_once("://") {
            Some((scheme @ ("http" | "https"), bare)) => (Some(scheme), bare),
            Some(_) => return Err(bad_host()),
            None => (None, host),
        };
        let authority: Authority = bare.parse().map_err(|_| bad_host())?;
        if authority.host().is_empty() || bare.contains('@') {
            return Err(bad_host());
        }
        let plain = services.plain || (services.plain_loopback && is_loopback(authority.host()));
        let scheme = scheme.unwrap_or(if plain { "http" } else { "https" });
        // docker's hub is served by a host of another name, and its own images lie in `library`.
        let hub = matches!(bare, "docker.io" | "index.docker.io");
        let connect = if hub { "registry-1.docker.io" } else { bare };
        let name =
            if hub && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
        if !is_repository_name(&name) {
            let expected = "a repository name (lower-case letters, digits, and . _ - between them, parts separated by /)";
            return Err(RegistryError::BadName { text: name, expected });
        }
        let base = format!("{scheme}://{connect}/");
        let origin = base.parse().map_err(|_| bad_host())?;
        let state = services.network.host(bare);
        Ok(Self {
            services,
            host: bare.to_owned(),
            origin,
            name,
            query: String::new(),
            role: PlaceRole::Registry,
            base: format!("{base}v2"),
            state,
        })
    }

    /// The same repository at the mirror `url`. A path with a part `v2` replaces the registry's
    /// `/v2`; to any other path `/v2` is added (the rule of containerd's `override_path`).
    fn mirror(&self, url: &str) -> Result<Self, RegistryError> {
        let bad = || RegistryError::BadName {
            text: url.to_owned(),
            expected: "the http:// or https:// URL of a mirror",
        };
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?;
        let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https"));
        let scheme = scheme.ok_or_else(bad)?;
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(bad());
        }
        let path = uri.path().trim_end_matches('/');
        let whole = path.split('/').any(|part| part == "v2");
        let end = if whole { "" } else { "/v2" };
        Ok(Self {
            services: self.services.clone(),
            host: authority.as_str().to_owned(),
            origin: format!("{scheme}://{authority}/").parse().map_err(|_| bad())?,
            name: self.name.clone(),
            // containerd names the registry to mirrors so; mirrors of several registries need it.
            query: format!("?ns={}", utf8_percent_encode(&self.host, NON_ALPHANUMERIC)),
            role: PlaceRole::Mirror,
            base: format!("{scheme}://{authority}{path}{end}"),
            state: self.services.network.host(authority.as_str()),
        })
    }

    /// The host of `url`, which a layer of this repository names as another place of its bytes. No credential of this
    /// client is for it, and it may be no farther than a redirect of this registry.
    pub(super) fn elsewhere(&self, url: &Uri) -> Self {
        let host = authority(url).to_owned();
        Self {
            services: self.services.clone(),
            origin: self.origin.clone(),
            name: self.name.clone(),
            query: String::new(),
            role: PlaceRole::Elsewhere,
            base: self.base.clone(),
            // A state of its own: an image must not change what others see of a host, nor add hosts to the metrics.
            state: Arc::new(Host::new(&host)),
            host,
        }
    }

    /// True for a mirror, which must not see the registry's passwords.
    pub(super) fn is_mirror(&self) -> bool {
        self.role == PlaceRole::Mirror
    }

    /// True for a place that only an image names.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.role == PlaceRole::Elsewhere
    }

    /// The connections to this place.
    fn transport(&self) -> &Transport {
        let Services { transport, without_certificate, .. } = &*self.services;
        without_certificate.as_ref().filter(|_| self.is_elsewhere()).unwrap_or(transport)
    }

    /// A URL below `/v2/<name>/`. `path` holds only characters that need no encoding.
    pub(super) fn url(&self, path: &str) -> Result<Uri, RegistryError> {
        let text = format!("{}/{}/{path}{}", self.base, self.name, self.query);
        text.parse().map_err(|_| RegistryError::BadName { text, expected: "a URL" })
    }

    /// `blob sha256:… of registry.example/team/app`.
    pub(super) fn describe(&self, item: &str) -> String {
        format!("{item} of {}/{}", self.host, self.name)
    }

    /// Who answers for blobs of this repository that nothing proves, and the way to them. A mirror is a matter of the
    /// host's configuration and changes neither.
    pub(super) fn origin_of_blobs(&self) -> Origin {
        let Services { number, trust, .. } = &*self.services;
        Origin { name: format!("{}{}{trust}", self.origin, self.name), client: *number }
    }

    pub(super) fn scope(&self, actions: &'static str) -> Scope {
        let (scheme, authority) = (self.origin.scheme_str(), self.origin.authority());
        let origin = format!(
            "{}://{}",
            scheme.unwrap_or("https"),
            authority.map_or("", |authority| authority.as_str())
        );
        Scope {
            origin,
            host: self.host.clone(),
            repository: self.name.clone(),
            actions,
            is_mirror: self.is_mirror(),
        }
    }

    /// How far a request to `url` may go.
    pub(super) fn reach(&self, url: &Uri) -> Reach {
        Reach::from(&self.origin, url, &self.services.trusted)
    }

    /// True if `Authorization` may be sent to `url`: it is at this registry, and not in another repository of it. A
    /// registry keeps its bytes where it likes; but a credential for one repository is never shown to another because an
    /// answer said so.
    pub(super) fn is_home(&self, url: &Uri) -> bool {
        if self.is_elsewhere() || !same_origin(url, &self.origin) {
            return false;
        }
        let path = url.path();
        let base = self.base.splitn(4, '/').nth(3).unwrap_or_default();
        match path.strip_prefix('/').and_then(|path| path.strip_prefix(base)?.strip_prefix('/')) {
            Some(inside) => {
                let own = inside.strip_prefix(&self.name).is_some_and(|rest| rest.starts_with('/'));
                own && !is_winding(path)
            }
            None => !is_winding(path),
        }
    }

    /// Sends `call`, authenticates when asked to, and follows redirects. Any other answer is
    /// returned unchanged.
    pub(super) fn exchange(
        &self,
        call: &Call,
        deadline: Option<Instant>,
    ) -> Result<Landed, RegistryError> {
        block_on(self.exchange_async(call, deadline))
    }

    /// Asynchronous form of `exchange`; it blocks only while a token is fetched.
    pub(super) async fn exchange_async(
        &self,
        call: &Call,
        deadline: Option<Instant>,
    ) -> Result<Landed, RegistryError> {
        let token_deadline =
            deadline.unwrap_or_else(|| Instant::now() + self.services.retry.deadline);
        let scope = self.scope(call.actions);
        let mut url = call.url.clone();
        // After a redirect has left the registry, no later redirect restores `Authorization`.
        let mut at_home = self.is_home(&url);
        let (mut renewed, mut hops) = (false, 0);
        loop {
            let tokens = &self.services.tokens;
            let header = if at_home {
                tokens.current(&self.services, &scope, token_deadline)?
            } else {
                None
            };
            let request = self.request(call, &url, header.as_ref())?;
            let reach = self.reach(&url);
            let sent = self.transport().send_async(request, reach, deadline).await;
            let reply =
                sent.map_err(|error| self.services.broken(&call.what, authority(&url), &error))?;
            if at_home && !renewed && matches!(reply.status.as_u16(), 401 | 403) {
                renewed = true;
                let challenges = parse_challenges(&reply.headers);
                let fresh = tokens.renew(
                    &self.services,
                    &scope,
                    header.as_ref(),
                    challenges,
                    token_deadline,
                )?;
                if fresh.is_some() {
                    reply.body.discard_async().await;
                    continue;
                }
            } else if is_redirect(&reply) && matches!(call.method, Method::GET | Method::HEAD) {
                hops += 1;
                let next = self.next_hop(call, &url, &reply, hops)?;
                reply.body.discard_async().await;
                at_home = at_home && self.is_home(&next);
                url = next;
                continue;
            }
            return Ok(Landed { reply, url, away: !at_home });
        }
    }

    pub(super) fn request(
        &self,
        call: &Call,
        url: &Uri,
        authorization: Option<&HeaderValue>,
    ) -> Result<Request<Bytes>, RegistryError> {
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(url.clone())
            .body(call.body.clone())
            .map_err(|_| RegistryError::BadName { text: url.to_string(), expected: "a URL" })?;
        let headers = request.headers_mut();
        headers.extend(call.headers.clone());
        headers.insert(USER_AGENT, self.services.user_agent.clone());
        // Bytes are named by digest and position, so no compression on the way is allowed.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(value) = authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        Ok(request)
    }

    fn next_hop(
        &self,
        call: &Call,
        url: &Uri,
        reply: &HttpReply,
        hops: u32,
    ) -> Result<Uri, RegistryError> {
        let protocol = |rule: String| RegistryError::Protocol {
            what: call.what.clone(),
            host: authority(url).to_owned(),
            rule,
        };
        if hops > MAX_HOPS {
            return Err(protocol(format!("it redirects more than {MAX_HOPS} times")));
        }
        let location = reply.headers.get(LOCATION).and_then(|value| value.to_str().ok());
        let next = location.and_then(|location| resolve(url, location));
        let next = next.ok_or_else(|| protocol("its redirect is not an HTTP URL".to_owned()))?;
        // What is checked by digest may come from anywhere; names, lengths and bytes without a checksum may not.
        if !call.verified {
            keep_tls(&call.what, url, &next)?;
        }
        Ok(next)
    }
}

/// A request to make. `what` names its object in messages.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) url: Uri,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) actions: &'static str,
    /// True if the result is checked by digest.
    pub(super) verified: bool,
    pub(super) what: String,
}

impl Call {
    pub(super) fn new(method: Method, url: Uri, what: String) -> Self {
        let writes = !matches!(method, Method::GET | Method::HEAD);
        let actions = if writes { "pull,push" } else { "pull" };
        Self {
            method,
            url,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            actions,
            verified: false,
            what,
        }
    }

    pub(super) fn header(mut self, name: hyper::header::HeaderName, value: HeaderValue) -> Self {
        self.headers.append(name, value);
        self
    }
}

/// An answer, and its origin after redirects.
pub(super) struct Landed {
    pub(super) reply: HttpReply,
    pub(super) url: Uri,
    /// True if a redirect left the registry.
    pub(super) away: bool,
}

impl Landed {
    pub(super) fn host(&self) -> &str {
        authority(&self.url)
    }
}

pub(super) fn authority(url: &Uri) -> &str {
    url.authority().map_or("", |authority| authority.as_str())
}

/// True if a server may take the path for another one: it has empty parts, or `..`, or letters in their encoded form.
fn is_winding(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    let coded = ["%2e", "%2f", "%5c"].iter().any(|code| lower.contains(code));
    coded
        || lower.contains("//")
        || lower.contains('\\')
        || lower.split('/').any(|part| part == ".." || part == ".")
}

/// Refuses to leave TLS for plain HTTP.
pub(super) fn keep_tls(what: &str, from: &Uri, to: &Uri) -> Result<(), RegistryError> {
    if from.scheme_str() != Some("https") || to.scheme_str() != Some("http") {
        return Ok(());
    }
    let (from, to) = (authority(from), authority(to));
    Err(RegistryError::OutOfReach {
        what: what.to_owned(),
        reason: format!(
            "{from} redirects from TLS to plain HTTP at {to}, and no digest covers each byte that would come"
        ),
    })
}

fn is_redirect(reply: &HttpReply) -> bool {
    matches!(reply.status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The error for an answer that is no success. `host` answered; `registry` is the one to log in to.
pub(super) fn refusal(what: &str, host: &str, registry: &str, reply: HttpReply) -> RegistryError {
    let status = reply.status.as_u16();
    let now = unix_now();
    let retry_after = reply
        .headers
        .get(RETRY_AFTER)
        .and_then(|value| parse_retry_after(value.to_str().ok()?, now));
    let what = what.to_owned();
    match status {
        404 => RegistryError::NotFound { what },
        401 | 403 => {
            let said = read_complaint(reply.body);
            let reason = if said.is_empty() { format!("it answered {status}") } else { said };
            RegistryError::Denied { what, host: registry.to_owned(), reason }
        }
        429 => RegistryError::RateLimited { what, retry_after },
        503 if retry_after.is_some() => RegistryError::RateLimited { what, retry_after },
        _ => RegistryError::Server {
            what,
            host: host.to_owned(),
            status,
            reason: read_complaint(reply.body),
        },
    }
}

#[derive(Deserialize)]
struct Complaints {
    errors: Vec<Complaint>,
}

#[derive(Deserialize)]
struct Complaint {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The text of an error answer: its first `errors` entry (distribution specification, error codes),
/// or else the start of its body. At most one line.
pub(super) fn read_complaint(body: ReplyBody) -> String {
    let Ok(bytes) = body.collect(16 << 10) else { return String::new() };
    let text = match serde_json::from_slice::<Complaints>(&bytes) {
        Ok(Complaints { errors }) => errors.first().map_or_else(String::new, |first| {
            [first.code.as_str(), first.message.as_str()].join(" ").trim().to_owned()
        }),
        Err(_) => String::from_utf8_lossy(&bytes).into_owned(),
    };
    let line: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    if line.trim_start().starts_with('<') { String::new() } else { line.trim().to_owned() }
}

pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Tests a name against the grammar of `<name>` (distribution specification, "Pulling manifests").
fn is_repository_name(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let part = |part: &str| {
        let bytes = part.as_bytes();
        bytes.first().is_some_and(|b| letter(*b))
            && bytes.last().is_some_and(|b| letter(*b))
            && bytes.iter().all(|b| letter(*b) || b"._-".contains(b))
            && !part.contains("..")
    };
    name.len() <= 255 && name.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(
        options: ClientOptions,
        host: &str,
        name: &str,
    ) -> Result<(String, String), RegistryError> {
        let repository = RegistryClient::new(options)?.repository(host, name)?;
        let place = repository.place();
        Ok((place.url("x")?.to_string(), place.host.clone()))
    }

    #[test]
    fn a_host_decides_how_it_is_spoken_to() {
        let url = |host: &str, name: &str| origin(ClientOptions::default(), host, name).unwrap().0;
        assert_eq!(url("r.example", "a/b"), "https://r.example/v2/a/b/x");
        assert_eq!(url("127.0.0.1:5000", "a"), "http://127.0.0.1:5000/v2/a/x");
        assert_eq!(url("https://localhost:5000", "a"), "https://localhost:5000/v2/a/x");
        assert_eq!(url("docker.io", "alpine"), "https://registry-1.docker.io/v2/library/alpine/x");
        let plain = ClientOptions { plain: true, ..ClientOptions::default() };
        assert_eq!(origin(plain, "r.example", "a").unwrap().0, "http://r.example/v2/a/x");
    }

    #[test]
    fn names_that_would_lead_elsewhere_are_refused() {
        for (host, name) in [
            ("r.example/evil", "a"),
            ("user@r.example", "a"),
            ("", "a"),
            ("ftp://r.example", "a"),
            ("r.example", "../a"),
            ("r.example", "a/../b"),
            ("r.example", "A"),
            ("r.example", "a//b"),
            ("r.example", "a?x"),
            ("r.example", ""),
        ] {
            let refused = origin(ClientOptions::default(), host, name);
            assert!(matches!(refused, Err(RegistryError::BadName { .. })), "{host} {name}");
        }
    }
}
