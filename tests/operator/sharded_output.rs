//! Sharded jobs whose results go to an object store.

use gemini_batch_operator::api::GeminiBatchJob;
use gemini_simulator::{Op, Outcome};
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::harness::{Env, counts, ready, state};
use crate::sharding::{
    LONG, alone, children, edit, expected, names_of_maps, put_input, running, sharded, shards,
};
use crate::stored_output::{PLACE, keys, manifest, read, to_s3, with_proxy, with_s3};
use crate::stores::{Fault, Server};

/// A sharded job over the ConfigMap `in`, whose results go to the store.
fn spec(max_requests: u32, in_flight: u32, endpoint: &str, more: Value) -> Value {
    to_s3(sharded(max_requests, in_flight, more), endpoint, PLACE)
}

/// The lines of the whole by the last part of their object's name, and nothing else is in the bucket.
async fn whole(s3: &Server, job: &GeminiBatchJob) -> Vec<(String, Vec<Value>)> {
    let found = read(s3, PLACE, job).await;
    let names = s3.names().await;
    assert_eq!(names.len(), found.len() + 2, "beside the manifest and the reservation: {names:?}");
    found
}

fn keys_of<'a>(found: &'a [(String, Vec<Value>)], name: &str) -> Vec<&'a str> {
    found.iter().find(|(there, _)| there == name).map(|(_, lines)| keys(lines)).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_results_of_all_shards_become_one_in_the_store() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    let mut prompts = vec!["[[sim:shuffle]]"; 9];
    (prompts[1], prompts[5], prompts[7]) =
        ("[[sim:error=3]]", "[[sim:duplicate]]", "[[sim:foreign=stranger]]");
    // Fails for good: none of its requests has a result.
    (prompts[3], prompts[4]) = ("[[sim:missing]]", "[[sim:error=13]]");
    put_input(&env, &prompts).await;
    env.create("job", spec(2, 3, &s3.endpoint(), json!({}))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (9, 6, 3)), "{:?}", ready(&job));
    alone(&env).await;
    assert_eq!(names_of_maps(&env).await, ["in"]);

    let found = whole(&s3, &job).await;
    let mut all = expected(0..9);
    all.remove(3);
    assert_eq!(keys_of(&found, "results.jsonl"), all, "in input order");
    assert_eq!(keys_of(&found, "errors.jsonl"), ["k001", "k004"]);
    assert_eq!(keys_of(&found, "missing.jsonl"), ["k003"]);
    assert_eq!(keys_of(&found, "unmatched.jsonl"), ["k005", "stranger"]);
    let by_shard = &found.iter().find(|(name, _)| name == "shards.jsonl").unwrap().1;
    assert_eq!((by_shard.len(), by_shard[4]["job"].as_str()), (5, Some("job-0004")));
    let manifest = manifest(&s3, PLACE).await;
    assert_eq!(manifest["shards"], json!({"total": 5, "succeeded": 5, "failed": 0}));
    assert_eq!(
        manifest["requests"],
        json!({"total": 9, "succeeded": 6, "failed": 2, "missing": 1, "missingUnlisted": 0})
    );
    assert_eq!(manifest["unmatchedLines"], json!({"duplicate": 1, "foreign": 1, "malformed": 0}));
    assert_eq!(manifest["usage"], json!(job.status.unwrap().usage));
}

/// Dies at the step, starts again, and must end right with one batch for each shard and nothing left over.
async fn survives(at: &str) {
    let (env, s3) = with_s3().await;
    put_input(&env, &["a", "b [[sim:error=3]]", "c", "d", "e"]).await;
    let mut first = env.spawn(Some(at));
    env.create("job", spec(2, 3, &s3.endpoint(), json!({}))).await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (5, 4, 1)), "{at}: {:?}", ready(&job));
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (3, 3), "{at}");
    let found = whole(&s3, &job).await;
    assert_eq!(keys_of(&found, "results.jsonl"), expected(0..5), "{at}");
    assert_eq!(keys_of(&found, "errors.jsonl"), ["k001"], "{at}");
    alone(&env).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_shards_store_their_results() {
    for at in ["publish:claimed@2", "publish:results.jsonl@2", "publish:manifest.json@3"] {
        survives(at).await;
    }
}

