//! The receiver against fakes: through the router, and through real sockets where the sockets are the point.

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt as _;
use jiff::{SignedDuration, Timestamp};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use url::Url;

use super::hint::{Hint, HintSink, KubeHintSink, WriteError, Written};
use super::keys::{Document, FetchError, HttpJwks, JwksSource};
use super::metrics::Metrics;
use super::ring::{RingReadError, RingSource};
use super::server::Limits;
use super::tls::Tls;
use super::{Config, Receiver, SetupError};
use crate::callback::event::EventType;
use crate::callback::jwks::JwksError;
use crate::callback::keyring::KeyRing;
use crate::callback::testing::{jwk, jwks, rsa_jwk, sign_jwt, sign_v1a};
use crate::callback::token::{JobRef, Token};

const UID: &str = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";
const START: i64 = 1_800_000_000;
const BODY: &[u8] = br#"{"type":"batch.succeeded","version":"v1","timestamp":"2027-01-15T07:59:00Z","data":{"id":"batches/b1"}}"#;

#[derive(Default)]
struct Sink {
    hints: Mutex<Vec<Hint>>,
    script: Mutex<Vec<Result<Written, WriteError>>>,
    delay: Mutex<Duration>,
    calls: AtomicUsize,
}

impl Sink {
    /// The next writes end like this; those after them succeed.
    fn next(&self, outcomes: &[Result<Written, WriteError>]) {
        *self.script.lock().unwrap() = outcomes.iter().rev().copied().collect();
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn last(&self) -> Hint {
        self.hints.lock().unwrap().last().unwrap().clone()
    }
}

impl HintSink for Sink {
    fn write<'a>(&'a self, hint: &'a Hint) -> BoxFuture<'a, Result<Written, WriteError>> {
        Box::pin(async move {
            self.calls.fetch_add(1, Ordering::SeqCst);
            let delay = *self.delay.lock().unwrap();
            tokio::time::sleep(delay).await;
            let outcome = self.script.lock().unwrap().pop().unwrap_or(Ok(Written::Stored));
            if outcome == Ok(Written::Stored) {
                self.hints.lock().unwrap().push(hint.clone());
            }
            outcome
        })
    }
}

struct FakeRing {
    ring: Mutex<Result<KeyRing, RingReadError>>,
    reads: AtomicUsize,
}

impl RingSource for FakeRing {
    fn read(&self) -> BoxFuture<'_, Result<KeyRing, RingReadError>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let ring = self.ring.lock().unwrap().clone();
        Box::pin(async move { ring })
    }
}

/// A document and its `max-age`.
type Answer = Result<(Vec<u8>, Option<i64>), FetchError>;

struct FakeJwks {
    answer: Mutex<Answer>,
    fetches: AtomicUsize,
}

impl JwksSource for FakeJwks {
    fn fetch(&self) -> BoxFuture<'_, Result<Document, FetchError>> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let answer = self.answer.lock().unwrap().clone();
        Box::pin(async move {
            tokio::task::yield_now().await;
            answer.map(|(bytes, age)| Document { bytes, max_age: age.map(SignedDuration::from_secs) })
        })
    }
}

struct World {
    receiver: Receiver,
    sink: Arc<Sink>,
    ring: Arc<FakeRing>,
    jwks: Arc<FakeJwks>,
    clock: Arc<AtomicI64>,
    registry: Registry,
}

/// A receiver that has read its ring and fetched its keys (seeds 1, 2, 3 and an RSA key).
async fn world() -> World {
    let world = cold_world(|_| ());
    world.upkeep().await;
    world
}

fn cold_world(configure: impl FnOnce(&mut Config)) -> World {
    let clock = Arc::new(AtomicI64::new(START));
    let seconds = Arc::clone(&clock);
    let sink = Arc::new(Sink::default());
    let ring = KeyRing::generate("cluster-1", at(0)).unwrap();
    let ring = Arc::new(FakeRing { ring: Mutex::new(Ok(ring)), reads: AtomicUsize::new(0) });
    let keys = jwks(&[jwk(1), jwk(2), jwk(3), rsa_jwk("a")]);
    let jwks = Arc::new(FakeJwks { answer: Mutex::new(Ok((keys, None))), fetches: AtomicUsize::new(0) });
    let mut registry = Registry::with_prefix("gemini_batch");
    let mut config = Config::new(Url::parse("https://h.example/gbo/").unwrap());
    configure(&mut config);
    let receiver = Receiver::new(
        config,
        ring.clone(),
        jwks.clone(),
        sink.clone(),
        Arc::new(move || Timestamp::from_second(seconds.load(Ordering::SeqCst)).unwrap()),
        Metrics::register(&mut registry),
    )
    .unwrap();
    World { receiver, sink, ring, jwks, clock, registry }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(START + seconds).unwrap()
}

impl World {
    async fn upkeep(&self) {
        let now = self.now();
        self.receiver.state.ring.keep_fresh(now).await;
        self.receiver.state.keys.keep_fresh(now).await;
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_second(self.clock.load(Ordering::SeqCst)).unwrap()
    }

    fn pass(&self, seconds: i64) {
        self.clock.fetch_add(seconds, Ordering::SeqCst);
    }

    fn token(&self) -> String {
        let ring = self.ring.ring.lock().unwrap().clone().unwrap();
        let job = JobRef { namespace: "team-a", name: "nightly", uid: UID, attempt: 2 };
        Token::mint(&ring, self.now(), &job)
    }

    fn path(&self) -> String {
        format!("/v1/callbacks/team-a/nightly/{}", self.token())
    }

    fn request(&self, id: &str, seed: u8, body: &[u8]) -> Request<Body> {
        let timestamp = self.now().as_second().to_string();
        let signature = sign_v1a(seed, id, &timestamp, body);
        post(&self.path(), id, &timestamp, &signature, body)
    }

    async fn send(&self, request: Request<Body>) -> Response {
        self.receiver.router().oneshot(request).await.unwrap()
    }

