//! Leader election: of several controllers one works, by a `Lease` in the operator's namespace.
//!
//! Every write carries the `resourceVersion` that was read: of two that want the lease at once, one gets a
//! conflict. Whether somebody else's lease has expired is judged by how long *this* process has seen it
//! unchanged, never by the times written in it: clocks of other machines are not trusted. Whether our own
//! still holds is judged from the moment at which the last successful renewal was *sent*: a process that was
//! stopped, or whose API server is away, knows by itself that it does not lead any more.
//!
//! kube has no leader election. Losing the lease stops the work that leads, not the process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};
use prometheus_client::metrics::gauge::Gauge;
use rand::RngExt as _;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;

/// Field manager of the Lease.
const MANAGER: &str = "gemini-batch-lease";

/// Which lease, and how it is held. All durations are on the operator's clock.
#[derive(Clone, Debug)]
pub struct Config {
    /// Namespace of the operator.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Who we are: different for every process.
    pub identity: String,
    /// After so long without a renewal others may take it.
    pub duration: Duration,
    /// After so long without a renewal of our own we stop leading. Shorter than `duration`.
    pub renew_deadline: Duration,
    /// Pause between renewals, and between looks at somebody else's lease.
    pub retry: Duration,
}

/// Whether this process leads, for whoever is about to do something that only the leader may.
#[derive(Clone, Debug, Default)]
pub struct Leadership(Arc<Mutex<Option<Instant>>>, Arc<AtomicBool>);

