//! Flags for registries, shared by all commands that name an image.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::Failure;
use crate::config::ServiceConfig;
use crate::registry::{Client, ClientCertificate, ClientOptions, Credential};

/// How to reach a registry. Names as in upstream's `convertor`.
#[derive(Clone, Debug, Default, clap::Args, serde::Serialize, serde::Deserialize)]
#[command(next_help_heading = "Registry")]
#[group(skip)] // it is part of commands whose own struct has the same name
pub(super) struct Args {
    /// Credentials, `user:password`; without it, Docker's config file is asked.
    #[arg(short = 'u', long = "username", value_name = "USER[:PASS]")]
    pub(super) user: Option<String>,
    /// Speak HTTP without TLS (a loopback registry is always spoken to so, unless it is given a CA).
    #[arg(long)]
    pub(super) plain: bool,
    /// Do not verify the registry's certificate.
    #[arg(long)]
    pub(super) insecure: bool,
    /// Additional CA certificates, PEM.
    #[arg(long, value_name = "FILE")]
    pub(super) root_ca: Option<PathBuf>,
    /// Directory of additional CA certificates, PEM.
    #[arg(long, value_name = "DIR")]
    pub(super) cert_dir: Option<PathBuf>,
    /// Client certificate and key, PEM.
    #[arg(long, value_name = "CRT:KEY")]
    pub(super) client_cert: Option<String>,
}

impl Args {
    /// The same with absolute paths.
    pub(super) fn absolute(&self) -> Result<Self, Failure> {
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
        let mut args = self.clone();
        args.root_ca = absolute(&self.root_ca).map_err(Failure::because)?;
        args.cert_dir = absolute(&self.cert_dir).map_err(Failure::because)?;
        if let Some((crt, key)) = self.client_cert.as_deref().and_then(|pair| pair.split_once(':'))
        {
            let path = |path: &str| std::path::absolute(path).map_err(Failure::because);
            args.client_cert = Some(format!("{}:{}", path(crt)?.display(), path(key)?.display()));
        }
        Ok(args)
    }

    /// A client with these settings, and those of the host where they say nothing.
    pub(super) fn client(&self, service: &ServiceConfig) -> Result<Client, Failure> {
        let certificate = match &self.client_cert {
            None => None,
            Some(pair) => {
                let (crt, key) = pair.split_once(':').ok_or_else(|| {
                    Failure::Usage("--client-cert takes CERTIFICATE:KEY, two PEM files".into())
                })?;
                Some(ClientCertificate { certificate: crt.into(), key: key.into() })
            }
        };
        let mut options = ClientOptions {
            credential: self.user.as_deref().map(Credential::from_user_password),
            plain: self.plain,
            insecure: self.insecure,
            ..ClientOptions::of_host(service)
        };
        options.authorities.extend(self.root_ca.iter().chain(&self.cert_dir).cloned());
        options.certificate = certificate.or(options.certificate);
        Client::new(options).map_err(Failure::because)
    }
}

/// The clients of this process: devices that are reached in the same way share connections, tokens and
/// what is known of their registries.
pub(super) struct Clients {
    service: Arc<ServiceConfig>,
    made: Mutex<HashMap<String, Client>>,
}

impl Clients {
    /// None yet.
    pub(super) fn new(service: Arc<ServiceConfig>) -> Self {
        Self { service, made: Mutex::default() }
    }

    /// Settings of this host.
    pub(super) fn service(&self) -> &ServiceConfig {
        &self.service
    }

    /// The client with these flags.
    pub(super) fn of(&self, args: &Args) -> Result<Client, Failure> {
        let name = serde_json::to_string(args).map_err(Failure::because)?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&name) {
            return Ok(client.clone());
        }
        let client = args.client(&self.service)?;
        made.insert(name, client.clone());
        Ok(client)
    }
}
