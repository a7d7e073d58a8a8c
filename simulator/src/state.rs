//! Everything the simulator remembers, and the controls over it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::clock::Pace;
use crate::error::ApiError;
use crate::registered::WebhookRec;
use crate::webhooks::{Held, Signing};

/// What the contract leaves open, and what can be made to go wrong for all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(clippy::struct_excessive_bools)] // each is a question that the contract leaves open
pub struct Switches {
    /// A chosen file name is honoured.
    pub honour_file_name: bool,
    /// Only the key that created a batch sees it; otherwise every key of its project.
    pub creator_only: bool,
    /// Batch 101 is accepted, and then none starts any more; otherwise it is refused.
    pub stall_over_limit: bool,
    /// `data.id` of an event has the prefix `batches/`.
    pub event_id_with_prefix: bool,
    /// A cancellation is told by an event.
    pub cancel_event: bool,
    /// Batches of embeddings tell their end.
    pub embed_events: bool,
    /// Batches of embeddings take no `webhookConfig`: it is a field that they do not have.
    pub embed_webhook_refused: bool,
    /// Deliveries are repeated with the timestamp and signature of the first.
    pub frozen_timestamps: bool,
    /// Events are lost.
    pub lose_events: bool,
    /// Each delivery comes on a connection of its own; otherwise one is used as long as it lasts.
    pub close_connections: bool,
    /// What goes wrong with all deliveries: `duplicate`, `late=30`, …; the list is in `webhooks`.
    pub hooks: Vec<String>,
    /// Cancelling a batch that has ended is refused.
    pub cancel_ended_refused: bool,
    /// Everything that takes an API key is refused: the project is in a region that the API does not serve.
    pub location_refused: bool,
    /// Result files can't be deleted.
    pub delete_output_refused: bool,
    /// A running batch that is cancelled succeeds, its unfinished requests with an error.
    pub cancel_race: bool,
    /// A create fails whose file was deleted before; otherwise it works on what was in it.
    pub create_needs_file: bool,
    /// A deleted batch works on, unseen, and tells its end.
    pub delete_keeps_working: bool,
    /// A batch that was cancelled or deleted still counts against both quotas, for good.
    pub quota_held: bool,
    /// Tokens of one project's active batches of one model, over which a create is refused.
    pub enqueued_token_limit: Option<usize>,
    /// `webhookConfig.userMetadata` is refused; otherwise events carry it at their top.
    pub user_metadata_refused: bool,
    /// An inline request whose `model` is not the batch's is refused; otherwise its model is ignored.
    pub other_model_refused: bool,
    /// A GET of an inline batch whose answers have more bytes runs into a timeout. Listings leave them out.
    pub inline_get_limit: Option<usize>,
    /// Listings show the counts of the beginning, whatever the state.
    pub stale_stats_in_list: bool,
    /// Before each page of a listing comes one with nothing but a token.
    pub empty_pages: bool,
    /// Pages of a listing are this long at most.
    pub page_limit: usize,
    /// Batches appear in listings only after so many simulated seconds.
    pub list_lag_seconds: f64,
    /// Results can be read only so many simulated seconds after the end.
    pub output_lag_seconds: f64,
    /// Results are gone so many hours after the end, on the clock of the wire.
    pub output_life_hours: f64,
    /// A part of a result file can be asked for; otherwise all of it comes each time.
    pub download_ranges: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Self {
            honour_file_name: true,
            creator_only: false,
            stall_over_limit: false,
            event_id_with_prefix: false,
            cancel_event: false,
            embed_events: true,
            embed_webhook_refused: false,
            frozen_timestamps: false,
            lose_events: false,
            close_connections: false,
            hooks: Vec::new(),
            cancel_ended_refused: false,
            location_refused: false,
            delete_output_refused: true,
            cancel_race: false,
            create_needs_file: true,
            delete_keeps_working: false,
            quota_held: false,
            enqueued_token_limit: None,
            user_metadata_refused: true,
            other_model_refused: false,
            inline_get_limit: None,
            stale_stats_in_list: false,
            empty_pages: false,
            page_limit: 100,
            list_lag_seconds: 0.0,
            output_lag_seconds: 0.0,
            output_life_hours: 6.0 * 7.0 * 24.0,
            download_ranges: false,
        }
    }
}

