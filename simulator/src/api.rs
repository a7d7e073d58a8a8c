//! Routes, the request log and faults.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::state::{Caller, Effect, Fault, LogEntry, Op, Outcome, Shared, Switches, hash};
use crate::{batches, files, registered};

const MAX_BODY: usize = 256 << 20;

/// What a request turned out to be about, for the log.
#[derive(Default)]
pub(crate) struct Subject {
    pub(crate) file: Option<String>,
    pub(crate) batch: Option<String>,
    pub(crate) display_name: Option<String>,
}

/// A 200.
pub(crate) struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    #[expect(clippy::needless_pass_by_value, reason = "callers build the value in place")]
    pub(crate) fn json(value: Value) -> Self {
        Self::bytes("application/json; charset=UTF-8", value.to_string().into())
    }

    pub(crate) fn bytes(content_type: &'static str, body: Bytes) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static(content_type));
        Self { status: StatusCode::OK, headers, body }
    }

    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    /// Of it what `Range: bytes=N-` asks for.
    fn part(self, headers: &HeaderMap) -> Self {
        let range = headers.get("range").and_then(|r| r.to_str().ok());
        let from = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        let Some(from) = from.filter(|from| *from < self.body.len()) else { return self };
        let size = self.body.len();
        let part = Self { status: StatusCode::PARTIAL_CONTENT, body: self.body.slice(from..), ..self };
        part.header("content-range", &format!("bytes {from}-{}/{size}", size - 1))
    }

    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}

/// The connection is to be reset instead of an answer.
struct Reset;

pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => continue,
            },
        };
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let shared = Arc::clone(&shared);
                // An error of the service closes the connection without an answer: a reset.
                async move { handle(&shared, request).await.map_err(|Reset| std::io::Error::other("reset")) }
            });
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                _ = connection => {}
            }
        });
    }
}

/// What a path asks for, and the resource it names.
fn route(method: &Method, path: &str, headers: &HeaderMap, query: &[(String, String)]) -> (Op, String) {
    let upload = query.iter().find(|(k, _)| k == "upload_id").map(|(_, v)| v.clone());
    let trimmed = path.trim_start_matches("/resumable");
    if trimmed.starts_with("/upload/") {
        let command = headers.get("x-goog-upload-command").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let files = matches!(trimmed, "/upload/v1beta/files" | "/upload/v1/files");
        // PUT: what clients of Google's general protocol send chunks with
        return match (upload, command) {
            _ if !files || !matches!(method.as_str(), "POST" | "PUT") => (Op::Unknown, String::new()),
            (None, _) => (Op::UploadStart, String::new()),
            (Some(id), c) if c.contains("query") => (Op::UploadQuery, id),
            (Some(id), c) if c.contains("cancel") => (Op::UploadCancel, id),
            (Some(id), _) => (Op::UploadChunk, id),
        };
    }
    if path == "/.well-known/jwks.json" {
        return (Op::Jwks, String::new());
    }
    let inner = path.strip_prefix("/download").unwrap_or(path);
    let Some(rest) = inner.strip_prefix("/v1beta/").or_else(|| inner.strip_prefix("/v1/")) else {
        return (Op::Unknown, String::new());
    };
    let (name, verb) = rest.rsplit_once(':').unwrap_or((rest, ""));
    let op = match (method.as_str(), name.split('/').next().unwrap_or_default(), verb, name.contains('/')) {
        ("POST", "models" | "tunedModels", "batchGenerateContent" | "asyncBatchEmbedContent", true) => {
            Op::BatchCreate
        }
        ("GET", "batches", "", true) => Op::BatchGet,
        ("GET", "batches", "", false) => Op::BatchList,
        ("POST", "batches", "cancel", true) => Op::BatchCancel,
        ("DELETE", "batches", "", true) => Op::BatchDelete,
        ("PATCH", "batches", "updateGenerateContentBatch" | "updateEmbedContentBatch", true) => {
            Op::BatchUpdate
        }
        ("POST", "webhooks", "", false) => Op::WebhookCreate,
        ("GET", "webhooks", "", false) => Op::WebhookList,
        ("GET", "webhooks", "", true) => Op::WebhookGet,
        ("PATCH", "webhooks", "", true) => Op::WebhookUpdate,
        ("DELETE", "webhooks", "", true) => Op::WebhookDelete,
        ("POST", "webhooks", "ping", true) => Op::WebhookPing,
        ("POST", "webhooks", "rotateSigningSecret", true) => Op::WebhookRotate,
        ("GET", "files", "download", true) => Op::Download,
        ("GET", "files", "", true) => Op::FileGet,
        ("GET", "files", "", false) => Op::FileList,
        ("DELETE", "files", "", true) => Op::FileDelete,
        _ => Op::Unknown,
    };
    (op, name.to_owned())
}

