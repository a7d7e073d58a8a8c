//! One delivery, from request to response.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State as Shared};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use jiff::{SignedDuration, Timestamp};
use tokio::time::timeout;
use tracing::debug;

use super::State;
use super::hint::{Hint, WriteError, Written};
use super::metrics::{ByScheme, Delivered, Outcome};
use super::replay::Admission;
use crate::callback::event::{Event, MAX_BODY};
use crate::callback::token::{Claims, Reason, Token, callback_url_of};
use crate::callback::{Accepted, Delivery, Keys, Policy, Refusal, Scheme, check_headers, verify};
use crate::crash;

/// What a sender is told to wait when something of ours is away.
const RETRY_SECONDS: i64 = 10;
/// A body that is likely to be in the buffer with the header, so that leaving it unread costs no connection.
const SMALL_BODY: u64 = 8 * 1024;
/// The pause before a conflicting write is tried again; doubled each time.
const CONFLICT_PAUSE: Duration = Duration::from_millis(20);

const ROUTE: &str = "/v1/callbacks/{namespace}/{name}/{token}";

pub(super) fn router(state: Arc<State>) -> Router {
    let routes = Router::new().route(ROUTE, post(callback));
    // a proxy may or may not cut off the external URL's own path: both forms arrive here
    let prefix = state.config.external_url.path().trim_matches('/').to_owned();
    let routes =
        if prefix.is_empty() { routes } else { routes.route(&format!("/{prefix}{ROUTE}"), post(callback)) };
    // without a body, like every other answer
    routes.method_not_allowed_fallback(|| async { StatusCode::METHOD_NOT_ALLOWED }).with_state(state)
}

/// How a delivery ends.
enum End {
    /// It was taken, or needs nothing: 200.
    Taken(&'static str),
    /// Not believed: 401, always the same.
    Refused(&'static str),
    /// It breaks a limit.
    Broken(StatusCode, &'static str),
    /// Something of ours is in the way: 503.
    Later(&'static str, SignedDuration),
}

impl End {
    fn later(outcome: &'static str) -> Self {
        Self::Later(outcome, SignedDuration::from_secs(RETRY_SECONDS))
    }

    fn outcome(&self) -> &'static str {
        match self {
            Self::Taken(outcome)
            | Self::Refused(outcome)
            | Self::Broken(_, outcome)
            | Self::Later(outcome, _) => outcome,
        }
    }
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.reason())
    }
}

impl IntoResponse for End {
    fn into_response(self) -> Response {
        match self {
            Self::Taken(_) => StatusCode::OK.into_response(),
            Self::Refused(_) => StatusCode::UNAUTHORIZED.into_response(),
            // what is left of the body is not worth reading
            Self::Broken(status, _) => {
                (status, [(CONNECTION, HeaderValue::from_static("close"))]).into_response()
            }
            Self::Later(_, wait) => {
                // rounded up; the gap in a job's budget is at most 10 s
                let seconds = (wait + SignedDuration::from_millis(999)).as_secs().max(1);
                (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, HeaderValue::from(seconds))]).into_response()
            }
        }
    }
}

