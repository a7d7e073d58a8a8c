//! A job whose input is split: what it does about the jobs of its parts. Pure: no client required. See
//! [`crate::controller::shards`] for the picture.
//!
//! In this order: what exists is recorded; what was edited is set right; what has room is begun; what is over is put
//! together. Each is its own step, so that a kill in between leaves nothing that the next pass does not see.

use jiff::Timestamp;

use super::cleanup::{deletion_deadline, output_filled};
use super::{Action, Change, Decision, Gate, Observed, Wake, generation_of, lifecycle, record};
use crate::api::{DeletionPolicy, GeminiBatchJob, Reason, Retention, Shards};
use crate::controller::destination::Destination;
use crate::controller::memory::{Memory, OutputObject};
use crate::controller::shards::seen::Situation;
use crate::controller::shards::{self, AT_ONCE, Merged, is_kept, recorded};
use crate::controller::{InputFacts, Problem, ending};

/// Whether it is known, and written down, into which parts the input is split.
pub(super) fn is_planned(job: &GeminiBatchJob) -> bool {
    recorded(job).is_some()
}

/// Whether the input has to be read, which a job without parts has to before each send.
pub(super) fn needs_input(job: &GeminiBatchJob, memory: &Memory) -> bool {
    match recorded(job) {
        None => true,
        Some(shards) => shards.created < shards.total && memory.shards.plan_for(job).is_none(),
    }
}

/// The input was checked, and all that a submission needs is there: from now on the parts are what they are.
pub(super) fn plan(o: &Observed<'_>, input: Option<&InputFacts>, now: Timestamp) -> Decision {
    let (Some(plan), Some(input)) = (o.memory.shards.plan_for(o.job), input) else {
        return Decision::Wait { say: None, wake: Wake::At(now) };
    };
    let total = i32::try_from(plan.parts.len()).unwrap_or(i32::MAX);
    record(Change::Planned {
        requests: input.count,
        shards: Box::new(Shards {
            total,
            pending: total,
            input_sha256: input.sha256.clone(),
            plan_sha256: plan.sha256.clone(),
            max_requests: plan.limits.max_requests,
            max_bytes: plan.limits.max_bytes,
            ..Shards::default()
        }),
    })
}

fn situation<'a>(o: &'a Observed<'_>, recorded: &'a Shards, now: Timestamp) -> Situation<'a> {
    let stopped = lifecycle::deadline(o.job).is_some_and(|t| t <= now);
    Situation { parent: o.job, recorded, slots: &o.memory.shards.slots, stopped }
}

/// The parts are written down, and not all of them are over.
pub(super) fn next(o: &Observed<'_>, now: Timestamp) -> Decision {
    let Some(recorded) = recorded(o.job) else { return Decision::Done };
    let s = situation(o, recorded, now);
    let say = |own: Option<(Problem, bool)>| Change::Sharded(Box::new(s.seen(own)));
    if s.created() > usize::try_from(recorded.created).unwrap_or(0) {
        return record(say(None));
    }
    let refused = o.memory.shards.refused.as_ref().filter(|refused| refused.next > now);
    let unfit = s.unfit();
    if !unfit.is_empty() && refused.is_none() {
        return act(shards::Action::Sync { indices: unfit, stopped: s.stopped });
    }
    let mut wake = Wake::OnChange;
    let mut own = None;
    if let Some(refused) = refused {
        own = Some((refused.problem.clone(), true));
        wake = Wake::At(refused.next);
    } else if let Some((first, count)) = s.to_create() {
        match may_create(o, now) {
            Ok(()) => return act(shards::Action::Create { first, count }),
            Err((said, when)) => {
                own = said;
                wake = when;
            }
        }
    }
    let seen = s.seen(own);
    if !s.is_over() {
        return Decision::Wait { say: Some(Box::new(Change::Sharded(Box::new(seen)))), wake };
    }
    if seen.shards != *recorded {
        return record(Change::Sharded(Box::new(seen)));
    }
    finish(o, &s, now)
}

fn act(action: shards::Action) -> Decision {
    Decision::Act(Action::Shards(action))
}

type Said = (Option<(Problem, bool)>, Wake);

