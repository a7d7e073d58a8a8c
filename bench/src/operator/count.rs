//! What the API server and the simulator say they were asked.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom};
use std::path::PathBuf;

use anyhow::Context as _;
use serde::Deserialize;

use crate::numbers::float;
use crate::parts::Simulator;

/// A line of the audit log, as far as it is counted.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    stage: String,
    verb: String,
    #[serde(default)]
    user_agent: String,
    object_ref: Option<Object>,
    response_status: Option<Status>,
}

#[derive(Deserialize)]
struct Object {
    resource: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    subresource: String,
}

#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    code: u16,
}

/// What the operator asked of the API server about one job.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfJob {
    /// Writes that were taken, to the job and its output ConfigMap; the finalizer's removal after the end is not
    /// among them.
    pub until_terminal: usize,
    /// Writes that were refused, for a conflict for example.
    pub refused: usize,
    /// Reads of the job, its output ConfigMap and, at creation of the output, its absence.
    pub reads: usize,
    /// Writes to the job itself, without subresource: finalizer on, finalizer off.
    finalizer: usize,
}

/// What the operator asked of the API server.
#[derive(Debug, Default)]
pub struct Kubernetes {
    /// By the job's name.
    pub jobs: BTreeMap<String, OfJob>,
    pub events: usize,
    pub secret_reads: usize,
}

impl Kubernetes {
    /// The mean of all jobs, and the most of any.
    pub fn of_jobs(&self, of: fn(&OfJob) -> usize) -> (f64, usize) {
        let all = self.jobs.values().map(of);
        let mean = float(all.clone().sum()) / float(self.jobs.len().max(1));
        (mean, all.max().unwrap_or_default())
    }
}

/// Reads an audit log from where it was left.
pub struct Audit {
    path: PathBuf,
    read: u64,
}

impl Audit {
    /// Begins at the log's present end.
    pub fn from_now(path: PathBuf) -> anyhow::Result<Self> {
        let read = std::fs::metadata(&path).context("no audit log")?.len();
        Ok(Self { path, read })
    }

    /// What was asked since the last time, of one namespace. Jobs and their output ConfigMaps share a name.
    pub fn count(&mut self, namespace: &str) -> anyhow::Result<Kubernetes> {
        let mut file = BufReader::new(std::fs::File::open(&self.path)?);
        file.seek(SeekFrom::Start(self.read))?;
        let mut counts = Kubernetes::default();
        let mut line = String::new();
        loop {
            line.clear();
            let bytes = file.read_line(&mut line)?;
            if !line.ends_with('\n') {
                break; // still being written: read the next time
            }
            self.read += u64::try_from(bytes)?;
            let line: Line = serde_json::from_str(&line).context("a line of the audit log")?;
            if line.stage == "ResponseComplete" && line.user_agent.starts_with("gemini-batch-operator") {
                counts.add(&line, namespace);
            }
        }
        for job in counts.jobs.values_mut() {
            job.until_terminal -= job.finalizer.saturating_sub(1);
        }
        Ok(counts)
    }
}

impl Kubernetes {
    fn add(&mut self, line: &Line, namespace: &str) {
        let Some(object) = line.object_ref.as_ref().filter(|o| o.namespace == namespace) else { return };
        let write = ["create", "update", "patch", "delete"].contains(&line.verb.as_str());
        let taken = line.response_status.as_ref().is_some_and(|s| (200..300).contains(&s.code));
        match object.resource.as_str() {
            "events" => self.events += usize::from(write && taken),
            "secrets" => self.secret_reads += usize::from(!write),
            // a list or a watch has no name
            "geminibatchjobs" | "configmaps" if !object.name.is_empty() => {
                let job = self.jobs.entry(object.name.clone()).or_default();
                job.reads += usize::from(!write);
                job.until_terminal += usize::from(write && taken);
                job.refused += usize::from(write && !taken);
                let whole = object.resource == "geminibatchjobs" && object.subresource.is_empty();
                job.finalizer += usize::from(write && taken && whole);
            }
            _ => {}
        }
    }
}

/// Requests to Gemini since `seen`, by operation. Moves `seen` on.
pub async fn gemini(simulator: &Simulator, seen: &mut usize) -> anyhow::Result<BTreeMap<String, usize>> {
    let log = simulator.get("log").await?;
    let entries = log["entries"].as_array().context("no log")?;
    let mut counts = BTreeMap::new();
    for entry in entries.iter().skip(*seen) {
        *counts.entry(entry["op"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    *seen = entries.len();
    Ok(counts)
}
