//! Inputs in object stores: real servers, real objects, and what a user sees when something is wrong with them.

use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gemini_batch_operator::api::{GeminiBatchJob, conditions};
use gemini_simulator::{Config, Effect, Fault as Planted, Op, Outcome};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::harness::{Env, PATIENCE, condition, counts, line, ready, spec, state, with_input};
use crate::stores::{
    ACCESS_KEY, AZURITE, AZURITE_KEY, BUCKET, Fault, Proxy, SECRET_KEY, Server, no_oauth, s3_secret,
};

/// A spec whose input lies in the S3 server.
fn from_s3(place: &Value, endpoint: &str, output: Option<&str>) -> Value {
    let mut input = json!({"credentialsRef": {"name": "store"}, "endpoint": endpoint});
    input.as_object_mut().unwrap().extend(place.as_object().unwrap().clone());
    with_input(json!({ "objectStore": input }), output)
}

fn uri(name: &str) -> Value {
    json!({"uri": format!("s3://{BUCKET}/{name}")})
}

fn lines(keys: std::ops::Range<usize>) -> String {
    keys.fold(String::new(), |all, i| all + &line(&format!("k{i}"), "What is the capital of France?") + "\n")
}

/// So many lines of about a kilobyte each.
fn long_lines(n: usize) -> String {
    let prompt = "x".repeat(1000);
    (0..n).fold(String::new(), |all, i| all + &line(&format!("k{i}"), &prompt) + "\n")
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |all, b| format!("{all}{b:02x}"))
}

fn sent_sha(job: &GeminiBatchJob) -> &str {
    job.status.as_ref().unwrap().attempts.last().unwrap().input_sha256.as_deref().unwrap()
}

/// Keys of `results.jsonl`, in its order.
async fn result_keys(env: &Env) -> Vec<String> {
    let out = env.config_maps().get("out").await.unwrap();
    let key = |line: &str| serde_json::from_str::<Value>(line).unwrap()["key"].as_str().unwrap().to_owned();
    out.data.unwrap()["results.jsonl"].lines().map(key).collect()
}

fn keys(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|i| format!("k{i}")).collect()
}

/// An operator that may talk to that endpoint, and the Secret `store`.
async fn env_for(endpoint: &str, extra: &[&str]) -> Env {
    let allowed = format!("--object-store-endpoints={endpoint}");
    let flags: Vec<&str> = extra.iter().copied().chain([allowed.as_str()]).collect();
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &flags).await;
    env.secret("store", &s3_secret()).await;
    env
}

/// A server, and an operator that may talk to it.
async fn with_s3(extra: &[&str]) -> (Env, Server) {
    let server = Server::s3();
    (env_for(&server.endpoint(), extra).await, server)
}

/// The same with a proxy in between.
async fn with_proxy(fault: Fault, extra: &[&str]) -> (Env, Server, Proxy) {
    let server = Server::s3();
    let proxy = Proxy::before(&server, fault).await;
    (env_for(&proxy.endpoint(), extra).await, server, proxy)
}

async fn waits_for(env: &Env, name: &str, reason: &str) -> GeminiBatchJob {
    env.until(name, &format!("waiting by {reason}"), |j| ready(j).1 == reason).await
}

// ------------------------------------------------------------------------------------------- as it should be

