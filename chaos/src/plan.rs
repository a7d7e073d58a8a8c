//! What goes wrong, and when: a pure function of the seed, so that a run can be repeated.
//!
//! Which life of which controller ends how, what becomes of the n-th create of which job, what kind of job comes
//! next: each is drawn from a stream of its own. How the processes then interleave is up to the machine.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// Times of the operator, all on its own clock, which runs [`Scale::factor`] times as fast as the wall clock.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// How much faster than the wall clock.
    pub factor: u32,
    /// `--lease-seconds`.
    pub lease: u32,
    /// `--lease-renew-deadline-seconds`.
    pub deadline: u32,
    /// `--lease-retry-seconds`.
    pub retry: u32,
    /// `--create-timeout-seconds`.
    pub create: u32,
    /// `--resend-grace-seconds`.
    pub grace: u32,
    /// `--sweep-seconds`.
    pub sweep: u32,
}

impl Scale {
    /// Default values of the operator, apart from the clock, would be 15, 10, 2, 180, 600 and 600. A lease can't be
    /// held for less than a real second or two on a busy machine, and a create and the grace follow from it.
    pub const DEFAULT: Self =
        Self { factor: 10, lease: 40, deadline: 35, retry: 4, create: 40, grace: 100, sweep: 60 };

    /// So many seconds of the operator's clock, on the wall clock.
    pub fn real(&self, seconds: u32) -> Duration {
        Duration::from_secs(u64::from(seconds)) / self.factor
    }
}

/// How the life of one controller process ends, once it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It kills itself at a step (`GBO_CRASH_AT`).
    Crash {
        /// `when:step`.
        point: &'static str,
        /// At the how-manieth visit.
        visit: u32,
    },
    /// It is killed (or stopped) when the network sees this.
    Network {
        /// This.
        moment: Moment,
        /// If it is stopped: lease durations, in tenths.
        tenths: u32,
    },
    /// It is killed so long after it began to lead.
    Any {
        /// Real milliseconds.
        after: u64,
    },
    /// It is stopped by itself at a step (`GBO_STOP_AT`), and goes on later.
    StopAt {
        /// `when:step`.
        point: &'static str,
        /// Lease durations for which it is stopped, in tenths.
        tenths: u32,
    },
    /// It is stopped at any time, and goes on later.
    Stop {
        /// Real milliseconds after it began to lead.
        after: u64,
        /// Lease durations, in tenths.
        tenths: u32,
    },
    /// It is asked to end.
    Terminate {
        /// Real milliseconds after it began to lead.
        after: u64,
    },
}

/// A moment that the network sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A create was read, and is lost with its sender.
    CreateLost,
    /// A create was read, and arrives although its sender is dead.
    CreateArrives,
    /// A create was read, and arrives long after its sender died.
    CreateLate,
    /// The batch exists, and the answer never leaves.
    CreateCommitted,
    /// The answer was sent to the controller.
    CreateAnswered,
    /// A create was read, and arrives; its sender is stopped, and finds the answer when it goes on. Not a kill.
    CreateFrozen,
    /// The last chunk of an upload was read, and is lost.
    UploadLost,
    /// The file is there, and the answer never leaves.
    UploadDone,
}

impl Moment {
    /// Whether it is about a create; otherwise about an upload.
    pub fn is_create(self) -> bool {
        !matches!(self, Self::UploadLost | Self::UploadDone)
    }

    /// For the table of kills.
    pub fn label(self) -> &'static str {
        match self {
            Self::CreateLost => "create sent, lost on the way",
            Self::CreateArrives => "create sent, arrives after the kill",
            Self::CreateLate => "create sent, arrives long after the kill",
            Self::CreateCommitted => "batch created, answer not sent",
            Self::CreateAnswered => "answer sent, name not recorded",
            Self::CreateFrozen => "create sent, sender stopped",
            Self::UploadLost => "upload sent, lost on the way",
            Self::UploadDone => "upload complete, answer not sent",
        }
    }
}

