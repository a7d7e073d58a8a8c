//! The simulator as a pod, and what it knows: the truth about what was paid for.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::checks::{ensure, until};
use crate::cluster::Cluster;

/// Where pods reach it.
pub const URL: &str = "http://gemini.google.svc";

const PROXY: &str = "/api/v1/namespaces/google/services/gemini:http/proxy/_sim";

/// A batch, as the simulator shows it.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Batch {
    pub name: String,
    pub display_name: String,
}

pub fn start(cluster: &Cluster) -> anyhow::Result<()> {
    let manifest = include_str!("simulator.yaml").replace("VERSION", env!("CARGO_PKG_VERSION"));
    cluster.kubectl_with(&["apply", "-f", "-"], &manifest)?;
    cluster.kubectl(&["-n", "google", "rollout", "status", "deployment/gemini", "--timeout=120s"])?;
    Ok(())
}

fn look(cluster: &Cluster, what: &str) -> anyhow::Result<Value> {
    let text = cluster.kubectl(&["get", "--raw", &format!("{PROXY}/{what}")])?;
    serde_json::from_str(&text).with_context(|| text.clone())
}

pub fn batches(cluster: &Cluster) -> anyhow::Result<Vec<Batch>> {
    Ok(serde_json::from_value(look(cluster, "batches")?["batches"].take())?)
}

/// Ends a batch that would run for ever.
pub fn finish(cluster: &Cluster, batch: &str) -> anyhow::Result<()> {
    let body = json!({"batch": batch, "outcome": "succeeded"}).to_string();
    cluster.kubectl_with(&["create", "--raw", &format!("{PROXY}/finish"), "-f", "-"], &body)?;
    Ok(())
}

/// HTTP statuses that callbacks were answered with, and how often.
pub fn answers(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, usize>> {
    let deliveries = look(cluster, "deliveries")?;
    let mut answers = BTreeMap::new();
    for delivery in deliveries["deliveries"].as_array().context("no deliveries")? {
        *answers.entry(delivery["status"].to_string()).or_insert(0) += 1;
    }
    Ok(answers)
}

/// Each of these jobs has one batch, none has a second one, whatever was killed meanwhile.
pub fn one_batch_for_each(cluster: &Cluster, jobs: &Value) -> anyhow::Result<()> {
    let batches = batches(cluster)?;
    for job in jobs["items"].as_array().context("no items")? {
        let (name, uid) = (&job["metadata"]["name"], job["metadata"]["uid"].as_str().context("no uid")?);
        let its: Vec<&Batch> = batches.iter().filter(|b| b.display_name.contains(uid)).collect();
        ensure(its.len() == 1, || format!("job {name} has {} batches: {its:#?}", its.len()))?;
        let recorded = &job["status"]["attempts"][0]["batchName"];
        ensure(recorded == its[0].name.as_str(), || {
            format!("job {name} names {recorded}, Gemini has {its:#?}")
        })?;
    }
    Ok(())
}

/// The batches of these jobs that run, once there are `n`.
pub fn running(cluster: &Cluster, prefix: &str, n: usize) -> anyhow::Result<Vec<String>> {
    until(&format!("{n} batches of jobs {prefix}*"), || {
        let jobs =
            cluster.json(&["-n", crate::cluster::TEAM, "get", "gbj", "-l", &format!("test={prefix}")])?;
        let jobs = jobs["items"].as_array().context("no items")?;
        let names = jobs.iter().filter_map(|job| job["status"]["attempts"][0]["batchName"].as_str());
        let names: Vec<String> = names.map(str::to_owned).collect();
        ensure(names.len() == n, || format!("{} have a batch", names.len()))?;
        Ok(names)
    })
}
