//! The fallback: callbacks can be lost, and there is none for a cancellation. Client required.
//!
//! Every ten minutes or so (every minute with callbacks off, where it is what finds every end) each API key is asked for its batches, newest first: one list call for many
//! jobs instead of a GET for each. A job whose batch is not shown as going on is woken and looks for itself;
//! the list is never believed, and absence from it proves nothing. Jobs whose batch has no webhook, since Gemini refused
//! one, are swept every minute, and their API keys alone.
//!
//! It also heals. Each batch says by its display name whose it is: of two for one attempt the recorded one is kept
//! and the others are cancelled. A batch for an attempt that its job has not begun (etcd was restored from a backup)
//! is shown to the job, which adopts it. One whose job does not exist is reported and left alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use futures::channel::mpsc::UnboundedSender;
use jiff::{SignedDuration, Timestamp};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource as _, ResourceExt as _};
use rand::RngExt as _;
use tokio_util::sync::CancellationToken;

use super::act::{CLOCK_SKEW, MAX_PAGES, PAGE_SIZE};
use super::ending::RESULT_LIFE;
use super::identity::{Identity, identity_of};
use super::memory::after;
use super::observe::{self, SecretAt};
use super::run::{self, Context};
use super::watched::Watched;
use super::{Credential, decide};
use crate::api::{Attempt, DeletionPolicy, GeminiBatchJob, Reason};
use crate::crash;
use crate::gemini::{self, Batch};

/// For so long after a job was sent again, a batch of an earlier send may still turn up.
const LATE_SENDS: SignedDuration = SignedDuration::from_hours(48);
/// After so many sweeps of a key without a listing there is one all the same: it shows what GETs do not.
const DIRECT_ROUNDS: u32 = 5;

/// Sweeps until the token is cancelled.
pub async fn run(
    ctx: Arc<Context>,
    store: Store<Watched>,
    poke: UnboundedSender<ObjectRef<Watched>>,
    stop: CancellationToken,
) {
    let mut before = Before::default();
    let jittered = |pause| ctx.clock.real(pause).mul_f64(rand::rng().random_range(0.9..1.1));
    let (sweep, poll) = (ctx.timings.sweep, ctx.timings.poll);
    let mut until_all = jittered(sweep);
    loop {
        let pause = if poll < sweep { jittered(poll).min(until_all) } else { until_all };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        until_all = until_all.saturating_sub(pause);
        let whom = if until_all.is_zero() { Whom::All } else { Whom::Polled };
        if whom == Whom::All {
            until_all = jittered(sweep);
            crash::at("begin", "Sweep");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            woken = once(&ctx, &store, &poke, &mut before, whom) => tracing::debug!(woken, ?whom, "swept"),
        }
    }
}

/// Whose batches are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Whom {
    /// Of all jobs.
    All,
    /// Of those that no callback can come for.
    Polled,
}

impl Whom {
    fn includes(self, attempt: &Attempt) -> bool {
        self == Self::All || attempt.polled
    }
}

/// What is remembered from sweep to sweep.
#[derive(Default)]
struct Before {
    /// Of each key: pages of its last listing, and sweeps without one since. Apart for the lists that go no further back
    /// than what is polled: those heal only part of what there may be to heal.
    keys: HashMap<(String, Whom), (usize, u32)>,
    /// Batches that were told of.
    told: HashSet<String>,
}

/// A job whose batch may have ended without our knowing, or that may have another one.
struct Active {
    object: ObjectRef<Watched>,
    uid: String,
    batch: Option<String>,
    intent: Timestamp,
    /// Its end is not known yet.
    unfinished: bool,
}

