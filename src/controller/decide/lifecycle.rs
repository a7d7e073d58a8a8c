//! What users may ask of a job besides running: to be held, to be over by some time, to be tried again, to take over
//! somebody else's batch, to delete itself. Pure: no client required.

use jiff::{SignedDuration, Timestamp};

use super::submission::{adopt, intend, ready, ready_to_send};
use super::{
    Action, Change, Decision, Observed, Wake, current_attempt, has_finalizer, record, stage_of, stalled,
    waiting,
};
use crate::api::{Attempt, DeletionPolicy, GeminiBatchJob, Reason, SuspendPolicy};
use crate::controller::memory::{Remote, Stage, after};
use crate::controller::{Problem, ending};
use crate::gemini::BatchName;

/// As many attempts as the schema has room for.
const MAX_ATTEMPTS: i32 = 10;

/// What the job itself says against a new submission. Asked wherever nothing of it is at Gemini.
pub(super) fn held_back(o: &Observed<'_>, now: Timestamp) -> Option<Decision> {
    if let Some(seconds) = o.job.spec.active_deadline_seconds
        && deadline(o.job).is_some_and(|t| t <= now)
    {
        return Some(record(Change::Finished(Box::new(ending::deadline_exceeded(o.job, seconds)))));
    }
    o.job
        .spec
        .suspend
        .then(|| Decision::Wait { say: Some(Box::new(Change::Suspended)), wake: Wake::OnChange })
}

/// What needs no call to Gemini is not held up by one that fails.
pub(super) fn despite_trouble(o: &Observed<'_>, now: Timestamp) -> Option<Decision> {
    let Some(a) = current_attempt(o.job) else { return held_back(o, now) };
    if a.outcome.is_some() || a.refusal.is_some() {
        return held_back(o, now);
    }
    if a.batch_name.is_some() {
        return to_be_cancelled(o, a, now).map(|reason| record(Change::Cancelling { reason }));
    }
    match stage_of(a, o.memory) {
        Some(Stage::NotUploaded | Stage::Unsent | Stage::Uploaded { .. }) => held_back(o, now),
        _ => None,
    }
}

/// Why the running batch is to be cancelled, if that is not recorded yet.
fn to_be_cancelled(o: &Observed<'_>, a: &Attempt, now: Timestamp) -> Option<Reason> {
    let late = deadline(o.job).is_some_and(|t| t <= now);
    let suspended = o.job.spec.suspend && o.job.spec.suspend_policy == SuspendPolicy::Cancel;
    match (a.cancellation.is_some(), late, suspended) {
        (true, ..) | (false, false, false) => None,
        (false, true, _) => Some(Reason::DeadlineExceeded),
        (false, false, true) => Some(Reason::Suspended),
    }
}

/// When the job's time is over; `None` without a deadline, and while it has not started.
pub(super) fn deadline(job: &GeminiBatchJob) -> Option<Timestamp> {
    let seconds = job.spec.active_deadline_seconds?;
    let start = job.status.as_ref()?.start_time.as_ref()?.0;
    Some(after(start, SignedDuration::from_secs(seconds)))
}

/// Whoever waits is woken by the deadline at the latest.
pub(super) fn not_beyond_the_deadline(o: &Observed<'_>, decision: Decision, now: Timestamp) -> Decision {
    let Decision::Wait { say, wake } = decision else { return decision };
    let wake = match (deadline(o.job).filter(|t| *t > now), wake) {
        (Some(deadline), Wake::At(time)) => Wake::At(time.min(deadline)),
        (Some(deadline), Wake::Recheck) if deadline < after(now, o.timings.recheck) => Wake::At(deadline),
        (Some(deadline), Wake::OnChange) => Wake::At(deadline),
        (_, wake) => wake,
    };
    Decision::Wait { say, wake }
}

/// The last attempt is over, and the job is not: a further one carries what has no result yet.
pub(super) fn next_attempt(o: &Observed<'_>, a: &Attempt, now: Timestamp) -> Decision {
    if let Some(adopted) = adopt(o, Some(a), now) {
        return adopted;
    }
    if let Some(decision) = held_back(o, now) {
        return decision;
    }
    let stop = |reason| record(Change::Finished(Box::new(ending::no_further_attempt(o.job, a, reason))));
    if a.number >= MAX_ATTEMPTS {
        return stop(Reason::AttemptsExhausted);
    }
    let counted = a.outcome.as_ref().is_some_and(|o| o.output_file.is_some());
    let answered = counted || a.outcome.as_ref().is_some_and(|o| o.succeeded + o.failed > 0);
    // It may have been lowered since.
    if let Some(end) = ending::limit_reached(o.job, a) {
        return record(Change::Finished(Box::new(end)));
    }
    if !o.job.spec.has_own_input() && answered {
        return stop(Reason::InputUnknown);
    }
    let first = o.job.status.iter().flat_map(|s| &s.attempts).find(|first| first.number == 1);
    if let (Some(Ok(input)), Some(first)) = (&o.input, first)
        && first.input_sha256.as_ref() != Some(&input.whole_sha256)
    {
        return stop(Reason::InputChanged);
    }
    if matches!(&o.input, Some(Err(problem)) if problem.reason == Reason::InputDiffers) {
        return stop(Reason::InputChanged);
    }
    if matches!(&o.input, Some(Ok(input)) if input.count == 0) {
        return record(Change::Finished(Box::new(ending::nothing_missing(o.job))));
    }
    match ready_to_send(o, now) {
        Ok((fingerprint, input)) => intend(o, Some(a), false, fingerprint, input, now),
        Err(decision) => *decision,
    }
}

