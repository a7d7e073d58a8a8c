//! What users write. Every doc comment here is what `kubectl explain` prints.
#![allow(
    clippy::struct_field_names,
    reason = "in the API each name stands alone; KubeSchema makes a copy of each struct without its attributes"
)]

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::status::GeminiBatchJobStatus;

/// What Kubernetes lets objects be called (RFC 1123 subdomain).
const OBJECT_NAME: &str =
    r"self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')";

/// One batch of requests to a Gemini model: what to ask, who pays, and where the answers go.
///
/// - `model`, `method`: the model that answers all requests, and whether it generates content or embeds it
/// - `credentials`: the Secret with the API key that pays
/// - `input`: the requests, here, in a ConfigMap, in an object store or in a file at Gemini
/// - `output`: where the results go; without it they stay with Gemini
/// - `sharding`: whether a large input becomes several batches
/// - `suspend`, `activeDeadlineSeconds`: when to hold it, how long it may take
/// - `backoffLimit`, `retryPolicy`: whether to try again a batch that failed, or requests that did
/// - `deletionPolicy`, `ttlSecondsAfterFinished`: what becomes of it afterwards
///
/// `model`, `method`, `credentials`, `input` and `importFrom` can't be changed once the submission has begun, `output` once
/// the job has finished. Everything else may be changed at any time.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "geminibatch.dev",
    version = "v1alpha1",
    kind = "GeminiBatchJob",
    plural = "geminibatchjobs",
    shortname = "gbj",
    category = "gemini",
    namespaced,
    derive = "PartialEq",
    status = "GeminiBatchJobStatus",
    selectable = ".status.state",
    doc = "A batch of Gemini requests: submitted once, watched by callback, its results collected. \
           Wait for it with `kubectl wait --for=condition=Finished gbj/NAME`.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model"),
    printcolumn(name = "Succeeded", type_ = "integer", json_path = ".status.requests.succeeded"),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.requests.failed"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Batch",
        type_ = "string",
        json_path = ".status.attempts[-1:].batchName",
        priority = 1
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Shards", type_ = "integer", json_path = ".status.shards.total", priority = 1),
    validation = Rule::new(
        "!has(oldSelf.status) || (!has(oldSelf.status.shards) && \
         (!has(oldSelf.status.attempts) || size(oldSelf.status.attempts) == 0)) || \
         (self.spec.model == oldSelf.spec.model && \
         (has(self.spec.method) ? self.spec.method : 'GenerateContent') == \
         (has(oldSelf.spec.method) ? oldSelf.spec.method : 'GenerateContent') && \
         has(self.spec.credentials) == has(oldSelf.spec.credentials) && \
         (!has(self.spec.credentials) || self.spec.credentials == oldSelf.spec.credentials) && \
         has(self.spec.input) == has(oldSelf.spec.input) && \
         (!has(self.spec.input) || self.spec.input == oldSelf.spec.input) && \
         has(self.spec.importFrom) == has(oldSelf.spec.importFrom) && \
         (!has(self.spec.importFrom) || self.spec.importFrom == oldSelf.spec.importFrom))"
    )
    .message(
        "spec.model, spec.method, spec.credentials, spec.input and spec.importFrom of a job can't be changed once its \
         submission has begun; create a new GeminiBatchJob under another name instead"
    )
    .reason(Reason::FieldValueForbidden),
    validation = Rule::new(
        "!has(oldSelf.status) || (!has(oldSelf.status.shards) && \
         (!has(oldSelf.status.attempts) || size(oldSelf.status.attempts) == 0)) || \
         (has(self.spec.sharding) == has(oldSelf.spec.sharding) && (!has(self.spec.sharding) || \
         (has(self.spec.sharding.maxRequests) == has(oldSelf.spec.sharding.maxRequests) && \
         (!has(self.spec.sharding.maxRequests) || \
         self.spec.sharding.maxRequests == oldSelf.spec.sharding.maxRequests) && \
         has(self.spec.sharding.maxBytes) == has(oldSelf.spec.sharding.maxBytes) && \
         (!has(self.spec.sharding.maxBytes) || self.spec.sharding.maxBytes == oldSelf.spec.sharding.maxBytes))))"
    )
    .message(
        "spec.sharding can't be changed once the submission has begun, apart from spec.sharding.maxInFlight: the input \
         is split already"
    )
    .reason(Reason::FieldValueForbidden),
    validation = Rule::new(
        "!has(oldSelf.status) || (!has(oldSelf.status.shards) && \
         (!has(oldSelf.status.attempts) || size(oldSelf.status.attempts) == 0)) || \
         !has(self.spec.dryRun) || !self.spec.dryRun || (has(oldSelf.spec.dryRun) && oldSelf.spec.dryRun)"
    )
    .message("spec.dryRun can't be turned on once the submission has begun: spec.suspend holds a job")
    .reason(Reason::FieldValueForbidden),
    validation = Rule::new(
        "!has(oldSelf.status) || !has(oldSelf.status.completionTime) || \
         (has(self.spec.output) == has(oldSelf.spec.output) && \
         (!has(self.spec.output) || self.spec.output == oldSelf.spec.output))"
    )
    .message("spec.output can't be changed once the job has finished: its results are stored already")
    .reason(Reason::FieldValueForbidden),
    validation = Rule::new(
        "!has(oldSelf.status) || !has(oldSelf.status.completionTime) || \
         (has(self.status) && has(self.status.completionTime) && \
         self.status.completionTime == oldSelf.status.completionTime && \
         self.status.state == oldSelf.status.state)"
    )
    .message("a finished job stays finished: status.state and status.completionTime can't change any more")
    .reason(Reason::FieldValueForbidden)
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new(
        "!has(self.output) || !has(self.output.configMap) || !has(self.input) || !has(self.input.configMap) || \
         self.output.configMap.name != self.input.configMap.name"
    )
    .message("spec.output.configMap must not be the ConfigMap that spec.input.configMap reads from"),
    // Results below a prefix would be read as requests by the next attempt.
    validation = Rule::new(
        "!has(self.output) || !has(self.output.objectStore) || !has(self.input) || !has(self.input.objectStore) || \
         (!has(self.input.objectStore.prefix) || \
         !(self.output.objectStore.uri + '/').startsWith(self.input.objectStore.prefix)) && \
         (!has(self.input.objectStore.uri) || \
         !(self.input.objectStore.uri in [self.output.objectStore.uri, \
         self.output.objectStore.uri + '/manifest.json', self.output.objectStore.uri + 'manifest.json', \
         self.output.objectStore.uri + '/reservation.json', self.output.objectStore.uri + 'reservation.json']))"
    )
    .message(
        "spec.output.objectStore.uri must be a place where spec.input.objectStore does not read: neither its object, nor \
         anything below its prefix"
    ),
    validation = Rule::new("has(self.input) != has(self.importFrom)").message(
        "spec needs exactly one of input (requests to send) and importFrom (a batch that exists at Gemini already)"
    ),
    // Else one tenant could name another's file or batch and have the operator's own key read it.
    validation = Rule::new(
        "has(self.credentials) || !(has(self.importFrom) || has(self.input) && has(self.input.geminiFile))"
    )
    .message(
        "spec.credentials is needed with importFrom and input.geminiFile: the operator's own credential is not used \
         for what somebody else put at Gemini"
    ),
    validation = Rule::new("!has(self.importFrom) || !has(self.dryRun) || !self.dryRun").message(
        "spec.dryRun can't be used with importFrom: there is nothing to submit"
    ),
    validation = Rule::new("!has(self.ttlSecondsAfterFinished) || has(self.output)").message(
        "spec.ttlSecondsAfterFinished needs spec.output: without it the job is all that names its results"
    ),
    validation = Rule::new(
        "!has(self.sharding) || (has(self.input) && (has(self.input.configMap) || has(self.input.objectStore)))"
    )
    .message("spec.sharding needs spec.input.configMap or spec.input.objectStore: only these are large enough to be split"),
    validation = Rule::new(
        "!has(self.sharding) || !has(self.input) || \
         ((!has(self.input.configMap) || !has(self.input.configMap.range)) && \
         (!has(self.input.objectStore) || !has(self.input.objectStore.range)))"
    )
    .message("spec.sharding can't be used with a range of an input: split the whole input, or leave the range out"),
    validation = Rule::new("!has(self.sharding) || has(self.output)").message(
        "spec.sharding needs spec.output: the results of all shards are put together there"
    ),
    validation = Rule::new("!has(self.importFrom) || !has(self.backoffLimit) || self.backoffLimit == 0").message(
        "spec.backoffLimit can't be used with importFrom: the operator does not have the requests to send them again"
    ),
    validation = Rule::new(
        "!has(self.retryPolicy) || !(has(self.importFrom) || has(self.input) && has(self.input.geminiFile))"
    )
    .message(
        "spec.retryPolicy can't be used with importFrom and input.geminiFile: the operator does not have the requests to \
         send the failed ones again; put them into input.requests, input.configMap or input.objectStore"
    )
)]
pub struct GeminiBatchJobSpec {
    /// The Gemini model that answers, for example `gemini-2.5-flash`; `models/gemini-2.5-flash` and
    /// `tunedModels/NAME` are accepted too. All requests of a job go to the same model. Can't be changed
    /// once the submission has begun.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(
        validation = Rule::new(r"self.matches('^((models|tunedModels)/)?[A-Za-z0-9][A-Za-z0-9._-]*$')")
            .message("spec.model must be the name of a Gemini model, like gemini-2.5-flash or models/gemini-2.5-flash")
    )]
    pub model: String,

    /// What the model does with each request: `GenerateContent` answers it, `EmbedContent` turns its content into a
    /// vector and needs an embedding model, like `gemini-embedding-001`. It decides what a `request` must look like.
    /// Can't be changed once the submission has begun. With `importFrom` it only describes the batch. Default:
    /// `GenerateContent`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub method: Method,

    /// The API key that pays for the batch. Without it the operator's own credential is used, if an administrator
    /// set one up and allowed it for this namespace. Can't be changed once the submission has begun (the Secret's
    /// content may be).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,

    /// The requests: exactly one of `requests`, `configMap`, `objectStore` and `geminiFile`. Can't be changed once the
    /// submission has begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Input>,

    /// Instead of `input`: a batch that somebody else created at Gemini. It is watched, its results are collected
    /// and the job finishes like any other; it is cancelled only if `deletionPolicy`, `suspendPolicy` or
    /// `activeDeadlineSeconds` ask for it. The way to move from a poller of your own. Can't be changed once the
    /// batch was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import_from: Option<ImportFrom>,

    /// Where the results go. Without it they stay with Gemini: `status.output` names the file and the time
    /// until which it is certain to exist. May be changed until the job has finished, which is how a job
    /// goes on whose results did not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,

    /// Splits the input over several batches, each by a GeminiBatchJob of its own that this one creates, and puts their
    /// results together. A batch that Gemini fails or lets expire then costs one part, and is tried again alone
    /// (`backoffLimit` and the limit of attempts count for each part). Edit this job only: what is edited at the jobs
    /// of its parts is set back. Can't be changed once the input is split, apart from `maxInFlight`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharding: Option<Sharding>,

    /// Only tries whether the job could be submitted: the input, the API key and the output are checked, the output
    /// object is reserved, and `status.dryRun` and the condition `Validated` tell what was found. Nothing is sent to
    /// Gemini but the question whether the key is valid. Set to false, the job goes on. Can't be turned on once the
    /// submission has begun.
    #[serde(default, skip_serializing_if = "is_default")]
    pub dry_run: bool,

    /// Holds the job: nothing is submitted while this is true. A batch that is at Gemini already is treated as
    /// `suspendPolicy` says. Set to false again, the job goes on with the requests that have no result yet.
    #[serde(default, skip_serializing_if = "is_default")]
    pub suspend: bool,

    /// What `suspend` means for a batch that runs: `Drain` lets it finish and starts nothing new, `Cancel` cancels
    /// it and keeps the results that it had. (What ran until then is paid for.) Default: `Drain`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub suspend_policy: SuspendPolicy,

    /// Seconds from the start (`status.startTime`; anew after a suspension) after which the batch is cancelled. What
    /// results it has by then are kept, and the job is Failed with the reason `DeadlineExceeded`. A batch that
    /// Gemini finished whole all the same is Complete. No deadline by default; Gemini itself gives batches up after
    /// 48 hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<i64>,

    /// How many further batches may be paid for if Gemini fails a batch or lets it expire. Each carries only the
    /// requests without a result. Default: 0, money is not spent twice unasked. Requests that fail inside a batch that
    /// Gemini finished are the matter of `retryPolicy`.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(range(min = 0, max = 9))]
    pub backoff_limit: i32,

    /// Whether requests that failed inside a batch are sent again, in a further batch that holds only them. What that
    /// yields takes the place of their errors; nothing that succeeded is sent again. Not set by default: money is not
    /// spent twice unasked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_policy: Option<RetryPolicy>,

    /// Seconds after which a finished job deletes itself; its results stay, unless `output.retention` is `Delete`.
    /// Not set by default, and not for jobs that are kept in Git: it would create the job again, and the batch
    /// would be paid for again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 315_360_000))]
    pub ttl_seconds_after_finished: Option<i64>,

    /// What becomes of the batch when the job is deleted: `Cancel` cancels it if it runs, `Delete` also deletes
    /// it and its files at Gemini, finished or not, `Orphan` leaves it alone. Default: `Cancel`, and `Orphan` for a
    /// job with `importFrom`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_policy: Option<DeletionPolicy>,

    /// Seconds that a deletion waits at most for Gemini to do what `deletionPolicy` says. Then the job goes, and an
    /// Event says what may go on. Default: 300.
    #[serde(default = "default_deletion_timeout", skip_serializing_if = "is_default_deletion_timeout")]
    #[schemars(range(min = 1, max = 86_400))]
    pub deletion_timeout_seconds: i64,

    /// When results are good enough for the job to count as a success. By default one response is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_policy: Option<SuccessPolicy>,

    /// When the condition `Ready` turns true: `WhenComplete`, or `WhenSubmitted` for tools that wait for it with a
    /// timeout shorter than a batch takes (`helm --wait`, Flux) and would roll the release back, which cancels paid
    /// work. Default: `WhenComplete`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub readiness_policy: ReadinessPolicy,

    /// Passed on to Gemini with the next submission: of the batches of one project, those with a higher priority
    /// run first. May be negative. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i64>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Seconds.