async fn callback(
    Shared(state): Shared<Arc<State>>,
    path: Result<Path<(String, String, String)>, PathRejection>,
    request: Request,
) -> Response {
    let mut scheme = "none";
    // Whether the connection is closed after a refusal depends on how the request looks, not on whether its token was
    // right and its body therefore read.
    let close = announced_length(request.headers()).is_none_or(|length| length > SMALL_BODY);
    let end = match path {
        Ok(Path((namespace, name, token))) => {
            let end = match first_look(&state, &namespace, &name, &token, request.headers()) {
                Err(end) => end,
                Ok(claims) => {
                    let limit = state.config.limits.handler;
                    let delivery = handle(&state, &namespace, &name, &token, claims, request, &mut scheme);
                    // boxed, so that a flood of wrong tokens does not pay for the room that all the rest needs
                    timeout(limit, Box::pin(delivery)).await.unwrap_or_else(|_| End::later("timed_out"))
                }
            };
            if !matches!(end, End::Taken(_)) {
                // the reason for whoever asks why; never a URI, header or body, and of the token a hash
                debug!(reason = end.outcome(), scheme, token = %Token::log_prefix(&token), "callback not taken");
            }
            end
        }
        Err(_) => End::Refused(Reason::Malformed.reason()),
    };
    state.metrics.callbacks.get_or_create(&Delivered { outcome: end.outcome(), scheme }).inc();
    let refused = matches!(end, End::Refused(_));
    let mut response = end.into_response();
    if refused && close {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What a wrong token does not get past: nothing here waits, nothing is read or kept. The ring at hand decides: a key
/// that this receiver has not read yet signs nothing either, since it is read every minute and signs after five.
fn first_look(
    state: &State,
    namespace: &str,
    name: &str,
    token: &str,
    headers: &HeaderMap,
) -> Result<Claims, End> {
    // Answered by "100 Continue" only for a right token, it would tell which tokens are right.
    if headers.contains_key(EXPECT) {
        return Err(End::Broken(StatusCode::EXPECTATION_FAILED, "expect"));
    }
    if announced_length(headers).is_some_and(|length| length > MAX_BODY as u64) {
        return Err(End::Broken(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"));
    }
    let ring = state.ring.current().ok_or_else(|| End::later("no_keyring"))?;
    Token::verify(&ring, namespace, name, token).map_err(|reason| End::Refused(reason.reason()))
}

/// The checks that come after, cheapest first.
async fn handle(
    state: &State,
    namespace: &str,
    name: &str,
    token: &str,
    claims: Claims,
    request: Request,
    scheme: &mut &'static str,
) -> End {
    let (head, body) = request.into_parts();
    let now = (state.clock)();
    crash::at("receiver", "addressed");
    let policy = policy_for(state, namespace, name, token);
    let early = Delivery::from_headers(&head.headers, &[]).and_then(|d| check_headers(&d, &policy, now));
    if let Err(refusal) = early {
        return refusal.into();
    }
    let body = match read_body(body, state.config.limits.body).await {
        Ok(body) => body,
        Err(end) => return end,
    };
    let accepted = match check_signature(state, &head.headers, &body, &policy, now).await {
        Ok(accepted) => accepted,
        Err(end) => return end,
    };
    *scheme = accepted.scheme.as_str();
    crash::at("receiver", "verified");
    acknowledge(state, namespace, name, &claims, &accepted, &body).await
}

/// `Content-Length`, if there is one. hyper has refused contradictory ones before.
fn announced_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The configured policy, with this very URL as the audience of a JWT unless another was configured.
fn policy_for(state: &State, namespace: &str, name: &str, token: &str) -> Policy {
    let mut policy = state.policy.clone();
    if state.config.audience.is_none() {
        policy.audience = vec![callback_url_of(&state.config.external_url, namespace, name, token).into()];
    }
    policy
}

/// Whatever is wrong with it is the same answer as a wrong signature: only who has a right token gets here.
async fn read_body(body: Body, limit: Duration) -> Result<Bytes, End> {
    match timeout(limit, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(End::Refused("body_too_large")),
        Ok(Err(_)) => Err(End::Refused("body_broken")),
        Err(_) => Err(End::Refused("body_timeout")),
    }
}

/// Checks the signature with the keys at hand; if newer ones might help, once more with those.
async fn check_signature(
    state: &State,
    headers: &HeaderMap,
    body: &[u8],
    policy: &Policy,
    now: Timestamp,
) -> Result<Accepted, End> {
    let delivery = Delivery::from_headers(headers, body)?;
    let check = || -> Option<Result<Accepted, Refusal>> {
        let fetched = state.keys.current(now)?;
        let keys = Keys { public: Some(&fetched.set), secrets: &[], first: fetched.first() };
        let began = Instant::now();
        let verdict = verify(&delivery, &keys, policy, now);
        let scheme = verdict.as_ref().map_or("none", |a| a.scheme.as_str());
        let seconds = began.elapsed().as_secs_f64();
        state.metrics.verification.get_or_create(&ByScheme { scheme }).observe(seconds);
        if let Ok(Accepted { key: Some(key), .. }) = &verdict {
            fetched.matched(*key);
        }
        Some(verdict)
    };
    let first = check();
    let verdict = match first {
        Some(Err(refusal)) if !refusal.newer_keys_might_help() => Some(Err(refusal)),
        Some(Ok(accepted)) => Some(Ok(accepted)),
        None | Some(Err(_)) => {
            let before = state.keys.current(now);
            state.keys.refresh(now).await;
            let changed = match (&before, &state.keys.current(now)) {
                (Some(before), Some(after)) => !Arc::ptr_eq(before, after),
                (before, after) => before.is_none() && after.is_some(),
            };
            if changed { check() } else { first }
        }
    };
    Ok(verdict.ok_or_else(|| End::later("no_keys"))??)
}

/// Stores the hint, and only then says so.
async fn acknowledge(
    state: &State,
    namespace: &str,
    name: &str,
    claims: &Claims,
    accepted: &Accepted,
    body: &[u8],
) -> End {
    let received = (state.clock)();
    #[allow(clippy::cast_precision_loss)] // at most twelve digits
    state.metrics.age.observe(accepted.age as f64);
    let reservation = match state.window.admit(&claims.uid, claims.attempt, &accepted.replay_key, received) {
        Admission::Write(reservation) => reservation,
        Admission::Duplicate => return End::Taken("duplicate"),
        Admission::InFlight => return End::Later("in_flight", SignedDuration::from_secs(1)),
        Admission::Throttled(wait) => return End::Later("throttled", wait),
    };
    // a JWT says nothing about the body it comes with
    let event = if accepted.scheme == Scheme::Jwt { Event::read_unsigned(body) } else { Event::read(body) };
    if let Some(time) = event.time {
        state.metrics.event_to_receipt.observe(received.duration_since(time).as_secs_f64().max(0.0));
    }
    let hint = Hint {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: claims.uid.clone(),
        attempt: claims.attempt,
        webhook_id: accepted.hint_id.clone(),
        kind: event.kind,
        batch_id: event.batch_id,
        event_time: event.time,
        received,
    };
    let began = Instant::now();
    crash::at("receiver", "writing");
    let written = write(state, &hint).await;
    crash::at("receiver", "written");
    let outcome = match written {
        Ok(Written::Stored) => "stored",
        Ok(Written::Gone) => "job_gone",
        Err(WriteError::Conflict) => "conflict",
        Err(WriteError::Unavailable(why)) => why,
    };
    state.metrics.hint_writes.get_or_create(&Outcome { outcome }).inc();
    state.metrics.hint_write_seconds.observe(began.elapsed().as_secs_f64());
    debug!(outcome, namespace, name, attempt = hint.attempt, webhook_id = hint.webhook_id, "hint");
    match written {
        Ok(written) => {
            reservation.remember();
            crash::at("receiver", "remembered");
            End::Taken(if written == Written::Stored { "accepted" } else { "job_gone" })
        }
        Err(_) => End::later("write_failed"),
    }
}

/// Writes within the deadline. A conflict is tried again until then.
async fn write(state: &State, hint: &Hint) -> Result<Written, WriteError> {
    let attempts = async {
        let mut pause = CONFLICT_PAUSE;
        loop {
            match state.hints.write(hint).await {
                Err(WriteError::Conflict) => tokio::time::sleep(pause).await,
                other => return other,
            }
            pause *= 2;
        }
    };
    timeout(state.config.limits.write, attempts).await.unwrap_or(Err(WriteError::Unavailable("deadline")))
}
