//! What Gemini has that the cluster may have forgotten: an etcd restored from backup is behind, and a job that was
//! paid for looks as if it had never been sent. Client required for [`take`].
//!
//! So in each turn of leadership each API key is listed in full, back to the oldest job that may be sent, before
//! the first job is sent with it. A job that has a batch there for the very attempt that it is about to begin
//! adopts it. It costs one listing for each key and turn. A fresh installation (this turn made the Lease, and no
//! unfinished job is older than a few minutes) is spared it, since nothing of it can be at Gemini. A Lease alone
//! proves nothing: it may have been deleted to speed up a takeover.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};

use super::decide;
use super::identity::Identity;
use super::memory::{Found, Trouble, after};
use super::run::Context;
use super::{Credential, Problem, sweep};
use crate::api::{GeminiBatchJob, Reason};
use crate::gemini::{self, Batch};

/// No etcd is restored, and an operator started on it, in less time.
const RESTORE: SignedDuration = SignedDuration::from_mins(5);

/// See the module.
#[derive(Default)]
pub struct Census {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Nothing of this installation can be at Gemini.
    fresh: bool,
    /// The unfinished jobs of the first list, by UID, with namespace and name; and when the oldest was created.
    candidates: HashMap<String, (String, String)>,
    oldest: Option<Timestamp>,
    keys: HashMap<String, OfKey>,
}

#[derive(Clone, Default)]
struct OfKey {
    /// It was listed.
    taken: bool,
    /// By UID.
    found: HashMap<String, Found>,
    /// The last listing failed; not again before its time.
    failed: Option<Trouble>,
    /// One lists at a time, the others wait for what it finds.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Census {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Valid after any panic: each change is one assignment or insert.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new turn of leadership knows nothing.
    pub fn restart<'a>(&self, fresh: bool, jobs: impl IntoIterator<Item = &'a GeminiBatchJob>) {
        let mut inner = Inner { fresh, ..Inner::default() };
        for job in jobs.into_iter().filter(|job| !decide::is_finished(job)) {
            let meta = &job.metadata;
            let name = (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
            inner.candidates.extend(meta.uid.clone().map(|uid| (uid, name)));
            let created = job.metadata.creation_timestamp.as_ref().map(|t| t.0);
            inner.oldest = inner.oldest.into_iter().chain(created).min();
        }
        // The API server's time, whatever clock the operator runs on.
        let recently = after(Timestamp::now(), -RESTORE);
        inner.fresh &= inner.oldest.is_none_or(|oldest| oldest > recently);
        *self.inner() = inner;
    }

    /// Whether the job was there, unfinished, when this turn of leadership began: it may have a batch that its status
    /// does not know of.
    #[must_use]
    pub fn is_candidate(&self, uid: &str) -> bool {
        self.inner().candidates.contains_key(uid)
    }

    /// Whether a job may be sent with this key.
    #[must_use]
    pub fn is_taken(&self, key: &str) -> bool {
        let inner = self.inner();
        inner.fresh || inner.keys.get(key).is_some_and(|k| k.taken)
    }

    /// What is there of the job.
    #[must_use]
    pub fn found(&self, key: &str, uid: &str) -> Found {
        let inner = self.inner();
        let found = inner.keys.get(key).and_then(|k| k.found.get(uid));
        found.cloned().unwrap_or_default()
    }

    /// The sweep came across a batch of an attempt that the job has not begun.
    pub fn add(&self, key: &str, uid: &str, attempt: i32, batch: &Batch) {
        let mut inner = self.inner();
        let found = &mut inner.keys.entry(key.to_owned()).or_default().found;
        let of_job = found.entry(uid.to_owned()).or_default();
        if !of_job.iter().any(|(_, b)| b.name == batch.name) {
            of_job.push((attempt, batch.clone()));
        }
    }
}

