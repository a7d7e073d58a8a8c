//! Every rule of the schema, as pairs: what is accepted, and what is refused with which words.

use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::{Env, line, spec, with_input};

fn changed(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = spec(&["x"], Some("out"));
    change(&mut spec);
    spec
}

#[expect(clippy::needless_pass_by_value, reason = "callers build the value in place")]
fn stored(input: Value) -> Value {
    changed(|s| s["input"] = json!({ "objectStore": input }))
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
        stored(json!({"uri": "s3://b/k"})),
        stored(json!({"uri": "az://account/box/a/b.jsonl", "credentialsRef": {"name": "s"}})),
        stored(json!({"prefix": "gs://b/day/"})),
        stored(json!({"prefix": "file://shared/"})),
        stored(
            json!({"uri": "s3://b/k", "endpoint": "https://x", "region": "auto", "credentialsRef": {"name": "s"}}),
        ),
        changed(|s| s["credentials"]["secretRef"] = json!({"name": "s", "key": "other"})),
        spec(&["x"], None),
        changed(|s| _ = s.as_object_mut().unwrap().remove("credentials")),
        changed(|s| {
            s.as_object_mut().unwrap().remove("input");
            s["importFrom"] = json!({"batchName": "batches/abc-1_X"});
        }),
        changed(|s| s["ttlSecondsAfterFinished"] = json!(0)),
        changed(|s| s["backoffLimit"] = json!(9)),
        changed(|s| s["retryPolicy"] = json!({"maxAttempts": 1})),
        changed(|s| {
            s["retryPolicy"] = json!({"maxAttempts": 10, "codes": ["UNAVAILABLE", "UNKNOWN", "CANCELLED"]});
        }),
        changed(|s| s["activeDeadlineSeconds"] = json!(1)),
        changed(|s| s["deletionTimeoutSeconds"] = json!(86_400)),
        changed(|s| s["priority"] = json!(-5)),
        changed(|s| s["method"] = json!("GenerateContent")),
        changed(|s| s["method"] = json!("EmbedContent")),
        changed(|s| s["output"]["retention"] = json!("Delete")),
        changed(|s| {
            s["suspend"] = json!(true);
            s["suspendPolicy"] = json!("Cancel");
            s["deletionPolicy"] = json!("Orphan");
            s["readinessPolicy"] = json!("WhenSubmitted");
        }),
    ];
    for (i, spec) in accepted.into_iter().enumerate() {
        let job = env.try_create(&format!("ok-{i}"), spec.clone()).await;
        assert!(job.is_ok(), "{spec}: {job:?}");
    }
    let requests = |list: Value| changed(|s| s["input"] = json!({"requests": list}));
    let to = |place: Value| changed(|s| s["output"] = json!({ "objectStore": place }));
    let refused = [
        (stored(json!({"uri": "s3://b/k", "endpoint": "https://x"})), "endpoint needs credentialsRef"),
        (to(json!({"uri": "s3://b/k", "endpoint": "https://x"})), "endpoint needs credentialsRef"),
        (stored(json!({"prefix": "gs://b/d/", "region": "eu"})), "region is for s3:// only"),
        (to(json!({"uri": "az://account/box", "region": "eu"})), "region is for s3:// only"),
        (changed(|s| s["model"] = json!("../x")), "must be the name of a Gemini model"),
        (changed(|s| s["model"] = json!("")), "spec.model"),
        (
            changed(|s| s["input"] = json!({})),
            "exactly one of requests, configMap, objectStore and geminiFile",
        ),
        (
            changed(|s| s["input"]["geminiFile"] = json!({"name": "files/abc"})),
            "exactly one of requests, configMap, objectStore and geminiFile",
        ),
        (
            changed(|s| s["input"] = json!({"geminiFile": {"name": "abc/def/gh"}})),
            "resource name of a Gemini file",
        ),
        (
            changed(|s| s["input"] = json!({"configMap": {"name": "Not OK", "key": "x"}})),
            "name of a ConfigMap",
        ),
        (stored(json!({})), "exactly one of uri (one object) and prefix"),
        (
            stored(json!({"uri": "s3://b/k", "prefix": "s3://b/k/"})),
            "exactly one of uri (one object) and prefix",
        ),
        (stored(json!({"uri": "s3://b/k/"})), "must be like s3://BUCKET/KEY"),
        (stored(json!({"uri": "http://b/k"})), "must be like s3://BUCKET/KEY"),
        (stored(json!({"uri": "file:///etc/passwd"})), "must be like s3://BUCKET/KEY"),
        (stored(json!({"prefix": "s3://b/day"})), "with a / at its end"),
        (stored(json!({"uri": "s3://b/k", "credentialsRef": {"name": "../s"}})), "name of an object"),
        // Of another namespace: there is no such field.
        (
            stored(json!({"uri": "s3://b/k", "credentialsRef": {"name": "s", "namespace": "x"}})),
            "field not declared in schema",
        ),
        (changed(|s| s["credentials"]["secretRef"]["name"] = json!("Not OK")), "name of a Secret"),
        (changed(|s| s["output"] = json!({"configMap": {"name": "Not OK"}})), "name of an object"),
        (changed(|s| s["output"] = json!({})), "spec.output needs exactly one of configMap and objectStore"),
        (
            changed(|s| s["input"] = json!({"configMap": {"name": "out", "key": "x"}})),
            "must not be the ConfigMap that spec.input.configMap reads from",
        ),
        (
            changed(|s| _ = s.as_object_mut().unwrap().remove("input")),
            "exactly one of input (requests to send) and",
        ),
        (changed(|s| s["importFrom"] = json!({"batchName": "batches/abc"})), "exactly one of input"),
        (
            changed(|s| {
                s.as_object_mut().unwrap().remove("input");
                s["importFrom"] = json!({"batchName": "batches/../files"});
            }),
            "resource name of a Gemini batch",
        ),
        (
            changed(|s| {
                s.as_object_mut().unwrap().remove("input");
                s.as_object_mut().unwrap().remove("credentials");
                s["importFrom"] = json!({"batchName": "batches/abc"});
            }),
            "spec.credentials is needed with importFrom and input.geminiFile",
        ),
        (
            changed(|s| {
                s["input"] = json!({"geminiFile": {"name": "files/abc-1"}});
                s.as_object_mut().unwrap().remove("credentials");
            }),
            "spec.credentials is needed with importFrom and input.geminiFile",
        ),
        (
            changed(|s| {
                s.as_object_mut().unwrap().remove("input");
                s["importFrom"] = json!({"batchName": "batches/abc"});
                s["backoffLimit"] = json!(1);
            }),
            "can't be used with importFrom",
        ),
        (
            changed(|s| {
                s.as_object_mut().unwrap().remove("input");
                s["importFrom"] = json!({"batchName": "batches/abc"});
                s["dryRun"] = json!(true);
            }),
            "spec.dryRun can't be used with importFrom",
        ),
        (
            changed(|s| {
                s.as_object_mut().unwrap().remove("output");
                s["ttlSecondsAfterFinished"] = json!(5);
            }),
            "spec.ttlSecondsAfterFinished needs spec.output",
        ),
        (
            changed(|s| {
                s.as_object_mut().unwrap().remove("input");
                s["importFrom"] = json!({"batchName": "batches/abc"});
                s["retryPolicy"] = json!({"maxAttempts": 2});
            }),
            "spec.retryPolicy can't be used with importFrom and input.geminiFile",
        ),
        (
            changed(|s| {
                s["input"] = json!({"geminiFile": {"name": "files/abc-1"}});
                s["retryPolicy"] = json!({"maxAttempts": 2});
            }),
            "spec.retryPolicy can't be used with importFrom and input.geminiFile",
        ),
        (changed(|s| s["retryPolicy"] = json!({})), "spec.retryPolicy.maxAttempts: Required value"),
        (changed(|s| s["retryPolicy"] = json!({"maxAttempts": 0})), "should be greater than or equal to 1"),
        (changed(|s| s["retryPolicy"] = json!({"maxAttempts": 11})), "should be less than or equal to 10"),
        (
            changed(|s| s["retryPolicy"] = json!({"maxAttempts": 2, "codes": ["UNAVAILABEL"]})),
            "supported values: \"CANCELLED\", \"UNKNOWN\"",
        ),
        (
            changed(|s| s["retryPolicy"] = json!({"maxAttempts": 2, "codes": []})),
            "should have at least 1 items",
        ),
        (
            changed(|s| s["retryPolicy"] = json!({"maxAttempts": 2, "codes": ["UNKNOWN", "UNKNOWN"]})),
            "duplicate entries for key [=\"UNKNOWN\"]",
        ),
        (changed(|s| s["backoffLimit"] = json!(10)), "should be less than or equal to 9"),
        (changed(|s| s["backoffLimit"] = json!(-1)), "should be greater than or equal to 0"),
        (changed(|s| s["activeDeadlineSeconds"] = json!(0)), "should be greater than or equal to 1"),
        (changed(|s| s["ttlSecondsAfterFinished"] = json!(-1)), "should be greater than or equal to 0"),
        (changed(|s| s["deletionTimeoutSeconds"] = json!(0)), "should be greater than or equal to 1"),
        (changed(|s| s["suspendPolicy"] = json!("Pause")), "supported values: \"Drain\", \"Cancel\""),
        (
            changed(|s| s["deletionPolicy"] = json!("Keep")),
            "supported values: \"Cancel\", \"Delete\", \"Orphan\"",
        ),
        (
            changed(|s| s["readinessPolicy"] = json!("Never")),
            "supported values: \"WhenComplete\", \"WhenSubmitted\"",
        ),
        (changed(|s| s["successPolicy"] = json!({"maxFailedRequests": -1})), "a number that is not negative"),
        (changed(|s| s["successPolicy"] = json!({"maxFailedRequests": "101%"})), "a percentage like 5%"),
        (changed(|s| s["successPolicy"] = json!({"maxFailedRequests": "5"})), "a percentage like 5%"),
        (changed(|s| s["successPolicy"] = json!({})), "spec.successPolicy.maxFailedRequests: Required value"),
        (changed(|s| s["output"]["retention"] = json!("Keep")), "supported values: \"Retain\", \"Delete\""),
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
        let error = apply_spec(&env, &format!("bad-{i}"), &spec).await.unwrap_err();
        assert!(error.contains(says), "{says}: {error}");
    }
}

