//! Who may send next, for each API key: a ceiling of active batches, first come first served, and a pause after
//! a refusal for lack of quota. Pure: no client required, no clock.
//!
//! The ledger is the leader's memory only. It is made anew from the first complete list of jobs in each turn of
//! leadership, before any job is worked on, and kept current by each pass over a job. Losing it costs nothing.
//!
//! A job is *in line* from the moment it is seen until a pass over it ends without asking for a slot. The first
//! ones in line may take the slots that are free: a job that is seen but was not looked at yet holds its place
//! against younger ones, since passes run in any order. Whoever does not ask (because it is stalled, suspended or
//! deleted) has left the line, so nobody waits behind it.
//!
//! After a refusal for lack of quota the key is closed for a while. Then the first in line tries alone; the others
//! follow when it has succeeded. Whoever tried in vain lets those try who did not: quotas are counted by model and by
//! size as well, and one job that can never fit must not stop all others.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};

use super::memory::after;
use super::{Problem, decide};
use crate::api::{Attempt, GeminiBatchJob, Reason};

/// Why jobs wait to be sent, apart from what is wrong with them.
pub const REASONS: [Reason; 4] =
    [Reason::WaitingForSlot, Reason::WaitingForQuota, Reason::SubmissionsPaused, Reason::CrdOutdated];

/// A job's place in line: by creation, then by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    created: Timestamp,
    namespace: String,
    name: String,
    uid: String,
}

/// Who asks: its place, and the Secret that its key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asker {
    ticket: Ticket,
    secret: String,
}

impl Asker {
    /// `None` for an object that the API server has not stored.
    #[must_use]
    pub fn of(job: &GeminiBatchJob) -> Option<Self> {
        let meta = &job.metadata;
        let namespace = meta.namespace.clone().unwrap_or_default();
        let secret =
            job.spec.credentials.as_ref().map_or_else(String::new, |c| {
                format!("{namespace}/{}/{}", c.secret_ref.name, c.secret_ref.key)
            });
        let ticket = Ticket {
            created: meta.creation_timestamp.as_ref().map_or(Timestamp::MIN, |t| t.0),
            namespace,
            name: meta.name.clone()?,
            uid: meta.uid.clone()?,
        };
        Some(Self { ticket, secret })
    }
}

/// Why a job may not be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// All slots are taken, or others are first in line for those that are free.
    Slot,
    /// Gemini refused for lack of quota; closed until then, or until somebody else has tried.
    Quota {
        /// When the next one may try.
        until: Timestamp,
    },
}

/// How far a job in line has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It was seen in the watch; a pass over it is about to begin.
    Seen,
    /// A pass is under way.
    Passing,
    /// It asked and was held.
    Waiting,
    /// It was told to ask again.
    Called,
}

#[derive(Debug)]
struct Entry {
    asker: Asker,
    /// The API key that it last asked with, by its fingerprint.
    key: Option<String>,
    stage: Stage,
    reason: Reason,
}

#[derive(Debug, Default)]
struct Key {
    /// UIDs of the jobs with an active batch, or one that is being sent.
    active: HashSet<String>,
    line: BTreeSet<Ticket>,
    closed: Option<Closed>,
}

/// Gemini refused for lack of quota.
#[derive(Debug)]
struct Closed {
    /// How often in a row.
    refusals: u32,
    until: Timestamp,
    /// The job that tries.
    probe: Option<String>,
    /// How often each job tried in vain, by UID.
    tried: HashMap<String, u32>,
}

impl Closed {
    /// Who tries next: whoever tried least, then the first in line.
    fn rank<'a>(&self, ticket: &'a Ticket) -> (u32, &'a Ticket) {
        (self.tried.get(&ticket.uid).copied().unwrap_or(0), ticket)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    limit: usize,
    keys: HashMap<String, Key>,
    entries: HashMap<String, Entry>,
    /// Those whose API key is not known yet, by Secret.
    unread: HashMap<String, BTreeSet<Ticket>>,
    /// The key of each active job.
    active: HashMap<String, String>,
    /// Who is called for another reason than its turn.
    errands: Vec<Ticket>,
    /// Jobs that something else than a slot or the quota holds: only to be counted.
    held: HashMap<String, Reason>,
}