impl Leadership {
    /// Whether it leads at this very moment.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.until().is_some_and(|until| Instant::now() < until)
    }

    /// Whether nobody has led before: this turn began by making the Lease.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.1.load(Ordering::Relaxed)
    }

    fn until(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, until: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

/// One candidate.
pub struct Elector {
    leases: Api<Lease>,
    config: Config,
    clock: Clock,
    leadership: Leadership,
    leads: Gauge,
    /// What was last seen of somebody else's lease, and since when.
    seen: Option<(Option<String>, Instant)>,
}

/// How one try to take or renew the lease ended.
enum Tried {
    /// It is ours.
    Ours {
        /// It did not exist before.
        made: bool,
    },
    /// It is somebody else's.
    Theirs,
}

impl Elector {
    /// A candidate. `client` must be impatient: no hidden retries, short timeouts.
    #[must_use]
    pub fn new(client: Client, config: Config, clock: Clock, leads: Gauge) -> Self {
        let leases = Api::namespaced(client, &config.namespace);
        leads.set(0);
        Self { leases, config, clock, leadership: Leadership::default(), leads, seen: None }
    }

    /// Tells whether this process leads.
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        self.leadership.clone()
    }

    /// Runs `work` whenever this process leads, until `stop`. `work` is told to end by its token when the
    /// lease is lost, and may not do anything more that only the leader may: it asks its [`Leadership`].
    pub async fn run<F: Future<Output = ()>>(
        mut self,
        stop: CancellationToken,
        work: impl Fn(CancellationToken) -> F,
    ) {
        while stop.run_until_cancelled(self.acquire()).await.is_some() {
            tracing::info!(lease = self.config.name, identity = self.config.identity, "leading");
            self.leads.set(1);
            let turn = stop.child_token();
            let end = turn.clone();
            let done = CancellationToken::new();
            let working = async {
                work(turn.clone()).await;
                done.cancel();
            };
            // The lease is held until the work has ended: released before, another one would begin meanwhile.
            tokio::join!(working, self.keep(&end, &done));
            self.leads.set(0);
            if self.leadership.holds() {
                self.release().await;
            }
            self.leadership.set(None);
            tracing::info!(lease = self.config.name, "not leading any more");
        }
    }

    /// Returns when this process leads.
    async fn acquire(&mut self) {
        loop {
            match self.attempt().await {
                Ok(Tried::Ours { made }) => return self.leadership.1.store(made, Ordering::Relaxed),
                Ok(Tried::Theirs) => {}
                Err(error) => {
                    tracing::warn!(%error, lease = self.config.name, "the lease could not be taken");
                }
            }
            tokio::time::sleep(self.pause()).await;
        }
    }

    /// Renews until the work is done, also while it winds down: what it has in hand it may still record. If the
    /// renewals fail for too long, the turn is cancelled.
    async fn keep(&mut self, turn: &CancellationToken, done: &CancellationToken) {
        loop {
            let Some(until) = self.leadership.until() else { return self.lost(turn) };
            if Instant::now() >= until {
                tracing::error!(lease = self.config.name, "the lease could not be renewed in time");
                return self.lost(turn);
            }
            if done.run_until_cancelled(tokio::time::sleep(self.pause())).await.is_none() {
                return;
            }
            let left = until.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.attempt()).await {
                Ok(Ok(Tried::Theirs)) => {
                    tracing::error!(lease = self.config.name, "somebody else has the lease");
                    self.leadership.set(None);
                    return self.lost(turn);
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, lease = self.config.name, "the lease could not be renewed");
                }
                // Too late counts as not renewed: the next turn of the loop says so.
                Ok(Ok(Tried::Ours { .. })) | Err(_) => {}
            }
        }
    }

    /// The work winds down, and may do nothing any more that only the leader may.
    fn lost(&self, turn: &CancellationToken) {
        self.leads.set(0);
        turn.cancel();
    }

    /// One try to take or renew the lease.
    async fn attempt(&mut self) -> Result<Tried, kube::Error> {
        let sent = Instant::now();
        let now = self.clock.now();
        let there = self.leases.get_opt(&self.config.name).await?;
        let made = there.is_none();
        let written = match there {
            None => self.leases.create(&post(), &self.lease(None, now)).await,
            Some(there) => {
                let holder = there.spec.as_ref().and_then(|s| s.holder_identity.clone()).unwrap_or_default();
                let ours = holder == self.config.identity;
                if !ours && !holder.is_empty() && !self.has_expired(&there, sent) {
                    return Ok(Tried::Theirs);
                }
                self.leases.replace(&self.config.name, &post(), &self.lease(Some(&there), now)).await
            }
        };
        match written {
            Ok(_) => {
                self.seen = None;
                self.leadership.set(Some(sent + self.clock.real_of(self.config.renew_deadline)));
                Ok(Tried::Ours { made })
            }
            // Somebody wrote in between: whoever it was, the next look tells.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Tried::Theirs),
            Err(error) => Err(error),
        }
    }

    /// Whether somebody else's lease has not changed for as long as it is valid, on our own clock.
    fn has_expired(&mut self, there: &Lease, now: Instant) -> bool {
        let version = there.resource_version();
        match &self.seen {
            Some((seen, since)) if *seen == version => {
                let seconds = there.spec.as_ref().and_then(|s| s.lease_duration_seconds).unwrap_or(0);
                let theirs = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
                now.duration_since(*since) >= self.clock.real_of(theirs.max(self.config.duration))
            }
            _ => {
                self.seen = Some((version, now));
                false
            }
        }
    }

    /// Gives the lease up, so that the next one need not wait. It must still be ours.
    async fn release(&self) {
        let release = async {
            let Some(there) = self.leases.get_opt(&self.config.name).await? else { return Ok(()) };
            let mut free = there.clone();
            let spec = free.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(&self.config.identity) {
                return Ok(());
            }
            spec.holder_identity = Some(String::new());
            self.leases.replace(&self.config.name, &post(), &free).await.map(|_| ())
        };
        match tokio::time::timeout(Duration::from_secs(3), release).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let error: kube::Error = error;
                tracing::warn!(%error, "the lease could not be released; it expires by itself");
            }
            Err(_) => tracing::warn!("the lease could not be released in time; it expires by itself"),
        }
    }

    fn lease(&self, there: Option<&Lease>, now: Timestamp) -> Lease {
        let before = there.and_then(|l| l.spec.clone()).unwrap_or_default();
        let ours = before.holder_identity.as_deref() == Some(&self.config.identity);
        let seconds = i32::try_from(self.config.duration.as_secs()).unwrap_or(i32::MAX);
        let spec = LeaseSpec {
            holder_identity: Some(self.config.identity.clone()),
            lease_duration_seconds: Some(seconds.max(1)),
            acquire_time: if ours { before.acquire_time } else { Some(MicroTime(now)) },
            renew_time: Some(MicroTime(now)),
            lease_transitions: Some(before.lease_transitions.unwrap_or(0).saturating_add(i32::from(!ours))),
            ..before
        };
        let metadata = match there {
            Some(lease) => lease.metadata.clone(), // with its resourceVersion
            None => ObjectMeta { name: Some(self.config.name.clone()), ..ObjectMeta::default() },
        };
        Lease { metadata, spec: Some(spec) }
    }

    /// Jittered, so that candidates do not come at once.
    fn pause(&self) -> Duration {
        self.clock.real_of(self.config.retry).mul_f64(rand::rng().random_range(1.0..1.2))
    }
}

fn post() -> PostParams {
    PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() }
}
