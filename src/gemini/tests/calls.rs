//! What holds for every call, and the creation of a batch above all.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[tokio::test]
async fn no_call_follows_a_redirect() {
    for code in [301, 302, 303, 307, 308] {
        let setup = serve(patient, move |_, _| {
            now(Response::builder()
                .status(code)
                .header("location", "/elsewhere")
                .body(Body::empty())
                .unwrap())
        })
        .await;
        for (call, error) in every_error(&setup.client).await {
            assert_eq!((error.http_code(), error.is_refusal()), (code, false), "{call}");
        }
        let uris = setup.uris();
        assert!(uris.len() == 9 && !uris.iter().any(|u| u.contains("elsewhere")), "{uris:?}");
    }
}

#[tokio::test]
async fn the_key_is_in_the_header_and_nowhere_else() {
    // The server even sends it back.
    let setup = serve(patient, |_, seen| {
        let told = json!({"error": {"code": 400, "status": KEY, "message": format!("{KEY} {}", seen.uri)}});
        status(400, told.to_string())
    })
    .await;
    for (call, error) in every_error(&setup.client).await {
        assert!(error.is_refusal(), "{call}");
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("CANARY") && !shown.contains(setup.base.as_str()), "{call}: {shown}");
    }
    for seen in setup.log() {
        assert_eq!(seen.header("x-goog-api-key"), KEY, "{}", seen.uri);
        assert_eq!(seen.headers.values().filter(|v| v.as_bytes() == KEY.as_bytes()).count(), 1);
        assert!(!seen.uri.contains("CANARY") && !String::from_utf8_lossy(&seen.body).contains("CANARY"));
    }
    assert!(!format!("{:?} {:?}", setup.client, key()).contains("CANARY"));
    // Nor is there a URL in an error of the transport.
    let nobody = Client::new(patient(&"http://127.0.0.1:1".parse().unwrap())).unwrap();
    for (call, error) in every_error(&nobody).await {
        let shown = format!("{error} {error:?}");
        assert!(!error.is_refusal() && error.http_code() == 0, "{call}");
        assert!(!shown.contains("CANARY") && !shown.contains("http://"), "{call}: {shown}");
    }
}

#[tokio::test]
async fn calls_are_what_the_contract_says() {
    let setup = serve(patient, |_, _| ok(&json!({"name": "batches/b1", "metadata": {}}))).await;
    let client = &setup.client;
    let key = key();
    create(client).await.unwrap();
    let hook: Url = "https://ops.example/hook".parse().unwrap();
    let model = ModelName::parse("tunedModels/t").unwrap();
    let (input_file, webhook_uris) = (file(), [hook]);
    let new = NewBatch {
        call: Call::GenerateContent,
        display_name: "d",
        input_file: &input_file,
        webhook_uris: &webhook_uris,
        priority: Some(-5),
    };
    client.create_batch(&key, &model, &new).await.unwrap();
    let embeddings = NewBatch { call: Call::EmbedContent, ..new };
    client.create_batch(&key, &ModelName::parse("e").unwrap(), &embeddings).await.unwrap();
    client.get_batch(&key, &batch()).await.unwrap();
    client.list_batches(&key, 7, None).await.unwrap();
    client.list_batches(&key, 7, Some("a&b=c")).await.unwrap();
    client.cancel_batch(&key, &batch()).await.unwrap();
    client.delete_batch(&key, &batch()).await.unwrap();
    client.delete_file(&key, &file()).await.unwrap();

    let log = setup.log();
    let lines: Vec<String> = log.iter().map(|s| format!("{} {}", s.method, s.uri)).collect();
    assert_eq!(
        lines,
        [
            "POST /v1beta/models/m:batchGenerateContent",
            "POST /v1beta/tunedModels/t:batchGenerateContent",
            "POST /v1beta/models/e:asyncBatchEmbedContent",
            "GET /v1beta/batches/b1",
            "GET /v1beta/batches?pageSize=7",
            "GET /v1beta/batches?pageSize=7&pageToken=a%26b%3Dc",
            "POST /v1beta/batches/b1:cancel",
            "DELETE /v1beta/batches/b1",
            "DELETE /v1beta/files/f1",
        ]
    );
    let plain = json!({"batch": {"displayName": "d", "inputConfig": {"fileName": "files/f1"}}});
    assert_eq!(log[0].json(), plain, "no webhookConfig without a webhook: it would replace the project's");
    assert_eq!(log[1].json()["batch"]["webhookConfig"], json!({"uris": ["https://ops.example/hook"]}));
    assert_eq!(log[1].json()["batch"]["priority"], "-5");
    assert_eq!(log[2].json(), log[1].json(), "the same batch, but for what its lines hold");
    assert_eq!((log[6].json(), log[6].header("content-type")), (json!({}), "application/json"));
    // A path in the base URL is kept.
    let below = Client::new(patient(&setup.base.join("/proxy/").unwrap())).unwrap();
    below.get_batch(&key, &batch()).await.unwrap();
    assert_eq!(setup.uris().last().unwrap(), "/proxy/v1beta/batches/b1");
}