/// What the table of kills has besides [`Moment::label`], in the order of a job's life. The last field: between
/// the request that asks for the batch and the record of its name.
pub const POINTS: &[(&str, &str, u32, bool)] = &[
    ("before:AddFinalizer", "before the finalizer", 1, false),
    ("after:AddFinalizer", "after the finalizer", 1, false),
    ("before:ReserveOutput", "before the reservation", 1, false),
    ("after:ReserveOutput", "after the reservation", 1, false),
    ("before:Intent", "before the intent", 2, false),
    ("after:Intent", "after the intent", 4, false),
    ("before:UploadInput", "before the upload", 2, false),
    ("after:UploadInput", "after the upload", 3, false),
    ("before:InputFile", "before another file name is recorded", 1, false),
    ("after:InputFile", "after another file name was recorded", 1, false),
    ("before:CreateBatch", "before the create", 3, false),
    ("create:sending", "right before the create is sent", 3, false),
    ("after:CreateBatch", "after the create, answer in memory", 10, true),
    ("before:Submitted", "before the name is recorded", 10, true),
    ("after:Submitted", "after the name was recorded", 3, false),
    ("before:Refused", "before a refusal is recorded", 1, false),
    ("after:Refused", "after a refusal was recorded", 1, false),
    ("before:FindInputFile", "restart: before the file is asked for", 2, false),
    ("after:FindInputFile", "restart: after the file was asked for", 2, false),
    ("before:FindBatch", "search: before a listing", 2, false),
    ("after:FindBatch", "search: after a listing", 2, false),
    ("before:ConfirmHinted", "search: before a hinted batch is asked for", 1, false),
    ("after:ConfirmHinted", "search: after a hinted batch was asked for", 1, false),
    ("before:Fencing", "search: before the fence is written down", 1, false),
    ("after:Fencing", "search: the fence is written down", 1, false),
    ("before:Fence", "search: before the fence", 2, false),
    ("after:Fence", "search: behind the fence", 2, false),
    ("before:GetBatch", "before a look", 1, false),
    ("after:GetBatch", "after a look", 1, false),
    ("before:HintObserved", "before an early hint is recorded", 1, false),
    ("after:HintObserved", "after an early hint was recorded", 1, false),
    ("before:Collect", "before results are read", 1, false),
    ("after:Collect", "results read", 1, false),
    ("before:StoreResults", "before results are stored", 1, false),
    ("after:StoreResults", "results stored", 1, false),
    ("before:Finished", "before the end is recorded", 1, false),
    ("after:Finished", "after the end was recorded", 1, false),
    ("before:ReleaseOutput", "before a reservation is given back", 1, false),
    ("before:DeleteInputFile", "before the input is deleted", 1, false),
    ("after:DeleteInputFile", "input deleted", 1, false),
    ("before:DropFinalizer", "before the finalizer goes", 1, false),
    ("after:DropFinalizer", "after the finalizer went", 1, false),
    ("receiver:writing", "receiver: before a hint is stored", 1, false),
    ("receiver:written", "receiver: after a hint was stored", 1, false),
];

pub const MOMENTS: &[(Moment, u32)] = &[
    (Moment::CreateLost, 5),
    (Moment::CreateArrives, 4),
    (Moment::CreateLate, 5),
    (Moment::CreateCommitted, 8),
    (Moment::CreateAnswered, 6),
    (Moment::CreateFrozen, 3),
    (Moment::UploadLost, 2),
    (Moment::UploadDone, 2),
];

/// Where a controller may be stopped: around the checks of its leadership, and while it waits for answers.
const STOPS: &[&str] = &[
    "create:sending",
    "before:CreateBatch",
    "before:Submitted",
    "after:UploadInput",
    "before:Fence",
    "after:Fence",
    "before:Intent",
];

/// What becomes of a create.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Create {
    /// Nothing happens to it.
    Fine,
    /// 503, and nothing was created.
    Unavailable,
    /// 503, and the batch was created.
    CommittedUnavailable,
    /// No answer, and the batch was created.
    CommittedReset,
    /// No answer, and nothing was created.
    Reset,
    /// Half an answer, and the batch was created.
    Truncated,
    /// 400 of something in between, and the batch was created.
    CommittedForeign400,
    /// 503, and the batch is created later.
    CommittedLate {
        /// Real time.
        after: Duration,
    },
    /// No answer at all, and it arrives later.
    HeldBack {
        /// Real time.
        after: Duration,
    },
    /// 429.
    Quota,
    /// Answered after a while.
    Slow {
        /// Real time.
        after: Duration,
    },
    /// The API key is another one when the answer comes.
    KeyRotated {
        /// Whether the answer comes at all.
        answered: bool,
    },
}

/// A job.
#[derive(Clone, Debug)]
pub struct Job {
    /// How many requests.
    pub requests: usize,
    /// Whether its results go to a ConfigMap.
    pub stored: bool,
    /// A directive to the simulator, for the whole batch.
    pub directive: &'static str,
    /// Whether its API key is in a Secret of its own.
    pub own_secret: bool,
}

