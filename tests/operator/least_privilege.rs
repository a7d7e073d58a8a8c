//! The chart's accounts on a real API server: both halves can work with what it grants, the controller needs all of
//! it, and the receiver can do nothing else.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gemini_batch_operator::api::{FINALIZER, GeminiBatchJob};
use gemini_batch_operator::callback::keyring::{KeyRing, SECRET_KEY};
use gemini_simulator::{Config, Op};
use http::Request;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::harness::{
    Cluster, Env, PATIENCE, condition, free_port, kube_config, kubectl, line, spec, state, with_input,
};

const KEY_RING: &str = "gemini-batch-operator-callback-keys";

/// What the policy says, whatever was tried.
const REFUSAL: &str = "the callback receiver may write status.callback only";

/// So long that no test sees one, on any clock.
const NO_SWEEP: &str = "--sweep-seconds=4000000000";

const JSON_PATCH: &str = "application/json-patch+json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const APPLY_PATCH: &str = "application/apply-patch+yaml";
const JSON: &str = "application/json";

/// The chart in a namespace of its own, apart from the jobs.
struct Installed {
    namespace: String,
    manifests: Vec<Value>,
    controller: Account,
    receiver: Account,
}

/// What somebody can do who holds the token of one account and nothing else.
struct Account {
    user: String,
    kubeconfig: PathBuf,
    client: Client,
}

pub fn helm() -> PathBuf {
    static HELM: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let build = || {
        if let Ok(path) = std::env::var("GBO_HELM") {
            return path.into();
        }
        let out = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/hack/helm.sh"))
            .stderr(Stdio::inherit())
            .output()
            .expect("hack/helm.sh builds helm; it needs bash and Go");
        assert!(out.status.success(), "helm could not be built: run `make chart`, or see above");
        String::from_utf8(out.stdout).unwrap().trim().into()
    };
    HELM.get_or_init(build).clone()
}

/// `helm template`, applied by the administrator; then until the API server goes by it.
async fn install(env: &Env, values: &[&str]) -> Installed {
    let namespaces: Api<Namespace> = Api::all(env.client.clone());
    let namespace = serde_json::from_value(json!({"metadata": {"generateName": "release-"}})).unwrap();
    let namespace = namespaces.create(&PostParams::default(), &namespace).await.unwrap().name_any();
    let out = Command::new(helm())
        .args(["template", "gbo", concat!(env!("CARGO_MANIFEST_DIR"), "/charts/gemini-batch-operator")])
        .arg(format!("--namespace={namespace}"))
        // The definition is there. No pods: there is no node.
        .arg("--set=receiver.externalURL=https://callbacks.example.com,crds.install=false,userRoles.create=false")
        .args(values.iter().map(|v| format!("--set={v}")))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let rendered = String::from_utf8(out.stdout).unwrap();
    let file = env.file("chart.yaml", &rendered);
    // No namespace: each object says its own.
    kubectl(env, &["apply", "--server-side", "--namespace=", "-f", file.to_str().unwrap()]).unwrap();
    let manifests = serde_yaml::Deserializer::from_str(&rendered)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|manifest| !manifest.is_null())
        .collect();

    let installed = Installed {
        controller: account(env, &namespace, "gbo-gemini-batch-operator-controller").await,
        receiver: account(env, &namespace, "gbo-gemini-batch-operator-receiver").await,
        namespace,
        manifests,
    };
    enforced(env, &installed).await;
    installed
}

async fn account(env: &Env, namespace: &str, name: &str) -> Account {
    let token = kubectl(env, &["create", "token", name, "--namespace", namespace]).unwrap();
    let kubeconfig = env.kubeconfig_with(token.trim());
    Account {
        user: format!("system:serviceaccount:{namespace}:{name}"),
        client: Client::try_from(kube_config(&kubeconfig).await).unwrap(),
        kubeconfig,
    }
}

