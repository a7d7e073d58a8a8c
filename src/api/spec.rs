//! What users write. Every doc comment here is what `kubectl explain` prints.

use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::status::GeminiBatchJobStatus;

/// What Kubernetes lets objects be called (RFC 1123 subdomain).
const OBJECT_NAME: &str =
    r"self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')";

/// One batch of requests to a Gemini model: what to ask, who pays, and where the answers go.
///
/// - `model`: the model that answers all requests
/// - `credentials`: the Secret with the API key that pays
/// - `input`: the requests, here, in a ConfigMap or in a file at Gemini
/// - `output`: where the results go; without it they stay with Gemini
///
/// `model`, `credentials` and `input` can't be changed once the submission has begun, `output` once the job
/// has finished.
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
    validation = Rule::new(
        "!has(oldSelf.status) || !has(oldSelf.status.attempts) || size(oldSelf.status.attempts) == 0 || \
         (self.spec.model == oldSelf.spec.model && self.spec.credentials == oldSelf.spec.credentials && \
         self.spec.input == oldSelf.spec.input)"
    )
    .message(
        "spec.model, spec.credentials and spec.input of a job can't be changed once its submission has begun; \
         create a new GeminiBatchJob under another name instead"
    )
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
        "!has(self.output) || !has(self.output.configMap) || !has(self.input.configMap) || \
         self.output.configMap.name != self.input.configMap.name"
    )
    .message("spec.output.configMap must not be the ConfigMap that spec.input.configMap reads from")
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

    /// The API key that pays for the batch. Can't be changed once the submission has begun (the Secret's
    /// content may be).
    pub credentials: Credentials,

    /// The requests: exactly one of `requests`, `configMap` and `geminiFile`. Can't be changed once the
    /// submission has begun.
    pub input: Input,

    /// Where the results go. Without it they stay with Gemini: `status.output` names the file and the time
    /// until which it is certain to exist. May be changed until the job has finished, which is how a job
    /// goes on whose results did not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,
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
        "(has(self.requests) ? 1 : 0) + (has(self.configMap) ? 1 : 0) + (has(self.geminiFile) ? 1 : 0) == 1"
    )
    .message("spec.input needs exactly one of requests, configMap and geminiFile")
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
    /// unique `key` and a `request` (a `GenerateContentRequest`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMapKeyRef>,

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
    /// The short form: one user turn with this text. Exactly one of `prompt` and `request`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 262_144))]
    pub prompt: Option<String>,
    /// The long form: a whole `GenerateContentRequest` (`contents`, `systemInstruction`, `generationConfig`,
    /// `tools`, `safetySettings` …), passed on as it is. Exactly one of `prompt` and `request`.
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
    validation = Rule::new("has(self.configMap)")
        .message("spec.output needs a destination: set configMap, or leave spec.output out to keep the results with Gemini")
)]
pub struct Output {
    /// A ConfigMap in the job's namespace that the operator creates for the results, for jobs whose
    /// results stay under 1 MiB: `results.jsonl` in input order (each line has `key` and `response` or
    /// `error`) and `manifest.json` (counts, token usage, names). It outlives the job. A ConfigMap of
    /// that name which the operator did not make for this job is never written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<LocalRef>,
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
