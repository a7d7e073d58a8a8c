//! Results in object stores: real servers, and what a user finds there, whatever goes wrong on the way.

use gemini_batch_operator::api::{GeminiBatchJob, StoredObject, conditions};
use gemini_simulator::{Config, Effect, Fault as Planted, Op, Switches};
use k8s_openapi::api::core::v1::Secret;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::harness::{Env, condition, counts, line, ready, spec, state, with_input};
use crate::leader::signal;
use crate::lifecycle::with;
use crate::object_store::memory;
use crate::stores::{
    ACCESS_KEY, AZURITE, AZURITE_KEY, BUCKET, Fault, Proxy, SECRET_KEY, Server, XmlApi, no_oauth, s3_secret,
};

/// Where the tests' results go, below [`BUCKET`].
pub const PLACE: &str = "team/run";

pub fn to_s3(mut spec: Value, endpoint: &str, place: &str) -> Value {
    let uri = format!("s3://{BUCKET}/{place}");
    spec["output"] =
        json!({"objectStore": {"uri": uri, "credentialsRef": {"name": "store"}, "endpoint": endpoint}});
    spec
}

pub async fn env_for(endpoint: &str, extra: &[&str]) -> Env {
    let origin = url::Url::parse(endpoint).unwrap().origin().ascii_serialization();
    let allowed = format!("--object-store-endpoints={origin}");
    let flags: Vec<&str> = extra.iter().copied().chain([allowed.as_str()]).collect();
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &flags).await;
    env.secret("store", &s3_secret()).await;
    env
}

pub async fn with_s3() -> (Env, Server) {
    let s3 = Server::s3();
    (env_for(&s3.endpoint(), &[]).await, s3)
}

pub async fn with_proxy() -> (Env, Server, Proxy) {
    let s3 = Server::s3();
    let proxy = Proxy::before(&s3, Fault::None).await;
    (env_for(&proxy.endpoint(), &[]).await, s3, proxy)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |all, b| format!("{all}{b:02x}"))
}

pub async fn manifest(s3: &Server, place: &str) -> Value {
    serde_json::from_slice(&s3.get(&format!("{place}/manifest.json")).await.expect("a manifest")).unwrap()
}

fn objects(job: &GeminiBatchJob) -> Vec<StoredObject> {
    let output = job.status.as_ref().unwrap().output.as_ref().expect("an output");
    output.object_store.as_ref().expect("objects").objects.clone()
}

/// What a reader finds who goes by the manifest: lines by the last part of the object's name. All that the status and
/// the manifest say of the objects is true.
pub async fn read(s3: &Server, place: &str, job: &GeminiBatchJob) -> Vec<(String, Vec<Value>)> {
    let stored = objects(job);
    assert_eq!(manifest(s3, place).await["objects"], json!(stored));
    let mut all = Vec::new();
    for object in stored {
        let content = s3.get(&format!("{place}/{}", object.name)).await.expect(&object.name);
        let lines: Vec<Value> = content
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap_or_else(|_| json!(String::from_utf8_lossy(line))))
            .collect();
        assert_eq!((size(content.len()), hex(&content)), (object.bytes, object.sha256), "{}", object.name);
        assert_eq!(size(lines.len()), object.lines);
        let name = object.name.rsplit('/').next().unwrap().to_owned();
        all.push((name, lines));
    }
    all
}

fn size(n: usize) -> i64 {
    i64::try_from(n).unwrap()
}

pub fn keys(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|l| l["key"].as_str().unwrap()).collect()
}

async fn waits_for(env: &Env, name: &str, reason: &str) -> GeminiBatchJob {
    env.until(name, &format!("waiting by {reason}"), |j| ready(j).1 == reason).await
}

// ------------------------------------------------------------------------------------------- as it should be

#[tokio::test(flavor = "multi_thread")]
async fn results_are_stored_in_input_order_with_all_that_belongs_to_them() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    let prompts = [
        "a [[sim:shuffle]]",
        "b [[sim:error=3]]",
        "c [[sim:missing]]",
        "d [[sim:duplicate]]",
        "e [[sim:foreign=stranger]]",
        "f",
    ];
    env.create("job", to_s3(spec(&prompts, None), &s3.endpoint(), PLACE)).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (6, 4, 2)), "{:?}", ready(&job));
    let found = read(&s3, PLACE, &job).await;
    let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["results.jsonl", "errors.jsonl", "missing.jsonl", "unmatched.jsonl"]);
    assert_eq!(keys(&found[0].1), ["k1", "k2", "k4", "k5", "k6"]);
    assert_eq!((keys(&found[1].1), found[1].1[0]["error"]["code"].as_i64()), (vec!["k2"], Some(3)));
    assert_eq!(keys(&found[2].1), ["k3"]);
    let mut unmatched = keys(&found[3].1);
    unmatched.sort_unstable();
    assert_eq!(unmatched, ["k4", "stranger"]);

    let manifest = manifest(&s3, PLACE).await;
    let status = job.status.as_ref().unwrap();
    let output = status.output.as_ref().unwrap();
    assert_eq!(manifest["job"]["uid"], json!(job.metadata.uid));
    assert_eq!(manifest["requests"], json!({"total": 6, "succeeded": 4, "failed": 1, "missing": 1}));
    assert_eq!(manifest["usage"], json!(status.usage));
    assert_eq!(manifest["resultFile"]["sha256"], json!(output.sha256));
    assert_eq!(
        output.object_store.as_ref().unwrap().manifest,
        format!("s3://{BUCKET}/{PLACE}/manifest.json")
    );
    assert_eq!(output.config_map, None);
    assert!(serde_json::to_string(&job.status).unwrap().len() < 16 << 10);
    assert_eq!(s3.names().await.len(), 6, "four objects, the manifest and the reservation");
}

