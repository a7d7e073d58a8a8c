//! An input that lies in an object store. Client required.
//!
//! It is read twice, each time as a stream. First it is checked line by line, counted and hashed, before anything is
//! intended. Then it is sent to Gemini while that hash is made again; the last chunk, without which there is no file, is
//! given back to the pass that asked, which sends it only if the hash is the same. So what was intended is what is paid
//! for, whatever happens to the objects meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, ResourceExt as _};
use memchr::memchr;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::gather::aside;
use super::identity::hex;
use super::join::Scratch;
use super::keys::{Hasher, Sorter};
use super::memory::{KnownProblem, Memory, Stored, after};
use super::run::Context;
use super::shards::{
    self,
    plan::{self, Limits},
};
use super::transfers::{self, Owner, Waited};
use super::{Credential, InputFacts, Problem, act, decide, earlier, input, request};
use crate::api::{GeminiBatchJob, LocalRef, Method, ObjectStoreInput, Reason};
use crate::crash;
use crate::gemini::{self, CHUNK_BYTES, FileName, Session, Upload};
use crate::store::{self, Access, Block, Kind, Location, Object, Purpose, Reader, Store, Stores};

/// Where it stands in the job, for messages.
const FIELD: &str = "spec.input.objectStore";
/// Below one prefix.
const MAX_OBJECTS: usize = 10_000;
/// A request with a document in it is large; more than this Gemini does not take.
const MAX_LINE_BYTES: usize = 32 << 20;

/// Why it can't be had.
#[derive(Debug)]
pub enum Failure {
    /// Somebody has to change something.
    Problem {
        /// What.
        problem: Problem,
        /// The objects that it is about: as long as they are the same, so is the problem.
        seen: Vec<Object>,
    },
    /// Nobody: it is tried again.
    Passing(Problem),
    /// The objects are not those any more that were checked.
    Changed,
    /// The API server refused or did not answer.
    Kubernetes(kube::Error),
}

impl From<store::Error> for Failure {
    fn from(e: store::Error) -> Self {
        if e.kind == Kind::Changed {
            return Self::Changed;
        }
        let problem = problem_of(&e);
        if e.kind == Kind::Unavailable { Self::Passing(problem) } else { Self::problem(problem) }
    }
}

impl Failure {
    fn problem(problem: Problem) -> Self {
        Self::Problem { problem, seen: Vec::new() }
    }
}

/// What a store's error is to a job.
#[must_use]
pub fn problem_of(e: &store::Error) -> Problem {
    let reason = match e.kind {
        Kind::Invalid => Reason::InputInvalid,
        Kind::NotAllowed => Reason::StoreNotAllowed,
        Kind::Credentials => Reason::CredentialsInvalid,
        Kind::Denied => Reason::StoreAccessDenied,
        Kind::NotFound => Reason::InputNotFound,
        Kind::TooLarge => Reason::InputTooLarge,
        Kind::Conflict => Reason::OutputConflict,
        Kind::Changed | Kind::Unavailable => Reason::StoreUnavailable,
    };
    Problem::new(reason, e.to_string())
}

/// How a job wants to get at a store: what its input and its output have in common.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Where it stands in the job.
    pub field: &'a str,
    /// What for.
    pub purpose: Purpose,
    /// The Secret.
    pub credentials: Option<&'a LocalRef>,
    /// Instead of the cloud's own.
    pub endpoint: Option<&'a str>,
    /// Of S3.
    pub region: Option<&'a str>,
}

/// Opens the store that holds `at`, with the credentials that the job names.
pub async fn open(
    client: &Client,
    stores: &Stores,
    namespace: &str,
    at: &Location,
    place: &Place<'_>,
) -> Result<Store, Failure> {
    let field = place.field;
    let secret = match place.credentials {
        Some(at) => Some((at.name.as_str(), secret(client, namespace, &at.name, field).await?)),
        None => None,
    };
    let access = Access {
        purpose: place.purpose,
        namespace,
        field,
        endpoint: place.endpoint,
        region: place.region,
        secret: secret.as_ref().map(|(name, data)| (*name, data)),
    };
    Ok(stores.open(at, &access)?)
}

