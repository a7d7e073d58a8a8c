//! First the rules one by one, then everything in any order.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const KEY: &str = "key";

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn minutes(n: u32) -> SignedDuration {
    SignedDuration::from_mins(i64::from(n))
}

/// A job that was created in that second, and that uses that Secret.
fn job_of(n: i64, secret: &str) -> GeminiBatchJob {
    serde_json::from_value(json!({
        "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": format!("job-{n:03}"), "namespace": "ns", "uid": format!("u{n:03}"),
            "creationTimestamp": at(n).to_string()},
        "spec": {"model": "m", "credentials": {"secretRef": {"name": secret}}},
    }))
    .unwrap()
}

fn job(n: i64) -> GeminiBatchJob {
    job_of(n, "s")
}

fn asker(n: i64) -> Asker {
    Asker::of(&job(n)).unwrap()
}

/// The same with an attempt.
fn attempted(n: i64, key: &str, more: &Value) -> GeminiBatchJob {
    let mut attempt = json!({"number": 1, "sendId": "s", "displayName": "d", "inputFile": "files/f",
        "credentialFingerprint": key, "intentTime": at(n).strftime("%Y-%m-%dT%H:%M:%S.000000Z").to_string()});
    for (field, value) in more.as_object().unwrap() {
        attempt[field] = value.clone();
    }
    let mut job = job(n);
    job.status =
        serde_json::from_value(json!({"state": "Running", "conditions": [], "attempts": [attempt]})).unwrap();
    job
}

fn refused(n: i64, refusals: i32, until: i64) -> GeminiBatchJob {
    let time = |s: i64| at(s).strftime("%Y-%m-%dT%H:%M:%S.000000Z").to_string();
    let refusal = json!({"call": "Create", "reason": "WaitingForQuota", "code": 429, "time": time(n),
        "retryTime": time(until)});
    attempted(n, KEY, &json!({"refusal": refusal, "refusals": refusals}))
}

/// One pass over a job: whether it took a slot.
fn pass(ledger: &mut Ledger, n: i64, now: Timestamp) -> Result<(), Held> {
    let asker = asker(n);
    let uid = asker.ticket.uid.clone();
    ledger.begin(&uid);
    let claimed = ledger.claim(&asker, KEY, now);
    let reason = match claimed {
        Ok(()) => None,
        Err(Held::Slot) => Some(Reason::WaitingForSlot),
        Err(Held::Quota { .. }) => Some(Reason::WaitingForQuota),
    };
    ledger.end(Some(&asker), &uid, reason.map(|reason| (KEY, reason)));
    claimed
}

fn seen(limit: usize, jobs: std::ops::Range<i64>) -> Ledger {
    let mut ledger = Ledger::new(limit);
    jobs.for_each(|n| ledger.seen(&job(n)));
    ledger
}

/// Numbers of the jobs that are called.
fn called(ledger: &mut Ledger, now: Timestamp) -> Vec<i64> {
    ledger.call(now).iter().map(|(_, name)| name.trim_start_matches("job-").parse().unwrap()).collect()
}

fn active(ledger: &Ledger) -> usize {
    ledger.active().map(|(_, n)| n).sum()
}

#[test]
fn a_burst_behind_a_free_ceiling_goes_in_any_order() {
    let mut ledger = seen(5, 0..5);
    for n in [4, 2, 0, 3, 1] {
        assert_eq!(pass(&mut ledger, n, at(9)), Ok(()), "{n}");
    }
    assert!(called(&mut ledger, at(9)).is_empty());
    assert_eq!(active(&ledger), 5);
}

#[test]
fn those_who_were_not_looked_at_yet_keep_their_place() {
    let mut ledger = seen(2, 0..4);
    assert_eq!(pass(&mut ledger, 3, at(9)), Err(Held::Slot));
    assert_eq!(pass(&mut ledger, 1, at(9)), Ok(()));
    assert_eq!(pass(&mut ledger, 2, at(9)), Err(Held::Slot), "0 comes first");
    assert_eq!(pass(&mut ledger, 0, at(9)), Ok(()));
    assert!(called(&mut ledger, at(9)).is_empty());
    ledger.gone("u001");
    assert_eq!(called(&mut ledger, at(9)), [2]);
    assert!(called(&mut ledger, at(9)).is_empty(), "it is called once");
    assert_eq!(pass(&mut ledger, 3, at(9)), Err(Held::Slot), "it was called, and is first");
    assert_eq!(pass(&mut ledger, 2, at(9)), Ok(()));
}

