//! What the simulator puts on the wire, over HTTP, against the text of the wire contract; and each of its
//! switches and faults.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says what went wrong by panicking")]

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gemini_simulator::{Config, Effect, Fault, Op, Outcome, Simulator, Switches};
use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const PATIENCE: Duration = Duration::from_secs(30);
const CREATE: &str = "v1beta/models/gemini-2.5-flash:batchGenerateContent";
const STALL: &str = "[[sim:job=stall]]";

struct Answer {
    status: u16,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// Asserts a refusal in Google's envelope, and returns its message.
    fn refused(&self, code: u16, status: &str) -> String {
        let error = &self.json()["error"];
        assert_eq!((self.status, &error["code"], &error["status"]), (code, &json!(code), &json!(status)));
        error["message"].as_str().unwrap().to_owned()
    }

    fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }
}

struct Env {
    sim: Simulator,
    http: reqwest::Client,
}

impl Env {
    async fn new() -> Self {
        Self::with(Config::default()).await
    }

    async fn with(config: Config) -> Self {
        let config = Config { speed: config.speed.max(1000.0), ..config };
        Self { sim: Simulator::start(config).await.unwrap(), http: reqwest::Client::new() }
    }

    fn set(&self, change: impl FnOnce(&mut Switches)) {
        let mut switches = self.sim.switches();
        change(&mut switches);
        self.sim.set(switches);
    }

    fn fault(&self, op: Op, effect: Effect) {
        self.sim.fault(Fault { op, contains: String::new(), skip: 0, times: 1, effect });
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer {
        let mut request = self.http.request(method, format!("{}/{path}", self.sim.base_url())).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        Answer {
            status: answer.status().as_u16(),
            headers: answer.headers().clone(),
            text: answer.text().await.unwrap(),
        }
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Answer {
        self.call_as("key", method, path, body).await
    }

    async fn call_as(&self, key: &str, method: &str, path: &str, body: Value) -> Answer {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        self.send(method.parse().unwrap(), path, &[("x-goog-api-key", key)], body).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, Value::Null).await
    }

    async fn start_upload(&self, file: Value, headers: &[(&str, &str)]) -> Answer {
        let mut all = vec![
            ("x-goog-api-key", "key"),
            ("x-goog-upload-protocol", "resumable"),
            ("x-goog-upload-command", "start"),
        ];
        all.extend_from_slice(headers);
        self.send(Method::POST, "upload/v1beta/files", &all, json!({"file": file}).to_string().into()).await
    }

    async fn chunk(&self, url: &str, command: &str, offset: usize, bytes: &str) -> Answer {
        let headers = [("x-goog-upload-command", command), ("x-goog-upload-offset", &offset.to_string())];
        let path = url.strip_prefix(&self.sim.base_url()).unwrap().trim_start_matches('/');
        self.send(Method::POST, path, &headers, bytes.as_bytes().to_vec()).await
    }

    async fn session(&self) -> String {
        let started = self.start_upload(json!({}), &[]).await;
        assert_eq!(started.status, 200, "{}", started.text);
        started.headers["x-goog-upload-url"].to_str().unwrap().to_owned()
    }

    async fn upload(&self, content: &str) -> String {
        let url = self.session().await;
        let file = self.chunk(&url, "upload, finalize", 0, content).await.ok();
        file["file"]["name"].as_str().unwrap().to_owned()
    }

    async fn create(&self, batch: Value) -> Value {
        self.call("POST", CREATE, json!({"batch": batch})).await.ok()
    }

    async fn create_inline(&self, text: &str) -> String {
        self.create(inline(&[text])).await["name"].as_str().unwrap().to_owned()
    }

    async fn ended(&self, name: &str) -> Value {
        let start = Instant::now();
        loop {
            let operation = self.get(&format!("v1beta/{name}")).await.ok();
            if operation["done"] == true {
                return operation;
            }
            assert!(start.elapsed() < PATIENCE, "{operation}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// All pages: what they hold, and how many were empty.
    async fn pages(&self, path: &str, field: &str, token_field: &str) -> (Vec<Value>, usize) {
        let (mut found, mut empty, mut token) = (Vec::new(), 0, String::new());
        loop {
            let page = self.get(&format!("{path}{token}")).await.ok();
            let items = page[field].as_array().cloned().unwrap_or_default();
            empty += usize::from(items.is_empty());
            found.extend(items);
            let Some(next) = page[token_field].as_str() else { return (found, empty) };
            token = format!("&pageToken={next}");
        }
    }
}

fn inline(texts: &[&str]) -> Value {
    let item = |(i, text): (usize, &&str)| {
        json!({"request": {"contents": [{"role": "user", "parts": [{"text": text}]}]},
            "metadata": {"key": format!("k{i}"), "more": i}})
    };
    let items: Vec<Value> = texts.iter().enumerate().map(item).collect();
    json!({"displayName": "job", "inputConfig": {"requests": {"requests": items}}})
}

fn line(key: &str, text: &str) -> String {
    format!("{}\n", json!({"key": key, "request": {"contents": [{"parts": [{"text": text}]}]}}))
}

/// An endpoint that takes the next request; gives its head in lower case and its body.
struct Receiver {
    listener: tokio::net::TcpListener,
    url: String,
}

impl Receiver {
    async fn new() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        Self { listener, url }
    }

    async fn next(&self) -> (Vec<(String, String)>, Value) {
        let (mut stream, _) = tokio::time::timeout(PATIENCE, self.listener.accept()).await.unwrap().unwrap();
        let mut received = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&received).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let headers: Vec<(String, String)> = head
                    .lines()
                    .filter_map(|l| l.split_once(": "))
                    .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
                    .collect();
                let length: usize = header(&headers, "content-length").parse().unwrap();
                if body.len() == length {
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                    stream.write_all(answer).await.unwrap();
                    return (headers, serde_json::from_str(body).unwrap());
                }
            }
            assert_ne!(stream.read_buf(&mut received).await.unwrap(), 0);
        }
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> &'a str {
    &headers.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1
}

#[tokio::test]
async fn keys_come_by_header_query_or_bearer() {
    let keys = Some(vec![("good".to_owned(), "p".to_owned())]);
    let env = Env::with(Config { keys, ..Config::default() }).await;
    let by = |path: &'static str, headers: Vec<(&'static str, &'static str)>| {
        let env = &env;
        async move { env.send(Method::GET, path, &headers, Vec::new()).await }
    };
    assert_eq!(by("v1/batches", vec![("x-goog-api-key", "good")]).await.ok(), json!({}));
    assert_eq!(by("v1beta/files?key=good", vec![]).await.ok(), json!({}));
    assert_eq!(by("v1beta/batches", vec![("authorization", "bearer good")]).await.ok(), json!({}));
    let refused = by("v1beta/batches", vec![("x-goog-api-key", "bad")]).await;
    assert!(refused.refused(400, "INVALID_ARGUMENT").starts_with("API key not valid"));
    assert_eq!(refused.json()["error"]["details"][0]["reason"], "API_KEY_INVALID");
    by("v1beta/batches", vec![]).await.refused(403, "PERMISSION_DENIED");
    by("v1beta/nonsense", vec![]).await.refused(404, "NOT_FOUND");
}