async fn secret(
    client: &Client,
    namespace: &str,
    name: &str,
    field: &str,
) -> Result<store::SecretData, Failure> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let missing = |what: String| Failure::problem(Problem::new(Reason::CredentialsNotFound, what));
    match secrets.get_opt(name).await {
        Ok(Some(secret)) => {
            let data: BTreeMap<_, _> = secret.data.unwrap_or_default();
            Ok(data.into_iter().map(|(key, value)| (key, value.0)).collect())
        }
        Ok(None) => Err(missing(format!(
            "Secret {name} does not exist in this namespace: create it with credentials for the store, or correct \
             {field}.credentialsRef"
        ))),
        Err(e) if super::output::is(&e, 403) => Err(missing(format!(
            "the operator may not read Secret {name}, which {field}.credentialsRef names: an administrator has to allow it"
        ))),
        Err(e) => Err(Failure::Kubernetes(e)),
    }
}

/// All that reading takes, apart from the job's turn.
#[derive(Clone)]
struct Source {
    client: Client,
    stores: Arc<Stores>,
    namespace: String,
    of: ObjectStoreInput,
    method: Method,
    max_bytes: u64,
    split: Option<Limits>,
    scratch: Scratch,
}

impl Source {
    fn new(ctx: &Context, job: &GeminiBatchJob, of: &ObjectStoreInput) -> Self {
        Self {
            client: ctx.client.clone(),
            stores: Arc::clone(&ctx.stores),
            namespace: job.namespace().unwrap_or_default(),
            of: of.clone(),
            method: job.spec.method,
            max_bytes: ctx.max_input_bytes,
            split: shards::limits(job, ctx.max_input_bytes),
            scratch: ctx.scratch.clone(),
        }
    }

    /// What is too large for one batch may be read all the same: in parts, or one part of it.
    fn max_whole_bytes(&self) -> u64 {
        match &self.split {
            Some(limits) => {
                u64::try_from(limits.max_bytes).unwrap_or(0).saturating_mul(shards::MAX_SHARDS as u64)
            }
            None if self.of.range.is_some() => u64::MAX,
            None => self.max_bytes,
        }
    }

    /// From where to where it is read, in bytes over all objects.
    fn range(&self) -> Option<Range<u64>> {
        let range = self.of.range.as_ref()?;
        let start = u64::try_from(range.offset).unwrap_or_default();
        Some(start..start.saturating_add(u64::try_from(range.length).unwrap_or_default()))
    }

    fn lines<'a>(&self, store: &'a Store, objects: &'a [Object]) -> LineReader<'a> {
        LineReader { range: self.range(), ..LineReader::new(store, objects) }
    }

    /// What is wrong with a part is that it is not what it has to be.
    fn differs(&self, seen: &[Object]) -> Option<Failure> {
        let range = self.of.range.as_ref()?;
        let problem = plan::differs(shown(&self.of), range);
        Some(Failure::Problem { problem, seen: seen.to_vec() })
    }

    fn location(&self) -> Result<Location, store::Error> {
        match (&self.of.uri, &self.of.prefix) {
            (Some(uri), None) => Location::object(uri, "spec.input.objectStore.uri"),
            (None, Some(prefix)) => Location::prefix(prefix, "spec.input.objectStore.prefix"),
            _ => Err(store::Error::new(
                Kind::Invalid,
                "spec.input.objectStore needs exactly one of uri and prefix",
            )),
        }
    }

    async fn open(&self) -> Result<Store, Failure> {
        let place = Place {
            field: FIELD,
            purpose: Purpose::Read,
            credentials: self.of.credentials_ref.as_ref(),
            endpoint: self.of.endpoint.as_deref(),
            region: self.of.region.as_deref(),
        };
        open(&self.client, &self.stores, &self.namespace, &self.location()?, &place).await
    }

    /// The objects as they are now.
    async fn objects(&self, store: &Store) -> Result<Vec<Object>, Failure> {
        let at = self.location()?;
        let found = if self.of.uri.is_some() {
            vec![store.head(&at.path).await?]
        } else {
            store.list(&at.path, MAX_OBJECTS).await?
        };
        if found.is_empty() {
            return Err(Failure::problem(Problem::new(
                Reason::InputNotFound,
                format!(
                    "there is no object below {}: put some there, or correct {FIELD}.prefix",
                    shown(&self.of)
                ),
            )));
        }
        let bytes: u64 = found.iter().map(|object| object.size).sum();
        if bytes > self.max_whole_bytes() {
            return Err(Failure::Problem { problem: self.too_large(bytes), seen: found });
        }
        Ok(found)
    }

