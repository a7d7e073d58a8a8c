//! What the controller counts. Every label has a bounded set of values.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::api::{Reason, Usage};

/// Models that are shown with a label of their own; users write whatever they like.
const MODELS: usize = 50;
const OTHER_MODELS: &str = "others";

/// Name of the controller in the metrics that every controller has.
const CONTROLLER: &str = "geminibatchjob";

/// From a minute to two days: Gemini gives batches up after 48 hours.
const DURATIONS: [f64; 12] = [
    60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 28_800.0, 57_600.0, 86_400.0, 129_600.0, 172_800.0,
];
/// As controller-runtime has them, the shorter half.
const PASSES: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// One API key.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByCredential {
    /// The first letters of the key's fingerprint, as in `status.attempts[].credentialFingerprint`.
    pub credential: String,
}

/// One reason.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByReason {
    /// As in the conditions.
    pub reason: &'static str,
}

/// What came of something.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByOutcome {
    /// A fixed word.
    pub outcome: &'static str,
}

/// Tokens of one model.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByModel {
    /// Without `models/`; `others` when there are too many.
    pub model: String,
    /// `prompt` or `output`.
    pub kind: &'static str,
}

/// A pass of the controller.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByResult {
    /// Always the same: there is one.
    pub controller: &'static str,
    /// `success`, `requeue_after` or `error`.
    pub result: &'static str,
}

/// The controller.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByController {
    /// Always the same: there is one.
    pub controller: &'static str,
}

/// How the end of a job was learned.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct By {
    /// `callback`, `sweep`, `cancellation` or `other`.
    pub by: &'static str,
}

/// The controller's metrics. Cloning shares them.
#[derive(Clone)]
pub struct Metrics {
    /// Requests to create a batch, by outcome: `created`, `refused`, `unknown`.
    pub submissions: Family<ByOutcome, Counter>,
    /// Jobs of which it is not known whether Gemini created the batch.
    pub unconfirmed: Gauge,
    /// Age in seconds of the oldest batch that is not over, at the last sweep.
    pub oldest_batch: Gauge,
    /// Jobs whose batch is over and whose results could not be collected yet, at the last sweep.
    pub uncollected: Gauge,
    /// Seconds since the end of the batch of the oldest of them; Gemini keeps results for 48 hours.
    pub oldest_uncollected: Gauge,
    /// Jobs that ended, by reason.
    pub finished: Family<ByReason, Counter>,
    /// From the creation of a job to its end, in seconds.
    pub duration: Histogram,
    /// Requests of jobs that ended, by outcome: `succeeded`, `failed`.
    pub requests: Family<ByOutcome, Counter>,
    /// Bytes of results, by outcome: `read` from Gemini, `stored` in object stores.
    pub result_bytes: Family<ByOutcome, Counter>,
    /// Transfers from and to object stores that failed for now, by reason.
    pub transfer_failures: Family<ByReason, Counter>,
    /// Tokens of jobs that ended.
    tokens: Family<ByModel, Counter>,
    models: Arc<Mutex<HashSet<String>>>,
    /// Passes over jobs, under the names that controller-runtime gave them.
    reconciles: Family<ByResult, Counter>,
    reconcile_errors: Family<ByController, Counter>,
    reconcile_seconds: Family<ByController, Histogram>,
    active_workers: Family<ByController, Gauge>,
    /// Jobs with a callback that was not acted on to its end yet.
    pub hints_waiting: Gauge,
    /// Callbacks that were acted on: Gemini was asked until it confirmed the end, or often enough.
    pub hints_observed: Counter,
    /// Sends with unknown outcome whose input file was deleted, so that they must fail.
    pub fenced: Counter,
    /// Batches that were cancelled because another one is recorded for their attempt.
    pub duplicates_healed: Counter,
    /// Batches that are active or being sent, by API key.
    pub active_batches: Family<ByCredential, Gauge>,
    /// Jobs that wait to be sent, by reason.
    pub queued_jobs: Family<ByReason, Gauge>,
    /// Live batches with our cluster's id whose job does not exist.
    pub unknown_batches: Gauge,
    /// Batches that were found at Gemini instead of being created.
    pub adopted: Counter,
    /// Ends of jobs, by how they were learned.
    pub ends_learned: Family<By, Counter>,
    /// Errors of the watch of jobs.
    pub watch_errors: Counter,
    /// Callbacks that came after the end and said otherwise.
    pub contradictions: Counter,
    /// Times that the key ring's Secret had vanished and was written back.
    pub keyring_restored: Counter,
    /// Batches that may go on at Gemini although their job is gone.
    pub orphaned: Counter,
    /// 1 while the installed `CustomResourceDefinition` is older than the operator.
    pub crd_outdated: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            submissions: Family::default(),
            unconfirmed: Gauge::default(),
            oldest_batch: Gauge::default(),
            uncollected: Gauge::default(),
            oldest_uncollected: Gauge::default(),
            finished: Family::default(),
            duration: Histogram::new(DURATIONS),
            requests: Family::default(),
            result_bytes: Family::default(),
            transfer_failures: Family::default(),
            tokens: Family::default(),
            models: Arc::default(),
            reconciles: Family::default(),
            reconcile_errors: Family::default(),
            reconcile_seconds: Family::new_with_constructor(|| Histogram::new(PASSES)),
            active_workers: Family::default(),
            hints_waiting: Gauge::default(),
            hints_observed: Counter::default(),
            fenced: Counter::default(),
            duplicates_healed: Counter::default(),
            active_batches: Family::default(),
            queued_jobs: Family::default(),
            unknown_batches: Gauge::default(),
            adopted: Counter::default(),
            ends_learned: Family::default(),
            watch_errors: Counter::default(),
            contradictions: Counter::default(),
            keyring_restored: Counter::default(),
            orphaned: Counter::default(),
            crd_outdated: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Whoever does not lead has nothing to say of what is.
    pub fn forget(&self) {
        self.active_batches.clear();
        self.queued_jobs.clear();
        for gauge in [
            &self.hints_waiting,
            &self.unconfirmed,
            &self.oldest_batch,
            &self.uncollected,
            &self.oldest_uncollected,
            &self.unknown_batches,
        ] {
            gauge.set(0);
        }
    }

