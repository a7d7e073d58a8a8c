//! Every transition, in the order of a job's life. A row is a situation and what is decided in it; see
//! [`show`] for how a decision is written down.

mod property;

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

use super::*;
use crate::api::{Callback, RefusedCall};
use crate::controller::memory::{Looks, Probe, Send, Tries};
use crate::controller::report::compose;

const CLUSTER: &str = "cluster";
const UID: &str = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";
/// The key that the first intent is recorded with.
const KEY: &str = "key";
const SHA: &str = "sha";

/// So many seconds after the moment that the tests play in.
fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

/// A situation.
#[derive(Clone)]
struct Case {
    job: GeminiBatchJob,
    memory: Memory,
    credential: Result<String, Problem>,
    input: Result<InputFacts, Problem>,
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
        input: Ok(InputFacts { sha256: SHA.to_owned(), count: 2 }),
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
        current_attempt(&running().job).unwrap(),
        Some(&batch(BatchState::Succeeded)),
        Some(&collected(2, Lines::Dropped)),
        None,
        None,
    );
    running().recorded(&Change::Finished(Box::new(end)))
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
            c.job.status = Some(compose(&status, 1, change, at(-1)));
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
        self.with(|c| c.memory.remote = Some(remote))
    }

    fn key(self, fingerprint: &str) -> Self {
        self.with(|c| c.credential = Ok(fingerprint.to_owned()))
    }

    fn no_key(self) -> Self {
        self.with(|c| c.credential = Err(Problem::new(Reason::CredentialsNotFound, "create it")))
    }

    fn no_input(self) -> Self {
        self.with(|c| c.input = Err(Problem::new(Reason::InputInvalid, "line 7")))
    }

    fn other_input(self) -> Self {
        self.with(|c| c.input = Ok(InputFacts { sha256: "other".to_owned(), count: 3 }))
    }

    /// Results shall go to this ConfigMap.
    fn output(self, name: &str) -> Self {
        let output = json!({"configMap": {"name": name}});
        self.with(|c| c.job.spec.output = serde_json::from_value(output).unwrap())
    }

    fn object(self, object: OutputObject) -> Self {
        self.with(|c| c.memory.output = object)
    }

    fn reserved(self, name: &str) -> Self {
        self.object(OutputObject::Reserved { name: name.to_owned() })
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

    /// A callback came, and names this batch.
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
                cluster: CLUSTER,
                fresh_send_id: "fresh",
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
    Lines::Kept(Box::default())
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
        "output taken for ever": held().output("o").blocked(1, None) => "Wait OutputConflict! change";
        "output renamed": held().output("p").reserved("o") => "ReleaseOutput";
        "renamed, released": held().output("p").object(OutputObject::Unknown) => "ReserveOutput";
        "output removed": held().reserved("o") => "Intent";
        "somebody else's file needs no input": held().gemini_file().no_input() => "Intent";
        "somebody else's file, no key": held().gemini_file().no_key() => "Wait CredentialsNotFound! recheck";
    }
    assert!(matches!(held().output("p").reserved("o").decide(),
        Decision::Act(Action::ReleaseOutput { name }) if name == "o"));
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