impl Ledger {
    /// Nobody is active or waits. At most `limit` batches of one key shall be active at once.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(1),
            keys: HashMap::new(),
            entries: HashMap::new(),
            unread: HashMap::new(),
            active: HashMap::new(),
            held: HashMap::new(),
            errands: Vec::new(),
        }
    }

    /// At most so many batches of one key are active at once.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// A new turn of leadership: these are all jobs there are.
    pub fn restart<'a>(&mut self, jobs: impl IntoIterator<Item = &'a GeminiBatchJob> + Clone) {
        *self = Self::new(self.limit);
        // A refusal that was followed by a success does not count any more.
        let mut succeeded: HashMap<&str, Timestamp> = HashMap::new();
        for attempt in jobs.clone().into_iter().filter_map(decide::current_attempt) {
            if attempt.batch_name.is_some() {
                let last = succeeded.entry(&attempt.credential_fingerprint).or_insert(Timestamp::MIN);
                *last = (*last).max(attempt.intent_time.0);
            }
        }
        for job in jobs {
            self.note(job, false);
            self.seen(job);
            let Some(attempt) = decide::current_attempt(job).filter(|_| !decide::is_finished(job)) else {
                continue;
            };
            let key = &attempt.credential_fingerprint;
            let Some(refusal) = quota_refusal(attempt, key) else { continue };
            if succeeded.get(key.as_str()).is_some_and(|last| *last > refusal.time.0) {
                continue;
            }
            let refusals = u32::try_from(attempt.refusals.unwrap_or(1)).unwrap_or(1);
            let until = refusal.retry_time.0;
            let closed = &mut self.keys.entry(key.clone()).or_default().closed;
            let closed = closed.get_or_insert(Closed { refusals, until, probe: None, tried: HashMap::new() });
            closed.refusals = closed.refusals.max(refusals);
            closed.until = closed.until.max(until);
            closed.tried.extend(job.metadata.uid.clone().map(|uid| (uid, refusals)));
        }
    }

    /// The watch lists all jobs again: whoever is not among them is gone.
    pub fn relisted<'a>(&mut self, jobs: impl IntoIterator<Item = &'a GeminiBatchJob>) {
        let mut there = HashSet::new();
        for job in jobs {
            self.seen(job);
            there.extend(job.metadata.uid.clone());
        }
        let known = self.entries.keys().chain(self.active.keys()).chain(self.held.keys());
        let gone: Vec<String> = known.filter(|uid| !there.contains(*uid)).cloned().collect();
        for uid in &gone {
            self.gone(uid);
        }
    }

    /// The job is there, and a pass over it will begin soon: it holds its place in line until then.
    pub fn seen(&mut self, job: &GeminiBatchJob) {
        let Some(asker) = Asker::of(job) else { return };
        let uid = &asker.ticket.uid;
        if may_ask(job) && !self.active.contains_key(uid) && !self.entries.contains_key(uid) {
            self.enter(asker, None, Stage::Seen, Reason::WaitingForSlot);
        }
    }

    /// The job does not exist any more.
    pub fn gone(&mut self, uid: &str) {
        self.leave(uid);
        self.set_active(uid, None);
        self.held.remove(uid);
    }

    /// Whether the job was told to ask again.
    #[must_use]
    pub fn is_called(&self, uid: &str) -> bool {
        self.entries.get(uid).is_some_and(|e| e.stage == Stage::Called)
    }

    /// A pass over the job begins.
    pub fn begin(&mut self, uid: &str) {
        if let Some(entry) = self.entries.get_mut(uid) {
            entry.stage = Stage::Passing;
        }
    }

    /// There was nothing to do for the job.
    pub fn idle(&mut self, uid: &str) {
        if self.entries.get(uid).is_some_and(|e| e.stage == Stage::Seen) {
            self.leave(uid);
        }
    }

    /// The pass has ended. `held`: the job asked with this key, and has to wait for this reason.
    pub fn end(&mut self, asker: Option<&Asker>, uid: &str, held: Option<(&str, Reason)>) {
        self.leave(uid);
        self.held.remove(uid);
        if let Some(closed) = self.active.get(uid).and_then(|key| self.keys.get_mut(key)?.closed.as_mut())
            && closed.probe.as_deref() == Some(uid)
        {
            // It has said nothing about the quota: somebody else may.
            closed.probe = None;
        }
        match (asker, held) {
            (Some(asker), Some((key, reason @ (Reason::WaitingForSlot | Reason::WaitingForQuota)))) => {
                self.enter(asker.clone(), Some(key.to_owned()), Stage::Waiting, reason);
            }
            (_, Some((_, reason))) => {
                self.held.insert(uid.to_owned(), reason);
            }
            (_, None) => {}
        }
    }

    /// What the job's status says. `over`: its batch is known to have ended, though that is not recorded yet.
    pub fn note(&mut self, job: &GeminiBatchJob, over: bool) {
        let Some(uid) = &job.metadata.uid else { return };
        let active = decide::current_attempt(job)
            .filter(|a| a.refusal.is_none() && a.outcome.is_none() && !decide::is_finished(job) && !over);
        self.set_active(uid, active.map(|a| a.credential_fingerprint.as_str()));
    }

    /// Whether the job may be sent with this key now.
    pub fn may_send(&self, asker: &Asker, key: &str, now: Timestamp) -> Result<(), Held> {
        let uid = &asker.ticket.uid;
        let none = Key::default();
        let of_key = self.keys.get(key).unwrap_or(&none);
        let closed = of_key.closed.as_ref();
        if let Some(closed) = closed {
            let other = closed.probe.as_ref().is_some_and(|probe| probe != uid);
            if closed.until > now || other {
                return Err(Held::Quota { until: closed.until });
            }
        }
        if self.has_slot(uid, key) {
            return Ok(());
        }
        let free = self.limit.saturating_sub(of_key.active.len());
        let room = if closed.is_some() { free.min(1) } else { free };
        let before = |line: &BTreeSet<Ticket>| match closed {
            None => line.range(..&asker.ticket).take(room).count(),
            Some(closed) => {
                let own = closed.rank(&asker.ticket);
                line.iter().filter(|ticket| closed.rank(ticket) < own).take(room).count()
            }
        };
        let ahead = before(&of_key.line) + self.unread.get(&asker.secret).map_or(0, before);
        match closed {
            _ if ahead < room => Ok(()),
            Some(closed) if free > 0 => Err(Held::Quota { until: closed.until }),
            _ => Err(Held::Slot),
        }
    }

    /// Whether the job has a slot of this key already.
    #[must_use]
    pub fn has_slot(&self, uid: &str, key: &str) -> bool {
        self.active.get(uid).is_some_and(|k| k == key)
    }

    /// Takes a slot, right before the intent is recorded. Fails if the job may not be sent after all.
    pub fn claim(&mut self, asker: &Asker, key: &str, now: Timestamp) -> Result<(), Held> {
        self.may_send(asker, key, now)?;
        self.leave(&asker.ticket.uid);
        self.set_active(&asker.ticket.uid, Some(key));
        if let Some(closed) = self.keys.get_mut(key).and_then(|k| k.closed.as_mut()) {
            closed.probe = Some(asker.ticket.uid.clone());
        }
        Ok(())
    }

    /// The job has a batch at Gemini that it does not know of: it takes its slot whether there is one or not, and
    /// is called, so that it adopts it.
    pub fn found(&mut self, uid: &str, key: &str) {
        // Another key of the same project sees the batches of this one as well: they stay where they are counted.
        if self.active.contains_key(uid) {
            return;
        }
        self.set_active(uid, Some(key));
        if let Some(entry) = self.entries.get_mut(uid).filter(|e| e.stage == Stage::Waiting) {
            entry.stage = Stage::Called;
            self.errands.push(entry.asker.ticket.clone());
        }
    }

    /// The job is called for another reason than its turn.
    pub fn errand(&mut self, namespace: &str, name: &str) {
        self.errands.push(Ticket {
            created: Timestamp::MIN,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: String::new(),
        });
    }

    /// Gemini refused for lack of quota. Returns when the key may be tried again: after `pause` of the number of
    /// refusals in a row, and not before Gemini says (`retry_after`). Refusals of sends that were under way at the
    /// same time count as one.
    pub fn refused(
        &mut self,
        key: &str,
        now: Timestamp,
        retry_after: Option<SignedDuration>,
        pause: impl FnOnce(u32) -> SignedDuration,
    ) -> Timestamp {
        let asked = retry_after.map_or(Timestamp::MIN, |pause| after(now, pause));
        let closed = &mut self.keys.entry(key.to_owned()).or_default().closed;
        match closed {
            Some(closed) if closed.until > now => closed.until = closed.until.max(asked),
            _ => {
                let before = closed.take();
                let refusals = before.as_ref().map_or(0, |c| c.refusals).saturating_add(1);
                let until = after(now, pause(refusals)).max(asked);
                let (probe, mut tried) = before.map_or((None, HashMap::new()), |c| (c.probe, c.tried));
                if let Some(uid) = probe {
                    *tried.entry(uid).or_default() += 1;
                }
                *closed = Some(Closed { refusals, until, probe: None, tried });
            }
        }
        closed.as_ref().map_or(now, |c| c.until)
    }

    /// Gemini created the job's batch. If it was the one that tried, the key is open again.
    pub fn created(&mut self, key: &str, uid: &str) {
        if let Some(key) = self.keys.get_mut(key)
            && key.closed.as_ref().is_some_and(|c| c.probe.as_deref() == Some(uid))
        {
            key.closed = None;
        }
    }

    /// Namespace and name of the jobs whose turn it is: they are to ask again.
    pub fn call(&mut self, now: Timestamp) -> Vec<(String, String)> {
        self.keys.retain(|_, key| {
            let pending = key.closed.as_ref().is_some_and(|c| c.until > now);
            pending || !key.active.is_empty() || !key.line.is_empty()
        });
        let mut called = Vec::new();
        for (name, key) in &self.keys {
            // Those in front who were called before, or are being looked at, take their places as well.
            let free = self.limit.saturating_sub(key.active.len());
            let next: Vec<&Ticket> = match &key.closed {
                None => key.line.iter().take(free).collect(),
                Some(closed) => key.line.iter().min_by_key(|t| closed.rank(t)).into_iter().collect(),
            };
            for ticket in next {
                let Some(entry) = self.entries.get(&ticket.uid) else { continue };
                if entry.stage == Stage::Waiting && self.may_send(&entry.asker, name, now).is_ok() {
                    called.push(ticket.clone());
                }
            }
        }
        let errands = std::mem::take(&mut self.errands);
        called
            .into_iter()
            .chain(errands)
            .map(|ticket| {
                if let Some(entry) = self.entries.get_mut(&ticket.uid) {
                    entry.stage = Stage::Called;
                }
                (ticket.namespace, ticket.name)
            })
            .collect()
    }

    /// When somebody's turn comes by time alone.
    #[must_use]
    pub fn next_call(&self, now: Timestamp) -> Option<Timestamp> {
        let waiting = self.keys.values().filter(|k| !k.line.is_empty());
        waiting.filter_map(|k| k.closed.as_ref()).map(|c| c.until).filter(|until| *until > now).min()
    }

    /// Active batches of each key.
    pub fn active(&self) -> impl Iterator<Item = (&str, usize)> {
        self.keys.iter().map(|(key, k)| (key.as_str(), k.active.len()))
    }

    /// Jobs that wait, by reason.
    #[must_use]
    pub fn waiting(&self) -> BTreeMap<Reason, usize> {
        let in_line = self.entries.values().filter(|e| e.key.is_some()).map(|e| e.reason);
        let mut all = BTreeMap::new();
        for reason in in_line.chain(self.held.values().copied()) {
            *all.entry(reason).or_default() += 1;
        }
        all
    }

    fn enter(&mut self, asker: Asker, key: Option<String>, stage: Stage, reason: Reason) {
        let line = match &key {
            Some(key) => &mut self.keys.entry(key.clone()).or_default().line,
            None => self.unread.entry(asker.secret.clone()).or_default(),
        };
        line.insert(asker.ticket.clone());
        self.entries.insert(asker.ticket.uid.clone(), Entry { asker, key, stage, reason });
    }

    fn leave(&mut self, uid: &str) {
        let Some(entry) = self.entries.remove(uid) else { return };
        if let Some(key) = &entry.key {
            if let Some(key) = self.keys.get_mut(key) {
                key.line.remove(&entry.asker.ticket);
            }
        } else if let Some(line) = self.unread.get_mut(&entry.asker.secret) {
            line.remove(&entry.asker.ticket);
            if line.is_empty() {
                self.unread.remove(&entry.asker.secret);
            }
        }
    }

    fn set_active(&mut self, uid: &str, key: Option<&str>) {
        let before = self.active.get(uid).map(String::as_str);
        if before == key {
            return;
        }
        if let Some(before) = self.active.remove(uid).and_then(|before| self.keys.get_mut(&before)) {
            before.active.remove(uid);
            if let Some(closed) = before.closed.as_mut().filter(|c| c.probe.as_deref() == Some(uid)) {
                closed.probe = None;
            }
        }
        if let Some(key) = key {
            self.keys.entry(key.to_owned()).or_default().active.insert(uid.to_owned());
            self.active.insert(uid.to_owned(), key.to_owned());
        }
    }
}

