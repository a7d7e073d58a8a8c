//! What is left to do after the end, and before a deleted job may go. Pure: no client required.

use jiff::{SignedDuration, Timestamp};

use super::{
    Action, Change, Decision, Observed, Wake, contradicted, current_attempt, has_finalizer, is_finished,
    lifecycle, record, sharded, stage_of, waiting,
};
use crate::api::{Attempt, Callback, DeletionPolicy, GeminiBatchJob, Reason};
use crate::controller::destination::Destination;
use crate::controller::memory::{Cleanup, Remote, Stage, after};
use crate::controller::{Problem, ending};
use crate::gemini::{Batch, BatchName};

pub(super) fn after_the_end(o: &Observed<'_>, now: Timestamp) -> Decision {
    if o.job.status.as_ref().and_then(|s| s.observed_generation) != o.job.metadata.generation {
        return record(Change::Refresh);
    }
    if let Some((a, callback)) = contradicted(o.job) {
        return contradiction(o, a, callback, now);
    }
    if has_finalizer(o.job) {
        return leftovers(o, now);
    }
    // Asked for after the end: from now on the deletion of the job has something to do.
    if lifecycle::batch_to_delete(o).is_some() && !o.memory.cleanup.job_deleted {
        return record(Change::AddFinalizer);
    }
    lifecycle::at_rest(o, now)
}

/// The end does not change any more, but somebody may want to know: Gemini is asked once, and it is said.
fn contradiction(o: &Observed<'_>, a: &Attempt, callback: &Callback, now: Timestamp) -> Decision {
    let hint = callback.hint();
    let asked = o.memory.looks.following.as_ref().is_some_and(|(followed, _)| *followed == hint);
    let name = a.batch_name.as_deref().and_then(|name| BatchName::parse(name).ok());
    if let Some(batch) = name.filter(|_| !asked && o.credential.is_ok()) {
        let allowed = o.memory.looks.allowed(now, o.timings.look_window);
        return if allowed <= now {
            Decision::Act(Action::GetBatch { batch })
        } else {
            Decision::Wait { say: None, wake: Wake::At(allowed) }
        };
    }
    let seen = match &o.memory.remote {
        Some(Remote::Seen(batch)) if asked => Some(&**batch),
        _ => None,
    };
    record(Change::Contradicted { hint, problem: ending::contradicted(a, &callback.type_, seen) })
}

/// What a finished job left behind. None of it holds the job for long, and nothing is said: the status of
/// a finished job does not change any more. A file that can't be deleted expires by itself.
fn leftovers(o: &Observed<'_>, now: Timestamp) -> Decision {
    if let Some(decision) = sharded::leftovers(o, now) {
        return decision;
    }
    // A job that Gemini refused for good gives its reservation back here: the refusal is recorded first.
    let empty = |at: &Destination| !output_filled(o.job, at) && !o.memory.cleanup.output_released;
    if let Some(name) = Destination::of(o.job).filter(empty) {
        return Decision::Act(Action::ReleaseOutput { name });
    }
    if let Some(decision) = current_attempt(o.job).and_then(|a| drop_input_file(o, a, now)) {
        return decision;
    }
    let Some(batch) = lifecycle::batch_to_delete(o) else {
        return record(Change::DropFinalizer { event: None });
    };
    let Some(since) = o.job.metadata.deletion_timestamp.as_ref().map(|t| t.0) else {
        return lifecycle::at_rest(o, now);
    };
    let deadline = deletion_deadline(o.job, since);
    match (&o.credential, o.memory.cleanup.failed) {
        // Nothing runs any more, so nothing is held for it for long.
        _ if deadline <= now && o.memory.cleanup.failed.is_some() => {
            record(Change::DropFinalizer { event: Some(ending::not_deleted(&batch)) })
        }
        (Err(_), _) => record(Change::DropFinalizer { event: Some(ending::not_deleted(&batch)) }),
        (Ok(_), Some(tries)) if tries.next > now => {
            Decision::Wait { say: None, wake: Wake::At(tries.next.min(deadline)) }
        }
        (Ok(_), _) => Decision::Act(Action::DeleteBatch { batch }),
    }
}

