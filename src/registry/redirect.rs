//! Targets of redirects: resolution of `Location`, comparison of origins, lifetime of signed URLs.

use std::time::Duration;

use hyper::Uri;

use super::retry::days_since_1970;

/// Redirects followed for one request. Registries use one, object stores sometimes a second.
pub(super) const MAX_HOPS: u32 = 5;

/// Lifetime of a redirect without a stated expiry (upstream's guess, spec runtime 6).
const DEFAULT_LIFE: Duration = Duration::from_secs(300);

/// Longest lifetime of a redirect, whatever it states.
const LONGEST_LIFE: Duration = Duration::from_secs(3600);

/// True if scheme, host and port are equal: only then may `Authorization` be sent.
#[must_use]
pub fn same_origin(a: &Uri, b: &Uri) -> bool {
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    a.scheme() == b.scheme() && host(a).is_some() && host(a) == host(b) && port(a) == port(b)
}

fn port(uri: &Uri) -> u16 {
    uri.port_u16().unwrap_or(if uri.scheme_str() == Some("http") { 80 } else { 443 })
}

/// The absolute URL of `location` in an answer of `base` (RFC 3986 5.2, without `..`), or `None`
/// when it is not an HTTP URL or carries a user name.
#[must_use]
pub fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.trim();
    let location = location.split_once('#').map_or(location, |(before, _)| before);
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let text = if location.contains("://") && !location.starts_with(['/', '?']) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let uri: Uri = text.parse().ok()?;
    let http = matches!(uri.scheme_str(), Some("http" | "https"));
    let anonymous = !uri.authority()?.as_str().contains('@');
    (http && anonymous && uri.host().is_some_and(|host| !host.is_empty())).then_some(uri)
}

/// Time that a signed URL stays valid, by its query: `X-Amz-Expires` and `X-Goog-Expires` (seconds,
/// counted from `X-Amz-Date`), `Expires` (seconds since 1970), `se` (Azure, a date). A tenth is
/// kept back, at most 30 s, for reads in progress.
#[must_use]
pub fn lifetime(url: &Uri, unix_now: u64) -> Duration {
    let stated =
        stated_lifetime(url.query().unwrap_or_default(), unix_now).map(Duration::from_secs);
    let life = stated.unwrap_or(DEFAULT_LIFE).min(LONGEST_LIFE);
    life - (life / 10).min(Duration::from_secs(30))
}

fn stated_lifetime(query: &str, unix_now: u64) -> Option<u64> {
    let value = |name: &str| {
        query.split('&').filter_map(|pair| pair.split_once('=')).find_map(|(key, value)| {
            key.eq_ignore_ascii_case(name).then(|| {
                percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned()
            })
        })
    };
    for vendor in ["X-Amz", "X-Goog"] {
        if let Some(seconds) =
            value(&format!("{vendor}-Expires")).and_then(|text| text.parse::<u64>().ok())
        {
            let signed = value(&format!("{vendor}-Date"))
                .and_then(|text| parse_timestamp(&text))
                .unwrap_or(unix_now);
            // A clock that is behind the signer's must not lengthen the lifetime.
            return Some(signed.saturating_add(seconds).saturating_sub(unix_now).min(seconds));
        }
    }
    let at = value("Expires")
        .and_then(|text| text.parse::<u64>().ok())
        .or_else(|| value("se").and_then(|text| parse_timestamp(&text)))?;
    Some(at.saturating_sub(unix_now))
}

/// `20261123T091500Z` or `2026-11-23T09:15:00Z` as seconds since 1970.
fn parse_timestamp(text: &str) -> Option<u64> {
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    if digits.len() != 14 || !text.ends_with('Z') {
        return None;
    }
    let number = |range: std::ops::Range<usize>| digits.get(range)?.parse::<u64>().ok();
    let (year, month, day) = (number(0..4)?, number(4..6)?, number(6..8)?);
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let seconds = (number(8..10)? * 60 + number(10..12)?) * 60 + number(12..14)?;
    Some(days_since_1970(year, month, day) * 86_400 + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn a_location_is_absolute_or_relative_to_its_answer() {
        let base = uri("https://r.example:444/v2/a/blobs/x?y=1");
        for (location, expected) in [
            ("https://cdn.example/b?s=1", "https://cdn.example/b?s=1"),
            ("//cdn.example/b", "https://cdn.example/b"),
            ("/b?s=https://x", "https://r.example:444/b?s=https://x"),
            ("b", "https://r.example:444/v2/a/blobs/b"),
            ("?z=2", "https://r.example:444/v2/a/blobs/x?z=2"),
            ("/b#part", "https://r.example:444/b"),
        ] {
            assert_eq!(resolve(&base, location), Some(uri(expected)), "{location}");
        }
        for bad in [
            "ftp://x/y",
            "file:///etc/passwd",
            "https://user:pass@r.example/",
            "https:///x",
            "http://[::1",
        ] {
            assert_eq!(resolve(&base, bad), None, "{bad}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let a = uri("https://r.example/x");
        assert!(same_origin(&a, &uri("https://R.example:443/y")));
        for other in [
            "http://r.example/x",
            "https://r.example:444/x",
            "https://r.example.evil/x",
            "https://e/r.example",
        ] {
            assert!(!same_origin(&a, &uri(other)), "{other}");
        }
    }

    #[test]
    fn a_signed_url_states_its_end() {
        let now = 1_795_425_300; // 2026-11-23T09:15:00Z
        let life =
            |query: &str| lifetime(&uri(&format!("https://s.example/b?{query}")), now).as_secs();
        assert_eq!(parse_timestamp("2026-11-23T09:15:00Z"), Some(now));
        assert_eq!(life("X-Amz-Expires=100&X-Amz-Date=20261123T091500Z"), 90);
        assert_eq!(
            life("X-Amz-Expires=100&X-Amz-Date=20261123T091420Z"),
            54,
            "40 s are gone already"
        );
        assert_eq!(
            life("X-Amz-Expires=100&X-Amz-Date=20261123T101500Z"),
            90,
            "our clock is an hour behind"
        );
        assert_eq!(life(&format!("Expires={}", now + 1000)), 970);
        assert_eq!(life("Expires=1"), 0);
        assert_eq!(life("se=2026-11-23T09%3A16%3A40Z&sig=x"), 90);
        assert_eq!(life("a=b"), 270);
        assert_eq!(life("X-Amz-Expires=604800"), 3570);
    }
}
