//! Joins the lines of a result file with the requests they answer. Pure: no client required.
//!
//! By key only, never by order: Gemini's lines come in any order, and some do not come. Lines are counted
//! however many there are; they are kept only while they fit into the place they are for.
//!
//! With several attempts a request may have several lines. An error gives way to a response and to the error of a later
//! attempt, so that it stands there as long as nothing better is known; `retry` has the rules.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::identity::hex;
use super::retry::{self, Judge, Standing};
use crate::api::Usage;
use crate::gemini::results::{Outcome, ResultLine};

/// Failed and missing keys that are remembered by name.
const SAMPLE: usize = 20;

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

/// Lines that came from one attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Responses.
    pub succeeded: i64,
    /// Errors.
    pub failed: i64,
}

impl Collected {
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
    Kept(Box<Kept>),
}

/// Lines ready to be stored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept {
    /// A line for each request with a result, in input order: `key` and `response` or `error`.
    pub results: String,
    /// A line for each request without a result: `key`.
    pub missing: String,
    /// Lines that repeat a key, have one that was not sent, or can't be read, as they came.
    pub unmatched: String,
}

/// The keys that were sent.
#[derive(Clone, Debug)]
pub enum Keys {
    /// In input order.
    Known(Vec<String>),
    /// Never known: somebody else's file.
    Unknown,
    /// Known once, but the input was changed.
    Changed,
}

/// The line that a request has so far.
#[derive(Clone, Copy, Debug)]
struct Seen {
    attempt: i32,
    standing: Standing,
    code: Option<i32>,
    /// Read as one of an earlier attempt.
    early: bool,
    /// Bytes that it takes, with its line break.
    size: usize,
}

/// Takes a result file line by line.
#[derive(Debug)]
pub struct Collector {
    attempt: i32,
    judge: Judge,
    /// Input order; without known keys the order of arrival.
    keys: Vec<String>,
    index: HashMap<String, usize>,
    /// The line for each key, while lines are kept.
    found: Vec<Option<String>>,
    seen: Vec<Option<Seen>>,
    unmatched: String,
    /// Bytes kept or counted, and how many may be kept.
    size: usize,
    limit: Option<usize>,
    /// It was too much, and all that was kept is given back.
    overflowed: bool,
    hash: Sha256,
    out: Collected,
}

impl Collector {
    /// Lines are kept up to `limit` bytes, and not at all without one. `attempt`: whose result file is going to be read.
    #[must_use]
    pub fn new(keys: Keys, limit: Option<usize>, attempt: i32, judge: Judge) -> Self {
        let (keys, joined, input_changed) = match keys {
            Keys::Known(keys) => (keys, true, false),
            Keys::Unknown => (Vec::new(), false, false),
            Keys::Changed => (Vec::new(), false, true),
        };
        let index = keys.iter().enumerate().map(|(i, k)| (k.clone(), i)).collect();
        Self {
            attempt,
            judge,
            found: vec![None; keys.len()],
            seen: vec![None; keys.len()],
            index,
            keys,
            unmatched: String::new(),
            size: 0,
            limit,
            overflowed: false,
            hash: Sha256::new(),
            out: Collected { joined, input_changed, ..Collected::default() },
        }
    }

    /// The bytes of the file as they come, for its size and hash.
    pub fn bytes(&mut self, chunk: &[u8]) {
        self.out.bytes = self.out.bytes.saturating_add(i64::try_from(chunk.len()).unwrap_or(i64::MAX));
        self.hash.update(chunk);
    }

    /// A line that can't be read.
    pub fn malformed(&mut self, raw: &[u8]) {
        self.out.malformed_lines += 1;
        self.unmatched(&String::from_utf8_lossy(raw));
    }

    /// A line that an earlier attempt left; after a crash in between also one of this attempt, stored already.
    pub fn earlier(&mut self, raw: &str, line: &ResultLine<'_>, attempt: i32) {
        self.take(raw, line, attempt, true);
    }

