//! TLS of the receiver's own: a certificate and a key from files, read again when they change.
//!
//! The files are looked at again and again instead of being watched: a mounted Secret changes by a swap of
//! symbolic links, which inotify on the file does not see. A pair that can't be used never replaces a good one.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest as _, Sha256};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::{self, ServerConfig};
use tracing::{info, warn};

/// Why a certificate can't be used. Never quotes the files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read, or holds something else.
    #[error("{file} can't be used: {source}", file = file.display())]
    File {
        /// Which one.
        file: PathBuf,
        /// Why.
        source: rustls_pki_types::pem::Error,
    },
    /// The files do not fit each other, or not our TLS library.
    #[error("{certificate} and {key} can't be used together: {source}", certificate = certificate.display(), key = key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// The pair in use.
#[derive(Debug)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    current: RwLock<Loaded>,
}

#[derive(Clone, Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    /// Of both files: whether they have changed.
    hash: [u8; 32],
}

impl Tls {
    /// Reads the pair for the first time.
    pub fn load(certificate: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        // The hash first: a change in between is then seen at the next look.
        let hash = hash_of(&certificate, &key);
        let config = read(&certificate, &key)?;
        let current = RwLock::new(Loaded { config, hash });
        Ok(Self { certificate, key, current })
    }

    /// For the next connection.
    #[must_use]
    pub fn acceptor(&self) -> TlsAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).config.clone().into()
    }

    /// Reads the pair again if the files have changed. Returns whether another pair is in use now.
    pub fn reload(&self) -> bool {
        let hash = hash_of(&self.certificate, &self.key);
        if self.current.read().unwrap_or_else(PoisonError::into_inner).hash == hash {
            return false;
        }
        match read(&self.certificate, &self.key) {
            Ok(config) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Loaded { config, hash };
                info!("the receiver's certificate was replaced");
                true
            }
            Err(error) => {
                warn!(%error, "the receiver's new certificate can't be used; the old one serves on");
                false
            }
        }
    }
}

fn hash_of(certificate: &Path, key: &Path) -> [u8; 32] {
    let mut hash = Sha256::new();
    for file in [certificate, key] {
        let content = zeroize::Zeroizing::new(std::fs::read(file).unwrap_or_default());
        hash.update(content.len().to_be_bytes());
        hash.update(&*content);
    }
    hash.finalize().into()
}

fn read(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let failed = |file: &Path| {
        let file = file.to_owned();
        move |source| TlsError::File { file, source }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(failed(certificate))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(failed(key))?;
    let pair = |source| TlsError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
