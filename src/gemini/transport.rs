//! One HTTP exchange: headers, timeouts, limits; no redirects, no retries, no proxies that nobody asked for.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{HeaderMap, RANGE, RETRY_AFTER};
use http::{HeaderValue, Method, StatusCode};
use jiff::Timestamp;
use reqwest::{Request, Response, Url};
use serde_json::Value;

use super::{ApiKey, Error};

/// An error body of which more is not read.
const MAX_ERROR_BYTES: usize = 1 << 20;
/// A JSON answer of which more is not read: a page of 100 batches, or a batch with inline results.
const MAX_JSON_BYTES: usize = 64 << 20;

/// How to reach the Gemini API.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Scheme, host and port; a path is kept as a prefix.
    pub base_url: Url,
    /// `v1beta`, or `v1`.
    pub api_version: String,
    /// Until a connection is there.
    pub connect_timeout: Duration,
    /// For a whole call, apart from creates and transfers.
    pub request_timeout: Duration,
    /// For the creation of a batch: Gemini validates the whole file before it answers.
    pub create_timeout: Duration,
    /// For a transfer without a byte moving.
    pub idle_timeout: Duration,
    /// For one chunk of an upload.
    pub chunk_timeout: Duration,
    /// Accept plain HTTP: for the simulator.
    pub allow_insecure: bool,
}

impl ClientConfig {
    /// The API at that address, with the timeouts that Gemini was seen to need.
    #[must_use]
    pub fn new(base_url: Url) -> Self {
        Self {
            base_url,
            api_version: "v1beta".to_owned(),
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_mins(1),
            create_timeout: Duration::from_mins(3),
            idle_timeout: Duration::from_mins(1),
            chunk_timeout: Duration::from_mins(5),
            allow_insecure: false,
        }
    }
}

/// A configuration that can't work.
#[derive(Debug, thiserror::Error)]
pub enum ClientConfigError {
    /// The API key would cross the network in the clear.
    #[error(
        "the URL of the Gemini API must be https (plain http is only for the simulator: --allow-insecure-upstream)"
    )]
    Insecure,
    /// Not something to send requests to.
    #[error("the URL of the Gemini API must be http or https, without query, fragment and user name")]
    Url,
    /// Not a path segment.
    #[error("the version of the Gemini API must be like v1beta")]
    Version,
    /// TLS could not be set up.
    #[error("the HTTP client could not be set up")]
    Http(#[from] reqwest::Error),
}

/// A client of the Gemini API. Holds no key: each call is given one. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    pub(super) config: ClientConfig,
    http: reqwest::Client,
    /// For the creation of batches alone: every request has a connection of its own. hyper sends a request
    /// again when a *reused* connection turns out to be closed before it was sent; on a fresh one it never
    /// does, so what this client sends, it sends once.
    once: reqwest::Client,
}

