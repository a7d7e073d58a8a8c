//! What a sharded job says of its parts while they go on, and how it ends. Pure: no client required.

use kube::ResourceExt as _;

use super::{AT_ONCE, Hold, Slot, Tally, child_name, desired, is_resting, stalled};
use crate::api::conditions::{self, FINISHED, READY};
use crate::api::{GeminiBatchJob, Reason, RequestCounts, Shard, Shards, State, Usage};
use crate::controller::Problem;
use crate::controller::decide::{self, Results};
use crate::controller::ending::{End, by_success_policy, stopped as stop};

/// Parts that the status names.
const LISTED: usize = 20;
/// Parts that a message names.
const NAMED: usize = 5;

/// A sharded job and all that is known of its parts.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// The job.
    pub parent: &'a GeminiBatchJob,
    /// What it has recorded.
    pub recorded: &'a Shards,
    /// Its parts' jobs.
    pub slots: &'a [Slot],
    /// Its time is over: see `spec.activeDeadlineSeconds`.
    pub stopped: bool,
}

/// What the status is to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// The parts.
    pub shards: Shards,
    /// Summed over them.
    pub requests: RequestCounts,
    /// Summed over them.
    pub usage: Option<Usage>,
    /// In one word.
    pub state: State,
    /// For the conditions.
    pub problem: Problem,
    /// Somebody has to change something.
    pub stalled: bool,
    /// It is the parent's own affair, so that no child tells of it.
    pub own: bool,
    /// Gemini has, or had, the first batches.
    pub submitted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl<'a> Situation<'a> {
    fn indices(&self) -> impl Iterator<Item = usize> + use<> {
        0..usize::try_from(self.recorded.total).unwrap_or(0)
    }

    fn slot(&self, index: usize) -> &'a Slot {
        self.slots.get(index).unwrap_or(&Slot::Absent)
    }

    /// The children that are there, with their numbers.
    pub fn children(&self) -> impl Iterator<Item = (usize, &'a GeminiBatchJob)> {
        self.indices().filter_map(|index| Some((index, self.slot(index).job()?)))
    }

    /// So many children are there, from the first one on, recorded or not.
    #[must_use]
    pub fn created(&self) -> usize {
        let recorded = usize::try_from(self.recorded.created).unwrap_or(0);
        let more = self.indices().skip(recorded);
        recorded
            + more.take_while(|index| matches!(self.slot(*index), Slot::Here(_) | Slot::Unreadable)).count()
    }

    fn hold(&self, index: usize) -> Hold {
        let recorded = usize::try_from(self.recorded.created).unwrap_or(0);
        Hold { unrecorded: index >= recorded, stopped: self.stopped }
    }

    /// Whether this child shall be otherwise.
    #[must_use]
    pub fn is_unfit(&self, index: usize, child: &GeminiBatchJob) -> bool {
        let mut spec = child.spec.clone();
        spec.input = None;
        spec != desired(self.parent, index, self.hold(index))
    }

    /// What the child shall be, but for its input.
    #[must_use]
    pub fn desired(&self, index: usize) -> crate::api::GeminiBatchJobSpec {
        desired(self.parent, index, self.hold(index))
    }

    /// Unfinished children that shall be otherwise.
    #[must_use]
    pub fn unfit(&self) -> Vec<usize> {
        self.children()
            .filter(|(_, child)| !decide::is_finished(child) && child.metadata.deletion_timestamp.is_none())
            .filter(|(index, child)| self.is_unfit(*index, child))
            .map(|(index, _)| index)
            .take(AT_ONCE)
            .collect()
    }

    /// What Gemini said to one part holds for all.
    fn is_hopeless(&self) -> bool {
        let model = Reason::ModelNotFound.as_str();
        self.children().any(|(_, child)| decide::is_finished(child) && reason_of(child) == Some(model))
    }

    /// Whether further parts are begun.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        !self.stopped && !self.parent.spec.suspend && !self.is_hopeless()
    }

    /// The parts to begin now: the first one, and how many.
    #[must_use]
    pub fn to_create(&self) -> Option<(usize, usize)> {
        if !self.goes_on() {
            return None;
        }
        // Behind one that was deleted before it was recorded there may be others, which are held until it is there again.
        let first = self.created();
        let in_flight =
            self.children().filter(|(index, child)| *index < first && !decide::is_finished(child)).count();
        let most = self.parent.spec.sharding.as_ref().map_or(0, |s| s.max_in_flight);
        let room = usize::try_from(most).unwrap_or(0).saturating_sub(in_flight).min(AT_ONCE);
        let count = self.indices().skip(first).take(room).count();
        (count > 0).then_some((first, count))
    }

    /// Whether nothing goes on any more, nor will.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let begins = self.goes_on() || self.parent.spec.suspend && !self.stopped;
        self.indices().all(|index| match self.slot(index) {
            Slot::Lost => true,
            Slot::Here(_) => self.slot(index).job().is_some_and(|child| {
                decide::is_finished(child)
                    || self.stopped && is_resting(child) && !self.is_unfit(index, child)
            }),
            Slot::Absent | Slot::Foreign => !begins,
            Slot::Unreadable => false,
        })
    }

    /// The status as it shall be. `own`: what stands in the parent's own way, and whether somebody has to change
    /// something.
    #[must_use]
    pub fn seen(&self, own: Option<(Problem, bool)>) -> Seen {
        let kinds: Vec<Kind> = self.kinds();
        let count =
            |wanted| i32::try_from(kinds.iter().filter(|kind| **kind == wanted).count()).unwrap_or(i32::MAX);
        let shards = Shards {
            created: i32::try_from(self.created()).unwrap_or(i32::MAX),
            pending: count(Kind::Pending),
            running: count(Kind::Running),
            succeeded: count(Kind::Succeeded),
            failed: count(Kind::Failed),
            listed: self.listed(&kinds),
            ..self.recorded.clone()
        };
        let is_own = own.is_some();
        let (problem, stalled) = own.unwrap_or_else(|| self.problem(&shards));
        let (requests, usage) = self.sums();
        Seen {
            state: self.state(&shards),
            submitted: shards.running + shards.succeeded > 0,
            shards,
            requests,
            usage,
            problem,
            stalled,
            own: is_own,
        }
    }

    fn kinds(&self) -> Vec<Kind> {
        let over = self.is_over();
        self.indices()
            .map(|index| match (self.slot(index), self.slot(index).job().and_then(|c| c.status.as_ref())) {
                (Slot::Lost, _) => Kind::Failed,
                (_, Some(status)) => match status.state {
                    State::Succeeded => Kind::Succeeded,
                    State::Failed | State::Cancelled => Kind::Failed,
                    State::Running => Kind::Running,
                    State::Pending | State::Queued | State::Suspended => Kind::Pending,
                },
                _ => Kind::Pending,
            })
            .map(|kind| if over && kind == Kind::Pending { Kind::Failed } else { kind })
            .collect()
    }

    fn sums(&self) -> (RequestCounts, Option<Usage>) {
        let total = self.parent.status.as_ref().and_then(|s| s.requests).map_or(0, |r| r.total);
        let mut requests = RequestCounts { total, ..RequestCounts::default() };
        let mut usage: Option<Usage> = None;
        for status in self.children().filter_map(|(_, child)| child.status.as_ref()) {
            if let Some(counts) = status.requests {
                requests.succeeded += counts.succeeded;
                requests.failed += counts.failed;
            }
            if let Some(more) = &status.usage {
                add(usage.get_or_insert_default(), more);
            }
        }
        requests.pending = (total - requests.succeeded - requests.failed).max(0);
        (requests, usage)
    }

    fn state(&self, shards: &Shards) -> State {
        let mut unfinished = self
            .children()
            .filter(|(_, child)| !decide::is_finished(child))
            .map(|(_, child)| child)
            .peekable();
        let held = self.parent.spec.suspend && !self.stopped;
        if held && self.children().all(|(_, child)| decide::is_finished(child) || is_resting(child)) {
            return State::Suspended;
        }
        if shards.running + shards.succeeded + shards.failed > 0 {
            return State::Running;
        }
        let queued = |child: &GeminiBatchJob| child.status.as_ref().is_some_and(|s| s.state == State::Queued);
        if unfinished.peek().is_some() && unfinished.all(queued) { State::Queued } else { State::Pending }
    }

    fn name(&self, index: usize) -> String {
        child_name(&self.parent.name_any(), index)
    }

    fn problem(&self, shards: &Shards) -> (Problem, bool) {
        let mut waiting = self.children().filter_map(|(index, child)| Some((index, stalled(child)?)));
        if let Some((index, condition)) = waiting.next() {
            let reason = Reason::parse(&condition.reason).unwrap_or(Reason::InternalError);
            let others = match waiting.count() {
                0 => String::new(),
                n => format!(" ({n} more shards wait for somebody as well)"),
            };
            let name = self.name(index);
            let text = &condition.message;
            return (Problem::new(reason, format!("shard {index} ({name}){others}: {text}")), true);
        }
        let unreadable = self.indices().find(|index| matches!(self.slot(*index), Slot::Unreadable));
        if let Some(index) = unreadable {
            let name = self.name(index);
            let what = format!(
                "shard {index}: this operator can't read GeminiBatchJob {name}: run one at least as new as the \
                 CustomResourceDefinition"
            );
            return (Problem::new(Reason::Unreadable, what), true);
        }
        let Shards { total, pending, running, succeeded, failed, .. } = shards;
        let counts =
            format!("{running} run, {pending} are still to be sent, {succeeded} succeeded, {failed} failed");
        let of =
            |reason, what: &str| (Problem::new(reason, format!("{total} shards: {counts}{what}")), false);
        if self.stopped {
            return of(
                Reason::Cancelling,
                "; spec.activeDeadlineSeconds have passed, so what runs is being cancelled",
            );
        }
        let queued = self.children().find_map(|(_, child)| {
            let status = child.status.as_ref().filter(|s| s.state == State::Queued)?;
            conditions::get(&status.conditions, READY)
        });
        match queued {
            Some(condition) if *running == 0 => {
                let reason = Reason::parse(&condition.reason).unwrap_or(Reason::WaitingForSlot);
                of(reason, &format!("; {}", condition.message))
            }
            _ if running + succeeded + failed > 0 => of(Reason::Submitted, ""),
            _ => of(Reason::Submitting, ""),
        }
    }

    fn listed(&self, kinds: &[Kind]) -> Vec<Shard> {
        let of_interest = |index: &usize| match (self.slot(*index), self.slot(*index).job()) {
            (Slot::Lost | Slot::Unreadable, _) => Some(0),
            (_, Some(child)) if stalled(child).is_some() => Some(0),
            (_, Some(child)) if decide::is_finished(child) => {
                (kinds.get(*index) == Some(&Kind::Failed)).then_some(1)
            }
            (_, Some(_)) => Some(2),
            _ => None,
        };
        let mut all: Vec<(u8, usize)> =
            self.indices().filter_map(|index| Some((of_interest(&index)?, index))).collect();
        all.sort_unstable();
        all.truncate(LISTED);
        all.sort_unstable_by_key(|(_, index)| *index);
        all.into_iter()
            .map(|(_, index)| {
                let child = self.slot(index).job();
                let status = child.and_then(|child| child.status.as_ref());
                let state = match self.slot(index) {
                    Slot::Lost => State::Failed,
                    _ => status.map(|s| s.state).unwrap_or_default(),
                };
                Shard {
                    index: i32::try_from(index).unwrap_or(i32::MAX),
                    job: self.name(index),
                    state,
                    reason: match self.slot(index) {
                        Slot::Lost => Some(LOST.to_owned()),
                        _ => child.and_then(reason_of).map(ToOwned::to_owned),
                    },
                }
            })
            .collect()
    }

    /// Parts that ended without (all of) their results, and why. A part of which every request was answered, be it by an
    /// error, is none of them.
    fn failures(&self) -> Vec<(usize, State, String)> {
        self.indices()
            .filter_map(|index| {
                let (state, reason) = match (self.slot(index), self.slot(index).job()) {
                    (Slot::Lost, _) => (State::Failed, LOST.to_owned()),
                    (_, Some(child)) if decide::is_finished(child) => {
                        let state = child.status.as_ref().map(|s| s.state).unwrap_or_default();
                        let reason = reason_of(child).unwrap_or_default();
                        if state == State::Succeeded || reason == Reason::AllRequestsFailed.as_str() {
                            return None;
                        }
                        (state, reason.to_owned())
                    }
                    (_, Some(_)) => (State::Failed, Reason::DeadlineExceeded.as_str().to_owned()),
                    _ if self.stopped => (State::Failed, Reason::DeadlineExceeded.as_str().to_owned()),
                    _ => (State::Failed, NOT_BEGUN.to_owned()),
                };
                Some((index, state, reason))
            })
            .collect()
    }

    /// How the job ends, once nothing goes on and the results are stored.
    #[must_use]
    pub fn end(&self, tally: &Tally) -> End {
        let total = self.parent.status.as_ref().and_then(|s| s.requests).map_or(0, |r| r.total);
        let counts = RequestCounts {
            total,
            succeeded: tally.succeeded,
            failed: (total - tally.succeeded).max(0),
            pending: 0,
        };
        let (state, reason, message) = self.verdict(counts);
        let (state, reason, message) = by_success_policy(self.parent, counts, (state, reason, message));
        let results = Results {
            requests: Some(counts),
            usage: Some(tally.usage),
            output: tally.stored.as_ref().map(|(_, placed)| placed.status()),
        };
        End { results, ..stop(self.parent, state, reason, message) }
    }

    fn verdict(&self, counts: RequestCounts) -> (State, Reason, String) {
        let shards = self.recorded.total;
        let RequestCounts { total, succeeded, failed, .. } = counts;
        let failures = self.failures();
        let Some((_, first_state, first)) = failures.first() else {
            return match (succeeded, failed) {
                (0, _) => (
                    State::Failed,
                    Reason::AllRequestsFailed,
                    format!("no request of {total} in {shards} shards has a response"),
                ),
                (_, 0) => (
                    State::Succeeded,
                    Reason::Completed,
                    format!("all {total} requests succeeded, in {shards} shards"),
                ),
                _ => (
                    State::Succeeded,
                    Reason::CompletedWithFailures,
                    format!("{succeeded} of {total} requests succeeded, {failed} failed, in {shards} shards"),
                ),
            };
        };
        let named: Vec<String> = failures
            .iter()
            .take(NAMED)
            .map(|(index, _, reason)| format!("shard {index} ({}): {reason}", self.name(*index)))
            .collect();
        let more = match failures.len().saturating_sub(NAMED) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let message = format!(
            "{} of {shards} shards ended without all of their results: {}{more}; {succeeded} of {total} requests have a \
             response",
            failures.len(),
            named.join(", ")
        );
        let late = Reason::DeadlineExceeded;
        if self.stopped && failures.iter().any(|(_, _, reason)| reason == late.as_str()) {
            return (State::Failed, late, message);
        }
        let all = i32::try_from(failures.len()).is_ok_and(|n| n == shards);
        let begun: Vec<_> = failures.iter().filter(|(_, _, reason)| reason != NOT_BEGUN).collect();
        let alike = begun.iter().all(|(_, state, reason)| reason == first && state == first_state);
        match Reason::parse(first).filter(|reason| all && alike && reason.is_final()) {
            Some(reason) => (*first_state, reason, message),
            None => (State::Failed, Reason::ShardsFailed, message),
        }
    }
}

/// Instead of a reason: the part's job was deleted by somebody.
const LOST: &str = "JobDeleted";
/// Instead of a reason: nothing of it was sent.
const NOT_BEGUN: &str = "NotBegun";

/// Why a job is as it is.
#[must_use]
pub fn reason_of(job: &GeminiBatchJob) -> Option<&str> {
    let conditions = &job.status.as_ref()?.conditions;
    let finished = conditions::get(conditions, FINISHED).filter(|c| c.status == "True");
    let condition = finished.or_else(|| conditions::get(conditions, READY))?;
    Some(condition.reason.as_str())
}

/// Adds tokens.
pub fn add(sum: &mut Usage, more: &Usage) {
    sum.prompt_tokens = sum.prompt_tokens.saturating_add(more.prompt_tokens);
    sum.output_tokens = sum.output_tokens.saturating_add(more.output_tokens);
    sum.total_tokens = sum.total_tokens.saturating_add(more.total_tokens);
}