/// Every size limit from both sides, and every pattern: a value that just passes and one that just does not.
#[tokio::test(flavor = "multi_thread")]
async fn limits_and_patterns_are_where_they_are_said_to_be() {
    let env = Env::new().await;
    let model = |text: String| changed(|s| s["model"] = json!(text));
    let secret = |name: String| changed(|s| s["credentials"]["secretRef"]["name"] = json!(name));
    let secret_key = |key: String| changed(|s| s["credentials"]["secretRef"]["key"] = json!(key));
    let requests = |list: Vec<Value>| changed(|s| s["input"] = json!({ "requests": list }));
    let request = |key: String, prompt: String| requests(vec![json!({"key": key, "prompt": prompt})]);
    let many = |n: usize| requests((0..n).map(|i| json!({"key": format!("k{i}"), "prompt": "x"})).collect());
    let map = |name: String, key: String| {
        changed(|s| s["input"] = json!({"configMap": {"name": name, "key": key}}))
    };
    let file = |name: String| changed(|s| s["input"] = json!({"geminiFile": {"name": name}}));
    let output = |name: String| changed(|s| s["output"]["configMap"]["name"] = json!(name));
    let a = |n: usize| "a".repeat(n);

    let long = |max: usize| format!("may not be more than {max} bytes");
    let short = "should be at least 1 chars long".to_owned();
    let mut pairs = vec![
        ("spec.model", model(a(128)), model(a(129)), long(128)),
        ("spec.model", model(a(1)), model(a(0)), short.clone()),
        ("secretRef.name", secret(a(253)), secret(a(254)), long(253)),
        ("secretRef.name", secret(a(1)), secret(a(0)), short.clone()),
        ("secretRef.key", secret_key(a(253)), secret_key(a(254)), long(253)),
        ("secretRef.key", secret_key(a(1)), secret_key(a(0)), short.clone()),
        ("spec.input.requests", many(1000), many(1001), "must have at most 1000 items".to_owned()),
        ("requests[0].key", request(a(256), a(1)), request(a(257), a(1)), long(256)),
        ("requests[0].key", request(a(1), a(1)), request(a(0), a(1)), short.clone()),
        ("requests[0].prompt", request(a(1), a(262_144)), request(a(1), a(262_145)), long(262_144)),
        ("requests[0].prompt", request(a(1), a(1)), request(a(1), a(0)), short.clone()),
        ("configMap.name", map(a(253), a(1)), map(a(254), a(1)), long(253)),
        ("configMap.name", map(a(1), a(1)), map(a(0), a(1)), short.clone()),
        ("configMap.key", map(a(1), a(253)), map(a(1), a(254)), long(253)),
        ("configMap.key", map(a(1), a(1)), map(a(1), a(0)), short.clone()),
        ("geminiFile.name", file(format!("files/{}", a(40))), file(format!("files/{}", a(41))), long(46)),
        (
            "geminiFile.name",
            file("files/a".into()),
            file("files/".into()),
            "at least 7 chars long".to_owned(),
        ),
        ("output.configMap.name", output(a(253)), output(a(254)), long(253)),
        ("output.configMap.name", output(a(1)), output(a(0)), short),
    ];
    for (good, bad) in [
        ("gemini-2.5_x", "gemini 2"),
        ("models/x", "other/x"),
        ("tunedModels/x", "models/x/y"),
        ("X", ".x"),
        ("0", "models/"),
    ] {
        let says = "must be the name of a Gemini model".to_owned();
        pairs.push(("spec.model", model(good.into()), model(bad.into()), says));
    }
    for (good, bad) in [
        ("a.b", "a..b"),
        ("a-b.c-d", "a.-b"),
        ("a--b", "a-.b"),
        ("0", "-a"),
        ("a0", "a."),
        ("a", "A"),
        ("b", "a_b"),
    ] {
        let says =
            |what: &str| format!("must be the name of {what}: lower case letters, digits, '-' and '.'");
        let (good, bad) = (|| good.to_owned(), || bad.to_owned());
        pairs.push(("secretRef.name", secret(good()), secret(bad()), says("a Secret")));
        pairs.push(("configMap.name", map(good(), a(1)), map(bad(), a(1)), says("a ConfigMap")));
        pairs.push(("output.configMap.name", output(good()), output(bad()), says("an object")));
    }
    for (good, bad) in [
        ("files/a-1", "files/a_1"),
        ("files/1", "files/-a"),
        ("files/a0", "files/a-"),
        ("files/b", "file/abc"),
    ] {
        let says = "must be the resource name of a Gemini file".to_owned();
        pairs.push(("geminiFile.name", file(good.into()), file(bad.into()), says));
    }
    for (i, (path, good, bad, says)) in pairs.into_iter().enumerate() {
        let name = format!("job-{i}");
        apply_spec(&env, &name, &good).await.unwrap_or_else(|error| panic!("{path}, {says}: {error}"));
        env.delete(&name).await;
        let error = apply_spec(&env, &name, &bad).await.expect_err(&format!("{path}: {says}"));
        let (told, at) = (error.contains(&says), error.contains(path));
        assert!(told && at, "{path}, {says}: {}", error.chars().take(500).collect::<String>());
    }
}

