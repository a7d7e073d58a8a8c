//! Batches of embeddings. Whether Gemini calls back for them is not known, so each answer is tried: it does, it takes
//! the webhook and never calls, it refuses the webhook.

use std::time::{Duration, Instant};

use gemini_batch_operator::api::{Attempt, GeminiBatchJob};
use gemini_batch_operator::controller::Timings;
use gemini_simulator::{Config, LogEntry, Op, Outcome, Switches};
use jiff::SignedDuration;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::{
    Env, PATIENCE, condition, counts, kubectl, line, ready, spec, state, timings, with_input,
};

const EMBEDDER: &str = "gemini-embedding-001";

/// A spec with inline texts, keys k1, k2, ….
fn embed(texts: &[&str], output: Option<&str>) -> Value {
    embedding(spec(texts, output))
}

fn embedding(mut spec: Value) -> Value {
    spec["model"] = json!(EMBEDDER);
    spec["method"] = json!("EmbedContent");
    spec
}

/// One line of JSON Lines input.
fn text(key: &str, text: &str) -> String {
    json!({"key": key, "request": {"content": {"parts": [{"text": text}]}, "outputDimensionality": 3}})
        .to_string()
}

/// Nothing but a callback or polling finds an end, and polling is quick.
async fn started(switches: Switches) -> Env {
    let config = Config { speed: 600.0, switches, ..Config::default() };
    let env = Env::with(config, &["--sweep-seconds=86400"]).await;
    env.operator_with(Timings { poll: SignedDuration::from_millis(300), ..timings() }).await;
    env
}

fn refusing() -> Switches {
    Switches { embed_webhook_refused: true, ..Switches::default() }
}

fn attempts(job: &GeminiBatchJob) -> Vec<Attempt> {
    job.status.clone().unwrap().attempts
}

fn batch_of(job: &GeminiBatchJob) -> String {
    attempts(job).last().unwrap().batch_name.clone().unwrap()
}

async fn running(env: &Env, name: &str) -> GeminiBatchJob {
    env.until(name, "running", |j| state(j) == "Running").await
}

fn creates(env: &Env) -> Vec<LogEntry> {
    env.log().into_iter().filter(|e| e.op == Op::BatchCreate).collect()
}

/// Of each create: the answer, and whether a webhook was asked for.
fn asked(env: &Env) -> Vec<(String, bool)> {
    let hook = |e: &LogEntry| e.body.as_ref().is_some_and(|b| b["batch"].get("webhookConfig").is_some());
    creates(env).iter().map(|e| (e.status.clone(), hook(e))).collect()
}

async fn data(env: &Env, name: &str) -> (Vec<Value>, Value) {
    let data = env.config_maps().get(name).await.unwrap().data.unwrap();
    let lines = data["results.jsonl"].lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    (lines, serde_json::from_str(&data["manifest.json"]).unwrap())
}

