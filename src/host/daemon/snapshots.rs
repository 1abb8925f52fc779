//! Snapshots over HTTP, by upstream's interface (spec runtime 9, `api_server.cpp`):
//! `/snapshot?dev_id=ID&config=PATH`, by any method. ID is the name that the device got when it was attached
//! (`--dev-id`), or its node; PATH is a device configuration that names a new writable layer.
//!
//! The status is 200, or 400 when a parameter is missing, 404 when no device has that name, 500 after a
//! failure; the body is a JSON object of `success` and `message`.
//!
//! Over TCP, as overlaybd has it, every process that reaches the port is answered; on a Unix socket only root and the daemon's
//! own user.

use std::io;
use std::path::Path;
use std::sync::Arc;

use hyper::StatusCode;
use percent_encoding::percent_decode_str;

use super::HostError;
use crate::endpoint::{Endpoint, Listen, PageReply, PageRequest, reply};
use source::failure::with_causes;

/// Takes a snapshot of the device with this name, with the configuration at the path.
pub(super) type TakeSnapshot = Arc<dyn Fn(&str, &Path) -> Result<(), HostError> + Send + Sync>;

/// Listens there.
pub(super) fn serve(listen: &Listen, take: TakeSnapshot) -> io::Result<Endpoint> {
    let answer = Arc::new(move |request: &PageRequest| answer(request, &*take));
    Endpoint::start("snapshots", listen, || {}, answer)
}

fn answer(request: &PageRequest, take: &dyn Fn(&str, &Path) -> Result<(), HostError>) -> PageReply {
    let (status, message) = outcome(request.uri().path(), request.uri().query(), take);
    let success = status == StatusCode::OK;
    let text = serde_json::json!({ "success": success, "message": message }).to_string();
    reply(status, text, "application/json")
}

fn outcome(
    path: &str,
    query: Option<&str>,
    take: &dyn Fn(&str, &Path) -> Result<(), HostError>,
) -> (StatusCode, String) {
    if path.trim_end_matches('/') != "/snapshot" {
        let hint = "No such page; snapshots are made at /snapshot?dev_id=ID&config=PATH";
        return (StatusCode::NOT_FOUND, hint.to_owned());
    }
    let query = query.unwrap_or_default();
    let (device, config) = (parameter(query, "dev_id"), parameter(query, "config"));
    let (Some(device), Some(config)) = (device, config) else {
        return (StatusCode::BAD_REQUEST, "dev_id and config must both be given".to_owned());
    };
    if !Path::new(&config).is_absolute() {
        return (StatusCode::BAD_REQUEST, format!("The path {config} must be absolute"));
    }
    match take(&device, Path::new(&config)) {
        Ok(()) => (StatusCode::OK, format!("{device} continues on the layer that {config} names")),
        Err(error @ HostError::NotFound(_)) => (StatusCode::NOT_FOUND, with_causes(&error)),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, with_causes(&error)),
    }
}

/// The last value of a parameter that is not empty.
fn parameter(query: &str, name: &str) -> Option<String> {
    let decode = |text: &str| percent_decode_str(text).decode_utf8().ok().map(String::from);
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let values = pairs.filter(|(key, _)| decode(key).as_deref() == Some(name));
    values.filter_map(|(_, value)| decode(value)).rfind(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_answered_as_upstream_answers_it() {
        let take = |device: &str, config: &Path| match device {
            "here" => {
                assert_eq!(config, Path::new("/a b/c.json"));
                Ok(())
            }
            "broken" => Err(HostError::Ending),
            _ => Err(HostError::NotFound(device.to_owned())),
        };
        let ask = |path: &str, query| outcome(path, query, &take).0.as_u16();
        assert_eq!(ask("/snapshot", Some("dev_id=here&config=%2Fa%20b/c.json")), 200);
        assert_eq!(ask("/snapshot/", Some("config=/c&dev_id=&dev_id=broken&x")), 500);
        assert_eq!(ask("/snapshot", Some("dev_id=gone&config=/c")), 404);
        assert_eq!(ask("/snapshot", Some("dev_id=here&config=")), 400);
        assert_eq!(ask("/snapshot", Some("dev_id=here&config=c.json")), 400);
        assert_eq!(ask("/snapshot", None), 400);
        assert_eq!(ask("/", Some("dev_id=here&config=/c")), 404);
    }
}