    fn too_large(&self, bytes: u64) -> Problem {
        Problem::new(
            Reason::InputTooLarge,
            format!(
                "{} holds {bytes} bytes; at most {} bytes are allowed: split the requests over several jobs",
                shown(&self.of),
                self.max_whole_bytes()
            ),
        )
    }
}

/// The place in the job's words.
fn shown(of: &ObjectStoreInput) -> &str {
    of.uri.as_deref().or(of.prefix.as_deref()).unwrap_or_default()
}

/// One line that is not blank.
struct Line<'a> {
    text: &'a str,
    /// Counted over all objects, blank ones included, from 0.
    number: u64,
    /// Where it begins, in bytes over all objects.
    start: u64,
    /// Where the next one begins.
    end: u64,
}

/// Reads objects line by line, one after the other.
struct LineReader<'a> {
    store: &'a Store,
    objects: &'a [Object],
    next: usize,
    reader: Option<Reader<'a>>,
    partial: Vec<u8>,
    number: u64,
    /// The number of the first line of each object that was begun.
    starts: Vec<u64>,
    /// Where the next line begins, in bytes over all objects.
    position: u64,
    /// Where the object at hand ends, in bytes over all objects.
    object_end: u64,
    /// Only these bytes are read, over all objects.
    range: Option<Range<u64>>,
}

impl<'a> LineReader<'a> {
    fn new(store: &'a Store, objects: &'a [Object]) -> Self {
        Self {
            store,
            objects,
            next: 0,
            reader: None,
            partial: Vec::new(),
            number: 0,
            starts: Vec::new(),
            position: 0,
            object_end: 0,
            range: None,
        }
    }

    /// Where a line stands, for messages.
    fn place(&self, number: u64) -> String {
        let index = self.starts.partition_point(|start| *start <= number).saturating_sub(1);
        let start = self.starts.get(index).copied().unwrap_or_default();
        let name = self.objects.get(index).map(|object| self.store.uri(&object.path)).unwrap_or_default();
        format!("{name}: line {}", number - start + 1)
    }

    fn invalid(&self, number: u64, what: &str) -> Failure {
        let problem = Problem::new(Reason::InputInvalid, format!("{} {what}", self.place(number)));
        Failure::Problem { problem, seen: self.objects.to_vec() }
    }

    /// Reads some bytes and gives each line that is whole to `each`, which says what is wrong with it. Whether there is
    /// more.
    async fn step(&mut self, mut each: impl FnMut(Line<'_>) -> Result<(), String>) -> Result<bool, Failure> {
        let reader = if let Some(reader) = &mut self.reader {
            reader
        } else {
            let Some(object) = self.objects.get(self.next) else { return Ok(false) };
            self.next += 1;
            self.starts.push(self.number);
            let begin = self.object_end;
            self.object_end += object.size;
            let range = self.range.clone().unwrap_or(0..u64::MAX);
            if range.start >= self.object_end && object.size > 0 || range.end <= begin {
                return Ok(true);
            }
            let from = range.start.saturating_sub(begin);
            self.position = begin + from;
            self.reader.insert(self.store.read_part(object, from, range.end - begin))
        };
        if let Some(bytes) = reader.next().await? {
            self.feed(&bytes, &mut each)?;
        } else {
            self.reader = None;
            if !self.partial.is_empty() {
                self.feed(b"\n", &mut each)?; // the last line need not have one
            }
        }
        Ok(true)
    }

    fn feed(
        &mut self,
        bytes: &[u8],
        each: &mut impl FnMut(Line<'_>) -> Result<(), String>,
    ) -> Result<(), Failure> {
        let mut rest = bytes;
        while let Some(end) = memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end);
            rest = &after[1..];
            if self.partial.is_empty() {
                self.line(line, each)?;
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(line);
                self.line(&whole, each)?;
                whole.clear();
                whole.shrink_to(1 << 20);
                self.partial = whole;
            }
        }
        self.partial.extend_from_slice(rest);
        if self.partial.len() > MAX_LINE_BYTES {
            return Err(self.invalid(self.number, &format!("has more than {MAX_LINE_BYTES} bytes")));
        }
        Ok(())
    }

