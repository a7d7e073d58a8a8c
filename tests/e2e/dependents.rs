//! What waits for jobs and knows nothing of the operator: the examples, as docs/dependents.md tells to run them.

use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

use crate::checks::{ensure, ensure_contains, until};
use crate::cluster::{Cluster, TEAM};
use crate::{gemini, jobs};

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn react(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["config", "set-context", "--current", "--namespace", TEAM])?;
    let env = |name: &str| {
        std::env::var_os(name).with_context(|| format!("{name} is missing: run this by `make e2e`"))
    };
    let mut python = cluster.with_kubeconfig(Command::new(env("GBO_E2E_PYTHON")?));
    let python = python
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/dependents/python/dependent.py"))
        .args(["--namespace", TEAM]);
    let _python = Running(python.stdout(Stdio::null()).spawn().context("the Python example")?);
    let mut rust = cluster.with_kubeconfig(Command::new(env("GBO_E2E_DEPENDENT")?));
    let _rust = Running(rust.stdout(Stdio::null()).spawn().context("the kube-rs example")?);

    // The shell example: a Kubernetes Job. Its image is there under the name that it has in the registry.
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/dependent-job.yaml");
    cluster.kubectl(&["-n", TEAM, "apply", "-f", file])?;
    jobs::apply(cluster, TEAM, "awaited", 1, true)?;
    cluster.kubectl_with(
        &["-n", TEAM, "apply", "-f", "-"],
        r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"waits","labels":{"example.com/waits-for-batch":""}},
            "data":{"job":"awaited-0"}}"#,
    )?;
    let batch = gemini::running(cluster, "awaited", 1)?.swap_remove(0);
    let state =
        || cluster.kubectl(&["-n", TEAM, "get", "configmap", "waits", "-o", "jsonpath={.data.state}"]);
    ensure(state()?.is_empty() || state()? == "Running", || "it did not wait".to_owned())?;
    gemini::finish(cluster, &batch)?;
    jobs::finish_whole(cluster, "awaited", 1)?;
    until("the kube-rs example has seen the end", || {
        let state = state()?;
        ensure(state == "Succeeded", || format!("its state is {state:?}"))
    })?;
    let uid = cluster.kubectl(&["-n", TEAM, "get", "gbj", "awaited-0", "-o", "jsonpath={.metadata.uid}"])?;
    until("the Python example has done its work", || {
        cluster.kubectl(&["-n", TEAM, "get", "configmap", &format!("python-{uid}")])
    })?;
    cluster.kubectl(&["-n", TEAM, "wait", "--for=condition=Complete", "job/dependent", "--timeout=120s"])?;
    let read = cluster.kubectl(&["-n", TEAM, "logs", "job/dependent"])?;
    ensure_contains(&read, &["haiku", "\"response\""])?;
    eprintln!(
        "   the shell Job, the kube-rs controller and the Python program have seen the end of their jobs"
    );
    Ok(())
}