async fn metric(env: &Env, line: &str) {
    let start = Instant::now();
    while !env.metrics().await.lines().any(|l| l.trim_start_matches("gemini_batch_") == line) {
        assert!(start.elapsed() < PATIENCE, "{line}: {}", env.metrics().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn edit(env: &Env, name: &str, spec: Value) {
    let patch = Patch::Merge(json!({ "spec": spec }));
    env.jobs().patch(name, &PatchParams::default(), &patch).await.unwrap();
}

/// The example that users copy. Gemini calls back.
#[tokio::test(flavor = "multi_thread")]
async fn texts_become_vectors() {
    let env = started(Switches::default()).await;
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/embeddings.yaml");
    kubectl(&env, &["apply", "-f", example]).unwrap();
    let job = env.cleaned("embeddings").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{:?}", ready(&job));

    let [create] = &creates(&env)[..] else { panic!("one create") };
    assert_eq!(create.path, "/v1beta/models/gemini-embedding-001:asyncBatchEmbedContent");
    assert_eq!(asked(&env), [("200".to_owned(), true)]);
    assert_eq!(
        env.ops(),
        [Op::UploadStart, Op::UploadChunk, Op::BatchCreate, Op::BatchGet, Op::Download, Op::FileDelete]
    );
    metric(&env, "ends_learned_total{by=\"callback\"} 1").await;

    let (lines, manifest) = data(&env, "embeddings").await;
    let length = |line: &Value| line["response"]["embedding"]["values"].as_array().unwrap().len();
    assert_eq!(lines.iter().map(|l| l["key"].as_str().unwrap()).collect::<Vec<_>>(), ["short", "whole"]);
    assert_eq!(lines.iter().map(length).collect::<Vec<_>>(), [8, 256]);
    assert_eq!((&manifest["method"], &manifest["model"]), (&json!("EmbedContent"), &json!(EMBEDDER)));
    let usage = job.status.unwrap().usage.unwrap();
    assert!(usage.prompt_tokens > 0);
    assert_eq!((usage.output_tokens, usage.total_tokens), (0, usage.prompt_tokens));
}

/// Failures are counted as for any other batch, and tokens in both shapes that Gemini was seen to give them in.
#[tokio::test(flavor = "multi_thread")]
async fn lines_of_a_config_map_some_of_which_fail() {
    let env = started(Switches::default()).await;
    let lines = [text("a", "x"), text("b", "x [[sim:error=3]]"), text("c", "x [[sim:token-count]]")];
    env.config_map("in", &json!({"lines": lines.join("\n")})).await;
    let input = json!({"configMap": {"name": "in", "key": "lines"}});
    env.create("job", embedding(with_input(input, Some("out")))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 2, 1)));
    assert!(ready(&job).2.contains("b (code 3)"), "{:?}", ready(&job));
    assert_eq!(job.status.unwrap().usage.unwrap().prompt_tokens, 1 + 6);
    assert_eq!(data(&env, "out").await.0.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_is_taken_and_never_called_costs_only_time() {
    let switches = Switches { embed_events: false, ..Switches::default() };
    let config = Config { speed: 600.0, switches, ..Config::default() };
    let env = Env::with(config, &["--sweep-seconds=1"]).await;
    env.operator().await;
    env.create("job", embed(&["x"], Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)));
    assert_eq!(asked(&env), [("200".to_owned(), true)]);
    assert!(env.sim.deliveries().is_empty() && !attempts(&job)[0].polled);
    metric(&env, "ends_learned_total{by=\"sweep\"} 1").await;
}

/// The refusal is proof that nothing was created: the batch is asked for again without a webhook, and polled.
#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_is_refused_is_done_without() {
    let env = started(refusing()).await;
    env.create("job", embed(&["x [[sim:job=stall]]"], Some("out"))).await;
    let job = running(&env, "job").await;
    assert_eq!(asked(&env), [("400".to_owned(), true), ("200".to_owned(), false)]);
    assert_eq!(env.count(Op::UploadStart), 1, "the input is there already");
    assert_eq!(env.sim.batches().len(), 1);
    let [attempt] = &attempts(&job)[..] else { panic!("it is one attempt") };
    assert!(attempt.polled && attempt.refusals == Some(1) && attempt.refusal.is_none());
    assert!(
        ready(&job).2.ends_with("which refuses a webhook for it; its end is found by polling"),
        "{:?}",
        ready(&job)
    );
    let events: Api<Event> = Api::namespaced(env.client.clone(), &env.namespace);
    let events = events.list(&ListParams::default()).await.unwrap().items;
    let told: Vec<_> = events.iter().filter(|e| e.reason.as_deref() == Some("WebhookRefused")).collect();
    assert_eq!(told.len(), 1);
    assert!(told[0].note.as_ref().unwrap().contains("nothing was created. It is sent again without one"));

    // It is polled with one list each time, and no GET while it goes on.
    env.until_asked(Op::BatchList, 3).await;
    assert_eq!(env.count(Op::BatchGet), 0);
    assert!(env.sim.finish(&batch_of(&job), Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)));
    assert_eq!(data(&env, "out").await.0.len(), 1);
    assert_eq!((env.count(Op::BatchGet), env.sim.deliveries().len()), (1, 0));
    metric(&env, "ends_learned_total{by=\"polling\"} 1").await;

    // The next one is not refused first, and others keep their webhooks.
    let before = creates(&env).len();
    env.create("next", embed(&["y"], None)).await;
    assert_eq!(state(&env.cleaned("next").await), "Succeeded");
    env.create("other", spec(&["z"], None)).await;
    assert_eq!(state(&env.cleaned("other").await), "Succeeded");
    let later: Vec<_> = asked(&env).into_iter().skip(before).collect();
    assert_eq!(later, [("200".to_owned(), false), ("200".to_owned(), true)]);
}