#[tokio::test]
async fn an_operation_is_what_was_captured() {
    let env = Env::new().await;
    let file = env.upload(&line("k1", STALL)).await;
    let mut operation = env.create(json!({"display_name": "op", "input_config": {"file_name": file}})).await;
    let name = operation["name"].as_str().unwrap().to_owned();
    let id = name.strip_prefix("batches/").unwrap();
    assert!(id.len() == 36 && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()), "{id}");
    for time in ["createTime", "updateTime"] {
        let text = operation["metadata"].as_object_mut().unwrap().remove(time).unwrap();
        text.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    }
    assert_eq!(
        operation,
        json!({"name": name, "metadata": {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": "models/gemini-2.5-flash", "displayName": "op", "inputConfig": {"fileName": file},
            "batchStats": {"requestCount": "1", "pendingRequestCount": "1"},
            "state": "BATCH_STATE_PENDING", "name": name}}),
        "neither done nor a zero"
    );

    assert_eq!(env.call("POST", &format!("v1beta/{name}:cancel"), json!({})).await.ok(), json!({}));
    let cancelled = env.get(&format!("v1/{name}")).await.ok();
    assert_eq!(cancelled["done"], true);
    assert_eq!(cancelled["error"], json!({"code": 13, "message": "Batch was cancelled."}));
    assert_eq!(cancelled["response"], Value::Null);
    assert_eq!(cancelled["metadata"]["state"], "BATCH_STATE_CANCELLED");
    assert_eq!(cancelled["metadata"]["batchStats"]["pendingRequestCount"], "1", "frozen");
    assert!(cancelled["metadata"]["endTime"].is_string());
}

#[tokio::test]
async fn a_file_job_derives_the_name_of_its_output() {
    let env = Env::new().await;
    let file = env.upload(&(line("a", "one") + &line("b", "[[sim:error=3]]"))).await;
    let name =
        env.create(json!({"displayName": "x", "inputConfig": {"fileName": file}})).await["name"].clone();
    let operation = env.ended(name.as_str().unwrap()).await;
    let output = format!("files/batch-{}", name.as_str().unwrap().trim_start_matches("batches/"));
    assert_eq!(operation["metadata"]["output"], json!({"responsesFile": output}));
    assert_eq!(operation["response"]["responsesFile"], output);
    let kind = "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatchOutput";
    assert_eq!(operation["response"]["@type"], kind);
    assert_eq!(
        operation["metadata"]["batchStats"],
        json!({"requestCount": "2", "successfulRequestCount": "1", "failedRequestCount": "1"})
    );
    let list = env.get("v1beta/batches").await.ok();
    assert_eq!(list["operations"][0], operation, "lists keep the name of the file");

    for path in [format!("download/v1beta/{output}:download?alt=media"), format!("v1/{output}:download")] {
        let lines = env.get(&path).await;
        assert_eq!((lines.status, lines.text.lines().count()), (200, 2));
    }
    let metadata = env.get(&format!("v1beta/{output}")).await.ok();
    assert_eq!((&metadata["name"], &metadata["source"]), (&json!(output), &json!("GENERATED")));
    let refused = env.call("DELETE", &format!("v1beta/{output}"), Value::Null).await;
    assert!(refused.refused(400, "INVALID_ARGUMENT").contains("more than 40 characters"));

    env.set(|s| s.output_life_hours = 0.0);
    for path in [format!("v1beta/{output}:download"), format!("v1beta/{output}")] {
        env.get(&path).await.refused(403, "PERMISSION_DENIED");
    }
}

