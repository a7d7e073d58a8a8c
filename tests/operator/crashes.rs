//! The operator is killed at each step, and started again.

use std::time::Instant;

use gemini_simulator::{Config, Effect, Fault, Op, Outcome, Switches};

use crate::harness::{Env, PATIENCE, counts, ready, spec, state};

/// Dies at the step, starts again, and must end right with one batch and one create.
async fn survives(at: &str) {
    let env = Env::new().await;
    let mut first = env.spawn(Some(at));
    env.create("job", spec(&["one", "two"], Some("out"))).await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{at}");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1), "{at}");
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    assert_eq!(data["results.jsonl"].lines().count(), 2, "{at}");
    assert!(env.sim.files().is_empty(), "{at}");
}

/// Dies when the batch may have been asked for, and was not: unconfirmed, and never sent again.
async fn stays_unconfirmed(at: &str) {
    let env = Env::new().await;
    let mut first = env.spawn(Some(at));
    env.create("job", spec(&["one"], None)).await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.stalled("job", "SubmissionUnconfirmed").await;
    assert!(ready(&job).2.contains("delete this job"), "{at}");
    assert_eq!(env.count(Op::BatchCreate), 0, "{at}");
}

macro_rules! at {
    ($($name:ident: $how:ident($step:literal)),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            $how($step).await;
        }
    )*};
}

at! {
    before_the_finalizer: survives("before:AddFinalizer"),
    after_the_finalizer: survives("after:AddFinalizer"),
    after_the_reservation: survives("after:ReserveOutput"),
    after_the_intent: survives("after:Intent"),
    before_the_upload: survives("before:UploadInput"),
    after_the_upload: stays_unconfirmed("after:UploadInput"),
    before_the_create: stays_unconfirmed("before:CreateBatch"),
    after_the_create: survives("after:CreateBatch"),
    before_the_name_is_recorded: survives("before:Submitted"),
    after_the_name_is_recorded: survives("after:Submitted"),
    before_the_look: survives("before:GetBatch"),
    after_the_look: survives("after:GetBatch"),
    after_the_results_were_read: survives("after:Collect"),
    before_the_results_are_stored: survives("before:StoreResults"),
    after_the_results_were_stored: survives("after:StoreResults"),
    before_the_end_is_recorded: survives("before:Finished"),
    after_the_end_was_recorded: survives("after:Finished"),
    after_the_input_was_deleted: survives("after:DeleteInputFile"),
    after_the_finalizer_went: survives("after:DropFinalizer"),
}

// ------------------------------------------------------------------------------------------ defects

/// A defect that one job brings to light costs it a look as after a restart, and no other job anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_over_one_job_ends_neither_the_process_nor_the_others() {
    for at in ["before:UploadInput", "after:CreateBatch", "after:Collect"] {
        let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
        let mut process = env.spawn_panicking(at);
        for name in ["one", "two"] {
            env.create(name, spec(&["x"], Some(name))).await;
        }
        for name in ["one", "two"] {
            assert_eq!(state(&env.cleaned(name).await), "Succeeded", "{at}");
        }
        assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (2, 2), "{at}");
        let log = process.log();
        assert!(
            log.contains("as a test wanted it") && log.contains("a defect of the operator"),
            "{at}: {log}"
        );
        assert!(process.runs(), "{at}: {log}");
    }
}

/// One that comes each time is said at the job, and tried less and less often.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_panics_each_time_says_so_and_holds_no_other_one_up() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let mut process = env.spawn_panicking("before:ReserveOutput@*");
    env.create("poison", spec(&["x"], Some("out"))).await;
    let job = env.stalled("poison", "InternalError").await;
    assert!(ready(&job).2.contains("report it"), "{:?}", ready(&job));
    env.create("other", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("other").await), "Succeeded");
    assert_eq!(env.count(Op::BatchCreate), 1, "{}", process.log());
    assert!(process.runs());
}