/// The fourth that is published is the whole.
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_the_whole_is_put_together() {
    for at in [
        "before:MergeShards",
        "publish:claimed@4",
        "publish:errors.jsonl@4",
        "publish:shards.jsonl",
        "publish:manifest.json@4",
        "after:MergeShards",
    ] {
        survives(at).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_the_results_of_single_shards_are_deleted() {
    for at in ["before:DropParts", "after:DropParts", "before:DeleteShards", "after:DeleteShards"] {
        survives(at).await;
    }
}

/// Everything was paid for; only the last step does not work.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_breaks_before_the_whole_is_written_gets_it_once_it_is_repaired() {
    for (fault, reason) in [
        (Fault::Status(503), "StoreUnavailable"),
        (Fault::Refuse, "StoreUnavailable"),
        (Fault::Status(403), "StoreAccessDenied"),
    ] {
        let (env, s3, proxy) = with_proxy().await;
        env.operator().await;
        put_input(&env, &["hello", "hello", LONG]).await;
        env.create("job", spec(1, 3, &proxy.endpoint(), json!({}))).await;
        env.until("job", "one left", |j| shards(j) == (3, 0, 1, 2, 0)).await;
        let parts = |names: &[String]| names.iter().filter(|n| n.ends_with("manifest.json")).count();
        assert_eq!(parts(&s3.names().await), 2);
        // The last one is deleted, so that nothing but the whole is still to be written.
        proxy.set(fault);
        env.jobs().delete("job-0002", &DeleteParams::default()).await.unwrap();
        let waits = env.until("job", reason, |j| ready(j).1 == reason).await;
        assert!(!ready(&waits).2.is_empty(), "{fault:?}");
        proxy.set(Fault::None);
        let job = env.cleaned("job").await;
        assert_eq!((state(&job), counts(&job)), ("Failed", (3, 2, 1)), "{fault:?}: {:?}", ready(&job));
        let found = whole(&s3, &job).await;
        assert_eq!(keys_of(&found, "results.jsonl"), ["k000", "k001"], "{fault:?}");
        assert_eq!(keys_of(&found, "missing.jsonl"), ["k002"], "{fault:?}");
        assert_eq!(env.count(Op::BatchCreate), 3, "{fault:?}");
    }
}

/// A shard without results leaves nothing that could be read, and S3 refuses to tell that there is nothing.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_to_allow_listing_the_bucket() {
    let (env, s3, proxy) = with_proxy().await;
    proxy.set(Fault::NoListing);
    env.operator().await;
    put_input(&env, &["hello", "[[sim:job=fail]]", "hello"]).await;
    env.create("job", spec(1, 3, &proxy.endpoint(), json!({}))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Failed", (3, 2, 1)), "{:?}", ready(&job));
    let found = whole(&s3, &job).await;
    assert_eq!(keys_of(&found, "results.jsonl"), ["k000", "k002"]);
    assert_eq!(keys_of(&found, "missing.jsonl"), ["k001"]);
}

/// What a reader finds by the manifest of a shard is what that shard wrote, or the job says that it is not.
#[tokio::test(flavor = "multi_thread")]
async fn the_results_of_a_shard_that_somebody_damaged_are_not_taken_for_its_own() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    put_input(&env, &["hello", LONG]).await;
    env.create("job", spec(1, 2, &s3.endpoint(), json!({}))).await;
    env.until("job", "one left", |j| shards(j) == (2, 0, 1, 1, 0)).await;
    let name = s3.names().await.into_iter().find(|n| n.ends_with("results.jsonl")).unwrap();
    let good = s3.get(&name).await.unwrap();
    s3.put(&name, vec![b'x'; good.len()]).await;
    for batch in env.sim.batches() {
        let _ = env.sim.finish(&batch.name, Outcome::Succeeded); // one has
    }
    let job = env.stalled("job", "OutputConflict").await;
    assert!(ready(&job).2.contains(&name) && ready(&job).2.contains("put it back"), "{:?}", ready(&job));
    assert_eq!(s3.get(&format!("{PLACE}/manifest.json")).await, None);
    s3.put(&name, good).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{:?}", ready(&job));
    assert_eq!(keys_of(&whole(&s3, &job).await, "results.jsonl"), expected(0..2));
    assert_eq!(env.count(Op::BatchCreate), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_were_too_large_for_a_config_map_may_go_to_a_store() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    put_input(&env, &["[[sim:big=400000]]", "[[sim:error=3]]", "[[sim:big=400000]]", "[[sim:big=400000]]"])
        .await;
    env.create("job", sharded(1, 4, json!({}))).await;
    let (_, _, message) = ready(&env.stalled("job", "OutputTooLarge").await);
    assert!(message.contains("spec.output.objectStore"), "{message}");
    let mut output = to_s3(json!({}), &s3.endpoint(), PLACE)["output"].clone();
    output["configMap"] = Value::Null;
    edit(&env, "job", json!({ "output": output })).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (4, 3, 1)), "{:?}", ready(&job));
    let found = whole(&s3, &job).await;
    assert_eq!(keys_of(&found, "results.jsonl"), expected(0..4));
    assert_eq!(keys_of(&found, "errors.jsonl"), ["k001"]);
    alone(&env).await;
    assert_eq!(names_of_maps(&env).await, ["in"], "what the shards had stored is not left over");
    assert_eq!(env.count(Op::BatchCreate), 4);
}

