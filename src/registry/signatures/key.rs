//! A public key: ECDSA over P-256 with SHA-256, the pair that `cosign generate-key-pair` makes.
//!
//! Verification is that of the TLS provider (ring), so that the program has one implementation of it. The provider wants
//! the point alone; in a PEM file it stands in a `SubjectPublicKeyInfo`, whose form for this curve is one fixed prefix
//! before the point (RFC 5480).

use std::io;
use std::path::{Path, PathBuf};

use rustls::SignatureScheme;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer, alg_id};
use thiserror::Error;

/// What stands before the point: `id-ecPublicKey`, `prime256v1`, a bit string of 65 bytes.
const PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// Bytes of an uncompressed point: 4, x, y.
const POINT: usize = 65;

/// Most bytes of a key file, 64 KiB: a key has 180, and a file may carry remarks.
const FILE_LIMIT: u64 = 64 << 10;

/// Reasons why a key cannot be used.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("Cannot read the key {file}", file = file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It has no usable key.
    #[error(
        "{file} {rule}: give the file cosign.pub of `cosign generate-key-pair` (ECDSA P-256, PEM)",
        file = file.display()
    )]
    Form {
        /// The file.
        file: PathBuf,
        /// The broken rule.
        rule: &'static str,
    },
}

/// A key that may sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    file: PathBuf,
    point: Vec<u8>,
}

impl PublicKey {
    /// Reads the key in a PEM file.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn load(file: &Path) -> Result<Self, KeyError> {
        let pem =
            read_small(file).map_err(|source| KeyError::Read { file: file.to_owned(), source })?;
        Self::from_pem(&pem, file)
    }

    /// The key in a PEM text; `file` names it.
    ///
    /// # Errors
    /// [`KeyError::Form`].
    pub fn from_pem(pem: &[u8], file: &Path) -> Result<Self, KeyError> {
        let form = |rule| KeyError::Form { file: file.to_owned(), rule };
        let mut keys = SubjectPublicKeyInfoDer::pem_slice_iter(pem);
        let key = keys.next().and_then(Result::ok).ok_or_else(|| form("holds no public key"))?;
        if keys.next().is_some() {
            return Err(form("holds several public keys, and each key needs a file of its own"));
        }
        let point = key.as_ref().strip_prefix(&PREFIX);
        let point = point.filter(|point| point.len() == POINT && point[0] == 4);
        let point = point.ok_or_else(|| form("holds a key of another kind"))?;
        Ok(Self { file: file.to_owned(), point: point.to_vec() })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// True if `signature` (DER) is this key's over the SHA-256 of `message`.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        algorithm().is_some_and(|algorithm| {
            algorithm.verify_signature(&self.point, message, signature).is_ok()
        })
    }
}

/// The provider's ECDSA for this curve and hash; it always has one.
fn algorithm() -> Option<&'static dyn SignatureVerificationAlgorithm> {
    let provider = rustls::crypto::ring::default_provider();
    let (_, algorithms) = provider
        .signature_verification_algorithms
        .mapping
        .iter()
        .find(|(scheme, _)| *scheme == SignatureScheme::ECDSA_NISTP256_SHA256)?;
    algorithms.iter().copied().find(|algorithm| algorithm.public_key_alg_id() == alg_id::ECDSA_P256)
}

fn read_small(file: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.take(FILE_LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}