const DELETION_TIMEOUT: i64 = 300;

fn default_deletion_timeout() -> i64 {
    DELETION_TIMEOUT
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn is_default_deletion_timeout(value: &i64) -> bool {
    *value == DELETION_TIMEOUT
}

impl GeminiBatchJobSpec {
    /// The file that somebody else uploaded, if the input is one.
    #[must_use]
    pub fn gemini_file(&self) -> Option<&GeminiFileRef> {
        self.input.as_ref()?.gemini_file.as_ref()
    }

    /// The objects that the input lies in, if it does.
    #[must_use]
    pub fn stored_input(&self) -> Option<&ObjectStoreInput> {
        self.input.as_ref()?.object_store.as_ref()
    }

    /// The part of the input that the job has, if it has not all of it.
    #[must_use]
    pub fn input_range(&self) -> Option<&InputRange> {
        let input = self.input.as_ref()?;
        let of_map = input.config_map.as_ref().and_then(|at| at.range.as_deref());
        of_map.or_else(|| input.object_store.as_ref()?.range.as_deref())
    }

    /// Whether the operator uploads the input, so that the file is its own to delete, and the keys are known.
    #[must_use]
    pub fn has_own_input(&self) -> bool {
        self.import_from.is_none() && self.gemini_file().is_none()
    }

    /// What becomes of the batch when the job is deleted.
    #[must_use]
    pub fn deletion_policy(&self) -> DeletionPolicy {
        let default =
            if self.import_from.is_some() { DeletionPolicy::Orphan } else { DeletionPolicy::Cancel };
        self.deletion_policy.unwrap_or(default)
    }
}

/// What a model does with each request of a batch.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Method {
    /// It answers it.
    #[default]
    GenerateContent,
    /// It turns its content into a vector.
    EmbedContent,
}

