//! What users watch, and what the operator needs to know after a restart. Every doc comment here is what
//! `kubectl explain` prints.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is known of the job. Written by the operator only.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.conditions) || !(self.conditions.exists(c, c.type == 'Complete' && c.status == 'True') && \
         self.conditions.exists(c, c.type == 'Failed' && c.status == 'True'))"
    )
    .message("a job can't be Complete and Failed at once"),
    // One clause for each type: a nested loop would exceed the API server's budget for rules.
    validation = Rule::new(
        "!has(oldSelf.conditions) || has(self.conditions) && \
         (!oldSelf.conditions.exists(c, c.type == 'Complete' && c.status == 'True') || \
         self.conditions.exists(c, c.type == 'Complete' && c.status == 'True')) && \
         (!oldSelf.conditions.exists(c, c.type == 'Failed' && c.status == 'True') || \
         self.conditions.exists(c, c.type == 'Failed' && c.status == 'True')) && \
         (!oldSelf.conditions.exists(c, c.type == 'Finished' && c.status == 'True') || \
         self.conditions.exists(c, c.type == 'Finished' && c.status == 'True'))"
    )
    .message("Complete, Failed and Finished never revert")
)]
pub struct GeminiBatchJobStatus {
    /// The `metadata.generation` that this status speaks of. -1: not looked at yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// The job in one word, for whatever cannot read conditions, and a field selector:
    /// `kubectl get gbj --field-selector status.state=Succeeded`.
    #[serde(default)]
    pub state: State,

    /// `Validated`: with `spec.dryRun`, all that a submission needs is there. `Submitted`: Gemini has the batch. `Suspended`: `spec.suspend` holds it. `Complete`: results are where `output` says. `Failed`: there will
    /// be none (or only part of them). `Finished`: either of the two, the one to wait for. `Ready`,
    /// `Reconciling` and `Stalled` are for kstatus, Flux, Argo CD and `helm --wait`; `Stalled` says that
    /// somebody has to change something, and what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["type"]
    ))]
    pub conditions: Vec<Condition>,

    /// What was sent to Gemini. Recorded before it is sent, so that nothing is ever paid for twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["number"]
    ))]
    pub attempts: Vec<Attempt>,

    /// With `spec.sharding`: the parts of the input and what became of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<Box<Shards>>,

    /// How many requests the job has and what became of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<RequestCounts>,

    /// What a dry run has found (`spec.dryRun`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<DryRun>,

    /// Tokens that Gemini charged, summed over all results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,

    /// The results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputStatus>,

    /// The last verified callback of Gemini: a hint that makes the operator look, never a fact. Written by
    /// the callback receiver only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback: Option<Callback>,

    /// When the operator began to submit the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,

    /// When the job became Complete or Failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

/// A job in one word.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum State {
    /// Not submitted yet. If it stays so, the condition `Stalled` says why.
    #[default]
    Pending,
    /// Waits for its turn: for Gemini's quota, for another job to finish, or for an administrator.
    Queued,
    /// Submitted, whatever Gemini calls it.
    Running,
    /// Held by `spec.suspend`, with nothing of it running at Gemini.
    Suspended,
    /// Its results are where they should be.
    Succeeded,
    /// Ended without (all of) its results.
    Failed,
    /// Ended because somebody cancelled the batch.
    Cancelled,
}

impl State {
    /// The word as it stands in the resource.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Queued => "Queued",
            Self::Running => "Running",
            Self::Suspended => "Suspended",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
        }
    }
}

