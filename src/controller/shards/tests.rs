//! What a parent decides, in a world of children that go their own ways.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt as _;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::Action as Step;
use super::plan::{Limits, of_content};
use super::*;
use crate::api::conditions::{FINISHED, READY, STALLED};
use crate::api::{DeletionPolicy, FINALIZER, Reason, RequestCounts};
use crate::controller::decide::{Action, Change, Decision, Gate, Observed, Wake, decide};
use crate::controller::destination::{Destination, Placed};
use crate::controller::memory::{Memory, OutputObject};
use crate::controller::report::compose;
use crate::controller::{InputFacts, Timings};

const UID: &str = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

#[expect(clippy::needless_pass_by_value, reason = "callers build the value in place")]
fn parent(more: Value) -> GeminiBatchJob {
    let mut job = json!({
        "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": "job", "namespace": "ns", "uid": UID, "generation": 1, "finalizers": [FINALIZER]},
        "spec": {"model": "gemini-2.5-flash", "credentials": {"secretRef": {"name": "s"}},
                 "input": {"configMap": {"name": "in", "key": "x"}}, "output": {"configMap": {"name": "out"}},
                 "sharding": {"maxRequests": 1, "maxInFlight": 2}},
        "status": {"observedGeneration": -1, "state": "Pending"},
    });
    for (field, value) in more.as_object().unwrap() {
        job["spec"][field] = value.clone();
    }
    serde_json::from_value(job).unwrap()
}

fn plan(parts: usize) -> Plan {
    let text: String = (0..parts)
        .map(|i| json!({"key": format!("k{i}"), "request": {"contents": []}}).to_string() + "\n")
        .collect();
    of_content(text.as_bytes(), "x", Limits { max_requests: Some(1), max_bytes: 1 << 20, expected: None })
        .unwrap()
}

// ---------------------------------------------------------------------------------------- names

#[test]
fn names_are_short_enough_and_no_two_parents_share_them() {
    assert_eq!(child_name("job", 7), "job-0007");
    let long = "a".repeat(252);
    for parent in [long.clone() + "b", long.clone() + "c", format!("{}-.{}", "a".repeat(229), "b".repeat(20))]
    {
        let name = child_name(&parent, 999);
        assert!(results_name(&name).len() <= 253, "{name}");
        assert!(!name.contains("--") && !name.contains(".-"), "{name}");
    }
    assert_ne!(child_name(&(long.clone() + "b"), 1), child_name(&(long + "c"), 1));
    assert_eq!(label_of(&format!("{}.x", "a".repeat(62))), "a".repeat(62));
}

#[test]
fn a_child_is_its_parents_and_no_others() {
    let parent = parent(json!({}));
    let child = child(&parent, 3, &plan(5).parts[3]);
    assert!(is_child_of(&parent, &child.metadata));
    let mut other = parent.clone();
    other.metadata.uid = Some("another".to_owned());
    assert!(!is_child_of(&other, &child.metadata));
    let mut adopted = child.clone();
    adopted.metadata.owner_references.as_mut().unwrap()[0].controller = None;
    assert!(!is_child_of(&parent, &adopted.metadata));
    assert_eq!(child.labels()[SHARD_LABEL], "3");
}

#[test]
fn a_child_is_born_held_and_has_what_its_parents_user_set() {
    let parent = parent(
        json!({"backoffLimit": 3, "priority": 7, "suspendPolicy": "Cancel", "activeDeadlineSeconds": 60,
        "deletionPolicy": "Orphan", "deletionTimeoutSeconds": 9, "ttlSecondsAfterFinished": 5,
        "successPolicy": {"maxFailedRequests": 0}, "readinessPolicy": "WhenSubmitted"}),
    );
    let part = &plan(5).parts[2];
    let spec = child(&parent, 2, part).spec;
    assert!(spec.suspend);
    assert_eq!(spec.input_range(), Some(part));
    assert_eq!((spec.backoff_limit, spec.priority, spec.deletion_timeout_seconds), (3, Some(7), 9));
    assert_eq!(spec.deletion_policy, parent.spec.deletion_policy);
    assert_eq!(spec.credentials, parent.spec.credentials);
    // What is judged over all parts is the parent's alone.
    assert_eq!((spec.active_deadline_seconds, spec.ttl_seconds_after_finished), (None, None));
    assert_eq!((spec.success_policy, spec.sharding), (None, None));
    assert_eq!(spec.output.unwrap().config_map.unwrap().name, "job-0002-results");
    assert!(!desired(&parent, 2, Hold::default()).suspend);
}

