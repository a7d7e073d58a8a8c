//! The key ring: rotated, retired, and lost.

use std::process::Command;

use gemini_batch_operator::controller::Timings;
use gemini_simulator::Outcome;
use k8s_openapi::api::core::v1::{Event, Secret};
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::wait::await_condition;
use serde_json::Value;

use crate::harness::{Env, PATIENCE, spec, state};

const SECRET: &str = "gemini-batch-operator-callback-keys";
const NO_SWEEP: &str = "--sweep-seconds=4000000000";

fn secrets(env: &Env) -> Api<Secret> {
    Api::namespaced(env.client.clone(), &env.namespace)
}

fn key_ids(secret: &Secret) -> Vec<String> {
    let ring: Value = serde_json::from_slice(&secret.data.as_ref().unwrap()["keyring.json"].0).unwrap();
    ring["keys"].as_array().unwrap().iter().map(|k| k["id"].as_str().unwrap().to_owned()).collect()
}

/// `gemini-batch-operator rotate-keys`, as an administrator runs it: what it said, or complained about.
fn rotate(env: &Env) -> Result<String, String> {
    let out = Command::new(env!("CARGO_BIN_EXE_gemini-batch-operator"))
        .args(["rotate-keys", "--namespace", &env.namespace])
        .env("KUBECONFIG", env.kubeconfig())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if out.status.success() { Ok(text(out.stdout)) } else { Err(text(out.stderr)) }
}

async fn running(env: &Env, name: &str) {
    env.create(name, spec(&["[[sim:job=stall]]"], None)).await;
    env.until(name, "running", |j| state(j) == "Running").await;
}

/// The ring's key is an hour old. (The subcommand goes by the wall clock, whatever the test's clock says.)
async fn grow_old(env: &Env) {
    let mut secret = secrets(env).get(SECRET).await.unwrap();
    let stored = secret.data.as_mut().unwrap().get_mut("keyring.json").unwrap();
    let mut ring: Value = serde_json::from_slice(&stored.0).unwrap();
    let hour = jiff::SignedDuration::from_hours(1);
    ring["keys"][0]["created"] = (jiff::Timestamp::now() - hour).to_string().into();
    stored.0 = ring.to_string().into_bytes();
    secrets(env).replace(SECRET, &PostParams::default(), &secret).await.unwrap();
}