    fn line(
        &mut self,
        mut line: &[u8],
        each: &mut impl FnMut(Line<'_>) -> Result<(), String>,
    ) -> Result<(), Failure> {
        let number = self.number;
        self.number += 1;
        let start = self.position;
        // The last line of an object need not have a line break.
        let end = (start + line.len() as u64 + 1).min(self.object_end);
        self.position = end;
        if self.starts.last() == Some(&number) {
            if line.starts_with(&[0x1f, 0x8b]) || line.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
                return Err(
                    self.invalid(number, "is compressed, which is not read: store it as plain JSON Lines")
                );
            }
            line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
        }
        let Ok(text) = std::str::from_utf8(line) else {
            return Err(self.invalid(number, "is not valid UTF-8"));
        };
        let text = text.trim();
        if text.is_empty() {
            return Ok(());
        }
        each(Line { text, number, start, end }).map_err(|what| self.invalid(number, &what))
    }
}

/// Count, size and hash of lines as they are uploaded.
#[derive(Default)]
struct Tally {
    count: i64,
    bytes: u64,
    hash: Sha256,
}

impl Tally {
    fn add(&mut self, line: &str) {
        self.count += 1;
        self.bytes += line.len() as u64 + 1;
        self.hash.update(line);
        self.hash.update(b"\n");
    }

    fn facts(self, whole_sha256: Option<&str>) -> InputFacts {
        let sha256 = hex(&self.hash.finalize());
        InputFacts {
            whole_sha256: whole_sha256.map_or_else(|| sha256.clone(), ToOwned::to_owned),
            sha256,
            count: self.count,
            bytes: i64::try_from(self.bytes).unwrap_or(i64::MAX),
        }
    }
}

/// The temporary directory is the operator's own affair.
fn no_room(e: &std::io::Error) -> Failure {
    Failure::Passing(Problem::new(
        Reason::StoreUnavailable,
        format!(
            "the operator can't write to its temporary directory ({}): an administrator has to give it room there \
             (--temporary-bytes, TMPDIR); it is tried again",
            e.kind()
        ),
    ))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other);
    done.and_then(|done| done).map_err(|e| no_room(&e))
}

async fn spilled(mut sorter: Sorter) -> Result<Sorter, Failure> {
    if !sorter.is_full() {
        return Ok(sorter);
    }
    blocking(move || sorter.spill().map(|()| sorter)).await
}

/// The first pass. `known`: objects and the problem that they had; if they are the same, so is it. `answered`: gives the
/// keys that have a result to the sorter, if this is a further attempt.
async fn read(
    source: Source,
    known: Option<(Vec<Object>, Problem)>,
    answered: impl AsyncFnOnce(Sorter) -> Result<Option<Sorter>, Failure>,
) -> Result<Stored, Failure> {
    let store = source.open().await?;
    let objects = source.objects(&store).await?;
    if let Some((seen, problem)) = known
        && seen == objects
    {
        return Err(Failure::Problem { problem, seen });
    }
    let hasher = Hasher::default();
    let mut sorter = Sorter::new(&hasher, source.scratch.clone());
    let mut whole = Tally::default();
    let method = source.method;
    let mut cutter = source.split.clone().map(plan::Cutter::new);
    let mut lines = source.lines(&store, &objects);
    let check = |line: &Line<'_>| {
        input::check_line(line.text, method).map_err(|what| {
            let example = request::example(method);
            format!("{what}. Each line must be a JSON object like {{\"key\": \"…\", \"request\": {example}}}")
        })
    };
    loop {
        let step = lines.step(|line| {
            sorter.push(&check(&line)?, line.number);
            whole.add(line.text);
            cutter.as_mut().map_or(Ok(()), |cutter| cutter.push(line.text, line.start, line.end))
        });
        match step.await {
            // What nobody can use is not read to its end.
            Ok(true) if cutter.as_ref().is_some_and(plan::Cutter::is_in_vain) => break,
            Ok(true) => {}
            Ok(false) => break,
            Err(e @ Failure::Problem { .. }) => return Err(source.differs(&objects).unwrap_or(e)),
            Err(e) => return Err(e),
        }
        sorter = spilled(sorter).await?;
        // A byte for each object's last newline may have come on top.
        if whole.bytes > source.max_whole_bytes() {
            return Err(Failure::Problem { problem: source.too_large(whole.bytes), seen: objects.clone() });
        }
    }
    if whole.count == 0 && source.of.range.is_none() {
        let problem = Problem::new(
            Reason::InputInvalid,
            format!("{} holds no requests: add at least one line", shown(&source.of)),
        );
        return Err(Failure::Problem { problem, seen: objects.clone() });
    }
    let answered = answered(Sorter::new(&hasher, source.scratch.clone())).await?;
    let (duplicate, answered) = blocking(move || {
        let answered = answered.map(Sorter::sorted).transpose()?;
        sorter.sorted()?.examine(answered)
    })
    .await?;
    if let Some((first, second)) = duplicate {
        let problem = Problem::new(
            Reason::InputInvalid,
            format!(
                "{} has the same key as {}; keys must be unique, they join each result with its request",
                lines.place(second),
                lines.place(first)
            ),
        );
        return Err(Failure::Problem { problem, seen: objects.clone() });
    }
    let facts = whole.facts(None);
    if source.of.range.as_ref().is_some_and(|range| range.sha256 != facts.sha256) {
        return Err(source.differs(&objects).unwrap_or(Failure::Changed));
    }
    let plan = match cutter.map(|cutter| cutter.finish(shown(&source.of))).transpose() {
        Ok(plan) => plan.map(Arc::new),
        Err(problem) => return Err(Failure::Problem { problem, seen: objects }),
    };
    if answered.is_empty() {
        return Ok(Stored { facts, of: source.of, method, objects, answered: None, plan });
    }
    // What is left has a hash of its own, which has to be known before it is intended to be sent.
    let mut left = Tally::default();
    let mut whole = Tally::default();
    let mut lines = source.lines(&store, &objects);
    while lines
        .step(|line| {
            whole.add(line.text);
            if !answered.contains(line.number) {
                left.add(line.text);
            }
            Ok(())
        })
        .await?
    {}
    if whole.facts(None) != facts {
        return Err(Failure::Changed);
    }
    let facts = left.facts(Some(&facts.sha256));
    Ok(Stored { facts, of: source.of, method, objects, answered: Some(answered), plan })
}