/// Larger than one part, in any order, and cut off on its way from Gemini.
#[tokio::test(flavor = "multi_thread")]
async fn large_results_are_streamed_and_lose_nothing() {
    for ranges in [true, false] {
        let (env, s3) = with_s3().await;
        env.sim.set(Switches { download_ranges: ranges, ..Switches::default() });
        env.sim.fault(Planted {
            op: Op::Download,
            contains: String::new(),
            skip: 0,
            times: 1,
            effect: Effect::Truncate,
        });
        env.operator().await;
        let lines: Vec<String> = (0..60)
            .map(|i| {
                let more = if i == 0 { " [[sim:shuffle]]" } else { "" };
                line(&format!("k{i}"), &format!("[[sim:big=300000]]{more}"))
            })
            .collect();
        env.config_map("in", &json!({"x": lines.join("\n")})).await;
        let input = json!({"configMap": {"name": "in", "key": "x"}});
        env.create("job", to_s3(with_input(input, None), &s3.endpoint(), PLACE)).await;
        let job = env.cleaned("job").await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (60, 60, 0)), "{:?}", ready(&job));
        let found = read(&s3, PLACE, &job).await;
        let expected: Vec<String> = (0..60).map(|i| format!("k{i}")).collect();
        assert_eq!(keys(&found[0].1), expected);
        assert!(objects(&job)[0].bytes > 18_000_000);
        assert_eq!(s3.parts(), 0, "no parts are left over");
        assert!(env.count(Op::Download) > 1);
    }
}

