//! From nothing to a batch that is known: what a send needs, its intent, its refusals, and the search for a batch whose
//! creation had an unknown outcome. Pure: no client required.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

use super::{
    Action, Change, Decision, Gate, Observed, Wake, generation_of, hinted_batch, lifecycle, number_after,
    record, sharded, stage_of, stalled, waiting,
};
use crate::api::{Attempt, GeminiBatchJob, RESEND_ANNOTATION, Reason, Refusal, RefusedCall};
use crate::controller::destination::Destination;
use crate::controller::memory::{OutputObject, Search, Stage, after};
use crate::controller::{InputFacts, Timings, ending, identity};
use crate::gemini::{Batch, BatchState};

pub(super) fn before_submission(o: &Observed<'_>, now: Timestamp) -> Decision {
    if let Some(adopted) = adopt(o, None, now) {
        return adopted;
    }
    if let Some(decision) = lifecycle::held_back(o, now) {
        return decision;
    }
    if let Some(import) = &o.job.spec.import_from {
        return lifecycle::importing(o, &import.batch_name, now);
    }
    if o.job.spec.dry_run {
        return dry_run(o, now).unwrap_or_else(|decision| *decision);
    }
    if o.job.spec.sharding.is_some() {
        return match ready(o, now) {
            Ok((_, input)) => sharded::plan(o, input, now),
            Err(decision) => *decision,
        };
    }
    match ready_to_send(o, now) {
        Ok((fingerprint, input)) => intend(o, None, false, fingerprint, input, now),
        Err(decision) => *decision,
    }
}

/// All that a submission needs, but its turn; and a key that Gemini takes.
fn dry_run(o: &Observed<'_>, now: Timestamp) -> Result<Decision, Box<Decision>> {
    let (fingerprint, input) = ready(o, now)?;
    if matches!(o.gate, Gate::Closed { problem, .. } if problem.reason == Reason::CredentialsNotFound) {
        gate(o)?;
    }
    match &o.memory.probe {
        Some(probe) if probe.fingerprint == fingerprint && probe.accepted => {}
        Some(probe) if probe.fingerprint == fingerprint && probe.next > now => {
            let say = Some(Box::new(waiting(&ending::key_refused(), true)));
            return Ok(Decision::Wait { say, wake: Wake::At(probe.next) });
        }
        _ => return Ok(Decision::Act(Action::ProbeCredential)),
    }
    let say = Some(Box::new(Change::Validated { input: input.cloned() }));
    Ok(Decision::Wait { say, wake: Wake::OnChange })
}

/// Everything that a send needs: a key, an input, a place for the results, and its turn.
pub(super) fn ready_to_send<'a>(
    o: &'a Observed<'_>,
    now: Timestamp,
) -> Result<(&'a str, Option<&'a InputFacts>), Box<Decision>> {
    let ready = ready(o, now)?;
    gate(o)?;
    Ok(ready)
}

/// A key, an input (unless it is not the operator's), a place for the results.
pub(super) fn ready<'a>(
    o: &'a Observed<'_>,
    now: Timestamp,
) -> Result<(&'a str, Option<&'a InputFacts>), Box<Decision>> {
    let fingerprint = o.credential.as_ref().map_err(|p| Box::new(stalled(p)))?.as_str();
    let input = match (&o.input, o.job.spec.has_own_input()) {
        (_, false) => None,
        (Some(Ok(input)), true) => Some(input),
        // What earlier attempts left can't be read for now: nobody has to change anything.
        (Some(Err(problem)), true)
            if matches!(problem.reason, Reason::GeminiUnavailable | Reason::StoreUnavailable) =>
        {
            let say = Some(Box::new(waiting(problem, false)));
            return Err(Box::new(Decision::Wait { say, wake: Wake::Recheck }));
        }
        (Some(Err(problem)), true) => return Err(Box::new(stalled(problem))),
        // The driver reads the input whenever `needs_input` says so.
        (None, true) => return Err(Box::new(Decision::Wait { say: None, wake: Wake::At(now) })),
    };
    let Some(name) = Destination::of(o.job) else { return Ok((fingerprint, input)) };
    match &o.memory.output {
        OutputObject::Reserved { name: ours } | OutputObject::Stored { name: ours, .. } if *ours == name => {
            Ok((fingerprint, input))
        }
        OutputObject::Blocked { problem, generation, retry }
            if generation_of(o.job) == *generation && retry.is_none_or(|t| t > now) =>
        {
            Err(Box::new(Decision::Wait {
                say: Some(Box::new(waiting(problem, true))),
                wake: retry.map_or(Wake::OnChange, Wake::At),
            }))
        }
        _ => Err(Box::new(Decision::Act(reserve(o, &name)))),
    }
}