    async fn deliver(&self, id: &str) -> StatusCode {
        self.send(self.request(id, 1, BODY)).await.status()
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

fn post(path: &str, id: &str, timestamp: &str, signature: &str, body: &[u8]) -> Request<Body> {
    Request::post(path)
        .header("webhook-id", id)
        .header("webhook-timestamp", timestamp)
        .header("webhook-signature", signature)
        .header("content-type", "application/json")
        .body(Body::from(body.to_vec()))
        .unwrap()
}

async fn shape(response: Response) -> (StatusCode, HeaderMap, Vec<u8>) {
    let (head, body) = response.into_parts();
    (head.status, head.headers, body.collect().await.unwrap().to_bytes().to_vec())
}

const UNAVAILABLE: Result<Written, WriteError> = Err(WriteError::Unavailable("server_error"));

#[tokio::test]
async fn a_good_delivery_becomes_a_hint() {
    let world = world().await;
    let (status, headers, body) = shape(world.send(world.request("msg_1", 2, BODY)).await).await;
    assert_eq!((status, body.len()), (StatusCode::OK, 0));
    assert!(!headers.contains_key("retry-after"));
    let hint = world.sink.last();
    assert_eq!(
        hint,
        Hint {
            namespace: "team-a".into(),
            name: "nightly".into(),
            uid: UID.into(),
            attempt: 2,
            webhook_id: "msg_1".into(),
            kind: EventType::Succeeded,
            batch_id: Some("b1".into()),
            event_time: Some("2027-01-15T07:59:00Z".parse().unwrap()),
            received: at(0),
        }
    );
    assert_eq!(
        hint.to_json(),
        json!({
            "webhookId": "msg_1", "type": "batch.succeeded", "attempt": 2, "batchId": "b1",
            "eventTime": "2027-01-15T07:59:00.000000Z", "receivedTime": "2027-01-15T08:00:00.000000Z",
        })
    );
    let bare = Hint { batch_id: None, event_time: None, ..hint };
    assert_eq!(
        bare.to_json(),
        json!({"webhookId": "msg_1", "type": "batch.succeeded", "attempt": 2, "receivedTime": "2027-01-15T08:00:00.000000Z"})
    );
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_still_a_hint() {
    let world = world().await;
    for (n, body) in [&b""[..], b"{", &[0xff, 0xfe], b"\x1f\x8b\x08"].into_iter().enumerate() {
        let mut request = world.request(&format!("msg_{n}"), 1, body);
        request.headers_mut().insert("content-encoding", "gzip".parse().unwrap());
        assert_eq!(world.send(request).await.status(), StatusCode::OK);
        let hint = world.sink.last();
        assert_eq!((hint.kind, hint.batch_id, hint.event_time), (EventType::Unknown, None, None));
    }
}

#[tokio::test]
async fn the_external_urls_path_may_be_there_or_cut_off() {
    let world = world().await;
    let mut request = world.request("msg_1", 1, BODY);
    *request.uri_mut() = format!("/gbo{}", world.path()).parse().unwrap();
    assert_eq!(world.send(request).await.status(), StatusCode::OK);
    assert_eq!(world.deliver("msg_2").await, StatusCode::OK);
}

#[tokio::test]
async fn other_paths_and_methods() {
    let world = world().await;
    let path = world.path();
    for (method, path, expected) in [
        ("GET", path.as_str(), StatusCode::METHOD_NOT_ALLOWED),
        ("PUT", path.as_str(), StatusCode::METHOD_NOT_ALLOWED),
        ("POST", "/", StatusCode::NOT_FOUND),
        ("POST", "/v1/callbacks", StatusCode::NOT_FOUND),
        ("POST", "/v1/callbacks/a/b", StatusCode::NOT_FOUND),
        ("POST", "/v1/callbacks/a/b/c/d", StatusCode::NOT_FOUND),
        ("GET", "/healthz", StatusCode::NOT_FOUND),
        ("POST", "/v1/callbacks/a/b/c", StatusCode::UNAUTHORIZED),
        ("POST", "/v1/callbacks/%ff/b/c", StatusCode::UNAUTHORIZED),
        ("POST", "/v1/callbacks/../../x", StatusCode::UNAUTHORIZED),
    ] {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let (status, _, body) = shape(world.send(request).await).await;
        assert_eq!((status, body.len()), (expected, 0), "{method} {path}");
    }
    assert_eq!(world.sink.calls(), 0);
}

#[tokio::test]
async fn all_authentication_failures_are_the_same_answer() {
    let world = world().await;
    let now = START.to_string();
    let path = world.path();
    let signature = sign_v1a(1, "msg_1", &now, BODY);
    let good = || post(&path, "msg_1", &now, &signature, BODY);
    let with = |name: &'static str, value: &str| {
        let mut request = good();
        request.headers_mut().insert(name, value.parse().unwrap());
        request
    };
    let at_path = |path: &str| post(path, "msg_1", &now, &signature, BODY);
    let mut flipped = path.clone().into_bytes();
    let last = flipped.len() - 3;
    flipped[last] = if flipped[last] == b'A' { b'B' } else { b'A' };
    let flipped = String::from_utf8(flipped).unwrap();
    let mut twice = good();
    twice.headers_mut().append("webhook-id", "msg_1".parse().unwrap());
    let mut missing = good();
    missing.headers_mut().remove("webhook-signature");
    let old = (START - 26 * 3600 - 1).to_string();
    let failures = vec![
        ("a short token", at_path("/v1/callbacks/team-a/nightly/x")),
        ("a flipped bit", at_path(&flipped)),
        ("another job's token", at_path(&path.replace("nightly", "weekly"))),
        ("another namespace", at_path(&path.replace("team-a", "team-b"))),
        ("a header twice", twice),
        ("no signature", missing),
        ("an odd id", with("webhook-id", "a.b")),
        ("an odd timestamp", with("webhook-timestamp", "+1")),
        ("too old", post(&path, "msg_1", &old, &sign_v1a(1, "msg_1", &old, BODY), BODY)),
        ("another id", with("webhook-id", "msg_2")),
        ("another body", post(&path, "msg_1", &now, &signature, b"{}")),
        ("a foreign key", post(&path, "msg_1", &now, &sign_v1a(9, "msg_1", &now, BODY), BODY)),
        ("an unknown scheme", with("webhook-signature", "v2,abc")),
        ("an HMAC", with("webhook-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")),
        ("a JWT for another", with("webhook-signature", &jwt("https://other.example", START + 60))),
        ("an old JWT", with("webhook-signature", &jwt(&format!("https://h.example/gbo{path}"), START - 600))),
    ];
    let mut first = None;
    for (what, request) in failures {
        let answer = shape(world.send(request).await).await;
        assert_eq!(answer.0, StatusCode::UNAUTHORIZED, "{what}");
        assert_eq!(answer.2, b"", "{what}");
        assert_eq!(*first.get_or_insert_with(|| answer.clone()), answer, "{what}");
    }
    assert_eq!(world.sink.calls(), 0);
    assert_eq!(world.send(good()).await.status(), StatusCode::OK, "and the good one is good");
}

fn jwt(audience: &str, expires: i64) -> String {
    sign_jwt(&json!({"alg": "RS256", "kid": "a"}), &json!({"aud": audience, "exp": expires}))
}

#[tokio::test]
async fn a_jwt_binds_neither_body_nor_id() {
    let world = world().await;
    let path = world.path();
    let token = jwt(&format!("https://h.example/gbo{path}"), START + 600);
    let now = START.to_string();
    assert_eq!(world.send(post(&path, "msg_1", &now, &token, BODY)).await.status(), StatusCode::OK);
    let hint = world.sink.last();
    assert_eq!((hint.kind, &hint.batch_id, hint.event_time), (EventType::Succeeded, &None, None));
    assert!(hint.webhook_id.starts_with("jwt-"));
    assert_eq!(world.send(post(&path, "msg_2", &now, &token, b"{}")).await.status(), StatusCode::OK);
    assert_eq!(world.sink.calls(), 1, "another id and body, but the same JWT");
}

#[tokio::test]
async fn the_audience_can_be_configured() {
    let world = cold_world(|c| c.audience = Some(vec!["my-audience".into()]));
    world.upkeep().await;
    let path = world.path();
    let now = START.to_string();
    let send = |token: String| world.send(post(&path, "msg_1", &now, &token, BODY));
    assert_eq!(
        send(jwt(&format!("https://h.example/gbo{path}"), START + 60)).await.status(),
        StatusCode::UNAUTHORIZED
    );
    assert_eq!(send(jwt("my-audience", START + 60)).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn schemes_can_be_switched_off() {
    let world = cold_world(|c| c.schemes = vec![crate::callback::Scheme::Jwt]);
    world.upkeep().await;
    assert_eq!(world.deliver("msg_1").await, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn the_same_delivery_is_written_once_and_only_a_write_that_succeeded_counts() {
    let world = world().await;
    world.sink.next(&[UNAVAILABLE, UNAVAILABLE]);
    assert_eq!(world.deliver("msg_1").await, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(world.deliver("msg_1").await, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
    assert_eq!(world.sink.calls(), 3);
    world.pass(3600);
    for _ in 0..10 {
        assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
    }
    assert_eq!(world.sink.calls(), 3, "remembered");
    assert_eq!(world.sink.hints.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_not_stored_is_not_acknowledged() {
    let world = world().await;
    for reason in ["unreachable", "forbidden", "rejected", "server_error", "no_such_resource"] {
        world.sink.next(&[Err(WriteError::Unavailable(reason))]);
        let (status, headers, body) = shape(world.send(world.request(reason, 1, BODY)).await).await;
        assert_eq!((status, body.len()), (StatusCode::SERVICE_UNAVAILABLE, 0));
        assert_eq!(headers["retry-after"], "10");
    }
}

#[tokio::test]
async fn a_job_that_is_gone_needs_no_telling() {
    let world = world().await;
    world.sink.next(&[Ok(Written::Gone)]);
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
    assert_eq!(world.sink.calls(), 1);
}

#[tokio::test]
async fn conflicts_are_tried_again_and_slowness_has_an_end() {
    let world = cold_world(|c| c.limits.write = Duration::from_millis(300));
    world.upkeep().await;
    world.sink.next(&[Err(WriteError::Conflict); 2]);
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
    assert_eq!(world.sink.calls(), 3);

    world.sink.next(&[Err(WriteError::Conflict); 100]);
    assert_eq!(world.deliver("msg_2").await, StatusCode::SERVICE_UNAVAILABLE);
    assert!(world.sink.calls() < 12, "with growing pauses: {}", world.sink.calls());

    world.sink.next(&[]);
    *world.sink.delay.lock().unwrap() = Duration::from_mins(1);
    let began = Instant::now();
    assert_eq!(world.deliver("msg_3").await, StatusCode::SERVICE_UNAVAILABLE);
    assert!(began.elapsed() < Duration::from_secs(5));
    *world.sink.delay.lock().unwrap() = Duration::ZERO;
    assert_eq!(world.deliver("msg_3").await, StatusCode::OK, "the right to write was given back");
}

#[tokio::test]
async fn the_same_delivery_twice_at_once_is_one_write() {
    let world = world().await;
    *world.sink.delay.lock().unwrap() = Duration::from_millis(100);
    let (a, b) = tokio::join!(world.deliver("msg_1"), world.deliver("msg_1"));
    let mut answers = [a, b];
    answers.sort();
    assert_eq!(answers, [StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE]);
    assert_eq!(world.sink.calls(), 1);
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
    assert_eq!(world.sink.calls(), 1);
}

#[tokio::test]
async fn a_flood_of_distinct_ids_for_one_job_writes_little_and_loses_nothing() {
    let world = world().await;
    let mut taken = 0;
    for n in 0..1000 {
        if n % 100 == 99 {
            world.pass(1);
        }
        let response = world.send(world.request(&format!("msg_{n}"), 1, BODY)).await;
        match response.status() {
            StatusCode::OK => taken += 1,
            status => {
                assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
                let wait: u32 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
                assert!((1..=10).contains(&wait));
            }
        }
    }
    assert_eq!((taken, world.sink.calls()), (6, 6), "five, and one more after 10 s");
    world.pass(10);
    assert_eq!(world.deliver("msg_500").await, StatusCode::OK, "one that was put off");
}

#[tokio::test]
async fn forged_signatures_cause_one_fetch_a_minute_at_most() {
    let world = world().await;
    assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), 1);
    let unknown_kid = sign_jwt(&json!({"alg": "RS256", "kid": "zzz"}), &json!({}));
    for n in 0..5000 {
        assert_eq!(world.send(world.request("msg_1", 9, BODY)).await.status(), StatusCode::UNAUTHORIZED);
        let request = post(&world.path(), "msg_1", &world.now().as_second().to_string(), &unknown_kid, BODY);
        assert_eq!(world.send(request).await.status(), StatusCode::UNAUTHORIZED);
        if n == 2499 {
            assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), 1);
            world.pass(60);
        }
    }
    assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_wrong_token_causes_nothing_at_all() {
    let world = world().await;
    world.pass(55);
    let reads = world.ring.reads.load(Ordering::SeqCst);
    let now = world.now().as_second().to_string();
    let good = world.path();
    for last in ["A", "B", "C", "D"] {
        let path = format!("{}{last}AA", &good[..good.len() - 3]);
        let request = post(&path, "msg_1", &now, &sign_v1a(9, "msg_1", &now, BODY), BODY);
        assert_eq!(world.send(request).await.status(), StatusCode::UNAUTHORIZED);
    }
    assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), 1);
    assert_eq!(world.ring.reads.load(Ordering::SeqCst), reads);
    assert_eq!(world.sink.calls(), 0);
}

#[tokio::test]
async fn a_rolled_key_is_picked_up_by_the_delivery_that_needs_it() {
    let world = world().await;
    *world.jwks.answer.lock().unwrap() = Ok((jwks(&[jwk(7)]), None));
    let roll = || world.send(world.request("msg_1", 7, BODY));
    assert_eq!(roll().await.status(), StatusCode::UNAUTHORIZED, "fetched less than a minute ago");
    world.pass(60);
    let (a, b) = tokio::join!(roll(), world.send(world.request("msg_2", 7, BODY)));
    assert_eq!((a.status(), b.status()), (StatusCode::OK, StatusCode::OK), "both wait for the one fetch");
    assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn without_keys_the_sender_must_come_again() {
    let world = cold_world(|_| ());
    *world.jwks.answer.lock().unwrap() = Err(FetchError::Status(500));
    world.upkeep().await;
    assert!(world.receiver.ready().is_ok(), "an outage at Google takes nobody out of service");
    let (status, headers, _) = shape(world.send(world.request("msg_1", 1, BODY)).await).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(headers.contains_key("retry-after"));
    *world.jwks.answer.lock().unwrap() = Ok((jwks(&[jwk(1)]), None));
    world.pass(60);
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
}

#[tokio::test]
async fn good_keys_serve_for_a_day_and_broken_sets_never_replace_them() {
    let world = world().await;
    for (n, broken) in [
        Err(FetchError::Unreachable("x".into())),
        Err(FetchError::Status(302)),
        Ok((jwks(&[]), None)),
        Ok((b"<html>".to_vec(), None)),
        Ok((vec![b' '; 65 * 1024], None)),
    ]
    .into_iter()
    .enumerate()
    {
        *world.jwks.answer.lock().unwrap() = broken;
        world.pass(3600);
        world.upkeep().await;
        assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), n + 2);
        assert_eq!(world.deliver(&format!("msg_{n}")).await, StatusCode::OK);
    }
    world.pass(19 * 3600);
    world.upkeep().await;
    assert_eq!(world.deliver("msg_24h").await, StatusCode::OK);
    world.pass(1);
    assert_eq!(world.deliver("msg_late").await, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn cache_control_is_honoured_within_bounds() {
    for (max_age, fresh) in [(None, 600), (Some(0), 300), (Some(1200), 1200), (Some(1_000_000), 3600)] {
        let world = cold_world(|_| ());
        let keys = jwks(&[jwk(1)]);
        *world.jwks.answer.lock().unwrap() = Ok((keys, max_age));
        world.upkeep().await;
        world.pass(fresh - 1);
        world.upkeep().await;
        assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), 1, "{max_age:?}");
        world.pass(1);
        world.upkeep().await;
        assert_eq!(world.jwks.fetches.load(Ordering::SeqCst), 2, "{max_age:?}");
    }
}

#[tokio::test]
async fn ready_once_the_ring_was_read_and_from_then_on() {
    let world = cold_world(|_| ());
    assert!(world.receiver.ready().unwrap_err().contains("not been read"));
    let good = world.ring.ring.lock().unwrap().clone();
    *world.ring.ring.lock().unwrap() = Err(RingReadError::Missing);
    world.upkeep().await;
    assert!(world.receiver.ready().unwrap_err().contains("does not exist"));
    *world.ring.ring.lock().unwrap() = good.clone();
    let path = world.path();
    let request = post(&path, "msg_1", "1", "x", BODY);
    assert_eq!(world.send(request).await.status(), StatusCode::SERVICE_UNAVAILABLE, "not a refusal");
    world.pass(1);
    world.upkeep().await;
    assert_eq!(world.receiver.ready(), Ok(()));
    let delivery = world.request("msg_1", 1, BODY);
    *world.ring.ring.lock().unwrap() = Err(RingReadError::Missing);
    world.pass(60);
    world.upkeep().await;
    assert_eq!(world.receiver.ready(), Ok(()));
    assert_eq!(world.send(delivery).await.status(), StatusCode::OK, "the ring that was read goes on serving");
}

#[tokio::test]
async fn the_ring_is_read_every_minute_whatever_callers_send() {
    let world = world().await;
    assert_eq!(world.ring.reads.load(Ordering::SeqCst), 1);
    let ring = KeyRing::generate("cluster-1", at(0)).unwrap();
    *world.ring.ring.lock().unwrap() = Ok(ring);
    // Well formed, with a key id that this receiver has not read: a stranger can make such tokens without end.
    for _ in 0..100 {
        world.pass(1);
        assert_eq!(world.deliver("msg_1").await, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(world.ring.reads.load(Ordering::SeqCst), 1);
    world.upkeep().await;
    assert_eq!(world.ring.reads.load(Ordering::SeqCst), 2);
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
}

#[tokio::test]
async fn bodies_have_a_limit_whether_announced_or_not() {
    let world = world().await;
    let full = vec![b'x'; 64 * 1024];
    assert_eq!(world.send(world.request("msg_1", 1, &full)).await.status(), StatusCode::OK);
    let over = vec![b'x'; 64 * 1024 + 1];
    let (status, _, body) = shape(world.send(world.request("msg_2", 1, &over)).await).await;
    assert_eq!(
        (status, body.len()),
        (StatusCode::UNAUTHORIZED, 0),
        "found out behind the token, so it does not show"
    );
    let mut announced = world.request("msg_3", 1, BODY);
    announced.headers_mut().insert("content-length", "65537".parse().unwrap());
    assert_eq!(world.send(announced).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let mut at_limit = world.request("msg_4", 1, BODY);
    at_limit.headers_mut().insert("content-length", "65536".parse().unwrap());
    assert_eq!(world.send(at_limit).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn everything_is_counted_under_fixed_labels() {
    let world = world().await;
    world.deliver("msg_1").await;
    world.deliver("msg_1").await;
    world
        .send(post("/v1/callbacks/canary-ns/canary-name/canary-token", "canary-id", "1", "canary", b"canary"))
        .await;
    world.send(world.request("msg_2", 9, BODY)).await;
    world.pass(7);
    world.upkeep().await;
    let text = world.metrics();
    for line in [
        "gemini_batch_callbacks_total{outcome=\"accepted\",scheme=\"v1a\"} 1",
        "gemini_batch_callbacks_total{outcome=\"duplicate\",scheme=\"v1a\"} 1",
        "gemini_batch_callbacks_total{outcome=\"token_malformed\",scheme=\"none\"} 1",
        "gemini_batch_callbacks_total{outcome=\"bad_signature\",scheme=\"none\"} 1",
        "gemini_batch_callback_verification_seconds_count{scheme=\"v1a\"} 2",
        "gemini_batch_callback_age_seconds_count 2",
        "gemini_batch_callback_event_to_receipt_seconds_count 1",
        "gemini_batch_callback_hint_writes_total{outcome=\"stored\"} 1",
        "gemini_batch_callback_hint_write_seconds_count 1",
        "gemini_batch_callback_key_fetches_total{outcome=\"ok\"} 1",
        "gemini_batch_callback_key_set_age_seconds 7",
        "gemini_batch_callback_keys 4",
        "gemini_batch_callback_keyring_reads_total{outcome=\"ok\"} 1",
        "gemini_batch_callback_keyring_keys 1",
        "gemini_batch_receiver_connections_open 0",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(!text.contains("canary"));
}

#[test]
fn an_external_url_that_nobody_could_call_is_refused() {
    for bad in
        ["mailto:x@example.org", "ftp://h.example/", "https://h.example/{x}", "https://h.example/a%20b"]
    {
        let world = std::panic::catch_unwind(|| cold_world(|c| c.external_url = Url::parse(bad).unwrap()));
        assert!(world.is_err(), "{bad}");
    }
    assert!(SetupError::ExternalUrl.to_string().contains("external URL"));
}

// --- the write, against a scripted API server -------------------------------------------------------------

type Seen = Arc<Mutex<Vec<(String, HeaderMap, Value)>>>;

/// A sink whose API server gives these answers, and what it was asked.
fn kube_sink(answers: Vec<(u16, Value)>) -> (KubeHintSink, Seen) {
    let seen = Seen::default();
    let answers = Arc::new(Mutex::new(answers.into_iter().rev().collect::<Vec<_>>()));
    let record = Arc::clone(&seen);
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        let (record, answers) = (Arc::clone(&record), Arc::clone(&answers));
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap();
            let target = format!("{} {}", head.method, head.uri);
            record.lock().unwrap().push((target, head.headers, serde_json::from_slice(&body).unwrap()));
            let (status, answer) = answers.lock().unwrap().pop().unwrap();
            let body = if let Value::String(text) = answer { text } else { answer.to_string() };
            Ok::<_, std::convert::Infallible>(
                http::Response::builder().status(status).body(Body::from(body)).unwrap(),
            )
        }
    });
    (KubeHintSink::new(kube::Client::new(service, "default")), seen)
}

fn hint() -> Hint {
    Hint {
        namespace: "team-a".into(),
        name: "nightly".into(),
        uid: UID.into(),
        attempt: 2,
        webhook_id: "msg_1".into(),
        kind: EventType::Failed,
        batch_id: None,
        event_time: None,
        received: at(0),
    }
}

fn status(code: u16, reason: &str, details: &Value) -> (u16, Value) {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "x",
        "reason": reason, "code": code, "details": details,
    });
    (code, body)
}

fn metadata() -> (u16, Value) {
    (
        200,
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": {"name": "nightly"}}),
    )
}

fn gone() -> (u16, Value) {
    status(
        404,
        "NotFound",
        &json!({"name": "nightly", "group": "geminibatch.dev", "kind": "geminibatchjobs"}),
    )
}

fn unprocessable() -> (u16, Value) {
    status(422, "Invalid", &json!({}))
}

#[tokio::test]
async fn the_patch_tests_the_uid_and_reads_no_job() {
    let (sink, seen) = kube_sink(vec![metadata()]);
    assert_eq!(sink.write(&hint()).await, Ok(Written::Stored));
    let seen = seen.lock().unwrap();
    let (target, headers, body) = &seen[0];
    assert_eq!(
        target,
        "PATCH /apis/geminibatch.dev/v1alpha1/namespaces/team-a/geminibatchjobs/nightly/status?fieldManager=gemini-batch-receiver"
    );
    assert_eq!(headers["content-type"], "application/json-patch+json");
    assert!(headers["accept"].to_str().unwrap().starts_with("application/json;as=PartialObjectMetadata"));
    assert_eq!(
        *body,
        json!([
            {"op": "test", "path": "/metadata/uid", "value": UID},
            {"op": "add", "path": "/status/callback", "value": hint().to_json()},
        ])
    );
}

#[tokio::test]
async fn each_answer_of_the_api_server_has_its_meaning() {
    let failed = |why| Err(WriteError::Unavailable(why));
    for (what, answers, expected) in [
        ("no such job", vec![gone()], Ok(Written::Gone)),
        ("another uid", vec![unprocessable(), unprocessable()], Ok(Written::Gone)),
        ("gone between the two", vec![unprocessable(), gone()], Ok(Written::Gone)),
        ("schema or no status", vec![unprocessable(), metadata()], failed("rejected")),
        (
            "away between the two",
            vec![unprocessable(), status(503, "ServiceUnavailable", &json!({}))],
            failed("server_error"),
        ),
        ("conflict", vec![status(409, "Conflict", &json!({}))], Err(WriteError::Conflict)),
        (
            "conflict in the second",
            vec![unprocessable(), status(409, "Conflict", &json!({}))],
            Err(WriteError::Conflict),
        ),
        ("no CRD", vec![(404, json!("404 page not found"))], failed("no_such_resource")),
        ("no subresource", vec![status(404, "NotFound", &json!({}))], failed("no_such_resource")),
        (
            "a 404 about something else",
            vec![status(404, "NotFound", &json!({"name": "nightly", "kind": "services", "group": ""}))],
            failed("no_such_resource"),
        ),
        ("RBAC or policy", vec![status(403, "Forbidden", &json!({}))], failed("forbidden")),
        ("no credentials", vec![status(401, "Unauthorized", &json!({}))], failed("forbidden")),
        ("too many", vec![status(429, "TooManyRequests", &json!({}))], failed("server_error")),
        ("broken", vec![status(500, "InternalError", &json!({}))], failed("server_error")),
        ("a proxy", vec![(502, json!("<html>"))], failed("server_error")),
    ] {
        let count = answers.len();
        let (sink, seen) = kube_sink(answers);
        assert_eq!(sink.write(&hint()).await, expected, "{what}");
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), count, "{what}");
        if let Some((_, _, second)) = seen.get(1) {
            assert_eq!(*second, json!([{"op": "test", "path": "/metadata/uid", "value": UID}]), "{what}");
        }
    }
}

#[tokio::test]
async fn an_api_server_that_does_not_answer_is_no_answer() {
    let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
    let sink = KubeHintSink::new(super::hint::kube_client(config).unwrap());
    let began = Instant::now();
    assert_eq!(sink.write(&hint()).await, Err(WriteError::Unavailable("unreachable")));
    assert!(began.elapsed() < Duration::from_secs(2), "no hidden retries");
}

#[tokio::test]
async fn an_api_server_that_is_overloaded_is_asked_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let app = axum::Router::new().fallback(move || {
        count.fetch_add(1, Ordering::SeqCst);
        async { (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "1")]) }
    });
    tokio::spawn(async move { axum::serve(listener, app).await });
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    let sink = KubeHintSink::new(super::hint::kube_client(config).unwrap());
    assert_eq!(sink.write(&hint()).await, Err(WriteError::Unavailable("server_error")));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

// --- the key endpoint, over a socket --------------------------------------------------------------------------

async fn fetch_from(app: axum::Router, path: &str, allow_insecure: bool) -> Result<Document, FetchError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let url = Url::parse(&format!("http://{address}{path}")).unwrap();
    HttpJwks::new(url, allow_insecure).unwrap().fetch().await
}

