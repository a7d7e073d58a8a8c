//! An operator that may work in one namespace only.

use std::path::Path;

use crate::checks::{ensure, until};
use crate::cluster::{Cluster, HOME, OTHERS, RELEASE, TEAM};
use crate::install::{self, CHART};
use crate::{gemini, jobs};

pub fn only_named_namespaces(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.helm(&["uninstall", RELEASE, "--namespace", HOME, "--wait"])?;
    // Another cluster id than before: a key ring of its own.
    let scope = format!("watchNamespaces={{{TEAM}}}");
    let ring = "keyRing.secretName=scoped-keys";
    let error = install::helm(cluster, "install", Path::new(CHART), HOME, &[&scope, ring]);
    let Err(error) = error else { anyhow::bail!("watchNamespaces without clusterID should be refused") };
    ensure(format!("{error:#}").contains("clusterID"), || format!("{error:#}"))?;
    install::helm(cluster, "install", Path::new(CHART), HOME, &[&scope, ring, "clusterID=scoped"])?;

    let before = gemini::batches(cluster)?.len();
    let secret =
        cluster.kubectl(&["-n", TEAM, "get", "secret", "gemini", "-o", "jsonpath={.data.apiKey}"])?;
    ensure(!secret.is_empty(), || "no key".to_owned())?;
    cluster.kubectl(&[
        "-n",
        OTHERS,
        "create",
        "secret",
        "generic",
        "gemini",
        "--from-literal=apiKey=other",
    ])?;
    jobs::apply(cluster, OTHERS, "elsewhere", 1, false)?;
    jobs::apply(cluster, TEAM, "scoped", 1, false)?;
    jobs::finish_whole(cluster, "scoped", 1)?;
    let elsewhere = cluster.json(&["-n", OTHERS, "get", "gbj", "elsewhere-0"])?;
    ensure(
        elsewhere["status"]["state"] == "Pending" && elsewhere["metadata"]["finalizers"].is_null(),
        || format!("a job elsewhere was touched: {elsewhere}"),
    )?;
    ensure(gemini::batches(cluster)?.len() == before + 1, || "a batch too many".to_owned())?;
    // Nor could it be.
    let account = format!("system:serviceaccount:{HOME}:{RELEASE}-gemini-batch-operator-controller");
    for (verb, what) in
        [("get", "secrets"), ("list", "geminibatchjobs.geminibatch.dev"), ("update", "configmaps")]
    {
        let asked = ["auth", "can-i", verb, what, "--as", &account, "-n"];
        let may = |namespace| {
            // `can-i` says no by its exit code as well.
            let answer = cluster.kubectl_command().args(asked).arg(namespace).output();
            answer.is_ok_and(|answer| String::from_utf8_lossy(&answer.stdout).trim() == "yes")
        };
        until(&format!("it may {verb} {what} in {TEAM}"), || ensure(may(TEAM), || "it may not".to_owned()))?;
        ensure(!may(OTHERS), || format!("it may {verb} {what} in {OTHERS}"))?;
    }
    // Finished jobs need no operator; those of a namespace that nobody works on have no finalizer.
    cluster.kubectl(&["-n", OTHERS, "delete", "gbj", "--all", "--timeout=30s"])?;
    cluster.helm(&["uninstall", RELEASE, "--namespace", HOME, "--wait"])?;
    cluster.kubectl(&["-n", TEAM, "delete", "gbj", "--all", "--timeout=60s"])?;
    Ok(())
}
