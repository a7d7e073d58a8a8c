//! What this process knows of a job beyond its status: lost on a restart, and never needed for safety.
//! Pure: no client required.
//!
//! An action's outcome is folded in here; the next decision reads it. What has to survive a restart is
//! written to the job's status before the next action is taken.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::collect::Collected;
use super::decide::Wake;
use super::destination::{Destination, Placed};
use super::keys::Lines;
use super::shards::{self, plan::Plan};
use super::{Credential, InputFacts, Problem};
use crate::api::{Method, ObjectStoreInput, Reason, Refusal};
use crate::gemini::{Batch, BatchName, Session};
use crate::store::Object;

/// Everything remembered of one job.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// The attempt that all of this is about: see [`Memory::is_about`].
    attempt: Option<i32>,
    /// How far the send of the current attempt has come.
    pub send: Option<Send>,
    /// Whether the output object is ours, and what stands in the way if not.
    pub output: OutputObject,
    /// The last answer to a GET of the batch.
    pub remote: Option<Remote>,
    /// The API key that it was given to, by its fingerprint.
    pub remote_key: Option<String>,
    /// The batch that was asked for.
    pub remote_name: Option<BatchName>,
    /// What the result file holds, once it was read to its end.
    pub collected: Option<Collected>,
    /// Since when the result file is awaited, and how often it was asked for.
    pub unreadable: Option<Absent>,
    /// What earlier attempts left was awaited long enough.
    pub without_earlier: bool,
    /// When GETs are due and how many are left.
    pub looks: Looks,
    /// Batches of this job that are at Gemini for attempts that it may not know: see [`super::census`].
    pub found: Found,
    /// The last probe of a key that Gemini had refused.
    pub probe: Option<Probe>,
    /// A call to Gemini that fails for now.
    pub trouble: Option<Trouble>,
    /// The input, if it lies in an object store and was checked.
    pub stored: Option<Arc<Stored>>,
    /// What was wrong with it, the last time that it was looked at.
    pub stored_problem: Option<Box<KnownProblem>>,
    /// What is under way beside the passes, and will wake the job: see [`super::transfers`].
    pub transfer: Option<Problem>,
    /// An upload that broke off and may go on, and the send that it is of.
    pub upload: Option<Box<(String, Session)>>,
    /// The parts of a sharded job.
    pub shards: Box<shards::Known>,
    /// Steps of the clean-up that are done.
    pub cleanup: Cleanup,
    /// The API key of an attempt that is, or may be, at Gemini: to cancel it with when the job is deleted and its
    /// Secret has gone before it, as it does when a whole namespace is deleted. Wiped when it is dropped.
    pub kept_key: Option<Arc<Credential>>,
    /// Whether the job's namespace is being deleted, once it was asked.
    pub namespace: Option<NamespaceSeen>,
    /// The version of the job that the last turn left behind, and when to come again.
    pub settled: Option<(String, Wake)>,
}

/// Batches of one job, each with the number of its attempt.
pub type Found = Vec<(i32, Batch)>;

/// What was found out about a job's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceSeen {
    /// It is being deleted: nothing can be created in it any more.
    pub terminating: bool,
    /// Until then it is not asked again.
    pub next: Timestamp,
}

impl Memory {
    /// Nothing of one attempt must be taken for something of the next. The status says which one it is about, whether
    /// or not the process learned that it was written.
    pub fn is_about(&mut self, attempt: i32) {
        if self.attempt.is_some_and(|before| before != attempt) {
            *self = Self {
                settled: self.settled.take(),
                found: std::mem::take(&mut self.found),
                ..Self::default()
            };
        }
        self.attempt = Some(attempt);
    }

    /// Gemini has the batch: what was known of the input is of no use any more, and may be a long list.
    pub fn sent(&mut self) {
        (self.stored, self.stored_problem, self.upload) = (None, None, None);
    }
}

/// How far one send has come.
#[derive(Clone, Debug)]
pub struct Send {
    /// `attempts[].sendId` that this speaks of.
    pub send_id: String,
    /// How far.
    pub stage: Stage,
}

