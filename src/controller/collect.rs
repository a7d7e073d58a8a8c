//! What a batch left, joined with the requests that were sent. Pure: no client required.
//!
//! Lines are counted however many there are; they are kept only if there is a place for them. How they are joined stands
//! in [`super::join`], and which of several lines for one request counts in [`super::retry`].

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

pub use super::join::Tally;
use super::join::{Joined, What};
use super::transfers::Room;
use crate::api::Usage;

/// What a result file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Collected {
    /// Requests with a response.
    pub succeeded_lines: i64,
    /// Requests with an error.
    pub failed_lines: i64,
    /// The first of them, with Google's code where there is one.
    pub failed: Vec<(String, Option<i32>)>,
    /// Requests without any line.
    pub missing_keys: i64,
    /// The first of them.
    pub missing: Vec<String>,
    /// Those of the failed requests that were never answered: their batch ended before it was their turn. They can
    /// be sent again.
    pub unanswered_lines: i64,
    /// Those that `spec.retryPolicy` sends again, if it allows a further attempt.
    pub retryable_lines: i64,
    /// Which attempt the lines of requests came from.
    pub by_attempt: BTreeMap<i32, Tally>,
    /// What earlier attempts of the job left could not be read: it is not among these.
    pub without_earlier: bool,
    /// Lines whose key had a line before.
    pub duplicate_lines: i64,
    /// Lines whose key was not sent, or that have none.
    pub foreign_lines: i64,
    /// Lines that are not what Gemini's guide describes.
    pub malformed_lines: i64,
    /// Whether the keys were known, so that the lines could be joined.
    pub joined: bool,
    /// Whether they are not known because the input was changed after the submission.
    pub input_changed: bool,
    /// Tokens, summed over all lines.
    pub usage: Usage,
    /// The result file.
    pub file: Option<String>,
    /// Its size in bytes.
    pub bytes: i64,
    /// Its SHA-256 in hexadecimal.
    pub sha256: String,
    /// The lines.
    pub lines: Lines,
}

impl Collected {
    /// What a join found.
    #[must_use]
    pub fn of(joined: &Joined) -> Self {
        let counts = joined.counts.clone();
        Self {
            succeeded_lines: counts.succeeded,
            failed_lines: counts.failed,
            failed: counts.failed_sample,
            missing_keys: counts.missing,
            missing: counts.missing_sample,
            unanswered_lines: counts.unanswered,
            retryable_lines: counts.retryable,
            by_attempt: counts.by_attempt,
            duplicate_lines: counts.duplicate,
            foreign_lines: counts.foreign,
            malformed_lines: counts.malformed,
            usage: Usage {
                prompt_tokens: counts.usage.prompt,
                output_tokens: counts.usage.output,
                total_tokens: counts.usage.total,
            },
            ..Self::default()
        }
    }

    /// Requests that were not answered: those without a line, and those that were never worked on. `None` if that
    /// can't be told, since the keys are not known and some have a result.
    #[must_use]
    pub fn open(&self) -> Option<i64> {
        self.to_send(false)
    }

    /// Requests that a further attempt would carry: those that were not answered and, with `retry`, those whose error is
    /// worth another try. `None` as above.
    #[must_use]
    pub fn to_send(&self, retry: bool) -> Option<i64> {
        let failed = if retry { self.retryable_lines } else { 0 };
        self.joined.then_some(self.missing_keys + self.unanswered_lines + failed)
    }

    /// Whether there is anything to store.
    #[must_use]
    pub fn has_results(&self) -> bool {
        self.succeeded_lines + self.failed_lines + self.foreign_lines + self.malformed_lines > 0
    }
}

/// The lines themselves.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Lines {
    /// Nobody wants them, or they were given back to save memory.
    #[default]
    Dropped,
    /// They are more than fit.
    TooLarge {
        /// How much they would be, in bytes.
        bytes: i64,
    },
    /// Here they are.
    Kept(Kept),
}

