//! What users may ask of a job besides running, each alone, changed while the job runs, and together with its
//! deletion.

use gemini_batch_operator::api::{GeminiBatchJob, conditions};
use gemini_batch_operator::controller::Timings;
use gemini_simulator::{BatchView, Config, Effect, Fault, Op, Outcome, Switches};
use jiff::SignedDuration;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::harness::{
    Env, PATIENCE, condition, counts, is_true, line, ready, spec, state, timings, with_input,
};

/// Runs until the test ends it.
pub const LONG: &str = "[[sim:work=9000000]]";

/// A spec with more fields.
#[expect(clippy::needless_pass_by_value, reason = "callers build the value in place")]
pub fn with(mut spec: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        spec[name] = value.clone();
    }
    spec
}

pub async fn edit(env: &Env, name: &str, spec: Value) -> GeminiBatchJob {
    let patch = Patch::Merge(json!({ "spec": spec }));
    env.jobs().patch(name, &PatchParams::default(), &patch).await.unwrap()
}

pub async fn running(env: &Env, name: &str) -> GeminiBatchJob {
    env.until(name, "running", |j| state(j) == "Running").await
}

pub async fn suspended(env: &Env, name: &str) -> GeminiBatchJob {
    env.until(name, "suspended", |j| state(j) == "Suspended").await
}

