//! Which requests a further attempt carries, and which of several lines for one request counts. Pure: no client
//! required.
//!
//! `backoffLimit` is about batches that Gemini does not finish, `retryPolicy` about requests that fail in one. Both
//! come down to one question about the line that a request has by now: is it the last word?

use crate::api::{GeminiBatchJob, Reason, RetryPolicy};
use crate::gemini::results::Outcome;

/// What a line means for the attempts to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A response: the last word.
    Response,
    /// An error: the last word, as far as `spec.retryPolicy` goes.
    Failed,
    /// An error that `spec.retryPolicy` sends again, as long as it allows attempts.
    Retryable,
    /// The batch ended before it was the request's turn.
    Unanswered,
}

impl Standing {
    /// Whether a further attempt carries the request; `retry`: whether it may carry failed ones.
    #[must_use]
    pub fn is_open(self, retry: bool) -> bool {
        match self {
            Self::Response | Self::Failed => false,
            Self::Retryable => retry,
            Self::Unanswered => true,
        }
    }
}

/// `google.rpc.Code` of requests that a batch did not come to before it was cancelled, or its time was over.
const CANCELLED: i32 = 1;
const DEADLINE_EXCEEDED: i32 = 4;

/// Judges the lines of a job.
#[derive(Clone, Debug)]
pub struct Judge {
    policy: Option<RetryPolicy>,
    /// Attempts whose batches were not worked on to their end.
    cut_short: Vec<i32>,
}

impl Judge {
    /// By what the job says now, and how its earlier attempts ended.
    #[must_use]
    pub fn of(job: &GeminiBatchJob) -> Self {
        let attempts = job.status.iter().flat_map(|s| &s.attempts);
        let cut_short = attempts.filter(|a| a.outcome.as_ref().is_some_and(|o| !ended_whole(&o.reason)));
        Self { policy: job.spec.retry_policy.clone(), cut_short: cut_short.map(|a| a.number).collect() }
    }

    /// The same about an attempt whose end is not recorded yet.
    #[must_use]
    pub fn and(mut self, attempt: i32, cut_short: bool) -> Self {
        if cut_short {
            self.cut_short.push(attempt);
        }
        self
    }

    /// What a line of that attempt means.
    #[must_use]
    pub fn standing(&self, attempt: i32, outcome: &Outcome<'_>) -> Standing {
        match outcome {
            Outcome::Response(_) => Standing::Response,
            // Of a batch that Gemini finished they are errors like others: the request itself took too long.
            Outcome::Error { code: Some(CANCELLED | DEADLINE_EXCEEDED), .. }
                if self.cut_short.contains(&attempt) =>
            {
                Standing::Unanswered
            }
            Outcome::Error { code, .. } => match &self.policy {
                Some(policy) if policy.is_worth_it(*code) => Standing::Retryable,
                _ => Standing::Failed,
            },
        }
    }
}

/// Of two lines for one request, each with its attempt and whether it is a response: whether the later one read takes
/// the place of the earlier. A response is never lost, and of errors the last attempt's counts.
#[must_use]
pub fn replaces(old: (i32, Standing), new: (i32, Standing)) -> bool {
    match (old.1, new.1) {
        (Standing::Response, _) => false,
        (_, Standing::Response) => true,
        _ => new.0 > old.0,
    }
}

/// Whether an attempt that ended so was worked on to its end: only requests failed, not the batch.
fn ended_whole(reason: &str) -> bool {
    reason == Reason::RequestsFailed.as_str()
}

/// Whether an attempt that is over left no request without its turn, so that later ones can only better the results.
#[must_use]
pub fn was_whole(job: &GeminiBatchJob) -> bool {
    let attempts = job.status.iter().flat_map(|s| &s.attempts);
    attempts.filter_map(|a| a.outcome.as_ref()).any(|o| ended_whole(&o.reason))
}

/// Attempts that are over, as `spec.retryPolicy.maxAttempts` counts them.
#[must_use]
pub fn tries(job: &GeminiBatchJob) -> i32 {
    let over = job.status.iter().flat_map(|s| &s.attempts).filter_map(|a| a.outcome.as_ref());
    i32::try_from(over.filter(|o| o.reason != Reason::Suspended.as_str()).count()).unwrap_or(i32::MAX)
}

