//! Puts the results of all parts together. Client required, apart from [`Merger`].
//!
//! Each child joins its own results with its requests, in input order; the parts follow one another in input order. So
//! the whole is put together by writing one after the other, and no key is looked at again. Where parts lie is the affair
//! of [`super::parts`]. A ConfigMap's worth is held in memory; for an object store only what is known of the parts is held,
//! and the lines are copied while they are written.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use futures::StreamExt as _;
use kube::ResourceExt as _;
use serde::Deserialize;
use serde_json::json;

use super::parts::{self, Lines, Manifest, Part, Unmatched};
use super::seen::{add, reason_of};
use super::{Known, Merged, Tally, child_name, recorded};
use crate::api::{GeminiBatchJob, ObjectStoreOutput, StoredObject, Usage};
use crate::controller::destination::{Destination, Placed};
use crate::controller::gather::no_room;
use crate::controller::join::{Spool, What};
use crate::controller::output::{self, Text};
use crate::controller::output_store::{Content, Delivery, Done, KINDS, Shelf, Sink};
use crate::controller::run::Context;
use crate::controller::stored::Failure;
use crate::store;

/// One line for each part: its job, how it ended, its batches.
pub const SHARDS_KEY: &str = "shards.jsonl";

/// Keys without a result that are held in memory; more go to the temporary directory.
const HELD_BYTES: usize = 1 << 20;
/// What is read of them at once.
const CHUNK_BYTES: usize = 256 << 10;

/// Counts over all parts, and a line for each.
#[derive(Debug, Default)]
pub struct Merger {
    shards: String,
    succeeded: i64,
    failed: i64,
    unlisted: i64,
    some_not_joined: bool,
    any: bool,
    unmatched: Unmatched,
    usage: Usage,
}

impl Merger {
    /// The next part: its number, its job's name, its job if it is there, and the manifest of what it has stored.
    pub fn add(
        &mut self,
        index: usize,
        name: &str,
        job: Option<&GeminiBatchJob>,
        manifest: Option<&Manifest>,
    ) {
        let status = job.and_then(|job| job.status.as_ref());
        let counted = status.and_then(|s| s.requests);
        // The job knows best. What it stored knows it as well, should somebody have deleted the job.
        self.succeeded +=
            counted.map_or_else(|| manifest.map_or(0, |m| m.requests.succeeded), |c| c.succeeded);
        if let Some(usage) = status.map_or_else(|| manifest.map(|m| &m.usage), |s| s.usage.as_ref()) {
            add(&mut self.usage, usage);
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
        });
        let _ = writeln!(self.shards, "{line}"); // writing to a String cannot fail
        let Some(manifest) = manifest else { return };
        self.any = true;
        self.failed += manifest.requests.failed;
        self.some_not_joined |= !manifest.joined;
        self.unmatched.duplicate += manifest.unmatched_lines.duplicate;
        self.unmatched.foreign += manifest.unmatched_lines.foreign;
        self.unmatched.malformed += manifest.unmatched_lines.malformed;
    }

    /// The part that was added last has stored nothing, and the keys of so many of its requests are not known.
    pub fn unlisted(&mut self, requests: i64) {
        self.unlisted += requests;
    }

    /// What `manifest.json` says. Counts and names only.
    fn manifest(&self, parent: &GeminiBatchJob) -> serde_json::Value {
        let total = parent.status.as_ref().and_then(|s| s.requests).map_or(0, |r| r.total);
        let shards = recorded(parent);
        json!({
            "job": {"namespace": parent.namespace(), "name": parent.name_any(), "uid": parent.uid()},
            "model": parent.spec.model,
            "method": parent.spec.method,
            "inputSha256": shards.map(|s| &s.input_sha256),
            "shards": shards.map(|s| json!({"total": s.total, "succeeded": s.succeeded, "failed": s.failed})),
            "requests": {
                "total": total,
                "succeeded": self.succeeded,
                "failed": self.failed,
                "missing": (total - self.succeeded - self.failed).max(0),
                "missingUnlisted": self.unlisted,
            },
            "joined": !self.some_not_joined,
            "unmatchedLines": {
                "duplicate": self.unmatched.duplicate,
                "foreign": self.unmatched.foreign,
                "malformed": self.unmatched.malformed,
            },
            "usage": self.usage,
        })
    }

    fn tally(&self, stored: Option<(Destination, Placed)>) -> Tally {
        Tally { succeeded: self.succeeded, usage: self.usage, stored }
    }
}

