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
use kube::{Client, ResourceExt as _};
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Problem;
use super::collect::Kept;
use super::gather::{ResultFile, Unmatched, no_room};
use super::identity;
use super::join::What;
use super::output::MANIFEST_KEY;
use super::run::Context;
use super::stored::{self, Failure, Place};
use crate::api::{GeminiBatchJob, ObjectStoreOutput, Reason, StoredObject, StoredOutput, Usage};
use crate::crash;
use crate::store::{self, Expect, Kind, Location, Object, Purpose, Put, Store, Stores, Version};

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
    namespace: String,
    name: String,
    uid: String,
}

impl Owner {
    fn of(job: &GeminiBatchJob) -> Self {
        Self {
            namespace: job.namespace().unwrap_or_default(),
            name: job.name_any(),
            uid: job.uid().unwrap_or_default(),
        }
    }

    /// A predecessor of the same name, which has been deleted.
    fn succeeds(&self, other: &Self) -> bool {
        self.namespace == other.namespace && self.name == other.name
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
struct Shelf {
    store: Store,
    /// The URI without a / at its end.
    root: Location,
    /// As the job has it, for messages.
    uri: String,
    owner: Owner,
}

impl Shelf {
    async fn open(
        client: &Client,
        stores: &Stores,
        job: &GeminiBatchJob,
        at: &ObjectStoreOutput,
    ) -> Result<Self, Failure> {
        let root = Location::directory(&at.uri, "spec.output.objectStore.uri").map_err(|e| failure(&e))?;
        let place = Place {
            field: FIELD,
            purpose: Purpose::Write,
            credentials: at.credentials_ref.as_ref(),
            endpoint: at.endpoint.as_deref(),
            region: at.region.as_deref(),
        };
        let namespace = job.namespace().unwrap_or_default();
        let store = match stored::open(client, stores, &namespace, &root, &place).await {
            Ok(store) => store,
            // What is wrong with the job's words for an input is wrong with these for an output.
            Err(Failure::Problem { problem, .. }) if problem.reason == Reason::InputInvalid => {
                let problem = Problem { reason: Reason::OutputNotWritable, ..problem };
                return Err(Failure::Problem { problem, seen: Vec::new() });
            }
            Err(other) => return Err(other),
        };
        Ok(Self { store, root, uri: at.uri.trim_end_matches('/').to_owned(), owner: Owner::of(job) })
    }

    fn path(&self, name: &str) -> Path {
        // Joined part by part, since a slash within one would be encoded.
        name.split('/').fold(self.root.path.clone(), Path::join)
    }

    async fn fetch(&self, name: &str) -> Result<Option<(Bytes, Version)>, Failure> {
        self.store.fetch(&self.path(name), MAX_MANIFEST_BYTES).await.map_err(|e| failure(&e))
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
                let Owner { namespace, name, .. } = manifest.job;
                Err(self.conflict(
                    MANIFEST_KEY,
                    &format!("holds the results of another job, {name} in namespace {namespace}"),
                ))
            }
            Err(_) => Err(self.conflict(MANIFEST_KEY, "has a manifest that is not this operator's")),
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
                    let Owner { namespace, name, .. } = there.job;
                    return Err(self.conflict(
                        RESERVATION,
                        &format!("is reserved for another job, {name} in namespace {namespace}"),
                    ));
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
        for (what, name) in KINDS {
            if let Err(error) = self.store.delete(&self.path(&format!("{left}/{name}"))).await {
                tracing::info!(%error, ?what, "what an interrupted process wrote stays");
                return;
            }
        }
    }
}

/// The kinds of lines and the names of their objects.
const KINDS: [(What, &str); 4] = [
    (What::Results, "results.jsonl"),
    (What::Errors, "errors.jsonl"),
    (What::Missing, "missing.jsonl"),
    (What::Unmatched, "unmatched.jsonl"),
];

async fn in_time<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<Done<T>, kube::Error> {
    let done = tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| {
        Err(Failure::Passing(Problem::new(
            Reason::StoreUnavailable,
            "the object store of spec.output does not answer in time; it is tried again",
        )))
    });
    done_of(done)
}