/// Stalled, suspended, failed by the API server: a pass that does not ask gives its place up.
#[test]
fn nobody_waits_behind_a_job_that_does_not_ask() {
    let mut ledger = seen(1, 0..4);
    assert_eq!(pass(&mut ledger, 0, at(9)), Ok(()));
    for n in 1..4 {
        assert_eq!(pass(&mut ledger, n, at(9)), Err(Held::Slot));
    }
    ledger.note(&job(0), false); // not recorded after all
    assert_eq!(called(&mut ledger, at(9)), [1]);
    assert!(ledger.is_called("u001") && !ledger.is_called("u002"));
    ledger.begin("u001");
    ledger.end(Some(&asker(1)), "u001", None);
    assert_eq!(called(&mut ledger, at(9)), [2]);
    ledger.gone("u002");
    assert_eq!(called(&mut ledger, at(9)), [3]);
    // Mended, it has its old place again.
    assert_eq!(pass(&mut ledger, 1, at(9)), Ok(()));
    assert_eq!(pass(&mut ledger, 3, at(9)), Err(Held::Slot));
}

#[test]
fn an_echo_of_our_own_write_does_not_hold_a_place() {
    let mut ledger = seen(1, 0..1);
    ledger.begin("u000");
    ledger.seen(&job(0));
    ledger.end(Some(&asker(0)), "u000", None); // stalled
    ledger.seen(&job(0));
    assert_eq!(pass(&mut ledger, 1, at(9)), Err(Held::Slot));
    ledger.idle("u000");
    assert_eq!(called(&mut ledger, at(9)), [1]);
    ledger.idle("u001");
    assert!(ledger.is_called("u001"), "one that waits or is called does not lose its place");
}

#[test]
fn keys_do_not_concern_each_other() {
    let mut ledger = Ledger::new(1);
    let other = Asker::of(&job_of(1, "t")).unwrap();
    ledger.seen(&job(0));
    ledger.seen(&job_of(1, "t"));
    assert_eq!(ledger.claim(&other, "other", at(9)), Ok(()));
    assert_eq!(pass(&mut ledger, 0, at(9)), Ok(()));
    ledger.refused(KEY, at(9), None, minutes);
    assert_eq!(ledger.may_send(&other, "other", at(9)), Ok(()));
    // A Secret that holds another key now: the job moves.
    ledger.gone("u001");
    assert_eq!(ledger.claim(&asker(0), "other", at(9)), Ok(()));
    assert_eq!(ledger.active().filter(|(_, n)| *n > 0).collect::<Vec<_>>(), [("other", 1)]);
}

#[test]
fn what_counts_as_active() {
    let outcome = json!({"outcome": {"reason": "BatchExpired", "succeeded": 0, "failed": 0}});
    let mut finished = attempted(1, KEY, &json!({"batchName": "batches/b"}));
    crate::api::conditions::set(
        &mut finished.status.as_mut().unwrap().conditions,
        crate::api::conditions::FINISHED,
        true,
        Reason::Completed,
        "",
        1,
        at(1),
    );
    let mut deleted = attempted(1, KEY, &json!({"batchName": "batches/b"}));
    deleted.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(3)));
    for (what, job, over, expected) in [
        ("nothing recorded", job(1), false, 0),
        ("intended", attempted(1, KEY, &json!({})), false, 1),
        ("running", attempted(1, KEY, &json!({"batchName": "batches/b"})), false, 1),
        ("ended, not written", attempted(1, KEY, &json!({"batchName": "batches/b"})), true, 0),
        ("being deleted", deleted, false, 1),
        ("refused", refused(1, 1, 2), false, 0),
        ("between two attempts", attempted(1, KEY, &outcome), false, 0),
        ("finished", finished, false, 0),
    ] {
        let mut ledger = Ledger::new(1);
        ledger.note(&job, over);
        assert_eq!(active(&ledger), expected, "{what}");
    }
}

