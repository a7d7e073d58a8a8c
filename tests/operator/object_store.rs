//! Inputs in object stores: real servers, real objects, and what a user sees when something is wrong with them.

use gemini_batch_operator::api::conditions;
use gemini_simulator::{Config, Op};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::harness::{Env, condition, counts, line, ready, state, with_input};
use crate::stores::{BUCKET, SECRET_KEY, Server, s3_secret};

/// A spec whose input lies in the S3 server.
fn from_s3(place: &Value, endpoint: &str, output: Option<&str>) -> Value {
    let mut input = json!({"credentialsRef": {"name": "store"}, "endpoint": endpoint});
    input.as_object_mut().unwrap().extend(place.as_object().unwrap().clone());
    with_input(json!({ "objectStore": input }), output)
}

fn lines(n: usize) -> String {
    (0..n)
        .fold(String::new(), |all, i| all + &line(&format!("k{i}"), "What is the capital of France?") + "\n")
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |all, b| format!("{all}{b:02x}"))
}

/// A server, and an operator that is allowed to talk to it.
async fn with_s3(extra: &[&str]) -> (Env, Server) {
    let server = Server::s3();
    let allowed = format!("--object-store-endpoints={}", server.endpoint());
    let flags: Vec<&str> = extra.iter().copied().chain([allowed.as_str()]).collect();
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &flags).await;
    env.secret("store", &s3_secret()).await;
    (env, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_in_s3_becomes_a_batch_and_its_results_are_joined() {
    let (env, s3) = with_s3(&[]).await;
    env.operator().await;
    let content = lines(50);
    s3.put("team/in.jsonl", content.clone()).await;
    let uri = format!("s3://{BUCKET}/team/in.jsonl");
    env.create("job", from_s3(&json!({ "uri": uri }), &s3.endpoint(), Some("out"))).await;
    let job = env.finished("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (50, 50, 0)));
    // What was paid for is what lies there.
    let attempt = &job.status.as_ref().unwrap().attempts[0];
    assert_eq!(attempt.input_sha256.as_deref(), Some(hex(content.as_bytes()).as_str()));
    assert_eq!(attempt.request_count, Some(50));
    let out = env.config_maps().get("out").await.unwrap();
    let results = &out.data.unwrap()["results.jsonl"];
    let keys: Vec<String> = results
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["key"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(keys, (0..50).map(|i| format!("k{i}")).collect::<Vec<_>>(), "in input order");
    assert_eq!((env.sim.batches().len(), env.count(Op::BatchCreate)), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_what_lies_there_and_sends_nothing() {
    let (env, s3) = with_s3(&[]).await;
    env.operator().await;
    let content = lines(3);
    s3.put("in.jsonl", content.clone()).await;
    let mut spec = from_s3(&json!({"uri": format!("s3://{BUCKET}/in.jsonl")}), &s3.endpoint(), None);
    spec["dryRun"] = json!(true);
    env.create("job", spec).await;
    let job = env
        .until("job", "validated", |j| {
            condition(j, conditions::VALIDATED).is_some_and(|(status, ..)| status == "True")
        })
        .await;
    let found = job.status.as_ref().unwrap().dry_run.as_ref().unwrap();
    assert_eq!(found.size_bytes, i64::try_from(content.len()).unwrap());
    assert_eq!(found.sha256, hex(content.as_bytes()));
    assert_eq!(env.sim.batches().len(), 0);
    let (_, _, message) = ready(&job);
    assert!(!message.contains(SECRET_KEY) && !message.contains("France"), "{message}");
}
