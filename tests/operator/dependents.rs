//! Programs and tools that depend on jobs: the examples of `examples/dependents`, and `helm --wait`, against real
//! objects. What Lua, CEL and kstatus make of the same objects is tested in `tests/dependents`, which is Go.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use gemini_simulator::{Config, Op, Outcome};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::PostParams;
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::harness::{Cluster, Env, PATIENCE, Process, condition, is_true, kubectl, spec, state};
use crate::least_privilege::helm;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/dependents");

fn with(mut spec: Value, more: &[(&str, Value)]) -> Value {
    for (name, value) in more {
        spec[name] = value.clone();
    }
    spec
}

// ------------------------------------------------------------------------ objects for other tools

/// One object for each row of the table in docs/dependents.md, as kubectl prints it, for `tests/dependents`.
#[tokio::test(flavor = "multi_thread")]
async fn objects_for_other_tools() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dependents");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let env = Env::new().await;
    let keep = |object: &str, name: &str| {
        let content = kubectl(&env, &["get", "gbj", object, "-o", "json"]).unwrap();
        let value: Value = serde_json::from_str(&content).unwrap();
        std::fs::write(folder.join(format!("{name}.json")), content).unwrap();
        (value["status"]["observedGeneration"].as_i64().unwrap(), value["metadata"]["generation"].clone())
    };

    // No operator has seen this one.
    let running = spec(&["[[sim:job=stall]]"], None);
    env.create("running", running.clone()).await;
    assert_eq!(keep("running", "fresh"), (-1, json!(1)));

    // No callback tells of a cancellation.
    let mut operator = env.spawn_with(None, &["--sweep-seconds=1"]);
    let nobody = json!({"secretRef": {"name": "not-there"}});
    env.create("submitted", with(running.clone(), &[("readinessPolicy", json!("WhenSubmitted"))])).await;
    env.create("stalled", with(running.clone(), &[("credentials", nobody)])).await;
    env.create("suspended", with(running, &[("suspend", json!(true))])).await;
    env.create("complete", spec(&["one", "two"], Some("out"))).await;
    env.create("partial", spec(&["one", "[[sim:error=3]]"], None)).await;
    env.create("failed", spec(&["[[sim:job=fail]]"], None)).await;
    env.create("cancelled", spec(&["[[sim:job=cancel]]"], None)).await;
    for name in ["running", "submitted"] {
        env.until(name, "running", |j| state(j) == "Running").await;
    }
    env.stalled("stalled", "CredentialsNotFound").await;
    env.until("suspended", "suspended", |j| state(j) == "Suspended").await;
    for (name, end) in [
        ("complete", "Succeeded"),
        ("partial", "Succeeded"),
        ("failed", "Failed"),
        ("cancelled", "Cancelled"),
    ] {
        assert_eq!(state(&env.cleaned(name).await), end, "{name}");
    }
    let all = ["running", "submitted", "stalled", "suspended", "complete", "partial", "failed", "cancelled"];
    for name in all {
        assert_eq!(keep(name, name), (1, json!(1)));
    }

    // Edited while no operator is there to see it.
    operator.kill();
    for name in ["running", "complete", "failed"] {
        kubectl(
            &env,
            &["patch", "gbj", name, "--type=merge", "-p", r#"{"spec":{"deletionTimeoutSeconds":60}}"#],
        )
        .unwrap();
        assert_eq!(keep(name, &format!("{name}-edited")), (1, json!(2)));
    }
    // kubectl does not believe even an end that is about an older generation.
    let waited = kubectl(&env, &["wait", "--for=condition=Complete", "gbj/complete", "--timeout=1s"]);
    assert!(waited.unwrap_err().contains("timed out"));
}

// --------------------------------------------------------------------------------------- programs

/// The program of `examples/dependents/kube-rs`. Cargo builds it beside the operator, for its own test: not if only
/// the tests of the operator are asked for.
fn kube_rs() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_gemini-batch-operator")).with_file_name("dependent-kube-rs");
    let written = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    let source = written(&Path::new(EXAMPLES).join("kube-rs/src/main.rs"));
    assert!(
        source.is_some() && written(&path) >= source,
        "{} is not up to date: `cargo build --workspace`",
        path.display()
    );
    path
}

