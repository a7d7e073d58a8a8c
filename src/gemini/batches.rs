//! Batches: create, get, list, cancel, delete; and the Operation that Google shows of one.

use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};
use url::Url;

use super::{ApiKey, BatchName, Client, Error, FileName, ModelName};

/// What is asked of the model: the calls that create batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `batchGenerateContent`.
    GenerateContent,
    /// `asyncBatchEmbedContent`. All else about such a batch is the same, but for the shape of its lines.
    EmbedContent,
}

impl Call {
    fn verb(self) -> &'static str {
        match self {
            Self::GenerateContent => "batchGenerateContent",
            Self::EmbedContent => "asyncBatchEmbedContent",
        }
    }
}

/// A batch to be created.
#[derive(Clone, Debug)]
pub struct NewBatch<'a> {
    /// What is asked of the model.
    pub call: Call,
    /// What it is called; not unique for Google, unique by our making.
    pub display_name: &'a str,
    /// The uploaded requests.
    pub input_file: &'a FileName,
    /// Who is told of its end. They replace the project's webhooks for this batch.
    pub webhook_uris: &'a [Url],
    /// Higher goes first; Google's default is 0.
    pub priority: Option<i64>,
}

/// A batch as Google shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `batches/ID`.
    pub name: BatchName,
    /// What its creator called it.
    pub display_name: String,
    /// Its state.
    pub state: BatchState,
    /// Whether Google says that it is over.
    pub done: bool,
    /// When it was created.
    pub create_time: Option<Timestamp>,
    /// When it ended.
    pub end_time: Option<Timestamp>,
    /// The input file.
    pub input_file: Option<String>,
    /// The result file, if Google names one.
    pub output_file: Option<FileName>,
    /// Results that came with the batch instead of in a file, as lines of a result file.
    pub inlined: Option<String>,
    /// Requests by outcome. In a list they may be stale.
    pub stats: Option<Stats>,
    /// Why it did not succeed.
    pub error: Option<RemoteStatus>,
}

/// States of a batch, without Google's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchState {
    /// Waits.
    Pending,
    /// Runs.
    Running,
    /// Ended with results, of whatever kind.
    Succeeded,
    /// Ended without.
    Failed,
    /// Ended by a cancellation.
    Cancelled,
    /// Ended by its time limit.
    Expired,
    /// None of these: not an end, unless `done`.
    Unknown,
}

impl BatchState {
    /// The word, as Google spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Running => "RUNNING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::Expired => "EXPIRED",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// The end that an event of a webhook speaks of, in the spelling of `status.callback.type`.
    #[must_use]
    pub fn of_event(event: &str) -> Option<Self> {
        match event {
            "batch.succeeded" => Some(Self::Succeeded),
            "batch.failed" => Some(Self::Failed),
            "batch.expired" => Some(Self::Expired),
            "batch.cancelled" => Some(Self::Cancelled),
            _ => None,
        }
    }

    /// `BATCH_STATE_X` on the wire, `JOB_STATE_X` in some documents: the suffix decides.
    fn parse(text: &str) -> Self {
        let all =
            [Self::Pending, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled, Self::Expired];
        all.into_iter()
            .find(|s| text.strip_suffix(s.as_str()).is_some_and(|p| p.is_empty() || p.ends_with("_STATE_")))
            .unwrap_or(Self::Unknown)
    }
}

/// Requests by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// All.
    pub total: i64,
    /// With a response.
    pub succeeded: i64,
    /// With an error.
    pub failed: i64,
    /// Without either.
    pub pending: i64,
}

/// `google.rpc.Status`, without its message, which may quote requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteStatus {
    /// `google.rpc.Code`.
    pub code: i64,
}

/// A page of a listing.
#[derive(Clone, Debug)]
pub struct Page {
    /// Newest first.
    pub batches: Vec<Batch>,
    /// There is more, even after an empty page.
    pub next_page_token: Option<String>,
}

