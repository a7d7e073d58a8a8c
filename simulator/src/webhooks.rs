//! Signed deliveries of webhooks, with retries and faults; and the keys they are signed with.
//!
//! Faults are asked for by a directive in a prompt (`[[sim:hook=duplicate]]`), for one batch, or by
//! [`Switches::hooks`](crate::Switches), for all:
//!
//! | fault | what happens |
//! | --- | --- |
//! | `lost` | nothing is ever delivered |
//! | `duplicate` | two deliveries of one event, with ids of their own |
//! | `late=SECONDS` | the first delivery comes so many simulated seconds late |
//! | `early` | it comes when the batch begins to run, and not again at its end |
//! | `reordered` | it comes after the next event of another batch |
//! | `forged` | before it comes one that says `batch.failed`, signed with a key of somebody else |
//! | `old=SECONDS` | its timestamp, and those of its retries, lie so far back |
//! | `frozen` | retries bear the timestamp and the signature of the first delivery |
//! | `two-signatures` | it bears a signature of a key that was rolled away beside the good one |
//! | `jwt` | it bears an RS256 JWT instead of a `v1a` signature, as Google's guide describes |

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use serde_json::{Value, json};

use crate::registered::{self, WebhookRec};
use crate::state::{Delivery, Outcome, Shared, State, hash};
use crate::work::Plan;

/// A delivery that found nobody to overtake it is made after so many simulated seconds all the same.
const HELD_SECONDS: f64 = 600.0;
/// How long a JWT is valid.
const JWT_SECONDS: i64 = 3600;

/// Three Ed25519 keys without `kid`, of which the last signs; and an RSA key, made when it is first needed.
pub(crate) struct Signing {
    keys: Vec<SigningKey>,
    rolled_away: SigningKey,
    rsa: OnceLock<Option<KeyPair>>,
}

fn new_key() -> SigningKey {
    SigningKey::from_bytes(&rand::random())
}

impl Signing {
    pub(crate) fn new() -> Self {
        Self { keys: (0..3).map(|_| new_key()).collect(), rolled_away: new_key(), rsa: OnceLock::new() }
    }

    pub(crate) fn roll(&mut self) {
        self.rolled_away = self.keys.remove(0);
        self.keys.push(new_key());
        self.rsa = OnceLock::new();
    }

    /// The public keys; the RSA key among them once something was signed with it, or should be.
    pub(crate) fn jwks(&self, with_rsa: bool) -> Value {
        let key = |k: &SigningKey| json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(k.verifying_key().as_bytes())});
        let mut keys: Vec<Value> = self.keys.iter().map(key).collect();
        if with_rsa || self.rsa.get().is_some() {
            keys.extend(self.rsa().map(|rsa| {
                let public = rsa.public_key();
                let number = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
                json!({"kty": "RSA", "alg": "RS256", "use": "sig", "kid": kid(rsa),
                    "n": number(public.modulus().big_endian_without_leading_zero()),
                    "e": number(public.exponent().big_endian_without_leading_zero())})
            }));
        }
        json!({ "keys": keys })
    }

    fn rsa(&self) -> Option<&KeyPair> {
        self.rsa.get_or_init(|| KeyPair::generate(KeySize::Rsa2048).ok()).as_ref()
    }

    fn v1a(key: &SigningKey, id: &str, timestamp: i64, body: &str) -> String {
        let signature = key.sign(format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1a,{}", STANDARD.encode(signature.to_bytes()))
    }

    fn jwt(&self, audience: &str, now: i64) -> Option<String> {
        let rsa = self.rsa()?;
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = part(json!({"alg": "RS256", "typ": "JWT", "kid": kid(rsa)}));
        let claims = part(
            json!({"iss": "https://generativelanguage.googleapis.com", "aud": audience, "iat": now, "exp": now + JWT_SECONDS}),
        );
        let text = format!("{header}.{claims}");
        let mut signature = vec![0; rsa.public_modulus_len()];
        rsa.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), text.as_bytes(), &mut signature).ok()?;
        Some(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// The header for a message.
    fn sign(&self, faults: &Faults, message: &Message, uri: &str) -> String {
        let Message { id, body, timestamp, .. } = message;
        if faults.has("jwt") {
            return self.jwt(uri, *timestamp).unwrap_or_default();
        }
        let Some(key) = self.keys.last() else { return String::new() };
        let good = Self::v1a(key, id, *timestamp, body);
        if faults.has("two-signatures") {
            return format!("{} {good}", Self::v1a(&self.rolled_away, id, *timestamp, body));
        }
        good
    }
}