/// Whether the next part can be given a job.
fn may_create(o: &Observed<'_>, now: Timestamp) -> Result<(), Said> {
    if let Gate::Closed { problem, wake } = o.gate
        && problem.reason == Reason::CrdOutdated
    {
        return Err((Some((problem.clone(), false)), *wake));
    }
    if o.memory.shards.plan_for(o.job).is_some() {
        return Ok(());
    }
    // After a restart the input is read again, to see where it is split.
    if let Some((problem, wake)) = in_hand(o, now) {
        return Err((problem.map(|problem| (problem, false)), wake));
    }
    match &o.input {
        Some(Err(problem)) => Err((Some((problem.clone(), true)), Wake::Recheck)),
        _ => Err((None, Wake::At(now))),
    }
}

/// Nothing goes on any more: the results are put together and stored, then the job is at its end.
fn finish(o: &Observed<'_>, s: &Situation<'_>, now: Timestamp) -> Decision {
    let say = |problem: Problem, wake| Decision::Wait {
        say: Some(Box::new(Change::Sharded(Box::new(s.seen(Some((problem, true))))))),
        wake,
    };
    let Some(at) = Destination::of(o.job) else {
        // The schema refuses such a job; an older one may not have.
        let what = "spec.sharding needs spec.output: name a place for the results of all shards";
        return say(Problem::new(Reason::OutputNotWritable, what), Wake::OnChange);
    };
    let generation = o.job.metadata.generation;
    match &o.memory.shards.merged {
        Some(Merged::TooLarge { bytes, generation: then }) if *then == generation => {
            return say(ending::shards_too_large(&at, *bytes), Wake::OnChange);
        }
        Some(Merged::Done(tally)) if tally.stored.as_ref().is_none_or(|(stored, _)| *stored == at) => {
            if tally.stored.is_none() && !o.memory.cleanup.output_released && !output_filled(o.job, &at) {
                return Decision::Act(Action::ReleaseOutput { name: at });
            }
            return record(Change::Finished(Box::new(s.end(tally))));
        }
        _ => {}
    }
    match &o.memory.output {
        OutputObject::Blocked { problem, generation, retry }
            if generation_of(o.job) == *generation && retry.is_none_or(|t| t > now) =>
        {
            return say(problem.clone(), retry.map_or(Wake::OnChange, Wake::At));
        }
        OutputObject::Reserved { name: other } if *other != at => {
            return Decision::Act(Action::ReleaseOutput { name: other.clone() });
        }
        _ => {}
    }
    match in_hand(o, now) {
        Some((problem, wake)) => Decision::Wait {
            say: problem.map(|problem| Box::new(Change::Sharded(Box::new(s.seen(Some((problem, false))))))),
            wake,
        },
        None => act(shards::Action::Merge { at }),
    }
}

/// A transfer that is under way or is tried again later: what to say of it, and when to look again.
fn in_hand(o: &Observed<'_>, now: Timestamp) -> Option<(Option<Problem>, Wake)> {
    if let Some(trouble) = o.memory.trouble.as_ref().filter(|t| t.next > now) {
        let problem = (trouble.failures >= 2).then(|| trouble.problem.clone());
        return Some((problem, Wake::At(trouble.next)));
    }
    let transfer = o.memory.transfer.clone()?;
    Some((Some(transfer), Wake::OnChange)) // it is woken
}

/// Children whose own deletion would not do what this job says.
fn to_be_told(s: &Situation<'_>) -> Vec<usize> {
    let told = |index: usize, child: &GeminiBatchJob| {
        let desired = s.desired(index);
        child.spec.deletion_policy == desired.deletion_policy
            && child.spec.deletion_timeout_seconds == desired.deletion_timeout_seconds
    };
    let there = s.children().filter(|(_, child)| child.metadata.deletion_timestamp.is_none());
    there.filter(|(index, child)| !told(*index, child)).map(|(index, _)| index).take(AT_ONCE).collect()
}