    /// A pass over a job begins.
    #[must_use]
    pub fn pass_begins(&self) -> Instant {
        self.active_workers.get_or_create(&ByController { controller: CONTROLLER }).inc();
        Instant::now()
    }

    /// A pass over a job has ended: `success`, `requeue_after` or `error`.
    pub fn pass_ended(&self, begun: Instant, result: &'static str) {
        let controller = ByController { controller: CONTROLLER };
        self.active_workers.get_or_create(&controller).dec();
        self.reconcile_seconds.get_or_create(&controller).observe(begun.elapsed().as_secs_f64());
        self.reconciles.get_or_create(&ByResult { controller: CONTROLLER, result }).inc();
        if result == "error" {
            self.reconcile_errors.get_or_create(&controller).inc();
        }
    }

    /// Tokens of a job that ended.
    pub fn count_tokens(&self, model: &str, usage: &Usage) {
        let model = model.strip_prefix("models/").unwrap_or(model);
        let mut known = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let model = if known.contains(model) || known.len() < MODELS {
            known.insert(model.to_owned());
            model
        } else {
            OTHER_MODELS
        };
        for (kind, tokens) in [("prompt", usage.prompt_tokens), ("output", usage.output_tokens)] {
            let of_model = self.tokens.get_or_create(&ByModel { model: model.to_owned(), kind });
            of_model.inc_by(u64::try_from(tokens).unwrap_or(0));
        }
    }

    /// A counter that is born with its first event shows no increase for it: those whose labels are known are there
    /// from the start.
    fn begin_at_zero(&self) {
        self.reconcile_errors.get_or_create(&ByController { controller: CONTROLLER }).inc_by(0);
        for outcome in ["created", "refused", "unknown"] {
            self.submissions.get_or_create(&ByOutcome { outcome }).inc_by(0);
        }
        for outcome in ["succeeded", "failed"] {
            self.requests.get_or_create(&ByOutcome { outcome }).inc_by(0);
        }
        for outcome in ["read", "stored"] {
            self.result_bytes.get_or_create(&ByOutcome { outcome }).inc_by(0);
        }
        for by in ["callback", "sweep", "polling", "cancellation", "other"] {
            self.ends_learned.get_or_create(&By { by }).inc_by(0);
        }
        for reason in Reason::ALL.into_iter().filter(|reason| reason.is_final()) {
            self.finished.get_or_create(&ByReason { reason: reason.as_str() }).inc_by(0);
        }
    }

    /// The metrics that dashboards for any controller know, without a prefix of ours.
    pub fn register_common(&self, registry: &mut Registry) {
        registry.register(
            "controller_runtime_reconcile",
            "Passes over jobs, by result",
            self.reconciles.clone(),
        );
        registry.register(
            "controller_runtime_reconcile_errors",
            "Passes over jobs that ended with an error of the API server",
            self.reconcile_errors.clone(),
        );
        registry.register(
            "controller_runtime_reconcile_time_seconds",
            "Length of passes over jobs",
            self.reconcile_seconds.clone(),
        );
        registry.register(
            "controller_runtime_active_workers",
            "Jobs that are being worked on",
            self.active_workers.clone(),
        );
    }