fn kid(rsa: &KeyPair) -> String {
    let der: Vec<u8> = rsa
        .public_key()
        .as_der()
        .map(|der| {
            let der: aws_lc_rs::encoding::PublicKeyX509Der<'_> = der;
            der.as_ref().to_vec()
        })
        .unwrap_or_default();
    hash(&der)[..16].to_owned()
}

/// What shall go wrong with a delivery.
#[derive(Clone, Debug, Default)]
struct Faults(Vec<String>);

impl Faults {
    fn has(&self, wanted: &str) -> bool {
        self.0.iter().any(|f| f.split('=').next() == Some(wanted))
    }

    fn number(&self, wanted: &str) -> Option<f64> {
        self.0.iter().find_map(|f| f.strip_prefix(wanted)?.strip_prefix('=')?.parse().ok())
    }
}

/// A delivery, which may wait for another one to overtake it.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    id: u64,
    name: String,
    uri: String,
    /// The registered webhook that it is for, by id; `None`: the batch itself named the URI.
    webhook: Option<String>,
    event: &'static str,
    faults: Faults,
}

/// Tells everyone who asked to be told of the end of a batch.
pub(crate) fn announce(shared: &Arc<Shared>, name: &str, outcome: Outcome, plan: &Plan) {
    tell(shared, name, outcome, plan, false);
}

/// The same before the end, for those who asked for `early`.
pub(crate) fn announce_early(shared: &Arc<Shared>, name: &str, plan: &Plan) {
    tell(shared, name, plan.outcome.unwrap_or(Outcome::Succeeded), plan, true);
}

fn tell(shared: &Arc<Shared>, name: &str, outcome: Outcome, plan: &Plan, early: bool) {
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
    let mut faults = Faults(plan.hook.iter().chain(&switches.hooks).cloned().collect());
    let lost = plan.no_event || switches.lose_events || faults.has("lost");
    if lost || (batch.embed && !switches.embed_events) || faults.has("early") != early {
        return;
    }
    if switches.frozen_timestamps {
        faults.0.push("frozen".to_owned());
    }
    let mut recipients: Vec<_> = batch.uris.iter().map(|uri| (None, uri.clone())).collect();
    if recipients.is_empty() {
        let project = batch.project.clone();
        let found = registered::subscribed(&inner, &project, event);
        recipients.extend(found.into_iter().map(|(id, uri)| (Some(id), uri)));
    }
    for (webhook, uri) in recipients {
        let (name, faults) = (name.to_owned(), faults.clone());
        let held = Held { id: rand::random(), name, uri, webhook, event, faults: faults.clone() };
        for _ in 0..if faults.has("duplicate") { 2 } else { 1 } {
            let overtaken =
                if faults.has("reordered") { inner.held.replace(held.clone()) } else { inner.held.take() };
            let now = if faults.has("reordered") { None } else { Some(held.clone()) };
            let shared = Arc::clone(shared);
            let waiting = held.id;
            tokio::spawn(async move {
                for delivery in now.into_iter().chain(overtaken) {
                    deliver(&shared, &delivery).await;
                }
                release(&shared, waiting).await;
            });
        }
    }
}