/// Without the sweep jobs would wait for what does not come: the turn of leadership ends, and another one begins.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_sweep_is_mended_by_a_turn_of_its_own() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.sim.set(Switches { lose_events: true, ..Switches::default() });
    let mut process = env.spawn_panicking("begin:Sweep");
    env.create("job", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded", "no callback comes: the sweep finds it");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
    let log = process.log();
    assert!(log.contains("a task of the controller ended by a panic"), "{log}");
    assert!(process.runs(), "{log}");
}

// ------------------------------------------------------------------------ the steps of a restart

/// Dies twice: at a step of the submission, and at one of the restart after it.
async fn survives_twice(first: &str, second: &str) {
    // No callback: one that came meanwhile would name the batch, and spare the search.
    let config = Config { speed: 600.0, ..Config::default() };
    let env = Env::with(config, &["--sweep-seconds=1"]).await;
    let mut process = env.spawn(Some(first));
    env.create("job", spec(&["one [[sim:no-event]]", "two"], Some("out"))).await;
    process.ended().await;
    let mut process = env.spawn(Some(second));
    process.ended().await;
    let _last = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{second}");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1), "{second}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_may_die_as_well() {
    for (first, second) in [
        ("after:Intent", "before:FindInputFile"),
        ("after:Intent", "after:FindInputFile"),
        ("before:Submitted", "after:FindInputFile"),
        ("before:Submitted", "before:FindBatch"),
        ("before:Submitted", "after:FindBatch"),
        ("before:Submitted", "before:Submitted"),
    ] {
        survives_twice(first, second).await;
    }
}

// -------------------------------------------------------------------------------------- refusals

fn once(op: Op, effect: Effect) -> Fault {
    Fault { op, contains: String::new(), skip: 0, times: 1, effect }
}

/// A refusal that was recorded is a refusal after the restart; one that was not is an unknown outcome.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_counts_once_it_is_recorded() {
    let quota = Effect::Status { code: 429, commit: false, envelope: true, retry_after: None };
    let env = Env::scaled(60.0, &[]).await;
    env.sim.fault(once(Op::BatchCreate, quota.clone()));
    let mut first = env.spawn(Some("after:Refused"));
    env.create("job", spec(&["one"], None)).await;
    first.ended().await;
    let _second = env.spawn(None);
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (2, 1));

    let env = Env::scaled(60.0, &[]).await;
    env.sim.fault(once(Op::BatchCreate, quota));
    let mut first = env.spawn(Some("before:Refused"));
    env.create("job", spec(&["one"], None)).await;
    first.ended().await;
    let _second = env.spawn(None);
    env.stalled("job", "SubmissionUnconfirmed").await;
    assert_eq!(env.count(Op::BatchCreate), 1);
}

