//! What the controller counts. Every label has a fixed set of values.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The controller's metrics. Cloning shares them.
#[derive(Clone, Default)]
pub struct Metrics {
    /// Jobs with a callback that was not acted on to its end yet.
    pub hints_waiting: Gauge,
    /// Callbacks that were acted on: Gemini was asked until it confirmed the end, or often enough.
    pub hints_observed: Counter,
    /// Sends with unknown outcome whose input file was deleted, so that they must fail.
    pub fenced: Counter,
    /// Batches that were cancelled because another one is recorded for their attempt.
    pub duplicates_healed: Counter,
    /// Errors of the watch of jobs.
    pub watch_errors: Counter,
    /// Callbacks that came after the end and said otherwise.
    pub contradictions: Counter,
    /// Times that the key ring's Secret had vanished and was written back.
    pub keyring_restored: Counter,
}

impl Metrics {
    /// Registers everything. The registry brings the prefix, `gemini_batch`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
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
        m
    }
}