async fn handle(
    shared: &Arc<Shared>,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Body>, Reset> {
    let (parts, body) = request.into_parts();
    // Too big, or broken off: nothing that could be answered.
    let body = to_bytes(Body::new(body), MAX_BODY).await.map_err(|_| Reset)?;
    let path = parts.uri.path().to_owned();
    let query: Vec<(String, String)> =
        url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    if let Some(control) = path.strip_prefix("/_sim/") {
        return Ok(control_api(shared, &parts.method, control, &body));
    }
    let (op, name) = route(&parts.method, &path, &parts.headers, &query);
    let key = key_of(&parts.headers, &query);
    let json: Value = if matches!(op, Op::UploadChunk) {
        Value::Null
    } else {
        serde_json::from_slice(&body).unwrap_or_default()
    };
    let seq = begin(shared, &parts.method, &parts.uri, op, key.as_deref(), &body, &json);
    let subject_text = subject_of(shared, op, &path, &name, &json);
    let effect = shared.lock().take_fault(op, &subject_text);

    let mut subject = Subject::default();
    let mut work = |shared: &Arc<Shared>| {
        let request = Incoming {
            op,
            name: &name,
            path: &path,
            headers: &parts.headers,
            query: &query,
            json: &json,
            body: &body,
        };
        dispatch(shared, key.as_deref(), &request, &mut subject)
    };
    let (result, status) = match effect {
        None => settle(op, work(shared)),
        Some(Effect::Status { code, commit, envelope, retry_after }) => {
            if commit {
                let _ = work(shared);
            }
            (Ok(refusal(op, code, envelope, retry_after)), code.to_string())
        }
        Some(Effect::Reset { commit }) => {
            if commit {
                let _ = work(shared);
            }
            (Err(Reset), "reset".to_owned())
        }
        Some(Effect::Truncate) => (Ok(truncated(settle(op, work(shared)).0).await), "truncated".to_owned()),
        Some(Effect::Header { name, value }) => {
            let (response, status) = settle(op, work(shared));
            (response.map(|r| with_header(r, &name, value.as_deref())), status)
        }
        Some(Effect::DelayAnswer { millis }) => {
            let done = settle(op, work(shared));
            finish(shared, seq, &mut subject, "");
            tokio::time::sleep(Duration::from_millis(millis)).await;
            done
        }
        Some(Effect::Delay { millis }) => {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            settle(op, work(shared))
        }
        Some(Effect::CommitLate { seconds }) => {
            late(shared, seconds, key.clone(), op, &name, &path, &parts.headers, &query, &json, &body);
            (Ok(refusal(op, 503, true, None)), "503".to_owned())
        }
    };
    finish(shared, seq, &mut subject, &status);
    result
}

/// A request, taken apart.
struct Incoming<'a> {
    op: Op,
    name: &'a str,
    path: &'a str,
    headers: &'a HeaderMap,
    query: &'a [(String, String)],
    json: &'a Value,
    body: &'a Bytes,
}

fn dispatch(
    shared: &Arc<Shared>,
    key: Option<&str>,
    request: &Incoming<'_>,
    subject: &mut Subject,
) -> Result<Answer, ApiError> {
    let Incoming { op, name, path, headers, query, json, body } = *request;
    match op {
        // The URL of an upload session is its own authority.
        Op::UploadChunk | Op::UploadQuery | Op::UploadCancel => {
            return files::command(shared, name, headers, body, subject);
        }
        Op::Jwks => {
            let inner = shared.lock();
            let jwks = inner.signing.jwks(inner.switches.hooks.iter().any(|h| h == "jwt"));
            return Ok(Answer::json(jwks).header("cache-control", "public, max-age=300"));
        }
        Op::Unknown => return Err(ApiError::new(404, "NOT_FOUND", "Method not found.")),
        _ => {}
    }
    let caller: Caller = shared.caller(key)?;
    if shared.lock().switches.location_refused {
        return Err(ApiError::precondition("User location is not supported for the API use."));
    }
    match op {
        Op::UploadStart => files::start(shared, &caller, headers, json, path, subject),
        Op::FileGet | Op::FileDelete | Op::Download => {
            subject.file = Some(name.to_owned());
            match op {
                Op::FileGet => files::get(shared, &caller, name),
                Op::FileDelete => files::delete(shared, &caller, name),
                _ => {
                    let ranges = shared.lock().switches.download_ranges;
                    let whole = files::download(shared, &caller, name)?;
                    Ok(if ranges { whole.part(headers) } else { whole })
                }
            }
        }
        Op::FileList => files::list(shared, &caller, query),
        Op::BatchCreate => {
            if !json.is_object() {
                return Err(ApiError::invalid("Invalid JSON payload received."));
            }
            batches::create(shared, &caller, name, path, json, body.len(), subject)
        }
        Op::BatchList => batches::list(shared, &caller, query),
        Op::WebhookCreate => registered::create(shared, &caller, json),
        Op::WebhookList => registered::list(shared, &caller, query),
        Op::WebhookGet => registered::get(shared, &caller, name),
        Op::WebhookUpdate => registered::update(shared, &caller, name, json),
        Op::WebhookDelete => registered::delete(shared, &caller, name),
        Op::WebhookPing => registered::ping(shared, &caller, name),
        Op::WebhookRotate => registered::rotate(shared, &caller, name, json),
        _ => {
            subject.batch = Some(name.to_owned());
            match op {
                Op::BatchGet => batches::get(shared, &caller, name),
                Op::BatchCancel => batches::cancel(shared, &caller, name),
                Op::BatchUpdate => batches::update(shared, &caller, name, query, json),
                _ => batches::delete(shared, &caller, name),
            }
        }
    }
}