impl Method {
    /// The word as it stands in the resource.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GenerateContent => "GenerateContent",
            Self::EmbedContent => "EmbedContent",
        }
    }
}

/// How an input is split over several batches.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("has(self.maxRequests) || has(self.maxBytes)")
        .message("spec.sharding needs maxRequests, maxBytes or both")
)]
pub struct Sharding {
    /// At most so many requests in one batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub max_requests: Option<i64>,

    /// At most so many bytes of JSON Lines in one batch. No request may be larger. Never more than what the operator
    /// takes for one batch (2 GB, unless an administrator says otherwise).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_648_i64))]
    pub max_bytes: Option<i64>,

    /// At most so many parts are under way at once; the others are begun as these end. May be changed at any time.
    /// The operator's ceiling of active batches for each API key counts as well. Default: 10.
    #[serde(default = "default_in_flight", skip_serializing_if = "is_default_in_flight")]
    #[schemars(range(min = 1, max = 100))]
    pub max_in_flight: i32,
}

const IN_FLIGHT: i32 = 10;

fn default_in_flight() -> i32 {
    IN_FLIGHT
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn is_default_in_flight(value: &i32) -> bool {
    *value == IN_FLIGHT
}

/// What `suspend` means for a batch that runs.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SuspendPolicy {
    /// It may finish; nothing new is started.
    #[default]
    Drain,
    /// It is cancelled.
    Cancel,
}