/// Waits for what the simulator shows.
pub async fn until(what: &str, wanted: impl Fn() -> bool) {
    let shown = tokio::time::timeout(PATIENCE, async {
        while !wanted() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    assert!(shown.await.is_ok(), "{what} did not come");
}

/// The one batch that is not over.
pub fn live(env: &Env) -> Vec<BatchView> {
    let live = |b: &BatchView| ["PENDING", "RUNNING"].contains(&b.state.as_str());
    env.sim.batches().into_iter().filter(live).collect()
}

pub fn attempts(job: &GeminiBatchJob) -> Vec<gemini_batch_operator::api::Attempt> {
    job.status.clone().unwrap().attempts
}

/// Lines of the stored results.
pub async fn results(env: &Env) -> Vec<Value> {
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    data["results.jsonl"].lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

pub fn keys(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|l| l["key"].as_str().unwrap()).collect()
}

/// An operator that sweeps each second.
pub async fn started() -> Env {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.operator().await;
    env
}

/// So many cancellations are answered with this HTTP status.
fn cancel_fails(env: &Env, code: u16, times: u32) {
    let effect = Effect::Status { code, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::BatchCancel, contains: String::new(), skip: 0, times, effect });
}

/// A running batch that is cancelled succeeds, with half of its requests never answered.
fn races(env: &Env) {
    env.sim.set(Switches { cancel_race: true, ..env.sim.switches() });
}

// ------------------------------------------------------------------------------------- suspend

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_job_asks_nothing_of_gemini_until_it_is_resumed() {
    let env = started().await;
    env.create("job", with(spec(&["a"], Some("out")), json!({"suspend": true}))).await;
    let job = suspended(&env, "job").await;
    assert!(is_true(&job, conditions::SUSPENDED) && !is_true(&job, conditions::STALLED));
    assert_eq!(ready(&job).1, "Suspended");
    assert!(env.ops().is_empty(), "{:?}", env.ops());
    assert!(attempts(&job).is_empty(), "the input may still be edited");
    edit(&env, "job", json!({"input": {"requests": [{"key": "other", "prompt": "b"}]}})).await;
    edit(&env, "job", json!({"suspend": false})).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)));
    assert!(!is_true(&job, conditions::SUSPENDED));
    assert_eq!(keys(&results(&env).await), ["other"]);
    assert_eq!(env.count(Op::BatchCreate), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_drained_by_default() {
    let env = started().await;
    env.create("job", spec(&[LONG], None)).await;
    running(&env, "job").await;
    edit(&env, "job", json!({"suspend": true})).await;
    let job = env.until("job", "told", |j| ready(j).2.contains("It may finish")).await;
    assert_eq!(state(&job), "Running");
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)));
    assert_eq!(env.count(Op::BatchCancel), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_job_starts_nothing_new() {
    let env = started().await;
    env.create("job", with(spec(&[LONG], None), json!({"backoffLimit": 3}))).await;
    running(&env, "job").await;
    edit(&env, "job", json!({"suspend": true})).await;
    env.until("job", "told", |j| ready(j).2.contains("It may finish")).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Expired));
    let job = suspended(&env, "job").await;
    assert_eq!(attempts(&job)[0].outcome.as_ref().unwrap().reason, "BatchExpired");
    assert_eq!(env.count(Op::BatchCreate), 1);
    edit(&env, "job", json!({"suspend": false})).await;
    until("the next batch", || live(&env).len() == 1).await;
    assert!(env.sim.finish(&live(&env)[0].name, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_suspension_keeps_what_there_is_and_goes_on_with_the_rest() {
    for output in [Some("out"), None] {
        let env = started().await;
        races(&env);
        env.create("job", with(spec(&[LONG, "b", "c", "d"], output), json!({"suspendPolicy": "Cancel"})))
            .await;
        running(&env, "job").await;
        until("the batch at work", || live(&env).iter().any(|b| b.state == "RUNNING")).await;
        edit(&env, "job", json!({"suspend": true})).await;
        let job = suspended(&env, "job").await;
        let first = &attempts(&job)[0];
        assert_eq!(first.cancellation.as_ref().unwrap().reason, "Suspended");
        let outcome = first.outcome.as_ref().unwrap();
        assert_eq!((outcome.reason.as_str(), outcome.succeeded, outcome.failed), ("Suspended", 2, 0));
        let requests = job.status.as_ref().unwrap().requests.unwrap();
        assert_eq!((requests.succeeded, requests.failed, requests.pending), (2, 0, 2));
        assert!(job.status.as_ref().unwrap().start_time.is_none(), "its time does not run");
        if output.is_some() {
            assert_eq!(keys(&results(&env).await).len(), 4, "what there is is stored at once");
        }
        env.sim.set(Switches::default());
        edit(&env, "job", json!({"suspend": false})).await;
        let job = env.cleaned("job").await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (4, 4, 0)), "{:?}", ready(&job));
        let second = &attempts(&job)[1];
        assert_eq!((second.number, second.request_count), (2, Some(2)), "only what was missing");
        let batches = env.sim.batches();
        assert_eq!((batches.len(), batches[0].requests, batches[1].requests), (2, 4, 2));
        if output.is_some() {
            let lines = results(&env).await;
            assert_eq!(keys(&lines), ["k1", "k2", "k3", "k4"]);
            assert!(lines.iter().all(|l| l["response"].is_object()));
            // The tokens of all four, those of the first batch among them.
            let usage = job.status.as_ref().unwrap().usage.unwrap().total_tokens;
            let sum: i64 = lines
                .iter()
                .map(|l| l["response"]["usageMetadata"]["totalTokenCount"].as_i64().unwrap())
                .sum();
            assert_eq!(usage, sum);
        }
        assert!(
            env.sim.files().iter().all(|f| f.contains("batch-")),
            "input files are gone: {:?}",
            env.sim.files()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_job_waits_until_the_cancelled_batch_is_over() {
    let env = started().await;
    env.create("job", with(spec(&[LONG], None), json!({"suspendPolicy": "Cancel"}))).await;
    running(&env, "job").await;
    // The cancellation does not get through for a while.
    cancel_fails(&env, 503, 3);
    edit(&env, "job", json!({"suspend": true})).await;
    let job = env.until("job", "cancelling", |j| ready(j).1 == "Cancelling").await;
    assert_eq!((state(&job), attempts(&job).len()), ("Running", 1));
    edit(&env, "job", json!({"suspend": false})).await;
    until("the second batch", || env.sim.batches().len() == 2).await;
    let batches = env.sim.batches();
    assert_eq!(live(&env).len(), 1, "{batches:?}");
    assert_eq!(env.count(Op::BatchCancel), 4);
    assert!(env.sim.finish(&live(&env)[0].name, Outcome::Succeeded));
    assert_eq!(counts(&env.cleaned("job").await), (1, 1, 0));
}

/// A key that was revoked meanwhile is somebody's to repair, and the batch runs on until then: that is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_that_the_key_may_not_ask_for_is_told_as_that() {
    let env = started().await;
    env.create("job", with(spec(&[LONG], None), json!({"suspendPolicy": "Cancel"}))).await;
    running(&env, "job").await;
    cancel_fails(&env, 401, 2);
    edit(&env, "job", json!({"suspend": true})).await;
    let job = env.stalled("job", "CredentialsRefused").await;
    assert!(ready(&job).2.contains("cancelling the batch"), "{:?}", ready(&job));
    // It goes on by itself when the key is good again.
    env.until("job", "suspended", |j| is_true(j, conditions::SUSPENDED)).await;
    assert_eq!((live(&env).len(), env.count(Op::BatchCancel)), (0, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_finished_whole_all_the_same_is_the_end() {
    let env = started().await;
    // It ends while the cancellation is on its way.
    env.sim.set(Switches { lose_events: true, ..Switches::default() });
    env.create("job", with(spec(&[LONG], None), json!({"suspendPolicy": "Cancel"}))).await;
    running(&env, "job").await;
    cancel_fails(&env, 503, 2);
    edit(&env, "job", json!({"suspend": true})).await;
    env.until("job", "cancelling", |j| ready(j).1 == "Cancelling").await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)));
    assert!(!is_true(&job, conditions::SUSPENDED));
}

// ------------------------------------------------------------------------------------ deadline

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_cancels_and_keeps_what_there_is() {
    let env = started().await;
    races(&env);
    env.create("job", spec(&[LONG, "b"], Some("out"))).await;
    running(&env, "job").await;
    until("the batch at work", || live(&env).iter().any(|b| b.state == "RUNNING")).await;
    // Added while it runs; the time since the start counts.
    edit(&env, "job", json!({"activeDeadlineSeconds": 1})).await;
    let job = env.cleaned("job").await;
    assert_eq!(
        (state(&job), ready(&job).1.as_str(), counts(&job)),
        ("Failed", "DeadlineExceeded", (2, 1, 1)),
        "{:?}",
        ready(&job)
    );
    assert_eq!(attempts(&job)[0].cancellation.as_ref().unwrap().reason, "DeadlineExceeded");
    assert!(env.sim.batches()[0].cancelled);
    assert_eq!(results(&env).await[0]["key"], "k1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_job_that_gets_no_quota() {
    let env = started().await;
    let effect = Effect::Status { code: 429, commit: false, envelope: true, retry_after: Some(3600) };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1000, effect });
    env.create("job", with(spec(&["a"], Some("out")), json!({"activeDeadlineSeconds": 2}))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), ready(&job).1.as_str()), ("Failed", "DeadlineExceeded"));
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 0));
    assert!(env.config_maps().get_opt("out").await.unwrap().is_none(), "the reservation is given back");
    assert!(env.sim.files().is_empty());
}

