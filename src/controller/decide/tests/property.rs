//! Whatever happens in whatever order: nothing is paid for twice, nothing that was paid for is lost, and
//! nothing stands still without saying why.
//!
//! A small Gemini and a small Kubernetes, the driver's loop around `decide`, and outcomes folded into memory
//! as `act` does it. Random events and outcomes come first; then all goes well, and the job must end.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::api::{RetryPolicy, State, SuspendPolicy};
use crate::controller::identity::is_send_of;
use crate::controller::memory::KeyRefused;

/// More steps than any turn takes.
const STEPS: usize = 40;
const RESULT_LAG: i64 = 300;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// A turn of the driver; it breaks off after so many steps, and the process may die then.
    Turn {
        steps: usize,
        dies: bool,
    },
    Crash,
    Pass(i64),
    /// The Secret holds: the key, one of another project, another one of the same project, nothing.
    Key(usize),
    Input(u8),
    Output(u8),
    /// A callback; does it name the batch?
    Hint(bool),
    Sweep,
    BatchEnds(BatchState),
    Delete,
    /// Held or not, and whether what runs is cancelled then.
    Suspend(bool, bool),
    Deadline(Option<i64>),
    BackoffLimit(i32),
    /// Failed requests are sent again in so many batches at most, if at all.
    Retry(Option<i32>),
    Policy(DeletionPolicy),
    /// Others go first, or an administrator paused all.
    Gate(bool),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    use BatchState::{Cancelled, Expired, Failed, Succeeded};
    let turn = (1..STEPS, prop::bool::weighted(0.2)).prop_map(|(steps, dies)| Event::Turn { steps, dies });
    let event = prop_oneof![
        8 => Just(Event::Turn { steps: STEPS, dies: false }),
        4 => turn,
        2 => Just(Event::Crash),
        4 => prop::sample::select(vec![1, 40, 700, 4000, 30_000, 90_000]).prop_map(Event::Pass),
        2 => (0usize..4).prop_map(Event::Key),
        1 => (0u8..3).prop_map(Event::Input),
        1 => (0u8..3).prop_map(Event::Output),
        2 => any::<bool>().prop_map(Event::Hint),
        1 => Just(Event::Sweep),
        2 => prop::sample::select(vec![Succeeded, Succeeded, Failed, Cancelled, Expired]).prop_map(Event::BatchEnds),
        1 => prop::bool::weighted(0.3).prop_map(|yes| if yes { Event::Delete } else { Event::Sweep }),
        2 => (any::<bool>(), any::<bool>()).prop_map(|(held, cancel)| Event::Suspend(held, cancel)),
        1 => prop::sample::select(vec![None, Some(1), Some(5000), Some(90_000)]).prop_map(Event::Deadline),
        1 => (0i32..4).prop_map(Event::BackoffLimit),
        2 => prop::option::weighted(0.8, 1i32..5).prop_map(Event::Retry),
        1 => prop::sample::select(vec![DeletionPolicy::Cancel, DeletionPolicy::Delete, DeletionPolicy::Orphan])
            .prop_map(Event::Policy),
        1 => any::<bool>().prop_map(Event::Gate),
    ];
    prop::collection::vec(event, 1..40)
}

/// Batch after batch: what comes in between, and how it ends.
fn rounds() -> impl Strategy<Value = Vec<Event>> {
    use BatchState::{Cancelled, Expired, Failed, Succeeded};
    let between = prop_oneof![
        6 => Just(Event::Sweep),
        2 => prop::option::weighted(0.8, 1i32..5).prop_map(Event::Retry),
        1 => (0i32..4).prop_map(Event::BackoffLimit),
        1 => any::<bool>().prop_map(|cancel| Event::Suspend(true, cancel)),
        1 => Just(Event::Crash),
        1 => (0u8..3).prop_map(Event::Output),
        1 => prop::sample::select(vec![None, Some(1000), Some(5000)]).prop_map(Event::Deadline),
    ];
    let states = vec![Succeeded, Succeeded, Succeeded, Failed, Expired, Cancelled];
    let turn = || Event::Turn { steps: STEPS, dies: false };
    let round = (between.clone(), prop::sample::select(states), between, any::<bool>()).prop_map(
        move |(before, state, after, dies)| {
            let end = [turn(), before, turn(), Event::BatchEnds(state), Event::Sweep, turn()];
            let collect =
                [Event::Pass(400), Event::Turn { steps: STEPS, dies }, after, Event::Suspend(false, false)];
            end.into_iter().chain(collect).collect::<Vec<_>>()
        },
    );
    prop::collection::vec(round, 1..6).prop_map(|rounds| rounds.concat())
}

/// Most calls go well.
fn good_outcomes() -> impl Strategy<Value = Vec<u8>> {
    let outcome = prop_oneof![8 => Just(0u8), 3 => 1u8..4, 1 => any::<u8>()];
    prop::collection::vec(outcome, 0..120)
}

const KEYS: [Option<&str>; 4] = [Some("k0"), Some("k1"), Some("k2"), None];

/// Of two keys of one project each sees what the other one made.
fn project(key: &str) -> u8 {
    u8::from(key == "k1")
}

struct RemoteBatch {
    batch: Batch,
    project: u8,
    readable_from: i64,
    /// Requests that it carries, and how many of them have a response.
    requests: i64,
    answered: i64,
    /// Those of them that have an error from an earlier attempt, and those that got one from this batch.
    failed_before: i64,
    failed: i64,
    cancelled: bool,
}