/// Asked last, so that only a job that is ready in every other way takes a turn.
fn gate(o: &Observed<'_>) -> Result<(), Box<Decision>> {
    match o.gate {
        Gate::Open => Ok(()),
        Gate::Closed { problem, wake } => {
            // A key that may not be used is the user's to replace as well.
            let stalled = problem.reason == Reason::CredentialsNotFound;
            Err(Box::new(Decision::Wait { say: Some(Box::new(waiting(problem, stalled))), wake: *wake }))
        }
    }
}

/// The attempt that is about to begin has a batch already, though the job does not know it: etcd was restored from a
/// backup. It is taken as it is, whatever else stands in the way of a new one. `before`: the refused attempt that
/// would be sent again.
pub(super) fn adopt(o: &Observed<'_>, before: Option<&Attempt>, now: Timestamp) -> Option<Decision> {
    let number = number_after(before);
    let fingerprint = o.credential.as_ref().ok()?;
    let of_attempt = o.memory.found.iter().filter(|(n, _)| *n == number).map(|(_, batch)| batch);
    let batch = best(of_attempt)?;
    let send = identity::identity_of(o.cluster, &batch.display_name)?.send;
    let uid = o.job.metadata.uid.as_deref().unwrap_or_default();
    // What was sent is not known any more. The input that is there now is the best guess: results are joined by
    // key, and keys that do not fit are reported.
    let input = o.input.as_ref().and_then(|input| input.as_ref().ok());
    let input_file =
        batch.input_file.clone().unwrap_or_else(|| identity::input_file(o.cluster, uid, number, &send));
    let attempt = Attempt {
        input_file,
        intent_time: MicroTime(batch.create_time.unwrap_or(now)),
        ..attempt(o, before, number, &send, fingerprint, input, now)
    };
    Some(record(Change::Adopted { attempt: Box::new(attempt), batch: Box::new(batch.clone()) }))
}

/// The batch to keep of several for one attempt: the one that succeeded, else one that goes on, else the oldest.
fn best<'a>(batches: impl IntoIterator<Item = &'a Batch>) -> Option<&'a Batch> {
    batches.into_iter().min_by_key(|b| {
        let rank = match (b.state, b.is_terminal()) {
            (BatchState::Succeeded, _) => 0,
            (_, false) => 1,
            (_, true) => 2,
        };
        (rank, b.create_time.unwrap_or(Timestamp::MAX))
    })
}

/// An administrator's no also holds for a send that was intended when there was none, as long as it has not left. A turn
/// among the jobs of one key is another matter: it was taken with the intent.
fn still_allowed(o: &Observed<'_>) -> Result<(), Box<Decision>> {
    match o.gate {
        Gate::Closed { problem, .. }
            if matches!(
                problem.reason,
                Reason::SubmissionsPaused | Reason::CrdOutdated | Reason::CredentialsNotFound
            ) =>
        {
            gate(o)
        }
        _ => Ok(()),
    }
}

/// Makes sure of the output object, which is not reserved yet; one that is, under another name, is released first.
pub(super) fn reserve(o: &Observed<'_>, name: &Destination) -> Action {
    match &o.memory.output {
        OutputObject::Reserved { name: old } => Action::ReleaseOutput { name: old.clone() },
        _ => Action::ReserveOutput { name: name.clone() },
    }
}

