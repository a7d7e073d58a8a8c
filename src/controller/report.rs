//! Writes one change to the job. Client required, apart from [`compose`].
//!
//! The status is written by server-side apply only, with one field manager and the `resourceVersion` of
//! the object that was observed: of two controllers that both think they lead, one gets a conflict. And
//! the API server refuses a field that an older CRD lacks, instead of dropping it silently. A status that
//! differs only in times is not written.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;

use super::decide::{Change, Results};
use super::ending::{self, End};
use super::shards::seen::Seen;
use super::{InputFacts, Problem};
use crate::api::conditions::{
    self, COMPLETE, FAILED, FINISHED, READY, RECONCILING, STALLED, SUBMITTED, SUSPENDED, VALIDATED,
};
use crate::api::{
    Attempt, CONTROLLER_MANAGER, Cancellation, DryRun, FINALIZER, GeminiBatchJob, GeminiBatchJobSpec,
    GeminiBatchJobStatus, Outcome, OutputStatus, ReadinessPolicy, Reason, RequestCounts, State,
};
use crate::gemini::{Batch, BatchName};

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
            let after = compose(&before, &job.spec, job.metadata.generation.unwrap_or(0), change, now);
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
    let mut after = compose(&before, &cached.spec, cached.metadata.generation.unwrap_or(0), change, now);
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
    spec: &GeminiBatchJobSpec,
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
            s.dry_run = None;
            s.conditions.retain(|c| c.type_ != VALIDATED);
            s.start_time = s.start_time.or(Some(Time(now)));
            s.requests = attempt.request_count.map(|pending| match s.requests {
                Some(counts) if attempt.number > 1 => RequestCounts { pending, ..counts },
                _ => RequestCounts { total: pending, pending, ..RequestCounts::default() },
            });
            if attempt.number > 1 {
                conditions::clear(&mut s.conditions, SUBMITTED, Reason::Submitting, generation, now);
            }
            s.attempts.retain(|a| a.number != attempt.number);
            s.attempts.push((**attempt).clone());
            s.attempts.sort_by_key(|a| a.number);
            s.state = State::Pending;
            progress(
                &mut s,
                spec,
                Reason::Submitting,
                "the batch is being submitted to Gemini",
                generation,
                now,
            );
        }
        Change::Adopted { attempt, batch } => {
            let intended = compose(before, spec, generation, &Change::Intent(attempt.clone()), now);
            let submitted = Change::Submitted { batch: batch.clone(), adopted: true };
            return compose(&intended, spec, generation, &submitted, now);
        }
        Change::InputFile { file } => {
            if let Some(a) = current(&mut s) {
                a.input_file.clone_from(file);
            }
        }
        Change::Fencing => {
            if let Some(a) = current(&mut s) {
                a.fence_time = Some(MicroTime(now));
            }
        }
        Change::Refused(refused) => {
            if let Some(a) = current(&mut s) {
                a.refusal = Some(refused.refusal.clone());
                a.refusals = Some(a.refusals.unwrap_or(0).saturating_add(1));
            }
            let problem = ending::refusal_problem(&refused.refusal);
            let stalled = ending::refusal_stalls(problem.reason);
            waiting(&mut s, spec, &problem, stalled, generation, now);
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
            s.start_time = s.start_time.or(Some(Time(now))); // resumed in the midst of it
            conditions::set(&mut s.conditions, SUBMITTED, true, Reason::Submitted, &message, generation, now);
            running(&mut s, spec, None, generation, now);
        }
        Change::Imported { batch, fingerprint } => {
            s.start_time = s.start_time.or(Some(Time(now)));
            s.attempts = vec![imported(batch, fingerprint, now)];
            s.requests = batch.stats.map(|stats| RequestCounts {
                total: stats.total,
                pending: stats.total,
                ..RequestCounts::default()
            });
            let message = format!("{} was created by somebody else and is watched from now on", batch.name);
            conditions::set(&mut s.conditions, SUBMITTED, true, Reason::Submitted, &message, generation, now);
            running(&mut s, spec, None, generation, now);
        }
        Change::Suspended => suspended(&mut s, generation, now),
        Change::Validated { input } => validated(&mut s, input.as_ref(), generation, now),
        Change::Planned { requests, shards } => {
            s.dry_run = None;
            s.conditions.retain(|c| c.type_ != VALIDATED);
            s.start_time = Some(Time(now));
            s.requests =
                Some(RequestCounts { total: *requests, pending: *requests, ..RequestCounts::default() });
            let message = format!("{requests} requests are split into {} shards", shards.total);
            s.shards = Some(shards.clone());
            s.state = State::Pending;
            progress(&mut s, spec, Reason::Submitting, &message, generation, now);
        }
        Change::Sharded(seen) => sharded(&mut s, spec, seen, generation, now),
        Change::Cancelling { reason } => {
            if let Some(a) = current(&mut s) {
                a.cancellation =
                    Some(Cancellation { reason: reason.as_str().to_owned(), time: MicroTime(now) });
            }
            let batch = current(&mut s).and_then(|a| BatchName::parse(a.batch_name.as_ref()?).ok());
            if let Some(batch) = batch {
                waiting(&mut s, spec, &ending::cancelling(&batch, *reason), false, generation, now);
            }
        }
        Change::AttemptEnded(end) => attempt_ended(&mut s, spec, end, generation, now),
        Change::Running { early } => running(&mut s, spec, early.as_deref(), generation, now),
        Change::HintObserved { hint } => {
            if let Some(a) = current(&mut s) {
                a.observed_hint = Some(hint.clone());
            }
            running(&mut s, spec, None, generation, now);
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
            waiting(&mut s, spec, problem, *stalled, generation, now);
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

/// What a sharded job says of its parts.
fn sharded(
    s: &mut GeminiBatchJobStatus,
    spec: &GeminiBatchJobSpec,
    seen: &Seen,
    generation: i64,
    now: Timestamp,
) {
    s.shards = Some(Box::new(seen.shards.clone()));
    s.requests = Some(seen.requests);
    s.usage = seen.usage.or(s.usage);
    if seen.submitted && !conditions::is_true(&s.conditions, SUBMITTED) {
        let message = "Gemini has the batches of the first shards";
        conditions::set(&mut s.conditions, SUBMITTED, true, Reason::Submitted, message, generation, now);
    }
    if seen.state == State::Suspended {
        return suspended(s, generation, now);
    }
    s.start_time.get_or_insert(Time(now)); // resumed
    s.state = seen.state;
    let Problem { reason, message } = &seen.problem;
    progress(s, spec, *reason, message, generation, now);
    if seen.stalled {
        stall(s, &seen.problem, generation, now);
    }
}

/// The operator is at work and nobody has to do anything.
fn progress(
    s: &mut GeminiBatchJobStatus,
    spec: &GeminiBatchJobSpec,
    reason: Reason,
    message: &str,
    generation: i64,
    now: Timestamp,
) {
    let submitted = match &s.shards {
        Some(_) => conditions::is_true(&s.conditions, SUBMITTED),
        None => current(s).is_some_and(|a| a.batch_name.is_some() && a.outcome.is_none()),
    };
    let ready = submitted && spec.readiness_policy == ReadinessPolicy::WhenSubmitted;
    conditions::clear(&mut s.conditions, STALLED, reason, generation, now);
    conditions::clear(&mut s.conditions, SUSPENDED, reason, generation, now);
    // kstatus takes whatever is being reconciled for unfinished.
    conditions::set(&mut s.conditions, RECONCILING, !ready, reason, message, generation, now);
    conditions::set(&mut s.conditions, READY, ready, reason, message, generation, now);
    refresh(s, generation);
}

/// Held, and nothing of it runs: its time does not run either.
fn suspended(s: &mut GeminiBatchJobStatus, generation: i64, now: Timestamp) {
    s.state = State::Suspended;
    s.start_time = None;
    let message = "spec.suspend holds the job; nothing of it runs at Gemini. Set it to false to go on";
    let reason = Reason::Suspended;
    conditions::clear(&mut s.conditions, STALLED, reason, generation, now);
    conditions::clear(&mut s.conditions, RECONCILING, reason, generation, now);
    conditions::set(&mut s.conditions, SUSPENDED, true, reason, message, generation, now);
    conditions::set(&mut s.conditions, READY, false, reason, message, generation, now);
    refresh(s, generation);
}

/// It could be submitted, and waits until it may.
fn validated(s: &mut GeminiBatchJobStatus, input: Option<&InputFacts>, generation: i64, now: Timestamp) {
    s.state = State::Pending;
    s.requests = input.map(|input| RequestCounts {
        total: input.count,
        pending: input.count,
        ..RequestCounts::default()
    });
    s.dry_run = input.map(|input| DryRun { size_bytes: input.bytes, sha256: input.sha256.clone() });
    let what = input.map_or_else(
        || "the API key and the output are good; the file at Gemini was not looked at".to_owned(),
        |input| {
            format!("{} requests of {} bytes, the API key and the output are good", input.count, input.bytes)
        },
    );
    let message = format!("{what}. Set spec.dryRun to false to submit the job");
    let reason = Reason::DryRunSucceeded;
    for type_ in [STALLED, RECONCILING, SUSPENDED] {
        conditions::clear(&mut s.conditions, type_, reason, generation, now);
    }
    conditions::set(&mut s.conditions, VALIDATED, true, reason, &message, generation, now);
    conditions::set(&mut s.conditions, READY, false, reason, &message, generation, now);
    refresh(s, generation);
}

fn attempt_ended(
    s: &mut GeminiBatchJobStatus,
    spec: &GeminiBatchJobSpec,
    end: &End,
    generation: i64,
    now: Timestamp,
) {
    put_results(s, &end.results);
    let counts = end.results.requests.unwrap_or_default();
    let output_file = end.results.output.as_ref().and_then(|o| o.file_name.clone());
    if let Some(a) = current(s) {
        a.outcome = Some(Outcome {
            reason: end.reason.as_str().to_owned(),
            succeeded: counts.succeeded,
            failed: counts.failed,
            output_file,
        });
    }
    note_end(s, end);
    conditions::clear(&mut s.conditions, SUBMITTED, end.reason, generation, now);
    if end.reason == Reason::Suspended {
        s.start_time = None;
    }
    if spec.suspend {
        return suspended(s, generation, now);
    }
    s.state = State::Pending;
    progress(s, spec, Reason::Retrying, &end.message, generation, now);
}

/// What is recorded of a batch that somebody else created.
fn imported(batch: &Batch, fingerprint: &str, now: Timestamp) -> Attempt {
    Attempt {
        number: 1,
        send_id: "imported".to_owned(),
        display_name: conditions::cut(&batch.display_name, 512).to_owned(),
        input_file: batch.input_file.clone().filter(|f| f.len() <= 128).unwrap_or_default(),
        input_sha256: None,
        request_count: None,
        credential_fingerprint: fingerprint.to_owned(),
        intent_time: MicroTime(batch.create_time.unwrap_or(now)),
        refusal: None,
        refusals: None,
        resends: None,
        fence_time: None,
        polled: false,
        batch_name: Some(batch.name.to_string()),
        create_time: batch.create_time.map(Time),
        end_time: None,
        remote_state: Some(batch.state.as_str().to_owned()),
        cancellation: None,
        outcome: None,
        observed_hint: None,
    }
}

fn running(
    s: &mut GeminiBatchJobStatus,
    spec: &GeminiBatchJobSpec,
    early: Option<&str>,
    generation: i64,
    now: Timestamp,
) {
    s.state = State::Running;
    let (name, polled) =
        current(s).map(|a| (a.batch_name.clone().unwrap_or_default(), a.polled)).unwrap_or_default();
    let mut message = match early {
        None if polled => {
            format!("{name} is at Gemini, which refuses a webhook for it; its end is found by polling")
        }
        // True whether callbacks are on or off, now or when it was sent: a change of that flag writes to no job.
        None => format!("{name} is at Gemini; its end is noticed with or without a callback"),
        Some(event) => format!(
            "a callback said {event}, but Gemini says that {name} has not ended; it is asked again shortly"
        ),
    };
    if spec.suspend {
        message.push_str(". It may finish, as spec.suspendPolicy says; nothing is started after it");
    }
    progress(s, spec, Reason::Submitted, &message, generation, now);
}

fn waiting(
    s: &mut GeminiBatchJobStatus,
    spec: &GeminiBatchJobSpec,
    problem: &Problem,
    stalled: bool,
    generation: i64,
    now: Timestamp,
) {
    let submitted = current(s).is_some_and(|a| a.batch_name.is_some() && a.outcome.is_none());
    s.state = match problem.reason {
        _ if submitted => State::Running,
        Reason::WaitingForQuota
        | Reason::WaitingForSlot
        | Reason::SubmissionsPaused
        | Reason::CrdOutdated => State::Queued,
        _ => State::Pending,
    };
    progress(s, spec, problem.reason, &problem.message, generation, now);
    if spec.dry_run {
        s.dry_run = None;
        conditions::set(
            &mut s.conditions,
            VALIDATED,
            false,
            problem.reason,
            &problem.message,
            generation,
            now,
        );
    }
    if stalled {
        stall(s, problem, generation, now);
    }
}

fn stall(s: &mut GeminiBatchJobStatus, problem: &Problem, generation: i64, now: Timestamp) {
    conditions::set(&mut s.conditions, READY, false, problem.reason, &problem.message, generation, now);
    // Not both: kstatus reports whichever of the two stands first.
    conditions::clear(&mut s.conditions, RECONCILING, problem.reason, generation, now);
    conditions::set(&mut s.conditions, STALLED, true, problem.reason, &problem.message, generation, now);
}

fn finished(s: &mut GeminiBatchJobStatus, end: &End, generation: i64, now: Timestamp) {
    s.state = end.state;
    s.completion_time = Some(Time(now));
    put_results(s, &end.results);
    note_end(s, end);
    let complete = end.state == State::Succeeded;
    let outcome = if complete { COMPLETE } else { FAILED };
    let (reason, message) = (end.reason, end.message.as_str());
    for type_ in [outcome, FINISHED] {
        conditions::set(&mut s.conditions, type_, true, reason, message, generation, now);
    }
    conditions::set(&mut s.conditions, READY, complete, reason, message, generation, now);
    conditions::set(&mut s.conditions, RECONCILING, false, reason, "", generation, now);
    conditions::clear(&mut s.conditions, SUSPENDED, reason, generation, now);
    if complete {
        conditions::clear(&mut s.conditions, STALLED, reason, generation, now);
    } else {
        // For kstatus a failure that will not mend itself is a stalled object.
        conditions::set(&mut s.conditions, STALLED, true, reason, message, generation, now);
    }
    refresh(s, generation);
}

/// What the last attempt says of its batch.
fn note_end(s: &mut GeminiBatchJobStatus, end: &End) {
    if let Some(a) = current(s) {
        a.remote_state = end.remote_state.clone().or(a.remote_state.take());
        a.end_time = end.end_time.map(Time).or(a.end_time.take());
        a.refusal = end.refusal.clone().or(a.refusal.take());
        a.observed_hint = end.hint.clone().or(a.observed_hint.take());
    }
}

fn put_results(s: &mut GeminiBatchJobStatus, results: &Results) {
    // Destructured, so that a new field is not forgotten.
    let Results { requests, usage, output } = results;
    s.requests = requests.or(s.requests);
    s.usage = usage.or(s.usage);
    let before = s.output.take();
    s.output = match output.clone() {
        // What was stored stays there, wherever later results go.
        Some(new) => {
            let OutputStatus { config_map, object_store, .. } = before.unwrap_or_default();
            Some(OutputStatus {
                config_map: new.config_map.or(config_map),
                object_store: new.object_store.or(object_store),
                ..new
            })
        }
        None => before,
    };
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
        Change::Imported { batch, .. } => {
            Some((Reason::Submitted, format!("{} imported: it is watched from now on", batch.name), true))
        }
        Change::Validated { .. } => {
            let message = "it could be submitted; spec.dryRun holds it".to_owned();
            Some((Reason::DryRunSucceeded, message, true))
        }
        Change::Suspended => {
            Some((Reason::Suspended, "held by spec.suspend; nothing runs at Gemini".to_owned(), true))
        }
        Change::Cancelling { reason } => {
            Some((Reason::Cancelling, format!("the batch is being cancelled ({reason})"), true))
        }
        Change::AttemptEnded(end) => Some((end.reason, end.message.clone(), end.reason == Reason::Suspended)),
        Change::Adopted { batch, .. } => {
            let message = format!("{} was found at Gemini, so nothing was submitted", batch.name);
            Some((Reason::Submitted, message, true))
        }
        Change::Finished(end) => Some((end.reason, end.message.clone(), end.state == State::Succeeded)),
        Change::Waiting { problem, stalled: true, .. } | Change::Contradicted { problem, .. } => {
            Some((problem.reason, problem.message.clone(), false))
        }
        Change::Planned { requests, shards } => {
            let message = format!("{requests} requests are split into {} shards", shards.total);
            Some((Reason::Submitting, message, true))
        }
        // Of what stands in a child's way that child tells.
        Change::Sharded(seen) if seen.stalled && seen.own => {
            Some((seen.problem.reason, seen.problem.message.clone(), false))
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
