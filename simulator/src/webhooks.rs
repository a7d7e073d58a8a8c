//! Signed deliveries of webhooks, with retries; and the keys they are signed with.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};

use crate::registered;
use crate::state::{Delivery, Outcome, Shared};
use crate::work::Plan;

/// A delivery is given up after so long.
const LONGEST_TRY: Duration = Duration::from_hours(24);
/// The key of JWTs. It protects nothing, and making one takes seconds without optimisation.
const RSA_PEM: &[u8] = include_bytes!("rsa2048.pem");
const RSA_N: &str = include_str!("rsa2048.n");
const RSA_KID: &str = "simulated-rsa";

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

    /// What `/.well-known/jwks.json` says; with the key of JWTs only while they are in use.
    pub(crate) fn jwks(&self, jwt: bool) -> Value {
        let key = |k: &SigningKey| json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(k.verifying_key().as_bytes())});
        let rsa = json!({"kty": "RSA", "alg": "RS256", "use": "sig", "kid": RSA_KID, "n": RSA_N.trim(), "e": "AQAB"});
        json!({"keys": self.keys.iter().map(key).chain(jwt.then_some(rsa)).collect::<Vec<_>>()})
    }

    fn sign(&self, text: &str) -> String {
        self.keys.last().map(|key| v1a(key, text)).unwrap_or_default()
    }
}

fn v1a(key: &SigningKey, text: &str) -> String {
    format!("v1a,{}", STANDARD.encode(key.sign(text.as_bytes()).to_bytes()))
}

/// As Google's guide has it: for an audience, and for nothing in the delivery.
fn jwt(audience: &str, now: i64) -> String {
    let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
    let header = json!({"alg": "RS256", "typ": "JWT", "kid": RSA_KID});
    let claims = json!({"iss": "https://generativelanguage.googleapis.com", "aud": audience,
        "iat": now, "exp": now + 3600});
    let text = format!("{}.{}", part(&header), part(&claims));
    let signature = EncodingKey::from_rsa_pem(RSA_PEM)
        .and_then(|key| crypto::sign(text.as_bytes(), &key, Algorithm::RS256))
        .unwrap_or_default();
    format!("{text}.{signature}")
}

/// `msg_` and a UUID.
fn message_id() -> String {
    let bits: u128 = rand::random();
    // version 4, variant 1
    let bits = bits & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    format!("msg_{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Who is told, which decides how it is signed.
#[derive(Clone, Debug)]
enum Recipient {
    /// Named by the batch.
    Dynamic,
    /// A registered webhook, by id.
    Registered(String),
}

/// What directives of a batch make of its deliveries.
#[derive(Clone, Copy, Debug, Default)]
struct Manner {
    /// Repeated as it was at first.
    frozen: bool,
    /// Signed with a key that is nobody's.
    forged: bool,
    /// Stamped so many seconds before its time.
    old: i64,
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
    if plan.no_event || plan.hook("lost") || switches.lose_events || (batch.embed && !switches.embed_events) {
        return;
    }
    let mut recipients: Vec<_> = batch.uris.iter().map(|uri| (Recipient::Dynamic, uri.clone())).collect();
    if recipients.is_empty() {
        let project = batch.project.clone();
        let found = registered::subscribed(&inner, &project, event);
        recipients.extend(found.into_iter().map(|(id, uri)| (Recipient::Registered(id), uri)));
    }
    drop(inner);
    let late: f64 = plan.hook_value("late").unwrap_or(0.0);
    let manner = Manner {
        frozen: switches.frozen_timestamps || plan.hook("frozen"),
        forged: plan.hook("forged"),
        old: plan.hook_value("old").unwrap_or(0),
    };
    for (recipient, uri) in recipients {
        for _ in 0..if plan.hook("duplicate") { 2 } else { 1 } {
            let (shared, name, uri, recipient) =
                (Arc::clone(shared), name.to_owned(), uri.clone(), recipient.clone());
            tokio::spawn(async move {
                tokio::time::sleep(shared.pace().seconds(late)).await;
                if let Some(message) = Message::of_batch(&shared, &name, recipient, &uri, event, manner) {
                    deliver(&shared, message).await;
                }
            });
        }
    }
}

/// Tries whether a registered webhook is reached.
pub(crate) fn ping(shared: &Arc<Shared>, id: String, uri: String) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let time = shared.now().to_string();
        let body = json!({"type": "ping", "version": "v1", "timestamp": time, "data": {}}).to_string();
        let message =
            Message::new(&shared, "", Recipient::Registered(id), &uri, "ping", body, Manner::default());
        post(&shared, &message, 1).await;
    });
}

