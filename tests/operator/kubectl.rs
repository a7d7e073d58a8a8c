//! What users type: the real kubectl against the real API server.

use gemini_simulator::Config;

use crate::harness::{Env, kubectl, spec, state};

#[tokio::test(flavor = "multi_thread")]
async fn wait_get_and_describe_say_what_a_user_expects() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["one", "[[sim:error=3]]"], Some("out"))).await;
    kubectl(&env, &["wait", "--for=condition=Finished", "gbj/job", "--timeout=60s"]).unwrap();

    let wide = kubectl(&env, &["get", "gbj", "-o", "wide"]).unwrap();
    let words: Vec<Vec<&str>> = wide.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["NAME", "STATE", "MODEL", "SUCCEEDED", "FAILED", "AGE", "BATCH", "REASON"]);
    assert_eq!(words[1][..5], ["job", "Succeeded", "gemini-2.5-flash", "1", "1"], "{wide}");
    assert_eq!(words[1][6], env.sim.batches()[0].name);
    assert_eq!(words[1][7], "CompletedWithFailures");

    let selected = kubectl(&env, &["get", "gbj", "--field-selector", "status.state=Succeeded", "-o", "name"]);
    assert_eq!(selected.unwrap().trim(), "geminibatchjob.geminibatch.dev/job");
    let none = kubectl(&env, &["get", "gbj", "--field-selector", "status.state=Failed", "-o", "name"]);
    assert_eq!(none.unwrap().trim(), "");
    let by_category = kubectl(&env, &["get", "gemini", "-o", "name"]).unwrap();
    assert_eq!(by_category.trim(), "geminibatchjob.geminibatch.dev/job");
    let all = kubectl(&env, &["get", "all", "-o", "name"]).unwrap();
    assert!(!all.contains("geminibatchjob"), "`kubectl delete all --all` must not cancel paid work: {all}");

    let described = kubectl(&env, &["describe", "gbj", "job"]).unwrap();
    for part in
        ["1 of 2 requests succeeded, 1 failed", "k2 (code 3)", "Submitted", "Events:", "submitted to Gemini"]
    {
        assert!(described.contains(part), "{part}: {described}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_too_short_fails_and_a_stalled_job_says_why() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &[]).await;
    env.operator().await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    let waited = kubectl(&env, &["wait", "--for=condition=Finished", "gbj/job", "--timeout=1s"]);
    assert!(waited.unwrap_err().contains("timed out"));
    let mut other = spec(&["x"], None);
    other["credentials"]["secretRef"]["name"] = "nope".into();
    env.create("stuck", other).await;
    kubectl(&env, &["wait", "--for=condition=Stalled", "gbj/stuck", "--timeout=60s"]).unwrap();
    let described = kubectl(&env, &["describe", "gbj", "stuck"]).unwrap();
    assert!(described.contains("Secret nope does not exist"), "{described}");
}

/// `kubectl explain` is the reference: every field is there, with words.
#[tokio::test(flavor = "multi_thread")]
async fn explain_is_the_reference() {
    let env = Env::new().await;
    let tree = kubectl(&env, &["explain", "gbj.spec", "--recursive"]).unwrap();
    for field in
        ["model", "credentials", "secretRef", "requests", "prompt", "configMap", "geminiFile", "output"]
    {
        assert!(tree.contains(field), "{field}: {tree}");
    }
    let crd = serde_json::to_value(gemini_batch_operator::api::crd::crd()).unwrap();
    let root = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut without = Vec::new();
    undescribed("spec", &root["properties"]["spec"], &mut without);
    undescribed("status", &root["properties"]["status"], &mut without);
    assert_eq!(without, Vec::<String>::new(), "fields that `kubectl explain` says nothing about");
}

fn undescribed(path: &str, schema: &serde_json::Value, without: &mut Vec<String>) {
    if schema["description"].as_str().is_none_or(str::is_empty) {
        without.push(path.to_owned());
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        undescribed(&format!("{path}.{name}"), field, without);
    }
    for (name, field) in schema["items"]["properties"].as_object().into_iter().flatten() {
        undescribed(&format!("{path}[].{name}"), field, without);
    }
}

/// The examples are what newcomers copy.
#[tokio::test(flavor = "multi_thread")]
async fn the_examples_are_accepted() {
    let env = Env::new().await;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
    let applied = kubectl(&env, &["apply", "--dry-run=server", "-f", folder]).unwrap();
    for name in ["minimal", "hundred", "partial-failure"] {
        assert!(applied.contains(&format!("geminibatchjob.geminibatch.dev/{name}")), "{applied}");
    }
}