    /// What earlier attempts left can't be read.
    pub fn without_earlier(&mut self) {
        self.out.without_earlier = true;
    }

    /// A line of this attempt.
    pub fn line(&mut self, raw: &str, line: &ResultLine<'_>) {
        self.take(raw, line, self.attempt, false);
    }

    fn take(&mut self, raw: &str, line: &ResultLine<'_>, attempt: i32, early: bool) {
        let known = line.key.as_deref().and_then(|key| self.index.get(key).copied());
        let old = known.and_then(|index| self.seen[index]);
        if !early && old.is_some_and(|old| old.early && old.attempt == attempt) {
            return; // this very line is stored already
        }
        self.add_usage(&line.usage);
        let Some(key) = line.key.as_deref() else {
            self.out.foreign_lines += 1;
            return self.unmatched(raw);
        };
        let index = match known {
            Some(index) => index,
            None if self.out.joined => {
                self.out.foreign_lines += 1;
                return self.unmatched(raw);
            }
            None => {
                let index = self.keys.len();
                self.keys.push(key.to_owned());
                self.index.insert(key.to_owned(), index);
                self.found.push(None);
                self.seen.push(None);
                index
            }
        };
        let standing = self.judge.standing(attempt, &line.outcome);
        if let Some(old) = old {
            if !retry::replaces((old.attempt, old.standing), (attempt, standing)) {
                self.out.duplicate_lines += 1;
                return self.unmatched(raw);
            }
            self.size = self.size.saturating_sub(old.size);
            let text = self.found[index].take();
            if old.attempt == attempt {
                self.out.duplicate_lines += 1;
                self.unmatched(&text.unwrap_or_default());
            }
        }
        let text = self.text(key, attempt, &line.outcome);
        let code = if let Outcome::Error { code, .. } = line.outcome { code } else { None };
        let size = text.len() + 1;
        self.seen[index] = Some(Seen { attempt, standing, code, early, size });
        if self.keep(size) {
            self.found[index] = Some(text);
        }
    }

    /// The line as it is stored. Which attempt it came from is of interest only if there were several.
    fn text(&self, key: &str, attempt: i32, outcome: &Outcome<'_>) -> String {
        let attempt = (self.attempt > 1).then_some(attempt);
        match outcome {
            // The response is kept byte by byte: it was paid for.
            Outcome::Response(response) => {
                let attempt = attempt.map_or_else(String::new, |n| format!(",\"attempt\":{n}"));
                format!("{{\"key\":{}{attempt},\"response\":{}}}", json!(key), response.get())
            }
            Outcome::Error { code, message } => {
                let mut error = serde_json::Map::new();
                if let Some(code) = code {
                    error.insert("code".to_owned(), json!(code));
                }
                if let Some(message) = message {
                    error.insert("message".to_owned(), json!(message));
                }
                let mut line = json!({"key": key, "error": error});
                if let Some(attempt) = attempt {
                    line["attempt"] = json!(attempt);
                }
                line.to_string()
            }
        }
    }

    fn unmatched(&mut self, raw: &str) {
        if self.keep(raw.len() + 1) {
            self.unmatched.push_str(raw);
            self.unmatched.push('\n');
        }
    }

    /// Whether so much more may be kept. Once it is too much, all that was kept is given back.
    fn keep(&mut self, bytes: usize) -> bool {
        self.size = self.size.saturating_add(bytes);
        let Some(limit) = self.limit else { return false };
        if self.size > limit && !self.overflowed {
            self.overflowed = true;
            self.found = vec![None; self.found.len()];
            self.unmatched = String::new();
        }
        !self.overflowed
    }

    fn add_usage(&mut self, line: &crate::gemini::results::Usage) {
        let sum = &mut self.out.usage;
        sum.prompt_tokens = sum.prompt_tokens.saturating_add(line.prompt);
        sum.output_tokens = sum.output_tokens.saturating_add(line.output);
        sum.total_tokens = sum.total_tokens.saturating_add(line.total);
    }