/// The next step towards an input file that is gone; `None` when it is, or never will be.
pub(super) fn drop_input_file(o: &Observed<'_>, a: &Attempt, now: Timestamp) -> Option<Decision> {
    let file = own_input_file(o, a).filter(|_| o.credential.is_ok() && a.outcome.is_none());
    let action = file.filter(|_| !gave_up(&o.memory.cleanup))?;
    Some(match &o.memory.cleanup.failed {
        Some(tries) if tries.next > now => Decision::Wait { say: None, wake: Wake::At(tries.next) },
        _ => Decision::Act(action),
    })
}

/// Whether results are there.
pub(super) fn output_filled(job: &GeminiBatchJob, at: &Destination) -> bool {
    job.status.as_ref().and_then(|s| s.output.as_ref()).is_some_and(|output| at.is_in(output))
}

/// When a deletion does not wait any longer.
pub(super) fn deletion_deadline(job: &GeminiBatchJob, since: Timestamp) -> Timestamp {
    after(since, SignedDuration::from_secs(job.spec.deletion_timeout_seconds))
}

/// The job is being deleted: nothing of it may go on at Gemini, and it must not be held for ever.
pub(super) fn deleting(o: &Observed<'_>, now: Timestamp) -> Decision {
    if !has_finalizer(o.job) {
        return Decision::Done;
    }
    if is_finished(o.job) {
        return leftovers(o, now);
    }
    if let Some(decision) = sharded::deleting(o, now) {
        return decision;
    }
    let since = o.job.metadata.deletion_timestamp.as_ref().map_or(now, |t| t.0);
    let deadline = deletion_deadline(o.job, since);
    let cleanup = &o.memory.cleanup;
    if o.job.spec.deletion_policy() == DeletionPolicy::Orphan {
        return leave_alone(o);
    }

    if let Some((a, action)) = current_attempt(o.job).and_then(|a| Some((a, stop_batch(o, a)?))) {
        // However late it is, each step is tried once: the operator may have been away until now, and a batch
        // that nobody cancels is paid for.
        let untried = o.credential.is_ok() && cleanup.failed.is_none();
        // Nobody can put the key back: a Secret can't be created in a namespace that is being deleted.
        let in_vain = o.credential.is_err() && o.memory.namespace.is_some_and(|n| n.terminating);
        if (now < deadline || untried) && !in_vain {
            return clean_up(o, a, action, deadline, now);
        }
        // A file that is left expires by itself, unless it is the fence.
        if let Action::DeleteBatch { batch } = &action {
            return record(Change::DropFinalizer { event: Some(ending::not_deleted(batch)) });
        }
        if is_unsure(o, a) || !matches!(action, Action::DeleteInputFile { .. }) {
            let gone = in_vain.then(ending::key_gone_with_namespace);
            let event = ending::orphaned(a, gone.as_ref().or(o.credential.as_ref().err()));
            return record(Change::DropFinalizer { event: Some(event) });
        }
    }
    if let Some(name) = Destination::of(o.job).filter(|_| !cleanup.output_released) {
        return Decision::Act(Action::ReleaseOutput { name });
    }
    let over = current_attempt(o.job).is_some_and(|a| a.outcome.is_some());
    let event = match ended_batch(o).filter(|_| !over) {
        Some(batch) => Some(ending::deleted_after_end(batch)),
        None if !cleanup.cancelled => {
            current_attempt(o.job).filter(|a| is_unsure(o, a)).map(ending::deleted_unconfirmed)
        }
        None => cleanup.cancelled.then(|| {
            Problem::new(Reason::Cancelled, "the batch was cancelled because the job is being deleted")
        }),
    };
    record(Change::DropFinalizer { event })
}

/// The job goes, and whatever it has at Gemini stays.
fn leave_alone(o: &Observed<'_>) -> Decision {
    if let Some(name) = Destination::of(o.job).filter(|_| !o.memory.cleanup.output_released) {
        return Decision::Act(Action::ReleaseOutput { name });
    }
    let live = current_attempt(o.job).filter(|a| a.outcome.is_none());
    let live = live.filter(|a| known_batch(o, a).is_some() || is_unsure(o, a));
    record(Change::DropFinalizer { event: live.map(ending::left_alone) })
}

/// The batch, if the last GET said that it is over: then there is nothing to cancel.
fn ended_batch<'a>(o: &'a Observed<'_>) -> Option<&'a Batch> {
    match &o.memory.remote {
        Some(Remote::Seen(batch)) if batch.is_terminal() => Some(batch),
        _ => None,
    }
}

