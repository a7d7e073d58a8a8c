//! Takes one step, and folds its outcome into the job's memory. Client required.
//!
//! Errors of the API server are returned; whatever Gemini answers is an outcome.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt as _};
use rand::RngExt as _;

use super::collect::{Collected, Kept, Lines};
use super::decide::{self, Action};
use super::destination::{Destination, Placed};
use super::gather::{Halt, Order, aside, no_room};
use super::input::{Carried, Input};
use super::memory::{
    Absent, KeyRefused, Memory, NamespaceSeen, OutputObject, Probe, Refused, Remote, Search, Send, Stage,
    Stored, Tries, Trouble, after,
};
use super::metrics::{ByOutcome, ByReason};
use super::observe;
use super::output::{self, Done};
use super::output_store::{self, Content, Delivery};
use super::retry::Judge;
use super::run::Context;
use super::stored::{self, Failure, Unsent};
use super::transfers::{Kind, Waited};
use super::{Credential, Problem, ending, identity, shards};
use crate::api::{
    Attempt, GeminiBatchJob, Method, ObjectStoreOutput, Reason, Refusal, RefusedCall, StoredOutput,
};
use crate::callback::keyring::KeyRing;
use crate::callback::token::{JobRef, Token, callback_url};
use crate::gemini::{self, Batch, BatchName, FileName, ModelName, NewBatch, Upload};
use crate::{broken, crash};

/// Pages of a listing that are read at most: at 100 batches a page far more than any project can have.
pub(super) const MAX_PAGES: usize = 1000;
pub(super) const PAGE_SIZE: u32 = 100;

/// Google's clock may differ from ours: a listing goes on until batches are so much older than the intent.
pub(super) const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);

/// So often results are tried to be stored before they give their room in the temporary directory to others.
const HELD_TRIES: u32 = 3;

/// What a step works with.
pub struct Step<'a> {
    /// The controller.
    pub ctx: &'a Arc<Context>,
    /// The job.
    pub job: &'a GeminiBatchJob,
    /// Signs the callback URL.
    pub ring: &'a KeyRing,
    /// The API key, if there is one.
    pub credential: Option<&'a Arc<Credential>>,
    /// The input, if it was needed.
    pub input: Option<&'a Carried>,
}

/// `first`, doubled with each failure, at most `longest`, with up to a quarter of jitter on top.
#[must_use]
pub fn backoff(first: SignedDuration, longest: SignedDuration, failures: u32) -> SignedDuration {
    let doublings = failures.saturating_sub(1).min(20);
    let pause = first.saturating_mul(1 << doublings).min(longest);
    let jitter = rand::rng().random_range(0..=pause.as_millis().max(1) / 4);
    pause.saturating_add(SignedDuration::from_millis(i64::try_from(jitter).unwrap_or(0)))
}

/// One more failure of a call that is tried again with growing pauses.
pub(super) fn trouble_of(
    ctx: &Context,
    before: Option<&Trouble>,
    what: &str,
    error: &gemini::Error,
) -> Trouble {
    let failures = before.map_or(0, |t| t.failures).saturating_add(1);
    let timings = &ctx.timings;
    // A key is repaired by somebody, who then expects the job to go on soon.
    let (reason, longest) = if error.is_credentials() {
        (Reason::CredentialsRefused, timings.recheck * 3 / 4)
    } else {
        (Reason::GeminiUnavailable, timings.trouble_longest)
    };
    let pause = backoff(timings.trouble_first, longest, failures);
    Trouble {
        failures,
        next: after(ctx.clock.now(), error.retry_after().map_or(pause, |r| r.max(pause))),
        problem: Problem::new(
            reason,
            match reason {
                Reason::CredentialsRefused => format!(
                    "{what} fails: {error}. Put a valid key into the Secret that spec.credentials.secretRef names, or \
                     allow this one to use the Gemini API; it is tried again"
                ),
                _ => format!("{what} fails: {error}; it is tried again"),
            },
        ),
    }
}

/// Something else that fails for now: tried again with growing pauses.
pub(super) fn passing(ctx: &Context, before: Option<&Trouble>, problem: Problem) -> Trouble {
    ctx.metrics.transfer_failures.get_or_create(&ByReason { reason: problem.reason.as_str() }).inc();
    let failures = before.map_or(0, |t| t.failures).saturating_add(1);
    let timings = &ctx.timings;
    // What somebody has to repair is looked at again soon after they may have.
    let longest = if problem.reason == Reason::StoreUnavailable {
        timings.trouble_longest
    } else {
        timings.recheck * 3 / 4
    };
    let pause = backoff(timings.trouble_first, longest, failures);
    Trouble { failures, next: after(ctx.clock.now(), pause), problem }
}

/// Whether the job may be shown the batch. The operator's own key sees the batches of all its namespaces, and whoever
/// may write a job's status could name somebody else's there: with it only batches that bear the job's own UID count.
#[must_use]
pub fn may_see(job: &GeminiBatchJob, cluster: &str, batch: &Batch) -> bool {
    job.spec.credentials.is_some()
        || identity::identity_of(cluster, &batch.display_name).is_some_and(|i| Some(i.uid) == job.uid())
}

/// A line of the log about the job at hand: which one it is, and its attempt.
macro_rules! of_job {
    ($step:expr, $level:ident, target: $target:literal, $($rest:tt)+) => {
        tracing::$level!(
            target: $target,
            namespace = $step.job.namespace(),
            job = $step.job.name_any(),
            uid = $step.job.uid(),
            attempt = decide::current_attempt($step.job).map(|a| a.number),
            $($rest)+
        )
    };
    ($step:expr, $level:ident, $($rest:tt)+) => {
        tracing::$level!(
            namespace = $step.job.namespace(),
            job = $step.job.name_any(),
            uid = $step.job.uid(),
            attempt = decide::current_attempt($step.job).map(|a| a.number),
            $($rest)+
        )
    };
}

