//! The operator changes under jobs that run: nothing is lost, nothing is sent twice.

use std::path::Path;

use crate::checks::{ensure, ensure_contains, until};
use crate::cluster::{Cluster, HOME, RELEASE, TEAM};
use crate::install::{self, CHART};
use crate::{gemini, jobs};

pub fn under_running_jobs(cluster: &Cluster) -> anyhow::Result<()> {
    jobs::apply(cluster, TEAM, "upgraded", 10, true)?;
    let batches = gemini::running(cluster, "upgraded", 10)?;
    let (these, others) = batches.split_at(5);

    install::helm(cluster, "upgrade", Path::new(CHART), HOME, &[])?;
    install::four_replicas(cluster)?;
    let chart = cluster.helm(&["list", "--namespace", HOME])?;
    ensure(!chart.contains("0.0.1"), || chart.clone())?;
    for batch in these {
        gemini::finish(cluster, batch)?;
    }
    install::helm(
        cluster,
        "upgrade",
        Path::new(CHART),
        HOME,
        &["log.level=debug", "limits.maxActiveBatches=70"],
    )?;
    let args = cluster.kubectl(&["-n", HOME, "get", "deployments", "-o", "yaml"])?;
    ensure_contains(&args, &["--log-level=debug", "--max-active-batches=70"])?;
    // To the version before.
    cluster.helm(&["rollback", RELEASE, "1", "--namespace", HOME, "--wait", "--timeout", "3m"])?;
    let chart = cluster.helm(&["list", "--namespace", HOME])?;
    ensure_contains(&chart, &["0.0.1"])?;
    install::four_replicas(cluster)?;
    for batch in others {
        gemini::finish(cluster, batch)?;
    }
    jobs::finish_whole(cluster, "upgraded", 10)?;
    install::helm(cluster, "upgrade", Path::new(CHART), HOME, &[])?;
    install::four_replicas(cluster)
}

pub fn uninstall_and_again(cluster: &Cluster) -> anyhow::Result<()> {
    jobs::apply(cluster, TEAM, "kept", 2, true)?;
    let batches = gemini::running(cluster, "kept", 2)?;
    cluster.helm(&["uninstall", RELEASE, "--namespace", HOME, "--wait"])?;
    until("the pods are gone", || {
        let pods = cluster.kubectl(&[
            "-n",
            HOME,
            "get",
            "pods",
            "-l",
            // What helm test made stays until it is run again.
            &format!("app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component!=test"),
            "-o",
            "name",
        ])?;
        ensure(pods.trim().is_empty(), || pods.clone())
    })?;
    // The definition stays, and so does every job.
    let there = cluster.json(&["-n", TEAM, "get", "gbj", "-l", "test=kept"])?;
    ensure(there["items"].as_array().is_some_and(|jobs| jobs.len() == 2), || there.to_string())?;
    // Nobody is needed to delete a job that has finished.
    cluster.kubectl(&["-n", TEAM, "delete", "gbj", "minimal", "--timeout=30s"])?;
    cluster.kubectl(&["-n", TEAM, "get", "configmap", "minimal-results"])?;
    // Batches end while nobody is there.
    for batch in batches {
        gemini::finish(cluster, &batch)?;
    }
    install::helm(cluster, "install", Path::new(CHART), HOME, &["sweepSeconds=30"])?;
    jobs::finish_whole(cluster, "kept", 2)
}