#[tokio::test]
async fn keys_are_fetched_over_a_socket() {
    use axum::routing::get;
    let big = "x".repeat(64 * 1024 + 1);
    let app = axum::Router::new()
        .route("/plain", get(|| async { "{}" }))
        .route(
            "/aged",
            get(|| async { ([("cache-control", "public, max-age=1234, must-revalidate")], "{}") }),
        )
        .route("/uncached", get(|| async { ([("cache-control", "no-store")], "{}") }))
        .route("/odd", get(|| async { ([("cache-control", "max-age=soon")], "{}") }))
        .route("/moved", get(|| async { axum::response::Redirect::temporary("/plain") }))
        .route("/big", get(move || async { big }))
        .route("/full", get(|| async { "x".repeat(64 * 1024) }))
        .route("/hangs", get(std::future::pending::<()>));
    let fetch = |path: &'static str| fetch_from(app.clone(), path, true);
    let age = |d: Document| d.max_age.map(|age| age.as_secs());
    assert_eq!(fetch("/plain").await.map(|d| d.bytes).unwrap(), b"{}");
    assert_eq!(age(fetch("/plain").await.unwrap()), None);
    assert_eq!(age(fetch("/aged").await.unwrap()), Some(1234));
    assert_eq!(age(fetch("/uncached").await.unwrap()), Some(0));
    assert_eq!(age(fetch("/odd").await.unwrap()), None);
    assert_eq!(fetch("/full").await.unwrap().bytes.len(), 64 * 1024);
    let error = |result: Result<Document, FetchError>| result.err().unwrap();
    assert_eq!(error(fetch("/big").await), FetchError::Document(JwksError::TooLarge));
    assert_eq!(error(fetch("/moved").await), FetchError::Status(307));
    assert_eq!(error(fetch("/missing").await), FetchError::Status(404));
    assert!(matches!(error(fetch_from(app.clone(), "/plain", false).await), FetchError::Unreachable(_)));
    let began = Instant::now();
    assert!(matches!(error(fetch("/hangs").await), FetchError::Unreachable(_)));
    assert!(began.elapsed() < Duration::from_secs(5));
}