#[tokio::test]
async fn a_request_can_fail_a_number_of_times() {
    let env = Env::new().await;
    for expected in [Some(14), Some(14), None, None] {
        let file = env.upload(&(line("a", "[[sim:error=14x2]]") + &line("b", "one"))).await;
        let name =
            env.create(json!({"displayName": "x", "inputConfig": {"fileName": file}})).await["name"].clone();
        let operation = env.ended(name.as_str().unwrap()).await;
        let output = operation["metadata"]["output"]["responsesFile"].as_str().unwrap().to_owned();
        let lines = env.get(&format!("v1beta/{output}:download")).await.text;
        let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!((lines[0]["error"]["code"].as_i64(), lines[0]["key"].as_str()), (expected, Some("a")));
        assert!(lines[1]["response"].is_object());
    }
}

#[tokio::test]
async fn lines_of_an_output_can_be_what_users_reported() {
    let env = Env::new().await;
    let texts = [
        "x",
        "[[sim:no-key]]",
        "[[sim:missing]]",
        "[[sim:duplicate]]",
        "[[sim:foreign=other]]",
        "[[sim:status]]",
        "[[sim:error-no-message]]",
        "[[sim:blocked]]",
        "[[sim:max-tokens]]",
    ];
    let lines: String = texts.iter().enumerate().map(|(i, text)| line(&i.to_string(), text)).collect();
    let file = env.upload(&lines).await;
    let name =
        env.create(json!({"displayName": "x", "inputConfig": {"fileName": file}})).await["name"].clone();
    let output = env.ended(name.as_str().unwrap()).await["response"]["responsesFile"].clone();
    let output = env.get(&format!("v1beta/{}:download?alt=media", output.as_str().unwrap())).await.text;
    let output: Vec<Value> = output.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let keys: Vec<&str> = output.iter().map(|l| l["key"].as_str().unwrap_or("-")).collect();
    assert_eq!(keys, ["0", "-", "3", "3", "other", "4", "5", "6", "7", "8"]);
    assert!(output[6]["status"].as_str().unwrap().starts_with("Bad Request: {"));
    assert_eq!(output[7]["error"], json!({"code": 13}));
    assert_eq!(output[8]["response"]["promptFeedback"]["blockReason"], "SAFETY");
    assert_eq!(output[8]["response"]["candidates"], Value::Null);
    assert_eq!(output[9]["response"]["candidates"][0]["finishReason"], "MAX_TOKENS");
}

#[tokio::test]
async fn a_line_that_is_refused_is_named() {
    let env = Env::new().await;
    let bad = r#"{"key":"b","request":{"contents":[],"thinking_config":{}}}"#;
    let file = env.upload(&format!("{}{bad}\n{{\n", line("a", "x"))).await;
    let body = json!({"batch": {"displayName": "x", "inputConfig": {"fileName": file}}});
    let message = env.call("POST", CREATE, body).await.refused(400, "INVALID_ARGUMENT");
    let (first, second) = message.split_once('\n').unwrap();
    assert_eq!(first, "Error on line 2: invalid JSON, near column 37: no such field: 'thinking_config'");
    assert!(second.starts_with("Error on line 3: invalid JSON, near column "), "{second}");
}

#[tokio::test]
async fn inline_answers_carry_all_metadata_and_stay_out_of_lists() {
    let env = Env::new().await;
    let name = env.create(inline(&["one", "[[sim:error=3]]"])).await["name"].as_str().unwrap().to_owned();
    let operation = env.ended(&name).await;
    let answers = &operation["response"]["inlinedResponses"]["inlinedResponses"];
    assert_eq!(answers, &operation["metadata"]["output"]["inlinedResponses"]["inlinedResponses"]);
    assert_eq!(answers[0]["metadata"], json!({"key": "k0", "more": 0}));
    assert_eq!(answers[0]["key"], Value::Null);
    assert_eq!((&answers[1]["error"]["code"], &answers[1]["response"]), (&json!(3), &Value::Null));
    let listed = &env.get("v1beta/batches").await.ok()["operations"][0];
    assert_eq!(listed["done"], true);
    assert!(!listed.to_string().contains("inlinedResponses"));
}

#[tokio::test]
async fn embeddings_have_an_operation_of_their_own_shape() {
    let env = Env::new().await;
    let item = json!({"request": {"content": {"parts": [{"text": "x"}]}, "taskType": "CLUSTERING",
        "outputDimensionality": 4}, "metadata": {"key": "e"}});
    let body = json!({"batch": {"inputConfig": {"requests": {"requests": [item]}}}});
    let path = "v1beta/models/gemini-embedding-001:asyncBatchEmbedContent";
    let created = env.call("POST", path, body).await.ok();
    assert_eq!(created["metadata"]["displayName"], Value::Null, "it goes without");
    let operation = env.ended(created["name"].as_str().unwrap()).await;
    let kind = "type.googleapis.com/google.ai.generativelanguage.v1main.EmbedContentBatch";
    assert_eq!(operation["metadata"]["@type"], kind);
    assert_eq!(operation["metadata"]["updateTime"], Value::Null);
    let answer = &operation["response"]["inlinedEmbedContentResponses"]["inlinedResponses"][0];
    assert_eq!(answer["metadata"], json!({"key": "e"}));
    assert_eq!(answer["response"]["embedding"]["values"].as_array().unwrap().len(), 4);
    assert!(answer["response"]["usageMetadata"]["promptTokenCount"].is_u64());
}

