//! What each account can do, by the API server's own answer, against a written list.

use std::collections::BTreeSet;
use std::path::Path;

use gemini_batch_operator::api::GeminiBatchJob;
use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

use crate::checks::ensure;
use crate::cluster::{Cluster, HOME, RELEASE, TEAM, run};

/// The lists: one line for each permission, as `kubectl auth can-i --list` tells it. What every account can do (to ask
/// who it is and what it may) is left out.
const WRITTEN: &str = include_str!("permissions.txt");

pub fn are_as_written(cluster: &Cluster) -> anyhow::Result<()> {
    let mut found = Vec::new();
    for half in ["controller", "receiver"] {
        for (place, namespace) in [("its own namespace", HOME), ("a namespace with jobs", TEAM)] {
            found.push(format!("# the {half}, in {place}"));
            found.extend(permissions(cluster, half, namespace)?);
        }
    }
    let found = found.join("\n");
    ensure(found == WRITTEN.trim(), || {
        format!("tests/e2e/permissions.txt says something else than the API server:\n{found}")
    })?;
    a_receivers_token_is_of_little_use(cluster)
}

fn account(half: &str) -> String {
    format!("{RELEASE}-gemini-batch-operator-{half}")
}

fn permissions(cluster: &Cluster, half: &str, namespace: &str) -> anyhow::Result<BTreeSet<String>> {
    let list = |name: &str| -> anyhow::Result<BTreeSet<String>> {
        let user = format!("system:serviceaccount:{HOME}:{name}");
        let text = cluster.kubectl(&["auth", "can-i", "--list", "--as", &user, "-n", namespace])?;
        Ok(text.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
    };
    let anybody = list("nobody-in-particular")?;
    Ok(list(&account(half))?.difference(&anybody).cloned().collect())
}

/// Whoever takes a receiver over has its token.
fn a_receivers_token_is_of_little_use(cluster: &Cluster) -> anyhow::Result<()> {
    let token = cluster.kubectl(&["-n", HOME, "create", "token", &account("receiver")])?;
    let kubeconfig = cluster.kubeconfig_with_token(token.trim())?;
    let with_token = |args: &[&str]| run(cluster.kubectl_command().env("KUBECONFIG", &kubeconfig).args(args));
    let spec = r#"{"spec":{"suspend":true}}"#;
    for (what, args) in [
        ("reads a job", vec!["-n", TEAM, "get", "gbj", "partial-failure"]),
        ("lists jobs", vec!["get", "gbj", "-A"]),
        ("reads an API key", vec!["-n", TEAM, "get", "secret", "gemini"]),
        ("reads a result", vec!["-n", TEAM, "get", "configmap", "minimal-results"]),
        ("changes a spec", vec!["-n", TEAM, "patch", "gbj", "partial-failure", "--type=merge", "-p", spec]),
    ] {
        let Err(error) = with_token(&args) else { anyhow::bail!("a receiver's token {what}") };
        ensure(format!("{error:#}").to_lowercase().contains("forbidden"), || format!("{what}: {error:#}"))?;
    }
    // It may patch the status, so here it is the admission policy that refuses.
    let runtime = tokio::runtime::Runtime::new()?;
    for (what, status) in [
        ("changes what was seen", json!({"observedGeneration": 99})),
        ("changes counts", json!({"requests": {"succeeded": 99}})),
    ] {
        let Err(error) = runtime.block_on(patch_status(&kubeconfig, &status)) else {
            anyhow::bail!("a receiver's token {what}")
        };
        let error = format!("{error:#}");
        ensure(error.contains("may write status.callback only"), || format!("{what}: {error}"))?;
    }
    // What it is for. This also shows that the token is good.
    let callback = json!({"webhookId": "e2e", "type": "batch.succeeded", "attempt": 1,
        "receivedTime": "2026-01-01T00:00:00.000000Z"});
    runtime.block_on(patch_status(&kubeconfig, &json!({ "callback": callback })))
}

/// As the receiver does: with no GET before, as kubectl would.
async fn patch_status(kubeconfig: &Path, status: &Value) -> anyhow::Result<()> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let jobs: Api<GeminiBatchJob> = Api::namespaced(kube::Client::try_from(config)?, TEAM);
    let patch = Patch::Merge(json!({ "status": status }));
    jobs.patch_status("partial-failure", &PatchParams::default(), &patch).await?;
    Ok(())
}
