//! How a job ends and what it says on the way: counts, reasons and messages. Pure: no client required.
//!
//! Every message says what happened and, where somebody can do something, what to change. None quotes a
//! request, a response or a message of Gemini's, which may quote them.

use std::fmt::Write as _;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Problem;
use super::collect::Collected;
use super::decide::Results;
use super::destination::{Destination, Placed};
use super::memory::{Refused, after};
use super::request;
use super::retry;
use crate::api::conditions::cut;
use crate::api::{
    Attempt, GeminiBatchJob, Method, Outcome, OutputStatus, RESEND_ANNOTATION, Reason, Refusal, RefusedCall,
    RequestCounts, Retention, State,
};
use crate::gemini::{Batch, BatchName, BatchState, Error, Hint};

/// Until then the result file is certain to exist: the shortest life that was ever reported. (Google's
/// guide says six weeks.)
pub const RESULT_LIFE: SignedDuration = SignedDuration::from_hours(48);

/// Keys named in a message, each cut to this many bytes.
const NAMED_KEYS: usize = 5;
const NAMED_KEY_BYTES: usize = 64;

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// The last state.
    pub state: State,
    /// The last reason.
    pub reason: Reason,
    /// What happened.
    pub message: String,
    /// Counts, tokens and where the results are.
    pub results: Results,
    /// The batch's last state in Gemini's words, without the prefix.
    pub remote_state: Option<String>,
    /// When Gemini says that the batch ended.
    pub end_time: Option<Timestamp>,
    /// The refusal that ended the job.
    pub refusal: Option<Refusal>,
    /// The callback that led here.
    pub hint: Option<String>,
}

/// The end of a job whose batch has ended, or is gone.
#[must_use]
pub fn ended(
    job: &GeminiBatchJob,
    a: &Attempt,
    batch: Option<&Batch>,
    collected: Option<&Collected>,
    stored: Option<&Placed>,
    hint: Option<String>,
) -> End {
    let results = results(job, a, batch, collected, stored);
    let counts = results.requests.unwrap_or_default();
    // Every request had its turn before: whatever became of the batch that sent failed ones again, it takes nothing away.
    let finished = batch.is_some_and(|b| b.state == BatchState::Succeeded)
        && collected.is_some_and(|c| c.unanswered_lines == 0);
    let verdict = if retry::was_whole(job) && !finished {
        let (state, reason, message) = bettered_in_vain(a, batch, collected, counts);
        let elsewhere = if stored.is_none() { elsewhere(job, counts) } else { "" };
        (state, reason, message + elsewhere)
    } else {
        verdict(a, batch, collected, counts)
    };
    let (state, reason, message) = by_success_policy(job, counts, verdict);
    End {
        state,
        reason,
        message,
        results,
        remote_state: batch.map(|b| b.state.as_str().to_owned()),
        end_time: batch.and_then(|b| b.end_time),
        refusal: None,
        hint,
    }
}

/// Why the job goes on although the batch of this attempt has ended; `None` if that is the end of the job.
///
/// What GET says wins: a batch that succeeded whole is the end, whoever wanted to cancel it. A batch that Gemini
/// does not show any more is never followed by another one: nobody knows whether it is over.
#[must_use]
pub fn goes_on(
    job: &GeminiBatchJob,
    a: &Attempt,
    batch: Option<&Batch>,
    collected: Option<&Collected>,
) -> Option<Reason> {
    let state = batch?.state;
    // Without what earlier attempts left it can't be told what is missing.
    let blind = collected.is_some_and(|c| c.without_earlier);
    if blind || job.spec.import_from.is_some() {
        return None;
    }
    let reason = match (cancelled_for(a), state) {
        (None, BatchState::Cancelled) | (Some(Reason::DeadlineExceeded), _) => return None,
        (None, BatchState::Succeeded) => Reason::RequestsFailed,
        (Some(_), BatchState::Succeeded) if collected.is_none_or(|c| c.unanswered_lines == 0) => {
            Reason::RequestsFailed
        }
        (Some(_), _) => Reason::Suspended,
        (None, BatchState::Expired) => Reason::BatchExpired,
        (None, _) => Reason::BatchFailed,
    };
    let retry = retried_after(job, reason);
    let to_send = collected.and_then(|c| c.to_send(retry));
    let allowed = match reason {
        Reason::Suspended => true,
        Reason::RequestsFailed => retry && to_send.is_some(),
        _ => failures(job) < job.spec.backoff_limit,
    };
    (allowed && to_send != Some(0)).then_some(reason)
}

/// Whether the batch of the attempt was not worked on to its end: then some errors only say that.
#[must_use]
pub fn cut_short(a: &Attempt, batch: Option<&Batch>) -> bool {
    a.cancellation.is_some() || batch.is_none_or(|b| b.state != BatchState::Succeeded)
}