    /// Counts the line that a request has in the end.
    fn count(&mut self, index: usize, seen: Seen) {
        let of_attempt = self.out.by_attempt.entry(seen.attempt).or_default();
        if seen.standing == Standing::Response {
            of_attempt.succeeded += 1;
            self.out.succeeded_lines += 1;
            return;
        }
        of_attempt.failed += 1;
        self.out.failed_lines += 1;
        self.out.unanswered_lines += i64::from(seen.standing == Standing::Unanswered);
        self.out.retryable_lines += i64::from(seen.standing == Standing::Retryable);
        if self.out.failed.len() < SAMPLE {
            self.out.failed.push((self.keys[index].clone(), seen.code));
        }
    }

    /// The whole file was read.
    #[must_use]
    pub fn finish(mut self, file: Option<String>) -> Collected {
        let mut missing = String::new();
        for index in 0..self.keys.len() {
            if let Some(seen) = self.seen[index] {
                self.count(index, seen);
                continue;
            }
            let key = &self.keys[index];
            self.out.missing_keys += 1;
            if self.out.missing.len() < SAMPLE {
                self.out.missing.push(key.clone());
            }
            let line = json!({"key": key}).to_string();
            if self.keep(line.len() + 1) {
                let _ = writeln!(missing, "{line}"); // writing to a String cannot fail
            }
        }
        self.out.lines = match self.limit {
            None => Lines::Dropped,
            Some(_) if self.overflowed => {
                Lines::TooLarge { bytes: i64::try_from(self.size).unwrap_or(i64::MAX) }
            }
            Some(_) => Lines::Kept(Box::new(Kept {
                results: self.found.into_iter().flatten().fold(String::new(), |mut all, line| {
                    all.push_str(&line);
                    all.push('\n');
                    all
                }),
                missing,
                unmatched: self.unmatched,
            })),
        };
        self.out.sha256 = hex(&self.hash.finalize());
        self.out.file = file;
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    use crate::api::GeminiBatchJob;

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
        let keys = ["a", "b", "c"].map(str::to_owned).to_vec();
        Collector::new(Keys::Known(keys), Some(limit), attempt, Judge::of(&job(first)))
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
        c.earlier(line, &ResultLine::parse(line).unwrap(), attempt);
    }

    fn now(c: &mut Collector, line: &str) {
        c.line(line, &ResultLine::parse(line).unwrap());
    }

    fn kept(out: &Collected) -> Kept {
        let Lines::Kept(kept) = &out.lines else { panic!("{:?}", out.lines) };
        (**kept).clone()
    }

    fn results(out: &Collected) -> Vec<Value> {
        kept(out).results.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn the_lines_of_a_job_with_one_attempt_say_nothing_of_attempts() {
        let mut c = of(1, None, 1000);
        now(&mut c, &bad("b", 14));
        now(&mut c, &ok("a", "x"));
        let out = c.finish(None);
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
        let out = c.finish(None);
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
        let out = c.finish(None);
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
            let out = c.finish(None);
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
        let out = c.finish(None);
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
            let out = c.finish(None);
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
        let out = c.finish(None);
        assert_eq!(kept(&out).results.len(), tagged);
        let mut c = of(2, Some("RequestsFailed"), tagged + missing - 1);
        now(&mut c, &short);
        let out = c.finish(None);
        assert!(
            matches!(out.lines, Lines::TooLarge { bytes } if bytes == i64::try_from(tagged + missing).unwrap())
        );
    }

    /// Too much for a moment is too much: nothing is stored that lacks what was given back.
    #[test]
    fn what_did_not_fit_once_is_not_stored_in_part() {
        let mut c = of(2, Some("RequestsFailed"), 120);
        early(&mut c, &ok("a", "x"), 1);
        early(&mut c, &bad("b", 14), 1);
        now(&mut c, &ok("b", ""));
        now(&mut c, &ok("c", "a long response that does not fit any more"));
        assert!(matches!(c.finish(None).lines, Lines::TooLarge { .. }));
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
            let out = c.finish(None);
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