// ---------------------------------------------------------------------------- further attempts

#[tokio::test(flavor = "multi_thread")]
async fn a_further_attempt_carries_what_has_no_result() {
    let env = started().await;
    let prompts = ["[[sim:job=expire]] [[sim:partial]]", "b", "c", "d [[sim:error=3]]"];
    env.create("job", with(spec(&prompts, Some("out")), json!({"backoffLimit": 1}))).await;
    let job = env.cleaned("job").await;
    assert_eq!(
        (state(&job), ready(&job).1.as_str(), counts(&job)),
        ("Succeeded", "CompletedWithFailures", (4, 3, 1)),
        "{:?}",
        ready(&job)
    );
    let batches = env.sim.batches();
    assert_eq!(batches.iter().map(|b| b.requests).collect::<Vec<_>>(), [4, 2]);
    assert_eq!(keys(&results(&env).await), ["k1", "k2", "k3", "k4"]);
    let manifest = env.config_maps().get("out").await.unwrap().data.unwrap()["manifest.json"].clone();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["batches"].as_array().unwrap().len(), 2);
    assert_eq!(manifest["requests"]["total"], 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_paid_for_than_was_allowed() {
    let env = started().await;
    for (name, limit) in [("none", 0), ("two", 2)] {
        let before = env.sim.batches().len();
        let more = json!({"backoffLimit": limit});
        env.create(name, with(spec(&["[[sim:job=fail]]"], None), more)).await;
        let job = env.cleaned(name).await;
        assert_eq!((state(&job), ready(&job).1.as_str()), ("Failed", "BatchFailed"));
        assert_eq!(env.sim.batches().len() - before, limit + 1, "{name}");
        assert_eq!(attempts(&job).len(), limit + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_moved_is_not_sent_again() {
    let env = started().await;
    env.config_map("in", &json!({"x": line("a", LONG)})).await;
    let input = json!({"configMap": {"name": "in", "key": "x"}});
    env.create("job", with(with_input(input, None), json!({"backoffLimit": 3}))).await;
    running(&env, "job").await;
    env.config_map("in", &json!({"x": line("another", "y")})).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Expired));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), ready(&job).1.as_str()), ("Failed", "InputChanged"));
    assert!(ready(&job).2.contains("BatchExpired"), "{}", ready(&job).2);
    assert_eq!(env.count(Op::BatchCreate), 1);
}