/// Reserved, refused to another job, written, replaced by a further attempt.
async fn does_as_well(server: &Server, endpoint: &str, root: &str, secret: Value) {
    let env = env_for(endpoint, &[]).await;
    env.operator().await;
    env.secret("theirs", &secret).await;
    let to = |spec: Value| {
        let store = json!({"uri": format!("{root}/{PLACE}"), "credentialsRef": {"name": "theirs"}, "endpoint": endpoint});
        with(spec, json!({"output": {"objectStore": store}, "retryPolicy": {"maxAttempts": 2}}))
    };
    env.create("job", to(spec(&["a", "b [[sim:error=14x1]]", "c [[sim:missing]]"], None))).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), env.sim.batches().len()), ("Succeeded", 2), "{:?}", ready(&job));
    let found = read(server, PLACE, &job).await;
    assert_eq!(
        (keys(&found[0].1), manifest(server, PLACE).await["attempt"].as_i64()),
        (vec!["k1", "k2"], Some(2))
    );
    env.create("other", to(spec(&["a"], None))).await;
    let (_, _, message) = ready(&env.stalled("other", "OutputConflict").await);
    assert!(message.contains("another job, job"), "{message}");
    let mut nowhere = to(spec(&["a"], None));
    nowhere["output"]["objectStore"]["uri"] = json!(format!("{}-not/x", root));
    env.create("nowhere", nowhere).await;
    let (_, _, message) = ready(&env.stalled("nowhere", "OutputNotWritable").await);
    assert!(message.contains("does not exist: create it"), "{message}");
    assert_eq!(env.sim.batches().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn cloud_storage_does_as_well() {
    let gcs = Server::gcs().await;
    let xml = XmlApi::before(&gcs).await;
    let secret = json!({"serviceAccountKey": no_oauth()});
    does_as_well(&gcs, &xml.endpoint(), &format!("gs://{BUCKET}"), secret).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_storage_does_as_well_and_takes_large_results() {
    let az = Server::az().await;
    let secret = json!({"accountKey": AZURITE_KEY});
    let root = format!("az://{AZURITE}/{BUCKET}");
    does_as_well(&az, &az.endpoint(), &root, secret.clone()).await;
    let env = env_for(&az.endpoint(), &[]).await;
    env.operator().await;
    env.secret("theirs", &secret).await;
    let store = json!({"uri": format!("{root}/large"), "credentialsRef": {"name": "theirs"}, "endpoint": az.endpoint()});
    let large = with(spec(&["[[sim:big=300000]]"; 40], None), json!({"output": {"objectStore": store}}));
    env.create("job", large).await;
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded", "{:?}", ready(&job));
    assert_eq!(read(&az, "large", &job).await[0].1.len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_in_a_mapped_directory_are_files() {
    let dir = tempfile::tempdir().unwrap();
    let mapped = format!("--mapped-output-directories=results={}", dir.path().display());
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &[&mapped]).await;
    env.operator().await;
    let to = |uri: &str| with(spec(&["a", "b"], None), json!({"output": {"objectStore": {"uri": uri}}}));
    env.create("job", to("file://results/team/run/")).await;
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded", "{:?}", ready(&job));
    let place = dir.path().join("team/run");
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(place.join("manifest.json")).unwrap()).unwrap();
    let object = &objects(&job)[0];
    assert_eq!(manifest["objects"][0]["name"], json!(object.name));
    let content = std::fs::read_to_string(place.join(&object.name)).unwrap();
    assert_eq!((hex(content.as_bytes()), content.lines().count()), (object.sha256.clone(), 2));
    // One that may only be read is none to write to.
    env.create("other", to("file://inputs/x")).await;
    let (_, _, message) = ready(&env.stalled("other", "StoreNotAllowed").await);
    assert!(message.contains("--mapped-output-directories"), "{message}");
    assert_eq!(env.sim.batches().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn further_attempts_are_merged_with_what_is_stored() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    let prompts = ["a", "b [[sim:error=14x1]]", "c [[sim:error=3]]", "d [[sim:duplicate]]"];
    let more = json!({"retryPolicy": {"maxAttempts": 3}});
    env.create("job", with(to_s3(spec(&prompts, None), &s3.endpoint(), PLACE), more)).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (4, 3, 1)), "{:?}", ready(&job));
    assert_eq!(env.sim.batches().iter().map(|b| b.requests).collect::<Vec<_>>(), [4, 1]);
    let found = read(&s3, PLACE, &job).await;
    let told: Vec<_> = found[0]
        .1
        .iter()
        .map(|l| (l["key"].as_str().unwrap(), l["attempt"].as_i64().unwrap(), l["error"].is_object()))
        .collect();
    assert_eq!(told, [("k1", 1, false), ("k2", 2, false), ("k3", 1, true), ("k4", 1, false)]);
    let (name, lines) = found.last().unwrap();
    assert_eq!((name.as_str(), keys(lines)), ("unmatched.jsonl", vec!["k4"]), "paid for, never thrown away");
    assert_eq!(manifest(&s3, PLACE).await["attempt"], json!(2));
    // What the first attempt left was read back from the store, not from Gemini.
    assert_eq!(env.count(Op::Download), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_looks_at_the_output_as_well() {
    let (env, mut s3) = with_s3().await;
    s3.restart(true);
    env.operator().await;
    let dry = json!({"dryRun": true});
    env.create("job", with(to_s3(spec(&["a"], None), &s3.endpoint(), PLACE), dry)).await;
    env.stalled("job", "StoreAccessDenied").await;
    s3.restart(false);
    env.until("job", "validated", |j| {
        condition(j, conditions::VALIDATED).is_some_and(|(status, ..)| status == "True")
    })
    .await;
    assert_eq!(env.sim.batches().len(), 0);
}

// ----------------------------------------------------------------------------------- found out before it is paid

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_cannot_be_written_costs_nothing_and_is_used_once_it_can() {
    let (env, mut s3) = with_s3().await;
    env.operator().await;
    s3.restart(true);
    let job = |place: &str| to_s3(spec(&["a"], None), &s3.endpoint(), place);
    env.create("read-only", job("read-only")).await;
    let mut elsewhere = job("x");
    elsewhere["output"]["objectStore"]["uri"] = json!("s3://no-such-bucket/x");
    env.create("no-bucket", elsewhere).await;
    let mut with_wrong_key = job("wrong-key");
    with_wrong_key["output"]["objectStore"]["credentialsRef"]["name"] = json!("wrong");
    env.secret("wrong", &json!({"accessKeyId": ACCESS_KEY, "secretAccessKey": "nonsense"})).await;
    env.create("wrong-key", with_wrong_key).await;
    for (name, reason, says) in [
        ("read-only", "StoreAccessDenied", "read and write objects below that place"),
        (
            "no-bucket",
            "OutputNotWritable",
            "the bucket of s3://no-such-bucket/x/manifest.json does not exist",
        ),
        ("wrong-key", "StoreAccessDenied", "spec.output.objectStore.credentialsRef"),
    ] {
        let (_, _, message) = ready(&env.stalled(name, reason).await);
        assert!(message.contains(says), "{name}: {message}");
        assert!(!message.contains(SECRET_KEY) && !message.contains("nonsense"), "{message}");
    }
    assert_eq!((env.sim.batches().len(), env.sim.files().len()), (0, 0), "nothing was paid for");

    s3.restart(false);
    std::fs::create_dir_all(s3.dir.path().join("data/no-such-bucket")).unwrap();
    env.secret("wrong", &s3_secret()).await;
    for name in ["read-only", "no-bucket", "wrong-key"] {
        assert_eq!(state(&env.cleaned(name).await), "Succeeded", "{name}");
    }
    assert_eq!(env.count(Op::BatchCreate), 3);
}

/// The least that docs/inputs-and-results.md asks for: S3 refuses to tell what does not exist then.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_to_allow_listing_the_bucket() {
    let (env, s3, proxy) = with_proxy().await;
    proxy.set(Fault::NoListing);
    env.operator().await;
    // Two attempts, neither of which stores anything.
    let spec = |prompts: &[&str]| {
        with(to_s3(spec(prompts, None), &proxy.endpoint(), PLACE), json!({"backoffLimit": 1}))
    };
    env.create("none", spec(&["a [[sim:job=expire]]"])).await;
    let job = env.cleaned("none").await;
    assert_eq!((ready(&job).1.as_str(), env.count(Op::BatchCreate)), ("BatchExpired", 2));
    assert!(s3.names().await.is_empty(), "the place is given back");
    env.create("job", spec(&["a", "b"])).await;
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{:?}", ready(&job));
    assert_eq!(keys(&read(&s3, PLACE, &job).await[0].1), ["k1", "k2"]);
    // Who may not read either is still told so.
    proxy.set(Fault::Status(403));
    env.create("other", spec(&["a"])).await;
    waits_for(&env, "other", "StoreAccessDenied").await;
    assert_eq!(env.count(Op::BatchCreate), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_elses_place_is_ever_written_to() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    env.create("first", to_s3(spec(&["a"], None), &s3.endpoint(), PLACE)).await;
    let first = env.cleaned("first").await;
    let before = manifest(&s3, PLACE).await;
    env.create("second", to_s3(spec(&["b"], None), &s3.endpoint(), &format!("{PLACE}/"))).await;
    let (_, _, message) = ready(&env.stalled("second", "OutputConflict").await);
    assert!(message.contains("another job, first") && message.contains("delete s3://"), "{message}");
    // Nor by a job of the same name that is another one.
    env.delete("first").await;
    env.gone("first").await;
    env.create("first", to_s3(spec(&["c"], None), &s3.endpoint(), PLACE)).await;
    let (_, _, message) = ready(&env.stalled("first", "OutputConflict").await);
    assert!(message.contains("an earlier job of the same name"), "{message}");
    s3.put("not-ours/manifest.json", "{}").await;
    env.create("third", to_s3(spec(&["d"], None), &s3.endpoint(), "not-ours")).await;
    let (_, _, message) = ready(&env.stalled("third", "OutputConflict").await);
    assert!(message.contains("not this operator's"), "{message}");
    assert_eq!((manifest(&s3, PLACE).await, env.sim.batches().len()), (before, 1));
    assert_eq!(s3.get("not-ours/manifest.json").await.unwrap(), b"{}");
    read(&s3, PLACE, &first).await;

    // Deleted because it is not needed any more: one of the two that want the place gets it.
    s3.delete(&format!("{PLACE}/manifest.json")).await;
    let winner = env.until("first", "done or still waiting", |j| state(j) == "Succeeded").await;
    read(&s3, PLACE, &winner).await;
    let (_, _, message) = ready(&env.stalled("second", "OutputConflict").await);
    assert!(message.contains("first"), "{message}");
    assert_eq!(env.count(Op::BatchCreate), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_keeps_others_out_and_is_given_back() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    let held = with(to_s3(spec(&["a"], None), &s3.endpoint(), PLACE), json!({"dryRun": true}));
    env.create("first", held).await;
    env.until("first", "validated", |j| {
        condition(j, conditions::VALIDATED).is_some_and(|(status, ..)| status == "True")
    })
    .await;
    env.create("second", to_s3(spec(&["b"], None), &s3.endpoint(), PLACE)).await;
    let (_, _, message) = ready(&env.stalled("second", "OutputConflict").await);
    assert!(message.contains("reserved for another job, first"), "{message}");
    env.delete("first").await;
    env.gone("first").await;
    assert_eq!(state(&env.cleaned("second").await), "Succeeded", "it goes on by itself");
    assert_eq!(env.sim.batches().len(), 1);
}

/// The same manifests are often applied to several clusters, with the same bucket: what lives in another one is no
/// predecessor that was deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_the_same_name_in_another_cluster_is_another_job() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    let job = json!({"cluster": "elsewhere", "namespace": env.namespace, "name": "job", "uid": "another"});
    s3.put(&format!("{PLACE}/reservation.json"), json!({ "job": job }).to_string()).await;
    env.create("job", to_s3(spec(&["a"], None), &s3.endpoint(), PLACE)).await;
    let (_, _, message) = ready(&env.stalled("job", "OutputConflict").await);
    assert!(message.contains("of another cluster (elsewhere)"), "{message}");
    assert_eq!(env.sim.batches().len(), 0);
    s3.delete(&format!("{PLACE}/reservation.json")).await;
    assert_eq!(state(&env.cleaned("job").await), "Succeeded");
    assert!(manifest(&s3, PLACE).await["job"]["cluster"].as_str().is_some_and(|id| !id.is_empty()));
}

// ------------------------------------------------------------------------------------ broken when results are there

#[tokio::test(flavor = "multi_thread")]
async fn paid_results_wait_for_a_broken_store_and_are_stored_once_it_is_back() {
    for fault in [Fault::Status(503), Fault::Refuse, Fault::CutAfter(20), Fault::Status(403)] {
        let (env, s3, proxy) = with_proxy().await;
        env.operator().await;
        let spec = to_s3(spec(&["a [[sim:work=600]]", "b"], None), &proxy.endpoint(), PLACE);
        env.create("job", spec).await;
        env.until("job", "running", |j| state(j) == "Running").await;
        proxy.set(fault);
        let batch = env.sim.batches()[0].name.clone();
        assert!(env.sim.finish(&batch, gemini_simulator::Outcome::Succeeded));
        let reason = if fault == Fault::Status(403) { "StoreAccessDenied" } else { "StoreUnavailable" };
        let (_, _, message) = ready(&waits_for(&env, "job", reason).await);
        assert!(message.contains("Gemini keeps the results"), "{fault:?}: {message}");
        assert_eq!(s3.get(&format!("{PLACE}/manifest.json")).await, None);
        proxy.set(Fault::None);
        let job = env.cleaned("job").await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{fault:?}: {:?}", ready(&job));
        assert_eq!(keys(&read(&s3, PLACE, &job).await[0].1), ["k1", "k2"]);
        assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1), "{fault:?}");
    }
}

/// The same faults with the other kinds of stores, for input and output at once: each is said, and the job goes on.
async fn fails_as_well(server: &Server, port: u16, path: &str, root: &str, secret: Value) {
    let proxy = Proxy::to(port, Fault::None).await;
    let endpoint = format!("{}{path}", proxy.endpoint());
    let env = env_for(&endpoint, &[]).await;
    env.operator().await;
    env.secret("theirs", &secret).await;
    server.put("in", line("k1", "a [[sim:work=9000000]]")).await;
    let store = |place: &str| json!({"uri": format!("{root}/{place}"), "credentialsRef": {"name": "theirs"}, "endpoint": endpoint});
    let faults = [
        (Fault::Status(503), "StoreUnavailable", "HTTP 503"),
        (Fault::Refuse, "StoreUnavailable", "broke off"),
        (Fault::CutAfter(20), "StoreUnavailable", "broke off"),
        (Fault::StallAfter(0), "StoreUnavailable", "in time"),
        (Fault::Status(403), "StoreAccessDenied", "credentialsRef"),
    ];
    for (i, (fault, reason, says)) in faults.into_iter().enumerate() {
        let name = format!("job-{i}");
        let waits = async |at: &str| {
            let (_, _, message) = ready(&waits_for(&env, &name, reason).await);
            assert!(message.contains(says), "{at} {fault:?}: {message}");
        };
        proxy.set(fault);
        let input = with_input(json!({"objectStore": store("in")}), None);
        env.create(&name, with(input, json!({"output": {"objectStore": store(&name)}}))).await;
        waits("before").await;
        assert_eq!(env.sim.batches().len(), i, "{fault:?}");
        proxy.set(Fault::None);
        env.until(&name, "running", |j| state(j) == "Running").await;
        proxy.set(fault);
        assert!(
            env.sim.finish(&env.sim.batches().last().unwrap().name, gemini_simulator::Outcome::Succeeded)
        );
        waits("after").await;
        // Slow is no fault.
        proxy.set(Fault::BytesPerSecond(20_000));
        let job = env.cleaned(&name).await;
        proxy.set(Fault::None);
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)), "{fault:?}: {:?}", ready(&job));
        assert_eq!(keys(&read(server, &name, &job).await[0].1), ["k1"]);
        assert_eq!(env.count(Op::BatchCreate), i + 1, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cloud_storage_fails_as_well() {
    let gcs = Server::gcs().await;
    let xml = XmlApi::before(&gcs).await;
    let secret = json!({"serviceAccountKey": no_oauth()});
    fails_as_well(&gcs, xml.port, "", &format!("gs://{BUCKET}"), secret).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_storage_fails_as_well() {
    let az = Server::az().await;
    let (path, root) = (format!("/{AZURITE}"), format!("az://{AZURITE}/{BUCKET}"));
    fails_as_well(&az, az.port, &path, &root, json!({"accountKey": AZURITE_KEY})).await;
}

/// What was good when the batch was paid for, and is not any more when its results come.
#[tokio::test(flavor = "multi_thread")]
async fn paid_results_wait_until_somebody_has_repaired_the_store() {
    let (env, mut s3) = with_s3().await;
    env.operator().await;
    let bucket = s3.dir.path().join(format!("data/{BUCKET}"));
    let aside = s3.dir.path().join("aside");
    for fault in ["read-only", "no-bucket", "wrong-key", "no-secret"] {
        env.create(fault, to_s3(spec(&["a [[sim:work=9000000]]"], None), &s3.endpoint(), fault)).await;
        env.until(fault, "running", |j| state(j) == "Running").await;
        let (reason, says) = match fault {
            "read-only" => {
                s3.restart(true);
                ("StoreAccessDenied", "read and write objects")
            }
            "no-bucket" => {
                std::fs::rename(&bucket, &aside).unwrap();
                ("OutputNotWritable", "does not exist: create it")
            }
            "wrong-key" => {
                env.secret("store", &json!({"accessKeyId": ACCESS_KEY, "secretAccessKey": "x"})).await;
                ("StoreAccessDenied", "SignatureDoesNotMatch")
            }
            _ => {
                let secrets: kube::Api<Secret> = kube::Api::namespaced(env.client.clone(), &env.namespace);
                secrets.delete("store", &kube::api::DeleteParams::default()).await.unwrap();
                ("CredentialsNotFound", "Secret store does not exist")
            }
        };
        assert!(
            env.sim.finish(&env.sim.batches().last().unwrap().name, gemini_simulator::Outcome::Succeeded)
        );
        let (_, _, message) = ready(&env.stalled(fault, reason).await);
        assert!(message.contains(says) && message.contains("Gemini keeps the results"), "{fault}: {message}");
        match fault {
            "read-only" => s3.restart(false),
            "no-bucket" => std::fs::rename(&aside, &bucket).unwrap(),
            _ => env.secret("store", &s3_secret()).await,
        }
        let job = env.cleaned(fault).await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (1, 1, 0)), "{fault}: {:?}", ready(&job));
        assert_eq!(keys(&read(&s3, fault, &job).await[0].1), ["k1"]);
    }
    assert_eq!(env.count(Op::BatchCreate), 4);
}

