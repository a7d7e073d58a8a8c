//! The key ring as the receiver sees it: read from its Secret, and read again every minute, whatever callers send.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::elapsed;
use super::metrics::{Metrics, Outcome};
use crate::callback::keyring::{KeyRing, KeyRingError, SECRET_KEY};

const EVERY: SignedDuration = SignedDuration::from_mins(1);
const FIRST_GAP: SignedDuration = SignedDuration::from_secs(1);
const READ_TIMEOUT: Duration = Duration::from_secs(3);

/// Why the ring could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingReadError {
    /// There is no such Secret. The controller makes it.
    #[error("the key ring's Secret does not exist")]
    Missing,
    /// No answer, or not the one that was hoped for.
    #[error("the key ring's Secret could not be read: {0}")]
    Unreachable(String),
    /// The Secret holds no ring.
    #[error(transparent)]
    Unusable(#[from] KeyRingError),
}

impl RingReadError {
    fn outcome(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unreachable(_) => "unreachable",
            Self::Unusable(_) => "unusable",
        }
    }
}

/// Where the ring comes from.
pub trait RingSource: Send + Sync {
    /// Reads it once.
    fn read(&self) -> BoxFuture<'_, Result<KeyRing, RingReadError>>;
}

/// The Secret in the operator's namespace. Needs `get` on this one Secret, and nothing else.
pub struct KubeRing {
    api: Api<Secret>,
    name: String,
}

impl KubeRing {
    /// The ring in Secret `name` of `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), name: name.to_owned() }
    }

    async fn get(&self) -> Result<KeyRing, RingReadError> {
        let secret = match self.api.get_opt(&self.name).await {
            Ok(Some(secret)) => secret,
            Ok(None) => return Err(RingReadError::Missing),
            Err(error) => return Err(RingReadError::Unreachable(describe(&error))),
        };
        let data = secret.data.unwrap_or_default();
        let ring = data.get(SECRET_KEY).map_or(&[][..], |bytes| bytes.0.as_slice());
        Ok(KeyRing::parse(ring)?)
    }
}

/// What may be said about an error: one about the content could quote it, and the content is secret.
fn describe(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} {}", status.code, status.reason),
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => "the answer is not a Secret".to_owned(),
        other => other.to_string(),
    }
}

impl RingSource for KubeRing {
    fn read(&self) -> BoxFuture<'_, Result<KeyRing, RingReadError>> {
        Box::pin(self.get())
    }
}

/// The ring that was read last.
pub(super) struct Ring {
    source: Arc<dyn RingSource>,
    current: RwLock<Option<Arc<KeyRing>>>,
    last: Mutex<Option<Timestamp>>,
    problem: RwLock<String>,
    metrics: Metrics,
}

impl Ring {
    pub(super) fn new(source: Arc<dyn RingSource>, metrics: Metrics) -> Self {
        let problem = RwLock::new("the key ring has not been read yet".to_owned());
        Self { source, current: RwLock::default(), last: Mutex::default(), problem, metrics }
    }

    pub(super) fn current(&self) -> Option<Arc<KeyRing>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Once it was read, a receiver can work: a ring that vanished later is the controller's alarm.
    pub(super) fn ready(&self) -> Result<(), String> {
        match self.current() {
            Some(_) => Ok(()),
            None => Err(self.problem.read().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }

    /// Called regularly.
    pub(super) async fn keep_fresh(&self, now: Timestamp) {
        let gap = if self.current().is_some() { EVERY } else { FIRST_GAP };
        self.read(now, gap).await;
    }

    async fn read(&self, now: Timestamp, gap: SignedDuration) {
        let mut last = self.last.lock().await;
        if last.is_some_and(|at| elapsed(now, at) < gap) {
            return;
        }
        *last = Some(now);
        let read = tokio::time::timeout(READ_TIMEOUT, self.source.read())
            .await
            .unwrap_or_else(|_| Err(RingReadError::Unreachable("timed out".to_owned())));
        let outcome = match read {
            Ok(ring) => {
                self.store(ring);
                "ok"
            }
            Err(error) => {
                warn!(%error, have_one = self.current().is_some(), "could not read the key ring");
                *self.problem.write().unwrap_or_else(PoisonError::into_inner) = error.to_string();
                error.outcome()
            }
        };
        self.metrics.ring_reads.get_or_create(&Outcome { outcome }).inc();
    }

    fn store(&self, ring: KeyRing) {
        let ids = |ring: &KeyRing| ring.keys.iter().map(|k| k.id.clone()).collect::<Vec<_>>();
        if self.current().is_none_or(|old| ids(&old) != ids(&ring)) {
            info!(keys = ring.keys.len(), "read the key ring");
        }
        self.metrics.ring_keys.set(i64::try_from(ring.keys.len()).unwrap_or(i64::MAX));
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(ring));
    }
}
