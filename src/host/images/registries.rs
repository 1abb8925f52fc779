//! Clients of registries: devices with the same way to a registry share connections, tokens and what is known of it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;

use client::RegistrySpec;
use registry::{
    ClientCertificate, ClientOptions, Credential, CredentialPlace, CredentialService, Network,
    NetworkOptions, RegistryClient, RegistryError,
};

use crate::config::{CertificateConfig, CredentialConfig, CredentialMode, ServiceConfig};

/// The clients of a process, and the network that they share.
pub struct Registries {
    service: Arc<ServiceConfig>,
    made: Mutex<HashMap<RegistrySpec, RegistryClient>>,
    /// Clients without any credential.
    anonymous: Mutex<HashMap<RegistrySpec, RegistryClient>>,
    network: Arc<Network>,
}

impl Registries {
    /// No client is made yet.
    #[must_use]
    pub fn new(service: Arc<ServiceConfig>) -> Self {
        let network = Arc::new(Network::new(network_options(&service)));
        Self { service, made: Mutex::default(), anonymous: Mutex::default(), network }
    }

    /// Settings of this host.
    #[must_use]
    pub fn service(&self) -> &ServiceConfig {
        &self.service
    }

    /// What is known of registries, mirrors and peers: one for the whole process.
    #[must_use]
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// The client for reads that goes this way.
    ///
    /// # Errors
    /// [`RegistryError::Setup`] when a certificate or a key cannot be used.
    pub fn client(&self, spec: &RegistrySpec) -> Result<RegistryClient, RegistryError> {
        let mut made = self.made.lock();
        if let Some(client) = made.get(spec) {
            return Ok(client.clone());
        }
        let client = client_with(spec, self.options())?;
        made.insert(spec.clone(), client.clone());
        Ok(client)
    }

    /// A client for a place that the user did not name: it has no credential and no certificate to show.
    ///
    /// # Errors
    /// [`RegistryError::Setup`] when an authority cannot be used.
    pub fn anonymous(&self, spec: &RegistrySpec) -> Result<RegistryClient, RegistryError> {
        let mut made = self.anonymous.lock();
        if let Some(client) = made.get(spec) {
            return Ok(client.clone());
        }
        let host = ClientOptions {
            credential_files: Vec::new(),
            credential_service: None,
            certificate: None,
            ..self.options()
        };
        let stranger = RegistrySpec { credential: None, certificate: None, ..spec.clone() };
        let client = client_with(&stranger, host)?;
        made.insert(spec.clone(), client.clone());
        Ok(client)
    }

    /// A client that writes: it asks no mirrors, which might not have yet what was written last. Its network is its own, so
    /// that it outlives these registries.
    ///
    /// # Errors
    /// [`RegistryError::Setup`] when a certificate or a key cannot be used.
    pub fn writing_client(&self, spec: &RegistrySpec) -> Result<RegistryClient, RegistryError> {
        let own = options_of(&self.service);
        client_with(spec, ClientOptions { mirrors: BTreeMap::new(), p2p: None, ..own })
    }

    /// The options that this host's configuration gives, with the network of this process.
    fn options(&self) -> ClientOptions {
        ClientOptions { network: self.network.clone(), ..options_of(&self.service) }
    }
}

impl Drop for Registries {
    /// Ends the reads that wait for a registry: no process needs them any more.
    fn drop(&mut self) {
        self.network.end();
    }
}

/// The options that a host's configuration gives, with a network of their own.
#[must_use]
pub fn options_of(service: &ServiceConfig) -> ClientOptions {
    let network = Arc::new(Network::new(network_options(service)));
    let mut options = ClientOptions { network, ..ClientOptions::default() };
    options.authorities.clone_from(&service.turbobd.authorities);
    options.certificate = service.certificate.as_ref().map(certificate_of);
    if let Some(agent) = &service.user_agent {
        options.user_agent.clone_from(agent);
    }
    // A host that speaks TLS to registries elsewhere need not do so to one on this machine.
    options.plain_loopback = Some(true);
    match &service.credential.mode {
        CredentialMode::File(path) => {
            options.credential_files.retain(|known| known != path);
            options.credential_files.insert(0, path.clone());
        }
        _ => options.credential_service = credential_service(&service.credential),
    }
    options.mirrors.clone_from(&service.turbobd.mirrors);
    options.trusted.clone_from(&service.turbobd.trusted_hosts);
    options.p2p = service.p2p.enable.then(|| service.p2p.address.clone());
    // The device decides what happens to a read that is late; here each try of it ends.
    options.read_retry.deadline = service.turbobd.read_deadline;
    options
}

/// A client that goes the way of `spec`, and the host's way where `spec` says nothing.
fn client_with(spec: &RegistrySpec, host: ClientOptions) -> Result<RegistryClient, RegistryError> {
    let certificate = spec.certificate.as_ref().map(|pair| ClientCertificate {
        certificate: pair.certificate.clone(),
        key: pair.key.clone(),
    });
    let mut options = ClientOptions {
        credential: spec.credential.as_deref().map(Credential::from_user_password),
        plain: spec.plain_http,
        insecure: spec.any_certificate,
        ..host
    };
    if !spec.authorities.is_empty() || certificate.is_some() {
        // An authority for this registry means TLS, on this machine too.
        options.plain_loopback = Some(false);
    }
    options.authorities.extend(spec.authorities.iter().cloned());
    options.certificate = certificate.or(options.certificate);
    RegistryClient::new(options)
}

fn network_options(service: &ServiceConfig) -> NetworkOptions {
    NetworkOptions {
        hedging: service.turbobd.hedge,
        ahead_rate: service.turbobd.rate_limit,
        fill_rate: service.download.max_bytes_per_second,
    }
}

fn certificate_of(pair: &CertificateConfig) -> ClientCertificate {
    ClientCertificate { certificate: pair.certificate.clone(), key: pair.key.clone() }
}

/// The service that the configuration names; `None` in mode `file`.
fn credential_service(config: &CredentialConfig) -> Option<CredentialService> {
    let place = match &config.mode {
        CredentialMode::File(_) => return None,
        CredentialMode::Service(url) => CredentialPlace::Url(url.clone()),
        CredentialMode::Socket(path) => CredentialPlace::Socket(path.clone()),
    };
    let certificate = config.certificate.as_ref().map(certificate_of);
    Some(CredentialService::new(place, config.timeout, certificate, config.authority.clone()))
}