/// What becomes of the batch when the job is deleted.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeletionPolicy {
    /// It is cancelled if it runs.
    Cancel,
    /// It is cancelled, then deleted with its files.
    Delete,
    /// It is left alone.
    Orphan,
}

/// When results are good enough.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SuccessPolicy {
    /// How many requests may end without a response, as a number or as a percentage of all requests of the job
    /// (rounded down). Are there more, the job is Failed with the reason `TooManyFailedRequests`; its results are kept
    /// all the same. Counts when the job ends, and may be changed until then.
    #[x_kube(
        validation = Rule::new(
            "type(self) == int ? self >= 0 && self <= 1000000000 : self.matches('^(100|[0-9]{1,2})%$')"
        )
        .message("spec.successPolicy.maxFailedRequests must be a number that is not negative, or a percentage like 5%")
    )]
    pub max_failed_requests: IntOrString,
}

impl SuccessPolicy {
    /// How many of so many requests may fail.
    #[must_use]
    pub fn allowed(&self, total: i64) -> i64 {
        match &self.max_failed_requests {
            IntOrString::Int(n) => i64::from(*n),
            IntOrString::String(text) => {
                let percent = text.strip_suffix('%').and_then(|n| n.parse::<i64>().ok()).unwrap_or(0);
                total.saturating_mul(percent) / 100
            }
        }
    }