/// Takes the lines of parts in their order.
trait Lot {
    /// The lines of a part.
    async fn part(&mut self, index: usize, part: Part) -> Result<(), Failure>;
    /// Keys of a part that has no results follow.
    fn begin_keys(&mut self);
    /// One of them; whether to go on.
    fn key(&mut self, key: &str) -> bool;
    /// No more of them follow. If these were not `all`, they don't count.
    fn end_keys(&mut self, all: bool) -> Result<(), Failure>;
}

/// Looks at all parts.
async fn collect(
    ctx: &Context,
    parent: &GeminiBatchJob,
    known: &Known,
    lot: &mut impl Lot,
) -> Result<Merger, Failure> {
    let mut merger = Merger::default();
    let mut found = Box::pin(parts::all(ctx, parent, &known.slots).await?);
    for (index, slot) in known.slots.iter().enumerate() {
        let Some(part) = found.next().await.transpose()? else { break };
        let job = slot.job();
        merger.add(index, &child_name(&parent.name_any(), index), job, part.as_ref().map(|p| &p.manifest));
        if let Some(part) = part {
            lot.part(index, part).await?;
        } else if !parts::is_whole(job) {
            lot.begin_keys();
            let (requests, all) = parts::keys(ctx, parent, index, known, |key| lot.key(key)).await?;
            lot.end_keys(all)?;
            if !all {
                merger.unlisted(requests);
            }
        }
    }
    Ok(merger)
}

// ----------------------------------------------------------------------------- into a ConfigMap

/// What fits into a ConfigMap.
struct Texts {
    limit: usize,
    size: usize,
    whole: Text,
    keys_from: usize,
}

impl Texts {
    fn new(limit: usize) -> Self {
        Self { limit, size: 0, whole: Text::default(), keys_from: 0 }
    }

    /// Beyond the limit it is only counted.
    fn keep(&mut self, bytes: usize) -> bool {
        self.size = self.size.saturating_add(bytes);
        if self.size > self.limit {
            self.whole = Text::default();
        }
        self.size <= self.limit
    }

    fn add(&mut self, text: &Text) {
        if !self.keep(text.results.len() + text.missing.len() + text.unmatched.len()) {
            return;
        }
        for (whole, text) in [
            (&mut self.whole.results, &text.results),
            (&mut self.whole.missing, &text.missing),
            (&mut self.whole.unmatched, &text.unmatched),
        ] {
            whole.push_str(text);
            if !text.is_empty() && !text.ends_with('\n') {
                whole.push('\n');
            }
        }
    }
}

impl Lot for Texts {
    async fn part(&mut self, _: usize, part: Part) -> Result<(), Failure> {
        let text = match part.lines {
            Lines::Map(_, text) => text,
            Lines::Objects(place) => {
                let size = |what| named(&part.manifest.objects, what).map_or(0, |o| o.bytes);
                let all = size(What::Results) + size(What::Missing) + size(What::Unmatched);
                let all = usize::try_from(all).unwrap_or(usize::MAX);
                if self.size.saturating_add(all) > self.limit {
                    self.keep(all);
                    return Ok(());
                }
                let mut text = Text::default();
                for (what, to) in [
                    (What::Results, &mut text.results),
                    (What::Missing, &mut text.missing),
                    (What::Unmatched, &mut text.unmatched),
                ] {
                    if let Some(object) = named(&part.manifest.objects, what) {
                        *to = place.text(object).await?;
                    }
                }
                text
            }
        };
        self.add(&text);
        Ok(())
    }

