//! Between one controller and the API server: fails requests, loses answers, takes the API server out of reach.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::http1::{self, Answer, Cut, Whole};
use crate::plan::{self, Api};

/// One proxy.
pub struct ApiProxy {
    base: String,
    client: reqwest::Client,
    seed: u64,
    name: [u64; 2],
    requests: AtomicU64,
    failed: AtomicU64,
    /// What it is like, and what ends the watches that are open.
    state: Mutex<(Api, CancellationToken)>,
}

impl ApiProxy {
    /// Starts one before the API server of the kubeconfig. Returns it, and a kubeconfig that leads through it.
    pub async fn start(admin: &Path, seed: u64, name: [u64; 2]) -> anyhow::Result<(Arc<Self>, String)> {
        let admin: Value = serde_yaml::from_str(&std::fs::read_to_string(admin)?)?;
        let cluster = &admin["clusters"][0]["cluster"];
        let pem = cluster["certificate-authority-data"].as_str().context("no certificate")?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let server = format!("http://{}", listener.local_addr()?);
        let proxy = Arc::new(Self {
            base: cluster["server"].as_str().context("no server")?.to_owned(),
            client: http1::client(Some(&STANDARD.decode(pem)?))?,
            seed,
            name,
            requests: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            state: Mutex::new((Api::Fine, CancellationToken::new())),
        });
        let handler = Arc::clone(&proxy);
        tokio::spawn(http1::serve(listener, move |request| {
            let proxy = Arc::clone(&handler);
            async move { proxy.handle(request).await }
        }));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}}],
            "users": [{"name": "u", "user": admin["users"][0]["user"]}],
        });
        Ok((proxy, config.to_string()))
    }

    /// Changes what the API server is like. Out of reach, the open watches end as well.
    pub fn set(&self, api: Api) {
        let mut state = self.state();
        state.0 = api;
        if api == Api::Away {
            state.1.cancel();
            state.1 = CancellationToken::new();
        }
    }

    /// Requests that were failed so far.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, (Api, CancellationToken)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn handle(&self, request: Whole) -> Result<Answer, Cut> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let mut rng = plan::stream(self.seed, "api", &[self.name[0], self.name[1], number]);
        let (api, end) = self.state().clone();
        let fails = match api {
            Api::Fine => None,
            Api::Away => Some(4),
            Api::Failing(of_hundred) => {
                (rng.random_range(0..100) < of_hundred).then(|| rng.random_range(0..6))
            }
        };
        self.failed.fetch_add(u64::from(fails.is_some()), Ordering::Relaxed);
        match fails {
            Some(0) => return Ok(refusal(429, "TooManyRequests")),
            Some(1) => return Ok(refusal(500, "InternalError")),
            Some(2) => return Ok(refusal(503, "ServiceUnavailable")),
            Some(3 | 4) => return Err(Cut),
            // It takes effect, and nobody is told.
            Some(_) => {
                let _ = request.forward(&self.client, &self.base).await;
                return Err(Cut);
            }
            None => {}
        }
        let (parts, body) = request.forward(&self.client, &self.base).await?.into_parts();
        let cut = end.cancelled_owned();
        let chunks = body.into_data_stream().map(|chunk| chunk.map_err(std::io::Error::other));
        let broken = futures::stream::once(async { Err(std::io::Error::other("cut")) });
        // Cut in the midst, the answer must not look complete.
        let body = if parts.headers.contains_key("content-length") {
            reqwest::Body::wrap_stream(chunks)
        } else {
            let ends = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let was_cut = Arc::clone(&ends);
            let cut = async move {
                cut.await;
                ends.store(true, Ordering::SeqCst);
            };
            let tail = broken.filter(move |_| std::future::ready(was_cut.load(Ordering::SeqCst)));
            reqwest::Body::wrap_stream(chunks.take_until(Box::pin(cut)).chain(tail))
        };
        Ok(Answer::from_parts(parts, body))
    }
}

/// As the API server would say it.
fn refusal(code: u16, reason: &str) -> Answer {
    let mut answer = http1::json(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "for a test", "reason": reason, "code": code}),
    );
    if code == 429 {
        answer.headers_mut().insert("retry-after", http::HeaderValue::from_static("1"));
    }
    answer
}
