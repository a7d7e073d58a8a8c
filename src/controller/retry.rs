//! Which of several lines for one request counts. Pure: no client required.

use crate::gemini::results::Outcome;

/// What a line means for the attempts to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A response: the last word.
    Response,
    /// An error: the last word.
    Failed,
    /// An error that is sent again.
    Retryable,
    /// The batch ended before it was the request's turn.
    Unanswered,
}

/// Whether the request was never answered because its batch ended first.
#[must_use]
pub fn is_unanswered(outcome: &Outcome<'_>) -> bool {
    matches!(outcome, Outcome::Error { code: Some(1 | 4), .. })
}

/// Judges the lines of a job.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    /// Attempts whose batches were not worked on to their end.
    pub cut_short: Vec<i32>,
}

impl Judge {
    /// What a line of that attempt means.
    #[must_use]
    pub fn standing(&self, attempt: i32, outcome: &Outcome<'_>) -> Standing {
        match outcome {
            Outcome::Response(_) => Standing::Response,
            Outcome::Error { code: Some(1 | 4), .. } if self.cut_short.contains(&attempt) => {
                Standing::Unanswered
            }
            Outcome::Error { .. } => Standing::Failed,
        }
    }
}

/// Of two lines for one request, each with its attempt: whether the later one read takes the place of the earlier.
#[must_use]
pub fn replaces(old: (i32, Standing), new: (i32, Standing)) -> bool {
    match (old.1, new.1) {
        (Standing::Response, _) => false,
        (_, Standing::Response) => true,
        _ => new.0 > old.0,
    }
}
