//! Results in an object store: a place that is reserved before anything is paid, objects under a name of their own, and a
//! manifest that is published last. Client required.
//!
//! ```text
//! URI/reservation.json               whose place it is, while there is no manifest
//! URI/UID-ATTEMPT-WRITER/…jsonl      what one process wrote of one attempt
//! URI/manifest.json                  which of these hold the results
//! ```
//!
//! The manifest is the only name that readers need, and the only thing that is ever replaced: by the same job alone, and
//! only if it still is what was seen. So readers see all of an attempt or nothing of it, and of two processes that both
//! think they lead one publishes; the other finds that out and takes its own objects back. What a process left that was
//! killed in the midst of it is named by the reservation, and deleted by the next one.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kube::ResourceExt as _;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::Problem;
use super::collect::Kept;
use super::gather::{ResultFile, Unmatched, no_room};
use super::identity;
use super::join::What;
use super::output::MANIFEST_KEY;
use super::run::Context;
use super::shards::merge::Whole;
use super::stored::{self, Failure, Place};
use crate::api::{GeminiBatchJob, ObjectStoreOutput, Reason, StoredObject, StoredOutput, Usage};
use crate::crash;
use crate::store::{self, Expect, Kind, Location, Object, Purpose, Put, Store, Version};

/// Where it stands in the job, for messages.
const FIELD: &str = "spec.output.objectStore";
const RESERVATION: &str = "reservation.json";
/// More than any of ours has.
const MAX_MANIFEST_BYTES: u64 = 1 << 20;
/// A reservation is asked for in the midst of a pass.
const PATIENCE: Duration = Duration::from_secs(20);
/// What is read from the spool at once.
const CHUNK_BYTES: usize = 256 << 10;

/// What came of an attempt to use the place.
#[derive(Debug)]
pub enum Done<T> {
    /// It is ours.
    Yes(T),
    /// It can't be used.
    Blocked(Problem),
    /// Not now.
    Passing(Problem),
}

/// Whose place it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    /// The same manifests are often applied to several clusters.
    #[serde(default)]
    cluster: String,
    namespace: String,
    name: String,
    uid: String,
}

impl Owner {
    fn of(ctx: &Context, job: &GeminiBatchJob) -> Self {
        Self {
            cluster: ctx.ring().cluster_id.clone(),
            namespace: job.namespace().unwrap_or_default(),
            name: job.name_any(),
            uid: job.uid().unwrap_or_default(),
        }
    }

    /// A predecessor of the same name, which has been deleted.
    fn succeeds(&self, other: &Self) -> bool {
        self.cluster == other.cluster && self.namespace == other.namespace && self.name == other.name
    }