/// Takes over a batch that somebody else created: it is recorded as soon as Gemini shows it.
pub(super) fn importing(o: &Observed<'_>, name: &str, now: Timestamp) -> Decision {
    let Ok(name) = BatchName::parse(name) else {
        return stalled(&Problem::new(
            Reason::BatchNotFound,
            "spec.importFrom.batchName is not the name of a Gemini batch, like batches/abc123def456",
        ));
    };
    if let Err(decision) = ready(o, now) {
        return *decision;
    }
    let Ok(fingerprint) = &o.credential else { return Decision::Wait { say: None, wake: Wake::At(now) } };
    match &o.memory.remote {
        // Recorded with the key that sees it: another one proves nothing later.
        Some(Remote::Seen(batch))
            if batch.name == name && o.memory.remote_key.as_ref() == Some(fingerprint) =>
        {
            record(Change::Imported { batch: batch.clone(), fingerprint: fingerprint.clone() })
        }
        Some(Remote::Missing(absent))
            if absent.fingerprint == *fingerprint
                && absent.tries.next > now
                && o.memory.remote_name.as_ref() == Some(&name) =>
        {
            stalled(&ending::nothing_to_import(&name))
        }
        _ => {
            let allowed = o.memory.looks.allowed(now, o.timings.look_window);
            if allowed <= now {
                Decision::Act(Action::GetBatch { batch: name })
            } else {
                Decision::Wait { say: None, wake: Wake::At(allowed) }
            }
        }
    }
}

/// Whether the running batch is to be cancelled, and what to do about it; `None`: it may go on.
pub(super) fn cancelling(
    o: &Observed<'_>,
    a: &Attempt,
    name: &BatchName,
    now: Timestamp,
) -> Option<Decision> {
    let Some(reason) = ending::cancelled_for(a) else {
        return to_be_cancelled(o, a, now).map(|reason| record(Change::Cancelling { reason }));
    };
    let cleanup = &o.memory.cleanup;
    let problem = match &o.credential {
        Err(problem) => return Some(stalled(problem)),
        Ok(fingerprint) if let Some(refused) = cleanup.refused(fingerprint) => refused.clone(),
        Ok(fingerprint)
            if *fingerprint != a.credential_fingerprint
                && !cleanup.is_another_key(fingerprint)
                && (cleanup.failed.is_some() || matches!(o.memory.remote, Some(Remote::Missing(_)))) =>
        {
            ending::credentials_changed("the batch can't be cancelled with it")
        }
        Ok(_) => ending::cancelling(name, reason),
    };
    // Nothing goes on before somebody does something about the key.
    let untried = o.credential.as_ref().is_ok_and(|fingerprint| cleanup.is_another_key(fingerprint));
    let changed = matches!(problem.reason, Reason::CredentialsChanged | Reason::CredentialsRefused);
    let wait = |next| {
        let say = Some(Box::new(waiting(&problem, changed)));
        let wake =
            if changed && next > after(now, o.timings.recheck) { Wake::Recheck } else { Wake::At(next) };
        Some(Decision::Wait { say, wake })
    };
    if !cleanup.cancelled {
        return match cleanup.failed {
            Some(tries) if tries.next > now && !untried => wait(tries.next),
            _ => Some(Decision::Act(Action::CancelBatch { batch: name.clone() })),
        };
    }
    // No callback tells of a cancellation.
    match cleanup.watched {
        Some(tries) if tries.next > now => wait(tries.next),
        _ => Some(Decision::Act(Action::GetBatch { batch: name.clone() })),
    }
}

/// A finished job at rest: it may have to go by itself.
pub(super) fn at_rest(o: &Observed<'_>, now: Timestamp) -> Decision {
    let finished = o.job.status.as_ref().and_then(|s| s.completion_time.as_ref());
    let (Some(ttl), Some(finished)) = (o.job.spec.ttl_seconds_after_finished, finished) else {
        return if has_finalizer(o.job) {
            Decision::Wait { say: None, wake: Wake::OnChange }
        } else {
            Decision::Done
        };
    };
    if o.memory.cleanup.job_deleted {
        return Decision::Done;
    }
    // Results that are nowhere else are not forgotten.
    let output = o.job.status.as_ref().and_then(|s| s.output.as_ref());
    if output.is_some_and(|o| o.file_name.is_some() && o.config_map.is_none() && o.object_store.is_none()) {
        return Decision::Wait { say: None, wake: Wake::OnChange };
    }
    let over = after(finished.0, SignedDuration::from_secs(ttl));
    if over > now {
        return Decision::Wait { say: None, wake: Wake::At(over) };
    }
    Decision::Act(Action::DeleteJob)
}

/// Batches that `deletionPolicy: Delete` wants gone, oldest first, with their files.
pub(super) fn batch_to_delete(o: &Observed<'_>) -> Option<BatchName> {
    if o.job.spec.deletion_policy() != DeletionPolicy::Delete {
        return None;
    }
    let attempts = o.job.status.iter().flat_map(|s| &s.attempts);
    let gone = &o.memory.cleanup.batches_deleted;
    attempts
        .filter_map(|a| a.batch_name.as_ref())
        .find(|name| !gone.contains(*name))
        .and_then(|name| BatchName::parse(name).ok())
}
