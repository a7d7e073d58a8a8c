//! What both proxies need: an HTTP/1.1 server that can cut connections, and a client that sends once.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// An answer.
pub type Answer = Response<reqwest::Body>;

/// The connection is cut instead of an answer.
#[derive(Debug)]
pub struct Cut;

/// A request, read to its end.
#[derive(Clone)]
pub struct Whole {
    pub method: http::Method,
    pub target: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Whole {
    async fn read(request: Request<Incoming>) -> Result<Self, Cut> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
        let target = parts.uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
        let mut headers = parts.headers;
        for name in [HOST, CONNECTION, TRANSFER_ENCODING] {
            headers.remove(name);
        }
        Ok(Self { method: parts.method, target, headers, body })
    }

    /// Sends it there, once.
    pub async fn forward(self, client: &reqwest::Client, base: &str) -> Result<Answer, Cut> {
        let request = client
            .request(self.method, format!("{base}{}", self.target))
            .headers(self.headers)
            .body(self.body);
        let mut answer: Answer = request.send().await.map_err(|_| Cut)?.into();
        for name in [CONNECTION, TRANSFER_ENCODING] {
            answer.headers_mut().remove(name);
        }
        Ok(answer)
    }
}

/// Serves until it is dropped.
pub async fn serve<H, F>(listener: TcpListener, handle: H)
where
    H: Fn(Whole) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Answer, Cut>> + Send,
{
    let handle = Arc::new(handle);
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let handle = Arc::clone(&handle);
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let handle = Arc::clone(&handle);
                async move {
                    let whole = Whole::read(request).await.map_err(|Cut| std::io::Error::other("cut"))?;
                    handle(whole).await.map_err(|Cut| std::io::Error::other("cut"))
                }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// A client without retries and redirects. With a certificate it is for the API server, whose connections are kept:
/// a TLS handshake for each request would be most of the work. Without it uses no connection twice, so that what it
/// sends it sends once.
pub fn client(certificate: Option<&[u8]>) -> anyhow::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .pool_max_idle_per_host(if certificate.is_some() { 32 } else { 0 })
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never());
    if let Some(pem) = certificate {
        builder = builder.tls_certs_only([reqwest::Certificate::from_pem(pem)?]);
    }
    Ok(builder.build()?)
}

/// An answer with this status and JSON.
pub fn json(code: u16, body: &serde_json::Value) -> Answer {
    let mut answer = Response::new(reqwest::Body::from(body.to_string()));
    *answer.status_mut() = http::StatusCode::from_u16(code).unwrap_or_default();
    answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    answer
}
