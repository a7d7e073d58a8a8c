//! The output ConfigMap: reserved before anything is paid, written once the results are there, given back
//! if there will be none. Client required.
//!
//! An object that was not made for this very job is never written to. The UID decides, not the name: a
//! job that was deleted and created anew must not overwrite its predecessor's results.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client, Resource as _, ResourceExt};
use serde::Deserialize;
use serde_json::json;

use super::Problem;
use super::collect::Collected;
pub use super::collect::{Text, text};
pub use super::destination::MANIFEST_KEY;
use crate::api::{
    CONTROLLER_MANAGER, GeminiBatchJob, JOB_NAME_ANNOTATION, JOB_UID_ANNOTATION, PARENT_UID_ANNOTATION,
    Reason, RequestCounts, Retention,
};

/// The API server takes 1 MiB of data in a ConfigMap; the manifest needs some of it.
pub const MAX_LINES_BYTES: usize = 1_048_576 - 16_384;

/// Joined results, a line for each request with one.
pub const RESULTS_KEY: &str = "results.jsonl";
/// Requests without a result, if there are any.
pub const MISSING_KEY: &str = "missing.jsonl";
/// Lines of the result file that belong to no request, if there are any.
pub const UNMATCHED_KEY: &str = "unmatched.jsonl";

/// What came of an attempt to use the object.
pub enum Done {
    /// It is there and ours.
    Yes,
    /// It can't be used.
    Blocked(Problem),
}

/// Creates the object, or sees that it is ours.
pub async fn reserve(client: &Client, job: &GeminiBatchJob, name: &str) -> Result<Done, kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    match maps.create(&post(), &object(job, name, None, None)).await {
        Ok(_) => Ok(Done::Yes),
        Err(e) if is(&e, 409) => match maps.get_opt(name).await? {
            Some(there) if is_ours(job, &there) => Ok(Done::Yes),
            Some(there) if is_abandoned(job, &there) => {
                let mine = object(job, name, None, there.resource_version());
                write(maps.replace(name, &post(), &mine).await, name)
            }
            Some(there) => Ok(Done::Blocked(conflict(job, name, &there))),
            None => Ok(Done::Blocked(not_writable(name, "it was being deleted", "it is tried again"))),
        },
        Err(e) => write(Err(e), name),
    }
}

/// Writes the results.
pub async fn store(
    client: &Client,
    job: &GeminiBatchJob,
    name: &str,
    kept: &Text,
    manifest: &serde_json::Value,
) -> Result<Done, kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let mut data = BTreeMap::from([
        (RESULTS_KEY.to_owned(), kept.results.clone()),
        (MANIFEST_KEY.to_owned(), format!("{manifest:#}\n")),
    ]);
    for (key, text) in [(MISSING_KEY, &kept.missing), (UNMATCHED_KEY, &kept.unmatched)] {
        if !text.is_empty() {
            data.insert(key.to_owned(), text.clone());
        }
    }
    match maps.get_opt(name).await? {
        Some(there) if is_ours(job, &there) => {
            // Lines of earlier attempts that belong to no request were paid for as well.
            if let Some(old) = there.data.as_ref().and_then(|d| d.get(UNMATCHED_KEY)) {
                let new = data.entry(UNMATCHED_KEY.to_owned()).or_default();
                let earlier: Vec<&str> =
                    old.lines().filter(|line| !kept.unmatched.lines().any(|l| l == *line)).collect();
                for line in earlier {
                    new.push_str(line);
                    new.push('\n');
                }
            }
            let full = object(job, name, Some(data), there.resource_version());
            write(maps.replace(name, &post(), &full).await, name)
        }
        Some(there) => Ok(Done::Blocked(conflict(job, name, &there))),
        None => write(maps.create(&post(), &object(job, name, Some(data), None)).await, name),
    }
}