/// Permissions and the policy work a moment after they were written.
async fn enforced(env: &Env, at: &Installed) {
    env.create("probe", spec(&["x"], None)).await;
    let start = Instant::now();
    let dry_run = format!("{}?dryRun=All", status_path(env, "probe"));
    let forbidden_state = json!({"status": {"state": "Running"}});
    let ring = format!("/api/v1/namespaces/{}/secrets/{KEY_RING}", at.namespace);
    loop {
        let policy = send(&at.receiver.client, "PATCH", &dry_run, MERGE_PATCH, &forbidden_state).await;
        let list = send(&at.controller.client, "GET", &jobs_path(env), JSON, &Value::Null).await;
        let rings = [&at.controller, &at.receiver].map(|a| send(&a.client, "GET", &ring, JSON, &Value::Null));
        let rings = futures::future::join_all(rings).await;
        let refused_by_policy = policy.as_ref().is_err_and(|e| e.message.contains(REFUSAL));
        let missing = rings.iter().all(|r| r.as_ref().is_err_and(|e| e.code == 404));
        if refused_by_policy && missing && list.is_ok() {
            break;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "the chart is not in force: policy {policy:?}, list {list:?}, key ring {rings:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    env.delete("probe").await;
    env.gone("probe").await;
}

#[derive(Debug)]
struct Refused {
    code: u16,
    reason: String,
    message: String,
}

/// One request, as it is.
async fn send(
    client: &Client,
    method: &str,
    path: &str,
    content_type: &str,
    body: &Value,
) -> Result<Value, Refused> {
    send_as(client, None, method, path, content_type, body).await
}

async fn send_as(
    client: &Client,
    impersonate: Option<&str>,
    method: &str,
    path: &str,
    content_type: &str,
    body: &Value,
) -> Result<Value, Refused> {
    let mut request = Request::builder().method(method).uri(path).header("Content-Type", content_type);
    if let Some(user) = impersonate {
        request = request.header("Impersonate-User", user);
    }
    let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(body).unwrap() };
    let sent = client.request::<Value>(request.body(body).unwrap());
    match tokio::time::timeout(PATIENCE, sent).await.expect("the API server answers") {
        Ok(value) => Ok(value),
        Err(kube::Error::Api(status)) => {
            Err(Refused { code: status.code, reason: status.reason.clone(), message: status.message.clone() })
        }
        Err(e) => panic!("{method} {path}: {e}"),
    }
}

fn jobs_path(env: &Env) -> String {
    format!("/apis/geminibatch.dev/v1alpha1/namespaces/{}/geminibatchjobs", env.namespace)
}

fn status_path(env: &Env, job: &str) -> String {
    format!("{}/{job}/status", jobs_path(env))
}

// ---------------------------------------------------------------------------------- enough to work

/// Jobs of all namespaces, the chart's default. With a control plane of its own: this operator would work on the jobs
/// of other tests.
#[tokio::test(flavor = "multi_thread")]
async fn all_namespaces() {
    let cluster = Arc::new(Cluster::start());
    works(&cluster_env(cluster).await, &[], &["--watch-namespaces", "--cluster-id"]).await;
}

/// Jobs of one namespace: no permission anywhere else.
#[tokio::test(flavor = "multi_thread")]
async fn one_namespace() {
    let env = Env::scaled(FACTOR, &[NO_SWEEP]).await;
    works(&env, &[&format!("watchNamespaces={{{}}}", env.namespace), "clusterID=test"], &[]).await;
}

/// A minute, which is how often the key ring is read again, takes a second.
const FACTOR: f64 = 60.0;

async fn cluster_env(cluster: Arc<Cluster>) -> Env {
    Env::on_scaled(cluster, Env::scaled_config(FACTOR), &[NO_SWEEP]).await
}

/// Both halves, as processes of their own with a token each, through all that they ever ask of the API server.
async fn works(env: &Env, values: &[&str], without: &[&str]) {
    let values: Vec<&str> = values.iter().copied().chain(["defaultCredential.secretName=shared"]).collect();
    let at = install(env, &values).await;
    let body = json!({"metadata": {"name": "shared"}, "stringData": {"apiKey": "the-operators-key"}});
    let body = serde_json::from_value(body).unwrap();
    secrets(env, &at.namespace).create(&PostParams::default(), &body).await.unwrap();
    let whose = format!("--default-credential-namespaces={}", env.namespace);
    let home = format!("--namespace={}", at.namespace);
    let admin = format!("--admin-listen=127.0.0.1:{}", free_port());
    let flags = ["--role=controller", &home, &admin, "--default-credential-secret=shared", &whose];
    let mut controller = env.spawn_as(&at.controller.kubeconfig, None, &flags, without);
    let mut receiver = env.spawn_as(&at.receiver.kubeconfig, None, &["--role=receiver", &home], without);

    // From an input ConfigMap to an output ConfigMap, by a callback.
    env.config_map("input", &json!({"requests.jsonl": line("a", "one")})).await;
    let input = json!({"configMap": {"name": "input", "key": "requests.jsonl"}});
    env.create("job", with_input(input, Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded");
    assert!(job.status.unwrap().callback.is_some(), "the receiver wrote its hint");
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    assert_eq!(data["results.jsonl"].lines().count(), 1);
    assert!(events(env, &env.namespace, "job").await.iter().any(|(reason, _)| reason == "Submitted"));

    // The operator's own API key, in its own namespace.
    let mut keyless = spec(&["one"], None);
    keyless.as_object_mut().unwrap().remove("credentials");
    env.create("keyless", keyless).await;
    assert_eq!(state(&env.cleaned("keyless").await), "Succeeded");

    // Trouble that comes again is one Event with a count.
    let mut late = spec(&["one"], None);
    late["credentials"]["secretRef"]["name"] = json!("late");
    env.create("late", late).await;
    says(env, "late", "Secret late does not exist").await;
    env.secret("late", &json!({"other": "x"})).await;
    says(env, "late", "has no key apiKey").await;
    secrets(env, &env.namespace).delete("late", &DeleteParams::default()).await.unwrap();
    says(env, "late", "Secret late does not exist").await;
    env.secret("late", &json!({"apiKey": "test-key"})).await;
    assert_eq!(state(&env.cleaned("late").await), "Succeeded");
    let told = events(env, &env.namespace, "late").await;
    assert!(told.contains(&("CredentialsNotFound".to_owned(), 3)), "{told:?}");

    // A key that a newer one replaced hours ago is retired.
    let home_secrets = secrets(env, &at.namespace);
    let mut secret = home_secrets.get(KEY_RING).await.unwrap();
    let stored = secret.data.as_mut().unwrap().get_mut(SECRET_KEY).unwrap();
    let mut ring = KeyRing::parse(&stored.0).unwrap();
    let hours_ago = |hours| jiff::Timestamp::now() - jiff::SignedDuration::from_hours(hours);
    ring.keys[0].created = hours_ago(6);
    ring.rotate(hours_ago(5)).unwrap();
    stored.0 = ring.to_json().to_vec();
    let ours = home_secrets.replace(KEY_RING, &PostParams::default(), &secret).await.unwrap();
    let theirs =
        |there: Option<&Secret>| there.is_some_and(|s| s.resource_version() != ours.resource_version());
    let waited = tokio::time::timeout(PATIENCE, await_condition(home_secrets.clone(), KEY_RING, theirs));
    waited.await.expect("the key is retired").unwrap();

    // A key ring that is deleted is written back: with an alarm, one Event for two.
    for _ in 0..2 {
        let ring = home_secrets.get(KEY_RING).await.unwrap();
        home_secrets.delete(KEY_RING, &DeleteParams::default()).await.unwrap();
        let back = |there: Option<&Secret>| there.is_some_and(|s| s.uid() != ring.uid());
        let waited = tokio::time::timeout(PATIENCE, await_condition(home_secrets.clone(), KEY_RING, back));
        waited.await.expect("the key ring is written back").unwrap();
    }
    let told = events(env, &at.namespace, KEY_RING).await;
    assert_eq!(told, [("KeyRingDeleted".to_owned(), 2)]);

    // A running job that is deleted is cancelled, and its empty output given back. In real time, as the API server's:
    // the patience with a deletion counts from its timestamp.
    let log = controller.log();
    controller.kill();
    let real = ["--role=controller", &home, &admin, "--clock-factor=1"];
    let mut controller = env.spawn_as(&at.controller.kubeconfig, None, &real, without);
    env.create("running", spec(&["[[sim:job=stall]]"], Some("unused"))).await;
    env.until("running", "running", |j| state(j) == "Running").await;
    env.delete("running").await;
    env.gone("running").await;
    assert_eq!(env.count(Op::BatchCancel), 1);
    assert!(env.config_maps().get_opt("unused").await.unwrap().is_none());

    // A job of several shards.
    let two = [line("a", "one"), line("b", "two")].join("\n");
    env.config_map("two", &json!({"requests.jsonl": two})).await;
    let input = json!({"configMap": {"name": "two", "key": "requests.jsonl"}});
    let mut sharded = with_input(input, Some("both"));
    sharded["sharding"] = json!({"maxRequests": 1});
    env.create("sharded", sharded).await;
    assert_eq!(state(&env.cleaned("sharded").await), "Succeeded");
    env.gone("sharded-0001").await;

    // A job that deletes itself.
    let mut brief = spec(&["one"], Some("kept"));
    brief["ttlSecondsAfterFinished"] = json!(0);
    env.create("brief", brief).await;
    env.gone("brief").await;

    controller.kill();
    receiver.kill();
    for (name, log) in [("controller", log + &controller.log()), ("receiver", receiver.log())] {
        let complaint = log.lines().find(|l| l.to_lowercase().contains("forbidden"));
        assert_eq!(complaint, None, "the {name} missed a permission");
    }
    // Nothing was refused, and nothing is granted that was not needed.
    for (account, part) in [(&at.controller, "controller"), (&at.receiver, "receiver")] {
        let used = used(env, &at, account);
        assert_eq!(used, granted(&at, part), "what the {part} uses (left) is what it may do (right)");
    }
}

fn secrets(env: &Env, namespace: &str) -> Api<Secret> {
    Api::namespaced(env.client.clone(), namespace)
}

async fn says(env: &Env, job: &str, words: &str) {
    env.until(job, words, |j| condition(j, "Stalled").is_some_and(|(_, _, text)| text.contains(words))).await;
}

/// Events about an object: reason, and how often.
async fn events(env: &Env, namespace: &str, about: &str) -> Vec<(String, i32)> {
    let events: Api<Event> = Api::namespaced(env.client.clone(), namespace);
    let events = events.list(&ListParams::default()).await.unwrap();
    let here = |e: &Event| e.regarding.as_ref().is_some_and(|r| r.name.as_deref() == Some(about));
    let told = events.into_iter().filter(here);
    told.map(|e| (e.reason.unwrap_or_default(), e.series.map_or(1, |s| s.count))).collect()
}

/// `verb resource` and whether it is the operator's namespace, for each request, from the API server's audit log. A
/// request that was refused is one that no list of permissions has.
fn used(env: &Env, at: &Installed, account: &Account) -> BTreeSet<String> {
    let ours = env.audited().into_iter().filter(|e| e["user"]["username"] == *account.user);
    // `enforced` asked as well, before the processes did.
    let ours = ours.filter(|e| !e["requestURI"].as_str().unwrap_or_default().contains("/probe/"));
    ours.map(|e| {
        let about = &e["objectRef"];
        let resource = match about["subresource"].as_str() {
            Some(sub) => format!("{}/{sub}", text(&about["resource"])),
            None => text(&about["resource"]),
        };
        let refused = if e["responseStatus"]["code"] == 403 { "REFUSED " } else { "" };
        format!("{refused}{} {resource}{}", text(&e["verb"]), place(at, &about["namespace"]))
    })
    .collect()
}

/// What the chart's Roles say, in the same words.
fn granted(at: &Installed, part: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let role = |m: &&Value| ["Role", "ClusterRole"].contains(&m["kind"].as_str().unwrap_or_default());
    let named = |m: &&Value| text(&m["metadata"]["name"]).ends_with(part);
    for manifest in at.manifests.iter().filter(role).filter(named) {
        for rule in manifest["rules"].as_array().unwrap() {
            for verb in rule["verbs"].as_array().unwrap() {
                for resource in rule["resources"].as_array().unwrap() {
                    // The audit log leaves them out; without them the controller would not have led.
                    if resource == "leases" {
                        continue;
                    }
                    let place = place(at, &manifest["metadata"]["namespace"]);
                    all.insert(format!("{} {}{place}", text(verb), text(resource)));
                }
            }
        }
    }
    all
}

fn place(at: &Installed, namespace: &Value) -> &'static str {
    if *namespace == *at.namespace { " at home" } else { "" }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

// -------------------------------------------------------------------------------- and nothing else

/// What everybody may do who is known to the API server: ask who they are and what they may.
const EVERYBODY: [&str; 3] = [
    "create authentication.k8s.io/selfsubjectreviews",
    "create authorization.k8s.io/selfsubjectaccessreviews",
    "create authorization.k8s.io/selfsubjectrulesreviews",
];

/// The same that `kubectl auth can-i --list` shows.
async fn may(account: &Account, namespace: &str) -> BTreeSet<String> {
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace}});
    let path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
    let review = send(&account.client, "POST", path, JSON, &review).await.unwrap();
    assert_eq!(review["status"]["incomplete"], false);
    let list = |v: &Value| v.as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
    let mut all = BTreeSet::new();
    for rule in review["status"]["resourceRules"].as_array().unwrap() {
        for (group, resource) in list(&rule["apiGroups"])
            .iter()
            .flat_map(|g| list(&rule["resources"]).into_iter().map(move |r| (g, r)))
        {
            let name = list(&rule["resourceNames"]).join(",");
            let name = if name.is_empty() { name } else { format!(" {name}") };
            all.extend(list(&rule["verbs"]).iter().map(|verb| format!("{verb} {group}/{resource}{name}")));
        }
    }
    all
}