/// Whether the attempt after one that ends so carries failed requests as well.
fn retried_after(job: &GeminiBatchJob, reason: Reason) -> bool {
    let counts = i32::from(reason != Reason::Suspended);
    retry::allowed_after(job, retry::tries(job).saturating_add(counts))
}

/// The end of a job between two attempts of which the next one is not allowed any more.
#[must_use]
pub fn limit_reached(job: &GeminiBatchJob, a: &Attempt) -> Option<End> {
    let ended = &a.outcome.as_ref()?.reason;
    if ended == Reason::RequestsFailed.as_str() && !retry::allowed_after(job, retry::tries(job)) {
        let message = format!(
            "the requests that failed in attempt {} are not sent again, since spec.retryPolicy does not allow it any more",
            a.number
        );
        return Some(stopped(job, State::Succeeded, Reason::CompletedWithFailures, message));
    }
    let reason = [Reason::BatchExpired, Reason::BatchFailed].into_iter().find(|r| r.as_str() == ended)?;
    if failures(job) <= job.spec.backoff_limit {
        return None;
    }
    let message = format!(
        "attempt {} ended as {ended}, and spec.backoffLimit ({}) allows no further one{}",
        a.number,
        job.spec.backoff_limit,
        partial(job.status.as_ref().and_then(|s| s.requests).unwrap_or_default())
    );
    Some(stopped(job, State::Failed, reason, message))
}

/// The end of a job between two attempts that turns out to have all its results.
#[must_use]
pub fn nothing_missing(job: &GeminiBatchJob) -> End {
    let counts = job.status.as_ref().and_then(|s| s.requests).unwrap_or_default();
    by_counts(job, counts, "no request is left for a further attempt")
}

/// Why the operator wanted the batch cancelled, if it did.
#[must_use]
pub fn cancelled_for(a: &Attempt) -> Option<Reason> {
    let reason = a.cancellation.as_ref()?.reason.as_str();
    Some(if reason == Reason::DeadlineExceeded.as_str() {
        Reason::DeadlineExceeded
    } else {
        Reason::Suspended
    })
}

/// Earlier attempts that Gemini did not finish. Those that were suspended do not count, nor those in which only requests
/// failed.
fn failures(job: &GeminiBatchJob) -> i32 {
    let attempts = job.status.as_ref().map_or(&[][..], |s| &s.attempts);
    let failed = attempts.iter().filter_map(|a| a.outcome.as_ref());
    let failed = failed
        .filter(|o| o.reason == Reason::BatchFailed.as_str() || o.reason == Reason::BatchExpired.as_str());
    let failed = failed.count();
    i32::try_from(failed).unwrap_or(i32::MAX)
}

/// The end of an attempt after which the job goes on.
#[must_use]
pub fn attempt_ended(
    job: &GeminiBatchJob,
    a: &Attempt,
    batch: Option<&Batch>,
    collected: Option<&Collected>,
    stored: Option<&Placed>,
    hint: Option<String>,
    reason: Reason,
) -> End {
    let mut results = results(job, a, batch, collected, stored);
    if let Some(counts) = &mut results.requests {
        counts.failed = match collected {
            Some(c) if retried_after(job, reason) => c.failed_lines - c.unanswered_lines - c.retryable_lines,
            Some(c) => c.failed_lines - c.unanswered_lines,
            None => last_outcome(job).map_or(0, |o| o.failed),
        };
        counts.pending = counts.total - counts.succeeded - counts.failed;
    }
    let counts = results.requests.unwrap_or_default();
    let what = match reason {
        Reason::BatchExpired => "Gemini gave the batch up after its time limit".to_owned(),
        Reason::Suspended => "the batch was cancelled, as spec.suspend and spec.suspendPolicy say".to_owned(),
        Reason::RequestsFailed => "the batch has ended, and some requests failed".to_owned(),
        _ => format!("Gemini says that the batch failed{}", code_of(batch)),
    };
    let further = if reason == Reason::RequestsFailed {
        let most = job.spec.retry_policy.as_ref().map_or(1, |policy| policy.max_attempts);
        let when = if job.spec.suspend { ", once spec.suspend is false" } else { "" };
        format!(
            "a further batch carries the {} that spec.retryPolicy sends again (try {} of {most}){when}",
            counts.pending,
            retry::tries(job) + 2
        )
    } else if reason == Reason::Suspended && job.spec.suspend {
        "further ones wait until spec.suspend is false".to_owned()
    } else if reason == Reason::Suspended {
        format!("a further batch carries the other {}", counts.pending)
    } else {
        format!(
            "a further batch carries the other {} (failure {} of the {} that spec.backoffLimit allows to be followed by \
             another batch)",
            counts.pending,
            failures(job) + 1,
            job.spec.backoff_limit
        )
    };
    End {
        state: State::Pending,
        reason,
        message: format!(
            "{what}; {} of {} requests have a response; {further}",
            counts.succeeded, counts.total
        ),
        results,
        remote_state: batch.map(|b| b.state.as_str().to_owned()),
        end_time: batch.and_then(|b| b.end_time),
        refusal: None,
        hint,
    }
}

