//! What `/metrics` says is what happened, and names nobody.

use gemini_simulator::{Effect, Fault, Op};

use crate::harness::{Env, spec};

/// The value of a sample, by its name and labels as they are written.
fn sample(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|l| l.split_once(' ').is_some_and(|(n, _)| n == name));
    line.map_or(0.0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_was_submitted_and_what_came_of_it() {
    let env = Env::new().await;
    env.operator().await;
    env.create("plain", spec(&["a", "b [[sim:error=3]]"], None)).await;
    let plain = env.cleaned("plain").await;
    // One whose answer is lost, and which is adopted.
    let effect = Effect::Status { code: 503, commit: true, envelope: true, retry_after: None };
    env.sim.fault(Fault { op: Op::BatchCreate, contains: String::new(), skip: 0, times: 1, effect });
    env.create("lost-answer", spec(&["c"], None)).await;
    let adopted = env.cleaned("lost-answer").await;
    // One that Gemini refuses for good.
    env.create("refused", with_model("gemini-nosuch")).await;
    env.cleaned("refused").await;

    let text = env.metrics().await;
    let is = |name: &str, value: f64| {
        let seen = sample(&text, name);
        assert!((seen - value).abs() < 0.001, "{name} is {seen}, not {value}:\n{text}");
    };
    is("gemini_batch_submissions_total{outcome=\"created\"}", 1.0);
    is("gemini_batch_submissions_total{outcome=\"unknown\"}", 1.0);
    is("gemini_batch_submissions_total{outcome=\"refused\"}", 1.0);
    is("gemini_batch_unconfirmed_jobs", 0.0);
    is("gemini_batch_finished_jobs_total{reason=\"CompletedWithFailures\"}", 1.0);
    is("gemini_batch_finished_jobs_total{reason=\"Completed\"}", 1.0);
    is("gemini_batch_finished_jobs_total{reason=\"ModelNotFound\"}", 1.0);
    is("gemini_batch_job_duration_seconds_count", 3.0);
    is("gemini_batch_requests_total{outcome=\"succeeded\"}", 2.0);
    is("gemini_batch_requests_total{outcome=\"failed\"}", 2.0);
    is("gemini_batch_ends_learned_total{by=\"callback\"}", 2.0);
    is("gemini_batch_leader", 1.0);
    assert!(sample(&text, "gemini_batch_result_bytes_total{outcome=\"read\"}") > 100.0, "{text}");
    is("gemini_batch_result_bytes_total{outcome=\"stored\"}", 0.0);
    let usage =
        |job: &gemini_batch_operator::api::GeminiBatchJob| job.status.as_ref().unwrap().usage.unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a handful of tokens")]
    let prompt = (usage(&plain).prompt_tokens + usage(&adopted).prompt_tokens) as f64;
    assert!(prompt > 0.0);
    is("gemini_batch_tokens_total{model=\"gemini-2.5-flash\",kind=\"prompt\"}", prompt);
    // What dashboards for any controller look for.
    let passes = "controller_runtime_reconcile_total{controller=\"geminibatchjob\",result=\"success\"}";
    assert!(sample(&text, passes) >= 1.0, "{text}");
    assert!(text.contains("controller_runtime_active_workers{controller=\"geminibatchjob\"}"));
    assert!(text.contains("controller_runtime_reconcile_time_seconds_bucket"));

    for secret in ["test-key", "plain", "lost-answer", env.namespace.as_str()] {
        assert!(!text.contains(secret), "{secret} is a label");
    }
}

fn with_model(model: &str) -> serde_json::Value {
    let mut spec = spec(&["x"], None);
    spec["model"] = serde_json::json!(model);
    spec
}
