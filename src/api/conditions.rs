//! Conditions: set one, read one, compare two lists without their times.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use super::Reason;

/// With `spec.dryRun`: all that a submission needs is there.
pub const VALIDATED: &str = "Validated";
/// Gemini has the batch.
pub const SUBMITTED: &str = "Submitted";
/// `spec.suspend` holds the job.
pub const SUSPENDED: &str = "Suspended";
/// Results are where `spec.output` says.
pub const COMPLETE: &str = "Complete";
/// The job ended without its results.
pub const FAILED: &str = "Failed";
/// Complete or Failed: the condition to wait for.
pub const FINISHED: &str = "Finished";
/// kstatus: the job is as its user wants it.
pub const READY: &str = "Ready";
/// kstatus: the operator is at work on it.
pub const RECONCILING: &str = "Reconciling";
/// kstatus: somebody has to change something.
pub const STALLED: &str = "Stalled";

/// The API server's limit is 32,768 bytes; a status should stay small.
const MAX_MESSAGE_BYTES: usize = 1024;

/// Sets one condition. `lastTransitionTime` moves only when the status value changes.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: bool,
    reason: Reason,
    message: &str,
    generation: i64,
    now: Timestamp,
) {
    let status = if status { "True" } else { "False" };
    let message = cut(message, MAX_MESSAGE_BYTES).to_owned();
    let reason = reason.as_str().to_owned();
    match conditions.iter_mut().find(|c| c.type_ == type_) {
        Some(c) => {
            if c.status != status {
                status.clone_into(&mut c.status);
                c.last_transition_time = Time(now);
            }
            c.reason = reason;
            c.message = message;
            c.observed_generation = Some(generation);
        }
        None => conditions.push(Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason,
            message,
            observed_generation: Some(generation),
            last_transition_time: Time(now),
        }),
    }
}

/// Turns a condition off if it is there; one that was never there stays away.
pub fn clear(conditions: &mut Vec<Condition>, type_: &str, reason: Reason, generation: i64, now: Timestamp) {
    if conditions.iter().any(|c| c.type_ == type_) {
        set(conditions, type_, false, reason, "", generation, now);
    }
}

/// Whether the condition is there and `True`.
#[must_use]
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    conditions.iter().any(|c| c.type_ == type_ && c.status == "True")
}

/// The condition of that type.
#[must_use]
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// Cuts on a character boundary.
#[must_use]
pub fn cut(text: &str, max_bytes: usize) -> &str {
    if text.len() <= max_bytes {
        return text;
    }
    let mut end = max_bytes;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn transition_time_moves_only_with_the_status_value() {
        let mut list = Vec::new();
        set(&mut list, READY, false, Reason::Submitting, "a", 1, at(1));
        set(&mut list, READY, false, Reason::Submitted, "b", 2, at(2));
        assert_eq!(list[0].last_transition_time, Time(at(1)));
        assert_eq!((list[0].reason.as_str(), list[0].observed_generation), ("Submitted", Some(2)));
        set(&mut list, READY, true, Reason::Completed, "c", 2, at(3));
        assert_eq!(list[0].last_transition_time, Time(at(3)));
        assert_eq!(list.len(), 1);
    }

    #[test]
    fn a_condition_that_was_never_set_is_not_cleared_into_being() {
        let mut list = Vec::new();
        clear(&mut list, STALLED, Reason::Submitted, 1, at(1));
        assert!(list.is_empty());
        set(&mut list, STALLED, true, Reason::InputInvalid, "line 7", 1, at(1));
        clear(&mut list, STALLED, Reason::Submitted, 1, at(2));
        assert!(!is_true(&list, STALLED));
    }

    proptest! {
        #[test]
        fn cut_is_a_prefix_within_the_limit(text in ".{0,40}", max in 0usize..60) {
            let short = cut(&text, max);
            prop_assert!(short.len() <= max && text.starts_with(short));
        }
    }
}