    fn begin_keys(&mut self) {
        self.keys_from = self.whole.missing.len();
    }

    fn key(&mut self, key: &str) -> bool {
        let line = missing_line(key);
        let fits = self.keep(line.len());
        if fits {
            self.whole.missing.push_str(&line);
        }
        fits
    }

    fn end_keys(&mut self, all: bool) -> Result<(), Failure> {
        if !all && self.size <= self.limit {
            self.size -= self.whole.missing.len() - self.keys_from;
            self.whole.missing.truncate(self.keys_from);
        }
        Ok(())
    }
}

fn missing_line(key: &str) -> String {
    format!("{}\n", json!({ "key": key }))
}

/// Stores the whole in the ConfigMap of that name.
pub async fn to_map(
    ctx: &Context,
    parent: &GeminiBatchJob,
    name: &str,
    known: &Known,
) -> Result<Done<Merged>, kube::Error> {
    let mut texts = Texts::new(output::MAX_LINES_BYTES);
    let merger = match collect(ctx, parent, known, &mut texts).await {
        Ok(merger) => merger,
        Err(failure) => return output_store_failure(failure),
    };
    texts.keep(merger.shards.len());
    if texts.size > texts.limit {
        let bytes = i64::try_from(texts.size).unwrap_or(i64::MAX);
        return Ok(Done::Yes(Merged::TooLarge { bytes, generation: parent.metadata.generation }));
    }
    if !merger.any {
        return Ok(Done::Yes(Merged::Done(merger.tally(None))));
    }
    let mut data = BTreeMap::from([
        (output::RESULTS_KEY.to_owned(), texts.whole.results),
        (output::MANIFEST_KEY.to_owned(), format!("{:#}\n", merger.manifest(parent))),
        (SHARDS_KEY.to_owned(), merger.shards.clone()),
    ]);
    for (key, text) in
        [(output::MISSING_KEY, texts.whole.missing), (output::UNMATCHED_KEY, texts.whole.unmatched)]
    {
        if !text.is_empty() {
            data.insert(key.to_owned(), text);
        }
    }
    Ok(match output::put(&ctx.client, parent, name, data).await? {
        output::Done::Yes => {
            let stored = (Destination::ConfigMap(name.to_owned()), Placed::ConfigMap(name.to_owned()));
            Done::Yes(Merged::Done(merger.tally(Some(stored))))
        }
        output::Done::Blocked(problem) => Done::Blocked(problem),
    })
}

// ------------------------------------------------------------------------ into an object store

/// All parts, and where their lines are.
pub struct Whole {
    ctx: Arc<Context>,
    parent: GeminiBatchJob,
    /// A line for each part.
    pub shards: String,
    parts: Vec<Source>,
    /// Keys of requests without a result, as lines.
    missing: Spool,
    full: Option<std::io::Error>,
    keys_from: u64,
    bytes: u64,
}

enum Source {
    /// The ConfigMap of that name, with the results of that part.
    Map(usize, String),
    Objects(Box<Shelf>, Vec<StoredObject>),
    /// From there to there in the keys without a result.
    Keys(u64, u64),
}

impl Lot for Whole {
    async fn part(&mut self, index: usize, part: Part) -> Result<(), Failure> {
        self.parts.push(match part.lines {
            Lines::Map(name, _) => Source::Map(index, name),
            Lines::Objects(place) => {
                let results = named(&part.manifest.objects, What::Results).map_or(0, |o| o.bytes);
                self.bytes = self.bytes.saturating_add(u64::try_from(results).unwrap_or(0));
                Source::Objects(Box::new(place), part.manifest.objects)
            }
        });
        Ok(())
    }

