//! The answer to a create is lost: the batch is looked for and adopted, and never asked for again.

use gemini_batch_operator::api::conditions;
use gemini_simulator::{Config, Effect, Fault, Op, Outcome, Switches};

use crate::harness::{Env, is_true, ready, spec, state};

async fn create_answered_with(effect: Effect) {
    let env = Env::new().await;
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator().await;
    env.create("job", spec(&["x"], Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
}

fn status(code: u16) -> Effect {
    Effect::Status { code, commit: true, envelope: true, retry_after: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_503_after_the_batch_was_created() {
    create_answered_with(status(503)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_408_after_the_batch_was_created() {
    create_answered_with(status(408)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_after_the_batch_was_created() {
    create_answered_with(Effect::Reset { commit: true }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_answer() {
    create_answered_with(Effect::Truncate).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_without_googles_envelope_is_no_refusal() {
    create_answered_with(Effect::Status { code: 400, commit: true, envelope: false, retry_after: None })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_commits_late_is_found_later() {
    create_answered_with(Effect::CommitLate { seconds: 600.0 }).await; // one second at this speed
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_created_stays_unconfirmed_and_is_not_sent_again() {
    let env = Env::new().await;
    let effect = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator().await;
    env.create("job", spec(&["x"], None)).await;
    let job = env.stalled("job", "SubmissionUnconfirmed").await;
    assert!(ready(&job).2.contains("so that a late creation must fail, and only then it is sent again"));
    // It goes on looking, and does not send.
    let lists = env.count(Op::BatchList);
    env.until_asked(Op::BatchList, lists + 2).await;
    assert_eq!(env.count(Op::BatchCreate), 1);
    // Deleted: list, delete the file, list again, go.
    env.delete("job").await;
    env.gone("job").await;
    assert!(env.sim.files().is_empty());
    let ops = env.ops();
    let deleted = ops.iter().rposition(|o| *o == Op::FileDelete).unwrap();
    assert!(ops[..deleted].contains(&Op::BatchList) && ops[deleted..].contains(&Op::BatchList), "{ops:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callback_before_the_name_is_stored_is_not_lost() {
    let env = Env::with(Config { speed: 6000.0, ..Config::default() }, &[]).await;
    let effect = Effect::DelayAnswer { millis: 1500 };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator().await;
    env.create("job", spec(&["x"], None)).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), env.sim.batches().len()), ("Succeeded", 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_is_waited_for() {
    let env = Env::new().await;
    for op in [Op::UploadStart, Op::BatchCreate] {
        let effect = Effect::Status { code: 429, commit: false, envelope: true, retry_after: None };
        env.sim.fault(Fault { op, contains: String::new(), skip: 0, times: 1, effect });
    }
    let mut timings = crate::harness::timings();
    timings.quota_first = jiff::SignedDuration::from_secs(2);
    timings.quota_longest = jiff::SignedDuration::from_secs(2);
    env.operator_with(timings).await;
    env.create("job", spec(&["x"], None)).await;
    let queued = env.until("job", "queued", |j| state(j) == "Queued").await;
    assert_eq!(ready(&queued).1, "WaitingForQuota");
    assert!(!is_true(&queued, conditions::STALLED));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (2, 1));
    // The file of the send that was refused served the next one.
    assert_eq!(env.count(Op::UploadStart), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_name_that_is_not_honoured_is_recorded_before_the_create() {
    let env = Env::new().await;
    env.sim.set(Switches { honour_file_name: false, ..Switches::default() });
    env.operator().await;
    env.create("job", spec(&["x"], None)).await;
    let job = env.cleaned("job").await;
    assert_eq!(job.status.unwrap().attempts[0].input_file, env.sim.batches()[0].file.clone().unwrap());
    assert!(env.sim.files().is_empty(), "it is deleted under the name that it got");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_last_answer_is_lost_is_not_repeated() {
    let env = Env::new().await;
    let effect = Effect::Reset { commit: true };
    env.sim.fault(Fault { op: Op::UploadChunk, contains: String::new(), skip: 0, times: 1, effect });
    env.operator().await;
    env.create("job", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!(env.count(Op::UploadStart), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_key_than_the_one_that_paid_proves_nothing() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    env.secret("gemini", &serde_json::json!({"apiKey": "of-another-project"})).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    let job = env.stalled("job", "CredentialsChanged").await;
    assert_eq!(state(&job), "Running");
    env.secret("gemini", &serde_json::json!({"apiKey": "test-key"})).await;
    assert_eq!(state(&env.finished("job").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_another_key_was_not_shown_is_asked_for_with_the_old_one() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.operator().await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    env.secret("gemini", &serde_json::json!({"apiKey": "of-another-project"})).await;
    env.stalled("job", "CredentialsChanged").await;
    // Asked for so often that with its own key it would count as gone.
    let gets = env.count(Op::BatchGet);
    env.until_asked(Op::BatchGet, gets + 5).await;
    env.secret("gemini", &serde_json::json!({"apiKey": "test-key"})).await;
    let job = env.until("job", "running again", |j| ready(j).1 == "Submitted").await;
    assert!(!is_true(&job, conditions::FINISHED));
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    assert_eq!(state(&env.finished("job").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unconfirmed_job_that_is_deleted_with_another_key_says_that_its_batch_may_go_on() {
    let env = Env::new().await;
    let effect = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator().await;
    let mut spec = spec(&["x"], None);
    spec["deletionTimeoutSeconds"] = serde_json::json!(3);
    env.create("job", spec).await;
    env.stalled("job", "SubmissionUnconfirmed").await;
    env.secret("gemini", &serde_json::json!({"apiKey": "of-another-project"})).await;
    env.stalled("job", "CredentialsChanged").await;
    env.delete("job").await;
    env.gone("job").await;
    assert_eq!(env.sim.files().len(), 1, "another key can't delete it");
    let events: kube::Api<k8s_openapi::api::events::v1::Event> =
        kube::Api::namespaced(env.client.clone(), &env.namespace);
    let start = std::time::Instant::now();
    loop {
        let all = events.list(&kube::api::ListParams::default()).await.unwrap();
        if all.items.iter().any(|e| e.reason.as_deref() == Some("Orphaned")) {
            break;
        }
        assert!(start.elapsed() < crate::harness::PATIENCE, "nobody is told");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_job_whose_secret_is_gone_can_be_deleted_at_once() {
    let env = Env::new().await;
    let effect = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    // The input file can't be deleted, so the finalizer stays for a while.
    env.sim.fault(Fault { op: Op::FileDelete, contains: String::new(), skip: 0, times: 2, effect });
    let mut timings = crate::harness::timings();
    timings.result_pauses = vec![jiff::SignedDuration::from_hours(1)];
    env.operator_with(timings).await;
    env.create("job", spec(&["x"], None)).await;
    env.finished("job").await;
    let secrets: kube::Api<k8s_openapi::api::core::v1::Secret> =
        kube::Api::namespaced(env.client.clone(), &env.namespace);
    secrets.delete("gemini", &kube::api::DeleteParams::default()).await.unwrap();
    env.delete("job").await;
    env.gone("job").await;
}

// --------------------------------------------------------------------------- sent again, behind a fence

/// Three listings and a second are patience enough for these tests.
fn hasty() -> gemini_batch_operator::controller::Timings {
    let mut timings = crate::harness::timings();
    timings.resend_grace = jiff::SignedDuration::from_secs(1);
    timings
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_created_is_sent_again_behind_a_fence() {
    let env = Env::new().await;
    let effect = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator_with(hasty()).await;
    env.create("job", spec(&["x"], Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (2, 1));
    assert_eq!(job.status.unwrap().attempts[0].resends, Some(1));
    // Listed at least three times, the file deleted and seen gone, listed once more, and only then sent.
    let ops = env.ops();
    let second = ops.iter().rposition(|o| *o == Op::UploadStart).unwrap();
    let fence = ops.iter().position(|o| *o == Op::FileDelete).unwrap();
    let listings = |ops: &[Op]| ops.iter().filter(|o| **o == Op::BatchList).count();
    assert!(listings(&ops[..fence]) >= 3, "{ops:?}");
    assert_eq!(ops[fence + 1], Op::FileGet, "{ops:?}");
    assert!(fence < second && listings(&ops[fence..second]) == 1, "{ops:?}");
    assert!(env.metrics().await.contains("gemini_batch_submissions_fenced_total 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_arrives_behind_the_fence_makes_no_batch() {
    let env = Env::new().await;
    let effect = Effect::CommitLate { seconds: 6000.0 }; // ten seconds at this speed, the grace is one
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator_with(hasty()).await;
    let start = std::time::Instant::now();
    env.create("job", spec(&["x"], None)).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    while start.elapsed() < std::time::Duration::from_secs(12) {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await; // the late create itself
    }
    assert_eq!(env.sim.batches().len(), 1);
}

/// Half a second before the fence, and no listing shows it until nearly half a second after: found by `make chaos`.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_created_right_before_the_fence_is_found_although_listings_lag() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.sim.set(Switches { list_lag_seconds: 540.0, ..Switches::default() }); // 0.9 s at this speed
    let effect = Effect::CommitLate { seconds: 300.0 }; // 0.5 s, the grace is one second
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator_with(hasty()).await;
    env.create("job", spec(&["x [[sim:no-event]]"], None)).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
}

/// The same, and the controller is killed right behind the fence: the next one must not take the missing file for one
/// that was never uploaded.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_created_right_before_the_fence_is_found_after_a_kill_behind_it() {
    let flags = [
        "--sweep-seconds=1",
        "--lease-retry-seconds=1",
        "--lease-renew-deadline-seconds=2",
        "--lease-seconds=3",
        "--create-timeout-seconds=1",
        "--resend-grace-seconds=5",
    ];
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &flags).await;
    // Three listings take 15 seconds, and then comes the fence.
    env.sim.set(Switches { list_lag_seconds: 6000.0, ..Switches::default() }); // 10 s at this speed
    let effect = Effect::CommitLate { seconds: 7800.0 }; // 13 s
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    let mut first = env.spawn(Some("after:Fence"));
    env.create("job", spec(&["x [[sim:no-event]]"], None)).await;
    first.ended().await;
    let _second = env.spawn(None);
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
}

/// If Gemini did not check the file of a late create after all, its batch is found and cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_that_passed_the_fence_is_cancelled() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.sim.set(Switches { create_needs_file: false, ..Switches::default() });
    let effect = Effect::CommitLate { seconds: 6000.0 };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.operator_with(hasty()).await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    let job = env.until("job", "running", |j| state(j) == "Running").await;
    let recorded = job.status.unwrap().attempts[0].batch_name.clone().unwrap();
    let start = std::time::Instant::now();
    while !env.sim.batches().iter().any(|b| b.cancelled) {
        assert!(start.elapsed() < crate::harness::PATIENCE, "{:#?}", env.sim.batches());
        tokio::task::yield_now().await;
    }
    let batches = env.sim.batches();
    assert_eq!(batches.len(), 2);
    assert!(batches.iter().all(|b| b.cancelled == (b.name != recorded)), "{batches:#?}");
    assert!(env.sim.finish(&recorded, Outcome::Succeeded));
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
}
