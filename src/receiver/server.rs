//! Sockets: what may connect, how long it may take, and how it all ends.
//!
//! Not `axum::serve`: that never closes a connection that is idle, or stops in the middle of its header or body,
//! and has no limit on how many there are. Here: HTTP/1 only, with a timer from the first byte that does not come;
//! a limit that is applied before accepting, so that a flood waits in the kernel and not in our memory; and an age
//! at which any connection ends.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::metrics::{ByReason, Metrics};
use super::tls::Tls;

const MAX_HEADERS: usize = 64;
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// More than the header needs: a body is read through the same buffer.
const BUFFER_BYTES: usize = 24 * 1024;
/// After a failed accept (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits and timeouts, in real time. Tests shorten them.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time. More wait in the kernel's queue.
    pub connections: usize,
    /// For the header of a request; also how long an idle connection is kept.
    pub header: Duration,
    /// For the body of a request whose token fits.
    pub body: Duration,
    /// For the write into the job's status, conflicts included.
    pub write: Duration,
    /// For a request as a whole, once its header is there.
    pub handler: Duration,
    /// Between two looks at the files of the certificate.
    pub certificate: Duration,
    /// At this age a connection ends after the request it is in.
    pub connection_age: Duration,
    /// On shutdown, for what is in flight.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            header: Duration::from_secs(10),
            body: Duration::from_secs(5),
            write: Duration::from_secs(3),
            handler: Duration::from_secs(10),
            certificate: Duration::from_secs(10),
            connection_age: Duration::from_mins(5),
            drain: Duration::from_secs(15),
        }
    }
}

impl Limits {
    /// No more connections than this process may have files open, with room for everything else: health checks and
    /// the API server must get through while strangers hold all of them.
    #[must_use]
    pub fn within(self, open_files: Option<usize>) -> Self {
        const EVERYTHING_ELSE: usize = 256;
        let room = open_files
            .map_or(usize::MAX, |limit| limit.saturating_sub(EVERYTHING_ELSE).max(limit / 4).max(1));
        Self { connections: self.connections.min(room), ..self }
    }
}

/// How many files this process may have open, if the system says so.
#[must_use]
pub fn open_files_limit() -> Option<usize> {
    soft_limit(&std::fs::read_to_string("/proc/self/limits").ok()?)
}

fn soft_limit(limits: &str) -> Option<usize> {
    limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok())
}

/// Accepts and serves until `shutdown`, then lets requests in flight finish.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    tls: Option<Arc<Tls>>,
    limits: Limits,
    metrics: Metrics,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let connections = TaskTracker::new();
    let server = Server { router, tls, limits, metrics, shutdown: shutdown.clone() };
    while let Some((stream, slot)) = shutdown.run_until_cancelled(server.accept(&listener, &slots)).await {
        connections.spawn(server.clone().connection(stream, slot));
    }
    drop(listener);
    connections.close();
    // each connection knows of the shutdown and has its own limit
    connections.wait().await;
}

#[derive(Clone)]
struct Server {
    router: Router,
    tls: Option<Arc<Tls>>,
    limits: Limits,
    metrics: Metrics,
    shutdown: CancellationToken,
}

impl Server {
    /// Waits for a slot first, and then for a connection.
    async fn accept(
        &self,
        listener: &TcpListener,
        slots: &Arc<Semaphore>,
    ) -> (TcpStream, OwnedSemaphorePermit) {
        loop {
            if slots.available_permits() == 0 {
                self.reject("limit");
            }
            // the semaphore is never closed; were it, waiting for ever is what a closed door means
            let Ok(slot) = Arc::clone(slots).acquire_owned().await else { std::future::pending().await };
            match listener.accept().await {
                Ok((stream, _)) => return (stream, slot),
                Err(error) if is_the_peers(&error) => {}
                Err(error) => {
                    warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(self, stream: TcpStream, slot: OwnedSemaphorePermit) {
        self.metrics.connections.inc();
        let _counted = Counted::new(&self.metrics.connections_open);
        // answers are one small packet
        let _ = stream.set_nodelay(true);
        match &self.tls {
            None => self.http(stream).await,
            // a handshake has as long as a header
            Some(tls) => {
                match tokio::time::timeout(self.limits.header, tls.acceptor().accept(stream)).await {
                    Ok(Ok(stream)) => self.http(stream).await,
                    Ok(Err(error)) => {
                        debug!(%error, "a TLS handshake failed");
                        self.reject("tls_handshake");
                    }
                    Err(_) => self.reject("tls_timeout"),
                }
            }
        }
        drop(slot);
    }

    async fn http(&self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header)
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEADER_BYTES)
            .max_buf_size(BUFFER_BYTES)
            // else two refusals would differ in the second they were sent
            .auto_date_header(false);
        let service = TowerToHyperService::new(self.router.clone());
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            () = self.shutdown.cancelled() => None,
            () = tokio::time::sleep(self.limits.connection_age) => None,
        };
        let ended = if let Some(ended) = ended {
            ended
        } else {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(self.limits.drain, connection).await {
                Ok(ended) => ended,
                Err(_) => return self.reject("drain_timeout"),
            }
        };
        if let Err(error) = ended {
            debug!(%error, "a connection ended early");
            self.reject(reason(&error));
        }
    }

    fn reject(&self, reason: &'static str) {
        self.metrics.connections_rejected.get_or_create(&ByReason { reason }).inc();
    }
}

/// Counts one connection as open as long as it lives, even if its task panics.
struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn reason(error: &hyper::Error) -> &'static str {
    if error.is_timeout() {
        "header_timeout"
    } else if error.is_parse_too_large() {
        "header_too_large"
    } else if error.is_parse() {
        "malformed"
    } else {
        "broken"
    }
}

/// Errors of `accept` that only say that this one caller has gone.
fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_room_for_everything_else() {
        let connections = |limit| Limits::default().within(limit).connections;
        assert_eq!(connections(None), 4096);
        assert_eq!(connections(Some(1_048_576)), 4096);
        assert_eq!(connections(Some(1024)), 768);
        assert_eq!(connections(Some(256)), 64);
        assert_eq!(connections(Some(0)), 1);
        let text = "Limit   Soft Limit   Hard Limit   Units\nMax open files   1024   524288   files\n";
        assert_eq!(soft_limit(text), Some(1024));
        assert_eq!(soft_limit("Max open files   unlimited   unlimited   files\n"), None);
        assert!(open_files_limit().is_some_and(|limit| limit > 0));
    }
}