#[test]
fn after_a_refusal_one_tries_and_the_others_follow() {
    let mut ledger = seen(9, 0..4);
    assert_eq!(pass(&mut ledger, 0, at(0)), Ok(()));
    assert_eq!(ledger.refused(KEY, at(0), None, minutes), at(60));
    ledger.note(&refused(0, 1, 60), false);
    // Under way at the same time: counts once, and only Gemini's word makes it longer.
    assert_eq!(ledger.refused(KEY, at(1), None, minutes), at(60));
    assert_eq!(ledger.refused(KEY, at(1), Some(minutes(3)), minutes), at(181));
    for n in 1..4 {
        assert_eq!(pass(&mut ledger, n, at(2)), Err(Held::Quota { until: at(181) }));
    }
    assert!(called(&mut ledger, at(180)).is_empty());
    assert_eq!(ledger.next_call(at(180)), Some(at(181)));
    assert_eq!(called(&mut ledger, at(181)), [1]);
    assert_eq!(pass(&mut ledger, 2, at(181)), Err(Held::Quota { until: at(181) }), "1 tries");
    assert_eq!(ledger.claim(&asker(1), KEY, at(181)), Ok(()));
    assert!(called(&mut ledger, at(181)).is_empty(), "while it tries nobody else does");
    // It is refused as well: twice as long.
    assert_eq!(ledger.refused(KEY, at(182), None, minutes), at(302));
    ledger.note(&refused(1, 1, 302), false);
    ledger.end(Some(&asker(1)), "u001", Some((KEY, Reason::WaitingForQuota)));
    // Whatever kept it from fitting need not keep the next one: a quota of its model, or its size.
    assert_eq!(pass(&mut ledger, 1, at(302)), Err(Held::Quota { until: at(302) }), "it is not its turn");
    assert_eq!(called(&mut ledger, at(302)), [2]);
    assert_eq!(ledger.claim(&asker(2), KEY, at(302)), Ok(()));
    ledger.created(KEY, "u003"); // was under way since before the refusal: says nothing
    assert!(called(&mut ledger, at(302)).is_empty());
    ledger.created(KEY, "u002");
    assert_eq!(called(&mut ledger, at(302)), [1, 3]);
    assert_eq!(ledger.refused(KEY, at(400), None, minutes), at(460), "from the beginning");
}

