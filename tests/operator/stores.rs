//! Real object stores that tests start: servers of S3, Cloud Storage and Blob Storage; and a proxy in front of one that
//! fails as it is told.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt as _;
use hmac::{Hmac, KeyInit as _, Mac as _};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt as _};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{PATIENCE, free_port};

pub const ACCESS_KEY: &str = "AKIATEST";
pub const SECRET_KEY: &str = "s3cr3t-CANARY-key";
pub const BUCKET: &str = "inputs";

/// The account of Azurite, whose key is everybody's.
pub const AZURITE: &str = "devstoreaccount1";
pub const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A program of `hack/go-tool.sh`, built if need be.
fn tool(name: &str) -> PathBuf {
    program("go-tool.sh", &[name])
}

fn program(script: &str, args: &[&str]) -> PathBuf {
    let out = Command::new(format!("{}/hack/{script}", env!("CARGO_MANIFEST_DIR")))
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .expect("hack/ has scripts that build the servers; they need bash, Go and Python");
    assert!(out.status.success(), "{script} {args:?} failed: run `make test`, or see above");
    String::from_utf8(out.stdout).unwrap().trim().into()
}

/// A server of the test's own. It ends with it.
pub struct Server {
    child: Child,
    pub port: u16,
    pub dir: tempfile::TempDir,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    S3,
    Gcs,
    Az,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listens(port: u16, name: &str) {
    let start = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(start.elapsed() < PATIENCE, "{name} did not come up");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn versitygw(port: u16, dir: &std::path::Path, flags: &[&str]) -> Child {
    let child = Command::new(tool("versitygw"))
        .args([
            "--quiet",
            "--port",
            &format!("127.0.0.1:{port}"),
            "--access",
            ACCESS_KEY,
            "--secret",
            SECRET_KEY,
        ])
        .args(flags)
        .args(["posix", "--sidecar"])
        .args([dir.join("meta"), dir.join("data")])
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    listens(port, "versitygw");
    child
}

impl Server {
    /// An S3 server with one bucket.
    pub fn s3() -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let sub = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        sub(&format!("data/{BUCKET}"));
        sub("meta");
        let child = versitygw(port, dir.path(), &[]);
        Self { child, port, dir, kind: Kind::S3 }
    }

    /// A Cloud Storage server with one bucket.
    pub async fn gcs() -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let child = Command::new(tool("fake-gcs-server"))
            .args(["-scheme=http", "-host=127.0.0.1", "-backend=memory", "-log-level=error"])
            .arg(format!("-port={port}"))
            .arg(format!("-public-host=127.0.0.1:{port}"))
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        listens(port, "fake-gcs-server");
        let url = format!("http://127.0.0.1:{port}");
        let bucket = json!({"name": BUCKET});
        let made =
            reqwest::Client::new().post(format!("{url}/storage/v1/b?project=p")).json(&bucket).send().await;
        assert!(made.unwrap().status().is_success());
        Self { child, port, dir, kind: Kind::Gcs }
    }