/// The end of a job that has all the results that it will have, as far as requests go.
fn by_counts(job: &GeminiBatchJob, counts: RequestCounts, what: &str) -> End {
    let counts = RequestCounts { failed: counts.total - counts.succeeded, pending: 0, ..counts };
    let message = format!("{}; {what}", tell(counts));
    let message = message + elsewhere(job, counts);
    let (state, reason) = judge(counts);
    let (state, reason, message) = by_success_policy(job, counts, (state, reason, message));
    End { results: Results { requests: Some(counts), ..Results::default() }, ..bare(state, reason, message) }
}

/// What was stored under another name, or nowhere, before the output was changed stays there if no further batch ends.
fn elsewhere(job: &GeminiBatchJob, counts: RequestCounts) -> &'static str {
    let output = job.status.as_ref().and_then(|s| s.output.as_ref());
    match Destination::of(job) {
        Some(wanted) if counts.succeeded > 0 && !output.is_some_and(|o| wanted.is_in(o)) => {
            "; spec.output was changed since, and the results are where status.output and \
             status.attempts[].outcome.outputFile say"
        }
        _ => "",
    }
}

/// By what became of the requests alone.
fn judge(counts: RequestCounts) -> (State, Reason) {
    match (counts.succeeded, counts.total) {
        (0, _) => (State::Failed, Reason::AllRequestsFailed),
        (succeeded, total) if succeeded < total => (State::Succeeded, Reason::CompletedWithFailures),
        _ => (State::Succeeded, Reason::Completed),
    }
}

fn tell(counts: RequestCounts) -> String {
    match (counts.succeeded, counts.failed) {
        (0, _) => "no request has a response".to_owned(),
        (_, 0) => format!("all {} requests succeeded", counts.total),
        (succeeded, failed) => format!("{succeeded} of {} requests succeeded, {failed} failed", counts.total),
    }
}

/// The end of a job between two attempts: nothing of it is at Gemini. Where only failed requests would have been sent
/// again, it is the end that it would have had without.
#[must_use]
pub fn stopped(job: &GeminiBatchJob, state: State, reason: Reason, message: String) -> End {
    let counts = job.status.as_ref().and_then(|s| s.requests);
    if let Some(counts) = counts.filter(|_| retry::was_whole(job)) {
        return by_counts(job, counts, &message);
    }
    let requests = counts.map(|c| RequestCounts { failed: c.total - c.succeeded, pending: 0, ..c });
    End { results: Results { requests, ..Results::default() }, ..bare(state, reason, message) }
}

/// An end of which nothing else is known.
fn bare(state: State, reason: Reason, message: String) -> End {
    End {
        state,
        reason,
        message,
        results: Results::default(),
        remote_state: None,
        end_time: None,
        refusal: None,
        hint: None,
    }
}

/// The deadline passed while nothing was at Gemini.
#[must_use]
pub fn deadline_exceeded(job: &GeminiBatchJob, seconds: i64) -> End {
    let message = format!(
        "spec.activeDeadlineSeconds ({seconds}) have passed since status.startTime, and no batch runs{}",
        partial(job.status.as_ref().and_then(|s| s.requests).unwrap_or_default())
    );
    stopped(job, State::Failed, Reason::DeadlineExceeded, message)
}

/// No further attempt is possible.
#[must_use]
pub fn no_further_attempt(job: &GeminiBatchJob, a: &Attempt, reason: Reason) -> End {
    let why = match reason {
        Reason::InputChanged => {
            "its input is not the one that the first attempt was made of, so it can't be told what is missing"
        }
        Reason::AttemptsExhausted => "it had as many attempts as a job can have",
        _ => {
            "the operator does not know the requests of its input file, so it can't be told which are missing"
        }
    };
    let ended = a.outcome.as_ref().map_or("", |o| o.reason.as_str());
    let message = format!(
        "attempt {} ended as {ended}, and there is no further one: {why}{}. Create a new GeminiBatchJob for the rest",
        a.number,
        partial(job.status.as_ref().and_then(|s| s.requests).unwrap_or_default())
    );
    stopped(job, State::Failed, reason, message)
}

/// What the last attempt that is over had.
fn last_outcome(job: &GeminiBatchJob) -> Option<&Outcome> {
    let attempts = &job.status.as_ref()?.attempts;
    attempts.iter().filter(|a| a.outcome.is_some()).max_by_key(|a| a.number)?.outcome.as_ref()
}

fn code_of(batch: Option<&Batch>) -> String {
    batch.and_then(|b| b.error.as_ref()).map_or_else(String::new, |e| format!(" (code {})", e.code))
}

fn partial(counts: RequestCounts) -> String {
    if counts.succeeded > 0 {
        format!("; {} of {} requests have a response, which was collected", counts.succeeded, counts.total)
    } else {
        "; no request has a response".to_owned()
    }
}