/// Takes one step of the clean-up, or says what stands in its way.
fn clean_up(o: &Observed<'_>, a: &Attempt, action: Action, deadline: Timestamp, now: Timestamp) -> Decision {
    let soon = if after(now, o.timings.recheck) >= deadline { Wake::At(deadline) } else { Wake::Recheck };
    match (&o.credential, &o.memory.cleanup.failed) {
        (Err(_), _) if o.memory.namespace.is_none_or(|n| n.next <= now) => {
            Decision::Act(Action::AskNamespace)
        }
        (Err(problem), _) => {
            let problem = ending::deleted_without_key(a, problem, deadline);
            Decision::Wait { say: Some(Box::new(waiting(&problem, true))), wake: soon }
        }
        (Ok(fingerprint), Some(tries))
            if tries.next > now && !o.memory.cleanup.is_another_key(fingerprint) =>
        {
            // The first failure is not worth a write, unless somebody has to do something about it.
            let say = if let Some(refused) = o.memory.cleanup.refused(fingerprint) {
                Some(waiting(refused, true))
            } else if *fingerprint == a.credential_fingerprint {
                (tries.count >= 2).then(|| waiting(&ending::not_cleaned_up(deadline), false))
            } else {
                Some(waiting(&ending::credentials_changed("the batch can't be cancelled with it"), true))
            };
            Decision::Wait { say: say.map(Box::new), wake: Wake::At(tries.next.min(deadline)) }
        }
        _ => Decision::Act(action),
    }
}

/// The next step until nothing of the attempt can go on at Gemini; `None` when nothing can.
fn stop_batch(o: &Observed<'_>, a: &Attempt) -> Option<Action> {
    let cleanup = &o.memory.cleanup;
    if let Some(batch) = cleanup.to_cancel.first() {
        return Some(Action::CancelBatch { batch: batch.clone() });
    }
    if a.outcome.is_some() {
        return lifecycle::batch_to_delete(o).map(|batch| Action::DeleteBatch { batch });
    }
    if let Some(batch) = known_batch(o, a).filter(|_| !cleanup.cancelled && ended_batch(o).is_none()) {
        return Some(Action::CancelBatch { batch });
    }
    // Of a send with unknown outcome: list and cancel; then delete the input file, so that a create that
    // is still travelling must fail; then list and cancel once more.
    let unsure = is_unsure(o, a);
    if unsure && cleanup.listings == 0 {
        return Some(Action::FindToCancel { attempt: Box::new(a.clone()) });
    }
    // Without the fence the job must not go before its deadline; otherwise the file expires by itself.
    if let Some(action) = own_input_file(o, a).filter(|_| unsure || !gave_up(cleanup)) {
        return Some(action);
    }
    if unsure && cleanup.listings < 2 {
        return Some(Action::FindToCancel { attempt: Box::new(a.clone()) });
    }
    lifecycle::batch_to_delete(o).map(|batch| Action::DeleteBatch { batch })
}

/// The batch of the attempt, as far as it is known.
fn known_batch(o: &Observed<'_>, a: &Attempt) -> Option<BatchName> {
    match (&a.batch_name, stage_of(a, o.memory)) {
        (Some(name), _) => BatchName::parse(name).ok(),
        (None, Some(Stage::Created(batch) | Stage::Found(batch))) => Some(batch.name.clone()),
        (None, _) => None,
    }
}

/// Whether the attempt may have a batch that is not known.
fn is_unsure(o: &Observed<'_>, a: &Attempt) -> bool {
    known_batch(o, a).is_none()
        && a.refusal.is_none()
        && matches!(stage_of(a, o.memory), Some(Stage::Unsure(_)) | None)
}

/// The deletion of the input file, if the operator uploaded it and it is not deleted yet.
fn own_input_file(o: &Observed<'_>, a: &Attempt) -> Option<Action> {
    (o.job.spec.has_own_input() && !o.memory.cleanup.input_deleted)
        .then(|| Action::DeleteInputFile { file: a.input_file.clone() })
}

/// The input file could not be deleted in several tries: Gemini deletes it by itself after 48 hours.
fn gave_up(cleanup: &Cleanup) -> bool {
    cleanup.failed.is_some_and(|tries| tries.count >= 5)
}
