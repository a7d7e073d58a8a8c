//! Writes one change to the job. Client required, apart from [`compose`].
//!
//! The status is written by server-side apply only, with one field manager and the `resourceVersion` of
//! the object that was observed: of two controllers that both think they lead, one gets a conflict. And
//! the API server refuses a field that an older CRD lacks, instead of dropping it silently. A status that
//! differs only in times is not written.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;

use super::Problem;
use super::decide::{Change, Results};
use super::ending::{self, End};
use crate::api::conditions::{self, COMPLETE, FAILED, FINISHED, READY, RECONCILING, STALLED, SUBMITTED};
use crate::api::{
    Attempt, CONTROLLER_MANAGER, FINALIZER, GeminiBatchJob, GeminiBatchJobStatus, Reason, State,
};

/// Writes the change and returns the job as it is then.
pub async fn write(
    client: &Client,
    job: &GeminiBatchJob,
    change: &Change,
    now: Timestamp,
) -> Result<GeminiBatchJob, kube::Error> {
    let jobs: Api<GeminiBatchJob> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    match change {
        Change::AddFinalizer => {
            let list: Vec<_> = job.finalizers().iter().cloned().chain([FINALIZER.to_owned()]).collect();
            finalizers(&jobs, job, &list).await
        }
        Change::DropFinalizer { .. } => {
            let list: Vec<_> = job.finalizers().iter().filter(|f| *f != FINALIZER).cloned().collect();
            finalizers(&jobs, job, &list).await
        }
        change => {
            let before = job.status.clone().unwrap_or_default();
            let after = compose(&before, job.metadata.generation.unwrap_or(0), change, now);
            if same_but_for_times(&before, &after) {
                return Ok(job.clone());
            }
            apply(&jobs, job, after).await
        }
    }
}

/// Writes a change of the status without reading the job's answer, for a job that can't be read. Returns whether
/// there was anything to write.
pub async fn write_blindly(
    client: &Client,
    cached: &GeminiBatchJob,
    change: &Change,
    now: Timestamp,
) -> Result<bool, kube::Error> {
    let before = cached.status.clone().unwrap_or_default();
    let mut after = compose(&before, cached.metadata.generation.unwrap_or(0), change, now);
    if same_but_for_times(&before, &after) {
        return Ok(false);
    }
    after.callback = None; // the receivers' field
    let request = http::Request::patch(format!(
        "{}/{}/status?fieldManager={CONTROLLER_MANAGER}&force=true",
        GeminiBatchJob::url_path(&(), cached.namespace().as_deref()),
        cached.name_any()
    ))
    .header(http::header::CONTENT_TYPE, "application/apply-patch+yaml")
    .body(serde_json::to_vec(&body(cached, &after)).map_err(kube::Error::SerdeError)?)
    .map_err(kube::Error::HttpError)?;
    client.request::<serde::de::IgnoredAny>(request).await?;
    Ok(true)
}

async fn finalizers(
    jobs: &Api<GeminiBatchJob>,
    job: &GeminiBatchJob,
    list: &[String],
) -> Result<GeminiBatchJob, kube::Error> {
    let patch = json!({"metadata": {"resourceVersion": job.resource_version(), "finalizers": list}});
    let params = PatchParams { field_manager: Some(CONTROLLER_MANAGER.to_owned()), ..PatchParams::default() };
    jobs.patch(&job.name_any(), &params, &Patch::Merge(&patch)).await
}

async fn apply(
    jobs: &Api<GeminiBatchJob>,
    job: &GeminiBatchJob,
    mut status: GeminiBatchJobStatus,
) -> Result<GeminiBatchJob, kube::Error> {
    status.callback = None; // the receivers' field
    let params = PatchParams::apply(CONTROLLER_MANAGER).force();
    jobs.patch_status(&job.name_any(), &params, &Patch::Apply(&body(job, &status))).await
}

fn body(job: &GeminiBatchJob, status: &GeminiBatchJobStatus) -> serde_json::Value {
    json!({
        "apiVersion": GeminiBatchJob::api_version(&()),
        "kind": GeminiBatchJob::kind(&()),
        "metadata": {"name": job.name_any(), "resourceVersion": job.resource_version()},
        "status": status,
    })
}