// --- sockets ----------------------------------------------------------------------------------------------------

struct Served {
    world: World,
    address: std::net::SocketAddr,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

const SHORT: Duration = Duration::from_millis(400);

async fn served(configure: impl FnOnce(&mut Limits)) -> Served {
    serve(|c| configure(&mut c.limits)).await
}

async fn serve(configure: impl FnOnce(&mut Config)) -> Served {
    let world = cold_world(|c| {
        c.limits.header = SHORT;
        c.limits.body = SHORT;
        c.limits.handler = Duration::from_secs(2);
        configure(c);
    });
    world.upkeep().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let (receiver, stop) = (world.receiver.clone(), shutdown.clone());
    let task = tokio::spawn(async move { receiver.run(listener, stop).await });
    Served { world, address, shutdown, task }
}

impl Served {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes and reads until the server closes.
    async fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        closed(&mut stream).await
    }

    /// A delivery that is good but for its framing.
    fn delivery(&self, id: &str, framing: &str) -> String {
        let timestamp = self.world.now().as_second().to_string();
        let signature = sign_v1a(1, id, &timestamp, BODY);
        head(
            &self.world.path(),
            &format!(
                "webhook-id: {id}\r\nwebhook-timestamp: {timestamp}\r\nwebhook-signature: {signature}\r\n{framing}"
            ),
        )
    }