fn set(lists: &[&[&str]]) -> BTreeSet<String> {
    lists.iter().copied().flatten().map(|s| (*s).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_may_do_two_things() {
    let env = Env::new().await;
    let at = install(&env, &[]).await;
    let hint = "patch geminibatch.dev/geminibatchjobs/status";
    let ring = format!("get /secrets {KEY_RING}");
    assert_eq!(may(&at.receiver, &env.namespace).await, set(&[&EVERYBODY, &[hint]]));
    assert_eq!(may(&at.receiver, &at.namespace).await, set(&[&EVERYBODY, &[hint, &ring]]));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_one_namespace_the_receiver_may_nothing_elsewhere() {
    let env = Env::new().await;
    let at = install(&env, &[&format!("watchNamespaces={{{}}}", env.namespace), "clusterID=test"]).await;
    let hint = "patch geminibatch.dev/geminibatchjobs/status";
    let ring = format!("get /secrets {KEY_RING}");
    assert_eq!(may(&at.receiver, &env.namespace).await, set(&[&EVERYBODY, &[hint]]));
    assert_eq!(may(&at.receiver, &at.namespace).await, set(&[&EVERYBODY, &[&ring]]));
    assert_eq!(may(&at.receiver, "default").await, set(&[&EVERYBODY]));
    assert_eq!(may(&at.controller, "default").await, set(&[&EVERYBODY]));
}

/// Real attempts, with the token of a receiver that was taken over, on objects that exist.
#[tokio::test(flavor = "multi_thread")]
async fn every_other_request_of_the_receiver_is_refused() {
    let env = Env::new().await;
    let at = install(&env, &[]).await;
    env.create("job", spec(&["x"], None)).await;
    env.config_map("map", &json!({"k": "v"})).await;
    let object = json!({"metadata": {"name": KEY_RING}});
    let (object, other) = (serde_json::from_value(object.clone()).unwrap(), object);
    secrets(&env, &at.namespace).create(&PostParams::default(), &object).await.unwrap();
    secrets(&env, &env.namespace)
        .create(&PostParams::default(), &serde_json::from_value(other).unwrap())
        .await
        .unwrap();

    let (ns, home) = (&env.namespace, &at.namespace);
    let jobs = jobs_path(&env);
    let all_jobs = "/apis/geminibatch.dev/v1alpha1/geminibatchjobs";
    let crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/geminibatchjobs.geminibatch.dev";
    let policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies";
    let bindings = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings";
    let policy = format!("{home}.gbo-gemini-batch-operator-receiver");
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let accounts = format!("/api/v1/namespaces/{home}/serviceaccounts");
    let one_ring = format!("?watch=1&timeoutSeconds=1&fieldSelector=metadata.name%3D{KEY_RING}");
    let attempts: Vec<(&str, String)> = vec![
        // Jobs: neither to be read nor to be found.
        ("GET", format!("{jobs}/job")),
        ("GET", format!("{jobs}/job/status")),
        ("GET", jobs.clone()),
        ("GET", all_jobs.into()),
        ("GET", format!("{jobs}?watch=1&timeoutSeconds=1")),
        ("GET", format!("{all_jobs}?watch=1&timeoutSeconds=1")),
        ("POST", jobs.clone()),
        ("PUT", format!("{jobs}/job")),
        ("PUT", format!("{jobs}/job/status")),
        ("PATCH", format!("{jobs}/job")),
        ("PATCH", format!("{jobs}/job?fieldManager=gemini-batch-receiver")),
        ("DELETE", format!("{jobs}/job")),
        ("DELETE", jobs.clone()),
        // Secrets: the key ring's is the only one, and only to be read.
        ("GET", format!("/api/v1/namespaces/{home}/secrets")),
        ("GET", format!("/api/v1/namespaces/{home}/secrets{one_ring}")),
        ("GET", format!("/api/v1/namespaces/{home}/secrets/other")),
        ("POST", format!("/api/v1/namespaces/{home}/secrets")),
        ("PUT", format!("/api/v1/namespaces/{home}/secrets/{KEY_RING}")),
        ("PATCH", format!("/api/v1/namespaces/{home}/secrets/{KEY_RING}")),
        ("DELETE", format!("/api/v1/namespaces/{home}/secrets/{KEY_RING}")),
        ("DELETE", format!("/api/v1/namespaces/{home}/secrets")),
        ("GET", format!("/api/v1/namespaces/{ns}/secrets/gemini")),
        ("GET", format!("/api/v1/namespaces/{ns}/secrets/{KEY_RING}")),
        ("PATCH", format!("/api/v1/namespaces/{ns}/secrets/gemini")),
        ("GET", "/api/v1/secrets".into()),
        // Inputs and results.
        ("GET", format!("/api/v1/namespaces/{ns}/configmaps/map")),
        ("GET", format!("/api/v1/namespaces/{ns}/configmaps")),
        ("POST", format!("/api/v1/namespaces/{ns}/configmaps")),
        ("PUT", format!("/api/v1/namespaces/{ns}/configmaps/map")),
        ("PATCH", format!("/api/v1/namespaces/{ns}/configmaps/map")),
        ("DELETE", format!("/api/v1/namespaces/{ns}/configmaps/map")),
        // Events: a forged one would be believed.
        ("POST", format!("/apis/events.k8s.io/v1/namespaces/{ns}/events")),
        ("POST", format!("/api/v1/namespaces/{ns}/events")),
        ("GET", format!("/apis/events.k8s.io/v1/namespaces/{ns}/events")),
        // Code of its own.
        ("GET", format!("/api/v1/namespaces/{home}/pods")),
        ("POST", format!("/api/v1/namespaces/{home}/pods")),
        ("GET", format!("/api/v1/namespaces/{home}/pods/x/log")),
        ("POST", format!("/api/v1/namespaces/{home}/pods/x/exec?command=sh")),
        ("POST", format!("/apis/apps/v1/namespaces/{home}/deployments")),
        ("POST", format!("/apis/batch/v1/namespaces/{home}/jobs")),
        // More rights than it has.
        ("POST", format!("{accounts}/gbo-gemini-batch-operator-controller/token")),
        ("POST", format!("{accounts}/gbo-gemini-batch-operator-receiver/token")),
        ("POST", format!("{rbac}/clusterrolebindings")),
        ("POST", format!("{rbac}/namespaces/{home}/rolebindings")),
        ("PATCH", format!("{rbac}/clusterroles/{policy}")),
        ("PATCH", format!("{rbac}/namespaces/{home}/roles/gbo-gemini-batch-operator-receiver")),
        ("PATCH", format!("{policies}/{policy}")),
        ("DELETE", format!("{policies}/{policy}")),
        ("PATCH", format!("{bindings}/{policy}")),
        ("DELETE", format!("{bindings}/{policy}")),
        ("POST", "/apis/certificates.k8s.io/v1/certificatesigningrequests".into()),
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews".into()),
        ("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews".into()),
        // Whatever else has a status.
        ("PATCH", format!("{crd}/status")),
        ("PATCH", format!("/api/v1/namespaces/{ns}/status")),
        ("PATCH", format!("/api/v1/namespaces/{ns}/pods/x/status")),
        ("PATCH", format!("/apis/apps/v1/namespaces/{ns}/deployments/x/status")),
        ("PATCH", "/api/v1/nodes/x/status".into()),
        // The cluster.
        ("GET", crd.into()),
        ("PATCH", crd.into()),
        ("GET", "/api/v1/namespaces".into()),
        ("GET", "/api/v1/namespaces/kube-system".into()),
        ("GET", "/api/v1/nodes".into()),
        ("POST", format!("/apis/coordination.k8s.io/v1/namespaces/{home}/leases")),
        ("GET", "/metrics".into()),
        ("GET", "/debug/pprof/".into()),
    ];
    let mut allowed = Vec::new();
    for (method, path) in &attempts {
        let content_type = if *method == "PATCH" { MERGE_PATCH } else { JSON };
        let body = if *method == "GET" { Value::Null } else { json!({}) };
        let outcome = send(&at.receiver.client, method, path, content_type, &body).await;
        if !outcome
            .as_ref()
            .is_err_and(|e| e.code == 403 && e.reason == "Forbidden" && e.message.contains("cannot"))
        {
            allowed.push(format!("{method} {path}: {outcome:?}"));
        }
    }
    for user in
        ["system:admin", &at.controller.user, "system:serviceaccount:kube-system:generic-garbage-collector"]
    {
        let outcome = send_as(&at.receiver.client, Some(user), "GET", &jobs, JSON, &Value::Null).await;
        if !outcome.as_ref().is_err_and(|e| e.code == 403 && e.message.contains("cannot impersonate")) {
            allowed.push(format!("as {user}: {outcome:?}"));
        }
    }
    assert_eq!(allowed, Vec::<String>::new(), "not refused for want of permission");

    // The one Secret it may read.
    let ring = format!("/api/v1/namespaces/{home}/secrets/{KEY_RING}");
    send(&at.receiver.client, "GET", &ring, JSON, &Value::Null).await.unwrap();
}

// ------------------------------------------------------------------------- of the status, one field

fn hint(id: &str) -> Value {
    json!({"webhookId": id, "type": "batch.succeeded", "attempt": 1, "receivedTime": "2026-01-01T00:00:00.000000Z"})
}

/// Tries to write the status as the receiver, and says what came of it.
async fn patch(env: &Env, at: &Installed, content_type: &str, body: &Value) -> Result<Value, Refused> {
    let manager = if content_type == APPLY_PATCH { "?force=true&fieldManager=x" } else { "?fieldManager=x" };
    let path = status_path(env, "job") + manager;
    send(&at.receiver.client, "PATCH", &path, content_type, body).await
}

/// Everything that a hint leaves alone.
fn but_for_the_hint(job: &GeminiBatchJob) -> Value {
    let mut job = serde_json::to_value(job).unwrap();
    job["status"].as_object_mut().unwrap().remove("callback");
    for field in ["managedFields", "resourceVersion"] {
        job["metadata"].as_object_mut().unwrap().remove(field);
    }
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_status_the_receiver_writes_the_hint_only() {
    let env = Env::with(Config::default(), &[]).await;
    let at = install(&env, &[]).await;
    // A job as it is while it runs; users apply theirs.
    let file = env.file(
        "job.yaml",
        &json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": "job", "labels": {"team": "a"}, "finalizers": [FINALIZER]},
            "spec": spec(&["x"], None)})
        .to_string(),
    );
    kubectl(&env, &["apply", "--server-side", "-f", file.to_str().unwrap()]).unwrap();
    let condition = json!({"type": "Ready", "status": "False", "reason": "Submitted", "message": "at Gemini",
        "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1});
    let attempt = json!({"number": 1, "sendId": "s", "displayName": "d", "inputFile": "files/f",
        "credentialFingerprint": "c", "intentTime": "2026-01-01T00:00:00.000000Z", "batchName": "batches/b"});
    let whole = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": "job"},
        "status": {"observedGeneration": 1, "state": "Running", "conditions": [condition], "attempts": [attempt],
            "requests": {"total": 1, "succeeded": 0, "failed": 0, "pending": 1}}});
    let path = status_path(&env, "job") + "?force=true&fieldManager=gemini-batch-operator";
    // The policy is about the receiver alone.
    send(&at.controller.client, "PATCH", &path, APPLY_PATCH, &whole).await.unwrap();
    let before = env.jobs().get("job").await.unwrap();
    let uid = before.uid().unwrap();

    // What it is for: the first hint, another one, and none.
    let test = json!({"op": "test", "path": "/metadata/uid", "value": uid});
    let add = |id: &str| json!([test, {"op": "add", "path": "/status/callback", "value": hint(id)}]);
    patch(&env, &at, JSON_PATCH, &add("first")).await.unwrap();
    patch(&env, &at, JSON_PATCH, &add("second")).await.unwrap();
    patch(&env, &at, MERGE_PATCH, &json!({"status": {"callback": {"webhookId": "third"}}})).await.unwrap();
    patch(&env, &at, JSON_PATCH, &json!([{"op": "remove", "path": "/status/callback"}])).await.unwrap();
    patch(&env, &at, JSON_PATCH, &add("last")).await.unwrap();
    let hinted = env.jobs().get("job").await.unwrap();
    assert_eq!(hinted.status.as_ref().unwrap().callback.as_ref().unwrap().webhook_id, "last");
    assert_eq!(but_for_the_hint(&hinted), but_for_the_hint(&before));

    // What it is not for, each alone and together with a hint.
    let now = "2026-01-01T00:00:00Z";
    let cases = [
        ("status.state", json!({"state": "Succeeded"})),
        ("status.conditions", json!({"conditions": []})),
        (
            "status.conditions",
            json!({"conditions": [{"type": "Complete", "status": "True", "reason": "Completed",
            "message": "", "lastTransitionTime": now}]}),
        ),
        ("status.attempts", json!({"attempts": null})),
        (
            "status.attempts",
            json!({"attempts": [attempt, {"number": 2, "sendId": "t", "displayName": "e",
            "inputFile": "files/f", "credentialFingerprint": "c", "intentTime": "2026-01-01T00:00:00.000000Z"}]}),
        ),
        ("status.output", json!({"output": {"fileName": "files/other"}})),
        ("status.requests", json!({"requests": {"succeeded": 1}})),
        ("status.requests", json!({"requests": null})),
        ("status.usage", json!({"usage": {"promptTokens": 1, "outputTokens": 1, "totalTokens": 2}})),
        ("status.observedGeneration", json!({"observedGeneration": 2})),
        ("status.startTime", json!({"startTime": now})),
        ("status.completionTime", json!({"completionTime": now})),
    ];
    for (field, status) in cases {
        let mut both = status.clone();
        both["callback"] = hint("smuggled");
        for status in [status, both] {
            let refused = patch(&env, &at, MERGE_PATCH, &json!({ "status": status })).await;
            assert_refused(&refused, field);
        }
    }
    let apply = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "status": {"callback": hint("applied"), "state": "Failed"}});
    assert_refused(&patch(&env, &at, APPLY_PATCH, &apply).await, "status.state");
    // Without its conditions the schema would refuse it first: an end never reverts.
    let value = json!({"callback": hint("whole"), "conditions": [condition]});
    let replace = json!([test, {"op": "replace", "path": "/status", "value": value}]);
    let refused = patch(&env, &at, JSON_PATCH, &replace).await;
    for field in ["status.attempts", "status.requests", "status.state"] {
        assert_refused(&refused, field);
    }

    let after = env.jobs().get("job").await.unwrap();
    assert_eq!(
        after.resource_version(),
        hinted.resource_version(),
        "a request that was refused wrote something"
    );

    // A label is not changed through the status, but taken away from the user who applied it.
    for labels in [json!({"team": "b"}), Value::Null] {
        let refused = patch(&env, &at, MERGE_PATCH, &json!({"metadata": {"labels": labels}})).await;
        assert_refused(&refused, "metadata.managedFields");
    }

    // What the status subresource ignores need not be refused, as long as nothing comes of it.
    let applied = |job: &GeminiBatchJob| {
        let entries = job.metadata.managed_fields.clone().unwrap_or_default();
        entries.into_iter().filter(|e| e.operation.as_deref() == Some("Apply")).collect::<Vec<_>>()
    };
    let mut forged = serde_json::to_value(&hinted.metadata.managed_fields).unwrap();
    forged.as_array_mut().unwrap().push(json!({"manager": "kubectl-other", "operation": "Apply",
        "apiVersion": "geminibatch.dev/v1alpha1", "time": now, "fieldsType": "FieldsV1",
        "fieldsV1": {"f:spec": {"f:model": {}}}}));
    for ignored in [
        json!({"metadata": {"managedFields": forged}}),
        json!({"metadata": {"managedFields": [{}]}}),
        json!({"metadata": {"labels": {"team": "b"}}}),
        json!({"metadata": {"annotations": {"a": "b"}}}),
        json!({"metadata": {"finalizers": null}}),
        json!({"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "y"}]}}),
        json!({"metadata": {"deletionTimestamp": now}}),
        json!({"spec": {"model": "gemini-2.5-pro"}}),
        json!({"spec": null}),
        json!({"status": {"noSuchField": 1}}),
    ] {
        for callback in [None, Some(hint("ignored"))] {
            let mut body = ignored.clone();
            if let Some(callback) = callback {
                body["status"]["callback"] = callback;
            }
            let outcome = patch(&env, &at, MERGE_PATCH, &body).await;
            let after = env.jobs().get("job").await.unwrap();
            assert_eq!(but_for_the_hint(&after), but_for_the_hint(&before), "{body}: {outcome:?}");
            assert_eq!(applied(&after), applied(&before), "{body}: {outcome:?}");
        }
    }

    // The controller still writes everything else, with the hint in place.
    let mut ended = whole;
    ended["status"]["state"] = json!("Failed");
    send(&at.controller.client, "PATCH", &path, APPLY_PATCH, &ended).await.unwrap();
    let job = env.jobs().get("job").await.unwrap();
    assert_eq!(state(&job), "Failed");
    assert!(job.status.unwrap().callback.is_some());
}

#[track_caller]
fn assert_refused(outcome: &Result<Value, Refused>, field: &str) {
    let refused = outcome.as_ref().expect_err(field);
    assert_eq!((refused.code, refused.reason.as_str()), (403, "Forbidden"), "{field}: {refused:?}");
    assert!(refused.message.contains(REFUSAL) && refused.message.contains(field), "{field}: {refused:?}");
}
