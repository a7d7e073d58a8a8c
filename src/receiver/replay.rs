//! What the receiver remembers of the deliveries it took: so that a second one costs no write, and so that no
//! single job can make it write without end. Bounded, and nothing depends on it: after a restart, or on another
//! replica, a replay writes the same hint once more, and the durable state decides.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};

/// How many deliveries are remembered.
const REMEMBERED: usize = 16_384;
/// How many jobs have a budget at a time. A job leaves when its budget is full again.
const BUDGETS: usize = 65_536;
/// A job may cause this many writes at once...
const BURST: i32 = 5;
/// ...and then one in this time.
const INTERVAL: SignedDuration = SignedDuration::from_secs(10);

/// Identifies one event of one attempt of one job: half of a SHA-256.
type Key = [u8; 16];

/// What may be done about a delivery.
pub(super) enum Admission {
    /// Write it, then [`Reservation::remember`] it.
    Write(Reservation),
    /// It was written before.
    Duplicate,
    /// The same delivery is being written at this moment.
    InFlight,
    /// This job has used up its budget; ask again after so long.
    Throttled(SignedDuration),
}

/// What is known of one delivery.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Writing,
    Written,
}

#[derive(Default)]
struct Memory {
    known: HashMap<Key, Known>,
    /// The written ones, oldest first.
    order: VecDeque<Key>,
    /// For each job, the time at which its budget will be full again.
    budgets: HashMap<Key, Timestamp>,
}

/// The memory of one receiver.
#[derive(Clone, Default)]
pub(super) struct Window(std::sync::Arc<Mutex<Memory>>);

/// The right to write one delivery. Dropped without [`Reservation::remember`], nothing was written.
pub(super) struct Reservation {
    window: Window,
    key: Key,
    done: bool,
}

