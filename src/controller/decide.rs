//! The whole lifecycle: what to do next, given all that is known. Pure: no client required, no clock, no
//! randomness, no panic.
//!
//! Read it from [`decide`] downwards. Three rules hold everywhere:
//! - an action that costs money or loses data is only chosen when the status says that it was intended;
//! - an outcome that a restart must not forget is recorded before the next action is chosen;
//! - whatever keeps a job from going on is said in its status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

use super::collect::{Collected, Lines};
use super::ending::{self, End};
use super::identity;
use super::memory::{Absent, Cleanup, Memory, OutputObject, Refused, Remote, Search, Stage, Trouble, after};
use super::{InputFacts, Problem, Timings};
use crate::api::{
    Attempt, Callback, FINALIZER, GeminiBatchJob, OutputStatus, RESEND_ANNOTATION, Reason, Refusal,
    RefusedCall, RequestCounts, Usage, conditions,
};
use crate::gemini::{Batch, BatchName, BatchState};

/// All that a decision needs.
#[derive(Debug)]
pub struct Observed<'a> {
    /// The job as the API server has it.
    pub job: &'a GeminiBatchJob,
    /// The fingerprint of the API key, or why there is none.
    pub credential: Result<String, Problem>,
    /// The input, when it was needed: see [`needs_input`].
    pub input: Option<Result<InputFacts, Problem>>,
    /// What this process remembers.
    pub memory: &'a Memory,
    /// Id of the cluster, part of every name at Gemini.
    pub cluster: &'a str,
    /// A random id that no send has had yet.
    pub fresh_send_id: &'a str,
    /// How patient to be.
    pub timings: &'a Timings,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Do this; its outcome goes into memory.
    Act(Action),
    /// Write this down before anything else.
    Record(Box<Change>),
    /// Nothing can be done now.
    Wait {
        /// What the status should say meanwhile; `None` leaves it as it is.
        say: Option<Box<Change>>,
        /// When to look again; the watch wakes the job as well.
        wake: Wake,
    },
    /// Nothing is left to do, ever, unless the job is changed.
    Done,
}

impl Decision {
    /// The step's name, for logs and tests.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Act(action) => match action {
                Action::ReserveOutput { .. } => "ReserveOutput",
                Action::ReleaseOutput { .. } => "ReleaseOutput",
                Action::FindInputFile { .. } => "FindInputFile",
                Action::UploadInput { .. } => "UploadInput",
                Action::CreateBatch { .. } => "CreateBatch",
                Action::FindBatch { .. } => "FindBatch",
                Action::Fence { .. } => "Fence",
                Action::ConfirmHinted { .. } => "ConfirmHinted",
                Action::ProbeCredential => "ProbeCredential",
                Action::GetBatch { .. } => "GetBatch",
                Action::Collect { .. } => "Collect",
                Action::StoreResults { .. } => "StoreResults",
                Action::CancelBatch { .. } => "CancelBatch",
                Action::FindToCancel { .. } => "FindToCancel",
                Action::DeleteInputFile { .. } => "DeleteInputFile",
            },
            Self::Record(change) => match **change {
                Change::AddFinalizer => "AddFinalizer",
                Change::DropFinalizer { .. } => "DropFinalizer",
                Change::Intent(_) => "Intent",
                Change::InputFile { .. } => "InputFile",
                Change::Refused(_) => "Refused",
                Change::Submitted { .. } => "Submitted",
                Change::HintObserved { .. } => "HintObserved",
                Change::Waiting { .. } => "Waiting",
                Change::Running { .. } => "Running",
                Change::Contradicted { .. } => "Contradicted",
                Change::Finished(_) => "Finished",
                Change::Refresh => "Refresh",
            },
            Self::Wait { .. } => "Wait",
            Self::Done => "Done",
        }
    }
}

/// When to look again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// When the job changes, a callback comes, or the sweep finds something.
    OnChange,
    /// At that time.
    At(Timestamp),
    /// In [`Timings::recheck`] at the latest, at a random time: somebody has to change something that is
    /// not watched.
    Recheck,
}