/// The next step until no child is left that `keep` does not name; `None` when there is none, `Err`: some are going.
fn drop_children(
    o: &Observed<'_>,
    s: &Situation<'_>,
    keep: impl Fn(&GeminiBatchJob) -> bool,
    now: Timestamp,
) -> Result<Option<Decision>, ()> {
    let refused = o.memory.shards.refused.as_ref().is_some_and(|refused| refused.next > now);
    let untold = to_be_told(s);
    if !untold.is_empty() && !refused {
        // What is to be left alone is not stopped on the way either.
        let stopped = o.job.spec.deletion_policy() != DeletionPolicy::Orphan
            || lifecycle::deadline(o.job).is_some_and(|t| t <= now);
        return Ok(Some(act(shards::Action::Sync { indices: untold, stopped })));
    }
    let is_going = |index: usize, child: &GeminiBatchJob| {
        child.metadata.deletion_timestamp.is_some() || o.memory.shards.going.contains(&index)
    };
    let mut all = s.children().filter(|(_, child)| !keep(child)).peekable();
    let some = all.peek().is_some();
    let indices: Vec<usize> =
        all.filter(|(index, child)| !is_going(*index, child)).map(|(index, _)| index).take(AT_ONCE).collect();
    if !indices.is_empty() {
        return Ok(Some(act(shards::Action::Delete { indices })));
    }
    if some { Err(()) } else { Ok(None) }
}

/// What a finished job has to do about its children; `None`: nothing any more. The results of all are stored, so those of
/// single parts are not needed, and then neither are the children, unless something could be lost with them.
pub(super) fn leftovers(o: &Observed<'_>, now: Timestamp) -> Option<Decision> {
    let recorded = recorded(o.job)?;
    let s = Situation { stopped: true, ..situation(o, recorded, now) };
    let since = o.job.metadata.deletion_timestamp.as_ref().map(|t| t.0);
    let deadline = since.map(|since| deletion_deadline(o.job, since));
    if deadline.is_some_and(|t| t <= now) {
        return None; // each child tells by itself what becomes of it
    }
    let wait = |wake| Some(Decision::Wait { say: None, wake: deadline.map_or(wake, Wake::At) });
    // Before the children, which know where they stored them.
    let filled = Destination::of(o.job).is_some_and(|at| output_filled(o.job, &at));
    if filled && !o.memory.shards.parts_dropped {
        return match in_hand(o, now) {
            Some((_, wake)) => wait(wake),
            None => Some(act(shards::Action::DropParts)),
        };
    }
    let keep = |child: &GeminiBatchJob| since.is_none() && is_kept(o.job, child);
    match drop_children(o, &s, keep, now) {
        Ok(Some(decision)) => return Some(decision),
        Ok(None) => {}
        Err(()) => return wait(Wake::OnChange),
    }
    if s.children().next().is_some() {
        return Some(lifecycle::at_rest(o, now)); // those that are kept
    }
    match o.memory.shards.left {
        None => Some(act(shards::Action::DeleteAll)),
        Some(0) => None,
        Some(_) => wait(Wake::Recheck),
    }
}

/// The job is being deleted before its end. `None`: nothing of its parts is left.
pub(super) fn deleting(o: &Observed<'_>, now: Timestamp) -> Option<Decision> {
    let recorded = recorded(o.job)?;
    let s = Situation { stopped: true, ..situation(o, recorded, now) };
    let since = o.job.metadata.deletion_timestamp.as_ref().map_or(now, |t| t.0);
    let deadline = deletion_deadline(o.job, since);
    let drop = drop_children(o, &s, |_| false, now);
    if let Ok(Some(decision)) = drop {
        return Some(decision);
    }
    let mut event = None;
    if now < deadline {
        if drop.is_err() {
            return Some(Decision::Wait { say: None, wake: Wake::At(deadline) });
        }
        match o.memory.shards.left {
            None => return Some(act(shards::Action::DeleteAll)),
            Some(0) => {}
            Some(_) => return Some(Decision::Wait { say: None, wake: Wake::Recheck }),
        }
        if recorded.created > 0 {
            event = Some(ending::shards_deleted(o.job));
        }
    } else if recorded.created > 0 {
        event = Some(ending::shards_going(o.job));
    }
    let with_it = o.job.spec.output.as_ref().is_some_and(|output| output.retention == Retention::Delete);
    if with_it && !o.memory.shards.parts_dropped {
        return Some(act(shards::Action::DropParts));
    }
    if let Some(name) = Destination::of(o.job).filter(|_| !o.memory.cleanup.output_released) {
        return Some(Decision::Act(Action::ReleaseOutput { name }));
    }
    Some(record(Change::DropFinalizer { event }))
}
