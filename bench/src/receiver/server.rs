//! The servers under load. Each is a process of its own, so that its memory and its processor time are its own.
//!
//! The load generator starts this same program again with `serve`, writes one line of JSON that says which server it
//! is to be, and reads one that says where it listens. Each further line asks for the counts. At the end of its
//! standard input the server ends too: none outlives the measuring.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, bail};
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use ed25519_dalek::{Signature, VerifyingKey};
use futures::future::BoxFuture;
use gemini_batch_operator::admin::{self, Admin};
use gemini_batch_operator::callback::keyring::KeyRing;
use gemini_batch_operator::receiver::hint::{Hint, HintSink, WriteError, Written};
use gemini_batch_operator::receiver::keys::{Document, FetchError, JwksSource};
use gemini_batch_operator::receiver::metrics::Metrics;
use gemini_batch_operator::receiver::ring::{RingReadError, RingSource};
use gemini_batch_operator::receiver::{Config, Receiver};
use gemini_batch_operator::telemetry::{self, LogFormat};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, DecodingKey, crypto};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::mail;
use crate::machine;

/// Which server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// Ours, as `run` builds it, except that ring, keys and hints are stand-ins in memory.
    Receiver {
        /// What the stand-in for Google's endpoint answers.
        jwks: String,
    },
    /// axum with a route that nobody asks for.
    NotFound,
    /// axum with a route that checks `v1a` and does nothing else. Remembers the key that fitted, as ours does.
    Ed25519 {
        /// The public keys.
        keys: Vec<[u8; 32]>,
    },
    /// axum with a route that checks the signature of a JWT and does nothing else.
    Rs256 {
        /// The modulus.
        n: Vec<u8>,
        /// The exponent.
        e: Vec<u8>,
    },
}

#[derive(Serialize, Deserialize)]
struct Order {
    kind: Kind,
    core: usize,
}

/// Where a server listens.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Ports {
    /// For callbacks.
    pub http: u16,
    /// For `/healthz`.
    pub admin: u16,
}

/// How often the stand-ins were asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Google's endpoint for keys.
    pub key_fetches: usize,
    /// The API server, to read the key ring.
    pub ring_reads: usize,
    /// The API server, to store a hint.
    pub hint_writes: usize,
}

/// A server that runs, as the load generator sees it.
pub struct Server {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub ports: Ports,
}

impl Server {
    pub fn start(kind: Kind, core: usize) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("could not start a server")?;
        let mut input = child.stdin.take().context("no input")?;
        let mut output = BufReader::new(child.stdout.take().context("no output")?);
        let ports = say(&mut input, &mut output, &serde_json::to_string(&Order { kind, core })?)?;
        Ok(Self { child, input, output, ports })
    }

    pub fn counts(&mut self) -> anyhow::Result<Counts> {
        say(&mut self.input, &mut self.output, "counts")
    }

    pub fn usage(&self) -> anyhow::Result<machine::Usage> {
        machine::Usage::of(self.child.id())
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.ports.http).into()
    }

    pub fn admin(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.ports.admin).into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // this very child, by its handle
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One line there, one line back.
fn say<T: for<'de> Deserialize<'de>>(
    input: &mut ChildStdin,
    output: &mut BufReader<ChildStdout>,
    line: &str,
) -> anyhow::Result<T> {
    writeln!(input, "{line}").context("the server does not listen")?;
    let mut answer = String::new();
    if output.read_line(&mut answer)? == 0 {
        bail!("the server ended: see above for what it said");
    }
    serde_json::from_str(&answer).context("the server said something else")
}

/// What the process with `serve` does.
pub fn serve() -> anyhow::Result<()> {
    let mut input = std::io::stdin().lines();
    let order = input.next().context("no order")??;
    let Order { kind, core } = serde_json::from_str(&order)?;
    machine::pin(core)?;
    // as in the operator, except that it is silent about what goes well: per request neither logs anything
    telemetry::init("warn", LogFormat::Json)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let tallies = Arc::new(Tallies::default());
    let ports = runtime.block_on(start(kind, &tallies))?;
    let mut output = std::io::stdout();
    writeln!(output, "{}", serde_json::to_string(&ports)?)?;
    for line in input {
        line?;
        writeln!(output, "{}", serde_json::to_string(&tallies.counts())?)?;
    }
    runtime.shutdown_background();
    Ok(())
}