/// In the midst of a large object.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_in_the_midst_of_it_gets_all_of_it_in_the_end() {
    let (env, s3, proxy) = with_proxy().await;
    env.operator().await;
    let prompts: Vec<String> = (0..40).map(|_| "[[sim:big=300000]]".to_owned()).collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let seen = proxy.requests();
    env.create("job", to_s3(spec(&prompts, None), &proxy.endpoint(), PLACE)).await;
    // Pieces of 16 KiB: more than all that came before the first part.
    crate::lifecycle::until("the first part on its way", || proxy.requests() > seen + 100).await;
    proxy.set(Fault::Status(503));
    waits_for(&env, "job", "StoreUnavailable").await;
    proxy.set(Fault::BytesPerSecond(2000));
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (40, 40, 0)), "{:?}", ready(&job));
    assert_eq!(read(&s3, PLACE, &job).await[0].1.len(), 40);
    assert_eq!(env.count(Op::BatchCreate), 1);
}

/// It takes what comes and never answers, or does not even take it.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_falls_silent_in_the_midst_of_it_gets_all_of_it_in_the_end() {
    for fault in [Fault::StallAfter(0), Fault::Deaf] {
        let (env, s3, proxy) = with_proxy().await;
        env.operator().await;
        let seen = proxy.requests();
        env.create("job", to_s3(spec(&["[[sim:big=300000]]"; 40], None), &proxy.endpoint(), PLACE)).await;
        crate::lifecycle::until("the first part on its way", || proxy.requests() > seen + 100).await;
        proxy.set(fault);
        let (_, _, message) = ready(&waits_for(&env, "job", "StoreUnavailable").await);
        assert!(message.contains("does not answer in time"), "{fault:?}: {message}");
        proxy.set(Fault::None);
        let job = env.cleaned("job").await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (40, 40, 0)), "{fault:?}: {:?}", ready(&job));
        assert_eq!(read(&s3, PLACE, &job).await[0].1.len(), 40);
        assert_eq!(env.count(Op::BatchCreate), 1);
    }
}

