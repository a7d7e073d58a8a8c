//! The operator's clock: the only place that reads the time and the only one that sleeps.
//!
//! It can run faster than the wall clock by one factor, so that a test lives through hours in seconds. A
//! simulator that is given the same origin and factor agrees with it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::{SignedDuration, Timestamp};

/// A clock that shows `origin + (wall clock - origin) × factor`.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Duration,
    factor: f64,
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl Clock {
    /// The wall clock.
    #[must_use]
    pub fn system() -> Self {
        Self { origin: Duration::ZERO, factor: 1.0 }
    }

    /// A clock that agrees with the wall clock at `origin_unix_ms` and runs `factor` times as fast.
    #[must_use]
    pub fn scaled(origin_unix_ms: u64, factor: f64) -> Self {
        Self { origin: Duration::from_millis(origin_unix_ms), factor: factor.max(f64::MIN_POSITIVE) }
    }

    /// The time it shows.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let real = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let shown = if self.factor.to_bits() == 1.0_f64.to_bits() {
            real
        } else {
            self.origin + real.saturating_sub(self.origin).mul_f64(self.factor)
        };
        let nanos = i128::try_from(shown.as_nanos()).unwrap_or(i128::MAX);
        Timestamp::from_nanosecond(nanos).unwrap_or(Timestamp::MAX)
    }

    /// How long to wait on the wall clock until so much has passed on this one.
    #[must_use]
    pub fn real(&self, duration: SignedDuration) -> Duration {
        Duration::try_from(duration).unwrap_or_default().div_f64(self.factor)
    }

    /// The same for a plain duration.
    #[must_use]
    pub fn real_of(&self, duration: Duration) -> Duration {
        duration.div_f64(self.factor)
    }

    /// How long to wait on the wall clock until this one shows `time`.
    #[must_use]
    pub fn until(&self, time: Timestamp) -> Duration {
        self.real(time.duration_since(self.now()))
    }

    /// Sleeps until so much has passed on this clock.
    pub async fn sleep(&self, duration: SignedDuration) {
        tokio::time::sleep(self.real(duration)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_speeds_up_what_is_shown_and_shortens_what_is_slept() {
        let start = Clock::system().now();
        let clock = Clock::scaled(u64::try_from(start.as_millisecond()).unwrap() - 1000, 3600.0);
        // One real second after the origin it shows at least an hour more.
        assert!(clock.now().duration_since(start) >= SignedDuration::from_mins(59));
        assert_eq!(clock.real(SignedDuration::from_hours(1)), Duration::from_secs(1));
        assert_eq!(clock.until(start), Duration::ZERO);
    }
}
