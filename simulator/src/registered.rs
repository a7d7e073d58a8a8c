//! Webhooks that a project registers, told of every batch that names none of its own. `snake_case` only.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::api::Answer;
use crate::batches::{only, page_of, page_size};
use crate::error::ApiError;
use crate::state::{Caller, Inner, Shared, random_id};
use crate::webhooks;

/// Every event there is: there is none of a cancellation.
const EVENTS: [&str; 7] = [
    "batch.succeeded",
    "batch.failed",
    "batch.expired",
    "interaction.requires_action",
    "interaction.completed",
    "interaction.failed",
    "video.generated",
];
const STATES: [&str; 3] = ["enabled", "disabled", "disabled_due_to_failed_deliveries"];
const ENABLED: &str = STATES[0];

/// A registered webhook.
#[derive(Clone, Debug)]
pub(crate) struct WebhookRec {
    pub(crate) id: String,
    name: String,
    uri: String,
    state: String,
    events: Vec<String>,
    /// The last one is the newest.
    secrets: Vec<Secret>,
    created: Timestamp,
    updated: Timestamp,
    project: String,
}

#[derive(Clone, Debug)]
struct Secret {
    text: String,
    expires: Option<Timestamp>,
}

impl Secret {
    /// `whsec_` and the base64 of 32 ASCII characters.
    fn new() -> Self {
        Self { text: format!("whsec_{}", STANDARD.encode(random_id(32))), expires: None }
    }

    fn valid(&self, now: Timestamp) -> bool {
        self.expires.is_none_or(|t| t > now)
    }

    /// An entry of the header `webhook-signature`.
    fn sign(&self, text: &str) -> Option<String> {
        let key = STANDARD.decode(self.text.trim_start_matches("whsec_")).ok()?;
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).ok()?;
        mac.update(text.as_bytes());
        Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
    }
}

impl WebhookRec {
    /// What stands in `webhook-signature`: one entry for each secret that is still valid, the newest first.
    pub(crate) fn sign(&self, text: &str, now: Timestamp) -> String {
        let valid = self.secrets.iter().rev().filter(|s| s.valid(now));
        valid.filter_map(|s| s.sign(text)).collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn enabled(&self) -> bool {
        self.state == ENABLED
    }

    fn view(&self, now: Timestamp) -> Value {
        let secrets = self.secrets.iter().filter(|s| s.valid(now)).map(|s| {
            let mut secret = json!({"truncated_secret": format!("whsec_...{}", &s.text[s.text.len() - 4..])});
            if let Some(expires) = s.expires {
                secret["expire_time"] = json!(expires.to_string());
            }
            secret
        });
        json!({
            "id": self.id,
            "name": self.name,
            "uri": self.uri,
            "state": self.state,
            "subscribed_events": self.events,
            "signing_secrets": secrets.collect::<Vec<_>>(),
            "create_time": self.created.to_string(),
            "update_time": self.updated.to_string(),
        })
    }

    /// Takes over what a body gives: all of it, or nothing.
    fn change(&mut self, body: &Value, known: &[&str]) -> Result<(), ApiError> {
        if !body.is_object() {
            return Err(ApiError::invalid("Invalid JSON payload received."));
        }
        only(body, known, "")?;
        let text = |name: &str| body[name].as_str().map(ToOwned::to_owned);
        let mut changed = self.clone();
        changed.name = text("name").unwrap_or(changed.name);
        changed.uri = text("uri").unwrap_or(changed.uri);
        changed.state = text("state").unwrap_or(changed.state);
        if let Some(events) = body["subscribed_events"].as_array() {
            changed.events = events.iter().filter_map(|e| e.as_str().map(ToOwned::to_owned)).collect();
        }
        if changed.uri.parse::<url::Url>().is_err() {
            return Err(ApiError::invalid("uri: a URI is required"));
        }
        if !STATES.contains(&changed.state.as_str()) {
            return Err(ApiError::invalid(format!("state: must be one of {}", STATES.join(", "))));
        }
        if changed.events.is_empty() || changed.events.iter().any(|e| !EVENTS.contains(&e.as_str())) {
            return Err(ApiError::invalid(format!("subscribed_events: must be of {}", EVENTS.join(", "))));
        }
        *self = changed;
        Ok(())
    }
}

pub(crate) fn find<'a>(inner: &'a Inner, id: &str) -> Option<&'a WebhookRec> {
    inner.webhooks.iter().find(|w| w.id == id)
}