/// Jobs that have a webhook are not polled because of those that have none.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_has_no_webhook_is_polled() {
    let env = started(Switches { lose_events: true, ..refusing() }).await;
    env.create("hooked", spec(&["x"], None)).await;
    let hooked = batch_of(&running(&env, "hooked").await);
    let start = Instant::now();
    while !env.sim.batches().iter().any(|b| b.name == hooked && b.state == "SUCCEEDED") {
        assert!(start.elapsed() < PATIENCE, "{:?}", env.sim.batches());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    env.create("polled", embed(&["x [[sim:job=stall]]"], None)).await;
    let polled = running(&env, "polled").await;
    env.until_asked(Op::BatchList, 3).await;
    assert!(env.sim.finish(&batch_of(&polled), Outcome::Succeeded));
    env.cleaned("polled").await;
    assert_eq!(
        state(&env.jobs().get("hooked").await.unwrap()),
        "Running",
        "over at Gemini, and not looked at"
    );
    assert_eq!(env.count(Op::BatchGet), 1);
}

/// A further attempt is not refused first, whatever the process remembers.
#[tokio::test(flavor = "multi_thread")]
async fn further_attempts_go_without_a_webhook_as_well() {
    let env =
        Env::with(Config { speed: 600.0, switches: refusing(), ..Config::default() }, &["--sweep-seconds=1"])
            .await;
    let mut first = env.spawn(Some("after:AttemptEnded"));
    let mut job = embed(&["x [[sim:job=expire]]"], None);
    job["backoffLimit"] = json!(1);
    env.create("job", job).await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), ready(&job).1.as_str()), ("Failed", "BatchExpired"));
    let no = ("200".to_owned(), false);
    assert_eq!(asked(&env), [("400".to_owned(), true), no.clone(), no]);
    assert!(attempts(&job).iter().all(|a| a.polled) && attempts(&job).len() == 2);
}

/// Whoever goes on after a crash knows that the webhook was refused, and makes one batch.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_webhook_survives_a_crash() {
    for at in ["before:Refused", "after:Refused", "after:Submitted"] {
        let config = Config { speed: 600.0, switches: refusing(), ..Config::default() };
        let env = Env::with(config, &["--sweep-seconds=86400"]).await;
        let mut first = env.spawn(Some(at));
        env.create("job", embed(&["x"], None)).await;
        first.ended().await;
        // A refusal that was not recorded is an unknown outcome: behind its fence it is asked anew.
        let quick = Timings {
            poll: SignedDuration::from_millis(300),
            resend_grace: SignedDuration::from_secs(2),
            ..timings()
        };
        env.operator_with(quick).await;
        let job = env.cleaned("job").await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)), "{at}");
        let made = asked(&env).into_iter().filter(|(status, _)| status == "200");
        assert_eq!(made.collect::<Vec<_>>(), [("200".to_owned(), false)], "{at}");
        assert_eq!((env.sim.batches().len(), attempts(&job)[0].polled), (1, true), "{at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_job_leaves_no_embeddings_running() {
    let env = started(refusing()).await;
    let mut job = embed(&["x [[sim:job=stall]]"], None);
    job["deletionPolicy"] = json!("Delete");
    env.create("job", job).await;
    running(&env, "job").await;
    env.delete("job").await;
    env.gone("job").await;
    let batch = &env.sim.batches()[0];
    assert!(batch.cancelled && batch.deleted && env.sim.files().is_empty());
}