impl Switches {
    /// Changes those that are named, each to the JSON value that is given.
    pub fn change(&mut self, changes: serde_json::Map<String, Value>) -> Result<(), String> {
        let mut all = serde_json::to_value(&*self).map_err(|e| e.to_string())?;
        for (name, value) in changes {
            *all.get_mut(&name).ok_or_else(|| format!("no switch {name}"))? = value;
        }
        *self = serde_json::from_value(all).map_err(|e| e.to_string())?;
        Ok(())
    }
}

/// Operations, as the log names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names say it
pub enum Op {
    UploadStart,
    UploadChunk,
    UploadQuery,
    UploadCancel,
    FileGet,
    FileList,
    FileDelete,
    Download,
    BatchCreate,
    BatchGet,
    BatchList,
    BatchCancel,
    BatchDelete,
    BatchUpdate,
    WebhookCreate,
    WebhookGet,
    WebhookList,
    WebhookUpdate,
    WebhookDelete,
    WebhookPing,
    WebhookRotate,
    Jwks,
    Unknown,
}

/// A request that was received.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LogEntry {
    /// Position in the log.
    pub seq: usize,
    /// When it came.
    pub time: Timestamp,
    /// What it asked for.
    pub op: Op,
    /// HTTP method.
    pub method: String,
    /// Path, without query.
    pub path: String,
    /// Query.
    pub query: String,
    /// Status of the answer; `reset`, `truncated`; empty while there is none.
    pub status: String,
    /// A short hash of the API key.
    pub key: Option<String>,
    /// The file it is about, or creates.
    pub file: Option<String>,
    /// The batch it is about, or created.
    pub batch: Option<String>,
    /// The display name it gives.
    pub display_name: Option<String>,
    /// Size of the body in bytes.
    pub bytes: usize,
    /// The body, of creates.
    pub body: Option<Value>,
}

/// A try to deliver a webhook.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Delivery {
    /// `webhook-id`.
    pub webhook_id: String,
    /// The batch.
    pub batch: String,
    /// The type of the event.
    pub event: String,
    /// Where to.
    pub uri: String,
    /// 1 for the first try.
    pub attempt: u32,
    /// HTTP status of the answer, if there was one.
    pub status: Option<u16>,
    /// When.
    pub time: Timestamp,
}

/// A planted fault.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// The operation it meets.
    pub op: Op,
    /// Only requests whose path, file or display name contains this.
    #[serde(default)]
    pub contains: String,
    /// Requests to let through first.
    #[serde(default)]
    pub skip: u32,
    /// Requests to meet.
    #[serde(default = "once")]
    pub times: u32,
    /// What happens to them.
    pub effect: Effect,
}

fn once() -> u32 {
    1
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Effect {
    /// It is answered with that status; with `commit` after it took effect.
    Status {
        /// HTTP status.
        code: u16,
        /// Whether it takes effect all the same.
        #[serde(default)]
        commit: bool,
        /// Whether the answer has Google's error envelope.
        #[serde(default)]
        envelope: bool,
        /// `Retry-After`, in seconds.
        #[serde(default)]
        retry_after: Option<u32>,
    },
    /// The connection is reset.
    Reset {
        /// Whether it takes effect all the same.
        #[serde(default)]
        commit: bool,
    },
    /// It takes effect, and its answer breaks off.
    Truncate,
    /// It takes effect, and is answered so many real milliseconds later.
    DelayAnswer {
        /// Real milliseconds.
        millis: u64,
    },
    /// It takes effect so many real milliseconds later, and is answered then.
    Delay {
        /// Real milliseconds.
        millis: u64,
    },
    /// It takes effect, but a header of its answer is missing, or another: what uploads suffer from.
    Header {
        /// Name of the header.
        name: String,
        /// What it says instead; absent, it is left out.
        #[serde(default)]
        value: Option<String>,
    },
    /// It is answered with 503 now, and takes effect so many simulated seconds later.
    CommitLate {
        /// Simulated seconds.
        seconds: f64,
    },
}

/// How a batch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// With results.
    Succeeded,
    /// Without.
    Failed,
    /// By its time limit.
    Expired,
    /// By a cancellation.
    Cancelled,
}

/// A batch, for assertions.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchView {
    /// `batches/ID`.
    pub name: String,
    /// What its creator called it.
    pub display_name: String,
    /// `PENDING`, …
    pub state: String,
    /// The input file.
    pub file: Option<String>,
    /// Requests in it.
    pub requests: usize,
    /// Who is told of its end.
    pub uris: Vec<String>,
    /// A short hash of the creator's key.
    pub key: String,
    /// It was deleted.
    pub deleted: bool,
    /// Its cancellation was asked for.
    pub cancelled: bool,
}