/// The second attempt of a job without output, whose first result file is gone by the time it ends.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_attempt_left_and_can_t_be_read_any_more_does_not_take_the_rest_along() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let timings = Timings { result_late: SignedDuration::from_secs(1), ..timings() };
    env.operator_with(timings).await;
    // Both batches run until they are ended: the second one carries the last request only.
    let prompts = ["[[sim:partial]]", &format!("b {LONG}"), &format!("c {LONG}")];
    env.create("job", with(spec(&prompts, None), json!({"backoffLimit": 1}))).await;
    until("the batch at work", || live(&env).iter().any(|b| b.state == "RUNNING")).await;
    running(&env, "job").await;
    assert!(env.sim.finish(&live(&env)[0].name, Outcome::Expired));
    env.until("job", "at its second attempt", |j| attempts(j).len() == 2 && state(j) == "Running").await;
    // As after two days.
    let first = attempts(&env.jobs().get("job").await.unwrap())[0].clone();
    let file = first.outcome.unwrap().output_file.unwrap();
    let effect = Effect::Status { code: 404, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault {
        op: Op::Download,
        contains: file.replace("files/", ""),
        skip: 0,
        times: 100_000,
        effect,
    });
    assert!(env.sim.finish(&live(&env)[0].name, Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 3, 0)), "{:?}", ready(&job));
    assert!(ready(&job).2.contains("outcome.outputFile"), "{}", ready(&job).2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_lowered_in_time_spends_nothing_more() {
    let env = started().await;
    env.create("job", with(spec(&[LONG], None), json!({"backoffLimit": 3}))).await;
    running(&env, "job").await;
    edit(&env, "job", json!({"suspend": true})).await;
    env.until("job", "told", |j| ready(j).2.contains("It may finish")).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Expired));
    suspended(&env, "job").await;
    edit(&env, "job", json!({"suspend": false, "backoffLimit": 0})).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), ready(&job).1.as_str()), ("Failed", "BatchExpired"));
    assert_eq!(env.count(Op::BatchCreate), 1);
}