/// Whether failed requests may be sent again after so many tries.
#[must_use]
pub fn allowed_after(job: &GeminiBatchJob, tries: i32) -> bool {
    job.spec.retry_policy.as_ref().is_some_and(|policy| tries < policy.max_attempts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    use crate::api::ErrorCode;

    fn judge(codes: Option<Vec<ErrorCode>>) -> Judge {
        Judge { policy: Some(RetryPolicy { max_attempts: 2, codes }), cut_short: vec![2] }
    }

    fn error(code: impl Into<Option<i32>>) -> Outcome<'static> {
        Outcome::Error { code: code.into(), message: None }
    }

    #[test]
    fn errors_that_may_pass_are_worth_another_try() {
        let worth: Vec<i32> =
            (0..20).filter(|c| judge(None).standing(1, &error(*c)) == Standing::Retryable).collect();
        assert_eq!(worth, [4, 8, 13, 14]);
        assert_eq!(judge(None).standing(1, &error(None)), Standing::Failed);
        let without = Judge { policy: None, cut_short: Vec::new() };
        assert_eq!(without.standing(1, &error(14)), Standing::Failed);
    }

    #[test]
    fn the_list_of_codes_is_the_whole_list() {
        let own = judge(Some(vec![ErrorCode::Unknown, ErrorCode::Aborted]));
        for (code, expected) in [
            (Some(2), Standing::Retryable),
            (Some(10), Standing::Retryable),
            (None, Standing::Retryable),
            (Some(14), Standing::Failed),
            (Some(4), Standing::Failed),
            (Some(1), Standing::Failed),
        ] {
            assert_eq!(own.standing(1, &error(code)), expected, "{code:?}");
        }
    }

    /// The same two codes say that the batch ended, or that the request took too long.
    #[test]
    fn a_request_that_never_had_its_turn_is_told_from_one_that_failed() {
        let own = judge(Some(vec![ErrorCode::Unavailable]));
        for code in [1, 4] {
            assert_eq!(own.standing(2, &error(code)), Standing::Unanswered);
            assert_eq!(own.standing(1, &error(code)), Standing::Failed);
            assert_eq!(own.clone().and(1, true).standing(1, &error(code)), Standing::Unanswered);
            assert_eq!(own.clone().and(1, false).standing(1, &error(code)), Standing::Failed);
        }
        assert_eq!(own.standing(2, &error(14)), Standing::Retryable);
        assert!(Standing::Unanswered.is_open(false) && Standing::Retryable.is_open(true));
        assert!(!Standing::Retryable.is_open(false) && !Standing::Failed.is_open(true));
    }

    /// A job whose attempts ended so.
    fn job(reasons: &[&str]) -> GeminiBatchJob {
        let attempt = |(number, reason): (i32, &&str)| {
            let outcome = json!({"reason": reason, "succeeded": 0, "failed": 0});
            json!({"number": number, "sendId": "s", "displayName": "d", "inputFile": "f", "outcome": outcome,
                "credentialFingerprint": "k", "intentTime": "2026-01-01T00:00:00.000000Z"})
        };
        serde_json::from_value(json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob", "metadata": {"name": "job"},
            "spec": {"model": "m", "retryPolicy": {"maxAttempts": 2}},
            "status": {"attempts": (1..).zip(reasons).map(attempt).collect::<Vec<_>>()},
        }))
        .unwrap()
    }

    #[test]
    fn every_batch_is_a_try_unless_it_was_suspended() {
        for (reasons, expected) in [
            (&[][..], 0),
            (&["RequestsFailed"], 1),
            (&["Suspended", "BatchExpired"], 1),
            (&["BatchFailed", "Suspended", "RequestsFailed", "Suspended"], 2),
        ] {
            let job = job(reasons);
            assert_eq!(tries(&job), expected, "{reasons:?}");
            assert_eq!(allowed_after(&job, tries(&job)), expected < 2);
            assert_eq!(was_whole(&job), reasons.contains(&"RequestsFailed"));
            let cut_short = reasons.iter().filter(|r| **r != "RequestsFailed").count();
            assert_eq!(Judge::of(&job).cut_short.len(), cut_short);
        }
    }

    #[test]
    fn names_are_googles() {
        let names =
            ["CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"];
        let more =
            ["PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE"];
        let rest = ["UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"];
        let all = names.into_iter().chain(more).chain(rest);
        for (number, name) in (1..).zip(all) {
            let code: ErrorCode = serde_json::from_value(json!(name)).unwrap();
            assert_eq!(code.number(), number, "{name}");
        }
        assert!(serde_json::from_value::<ErrorCode>(json!("OK")).is_err());
    }

    fn line() -> impl Strategy<Value = (i32, Standing)> {
        use Standing::{Failed, Response, Retryable, Unanswered};
        (1..5i32, prop::sample::select(vec![Response, Failed, Retryable, Unanswered]))
    }

    proptest! {
        /// Whatever the lines of a request are: one that succeeded succeeded, and otherwise its last error counts.
        #[test]
        fn no_success_is_lost_and_the_last_error_counts(lines in prop::collection::vec(line(), 1..8)) {
            let mut kept = lines[0];
            for line in &lines[1..] {
                if replaces(kept, *line) {
                    kept = *line;
                }
            }
            let succeeded = lines.iter().any(|(_, standing)| *standing == Standing::Response);
            prop_assert_eq!(kept.1 == Standing::Response, succeeded);
            if !succeeded {
                prop_assert_eq!(Some(kept.0), lines.iter().map(|(attempt, _)| *attempt).max());
            }
        }
    }
}