    /// As the user wrote it.
    #[must_use]
    pub fn as_written(&self) -> String {
        match &self.max_failed_requests {
            IntOrString::Int(n) => n.to_string(),
            IntOrString::String(text) => text.clone(),
        }
    }
}

/// Which failed requests are sent again, and how often.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RetryPolicy {
    /// How many batches the job may have, the first one included: with 3, a request that fails is sent at most twice
    /// more. All batches count, also those after which `backoffLimit` allowed another one, but not those that `suspend`
    /// cancelled. 1: nothing is sent again. May be changed until the job has finished.
    #[schemars(range(min = 1, max = 10))]
    pub max_attempts: i32,

    /// The errors that are worth it, by the names of `google.rpc.Code`. `UNKNOWN` is also an error without a code.
    /// Default: `DEADLINE_EXCEEDED`, `RESOURCE_EXHAUSTED`, `INTERNAL` and `UNAVAILABLE`, which may pass; others, like
    /// `INVALID_ARGUMENT`, are likely to come again and cost again. Requests without any result are sent again in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "set"))]
    pub codes: Option<Vec<ErrorCode>>,
}

impl RetryPolicy {
    /// What Google's own client repeats, as far as it has to do with one request.
    const DEFAULT: [ErrorCode; 4] = [
        ErrorCode::DeadlineExceeded,
        ErrorCode::ResourceExhausted,
        ErrorCode::Internal,
        ErrorCode::Unavailable,
    ];

    /// Whether an error with this number, or without one, is worth another try.
    #[must_use]
    pub fn is_worth_it(&self, code: Option<i32>) -> bool {
        let codes = self.codes.as_deref().unwrap_or(&Self::DEFAULT);
        let code = code.unwrap_or(ErrorCode::Unknown.number());
        codes.iter().any(|c| c.number() == code)
    }
}