/// Requests of the job.
const REQUESTS: i64 = 2;

struct File {
    sha: Option<String>,
    project: u8,
    gone_at: i64,
}

/// A create that is still travelling.
struct Late {
    at: i64,
    display_name: String,
    file: String,
    project: u8,
}

struct World {
    case: Case,
    now: i64,
    /// Outcomes to come; 0, and nothing, is the good one.
    outcomes: VecDeque<u8>,
    files: BTreeMap<String, File>,
    batches: Vec<RemoteBatch>,
    late: Vec<Late>,
    sends: u32,
    /// Send ids of all creates that left.
    created: Vec<String>,
    stored: Option<Destination>,
    /// Requests whose last word is an error so far, of attempts that are over. All of them are worth another try.
    errors: i64,
    orphaned: bool,
    gone: bool,
    wake: Option<Wake>,
}

impl World {
    fn new(outcomes: Vec<u8>, output: u8, whose: u8) -> Self {
        let mut world = Self {
            case: applied().key("k0"),
            now: 0,
            outcomes: outcomes.into(),
            files: BTreeMap::new(),
            batches: Vec::new(),
            late: Vec::new(),
            sends: 0,
            created: Vec::new(),
            stored: None,
            errors: 0,
            orphaned: false,
            gone: false,
            wake: None,
        };
        world.set_output(output);
        if whose == 1 {
            world.case = world.case.gemini_file();
            world.files.insert("files/theirs".to_owned(), File { sha: None, project: 0, gone_at: i64::MAX });
        }
        if whose == 2 {
            world.case = world.case.imports();
            world.make_batch("somebody else's", 0);
        }
        world
    }

    /// What the driver would read: of a further attempt only what has no result yet.
    fn facts(&self) -> Result<InputFacts, Problem> {
        let whole = self.case.input.clone()?;
        let count = self.to_send();
        // The whole of it is what the first attempt was made of.
        let all = whole.whole_sha256.clone();
        let sha256 = if count == REQUESTS { all } else { format!("{all}/{count}") };
        Ok(InputFacts { sha256, count, ..whole })
    }

    /// Requests that an attempt carries that begins now.
    fn to_send(&self) -> i64 {
        REQUESTS - self.earlier() - if self.may_retry() { 0 } else { self.errors }
    }

    /// Whether failed requests may be sent again in a batch that begins now.
    fn may_retry(&self) -> bool {
        let attempts = self.case.job.status.iter().flat_map(|s| &s.attempts);
        let tries = attempts.filter_map(|a| a.outcome.as_ref()).filter(|o| o.reason != "Suspended").count();
        let most = self.case.job.spec.retry_policy.as_ref().map_or(0, |p| p.max_attempts);
        tries < usize::try_from(most).unwrap()
    }

    /// Responses of attempts that are over.
    fn earlier(&self) -> i64 {
        let attempts = self.case.job.status.iter().flat_map(|s| &s.attempts);
        let over = attempts.filter(|a| a.outcome.is_some()).max_by_key(|a| a.number);
        over.and_then(|a| a.outcome.as_ref()).map_or(0, |o| o.succeeded)
    }

    fn set_output(&mut self, which: u8) {
        // As the schema has it: not after the end.
        if !is_finished(&self.case.job) {
            let name = ["", "o", "p"][usize::from(which)];
            let map = json!({"configMap": {"name": name}});
            self.case.job.spec.output =
                if name.is_empty() { None } else { serde_json::from_value(map).unwrap() };
            self.edited();
        }
    }

    fn edited(&mut self) {
        *self.case.job.metadata.generation.as_mut().unwrap() += 1;
    }

    fn outcome(&mut self, of: u8) -> u8 {
        self.outcomes.pop_front().unwrap_or(0) % of
    }

    fn attempt(&self) -> Option<&Attempt> {
        current_attempt(&self.case.job)
    }

    fn key(&self) -> String {
        self.case.credential.clone().expect("no action without a key")
    }

    fn project(&self) -> u8 {
        project(&self.key())
    }

    fn own_key(&self) -> bool {
        self.attempt().is_some_and(|a| a.credential_fingerprint == self.key())
    }

    // ---------------------------------------------------------------------------------- events

