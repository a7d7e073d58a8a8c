//! What earlier attempts of a job left: a further one carries only what is missing, and the results of all are
//! stored together. Client required.
//!
//! The output object is asked first: what is in it does not expire. Without one the result files at Gemini are read
//! again.

use std::collections::HashSet;
use std::io;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, ResourceExt as _};

use super::act::may_see;
use super::destination::Destination;
use super::gather::ResultFile;
use super::input::Input;
use super::join::{Join, Keep, Limits};
use super::retry::{self, Judge};
use super::run::Context;
use super::stored::Failure;
use super::{Problem, decide, output, output_store};
use crate::api::{Attempt, GeminiBatchJob, ObjectStoreOutput, Reason};
use crate::gemini::results::{self, ResultLine};
use crate::gemini::{self, ApiKey, BatchName, FileName};

/// Why the lines of earlier attempts can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or did not answer.
    #[error(transparent)]
    Kubernetes(#[from] kube::Error),
    /// Gemini refused or did not answer.
    #[error(transparent)]
    Gemini(#[from] gemini::Error),
    /// An object store did.
    #[error("{}", .0.message)]
    Store(Problem),
    /// Whoever takes the lines can't.
    #[error(transparent)]
    Taken(io::Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Kubernetes(e) => Self::Kubernetes(e),
            Failure::Problem { problem, .. } | Failure::Passing(problem) => Self::Store(problem),
            Failure::Changed => Self::Store(Problem::new(
                Reason::StoreUnavailable,
                "the results of an earlier attempt were changed while they were read; they are read again",
            )),
        }
    }
}

/// One line.
pub enum Line<'a> {
    /// In the shape of a result file's lines, and the attempt that it came from.
    Of {
        /// The attempt.
        attempt: i32,
        /// As it came.
        raw: &'a str,
        /// What it says.
        line: &'a ResultLine<'a>,
    },
    /// One that belonged to no request.
    Unmatched(&'a [u8]),
}