/// The stages of a send. A process that did not record the intent itself starts at `Unsure`.
#[derive(Clone, Debug)]
pub enum Stage {
    /// The file is not at Gemini, so the batch can't have been asked for.
    NotUploaded,
    /// The same, found out by another process than the one that recorded the intent. It may have been deleted as
    /// a fence against this very send: the next one needs another name.
    Unsent,
    /// The file is there under this name, and this process has not asked for the batch.
    Uploaded {
        /// The name that Gemini gave it.
        file: String,
    },
    /// The batch may have been asked for.
    Unsure(Search),
    /// Gemini refused; nothing was created.
    Refused(Refused),
    /// Gemini answered with a batch.
    Created(Box<Batch>),
    /// The batch was found by looking for it.
    Found(Box<Batch>),
}

/// The search for a batch that may exist.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// Complete listings that did not show it.
    pub listings: u32,
    /// When the next one is due.
    pub next: Option<Timestamp>,
    /// A batch that a callback named, was looked at and is not ours.
    pub refuted: Option<BatchName>,
    /// Those of them that were made with the key of the send: with any other one they prove nothing.
    pub own_listings: u32,
    /// When the first of these was made.
    pub since: Option<Timestamp>,
    /// The send's input file is gone: a create that is still travelling must fail.
    pub fenced: bool,
    /// When it was seen gone.
    pub fenced_at: Option<Timestamp>,
    /// A complete listing long enough after that did not show it either.
    pub listed_behind_fence: bool,
    /// The search began after a restart with another API key, which proves nothing about the input file:
    /// that is still to be asked for with the right one.
    pub file_unasked: bool,
}

/// A refusal, as it will be recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// What goes into `attempts[].refusal`.
    pub refusal: Refusal,
    /// The same reason, typed.
    pub reason: Reason,
    /// What to tell the user.
    pub message: String,
    /// Whether nothing that the user can still change would help.
    pub is_final: bool,
}

/// The output object.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum OutputObject {
    /// Not looked at by this process.
    #[default]
    Unknown,
    /// There, ours.
    Reserved {
        /// Where.
        name: Destination,
    },
    /// The results are in it.
    Stored {
        /// Where they were to go.
        name: Destination,
        /// Where exactly they are.
        placed: Placed,
    },
    /// Not usable.
    Blocked {
        /// Why, and what to change.
        problem: Problem,
        /// `metadata.generation` at that time.
        generation: i64,
        /// When to look again; never, if only a change of the job can help.
        retry: Option<Timestamp>,
    },
}

/// The answer to a GET of the batch.
#[derive(Clone, Debug)]
pub enum Remote {
    /// The batch as Gemini shows it.
    Seen(Box<Batch>),
    /// Gemini does not show it.
    Missing(Absent),
}

/// Something that Gemini does not show to one API key. Under another key that proves nothing, so the count
/// begins anew with each key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// The key, by its fingerprint.
    pub fingerprint: String,
    /// How often it was asked for with this key.
    pub tries: Tries,
}

impl Absent {
    /// Asked for once more, in vain.
    #[must_use]
    pub fn again(
        before: Option<&Self>,
        fingerprint: &str,
        now: Timestamp,
        pauses: &[SignedDuration],
    ) -> Self {
        let before = before.filter(|b| b.fingerprint == fingerprint).map(|b| b.tries);
        Self { fingerprint: fingerprint.to_owned(), tries: Tries::again(before, now, pauses) }
    }
}

/// Something that was tried in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tries {
    /// The first time.
    pub since: Timestamp,
    /// How often.
    pub count: u32,
    /// When the next try is due.
    pub next: Timestamp,
}

impl Tries {
    /// One more try in vain. `pauses` are the pauses between tries; the last one repeats.
    #[must_use]
    pub fn again(before: Option<Self>, now: Timestamp, pauses: &[SignedDuration]) -> Self {
        let count = before.map_or(1, |t| t.count.saturating_add(1));
        let index = usize::try_from(count).unwrap_or(usize::MAX).min(pauses.len()).saturating_sub(1);
        let pause = pauses.get(index).copied().unwrap_or(SignedDuration::from_secs(60));
        Self { since: before.map_or(now, |t| t.since), count, next: after(now, pause) }
    }
}

/// A call that fails for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// How often in a row.
    pub failures: u32,
    /// When the next try is due.
    pub next: Timestamp,
    /// What failed, for the condition.
    pub problem: Problem,
}