/// Lines ready to be stored, however many, and the right to hold them.
#[derive(Clone, Debug, Default)]
pub struct Kept(pub Arc<Joined>, pub Option<Room>);

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// More lines than anybody would count twice.
const COUNTED_BYTES: u64 = 64 << 20;
const CHUNK_BYTES: usize = 64 << 10;

impl Kept {
    /// What is kept of them for a place that takes so many bytes, or any number.
    pub fn within(self, limit: Option<usize>) -> io::Result<Lines> {
        let Some(limit) = limit else { return Ok(Lines::Kept(self)) };
        let bytes = self.bytes(&[What::Results, What::Missing, What::Unmatched])?;
        Ok(if bytes > limit as u64 {
            Lines::TooLarge { bytes: i64::try_from(bytes).unwrap_or(i64::MAX) }
        } else {
            Lines::Kept(self)
        })
    }

    /// How many bytes the lines of these kinds are; as they came, if they are very many.
    fn bytes(&self, kinds: &[What]) -> io::Result<u64> {
        let raw = self.0.raw_bytes();
        if raw > COUNTED_BYTES {
            return Ok(raw);
        }
        let mut all = 0;
        for what in kinds {
            let mut stream = self.0.stream(*what);
            while let Some(chunk) = stream.next(CHUNK_BYTES)? {
                all += chunk.len() as u64;
            }
        }
        Ok(all)
    }

    /// The lines of one kind, which have to be few. What is no text is made so.
    pub fn text(&self, what: What) -> io::Result<String> {
        let mut stream = self.0.stream(what);
        let mut all = Vec::new();
        while let Some(chunk) = stream.next(CHUNK_BYTES)? {
            all.extend_from_slice(&chunk);
        }
        Ok(String::from_utf8(all).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
    }
}

/// Lines as they are stored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Text {
    /// A line for each request with a result, in input order: `key` and `response` or `error`.
    pub results: String,
    /// A line for each request without a result: `key`.
    pub missing: String,
    /// Lines that repeat a key, have one that was not sent, or can't be read, as they came.
    pub unmatched: String,
}