/// A generator of a stream of its own.
pub fn stream(seed: u64, name: &str, numbers: &[u64]) -> StdRng {
    // FNV-1a, to keep the streams apart.
    let bytes = name.bytes().chain(numbers.iter().flat_map(|n| n.to_le_bytes()));
    let mixed = bytes.chain(seed.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    StdRng::seed_from_u64(mixed)
}

fn pick<T: Copy>(rng: &mut StdRng, choices: &[(T, u32)]) -> Option<T> {
    let total: u32 = choices.iter().map(|(_, weight)| weight).sum();
    let mut at = rng.random_range(0..total.max(1));
    for (choice, weight) in choices {
        if at < *weight {
            return Some(*choice);
        }
        at -= weight;
    }
    None
}

/// How the `number`-th life of a controller ends.
pub fn life(seed: u64, cell: u64, slot: u64, number: u64) -> Life {
    let mut rng = stream(seed, "life", &[cell, slot, number]);
    let after = rng.random_range(0..1500);
    // Now and then for longer than lease and grace together: then somebody else may have sent it again.
    let tenths = if rng.random_bool(0.6) { rng.random_range(11..30) } else { rng.random_range(38..60) };
    let visit = rng.random_range(1..=3);
    let points: Vec<(Life, u32)> =
        POINTS.iter().map(|(point, _, weight, _)| (Life::Crash { point, visit }, *weight)).collect();
    let mut all = points;
    all.extend(MOMENTS.iter().map(|(moment, weight)| (Life::Network { moment: *moment, tenths }, *weight)));
    all.extend(STOPS.iter().map(|point| (Life::StopAt { point, tenths }, 1)));
    all.extend([
        (Life::Any { after }, 12),
        (Life::Stop { after, tenths }, 4),
        (Life::Terminate { after }, 5),
    ]);
    pick(&mut rng, &all).unwrap_or(Life::Any { after })
}

/// What becomes of the `number`-th create of a job, counted from 0. After some, all is well.
pub fn create(seed: u64, cell: u64, job: u64, number: u64, own_secret: bool, scale: &Scale) -> Create {
    if number > 3 {
        return Create::Fine;
    }
    let mut rng = stream(seed, "create", &[cell, job, number]);
    // Around the grace, so that it arrives before as well as after the next send.
    let late = scale.real(scale.grace).mul_f64(rng.random_range(0.1..2.5));
    let slow = scale.real(scale.create).mul_f64(rng.random_range(0.1..1.3));
    let answered = rng.random_bool(0.6);
    let rotated = if own_secret { 60 } else { 0 };
    let all = [
        (Create::Fine, 48),
        (Create::Unavailable, 5),
        (Create::CommittedUnavailable, 7),
        (Create::CommittedReset, 5),
        (Create::Reset, 4),
        (Create::Truncated, 5),
        (Create::CommittedForeign400, 3),
        (Create::CommittedLate { after: late }, 8),
        (Create::HeldBack { after: late }, 7),
        (Create::Quota, 4),
        (Create::Slow { after: slow }, 4),
        (Create::KeyRotated { answered }, rotated),
    ];
    pick(&mut rng, &all).unwrap_or(Create::Fine)
}

/// What happens to the upload of a job's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upload {
    /// Nothing.
    Fine,
    /// The answer to the last chunk is lost.
    FinalizeLost,
    /// The answer to the last chunk does not say that it was the last.
    StillActive,
    /// The answer to the last chunk says nothing about the upload.
    NoStatus,
    /// 503, and nothing was stored.
    Unavailable,
}

/// What happens to the `number`-th upload of a cell.
pub fn upload(seed: u64, cell: u64, number: u64) -> Upload {
    let mut rng = stream(seed, "upload", &[cell, number]);
    let all = [
        (Upload::Fine, 80),
        (Upload::FinalizeLost, 8),
        (Upload::StillActive, 4),
        (Upload::NoStatus, 4),
        (Upload::Unavailable, 4),
    ];
    pick(&mut rng, &all).unwrap_or(Upload::Fine)
}

/// The `number`-th job of a cell.
pub fn job(seed: u64, cell: u64, number: u64) -> Job {
    let mut rng = stream(seed, "job", &[cell, number]);
    let directives = [
        ("", 60),
        (" [[sim:no-event]]", 14),
        (" [[sim:shuffle]]", 6),
        (" [[sim:output-lag=15]]", 8),
        (" [[sim:job=fail]]", 5),
        (" [[sim:job=expire]]", 4),
        (" [[sim:job=cancel]]", 3),
    ];
    Job {
        requests: rng.random_range(1..=4),
        stored: rng.random_bool(0.7),
        directive: pick(&mut rng, &directives).unwrap_or_default(),
        own_secret: rng.random_bool(0.1),
    }
}

/// What Gemini is like for a while.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one of the simulator's switches")]
pub struct Weather {
    /// Simulated seconds after which a batch is listed.
    pub list_lag: f64,
    /// Longest page of a listing.
    pub page_limit: usize,
    /// Empty pages between the others.
    pub empty_pages: bool,
    /// Batches are shown to the key that created them only.
    pub creator_only: bool,
    /// Listings show old counts.
    pub stale_stats: bool,
    /// Simulated seconds after which results can be read.
    pub output_lag: f64,
    /// What is wrong with events: a word of the simulator's `webhooks`.
    pub hook: Option<&'static str>,
    /// The names that files are to have are not honoured.
    pub other_file_names: bool,
    /// Nothing fits into the quota: every create is refused.
    pub no_quota: bool,
    /// Calls (other than creates and uploads) that fail, and how.
    pub failing: Vec<(usize, u16)>,
    /// What the API server does to each of the two controllers.
    pub api: [Api; 2],
    /// How long it stays so.
    pub lasts: Duration,
}