/// What the job carries next, if it is known by now; `None`: that is being found out, or will be tried again.
pub async fn observe(
    ctx: &Arc<Context>,
    job: &GeminiBatchJob,
    of: &ObjectStoreInput,
    key: &Arc<Credential>,
    memory: &mut Memory,
) -> Result<Option<Result<Arc<Stored>, Problem>>, kube::Error> {
    let now = ctx.clock.now();
    if let Some(stored) = memory.stored.as_ref().filter(|s| s.of == *of && s.method == job.spec.method) {
        return Ok(Some(Ok(Arc::clone(stored))));
    }
    let known = memory.stored_problem.as_ref().filter(|p| p.of == *of && p.method == job.spec.method);
    if let Some(known) = known.filter(|known| known.next > now) {
        return Ok(Some(Err(known.problem.clone())));
    }
    if memory.transfer.is_some() || memory.trouble.as_ref().is_some_and(|t| t.next > now) {
        return Ok(None);
    }
    let before =
        known.map(|known| (known.seen.clone(), known.problem.clone())).filter(|(seen, _)| !seen.is_empty());
    let (attempt, method) = (decide::attempt_at_hand(job), job.spec.method.as_str());
    let what = format!("read for {attempt} {method} {}", serde_json::json!(of));
    let source = Source::new(ctx, job, of);
    let (ctx2, job2, key2) = (Arc::clone(ctx), job.clone(), Arc::clone(key));
    let work = || {
        // What earlier attempts left may have to go to the temporary directory.
        aside(async move {
            read(source, before, async move |sorter| answered(&ctx2, &job2, &key2, sorter).await).await
        })
    };
    let waited = ctx.transfers.run(transfers::Kind::Input, &owner(job), &what, woken(ctx, job), work).await;
    Ok(match waited {
        Waited::Done(Ok(stored)) => {
            memory.trouble = None;
            memory.stored_problem = None;
            let stored = Arc::new(stored);
            memory.stored = Some(Arc::clone(&stored));
            Some(Ok(stored))
        }
        Waited::Done(Err(Failure::Problem { problem, seen })) => {
            memory.trouble = None;
            let next = after(ctx.clock.now(), ctx.timings.recheck / 2);
            let (of, method) = (of.clone(), job.spec.method);
            let known = KnownProblem { of, method, problem: problem.clone(), seen, next };
            memory.stored_problem = Some(Box::new(known));
            Some(Err(problem))
        }
        Waited::Done(Err(Failure::Passing(problem))) => {
            memory.trouble = Some(act::passing(ctx, memory.trouble.as_ref(), problem));
            None
        }
        Waited::Done(Err(Failure::Changed)) => {
            memory.trouble = Some(act::passing(ctx, memory.trouble.as_ref(), changed(of)));
            None
        }
        Waited::Done(Err(Failure::Kubernetes(e))) => return Err(e),
        // What was wrong is said until it is known to be right.
        Waited::Running | Waited::Queued if known.is_some() => known.map(|known| Err(known.problem.clone())),
        Waited::Running => {
            memory.transfer = Some(waiting(format!("the input at {} is being read and checked", shown(of))));
            None
        }
        Waited::Queued => {
            memory.transfer = Some(queued(ctx, "the input waits"));
            None
        }
    })
}

