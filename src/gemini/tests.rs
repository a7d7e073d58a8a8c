//! The client over a real socket. What is parsed is tested next to its code.

mod calls;
mod transfers;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use http::{HeaderMap, Method};
use serde_json::{Value, json};
use url::Url;

use super::*;

const KEY: &str = "AIzaCANARY";

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    method: Method,
    /// Path and query.
    uri: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Seen {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A server, and a client that knows it.
struct Setup {
    client: Client,
    base: Url,
    log: Arc<Mutex<Vec<Seen>>>,
}

impl Setup {
    fn log(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }

    fn uris(&self) -> Vec<String> {
        self.log().into_iter().map(|s| s.uri).collect()
    }
}

fn key() -> ApiKey {
    ApiKey::from_secret(KEY.as_bytes()).unwrap()
}

/// Short enough for tests that wait for them, long enough for a busy machine.
fn impatient(base: &Url) -> ClientConfig {
    let short = Duration::from_millis(300);
    ClientConfig {
        request_timeout: short,
        create_timeout: short,
        idle_timeout: short,
        chunk_timeout: short,
        allow_insecure: true,
        ..ClientConfig::new(base.clone())
    }
}

fn patient(base: &Url) -> ClientConfig {
    ClientConfig { allow_insecure: true, ..ClientConfig::new(base.clone()) }
}

/// Serves answers made by `answer`, which is given the number of the request and the request.
async fn serve<F>(config: impl FnOnce(&Url) -> ClientConfig, answer: F) -> Setup
where
    F: Fn(usize, &Seen) -> BoxFuture<'static, Response> + Clone + std::marker::Send + Sync + 'static,
{
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base: Url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&log);
    let app = Router::new().fallback(move |request: Request| {
        let (seen, answer) = (Arc::clone(&seen), answer.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
            let uri = parts.uri.path_and_query().unwrap().to_string();
            let this = Seen { method: parts.method, uri, headers: parts.headers, body };
            let number = {
                let mut log = seen.lock().unwrap();
                log.push(this.clone());
                log.len()
            };
            answer(number, &this).await
        }
    });
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    Setup { client: Client::new(config(&base)).unwrap(), base, log }
}

fn now(response: impl axum::response::IntoResponse) -> BoxFuture<'static, Response> {
    std::future::ready(response.into_response()).boxed()
}

fn ok(body: &Value) -> BoxFuture<'static, Response> {
    now(body.to_string())
}

fn status(code: u16, body: impl Into<Body>) -> BoxFuture<'static, Response> {
    now(Response::builder().status(code).body(body.into()).unwrap())
}

fn envelope(code: u16, status: &str) -> String {
    json!({"error": {"code": code, "status": status, "message": "CANARY"}}).to_string()
}

fn never() -> BoxFuture<'static, Response> {
    std::future::pending().boxed()
}

/// A body that begins like this, and then the connection breaks.
fn broken(beginning: impl Into<Bytes>) -> Body {
    let chunks = [Ok(beginning.into()), Err(std::io::Error::other("cut"))];
    // The first chunk leaves before the connection breaks.
    Body::from_stream(futures::stream::iter(chunks).then(|c| async {
        tokio::task::yield_now().await;
        c
    }))
}

/// A body that begins like this, and then stands still.
fn stuck(beginning: impl Into<Bytes>) -> Body {
    let first: Result<Bytes, std::io::Error> = Ok(beginning.into());
    Body::from_stream(futures::stream::iter([first]).chain(futures::stream::pending()))
}

fn batch() -> BatchName {
    BatchName::parse("batches/b1").unwrap()
}

fn file() -> FileName {
    FileName::parse("files/f1").unwrap()
}

async fn create(client: &Client) -> Result<Batch, Error> {
    let new = NewBatch {
        call: Call::GenerateContent,
        display_name: "d",
        input_file: &file(),
        webhook_uris: &[],
        priority: None,
    };
    client.create_batch(&key(), &ModelName::parse("m").unwrap(), &new).await
}

async fn upload(client: &Client, content: &'static [u8]) -> Result<File, Error> {
    let (name, size) = (file(), content.len() as u64);
    let upload = Upload { name: &name, display_name: "d", mime_type: "application/jsonl", size };
    client.upload(&key(), upload, content).await
}

async fn download(client: &Client) -> Result<Vec<u8>, Error> {
    let mut stream = client.download(&key(), &file()).await?.stream;
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        all.extend_from_slice(&chunk?);
    }
    Ok(all)
}

/// The error of every call there is.
async fn every_error(client: &Client) -> Vec<(&'static str, Error)> {
    let key = key();
    vec![
        ("create", create(client).await.unwrap_err()),
        ("get", client.get_batch(&key, &batch()).await.unwrap_err()),
        ("list", client.list_batches(&key, 100, Some("t")).await.unwrap_err()),
        ("cancel", client.cancel_batch(&key, &batch()).await.unwrap_err()),
        ("delete", client.delete_batch(&key, &batch()).await.unwrap_err()),
        ("get file", client.get_file(&key, &file()).await.unwrap_err()),
        ("delete file", client.delete_file(&key, &file()).await.unwrap_err()),
        ("upload", upload(client, b"x").await.unwrap_err()),
        ("download", download(client).await.unwrap_err()),
    ]
}
