//! Sharded jobs: a large input becomes several batches, and one result.

use std::time::{Duration, Instant};

use gemini_batch_operator::api::{GeminiBatchJob, PARENT_LABEL, SHARD_LABEL, conditions};
use gemini_simulator::{Config, Op, Outcome};
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::{Env, PATIENCE, counts, is_true, kubectl, line, ready, spec, state, with_input};
use crate::stores::{BUCKET, Server, s3_secret};

/// A prompt of a batch that goes on until somebody ends it.
pub const LONG: &str = "[[sim:job=stall]]";

/// JSON Lines with the keys k0, k1, …
pub fn lines(prompts: &[&str]) -> String {
    prompts.iter().enumerate().map(|(i, p)| line(&format!("k{i:03}"), p) + "\n").collect()
}

/// A job of shards over the ConfigMap `in`.
pub fn sharded(max_requests: u32, in_flight: u32, more: Value) -> Value {
    let input = json!({"configMap": {"name": "in", "key": "requests.jsonl"}});
    with(
        with_input(input, Some("out")),
        json!({"sharding": {"maxRequests": max_requests, "maxInFlight": in_flight}}),
        more,
    )
}

fn with(mut spec: Value, sharding: Value, more: Value) -> Value {
    for fields in [sharding, more] {
        for (name, value) in fields.as_object().unwrap() {
            spec[name] = value.clone();
        }
    }
    spec
}

pub async fn put_input(env: &Env, prompts: &[&str]) {
    env.config_map("in", &json!({"requests.jsonl": lines(prompts)})).await;
}

pub async fn edit(env: &Env, name: &str, spec: Value) {
    env.jobs().patch(name, &PatchParams::default(), &Patch::Merge(json!({ "spec": spec }))).await.unwrap();
}

/// The jobs of shards, in their order.
pub async fn children(env: &Env) -> Vec<GeminiBatchJob> {
    let all = env.jobs().list(&ListParams::default().labels(PARENT_LABEL)).await.unwrap().items;
    let mut all: Vec<_> = all.into_iter().filter(|job| job.name_any() != "job").collect();
    all.sort_by_key(|job| job.labels()[SHARD_LABEL].parse::<u32>().unwrap());
    all
}

