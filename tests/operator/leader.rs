//! Two controllers, of which one works.

use std::process::Command;
use std::time::{Duration, Instant};

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

pub fn signal(process: &Process, name: &str) {
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
    // A lease of 15 s, judged from its last renewal, and looks 2 s apart.
    assert!(start.elapsed() < Duration::from_secs(30), "taken over and finished after {:?}", start.elapsed());
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
    let signalled = Instant::now();
    signal(&first, "TERM");
    env.create("job", spec(&["x"], None)).await;
    env.until_asked(Op::BatchCreate, 1).await;
    let took = signalled.elapsed();
    assert!(took < Duration::from_secs(5), "the other one sends {took:?} after the signal");
    assert!(first.ended().await.success(), "{}", first.log());
    // Nobody waited for an expiry: the lease was empty before the second one took it.
    assert!(first.log().contains("not leading any more"), "{}", first.log());
    assert!(!first.log().contains("could not be released"), "{}", first.log());
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
}

/// One call takes this long in the tests below.
const CALL: Duration = Duration::from_secs(2);

fn delayed(op: Op, delay: Duration) -> Fault {
    let effect = Effect::DelayAnswer { millis: u64::try_from(delay.as_millis()).unwrap() };
    Fault { op, contains: String::new(), skip: 0, times: 1, effect }
}

/// The leader is asked to stop as soon as it has asked Gemini for `in_hand`, with these delays; another job waits for
/// the next leader, which sends it within `limit` from the signal. Both jobs end right. Returns what the next one said.
async fn hands_over(delays: [Fault; 2], in_hand: Op, limit: Duration) -> String {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let mut first = candidate(&env, "first");
    until_leads(&env, "first").await;
    let second = candidate(&env, "second");
    for delay in delays {
        env.sim.fault(delay);
    }
    env.create("in-hand", spec(&["x"], None)).await;
    env.until_asked(in_hand, 1).await;
    let signalled = Instant::now();
    signal(&first, "TERM");
    env.create("waits", spec(&["x"], None)).await;
    env.until_asked(Op::BatchCreate, 2).await;
    let took = signalled.elapsed();
    assert!(took < limit, "the next one sends after {took:?}");
    assert!(first.ended().await.success(), "{}", first.log());
    for name in ["in-hand", "waits"] {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded");
    }
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (2, 2));
    second.log()
}

/// What was uploaded is sent, since the next one could not tell whether it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_asked_to_stop_in_a_submission_leaves_no_unknown_outcome() {
    let delays = [delayed(Op::UploadChunk, CALL), delayed(Op::BatchCreate, CALL)];
    let log = hands_over(delays, Op::UploadChunk, 2 * CALL + Duration::from_secs(5)).await;
    assert!(!log.contains("SubmissionUnconfirmed"), "{log}");
}

/// The call in hand is waited for, and nothing further begun: a result file may take longer than others can wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_asked_to_stop_begins_nothing_any_more() {
    let delays = [delayed(Op::BatchGet, CALL), delayed(Op::Download, 7 * CALL)];
    hands_over(delays, Op::BatchGet, CALL + Duration::from_secs(5)).await;
}

/// The leader is stopped, in the midst of a submission, for longer than its lease. When it wakes up, it must not
/// ask for the batch: somebody else leads.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_slept_through_its_lease_sends_nothing() {
    let env = Env::scaled(10.0, &[]).await;
    env.sim.fault(delayed(Op::UploadChunk, Duration::from_secs(1)));
    let first = candidate(&env, "first");
    until_leads(&env, "first").await;
    let _second = candidate(&env, "second");
    env.create("job", spec(&["x"], None)).await;
    env.until_asked(Op::UploadChunk, 1).await;
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