#[tokio::test]
async fn creates_are_validated() {
    let env = Env::new().await;
    let create = |batch: Value| {
        let env = &env;
        async move { env.call("POST", CREATE, json!({"batch": batch})).await.refused(400, "INVALID_ARGUMENT") }
    };
    let mut both = inline(&["x"]);
    both["inputConfig"]["fileName"] = json!("files/x");
    assert!(create(both).await.contains("exactly one"));
    let mut unknown = inline(&["x"]);
    unknown["extra"] = json!(1);
    let text = "Invalid JSON payload received. Unknown name \"extra\" at 'batch': Cannot find field.";
    assert_eq!(create(unknown).await, text);
    let mut nested = inline(&["x"]);
    nested["inputConfig"]["requests"]["requests"][0]["request"]["temperature"] = json!(1);
    assert!(create(nested).await.contains("Unknown name \"temperature\""));
    let mut empty = inline(&["x"]);
    empty["inputConfig"]["requests"]["requests"][0]["request"] = json!({});
    assert!(create(empty).await.contains("contents"));
    assert!(create(json!({"displayName": "x"})).await.contains("input_config"));
    let refused = env.send(Method::POST, CREATE, &[("x-goog-api-key", "key")], b"{".to_vec()).await;
    refused.refused(400, "INVALID_ARGUMENT");

    let unknown = "v1/models/no-such:batchGenerateContent";
    let refused = env.call("POST", unknown, json!({"batch": inline(&["x"])})).await;
    assert!(refused.refused(404, "NOT_FOUND").contains("for API version v1,"));
    let missing = json!({"batch": {"displayName": "x", "inputConfig": {"fileName": "files/none"}}});
    env.call("POST", CREATE, missing.clone()).await.refused(403, "PERMISSION_DENIED");
    let file = env.upload(&line("a", "x")).await;
    let foreign = json!({"batch": {"displayName": "x", "inputConfig": {"fileName": file}}});
    env.call_as("another", "POST", CREATE, foreign).await.refused(404, "NOT_FOUND");
}

#[tokio::test]
async fn a_request_for_another_model_is_a_question_that_is_open() {
    let env = Env::new().await;
    let mut batch = inline(&["x"]);
    batch["inputConfig"]["requests"]["requests"][0]["request"]["model"] = json!("models/gemini-2.5-pro");
    let created = env.create(batch.clone()).await;
    assert_eq!(created["metadata"]["model"], "models/gemini-2.5-flash");
    env.set(|s| s.other_model_refused = true);
    env.call("POST", CREATE, json!({"batch": batch})).await.refused(400, "INVALID_ARGUMENT");
    batch["inputConfig"]["requests"]["requests"][0]["request"]["model"] = json!("gemini-2.5-flash");
    env.create(batch).await;
}

#[tokio::test]
async fn pages() {
    let env = Env::new().await;
    for _ in 0..5 {
        env.create_inline(STALL).await;
        env.upload("x").await;
    }
    let mut names: Vec<Value> = env.sim.batches().iter().map(|b| json!(b.name)).collect();
    names.reverse();
    let name_of = |found: &[Value]| found.iter().map(|o| o["name"].clone()).collect::<Vec<_>>();
    let (found, empty) = env.pages("v1beta/batches?pageSize=2", "operations", "nextPageToken").await;
    assert_eq!((name_of(&found), empty), (names.clone(), 0), "newest first");
    env.set(|s| s.empty_pages = true);
    let (found, empty) = env.pages("v1beta/batches?pageSize=2", "operations", "nextPageToken").await;
    assert_eq!((name_of(&found), empty), (names.clone(), 3), "an empty page before each");
    let (found, _) = env.pages("v1beta/files?pageSize=2", "files", "nextPageToken").await;
    assert_eq!(found.len(), 5);
    env.set(|s| (s.empty_pages, s.page_limit) = (false, 2));
    let page = env.get("v1beta/batches?pageSize=100").await.ok();
    assert_eq!(page["operations"].as_array().unwrap().len(), 2, "pages may be short");
    env.get("v1beta/batches?pageToken=nonsense").await.refused(400, "INVALID_ARGUMENT");
}

#[tokio::test]
async fn counts_in_lists_may_be_stale() {
    let env = Env::new().await;
    env.set(|s| s.stale_stats_in_list = true);
    let name = env.create_inline("x").await;
    let operation = env.ended(&name).await;
    assert_eq!(operation["metadata"]["batchStats"]["successfulRequestCount"], "1");
    let listed = &env.get("v1beta/batches").await.ok()["operations"][0];
    assert_eq!(listed["metadata"]["state"], "BATCH_STATE_SUCCEEDED");
    assert_eq!(listed["metadata"]["batchStats"], json!({"requestCount": "1", "pendingRequestCount": "1"}));
}

#[tokio::test]
async fn a_big_inline_answer_times_out_while_lists_work() {
    let env = Env::new().await;
    let name = env.create_inline("[[sim:big=5000]]").await;
    env.ended(&name).await;
    env.set(|s| s.inline_get_limit = Some(4000));
    env.get(&format!("v1beta/{name}")).await.refused(504, "DEADLINE_EXCEEDED");
    assert_eq!(env.get("v1beta/batches").await.ok()["operations"][0]["done"], true);
}