/// Until nothing but the job itself is left.
pub async fn alone(env: &Env) {
    let start = Instant::now();
    while !children(env).await.is_empty() {
        assert!(start.elapsed() < PATIENCE, "{:?}", children(env).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn data(env: &Env, name: &str, key: &str) -> String {
    env.config_maps().get(name).await.unwrap().data.unwrap_or_default().remove(key).unwrap_or_default()
}

async fn keys(env: &Env, name: &str, key: &str) -> Vec<String> {
    let text = data(env, name, key).await;
    let key_of =
        |line: &str| serde_json::from_str::<Value>(line).unwrap()["key"].as_str().unwrap().to_owned();
    text.lines().map(key_of).collect()
}

pub fn expected(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|i| format!("k{i:03}")).collect()
}

pub fn shards(job: &GeminiBatchJob) -> (i32, i32, i32, i32, i32) {
    let s = job.status.as_ref().unwrap().shards.clone().unwrap_or_default();
    (s.total, s.pending, s.running, s.succeeded, s.failed)
}

pub async fn running(env: &Env, name: &str, how_many: i32) -> GeminiBatchJob {
    env.until(name, &format!("{how_many} running"), |j| shards(j).2 == how_many).await
}

pub async fn names_of_maps(env: &Env) -> Vec<String> {
    let maps = env.config_maps().list(&ListParams::default()).await.unwrap();
    maps.iter().map(kube::ResourceExt::name_any).filter(|name| name != "kube-root-ca.crt").collect()
}

// ------------------------------------------------------------------------------------ the whole

/// The issue's own case. The simulator refuses a sixth batch, so that one too many would be seen as a refused create.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_shards_behind_a_ceiling_of_five_and_one_that_expires() {
    let config = Config { speed: 600.0, max_active: 5, ..Config::default() };
    let env = Env::with(config, &["--max-active-batches=5", "--sweep-seconds=86400"]).await;
    env.operator().await;
    let mut prompts = vec!["hello"; 40];
    // The eighth one has answered half of what it holds when its time is over.
    prompts[14] = "[[sim:job=expire]] [[sim:partial]]";
    put_input(&env, &prompts).await;
    env.create("job", sharded(2, 20, json!({"backoffLimit": 1}))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (40, 40, 0)), "{:?}", ready(&job));
    assert_eq!(ready(&job).1, "Completed");
    assert_eq!(shards(&job), (20, 0, 0, 20, 0));

    // One more than there are shards: the one that expired was sent again, alone, with what was missing.
    let creates: Vec<_> = env.log().into_iter().filter(|e| e.op == Op::BatchCreate).collect();
    assert_eq!((creates.len(), creates.iter().filter(|e| e.status == "200").count()), (21, 21));
    let batches = env.sim.batches();
    assert_eq!(batches.iter().filter(|b| b.requests == 1).count(), 1);
    assert_eq!(batches.iter().filter(|b| b.requests == 2).count(), 20);

    assert_eq!(keys(&env, "out", "results.jsonl").await, expected(0..40), "in input order");
    let manifest: Value = serde_json::from_str(&data(&env, "out", "manifest.json").await).unwrap();
    assert_eq!(manifest["shards"], json!({"total": 20, "succeeded": 20, "failed": 0}));
    assert_eq!(manifest["requests"]["succeeded"], 40);
    let by_shard = data(&env, "out", "shards.jsonl").await;
    let eighth: Value = serde_json::from_str(by_shard.lines().nth(7).unwrap()).unwrap();
    assert_eq!((eighth["job"].as_str(), eighth["batches"].as_array().unwrap().len()), (Some("job-0007"), 2));
    assert_eq!(job.status.unwrap().usage.unwrap().total_tokens, manifest["usage"]["totalTokens"]);

    alone(&env).await;
    assert_eq!(names_of_maps(&env).await, ["in", "out"], "nothing in between is left");
    assert!(env.sim.files().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_are_under_way_than_were_wanted_and_the_others_follow() {
    let env = Env::new().await;
    env.operator().await;
    put_input(&env, &[LONG; 5]).await;
    env.create("job", sharded(1, 2, json!({}))).await;
    let job = running(&env, "job", 2).await;
    assert_eq!(children(&env).await.len(), 2);
    assert_eq!(state(&job), "Running");
    assert!(is_true(&job, conditions::SUBMITTED));
    let listed = job.status.unwrap().shards.unwrap().listed;
    assert_eq!(listed.iter().map(|s| s.job.as_str()).collect::<Vec<_>>(), ["job-0000", "job-0001"]);
    // Room for one more.
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    env.until("job", "one further", |j| shards(j) == (5, 2, 2, 1, 0)).await;
    edit(&env, "job", json!({"sharding": {"maxInFlight": 4}})).await;
    running(&env, "job", 4).await;
    for batch in env.sim.batches() {
        let _ = env.sim.finish(&batch.name, Outcome::Succeeded); // some have
    }
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (5, 5, 0)));
    assert_eq!(keys(&env, "out", "results.jsonl").await, expected(0..5));
    assert_eq!(env.count(Op::BatchCreate), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_an_object_in_s3_is_read_and_no_more() {
    let server = Server::s3();
    let allowed = format!("--object-store-endpoints={}", server.endpoint());
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &[&allowed]).await;
    env.secret("store", &s3_secret()).await;
    env.operator().await;
    // Two objects, the first without a line break at its end, with blank lines in between.
    let all = lines(&["hello"; 9]);
    let (first, second) = all.split_at(all.match_indices('\n').nth(3).unwrap().0);
    server.put("in/a.jsonl", first.replacen('\n', "\n\n", 1)).await;
    server.put("in/b.jsonl", second.trim_start()).await;
    let input = json!({"objectStore": {"prefix": format!("s3://{BUCKET}/in/"), "endpoint": server.endpoint(),
        "credentialsRef": {"name": "store"}}});
    let spec = with(with_input(input, Some("out")), json!({"sharding": {"maxRequests": 2}}), json!({}));
    env.create("job", spec).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (9, 9, 0)), "{:?}", ready(&job));
    assert_eq!(env.sim.batches().iter().map(|b| b.requests).sum::<usize>(), 9);
    assert_eq!(env.sim.batches().len(), 5);
    assert_eq!(keys(&env, "out", "results.jsonl").await, expected(0..9));
}

// ------------------------------------------------------------------------------------- restarts