/// Why a request failed: the errors of `google.rpc.Code`. Names, since a number that is mistyped is another error.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// 1
    Cancelled,
    /// 2
    Unknown,
    /// 3
    InvalidArgument,
    /// 4
    DeadlineExceeded,
    /// 5
    NotFound,
    /// 6
    AlreadyExists,
    /// 7
    PermissionDenied,
    /// 8
    ResourceExhausted,
    /// 9
    FailedPrecondition,
    /// 10
    Aborted,
    /// 11
    OutOfRange,
    /// 12
    Unimplemented,
    /// 13
    Internal,
    /// 14
    Unavailable,
    /// 15
    DataLoss,
    /// 16
    Unauthenticated,
}

impl ErrorCode {
    /// As it stands in results.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::Cancelled => 1,
            Self::Unknown => 2,
            Self::InvalidArgument => 3,
            Self::DeadlineExceeded => 4,
            Self::NotFound => 5,
            Self::AlreadyExists => 6,
            Self::PermissionDenied => 7,
            Self::ResourceExhausted => 8,
            Self::FailedPrecondition => 9,
            Self::Aborted => 10,
            Self::OutOfRange => 11,
            Self::Unimplemented => 12,
            Self::Internal => 13,
            Self::Unavailable => 14,
            Self::DataLoss => 15,
            Self::Unauthenticated => 16,
        }
    }
}

/// When `Ready` turns true.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadinessPolicy {
    /// With the results.
    #[default]
    WhenComplete,
    /// As soon as Gemini has the batch.
    WhenSubmitted,
}

/// A batch that exists at Gemini.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ImportFrom {
    /// Resource name of the batch, `batches/ID`.
    #[schemars(length(min = 9, max = 72))]
    #[x_kube(
        validation = Rule::new("self.matches('^batches/[A-Za-z0-9_-]{1,64}$')")
            .message("must be the resource name of a Gemini batch, like batches/abc123def456")
    )]
    pub batch_name: String,
}

/// Where the API key is.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Credentials {
    /// A Secret in the job's namespace that holds the Gemini API key. It is read each time it is needed,
    /// so a rotated key is picked up; it is never copied and never logged.
    pub secret_ref: SecretKeyRef,
}

/// One key of a Secret in the job's namespace.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(
        validation = Rule::new(OBJECT_NAME).message(
            "must be the name of a Secret: lower case letters, digits, '-' and '.', \
             with a letter or digit at both ends and on both sides of each '.'"
        )
    )]
    pub name: String,
    /// The key inside the Secret that holds the API key.
    #[serde(default = "default_secret_key")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn default_secret_key() -> String {
    "apiKey".to_owned()
}

/// The requests of a job.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new(
        "(has(self.requests) ? 1 : 0) + (has(self.configMap) ? 1 : 0) + (has(self.objectStore) ? 1 : 0) + \
         (has(self.geminiFile) ? 1 : 0) == 1"
    )
    .message("spec.input needs exactly one of requests, configMap, objectStore and geminiFile")
)]
pub struct Input {
    /// The requests themselves, for small jobs. Keys must be unique: they join each result with its
    /// request. `kubectl apply` writes a copy of the whole object into an annotation of at most 256 KiB:
    /// use `kubectl apply --server-side` or `configMap` for more than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1000), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["key"]
    ))]
    pub requests: Option<Vec<InputRequest>>,

    /// A key of a ConfigMap in the job's namespace that holds JSON Lines: on each line an object with a
    /// unique `key` and a `request` (a `GenerateContentRequest`, or an `EmbedContentRequest` if `method` says so).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMapKeyRef>,

    /// One or several objects of an object store that hold JSON Lines, as a ConfigMap would: for inputs of any size up to
    /// Gemini's limit of 2 GB. They are read as a stream, and what was checked is what is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_store: Option<ObjectStoreInput>,

    /// A JSON Lines file that somebody else uploaded to Gemini with the same API key. Its keys are not
    /// known to the operator, so its results are counted and stored as they come, not joined, and the
    /// file is never deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gemini_file: Option<GeminiFileRef>,
}