async fn start(kind: Kind, tallies: &Arc<Tallies>) -> anyhow::Result<Ports> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let admin = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let ports = Ports { http: listener.local_addr()?.port(), admin: admin.local_addr()?.port() };
    let mut registry = Registry::with_prefix("gemini_batch");
    match kind {
        Kind::Receiver { jwks } => {
            let receiver = Receiver::new(
                Config::new(mail::external_url()?),
                Arc::new(StandInRing { ring: mail::ring()?, tallies: Arc::clone(tallies) }),
                Arc::new(StandInKeys { document: jwks.into_bytes(), tallies: Arc::clone(tallies) }),
                Arc::new(StandInSink { tallies: Arc::clone(tallies) }),
                Arc::new(Timestamp::now),
                Metrics::register(&mut registry),
            )?;
            let check = receiver.clone();
            tokio::spawn(async move { receiver.run(listener, CancellationToken::new()).await });
            while check.ready().is_err() || tallies.key_fetches.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
        }
        Kind::NotFound => {
            let app = Router::new().route("/v1/other", post(async || StatusCode::OK));
            bare(listener, app);
        }
        Kind::Ed25519 { keys } => {
            let keys = keys.iter().map(VerifyingKey::from_bytes).collect::<Result<_, _>>()?;
            let state = Arc::new(Ed25519 { keys, first: AtomicUsize::new(0) });
            bare(listener, Router::new().route(mail::ROUTE, post(ed25519)).with_state(state));
        }
        Kind::Rs256 { n, e } => {
            let key = Arc::new(DecodingKey::from_rsa_raw_components(&n, &e));
            bare(listener, Router::new().route(mail::ROUTE, post(rs256)).with_state(key));
        }
    }
    let served = Admin { ready: Vec::new(), registry };
    tokio::spawn(async move { admin::serve(admin, served, CancellationToken::new()).await });
    Ok(ports)
}

fn bare(listener: TcpListener, app: Router) {
    tokio::spawn(async move { axum::serve(listener, app).await });
}

struct Ed25519 {
    keys: Vec<VerifyingKey>,
    first: AtomicUsize,
}

/// The signed text, the signature, the keys: no more.
async fn ed25519(State(state): State<Arc<Ed25519>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let header = |name| headers.get(name).map_or(&[][..], |v| v.as_bytes());
    let text = [header("webhook-id"), b".", header("webhook-timestamp"), b".", &body].concat();
    let encoded = header("webhook-signature").strip_prefix(b"v1a,").unwrap_or_default();
    let signature = STANDARD.decode(encoded).ok().and_then(|s| Signature::from_slice(&s).ok());
    let Some(signature) = signature else { return StatusCode::UNAUTHORIZED };
    let first = state.first.load(Ordering::Relaxed);
    let fits = |n: &usize| state.keys[*n].verify_strict(&text, &signature).is_ok();
    match (first..state.keys.len()).chain(0..first).find(fits) {
        Some(key) => {
            state.first.store(key, Ordering::Relaxed);
            StatusCode::OK
        }
        None => StatusCode::UNAUTHORIZED,
    }
}

async fn rs256(State(key): State<Arc<DecodingKey>>, headers: HeaderMap, _body: Bytes) -> StatusCode {
    let jwt = headers.get("webhook-signature").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let Some((message, signature)) = jwt.rsplit_once('.') else { return StatusCode::UNAUTHORIZED };
    match crypto::verify(signature, message.as_bytes(), &key, Algorithm::RS256) {
        Ok(true) => StatusCode::OK,
        _ => StatusCode::UNAUTHORIZED,
    }
}

#[derive(Default)]
struct Tallies {
    key_fetches: AtomicUsize,
    ring_reads: AtomicUsize,
    hint_writes: AtomicUsize,
}

impl Tallies {
    fn counts(&self) -> Counts {
        Counts {
            key_fetches: self.key_fetches.load(Ordering::SeqCst),
            ring_reads: self.ring_reads.load(Ordering::SeqCst),
            hint_writes: self.hint_writes.load(Ordering::SeqCst),
        }
    }
}

struct StandInRing {
    ring: KeyRing,
    tallies: Arc<Tallies>,
}

impl RingSource for StandInRing {
    fn read(&self) -> BoxFuture<'_, Result<KeyRing, RingReadError>> {
        self.tallies.ring_reads.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(self.ring.clone()) })
    }
}

struct StandInKeys {
    document: Vec<u8>,
    tallies: Arc<Tallies>,
}

impl JwksSource for StandInKeys {
    fn fetch(&self) -> BoxFuture<'_, Result<Document, FetchError>> {
        self.tallies.key_fetches.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(Document { bytes: self.document.clone(), max_age: None }) })
    }
}

/// Takes every hint at once: what the API server costs is another benchmark's matter.
struct StandInSink {
    tallies: Arc<Tallies>,
}

impl HintSink for StandInSink {
    fn write<'a>(&'a self, _hint: &'a Hint) -> BoxFuture<'a, Result<Written, WriteError>> {
        self.tallies.hint_writes.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(Written::Stored) })
    }
}