/// Dies at the step, starts again, and must end right with one batch for each shard.
async fn survives(at: &str) {
    let env = Env::new().await;
    put_input(&env, &["hello"; 6]).await;
    let mut first = env.spawn(Some(at));
    env.create("job", sharded(2, 3, json!({}))).await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (6, 6, 0)), "{at}: {:?}", ready(&job));
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (3, 3), "{at}");
    assert_eq!(keys(&env, "out", "results.jsonl").await, expected(0..6), "{at}");
    alone(&env).await;
    assert_eq!(names_of_maps(&env).await, ["in", "out"], "{at}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_plan_and_the_children() {
    for at in [
        "after:ReserveOutput",
        "before:Planned",
        "after:Planned",
        "within:CreateShards",
        "within:CreateShards@2",
    ] {
        survives(at).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_children_and_their_record() {
    for at in
        ["after:CreateShards", "before:Sharded", "after:Sharded", "before:SyncShards", "after:SyncShards"]
    {
        survives(at).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_last_result_and_the_end() {
    for at in [
        "before:MergeShards",
        "after:MergeShards",
        "before:DeleteShards",
        "after:DeleteShards",
        "after:DropParts",
        "after:DeleteAllShards",
    ] {
        survives(at).await;
    }
}

/// The children of a large input are begun one after the other: after a restart it has to be the same input still.
#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_was_changed_is_not_sent_until_it_is_put_back() {
    let env = Env::new().await;
    let mut first = env.spawn(None);
    let prompts = [LONG, LONG, "hello", "hello"];
    put_input(&env, &prompts).await;
    env.create("job", sharded(1, 2, json!({}))).await;
    running(&env, "job", 2).await;
    put_input(&env, &[LONG, LONG, "hello", "something else"]).await;
    first.kill();
    let _second = env.spawn(None);
    // What was planned is still known, by its hash: the parent does not begin the third one.
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    let job = env.stalled("job", "InputDiffers").await;
    assert!(ready(&job).2.contains("put it back"), "{:?}", ready(&job));
    assert_eq!((children(&env).await.len(), env.count(Op::BatchCreate)), (2, 2));
    put_input(&env, &prompts).await;
    running(&env, "job", 1).await;
    assert!(env.sim.finish(&env.sim.batches()[1].name, Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (4, 4, 0)));
}

/// The same for a child that was created and not sent yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_was_changed_is_not_sent_until_it_is_put_back() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--max-active-batches=1"]).await;
    env.operator().await;
    let prompts = [LONG, "hello", "hello"];
    put_input(&env, &prompts).await;
    env.create("job", sharded(1, 3, json!({}))).await;
    running(&env, "job", 1).await;
    env.until("job-0002", "in line", |j| state(j) == "Queued").await;
    put_input(&env, &[LONG, "hello", "hallo"]).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    let job = env.stalled("job", "InputDiffers").await;
    let (_, _, message) = ready(&job);
    assert!(message.starts_with("shard 2 (job-0002): ") && !message.contains("hallo"), "{message}");
    // The part before it was not touched.
    env.until("job", "one left", |j| shards(j).3 == 2).await;
    assert_eq!(env.count(Op::BatchCreate), 2);
    put_input(&env, &prompts).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 3, 0)));
}

