//! The reference registry (Debian's package `docker-registry`) on a free port, with its files in a
//! temporary folder.

#![allow(unreachable_pub)]

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const BINARY: &str = "/usr/bin/docker-registry";

pub struct RealRegistry {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl RealRegistry {
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts it, or prints the reason why it cannot; with `TURBOBD_REQUIRE_ALL=1` in the environment that is a
/// failure.
pub fn start() -> Option<RealRegistry> {
    if !std::path::Path::new(BINARY).exists() {
        let text = "not checked against the reference registry: apt install docker-registry";
        assert!(std::env::var_os("TURBOBD_REQUIRE_ALL").is_none_or(|value| value != "1"), "{text}");
        eprintln!("{text}");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    // The port is free now; if another process takes it before the start, the test must be run again.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let root = folder.path().display();
    let config = format!(
        "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {root}/data\n\
         http:\n  addr: 127.0.0.1:{port}\n"
    );
    let config_path = folder.path().join("config.yml");
    std::fs::write(&config_path, config).unwrap();
    let mut child = Command::new(BINARY)
        .arg("serve")
        .arg(&config_path)
        .env_remove("REGISTRY_HTTP_ADDR")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "{BINARY} ended at once");
        assert!(started.elapsed() < Duration::from_secs(20), "{BINARY} does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    Some(RealRegistry { child, port, _folder: folder })
}
