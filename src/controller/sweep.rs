//! The fallback: callbacks can be lost, and there is none for a cancellation. Client required.
//!
//! Every ten minutes or so each API key is asked for its batches, newest first: one list call for many
//! jobs instead of a GET for each. A job whose batch is not shown as going on is woken and looks for itself;
//! the list is never believed, and absence from it proves nothing.

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

/// A job whose batch may have ended without our knowing.
struct Active {
    object: ObjectRef<Watched>,
    uid: String,
    batch: Option<String>,
    intent: Timestamp,
}

/// One sweep; returns how many jobs were woken.
async fn once(ctx: &Context, store: &Store<Watched>, poke: &UnboundedSender<ObjectRef<Watched>>) -> usize {
    let mut woken = 0;
    let mut wake = |active: &Active| {
        ctx.sweep(&active.uid);
        woken += usize::from(poke.unbounded_send(active.object.clone()).is_ok());
    };
    for (credential, jobs) in by_key(ctx, store).await {
        if jobs.len() <= DIRECT {
            jobs.iter().for_each(&mut wake);
            continue;
        }
        match going_on(ctx, &credential, &jobs).await {
            Ok(going_on) => jobs.iter().filter(|j| !going_on.contains(&j.batch)).for_each(&mut wake),
            Err(error) => tracing::warn!(%error, "a sweep could not list batches; the next one will"),
        }
    }
    woken
}

/// The active jobs of each API key. Jobs that share a Secret share one read of it.
async fn by_key(ctx: &Context, store: &Store<Watched>) -> Vec<(Credential, Vec<Active>)> {
    let mut by_secret: BTreeMap<(String, String, String), Vec<Arc<Watched>>> = BTreeMap::new();
    for object in store.state() {
        let Ok(job) = &object.0 else { continue };
        if !is_active(job) {
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

fn is_active(job: &GeminiBatchJob) -> bool {
    !decide::is_finished(job) && decide::current_attempt(job).is_some_and(|a| a.batch_name.is_some())
}

fn active_of(object: &Watched) -> Option<Active> {
    let job = object.0.as_ref().ok()?;
    let attempt = decide::current_attempt(job)?;
    Some(Active {
        object: ObjectRef::from_obj(object),
        uid: job.uid()?,
        batch: attempt.batch_name.clone(),
        intent: attempt.intent_time.0,
    })
}

/// Names of the batches that have not ended, back to the oldest active intent.
async fn going_on(
    ctx: &Context,
    credential: &Credential,
    jobs: &[Active],
) -> Result<Vec<Option<String>>, gemini::Error> {
    let oldest = jobs.iter().map(|j| j.intent).min().map_or(Timestamp::MIN, |t| after(t, -CLOCK_SKEW));
    let mut going_on = Vec::new();
    let mut token: Option<String> = None;
    loop {
        let page = ctx.gemini.list_batches(&credential.key, PAGE_SIZE, token.as_deref()).await?;
        let past = page.batches.iter().any(|b| b.create_time.is_some_and(|t| t < oldest));
        going_on.extend(page.batches.iter().filter(|b| !b.is_terminal()).map(|b| Some(b.name.to_string())));
        match page.next_page_token {
            Some(next) if !past => token = Some(next),
            _ => return Ok(going_on),
        }
    }
}