/// Gives each line of earlier attempts to `take`, until that fails. None, if there was none. If the results of the
/// attempt at hand are stored already, they are among these, and what is known of its result file is returned.
pub async fn lines(
    ctx: &Context,
    job: &GeminiBatchJob,
    key: &ApiKey,
    mut take: impl FnMut(Line<'_>) -> io::Result<()>,
) -> Result<Option<ResultFile>, Error> {
    let mut stored_up_to = 0;
    let begun = job.status.as_ref().is_some_and(|s| !s.attempts.is_empty());
    if let Some(Destination::Store(at)) = Destination::of(job).filter(|_| begun) {
        match published(ctx, job, &at, &mut take).await? {
            Some((up_to, file)) if up_to >= decide::attempt_at_hand(job) => return Ok(Some(file)),
            Some((up_to, _)) => stored_up_to = up_to,
            None => {}
        }
    }
    // The keys of somebody else's file are not known: a further attempt carries it whole, and replaces what was.
    if over(job).is_empty() || !job.spec.has_own_input() {
        return Ok(None);
    }
    if stored_up_to == 0
        && let Some(stored) = stored(ctx, job).await?
    {
        for raw in stored.lines.lines() {
            if let Ok(line) = &ResultLine::parse(raw) {
                take(Line::Of { attempt: output::attempt_of(raw), raw, line }).map_err(Error::Taken)?;
            }
        }
        stored_up_to = stored.up_to;
    }
    for attempt in over(job).into_iter().filter(|a| a.number > stored_up_to) {
        let Some(file) = attempt.outcome.as_ref().and_then(|o| o.output_file.as_ref()) else { continue };
        let Ok(mut file) = FileName::parse(file) else { continue };
        if job.spec.credentials.is_none() {
            // The operator's own key reads only what is the job's own: not what its status says, but what the batch says.
            let name = attempt.batch_name.as_ref().and_then(|name| BatchName::parse(name).ok());
            let Some(name) = name else { continue };
            let batch = ctx.gemini.get_batch(key, &name).await?;
            if !may_see(job, &ctx.ring().cluster_id, &batch) {
                return Err(Error::Gemini(gemini::Error::not_theirs()));
            }
            file = batch.output_file_or_derived();
        }
        let mut lines = results::Lines::new(ctx.gemini.download(key, &file).await?.stream.boxed());
        while let Some(line) = lines.next().await? {
            if let Some((raw, Ok(line))) = line.text().map(|text| (text, ResultLine::parse(text))) {
                take(Line::Of { attempt: attempt.number, raw, line: &line }).map_err(Error::Taken)?;
            }
        }
    }
    Ok(None)
}

/// What stands in an object store already, and of which attempt it is the last word.
async fn published(
    ctx: &Context,
    job: &GeminiBatchJob,
    at: &ObjectStoreOutput,
    take: &mut impl FnMut(Line<'_>) -> io::Result<()>,
) -> Result<Option<(i32, ResultFile)>, Error> {
    let Some(there) = output_store::published(ctx, job, at).await? else { return Ok(None) };
    // What a further attempt with an unknown input left is no part of what this one leaves.
    if there.attempt < decide::attempt_at_hand(job) && !job.spec.has_own_input() {
        return Ok(None);
    }
    for object in [&there.results, &there.unmatched].into_iter().flatten() {
        let unmatched = there.unmatched.as_ref() == Some(object);
        let reading = futures::stream::unfold(Some(there.store.read(object)), async |reader| {
            let mut reader = reader?;
            match reader.next().await {
                Ok(bytes) => bytes.map(|bytes| (Ok(bytes), Some(reader))),
                Err(e) => Some((Err(Error::from(output_store::failure(&e))), None)),
            }
        });
        let mut lines = results::Lines::new(reading.boxed());
        while let Some(line) = lines.next().await? {
            let taken = match line.text() {
                _ if unmatched => take(Line::Unmatched(line.content())),
                Some(raw) => match &ResultLine::parse(raw) {
                    Ok(line) => take(Line::Of { attempt: output::attempt_of(raw), raw, line }),
                    Err(_) => Ok(()),
                },
                None => Ok(()),
            };
            taken.map_err(Error::Taken)?;
        }
    }
    Ok(Some((there.attempt, there.file)))
}

/// Those requests that no earlier attempt has a result for, and those whose error is worth another try.
pub async fn without_answered(
    ctx: &Context,
    job: &GeminiBatchJob,
    key: &ApiKey,
    input: Input,
) -> Result<Result<Input, Problem>, kube::Error> {
    let mut keys = HashSet::new();
    let read = answered(ctx, job, key, |key| {
        keys.insert(key.to_owned());
        Ok(())
    });
    Ok(read.await?.map(|()| input.without(&keys)))
}

/// Gives the key of each request that no further attempt carries to `take`, until that fails. Writes to the temporary
/// directory if there are many.
pub async fn answered(
    ctx: &Context,
    job: &GeminiBatchJob,
    key: &ApiKey,
    mut take: impl FnMut(&str) -> io::Result<()>,
) -> Result<Result<(), Problem>, kube::Error> {
    // A request may have several lines, of which the last word counts.
    let limits = Limits::new(ctx.scratch.clone());
    let attempt = decide::attempt_at_hand(job);
    let mut join = Join::without_keys(limits, Keep::Keys, attempt, Judge::of(job));
    let read = lines(ctx, job, key, |line| match line {
        Line::Of { attempt, raw, line } => join.earlier(raw, line, attempt),
        Line::Unmatched(_) => Ok(()),
    });
    let read = match read.await {
        Ok(_) => {
            let retry = retry::allowed_after(job, retry::tries(job));
            let mut settled = |join: Join| {
                join.finish()?.each(|key, standing| if standing.is_open(retry) { Ok(()) } else { take(key) })
            };
            settled(join).map_err(Error::Taken)
        }
        Err(e) => Err(e),
    };
    match read {
        Ok(()) => Ok(Ok(())),
        Err(Error::Store(problem)) => Ok(Err(problem)),
        Err(Error::Taken(e)) => Ok(Err(super::gather::no_room(&e))),
        Err(Error::Kubernetes(e)) => Err(e),
        Err(Error::Gemini(e)) if e.is_absent() => Ok(Err(Problem::new(
            Reason::ResultsLost,
            "the results of an earlier attempt can't be read any more, so it can't be told which requests are missing: put \
             back the ConfigMap that spec.output names, or the API key that may read status.attempts[].outcome.outputFile; \
             or create a new GeminiBatchJob for what you need",
        ))),
        Err(Error::Gemini(e)) => Ok(Err(Problem::new(
            if e.is_credentials() { Reason::CredentialsRefused } else { Reason::GeminiUnavailable },
            format!("reading the results of an earlier attempt fails: {e}; it is tried again"),
        ))),
    }
}

/// The attempts that are over, in their order.
fn over(job: &GeminiBatchJob) -> Vec<&Attempt> {
    let attempts = job.status.iter().flat_map(|s| &s.attempts);
    let mut over: Vec<_> = attempts.filter(|a| a.outcome.is_some()).collect();
    over.sort_by_key(|a| a.number);
    over
}

/// What is in the output object.
struct Stored {
    lines: String,
    /// The last attempt whose lines are among them: later ones were to go nowhere, and are with Gemini.
    up_to: i32,
}

/// The results that are in the output object, if it is there and holds any.
async fn stored(ctx: &Context, job: &GeminiBatchJob) -> Result<Option<Stored>, kube::Error> {
    let Some(name) = job.status.as_ref().and_then(|s| s.output.as_ref()?.config_map.as_ref()) else {
        return Ok(None);
    };
    let maps: Api<ConfigMap> = Api::namespaced(ctx.client.clone(), &job.namespace().unwrap_or_default());
    let there = maps.get_opt(name).await?.filter(|there| output::is_ours(job, there));
    Ok(there.and_then(|there| {
        let mut data = there.data?;
        let lines = data.remove(output::RESULTS_KEY)?;
        // Without its manifest it is taken for all that there is.
        let up_to = data.get(output::MANIFEST_KEY).and_then(|manifest| output::stored_up_to(manifest));
        Some(Stored { lines, up_to: up_to.unwrap_or(i32::MAX) })
    }))
}