/// An input in an object store that was checked: see [`super::stored`].
#[derive(Debug, PartialEq)]
pub struct Stored {
    /// What a decision needs to know of it.
    pub facts: InputFacts,
    /// The job's words for it.
    pub of: ObjectStoreInput,
    /// What its lines were checked for.
    pub method: Method,
    /// The objects as they were.
    pub objects: Vec<Object>,
    /// Lines that have a result already, if it is a further attempt and some have one.
    pub answered: Option<Lines>,
    /// Where it is split, if it is.
    pub plan: Option<Arc<Plan>>,
}

/// What is wrong with an input in an object store.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownProblem {
    /// The job's words for the input.
    pub of: ObjectStoreInput,
    /// What it was checked for.
    pub method: Method,
    /// What is wrong.
    pub problem: Problem,
    /// The objects that it is about, if it came to that: the same ones need not be read again.
    pub seen: Vec<Object>,
    /// Until then it is not looked at again.
    pub next: Timestamp,
}

/// The outcome of a probe of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The key, by its fingerprint.
    pub fingerprint: String,
    /// Whether Gemini accepts it.
    pub accepted: bool,
    /// When it may be asked again.
    pub next: Timestamp,
}

/// Steps of the clean-up after the end, or of a deletion.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "steps that are done or not, in any combination")]
pub struct Cleanup {
    /// The input file is gone.
    pub input_deleted: bool,
    /// The reserved output object was released.
    pub output_released: bool,
    /// Batches that the search before deletion found and that must be cancelled.
    pub to_cancel: Vec<BatchName>,
    /// The batch of the attempt was cancelled, or needs no cancelling.
    pub cancelled: bool,
    /// GETs since then that did not show its end.
    pub watched: Option<Tries>,
    /// Batches that are deleted at Gemini, with their result files.
    pub batches_deleted: Vec<String>,
    /// The job was deleted since its time to live is over.
    pub job_deleted: bool,
    /// Complete listings: one before the input file is deleted, one after.
    pub listings: u32,
    /// Tries that failed.
    pub failed: Option<Tries>,
    /// The last of them, if it is the API key that was refused: somebody has to know.
    pub refused: Option<KeyRefused>,
}

impl Cleanup {
    /// A step was taken.
    pub fn went_on(&mut self) {
        self.failed = None;
        self.refused = None;
    }

    /// The batch was cancelled, or needs no cancelling.
    pub fn cancelled(&mut self, batch: &BatchName) {
        self.went_on();
        self.cancelled = true;
        self.to_cancel.retain(|other| other != batch);
    }

    /// What to say of the key, if it is the one that was refused.
    #[must_use]
    pub fn refused(&self, fingerprint: &str) -> Option<&Problem> {
        self.refused.as_ref().filter(|r| r.fingerprint == fingerprint).map(|r| &r.problem)
    }

    /// Whether another key was refused, and this one may do.
    #[must_use]
    pub fn is_another_key(&self, fingerprint: &str) -> bool {
        self.refused.as_ref().is_some_and(|r| r.fingerprint != fingerprint)
    }
}

/// Gemini refused an API key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRefused {
    /// Of the key.
    pub fingerprint: String,
    /// For the condition.
    pub problem: Problem,
}

/// When to GET a batch: at once for a new hint, a few times more if Gemini still says that it runs, and
/// when the sweep saw that it changed. A budget delays GETs, it never drops the last one.
#[derive(Clone, Debug, Default)]
pub struct Looks {
    /// The hint that is being followed, and how many GETs it had.
    pub following: Option<(String, usize)>,
    /// When its next GET is due.
    pub next: Option<Timestamp>,
    /// The sweep asked for a GET.
    pub swept: bool,
    /// Why the last GET was made.
    pub why: Why,
    /// Times of the last GETs, newest last.
    recent: Vec<Timestamp>,
}

/// Why a batch was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Why {
    /// None of these.
    #[default]
    Other,
    /// A callback came.
    Callback,
    /// The sweep saw that it does not go on.
    Sweep,
}

/// GETs of one job within `Timings::look_window`, however many hints come.
const BUDGET: usize = 4;

impl Looks {
    /// When the budget allows the next GET: at most [`BUDGET`] in any `window`.
    #[must_use]
    pub fn allowed(&self, now: Timestamp, window: SignedDuration) -> Timestamp {
        let spent: Vec<_> = self.recent.iter().filter(|t| after(**t, window) > now).collect();
        match spent.first() {
            Some(oldest) if spent.len() >= BUDGET => after(**oldest, window),
            _ => now,
        }
    }

