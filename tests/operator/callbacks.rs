//! Callbacks from outside to the end of a job: forged, repeated, reordered, early, late, and floods of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use futures::{StreamExt as _, TryStreamExt as _};
use gemini_batch_operator::api::{GeminiBatchJob, conditions};
use gemini_simulator::{BatchView, Config, Effect, Fault, Op, Outcome, Switches};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::harness::{Env, PATIENCE, is_true, ready, spec, state};

/// The event of a batch's end, as the guide shows it.
fn event(type_: &str, batch: &BatchView) -> String {
    let id = batch.name.trim_start_matches("batches/");
    json!({"type": type_, "version": "v1", "timestamp": "2026-09-01T10:00:00Z", "data": {"id": id}})
        .to_string()
}

/// A job that runs until the test ends it, and its batch.
async fn running(env: &Env, name: &str) -> BatchView {
    env.create(name, spec(&["[[sim:job=stall]]"], None)).await;
    let job = env.until(name, "running", |j| state(j) == "Running").await;
    let batch = job.status.unwrap().attempts[0].batch_name.clone().unwrap();
    env.sim.batches().into_iter().find(|b| b.name == batch).unwrap()
}

/// With whatever goes wrong with deliveries, a job finishes without the sweep, and Gemini is asked only a few times.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_goes_wrong_with_a_delivery_the_job_ends_right() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=86400"]).await;
    env.operator().await;
    let faults = [
        "duplicate",
        "late=600",
        "early",
        "reordered",
        "forged",
        "old=90000",
        "frozen",
        "two-signatures",
        "jwt",
    ];
    for (i, fault) in faults.iter().enumerate() {
        env.create(&format!("job-{i}"), spec(&[&format!("[[sim:hook={fault}]]")], None)).await;
    }
    for (i, fault) in faults.iter().enumerate() {
        let job = env.cleaned(&format!("job-{i}")).await;
        assert_eq!(state(&job), "Succeeded", "{fault}");
        let gets = env
            .log()
            .iter()
            .filter(|e| {
                e.op == Op::BatchGet && e.batch == job.status.as_ref().unwrap().attempts[0].batch_name
            })
            .count();
        assert!(gets <= 4, "{fault}: {gets} GETs");
    }
    let forged: Vec<_> = env.sim.deliveries().into_iter().filter(|d| d.event == "forged").collect();
    assert_eq!(forged.iter().map(|d| d.status).collect::<Vec<_>>(), [Some(401)]);
}

/// Far too old, or from the future: refused, and the genuine retry with a fresh timestamp is taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_older_than_the_window_is_refused() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=2"]).await;
    env.operator().await;
    env.create("job", spec(&["[[sim:hook=old=94000]]"], None)).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded", "the sweep finds it");
    assert!(env.sim.deliveries().iter().all(|d| d.status == Some(401)));
    assert!(env.jobs().get("job").await.unwrap().status.unwrap().callback.is_none());
}

