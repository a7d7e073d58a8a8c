//! The ceiling of active batches for each API key, and the pauses after a refusal for lack of quota.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use gemini_batch_operator::api::GeminiBatchJob;
use gemini_batch_operator::controller::Timings;
use gemini_simulator::{Config, Effect, Fault, LogEntry, Op, Outcome};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::harness::{Env, PATIENCE, is_true, line, ready, spec, state, timings, with_input};

fn config(speed: f64, max_active: usize) -> Config {
    Config { speed, max_active, ..Config::default() }
}

fn creates(env: &Env) -> Vec<LogEntry> {
    env.log().into_iter().filter(|e| e.op == Op::BatchCreate).collect()
}

/// A job with a key of its own.
fn with_key(secret: &str) -> Value {
    let mut spec = spec(&["x"], None);
    spec["credentials"]["secretRef"]["name"] = json!(secret);
    spec
}

fn refuse(env: &Env, contains: &str, times: u32, retry_after: Option<u32>) {
    let effect = Effect::Status { code: 429, commit: false, envelope: true, retry_after };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: contains.to_owned(), skip: 0, times, effect });
}

async fn queued(env: &Env, name: &str, reason: &str) {
    env.until(name, &format!("queued by {reason}"), |j| state(j) == "Queued" && ready(j).1 == reason).await;
}

