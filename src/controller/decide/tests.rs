//! Every transition, in the order of a job's life. A row is a situation and what is decided in it; see
//! [`show`] for how a decision is written down.

mod property;

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use serde_json::{Value, json};

use super::*;
use crate::api::{
    Callback, Cancellation, DeletionPolicy, ObjectStoreOutput, RESEND_ANNOTATION, Refusal, RefusedCall,
    RetryPolicy, SuspendPolicy,
};
use crate::controller::collect::{Collected, Kept, Lines};
use crate::controller::destination::{Destination, Placed};
use crate::controller::memory::{
    Absent, Cleanup, KeyRefused, Looks, NamespaceSeen, OutputObject, Probe, Remote, Search, Send, Tries,
};
use crate::controller::report::compose;
use crate::controller::{InputFacts, Timings, ending, identity};

const CLUSTER: &str = "cluster";
const UID: &str = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";
/// The key that the first intent is recorded with.
const KEY: &str = "key";
const SHA: &str = "sha";

/// So many seconds after the moment that the tests play in.
fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

/// Gemini refused the key of this fingerprint when the clean-up needed it.
fn key_refused(case: Case, key: &str) -> Case {
    case.cleanup(|c| {
        let problem = Problem::new(Reason::CredentialsRefused, "refused");
        c.refused = Some(KeyRefused { fingerprint: key.to_owned(), problem });
    })
}

/// What the callback of [`Case::hint`] is known by.
fn hint(id: &str) -> String {
    format!("{id}@{:.6}", at(0))
}

/// A situation.
#[derive(Clone)]
struct Case {
    job: GeminiBatchJob,
    memory: Memory,
    credential: Result<String, Problem>,
    input: Result<InputFacts, Problem>,
    gate: Gate,
    webhook_refused: bool,
    now: Timestamp,
}

/// As it was applied: no finalizer, no status but the default.
fn applied() -> Case {
    let job: Value = json!({
        "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": "job", "namespace": "ns", "uid": UID, "generation": 1},
        "spec": {"model": "gemini-2.5-flash", "credentials": {"secretRef": {"name": "s"}},
                 "input": {"configMap": {"name": "in", "key": "x"}}},
        "status": {"observedGeneration": -1, "state": "Pending"},
    });
    Case {
        job: serde_json::from_value(job).unwrap(),
        memory: Memory::default(),
        credential: Ok(KEY.to_owned()),
        input: Ok(InputFacts { sha256: SHA.to_owned(), whole_sha256: SHA.to_owned(), count: 2, bytes: 9 }),
        gate: Gate::Open,
        webhook_refused: false,
        now: at(0),
    }
}

/// With its finalizer.
fn held() -> Case {
    applied().with(|c| c.job.metadata.finalizers = Some(vec![FINALIZER.to_owned()]))
}

/// With its intent recorded a second ago, after a restart.
fn intended() -> Case {
    let case = held();
    let Decision::Record(change) = case.clone().at(-1).decide() else { panic!("no intent") };
    case.recorded(&change)
}

/// The same in the process that recorded it.
fn sending(stage: Stage) -> Case {
    intended().stage(stage)
}

/// Refused by Gemini a second ago; the next send is due in a minute.
fn refused_for(call: RefusedCall, reason: Reason) -> Case {
    intended().attempt(|a| {
        a.refusal = Some(refusal(call, reason));
        a.refusals = Some(1);
    })
}

/// Gemini has the batch; nothing is remembered.
fn running() -> Case {
    let change = Change::Submitted { batch: Box::new(batch(BatchState::Running)), adopted: false };
    intended().recorded(&change)
}

/// A GET has shown that the batch is over.
fn ended(state: BatchState) -> Case {
    running().remote(Remote::Seen(Box::new(batch(state))))
}

/// The same, with two results read.
fn read(state: BatchState, lines: Lines) -> Case {
    ended(state).with(|c| c.memory.collected = Some(collected(2, lines)))
}

fn finished() -> Case {
    let end = ending::ended(
        &running().job,
        current_attempt(&running().job).unwrap(),
        Some(&batch(BatchState::Succeeded)),
        Some(&collected(2, Lines::Dropped)),
        None,
        None,
    );
    running().recorded(&Change::Finished(Box::new(end)))
}

/// The batch is over and left nothing to read.
fn no_results(state: BatchState) -> Case {
    ended(state).unreadable(KEY, -5, 5)
}

/// The batch is over; of two requests so many have a response, and so many were never answered.
fn partly(state: BatchState, succeeded: i64, unanswered: i64) -> Case {
    ended(state).with(|c| {
        c.memory.collected = Some(Collected {
            joined: true,
            failed_lines: unanswered,
            unanswered_lines: unanswered,
            missing_keys: 2 - succeeded - unanswered,
            ..collected(succeeded, Lines::Dropped)
        });
    })
}

/// The first attempt failed and left nothing; a further one is allowed.
fn over_once() -> Case {
    let case = no_results(BatchState::Failed).backoff(1).cleanup(|c| c.input_deleted = true);
    let Decision::Record(change) = case.decide() else { panic!("it goes on") };
    case.recorded(&change).with(|c| c.memory = Memory::default())
}

/// The batch is over; of two requests one has a response, and the other one an error that is worth another try.
fn one_failed(state: BatchState) -> Case {
    ended(state).cleanup(|c| c.input_deleted = true).with(|c| {
        c.memory.collected = Some(Collected {
            joined: true,
            failed_lines: 1,
            retryable_lines: 1,
            ..collected(1, Lines::Dropped)
        });
    })
}

/// The first attempt is over, and the request that failed is to be sent again.
fn to_be_retried() -> Case {
    let case = one_failed(BatchState::Succeeded).retry(3);
    let Decision::Record(change) = case.decide() else { panic!("it goes on") };
    let rest = InputFacts { sha256: "rest".into(), whole_sha256: SHA.into(), count: 1, bytes: 9 };
    case.recorded(&change).with(|c| {
        c.memory = Memory::default();
        c.input = Ok(rest);
    })
}

/// It was sent again, and the second batch is over.
fn retried(state: BatchState) -> Case {
    let intent = Change::Intent(Box::new(to_be_retried().intent()));
    let submitted = Change::Submitted { batch: boxed(BatchState::Running), adopted: false };
    let case = to_be_retried().recorded(&intent).recorded(&submitted);
    case.remote(Remote::Seen(boxed(state))).cleanup(|c| c.input_deleted = true)
}

/// Of both requests together so many have a response; the others have an error that is worth another try.
fn merged(case: Case, succeeded: i64) -> Case {
    case.with(|c| {
        c.memory.collected = Some(Collected {
            joined: true,
            failed_lines: 2 - succeeded,
            retryable_lines: 2 - succeeded,
            ..collected(succeeded, Lines::Dropped)
        });
    })
}

/// Looked for long enough.
fn patient_search() -> Search {
    Search { listings: 3, own_listings: 3, since: Some(at(-600)), next: Some(at(10)), ..Search::default() }
}

impl Case {
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn at(self, seconds: i64) -> Self {
        self.with(|c| c.now = at(seconds))
    }

    fn recorded(self, change: &Change) -> Self {
        self.with(|c| {
            let status = c.job.status.clone().unwrap();
            c.job.status = Some(compose(&status, &c.job.spec, 1, change, at(-1)));
        })
    }

    fn attempt(self, change: impl FnOnce(&mut Attempt)) -> Self {
        self.with(|c| change(&mut c.job.status.as_mut().unwrap().attempts[0]))
    }

    fn stage(self, stage: Stage) -> Self {
        self.with(|c| {
            let send_id = current_attempt(&c.job).unwrap().send_id.clone();
            c.memory.send = Some(Send { send_id, stage });
        })
    }

    fn remote(self, remote: Remote) -> Self {
        self.with(|c| {
            c.memory.remote = Some(remote);
            c.memory.remote_key = Some(KEY.to_owned());
            let import = c.job.spec.import_from.as_ref();
            c.memory.remote_name = import.and_then(|i| BatchName::parse(&i.batch_name).ok());
        })
    }

    /// Others go first.
    fn closed(self) -> Self {
        let problem = Problem::new(Reason::WaitingForSlot, "others go first");
        self.with(|c| c.gate = Gate::Closed { problem, wake: Wake::OnChange })
    }

    /// An administrator says no.
    fn forbidden(self, reason: Reason) -> Self {
        let problem = Problem::new(reason, "an administrator says no");
        self.with(|c| c.gate = Gate::Closed { problem, wake: Wake::OnChange })
    }

    /// The namespace was asked whether it is being deleted; it is not asked again before `next`.
    fn namespace(self, terminating: bool, next: i64) -> Self {
        self.with(|c| c.memory.namespace = Some(NamespaceSeen { terminating, next: at(next) }))
    }

    fn key(self, fingerprint: &str) -> Self {
        self.with(|c| c.credential = Ok(fingerprint.to_owned()))
    }

    /// The user changed the spec.
    fn edited(self) -> Self {
        self.with(|c| c.job.metadata.generation = Some(2))
    }

    fn no_key(self) -> Self {
        self.with(|c| c.credential = Err(Problem::new(Reason::CredentialsNotFound, "create it")))
    }

    fn no_input(self) -> Self {
        self.with(|c| c.input = Err(Problem::new(Reason::InputInvalid, "line 7")))
    }

    fn differs(self) -> Self {
        self.with(|c| c.input = Err(Problem::new(Reason::InputDiffers, "not that part")))
    }

    fn other_input(self) -> Self {
        self.with(|c| {
            c.input = Ok(InputFacts {
                sha256: "other".to_owned(),
                whole_sha256: "other".to_owned(),
                count: 3,
                bytes: 9,
            });
        })
    }

    /// Results shall go to this ConfigMap.
    fn output(self, name: &str) -> Self {
        let output = json!({"configMap": {"name": name}});
        self.with(|c| c.job.spec.output = serde_json::from_value(output).unwrap())
    }

    fn store(self, uri: &str) -> Self {
        let output = json!({"objectStore": {"uri": uri}});
        self.with(|c| c.job.spec.output = serde_json::from_value(output).unwrap())
    }

    fn in_store(self, uri: &str) -> Self {
        let at = ObjectStoreOutput { uri: uri.to_owned(), ..ObjectStoreOutput::default() };
        self.object(OutputObject::Reserved { name: Destination::Store(at) })
    }

    fn object(self, object: OutputObject) -> Self {
        self.with(|c| c.memory.output = object)
    }

    fn reserved(self, name: &str) -> Self {
        self.object(OutputObject::Reserved { name: map(name) })
    }

    /// Not usable as of this generation of the job.
    fn blocked(self, generation: i64, retry: Option<i64>) -> Self {
        let problem = Problem::new(Reason::OutputConflict, "name another one");
        self.object(OutputObject::Blocked { problem, generation, retry: retry.map(at) })
    }

    /// The user says that this send may be repeated; `send` stands for the present one.
    fn annotated(self, send: &str) -> Self {
        self.with(|c| {
            let present = current_attempt(&c.job).unwrap().send_id.clone();
            let value = if send == "send" { present } else { send.to_owned() };
            c.job.metadata.annotations = Some([(RESEND_ANNOTATION.to_owned(), value)].into());
        })
    }

    fn gemini_file(self) -> Self {
        let theirs = self.with(|c| {
            c.job.spec.input =
                serde_json::from_value(json!({"geminiFile": {"name": "files/theirs"}})).unwrap();
        });
        match current_attempt(&theirs.job) {
            Some(_) => theirs.attempt(|a| {
                a.input_file = "files/theirs".to_owned();
                a.input_sha256 = None;
                a.request_count = None;
            }),
            None => theirs,
        }
    }

    /// A batch that somebody else created.
    fn imports(self) -> Self {
        self.with(|c| {
            c.job.spec.input = None;
            c.job.spec.import_from = serde_json::from_value(json!({"batchName": "batches/b0"})).unwrap();
        })
    }

    fn dry_run(self) -> Self {
        self.with(|c| c.job.spec.dry_run = true)
    }

    /// Gemini was asked whether a key is valid, and may be asked again at `next`.
    fn probed(self, key: &str, accepted: bool, next: i64) -> Self {
        let probe = Probe { fingerprint: key.to_owned(), accepted, next: at(next) };
        self.with(|c| c.memory.probe = Some(probe))
    }

    fn suspended(self, cancel: bool) -> Self {
        self.with(|c| {
            c.job.spec.suspend = true;
            c.job.spec.suspend_policy = if cancel { SuspendPolicy::Cancel } else { SuspendPolicy::Drain };
        })
    }

    fn deadline(self, seconds: i64) -> Self {
        self.with(|c| c.job.spec.active_deadline_seconds = Some(seconds))
    }