/// Writes these contents instead of what is in it.
pub async fn put(
    client: &Client,
    job: &GeminiBatchJob,
    name: &str,
    data: BTreeMap<String, String>,
) -> Result<Done, kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    match maps.get_opt(name).await? {
        Some(there) if is_ours(job, &there) => {
            let full = object(job, name, Some(data), there.resource_version());
            write(maps.replace(name, &post(), &full).await, name)
        }
        Some(there) => Ok(Done::Blocked(conflict(job, name, &there))),
        None => write(maps.create(&post(), &object(job, name, Some(data), None)).await, name),
    }
}

/// Deletes the object if it is ours and still empty.
pub async fn release(client: &Client, job: &GeminiBatchJob, name: &str) -> Result<(), kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let Some(there) = maps.get_opt(name).await? else { return Ok(()) };
    if !is_ours(job, &there) || !is_empty(&there) {
        return Ok(());
    }
    let only_this = DeleteParams {
        preconditions: Some(Preconditions { uid: there.uid(), resource_version: there.resource_version() }),
        ..DeleteParams::default()
    };
    match maps.delete(name, &only_this).await {
        Err(e) if !is(&e, 404) && !is(&e, 409) => Err(e),
        _ => Ok(()),
    }
}

/// What `manifest.json` says. Counts and names only.
#[must_use]
pub fn manifest(job: &GeminiBatchJob, collected: &Collected, counts: RequestCounts) -> serde_json::Value {
    let mut manifest = own_manifest(job, collected, counts);
    // By it the sharded job knows the results of its shards.
    if let Some(parent) = super::shards::parent_of(&job.metadata) {
        manifest["parentUid"] = json!(parent.uid);
    }
    manifest
}

fn own_manifest(job: &GeminiBatchJob, collected: &Collected, counts: RequestCounts) -> serde_json::Value {
    let attempt = super::decide::current_attempt(job);
    let attempts: Vec<_> = job
        .status
        .iter()
        .flat_map(|s| &s.attempts)
        .map(|a| {
            let lines = collected.by_attempt.get(&a.number).copied().unwrap_or_default();
            json!({
                "number": a.number,
                "batch": a.batch_name,
                "requests": a.request_count,
                // Of its lines those that are among the results: no later attempt has a better one.
                "succeeded": lines.succeeded,
                "failed": lines.failed,
            })
        })
        .collect();
    json!({
        "job": {"namespace": job.namespace(), "name": job.name_any(), "uid": job.uid()},
        "model": job.spec.model,
        "method": job.spec.method,
        "batch": attempt.and_then(|a| a.batch_name.clone()),
        "attempt": attempt.map(|a| a.number),
        "batches": job.status.iter().flat_map(|s| &s.attempts).filter_map(|a| a.batch_name.as_ref()).collect::<Vec<_>>(),
        "attempts": attempts,
        "inputSha256": attempt.and_then(|a| a.input_sha256.clone()),
        "resultFile": {"name": collected.file, "bytes": collected.bytes, "sha256": collected.sha256},
        "requests": {
            "total": counts.total,
            "succeeded": counts.succeeded,
            "failed": collected.failed_lines,
            "missing": counts.total - collected.succeeded_lines - collected.failed_lines,
        },
        "joined": collected.joined,
        "unmatchedLines": {
            "duplicate": collected.duplicate_lines,
            "foreign": collected.foreign_lines,
            "malformed": collected.malformed_lines,
        },
        "usage": collected.usage,
    })
}

/// The last attempt whose results are stored, as the manifest beside them says.
#[must_use]
pub fn stored_up_to(manifest: &str) -> Option<i32> {
    #[derive(Deserialize)]
    struct Manifest {
        attempt: Option<i32>,
    }
    serde_json::from_str::<Manifest>(manifest).ok()?.attempt
}

/// The attempt that a stored line came from.
#[must_use]
pub fn attempt_of(line: &str) -> i32 {
    #[derive(Deserialize)]
    struct Line {
        attempt: Option<i32>,
    }
    // Lines of the first attempt were stored when there was no other one.
    serde_json::from_str::<Line>(line).ok().and_then(|line| line.attempt).unwrap_or(1)
}