/// And the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn shards_in_a_store_may_be_put_together_in_a_config_map() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    put_input(&env, &["hello", "[[sim:missing]]", LONG]).await;
    env.create("job", spec(2, 2, &s3.endpoint(), json!({}))).await;
    env.until("job", "one left", |j| shards(j) == (2, 0, 1, 1, 0)).await;
    edit(&env, "job", json!({"output": {"objectStore": null, "configMap": {"name": "out"}}})).await;
    let last = children(&env).await.pop().unwrap().status.unwrap().attempts.pop().unwrap();
    assert!(env.sim.finish(&last.batch_name.unwrap(), Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 2, 1)), "{:?}", ready(&job));
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    let found = |key: &str| -> Vec<Value> {
        data[key].lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(keys(&found("results.jsonl")), ["k000", "k002"]);
    assert_eq!(keys(&found("missing.jsonl")), ["k001"]);
    alone(&env).await;
    assert!(s3.names().await.iter().all(|name| !name.contains("shards/")), "{:?}", s3.names().await);
}

/// The results of single shards were paid for: they stay, and no later job of the same name overwrites them.
#[tokio::test(flavor = "multi_thread")]
async fn a_sharded_job_that_is_deleted_leaves_what_its_shards_had_stored() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    put_input(&env, &["hello", LONG]).await;
    env.create("job", spec(1, 2, &s3.endpoint(), json!({}))).await;
    env.until("job", "one left", |j| shards(j) == (2, 0, 1, 1, 0)).await;
    env.delete("job").await;
    env.gone("job").await;
    assert!(children(&env).await.is_empty());
    let kept = s3.names().await;
    assert!(kept.contains(&format!("{PLACE}/shards/0000/manifest.json")), "{kept:?}");
    assert!(!kept.contains(&format!("{PLACE}/reservation.json")), "{kept:?}");
    put_input_again(&env).await;
    env.create("job", spec(1, 2, &s3.endpoint(), json!({}))).await;
    let job = env.stalled("job", "OutputConflict").await;
    assert!(ready(&job).2.contains("shards/0000"), "{:?}", ready(&job));
    running(&env, "job", 1).await;
    // Moved: the shard that has its results keeps them where they are until the whole is put together.
    edit(&env, "job", json!({"output": {"objectStore": {"uri": "s3://inputs/elsewhere"}}})).await;
    running(&env, "job", 2).await;
    for batch in env.sim.batches() {
        let _ = env.sim.finish(&batch.name, Outcome::Succeeded); // some have
    }
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{:?}", ready(&job));
    assert_eq!(keys_of(&read(&s3, "elsewhere", &job).await, "results.jsonl"), expected(0..2));
}

async fn put_input_again(env: &Env) {
    env.config_maps().delete("in", &DeleteParams::default()).await.unwrap();
    put_input(env, &[LONG, LONG]).await;
}