// ----------------------------------------------------------------------------------- the world

/// What becomes of children and their parent next.
#[derive(Clone, Debug)]
enum Happens {
    /// The parent takes so many steps.
    Pass(u8),
    /// The process is killed, and another one begins.
    Restart,
    /// One of the children goes on: the number chooses which one, and how it ends if it does.
    Child(usize, usize),
    /// Somebody deletes a child.
    Delete(usize),
    /// Somebody edits a child.
    Edit(usize),
    /// Somebody edits the parent.
    Suspend(bool),
    InFlight(i32),
    /// So many seconds pass.
    Time(i64),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        8 => (1u8..9).prop_map(Happens::Pass),
        1 => Just(Happens::Restart),
        8 => (0usize..9, 0usize..6).prop_map(|(i, how)| Happens::Child(i, how)),
        1 => (0usize..9).prop_map(Happens::Delete),
        1 => (0usize..9).prop_map(Happens::Edit),
        1 => any::<bool>().prop_map(Happens::Suspend),
        1 => (1i32..5).prop_map(Happens::InFlight),
        1 => (1i64..40).prop_map(Happens::Time),
    ]
}

struct World {
    parent: GeminiBatchJob,
    children: BTreeMap<String, GeminiBatchJob>,
    memory: Memory,
    plan: Arc<Plan>,
    now: Timestamp,
    /// Batches that were paid for, by part.
    paid: BTreeMap<usize, u32>,
    uids: usize,
    merged: bool,
    gone: bool,
    deleted_by_hand: BTreeSet<usize>,
}

fn set(child: &mut GeminiBatchJob, state: State, finished: Option<Reason>, reason: Reason) {
    let generation = child.metadata.generation;
    let status = child.status.get_or_insert_default();
    status.state = state;
    status.observed_generation = generation;
    let condition = |type_: &str, reason: Reason| Condition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        reason: reason.as_str().to_owned(),
        message: String::new(),
        observed_generation: generation,
        last_transition_time: Time(at(0)),
    };
    status.conditions.retain(|c| c.type_ != READY);
    status.conditions.push(condition(READY, reason));
    if let Some(reason) = finished {
        status.conditions.push(condition(FINISHED, reason));
        status.completion_time = Some(Time(at(0)));
    }
}

impl World {
    fn new(parts: usize, more: Value) -> Self {
        Self {
            parent: parent(more),
            children: BTreeMap::new(),
            memory: Memory::default(),
            plan: Arc::new(plan(parts)),
            now: at(0),
            paid: BTreeMap::new(),
            uids: 0,
            merged: false,
            gone: false,
            deleted_by_hand: BTreeSet::new(),
        }
    }

    fn index(name: &str) -> usize {
        name.rsplit('-').next().unwrap().parse().unwrap()
    }

    fn finished(&self) -> bool {
        decide::is_finished(&self.parent)
    }

    fn slots(&mut self) {
        let Some(recorded) = recorded(&self.parent) else { return };
        let created = usize::try_from(recorded.created).unwrap();
        let total = usize::try_from(recorded.total).unwrap();
        self.memory.shards.slots = (0..total)
            .map(|index| match self.children.get(&child_name("job", index)) {
                Some(child) => Slot::of(&self.parent, Arc::new(Watched(Ok(child.clone())))),
                None if index < created => Slot::Lost,
                None => Slot::Absent,
            })
            .collect();
    }

    /// One step of the parent. Whether there was one to take.
    fn step(&mut self) -> bool {
        if self.gone {
            return false;
        }
        self.memory.is_about(1);
        if self.memory.shards.plan.is_none() {
            self.memory.shards.plan = Some(Arc::clone(&self.plan));
        }
        self.memory.shards.plan_generation = self.parent.metadata.generation;
        self.slots();
        let count = i64::try_from(self.plan.parts.len()).unwrap();
        let input = InputFacts { sha256: "s".into(), whole_sha256: "s".into(), count, bytes: 9 };
        let decision = decide(
            &Observed {
                webhook_refused: false,
                job: &self.parent,
                credential: Ok("key".to_owned()),
                input: Some(Ok(input)),
                memory: &self.memory,
                gate: &Gate::Open,
                cluster: "c",
                fresh_send_id: "s",
                timings: &Timings::default(),
            },
            self.now,
        );
        match decision {
            Decision::Done => false,
            Decision::Wait { say, .. } => {
                if let Some(change) = say {
                    self.record(&change);
                }
                false
            }
            Decision::Record(change) => {
                self.record(&change);
                true
            }
            Decision::Act(action) => {
                self.act(action);
                true
            }
        }
    }