fn object(
    job: &GeminiBatchJob,
    name: &str,
    data: Option<BTreeMap<String, String>>,
    resource_version: Option<String>,
) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: job.namespace(),
            resource_version,
            labels: Some(BTreeMap::from([(
                "app.kubernetes.io/managed-by".to_owned(),
                "gemini-batch-operator".to_owned(),
            )])),
            owner_references: owners(job),
            annotations: Some(annotations(job)),
            ..ObjectMeta::default()
        },
        data,
        ..ConfigMap::default()
    }
}

fn annotations(job: &GeminiBatchJob) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([
        (JOB_UID_ANNOTATION.to_owned(), job.uid().unwrap_or_default()),
        (JOB_NAME_ANNOTATION.to_owned(), job.name_any()),
    ]);
    if let Some(parent) = super::shards::parent_of(&job.metadata) {
        all.insert(PARENT_UID_ANNOTATION.to_owned(), parent.uid.clone());
    }
    all
}

/// With the job's own life, if its user wants that.
fn owners(job: &GeminiBatchJob) -> Option<Vec<OwnerReference>> {
    let retention = job.spec.output.as_ref()?.retention;
    let owner = OwnerReference { controller: None, block_owner_deletion: None, ..job.owner_ref(&())? };
    (retention == Retention::Delete).then(|| vec![owner])
}

fn post() -> PostParams {
    PostParams { field_manager: Some(CONTROLLER_MANAGER.to_owned()), ..PostParams::default() }
}

/// Whether the object was made for this very job.
#[must_use]
pub fn is_ours(job: &GeminiBatchJob, there: &ConfigMap) -> bool {
    there.annotations().get(JOB_UID_ANNOTATION).is_some_and(|uid| Some(uid) == job.uid().as_ref())
}

/// Reserved by a predecessor of the same name, and never filled: taking it over loses nothing.
fn is_abandoned(job: &GeminiBatchJob, there: &ConfigMap) -> bool {
    is_empty(there)
        && there.annotations().contains_key(JOB_UID_ANNOTATION)
        && there.annotations().get(JOB_NAME_ANNOTATION) == Some(&job.name_any())
}

fn is_empty(there: &ConfigMap) -> bool {
    there.data.as_ref().is_none_or(BTreeMap::is_empty)
        && there.binary_data.as_ref().is_none_or(BTreeMap::is_empty)
}

fn conflict(job: &GeminiBatchJob, name: &str, there: &ConfigMap) -> Problem {
    let whose = match there.annotations().get(JOB_NAME_ANNOTATION) {
        Some(other) if *other == job.name_any() => {
            "holds the results of an earlier job of the same name, which has been deleted".to_owned()
        }
        Some(other) => format!("holds the results of another job, {other}"),
        None => "exists and was not made by this operator".to_owned(),
    };
    Problem::new(
        Reason::OutputConflict,
        format!(
            "ConfigMap {name} {whose}, so it is not written to: name another one in spec.output, or, if what it holds \
             is not needed any more, delete it"
        ),
    )
}

fn not_writable(name: &str, why: &str, what_to_do: &str) -> Problem {
    Problem::new(
        Reason::OutputNotWritable,
        format!("ConfigMap {name} can't be written ({why}): {what_to_do}"),
    )
}

/// Turns a refusal of the API server into something to say; what may pass stays an error.
fn write(answer: Result<ConfigMap, kube::Error>, name: &str) -> Result<Done, kube::Error> {
    let status = match answer {
        Ok(_) => return Ok(Done::Yes),
        Err(kube::Error::Api(status)) => status,
        Err(e) => return Err(e),
    };
    let what_to_do = match status.code {
        403 => {
            "an administrator has to allow it: a quota, an admission policy, a namespace that is being deleted, or a \
             missing role of the operator"
        }
        404 => "the namespace is being deleted",
        413 | 422 => "change spec.output",
        _ => return Err(kube::Error::Api(status)),
    };
    Ok(Done::Blocked(not_writable(name, &status.message, what_to_do)))
}

/// Whether the API server answered with that code.
#[must_use]
pub fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}