// ------------------------------------------------------------------------------------ deletion

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_runs_on() {
    let env = started().await;
    env.create("job", with(spec(&[LONG], Some("out")), json!({"deletionPolicy": "Orphan"}))).await;
    running(&env, "job").await;
    env.delete("job").await;
    env.gone("job").await;
    assert_eq!((live(&env).len(), env.count(Op::BatchCancel), env.count(Op::FileDelete)), (1, 0, 0));
    assert!(env.config_maps().get_opt("out").await.unwrap().is_none(), "an empty reservation is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_takes_the_batch_and_its_files_along_if_asked() {
    let env = started().await;
    env.sim.set(Switches { delete_output_refused: false, ..Switches::default() });
    env.create("runs", with(spec(&[LONG], None), json!({"deletionPolicy": "Delete"}))).await;
    running(&env, "runs").await;
    env.delete("runs").await;
    env.gone("runs").await;
    let batch = &env.sim.batches()[0];
    assert!(batch.cancelled && batch.deleted, "{batch:?}");

    env.create("done", with(spec(&["a"], None), json!({"deletionPolicy": "Delete"}))).await;
    let job = env.finished("done").await;
    until("the input file gone", || env.sim.files().iter().all(|f| f.contains("batch-"))).await;
    assert!(!job.finalizers().is_empty(), "its deletion has something to do");
    env.delete("done").await;
    env.gone("done").await;
    assert!(env.sim.batches().iter().all(|b| b.deleted));
    assert!(env.sim.files().is_empty(), "{:?}", env.sim.files());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deletion_policy_of_a_finished_job_may_change() {
    let env = started().await;
    env.create("job", with(spec(&["a"], None), json!({"deletionPolicy": "Delete"}))).await;
    env.finished("job").await;
    edit(&env, "job", json!({"deletionPolicy": "Cancel"})).await;
    env.cleaned("job").await;
    edit(&env, "job", json!({"deletionPolicy": "Delete"})).await;
    env.until("job", "held again", |j| !j.finalizers().is_empty()).await;
    // Gemini keeps result files, and the deletion is not held up by that.
    env.delete("job").await;
    env.gone("job").await;
    assert!(env.sim.batches()[0].deleted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_waits_as_long_as_the_job_says() {
    let env = started().await;
    cancel_fails(&env, 503, 100_000);
    env.create("job", with(spec(&[LONG], None), json!({"deletionTimeoutSeconds": 3}))).await;
    running(&env, "job").await;
    let start = std::time::Instant::now();
    env.delete("job").await;
    env.gone("job").await;
    assert!(start.elapsed() >= std::time::Duration::from_secs(2), "it was given up too soon");
    assert_eq!(live(&env).len(), 1);
}

/// Gemini refuses a cancellation if the batch is over, and for other reasons: what the batch says of itself counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_cancellation_counts_only_if_the_batch_is_over() {
    // No sweep: that a batch is over shall be learned from the refusal.
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=3600"]).await;
    env.operator().await;
    for name in ["runs", "is-over"] {
        env.create(name, spec(&[LONG], None)).await;
        running(&env, name).await;
    }
    let over = attempts(&env.jobs().get("is-over").await.unwrap())[0].batch_name.clone().unwrap();
    // Refused, though it runs, and a GET says so.
    cancel_fails(&env, 400, 3);
    env.delete("runs").await;
    env.gone("runs").await;
    assert_eq!((live(&env).len(), env.count(Op::BatchCancel)), (1, 4), "it went, and its batch ran on");
    // Refused, since it is over; nobody has told that.
    env.sim.set(Switches { cancel_ended_refused: true, lose_events: true, ..Switches::default() });
    assert!(env.sim.finish(&over, Outcome::Succeeded));
    env.delete("is-over").await;
    env.gone("is-over").await;
    assert_eq!((live(&env).len(), env.count(Op::BatchCancel)), (0, 5));
    assert!(env.sim.batches().iter().all(|b| b.name != over || b.state == "SUCCEEDED"));
    let events: Api<k8s_openapi::api::events::v1::Event> =
        Api::namespaced(env.client.clone(), &env.namespace);
    let about = |name: &str, reason: &str| {
        let (name, reason) = (name.to_owned(), reason.to_owned());
        move |e: &k8s_openapi::api::events::v1::Event| {
            let regarding = e.regarding.as_ref().and_then(|r| r.name.as_deref());
            regarding == Some(&*name) && e.reason.as_deref() == Some(&*reason)
        }
    };
    let all = events.list(&kube::api::ListParams::default()).await.unwrap().items;
    assert!(all.iter().any(about("runs", "Cancelled")), "{all:?}");
    // Its results were paid for: where they are is told, not that it was cancelled.
    assert!(!all.iter().any(about("is-over", "Cancelled")), "{all:?}");
    assert!(all.iter().any(about("is-over", "Deleted")), "{all:?}");
}

/// A project in a region that is not served gets the same refusal for everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_project_that_is_not_served_just_now_is_waited_for() {
    let env = started().await;
    env.create("runs", spec(&[LONG], None)).await;
    running(&env, "runs").await;
    env.sim.set(Switches { location_refused: true, ..env.sim.switches() });
    env.delete("runs").await;
    until("three refused cancellations", || env.count(Op::BatchCancel) >= 3).await;
    assert!(env.jobs().get("runs").await.is_ok(), "the job went, and its batch runs on");
    env.sim.set(Switches { location_refused: false, ..env.sim.switches() });
    env.gone("runs").await;
    assert_eq!(live(&env).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_deleted_whatever_they_are_held_by() {
    let env = started().await;
    // Held before it began.
    env.create("held", with(spec(&["a"], Some("out")), json!({"suspend": true}))).await;
    suspended(&env, "held").await;
    env.delete("held").await;
    env.gone("held").await;
    assert!(env.ops().is_empty());
    // Held after its batch was cancelled: nothing is left to cancel.
    env.create("stopped", with(spec(&[LONG], None), json!({"suspendPolicy": "Cancel"}))).await;
    running(&env, "stopped").await;
    edit(&env, "stopped", json!({"suspend": true})).await;
    suspended(&env, "stopped").await;
    let asked = env.count(Op::BatchCancel);
    env.delete("stopped").await;
    env.gone("stopped").await;
    assert_eq!(env.count(Op::BatchCancel), asked);
    // While it is being cancelled for its deadline.
    cancel_fails(&env, 503, 2);
    env.create("late", with(spec(&[LONG], None), json!({"activeDeadlineSeconds": 1}))).await;
    env.until("late", "cancelling", |j| ready(j).1 == "Cancelling").await;
    env.delete("late").await;
    env.gone("late").await;
    assert!(live(&env).is_empty(), "{:?}", env.sim.batches());
}

// ----------------------------------------------------------------------------------- afterwards

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_when_its_time_is_over_and_its_results_stay() {
    let env = started().await;
    env.create("job", with(spec(&["a"], Some("out")), json!({"ttlSecondsAfterFinished": 1}))).await;
    env.finished("job").await;
    env.gone("job").await;
    assert_eq!(keys(&results(&env).await), ["k1"]);
    // Added afterwards, and taken back in time.
    env.create("kept", with(spec(&["a"], Some("out-2")), json!({"ttlSecondsAfterFinished": 3600}))).await;
    env.cleaned("kept").await;
    edit(&env, "kept", json!({"ttlSecondsAfterFinished": null})).await;
    edit(&env, "kept", json!({"ttlSecondsAfterFinished": 0})).await;
    env.gone("kept").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_go_with_the_job_only_if_asked() {
    let env = started().await;
    for (name, retention) in [("stay", "Retain"), ("go", "Delete")] {
        let mut spec = spec(&["a"], Some(name));
        spec["output"]["retention"] = json!(retention);
        let uid = env.create(name, spec).await.uid();
        env.cleaned(name).await;
        let owners = env.config_maps().get(name).await.unwrap().owner_references().to_vec();
        let owner = owners.first().map(|o| (o.kind.as_str(), o.uid.clone()));
        let wanted = (retention == "Delete").then(|| ("GeminiBatchJob", uid.unwrap()));
        assert_eq!(owner, wanted, "Kubernetes collects what has an owner");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_may_be_ready_when_it_is_submitted() {
    let env = started().await;
    env.create("job", with(spec(&[LONG], None), json!({"readinessPolicy": "WhenSubmitted"}))).await;
    let job = running(&env, "job").await;
    assert!(is_true(&job, conditions::READY) && !is_true(&job, conditions::RECONCILING));
    edit(&env, "job", json!({"readinessPolicy": "WhenComplete"})).await;
    env.until("job", "not ready", |j| !is_true(j, conditions::READY) && is_true(j, conditions::RECONCILING))
        .await;
    edit(&env, "job", json!({"readinessPolicy": "WhenSubmitted"})).await;
    env.until("job", "ready", |j| is_true(j, conditions::READY)).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Failed));
    let job = env.cleaned("job").await;
    assert!(
        !is_true(&job, conditions::READY) && is_true(&job, conditions::STALLED),
        "a failure is not ready"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_priority_is_passed_on() {
    let env = started().await;
    env.create("job", with(spec(&["a"], None), json!({"priority": -7}))).await;
    env.cleaned("job").await;
    let create = env.log().into_iter().find(|e| e.op == Op::BatchCreate).unwrap();
    assert_eq!(create.body.unwrap()["batch"]["priority"], "-7");
}

/// All is tried that costs nothing; then it is one edit to the submission.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_what_is_wrong_and_sends_nothing_until_it_is_over() {
    let env = started().await;
    env.config_map("in", &json!({"x": "not JSON\n"})).await;
    let input = json!({"configMap": {"name": "in", "key": "x"}});
    env.create("job", with(with_input(input, Some("out")), json!({"dryRun": true}))).await;
    let job = env.stalled("job", "InputInvalid").await;
    let validated =
        |j: &GeminiBatchJob| condition(j, conditions::VALIDATED).map(|(status, reason, _)| (status, reason));
    assert_eq!(validated(&job), Some(("False".to_owned(), "InputInvalid".to_owned())));
    env.config_map("in", &json!({"x": format!("{}\n{}\n", line("a", "hello"), line("b", "hello"))})).await;
    let job = env.until("job", "validated", |j| is_true(j, conditions::VALIDATED)).await;
    assert_eq!((state(&job), ready(&job).1.as_str()), ("Pending", "DryRunSucceeded"));
    assert!(!is_true(&job, conditions::STALLED) && !is_true(&job, conditions::RECONCILING));
    let status = job.status.as_ref().unwrap();
    let sent = status.dry_run.as_ref().unwrap();
    assert_eq!((status.requests.unwrap().total, sent.sha256.len()), (2, 64));
    assert!(sent.size_bytes > 0 && status.attempts.is_empty());
    let asked: Vec<Op> = env.ops().into_iter().filter(|op| *op != Op::BatchList).collect();
    assert!(asked.is_empty(), "only whether the key is valid: {asked:?}");
    assert!(env.config_maps().get_opt("out").await.unwrap().is_some(), "the name is taken for it");

    edit(&env, "job", json!({"dryRun": false})).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)));
    assert!(
        job.status.as_ref().unwrap().dry_run.is_none() && condition(&job, conditions::VALIDATED).is_none()
    );

    // Deleted: nothing stays behind.
    env.create("deleted", with(spec(&["x"], Some("other")), json!({"dryRun": true}))).await;
    env.until("deleted", "validated", |j| is_true(j, conditions::VALIDATED)).await;
    env.delete("deleted").await;
    env.gone("deleted").await;
    assert!(env.config_maps().get_opt("other").await.unwrap().is_none());
    assert_eq!(env.count(Op::BatchCreate), 1);
}

/// What waits for a job must not go on with half an answer; what was paid for is kept.
#[tokio::test(flavor = "multi_thread")]
async fn more_failures_than_the_job_allows_make_it_failed_with_its_results() {
    let env = started().await;
    let prompts = ["a", "b", "c [[sim:error=3]]", "d [[sim:error=3]]"];
    for (name, limit, end) in [
        ("number", json!(2), ("Succeeded", "CompletedWithFailures")),
        ("too-many", json!(1), ("Failed", "TooManyFailedRequests")),
        ("percent", json!("50%"), ("Succeeded", "CompletedWithFailures")),
        ("too-high-a-percentage", json!("49%"), ("Failed", "TooManyFailedRequests")),
    ] {
        let policy = json!({"successPolicy": {"maxFailedRequests": limit}});
        env.create(name, with(spec(&prompts, Some(name)), policy)).await;
        let job = env.cleaned(name).await;
        assert_eq!((state(&job), ready(&job).1.as_str(), counts(&job)), (end.0, end.1, (4, 2, 2)), "{name}");
        let stored = env.config_maps().get(name).await.unwrap().data.unwrap();
        assert_eq!(stored["results.jsonl"].lines().count(), 4, "{name}");
    }
    // Changed while it runs.
    let prompts = [LONG, "[[sim:error=3]]"];
    let policy = json!({"successPolicy": {"maxFailedRequests": 0}});
    env.create("edited", with(spec(&prompts, None), policy)).await;
    running(&env, "edited").await;
    edit(&env, "edited", json!({"successPolicy": {"maxFailedRequests": 1}})).await;
    assert!(env.sim.finish(&live(&env)[0].name, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("edited").await), "Succeeded");
    // And deleted while it runs: its batch is cancelled like any other.
    let policy = json!({"successPolicy": {"maxFailedRequests": "0%"}});
    env.create("deleted", with(spec(&[LONG], None), policy)).await;
    running(&env, "deleted").await;
    env.delete("deleted").await;
    env.gone("deleted").await;
    assert!(live(&env).is_empty());
}

/// What is edited while a batch runs counts from the next one on.
#[tokio::test(flavor = "multi_thread")]
async fn a_priority_that_is_edited_is_that_of_the_next_attempt() {
    let env = started().await;
    env.create("job", with(spec(&[LONG], None), json!({"priority": 1, "backoffLimit": 1}))).await;
    running(&env, "job").await;
    edit(&env, "job", json!({"priority": 2})).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Failed));
    env.until_asked(Op::BatchCreate, 2).await;
    let creates = env.log().into_iter().filter(|e| e.op == Op::BatchCreate);
    let priorities: Vec<_> = creates.map(|e| e.body.unwrap()["batch"]["priority"].clone()).collect();
    assert_eq!(priorities, ["1", "2"]);
    // And with a deletion: the second batch is cancelled, nothing follows.
    env.until("job", "recorded", |j| attempts(j).len() == 2 && attempts(j)[1].batch_name.is_some()).await;
    env.delete("job").await;
    env.gone("job").await;
    assert!(live(&env).is_empty(), "{:?}", env.sim.batches());
    assert_eq!((env.count(Op::BatchCreate), env.count(Op::BatchCancel)), (2, 1));
    assert!(env.sim.files().is_empty(), "{:?}", env.sim.files());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retention_that_is_edited_while_the_batch_runs_counts() {
    let env = started().await;
    for (name, first, then) in [("stay", "Delete", "Retain"), ("go", "Retain", "Delete")] {
        let mut spec = spec(&[LONG], Some(name));
        spec["output"]["retention"] = json!(first);
        env.create(name, spec).await;
        running(&env, name).await;
        edit(&env, name, json!({"output": {"retention": then}})).await;
        assert!(env.sim.finish(&live(&env)[0].name, Outcome::Succeeded));
        env.cleaned(name).await;
        let results = env.config_maps().get(name).await.unwrap();
        assert_eq!(!results.owner_references().is_empty(), then == "Delete", "{name}");
    }
    // A job that is deleted before it has results gives the object back, whatever the retention.
    let mut spec = spec(&[LONG], Some("empty"));
    spec["output"]["retention"] = json!("Retain");
    env.create("empty", spec).await;
    running(&env, "empty").await;
    env.delete("empty").await;
    env.gone("empty").await;
    assert!(env.config_maps().get_opt("empty").await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_waits_no_longer_than_the_job_says_by_now() {
    let env = started().await;
    cancel_fails(&env, 503, 100_000);
    env.create("job", with(spec(&[LONG], None), json!({"deletionTimeoutSeconds": 3600}))).await;
    running(&env, "job").await;
    env.delete("job").await;
    env.until_asked(Op::BatchCancel, 2).await;
    edit(&env, "job", json!({"deletionTimeoutSeconds": 1})).await;
    env.gone("job").await;
    assert_eq!(live(&env).len(), 1);
}

// -------------------------------------------------------------------------------------- import

/// A batch that somebody else created.
async fn somebody_elses(env: &Env, prompt: &str) -> String {
    let url = format!("{}/v1beta/models/gemini-2.5-flash:batchGenerateContent", env.sim.base_url());
    let request = json!({"contents": [{"parts": [{"text": prompt}]}]});
    let requests = json!([{"request": request, "metadata": {"key": "mine"}}]);
    let body =
        json!({"batch": {"displayName": "theirs", "inputConfig": {"requests": {"requests": requests}}}});
    let sent = reqwest::Client::new().post(url).header("x-goog-api-key", "test-key").json(&body).send().await;
    let answer: Value = sent.unwrap().json().await.unwrap();
    answer["name"].as_str().unwrap().to_owned()
}

fn import(batch: &str) -> Value {
    let mut spec = spec(&[], Some("out"));
    spec.as_object_mut().unwrap().remove("input");
    with(spec, json!({"importFrom": {"batchName": batch}}))
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_batch_is_taken_over_and_finished() {
    let env = started().await;
    env.create("job", import("batches/nosuchbatch")).await;
    let job = env.stalled("job", "BatchNotFound").await;
    assert!(ready(&job).2.contains("spec.importFrom.batchName"));
    let batch = somebody_elses(&env, "hello").await;
    edit(&env, "job", json!({"importFrom": {"batchName": batch}})).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)), "{:?}", ready(&job));
    assert_eq!(attempts(&job)[0].batch_name.as_ref(), Some(&batch));
    assert_eq!(keys(&results(&env).await), ["mine"]);
    assert_eq!(env.count(Op::BatchCreate), 1, "the one of somebody else");
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_batch_is_cancelled_only_if_asked() {
    let env = started().await;
    for (policy, cancelled) in [(None, false), (Some("Cancel"), true)] {
        let batch = somebody_elses(&env, LONG).await;
        let policy = policy.map_or(json!({}), |p| json!({"deletionPolicy": p}));
        env.create("job", with(import(&batch), policy)).await;
        running(&env, "job").await;
        env.delete("job").await;
        env.gone("job").await;
        let there = env.sim.batches().into_iter().find(|b| b.name == batch).unwrap();
        assert_eq!(there.cancelled, cancelled);
        assert!(env.config_maps().get_opt("out").await.unwrap().is_none());
    }
}

// ------------------------------------------------------------------------------------- crashes

/// Dies at the step while a running batch is cancelled for a suspension; resumed, it must end right.
async fn survives(at: &str) {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    races(&env);
    let mut first = env.spawn(Some(at));
    env.create("job", with(spec(&[LONG, "b"], Some("out")), json!({"suspendPolicy": "Cancel"}))).await;
    running(&env, "job").await;
    until("the batch at work", || live(&env).iter().any(|b| b.state == "RUNNING")).await;
    edit(&env, "job", json!({"suspend": true})).await;
    first.ended().await;
    let _second = env.spawn(None);
    suspended(&env, "job").await;
    env.sim.set(Switches::default());
    edit(&env, "job", json!({"suspend": false})).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{at}: {:?}", ready(&job));
    assert_eq!(env.sim.batches().iter().map(|b| b.requests).collect::<Vec<_>>(), [2, 1], "{at}");
    assert_eq!(keys(&results(&env).await), ["k1", "k2"], "{at}");
}

/// Dies at the n-th time that it comes to the step: in the second attempt.
async fn survives_the_second_time(at: &str) {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let mut first = env.spawn(Some(&format!("{at}@2")));
    let prompts = ["[[sim:job=expire]] [[sim:partial]]", "b", "c"];
    env.create("job", with(spec(&prompts, Some("out")), json!({"backoffLimit": 1}))).await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 3, 0)), "{at}: {:?}", ready(&job));
    assert!(!ready(&job).2.contains("repeat"), "{at}: {}", ready(&job).2);
    assert_eq!(env.sim.batches().iter().map(|b| b.requests).collect::<Vec<_>>(), [3, 1], "{at}");
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    assert!(!data.contains_key("unmatched.jsonl"), "{at}: {data:?}");
    let lines = results(&env).await;
    assert_eq!(keys(&lines), ["k1", "k2", "k3"], "{at}");
    let tokens = |l: &Value| l["response"]["usageMetadata"]["totalTokenCount"].as_i64().unwrap();
    let usage = job.status.as_ref().unwrap().usage.unwrap().total_tokens;
    assert_eq!(usage, lines.iter().map(tokens).sum::<i64>(), "{at}: nothing is counted twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_attempt_survives_as_well() {
    for at in
        ["after:Intent", "before:Submitted", "after:Submitted", "before:StoreResults", "after:StoreResults"]
    {
        survives_the_second_time(at).await;
    }
}

macro_rules! at {
    ($($name:ident: $step:literal),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            survives($step).await;
        }
    )*};
}

at! {
    before_the_cancellation_is_recorded: "before:Cancelling",
    after_the_cancellation_is_recorded: "after:Cancelling",
    after_the_batch_is_cancelled: "after:CancelBatch",
    after_what_there_was_is_stored: "after:StoreResults",
    before_the_attempt_is_over: "before:AttemptEnded",
    after_the_attempt_is_over: "after:AttemptEnded",
}