struct Message {
    batch: String,
    event: String,
    recipient: Recipient,
    uri: String,
    manner: Manner,
    id: String,
    body: String,
    timestamp: i64,
    signature: String,
}

impl Message {
    fn new(
        shared: &Shared,
        batch: &str,
        recipient: Recipient,
        uri: &str,
        event: &str,
        body: String,
        manner: Manner,
    ) -> Self {
        let mut message = Self {
            batch: batch.to_owned(),
            event: event.to_owned(),
            recipient,
            uri: uri.to_owned(),
            manner,
            id: message_id(),
            body,
            timestamp: 0,
            signature: String::new(),
        };
        message.stamp(shared);
        message
    }

    fn of_batch(
        shared: &Shared,
        name: &str,
        recipient: Recipient,
        uri: &str,
        event: &str,
        manner: Manner,
    ) -> Option<Self> {
        let now = shared.now();
        let mut inner = shared.lock();
        let prefix = inner.switches.event_id_with_prefix;
        let batch = inner.batch(name)?;
        let id = if prefix { format!("batches/{}", batch.id) } else { batch.id.clone() };
        let mut data = json!({"id": id});
        match event {
            "batch.succeeded" if batch.file.is_some() => {
                data["output_file_uri"] = json!(format!("gs://simulated-output/batch-{}.jsonl", batch.id));
            }
            "batch.failed" => {
                data["error_code"] = json!(13);
                data["error_message"] = json!("Batch failed without error.");
            }
            _ => {}
        }
        let time = batch.ended.unwrap_or(now).to_string();
        let mut body = json!({"type": event, "version": "v1", "timestamp": time, "data": data});
        if let Some(metadata) = &batch.user_metadata {
            body["user_metadata"] = metadata.clone();
        }
        drop(inner);
        Some(Self::new(shared, name, recipient, uri, event, body.to_string(), manner))
    }

    /// The time of now, and a signature of it.
    fn stamp(&mut self, shared: &Shared) {
        let now = shared.now();
        self.timestamp = now.as_second().saturating_sub(self.manner.old);
        let text = format!("{}.{}.{}", self.id, self.timestamp, self.body);
        let inner = shared.lock();
        self.signature = match &self.recipient {
            Recipient::Dynamic if self.manner.forged => v1a(&SigningKey::from_bytes(&rand::random()), &text),
            Recipient::Dynamic if inner.switches.jwt_signatures => jwt(&self.uri, self.timestamp),
            Recipient::Dynamic => inner.signing.sign(&text),
            Recipient::Registered(id) => {
                let webhook = inner.webhooks.iter().find(|w| w.id == *id);
                webhook.map(|w| w.sign(&text, now)).unwrap_or_default()
            }
        };
    }

    /// Whether somebody still wants it.
    fn wanted(&self, shared: &Shared) -> bool {
        match &self.recipient {
            Recipient::Dynamic => true,
            Recipient::Registered(id) => shared.lock().webhooks.iter().any(|w| w.id == *id && w.enabled()),
        }
    }
}

/// At least once: retried for 24 hours, 10 s × 2 up to an hour, with the same id.
async fn deliver(shared: &Arc<Shared>, mut message: Message) {
    let mut pause = Duration::from_secs(10);
    let mut passed = Duration::ZERO;
    for attempt in 1.. {
        let status = post(shared, &message, attempt).await;
        if status.is_some_and(|s| (200..300).contains(&s)) {
            return;
        }
        if passed > LONGEST_TRY {
            if let Recipient::Registered(id) = &message.recipient {
                registered::give_up(&mut shared.lock(), id);
            }
            return;
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(shared.pace().real(pause)) => {}
        }
        if !message.wanted(shared) {
            return;
        }
        passed += pause;
        pause = (pause * 2).min(Duration::from_hours(1));
        if !message.manner.frozen {
            message.stamp(shared);
        }
    }
}

/// One delivery of an event that need not have happened.
pub(crate) async fn deliver_once(shared: &Arc<Shared>, name: &str, uri: &str, event: &str) -> Option<u16> {
    let message = Message::of_batch(shared, name, Recipient::Dynamic, uri, event, Manner::default())?;
    post(shared, &message, 1).await
}

async fn post(shared: &Arc<Shared>, message: &Message, attempt: u32) -> Option<u16> {
    let answer = shared
        .http
        .post(&message.uri)
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
        batch: message.batch.clone(),
        event: message.event.clone(),
        uri: message.uri.clone(),
        attempt,
        status,
        time,
    });
    status
}
