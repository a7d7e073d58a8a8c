//! Creates, changes, finds and deletes the jobs of parts. Client required.

use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use http::header::CONTENT_TYPE;
use jiff::SignedDuration;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::json;

use super::seen::Situation;
use super::{
    Action, Merged, Refused, Slot, Tally, child, child_name, is_child_of, label_of, part_of, recorded,
};
use super::{merge, parts};
use crate::api::{GeminiBatchJob, GeminiBatchJobSpec, Input, PARENT_LABEL, Reason, SHARDS_MANAGER};
use crate::controller::act::passing;
use crate::controller::destination::Destination;
use crate::controller::gather::aside;
use crate::controller::memory::{Memory, OutputObject, after};
use crate::controller::output_store::{self, Done};
use crate::controller::run::Context;
use crate::controller::transfers::{Kind, Waited};
use crate::controller::watched::Watched;
use crate::controller::{Problem, output, stored};
use crate::crash;

/// Requests to the API server at the same time.
const PARALLEL: usize = 8;

/// Refreshes what memory knows of the children of a job that has recorded how many there are.
pub async fn observe(ctx: &Context, parent: &GeminiBatchJob, memory: &mut Memory) -> Result<(), kube::Error> {
    let Some(recorded) = recorded(parent) else { return Ok(()) };
    let namespace = parent.namespace().unwrap_or_default();
    let created = usize::try_from(recorded.created).unwrap_or(0);
    let over = parent.metadata.deletion_timestamp.is_some() || crate::controller::decide::is_finished(parent);
    let total = usize::try_from(recorded.total).unwrap_or(0);
    let mut slots = Vec::with_capacity(total);
    for index in 0..total {
        let name = child_name(&parent.name_any(), index);
        let cached = ctx.family.get(&namespace, &name);
        let known = &mut memory.shards;
        let fresh = known.fresh.get(&index).cloned();
        let newest = match (cached, fresh) {
            (Some(cached), Some(fresh)) => {
                Some(if fresh.meta().generation > cached.meta().generation { fresh } else { cached })
            }
            (cached, fresh) => cached.or(fresh),
        };
        let slot = match newest {
            Some(there) => Slot::of(parent, there),
            // The watch may lag behind: what was recorded is looked for before it counts as lost.
            None if index < created && !over && !known.lost.contains(&index) => {
                match get(ctx, &namespace, &name).await? {
                    Some(there) => {
                        let there = Arc::new(there);
                        known.fresh.insert(index, Arc::clone(&there));
                        Slot::of(parent, there)
                    }
                    None => Slot::Absent,
                }
            }
            None => Slot::Absent,
        };
        let known = &mut memory.shards;
        slots.push(match slot {
            Slot::Absent | Slot::Foreign if index < created => {
                known.lost.insert(index);
                Slot::Lost
            }
            slot => slot,
        });
    }
    memory.shards.slots = slots;
    Ok(())
}

async fn get(ctx: &Context, namespace: &str, name: &str) -> Result<Option<Watched>, kube::Error> {
    let jobs: Api<GeminiBatchJob> = Api::namespaced(ctx.client.clone(), namespace);
    Ok(jobs.get_opt(name).await?.map(|job| Watched(Ok(job))))
}

/// Takes the step.
pub async fn take(
    ctx: &Arc<Context>,
    parent: &GeminiBatchJob,
    action: &Action,
    memory: &mut Memory,
) -> Result<(), kube::Error> {
    match action {
        Action::Create { first, count } => create(ctx, parent, *first..first + count, memory).await,
        Action::Sync { indices, stopped } => sync(ctx, parent, indices, *stopped, memory).await,
        Action::Delete { indices } => {
            let names: Vec<(String, Option<String>)> = indices
                .iter()
                .filter_map(|index| memory.shards.slots.get(*index)?.job())
                .map(|job| (job.name_any(), job.uid()))
                .collect();
            delete(ctx, parent, names).await?;
            memory.shards.going.extend(indices);
            Ok(())
        }
        Action::DeleteAll => delete_all(ctx, parent, memory).await,
        Action::Merge { at } => merge(ctx, parent, at, memory).await,
        Action::DropParts => drop_parts(ctx, parent, memory).await,
    }
}

