//! The results of single parts: where they lie, how they are read and deleted. Client required.
//!
//! Each child stores its results in a place of its own: a ConfigMap, or a place below the one of the sharded job. They are
//! known by the UID of the sharded job that stands beside them. So it does not matter whether the child is still there.

use std::collections::BTreeMap;

use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{self, Stream, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt as _};
use serde::Deserialize;
use serde_json::Value;

use super::{Hold, Known, Slot, child, child_name, desired, part_of, recorded};
use crate::api::{GeminiBatchJob, JOB_NAME_ANNOTATION, PARENT_UID_ANNOTATION, StoredObject, Usage};
use crate::controller::destination::Destination;
use crate::controller::output::{self, Text};
use crate::controller::output_store::{Shelf, Shelves};
use crate::controller::run::Context;
use crate::controller::stored::{self, Failure};
use crate::controller::{decide, observe};

/// Parts that are looked at at the same time.
const PARALLEL: usize = 8;

/// What is needed of a part's manifest.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Manifest {
    /// Requests by what came of them.
    pub requests: Requests,
    /// Whether the keys were known.
    pub joined: bool,
    /// Lines that belong to no request.
    pub unmatched_lines: Unmatched,
    /// Tokens.
    pub usage: Usage,
    /// Where the lines are, in a store.
    pub objects: Vec<StoredObject>,
}

/// Requests by what came of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Requests {
    /// Those with a response.
    pub succeeded: i64,
    /// Those with an error.
    pub failed: i64,
}

/// Lines that belong to no request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Unmatched {
    /// Those that repeat a key.
    pub duplicate: i64,
    /// Those with a key that was not sent.
    pub foreign: i64,
    /// Those that can't be read.
    pub malformed: i64,
}

/// The results of one part.
pub struct Part {
    /// What its manifest says.
    pub manifest: Manifest,
    /// The lines.
    pub lines: Lines,
}

/// Where the lines of a part are.
pub enum Lines {
    /// Here, and in the ConfigMap of that name.
    Map(String, Text),
    /// In objects, which the manifest names.
    Objects(Shelf),
}

/// Where the results of a part are, if it has any. A child that is over keeps the place that it stored them in, whatever
/// the sharded job says since.
fn place(parent: &GeminiBatchJob, index: usize, slot: &Slot) -> Option<Destination> {
    slot.job()
        .and_then(Destination::of)
        .or_else(|| Destination::in_output(desired(parent, index, Hold::default()).output.as_ref()?))
}

/// The results of all parts, in their order; `None`: that one has none.
pub async fn all<'a>(
    ctx: &'a Context,
    parent: &'a GeminiBatchJob,
    slots: &'a [Slot],
) -> Result<impl Stream<Item = Result<Option<Part>, Failure>> + Send + use<'a>, Failure> {
    let mut shelves = Shelves::default();
    let mut work: Vec<BoxFuture<'a, Result<Option<Part>, Failure>>> = Vec::with_capacity(slots.len());
    for (index, slot) in slots.iter().enumerate() {
        let child = child_name(&parent.name_any(), index);
        match place(parent, index, slot) {
            Some(Destination::ConfigMap(name)) => work.push(in_map(ctx, parent, child, name).boxed()),
            Some(Destination::Store(at)) => {
                let place = shelves.open(ctx, parent, &at).await?;
                work.push(in_store(parent, child, place).boxed());
            }
            None => work.push(std::future::ready(Ok(None)).boxed()),
        }
    }
    Ok(stream::iter(work).buffered(PARALLEL))
}

async fn in_map(
    ctx: &Context,
    parent: &GeminiBatchJob,
    child: String,
    name: String,
) -> Result<Option<Part>, Failure> {
    let Some(map) = read_map(ctx, parent, &child, &name).await? else { return Ok(None) };
    let mut data = map.data.unwrap_or_default();
    let manifest = data.remove(output::MANIFEST_KEY).and_then(|text| serde_json::from_str(&text).ok());
    let Some(text) = text_of(&mut data) else { return Ok(None) };
    Ok(Some(Part { manifest: manifest.unwrap_or_default(), lines: Lines::Map(name, text) }))
}

/// The lines in a part's ConfigMap; `None`: it was only reserved.
fn text_of(data: &mut BTreeMap<String, String>) -> Option<Text> {
    let mut take = |key: &str| data.remove(key);
    Some(Text {
        results: take(output::RESULTS_KEY)?,
        missing: take(output::MISSING_KEY).unwrap_or_default(),
        unmatched: take(output::UNMATCHED_KEY).unwrap_or_default(),
    })
}

/// Reads the lines of a part once more.
pub async fn text(
    ctx: &Context,
    parent: &GeminiBatchJob,
    index: usize,
    name: &str,
) -> Result<Option<Text>, Failure> {
    let map = read_map(ctx, parent, &child_name(&parent.name_any(), index), name).await?;
    Ok(map.and_then(|map| text_of(&mut map.data.unwrap_or_default())))
}

async fn read_map(
    ctx: &Context,
    parent: &GeminiBatchJob,
    child: &str,
    name: &str,
) -> Result<Option<ConfigMap>, Failure> {
    let map = maps(ctx, parent).get_opt(name).await.map_err(Failure::Kubernetes)?;
    Ok(map.filter(|map| is_part(parent, child, map)))
}

fn maps(ctx: &Context, parent: &GeminiBatchJob) -> Api<ConfigMap> {
    Api::namespaced(ctx.client.clone(), &parent.namespace().unwrap_or_default())
}