/// Many batches end at the same time, as after an outage of the operator.
#[tokio::test(flavor = "multi_thread")]
async fn results_that_wait_for_their_turn_take_no_memory() {
    const COUNT: usize = 60;
    let (env, s3) = with_s3().await;
    let process = env.spawn_in(&[], &["--transfers=1"]);
    env.create("small", to_s3(spec(&["a"], None), &s3.endpoint(), "small")).await;
    env.cleaned("small").await;
    let idle = memory(process.id(), "VmRSS");
    for i in 0..COUNT {
        let place = format!("place-{i}");
        let prompts = ["[[sim:work=9000000]] [[sim:big=1500000]]"];
        env.create(&place, to_s3(spec(&prompts, None), &s3.endpoint(), &place)).await;
    }
    crate::lifecycle::until("all at Gemini", || env.sim.batches().len() == COUNT + 1).await;
    for batch in env.sim.batches().iter().filter(|b| b.state == "RUNNING" || b.state == "PENDING") {
        assert!(env.sim.finish(&batch.name, gemini_simulator::Outcome::Succeeded));
    }
    for i in 0..COUNT {
        assert_eq!(state(&env.cleaned(&format!("place-{i}")).await), "Succeeded");
    }
    let peak = memory(process.id(), "VmHWM");
    assert!(peak <= idle + 64, "{idle} MiB at rest, {peak} MiB at most");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_too_large_for_a_config_map_may_go_to_a_store() {
    let (env, s3) = with_s3().await;
    env.operator().await;
    let prompts = ["[[sim:big=600000]]"; 3];
    env.create("job", spec(&prompts, Some("out"))).await;
    let (_, _, message) = ready(&env.stalled("job", "OutputTooLarge").await);
    assert!(message.contains("spec.output.objectStore"), "{message}");
    let output = to_s3(json!({}), &s3.endpoint(), PLACE)["output"].clone();
    let mut patch = json!({"spec": {"output": output}});
    patch["spec"]["output"]["configMap"] = Value::Null;
    env.jobs()
        .patch("job", &kube::api::PatchParams::default(), &kube::api::Patch::Merge(&patch))
        .await
        .unwrap();
    let job = env.cleaned("job").await;
    assert_eq!(state(&job), "Succeeded", "{:?}", ready(&job));
    assert_eq!(read(&s3, PLACE, &job).await[0].1.len(), 3);
    assert!(env.config_maps().get_opt("out").await.unwrap().is_none(), "the reservation is given back");
    assert_eq!(env.count(Op::BatchCreate), 1);
}

/// Nobody pays for parts of what is not wanted any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_deleted_in_the_midst_of_it_leaves_no_parts() {
    let (env, s3, proxy) = with_proxy().await;
    env.operator().await;
    let prompts = vec!["[[sim:work=600]] [[sim:big=300000]]"; 100];
    env.create("job", to_s3(spec(&prompts, None), &proxy.endpoint(), PLACE)).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    assert!(env.sim.finish(&env.sim.batches()[0].name.clone(), gemini_simulator::Outcome::Succeeded));
    proxy.set(Fault::BytesPerSecond(700));
    crate::lifecycle::until("parts on their way", || s3.parts() > 0).await;
    env.delete("job").await;
    env.gone("job").await;
    proxy.set(Fault::None);
    crate::lifecycle::until("parts taken back", || s3.parts() == 0).await;
    assert_eq!(s3.get(&format!("{PLACE}/manifest.json")).await, None);
}