    fn begin_keys(&mut self) {
        self.keys_from = self.missing.len();
    }

    fn key(&mut self, key: &str) -> bool {
        self.full = self.missing.append(missing_line(key).as_bytes()).err();
        self.full.is_none()
    }

    fn end_keys(&mut self, all: bool) -> Result<(), Failure> {
        if let Some(e) = self.full.take() {
            return Err(Failure::Passing(no_room(&e)));
        }
        if all {
            self.parts.push(Source::Keys(self.keys_from, self.missing.len()));
        }
        Ok(())
    }
}

impl Whole {
    /// Writes the lines of one kind, part after part.
    pub async fn write(&self, what: What, sink: &mut Sink<'_>) -> Result<(), Failure> {
        for source in &self.parts {
            match source {
                Source::Map(index, name) => {
                    let text = parts::text(&self.ctx, &self.parent, *index, name).await?;
                    let text = text.ok_or(Failure::Changed)?; // it was there a moment ago
                    match what {
                        What::Results => sink.put(text.results.as_bytes()).await?,
                        What::Errors => {
                            for line in text.results.split_inclusive('\n').filter(|line| is_error(line)) {
                                sink.put(line.as_bytes()).await?;
                            }
                        }
                        What::Missing => sink.put(text.missing.as_bytes()).await?,
                        What::Unmatched => sink.put(text.unmatched.as_bytes()).await?,
                    }
                }
                Source::Objects(place, objects) => {
                    if let Some(object) = named(objects, what) {
                        place.copy(object, sink).await?;
                    }
                }
                Source::Keys(from, to) if what == What::Missing => self.keys(*from, *to, sink).await?,
                Source::Keys(..) => {}
            }
            sink.end_line().await?;
        }
        Ok(())
    }

    async fn keys(&self, mut from: u64, to: u64, sink: &mut Sink<'_>) -> Result<(), Failure> {
        while from < to {
            let size = usize::try_from(to - from).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            let mut chunk = vec![0; size];
            self.missing.read_exact_at(&mut chunk, from).map_err(|e| Failure::Passing(no_room(&e)))?;
            sink.put(&chunk).await?;
            from += size as u64;
        }
        Ok(())
    }
}

/// Whether a line of results has an error.
fn is_error(line: &str) -> bool {
    #[derive(Deserialize)]
    struct Line {
        error: Option<serde::de::IgnoredAny>,
    }
    serde_json::from_str::<Line>(line).is_ok_and(|line| line.error.is_some())
}

/// The object with lines of that kind.
fn named(objects: &[StoredObject], what: What) -> Option<&StoredObject> {
    let (_, name) = KINDS.iter().find(|(kind, _)| *kind == what)?;
    objects.iter().find(|object| object.name.rsplit('/').next() == Some(name))
}

/// Stores the whole in an object store. Takes as long as that is large.
pub async fn to_store(
    ctx: Arc<Context>,
    parent: GeminiBatchJob,
    at: ObjectStoreOutput,
    known: Known,
) -> Result<Done<Merged>, kube::Error> {
    let mut whole = Whole {
        missing: Spool::new(&ctx.scratch, HELD_BYTES),
        ctx: Arc::clone(&ctx),
        parent: parent.clone(),
        shards: String::new(),
        parts: Vec::new(),
        full: None,
        keys_from: 0,
        bytes: 0,
    };
    let merger = match collect(&ctx, &parent, &known, &mut whole).await {
        Ok(merger) => merger,
        Err(failure) => return output_store_failure(failure),
    };
    if whole.bytes > store::MAX_WRITTEN_BYTES {
        let bytes = i64::try_from(whole.bytes).unwrap_or(i64::MAX);
        return Ok(Done::Yes(Merged::TooLarge { bytes, generation: parent.metadata.generation }));
    }
    if !merger.any {
        return Ok(Done::Yes(Merged::Done(merger.tally(None))));
    }
    whole.shards.clone_from(&merger.shards);
    let manifest = merger.manifest(&parent);
    let content = Content::Shards(Box::new(whole));
    let delivery = Delivery { ctx, job: parent, at: at.clone(), attempt: 0, content, manifest };
    Ok(match delivery.deliver().await? {
        Done::Yes(stored) => {
            Done::Yes(Merged::Done(merger.tally(Some((Destination::Store(at), Placed::Store(stored))))))
        }
        Done::Blocked(problem) => Done::Blocked(problem),
        Done::Passing(problem) => Done::Passing(problem),
    })
}

