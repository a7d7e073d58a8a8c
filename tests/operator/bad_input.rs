//! Bad input: a condition that says what to change, no batch created, and where a repair is possible the
//! job goes on by itself.

use gemini_batch_operator::api::conditions;
use gemini_simulator::{Config, Op};
use serde_json::{Value, json};

use crate::harness::{Env, is_true, line, ready, spec, state, with_input};

/// Asserts the stall, repairs, and asserts that the job then finishes.
async fn repairable(env: &Env, spec: Value, reason: &str, says: &str, repair: impl AsyncFnOnce(&Env)) {
    env.create("job", spec).await;
    let job = env.stalled("job", reason).await;
    let (_, _, message) = ready(&job);
    assert!(message.contains(says), "{says}: {message}");
    assert_eq!(state(&job), "Pending");
    assert_eq!(env.sim.batches().len(), 0);
    repair(env).await;
    assert_eq!(state(&env.finished("job").await), "Succeeded");
    assert_eq!(env.sim.batches().len(), 1);
}

fn other_secret(name: &str, key: &str) -> Value {
    let mut spec = spec(&["x"], None);
    spec["credentials"]["secretRef"] = json!({"name": name, "key": key});
    spec
}

fn from_config_map() -> Value {
    with_input(json!({"configMap": {"name": "in", "key": "lines"}}), None)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_secret() {
    let env = Env::new().await;
    env.operator().await;
    repairable(
        &env,
        other_secret("nope", "apiKey"),
        "CredentialsNotFound",
        "Secret nope does not exist",
        async |env| {
            env.secret("nope", &json!({"apiKey": "k"})).await;
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_key_in_the_secret() {
    let env = Env::new().await;
    env.operator().await;
    repairable(
        &env,
        other_secret("gemini", "other"),
        "CredentialsNotFound",
        "has no key other",
        async |env| {
            env.secret("gemini", &json!({"apiKey": "k", "other": "k2"})).await;
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_key() {
    let env = Env::new().await;
    env.operator().await;
    env.secret("gemini", &json!({"apiKey": "\n"})).await;
    repairable(&env, spec(&["x"], None), "CredentialsInvalid", "it is empty", async |env| {
        env.secret("gemini", &json!({"apiKey": "k"})).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_gemini_refuses() {
    let keys = Some(vec![("good".to_owned(), "p".to_owned())]);
    let env = Env::with(Config { speed: 600.0, keys, ..Config::default() }, &[]).await;
    env.operator().await;
    repairable(&env, spec(&["x"], None), "CredentialsRefused", "Put a valid key", async |env| {
        env.secret("gemini", &json!({"apiKey": "good"})).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_config_map_and_a_missing_key_in_it() {
    let env = Env::new().await;
    env.operator().await;
    repairable(&env, from_config_map(), "InputNotFound", "ConfigMap in does not exist", async |env| {
        env.config_map("in", &json!({"other": "x"})).await;
        env.until("job", "told of the key", |j| ready(j).2.contains("has no key lines")).await;
        env.config_map("in", &json!({"lines": line("a", "x")})).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_are_no_requests() {
    let env = Env::new().await;
    env.operator().await;
    let mut lines: Vec<String> = (1..=9).map(|i| line(&format!("k{i}"), "x")).collect();
    lines[6] = "not json".to_owned();
    env.config_map("in", &json!({"lines": lines.join("\n")})).await;
    repairable(&env, from_config_map(), "InputInvalid", "line 7 is not valid JSON", async |env| {
        env.config_map("in", &json!({"lines": format!("{}\n{}", line("a", "x"), line("a", "y"))})).await;
        env.until("job", "told of the key", |j| ready(j).2.contains("lines 1 and 2 have the same key")).await;
        env.config_map("in", &json!({"lines": "\n"})).await;
        env.until("job", "told of emptiness", |j| ready(j).2.contains("holds no requests")).await;
        env.config_map("in", &json!({"lines": line("a", "x")})).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_too_large() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--max-input-bytes=500"]).await;
    env.operator().await;
    env.config_map("in", &json!({"lines": line("a", &"x".repeat(500))})).await;
    repairable(
        &env,
        from_config_map(),
        "InputTooLarge",
        "at most 500 bytes are allowed: split",
        async |env| {
            env.config_map("in", &json!({"lines": line("a", "x")})).await;
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_config_map_that_is_not_ours() {
    let env = Env::new().await;
    env.operator().await;
    env.config_map("out", &json!({"precious": "data"})).await;
    repairable(
        &env,
        spec(&["x"], Some("out")),
        "OutputConflict",
        "name another one in spec.output, or, if what it holds is not needed any more, delete it",
        async |env| {
            let there = env.config_maps().get("out").await.unwrap();
            assert_eq!(there.data.unwrap()["precious"], "data");
            env.config_maps().delete("out", &kube::api::DeleteParams::default()).await.unwrap();
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_is_final() {
    let env = Env::new().await;
    env.operator().await;
    let mut spec = spec(&["x"], Some("out"));
    spec["model"] = json!("gpt-nope");
    env.create("job", spec).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), ready(&job).1.as_str()), ("Failed", "ModelNotFound"));
    assert!(ready(&job).2.contains("gpt-nope") && ready(&job).2.contains("create a new GeminiBatchJob"));
    assert!(is_true(&job, conditions::FAILED));
    assert_eq!((env.sim.batches().len(), env.sim.files().len()), (0, 0));
    assert!(env.config_maps().get_opt("out").await.unwrap().is_none(), "the reservation is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_gemini_refuses_is_final_and_names_the_lines() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["fine", "CANARY-PROMPT [[sim:refuse-line]]"], None)).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), ready(&job).1.as_str()), ("Failed", "InputRefused"));
    let message = ready(&job).2;
    assert!(message.contains("line 2") && !message.contains("CANARY"), "{message}");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_and_no_prompt_is_shown_anywhere() {
    let keys = Some(vec![("CANARY-KEY-good".to_owned(), "p".to_owned())]);
    let env = Env::with(Config { speed: 600.0, keys, ..Config::default() }, &[]).await;
    let operator = env.spawn_with(None, &["--log-level=trace"]);
    env.secret("gemini", &json!({"apiKey": "CANARY-KEY-bad"})).await;
    env.create("job", spec(&["CANARY-PROMPT [[sim:error-echo]]", "CANARY-PROMPT fine"], Some("out"))).await;
    env.stalled("job", "CredentialsRefused").await;
    env.secret("gemini", &json!({"apiKey": "CANARY-KEY-good"})).await;
    env.create("refused", spec(&["CANARY-PROMPT [[sim:refuse-line]]"], None)).await;
    let mut shown = String::new();
    for name in ["job", "refused"] {
        shown += &serde_json::to_string(&env.cleaned(name).await.status).unwrap();
    }
    let events: kube::Api<k8s_openapi::api::core::v1::Event> =
        kube::Api::namespaced(env.client.clone(), &env.namespace);
    let events = events.list(&kube::api::ListParams::default()).await.unwrap().items;
    assert!(!events.is_empty());
    shown += &serde_json::to_string(&events).unwrap();
    let log = operator.log();
    assert!(log.contains("create: sending"), "the log is the operator's");
    shown += &log;
    let metrics = env.metrics().await;
    assert!(metrics.contains("gemini_batch_callbacks_total{outcome=\"accepted\""), "{metrics}");
    shown += &metrics;
    assert!(!shown.contains("CANARY"), "{shown}");
    for uri in env.sim.batches().iter().flat_map(|b| &b.uris) {
        let token = uri.rsplit('/').next().unwrap();
        assert!(!shown.contains(token), "the token of a callback URL is shown");
    }
}