/// An uploaded file.
#[derive(Clone, Debug)]
pub(crate) struct FileRec {
    pub(crate) name: String,
    pub(crate) display_name: String,
    pub(crate) mime_type: String,
    pub(crate) content: Bytes,
    /// Of the content, made once: it takes long for big files.
    pub(crate) sha256: String,
    pub(crate) project: String,
    pub(crate) created: Timestamp,
}

/// An upload under way.
#[derive(Clone, Debug)]
pub(crate) struct UploadRec {
    pub(crate) name: Option<String>,
    pub(crate) display_name: String,
    pub(crate) mime_type: String,
    pub(crate) expected: Option<usize>,
    pub(crate) content: Vec<u8>,
    pub(crate) project: String,
    pub(crate) done: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Pending,
    Running,
    Ended(Outcome),
}

/// A batch.
#[derive(Clone, Debug)]
pub(crate) struct BatchRec {
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) embed: bool,
    pub(crate) display_name: String,
    pub(crate) priority: i64,
    pub(crate) file: Option<String>,
    pub(crate) requests: Vec<crate::work::Request>,
    pub(crate) uris: Vec<String>,
    pub(crate) user_metadata: Option<Value>,
    pub(crate) key: String,
    pub(crate) project: String,
    pub(crate) state: State,
    pub(crate) created: Timestamp,
    pub(crate) updated: Timestamp,
    pub(crate) ended: Option<Timestamp>,
    /// Lines of the result file, once there are any.
    pub(crate) output: Option<Bytes>,
    pub(crate) readable_from: Option<Timestamp>,
    pub(crate) succeeded: usize,
    pub(crate) failed: usize,
    pub(crate) cancelled: bool,
    pub(crate) deleted: bool,
}

/// What a lock guards.
pub(crate) struct Inner {
    pub(crate) switches: Switches,
    pub(crate) files: BTreeMap<String, FileRec>,
    /// Deleted ones, kept only while a create may still name them.
    pub(crate) deleted_files: BTreeMap<String, FileRec>,
    pub(crate) uploads: HashMap<String, UploadRec>,
    /// In order of creation.
    pub(crate) batches: Vec<BatchRec>,
    pub(crate) log: Vec<LogEntry>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) signing: Signing,
    /// Registered webhooks, in order of creation.
    pub(crate) webhooks: Vec<WebhookRec>,
    /// A delivery that waits for another one to overtake it.
    pub(crate) held: Option<Held>,
    pub(crate) tries: crate::work::Tries,
}

/// What all tasks share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) base_url: String,
    pub(crate) http: reqwest::Client,
    pub(crate) stop: CancellationToken,
    inner: Mutex<Inner>,
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) key: String,
    pub(crate) project: String,
}

impl Shared {
    pub(crate) fn new(config: Config, base_url: String, stop: CancellationToken) -> Self {
        let http = reqwest::Client::builder()
            .timeout(Duration::from_secs(10))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .unwrap_or_default();
        let inner = Inner {
            switches: config.switches.clone(),
            files: BTreeMap::new(),
            deleted_files: BTreeMap::new(),
            uploads: HashMap::new(),
            batches: Vec::new(),
            log: Vec::new(),
            faults: Vec::new(),
            deliveries: Vec::new(),
            signing: Signing::new(),
            webhooks: Vec::new(),
            held: None,
            tries: HashMap::new(),
        };
        Self { config, base_url, http, stop, inner: Mutex::new(inner) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.config.clock.now()
    }

    pub(crate) fn pace(&self) -> Pace {
        Pace(self.config.speed)
    }

    /// A time so many simulated seconds from now, as the clock on the wire will show it.
    pub(crate) fn in_seconds(&self, seconds: f64) -> Timestamp {
        let real = self.pace().seconds(seconds);
        let shown = real.mul_f64(self.config.clock.factor);
        let shown = SignedDuration::try_from(shown).unwrap_or(SignedDuration::MAX);
        self.now().checked_add(shown).unwrap_or(Timestamp::MAX)
    }

    /// Who asks, by key.
    pub(crate) fn caller(&self, key: Option<&str>) -> Result<Caller, ApiError> {
        let Some(key) = key.filter(|k| !k.is_empty()) else { return Err(ApiError::no_key()) };
        let project = match &self.config.keys {
            None => key.to_owned(),
            Some(list) => {
                let found = list.iter().find(|(k, _)| k == key);
                found.map(|(_, project)| project.clone()).ok_or_else(ApiError::bad_key)?
            }
        };
        Ok(Caller { key: hash(key.as_bytes())[..12].to_owned(), project })
    }

    pub(crate) fn views(&self) -> Vec<BatchView> {
        self.lock().batches.iter().map(BatchRec::view).collect()
    }
}

impl Inner {
    pub(crate) fn batch(&mut self, name: &str) -> Option<&mut BatchRec> {
        let id = name.strip_prefix("batches/").unwrap_or(name);
        self.batches.iter_mut().find(|b| b.id == id)
    }