    fn good(&self, id: &str, more: &str) -> Vec<u8> {
        let head = self.delivery(id, &format!("content-length: {}\r\n{more}", BODY.len()));
        [head.as_bytes(), BODY].concat()
    }
}

fn head(path: &str, headers: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n")
}

/// What arrives until the other side closes, which it must do soon.
async fn closed(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut bytes)).await;
    if read.expect("the server keeps the connection open").is_err() {
        bytes.extend_from_slice(b"(reset)");
    }
    String::from_utf8(bytes).unwrap()
}

async fn answer(stream: &mut TcpStream) -> String {
    let mut bytes = vec![0; 4096];
    let count = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut bytes)).await.unwrap().unwrap();
    String::from_utf8(bytes[..count].to_vec()).unwrap()
}

#[tokio::test]
async fn takes_callbacks_over_a_socket_and_keeps_the_connection() {
    let served = served(|_| ()).await;
    let mut stream = served.connect().await;
    for id in ["msg_1", "msg_2"] {
        stream.write_all(&served.good(id, "")).await.unwrap();
        assert_eq!(answer(&mut stream).await, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    }
    assert_eq!(served.world.sink.calls(), 2);
    assert_eq!(closed(&mut stream).await, "", "idle: closed after the header timeout");
}

#[tokio::test]
async fn refusals_are_the_same_bytes() {
    let served = served(|_| ()).await;
    let good = String::from_utf8(served.good("msg_1", "connection: close\r\n")).unwrap();
    let token = served.world.token();
    let wrong_token = good.replace(&token, "x");
    let other = format!("{}AAA", &token[..token.len() - 3]);
    for refused in [
        wrong_token.as_str(),
        &good.replace(&token, &other),
        &good.replace("msg_1", "msg_2"),
        &good.replace("batch.succeeded", "batch.successes"),
        &good.replace("webhook-signature", "webhook-signaturf"),
    ] {
        assert_eq!(
            served.exchange(refused.as_bytes()).await,
            "HTTP/1.1 401 Unauthorized\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
    }
    assert!(served.exchange(good.as_bytes()).await.starts_with("HTTP/1.1 200"));
}

/// Whether a URL is one of ours must not show before the signature fits: not by a status, not by "100 Continue", not
/// by whether the connection stays.
#[tokio::test]
async fn a_right_token_answers_like_a_wrong_one() {
    let served = served(|_| ()).await;
    let good = String::from_utf8(served.good("msg_1", "")).unwrap();
    let (head, _) = good.split_once("\r\n\r\n").unwrap();
    let forged = head.replace("webhook-id: msg_1", "webhook-id: msg_2"); // so the signature does not fit
    let length = format!("content-length: {}", BODY.len());
    let with = |framing: &str, body: &str| format!("{}\r\n\r\n{body}", forged.replace(&length, framing));
    let big = "x".repeat(60_000);
    for (what, request) in [
        ("a body", with(&length, std::str::from_utf8(BODY).unwrap())),
        ("a big body", with("content-length: 60000", &big)),
        ("a body that does not come", with("content-length: 50000", "")),
        ("a small one that does not come", with("content-length: 50", "")),
        (
            "chunks beyond the limit",
            with("transfer-encoding: chunked", &format!("11170\r\n{}\r\n0\r\n\r\n", "x".repeat(70_000))),
        ),
        ("a broken chunk", with("transfer-encoding: chunked", "zz\r\n")),
        ("an expectation", with(&format!("{length}\r\nexpect: 100-continue"), "")),
    ] {
        let token = served.world.token();
        let wrong = request.replace(&token, &format!("{}AAA", &token[..token.len() - 3]));
        let (right, wrong) =
            (served.exchange(request.as_bytes()).await, served.exchange(wrong.as_bytes()).await);
        let reset = |answer: &str| answer.replace("(reset)", ""); // of what was not read
        assert_eq!(reset(&right), reset(&wrong), "{what}");
        assert!(!right.contains("100 Continue"), "{what}: {right}");
    }
}

#[tokio::test]
async fn slow_headers_slow_bodies_and_silence_end() {
    let served = served(|_| ()).await;
    let silent = async {
        let mut stream = served.connect().await;
        closed(&mut stream).await
    };
    let half_header = served.exchange(b"POST /v1/callbacks/a/b/c HTTP/1.1\r\nhost:");
    let half_body = served.delivery("msg_1", "content-length: 100\r\n") + "{\"ty";
    let half_body = served.exchange(half_body.as_bytes());
    let dripped = async {
        let (mut read, mut write) = served.connect().await.into_split();
        let drip = tokio::spawn(async move {
            for byte in b"POST / HTTP/1.1\r\nhost: x\r\nx-a: ".iter().chain([b'a'; 200].iter()) {
                if write.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        let mut bytes = Vec::new();
        tokio::time::timeout(Duration::from_secs(5), read.read_to_end(&mut bytes))
            .await
            .expect("still open")
            .ok();
        drip.abort();
    };
    let began = Instant::now();
    let (silent, half_header, half_body, ()) = tokio::join!(silent, half_header, half_body, dripped);
    assert_eq!(silent, "");
    assert!(half_header.is_empty() || half_header.starts_with("HTTP/1.1 408"), "{half_header}");
    assert!(half_body.starts_with("HTTP/1.1 401"), "{half_body}");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!(served.world.sink.calls(), 0);
    assert!(
        served.exchange(&served.good("msg_9", "connection: close\r\n")).await.starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn large_and_contradictory_bodies() {
    let served = served(|_| ()).await;
    let too_large = "HTTP/1.1 413 Payload Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let began = Instant::now();
    // decided on the announcement: not one byte of the body is waited for
    assert_eq!(
        served.exchange(served.delivery("m", "content-length: 10000000000\r\n").as_bytes()).await,
        too_large
    );
    let elsewhere = head("/v1/callbacks/a/b/c", "content-length: 10000000000\r\n");
    assert_eq!(served.exchange(elsewhere.as_bytes()).await, too_large);
    assert!(began.elapsed() < SHORT);
    let chunk = format!("{:x}\r\n{}\r\n", 70_000, "x".repeat(70_000));
    let chunked = served.delivery("m", "transfer-encoding: chunked\r\n") + &chunk;
    assert!(served.exchange(chunked.as_bytes()).await.starts_with("HTTP/1.1 401"));
    let broken = served.delivery("m", "transfer-encoding: chunked\r\n") + "zz\r\n";
    assert!(served.exchange(broken.as_bytes()).await.starts_with("HTTP/1.1 401"));
    for contradictory in [
        "content-length: 5\r\ncontent-length: 6\r\n",
        "content-length: -5\r\n",
        "content-length: 5\r\ntransfer-encoding: gzip\r\n",
    ] {
        let answer = served.exchange(served.delivery("m", contradictory).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{contradictory}: {answer}");
    }
    let chunked = served.delivery("m", "transfer-encoding: chunked\r\nconnection: close\r\n")
        + &format!("{:x}\r\n{}\r\n0\r\n\r\n", BODY.len(), str::from_utf8(BODY).unwrap());
    assert!(served.exchange(chunked.as_bytes()).await.starts_with("HTTP/1.1 200"));
    assert_eq!(served.world.sink.calls(), 1);
}

#[tokio::test]
async fn many_or_long_headers_and_http_2() {
    let served = served(|_| ()).await;
    // host, three webhook headers, content-length and connection are six
    let fill = |count: usize| "x-fill: a\r\n".repeat(count) + "connection: close\r\n";
    assert!(served.exchange(&served.good("m", &fill(58))).await.starts_with("HTTP/1.1 200"));
    assert!(served.exchange(&served.good("m", &fill(59))).await.starts_with("HTTP/1.1 431"));
    let long = format!("x-long: {}\r\nconnection: close\r\n", "a".repeat(15 * 1024));
    assert!(served.exchange(&served.good("m", &long)).await.starts_with("HTTP/1.1 200"));
    let longer = format!("x-long: {}\r\n", "a".repeat(17 * 1024));
    assert!(
        served.exchange(head("/v1/callbacks/a/b/c", &longer).as_bytes()).await.starts_with("HTTP/1.1 431")
    );
    let http2 = served.exchange(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    assert!(!http2.contains("200"), "{http2}");
    let upgrade =
        "connection: upgrade, http2-settings, close\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n";
    let upgraded = served.exchange(&served.good("m2", upgrade)).await;
    assert!(upgraded.starts_with("HTTP/1.1 200"), "{upgraded}");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_outside() {
    let served = served(|l| l.connections = 2).await;
    let mut first = served.connect().await;
    let second = served.connect().await;
    // both must have been accepted before the third knocks
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut third = served.connect().await;
    third.write_all(&served.good("msg_3", "connection: close\r\n")).await.unwrap();
    assert!(
        tokio::time::timeout(Duration::from_millis(100), third.readable()).await.is_err(),
        "it has to wait"
    );
    assert!(served.world.metrics().contains("gemini_batch_receiver_connections_open 2"));
    first.write_all(&served.good("msg_1", "connection: close\r\n")).await.unwrap();
    assert!(closed(&mut first).await.starts_with("HTTP/1.1 200"));
    assert!(closed(&mut third).await.starts_with("HTTP/1.1 200"));
    drop(second);
    assert!(
        served.world.metrics().contains("gemini_batch_receiver_connections_rejected_total{reason=\"limit\"}")
    );
}

#[tokio::test]
async fn connections_have_an_age() {
    let served = served(|l| {
        l.connection_age = Duration::from_millis(300);
        l.header = Duration::from_mins(1);
    })
    .await;
    let mut stream = served.connect().await;
    stream.write_all(&served.good("msg_1", "")).await.unwrap();
    assert!(answer(&mut stream).await.starts_with("HTTP/1.1 200"));
    assert_eq!(closed(&mut stream).await, "");
}

#[tokio::test]
async fn shutdown_finishes_what_is_in_flight_and_accepts_no_more() {
    let served = served(|l| l.drain = Duration::from_secs(2)).await;
    *served.world.sink.delay.lock().unwrap() = SHORT;
    let mut idle = served.connect().await;
    idle.write_all(&served.good("msg_0", "")).await.unwrap();
    assert!(answer(&mut idle).await.starts_with("HTTP/1.1 200"));
    let mut busy = served.connect().await;
    busy.write_all(&served.good("msg_1", "")).await.unwrap();
    tokio::time::sleep(SHORT / 4).await;
    served.shutdown.cancel();
    assert!(answer(&mut busy).await.starts_with("HTTP/1.1 200"), "the write was under way");
    assert_eq!(closed(&mut idle).await, "");
    tokio::time::timeout(Duration::from_secs(3), served.task).await.expect("did not end").unwrap();
    assert!(TcpStream::connect(served.address).await.is_err());
    assert!(served.world.metrics().contains("gemini_batch_receiver_connections_open 0"));
}

#[tokio::test]
async fn run_reads_ring_and_keys_by_itself() {
    let world = cold_world(|_| ());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shutdown = CancellationToken::new();
    let (receiver, stop) = (world.receiver.clone(), shutdown.clone());
    let task = tokio::spawn(async move { receiver.run(listener, stop).await });
    for _ in 0..100 {
        if world.receiver.ready().is_ok() && world.jwks.fetches.load(Ordering::SeqCst) == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(world.receiver.ready(), Ok(()));
    assert_eq!(world.deliver("msg_1").await, StatusCode::OK);
    shutdown.cancel();
    task.await.unwrap();
}

#[tokio::test]
async fn speaks_tls_with_a_certificate_of_its_own() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let served = serve(|c| {
        c.tls = Some(Arc::new(Tls::load(certificate.clone(), key.clone()).unwrap()));
        c.limits.certificate = Duration::from_millis(20);
    })
    .await;
    let trusting = |pem: String| {
        let root = reqwest::Certificate::from_pem(pem.as_bytes()).unwrap();
        reqwest::Client::builder().tls_certs_only([root]).build().unwrap()
    };
    let client = trusting(made.cert.pem());
    let timestamp = served.world.now().as_second().to_string();
    let url = format!("https://localhost:{}{}", served.address.port(), served.world.path());
    let answer = client
        .post(&url)
        .header("webhook-id", "msg_tls")
        .header("webhook-timestamp", &timestamp)
        .header("webhook-signature", sign_v1a(1, "msg_tls", &timestamp, BODY))
        .body(BODY)
        .send()
        .await
        .unwrap();
    assert_eq!((answer.status(), answer.version()), (StatusCode::OK, http::Version::HTTP_11));

    // A new certificate is used without a restart.
    let renewed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(&key, renewed.signing_key.serialize_pem()).unwrap();
    std::fs::write(&certificate, renewed.cert.pem()).unwrap();
    let began = Instant::now();
    while trusting(renewed.cert.pem()).post(&url).send().await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(20), "the new certificate is not used");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Plain HTTP gets nothing, and a silent socket does not stay.
    let plain = served.exchange(&served.good("msg_plain", "")).await;
    assert!(!plain.contains("HTTP/1.1"), "{plain}");
    assert_eq!(closed(&mut served.connect().await).await, "");
    let metrics = served.world.metrics();
    for reason in ["tls_handshake", "tls_timeout"] {
        let line = format!("receiver_connections_rejected_total{{reason=\"{reason}\"}}");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
    served.shutdown.cancel();
    served.task.await.unwrap();
}
