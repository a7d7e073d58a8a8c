//! Only what failed is sent again: which requests a further attempt carries, and what becomes of the results of all.

use gemini_batch_operator::api::{GeminiBatchJob, conditions};
use gemini_simulator::{Config, Op, Outcome};
use serde_json::{Value, json};

use crate::harness::{Env, counts, is_true, line, ready, spec, state, with_input};
use crate::lifecycle::{LONG, attempts, edit, keys, live, results, running, started, suspended, until, with};

fn retry(spec: Value, max_attempts: i32) -> Value {
    with(spec, json!({"retryPolicy": {"maxAttempts": max_attempts}}))
}

/// How many requests each batch had, in their order.
fn carried(env: &Env) -> Vec<usize> {
    env.sim.batches().iter().map(|b| b.requests).collect()
}

/// `(succeeded, failed, pending)`.
fn so_far(job: &GeminiBatchJob) -> (i64, i64, i64) {
    let r = job.status.as_ref().unwrap().requests.unwrap();
    (r.succeeded, r.failed, r.pending)
}

fn end(job: &GeminiBatchJob) -> (&str, String, (i64, i64, i64)) {
    (state(job), ready(job).1, counts(job))
}

/// Key, attempt and either the code of its error or nothing.
fn told(lines: &[Value]) -> Vec<(&str, Option<i64>, Option<i64>)> {
    lines
        .iter()
        .map(|l| {
            assert_ne!(l["response"].is_object(), l["error"].is_object(), "{l}");
            (l["key"].as_str().unwrap(), l["attempt"].as_i64(), l["error"]["code"].as_i64())
        })
        .collect()
}

async fn manifest(env: &Env) -> Value {
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    serde_json::from_str(&data["manifest.json"]).unwrap()
}