    fn record(&mut self, change: &Change) {
        if let Change::DropFinalizer { .. } = change {
            let kept = self.children.values().filter(|c| is_kept(&self.parent, c)).count();
            assert_eq!(self.children.len(), kept, "nothing is left behind");
            self.parent.metadata.finalizers = None;
            self.gone = true;
            return;
        }
        if let Change::Finished(end) = change {
            assert!(self.merged, "the results are stored first");
            let counts = end.results.requests.unwrap();
            assert_eq!(counts.total, counts.succeeded + counts.failed);
            let whole = self.children.len() == self.plan.parts.len()
                && self.children.values().all(|c| c.status.as_ref().unwrap().state == State::Succeeded);
            assert_eq!(end.state == State::Succeeded, whole, "{}", end.message);
            for child in self.children.values() {
                assert!(decide::is_finished(child) || is_resting(child), "nothing goes on");
            }
        }
        let before = self.parent.status.clone().unwrap_or_default();
        let generation = self.parent.metadata.generation.unwrap();
        let after = compose(&before, &self.parent.spec, generation, change, self.now);
        if let (Some(before), Some(after)) = (&before.shards, &after.shards) {
            assert!(after.created >= before.created, "what was created is never forgotten");
            assert_eq!(after.pending + after.running + after.succeeded + after.failed, after.total);
        }
        self.parent.status = Some(after);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::ReserveOutput { name } => self.memory.output = OutputObject::Reserved { name },
            Action::ReleaseOutput { .. } => {
                self.memory.output = OutputObject::Unknown;
                self.memory.cleanup.output_released = true;
            }
            Action::Shards(Step::Create { first, count }) => {
                assert!(!self.parent.spec.suspend && !self.finished());
                let before = self.children.iter().filter(|(name, _)| Self::index(name) < first);
                let in_flight = before.filter(|(_, c)| !decide::is_finished(c)).count();
                let most =
                    usize::try_from(self.parent.spec.sharding.as_ref().unwrap().max_in_flight).unwrap();
                assert!(in_flight + count <= most, "{in_flight} + {count} of {most}");
                for index in first..first + count {
                    let mut child = child(&self.parent, index, &self.plan.parts[index]);
                    // One before it was deleted before it was recorded, so they are created from there on once more.
                    if self.children.contains_key(&child.name_any()) {
                        assert!(
                            index
                                >= recorded(&self.parent).map_or(0, |s| usize::try_from(s.created).unwrap())
                        );
                        continue;
                    }
                    self.uids += 1;
                    child.metadata.uid = Some(format!("child-{}", self.uids));
                    child.metadata.generation = Some(1);
                    assert!(!self.paid.contains_key(&index), "shard {index} would be paid for twice");
                    self.children.insert(child.name_any(), child);
                }
            }
            Action::Shards(Step::Sync { indices, stopped }) => {
                let recorded = recorded(&self.parent).unwrap().clone();
                let slots = self.memory.shards.slots.clone();
                let situation =
                    seen::Situation { parent: &self.parent, recorded: &recorded, slots: &slots, stopped };
                for index in indices {
                    let child = self.children.get_mut(&child_name("job", index)).unwrap();
                    let input = child.spec.input.clone();
                    child.spec = situation.desired(index);
                    child.spec.input = input;
                    child.metadata.generation = child.metadata.generation.map(|g| g + 1);
                }
            }
            Action::Shards(Step::Delete { indices }) => {
                assert!(self.finished(), "no result is lost");
                for index in indices {
                    self.children.remove(&child_name("job", index)).unwrap();
                }
            }
            Action::Shards(Step::DeleteAll) => {
                self.memory.shards.left = Some(self.children.len());
            }
            Action::Shards(Step::Merge { at }) => {
                self.merged = true;
                let succeeded = self.children.values().filter_map(|c| c.status.as_ref()?.requests);
                let tally = Tally {
                    succeeded: succeeded.map(|c| c.succeeded).sum(),
                    stored: Some((at, Placed::ConfigMap("out".to_owned()))),
                    ..Tally::default()
                };
                self.memory.shards.merged = Some(Merged::Done(tally));
            }
            Action::Shards(Step::DropParts) => {
                assert!(self.finished() && self.merged);
                self.memory.shards.parts_dropped = true;
            }
            other => panic!("a parent does not {other:?}"),
        }
    }

    /// An ordinary job, as far as it matters here.
    fn child_goes_on(&mut self, which: usize, how: usize) {
        let recorded = recorded(&self.parent).map_or(0, |s| usize::try_from(s.created).unwrap());
        let Some((name, child)) = self.children.iter_mut().nth(which) else { return };
        if decide::is_finished(child) {
            return;
        }
        let index = Self::index(name);
        let state = child.status.as_ref().map(|s| s.state).unwrap_or_default();
        match state {
            State::Running
                if child.spec.suspend && child.spec.suspend_policy == SuspendPolicy::Cancel && how > 0 =>
            {
                set(child, State::Suspended, None, Reason::Suspended);
            }
            State::Running => {
                let requests =
                    |succeeded| RequestCounts { total: 1, succeeded, failed: 1 - succeeded, pending: 0 };
                let (state, reason, succeeded) = match how {
                    0..4 => (State::Succeeded, Reason::Completed, 1),
                    4 => (State::Failed, Reason::BatchExpired, 0),
                    _ => (State::Cancelled, Reason::BatchCancelled, 0),
                };
                set(child, state, Some(reason), reason);
                child.status.as_mut().unwrap().requests = Some(requests(succeeded));
            }
            _ if child.spec.suspend => set(child, State::Suspended, None, Reason::Suspended),
            // A batch that was cancelled is not paid for again here: it would be a further attempt of the child.
            _ => {
                let paid = self.paid.entry(index).or_insert(0);
                if *paid == 0 {
                    *paid += 1;
                }
                assert!(index < recorded, "nothing is sent that the parent does not know of");
                set(child, State::Running, None, Reason::Submitted);
            }
        }
    }

    fn happen(&mut self, what: &Happens) {
        match what {
            Happens::Pass(steps) => {
                self.memory.shards.begin_pass();
                let _ = (0..*steps).take_while(|_| self.step()).count();
            }
            Happens::Restart => self.memory = Memory::default(),
            Happens::Child(which, how) => self.child_goes_on(*which, *how),
            Happens::Delete(which) => {
                if let Some(name) = self.children.keys().nth(*which).cloned()
                    && !self.finished()
                {
                    self.children.remove(&name);
                    self.deleted_by_hand.insert(Self::index(&name));
                }
            }
            Happens::Edit(which) => {
                if let Some(child) = self.children.values_mut().nth(*which)
                    // Whoever lets a child go that its parent holds has been told not to.
                    && !child.spec.suspend
                {
                    child.spec.priority = Some(99);
                    child.metadata.generation = child.metadata.generation.map(|g| g + 1);
                }
            }
            Happens::Suspend(suspend) if !self.finished() => {
                self.parent.spec.suspend = *suspend;
                self.parent.metadata.generation = self.parent.metadata.generation.map(|g| g + 1);
            }
            Happens::InFlight(most) if !self.finished() => {
                // Fewer than there are: none of them is stopped for it.
                let now = self.children.values().filter(|c| !decide::is_finished(c)).count();
                let most = (*most).max(i32::try_from(now).unwrap());
                self.parent.spec.sharding.as_mut().unwrap().max_in_flight = most;
                self.parent.metadata.generation = self.parent.metadata.generation.map(|g| g + 1);
            }
            Happens::Suspend(_) | Happens::InFlight(_) => {}
            Happens::Time(seconds) => {
                self.now = self.now.checked_add(SignedDuration::from_secs(*seconds)).unwrap();
            }
        }
    }

    /// Everybody goes on until nothing happens any more.
    fn go_to_the_end(&mut self) {
        self.happen(&Happens::Suspend(false));
        for _ in 0..200 {
            self.happen(&Happens::Pass(60));
            for which in 0..self.children.len() {
                self.child_goes_on(which, 0);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    /// Whatever happens in whatever order: no part is paid for twice, no more are under way than may be, nothing is
    /// deleted before the whole is stored, and the job ends.
    #[test]
    fn property_every_world_comes_to_its_end(
        parts in 1usize..9,
        deadline in prop::option::of(30i64..200),
        keeps in any::<bool>(),
        story in prop::collection::vec(happens(), 0..60),
    ) {
        let mut more = json!({"activeDeadlineSeconds": deadline});
        if deadline.is_none() { more = json!({}); }
        if keeps { more["deletionPolicy"] = json!("Delete"); }
        let mut world = World::new(parts, more);
        for what in &story {
            world.happen(what);
        }
        world.go_to_the_end();
        prop_assert!(world.finished(), "{:#?}", world.parent.status);
        let status = world.parent.status.as_ref().unwrap();
        let lost = !world.deleted_by_hand.is_empty();
        if !lost && world.children.values().all(|c| c.status.as_ref().unwrap().state == State::Succeeded) {
            prop_assert!(status.shards.as_ref().unwrap().total == i32::try_from(parts).unwrap());
        }
        prop_assert_eq!(world.gone, !keeps || world.children.is_empty());
    }
}

// ------------------------------------------------------------------------------- single decisions

/// A parent of three with its output reserved, and this many children that run.
fn begun(children: usize) -> World {
    let mut world = World::new(3, json!({"sharding": {"maxRequests": 1, "maxInFlight": 3}}));
    world.happen(&Happens::Pass(60));
    for which in 0..children {
        world.child_goes_on(which, 0);
    }
    world
}

fn status(world: &World) -> &crate::api::GeminiBatchJobStatus {
    world.parent.status.as_ref().unwrap()
}

fn condition<'a>(world: &'a World, type_: &str) -> &'a Condition {
    conditions::get(&status(world).conditions, type_).unwrap()
}