    /// Registers everything else. The registry brings the prefix, `gemini_batch`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        m.begin_at_zero();
        registry.register(
            "submissions",
            "Requests to create a batch: created, refused, or unknown since the answer was lost",
            m.submissions.clone(),
        );
        registry.register(
            "unconfirmed_jobs",
            "Jobs of which it is not known whether Gemini created the batch",
            m.unconfirmed.clone(),
        );
        registry.register(
            "oldest_batch_seconds",
            "Age of the oldest batch that is not over, at the last sweep; Gemini gives batches up after 48 hours",
            m.oldest_batch.clone(),
        );
        registry.register(
            "uncollected_jobs",
            "Jobs whose batch is over and whose results could not be read or stored yet, at the last sweep",
            m.uncollected.clone(),
        );
        registry.register(
            "oldest_uncollected_seconds",
            "Time since the end of the batch with the oldest results that could be read but not stored, at the last \
             sweep; Gemini keeps them for 48 hours",
            m.oldest_uncollected.clone(),
        );
        registry.register("finished_jobs", "Jobs that ended, by reason", m.finished.clone());
        registry.register(
            "job_duration_seconds",
            "From the creation of a job to its end",
            m.duration.clone(),
        );
        registry.register("requests", "Requests of jobs that ended, by outcome", m.requests.clone());
        registry.register(
            "result_bytes",
            "Bytes of results: read from Gemini, stored in object stores",
            m.result_bytes.clone(),
        );
        registry.register(
            "transfer_failures",
            "Transfers from and to object stores, and to the temporary directory, that failed for now, by reason",
            m.transfer_failures.clone(),
        );
        registry.register("tokens", "Tokens of jobs that ended, by model", m.tokens.clone());
        registry.register(
            "callback_hints_waiting",
            "Unfinished jobs whose last callback has not been acted on to its end",
            m.hints_waiting.clone(),
        );
        registry.register(
            "callback_hints_observed",
            "Callbacks that were acted on to their end: it was confirmed, or Gemini went on saying that the batch runs",
            m.hints_observed.clone(),
        );
        registry.register(
            "submissions_fenced",
            "Sends with unknown outcome whose input file was deleted, so that they must fail",
            m.fenced.clone(),
        );
        registry.register(
            "duplicates_healed",
            "Batches that were cancelled because another one is recorded for their attempt",
            m.duplicates_healed.clone(),
        );
        registry.register(
            "active_batches",
            "Batches that are active at Gemini or being sent, by the first letters of their API key's fingerprint",
            m.active_batches.clone(),
        );
        registry.register(
            "queued_jobs",
            "Jobs that are ready and wait to be sent, by reason",
            m.queued_jobs.clone(),
        );
        registry.register(
            "unknown_batches",
            "Live batches with the id of this cluster whose job does not exist, at the last sweep",
            m.unknown_batches.clone(),
        );
        registry.register(
            "batches_adopted",
            "Batches that were found at Gemini instead of being created once more",
            m.adopted.clone(),
        );
        registry.register(
            "ends_learned",
            "Ends of jobs: by callback, by the sweep, by polling what has no webhook, by a cancellation or deletion of our own, or by other means",
            m.ends_learned.clone(),
        );
        registry.register(
            "watch_errors",
            "Errors of the list or watch of jobs; while they last, no job goes on",
            m.watch_errors.clone(),
        );
        registry.register(
            "callback_contradictions",
            "Callbacks that came after the end of their job and said another end",
            m.contradictions.clone(),
        );
        registry.register(
            "callback_keyring_restored",
            "Times that the key ring's Secret had vanished and was written back from memory",
            m.keyring_restored.clone(),
        );
        registry.register(
            "orphaned",
            "Batches that may go on at Gemini although their job is gone: they could not be cancelled",
            m.orphaned.clone(),
        );
        registry.register(
            "crd_outdated",
            "1 while the installed CustomResourceDefinition is older than the operator, which submits nothing then",
            m.crd_outdated.clone(),
        );
        m
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_models_as_users_name_are_no_more_labels_than_there_is_room_for() {
        let metrics = Metrics::default();
        let usage = Usage { prompt_tokens: 1, output_tokens: 2, total_tokens: 3 };
        for n in 0..500 {
            metrics.count_tokens(&format!("models/m{n}"), &usage);
            metrics.count_tokens("m0", &usage);
        }
        let of = |model: &str, kind| {
            metrics.tokens.get_or_create(&ByModel { model: model.to_owned(), kind }).get()
        };
        assert_eq!((of("m0", "prompt"), of("m0", "output")), (501, 1002), "with and without models/");
        assert_eq!(of("others", "prompt"), 450);
    }
}