/// Records the intent of the next send: the first one, the one after a refusal or an unsent one, or the first one of
/// a further attempt.
pub(super) fn intend(
    o: &Observed<'_>,
    before: Option<&Attempt>,
    resent: bool,
    fingerprint: &str,
    input: Option<&InputFacts>,
    now: Timestamp,
) -> Decision {
    let number = number_after(before);
    let uid = o.job.metadata.uid.as_deref().unwrap_or_default();
    let send = o.fresh_send_id;
    let input_file =
        match (o.job.spec.gemini_file(), before.filter(|a| reusable(o, a, fingerprint, input, now))) {
            (Some(file), _) => file.name.clone(),
            (None, Some(a)) => a.input_file.clone(),
            (None, None) => identity::input_file(o.cluster, uid, number, send),
        };
    let same = before.filter(|a| a.number == number);
    let resends = same.map(|a| a.resends.unwrap_or(0) + i32::from(resent)).filter(|n| *n > 0);
    let attempt = attempt(o, before, number, send, fingerprint, input, now);
    record(Change::Intent(Box::new(Attempt { input_file, resends, ..attempt })))
}

/// An attempt of which nothing is known yet but what it is made from.
fn attempt(
    o: &Observed<'_>,
    before: Option<&Attempt>,
    number: i32,
    send: &str,
    fingerprint: &str,
    input: Option<&InputFacts>,
    now: Timestamp,
) -> Attempt {
    let uid = o.job.metadata.uid.as_deref().unwrap_or_default();
    let same = before.filter(|a| a.number == number);
    Attempt {
        number,
        send_id: send.to_owned(),
        display_name: identity::display_name(o.cluster, uid, number, send),
        input_file: String::new(),
        input_sha256: input.map(|i| i.sha256.clone()),
        request_count: input.map(|i| i.count),
        credential_fingerprint: fingerprint.to_owned(),
        intent_time: MicroTime(now),
        refusal: None,
        refusals: same.and_then(|a| a.refusals),
        resends: same.and_then(|a| a.resends),
        fence_time: None,
        // Once is enough for a job: its further attempts would be refused as well.
        polled: o.webhook_refused
            || before.is_some_and(|a| a.polled || is_refused_for(a, Reason::WebhookRefused)),
        batch_name: None,
        create_time: None,
        end_time: None,
        remote_state: None,
        cancellation: None,
        outcome: None,
        // Of an attempt that is over nothing goes on, but its callbacks were acted on.
        observed_hint: before.and_then(|a| a.observed_hint.clone()),
    }
}

/// Whether the file of a refused send can serve the next one: same key, same content, still there.
fn reusable(
    o: &Observed<'_>,
    a: &Attempt,
    fingerprint: &str,
    input: Option<&InputFacts>,
    now: Timestamp,
) -> bool {
    a.refusal.as_ref().is_some_and(|r| r.call == RefusedCall::Create)
        && [
            Reason::WaitingForQuota,
            Reason::PreconditionFailed,
            Reason::CredentialsRefused,
            Reason::WebhookRefused,
        ]
        .into_iter()
        .any(|reason| is_refused_for(a, reason))
        && a.credential_fingerprint == fingerprint
        && a.input_sha256.as_deref() == input.map(|i| i.sha256.as_str())
        && after(a.intent_time.0, o.timings.reuse_file) > now
}

fn is_refused_for(a: &Attempt, reason: Reason) -> bool {
    a.refusal.as_ref().is_some_and(|r| r.reason == reason.as_str())
}

/// The last send was refused: nothing exists at Gemini, so a new send is safe once it has a chance.
pub(super) fn refused(o: &Observed<'_>, a: &Attempt, refusal: &Refusal, now: Timestamp) -> Decision {
    if let Some(decision) = lifecycle::held_back(o, now) {
        return decision;
    }
    let fingerprint = match &o.credential {
        Ok(fingerprint) => fingerprint,
        Err(problem) => return stalled(problem),
    };
    if let Some(adopted) = adopt(o, Some(a), now) {
        return adopted;
    }
    let problem = ending::refusal_problem(refusal);
    let is_stalled = ending::refusal_stalls(problem.reason);
    let another_key = *fingerprint != a.credential_fingerprint;
    if problem.reason == Reason::CredentialsRefused && !another_key {
        match &o.memory.probe {
            Some(probe) if probe.fingerprint == *fingerprint && probe.accepted => {}
            Some(probe) if probe.fingerprint == *fingerprint && probe.next > now => {
                return Decision::Wait {
                    say: Some(Box::new(waiting(&problem, true))),
                    wake: Wake::At(probe.next),
                };
            }
            None if refusal.retry_time.0 > now => {
                return Decision::Wait {
                    say: Some(Box::new(waiting(&problem, true))),
                    wake: Wake::At(refusal.retry_time.0),
                };
            }
            _ => return Decision::Act(Action::ProbeCredential),
        }
    } else if !another_key && refusal.retry_time.0 > now {
        return Decision::Wait {
            say: Some(Box::new(waiting(&problem, is_stalled))),
            wake: Wake::At(refusal.retry_time.0),
        };
    }
    resend(o, a, false, now)
}

