//! Flags for registries, shared by all commands that name an image.

use std::path::{Path, PathBuf};

use client::{CertificateSpec, RegistrySpec};

use super::Failure;

/// How to reach a registry. Names as in upstream's `convertor`.
#[derive(Clone, Debug, Default, clap::Args)]
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
    /// The way to the registry as a spec, with absolute paths.
    pub(super) fn spec(&self) -> Result<RegistrySpec, Failure> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(Failure::because);
        let certificate = match &self.client_cert {
            None => None,
            Some(pair) => {
                let (crt, key) = pair.split_once(':').ok_or_else(|| {
                    Failure::Usage("--client-cert takes CERTIFICATE:KEY, two PEM files".into())
                })?;
                Some(CertificateSpec {
                    certificate: absolute(Path::new(crt))?,
                    key: absolute(Path::new(key))?,
                })
            }
        };
        let authorities = self.root_ca.iter().chain(&self.cert_dir);
        Ok(RegistrySpec {
            credential: self.user.clone(),
            plain_http: self.plain,
            any_certificate: self.insecure,
            authorities: authorities.map(|path| absolute(path)).collect::<Result<_, _>>()?,
            certificate,
        })
    }
}