/// A success, unless more requests failed than the job allows.
#[must_use]
pub fn by_success_policy(
    job: &GeminiBatchJob,
    counts: RequestCounts,
    (state, reason, message): (State, Reason, String),
) -> (State, Reason, String) {
    let Some(policy) = job.spec.success_policy.as_ref().filter(|_| state == State::Succeeded) else {
        return (state, reason, message);
    };
    if counts.failed <= policy.allowed(counts.total) {
        return (state, reason, message);
    }
    let limit = policy.as_written();
    let message = format!("{message}: more than spec.successPolicy.maxFailedRequests ({limit}) allows");
    (State::Failed, Reason::TooManyFailedRequests, message)
}

/// The end of a job whose failed requests were sent again in a batch that was not finished.
fn bettered_in_vain(
    a: &Attempt,
    batch: Option<&Batch>,
    collected: Option<&Collected>,
    counts: RequestCounts,
) -> (State, Reason, String) {
    let what = match (batch.map(|b| b.state), collected) {
        (None, _) => "does not exist at Gemini any more".to_owned(),
        (Some(BatchState::Succeeded), None) => {
            "succeeded, but its result file can't be read with this API key".to_owned()
        }
        (Some(BatchState::Succeeded), _) => "was not finished".to_owned(),
        (Some(state), _) => format!("ended as {}", state.as_str()),
    };
    let why = match cancelled_for(a) {
        Some(Reason::DeadlineExceeded) => ", since spec.activeDeadlineSeconds had passed",
        _ => "",
    };
    let (state, reason) = judge(counts);
    let odd = collected.map_or_else(String::new, |c| details(c, counts));
    let again = a.request_count.unwrap_or_default();
    let message = format!(
        "{}; the batch of attempt {}, which carried {again} of them again, {what}{why}{odd}",
        tell(counts),
        a.number
    );
    (state, reason, message)
}

/// The results of all shards are more than the destination takes.
#[must_use]
pub fn shards_too_large(at: &Destination, bytes: i64) -> Problem {
    let what = match at {
        Destination::ConfigMap(_) => {
            "They are kept in one ConfigMap for each shard (NAME-0000-results and so on). Set spec.output.objectStore instead \
             of spec.output.configMap; or read them there, then delete this job"
        }
        Destination::Store(_) => {
            "They are kept below it for each shard (shards/0000/manifest.json and so on): read them there, then delete this \
             job"
        }
    };
    Problem::new(
        Reason::OutputTooLarge,
        format!("the results of all shards are {bytes} bytes, more than {at} can hold. {what}"),
    )
}

/// A sharded job was deleted before its end, and its shards with it.
#[must_use]
pub fn shards_deleted(job: &GeminiBatchJob) -> Problem {
    Problem::new(
        Reason::Cancelled,
        format!("the jobs of its shards were deleted with it{}", kept_results(job)),
    )
}

/// The same, and some of them take longer.
#[must_use]
pub fn shards_going(job: &GeminiBatchJob) -> Problem {
    let what = format!(
        "spec.deletionTimeoutSeconds have passed; the jobs of its shards that are still being deleted tell by themselves \
         what becomes of their batches{}",
        kept_results(job)
    );
    Problem::new(Reason::Deleted, what)
}

fn kept_results(job: &GeminiBatchJob) -> &'static str {
    let retention = job.spec.output.as_ref().map(|output| output.retention).unwrap_or_default();
    match retention {
        Retention::Retain => {
            "; results that single shards had stored are kept, in the ConfigMaps NAME-results"
        }
        Retention::Delete => "",
    }
}

fn verdict(
    a: &Attempt,
    batch: Option<&Batch>,
    collected: Option<&Collected>,
    counts: RequestCounts,
) -> (State, Reason, String) {
    // However the batch ended: if every request was answered, nothing is missing.
    let answered = counts.succeeded > 0 && collected.is_some_and(|c| c.open() == Some(0));
    let whole = collected.is_none_or(|c| c.unanswered_lines == 0);
    let state = batch.map(|b| if answered { BatchState::Succeeded } else { b.state });
    if cancelled_for(a) == Some(Reason::DeadlineExceeded)
        && !matches!(state, Some(BatchState::Succeeded) if whole)
        && state.is_some()
    {
        let message = format!(
            "the batch was cancelled, since spec.activeDeadlineSeconds had passed{}",
            partial(counts)
        );
        return (State::Failed, Reason::DeadlineExceeded, message);
    }
    let partial = partial(counts);
    match state {
        Some(BatchState::Succeeded) => match collected {
            None => (
                State::Failed,
                Reason::ResultsLost,
                "Gemini says that the batch succeeded, but its result file can't be read with this API key; \
                 status.output.fileName names it"
                    .to_owned(),
            ),
            Some(c) if counts.succeeded == 0 => (
                State::Failed,
                Reason::AllRequestsFailed,
                format!("no request has a response{}", details(c, counts)),
            ),
            Some(c) => {
                let (state, reason) = judge(counts);
                (state, reason, tell(counts) + &details(c, counts))
            }
        },
        Some(BatchState::Expired) => (
            State::Failed,
            Reason::BatchExpired,
            format!("Gemini gave the batch up after its time limit{partial}; smaller jobs finish sooner"),
        ),
        Some(BatchState::Cancelled) => (
            State::Cancelled,
            Reason::BatchCancelled,
            if a.cancellation.is_some() {
                format!("the batch was cancelled, as this job asked{partial}")
            } else {
                format!("the batch was cancelled at Gemini, not by this operator{partial}")
            },
        ),
        Some(_) => (
            State::Failed,
            Reason::BatchFailed,
            format!("Gemini says that the batch failed{}{partial}", code_of(batch)),
        ),
        None => (
            State::Failed,
            Reason::BatchNotFound,
            format!(
                "the batch does not exist at Gemini any more: somebody deleted it, or this API key may not \
                 see it{partial}"
            ),
        ),
    }
}