#[test]
fn the_plan_is_written_before_anything_is_created() {
    let mut world = World::new(3, json!({}));
    while recorded(&world.parent).is_none() {
        assert!(world.step() && world.children.is_empty());
    }
    let shards = recorded(&world.parent).unwrap();
    assert_eq!(
        (shards.total, shards.created, shards.plan_sha256.as_str()),
        (3, 0, world.plan.sha256.as_str())
    );
    assert_eq!(status(&world).requests.unwrap().total, 3);
}

#[test]
fn a_child_that_is_deleted_before_it_is_recorded_holds_nobody_up() {
    let mut world = World::new(2, json!({}));
    world.happen(&Happens::Pass(3));
    assert_eq!((world.children.len(), recorded(&world.parent).unwrap().created), (2, 0));
    world.happen(&Happens::Delete(0));
    world.happen(&Happens::InFlight(1));
    world.go_to_the_end();
    assert!(world.finished());
}

#[test]
fn a_child_that_waits_for_somebody_stalls_its_parent_by_name() {
    let mut world = begun(2);
    let child = world.children.get_mut("job-0001").unwrap();
    set(child, State::Pending, None, Reason::InputDiffers);
    child.status.as_mut().unwrap().conditions.push(Condition {
        type_: STALLED.to_owned(),
        status: "True".to_owned(),
        reason: "InputDiffers".to_owned(),
        message: "put it back".to_owned(),
        observed_generation: None,
        last_transition_time: Time(at(0)),
    });
    world.happen(&Happens::Pass(9));
    let stalled = condition(&world, STALLED);
    assert_eq!((stalled.status.as_str(), stalled.reason.as_str()), ("True", "InputDiffers"));
    assert_eq!(stalled.message, "shard 1 (job-0001): put it back");
    let listed: Vec<i32> = status(&world).shards.as_ref().unwrap().listed.iter().map(|s| s.index).collect();
    assert_eq!((status(&world).state, listed), (State::Running, vec![0, 1, 2]));
}