fn output_store_failure<T>(failure: Failure) -> Result<Done<T>, kube::Error> {
    crate::controller::output_store::done_of(Err(failure))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(keys: &[&str], missing: &[&str]) -> Text {
        let lines = |keys: &[&str]| keys.iter().map(|k| missing_line(k)).collect();
        Text { results: lines(keys), missing: lines(missing), unmatched: String::new() }
    }

    fn keys(texts: &mut Texts, keys: &[&str], all: bool) {
        texts.begin_keys();
        for key in keys {
            texts.key(key);
        }
        texts.end_keys(all).unwrap();
    }

    #[test]
    fn results_follow_one_another_and_what_does_not_fit_is_only_counted() {
        let mut texts = Texts::new(10_000);
        texts.add(&text(&["a", "b"], &[]));
        keys(&mut texts, &["c", "d"], true);
        keys(&mut texts, &["not all of them"], false);
        // The last line of a file may lack its break.
        texts.add(&Text { results: "{\"key\":\"e\"}".to_owned(), ..text(&[], &["f"]) });
        texts.add(&text(&["g"], &[]));
        assert_eq!(
            texts.whole.results,
            "{\"key\":\"a\"}\n{\"key\":\"b\"}\n{\"key\":\"e\"}\n{\"key\":\"g\"}\n"
        );
        assert_eq!(texts.whole.missing, "{\"key\":\"c\"}\n{\"key\":\"d\"}\n{\"key\":\"f\"}\n");

        let mut texts = Texts::new(300);
        texts.add(&text(&["a"], &[]));
        texts.add(&text(&["x".repeat(300).as_str()], &[]));
        keys(&mut texts, &["k"], true);
        assert!(texts.whole == Text::default() && texts.size > 320, "{}", texts.size);
    }

    #[test]
    fn what_parts_counted_is_summed_whether_their_jobs_are_there_or_not() {
        let manifest = |succeeded: i64, joined: bool| -> Manifest {
            serde_json::from_value(
                json!({"requests": {"succeeded": succeeded, "failed": 1}, "joined": joined,
                "usage": {"promptTokens": 1, "outputTokens": 2, "totalTokens": 3},
                "unmatchedLines": {"duplicate": 1, "foreign": 2, "malformed": 3}}),
            )
            .unwrap()
        };
        let mut merger = Merger::default();
        merger.add(0, "job-0000", None, Some(&manifest(2, true)));
        merger.add(1, "job-0001", None, None);
        merger.unlisted(5);
        merger.add(2, "job-0002", None, Some(&manifest(3, true)));
        assert_eq!((merger.succeeded, merger.failed, merger.unlisted, merger.any), (5, 2, 5, true));
        assert_eq!(
            (merger.unmatched.duplicate, merger.unmatched.foreign, merger.unmatched.malformed),
            (2, 4, 6)
        );
        assert_eq!((merger.usage.total_tokens, merger.shards.lines().count()), (6, 3));
        assert!(!merger.some_not_joined);
        merger.add(3, "job-0003", None, Some(&manifest(0, false)));
        assert!(merger.some_not_joined);
    }

    #[test]
    fn errors_are_told_from_responses() {
        assert!(is_error(r#"{"key":"a","error":{"code":3}}"#));
        assert!(!is_error(r#"{"key":"a","response":{"error":"no"}}"#));
    }
}