/// One sweep; returns how many jobs were woken.
async fn once(
    ctx: &Context,
    store: &Store<Watched>,
    poke: &UnboundedSender<ObjectRef<Watched>>,
    before: &mut Before,
    whom: Whom,
) -> usize {
    let mut woken = 0;
    let mut wake = |uid: &str, object: &ObjectRef<Watched>| {
        ctx.sweep(uid);
        woken += usize::from(poke.unbounded_send(object.clone()).is_ok());
    };
    let mut unknown = HashSet::new();
    tell_the_oldest(ctx, store);
    tell_the_uncollected(ctx, store);
    for (credential, jobs) in by_key(ctx, store, whom).await {
        let key = &credential.fingerprint;
        let listed = (key.clone(), whom);
        let unfinished = || jobs.iter().filter(|j| j.unfinished);
        let (pages, direct) = before.keys.get(&listed).copied().unwrap_or_default();
        if jobs.len() < pages && direct < DIRECT_ROUNDS {
            before.keys.insert(listed, (pages, direct + 1));
            unfinished().for_each(|j| wake(&j.uid, &j.object));
            continue;
        }
        let oldest = jobs.iter().map(|j| j.intent).min().unwrap_or(Timestamp::MIN);
        // A job that is deleted while the list is read is known all the same.
        let known: HashSet<String> = store.state().iter().filter_map(|j| j.meta().uid.clone()).collect();
        let listing = match list(ctx, &credential, oldest).await {
            Ok(listing) => listing,
            Err(error) => {
                tracing::warn!(%error, "a sweep could not list batches; the next one will");
                continue;
            }
        };
        before.keys.insert(listed, (listing.pages, 0));
        let goes_on = |j: &&Active| j.batch.as_ref().is_some_and(|name| listing.live.contains(name));
        unfinished().filter(|j| !goes_on(j)).for_each(|j| wake(&j.uid, &j.object));

        // Also those that one job created and another one imported.
        let recorded: HashSet<String> = store
            .state()
            .iter()
            .filter_map(|object| object.0.as_ref().ok()?.status.as_ref())
            .flat_map(|s| s.attempts.iter().filter_map(|a| a.batch_name.clone()))
            .collect();
        let there: HashMap<String, Arc<Watched>> = store
            .state()
            .into_iter()
            .filter_map(|object| Some((object.meta().uid.clone()?, object)))
            .collect();
        for (identity, batch) in &listing.ours {
            if recorded.contains(&batch.name.to_string()) {
                continue;
            }
            let Some(object) = there.get(&identity.uid) else {
                if !batch.is_terminal() && !known.contains(&identity.uid) {
                    unknown.insert(batch.name.to_string());
                }
                continue;
            };
            let Ok(job) = &object.0 else { continue };
            match verdict(job, identity.attempt, batch) {
                Verdict::Leave => {}
                Verdict::Show => {
                    ctx.census.add(key, &identity.uid, identity.attempt, batch);
                    wake(&identity.uid, &ObjectRef::from_obj(object));
                }
                Verdict::Cancel => cancel(ctx, &credential, object, batch, &mut before.told).await,
            }
        }
    }
    for name in &unknown {
        if before.told.insert(name.clone()) {
            tracing::warn!(
                target: "audit",
                batch = name,
                "a batch with the id of this cluster is live, but its job does not exist; it is left alone"
            );
        }
    }
    if whom == Whom::All {
        ctx.metrics.unknown_batches.set(i64::try_from(unknown.len()).unwrap_or(i64::MAX));
    }
    woken
}

/// What to do about a batch of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is the right one, or over, or the job looks for it itself.
    Leave,
    /// The job has not begun this attempt: it shall adopt the batch.
    Show,
    /// The attempt has another batch, or is over without this one.
    Cancel,
}

fn verdict(job: &GeminiBatchJob, number: i32, batch: &Batch) -> Verdict {
    let cancel = if batch.is_terminal() { Verdict::Leave } else { Verdict::Cancel };
    let attempts = job.status.as_ref().map(|s| s.attempts.as_slice()).unwrap_or_default();
    let name = batch.name.to_string();
    if attempts.iter().any(|a| a.batch_name.as_ref() == Some(&name)) {
        return Verdict::Leave;
    }
    // Its user wants it left alone.
    if job.metadata.deletion_timestamp.is_some() && job.spec.deletion_policy() == DeletionPolicy::Orphan {
        return Verdict::Leave;
    }
    let over = decide::is_finished(job) || job.metadata.deletion_timestamp.is_some();
    match attempts.iter().find(|a| a.number == number) {
        // Its own search goes on, or its clean-up.
        Some(a)
            if a.batch_name.is_none()
                && a.outcome.is_none()
                && a.refusal.is_none()
                && !decide::is_finished(job) =>
        {
            Verdict::Leave
        }
        Some(a) if a.batch_name.is_some() || a.outcome.is_some() => cancel,
        None if attempts.iter().any(|a| a.number > number) => cancel,
        _ if over => cancel,
        Some(_) | None => Verdict::Show,
    }
}