fn settle(op: Op, result: Result<Answer, ApiError>) -> (Result<Response<Body>, Reset>, String) {
    match result {
        Ok(answer) => (Ok(answer.into_response()), "200".to_owned()),
        Err(error) => {
            let mut response = ends_upload(op, Answer::json(error.envelope())).into_response();
            *response.status_mut() =
                StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (Ok(response), error.code.to_string())
        }
    }
}

/// A refused upload says that it is over: without that header the SDK sends its chunk again.
fn ends_upload(op: Op, answer: Answer) -> Answer {
    match op {
        Op::UploadStart | Op::UploadChunk | Op::UploadQuery | Op::UploadCancel => {
            answer.header("x-goog-upload-status", "final")
        }
        _ => answer,
    }
}

fn with_header(mut response: Response<Body>, name: &str, value: Option<&str>) -> Response<Body> {
    if let Ok(name) = name.parse::<http::HeaderName>() {
        match value.and_then(|v| HeaderValue::from_str(v).ok()) {
            Some(value) => response.headers_mut().insert(name, value),
            None => response.headers_mut().remove(name),
        };
    }
    response
}

fn refusal(op: Op, code: u16, envelope: bool, retry_after: Option<u32>) -> Response<Body> {
    let error = if code == 429 {
        ApiError::exhausted()
    } else {
        ApiError::new(code, crate::error::default_status(code), crate::error::default_message(code))
    };
    let mut answer = if envelope {
        // Only what comes from the service itself knows of uploads.
        ends_upload(op, Answer::json(error.envelope()))
    } else {
        Answer::bytes("text/html", Bytes::from_static(b"<html>Error</html>"))
    };
    if let Some(seconds) = retry_after {
        answer = answer.header("retry-after", &seconds.to_string());
    }
    let mut response = answer.into_response();
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

/// The first half of the answer under the length of the whole.
async fn truncated(response: Result<Response<Body>, Reset>) -> Response<Body> {
    let Ok(response) = response else { return Response::new(Body::empty()) };
    let (mut parts, body) = response.into_parts();
    let whole = to_bytes(body, MAX_BODY).await.unwrap_or_default();
    parts.headers.insert("content-length", HeaderValue::from(whole.len()));
    let half = whole.slice(..whole.len() / 2);
    let broken = std::io::Error::other("broken off");
    Response::from_parts(parts, Body::from_stream(futures::stream::iter([Ok(half), Err(broken)])))
}

#[allow(clippy::too_many_arguments)]
fn late(
    shared: &Arc<Shared>,
    seconds: f64,
    key: Option<String>,
    op: Op,
    name: &str,
    path: &str,
    headers: &HeaderMap,
    query: &[(String, String)],
    json: &Value,
    body: &Bytes,
) {
    let (shared, name, path) = (Arc::clone(shared), name.to_owned(), path.to_owned());
    let (headers, query, json, body) = (headers.clone(), query.to_vec(), json.clone(), body.clone());
    tokio::spawn(async move {
        tokio::time::sleep(shared.pace().seconds(seconds)).await;
        let request = Incoming {
            op,
            name: &name,
            path: &path,
            headers: &headers,
            query: &query,
            json: &json,
            body: &body,
        };
        let _ = dispatch(&shared, key.as_deref(), &request, &mut Subject::default());
    });
}

/// The token of `Bearer TOKEN`; the scheme's case does not matter.
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The key, from wherever it may stand.
fn key_of(headers: &HeaderMap, query: &[(String, String)]) -> Option<String> {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    header("x-goog-api-key")
        .or_else(|| header("authorization").and_then(bearer))
        .map(ToOwned::to_owned)
        .or_else(|| query.iter().find(|(k, _)| k == "key").map(|(_, v)| v.clone()))
}

/// What a fault's `contains` is compared with.
fn subject_of(shared: &Shared, op: Op, path: &str, name: &str, json: &Value) -> String {
    let mut text = format!("{path} {name}");
    let names = [
        &json["batch"]["displayName"],
        &json["batch"]["inputConfig"]["fileName"],
        &json["file"]["name"],
        &json["file"]["displayName"],
    ];
    for name in names.into_iter().filter_map(Value::as_str) {
        text.push(' ');
        text.push_str(name);
    }
    if matches!(op, Op::UploadChunk | Op::UploadQuery) {
        let inner = shared.lock();
        if let Some(upload) = inner.uploads.get(name) {
            text = format!("{text} {} {}", upload.name.as_deref().unwrap_or_default(), upload.display_name);
        }
    }
    text
}

fn begin(
    shared: &Shared,
    method: &Method,
    uri: &http::Uri,
    op: Op,
    key: Option<&str>,
    body: &Bytes,
    json: &Value,
) -> usize {
    let time = shared.now();
    let mut inner = shared.lock();
    let seq = inner.log.len();
    inner.log.push(LogEntry {
        seq,
        time,
        op,
        method: method.to_string(),
        path: uri.path().to_owned(),
        query: uri.query().unwrap_or_default().to_owned(),
        status: String::new(),
        key: key.map(|k| hash(k.as_bytes())[..12].to_owned()),
        file: None,
        batch: None,
        display_name: None,
        bytes: body.len(),
        // one that is over the limit would only make the log hard to read
        body: (matches!(op, Op::BatchCreate) && body.len() <= batches::MAX_INLINE_BYTES)
            .then(|| json.clone()),
    });
    seq
}

fn finish(shared: &Shared, seq: usize, subject: &mut Subject, status: &str) {
    let mut inner = shared.lock();
    if let Some(entry) = inner.log.get_mut(seq) {
        status.clone_into(&mut entry.status);
        entry.file = subject.file.take().or(entry.file.take());
        entry.batch = subject.batch.take().or(entry.batch.take());
        entry.display_name = subject.display_name.take().or(entry.display_name.take());
    }
}

/// The controls over HTTP, for the binary.
fn control_api(shared: &Arc<Shared>, method: &Method, path: &str, body: &Bytes) -> Response<Body> {
    let answer = match (method.as_str(), path) {
        ("GET", "healthz") => Ok(json!("ok")),
        ("GET", "log") => Ok(json!({"entries": shared.lock().log})),
        ("GET", "deliveries") => Ok(json!({"deliveries": shared.lock().deliveries})),
        ("GET", "batches") => Ok(json!({"batches": shared.views()})),
        ("GET", "files") => Ok(json!({"files": shared.lock().files.keys().collect::<Vec<_>>()})),
        ("GET", "switches") => Ok(json!(shared.lock().switches)),
        ("PUT", "switches") => serde_json::from_slice::<Switches>(body)
            .map(|switches| {
                shared.lock().switches = switches;
                json!("ok")
            })
            .map_err(|e| e.to_string()),
        // only those that are named
        ("PATCH", "switches") => serde_json::from_slice(body)
            .map_err(|e| e.to_string())
            .and_then(|changes| shared.lock().switches.change(changes))
            .map(|()| json!("ok")),
        ("POST", "faults") => serde_json::from_slice::<Fault>(body)
            .map(|fault| {
                shared.lock().faults.push(fault);
                json!("ok")
            })
            .map_err(|e| e.to_string()),
        ("POST", "keys/roll") => {
            shared.lock().signing.roll();
            Ok(json!("ok"))
        }
        ("POST", "finish") => {
            #[derive(serde::Deserialize)]
            struct Finish {
                batch: String,
                outcome: Outcome,
            }
            serde_json::from_slice::<Finish>(body).map_err(|e| e.to_string()).and_then(|f| {
                let none = || format!("there is no unfinished batch {}, see GET /_sim/batches", f.batch);
                shared.finish(&f.batch, f.outcome).then(|| json!("ok")).ok_or_else(none)
            })
        }
        _ => Err(format!("no control {method} {path}")),
    };
    match answer {
        Ok(value) => Answer::json(value).into_response(),
        Err(message) => {
            let mut response = Answer::json(json!({"error": message})).into_response();
            *response.status_mut() = StatusCode::BAD_REQUEST;
            response
        }
    }
}