/// The same bytes again: on the same receiver, on another replica, on one that was started anew, after the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_anywhere_changes_nothing() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=86400"]).await;
    env.operator().await;
    let batch = running(&env, "job").await;
    let body = event("batch.succeeded", &batch);
    let (listen, elsewhere) = env.another_receiver(&batch.uris[0]);
    let replica = env.spawn_with(None, &["--role=receiver", &listen, "--admin-listen=127.0.0.1:0"]);
    let start = Instant::now();
    while env.sim.post_signed(&elsewhere, "msg_1", &body).await != Some(200) {
        assert!(start.elapsed() < PATIENCE, "the replica does not take callbacks: {}", replica.log());
        tokio::task::yield_now().await;
    }
    assert_eq!(env.sim.post_signed(&batch.uris[0], "msg_1", &body).await, Some(200));
    // The replica wrote it too: it can't know what came to the other one in between.
    let looked_at_again = env.jobs().get("job").await.unwrap().status.unwrap().callback.unwrap();
    env.until("job", "done looking", |j| {
        j.status.as_ref().is_some_and(|s| s.attempts[0].observed_hint == Some(looked_at_again.hint()))
    })
    .await;
    let gets = env.count(Op::BatchGet);
    for uri in [&batch.uris[0], &elsewhere] {
        assert_eq!(env.sim.post_signed(uri, "msg_1", &body).await, Some(200));
    }
    let after = env.jobs().get("job").await.unwrap();
    assert_eq!(state(&after), "Running");
    assert_eq!(after.status.unwrap().callback.unwrap(), looked_at_again, "nobody writes it once more");
    assert_eq!(env.count(Op::BatchGet), gets, "what was acted on is no reason to ask again");

    assert!(env.sim.finish(&batch.name, Outcome::Failed));
    let end = env.cleaned("job").await;
    drop(replica);
    let _anew = env.spawn_with(None, &["--role=receiver", &listen, "--admin-listen=127.0.0.1:0"]);
    let start = Instant::now();
    while env.sim.post_signed(&elsewhere, "msg_1", &body).await != Some(200) {
        assert!(start.elapsed() < PATIENCE, "the replica does not come back");
        tokio::task::yield_now().await;
    }
    let after = env.jobs().get("job").await.unwrap();
    let (mut before, mut after) = (end.status.unwrap(), after.status.unwrap());
    (before.callback, after.callback) = (None, None);
    before.attempts[0].observed_hint.clone_from(&after.attempts[0].observed_hint); // if it was said already
    assert_eq!(before, after);
}