/// Waits until one batch is at work, and ends it.
async fn finish(env: &Env, job: &str, number: usize, outcome: Outcome) {
    env.until(job, "at its next attempt", |j| attempts(j).len() == number && state(j) == "Running").await;
    until("the batch at work", || live(env).iter().any(|b| b.state == "RUNNING")).await;
    assert!(env.sim.finish(&live(env)[0].name, outcome));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_ten_thousand_requests_those_137_are_sent_again_whose_error_may_pass() {
    let env = started().await;
    let lines: Vec<String> = (0..10_000)
        .map(|i| {
            let key = format!("r{i}");
            match i {
                // Four codes that may pass, spread over the file, and two that will not.
                _ if i % 73 == 5 && i < 73 * 137 => {
                    line(&key, &format!("[[sim:error={}x1]]", [4, 8, 13, 14][i % 4]))
                }
                _ if i % 500 == 499 => line(&key, &format!("[[sim:error={}]]", [3, 7][i % 2])),
                _ => line(&key, "x"),
            }
        })
        .collect();
    let of = |what: &str| lines.iter().filter(|l| l.contains(what)).count();
    assert_eq!((of("x1]]"), of("error=3]]") + of("error=7]]")), (137, 20));
    env.config_map("in", &json!({"x": lines.join("\n")})).await;
    let input = json!({"configMap": {"name": "in", "key": "x"}});
    let more = json!({"successPolicy": {"maxFailedRequests": 20}});
    env.create("job", with(retry(with_input(input, None), 5), more)).await;
    let job = env.cleaned("job").await;
    assert_eq!(
        end(&job),
        ("Succeeded", "CompletedWithFailures".to_owned(), (10_000, 9_980, 20)),
        "{:?}",
        ready(&job)
    );
    assert_eq!(carried(&env), [10_000, 137]);
    let (first, second) = (&attempts(&job)[0], &attempts(&job)[1]);
    assert_eq!((first.request_count, second.request_count), (Some(10_000), Some(137)));
    let outcome = first.outcome.as_ref().unwrap();
    assert_eq!((outcome.reason.as_str(), outcome.succeeded, outcome.failed), ("RequestsFailed", 9_843, 20));
    assert_eq!(env.count(Op::BatchCreate), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_all_attempts_are_one_and_say_which_each_came_from() {
    let env = started().await;
    let prompts =
        ["a", "b [[sim:error=14x1]]", "c [[sim:error=3]]", "d [[sim:error=13x2]]", "e [[sim:error=8]]"];
    env.create("job", retry(spec(&prompts, Some("out")), 3)).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (5, 3, 2)), "{:?}", ready(&job));
    assert_eq!(carried(&env), [5, 3, 2]);
    let lines = results(&env).await;
    assert_eq!(
        told(&lines),
        [
            ("k1", Some(1), None),
            ("k2", Some(2), None),
            ("k3", Some(1), Some(3)),
            ("k4", Some(3), None),
            ("k5", Some(3), Some(8)),
        ]
    );
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    assert!(!data.contains_key("unmatched.jsonl") && !data.contains_key("missing.jsonl"), "{data:?}");
    let manifest = manifest(&env).await;
    let tally: Vec<_> = manifest["attempts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| ["number", "requests", "succeeded", "failed"].map(|field| a[field].as_i64().unwrap()))
        .collect();
    assert_eq!(tally, [[1, 5, 1, 1], [2, 3, 1, 0], [3, 2, 1, 1]]);
    let batches: Vec<_> = env.sim.batches().into_iter().map(|b| json!(b.name)).collect();
    assert!(manifest["attempts"].as_array().unwrap().iter().map(|a| &a["batch"]).eq(&batches));
    // Each is named with its last error, and what all of them cost is counted.
    for part in ["3 of 5 requests succeeded, 2 failed", "k3 (code 3)", "k5 (code 8)"] {
        assert!(ready(&job).2.contains(part), "{part}: {}", ready(&job).2);
    }
    let tokens = |l: &Value| l["response"]["usageMetadata"]["totalTokenCount"].as_i64();
    let usage = job.status.as_ref().unwrap().usage.unwrap().total_tokens;
    assert_eq!(usage, lines.iter().filter_map(tokens).sum::<i64>());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_again_unasked() {
    let env = started().await;
    let prompts = ["a", "b [[sim:error=14]]", "c [[sim:error=4]]", "d [[sim:status]]"];
    for (name, policy) in [
        ("none", Value::Null),
        ("one", json!({"maxAttempts": 1})),
        ("others", json!({"maxAttempts": 5, "codes": ["RESOURCE_EXHAUSTED", "CANCELLED"]})),
    ] {
        let before = env.sim.batches().len();
        env.create(name, with(spec(&prompts, None), json!({"retryPolicy": policy}))).await;
        let job = env.cleaned(name).await;
        assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (4, 1, 3)), "{name}");
        assert_eq!(env.sim.batches().len() - before, 1, "{name}");
    }
    // A job with one attempt is stored as ever.
    env.create("single", retry(spec(&["a", "b [[sim:error=3]]"], Some("out")), 5)).await;
    env.cleaned("single").await;
    assert_eq!(told(&results(&env).await), [("k1", None, None), ("k2", None, Some(3))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_without_a_code_is_an_unknown_one() {
    let env = started().await;
    let policy = json!({"retryPolicy": {"maxAttempts": 2, "codes": ["UNKNOWN"]}});
    env.create("job", with(spec(&["a", "[[sim:status]]", "c [[sim:error=14]]"], None), policy)).await;
    assert_eq!(counts(&env.cleaned("job").await), (3, 1, 2));
    assert_eq!(carried(&env), [3, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_tries_are_used_up_the_results_are_what_they_are() {
    let env = started().await;
    env.create("all", retry(spec(&["[[sim:error=14]]", "[[sim:error=14]]"], Some("out")), 3)).await;
    let job = env.cleaned("all").await;
    assert_eq!(end(&job), ("Failed", "AllRequestsFailed".to_owned(), (2, 0, 2)));
    assert_eq!(carried(&env), [2, 2, 2]);
    assert_eq!(told(&results(&env).await), [("k1", Some(3), Some(14)), ("k2", Some(3), Some(14))]);
    // How many may fail is asked at the end.
    for (name, limit, expected) in
        [("good", "0%", ("Succeeded", "Completed")), ("bad", "49%", ("Failed", "TooManyFailedRequests"))]
    {
        let failing = if name == "good" { "[[sim:error=14x2]]" } else { "[[sim:error=14]]" };
        let more = json!({"successPolicy": {"maxFailedRequests": limit}});
        env.create(name, with(retry(spec(&[name, failing], None), 3), more)).await;
        let job = env.cleaned(name).await;
        assert_eq!((state(&job), ready(&job).1.as_str()), expected, "{:?}", ready(&job));
        assert_eq!(attempts(&job).len(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_without_any_result_are_sent_again_as_well() {
    let env = started().await;
    env.create("job", retry(spec(&["a", "b [[sim:missing]]", "c [[sim:error=3]]"], Some("out")), 2)).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (3, 1, 2)));
    assert_eq!(carried(&env), [3, 1]);
    let data = env.config_maps().get("out").await.unwrap().data.unwrap();
    assert_eq!(data["missing.jsonl"].trim(), "{\"key\":\"k2\"}");
}

// --------------------------------------------------------------------- batches that did not end well

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_follows_an_expired_one_carries_its_failed_requests_too() {
    let env = started().await;
    // Half of it has lines: a response, an error that may pass, and one that will not.
    let prompts = [
        "[[sim:job=expire]] [[sim:partial]]",
        "b [[sim:error=14x1]]",
        "c [[sim:error=3]]",
        "d",
        "e",
        "f [[sim:error=14x2]]",
    ];
    let both = json!({"backoffLimit": 1, "retryPolicy": {"maxAttempts": 3}});
    env.create("job", with(spec(&prompts, Some("out")), both)).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (6, 5, 1)), "{:?}", ready(&job));
    // The last of them failed in the second batch first; twice in all.
    assert_eq!(carried(&env), [6, 4, 1]);
    let reasons: Vec<_> = attempts(&job).iter().filter_map(|a| Some(a.outcome.clone()?.reason)).collect();
    assert_eq!(reasons, ["BatchExpired", "RequestsFailed"]);
    assert_eq!(
        told(&results(&env).await),
        [
            ("k1", Some(1), None),
            ("k2", Some(2), None),
            ("k3", Some(1), Some(3)),
            ("k4", Some(2), None),
            ("k5", Some(2), None),
            ("k6", Some(3), None),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_batch_is_the_matter_of_another_limit() {
    let env = started().await;
    let prompts = ["[[sim:job=expire]] [[sim:partial]]", "b [[sim:error=14]]", "c", "d"];
    // As many tries as there were: the next batch carries what is missing, and nothing that failed.
    let both = json!({"backoffLimit": 1, "retryPolicy": {"maxAttempts": 1}});
    env.create("both", with(spec(&prompts, None), both)).await;
    assert_eq!(counts(&env.cleaned("both").await), (4, 3, 1));
    assert_eq!(carried(&env), [4, 2]);
    env.create("job", retry(spec(&prompts, Some("out")), 5)).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Failed", "BatchExpired".to_owned(), (4, 1, 3)));
    assert_eq!(carried(&env), [4, 2, 4]);
    assert_eq!(told(&results(&env).await), [("k1", None, None), ("k2", None, Some(14))]);
}

/// What was answered before is not lost, whatever becomes of the batch that was to better it.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_comes_to_nothing_takes_nothing_away() {
    for outcome in [Outcome::Expired, Outcome::Failed, Outcome::Cancelled] {
        let env = started().await;
        env.create("job", retry(spec(&["a", &format!("[[sim:error=14]] {LONG}")], Some("out")), 5)).await;
        finish(&env, "job", 1, Outcome::Succeeded).await;
        finish(&env, "job", 2, outcome).await;
        let job = env.cleaned("job").await;
        assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (2, 1, 1)), "{outcome:?}");
        assert!(ready(&job).2.contains("attempt 2"), "{outcome:?}: {}", ready(&job).2);
        assert_eq!(carried(&env), [2, 1]);
        let lines = results(&env).await;
        assert_eq!(keys(&lines), ["k1", "k2"], "{outcome:?}");
        assert_eq!(lines[1]["error"]["code"], 14, "its last error is kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_tries_and_not_the_job() {
    let env = started().await;
    env.create("job", retry(spec(&["a", &format!("[[sim:error=14]] {LONG}")], Some("out")), 5)).await;
    finish(&env, "job", 1, Outcome::Succeeded).await;
    env.until("job", "at its second attempt", |j| attempts(j).len() == 2 && state(j) == "Running").await;
    edit(&env, "job", json!({"activeDeadlineSeconds": 1})).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (2, 1, 1)), "{:?}", ready(&job));
    assert!(ready(&job).2.contains("activeDeadlineSeconds"), "{}", ready(&job).2);
    assert!(env.sim.batches()[1].cancelled);
}

// ------------------------------------------------------------------------------- held, and edited

/// A job whose first batch has ended, and whose second is held.
async fn between_attempts(prompts: &[&str], more: Value) -> (Env, GeminiBatchJob) {
    let env = started().await;
    env.create("job", with(retry(spec(prompts, Some("out")), 3), more)).await;
    running(&env, "job").await;
    until("the batch at work", || live(&env).iter().any(|b| b.state == "RUNNING")).await;
    edit(&env, "job", json!({"suspend": true})).await;
    env.until("job", "told", |j| ready(j).2.contains("It may finish")).await;
    assert!(env.sim.finish(&live(&env)[0].name, Outcome::Succeeded));
    let job = suspended(&env, "job").await;
    assert_eq!(attempts(&job)[0].outcome.as_ref().unwrap().reason, "RequestsFailed");
    (env, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_can_be_read_until_it_is_replaced() {
    let prompts = [&format!("a {LONG}"), "b [[sim:error=14x1]]", "c [[sim:error=3]]"];
    let (env, job) = between_attempts(&prompts, json!({})).await;
    assert_eq!(so_far(&job), (1, 1, 1), "what is sent again is not counted as failed yet");
    assert_eq!(
        told(&results(&env).await),
        [("k1", None, None), ("k2", None, Some(14)), ("k3", None, Some(3))]
    );
    edit(&env, "job", json!({"suspend": false})).await;
    let job = env.cleaned("job").await;
    assert_eq!(counts(&job), (3, 2, 1));
    assert_eq!(
        told(&results(&env).await),
        [("k1", Some(1), None), ("k2", Some(2), None), ("k3", Some(1), Some(3))]
    );
    assert_eq!(carried(&env), [3, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_changed_in_time_spends_nothing_more() {
    for policy in [json!(null), json!({"maxAttempts": 1}), json!({"codes": ["ABORTED"]})] {
        let (env, _) = between_attempts(&[&format!("a {LONG}"), "b [[sim:error=14]]"], json!({})).await;
        edit(&env, "job", json!({"suspend": false, "retryPolicy": policy})).await;
        let job = env.cleaned("job").await;
        assert_eq!(
            end(&job),
            ("Succeeded", "CompletedWithFailures".to_owned(), (2, 1, 1)),
            "{policy}: {:?}",
            ready(&job)
        );
        assert!(is_true(&job, conditions::COMPLETE));
        assert_eq!(carried(&env), [2], "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_moved_is_not_mixed_with_the_results() {
    let env = started().await;
    env.config_map("in", &json!({"x": format!("{}\n{}", line("a", LONG), line("b", "[[sim:error=14]]"))}))
        .await;
    let input = json!({"configMap": {"name": "in", "key": "x"}});
    env.create("job", with(retry(with_input(input, None), 3), json!({"suspendPolicy": "Drain"}))).await;
    running(&env, "job").await;
    until("the batch at work", || live(&env).iter().any(|b| b.state == "RUNNING")).await;
    edit(&env, "job", json!({"suspend": true})).await;
    env.until("job", "told", |j| ready(j).2.contains("It may finish")).await;
    assert!(env.sim.finish(&live(&env)[0].name, Outcome::Succeeded));
    suspended(&env, "job").await;
    env.config_map("in", &json!({"x": line("another", "y")})).await;
    edit(&env, "job", json!({"suspend": false})).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (2, 1, 1)));
    assert!(ready(&job).2.contains("its input is not the one"), "{}", ready(&job).2);
    assert_eq!(carried(&env), [2]);
}

/// A suspension that cancels is no try: the same requests are sent again.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_suspension_broke_off_goes_on() {
    let env = started().await;
    let prompts = ["a", &format!("b [[sim:error=14x1]] {LONG}")];
    let more = json!({"retryPolicy": {"maxAttempts": 2}, "suspendPolicy": "Cancel"});
    env.create("job", with(spec(&prompts, Some("out")), more)).await;
    finish(&env, "job", 1, Outcome::Succeeded).await;
    env.until("job", "at its second attempt", |j| attempts(j).len() == 2 && state(j) == "Running").await;
    edit(&env, "job", json!({"suspend": true})).await;
    let job = suspended(&env, "job").await;
    assert_eq!(so_far(&job), (1, 0, 1));
    edit(&env, "job", json!({"suspend": false})).await;
    finish(&env, "job", 3, Outcome::Succeeded).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "Completed".to_owned(), (2, 2, 0)));
    assert_eq!(carried(&env), [2, 1, 1]);
    assert_eq!(told(&results(&env).await), [("k1", Some(1), None), ("k2", Some(3), None)]);
}

/// Results that were stored before and results that are with Gemini only count together.
#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_is_taken_away_in_between_pays_for_nothing_twice() {
    let prompts = [&format!("a {LONG}"), "b [[sim:error=14x1]]", "c [[sim:error=14x2]]"];
    let (env, _) = between_attempts(&prompts, json!({})).await;
    edit(&env, "job", json!({"suspend": false, "output": null})).await;
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "Completed".to_owned(), (3, 3, 0)), "{:?}", ready(&job));
    assert_eq!(carried(&env), [3, 2, 1]);
}

// ------------------------------------------------------------------------------------- crashes

/// Dies at the step, starts again, and must end right, with each request paid for as often as it was sent.
async fn survives(at: &str) {
    for output in [Some("out"), None] {
        let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
        let mut first = env.spawn(Some(at));
        let prompts = ["a", "b [[sim:error=14x1]]", "c [[sim:error=8x1]]", "d [[sim:error=3]]"];
        env.create("job", retry(spec(&prompts, output), 3)).await;
        first.ended().await;
        let _second = env.spawn(None);
        let job = env.cleaned("job").await;
        let expected = ("Succeeded", "CompletedWithFailures".to_owned(), (4, 3, 1));
        assert_eq!(end(&job), expected, "{at} {output:?}: {:?}", ready(&job));
        assert_eq!((carried(&env), env.count(Op::BatchCreate)), (vec![4, 2], 2), "{at} {output:?}");
        assert!(!ready(&job).2.contains("repeat"), "{at}: {}", ready(&job).2);
        if output.is_some() {
            let lines = results(&env).await;
            assert_eq!(
                told(&lines),
                [
                    ("k1", Some(1), None),
                    ("k2", Some(2), None),
                    ("k3", Some(2), None),
                    ("k4", Some(1), Some(3))
                ],
                "{at}"
            );
            let tokens = |l: &Value| l["response"]["usageMetadata"]["totalTokenCount"].as_i64();
            let usage = job.status.as_ref().unwrap().usage.unwrap().total_tokens;
            assert_eq!(usage, lines.iter().filter_map(tokens).sum::<i64>(), "{at}: nothing is counted twice");
            let data = env.config_maps().get("out").await.unwrap().data.unwrap();
            assert!(!data.contains_key("unmatched.jsonl"), "{at}: {data:?}");
        }
    }
}

macro_rules! at {
    ($($name:ident: $step:literal),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            survives($step).await;
        }
    )*};
}

at! {
    after_the_first_results_are_read: "after:Collect",
    before_the_attempt_is_over: "before:AttemptEnded",
    after_the_attempt_is_over: "after:AttemptEnded",
    after_the_second_intent: "after:Intent@2",
    after_the_second_create: "after:CreateBatch@2",
    after_the_second_results_are_read: "after:Collect@2",
    before_the_end_is_recorded: "before:Finished",
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_results_are_not_counted_twice_after_a_crash() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    let mut first = env.spawn(Some("after:StoreResults@2"));
    env.create("job", retry(spec(&["a", "b [[sim:error=14x1]]", "c [[sim:error=14]]"], Some("out")), 2))
        .await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!(end(&job), ("Succeeded", "CompletedWithFailures".to_owned(), (3, 2, 1)));
    assert_eq!(carried(&env), [3, 2]);
    assert_eq!(
        told(&results(&env).await),
        [("k1", Some(1), None), ("k2", Some(2), None), ("k3", Some(2), Some(14))]
    );
    assert!(!ready(&job).2.contains("repeat"), "{}", ready(&job).2);
}
