//! Jobs: made many at once, watched until they are complete. And raw status patches, to compare with.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gemini_batch_operator::api::GeminiBatchJob;
use gemini_batch_operator::controller::watched::Watched;
use http::Request;
use http::header::CONTENT_TYPE;
use jiff::Timestamp;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource as _, ResourceExt as _};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::say;

/// Requests of a job, and the bytes of each: 20 KiB of input.
const REQUESTS: usize = 20;
const REQUEST_BYTES: usize = 1024;

/// Jobs that share an API key: fewer than may be active of one.
pub const PER_KEY: usize = 50;

/// Writes that are under way at once while the ground is laid.
const AT_ONCE: usize = 32;

/// So long without one more job in the state that is waited for, and something is wrong.
const STANDSTILL: Duration = Duration::from_mins(1);

/// What a job shall do.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// Runs as long as the simulator lets it.
    Runs,
    /// Runs until the simulator is told otherwise.
    Stalls,
}

/// A job of 20 KiB, whose output ConfigMap, if any, has its name.
fn job(namespace: &str, n: usize, kind: Kind, output: bool) -> Value {
    let filler = "How many angels can dance on the head of a pin, and why do they? ".repeat(20);
    let requests: Vec<Value> = (0..REQUESTS)
        .map(|r| {
            let directive = if kind == Kind::Stalls { "[[sim:job=stall]] " } else { "" };
            let mut prompt = format!("{directive}{namespace} {n} {r}: {filler}");
            prompt.truncate(REQUEST_BYTES);
            json!({"key": format!("request-{r}"), "prompt": prompt})
        })
        .collect();
    let mut job = json!({
        "apiVersion": GeminiBatchJob::api_version(&()),
        "kind": GeminiBatchJob::kind(&()),
        "metadata": {"name": name(n)},
        "spec": {
            "model": "gemini-2.5-flash",
            "credentials": {"secretRef": {"name": format!("key-{}", n / PER_KEY)}},
            "input": {"requests": requests},
        },
    });
    if output {
        job["spec"]["output"] = json!({"configMap": {"name": name(n)}});
    }
    job
}

pub fn name(n: usize) -> String {
    format!("job-{n}")
}

fn path(namespace: &str, rest: &str) -> String {
    format!("{}{rest}", GeminiBatchJob::url_path(&(), Some(namespace)))
}

/// Sends it without reading the answer's content, so that this process costs little.
async fn send(
    client: &Client,
    method: &str,
    uri: &str,
    content: &str,
    body: &Value,
) -> Result<(), kube::Error> {
    let request = Request::builder().method(method).uri(uri).header(CONTENT_TYPE, content);
    let body = serde_json::to_vec(body).map_err(kube::Error::SerdeError)?;
    client.request_text(request.body(body).map_err(kube::Error::HttpError)?).await.map(drop)
}

/// A namespace, with the keys for so many jobs.
pub async fn namespace(client: &Client, name: &str, jobs: usize) -> anyhow::Result<()> {
    let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    send(client, "POST", "/api/v1/namespaces", "application/json", &body).await?;
    for n in 0..jobs.div_ceil(PER_KEY) {
        let body = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": format!("key-{n}")},
            "stringData": {"apiKey": format!("{name}-{n}")},
        });
        send(client, "POST", &format!("/api/v1/namespaces/{name}/secrets"), "application/json", &body)
            .await?;
    }
    Ok(())
}

/// Creates so many jobs.
pub async fn create(
    client: &Client,
    namespace: &str,
    count: usize,
    kind: Kind,
    output: bool,
) -> anyhow::Result<()> {
    let uri = path(namespace, "");
    stream::iter((0..count).map(Ok::<_, anyhow::Error>))
        .try_for_each_concurrent(AT_ONCE, async |n| {
            let job = job(namespace, n, kind, output);
            send(client, "POST", &uri, "application/json", &job).await.context("creating a job")
        })
        .await
}

/// Creates so many jobs that have finished already, all with the same status.
pub async fn create_finished(
    client: &Client,
    namespace: &str,
    count: usize,
    status: &Value,
) -> anyhow::Result<()> {
    let uri = path(namespace, "");
    let done = AtomicUsize::new(0);
    stream::iter((0..count).map(Ok::<_, anyhow::Error>))
        .try_for_each_concurrent(AT_ONCE, async |n| {
            let job = job(namespace, n, Kind::Runs, true);
            send(client, "POST", &uri, "application/json", &job).await.context("creating a job")?;
            let (uri, patch) = (format!("{uri}/{}/status", name(n)), json!({"status": status}));
            send(client, "PATCH", &uri, "application/merge-patch+json", &patch)
                .await
                .context("writing a status")?;
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(1000) {
                say(&format!("  {done} of {count}"));
            }
            Ok(())
        })
        .await
}