/// What is odd about the results, each part only where there is something to say.
fn details(c: &Collected, counts: RequestCounts) -> String {
    let mut text = String::new();
    if !c.failed.is_empty() {
        let named: Vec<String> = c
            .failed
            .iter()
            .take(NAMED_KEYS)
            .map(|(key, code)| match code {
                Some(code) => format!("{} (code {code})", short(key)),
                None => short(key),
            })
            .collect();
        let _ = write!(text, "; errors: {}{}", named.join(", "), more(c.failed_lines, named.len()));
    }
    if c.missing_keys > 0 {
        let named: Vec<String> = c.missing.iter().take(NAMED_KEYS).map(|k| short(k)).collect();
        let _ = write!(
            text,
            "; {} without any result: {}{}",
            c.missing_keys,
            named.join(", "),
            more(c.missing_keys, named.len())
        );
    }
    let without = counts.total - c.succeeded_lines - c.failed_lines;
    if !c.joined && without > 0 {
        let _ = write!(text, "; {without} without any result, and without the input it can't be told which");
    }
    for (count, what) in [
        (c.duplicate_lines, "lines repeat a key (a response counts, else the first one)"),
        (c.foreign_lines, "lines have a key that was not sent"),
        (c.malformed_lines, "lines can't be read"),
    ] {
        if count > 0 {
            let _ = write!(text, "; {count} {what}");
        }
    }
    if c.without_earlier {
        text.push_str(
            "; the result files of earlier attempts (status.attempts[].outcome.outputFile) can't be read any more, so what \
             they hold is counted, but not among these results",
        );
    }
    if !c.joined && c.input_changed {
        text.push_str(
            "; the input was changed after the submission, or can't be read any more, so the results are stored as \
             they came, not joined with it",
        );
    }
    text
}

fn short(key: &str) -> String {
    let cut_key = cut(key, NAMED_KEY_BYTES);
    if cut_key.len() < key.len() { format!("{cut_key}…") } else { key.to_owned() }
}

fn more(all: i64, named: usize) -> String {
    match all - i64::try_from(named).unwrap_or(i64::MAX) {
        n if n > 0 => format!(" and {n} more"),
        _ => String::new(),
    }
}

/// What is known of the results.
#[must_use]
pub fn results(
    job: &GeminiBatchJob,
    a: &Attempt,
    batch: Option<&Batch>,
    collected: Option<&Collected>,
    stored: Option<&Placed>,
) -> Results {
    // The first attempt carried all requests.
    let first = job.status.as_ref().and_then(|s| s.attempts.iter().find(|first| first.number == 1));
    let known = first.unwrap_or(a).request_count;
    let known = known.or_else(|| batch.and_then(|b| b.stats).map(|s| s.total));
    let earlier = last_outcome(job);
    let before = earlier.map_or(0, |o| o.succeeded);
    let succeeded =
        collected.map_or(before, |c| c.succeeded_lines + if c.without_earlier { before } else { 0 });
    let lines = collected.map_or(succeeded, |c| c.succeeded_lines + c.failed_lines);
    let total = known.unwrap_or(lines).max(succeeded);
    // Also one that could not be read, if it should be there: what it holds is paid for.
    let should_be = |b: &&Batch| {
        let counted = b.stats.is_some_and(|s| s.succeeded > 0);
        b.inlined.is_none() && (b.state == BatchState::Succeeded || (collected.is_none() && counted))
    };
    let file = collected
        .and_then(|c| c.file.clone())
        .or_else(|| batch.filter(should_be).map(|b| b.output_file_or_derived().to_string()));
    Results {
        requests: Some(RequestCounts { total, succeeded, failed: total - succeeded, pending: 0 }),
        usage: collected.map(|c| c.usage),
        output: (file.is_some() || stored.is_some()).then(|| OutputStatus {
            file_name: file,
            expiration_time: batch.and_then(|b| b.end_time).map(|t| Time(after(t, RESULT_LIFE))),
            bytes: collected.map(|c| c.bytes),
            sha256: collected.map(|c| c.sha256.clone()),
            ..stored.map(Placed::status).unwrap_or_default()
        }),
    }
}