/// A hundred megabytes from S3 and more to S3, joined in input order, in less than 64 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn large_results_take_little_memory() {
    const COUNT: usize = 30_000;
    let (env, s3) = with_s3().await;
    let process = env.spawn(None);
    env.create("small", to_s3(spec(&["a"], None), &s3.endpoint(), "small")).await;
    env.cleaned("small").await;
    let idle = memory(process.id(), "VmRSS");
    let content = (0..COUNT).fold(String::new(), |all, i| {
        let shuffle = if i == 0 { "[[sim:shuffle]]" } else { "" };
        all + &line(&i.to_string(), &format!("[[sim:big=4000]]{shuffle}")) + "\n"
    });
    s3.put("in", content).await;
    let input = json!({"uri": format!("s3://{BUCKET}/in"), "credentialsRef": {"name": "store"}, "endpoint": s3.endpoint()});
    let spec = to_s3(with_input(json!({ "objectStore": input }), None), &s3.endpoint(), PLACE);
    env.create("large", spec).await;
    let job = env.cleaned("large").await;
    assert_eq!(counts(&job), (size(COUNT), size(COUNT), 0), "{:?}", ready(&job));
    let peak = memory(process.id(), "VmHWM");
    assert!(peak <= idle + 64, "{idle} MiB at rest, {peak} MiB at most");
    let found = read(&s3, PLACE, &job).await;
    assert!(objects(&job)[0].bytes > 100 << 20);
    assert!(found[0].1.iter().enumerate().all(|(i, line)| line["key"] == json!(i.to_string())));
}