/// Every order of two deliveries each of three contradicting events: 6!/(2!·2!·2!) of them.
fn orders() -> Vec<Vec<usize>> {
    fn extend(order: &mut Vec<usize>, left: &mut [usize; 3], all: &mut Vec<Vec<usize>>) {
        if order.len() == 6 {
            all.push(order.clone());
        }
        for event in 0..3 {
            if left[event] > 0 {
                left[event] -= 1;
                order.push(event);
                extend(order, left, all);
                order.pop();
                left[event] += 1;
            }
        }
    }
    let mut all = Vec::new();
    extend(&mut Vec::new(), &mut [2; 3], &mut all);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn in_all_ninety_orders_what_get_says_last_is_the_end() {
    const EVENTS: [&str; 3] = ["batch.succeeded", "batch.failed", "batch.expired"];
    const ENDS: [(Outcome, &str, &str); 3] = [
        (Outcome::Succeeded, "Succeeded", "Completed"),
        (Outcome::Failed, "Failed", "BatchFailed"),
        (Outcome::Expired, "Failed", "BatchExpired"),
    ];
    let env =
        Env::with(Config { speed: 600.0, max_active: 1000, ..Config::default() }, &["--sweep-seconds=86400"])
            .await;
    env.operator().await;
    // The second delivery of an event comes to another replica, whose memory does not know the first one.
    let (listen, _) = env.another_receiver("");
    let replica = env.spawn_with(None, &["--role=receiver", &listen, "--admin-listen=127.0.0.1:0"]);
    let there = listen.replace("--listen=", "http://");
    let orders = orders();
    assert_eq!(orders.len(), 90);
    let transitions = watch_ends(&env);
    let start = Instant::now();
    while reqwest::get(&there).await.is_err() {
        assert!(start.elapsed() < PATIENCE, "the replica does not come up: {}", replica.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    for chunk in (0..orders.len()).collect::<Vec<_>>().chunks(15) {
        let work = chunk.iter().map(|i| {
            let (env, order, there) = (&env, &orders[*i], &there);
            async move {
                let name = format!("job-{i}");
                let batch = running(env, &name).await;
                let (outcome, end, reason) = ENDS[i % 3];
                let here = format!("http://127.0.0.1:{}", env.port);
                // GET's answer changes after so many deliveries; the events say what they like.
                let change_after = 1 + (i / 3) % 5;
                let mut delivered = [0; 3];
                for (n, event_index) in order.iter().enumerate() {
                    if n == change_after {
                        assert!(env.sim.finish(&batch.name, outcome)); // and its own genuine event comes, in between
                    }
                    let id = format!("msg_{i}_{event_index}");
                    let uri = if delivered[*event_index] == 0 {
                        batch.uris[0].clone()
                    } else {
                        batch.uris[0].replace(&here, there)
                    };
                    delivered[*event_index] += 1;
                    // Whoever gets no answer, for the machine is busy, comes again.
                    let start = Instant::now();
                    let status = loop {
                        let sent = env.sim.post_signed(&uri, &id, &event(EVENTS[*event_index], &batch)).await;
                        if sent.is_some() || start.elapsed() > PATIENCE {
                            break sent;
                        }
                    };
                    assert!(matches!(status, Some(200 | 503)), "{uri}: {status:?}");
                }
                let job = env.cleaned(&name).await;
                assert_eq!((state(&job), ready(&job).1.as_str()), (end, reason), "order {i}: {order:?}");
            }
        });
        futures::future::join_all(work).await;
    }
    // The watch has seen all that came before this one.
    env.create("last", spec(&["x"], None)).await;
    env.cleaned("last").await;
    let start = Instant::now();
    while !transitions.lock().unwrap().contains_key("last") {
        assert!(start.elapsed() < PATIENCE, "the watch stands still");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let transitions = transitions.lock().unwrap().clone();
    assert_eq!(transitions.len(), 91);
    assert!(transitions.values().all(|n| *n == 1), "{transitions:?}");
}

/// How often each job was seen to become finished, or to change its end.
fn watch_ends(env: &Env) -> Arc<Mutex<HashMap<String, usize>>> {
    let seen: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let (jobs, counts) = (env.jobs(), Arc::clone(&seen));
    let mut last: HashMap<String, Value> = HashMap::new();
    tokio::spawn(async move {
        let mut stream = std::pin::pin!(watcher(jobs, watcher::Config::default()).applied_objects());
        while let Ok(Some(job)) = stream.try_next().await {
            if !is_true(&job, conditions::FINISHED) {
                continue;
            }
            let status = job.status.as_ref().unwrap();
            let end = json!([status.state, status.completion_time, ready(&job).1]);
            if last.insert(job.name_any(), end.clone()) != Some(end) {
                *counts.lock().unwrap().entry(job.name_any()).or_default() += 1;
            }
        }
    });
    seen
}

/// Whoever holds a job's URL can make the operator look, but not make it ask Gemini without end.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_hints_cost_few_requests_and_change_nothing() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=86400"]).await;
    let mut timings = crate::harness::timings();
    timings.look_window = jiff::SignedDuration::from_mins(1);
    env.operator_with(timings).await;
    running(&env, "job").await;
    // Past the receiver, whose own limit would let a handful through.
    for i in 0..1000 {
        let callback = json!({"webhookId": format!("msg_{i}"), "type": "batch.succeeded", "attempt": 1,
            "receivedTime": "2026-09-01T10:00:00.000000Z"});
        let patch = Patch::Merge(json!({"status": {"callback": callback}}));
        env.jobs().patch_status("job", &PatchParams::default(), &patch).await.unwrap();
    }
    let job = env.jobs().get("job").await.unwrap();
    assert_eq!(state(&job), "Running");
    let gets: Vec<_> = env.log().into_iter().filter(|e| e.op == Op::BatchGet).map(|e| e.time).collect();
    let minute = |from: usize| {
        let within = |t: &jiff::Timestamp| t.duration_since(gets[from]) < jiff::SignedDuration::from_mins(1);
        gets[from..].iter().filter(|t| within(t)).count()
    };
    assert!((0..gets.len()).all(|from| minute(from) <= 5), "{gets:?}");
    assert!(env.metrics().await.contains("gemini_batch_callback_hints_waiting 1"));
}

/// Ten thousand verified callbacks for one job: a handful of writes, and the one that was put off is taken later.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_verified_callbacks_writes_little() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=86400"]).await;
    env.operator().await;
    let batch = running(&env, "job").await;
    let body = event("batch.succeeded", &batch);
    let started = Instant::now();
    let statuses: Vec<Option<u16>> = futures::stream::iter(0..10_000)
        .map(|i| {
            let (sim, uri, body) = (&env.sim, &batch.uris[0], &body);
            async move { sim.post_signed(uri, &format!("msg_{i}"), body).await }
        })
        .buffer_unordered(32)
        .collect()
        .await;
    let allowed = 5 + started.elapsed().as_secs() / 10 + 1;
    let taken = statuses.iter().filter(|s| **s == Some(200)).count() as u64;
    assert!((5..=allowed).contains(&taken), "{taken} of at most {allowed}");
    assert!(statuses.iter().all(|s| matches!(s, Some(200 | 503))), "never another answer");
    let hints = env.audited_writes().into_iter().filter(|(resource, _)| resource == "hints").count() as u64;
    assert!(hints <= allowed, "{hints}");
    // The end is told in the midst of it: put off, retried by the sender, and found.
    assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
    assert_eq!(state(&env.finished("job").await), "Succeeded");
}

/// URIs in payloads are never fetched, and keys never taken from where a signature says.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_a_payload_is_ever_called() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let env = Env::new().await;
    env.operator().await;
    let batch = running(&env, "job").await;
    let id = batch.name.trim_start_matches("batches/");
    for (i, data) in [
        json!({"id": id, "output_file_uri": format!("http://{address}/out.jsonl"), "file_name": format!("http://{address}/x")}),
        json!({"id": format!("http://{address}/../batches/x")}),
        json!({"id": "../../files/x"}),
        json!({"id": "x%2e%2e%2fy"}),
        json!({"id": "x\ny"}),
    ]
    .into_iter()
    .enumerate()
    {
        let body = json!({"type": "batch.succeeded", "version": "v1", "data": data}).to_string();
        let answer = env.sim.post_signed(&batch.uris[0], &format!("msg_{i}"), &body).await;
        assert_eq!(answer, Some(200), "a hint all the same");
    }
    // A JWT that says where its key is to be had.
    let part = |value: Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
    let elsewhere = format!("http://{address}/keys");
    let header = part(json!({"alg": "RS256", "kid": "x", "jku": elsewhere, "x5u": elsewhere}));
    let jwt = format!("{header}.{}.{}", part(json!({"aud": batch.uris[0]})), part(json!("x".repeat(250))));
    let answer = reqwest::Client::new()
        .post(&batch.uris[0])
        .header("webhook-id", "msg_jku")
        .header("webhook-timestamp", env.sim.now().as_second())
        .header("webhook-signature", jwt)
        .body("{}")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 401);
    assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    let known = |e: &gemini_simulator::LogEntry| {
        e.op != Op::Unknown && !e.path.contains("..") && !e.path.contains('%')
    };
    assert!(env.log().iter().all(known), "{:#?}", env.log());
    let called = tokio::time::timeout(Duration::from_millis(10), listener.accept()).await;
    assert!(called.is_err(), "somebody called what a payload named");
}

