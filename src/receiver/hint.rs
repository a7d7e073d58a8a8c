//! The durable acknowledgement: what is written into a job's status, and how.
//!
//! The write is a JSON Patch that first tests `metadata.uid`: a job deleted and made anew under the same name
//! must not get the old one's hint. The response is asked for without spec and status: the receiver reads no job.

use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use kube::Client;
use kube::core::Status;
use kube::core::response::reason::NOT_FOUND;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::callback::event::EventType;

/// The field manager of `status.callback`.
pub const FIELD_MANAGER: &str = "gemini-batch-receiver";

const GROUP: &str = "geminibatch.dev";
const VERSION: &str = "v1alpha1";
const PLURAL: &str = "geminibatchjobs";

/// What a believed delivery leaves behind in `status.callback`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Namespace of the job.
    pub namespace: String,
    /// Name of the job.
    pub name: String,
    /// `metadata.uid` of the job that the token was made for.
    pub uid: String,
    /// The attempt that the token was made for.
    pub attempt: u32,
    /// The same for every delivery of one event: at most 128 of `A-Za-z0-9_-`.
    pub webhook_id: String,
    /// What happened, as the sender says.
    pub kind: EventType,
    /// The batch, without `batches/`.
    pub batch_id: Option<String>,
    /// When it happened, as the sender says.
    pub event_time: Option<Timestamp>,
    /// When it came in.
    pub received: Timestamp,
}

impl Hint {
    /// The value of `status.callback`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut callback = json!({
            "webhookId": self.webhook_id,
            "type": self.kind.as_str(),
            "attempt": self.attempt,
            "receivedTime": micro_time(self.received),
        });
        if let Some(id) = &self.batch_id {
            callback["batchId"] = json!(id);
        }
        if let Some(time) = self.event_time {
            callback["eventTime"] = json!(micro_time(time));
        }
        callback
    }
}

/// RFC 3339 with microseconds, as Kubernetes writes its `MicroTime`.
fn micro_time(time: Timestamp) -> String {
    format!("{time:.6}")
}

/// What became of a write that was answered for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The API server has it.
    Stored,
    /// The job is gone, or another one has its name: there is nobody to tell.
    Gone,
}

/// Why a hint is not stored yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Somebody else wrote at the same moment: try again at once.
    #[error("the API server reports a conflict")]
    Conflict,
    /// The API server is away, slow, or refuses. The sender must come again.
    #[error("the hint could not be stored: {0}")]
    Unavailable(&'static str),
}

/// Where hints go. One implementation for the cluster, one for tests.
pub trait HintSink: Send + Sync {
    /// Stores a hint. Returns only when the outcome is certain, or with the reason why it is not.
    fn write<'a>(&'a self, hint: &'a Hint) -> BoxFuture<'a, Result<Written, WriteError>>;
}

/// A client for hints: no hidden retries (kube's default is up to 15, over minutes) and short timeouts, so that
/// the sender gets its answer within its patience.
pub fn kube_client(mut config: kube::Config) -> Result<Client, kube::Error> {
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(2));
    config.read_timeout = Some(Duration::from_secs(3));
    config.write_timeout = Some(Duration::from_secs(3));
    // else the time a pooled connection sat idle counts against the read timeout
    config.reset_reader_on_write = true;
    Client::try_from(config)
}

/// Patches `geminibatchjobs/status`, and can do nothing else.
#[derive(Clone)]
pub struct KubeHintSink {
    client: Client,
}

impl KubeHintSink {
    /// Expects a client made by [`kube_client`].
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    async fn patch(&self, hint: &Hint, operations: &Value) -> Result<(), kube::Error> {
        let request = http::Request::patch(format!(
            "/apis/{GROUP}/{VERSION}/namespaces/{}/{PLURAL}/{}/status?fieldManager={FIELD_MANAGER}",
            hint.namespace, hint.name
        ))
        .header(http::header::CONTENT_TYPE, "application/json-patch+json")
        .header(
            http::header::ACCEPT,
            "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json",
        )
        .body(serde_json::to_vec(operations).map_err(kube::Error::SerdeError)?)
        .map_err(kube::Error::HttpError)?;
        self.client.request::<IgnoredAny>(request).await.map(|_| ())
    }

    async fn store(&self, hint: &Hint) -> Result<Written, WriteError> {
        let test = json!({"op": "test", "path": "/metadata/uid", "value": hint.uid});
        let add = json!({"op": "add", "path": "/status/callback", "value": hint.to_json()});
        match self.patch(hint, &json!([test, add])).await {
            Ok(()) => return Ok(Written::Stored),
            Err(error) => match judge(&error, &hint.name) {
                Judgement::Gone => return Ok(Written::Gone),
                Judgement::Failed(why) => return Err(why),
                Judgement::Unprocessable => {}
            },
        }
        // The API server does not say which operation of a JSON Patch failed, nor whether it was the patch or the
        // schema. So the test is made alone. It changes nothing, and so writes nothing.
        match self.patch(hint, &json!([test])).await {
            // It is our job, and yet the hint was refused: by the schema, a policy, or because the job has no
            // status. A job without status was never submitted (the intent is recorded there first), so no
            // genuine callback for it exists. Nothing may be acknowledged that is not stored.
            Ok(()) => Err(WriteError::Unavailable("rejected")),
            Err(error) => match judge(&error, &hint.name) {
                Judgement::Gone | Judgement::Unprocessable => Ok(Written::Gone),
                Judgement::Failed(why) => Err(why),
            },
        }
    }
}

impl HintSink for KubeHintSink {
    fn write<'a>(&'a self, hint: &'a Hint) -> BoxFuture<'a, Result<Written, WriteError>> {
        Box::pin(self.store(hint))
    }
}

enum Judgement {
    Gone,
    Unprocessable,
    Failed(WriteError),
}

fn judge(error: &kube::Error, name: &str) -> Judgement {
    let kube::Error::Api(status) = error else {
        return Judgement::Failed(WriteError::Unavailable("unreachable"));
    };
    match status.code {
        404 if is_about(status, name) => Judgement::Gone,
        409 => Judgement::Failed(WriteError::Conflict),
        422 => Judgement::Unprocessable,
        401 | 403 => Judgement::Failed(WriteError::Unavailable("forbidden")),
        404 => Judgement::Failed(WriteError::Unavailable("no_such_resource")),
        _ => Judgement::Failed(WriteError::Unavailable("server_error")),
    }
}

/// Whether a 404 is about this very object. One about the resource type (CRD not there yet, another server
/// answering) says nothing about the job.
fn is_about(status: &Status, name: &str) -> bool {
    status.reason == NOT_FOUND
        && status.details.as_ref().is_some_and(|d| d.name == name && d.group == GROUP && d.kind == PLURAL)
}