/// Lines for a `ConfigMap`, which are few.
pub fn text(kept: &Kept) -> io::Result<Text> {
    Ok(Text {
        results: kept.text(What::Results)?,
        missing: kept.text(What::Missing)?,
        unmatched: kept.text(What::Unmatched)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::api::GeminiBatchJob;
    use crate::controller::join::{Join, Keep, Limits, Scratch};
    use crate::controller::retry::Judge;
    use crate::gemini::results::ResultLine;

    /// A join and how much of it may be stored.
    struct Collector(Join, usize);

    impl Collector {
        fn finish(self) -> Collected {
            let joined = self.0.finish().unwrap();
            let collected = Collected { joined: true, ..Collected::of(&joined) };
            Collected { lines: Kept(Arc::new(joined), None).within(Some(self.1)).unwrap(), ..collected }
        }
    }

    /// A job that sends `UNAVAILABLE` again, whose first attempt ended so.
    fn job(first: Option<&str>) -> GeminiBatchJob {
        let attempt = |number: i32| {
            json!({"number": number, "sendId": "s", "displayName": "d", "inputFile": "f",
                "credentialFingerprint": "k", "intentTime": "2026-01-01T00:00:00.000000Z"})
        };
        let mut attempts = vec![attempt(1)];
        if let Some(reason) = first {
            attempts[0]["outcome"] = json!({"reason": reason, "succeeded": 0, "failed": 0});
            attempts.push(attempt(2));
        }
        serde_json::from_value(json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob", "metadata": {"name": "job"},
            "spec": {"model": "m", "retryPolicy": {"maxAttempts": 3, "codes": ["UNAVAILABLE"]}},
            "status": {"attempts": attempts},
        }))
        .unwrap()
    }

    fn of(attempt: i32, first: Option<&str>, limit: usize) -> Collector {
        let limits = Limits::new(Scratch::new(std::env::temp_dir(), 0));
        let mut join = Join::with_keys(limits, Keep::Lines, attempt, Judge::of(&job(first)));
        for key in ["a", "b", "c"] {
            join.key(key).unwrap();
        }
        Collector(join, limit)
    }

    fn ok(key: &str, text: &str) -> String {
        format!(
            "{{\"key\":\"{key}\",\"response\":{{\"text\":\"{text}\",\"usageMetadata\":{{\"totalTokenCount\":3}}}}}}"
        )
    }

    fn bad(key: &str, code: i32) -> String {
        json!({"key": key, "error": {"code": code, "message": "m"}}).to_string()
    }

    fn early(c: &mut Collector, line: &str, attempt: i32) {
        c.0.earlier(line, &ResultLine::parse(line).unwrap(), attempt).unwrap();
    }

    fn now(c: &mut Collector, line: &str) {
        c.0.line(line, &ResultLine::parse(line).unwrap()).unwrap();
    }

    fn kept(out: &Collected) -> Text {
        let Lines::Kept(kept) = &out.lines else { panic!("{:?}", out.lines) };
        text(kept).unwrap()
    }

    fn results(out: &Collected) -> Vec<Value> {
        kept(out).results.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn the_lines_of_a_job_with_one_attempt_say_nothing_of_attempts() {
        let mut c = of(1, None, 1000);
        now(&mut c, &bad("b", 14));
        now(&mut c, &ok("a", "x"));
        let out = c.finish();
        assert_eq!(
            kept(&out).results,
            format!("{}\n{}\n", ok("a", "x"), json!({"key": "b", "error": {"code": 14, "message": "m"}}))
        );
        assert_eq!((out.succeeded_lines, out.failed_lines, out.missing_keys), (1, 1, 1));
        assert_eq!((out.to_send(false), out.to_send(true)), (Some(1), Some(2)));
    }

    #[test]
    fn an_error_stands_until_something_better_comes() {
        let mut c = of(2, Some("RequestsFailed"), 1000);
        early(&mut c, &ok("a", "x"), 1);
        early(&mut c, &bad("b", 14), 1);
        early(&mut c, &bad("c", 14), 1);
        now(&mut c, &ok("b", "y"));
        let out = c.finish();
        let lines = results(&out);
        let of: Vec<_> =
            lines.iter().map(|l| (l["key"].as_str().unwrap(), l["attempt"].as_i64().unwrap())).collect();
        assert_eq!(of, [("a", 1), ("b", 2), ("c", 1)]);
        assert_eq!((&lines[1]["response"]["text"], &lines[2]["error"]["code"]), (&json!("y"), &json!(14)));
        assert_eq!((out.succeeded_lines, out.failed_lines, out.retryable_lines), (2, 1, 1));
        assert_eq!((out.duplicate_lines, out.missing_keys, out.usage.total_tokens), (0, 0, 6));
        assert_eq!(out.failed, [("c".to_owned(), Some(14))]);
        let tally = |succeeded, failed| Tally { succeeded, failed };
        assert_eq!(out.by_attempt, BTreeMap::from([(1, tally(1, 1)), (2, tally(1, 0))]));
    }

    #[test]
    fn of_errors_the_last_attempts_counts_and_no_success_is_taken_back() {
        let mut c = of(2, Some("RequestsFailed"), 1000);
        early(&mut c, &ok("a", "x"), 1);
        early(&mut c, &bad("b", 14), 1);
        now(&mut c, &bad("a", 14));
        now(&mut c, &bad("b", 3));
        let out = c.finish();
        let lines = results(&out);
        assert_eq!((&lines[0]["response"]["text"], &lines[1]["error"]["code"]), (&json!("x"), &json!(3)));
        assert_eq!((out.succeeded_lines, out.failed_lines, out.retryable_lines), (1, 1, 0));
        // The one that was not asked for is kept beside.
        assert_eq!((out.duplicate_lines, kept(&out).unmatched), (1, bad("a", 14) + "\n"));
    }

    #[test]
    fn within_one_file_a_response_counts_before_an_error() {
        for lines in [[ok("a", "x"), bad("a", 14)], [bad("a", 14), ok("a", "x")]] {
            let mut c = of(1, None, 1000);
            for line in &lines {
                now(&mut c, line);
            }
            let out = c.finish();
            assert_eq!((out.succeeded_lines, out.failed_lines, out.duplicate_lines), (1, 0, 1));
            assert!(kept(&out).unmatched.contains("14"));
        }
    }

    /// After a crash the results of this attempt are stored, and its file is read again.
    #[test]
    fn lines_that_are_stored_already_count_once() {
        let mut c = of(2, Some("RequestsFailed"), 1000);
        for (line, attempt) in [(ok("a", "x"), 1), (ok("b", "y"), 2), (bad("c", 14), 2)] {
            early(&mut c, &line, attempt);
        }
        now(&mut c, &ok("b", "y"));
        now(&mut c, &bad("c", 14));
        let out = c.finish();
        assert_eq!((out.succeeded_lines, out.failed_lines, out.duplicate_lines), (2, 1, 0));
        assert_eq!((out.usage.total_tokens, kept(&out).unmatched.as_str()), (6, ""));
    }

    #[test]
    fn a_line_that_says_that_the_batch_ended_first_is_no_error_of_the_request() {
        for (reason, unanswered) in [("BatchExpired", 1), ("Suspended", 1), ("RequestsFailed", 0)] {
            let mut c = of(2, Some(reason), 1000);
            early(&mut c, &ok("a", "x"), 1);
            early(&mut c, &bad("b", 4), 1);
            early(&mut c, &bad("c", 3), 1);
            let out = c.finish();
            assert_eq!((out.unanswered_lines, out.failed_lines), (unanswered, 2), "{reason}");
            assert_eq!(out.to_send(true), Some(unanswered), "{reason}");
        }
    }

    #[test]
    fn what_is_replaced_takes_no_room() {
        let (short, long) = (ok("a", "x"), bad("a", 14));
        let tagged = short.len() + ",\"attempt\":2".len() + 1;
        let mut c = of(2, Some("RequestsFailed"), 400);
        early(&mut c, &long, 1);
        now(&mut c, &short);
        let missing = 2 * "{\"key\":\"b\"}\n".len();
        let out = c.finish();
        assert_eq!(kept(&out).results.len(), tagged);
        let mut c = of(2, Some("RequestsFailed"), tagged + missing - 1);
        now(&mut c, &short);
        let out = c.finish();
        assert!(
            matches!(out.lines, Lines::TooLarge { bytes } if bytes == i64::try_from(tagged + missing).unwrap())
        );
    }

    proptest! {
        /// Whatever lines come from whichever attempts: each request is counted once, and once only.
        #[test]
        fn every_request_counts_once(
            first in prop::collection::vec((0usize..3, any::<bool>()), 0..6),
            second in prop::collection::vec((0usize..3, any::<bool>()), 0..6),
        ) {
            let keys = ["a", "b", "c"];
            let text = |(key, good): &(usize, bool)| if *good { ok(keys[*key], "x") } else { bad(keys[*key], 14) };
            let mut c = of(2, Some("RequestsFailed"), 10_000);
            for l in &first {
                early(&mut c, &text(l), 1);
            }
            for l in &second {
                now(&mut c, &text(l));
            }
            let out = c.finish();
            prop_assert_eq!(out.succeeded_lines + out.failed_lines + out.missing_keys, 3);
            prop_assert_eq!(results(&out).len(), usize::try_from(3 - out.missing_keys).unwrap());
            let all = || first.iter().chain(&second);
            let succeeded = (0..3).filter(|k| all().any(|(key, good)| key == k && *good)).count();
            prop_assert_eq!(out.succeeded_lines, i64::try_from(succeeded).unwrap());
            // Nothing that came is thrown away.
            let lines = kept(&out).results.lines().count() + kept(&out).unmatched.lines().count();
            let replaced = (0..3).filter(|k| first.iter().any(|l| l.0 == *k) && second.iter().any(|l| l.0 == *k)
                && !first.iter().any(|l| l.0 == *k && l.1)).count();
            prop_assert_eq!(lines + replaced, first.len() + second.len());
            let tally: i64 = out.by_attempt.values().map(|t| t.succeeded + t.failed).sum();
            prop_assert_eq!(tally, 3 - out.missing_keys);
        }
    }
}