/// A Python that has what `examples/dependents/python` needs.
fn python() -> PathBuf {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    let install = || {
        let out = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/hack/venv.sh"))
            .args(["dependents", &format!("{EXAMPLES}/python/requirements.txt")])
            .stderr(Stdio::inherit())
            .output()
            .expect("hack/venv.sh installs Python packages; it needs bash");
        assert!(out.status.success(), "the packages could not be installed, see above");
        String::from_utf8(out.stdout).unwrap().trim().into()
    };
    PYTHON.get_or_init(install).clone()
}

/// The kubeconfig of somebody who may do this in the test's namespace, and nothing else.
async fn somebody(env: &Env, rules: Value) -> PathBuf {
    let user = format!("dependent-of-{}", env.namespace);
    let role: Role =
        serde_json::from_value(json!({"metadata": {"name": "dependent"}, "rules": rules})).unwrap();
    let binding: RoleBinding = serde_json::from_value(json!({"metadata": {"name": "dependent"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "dependent"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]}))
    .unwrap();
    let here = (env.client.clone(), env.namespace.as_str());
    Api::namespaced(here.0.clone(), here.1).create(&PostParams::default(), &role).await.unwrap();
    Api::namespaced(here.0, here.1).create(&PostParams::default(), &binding).await.unwrap();
    env.current_here(&env.kubeconfig_as(&user))
}

/// Waits until a ConfigMap has this in its data.
async fn until_data(env: &Env, program: &Process, name: &str, key: &str) -> ConfigMap {
    let has = |map: Option<&ConfigMap>| {
        map.and_then(|m| m.data.as_ref()).is_some_and(|data| data.contains_key(key))
    };
    let waited = tokio::time::timeout(PATIENCE, await_condition(env.config_maps(), name, has)).await;
    assert!(waited.is_ok(), "{name} has no {key}: {}", program.log());
    waited.unwrap().unwrap().unwrap()
}

fn data<'a>(map: &'a ConfigMap, key: &str) -> &'a str {
    &map.data.as_ref().unwrap()[key]
}

