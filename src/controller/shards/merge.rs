//! Puts the results of all parts together. Client required, apart from [`Merger`].
//!
//! Each child joins its own results with its requests, in input order; the parts follow one another in input order. So
//! the whole is put together by writing one after the other, and no key is looked at again.
//!
//! Where parts and whole lie is the affair of this file alone: [`Merger`] takes parts from wherever they are read, and
//! [`config_map`] is the one place that there is yet. An object store would read parts as streams, give their texts to a
//! multipart upload instead of to [`Merger::add`], and keep the counts of [`Merger`].

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, ResourceExt as _};
use serde::Deserialize;
use serde_json::json;

use super::seen::{add, reason_of};
use super::{Known, Merged, Slot, Tally, child, child_name, part_of, recorded, results_name};
use crate::api::{GeminiBatchJob, JOB_NAME_ANNOTATION, PARENT_UID_ANNOTATION, Usage};
use crate::controller::output::{self, Done};
use crate::controller::run::Context;
use crate::controller::{decide, observe, stored};

/// One line for each part: its job, how it ended, its batches.
pub const SHARDS_KEY: &str = "shards.jsonl";

/// The results of one part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    /// See [`output::RESULTS_KEY`].
    pub results: String,
    /// See [`output::MISSING_KEY`].
    pub missing: String,
    /// See [`output::UNMATCHED_KEY`].
    pub unmatched: String,
    /// See [`output::MANIFEST_KEY`].
    pub manifest: Manifest,
}

/// What is needed of a part's manifest.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Manifest {
    requests: ManifestRequests,
    joined: bool,
    unmatched_lines: Unmatched,
    usage: Usage,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct ManifestRequests {
    succeeded: i64,
    failed: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Unmatched {
    duplicate: i64,
    foreign: i64,
    malformed: i64,
}

/// Takes parts in their order.
#[derive(Debug)]
pub struct Merger {
    limit: usize,
    size: usize,
    whole: Part,
    shards: String,
    succeeded: i64,
    failed: i64,
    unlisted: i64,
    all_joined: bool,
    any: bool,
}

impl Merger {
    /// At most `limit` bytes are kept; beyond it they are only counted.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            size: 0,
            whole: Part::default(),
            shards: String::new(),
            succeeded: 0,
            failed: 0,
            unlisted: 0,
            all_joined: true,
            any: false,
        }
    }

    fn keep(&mut self, bytes: usize) -> bool {
        self.size = self.size.saturating_add(bytes);
        if self.size > self.limit {
            self.whole.results = String::new();
            self.whole.missing = String::new();
            self.whole.unmatched = String::new();
            self.shards = String::new();
        }
        self.size <= self.limit
    }

    /// The next part: its number, its job's name, its job if it is there, and what it has stored.
    pub fn add(&mut self, index: usize, name: &str, job: Option<&GeminiBatchJob>, part: Option<&Part>) {
        let status = job.and_then(|job| job.status.as_ref());
        let counted = status.and_then(|s| s.requests);
        // The job knows best. What it stored knows it as well, should somebody have deleted the job.
        let succeeded =
            counted.map_or_else(|| part.map_or(0, |p| p.manifest.requests.succeeded), |c| c.succeeded);
        self.succeeded += succeeded;
        if let Some(usage) = status.map_or_else(|| part.map(|p| &p.manifest.usage), |s| s.usage.as_ref()) {
            add(&mut self.whole.manifest.usage, usage);
        }
        let batches: Vec<&String> =
            status.iter().flat_map(|s| &s.attempts).filter_map(|a| a.batch_name.as_ref()).collect();
        let line = json!({
            "shard": index,
            "job": name,
            "state": status.map(|s| s.state),
            "reason": job.and_then(reason_of),
            "batches": batches,
            "inputSha256": status.and_then(|s| s.attempts.first()).and_then(|a| a.input_sha256.as_ref()),
            "requests": counted,
        })
        .to_string();
        if self.keep(line.len() + 1) {
            let _ = writeln!(self.shards, "{line}"); // writing to a String cannot fail
        }
        let Some(part) = part else { return };
        self.any |= !part.results.is_empty() || !part.unmatched.is_empty();
        self.failed += part.manifest.requests.failed;
        self.all_joined &= part.manifest.joined;
        let (sum, more) = (&mut self.whole.manifest.unmatched_lines, &part.manifest.unmatched_lines);
        sum.duplicate += more.duplicate;
        sum.foreign += more.foreign;
        sum.malformed += more.malformed;
        if self.keep(part.results.len() + part.missing.len() + part.unmatched.len()) {
            for (whole, text) in [
                (&mut self.whole.results, &part.results),
                (&mut self.whole.missing, &part.missing),
                (&mut self.whole.unmatched, &part.unmatched),
            ] {
                whole.push_str(text);
                if !text.is_empty() && !text.ends_with('\n') {
                    whole.push('\n');
                }
            }
        }
    }

    /// The part that was added last has stored nothing, and these are its requests; `None`: that is not known.
    pub fn without_results(&mut self, requests: i64, keys: Option<&[String]>) {
        let Some(keys) = keys else {
            self.unlisted += requests;
            return;
        };
        for key in keys {
            let line = json!({ "key": key }).to_string();
            if self.keep(line.len() + 1) {
                let _ = writeln!(self.whole.missing, "{line}"); // writing to a String cannot fail
            }
        }
    }

    /// What `manifest.json` says. Counts and names only.
    fn manifest(&self, parent: &GeminiBatchJob, total: i64) -> serde_json::Value {
        let shards = recorded(parent);
        let of = &self.whole.manifest;
        json!({
            "job": {"namespace": parent.namespace(), "name": parent.name_any(), "uid": parent.uid()},
            "model": parent.spec.model,
            "inputSha256": shards.map(|s| &s.input_sha256),
            "shards": shards.map(|s| json!({"total": s.total, "succeeded": s.succeeded, "failed": s.failed})),
            "requests": {
                "total": total,
                "succeeded": self.succeeded,
                "failed": self.failed,
                "missing": (total - self.succeeded - self.failed).max(0),
                "missingUnlisted": self.unlisted,
            },
            "joined": self.all_joined,
            "unmatchedLines": {
                "duplicate": of.unmatched_lines.duplicate,
                "foreign": of.unmatched_lines.foreign,
                "malformed": of.unmatched_lines.malformed,
            },
            "usage": of.usage,
        })
    }
}