#[tokio::test]
async fn deleting_hides_a_batch_and_may_not_stop_it() {
    let receiver = Receiver::new().await;
    let mut batch = inline(&["[[sim:work=100]]"]); // a tenth of a second
    batch["webhookConfig"] = json!({"uris": [receiver.url]});
    for goes_on in [false, true] {
        let env = Env::new().await;
        env.set(|s| s.delete_keeps_working = goes_on);
        let name = env.create(batch.clone()).await["name"].as_str().unwrap().to_owned();
        assert_eq!(env.call("DELETE", &format!("v1beta/{name}"), Value::Null).await.ok(), json!({}));
        env.get(&format!("v1beta/{name}")).await.refused(404, "NOT_FOUND");
        assert_eq!(env.get("v1beta/batches").await.ok(), json!({}));
        if goes_on {
            let (_, event) = receiver.next().await;
            assert!(name.ends_with(event["data"]["id"].as_str().unwrap()));
        } else {
            assert!(!env.sim.finish(&name, Outcome::Succeeded));
            assert_eq!(env.sim.batches()[0].state, "PENDING", "nothing ends it");
        }
    }
}

#[tokio::test]
async fn two_days_are_the_longest_life() {
    let env = Env::with(Config { speed: 500_000.0, ..Config::default() }).await; // a third of a second
    let operation = env.ended(&env.create_inline(STALL).await).await;
    assert_eq!(operation["metadata"]["state"], "BATCH_STATE_EXPIRED");
    assert_eq!((&operation["error"]["code"], &operation["response"]), (&json!(4), &Value::Null));
}