/// One request: a key, and either the prompt or the whole request.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["prompt"]}, {"required": ["request"]}]))]
pub struct InputRequest {
    /// Identifies the request and its result within the job.
    #[schemars(length(min = 1, max = 256))]
    pub key: String,
    /// The short form: one user turn with this text; with `method: EmbedContent` the text to embed. Exactly one of
    /// `prompt` and `request`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 262_144))]
    pub prompt: Option<String>,
    /// The long form: a whole `GenerateContentRequest` (`contents`, `systemInstruction`, `generationConfig`,
    /// `tools`, `safetySettings` …), passed on as it is; with `method: EmbedContent` a whole `EmbedContentRequest`
    /// (`content`, `taskType`, `title`, `outputDimensionality`). Exactly one of `prompt` and `request`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "anything")]
    pub request: Option<serde_json::Value>,
}

/// No `type`: with `type: object` beside preserve-unknown-fields the API server's CEL compares such objects
/// by the number of their members only, and an edited request would pass the immutability rule.
fn anything(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"x-kubernetes-preserve-unknown-fields": true})
}

/// One key of a ConfigMap in the job's namespace.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConfigMapKeyRef {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(
        validation = Rule::new(OBJECT_NAME).message(
            "must be the name of a ConfigMap: lower case letters, digits, '-' and '.', \
             with a letter or digit at both ends and on both sides of each '.'"
        )
    )]
    pub name: String,
    /// The key inside the ConfigMap's `data` or `binaryData`.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,

    /// Only a part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<Box<InputRange>>,
}

/// A part of an input: whole lines, and what they have to be. The operator writes it into the jobs of a sharded one.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InputRange {
    /// Where its first line begins, in bytes; over all objects of a `prefix`, in the order of their names.
    #[schemars(range(min = 0))]
    pub offset: i64,
    /// How many bytes there are to the end of its last line.
    #[schemars(range(min = 1))]
    pub length: i64,
    /// How many requests it holds.
    #[schemars(range(min = 1))]
    pub requests: i64,
    /// SHA-256 in hexadecimal of its lines as they are sent: without blank lines, and without spaces around them. Nothing
    /// else is ever sent.
    #[x_kube(validation = Rule::new("self.matches('^[0-9a-f]{64}$')").message("must be a SHA-256 in lower case hexadecimal"))]
    #[schemars(length(max = 64))]
    pub sha256: String,
}

/// Objects of an object store.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("has(self.uri) != has(self.prefix)")
        .message("spec.input.objectStore needs exactly one of uri (one object) and prefix (all objects below it)"),
    validation = Rule::new("!has(self.endpoint) || has(self.credentialsRef)").message(
        "endpoint needs credentialsRef: the operator's own identity is shown to the clouds' own endpoints only"
    ),
    validation = Rule::new(
        "!has(self.region) || (has(self.uri) && self.uri.startsWith('s3://')) || \
         (has(self.prefix) && self.prefix.startsWith('s3://'))"
    )
    .message("region is for s3:// only: leave it out")
)]
pub struct ObjectStoreInput {
    /// One object: `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `az://ACCOUNT/CONTAINER/KEY`, or `file://NAME/PATH` in a
    /// directory that an administrator mapped to NAME. Nothing in it is decoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 1280))]
    #[x_kube(
        validation = Rule::new("self.matches('^(s3|gs|az|file)://[^/]+/.+$') && !self.endsWith('/')").message(
            "must be like s3://BUCKET/KEY, gs://BUCKET/KEY, az://ACCOUNT/CONTAINER/KEY or file://NAME/PATH"
        )
    )]
    pub uri: Option<String>,

    /// Several objects: all whose names begin with it, in the order of their names. Like `uri`, but it ends with a `/`.
    /// Empty objects are left out. At most 10,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 7, max = 1280))]
    #[x_kube(
        validation = Rule::new("self.matches('^(s3|gs|az|file)://[^/]+/.*$') && self.endsWith('/')").message(
            "must be like s3://BUCKET/PATH/, gs://BUCKET/PATH/, az://ACCOUNT/CONTAINER/PATH/ or file://NAME/PATH/, \
             with a / at its end"
        )
    )]
    pub prefix: Option<String>,

    /// A Secret in the job's namespace with credentials for the store. For `s3://` the keys `accessKeyId`,
    /// `secretAccessKey` and perhaps `sessionToken`; for `gs://` `serviceAccountKey`; for `az://` `accountKey`, `sasToken`,
    /// or `tenantId`, `clientId` and `clientSecret`. Without it the operator's own identity is used, in namespaces where
    /// an administrator allows that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_ref: Option<LocalRef>,

    /// URL of another store that speaks the same protocol, for example <https://minio.example.com>. An administrator has
    /// to allow it. Needs `credentialsRef`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 512))]
    pub endpoint: Option<String>,

    /// Region of the bucket, for `s3://`. Default: `us-east-1`, or what the operator's own identity is set up with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub region: Option<String>,

    /// Only a part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<Box<InputRange>>,
}

