//! What an ML engineer does: apply, wait, read. And the same while the operator's pods die.

use std::io::Read as _;
use std::process::Stdio;

use anyhow::Context as _;
use serde_json::Value;

use crate::checks::{ensure, ensure_contains, until};
use crate::cluster::{Cluster, HOME, TEAM};
use crate::{gemini, install};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");

/// Jobs `NAME-0` and so on, of one prompt each. Those that stall run until the test ends their batches.
pub fn apply(cluster: &Cluster, namespace: &str, name: &str, n: usize, stall: bool) -> anyhow::Result<()> {
    let prompt = if stall { "[[sim:job=stall]]" } else { "hello" };
    let manifests: Vec<String> = (0..n)
        .map(|i| {
            serde_json::json!({
                "apiVersion": "geminibatch.dev/v1alpha1",
                "kind": "GeminiBatchJob",
                "metadata": {"name": format!("{name}-{i}"), "labels": {"test": name}},
                "spec": {
                    "model": "gemini-2.5-flash",
                    "credentials": {"secretRef": {"name": "gemini"}},
                    "input": {"requests": [{"key": "a", "prompt": prompt}]},
                    "output": {"configMap": {"name": format!("{name}-{i}-results")}},
                },
            })
            .to_string()
        })
        .collect();
    cluster.kubectl_with(&["-n", namespace, "apply", "-f", "-"], &manifests.join("\n---\n"))?;
    Ok(())
}

/// Waits for all of them as a user would; then they are judged.
pub fn finish_whole(cluster: &Cluster, name: &str, n: usize) -> anyhow::Result<()> {
    let label = format!("test={name}");
    cluster.kubectl(&[
        "-n",
        TEAM,
        "wait",
        "--for=condition=Finished",
        "gbj",
        "-l",
        &label,
        "--timeout=300s",
    ])?;
    let jobs = cluster.json(&["-n", TEAM, "get", "gbj", "-l", &label])?;
    let items = jobs["items"].as_array().context("no items")?;
    ensure(items.len() == n, || format!("{} of {n} jobs are there", items.len()))?;
    for job in items {
        let (state, done) = (&job["status"]["state"], &job["status"]["requests"]["succeeded"]);
        ensure(state == "Succeeded" && done == 1, || {
            format!("{}: {state}, {done}", job["metadata"]["name"])
        })?;
        let results = job["status"]["output"]["configMap"].as_str().context("no results")?;
        let lines = cluster.kubectl(&[
            "-n",
            TEAM,
            "get",
            "configmap",
            results,
            "-o",
            "jsonpath={.data.results\\.jsonl}",
        ])?;
        ensure(lines.lines().count() == 1, || format!("{results}: {lines}"))?;
    }
    gemini::one_batch_for_each(cluster, &jobs)
}

pub fn examples(cluster: &Cluster) -> anyhow::Result<()> {
    let mut watch = cluster
        .kubectl_command()
        .args(["-n", TEAM, "get", "gbj", "-w"])
        .stdout(Stdio::piped())
        .spawn()
        .context("kubectl get -w")?;
    for file in ["credentials.yaml", "minimal.yaml", "configmap-100.yaml", "partial-failure.yaml"] {
        cluster.kubectl(&["-n", TEAM, "apply", "--server-side", "-f", &format!("{EXAMPLES}/{file}")])?;
    }
    cluster.kubectl(&["-n", TEAM, "wait", "--for=condition=Finished", "gbj", "--all", "--timeout=180s"])?;
    watch.kill()?;
    let mut seen = String::new();
    watch.stdout.take().context("no stdout")?.read_to_string(&mut seen)?;
    watch.wait()?;
    eprintln!("{seen}");
    ensure_contains(&seen, &["NAME", "STATE", "MODEL", "minimal", "Running", "Succeeded"])?;

    let results = cluster.kubectl(&[
        "-n",
        TEAM,
        "get",
        "configmap",
        "minimal-results",
        "-o",
        "jsonpath={.data.results\\.jsonl}",
    ])?;
    let keys: Vec<Value> = results.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure(keys.len() == 3 && keys.iter().all(|line| !line["response"].is_null()), || results.clone())?;
    let described = cluster.kubectl(&["-n", TEAM, "describe", "gbj", "minimal"])?;
    ensure_contains(&described, &["Batch Name:", "Type:", "Finished", "Succeeded:"])?;
    let events = cluster.kubectl(&["-n", TEAM, "events", "--for", "gbj/minimal"])?;
    ensure_contains(&events, &["Submitted", "Completed"])?;
    let events = cluster.kubectl(&["-n", TEAM, "events", "--for", "gbj/partial-failure"])?;
    ensure_contains(&events, &["CompletedWithFailures"])?;
    gemini::one_batch_for_each(cluster, &cluster.json(&["-n", TEAM, "get", "gbj"])?)?;
    // That they ended by callbacks, and not because the operator looked by itself.
    let answers = gemini::answers(cluster)?;
    ensure(
        answers.keys().all(|status| status.starts_with('2')) && answers.values().sum::<usize>() == 3,
        || format!("callbacks were answered so: {answers:?}"),
    )?;
    let learned = metric(cluster, "controller", "gemini_batch_ends_learned_total{by=\"callback\"}")?;
    ensure(learned.iter().sum::<f64>() >= 3.0, || format!("ends learned by callback: {learned:?}"))
}