/// The intent is recorded, the name of the batch is not.
pub(super) fn submitting(o: &Observed<'_>, a: &Attempt, now: Timestamp) -> Decision {
    let stage = stage_of(a, o.memory);
    match stage {
        // What Gemini answered is recorded whatever else is wrong.
        Some(Stage::Created(batch)) => {
            return record(Change::Submitted { batch: batch.clone(), adopted: false });
        }
        Some(Stage::Found(batch)) => {
            return record(Change::Submitted { batch: batch.clone(), adopted: true });
        }
        Some(Stage::Refused(refused)) if refused.is_final => {
            return record(Change::Finished(Box::new(ending::refused(o.job, a, refused))));
        }
        Some(Stage::Refused(refused)) => return record(Change::Refused(Box::new(refused.clone()))),
        // Nothing was asked for yet.
        Some(Stage::NotUploaded | Stage::Unsent | Stage::Uploaded { .. }) => {
            if let Some(decision) = lifecycle::held_back(o, now) {
                return decision;
            }
        }
        _ => {}
    }
    let fingerprint = match &o.credential {
        Ok(fingerprint) => fingerprint,
        Err(problem) => return stalled(problem),
    };
    let another_key = *fingerprint != a.credential_fingerprint;
    match stage {
        Some(Stage::NotUploaded) => match &o.input {
            // Nothing was sent: with another key or another input the send begins anew.
            _ if another_key => resend(o, a, false, now),
            Some(Ok(input)) if a.input_sha256.as_ref() != Some(&input.sha256) => resend(o, a, false, now),
            Some(Ok(_)) => match still_allowed(o) {
                Ok(()) => Decision::Act(Action::UploadInput { file: a.input_file.clone() }),
                Err(no) => *no,
            },
            Some(Err(problem)) => stalled(problem),
            None => Decision::Wait { say: None, wake: Wake::At(now) },
        },
        Some(Stage::Unsent) => resend(o, a, false, now),
        Some(Stage::Uploaded { .. }) if another_key => resend(o, a, false, now),
        Some(Stage::Uploaded { file }) if *file != a.input_file => {
            record(Change::InputFile { file: file.clone() })
        }
        Some(Stage::Uploaded { .. }) => match still_allowed(o) {
            Ok(()) => Decision::Act(Action::CreateBatch { attempt: Box::new(a.clone()) }),
            Err(no) => *no,
        },
        // A new process.
        None if !another_key && file_would_prove(o, a, now) => {
            Decision::Act(Action::FindInputFile { file: a.input_file.clone() })
        }
        Some(Stage::Unsure(search)) if search.file_unasked && !another_key && file_would_prove(o, a, now) => {
            Decision::Act(Action::FindInputFile { file: a.input_file.clone() })
        }
        Some(Stage::Unsure(search)) => searching(o, a, search, another_key, now),
        None => searching(o, a, &Search::default(), another_key, now),
        Some(Stage::Created(_) | Stage::Found(_) | Stage::Refused(_)) => Decision::Done, // returned above
    }
}

