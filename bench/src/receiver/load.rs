//! The load: raw HTTP/1.1 over kept-alive connections, each with one request at a time. No HTTP library, so that the
//! one core it has is enough to keep the server's core busy.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio::time::timeout;

/// No answer within this is a failure of the server or of the benchmark.
const PATIENCE: Duration = Duration::from_secs(30);

/// What came of a number of requests.
#[derive(Default)]
pub struct Outcome {
    /// From the first request to the last answer.
    pub took: Duration,
    /// Of each request, in microseconds.
    pub latencies: Vec<u32>,
    /// How many answers had which status.
    pub statuses: BTreeMap<u16, usize>,
}

/// Connections that are open and kept alive.
pub struct Connections {
    streams: Vec<TcpStream>,
}

impl Connections {
    pub async fn open(server: SocketAddr, count: usize) -> anyhow::Result<Self> {
        let mut streams = Vec::with_capacity(count);
        for _ in 0..count {
            let stream = TcpStream::connect(server).await.context("could not connect to the server")?;
            stream.set_nodelay(true)?;
            streams.push(stream);
        }
        Ok(Self { streams })
    }

    /// Sends `total` requests, in order and over and over again, over whichever connection is free.
    pub async fn send(&mut self, requests: &Rc<[Bytes]>, total: usize) -> anyhow::Result<Outcome> {
        ensure!(!requests.is_empty(), "nothing to send");
        let next = Rc::new(Cell::new(0));
        let outcome = Rc::new(RefCell::new(Outcome::default()));
        let tasks = LocalSet::new();
        let began = Instant::now();
        let handles: Vec<_> = self
            .streams
            .drain(..)
            .map(|stream| {
                let (next, outcome, requests) = (Rc::clone(&next), Rc::clone(&outcome), Rc::clone(requests));
                tasks.spawn_local(async move { one_by_one(stream, &requests, total, &next, &outcome).await })
            })
            .collect();
        // The load never sleeps. Else each answer would have to wake it, which is the server's time, and only the slower
        // of two servers would pay that: the faster one keeps the load busy.
        let awake = tokio::spawn(async {
            loop {
                tokio::task::yield_now().await;
            }
        });
        tasks.await;
        let took = began.elapsed();
        awake.abort();
        for handle in handles {
            self.streams.push(handle.await??);
        }
        let mut outcome = outcome.take();
        outcome.took = took;
        Ok(outcome)
    }
}

async fn one_by_one(
    mut stream: TcpStream,
    requests: &[Bytes],
    total: usize,
    next: &Cell<usize>,
    outcome: &RefCell<Outcome>,
) -> anyhow::Result<TcpStream> {
    let mut buffer = [0; 1024];
    loop {
        let n = next.get();
        if n >= total {
            return Ok(stream);
        }
        next.set(n + 1);
        let began = Instant::now();
        let status = timeout(PATIENCE, exchange(&mut stream, &requests[n % requests.len()], &mut buffer))
            .await
            .context("no answer from the server")??;
        let micros = u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX);
        let mut outcome = outcome.borrow_mut();
        outcome.latencies.push(micros);
        *outcome.statuses.entry(status).or_default() += 1;
    }
}

/// One request and its answer. All answers here are without a body, and anything else is an error.
async fn exchange(stream: &mut TcpStream, request: &[u8], buffer: &mut [u8]) -> anyhow::Result<u16> {
    stream.write_all(request).await?;
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..]).await?;
        ensure!(read > 0, "the server closed a connection after {filled} bytes of an answer");
        filled += read;
        let answer = &buffer[..filled];
        if let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = std::str::from_utf8(&answer[..end])?;
            ensure!(end + 4 == filled && head.contains("content-length: 0"), "an answer with a body: {head}");
            let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
            return Ok(status.context("not HTTP/1.1")?.parse()?);
        }
        if filled == buffer.len() {
            bail!("an answer that is too long");
        }
    }
}

/// Asks `/healthz` over a new connection. Returns how long it took.
pub fn healthz(admin: SocketAddr, patience: Duration) -> anyhow::Result<Duration> {
    use std::io::{Read as _, Write as _};
    let began = Instant::now();
    let mut stream = std::net::TcpStream::connect_timeout(&admin, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("ok\n"), "/healthz said {answer}");
    Ok(began.elapsed())
}