/// A key roll at Google: the first callback signed with a key that we lack makes us fetch it. Within the cooldown
/// it is refused, and taken when it comes again: long before the set would have been fetched anyway.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_roll_loses_no_callback() {
    let env = Env::scaled(20.0, &["--sweep-seconds=864000"]).await;
    env.operator_with(gemini_batch_operator::controller::Timings::default()).await;
    let fetches = || env.sim.log().iter().filter(|e| e.op == Op::Jwks).count();
    let (first, second) = (running(&env, "first").await, running(&env, "second").await);
    let start = Instant::now();
    while fetches() == 0 {
        assert!(start.elapsed() < PATIENCE, "the keys are not fetched");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (batch, name) in [(&first, "first"), (&second, "second")] {
        env.sim.roll_keys();
        assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
        assert_eq!(state(&env.finished(name).await), "Succeeded");
    }
    let statuses: Vec<_> = env.sim.deliveries().iter().map(|d| d.status).collect();
    assert!(statuses.contains(&Some(401)), "the rolls were not noticed: {statuses:?}");
    for batch in [&first, &second] {
        let tries: Vec<_> = env.sim.deliveries().into_iter().filter(|d| d.batch == batch.name).collect();
        assert_eq!(tries.last().unwrap().status, Some(200));
        let took = tries.last().unwrap().time.duration_since(tries[0].time);
        assert!(took < jiff::SignedDuration::from_mins(5), "{took}: only when the set was fetched anyway?");
    }
    assert!((2..=4).contains(&fetches()), "{}", fetches());
}

