//! From apply to results, what it costs, and what is left behind.

use std::collections::BTreeMap;

use futures::future::join_all;
use gemini_batch_operator::api::{FINALIZER, conditions};
use gemini_simulator::{Config, Op, Outcome};
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};

use crate::harness::{Env, condition, counts, is_true, line, ready, spec, state, with_input};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_from_apply_to_results_at_the_promised_cost() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["one", "two", "three"], Some("out"))).await;
    let job = env.cleaned("job").await;

    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 3, 0)));
    assert_eq!(ready(&job), ("True".into(), "Completed".into(), "all 3 requests succeeded".into()));
    assert!(is_true(&job, conditions::COMPLETE) && is_true(&job, conditions::SUBMITTED));
    let status = job.status.clone().unwrap();
    assert_eq!(status.observed_generation, job.metadata.generation);
    assert!(status.usage.unwrap().total_tokens > 0);
    assert!(status.start_time.is_some() && status.completion_time.is_some());

    // Results, in input order.
    let map = env.config_maps().get("out").await.unwrap();
    assert!(map.metadata.owner_references.is_none(), "results must outlive the job");
    let data = map.data.unwrap();
    let keys: Vec<String> = data["results.jsonl"]
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["key"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(keys, ["k1", "k2", "k3"]);
    let manifest: Value = serde_json::from_str(&data["manifest.json"]).unwrap();
    assert_eq!(manifest["requests"]["succeeded"], 3);

    // Gemini: upload, create, no GET while it runs, one GET, one download, one deletion.
    assert_eq!(
        env.ops(),
        [Op::UploadStart, Op::UploadChunk, Op::BatchCreate, Op::BatchGet, Op::Download, Op::FileDelete]
    );
    let create = env.log().into_iter().find(|e| e.op == Op::BatchCreate).unwrap();
    let uri = create.body.unwrap()["batch"]["webhookConfig"]["uris"][0].as_str().unwrap().to_owned();
    let prefix = format!("http://127.0.0.1:{}/v1/callbacks/{}/job/", env.port, env.namespace);
    assert!(uri.starts_with(&prefix), "{uri}");
    assert!(env.sim.files().is_empty());

    // Kubernetes: counted by the API server. The finalizer's removal comes after the end.
    let mut writes: BTreeMap<String, usize> = BTreeMap::new();
    for (resource, _) in env.audited_writes() {
        *writes.entry(resource).or_default() += 1;
    }
    let until_terminal = writes["geminibatchjobs"] + writes["hints"] + writes["configmaps"] - 1;
    assert!(until_terminal <= 7, "{writes:?}");
    assert_eq!(writes["events"], 2, "{writes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_output_results_stay_with_gemini_and_five_writes_do() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["one"], None)).await;
    let job = env.cleaned("job").await;
    let output = job.status.clone().unwrap().output.unwrap();
    let batch = job.status.unwrap().attempts[0].batch_name.clone().unwrap();
    assert_eq!(output.file_name.unwrap(), format!("files/batch-{}", batch.trim_start_matches("batches/")));
    assert!(
        output.expiration_time.is_some() && output.bytes.unwrap() > 0 && output.sha256.unwrap().len() == 64
    );
    let writes = env
        .audited_writes()
        .into_iter()
        .filter(|(resource, _)| resource != "events" && resource != "secrets");
    assert!(writes.count() - 1 <= 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_come_from_a_config_map_too() {
    let env = Env::new().await;
    env.operator().await;
    let lines: Vec<String> = (0..100).map(|i| line(&format!("q{i}"), &format!("question {i}"))).collect();
    env.config_map("in", &json!({"requests.jsonl": lines.join("\n")})).await;
    env.create("job", with_input(json!({"configMap": {"name": "in", "key": "requests.jsonl"}}), Some("out")))
        .await;
    assert_eq!(counts(&env.finished("job").await), (100, 100, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_somebody_else_is_used_counted_and_left_alone() {
    let env = Env::new().await;
    env.operator().await;
    // Somebody else's upload, by hand.
    let http = reqwest::Client::new();
    let start = http
        .post(format!("{}/upload/v1beta/files", env.sim.base_url()))
        .header("x-goog-api-key", "test-key")
        .header("x-goog-upload-protocol", "resumable")
        .header("x-goog-upload-command", "start")
        .body(json!({"file": {"name": "files/theirs"}}).to_string())
        .send()
        .await
        .unwrap();
    let url = start.headers()["x-goog-upload-url"].to_str().unwrap().to_owned();
    let upload = http
        .post(url)
        .header("x-goog-upload-command", "upload, finalize")
        .header("x-goog-upload-offset", "0");
    upload.body(format!("{}\n{}\n", line("a", "x"), line("b", "y"))).send().await.unwrap();

    env.create("job", with_input(json!({"geminiFile": {"name": "files/theirs"}}), Some("out"))).await;
    let job = env.cleaned("job").await;
    assert_eq!(counts(&job), (2, 2, 0));
    assert_eq!(env.sim.files(), ["files/theirs"]);
    assert!(env.config_maps().get("out").await.unwrap().data.unwrap()["results.jsonl"].contains("\"a\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_users_select_and_watch_works() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &[]).await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    // Untouched: kstatus must not call it current, and a field selector must find it.
    let fresh = env.jobs().get("job").await.unwrap();
    assert_eq!(fresh.status.as_ref().unwrap().observed_generation, Some(-1));
    let selected = |state: &str| {
        let (jobs, params) = (env.jobs(), ListParams::default().fields(&format!("status.state={state}")));
        async move { jobs.list(&params).await.unwrap().items.len() }
    };
    assert_eq!(selected("Pending").await, 1);

    env.operator().await;
    let job = env.until("job", "running", |j| state(j) == "Running").await;
    assert!(is_true(&job, conditions::RECONCILING) && !is_true(&job, conditions::FINISHED));
    assert_eq!(selected("Running").await, 1);
    let batch = job.status.unwrap().attempts[0].batch_name.clone().unwrap();
    assert!(env.sim.finish(&batch, Outcome::Succeeded));
    let job = env.cleaned("job").await;
    assert_eq!(selected("Succeeded").await, 1);
    for condition in job.status.unwrap().conditions {
        assert_eq!(condition.observed_generation, job.metadata.generation, "{}", condition.type_);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_callback_does_not_hang_a_job() {
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &["--sweep-seconds=1"]).await;
    env.operator().await;
    env.create("a", spec(&["[[sim:no-event]]"], None)).await;
    env.create("b", spec(&["[[sim:no-event]]"], None)).await;
    assert_eq!(state(&env.finished("a").await), "Succeeded");
    assert_eq!(state(&env.finished("b").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_or_lying_callback_changes_nothing_but_makes_us_look() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    let job = env.until("job", "running", |j| state(j) == "Running").await;
    let batch = env.sim.batches()[0].clone();
    assert_eq!(env.sim.deliver(&batch.name, &batch.uris[0], "batch.succeeded").await, Some(200));
    let job = env
        .until("job", "done looking", |j| {
            let s = j.status.as_ref().unwrap();
            s.callback.as_ref().is_some_and(|c| s.attempts[0].observed_hint == Some(c.hint()))
                && s.observed_generation == job.metadata.generation
        })
        .await;
    assert_eq!(state(&job), "Running");
    assert_eq!(env.count(Op::BatchGet), 4, "at once and after each of the three pauses");
    assert!(env.sim.finish(&batch.name, Outcome::Succeeded));
    assert_eq!(state(&env.finished("job").await), "Succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_cancels_and_leaves_nothing_behind() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["[[sim:job=stall]]"], Some("out"))).await;
    let job = env.until("job", "running", |j| state(j) == "Running").await;
    assert!(job.finalizers().iter().any(|f| f == FINALIZER));
    env.delete("job").await;
    env.gone("job").await;
    assert!(env.sim.batches()[0].cancelled);
    assert!(env.sim.files().is_empty());
    assert!(env.config_maps().get_opt("out").await.unwrap().is_none(), "the empty reservation is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_created_anew_is_not_touched_by_the_old_ones_callback() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    let old = env.sim.batches()[0].clone();
    env.delete("job").await;
    env.gone("job").await;
    env.create("job", spec(&["[[sim:job=stall]]"], None)).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    let gets = env.count(Op::BatchGet);
    // Verified, of a job that is gone: acknowledged, and not written to its successor.
    assert_eq!(env.sim.deliver(&old.name, &old.uris[0], "batch.succeeded").await, Some(200));
    let job = env.jobs().get("job").await.unwrap();
    assert!(job.status.unwrap().callback.is_none());
    assert_eq!(env.count(Op::BatchGet), gets);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_jobs_at_once_cost_what_one_costs_each() {
    let config = Config { speed: 60.0, max_active: 1000, ..Config::default() };
    // No sweep stands in for a callback that got lost in the crowd.
    let env = Env::with(config, &["--sweep-seconds=86400"]).await;
    env.operator().await;
    let jobs: Vec<String> = (0..200).map(|i| format!("job-{i}")).collect();
    join_all(jobs.iter().map(|name| env.create(name, spec(&["hello"], None)))).await;
    for name in &jobs {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded");
    }
    for op in [Op::UploadStart, Op::UploadChunk, Op::BatchCreate, Op::BatchGet, Op::Download, Op::FileDelete]
    {
        assert_eq!(env.count(op), 200, "{op:?}");
    }
    assert_eq!(env.count(Op::BatchList), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_after_the_end_is_observed() {
    let env = Env::new().await;
    env.operator().await;
    env.create("job", spec(&["x"], None)).await;
    env.cleaned("job").await;
    // The output of a finished job can't be changed, but its deletion needs no operator any more.
    env.jobs().delete("job", &DeleteParams::default()).await.unwrap();
    env.gone("job").await;
    assert!(condition(&env.create("job2", spec(&["y"], None)).await, "Ready").is_none());
}
