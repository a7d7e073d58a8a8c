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
    #[error("{file} can't be used: {cause}", file = file.display())]
    File {
        /// Which one.
        file: PathBuf,
        /// Why.
        cause: rustls_pki_types::pem::Error,
    },
    /// The files do not fit each other, or not our TLS library.
    #[error("{certificate} and {key} can't be used together: {cause}", certificate = certificate.display(), key = key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        cause: rustls::Error,
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
        move |cause| TlsError::File { file, cause }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(failed(certificate))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(failed(key))?;
    let pair = |cause| TlsError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), cause };
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A self-signed certificate and its key, in PEM.
    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    /// What kubelet makes of a Secret: files behind two symbolic links, of which the first one is swapped.
    struct Mounted(tempfile::TempDir);

    impl Mounted {
        fn new() -> Self {
            let mounted = Self(tempfile::tempdir().unwrap());
            mounted.swap("first", &pair());
            for file in ["tls.crt", "tls.key"] {
                symlink(format!("..data/{file}"), mounted.0.path().join(file)).unwrap();
            }
            mounted
        }

        fn swap(&self, version: &str, (certificate, key): &(String, String)) {
            let folder = self.0.path().join(version);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("tls.crt"), certificate).unwrap();
            std::fs::write(folder.join("tls.key"), key).unwrap();
            let link = self.0.path().join("..new");
            symlink(version, &link).unwrap();
            std::fs::rename(link, self.0.path().join("..data")).unwrap();
        }

        fn load(&self) -> Result<Tls, TlsError> {
            Tls::load(self.0.path().join("tls.crt"), self.0.path().join("tls.key"))
        }
    }

    #[test]
    fn a_swapped_secret_is_read_again_and_a_broken_one_is_not_used() {
        let mounted = Mounted::new();
        let tls = mounted.load().unwrap();
        assert!(!tls.reload(), "nothing has changed");
        mounted.swap("second", &pair());
        assert!(tls.reload());
        assert!(!tls.reload());
        let before = Arc::clone(&tls.current.read().unwrap().config);
        for (i, broken) in [
            (String::new(), pair().1),
            (pair().0, "no key".to_owned()),
            (pair().0, pair().1), // of two pairs
        ]
        .iter()
        .enumerate()
        {
            mounted.swap(&format!("broken-{i}"), broken);
            assert!(!tls.reload());
            assert!(Arc::ptr_eq(&before, &tls.current.read().unwrap().config), "the old one serves on");
        }
        mounted.swap("third", &pair());
        assert!(tls.reload());
    }

    #[test]
    fn files_that_cannot_be_used_are_named_and_not_quoted() {
        let mounted = Mounted::new();
        let missing = Tls::load("/nowhere/tls.crt".into(), "/nowhere/tls.key".into()).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/tls.crt can't be used"), "{missing}");
        mounted.swap("other", &(pair().0, pair().1));
        let unfit = mounted.load().unwrap_err().to_string();
        assert!(unfit.contains("can't be used together") && !unfit.contains("PRIVATE"), "{unfit}");
    }
}
