//! A controller that depends on `GeminiBatchJob`s and knows nothing of their operator but what it promises.
//!
//! Its own objects are ConfigMaps with the label `example.com/waits-for-batch`, and `job` in their data; yours would
//! be a resource of your own. When the job has finished, the controller does its work: here it counts the results
//! and writes `state`, `reason` and `results` (a number of lines) into the ConfigMap.
//!
//! What was done stands in the object, so a restart does nothing twice: it may look again, and then sees the same,
//! since a finished job never changes its state.
//!
//! The cluster is the one of `KUBECONFIG`, of `~/.kube/config` or the one that it runs in, the namespace the one that
//! is current there.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{ApiResource, GroupVersionKind, Patch, PatchParams};
use kube::core::{NotUsed, Object};
use kube::runtime::wait::await_condition;
use kube::runtime::{Controller, controller::Action, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde::Deserialize;
use serde_json::json;

/// Marks the objects of this controller.
const LABEL: &str = "example.com/waits-for-batch";
/// The owner of the fields that it writes.
const MANAGER: &str = "dependent-kube-rs";
/// How long one wait lasts. Then the object is read anew, in case somebody has changed or deleted it meanwhile.
const LOOK_AGAIN: Duration = Duration::from_mins(5);
/// After an error.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// As much of the resource as is needed here. The operator's crate is not.
type GeminiBatchJob = Object<NotUsed, JobStatus>;

#[derive(Clone, Debug, Default, Deserialize)]
struct JobStatus {
    state: String,
    #[serde(default)]
    conditions: Vec<Condition>,
    output: Option<JobOutput>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct JobOutput {
    config_map: Option<String>,
}

/// What went wrong; it is tried again.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("asking the API server: {0}")]
    Api(#[from] kube::Error),
    #[error("waiting: {0}")]
    Wait(#[from] kube::runtime::wait::Error),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = Client::try_default().await?;
    let mine: Api<ConfigMap> = Api::default_namespaced(client.clone());
    eprintln!("waiting for batches in namespace {}", client.default_namespace());
    Controller::new(mine, watcher::Config::default().labels(LABEL))
        .shutdown_on_signal()
        .run(reconcile, |_, _, _| Action::requeue(TRY_AGAIN), Arc::new(client))
        .for_each(async |result| {
            if let Err(error) = result {
                eprintln!("{error}");
            }
        })
        .await;
    Ok(())
}

/// Waits for the job that one object names, and does the work. Objects do not wait for each other.
async fn reconcile(object: Arc<ConfigMap>, client: Arc<Client>) -> Result<Action, Error> {
    let data = object.data.clone().unwrap_or_default();
    let (Some(job), false) = (data.get("job"), data.contains_key("state")) else {
        return Ok(Action::await_change()); // nothing to wait for, or done
    };
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("geminibatch.dev", "v1alpha1", "GeminiBatchJob"));
    let jobs: Api<GeminiBatchJob> = Api::default_namespaced_with((*client).clone(), &kind);
    // A job that is not there yet is waited for as well.
    let Ok(finished) = tokio::time::timeout(LOOK_AGAIN, await_condition(jobs, job, has_finished)).await
    else {
        return Ok(Action::requeue(Duration::ZERO));
    };
    let Some(status) = finished?.and_then(|job| job.status) else {
        return Ok(Action::requeue(TRY_AGAIN)); // can't be: has_finished saw one
    };

    // The work. The results are there: the operator stores them before it says Finished.
    let maps: Api<ConfigMap> = Api::default_namespaced((*client).clone());
    let results = match status.output.and_then(|output| output.config_map) {
        Some(name) => maps.get(&name).await?.data.unwrap_or_default().remove("results.jsonl"),
        None => None, // they stay with Gemini, or there are none
    };
    let reason = status.conditions.iter().find(|c| c.type_ == "Finished").map(|c| c.reason.as_str());
    let done = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {
        "state": status.state,
        "reason": reason,
        "results": results.unwrap_or_default().lines().count().to_string(),
    }});
    let name = object.name_any();
    maps.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&done)).await?;
    eprintln!("{name}: {job} is {}", status.state);
    Ok(Action::await_change())
}

/// True at either end. It never becomes false again, so it counts even if a later generation of the job was not looked
/// at yet. (Of `Ready`, believe only what has the job's generation.)
fn has_finished(job: Option<&GeminiBatchJob>) -> bool {
    let conditions = job.and_then(|job| job.status.as_ref()).map(|status| status.conditions.as_slice());
    conditions.unwrap_or_default().iter().any(|c| c.type_ == "Finished" && c.status == "True")
}
