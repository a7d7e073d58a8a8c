//! What an administrator decides or does, for all jobs at once: callbacks or none, whose key pays, a pause, an old
//! definition, the deletion of a namespace.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use gemini_batch_operator::api::{FINALIZER, GeminiBatchJob, crd};
use gemini_simulator::{Config, Op, Outcome};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::harness::{Cluster, Env, PATIENCE, Process, ready, spec, state};

/// A minute takes a second.
const FACTOR: f64 = 60.0;

/// Without any flag that is about callbacks, apart from the address that nobody shall listen on.
fn poller(env: &Env) -> Process {
    let without = ["--external-url", "--allow-insecure-callbacks"];
    env.spawn_as(env.kubeconfig(), None, &["--callbacks=off"], &without)
}

async fn running(env: &Env, name: &str) {
    env.create(name, spec(&["[[sim:job=stall]]"], None)).await;
    env.until(name, "running", |j| state(j) == "Running").await;
}

/// Ends the batch of the job.
fn finish(env: &Env, job: &GeminiBatchJob) {
    let batch = job.status.as_ref().unwrap().attempts[0].batch_name.clone().unwrap();
    assert!(env.sim.finish(&batch, Outcome::Succeeded));
}

fn webhooks(env: &Env) -> Vec<usize> {
    env.sim.batches().iter().map(|b| b.uris.len()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_callbacks_the_operator_is_a_well_behaved_poller() {
    const JOBS: usize = 20;
    let env = Env::scaled(FACTOR, &[]).await;
    let operator = poller(&env);
    let names: Vec<String> = (0..JOBS).map(|i| format!("job-{i}")).collect();
    join_all(names.iter().map(|name| running(&env, name))).await;
    let job = env.jobs().get("job-0").await.unwrap();
    assert!(ready(&job).2.ends_with("its end is noticed with or without a callback"), "{:?}", ready(&job));
    assert!(webhooks(&env).iter().all(|n| *n == 0), "Gemini is not asked to call anybody");
    assert!(std::net::TcpListener::bind(("127.0.0.1", env.port)).is_ok(), "nobody listens for callbacks");

    // A few sweeps with nothing new: one list each, whatever the number of jobs, and no more than one a minute. (While
    // there was a single job, a GET of it cost the same.)
    let (lists_before, gets) = (env.count(Op::BatchList), env.count(Op::BatchGet));
    let start = Instant::now();
    while env.count(Op::BatchList) < lists_before + 5 {
        assert!(start.elapsed() < PATIENCE, "Gemini is not polled: {}", operator.log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let lists: Vec<_> = env.log().into_iter().filter(|e| e.op == Op::BatchList).map(|e| e.time).collect();
    for pair in lists.windows(2) {
        let pause = pair[1].duration_since(pair[0]).as_secs();
        assert!(pause >= 54, "{pause} s between two lists");
    }
    assert_eq!(env.count(Op::BatchGet), gets, "a batch that is listed as going on is not asked for");

    for name in &names {
        finish(&env, &env.jobs().get(name).await.unwrap());
    }
    for name in &names {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded");
    }
    assert_eq!(env.count(Op::BatchGet), gets + JOBS, "one for each end");
    for op in [Op::BatchCreate, Op::Download, Op::FileDelete] {
        assert_eq!(env.count(op), JOBS, "{op:?}");
    }
    assert!(!operator.log().contains("receiving callbacks"), "{}", operator.log());
}

/// Jobs that were sent while callbacks were on end while they are off, and the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn callbacks_are_turned_off_and_on_with_jobs_in_flight() {
    let env = Env::scaled(FACTOR, &[]).await;
    let mut on = env.spawn(None);
    running(&env, "sent-on-ends-off").await;
    running(&env, "sent-on-ends-on-again").await;
    on.kill();

    let mut off = poller(&env);
    running(&env, "sent-off-ends-off").await;
    running(&env, "sent-off-ends-on").await;
    for name in ["sent-on-ends-off", "sent-off-ends-off"] {
        finish(&env, &env.jobs().get(name).await.unwrap());
    }
    for name in ["sent-on-ends-off", "sent-off-ends-off"] {
        let job = env.cleaned(name).await;
        assert_eq!(state(&job), "Succeeded");
        assert!(job.status.unwrap().callback.is_none());
    }
    off.kill();

    let _on = env.spawn(None);
    for name in ["sent-on-ends-on-again", "sent-off-ends-on"] {
        finish(&env, &env.jobs().get(name).await.unwrap());
    }
    let told = env.cleaned("sent-on-ends-on-again").await;
    let found = env.cleaned("sent-off-ends-on").await;
    assert_eq!((state(&told), state(&found)), ("Succeeded", "Succeeded"));
    assert!(told.status.unwrap().callback.is_some(), "its URL was valid all the time");
    assert!(found.status.unwrap().callback.is_none());
    let mut webhooks = webhooks(&env);
    webhooks.sort_unstable();
    assert_eq!(webhooks, [0, 0, 1, 1]);
}

// ----------------------------------------------------------------------------------------- pause

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_new_jobs_and_nothing_else() {
    let env = Env::new().await;
    let mut before = env.spawn(None);
    running(&env, "to-collect").await;
    running(&env, "to-cancel").await;
    before.kill();
    // One whose intent is recorded: the operator dies before it sends.
    let mut dying = env.spawn(Some("before:UploadInput"));
    env.create("intended", spec(&["x"], None)).await;
    dying.ended().await;
    let creates = env.count(Op::BatchCreate);

    let mut paused = env.spawn_with(None, &["--pause-submissions"]);
    env.create("new", spec(&["x"], Some("out"))).await;
    for name in ["new", "intended"] {
        let job = env.until(name, "paused", |j| ready(j).1 == "SubmissionsPaused").await;
        assert_eq!(state(&job), "Queued");
        assert!(ready(&job).2.contains("an administrator has paused submissions"), "{}", ready(&job).2);
    }
    finish(&env, &env.jobs().get("to-collect").await.unwrap());
    assert_eq!(state(&env.cleaned("to-collect").await), "Succeeded");
    env.delete("to-cancel").await;
    env.gone("to-cancel").await;
    assert_eq!(env.sim.batches().iter().filter(|b| b.cancelled).count(), 1);
    assert_eq!(env.count(Op::BatchCreate), creates, "nothing is sent while it is paused");
    paused.kill();

    let _after = env.spawn(None);
    for name in ["new", "intended"] {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded");
    }
    assert_eq!(env.count(Op::BatchCreate), creates + 2);
}

// ------------------------------------------------------------------- the operator's own credential

/// A spec that brings no key.
fn keyless(prompts: &[&str]) -> Value {
    let mut spec = spec(prompts, None);
    spec.as_object_mut().unwrap().remove("credentials");
    spec
}

/// Another namespace, as an administrator makes it.
async fn namespace(env: &Env, prefix: &str) -> String {
    let namespaces: Api<Namespace> = Api::all(env.client.clone());
    let new = serde_json::from_value(json!({"metadata": {"generateName": prefix}})).unwrap();
    namespaces.create(&PostParams::default(), &new).await.unwrap().name_any()
}

/// Jobs of two namespaces are worked on, those of a third are not, and a relist of one does not lose the other's: the
/// watches of both end while the API server is away.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_namespaces_that_are_named_are_watched() {
    let cluster = Arc::new(Cluster::start());
    let config = Config { speed: 600.0, ..Config::default() };
    let env = Env::on(Arc::clone(&cluster), config, &["--sweep-seconds=5"]).await;
    let (second, third) = (namespace(&env, "second-").await, namespace(&env, "third-").await);
    let jobs = |namespace: &str| -> Api<GeminiBatchJob> { Api::namespaced(env.client.clone(), namespace) };
    let create = async |namespace: &str, name: &str, prompt: &str| {
        let job = serde_json::from_value(json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": name}, "spec": spec(&[prompt], None),
        }));
        jobs(namespace).create(&PostParams::default(), &job.unwrap()).await.unwrap();
    };
    for other in [&second, &third] {
        secret_in(&env, other, "gemini", "test-key").await;
    }
    let until = async |namespace: &str, name: &str, wanted: &str| {
        let reached = |job: Option<&GeminiBatchJob>| job.is_some_and(|job| state(job) == wanted);
        let done = tokio::time::timeout(PATIENCE, await_condition(jobs(namespace), name, reached)).await;
        done.unwrap_or_else(|_| panic!("{namespace}/{name} is never {wanted}")).unwrap();
    };
    create(&third, "elsewhere", "x").await;
    create(&second, "before", "[[sim:job=stall]]").await;
    let _operator = env.spawn_with(None, &[&format!("--watch-namespaces={},{second}", env.namespace)]);
    create(&env.namespace, "own", "x").await;
    until(&env.namespace, "own", "Succeeded").await;
    until(&second, "before", "Running").await;

    cluster.ctl("restart", "kube-apiserver");
    create(&second, "after", "x").await;
    create(&env.namespace, "after", "x").await;
    until(&second, "after", "Succeeded").await;
    until(&env.namespace, "after", "Succeeded").await;
    finish(&env, &jobs(&second).get("before").await.unwrap());
    until(&second, "before", "Succeeded").await;
    assert_eq!(env.count(Op::BatchCreate), 4);
    let elsewhere = jobs(&third).get("elsewhere").await.unwrap();
    assert_eq!(state(&elsewhere), "Pending");
    assert!(elsewhere.metadata.finalizers.is_none(), "it was touched");
}

