//! One HTTP client for all stores: timeouts, no redirects, no proxies, nothing of `object_store`'s own.

use std::error::Error as _;
use std::fmt;

use async_trait::async_trait;
use http_body_util::BodyExt as _;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};

use super::Timeouts;
use super::endpoint::{Trust, wary};
use super::error::{Error, Kind};

/// Makes clients that share one pool of connections.
#[derive(Clone)]
pub(super) struct Connector(reqwest::Client);

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl Connector {
    pub(super) fn new(timeouts: &Timeouts, trust: Trust) -> Result<Self, Error> {
        let builder = reqwest::Client::builder()
            .user_agent(concat!("gemini-batch-operator/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(timeouts.connect)
            .read_timeout(timeouts.idle)
            // A redirect leads where nobody looked, with the credentials in its headers.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .retry(reqwest::retry::never())
            .pool_idle_timeout(std::time::Duration::from_mins(1))
            .tcp_keepalive(std::time::Duration::from_secs(30));
        let builder = match trust {
            Trust::Named => builder,
            Trust::Any => builder.dns_resolver(wary()).https_only(true),
        };
        let client = builder.build().map_err(|_| {
            Error::new(Kind::Unavailable, "the HTTP client of object stores could not be set up")
        })?;
        Ok(Self(client))
    }
}

impl HttpConnector for Connector {
    /// What `object_store`'s options say about clients is about its own.
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service(self.0.clone())))
    }
}

#[derive(Clone, Debug)]
struct Service(reqwest::Client);

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = reqwest::Url::parse(&parts.uri.to_string())
            .map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        *request.body_mut() = Some(match body.as_bytes() {
            Some(bytes) => bytes.clone().into(),
            None => reqwest::Body::wrap(body),
        });
        let response = self.0.execute(request).await.map_err(http_error)?;
        let response: http::Response<reqwest::Body> = response.into();
        let (parts, body) = response.into_parts();
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body.map_err(http_error))))
    }
}

/// What kind of failure it was: `object_store` tries some again.
fn http_error(error: reqwest::Error) -> HttpError {
    let mut kind = if error.is_timeout() {
        HttpErrorKind::Timeout
    } else if error.is_connect() {
        HttpErrorKind::Connect
    } else if error.is_decode() {
        HttpErrorKind::Interrupted // of a body: it broke off
    } else {
        HttpErrorKind::Unknown
    };
    let mut source = error.source();
    while let Some(e) = source {
        if e.downcast_ref::<super::endpoint::Forbidden>().is_some() {
            kind = HttpErrorKind::Unknown; // it will be so the next time
        } else if kind == HttpErrorKind::Unknown && e.downcast_ref::<std::io::Error>().is_some() {
            kind = HttpErrorKind::Interrupted;
        }
        source = e.source();
    }
    if kind == HttpErrorKind::Unknown && error.is_request() && !error.is_connect() {
        kind = HttpErrorKind::Request;
    }
    // A URL may be signed.
    HttpError::new(kind, error.without_url())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use futures::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::super::{Access, Kind, Location, Purpose, Settings, Stores};

    /// It leads where nobody looked: to a metadata service, for one.
    #[tokio::test]
    async fn no_store_sends_anybody_elsewhere() {
        let (there, elsewhere) = (TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0"));
        let (there, elsewhere) = (there.await.unwrap(), elsewhere.await.unwrap());
        let endpoint = format!("http://{}", there.local_addr().unwrap());
        let to = elsewhere.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut client, _) = there.accept().await.unwrap();
                let _ = client.read(&mut [0; 16 << 10]).await.unwrap();
                let answer = format!(
                    "HTTP/1.1 307 Go\r\nlocation: http://{to}/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                );
                client.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let settings = Settings { endpoints: endpoint.parse().unwrap(), ..Settings::default() };
        let stores = Stores::new(settings).unwrap();
        let at = Location::object("s3://b/in", "f").unwrap();
        let keys = ["accessKeyId", "secretAccessKey"].map(|key| (key.to_owned(), b"x".to_vec()));
        let secret = BTreeMap::from(keys);
        let access = Access {
            purpose: Purpose::Read,
            namespace: "ns",
            field: "f",
            endpoint: Some(&endpoint),
            region: None,
            secret: Some(("store", &secret)),
        };
        let refused = stores.open(&at, &access).unwrap().head(&at.path).await.unwrap_err();
        assert_eq!(refused.kind, Kind::Invalid, "{refused}");
        assert!(elsewhere.accept().now_or_never().is_none(), "it was followed");
    }
}