/// One step with a client.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Create the output object, or see that it is ours.
    ReserveOutput {
        /// Name of the ConfigMap.
        name: String,
    },
    /// Delete the reserved output object if it is still empty.
    ReleaseOutput {
        /// Name of the ConfigMap.
        name: String,
    },
    /// After a restart: see whether the upload of the input file was completed.
    FindInputFile {
        /// Name of the file.
        file: String,
    },
    /// Upload the input.
    UploadInput {
        /// The name it shall have.
        file: String,
    },
    /// Ask for the batch. Costs money.
    CreateBatch {
        /// The recorded intent.
        attempt: Box<Attempt>,
    },
    /// List batches until past the intent and look for ours.
    FindBatch {
        /// The recorded intent.
        attempt: Box<Attempt>,
    },
    /// Delete the input file of a send whose outcome is unknown, and see it gone.
    Fence {
        /// Name of the file.
        file: String,
    },
    /// GET the batch that a callback names and see whether it is ours.
    ConfirmHinted {
        /// The batch.
        batch: BatchName,
        /// The recorded intent.
        attempt: Box<Attempt>,
    },
    /// See whether Gemini accepts the key by now.
    ProbeCredential,
    /// GET the batch.
    GetBatch {
        /// The batch.
        batch: BatchName,
    },
    /// Read the result file.
    Collect {
        /// The batch's name.
        name: BatchName,
        /// The batch as GET shows it; `None` if Gemini does not show it any more.
        batch: Option<Box<Batch>>,
    },
    /// Write the results into the output object.
    StoreResults {
        /// Name of the ConfigMap.
        name: String,
    },
    /// Cancel the batch.
    CancelBatch {
        /// The batch.
        batch: BatchName,
    },
    /// Before a deletion: list, and note what must be cancelled.
    FindToCancel {
        /// The recorded intent.
        attempt: Box<Attempt>,
    },
    /// Delete the input file.
    DeleteInputFile {
        /// Name of the file.
        file: String,
    },
}

/// One write to the job.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Add the finalizer.
    AddFinalizer,
    /// Remove the finalizer; an Event says what there is to say.
    DropFinalizer {
        /// What the user should know.
        event: Option<Problem>,
    },
    /// The intent to send.
    Intent(Box<Attempt>),
    /// Gemini gave the input file another name than the intended one.
    InputFile {
        /// The name.
        file: String,
    },
    /// Gemini refused the send.
    Refused(Box<Refused>),
    /// Gemini has the batch.
    Submitted {
        /// The batch.
        batch: Box<Batch>,
        /// It was found by looking for it, not by the answer to its creation.
        adopted: bool,
    },
    /// The hint was acted on, and Gemini says that the batch still runs.
    HintObserved {
        /// Its webhook id.
        hint: String,
    },
    /// The job can't go on for now.
    Waiting {
        /// Why, and what to change.
        problem: Problem,
        /// Somebody has to change something.
        stalled: bool,
        /// What is known of the results already.
        results: Option<Box<Results>>,
    },
    /// The batch runs and nothing stands in the way.
    Running {
        /// The type of a callback that was followed, and that Gemini does not confirm yet.
        early: Option<String>,
    },
    /// A callback that came after the end says otherwise.
    Contradicted {
        /// Its webhook id.
        hint: String,
        /// What there is to say about it.
        problem: Problem,
    },
    /// The job has ended.
    Finished(Box<End>),
    /// The spec was edited after the end: the conditions hold for the new generation as well.
    Refresh,
}

/// What is known of the results, for the status.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Results {
    /// Requests by outcome.
    pub requests: Option<RequestCounts>,
    /// Tokens.
    pub usage: Option<Usage>,
    /// Where they are.
    pub output: Option<OutputStatus>,
}