impl Window {
    /// Asks what to do about a delivery.
    pub(super) fn admit(&self, uid: &str, attempt: u32, replay_key: &[u8; 32], now: Timestamp) -> Admission {
        let job = half_hash(&[uid.as_bytes()]);
        let key = half_hash(&[&job, &attempt.to_be_bytes(), replay_key]);
        let mut memory = self.lock();
        match memory.known.get(&key) {
            Some(Known::Written) => return Admission::Duplicate,
            Some(Known::Writing) => return Admission::InFlight,
            None => {}
        }
        if let Err(wait) = memory.spend(job, now) {
            return Admission::Throttled(wait);
        }
        memory.known.insert(key, Known::Writing);
        Admission::Write(Reservation { window: self.clone(), key, done: false })
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    /// Takes one write out of a job's budget, or says how long until there is one.
    fn spend(&mut self, job: Key, now: Timestamp) -> Result<(), SignedDuration> {
        if self.budgets.len() >= BUDGETS && !self.budgets.contains_key(&job) {
            self.budgets.retain(|_, full_at| *full_at > now);
            if self.budgets.len() >= BUDGETS {
                return Err(INTERVAL);
            }
        }
        match self.budgets.entry(job) {
            Entry::Vacant(entry) => {
                entry.insert(later(now));
                Ok(())
            }
            Entry::Occupied(mut entry) => {
                let debt = entry.get().duration_since(now);
                // more debt than can be made: the clock was set back
                let debt = if debt > INTERVAL * BURST { SignedDuration::ZERO } else { debt };
                let debt = debt.max(SignedDuration::ZERO);
                let wait = debt - INTERVAL * (BURST - 1);
                if wait > SignedDuration::ZERO {
                    return Err(wait);
                }
                entry.insert(later(now.saturating_add(debt).unwrap_or(now)));
                Ok(())
            }
        }
    }
}

fn later(time: Timestamp) -> Timestamp {
    time.saturating_add(INTERVAL).unwrap_or(time)
}

fn half_hash(parts: &[&[u8]]) -> Key {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    let mut key = [0; 16];
    key.copy_from_slice(&hash.finalize()[..16]);
    key
}

impl Reservation {
    /// The write succeeded: from now on the delivery is a duplicate.
    pub(super) fn remember(mut self) {
        self.done = true;
        let mut memory = self.window.lock();
        memory.known.insert(self.key, Known::Written);
        memory.order.push_back(self.key);
        if memory.order.len() > REMEMBERED
            && let Some(oldest) = memory.order.pop_front()
        {
            memory.known.remove(&oldest);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.done {
            self.window.lock().known.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millisecond(1_800_000_000_000 + millis).unwrap()
    }

    fn id(n: u32) -> [u8; 32] {
        Sha256::digest(n.to_be_bytes()).into()
    }

    fn write(window: &Window, uid: &str, n: u32, millis: i64) -> bool {
        match window.admit(uid, 1, &id(n), at(millis)) {
            Admission::Write(reservation) => {
                reservation.remember();
                true
            }
            _ => false,
        }
    }

    #[test]
    fn remembered_only_after_the_write() {
        let window = Window::default();
        let Admission::Write(first) = window.admit("u", 1, &id(0), at(0)) else { panic!() };
        assert!(matches!(window.admit("u", 1, &id(0), at(0)), Admission::InFlight));
        drop(first);
        let Admission::Write(second) = window.admit("u", 1, &id(0), at(0)) else { panic!() };
        second.remember();
        assert!(matches!(window.admit("u", 1, &id(0), at(0)), Admission::Duplicate));
        assert!(matches!(window.admit("u", 2, &id(0), at(0)), Admission::Write(_)), "another attempt");
        assert!(matches!(window.admit("v", 1, &id(0), at(0)), Admission::Write(_)), "another job");
        assert!(matches!(window.admit("u", 1, &id(1), at(0)), Admission::Write(_)), "another event");
    }

    #[test]
    fn five_at_once_then_one_in_ten_seconds() {
        let window = Window::default();
        let written: Vec<u32> = (0..1000).filter(|n| write(&window, "u", *n, i64::from(*n) * 10)).collect();
        assert_eq!(written, [0, 1, 2, 3, 4], "1000 within 10 s");
        let Admission::Throttled(wait) = window.admit("u", 1, &id(5000), at(9_990)) else { panic!() };
        assert_eq!(wait, SignedDuration::from_millis(10));
        assert!(!write(&window, "u", 5000, 9_999));
        assert!(write(&window, "u", 5000, 10_000), "the one that was put off is taken later");
        assert!(!write(&window, "u", 5001, 19_999));
        assert!(write(&window, "u", 5001, 20_000));
        assert!(write(&window, "v", 5002, 20_000), "another job has its own");
        let burst = (6000..6010).filter(|n| write(&window, "u", *n, 100_000)).count();
        assert_eq!(burst, 5, "full again");
    }

    #[test]
    fn a_duplicate_costs_nothing() {
        let window = Window::default();
        assert!(write(&window, "u", 0, 0));
        for _ in 0..100 {
            assert!(matches!(window.admit("u", 1, &id(0), at(0)), Admission::Duplicate));
        }
        assert!(write(&window, "u", 1, 0));
    }

    #[test]
    fn a_clock_that_is_set_back_locks_nobody_out() {
        let window = Window::default();
        for n in 0..5 {
            assert!(write(&window, "u", n, 3_600_000));
        }
        assert!(write(&window, "u", 9, 0));
    }

    #[test]
    fn memory_is_bounded() {
        let window = Window::default();
        for n in 0..70_000 {
            write(&window, &format!("job-{n}"), n, 0);
        }
        {
            let memory = window.lock();
            assert_eq!(memory.known.len(), REMEMBERED);
            assert_eq!(memory.order.len(), REMEMBERED);
            assert_eq!(memory.budgets.len(), BUDGETS);
        }
        assert!(!write(&window, "one-more", 0, 9_999), "no budget to be had");
        assert!(write(&window, "one-more", 0, 10_000));
        assert_eq!(window.lock().budgets.len(), 1);
    }
}