fn done_of<T>(done: Result<T, Failure>) -> Result<Done<T>, kube::Error> {
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
        let place = Shelf::open(&ctx.client, &ctx.stores, job, at).await?;
        let manifest = place.manifest().await?;
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
        let place = Shelf::open(&ctx.client, &ctx.stores, job, at).await?;
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
    pub store: Store,
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
    let place = Shelf::open(&ctx.client, &ctx.stores, job, at).await?;
    let Some((manifest, _)) = place.manifest().await? else { return Ok(None) };
    let mut found = Vec::new();
    for name in ["results.jsonl", "unmatched.jsonl"] {
        let stored = manifest.objects.iter().find(|o| o.name.rsplit('/').next() == Some(name));
        let Some(stored) = stored else {
            found.push(None);
            continue;
        };
        match place.store.head(&place.path(&stored.name)).await {
            Ok(object) if i64::try_from(object.size).is_ok_and(|size| size == stored.bytes) => {
                found.push(Some(object));
            }
            // Without them the manifest is worth nothing.
            Ok(_) => return Ok(None),
            Err(e) if e.kind == Kind::NotFound => return Ok(None),
            Err(e) => return Err(failure(&e)),
        }
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
    /// Whose results they are the last word of.
    pub attempt: i32,
    /// The lines.
    pub kept: Kept,
    /// What the manifest says, apart from the objects.
    pub manifest: Value,
}

impl Delivery {
    /// Writes all of it, and the manifest last.
    pub async fn deliver(self) -> Result<Done<StoredOutput>, kube::Error> {
        done_of(self.publish().await)
    }

    async fn publish(&self) -> Result<StoredOutput, Failure> {
        let place = Shelf::open(&self.ctx.client, &self.ctx.stores, &self.job, &self.at).await?;
        let before = place.manifest().await?;
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
        let mut objects = Vec::new();
        for (what, name) in KINDS {
            match self.object(&place, what, &format!("{writing}/{name}")).await {
                Ok(object) => objects.extend(object),
                Err(failure) => {
                    place.clear(&writing, None).await;
                    return Err(failure);
                }
            }
            crash::at("publish", name);
        }
        let mut content = self.manifest.clone();
        content["objects"] = json!(objects);
        let expect = before.as_ref().map_or(Expect::Absent, |(_, version)| Expect::Same(version));
        let put = place.put(MANIFEST_KEY, &content, expect).await;
        crash::at("publish", MANIFEST_KEY);
        // Whatever the answer was: what stands there counts.
        let there = place.manifest().await?;
        match there {
            Some((manifest, _)) if manifest.objects == objects => Ok(stored(manifest)),
            // Another process was faster.
            Some((manifest, _)) if manifest.attempt >= self.attempt => {
                place.clear(&writing, Some(&manifest)).await;
                Ok(stored(manifest))
            }
            _ => {
                place.clear(&writing, None).await;
                Err(put.err().unwrap_or(Failure::Changed))
            }
        }
    }

    /// Whether all that the manifest names is there.
    async fn is_whole(&self, place: &Shelf, manifest: &Manifest) -> Result<bool, Failure> {
        for object in &manifest.objects {
            match place.store.head(&place.path(&object.name)).await {
                Ok(there) if i64::try_from(there.size).is_ok_and(|size| size == object.bytes) => {}
                Ok(_) => return Ok(false),
                Err(e) if e.kind == Kind::NotFound => return Ok(false),
                Err(e) => return Err(failure(&e)),
            }
        }
        Ok(true)
    }

    /// Writes the lines of one kind; no object, if there are none, unless they are the results.
    async fn object(&self, place: &Shelf, what: What, name: &str) -> Result<Option<StoredObject>, Failure> {
        let mut stream = self.kept.0.stream(what);
        let mut next = || stream.next(CHUNK_BYTES).map_err(|e| Failure::Passing(no_room(&e)));
        let mut chunk = next()?;
        if chunk.is_none() && what != What::Results {
            return Ok(None);
        }
        let mut writer = place.store.write(&place.path(name));
        let written = async {
            while let Some(bytes) = chunk.take() {
                writer.write(&bytes).await.map_err(|e| failure(&e))?;
                crash::at("publish", "chunk");
                chunk = next()?;
            }
            Ok(())
        };
        if let Err(failure) = written.await {
            writer.abort().await;
            return Err(failure);
        }
        writer.finish().await.map_err(|e| failure(&e))?;
        let done = stream.streamed();
        let number = |n| i64::try_from(n).unwrap_or(i64::MAX);
        Ok(Some(StoredObject {
            name: name.to_owned(),
            bytes: number(done.bytes),
            lines: number(done.lines),
            sha256: done.sha256,
        }))
    }
}
