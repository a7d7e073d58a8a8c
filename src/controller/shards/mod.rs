//! Sharded jobs: a large input becomes several batches, and their results are put together.
//!
//! A sharded job is a *parent*. It sends nothing itself: it splits its input and gives each part to a job of its own, a
//! *child*, which is an ordinary GeminiBatchJob with its own UID. So intents, names at Gemini, fences, the ceiling of
//! active batches, further attempts, callbacks, the sweep and deletion hold for each part without being made a second
//! time. The parent's own decisions are in [`super::decide`] (`sharded.rs`).
//!
//! | module | client | what it does |
//! | --- | --- | --- |
//! | [`plan`] | no | where the input is split |
//! | [`family`] | no | what the watch shows of children, and who wakes their parents |
//! | [`seen`] | no | what the parent says of its children, and how it ends |
//! | [`act`] | yes | creates, changes, finds and deletes children |
//! | [`parts`] | yes | reads the results of single children, and deletes them |
//! | [`merge`] | yes | puts them together |

pub mod act;
pub mod family;
pub mod merge;
pub mod parts;
pub mod plan;
pub mod seen;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource as _, ResourceExt as _};
use sha2::{Digest as _, Sha256};

use self::plan::{Limits, Plan};
use super::destination::{Destination, Placed};
use super::watched::Watched;
use super::{Problem, decide};
use crate::api::conditions::{self, cut};
use crate::api::{
    GROUP, GeminiBatchJob, GeminiBatchJobSpec, Input, InputRange, LocalRef, PARENT_LABEL, ReadinessPolicy,
    Retention, SHARD_LABEL, Shards, State, SuspendPolicy, Usage,
};

/// More parts than this are refused: each is an object that everybody who lists jobs sees.
pub const MAX_SHARDS: usize = 1000;

/// Created, changed or deleted in one step.
pub const AT_ONCE: usize = 16;

/// Kubernetes' limit for names, less what is appended for results.
const MAX_NAME_BYTES: usize = 253 - RESULTS_SUFFIX.len();
const RESULTS_SUFFIX: &str = "-results";
/// `-` and four digits.
const INDEX_BYTES: usize = 5;
const HASH_LETTERS: usize = 10;
const MAX_LABEL_BYTES: usize = 63;

/// The name of the job of a part.
#[must_use]
pub fn child_name(parent: &str, index: usize) -> String {
    let room = MAX_NAME_BYTES - INDEX_BYTES;
    if parent.len() <= room {
        return format!("{parent}-{index:04}");
    }
    // Two long names that begin alike must not share their children's names.
    let hash = super::identity::hex(&Sha256::digest(parent));
    let head = cut(parent, room - HASH_LETTERS - 1).trim_end_matches(['-', '.']);
    format!("{head}-{}-{index:04}", &hash[..HASH_LETTERS])
}

/// The ConfigMap that the job of a part stores its results in.
#[must_use]
pub fn results_name(child: &str) -> String {
    format!("{child}{RESULTS_SUFFIX}")
}

/// The place below the job's own that the job of a part stores its results in.
#[must_use]
pub fn results_uri(uri: &str, index: usize) -> String {
    format!("{}/shards/{index:04}", uri.trim_end_matches('/'))
}

/// The value of [`PARENT_LABEL`].
#[must_use]
pub fn label_of(parent: &str) -> String {
    cut(parent, MAX_LABEL_BYTES).trim_end_matches(['-', '.']).to_owned()
}

/// The sharded job that made this one, if one did.
#[must_use]
pub fn parent_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|owner| {
        owner.controller == Some(true)
            && owner.kind == GeminiBatchJob::kind(&())
            && owner.api_version.split('/').next() == Some(GROUP)
    })
}

/// Whether `meta` is of a job that was made for a part of this very job.
#[must_use]
pub fn is_child_of(parent: &GeminiBatchJob, meta: &ObjectMeta) -> bool {
    parent_of(meta).is_some_and(|owner| Some(&owner.uid) == parent.metadata.uid.as_ref())
}

/// What the parent has recorded of its parts.
#[must_use]
pub fn recorded(job: &GeminiBatchJob) -> Option<&Shards> {
    job.spec.sharding.as_ref()?;
    job.status.as_ref()?.shards.as_deref()
}

