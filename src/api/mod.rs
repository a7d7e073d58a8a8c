//! The custom resource: what users write (`spec`), what they watch (`status`), and the words both use.
//!
//! Pure data and pure functions; imports none of its siblings. The committed CRD in `crds/` is what
//! [`crd::crd`] returns.

pub mod conditions;
pub mod crd;
mod reason;
mod spec;
mod status;

pub use reason::Reason;
pub use spec::{
    ConfigMapKeyRef, Credentials, DeletionPolicy, ErrorCode, GeminiBatchJob, GeminiBatchJobSpec,
    GeminiFileRef, ImportFrom, Input, InputRange, InputRequest, LocalRef, Method, ObjectStoreInput,
    ObjectStoreOutput, Output, ReadinessPolicy, Retention, RetryPolicy, SecretKeyRef, Sharding,
    SuccessPolicy, SuspendPolicy,
};
pub use status::{
    Attempt, Callback, Cancellation, DryRun, GeminiBatchJobStatus, Outcome, OutputStatus, Refusal,
    RefusedCall, RequestCounts, Shard, Shards, State, StoredObject, StoredOutput, Usage,
};

/// API group of everything this operator serves.
pub const GROUP: &str = "geminibatch.dev";

/// Held while something of the job may still exist at Gemini; removed as soon as nothing does.
pub const FINALIZER: &str = "geminibatch.dev/remote-cleanup";

/// Field manager of the controller: it alone writes `status`, apart from `status.callback`.
pub const CONTROLLER_MANAGER: &str = "gemini-batch-controller";

/// On the output object: UID of the job it was made for. An object without ours is never written to.
pub const JOB_UID_ANNOTATION: &str = "geminibatch.dev/job-uid";

/// On a job whose input is a `geminiFile` and whose submission stays unconfirmed: the user says, by the send's id,
/// that it may be sent again. The operator can't delete such a file, and so can't make sure that it fails.
pub const RESEND_ANNOTATION: &str = "geminibatch.dev/resend";

/// On the output object: name of the job it was made for.
pub const JOB_NAME_ANNOTATION: &str = "geminibatch.dev/job-name";

/// On the results of one shard: UID of the sharded job that puts them together.
pub const PARENT_UID_ANNOTATION: &str = "geminibatch.dev/parent-uid";

/// On the job of a shard: name of the sharded job, cut to 63 characters.
pub const PARENT_LABEL: &str = "geminibatch.dev/parent";

/// On the job of a shard: its number, from 0.
pub const SHARD_LABEL: &str = "geminibatch.dev/shard";

/// Field manager of what the controller writes to the jobs of shards.
pub const SHARDS_MANAGER: &str = "gemini-batch-shards";