/// Lines of the other kind are told before anything is uploaded, and the method can still be corrected then.
#[tokio::test(flavor = "multi_thread")]
async fn requests_of_the_wrong_kind_are_told_before_they_are_sent() {
    let env = started(Switches::default()).await;
    env.config_map("in", &json!({"answers": line("a", "x"), "vectors": text("a", "x")})).await;
    let from = |key: &str| with_input(json!({"configMap": {"name": "in", "key": key}}), None);
    env.create("answers", embedding(from("answers"))).await;
    env.create("vectors", from("vectors")).await;
    let answers = ready(&env.stalled("answers", "InputInvalid").await).2;
    assert!(answers.contains("line 1 has a \"request\" with \"contents\""), "{answers}");
    let vectors = ready(&env.stalled("vectors", "InputInvalid").await).2;
    assert!(vectors.contains("for embeddings set spec.method to EmbedContent"), "{vectors}");
    assert!(env.log().iter().all(|e| e.op != Op::UploadStart));
    edit(&env, "answers", json!({"method": "GenerateContent", "model": "gemini-2.5-flash"})).await;
    edit(&env, "vectors", json!({"method": "EmbedContent", "model": EMBEDDER})).await;
    for name in ["answers", "vectors"] {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_for_something_else_is_told() {
    let env = started(Switches::default()).await;
    let mut answers = spec(&["x"], None);
    answers["model"] = json!(EMBEDDER);
    let mut vectors = embed(&["x"], None);
    vectors["model"] = json!("gemini-2.5-flash");
    for (name, spec, says) in [
        ("answers", answers, "or with spec.method EmbedContent if it is a model for embeddings"),
        ("vectors", vectors, "for example gemini-embedding-001, or without spec.method"),
    ] {
        env.create(name, spec).await;
        let job = env.cleaned(name).await;
        let (_, reason, message) = ready(&job);
        assert_eq!((state(&job), reason.as_str()), ("Failed", "ModelNotFound"));
        assert!(message.contains(says), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_checks_the_lines_of_its_method() {
    let env = started(Switches::default()).await;
    env.config_map("in", &json!({"lines": line("a", "x")})).await;
    let mut job = embedding(with_input(json!({"configMap": {"name": "in", "key": "lines"}}), None));
    job["dryRun"] = json!(true);
    env.create("job", job).await;
    env.stalled("job", "InputInvalid").await;
    env.config_map("in", &json!({"lines": text("a", "x")})).await;
    let validated =
        |j: &GeminiBatchJob| condition(j, "Validated").is_some_and(|(status, ..)| status == "True");
    let job = env.until("job", "validated", validated).await;
    assert!(job.status.unwrap().dry_run.unwrap().size_bytes > 0);
    assert!(env.sim.batches().is_empty() && env.count(Op::UploadStart) == 0);
}

/// Somebody else's batch is what it is: `method` only describes it. Inline results have a name of their own there.
#[tokio::test(flavor = "multi_thread")]
async fn embeddings_of_somebody_else_are_taken_over() {
    let config = Config { speed: 600.0, ..Config::default() };
    let env = Env::with(config, &["--sweep-seconds=1"]).await;
    env.operator().await;
    let item = json!({"request": {"content": {"parts": [{"text": "x"}]}}, "metadata": {"key": "mine"}});
    let batch =
        json!({"batch": {"displayName": "theirs", "inputConfig": {"requests": {"requests": [item]}}}});
    let url = format!("{}/v1beta/models/{EMBEDDER}:asyncBatchEmbedContent", env.sim.base_url());
    let create = reqwest::Client::new().post(url).header("x-goog-api-key", "test-key").json(&batch);
    let created: Value = create.send().await.unwrap().json().await.unwrap();
    for method in [None, Some("EmbedContent")] {
        let name = method.map_or("without", |_| "with");
        let mut job = spec(&[], Some(name));
        job.as_object_mut().unwrap().remove("input");
        job["importFrom"] = json!({"batchName": created["name"]});
        job["model"] = json!(EMBEDDER);
        if let Some(method) = method {
            job["method"] = json!(method);
        }
        env.create(name, job).await;
        let job = env.cleaned(name).await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)), "{name}: {:?}", ready(&job));
        let (lines, manifest) = data(&env, name).await;
        assert_eq!((&lines[0]["key"], lines.len()), (&json!("mine"), 1));
        assert!(lines[0]["response"]["embedding"]["values"].is_array());
        assert_eq!(manifest["method"], method.unwrap_or("GenerateContent"));
    }
}