/// The status after the change.
#[must_use]
pub fn compose(
    before: &GeminiBatchJobStatus,
    generation: i64,
    change: &Change,
    now: Timestamp,
) -> GeminiBatchJobStatus {
    let mut s = before.clone();
    s.observed_generation = Some(generation);
    match change {
        // Not changes of the status.
        Change::AddFinalizer | Change::DropFinalizer { .. } => return before.clone(),
        Change::Intent(attempt) => {
            s.start_time = s.start_time.or(Some(Time(now)));
            s.requests = attempt.request_count.map(|total| crate::api::RequestCounts {
                total,
                pending: total,
                ..Default::default()
            });
            s.attempts.retain(|a| a.number != attempt.number);
            s.attempts.push((**attempt).clone());
            s.attempts.sort_by_key(|a| a.number);
            s.state = State::Pending;
            progress(&mut s, Reason::Submitting, "the batch is being submitted to Gemini", generation, now);
        }
        Change::InputFile { file } => {
            if let Some(a) = current(&mut s) {
                a.input_file.clone_from(file);
            }
        }
        Change::Refused(refused) => {
            if let Some(a) = current(&mut s) {
                a.refusal = Some(refused.refusal.clone());
                a.refusals = Some(a.refusals.unwrap_or(0).saturating_add(1));
            }
            let problem = ending::refusal_problem(&refused.refusal);
            let stalled = problem.reason != Reason::WaitingForQuota;
            waiting(&mut s, &problem, stalled, generation, now);
        }
        Change::Submitted { batch, adopted } => {
            if let Some(a) = current(&mut s) {
                a.batch_name = Some(batch.name.to_string());
                a.create_time = batch.create_time.map(Time);
                a.remote_state = Some(batch.state.as_str().to_owned());
            }
            let name = batch.name.to_string();
            let message = if *adopted {
                format!("{name} was found at Gemini by its display name")
            } else {
                format!("Gemini created {name}")
            };
            conditions::set(&mut s.conditions, SUBMITTED, true, Reason::Submitted, &message, generation, now);
            running(&mut s, None, generation, now);
        }
        Change::Running { early } => running(&mut s, early.as_deref(), generation, now),
        Change::HintObserved { hint } => {
            if let Some(a) = current(&mut s) {
                a.observed_hint = Some(hint.clone());
            }
            running(&mut s, None, generation, now);
        }
        Change::Contradicted { hint, .. } => {
            if let Some(a) = current(&mut s) {
                a.observed_hint = Some(hint.clone());
            }
        }
        Change::Waiting { problem, stalled, results } => {
            if let Some(results) = results {
                put_results(&mut s, results);
            }
            waiting(&mut s, problem, *stalled, generation, now);
        }
        Change::Finished(end) => finished(&mut s, end, generation, now),
        Change::Refresh => {
            for condition in &mut s.conditions {
                condition.observed_generation = Some(generation);
            }
        }
    }
    s
}

fn current(s: &mut GeminiBatchJobStatus) -> Option<&mut Attempt> {
    s.attempts.iter_mut().max_by_key(|a| a.number)
}

/// The operator is at work and nobody has to do anything.
fn progress(s: &mut GeminiBatchJobStatus, reason: Reason, message: &str, generation: i64, now: Timestamp) {
    conditions::clear(&mut s.conditions, STALLED, reason, generation, now);
    conditions::set(&mut s.conditions, RECONCILING, true, reason, message, generation, now);
    conditions::set(&mut s.conditions, READY, false, reason, message, generation, now);
    refresh(s, generation);
}

fn running(s: &mut GeminiBatchJobStatus, early: Option<&str>, generation: i64, now: Timestamp) {
    s.state = State::Running;
    let name = current(s).and_then(|a| a.batch_name.clone()).unwrap_or_default();
    let message = match early {
        None => format!("{name} is at Gemini; its end will be told by a callback, and found without one"),
        Some(event) => format!(
            "a callback said {event}, but Gemini says that {name} has not ended; it is asked again shortly"
        ),
    };
    progress(s, Reason::Submitted, &message, generation, now);
}

