//! Tells waiting jobs when it is their turn: wakes those that [`super::quota`] names. No requests of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::channel::mpsc::UnboundedSender;
use kube::runtime::reflector::ObjectRef;
use tokio_util::sync::CancellationToken;

use super::metrics::{ByCredential, ByReason};
use super::run::Context;
use super::watched::Watched;
use crate::api::Reason;

/// Keys that are shown with a label of their own; the others are summed up.
const LABELS: usize = 50;
/// Letters of a fingerprint that tell keys apart in a metric.
const LABEL_LETTERS: usize = 8;
const OTHERS: &str = "others";

/// Calls jobs until the token is cancelled.
pub async fn run(ctx: Arc<Context>, poke: UnboundedSender<ObjectRef<Watched>>, stop: CancellationToken) {
    let mut shown = BTreeSet::new();
    while !stop.is_cancelled() {
        let now = ctx.clock.now();
        let (called, next) = {
            let mut ledger = ctx.ledger();
            let called = ledger.call(now);
            let by_key = ledger.active().map(|(key, n)| (key.to_owned(), n)).collect();
            show(&ctx, by_key, &ledger.waiting(), &mut shown);
            (called, ledger.next_call(now))
        };
        for (namespace, name) in called {
            // Closed only when the turn of leadership is over.
            let _ = poke.unbounded_send(ObjectRef::new(&name).within(&namespace));
        }
        let timer = async {
            match next {
                Some(next) => tokio::time::sleep(ctx.clock.until(next)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = ctx.line_moved.notified() => {}
            () = timer => {}
        }
    }
}

/// Refreshes the gauges. What is not there any more shows nothing instead of an old number.
fn show(
    ctx: &Context,
    mut by_key: Vec<(String, usize)>,
    waiting: &BTreeMap<Reason, usize>,
    shown: &mut BTreeSet<String>,
) {
    let metrics = &ctx.metrics;
    by_key.sort();
    let mut labels: BTreeMap<String, usize> = BTreeMap::new();
    for (index, (key, count)) in by_key.into_iter().enumerate() {
        let short = if index < LABELS { key.get(..LABEL_LETTERS).unwrap_or(&key) } else { OTHERS };
        *labels.entry(short.to_owned()).or_default() += count;
    }
    for gone in shown.iter().filter(|label| !labels.contains_key(*label)) {
        metrics.active_batches.remove(&ByCredential { credential: gone.clone() });
    }
    for (credential, count) in &labels {
        let label = ByCredential { credential: credential.clone() };
        metrics.active_batches.get_or_create(&label).set(i64::try_from(*count).unwrap_or(i64::MAX));
    }
    *shown = labels.into_keys().collect();
    for reason in super::quota::REASONS {
        let count = waiting.get(&reason).copied().unwrap_or(0);
        let label = ByReason { reason: reason.as_str() };
        metrics.queued_jobs.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
