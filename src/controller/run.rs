//! Drives observe -> decide -> act -> report for each job, and keeps the watch. Client required.
//!
//! The cache holds no payload (see [`super::watched`]), and a reconcile works on a fresh GET. Jobs at rest (finished, or running with nothing new) are
//! recognised from the cache alone.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use backon::ExponentialBuilder;
use futures::channel::mpsc;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::controller::{self, Action as Requeue, Config};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, WatchStreamExt as _, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use rand::RngExt as _;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::decide::{self, Change, Decision, Observed, Wake};
use super::memory::{Memory, OutputObject, Send, Stage, after};
use super::metrics::Metrics;
use super::observe::{self, Credential};
use super::watched::Watched;
use super::{InputFacts, Timings, act, identity, report};
use crate::api::conditions::cut;
use crate::api::{GeminiBatchJob, Reason};
use crate::callback::keyring::KeyRing;
use crate::clock::Clock;
use crate::crash;
use crate::gemini;
use crate::lease::Leadership;

/// More steps in one go than any job takes: a guard against a decision that leads nowhere.
const MAX_STEPS: usize = 64;

/// Of a job that was written for another version.
const UNREADABLE: &str = "this operator can't read the job: it has fields or values that this version does not know. \
                          Run an operator at least as new as the CustomResourceDefinition";

/// On shutdown, for the work in hand: less than the 30 s that kubelet gives.
const DRAIN: Duration = Duration::from_secs(20);

/// Kubernetes cuts an Event's note at 1 KiB.
const MAX_NOTE_BYTES: usize = 1024;

/// What the controller is made of.
pub struct Context {
    /// The cluster. Shared by all modules of the controller.
    pub client: Client,
    /// Gemini.
    pub gemini: gemini::Client,
    /// Signs callback URLs and fingerprints keys; replaced when the Secret changes.
    pub ring: RwLock<Arc<KeyRing>>,
    /// Where Gemini reaches the receiver; `None` without callbacks.
    pub external_url: Option<Url>,
    /// Time.
    pub clock: Clock,
    /// Patience.
    pub timings: Timings,
    /// Largest input in bytes.
    pub max_input_bytes: u64,
    /// Jobs that are worked on at the same time.
    pub concurrency: u16,
    /// The one recorder of Events.
    pub recorder: Recorder,
    /// The one namespace whose jobs are worked on; all if none.
    pub namespace: Option<String>,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether this process may do what only the leader may.
    pub leadership: Leadership,
    /// Whether all jobs have been listed in this turn of leadership.
    listed: AtomicBool,
    /// What the process remembers of each active job, by UID.
    memories: Mutex<HashMap<String, Memory>>,
    /// Failed calls to the API server in a row, by UID.
    failures: Mutex<HashMap<String, u32>>,
    /// Jobs that the sweep wants looked at, by UID.
    swept: Mutex<HashSet<String>>,
    /// Jobs whose last callback was not acted on to its end, by UID.
    hinted: Mutex<HashSet<String>>,
}

impl Context {
    /// A context that remembers nothing yet.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "the parts of the controller, each once, in one place")]
    pub fn new(
        client: Client,
        gemini: gemini::Client,
        ring: KeyRing,
        external_url: Option<Url>,
        clock: Clock,
        timings: Timings,
        max_input_bytes: u64,
        concurrency: u16,
        recorder: Recorder,
        namespace: Option<String>,
        metrics: Metrics,
        leadership: Leadership,
    ) -> Self {
        Self {
            client,
            gemini,
            ring: RwLock::new(Arc::new(ring)),
            external_url,
            clock,
            timings,
            max_input_bytes,
            concurrency,
            recorder,
            namespace,
            metrics,
            leadership,
            listed: AtomicBool::new(false),
            memories: Mutex::default(),
            failures: Mutex::default(),
            swept: Mutex::default(),
            hinted: Mutex::default(),
        }
    }