/// What the API server is like for one controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// As it should be.
    Fine,
    /// So many of a hundred requests fail: 429, 500, 503, no answer, or an answer that is lost.
    Failing(u32),
    /// Out of reach.
    Away,
}

/// The `number`-th weather of a cell.
pub fn weather(seed: u64, cell: u64, number: u64, scale: &Scale) -> Weather {
    let mut rng = stream(seed, "weather", &[cell, number]);
    let mut rarely = |of_hundred: u32| rng.random_range(0..100) < of_hundred;
    let (empty_pages, creator_only, stale_stats) = (rarely(25), rarely(30), rarely(30));
    let (hooked, no_quota, other_file_names) = (rarely(60), rarely(7), rarely(10));
    let (lagging, late_output, failing) = (rarely(35), rarely(25), rarely(40));
    // Shorter than the grace: it is what the grace is there for. A listing that lags for longer is beyond what
    // the operator promises.
    let list_lag = if lagging { rng.random_range(0.05..0.5) * f64::from(scale.grace) } else { 0.0 };
    let output_lag = if late_output { rng.random_range(1.0..60.0) } else { 0.0 };
    let failing = if failing {
        let number = rng.random_range(1..5);
        let codes = [429, 500, 503, 0, 1];
        (0..number).map(|_| (rng.random_range(0..6), codes[rng.random_range(0..codes.len())])).collect()
    } else {
        Vec::new()
    };
    let hooks =
        ["lost", "duplicate", "late=20", "early", "reordered", "forged", "frozen", "two-signatures", "jwt"];
    let hook = hooked.then(|| hooks[rng.random_range(0..hooks.len())]);
    let page_limit = [100, 100, 40, 15][rng.random_range(0..4)];
    let mut one = || match rng.random_range(0..100) {
        0..70 => Api::Fine,
        70..93 => Api::Failing(rng.random_range(5..40)),
        _ => Api::Away,
    };
    let api = [one(), one()];
    let lasts = scale.real(scale.lease).mul_f64(rng.random_range(0.5..2.0));
    Weather {
        list_lag,
        page_limit,
        empty_pages,
        creator_only,
        stale_stats,
        output_lag,
        hook,
        other_file_names,
        no_quota,
        failing,
        api,
        lasts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_decides_everything() {
        let all = |seed: u64| {
            let lives: Vec<_> = (0..50).map(|n| life(seed, 1, 0, n)).collect();
            let creates: Vec<_> = (0..50).map(|n| create(seed, 1, n, 0, true, &Scale::DEFAULT)).collect();
            let weathers: Vec<_> = (0..20).map(|n| weather(seed, 1, n, &Scale::DEFAULT)).collect();
            (lives, creates, weathers)
        };
        assert_eq!(all(7), all(7));
        assert_ne!(all(7), all(8));
    }

    #[test]
    fn cells_and_slots_have_lives_of_their_own() {
        let lives = |cell, slot| (0..50).map(|n| life(7, cell, slot, n)).collect::<Vec<_>>();
        assert_ne!(lives(0, 0), lives(0, 1));
        assert_ne!(lives(0, 0), lives(1, 0));
    }

    #[test]
    fn every_step_and_every_moment_is_drawn() {
        let drawn: Vec<Life> = (0..20_000).map(|n| life(1, 0, 0, n)).collect();
        for (point, ..) in POINTS {
            assert!(drawn.iter().any(|l| matches!(l, Life::Crash { point: p, .. } if p == point)), "{point}");
        }
        for (moment, _) in MOMENTS {
            let is = |l: &Life| matches!(l, Life::Network { moment: m, .. } if m == moment);
            assert!(drawn.iter().any(is), "{moment:?}");
        }
        // At least a quarter of the lives end between the request and the record of the name.
        let window = |l: &&Life| match l {
            Life::Crash { point, .. } => POINTS.iter().any(|(p, _, _, window)| p == point && *window),
            Life::Network { moment, .. } => moment.is_create() && *moment != Moment::CreateFrozen,
            _ => false,
        };
        assert!(drawn.iter().filter(window).count() * 4 > drawn.len());
    }

    #[test]
    fn the_times_fit_together() {
        let s = Scale::DEFAULT;
        assert!(s.retry < s.deadline && s.deadline < s.lease && s.create + s.lease < s.grace);
    }
}
