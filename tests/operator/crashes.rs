//! The operator is killed at each step, and started again.

use gemini_simulator::Op;

use crate::harness::{Env, counts, ready, spec, state};

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