    /// The key ring as it is now.
    #[must_use]
    pub fn ring(&self) -> Arc<KeyRing> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the controller can do its work: it has seen all jobs, or somebody else leads.
    pub fn ready(&self) -> Result<(), String> {
        if !self.leadership.holds() || self.listed.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err("the jobs have not been listed yet; if this lasts, the log says why".to_owned())
    }

    /// A new turn of leadership knows nothing: somebody else may have acted meanwhile.
    fn forget_all(&self) {
        lock(&self.memories).clear();
        lock(&self.failures).clear();
        lock(&self.swept).clear();
        lock(&self.hinted).clear();
        self.metrics.hints_waiting.set(0);
    }

    /// Counts the jobs whose last callback waits to be acted on.
    fn note_hint(&self, uid: &str, waits: bool) {
        let mut hinted = lock(&self.hinted);
        if waits {
            hinted.insert(uid.to_owned());
        } else {
            hinted.remove(uid);
        }
        self.metrics.hints_waiting.set(i64::try_from(hinted.len()).unwrap_or(i64::MAX));
    }

    /// Has the job look at Gemini at its next turn.
    pub fn sweep(&self, uid: &str) {
        lock(&self.swept).insert(uid.to_owned());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The maps are valid after any panic: each change is one insert or remove.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Watches jobs until the token is cancelled, then lets the work in hand finish. Keeps the key ring current
/// meanwhile.
pub async fn run(ctx: Arc<Context>, ring: super::ring::Place, stop: CancellationToken) {
    ctx.forget_all();
    ctx.listed.store(false, Ordering::Relaxed);
    if let Err(error) = super::ring::reread(&ctx, &ring).await {
        tracing::error!(%error, "the key ring could not be read again; the one in memory is used");
    }
    let (store, writer) = reflector::store::<Watched>();
    let (poke, poked) = mpsc::unbounded::<ObjectRef<Watched>>();
    let jobs: Api<Watched> = match &ctx.namespace {
        None => Api::all(ctx.client.clone()),
        Some(namespace) => Api::namespaced(ctx.client.clone(), namespace),
    };
    let stream = visible(watcher(jobs, watcher::Config::default().page_size(100)).reflect(writer));
    // Short: after an outage of the API server jobs shall go on soon. One list and one watch are asked for.
    let pauses = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(10))
        .with_jitter()
        .without_max_times();

    let sweep = tokio::spawn(super::sweep::run(Arc::clone(&ctx), store.clone(), poke, stop.child_token()));
    let ring =
        tokio::spawn(super::ring::keep_current(Arc::clone(&ctx), ring, store.clone(), stop.child_token()));
    let listed = store.clone();
    let controller = Controller::for_stream(stream, store)
        .with_config(Config::default().concurrency(ctx.concurrency))
        .trigger_backoff(watcher::ExponentialBackoff::from(pauses))
        .reconcile_on(poked)
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(reconcile, on_error, Arc::clone(&ctx))
        .for_each(|result| {
            tell(&ctx, result);
            std::future::ready(())
        });
    let listing = async {
        if listed.wait_until_ready().await.is_ok() {
            ctx.listed.store(true, Ordering::Relaxed);
        }
        std::future::pending::<()>().await;
    };
    // Before the first list is there, nothing is in hand, and kube's Controller would wait for it for ever.
    let bounded = async {
        stop.cancelled().await;
        if ctx.listed.load(Ordering::Relaxed) {
            tokio::time::sleep(DRAIN).await;
            tracing::warn!(
                "work in hand took too long and is broken off; the next leader finds out how far it came"
            );
        }
    };
    tokio::select! {
        () = controller => {}
        () = listing => {}
        () = bounded => {}
    }
    for (task, name) in [(sweep, "the sweep"), (ring, "the upkeep of the key ring")] {
        if task.await.is_err_and(|e| e.is_panic()) {
            tracing::error!("{name} ended by a panic");
        }
    }
}

/// What the Controller says of one turn. Errors of the watch concern all jobs, and somebody has to know.
fn tell<T>(ctx: &Context, result: Result<T, controller::Error<Error, watcher::Error>>) {
    let Err(controller::Error::QueueError(error)) = result else { return };
    ctx.metrics.watch_errors.inc();
    let text = error.to_string();
    let change = if text.contains("403") || text.contains("forbidden") {
        "the operator's account may not list and watch geminibatchjobs: give it the role of the chart"
    } else if text.contains("404") || text.contains("not found") {
        "the CustomResourceDefinition is not installed: kubectl apply --server-side -f crds/"
    } else {
        "it is tried again"
    };
    tracing::error!(error = text, "jobs can't be watched: {change}");
}

/// Jobs as they become visible in the cache. While a list is being read, the cache shows what was there before
/// it: a job that was woken then would be judged by its old version, and not be woken again.
fn visible(
    events: impl Stream<Item = watcher::Result<watcher::Event<Watched>>>,
) -> impl Stream<Item = watcher::Result<Watched>> {
    let mut listed = Vec::new();
    events
        .map_ok(move |event| {
            let seen = match event {
                watcher::Event::Init => {
                    listed.clear();
                    Vec::new()
                }
                watcher::Event::InitApply(job) => {
                    listed.push(job);
                    Vec::new()
                }
                watcher::Event::InitDone => std::mem::take(&mut listed),
                watcher::Event::Apply(job) | watcher::Event::Delete(job) => vec![job],
            };
            futures::stream::iter(seen.into_iter().map(Ok))
        })
        .try_flatten()
}

/// An error of the API server. It can't be told in the job's status, so it is logged and tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or did not answer.
    #[error("the Kubernetes API server: {0}")]
    Kubernetes(#[from] kube::Error),
    /// The lease was lost in the midst of the work.
    #[error("this controller does not lead any more")]
    NotLeading,
    /// A guard against endless work; a defect of the operator.
    #[error("a job took more than {MAX_STEPS} steps in one go")]
    TooManySteps,
}

async fn reconcile(cached: Arc<Watched>, ctx: Arc<Context>) -> Result<Requeue, Error> {
    let cached = match &cached.0 {
        Ok(job) => job,
        Err(unreadable) => {
            let name = unreadable.metadata.name.as_deref().unwrap_or_default();
            let namespace = unreadable.metadata.namespace.as_deref().unwrap_or_default();
            tracing::error!(namespace, job = name, error = unreadable.error, "{UNREADABLE}");
            publish(&ctx, &cached.object_ref(&()), Reason::Unreadable, UNREADABLE, false).await;
            return Ok(Requeue::await_change());
        }
    };
    let Some(uid) = cached.uid() else { return Ok(Requeue::await_change()) };
    ctx.note_hint(&uid, decide::hint_waits(cached));
    if at_rest_for_ever(cached) {
        forget(&ctx, &uid);
        return Ok(Requeue::await_change());
    }
    // The controller never works on one job twice at the same time, so its memory can be taken out.
    let mut memory = lock(&ctx.memories).remove(&uid).unwrap_or_default();
    if lock(&ctx.swept).remove(&uid) {
        memory.looks.swept = true;
    }
    if let Some(wake) = settled(cached, &memory, ctx.clock.now()) {
        lock(&ctx.memories).insert(uid, memory);
        return Ok(requeue(&ctx, wake));
    }
    memory.settled = None;
    let result = drive(&ctx, cached, &uid, &mut memory).await;
    match result {
        Ok(None) => {
            forget(&ctx, &uid);
            Ok(Requeue::await_change())
        }
        Ok(Some((version, wake))) => {
            memory.settled = version.map(|v| (v, wake));
            lock(&ctx.failures).remove(&uid);
            lock(&ctx.memories).insert(uid, memory);
            Ok(requeue(&ctx, wake))
        }
        // The whole job can't be read, though the cache can hold it without its payload.
        Err(Error::Kubernetes(kube::Error::SerdeError(e))) => {
            lock(&ctx.memories).insert(uid, memory);
            unreadable(&ctx, cached, &e).await?;
            Ok(Requeue::await_change())
        }
        Err(e) => {
            lock(&ctx.memories).insert(uid, memory);
            Err(e)
        }
    }
}

/// Says what is wrong with a job that can't be read in whole, without reading it.
async fn unreadable(ctx: &Context, cached: &GeminiBatchJob, error: &serde_json::Error) -> Result<(), Error> {
    // Valid JSON from the API server can only be too deep; other errors are about what it means.
    let problem = if error.is_syntax() {
        super::Problem::new(
            Reason::InputInvalid,
            "a request in spec.input.requests is nested more than 120 levels deep, which this operator can't read: \
             make it flatter, or put it into a ConfigMap as JSON Lines (spec.input.configMap)",
        )
    } else {
        super::Problem::new(Reason::Unreadable, UNREADABLE)
    };
    let say = Change::Waiting { problem: problem.clone(), stalled: true, results: None };
    if report::write_blindly(&ctx.client, cached, &say, ctx.clock.now()).await? {
        publish(ctx, &cached.object_ref(&()), problem.reason, &problem.message, false).await;
    }
    Ok(())
}

fn forget(ctx: &Context, uid: &str) {
    lock(&ctx.memories).remove(uid);
    lock(&ctx.failures).remove(uid);
    lock(&ctx.swept).remove(uid);
    ctx.note_hint(uid, false);
}

/// Finished, cleaned up and looked at in its present generation.
fn at_rest_for_ever(job: &GeminiBatchJob) -> bool {
    decide::is_finished(job)
        && !decide::has_finalizer(job)
        && decide::contradicted(job).is_none()
        && job.status.as_ref().and_then(|s| s.observed_generation) == job.metadata.generation
}

/// The job is exactly as the last turn left it, and nothing is due: most often this is the echo of our own
/// write.
fn settled(job: &GeminiBatchJob, memory: &Memory, now: Timestamp) -> Option<Wake> {
    let (version, wake) = memory.settled.as_ref()?;
    let due = match wake {
        Wake::OnChange => false,
        Wake::At(time) => *time <= now,
        Wake::Recheck => true,
    };
    (job.metadata.resource_version.as_ref() == Some(version) && !due && !memory.looks.swept).then_some(*wake)
}

fn requeue(ctx: &Context, wake: Wake) -> Requeue {
    match wake {
        Wake::OnChange => Requeue::await_change(),
        Wake::At(time) => Requeue::requeue(ctx.clock.until(time).max(Duration::from_millis(1))),
        Wake::Recheck => Requeue::requeue(ctx.clock.real(ctx.timings.recheck)),
    }
}

/// Takes steps until nothing is left to do now. `None`: nothing is left to do ever. Otherwise the version
/// of the job that was left behind, and when to come again.
async fn drive(
    ctx: &Context,
    cached: &GeminiBatchJob,
    uid: &str,
    memory: &mut Memory,
) -> Result<Option<(Option<String>, Wake)>, Error> {
    let jobs: Api<GeminiBatchJob> =
        Api::namespaced(ctx.client.clone(), &cached.namespace().unwrap_or_default());
    let fetch = async || -> Result<Option<GeminiBatchJob>, Error> {
        Ok(jobs.get_opt(&cached.name_any()).await?.filter(|job| job.uid().as_deref() == Some(uid)))
    };
    let Some(mut job) = fetch().await? else { return Ok(None) };
    let ring = ctx.ring();
    // Read once a turn: each is asked for in several steps. But anew for a spec that was edited meanwhile:
    // what is sent must be what the job says when the intent is recorded.
    let mut credential: Option<Result<Credential, super::Problem>> = None;
    let mut input = None;
    let mut read_for = job.metadata.generation;

    for _ in 0..MAX_STEPS {
        if job.metadata.generation != read_for {
            (credential, input, read_for) = (None, None, job.metadata.generation);
        }
        if credential.is_none() && decide::needs_credential(&job) {
            credential = Some(observe::credential(&ctx.client, &ring, &job).await?);
        }
        if input.is_none() && decide::needs_input(&job, memory) {
            input = Some(observe::input(&ctx.client, &job, ctx.max_input_bytes).await?);
        }
        let fresh_send_id = identity::new_send_id();
        let now = ctx.clock.now();
        let decision = decide::decide(
            &Observed {
                job: &job,
                credential: match &credential {
                    Some(Ok(c)) => Ok(c.fingerprint.clone()),
                    Some(Err(problem)) => Err(problem.clone()),
                    None => Ok(String::new()), // not needed: see `needs_credential`
                },
                input: input.as_ref().map(|i: &Result<super::input::Input, _>| match i {
                    Ok(input) => Ok(InputFacts {
                        sha256: input.sha256.clone(),
                        count: i64::try_from(input.keys.len()).unwrap_or(i64::MAX),
                    }),
                    Err(problem) => Err(problem.clone()),
                }),
                memory,
                cluster: &ring.cluster_id,
                fresh_send_id: &fresh_send_id,
                timings: &ctx.timings,
            },
            now,
        );
        tracing::debug!(
            namespace = job.namespace(),
            job = job.name_any(),
            uid,
            step = decision.name(),
            "decided"
        );
        let step_name = decision.name();
        crash::at("before", step_name);
        // Right before whatever comes: a process that was stopped for a while must not act on old beliefs.
        if !ctx.leadership.holds() {
            return Err(Error::NotLeading);
        }
        match decision {
            Decision::Act(action) => {
                let step = act::Step {
                    ctx,
                    job: &job,
                    ring: &ring,
                    credential: credential.as_ref().and_then(|c| c.as_ref().ok()),
                    input: input.as_ref().and_then(|i| i.as_ref().ok()),
                };
                let long =
                    matches!(action, decide::Action::UploadInput { .. } | decide::Action::Collect { .. });
                step.take(&action, memory).await?;
                crash::at("after", step_name);
                if long {
                    // Much may have happened meanwhile, a deletion for example.
                    let Some(there) = fetch().await? else { return Ok(None) };
                    job = there;
                }
            }
            Decision::Record(change) => match record(ctx, &job, &change, now).await {
                Ok(written) => {
                    crash::at("after", step_name);
                    remember(ctx, &change, &ring, uid, memory);
                    if matches!(*change, Change::DropFinalizer { .. }) {
                        return Ok(None);
                    }
                    job = written;
                }
                Err(e) if super::output::is(&e, 409) || super::output::is(&e, 404) => {
                    let Some(there) = fetch().await? else { return Ok(None) };
                    job = there;
                }
                Err(e) => return Err(e.into()),
            },
            Decision::Wait { say, wake } => {
                let wake = recheck_time(ctx, wake, now);
                let Some(say) = say else { return Ok(Some((job.resource_version(), wake))) };
                match record(ctx, &job, &say, now).await {
                    Ok(written) => return Ok(Some((written.resource_version(), wake))),
                    Err(e) if super::output::is(&e, 409) || super::output::is(&e, 404) => {
                        let Some(there) = fetch().await? else { return Ok(None) };
                        job = there;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            Decision::Done => return Ok(None),
        }
    }
    Err(Error::TooManySteps)
}

/// Spread out, so that many jobs with the same trouble do not come at once.
fn recheck_time(ctx: &Context, wake: Wake, now: Timestamp) -> Wake {
    match wake {
        Wake::Recheck => {
            let longest = ctx.timings.recheck.as_millis();
            let pause = rand::rng().random_range(longest / 2..=longest.max(1));
            let pause = SignedDuration::from_millis(i64::try_from(pause).unwrap_or(i64::MAX));
            Wake::At(after(now, pause))
        }
        other => other,
    }
}

/// Writes the change, then tells about it.
async fn record(
    ctx: &Context,
    job: &GeminiBatchJob,
    change: &Change,
    now: Timestamp,
) -> Result<GeminiBatchJob, kube::Error> {
    let written = report::write(&ctx.client, job, change, now).await?;
    // The removal of the last finalizer of a deleted job comes back with the old version, since it deletes.
    let removed = matches!(change, Change::DropFinalizer { .. });
    if written.resource_version() == job.resource_version() && !removed {
        return Ok(written);
    }
    if let Some((reason, message, normal)) = report::event(change) {
        tracing::info!(
            namespace = job.namespace(),
            job = job.name_any(),
            uid = job.uid(),
            %reason,
            message,
            "status"
        );
        publish(ctx, &job.object_ref(&()), reason, &message, normal).await;
    }
    Ok(written)
}

/// An Event that can't be written must not stop the job: the condition says the same.
async fn publish(ctx: &Context, about: &ObjectReference, reason: Reason, message: &str, normal: bool) {
    let event = Event {
        type_: if normal { EventType::Normal } else { EventType::Warning },
        reason: reason.as_str().to_owned(),
        note: Some(cut(message, MAX_NOTE_BYTES).to_owned()),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    if let Err(e) = ctx.recorder.publish(&event, about).await {
        tracing::warn!(namespace = about.namespace, job = about.name, error = %e, "an Event could not be written");
    }
}

/// What a recorded change means for the memory.
fn remember(ctx: &Context, change: &Change, ring: &KeyRing, uid: &str, memory: &mut Memory) {
    match change {
        Change::Intent(attempt) => {
            let own = identity::input_file(&ring.cluster_id, uid, attempt.number, &attempt.send_id);
            // Any other name is a file that exists: the user's, or the one of a send that was refused.
            let stage = if attempt.input_file == own {
                Stage::NotUploaded
            } else {
                Stage::Uploaded { file: attempt.input_file.clone() }
            };
            memory.send = Some(Send { send_id: attempt.send_id.clone(), stage });
            memory.probe = None;
        }
        Change::Refused(_) | Change::Submitted { .. } => memory.send = None,
        Change::Contradicted { .. } => {
            ctx.metrics.contradictions.inc();
            memory.looks.recorded();
            memory.remote = None;
        }
        Change::HintObserved { .. } => {
            ctx.metrics.hints_observed.inc();
            memory.looks.recorded();
        }
        Change::Finished(end) => {
            ctx.metrics.hints_observed.inc_by(u64::from(end.hint.is_some()));
            memory.collected = None;
            memory.output = OutputObject::Unknown;
            memory.remote = None;
        }
        Change::AddFinalizer
        | Change::DropFinalizer { .. }
        | Change::InputFile { .. }
        | Change::Waiting { .. }
        | Change::Running { .. }
        | Change::Refresh => {}
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the signature is the Controller's")]
fn on_error(object: Arc<Watched>, error: &Error, ctx: Arc<Context>) -> Requeue {
    let uid = object.meta().uid.clone().unwrap_or_default();
    let failures = {
        let mut all = lock(&ctx.failures);
        let n = all.entry(uid).or_insert(0);
        *n = n.saturating_add(1);
        *n
    };
    let pause = act::backoff(ctx.timings.trouble_first, ctx.timings.trouble_longest, failures);
    tracing::warn!(
        namespace = object.meta().namespace,
        job = object.meta().name,
        failures,
        error = %error,
        "a job could not be worked on; it is tried again"
    );
    Requeue::requeue(ctx.clock.real(pause))
}