async fn until_keys(env: &Env, what: &str, wanted: impl Fn(&[String]) -> bool) {
    let condition = |secret: Option<&Secret>| secret.is_some_and(|s| wanted(&key_ids(s)));
    let change = tokio::time::timeout(PATIENCE, await_condition(secrets(env), SECRET, condition)).await;
    assert!(change.is_ok(), "the ring did not become {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_ring_serves_old_jobs_and_new_ones_and_old_keys_go() {
    let env = Env::scaled(6000.0, &[NO_SWEEP]).await; // 26 hours take 16 seconds
    env.operator_with(Timings::default()).await;
    running(&env, "old").await;
    let first = key_ids(&secrets(&env).get(SECRET).await.unwrap());
    let refused = rotate(&env).unwrap_err();
    assert!(
        refused.contains("can't be rotated") && refused.contains("wait until every replica has it"),
        "{refused}"
    );
    grow_old(&env).await;
    let said = rotate(&env).unwrap();
    let both = key_ids(&secrets(&env).get(SECRET).await.unwrap());
    assert_eq!((both.len(), &both[0]), (2, &first[0]));
    assert!(said.contains(&both[1]) && said.contains("5 minutes"), "{said}");
    let refused = rotate(&env).unwrap_err();
    assert!(
        refused.contains("can't be rotated") && refused.contains("wait until every replica has it"),
        "{refused}"
    );

    // Jobs are submitted until one is signed with the new key.
    let mut n = 0;
    loop {
        let name = format!("new-{n}");
        running(&env, &name).await;
        let uri = env.sim.batches().into_iter().next_back().unwrap().uris[0].clone();
        if token_key(&uri) == both[1] {
            break;
        }
        assert!(n < 100, "the new key does not sign");
        n += 1;
    }
    for batch in env.sim.batches() {
        assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
    }
    assert_eq!(state(&env.cleaned("old").await), "Succeeded", "the old key verifies on");
    assert_eq!(state(&env.cleaned(&format!("new-{n}")).await), "Succeeded");
    // There is no sweep, so it was callbacks that told. (Some may have come twice: a receiver looks at the ring once in
    // a real second, and on this clock that is longer than the five minutes in which a new key only verifies.)
    until_keys(&env, "without the old key", |ids| ids == [both[1].clone()]).await;
}

/// The id of the key that a callback URL was signed with: the second field of its token.
fn token_key(uri: &str) -> String {
    use base64::Engine as _;
    let token = uri.rsplit('/').next().unwrap();
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).unwrap();
    let length = usize::from(bytes[1]);
    String::from_utf8(bytes[2..2 + length].to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ring_that_is_deleted_under_a_running_operator_is_written_back_and_said() {
    let env = Env::scaled(600.0, &[NO_SWEEP]).await;
    env.operator_with(Timings::default()).await;
    running(&env, "job").await;
    let before = key_ids(&secrets(&env).get(SECRET).await.unwrap());
    secrets(&env).delete(SECRET, &DeleteParams::default()).await.unwrap();
    until_keys(&env, "what it was", |ids| ids == before).await;
    let events: Api<Event> = Api::namespaced(env.client.clone(), &env.namespace);
    let about = |e: Option<&Event>| e.is_some_and(|e| e.reason.as_deref() == Some("KeyRingDeleted"));
    let names: Vec<String> = events
        .list(&ListParams::default())
        .await
        .unwrap()
        .into_iter()
        .filter(|e| about(Some(e)))
        .filter_map(|e| e.involved_object.name)
        .collect();
    assert_eq!(names, [SECRET]);
    assert!(env.metrics().await.contains("gemini_batch_callback_keyring_restored_total 1"));
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ring_that_is_gone_when_the_operator_starts_is_not_made_anew_while_jobs_run() {
    let env = Env::new().await;
    let mut first = env.spawn(None);
    running(&env, "job").await;
    first.kill();
    secrets(&env).delete(SECRET, &DeleteParams::default()).await.unwrap();
    let mut second = env.spawn(None);
    second.ended().await;
    let log = second.log();
    assert!(log.contains("1 unfinished jobs were submitted with it: restore the Secret"), "{log}");
    assert!(secrets(&env).get_opt(SECRET).await.unwrap().is_none());
    // The administrator has no backup, and says so. The callback is refused, the sweep finds the end.
    let _third = env.spawn_with(None, &["--recreate-key-ring", "--sweep-seconds=1"]);
    until_keys(&env, "there", |ids| ids.len() == 1).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert!(env.sim.deliveries().iter().all(|d| d.status != Some(200)));
}

/// Replaced by another ring, or emptied: the one in memory is written back, and it is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_ring_that_is_replaced_under_a_running_operator_is_written_back_and_said() {
    let env = Env::scaled(600.0, &[NO_SWEEP]).await;
    env.operator_with(Timings::default()).await;
    running(&env, "job").await;
    let ours = secrets(&env).get(SECRET).await.unwrap();
    let other =
        gemini_batch_operator::callback::keyring::KeyRing::generate("another", jiff::Timestamp::now());
    for (n, content) in [other.unwrap().to_json().to_vec(), Vec::new()].into_iter().enumerate() {
        let mut changed = secrets(&env).get(SECRET).await.unwrap();
        changed.data.as_mut().unwrap().get_mut("keyring.json").unwrap().0 = content;
        secrets(&env).replace(SECRET, &PostParams::default(), &changed).await.unwrap();
        let back = |secret: Option<&Secret>| secret.is_some_and(|s| s.data == ours.data);
        let change = tokio::time::timeout(PATIENCE, await_condition(secrets(&env), SECRET, back)).await;
        assert!(change.is_ok(), "the ring is not written back");
        let said = format!("gemini_batch_callback_keyring_restored_total {}", n + 1);
        assert!(env.metrics().await.contains(&said), "{}", env.metrics().await);
    }
    let events =
        crate::harness::kubectl(&env, &["get", "events", "-o", "jsonpath={.items[*].reason}"]).unwrap();
    assert!(events.contains("KeyRingReplaced"), "{events}");
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert!(env.sim.batches()[0].display_name.starts_with("gbo-test-"));
}