/// After a restart: whether an input file that is not there is proof that the batch was not asked for. It
/// is only ever asked for when its file is complete under the recorded name. But Gemini deletes files after
/// 48 hours, and any other name than the one made for this very send is a file that was there before the
/// intent: the user's, or an older one of a send that was refused, or one that was complete before its
/// name was recorded. Such a file may have gone after the batch was asked for.
fn file_would_prove(o: &Observed<'_>, a: &Attempt, now: Timestamp) -> bool {
    let uid = o.job.metadata.uid.as_deref().unwrap_or_default();
    a.fence_time.is_none()
        && a.input_file == identity::input_file(o.cluster, uid, a.number, &a.send_id)
        && after(a.intent_time.0, o.timings.absent_file_proves) > now
}

/// The send of this attempt never left, was refused, or can't succeed any more (`fenced`): the next one has names
/// of its own, and may carry another key or another input.
fn resend(o: &Observed<'_>, a: &Attempt, fenced: bool, now: Timestamp) -> Decision {
    if let Some(decision) = lifecycle::held_back(o, now) {
        return decision;
    }
    match ready_to_send(o, now) {
        Ok((fingerprint, input)) => intend(o, Some(a), fenced, fingerprint, input, now),
        Err(decision) => *decision,
    }
}

/// The user says that a send with somebody else's file may be repeated.
fn resend_asked(job: &GeminiBatchJob, a: &Attempt) -> bool {
    let asked = job.metadata.annotations.as_ref().and_then(|all| all.get(RESEND_ANNOTATION));
    job.spec.gemini_file().is_some() && asked == Some(&a.send_id)
}

/// When the last listing behind the fence may begin. A create that arrived right before the fence made a batch all the
/// same, and a listing may lag: one that is made at once need not show it.
fn behind_fence(search: &Search, timings: &Timings) -> Option<Timestamp> {
    search.fenced_at.map(|time| after(time, timings.resend_grace / 2))
}

/// The batch may exist: look for it. It is sent again only when it was not found in at least three complete
/// listings over the time of grace, its input file is gone (a create that is still travelling has no input then, and
/// must fail), and one more listing after that does not show it either. Another key of the same project sees it as well;
/// that a key does not see it proves nothing here, whichever it is.
fn searching(o: &Observed<'_>, a: &Attempt, search: &Search, another_key: bool, now: Timestamp) -> Decision {
    if let Some(batch) = hinted_batch(o.job).filter(|b| search.refuted.as_ref() != Some(b)) {
        return Decision::Act(Action::ConfirmHinted { batch, attempt: Box::new(a.clone()) });
    }
    let grace_ends = search.since.map(|since| after(since, o.timings.resend_grace));
    let patient = !another_key && search.own_listings >= 3 && grace_ends.is_some_and(|t| t <= now);
    let theirs = !o.job.spec.has_own_input();
    if patient && theirs && resend_asked(o.job, a) {
        return resend(o, a, true, now);
    }
    if patient && !theirs {
        return match (search.fenced, search.listed_behind_fence) {
            // After a kill right behind the fence the file is as absent as one that was never uploaded.
            (false, _) if a.fence_time.is_none() => record(Change::Fencing),
            (false, _) => Decision::Act(Action::Fence { file: a.input_file.clone() }),
            (true, false) => match behind_fence(search, o.timings).filter(|t| *t > now) {
                Some(time) => {
                    let problem = ending::unconfirmed(a, theirs, o.timings.resend_grace);
                    Decision::Wait { say: Some(Box::new(waiting(&problem, true))), wake: Wake::At(time) }
                }
                None => Decision::Act(Action::FindBatch { attempt: Box::new(a.clone()) }),
            },
            (true, true) => resend(o, a, true, now),
        };
    }
    match search.next {
        Some(next) if next > now => {
            // No later than the grace ends.
            let next = grace_ends
                .filter(|t| *t > now && !theirs && search.own_listings >= 3)
                .map_or(next, |t| t.min(next));
            let problem = if another_key {
                ending::credentials_changed("does not show whether Gemini has the batch")
            } else {
                ending::unconfirmed(a, theirs, o.timings.resend_grace)
            };
            // A key that is put back is not watched.
            let wake = if another_key && next > after(now, o.timings.recheck) {
                Wake::Recheck
            } else {
                Wake::At(next)
            };
            Decision::Wait { say: Some(Box::new(waiting(&problem, true))), wake }
        }
        _ => Decision::Act(Action::FindBatch { attempt: Box::new(a.clone()) }),
    }
}