    fn backoff(self, limit: i32) -> Self {
        self.with(|c| c.job.spec.backoff_limit = limit)
    }

    /// So many batches in all, for requests that fail.
    fn retry(self, max_attempts: i32) -> Self {
        self.with(|c| c.job.spec.retry_policy = Some(RetryPolicy { max_attempts, codes: None }))
    }

    fn no_retry(self) -> Self {
        self.with(|c| c.job.spec.retry_policy = None)
    }

    fn tolerates(self, failures: i32) -> Self {
        let policy = json!({"maxFailedRequests": failures});
        self.with(|c| c.job.spec.success_policy = serde_json::from_value(policy).unwrap())
    }

    fn policy(self, policy: DeletionPolicy) -> Self {
        self.with(|c| c.job.spec.deletion_policy = Some(policy))
    }

    /// The operator wanted the batch cancelled.
    fn cancellation(self, reason: Reason) -> Self {
        let time = MicroTime(at(-1));
        self.attempt(|a| a.cancellation = Some(Cancellation { reason: reason.as_str().to_owned(), time }))
    }

    /// A callback came, and names this batch.
    /// A callback that came in at 0.
    fn hint(self, id: &str, batch: Option<&str>) -> Self {
        self.with(|c| {
            c.job.status.as_mut().unwrap().callback = Some(Callback {
                webhook_id: id.to_owned(),
                type_: "batch.succeeded".to_owned(),
                batch_id: batch.map(ToOwned::to_owned),
                attempt: 1,
                event_time: None,
                received_time: MicroTime(at(0)),
            });
        })
    }

    fn looks(self, change: impl FnOnce(&mut Looks)) -> Self {
        self.with(|c| change(&mut c.memory.looks))
    }

    fn cleanup(self, change: impl FnOnce(&mut Cleanup)) -> Self {
        self.with(|c| change(&mut c.memory.cleanup))
    }

    fn trouble(self, failures: u32, reason: Reason, next: i64) -> Self {
        let problem = Problem::new(reason, "what fails");
        self.with(|c| c.memory.trouble = Some(Trouble { failures, next: at(next), problem }))
    }

    /// Something of the job is on its way beside the passes.
    fn transfers(self) -> Self {
        self.with(|c| c.memory.transfer = Some(Problem::new(Reason::WaitingForTransfer, "on its way")))
    }

    fn unreadable(self, key: &str, since: i64, next: i64) -> Self {
        self.with(|c| c.memory.unreadable = Some(absent(key, 2, since, next)))
    }

    /// Deleted by its user a second ago.
    fn deleted(self) -> Self {
        self.with(|c| c.job.metadata.deletion_timestamp = Some(Time(at(-1))))
    }

    fn decide(&self) -> Decision {
        decide(
            &Observed {
                job: &self.job,
                credential: self.credential.clone(),
                // As the driver does it: what is not needed is not there.
                input: needs_input(&self.job, &self.memory).then(|| self.input.clone()),
                memory: &self.memory,
                gate: &self.gate,
                cluster: CLUSTER,
                fresh_send_id: "fresh",
                webhook_refused: self.webhook_refused,
                timings: &Timings::default(),
            },
            self.now,
        )
    }

    fn says(&self) -> String {
        show(&self.decide())
    }