/// One batch at Gemini, from the intent to create it to its end.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(oldSelf.batchName) || (has(self.batchName) && self.batchName == oldSelf.batchName)"
    )
    .message("an attempt's batchName is set once and never changed")
)]
pub struct Attempt {
    /// Number of the attempt, from 1.
    #[schemars(range(min = 1))]
    pub number: i32,
    /// Random, new for each request to create a batch.
    #[schemars(length(max = 32))]
    pub send_id: String,
    /// The name that the batch bears at Gemini: how it is found again if the answer to its creation is lost.
    #[schemars(length(max = 512))]
    pub display_name: String,
    /// The input file at Gemini.
    #[schemars(length(max = 128))]
    pub input_file: String,
    /// SHA-256 of the input as uploaded, in hexadecimal. Absent for a `geminiFile`. The first attempt carries all
    /// requests, further ones only those without a result and those that `spec.retryPolicy` sends again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub input_sha256: Option<String>,
    /// How many requests the input holds. Absent for a `geminiFile`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_count: Option<i64>,
    /// A keyed hash of the API key that was used: tells whether a later key is the same one.
    #[schemars(length(max = 64))]
    pub credential_fingerprint: String,
    /// When the intent to send was recorded.
    pub intent_time: MicroTime,
    /// Set when Gemini refused the send: nothing was created, and nothing will be by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    /// How many sends of this attempt were refused so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusals: Option<i32>,
    /// How often a send whose outcome stayed unknown was followed by another one, after its input file was deleted
    /// so that it must fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resends: Option<i32>,
    /// When the operator set out to delete the input file of this send, whose outcome stayed unknown. From then on a
    /// file that is missing does not tell that the batch was never asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence_time: Option<MicroTime>,
    /// Set when the batch is asked for without a webhook, since Gemini refused one: it is looked for in a list every
    /// minute instead.
    #[serde(default, skip_serializing_if = "is_false")]
    pub polled: bool,
    /// The batch at Gemini.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub batch_name: Option<String>,
    /// When Gemini says that it created the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Time>,
    /// When Gemini says that the batch ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Time>,
    /// The state that Gemini gave last, in its own words, without the prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub remote_state: Option<String>,
    /// Set when the operator decided to cancel the batch, before it does: `Suspended` or `DeadlineExceeded`. The
    /// batch is watched until Gemini says how it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancellation: Option<Cancellation>,
    /// Set when nothing of the attempt is outstanding any more and the job goes on without it: its batch is over
    /// and what results it left were collected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// The last callback that was acted on: its `webhookId`, `@` and its `receivedTime`. Not the id alone: a
    /// delivery that is repeated on another receiver may have taken the place of a callback that nobody saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 192))]
    pub observed_hint: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn is_false(value: &bool) -> bool {
    !value
}

/// The decision to cancel a batch.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Cancellation {
    /// Why: `Suspended` or `DeadlineExceeded`.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// When it was decided.
    pub time: MicroTime,
}

/// How an attempt ended that was not the last one.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Why it ended, as in the conditions.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Requests that have a response by now, those of earlier attempts included.
    pub succeeded: i64,
    /// Requests that have an error by now, those of earlier attempts included, and those not that are sent again.
    pub failed: i64,
    /// The result file at Gemini, if the batch left one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub output_file: Option<String>,
}

/// A refusal by Gemini that is certain: nothing was created.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// The call that was refused.
    pub call: RefusedCall,
    /// Why, as in the conditions.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// HTTP status code of the answer.
    pub code: i32,
    /// When.
    pub time: MicroTime,
    /// When the next send is due, if nothing else stands in its way.
    pub retry_time: MicroTime,
}

/// A call to Gemini that can be refused before anything is created.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedCall {
    /// The upload of the input file.
    Upload,
    /// The creation of the batch.
    Create,
}

/// Requests by outcome.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RequestCounts {
    /// All requests of the job.
    #[serde(default)]
    pub total: i64,
    /// Those with a response.
    #[serde(default)]
    pub succeeded: i64,
    /// Those with an error that are not sent again, and when the job has finished also those without any result.
    #[serde(default)]
    pub failed: i64,
    /// Those without a result yet, and those whose error a further attempt may replace.
    #[serde(default)]
    pub pending: i64,
}