#[tokio::test]
async fn a_cancel_may_lose_the_race() {
    let env = Env::new().await;
    env.set(|s| s.cancel_race = true);
    let name = env.create(inline(&["[[sim:work=1000000]]", "b"])).await["name"].as_str().unwrap().to_owned();
    let start = Instant::now();
    while env.sim.batches()[0].state != "RUNNING" {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    env.call("POST", &format!("v1beta/{name}:cancel"), json!({})).await.ok();
    let operation = env.ended(&name).await;
    assert_eq!(operation["metadata"]["state"], "BATCH_STATE_SUCCEEDED");
    assert_eq!(operation["response"]["inlinedResponses"]["inlinedResponses"][1]["error"]["code"], 1);
    assert_eq!(operation["metadata"]["batchStats"]["failedRequestCount"], "1");

    let cancel = format!("v1beta/{name}:cancel");
    assert_eq!(env.call("POST", &cancel, json!({})).await.ok(), json!({}), "no harm on one that has ended");
    env.set(|s| s.cancel_ended_refused = true);
    env.call("POST", &cancel, json!({})).await.refused(400, "FAILED_PRECONDITION");
}

#[tokio::test]
async fn quotas_of_jobs_and_tokens() {
    let env = Env::with(Config { max_active: 2, ..Config::default() }).await;
    let create = |text: String| {
        let env = &env;
        async move { env.call("POST", CREATE, json!({"batch": inline(&[&text])})).await }
    };
    let first = create(STALL.to_owned()).await.ok()["name"].as_str().unwrap().to_owned();
    create(STALL.to_owned()).await.ok();
    let refused = create(STALL.to_owned()).await;
    refused.refused(429, "RESOURCE_EXHAUSTED");
    let details = &refused.json()["error"]["details"];
    assert_eq!(details.as_array().unwrap().len(), 1);
    assert_eq!(details[0]["@type"], "type.googleapis.com/google.rpc.Help");

    env.set(|s| s.quota_held = true);
    env.call("POST", &format!("v1beta/{first}:cancel"), json!({})).await.ok();
    env.call("DELETE", &format!("v1beta/{first}"), Value::Null).await.ok();
    create(STALL.to_owned()).await.refused(429, "RESOURCE_EXHAUSTED");
    env.set(|s| s.quota_held = false);
    env.set(|s| s.enqueued_token_limit = Some(30));
    create("x".repeat(120)).await.refused(429, "RESOURCE_EXHAUSTED");
    create("x".repeat(4)).await.ok();
}

#[tokio::test]
async fn over_the_limit_nothing_starts() {
    let env = Env::with(Config { max_active: 1, pending: Duration::from_mins(5), ..Config::default() }).await;
    env.set(|s| s.stall_over_limit = true);
    let (first, second) = (env.create_inline("a").await, env.create_inline("b").await);
    // twice as long as both would take
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(env.sim.batches().iter().all(|b| b.state == "PENDING"), "{:?}", env.sim.batches());
    env.call("DELETE", &format!("v1beta/{second}"), Value::Null).await.ok();
    assert_eq!(env.ended(&first).await["metadata"]["state"], "BATCH_STATE_SUCCEEDED");
}

#[tokio::test]
async fn a_create_may_outlive_its_file() {
    let env = Env::new().await;
    for needed in [true, false] {
        env.set(|s| s.create_needs_file = needed);
        let file = env.upload(&line("a", "x")).await;
        assert_eq!(env.call("DELETE", &format!("v1beta/{file}"), Value::Null).await.ok(), json!({}));
        env.get(&format!("v1beta/{file}")).await.refused(403, "PERMISSION_DENIED");
        let body = json!({"batch": {"displayName": "x", "inputConfig": {"fileName": file}}});
        let created = env.call("POST", CREATE, body).await;
        assert_eq!(created.status, if needed { 403 } else { 200 });
    }
}

#[tokio::test]
async fn an_update_answers_with_the_batch_itself() {
    let env = Env::new().await;
    let name = env.create_inline(STALL).await;
    let path = format!("v1beta/{name}:updateGenerateContentBatch?updateMask=displayName,priority");
    let updated = env.call("PATCH", &path, json!({"displayName": "new", "priority": "-3"})).await.ok();
    let shown = (&updated["name"], &updated["displayName"], &updated["priority"]);
    assert_eq!(shown, (&json!(name), &json!("new"), &json!("-3")));
    let path = format!("v1beta/{name}:updateGenerateContentBatch?updateMask=model");
    env.call("PATCH", &path, json!({"model": "x"})).await.refused(400, "INVALID_ARGUMENT");
}

#[tokio::test]
async fn an_upload_step_by_step() {
    let env = Env::new().await;
    let headers =
        [("x-goog-upload-header-content-length", "6"), ("x-goog-upload-header-content-type", "jsonl")];
    let started = env.start_upload(json!({"display_name": "in", "name": "files/mine"}), &headers).await;
    let url = started.headers["x-goog-upload-url"].to_str().unwrap().to_owned();
    let status = |a: &Answer| a.headers["x-goog-upload-status"].to_str().unwrap().to_owned();
    assert_eq!(status(&env.chunk(&url, "upload", 0, "abc").await), "active");
    let asked = env.chunk(&url, "query", 0, "").await;
    assert_eq!(
        (status(&asked), &asked.headers["x-goog-upload-size-received"]),
        ("active".into(), &"3".parse().unwrap())
    );
    assert_eq!(status(&env.chunk(&url, "upload", 0, "abc").await), "active", "sent again: passed over");
    let gap = env.chunk(&url, "upload", 5, "f").await;
    gap.refused(400, "INVALID_ARGUMENT");
    assert_eq!(status(&gap), "final", "a refusal ends it, so that the SDK does not send it again");
    let done = env.chunk(&url, "upload, finalize", 3, "def").await;
    assert_eq!(status(&done), "final");
    let file = done.ok()["file"].clone();
    assert_eq!(file["name"], "files/mine");
    assert_eq!((&file["sizeBytes"], &file["mimeType"]), (&json!("6"), &json!("jsonl")));
    let hash = "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"; // of abcdef
    assert_eq!(file["sha256Hash"], STANDARD.encode(hash));
    assert_eq!(env.get("v1/files/mine").await.ok(), file);

    let again = env.start_upload(json!({"name": "files/mine"}), &[]).await;
    again.refused(409, "ALREADY_EXISTS");
    let empty = env.session().await;
    let file = env.chunk(&empty, "upload, finalize", 0, "").await.ok();
    assert_eq!(file["file"]["sizeBytes"], "0");
    // without a content-length
    let streamed = env.session().await;
    let bytes = futures::stream::iter(["abc", "def"].map(Ok::<_, std::io::Error>));
    let request = env.http.post(&streamed).header("x-goog-upload-command", "upload, finalize");
    let request = request.header("x-goog-upload-offset", "0").body(reqwest::Body::wrap_stream(bytes));
    let file: Value = serde_json::from_str(&request.send().await.unwrap().text().await.unwrap()).unwrap();
    assert_eq!(file["file"]["sizeBytes"], "6");
    let other = env.session().await;
    assert_eq!(status(&env.chunk(&other, "cancel", 0, "").await), "cancelled");
    env.chunk(&other, "upload", 0, "x").await.refused(404, "NOT_FOUND");
    // other protocols, other places
    let plain = [("x-goog-api-key", "key")];
    env.send(Method::POST, "upload/v1beta/files", &plain, b"{}".to_vec())
        .await
        .refused(400, "INVALID_ARGUMENT");
    env.send(Method::POST, "upload/v1beta/batches", &plain, b"{}".to_vec()).await.refused(404, "NOT_FOUND");
}

#[tokio::test]
async fn faults_of_uploads() {
    let env = Env::new().await;
    let name = "x-goog-upload-status".to_owned();
    let status = |a: &Answer| a.headers.get("x-goog-upload-status").map(|v| v.to_str().unwrap().to_owned());
    // the status is missing, but the bytes arrived
    env.fault(Op::UploadChunk, Effect::Header { name: name.clone(), value: None });
    let url = env.session().await;
    assert_eq!(status(&env.chunk(&url, "upload, finalize", 0, "abc").await), None);
    let again = env.chunk(&url, "upload, finalize", 0, "abc").await;
    assert_eq!(status(&again).as_deref(), Some("final"));
    assert_eq!(again.ok()["file"]["sizeBytes"], "3");
    // active after the last byte
    env.fault(Op::UploadChunk, Effect::Header { name, value: Some("active".to_owned()) });
    let url = env.session().await;
    assert_eq!(status(&env.chunk(&url, "upload, finalize", 0, "abc").await).as_deref(), Some("active"));
    // the answer to the last chunk is lost: a query tells the file
    env.fault(Op::UploadChunk, Effect::Reset { commit: true });
    let url = env.session().await;
    let lost = env.http.post(&url).header("x-goog-upload-command", "upload, finalize");
    lost.header("x-goog-upload-offset", "0").body("abc").send().await.unwrap_err();
    let asked = env.chunk(&url, "query", 0, "").await;
    assert_eq!(status(&asked).as_deref(), Some("final"));
    assert_eq!(asked.ok()["file"]["sizeBytes"], "3");
}

#[tokio::test]
async fn a_fault_that_met_nothing_can_be_taken_back() {
    let env = Env::new().await;
    let refusal = Effect::Status { code: 503, commit: false, envelope: true, retry_after: None };
    env.fault(Op::BatchCreate, refusal.clone());
    env.fault(Op::BatchList, refusal);
    env.sim.clear_faults(Op::BatchCreate);
    env.call("POST", CREATE, json!({"batch": inline(&[STALL])})).await.ok();
    env.call("GET", "v1beta/batches", Value::Null).await.refused(503, "UNAVAILABLE");
}

#[tokio::test]
async fn creates_commit_although_they_fail() {
    let env = Env::new().await;
    let status = |code, commit| Effect::Status { code, commit, envelope: true, retry_after: None };
    let create = || env.call("POST", CREATE, json!({"batch": inline(&[STALL])}));
    env.fault(Op::BatchCreate, status(503, true));
    create().await.refused(503, "UNAVAILABLE");
    assert_eq!(env.sim.batches().len(), 1);
    env.fault(Op::BatchCreate, status(429, false));
    create().await.refused(429, "RESOURCE_EXHAUSTED");
    assert_eq!(env.sim.batches().len(), 1);
    let raw = |effect| {
        env.fault(Op::BatchCreate, effect);
        let url = format!("{}/{CREATE}", env.sim.base_url());
        let body = json!({"batch": inline(&[STALL])}).to_string();
        async { env.http.post(url).header("x-goog-api-key", "key").body(body).send().await?.text().await }
    };
    raw(Effect::Reset { commit: true }).await.unwrap_err();
    raw(Effect::Truncate).await.unwrap_err();
    assert_eq!(env.sim.batches().len(), 3);
}

#[tokio::test]
async fn another_key_of_the_project_may_not_see_a_batch() {
    let keys = Some(vec![("key".to_owned(), "p".to_owned()), ("second".to_owned(), "p".to_owned())]);
    let env = Env::with(Config { keys, ..Config::default() }).await;
    let path = format!("v1beta/{}", env.create_inline(STALL).await);
    env.call_as("second", "GET", &path, Value::Null).await.ok();
    env.set(|s| s.creator_only = true);
    env.call_as("second", "GET", &path, Value::Null).await.refused(404, "NOT_FOUND");
}

#[tokio::test]
async fn user_metadata_is_refused_or_told() {
    let env = Env::new().await;
    let receiver = Receiver::new().await;
    let mut batch = inline(&["x"]);
    batch["webhookConfig"] = json!({"uris": [receiver.url], "userMetadata": {"a": "b"}});
    let refused = env.call("POST", CREATE, json!({"batch": batch})).await.refused(400, "INVALID_ARGUMENT");
    assert!(refused.contains("Unknown name \"userMetadata\" at 'batch.webhook_config'"), "{refused}");
    env.set(|s| s.user_metadata_refused = false);
    env.create(batch).await;
    assert_eq!(receiver.next().await.1["user_metadata"], json!({"a": "b"}));
}

#[tokio::test]
async fn deliveries_can_be_early_old_forged_or_jwts() {
    let env = Env::new().await;
    let receiver = Receiver::new().await;
    let next = |text: &'static str| {
        let (env, receiver) = (&env, &receiver);
        async move {
            let mut batch = inline(&[text]);
            batch["webhookConfig"] = json!({"uris": [receiver.url]});
            let name = env.create(batch).await["name"].as_str().unwrap().to_owned();
            let (headers, body) = receiver.next().await;
            (name, headers, body)
        }
    };
    let (name, headers, body) = next("[[sim:hook=early]] [[sim:work=1000000]]").await;
    assert_eq!(body["type"], "batch.succeeded");
    assert!(header(&headers, "webhook-signature").starts_with("v1a,"));
    assert_eq!(env.get(&format!("v1beta/{name}")).await.ok()["done"], Value::Null, "not over");

    let (_, headers, _) = next("[[sim:hook=old=4000]]").await;
    let age =
        jiff::Timestamp::now().as_second() - header(&headers, "webhook-timestamp").parse::<i64>().unwrap();
    assert!((4000..4100).contains(&age), "{age}");
    let (_, headers, body) = next("[[sim:hook=forged]]").await;
    assert!(header(&headers, "webhook-signature").starts_with("v1a,"));
    assert_eq!(body["type"], "batch.failed", "the forged one comes first");
    assert_eq!(receiver.next().await.1["type"], "batch.succeeded");

    let keys = || async { env.get(".well-known/jwks.json").await.ok()["keys"].as_array().unwrap().len() };
    assert_eq!(keys().await, 3);
    env.set(|s| s.hooks = vec!["jwt".to_owned()]);
    assert_eq!(keys().await, 4);
    let (_, headers, _) = next("x").await;
    let parts: Vec<&str> = header(&headers, "webhook-signature").split('.').collect();
    assert_eq!(parts.len(), 3);
    let decode = |p: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(p).unwrap();
    let claims: Value = serde_json::from_slice(&decode(parts[1])).unwrap();
    assert_eq!(claims["aud"], receiver.url);
    assert_eq!(decode(parts[2]).len(), 256);
}