    /// For messages.
    fn told_to(&self, asker: &Self) -> String {
        let Self { cluster, namespace, name, .. } = self;
        if *cluster == asker.cluster {
            format!("{name} in namespace {namespace}")
        } else {
            format!("{name} in namespace {namespace} of another cluster ({cluster})")
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Reservation {
    job: Owner,
    /// Where results are being written, so that nobody has to look for what is left of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    writing: Option<String>,
}

/// What is read of a manifest.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    job: Owner,
    #[serde(default)]
    attempt: i32,
    #[serde(default)]
    objects: Vec<StoredObject>,
    #[serde(default)]
    result_file: FileFacts,
    #[serde(default)]
    unmatched_lines: LineCounts,
    #[serde(default)]
    usage: Usage,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct FileFacts {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    bytes: i64,
    #[serde(default)]
    sha256: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct LineCounts {
    #[serde(default)]
    duplicate: i64,
    #[serde(default)]
    foreign: i64,
    #[serde(default)]
    malformed: i64,
}

/// What a store's error is to a job whose output is meant.
#[must_use]
pub fn failure(e: &store::Error) -> Failure {
    let reason = match e.kind {
        Kind::Invalid | Kind::NotFound => Reason::OutputNotWritable,
        Kind::NotAllowed => Reason::StoreNotAllowed,
        Kind::Credentials => Reason::CredentialsInvalid,
        Kind::Denied => Reason::StoreAccessDenied,
        // Nothing of ours is.
        Kind::TooLarge | Kind::Conflict => Reason::OutputConflict,
        Kind::Changed | Kind::Unavailable => Reason::StoreUnavailable,
    };
    let problem = Problem::new(reason, e.to_string());
    if reason == Reason::StoreUnavailable {
        Failure::Passing(problem)
    } else {
        Failure::Problem { problem, seen: Vec::new() }
    }
}

/// The place, opened.
pub struct Shelf {
    store: Arc<Store>,
    /// The URI without a / at its end.
    root: Location,
    /// As the job has it, for messages.
    uri: String,
    owner: Owner,
    /// Reservations of which one is there if the job has any.
    proofs: Vec<Path>,
}

impl Shelf {
    async fn open(ctx: &Context, job: &GeminiBatchJob, at: &ObjectStoreOutput) -> Result<Self, Failure> {
        let root = Location::directory(&at.uri, "spec.output.objectStore.uri").map_err(|e| failure(&e))?;
        let place = Place {
            field: FIELD,
            purpose: Purpose::Write,
            credentials: at.credentials_ref.as_ref(),
            endpoint: at.endpoint.as_deref(),
            region: at.region.as_deref(),
        };
        let namespace = job.namespace().unwrap_or_default();
        let store = match stored::open(&ctx.client, &ctx.stores, &namespace, &root, &place).await {
            Ok(store) => store,
            // What is wrong with the job's words for an input is wrong with these for an output.
            Err(Failure::Problem { problem, .. }) if problem.reason == Reason::InputInvalid => {
                let problem = Problem { reason: Reason::OutputNotWritable, ..problem };
                return Err(Failure::Problem { problem, seen: Vec::new() });
            }
            Err(other) => return Err(other),
        };
        Ok(Self::within(ctx, Arc::new(store), root, job, at))
    }

    fn within(
        ctx: &Context,
        store: Arc<Store>,
        root: Location,
        job: &GeminiBatchJob,
        at: &ObjectStoreOutput,
    ) -> Self {
        let proofs = vec![root.path.clone().join(RESERVATION)];
        let uri = at.uri.trim_end_matches('/').to_owned();
        Self { store, root, uri, owner: Owner::of(ctx, job), proofs }
    }

    fn path(&self, name: &str) -> Path {
        // Joined part by part, since a slash within one would be encoded.
        name.split('/').fold(self.root.path.clone(), Path::join)
    }

    async fn fetch(&self, name: &str) -> Result<Option<(Bytes, Version)>, Failure> {
        match self.store.fetch(&self.path(name), MAX_MANIFEST_BYTES).await {
            Err(refused) => self.unless_absent(refused).await.map(|()| None),
            Ok(there) => Ok(there),
        }
    }

    /// An object, if it is there.
    async fn head(&self, name: &str) -> Result<Option<Object>, Failure> {
        match self.store.head(&self.path(name)).await {
            Ok(object) => Ok(Some(object)),
            Err(e) if e.kind == Kind::NotFound => Ok(None),
            Err(refused) => self.unless_absent(refused).await.map(|()| None),
        }
    }

    /// Whether the object that this was said about does not exist. To whoever may not list the bucket S3 does not tell that:
    /// it refuses. Whoever can read a reservation of the same job is not refused.
    async fn unless_absent(&self, refused: store::Error) -> Result<(), Failure> {
        if refused.kind == Kind::Denied {
            for proof in &self.proofs {
                if let Ok(Some(_)) = self.store.fetch(proof, MAX_MANIFEST_BYTES).await {
                    return Ok(());
                }
            }
        }
        Err(failure(&refused))
    }

    async fn put(&self, name: &str, content: &Value, expect: Expect<'_>) -> Result<Put, Failure> {
        let content = Bytes::from(format!("{content:#}\n"));
        self.store.put(&self.path(name), content, expect).await.map_err(|e| failure(&e))
    }

    /// The manifest, if it is this job's; a problem, if it is somebody else's.
    async fn manifest(&self) -> Result<Option<(Manifest, Version)>, Failure> {
        let Some((content, version)) = self.fetch(MANIFEST_KEY).await? else { return Ok(None) };
        match serde_json::from_slice::<Manifest>(&content) {
            Ok(manifest) if manifest.job.uid == self.owner.uid => Ok(Some((manifest, version))),
            Ok(manifest) if self.owner.succeeds(&manifest.job) => Err(self.conflict(
                MANIFEST_KEY,
                "holds the results of an earlier job of the same name, which has been deleted",
            )),
            Ok(manifest) => {
                let whose = manifest.job.told_to(&self.owner);
                Err(self.conflict(MANIFEST_KEY, &format!("holds the results of another job, {whose}")))
            }
            Err(_) => Err(self.conflict(MANIFEST_KEY, "has a manifest that is not this operator's")),
        }
    }

    /// The manifest as above, where perhaps nothing was written yet, so that nothing can be read to tell a refusal from
    /// absence: then the reservation is written blindly, which overwrites nothing.
    async fn first_look(&self) -> Result<Option<(Manifest, Version)>, Failure> {
        match self.manifest().await {
            Err(refused) if is_refusal(&refused) => {
                let mine = json!(Reservation { job: self.owner.clone(), writing: None });
                if self.put(RESERVATION, &mine, Expect::Absent).await? == Put::Occupied {
                    return Err(refused);
                }
                self.manifest().await
            }
            other => other,
        }
    }

    fn conflict(&self, object: &str, what: &str) -> Failure {
        let uri = &self.uri;
        let problem = Problem::new(
            Reason::OutputConflict,
            format!(
                "{uri} {what}, so nothing is written there: name another place in {FIELD}.uri, or, if what it holds is not \
                 needed any more, delete {uri}/{object}"
            ),
        );
        Failure::Problem { problem, seen: Vec::new() }
    }

    /// Makes the place the job's own, and says where it is going to write. What is left there by a process that was killed
    /// is deleted.
    async fn claim(&self, published: Option<&Manifest>, writing: Option<&str>) -> Result<(), Failure> {
        let mine = Reservation { job: self.owner.clone(), writing: writing.map(ToOwned::to_owned) };
        let content = json!(mine);
        // Somebody else may change it in between, but not each time.
        for _ in 0..3 {
            let Some((there, version)) = self.fetch(RESERVATION).await? else {
                match self.put(RESERVATION, &content, Expect::Absent).await? {
                    Put::Done => return Ok(()),
                    Put::Occupied => continue,
                }
            };
            let left = match serde_json::from_slice::<Reservation>(&there) {
                Ok(there) if there.job.uid == self.owner.uid || self.owner.succeeds(&there.job) => {
                    there.writing
                }
                Ok(there) => {
                    let whose = there.job.told_to(&self.owner);
                    return Err(self.conflict(RESERVATION, &format!("is reserved for another job, {whose}")));
                }
                Err(_) => {
                    return Err(self.conflict(RESERVATION, "has a reservation that is not this operator's"));
                }
            };
            // Written anew even if it says the same: that it can be written is what has to be known.
            if self.put(RESERVATION, &content, Expect::Same(&version)).await? == Put::Done {
                if let Some(left) = left.filter(|left| writing != Some(left.as_str())) {
                    self.clear(&left, published).await;
                }
                return Ok(());
            }
        }
        Err(Failure::Passing(Problem::new(
            Reason::StoreUnavailable,
            format!("somebody else writes to {} as well; it is tried again", self.uri),
        )))
    }

    /// Deletes what a process left that did not come to its end. What can't be deleted stays: nobody reads it.
    async fn clear(&self, left: &str, published: Option<&Manifest>) {
        let is_ours = left.starts_with(&self.owner.uid) && !left.contains('/');
        let is_published = published.is_some_and(|m| m.objects.iter().any(|o| o.name.starts_with(left)));
        if !is_ours || is_published {
            return;
        }
        for name in KINDS.map(|(_, name)| name).into_iter().chain([SHARDS]) {
            if let Err(error) = self.store.delete(&self.path(&format!("{left}/{name}"))).await {
                tracing::info!(%error, name, "what an interrupted process wrote stays");
                return;
            }
        }
    }
}

/// Shelves in few stores: each is opened once.
#[derive(Default)]
pub struct Shelves(Vec<(ObjectStoreOutput, Arc<Store>)>);

impl Shelves {
    /// A place for the job, or for a part of it.
    pub async fn open(
        &mut self,
        ctx: &Context,
        job: &GeminiBatchJob,
        at: &ObjectStoreOutput,
    ) -> Result<Shelf, Failure> {
        let root = Location::directory(&at.uri, "spec.output.objectStore.uri").map_err(|e| failure(&e))?;
        let store = ObjectStoreOutput { uri: root.root(), ..at.clone() };
        let open = self.0.iter().find(|(known, _)| *known == store).map(|(_, open)| Arc::clone(open));
        let mut place = if let Some(open) = open {
            Shelf::within(ctx, open, root, job, at)
        } else {
            let place = Shelf::open(ctx, job, at).await?;
            self.0.push((store, Arc::clone(&place.store)));
            place
        };
        // A part that ended without results has given its own back.
        let own = job.spec.output.as_ref().and_then(|output| output.object_store.as_ref());
        let own = own.and_then(|own| Location::directory(&own.uri, FIELD).ok());
        place
            .proofs
            .extend(own.filter(|own| own.root() == place.root.root()).map(|own| own.path.join(RESERVATION)));
        Ok(place)
    }
}

/// What was published at a place.
impl Shelf {
    /// The manifest as it is; null, if it is not JSON.
    pub async fn catalogue(&self) -> Result<Option<Value>, Failure> {
        let there = self.fetch(MANIFEST_KEY).await?;
        Ok(there.map(|(content, _)| serde_json::from_slice(&content).unwrap_or_default()))
    }

    /// Reads an object that the manifest names to its end, and is sure that it is that.
    pub async fn copy(&self, named: &StoredObject, sink: &mut Sink<'_>) -> Result<(), Failure> {
        let there = self.head(&named.name).await?.filter(|there| is_as_named(there, named));
        let object = there.ok_or_else(|| self.differs(named))?;
        let (mut reader, mut hash) = (self.store.read(&object), Sha256::new());
        while let Some(bytes) = reader.next().await.map_err(|e| failure(&e))? {
            hash.update(&bytes);
            sink.put(&bytes).await?;
        }
        if identity::hex(&hash.finalize()) == named.sha256 { Ok(()) } else { Err(self.differs(named)) }
    }

    /// Deletes the reservation for the job of that name, which is gone.
    pub async fn withdraw(&self, name: &str) -> Result<(), Failure> {
        let there = self.fetch(RESERVATION).await?;
        let there = there.and_then(|(content, _)| serde_json::from_slice::<Reservation>(&content).ok());
        if there.is_none_or(|there| there.job.namespace != self.owner.namespace || there.job.name != name) {
            return Ok(());
        }
        self.store.delete(&self.path(RESERVATION)).await.map_err(|e| failure(&e))
    }

    /// An object that the manifest names, which has to be small.
    pub async fn text(&self, named: &StoredObject) -> Result<String, Failure> {
        let size = u64::try_from(named.bytes).unwrap_or(0);
        match self.store.fetch(&self.path(&named.name), size).await {
            Ok(Some((bytes, _))) if identity::hex(&Sha256::digest(&bytes)) == named.sha256 => {
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Err(e) if e.kind != Kind::TooLarge => Err(failure(&e)),
            _ => Err(self.differs(named)),
        }
    }

    fn differs(&self, named: &StoredObject) -> Failure {
        let uri = self.store.uri(&self.path(&named.name));
        let problem = Problem::new(
            Reason::OutputConflict,
            format!(
                "{uri} is gone, or is not what was written there: put it back; or delete {}/{MANIFEST_KEY}, and the job goes \
                 on without the results that it names",
                self.uri
            ),
        );
        Failure::Problem { problem, seen: Vec::new() }
    }

    /// Deletes what is published there: the manifest last but one, so that what is left after a failure can be found.
    pub async fn empty(&self, objects: &[StoredObject]) -> Result<(), Failure> {
        let names = objects.iter().map(|o| o.name.as_str()).chain([MANIFEST_KEY, RESERVATION]);
        for name in names {
            self.store.delete(&self.path(name)).await.map_err(|e| failure(&e))?;
        }
        Ok(())
    }
}

/// An object that is being written, and what is known of it then.
pub struct Sink<'a> {
    writer: store::Writer<'a>,
    hash: Sha256,
    bytes: i64,
    lines: i64,
    open_line: bool,
}

impl<'a> Sink<'a> {
    fn new(store: &'a Store, path: &Path) -> Self {
        Self { writer: store.write(path), hash: Sha256::new(), bytes: 0, lines: 0, open_line: false }
    }

    /// Adds bytes.
    pub async fn put(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let Some(last) = bytes.last() else { return Ok(()) };
        self.open_line = *last != b'\n';
        self.hash.update(bytes);
        self.bytes += number(bytes.len());
        self.lines += number(memchr::memchr_iter(b'\n', bytes).count());
        self.writer.write(bytes).await.map_err(|e| failure(&e))
    }

    /// Ends the last line, if it is open.
    pub async fn end_line(&mut self) -> Result<(), Failure> {
        if self.open_line { self.put(b"\n").await } else { Ok(()) }
    }

    async fn finish(self, name: &str) -> Result<StoredObject, Failure> {
        self.writer.finish().await.map_err(|e| failure(&e))?;
        let sha256 = identity::hex(&self.hash.finalize());
        Ok(StoredObject { name: name.to_owned(), bytes: self.bytes, lines: self.lines, sha256 })
    }
}

fn is_refusal(failure: &Failure) -> bool {
    matches!(failure, Failure::Problem { problem, .. } if problem.reason == Reason::StoreAccessDenied)
}

fn is_as_named(there: &Object, named: &StoredObject) -> bool {
    i64::try_from(there.size).is_ok_and(|size| size == named.bytes)
}

fn number(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The kinds of lines and the names of their objects.
pub const KINDS: [(What, &str); 4] = [
    (What::Results, "results.jsonl"),
    (What::Errors, "errors.jsonl"),
    (What::Missing, "missing.jsonl"),
    (What::Unmatched, "unmatched.jsonl"),
];

/// With the results of a sharded job: a line for each shard.
const SHARDS: &str = "shards.jsonl";

async fn in_time<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<Done<T>, kube::Error> {
    let done = tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| {
        Err(Failure::Passing(Problem::new(
            Reason::StoreUnavailable,
            "the object store of spec.output does not answer in time; it is tried again",
        )))
    });
    done_of(done)
}

/// Whether somebody has to do something about it.
pub fn done_of<T>(done: Result<T, Failure>) -> Result<Done<T>, kube::Error> {
    match done {
        Ok(done) => Ok(Done::Yes(done)),
        Err(Failure::Problem { problem, .. }) => Ok(Done::Blocked(problem)),
        Err(Failure::Passing(problem)) => Ok(Done::Passing(problem)),
        Err(Failure::Changed) => Ok(Done::Passing(Problem::new(
            Reason::StoreUnavailable,
            "the objects of spec.output change while they are looked at; it is tried again",
        ))),
        Err(Failure::Kubernetes(e)) => Err(e),
    }
}

/// Reserves the place, or sees that it is the job's. This writes an object, so what a later write would meet is met now.
pub async fn reserve(
    ctx: &Context,
    job: &GeminiBatchJob,
    at: &ObjectStoreOutput,
) -> Result<Done<()>, kube::Error> {
    in_time(async {
        let place = Shelf::open(ctx, job, at).await?;
        let manifest = place.first_look().await?;
        place.claim(manifest.as_ref().map(|(m, _)| m), None).await
    })
    .await
}

/// Gives the reservation back, if nothing was published. What stands in the way is not worth holding a job for: a later
/// job of the same name takes the reservation over.
pub async fn release(
    ctx: &Context,
    job: &GeminiBatchJob,
    at: &ObjectStoreOutput,
) -> Result<Done<()>, kube::Error> {
    in_time(async {
        let place = Shelf::open(ctx, job, at).await?;
        if place.manifest().await?.is_some() {
            return Ok(());
        }
        let there = place.fetch(RESERVATION).await?;
        let there = there.and_then(|(content, _)| serde_json::from_slice::<Reservation>(&content).ok());
        if let Some(there) = there.filter(|there| there.job.uid == place.owner.uid) {
            if let Some(left) = there.writing {
                place.clear(&left, None).await;
            }
            place.store.delete(&place.path(RESERVATION)).await.map_err(|e| failure(&e))?;
        }
        Ok(())
    })
    .await
}

/// What was published for the job.
pub struct Published {
    /// Where it is.
    pub store: Arc<Store>,
    /// The last attempt whose results are in it.
    pub attempt: i32,
    /// The object with the results.
    pub results: Option<Object>,
    /// The object with lines that belong to no request, if there is one.
    pub unmatched: Option<Object>,
    /// What is known of the last attempt's result file.
    pub file: ResultFile,
}

/// What was published for the job, if anything was and is still there.
pub async fn published(
    ctx: &Context,
    job: &GeminiBatchJob,
    at: &ObjectStoreOutput,
) -> Result<Option<Published>, Failure> {
    let place = Shelf::open(ctx, job, at).await?;
    let Some((manifest, _)) = place.first_look().await? else { return Ok(None) };
    let mut found = Vec::new();
    for name in ["results.jsonl", "unmatched.jsonl"] {
        let stored = manifest.objects.iter().find(|o| o.name.rsplit('/').next() == Some(name));
        let Some(stored) = stored else {
            found.push(None);
            continue;
        };
        // Without them the manifest is worth nothing.
        let there = place.head(&stored.name).await?.filter(|there| is_as_named(there, stored));
        let Some(object) = there else { return Ok(None) };
        found.push(Some(object));
    }
    let unmatched = found.pop().flatten();
    let results = found.pop().flatten();
    let LineCounts { duplicate, foreign, malformed } = manifest.unmatched_lines;
    Ok(Some(Published {
        store: place.store,
        attempt: manifest.attempt,
        results,
        unmatched,
        file: ResultFile {
            name: manifest.result_file.name,
            bytes: manifest.result_file.bytes,
            sha256: manifest.result_file.sha256,
            unmatched: Some(Unmatched { duplicate, foreign, malformed, usage: manifest.usage }),
        },
    }))
}

/// Results that are to be stored.
pub struct Delivery {
    /// The controller.
    pub ctx: Arc<Context>,
    /// The job.
    pub job: GeminiBatchJob,
    /// Where they go.
    pub at: ObjectStoreOutput,
    /// Whose results they are the last word of; 0: all shards of the job.
    pub attempt: i32,
    /// The lines.
    pub content: Content,
    /// What the manifest says, apart from the objects.
    pub manifest: Value,
}

/// Where the lines come from.
pub enum Content {
    /// A result file.
    Joined(Kept),
    /// The results of all shards.
    Shards(Box<Whole>),
}

impl Content {
    async fn write(&self, what: What, sink: &mut Sink<'_>) -> Result<(), Failure> {
        match self {
            Self::Joined(kept) => {
                let mut stream = kept.0.stream(what);
                while let Some(bytes) = stream.next(CHUNK_BYTES).map_err(|e| Failure::Passing(no_room(&e)))? {
                    sink.put(&bytes).await?;
                    crash::at("publish", "chunk");
                }
                Ok(())
            }
            Self::Shards(whole) => whole.write(what, sink).await,
        }
    }
}

impl Delivery {
    /// Writes all of it, and the manifest last.
    pub async fn deliver(self) -> Result<Done<StoredOutput>, kube::Error> {
        done_of(self.publish().await)
    }

    async fn publish(&self) -> Result<StoredOutput, Failure> {
        let place = Shelf::open(&self.ctx, &self.job, &self.at).await?;
        let before = place.first_look().await?;
        let stored = |manifest: Manifest| StoredOutput {
            manifest: place.store.uri(&place.path(MANIFEST_KEY)),
            objects: manifest.objects,
        };
        // Published already, by a process that did not come to write it down.
        if let Some((manifest, _)) = before.clone().filter(|(m, _)| m.attempt >= self.attempt)
            && self.is_whole(&place, &manifest).await?
        {
            return Ok(stored(manifest));
        }
        let published = before.as_ref().map(|(manifest, _)| manifest);
        let writing = format!("{}-{}-{}", place.owner.uid, self.attempt, identity::new_send_id());
        place.claim(published, Some(&writing)).await?;
        crash::at("publish", "claimed");
        let objects = match self.objects(&place, &writing).await {
            Ok(objects) => objects,
            Err(failure) => {
                place.clear(&writing, None).await;
                return Err(failure);
            }
        };
        let mut content = self.manifest.clone();
        content["objects"] = json!(objects);
        content["job"] = json!(place.owner);
        let expect = before.as_ref().map_or(Expect::Absent, |(_, version)| Expect::Same(version));
        let put = place.put(MANIFEST_KEY, &content, expect).await;
        crash::at("publish", MANIFEST_KEY);
        // Whatever the answer was: what stands there counts.
        let there = place.manifest().await?.map(|(manifest, _)| manifest);
        // It may have been cleared away in between by a process that saw no manifest yet.
        let whole = match &there {
            Some(manifest) => self.is_whole(&place, manifest).await?,
            None => false,
        };
        match &there {
            Some(manifest) if whole && manifest.objects == objects => Ok(stored(manifest.clone())),
            // Another process was faster.
            Some(manifest) if whole && manifest.attempt >= self.attempt => {
                place.clear(&writing, Some(manifest)).await;
                Ok(stored(manifest.clone()))
            }
            _ => {
                // What is published, though, is not taken back.
                place.clear(&writing, there.as_ref()).await;
                Err(put.err().unwrap_or(Failure::Changed))
            }
        }
    }

    /// Whether all that the manifest names is there.
    async fn is_whole(&self, place: &Shelf, manifest: &Manifest) -> Result<bool, Failure> {
        for object in &manifest.objects {
            if !place.head(&object.name).await?.is_some_and(|there| is_as_named(&there, object)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes all but the manifest.
    async fn objects(&self, place: &Shelf, writing: &str) -> Result<Vec<StoredObject>, Failure> {
        let mut objects = Vec::new();
        for (what, name) in KINDS {
            objects.extend(self.object(place, what, &format!("{writing}/{name}")).await?);
            crash::at("publish", name);
        }
        if let Content::Shards(whole) = &self.content {
            let name = format!("{writing}/{SHARDS}");
            let mut sink = Sink::new(&place.store, &place.path(&name));
            sink.put(whole.shards.as_bytes()).await?;
            objects.push(sink.finish(&name).await?);
            crash::at("publish", SHARDS);
        }
        Ok(objects)
    }

    /// Writes the lines of one kind; no object, if there are none, unless they are the results.
    async fn object(&self, place: &Shelf, what: What, name: &str) -> Result<Option<StoredObject>, Failure> {
        let mut sink = Sink::new(&place.store, &place.path(name));
        let written = self.content.write(what, &mut sink).await;
        if let Err(failure) = written {
            sink.writer.abort().await;
            return Err(failure);
        }
        if sink.bytes == 0 && what != What::Results {
            return Ok(None);
        }
        Ok(Some(sink.finish(name).await?))
    }
}