/// A file that exists at Gemini.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GeminiFileRef {
    /// Resource name of the file, `files/ID`.
    #[schemars(length(min = 7, max = 46))]
    #[x_kube(
        validation = Rule::new("self.matches('^files/[a-z0-9]([a-z0-9-]*[a-z0-9])?$')")
            .message("must be the resource name of a Gemini file, like files/abc123def456")
    )]
    pub name: String,
}

/// Where results go.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("has(self.configMap) != has(self.objectStore)").message(
        "spec.output needs exactly one of configMap and objectStore; leave spec.output out to keep the results with Gemini"
    ),
    validation = Rule::new("!has(self.objectStore) || !has(self.retention) || self.retention == 'Retain'").message(
        "spec.output.retention Delete is for configMap only: objects outlive their job. Let a lifecycle rule of the bucket \
         delete them"
    )
)]
pub struct Output {
    /// A ConfigMap in the job's namespace that the operator creates for the results, for jobs whose
    /// results stay under 1 MiB: `results.jsonl` in input order (each line has `key` and `response` or
    /// `error`) and `manifest.json` (counts, token usage, names). It outlives the job. A ConfigMap of
    /// that name which the operator did not make for this job is never written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<LocalRef>,

    /// A place in an object store, for results of any size. `manifest.json` appears there last, and names the objects
    /// that hold the results: `results.jsonl` in input order and, if there are such lines, `errors.jsonl`,
    /// `missing.jsonl` and `unmatched.jsonl`. A place that holds another job's results is never written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_store: Option<ObjectStoreOutput>,

    /// What becomes of the results when the job is deleted: `Retain` keeps them, `Delete` has Kubernetes delete
    /// them with the job, for `configMap` only. May be changed until the results are stored. Default: `Retain`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub retention: Retention,
}

/// A place for results in an object store.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("!has(self.endpoint) || has(self.credentialsRef)").message(
        "endpoint needs credentialsRef: the operator's own identity is shown to the clouds' own endpoints only"
    ),
    validation = Rule::new("!has(self.region) || self.uri.startsWith('s3://')")
        .message("region is for s3:// only: leave it out")
)]
pub struct ObjectStoreOutput {
    /// Below which everything is written: `s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `az://ACCOUNT/CONTAINER/PATH`, or
    /// `file://NAME/PATH` in a directory that an administrator mapped to NAME for results. One for each job. A / at
    /// its end makes no difference. Nothing in it is decoded.
    #[schemars(length(min = 6, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^(s3|gs|az|file)://[^/]+(/.*)?$')").message(
            "must be like s3://BUCKET/PATH, gs://BUCKET/PATH, az://ACCOUNT/CONTAINER/PATH or file://NAME/PATH"
        )
    )]
    pub uri: String,

    /// A Secret in the job's namespace with credentials for the store, with the same keys as for
    /// `spec.input.objectStore.credentialsRef`. They have to be allowed to read and write objects there. Without it the
    /// operator's own identity is used, in namespaces where an administrator allows that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_ref: Option<LocalRef>,

    /// URL of another store that speaks the same protocol, for example <https://minio.example.com>. An administrator has
    /// to allow it. Needs `credentialsRef`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 512))]
    pub endpoint: Option<String>,

    /// Region of the bucket, for `s3://`. Default: `us-east-1`, or what the operator's own identity is set up with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub region: Option<String>,
}

/// What becomes of the results when the job is deleted.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retention {
    /// They are kept: they were paid for.
    #[default]
    Retain,
    /// They go with the job.
    Delete,
}

/// An object in the job's namespace.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LocalRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(
        validation = Rule::new(OBJECT_NAME).message(
            "must be the name of an object: lower case letters, digits, '-' and '.', \
             with a letter or digit at both ends and on both sides of each '.'"
        )
    )]
    pub name: String,
}
