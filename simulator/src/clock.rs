//! Time. Two things are injected: the clock that every timestamp on the wire comes from, and the pace that
//! turns simulated durations (work, lags, retry pauses) into real ones.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;

/// Where timestamps come from: `origin + (real now - epoch) * factor`.
///
/// With the same three numbers, the operator and the simulator agree on one sped-up time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clock {
    /// Real time at which the clock shows `origin`, in Unix milliseconds.
    pub epoch: i64,
    /// Simulated time at `epoch`, in Unix milliseconds.
    pub origin: i64,
    /// Simulated milliseconds per real one.
    pub factor: f64,
}

impl Clock {
    /// The real time.
    #[must_use]
    pub fn real() -> Self {
        Self { epoch: 0, origin: 0, factor: 1.0 }
    }

    /// A clock that showed real time at `start_unix_ms` and runs `factor` times as fast since.
    #[must_use]
    pub fn scaled(start_unix_ms: i64, factor: f64) -> Self {
        Self { epoch: start_unix_ms, origin: start_unix_ms, factor }
    }

    /// The time that this clock shows now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let real = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        self.at(i128::try_from(real).unwrap_or(i128::MAX))
    }

    fn at(&self, real_nanos: i128) -> Timestamp {
        const MILLI: i128 = 1_000_000;
        let passed = real_nanos - i128::from(self.epoch) * MILLI;
        // a factor of exactly one keeps every nanosecond
        #[expect(clippy::float_cmp, clippy::cast_possible_truncation, clippy::cast_precision_loss)]
        let passed = if self.factor == 1.0 { passed } else { (passed as f64 * self.factor) as i128 };
        let nanos = i128::from(self.origin) * MILLI + passed;
        Timestamp::from_nanosecond(nanos).unwrap_or(Timestamp::MAX)
    }
}

/// How fast simulated durations pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace(pub(crate) f64);

impl Pace {
    /// The real duration of `simulated`.
    pub(crate) fn real(self, simulated: Duration) -> Duration {
        let seconds = simulated.as_secs_f64() / self.0;
        // ten years stand for "never": tokio's timer does not take everything a Duration can hold
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX).min(Duration::from_hours(87_600))
    }

    /// The real duration of this many simulated seconds; nonsense counts as zero.
    pub(crate) fn seconds(self, simulated: f64) -> Duration {
        self.real(Duration::try_from_secs_f64(simulated).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rfc3339(time: Timestamp) -> String {
        format!("{time:.9}")
    }

    #[test]
    fn a_scaled_clock_shows_its_start_and_then_runs_faster() {
        let clock = Clock::scaled(1_788_220_800_000, 100.0);
        let start = 1_788_220_800_000_i128 * 1_000_000;
        assert_eq!(rfc3339(clock.at(start)), "2026-09-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(clock.at(start + 1_500_000_000)), "2026-09-01T00:02:30.000000000Z");
    }

    #[test]
    fn the_real_clock_keeps_nanoseconds() {
        assert_eq!(Clock::real().at(1_788_220_800_123_456_789).as_nanosecond(), 1_788_220_800_123_456_789);
    }

    #[test]
    fn odd_paces_do_not_panic() {
        for speed in [0.0, f64::NAN, f64::INFINITY, -1.0, 1e-300, 100.0] {
            let _ = Pace(speed).real(Duration::from_secs(5));
            let _ = Pace(speed).seconds(f64::NAN);
        }
        assert_eq!(Pace(100.0).real(Duration::from_secs(5)), Duration::from_millis(50));
    }
}