fn changed(of: &ObjectStoreInput) -> Problem {
    Problem::new(
        Reason::StoreUnavailable,
        format!("{} was changed while it was read; it is read again", shown(of)),
    )
}

pub(super) fn waiting(message: impl Into<String>) -> Problem {
    Problem::new(Reason::WaitingForTransfer, message)
}

pub(super) fn queued(ctx: &Context, what: &str) -> Problem {
    waiting(format!(
        "{what} for other jobs' transfers to end, of which {} run at a time, and not all of one namespace (--transfers)",
        ctx.transfers.size()
    ))
}

pub(super) fn owner(job: &GeminiBatchJob) -> Owner {
    Owner {
        uid: job.uid().unwrap_or_default(),
        namespace: job.namespace().unwrap_or_default(),
        name: job.name_any(),
    }
}

pub(super) fn woken(ctx: &Arc<Context>, job: &GeminiBatchJob) -> impl FnOnce() + Send + 'static {
    let (ctx, uid) = (Arc::clone(ctx), job.uid().unwrap_or_default());
    move || ctx.unsettle(&uid)
}

/// The keys that have a result by earlier attempts.
async fn answered(
    ctx: &Context,
    job: &GeminiBatchJob,
    key: &Credential,
    mut sorter: Sorter,
) -> Result<Option<Sorter>, Failure> {
    let read = earlier::answered(ctx, job, &key.key, |key| {
        sorter.push(key, 0);
        if sorter.is_full() { sorter.spill() } else { Ok(()) }
    })
    .await
    .map_err(Failure::Kubernetes)?;
    match read {
        Ok(()) => Ok(Some(sorter)),
        Err(problem) if matches!(problem.reason, Reason::GeminiUnavailable | Reason::StoreUnavailable) => {
            Err(Failure::Passing(problem))
        }
        Err(problem) => Err(Failure::problem(problem)),
    }
}

/// All of an upload but its last chunk.
pub struct Prepared {
    /// The upload.
    pub session: Session,
    /// Where the last chunk begins.
    pub offset: u64,
    /// The last chunk.
    pub last: Bytes,
}

/// Why there is none.
pub enum Unsent {
    /// The store's side.
    Store {
        /// What is wrong.
        failure: Failure,
        /// The upload, to go on with.
        session: Option<Session>,
    },
    /// Gemini's side.
    Gemini {
        /// What is wrong.
        error: gemini::Error,
        /// The upload, to go on with.
        session: Option<Session>,
    },
}

/// What the upload is called.
pub struct Name {
    /// At Gemini.
    pub file: FileName,
    /// For people.
    pub display: String,
}

/// The second pass, or more of it. Goes on with an upload that broke off.
pub async fn prepare(
    ctx: &Arc<Context>,
    job: &GeminiBatchJob,
    stored: &Arc<Stored>,
    key: &Arc<Credential>,
    name: Name,
    session: Option<Session>,
) -> Result<Result<Prepared, Unsent>, Problem> {
    let what = format!("send {}", name.file);
    let source = Source::new(ctx, job, &stored.of);
    let (gemini, stored2, key) = (ctx.gemini.clone(), Arc::clone(stored), Arc::clone(key));
    let work = || async move { send(source, &stored2, gemini, &key, &name, session).await };
    match ctx.transfers.run(transfers::Kind::Input, &owner(job), &what, woken(ctx, job), work).await {
        Waited::Done(done) => Ok(done),
        Waited::Running => {
            Err(waiting(format!("the input is on its way from {} to Gemini", shown(&stored.of))))
        }
        Waited::Queued => Err(queued(ctx, "the input waits")),
    }
}