async fn apply_spec(env: &Env, name: &str, spec: &Value) -> Result<(), String> {
    let body = json!({"apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
        "metadata": {"name": name}, "spec": spec});
    apply(env, name, &body).await
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
        json!({"method": "EmbedContent"}),
        json!({"credentials": {"secretRef": {"name": "other"}}}),
        json!({"input": request("[[sim:job=stall]] v3")}),
        // The same number of members under other names: what a typed field would let pass.
        json!({"input": {"requests": [{"key": "a", "request": {"renamed": [{"parts": [{"text": "x"}]}]}}]}}),
    ] {
        let error = edit(&env, "job", spec.clone()).await.unwrap_err();
        assert!(error.contains("can't be changed once its submission has begun"), "{spec}: {error}");
    }
    let error = edit(&env, "job", json!({"dryRun": true})).await.unwrap_err();
    assert!(error.contains("spec.dryRun can't be turned on once the submission has begun"), "{error}");
    // Said aloud it is still the same.
    edit(&env, "job", json!({"method": "GenerateContent"})).await.unwrap();
    edit(&env, "job", json!({"output": {"configMap": {"name": "late"}}})).await.unwrap();
    assert!(env.sim.finish(&env.sim.batches()[0].name, gemini_simulator::Outcome::Succeeded));
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