/// Lists the key's batches, unless somebody has. `job` is the one that is about to be sent.
pub async fn take(ctx: &Context, credential: &Credential, job: &GeminiBatchJob) -> Result<(), Trouble> {
    let key = &credential.fingerprint;
    let turn = Arc::clone(&ctx.census.inner().keys.entry(key.clone()).or_default().turn);
    // Somebody else lists: that may take a minute, and there are other keys to work for.
    let Ok(_mine) = turn.try_lock() else {
        return Err(Trouble {
            failures: 1,
            next: after(ctx.clock.now(), ctx.timings.trouble_first),
            problem: Problem::new(
                Reason::GeminiUnavailable,
                "the batches of this API key are being listed first",
            ),
        });
    };
    if ctx.census.is_taken(key) {
        return Ok(());
    }
    let (candidates, oldest, failed) = {
        let inner = ctx.census.inner();
        let failed = inner.keys.get(key).and_then(|k| k.failed.clone());
        (inner.candidates.clone(), inner.oldest, failed)
    };
    if let Some(failed) = failed.clone().filter(|f| f.next > ctx.clock.now()) {
        return Err(failed);
    }
    let created = job.metadata.creation_timestamp.as_ref().map(|t| t.0);
    let oldest = oldest.into_iter().chain(created).min().unwrap_or(Timestamp::MIN);
    match sweep::list(ctx, credential, oldest).await {
        Ok(listing) => {
            let mut jobs = HashSet::new();
            for (Identity { uid, attempt, .. }, batch) in &listing.ours {
                if let Some((namespace, name)) = candidates.get(uid) {
                    ctx.census.add(key, uid, *attempt, batch);
                    // It takes its slot at once.
                    if !batch.is_terminal() {
                        ctx.ledger().found(uid, key);
                    }
                    jobs.insert((uid, namespace, name));
                }
            }
            if !jobs.is_empty() {
                tracing::info!(jobs = jobs.len(), "unfinished jobs have batches at Gemini");
            }
            // Those that were looked at before, and rest, are told.
            for (uid, namespace, name) in jobs {
                ctx.unsettle(uid);
                ctx.ledger().errand(namespace, name);
            }
            ctx.census.inner().keys.entry(key.clone()).or_default().taken = true;
            ctx.line_moved.notify_one();
            Ok(())
        }
        Err(error) => {
            let trouble = trouble(ctx, failed.as_ref(), &error);
            ctx.census.inner().keys.entry(key.clone()).or_default().failed = Some(trouble.clone());
            Err(trouble)
        }
    }
}

fn trouble(ctx: &Context, before: Option<&Trouble>, error: &gemini::Error) -> Trouble {
    super::act::trouble_of(ctx, before, "listing batches before the first submission", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemini::{BatchName, BatchState};
    use serde_json::json;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn batch(name: &str, state: BatchState, created: i64) -> Batch {
        Batch {
            name: BatchName::parse(&format!("batches/{name}")).unwrap(),
            display_name: String::new(),
            state,
            done: false,
            create_time: Some(at(created)),
            end_time: None,
            input_file: None,
            output_file: None,
            inlined: None,
            stats: None,
            error: None,
        }
    }

    fn job(uid: &str, created: i64, more: &serde_json::Value) -> GeminiBatchJob {
        let mut job = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": uid, "uid": uid, "creationTimestamp": at(created).to_string()},
            "spec": {"model": "m"}});
        for (field, value) in more.as_object().unwrap() {
            job[field] = value.clone();
        }
        serde_json::from_value(job).unwrap()
    }

    #[test]
    fn a_key_is_taken_once_a_turn_and_not_at_all_when_nobody_led_before() {
        let census = Census::default();
        census.restart(false, &[job("new", 7, &json!({}))]);
        assert!(!census.is_taken("k"));
        census.add("k", "u", 2, &batch("b", BatchState::Running, 0));
        census.add("k", "u", 2, &batch("b", BatchState::Running, 0));
        assert!(!census.is_taken("k"), "what the sweep comes across is not all there is");
        assert_eq!(census.found("k", "u").iter().map(|(n, _)| *n).collect::<Vec<_>>(), [2]);
        assert!(census.found("other", "u").is_empty() && census.found("k", "v").is_empty());
        let long_ago = Timestamp::now().duration_since(at(0)).as_secs() - 600;
        census.restart(true, &[job("old", long_ago, &json!({}))]);
        assert!(!census.is_taken("k"), "the Lease was deleted, or is not from the backup");
        let just_now = Timestamp::now().duration_since(at(0)).as_secs() - 60;
        census.restart(true, &[job("new", just_now, &json!({}))]);
        assert!(census.is_taken("k"), "nothing older is there");
        census.restart(true, &[]);
        assert!(census.is_taken("k") && census.found("k", "u").is_empty());
    }

    #[test]
    fn whatever_is_unfinished_is_looked_for() {
        let attempt = |more: &serde_json::Value| {
            let mut attempt = json!({"number": 1, "sendId": "s", "displayName": "d", "inputFile": "f",
                "credentialFingerprint": "k", "intentTime": "2026-01-01T00:00:00.000000Z"});
            for (field, value) in more.as_object().unwrap() {
                attempt[field] = value.clone();
            }
            json!({"status": {"state": "Running", "conditions": [], "attempts": [attempt]}})
        };
        let running = || attempt(&json!({"batchName": "batches/b"}));
        let mut again = job("again", 3, &running());
        again.spec.backoff_limit = 1;
        let census = Census::default();
        census.restart(
            false,
            &[
                job("running", 0, &running()),
                again,
                job("intended", 4, &attempt(&json!({}))),
                job("new", 5, &json!({})),
            ],
        );
        let inner = census.inner();
        assert_eq!(inner.oldest, Some(at(0)));
        let mut candidates: Vec<_> = inner.candidates.keys().map(String::as_str).collect();
        candidates.sort_unstable();
        assert_eq!(candidates, ["again", "intended", "new", "running"]);
    }
}