#[tokio::test]
async fn registered_webhooks() {
    let env = Env::new().await;
    let receiver = Receiver::new().await;
    let body = json!({"name": "ops", "uri": receiver.url, "subscribed_events": ["batch.succeeded"]});
    for bad in [
        json!({"name": "ops", "uri": receiver.url, "subscribedEvents": ["batch.succeeded"]}), // camelCase
        json!({"uri": receiver.url, "subscribed_events": ["batch.cancelled"]}),
        json!({"uri": receiver.url, "subscribed_events": []}),
        json!({"uri": "nowhere", "subscribed_events": ["batch.succeeded"]}),
    ] {
        env.call("POST", "v1beta/webhooks", bad).await.refused(400, "INVALID_ARGUMENT");
    }
    let created = env.call("POST", "v1/webhooks", body).await.ok();
    let secret = created["new_signing_secret"].as_str().unwrap();
    assert_eq!(STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap().len(), 32);
    let path = format!("v1beta/webhooks/{}", created["id"].as_str().unwrap());
    let shown = env.get(&path).await.ok();
    assert_eq!(shown["new_signing_secret"], Value::Null);
    assert_eq!(shown["state"], "enabled");

    // A batch with URIs of its own leaves registered webhooks out.
    let own = Receiver::new().await;
    let mut batch = inline(&["x"]);
    batch["webhookConfig"] = json!({"uris": [own.url]});
    env.create(batch).await;
    assert!(header(&own.next().await.0, "webhook-signature").starts_with("v1a,"));
    let name = env.create_inline("x").await;
    let (headers, event) = receiver.next().await;
    assert!(name.ends_with(event["data"]["id"].as_str().unwrap()));
    assert!(header(&headers, "webhook-signature").starts_with("v1,"));
    let id = header(&headers, "webhook-id").strip_prefix("msg_").unwrap();
    assert_eq!(id.split('-').map(str::len).collect::<Vec<_>>(), [8, 4, 4, 4, 12], "a UUID");

    let rotate = json!({"revocation_behavior": "revoke_previous_secrets_after_h24"});
    let rotated = env.call("POST", &format!("{path}:rotateSigningSecret"), rotate).await.ok();
    assert!(rotated["secret"].as_str().unwrap().starts_with("whsec_"));
    assert_eq!(env.call("POST", &format!("{path}:ping"), json!({})).await.ok(), json!({}));
    assert_eq!(header(&receiver.next().await.0, "webhook-signature").split(' ').count(), 2);
    let rotate = json!({"revocation_behavior": "revoke_previous_secrets_immediately"});
    env.call("POST", &format!("{path}:rotateSigningSecret"), rotate).await.ok();
    assert_eq!(env.get(&path).await.ok()["signing_secrets"].as_array().unwrap().len(), 1);

    let patched =
        env.call("PATCH", &format!("{path}?update_mask=name"), json!({"state": "disabled"})).await.ok();
    assert_eq!(patched["state"], "disabled", "the mask is ignored");
    env.create_inline("x").await;
    assert_eq!(env.get("v1/webhooks").await.ok()["webhooks"].as_array().unwrap().len(), 1);
    env.call_as("another", "GET", &path, Value::Null).await.refused(404, "NOT_FOUND");
    assert_eq!(env.call("DELETE", &path, Value::Null).await.ok(), json!({}));
    env.get(&path).await.refused(404, "NOT_FOUND");
}

