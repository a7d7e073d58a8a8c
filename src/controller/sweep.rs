//! The fallback: callbacks can be lost, and there is none for a cancellation. Client required.
//!
//! Every ten minutes or so each API key is asked for its batches, newest first: one list call for many
//! jobs instead of a GET for each. A job whose batch is not shown as going on is woken and looks for itself;
//! the list is never believed, and absence from it proves nothing.
//!
//! It also heals: a send that was given up behind a fence should never have made a batch. If one turns up all the
//! same, beside the one that is recorded, it is cancelled.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures::channel::mpsc::UnboundedSender;
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;
use kube::runtime::reflector::{ObjectRef, Store};
use rand::RngExt as _;
use tokio_util::sync::CancellationToken;

use super::decide;
use super::memory::after;
use super::observe::{self, Credential};
use super::run::Context;
use super::watched::Watched;
use crate::api::GeminiBatchJob;
use crate::gemini;

/// So few jobs of one key are cheaper asked for one by one.
const DIRECT: usize = 1;
const PAGE_SIZE: u32 = 100;
const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);
/// For so long after a job was sent again, a batch of an earlier send may still turn up.
const LATE_SENDS: SignedDuration = SignedDuration::from_hours(48);

/// Sweeps until the token is cancelled.
pub async fn run(
    ctx: Arc<Context>,
    store: Store<Watched>,
    poke: UnboundedSender<ObjectRef<Watched>>,
    stop: CancellationToken,
) {
    loop {
        let pause = ctx.clock.real(ctx.timings.sweep);
        let pause = pause.mul_f64(rand::rng().random_range(0.9..1.1));
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            woken = once(&ctx, &store, &poke) => tracing::debug!(woken, "swept"),
        }
    }
}

/// A job whose batch may have ended without our knowing, or that may have another one.
struct Active {
    object: ObjectRef<Watched>,
    uid: String,
    batch: Option<String>,
    intent: Timestamp,
    /// Its end is not known yet.
    unfinished: bool,
    /// It was sent more than once: what the display names of all its sends begin with.
    resent: Option<String>,
}

/// One sweep; returns how many jobs were woken.
async fn once(ctx: &Context, store: &Store<Watched>, poke: &UnboundedSender<ObjectRef<Watched>>) -> usize {
    let mut woken = 0;
    let mut wake = |active: &Active| {
        ctx.sweep(&active.uid);
        woken += usize::from(poke.unbounded_send(active.object.clone()).is_ok());
    };
    for (credential, jobs) in by_key(ctx, store).await {
        if jobs.len() <= DIRECT && jobs.iter().all(|j| j.resent.is_none()) {
            jobs.iter().for_each(&mut wake);
            continue;
        }
        match going_on(ctx, &credential, &jobs).await {
            Ok(batches) => {
                let goes_on = |j: &&Active| batches.iter().any(|b| j.batch == Some(b.name.to_string()));
                jobs.iter().filter(|j| j.unfinished && !goes_on(j)).for_each(&mut wake);
                heal(ctx, &credential, &jobs, &batches).await;
            }
            Err(error) => tracing::warn!(%error, "a sweep could not list batches; the next one will"),
        }
    }
    woken
}

/// Cancels batches of sends that were given up, where another one is recorded.
async fn heal(ctx: &Context, credential: &Credential, jobs: &[Active], batches: &[gemini::Batch]) {
    for job in jobs {
        let (Some(prefix), Some(recorded)) = (&job.resent, &job.batch) else { continue };
        let duplicate = |b: &&gemini::Batch| {
            b.display_name.starts_with(prefix.as_str()) && b.name.to_string() != *recorded
        };
        for batch in batches.iter().filter(duplicate) {
            if !ctx.leadership.holds() {
                return;
            }
            match ctx.gemini.cancel_batch(&credential.key, &batch.name).await {
                Ok(()) => {
                    ctx.metrics.duplicates_healed.inc();
                    tracing::warn!(target: "audit", job = %job.object, batch = %batch.name, recorded, "a duplicate was cancelled");
                }
                Err(error) => {
                    tracing::error!(job = %job.object, batch = %batch.name, %error, "a duplicate could not be cancelled");
                }
            }
        }
    }
}

/// The active jobs of each API key. Jobs that share a Secret share one read of it.
async fn by_key(ctx: &Context, store: &Store<Watched>) -> Vec<(Credential, Vec<Active>)> {
    let mut by_secret: BTreeMap<(String, String, String), Vec<Arc<Watched>>> = BTreeMap::new();
    for object in store.state() {
        let Ok(job) = &object.0 else { continue };
        if !is_active(job, ctx.clock.now()) {
            continue;
        }
        let secret = &job.spec.credentials.secret_ref;
        let at = (job.namespace().unwrap_or_default(), secret.name.clone(), secret.key.clone());
        by_secret.entry(at).or_default().push(object);
    }
    let ring = ctx.ring();
    let mut by_key: HashMap<String, (Credential, Vec<Active>)> = HashMap::new();
    for jobs in by_secret.into_values() {
        let Some(Ok(first)) = jobs.first().map(|object| &object.0) else { continue };
        // A key that is missing is told by the job itself.
        let Ok(Ok(credential)) = observe::credential(&ctx.client, &ring, first).await else { continue };
        let fingerprint = credential.fingerprint.clone();
        let (_, active) = by_key.entry(fingerprint).or_insert_with(|| (credential, Vec::new()));
        active.extend(jobs.iter().filter_map(|object| active_of(object)));
    }
    by_key.into_values().collect()
}

fn is_active(job: &GeminiBatchJob, now: Timestamp) -> bool {
    decide::current_attempt(job).is_some_and(|a| {
        let watched = a.resends.is_some() && after(a.intent_time.0, LATE_SENDS) > now;
        a.batch_name.is_some() && (!decide::is_finished(job) || watched)
    })
}

fn active_of(object: &Watched) -> Option<Active> {
    let job = object.0.as_ref().ok()?;
    let attempt = decide::current_attempt(job)?;
    Some(Active {
        object: ObjectRef::from_obj(object),
        uid: job.uid()?,
        batch: attempt.batch_name.clone(),
        intent: attempt.intent_time.0,
        unfinished: !decide::is_finished(job),
        resent: attempt
            .resends
            .and_then(|_| attempt.display_name.strip_suffix(attempt.send_id.as_str()))
            .map(ToOwned::to_owned),
    })
}

/// Batches that have not ended, back to the oldest active intent.
async fn going_on(
    ctx: &Context,
    credential: &Credential,
    jobs: &[Active],
) -> Result<Vec<gemini::Batch>, gemini::Error> {
    let oldest = jobs.iter().map(|j| j.intent).min().map_or(Timestamp::MIN, |t| after(t, -CLOCK_SKEW));
    let mut going_on = Vec::new();
    let mut token: Option<String> = None;
    loop {
        let page = ctx.gemini.list_batches(&credential.key, PAGE_SIZE, token.as_deref()).await?;
        let past = page.batches.iter().any(|b| b.create_time.is_some_and(|t| t < oldest));
        going_on.extend(page.batches.into_iter().filter(|b| !b.is_terminal()));
        match page.next_page_token {
            Some(next) if !past => token = Some(next),
            _ => return Ok(going_on),
        }
    }
}