/// Whether the decision depends on the input, so that it has to be read.
#[must_use]
pub fn needs_input(job: &GeminiBatchJob, memory: &Memory) -> bool {
    if job.metadata.deletion_timestamp.is_some() || is_finished(job) || job.spec.input.gemini_file.is_some() {
        return false;
    }
    match current_attempt(job) {
        None => true,
        Some(a) if a.batch_name.is_some() => false,
        Some(a) if a.refusal.is_some() => true,
        // Uploaded: with another key the send begins anew.
        Some(a) => match stage_of(a, memory) {
            Some(Stage::NotUploaded | Stage::Unsent | Stage::Uploaded { .. }) => true,
            Some(Stage::Unsure(search)) => search.listed_behind_fence || resend_asked(job, a),
            _ => false,
        },
    }
}

/// Whether anything is left to do that may need the API key.
#[must_use]
pub fn needs_credential(job: &GeminiBatchJob) -> bool {
    !is_finished(job) || has_finalizer(job) || contradicted(job).is_some()
}

/// What to do next.
#[must_use]
pub fn decide(o: &Observed<'_>, now: Timestamp) -> Decision {
    if o.job.metadata.deletion_timestamp.is_some() {
        return deleting(o, now);
    }
    if is_finished(o.job) {
        return after_the_end(o, now);
    }
    if !has_finalizer(o.job) {
        return record(Change::AddFinalizer);
    }
    if let Some(trouble) = o.memory.trouble.as_ref().filter(|t| t.next > now) {
        return in_trouble(o, trouble, now);
    }
    match current_attempt(o.job) {
        None => before_submission(o, now),
        Some(a) => match (&a.batch_name, &a.refusal) {
            (Some(name), _) => match BatchName::parse(name) {
                Ok(name) => submitted(o, a, name, now),
                Err(_) => stalled(&Problem::new(
                    Reason::BatchNotFound,
                    "status.attempts[].batchName is not the name of a Gemini batch; \
                     it was changed by something else than this operator",
                )),
            },
            (None, Some(refusal)) => refused(o, a, refusal, now),
            (None, None) => submitting(o, a, now),
        },
    }
}

// ---------------------------------------------------------------------------------- submission

fn before_submission(o: &Observed<'_>, now: Timestamp) -> Decision {
    match ready_to_send(o, now) {
        Ok((fingerprint, input)) => intend(o, None, false, fingerprint, input, now),
        Err(decision) => *decision,
    }
}

