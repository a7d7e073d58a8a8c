//! All the ways a batch can end, and all the shapes a result file can have.

use gemini_batch_operator::api::conditions;
use gemini_simulator::{Config, Op, Switches};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::{Env, counts, is_true, line, ready, spec, state, with_input};

#[tokio::test(flavor = "multi_thread")]
async fn remote_ends_are_told_apart() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.operator().await;
    for (name, expected, reason) in [
        ("fail", "Failed", "BatchFailed"),
        ("expire", "Failed", "BatchExpired"),
        ("cancel", "Cancelled", "BatchCancelled"), // told by no event: found by the sweep
    ] {
        env.create(name, spec(&[&format!("[[sim:job={name}]]"), "b"], Some(&format!("out-{name}")))).await;
        let job = env.cleaned(name).await;
        assert_eq!((state(&job), ready(&job).1.as_str(), counts(&job)), (expected, reason, (2, 0, 2)));
        assert!(is_true(&job, conditions::FAILED) && is_true(&job, conditions::STALLED));
        let left = env.config_maps().get_opt(&format!("out-{name}")).await.unwrap();
        assert!(left.is_none(), "a reservation without results is given back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_expired_batch_had_is_collected() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["[[sim:job=expire]] [[sim:partial]]", "b", "c", "d"], Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), ready(&job).1.as_str(), counts(&job)), ("Failed", "BatchExpired", (4, 2, 2)));
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    assert_eq!(data["results.jsonl"].lines().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_joined_by_key_whatever_google_writes() {
    let env = Env::new().await;
    env.operator().await;
    let prompts = [
        "plain [[sim:shuffle]]",
        "[[sim:error=3]]",
        "[[sim:error-no-message]]",
        "[[sim:status]]",
        "[[sim:blocked]]",
        "[[sim:max-tokens]]",
        "[[sim:missing]]",
        "[[sim:duplicate]]",
        "[[sim:foreign=stranger]]",
    ];
    env.create("job", spec(&prompts, Some("out"))).await;
    let job = env.cleaned("job").await;
    // Blocked, cut off, repeated and foreign-accompanied answers are answers; the missing one is a failure.
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (9, 5, 4)));
    let (_, reason, message) = ready(&job);
    assert_eq!(reason, "CompletedWithFailures");
    for part in [
        "5 of 9 requests succeeded, 4 failed",
        "k2 (code 3)",
        "k3 (code 13)",
        "1 without any result: k7",
        "1 lines repeat a key",
        "1 lines have a key that was not sent",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    let lines: Vec<Value> = data["results.jsonl"].lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let keys: Vec<&str> = lines.iter().map(|l| l["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["k1", "k2", "k3", "k4", "k5", "k6", "k8", "k9"], "in input order");
    assert_eq!(lines[1]["error"]["code"], 3);
    assert_eq!(data["missing.jsonl"].trim(), "{\"key\":\"k7\"}");
    assert_eq!(data["unmatched.jsonl"].lines().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_success_at_all_is_a_failure_with_its_errors_kept() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["[[sim:error=3]]", "[[sim:error=14]]"], Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!(
        (state(&job), ready(&job).1.as_str(), counts(&job)),
        ("Failed", "AllRequestsFailed", (2, 0, 2))
    );
    assert!(
        env.config_maps().get("out").await.unwrap().data.unwrap()["results.jsonl"].contains("\"code\":14")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn results_too_large_for_a_config_map_wait_for_another_place() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["[[sim:big=1100000]]", "small"], Some("out"))).await;
    let job = env.stalled("job", "OutputTooLarge").await;
    assert!(!is_true(&job, conditions::FINISHED));
    assert!(job.status.as_ref().unwrap().output.as_ref().unwrap().file_name.is_some());
    assert_eq!(counts(&job), (2, 2, 0));
    assert!(ready(&job).2.contains("remove spec.output"));
    let patch = Patch::Merge(json!({"spec": {"output": null}}));
    env.jobs().patch("job", &PatchParams::default(), &patch).await.unwrap();
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded");
    assert!(job.status.unwrap().output.unwrap().file_name.is_some());
    assert!(env.config_maps().get_opt("out").await.unwrap().is_none(), "the reservation is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edited_input_is_counted_and_not_joined() {
    let env = Env::new().await;
    env.operator().await;
    env.config_map("in", &json!({"x": format!("{}\n{}", line("a", "[[sim:work=3600]]"), line("b", "y"))}))
        .await;
    env.create("job", with_input(json!({"configMap": {"name": "in", "key": "x"}}), Some("out"))).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    env.config_map("in", &json!({"x": line("c", "another")})).await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, gemini_simulator::Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)));
    assert!(ready(&job).2.contains("the input was changed after the submission"), "{}", ready(&job).2);
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    assert_eq!(data["results.jsonl"].lines().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_file_that_lags_is_waited_for() {
    let env = Env::new().await;
    env.operator().await;
    env.sim.set(Switches { output_lag_seconds: 1200.0, ..Switches::default() }); // 2 s at this speed
    env.create("job", spec(&["x"], Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)));
    assert!(env.count(Op::Download) > 1);
    assert_eq!(env.count(Op::BatchGet), 1);
}
