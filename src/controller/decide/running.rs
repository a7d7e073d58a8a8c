//! From a batch that is known to its results: when Gemini is asked, what is read and where it is stored. Pure: no client
//! required.

use jiff::Timestamp;

use super::cleanup::{drop_input_file, output_filled};
use super::submission::reserve;
use super::{
    Action, Change, Decision, Observed, Wake, generation_of, lifecycle, new_hint, record, stalled, waiting,
};
use crate::api::Attempt;
use crate::controller::collect::{Collected, Lines};
use crate::controller::destination::{Destination, Placed};
use crate::controller::ending;
use crate::controller::memory::{Absent, OutputObject, Remote, after};
use crate::gemini::{Batch, BatchName, BatchState};

pub(super) fn submitted(o: &Observed<'_>, a: &Attempt, name: BatchName, now: Timestamp) -> Decision {
    let same_key = o.credential.as_ref().is_ok_and(|f| *f == a.credential_fingerprint);
    match &o.memory.remote {
        Some(Remote::Seen(batch)) if batch.is_terminal() && batch.name == name => {
            return collecting(o, a, name, Some(batch), now);
        }
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
    if let Some(decision) = lifecycle::cancelling(o, a, &name, now) {
        return decision;
    }
    let fingerprint = match &o.credential {
        Ok(fingerprint) => fingerprint,
        Err(problem) => return stalled(problem),
    };
    let looks = &o.memory.looks;
    let hint = new_hint(o.job, a);
    if let Some(hint) = hint.clone().filter(|h| looks.exhausted(h)) {
        return record(Change::HintObserved { hint });
    }
    let missing = match &o.memory.remote {
        Some(Remote::Missing(absent)) => Some(absent),
        _ => None,
    };
    let next = [looks.next, missing.map(|m| m.tries.next)].into_iter().flatten().min();
    // What another key was not shown may be shown to this one.
    let unasked = missing.is_some_and(|m| m.fingerprint != *fingerprint);
    let unfollowed = hint.as_ref().is_some_and(|h| looks.following.as_ref().is_none_or(|(f, _)| f != h));
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
    let Some(wanted) = Destination::of(o.job).filter(|_| collected.has_results()) else {
        return end(o, a, batch, Some(collected), now);
    };
    let results = Some(Box::new(ending::results(o.job, a, batch, Some(collected), None)));
    match (&o.memory.output, &collected.lines) {
        (OutputObject::Stored { name, .. }, _) if *name == wanted => end(o, a, batch, Some(collected), now),
        (_, Lines::TooLarge { bytes }) if matches!(wanted, Destination::ConfigMap(_)) => Decision::Wait {
            say: Some(Box::new(Change::Waiting {
                problem: ending::too_large(&wanted, *bytes, batch),
                stalled: true,
                results,
            })),
            wake: Wake::OnChange,
        },
        (OutputObject::Blocked { problem, generation, retry }, _)
            if generation_of(o.job) == *generation && retry.is_none_or(|t| t > now) =>
        {
            Decision::Wait {
                say: Some(Box::new(Change::Waiting {
                    problem: ending::kept_at_gemini(problem, batch),
                    stalled: true,
                    results,
                })),
                wake: retry.map_or(Wake::OnChange, Wake::At),
            }
        }
        (OutputObject::Reserved { name }, Lines::Kept(_)) if *name == wanted => {
            Decision::Act(Action::StoreResults { name: name.clone() })
        }
        // What is too large for a ConfigMap was given back.
        (OutputObject::Reserved { name: ours }, Lines::Dropped | Lines::TooLarge { .. })
            if *ours == wanted =>
        {
            reading(o, a, name, batch, now)
        }
        // After a restart the object that was reserved before is simply written to: that checks it as well.
        (OutputObject::Unknown, Lines::Kept(_)) => Decision::Act(Action::StoreResults { name: wanted }),
        _ => Decision::Act(reserve(o, &wanted)),
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
        // Successes that Gemini counts are paid for.
        (true, _) | (_, true) => after(tries.since, o.timings.result_patience),
        (false, false) => tries.since,
    };
    if give_up <= now {
        return end(o, a, batch, None, now);
    }
    let late = after(tries.since, o.timings.result_late) <= now;
    Decision::Wait {
        say: Some(Box::new(waiting(&ending::not_readable(&name, give_up), late))),
        wake: Wake::At(tries.next),
    }
}

fn end(
    o: &Observed<'_>,
    a: &Attempt,
    batch: Option<&Batch>,
    collected: Option<&Collected>,
    now: Timestamp,
) -> Decision {
    let stored: Option<&Placed> = match &o.memory.output {
        OutputObject::Stored { placed, .. } => Some(placed),
        _ => None,
    };
    let hint = new_hint(o.job, a);
    if let Some(reason) = ending::goes_on(o.job, a, batch, collected) {
        return drop_input_file(o, a, now).unwrap_or_else(|| {
            let end = ending::attempt_ended(o.job, a, batch, collected, stored, hint, reason);
            record(Change::AttemptEnded(Box::new(end)))
        });
    }
    // A reservation that will never be filled is given back, so that the name is free again.
    // It may have another name by now, or none.
    let reserved = match &o.memory.output {
        OutputObject::Reserved { name } => Some(name.clone()),
        _ => Destination::of(o.job),
    };
    let empty = |at: &Destination| !output_filled(o.job, at) && !o.memory.cleanup.output_released;
    if let (Some(name), None) = (reserved.filter(empty), stored) {
        return Decision::Act(Action::ReleaseOutput { name });
    }
    record(Change::Finished(Box::new(ending::ended(o.job, a, batch, collected, stored, hint))))
}
