//! The whole lifecycle: what to do next, given all that is known. Pure: no client required, no clock, no
//! randomness, no panic.
//!
//! Read it from [`decide`] downwards: `submission`, `running` and `cleanup` are a job's life in order, `lifecycle` is what
//! users may ask of it besides running. Three rules hold everywhere:
//! - an action that costs money or loses data is only chosen when the status says that it was intended;
//! - an outcome that a restart must not forget is recorded before the next action is chosen;
//! - whatever keeps a job from going on is said in its status.

mod cleanup;
mod lifecycle;
mod running;
mod sharded;
mod submission;

use jiff::Timestamp;

use super::destination::Destination;
use super::ending::{self, End};
use super::memory::{Memory, Refused, Remote, Stage, Trouble, after};
use super::shards::{self, seen::Seen};
use super::{InputFacts, Problem, Timings};
use crate::api::{
    Attempt, Callback, FINALIZER, GeminiBatchJob, OutputStatus, Reason, RequestCounts, Shards, Usage,
    conditions,
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
    /// Whether a new batch may be asked for now, as far as others than the job are concerned.
    pub gate: &'a Gate,
    /// Id of the cluster, part of every name at Gemini.
    pub cluster: &'a str,
    /// A random id that no send has had yet.
    pub fresh_send_id: &'a str,
    /// Gemini refused a webhook for a batch of this method lately: the next one is asked for without.
    pub webhook_refused: bool,
    /// How patient to be.
    pub timings: &'a Timings,
}