/// The end of a job that Gemini refused for good.
#[must_use]
pub fn refused(job: &GeminiBatchJob, a: &Attempt, refused: &Refused) -> End {
    if a.number > 1 {
        // Earlier attempts have results.
        let end = stopped(job, State::Failed, refused.reason, refused.message.clone());
        return End { refusal: Some(refused.refusal.clone()), ..end };
    }
    End {
        state: State::Failed,
        reason: refused.reason,
        message: refused.message.clone(),
        results: Results {
            requests: a.request_count.map(|total| RequestCounts {
                total,
                succeeded: 0,
                failed: total,
                pending: 0,
            }),
            ..Results::default()
        },
        remote_state: None,
        end_time: None,
        refusal: Some(refused.refusal.clone()),
        hint: None,
    }
}

/// What to tell the user of a refusal that may pass.
#[must_use]
pub fn refusal_problem(refusal: &Refusal) -> Problem {
    let call = match refusal.call {
        RefusedCall::Upload => "the upload of the input file",
        RefusedCall::Create => "the creation of the batch",
    };
    let code = refusal.code;
    let text = match refusal.reason.as_str() {
        "WaitingForQuota" => {
            return Problem::new(
                Reason::WaitingForQuota,
                format!(
                    "Gemini refused {call} for lack of quota (HTTP {code}); nothing was created, it is tried again"
                ),
            );
        }
        "WebhookRefused" => {
            return Problem::new(
                Reason::WebhookRefused,
                format!(
                    "Gemini refused the webhook that was asked for with the batch (HTTP {code}); nothing was created. It is \
                     sent again without one, and its end is found by polling"
                ),
            );
        }
        "CredentialsRefused" => {
            return Problem::new(
                Reason::CredentialsRefused,
                format!(
                    "Gemini refused the API key for {call} (HTTP {code}); nothing was created. Put a valid key \
                     into the Secret that spec.credentials.secretRef names, or allow this one to use the Gemini API"
                ),
            );
        }
        "InputFileNotFound" => format!(
            "Gemini did not find what {call} needs (HTTP {code}); nothing was created, it is tried again with a new input \
             file. If this stays so, see whether spec.model takes batches with this API key"
        ),
        _ => format!(
            "Gemini refused {call} (HTTP {code}); nothing was created, it is tried again. If this stays so, see whether \
             the API key's project, location and billing allow batches"
        ),
    };
    let reason = Reason::ALL.into_iter().find(|r| r.as_str() == refusal.reason);
    Problem::new(reason.unwrap_or(Reason::PreconditionFailed), text)
}

/// Whether somebody has to change something after a refusal for this reason.
#[must_use]
pub fn refusal_stalls(reason: Reason) -> bool {
    !matches!(reason, Reason::WaitingForQuota | Reason::WebhookRefused)
}

/// It is not known whether the batch was created.
#[must_use]
pub fn unconfirmed(a: &Attempt, theirs: bool, grace: SignedDuration) -> Problem {
    let again = if theirs {
        format!(
            "Its input is not the operator's to delete, so nothing can make sure that a late creation fails, and it is \
             not sent again by itself. If you are sure, annotate the job with {RESEND_ANNOTATION}={}",
            a.send_id
        )
    } else {
        format!(
            "If it stays unfound for {} minutes, its input file is deleted, so that a late creation must fail, and only \
             then it is sent again",
            grace.as_mins()
        )
    };
    Problem::new(
        Reason::SubmissionUnconfirmed,
        format!(
            "it is not known whether Gemini created the batch: its answer was lost. It is looked for under the \
             display name {}, so that it is not paid for twice. {again}. To give it up, delete this job",
            a.display_name
        ),
    )
}

/// Another key than the one that the batch was sent with.
#[must_use]
pub fn credentials_changed(consequence: &str) -> Problem {
    Problem::new(
        Reason::CredentialsChanged,
        format!(
            "the API key is not the one that the batch was sent with, and {consequence}: put back the old key, or \
             a key of the same project that may see the batch"
        ),
    )
}

/// Gemini does not show the batch.
#[must_use]
pub fn missing(name: &BatchName) -> Problem {
    Problem::new(
        Reason::GeminiUnavailable,
        format!("Gemini does not show {name} at the moment; it is asked again before the job is given up"),
    )
}

/// The result file can't be read yet.
#[must_use]
pub fn not_readable(name: &BatchName, give_up: Timestamp) -> Problem {
    Problem::new(
        Reason::ResultsNotReadable,
        format!(
            "{name} has ended, but its result file can't be read yet; it is tried until {}",
            give_up.strftime("%Y-%m-%dT%H:%M:%SZ")
        ),
    )
}