    fn happens(&mut self, event: Event) {
        match event {
            Event::Turn { steps, dies } => {
                self.turn(steps);
                if dies {
                    self.case.memory = Memory::default();
                }
            }
            Event::Crash => self.case.memory = Memory::default(),
            Event::Pass(seconds) => self.pass(seconds),
            Event::Key(which) => match KEYS[which] {
                Some(key) => self.case = self.case.clone().key(key),
                None => self.case = self.case.clone().no_key(),
            },
            Event::Input(0) => self.case = self.case.clone().no_input(),
            Event::Input(version) => {
                let sha256 = format!("sha{version}");
                self.case.input = Ok(InputFacts { whole_sha256: sha256.clone(), sha256, count: 2, bytes: 9 });
            }
            Event::Output(which) => self.set_output(which),
            Event::Hint(named) => {
                let batch = self.batches.last().filter(|_| named).map(|b| b.batch.name.to_string());
                self.case = self.case.clone().hint(&format!("m{}", self.now), batch.as_deref());
            }
            Event::Sweep => {
                self.case.memory.looks.swept = self.attempt().is_some_and(|a| a.batch_name.is_some());
            }
            Event::BatchEnds(state) => self.end_batches(state),
            Event::Delete => {
                if self.case.job.metadata.deletion_timestamp.is_none() {
                    self.case.job.metadata.deletion_timestamp = Some(Time(at(self.now)));
                    self.edited();
                    self.gone = !has_finalizer(&self.case.job);
                }
            }
            Event::Suspend(held, cancel) => {
                self.case.job.spec.suspend = held;
                self.case.job.spec.suspend_policy =
                    if cancel { SuspendPolicy::Cancel } else { SuspendPolicy::Drain };
                self.edited();
            }
            Event::Deadline(seconds) => {
                self.case.job.spec.active_deadline_seconds = seconds;
                self.edited();
            }
            Event::BackoffLimit(limit) => {
                if self.case.job.spec.import_from.is_none() {
                    self.case.job.spec.backoff_limit = limit;
                    self.edited();
                }
            }
            Event::Retry(most) => {
                if self.case.job.spec.has_own_input() {
                    self.case.job.spec.retry_policy =
                        most.map(|max_attempts| RetryPolicy { max_attempts, codes: None });
                    self.edited();
                }
            }
            Event::Policy(policy) => {
                self.case.job.spec.deletion_policy = Some(policy);
                self.edited();
            }
            Event::Gate(true) => self.case.gate = Gate::Open,
            Event::Gate(false) => self.case = self.case.clone().closed(),
        }
    }