// ------------------------------------------------------------------------------ what users may ask

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_is_deleted_leaves_nothing_running() {
    let env = Env::new().await;
    env.operator().await;
    put_input(&env, &["hello", LONG, LONG, LONG, LONG]).await;
    env.create("job", sharded(1, 3, json!({}))).await;
    env.until("job", "on its way", |j| shards(j) == (5, 1, 3, 1, 0)).await;
    env.delete("job").await;
    env.gone("job").await;
    assert!(children(&env).await.is_empty(), "it waited for them");
    let batches = env.sim.batches();
    assert_eq!((batches.len(), batches.iter().filter(|b| b.cancelled).count()), (4, 3));
    assert!(env.sim.files().is_empty());
    // What was paid for and stored is kept, as with any job.
    assert_eq!(names_of_maps(&env).await, ["in", "job-0000-results"]);
    assert_eq!(keys(&env, "job-0000-results", "results.jsonl").await, ["k000"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_retention_delete_results_of_shards_go_as_well() {
    let env = Env::new().await;
    env.operator().await;
    put_input(&env, &["hello", LONG]).await;
    let output = json!({"output": {"configMap": {"name": "out"}, "retention": "Delete"}});
    env.create("job", sharded(1, 2, output)).await;
    env.until("job", "on its way", |j| shards(j) == (2, 0, 1, 1, 0)).await;
    // Edited in the same moment: the children are told before they are deleted.
    edit(&env, "job", json!({"deletionPolicy": "Orphan"})).await;
    env.delete("job").await;
    env.gone("job").await;
    assert!(children(&env).await.is_empty());
    assert_eq!(env.count(Op::BatchCancel), 0, "as deletionPolicy says");
    assert_eq!(names_of_maps(&env).await, ["in"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn suspended_in_the_midst_nothing_runs_and_nothing_is_begun() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.operator().await;
    put_input(&env, &["hello", LONG, LONG, LONG]).await;
    env.create("job", sharded(1, 2, json!({"suspendPolicy": "Cancel"}))).await;
    env.until("job", "on its way", |j| shards(j) == (4, 1, 2, 1, 0)).await;
    edit(&env, "job", json!({"suspend": true})).await;
    let job = env.until("job", "suspended", |j| state(j) == "Suspended").await;
    assert!(is_true(&job, conditions::SUSPENDED) && !is_true(&job, conditions::STALLED));
    assert!(env.sim.batches().iter().all(|b| b.state != "RUNNING" && b.state != "PENDING"));
    assert_eq!((children(&env).await.len(), env.count(Op::BatchCreate)), (3, 3));
    // What is edited at a child is set back, and holds no part against its parent.
    edit(&env, "job-0001", json!({"suspend": false, "priority": 9})).await;
    env.until("job-0001", "as its parent", |j| j.spec.suspend && j.spec.priority.is_none()).await;
    edit(&env, "job", json!({"suspend": false})).await;
    env.until("job", "resumed", |j| shards(j).2 == 2).await;
    while !is_true(&env.jobs().get("job").await.unwrap(), conditions::FINISHED) {
        for batch in env.sim.batches() {
            let _ = env.sim.finish(&batch.name, Outcome::Succeeded); // some have
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (4, 4, 0)), "{:?}", ready(&job));
    assert_eq!(keys(&env, "out", "results.jsonl").await, expected(0..4));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_is_the_parents_and_what_there_is_is_kept() {
    let env = Env::scaled(60.0, &[]).await;
    env.operator().await;
    put_input(&env, &["hello", LONG, "never begun"]).await;
    env.create("job", sharded(1, 1, json!({"activeDeadlineSeconds": 600}))).await;
    let job = env.cleaned("job").await;
    let (_, reason, message) = ready(&job);
    assert_eq!(
        (state(&job), reason.as_str(), counts(&job)),
        ("Failed", "DeadlineExceeded", (3, 1, 2)),
        "{message}"
    );
    assert!(message.contains("shard 1 (job-0001)") && message.contains("shard 2 (job-0002)"), "{message}");
    assert_eq!(keys(&env, "out", "results.jsonl").await, ["k000"]);
    assert_eq!(keys(&env, "out", "missing.jsonl").await, ["k001", "k002"]);
    let batches = env.sim.batches();
    assert_eq!((batches.len(), batches[1].cancelled), (2, true));
    alone(&env).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_splits_nothing() {
    let env = Env::new().await;
    env.operator().await;
    put_input(&env, &["hello"; 4]).await;
    env.create("job", sharded(1, 2, json!({"dryRun": true}))).await;
    let job = env.until("job", "validated", |j| is_true(j, conditions::VALIDATED)).await;
    assert_eq!(counts(&job).0, 4);
    assert!(children(&env).await.is_empty() && job.status.unwrap().shards.is_none());
    edit(&env, "job", json!({"dryRun": false})).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
}

// ----------------------------------------------------------------------------- what stands in the way

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_job_with_the_name_of_a_shard_is_left_alone() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job-0001", with(spec(&["theirs"], None), json!({"suspend": true}), json!({}))).await;
    let theirs = env.until("job-0001", "suspended", |j| state(j) == "Suspended").await;
    put_input(&env, &["hello"; 3]).await;
    env.create("job", sharded(1, 3, json!({}))).await;
    let job = env.stalled("job", "ShardNotCreated").await;
    let (_, _, message) = ready(&job);
    assert!(message.contains("GeminiBatchJob job-0001 exists") && message.contains("shard 1"), "{message}");
    let now = env.jobs().get("job-0001").await.unwrap();
    assert_eq!((now.uid(), &now.spec), (theirs.uid(), &theirs.spec));
    // The one before it goes on, and the job does when the name is free.
    env.until("job", "one done", |j| shards(j).3 == 1).await;
    env.delete("job-0001").await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 3, 0)));
}

/// Its batch was cancelled by its deletion, and nobody pays for it twice. The others are not lost with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_somebody_deletes_is_a_shard_that_failed() {
    let env = Env::new().await;
    env.operator().await;
    put_input(&env, &["hello", LONG, "hello", "hello"]).await;
    env.create("job", sharded(1, 2, json!({}))).await;
    env.until("job", "one left", |j| shards(j) == (4, 0, 1, 3, 0)).await;
    // One that runs, and one whose results are stored already.
    for name in ["job-0001", "job-0002"] {
        env.jobs().delete(name, &DeleteParams::default()).await.unwrap();
    }
    let job = env.cleaned("job").await;
    let (_, reason, message) = ready(&job);
    assert_eq!(
        (state(&job), reason.as_str(), counts(&job)),
        ("Failed", "ShardsFailed", (4, 3, 1)),
        "{message}"
    );
    assert!(message.contains("shard 1 (job-0001): JobDeleted"), "{message}");
    assert_eq!(env.count(Op::BatchCreate), 4);
    assert_eq!(keys(&env, "out", "results.jsonl").await, ["k000", "k002", "k003"], "what was stored is kept");
    assert_eq!(keys(&env, "out", "missing.jsonl").await, ["k001"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_do_not_fit_are_kept_where_they_are() {
    let env = Env::new().await;
    env.operator().await;
    put_input(&env, &["[[sim:big=400000]]"; 3]).await;
    env.create("job", sharded(1, 3, json!({}))).await;
    let job = env.stalled("job", "OutputTooLarge").await;
    assert!(ready(&job).2.contains("one ConfigMap for each shard"), "{:?}", ready(&job));
    assert_eq!((shards(&job), counts(&job)), ((3, 0, 0, 3, 0), (3, 3, 0)));
    assert_eq!(children(&env).await.len(), 3);
    for i in 0..3 {
        assert_eq!(keys(&env, &format!("job-000{i}-results"), "results.jsonl").await, [format!("k00{i}")]);
    }
    // Read there, and done with: they outlive the job.
    env.delete("job").await;
    env.gone("job").await;
    assert!(children(&env).await.is_empty());
    assert_eq!(names_of_maps(&env).await, ["in", "job-0000-results", "job-0001-results", "job-0002-results"]);
}

// -------------------------------------------------------------------------------------- the schema

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_split_is_refused() {
    let env = Env::new().await;
    let mut inline = spec(&["x"], Some("out"));
    inline["sharding"] = json!({"maxRequests": 1});
    let mut no_limit = sharded(1, 1, json!({}));
    no_limit["sharding"] = json!({"maxInFlight": 1});
    let mut no_output = sharded(1, 1, json!({}));
    no_output.as_object_mut().unwrap().remove("output");
    let mut part = sharded(1, 1, json!({}));
    part["input"]["configMap"]["range"] =
        json!({"offset": 0, "length": 1, "requests": 1, "sha256": "0".repeat(64)});
    let mut bad_hash = part.clone();
    bad_hash.as_object_mut().unwrap().remove("sharding");
    bad_hash["input"]["configMap"]["range"]["sha256"] = json!("x");
    for (spec, words) in [
        (inline, "spec.sharding needs spec.input.configMap or spec.input.objectStore"),
        (no_limit, "spec.sharding needs maxRequests, maxBytes or both"),
        (no_output, "spec.sharding needs spec.output: "),
        (part, "can't be used with a range"),
        (bad_hash, "SHA-256 in lower case"),
    ] {
        let refused = env.try_create("bad", spec.clone()).await.unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_split_can_not_be_split_otherwise() {
    let env = Env::new().await;
    env.operator().await;
    put_input(&env, &[LONG; 3]).await;
    env.create("job", sharded(1, 1, json!({}))).await;
    running(&env, "job", 1).await;
    for (spec, words) in [
        (json!({"sharding": {"maxRequests": 2}}), "the input is split already"),
        (json!({"sharding": null}), "the input is split already"),
        (json!({"model": "gemini-2.5-pro"}), "can't be changed once its submission"),
        (json!({"dryRun": true}), "can't be turned on once"),
    ] {
        let patch = Patch::Merge(json!({ "spec": spec }));
        let refused = env.jobs().patch("job", &PatchParams::default(), &patch).await.unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    }
    edit(&env, "job", json!({"sharding": {"maxInFlight": 2}})).await;
    running(&env, "job", 2).await;
    let shown = kubectl(&env, &["get", "gbj", "job", "-o", "wide"]).unwrap();
    assert!(shown.lines().next().unwrap().contains("SHARDS"), "{shown}");
    assert_eq!(shown.lines().nth(1).unwrap().split_whitespace().last(), Some("3"), "{shown}");
}

/// The example that users copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_questions_become_ten_batches() {
    let env = Env::new().await;
    env.operator().await;
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
    for file in ["configmap-100.yaml", "sharding.yaml"] {
        kubectl(&env, &["apply", "-f", &format!("{examples}/{file}")]).unwrap();
    }
    let job = env.cleaned("hundred-in-shards").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (100, 100, 0)), "{:?}", ready(&job));
    assert_eq!(shards(&job), (10, 0, 0, 10, 0));
    let results = data(&env, "hundred-in-shards-results", "results.jsonl").await;
    assert_eq!(results.lines().count(), 100);
    assert!(env.sim.batches().iter().filter(|b| b.requests == 10).count() == 10);
}
