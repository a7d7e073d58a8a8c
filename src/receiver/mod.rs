//! The HTTP server for callbacks: the part of the operator that faces the internet.
//!
//! A delivery passes the cheapest checks first: body length, token, header shape, time window, signature, replay
//! window, and then one write into the job's status. Nothing is fetched, read or remembered for a caller whose
//! token is wrong, and all failures of authentication look the same from outside. The sender gets a 2xx only
//! after the API server has the hint; whatever fails on our side is a 503, and the sender comes again.
//!
//! Stateless: it reads no job and keeps no cache that anything depends on, so any number of replicas may run.
//!
//! - [`server`]: sockets, limits and timeouts, graceful end; [`tls`]: certificates
//! - `routes`: one delivery, from request to response
//! - [`hint`]: the write; [`ring`] and [`keys`]: what deliveries are checked with; `replay`: what is remembered

pub mod hint;
pub mod keys;
pub mod metrics;
mod replay;
pub mod ring;
mod routes;
pub mod server;
#[cfg(test)]
mod tests;
pub mod tls;

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use url::Url;

use self::hint::{HintSink, KubeHintSink};
use self::keys::{HttpJwks, JwksSource, KeyCache};
use self::metrics::Metrics;
use self::replay::Window;
use self::ring::{KubeRing, Ring, RingSource};
use self::server::Limits;
use self::tls::Tls;
use crate::callback::verdict::{FUTURE, PAST_TOKEN_BOUND};
use crate::callback::{Policy, Scheme};

/// Where Google publishes the keys that it signs callbacks with.
pub const GOOGLE_JWKS_URL: &str = "https://generativelanguage.googleapis.com/.well-known/jwks.json";

/// How often the upkeep of ring and keys looks whether something is due, in real time.
const TICK: Duration = Duration::from_secs(1);

/// The time. Injected, so that tests and a sped-up clock can drive everything that depends on it.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// What a receiver needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the world reaches us: the base of every callback URL, with or without a path.
    pub external_url: Url,
    /// The audiences a JWT may be for. `None`: the callback URL itself.
    pub audience: Option<Vec<String>>,
    /// The schemes that count. `v1` needs a secret, which callbacks of this route do not have: it never fits here.
    pub schemes: Vec<Scheme>,
    /// How old a delivery may be.
    pub past: SignedDuration,
    /// How far in the future its timestamp may be.
    pub future: SignedDuration,
    /// TLS of its own; plain HTTP without.
    pub tls: Option<Arc<Tls>>,
    /// Limits and timeouts.
    pub limits: Limits,
}

impl Config {
    /// The defaults: Ed25519 and JWT, 26 hours back, 5 minutes ahead.
    #[must_use]
    pub fn new(external_url: Url) -> Self {
        Self {
            external_url,
            audience: None,
            schemes: vec![Scheme::V1a, Scheme::Jwt],
            past: PAST_TOKEN_BOUND,
            future: FUTURE,
            tls: None,
            limits: Limits::default(),
        }
    }

    fn policy(&self) -> Policy {
        Policy {
            schemes: self.schemes.clone(),
            past: self.past,
            future: self.future,
            audience: self.audience.clone().unwrap_or_default(),
        }
    }
}

/// Where the key set is fetched and the ring is stored.
#[derive(Clone, Debug)]
pub struct Upstreams {
    /// [`GOOGLE_JWKS_URL`], or a simulator's.
    pub jwks_url: Url,
    /// Whether plain HTTP will do for it.
    pub allow_insecure: bool,
    /// Namespace of the key ring's Secret.
    pub ring_namespace: String,
    /// Its name.
    pub ring_name: String,
}

