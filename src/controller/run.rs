//! Drives observe -> decide -> act -> report for each job, and keeps the watch. Client required.
//!
//! The cache holds no payload (see [`super::watched`]), and a reconcile works on a fresh GET. Jobs at rest (finished, or running with nothing new) are
//! recognised from the cache alone.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures::channel::mpsc;
use futures::{FutureExt as _, Stream, StreamExt as _, TryStreamExt as _};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::controller::{self, Action as Requeue, Config};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::utils::Backoff;
use kube::runtime::{Controller, WatchStreamExt as _, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use rand::RngExt as _;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::census::{self, Census};
use super::collect::Lines;
use super::decide::{self, Change, Decision, Gate, Observed, Wake};
use super::input::Carried;
use super::join::Scratch;
use super::memory::{Memory, OutputObject, Remote, Send, Stage, Why, after};
use super::metrics::{By, ByOutcome, ByReason, Metrics};
use super::observe;
use super::policy::Policy;
use super::quota::{self, Asker, Held, Ledger};
use super::schema_check::{self, SchemaCheck};
use super::shards::{self, family::Family};
use super::transfers::Transfers;
use super::watched::Watched;
use super::webhooks::Webhooks;
use super::{Credential, Timings, act, earlier, identity, namespaces, report, stored};
use crate::api::conditions::cut;
use crate::api::{DeletionPolicy, GeminiBatchJob, Reason};
use crate::callback::keyring::KeyRing;
use crate::clock::Clock;
use crate::crash;
use crate::gemini;
use crate::lease::Leadership;
use crate::store::Stores;

/// More steps in one go than any job takes: a guard against a decision that leads nowhere.
const MAX_STEPS: usize = 64;

/// Of a job that was written for another version.
const UNREADABLE: &str = "this operator can't read the job: it has fields or values that this version does not know. \
                          Run an operator at least as new as the CustomResourceDefinition";

/// On shutdown, for the work in hand: less than the 30 s that kubelet gives.
const DRAIN: Duration = Duration::from_secs(20);

/// Before the turn of leadership after one that a defect ended.
const AFTER_DEFECT: Duration = Duration::from_secs(5);

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
    /// The namespaces whose jobs are worked on; all if none is named.
    pub namespaces: BTreeSet<String>,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether this process may do what only the leader may.
    pub leadership: Leadership,
    /// What an administrator decided for all jobs.
    pub policy: Policy,
    /// Opens object stores.
    pub stores: Arc<Stores>,
    /// What is read from them and written to them, beside the passes.
    pub transfers: Transfers,
    /// Where results are held that are too large for memory.
    pub scratch: Scratch,
    /// Whether the installed definition is as new as the operator.
    pub schema: SchemaCheck,
    /// Which batches Gemini refuses a webhook for.
    pub webhooks: Webhooks,
    /// What the watch shows of the jobs of parts, for the sharded ones.
    pub family: Family,
    /// Whether all jobs have been listed in this turn of leadership.
    listed: AtomicBool,
    /// Whether the turn is to end: what is in hand takes no further step.
    stopping: AtomicBool,
    /// Who may send next.
    ledger: Mutex<Ledger>,
    /// What Gemini has that the cluster may have forgotten.
    pub census: Census,
    /// Somebody's turn may have come.
    pub line_moved: Notify,
    /// What the process remembers of each active job, by UID.
    memories: Mutex<HashMap<String, Memory>>,
    /// Failed calls to the API server in a row, by UID.
    failures: Mutex<HashMap<String, u32>>,
    /// Jobs that the sweep wants looked at, by UID.
    swept: Mutex<HashSet<String>>,
    /// Jobs whose last callback was not acted on to its end, by UID.
    hinted: Mutex<HashSet<String>>,
    /// Jobs of which it is not known whether they have a batch, by UID.
    unconfirmed: Mutex<HashSet<String>>,
    /// Jobs to be worked on although neither they nor Gemini changed, by UID.
    unsettled: Mutex<HashSet<String>>,
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
        max_active: u16,
        recorder: Recorder,
        namespaces: BTreeSet<String>,
        metrics: Metrics,
        leadership: Leadership,
        policy: Policy,
        stores: Stores,
        transfers: u16,
        scratch: Scratch,
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
            namespaces,
            metrics,
            leadership,
            policy,
            stores: Arc::new(stores),
            transfers: Transfers::new(transfers),
            scratch,
            schema: SchemaCheck::default(),
            webhooks: Webhooks::default(),
            family: Family::default(),
            listed: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            ledger: Mutex::new(Ledger::new(usize::from(max_active))),
            census: Census::default(),
            line_moved: Notify::new(),
            memories: Mutex::default(),
            failures: Mutex::default(),
            swept: Mutex::default(),
            hinted: Mutex::default(),
            unconfirmed: Mutex::default(),
            unsettled: Mutex::default(),
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
        lock(&self.unconfirmed).clear();
        self.metrics.forget();
        self.webhooks.forget();
        lock(&self.unsettled).clear();
    }

    /// Who may send next. Held for moments only.
    pub fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        lock(&self.ledger)
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

    /// Has the job decided on anew at its next turn, though nothing of it changed.
    pub fn unsettle(&self, uid: &str) {
        lock(&self.unsettled).insert(uid.to_owned());
    }

    /// A Warning in the operator's namespace, where an administrator looks. It is in the log already.
    /// `related`: what it is about, since Events of one reason about the same objects are one Event with the first note.
    pub async fn tell_administrator(&self, reason: &str, note: &str, related: Option<ObjectReference>) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(cut(note, MAX_NOTE_BYTES).to_owned()),
            action: "Reconcile".to_owned(),
            secondary: related,
        };
        if let Err(error) = self.recorder.publish(&event, &self.policy.home).await {
            tracing::warn!(reason, %error, "an Event in the operator's namespace could not be written");
        }
    }

    /// Counts the jobs of which it is not known whether they have a batch.
    fn note_unconfirmed(&self, uid: &str, is: bool) {
        let mut unconfirmed = lock(&self.unconfirmed);
        if is {
            unconfirmed.insert(uid.to_owned());
        } else {
            unconfirmed.remove(uid);
        }
        self.metrics.unconfirmed.set(i64::try_from(unconfirmed.len()).unwrap_or(i64::MAX));
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
    ctx.stopping.store(false, Ordering::Relaxed);
    let _ = stop.run_until_cancelled(schema_check::at_start(&ctx)).await;
    if let Some(Err(error)) = stop.run_until_cancelled(super::ring::reread(&ctx, &ring)).await {
        tracing::error!(%error, "the key ring could not be read again; the one in memory is used");
    }
    let (store, writer) = reflector::store::<Watched>();
    let (poke, poked) = mpsc::unbounded::<ObjectRef<Watched>>();
    let events = namespaces::watch(namespaces::jobs(&ctx.client, &ctx.namespaces)).reflect(writer);
    let stream = visible(Arc::clone(&ctx), events);
    let turn = stop.child_token();
    let mut aside = JoinSet::new();
    aside.spawn(super::doorman::run(Arc::clone(&ctx), poke.clone(), turn.clone()));
    aside.spawn(schema_check::keep_current(Arc::clone(&ctx), store.clone(), poke.clone(), turn.clone()));
    ctx.transfers.begin(poke.clone());
    ctx.family.begin(store.clone(), poke.clone());
    aside.spawn(super::sweep::run(Arc::clone(&ctx), store.clone(), poke, turn.clone()));
    aside.spawn(super::ring::keep_current(Arc::clone(&ctx), ring, store.clone(), turn.clone()));
    let listed = store.clone();
    let controller = Controller::for_stream(stream, store)
        .with_config(Config::default().concurrency(ctx.concurrency))
        .trigger_backoff(AtOnce) // the watches pause by themselves, and what pokes jobs need not pause with them
        .reconcile_on(poked)
        .graceful_shutdown_on(turn.clone().cancelled_owned())
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
        turn.cancelled().await;
        ctx.stopping.store(true, Ordering::Relaxed);
        if ctx.listed.load(Ordering::Relaxed) {
            tokio::time::sleep(DRAIN).await;
            tracing::warn!(
                "work in hand took too long and is broken off; the next leader finds out how far it came"
            );
        }
    };
    let mut defect = false;
    // Without one of these tasks jobs would wait for what does not come: the turn ends, and another one begins.
    let watched = async {
        while let Some(end) = aside.join_next().await {
            if end.is_err_and(|e| e.is_panic()) {
                tracing::error!(
                    "a task of the controller ended by a panic, which is a defect: it begins anew"
                );
                defect = true;
                turn.cancel();
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = controller => {}
        () = listing => {}
        () = bounded => {}
        () = watched => {}
    }
    turn.cancel();
    ctx.transfers.end();
    ctx.family.end();
    while let Some(end) = aside.join_next().await {
        if end.is_err_and(|e| e.is_panic()) {
            tracing::error!("a task of the controller ended by a panic, which is a defect");
        }
    }
    // Whoever does not lead needs no API keys in memory, and has no opinion on the definition.
    ctx.forget_all();
    schema_check::forget(&ctx);
    if defect {
        // It may come again at once, and each turn lists everything.
        let _ = stop.run_until_cancelled(tokio::time::sleep(AFTER_DEFECT)).await;
    }
}

/// No pause at all.
struct AtOnce;

impl Iterator for AtOnce {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

impl Backoff for AtOnce {
    fn reset(&mut self) {}
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
/// it: a job that was woken then would be judged by its old version, and not be woken again. The ledger sees them
/// first: those that run are counted before any other one is sent.
fn visible(
    ctx: Arc<Context>,
    events: impl Stream<Item = watcher::Result<watcher::Event<Watched>>>,
) -> impl Stream<Item = watcher::Result<Watched>> {
    let mut listed = Vec::new();
    let mut first = true;
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
                watcher::Event::InitDone => {
                    let readable = listed.iter().filter_map(|job: &Watched| job.0.as_ref().ok());
                    if std::mem::take(&mut first) {
                        ctx.census.restart(ctx.leadership.is_first(), readable.clone());
                        ctx.ledger().restart(readable);
                    } else {
                        ctx.ledger().relisted(readable.clone());
                        // Which of their children are gone was not shown.
                        let sharded = readable.filter(|job| job.spec.sharding.is_some());
                        sharded.filter_map(|job| job.metadata.uid.as_ref()).for_each(|uid| ctx.unsettle(uid));
                    }
                    for job in &listed {
                        ctx.family.shows(job, false, |parent| ctx.unsettle(parent));
                    }
                    std::mem::take(&mut listed)
                }
                watcher::Event::Apply(job) => {
                    if let Ok(job) = &job.0 {
                        ctx.ledger().seen(job);
                    }
                    ctx.family.shows(&job, false, |parent| ctx.unsettle(parent));
                    vec![job]
                }
                watcher::Event::Delete(job) => {
                    if let Some(uid) = &job.meta().uid {
                        forget(&ctx, uid);
                    }
                    ctx.family.shows(&job, true, |parent| ctx.unsettle(parent));
                    vec![job]
                }
            };
            ctx.line_moved.notify_one();
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
    /// A defect of the operator: the job is looked at again, as after a restart.
    #[error("the work on a job ended by a panic, which is a defect of the operator: see the log")]
    Panicked,
    /// A guard against endless work; a defect of the operator.
    #[error("a job took more than {MAX_STEPS} steps in one go")]
    TooManySteps,
}

async fn reconcile(cached: Arc<Watched>, ctx: Arc<Context>) -> Result<Requeue, Error> {
    let begun = ctx.metrics.pass_begins();
    // A defect that one job brings to light must not end the work on all others. What the process remembered of it is
    // lost, as after a restart, which the durable state is made for.
    let guarded = AssertUnwindSafe(pass(Arc::clone(&cached), &ctx)).catch_unwind().await;
    let result = match guarded {
        Ok(result) => result,
        Err(_) => Err(panicked(&ctx, &cached).await),
    };
    let told = match &result {
        Ok(requeue) if *requeue == Requeue::await_change() => "success",
        Ok(_) => "requeue_after",
        Err(_) => "error",
    };
    ctx.metrics.pass_ended(begun, told);
    result
}

async fn pass(cached: Arc<Watched>, ctx: &Arc<Context>) -> Result<Requeue, Error> {
    let cached = match &cached.0 {
        Ok(job) => job,
        Err(unreadable) => {
            let name = unreadable.metadata.name.as_deref().unwrap_or_default();
            let namespace = unreadable.metadata.namespace.as_deref().unwrap_or_default();
            tracing::error!(namespace, job = name, error = unreadable.error, "{UNREADABLE}");
            publish(ctx, &cached.object_ref(&()), Reason::Unreadable, UNREADABLE, false).await;
            return Ok(Requeue::await_change());
        }
    };
    let Some(uid) = cached.uid() else { return Ok(Requeue::await_change()) };
    ctx.note_hint(&uid, decide::hint_waits(cached));
    ctx.note_unconfirmed(&uid, decide::is_unconfirmed(cached));
    if at_rest_for_ever(cached) {
        forget(ctx, &uid);
        return Ok(Requeue::await_change());
    }
    // The controller never works on one job twice at the same time, so its memory can be taken out.
    let mut memory = lock(&ctx.memories).remove(&uid).unwrap_or_default();
    if lock(&ctx.swept).remove(&uid) {
        memory.looks.swept = true;
    }
    if lock(&ctx.unsettled).remove(&uid) {
        memory.settled = None;
    }
    let called = ctx.ledger().is_called(&uid);
    if let Some(wake) = settled(cached, &memory, ctx.clock.now()).filter(|_| !called) {
        ctx.ledger().idle(&uid);
        ctx.line_moved.notify_one();
        lock(&ctx.memories).insert(uid, memory);
        return Ok(requeue(ctx, wake));
    }
    memory.settled = None;
    ctx.ledger().begin(&uid);
    let mut asked = None;
    let result = drive(ctx, cached, &uid, &mut memory, &mut asked).await;
    let asked = asked.filter(|_| result.is_ok());
    ctx.ledger().end(Asker::of(cached).as_ref(), &uid, asked.as_ref().map(|(key, reason)| (&**key, *reason)));
    ctx.line_moved.notify_one();
    match result {
        Ok(None) => {
            forget(ctx, &uid);
            Ok(Requeue::await_change())
        }
        Ok(Some((version, wake))) => {
            memory.settled = version.map(|v| (v, wake));
            lock(&ctx.failures).remove(&uid);
            lock(&ctx.memories).insert(uid, memory);
            Ok(requeue(ctx, wake))
        }
        // The whole job can't be read, though the cache can hold it without its payload.
        Err(Error::Kubernetes(kube::Error::SerdeError(e))) => {
            lock(&ctx.memories).insert(uid, memory);
            unreadable(ctx, cached, &e).await?;
            Ok(Requeue::await_change())
        }
        Err(e) => {
            lock(&ctx.memories).insert(uid, memory);
            Err(e)
        }
    }
}

/// After a panic: says at the job what happened, as far as that is possible, and forgets no more than it must.
async fn panicked(ctx: &Context, cached: &Watched) -> Error {
    let Ok(job) = &cached.0 else { return Error::Panicked };
    let uid = job.uid().unwrap_or_default();
    lock(&ctx.memories).remove(&uid);
    // Its slot stays its own: it may have a batch.
    ctx.ledger().end(Asker::of(job).as_ref(), &uid, None);
    ctx.line_moved.notify_one();
    if decide::is_finished(job) {
        return Error::Panicked;
    }
    let problem = super::Problem::new(
        Reason::InternalError,
        "the work on this job ended by a defect of the operator, whose log has more: please report it. It is tried again \
         with growing pauses",
    );
    let say = Change::Waiting { problem: problem.clone(), stalled: true, results: None };
    // Refused if the job has changed since; then it is said the next time.
    if matches!(report::write_blindly(&ctx.client, job, &say, ctx.clock.now()).await, Ok(true)) {
        publish(ctx, &job.object_ref(&()), problem.reason, &problem.message, false).await;
    }
    Error::Panicked
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
    ctx.transfers.stop(uid);
    lock(&ctx.memories).remove(uid);
    lock(&ctx.failures).remove(uid);
    lock(&ctx.swept).remove(uid);
    ctx.ledger().gone(uid);
    ctx.line_moved.notify_one();
    lock(&ctx.unsettled).remove(uid);
    ctx.note_hint(uid, false);
    ctx.note_unconfirmed(uid, false);
}

/// Finished, cleaned up and looked at in its present generation.
fn at_rest_for_ever(job: &GeminiBatchJob) -> bool {
    decide::is_finished(job)
        && !decide::has_finalizer(job)
        && job.spec.ttl_seconds_after_finished.is_none()
        && job.spec.deletion_policy != Some(DeletionPolicy::Delete)
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

/// Whether a new batch may be asked for now, as far as others than the job are concerned: the one place that says so.
fn gate(ctx: &Context, job: &GeminiBatchJob, key: Option<&str>, now: Timestamp) -> Gate {
    if let Some(problem) = ctx.schema.problem() {
        return Gate::Closed { problem, wake: Wake::OnChange }; // the check wakes all that wait
    }
    if ctx.policy.pause_submissions {
        let problem = super::Problem::new(
            Reason::SubmissionsPaused,
            "an administrator has paused submissions; the job is submitted when they go on",
        );
        return Gate::Closed { problem, wake: Wake::OnChange }; // it takes a restart to change
    }
    match ctx.policy.refuses(job) {
        Some(problem) => Gate::Closed { problem, wake: Wake::OnChange },
        None => turn(ctx, job, key, now),
    }
}

/// The API key that the job may use now.
fn usable_key(
    ctx: &Context,
    job: &GeminiBatchJob,
    memory: &Memory,
    read: &Result<Arc<Credential>, super::Problem>,
) -> Result<Arc<Credential>, super::Problem> {
    match read {
        Ok(key) => {
            let only_to_submit = decide::only_to_submit(job, memory);
            ctx.policy
                .withholds(job, &key.fingerprint, only_to_submit)
                .map_or_else(|| Ok(Arc::clone(key)), Err)
        }
        // When a namespace is deleted, the Secret goes before the job. For what has ended nothing is held up.
        Err(problem) => match &memory.kept_key {
            Some(kept)
                if job.metadata.deletion_timestamp.is_some()
                    && !decide::is_finished(job)
                    && sent_with(job, kept) =>
            {
                Ok(Arc::clone(kept))
            }
            _ => Err(problem.clone()),
        },
    }
}

/// Whether something that was sent with this key is, or may be, at Gemini.
fn sent_with(job: &GeminiBatchJob, key: &Credential) -> bool {
    let live = decide::current_attempt(job).filter(|a| a.refusal.is_none() && a.outcome.is_none());
    !decide::is_finished(job) && live.is_some_and(|a| a.credential_fingerprint == key.fingerprint)
}

/// Takes steps until nothing is left to do now. `None`: nothing is left to do ever. Otherwise the version
/// of the job that was left behind, and when to come again. `asked`: with which key it asked to be sent, and why
/// it has to wait.
async fn drive(
    ctx: &Arc<Context>,
    cached: &GeminiBatchJob,
    uid: &str,
    memory: &mut Memory,
    asked: &mut Option<(String, Reason)>,
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
    let mut credential: Option<Result<Arc<Credential>, super::Problem>> = None;
    let mut input = None;
    let mut read_for = job.metadata.generation;
    memory.transfer = None;
    memory.shards.begin_pass();
    if !wants_transfers(&job) {
        ctx.transfers.stop(uid);
        if let Some(collected) = &mut memory.collected {
            collected.lines = Lines::Dropped;
        }
    }

    for _ in 0..MAX_STEPS {
        memory.is_about(decide::attempt_at_hand(&job));
        if job.metadata.generation != read_for {
            (credential, input, read_for) = (None, None, job.metadata.generation);
        }
        if credential.is_none() && decide::needs_credential(&job) {
            let read = observe::credential(&ctx.client, &ring, &ctx.policy, &job).await?;
            credential = Some(read.map(Arc::new));
        }
        let key = credential.as_ref().map(|read| usable_key(ctx, &job, memory, read));
        match &key {
            Some(Ok(key)) if sent_with(&job, key) => memory.kept_key = Some(Arc::clone(key)),
            Some(Ok(_)) => memory.kept_key = None,
            _ => {}
        }
        if input.is_none() && decide::needs_input(&job, memory) {
            input = read_input(ctx, &job, key.as_ref(), memory).await?;
            if let Some(plan) = input.as_ref().and_then(|i| i.as_ref().ok()).and_then(Carried::plan) {
                memory.shards.plan = Some(Arc::clone(plan));
                memory.shards.plan_generation = job.metadata.generation;
            }
        }
        shards::act::observe(ctx, &job, memory).await?;
        let fresh_send_id = identity::new_send_id();
        let now = ctx.clock.now();
        let over = matches!(&memory.remote, Some(Remote::Seen(batch)) if batch.is_terminal());
        ctx.ledger().note(&job, over);
        let usable = key.as_ref().and_then(|k| k.as_ref().ok());
        let fingerprint = usable.map(|c| c.fingerprint.as_str());
        // What the cluster may have forgotten is looked for even if nothing may be sent: it is running.
        let mut unlisted = None;
        if let Some(credential) = usable.filter(|key| !ctx.census.is_taken(&key.fingerprint))
            && ctx.census.is_candidate(uid)
            && job.metadata.deletion_timestamp.is_none()
            && decide::current_attempt(&job).is_none_or(|a| a.batch_name.is_none() || a.outcome.is_some())
        {
            unlisted = census::take(ctx, credential, &job).await.err();
        }
        let gate = gate(ctx, &job, fingerprint, now);
        memory.found = fingerprint.map_or_else(Vec::new, |key| ctx.census.found(key, uid));
        let decision = decide::decide(
            &Observed {
                job: &job,
                credential: match &key {
                    Some(Ok(c)) => Ok(c.fingerprint.clone()),
                    Some(Err(problem)) => Err(problem.clone()),
                    None => Ok(String::new()), // not needed: see `needs_credential`
                },
                input: input.as_ref().map(|i: &Result<Carried, _>| match i {
                    Ok(input) => Ok(input.facts()),
                    Err(problem) => Err(problem.clone()),
                }),
                memory,
                gate: &gate,
                cluster: &ring.cluster_id,
                fresh_send_id: &fresh_send_id,
                webhook_refused: ctx.external_url.is_some() && ctx.webhooks.are_refused(job.spec.method, now),
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
        // What was done is still recorded. But nothing is begun any more: others wait for the lease. What was uploaded
        // is sent, though: else the next one could not tell whether it was.
        let begins = match &decision {
            Decision::Act(action) => !matches!(action, decide::Action::CreateBatch { .. }),
            Decision::Record(change) => matches!(**change, Change::Intent(_) | Change::Planned { .. }),
            _ => false,
        };
        if begins && ctx.stopping.load(Ordering::Relaxed) {
            return Ok(Some((None, Wake::OnChange)));
        }
        match decision {
            Decision::Act(action) => {
                let step = act::Step {
                    ctx,
                    job: &job,
                    ring: &ring,
                    credential: usable,
                    input: input.as_ref().and_then(|i| i.as_ref().ok()),
                };
                let long =
                    matches!(action, decide::Action::UploadInput { .. } | decide::Action::Collect { .. });
                Box::pin(step.take(&action, memory)).await?;
                crash::at("after", step_name);
                if memory.stored.is_none() && matches!(input, Some(Ok(Carried::Stored(_)))) {
                    input = None; // it has changed
                }
                if long {
                    // Much may have happened meanwhile, a deletion for example.
                    let Some(there) = fetch().await? else { return Ok(None) };
                    job = there;
                }
            }
            // Never before it is known what Gemini has.
            Decision::Record(change)
                if matches!(*change, Change::Intent(_))
                    && fingerprint.is_some_and(|key| !ctx.census.is_taken(key)) =>
            {
                memory.trouble = match (unlisted, usable) {
                    (None, Some(credential)) => census::take(ctx, credential, &job).await.err(),
                    (unlisted, _) => unlisted,
                };
            }
            // Others may have been faster since the gate was seen open.
            Decision::Record(change)
                if matches!(*change, Change::Intent(_)) && !claim(ctx, &job, fingerprint, now) => {}
            Decision::Record(change) => match record(ctx, &job, &change, now).await {
                Ok(written) => {
                    crash::at("after", step_name);
                    count_end(ctx, &change, &job, memory);
                    remember(ctx, &change, &ring, uid, memory);
                    if matches!(*change, Change::AttemptEnded(_) | Change::Adopted { .. }) {
                        input = None; // of another attempt
                    }
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
                let wake = match say.as_deref() {
                    Some(say) if waits_for_administrator(ctx, &job, say) => Wake::OnChange,
                    _ => recheck_time(ctx, wake, now),
                };
                *asked = fingerprint
                    .zip(held_by(&gate, say.as_deref()))
                    .map(|(key, reason)| (key.to_owned(), reason));
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

/// Whether anything of the job may be on its way to or from an object store.
fn wants_transfers(job: &GeminiBatchJob) -> bool {
    let sent = decide::current_attempt(job).is_some_and(|a| a.batch_name.is_some() && a.outcome.is_none());
    if shards::recorded(job).is_some() {
        // Held as well, what its shards have is put together; at its end, what single ones have is deleted.
        return job.metadata.deletion_timestamp.is_none() || decide::is_finished(job);
    }
    job.metadata.deletion_timestamp.is_none() && !decide::is_finished(job) && (sent || !job.spec.suspend)
}

/// What the next attempt carries: all requests, or those without a result. `None`: that is being found out, which memory
/// says.
async fn read_input(
    ctx: &Arc<Context>,
    job: &GeminiBatchJob,
    key: Option<&Result<Arc<Credential>, super::Problem>>,
    memory: &mut Memory,
) -> Result<Option<Result<Carried, super::Problem>>, kube::Error> {
    if let Some(of) = job.spec.stored_input() {
        return match key {
            Some(Ok(key)) => {
                let seen = stored::observe(ctx, job, of, key, memory).await?;
                Ok(seen.map(|seen| seen.map(Carried::Stored)))
            }
            // That is said before the input counts, and nothing large is read for it.
            Some(Err(problem)) => Ok(Some(Err(problem.clone()))),
            None => Ok(None),
        };
    }
    let whole = match observe::input(&ctx.client, job, ctx.max_input_bytes).await? {
        Ok(whole) => whole,
        Err(problem) => return Ok(Some(Err(problem))),
    };
    let carried = match key {
        Some(Ok(key)) => earlier::without_answered(ctx, job, &key.key, whole).await?,
        // That is said before the input counts.
        _ => Ok(whole),
    };
    Ok(Some(carried.map(Carried::Whole)))
}

/// Whether it is the job's turn among those that share its API key.
fn turn(ctx: &Context, job: &GeminiBatchJob, key: Option<&str>, now: Timestamp) -> Gate {
    let (Some(key), Some(asker)) = (key, Asker::of(job)) else { return Gate::Open };
    let ledger = ctx.ledger();
    let Err(held) = ledger.may_send(&asker, key, now) else { return Gate::Open };
    let problem = quota::problem(job, key, held, ledger.limit());
    // It is woken when its turn comes. Its Secret is not watched, and may hold another key by then. That is no matter of
    // a minute, which is what a sweep is without callbacks: each look may read large inputs and earlier results.
    let sweeps = if ctx.external_url.is_some() { 1 } else { 10 };
    let pause = ctx.timings.sweep.as_millis().saturating_mul(sweeps);
    let pause = rand::rng().random_range(pause..=pause.saturating_mul(2).max(1));
    let pause = SignedDuration::from_millis(i64::try_from(pause).unwrap_or(i64::MAX));
    let wake = match held {
        // Nobody calls a job that has its slot already.
        Held::Quota { until } if ledger.has_slot(job.metadata.uid.as_deref().unwrap_or_default(), key) => {
            until.max(after(now, ctx.timings.recheck))
        }
        _ => after(now, pause),
    };
    Gate::Closed { problem, wake: Wake::At(wake) }
}

/// Takes a slot for the job, if there still is one for it.
fn claim(ctx: &Context, job: &GeminiBatchJob, key: Option<&str>, now: Timestamp) -> bool {
    let (Some(key), Some(asker)) = (key, Asker::of(job)) else { return true };
    ctx.ledger().claim(&asker, key, now).is_ok()
}

/// Why the job waits, if it is the gate that it waits at.
fn held_by(gate: &Gate, say: Option<&Change>) -> Option<Reason> {
    match (gate, say) {
        (Gate::Closed { .. }, Some(Change::Waiting { problem, stalled: false, .. })) => {
            quota::REASONS.contains(&problem.reason).then_some(problem.reason)
        }
        _ => None,
    }
}

/// Whether all that a job waits for is that somebody edits it, or starts the operator with another list of namespaces:
/// there is no sense in looking again before.
fn waits_for_administrator(ctx: &Context, job: &GeminiBatchJob, say: &Change) -> bool {
    let credentials =
        matches!(say, Change::Waiting { problem, .. } if problem.reason == Reason::CredentialsNotFound);
    credentials && decide::current_attempt(job).is_none() && ctx.policy.refuses(job).is_some()
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
    let orphan = match change {
        Change::DropFinalizer { event: Some(p) } if p.reason == Reason::Orphaned => Some(&p.message),
        _ => None,
    };
    if let Some(message) = orphan {
        // Before the job goes: nobody could tell it afterwards. And not only at the job, which may be in a namespace where
        // no Event can be created any more.
        let (namespace, name) = (job.namespace().unwrap_or_default(), job.name_any());
        let attempt = decide::current_attempt(job).map(|a| a.number);
        tracing::error!(target: "audit", namespace, job = name, uid = job.uid(), attempt, message, "orphaned");
        let note = format!("GeminiBatchJob {namespace}/{name}: {message}");
        ctx.tell_administrator(Reason::Orphaned.as_str(), &note, Some(job.object_ref(&()))).await;
    }
    let written = report::write(&ctx.client, job, change, now).await?;
    ctx.metrics.orphaned.inc_by(u64::from(orphan.is_some()));
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
pub(super) async fn publish(
    ctx: &Context,
    about: &ObjectReference,
    reason: Reason,
    message: &str,
    normal: bool,
) {
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
        Change::Refused(_) => memory.send = None,
        Change::Submitted { adopted, .. } => {
            ctx.metrics.adopted.inc_by(u64::from(*adopted));
            memory.send = None;
            memory.sent();
        }
        Change::Adopted { batch, .. } => {
            ctx.metrics.adopted.inc();
            memory.send = None;
            memory.sent();
            // Its callback may have come and gone.
            memory.looks.swept |= batch.is_terminal();
        }
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
        // The next attempt begins with nothing but what is in the status.
        Change::AttemptEnded(end) => {
            ctx.metrics.hints_observed.inc_by(u64::from(end.hint.is_some()));
            *memory = Memory::default();
        }
        Change::AddFinalizer
        | Change::Planned { .. }
        | Change::Sharded(_)
        | Change::Imported { .. }
        | Change::Suspended
        | Change::Validated { .. }
        | Change::Cancelling { .. }
        | Change::DropFinalizer { .. }
        | Change::InputFile { .. }
        | Change::Fencing
        | Change::Waiting { .. }
        | Change::Running { .. }
        | Change::Refresh => {}
    }
}

/// Counts how the end of a job was learned.
fn count_end(ctx: &Context, change: &Change, before: &GeminiBatchJob, memory: &Memory) {
    let attempt = decide::current_attempt(before);
    if let Change::Finished(end) = change {
        let metrics = &ctx.metrics;
        metrics.finished.get_or_create(&ByReason { reason: end.reason.as_str() }).inc();
        if let Some(created) = &before.metadata.creation_timestamp {
            metrics.duration.observe(ctx.clock.now().duration_since(created.0).as_secs_f64().max(0.0));
        }
        if before.spec.sharding.is_some() {
            return; // its shards were counted
        }
        if let Some(usage) = &end.results.usage {
            metrics.count_tokens(&before.spec.model, usage);
        }
        let counts = end.results.requests.unwrap_or_default();
        for (outcome, n) in [("succeeded", counts.succeeded), ("failed", counts.failed)] {
            metrics.requests.get_or_create(&ByOutcome { outcome }).inc_by(u64::try_from(n).unwrap_or(0));
        }
    }
    let by = match change {
        Change::Finished(_) if attempt.is_some_and(|a| a.cancellation.is_some()) => "cancellation",
        Change::Finished(_) => match memory.looks.why {
            Why::Callback => "callback",
            // No callback was missed.
            Why::Sweep if attempt.is_some_and(|a| a.polled) => "polling",
            Why::Sweep => "sweep",
            Why::Other => "other",
        },
        Change::DropFinalizer { .. } if memory.cleanup.cancelled && !decide::is_finished(before) => {
            "cancellation"
        }
        _ => return,
    };
    ctx.metrics.ends_learned.get_or_create(&By { by }).inc();
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
    ctx.schema.suspect(error);
    let pause = act::backoff(ctx.timings.trouble_first, ctx.timings.trouble_longest, failures);
    let attempt = object.0.as_ref().ok().and_then(decide::current_attempt).map(|a| a.number);
    tracing::warn!(
        namespace = object.meta().namespace,
        job = object.meta().name,
        uid = object.meta().uid,
        attempt,
        failures,
        error = %error,
        "a job could not be worked on; it is tried again"
    );
    Requeue::requeue(ctx.clock.real(pause))
}