async fn cancel(
    ctx: &Context,
    credential: &Credential,
    object: &Watched,
    batch: &Batch,
    told: &mut HashSet<String>,
) {
    if !ctx.leadership.holds() {
        return;
    }
    let (namespace, job) = (object.meta().namespace.as_deref(), object.meta().name.as_deref());
    if let Err(error) = ctx.gemini.cancel_batch(&credential.key, &batch.name).await {
        tracing::error!(namespace, job, batch = %batch.name, %error, "a duplicate could not be cancelled");
        return;
    }
    // A cancellation may take its time: it is asked for again, and told once.
    if told.insert(batch.name.to_string()) {
        ctx.metrics.duplicates_healed.inc();
        let uid = object.meta().uid.as_deref();
        let attempt = object.0.as_ref().ok().and_then(decide::current_attempt).map(|a| a.number);
        tracing::warn!(target: "audit", namespace, job, uid, attempt, batch = %batch.name, "a duplicate was cancelled");
        let message = format!("{} was a second batch for the same attempt and is cancelled", batch.name);
        run::publish(ctx, &object.object_ref(&()), Reason::DuplicateCancelled, &message, false).await;
    }
}

/// How old the oldest batch is that is not over.
fn tell_the_oldest(ctx: &Context, store: &Store<Watched>) {
    let now = ctx.clock.now();
    let jobs = store.state();
    let live =
        jobs.iter().filter_map(|object| object.0.as_ref().ok()).filter(|job| !decide::is_finished(job));
    let attempts = live.filter_map(decide::current_attempt).filter(|a| a.outcome.is_none());
    let created = attempts.filter_map(|a| a.create_time.as_ref());
    let age = created.map(|t| now.duration_since(t.0).as_secs()).max().unwrap_or(0);
    ctx.metrics.oldest_batch.set(age.max(0));
}

/// How many jobs have results that are nowhere but at Gemini, and since when.
fn tell_the_uncollected(ctx: &Context, store: &Store<Watched>) {
    let now = ctx.clock.now();
    let jobs = store.state();
    let waiting = jobs.iter().filter_map(|object| object.0.as_ref().ok()).filter(|job| is_uncollected(job));
    let ages: Vec<i64> = waiting.map(|job| seconds_since_the_end(job, now)).collect();
    ctx.metrics.uncollected.set(i64::try_from(ages.len()).unwrap_or(i64::MAX));
    ctx.metrics.oldest_uncollected.set(ages.into_iter().max().unwrap_or(0));
}

/// Whether the job's batch is over, and its results can't be read or stored.
fn is_uncollected(job: &GeminiBatchJob) -> bool {
    let submitted =
        decide::current_attempt(job).is_some_and(|a| a.batch_name.is_some() && a.outcome.is_none());
    let all = job.status.iter().flat_map(|s| &s.conditions).filter(|c| c.status == "True");
    let says = |reasons: &[Reason]| all.clone().any(|c| reasons.iter().any(|r| c.reason == r.as_str()));
    let reasons = [
        Reason::ResultsNotReadable,
        Reason::OutputConflict,
        Reason::OutputTooLarge,
        Reason::OutputNotWritable,
        Reason::StoreAccessDenied,
        Reason::StoreNotAllowed,
        Reason::StoreUnavailable,
    ];
    submitted && !decide::is_finished(job) && says(&reasons)
}

/// Since the batch of a job ended, as far as its status tells: it does once the results have been read.
fn seconds_since_the_end(job: &GeminiBatchJob, now: Timestamp) -> i64 {
    let output = job.status.as_ref().and_then(|s| s.output.as_ref());
    let expires = output.and_then(|o| o.expiration_time.as_ref());
    expires.map_or(0, |t| now.duration_since(after(t.0, -RESULT_LIFE)).as_secs().max(0))
}

/// The active jobs of each API key. Jobs that share a Secret share one read of it.
async fn by_key(ctx: &Context, store: &Store<Watched>, whom: Whom) -> Vec<(Credential, Vec<Active>)> {
    let mut by_secret: BTreeMap<SecretAt, Vec<Arc<Watched>>> = BTreeMap::new();
    for object in store.state() {
        let Ok(job) = &object.0 else { continue };
        if !is_active(job, ctx.clock.now(), whom) {
            continue;
        }
        let Some(at) = SecretAt::of(job, &ctx.policy) else { continue };
        by_secret.entry(at).or_default().push(object);
    }
    let ring = ctx.ring();
    let mut by_key: HashMap<String, (Credential, Vec<Active>)> = HashMap::new();
    for jobs in by_secret.into_values() {
        let Some(Ok(first)) = jobs.first().map(|object| &object.0) else { continue };
        // A key that is missing is told by the job itself.
        let Ok(Ok(credential)) = observe::credential(&ctx.client, &ring, &ctx.policy, first).await else {
            continue;
        };
        let fingerprint = credential.fingerprint.clone();
        let theirs = |object: &&Arc<Watched>| {
            let job = object.0.as_ref();
            job.is_ok_and(|job| ctx.policy.withholds(job, &fingerprint, false).is_none())
        };
        let (_, active) = by_key.entry(fingerprint.clone()).or_insert_with(|| (credential, Vec::new()));
        active.extend(jobs.iter().filter(theirs).filter_map(|object| active_of(object)));
    }
    by_key.into_values().collect()
}