#[tokio::test]
async fn only_a_whole_refusal_is_a_refusal() {
    let whole = envelope(400, "INVALID_ARGUMENT");
    for code in [400, 401, 403, 404, 429] {
        let body = envelope(code, "INVALID_ARGUMENT");
        let setup = serve(patient, move |_, _| status(code, body.clone())).await;
        assert!(create(&setup.client).await.unwrap_err().is_refusal(), "{code}");
        assert_eq!(setup.log().len(), 1, "no call is repeated");
    }
    for (what, code, body) in [
        ("an envelope that breaks off", 400, whole.as_bytes()[..20].to_vec()),
        ("no envelope", 400, b"<html>no</html>".to_vec()),
        ("nothing", 404, Vec::new()),
        ("another code", 409, envelope(409, "ABORTED").into_bytes()),
        ("overload", 503, envelope(503, "UNAVAILABLE").into_bytes()),
        ("an error in a 200", 200, whole.clone().into_bytes()),
        ("not quite 200", 201, json!({"name": "batches/b1"}).to_string().into_bytes()),
        ("no JSON", 200, b"ok".to_vec()),
        ("no batch", 200, b"{\"name\":\"../b1\"}".to_vec()),
        ("a list", 200, b"[]".to_vec()),
    ] {
        let setup = serve(patient, move |_, _| status(code, body.clone())).await;
        assert!(!create(&setup.client).await.unwrap_err().is_refusal(), "{what}");
        assert_eq!(setup.log().len(), 1, "{what}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_unknown_outcome() {
    let created = json!({"name": "batches/b1", "metadata": {}}).to_string();
    for (code, body) in [(200, created), (400, envelope(400, "INVALID_ARGUMENT"))] {
        // Even when all that is missing is the end of the transfer.
        let setup = serve(patient, move |_, _| status(code, broken(body.clone()))).await;
        let error = create(&setup.client).await.unwrap_err();
        assert!(!error.is_refusal(), "{error}");
        assert_eq!(setup.log().len(), 1);
    }
}

#[tokio::test]
async fn oversized_answers_are_not_read() {
    let padded = |code: u16, megabytes: usize| {
        let pad = Bytes::from(vec![b' '; 1 << 20]);
        let chunks = std::iter::repeat_n(pad, megabytes).chain([Bytes::from(envelope(code, "NOT_FOUND"))]);
        Body::from_stream(futures::stream::iter(chunks.map(Ok::<_, std::io::Error>)))
    };
    let setup = serve(patient, move |_, _| status(404, padded(404, 1))).await;
    assert!(!create(&setup.client).await.unwrap_err().is_refusal());
    let setup = serve(patient, move |_, _| status(200, padded(200, 64))).await;
    let error = setup.client.get_batch(&key(), &batch()).await.unwrap_err();
    assert!(error.to_string().contains("too large"), "{error}");
}

#[tokio::test]
async fn no_call_waits_for_ever() {
    let silent = serve(impatient, |_, _| never()).await;
    for (call, error) in every_error(&silent.client).await {
        assert!(error.to_string().contains("timed out"), "{call}: {error}");
        assert!(!error.is_refusal(), "{call}");
    }
    assert_eq!(silent.log().len(), 9, "and none is repeated");
    // An answer that begins and then stands still, be it a success or a refusal.
    for code in [200, 404] {
        let stalling = serve(impatient, move |_, _| status(code, stuck("{"))).await;
        for (call, error) in every_error(&stalling.client).await {
            assert!(!error.is_refusal(), "{call}");
        }
    }
}

#[tokio::test]
async fn each_create_has_its_own_time() {
    // Longer than other calls may take, within what a create may.
    let slow = |base: &Url| ClientConfig { create_timeout: Duration::from_secs(30), ..impatient(base) };
    let setup = serve(slow, |_, _| {
        async {
            tokio::time::sleep(Duration::from_millis(600)).await;
            json!({"name": "batches/b1", "metadata": {}}).to_string().into_response()
        }
        .boxed()
    })
    .await;
    assert!(create(&setup.client).await.is_ok());
    assert!(setup.client.get_batch(&key(), &batch()).await.is_err());
}

/// Answers the first request of each connection, and closes the connection at the second one, or at once if
/// it is a create. Returns how many requests came on each connection, in order.
async fn closes_connections() -> (Url, Arc<Mutex<Vec<String>>>, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let (log, connections) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
    let (seen, count) = (Arc::clone(&log), Arc::clone(&connections));
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut answered = false;
                let mut buffer = Vec::new();
                loop {
                    let mut chunk = [0; 4096];
                    let Ok(size @ 1..) = socket.read(&mut chunk).await else { return };
                    buffer.extend_from_slice(&chunk[..size]);
                    let text = String::from_utf8_lossy(&buffer).into_owned();
                    let Some((head, _)) = text.split_once("\r\n\r\n") else { continue };
                    let line = head.lines().next().unwrap().to_owned();
                    let is_create = line.contains("batchGenerateContent");
                    seen.lock().unwrap().push(line);
                    if answered || is_create {
                        return;
                    }
                    answered = true;
                    buffer.clear();
                    let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
                }
            });
        }
    });
    (base, log, connections)
}

