//! What is found by listing: ends that no callback told, batches of a restored etcd, duplicates, strangers.

use std::time::Instant;

use futures::future::join_all;
use gemini_batch_operator::api::GeminiBatchJob;
use gemini_simulator::{Config, Effect, Fault, Op, Outcome, Switches};
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::harness::{Env, MODEL, PATIENCE, counts, is_true, line, ready, spec, state};

fn stalls() -> serde_json::Value {
    spec(&["[[sim:job=stall]]"], None)
}

async fn quick(sweep: &str) -> Env {
    Env::with(Config { speed: 600.0, ..Config::default() }, &[sweep]).await
}

async fn until(what: &str, wanted: impl AsyncFn() -> bool) {
    let start = Instant::now();
    while !wanted().await {
        assert!(start.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

async fn metric(env: &Env, line: &str) -> bool {
    env.metrics().await.lines().any(|l| l.trim_start_matches("gemini_batch_") == line)
}

async fn told(env: &Env, reason: &str, about: &str) -> bool {
    let events: Api<Event> = Api::namespaced(env.client.clone(), &env.namespace);
    let all = events.list(&ListParams::default()).await.unwrap().items;
    all.iter().any(|e| {
        e.reason.as_deref() == Some(reason)
            && e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(about)
    })
}

/// A batch that somebody created with that name, with our key; it goes on until it is ended.
async fn by_hand(env: &Env, display_name: &str) -> String {
    let http = reqwest::Client::new();
    let post = |url: String| http.post(url).header("x-goog-api-key", "test-key");
    let file = format!("files/by-hand-{}", env.sim.files().len());
    let start = post(format!("{}/upload/v1beta/files", env.sim.base_url()))
        .header("x-goog-upload-protocol", "resumable")
        .header("x-goog-upload-command", "start")
        .body(json!({"file": {"name": file}}).to_string())
        .send()
        .await
        .unwrap();
    let url = start.headers()["x-goog-upload-url"].to_str().unwrap().to_owned();
    let upload = http
        .post(url)
        .header("x-goog-upload-command", "upload, finalize")
        .header("x-goog-upload-offset", "0");
    upload.body(line("k1", "[[sim:job=stall]]")).send().await.unwrap();
    let create = post(format!("{}/v1beta/models/{MODEL}:batchGenerateContent", env.sim.base_url()))
        .body(json!({"batch": {"displayName": display_name, "inputConfig": {"fileName": file}}}).to_string());
    let answer = create.header("content-type", "application/json").send().await.unwrap();
    let answer: serde_json::Value = answer.json().await.unwrap();
    answer["name"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

fn is_cancelled(env: &Env, batch: &str) -> bool {
    env.sim.batches().iter().any(|b| b.name == batch && b.cancelled)
}

fn batch_of(job: &GeminiBatchJob) -> String {
    job.status.as_ref().unwrap().attempts[0].batch_name.clone().unwrap()
}

/// What a restored backup does: the job is as it was before anything was sent.
async fn restore(env: &Env, name: &str) {
    let status = json!({"status": {"state": "Pending", "attempts": null, "conditions": [], "callback": null,
        "requests": null, "startTime": null}});
    env.jobs().patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_callback_lost_all_jobs_still_finish() {
    let env = quick("--sweep-seconds=1").await;
    env.sim.set(Switches { lose_events: true, ..Switches::default() });
    env.operator().await;
    let names: Vec<String> = (0..20).map(|i| format!("job-{i}")).collect();
    join_all(names.iter().map(|name| env.create(name, spec(&["x"], None)))).await;
    for name in &names {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded");
    }
    assert_eq!((env.count(Op::BatchCreate), env.count(Op::BatchGet)), (20, 20));
    assert!(metric(&env, "ends_learned_total{by=\"sweep\"} 20").await, "{}", env.metrics().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_counted_how_an_end_was_learned() {
    let env = quick("--sweep-seconds=86400").await;
    env.operator().await;
    env.create("told", spec(&["x"], None)).await;
    env.cleaned("told").await;
    assert!(metric(&env, "ends_learned_total{by=\"callback\"} 1").await, "{}", env.metrics().await);
    env.create("deleted", stalls()).await;
    env.until("deleted", "running", |j| state(j) == "Running").await;
    env.delete("deleted").await;
    env.gone("deleted").await;
    until("the deletion is not counted", async || {
        metric(&env, "ends_learned_total{by=\"cancellation\"} 1").await
    })
    .await;
    let mut model = spec(&["x"], None);
    model["model"] = json!("gpt-nope");
    env.create("refused", model).await;
    env.cleaned("refused").await;
    assert!(metric(&env, "ends_learned_total{by=\"other\"} 1").await, "{}", env.metrics().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_batches_for_one_attempt_the_recorded_one_is_kept() {
    let env = quick("--sweep-seconds=1").await;
    env.operator().await;
    let job = env.create("job", stalls()).await;
    let uid = job.uid().unwrap();
    let stranger = by_hand(&env, "gbo-test-0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11-1-someother").await;
    let foreign = by_hand(&env, &format!("gbo-elsewhere-{uid}-1-someother")).await;
    let ended = by_hand(&env, &format!("gbo-test-{uid}-1-ended")).await;
    assert!(env.sim.finish(&ended, Outcome::Succeeded));
    let job = env.until("job", "running", |j| state(j) == "Running").await;
    let duplicate = by_hand(&env, &format!("gbo-test-{uid}-1-duplicate")).await;
    until("the duplicate goes on", async || is_cancelled(&env, &duplicate)).await;
    until("nobody is told", async || told(&env, "DuplicateCancelled", "job").await).await;
    until("the stranger is not counted", async || metric(&env, "unknown_batches 1").await).await;
    assert!(metric(&env, "duplicates_healed_total 1").await, "{}", env.metrics().await);
    // A few sweeps later as well.
    let lists = env.count(Op::BatchList);
    until("it does not sweep any more", async || env.count(Op::BatchList) > lists + 2).await;
    for batch in [&batch_of(&job), &stranger, &foreign, &ended] {
        assert!(!is_cancelled(&env, batch), "{batch}: {:#?}", env.sim.batches());
    }
    assert_eq!(env.count(Op::BatchCancel), 1);
    assert!(env.sim.finish(&batch_of(&job), Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_etcd_finds_its_batches_again() {
    let env = quick("--sweep-seconds=86400").await;
    let mut first = env.spawn(None);
    env.create("job", stalls()).await;
    let before = env.until("job", "running", |j| state(j) == "Running").await;
    env.create("other", stalls()).await;
    let other = env.until("other", "running", |j| state(j) == "Running").await;
    first.kill();
    restore(&env, "job").await;
    let _second = env.spawn(None);
    env.create("new", spec(&["x"], None)).await;
    let job = env.until("job", "running", |j| state(j) == "Running").await;
    assert_eq!(batch_of(&job), batch_of(&before));
    assert!(is_true(&job, "Submitted"));
    assert_eq!(state(&env.cleaned("new").await), "Succeeded");
    assert_eq!(
        (env.count(Op::BatchCreate), env.count(Op::BatchList)),
        (3, 1),
        "one listing, before the first"
    );
    let ops = env.ops();
    let list = ops.iter().position(|o| *o == Op::BatchList).unwrap();
    let third = ops.iter().rposition(|o| *o == Op::UploadStart).unwrap();
    assert!(list < third, "{ops:?}");
    assert!(metric(&env, "batches_adopted_total 1").await, "{}", env.metrics().await);
    for job in [&job, &other] {
        assert!(env.sim.finish(&batch_of(job), Outcome::Succeeded));
        assert_eq!(state(&env.cleaned(&job.name_any()).await), "Succeeded", "its callback is still good");
    }
    assert!(env.sim.batches().iter().all(|b| !b.cancelled));
}

/// It had ended when the backup was restored, and a second one for the same attempt goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_job_takes_the_batch_that_succeeded_and_its_twin_is_cancelled() {
    let env = quick("--sweep-seconds=1").await;
    let mut first = env.spawn(None);
    env.create("job", spec(&["x [[sim:job=stall]]"], Some("out"))).await;
    let job = env.until("job", "running", |j| state(j) == "Running").await;
    first.kill();
    let twin = by_hand(&env, &format!("gbo-test-{}-1-twin", job.uid().unwrap())).await;
    assert!(env.sim.finish(&batch_of(&job), Outcome::Succeeded));
    restore(&env, "job").await;
    // Something else is active, so that there is something to sweep.
    env.create("other", stalls()).await;
    let _second = env.spawn(None);
    let done = env.cleaned("job").await;
    assert_eq!((batch_of(&done), state(&done), counts(&done)), (batch_of(&job), "Succeeded", (1, 1, 0)));
    assert!(env.config_maps().get("out").await.unwrap().data.unwrap()["results.jsonl"].contains("k1"));
    until("the twin goes on", async || is_cancelled(&env, &twin)).await;
    assert_eq!(env.count(Op::BatchCreate), 3, "job, its twin, other");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_before_the_listing_of_its_key_has_succeeded() {
    let env = quick("--sweep-seconds=86400").await;
    let mut first = env.spawn(None);
    env.create("before", spec(&["x"], None)).await;
    env.cleaned("before").await;
    assert_eq!(env.count(Op::BatchList), 0, "nobody led before");
    first.kill();
    let effect = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::BatchList, contains: String::new(), skip: 0, times: 3, effect });
    env.secret("other", &json!({"apiKey": "other-key"})).await;
    let _second = env.spawn(None);
    env.create("a", spec(&["x"], None)).await;
    let job = env.until("a", "told of the trouble", |j| ready(j).1 == "GeminiUnavailable").await;
    assert!(ready(&job).2.contains("listing batches before the first submission fails"), "{:?}", ready(&job));
    assert_eq!(env.count(Op::BatchCreate), 1);
    env.create("b", spec(&["x"], None)).await;
    for name in ["a", "b"] {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded");
    }
    assert_eq!(env.count(Op::BatchList), 4, "three in vain");
    let mut with_other = spec(&["x"], None);
    with_other["credentials"]["secretRef"]["name"] = json!("other");
    env.create("c", with_other).await;
    assert_eq!(state(&env.cleaned("c").await), "Succeeded");
    assert_eq!(env.count(Op::BatchList), 5, "one for each key");
}
