//! The Gemini batch, files and webhook API as far as it is known, for tests and demos.
//!
//! Its own wire types, sharing none with the operator: one mistake cannot hide in both. [`Simulator::start`]
//! runs it inside a test; the binary serves demos and process-level tests, with the same controls over HTTP
//! under `/_sim/`.
//!
//! | file | what it knows |
//! | --- | --- |
//! | `api` | routes, the request log, faults |
//! | `files`, `batches` | the resources, as they look on the wire |
//! | `work` | deterministic answers, and what directives in prompts make of them |
//! | `webhooks` | signed deliveries with retries |
//! | `registered` | webhooks of a project, as opposed to those of one batch |
//! | `state` | everything it remembers, and the controls |

#![allow(clippy::missing_panics_doc)]

mod api;
mod batches;
mod clock;
mod error;
mod files;
mod registered;
mod state;
mod webhooks;
mod work;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use clock::Clock;
pub use state::{BatchView, Delivery, Effect, Fault, LogEntry, Op, Outcome, Switches};

use state::Shared;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How a simulator behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub listen: SocketAddr,
    /// How much faster than Google it works. Scales work, lags and the pauses between deliveries.
    pub speed: f64,
    /// Where the times on the wire come from.
    pub clock: Clock,
    /// The API keys it accepts, each with its project. `None`: any key, each with a project of its own.
    pub keys: Option<Vec<(String, String)>>,
    /// Batches of one project that may be active at once.
    pub max_active: usize,
    /// How long a batch waits, before `speed`.
    pub pending: Duration,
    /// How long a batch runs, before `speed`.
    pub running: Duration,
    /// Share of requests that fail, 0 to 1.
    pub fail_rate: f64,
    /// What the contract leaves open.
    pub switches: Switches,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            speed: 1.0,
            clock: Clock::real(),
            keys: None,
            max_active: 100,
            pending: Duration::from_secs(10),
            running: Duration::from_secs(50),
            fail_rate: 0.0,
            switches: Switches::default(),
        }
    }
}

/// A running simulator. Dropping it stops it.
pub struct Simulator {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: CancellationToken,
}

impl Simulator {
    /// Starts it. Fails if the address is taken.
    pub async fn start(config: Config) -> std::io::Result<Self> {
        let listener = TcpListener::bind(config.listen).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared::new(config, format!("http://{address}"), stop.clone()));
        tokio::spawn(api::serve(listener, Arc::clone(&shared), stop.clone()));
        Ok(Self { shared, address, stop })
    }

    /// `http://ADDRESS`.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The time on the wire.
    #[must_use]
    pub fn now(&self) -> jiff::Timestamp {
        self.shared.now()
    }

    /// Every request it received, in order.
    #[must_use]
    pub fn log(&self) -> Vec<LogEntry> {
        self.shared.lock().log.clone()
    }

    /// Every delivery of a webhook it tried, in order.
    #[must_use]
    pub fn deliveries(&self) -> Vec<Delivery> {
        self.shared.lock().deliveries.clone()
    }

    /// All batches, also deleted ones.
    #[must_use]
    pub fn batches(&self) -> Vec<BatchView> {
        self.shared.views()
    }

    /// Names of the files that exist, result files apart.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        self.shared.lock().files.keys().cloned().collect()
    }

    /// Plants a fault.
    pub fn fault(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    /// Takes back the faults of an operation that have met no request yet.
    pub fn clear_faults(&self, op: Op) {
        self.shared.lock().faults.retain(|fault| fault.op != op);
    }

    /// Sets the switches.
    pub fn set(&self, switches: Switches) {
        self.shared.lock().switches = switches;
    }

    /// The switches.
    #[must_use]
    pub fn switches(&self) -> Switches {
        self.shared.lock().switches.clone()
    }

    /// Ends a batch now. `false`: there is none of that name that could still end.
    #[must_use]
    pub fn finish(&self, batch: &str, outcome: Outcome) -> bool {
        self.shared.finish(batch, outcome)
    }

    /// Sends a signed event for a batch to a URI of the caller's choice, once.
    pub async fn deliver(&self, batch: &str, uri: &str, event: &str) -> Option<u16> {
        webhooks::deliver_once(&self.shared, batch, uri, event).await
    }

    /// Sends any body to a URI, signed as Google would, under an id of the caller's choice, once.
    pub async fn post_signed(&self, uri: &str, id: &str, body: &str) -> Option<u16> {
        webhooks::post_signed(&self.shared, uri, id, body).await
    }

    /// Rolls the signing keys: the oldest goes, a new one comes and signs from now on.
    pub fn roll_keys(&self) {
        self.shared.lock().signing.roll();
    }

    /// Stops it.
    pub fn shutdown(&self) {
        self.stop.cancel();
    }

    /// Resolves when it has been stopped.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
