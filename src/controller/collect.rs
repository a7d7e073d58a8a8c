//! What a batch left, joined with the requests that were sent. Pure: no client required.
//!
//! Lines are counted however many there are; they are kept only if there is a place for them. How they are joined stands
//! in [`super::join`], and which of several lines for one request counts in [`super::retry`].

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

pub use super::join::Tally;
use super::join::{Joined, What};
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

/// Lines ready to be stored, however many.
#[derive(Clone, Debug, Default)]
pub struct Kept(pub Arc<Joined>);

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// More lines than anybody would count twice.
const COUNTED_BYTES: u64 = 64 << 20;
const CHUNK_BYTES: usize = 64 << 10;

impl Kept {
    /// How many bytes the lines of these kinds are; as they came, if they are very many.
    pub fn bytes(&self, kinds: &[What]) -> io::Result<u64> {
        let raw = self.0.raw_bytes();
        if raw > COUNTED_BYTES {
            return Ok(raw);
        }
        let mut all = 0;
        for what in kinds {
            let mut stream = self.0.stream(*what);
            while stream.next(CHUNK_BYTES)?.is_some() {}
            all += stream.streamed().bytes;
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