fn jobs(ctx: &Context, parent: &GeminiBatchJob) -> Api<GeminiBatchJob> {
    Api::namespaced(ctx.client.clone(), &parent.namespace().unwrap_or_default())
}

fn pause(ctx: &Context) -> SignedDuration {
    SignedDuration::from_millis(i64::try_from(ctx.timings.recheck.as_millis() * 3 / 4).unwrap_or(i64::MAX))
}

fn blocked(ctx: &Context, parent: &GeminiBatchJob, problem: Problem) -> OutputObject {
    let generation = parent.metadata.generation.unwrap_or(0);
    OutputObject::Blocked { problem, generation, retry: Some(after(ctx.clock.now(), pause(ctx))) }
}

async fn create(
    ctx: &Context,
    parent: &GeminiBatchJob,
    indices: std::ops::Range<usize>,
    memory: &mut Memory,
) -> Result<(), kube::Error> {
    let jobs = jobs(ctx, parent);
    let post = PostParams { field_manager: Some(SHARDS_MANAGER.to_owned()), ..PostParams::default() };
    memory.shards.refused = None;
    // One after the other, in order: whoever was created first is sent first.
    for index in indices {
        let Some(range) = memory.shards.plan_for(parent).and_then(|plan| plan.parts.get(index)) else {
            break;
        };
        if !ctx.leadership.holds() {
            break;
        }
        let wanted = child(parent, index, range);
        let name = wanted.name_any();
        let there = match jobs.create(&post, &wanted).await {
            Ok(created) => Some(created),
            // By an earlier leader, or by this one, whose record of it failed; or by somebody else.
            Err(e) if output::is(&e, 409) => {
                jobs.get_opt(&name).await?.filter(|there| is_child_of(parent, &there.metadata))
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 404 | 413 | 422) => {
                let what = format!(
                    "GeminiBatchJob {name} for shard {index} can't be created ({}): change what forbids it (a quota, an \
                     admission policy, a missing permission of the operator), or the field of this job that it names",
                    status.message
                );
                refused(ctx, Problem::new(Reason::ShardNotCreated, what), memory);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        crash::at("within", "CreateShards");
        let Some(there) = there else {
            let what = format!(
                "GeminiBatchJob {name} exists and was not made for this job, and shard {index} needs that name: delete it if \
                 it is not needed; or delete this job, and create it under another name"
            );
            refused(ctx, Problem::new(Reason::ShardNotCreated, what), memory);
            return Ok(());
        };
        memory.shards.fresh.insert(index, Arc::new(Watched(Ok(there))));
    }
    Ok(())
}

fn refused(ctx: &Context, problem: Problem, memory: &mut Memory) {
    memory.shards.refused = Some(Refused { problem, next: after(ctx.clock.now(), pause(ctx)) });
}

/// Writes specs as a whole: the fields that the parent has not are not at its children either.
async fn sync(
    ctx: &Context,
    parent: &GeminiBatchJob,
    indices: &[usize],
    stopped: bool,
    memory: &mut Memory,
) -> Result<(), kube::Error> {
    let Some(recorded) = recorded(parent) else { return Ok(()) };
    let mut work: Vec<BoxFuture<'_, Result<(usize, Written), kube::Error>>> = Vec::new();
    {
        let known = &memory.shards;
        let situation = Situation { parent, recorded, slots: &known.slots, stopped };
        for index in indices {
            let Some(child) = known.slots.get(*index).and_then(Slot::job) else { continue };
            let range = known.plan_for(parent).and_then(|plan| plan.parts.get(*index));
            let part = range.and_then(|range| Some(part_of(parent.spec.input.as_ref()?, range)));
            let (name, uid) = (child.name_any(), child.uid().unwrap_or_default());
            work.push(sync_one(ctx, parent, *index, name, uid, situation.desired(*index), part).boxed());
        }
    }
    let written: Vec<(usize, Written)> = stream::iter(work).buffer_unordered(PARALLEL).try_collect().await?;
    memory.shards.refused = None;
    for (index, written) in written {
        match written {
            Written::Yes(there) => {
                memory.shards.fresh.insert(index, Arc::new(Watched(Ok(*there))));
            }
            Written::Gone => {}
            Written::Refused(problem) => refused(ctx, problem, memory),
        }
    }
    Ok(())
}

async fn sync_one(
    ctx: &Context,
    parent: &GeminiBatchJob,
    index: usize,
    name: String,
    uid: String,
    mut spec: GeminiBatchJobSpec,
    part: Option<Input>,
) -> Result<(usize, Written), kube::Error> {
    let there = jobs(ctx, parent).get_opt(&name).await?;
    let Some(there) = there.filter(|there| there.metadata.uid.as_ref() == Some(&uid)) else {
        return Ok((index, Written::Gone));
    };
    // What was sent can't be changed any more; until then it is what the parent wants.
    let begun = there.status.as_ref().is_some_and(|s| !s.attempts.is_empty());
    spec.input = part.filter(|_| !begun).or_else(|| there.spec.input.clone());
    match write_spec(ctx, parent, &name, &uid, &spec).await {
        Ok(there) => Ok((index, Written::Yes(Box::new(there)))),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok((index, Written::Gone)),
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 422) => {
            let what = format!(
                "GeminiBatchJob {name} of shard {index} can't be changed as this one is ({}): change what forbids it, or \
                 this job",
                status.message
            );
            Ok((index, Written::Refused(Problem::new(Reason::ShardNotCreated, what))))
        }
        Err(e) => Err(e),
    }
}

enum Written {
    Yes(Box<GeminiBatchJob>),
    /// Somebody was faster: it is looked at again.
    Gone,
    Refused(Problem),
}

/// Replaces the spec of this very job. A JSON Patch, since server-side apply would leave fields that the creation set and
/// that are not wanted any more; and strictly, so that an older definition refuses what it does not know.
async fn write_spec(
    ctx: &Context,
    parent: &GeminiBatchJob,
    name: &str,
    uid: &str,
    spec: &GeminiBatchJobSpec,
) -> Result<GeminiBatchJob, kube::Error> {
    let patch = json!([
        {"op": "test", "path": "/metadata/uid", "value": uid},
        {"op": "replace", "path": "/spec", "value": spec},
    ]);
    let request = http::Request::patch(format!(
        "{}/{name}?fieldManager={SHARDS_MANAGER}&fieldValidation=Strict",
        GeminiBatchJob::url_path(&(), parent.namespace().as_deref()),
    ))
    .header(CONTENT_TYPE, "application/json-patch+json")
    .body(serde_json::to_vec(&patch).map_err(kube::Error::SerdeError)?)
    .map_err(kube::Error::HttpError)?;
    ctx.client.request(request).await
}

/// Deletes jobs, by name and UID. They go when they are done with what they have at Gemini.
async fn delete(
    ctx: &Context,
    parent: &GeminiBatchJob,
    names: Vec<(String, Option<String>)>,
) -> Result<(), kube::Error> {
    let mut work: Vec<BoxFuture<'_, Result<(), kube::Error>>> = Vec::new();
    for (name, uid) in names {
        work.push(delete_one(ctx, parent, name, uid).boxed());
    }
    stream::iter(work).buffer_unordered(PARALLEL).try_collect().await
}

async fn delete_one(
    ctx: &Context,
    parent: &GeminiBatchJob,
    name: String,
    uid: Option<String>,
) -> Result<(), kube::Error> {
    let only_this = Preconditions { uid, resource_version: None };
    let params = DeleteParams { preconditions: Some(only_this), ..DeleteParams::background() };
    unless_gone(jobs(ctx, parent).delete(&name, &params).await)
}

/// What is gone, or is another one by now, needs no deletion.
pub(super) fn unless_gone<T>(deleted: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match deleted {
        Err(e) if !output::is(&e, 404) && !output::is(&e, 409) => Err(e),
        _ => Ok(()),
    }
}

async fn delete_all(ctx: &Context, parent: &GeminiBatchJob, memory: &mut Memory) -> Result<(), kube::Error> {
    let labelled = format!("{PARENT_LABEL}={}", label_of(&parent.name_any()));
    let all = jobs(ctx, parent).list_metadata(&ListParams::default().labels(&labelled)).await?;
    let ours: Vec<_> = all.items.into_iter().filter(|job| is_child_of(parent, &job.metadata)).collect();
    memory.shards.left = Some(ours.len());
    let going = ours.into_iter().filter(|job| job.metadata.deletion_timestamp.is_none());
    delete(ctx, parent, going.map(|job| (job.name_any(), job.uid())).collect()).await
}

/// Puts the results together: beside the passes, if they go to a store.
async fn merge(
    ctx: &Arc<Context>,
    parent: &GeminiBatchJob,
    at: &Destination,
    memory: &mut Memory,
) -> Result<(), kube::Error> {
    let done = match at {
        Destination::ConfigMap(name) => merge::to_map(ctx, parent, name, &memory.shards).await?,
        Destination::Store(store) => {
            let what = format!("merge {}", json!(store));
            let (ctx2, job, known) = (Arc::clone(ctx), parent.clone(), (*memory.shards).clone());
            let work = || aside(merge::to_store(ctx2, job, store.clone(), known));
            let says = format!("the results of all shards are being put together at {at}");
            let Some(done) = beside(ctx, parent, &what, says, memory, work).await else { return Ok(()) };
            done?
        }
    };
    match done {
        Done::Yes(merged) => {
            memory.trouble = None;
            if let Merged::Done(Tally { stored: Some((name, placed)), .. }) = &merged {
                memory.output = OutputObject::Stored { name: name.clone(), placed: placed.clone() };
            }
            memory.shards.merged = Some(merged);
        }
        Done::Blocked(problem) => memory.output = blocked(ctx, parent, problem),
        Done::Passing(problem) => {
            memory.trouble = Some(passing(ctx, memory.trouble.as_ref(), problem));
        }
    }
    Ok(())
}

/// Has work done beside the passes. `None`: it is under way, which memory says, and the job will be woken.
async fn beside<T: Send + 'static, F>(
    ctx: &Arc<Context>,
    parent: &GeminiBatchJob,
    what: &str,
    says: String,
    memory: &mut Memory,
    work: impl FnOnce() -> F,
) -> Option<T>
where
    F: Future<Output = T> + Send + 'static,
{
    let waited = ctx
        .transfers
        .run(Kind::Results, &stored::owner(parent), what, stored::woken(ctx, parent), work)
        .await;
    memory.transfer = Some(match waited {
        Waited::Done(done) => return Some(done),
        Waited::Running => stored::waiting(says),
        Waited::Queued => stored::queued(ctx, "the results of all shards wait"),
    });
    None
}