/// Whether a ConfigMap holds the results of that child of that very parent.
#[must_use]
pub fn is_part(parent: &GeminiBatchJob, child: &str, map: &ConfigMap) -> bool {
    let says = |key: &str| map.annotations().get(key).map(String::as_str);
    says(PARENT_UID_ANNOTATION).is_some_and(|uid| Some(uid) == parent.metadata.uid.as_deref())
        && says(JOB_NAME_ANNOTATION) == Some(child)
}

async fn in_store(parent: &GeminiBatchJob, child: String, place: Shelf) -> Result<Option<Part>, Failure> {
    let there = place.catalogue().await?;
    let manifest = there.and_then(|there| manifest_of(parent, &child, there));
    Ok(manifest.map(|manifest| Part { manifest, lines: Lines::Objects(place) }))
}

/// The manifest of a part's results, if they are of that child of that very parent.
fn manifest_of(parent: &GeminiBatchJob, child: &str, there: Value) -> Option<Manifest> {
    let says = |at: &str| there.pointer(at).and_then(Value::as_str);
    let is_ours = says("/parentUid").is_some_and(|uid| Some(uid) == parent.metadata.uid.as_deref())
        && says("/job/name") == Some(child);
    is_ours.then(|| serde_json::from_value(there).unwrap_or_default())
}

/// Gives the keys of a part that has stored nothing to `take`, which says whether to go on. How many requests it has, and
/// whether all of their keys were given: the input may have changed.
pub async fn keys(
    ctx: &Context,
    parent: &GeminiBatchJob,
    index: usize,
    known: &Known,
    mut take: impl FnMut(&str) -> bool,
) -> Result<(i64, bool), Failure> {
    let planned = known.plan_for(parent).and_then(|plan| plan.parts.get(index));
    let slot = known.slots.get(index).unwrap_or(&Slot::Absent);
    let job = match planned {
        Some(range) => Some(child(parent, index, range)),
        // The watch has jobs without their input.
        None if slot.job().is_some() => {
            let jobs: Api<GeminiBatchJob> =
                Api::namespaced(ctx.client.clone(), &parent.namespace().unwrap_or_default());
            let name = child_name(&parent.name_any(), index);
            jobs.get_opt(&name).await.map_err(Failure::Kubernetes)?
        }
        None => None,
    };
    let Some(job) = job else { return Ok((0, false)) };
    let range = job.spec.input_range().cloned().unwrap_or_default();
    let all = match (job.spec.stored_input(), &parent.spec.input) {
        (Some(of), _) => match stored::keys(ctx, &job, of, &range.sha256, take).await {
            Ok(all) => all,
            Err(Failure::Kubernetes(e)) => return Err(Failure::Kubernetes(e)),
            Err(_) => false,
        },
        (None, Some(input)) => {
            let mut job = job;
            job.spec.input = Some(part_of(input, &range));
            let input = observe::input(&ctx.client, &job, ctx.max_input_bytes).await;
            match input.map_err(Failure::Kubernetes)? {
                Ok(input) => input.keys.iter().all(|key| take(key)),
                Err(_) => false,
            }
        }
        (None, None) => false,
    };
    Ok((range.requests, all))
}

/// Whether nothing is missing of the results of a finished child that has stored none.
#[must_use]
pub fn is_whole(job: Option<&GeminiBatchJob>) -> bool {
    let counts = |job: &GeminiBatchJob| job.status.as_ref()?.requests;
    job.filter(|job| decide::is_finished(job))
        .is_some_and(|job| counts(job).is_none_or(|c| c.total == c.succeeded))
}

/// Deletes the results of all parts that were created.
pub async fn drop_all(ctx: &Context, parent: &GeminiBatchJob, slots: &[Slot]) -> Result<(), Failure> {
    let created = recorded(parent).map_or(0, |s| usize::try_from(s.created).unwrap_or(0));
    let mut shelves = Shelves::default();
    let mut work: Vec<BoxFuture<'_, Result<(), Failure>>> = Vec::new();
    for index in 0..created {
        let child = child_name(&parent.name_any(), index);
        match place(parent, index, slots.get(index).unwrap_or(&Slot::Absent)) {
            Some(Destination::ConfigMap(name)) => work.push(drop_map(ctx, parent, child, name).boxed()),
            Some(Destination::Store(at)) => {
                work.push(drop_objects(parent, child, shelves.open(ctx, parent, &at).await?).boxed());
            }
            None => {}
        }
    }
    stream::iter(work).buffer_unordered(PARALLEL).try_collect().await
}

async fn drop_map(
    ctx: &Context,
    parent: &GeminiBatchJob,
    child: String,
    name: String,
) -> Result<(), Failure> {
    let Some(there) = read_map(ctx, parent, &child, &name).await? else { return Ok(()) };
    let only_this = Preconditions { uid: there.uid(), resource_version: None };
    let params = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
    super::act::unless_gone(maps(ctx, parent).delete(&name, &params).await).map_err(Failure::Kubernetes)
}

async fn drop_objects(parent: &GeminiBatchJob, child: String, place: Shelf) -> Result<(), Failure> {
    match place.catalogue().await? {
        Some(there) => match manifest_of(parent, &child, there) {
            Some(manifest) => place.empty(&manifest.objects).await,
            None => Ok(()),
        },
        // Its job could not give it back.
        None => place.withdraw(&child).await,
    }
}
