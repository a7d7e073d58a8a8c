//! Takes one step, and folds its outcome into the job's memory. Client required.
//!
//! Errors of the API server are returned; whatever Gemini answers is an outcome.

use bytes::Bytes;
use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt as _;
use rand::RngExt as _;

use super::Problem;
use super::collect::{Collected, Collector, Keys, Lines};
use super::decide::{self, Action};
use super::ending;
use super::input::Input;
use super::memory::{
    Absent, Memory, OutputObject, Probe, Refused, Remote, Search, Send, Stage, Tries, Trouble, after,
};
use super::observe::{self, Credential};
use super::output::{self, Done};
use super::run::Context;
use crate::api::{Attempt, GeminiBatchJob, Reason, Refusal, RefusedCall};
use crate::callback::keyring::KeyRing;
use crate::callback::token::{JobRef, Token, callback_url};
use crate::gemini::results::{self, ResultLine};
use crate::gemini::{self, Batch, BatchName, FileName, ModelName, NewBatch, Upload};

/// Pages of a listing that are read at most: at 100 batches a page far more than any project can have.
const MAX_PAGES: usize = 1000;
const PAGE_SIZE: u32 = 100;

/// Google's clock may differ from ours: a listing goes on until batches are so much older than the intent.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);

/// What a step works with.
pub struct Step<'a> {
    /// The controller.
    pub ctx: &'a Context,
    /// The job.
    pub job: &'a GeminiBatchJob,
    /// Signs the callback URL.
    pub ring: &'a KeyRing,
    /// The API key, if there is one.
    pub credential: Option<&'a Credential>,
    /// The input, if it was needed.
    pub input: Option<&'a Input>,
}

/// `first`, doubled with each failure, at most `longest`, with up to a quarter of jitter on top.
#[must_use]
pub fn backoff(first: SignedDuration, longest: SignedDuration, failures: u32) -> SignedDuration {
    let doublings = failures.saturating_sub(1).min(20);
    let pause = first.saturating_mul(1 << doublings).min(longest);
    let jitter = rand::rng().random_range(0..=pause.as_millis().max(1) / 4);
    pause.saturating_add(SignedDuration::from_millis(i64::try_from(jitter).unwrap_or(0)))
}