    /// A Blob Storage server with one container.
    pub async fn az() -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let child = Command::new(program("azurite.sh", &[]))
            .args(["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost=127.0.0.1"])
            .arg(format!("--blobPort={port}"))
            .arg(format!("--location={}", dir.path().display()))
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        listens(port, "azurite");
        let server = Self { child, port, dir, kind: Kind::Az };
        let date = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let headers = format!("x-ms-date:{date}\nx-ms-version:2023-11-03\n");
        let signed =
            format!("PUT{}{headers}/{AZURITE}/{AZURITE}/{BUCKET}\nrestype:container", "\n".repeat(12));
        let mut mac = Hmac::<Sha256>::new_from_slice(&STANDARD.decode(AZURITE_KEY).unwrap()).unwrap();
        mac.update(signed.as_bytes());
        let signature = STANDARD.encode(mac.finalize().into_bytes());
        let made = reqwest::Client::new()
            .put(format!("{}/{BUCKET}?restype=container", server.endpoint()))
            .header("x-ms-date", date)
            .header("x-ms-version", "2023-11-03")
            .header("authorization", format!("SharedKey {AZURITE}:{signature}"))
            .header("content-length", "0")
            .send()
            .await
            .unwrap();
        assert!(made.status().is_success(), "{made:?}");
        server
    }

    pub fn endpoint(&self) -> String {
        let account = if matches!(self.kind, Kind::Az) { format!("/{AZURITE}") } else { String::new() };
        format!("http://127.0.0.1:{}{account}", self.port)
    }

    pub async fn put(&self, name: &str, content: impl Into<Vec<u8>>) {
        self.put_into(BUCKET, name, content).await;
    }

    pub async fn put_into(&self, bucket: &str, name: &str, content: impl Into<Vec<u8>>) {
        if matches!(self.kind, Kind::Gcs) {
            // It does not know the call that `object_store` makes.
            let url = format!("{}/upload/storage/v1/b/{bucket}/o", self.endpoint());
            let put = reqwest::Client::new().post(url).query(&[("uploadType", "media"), ("name", name)]);
            assert!(put.body(content.into()).send().await.unwrap().status().is_success());
            return;
        }
        self.bucket(bucket).put(&Path::from(name), content.into().into()).await.unwrap();
    }

    pub async fn delete(&self, name: &str) {
        self.bucket(BUCKET).delete(&Path::from(name)).await.unwrap();
    }

    /// The content of an object, if it is there.
    pub async fn get(&self, name: &str) -> Option<Vec<u8>> {
        match self.bucket(BUCKET).get(&Path::from(name)).await {
            Ok(got) => Some(got.bytes().await.unwrap().to_vec()),
            Err(object_store::Error::NotFound { .. }) => None,
            Err(e) => panic!("{name}: {e}"),
        }
    }

    /// The names of all objects, in order.
    pub async fn names(&self) -> Vec<String> {
        let objects = self.bucket(BUCKET).list(None).collect::<Vec<_>>().await;
        let mut names: Vec<String> = objects.into_iter().map(|o| o.unwrap().location.to_string()).collect();
        names.sort();
        names
    }

    fn bucket(&self, bucket: &str) -> Arc<dyn ObjectStore> {
        let endpoint = self.endpoint();
        match self.kind {
            Kind::S3 => Arc::new(
                AmazonS3Builder::new()
                    .with_bucket_name(bucket)
                    .with_endpoint(endpoint)
                    .with_access_key_id(ACCESS_KEY)
                    .with_secret_access_key(SECRET_KEY)
                    .with_http_connector(Plain)
                    .build()
                    .unwrap(),
            ),
            Kind::Az => Arc::new(
                MicrosoftAzureBuilder::new()
                    .with_account(AZURITE)
                    .with_access_key(AZURITE_KEY)
                    .with_endpoint(endpoint)
                    .with_container_name(bucket)
                    .with_http_connector(Plain)
                    .build()
                    .unwrap(),
            ),
            Kind::Gcs => Arc::new(
                GoogleCloudStorageBuilder::new()
                    .with_bucket_name(bucket)
                    .with_base_url(&endpoint)
                    .with_service_account_key(no_oauth())
                    .with_http_connector(Plain)
                    .build()
                    .unwrap(),
            ),
        }
    }

    /// Parts of objects that were neither put together nor taken back.
    pub fn parts(&self) -> usize {
        // The gateway keeps them beside the objects.
        let dir = self.dir.path().join(format!("data/{BUCKET}/.sgwtmp/multipart"));
        std::fs::read_dir(dir).map_or(0, Iterator::count)
    }

    /// Starts it again, perhaps one that only reads.
    pub fn restart(&mut self, read_only: bool) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let flags = if read_only { vec!["--readonly"] } else { Vec::new() };
        self.child = versitygw(self.port, self.dir.path(), &flags);
    }
}

/// In front of `fake-gcs-server`, which does not know the calls of the XML API by which `object_store` writes and deletes.
pub struct XmlApi {
    pub port: u16,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for XmlApi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl XmlApi {
    pub async fn before(server: &Server) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", free_port())).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let upstream = server.endpoint();
        let app = axum::Router::new()
            .fallback(move |request: axum::extract::Request| translate(upstream.clone(), request));
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { port, task }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

async fn translate(upstream: String, request: axum::extract::Request) -> axum::response::Response {
    let client = reqwest::Client::new();
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let path = parts.uri.path().to_owned();
    let (bucket, name) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
    let decoded = format!("name={name}");
    let name = url::form_urlencoded::parse(decoded.as_bytes()).next().unwrap().1.into_owned();
    let mut headers = parts.headers.clone();
    headers.remove("host");
    let answer = match parts.method.as_str() {
        "PUT" => {
            let mut query = vec![("uploadType", "media".to_owned()), ("name", name)];
            if let Some(wanted) = headers.get("x-goog-if-generation-match") {
                query.push(("ifGenerationMatch", wanted.to_str().unwrap().to_owned()));
            }
            let url = format!("{upstream}/upload/storage/v1/b/{bucket}/o");
            client.post(url).query(&query).body(body).send().await.unwrap()
        }
        "DELETE" => {
            let name = name.replace('/', "%2F");
            client.delete(format!("{upstream}/storage/v1/b/{bucket}/o/{name}")).send().await.unwrap()
        }
        _ => {
            let url = format!("{upstream}{}", parts.uri.path_and_query().unwrap());
            client.request(parts.method.clone(), url).headers(headers).body(body).send().await.unwrap()
        }
    };
    let mut told = axum::response::Response::builder().status(answer.status());
    *told.headers_mut().unwrap() = answer.headers().clone();
    let content = answer.bytes().await.unwrap();
    if parts.method == "PUT" {
        let headers = told.headers_mut().unwrap();
        headers.remove("content-length");
        if let Ok(object) = serde_json::from_slice::<Value>(&content) {
            for (name, field) in [("etag", "etag"), ("x-goog-generation", "generation")] {
                if let Some(value) = object[field].as_str() {
                    headers.insert(name, value.parse().unwrap());
                }
            }
        }
    }
    told.body(content.into()).unwrap()
}

/// What emulators of Cloud Storage take instead of a key.
pub fn no_oauth() -> String {
    json!({"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": true}).to_string()
}

/// The Secret that opens [`Server::s3`].
pub fn s3_secret() -> Value {
    json!({"accessKeyId": ACCESS_KEY, "secretAccessKey": SECRET_KEY})
}

/// An HTTP client with nothing to it, for putting objects.
#[derive(Debug)]
struct Plain;

impl HttpConnector for Plain {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(PlainClient(reqwest::Client::new())))
    }
}

