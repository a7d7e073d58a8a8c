//! What users type: the real kubectl against the real API server.

use gemini_batch_operator::api::conditions;
use gemini_simulator::Config;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::harness::{Env, condition, kubectl, ready, script_in, spec, state};

#[tokio::test(flavor = "multi_thread")]
async fn wait_get_and_describe_say_what_a_user_expects() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["one", "[[sim:error=3]]"], Some("out"))).await;
    kubectl(&env, &["wait", "--for=condition=Finished", "gbj/job", "--timeout=60s"]).unwrap();

    let wide = kubectl(&env, &["get", "gbj", "-o", "wide"]).unwrap();
    let words: Vec<Vec<&str>> = wide.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(
        words[0],
        ["NAME", "STATE", "MODEL", "SUCCEEDED", "FAILED", "AGE", "BATCH", "REASON", "SHARDS"]
    );
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
    for name in ["minimal", "hundred", "partial-failure", "embeddings"] {
        assert!(applied.contains(&format!("geminibatchjob.geminibatch.dev/{name}")), "{applied}");
    }
    for kind in ["serviceaccount", "role.rbac.authorization.k8s.io", "job.batch"] {
        assert!(applied.contains(&format!("{kind}/dependent")), "{applied}");
    }
}

/// The commands of the example's containers, one after another, with the rights of its `ServiceAccount` and no
/// others. (The control plane of the tests has no nodes that could run them.)
#[tokio::test(flavor = "multi_thread")]
async fn the_dependent_waits_and_reads_with_its_own_rights() {
    let env = Env::new().await;
    env.operator().await;
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/dependent-job.yaml");
    kubectl(&env, &["apply", "-f", manifest]).unwrap();
    let job = kubectl(&env, &["get", "job", "dependent", "-o", "json"]).unwrap();
    let job: Value = serde_json::from_str(&job).unwrap();
    let pod = &job["spec"]["template"]["spec"];
    let account = pod["serviceAccountName"].as_str().unwrap();
    let user = format!("--as=system:serviceaccount:{}:{account}", env.namespace);
    let containers = ["initContainers", "containers"].map(|list| pod[list].as_array().unwrap());
    let run_for = |container: &Value, more: &[&str]| {
        let words: Vec<&str> =
            container["command"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        assert_eq!(words[0], "kubectl");
        kubectl(&env, &[&[user.as_str()], &words[1..], more].concat())
    };
    let run = |container: &Value| run_for(container, &[]);

    // The dependent may be there first.
    let early = run_for(&containers[0][0], &["--timeout=1s"]).unwrap_err();
    assert!(early.contains("timed out") && !early.contains("NotFound"), "{early}");
    env.create("minimal", spec(&["one", "two"], Some("minimal-results"))).await;
    let said: Vec<String> = containers.into_iter().flatten().map(|c| run(c).unwrap()).collect();
    assert_eq!(said.last().unwrap().lines().count(), 2, "{said:?}");

    // Nothing else, and no success if there are no results.
    for other in [vec!["get", "configmaps"], vec!["get", "secret", "gemini"], vec!["get", "gbj"]] {
        let error = kubectl(&env, &[&[user.as_str()], other.as_slice()].concat()).unwrap_err();
        assert!(error.contains("Forbidden"), "{error}");
    }
    env.delete("minimal").await;
    env.gone("minimal").await;
    env.config_maps().delete("minimal-results", &DeleteParams::default()).await.unwrap();
    env.create("minimal", spec(&["[[sim:job=fail]]"], Some("minimal-results"))).await;
    let [_, wait, check] = containers[0].as_slice() else { panic!("{pod}") };
    run(wait).unwrap();
    run(check).unwrap_err();
}

/// The script of the examples: exit code, stdout, stderr.
#[tokio::test(flavor = "multi_thread")]
async fn wait_and_read_says_where_the_results_are() {
    let env = Env::new().await;
    env.operator().await;
    env.create("stored", spec(&["one", "two"], Some("out"))).await;
    env.create("kept", spec(&["one"], None)).await;
    env.create("failed", spec(&["[[sim:job=fail]]"], Some("none"))).await;
    let kept = env.finished("kept").await.status.unwrap().output.unwrap().file_name.unwrap();
    let within = |timeout: &str, job: &str| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/wait-and-read.sh");
        let out = script_in(&env, script, &[job, timeout]);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
    };
    let wait_and_read = |job: &str| within("60s", job);
    let (code, said, _) = wait_and_read("stored");
    assert_eq!((code, said.lines().count()), (0, 2), "{said}");
    let (code, said, error) = wait_and_read("kept");
    assert_eq!((code, said.as_str()), (3, ""), "{error}");
    assert!(error.contains(&format!("stay with Gemini, in the file {kept}")), "{error}");
    let (code, said, error) = wait_and_read("failed");
    assert_eq!((code, said.as_str()), (1, ""), "{error}");
    let (_, _, message) = condition(&env.finished("failed").await, conditions::FAILED).unwrap();
    assert!(error.contains(&message), "{error}");

    env.create("running", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("running", "running", |j| state(j) == "Running").await;
    let (code, said, error) = within("1s", "running");
    assert_eq!((code, said.as_str()), (2, ""), "{error}");
    let (_, _, message) = ready(&env.jobs().get("running").await.unwrap());
    assert!(error.contains(&message), "{error}");
    let (code, said, _) = within("1s", "not-there");
    assert_eq!((code, said.as_str()), (2, ""));

    // It may be there first.
    let job = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": "late"}, "spec": spec(&["one"], Some("late"))});
    let job = env.file("late.json", &job.to_string());
    let (code, said, error) = std::thread::scope(|scope| {
        let script = scope.spawn(|| wait_and_read("late"));
        kubectl(&env, &["create", "-f", job.to_str().unwrap()]).unwrap();
        script.join().unwrap()
    });
    assert_eq!((code, said.lines().count()), (0, 1), "{error}");
}