/// Reads the parts from their ConfigMaps and stores the whole in the ConfigMap of that name. `Err`: why it can't be.
pub async fn config_map(
    ctx: &Arc<Context>,
    parent: &GeminiBatchJob,
    name: &str,
    known: &Known,
) -> Result<Result<Merged, super::Problem>, kube::Error> {
    let mut merger = Merger::new(output::MAX_LINES_BYTES);
    let total = parent.status.as_ref().and_then(|s| s.requests).map_or(0, |r| r.total);
    for (index, slot) in known.slots.iter().enumerate() {
        let child = child_name(&parent.name_any(), index);
        let part = read_part(ctx, parent, &child).await?;
        let job = slot.job();
        merger.add(index, &child, job, part.as_ref());
        let whole = job.is_some_and(|job| decide::is_finished(job) && pending(job) == 0);
        if part.is_none() && !whole {
            let (requests, keys) = keys_of(ctx, parent, index, slot, known).await?;
            merger.without_results(requests, keys.as_deref());
        }
    }
    if merger.size > merger.limit {
        let bytes = i64::try_from(merger.size).unwrap_or(i64::MAX);
        return Ok(Ok(Merged::TooLarge { bytes, generation: parent.metadata.generation }));
    }
    let mut tally = Tally { succeeded: merger.succeeded, usage: merger.whole.manifest.usage, stored: None };
    if !merger.any {
        return Ok(Ok(Merged::Done(tally)));
    }
    let manifest = merger.manifest(parent, total);
    let mut data = BTreeMap::from([
        (output::RESULTS_KEY.to_owned(), merger.whole.results),
        (output::MANIFEST_KEY.to_owned(), format!("{manifest:#}\n")),
        (SHARDS_KEY.to_owned(), merger.shards),
    ]);
    for (key, text) in
        [(output::MISSING_KEY, merger.whole.missing), (output::UNMATCHED_KEY, merger.whole.unmatched)]
    {
        if !text.is_empty() {
            data.insert(key.to_owned(), text);
        }
    }
    Ok(match output::put(&ctx.client, parent, name, data).await? {
        Done::Yes => {
            tally.stored = Some(name.to_owned());
            Ok(Merged::Done(tally))
        }
        Done::Blocked(problem) => Err(problem),
    })
}

/// Requests of a finished job that its own status does not count as answered.
fn pending(job: &GeminiBatchJob) -> i64 {
    job.status.as_ref().and_then(|s| s.requests).map_or(0, |c| c.total - c.succeeded)
}

/// What the job of one part has stored. It does not matter whether that job is still there.
async fn read_part(ctx: &Context, parent: &GeminiBatchJob, child: &str) -> Result<Option<Part>, kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(ctx.client.clone(), &parent.namespace().unwrap_or_default());
    let Some(map) = maps.get_opt(&results_name(child)).await?.filter(|map| is_part(parent, child, map))
    else {
        return Ok(None);
    };
    let mut data = map.data.unwrap_or_default();
    let mut take = |key: &str| data.remove(key);
    let Some(results) = take(output::RESULTS_KEY) else { return Ok(None) };
    let manifest = take(output::MANIFEST_KEY).and_then(|text| serde_json::from_str(&text).ok());
    Ok(Some(Part {
        results,
        missing: take(output::MISSING_KEY).unwrap_or_default(),
        unmatched: take(output::UNMATCHED_KEY).unwrap_or_default(),
        manifest: manifest.unwrap_or_default(),
    }))
}