    fn intent(&self) -> Attempt {
        match self.decide() {
            Decision::Record(change) => match *change {
                Change::Intent(attempt) => *attempt,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

fn batch(state: BatchState) -> Batch {
    Batch {
        name: BatchName::parse("batches/b1").unwrap(),
        display_name: String::new(),
        state,
        done: false,
        create_time: None,
        end_time: None,
        input_file: None,
        output_file: None,
        inlined: None,
        stats: None,
        error: None,
    }
}

fn boxed(state: BatchState) -> Box<Batch> {
    Box::new(batch(state))
}

fn collected(succeeded: i64, lines: Lines) -> Collected {
    Collected { succeeded_lines: succeeded, lines, ..Collected::default() }
}

fn kept() -> Lines {
    Lines::Kept(Kept::default())
}

fn map(name: &str) -> Destination {
    Destination::ConfigMap(name.to_owned())
}

fn absent(key: &str, count: u32, since: i64, next: i64) -> Absent {
    Absent { fingerprint: key.to_owned(), tries: Tries { since: at(since), count, next: at(next) } }
}

fn missing(key: &str, count: u32, since: i64, next: i64) -> Remote {
    Remote::Missing(absent(key, count, since, next))
}

fn refusal(call: RefusedCall, reason: Reason) -> Refusal {
    Refusal {
        call,
        reason: reason.as_str().to_owned(),
        code: 429,
        time: MicroTime(at(-1)),
        retry_time: MicroTime(at(59)),
    }
}

fn refused_stage(reason: Reason, is_final: bool) -> Stage {
    let refusal = refusal(RefusedCall::Create, reason);
    Stage::Refused(Refused { refusal, reason, message: "no".to_owned(), is_final })
}

fn unsure(next: Option<i64>) -> Stage {
    Stage::Unsure(Search { listings: 1, next: next.map(at), ..Search::default() })
}

fn uploaded() -> Stage {
    Stage::Uploaded { file: current_attempt(&intended().job).unwrap().input_file.clone() }
}

/// `CreateBatch`, `Intent`, `Done`, or `Wait`, what is said, and when to come again: seconds from now,
/// `change` or `recheck`. `!` marks what somebody has to mend.
fn show(decision: &Decision) -> String {
    let said = |change: &Change| match change {
        Change::Waiting { problem, stalled, results } => {
            let results = if results.is_some() { "+results" } else { "" };
            format!("{}{}{results}", problem.reason, if *stalled { "!" } else { "" })
        }
        Change::Suspended => "Suspended".to_owned(),
        Change::Validated { .. } => "Validated".to_owned(),
        Change::Running { early: None } => "Running".to_owned(),
        Change::Running { early: Some(event) } => format!("Running, though {event} was said"),
        other => panic!("nobody waits with {other:?}"),
    };
    match decision {
        Decision::Wait { say, wake } => {
            let wake = match wake {
                Wake::OnChange => "change".to_owned(),
                Wake::Recheck => "recheck".to_owned(),
                Wake::At(time) => format!("{:+}", time.duration_since(at(0)).as_secs()),
            };
            format!("Wait {} {wake}", say.as_ref().map_or("-".to_owned(), |s| said(s)))
        }
        Decision::Record(change) => match &**change {
            Change::Finished(end) => format!("Finished {} {}", end.state.as_str(), end.reason),
            Change::DropFinalizer { event: Some(event) } => format!("DropFinalizer {}", event.reason),
            _ => decision.name().to_owned(),
        },
        _ => decision.name().to_owned(),
    }
}

/// A situation, and what is decided in it.
macro_rules! check {
    ($($what:literal: $case:expr => $expected:literal;)*) => {$(
        assert_eq!($case.says(), $expected, "{}", $what);
    )*};
}

// ---------------------------------------------------------------------------------- submission

#[test]
fn before_the_intent() {
    check! {
        "just applied": applied() => "AddFinalizer";
        "nothing else counts before the finalizer": applied().no_key() => "AddFinalizer";
        "no output wanted": held() => "Intent";
        "no key": held().no_key() => "Wait CredentialsNotFound! recheck";
        "bad input": held().no_input() => "Wait InputInvalid! recheck";
        "no key is said before a bad input": held().no_key().no_input() => "Wait CredentialsNotFound! recheck";
        "a bad input is found before the output is touched": held().output("o").no_input() => "Wait InputInvalid! recheck";
        "output": held().output("o") => "ReserveOutput";
        "output reserved": held().output("o").reserved("o") => "Intent";
        "output taken": held().output("o").blocked(1, Some(30)) => "Wait OutputConflict! +30";
        "output taken, time to look again": held().output("o").blocked(1, Some(0)) => "ReserveOutput";
        "output taken, job edited": held().output("o").blocked(0, Some(30)) => "ReserveOutput";
        "output taken, job edited again": held().output("o").blocked(1, Some(30)).edited() => "ReserveOutput";
        "output taken for ever": held().output("o").blocked(1, None) => "Wait OutputConflict! change";
        "output renamed": held().output("p").reserved("o") => "ReleaseOutput";
        "renamed, released": held().output("p").object(OutputObject::Unknown) => "ReserveOutput";
        "output removed": held().reserved("o") => "Intent";
        "somebody else's file needs no input": held().gemini_file().no_input() => "Intent";
        "somebody else's file, no key": held().gemini_file().no_key() => "Wait CredentialsNotFound! recheck";
        "suspended": held().suspended(false) => "Wait Suspended change";
        "suspended: neither key nor input count": held().no_key().no_input().suspended(true) => "Wait Suspended change";
        "a dry run asks whether the key is good": held().dry_run() => "ProbeCredential";
        "a dry run, good": held().dry_run().probed(KEY, true, 20) => "Wait Validated change";
        "a dry run, refused": held().dry_run().probed(KEY, false, 20) => "Wait CredentialsRefused! +20";
        "a dry run, refused, due": held().dry_run().probed(KEY, false, 0) => "ProbeCredential";
        "a dry run, another key": held().dry_run().probed("other", false, 20) => "ProbeCredential";
        "a dry run, no key": held().dry_run().no_key() => "Wait CredentialsNotFound! recheck";
        "a dry run, bad input": held().dry_run().no_input() => "Wait InputInvalid! recheck";
        "a dry run, the output": held().dry_run().output("o") => "ReserveOutput";
        "a dry run waits for no turn": held().dry_run().probed(KEY, true, 20).closed() => "Wait Validated change";
        "a dry run, suspended": held().dry_run().suspended(false) => "Wait Suspended change";
        "a dry run is over": held().probed(KEY, true, 20) => "Intent";
        "its deadline counts from the start": held().deadline(1).at(9999) => "Intent";
        "not its turn": held().closed() => "Wait WaitingForSlot change";
        "not its turn, and the output first": held().output("o").closed() => "ReserveOutput";
        "not its turn, output reserved": held().output("o").reserved("o").closed() => "Wait WaitingForSlot change";
        "a mistake is said before it is its turn": held().no_input().closed() => "Wait InputInvalid! recheck";
        "not its turn again": refused_for(RefusedCall::Create, Reason::WaitingForQuota).at(59).closed() => "Wait WaitingForSlot change";
    }
    assert!(matches!(held().output("p").reserved("o").decide(),
        Decision::Act(Action::ReleaseOutput { name }) if name == map("o")));
}

/// etcd was restored from a backup: the attempt that is about to begin has a batch at Gemini.
#[test]
fn what_gemini_has_already_is_not_sent_again() {
    let named = |name: &str, number: i32, state| Batch {
        name: BatchName::parse(name).unwrap(),
        display_name: identity::display_name(CLUSTER, UID, number, "theirs"),
        input_file: Some("files/theirs".to_owned()),
        create_time: Some(at(-500)),
        ..batch(state)
    };
    let found = |case: Case, number, state| {
        case.with(|c| c.memory.found = vec![(number, named("batches/b1", number, state))])
    };
    let there = |case| found(case, 1, BatchState::Running);
    let refused = || refused_for(RefusedCall::Create, Reason::WaitingForQuota);
    check! {
        "found": there(held()) => "Adopted";
        "the finalizer comes first": there(applied()) => "AddFinalizer";
        "over already": found(held(), 1, BatchState::Expired) => "Adopted";
        "whatever stands in the way of a new one": there(held()).no_input().output("o").closed() => "Adopted";
        "no key": there(held()).no_key() => "Wait CredentialsNotFound! recheck";
        "of another attempt": found(held(), 2, BatchState::Running) => "Intent";
        "refused": there(refused()) => "Adopted";
        "refused, another attempt": found(refused(), 2, BatchState::Running) => "Wait WaitingForQuota +59";
        "intended: it is looked for": there(intended()) => "FindInputFile";
        "running": there(running()) => "Wait Running change";
        "deleted": there(held()).deleted() => "DropFinalizer";
    }
    let Decision::Record(change) = there(held()).decide() else { panic!("not recorded") };
    let Change::Adopted { attempt, batch } = &*change else { panic!("{change:?}") };
    assert_eq!((attempt.send_id.as_str(), attempt.input_file.as_str()), ("theirs", "files/theirs"));
    assert_eq!(attempt.display_name, batch.display_name);
    assert_eq!((attempt.number, attempt.credential_fingerprint.as_str()), (1, KEY));
    assert_eq!((attempt.intent_time.0, attempt.input_sha256.as_deref()), (at(-500), Some(SHA)));
    // Both in one write.
    let adopted = held().recorded(&change);
    let recorded = current_attempt(&adopted.job).unwrap();
    assert_eq!(recorded.batch_name.as_deref(), Some("batches/b1"));
    assert_eq!(adopted.job.status.as_ref().unwrap().state, crate::api::State::Running);
    assert_eq!(adopted.says(), "Wait Running change");
}

#[test]
fn of_several_batches_the_succeeded_is_adopted_before_the_live_and_that_before_the_oldest() {
    use BatchState::{Cancelled, Expired, Pending, Running, Succeeded};
    let all = [
        ("old", Cancelled, 0),
        ("older-success", Succeeded, 5),
        ("live", Running, 2),
        ("success", Succeeded, 6),
        ("younger-live", Pending, 3),
        ("young", Expired, 9),
    ];
    let adopted = |indices: &[usize]| {
        let of_job = indices.iter().map(|i| {
            let (name, state, created) = all[*i];
            let batch = Batch {
                name: BatchName::parse(name).unwrap(),
                display_name: identity::display_name(CLUSTER, UID, 1, "theirs"),
                create_time: Some(at(created)),
                ..batch(state)
            };
            (1, batch)
        });
        let case = held().with(|c| c.memory.found = of_job.collect());
        let Decision::Record(change) = case.decide() else { panic!("{}", case.says()) };
        let Change::Adopted { batch, .. } = *change else { panic!("{change:?}") };
        batch.name.to_string().replace("batches/", "")
    };
    assert_eq!(adopted(&[0, 1, 2, 3, 4, 5]), "older-success");
    assert_eq!(adopted(&[5, 4, 2, 0]), "live");
    assert_eq!(adopted(&[5, 0]), "old");
}

#[test]
fn an_intent_says_all_that_a_restart_has_to_know() {
    let a = held().intent();
    assert_eq!((a.number, a.send_id.as_str(), a.credential_fingerprint.as_str()), (1, "fresh", KEY));
    assert_eq!(a.display_name, identity::display_name(CLUSTER, UID, 1, "fresh"));
    assert_eq!(a.input_file, identity::input_file(CLUSTER, UID, 1, "fresh"));
    assert_eq!((a.input_sha256.as_deref(), a.request_count), (Some(SHA), Some(2)));
    assert_eq!(a.intent_time, MicroTime(at(0)));
    let theirs = held().gemini_file().intent();
    assert_eq!(
        (theirs.input_file.as_str(), theirs.input_sha256, theirs.request_count),
        ("files/theirs", None, None)
    );
}

#[test]
fn a_send_in_the_process_that_intended_it() {
    let named = Stage::Uploaded { file: "files/theirs".to_owned() };
    check! {
        "intended": sending(Stage::NotUploaded) => "UploadInput";
        "the input went bad": sending(Stage::NotUploaded).no_input() => "Wait InputInvalid! recheck";
        "the input changed": sending(Stage::NotUploaded).other_input() => "Intent";
        "the key changed": sending(Stage::NotUploaded).key("other") => "Intent";
        "no key": sending(Stage::NotUploaded).no_key() => "Wait CredentialsNotFound! recheck";
        "uploaded": sending(uploaded()) => "CreateBatch";
        "uploaded under another name": sending(named.clone()) => "InputFile";
        "uploaded, the key changed": sending(uploaded()).key("other") => "Intent";
        "another name, the key changed": sending(named).key("other") => "Intent";
        "uploaded, the key changed, bad input": sending(uploaded()).key("other").no_input() => "Wait InputInvalid! recheck";
        "uploaded, no key": sending(uploaded()).no_key() => "Wait CredentialsNotFound! recheck";
        "created": sending(Stage::Created(boxed(BatchState::Pending))) => "Submitted";
        "found": sending(Stage::Found(boxed(BatchState::Pending))) => "Submitted";
        "created, no key any more": sending(Stage::Created(boxed(BatchState::Pending))).no_key() => "Submitted";
        "created, other key": sending(Stage::Created(boxed(BatchState::Pending))).key("other") => "Submitted";
    }
    assert!(matches!(sending(Stage::Found(boxed(BatchState::Pending))).decide(),
        Decision::Record(c) if matches!(*c, Change::Submitted { adopted: true, .. })));
    // What is asked for is what was recorded.
    let case = sending(uploaded());
    assert!(matches!(case.decide(), Decision::Act(Action::CreateBatch { attempt })
        if Some(&*attempt) == current_attempt(&case.job)));
    // A new intent is a new send with a file of its own.
    let again = sending(Stage::NotUploaded).attempt(|a| {
        a.send_id = "first".to_owned();
        a.input_file = identity::input_file(CLUSTER, UID, 1, "first");
    });
    let again = again.stage(Stage::NotUploaded).key("other").intent();
    assert_eq!((again.send_id.as_str(), again.credential_fingerprint.as_str()), ("fresh", "other"));
    assert_eq!(again.input_file, identity::input_file(CLUSTER, UID, 1, "fresh"));
}

/// Whatever led there: after a no of an administrator nothing is sent any more, and everything else goes on.
#[test]
fn an_administrators_no_holds_on_every_way_to_a_submission() {
    let fenced = Stage::Unsure(Search {
        own_listings: 4,
        since: Some(at(-700)),
        fenced: true,
        listed_behind_fence: true,
        ..Search::default()
    });
    let again = refused_for(RefusedCall::Create, Reason::WaitingForQuota).at(59);
    for (reason, said) in [
        (Reason::SubmissionsPaused, "Wait SubmissionsPaused change"),
        (Reason::CrdOutdated, "Wait CrdOutdated change"),
        (Reason::CredentialsNotFound, "Wait CredentialsNotFound! change"),
    ] {
        let no = |case: Case| case.forbidden(reason).says();
        assert_eq!(no(held()), said, "not intended");
        assert_eq!(no(sending(Stage::NotUploaded)), said, "intended");
        assert_eq!(no(sending(Stage::Unsent)), said, "intended before a restart");
        assert_eq!(no(sending(uploaded())), said, "uploaded");
        assert_eq!(no(again.clone()), said, "refused, due again");
        assert_eq!(no(sending(fenced.clone())), said, "lost, and fenced off");

        assert_eq!(no(intended()), "FindInputFile", "after a restart it is found out how far it came");
        assert_eq!(no(sending(unsure(None))), "FindBatch");
        assert_eq!(no(sending(Stage::Created(boxed(BatchState::Pending)))), "Submitted");
        assert_eq!(no(ended(BatchState::Succeeded)), "Collect");
        assert_eq!(no(running().deleted()), "CancelBatch");
        assert_eq!(no(finished()), "DeleteInputFile");
    }
    // A turn that was taken is kept.
    assert_eq!(sending(Stage::NotUploaded).closed().says(), "UploadInput");
    assert_eq!(sending(uploaded()).closed().says(), "CreateBatch");
}

#[test]
fn what_a_key_is_wanted_for() {
    let only_to_submit = |case: Case| only_to_submit(&case.job, &case.memory);
    for case in [
        held(),
        sending(Stage::NotUploaded),
        sending(Stage::Unsent),
        sending(uploaded()),
        refused_for(RefusedCall::Create, Reason::WaitingForQuota),
    ] {
        assert!(only_to_submit(case.clone()), "{:?}", case.memory.send);
        assert!(!only_to_submit(case.deleted()), "what it left at Gemini is deleted");
    }
    for case in [
        intended(),
        sending(unsure(None)),
        sending(Stage::Created(boxed(BatchState::Pending))),
        running(),
        finished(),
    ] {
        assert!(!only_to_submit(case.clone()), "{:?}", case.memory.send);
    }
}

#[test]
fn refusals() {
    use RefusedCall::{Create, Upload};
    let recorded = |reason| sending(refused_stage(reason, false));
    let quota = || refused_for(Create, Reason::WaitingForQuota);
    let credentials = || refused_for(Create, Reason::CredentialsRefused);
    let no_webhook = || refused_for(Create, Reason::WebhookRefused).at(59);
    let probed = |key: &str, accepted, next| credentials().probed(key, accepted, next);
    check! {
        "quota": recorded(Reason::WaitingForQuota) => "Refused";
        "quota, no key": recorded(Reason::WaitingForQuota).no_key() => "Refused";
        "credentials": recorded(Reason::CredentialsRefused) => "Refused";
        "file gone": recorded(Reason::InputFileNotFound) => "Refused";
        "no such model": sending(refused_stage(Reason::ModelNotFound, true)) => "Finished Failed ModelNotFound";
        "bad lines": sending(refused_stage(Reason::InputRefused, true)) => "Finished Failed InputRefused";
        "their file gone": sending(refused_stage(Reason::InputFileNotFound, true)) => "Finished Failed InputFileNotFound";
        "quota, waiting": quota() => "Wait WaitingForQuota +59";
        "quota, due": quota().at(59) => "Intent";
        "quota, due, bad input": quota().at(59).no_input() => "Wait InputInvalid! recheck";
        "quota, due, output taken": quota().at(59).output("o").blocked(1, Some(90)) => "Wait OutputConflict! +90";
        "quota, other key: no reason to wait": quota().key("other") => "Intent";
        "quota, no key": quota().no_key() => "Wait CredentialsNotFound! recheck";
        "quota at the upload": refused_for(Upload, Reason::WaitingForQuota) => "Wait WaitingForQuota +59";
        "precondition": refused_for(Create, Reason::PreconditionFailed) => "Wait PreconditionFailed! +59";
        "our file gone": refused_for(Create, Reason::InputFileNotFound) => "Wait InputFileNotFound! +59";
        "our file gone, due": refused_for(Create, Reason::InputFileNotFound).at(59) => "Intent";
        "a webhook": recorded(Reason::WebhookRefused) => "Refused";
        "without one it is another send": no_webhook() => "Intent";
        "without one, but held": no_webhook().suspended(false) => "Wait Suspended change";
        "without one, but not its turn": no_webhook().closed() => "Wait WaitingForSlot change";
        "without one, no key": no_webhook().no_key() => "Wait CredentialsNotFound! recheck";
        "credentials": credentials() => "Wait CredentialsRefused! +59";
        "credentials, due: ask before sending": credentials().at(59) => "ProbeCredential";
        "probed, refused": probed(KEY, false, 20) => "Wait CredentialsRefused! +20";
        "probed, refused, due": probed(KEY, false, 0) => "ProbeCredential";
        "probed, accepted": probed(KEY, true, 20) => "Intent";
        "probed another key": probed("other", true, 20) => "ProbeCredential";
        "credentials, other key": credentials().key("other") => "Intent";
        "credentials, no key": credentials().no_key() => "Wait CredentialsNotFound! recheck";
    }
}

/// The next send of a job is its own decision to make, and its further attempts need not be refused as well.
#[test]
fn a_batch_whose_webhook_was_refused_is_asked_for_without_one() {
    use RefusedCall::Create;
    assert!(!held().intent().polled);
    assert!(held().with(|c| c.webhook_refused = true).intent().polled, "another job's was refused lately");

    let refused = refused_for(Create, Reason::WebhookRefused).at(59);
    let next = refused.clone().attempt(|a| a.input_file = "files/old".to_owned()).intent();
    assert!(next.polled);
    assert_eq!((next.number, next.send_id.as_str()), (1, "fresh"));
    assert_eq!(next.input_file, "files/old", "it is not uploaded again");
    assert!(refused.key("other").intent().polled, "under another key as well");

    let later = refused_for(Create, Reason::WaitingForQuota).at(59);
    assert!(!later.clone().intent().polled);
    assert!(later.attempt(|a| a.polled = true).intent().polled, "refused again, for something else");
    assert!(over_once().attempt(|a| a.polled = true).at(10).intent().polled, "a further attempt");
}

#[test]
fn the_file_of_a_refused_send_serves_the_next_one_if_it_is_the_same() {
    use RefusedCall::{Create, Upload};
    let quota =
        || refused_for(Create, Reason::WaitingForQuota).attempt(|a| a.input_file = "files/old".to_owned());
    let reuses = |case: Case| case.intent().input_file == "files/old";
    assert!(reuses(quota().at(59)));
    assert!(reuses(quota().at(40 * 3600 - 2)));
    assert!(reuses(
        refused_for(Create, Reason::PreconditionFailed)
            .attempt(|a| a.input_file = "files/old".to_owned())
            .at(59)
    ));
    let not_reused = |what: &str, case: Case| assert!(!reuses(case), "{what}");
    not_reused("another key", quota().key("other"));
    not_reused("another input", quota().other_input().at(59));
    not_reused("too old", quota().at(40 * 3600 - 1));
    let refused_by = |call, reason| quota().attempt(move |a| a.refusal = Some(refusal(call, reason)));
    not_reused("never uploaded", refused_by(Upload, Reason::WaitingForQuota).at(59));
    not_reused("gone", refused_by(Create, Reason::InputFileNotFound).at(59));
    not_reused("with a refused key", refused_by(Create, Reason::CredentialsRefused).key("other"));
    let next = quota().at(59).intent();
    assert_eq!((next.number, next.refusals, next.refusal), (1, Some(1), None), "refusals are counted on");
    // The same send id would be the same name at Gemini.
    assert_eq!(quota().attempt(|a| a.send_id = "first".to_owned()).at(59).intent().send_id, "fresh");
}

// ----------------------------------------------------------------------- unknown outcomes, restarts

#[test]
fn an_unknown_outcome_is_looked_for_and_sent_again_only_behind_a_fence() {
    let searched = || sending(unsure(Some(10)));
    let patient = |own_listings, since| {
        let search = Search {
            listings: 9,
            own_listings,
            since: Some(at(since)),
            next: Some(at(10)),
            ..Search::default()
        };
        sending(Stage::Unsure(search))
    };
    let fenced = |listed_behind_fence| {
        sending(Stage::Unsure(Search {
            listings: 9,
            own_listings: 9,
            since: Some(at(-9000)),
            next: Some(at(10)),
            fenced: true,
            listed_behind_fence,
            ..Search::default()
        }))
    };
    let just_fenced = |time| {
        sending(Stage::Unsure(Search {
            listings: 9,
            own_listings: 9,
            since: Some(at(-9000)),
            next: Some(at(10)),
            fenced: true,
            fenced_at: Some(at(time)),
            ..Search::default()
        }))
    };
    let refuted = |id: &str| {
        let refuted = Some(BatchName::parse(id).unwrap());
        sending(Stage::Unsure(Search { listings: 1, next: Some(at(10)), refuted, ..Search::default() }))
    };
    check! {
        "at once": sending(Stage::Unsure(Search::default())) => "FindBatch";
        "later": searched() => "Wait SubmissionUnconfirmed! +10";
        "much later": sending(unsure(Some(600))) => "Wait SubmissionUnconfirmed! +600";
        "due": searched().at(10) => "FindBatch";
        "after a month": searched().at(30 * 86_400) => "FindBatch";
        "the grace is not over": patient(3, -599) => "Wait SubmissionUnconfirmed! +1";
        "only two listings": patient(2, -9000) => "Wait SubmissionUnconfirmed! +10";
        "patient enough: the fence is written down": patient(3, -600) => "Fencing";
        "the fence": patient(3, -600).attempt(|a| a.fence_time = Some(MicroTime(at(-1)))) => "Fence";
        "but under another key nothing is proved": patient(3, -600).key("other") => "Wait CredentialsChanged! +10";
        "and a callback comes first": patient(3, -600).hint("m", Some("b7")) => "ConfirmHinted";
        "just fenced: listings lag": just_fenced(-299) => "Wait SubmissionUnconfirmed! +1";
        "they did long enough": just_fenced(-300) => "FindBatch";
        "fenced: once more": fenced(false) => "FindBatch";
        "and not there: the next send": fenced(true) => "Intent";
        "fenced, the key changed": fenced(true).key("other") => "Wait CredentialsChanged! +10";
        "fenced, the input is bad": fenced(true).no_input() => "Wait InputInvalid! recheck";
        "their file is no fence": patient(3, -600).gemini_file() => "Wait SubmissionUnconfirmed! +10";
        "unless the user says so": patient(3, -600).gemini_file().annotated("send") => "Intent";
        "of this send": patient(3, -600).gemini_file().annotated("another") => "Wait SubmissionUnconfirmed! +10";
        "and not at once": patient(3, -599).gemini_file().annotated("send") => "Wait SubmissionUnconfirmed! +10";
        "found unsent by another process": sending(Stage::Unsent) => "Intent";
        "the input changed": searched().other_input() => "Wait SubmissionUnconfirmed! +10";
        "no key": searched().no_key() => "Wait CredentialsNotFound! recheck";
        "other key: it may see the batch": searched().at(10).key("other") => "FindBatch";
        "other key, later": searched().key("other") => "Wait CredentialsChanged! +10";
        "other key, soon enough": sending(unsure(Some(40))).key("other") => "Wait CredentialsChanged! +40";
        "other key, much later": sending(unsure(Some(600))).key("other") => "Wait CredentialsChanged! recheck";
        "a callback names it": searched().hint("m", Some("b7")) => "ConfirmHinted";
        "a callback names another one": refuted("b7").hint("m", Some("b7")) => "Wait SubmissionUnconfirmed! +10";
        "and then this one": refuted("b7").hint("m", Some("b8")) => "ConfirmHinted";
        "a callback names none": searched().hint("m", None) => "Wait SubmissionUnconfirmed! +10";
        "a callback names nonsense": searched().hint("m", Some("../x")) => "Wait SubmissionUnconfirmed! +10";
        "their file": searched().gemini_file() => "Wait SubmissionUnconfirmed! +10";
    }
}

/// The count is what limits how often a batch is paid for without anybody having seen the one before.
#[test]
fn sends_behind_a_fence_are_counted_and_others_are_not() {
    let fenced = Search { fenced: true, listed_behind_fence: true, ..patient_search() };
    let lost = |case: Case| case.stage(Stage::Unsure(fenced.clone())).intent();
    let again = |before: Attempt| intended().recorded(&Change::Intent(Box::new(before)));
    let first = lost(intended());
    assert_eq!(first.resends, Some(1));
    let second = lost(again(first.clone()));
    assert_eq!((second.number, second.resends), (1, Some(2)));
    let unsent = again(first).stage(Stage::Unsent).intent();
    assert_eq!(unsent.resends, Some(1), "nothing was sent since");
    assert_eq!(sending(Stage::Unsent).intent().resends, None);
    assert_eq!(over_once().attempt(|a| a.resends = Some(1)).intent().resends, None, "of another attempt");
}

#[test]
fn after_a_restart_a_missing_file_is_proof_only_where_it_can_be() {
    let renamed = |file: &str| intended().attempt(|a| a.input_file = file.to_owned());
    let unasked = |key: &str, now: i64| {
        let search = Search { next: Some(at(10)), file_unasked: true, ..Search::default() };
        sending(Stage::Unsure(search)).key(key).at(now)
    };
    check! {
        "was it uploaded?": intended() => "FindInputFile";
        "another send is remembered": intended().stage(uploaded()).attempt(|a| { a.send_id = "later".to_owned(); a.input_file = identity::input_file(CLUSTER, UID, 1, "later"); }) => "FindInputFile";
        "a day later files may have gone": intended().at(86_399) => "FindBatch";
        "killed right behind the fence": intended().attempt(|a| a.fence_time = Some(MicroTime(at(-1)))) => "FindBatch";
        "somebody else's file": intended().gemini_file() => "FindBatch";
        "the file of an earlier send, which may have expired": renamed("files/gbo-0-1-earlier") => "FindBatch";
        "a name that Gemini gave: it was complete": renamed("files/abc") => "FindBatch";
        "no key": intended().no_key() => "Wait CredentialsNotFound! recheck";
        "other key: the file proves nothing": intended().key("other") => "FindBatch";
        "other key, a callback": intended().key("other").hint("m", Some("b1")) => "ConfirmHinted";
        "other key, searched": unasked("other", 0) => "Wait CredentialsChanged! +10";
        "the key is back": unasked(KEY, 0) => "FindInputFile";
        "the key is back too late": unasked(KEY, 86_399) => "FindBatch";
        "refused": refused_for(RefusedCall::Create, Reason::WaitingForQuota) => "Wait WaitingForQuota +59";
        "running": running() => "Wait Running change";
        "finished": finished() => "DeleteInputFile";
    }
}

// ------------------------------------------------------------------------------ while it runs

#[test]
fn while_it_runs() {
    let seen = || running().remote(Remote::Seen(boxed(BatchState::Running)));
    let spent = |case: Case, id: &str| {
        case.looks(|l| {
            (0..4).for_each(|i| l.looked(Some(&hint(id)), at(i - 4), &Timings::default().hint_pauses));
        })
    };
    let following = |next| {
        seen().hint("m", None).looks(|l| {
            l.following = Some((hint("m"), 1));
            l.next = Some(at(next));
        })
    };
    check! {
        "nothing new": running() => "Wait Running change";
        "seen running": seen() => "Wait Running change";
        "seen in an unknown state": running().remote(Remote::Seen(boxed(BatchState::Unknown))) => "Wait Running change";
        "no key": running().no_key() => "Wait CredentialsNotFound! recheck";
        "other key, until it is needed": running().key("other") => "Wait Running change";
        "a callback": running().hint("m", None) => "GetBatch";
        "a callback that was acted on": running().hint("m", None).attempt(|a| a.observed_hint = Some(hint("m"))) => "Wait Running change";
        "the same once more, maybe in the place of another": running().hint("m", None).attempt(|a| a.observed_hint = Some("m@2026-09-01T09:59:59.000000Z".to_owned())) => "GetBatch";
        "a callback, other key": running().hint("m", None).key("other") => "GetBatch";
        "a callback, no key": running().hint("m", None).no_key() => "Wait CredentialsNotFound! recheck";
        "an early callback": following(5) => "Wait Running, though batch.succeeded was said +5";
        "an early callback, due": following(0) => "GetBatch";
        "a second callback meanwhile": following(5).hint("m2", None) => "GetBatch";
        "all looks made": spent(seen().hint("m", None), "m") => "HintObserved";
        "a new callback, budget spent": spent(seen().hint("m2", None), "m") => "Wait Running, though batch.succeeded was said +56";
        "the budget is back": spent(seen().hint("m2", None), "m").at(56) => "GetBatch";
        "swept": running().looks(|l| l.swept = true) => "GetBatch";
        "swept, budget spent": spent(seen().looks(|l| l.swept = true), "m").looks(|l| l.swept = true) => "Wait Running +56";
        "a name that is none": running().attempt(|a| a.batch_name = Some("a/b".to_owned())) => "Wait BatchNotFound! recheck";
    }
}

#[test]
fn a_batch_that_gemini_does_not_show() {
    let gone = || running().remote(missing(KEY, 3, -3600, 30));
    check! {
        "for the first time": running().remote(missing(KEY, 1, 0, 1)) => "Wait GeminiUnavailable +1";
        "due": running().remote(missing(KEY, 1, -1, 0)) => "GetBatch";
        "an hour, but only two looks": running().remote(missing(KEY, 2, -3600, 30)) => "Wait GeminiUnavailable +30";
        "many looks, but not an hour": running().remote(missing(KEY, 9, -3599, 30)) => "Wait GeminiUnavailable +30";
        "an hour, but not asked lately": running().remote(missing(KEY, 3, -3600, 0)) => "GetBatch";
        "gone: read what there may be": gone() => "Collect";
        "gone, and no results": gone().unreadable(KEY, 0, 1) => "Finished Failed BatchNotFound";
        "gone, results are there": gone().with(|c| c.memory.collected = Some(collected(2, Lines::Dropped))) => "Finished Failed BatchNotFound";
        "gone, no key": gone().no_key() => "Wait CredentialsNotFound! recheck";
        "not shown to another key": running().remote(missing("other", 9, -9000, 30)).key("other") => "Wait CredentialsChanged! +30";
        "not shown to another key, soon enough": running().remote(missing("other", 9, -9000, 40)).key("other") => "Wait CredentialsChanged! +40";
        "not shown to another key, which is looked at soon": running().remote(missing("other", 9, -9000, 600)).key("other") => "Wait CredentialsChanged! recheck";
        "the old key is back: it has not been asked": running().remote(missing("other", 9, -9000, 600)) => "GetBatch";
        "a third key has not been asked either": running().remote(missing("other", 9, -9000, 600)).key("third") => "GetBatch";
        "an old absence under another key": running().remote(missing(KEY, 9, -9000, 600)).key("other") => "GetBatch";
    }
    let Decision::Act(Action::Collect { batch, .. }) = gone().decide() else { panic!() };
    assert!(batch.is_none());
}

#[test]
fn gemini_in_trouble() {
    check! {
        "the first failure": running().trouble(1, Reason::GeminiUnavailable, 5) => "Wait - +5";
        "a lasting one": running().trouble(2, Reason::GeminiUnavailable, 5) => "Wait GeminiUnavailable +5";
        "a first one with a long wait": running().trouble(1, Reason::GeminiUnavailable, 301) => "Wait GeminiUnavailable +301";
        "a first one with the longest of our own": running().trouble(1, Reason::GeminiUnavailable, 300) => "Wait - +300";
        "a store, with results that are paid for": read(BatchState::Succeeded, kept()).store("s3://b/o").trouble(2, Reason::StoreUnavailable, 5) => "Wait StoreUnavailable+results +5";
        "a store, before they were read": ended(BatchState::Succeeded).store("s3://b/o").trouble(2, Reason::StoreAccessDenied, 5) => "Wait StoreAccessDenied!+results +5";
        "Gemini, with results": read(BatchState::Succeeded, kept()).store("s3://b/o").trouble(2, Reason::GeminiUnavailable, 5) => "Wait GeminiUnavailable +5";
        "a refused key": running().trouble(2, Reason::CredentialsRefused, 5) => "Wait CredentialsRefused! +5";
        "over": running().trouble(9, Reason::GeminiUnavailable, 0) => "Wait Running change";
        "while sending": sending(uploaded()).trouble(2, Reason::GeminiUnavailable, 5) => "Wait GeminiUnavailable +5";
        "the finalizer comes first": applied().trouble(2, Reason::GeminiUnavailable, 5) => "AddFinalizer";
        "a finished job has none": finished().trouble(2, Reason::GeminiUnavailable, 5) => "DeleteInputFile";
        "a deletion does not wait for it": running().deleted().trouble(2, Reason::GeminiUnavailable, 5) => "CancelBatch";
    }
}

/// It is woken when that is done, and asks for nothing else meanwhile.
#[test]
fn a_transfer_is_waited_for() {
    check! {
        "while it is read": held().transfers() => "Wait WaitingForTransfer change";
        "read for a further attempt": over_once().transfers() => "Wait WaitingForTransfer change";
        "while it is sent": sending(Stage::NotUploaded).transfers() => "Wait WaitingForTransfer change";
        "the finalizer comes first": applied().transfers() => "AddFinalizer";
        "a suspension does not wait for it": sending(Stage::NotUploaded).transfers().suspended(false) => "Wait Suspended change";
        "nor a deadline": sending(Stage::NotUploaded).transfers().deadline(1) => "Finished Failed DeadlineExceeded";
        "which ends the wait": sending(Stage::NotUploaded).transfers().deadline(100) => "Wait WaitingForTransfer +99";
        "nor a deletion": sending(Stage::NotUploaded).transfers().deleted() => "DeleteInputFile";
        "a store that fails for now": held().trouble(2, Reason::StoreUnavailable, 5) => "Wait StoreUnavailable +5";
        "one that refuses": running().trouble(2, Reason::StoreAccessDenied, 5) => "Wait StoreAccessDenied! +5";
    }
}

// ------------------------------------------------------------------------------------ results

#[test]
fn results_are_read_with_patience() {
    use BatchState::{Cancelled, Expired, Failed, Succeeded};
    let named = |case: Case| {
        case.with(|c| {
            if let Some(Remote::Seen(b)) = &mut c.memory.remote {
                b.output_file = crate::gemini::FileName::parse("files/out").ok();
            }
        })
    };
    let counted = |case: Case, succeeded| {
        case.with(|c| {
            if let Some(Remote::Seen(b)) = &mut c.memory.remote {
                let pending = 2 - succeeded;
                b.stats = Some(crate::gemini::Stats { total: 2, succeeded, failed: 0, pending });
            }
        })
    };
    check! {
        "succeeded": ended(Succeeded) => "Collect";
        "failed": ended(Failed) => "Collect";
        "done in an unknown state": ended(BatchState::Unknown).with(|c| { if let Some(Remote::Seen(b)) = &mut c.memory.remote { b.done = true; } }) => "Collect";
        "no key": ended(Succeeded).no_key() => "Wait CredentialsNotFound! recheck";
        "other key: try": ended(Succeeded).key("other") => "Collect";
        "not yet readable": ended(Succeeded).unreadable(KEY, 0, 2) => "Wait ResultsNotReadable +2";
        "not yet readable, due": ended(Succeeded).unreadable(KEY, -2, 0) => "Collect";
        "late": ended(Succeeded).unreadable(KEY, -600, 2) => "Wait ResultsNotReadable! +2";
        "almost a day late": ended(Succeeded).unreadable(KEY, -86_399, 2) => "Wait ResultsNotReadable! +2";
        "a day late, but not asked lately": ended(Succeeded).unreadable(KEY, -86_400, 0) => "Collect";
        "a day late": ended(Succeeded).unreadable(KEY, -86_400, 2) => "Finished Failed ResultsLost";
        "a day late, no key": ended(Succeeded).unreadable(KEY, -86_400, 2).no_key() => "Wait CredentialsNotFound! recheck";
        "failed: nothing was promised": ended(Failed).unreadable(KEY, 0, 2) => "Finished Failed BatchFailed";
        "expired": ended(Expired).unreadable(KEY, 0, 2) => "Finished Failed BatchExpired";
        "cancelled": ended(Cancelled).unreadable(KEY, 0, 2) => "Finished Cancelled BatchCancelled";
        "expired, but Gemini counted successes": counted(ended(Expired), 1).unreadable(KEY, -599, 2) => "Wait ResultsNotReadable +2";
        "expired, the counted successes are late": counted(ended(Expired), 1).unreadable(KEY, -600, 2) => "Wait ResultsNotReadable! +2";
        "expired, the counted successes do not come": counted(ended(Expired), 1).unreadable(KEY, -86_400, 2) => "Finished Failed BatchExpired";
        "expired, and Gemini counted no successes": counted(ended(Expired), 0).unreadable(KEY, -599, 2) => "Finished Failed BatchExpired";
        "expired, but Gemini names a file": named(ended(Expired)).unreadable(KEY, 0, 2) => "Wait ResultsNotReadable +2";
        "another key may not read it": ended(Succeeded).unreadable("other", -86_400, 2).key("other") => "Wait CredentialsChanged! +2";
        "another key, nothing promised": ended(Expired).unreadable("other", 0, 600).key("other") => "Wait CredentialsChanged! recheck";
        "another key, due": ended(Expired).unreadable("other", -1, 0).key("other") => "Collect";
        "the old key is back": ended(Succeeded).unreadable("other", -86_400, 2) => "Collect";
        "the old key is back, nothing promised": ended(Expired).unreadable("other", -86_400, 2) => "Collect";
    }
}

#[test]
fn results_go_where_the_output_says() {
    use BatchState::{Expired, Failed, Succeeded};
    let large = || Lines::TooLarge { bytes: 9 };
    let stored = |case: Case, name: &str| {
        let placed = Placed::ConfigMap(name.to_owned());
        case.object(OutputObject::Stored { name: map(name), placed })
    };
    let nothing = |case: Case| case.with(|c| c.memory.collected = Some(Collected::default()));
    check! {
        "no output": read(Succeeded, Lines::Dropped) => "Finished Succeeded Completed";
        "no output, no key any more": read(Succeeded, Lines::Dropped).no_key() => "Finished Succeeded Completed";
        "no response": ended(Succeeded).with(|c| c.memory.collected = Some(collected(0, Lines::Dropped))) => "Finished Failed AllRequestsFailed";
        "after a restart": read(Succeeded, kept()).output("o") => "StoreResults";
        "reserved": read(Succeeded, kept()).output("o").reserved("o") => "StoreResults";
        "reserved, read before there was an output": read(Succeeded, Lines::Dropped).output("o").reserved("o") => "Collect";
        "read before there was an output": read(Succeeded, Lines::Dropped).output("o") => "ReserveOutput";
        "stored": stored(read(Succeeded, Lines::Dropped).output("o"), "o") => "Finished Succeeded Completed";
        "stored, then renamed": stored(read(Succeeded, Lines::Dropped).output("p"), "o") => "ReserveOutput";
        "renamed": read(Succeeded, kept()).output("p").reserved("o") => "ReleaseOutput";
        "renamed, and not read into memory": read(Succeeded, Lines::Dropped).output("p").reserved("o") => "ReleaseOutput";
        "what an expired batch had": read(Expired, kept()).output("o").reserved("o") => "StoreResults";
        "what a failed batch had": stored(read(Failed, Lines::Dropped).output("o"), "o") => "Finished Failed BatchFailed";
        "too large": read(Succeeded, large()).output("o").reserved("o") => "Wait OutputTooLarge!+results change";
        "too large, then a store": read(Succeeded, large()).store("s3://b/o").reserved("o") => "ReleaseOutput";
        "too large, released": read(Succeeded, large()).store("s3://b/o") => "ReserveOutput";
        "too large, read again for the store": read(Succeeded, large()).store("s3://b/o").in_store("s3://b/o") => "Collect";
        "for a store": read(Succeeded, kept()).store("s3://b/o").in_store("s3://b/o") => "StoreResults";
        "for another place in it": read(Succeeded, kept()).store("s3://b/p").in_store("s3://b/o") => "ReleaseOutput";
        "too large after a restart": read(Succeeded, large()).output("o") => "Wait OutputTooLarge!+results change";
        "too large, output removed": read(Succeeded, large()) => "Finished Succeeded Completed";
        "too large, output removed, still reserved": read(Succeeded, large()).reserved("o") => "ReleaseOutput";
        "not writable": read(Succeeded, Lines::Dropped).output("o").blocked(1, Some(30)) => "Wait OutputConflict!+results +30";
        "not writable, job edited": read(Succeeded, Lines::Dropped).output("p").blocked(0, Some(30)) => "ReserveOutput";
        "not writable, due": read(Succeeded, Lines::Dropped).output("o").blocked(1, Some(0)) => "ReserveOutput";
        "nothing to store: give the reservation back": nothing(ended(Succeeded)).output("o").reserved("o") => "ReleaseOutput";
        "nothing to store after a restart": nothing(ended(Succeeded)).output("o") => "ReleaseOutput";
        "given back": nothing(ended(Succeeded)).output("o").cleanup(|c| c.output_released = true) => "Finished Failed AllRequestsFailed";
        "lost: give the reservation back": ended(Succeeded).output("o").reserved("o").unreadable(KEY, -86_400, 2) => "ReleaseOutput";
    }
    let case = stored(read(Succeeded, Lines::Dropped).output("o").hint("m", None), "o");
    let Decision::Record(change) = case.decide() else { panic!() };
    let Change::Finished(end) = *change else { panic!() };
    assert_eq!(end.results.output.unwrap().config_map.as_deref(), Some("o"));
    assert_eq!(end.hint.as_deref(), Some(hint("m").as_str()), "the callback that led here was acted on");
}

// ----------------------------------------------------------------------------------- lifecycle

#[test]
fn whatever_is_not_at_gemini_is_held_by_a_suspension() {
    let quota = || refused_for(RefusedCall::Create, Reason::WaitingForQuota);
    let fenced = Search { fenced: true, listed_behind_fence: true, ..patient_search() };
    check! {
        "intended": sending(Stage::NotUploaded).suspended(false) => "Wait Suspended change";
        "uploaded": sending(uploaded()).suspended(false) => "Wait Suspended change";
        "found unsent": sending(Stage::Unsent).suspended(false) => "Wait Suspended change";
        "in trouble": sending(Stage::NotUploaded).trouble(3, Reason::GeminiUnavailable, 90).suspended(false) => "Wait Suspended change";
        "refused": quota().suspended(false) => "Wait Suspended change";
        "refused, due": quota().at(59).suspended(false) => "Wait Suspended change";
        "refused, in trouble": quota().trouble(3, Reason::GeminiUnavailable, 90).suspended(false) => "Wait Suspended change";
        "not intended, in trouble": held().trouble(3, Reason::GeminiUnavailable, 90).suspended(false) => "Wait Suspended change";
        "between two attempts, in trouble": over_once().trouble(3, Reason::GeminiUnavailable, 90).suspended(false) => "Wait Suspended change";
        "a refusal is recorded first": sending(refused_stage(Reason::WaitingForQuota, false)).suspended(false) => "Refused";
        "so is a batch": sending(Stage::Created(boxed(BatchState::Pending))).suspended(false) => "Submitted";
        "one that may exist is looked for": sending(unsure(None)).suspended(false) => "FindBatch";
        "and fenced": sending(Stage::Unsure(patient_search())).suspended(false) => "Fencing";
        "but not sent again": sending(Stage::Unsure(fenced.clone())).suspended(false) => "Wait Suspended change";
        "else it is": sending(Stage::Unsure(fenced)) => "Intent";
    }
    assert!(!needs_input(&held().suspended(false).job, &Memory::default()), "a held job's input is not read");
}

#[test]
fn what_runs_is_cancelled_only_if_asked_and_watched_to_its_end() {
    let cancelling = || running().cancellation(Reason::Suspended);
    let cancelled = || cancelling().cleanup(|c| c.cancelled = true);
    let watched = |next| {
        move |c: &mut Cleanup| {
            c.cancelled = true;
            c.watched = Some(Tries { since: at(-9), count: 2, next: at(next) });
        }
    };
    let failing =
        |next| move |c: &mut Cleanup| c.failed = Some(Tries { since: at(-1), count: 2, next: at(next) });
    check! {
        "drained": running().suspended(false) => "Wait Running change";
        "to be cancelled: recorded first": running().suspended(true) => "Cancelling";
        "recorded": cancelling().suspended(true) => "CancelBatch";
        "recorded, then resumed: it is cancelled all the same": cancelling() => "CancelBatch";
        "no key": cancelling().no_key() => "Wait CredentialsNotFound! recheck";
        "it does not get through": cancelling().cleanup(failing(5)) => "Wait Cancelling +5";
        "the key is refused": key_refused(cancelling().cleanup(failing(5)), KEY) => "Wait CredentialsRefused! +5";
        "the key was refused, and replaced": key_refused(cancelling().key("other").cleanup(failing(5)), KEY) => "CancelBatch";
        "the other one is refused as well": key_refused(cancelling().key("other").cleanup(failing(5)), "other") => "Wait CredentialsRefused! +5";
        "it does not get through for long": cancelling().cleanup(failing(90)) => "Wait Cancelling +90";
        "due": cancelling().cleanup(failing(0)) => "CancelBatch";
        "not with this key": cancelling().key("other").cleanup(failing(5)) => "Wait CredentialsChanged! +5";
        "not with this key, soon enough": cancelling().key("other").cleanup(failing(40)) => "Wait CredentialsChanged! +40";
        "not with this key, much later": cancelling().key("other").cleanup(failing(90)) => "Wait CredentialsChanged! recheck";
        "cancelled: looked at at once": cancelled() => "GetBatch";
        "still running": cancelling().cleanup(watched(5)) => "Wait Cancelling +5";
        "due again": cancelling().cleanup(watched(0)) => "GetBatch";
        "suspended in trouble": running().trouble(3, Reason::GeminiUnavailable, 90).suspended(true) => "Cancelling";
        "still running, another key": cancelling().key("other").remote(missing("other", 1, -1, 5)).cleanup(watched(5)) => "Wait CredentialsChanged! +5";
        "over": ended(BatchState::Cancelled).cancellation(Reason::Suspended) => "Collect";
        "over with nothing: the input goes": no_results(BatchState::Cancelled).cancellation(Reason::Suspended) => "DeleteInputFile";
        "then the attempt is over": no_results(BatchState::Cancelled).cancellation(Reason::Suspended).cleanup(|c| c.input_deleted = true) => "AttemptEnded";
        "or as soon as that is given up": no_results(BatchState::Cancelled).cancellation(Reason::Suspended).cleanup(|c| c.failed = Some(Tries { since: at(-1), count: 5, next: at(5) })) => "AttemptEnded";
        "cancelled by somebody else": no_results(BatchState::Cancelled) => "Finished Cancelled BatchCancelled";
        "cancelled for us, but gone": ended(BatchState::Cancelled).remote(missing(KEY, 3, -3600, 5)).cancellation(Reason::Suspended).unreadable(KEY, -5, 5) => "Finished Failed BatchNotFound";
        "whole all the same": partly(BatchState::Succeeded, 2, 0).cancellation(Reason::Suspended) => "Finished Succeeded Completed";
        "all answered before": partly(BatchState::Cancelled, 2, 0).cancellation(Reason::Suspended) => "Finished Succeeded Completed";
        "half of it": partly(BatchState::Succeeded, 1, 1).cancellation(Reason::Suspended).cleanup(|c| c.input_deleted = true) => "AttemptEnded";
    }
}

#[test]
fn a_deadline_ends_a_job_wherever_it_is() {
    let late = |case: Case| case.deadline(100).at(99);
    check! {
        "while it waits, it is woken by it": running().deadline(100) => "Wait Running +99";
        "not before": running().deadline(100).at(98) => "Wait Running +99";
        "running": late(running()) => "Cancelling";
        "refused": late(refused_for(RefusedCall::Create, Reason::WaitingForQuota)) => "Finished Failed DeadlineExceeded";
        "intended": late(sending(Stage::NotUploaded)) => "Finished Failed DeadlineExceeded";
        "uploaded": late(sending(uploaded())) => "Finished Failed DeadlineExceeded";
        "one that may exist is looked for": late(sending(unsure(None))) => "FindBatch";
        "and not looked for all the time": late(sending(unsure(Some(109)))) => "Wait SubmissionUnconfirmed! +109";
        "stalled": sending(uploaded()).deadline(20).no_key() => "Wait CredentialsNotFound! +19";
        "stalled, and looked at soon enough": sending(uploaded()).deadline(41).no_key() => "Wait CredentialsNotFound! recheck";
        "stalled, later": sending(uploaded()).deadline(100).no_key() => "Wait CredentialsNotFound! recheck";
        "cancelled": no_results(BatchState::Cancelled).cancellation(Reason::DeadlineExceeded) => "Finished Failed DeadlineExceeded";
        "never a further attempt": no_results(BatchState::Cancelled).cancellation(Reason::DeadlineExceeded).backoff(9) => "Finished Failed DeadlineExceeded";
        "half of it": partly(BatchState::Succeeded, 1, 1).cancellation(Reason::DeadlineExceeded) => "Finished Failed DeadlineExceeded";
        "whole all the same": partly(BatchState::Succeeded, 2, 0).cancellation(Reason::DeadlineExceeded) => "Finished Succeeded Completed";
        "ended before it was looked at: what there is counts": late(partly(BatchState::Succeeded, 2, 0)) => "Finished Succeeded Completed";
        "a deletion has a time of its own": running().deadline(100).deleted().cleanup(|c| c.failed = Some(Tries { since: at(-1), count: 2, next: at(200) })) => "Wait GeminiUnavailable +200";
        "and so has what is finished": finished().deadline(100).cleanup(|c| c.failed = Some(Tries { since: at(-1), count: 2, next: at(200) })) => "Wait - +200";
    }
}

#[test]
fn further_attempts_are_as_many_as_were_asked_for() {
    let clean = |case: Case| case.cleanup(|c| c.input_deleted = true);
    let over = |state, limit| clean(no_results(state).backoff(limit));
    check! {
        "none by default": over(BatchState::Failed, 0) => "Finished Failed BatchFailed";
        "failed": over(BatchState::Failed, 1) => "AttemptEnded";
        "expired": over(BatchState::Expired, 1) => "AttemptEnded";
        "cancelled by somebody": over(BatchState::Cancelled, 1) => "Finished Cancelled BatchCancelled";
        "no answer at all": clean(partly(BatchState::Succeeded, 0, 0).backoff(1)) => "Finished Failed AllRequestsFailed";
        "nothing is missing": clean(partly(BatchState::Expired, 2, 0).backoff(1)) => "Finished Succeeded Completed";
        "some are": clean(partly(BatchState::Expired, 1, 0).backoff(1)) => "AttemptEnded";
        "gone": clean(ended(BatchState::Failed).remote(missing(KEY, 3, -3600, 5)).unreadable(KEY, -5, 5).backoff(1)) => "Finished Failed BatchNotFound";
        "over": over_once() => "Intent";
        "over, and held": over_once().suspended(false) => "Wait Suspended change";
        "over, and its time as well": over_once().deadline(1) => "Finished Failed DeadlineExceeded";
        "over, not its turn": over_once().closed() => "Wait WaitingForSlot change";
        "over, no key": over_once().no_key() => "Wait CredentialsNotFound! recheck";
        "not if the limit was lowered meanwhile": over_once().backoff(0) => "Finished Failed BatchFailed";
        "nothing is missing after all": over_once().with(|c| c.input = Ok(InputFacts { sha256: "none".into(), whole_sha256: SHA.into(), count: 0, bytes: 9 })) => "Finished Failed AllRequestsFailed";
        "the input moved": over_once().other_input() => "Finished Failed InputChanged";
        "the part of the input is another one": over_once().differs() => "Finished Failed InputChanged";
        "the input can't be read": over_once().no_input() => "Wait InputInvalid! recheck";
        "what there was can't be read": over_once().with(|c| c.input = Err(Problem::new(Reason::GeminiUnavailable, "it fails"))) => "Wait GeminiUnavailable recheck";
        "as many as fit": over_once().attempt(|a| a.number = 10) => "Finished Failed AttemptsExhausted";
        "their file, nothing answered": over_once().gemini_file() => "Intent";
        "their file, some answered": over_once().gemini_file().attempt(|a| a.outcome.as_mut().unwrap().succeeded = 1) => "Finished Failed InputUnknown";
        "their file, all that was answered failed": over_once().gemini_file().attempt(|a| a.outcome.as_mut().unwrap().failed = 1) => "Finished Failed InputUnknown";
        "their file, there are results": over_once().gemini_file().attempt(|a| a.outcome.as_mut().unwrap().output_file = Some("files/out".to_owned())) => "Finished Failed InputUnknown";
        "our file, some answered": over_once().attempt(|a| a.outcome.as_mut().unwrap().succeeded = 1) => "Intent";
    }
    let next = over_once()
        .with(|c| {
            c.input = Ok(InputFacts { sha256: "rest".into(), whole_sha256: SHA.into(), count: 1, bytes: 9 });
        })
        .intent();
    assert_eq!((next.number, next.request_count, next.input_sha256.as_deref()), (2, Some(1), Some("rest")));
    assert_eq!(next.display_name, identity::display_name(CLUSTER, UID, 2, "fresh"));
    let at_hand = |case: Case| attempt_at_hand(&case.job);
    assert_eq!((at_hand(held()), at_hand(running()), at_hand(over_once())), (1, 1, 2));
    assert!(next.outcome.is_none() && next.cancellation.is_none() && next.batch_name.is_none());
    // A second failure counts the first.
    let twice = |limit| {
        let intent = Change::Intent(Box::new(over_once().intent()));
        let submitted = Change::Submitted { batch: boxed(BatchState::Running), adopted: false };
        let case = over_once().backoff(limit).recorded(&intent).recorded(&submitted);
        clean(case.remote(Remote::Seen(boxed(BatchState::Failed))).unreadable(KEY, -5, 5))
    };
    assert_eq!(
        (twice(1).says().as_str(), twice(2).says().as_str()),
        ("Finished Failed BatchFailed", "AttemptEnded")
    );
}

#[test]
fn failed_requests_are_sent_again_as_often_as_was_asked() {
    let after_suspension = || {
        let again = merged(retried(BatchState::Cancelled), 1);
        let case = again.with(|c| {
            let reason = Reason::Suspended.as_str().to_owned();
            c.job.status.as_mut().unwrap().attempts[1].cancellation =
                Some(Cancellation { reason, time: MicroTime(at(-1)) });
        });
        let Decision::Record(change) = case.decide() else { panic!("{}", case.says()) };
        case.recorded(&change).with(|c| c.memory = Memory::default())
    };
    let gone = |case: Case| case.remote(missing(KEY, 3, -3600, 5)).unreadable(KEY, -5, 5);
    let cut = |case: Case| {
        case.with(|c| {
            let reason = Reason::DeadlineExceeded.as_str().to_owned();
            c.job.status.as_mut().unwrap().attempts[1].cancellation =
                Some(Cancellation { reason, time: MicroTime(at(-1)) });
        })
    };
    check! {
        "none by default": one_failed(BatchState::Succeeded) => "Finished Succeeded CompletedWithFailures";
        "the first one is one": one_failed(BatchState::Succeeded).retry(1) => "Finished Succeeded CompletedWithFailures";
        "asked for": one_failed(BatchState::Succeeded).retry(2) => "AttemptEnded";
        "none of them is worth it": one_failed(BatchState::Succeeded).retry(2).with(|c| c.memory.collected.as_mut().unwrap().retryable_lines = 0) => "Finished Succeeded CompletedWithFailures";
        "all of them": merged(one_failed(BatchState::Succeeded), 0).retry(2) => "AttemptEnded";
        "one has no line at all": partly(BatchState::Succeeded, 1, 0).cleanup(|c| c.input_deleted = true).retry(2) => "AttemptEnded";
        "nothing failed": merged(one_failed(BatchState::Succeeded), 2).retry(2) => "Finished Succeeded Completed";
        "nobody knows the keys": one_failed(BatchState::Succeeded).retry(2).with(|c| c.memory.collected.as_mut().unwrap().joined = false) => "Finished Succeeded CompletedWithFailures";
        "what earlier attempts left is gone": one_failed(BatchState::Succeeded).retry(2).with(|c| c.memory.collected.as_mut().unwrap().without_earlier = true) => "Finished Succeeded CompletedWithFailures";
        "the input first": one_failed(BatchState::Succeeded).retry(2).cleanup(|c| c.input_deleted = false) => "DeleteInputFile";
        "a batch that expires is another matter": one_failed(BatchState::Expired).with(|c| c.memory.collected.as_mut().unwrap().missing_keys = 1).retry(9) => "Finished Failed BatchExpired";
        "and one that fails": one_failed(BatchState::Failed).with(|c| c.memory.collected.as_mut().unwrap().missing_keys = 1).retry(9) => "Finished Failed BatchFailed";
        "expired with all answered": one_failed(BatchState::Expired).retry(9) => "Finished Succeeded CompletedWithFailures";
        "the same, and it may be tried again": one_failed(BatchState::Expired).retry(9).backoff(1) => "AttemptEnded";
        "the same, for the batch only": one_failed(BatchState::Expired).backoff(1) => "Finished Succeeded CompletedWithFailures";
        "cancelled by somebody": merged(one_failed(BatchState::Cancelled), 0).retry(9) => "Finished Cancelled BatchCancelled";
        "whole though it was to be held": one_failed(BatchState::Succeeded).retry(2).cancellation(Reason::Suspended) => "AttemptEnded";
        "whole though it was late": one_failed(BatchState::Succeeded).retry(2).cancellation(Reason::DeadlineExceeded) => "Finished Succeeded CompletedWithFailures";
        "over": to_be_retried() => "Intent";
        "over, and held": to_be_retried().suspended(false) => "Wait Suspended change";
        "over, not its turn": to_be_retried().closed() => "Wait WaitingForSlot change";
        "over, and its time as well": to_be_retried().deadline(1) => "Finished Succeeded CompletedWithFailures";
        "over, and not wanted any more": to_be_retried().no_retry() => "Finished Succeeded CompletedWithFailures";
        "over, and lowered": to_be_retried().retry(1) => "Finished Succeeded CompletedWithFailures";
        "over, lowered, and that is too many": to_be_retried().retry(1).tolerates(0) => "Finished Failed TooManyFailedRequests";
        "over, and other codes are wanted": to_be_retried().with(|c| c.input.as_mut().unwrap().count = 0) => "Finished Succeeded CompletedWithFailures";
        "over, and the input moved": to_be_retried().other_input() => "Finished Succeeded CompletedWithFailures";
        "over, and the input is gone": to_be_retried().no_input() => "Wait InputInvalid! recheck";
        "over, and as many as fit": to_be_retried().attempt(|a| a.number = 10) => "Finished Succeeded CompletedWithFailures";
        "retried": merged(retried(BatchState::Succeeded), 2) => "Finished Succeeded Completed";
        "failed again": merged(retried(BatchState::Succeeded), 1) => "AttemptEnded";
        "failed again, for the last time": merged(retried(BatchState::Succeeded), 1).retry(2) => "Finished Succeeded CompletedWithFailures";
        "and that is too many": merged(retried(BatchState::Succeeded), 1).retry(2).tolerates(0) => "Finished Failed TooManyFailedRequests";
        "and that is not": merged(retried(BatchState::Succeeded), 1).retry(2).tolerates(1) => "Finished Succeeded CompletedWithFailures";
        "expired": merged(retried(BatchState::Expired), 1) => "Finished Succeeded CompletedWithFailures";
        "expired, and nothing to read": retried(BatchState::Expired).unreadable(KEY, -5, 5) => "Finished Succeeded CompletedWithFailures";
        "expired, and that is too many": retried(BatchState::Expired).unreadable(KEY, -5, 5).tolerates(0) => "Finished Failed TooManyFailedRequests";
        "expired, and that may be tried again": merged(retried(BatchState::Expired), 1).backoff(1) => "AttemptEnded";
        "cancelled by somebody, retried": merged(retried(BatchState::Cancelled), 1) => "Finished Succeeded CompletedWithFailures";
        "gone": gone(retried(BatchState::Failed)) => "Finished Succeeded CompletedWithFailures";
        "cut off": cut(merged(retried(BatchState::Cancelled), 1)) => "Finished Succeeded CompletedWithFailures";
        "cut off with half of it": cut(merged(retried(BatchState::Succeeded), 1)).with(|c| c.memory.collected.as_mut().unwrap().unanswered_lines = 1) => "Finished Succeeded CompletedWithFailures";
        "held in the midst": after_suspension() => "Intent";
        "held in the midst of the last one": after_suspension().retry(2) => "Intent";
    }
    // A suspension is no try: what it broke off is still the second of two.
    let third = after_suspension().retry(2).intent();
    assert_eq!(third.number, 3);
    let second = to_be_retried().intent();
    assert_eq!(
        (second.number, second.request_count, second.input_sha256.as_deref()),
        (2, Some(1), Some("rest"))
    );
    // What waits to be sent again is not counted as failed, and its error is not the end of it.
    let status = to_be_retried().job.status.unwrap();
    let requests = status.requests.unwrap();
    assert_eq!((requests.total, requests.succeeded, requests.failed, requests.pending), (2, 1, 0, 1));
    let outcome = status.attempts[0].outcome.clone().unwrap();
    assert_eq!((outcome.reason.as_str(), outcome.succeeded, outcome.failed), ("RequestsFailed", 1, 0));
    // Refused for good: the first attempt's results count all the same.
    let change = Change::Intent(Box::new(to_be_retried().intent()));
    let refused = to_be_retried().recorded(&change).stage(refused_stage(Reason::ModelNotFound, true));
    assert_eq!(refused.says(), "Finished Succeeded CompletedWithFailures");
    let Decision::Record(change) = refused.decide() else { panic!("{}", refused.says()) };
    let status = refused.recorded(&change).job.status.unwrap();
    let requests = status.requests.unwrap();
    assert_eq!((requests.total, requests.succeeded, requests.failed, requests.pending), (2, 1, 1, 0));
    assert!(status.attempts[1].refusal.is_some());
}

#[test]
fn somebody_elses_batch_is_taken_over_once_it_is_seen() {
    let seen = || {
        held().imports().remote(Remote::Seen(Box::new(Batch {
            name: BatchName::parse("b0").unwrap(),
            ..batch(BatchState::Running)
        })))
    };
    check! {
        "looked for": held().imports() => "GetBatch";
        "the output first": held().imports().output("o") => "ReserveOutput";
        "no key": held().imports().no_key() => "Wait CredentialsNotFound! recheck";
        "it is no submission": held().imports().closed() => "GetBatch";
        "held": held().imports().suspended(false) => "Wait Suspended change";
        "not shown": held().imports().remote(missing(KEY, 1, -1, 5)) => "Wait BatchNotFound! recheck";
        "not shown, due": held().imports().remote(missing(KEY, 1, -1, 0)) => "GetBatch";
        "not shown to another key": held().imports().remote(missing("other", 1, -1, 5)) => "GetBatch";
        "another one is not shown": held().imports().remote(missing(KEY, 1, -1, 5)).with(|c| c.memory.remote_name = BatchName::parse("b9").ok()) => "GetBatch";
        "another one is shown": held().imports().remote(Remote::Seen(boxed(BatchState::Running))) => "GetBatch";
        "shown": seen() => "Imported";
        "shown to another key": seen().key("other") => "GetBatch";
        "deleted: it is left alone": running().imports().deleted() => "DropFinalizer Deleted";
        "unless asked": running().imports().policy(DeletionPolicy::Cancel).deleted() => "CancelBatch";
    }
}

#[test]
fn what_deletion_does_with_the_batch_is_the_users_choice() {
    let delete = |case: Case| case.policy(DeletionPolicy::Delete).deleted();
    let orphan = |case: Case| case.policy(DeletionPolicy::Orphan).deleted();
    let clean = |case: Case| {
        case.cleanup(|c| {
            c.input_deleted = true;
            c.cancelled = true;
        })
    };
    let deleted = |case: Case| clean(case).cleanup(|c| c.batches_deleted = vec!["batches/b1".to_owned()]);
    let failing = |case: Case| {
        clean(case).cleanup(|c| c.failed = Some(Tries { since: at(-1), count: 2, next: at(900) }))
    };
    check! {
        "orphan, running": orphan(running()) => "DropFinalizer Deleted";
        "orphan, without a key": orphan(running()).no_key() => "DropFinalizer Deleted";
        "orphan, reserved": orphan(running().output("o")) => "ReleaseOutput";
        "orphan, never sent": orphan(sending(uploaded())) => "DropFinalizer";
        "orphan, unknown": orphan(sending(unsure(None))) => "DropFinalizer Deleted";
        "orphan, refused": orphan(refused_for(RefusedCall::Create, Reason::WaitingForQuota)) => "DropFinalizer";
        "orphan, between two attempts": orphan(over_once()) => "DropFinalizer";
        "delete: cancelled first": delete(running()) => "CancelBatch";
        "delete: the input": delete(running()).cleanup(|c| c.cancelled = true) => "DeleteInputFile";
        "delete: then the batch": clean(delete(running())) => "DeleteBatch";
        "delete: all gone": deleted(delete(running())) => "DropFinalizer Cancelled";
        "delete, it does not work, over": failing(delete(running())).at(299) => "DropFinalizer Deleted";
        "delete, never sent": delete(sending(uploaded())).cleanup(|c| c.input_deleted = true) => "DropFinalizer";
        "finished": clean(finished().policy(DeletionPolicy::Delete)) => "Wait - change";
        "finished, deleted": clean(delete(finished())) => "DeleteBatch";
        "finished, deleted, gone": deleted(delete(finished())) => "DropFinalizer";
        "finished, deleted, no key": clean(delete(finished())).no_key() => "DropFinalizer Deleted";
        "finished, deleted, it does not work": failing(delete(finished())) => "Wait - +299";
        "finished, deleted, it does not work, due": failing(delete(finished())).cleanup(|c| c.failed.as_mut().unwrap().next = at(0)) => "DeleteBatch";
        "finished, deleted, it does not work, over": failing(delete(finished())).at(299) => "DropFinalizer Deleted";
        "finished, asked for later": finished().with(|c| c.job.metadata.finalizers = None).policy(DeletionPolicy::Delete) => "AddFinalizer";
        "between two attempts": over_once().deleted() => "DropFinalizer";
        "between two attempts, delete": delete(over_once()) => "DeleteBatch";
        "no longer than the job says": running().deleted().no_key().with(|c| c.job.spec.deletion_timeout_seconds = 10).at(9) => "DropFinalizer Orphaned";
    }
}

#[test]
fn a_callback_that_contradicts_the_end_is_looked_into_once_and_said() {
    let told = |attempt| {
        finished().hint("late", None).with(|c| {
            let callback = c.job.status.as_mut().unwrap().callback.as_mut().unwrap();
            callback.attempt = attempt;
            callback.type_ = "batch.failed".to_owned();
        })
    };
    let pauses = Timings::default().hint_pauses;
    let asked = |id: &str, state| {
        told(1).remote(Remote::Seen(boxed(state))).looks(|l| l.looked(Some(&hint(id)), at(-1), &pauses))
    };
    check! {
        "of this attempt": told(1) => "GetBatch";
        "of another one, which is over": told(2) => "DeleteInputFile";
        "that says the same": told(1).attempt(|a| a.remote_state = Some("FAILED".to_owned())) => "DeleteInputFile";
        "not more often than other callbacks": told(1).looks(|l| (0..4).for_each(|i| l.looked(None, at(i - 4), &pauses))) => "Wait - +56";
        "without a key": told(1).no_key() => "Contradicted";
        "asked": asked("late", BatchState::Failed) => "Contradicted";
        "asked about an earlier one": asked("earlier", BatchState::Failed) => "GetBatch";
    }
    let said = |case: Case| {
        let Decision::Record(change) = case.decide() else { panic!("{}", case.says()) };
        let Change::Contradicted { hint: observed, problem } = *change else { panic!("{change:?}") };
        assert_eq!(observed, hint("late"));
        problem.message
    };
    let seen = |state| told(1).remote(Remote::Seen(boxed(state)));
    assert!(said(asked("late", BatchState::Failed)).contains("Gemini says FAILED now"));
    assert!(said(seen(BatchState::Failed).no_key()).contains("could not be asked"), "that was before");
}

#[test]
fn what_is_told_to_the_metrics() {
    let waits = |case: Case| hint_waits(&case.job);
    assert!(waits(running().hint("m", None)));
    assert!(!waits(running()), "no callback");
    assert!(!waits(running().hint("m", None).attempt(|a| a.observed_hint = Some(hint("m")))), "acted on");
    assert!(!waits(finished().hint("m", None)), "finished");

    let unconfirmed = |case: Case| is_unconfirmed(&case.job);
    let said = |case: Case| {
        let Decision::Wait { say: Some(say), .. } = case.decide() else { panic!("{}", case.says()) };
        case.recorded(&say)
    };
    let searched = || said(sending(unsure(Some(10))));
    assert!(unconfirmed(searched()));
    assert!(!unconfirmed(running()), "known");
    assert!(!unconfirmed(said(intended().no_key())), "stalled for another reason");
    let found = Change::Submitted { batch: boxed(BatchState::Running), adopted: true };
    assert!(!unconfirmed(searched().recorded(&found)), "found");
    assert!(!unconfirmed(finished()), "finished");
}

#[test]
fn a_finished_job_deletes_itself_when_it_is_told_to() {
    let brief = |ttl| {
        let free = finished().with(|c| {
            c.job.metadata.finalizers = None;
            c.job.status.as_mut().unwrap().output.as_mut().unwrap().config_map = Some("o".to_owned());
        });
        free.with(|c| c.job.spec.ttl_seconds_after_finished = Some(ttl))
    };
    let unread = |case: Case| {
        case.with(|c| {
            c.job.status.as_mut().unwrap().output =
                serde_json::from_value(json!({"fileName": "files/batch-b1"})).unwrap();
        })
    };
    check! {
        "not yet": brief(10) => "Wait - +9";
        "now": brief(10).at(9) => "DeleteJob";
        "at once": brief(0) => "DeleteJob";
        "not while its results are nowhere else": unread(brief(0)) => "Wait - change";
        "its results are in both places": unread(brief(0)).with(|c| c.job.status.as_mut().unwrap().output.as_mut().unwrap().config_map = Some("o".to_owned())) => "DeleteJob";
        "done": brief(0).cleanup(|c| c.job_deleted = true) => "Done";
        "done, and its batch goes with it": brief(0).policy(DeletionPolicy::Delete).cleanup(|c| c.job_deleted = true) => "Done";
        "what is left comes first": finished().with(|c| c.job.spec.ttl_seconds_after_finished = Some(0)) => "DeleteInputFile";
    }
}

// --------------------------------------------------------------------------------- afterwards

#[test]
fn after_the_end() {
    let failing =
        |count, next| finished().cleanup(|c| c.failed = Some(Tries { since: at(-9), count, next: at(next) }));
    let clean = || finished().cleanup(|c| c.input_deleted = true);
    let filled = |case: Case| {
        case.with(|c| {
            c.job.status.as_mut().unwrap().output.as_mut().unwrap().config_map = Some("o".to_owned());
        })
    };
    check! {
        "the input file goes": finished() => "DeleteInputFile";
        "not if it is theirs": finished().gemini_file() => "DropFinalizer";
        "not without a key": finished().no_key() => "DropFinalizer";
        "it does not work": failing(1, 5) => "Wait - +5";
        "it does not work, due": failing(1, 0) => "DeleteInputFile";
        "it never works": failing(5, 5) => "DropFinalizer";
        "gone": clean() => "DropFinalizer";
        "an unfilled reservation goes": clean().output("o") => "ReleaseOutput";
        "once": clean().output("o").cleanup(|c| c.output_released = true) => "DropFinalizer";
        "a filled one stays": filled(clean().output("o")) => "DropFinalizer";
        "edited": finished().edited() => "Refresh";
        "let go": clean().with(|c| c.job.metadata.finalizers = None) => "Done";
        "let go, edited": clean().edited().with(|c| c.job.metadata.finalizers = None) => "Refresh";
    }
    let refreshed = finished().edited();
    let status =
        compose(refreshed.job.status.as_ref().unwrap(), &refreshed.job.spec, 2, &Change::Refresh, at(0));
    assert!(status.conditions.iter().all(|c| c.observed_generation == Some(2)));
    assert_eq!(refreshed.with(|c| c.job.status = Some(status)).says(), "DeleteInputFile");
}

// ----------------------------------------------------------------------------------- deletion

#[test]
fn deletion_at_every_stage() {
    let gone = |case: Case| case.cleanup(|c| c.input_deleted = true);
    let cancelled = |case: Case| case.cleanup(|c| c.cancelled = true);
    let listed = |case: Case, n| case.cleanup(|c| c.listings = n);
    let found = BatchName::parse("b9").unwrap();
    check! {
        "without finalizer": applied().deleted() => "Done";
        "nothing sent": held().deleted() => "DropFinalizer";
        "nothing sent, no key": held().deleted().no_key() => "DropFinalizer";
        "reserved": held().output("o").deleted() => "ReleaseOutput";
        "released": held().output("o").deleted().cleanup(|c| c.output_released = true) => "DropFinalizer";
        "intended": sending(Stage::NotUploaded).deleted() => "DeleteInputFile";
        "uploaded": sending(uploaded()).deleted() => "DeleteInputFile";
        "uploaded, deleted": gone(sending(uploaded()).deleted()) => "DropFinalizer";
        "created, not recorded": sending(Stage::Created(boxed(BatchState::Pending))).deleted() => "CancelBatch";
        "found, not recorded": sending(Stage::Found(boxed(BatchState::Pending))).deleted() => "CancelBatch";
        "refused, not recorded": sending(refused_stage(Reason::WaitingForQuota, false)).deleted() => "DeleteInputFile";
        "refused": refused_for(RefusedCall::Create, Reason::WaitingForQuota).deleted() => "DeleteInputFile";
        "refused, deleted": gone(refused_for(RefusedCall::Create, Reason::WaitingForQuota).deleted()) => "DropFinalizer";
        "running": running().deleted() => "CancelBatch";
        "seen running": running().remote(Remote::Seen(boxed(BatchState::Running))).deleted() => "CancelBatch";
        "running, cancelled": cancelled(running().deleted()) => "DeleteInputFile";
        "all gone": gone(cancelled(running().deleted())) => "DropFinalizer Cancelled";
        "all gone, reserved": gone(cancelled(running().deleted())).output("o") => "ReleaseOutput";
        "their file stays": cancelled(running().gemini_file().deleted()) => "DropFinalizer Cancelled";
        "ended, not read: nothing to cancel": ended(BatchState::Succeeded).deleted() => "DeleteInputFile";
        "ended, file gone": gone(ended(BatchState::Succeeded).deleted()) => "DropFinalizer Deleted";
        "unknown: look for it": sending(unsure(Some(10))).deleted() => "FindToCancel";
        "after a restart": intended().deleted() => "FindToCancel";
        "found": listed(sending(unsure(None)).deleted(), 1).cleanup(|c| c.to_cancel = vec![found]) => "CancelBatch";
        "not found: fence": listed(sending(unsure(None)).deleted(), 1) => "DeleteInputFile";
        "fenced: look once more": gone(listed(sending(unsure(None)).deleted(), 1)) => "FindToCancel";
        "nothing goes on": gone(listed(sending(unsure(None)).deleted(), 2)) => "DropFinalizer Deleted";
        "their file can't be a fence": listed(sending(unsure(None)).gemini_file().deleted(), 1) => "FindToCancel";
        "finished": finished().deleted() => "DeleteInputFile";
        "finished, deletion changed the generation": gone(finished().deleted()).edited() => "DropFinalizer";
        "finished, no key: no status is written": finished().deleted().no_key() => "DropFinalizer";
        "finished, other key": finished().deleted().key("other").cleanup(|c| { c.failed = Some(Tries { since: at(-1), count: 1, next: at(5) }); }) => "Wait - +5";
        "finished, refused for good, still reserved": finished().output("o").deleted() => "ReleaseOutput";
    }
}

#[test]
fn a_deletion_is_bounded_in_time() {
    let failing = |case: Case, next| {
        case.cleanup(|c| c.failed = Some(Tries { since: at(-1), count: 2, next: at(next) }))
    };
    let gave_up = |case: Case| {
        case.cleanup(|c| {
            c.cancelled = true;
            c.failed = Some(Tries { since: at(-1), count: 5, next: at(9) });
        })
    };
    let keyless = || running().deleted().no_key();
    check! {
        "no key": keyless() => "AskNamespace";
        "no key, it can be put back": keyless().namespace(false, 20) => "Wait CredentialsNotFound! recheck";
        "no key, the namespace may go as well": keyless().namespace(false, 0) => "AskNamespace";
        "no key, nor will there be one": keyless().namespace(true, 20) => "DropFinalizer Orphaned";
        "no key for what may be there": intended().deleted().no_key().namespace(true, 20) => "DropFinalizer Orphaned";
        "no key, but nothing that is paid for": sending(uploaded()).deleted().no_key().namespace(true, 20) => "DropFinalizer";
        "no key, but over": ended(BatchState::Succeeded).deleted().no_key().namespace(true, 20) => "DropFinalizer Deleted";
        "a key that was kept": running().deleted().namespace(true, 20) => "CancelBatch";
        "no key, near the end": keyless().namespace(false, 290).at(270) => "Wait CredentialsNotFound! +299";
        "no key, over": keyless().at(299) => "DropFinalizer Orphaned";
        "other key: it may do": running().deleted().key("other") => "CancelBatch";
        "other key: it does not": failing(running().deleted().key("other"), 4) => "Wait CredentialsChanged! +4";
        "the key is refused": key_refused(failing(running().deleted(), 4), KEY) => "Wait CredentialsRefused! +4";
        "the key is refused for the first time": key_refused(failing(running().deleted(), 4), KEY).cleanup(|c| c.failed.as_mut().unwrap().count = 1) => "Wait CredentialsRefused! +4";
        "the key was refused, and replaced": key_refused(failing(running().deleted().key("other"), 4), KEY) => "CancelBatch";
        "the other one is refused as well": key_refused(failing(running().deleted().key("other"), 4), "other") => "Wait CredentialsRefused! +4";
        "failing": failing(running().deleted(), 4) => "Wait GeminiUnavailable +4";
        "failing for the first time": failing(running().deleted(), 4).cleanup(|c| c.failed.as_mut().unwrap().count = 1) => "Wait - +4";
        "failing, due": failing(running().deleted(), 0) => "CancelBatch";
        "failing, not beyond the end": failing(running().deleted().at(290), 900) => "Wait GeminiUnavailable +299";
        "failing, over": failing(running().deleted().at(299), 900) => "DropFinalizer Orphaned";
        "cancelled, but the file can't be deleted: it expires": gave_up(running().deleted()) => "DropFinalizer Cancelled";
        "cancelled, over: the file that is left is no orphan": failing(running().deleted().at(299), 900).cleanup(|c| c.cancelled = true) => "DropFinalizer Cancelled";
        "never sent, over": failing(sending(uploaded()).deleted().at(299), 900) => "DropFinalizer";
        "without the fence it waits": failing(sending(unsure(None)).deleted().cleanup(|c| c.listings = 1), 4) => "Wait GeminiUnavailable +4";
        "without the fence, over": failing(sending(unsure(None)).deleted().cleanup(|c| c.listings = 1).at(299), 900) => "DropFinalizer Orphaned";
        "slept through: tried once all the same": running().deleted().at(9000) => "CancelBatch";
        "slept through, unknown": intended().deleted().at(9000) => "FindToCancel";
        "slept through, no key": intended().deleted().at(9000).no_key() => "DropFinalizer Orphaned";
    }
}

// ------------------------------------------------------------------------------ what is needed

#[test]
fn input_is_read_only_where_it_counts() {
    let needed = |case: Case| needs_input(&case.job, &case.memory);
    assert!(needed(held()), "not sent");
    assert!(!needed(held().gemini_file()), "their file");
    assert!(needed(sending(Stage::NotUploaded)), "intended");
    assert!(needed(sending(uploaded())), "uploaded: the key may change");
    assert!(needed(refused_for(RefusedCall::Create, Reason::WaitingForQuota)), "refused");
    assert!(!needed(sending(unsure(None))), "unknown");
    assert!(!needed(intended()), "after a restart");
    assert!(!needed(running()), "running");
    assert!(!needed(finished()), "finished");
    assert!(!needed(held().deleted()), "deleted");
    let late = refused_for(RefusedCall::Create, Reason::WaitingForQuota).deadline(100).at(99);
    let Decision::Record(end) = late.decide() else { panic!("{}", late.says()) };
    assert!(!needed(late.recorded(&end)), "finished while it waited for its next send");
    let free = |case: Case| case.with(|c| c.job.metadata.finalizers = None);
    let key_needed = |case: Case| needs_credential(&case.job);
    assert!(key_needed(applied()) && key_needed(running()), "unfinished");
    assert!(key_needed(finished()), "finished: there is something to delete");
    assert!(!key_needed(free(finished())), "let go");
    let told = finished().hint("late", None).with(|c| {
        c.job.status.as_mut().unwrap().callback.as_mut().unwrap().type_ = "batch.failed".to_owned();
    });
    assert!(key_needed(free(told)), "let go, but a callback says otherwise");
}

/// A driver that forgot to read the input is told to come again, not that something is wrong.
#[test]
fn an_input_that_was_not_read_is_no_problem() {
    for case in [held(), sending(Stage::NotUploaded)] {
        let observed = Observed {
            job: &case.job,
            credential: case.credential.clone(),
            input: None,
            memory: &case.memory,
            gate: &case.gate,
            cluster: CLUSTER,
            fresh_send_id: "fresh",
            webhook_refused: false,
            timings: &Timings { recheck: SignedDuration::from_secs(1), ..Timings::default() },
        };
        assert_eq!(show(&decide(&observed, at(0))), "Wait - +0");
    }
}
