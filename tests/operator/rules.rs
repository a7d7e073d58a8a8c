//! Every rule of the schema, as pairs: what is accepted, and what is refused with which words.

use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::{Env, line, spec, with_input};

fn changed(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = spec(&["x"], Some("out"));
    change(&mut spec);
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn specs_are_accepted_and_refused() {
    let env = Env::new().await;
    let long =
        json!({"key": "a", "request": {"contents": [{"parts": [{"text": "x"}]}], "anything": {"goes": 1}}});
    let accepted = [
        changed(|_| {}),
        changed(|s| s["model"] = json!("models/gemini-2.5-flash")),
        changed(|s| s["model"] = json!("tunedModels/mine-1")),
        changed(|s| s["input"] = json!({"requests": [long]})),
        changed(|s| s["input"] = json!({"configMap": {"name": "in", "key": "a.jsonl"}})),
        changed(|s| s["input"] = json!({"geminiFile": {"name": "files/abc-1"}})),
        changed(|s| s["credentials"]["secretRef"] = json!({"name": "s", "key": "other"})),
        spec(&["x"], None),
    ];
    for (i, spec) in accepted.into_iter().enumerate() {
        let job = env.try_create(&format!("ok-{i}"), spec.clone()).await;
        assert!(job.is_ok(), "{spec}: {job:?}");
    }
    let requests = |list: Value| changed(|s| s["input"] = json!({"requests": list}));
    let refused = [
        (changed(|s| s["model"] = json!("../x")), "must be the name of a Gemini model"),
        (changed(|s| s["model"] = json!("")), "spec.model"),
        (changed(|s| s["input"] = json!({})), "exactly one of requests, configMap and geminiFile"),
        (
            changed(|s| s["input"]["geminiFile"] = json!({"name": "files/abc"})),
            "exactly one of requests, configMap and geminiFile",
        ),
        (
            changed(|s| s["input"] = json!({"geminiFile": {"name": "abc/def/gh"}})),
            "resource name of a Gemini file",
        ),
        (
            changed(|s| s["input"] = json!({"configMap": {"name": "Not OK", "key": "x"}})),
            "name of a ConfigMap",
        ),
        (changed(|s| s["credentials"]["secretRef"]["name"] = json!("Not OK")), "name of a Secret"),
        (changed(|s| s["output"] = json!({"configMap": {"name": "Not OK"}})), "name of an object"),
        (changed(|s| s["output"] = json!({})), "spec.output needs a destination"),
        (
            changed(|s| s["input"] = json!({"configMap": {"name": "out", "key": "x"}})),
            "must not be the ConfigMap that spec.input.configMap reads from",
        ),
        (requests(json!([])), "should have at least 1 items"),
        (
            requests(json!([{"key": "a", "prompt": "x"}, {"key": "a", "prompt": "y"}])),
            "duplicate entries for key",
        ),
        (requests(json!([{"key": "a"}])), "must validate one and only one schema"),
        (
            requests(json!([{"key": "a", "prompt": "x", "request": {"contents": []}}])),
            "must validate one and only one",
        ),
        (requests(json!([{"key": "", "prompt": "x"}])), "should be at least 1 chars long"),
    ];
    for (i, (spec, says)) in refused.into_iter().enumerate() {
        let body = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": format!("bad-{i}")}, "spec": spec});
        let error = apply(&env, &format!("bad-{i}"), &body).await.unwrap_err();
        assert!(error.contains(says), "{says}: {error}");
    }
}

/// Past the types of this crate, which could not even say the wrong thing.
async fn apply(env: &Env, name: &str, body: &Value) -> Result<(), String> {
    let params = PatchParams::apply("test").force();
    env.jobs().patch(name, &params, &Patch::Apply(body)).await.map(|_| ()).map_err(|e| e.to_string())
}

async fn edit(env: &Env, name: &str, spec: Value) -> Result<(), String> {
    let patch = Patch::Merge(json!({ "spec": spec }));
    env.jobs().patch(name, &PatchParams::default(), &patch).await.map(|_| ()).map_err(|e| e.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_paid_for_cannot_be_edited() {
    let env = Env::new().await;
    let request = |text: &str| json!({"requests": [{"key": "a", "request": {"contents": [{"parts": [{"text": text}]}]}}]});
    env.create("job", with_input(request("[[sim:job=stall]]"), None)).await;
    edit(&env, "job", json!({"model": "gemini-2.5-pro"})).await.unwrap();
    edit(&env, "job", json!({"input": request("[[sim:job=stall]] v2")})).await.unwrap();
    env.operator().await;
    env.until("job", "running", |j| crate::harness::state(j) == "Running").await;
    for spec in [
        json!({"model": "gemini-2.5-flash"}),
        json!({"credentials": {"secretRef": {"name": "other"}}}),
        json!({"input": request("[[sim:job=stall]] v3")}),
        // The same number of members under other names: what a typed field would let pass.
        json!({"input": {"requests": [{"key": "a", "request": {"renamed": [{"parts": [{"text": "x"}]}]}}]}}),
    ] {
        let error = edit(&env, "job", spec.clone()).await.unwrap_err();
        assert!(error.contains("can't be changed once the job was submitted"), "{spec}: {error}");
    }
    edit(&env, "job", json!({"output": {"configMap": {"name": "late"}}})).await.unwrap();
    env.sim.finish(&env.sim.batches()[0].name, gemini_simulator::Outcome::Succeeded);
    let job = env.cleaned("job").await;
    assert_eq!(job.status.unwrap().output.unwrap().config_map.as_deref(), Some("late"));
    let error = edit(&env, "job", json!({"output": null})).await.unwrap_err();
    assert!(error.contains("can't be changed once the job has finished"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_never_goes_back() {
    let env = Env::new().await;
    env.operator().await;
    env.config_map("in", &json!({"x": line("a", "x")})).await;
    env.create("job", spec(&["x"], None)).await;
    let job = env.cleaned("job").await;
    let patch = async |status: Value| {
        let patch = Patch::Merge(json!({ "status": status }));
        env.jobs()
            .patch_status("job", &PatchParams::default(), &patch)
            .await
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    let conditions = serde_json::to_value(&job.status.as_ref().unwrap().conditions).unwrap();
    let mut reverted = conditions.clone();
    let mut both = conditions.clone();
    for c in reverted.as_array_mut().unwrap() {
        if c["type"] == "Finished" {
            c["status"] = json!("False");
        }
    }
    let mut failed = conditions[0].clone();
    failed["type"] = json!("Failed");
    failed["status"] = json!("True");
    both.as_array_mut().unwrap().push(failed);
    let mut attempts = serde_json::to_value(&job.status.unwrap().attempts).unwrap();
    attempts[0]["batchName"] = json!("batches/other");
    for (status, says) in [
        (json!({"state": "Running"}), "a finished job stays finished"),
        (json!({"completionTime": null}), "a finished job stays finished"),
        (json!({"conditions": reverted}), "never revert"),
        (json!({"conditions": both}), "can't be Complete and Failed at once"),
        (json!({"attempts": attempts}), "batchName is set once"),
    ] {
        let error = patch(status.clone()).await.unwrap_err();
        assert!(error.contains(says), "{status}: {error}");
    }
    patch(json!({"conditions": conditions})).await.unwrap();
}
