//! The controller: observe -> decide -> act -> report, and the fallback sweep.
//!
//! | module | client | what it does |
//! | --- | --- | --- |
//! | [`observe`] | yes | collects all that a decision needs |
//! | [`decide`] | no | what to do next: the whole lifecycle |
//! | [`act`] | yes | takes one step, folds its outcome into [`memory`] |
//! | [`report`] | yes | writes one change to the job, and its Event |
//! | [`gather`] | yes | reads what a batch left and joins it with what was sent |
//! | [`earlier`] | yes | what earlier attempts left |
//! | [`output`], [`output_store`] | yes | where results go: a `ConfigMap`, an object store |
//! | [`retry`] | no | which requests a further attempt carries |
//! | [`sweep`] | yes | finds what callbacks did not tell |
//! | [`census`] | yes | what Gemini has that the cluster may have forgotten |
//! | [`quota`] | no | who may send next, for each API key |
//! | [`doorman`] | no | wakes those whose turn it is |
//! | [`stored`] | yes | an input in an object store: checked, then sent, as a stream |
//! | [`keys`] | no | millions of keys in bounded memory |
//! | [`transfers`] | no | work as long as an object is large, beside the passes |
//! | [`shards`] | yes | jobs whose input is split over several batches |
//! | [`run`] | yes | drives the four, and the watch |
//! | [`policy`] | no | what an administrator decided for all jobs |
//! | [`schema_check`] | yes | whether the installed definition is as new as the operator |
//!
//! Never imports `receiver`, nor the other way round: the job is their only meeting point.

pub mod act;
pub mod census;
pub mod collect;
pub mod decide;
pub mod destination;
pub mod doorman;
pub mod earlier;
pub mod ending;
pub mod gather;
pub mod identity;
pub mod input;
pub mod join;
pub mod keys;
pub mod memory;
pub mod metrics;
pub mod namespaces;
pub mod observe;
pub mod output;
pub mod output_store;
pub mod policy;
pub mod quota;
pub mod report;
pub mod request;
pub mod retry;
pub mod ring;
pub mod run;
pub mod schema_check;
pub mod shards;
pub mod stored;
pub mod sweep;
pub mod transfers;
pub mod watched;
pub mod webhooks;

use jiff::SignedDuration;

use crate::api::Reason;
use crate::gemini::ApiKey;
use crate::store;

/// What keeps a job from going on, and what to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// For conditions, Events and metrics.
    pub reason: Reason,
    /// For people. Holds no secret and no text of a request.
    pub message: String,
}

impl Problem {
    /// A problem.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// An API key and its fingerprint.
#[derive(Clone, Debug)]
pub struct Credential {
    /// The key. Redacts itself.
    pub key: ApiKey,
    /// A keyed hash of it: the only form in which it is ever written down.
    pub fingerprint: String,
}

/// What a decision needs to know of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFacts {
    /// SHA-256 of what the next attempt carries, in hexadecimal.
    pub sha256: String,
    /// The same of all requests of the job.
    pub whole_sha256: String,
    /// Number of requests that the next attempt carries.
    pub count: i64,
    /// Size in bytes of what the next attempt carries.
    pub bytes: i64,
}

/// How patient the controller is. All durations are on the operator's clock.
#[derive(Clone, Debug)]
pub struct Timings {
    /// Pauses before the further GETs after a callback that came before its batch had ended.
    pub hint_pauses: Vec<SignedDuration>,
    /// In any window of this length a job is looked at four times at most, however many callbacks come.
    pub look_window: SignedDuration,
    /// Pauses between listings for a batch that may exist; the last one repeats.
    pub search_pauses: Vec<SignedDuration>,
    /// A send that is not found is sent again only after so long since this process first looked for it, and
    /// behind a fence. Longer than a create may take and a lease lasts.
    pub resend_grace: SignedDuration,
    /// Pauses between tries to read a result file; the last one repeats.
    pub result_pauses: Vec<SignedDuration>,
    /// After this long without its result file a job says that it is stalled. A batch that did not succeed, but
    /// has successes by its own count, is not waited for longer.
    pub result_late: SignedDuration,
    /// After this long without its result file a succeeded batch counts as lost.
    pub result_patience: SignedDuration,
    /// After this long (and three looks) a batch that Gemini does not show counts as gone.
    pub gone_after: SignedDuration,
    /// The file of a refused send serves the next one for this long. Gemini keeps files for 48 hours.
    pub reuse_file: SignedDuration,
    /// For this long after the intent a file that is not there proves that it was never uploaded.
    pub absent_file_proves: SignedDuration,
    /// Pauses between GETs of a batch that was cancelled and has not ended yet; the last one repeats.
    pub cancel_pauses: Vec<SignedDuration>,
    /// What is not watched (Secrets, ConfigMaps) is looked at again after half to one of these.
    pub recheck: SignedDuration,
    /// First pause after a refusal for lack of quota; doubled each time.
    pub quota_first: SignedDuration,
    /// Longest pause after a refusal for lack of quota.
    pub quota_longest: SignedDuration,
    /// First pause after a failed call; doubled each time.
    pub trouble_first: SignedDuration,
    /// Longest pause after failed calls.
    pub trouble_longest: SignedDuration,
    /// Pause between two sweeps, jittered by a tenth.
    pub sweep: SignedDuration,
    /// Pause between two lists for batches without a webhook, while there are any; jittered by a tenth. Not longer than
    /// `sweep`.
    pub poll: SignedDuration,
    /// With object stores.
    pub stores: store::Timeouts,
    /// How often it is looked whether the `CustomResourceDefinition` is as new as the operator, as long as it is.
    pub schema: SignedDuration,
}

impl Default for Timings {
    fn default() -> Self {
        let seconds = |list: &[i64]| list.iter().map(|s| SignedDuration::from_secs(*s)).collect::<Vec<_>>();
        Self {
            hint_pauses: seconds(&[5, 30, 120]),
            look_window: SignedDuration::from_mins(1),
            search_pauses: seconds(&[5, 10, 30, 60, 120, 300, 600]),
            resend_grace: SignedDuration::from_mins(10),
            result_pauses: seconds(&[1, 2, 4, 8, 15, 30, 60, 120, 300, 600]),
            result_late: SignedDuration::from_mins(10),
            result_patience: SignedDuration::from_hours(24),
            gone_after: SignedDuration::from_hours(1),
            reuse_file: SignedDuration::from_hours(40),
            absent_file_proves: SignedDuration::from_hours(24),
            cancel_pauses: seconds(&[1, 2, 5, 10, 30, 60, 120, 300]),
            recheck: SignedDuration::from_secs(40),
            quota_first: SignedDuration::from_mins(1),
            quota_longest: SignedDuration::from_hours(1),
            trouble_first: SignedDuration::from_secs(1),
            trouble_longest: SignedDuration::from_mins(5),
            sweep: SignedDuration::from_mins(10),
            poll: SignedDuration::from_mins(1),
            stores: store::Timeouts::default(),
            schema: SignedDuration::from_mins(5),
        }
    }
}