impl Batch {
    /// Whether it is over.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.done
            || matches!(
                self.state,
                BatchState::Succeeded | BatchState::Failed | BatchState::Cancelled | BatchState::Expired
            )
    }

    /// The result file, by Google's word or by the rule that its id is `batch-` and the id of the batch.
    #[must_use]
    pub fn output_file_or_derived(&self) -> FileName {
        self.output_file.clone().unwrap_or_else(|| self.name.derived_output_file())
    }

    /// Reads an Operation. `None` if it does not even have a name.
    pub(super) fn parse(operation: &Value) -> Option<Self> {
        let metadata = &operation["metadata"];
        let name = [&operation["name"], &metadata["name"]]
            .into_iter()
            .find_map(|n| BatchName::parse(n.as_str()?).ok())?;
        let response = &operation["response"];
        let output = &metadata["output"];
        let responses_file = [response, output].into_iter().find_map(|o| o["responsesFile"].as_str());
        let time = |field: &str| metadata[field].as_str().and_then(|t| t.parse().ok());
        Some(Self {
            name,
            display_name: metadata["displayName"].as_str().unwrap_or_default().to_owned(),
            state: metadata["state"].as_str().map_or(BatchState::Unknown, BatchState::parse),
            done: operation["done"] == Value::Bool(true),
            create_time: time("createTime"),
            end_time: time("endTime"),
            input_file: metadata["inputConfig"]["fileName"].as_str().map(ToOwned::to_owned),
            output_file: responses_file.and_then(|f| FileName::parse(f).ok()),
            inlined: [response, output].into_iter().find_map(inlined_lines),
            stats: stats(&metadata["batchStats"]),
            error: operation["error"].as_object().map(|e| RemoteStatus {
                code: e.get("code").and_then(int64).unwrap_or(2), // google.rpc.Code UNKNOWN
            }),
        })
    }
}

/// Inline results as the lines of a result file would be.
fn inlined_lines(output: &Value) -> Option<String> {
    // The outer name differs, the inner one does not.
    let list = ["inlinedResponses", "inlinedEmbedContentResponses"]
        .into_iter()
        .find_map(|field| output.get(field)?.get("inlinedResponses")?.as_array())?;
    Some(list.iter().fold(String::new(), |mut lines, item| {
        let mut line = item.clone();
        if let Some(fields) = line.as_object_mut() {
            let key = fields.remove("metadata").and_then(|m| m.get("key").cloned());
            if let Some(key) = key {
                fields.insert("key".to_owned(), key);
            }
        }
        lines.push_str(&line.to_string());
        lines.push('\n');
        lines
    }))
}

fn stats(stats: &Value) -> Option<Stats> {
    stats.as_object()?; // zero values are left out
    let count = |field: &str| int64(&stats[field]).unwrap_or(0).max(0);
    Some(Stats {
        total: count("requestCount"),
        succeeded: count("successfulRequestCount"),
        failed: count("failedRequestCount"),
        pending: count("pendingRequestCount"),
    })
}