/// Nobody overtook it: it is delivered late.
async fn release(shared: &Arc<Shared>, id: u64) {
    tokio::time::sleep(shared.pace().seconds(HELD_SECONDS)).await;
    let held = {
        let mut inner = shared.lock();
        if inner.held.as_ref().is_some_and(|h| h.id == id) { inner.held.take() } else { None }
    };
    if let Some(held) = held {
        deliver(shared, &held).await;
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
    let mut body = json!({"type": event, "version": "v1", "timestamp": time, "data": data});
    if let Some(metadata) = &batch.user_metadata {
        body["user_metadata"] = metadata.clone();
    }
    let (id, body) = (message_id(), body.to_string());
    Some(Message { id, body, timestamp: now.as_second(), signature: String::new() })
}

/// `msg_` and a UUID.
fn message_id() -> String {
    let bits: u128 = rand::random();
    // version 4, variant 1
    let bits = bits & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    format!("msg_{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// A registered webhook signs with its own secrets, Google for all others.
fn sign(shared: &Shared, delivery: &Held, message: &Message) -> String {
    let now = shared.now();
    let inner = shared.lock();
    match &delivery.webhook {
        None => inner.signing.sign(&delivery.faults, message, &delivery.uri),
        Some(id) => {
            let text = format!("{}.{}.{}", message.id, message.timestamp, message.body);
            registered::find(&inner, id).map(|w| w.sign(&text, now)).unwrap_or_default()
        }
    }
}

/// Tries whether a registered webhook is reached.
pub(crate) fn ping(shared: &Arc<Shared>, id: String, uri: String) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let now = shared.now();
        let body = json!({"type": "ping", "version": "v1", "timestamp": now.to_string(), "data": {}});
        let mut message = Message {
            id: message_id(),
            body: body.to_string(),
            timestamp: now.as_second(),
            signature: String::new(),
        };
        let (name, webhook, faults) = (String::new(), Some(id), Faults::default());
        let delivery = Held { id: 0, name, uri, webhook, event: "ping", faults };
        message.signature = sign(&shared, &delivery, &message);
        post(&shared, "", &delivery.uri, delivery.event, &message, 1).await;
    });
}

/// At least once: retried for 24 hours, 10 s × 2 up to an hour, with the same id. A registered webhook that
/// takes nothing all that time is disabled.
async fn deliver(shared: &Arc<Shared>, delivery: &Held) {
    let Held { name, uri, webhook, event, faults, .. } = delivery;
    if let Some(late) = faults.number("late") {
        tokio::time::sleep(shared.pace().seconds(late)).await;
    }
    if faults.has("forged") {
        forge(shared, name, uri).await;
    }
    let Some(mut message) = message(shared, name, event) else { return };
    #[expect(clippy::cast_possible_truncation, reason = "a float becomes the nearest integer")]
    let old = faults.number("old").unwrap_or(0.0) as i64;
    let mut pause = Duration::from_secs(10);
    let mut passed = Duration::ZERO;
    for attempt in 1.. {
        if attempt == 1 || !faults.has("frozen") {
            message.timestamp = shared.now().as_second() - old;
            message.signature = sign(shared, delivery, &message);
        }
        let status = post(shared, name, uri, event, &message, attempt).await;
        if status.is_some_and(|s| (200..300).contains(&s)) {
            return;
        }
        if passed > Duration::from_hours(24) {
            if let Some(id) = webhook {
                registered::give_up(&mut shared.lock(), id);
            }
            return;
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(shared.pace().real(pause)) => {}
        }
        let wanted = |id| registered::find(&shared.lock(), id).is_some_and(WebhookRec::enabled);
        if !webhook.as_deref().is_none_or(wanted) {
            return;
        }
        passed += pause;
        pause = (pause * 2).min(Duration::from_hours(1));
    }
}

/// What somebody who knows the URL, but has no key, could send. Once: who forges does not retry.
async fn forge(shared: &Arc<Shared>, name: &str, uri: &str) {
    let Some(mut message) = message(shared, name, "batch.failed") else { return };
    message.signature = Signing::v1a(&new_key(), &message.id, message.timestamp, &message.body);
    post(shared, name, uri, "forged", &message, 1).await;
}

/// One delivery of an event that need not have happened.
pub(crate) async fn deliver_once(shared: &Arc<Shared>, name: &str, uri: &str, event: &str) -> Option<u16> {
    let mut message = message(shared, name, event)?;
    message.signature = shared.lock().signing.sign(&Faults::default(), &message, uri);
    post(shared, name, uri, event, &message, 1).await
}

/// Any body, signed.
pub(crate) async fn post_signed(shared: &Arc<Shared>, uri: &str, id: &str, body: &str) -> Option<u16> {
    let timestamp = shared.now().as_second();
    let mut message =
        Message { id: id.to_owned(), body: body.to_owned(), timestamp, signature: String::new() };
    message.signature = shared.lock().signing.sign(&Faults::default(), &message, uri);
    post(shared, "", uri, "by hand", &message, 1).await
}

async fn post(
    shared: &Arc<Shared>,
    name: &str,
    uri: &str,
    event: &str,
    message: &Message,
    attempt: u32,
) -> Option<u16> {
    let connection = if shared.lock().switches.close_connections { "close" } else { "keep-alive" };
    let answer = shared
        .http
        .post(uri)
        .header("connection", connection)
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
