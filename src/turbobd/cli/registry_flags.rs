//! Flags for the registry, in all commands that name an image.

use std::path::{Path, PathBuf};

use client::{CertificateSpec, RegistrySpec};

use super::Failure;

/// Heading of these flags. Each flag names it, because `next_help_heading` would also take the flags that follow.
const REGISTRY: &str = "Registry";

/// The way to a registry. The names are those of upstream's `convertor`.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)] // the commands that contain it have a group of the same name
pub(super) struct Args {
    /// User and password [default: the credentials in the configuration files of docker and podman].
    #[arg(short = 'u', long = "username", value_name = "USER[:PASS]", help_heading = REGISTRY)]
    pub(super) user: Option<String>,
    /// Use HTTP without TLS. This is the default for a registry on loopback, unless a CA is named.
    #[arg(long, help_heading = REGISTRY)]
    pub(super) plain: bool,
    /// Accept any certificate of the registry.
    #[arg(long, help_heading = REGISTRY)]
    pub(super) insecure: bool,
    /// PEM file of additional CA certificates.
    #[arg(long, value_name = "FILE", help_heading = REGISTRY)]
    pub(super) root_ca: Option<PathBuf>,
    /// Directory of PEM files with additional CA certificates.
    #[arg(long, value_name = "DIR", help_heading = REGISTRY)]
    pub(super) cert_dir: Option<PathBuf>,
    /// Client certificate and its key: two PEM files.
    #[arg(long, value_name = "CRT:KEY", help_heading = REGISTRY)]
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
