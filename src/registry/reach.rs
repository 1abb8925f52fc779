//! Addresses that a host may be sent to by what a registry or an image says.
//!
//! The operator names registries, mirrors and proxies; any address of theirs is right. Everything else that this
//! client asks was named by others: the target of a redirect, the place of an upload, a token service, and the
//! `urls` of a layer. This process runs as root inside the host's network: a registry that sends it to
//! `http://169.254.169.254/` or `http://localhost:2375/` would read and reach what only the host can.
//!
//! So such a request has a [`Reach`], which depends on the registry that it comes from, and on a list of the operator's for hosts
//! on this machine that have names. Three details decide whether that
//! holds:
//!
//! * The *resolved* addresses are examined, and the connection goes to exactly these: a name that resolves to
//!   another address a moment later (DNS rebinding) gains nothing. If one of several addresses is out of reach, all are.
//! * IPv4 addresses are recognised inside IPv6 ones (mapped, compatible, NAT64, 6to4, Teredo), and in the short forms that the
//!   system's resolver accepts (`127.1`, `0x7f000001`).
//! * Connections are kept in pools by reach, so that none that was opened for a named host serves another request.
//!
//! Through a proxy, the proxy resolves the name: then only numeric hosts and `localhost` are examined here, and the
//! rules of the proxy decide about the rest.

use std::error::Error as StdError;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::vec;

use hyper::Uri;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tower_service::Service;

use super::proxy::is_loopback;
use super::redirect::same_origin;

/// Addresses that a request may go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All: the operator named the host.
    Named,
    /// All but link-local ones and metadata services: a registry on this machine said so.
    OfLoopback,
    /// Neither those nor this machine: another registry said so.
    OfRegistry,
}

impl Reach {
    /// Every reach, in the order of [`Reach::number`].
    pub(super) const ALL: [Self; 3] = [Self::Named, Self::OfLoopback, Self::OfRegistry];

    /// Position in [`Reach::ALL`].
    pub(super) fn number(self) -> usize {
        match self {
            Self::Named => 0,
            Self::OfLoopback => 1,
            Self::OfRegistry => 2,
        }
    }

    /// The reach of a request to `url` that comes from the registry at `origin`; `trusted` are hosts that the operator lists.
    pub(super) fn from(origin: &Uri, url: &Uri, trusted: &[String]) -> Self {
        let is_listed = |host: &str| trusted.iter().any(|listed| listed.eq_ignore_ascii_case(host));
        if same_origin(origin, url) || url.host().is_some_and(is_listed) {
            Self::Named
        } else if origin.host().is_some_and(is_loopback) {
            Self::OfLoopback
        } else {
            Self::OfRegistry
        }
    }

    /// Refuses an address.
    fn check(self, host: &str, address: IpAddr) -> Result<(), OutOfReach> {
        let kind = match (self, Kind::of(address)) {
            (Self::Named, _) | (_, Kind::Other) | (Self::OfLoopback, Kind::ThisHost) => {
                return Ok(());
            }
            (_, kind) => kind,
        };
        Err(OutOfReach { host: host.to_owned(), kind: kind.name() })
    }

    /// Refuses a host that needs no resolver: a numeric one in any form, or `localhost`.
    pub(super) fn check_literal(self, host: &str) -> Result<(), OutOfReach> {
        let literal =
            numeric(host).or_else(|| is_loopback(host).then_some(Ipv4Addr::LOCALHOST.into()));
        literal.map_or(Ok(()), |address| self.check(host, address))
    }
}

/// A host that a registry or an image sends this one to, and that it does not ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfReach {
    host: String,
    kind: &'static str,
}

impl fmt::Display for OutOfReach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is {}, to which an image or a registry elsewhere must not send this host; list the name in \
             turbobd.trustedHosts if it is yours",
            self.host, self.kind
        )
    }
}

impl StdError for OutOfReach {}

/// Kinds of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Loopback, and the unspecified addresses, which the kernel connects to loopback.
    ThisHost,
    /// Link-local, where clouds have their metadata services, and those of clouds that have them elsewhere.
    Link,
    Other,
}

/// Metadata services outside the link-local ranges: AWS over IPv6, Alibaba, Azure's host.
const METADATA: [IpAddr; 3] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
];

impl Kind {
    fn of(address: IpAddr) -> Self {
        if METADATA.contains(&address) {
            return Self::Link;
        }
        match address {
            IpAddr::V4(v4) if v4.is_loopback() || v4.octets()[0] == 0 => Self::ThisHost,
            IpAddr::V4(v4) if v4.is_link_local() => Self::Link,
            IpAddr::V4(_) => Self::Other,
            IpAddr::V6(v6) if v6.is_loopback() || v6.is_unspecified() => Self::ThisHost,
            IpAddr::V6(v6) if v6.is_unicast_link_local() => Self::Link,
            IpAddr::V6(v6) => inner(v6).map_or(Self::Other, |v4| Self::of(v4.into())),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::ThisHost => "this host itself",
            Self::Link => "a link-local address or a metadata service",
            Self::Other => "another host",
        }
    }
}

/// The IPv4 address that an IPv6 address stands for.
fn inner(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let octets = address.octets();
    let at = |start: usize| {
        let [a, b, c, d] = [0, 1, 2, 3].map(|step| octets[start + step]);
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        // Mapped (RFC 4291 2.5.5.2), compatible (2.5.5.1), and translated (RFC 2765 2.1); NAT64 with the well-known prefix
        // (RFC 6052 2.1), and with the one for local use (RFC 8215).
        [0, 0, 0, 0, 0, 0xffff | 0, ..]
        | [0, 0, 0, 0, 0xffff, 0, ..]
        | [0x64, 0xff9b, 0, 0, 0, 0, ..]
        | [0x64, 0xff9b, 1, ..] => Some(at(12)),
        // 6to4 (RFC 3056).
        [0x2002, ..] => Some(at(2)),
        // Teredo (RFC 4380 4): the client's address, inverted.
        [0x2001, 0, ..] => Some(Ipv4Addr::from_bits(!at(12).to_bits())),
        _ => None,
    }
}