/// The results do not fit.
#[must_use]
pub fn too_large(name: &Destination, bytes: i64, batch: Option<&Batch>) -> Problem {
    let problem = Problem::new(
        Reason::OutputTooLarge,
        format!(
            "the results ({bytes} bytes) do not fit into {name}, which holds at most 1 MiB. Name a place in an object store \
             (spec.output.objectStore) instead, or remove spec.output to finish the job with the results left in the file \
             that status.output.fileName names"
        ),
    );
    kept_at_gemini(&problem, batch)
}

/// What stands in the way of results that are there: how much time there is to change it.
#[must_use]
pub fn kept_at_gemini(problem: &Problem, batch: Option<&Batch>) -> Problem {
    let Some(ended) = batch.and_then(|b| b.end_time) else { return problem.clone() };
    let until = after(ended, RESULT_LIFE).strftime("%Y-%m-%dT%H:%M:%SZ");
    Problem::new(
        problem.reason,
        format!(
            "{}. Until {until} at least, Gemini keeps the results",
            problem.message.trim_end_matches('.')
        ),
    )
}

/// A callback came after the end and said something else.
#[must_use]
pub fn contradicted(a: &Attempt, event: &str, seen: Option<&Batch>) -> Problem {
    let batch = a.batch_name.as_deref().unwrap_or_default();
    let known = a.remote_state.as_deref().unwrap_or_default();
    let now = match seen {
        None => "Gemini could not be asked again".to_owned(),
        Some(b) if b.state.as_str() == known => format!("Gemini still says {known}"),
        Some(b) if b.state == BatchState::Succeeded => {
            format!("Gemini says SUCCEEDED now, and its result file is {}", b.output_file_or_derived())
        }
        Some(b) => format!("Gemini says {} now", b.state.as_str()),
    };
    Problem::new(
        Reason::ContradictingCallback,
        format!(
            "a callback said {event} of {batch}, which had ended as {known}; {now}. The job stays as it is"
        ),
    )
}

/// The batch is being cancelled, and Gemini has not said yet how it ends.
#[must_use]
pub fn cancelling(name: &BatchName, reason: Reason) -> Problem {
    let why = if reason == Reason::DeadlineExceeded {
        "spec.activeDeadlineSeconds have passed"
    } else {
        "spec.suspend and spec.suspendPolicy say so"
    };
    Problem::new(
        Reason::Cancelling,
        format!("{name} is being cancelled, since {why}; it is watched until Gemini says how it ended"),
    )
}

/// The batch that shall be imported is not shown.
#[must_use]
pub fn nothing_to_import(name: &BatchName) -> Problem {
    Problem::new(
        Reason::BatchNotFound,
        format!(
            "Gemini does not show {name} to this API key: correct spec.importFrom.batchName, or name the key that it was \
             created with in spec.credentials"
        ),
    )
}

/// The job goes, but what `deletionPolicy: Delete` wanted gone at Gemini is still there.
#[must_use]
pub fn not_deleted(batch: &BatchName) -> Problem {
    Problem::new(
        Reason::Deleted,
        format!(
            "the job was deleted, but {batch} and its files could not be deleted at Gemini; it does not run, and its files \
             expire by themselves"
        ),
    )
}

/// The job is deleted, and its batch left alone, as it asked.
#[must_use]
pub fn left_alone(a: &Attempt) -> Problem {
    let batch = a.batch_name.as_deref().unwrap_or(&a.display_name);
    Problem::new(
        Reason::Deleted,
        format!("the job was deleted; {batch} is left alone at Gemini, as spec.deletionPolicy says (Orphan)"),
    )
}

/// The job is being deleted, and there is no key to cancel its batch with.
#[must_use]
pub fn deleted_without_key(a: &Attempt, problem: &Problem, deadline: Timestamp) -> Problem {
    let batch = a.batch_name.as_deref().unwrap_or("its batch");
    Problem::new(
        problem.reason,
        format!(
            "the job is being deleted, but {batch} can't be cancelled: {}. It is tried until {}; then the job goes, and \
             the batch may go on at Gemini",
            problem.message,
            deadline.strftime("%Y-%m-%dT%H:%M:%SZ")
        ),
    )
}

/// The whole namespace is being deleted, and the Secret went before the job.
#[must_use]
pub fn key_gone_with_namespace() -> Problem {
    Problem::new(
        Reason::CredentialsNotFound,
        "its namespace is being deleted, the Secret with the API key went first, and this operator did not have the key \
         in memory",
    )
}

/// The job was deleted while nobody knew whether it has a batch.
#[must_use]
pub fn deleted_unconfirmed(a: &Attempt) -> Problem {
    Problem::new(
        Reason::Deleted,
        format!(
            "it was never confirmed that Gemini had created the batch {}: it was looked for twice and not found, and its \
             input file was deleted in between, so that a creation under way must fail",
            a.display_name
        ),
    )
}