/// Tries in vain after which results of single parts stay where they are: the whole is stored.
const DROP_TRIES: u32 = 6;

async fn drop_parts(
    ctx: &Arc<Context>,
    parent: &GeminiBatchJob,
    memory: &mut Memory,
) -> Result<(), kube::Error> {
    let (ctx2, job, slots) = (Arc::clone(ctx), parent.clone(), memory.shards.slots.clone());
    let work = || async move { parts::drop_all(&ctx2, &job, &slots).await };
    let says = "the results of single shards are being deleted".to_owned();
    let Some(done) = beside(ctx, parent, "drop parts", says, memory, work).await else { return Ok(()) };
    let problem = match output_store::done_of(done)? {
        Done::Yes(()) => {
            memory.trouble = None;
            memory.shards.parts_dropped = true;
            return Ok(());
        }
        Done::Blocked(problem) => problem,
        Done::Passing(problem) => {
            let trouble = passing(ctx, memory.trouble.as_ref(), problem);
            if trouble.failures < DROP_TRIES {
                memory.trouble = Some(trouble);
                return Ok(());
            }
            trouble.problem
        }
    };
    tracing::warn!(
        namespace = parent.namespace(),
        name = parent.name_any(),
        problem = problem.message,
        "results of single shards stay in the object store; the whole is stored"
    );
    memory.trouble = None;
    memory.shards.parts_dropped = true;
    Ok(())
}