/// int64 are strings on the wire; a number is understood too.
pub(super) fn int64(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

impl Client {
    /// Asks for a batch. Sent exactly once: no retry, no redirect, a connection of its own.
    ///
    /// An error with [`Error::is_refusal`] means that nothing was created. Any other error is an unknown
    /// outcome: the batch may exist, and cost money.
    pub async fn create_batch(
        &self,
        key: &ApiKey,
        model: &ModelName,
        new: &NewBatch<'_>,
    ) -> Result<Batch, Error> {
        let mut batch = json!({
            "displayName": new.display_name,
            "inputConfig": {"fileName": new.input_file.to_string()},
        });
        if let Some(priority) = new.priority {
            batch["priority"] = json!(priority.to_string());
        }
        if !new.webhook_uris.is_empty() {
            batch["webhookConfig"] =
                json!({"uris": new.webhook_uris.iter().map(Url::as_str).collect::<Vec<_>>()});
        }
        let url = self.versioned(&format!("{model}:{}", new.call.verb()), &[]);
        let answer = self.json_once(key, url, &json!({"batch": batch})).await?;
        Batch::parse(&answer).ok_or_else(|| Error::local("an answer with status 200 that names no batch"))
    }

    /// The batch as it is now.
    pub async fn get_batch(&self, key: &ApiKey, name: &BatchName) -> Result<Batch, Error> {
        let answer = self.json(key, Method::GET, self.versioned(&name.to_string(), &[]), None).await?;
        Batch::parse(&answer).ok_or_else(|| Error::local("an answer with status 200 that names no batch"))
    }

    /// One page of batches, newest first. `page_size` is at most 100.
    pub async fn list_batches(
        &self,
        key: &ApiKey,
        page_size: u32,
        page_token: Option<&str>,
    ) -> Result<Page, Error> {
        let size = page_size.to_string();
        let mut query = vec![("pageSize", size.as_str())];
        query.extend(page_token.map(|t| ("pageToken", t)));
        let answer = self.json(key, Method::GET, self.versioned("batches", &query), None).await?;
        if !answer.is_object() {
            return Err(Error::local("a listing with status 200 that is not an object"));
        }
        // One element that can't be read must not hide the others.
        let operations = answer["operations"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(Page {
            batches: operations.iter().filter_map(Batch::parse).collect(),
            next_page_token: answer["nextPageToken"]
                .as_str()
                .filter(|t| !t.is_empty())
                .map(ToOwned::to_owned),
        })
    }

    /// Asks for a cancellation. It is best effort: the batch may still run, or even succeed.
    pub async fn cancel_batch(&self, key: &ApiKey, name: &BatchName) -> Result<(), Error> {
        let url = self.versioned(&format!("{name}:cancel"), &[]);
        self.json(key, Method::POST, url, Some(&json!({}))).await.map(|_| ())
    }

    /// Removes the batch from Google's list. Whether that stops it is contested: cancel first.
    pub async fn delete_batch(&self, key: &ApiKey, name: &BatchName) -> Result<(), Error> {
        self.json(key, Method::DELETE, self.versioned(&name.to_string(), &[]), None).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_running_operation_is_read() {
        let batch = Batch::parse(&json!({"name": "batches/abc", "metadata": {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": "models/gemini-2.5-flash", "displayName": "op", "inputConfig": {"fileName": "files/in"},
            "createTime": "2026-01-06T11:09:11.943530657Z",
            "batchStats": {"requestCount": "2", "pendingRequestCount": "2"},
            "state": "BATCH_STATE_PENDING", "name": "batches/abc"}}))
        .unwrap();
        assert_eq!((batch.state, batch.is_terminal()), (BatchState::Pending, false));
        assert_eq!(batch.stats, Some(Stats { total: 2, pending: 2, ..Stats::default() }));
        assert_eq!(batch.input_file.as_deref(), Some("files/in"));
        assert_eq!(batch.output_file_or_derived().to_string(), "files/batch-abc");
        assert!(batch.create_time.is_some());
    }

    #[test]
    fn ends_are_told_apart() {
        for (state, expected) in [
            ("BATCH_STATE_SUCCEEDED", BatchState::Succeeded),
            ("JOB_STATE_FAILED", BatchState::Failed),
            ("CANCELLED", BatchState::Cancelled),
            ("BATCH_STATE_EXPIRED", BatchState::Expired),
        ] {
            let batch = Batch::parse(&json!({"name": "batches/a", "metadata": {"state": state}})).unwrap();
            assert_eq!((batch.state, batch.is_terminal()), (expected, true), "{state}");
        }
        let odd = json!({"name": "batches/a", "metadata": {"state": "BATCH_STATE_NOT_SUCCEEDED"}});
        assert!(!Batch::parse(&odd).unwrap().is_terminal());
        let odd =
            json!({"name": "batches/a", "done": true, "metadata": {"state": "NEW"}, "error": {"code": 4}});
        let batch = Batch::parse(&odd).unwrap();
        assert!(batch.is_terminal() && batch.error == Some(RemoteStatus { code: 4 }));
    }

    #[test]
    fn inline_results_become_lines() {
        let item = json!({"metadata": {"key": "k1"}, "response": {"candidates": []}});
        let batch = Batch::parse(&json!({"name": "batches/a", "done": true, "metadata": {},
            "response": {"inlinedResponses": {"inlinedResponses": [item]}}}))
        .unwrap();
        let line: Value = serde_json::from_str(batch.inlined.unwrap().trim()).unwrap();
        assert_eq!(line, json!({"key": "k1", "response": {"candidates": []}}));
    }

    /// As the official SDK reads it, and a C# client's capture has it.
    #[test]
    fn a_batch_of_embeddings_has_its_results_under_a_name_of_its_own() {
        let item = json!({"metadata": {"key": "k1"}, "response": {"embedding": {"values": [0.5]}}});
        let kind = "type.googleapis.com/google.ai.generativelanguage.v1main.EmbedContentBatch";
        let batch = Batch::parse(&json!({"name": "batches/a", "done": true,
            "metadata": {"@type": kind, "state": "BATCH_STATE_SUCCEEDED", "endTime": "2026-01-06T11:09:11Z"},
            "response": {"@type": kind, "inlinedEmbedContentResponses": {"inlinedResponses": [item]}}}))
        .unwrap();
        let line: Value = serde_json::from_str(batch.inlined.unwrap().trim()).unwrap();
        assert_eq!(line, json!({"key": "k1", "response": {"embedding": {"values": [0.5]}}}));
        assert_eq!((batch.state, batch.output_file), (BatchState::Succeeded, None));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
            Just(Value::from("batches/x")),
        ];
        let names = prop::sample::select(vec![
            "name",
            "metadata",
            "state",
            "done",
            "error",
            "code",
            "response",
            "output",
            "responsesFile",
            "inlinedResponses",
            "batchStats",
            "requestCount",
            "createTime",
            "key",
        ]);
        leaf.prop_recursive(4, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(names.clone().prop_map(str::to_owned), inner, 0..6)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_operation_is_survived(value in any_json()) {
            if let Some(batch) = Batch::parse(&value) {
                prop_assert!(batch.name.to_string().starts_with("batches/"));
            }
        }
    }
}