    fn pass(&mut self, seconds: i64) {
        self.now += seconds;
        self.case.now = at(self.now);
        let now = self.now;
        self.files.retain(|_, f| f.gone_at > now);
        let (due, late): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.late).into_iter().partition(|l| l.at <= now);
        self.late = late;
        for create in due {
            // A create whose input is gone fails.
            if self.files.contains_key(&create.file) {
                self.make_batch(&create.display_name, create.project);
            }
        }
    }

    fn make_batch(&mut self, display_name: &str, project: u8) -> Batch {
        let name = BatchName::parse(&format!("b{}", self.batches.len())).unwrap();
        let made = Batch { name, display_name: display_name.to_owned(), ..batch(BatchState::Running) };
        self.batches.push(RemoteBatch {
            batch: made.clone(),
            project,
            readable_from: i64::MAX,
            requests: self.to_send(),
            answered: 0,
            failed_before: if self.may_retry() { self.errors } else { 0 },
            failed: 0,
            cancelled: false,
        });
        made
    }

    fn end_batches(&mut self, state: BatchState) {
        let some = i64::from(self.outcome(2));
        // Of a batch that Gemini finished: one request failed, all did, or one has no line.
        let (errors, missing) = [(0, 0), (1, 0), (REQUESTS, 0), (0, 1)][usize::from(self.outcome(4))];
        for b in self.batches.iter_mut().filter(|b| !b.batch.is_terminal()) {
            b.batch.state = state;
            b.failed = errors.min(b.requests);
            b.answered = (b.requests - b.failed - missing).max(0);
            if state != BatchState::Succeeded {
                (b.answered, b.failed) = (some.min(b.requests - 1), 0);
            }
            let file = b.answered + b.failed > 0 || state == BatchState::Succeeded;
            b.readable_from = if file { self.now + RESULT_LAG } else { i64::MAX };
            if b.answered > 0 {
                b.batch.stats = Some(crate::gemini::Stats { succeeded: b.answered, ..Default::default() });
            }
        }
    }

    // ------------------------------------------------------------------------------- the driver

    fn turn(&mut self, limit: usize) {
        if self.gone {
            return;
        }
        for step in 0.. {
            assert!(step < STEPS, "it goes round in circles: {}", self.case.says());
            if step == limit {
                return; // the API server did not answer
            }
            self.sends += 1;
            let fresh = format!("send{}", self.sends);
            let about = attempt_at_hand(&self.case.job);
            self.case.memory.is_about(about);
            let case = self.case.clone();
            let decision = decide(
                &Observed {
                    job: &case.job,
                    credential: case.credential.clone(),
                    input: needs_input(&case.job, &case.memory).then(|| self.facts()),
                    memory: &case.memory,
                    gate: &case.gate,
                    cluster: CLUSTER,
                    fresh_send_id: &fresh,
                    webhook_refused: false,
                    timings: &Timings::default(),
                },
                case.now,
            );
            match decision {
                Decision::Act(action) => self.act(&action),
                Decision::Record(change) => match self.outcome(12) {
                    // A conflict: somebody was faster; look again.
                    8 => {}
                    // It was written, but the answer was lost.
                    9 | 10 => {
                        self.write(&change);
                        return;
                    }
                    11 => return,
                    _ => {
                        self.write(&change);
                        self.remember(&change);
                    }
                },
                Decision::Wait { say, wake } => {
                    if let Some(say) = &say {
                        self.write(say);
                    }
                    self.check_wait(say.as_deref(), wake);
                    self.wake = Some(wake);
                    return;
                }
                Decision::Done => {
                    assert!(
                        self.gone || self.case.memory.cleanup.job_deleted || !has_finalizer(&self.case.job),
                        "done, but the job is held"
                    );
                    self.wake = None;
                    return;
                }
            }
            if self.gone {
                return;
            }
        }
    }

    fn write(&mut self, change: &Change) {
        if let Change::Intent(a) = change
            && self.attempt().is_some_and(|before| before.number < a.number)
        {
            self.check_asked_for();
        }
        // Its turn is taken with the intent, and kept until it is over.
        assert!(!matches!(change, Change::Intent(_)) || self.case.gate == Gate::Open, "not its turn");
        let job = &mut self.case.job;
        let before = job.status.clone().unwrap();
        let finished = is_finished(job);
        match change {
            Change::AddFinalizer => job.metadata.finalizers = Some(vec![FINALIZER.to_owned()]),
            Change::DropFinalizer { event } => {
                job.metadata.finalizers = None;
                self.orphaned = event.as_ref().is_some_and(|e| e.reason == Reason::Orphaned);
                if job.metadata.deletion_timestamp.is_some() {
                    self.gone = true;
                    self.check_gone(finished);
                }
                return;
            }
            _ => {}
        }
        let job = &mut self.case.job;
        let after = compose(&before, &job.spec, job.metadata.generation.unwrap(), change, self.case.now);
        // What the schema enforces.
        if finished {
            assert_eq!(
                (after.state, after.completion_time.as_ref()),
                (before.state, before.completion_time.as_ref())
            );
        }
        for a in before.attempts.iter().filter(|a| a.batch_name.is_some()) {
            assert_eq!(
                after.attempts.iter().find(|b| b.number == a.number).unwrap().batch_name,
                a.batch_name
            );
        }
        job.status = Some(after);
        if let (Change::AttemptEnded(_), Some(collected)) = (change, &self.case.memory.collected) {
            self.errors = collected.failed_lines;
        }
        self.check_attempts();
        if let Change::Finished(end) = change {
            self.check_end(end);
        }
    }

    /// As `run::remember`.
    fn remember(&mut self, change: &Change) {
        let memory = &mut self.case.memory;
        match change {
            Change::Intent(a) => {
                let own = identity::input_file(CLUSTER, UID, a.number, &a.send_id);
                let stage = if a.input_file == own {
                    Stage::NotUploaded
                } else {
                    Stage::Uploaded { file: a.input_file.clone() }
                };
                memory.send = Some(Send { send_id: a.send_id.clone(), stage });
                memory.probe = None;
            }
            Change::Refused(_) | Change::Submitted { .. } => memory.send = None,
            Change::HintObserved { .. } => memory.looks.recorded(),
            Change::Finished(_) => {
                memory.collected = None;
                memory.output = OutputObject::Unknown;
                memory.remote = None;
            }
            Change::AttemptEnded(_) => *memory = Memory::default(),
            _ => {}
        }
    }

    // ------------------------------------------------------------------------- outcomes, as `act`

    fn set_stage(&mut self, stage: Stage) {
        let send_id = self.attempt().unwrap().send_id.clone();
        self.case.memory.send = Some(Send { send_id, stage });
    }

    fn fails(&mut self) {
        let failures = self.case.memory.trouble.as_ref().map_or(0, |t| t.failures) + 1;
        let problem = Problem::new(Reason::GeminiUnavailable, "it fails");
        self.case.memory.trouble = Some(Trouble { failures, next: at(self.now + 5), problem });
    }

    fn cleanup_fails(&mut self) {
        self.case.memory.cleanup.refused = None; // as `Step::cleanup_failed` does, unless it was the key
        let before = self.case.memory.cleanup.failed;
        let tries = Tries::again(before, self.case.now, &Timings::default().result_pauses);
        self.case.memory.cleanup.failed = Some(tries);
    }

    fn listed(&self, attempt: &Attempt) -> Option<Batch> {
        let project = self.project();
        let own = |b: &&RemoteBatch| b.project == project && is_send_of(attempt, &b.batch.display_name);
        let found = self.batches.iter().filter(own);
        found.min_by_key(|b| b.batch.display_name != attempt.display_name).map(|b| b.batch.clone())
    }

    fn shown(&self, name: &BatchName) -> Option<Batch> {
        let project = self.project();
        self.batches.iter().find(|b| b.project == project && b.batch.name == *name).map(|b| b.batch.clone())
    }

    fn has_file(&self, name: &str) -> bool {
        self.files.get(name).is_some_and(|f| f.project == self.project())
    }

    fn search(&self, refuted: Option<BatchName>) -> Search {
        let before = match stage_of(self.attempt().unwrap(), &self.case.memory) {
            Some(Stage::Unsure(search)) => search.clone(),
            Some(_) => Search::default(),
            None => Search { file_unasked: !self.own_key(), ..Search::default() },
        };
        if refuted.is_some() {
            return Search { refuted, ..before };
        }
        let search = Search { listings: before.listings + 1, next: Some(at(self.now + 60)), ..before };
        if !self.own_key() {
            return search;
        }
        Search {
            own_listings: search.own_listings + 1,
            since: search.since.or(Some(self.case.now)),
            listed_behind_fence: search.fenced,
            ..search
        }
    }

    fn refused(&mut self, call: RefusedCall, reason: Reason, is_final: bool) {
        let refusal = Refusal {
            call,
            reason: reason.as_str().to_owned(),
            code: 429,
            time: MicroTime(self.case.now),
            retry_time: MicroTime(at(self.now + 60)),
        };
        self.case.memory.trouble = None;
        self.set_stage(Stage::Refused(Refused { refusal, reason, message: String::new(), is_final }));
    }

    fn act(&mut self, action: &Action) {
        // One call in five fails for now, except for those with outcomes of their own.
        let own = matches!(
            action,
            Action::CreateBatch { .. }
                | Action::UploadInput { .. }
                | Action::ReserveOutput { .. }
                | Action::StoreResults { .. }
                | Action::ReleaseOutput { .. }
                | Action::AskNamespace
        );
        if !own && self.outcome(5) == 4 {
            return match action {
                Action::CancelBatch { .. }
                | Action::FindToCancel { .. }
                | Action::DeleteBatch { .. }
                | Action::DeleteInputFile { .. } => {
                    self.cleanup_fails();
                    let key = self.case.credential.clone().ok().filter(|_| self.outcome(2) == 0);
                    self.case.memory.cleanup.refused = key.map(|fingerprint| KeyRefused {
                        fingerprint,
                        problem: Problem::new(Reason::CredentialsRefused, "refused"),
                    });
                }
                Action::GetBatch { .. } => {
                    self.looked();
                    self.case.memory.looks.swept = true;
                    self.fails();
                }
                _ => self.fails(),
            };
        }
        match action {
            Action::ReserveOutput { name } => {
                self.case.memory.cleanup.output_released = false;
                self.case.memory.output = if self.outcome(4) == 3 {
                    let problem = Problem::new(Reason::OutputConflict, "it is taken");
                    let generation = self.case.job.metadata.generation.unwrap();
                    OutputObject::Blocked { problem, generation, retry: Some(at(self.now + 30)) }
                } else {
                    OutputObject::Reserved { name: name.clone() }
                };
            }
            Action::ReleaseOutput { .. } => {
                self.case.memory.output = OutputObject::Unknown;
                self.case.memory.cleanup.output_released = true;
            }
            Action::StoreResults { name } => {
                self.stored = Some(name.clone());
                let Destination::ConfigMap(map) = &name else { unreachable!() };
                let placed = Placed::ConfigMap(map.clone());
                self.case.memory.output = OutputObject::Stored { name: name.clone(), placed };
                self.case.memory.collected.as_mut().unwrap().lines = Lines::Dropped;
            }
            Action::FindInputFile { file } => {
                let attempt = self.attempt().unwrap().clone();
                self.case.memory.trouble = None;
                let stage = match self.listed(&attempt) {
                    _ if self.has_file(file) => Stage::Unsure(Search::default()),
                    Some(batch) => Stage::Found(Box::new(batch)),
                    None => Stage::Unsent,
                };
                self.set_stage(stage);
            }
            Action::Fence { file } => {
                assert!(self.own_key(), "under another key a file that is gone proves nothing");
                assert_ne!(file, "files/theirs");
                self.files.remove(file);
                self.case.memory.trouble = None;
                if let Some(Send { stage: Stage::Unsure(search), .. }) = &mut self.case.memory.send {
                    (search.fenced, search.fenced_at) = (true, Some(self.case.now));
                }
            }
            Action::UploadInput { file } => self.upload(file),
            Action::CreateBatch { attempt } => self.create(attempt),
            Action::FindBatch { attempt } => {
                self.case.memory.trouble = None;
                let stage = match self.listed(attempt) {
                    Some(batch) => Stage::Found(Box::new(batch)),
                    None => Stage::Unsure(self.search(None)),
                };
                self.set_stage(stage);
            }
            Action::ConfirmHinted { batch, attempt } => {
                let stage = match self.shown(batch).filter(|b| is_send_of(attempt, &b.display_name)) {
                    Some(batch) => Stage::Found(Box::new(batch)),
                    None => Stage::Unsure(self.search(Some(batch.clone()))),
                };
                self.set_stage(stage);
            }
            Action::ProbeCredential => {
                let accepted = self.outcome(2) == 0;
                let (fingerprint, next) = (self.key(), at(self.now + 40));
                self.case.memory.probe = Some(Probe { fingerprint, accepted, next });
            }
            Action::GetBatch { batch } => {
                self.looked();
                self.case.memory.trouble = None;
                self.case.memory.remote_name = Some(batch.clone());
                let before = match &self.case.memory.remote {
                    Some(Remote::Missing(absent)) => Some(absent),
                    _ => None,
                };
                let missing = Remote::Missing(self.absent(before));
                let seen = self.shown(batch).map(|seen| Remote::Seen(Box::new(seen)));
                self.case.memory.remote = Some(seen.unwrap_or(missing));
                self.case.memory.remote_key = Some(self.key());
            }
            Action::Collect { name, .. } => {
                let (project, now) = (self.project(), self.now);
                let readable = |b: &&RemoteBatch| {
                    b.project == project && b.batch.name == *name && b.readable_from <= now
                };
                self.case.memory.trouble = None;
                let read = self.batches.iter().find(readable);
                if let Some((answered, failed, before)) =
                    read.map(|b| (b.answered, b.failed, b.failed_before))
                {
                    let lines =
                        if Destination::of(&self.case.job).is_some() { kept() } else { Lines::Dropped };
                    self.case.memory.unreadable = None;
                    let joined = self.case.job.spec.has_own_input();
                    let succeeded = answered + if joined { self.earlier() } else { 0 };
                    // What was sent again keeps its error until there is something better.
                    let kept = (before - answered - failed).max(0);
                    let failed_lines = failed + kept + if joined { self.errors - before } else { 0 };
                    let worth_it = joined && self.case.job.spec.retry_policy.is_some();
                    self.case.memory.collected = Some(Collected {
                        joined,
                        missing_keys: if joined { REQUESTS - succeeded - failed_lines } else { 0 },
                        failed_lines,
                        retryable_lines: if worth_it { failed_lines } else { 0 },
                        ..collected(succeeded, lines)
                    });
                } else {
                    self.case.memory.unreadable = Some(self.absent(self.case.memory.unreadable.as_ref()));
                }
            }
            Action::CancelBatch { batch } => {
                let (project, own_key) = (self.project(), self.own_key());
                // Best effort: it may go on for a while, and even succeed.
                let at_once = self.outcome(2) == 0;
                match self.batches.iter_mut().find(|b| b.project == project && b.batch.name == *batch) {
                    Some(b) if !b.batch.is_terminal() => {
                        b.cancelled = true;
                        if at_once {
                            b.batch.state = BatchState::Cancelled;
                        }
                    }
                    Some(_) => {}
                    None if own_key => {}
                    None => return self.cleanup_fails(),
                }
                self.case.memory.cleanup.cancelled(batch);
            }
            Action::FindToCancel { attempt } => {
                let found = self.listed(attempt);
                if found.is_none() && !self.own_key() {
                    return self.cleanup_fails();
                }
                let cleanup = &mut self.case.memory.cleanup;
                cleanup.failed = None;
                cleanup.listings += 1;
                cleanup.to_cancel = found.into_iter().filter(|b| !b.is_terminal()).map(|b| b.name).collect();
            }
            Action::AskNamespace => {
                let next = at(self.now + 20);
                self.case.memory.namespace = Some(NamespaceSeen { terminating: false, next });
            }
            Action::DeleteInputFile { file } => {
                assert_ne!(file, "files/theirs");
                if self.has_file(file) {
                    self.files.remove(file);
                } else if !self.own_key() {
                    return self.cleanup_fails();
                }
                self.case.memory.cleanup.failed = None;
                self.case.memory.cleanup.input_deleted = true;
            }
            Action::DeleteBatch { batch } => {
                assert!(self.case.job.metadata.deletion_timestamp.is_some(), "only with the job");
                let (project, own_key) = (self.project(), self.own_key());
                match self.batches.iter().position(|b| b.project == project && b.batch.name == *batch) {
                    Some(i) => {
                        let b = self.batches.remove(i);
                        assert!(b.batch.is_terminal() || b.cancelled, "deleted, and still running");
                    }
                    None if own_key => {}
                    None => return self.cleanup_fails(),
                }
                self.case.memory.cleanup.failed = None;
                self.case.memory.cleanup.batches_deleted.push(batch.to_string());
            }
            Action::DeleteJob => {
                assert!(is_finished(&self.case.job));
                self.case.memory.cleanup.job_deleted = true;
            }
            Action::Shards(action) => panic!("not a sharded job: {action:?}"),
        }
    }

    fn absent(&self, before: Option<&Absent>) -> Absent {
        Absent::again(before, &self.key(), self.case.now, &Timings::default().result_pauses)
    }

    fn looked(&mut self) {
        let hint = self.attempt().and_then(|a| new_hint(&self.case.job, a));
        self.case.memory.looks.looked(hint.as_deref(), self.case.now, &Timings::default().hint_pauses);
        let cleanup = &mut self.case.memory.cleanup;
        if cleanup.cancelled {
            let pauses = &Timings::default().cancel_pauses;
            let watched = Tries::again(cleanup.watched, self.case.now, pauses);
            cleanup.cancelled = usize::try_from(watched.count).is_ok_and(|n| n < pauses.len());
            cleanup.watched = Some(watched);
        }
    }

    fn upload(&mut self, file: &str) {
        let outcome = self.outcome(8);
        // Only a complete file exists; its answer may be lost.
        if matches!(outcome, 0..=3 | 7) {
            let sha = self.facts().ok().map(|i| i.sha256);
            let name = if outcome == 3 { format!("files/given{}", self.sends) } else { file.to_owned() };
            let stored = File { sha, project: self.project(), gone_at: self.now + 48 * 3600 };
            self.files.insert(name.clone(), stored);
            if outcome == 7 {
                return self.fails(); // and the file can't be asked for either
            }
            self.case.memory.trouble = None;
            return self.set_stage(Stage::Uploaded { file: name });
        }
        match outcome {
            4 => self.refused(RefusedCall::Upload, Reason::WaitingForQuota, false),
            5 => self.refused(RefusedCall::Upload, Reason::CredentialsRefused, false),
            _ => self.fails(),
        }
    }

    fn create(&mut self, attempt: &Attempt) {
        // The three that nobody would forgive.
        assert_eq!(self.attempt(), Some(attempt), "only what is recorded is asked for");
        assert!(attempt.refusal.is_none() && attempt.batch_name.is_none() && !is_finished(&self.case.job));
        assert!(!self.created.contains(&attempt.send_id), "a send is made twice");
        assert!(self.batches.iter().all(|b| b.batch.is_terminal()), "two live batches");
        let own = format!("gbo-{CLUSTER}-{UID}-{}-", attempt.number);
        let same = self.batches.iter().find(|b| b.batch.display_name.starts_with(&own));
        assert!(same.is_none(), "an earlier send has made a batch");
        assert!(self.case.job.spec.import_from.is_none(), "an import is never sent");
        assert!(!self.case.job.spec.suspend, "held, but sent");
        assert!(!self.travels(), "an earlier send may still make a batch");
        assert_eq!(attempt.credential_fingerprint, self.key(), "under the recorded key");
        self.created.push(attempt.send_id.clone());

        self.set_stage(Stage::Unsure(Search::default()));
        let theirs = self.case.job.spec.gemini_file().is_some();
        if !self.has_file(&attempt.input_file) {
            return self.refused(RefusedCall::Create, Reason::InputFileNotFound, theirs);
        }
        assert_eq!(
            self.files[&attempt.input_file].sha, attempt.input_sha256,
            "what is paid for is what is recorded"
        );
        let (project, name) = (self.project(), attempt.display_name.clone());
        match self.outcome(11) {
            10 if !attempt.polled => self.refused(RefusedCall::Create, Reason::WebhookRefused, false),
            10 => self.refused(RefusedCall::Create, Reason::InputRefused, true),
            5 | 8 => self.refused(RefusedCall::Create, Reason::WaitingForQuota, false),
            6 => self.refused(RefusedCall::Create, Reason::CredentialsRefused, false),
            9 => self.refused(RefusedCall::Create, Reason::ModelNotFound, true),
            outcome => {
                match outcome {
                    1 => _ = self.make_batch(&name, project), // the answer is lost
                    2 => {}                                   // it never arrived
                    // Somebody else's file is no fence: that a create still travels can't be excluded.
                    3 if !theirs => {
                        let file = attempt.input_file.clone();
                        self.late.push(Late { at: self.now + 700, display_name: name, file, project });
                    }
                    _ => {
                        let made = self.make_batch(&name, project);
                        self.case.memory.trouble = None;
                        self.set_stage(Stage::Created(Box::new(made)));
                    }
                }
            }
        }
    }

    // ------------------------------------------------------------------------------- invariants

    fn check_wait(&self, say: Option<&Change>, wake: Wake) {
        let job = &self.case.job;
        let deleting = job.metadata.deletion_timestamp.is_some();
        match wake {
            Wake::At(time) => assert!(time > self.case.now, "a wait that is none"),
            Wake::Recheck => {}
            Wake::OnChange => match say {
                // The callback and the sweep wake it.
                Some(Change::Running { .. }) => assert!(self.attempt().unwrap().batch_name.is_some()),
                // An edit wakes it, or whoever opens the gate.
                Some(Change::Suspended) => assert!(job.spec.suspend),
                Some(Change::Waiting { problem, .. }) if problem.reason == Reason::WaitingForSlot => {
                    assert_ne!(self.case.gate, Gate::Open);
                }
                None if is_finished(job) => {
                    assert_eq!(job.spec.deletion_policy(), DeletionPolicy::Delete, "nothing to wait for");
                }
                Some(Change::Waiting { problem, stalled: true, .. }) => {
                    assert_eq!(problem.reason, Reason::OutputTooLarge);
                }
                other => panic!("nothing is certain to wake it: {other:?}"),
            },
        }
        if say.is_none() && !is_finished(job) {
            let failures = self.case.memory.trouble.as_ref().map(|t| t.failures);
            let cleanup = self.case.memory.cleanup.failed.map(|t| t.count);
            // The input file of an attempt that is over: a minute at most.
            let ended = matches!(&self.case.memory.remote, Some(Remote::Seen(b)) if b.is_terminal());
            assert!(
                failures == Some(1)
                    || (deleting && cleanup == Some(1))
                    || (ended && cleanup.is_some_and(|n| n < 5)),
                "it stands still and says nothing"
            );
        }
    }

    /// One attempt at a time, each begun when the one before was over.
    fn check_attempts(&self) {
        let attempts = &self.case.job.status.as_ref().unwrap().attempts;
        for (i, a) in attempts.iter().enumerate() {
            assert_eq!(a.number, i32::try_from(i).unwrap() + 1);
            let last = i + 1 == attempts.len();
            assert!(last || a.outcome.is_some(), "two attempts at once");
        }
        let failed = attempts.iter().filter_map(|a| a.outcome.as_ref());
        let failed = failed.filter(|o| o.reason == "BatchFailed" || o.reason == "BatchExpired");
        assert!(failed.count() <= 3, "more attempts than anybody asked for");
    }

    /// A further attempt begins only if what ended the last one is to be followed by one, as the job says now.
    fn check_asked_for(&self) {
        let attempts = &self.case.job.status.as_ref().unwrap().attempts;
        let outcomes = || attempts.iter().filter_map(|a| a.outcome.as_ref());
        let failed = outcomes().filter(|o| o.reason == "BatchFailed" || o.reason == "BatchExpired").count();
        match self.attempt().unwrap().outcome.as_ref().unwrap().reason.as_str() {
            "Suspended" => {}
            "RequestsFailed" => assert!(self.may_retry(), "nobody asked for it any more"),
            _ => assert!(failed <= usize::try_from(self.case.job.spec.backoff_limit).unwrap()),
        }
        assert!(self.to_send() > 0, "there is nothing to send");
    }

    /// Nothing that was paid for is lost.
    fn check_end(&self, end: &End) {
        let counts = end.results.requests.unwrap_or_default();
        assert!(counts.succeeded >= self.earlier(), "results of earlier attempts were lost");
        assert!(!self.case.job.spec.has_own_input() || counts.pending == 0);
        let attempts = self.case.job.status.iter().flat_map(|s| &s.attempts);
        if attempts.filter_map(|a| a.outcome.as_ref()).any(|o| o.reason == "RequestsFailed") {
            // As it would have ended without any retry, or better.
            let expected = if counts.succeeded > 0 { State::Succeeded } else { State::Failed };
            assert_eq!(end.state, expected, "a retry made it worse: {}", end.reason);
        }
        for b in &self.batches {
            assert!(b.batch.is_terminal(), "the job ended as {}, its batch runs", end.reason);
            if b.batch.state == BatchState::Succeeded && b.answered > 0 {
                assert_eq!(end.state, State::Succeeded, "results were lost: {}", end.reason);
                let wanted = Destination::of(&self.case.job);
                // Between two attempts there is nothing to store: it stays where it is.
                let said = end.message.contains("results are where status.output");
                let there = wanted.is_none() || self.stored == wanted;
                assert!(there || said, "results were not stored: {}", end.message);
            }
        }
        assert!(!self.travels(), "ended while a create travels");
    }

    /// Whether a create is under way that can still succeed: without its file it must fail.
    fn travels(&self) -> bool {
        self.late.iter().any(|l| self.files.contains_key(&l.file))
    }

    /// A job that was deleted leaves nothing behind that costs money, or says that it does.
    fn check_gone(&self, finished: bool) {
        let going_on = self.batches.iter().any(|b| !b.batch.is_terminal() && !b.cancelled);
        let travelling = self.travels();
        let asked = self.case.job.spec.deletion_policy() == DeletionPolicy::Orphan;
        // Somebody else's batch that was never taken over.
        let asked = asked || (self.case.job.spec.import_from.is_some() && self.attempt().is_none());
        assert!(asked || self.orphaned || !(going_on || travelling), "gone, and something goes on unsaid");
        assert!(!(finished && self.orphaned));
    }

    /// Now all goes well, and time passes: it must come to an end.
    fn comes_to_an_end(&mut self) {
        self.outcomes.clear();
        let recorded = self.attempt().map(|a| a.credential_fingerprint.clone());
        self.case = self.case.clone().key(recorded.as_deref().unwrap_or("k0"));
        self.case.input =
            Ok(InputFacts { sha256: "sha1".to_owned(), whole_sha256: "sha1".to_owned(), count: 2, bytes: 9 });
        self.case.gate = Gate::Open;
        self.case.job.spec.suspend = false;
        self.edited();
        self.pass(1000);
        for _ in 0..60 {
            self.turn(STEPS);
            let kept = self.case.job.spec.deletion_policy() == DeletionPolicy::Delete;
            if self.gone || (is_finished(&self.case.job) && (kept || !has_finalizer(&self.case.job))) {
                return;
            }
            self.end_batches(BatchState::Succeeded);
            let pause = match self.wake {
                Some(Wake::At(time)) => time.duration_since(at(self.now)).as_secs().max(1),
                Some(Wake::Recheck) => 40,
                Some(Wake::OnChange) | None => {
                    self.case.memory.looks.swept = true;
                    600
                }
            };
            self.pass(pause);
        }
        let status = self.case.job.status.clone().unwrap();
        let reason = &conditions::get(&status.conditions, conditions::READY).unwrap().reason;
        // Somebody else's file is no fence, so a batch that was never made can't be told from one that is not shown:
        // the user decides.
        assert_eq!(reason, "SubmissionUnconfirmed", "stuck: {}", self.case.says());
        assert!(self.case.job.spec.gemini_file().is_some());
        assert!(conditions::is_true(&status.conditions, conditions::STALLED));
        // Earlier attempts may have had some.
        let attempt = self.attempt().unwrap();
        assert!(!self.batches.iter().any(|b| is_send_of(attempt, &b.batch.display_name)));
    }
}

/// Hours of random jobs can be had by `PROPTEST_CASES`.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(3000)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens(
        events in events(),
        outcomes in prop::collection::vec(any::<u8>(), 0..60),
        output in 0u8..3,
        whose in prop_oneof![6 => Just(0u8), 1 => Just(1), 1 => Just(2)],
        retry in prop::option::of(1i32..4),
    ) {
        let mut world = World::new(outcomes, output, whose);
        world.happens(Event::Retry(retry));
        for event in events {
            world.happens(event);
        }
        world.comes_to_an_end();
    }

    /// The same where little goes wrong, so that there are several attempts.
    #[test]
    fn attempt_after_attempt(
        rounds in rounds(),
        outcomes in good_outcomes(),
        output in 0u8..3,
        backoff in 0i32..4,
        retry in prop::option::of(1i32..5),
    ) {
        let mut world = World::new(outcomes, output, 0);
        world.happens(Event::BackoffLimit(backoff));
        world.happens(Event::Retry(retry));
        for event in rounds {
            world.happens(event);
        }
        world.comes_to_an_end();
    }
}