/// Whether a pass over the job may end in a send, as far as the watch tells.
fn may_ask(job: &GeminiBatchJob) -> bool {
    job.metadata.deletion_timestamp.is_none()
        && job.spec.sharding.is_none() // its shards ask
        && !decide::is_finished(job)
        && decide::current_attempt(job).is_none_or(|a| a.refusal.is_some() || a.outcome.is_some())
}

fn quota_refusal<'a>(attempt: &'a Attempt, key: &str) -> Option<&'a crate::api::Refusal> {
    let refusal = attempt.refusal.as_ref()?;
    let same = attempt.credential_fingerprint == key;
    (same && refusal.reason == Reason::WaitingForQuota.as_str()).then_some(refusal)
}

/// What to tell the user. Nothing in it changes while the job waits, so that it is written once.
#[must_use]
pub fn problem(job: &GeminiBatchJob, key: &str, held: Held, limit: usize) -> Problem {
    match held {
        Held::Slot => Problem::new(
            Reason::WaitingForSlot,
            format!(
                "{limit} batches of this API key are active, as many as the operator lets run at once \
                 (--max-active-batches); the job is submitted when its turn comes, in order of creation"
            ),
        ),
        Held::Quota { .. } => match decide::current_attempt(job).and_then(|a| quota_refusal(a, key)) {
            Some(refusal) => super::ending::refusal_problem(refusal),
            None => Problem::new(
                Reason::WaitingForQuota,
                "Gemini refused another batch of this API key for lack of quota; the job is submitted when the quota \
                 allows, in order of creation",
            ),
        },
    }
}

#[cfg(test)]
mod tests;