/// Google's key endpoint is away for an hour: the keys at hand serve on.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_endpoint_that_is_down_loses_no_callback() {
    let env = Env::scaled(600.0, &["--sweep-seconds=8640000"]).await;
    env.operator_with(gemini_batch_operator::controller::Timings::default()).await;
    env.create("before", spec(&["x"], None)).await;
    env.cleaned("before").await;
    let effect = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::Jwks, contains: String::new(), skip: 0, times: 1_000_000, effect });
    let start = env.sim.now();
    let mut n = 0;
    while env.sim.now().duration_since(start) < jiff::SignedDuration::from_hours(1) {
        let name = format!("during-{n}");
        env.create(&name, spec(&["x"], None)).await;
        assert_eq!(state(&env.cleaned(&name).await), "Succeeded");
        n += 1;
    }
    assert!(env.sim.log().iter().any(|e| e.op == Op::Jwks && e.status == "503"), "it was asked in vain");
    assert!(env.sim.deliveries().iter().all(|d| d.status == Some(200)));
}

/// A callback after the end that says otherwise: Gemini is asked once, it is said, and the end stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_contradiction_after_the_end_is_looked_into_and_said() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=86400"]).await;
    env.operator().await;
    let batch = running(&env, "job").await;
    assert!(env.sim.finish(&batch.name, Outcome::Failed));
    let before = env.cleaned("job").await;
    let gets = env.count(Op::BatchGet);
    for (id, type_) in [("msg_same", "batch.failed"), ("msg_other", "batch.succeeded")] {
        assert_eq!(env.sim.post_signed(&batch.uris[0], id, &event(type_, &batch)).await, Some(200));
    }
    let observed = |j: &GeminiBatchJob| {
        let hint = j.status.as_ref().unwrap().attempts[0].observed_hint.as_deref();
        hint.is_some_and(|hint| hint.starts_with("msg_other@"))
    };
    let after = env.until("job", "told of the contradiction", observed).await;
    assert_eq!((state(&after), ready(&after)), (state(&before), ready(&before)));
    assert_eq!(after.status.unwrap().completion_time, before.status.unwrap().completion_time);
    assert_eq!(env.count(Op::BatchGet), gets + 1, "the one that says the same is no reason to ask");
    let events =
        crate::harness::kubectl(&env, &["get", "events", "-o", "jsonpath={.items[*].message}"]).unwrap();
    assert!(
        events.contains("a callback said batch.succeeded") && events.contains("Gemini still says FAILED"),
        "{events}"
    );
    assert!(env.metrics().await.contains("gemini_batch_callback_contradictions_total 1"));
}

/// A hint that was early is told apart from one that led to the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_hint_that_waits_is_told_from_one_that_was_acted_on() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=86400"]).await;
    let mut timings = crate::harness::timings();
    timings.hint_pauses = vec![jiff::SignedDuration::from_secs(2)];
    env.operator_with(timings).await;
    let batch = running(&env, "job").await;
    env.sim.post_signed(&batch.uris[0], "msg_1", &event("batch.succeeded", &batch)).await;
    let waits = |job: &GeminiBatchJob| ready(job).2.contains("a callback said batch.succeeded");
    env.until("job", "told of the waiting hint", waits).await;
    assert!(env.metrics().await.contains("gemini_batch_callback_hints_waiting 1"));
    env.until("job", "done looking", |j| !waits(j)).await;
    let start = Instant::now();
    while !env.metrics().await.contains("gemini_batch_callback_hints_waiting 0") {
        assert!(start.elapsed() < PATIENCE);
        tokio::task::yield_now().await;
    }
    assert!(env.metrics().await.contains("gemini_batch_callback_hints_observed_total 1"));
    assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
    assert_eq!(state(&env.finished("job").await), "Succeeded");
    env.sim.set(Switches::default());
}