// --------------------------------------------------------------------------------------------------- killed

/// It stands still before it publishes, another one leads and publishes, and it goes on: readers never see a mixture, and
/// nothing is left over.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_write_at_the_same_time_one_publishes() {
    let (env, s3, proxy) = with_proxy().await;
    let alone = ["--role=controller", "--admin-listen=127.0.0.1:0"];
    let _receiver = env.spawn_with(None, &["--role=receiver"]);
    let mut first = env.spawn_in(&[("GBO_STOP_AT", "publish:unmatched.jsonl")], &alone);
    env.create("job", to_s3(spec(&["a", "b [[sim:error=3]]"], None), &proxy.endpoint(), PLACE)).await;
    let stat = format!("/proc/{}/stat", first.id());
    let stopped = || std::fs::read_to_string(&stat).unwrap().contains(") T ");
    crate::lifecycle::until("stopped before it publishes", stopped).await;
    let half = s3.names().await;
    assert!(half.iter().any(|name| name.ends_with("errors.jsonl")), "{half:?}");
    assert_eq!(s3.get(&format!("{PLACE}/manifest.json")).await, None);
    let _second = env.spawn_with(None, &alone);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 1, 1)));
    let published = manifest(&s3, PLACE).await;
    let before = proxy.requests();
    signal(&first, "CONT");
    // It tries to publish what it has; then it is told to end, for which it waits for what it has in hand.
    crate::lifecycle::until("gone on", || proxy.requests() > before).await;
    signal(&first, "TERM");
    first.ended().await;
    assert_eq!(manifest(&s3, PLACE).await, published);
    read(&s3, PLACE, &job).await;
    assert_eq!(s3.names().await.len(), 4, "{:?}", s3.names().await);
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
}

/// It wakes up late and publishes what its successor has cleared away already: that is no result, and is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_of_objects_that_were_cleared_away_is_replaced() {
    let (env, s3) = with_s3().await;
    let process = env.spawn_in(&[("GBO_STOP_AT", "publish:claimed")], &[]);
    env.create("job", to_s3(spec(&["a", "b"], None), &s3.endpoint(), PLACE)).await;
    let stat = format!("/proc/{}/stat", process.id());
    let stopped = || std::fs::read_to_string(&stat).unwrap().contains(") T ");
    crate::lifecycle::until("stopped when it has claimed the place", stopped).await;
    let job = env.jobs().get("job").await.unwrap();
    let uid = job.metadata.uid.clone().unwrap();
    let late = json!({
        "job": {"namespace": env.namespace, "name": "job", "uid": uid},
        "attempt": 1,
        "objects": [{"name": format!("{uid}-1-late/results.jsonl"), "bytes": 7, "lines": 1, "sha256": hex(b"gone")}],
    });
    s3.put(&format!("{PLACE}/manifest.json"), late.to_string()).await;
    signal(&process, "CONT");
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (2, 2, 0)), "{:?}", ready(&job));
    assert_eq!(keys(&read(&s3, PLACE, &job).await[0].1), ["k1", "k2"]);
    assert_eq!((env.count(Op::BatchCreate), s3.names().await.len()), (1, 3), "{:?}", s3.names().await);
}

/// Dies at the step and starts again: the same result, paid once, and nothing is left over.
async fn survives(at: &str) {
    let (env, s3) = with_s3().await;
    let mut first = env.spawn(Some(at));
    let prompts = ["a", "b [[sim:error=3]]", "c [[sim:duplicate]]"];
    env.create("job", to_s3(spec(&prompts, None), &s3.endpoint(), PLACE)).await;
    first.ended().await;
    let _second = env.spawn(None);
    let job = env.cleaned("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 2, 1)), "{at}: {:?}", ready(&job));
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1), "{at}");
    let found = read(&s3, PLACE, &job).await;
    let lines: Vec<_> = found.iter().map(|(name, lines)| (name.as_str(), keys(lines))).collect();
    let expected: [(&str, Vec<&str>); 3] = [
        ("results.jsonl", vec!["k1", "k2", "k3"]),
        ("errors.jsonl", vec!["k2"]),
        ("unmatched.jsonl", vec!["k3"]),
    ];
    assert_eq!(lines, expected, "{at}");
    assert_eq!(s3.names().await.len(), 5, "{at}: nothing is left over: {:?}", s3.names().await);
    let manifest = manifest(&s3, PLACE).await;
    assert_eq!(manifest["unmatchedLines"]["duplicate"], json!(1), "{at}");
    assert!(ready(&job).2.contains("1 lines repeat a key"), "{at}: {:?}", ready(&job));
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
    killed_after_the_reservation: "after:ReserveOutput",
    killed_when_the_place_is_claimed: "publish:claimed",
    killed_after_the_results: "publish:results.jsonl",
    killed_before_the_manifest: "publish:unmatched.jsonl",
    killed_after_the_manifest: "publish:manifest.json",
    killed_after_all_was_stored: "after:StoreResults",
    killed_before_the_end_is_recorded: "before:Finished",
}

