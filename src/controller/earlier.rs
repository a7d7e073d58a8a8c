//! What earlier attempts of a job left: a further one carries only what is missing, and the results of all are
//! stored together. Client required.
//!
//! The output object is asked first: what is in it does not expire. Without one the result files at Gemini are read
//! again.

use std::collections::HashSet;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, ResourceExt as _};

use super::Problem;
use super::act::may_see;
use super::collect::is_unanswered;
use super::input::Input;
use super::output;
use super::run::Context;
use crate::api::{Attempt, GeminiBatchJob, Reason};
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
}

/// Gives each line of earlier attempts to `take`, in the shape of a result file's lines. None, if there was none.
pub async fn lines(
    ctx: &Context,
    job: &GeminiBatchJob,
    key: &ApiKey,
    mut take: impl FnMut(&str, &ResultLine<'_>),
) -> Result<(), Error> {
    // The keys of somebody else's file are not known: a further attempt carries it whole, and replaces what was.
    if over(job).is_empty() || !job.spec.has_own_input() {
        return Ok(());
    }
    if let Some(stored) = stored(ctx, job).await? {
        for line in stored.lines() {
            if let Ok(parsed) = ResultLine::parse(line) {
                take(line, &parsed);
            }
        }
        return Ok(());
    }
    for attempt in over(job) {
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
            if let Some((text, Ok(parsed))) = line.text().map(|text| (text, ResultLine::parse(text))) {
                take(text, &parsed);
            }
        }
    }
    Ok(())
}

/// Those requests that no earlier attempt has a result for.
pub async fn without_answered(
    ctx: &Context,
    job: &GeminiBatchJob,
    key: &ApiKey,
    input: Input,
) -> Result<Result<Input, Problem>, kube::Error> {
    let mut keys = HashSet::new();
    let read = answered(ctx, job, key, |key| {
        keys.insert(key.to_owned());
    });
    Ok(read.await?.map(|()| input.without(&keys)))
}

/// Gives each key that an earlier attempt has a result for to `take`, some of them more than once.
pub async fn answered(
    ctx: &Context,
    job: &GeminiBatchJob,
    key: &ApiKey,
    mut take: impl FnMut(&str),
) -> Result<Result<(), Problem>, kube::Error> {
    let read = lines(ctx, job, key, |_, line| {
        if let Some(key) = line.key.as_deref().filter(|_| !is_unanswered(&line.outcome)) {
            take(key);
        }
    });
    match read.await {
        Ok(()) => Ok(Ok(())),
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

/// The results that are in the output object, if it is there and holds any.
async fn stored(ctx: &Context, job: &GeminiBatchJob) -> Result<Option<String>, kube::Error> {
    let Some(name) = job.status.as_ref().and_then(|s| s.output.as_ref()?.config_map.as_ref()) else {
        return Ok(None);
    };
    let maps: Api<ConfigMap> = Api::namespaced(ctx.client.clone(), &job.namespace().unwrap_or_default());
    let there = maps.get_opt(name).await?.filter(|there| output::is_ours(job, there));
    Ok(there.and_then(|there| there.data?.remove(output::RESULTS_KEY)))
}