#[test]
fn a_name_that_is_taken_is_said_and_nothing_is_created_there() {
    let mut world = begun(1);
    world.memory.shards.refused =
        Some(Refused { problem: Problem::new(Reason::ShardNotCreated, "it exists"), next: at(30) });
    world.happen(&Happens::Pass(9));
    assert_eq!(condition(&world, STALLED).reason, "ShardNotCreated");
    world.now = at(31);
    world.happen(&Happens::Pass(9));
    assert_eq!(condition(&world, STALLED).status, "False");
}

#[test]
fn what_gemini_says_of_the_model_holds_for_all_parts() {
    let mut world = World::new(5, json!({}));
    world.happen(&Happens::Pass(60));
    assert_eq!(world.children.len(), 2);
    for child in world.children.values_mut() {
        set(child, State::Failed, Some(Reason::ModelNotFound), Reason::ModelNotFound);
        child.status.as_mut().unwrap().requests =
            Some(RequestCounts { total: 1, succeeded: 0, failed: 1, pending: 0 });
    }
    world.happen(&Happens::Pass(60));
    assert!(world.finished());
    let end = condition(&world, FINISHED);
    assert_eq!((end.reason.as_str(), status(&world).state), ("ModelNotFound", State::Failed));
}

#[test]
fn one_part_that_expired_does_not_take_the_others_with_it() {
    let mut world = begun(3);
    world.child_goes_on(0, 4);
    world.go_to_the_end();
    let end = condition(&world, FINISHED);
    assert_eq!(end.reason, "ShardsFailed");
    assert!(
        end.message.contains("1 of 3 shards") && end.message.contains("shard 0 (job-0000): BatchExpired")
    );
    let counts = status(&world).requests.unwrap();
    assert_eq!((counts.total, counts.succeeded, counts.failed), (3, 2, 1));
}