/// Ten thousand requests on their way from S3 to S3. Dies with some of them at Gemini, with some of the results read, and
/// with parts of them written: the same results in the end, paid once.
#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_midst_of_each_transfer_the_results_are_the_same() {
    const COUNT: usize = 10_000;
    let (env, s3) = with_s3().await;
    let content = (0..COUNT).fold(String::new(), |all, i| {
        let shuffle = if i == 0 { "[[sim:shuffle]]" } else { "" };
        all + &line(&i.to_string(), &format!("[[sim:big=2000]]{shuffle} {}", "y".repeat(1900))) + "\n"
    });
    let sent = hex(content.as_bytes());
    s3.put("in", content).await;
    let input = json!({"uri": format!("s3://{BUCKET}/in"), "credentialsRef": {"name": "store"}, "endpoint": s3.endpoint()});
    let to = |place| to_s3(with_input(json!({"objectStore": input}), None), &s3.endpoint(), place);

    let mut process = env.spawn(Some("upload:chunk@2"));
    env.create("killed", to(PLACE)).await;
    process.ended().await;
    assert_eq!(env.count(Op::BatchCreate), 0);
    let mut process = env.spawn(Some("results:line@5000"));
    process.ended().await;
    assert_eq!(s3.get(&format!("{PLACE}/manifest.json")).await, None);
    let mut process = env.spawn(Some("publish:chunk@60"));
    process.ended().await;
    assert!(s3.parts() > 0, "on their way");
    assert_eq!(s3.get(&format!("{PLACE}/manifest.json")).await, None);
    let _last = env.spawn(None);
    let killed = env.cleaned("killed").await;
    assert_eq!(
        (state(&killed), counts(&killed)),
        ("Succeeded", (size(COUNT), size(COUNT), 0)),
        "{:?}",
        ready(&killed)
    );
    assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1));
    let attempts = &killed.status.as_ref().unwrap().attempts;
    assert_eq!(attempts.iter().map(|a| a.input_sha256.as_deref()).collect::<Vec<_>>(), [Some(sent.as_str())]);
    let found = read(&s3, PLACE, &killed).await;
    let expected: Vec<String> = (0..COUNT).map(|i| i.to_string()).collect();
    assert_eq!((found.len(), keys(&found[0].1)), (1, expected.iter().map(String::as_str).collect()));

    env.create("undisturbed", to("undisturbed")).await;
    let undisturbed = env.cleaned("undisturbed").await;
    assert_eq!(objects(&killed)[0].sha256, objects(&undisturbed)[0].sha256);
}

// ---------------------------------------------------------------------------------------------------- rules

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_meant_is_refused_at_once() {
    let env = Env::new().await;
    let input = |place: Value| {
        let mut store = json!({"credentialsRef": {"name": "store"}});
        store.as_object_mut().unwrap().extend(place.as_object().unwrap().clone());
        with_input(json!({ "objectStore": store }), None)
    };
    let to = |spec: Value, uri: &str| with(spec, json!({"output": {"objectStore": {"uri": uri}}}));
    let any = || spec(&["a"], None);
    for (name, spec, says) in [
        (
            "both",
            with(any(), json!({"output": {"configMap": {"name": "o"}, "objectStore": {"uri": "s3://b/o"}}})),
            "exactly one of configMap and objectStore",
        ),
        ("neither", with(any(), json!({"output": {}})), "exactly one of configMap and objectStore"),
        (
            "delete",
            with(any(), json!({"output": {"objectStore": {"uri": "s3://b/o"}, "retention": "Delete"}})),
            "lifecycle rule",
        ),
        ("not-a-place", to(any(), "http://b/o"), "must be like s3://BUCKET/PATH"),
        (
            "below-its-input",
            to(input(json!({"prefix": "s3://b/in/"})), "s3://b/in/out"),
            "must be a place where",
        ),
        ("its-input", to(input(json!({"prefix": "s3://b/in/"})), "s3://b/in"), "must be a place where"),
        (
            "its-manifest",
            to(input(json!({"uri": "s3://b/o/manifest.json"})), "s3://b/o/"),
            "must be a place where",
        ),
    ] {
        let refused = env.try_create(name, spec).await.unwrap_err().to_string();
        assert!(refused.contains(says), "{name}: {refused}");
    }
    for (name, spec) in [
        ("beside-its-input", to(input(json!({"prefix": "s3://b/in/"})), "s3://b/in-results")),
        ("around-its-input", to(input(json!({"uri": "s3://b/run/in.jsonl"})), "s3://b/run")),
        ("a-whole-bucket", to(any(), "az://account/box")),
    ] {
        env.try_create(name, spec).await.unwrap();
    }
}