async fn send(
    source: Source,
    stored: &Stored,
    gemini: gemini::Client,
    key: &Credential,
    name: &Name,
    session: Option<Session>,
) -> Result<Prepared, Unsent> {
    let size = u64::try_from(stored.facts.bytes).unwrap_or_default();
    let store = match source.open().await {
        Ok(store) => store,
        Err(failure) => return Err(Unsent::Store { failure, session }),
    };
    let going_on = match session {
        Some(session) => match gemini.uploaded(&session).await {
            Ok(at) => at.filter(|at| *at < size).map(|at| (session, at)),
            Err(e) if e.is_refusal() => None,
            Err(error) => return Err(Unsent::Gemini { error, session: Some(session) }),
        },
        None => None,
    };
    let (session, begin) = if let Some(going_on) = going_on {
        going_on
    } else {
        let upload =
            Upload { name: &name.file, display_name: &name.display, mime_type: "application/jsonl", size };
        match gemini.begin_upload(&key.key, &upload).await {
            Ok(session) => (session, 0),
            Err(error) => return Err(Unsent::Gemini { error, session: None }),
        }
    };
    // Of three chunks one is filled, one waits and one is on its way.
    let (chunks, mut ready) = mpsc::channel::<Bytes>(1);
    let reading = fill(source.lines(&store, &stored.objects), stored, begin, chunks);
    let sending = async {
        let mut offset = begin;
        while let Some(chunk) = ready.recv().await {
            offset = gemini.upload_chunk(&session, offset, &chunk).await?;
            crash::at("upload", "chunk");
        }
        Ok(offset)
    };
    // Whichever fails first ends the other.
    match futures::future::try_join(async { reading.await.map_err(Side::Store) }, async {
        sending.await.map_err(Side::Gemini)
    })
    .await
    {
        Ok((last, offset)) => Ok(Prepared { session, offset, last }),
        Err(Side::Store(failure)) => Err(Unsent::Store { failure, session: Some(session) }),
        Err(Side::Gemini(error)) => Err(Unsent::Gemini { error, session: Some(session) }),
    }
}

enum Side {
    Store(Failure),
    Gemini(gemini::Error),
}

/// Gives whole chunks away, from that byte of the upload on, and returns the last one if all was as it had been checked.
async fn fill(
    mut lines: LineReader<'_>,
    stored: &Stored,
    begin: u64,
    chunks: mpsc::Sender<Bytes>,
) -> Result<Bytes, Failure> {
    let mut tally = Tally::default();
    let mut cutter = Cutter { skip: begin, open: None, full: VecDeque::new() };
    while lines
        .step(|line| {
            if stored.answered.as_ref().is_some_and(|lines| lines.contains(line.number)) {
                return Ok(());
            }
            tally.add(line.text);
            cutter.push(line.text.as_bytes());
            cutter.push(b"\n");
            Ok(())
        })
        .await?
    {
        while let Some(chunk) = cutter.full.pop_front() {
            if chunks.send(chunk).await.is_err() {
                std::future::pending::<()>().await; // the other side says what is wrong
            }
        }
    }
    let now = tally.facts(Some(&stored.facts.whole_sha256));
    if now != stored.facts {
        return Err(Failure::Changed);
    }
    Ok(cutter.open.map(Block::freeze).unwrap_or_default())
}

/// Cuts bytes into chunks, each with memory of its own and no more than that: three of them are all that a transfer holds.
struct Cutter {
    /// Bytes that have arrived already.
    skip: u64,
    /// The chunk that is being filled. Never empty once there was a byte: the last one must not be.
    open: Option<Block>,
    full: VecDeque<Bytes>,
}

impl Cutter {
    fn push(&mut self, bytes: &[u8]) {
        let known = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
        self.skip -= known as u64;
        let mut rest = &bytes[known..];
        while !rest.is_empty() {
            if let Some(full) = self.open.take_if(|open| open.is_full()) {
                self.full.push_back(full.freeze());
            }
            rest = self.open.get_or_insert_with(|| Block::new(CHUNK_BYTES)).push(rest);
        }
    }
}

/// Gives the keys of all requests to `take`, which says whether to go on. Whether they are what hashed to `sha256`.
pub async fn keys(
    ctx: &Context,
    job: &GeminiBatchJob,
    of: &ObjectStoreInput,
    sha256: &str,
    mut take: impl FnMut(&str) -> bool,
) -> Result<bool, Failure> {
    let source = Source::new(ctx, job, of);
    let store = source.open().await?;
    let objects = source.objects(&store).await?;
    let mut tally = Tally::default();
    let mut lines = source.lines(&store, &objects);
    let mut going_on = true;
    while going_on
        && lines
            .step(|line| {
                tally.add(line.text);
                going_on = going_on && take(&input::check_line(line.text, source.method)?);
                Ok(())
            })
            .await?
    {}
    Ok(tally.facts(None).sha256 == sha256)
}