    /// A batch that there is still something to do for.
    pub(crate) fn unfinished(&mut self, name: &str) -> Option<&mut BatchRec> {
        let goes_on = self.switches.delete_keeps_working;
        self.batch(name).filter(|b| !matches!(b.state, State::Ended(_)) && (goes_on || !b.deleted))
    }

    /// A batch that this caller may see.
    pub(crate) fn visible(&mut self, name: &str, caller: &Caller) -> Result<&mut BatchRec, ApiError> {
        let creator_only = self.switches.creator_only;
        self.batch(name)
            .filter(|b| !b.deleted && b.seen_by(caller, creator_only))
            .ok_or_else(ApiError::no_entity)
    }

    /// Batches that count against the quotas of a project.
    fn counted(&self, project: &str) -> impl Iterator<Item = &BatchRec> {
        let held = self.switches.quota_held;
        self.batches.iter().filter(move |b| {
            let active = !matches!(b.state, State::Ended(_)) && !b.deleted;
            b.project == project && (active || held && (b.cancelled || b.deleted))
        })
    }

    pub(crate) fn active(&self, project: &str) -> usize {
        self.counted(project).count()
    }

    /// Tokens that the batches of one model have enqueued.
    pub(crate) fn enqueued(&self, project: &str, model: &str) -> usize {
        self.counted(project).filter(|b| b.model == model).map(|b| tokens(&b.requests)).sum()
    }

    /// The fault that meets this request, if there is one.
    pub(crate) fn take_fault(&mut self, op: Op, subject: &str) -> Option<Effect> {
        let index = self.faults.iter_mut().position(|f| {
            if f.op != op || f.times == 0 || !subject.contains(&f.contains) {
                return false;
            }
            if f.skip > 0 {
                f.skip -= 1;
                return false;
            }
            true
        })?;
        let fault = &mut self.faults[index];
        fault.times -= 1;
        let effect = fault.effect.clone();
        self.faults.retain(|f| f.times > 0);
        Some(effect)
    }
}

impl BatchRec {
    pub(crate) fn seen_by(&self, caller: &Caller, creator_only: bool) -> bool {
        if creator_only { self.key == caller.key } else { self.project == caller.project }
    }

    pub(crate) fn view(&self) -> BatchView {
        BatchView {
            name: format!("batches/{}", self.id),
            display_name: self.display_name.clone(),
            state: self.state_name().to_owned(),
            file: self.file.clone(),
            requests: self.requests.len(),
            uris: self.uris.clone(),
            key: self.key.clone(),
            deleted: self.deleted,
            cancelled: self.cancelled,
        }
    }

    pub(crate) fn state_name(&self) -> &'static str {
        match self.state {
            State::Pending => "PENDING",
            State::Running => "RUNNING",
            State::Ended(Outcome::Succeeded) => "SUCCEEDED",
            State::Ended(Outcome::Failed) => "FAILED",
            State::Ended(Outcome::Expired) => "EXPIRED",
            State::Ended(Outcome::Cancelled) => "CANCELLED",
        }
    }
}

/// About as many as Google would count.
pub(crate) fn tokens(requests: &[crate::work::Request]) -> usize {
    requests.iter().map(|r| crate::work::tokens_of(&crate::work::text_of(&r.request))).sum()
}

/// Lower case hexadecimal SHA-256.
pub(crate) fn hash(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A random id as Google makes them.
pub(crate) fn random_id(letters: usize) -> String {
    use rand::RngExt as _;
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..letters).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect()
}
