//! Two controllers, of which one works.

use std::process::Command;
use std::time::Instant;

use gemini_simulator::{Config, Effect, Fault, Op};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::runtime::wait::await_condition;

use serde_json::json;

use crate::harness::{Env, PATIENCE, Process, kubectl, spec, state};

const LEASE: &str = "gemini-batch-operator";

fn leases(env: &Env) -> Api<Lease> {
    Api::namespaced(env.client.clone(), &env.namespace)
}

fn candidate(env: &Env, identity: &str) -> Process {
    env.spawn_with(
        None,
        &["--role=controller", "--admin-listen=127.0.0.1:0", &format!("--lease-identity={identity}")],
    )
}

async fn until_leads(env: &Env, identity: &str) {
    let wanted = |lease: Option<&Lease>| holder(lease) == identity;
    let change = tokio::time::timeout(PATIENCE, await_condition(leases(env), LEASE, wanted)).await;
    assert!(change.is_ok(), "{identity} does not lead");
}

fn holder(lease: Option<&Lease>) -> String {
    lease.and_then(|l| l.spec.as_ref()?.holder_identity.clone()).unwrap_or_default()
}

fn signal(process: &Process, name: &str) {
    let done = Command::new("kill").args(["-s", name, &process.id().to_string()]).status().unwrap();
    assert!(done.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_leader_is_killed_the_other_one_goes_on() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let mut first = candidate(&env, "first");
    until_leads(&env, "first").await;
    let second = candidate(&env, "second");
    env.create("before", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("before").await), "Succeeded");
    first.kill();
    let start = Instant::now();
    env.create("after", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("after").await), "Succeeded");
    println!("taken over and finished after {:.1} s", start.elapsed().as_secs_f64());
    let lease = leases(&env).get(LEASE).await.unwrap().spec.unwrap();
    assert_eq!((lease.holder_identity.as_deref(), lease.lease_transitions), (Some("second"), Some(2)));
    assert_eq!(env.count(Op::BatchCreate), 2);
    assert!(!second.log().contains("could not be taken"), "{}", second.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_asked_to_stop_gives_the_lease_up() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let mut first = candidate(&env, "first");
    until_leads(&env, "first").await;
    let _second = candidate(&env, "second");
    signal(&first, "TERM");
    assert!(first.ended().await.success(), "{}", first.log());
    // Nobody waited for an expiry: the lease was empty before the second one took it.
    assert!(first.log().contains("not leading any more"), "{}", first.log());
    until_leads(&env, "second").await;
    env.create("job", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
}

/// The leader is stopped, in the midst of a submission, for longer than its lease. When it wakes up, it must not
/// ask for the batch: somebody else leads.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_slept_through_its_lease_sends_nothing() {
    let env = Env::scaled(10.0, &[]).await; // a lease of a second and a half
    let effect = Effect::DelayAnswer { millis: 1000 };
    env.sim.fault(Fault { op: Op::UploadChunk, contains: String::new(), skip: 0, times: 1, effect });
    let first = candidate(&env, "first");
    until_leads(&env, "first").await;
    let _second = candidate(&env, "second");
    env.create("job", spec(&["x"], None)).await;
    let start = Instant::now();
    while env.count(Op::UploadChunk) == 0 {
        assert!(start.elapsed() < PATIENCE, "nothing is uploaded");
        tokio::task::yield_now().await;
    }
    signal(&first, "STOP");
    until_leads(&env, "second").await;
    env.stalled("job", "SubmissionUnconfirmed").await;
    signal(&first, "CONT");
    let start = Instant::now();
    while !first.log().contains("does not lead any more") && !first.log().contains("not leading any more") {
        assert!(start.elapsed() < PATIENCE, "{}", first.log());
        tokio::task::yield_now().await;
    }
    assert_eq!(env.count(Op::BatchCreate), 0, "{}", first.log());
}

/// A controller that can't see the jobs says so, is not ready, and stops when it is asked to.
#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_may_not_list_jobs_says_so_and_stops_when_asked() {
    let env = Env::new().await;
    let mut maker = candidate(&env, "maker"); // of the key ring
    until_leads(&env, "maker").await;
    signal(&maker, "TERM");
    assert!(maker.ended().await.success());
    let rules = json!([
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
    ]);
    for (kind, more) in [
        ("Role", json!({"rules": rules})),
        (
            "RoleBinding",
            json!({"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "blind"},
                "subjects": [{"kind": "User", "name": format!("blind-{}", env.namespace)}]}),
        ),
    ] {
        let mut body = more;
        body["apiVersion"] = json!("rbac.authorization.k8s.io/v1");
        body["kind"] = json!(kind);
        body["metadata"] = json!({"name": "blind"});
        let file = env.file(&format!("{kind}.json"), &body.to_string());
        kubectl(&env, &["apply", "-f", file.to_str().unwrap()]).unwrap();
    }
    let mut blind = env.spawn_as(
        &env.kubeconfig_as(&format!("blind-{}", env.namespace)),
        None,
        &["--role=controller", "--lease-identity=blind"],
        &[],
    );
    until_leads(&env, "blind").await;
    let start = Instant::now();
    while !blind.log().contains("may not list and watch geminibatchjobs") {
        assert!(start.elapsed() < PATIENCE, "{}", blind.log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let ready = reqwest::get(format!("http://127.0.0.1:{}/readyz", env.admin_port)).await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.text().await.unwrap().contains("have not been listed"));
    assert!(!env.metrics().await.contains("gemini_batch_watch_errors_total 0"));
    signal(&blind, "TERM");
    assert!(blind.ended().await.success(), "{}", blind.log());
}
