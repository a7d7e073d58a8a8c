//! The API server is away, the receiver is killed: no callback is lost. Each test has a control plane of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gemini_batch_operator::controller::Timings;
use gemini_simulator::{Config, Effect, Fault, Op, Outcome, Switches};

use crate::harness::{Cluster, Env, ready, spec, state};

/// So long that no test sees one, on any clock.
const NO_SWEEP: &str = "--sweep-seconds=4000000000";

/// Jobs run; the API server goes away; all batches end and their callbacks find a receiver that can't store them;
/// it comes back. `factor` speeds up the clocks of both sides.
async fn outage(factor: f64, simulated: jiff::SignedDuration, switches: Switches) {
    const JOBS: usize = 200;
    let cluster = Arc::new(Cluster::start());
    let mut config = Env::scaled_config(factor);
    config.max_active = 1000;
    let env = Env::on_scaled(
        Arc::clone(&cluster),
        config,
        &[NO_SWEEP, "--concurrency=64", "--max-active-batches=1000"],
    )
    .await;
    env.sim.set(switches);
    env.operator_with(Timings::default()).await;
    for i in 0..JOBS {
        env.create(&format!("job-{i}"), spec(&["[[sim:job=stall]]"], None)).await;
    }
    for i in 0..JOBS {
        env.until(&format!("job-{i}"), "running", |j| state(j) == "Running").await;
    }

    cluster.ctl("stop", "kube-apiserver");
    let start = env.sim.now();
    for batch in env.sim.batches() {
        assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
    }
    while env.sim.now().duration_since(start) < simulated {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await; // the outage itself
    }
    let tried = env.sim.deliveries();
    assert!(tried.len() >= JOBS, "{} deliveries during the outage", tried.len());
    assert!(tried.iter().all(|d| d.status != Some(200)), "nothing is acknowledged that is not stored");
    cluster.ctl("start", "kube-apiserver");

    for i in 0..JOBS {
        assert_eq!(state(&env.cleaned(&format!("job-{i}")).await), "Succeeded");
    }
    assert_eq!(env.count(Op::BatchCreate), JOBS);
    assert_eq!(env.count(Op::BatchList), 0, "no sweep was needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_away_for_a_minute_loses_no_callback() {
    outage(6.0, jiff::SignedDuration::from_mins(1), Switches::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hours_outage_with_frozen_timestamps_loses_no_callback() {
    let frozen = Switches { frozen_timestamps: true, ..Switches::default() };
    outage(300.0, jiff::SignedDuration::from_hours(1), frozen).await;
}

/// A real minute, four times as long as a lease, with two controllers and jobs at every stage of their lives.
#[tokio::test(flavor = "multi_thread")]
async fn two_controllers_live_through_a_real_minute_without_the_api_server() {
    const OUTAGE: Duration = Duration::from_mins(1);
    let cluster = Arc::new(Cluster::start());
    let env =
        Env::on(Arc::clone(&cluster), Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=5"])
            .await;
    let mut processes: Vec<_> = ["first", "second"]
        .map(|name| {
            let identity = format!("--lease-identity={name}");
            env.spawn_with(None, &["--role=controller", "--admin-listen=127.0.0.1:0", &identity])
        })
        .into();
    processes.push(env.spawn_with(None, &["--role=receiver"]));
    for name in ["ends-meanwhile", "told-meanwhile", "runs-on", "deleted"] {
        let prompt =
            if name == "ends-meanwhile" { "[[sim:job=stall]] [[sim:no-event]]" } else { "[[sim:job=stall]]" };
        env.create(name, spec(&[prompt], Some(name))).await;
        env.until(name, "running", |j| state(j) == "Running").await;
    }
    // Asked for before, answered during the outage: the name of the batch can't be recorded. And one that is uploading.
    for (name, op) in [("asked-for", Op::BatchCreate), ("uploading", Op::UploadChunk)] {
        let effect = Effect::DelayAnswer { millis: 3000 };
        let before = env.count(op);
        env.sim.fault(Fault { op, contains: String::new(), skip: 0, times: 1, effect });
        env.create(name, spec(&["x"], None)).await;
        env.until_asked(op, before + 1).await;
    }

    cluster.ctl("stop", "kube-apiserver");
    let start = Instant::now();
    for batch in env.sim.batches().iter().take(2) {
        assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
    }
    tokio::time::sleep(OUTAGE.saturating_sub(start.elapsed())).await; // the outage itself
    let creates = env.count(Op::BatchCreate);
    cluster.ctl("start", "kube-apiserver");
    let back = Instant::now();

    env.delete("deleted").await;
    env.create("new", spec(&["x"], None)).await;
    for name in ["ends-meanwhile", "told-meanwhile", "asked-for", "new"] {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded", "{name}");
    }
    println!("all went on within {:.1} s", back.elapsed().as_secs_f64());
    env.gone("deleted").await;
    // The upload ended when nothing could be asked of the API server any more: after another turn of leadership a complete
    // file does not tell whether the batch was asked for, so it is looked for over ten minutes before it is sent again.
    let uploading = env
        .until("uploading", "looked for, or submitted", |j| {
            state(j) == "Succeeded" || ready(j).1 == "SubmissionUnconfirmed"
        })
        .await;
    let submitted = usize::from(state(&uploading) == "Succeeded");
    let on = env.jobs().get("runs-on").await.unwrap();
    assert_eq!(state(&on), "Running");
    let batch = on.status.unwrap().attempts[0].batch_name.clone().unwrap();
    assert!(env.sim.finish(&batch, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("runs-on").await), "Succeeded");

    let batches = env.sim.batches();
    let names: std::collections::BTreeSet<_> = batches.iter().map(|b| b.display_name.clone()).collect();
    let expected = 6 + submitted;
    assert_eq!((batches.len(), names.len()), (expected, expected), "one batch for each job: {names:?}");
    assert_eq!(batches.iter().filter(|b| b.cancelled).count(), 1, "only the deleted one");
    assert!(creates >= 5, "{creates}");
    for process in &mut processes {
        assert!(process.runs(), "no process exits: {}", process.log());
    }
}

/// One job that can't be read stalls no other, is told why, and nobody's prompt gets into the log: not when it
/// comes, not after a new list, not after a restart without a key ring.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_nested_too_deep_stalls_no_other() {
    let cluster = Arc::new(Cluster::start());
    let env = Env::on(Arc::clone(&cluster), Config { speed: 600.0, ..Config::default() }, &[]).await;
    let deep = format!("{}\"CANARY\"{}", "{\"a\":".repeat(300), "}".repeat(300));
    let body = format!(
        r#"{{"apiVersion":"geminibatch.dev/v1alpha1","kind":"GeminiBatchJob","metadata":{{"name":"deep"}},
            "spec":{{"model":"gemini-2.5-flash","credentials":{{"secretRef":{{"name":"gemini"}}}},
            "input":{{"requests":[{{"key":"k","request":{deep}}}]}}}}}}"#
    );
    let path = format!("/apis/geminibatch.dev/v1alpha1/namespaces/{}/geminibatchjobs", env.namespace);
    let create = http::Request::post(path).header("content-type", "application/json");
    let create = create.body(body.into_bytes()).unwrap();
    env.client.request::<serde::de::IgnoredAny>(create).await.unwrap();

    let mut first = env.spawn(None);
    env.create("one", spec(&["CANARY"], None)).await;
    assert_eq!(state(&env.cleaned("one").await), "Succeeded");
    let stalled = ["wait", "--for=condition=Stalled", "gbj/deep", "--timeout=60s"];
    crate::harness::kubectl(&env, &stalled).unwrap();
    let described =
        crate::harness::kubectl(&env, &["get", "gbj", "deep", "-o", "jsonpath={.status}"]).unwrap();
    assert!(described.contains("nested more than 120 levels deep"), "{described}");

    cluster.ctl("restart", "kube-apiserver");
    env.create("two", spec(&["CANARY"], None)).await;
    assert_eq!(state(&env.cleaned("two").await), "Succeeded", "after a new list");
    first.kill();
    let second = env.spawn(None);
    env.create("three", spec(&["CANARY"], None)).await;
    assert_eq!(state(&env.cleaned("three").await), "Succeeded", "after a restart");
    for log in [first.log(), second.log()] {
        assert!(log.contains("create: sending") && !log.contains("CANARY"), "{log}");
    }
    crate::harness::kubectl(&env, &["delete", "gbj", "deep", "--timeout=60s"]).unwrap();
}

/// The receiver dies at a step of a delivery; the sender comes again and the job ends.
async fn receiver_dies(at: &str) {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &[NO_SWEEP]).await;
    let _controller = env.spawn_with(None, &["--role=controller", "--admin-listen=127.0.0.1:0"]);
    let mut receiver = env.spawn_with(Some(at), &["--role=receiver"]);
    env.create("job", spec(&["x"], Some("out"))).await;
    receiver.ended().await;
    let _again = env.spawn_with(None, &["--role=receiver"]);
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded", "{at}");
    assert_eq!((env.count(Op::BatchCreate), env.count(Op::BatchList)), (1, 0), "{at}");
    // However often it was delivered, and even if it was acknowledged to nobody.
    let last = env.sim.deliveries().into_iter().next_back().unwrap();
    assert!(
        last.status == Some(200) || at.ends_with("written") || at.ends_with("remembered"),
        "{at}: {last:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_killed_at_any_step_of_a_delivery_loses_nothing() {
    for step in ["addressed", "verified", "writing", "written", "remembered"] {
        receiver_dies(&format!("receiver:{step}")).await;
    }
}