/// Everything that a send needs: a key, an input, a place for the results.
fn ready_to_send<'a>(
    o: &'a Observed<'_>,
    now: Timestamp,
) -> Result<(&'a str, Option<&'a InputFacts>), Box<Decision>> {
    let fingerprint = o.credential.as_ref().map_err(|p| Box::new(stalled(p)))?;
    let input = match (&o.input, &o.job.spec.input.gemini_file) {
        (_, Some(_)) => None,
        (Some(Ok(input)), None) => Some(input),
        (Some(Err(problem)), None) => return Err(Box::new(stalled(problem))),
        // The driver reads the input whenever `needs_input` says so.
        (None, None) => return Err(Box::new(Decision::Wait { say: None, wake: Wake::At(now) })),
    };
    let Some(name) = output_name(o.job) else { return Ok((fingerprint, input)) };
    match &o.memory.output {
        OutputObject::Reserved { name: ours } | OutputObject::Stored { name: ours } if ours == name => {
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
        _ => Err(Box::new(Decision::Act(reserve(o, name)))),
    }
}

/// Makes sure of the output object; one that was reserved under another name before is released first.
fn reserve(o: &Observed<'_>, name: &str) -> Action {
    match &o.memory.output {
        OutputObject::Reserved { name: old } if old != name => Action::ReleaseOutput { name: old.clone() },
        _ => Action::ReserveOutput { name: name.to_owned() },
    }
}

/// Records the intent of the next send: the first one, or the one after a refusal or an unsent one.
fn intend(
    o: &Observed<'_>,
    before: Option<&Attempt>,
    resent: bool,
    fingerprint: &str,
    input: Option<&InputFacts>,
    now: Timestamp,
) -> Decision {
    let number = before.map_or(1, |a| a.number);
    let uid = o.job.metadata.uid.as_deref().unwrap_or_default();
    let send = o.fresh_send_id;
    let input_file =
        match (&o.job.spec.input.gemini_file, before.filter(|a| reusable(o, a, fingerprint, input, now))) {
            (Some(file), _) => file.name.clone(),
            (None, Some(a)) => a.input_file.clone(),
            (None, None) => identity::input_file(o.cluster, uid, number, send),
        };
    record(Change::Intent(Box::new(Attempt {
        number,
        send_id: send.to_owned(),
        display_name: identity::display_name(o.cluster, uid, number, send),
        input_file,
        input_sha256: input.map(|i| i.sha256.clone()),
        request_count: input.map(|i| i.count),
        credential_fingerprint: fingerprint.to_owned(),
        intent_time: MicroTime(now),
        refusal: None,
        refusals: before.and_then(|a| a.refusals),
        resends: before.map(|a| a.resends.unwrap_or(0) + i32::from(resent)).filter(|n| *n > 0),
        batch_name: None,
        create_time: None,
        end_time: None,
        remote_state: None,
        observed_hint: before.and_then(|a| a.observed_hint.clone()),
    })))
}

/// Whether the file of a refused send can serve the next one: same key, same content, still there.
fn reusable(
    o: &Observed<'_>,
    a: &Attempt,
    fingerprint: &str,
    input: Option<&InputFacts>,
    now: Timestamp,
) -> bool {
    a.refusal.as_ref().is_some_and(|r| {
        r.call == RefusedCall::Create
            && [Reason::WaitingForQuota, Reason::PreconditionFailed, Reason::CredentialsRefused]
                .iter()
                .any(|reason| r.reason == reason.as_str())
    }) && a.credential_fingerprint == fingerprint
        && a.input_sha256.as_deref() == input.map(|i| i.sha256.as_str())
        && after(a.intent_time.0, o.timings.reuse_file) > now
}

/// The last send was refused: nothing exists at Gemini, so a new send is safe once it has a chance.
fn refused(o: &Observed<'_>, a: &Attempt, refusal: &Refusal, now: Timestamp) -> Decision {
    let fingerprint = match &o.credential {
        Ok(fingerprint) => fingerprint,
        Err(problem) => return stalled(problem),
    };
    let problem = ending::refusal_problem(refusal);
    let is_stalled = problem.reason != Reason::WaitingForQuota;
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
fn submitting(o: &Observed<'_>, a: &Attempt, now: Timestamp) -> Decision {
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
            return record(Change::Finished(Box::new(ending::refused(a, refused))));
        }
        Some(Stage::Refused(refused)) => return record(Change::Refused(Box::new(refused.clone()))),
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
            Some(Ok(_)) => Decision::Act(Action::UploadInput { file: a.input_file.clone() }),
            Some(Err(problem)) => stalled(problem),
            None => Decision::Wait { say: None, wake: Wake::At(now) },
        },
        Some(Stage::Unsent) => resend(o, a, false, now),
        Some(Stage::Uploaded { .. }) if another_key => resend(o, a, false, now),
        Some(Stage::Uploaded { file }) if *file != a.input_file => {
            record(Change::InputFile { file: file.clone() })
        }
        Some(Stage::Uploaded { .. }) => Decision::Act(Action::CreateBatch { attempt: Box::new(a.clone()) }),
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
    a.input_file == identity::input_file(o.cluster, uid, a.number, &a.send_id)
        && after(a.intent_time.0, o.timings.absent_file_proves) > now
}

/// The send of this attempt never left, was refused, or can't succeed any more (`fenced`): the next one has names
/// of its own, and may carry another key or another input.
fn resend(o: &Observed<'_>, a: &Attempt, fenced: bool, now: Timestamp) -> Decision {
    match ready_to_send(o, now) {
        Ok((fingerprint, input)) => intend(o, Some(a), fenced, fingerprint, input, now),
        Err(decision) => *decision,
    }
}