#[test]
fn refusals() {
    use RefusedCall::{Create, Upload};
    let recorded = |reason| sending(refused_stage(reason, false));
    let quota = || refused_for(Create, Reason::WaitingForQuota);
    let credentials = || refused_for(Create, Reason::CredentialsRefused);
    let probed = |fingerprint: &str, accepted, next| {
        let fingerprint = fingerprint.to_owned();
        credentials().with(|c| c.memory.probe = Some(Probe { fingerprint, accepted, next: at(next) }))
    };
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

#[test]
fn the_file_of_a_refused_send_serves_the_next_one_if_it_is_the_same() {
    use RefusedCall::{Create, Upload};
    let quota =
        || refused_for(Create, Reason::WaitingForQuota).attempt(|a| a.input_file = "files/old".to_owned());
    let reuses = |case: Case| case.intent().input_file == "files/old";
    assert!(reuses(quota().at(59)));
    assert!(reuses(
        refused_for(Create, Reason::PreconditionFailed)
            .attempt(|a| a.input_file = "files/old".to_owned())
            .at(59)
    ));
    for (what, case) in [
        ("another key", quota().key("other")),
        ("another input", quota().other_input().at(59)),
        ("too old", quota().at(40 * 3600)),
        (
            "never uploaded",
            quota().attempt(|a| a.refusal = Some(refusal(Upload, Reason::WaitingForQuota))).at(59),
        ),
        ("gone", quota().attempt(|a| a.refusal = Some(refusal(Create, Reason::InputFileNotFound))).at(59)),
        (
            "with a refused key",
            quota().attempt(|a| a.refusal = Some(refusal(Create, Reason::CredentialsRefused))).key("other"),
        ),
    ] {
        assert!(!reuses(case), "{what}");
    }
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
    let refuted = |id: &str| {
        let refuted = Some(BatchName::parse(id).unwrap());
        sending(Stage::Unsure(Search { listings: 1, next: Some(at(10)), refuted, ..Search::default() }))
    };
    check! {
        "at once": sending(Stage::Unsure(Search::default())) => "FindBatch";
        "later": searched() => "Wait SubmissionUnconfirmed! +10";
        "due": searched().at(10) => "FindBatch";
        "after a month": searched().at(30 * 86_400) => "FindBatch";
        "the grace is not over": patient(3, -599) => "Wait SubmissionUnconfirmed! +1";
        "only two listings": patient(2, -9000) => "Wait SubmissionUnconfirmed! +10";
        "patient enough: the fence": patient(3, -600) => "Fence";
        "but under another key nothing is proved": patient(3, -600).key("other") => "Wait CredentialsChanged! +10";
        "and a callback comes first": patient(3, -600).hint("m", Some("b7")) => "ConfirmHinted";
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
        "other key, much later": sending(unsure(Some(600))).key("other") => "Wait CredentialsChanged! recheck";
        "a callback names it": searched().hint("m", Some("b7")) => "ConfirmHinted";
        "a callback names another one": refuted("b7").hint("m", Some("b7")) => "Wait SubmissionUnconfirmed! +10";
        "and then this one": refuted("b7").hint("m", Some("b8")) => "ConfirmHinted";
        "a callback names none": searched().hint("m", None) => "Wait SubmissionUnconfirmed! +10";
        "a callback names nonsense": searched().hint("m", Some("../x")) => "Wait SubmissionUnconfirmed! +10";
        "their file": searched().gemini_file() => "Wait SubmissionUnconfirmed! +10";
    }
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
        "a day later files may have gone": intended().at(86_400) => "FindBatch";
        "somebody else's file": intended().gemini_file() => "FindBatch";
        "the file of an earlier send, which may have expired": renamed("files/gbo-0-1-earlier") => "FindBatch";
        "a name that Gemini gave: it was complete": renamed("files/abc") => "FindBatch";
        "no key": intended().no_key() => "Wait CredentialsNotFound! recheck";
        "other key: the file proves nothing": intended().key("other") => "FindBatch";
        "other key, a callback": intended().key("other").hint("m", Some("b1")) => "ConfirmHinted";
        "other key, searched": unasked("other", 0) => "Wait CredentialsChanged! +10";
        "the key is back": unasked(KEY, 0) => "FindInputFile";
        "the key is back too late": unasked(KEY, 86_400) => "FindBatch";
        "refused": refused_for(RefusedCall::Create, Reason::WaitingForQuota) => "Wait WaitingForQuota +59";
        "running": running() => "Wait Running change";
        "finished": finished() => "DeleteInputFile";
    }
}

// ------------------------------------------------------------------------------ while it runs

