//! Reads what a batch left, and what earlier attempts did, and joins it with what was sent. Client required.
//!
//! A result file has up to 2 GB, so all of this is streams, and what does not fit into memory lies in the temporary
//! directory. Writing there is not asynchronous, so it is done on a thread of its own.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::collect::{Collected, Kept, Lines};
use super::destination::Destination;
use super::identity::hex;
use super::join::{Join, Keep, Limits};
use super::retry::Judge;
use super::run::Context;
use super::stored::{self, Failure};
use super::transfers::Room;
use super::{Credential, Problem, decide, earlier, observe, output};
use crate::api::{GeminiBatchJob, Reason};
use crate::crash;
use crate::gemini::results::{self, ResultLine};
use crate::gemini::{self, Batch, BatchName};

/// What is to be read.
#[derive(Clone)]
pub struct Order {
    /// The controller.
    pub ctx: Arc<Context>,
    /// The job.
    pub job: GeminiBatchJob,
    /// The API key.
    pub key: Arc<Credential>,
    /// The batch.
    pub name: BatchName,
    /// The batch as GET shows it, if Gemini still does.
    pub batch: Option<Batch>,
    /// Says what lines mean.
    pub judge: Judge,
    /// What earlier attempts left is gone: it is done without.
    pub without_earlier: bool,
    /// The right to hold them, if they are to be held for long.
    pub room: Option<Room>,
}

/// Why it can't be read, or not now.
#[derive(Debug)]
pub enum Halt {
    /// The API server refused or did not answer.
    Kubernetes(kube::Error),
    /// Gemini does not show the result file.
    Absent,
    /// It does not show that of an earlier attempt.
    EarlierAbsent,
    /// Gemini refused or did not answer.
    Gemini {
        /// What was to be done.
        what: &'static str,
        /// What it said.
        error: gemini::Error,
    },
    /// Something else that is tried again.
    Passing(Problem),
}

impl From<earlier::Error> for Halt {
    fn from(e: earlier::Error) -> Self {
        match e {
            earlier::Error::Kubernetes(e) => Self::Kubernetes(e),
            earlier::Error::Gemini(e) if e.is_absent() => Self::EarlierAbsent,
            earlier::Error::Gemini(error) => {
                Self::Gemini { what: "reading the results of an earlier attempt", error }
            }
            earlier::Error::Store(problem) => Self::Passing(problem),
            earlier::Error::Taken(e) => no_room(&e).into(),
        }
    }
}

impl From<Problem> for Halt {
    fn from(problem: Problem) -> Self {
        Self::Passing(problem)
    }
}

/// The temporary directory is the operator's own affair.
#[must_use]
pub fn no_room(e: &io::Error) -> Problem {
    let what = if e.kind() == io::ErrorKind::StorageFull { "it is full" } else { "it can't be written" };
    Problem::new(
        Reason::StoreUnavailable,
        format!(
            "the operator has no room for the results in its temporary directory ({what}): an administrator has to give it \
             more (--temporary-bytes, TMPDIR); it is tried again"
        ),
    )
}

/// Has the work done on a thread that may be held up. It ends soon after nobody waits for it any more.
pub async fn aside<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let stop = CancellationToken::new();
    let _ends = stop.clone().drop_guard();
    let runtime = tokio::runtime::Handle::current();
    let thread = tokio::task::spawn_blocking(move || runtime.block_on(stop.run_until_cancelled_owned(work)));
    match thread.await {
        Ok(Some(done)) => done,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        // The process ends.
        Ok(None) | Err(_) => std::future::pending().await,
    }
}

impl Order {
    /// Reads and joins.
    pub async fn gather(self) -> Result<Collected, Halt> {
        let (mut join, mut collected) = self.keys().await?;
        let present = if self.without_earlier { None } else { self.earlier(&mut join).await? };
        let file = match present {
            // They were stored before this process learned of it: nothing more is to be had from Gemini.
            Some(file) => file,
            None => self.present(&mut join).await?,
        };
        let joined = join.finish().map_err(|e| no_room(&e))?;
        collected = Collected {
            joined: collected.joined,
            input_changed: collected.input_changed,
            without_earlier: self.without_earlier,
            file: file.name,
            bytes: file.bytes,
            sha256: file.sha256,
            ..Collected::of(&joined)
        };
        if let Some(unmatched) = file.unmatched {
            collected.duplicate_lines += unmatched.duplicate;
            collected.foreign_lines += unmatched.foreign;
            collected.malformed_lines += unmatched.malformed;
            collected.usage = unmatched.usage;
        }
        collected.lines = self.lines(Kept(Arc::new(joined), self.room.clone())).map_err(|e| no_room(&e))?;
        Ok(collected)
    }

    /// What is kept of the lines.
    fn lines(&self, kept: Kept) -> io::Result<Lines> {
        match Destination::of(&self.job) {
            None => Ok(Lines::Dropped),
            Some(Destination::Store(_)) => kept.within(None),
            Some(Destination::ConfigMap(_)) => kept.within(Some(output::MAX_LINES_BYTES)),
        }
    }

