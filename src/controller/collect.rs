//! Joins the lines of a result file with the requests they answer. Pure: no client required.
//!
//! By key only, never by order: Gemini's lines come in any order, and some do not come. Lines are counted
//! however many there are; they are kept only while they fit into the place they are for.

use std::collections::HashMap;
use std::fmt::Write as _;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::identity::hex;
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
    /// Requests that a further attempt would carry: those without a line, and those that were never answered. `None`
    /// if that can't be told, since the keys are not known and some have a result.
    #[must_use]
    pub fn open(&self) -> Option<i64> {
        self.joined.then_some(self.missing_keys + self.unanswered_lines)
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

/// `google.rpc.Code` of requests that a batch did not come to before it was cancelled, or its time was over.
const CANCELLED: i32 = 1;
const DEADLINE_EXCEEDED: i32 = 4;

/// Whether the request was never answered because its batch ended first.
#[must_use]
pub fn is_unanswered(outcome: &Outcome<'_>) -> bool {
    matches!(outcome, Outcome::Error { code: Some(CANCELLED | DEADLINE_EXCEEDED), .. })
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

/// Takes a result file line by line.
#[derive(Debug)]
pub struct Collector {
    /// Input order; without known keys the order of arrival.
    keys: Vec<String>,
    index: HashMap<String, usize>,
    /// The line for each key, while lines are kept.
    found: Vec<Option<String>>,
    /// Whether the key has had a line.
    seen: Vec<bool>,
    /// Whether that was one of an earlier attempt.
    early: Vec<bool>,
    unmatched: String,
    /// Bytes kept or counted, and how many may be kept.
    size: usize,
    limit: Option<usize>,
    hash: Sha256,
    out: Collected,
}

impl Collector {
    /// Lines are kept up to `limit` bytes, and not at all without one.
    #[must_use]
    pub fn new(keys: Keys, limit: Option<usize>) -> Self {
        let (keys, joined, input_changed) = match keys {
            Keys::Known(keys) => (keys, true, false),
            Keys::Unknown => (Vec::new(), false, false),
            Keys::Changed => (Vec::new(), false, true),
        };
        let index = keys.iter().enumerate().map(|(i, k)| (k.clone(), i)).collect();
        Self {
            found: vec![None; keys.len()],
            seen: vec![false; keys.len()],
            early: vec![false; keys.len()],
            index,
            keys,
            unmatched: String::new(),
            size: 0,
            limit,
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

    /// A line that an earlier attempt left. What was never answered then was sent again.
    pub fn earlier(&mut self, raw: &str, line: &ResultLine<'_>) {
        if is_unanswered(&line.outcome) {
            return;
        }
        self.line(raw, line);
        if let Some(index) = line.key.as_deref().and_then(|key| self.index.get(key)) {
            self.early[*index] = true;
        }
    }

    /// What earlier attempts left can't be read.
    pub fn without_earlier(&mut self) {
        self.out.without_earlier = true;
    }

    /// A line.
    pub fn line(&mut self, raw: &str, line: &ResultLine<'_>) {
        // Only after a crash in between: the results of this attempt are stored already, and were read as earlier ones.
        let known = line.key.as_deref().and_then(|key| self.index.get(key));
        if known.is_some_and(|index| self.early[*index]) {
            return;
        }
        self.add_usage(&line.usage);
        let Some(key) = line.key.as_deref() else {
            self.out.foreign_lines += 1;
            return self.unmatched(raw);
        };
        let index = match self.index.get(key) {
            Some(index) => *index,
            None if self.out.joined => {
                self.out.foreign_lines += 1;
                return self.unmatched(raw);
            }
            None => {
                let index = self.keys.len();
                self.keys.push(key.to_owned());
                self.index.insert(key.to_owned(), index);
                self.found.push(None);
                self.seen.push(false);
                self.early.push(false);
                index
            }
        };
        if self.seen[index] {
            self.out.duplicate_lines += 1;
            return self.unmatched(raw);
        }
        self.seen[index] = true;
        let text = match &line.outcome {
            Outcome::Response(response) => {
                self.out.succeeded_lines += 1;
                // The response is kept byte by byte: it was paid for.
                format!("{{\"key\":{},\"response\":{}}}", json!(key), response.get())
            }
            Outcome::Error { code, message } => {
                self.out.failed_lines += 1;
                self.out.unanswered_lines += i64::from(is_unanswered(&line.outcome));
                if self.out.failed.len() < SAMPLE {
                    self.out.failed.push((key.to_owned(), *code));
                }
                let mut error = serde_json::Map::new();
                if let Some(code) = code {
                    error.insert("code".to_owned(), json!(code));
                }
                if let Some(message) = message {
                    error.insert("message".to_owned(), json!(message));
                }
                json!({"key": key, "error": error}).to_string()
            }
        };
        if self.keep(text.len() + 1) {
            self.found[index] = Some(text);
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
        let before = self.size;
        self.size = self.size.saturating_add(bytes);
        let Some(limit) = self.limit else { return false };
        if self.size > limit && before <= limit {
            self.found = vec![None; self.found.len()];
            self.unmatched = String::new();
        }
        self.size <= limit
    }

    fn add_usage(&mut self, line: &crate::gemini::results::Usage) {
        let sum = &mut self.out.usage;
        sum.prompt_tokens = sum.prompt_tokens.saturating_add(line.prompt);
        sum.output_tokens = sum.output_tokens.saturating_add(line.output);
        sum.total_tokens = sum.total_tokens.saturating_add(line.total);
    }

    /// The whole file was read.
    #[must_use]
    pub fn finish(mut self, file: Option<String>) -> Collected {
        let mut missing = String::new();
        let unseen: Vec<usize> = (0..self.keys.len()).filter(|i| !self.seen[*i]).collect();
        for index in unseen {
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
            Some(limit) if self.size > limit => {
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