#[test]
fn the_success_policy_counts_over_all_parts() {
    let mut world = World::new(
        3,
        json!({"successPolicy": {"maxFailedRequests": 1}, "sharding":
        {"maxRequests": 1, "maxInFlight": 3}}),
    );
    world.happen(&Happens::Pass(60));
    for child in world.children.values_mut().take(2) {
        set(child, State::Failed, Some(Reason::AllRequestsFailed), Reason::AllRequestsFailed);
        child.status.as_mut().unwrap().requests =
            Some(RequestCounts { total: 1, succeeded: 0, failed: 1, pending: 0 });
    }
    let last = world.children.get_mut("job-0002").unwrap();
    set(last, State::Succeeded, Some(Reason::Completed), Reason::Completed);
    last.status.as_mut().unwrap().requests =
        Some(RequestCounts { total: 1, succeeded: 1, failed: 0, pending: 0 });
    world.happen(&Happens::Pass(60));
    assert_eq!(condition(&world, FINISHED).reason, "TooManyFailedRequests");
}

#[test]
fn results_that_do_not_fit_are_kept_with_the_children() {
    let mut world = begun(3);
    for which in 0..3 {
        world.child_goes_on(which, 0);
    }
    let generation = world.parent.metadata.generation;
    world.memory.shards.merged = Some(Merged::TooLarge { bytes: 2_000_000, generation });
    world.happen(&Happens::Pass(60));
    assert_eq!(condition(&world, STALLED).reason, "OutputTooLarge");
    assert_eq!(world.children.len(), 3);
    assert!(!world.finished());
}

#[test]
fn a_parent_that_is_deleted_takes_its_children_first() {
    let mut world = begun(3);
    world.parent.metadata.deletion_timestamp = Some(Time(world.now));
    world.slots();
    let observed = |world: &World| {
        decide(
            &Observed {
                webhook_refused: false,
                job: &world.parent,
                credential: Ok("key".to_owned()),
                input: None,
                memory: &world.memory,
                gate: &Gate::Open,
                cluster: "c",
                fresh_send_id: "s",
                timings: &Timings::default(),
            },
            world.now,
        )
    };
    assert_eq!(observed(&world), Decision::Act(Action::Shards(Step::Delete { indices: vec![0, 1, 2] })));
    // They are told first what becomes of their batches, and not stopped on the way to being left alone.
    for (policy, stopped) in [(DeletionPolicy::Orphan, false), (DeletionPolicy::Delete, true)] {
        world.parent.spec.deletion_policy = Some(policy);
        let told = Step::Sync { indices: vec![0, 1, 2], stopped };
        assert_eq!(observed(&world), Decision::Act(Action::Shards(told)), "{policy:?}");
    }
    world.parent.spec.deletion_policy = None;
    world.memory.shards.going = (0..3).collect();
    let Decision::Wait { wake: Wake::At(deadline), .. } = observed(&world) else {
        panic!("it waits for them")
    };
    assert_eq!(deadline, at(300));
    // They are gone, as far as the watch shows: only a list is certain.
    world.children.clear();
    world.slots();
    assert_eq!(observed(&world), Decision::Act(Action::Shards(Step::DeleteAll)));
    world.memory.shards.left = Some(1);
    assert!(matches!(observed(&world), Decision::Wait { .. }));
    world.memory.shards.left = Some(0);
    assert_eq!(
        observed(&world),
        Decision::Act(Action::ReleaseOutput { name: Destination::ConfigMap("out".to_owned()) })
    );
    world.memory.cleanup.output_released = true;
    assert!(
        matches!(observed(&world), Decision::Record(change) if matches!(*change, Change::DropFinalizer { .. }))
    );
}