/// The user says that a send with somebody else's file may be repeated.
fn resend_asked(job: &GeminiBatchJob, a: &Attempt) -> bool {
    let asked = job.metadata.annotations.as_ref().and_then(|all| all.get(RESEND_ANNOTATION));
    job.spec.input.gemini_file.is_some() && asked == Some(&a.send_id)
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
    let theirs = o.job.spec.input.gemini_file.is_some();
    if patient && theirs && resend_asked(o.job, a) {
        return resend(o, a, true, now);
    }
    if patient && !theirs {
        return match (search.fenced, search.listed_behind_fence) {
            (false, _) => Decision::Act(Action::Fence { file: a.input_file.clone() }),
            (true, false) => Decision::Act(Action::FindBatch { attempt: Box::new(a.clone()) }),
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

// ------------------------------------------------------------------------------ while it runs

fn submitted(o: &Observed<'_>, a: &Attempt, name: BatchName, now: Timestamp) -> Decision {
    let same_key = o.credential.as_ref().is_ok_and(|f| *f == a.credential_fingerprint);
    match &o.memory.remote {
        Some(Remote::Seen(batch)) if batch.is_terminal() => return collecting(o, a, name, Some(batch), now),
        Some(Remote::Missing(Absent { fingerprint, tries }))
            if same_key
                && *fingerprint == a.credential_fingerprint
                && tries.count >= 3
                && tries.next > now
                && after(tries.since, o.timings.gone_after) <= now =>
        {
            return collecting(o, a, name, None, now);
        }
        _ => {}
    }
    let fingerprint = match &o.credential {
        Ok(fingerprint) => fingerprint,
        Err(problem) => return stalled(problem),
    };
    let looks = &o.memory.looks;
    let hint = new_hint(o.job, a);
    if let Some(hint) = hint.filter(|h| looks.exhausted(h)) {
        return record(Change::HintObserved { hint: hint.to_owned() });
    }
    let missing = match &o.memory.remote {
        Some(Remote::Missing(absent)) => Some(absent),
        _ => None,
    };
    let next = [looks.next, missing.map(|m| m.tries.next)].into_iter().flatten().min();
    // What another key was not shown may be shown to this one.
    let unasked = missing.is_some_and(|m| m.fingerprint != *fingerprint);
    let unfollowed = hint.is_some_and(|h| looks.following.as_ref().is_none_or(|(f, _)| f != h));
    // The first GET is made before anything is said, so that a hint that is right costs no write.
    let early =
        hint.and_then(|_| o.job.status.as_ref()?.callback.as_ref()).filter(|_| looks.following.is_some());
    let say = match missing {
        None => Change::Running { early: early.map(|callback| callback.type_.clone()) },
        Some(_) if !same_key => {
            waiting(&ending::credentials_changed("Gemini does not show it the batch"), true)
        }
        Some(_) => waiting(&ending::missing(&name), false),
    };
    if unfollowed || looks.swept || unasked || next.is_some_and(|t| t <= now) {
        let allowed = looks.allowed(now, o.timings.look_window);
        if allowed <= now {
            return Decision::Act(Action::GetBatch { batch: name });
        }
        return Decision::Wait { say: Some(Box::new(say)), wake: Wake::At(allowed) };
    }
    let wake = match next {
        // Somebody has to put the key back, and expects the job to go on soon then.
        Some(next) if missing.is_some() && !same_key && next > after(now, o.timings.recheck) => Wake::Recheck,
        next => next.map_or(Wake::OnChange, Wake::At),
    };
    Decision::Wait { say: Some(Box::new(say)), wake }
}

/// The batch has ended (or is gone): read what there is, store it, end.
fn collecting(
    o: &Observed<'_>,
    a: &Attempt,
    name: BatchName,
    batch: Option<&Batch>,
    now: Timestamp,
) -> Decision {
    let Some(collected) = &o.memory.collected else { return reading(o, a, name, batch, now) };
    let Some(wanted) = output_name(o.job).filter(|_| collected.has_results()) else {
        return end(o, a, batch, Some(collected));
    };
    let results = Some(Box::new(ending::results(a, batch, Some(collected), None)));
    match (&o.memory.output, &collected.lines) {
        (OutputObject::Stored { name }, _) if name == wanted => end(o, a, batch, Some(collected)),
        (_, Lines::TooLarge { bytes }) => Decision::Wait {
            say: Some(Box::new(Change::Waiting {
                problem: ending::too_large(wanted, *bytes),
                stalled: true,
                results,
            })),
            wake: Wake::OnChange,
        },
        (OutputObject::Blocked { problem, generation, retry }, _)
            if generation_of(o.job) == *generation && retry.is_none_or(|t| t > now) =>
        {
            Decision::Wait {
                say: Some(Box::new(Change::Waiting { problem: problem.clone(), stalled: true, results })),
                wake: retry.map_or(Wake::OnChange, Wake::At),
            }
        }
        (OutputObject::Reserved { name }, Lines::Kept(_)) if name == wanted => {
            Decision::Act(Action::StoreResults { name: name.clone() })
        }
        (OutputObject::Reserved { name: ours }, Lines::Dropped) if ours == wanted => {
            reading(o, a, name, batch, now)
        }
        // After a restart the object that was reserved before is simply written to: that checks it as well.
        (OutputObject::Unknown, Lines::Kept(_)) => {
            Decision::Act(Action::StoreResults { name: wanted.to_owned() })
        }
        _ => Decision::Act(reserve(o, wanted)),
    }
}

/// Reads the result file, patiently: it may lag behind the end of the batch by minutes.
fn reading(
    o: &Observed<'_>,
    a: &Attempt,
    name: BatchName,
    batch: Option<&Batch>,
    now: Timestamp,
) -> Decision {
    let fingerprint = match &o.credential {
        Ok(fingerprint) => fingerprint,
        Err(problem) => return stalled(problem),
    };
    // Only an answer to the present key counts, and nothing is given up on an old one: there may have been no
    // key to ask with for a day.
    let asked = o.memory.unreadable.as_ref().map(|u| (&u.fingerprint, &u.tries));
    let Some((_, tries)) = asked.filter(|(key, tries)| *key == fingerprint && tries.next > now) else {
        return Decision::Act(Action::Collect { name, batch: batch.cloned().map(Box::new) });
    };
    if *fingerprint != a.credential_fingerprint {
        let problem = ending::credentials_changed("the results can't be read with it");
        let soon = tries.next <= after(now, o.timings.recheck);
        return Decision::Wait {
            say: Some(Box::new(waiting(&problem, true))),
            wake: if soon { Wake::At(tries.next) } else { Wake::Recheck },
        };
    }
    let promised = batch.is_some_and(|b| b.state == BatchState::Succeeded || b.output_file.is_some());
    let counted = batch.and_then(|b| b.stats).is_some_and(|s| s.succeeded > 0);
    let give_up = match (promised, counted) {
        (true, _) => after(tries.since, o.timings.result_patience),
        (false, true) => after(tries.since, o.timings.result_late),
        (false, false) => tries.since,
    };
    if give_up <= now {
        return end(o, a, batch, None);
    }
    let late = after(tries.since, o.timings.result_late) <= now;
    Decision::Wait {
        say: Some(Box::new(waiting(&ending::not_readable(&name, give_up), late))),
        wake: Wake::At(tries.next),
    }
}

fn end(o: &Observed<'_>, a: &Attempt, batch: Option<&Batch>, collected: Option<&Collected>) -> Decision {
    let stored = match &o.memory.output {
        OutputObject::Stored { name } => Some(name.as_str()),
        _ => None,
    };
    let hint = new_hint(o.job, a).map(ToOwned::to_owned);
    // A reservation that will never be filled is given back, so that the name is free again.
    // It may have another name by now, or none.
    let reserved = match &o.memory.output {
        OutputObject::Reserved { name } => Some(name.as_str()),
        _ => output_name(o.job),
    };
    if let (Some(name), None, false) = (reserved, stored, o.memory.cleanup.output_released) {
        return Decision::Act(Action::ReleaseOutput { name: name.to_owned() });
    }
    record(Change::Finished(Box::new(ending::ended(a, batch, collected, stored, hint))))
}

// --------------------------------------------------------------------------------- afterwards

fn after_the_end(o: &Observed<'_>, now: Timestamp) -> Decision {
    if o.job.status.as_ref().and_then(|s| s.observed_generation) != o.job.metadata.generation {
        return record(Change::Refresh);
    }
    if let Some((a, callback)) = contradicted(o.job) {
        return contradiction(o, a, callback, now);
    }
    if !has_finalizer(o.job) {
        return Decision::Done;
    }
    leftovers(o, now)
}

/// The end does not change any more, but somebody may want to know: Gemini is asked once, and it is said.
fn contradiction(o: &Observed<'_>, a: &Attempt, callback: &Callback, now: Timestamp) -> Decision {
    let asked = o.memory.looks.following.as_ref().is_some_and(|(hint, _)| *hint == callback.webhook_id);
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
    record(Change::Contradicted {
        hint: callback.webhook_id.clone(),
        problem: ending::contradicted(a, &callback.type_, seen),
    })
}

/// What a finished job left behind. None of it holds the job for long, and nothing is said: the status of
/// a finished job does not change any more. A file that can't be deleted expires by itself.
fn leftovers(o: &Observed<'_>, now: Timestamp) -> Decision {
    // A job that Gemini refused for good gives its reservation back here: the refusal is recorded first.
    let filled =
        o.job.status.as_ref().and_then(|s| s.output.as_ref()).is_some_and(|o| o.config_map.is_some());
    if let Some(name) = output_name(o.job).filter(|_| !filled && !o.memory.cleanup.output_released) {
        return Decision::Act(Action::ReleaseOutput { name: name.to_owned() });
    }
    let file = current_attempt(o.job).and_then(|a| own_input_file(o, a)).filter(|_| o.credential.is_ok());
    match file.filter(|_| !gave_up(&o.memory.cleanup)) {
        None => record(Change::DropFinalizer { event: None }),
        Some(action) => match &o.memory.cleanup.failed {
            Some(tries) if tries.next > now => Decision::Wait { say: None, wake: Wake::At(tries.next) },
            _ => Decision::Act(action),
        },
    }
}

/// The job is being deleted: nothing of it may go on at Gemini, and it must not be held for ever.
fn deleting(o: &Observed<'_>, now: Timestamp) -> Decision {
    if !has_finalizer(o.job) {
        return Decision::Done;
    }
    if is_finished(o.job) {
        return leftovers(o, now);
    }
    let since = o.job.metadata.deletion_timestamp.as_ref().map_or(now, |t| t.0);
    let deadline = after(since, o.timings.deletion);
    let cleanup = &o.memory.cleanup;

    if let Some((a, action)) = current_attempt(o.job).and_then(|a| Some((a, stop_batch(o, a)?))) {
        // However late it is, each step is tried once: the operator may have been away until now, and a batch
        // that nobody cancels is paid for.
        let untried = o.credential.is_ok() && cleanup.failed.is_none();
        if now < deadline || untried {
            return clean_up(o, a, action, deadline, now);
        }
        // A file that is left expires by itself, unless it is the fence.
        if is_unsure(o, a) || !matches!(action, Action::DeleteInputFile { .. }) {
            let event = ending::orphaned(a, o.credential.as_ref().err());
            return record(Change::DropFinalizer { event: Some(event) });
        }
    }
    if let Some(name) = output_name(o.job).filter(|_| !cleanup.output_released) {
        return Decision::Act(Action::ReleaseOutput { name: name.to_owned() });
    }
    let event = match ended_batch(o) {
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
        (Err(problem), _) => {
            let problem = ending::deleted_without_key(a, problem, deadline);
            Decision::Wait { say: Some(Box::new(waiting(&problem, true))), wake: soon }
        }
        (Ok(fingerprint), Some(tries)) if tries.next > now => {
            // The first failure is not worth a write.
            let say = if *fingerprint == a.credential_fingerprint {
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
    (unsure && cleanup.listings < 2).then(|| Action::FindToCancel { attempt: Box::new(a.clone()) })
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
    (o.job.spec.input.gemini_file.is_none() && !o.memory.cleanup.input_deleted)
        .then(|| Action::DeleteInputFile { file: a.input_file.clone() })
}

/// The input file could not be deleted in several tries: Gemini deletes it by itself after 48 hours.
fn gave_up(cleanup: &Cleanup) -> bool {
    cleanup.failed.is_some_and(|tries| tries.count >= 5)
}

// ------------------------------------------------------------------------------------- helpers

fn record(change: Change) -> Decision {
    Decision::Record(Box::new(change))
}

fn waiting(problem: &Problem, stalled: bool) -> Change {
    Change::Waiting { problem: problem.clone(), stalled, results: None }
}

/// Somebody has to change something outside the job; Secrets may only be read, not watched, so it is
/// looked at again every now and then.
fn stalled(problem: &Problem) -> Decision {
    Decision::Wait { say: Some(Box::new(waiting(problem, true))), wake: Wake::Recheck }
}

/// A call fails for now. The first failure is not worth a write; a lasting one is said, and one after which
/// Gemini asks for a long wait.
fn in_trouble(o: &Observed<'_>, trouble: &Trouble, now: Timestamp) -> Decision {
    let stalled = trouble.problem.reason == Reason::CredentialsRefused;
    let long = trouble.next > after(now, o.timings.trouble_longest);
    let say = (trouble.failures >= 2 || long).then(|| Box::new(waiting(&trouble.problem, stalled)));
    Decision::Wait { say, wake: Wake::At(trouble.next) }
}

/// The attempt that counts: the last one.
#[must_use]
pub fn current_attempt(job: &GeminiBatchJob) -> Option<&Attempt> {
    job.status.as_ref()?.attempts.iter().max_by_key(|a| a.number)
}

/// How far this process knows the attempt's send to have come.
fn stage_of<'a>(a: &Attempt, memory: &'a Memory) -> Option<&'a Stage> {
    memory.send.as_ref().filter(|s| s.send_id == a.send_id).map(|s| &s.stage)
}

/// Whether the job has its terminal condition.
#[must_use]
pub fn is_finished(job: &GeminiBatchJob) -> bool {
    job.status.as_ref().is_some_and(|s| conditions::is_true(&s.conditions, conditions::FINISHED))
}

/// Whether our finalizer is on the job.
#[must_use]
pub fn has_finalizer(job: &GeminiBatchJob) -> bool {
    job.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

/// The ConfigMap that the results shall go to.
#[must_use]
pub fn output_name(job: &GeminiBatchJob) -> Option<&str> {
    job.spec.output.as_ref()?.config_map.as_ref().map(|c| c.name.as_str())
}

/// The id of a callback that was not acted on yet.
#[must_use]
pub fn new_hint<'a>(job: &'a GeminiBatchJob, a: &Attempt) -> Option<&'a str> {
    let callback = job.status.as_ref()?.callback.as_ref()?;
    (a.observed_hint.as_ref() != Some(&callback.webhook_id)).then_some(callback.webhook_id.as_str())
}

/// A callback that was not looked into yet and that says another end than the one recorded.
#[must_use]
pub fn contradicted(job: &GeminiBatchJob) -> Option<(&Attempt, &Callback)> {
    let callback = job.status.as_ref()?.callback.as_ref().filter(|_| is_finished(job))?;
    let attempt = current_attempt(job)?;
    new_hint(job, attempt)?;
    let said = BatchState::of_event(&callback.type_)?;
    let known = attempt.remote_state.as_deref()?;
    (said.as_str() != known).then_some((attempt, callback))
}

/// Whether the last callback of an unfinished job was not acted on to its end yet.
#[must_use]
pub fn hint_waits(job: &GeminiBatchJob) -> bool {
    !is_finished(job) && current_attempt(job).is_some_and(|a| new_hint(job, a).is_some())
}

/// The batch that a callback names.
fn hinted_batch(job: &GeminiBatchJob) -> Option<BatchName> {
    BatchName::parse(job.status.as_ref()?.callback.as_ref()?.batch_id.as_deref()?).ok()
}

fn generation_of(job: &GeminiBatchJob) -> i64 {
    job.metadata.generation.unwrap_or(0)
}

#[cfg(test)]
mod tests;