#[tokio::test]
async fn a_create_is_sent_once_over_a_connection_of_its_own() {
    let (base, log, connections) = closes_connections().await;
    let client = Client::new(patient(&base)).unwrap();
    for round in 1..=3 {
        // Leaves a connection in the pool, which a create must not take.
        client.list_batches(&key(), 1, None).await.unwrap();
        let before = connections.load(Ordering::SeqCst);
        let error = create(&client).await.unwrap_err();
        assert!(!error.is_refusal(), "{error}");
        assert_eq!(connections.load(Ordering::SeqCst), before + 1);
        let creates = log.lock().unwrap().iter().filter(|l| l.contains("batchGenerateContent")).count();
        assert_eq!(creates, round, "sent once, and not again when the connection closes");
        // The pooled one breaks at its second request; the next round has a new one.
        let _ = client.list_batches(&key(), 1, None).await;
    }
}

#[tokio::test]
async fn creates_do_not_share_connections_with_each_other() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base: Url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let mut chunk = vec![0; 65_536];
                // Each read is a whole request: they are small and come one after another.
                while let Ok(1..) = socket.read(&mut chunk).await {
                    let body = "{\"name\":\"batches/b1\"}";
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    let _ = socket.write_all(answer.as_bytes()).await;
                }
            });
        }
    });
    let client = Client::new(patient(&base)).unwrap();
    for n in 1..=3 {
        create(&client).await.unwrap();
        assert_eq!(connections.load(Ordering::SeqCst), n);
    }
}

#[tokio::test]
async fn a_listing_is_read_leniently() {
    let page = json!({"operations": [{"name": "../x"}, 7, {"name": "batches/b1", "metadata": {}}], "nextPageToken": "t"});
    for (body, names, token) in [
        (page, vec!["batches/b1"], Some("t")),
        (json!({}), vec![], None),
        (json!({"nextPageToken": "t"}), vec![], Some("t")),
        (json!({"operations": [], "nextPageToken": ""}), vec![], None),
        (json!({"operations": "x", "nextPageToken": 7}), vec![], None),
    ] {
        let setup = serve(patient, move |_, _| ok(&body)).await;
        let page = setup.client.list_batches(&key(), 100, None).await.unwrap();
        assert_eq!(page.batches.iter().map(|b| b.name.to_string()).collect::<Vec<_>>(), names);
        assert_eq!(page.next_page_token.as_deref(), token);
    }
    let setup = serve(patient, |_, _| ok(&json!([]))).await;
    assert!(setup.client.list_batches(&key(), 100, None).await.is_err(), "not taken for an empty page");
}

#[test]
fn configurations_that_give_the_key_away_are_refused() {
    let with = |url: &str, allow_insecure, version: &str| {
        let base_url = url.parse().unwrap();
        let api_version = version.to_owned();
        Client::new(ClientConfig { api_version, allow_insecure, ..ClientConfig::new(base_url) })
    };
    let google = Url::parse("https://generativelanguage.googleapis.com").unwrap();
    assert!(Client::new(ClientConfig::new(google)).is_ok(), "Google's own address is one");
    assert!(with("https://x.example/prefix", false, "v1").is_ok());
    assert!(with("http://x.example", true, "v1beta").is_ok());
    assert!(matches!(with("http://x.example", false, "v1beta"), Err(ClientConfigError::Insecure)));
    for url in [
        "https://x.example/?a=b",
        "https://x.example/#a",
        "https://user@x.example",
        "ftp://x.example",
        "data:x",
    ] {
        assert!(matches!(with(url, true, "v1beta"), Err(ClientConfigError::Url)), "{url}");
    }
    for version in ["", "v1/x", "..", "v1?x"] {
        assert!(
            matches!(with("https://x.example", true, version), Err(ClientConfigError::Version)),
            "{version}"
        );
    }
}
