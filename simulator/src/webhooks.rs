//! Signed deliveries of webhooks, with retries; and the keys they are signed with.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use serde_json::{Value, json};

use crate::state::{Delivery, Outcome, Shared, State, random_id};
use crate::work::Plan;

/// Three Ed25519 keys without `kid`, of which the last signs.
pub(crate) struct Signing {
    keys: Vec<SigningKey>,
}

impl Signing {
    pub(crate) fn new() -> Self {
        Self { keys: (0..3).map(|_| SigningKey::from_bytes(&rand::random())).collect() }
    }

    pub(crate) fn roll(&mut self) {
        self.keys.remove(0);
        self.keys.push(SigningKey::from_bytes(&rand::random()));
    }

    pub(crate) fn jwks(&self) -> Value {
        let key = |k: &SigningKey| json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(k.verifying_key().as_bytes())});
        json!({"keys": self.keys.iter().map(key).collect::<Vec<_>>()})
    }

    fn sign(&self, id: &str, timestamp: i64, body: &str) -> String {
        let Some(key) = self.keys.last() else { return String::new() };
        let signature = key.sign(format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1a,{}", STANDARD.encode(signature.to_bytes()))
    }
}

/// Tells everyone who asked to be told of the end of a batch.
pub(crate) fn announce(shared: &Arc<Shared>, name: &str, outcome: Outcome, plan: &Plan) {
    let mut inner = shared.lock();
    let switches = inner.switches.clone();
    let Some(batch) = inner.batch(name) else { return };
    let event = match outcome {
        Outcome::Succeeded => "batch.succeeded",
        Outcome::Failed => "batch.failed",
        Outcome::Expired => "batch.expired",
        Outcome::Cancelled if switches.cancel_event => "batch.cancelled",
        Outcome::Cancelled => return,
    };
    if plan.no_event || switches.lose_events || (batch.embed && !switches.embed_events) {
        return;
    }
    let uris = batch.uris.clone();
    drop(inner);
    let has = |wanted: &str| plan.hook.iter().any(|h| h.split('=').next() == Some(wanted));
    if has("lost") {
        return;
    }
    let late = plan.hook.iter().find_map(|h| h.strip_prefix("late=")?.parse::<f64>().ok()).unwrap_or(0.0);
    for uri in uris {
        for _ in 0..if has("duplicate") { 2 } else { 1 } {
            let (shared, name, uri) = (Arc::clone(shared), name.to_owned(), uri.clone());
            let frozen = switches.frozen_timestamps || has("frozen");
            tokio::spawn(async move {
                tokio::time::sleep(shared.pace().seconds(late)).await;
                deliver(&shared, &name, &uri, event, frozen).await;
            });
        }
    }
}

struct Message {
    id: String,
    body: String,
    timestamp: i64,
    signature: String,
}

fn message(shared: &Shared, name: &str, event: &str) -> Option<Message> {
    let now = shared.now();
    let mut inner = shared.lock();
    let prefix = inner.switches.event_id_with_prefix;
    let batch = inner.batch(name)?;
    let id = if prefix { format!("batches/{}", batch.id) } else { batch.id.clone() };
    let mut data = json!({"id": id});
    match batch.state {
        State::Ended(Outcome::Succeeded) if batch.file.is_some() => {
            data["output_file_uri"] = json!(format!("gs://simulated-output/batch-{}.jsonl", batch.id));
        }
        State::Ended(Outcome::Failed) => {
            data["error_code"] = json!(13);
            data["error_message"] = json!("Batch failed without error.");
        }
        _ => {}
    }
    let time = batch.ended.unwrap_or(now).to_string();
    let body = json!({"type": event, "version": "v1", "timestamp": time, "data": data}).to_string();
    let id = format!("msg_{}", random_id(32));
    let timestamp = now.as_second();
    let signature = inner.signing.sign(&id, timestamp, &body);
    Some(Message { id, body, timestamp, signature })
}

/// At least once: retried for 24 hours, 10 s × 2 up to an hour, with the same id.
async fn deliver(shared: &Arc<Shared>, name: &str, uri: &str, event: &str, frozen: bool) {
    let Some(mut message) = message(shared, name, event) else { return };
    let mut pause = Duration::from_secs(10);
    let mut passed = Duration::ZERO;
    for attempt in 1.. {
        let status = post(shared, name, uri, event, &message, attempt).await;
        if status.is_some_and(|s| (200..300).contains(&s)) || passed > Duration::from_hours(24) {
            return;
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(shared.pace().real(pause)) => {}
        }
        passed += pause;
        pause = (pause * 2).min(Duration::from_hours(1));
        if !frozen {
            message.timestamp = shared.now().as_second();
            message.signature = shared.lock().signing.sign(&message.id, message.timestamp, &message.body);
        }
    }
}

/// One delivery of an event that need not have happened.
pub(crate) async fn deliver_once(shared: &Arc<Shared>, name: &str, uri: &str, event: &str) -> Option<u16> {
    let message = message(shared, name, event)?;
    post(shared, name, uri, event, &message, 1).await
}

async fn post(
    shared: &Arc<Shared>,
    name: &str,
    uri: &str,
    event: &str,
    message: &Message,
    attempt: u32,
) -> Option<u16> {
    let answer = shared
        .http
        .post(uri)
        .header("content-type", "application/json")
        .header("webhook-id", &message.id)
        .header("webhook-timestamp", message.timestamp)
        .header("webhook-signature", &message.signature)
        .body(message.body.clone())
        .send()
        .await;
    let status = answer.ok().map(|a| a.status().as_u16());
    let time = shared.now();
    shared.lock().deliveries.push(Delivery {
        webhook_id: message.id.clone(),
        batch: name.to_owned(),
        event: event.to_owned(),
        uri: uri.to_owned(),
        attempt,
        status,
        time,
    });
    status
}