/// The status of a job.
pub async fn status(client: &Client, namespace: &str, n: usize) -> anyhow::Result<Value> {
    let uri = path(namespace, &format!("/{}", name(n)));
    let mut job: Value = client.request(Request::get(uri).body(Vec::new())?).await?;
    Ok(job["status"].take())
}

/// How many jobs there are in the cluster.
pub async fn present(client: &Client) -> anyhow::Result<i64> {
    let uri = format!("{}?limit=1", GeminiBatchJob::url_path(&(), None));
    let list: Value = client.request(Request::get(uri).body(Vec::new())?).await?;
    Ok(1 + list["metadata"]["remainingItemCount"].as_i64().unwrap_or_default())
}

/// A job in the state that was watched for.
#[derive(Clone, Copy)]
pub struct There {
    /// When the watch showed it.
    pub seen: Timestamp,
    /// When the receiver took its callback.
    pub received: Option<Timestamp>,
}

/// Watches a namespace for jobs in a state.
pub struct Watch {
    state: &'static str,
    seen: Arc<Mutex<BTreeMap<String, There>>>,
    task: JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// The API server selects, so that it costs one event for each job, not one for each write.
    pub fn start(client: &Client, namespace: &str, state: &'static str) -> Self {
        let seen: Arc<Mutex<BTreeMap<String, There>>> = Arc::default();
        let jobs: Api<Watched> = Api::namespaced(client.clone(), namespace);
        let events = watcher(jobs, watcher::Config::default().fields(&format!("status.state={state}")));
        let into = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let mut events = events.boxed();
            while let Some(event) = events.next().await {
                // errors are tried again by the watcher
                let Ok(Event::Apply(job) | Event::InitApply(job)) = event else { continue };
                let Ok(job) = job.0 else { continue };
                let received =
                    job.status.as_ref().and_then(|s| s.callback.as_ref()).map(|c| c.received_time.0);
                let there = There { seen: Timestamp::now(), received };
                lock(&into).entry(job.name_any()).or_insert(there);
            }
        });
        Self { state, seen, task }
    }

    /// Waits until so many are there, and tells when each was.
    pub async fn all(&self, count: usize) -> anyhow::Result<BTreeMap<String, There>> {
        let (mut before, mut since, mut told) = (0, Instant::now(), Instant::now());
        loop {
            let now = lock(&self.seen).len();
            if now >= count {
                return Ok(lock(&self.seen).clone());
            }
            if now > before {
                (before, since) = (now, Instant::now());
            }
            if since.elapsed() > STANDSTILL {
                bail!("{now} of {count} jobs are {}, and no other became so for a minute", self.state);
            }
            if told.elapsed() > Duration::from_secs(5) {
                told = Instant::now();
                say(&format!("  {now} of {count} {}", self.state));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a status is patched.
#[derive(Clone, Copy, PartialEq)]
pub enum Raw {
    /// One field, in a JSON merge patch: the cheapest there is.
    Merge,
    /// The whole status, by server-side apply, as the operator does it.
    Apply,
}

/// So many patches of the status of jobs, by so many tasks at once.
pub async fn raw_patches(
    client: &Client,
    namespace: &str,
    jobs: usize,
    tasks: usize,
    patches: usize,
    raw: Raw,
    status: &Value,
) -> anyhow::Result<()> {
    let round = Timestamp::now().as_millisecond();
    stream::iter((0..patches).map(Ok::<_, anyhow::Error>))
        .try_for_each_concurrent(tasks, async |n| {
            // No two at once on the same job: there are far more jobs than tasks.
            let name = name(n % jobs);
            // A field that nobody acts upon, always with another value.
            let tokens = round + i64::try_from(n)?;
            let (manager, content, body) = match raw {
                Raw::Merge => (
                    "bench-merge",
                    "application/merge-patch+json",
                    json!({"status": {"usage": {"totalTokens": tokens}}}),
                ),
                Raw::Apply => {
                    let mut status = status.clone();
                    status["usage"]["totalTokens"] = json!(tokens);
                    let body = json!({
                        "apiVersion": GeminiBatchJob::api_version(&()),
                        "kind": GeminiBatchJob::kind(&()),
                        "metadata": {"name": name},
                        "status": status,
                    });
                    ("bench-apply", "application/apply-patch+yaml", body)
                }
            };
            let uri = path(namespace, &format!("/{name}/status?fieldManager={manager}&force=true"));
            let uri = if raw == Raw::Merge { uri.replace("&force=true", "") } else { uri };
            send(client, "PATCH", &uri, content, &body).await.context("a raw status patch")
        })
        .await
}