#[derive(Debug)]
struct PlainClient(reqwest::Client);

#[async_trait::async_trait]
impl HttpService for PlainClient {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let error = |e: reqwest::Error| HttpError::new(HttpErrorKind::Request, e);
        let (parts, body) = request.into_parts();
        let request = self
            .0
            .request(parts.method, parts.uri.to_string())
            .headers(parts.headers)
            .body(reqwest::Body::wrap(body));
        let response = request.send().await.map_err(error)?;
        let mut answer = http::Response::builder().status(response.status());
        *answer.headers_mut().unwrap() = response.headers().clone();
        Ok(answer.body(response.bytes().await.map_err(error)?.into()).unwrap())
    }
}

/// How a proxy fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Every request is answered with this status.
    Status(u16),
    /// Answers break off after so many bytes.
    CutAfter(usize),
    /// Answers stand still after so many bytes.
    StallAfter(usize),
    /// At most so many bytes a second.
    BytesPerSecond(usize),
    /// Nothing of requests is taken any more.
    Deaf,
    /// Connections are closed at once.
    Refuse,
    /// What does not exist is refused, as S3 does to whoever may not list the bucket.
    NoListing,
}

#[derive(Default)]
struct Counts {
    connections: AtomicUsize,
    requests: AtomicUsize,
    bytes: AtomicUsize,
}

/// In front of a server, and failing as it is told.
pub struct Proxy {
    pub port: u16,
    fault: Arc<Mutex<Fault>>,
    counts: Arc<Counts>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    pub async fn before(server: &Server, fault: Fault) -> Self {
        Self::to(server.port, fault).await
    }

    pub async fn to(upstream: u16, fault: Fault) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", free_port())).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let fault = Arc::new(Mutex::new(fault));
        let counts = Arc::new(Counts::default());
        let (shared, counted) = (Arc::clone(&fault), Arc::clone(&counts));
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                counted.connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(forward(client, upstream, Arc::clone(&shared), Arc::clone(&counted)));
            }
        });
        Self { port, fault, counts, task }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// Pieces of requests so far: at least one for each.
    pub fn requests(&self) -> usize {
        self.counts.requests.load(Ordering::Relaxed)
    }

    /// Bytes of answers so far.
    pub fn bytes(&self) -> usize {
        self.counts.bytes.load(Ordering::Relaxed)
    }
}

async fn forward(
    mut client: TcpStream,
    upstream: u16,
    fault: Arc<Mutex<Fault>>,
    counts: Arc<Counts>,
) -> std::io::Result<()> {
    let now = || *fault.lock().unwrap();
    match now() {
        Fault::Refuse => return Ok(()),
        Fault::Status(status) => {
            let mut head = [0; 16 << 10];
            let _ = client.read(&mut head).await?;
            let answer = format!("HTTP/1.1 {status} Fault\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            return client.write_all(answer.as_bytes()).await;
        }
        _ => {}
    }
    let server = TcpStream::connect(("127.0.0.1", upstream)).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let (counted, heard) = (Arc::clone(&counts), Arc::clone(&fault));
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match from_client.read(&mut buffer).await {
                Ok(n) if n > 0 => {
                    while *heard.lock().unwrap() == Fault::Deaf {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    to_server.write_all(&buffer[..n]).await?;
                }
                _ => return to_server.shutdown().await,
            }
            counted.requests.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (mut sent, mut buffer) = (0, vec![0; 16 << 10]);
    loop {
        let n = from_server.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        let mut part = &buffer[..n];
        match now() {
            Fault::None | Fault::Deaf => {}
            Fault::CutAfter(limit) => {
                part = &part[..part.len().min(limit.saturating_sub(sent))];
                if part.len() < n {
                    counts.bytes.fetch_add(part.len(), Ordering::Relaxed);
                    return to_client.write_all(part).await;
                }
            }
            Fault::StallAfter(limit) => {
                while sent + n > limit && now() == Fault::StallAfter(limit) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            Fault::BytesPerSecond(rate) => {
                tokio::time::sleep(Duration::from_micros((n * 1_000_000 / rate) as u64)).await;
            }
            Fault::NoListing => {
                if let Some(code) = part.strip_prefix(b"HTTP/1.1 404") {
                    to_client.write_all(b"HTTP/1.1 403").await?;
                    part = code;
                }
            }
            Fault::Status(_) | Fault::Refuse => return Ok(()),
        }
        to_client.write_all(part).await?;
        counts.bytes.fetch_add(part.len(), Ordering::Relaxed);
        sent += n;
    }
}