/// The job was deleted after its batch had ended and before its results were where they should be.
#[must_use]
pub fn deleted_after_end(batch: &Batch) -> Problem {
    let results = if batch.state == BatchState::Succeeded {
        format!("; its results stay with Gemini for a while, in {}", batch.output_file_or_derived())
    } else {
        String::new()
    };
    Problem::new(
        Reason::Deleted,
        format!("the job was deleted when {} had ended as {}{results}", batch.name, batch.state.as_str()),
    )
}

/// The job is being deleted, and Gemini does not do its part yet.
#[must_use]
pub fn not_cleaned_up(deadline: Timestamp) -> Problem {
    Problem::new(
        Reason::GeminiUnavailable,
        format!(
            "the job is being deleted, but Gemini can't be asked to stop its batch at the moment; it is tried \
             until {}",
            deadline.strftime("%Y-%m-%dT%H:%M:%SZ")
        ),
    )
}

/// The job goes, but its batch could not be stopped.
#[must_use]
pub fn orphaned(a: &Attempt, problem: Option<&Problem>) -> Problem {
    let batch = a.batch_name.as_deref().unwrap_or(&a.display_name);
    let why = problem.map_or_else(String::new, |p| format!(": {}", p.message));
    Problem::new(
        Reason::Orphaned,
        format!("the job was deleted, but {batch} could not be cancelled and may go on at Gemini{why}"),
    )
}

/// Gemini was asked whether the API key is valid, and said no.
#[must_use]
pub fn key_refused() -> Problem {
    Problem::new(
        Reason::CredentialsRefused,
        "Gemini refuses the API key. Put a valid key into the Secret that spec.credentials.secretRef names, or allow this one \
         to use the Gemini API",
    )
}

/// What a refusal by Gemini means for the user, and whether nothing that can still be changed would help;
/// `None` if the error is no refusal.
#[must_use]
pub fn refusal_of(call: RefusedCall, error: &Error, job: &GeminiBatchJob) -> Option<(Problem, bool)> {
    if !error.is_refusal() {
        return None;
    }
    let theirs = job.spec.gemini_file();
    let model = &job.spec.model;
    Some(if error.is_quota() {
        (Problem::new(Reason::WaitingForQuota, ""), false)
    } else if error.is_credentials() {
        (Problem::new(Reason::CredentialsRefused, ""), false)
    } else if call == RefusedCall::Create && error.hint() == Some(Hint::File) {
        match theirs {
            Some(file) => (
                Problem::new(
                    Reason::InputFileNotFound,
                    format!(
                        "{} does not exist at Gemini, or not for this API key: uploads live for 48 hours. Create a \
                         new GeminiBatchJob with a file that exists",
                        file.name
                    ),
                ),
                true,
            ),
            // Ours expired between two sends: the next one uploads it again.
            None => (Problem::new(Reason::InputFileNotFound, ""), false),
        }
    } else if call == RefusedCall::Create && error.http_code() == 404 && error.hint() == Some(Hint::Model) {
        (
            Problem::new(
                Reason::ModelNotFound,
                match job.spec.method {
                    Method::GenerateContent => format!(
                        "Gemini has no model {model} that takes batches with this API key: create a new GeminiBatchJob \
                         with a model that does, for example gemini-2.5-flash, or with spec.method EmbedContent if it \
                         is a model for embeddings"
                    ),
                    Method::EmbedContent => format!(
                        "Gemini has no model {model} that takes batches of embeddings with this API key: create a new \
                         GeminiBatchJob with a model that does, for example gemini-embedding-001, or without \
                         spec.method if it is none for embeddings"
                    ),
                },
            ),
            true,
        )
    } else if call == RefusedCall::Create && error.http_code() == 404 {
        // A model or a file, it does not say which: the next send uploads the file again.
        (Problem::new(Reason::InputFileNotFound, ""), false)
    } else if call == RefusedCall::Upload || error.is_precondition() || error.http_code() != 400 {
        (Problem::new(Reason::PreconditionFailed, ""), false)
    } else {
        (Problem::new(Reason::InputRefused, refused_input(error, job.spec.method)), true)
    })
}

fn refused_input(error: &Error, method: Method) -> String {
    let mut text = format!("Gemini refused the input (HTTP {})", error.http_code());
    for (index, line) in error.lines().iter().enumerate() {
        let _ = write!(text, "{} line {}: {}", if index == 0 { ":" } else { ";" }, line.line, line.what);
    }
    if error.hint() == Some(Hint::TooLarge) {
        text.push_str(": it is too large; split the requests over several jobs");
    }
    let _ = write!(
        text,
        ". Nothing was created. Correct the requests (see the {} of Gemini's API) and create a new GeminiBatchJob",
        request::message_name(method)
    );
    text
}