/// Whether a ConfigMap holds the results of that child of that very parent.
#[must_use]
pub fn is_part(parent: &GeminiBatchJob, child: &str, map: &ConfigMap) -> bool {
    let says = |key: &str| map.annotations().get(key).map(String::as_str);
    says(PARENT_UID_ANNOTATION).is_some_and(|uid| Some(uid) == parent.metadata.uid.as_deref())
        && says(JOB_NAME_ANNOTATION) == Some(child)
}

/// The requests of a part that has stored nothing: how many, and their keys, if the input still has them.
async fn keys_of(
    ctx: &Arc<Context>,
    parent: &GeminiBatchJob,
    index: usize,
    slot: &Slot,
    known: &Known,
) -> Result<(i64, Option<Vec<String>>), kube::Error> {
    let planned = known.plan_for(parent).and_then(|plan| plan.parts.get(index));
    let job = match planned {
        Some(range) => Some(child(parent, index, range)),
        // The watch has jobs without their input.
        None if slot.job().is_some() => {
            let jobs: Api<GeminiBatchJob> =
                Api::namespaced(ctx.client.clone(), &parent.namespace().unwrap_or_default());
            jobs.get_opt(&child_name(&parent.name_any(), index)).await?
        }
        None => None,
    };
    let Some(job) = job else { return Ok((0, None)) };
    let range = job.spec.input_range().cloned().unwrap_or_default();
    let keys = match (job.spec.stored_input(), &parent.spec.input) {
        (Some(of), _) => {
            // More keys than this would not fit into a ConfigMap either.
            let (mut keys, mut bytes) = (Vec::new(), 0);
            let take = |key: &str| {
                bytes += key.len();
                keys.push(key.to_owned());
                bytes <= output::MAX_LINES_BYTES
            };
            match stored::keys(ctx, &job, of, &range.sha256, take).await {
                Ok(true) => Some(keys),
                Err(stored::Failure::Kubernetes(e)) => return Err(e),
                _ => None,
            }
        }
        (None, Some(input)) => {
            let mut job = job;
            job.spec.input = Some(part_of(input, &range));
            observe::input(&ctx.client, &job, ctx.max_input_bytes).await?.ok().map(|input| input.keys)
        }
        (None, None) => None,
    };
    Ok((range.requests, keys))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(keys: &[&str], missing: &[&str]) -> Part {
        let lines = |keys: &[&str]| {
            keys.iter().fold(String::new(), |all, k| all + &json!({"key": k}).to_string() + "\n")
        };
        Part {
            results: lines(keys),
            missing: lines(missing),
            unmatched: String::new(),
            manifest: serde_json::from_value(
                json!({"requests": {"succeeded": keys.len(), "failed": 0}, "joined": true,
                "usage": {"promptTokens": 1, "outputTokens": 2, "totalTokens": 3}}),
            )
            .unwrap(),
        }
    }

    #[test]
    fn results_follow_one_another_and_what_does_not_fit_is_only_counted() {
        let mut merger = Merger::new(10_000);
        merger.add(0, "job-0000", None, Some(&part(&["a", "b"], &[])));
        merger.add(1, "job-0001", None, None);
        merger.without_results(2, Some(&["c".to_owned(), "d".to_owned()]));
        merger.add(2, "job-0002", None, Some(&part(&["e"], &["f"])));
        let (whole, counts) = of(merger);
        assert_eq!(whole.results, "{\"key\":\"a\"}\n{\"key\":\"b\"}\n{\"key\":\"e\"}\n");
        assert_eq!(whole.missing, "{\"key\":\"c\"}\n{\"key\":\"d\"}\n{\"key\":\"f\"}\n");
        assert_eq!(counts, (3, true));

        let mut merger = Merger::new(300);
        merger.add(0, "job-0000", None, Some(&part(&["a"], &[])));
        merger.add(1, "job-0001", None, Some(&part(&["x".repeat(300).as_str()], &[])));
        let (whole, counts) = of(merger);
        assert_eq!((whole.results.as_str(), counts), ("", (2, false)));
    }

    /// The whole, and `(succeeded, does it fit)`.
    fn of(merger: Merger) -> (Part, (i64, bool)) {
        let counts = (merger.succeeded, merger.size <= merger.limit);
        (merger.whole, counts)
    }
}