#[tokio::test]
async fn a_webhook_that_fails_for_a_day_is_disabled() {
    let env = Env::with(Config { speed: 1_000_000.0, ..Config::default() }).await;
    let closed = Receiver::new().await.url; // nobody listens any more
    let body = json!({"uri": closed, "subscribed_events": ["batch.failed"]});
    let id = env.call("POST", "v1beta/webhooks", body).await.ok()["id"].as_str().unwrap().to_owned();
    assert!(env.sim.finish(&env.create_inline(STALL).await, Outcome::Failed));
    let start = Instant::now();
    loop {
        let state = env.get(&format!("v1beta/webhooks/{id}")).await.ok()["state"].clone();
        if state == "disabled_due_to_failed_deliveries" {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{state}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let tries = env.sim.deliveries();
    assert!(tries.len() > 20, "{}", tries.len());
    assert!(tries.iter().all(|d| d.webhook_id == tries[0].webhook_id), "the id stays");
}

#[tokio::test]
async fn switches_over_http() {
    let env = Env::new().await;
    env.call("PATCH", "_sim/switches", json!({"creatorOnly": true, "pageLimit": 7})).await.ok();
    let wanted = Switches { creator_only: true, page_limit: 7, ..Switches::default() };
    assert_eq!(env.sim.switches(), wanted);
    assert_eq!(env.call("PATCH", "_sim/switches", json!({"typo": true})).await.status, 400);
    assert_eq!(env.sim.switches(), wanted);
}

#[tokio::test]
async fn finish_over_http_says_when_there_is_nothing_to_finish() {
    let env = Env::new().await;
    let name = env.create_inline(STALL).await;
    let finish = |name: &str| {
        let (env, body) = (&env, json!({"batch": name, "outcome": "succeeded"}));
        async move { env.call("POST", "_sim/finish", body).await }
    };
    let unknown = finish("batches/unknown").await;
    let says = "there is no unfinished batch batches/unknown, see GET /_sim/batches";
    assert_eq!((unknown.status, unknown.json()["error"].as_str()), (400, Some(says)));
    assert_eq!(env.sim.batches()[0].state, "PENDING");
    assert_eq!(finish(&name).await.status, 200);
    assert_eq!(env.sim.batches()[0].state, "SUCCEEDED");
    assert_eq!(finish(&name).await.status, 400, "it has ended already");
}