/// The value of a metric in each replica.
fn metric(cluster: &Cluster, half: &str, name: &str) -> anyhow::Result<Vec<f64>> {
    let mut values = vec![];
    for pod in install::pods(cluster, half)? {
        let text = cluster.kubectl(&[
            "get",
            "--raw",
            &format!("/api/v1/namespaces/{HOME}/pods/{pod}:8081/proxy/metrics"),
        ])?;
        let value =
            text.lines().find_map(|line| line.strip_prefix(name)).map_or(Ok(0.0), |v| v.trim().parse());
        values.push(value.with_context(|| format!("{name} in {pod}"))?);
    }
    Ok(values)
}

/// Half of the batches end by themselves meanwhile, the other half when all is quiet again.
pub fn while_pods_die(cluster: &Cluster) -> anyhow::Result<()> {
    apply(cluster, TEAM, "storm", 30, false)?;
    apply(cluster, TEAM, "calm", 30, true)?;
    let mut killed = vec![];
    // While they are being submitted, and again when all of them have a batch.
    for running in [false, true] {
        if running {
            gemini::running(cluster, "storm", 30)?;
            gemini::running(cluster, "calm", 30)?;
        }
        let pod = until("a controller leads", || install::leader(cluster))?;
        eprintln!("   killing the leader, {pod}");
        cluster.kubectl(&[
            "-n",
            HOME,
            "delete",
            "pod",
            &pod,
            "--grace-period=0",
            "--force",
            "--wait=false",
        ])?;
        until("another controller leads", || {
            let leader = install::leader(cluster)?;
            ensure(leader != pod, || "it still holds the lease".to_owned())
        })?;
        killed.push(pod);
    }
    let stalled = gemini::running(cluster, "calm", 30)?;
    let receiver = install::pods(cluster, "receiver")?.swap_remove(0);
    eprintln!("   deleting a receiver, {receiver}, and rolling both Deployments");
    cluster.kubectl(&["-n", HOME, "delete", "pod", &receiver, "--wait=false"])?;
    cluster.kubectl(&["-n", HOME, "rollout", "restart", "deployment"])?;
    for deployment in cluster.kubectl(&["-n", HOME, "get", "deployment", "-o", "name"])?.lines() {
        cluster.kubectl(&["-n", HOME, "rollout", "status", deployment, "--timeout=180s"])?;
    }
    finish_whole(cluster, "storm", 30)?;
    eprintln!("   30 callbacks at once");
    for batch in stalled {
        gemini::finish(cluster, &batch)?;
    }
    finish_whole(cluster, "calm", 30)?;
    let hits = metric(cluster, "receiver", "gemini_batch_callback_hint_writes_total{outcome=\"stored\"}")?;
    ensure(hits.len() == 2 && hits.iter().all(|n| *n > 0.0), || {
        format!("callbacks that each receiver has stored: {hits:?}")
    })?;
    eprintln!(
        "   callbacks that each receiver has stored: {hits:?}; answers to callbacks so far: {:?}",
        gemini::answers(cluster)?
    );
    Ok(())
}