#[test]
fn those_who_tried_in_vain_take_turns() {
    let mut ledger = seen(9, 0..3);
    ledger.refused(KEY, at(0), None, minutes);
    let mut tried = Vec::new();
    let mut now = at(0);
    for n in 0..3 {
        assert!(pass(&mut ledger, n, now).is_err());
    }
    for _ in 0..6 {
        now = ledger.next_call(now).unwrap();
        let [n] = called(&mut ledger, now)[..] else { panic!("one at a time") };
        assert_eq!(ledger.claim(&asker(n), KEY, now), Ok(()));
        ledger.refused(KEY, now, None, minutes);
        ledger.note(&refused(n, 1, 0), false);
        ledger.end(Some(&asker(n)), &format!("u{n:03}"), Some((KEY, Reason::WaitingForQuota)));
        tried.push(n);
    }
    assert_eq!(tried, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_slot_that_one_key_counts_is_not_moved_to_another_that_sees_the_batch_too() {
    let mut ledger = Ledger::new(1);
    ledger.note(&attempted(0, KEY, &json!({"batchName": "batches/b"})), false);
    ledger.found("u000", "another key of the project");
    assert!(ledger.has_slot("u000", KEY));
    assert_eq!(pass(&mut ledger, 1, at(1)), Err(Held::Slot), "the ceiling of the first key holds");
}

#[test]
fn a_try_that_says_nothing_of_the_quota_leaves_it_to_the_next() {
    let mut ledger = seen(9, 0..3);
    ledger.refused(KEY, at(0), None, minutes);
    for n in 0..3 {
        assert!(pass(&mut ledger, n, at(1)).is_err());
    }
    assert_eq!(called(&mut ledger, at(60)), [0]);
    assert_eq!(pass(&mut ledger, 0, at(60)), Ok(()), "its outcome is unknown when the pass ends");
    assert_eq!(called(&mut ledger, at(60)), [1]);
    assert_eq!(ledger.claim(&asker(1), KEY, at(60)), Ok(()));
    ledger.gone("u001");
    assert_eq!(called(&mut ledger, at(60)), [2]);
}

#[test]
fn a_new_leader_knows_the_running_ones_the_line_and_the_pause() {
    let mut ledger = Ledger::new(2);
    let running = |n| attempted(n, KEY, &json!({"batchName": "batches/b"}));
    ledger.restart(&[running(0), refused(3, 4, 600), refused(2, 1, 500), job(1)]);
    assert_eq!(active(&ledger), 1);
    assert_eq!(pass(&mut ledger, 1, at(400)), Err(Held::Quota { until: at(600) }));
    assert_eq!(pass(&mut ledger, 3, at(600)), Err(Held::Quota { until: at(600) }), "1 comes first");
    assert_eq!(called(&mut ledger, at(600)), [1]);
    assert_eq!(ledger.refused(KEY, at(600), None, minutes), at(900), "the fifth in a row");
    // A refusal before the last success is over.
    ledger.restart(&[running(4), refused(3, 4, 600)]);
    assert_eq!(pass(&mut ledger, 3, at(10)), Ok(()));
}

#[test]
fn what_is_at_gemini_already_takes_its_slot_and_is_called_to_adopt_it() {
    let mut ledger = seen(1, 0..3);
    for n in 1..3 {
        assert_eq!(pass(&mut ledger, n, at(9)), Err(Held::Slot));
    }
    ledger.found("u002", KEY);
    ledger.found("u009", KEY); // not in line
    assert_eq!(called(&mut ledger, at(9)), [2]);
    assert!(ledger.is_called("u002") && called(&mut ledger, at(9)).is_empty());
    assert_eq!(pass(&mut ledger, 0, at(9)), Err(Held::Slot), "no slot is left");
}

#[test]
fn a_second_list_takes_away_who_is_not_in_it() {
    let mut ledger = seen(1, 0..3);
    for n in 0..3 {
        let _ = pass(&mut ledger, n, at(9));
    }
    ledger.relisted(&[job(2), job(3)]);
    assert_eq!(called(&mut ledger, at(9)), [2]);
    assert_eq!(ledger.waiting().get(&Reason::WaitingForSlot), Some(&1));
}

#[test]
fn who_is_held_by_something_else_is_counted_and_not_called() {
    let mut ledger = seen(1, 0..1);
    ledger.begin("u000");
    ledger.end(Some(&asker(0)), "u000", Some((KEY, Reason::SubmissionsPaused)));
    assert_eq!(ledger.waiting().get(&Reason::SubmissionsPaused), Some(&1));
    assert!(called(&mut ledger, at(9)).is_empty());
    assert_eq!(pass(&mut ledger, 0, at(9)), Ok(()));
    assert!(ledger.waiting().is_empty());
}

#[test]
fn what_is_said_does_not_change_with_the_line() {
    let said = |held| problem(&job(0), KEY, held, 80);
    assert!(said(Held::Slot).message.starts_with("80 batches of this API key are active"));
    assert_eq!(said(Held::Quota { until: at(1) }), said(Held::Quota { until: at(2) }));
    // One that was refused itself goes on saying so.
    let own = refused(0, 1, 60);
    let refusal = own.status.as_ref().unwrap().attempts[0].refusal.clone().unwrap();
    assert_eq!(
        problem(&own, KEY, Held::Quota { until: at(1) }, 80),
        crate::controller::ending::refusal_problem(&refusal)
    );
    assert_eq!(problem(&own, "other", Held::Quota { until: at(1) }, 80), said(Held::Quota { until: at(1) }));
}

// ------------------------------------------------------------------------- everything in any order

const JOBS: i64 = 12;

#[derive(Clone, Copy, Debug)]
enum Event {
    Seen(i64),
    /// A pass that asks, with one of two keys. What becomes of it: see [`World::send`].
    Pass(i64, usize, Outcome),
    /// A pass that does not ask.
    Stalled(i64),
    Ends(i64),
    Gone(i64),
    Idle(i64),
    Time(i64),
    Relist,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Created,
    Refused,
    Unknown,
    NotRecorded,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let outcome = prop::sample::select(vec![
        Outcome::Created,
        Outcome::Created,
        Outcome::Refused,
        Outcome::Unknown,
        Outcome::NotRecorded,
    ]);
    let event = prop_oneof![
        3 => (0..JOBS).prop_map(Event::Seen),
        6 => (0..JOBS, 0usize..2, outcome).prop_map(|(n, key, o)| Event::Pass(n, key, o)),
        1 => (0..JOBS).prop_map(Event::Stalled),
        2 => (0..JOBS).prop_map(Event::Ends),
        1 => (0..JOBS).prop_map(Event::Gone),
        1 => (0..JOBS).prop_map(Event::Idle),
        1 => prop::sample::select(vec![1, 60, 4000]).prop_map(Event::Time),
        1 => Just(Event::Relist),
    ];
    prop::collection::vec(event, 1..80)
}

const KEYS: [&str; 2] = ["k0", "k1"];

/// What is really so, without a ledger.
struct World {
    ledger: Ledger,
    limit: usize,
    now: Timestamp,
    /// The status of each job that exists.
    jobs: BTreeMap<i64, GeminiBatchJob>,
}

impl World {
    fn running(&self, key: &str) -> usize {
        let counts = |job: &&GeminiBatchJob| {
            decide::current_attempt(job).is_some_and(|a| {
                a.refusal.is_none() && a.outcome.is_none() && a.credential_fingerprint == key
            })
        };
        self.jobs.values().filter(counts).count()
    }

    /// A pass of a job that is ready to be sent, as the driver makes it.
    fn send(&mut self, n: i64, key: &str, outcome: Outcome) {
        let Some(job) = self.jobs.get(&n).cloned() else { return };
        let asker = asker(n);
        let uid = format!("u{n:03}");
        self.ledger.begin(&uid);
        self.ledger.note(&job, false);
        let mut held = None;
        if may_ask(&job) {
            match self.ledger.claim(&asker, key, self.now) {
                Err(Held::Slot) => held = Some((key, Reason::WaitingForSlot)),
                Err(Held::Quota { .. }) => held = Some((key, Reason::WaitingForQuota)),
                Ok(()) => match outcome {
                    Outcome::NotRecorded => {
                        self.ledger.note(&job, false);
                    }
                    Outcome::Refused => {
                        let until = self.ledger.refused(key, self.now, None, minutes);
                        let until = until.duration_since(at(0)).as_secs();
                        let mut job = refused(n, 1, until);
                        job.status.as_mut().unwrap().attempts[0].credential_fingerprint = key.to_owned();
                        self.ledger.note(&job, false);
                        self.jobs.insert(n, job);
                    }
                    Outcome::Created | Outcome::Unknown => {
                        if outcome == Outcome::Created {
                            self.ledger.created(key, &uid);
                        }
                        let job = attempted(n, key, &json!({}));
                        self.ledger.note(&job, false);
                        self.jobs.insert(n, job);
                    }
                },
            }
        }
        self.ledger.end(Some(&asker), &uid, held);
    }

    /// Its batch has ended and it may be sent again, so that the world does not run out of jobs.
    fn ends(&mut self, n: i64) {
        if let Some(there) = self.jobs.get_mut(&n) {
            *there = job(n);
            self.ledger.note(&there.clone(), false);
        }
    }

    fn go(&mut self, event: Event) {
        match event {
            Event::Seen(n) => {
                let job = self.jobs.entry(n).or_insert_with(|| job(n)).clone();
                self.ledger.seen(&job);
            }
            Event::Pass(n, key, outcome) => self.send(n, KEYS[key], outcome),
            Event::Stalled(n) => {
                self.ledger.begin(&format!("u{n:03}"));
                self.ledger.end(Some(&asker(n)), &format!("u{n:03}"), None);
            }
            Event::Ends(n) => self.ends(n),
            Event::Gone(n) => {
                self.jobs.remove(&n);
                self.ledger.gone(&format!("u{n:03}"));
            }
            Event::Idle(n) => self.ledger.idle(&format!("u{n:03}")),
            Event::Time(seconds) => self.now = after(self.now, SignedDuration::from_secs(seconds)),
            Event::Relist => {
                let jobs: Vec<_> = self.jobs.values().cloned().collect();
                self.ledger.relisted(&jobs);
            }
        }
    }
}

proptest! {
    /// The ceiling holds at every moment, what the ledger believes is so, and nobody is forgotten: once all goes
    /// well, everybody who waits is called in the end.
    #[test]
    fn the_ceiling_holds_and_nobody_is_forgotten(limit in 1usize..4, events in events()) {
        let mut world =
            World { ledger: Ledger::new(limit), limit, now: at(0), jobs: BTreeMap::new() };
        for event in events {
            world.go(event);
            for key in KEYS {
                prop_assert!(world.running(key) <= world.limit, "{key} after {event:?}");
                let believed = world.ledger.active().find(|(k, _)| *k == key).map_or(0, |(_, n)| n);
                prop_assert_eq!(believed, world.running(key));
            }
        }
        // From now on those who are called come and are created, those who are seen are looked at, and batches end.
        let waiting = |world: &World| world.ledger.entries.values().filter(|e| e.stage == Stage::Waiting).count();
        for _ in 0..200 {
            world.now = after(world.now, SignedDuration::from_hours(2));
            let due: Vec<(i64, Option<String>)> = {
                world.ledger.call(world.now);
                let due = world.ledger.entries.iter().filter(|(_, e)| e.stage != Stage::Waiting);
                due.map(|(uid, e)| (uid[1..].parse().unwrap(), e.key.clone())).collect()
            };
            for (n, key) in due {
                world.send(n, key.as_deref().unwrap_or(KEYS[0]), Outcome::Created);
            }
            // The oldest batch of each key ends for good.
            for key in KEYS {
                let oldest = world.jobs.iter().find(|(_, job)| {
                    decide::current_attempt(job)
                        .is_some_and(|a| a.refusal.is_none() && a.credential_fingerprint == key)
                });
                if let Some(n) = oldest.map(|(n, _)| *n) {
                    world.go(Event::Gone(n));
                }
            }
            if world.ledger.entries.is_empty() {
                break;
            }
        }
        prop_assert_eq!(waiting(&world), 0);
        prop_assert!(world.ledger.entries.is_empty() && world.ledger.unread.is_empty());
    }

    /// Jobs that are all there from the beginning take their slots in order of creation, whatever the order of
    /// the passes.
    #[test]
    fn first_come_first_served(limit in 1usize..4, order in prop::collection::vec(0..JOBS, 0..60)) {
        let mut ledger = Ledger::new(limit);
        let jobs: Vec<_> = (0..JOBS).map(job).collect();
        ledger.restart(&jobs);
        let mut sent = Vec::new();
        let mut passes = order.into_iter();
        for _ in 0..500 {
            let turn = called(&mut ledger, at(99));
            let next = passes.next().or_else(|| turn.first().copied());
            let next = next.or_else(|| (0..JOBS).find(|n| ledger.is_called(&format!("u{n:03}"))));
            match next {
                Some(n) if !sent.contains(&n) => {
                    if pass(&mut ledger, n, at(99)).is_ok() {
                        prop_assert!(n < i64::try_from(sent.len() + limit).unwrap(), "{n} after {sent:?}");
                        sent.push(n);
                    }
                }
                Some(_) => {}
                // Nobody may: all are looked at once, and the batch of the first ends.
                None => {
                    for n in 0..JOBS {
                        if !sent.contains(&n) && pass(&mut ledger, n, at(99)).is_ok() {
                            sent.push(n);
                        }
                    }
                    if let Some(first) = sent.iter().find(|n| ledger.has_slot(&format!("u{n:03}"), KEY)) {
                        ledger.gone(&format!("u{first:03}"));
                    }
                }
            }
        }
        prop_assert_eq!(sent.len(), jobs.len(), "all are sent in the end");
    }
}