impl Step<'_> {
    /// Takes the step.
    pub async fn take(&self, action: &Action, memory: &mut Memory) -> Result<(), kube::Error> {
        let now = || self.ctx.clock.now();
        match action {
            Action::ReserveOutput { name } => {
                let done = output::reserve(&self.ctx.client, self.job, name).await?;
                memory.cleanup.output_released = false;
                memory.output = self.output_object(done, name, OutputObject::Reserved { name: name.clone() });
            }
            Action::ReleaseOutput { name } => {
                output::release(&self.ctx.client, self.job, name).await?;
                memory.output = OutputObject::Unknown;
                memory.cleanup.output_released = true;
            }
            Action::StoreResults { name } => self.store(name, memory).await?,
            Action::FindInputFile { file } => self.find_input_file(file, memory).await,
            Action::UploadInput { file } => self.upload(file, memory).await,
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
                Ok(seen) if seen.display_name == attempt.display_name => {
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
                    self.cleanup_failed(memory, "looking for the batch", "not shown");
                }
                Ok(found) => {
                    memory.cleanup.failed = None;
                    memory.cleanup.listings += 1;
                    memory.cleanup.to_cancel =
                        found.into_iter().filter(|b| !b.is_terminal()).map(|b| b.name).collect();
                }
                Err(e) => self.cleanup_failed(memory, "listing batches", &e),
            },
            Action::DeleteInputFile { file } => self.delete_input_file(file, now(), memory).await,
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

    async fn upload(&self, file: &str, memory: &mut Memory) {
        let (Some(attempt), Some(input)) = (decide::current_attempt(self.job), self.input) else { return };
        let Some((key, name)) = self.key_and_file(file) else { return };
        let upload = Upload {
            name: &name,
            display_name: &attempt.display_name,
            mime_type: "application/jsonl",
            size: input.bytes.len() as u64,
        };
        match self.ctx.gemini.upload(key, upload, std::io::Cursor::new(input.bytes.clone())).await {
            Ok(there) => {
                memory.trouble = None;
                set_stage(memory, attempt, Stage::Uploaded { file: there.name.to_string() });
            }
            // The answer to the last chunk may have been lost: the file is there, whole, under our name.
            Err(e) if !e.is_refusal() && self.is_there(key, &name, input).await => {
                memory.trouble = None;
                set_stage(memory, attempt, Stage::Uploaded { file: name.to_string() });
            }
            Err(e) => {
                self.refused_or_trouble(memory, attempt, RefusedCall::Upload, &e, "uploading the input");
            }
        }
    }

    async fn is_there(&self, key: &gemini::ApiKey, name: &FileName, input: &Input) -> bool {
        self.ctx
            .gemini
            .get_file(key, name)
            .await
            .is_ok_and(|f| f.is_active() && f.sha256_hex.as_deref() == Some(input.sha256.as_str()))
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
        let batch = NewBatch {
            display_name: &attempt.display_name,
            input_file: &file,
            webhook_uris: &self.callback_url(attempt),
            priority: None,
        };
        let (namespace, name) = (self.job.namespace().unwrap_or_default(), self.job.name_any());
        let (uid, display_name) = (self.job.uid().unwrap_or_default(), &attempt.display_name);
        tracing::info!(target: "audit", namespace, job = name, uid, attempt = attempt.number, display_name, "create: sending");
        let answer = self.ctx.gemini.create_batch(key, &model, &batch).await;
        match &answer {
            Ok(batch) => {
                tracing::info!(target: "audit", namespace, job = name, uid, attempt = attempt.number, display_name, batch = %batch.name, "create: created");
            }
            Err(e) => {
                tracing::warn!(target: "audit", namespace, job = name, uid, attempt = attempt.number, display_name, error = %e, clean_refusal = e.is_refusal(), "create: no batch name");
            }
        }
        match answer {
            Ok(batch) => {
                memory.trouble = None;
                set_stage(memory, attempt, Stage::Created(Box::new(batch)));
            }
            Err(e) if e.is_refusal() => {
                self.refused_or_trouble(memory, attempt, RefusedCall::Create, &e, "creating the batch");
            }
            Err(_) => {} // unknown: it is looked for
        }
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

    /// All batches with the attempt's display name and file, from the newest to past the intent.
    async fn list_for(&self, attempt: &Attempt) -> Result<Vec<Batch>, gemini::Error> {
        let Some(key) = self.credential.map(|c| &c.key) else { return Err(gemini::Error::no_key()) };
        let mut found = Vec::new();
        let oldest = after(attempt.intent_time.0, -CLOCK_SKEW);
        let mut token: Option<String> = None;
        for _ in 0..MAX_PAGES {
            let page = self.ctx.gemini.list_batches(key, PAGE_SIZE, token.as_deref()).await?;
            let past = page.batches.iter().any(|b| b.create_time.is_some_and(|t| t < oldest));
            found.extend(page.batches.into_iter().filter(|b| b.display_name == attempt.display_name));
            match page.next_page_token {
                // An empty page with a token is not the end.
                Some(next) if !past => token = Some(next),
                _ => break,
            }
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
        tracing::warn!(target: "audit", namespace = self.job.namespace(), job = self.job.name_any(), display_name = attempt.display_name, file, "create: fenced");
        self.ctx.metrics.fenced.inc();
        memory.trouble = None;
        if let Some(Send { stage: Stage::Unsure(search), .. }) = &mut memory.send {
            search.fenced = true;
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
        let hint = decide::current_attempt(self.job)
            .and_then(|a| decide::new_hint(self.job, a))
            .map(ToOwned::to_owned);
        let answer = self.get(batch).await;
        memory.looks.looked(hint.as_deref(), now, &self.ctx.timings.hint_pauses);
        match answer {
            Ok(seen) => {
                memory.trouble = None;
                memory.remote = Some(Remote::Seen(Box::new(seen)));
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

    async fn get(&self, batch: &BatchName) -> Result<Batch, gemini::Error> {
        match self.credential {
            Some(credential) => self.ctx.gemini.get_batch(&credential.key, batch).await,
            None => Err(gemini::Error::no_key()),
        }
    }

    // ------------------------------------------------------------------------------- results

    async fn collect(
        &self,
        name: &BatchName,
        batch: Option<&Batch>,
        memory: &mut Memory,
    ) -> Result<(), kube::Error> {
        let Some(attempt) = decide::current_attempt(self.job) else { return Ok(()) };
        let keys = self.keys(attempt).await?;
        let limit = decide::output_name(self.job).map(|_| output::MAX_LINES_BYTES);
        match self.read_results(name, batch, Collector::new(keys, limit)).await {
            Ok(collected) => {
                memory.trouble = None;
                memory.unreadable = None;
                memory.collected = Some(collected);
            }
            Err(e) if e.is_absent() => {
                memory.trouble = None;
                memory.unreadable = Some(self.absent(memory.unreadable.as_ref()));
            }
            Err(e) => self.trouble(memory, "reading the results", &e),
        }
        Ok(())
    }

    async fn read_results(
        &self,
        name: &BatchName,
        batch: Option<&Batch>,
        mut collector: Collector,
    ) -> Result<Collected, gemini::Error> {
        let Some(key) = self.credential.map(|c| &c.key) else { return Err(gemini::Error::no_key()) };
        let inlined = batch.filter(|b| b.output_file.is_none()).and_then(|b| b.inlined.clone());
        let file = batch.map_or_else(|| name.derived_output_file(), Batch::output_file_or_derived);
        let (stream, file) = match inlined {
            // A small job may be answered with its results instead of a file.
            Some(lines) => (futures::stream::iter([Ok(Bytes::from(lines))]).boxed(), None),
            None => (self.ctx.gemini.download(key, &file).await?.stream, Some(file)),
        };
        let mut lines = results::Lines::new(stream);
        while let Some(line) = lines.next().await? {
            collector.bytes(line.with_break());
            match line.text().map(|text| (text, ResultLine::parse(text))) {
                Some((text, Ok(parsed))) => collector.line(text, &parsed),
                Some((text, Err(_))) if text.trim().is_empty() => {}
                _ => collector.malformed(line.content()),
            }
        }
        Ok(collector.finish(file.map(|f| f.to_string())))
    }

    /// The keys that were sent, if the input still is what was recorded.
    async fn keys(&self, attempt: &Attempt) -> Result<Keys, kube::Error> {
        let Some(recorded) = &attempt.input_sha256 else { return Ok(Keys::Unknown) };
        let input = observe::input(&self.ctx.client, self.job, self.ctx.max_input_bytes).await?;
        Ok(match input {
            Ok(input) if input.sha256 == *recorded => Keys::Known(input.keys),
            _ => Keys::Changed,
        })
    }

    async fn store(&self, name: &str, memory: &mut Memory) -> Result<(), kube::Error> {
        let Some(attempt) = decide::current_attempt(self.job) else { return Ok(()) };
        let Some(Lines::Kept(kept)) = memory.collected.as_ref().map(|c| &c.lines) else { return Ok(()) };
        let Some(collected) = &memory.collected else { return Ok(()) };
        let batch = match &memory.remote {
            Some(Remote::Seen(batch)) => Some(&**batch),
            _ => None,
        };
        let counts = ending::results(attempt, batch, collected_of(memory), None).requests.unwrap_or_default();
        let manifest = output::manifest(self.job, collected, counts);
        let done = output::store(&self.ctx.client, self.job, name, kept, &manifest).await?;
        memory.output = self.output_object(done, name, OutputObject::Stored { name: name.to_owned() });
        // Stored, or to be read again when it can be stored: no reason to hold them.
        if let Some(collected) = &mut memory.collected {
            collected.lines = Lines::Dropped;
        }
        Ok(())
    }

    fn output_object(&self, done: Done, name: &str, good: OutputObject) -> OutputObject {
        match done {
            Done::Yes => good,
            Done::Blocked(problem) => {
                tracing::debug!(name, %problem.reason, "output object not usable");
                let pause = SignedDuration::from_millis(
                    i64::try_from(self.ctx.timings.recheck.as_millis() * 3 / 4).unwrap_or(i64::MAX),
                );
                OutputObject::Blocked {
                    problem,
                    generation: self.job.metadata.generation.unwrap_or(0),
                    retry: Some(after(self.ctx.clock.now(), pause)),
                }
            }
        }
    }

    // ------------------------------------------------------------------------------ clean-up

    async fn cancel(&self, batch: &BatchName, memory: &mut Memory) {
        let Some(credential) = self.credential else { return };
        match self.ctx.gemini.cancel_batch(&credential.key, batch).await {
            Ok(()) => {}
            // Over already, or gone: nothing goes on. Under another key a 404 proves nothing.
            Err(e) if e.is_precondition() || (e.is_absent() && self.is_own_key()) => {}
            Err(e) => return self.cleanup_failed(memory, "cancelling the batch", &e),
        }
        tracing::info!(target: "audit", namespace = self.job.namespace(), job = self.job.name_any(), %batch, "cancelled");
        memory.cleanup.failed = None;
        memory.cleanup.cancelled = true;
        memory.cleanup.to_cancel.retain(|b| b != batch);
    }

    fn has_own_input(&self) -> bool {
        self.job.spec.input.gemini_file.is_none()
    }

    fn is_own_key(&self) -> bool {
        decide::current_attempt(self.job).is_some_and(|a| self.same_key(a))
    }

    fn same_key(&self, attempt: &Attempt) -> bool {
        self.credential.is_some_and(|c| c.fingerprint == attempt.credential_fingerprint)
    }

    async fn delete_input_file(&self, file: &str, now: Timestamp, memory: &mut Memory) {
        let Some((key, name)) = self.key_and_file(file) else { return };
        match self.ctx.gemini.delete_file(key, &name).await {
            Ok(()) => {}
            Err(e) if e.is_absent() && self.is_own_key() => {}
            Err(e) => {
                tracing::debug!(%now, "the input file could not be deleted yet");
                return self.cleanup_failed(memory, "deleting the input file", &e);
            }
        }
        memory.cleanup.failed = None;
        memory.cleanup.input_deleted = true;
    }

    fn cleanup_failed(&self, memory: &mut Memory, what: &str, error: impl std::fmt::Display) {
        tracing::warn!(namespace = self.job.namespace(), job = self.job.name_any(), %error, "{what} failed");
        memory.cleanup.failed =
            Some(Tries::again(memory.cleanup.failed, self.ctx.clock.now(), &self.ctx.timings.result_pauses));
    }

    // ------------------------------------------------------------------------------- outcomes

    fn key_and_file(&self, file: &str) -> Option<(&gemini::ApiKey, FileName)> {
        Some((&self.credential?.key, FileName::parse(file).ok()?))
    }

    /// A call that fails for now: tried again with growing pauses.
    fn trouble(&self, memory: &mut Memory, what: &str, error: &gemini::Error) {
        let failures = memory.trouble.as_ref().map_or(0, |t| t.failures).saturating_add(1);
        tracing::warn!(namespace = self.job.namespace(), job = self.job.name_any(), failures, %error, "{what} failed");
        let timings = &self.ctx.timings;
        // A key is repaired by somebody, who then expects the job to go on soon.
        let (reason, longest) = if error.is_credentials() {
            (Reason::CredentialsRefused, timings.recheck * 3 / 4)
        } else {
            (Reason::GeminiUnavailable, timings.trouble_longest)
        };
        let pause = backoff(timings.trouble_first, longest, failures);
        memory.trouble = Some(Trouble {
            failures,
            next: after(self.ctx.clock.now(), error.retry_after().map_or(pause, |r| r.max(pause))),
            problem: Problem::new(reason, format!("{what} fails: {error}; it is tried again")),
        });
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
        let pause = match problem.reason {
            Reason::CredentialsRefused => timings.recheck,
            _ => backoff(timings.quota_first, timings.quota_longest, refusals),
        };
        let pause = retry_after.map_or(pause, |asked| asked.max(pause));
        Refused {
            refusal: Refusal {
                call,
                reason: problem.reason.as_str().to_owned(),
                code: i32::from(code),
                time: MicroTime(now),
                retry_time: MicroTime(after(now, pause)),
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

fn collected_of(memory: &Memory) -> Option<&Collected> {
    memory.collected.as_ref()
}

fn set_stage(memory: &mut Memory, attempt: &Attempt, stage: Stage) {
    memory.send = Some(Send { send_id: attempt.send_id.clone(), stage });
}
