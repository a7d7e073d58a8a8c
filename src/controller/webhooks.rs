//! Which kinds of batches Gemini was seen to refuse a webhook for. Pure: no client required, no clock.
//!
//! The leader's memory only, and for an hour: whether it still refuses is asked again now and then, at the price of
//! one refused create. What was decided for a batch is in its attempt.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};

use super::memory::after;
use crate::api::Method;

/// For so long after a refusal the next batches of that method are asked for without a webhook at once.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(1);

/// See the module.
#[derive(Debug, Default)]
pub struct Webhooks(Mutex<HashMap<Method, Timestamp>>);

impl Webhooks {
    fn refusals(&self) -> MutexGuard<'_, HashMap<Method, Timestamp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // valid after any panic
    }

    /// Gemini refused one now.
    pub fn refused(&self, method: Method, now: Timestamp) {
        self.refusals().insert(method, now);
    }

    /// Whether Gemini refused one lately.
    #[must_use]
    pub fn are_refused(&self, method: Method, now: Timestamp) -> bool {
        self.refusals().get(&method).is_some_and(|time| after(*time, REMEMBERED) > now)
    }

    /// A new turn of leadership.
    pub fn forget(&self) {
        self.refusals().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_counts_for_its_method_and_for_an_hour() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let webhooks = Webhooks::default();
        assert!(!webhooks.are_refused(Method::EmbedContent, at(0)));
        webhooks.refused(Method::EmbedContent, at(0));
        assert!(webhooks.are_refused(Method::EmbedContent, at(3599)));
        assert!(!webhooks.are_refused(Method::GenerateContent, at(1)));
        assert!(!webhooks.are_refused(Method::EmbedContent, at(3600)), "it is asked again");
        webhooks.refused(Method::EmbedContent, at(3600));
        webhooks.forget();
        assert!(!webhooks.are_refused(Method::EmbedContent, at(3601)));
    }
}