    /// A join that knows the keys that were sent, if the input still is what was recorded.
    async fn keys(&self) -> Result<(Join, Collected), Halt> {
        let Self { ctx, job, .. } = self;
        let attempt = decide::current_attempt(job).map_or(1, |a| a.number);
        let keep = if job.spec.output.is_some() { Keep::Lines } else { Keep::Counts };
        let limits = Limits::new(ctx.scratch.clone());
        let without = |input_changed| {
            let join = Join::without_keys(limits.clone(), keep, attempt, self.judge.clone());
            (join, Collected { input_changed, ..Collected::default() })
        };
        // The first attempt carried all requests.
        let mut attempts = job.status.iter().flat_map(|s| &s.attempts);
        let first = attempts.find(|a| a.number == 1).or(decide::current_attempt(job));
        let Some(recorded) = first.and_then(|a| a.input_sha256.as_ref()) else { return Ok(without(false)) };
        let mut join = Join::with_keys(limits.clone(), keep, attempt, self.judge.clone());
        let known = if let Some(of) = job.spec.stored_input() {
            let mut full = None;
            let read = stored::keys(ctx, job, of, recorded, |key| {
                let taken = join.key(key);
                let going_on = taken.is_ok();
                full = full.take().or(taken.err());
                going_on
            });
            let read = read.await;
            if let Some(e) = full {
                return Err(no_room(&e).into());
            }
            match read {
                Ok(known) => known,
                Err(Failure::Kubernetes(e)) => return Err(Halt::Kubernetes(e)),
                Err(failure) => {
                    let ended = self.batch.as_ref().and_then(|b| b.end_time);
                    match failure {
                        Failure::Problem { problem, .. } | Failure::Passing(problem)
                            if stored::worth_waiting(problem.reason, ended, ctx) =>
                        {
                            return Err(Halt::Passing(problem));
                        }
                        _ => false,
                    }
                }
            }
        } else {
            let input = observe::input(&ctx.client, job, ctx.max_input_bytes).await;
            match input.map_err(Halt::Kubernetes)? {
                Ok(input) if input.sha256 == *recorded => {
                    for key in &input.keys {
                        join.key(key).map_err(|e| no_room(&e))?;
                    }
                    true
                }
                _ => false,
            }
        };
        if known { Ok((join, Collected { joined: true, ..Collected::default() })) } else { Ok(without(true)) }
    }

    /// What earlier attempts left. If that is all of this one as well: what is known of its result file.
    async fn earlier(&self, join: &mut Join) -> Result<Option<ResultFile>, Halt> {
        let Self { ctx, job, key, .. } = self;
        let read = earlier::lines(ctx, job, &key.key, |line| match line {
            earlier::Line::Of { attempt, raw, line } => join.earlier(raw, line, attempt),
            earlier::Line::Unmatched(raw) => join.carried(raw),
        });
        Ok(read.await?)
    }

    /// The batch's own result file.
    async fn present(&self, join: &mut Join) -> Result<ResultFile, Halt> {
        let Self { ctx, key, name, batch, .. } = self;
        let halt = |error: gemini::Error| {
            if error.is_absent() { Halt::Absent } else { Halt::Gemini { what: "reading the results", error } }
        };
        let batch = batch.as_ref();
        let inlined = batch.filter(|b| b.output_file.is_none()).and_then(|b| b.inlined.clone());
        let file = batch.map_or_else(|| name.derived_output_file(), Batch::output_file_or_derived);
        let (stream, file) = match inlined {
            // A small job may be answered with its results instead of a file.
            Some(lines) => (futures::stream::iter([Ok(Bytes::from(lines))]).boxed(), None),
            None => (ctx.gemini.download(&key.key, &file).await.map_err(halt)?.stream, Some(file)),
        };
        let mut lines = results::Lines::new(stream);
        let (mut bytes, mut hash) = (0i64, Sha256::new());
        while let Some(line) = lines.next().await.map_err(halt)? {
            bytes = bytes.saturating_add(i64::try_from(line.with_break().len()).unwrap_or(i64::MAX));
            hash.update(line.with_break());
            let taken = if line.is_cut() {
                join.piece(line.content(), line.ends())
            } else {
                match line.text().map(|text| (text, ResultLine::parse(text))) {
                    Some((text, Ok(parsed))) => join.line(text, &parsed),
                    Some((text, Err(_))) if text.trim().is_empty() => Ok(()),
                    _ => join.malformed(line.content()),
                }
            };
            taken.map_err(|e| no_room(&e))?;
            crash::at("results", "line");
        }
        Ok(ResultFile {
            name: file.map(|f| f.to_string()),
            bytes,
            sha256: hex(&hash.finalize()),
            unmatched: None,
        })
    }
}

/// What is known of a result file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResultFile {
    /// Its name.
    pub name: Option<String>,
    /// Its size.
    pub bytes: i64,
    /// Its SHA-256 in hexadecimal.
    pub sha256: String,
    /// If its lines were read from where they had been stored: what was counted then.
    pub unmatched: Option<Unmatched>,
}

/// What is not to be seen any more in lines that were stored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Unmatched {
    /// Lines that repeat a key.
    pub duplicate: i64,
    /// Lines with a key that was not sent.
    pub foreign: i64,
    /// Lines that can't be read.
    pub malformed: i64,
    /// Tokens of all lines.
    pub usage: crate::api::Usage,
}