    /// A GET was made, because of `hint` if there is one that was not acted on. `pauses` are the pauses
    /// before the further GETs of the same hint.
    pub fn looked(&mut self, hint: Option<&str>, now: Timestamp, pauses: &[SignedDuration]) {
        self.recent.push(now);
        if self.recent.len() > BUDGET {
            self.recent.remove(0);
        }
        self.why = match hint {
            Some(_) => Why::Callback,
            None if self.swept => Why::Sweep,
            None => Why::Other,
        };
        self.swept = false;
        self.next = None;
        if let Some(hint) = hint {
            // A new hint in the midst of an old one's follow-ups does not start them anew: the pauses count
            // from the first, so that a flood of hints stays within the budget.
            let done = self.following.as_ref().map_or(0, |(_, n)| *n);
            self.next = pauses.get(done).map(|pause| after(now, *pause));
            self.following = Some((hint.to_owned(), done + 1));
        }
    }

    /// All GETs that a hint deserves were made.
    #[must_use]
    pub fn exhausted(&self, hint: &str) -> bool {
        self.next.is_none() && self.following.as_ref().is_some_and(|(h, _)| h == hint)
    }

    /// The hint was recorded as acted on.
    pub fn recorded(&mut self) {
        self.following = None;
        self.next = None;
    }
}

/// `time + duration`, saturating.
#[must_use]
pub fn after(time: Timestamp, duration: SignedDuration) -> Timestamp {
    time.checked_add(duration).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WINDOW: SignedDuration = SignedDuration::from_secs(60);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn pauses() -> Vec<SignedDuration> {
        [5, 30, 120].into_iter().map(SignedDuration::from_secs).collect()
    }

    #[test]
    fn an_early_hint_is_looked_at_four_times() {
        let mut looks = Looks::default();
        let mut now = at(1000);
        for pause in [5, 30, 120] {
            looks.looked(Some("m1"), now, &pauses());
            assert_eq!(looks.next, Some(after(now, SignedDuration::from_secs(pause))));
            assert!(!looks.exhausted("m1"));
            now = looks.next.unwrap();
        }
        looks.looked(Some("m1"), now, &pauses());
        assert_eq!(looks.next, None);
        assert!(looks.exhausted("m1") && !looks.exhausted("m2"));
    }

    #[test]
    fn it_is_remembered_why_a_look_was_made() {
        let mut looks = Looks::default();
        looks.looked(None, at(0), &pauses());
        assert_eq!(looks.why, Why::Other);
        looks.swept = true;
        looks.looked(None, at(9), &pauses());
        assert_eq!((looks.why, looks.swept), (Why::Sweep, false));
        looks.swept = true;
        looks.looked(Some("m"), at(19), &pauses());
        assert_eq!(looks.why, Why::Callback);
    }

    #[test]
    fn pauses_grow_and_the_last_one_repeats() {
        let steps = [SignedDuration::from_secs(1), SignedDuration::from_secs(9)];
        let first = Tries::again(None, at(0), &steps);
        let second = Tries::again(Some(first), at(10), &steps);
        let third = Tries::again(Some(second), at(20), &steps);
        assert_eq!((first.next, second.next, third.next), (at(1), at(19), at(29)));
        assert_eq!((third.since, third.count), (at(0), 3));
    }

    proptest! {
        /// However the hints come: at most the budget in any window, and never a look that is put off for ever.
        #[test]
        fn the_budget_holds_in_every_window(gaps in proptest::collection::vec(0i64..20, 1..60)) {
            let mut looks = Looks::default();
            let mut made: Vec<Timestamp> = Vec::new();
            let mut now = at(0);
            for (i, gap) in gaps.iter().enumerate() {
                now = after(now, SignedDuration::from_secs(*gap));
                let allowed = looks.allowed(now, WINDOW);
                prop_assert!(allowed <= after(now, WINDOW));
                if allowed <= now {
                    looks.looked(Some(&format!("m{i}")), now, &pauses());
                    made.push(now);
                }
            }
            for (i, start) in made.iter().enumerate() {
                let within = made[i..].iter().take_while(|t| **t < after(*start, WINDOW)).count();
                prop_assert!(within <= BUDGET, "{within}");
            }
        }
    }
}
