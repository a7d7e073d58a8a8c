//! Real object stores that tests start: an S3 server and a Cloud Storage server; and a proxy in front of one that fails
//! as it is told.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use object_store::aws::AmazonS3Builder;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{PATIENCE, free_port};

pub const ACCESS_KEY: &str = "AKIATEST";
pub const SECRET_KEY: &str = "s3cr3t-CANARY-key";
pub const BUCKET: &str = "inputs";

/// A program of `hack/go-tool.sh`, built if need be.
fn tool(name: &str) -> PathBuf {
    let script = format!("{}/hack/go-tool.sh", env!("CARGO_MANIFEST_DIR"));
    let out = Command::new(script)
        .arg(name)
        .stderr(Stdio::inherit())
        .output()
        .expect("hack/go-tool.sh builds the servers; it needs bash and Go");
    assert!(out.status.success(), "{name} could not be built: run `make test`, or see above");
    String::from_utf8(out.stdout).unwrap().trim().into()
}

/// A server of the test's own. It ends with it.
pub struct Server {
    child: Child,
    pub port: u16,
    pub dir: tempfile::TempDir,
    /// Cloud Storage, instead of S3.
    gcs: bool,
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
            .args(["posix", "--sidecar"])
            .args([sub("meta"), sub("data")])
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        listens(port, "versitygw");
        Self { child, port, dir, gcs: false }
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
        Self { child, port, dir, gcs: true }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub async fn put(&self, name: &str, content: impl Into<Vec<u8>>) {
        self.put_into(BUCKET, name, content).await;
    }

    pub async fn put_into(&self, bucket: &str, name: &str, content: impl Into<Vec<u8>>) {
        if self.gcs {
            // It does not know the call that `object_store` makes.
            let url = format!("{}/upload/storage/v1/b/{bucket}/o", self.endpoint());
            let put = reqwest::Client::new().post(url).query(&[("uploadType", "media"), ("name", name)]);
            assert!(put.body(content.into()).send().await.unwrap().status().is_success());
            return;
        }
        let store = s3_bucket(&self.endpoint(), bucket);
        store.put(&Path::from(name), content.into().into()).await.unwrap();
    }

    pub async fn delete(&self, name: &str) {
        s3_bucket(&self.endpoint(), BUCKET).delete(&Path::from(name)).await.unwrap();
    }
}

fn s3_bucket(endpoint: &str, bucket: &str) -> Arc<dyn ObjectStore> {
    let store = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_endpoint(endpoint)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(SECRET_KEY)
        .with_http_connector(Plain)
        .build();
    Arc::new(store.unwrap())
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
    /// Connections are closed at once.
    Refuse,
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
        let listener = TcpListener::bind(("127.0.0.1", free_port())).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let fault = Arc::new(Mutex::new(fault));
        let counts = Arc::new(Counts::default());
        let (shared, counted, upstream) = (Arc::clone(&fault), Arc::clone(&counts), server.port);
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
    let counted = Arc::clone(&counts);
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match from_client.read(&mut buffer).await {
                Ok(n) if n > 0 => to_server.write_all(&buffer[..n]).await?,
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
            Fault::None => {}
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
            Fault::Status(_) | Fault::Refuse => return Ok(()),
        }
        to_client.write_all(part).await?;
        counts.bytes.fetch_add(part.len(), Ordering::Relaxed);
        sent += n;
    }
}