/// By what the job's input is split; `None` if it is not. What was recorded counts, whatever the operator's own limit has
/// become since.
#[must_use]
pub fn limits(job: &GeminiBatchJob, max_input_bytes: u64) -> Option<Limits> {
    let sharding = job.spec.sharding.as_ref()?;
    if let Some(recorded) = recorded(job) {
        return Some(Limits {
            max_requests: recorded.max_requests,
            max_bytes: recorded.max_bytes,
            expected: Some(recorded.plan_sha256.clone()),
        });
    }
    let own = i64::try_from(max_input_bytes).unwrap_or(i64::MAX);
    Some(Limits {
        max_requests: sharding.max_requests,
        max_bytes: sharding.max_bytes.map_or(own, |most| most.min(own)),
        expected: None,
    })
}

/// What holds a child, apart from what the parent's spec says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// The parent has not recorded yet that it exists.
    pub unrecorded: bool,
    /// The parent's time is over: what runs is cancelled.
    pub stopped: bool,
}

/// What the spec of a child shall be, but for its input. Everything that the parent's user may set goes to the children,
/// apart from what is judged at the parent.
#[must_use]
pub fn desired(parent: &GeminiBatchJob, index: usize, hold: Hold) -> GeminiBatchJobSpec {
    let spec = &parent.spec;
    let mut output = spec.output.clone();
    if let Some(output) = &mut output {
        let child = child_name(&parent.name_any(), index);
        output.config_map = output.config_map.as_ref().map(|_| LocalRef { name: results_name(&child) });
        if let Some(at) = &mut output.object_store {
            at.uri = results_uri(&at.uri, index);
        }
        // They were paid for: whoever deletes a child does not delete them.
        output.retention = Retention::Retain;
    }
    GeminiBatchJobSpec {
        input: None,
        import_from: None,
        sharding: None,
        output,
        dry_run: false,
        suspend: spec.suspend || hold.unrecorded || hold.stopped,
        suspend_policy: if hold.stopped { SuspendPolicy::Cancel } else { spec.suspend_policy },
        active_deadline_seconds: None,
        ttl_seconds_after_finished: None,
        success_policy: None,
        readiness_policy: ReadinessPolicy::default(),
        ..spec.clone()
    }
}

/// The part of the parent's input that a child has.
#[must_use]
pub fn part_of(input: &Input, range: &InputRange) -> Input {
    let mut part = input.clone();
    if let Some(at) = &mut part.config_map {
        at.range = Some(Box::new(range.clone()));
    }
    if let Some(at) = &mut part.object_store {
        at.range = Some(Box::new(range.clone()));
    }
    part
}

/// A child as it is created: held until the parent has recorded that it exists. So it can't have sent anything that
/// the parent does not know of, and one that is missing without a record can be created again.
#[must_use]
pub fn child(parent: &GeminiBatchJob, index: usize, range: &InputRange) -> GeminiBatchJob {
    let name = child_name(&parent.name_any(), index);
    let hold = Hold { unrecorded: true, ..Hold::default() };
    let mut spec = desired(parent, index, hold);
    spec.input = parent.spec.input.as_ref().map(|input| part_of(input, range));
    let mut child = GeminiBatchJob::new(&name, spec);
    child.metadata.namespace = parent.namespace();
    child.metadata.labels = Some(BTreeMap::from([
        (PARENT_LABEL.to_owned(), label_of(&parent.name_any())),
        (SHARD_LABEL.to_owned(), index.to_string()),
    ]));
    // Not blocking: that would need a permission on the parent's finalizers.
    let owner = parent.controller_owner_ref(&()).map(|o| OwnerReference { block_owner_deletion: None, ..o });
    child.metadata.owner_references = owner.map(|owner| vec![owner]);
    child
}

/// One step with the jobs of parts.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Create some. They are held until the parent has recorded them.
    Create {
        /// The number of the first one.
        first: usize,
        /// How many.
        count: usize,
    },
    /// Give some the spec that they shall have.
    Sync {
        /// Their numbers.
        indices: Vec<usize>,
        /// The parent's time is over.
        stopped: bool,
    },
    /// Delete some.
    Delete {
        /// Their numbers.
        indices: Vec<usize>,
    },
    /// Find all that there are, whatever the watch shows, and delete them.
    DeleteAll,
    /// Put the results together.
    Merge {
        /// Where they go.
        at: Destination,
    },
    /// Delete the results of single parts.
    DropParts,
}

impl Action {
    /// For logs and tests.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create { .. } => "CreateShards",
            Self::Sync { .. } => "SyncShards",
            Self::Delete { .. } => "DeleteShards",
            Self::DeleteAll => "DeleteAllShards",
            Self::Merge { .. } => "MergeShards",
            Self::DropParts => "DropParts",
        }
    }
}