async fn secret_in(env: &Env, namespace: &str, name: &str, key: &str) {
    let secrets: Api<Secret> = Api::namespaced(env.client.clone(), namespace);
    let body = json!({"metadata": {"name": name}, "stringData": {"apiKey": key}});
    secrets.create(&PostParams::default(), &serde_json::from_value(body).unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_credential_is_for_the_namespaces_that_the_administrator_lists() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let home = namespace(&env, "home-").await;
    secret_in(&env, &home, "shared", "the-operators-key").await;
    let home_flag = format!("--namespace={home}");
    let flags = |more: &[&str]| -> Vec<String> {
        let base = [home_flag.as_str(), "--default-credential-secret=shared"];
        base.iter().chain(more).map(|s| (*s).to_owned()).collect()
    };
    let spawn = |flags: Vec<String>| {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        env.spawn_with(None, &flags)
    };
    let listed = format!("--default-credential-namespaces=other,{}", env.namespace);

    // Nobody is listed.
    let mut nobody = spawn(flags(&[]));
    env.create("job", keyless(&["[[sim:job=stall]]"])).await;
    let job = env.stalled("job", "CredentialsNotFound").await;
    for words in
        ["spec.credentials.secretRef", &format!("add {}", env.namespace), "--default-credential-namespaces"]
    {
        assert!(ready(&job).2.contains(words), "{}", ready(&job).2);
    }
    assert!(env.ops().is_empty());
    nobody.kill();

    // This namespace is.
    let mut allowed = spawn(flags(&[&listed]));
    env.until("job", "running", |j| state(j) == "Running").await;
    for name in ["to-cancel", "to-find"] {
        env.create(name, keyless(&["[[sim:no-event]] [[sim:job=stall]]"])).await;
        env.until(name, "running", |j| state(j) == "Running").await;
    }
    allowed.kill();

    // It is not any more: what was paid for is collected and can be cancelled, nothing new is sent.
    let _nobody = spawn(flags(&["--default-credential-namespaces=other"]));
    env.create("new", keyless(&["x"])).await;
    env.stalled("new", "CredentialsNotFound").await;
    for name in ["job", "to-find"] {
        finish(&env, &env.jobs().get(name).await.unwrap());
        assert_eq!(state(&env.cleaned(name).await), "Succeeded", "{name}");
    }
    env.delete("to-cancel").await;
    env.gone("to-cancel").await;
    assert_eq!(env.sim.batches().iter().filter(|b| b.cancelled).count(), 1);
    assert_eq!((env.count(Op::BatchCreate), env.sim.files().len()), (3, 0));
    // With a key of its own it needs nobody's leave.
    env.create("own", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("own").await), "Succeeded");
    let keys: Vec<String> = env.sim.batches().into_iter().map(|b| b.key).collect();
    assert!(keys[0] == keys[1] && keys[1] == keys[2] && keys[2] != keys[3], "{keys:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_operators_credential_a_job_needs_its_own() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", keyless(&["x"])).await;
    let job = env.stalled("job", "CredentialsNotFound").await;
    assert!(ready(&job).2.contains("--default-credential-secret"), "{}", ready(&job).2);
    // Allowed until then: nothing was submitted.
    let patch = json!({"spec": {"credentials": {"secretRef": {"name": "gemini"}}}});
    env.jobs().patch("job", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    // The operator's key is for nothing that somebody else put at Gemini.
    let mut theirs = keyless(&["x"]);
    theirs["input"] = json!({"geminiFile": {"name": "files/theirs"}});
    let refused = env.try_create("theirs", theirs).await.unwrap_err().to_string();
    assert!(refused.contains("spec.credentials is needed"), "{refused}");
}

// -------------------------------------------------------------------------------- an older definition

/// Installs our definition without some fields, given as JSON pointers into the schema, and waits until the API server
/// goes by it.
async fn install_without(env: &Env, pointers: &[&str]) {
    let mut definition = serde_json::to_value(crd::crd()).unwrap();
    let root = "/spec/versions/0/schema/openAPIV3Schema";
    for pointer in pointers {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let parent = definition.pointer_mut(&format!("{root}{parent}")).unwrap().as_object_mut().unwrap();
        assert!(parent.remove(name).is_some(), "{pointer}");
    }
    let crds: Api<CustomResourceDefinition> = Api::all(env.client.clone());
    let params = PatchParams::apply("test").force();
    crds.patch(&crd::crd().name_any(), &params, &Patch::Apply(&definition)).await.unwrap();
    let start = Instant::now();
    loop {
        let request =
            http::Request::get("/openapi/v3/apis/geminibatch.dev/v1alpha1").body(Vec::new()).unwrap();
        let served: Value = env.client.request(request).await.unwrap();
        let schema = &served["components"]["schemas"]["dev.geminibatch.v1alpha1.GeminiBatchJob"];
        let as_wanted = |pointer: &&&str| schema.pointer(pointer).is_none();
        let resends = "/properties/status/properties/attempts/items/properties/resends";
        let whole = schema.pointer(resends).is_some() && schema.pointer(SHA256).is_some();
        if pointers.iter().filter(as_wanted).count() == pointers.len() && (whole || !pointers.is_empty()) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "the definition is not in force");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

const SHA256: &str = "/properties/status/properties/output/properties/sha256";

async fn until_metric(env: &Env, line: &str) {
    let start = Instant::now();
    while !env.metrics().await.lines().any(|l| l == line) {
        assert!(start.elapsed() < PATIENCE, "no {line} in {}", env.metrics().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Notes of Events in the namespace with this reason.
async fn notes(env: &Env, namespace: &str, reason: &str) -> Vec<String> {
    let events: Api<Event> = Api::namespaced(env.client.clone(), namespace);
    let events = events.list(&ListParams::default()).await.unwrap();
    let told = events.into_iter().filter(|e| e.reason.as_deref() == Some(reason));
    told.filter_map(|e| e.note).collect()
}

/// The operator was updated before its definition, as happens to everybody once.
#[tokio::test(flavor = "multi_thread")]
async fn under_an_older_definition_nothing_is_submitted_and_it_is_said() {
    let cluster = Arc::new(Cluster::start());
    let env = Env::on(cluster, Config { speed: 600.0, ..Config::default() }, &[]).await;
    let mut older = env.spawn(None);
    running(&env, "in-flight").await;
    older.kill();
    install_without(
        &env,
        &[
            "/properties/spec/properties/suspend",
            "/properties/status/properties/attempts/items/properties/resends",
            "/properties/status/properties/attempts/items/properties/outcome",
        ],
    )
    .await;

    env.operator().await;
    // Its `suspend: true` is dropped: it would be submitted, and paid for.
    let mut suspended = spec(&["x"], None);
    suspended["suspend"] = json!(true);
    let path = format!("/apis/geminibatch.dev/v1alpha1/namespaces/{}/geminibatchjobs", env.namespace);
    let body = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": "new"}, "spec": suspended});
    let create = http::Request::post(path).header("content-type", "application/json");
    let created: Value =
        env.client.request(create.body(serde_json::to_vec(&body).unwrap()).unwrap()).await.unwrap();
    assert!(created["spec"].get("suspend").is_none());
    let job = env.until("new", "held", |j| ready(j).1 == "CrdOutdated").await;
    assert_eq!(state(&job), "Queued");
    for words in ["does not know spec.suspend", "kubectl apply --server-side -f crds/"] {
        assert!(ready(&job).2.contains(words), "{}", ready(&job).2);
    }
    until_metric(&env, "gemini_batch_crd_outdated 1").await;
    let told = notes(&env, &env.namespace, "CrdOutdated").await;
    assert!(told.len() == 1 && told[0].contains("spec.suspend"), "{told:?}");
    // What runs goes on.
    finish(&env, &env.jobs().get("in-flight").await.unwrap());
    assert_eq!(state(&env.cleaned("in-flight").await), "Succeeded");
    assert_eq!(env.count(Op::BatchCreate), 1, "nothing is submitted");

    install_without(&env, &[]).await;
    assert_eq!(state(&env.cleaned("new").await), "Succeeded", "without a restart");
    until_metric(&env, "gemini_batch_crd_outdated 0").await;
    assert_eq!(env.count(Op::BatchCreate), 2);
}

/// The definition is rolled back under a running operator: the API server refuses to store an end, and nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_an_older_definition_refuses_is_written_when_it_is_mended() {
    let cluster = Arc::new(Cluster::start());
    let env = Env::on(cluster, Config { speed: 600.0, ..Config::default() }, &[]).await;
    env.operator().await;
    running(&env, "in-flight").await;
    install_without(&env, &[SHA256]).await;
    until_refused(&env).await;
    finish(&env, &env.jobs().get("in-flight").await.unwrap());
    // Found out by the refusal, not after minutes.
    until_metric(&env, "gemini_batch_crd_outdated 1").await;
    env.create("new", spec(&["x"], None)).await;
    let job = env.until("new", "held", |j| ready(j).1 == "CrdOutdated").await;
    assert!(ready(&job).2.contains("does not know status.output.sha256"), "{}", ready(&job).2);
    assert_eq!(state(&env.jobs().get("in-flight").await.unwrap()), "Running");

    install_without(&env, &[]).await;
    for name in ["in-flight", "new"] {
        let job = env.cleaned(name).await;
        assert_eq!(state(&job), "Succeeded");
        assert!(job.status.unwrap().output.unwrap().sha256.is_some());
    }
    assert_eq!(env.count(Op::BatchCreate), 2);
}

/// The API server does not take the field any more.
async fn until_refused(env: &Env) {
    let body = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": "in-flight"}, "status": {"output": {"sha256": "x"}}});
    let params = PatchParams { dry_run: true, ..PatchParams::apply("probe") };
    let start = Instant::now();
    while let Ok(_) | Err(kube::Error::SerdeError(_)) =
        env.jobs().patch_status("in-flight", &params, &Patch::Apply(&body)).await
    {
        assert!(start.elapsed() < PATIENCE, "the API server takes the field");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

// ------------------------------------------------------------------------- deletion of a namespace

async fn delete_secret(env: &Env, name: &str) {
    let secrets: Api<Secret> = Api::namespaced(env.client.clone(), &env.namespace);
    secrets.delete(name, &DeleteParams::default()).await.unwrap();
}

async fn delete_namespace(env: &Env) {
    let namespaces: Api<Namespace> = Api::all(env.client.clone());
    namespaces.delete(&env.namespace, &DeleteParams::default()).await.unwrap();
}

async fn until_namespace_gone(env: &Env) {
    let namespaces: Api<Namespace> = Api::all(env.client.clone());
    let gone = |there: Option<&Namespace>| there.is_none();
    let waited =
        tokio::time::timeout(PATIENCE, await_condition(namespaces.clone(), &env.namespace, gone)).await;
    let there = namespaces.get_opt(&env.namespace).await.unwrap();
    assert!(waited.is_ok(), "the namespace is still there: {there:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_deleted_takes_its_batches_with_it() {
    let env = Env::new().await;
    let home = namespace(&env, "home-").await;
    let operator = env.spawn_with(None, &[&format!("--namespace={home}")]);
    for name in ["a", "b", "c"] {
        running(&env, name).await;
    }
    // The order in which the namespace's content goes is nobody's choice. This is the bad one.
    delete_secret(&env, "gemini").await;
    delete_namespace(&env).await;
    until_namespace_gone(&env).await;
    assert!(env.sim.batches().iter().all(|b| b.cancelled), "{:?}", env.sim.batches());
    assert!(env.sim.files().is_empty());
    assert!(env.metrics().await.contains("gemini_batch_orphaned_total 0"));
    assert_eq!(notes(&env, &home, "Orphaned").await, Vec::<String>::new());
    assert!(!operator.log().contains("test-key"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_cancel_in_a_deleted_namespace_is_said_where_it_is_seen() {
    let env = Env::new().await;
    let home = namespace(&env, "home-").await;
    let flag = format!("--namespace={home}");
    let mut before = env.spawn_with(None, &[&flag]);
    let mut batches = Vec::new();
    for name in ["a", "b"] {
        running(&env, name).await;
        let job = env.jobs().get(name).await.unwrap();
        batches.push((name, job.status.unwrap().attempts[0].batch_name.clone().unwrap()));
    }
    before.kill();
    delete_secret(&env, "gemini").await;
    delete_namespace(&env).await;
    let deleted = |j: &gemini_batch_operator::api::GeminiBatchJob| j.metadata.deletion_timestamp.is_some();
    for name in ["a", "b"] {
        let job = env.until(name, "deleted", deleted).await;
        assert!(job.finalizers().iter().any(|f| f == FINALIZER));
    }

    // It has no key, and nobody can bring it one: it does not hold the namespace for minutes.
    let _after = env.spawn_with(None, &[&flag]);
    until_namespace_gone(&env).await;
    assert!(env.sim.batches().iter().all(|b| !b.cancelled));
    until_metric(&env, "gemini_batch_orphaned_total 2").await;
    let told = notes(&env, &home, "Orphaned").await;
    for (name, batch) in batches {
        let of = format!("{}/{name}", env.namespace);
        let said = told.iter().any(|n| n.contains(&of) && n.contains(&batch));
        assert!(said, "{of} {batch}: {told:?}");
    }
}

/// In a namespace that lives on somebody may put the Secret back, so the deletion waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_job_waits_for_its_secret_where_it_can_come_back() {
    let env = Env::new().await;
    let mut before = env.spawn(None);
    running(&env, "job").await;
    before.kill();
    delete_secret(&env, "gemini").await;
    env.delete("job").await;
    let _after = env.spawn(None);
    let job = env.stalled("job", "CredentialsNotFound").await;
    assert!(ready(&job).2.contains("is being deleted"), "{}", ready(&job).2);
    env.secret("gemini", &json!({"apiKey": "test-key"})).await;
    env.gone("job").await;
    assert!(env.sim.batches()[0].cancelled);
    assert!(env.metrics().await.contains("gemini_batch_orphaned_total 0"));
}
