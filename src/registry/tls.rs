//! Trust: the platform's authorities, the user's authorities, and this client's own certificate.
//!
//! The cryptography is named explicitly (ring): two providers in one program without a default make
//! rustls panic at its first handshake.
//!
//! The platform's authorities (on Debian some 150 files) take as long to read as a small image
//! takes to open, and a registry in clear text needs none, so they are read at the first handshake.
//! The user's own files are read at once, so that a wrong path is an error of the setting.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

use super::error::RegistryError;

/// A certificate that this client shows to registries that ask for one.
#[derive(Clone, Debug)]
pub struct ClientCertificate {
    /// PEM file with the certificate and the certificates between it and its authority.
    pub certificate: PathBuf,
    /// PEM file with its private key.
    pub key: PathBuf,
}

/// Builds the TLS configuration of a client.
///
/// # Errors
/// Returns [`RegistryError::Setup`] naming the file that cannot be used.
pub(super) fn configure(
    authorities: &[PathBuf],
    certificate: Option<&ClientCertificate>,
    insecure: bool,
) -> Result<ClientConfig, RegistryError> {
    let setup = |reason: String| RegistryError::Setup { reason };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| setup(error.to_string()))?;
    let authorities = if insecure {
        None
    } else {
        Some(Authorities { own: read_roots(authorities)?, verifier: OnceLock::new() })
    };
    let verifier = Arc::new(Verifier { provider, authorities });
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let Some(ClientCertificate { certificate, key }) = certificate else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| {
        setup(format!("{} holds no private key in PEM form: {error}", key.display()))
    })?;
    builder.with_client_auth_cert(chain, private).map_err(|error| {
        setup(format!("{} and {} do not match: {error}", certificate.display(), key.display()))
    })
}

/// The authorities in `files`: PEM bundles, or directories of `*.crt` and `*.pem`.
fn read_roots(files: &[PathBuf]) -> Result<RootCertStore, RegistryError> {
    let mut store = RootCertStore::empty();
    for path in files {
        for file in bundle_files(path)? {
            for authority in certificates(&file)? {
                store.add(authority).map_err(|error| RegistryError::Setup {
                    reason: format!(
                        "{} holds a certificate that is not an authority's: {error}",
                        file.display()
                    ),
                })?;
            }
        }
    }
    Ok(store)
}

fn bundle_files(path: &Path) -> Result<Vec<PathBuf>, RegistryError> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let unreadable =
        |error| RegistryError::Setup { reason: format!("Cannot list {}: {error}", path.display()) };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        if file.extension().is_some_and(|ext| ext == "crt" || ext == "pem") {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// The platform's authorities, read once a process: some platforms have a file for each.
fn platform_roots() -> &'static [CertificateDer<'static>] {
    static ROOTS: OnceLock<Vec<CertificateDer<'static>>> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "registry: some authorities of this machine cannot be read");
        }
        found.certs
    })
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, RegistryError> {
    let setup = |error: &dyn std::fmt::Display| RegistryError::Setup {
        reason: format!("{} holds no certificate in PEM form: {error}", file.display()),
    };
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(file).map_err(|error| setup(&error))?.collect();
    let chain = chain.map_err(|error| setup(&error))?;
    if chain.is_empty() {
        return Err(setup(&"it is empty"));
    }
    Ok(chain)
}

/// Authorities that vouch for servers.
#[derive(Debug)]
struct Authorities {
    /// The user's authorities.
    own: RootCertStore,
    /// Verifier of the user's and the platform's authorities, made at the first handshake; `None`
    /// when there are no authorities at all.
    verifier: OnceLock<Option<Arc<WebPkiServerVerifier>>>,
}

impl Authorities {
    fn verifier(&self, provider: &Arc<CryptoProvider>) -> Option<&WebPkiServerVerifier> {
        let make = || {
            let mut roots = self.own.clone();
            roots.add_parsable_certificates(platform_roots().iter().cloned());
            WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone()).build().ok()
        };
        self.verifier.get_or_init(make).as_deref()
    }
}

/// Verifier of servers' certificates. The signatures of a handshake are checked in any case.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    /// `None` with `--insecure`: any certificate is accepted.
    authorities: Option<Authorities>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(authorities) = &self.authorities else {
            return Ok(ServerCertVerified::assertion());
        };
        let verifier =
            authorities.verifier(&self.provider).ok_or(CertificateError::UnknownIssuer)?;
        verifier.verify_server_cert(end_entity, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