/// Why a receiver could not be built.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The Kubernetes client.
    #[error("could not set up the client for hints")]
    Kube(#[from] kube::Error),
    /// The client for the key set.
    #[error("could not set up the client for Google's keys")]
    Http(#[from] reqwest::Error),
    /// A URL that nobody could call.
    #[error("the external URL must be http or https, with a host and a plain path")]
    ExternalUrl,
}

/// A receiver, ready to serve.
#[derive(Clone)]
pub struct Receiver {
    state: Arc<State>,
}

/// What all requests share.
struct State {
    config: Config,
    policy: Policy,
    ring: Ring,
    keys: KeyCache,
    hints: Arc<dyn HintSink>,
    window: Window,
    clock: Clock,
    metrics: Metrics,
}

impl Receiver {
    /// A receiver for a cluster. `kube` is how to reach it; the client made from it has its own, short timeouts.
    pub fn in_cluster(
        config: Config,
        upstreams: Upstreams,
        kube: kube::Config,
        clock: Clock,
        registry: &mut Registry,
    ) -> Result<Self, SetupError> {
        let client = hint::kube_client(kube)?;
        let ring = KubeRing::new(client.clone(), &upstreams.ring_namespace, &upstreams.ring_name);
        let jwks = HttpJwks::new(upstreams.jwks_url, upstreams.allow_insecure)?;
        let hints = KubeHintSink::new(client);
        let metrics = Metrics::register(registry);
        Self::new(config, Arc::new(ring), Arc::new(jwks), Arc::new(hints), clock, metrics)
    }

    /// A receiver made of any parts.
    pub fn new(
        config: Config,
        ring: Arc<dyn RingSource>,
        jwks: Arc<dyn JwksSource>,
        hints: Arc<dyn HintSink>,
        clock: Clock,
        metrics: Metrics,
    ) -> Result<Self, SetupError> {
        let url = &config.external_url;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() || !url.path().bytes().all(plain) {
            return Err(SetupError::ExternalUrl);
        }
        let state = State {
            policy: config.policy(),
            config,
            ring: Ring::new(ring, metrics.clone()),
            keys: KeyCache::new(jwks, metrics.clone()),
            hints,
            window: Window::default(),
            clock,
            metrics,
        };
        Ok(Self { state: Arc::new(state) })
    }

    /// Whether callbacks can be taken: the key ring has been read. Google's keys are not waited for: they are
    /// fetched at once, a callback that needs them before gets a 503, and an outage at Google must not take
    /// every replica out of service.
    pub fn ready(&self) -> Result<(), String> {
        self.state.ring.ready()
    }

    /// The routes, for a server of your own or for tests.
    pub fn router(&self) -> axum::Router {
        routes::router(Arc::clone(&self.state))
    }

    /// Serves until `shutdown`, then drains. Keeps ring and keys fresh meanwhile.
    pub async fn run(&self, listener: TcpListener, shutdown: CancellationToken) {
        let state = &self.state;
        let (tls, limits) = (state.config.tls.clone(), state.config.limits.clone());
        let serve =
            server::serve(listener, self.router(), tls, limits, state.metrics.clone(), shutdown.clone());
        tokio::join!(serve, shutdown.run_until_cancelled(self.keep_fresh()));
    }

    /// Reads the ring and fetches the keys, at once and then whenever either is due. Looks at the files of the
    /// certificate now and then.
    async fn keep_fresh(&self) {
        let certificate = async {
            let Some(tls) = &self.state.config.tls else { return };
            loop {
                tokio::time::sleep(self.state.config.limits.certificate).await;
                let tls = Arc::clone(tls);
                let _ = tokio::task::spawn_blocking(move || tls.reload()).await; // it reads files
            }
        };
        let keys = async {
            loop {
                let now = (self.state.clock)();
                tokio::join!(self.state.ring.keep_fresh(now), self.state.keys.keep_fresh(now));
                tokio::time::sleep(TICK).await;
            }
        };
        tokio::join!(keys, certificate);
    }
}

/// Time between two readings of the clock, whichever came first: a clock that is set back must not stop anything.
fn elapsed(now: Timestamp, then: Timestamp) -> SignedDuration {
    now.duration_since(then).abs()
}