/// Whether that is worth waiting for when results are to be joined, which expire: what is gone is gone.
#[must_use]
pub fn worth_waiting(reason: Reason, ended: Option<Timestamp>, ctx: &Context) -> bool {
    !matches!(reason, Reason::InputNotFound | Reason::InputInvalid)
        && ended.is_none_or(|ended| after(ended, ctx.timings.result_patience) > ctx.clock.now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The lines of a range, as they are sent.
    async fn read_range(store: &Store, objects: &[Object], range: Option<Range<u64>>) -> Vec<String> {
        let mut lines = LineReader { range, ..LineReader::new(store, objects) };
        let mut all = Vec::new();
        while lines
            .step(|line| {
                all.push(line.text.to_owned());
                Ok(())
            })
            .await
            .unwrap()
        {}
        all
    }

    #[tokio::test]
    async fn each_part_of_several_objects_is_read_by_itself() {
        let directory = tempfile::tempdir().unwrap();
        // No line break at an end, a blank line, another sort of break, and a part that ends within an object.
        for (name, content) in
            [("a", "one\ntwo\n\nthree"), ("b", "\nfour\r\n"), ("c", "  five \nsix\nseven\n")]
        {
            std::fs::write(directory.path().join(name), content).unwrap();
        }
        let mapped = [("m".to_owned(), directory.path().to_owned())].into();
        let stores = Stores::new(store::Settings { mapped, ..store::Settings::default() }).unwrap();
        let at = Location::prefix("file://m/", FIELD).unwrap();
        let access = Access {
            purpose: Purpose::Read,
            namespace: "ns",
            field: FIELD,
            endpoint: None,
            region: None,
            secret: None,
        };
        let store = stores.open(&at, &access).unwrap();
        let objects = store.list(&at.path, 10).await.unwrap();
        let whole = read_range(&store, &objects, None).await;
        assert_eq!(whole, ["one", "two", "three", "four", "five", "six", "seven"]);
        for most in 1..=7 {
            let limits = Limits { max_requests: Some(most), max_bytes: 1 << 20, expected: None };
            let mut cutter = plan::Cutter::new(limits);
            let mut lines = LineReader::new(&store, &objects);
            while lines.step(|line| cutter.push(line.text, line.start, line.end)).await.unwrap() {}
            let plan = cutter.finish("x").unwrap();
            let mut all = Vec::new();
            for part in &plan.parts {
                let start = u64::try_from(part.offset).unwrap();
                let range = start..start + u64::try_from(part.length).unwrap();
                let read = read_range(&store, &objects, Some(range)).await;
                assert_eq!(read.len(), usize::try_from(part.requests).unwrap(), "{plan:?}");
                let mut tally = Tally::default();
                for line in &read {
                    tally.add(line);
                }
                assert_eq!(tally.facts(None).sha256, part.sha256);
                all.extend(read);
            }
            assert_eq!(all, whole, "{most}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// However the bytes come, and from wherever it goes on: all of them once, in whole chunks, the last one not empty.
        #[test]
        fn chunks_are_the_bytes(
            sizes in prop::collection::vec(0usize..(CHUNK_BYTES * 3 / 2), 1..4),
            skip in 0usize..CHUNK_BYTES,
        ) {
            let bytes: Vec<u8> = (0..sizes.iter().sum()).map(|i: usize| i.to_le_bytes()[i % 3]).collect();
            let mut cutter = Cutter { skip: skip as u64, open: None, full: VecDeque::new() };
            let mut rest = bytes.as_slice();
            for size in sizes {
                let (part, after) = rest.split_at(size);
                cutter.push(part);
                rest = after;
            }
            prop_assert!(cutter.full.iter().all(|chunk| chunk.len() == CHUNK_BYTES));
            let open = cutter.open.map(Block::freeze).unwrap_or_default();
            prop_assert!(bytes.len() <= skip || !open.is_empty());
            let mut all: Vec<u8> = cutter.full.iter().flat_map(|chunk| chunk.to_vec()).collect();
            all.extend_from_slice(&open);
            prop_assert!(all == bytes[skip.min(bytes.len())..]);
        }
    }
}