#[tokio::test(flavor = "multi_thread")]
async fn an_object_in_s3_becomes_a_batch_and_its_results_are_joined() {
    let (env, s3) = with_s3(&[]).await;
    env.operator().await;
    let content = lines(0..50);
    s3.put("team/in.jsonl", content.clone()).await;
    env.create("job", from_s3(&uri("team/in.jsonl"), &s3.endpoint(), Some("out"))).await;
    let job = env.finished("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (50, 50, 0)));
    // What was paid for is what lies there.
    assert_eq!(sent_sha(&job), hex(content.as_bytes()));
    assert_eq!(job.status.as_ref().unwrap().attempts[0].request_count, Some(50));
    assert_eq!(result_keys(&env).await, keys(0..50), "in input order");
    assert_eq!((env.sim.batches().len(), env.count(Op::BatchCreate)), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_in_cloud_storage_does_as_well() {
    let gcs = Server::gcs().await;
    let env = env_for(&gcs.endpoint(), &[]).await;
    env.operator().await;
    env.secret("google", &json!({"serviceAccountKey": no_oauth()})).await;
    gcs.put("team/in.jsonl", lines(0..3)).await;
    let input = |place: &str, uri: &str| json!({"objectStore": {place: uri, "credentialsRef": {"name": "google"}, "endpoint": gcs.endpoint()}});
    let object = input("uri", &format!("gs://{BUCKET}/team/in.jsonl"));
    env.create("job", with_input(object, Some("out"))).await;
    let job = env.finished("job").await;
    assert_eq!((state(&job), sent_sha(&job)), ("Succeeded", hex(lines(0..3).as_bytes()).as_str()));
    assert_eq!(result_keys(&env).await, keys(0..3));
    // And what is not there is told apart from a bucket that is not.
    for (name, uri, says) in [
        ("no-object", format!("gs://{BUCKET}/nope"), "nope does not exist"),
        ("no-bucket", "gs://no-such-bucket/x".to_owned(), "does not exist"),
    ] {
        env.create(name, with_input(input("uri", &uri), None)).await;
        let (_, _, message) = ready(&env.stalled(name, "InputNotFound").await);
        assert!(message.contains(says), "{message}");
    }
    gcs.put("many/b", lines(1..2)).await;
    gcs.put("many/a", lines(0..1)).await;
    env.create("many", with_input(input("prefix", &format!("gs://{BUCKET}/many/")), None)).await;
    assert_eq!(sent_sha(&env.finished("many").await), hex(lines(0..2).as_bytes()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_in_azure_does_as_well() {
    let az = Server::az().await;
    let allowed = format!("http://127.0.0.1:{}", az.port);
    let env = env_for(&allowed, &[]).await;
    env.operator().await;
    env.secret("azure", &json!({"accountKey": AZURITE_KEY})).await;
    let wrong = STANDARD.encode("CANARY-wrong");
    env.secret("wrong", &json!({"accountKey": wrong})).await;
    az.put("team/in.jsonl", lines(0..3)).await;
    let input = |place: &str, path: &str, secret: &str| {
        let uri = format!("az://{AZURITE}/{path}");
        json!({"objectStore": {place: uri, "credentialsRef": {"name": secret}, "endpoint": az.endpoint()}})
    };
    let object = input("uri", &format!("{BUCKET}/team/in.jsonl"), "azure");
    env.create("job", with_input(object, Some("out"))).await;
    let job = env.finished("job").await;
    assert_eq!((state(&job), sent_sha(&job)), ("Succeeded", hex(lines(0..3).as_bytes()).as_str()));
    assert_eq!(result_keys(&env).await, keys(0..3));
    for (name, path, secret, reason, says) in [
        ("no-blob", "inputs/nope", "azure", "InputNotFound", "inputs/nope does not exist"),
        (
            "no-container",
            "nothing/x",
            "azure",
            "InputNotFound",
            "the bucket of az://devstoreaccount1/nothing/x",
        ),
        ("wrong-key", "inputs/team/in.jsonl", "wrong", "StoreAccessDenied", "AuthorizationFailure"),
    ] {
        env.create(name, with_input(input("uri", path, secret), None)).await;
        let (_, _, message) = ready(&env.stalled(name, reason).await);
        assert!(message.contains(says) && !message.contains(&wrong), "{message}");
    }
    az.put("many/b", lines(1..2)).await;
    az.put("many/a", lines(0..1)).await;
    env.create("many", with_input(input("prefix", &format!("{BUCKET}/many/"), "azure"), None)).await;
    assert_eq!(sent_sha(&env.finished("many").await), hex(lines(0..2).as_bytes()));
}

/// What an administrator mapped, and nothing beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_in_a_mapped_directory_does_as_well_and_nothing_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("data");
    std::fs::create_dir_all(root.join("team")).unwrap();
    std::fs::write(root.join("team/in.jsonl"), lines(0..3)).unwrap();
    std::fs::write(dir.path().join("secret"), lines(0..3)).unwrap();
    std::os::unix::fs::symlink("../secret", root.join("link")).unwrap();
    let mapped = format!("--mapped-directories=shared={}", root.display());
    let env = Env::with(Config { speed: 600.0, ..Config::default() }, &[&mapped]).await;
    env.operator().await;
    let file = |uri: &str| with_input(json!({"objectStore": {"uri": uri}}), None);
    env.create("job", file("file://shared/team/in.jsonl")).await;
    assert_eq!(sent_sha(&env.finished("job").await), hex(lines(0..3).as_bytes()));
    for (name, uri, reason, says) in [
        ("up", "file://shared/../secret", "InputInvalid", "must not have"),
        ("link", "file://shared/link", "InputInvalid", "symbolic links are not followed"),
        ("other", "file://etc/passwd", "StoreNotAllowed", "--mapped-directories"),
        ("missing", "file://shared/nope", "InputNotFound", "does not exist"),
    ] {
        env.create(name, file(uri)).await;
        let (_, _, message) = ready(&env.stalled(name, reason).await);
        assert!(message.contains(says) && !message.contains(dir.path().to_str().unwrap()), "{message}");
    }
    assert_eq!(env.sim.batches().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_objects_below_a_prefix_are_one_input_in_the_order_of_their_names() {
    let (env, s3) = with_s3(&[]).await;
    env.operator().await;
    // Each ends as people's files end.
    s3.put("day/part-10", format!("\u{feff}{}", lines(2..4).replace('\n', "\r\n"))).await;
    s3.put("day/part-02", lines(0..2).trim_end()).await;
    s3.put("day/sub/part-01", format!("\n\n{}\n\n", lines(4..5))).await;
    s3.put("day/empty", "").await;
    s3.put("daylight", lines(7..9)).await;
    let prefix = json!({"prefix": format!("s3://{BUCKET}/day/")});
    env.create("job", from_s3(&prefix, &s3.endpoint(), Some("out"))).await;
    let job = env.finished("job").await;
    assert_eq!((state(&job), counts(&job)), ("Succeeded", (5, 5, 0)), "{:?}", ready(&job));
    assert_eq!(sent_sha(&job), hex(lines(0..5).as_bytes()));
    assert_eq!(result_keys(&env).await, keys(0..5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_what_lies_there_and_sends_nothing() {
    let (env, s3) = with_s3(&[]).await;
    env.operator().await;
    let content = lines(0..3);
    s3.put("in.jsonl", content.clone()).await;
    let mut spec = from_s3(&uri("in.jsonl"), &s3.endpoint(), None);
    spec["dryRun"] = json!(true);
    env.create("job", spec).await;
    let job = env
        .until("job", "validated", |j| {
            condition(j, conditions::VALIDATED).is_some_and(|(status, ..)| status == "True")
        })
        .await;
    let found = job.status.as_ref().unwrap().dry_run.as_ref().unwrap();
    assert_eq!(found.size_bytes, i64::try_from(content.len()).unwrap());
    assert_eq!(found.sha256, hex(content.as_bytes()));
    assert_eq!(env.sim.batches().len(), 0);
}

/// A further attempt carries the requests without a result, and no other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_further_attempt_carries_what_has_no_result() {
    let (env, s3) = with_s3(&[]).await;
    env.operator().await;
    let prompts = ["[[sim:job=expire]] [[sim:partial]]", "b", "c", "d [[sim:error=3]]"];
    let all: Vec<String> =
        prompts.iter().enumerate().map(|(i, p)| line(&format!("k{i}"), p) + "\n").collect();
    s3.put("in.jsonl", all.concat()).await;
    for output in [None, Some("out")] {
        let name = output.unwrap_or("job");
        let mut spec = from_s3(&uri("in.jsonl"), &s3.endpoint(), output);
        spec["backoffLimit"] = json!(1);
        env.create(name, spec).await;
        let job = env.cleaned(name).await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (4, 3, 1)), "{:?}", ready(&job));
        let attempts = &job.status.as_ref().unwrap().attempts;
        assert_eq!(attempts[0].input_sha256.as_deref(), Some(hex(all.concat().as_bytes()).as_str()));
        assert_eq!(attempts[1].input_sha256.as_deref(), Some(hex(all[2..].concat().as_bytes()).as_str()));
    }
    assert_eq!(result_keys(&env).await, keys(0..4));
    assert_eq!(env.sim.batches().iter().map(|b| b.requests).collect::<Vec<_>>(), [4, 2, 4, 2]);
}

// ------------------------------------------------------------------------------ somebody has to change something

/// Each is said with what to change, costs nothing, and is over once it is repaired.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_and_once_repaired_the_job_goes_on() {
    let (env, s3) = with_s3(&["--max-input-bytes=2000"]).await;
    env.operator().await;
    let endpoint = s3.endpoint();
    let of = |place: &Value, secret: &str| {
        let mut spec = from_s3(place, &endpoint, None);
        spec["input"]["objectStore"]["credentialsRef"]["name"] = json!(secret);
        spec
    };
    let object = uri;
    let prefix = |name: &str| json!({"prefix": format!("s3://{BUCKET}/{name}/")});
    s3.put("good", lines(0..2)).await;
    let secret = "CANARY-PROMPT";
    let (a, b) = (line("a", secret), line("b", secret));
    s3.put("bad-line", format!("{a}\n\nnot json {secret}\n{b}")).await;
    s3.put("two-keys/1", format!("{a}\n{b}\n")).await;
    s3.put("two-keys/2", format!("\n{a}")).await;
    s3.put("large", lines(0..30)).await;
    s3.put("blank", "\n  \n").await;
    s3.put("zipped", [0x1f, 0x8b, 0x08, 0, b'\n', 1]).await;
    let wrong_key = json!({"accessKeyId": "AKIATEST", "secretAccessKey": "CANARY-wrong"});
    env.secret("wrong-key", &wrong_key).await;
    env.secret("unknown-key", &json!({"accessKeyId": "CANARY-nobody", "secretAccessKey": "x"})).await;
    env.secret("no-key", &json!({"accessKeyId": "CANARY"})).await;
    let jobs = [
        ("no-object", of(&object("nope"), "store"), "InputNotFound", "s3://inputs/nope does not exist"),
        ("no-objects", of(&prefix("below"), "store"), "InputNotFound", "no object below s3://inputs/below/"),
        (
            "no-bucket",
            of(&json!({"uri": "s3://other/in"}), "store"),
            "InputNotFound",
            "the bucket of s3://other/in does not exist",
        ),
        (
            "bad-line",
            of(&object("bad-line"), "store"),
            "InputInvalid",
            "s3://inputs/bad-line: line 3 is not valid JSON",
        ),
        (
            "two-keys",
            of(&prefix("two-keys"), "store"),
            "InputInvalid",
            "s3://inputs/two-keys/2: line 2 has the same key as s3://inputs/two-keys/1: line 1",
        ),
        ("large", of(&object("large"), "store"), "InputTooLarge", "at most 2000 bytes"),
        ("blank", of(&object("blank"), "store"), "InputInvalid", "holds no requests"),
        ("zipped", of(&object("zipped"), "store"), "InputInvalid", "is compressed"),
        ("no-secret", of(&object("good"), "nope"), "CredentialsNotFound", "Secret nope does not exist"),
        ("no-key", of(&object("good"), "no-key"), "CredentialsInvalid", "Secret no-key lacks"),
        ("wrong-key", of(&object("good"), "wrong-key"), "StoreAccessDenied", "SignatureDoesNotMatch"),
        ("unknown-key", of(&object("good"), "unknown-key"), "StoreAccessDenied", "XAdminUserNotFound"),
    ];
    for (name, spec, ..) in &jobs {
        env.create(name, spec.clone()).await;
    }
    for (name, _, reason, says) in &jobs {
        let job = env.stalled(name, reason).await;
        let (_, _, message) = ready(&job);
        assert!(message.contains(says), "{name}: {message}");
        let shown = serde_json::to_string(&job.status).unwrap();
        assert!(!shown.contains("CANARY"), "{name}: {shown}");
        assert_eq!(state(&job), "Pending", "{name}");
    }
    assert_eq!(env.sim.batches().len(), 0);
    // The repairs.
    for name in ["nope", "below/1", "bad-line", "large", "blank", "zipped"] {
        s3.put(name, lines(0..2)).await;
    }
    s3.put("two-keys/2", line("c", "x")).await;
    for name in ["nope", "no-key", "wrong-key", "unknown-key"] {
        env.secret(name, &s3_secret()).await;
    }
    std::fs::create_dir_all(s3.dir.path().join("data/other")).unwrap();
    s3.put_into("other", "in", lines(0..2)).await;
    for (name, ..) in &jobs {
        assert_eq!(state(&env.finished(name).await), "Succeeded", "{name}");
    }
    assert_eq!(env.sim.batches().len(), jobs.len());
}

/// A problem is looked at again without reading the objects again, and without a write.
#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_stays_bad_costs_a_look_and_not_a_read() {
    let (env, s3, proxy) = with_proxy(Fault::None, &[]).await;
    env.operator().await;
    s3.put("in", format!("{}not json", long_lines(500))).await;
    env.create("job", from_s3(&uri("in"), &proxy.endpoint(), None)).await;
    let before = env.stalled("job", "InputInvalid").await.metadata.resource_version;
    let read = proxy.bytes();
    let (looks, start) = (proxy.requests(), Instant::now());
    while proxy.requests() < looks + 3 {
        assert!(start.elapsed() < PATIENCE, "it is not looked at again");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(proxy.bytes() - read < 20_000, "{} bytes were read again", proxy.bytes() - read);
    assert_eq!(env.jobs().get("job").await.unwrap().metadata.resource_version, before);
}

// -------------------------------------------------------------------------------- what only an administrator allows

#[tokio::test(flavor = "multi_thread")]
async fn what_no_administrator_allowed_is_refused_before_anything_is_connected_to() {
    let s3 = Server::s3();
    let proxy = Proxy::before(&s3, Fault::None).await;
    let env = Env::with(Config::default(), &["--object-store-endpoints=https://listed.example.com,*"]).await;
    env.operator().await;
    env.secret("store", &s3_secret()).await;
    let own = with_input(json!({"objectStore": uri("in")}), None);
    for (name, spec, says) in [
        ("plain", from_s3(&uri("in"), &proxy.endpoint(), None), "without TLS"),
        (
            "loopback",
            from_s3(&uri("in"), &format!("https://127.0.0.1:{}", proxy.port), None),
            "lists it by name",
        ),
        ("metadata", from_s3(&uri("in"), "https://169.254.169.254", None), "lists it by name"),
        ("metadata-6", from_s3(&uri("in"), "https://[fd00:ec2::254]", None), "lists it by name"),
        // A name that resolves to such an address is noticed when it is connected to.
        (
            "name",
            from_s3(&uri("in"), &format!("https://localhost:{}", proxy.port), None),
            "leads to localhost",
        ),
        ("own", own, "--own-identity-namespaces"),
    ] {
        env.create(name, spec).await;
        let (_, _, message) = ready(&env.stalled(name, "StoreNotAllowed").await);
        assert!(message.contains(says), "{name}: {message}");
    }
    assert_eq!(proxy.connections(), 0, "not a single connection");
}

/// The pod's own identity, as its environment says: for the namespaces that an administrator listed, and for nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn the_operators_own_identity_is_lent_to_listed_namespaces() {
    let s3 = Server::s3();
    s3.put("in", lines(0..3)).await;
    let endpoint = s3.endpoint();
    let env = env_for(&endpoint, &[]).await;
    let own = with_input(json!({"objectStore": uri("in")}), None);
    let identity = [
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ("AWS_ENDPOINT_URL", &endpoint),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    {
        let _unlisted = env.spawn_in(&identity, &["--own-identity-namespaces=other"]);
        env.create("own", own).await;
        let (_, _, message) = ready(&env.stalled("own", "StoreNotAllowed").await);
        assert!(message.contains(&format!("add {} to", env.namespace)), "{message}");
        // Whoever brings a Secret gets no help from the environment.
        env.secret("half", &json!({"accessKeyId": ACCESS_KEY})).await;
        let mut half = from_s3(&uri("in"), &endpoint, None);
        half["input"]["objectStore"]["credentialsRef"]["name"] = json!("half");
        env.create("half", half).await;
        env.stalled("half", "CredentialsInvalid").await;
    }
    let listed = format!("--own-identity-namespaces={}", env.namespace);
    let process = env.spawn_in(&identity, &[&listed]);
    assert_eq!(state(&env.finished("own").await), "Succeeded");
    assert!(!process.log().contains(SECRET_KEY));
}

// ------------------------------------------------------------------------------------------------- what passes

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_waited_for() {
    for (fault, says) in
        [(Fault::Status(503), "HTTP 503"), (Fault::Refuse, "broke off"), (Fault::StallAfter(0), "in time")]
    {
        let (env, s3, proxy) = with_proxy(fault, &[]).await;
        env.operator().await;
        s3.put("in", lines(0..3)).await;
        env.create("job", from_s3(&uri("in"), &proxy.endpoint(), None)).await;
        let job = waits_for(&env, "job", "StoreUnavailable").await;
        let (_, _, message) = ready(&job);
        assert!(message.contains(says) && message.contains("it is tried again"), "{fault:?}: {message}");
        let stalled = condition(&job, conditions::STALLED).is_some_and(|(status, ..)| status == "True");
        assert!(!stalled, "nobody has to do anything");
        proxy.set(Fault::None);
        assert_eq!(state(&env.finished("job").await), "Succeeded", "{fault:?}");
        assert_eq!(env.sim.batches().len(), 1);
    }
}

/// Each connection gives a part of it only; the object is read on where it broke off, twice.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_breaks_off_is_read_on() {
    let (env, s3, proxy) = with_proxy(Fault::CutAfter(100_000), &[]).await;
    env.operator().await;
    let content = long_lines(1000);
    s3.put("in", content.clone()).await;
    env.create("job", from_s3(&uri("in"), &proxy.endpoint(), None)).await;
    let job = env.finished("job").await;
    assert_eq!((state(&job), sent_sha(&job)), ("Succeeded", hex(content.as_bytes()).as_str()));
    let least = 2 * content.len();
    assert!(proxy.bytes() < 2 * least, "it was not begun anew each time: {} bytes", proxy.bytes());
}

/// The upload breaks off and goes on from where Gemini has it, not from its beginning.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_goes_on_from_the_last_accepted_byte() {
    let (env, s3) = with_s3(&[]).await;
    let away = |op| Planted {
        op,
        contains: String::new(),
        skip: u32::from(op == Op::UploadChunk),
        times: 4,
        effect: Effect::Status { code: 503, commit: false, envelope: false, retry_after: None },
    };
    env.sim.fault(away(Op::UploadChunk));
    env.operator().await;
    let content = long_lines(20_000); // three chunks
    s3.put("in", content.clone()).await;
    env.create("job", from_s3(&uri("in"), &s3.endpoint(), None)).await;
    let job = env.finished("job").await;
    assert_eq!((state(&job), sent_sha(&job)), ("Succeeded", hex(content.as_bytes()).as_str()));
    assert_eq!(env.count(Op::UploadStart), 1, "it is the same upload");
    assert!(env.count(Op::UploadQuery) >= 3);
}

/// Whatever becomes of the object between the two passes: what was checked is what is paid for.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_changes_before_it_is_sent_is_checked_anew() {
    // Another one of the same size, and one that is larger.
    for (after, range) in [(lines(7..10), 7..10), (lines(0..5), 0..5)] {
        let (env, s3) = with_s3(&[]).await;
        env.sim.fault(Planted {
            op: Op::UploadStart,
            contains: String::new(),
            skip: 0,
            times: u32::MAX,
            effect: Effect::Status { code: 503, commit: false, envelope: false, retry_after: None },
        });
        env.operator().await;
        let before = lines(3..6);
        s3.put("in", before.clone()).await;
        env.create("job", from_s3(&uri("in"), &s3.endpoint(), Some("out"))).await;
        let job = waits_for(&env, "job", "GeminiUnavailable").await;
        assert_eq!(sent_sha(&job), hex(before.as_bytes()));
        s3.put("in", after.clone()).await;
        env.sim.clear_faults(Op::UploadStart);
        let job = env.finished("job").await;
        assert_eq!(state(&job), "Succeeded");
        assert_eq!(sent_sha(&job), hex(after.as_bytes()));
        assert_eq!(result_keys(&env).await, keys(range));
        assert_eq!((env.sim.batches().len(), env.count(Op::BatchCreate)), (1, 1));
    }
}

/// What was sent can't be told any more: results are kept, and the status says so.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_gone_when_the_results_come_costs_no_result() {
    let (env, s3) = with_s3(&[]).await;
    env.operator().await;
    s3.put("in", line("k0", "[[sim:work=9000000]]")).await;
    env.create("job", from_s3(&uri("in"), &s3.endpoint(), Some("out"))).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    s3.delete("in").await;
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    let job = env.finished("job").await;
    assert_eq!(state(&job), "Succeeded", "{:?}", ready(&job));
    assert_eq!(result_keys(&env).await, keys(0..1));
}

/// Results that could be joined are not stored without that, as long as the store may come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_when_the_results_come_is_waited_for() {
    let (env, s3, proxy) = with_proxy(Fault::None, &[]).await;
    env.operator().await;
    let content = line("k0", "[[sim:work=9000000]]") + "\n" + &lines(1..4);
    s3.put("in", content).await;
    env.create("job", from_s3(&uri("in"), &proxy.endpoint(), Some("out"))).await;
    env.until("job", "running", |j| state(j) == "Running").await;
    proxy.set(Fault::Status(503));
    assert!(env.sim.finish(&env.sim.batches()[0].name, Outcome::Succeeded));
    let job = waits_for(&env, "job", "StoreUnavailable").await;
    assert_eq!(state(&job), "Running");
    env.secret("store", &json!({"secretAccessKey": "wrong"})).await;
    proxy.set(Fault::None);
    env.stalled("job", "StoreAccessDenied").await;
    env.secret("store", &s3_secret()).await;
    assert_eq!(state(&env.finished("job").await), "Succeeded");
    assert_eq!(result_keys(&env).await, keys(0..4), "in input order");
}

/// One transfer at a time, and it stands still: jobs that need none are not held up, and those that do say what for.
#[tokio::test(flavor = "multi_thread")]
async fn other_jobs_go_on_beside_a_slow_transfer() {
    let (env, s3, proxy) = with_proxy(Fault::BytesPerSecond(40_000), &["--transfers=1"]).await;
    env.operator().await;
    s3.put("large", long_lines(400)).await;
    s3.put("small", lines(0..2)).await;
    env.create("large", from_s3(&uri("large"), &proxy.endpoint(), None)).await;
    let (_, _, message) = ready(&waits_for(&env, "large", "WaitingForTransfer").await);
    assert!(message.contains("s3://inputs/large is being read"), "{message}");
    env.create("behind", from_s3(&uri("small"), &proxy.endpoint(), None)).await;
    let (_, _, message) = ready(&waits_for(&env, "behind", "WaitingForTransfer").await);
    assert!(message.contains("--transfers"), "{message}");
    env.create("inline", spec(&["x"], None)).await;
    assert_eq!(state(&env.finished("inline").await), "Succeeded");
    let large = env.jobs().get("large").await.unwrap();
    assert_eq!(ready(&large).1, "WaitingForTransfer", "it is still at it");
    proxy.set(Fault::None);
    for name in ["large", "behind"] {
        assert_eq!(state(&env.finished(name).await), "Succeeded", "{name}");
    }
}

/// Whoever is deleted or held does not wait for a transfer, and leaves its place in the pool.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_deleted_or_held_in_the_midst_of_a_transfer() {
    let (env, s3, proxy) = with_proxy(Fault::BytesPerSecond(10_000), &["--transfers=1"]).await;
    env.operator().await;
    s3.put("large", long_lines(400)).await;
    for end in ["deleted", "held"] {
        env.create(end, from_s3(&uri("large"), &proxy.endpoint(), None)).await;
        waits_for(&env, end, "WaitingForTransfer").await;
        if end == "deleted" {
            env.delete(end).await;
            env.gone(end).await;
        } else {
            let patch = json!({"spec": {"suspend": true}});
            env.jobs().patch(end, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
            env.until(end, "suspended", |j| state(j) == "Suspended").await;
        }
    }
    s3.put("small", lines(0..2)).await;
    env.create("next", from_s3(&uri("small"), &proxy.endpoint(), None)).await;
    assert_eq!(state(&env.finished("next").await), "Succeeded");
    assert!(proxy.bytes() < 300_000, "{} bytes: it waited for what nobody wanted", proxy.bytes());
    assert_eq!(env.sim.batches().len(), 1);
}

// ------------------------------------------------------------------------------------------------- restarts

/// The operator's memory in MiB: `VmRSS` is what it takes now, `VmHWM` the most that it ever took.
pub fn memory(process: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// A hundred megabytes and more keys than are kept in memory: read, checked and sent in less than 64 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_input_takes_little_memory() {
    let (env, s3) = with_s3(&[]).await;
    let process = env.spawn(None);
    s3.put("small", line("k0", "x")).await;
    env.create("small", from_s3(&uri("small"), &s3.endpoint(), None)).await;
    env.cleaned("small").await;
    let idle = memory(process.id(), "VmRSS");
    let long = "x".repeat(1 << 20);
    let mut content = line("first", "[[sim:work=9000000]]") + "\n";
    for i in 0..530_000 {
        content.push_str(&line(&i.to_string(), if i % 7_000 == 0 { &long } else { "x" }));
        content.push('\n');
    }
    let hash = hex(content.as_bytes());
    assert!(content.len() > 100 << 20);
    s3.put("large", content).await;
    env.create("large", from_s3(&uri("large"), &s3.endpoint(), None)).await;
    let job = env.until("large", "at Gemini", |j| state(j) == "Running").await;
    assert_eq!((sent_sha(&job), counts(&job).0), (hash.as_str(), 530_001));
    let peak = memory(process.id(), "VmHWM");
    assert!(peak <= idle + 64, "{idle} MiB at rest, {peak} MiB at most");
}

/// Killed at a step, started again: one batch, with what lies there.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_at_any_step_pays_once() {
    for at in ["before:Intent", "after:Intent", "before:UploadInput", "upload:finishing", "after:CreateBatch"]
    {
        let (env, s3) = with_s3(&[]).await;
        s3.put("in", lines(0..3)).await;
        let mut first = env.spawn(Some(at));
        env.create("job", from_s3(&uri("in"), &s3.endpoint(), Some("out"))).await;
        first.ended().await;
        let second = env.spawn(None);
        let job = env.cleaned("job").await;
        assert_eq!((state(&job), counts(&job)), ("Succeeded", (3, 3, 0)), "{at}");
        assert_eq!((env.count(Op::BatchCreate), env.sim.batches().len()), (1, 1), "{at}");
        assert_eq!(result_keys(&env).await, keys(0..3), "{at}");
        for log in [first.log(), second.log()] {
            assert!(log.contains("decided"), "{at}: {log}");
            assert!(!log.contains(SECRET_KEY) && !log.contains("France"), "{at}: {log}");
        }
    }
}