/// Whether a new batch may be asked for, as far as others than the job are concerned: other jobs with the same API
/// key, Gemini's quota, an administrator.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Gate {
    /// It may.
    #[default]
    Open,
    /// Not now.
    Closed {
        /// Why. Nobody has to change anything in the job.
        problem: Problem,
        /// When it may be worth asking again.
        wake: Wake,
    },
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
                Action::AskNamespace => "AskNamespace",
                Action::DeleteBatch { .. } => "DeleteBatch",
                Action::DeleteJob => "DeleteJob",
                Action::Shards(action) => action.name(),
            },
            Self::Record(change) => match **change {
                Change::AddFinalizer => "AddFinalizer",
                Change::DropFinalizer { .. } => "DropFinalizer",
                Change::Intent(_) => "Intent",
                Change::Adopted { .. } => "Adopted",
                Change::InputFile { .. } => "InputFile",
                Change::Fencing => "Fencing",
                Change::Refused(_) => "Refused",
                Change::Submitted { .. } => "Submitted",
                Change::Imported { .. } => "Imported",
                Change::HintObserved { .. } => "HintObserved",
                Change::Suspended => "Suspended",
                Change::Validated { .. } => "Validated",
                Change::Planned { .. } => "Planned",
                Change::Sharded(_) => "Sharded",
                Change::Cancelling { .. } => "Cancelling",
                Change::AttemptEnded(_) => "AttemptEnded",
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
        /// Where the results shall go.
        name: Destination,
    },
    /// Delete the reserved output object if it is still empty.
    ReleaseOutput {
        /// Where they were to go.
        name: Destination,
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
        /// Where they shall go.
        name: Destination,
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
    /// See whether the job's namespace is being deleted.
    AskNamespace,
    /// Delete a batch that is over, and its result file.
    DeleteBatch {
        /// The batch.
        batch: BatchName,
    },
    /// Delete the job: its time to live is over.
    DeleteJob,
    /// Something about the jobs of a sharded one's parts.
    Shards(shards::Action),
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
    /// Gemini has a batch for the attempt that was about to begin: intent and batch in one.
    Adopted {
        /// The attempt, as if it had been intended.
        attempt: Box<Attempt>,
        /// Its batch.
        batch: Box<Batch>,
    },
    /// Gemini gave the input file another name than the intended one.
    InputFile {
        /// The name.
        file: String,
    },
    /// The input file of a send whose outcome stayed unknown is going to be deleted.
    Fencing,
    /// Gemini refused the send.
    Refused(Box<Refused>),
    /// Gemini has the batch.
    Submitted {
        /// The batch.
        batch: Box<Batch>,
        /// It was found by looking for it, not by the answer to its creation.
        adopted: bool,
    },
    /// Gemini shows the batch that somebody else created and this job takes over.
    Imported {
        /// The batch.
        batch: Box<Batch>,
        /// Of the API key that sees it.
        fingerprint: String,
    },
    /// The job is held, and nothing of it runs.
    Suspended,
    /// A dry run has found all that a submission needs.
    Validated {
        /// `None`: the input is somebody else's file.
        input: Option<InputFacts>,
    },
    /// The input is split: from now on its parts are what they are.
    Planned {
        /// How many requests it holds.
        requests: i64,
        /// The parts.
        shards: Box<Shards>,
    },
    /// What is known of the parts.
    Sharded(Box<Seen>),
    /// The batch is to be cancelled.
    Cancelling {
        /// Why: `Suspended` or `DeadlineExceeded`.
        reason: Reason,
    },
    /// The batch is over and what it left is collected, but the job goes on.
    AttemptEnded(Box<End>),
    /// The hint was acted on, and Gemini says that the batch still runs.
    HintObserved {
        /// What it is known by: see [`Callback::hint`].
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
        /// What it is known by: see [`Callback::hint`].
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
    let no_send = job.metadata.deletion_timestamp.is_some() || is_finished(job) || job.spec.suspend;
    if no_send || !job.spec.has_own_input() {
        return false;
    }
    if job.spec.sharding.is_some() {
        return sharded::needs_input(job, memory);
    }
    match current_attempt(job) {
        None => true,
        Some(a) if a.outcome.is_some() => true,
        Some(a) if a.refusal.is_some() => true,
        // Uploaded: with another key the send begins anew.
        Some(a) => match stage_of(a, memory) {
            Some(Stage::NotUploaded | Stage::Unsent | Stage::Uploaded { .. }) => true,
            Some(Stage::Unsure(search)) => search.listed_behind_fence,
            _ => false,
        },
    }
}

/// Whether anything is left to do that may need the API key.
#[must_use]
pub fn needs_credential(job: &GeminiBatchJob) -> bool {
    !is_finished(job) || has_finalizer(job) || contradicted(job).is_some()
}

/// Whether the API key would only serve a new submission now: nothing of the job is, or may be, at Gemini.
#[must_use]
pub fn only_to_submit(job: &GeminiBatchJob, memory: &Memory) -> bool {
    if job.metadata.deletion_timestamp.is_some() || is_finished(job) {
        return false;
    }
    let Some(a) = current_attempt(job) else { return true };
    let unsent =
        matches!(stage_of(a, memory), Some(Stage::NotUploaded | Stage::Unsent | Stage::Uploaded { .. }));
    a.batch_name.is_none() && (a.refusal.is_some() || unsent)
}

/// What to do next.
#[must_use]
pub fn decide(o: &Observed<'_>, now: Timestamp) -> Decision {
    let decision = next(o, now);
    if is_finished(o.job) || o.job.metadata.deletion_timestamp.is_some() {
        return decision;
    }
    lifecycle::not_beyond_the_deadline(o, decision, now)
}

fn next(o: &Observed<'_>, now: Timestamp) -> Decision {
    if o.job.metadata.deletion_timestamp.is_some() {
        return cleanup::deleting(o, now);
    }
    if is_finished(o.job) {
        return cleanup::after_the_end(o, now);
    }
    if !has_finalizer(o.job) {
        return record(Change::AddFinalizer);
    }
    if sharded::is_planned(o.job) {
        return sharded::next(o, now);
    }
    if let Some(trouble) = o.memory.trouble.as_ref().filter(|t| t.next > now) {
        if let Some(decision) = lifecycle::despite_trouble(o, now) {
            return decision;
        }
        return in_trouble(o, trouble, now);
    }
    if let Some(transfer) = &o.memory.transfer {
        return lifecycle::despite_trouble(o, now).unwrap_or_else(|| Decision::Wait {
            say: Some(Box::new(waiting(transfer, false))),
            wake: Wake::OnChange, // it is woken
        });
    }
    match current_attempt(o.job) {
        None => submission::before_submission(o, now),
        Some(a) if a.outcome.is_some() => lifecycle::next_attempt(o, a, now),
        Some(a) => match (&a.batch_name, &a.refusal) {
            (Some(name), _) => match BatchName::parse(name) {
                Ok(name) => running::submitted(o, a, name, now),
                Err(_) => stalled(&Problem::new(
                    Reason::BatchNotFound,
                    "status.attempts[].batchName is not the name of a Gemini batch; \
                     it was changed by something else than this operator",
                )),
            },
            (None, Some(refusal)) => submission::refused(o, a, refusal, now),
            (None, None) => submission::submitting(o, a, now),
        },
    }
}

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
    let stalled = !matches!(trouble.problem.reason, Reason::GeminiUnavailable | Reason::StoreUnavailable);
    let long = trouble.next > after(now, o.timings.trouble_longest);
    let say = (trouble.failures >= 2 || long).then(|| {
        let results = paid_for(o).filter(|_| trouble.problem.reason != Reason::GeminiUnavailable);
        Box::new(Change::Waiting {
            problem: trouble.problem.clone(),
            stalled,
            results: results.map(Box::new),
        })
    });
    Decision::Wait { say, wake: Wake::At(trouble.next) }
}