fn waiting(s: &mut GeminiBatchJobStatus, problem: &Problem, stalled: bool, generation: i64, now: Timestamp) {
    let submitted = current(s).is_some_and(|a| a.batch_name.is_some());
    s.state = match problem.reason {
        _ if submitted => State::Running,
        Reason::WaitingForQuota => State::Queued,
        _ => State::Pending,
    };
    progress(s, problem.reason, &problem.message, generation, now);
    if stalled {
        // Not both: kstatus reports whichever of the two stands first.
        conditions::clear(&mut s.conditions, RECONCILING, problem.reason, generation, now);
        conditions::set(&mut s.conditions, STALLED, true, problem.reason, &problem.message, generation, now);
    }
}

fn finished(s: &mut GeminiBatchJobStatus, end: &End, generation: i64, now: Timestamp) {
    s.state = end.state;
    s.completion_time = Some(Time(now));
    put_results(s, &end.results);
    if let Some(a) = current(s) {
        a.remote_state = end.remote_state.clone().or(a.remote_state.take());
        a.end_time = end.end_time.map(Time).or(a.end_time.take());
        a.refusal = end.refusal.clone().or(a.refusal.take());
        a.observed_hint = end.hint.clone().or(a.observed_hint.take());
    }
    let complete = end.state == State::Succeeded;
    let outcome = if complete { COMPLETE } else { FAILED };
    let (reason, message) = (end.reason, end.message.as_str());
    for type_ in [outcome, FINISHED] {
        conditions::set(&mut s.conditions, type_, true, reason, message, generation, now);
    }
    conditions::set(&mut s.conditions, READY, complete, reason, message, generation, now);
    conditions::set(&mut s.conditions, RECONCILING, false, reason, "", generation, now);
    if complete {
        conditions::clear(&mut s.conditions, STALLED, reason, generation, now);
    } else {
        // For kstatus a failure that will not mend itself is a stalled object.
        conditions::set(&mut s.conditions, STALLED, true, reason, message, generation, now);
    }
    refresh(s, generation);
}

fn put_results(s: &mut GeminiBatchJobStatus, results: &Results) {
    // Destructured, so that a new field is not forgotten.
    let Results { requests, usage, output } = results;
    s.requests = requests.or(s.requests);
    s.usage = usage.or(s.usage);
    s.output = output.clone().or(s.output.take());
}

/// `kubectl wait` ignores conditions of an older generation.
fn refresh(s: &mut GeminiBatchJobStatus, generation: i64) {
    for condition in &mut s.conditions {
        condition.observed_generation = Some(generation);
    }
}

/// Whether writing `after` over `before` would only change times.
fn same_but_for_times(before: &GeminiBatchJobStatus, after: &GeminiBatchJobStatus) -> bool {
    let strip = |s: &GeminiBatchJobStatus| {
        let mut s = s.clone();
        for condition in &mut s.conditions {
            condition.last_transition_time = Time(Timestamp::UNIX_EPOCH);
        }
        s
    };
    strip(before) == strip(after)
}

/// What to say in an Event: at most two on the way to a normal end.
#[must_use]
pub fn event(change: &Change) -> Option<(Reason, String, bool)> {
    match change {
        Change::Submitted { batch, adopted } => {
            let how = if *adopted { "found at Gemini by its display name" } else { "submitted to Gemini" };
            Some((Reason::Submitted, format!("{} {how}", batch.name), true))
        }
        Change::Finished(end) => Some((end.reason, end.message.clone(), end.state == State::Succeeded)),
        Change::Waiting { problem, stalled: true, .. } | Change::Contradicted { problem, .. } => {
            Some((problem.reason, problem.message.clone(), false))
        }
        Change::Refused(refused) => {
            let problem = ending::refusal_problem(&refused.refusal);
            Some((problem.reason, problem.message, false))
        }
        Change::DropFinalizer { event: Some(problem) } => {
            let normal = matches!(problem.reason, Reason::Cancelled | Reason::Deleted);
            Some((problem.reason, problem.message.clone(), normal))
        }
        _ => None,
    }
}