impl Client {
    /// A client. Nothing is sent yet.
    pub fn new(config: ClientConfig) -> Result<Self, ClientConfigError> {
        let url = &config.base_url;
        match url.scheme() {
            "https" => {}
            "http" if config.allow_insecure => {}
            "http" => return Err(ClientConfigError::Insecure),
            _ => return Err(ClientConfigError::Url),
        }
        if !url.has_host() || url.query().is_some() || url.fragment().is_some() || !url.username().is_empty()
        {
            return Err(ClientConfigError::Url);
        }
        if config.api_version.is_empty() || !config.api_version.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(ClientConfigError::Version);
        }
        let builder = || {
            reqwest::Client::builder()
                .user_agent(concat!("gemini-batch-operator/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(config.connect_timeout)
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .retry(reqwest::retry::never())
                .tcp_keepalive(Duration::from_secs(30))
        };
        Ok(Self {
            http: builder().pool_idle_timeout(Duration::from_mins(1)).build()?,
            once: builder().pool_max_idle_per_host(0).build()?,
            config,
        })
    }

    /// A URL below the base. `path` is made of constants and checked names only.
    pub(super) fn url(&self, path: &str, query: &[(&str, &str)]) -> Url {
        let mut url = self.config.base_url.clone();
        let prefix = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{prefix}{path}"));
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    /// `/{version}/{path}`.
    pub(super) fn versioned(&self, path: &str, query: &[(&str, &str)]) -> Url {
        self.url(&format!("/{}/{path}", self.config.api_version), query)
    }

    /// Sends a request with the key and returns the JSON of a 200.
    pub(super) async fn json(
        &self,
        key: &ApiKey,
        method: Method,
        url: Url,
        body: Option<&Value>,
    ) -> Result<Value, Error> {
        let request = with_json(method, url, body);
        let response = self.send(request, Some(key), self.config.request_timeout).await?;
        json_body(response).await
    }

    /// The same over a connection of its own, so that it is sent once and never again.
    pub(super) async fn json_once(&self, key: &ApiKey, url: Url, body: &Value) -> Result<Value, Error> {
        let mut request = with_json(Method::POST, url, Some(body));
        prepare(&mut request, Some(key), self.config.create_timeout)?;
        let response = self.once.execute(request).await.map_err(Error::transport)?;
        json_body(success(response).await?).await
    }

    /// Sends a request and returns a response whose status is 200.
    pub(super) async fn send(
        &self,
        mut request: Request,
        key: Option<&ApiKey>,
        timeout: Duration,
    ) -> Result<Response, Error> {
        prepare(&mut request, key, timeout)?;
        success(self.http.execute(request).await.map_err(Error::transport)?).await
    }

    /// The same without a limit for the whole exchange, for transfers; the answer must begin in time.
    pub(super) async fn send_streaming(&self, mut request: Request, key: &ApiKey) -> Result<Response, Error> {
        let header = key.header().map_err(|_| Error::local("the API key can't be sent"))?;
        request.headers_mut().insert("x-goog-api-key", header);
        // Within the limit: the body of an error as well.
        let partial = request.headers().contains_key(RANGE);
        let answer = async {
            let response = self.http.execute(request).await.map_err(Error::transport)?;
            // What was asked for.
            if partial && response.status() == StatusCode::PARTIAL_CONTENT {
                return Ok(response);
            }
            success(response).await
        };
        tokio::time::timeout(self.config.request_timeout, answer)
            .await
            .map_err(|_| Error::local("timed out"))?
    }
}

fn with_json(method: Method, url: Url, body: Option<&Value>) -> Request {
    let mut request = Request::new(method, url);
    if let Some(body) = body {
        request
            .headers_mut()
            .insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        *request.body_mut() = Some(body.to_string().into());
    }
    request
}

fn prepare(request: &mut Request, key: Option<&ApiKey>, timeout: Duration) -> Result<(), Error> {
    if let Some(key) = key {
        let header = key.header().map_err(|_| Error::local("the API key can't be sent"))?;
        request.headers_mut().insert("x-goog-api-key", header);
    }
    *request.timeout_mut() = Some(timeout);
    Ok(())
}

/// Success is exactly 200. A redirect is none.
async fn success(response: Response) -> Result<Response, Error> {
    let code = response.status().as_u16();
    if code == 200 {
        return Ok(response);
    }
    let retry_after = header(response.headers(), RETRY_AFTER.as_str()).map(ToOwned::to_owned);
    // A body that breaks off is no envelope: the outcome is then unknown, as it should be.
    let body = read(response, MAX_ERROR_BYTES).await.unwrap_or_default();
    Err(Error::answer(code, retry_after.as_deref(), &body, Timestamp::now()))
}

pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

pub(super) async fn json_body(response: Response) -> Result<Value, Error> {
    let body = read(response, MAX_JSON_BYTES).await?;
    serde_json::from_slice(&body).map_err(|_| Error::local("an answer with status 200 that is not JSON"))
}

async fn read(mut response: Response, limit: usize) -> Result<Bytes, Error> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(Error::transport)? {
        if body.len() + chunk.len() > limit {
            return Err(Error::local("an answer that is too large"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}