/// The parts of a sharded job. Recorded before the first of them is created, so that the input is split once.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Shards {
    /// How many there are.
    #[serde(default)]
    pub total: i32,
    /// How many of them were given a job, in their order. None of these is ever given another one.
    #[serde(default)]
    pub created: i32,
    /// Those that are not at Gemini yet.
    #[serde(default)]
    pub pending: i32,
    /// Those that Gemini has.
    #[serde(default)]
    pub running: i32,
    /// Those that ended with their results.
    #[serde(default)]
    pub succeeded: i32,
    /// Those that ended without (all of) them.
    #[serde(default)]
    pub failed: i32,
    /// SHA-256 of the whole input as it is sent, in hexadecimal.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub input_sha256: String,
    /// SHA-256 of where it was split: the same input, split in the same way, has the same.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub plan_sha256: String,
    /// `spec.sharding.maxRequests` as it was split by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<i64>,
    /// `spec.sharding.maxBytes` as it was split by, or the operator's own limit.
    #[serde(default)]
    pub max_bytes: i64,
    /// At most 20 of them: first those that somebody has to look at, then those that are under way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["index"]
    ))]
    pub listed: Vec<Shard>,
}

/// One part of a sharded job.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Shard {
    /// Its number, from 0.
    pub index: i32,
    /// The GeminiBatchJob that it was given.
    #[schemars(length(max = 253))]
    pub job: String,
    /// Of that job. `Failed` if it does not exist any more.
    pub state: State,
    /// Why, as in that job's conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
}

/// What a submission would carry.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DryRun {
    /// Bytes that would be uploaded.
    #[serde(default)]
    pub size_bytes: i64,
    /// Their SHA-256 in hexadecimal.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub sha256: String,
}

/// Token counts as Gemini reports them.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Tokens of the prompts.
    #[serde(default)]
    pub prompt_tokens: i64,
    /// Tokens of the answers, thoughts included.
    #[serde(default)]
    pub output_tokens: i64,
    /// All tokens.
    #[serde(default)]
    pub total_tokens: i64,
}

/// Where the results are.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct OutputStatus {
    /// The result file at Gemini.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub file_name: Option<String>,
    /// Until when the result file is certain to exist: 48 hours after the end of the batch. (Google's guide
    /// says six weeks, but files were seen to vanish after two days.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiration_time: Option<Time>,
    /// Size of the result file in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// SHA-256 of the result file, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub sha256: Option<String>,
    /// The ConfigMap that holds the results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub config_map: Option<String>,
    /// The objects that hold the results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_store: Option<StoredOutput>,
}

/// Results in an object store.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StoredOutput {
    /// URI of the manifest, which is published last.
    #[schemars(length(max = 1280))]
    pub manifest: String,
    /// The objects, whose names are relative to the place of the manifest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub objects: Vec<StoredObject>,
}

/// An object that holds results.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StoredObject {
    /// Its name, relative to the place of the manifest.
    #[schemars(length(max = 128))]
    pub name: String,
    /// Its size in bytes.
    pub bytes: i64,
    /// How many lines it has.
    pub lines: i64,
    /// SHA-256 of its content, in hexadecimal.
    #[schemars(length(max = 64))]
    pub sha256: String,
}

/// A verified callback.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Callback {
    /// Identity of the callback; the same for its redeliveries.
    #[schemars(length(max = 128))]
    pub webhook_id: String,
    /// What Gemini said happened, for example `batch.succeeded`.
    #[serde(rename = "type")]
    #[schemars(length(max = 64))]
    pub type_: String,
    /// The batch that the callback names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub batch_id: Option<String>,
    /// The attempt whose callback URL was used.
    pub attempt: i32,
    /// When it happened, according to Gemini.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_time: Option<MicroTime>,
    /// When the receiver took it.
    pub received_time: MicroTime,
}

impl Callback {
    /// What it is known by in `observedHint`.
    #[must_use]
    pub fn hint(&self) -> String {
        format!("{}@{:.6}", self.webhook_id, self.received_time.0)
    }
}