/// What came of putting the results together.
#[derive(Clone, Debug, PartialEq)]
pub enum Merged {
    /// They are stored, or there are none.
    Done(Tally),
    /// They do not fit.
    TooLarge {
        /// What they come to.
        bytes: i64,
        /// `metadata.generation` of the job then: another output may take them.
        generation: Option<i64>,
    },
}

/// What the whole holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    /// Requests with a response.
    pub succeeded: i64,
    /// Tokens.
    pub usage: Usage,
    /// Where it is; `None` if there was nothing to store.
    pub stored: Option<(Destination, Placed)>,
}

/// A place for a child, as far as this process knows.
#[derive(Clone, Debug, Default)]
pub enum Slot {
    /// Nothing has its name.
    #[default]
    Absent,
    /// Something else has its name.
    Foreign,
    /// It was there, and somebody deleted it.
    Lost,
    /// It is there, and this version of the operator can't read it.
    Unreadable,
    /// It is there.
    Here(Arc<Watched>),
}

impl Slot {
    /// The child.
    #[must_use]
    pub fn job(&self) -> Option<&GeminiBatchJob> {
        match self {
            Self::Here(watched) => watched.0.as_ref().ok(),
            _ => None,
        }
    }

    /// What has the name of a child of `parent`.
    #[must_use]
    pub fn of(parent: &GeminiBatchJob, there: Arc<Watched>) -> Self {
        if !is_child_of(parent, there.meta()) {
            return Self::Foreign;
        }
        if there.0.is_ok() { Self::Here(there) } else { Self::Unreadable }
    }
}

/// Held, as its present spec says, and with nothing at Gemini.
#[must_use]
pub fn is_resting(child: &GeminiBatchJob) -> bool {
    child
        .status
        .as_ref()
        .is_some_and(|s| s.state == State::Suspended && s.observed_generation == child.metadata.generation)
}

/// Whether a child that is over is kept as long as its parent: its own deletion has something to do at Gemini, or a batch
/// of a send that was given up may still turn up, which the sweep tells by the child.
#[must_use]
pub fn is_kept(parent: &GeminiBatchJob, child: &GeminiBatchJob) -> bool {
    let resent = child.status.iter().flat_map(|s| &s.attempts).any(|a| a.resends.is_some());
    parent.spec.deletion_policy() == crate::api::DeletionPolicy::Delete || resent
}

/// Why a child waits for somebody.
#[must_use]
pub fn stalled(child: &GeminiBatchJob) -> Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition> {
    let status = child.status.as_ref().filter(|_| !decide::is_finished(child))?;
    conditions::get(&status.conditions, conditions::STALLED).filter(|c| c.status == "True")
}

/// What one process knows of a job's children. Lost on a restart.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Where the input is split, once it was read.
    pub plan: Option<Arc<Plan>>,
    /// `metadata.generation` of the job that it was read for.
    pub plan_generation: Option<i64>,
    /// One for each part, once it is recorded how many there are.
    pub slots: Vec<Slot>,
    /// Children as the API server answered with them in this pass: newer than the watch.
    pub fresh: BTreeMap<usize, Arc<Watched>>,
    /// Those that were deleted in this pass: the watch shows it a moment later.
    pub going: BTreeSet<usize>,
    /// Those that were looked for in vain.
    pub lost: BTreeSet<usize>,
    /// The API server refused to create or change one.
    pub refused: Option<Refused>,
    /// What came of putting the results together.
    pub merged: Option<Merged>,
    /// The results of single children are deleted, or it was given up.
    pub parts_dropped: bool,
    /// Children that a complete list has shown in this pass.
    pub left: Option<usize>,
}

/// A refusal of the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What to say.
    pub problem: Problem,
    /// When it is tried again.
    pub next: Timestamp,
}

impl Known {
    /// A pass begins: what is known from answers may have changed since.
    pub fn begin_pass(&mut self) {
        self.fresh.clear();
        self.going.clear();
        self.left = None;
    }

    /// The plan, if it is the one that is recorded, or was made of the input that the job has now.
    #[must_use]
    pub fn plan_for(&self, job: &GeminiBatchJob) -> Option<&Arc<Plan>> {
        let plan = self.plan.as_ref()?;
        let good = match recorded(job) {
            Some(recorded) => recorded.plan_sha256 == plan.sha256,
            None => self.plan_generation == job.metadata.generation,
        };
        good.then_some(plan)
    }
}

#[cfg(test)]
mod tests;