/// What is known of results that are there and can't be stored for now.
fn paid_for(o: &Observed<'_>) -> Option<Results> {
    let a = current_attempt(o.job).filter(|a| a.outcome.is_none())?;
    let Some(Remote::Seen(batch)) = &o.memory.remote else { return None };
    let collected = o.memory.collected.as_ref();
    batch.is_terminal().then(|| {
        let results = ending::results(o.job, a, Some(batch), collected, None);
        // Nothing is counted before it was read.
        Results { requests: results.requests.filter(|_| collected.is_some()), ..results }
    })
}

/// The attempt that counts: the last one.
#[must_use]
pub fn current_attempt(job: &GeminiBatchJob) -> Option<&Attempt> {
    job.status.as_ref()?.attempts.iter().max_by_key(|a| a.number)
}

/// The attempt that is under way, or comes next.
#[must_use]
pub fn attempt_at_hand(job: &GeminiBatchJob) -> i32 {
    number_after(current_attempt(job))
}

/// The number of the attempt that goes on after this one: the same, unless it is over.
fn number_after(before: Option<&Attempt>) -> i32 {
    before.map_or(1, |a| a.number + i32::from(a.outcome.is_some()))
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

/// A callback that was not acted on yet.
#[must_use]
pub fn new_hint(job: &GeminiBatchJob, a: &Attempt) -> Option<String> {
    let callback = job.status.as_ref()?.callback.as_ref()?;
    Some(callback.hint()).filter(|hint| a.observed_hint.as_ref() != Some(hint))
}

/// A callback that was not looked into yet and that says another end than the one recorded.
#[must_use]
pub fn contradicted(job: &GeminiBatchJob) -> Option<(&Attempt, &Callback)> {
    let callback = job.status.as_ref()?.callback.as_ref().filter(|_| is_finished(job))?;
    // One about an earlier attempt, which is over, says nothing about this one.
    let attempt = current_attempt(job).filter(|a| a.number == callback.attempt)?;
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

/// Whether it is not known if the job has a batch.
#[must_use]
pub fn is_unconfirmed(job: &GeminiBatchJob) -> bool {
    let stalled = job.status.as_ref().and_then(|s| conditions::get(&s.conditions, conditions::STALLED));
    let reason = Reason::SubmissionUnconfirmed.as_str();
    stalled.is_some_and(|c| c.status == "True" && c.reason == reason)
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
