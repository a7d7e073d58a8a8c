//! Google's public keys, kept fresh.
//!
//! Fetched from the configured URL only, one fetch at a time, at least a minute apart, whatever callers send. An
//! empty or broken answer never replaces a good set, and a good set serves for a day while Google is away.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::Mutex;
use tracing::{info, warn};
use url::Url;

use super::elapsed;
use super::metrics::{Metrics, Outcome};
use crate::callback::jwks::{self, JwksError, KeySet};

/// At least this long between two fetches, whatever the reason.
const COOLDOWN: SignedDuration = SignedDuration::from_mins(1);
/// What `Cache-Control: max-age` may say.
const FRESH: std::ops::RangeInclusive<i64> = 300..=3600;
/// What is assumed when it says nothing: what implementations in the wild use.
const DEFAULT_FRESH: SignedDuration = SignedDuration::from_mins(10);
/// How long the last good set serves when no newer can be had.
const STALE: SignedDuration = SignedDuration::from_hours(24);
const FETCH_TIMEOUT: Duration = Duration::from_secs(3);

/// A key set document and how long it says that it is good for.
pub struct Document {
    /// The body.
    pub bytes: Vec<u8>,
    /// `max-age`, if there was one.
    pub max_age: Option<SignedDuration>,
}

/// Why a fetch failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// No answer.
    #[error("no answer from the key endpoint: {0}")]
    Unreachable(String),
    /// Not 200. Redirects are not followed.
    #[error("the key endpoint answered {0}")]
    Status(u16),
    /// No key set in it.
    #[error(transparent)]
    Document(#[from] JwksError),
}

impl FetchError {
    fn outcome(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Status(_) => "status",
            Self::Document(_) => "unusable",
        }
    }
}

/// Where the key set comes from.
pub trait JwksSource: Send + Sync {
    /// Fetches the document once.
    fn fetch(&self) -> BoxFuture<'_, Result<Document, FetchError>>;
}

/// Fetches over HTTPS: no redirects, no proxy guessing, short timeouts, at most 64 KiB.
pub struct HttpJwks {
    client: reqwest::Client,
    url: Url,
}

impl HttpJwks {
    /// Plain HTTP only where the administrator says so.
    pub fn new(url: Url, allow_insecure: bool) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .https_only(!allow_insecure)
            .connect_timeout(FETCH_TIMEOUT)
            .timeout(FETCH_TIMEOUT)
            .build()?;
        Ok(Self { client, url })
    }

    async fn get(&self) -> Result<Document, FetchError> {
        let unreachable = |e: reqwest::Error| FetchError::Unreachable(e.without_url().to_string());
        let response = self.client.get(self.url.clone()).send().await.map_err(unreachable)?;
        if response.status() != http::StatusCode::OK {
            return Err(FetchError::Status(response.status().as_u16()));
        }
        let cache_control = response.headers().get(http::header::CACHE_CONTROL);
        let max_age = cache_control.and_then(|v| v.to_str().ok()).and_then(max_age);
        let mut bytes = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            bytes.extend_from_slice(&chunk.map_err(unreachable)?);
            if bytes.len() > jwks::MAX_BYTES {
                return Err(JwksError::TooLarge.into());
            }
        }
        Ok(Document { bytes, max_age })
    }
}

impl JwksSource for HttpJwks {
    fn fetch(&self) -> BoxFuture<'_, Result<Document, FetchError>> {
        Box::pin(self.get())
    }
}

/// `max-age` in seconds; zero for an answer that wants not to be kept.
fn max_age(cache_control: &str) -> Option<SignedDuration> {
    let directives = || cache_control.split(',').map(|d| d.trim().to_ascii_lowercase());
    if directives().any(|d| d == "no-store" || d == "no-cache") {
        return Some(SignedDuration::ZERO);
    }
    directives()
        .find_map(|d| d.strip_prefix("max-age=")?.trim_matches('"').parse::<u32>().ok())
        .map(|seconds| SignedDuration::from_secs(i64::from(seconds)))
}

/// A good set, and which of its keys matched last.
pub(super) struct Fetched {
    pub(super) set: KeySet,
    at: Timestamp,
    fresh: SignedDuration,
    first: AtomicUsize,
}

impl Fetched {
    pub(super) fn first(&self) -> usize {
        self.first.load(Ordering::Relaxed)
    }

    pub(super) fn matched(&self, key: usize) {
        self.first.store(key, Ordering::Relaxed);
    }
}

/// The cache.
pub(super) struct KeyCache {
    source: Arc<dyn JwksSource>,
    current: RwLock<Option<Arc<Fetched>>>,
    /// When the last fetch began. Held while one is under way: who waits for it finds it just done.
    last: Mutex<Option<Timestamp>>,
    metrics: Metrics,
}

impl KeyCache {
    pub(super) fn new(source: Arc<dyn JwksSource>, metrics: Metrics) -> Self {
        Self { source, current: RwLock::default(), last: Mutex::default(), metrics }
    }

    /// The last good set, unless it is too old to be trusted.
    pub(super) fn current(&self, now: Timestamp) -> Option<Arc<Fetched>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        current.filter(|set| elapsed(now, set.at) <= STALE)
    }

    /// Fetches when the set has had its time. Called regularly.
    pub(super) async fn keep_fresh(&self, now: Timestamp) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        self.metrics.key_set_age.set(current.as_ref().map_or(-1, |set| elapsed(now, set.at).as_secs()));
        if current.is_none_or(|set| elapsed(now, set.at) >= set.fresh) {
            self.refresh(now).await;
        }
    }

    /// Fetches now, unless that was done within the cooldown. Who comes while a fetch is under way waits for it
    /// and starts none of his own.
    pub(super) async fn refresh(&self, now: Timestamp) {
        let mut last = self.last.lock().await;
        if last.is_some_and(|at| elapsed(now, at) < COOLDOWN) {
            return;
        }
        *last = Some(now);
        let outcome = match self.fetch().await {
            Ok((set, max_age)) => {
                info!(ed25519 = set.ed25519.len(), rsa = set.rsa.len(), "fetched the key set");
                self.store(set, max_age, now);
                "ok"
            }
            Err(error) => {
                if self.current(now).is_some() {
                    warn!(%error, "could not fetch the key set; the last good one goes on serving");
                } else {
                    warn!(%error, "could not fetch the key set; callbacks get 503 until there is one");
                }
                error.outcome()
            }
        };
        self.metrics.key_fetches.get_or_create(&Outcome { outcome }).inc();
    }

    async fn fetch(&self) -> Result<(KeySet, Option<SignedDuration>), FetchError> {
        let document = tokio::time::timeout(FETCH_TIMEOUT, self.source.fetch())
            .await
            .map_err(|_| FetchError::Unreachable("timed out".to_owned()))??;
        Ok((KeySet::parse(&document.bytes)?, document.max_age))
    }

    fn store(&self, set: KeySet, max_age: Option<SignedDuration>, now: Timestamp) {
        let fresh = max_age.map_or(DEFAULT_FRESH, |age| {
            SignedDuration::from_secs(age.as_secs().clamp(*FRESH.start(), *FRESH.end()))
        });
        self.metrics.keys.set(i64::try_from(set.len()).unwrap_or(i64::MAX));
        self.metrics.key_set_age.set(0);
        let fetched = Arc::new(Fetched { set, at: now, fresh, first: AtomicUsize::new(0) });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(fetched);
    }
}