/// The address of a host that is a number: an address in its usual form, or one of the forms of `inet_aton`
/// (one to four parts, each decimal, octal or hexadecimal), which the system's resolver accepts.
fn numeric(host: &str) -> Option<IpAddr> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = bare.parse() {
        return Some(address);
    }
    let bare = bare.strip_suffix('.').unwrap_or(bare);
    let parts = bare.split('.').map(part).collect::<Option<Vec<u32>>>()?;
    let (last, rest) = parts.split_last()?;
    if rest.len() > 3 || rest.iter().any(|part| *part > 255) {
        return None;
    }
    let room = 8 * (4 - rest.len() as u32);
    if room < 32 && *last >> room != 0 {
        return None;
    }
    let first = rest.iter().enumerate().map(|(place, part)| part << (24 - 8 * place));
    Some(Ipv4Addr::from_bits(first.sum::<u32>() | last).into())
}

/// One part of such a form.
fn part(text: &str) -> Option<u32> {
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None if lower.len() > 1 && lower.starts_with('0') => (&lower[1..], 8),
        None => (lower.as_str(), 10),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None; // a sign, which from_str_radix would take
    }
    u32::from_str_radix(digits, radix).ok()
}

/// The system's resolver, whose answers are examined.
#[derive(Clone)]
pub(super) struct Resolver {
    system: GaiResolver,
    reach: Reach,
}

impl Resolver {
    pub(super) fn new(reach: Reach) -> Self {
        Self { system: GaiResolver::new(), reach }
    }
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = Box<dyn StdError + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.system.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (host, reach) = (name.as_str().to_owned(), self.reach);
        let found = self.system.call(name);
        Box::pin(async move {
            let found: Vec<SocketAddr> = found.await?.collect();
            found.iter().try_for_each(|found| reach.check(&host, found.ip()))?;
            Ok(found.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(address: &str) -> Kind {
        Kind::of(address.parse().unwrap())
    }

    #[test]
    fn an_address_is_known_in_each_of_its_forms() {
        for this_host in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
            "::127.0.0.1",
            "::ffff:0:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b:1::127.0.0.1",
            "2002:7f00:1::",
            "2001:0:4136:e378:8000:63bf:80ff:fffe",
        ] {
            assert_eq!(kind(this_host), Kind::ThisHost, "{this_host}");
        }
        for link in [
            "169.254.169.254",
            "fe80::1",
            "febf::1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::",
            "fd00:ec2::254",
            "100.100.100.200",
            "168.63.129.16",
        ] {
            assert_eq!(kind(link), Kind::Link, "{link}");
        }
        for other in
            ["10.0.0.1", "192.168.1.1", "8.8.8.8", "2001:db8::1", "fd00::1", "::ffff:10.0.0.1"]
        {
            assert_eq!(kind(other), Kind::Other, "{other}");
        }
    }

    #[test]
    fn a_number_is_read_as_the_resolver_reads_it() {
        for host in [
            "127.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "0x7f.0x0.0.1",
            "127.0.0.1.",
            "127.0.1",
        ] {
            assert_eq!(numeric(host), Some(Ipv4Addr::LOCALHOST.into()), "{host}");
        }
        assert_eq!(numeric("[::1]"), Some(Ipv6Addr::LOCALHOST.into()));
        for name in
            ["a.example", "", ".", "1.2.3.4.5", "256.1", "1.2.3.256", "08.1", "0x", "-1", "127.+1"]
        {
            assert_eq!(numeric(name), None, "{name}");
        }
    }

    #[test]
    fn what_a_registry_may_name_depends_on_where_it_is() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        let far = uri("https://r.example/");
        assert_eq!(Reach::from(&far, &uri("https://r.example/v2/x"), &[]), Reach::Named);
        assert_eq!(Reach::from(&far, &uri("https://cdn.example/x"), &[]), Reach::OfRegistry);
        let listed = ["CDN.example".to_owned()];
        assert_eq!(Reach::from(&far, &uri("https://cdn.example/x"), &listed), Reach::Named);
        let near = uri("http://127.0.0.1:5000/");
        assert_eq!(Reach::from(&near, &uri("http://127.0.0.1:5001/x"), &[]), Reach::OfLoopback);
        for host in ["127.0.0.1", "localhost", "LOCALHOST", "[::ffff:7f00:1]", "0", "127.1"] {
            assert!(Reach::OfRegistry.check_literal(host).is_err(), "{host}");
            assert!(Reach::OfLoopback.check_literal(host).is_ok(), "{host}");
            assert!(Reach::Named.check_literal(host).is_ok(), "{host}");
        }
        assert!(Reach::OfLoopback.check_literal("169.254.169.254").is_err());
        assert!(Reach::OfRegistry.check_literal("10.0.0.1").is_ok());
        assert!(Reach::OfRegistry.check_literal("cdn.example").is_ok());
    }

    #[test]
    fn a_name_that_resolves_to_this_host_is_refused_by_its_address() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let resolve = |reach| {
            let name: Name = "localhost".parse().unwrap();
            let found = runtime.block_on(async { Resolver::new(reach).call(name).await });
            found.map(Iterator::count)
        };
        assert!(resolve(Reach::Named).unwrap() > 0);
        assert!(resolve(Reach::OfRegistry).unwrap_err().is::<OutOfReach>());
    }
}
