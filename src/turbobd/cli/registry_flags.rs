//! Flags for the registry, in all commands that name an image.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use client::{CertificateSpec, RegistrySpec};

use super::{Failure, stderr};

/// Heading of these flags. Each flag names it, because `next_help_heading` would also take the flags that follow.
const REGISTRY: &str = "Registry";

/// The way to a registry. The names are those of upstream's `convertor`.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)] // the commands that contain it have a group of the same name
pub(super) struct Args {
    /// User, and password unless `--password-stdin` gives it [default: the credentials in the configuration files of docker and podman].
    #[arg(short = 'u', long = "username", value_name = "USER[:PASS]", help_heading = REGISTRY)]
    pub(super) user: Option<String>,
    /// Read the password of the user that `-u` names from standard input, up to the first line end. A password on the command
    /// line is visible to every user of this host (`ps`).
    #[arg(long, requires = "user", help_heading = REGISTRY)]
    pub(super) password_stdin: bool,
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

/// Longest password that is read, in bytes: tokens have some KiB.
const LONGEST_PASSWORD: u64 = 64 << 10;

impl Args {
    /// `user:password`, with the password from where it is.
    fn credential(&self) -> Result<Option<String>, Failure> {
        let Some(user) = &self.user else { return Ok(None) };
        if !self.password_stdin {
            if user.split_once(':').is_some_and(|(_, password)| !password.is_empty()) {
                stderr::line(
                    "turbobd: warning: other users of this host see a password on the command line: give it with \
                     --password-stdin",
                );
            }
            return Ok(Some(user.clone()));
        }
        if user.contains(':') {
            let text = "with --password-stdin, -u takes the user's name alone, without a password";
            return Err(Failure::Usage(text.into()));
        }
        Ok(Some(format!("{user}:{}", password()?)))
    }

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
            credential: self.credential()?,
            plain_http: self.plain,
            any_certificate: self.insecure,
            authorities: authorities.map(|path| absolute(path)).collect::<Result<_, _>>()?,
            certificate,
        })
    }
}

/// The first line of standard input. It is read once, because a command may ask for its way to the registry twice.
fn password() -> Result<&'static str, Failure> {
    static READ: OnceLock<String> = OnceLock::new();
    if let Some(read) = READ.get() {
        return Ok(read);
    }
    let mut text = String::new();
    let read = std::io::stdin().lock().take(LONGEST_PASSWORD + 1).read_to_string(&mut text);
    read.map_err(|error| {
        Failure::Failed(format!("The password cannot be read from standard input: {error}"))
    })?;
    if text.len() as u64 > LONGEST_PASSWORD {
        return Err(Failure::Failed(format!(
            "The password on standard input is longer than {LONGEST_PASSWORD} bytes"
        )));
    }
    let line = text.split(['\n', '\r']).next().unwrap_or_default();
    if line.is_empty() {
        return Err(Failure::Failed("There is no password on standard input".into()));
    }
    Ok(READ.get_or_init(|| line.to_owned()))
}