/// Waits until all jobs have succeeded.
async fn all_succeed(env: &Env, count: usize, patience: Duration) {
    let start = Instant::now();
    loop {
        let jobs = env.jobs().list(&ListParams::default()).await.unwrap().items;
        let done = jobs.iter().filter(|j| state(j) == "Succeeded").count();
        if done == count {
            return;
        }
        if start.elapsed() > patience {
            let mut states: BTreeMap<_, usize> = BTreeMap::new();
            for job in &jobs {
                *states.entry((state(job), ready(job).1)).or_default() += 1;
            }
            panic!("{done} of {count} have succeeded: {states:?}");
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn active(env: &Env) -> usize {
    let batches = env.sim.batches();
    batches.iter().filter(|b| ["PENDING", "RUNNING"].contains(&b.state.as_str())).count()
}

/// Status writes and other writes to each job that the API server took, from its audit log.
fn writes(env: &Env) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for e in env.audited() {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        if e["stage"] == "ResponseComplete"
            && e["objectRef"]["namespace"] == *env.namespace
            && e["objectRef"]["resource"] == "geminibatchjobs"
            && e["verb"] == "patch"
            && e["responseStatus"]["code"] == 200
            && text(&e["userAgent"]).starts_with("gemini-batch-operator")
            && !text(&e["requestURI"]).contains("fieldManager=gemini-batch-receiver")
        {
            *all.entry(text(&e["objectRef"]["name"])).or_default() += 1;
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_jobs_behind_a_ceiling_of_eighty() {
    // The simulator refuses what exceeds it.
    let env = Env::with(config(300.0, 80), &["--sweep-seconds=86400"]).await;
    env.operator().await;
    let names: Vec<String> = (0..500).map(|i| format!("job-{i:03}")).collect();
    let stalls = spec(&["[[sim:job=stall]]"], None);
    join_all(names[..80].iter().map(|name| env.create(name, stalls.clone()))).await;
    join_all(names[80..].iter().map(|name| env.create(name, spec(&["hello"], None)))).await;
    let start = Instant::now();
    while active(&env) < 80 || !env.metrics().await.contains("queued_jobs{reason=\"WaitingForSlot\"} 420") {
        assert!(start.elapsed() < PATIENCE * 2, "{}", env.metrics().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let batches = env.sim.batches();
    assert_eq!(batches.len(), 80);
    assert!(batches.iter().all(|b| env.sim.finish(&b.name, Outcome::Succeeded)));
    all_succeed(&env, 500, PATIENCE * 3).await;
    let creates = creates(&env);
    assert_eq!((creates.len(), creates.iter().filter(|e| e.status == "200").count()), (500, 500));
    for op in [Op::UploadStart, Op::BatchGet, Op::Download] {
        assert_eq!(env.count(op), 500, "{op:?}");
    }
    // Finalizer, that it waits, intent, name, end, finalizer.
    let writes = writes(&env);
    assert!(
        writes.values().all(|n| *n <= 6),
        "{:?}",
        writes.iter().filter(|(_, n)| **n > 6).collect::<Vec<_>>()
    );
    let metrics = env.metrics().await;
    assert!(metrics.contains("gemini_batch_queued_jobs{reason=\"WaitingForSlot\"} 0"), "{metrics}");
}

/// A hundred at once, an hour each: as many requests as if they took a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_jobs_at_once_for_an_hour_cost_a_create_and_a_get_each() {
    let factor = 120.0;
    let running = Duration::from_hours(1);
    let config = Config { running, max_active: 100, ..Env::scaled_config(factor) };
    let cluster = crate::harness::shared_cluster();
    let env = Env::on_scaled(cluster, config, &["--max-active-batches=100"]).await;
    env.operator_with(Timings::default()).await;
    let names: Vec<String> = (0..100).map(|i| format!("job-{i:03}")).collect();
    join_all(names.iter().map(|name| env.create(name, spec(&["hello"], None)))).await;
    let (mut most, mut shown) = (0, String::new());
    let start = Instant::now();
    while most < 100 {
        assert!(start.elapsed() < PATIENCE, "at most {most} at once");
        most = most.max(active(&env));
        tokio::task::yield_now().await;
    }
    while !shown.contains("\"} 100") {
        assert!(start.elapsed() < PATIENCE, "{shown}");
        shown = env.metrics().await.lines().filter(|l| l.contains("active_batches{")).collect();
    }
    all_succeed(&env, 100, PATIENCE).await;
    let creates = creates(&env);
    assert_eq!((creates.len(), creates.iter().filter(|e| e.status == "200").count()), (100, 100));
    assert_eq!(env.count(Op::BatchGet), 100);
    // Every ten minutes, from the first to the last.
    assert!((2..=15).contains(&env.count(Op::BatchList)), "{}", env.count(Op::BatchList));
    // None of them had to wait: finalizer, intent, name, end, finalizer.
    let writes = writes(&env);
    assert!(writes.values().all(|n| *n <= 5), "{writes:?}");
}

/// Waits until the next job has a later creation time: it is kept in whole seconds.
async fn a_second_after(job: &GeminiBatchJob) {
    let born = job.metadata.creation_timestamp.as_ref().unwrap().0;
    let start = Instant::now();
    while Timestamp::now().as_second() <= born.as_second() {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// In what order the jobs were sent.
async fn order(env: &Env) -> Vec<String> {
    let jobs = env.jobs().list(&ListParams::default()).await.unwrap().items;
    let name_of = |create: &LogEntry| {
        let body = create.body.clone().unwrap();
        let display_name = body["batch"]["displayName"].as_str().unwrap();
        let job = jobs.iter().find(|j| display_name.contains(&j.uid().unwrap()));
        job.map(kube::ResourceExt::name_any).unwrap_or_default()
    };
    creates(env).iter().map(name_of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn first_come_first_served_across_a_kill() {
    let env = Env::with(config(600.0, 1), &["--max-active-batches=1"]).await;
    let mut first = env.spawn(None);
    // Older than the others, though its name comes last.
    let z = env.create("z", spec(&["[[sim:job=stall]]"], None)).await;
    a_second_after(&z).await;
    env.until("z", "running", |j| state(j) == "Running").await;
    for name in ["a", "b", "c", "d", "e"] {
        env.create(name, spec(&["x"], None)).await;
        queued(&env, name, "WaitingForSlot").await;
    }
    let job = env.jobs().get("e").await.unwrap();
    let message = ready(&job).2;
    assert!(message.starts_with("1 batches of this API key are active"), "{message}");
    assert!(!is_true(&job, "Stalled"));
    first.kill();
    a_second_after(&job).await;
    // Younger than all others, and first in the alphabet.
    env.create("0", spec(&["x"], None)).await;
    let _second = env.spawn(None);
    queued(&env, "0", "WaitingForSlot").await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    all_succeed(&env, 7, PATIENCE).await;
    assert_eq!(order(&env).await, ["z", "a", "b", "c", "d", "e", "0"]);
    assert!(creates(&env).iter().all(|e| e.status == "200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_behind_a_job_that_cannot_be_sent() {
    let env = Env::with(config(600.0, 1), &["--max-active-batches=1", "--sweep-seconds=86400"]).await;
    env.secret("own", &json!({"apiKey": "test-key"})).await;
    env.config_map("in", &json!({"lines": line("a", "x")})).await;
    env.operator().await;
    env.create("first", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("first", "running", |j| state(j) == "Running").await;
    let from_map = with_input(json!({"configMap": {"name": "in", "key": "lines"}}), None);
    for (name, spec) in [
        ("a-no-key", with_key("own")),
        ("b-bad-input", from_map),
        ("c-deleted", spec(&["x"], None)),
        ("d-good", spec(&["x"], None)),
    ] {
        env.create(name, spec).await;
        queued(&env, name, "WaitingForSlot").await;
    }
    let secrets: Api<Secret> = Api::namespaced(env.client.clone(), &env.namespace);
    secrets.delete("own", &DeleteParams::default()).await.unwrap();
    env.config_map("in", &json!({"lines": "not json"})).await;
    env.delete("c-deleted").await;
    env.gone("c-deleted").await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    assert_eq!(state(&env.finished("d-good").await), "Succeeded");
    env.stalled("a-no-key", "CredentialsNotFound").await;
    env.stalled("b-bad-input", "InputInvalid").await;
    // Mended, they go on.
    env.secret("own", &json!({"apiKey": "test-key"})).await;
    env.config_map("in", &json!({"lines": line("a", "x")})).await;
    assert_eq!(state(&env.finished("a-no-key").await), "Succeeded");
    assert_eq!(state(&env.finished("b-bad-input").await), "Succeeded");
    assert!(creates(&env).iter().all(|e| e.status == "200"), "the ceiling held");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_being_deleted_keeps_its_slot_until_it_is_gone() {
    let env = Env::with(config(600.0, 1), &["--max-active-batches=1"]).await;
    let effect = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::BatchCancel, contains: String::new(), skip: 0, times: 3, effect });
    env.operator().await;
    env.create("first", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("first", "running", |j| state(j) == "Running").await;
    env.create("second", spec(&["x"], None)).await;
    queued(&env, "second", "WaitingForSlot").await;
    env.delete("first").await;
    assert_eq!(state(&env.finished("second").await), "Succeeded");
    let ops = env.ops();
    let last_cancel = ops.iter().rposition(|o| *o == Op::BatchCancel).unwrap();
    let second = ops.iter().rposition(|o| *o == Op::BatchCreate).unwrap();
    assert!(ops.iter().filter(|o| **o == Op::BatchCancel).count() == 4 && last_cancel < second, "{ops:?}");
    assert!(creates(&env).iter().all(|e| e.status == "200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_without_quota_does_not_hold_up_another() {
    let env = Env::with(config(600.0, 100), &[]).await;
    env.secret("other", &json!({"apiKey": "other-key"})).await;
    let hour = SignedDuration::from_hours(1);
    env.operator_with(Timings { quota_first: hour, quota_longest: hour, ..timings() }).await;
    refuse(&env, "", 1, None);
    env.create("refused", spec(&["x"], None)).await;
    queued(&env, "refused", "WaitingForQuota").await;
    env.create("same", spec(&["x"], None)).await;
    queued(&env, "same", "WaitingForQuota").await;
    let message = ready(&env.jobs().get("same").await.unwrap()).2;
    assert!(message.contains("refused another batch of this API key"), "{message}");
    env.create("other", with_key("other")).await;
    assert_eq!(state(&env.finished("other").await), "Succeeded");
    assert_eq!(creates(&env).len(), 2, "nothing was sent with the first key meanwhile");
    // The Secret gets another key: the pause is not the job's.
    env.secret("gemini", &json!({"apiKey": "other-key"})).await;
    env.jobs()
        .patch(
            "same",
            &kube::api::PatchParams::default(),
            &kube::api::Patch::Merge(json!({"metadata": {"labels": {"wake": "up"}}})),
        )
        .await
        .unwrap();
    assert_eq!(state(&env.finished("same").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_pause_one_tries_and_the_others_follow_its_success() {
    let env = Env::with(config(600.0, 100), &[]).await;
    let first = SignedDuration::from_secs(2);
    env.operator_with(Timings { quota_first: first, quota_longest: first * 60, ..timings() }).await;
    refuse(&env, "", 3, None);
    env.create("job-00", spec(&["x"], None)).await;
    queued(&env, "job-00", "WaitingForQuota").await;
    let names: Vec<String> = (1..20).map(|i| format!("job-{i:02}")).collect();
    join_all(names.iter().map(|name| env.create(name, spec(&["x"], None)))).await;
    all_succeed(&env, 20, PATIENCE).await;
    let creates = creates(&env);
    let refused = creates.iter().filter(|e| e.status == "429").count();
    assert_eq!((creates.len(), refused), (23, 3));
    let pause = |n: usize| creates[n].time.duration_since(creates[n - 1].time);
    assert!(creates[..3].iter().all(|e| e.status == "429"));
    assert!(pause(1) >= first && pause(2) >= first * 2 && pause(3) >= first * 4, "{creates:#?}");
    // The fifth was not even uploaded before the fourth was created.
    let log = env.log();
    let between = log.iter().filter(|e| e.op == Op::UploadStart && e.seq < creates[3].seq);
    assert!(between.count() <= 4, "{log:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_gemini_asks_to_wait_is_waited_by_a_new_leader_too() {
    let env = Env::scaled(30.0, &[]).await;
    refuse(&env, "", 1, Some(200));
    let mut first = env.spawn(None);
    env.create("job", spec(&["x"], None)).await;
    queued(&env, "job", "WaitingForQuota").await;
    first.kill();
    let job = env.jobs().get("job").await.unwrap();
    let refusal = job.status.unwrap().attempts[0].refusal.clone().unwrap();
    let wait = refusal.retry_time.0.duration_since(refusal.time.0);
    assert!(wait >= SignedDuration::from_secs(200), "{refusal:?}");
    let _second = env.spawn(None);
    env.create("another", spec(&["x"], None)).await;
    queued(&env, "another", "WaitingForQuota").await;
    all_succeed(&env, 2, PATIENCE).await;
    let creates = creates(&env);
    assert!(creates[1].time >= refusal.retry_time.0, "{creates:#?}");
    // Whoever was refused lets those try who were not.
    assert_eq!(order(&env).await, ["job", "another", "job"]);
}