impl Step<'_> {
    /// Takes the step.
    pub async fn take(&self, action: &Action, memory: &mut Memory) -> Result<(), kube::Error> {
        let now = || self.ctx.clock.now();
        match action {
            Action::ReserveOutput { name } => self.reserve(name, memory).await?,
            Action::ReleaseOutput { name } => {
                match name {
                    Destination::ConfigMap(name) => {
                        output::release(&self.ctx.client, self.job, name).await?;
                    }
                    Destination::Store(at) => match output_store::release(self.ctx, self.job, at).await? {
                        output_store::Done::Yes(()) => {}
                        output_store::Done::Blocked(problem) | output_store::Done::Passing(problem) => {
                            of_job!(self, info, problem = problem.message, "the reservation stays");
                        }
                    },
                }
                memory.output = OutputObject::Unknown;
                memory.cleanup.output_released = true;
            }
            Action::StoreResults { name } => self.store(name, memory).await?,
            Action::FindInputFile { file } => self.find_input_file(file, memory).await,
            Action::UploadInput { file } => match self.input {
                Some(Carried::Whole(input)) => self.upload(file, input, memory).await,
                Some(Carried::Stored(stored)) => self.upload_stored(file, stored, memory).await?,
                None => {}
            },
            Action::CreateBatch { attempt } => self.create(attempt, memory).await,
            Action::FindBatch { attempt } => match self.list_for(attempt).await {
                Ok(found) => {
                    memory.trouble = None;
                    let stage = match found.into_iter().next() {
                        Some(batch) => Stage::Found(Box::new(batch)),
                        None => Stage::Unsure(self.searched(attempt, memory, None)),
                    };
                    set_stage(memory, attempt, stage);
                }
                Err(e) => self.trouble(memory, "listing batches", &e),
            },
            Action::Fence { file } => self.fence(file, memory).await,
            Action::ConfirmHinted { batch, attempt } => match self.get(batch).await {
                Ok(seen) if identity::is_send_of(attempt, &seen.display_name) => {
                    memory.trouble = None;
                    set_stage(memory, attempt, Stage::Found(Box::new(seen)));
                }
                Ok(_) => {
                    let search = self.searched(attempt, memory, Some(batch.clone()));
                    set_stage(memory, attempt, Stage::Unsure(search));
                }
                Err(e) if e.is_absent() => {
                    let search = self.searched(attempt, memory, Some(batch.clone()));
                    set_stage(memory, attempt, Stage::Unsure(search));
                }
                Err(e) => self.trouble(memory, "looking at the batch that a callback named", &e),
            },
            Action::ProbeCredential => self.probe(memory).await,
            Action::GetBatch { batch } => self.look(batch, memory).await,
            Action::Collect { name, batch } => self.collect(name, batch.as_deref(), memory).await?,
            Action::CancelBatch { batch } => self.cancel(batch, memory).await,
            Action::FindToCancel { attempt } => match self.list_for(attempt).await {
                // Another key need not be shown the batch. And a create that is still travelling can't be
                // fenced off while its input is somebody else's file: it is looked for as long as there is time.
                Ok(found) if found.is_empty() && !(self.same_key(attempt) && self.has_own_input()) => {
                    self.cleanup_failed(memory, "looking for the batch", &gemini::Error::local("not shown"));
                }
                Ok(found) => {
                    memory.cleanup.went_on();
                    memory.cleanup.listings += 1;
                    memory.cleanup.to_cancel =
                        found.into_iter().filter(|b| !b.is_terminal()).map(|b| b.name).collect();
                }
                Err(e) => self.cleanup_failed(memory, "listing batches", &e),
            },
            Action::DeleteInputFile { file } => self.delete_input_file(file, now(), memory).await,
            Action::AskNamespace => {
                let namespace = self.job.namespace().unwrap_or_default();
                let terminating = observe::is_terminating(&self.ctx.client, &namespace).await?;
                memory.namespace =
                    Some(NamespaceSeen { terminating, next: after(now(), self.ctx.timings.recheck / 2) });
            }
            Action::DeleteBatch { batch } => self.delete_batch(batch, memory).await,
            Action::DeleteJob => self.delete_job(memory).await?,
            Action::Shards(action) => shards::act::take(self.ctx, self.job, action, memory).await?,
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------ submission

    async fn find_input_file(&self, file: &str, memory: &mut Memory) {
        let Some(attempt) = decide::current_attempt(self.job) else { return };
        let Some((key, name)) = self.key_and_file(file) else { return };
        match self.ctx.gemini.get_file(key, &name).await {
            // The file is complete, so the batch may have been asked for.
            Ok(_) => set_stage(memory, attempt, Stage::Unsure(Search::default())),
            // No file, no batch: unless somebody deleted the file after the batch was created.
            Err(e) if e.is_absent() => match self.list_for(attempt).await {
                Ok(found) => {
                    let found = found.into_iter().next();
                    let stage = found.map_or(Stage::Unsent, |batch| Stage::Found(Box::new(batch)));
                    set_stage(memory, attempt, stage);
                }
                Err(e) => return self.trouble(memory, "listing batches", &e),
            },
            Err(e) => return self.trouble(memory, "looking for the input file", &e),
        }
        memory.trouble = None;
    }

    async fn upload(&self, file: &str, input: &Input, memory: &mut Memory) {
        let Some(attempt) = decide::current_attempt(self.job) else { return };
        let Some((key, name)) = self.key_and_file(file) else { return };
        let upload = Upload {
            name: &name,
            display_name: &attempt.display_name,
            mime_type: "application/jsonl",
            size: input.bytes.len() as u64,
        };
        let done = self.ctx.gemini.upload(key, upload, std::io::Cursor::new(input.bytes.clone())).await;
        self.uploaded(done, attempt, &input.sha256, memory).await;
    }

    async fn uploaded(
        &self,
        done: Result<gemini::File, gemini::Error>,
        attempt: &Attempt,
        sha256: &str,
        memory: &mut Memory,
    ) {
        let Some((key, name)) = self.key_and_file(&attempt.input_file) else { return };
        match done {
            Ok(there) => {
                memory.trouble = None;
                set_stage(memory, attempt, Stage::Uploaded { file: there.name.to_string() });
            }
            // The answer to the last chunk may have been lost: the file is there, whole, under our name.
            Err(e) if !e.is_refusal() && self.is_there(key, &name, sha256).await => {
                memory.trouble = None;
                set_stage(memory, attempt, Stage::Uploaded { file: name.to_string() });
            }
            Err(e) => {
                self.refused_or_trouble(memory, attempt, RefusedCall::Upload, &e, "uploading the input");
            }
        }
    }

    async fn is_there(&self, key: &gemini::ApiKey, name: &FileName, sha256: &str) -> bool {
        self.ctx
            .gemini
            .get_file(key, name)
            .await
            .is_ok_and(|f| f.is_active() && f.sha256_hex.as_deref() == Some(sha256))
    }

    /// The same for an input that lies in an object store: all but its last chunk is sent beside the passes.
    async fn upload_stored(
        &self,
        file: &str,
        stored: &Arc<Stored>,
        memory: &mut Memory,
    ) -> Result<(), kube::Error> {
        let Some(attempt) = decide::current_attempt(self.job) else { return Ok(()) };
        let (Some(key), Ok(name)) = (self.credential, FileName::parse(file)) else { return Ok(()) };
        let name = stored::Name { file: name, display: attempt.display_name.clone() };
        let session = memory.upload.take().filter(|kept| kept.0 == attempt.send_id).map(|kept| kept.1);
        let prepared = stored::prepare(self.ctx, self.job, stored, key, name, session.clone()).await;
        let keep = |session: Option<gemini::Session>| session.map(|s| Box::new((attempt.send_id.clone(), s)));
        match prepared {
            Err(waits) => {
                memory.upload = keep(session);
                memory.transfer = Some(waits);
            }
            Ok(Ok(stored::Prepared { session, offset, last })) => {
                crash::at("upload", "finishing");
                let done = self.ctx.gemini.finish_upload(&session, offset, &last).await;
                if done.as_ref().is_err_and(|e| !e.is_refusal()) {
                    memory.upload = keep(Some(session));
                }
                self.uploaded(done, attempt, &stored.facts.sha256, memory).await;
            }
            Ok(Err(Unsent::Gemini { error, session })) => {
                memory.upload = keep(session.filter(|_| !error.is_refusal()));
                self.uploaded(Err(error), attempt, &stored.facts.sha256, memory).await;
            }
            Ok(Err(Unsent::Store { failure: Failure::Passing(problem), session })) => {
                memory.upload = keep(session);
                of_job!(self, warn, problem = problem.message, "the input can't be sent");
                memory.trouble = Some(passing(self.ctx, memory.trouble.as_ref(), problem));
            }
            Ok(Err(Unsent::Store { failure: Failure::Kubernetes(e), session })) => {
                memory.upload = keep(session);
                return Err(e);
            }
            // Looked at anew: what is wrong with it is found out there.
            Ok(Err(Unsent::Store { failure: Failure::Changed | Failure::Problem { .. }, .. })) => {
                of_job!(self, info, "the input is not what was checked: it is read again");
                memory.stored = None;
            }
        }
        Ok(())
    }

    /// Asks for the batch, once. Whatever is not a clean refusal or a readable answer is an unknown outcome.
    async fn create(&self, attempt: &Attempt, memory: &mut Memory) {
        let Some((key, file)) = self.key_and_file(&attempt.input_file) else { return };
        let model = match ModelName::parse(&self.job.spec.model) {
            Ok(model) => model,
            Err(e) => {
                let refused = self.refused(
                    RefusedCall::Create,
                    0,
                    Problem::new(
                        Reason::ModelNotFound,
                        format!("spec.model can't be the name of a model: {e}"),
                    ),
                    attempt,
                    None,
                    true,
                );
                return set_stage(memory, attempt, Stage::Refused(refused));
            }
        };
        // From here on the batch may exist, whatever happens to this process or to the answer.
        set_stage(memory, attempt, Stage::Unsure(Search::default()));
        let webhook_uris = if attempt.polled { Vec::new() } else { self.callback_url(attempt) };
        let batch = NewBatch {
            call: match self.job.spec.method {
                Method::GenerateContent => gemini::Call::GenerateContent,
                Method::EmbedContent => gemini::Call::EmbedContent,
            },
            display_name: &attempt.display_name,
            input_file: &file,
            webhook_uris: &webhook_uris,
            priority: self.job.spec.priority,
        };
        let (uid, display_name) = (self.job.uid().unwrap_or_default(), &attempt.display_name);
        of_job!(self, info, target: "audit", display_name, "create: sending");
        crash::at("create", "sending");
        let answer = self.ctx.gemini.create_batch(key, &model, &batch).await;
        match &answer {
            Ok(batch) => {
                self.count_submission("created");
                of_job!(self, info, target: "audit", display_name, batch = %batch.name, "create: created");
            }
            Err(e) => {
                self.count_submission(if e.is_refusal() { "refused" } else { "unknown" });
                of_job!(self, warn, target: "audit", display_name, error = %e, clean_refusal = e.is_refusal(), "create: no batch name");
            }
        }
        match answer {
            Ok(batch) => {
                memory.trouble = None;
                self.ctx.ledger().created(&attempt.credential_fingerprint, &uid);
                self.ctx.line_moved.notify_one();
                set_stage(memory, attempt, Stage::Created(Box::new(batch)));
            }
            // Not a word about the requests: they may be sent without one. Never twice for the same send.
            Err(e) if e.is_webhook() && !webhook_uris.is_empty() => {
                self.ctx.webhooks.refused(self.job.spec.method, self.ctx.clock.now());
                let problem = Problem::new(Reason::WebhookRefused, "");
                let refused = self.refused(RefusedCall::Create, e.http_code(), problem, attempt, None, false);
                memory.trouble = None;
                set_stage(memory, attempt, Stage::Refused(refused));
            }
            Err(e) if e.is_refusal() => {
                self.refused_or_trouble(memory, attempt, RefusedCall::Create, &e, "creating the batch");
            }
            Err(_) => {} // unknown: it is looked for
        }
    }

    fn count_submission(&self, outcome: &'static str) {
        self.ctx.metrics.submissions.get_or_create(&ByOutcome { outcome }).inc();
    }

    fn callback_url(&self, attempt: &Attempt) -> Vec<url::Url> {
        let Some(base) = &self.ctx.external_url else { return Vec::new() };
        let (namespace, name) = (self.job.namespace().unwrap_or_default(), self.job.name_any());
        let uid = self.job.uid().unwrap_or_default();
        let job = JobRef {
            namespace: &namespace,
            name: &name,
            uid: &uid,
            attempt: u32::try_from(attempt.number).unwrap_or_default(),
        };
        let token = Token::mint(self.ring, self.ctx.clock.now(), &job);
        vec![callback_url(base, &job, &token)]
    }

    /// All batches of the attempt, from the newest to past the intent: that of its present send first, if there is
    /// one. A batch of an earlier send that was given up is as good, and paid for already.
    async fn list_for(&self, attempt: &Attempt) -> Result<Vec<Batch>, gemini::Error> {
        let Some(key) = self.credential.map(|c| &c.key) else { return Err(gemini::Error::no_key()) };
        let mut found = Vec::new();
        let oldest = after(attempt.intent_time.0, -CLOCK_SKEW);
        let mut token: Option<String> = None;
        for _ in 0..MAX_PAGES {
            let page = self.ctx.gemini.list_batches(key, PAGE_SIZE, token.as_deref()).await?;
            let past = page.batches.iter().any(|b| b.create_time.is_some_and(|t| t < oldest));
            found.extend(page.batches.into_iter().filter(|b| identity::is_send_of(attempt, &b.display_name)));
            match page.next_page_token {
                // An empty page with a token is not the end.
                Some(next) if !past => token = Some(next),
                _ => break,
            }
        }
        found.sort_by_key(|b| b.display_name != attempt.display_name);
        if broken::without("adoption") {
            found.clear();
        }
        Ok(found)
    }

    /// One more search in vain.
    fn searched(&self, attempt: &Attempt, memory: &Memory, refuted: Option<BatchName>) -> Search {
        let before = match memory.send.as_ref().filter(|s| s.send_id == attempt.send_id).map(|s| &s.stage) {
            Some(Stage::Unsure(search)) => search.clone(),
            Some(_) => Search::default(),
            None => Search { file_unasked: !self.same_key(attempt), ..Search::default() },
        };
        if let Some(batch) = refuted {
            return Search { refuted: Some(batch), ..before };
        }
        let pauses = &self.ctx.timings.search_pauses;
        let index =
            usize::try_from(before.listings).unwrap_or(usize::MAX).min(pauses.len().saturating_sub(1));
        let pause = pauses.get(index).copied().unwrap_or(self.ctx.timings.trouble_longest);
        let now = self.ctx.clock.now();
        let search = Search { listings: before.listings + 1, next: Some(after(now, pause)), ..before };
        if !self.same_key(attempt) {
            return search;
        }
        Search {
            own_listings: search.own_listings + 1,
            since: search.since.or(Some(now)),
            listed_behind_fence: search.fenced,
            ..search
        }
    }

    /// Deletes the input of a send that was not found, and sees it gone.
    async fn fence(&self, file: &str, memory: &mut Memory) {
        let Some(attempt) = decide::current_attempt(self.job) else { return };
        let Some((key, name)) = self.key_and_file(file) else { return };
        if broken::without("fence") {
            if let Some(Send { stage: Stage::Unsure(search), .. }) = &mut memory.send {
                (search.fenced, search.fenced_at) = (true, Some(self.ctx.clock.now()));
            }
            return;
        }
        match self.ctx.gemini.delete_file(key, &name).await {
            Ok(()) => {}
            Err(e) if e.is_absent() && self.is_own_key() => {}
            Err(e) => return self.trouble(memory, "deleting the input file of an unconfirmed batch", &e),
        }
        match self.ctx.gemini.get_file(key, &name).await {
            Err(e) if e.is_absent() && self.is_own_key() => {}
            Err(e) => return self.trouble(memory, "seeing the input file of an unconfirmed batch gone", &e),
            Ok(_) => {
                let still = gemini::Error::local("the file is still there");
                return self.trouble(memory, "deleting the input file of an unconfirmed batch", &still);
            }
        }
        of_job!(self, warn, target: "audit", display_name = attempt.display_name, file, "create: fenced");
        self.ctx.metrics.fenced.inc();
        memory.trouble = None;
        if let Some(Send { stage: Stage::Unsure(search), .. }) = &mut memory.send {
            (search.fenced, search.fenced_at) = (true, Some(self.ctx.clock.now()));
        }
    }

    async fn probe(&self, memory: &mut Memory) {
        let Some(credential) = self.credential else { return };
        let answer = self.ctx.gemini.list_batches(&credential.key, 1, None).await;
        let accepted = match &answer {
            Ok(_) => true,
            Err(e) if e.is_refusal() => false,
            Err(e) => return self.trouble(memory, "asking whether the API key is valid", e),
        };
        memory.trouble = None;
        memory.probe = Some(Probe {
            fingerprint: credential.fingerprint.clone(),
            accepted,
            next: after(self.ctx.clock.now(), self.ctx.timings.recheck),
        });
    }

    // -------------------------------------------------------------------------- while it runs

    async fn look(&self, batch: &BatchName, memory: &mut Memory) {
        let now = self.ctx.clock.now();
        let hint = decide::current_attempt(self.job).and_then(|a| decide::new_hint(self.job, a));
        let answer = self.get(batch).await;
        memory.remote_name = Some(batch.clone());
        memory.looks.looked(hint.as_deref(), now, &self.ctx.timings.hint_pauses);
        if memory.cleanup.cancelled {
            let pauses = &self.ctx.timings.cancel_pauses;
            let watched = Tries::again(memory.cleanup.watched, now, pauses);
            // It was best effort: asked for again now and then.
            memory.cleanup.cancelled = usize::try_from(watched.count).is_ok_and(|n| n < pauses.len());
            memory.cleanup.watched = Some(watched);
        }
        match answer {
            Ok(seen) => {
                memory.trouble = None;
                self.saw(seen, memory);
            }
            Err(e) if e.is_absent() => {
                memory.trouble = None;
                let before = match &memory.remote {
                    Some(Remote::Missing(absent)) => Some(absent),
                    _ => None,
                };
                memory.remote = Some(Remote::Missing(self.absent(before)));
            }
            Err(e) => {
                memory.looks.swept = true; // asked for again as soon as the trouble allows
                self.trouble(memory, "looking at the batch", &e);
            }
        }
    }

    fn absent(&self, before: Option<&Absent>) -> Absent {
        let fingerprint = self.credential.map_or("", |c| c.fingerprint.as_str());
        Absent::again(before, fingerprint, self.ctx.clock.now(), &self.ctx.timings.result_pauses)
    }

    /// What a GET of the attempt's batch has shown, and with which key.
    fn saw(&self, batch: Batch, memory: &mut Memory) {
        memory.remote = Some(Remote::Seen(Box::new(batch)));
        memory.remote_key = self.credential.map(|c| c.fingerprint.clone());
    }

    async fn get(&self, batch: &BatchName) -> Result<Batch, gemini::Error> {
        let Some(credential) = self.credential else { return Err(gemini::Error::no_key()) };
        let seen = self.ctx.gemini.get_batch(&credential.key, batch).await?;
        if may_see(self.job, &self.ring.cluster_id, &seen) {
            Ok(seen)
        } else {
            Err(gemini::Error::not_theirs())
        }
    }

    /// Before something is done to a batch that the status names: see [`may_see`].
    async fn may_touch(&self, batch: &BatchName) -> Result<(), gemini::Error> {
        if self.job.spec.credentials.is_some() { Ok(()) } else { self.get(batch).await.map(|_| ()) }
    }

    // ------------------------------------------------------------------------------- results

    async fn collect(
        &self,
        name: &BatchName,
        batch: Option<&Batch>,
        memory: &mut Memory,
    ) -> Result<(), kube::Error> {
        let Some(key) = self.credential else { return Ok(()) };
        let Some(attempt) = decide::current_attempt(self.job) else { return Ok(()) };
        let judge = Judge::of(self.job).and(attempt.number, ending::cut_short(attempt, batch));
        loop {
            let order = Order {
                ctx: Arc::clone(self.ctx),
                job: self.job.clone(),
                key: Arc::clone(key),
                name: name.clone(),
                batch: batch.cloned(),
                judge: judge.clone(),
                without_earlier: memory.without_earlier,
                room: None,
            };
            let Some(gathered) = self.gather(order, memory).await else { return Ok(()) };
            match gathered {
                Ok(collected) => {
                    self.count_bytes("read", collected.bytes);
                    memory.trouble = None;
                    memory.unreadable = None;
                    memory.collected = Some(collected);
                }
                Err(Halt::Kubernetes(e)) => return Err(e),
                Err(Halt::EarlierAbsent) => {
                    let absent = self.absent(memory.unreadable.as_ref());
                    let late =
                        after(absent.tries.since, self.ctx.timings.result_late) <= self.ctx.clock.now();
                    memory.trouble = None;
                    memory.unreadable = Some(absent);
                    if late && self.is_own_key() && !memory.without_earlier {
                        // They are gone; those of this attempt are not.
                        memory.without_earlier = true;
                        continue;
                    }
                }
                Err(Halt::Absent) => {
                    memory.trouble = None;
                    memory.unreadable = Some(self.absent(memory.unreadable.as_ref()));
                }
                Err(Halt::Gemini { what, error }) => self.trouble(memory, what, &error),
                Err(Halt::Passing(problem)) => {
                    let problem = with_time_left(&problem, memory);
                    self.passes(memory, problem);
                }
            }
            return Ok(());
        }
    }

    /// Reads and joins: beside the passes, if that may take long. `None`: it is under way, and the job will be woken.
    async fn gather(&self, order: Order, memory: &mut Memory) -> Option<Result<Collected, Halt>> {
        let spec = &self.job.spec;
        let is_large = spec.stored_input().is_some() || !spec.has_own_input() || self.to_a_store();
        if !is_large {
            return Some(aside(order.gather()).await);
        }
        let what = format!("collect {} {}", order.name, order.without_earlier);
        let (owner, woken) = (stored::owner(self.job), stored::woken(self.ctx, self.job));
        let transfers = &self.ctx.transfers;
        let waited = if self.to_a_store() {
            let work = |room| aside(Order { room: Some(room), ..order }.gather());
            transfers.run_with_room(&owner, &what, woken, work).await
        } else {
            transfers.run(Kind::Results, &owner, &what, woken, || aside(order.gather())).await
        };
        memory.transfer = Some(match waited {
            Waited::Done(gathered) => return Some(gathered),
            Waited::Running => stored::waiting("the results are being read and joined with their requests"),
            Waited::Queued => stored::queued(self.ctx, "the results wait"),
        });
        None
    }

    fn count_bytes(&self, outcome: &'static str, bytes: i64) {
        let counter = self.ctx.metrics.result_bytes.get_or_create(&ByOutcome { outcome });
        counter.inc_by(u64::try_from(bytes).unwrap_or(0));
    }

    fn to_a_store(&self) -> bool {
        matches!(Destination::of(self.job), Some(Destination::Store(_)))
    }

    async fn reserve(&self, name: &Destination, memory: &mut Memory) -> Result<(), kube::Error> {
        memory.cleanup.output_released = false;
        let reserved = OutputObject::Reserved { name: name.clone() };
        memory.output = match name {
            Destination::ConfigMap(map) => match output::reserve(&self.ctx.client, self.job, map).await? {
                Done::Yes => reserved,
                Done::Blocked(problem) => self.blocked(name, problem),
            },
            Destination::Store(at) => match output_store::reserve(self.ctx, self.job, at).await? {
                output_store::Done::Yes(()) => {
                    memory.trouble = None;
                    reserved
                }
                output_store::Done::Blocked(problem) => self.blocked(name, problem),
                output_store::Done::Passing(problem) => {
                    let problem = with_time_left(&problem, memory);
                    self.passes(memory, problem);
                    OutputObject::Unknown
                }
            },
        };
        // Results are not held for a place that is not there: others need the room.
        if !matches!(memory.output, OutputObject::Reserved { .. })
            && let Some(collected) = &mut memory.collected
        {
            collected.lines = Lines::Dropped;
        }
        Ok(())
    }

    async fn store(&self, name: &Destination, memory: &mut Memory) -> Result<(), kube::Error> {
        let Some(attempt) = decide::current_attempt(self.job) else { return Ok(()) };
        let Some(collected) = &memory.collected else { return Ok(()) };
        let Lines::Kept(kept) = &collected.lines else { return Ok(()) };
        let batch = match &memory.remote {
            Some(Remote::Seen(batch)) => Some(&**batch),
            _ => None,
        };
        let counts =
            ending::results(self.job, attempt, batch, Some(collected), None).requests.unwrap_or_default();
        let manifest = output::manifest(self.job, collected, counts);
        let done = match name {
            Destination::ConfigMap(map) => {
                // They may have been kept for an object store, which takes any number.
                let text = match kept.clone().within(Some(output::MAX_LINES_BYTES)) {
                    Ok(Lines::Kept(kept)) => output::text(&kept),
                    Ok(other) => {
                        if let Some(collected) = &mut memory.collected {
                            collected.lines = other;
                        }
                        return Ok(());
                    }
                    Err(e) => Err(e),
                };
                let text = match text {
                    Ok(text) => text,
                    Err(e) => {
                        self.passes(memory, no_room(&e));
                        return Ok(());
                    }
                };
                let done = output::store(&self.ctx.client, self.job, map, &text, &manifest).await?;
                match done {
                    Done::Yes => Ok(Placed::ConfigMap(map.clone())),
                    Done::Blocked(problem) => Err(problem),
                }
            }
            Destination::Store(at) => {
                let kept = kept.clone();
                let Some(done) = self.deliver(at, attempt.number, kept, manifest, memory).await? else {
                    return Ok(());
                };
                done.map(Placed::Store)
            }
        };
        memory.output = match done {
            Ok(placed) => OutputObject::Stored { name: name.clone(), placed },
            Err(problem) => self.blocked(name, problem),
        };
        // Stored, or to be read again when it can be stored: no reason to hold them.
        if let Some(collected) = &mut memory.collected {
            collected.lines = Lines::Dropped;
        }
        Ok(())
    }

    /// Writes to an object store, beside the passes. `None`: that is under way, or tried again.
    async fn deliver(
        &self,
        at: &ObjectStoreOutput,
        attempt: i32,
        kept: Kept,
        manifest: serde_json::Value,
        memory: &mut Memory,
    ) -> Result<Option<Result<StoredOutput, Problem>>, kube::Error> {
        let (ctx, job) = (Arc::clone(self.ctx), self.job.clone());
        let delivery =
            Delivery { ctx, job, at: at.clone(), attempt, content: Content::Joined(kept), manifest };
        let what = format!("deliver {attempt} {}", serde_json::json!(at));
        let (owner, woken) = (stored::owner(self.job), stored::woken(self.ctx, self.job));
        let waited =
            self.ctx.transfers.run(Kind::Results, &owner, &what, woken, || aside(delivery.deliver()));
        match waited.await {
            Waited::Done(done) => match done? {
                output_store::Done::Yes(stored) => {
                    self.count_bytes("stored", stored.objects.iter().map(|o| o.bytes).sum());
                    memory.trouble = None;
                    return Ok(Some(Ok(stored)));
                }
                output_store::Done::Blocked(problem) => return Ok(Some(Err(problem))),
                output_store::Done::Passing(problem) => {
                    let problem = with_time_left(&problem, memory);
                    self.passes(memory, problem);
                    // Others need the room as well. The place is looked at first then, before all is read again.
                    if memory.trouble.as_ref().is_some_and(|t| t.failures >= HELD_TRIES) {
                        memory.output = OutputObject::Unknown;
                        if let Some(collected) = &mut memory.collected {
                            collected.lines = Lines::Dropped;
                        }
                    }
                }
            },
            Waited::Running => {
                memory.transfer =
                    Some(stored::waiting(format!("the results are on their way to {}", at.uri)));
            }
            Waited::Queued => memory.transfer = Some(stored::queued(self.ctx, "the results wait")),
        }
        Ok(None)
    }

    /// Something other than Gemini fails for now: tried again with growing pauses.
    fn passes(&self, memory: &mut Memory, problem: Problem) {
        of_job!(self, warn, problem = problem.message, "it is tried again");
        memory.trouble = Some(passing(self.ctx, memory.trouble.as_ref(), problem));
    }

    fn blocked(&self, name: &Destination, problem: Problem) -> OutputObject {
        tracing::debug!(%name, %problem.reason, "output object not usable");
        let pause = SignedDuration::from_millis(
            i64::try_from(self.ctx.timings.recheck.as_millis() * 3 / 4).unwrap_or(i64::MAX),
        );
        OutputObject::Blocked {
            problem,
            generation: self.job.metadata.generation.unwrap_or(0),
            retry: Some(after(self.ctx.clock.now(), pause)),
        }
    }

    // ------------------------------------------------------------------------------ clean-up

    async fn cancel(&self, batch: &BatchName, memory: &mut Memory) {
        let Some(credential) = self.credential else { return };
        let cancelled = match self.may_touch(batch).await {
            Ok(()) => self.ctx.gemini.cancel_batch(&credential.key, batch).await,
            Err(e) => Err(e),
        };
        match cancelled {
            Ok(()) => {}
            // Gone: nothing goes on. Under another key a 404 proves nothing.
            Err(e) if e.is_absent() && self.is_own_key() => {}
            // What is over needs no cancellation, whatever it was refused for: the batch itself tells.
            Err(e) => match self.get(batch).await {
                Ok(seen) if seen.is_terminal() => return self.is_over(seen, memory),
                _ => return self.cleanup_failed(memory, "cancelling the batch", &e),
            },
        }
        of_job!(self, info, target: "audit", %batch, "cancelled");
        memory.cleanup.cancelled(batch);
    }

    /// There was nothing to cancel any more.
    fn is_over(&self, batch: Batch, memory: &mut Memory) {
        of_job!(self, info, batch = %batch.name, "had ended before it was cancelled");
        memory.cleanup.cancelled(&batch.name);
        let recorded = decide::current_attempt(self.job).and_then(|a| a.batch_name.as_deref());
        if recorded == Some(batch.name.to_string().as_str()) {
            self.saw(batch, memory);
        }
    }

    /// Deletes a batch that does not run, and its result file as far as Gemini lets it be deleted.
    async fn delete_batch(&self, batch: &BatchName, memory: &mut Memory) {
        let Some(credential) = self.credential else { return };
        let deleted = match self.may_touch(batch).await {
            Ok(()) => self.ctx.gemini.delete_batch(&credential.key, batch).await,
            Err(e) => Err(e),
        };
        match deleted {
            Ok(()) => {}
            Err(e) if e.is_absent() && self.made(batch) => {
                memory.cleanup.went_on();
                return memory.cleanup.batches_deleted.push(batch.to_string());
            }
            Err(e) => return self.cleanup_failed(memory, "deleting the batch", &e),
        }
        // Gemini was seen to refuse the deletion of result files; they expire by themselves.
        if let Err(error) = self.ctx.gemini.delete_file(&credential.key, &batch.derived_output_file()).await {
            of_job!(self, info, %batch, %error, "the result file stays until it expires");
        }
        of_job!(self, info, target: "audit", %batch, "deleted");
        memory.cleanup.went_on();
        memory.cleanup.batches_deleted.push(batch.to_string());
    }

    /// Whether the batch is one of this job's that was created with the present API key.
    fn made(&self, batch: &BatchName) -> bool {
        let name = batch.to_string();
        let mut attempts = self.job.status.iter().flat_map(|s| &s.attempts);
        attempts.any(|a| a.batch_name.as_ref() == Some(&name) && self.same_key(a))
    }

    /// Deletes the job, if it still is as it was looked at.
    async fn delete_job(&self, memory: &mut Memory) -> Result<(), kube::Error> {
        let jobs: Api<GeminiBatchJob> =
            Api::namespaced(self.ctx.client.clone(), &self.job.namespace().unwrap_or_default());
        let as_seen = Preconditions { uid: self.job.uid(), resource_version: self.job.resource_version() };
        let params = DeleteParams { preconditions: Some(as_seen), ..DeleteParams::background() };
        match jobs.delete(&self.job.name_any(), &params).await {
            Ok(_) => {}
            Err(e) if output::is(&e, 404) => {}
            Err(e) => return Err(e), // changed meanwhile: looked at again
        }
        of_job!(self, info, "deleted: its time to live is over");
        memory.cleanup.job_deleted = true;
        Ok(())
    }

    fn has_own_input(&self) -> bool {
        self.job.spec.has_own_input()
    }

    fn is_own_key(&self) -> bool {
        decide::current_attempt(self.job).is_some_and(|a| self.same_key(a))
    }

    fn same_key(&self, attempt: &Attempt) -> bool {
        self.credential.is_some_and(|c| c.fingerprint == attempt.credential_fingerprint)
    }

    async fn delete_input_file(&self, file: &str, now: Timestamp, memory: &mut Memory) {
        let Some((key, name)) = self.key_and_file(file) else { return };
        // With the operator's own key only files that bear the job's mark; any other one expires.
        let uid = self.job.uid().unwrap_or_default();
        let own = identity::input_file_prefix(&self.ring.cluster_id, &uid);
        if self.job.spec.credentials.is_none() && !file.starts_with(&own) {
            memory.cleanup.input_deleted = true;
            return;
        }
        match self.ctx.gemini.delete_file(key, &name).await {
            Ok(()) => {}
            Err(e) if e.is_absent() && self.is_own_key() => {}
            Err(e) => {
                tracing::debug!(%now, "the input file could not be deleted yet");
                return self.cleanup_failed(memory, "deleting the input file", &e);
            }
        }
        memory.cleanup.went_on();
        memory.cleanup.input_deleted = true;
    }

    fn cleanup_failed(&self, memory: &mut Memory, what: &str, error: &gemini::Error) {
        of_job!(self, warn, %error, "{what} failed");
        let (now, timings) = (self.ctx.clock.now(), &self.ctx.timings);
        let mut tries = Tries::again(memory.cleanup.failed, now, &timings.result_pauses);
        let key = self.credential.filter(|_| error.is_credentials());
        memory.cleanup.refused = key.map(|key| KeyRefused {
            fingerprint: key.fingerprint.clone(),
            problem: trouble_of(self.ctx, None, what, error).problem,
        });
        if key.is_some() {
            // Somebody repairs it, and expects it to go on soon then.
            tries.next = tries.next.min(after(now, timings.recheck));
        }
        memory.cleanup.failed = Some(tries);
    }

    // ------------------------------------------------------------------------------- outcomes

    fn key_and_file(&self, file: &str) -> Option<(&gemini::ApiKey, FileName)> {
        Some((&self.credential?.key, FileName::parse(file).ok()?))
    }

    /// A call that fails for now: tried again with growing pauses.
    fn trouble(&self, memory: &mut Memory, what: &str, error: &gemini::Error) {
        let trouble = trouble_of(self.ctx, memory.trouble.as_ref(), what, error);
        let failures = trouble.failures;
        of_job!(self, warn, failures, %error, "{what} failed");
        memory.trouble = Some(trouble);
    }

    /// A refusal as it is recorded, if the error is one.
    fn refusal(&self, call: RefusedCall, error: &gemini::Error, attempt: &Attempt) -> Option<Refused> {
        let (problem, is_final) = ending::refusal_of(call, error, self.job)?;
        Some(self.refused(call, error.http_code(), problem, attempt, error.retry_after(), is_final))
    }

    fn refused(
        &self,
        call: RefusedCall,
        code: u16,
        problem: Problem,
        attempt: &Attempt,
        retry_after: Option<SignedDuration>,
        is_final: bool,
    ) -> Refused {
        let (now, timings) = (self.ctx.clock.now(), &self.ctx.timings);
        let refusals = u32::try_from(attempt.refusals.unwrap_or(0)).unwrap_or(0).saturating_add(1);
        let pause = |refusals| backoff(timings.quota_first, timings.quota_longest, refusals);
        let not_before = |pause| after(now, retry_after.map_or(pause, |asked| asked.max(pause)));
        let retry_time = match problem.reason {
            Reason::CredentialsRefused => not_before(timings.recheck),
            // Another question, not the same one again.
            Reason::WebhookRefused => now,
            // The key's quota is everybody's who uses it.
            Reason::WaitingForQuota => {
                self.ctx.ledger().refused(&attempt.credential_fingerprint, now, retry_after, pause)
            }
            _ => not_before(pause(refusals)),
        };
        Refused {
            refusal: Refusal {
                call,
                reason: problem.reason.as_str().to_owned(),
                code: i32::from(code),
                time: MicroTime(now),
                retry_time: MicroTime(retry_time),
            },
            reason: problem.reason,
            message: problem.message,
            is_final,
        }
    }

    fn refused_or_trouble(
        &self,
        memory: &mut Memory,
        attempt: &Attempt,
        call: RefusedCall,
        error: &gemini::Error,
        what: &str,
    ) {
        match self.refusal(call, error, attempt) {
            Some(refused) => {
                memory.trouble = None;
                set_stage(memory, attempt, Stage::Refused(refused));
            }
            None => self.trouble(memory, what, error),
        }
    }
}

/// With results at stake: until when there is time.
fn with_time_left(problem: &Problem, memory: &Memory) -> Problem {
    match &memory.remote {
        Some(Remote::Seen(batch)) if batch.is_terminal() => ending::kept_at_gemini(problem, Some(batch)),
        _ => problem.clone(),
    }
}

fn set_stage(memory: &mut Memory, attempt: &Attempt, stage: Stage) {
    memory.send = Some(Send { send_id: attempt.send_id.clone(), stage });
}