#[tokio::test(flavor = "multi_thread")]
async fn kube_rs_waits_for_each_end_and_does_nothing_twice() {
    let env = Env::new().await;
    env.operator().await;
    let rules = json!([
        {"apiGroups": ["geminibatch.dev"], "resources": ["geminibatchjobs"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch", "patch"]}]);
    let kubeconfig = somebody(&env, rules).await;
    let waits_for = async |name: &str, job: &str| {
        let map = serde_json::from_value(json!({"data": {"job": job},
            "metadata": {"name": name, "labels": {"example.com/waits-for-batch": ""}}}));
        env.config_maps().create(&PostParams::default(), &map.unwrap()).await.unwrap();
    };

    // Waits before the job is there, and for one that has ended.
    let mut program = env.start(&kube_rs(), &[], &kubeconfig);
    waits_for("after-late", "late").await;
    env.create("early", spec(&["[[sim:job=fail]]"], None)).await;
    env.finished("early").await;
    waits_for("after-early", "early").await;
    let early = until_data(&env, &program, "after-early", "state").await;
    assert_eq!((data(&early, "state"), data(&early, "reason")), ("Failed", "BatchFailed"));
    env.create("late", spec(&["[[sim:job=stall]]", "two"], Some("out"))).await;
    env.until("late", "running", |j| state(j) == "Running").await;
    waits_for("meanwhile", "early").await; // by the time this is done, it has seen that "late" runs
    until_data(&env, &program, "meanwhile", "state").await;
    program.kill();
    assert!(!env.config_maps().get("after-late").await.unwrap().data.unwrap().contains_key("state"));

    // It ends while nobody watches.
    assert!(env.sim.finish(&env.sim.batches()[1].name, Outcome::Succeeded));
    env.finished("late").await;
    let program = env.start(&kube_rs(), &[], &kubeconfig);
    let late = until_data(&env, &program, "after-late", "state").await;
    assert_eq!((data(&late, "state"), data(&late, "results")), ("Succeeded", "2"), "{late:?}");
    // By now it has looked at all others.
    env.create("last", spec(&["one"], None)).await;
    waits_for("after-last", "last").await;
    until_data(&env, &program, "after-last", "state").await;
    let again = env.config_maps().get("after-early").await.unwrap();
    assert_eq!(again.resource_version(), early.resource_version(), "{}", program.log());
    assert!(!program.log().contains("after-early"), "done twice: {}", program.log());
}

const PYTHON_PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/dependents/python/dependent.py");

/// What the Python program says it needs, and no more.
async fn python_somebody(env: &Env) -> PathBuf {
    let rules = json!([
        {"apiGroups": ["geminibatch.dev"], "resources": ["geminibatchjobs"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "create"]}]);
    somebody(env, rules).await
}

/// Waits for what it does for a job.
async fn python_did(env: &Env, program: &Process, job: &str) -> ConfigMap {
    let uid = env.jobs().get(job).await.unwrap().uid().unwrap();
    until_data(env, program, &format!("python-{uid}"), "results").await
}

#[tokio::test(flavor = "multi_thread")]
async fn python_acts_once_for_each_job_that_succeeds() {
    let env = Env::new().await;
    env.operator().await;
    let kubeconfig = python_somebody(&env).await;
    let start = || env.start(&python(), &[PYTHON_PROGRAM], &kubeconfig);

    env.create("before", spec(&["one"], Some("out-1"))).await;
    env.create("failed", spec(&["[[sim:job=fail]]"], None)).await;
    env.finished("before").await;
    env.finished("failed").await;
    let mut first = start();
    let before = python_did(&env, &first, "before").await;
    assert_eq!(data(&before, "results"), "1");
    env.create("during", spec(&["one", "two"], Some("out-2"))).await;
    let during = python_did(&env, &first, "during").await;
    assert_eq!((data(&during, "job"), data(&during, "results")), ("during", "2"));

    // Another one, and later this one again: each is told of all jobs and does only what is new.
    let other = start();
    first.kill();
    env.create("after", spec(&["one"], None)).await;
    python_did(&env, &other, "after").await;
    let second = start();
    env.create("last", spec(&["one"], None)).await;
    python_did(&env, &second, "last").await;
    let failed = env.jobs().get("failed").await.unwrap().uid().unwrap();
    assert_eq!(env.config_maps().get_opt(&format!("python-{failed}")).await.unwrap(), None);
    for map in [before, during] {
        let now = env.config_maps().get(&map.name_any()).await.unwrap();
        assert_eq!(now.metadata, map.metadata, "done twice");
    }

    // A job of the same name is another job.
    env.delete("before").await;
    env.gone("before").await;
    env.create("before", spec(&["one"], Some("out-3"))).await;
    python_did(&env, &second, "before").await;
}

/// An API server that has restarted does not know what was before, and says 410 to a watch from there.
#[tokio::test(flavor = "multi_thread")]
async fn python_lists_again_when_its_watch_has_expired() {
    let cluster = Arc::new(Cluster::start());
    let env = Env::on(Arc::clone(&cluster), Config { speed: 600.0, ..Config::default() }, &[]).await;
    env.operator().await;
    let mut program = env.start(&python(), &[PYTHON_PROGRAM], &python_somebody(&env).await);
    env.create("before", spec(&["one"], None)).await;
    let before = python_did(&env, &program, "before").await;
    cluster.ctl("restart", "kube-apiserver");
    env.create("after", spec(&["one"], None)).await;
    python_did(&env, &program, "after").await;
    assert!(program.runs(), "{}", program.log());
    let log = program.log();
    assert!(log.contains("listing all jobs again"), "the watch did not expire: {log}");
    let now = env.config_maps().get(&before.name_any()).await.unwrap();
    assert_eq!(now.metadata, before.metadata, "done twice: {log}");
}

// ------------------------------------------------------------------------------------------ tools

/// What Argo Workflows hands to kubectl: the manifest, and the path of the output parameter.
#[tokio::test(flavor = "multi_thread")]
async fn the_step_of_argo_workflows_is_a_job_whose_results_are_found() {
    let env = Env::new().await;
    env.operator().await;
    let workflow = std::fs::read_to_string(format!("{EXAMPLES}/argo-workflows.yaml")).unwrap();
    let workflow: Value = serde_yaml::from_str(&workflow).unwrap();
    let templates = workflow["spec"]["templates"].as_array().unwrap();
    let step = templates.iter().find(|t| t.get("resource").is_some()).unwrap();
    assert_eq!(step["resource"]["action"], "apply");
    let manifest = step["resource"]["manifest"].as_str().unwrap().replace("{{workflow.name}}", "batch-x7k2p");
    let file = env.file("manifest.yaml", &manifest);
    for _ in 0..2 {
        kubectl(&env, &["apply", "-f", file.to_str().unwrap()]).unwrap(); // a step that is run again
    }
    env.finished("batch-x7k2p").await;
    assert_eq!(env.count(Op::BatchCreate), 1);
    let path = step["outputs"]["parameters"][0]["valueFrom"]["jsonPath"].as_str().unwrap();
    let found = kubectl(&env, &["get", "gbj", "batch-x7k2p", "-o", &format!("jsonpath={path}")]).unwrap();
    assert_eq!(found, "batch-x7k2p-results");
    assert!(env.config_maps().get(&found).await.unwrap().data.unwrap().contains_key("results.jsonl"));
}

/// `helm install --wait` of a chart that is one job.
fn helm_install(env: &Env, name: &str, spec: &Value, flags: &[&str]) -> Process {
    let job = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": name}, "spec": spec});
    let chart = env.file(&format!("{name}.chart"), "").with_extension("d");
    std::fs::create_dir_all(chart.join("templates")).unwrap();
    std::fs::write(chart.join("Chart.yaml"), format!("apiVersion: v2\nname: {name}\nversion: 1.0.0\n"))
        .unwrap();
    std::fs::write(chart.join("templates/job.yaml"), job.to_string()).unwrap();
    let args = [&["install", name, chart.to_str().unwrap(), "--wait"], flags].concat();
    env.start(&helm(), &args, &env.current_here(env.kubeconfig()))
}

fn running(policy: &str) -> Value {
    with(spec(&["[[sim:job=stall]]"], None), &[("readinessPolicy", json!(policy))])
}

#[tokio::test(flavor = "multi_thread")]
async fn helm_waits_for_the_results_or_only_for_the_submission() {
    let env = Env::new().await;
    env.operator().await;
    let mut waits = helm_install(&env, "complete", &running("WhenComplete"), &["--timeout=80s"]);
    env.until("complete", "running", |j| state(j) == "Running").await;
    // Begun later, and over while the other one still waits.
    let mut returns = helm_install(&env, "submitted", &running("WhenSubmitted"), &["--timeout=80s"]);
    assert!(returns.ended().await.success(), "{}", returns.log());
    assert_eq!(state(&env.jobs().get("submitted").await.unwrap()), "Running");
    assert!(waits.runs(), "{}", waits.log());

    let batches = env.sim.batches();
    let first = batches.iter().find(|b| b.display_name.contains(&uid(&env, "complete"))).unwrap();
    assert!(env.sim.finish(&first.name, Outcome::Succeeded));
    assert!(waits.ended().await.success(), "{}", waits.log());
    assert!(is_true(&env.jobs().get("complete").await.unwrap(), "Complete"));
}

fn uid(env: &Env, job: &str) -> String {
    kubectl(env, &["get", "gbj", job, "-o", "jsonpath={.metadata.uid}"]).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn helm_gives_up_at_once_when_the_job_failed_and_says_why() {
    let env = Env::new().await;
    env.operator().await;
    let start = Instant::now();
    let mut failed = helm_install(&env, "failed", &spec(&["[[sim:job=fail]]"], None), &["--timeout=10m"]);
    assert!(!failed.ended().await.success());
    assert!(start.elapsed() < PATIENCE, "not after its timeout");
    let (_, _, why) = condition(&env.finished("failed").await, "Failed").unwrap();
    assert!(failed.log().contains(&why), "{}: {}", failed.log(), why);
}

/// The reason for `WhenSubmitted`: a release that is rolled back takes its job with it, and the job its batch.
#[tokio::test(flavor = "multi_thread")]
async fn helm_cancels_the_batch_when_it_rolls_a_release_back() {
    let env = Env::new().await;
    env.operator().await;
    let flags = ["--timeout=5s", "--rollback-on-failure"];
    let mut helm = helm_install(&env, "slow", &running("WhenComplete"), &flags);
    env.until("slow", "running", |j| state(j) == "Running").await;
    assert!(!helm.ended().await.success());
    env.gone("slow").await;
    assert_eq!(env.count(Op::BatchCancel), 1, "{}", helm.log());
}