fn is_active(job: &GeminiBatchJob, now: Timestamp, whom: Whom) -> bool {
    decide::current_attempt(job).filter(|a| a.outcome.is_none() && whom.includes(a)).is_some_and(|a| {
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
    })
}

/// What a listing shows.
pub(super) struct Listing {
    /// Batches with the id of this cluster.
    pub(super) ours: Vec<(Identity, Batch)>,
    /// Names of all batches that have not ended.
    live: HashSet<String>,
    pages: usize,
}

/// All batches of a key, from the newest to past `oldest`.
pub(super) async fn list(
    ctx: &Context,
    credential: &Credential,
    oldest: Timestamp,
) -> Result<Listing, gemini::Error> {
    let ring = ctx.ring();
    let oldest = after(oldest, -CLOCK_SKEW);
    let mut listing = Listing { ours: Vec::new(), live: HashSet::new(), pages: 0 };
    let mut token: Option<String> = None;
    for _ in 0..MAX_PAGES {
        let page = ctx.gemini.list_batches(&credential.key, PAGE_SIZE, token.as_deref()).await?;
        listing.pages += 1;
        let past = page.batches.iter().any(|b| b.create_time.is_some_and(|t| t < oldest));
        for batch in page.batches {
            if !batch.is_terminal() {
                listing.live.insert(batch.name.to_string());
            }
            if let Some(identity) = identity_of(&ring.cluster_id, &batch.display_name) {
                listing.ours.push((identity, batch));
            }
        }
        match page.next_page_token {
            // An empty page with a token is not the end.
            Some(next) if !past => token = Some(next),
            _ => break,
        }
    }
    Ok(listing)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::gemini::{BatchName, BatchState};

    fn job(attempts: &Value, finished: bool, deleted: bool) -> GeminiBatchJob {
        let finished = if finished {
            json!([{"type": "Finished", "status": "True", "reason": "Completed", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}])
        } else {
            json!([])
        };
        let mut job = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": "j", "uid": "u"}, "spec": {"model": "m"},
            "status": {"state": "Running", "conditions": finished, "attempts": attempts}});
        if deleted {
            job["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        serde_json::from_value(job).unwrap()
    }

    fn attempt(number: i32, more: &Value) -> Value {
        let mut attempt = json!({"number": number, "sendId": "s", "displayName": "d", "inputFile": "f",
            "credentialFingerprint": "k", "intentTime": "2026-01-01T00:00:00.000000Z"});
        for (field, value) in more.as_object().unwrap() {
            attempt[field] = value.clone();
        }
        attempt
    }

    fn batch(name: &str, state: BatchState) -> Batch {
        Batch {
            name: BatchName::parse(name).unwrap(),
            display_name: String::new(),
            state,
            done: false,
            create_time: None,
            end_time: None,
            input_file: None,
            output_file: None,
            inlined: None,
            stats: None,
            error: None,
        }
    }

    #[test]
    fn results_are_uncollected_while_their_batch_is_over_and_they_are_only_at_gemini() {
        let submitted = json!([attempt(1, &json!({"batchName": "batches/a"}))]);
        let says = |attempts: &Value, type_: &str, reason: &str, finished: bool| {
            let mut job = job(attempts, finished, false);
            let status = job.status.as_mut().unwrap();
            let condition = json!({"type": type_, "status": "True", "reason": reason, "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"});
            status.conditions.push(serde_json::from_value(condition).unwrap());
            status.output =
                serde_json::from_value(json!({"expirationTime": "2026-01-03T00:00:00Z"})).unwrap();
            job
        };
        for reason in [
            "ResultsNotReadable",
            "OutputConflict",
            "OutputTooLarge",
            "OutputNotWritable",
            "StoreAccessDenied",
            "StoreNotAllowed",
            "StoreUnavailable",
        ] {
            assert!(is_uncollected(&says(&submitted, "Stalled", reason, false)), "{reason}");
        }
        assert!(is_uncollected(&says(&submitted, "Reconciling", "ResultsNotReadable", false)));
        assert!(!is_uncollected(&says(&submitted, "Reconciling", "Submitted", false)), "it runs");
        assert!(!is_uncollected(&says(&submitted, "Stalled", "OutputConflict", true)), "it is finished");
        let reserving = says(&json!([]), "Stalled", "OutputConflict", false);
        assert!(!is_uncollected(&reserving), "nothing is at Gemini yet");

        let now = "2026-01-02T00:00:00Z".parse().unwrap();
        assert_eq!(seconds_since_the_end(&says(&submitted, "Stalled", "OutputConflict", false), now), 86_400);
        assert_eq!(seconds_since_the_end(&job(&submitted, false, false), now), 0, "not known");
    }

    #[test]
    fn between_sweeps_only_what_has_no_webhook_is_asked_for() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        for (more, all, polled) in [
            (json!({"batchName": "batches/a"}), true, false),
            (json!({"batchName": "batches/a", "polled": true}), true, true),
            (json!({"polled": true}), false, false),
        ] {
            let going = job(&json!([attempt(1, &more)]), false, false);
            assert_eq!(is_active(&going, now, Whom::All), all, "{more}");
            assert_eq!(is_active(&going, now, Whom::Polled), polled, "{more}");
        }
        let over = job(&json!([attempt(1, &json!({"batchName": "batches/a", "polled": true}))]), true, false);
        assert!(!is_active(&over, now, Whom::Polled));
    }

    #[test]
    fn what_becomes_of_a_batch() {
        use Verdict::{Cancel, Leave, Show};
        let recorded = json!({"batchName": "batches/a"});
        let outcome = json!({"batchName": "batches/a",
            "outcome": {"reason": "BatchExpired", "succeeded": 0, "failed": 0}});
        let refusal = json!({"refusal": {"call": "Create", "reason": "WaitingForQuota", "code": 429,
            "time": "2026-01-01T00:00:00.000000Z", "retryTime": "2026-01-01T00:00:00.000000Z"}});
        let one = |more: &Value| json!([attempt(1, more)]);
        for (what, attempts, finished, deleted, number, name, expected) in [
            ("the recorded one", one(&recorded), false, false, 1, "batches/a", Leave),
            ("a second one", one(&recorded), false, false, 1, "batches/b", Cancel),
            ("a second one of a finished job", one(&recorded), true, false, 1, "batches/b", Cancel),
            ("a second one of a deleted job", one(&recorded), false, true, 1, "batches/b", Cancel),
            ("the recorded one of a finished job", one(&recorded), true, false, 1, "batches/a", Leave),
            ("unresolved: it looks for itself", one(&json!({})), false, false, 1, "batches/b", Leave),
            ("unresolved and deleted: it looks as well", one(&json!({})), false, true, 1, "batches/b", Leave),
            ("never resolved, finished", one(&json!({})), true, false, 1, "batches/b", Cancel),
            ("refused, and there all the same", one(&refusal), false, false, 1, "batches/b", Show),
            ("refused for good", one(&refusal), true, false, 1, "batches/b", Cancel),
            ("nothing begun", json!([]), false, false, 1, "batches/b", Show),
            ("nothing begun, deleted", json!([]), false, true, 1, "batches/b", Cancel),
            ("a later attempt", one(&outcome), false, false, 2, "batches/b", Show),
            ("of an attempt that is over", one(&outcome), false, false, 1, "batches/b", Cancel),
            (
                "of an attempt that is forgotten",
                json!([attempt(3, &recorded)]),
                false,
                false,
                1,
                "batches/b",
                Cancel,
            ),
            (
                "of an earlier attempt, recorded",
                json!([attempt(1, &recorded), attempt(2, &json!({}))]),
                false,
                false,
                1,
                "batches/a",
                Leave,
            ),
        ] {
            let job = job(&attempts, finished, deleted);
            assert_eq!(verdict(&job, number, &batch(name, BatchState::Running)), expected, "{what}");
            let over = verdict(&job, number, &batch(name, BatchState::Succeeded));
            assert_eq!(over, if expected == Cancel { Leave } else { expected }, "{what}, over");
        }
    }
}
