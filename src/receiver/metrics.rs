//! What the receiver counts. Every label has a fixed set of values: nothing that a caller sends becomes one.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Delivered {
    pub(super) outcome: &'static str,
    pub(super) scheme: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct Outcome {
    pub(super) outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct ByScheme {
    pub(super) scheme: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct ByReason {
    pub(super) reason: &'static str,
}

/// Makes histograms with fixed buckets.
#[derive(Clone, Copy)]
pub(super) struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

const FAST: Buckets = Buckets(&[0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.005, 0.02, 0.1]);
const SLOW: Buckets = Buckets(&[0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0]);
const LONG: Buckets = Buckets(&[1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 21_600.0, 43_200.0, 93_600.0]);

/// The receiver's metrics. Cloning shares them.
#[derive(Clone)]
pub struct Metrics {
    pub(super) callbacks: Family<Delivered, Counter>,
    pub(super) verification: Family<ByScheme, Histogram, Buckets>,
    pub(super) age: Histogram,
    pub(super) event_to_receipt: Histogram,
    pub(super) hint_writes: Family<Outcome, Counter>,
    pub(super) hint_write_seconds: Histogram,
    pub(super) key_fetches: Family<Outcome, Counter>,
    pub(super) key_set_age: Gauge,
    pub(super) keys: Gauge,
    pub(super) ring_reads: Family<Outcome, Counter>,
    pub(super) ring_keys: Gauge,
    pub(super) connections_open: Gauge,
    pub(super) connections: Counter,
    pub(super) connections_rejected: Family<ByReason, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            callbacks: Family::default(),
            verification: Family::new_with_constructor(FAST),
            age: LONG.new_metric(),
            event_to_receipt: LONG.new_metric(),
            hint_writes: Family::default(),
            hint_write_seconds: SLOW.new_metric(),
            key_fetches: Family::default(),
            key_set_age: Gauge::default(),
            keys: Gauge::default(),
            ring_reads: Family::default(),
            ring_keys: Gauge::default(),
            connections_open: Gauge::default(),
            connections: Counter::default(),
            connections_rejected: Family::default(),
        }
    }
}

/// What alerts ask for, with the scheme that each is counted under.
const FROM_THE_START: [(&str, &str); 23] = [
    ("header_missing", "none"),
    ("header_repeated", "none"),
    ("id_invalid", "none"),
    ("timestamp_invalid", "none"),
    ("too_old", "none"),
    ("too_new", "none"),
    ("no_signature", "none"),
    ("scheme_not_accepted", "none"),
    ("no_key", "none"),
    ("bad_signature", "none"),
    ("jwt_malformed", "none"),
    ("jwt_algorithm", "none"),
    ("jwt_crit", "none"),
    ("jwt_unknown_key", "none"),
    ("jwt_claim", "none"),
    ("jwt_expired", "none"),
    ("jwt_not_yet_valid", "none"),
    ("jwt_audience", "none"),
    ("no_keyring", "none"),
    ("no_keys", "none"),
    ("timed_out", "none"),
    ("write_failed", "v1a"),
    ("write_failed", "jwt"),
];

impl Metrics {
    /// A counter that is born with its first event shows no increase for it.
    fn begin_at_zero(&self) {
        for (outcome, scheme) in FROM_THE_START {
            self.callbacks.get_or_create(&Delivered { outcome, scheme }).inc_by(0);
        }
    }

    /// Registers everything. The registry brings the prefix, `gemini_batch`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        m.begin_at_zero();
        registry.register(
            "callbacks",
            "Requests to the callback route, by what became of them and how they were signed",
            m.callbacks.clone(),
        );
        registry.register(
            "callback_verification_seconds",
            "Time to check the signature of a callback whose token fits",
            m.verification.clone(),
        );
        registry.register(
            "callback_age_seconds",
            "Age of the timestamp of believed callbacks",
            m.age.clone(),
        );
        registry.register(
            "callback_event_to_receipt_seconds",
            "Time from the event, as the sender dates it, to the receipt of its callback",
            m.event_to_receipt.clone(),
        );
        registry.register(
            "callback_hint_writes",
            "Attempts to store a hint in a job's status, by outcome",
            m.hint_writes.clone(),
        );
        registry.register(
            "callback_hint_write_seconds",
            "Time to store a hint, conflicts included",
            m.hint_write_seconds.clone(),
        );
        registry.register(
            "callback_key_fetches",
            "Fetches of Google's key set, by outcome",
            m.key_fetches.clone(),
        );
        registry.register(
            "callback_key_set_age_seconds",
            "Time since Google's key set was last fetched successfully; -1 before the first time",
            m.key_set_age.clone(),
        );
        registry.register("callback_keys", "Usable keys in Google's key set", m.keys.clone());
        registry.register(
            "callback_keyring_reads",
            "Reads of the key ring, by outcome",
            m.ring_reads.clone(),
        );
        registry.register("callback_keyring_keys", "Keys in the key ring", m.ring_keys.clone());
        registry.register(
            "receiver_connections_open",
            "Connections to the receiver that are open now",
            m.connections_open.clone(),
        );
        registry.register("receiver_connections", "Connections that were accepted", m.connections.clone());
        registry.register(
            "receiver_connections_rejected",
            "Connections that were ended by a limit or a malformed request, or kept waiting by the limit",
            m.connections_rejected.clone(),
        );
        m.key_set_age.set(-1);
        m
    }
}