// ------------------------------------------------------------------- another name, an early hint

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_got_another_name_is_not_mistaken() {
    let other_name = || Switches { honour_file_name: false, ..Switches::default() };
    // Not recorded, so the batch was not asked for: the send begins anew.
    let env = Env::new().await;
    env.sim.set(other_name());
    let mut first = env.spawn(Some("before:InputFile"));
    env.create("job", spec(&["one"], None)).await;
    first.ended().await;
    let _second = env.spawn(None);
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
    // Recorded: the batch may have been asked for.
    let env = Env::new().await;
    env.sim.set(other_name());
    let mut first = env.spawn(Some("after:InputFile"));
    env.create("job", spec(&["one"], None)).await;
    first.ended().await;
    let _second = env.spawn(None);
    env.stalled("job", "SubmissionUnconfirmed").await;
    assert_eq!(env.count(Op::BatchCreate), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_hint_outlives_a_kill() {
    for at in ["before:HintObserved", "after:HintObserved"] {
        let env = Env::scaled(60.0, &["--sweep-seconds=1000000"]).await;
        let mut first = env.spawn(Some(at));
        env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
        env.until("job", "running", |j| state(j) == "Running").await;
        let batch = env.sim.batches()[0].clone();
        assert_eq!(env.sim.deliver(&batch.name, &batch.uris[0], "batch.succeeded").await, Some(200), "{at}");
        first.ended().await;
        let _second = env.spawn(None);
        env.until("job", "told that the hint was early", |j| {
            j.status.as_ref().unwrap().attempts[0].observed_hint.is_some()
        })
        .await;
        assert_eq!(state(&env.jobs().get("job").await.unwrap()), "Running", "{at}");
        assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
        assert_eq!(state(&env.cleaned("job").await), "Succeeded", "{at}");
    }
}

// -------------------------------------------------------------------------- in the midst of calls

async fn until(what: &str, wanted: impl Fn() -> bool) {
    let start = Instant::now();
    while !wanted() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_within_the_upload_it_is_sent_again() {
    let env = Env::new().await;
    env.sim.fault(once(Op::UploadChunk, Effect::Delay { millis: 600_000 }));
    let mut first = env.spawn(None);
    env.create("job", spec(&["one"], None)).await;
    until("nothing is uploaded", || env.count(Op::UploadChunk) == 1).await;
    first.kill();
    let _second = env.spawn(None);
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_create_and_its_answer_the_batch_is_adopted() {
    let env = Env::new().await;
    env.sim.fault(once(Op::BatchCreate, Effect::DelayAnswer { millis: 600_000 }));
    let mut first = env.spawn(None);
    env.create("job", spec(&["one"], None)).await;
    until("nothing is created", || env.sim.batches().len() == 1).await;
    first.kill();
    let _second = env.spawn(None);
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_before_a_create_took_effect_it_is_not_sent_again() {
    let env = Env::new().await;
    env.sim.fault(once(Op::BatchCreate, Effect::Delay { millis: 600_000 }));
    let mut first = env.spawn(None);
    env.create("job", spec(&["one"], None)).await;
    until("nothing is sent", || env.count(Op::BatchCreate) == 1).await;
    first.kill();
    let _second = env.spawn(None);
    env.stalled("job", "SubmissionUnconfirmed").await;
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 0));
}

// -------------------------------------------------------------------------------------- deletion

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_goes_on_after_a_kill() {
    for at in [
        "before:CancelBatch",
        "after:CancelBatch",
        "after:DeleteInputFile",
        "before:ReleaseOutput",
        "after:ReleaseOutput",
        "before:DropFinalizer",
    ] {
        let env = Env::new().await;
        let mut first = env.spawn(Some(at));
        env.create("job", spec(&["[[sim:job=stall]]"], Some("out"))).await;
        env.until("job", "running", |j| state(j) == "Running").await;
        env.delete("job").await;
        first.ended().await;
        let _second = env.spawn(None);
        env.gone("job").await;
        assert!(env.sim.batches().iter().all(|b| b.cancelled), "{at}");
        assert!(env.sim.files().is_empty(), "{at}");
        assert!(env.config_maps().get_opt("out").await.unwrap().is_none(), "{at}");
        assert_eq!(env.count(Op::BatchCreate), 1, "{at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deletion_of_an_unconfirmed_job_goes_on_after_a_kill() {
    for at in ["before:FindToCancel", "after:FindToCancel"] {
        let env = Env::new().await;
        // It takes effect, and nobody is told; it is found when the deletion looks for it.
        env.sim.fault(once(Op::BatchCreate, Effect::Reset { commit: true }));
        env.sim.set(Switches { list_lag_seconds: 1e9, ..Switches::default() });
        let mut first = env.spawn(Some(at));
        env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
        env.stalled("job", "SubmissionUnconfirmed").await;
        env.delete("job").await;
        first.ended().await;
        env.sim.set(Switches::default());
        let _second = env.spawn(None);
        env.gone("job").await;
        assert!(env.sim.batches()[0].cancelled, "{at}");
        assert!(env.sim.files().is_empty(), "{at}");
    }
}