#[test]
fn while_it_runs() {
    let seen = || running().remote(Remote::Seen(boxed(BatchState::Running)));
    let spent = |case: Case, hint: &str| {
        case.looks(|l| (0..4).for_each(|i| l.looked(Some(hint), at(i - 4), &Timings::default().hint_pauses)))
    };
    let following = |next| {
        seen().hint("m", None).looks(|l| {
            l.following = Some(("m".to_owned(), 1));
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
        "a callback that was acted on": running().hint("m", None).attempt(|a| a.observed_hint = Some("m".to_owned())) => "Wait Running change";
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
        "a refused key": running().trouble(2, Reason::CredentialsRefused, 5) => "Wait CredentialsRefused! +5";
        "over": running().trouble(9, Reason::GeminiUnavailable, 0) => "Wait Running change";
        "while sending": sending(uploaded()).trouble(2, Reason::GeminiUnavailable, 5) => "Wait GeminiUnavailable +5";
        "the finalizer comes first": applied().trouble(2, Reason::GeminiUnavailable, 5) => "AddFinalizer";
        "a finished job has none": finished().trouble(2, Reason::GeminiUnavailable, 5) => "DeleteInputFile";
        "a deletion does not wait for it": running().deleted().trouble(2, Reason::GeminiUnavailable, 5) => "CancelBatch";
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
    let counted = |case: Case| {
        case.with(|c| {
            if let Some(Remote::Seen(b)) = &mut c.memory.remote {
                b.stats = Some(crate::gemini::Stats { total: 2, succeeded: 1, failed: 0, pending: 1 });
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
        "expired, but Gemini counted successes": counted(ended(Expired)).unreadable(KEY, -599, 2) => "Wait ResultsNotReadable +2";
        "expired, the counted successes do not come": counted(ended(Expired)).unreadable(KEY, -600, 2) => "Finished Failed BatchExpired";
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
    let stored = |case: Case, name: &str| case.object(OutputObject::Stored { name: name.to_owned() });
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
        "what an expired batch had": read(Expired, kept()).output("o").reserved("o") => "StoreResults";
        "what a failed batch had": stored(read(Failed, Lines::Dropped).output("o"), "o") => "Finished Failed BatchFailed";
        "too large": read(Succeeded, large()).output("o").reserved("o") => "Wait OutputTooLarge!+results change";
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
    assert_eq!(end.hint.as_deref(), Some("m"), "the callback that led here was acted on");
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
        "edited": finished().with(|c| c.job.metadata.generation = Some(2)) => "Refresh";
        "let go": clean().with(|c| c.job.metadata.finalizers = None) => "Done";
        "let go, edited": clean().with(|c| { c.job.metadata.finalizers = None; c.job.metadata.generation = Some(2); }) => "Refresh";
    }
    let refreshed = finished().with(|c| c.job.metadata.generation = Some(2));
    let status = compose(refreshed.job.status.as_ref().unwrap(), 2, &Change::Refresh, at(0));
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
        "finished, deletion changed the generation": gone(finished().deleted()).with(|c| c.job.metadata.generation = Some(2)) => "DropFinalizer";
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
    check! {
        "no key": running().deleted().no_key() => "Wait CredentialsNotFound! recheck";
        "no key, near the end": running().deleted().no_key().at(270) => "Wait CredentialsNotFound! +299";
        "no key, over": running().deleted().no_key().at(299) => "DropFinalizer Orphaned";
        "other key: it may do": running().deleted().key("other") => "CancelBatch";
        "other key: it does not": failing(running().deleted().key("other"), 4) => "Wait CredentialsChanged! +4";
        "failing": failing(running().deleted(), 4) => "Wait GeminiUnavailable +4";
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
    assert!(needs_credential(&running().job) && needs_credential(&finished().job));
    assert!(!needs_credential(&finished().with(|c| c.job.metadata.finalizers = None).job));
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
            cluster: CLUSTER,
            fresh_send_id: "fresh",
            timings: &Timings { recheck: SignedDuration::from_secs(1), ..Timings::default() },
        };
        assert_eq!(show(&decide(&observed, at(0))), "Wait - +0");
    }
}