fn own<'a>(inner: &'a mut Inner, caller: &Caller, name: &str) -> Result<&'a mut WebhookRec, ApiError> {
    let id = name.trim_start_matches("webhooks/");
    let found = inner.webhooks.iter_mut().find(|w| w.id == id && w.project == caller.project);
    found.ok_or_else(ApiError::no_entity)
}

/// Ids of the webhooks that want to know of an event of a project, each with its URI.
pub(crate) fn subscribed(inner: &Inner, project: &str, event: &str) -> Vec<(String, String)> {
    let wants = |w: &&WebhookRec| w.project == project && w.enabled() && w.events.iter().any(|e| e == event);
    inner.webhooks.iter().filter(wants).map(|w| (w.id.clone(), w.uri.clone())).collect()
}

/// Its deliveries have failed for a day.
pub(crate) fn give_up(inner: &mut Inner, id: &str) {
    if let Some(webhook) = inner.webhooks.iter_mut().find(|w| w.id == id) {
        STATES[2].clone_into(&mut webhook.state);
    }
}

pub(crate) fn create(shared: &Shared, caller: &Caller, body: &Value) -> Result<Answer, ApiError> {
    let now = shared.now();
    let secret = Secret::new();
    let mut webhook = WebhookRec {
        id: random_id(36),
        name: String::new(),
        uri: String::new(),
        state: ENABLED.to_owned(),
        events: Vec::new(),
        secrets: vec![secret.clone()],
        created: now,
        updated: now,
        project: caller.project.clone(),
    };
    webhook.change(body, &["name", "uri", "subscribed_events"])?;
    let mut answer = webhook.view(now);
    answer["new_signing_secret"] = json!(secret.text); // now and never again
    shared.lock().webhooks.push(webhook);
    Ok(Answer::json(answer))
}

pub(crate) fn list(shared: &Shared, caller: &Caller, query: &[(String, String)]) -> Result<Answer, ApiError> {
    let (inner, now) = (shared.lock(), shared.now());
    let all: Vec<&WebhookRec> = inner.webhooks.iter().filter(|w| w.project == caller.project).collect();
    let (page, next) = page_of(&all, page_size(query, 50, 1000), inner.switches.empty_pages, query)?;
    let mut answer = json!({"webhooks": page.iter().map(|w| w.view(now)).collect::<Vec<_>>()});
    if let Some(next) = next {
        answer["next_page_token"] = json!(next);
    }
    Ok(Answer::json(answer))
}

pub(crate) fn get(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    Ok(Answer::json(own(&mut shared.lock(), caller, name)?.view(shared.now())))
}

/// Whatever the body gives is changed: the mask was ignored by the live service.
pub(crate) fn update(shared: &Shared, caller: &Caller, name: &str, body: &Value) -> Result<Answer, ApiError> {
    let (mut inner, now) = (shared.lock(), shared.now());
    let webhook = own(&mut inner, caller, name)?;
    webhook.change(body, &["name", "uri", "subscribed_events", "state"])?;
    webhook.updated = now;
    Ok(Answer::json(webhook.view(now)))
}

pub(crate) fn delete(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    let mut inner = shared.lock();
    let id = own(&mut inner, caller, name)?.id.clone();
    inner.webhooks.retain(|w| w.id != id);
    Ok(Answer::json(json!({})))
}

pub(crate) fn ping(shared: &Arc<Shared>, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    let webhook = own(&mut shared.lock(), caller, name)?.clone();
    webhooks::ping(shared, webhook.id, webhook.uri);
    Ok(Answer::json(json!({})))
}

pub(crate) fn rotate(shared: &Shared, caller: &Caller, name: &str, body: &Value) -> Result<Answer, ApiError> {
    only(body, &["revocation_behavior"], "")?;
    let (mut inner, now) = (shared.lock(), shared.now());
    let webhook = own(&mut inner, caller, name)?;
    let day = SignedDuration::from_hours(24);
    match body["revocation_behavior"].as_str() {
        None | Some("revoke_previous_secrets_after_h24") => {
            let end = now.checked_add(day).unwrap_or(Timestamp::MAX);
            for secret in &mut webhook.secrets {
                secret.expires = Some(secret.expires.map_or(end, |e| e.min(end)));
            }
        }
        Some("revoke_previous_secrets_immediately") => webhook.secrets.clear(),
        Some(other) => return Err(ApiError::invalid(format!("revocation_behavior: no such value: {other}"))),
    }
    let secret = Secret::new();
    let answer = json!({"secret": secret.text});
    webhook.secrets.push(secret);
    webhook.updated = now;
    Ok(Answer::json(answer))
}
