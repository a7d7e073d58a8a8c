//! Files: resumable upload under a chosen name, get, delete, download.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use http::{HeaderValue, Method};
use reqwest::{Request, Response, Url};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::batches::int64;
use super::transport::{header, json_body};
use super::{ApiKey, Client, Error, FileName};

/// Bytes of a chunk of an upload; only the last one may be shorter. Google's SDK uses the same.
pub const CHUNK_BYTES: usize = 8 << 20;
/// Tries for one chunk. Uploads cost nothing, so this is the one call that tries again by itself; where it
/// goes on is asked of the server each time.
const CHUNK_TRIES: u32 = 3;

/// A file as Google shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// `files/ID`.
    pub name: FileName,
    /// Size in bytes.
    pub size: Option<i64>,
    /// SHA-256 in hexadecimal.
    pub sha256_hex: Option<String>,
    /// `ACTIVE`, `PROCESSING`, `FAILED`.
    pub state: String,
}

impl File {
    /// Whether it can be used.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }

    fn parse(value: &Value) -> Option<Self> {
        Some(Self {
            name: FileName::parse(value["name"].as_str()?).ok()?,
            size: int64(&value["sizeBytes"]),
            sha256_hex: value["sha256Hash"].as_str().and_then(sha256_hex),
            state: value["state"].as_str().unwrap_or_default().to_owned(),
        })
    }
}

/// Google encodes the *hexadecimal text* of the hash in base64.
fn sha256_hex(text: &str) -> Option<String> {
    let decoded = STANDARD.decode(text).ok()?;
    let hex = String::from_utf8(decoded).ok()?;
    (hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit())).then(|| hex.to_ascii_lowercase())
}

/// A file to be uploaded.
#[derive(Clone, Copy, Debug)]
pub struct Upload<'a> {
    /// The name it shall have; Google may give it another one.
    pub name: &'a FileName,
    /// For people who list files.
    pub display_name: &'a str,
    /// What it is.
    pub mime_type: &'a str,
    /// Its size in bytes.
    pub size: u64,
}

/// The content of a file.
pub struct Download {
    /// Chunks as they come. Ends with an error if none comes for the idle timeout.
    pub stream: BoxStream<'static, Result<Bytes, Error>>,
}

/// An upload that was begun. Shows nothing of itself: its URL is as good as a key.
#[derive(Clone)]
pub struct Session {
    url: Url,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session")
    }
}

/// What the server says after a chunk.
enum Progress {
    /// It has so many bytes.
    At(u64),
    /// The file is complete.
    Complete(File),
}

impl Client {
    /// Uploads a file in chunks of 8 MiB, of which one is in memory.
    pub async fn upload(
        &self,
        key: &ApiKey,
        upload: Upload<'_>,
        mut body: impl AsyncRead + Unpin + Send,
    ) -> Result<File, Error> {
        let session = self.begin_upload(key, &upload).await?;
        let mut offset = 0;
        loop {
            let chunk = next_chunk(&mut body, upload.size - offset).await?;
            if offset + chunk.len() as u64 >= upload.size {
                return self.finish_upload(&session, offset, &chunk).await;
            }
            offset = self.upload_chunk(&session, offset, &chunk).await?;
        }
    }

    /// Sends a chunk that is not the last one, and says where the upload stands then.
    pub async fn upload_chunk(&self, session: &Session, offset: u64, chunk: &Bytes) -> Result<u64, Error> {
        match self.put_chunk(&session.url, offset, chunk, false).await? {
            Progress::At(at) => Ok(at),
            Progress::Complete(_) => Err(Error::local("the upload was finalized before its end")),
        }
    }

    /// Sends the last chunk. Only then there is a file.
    pub async fn finish_upload(&self, session: &Session, offset: u64, chunk: &Bytes) -> Result<File, Error> {
        match self.put_chunk(&session.url, offset, chunk, true).await? {
            Progress::Complete(file) => Ok(file),
            Progress::At(_) => Err(Error::local("all bytes were sent, but the upload is not finalized")),
        }
    }

    /// How many bytes of an upload that broke off have arrived; `None` if it can't go on.
    pub async fn uploaded(&self, session: &Session) -> Result<Option<u64>, Error> {
        Ok(match self.upload_command(&session.url, "query", None).await? {
            (Some("active"), response) => {
                header(response.headers(), "x-goog-upload-size-received").and_then(|s| s.parse().ok())
            }
            _ => None,
        })
    }

    /// Opens an upload. The URL of the session is as good as a key: it is never logged, and whatever host
    /// it names, the configured one is used.
    pub async fn begin_upload(&self, key: &ApiKey, upload: &Upload<'_>) -> Result<Session, Error> {
        let url = self.url(&format!("/upload/{}/files", self.config.api_version), &[]);
        let mut request = Request::new(Method::POST, url);
        let mime = HeaderValue::from_str(upload.mime_type).map_err(|_| Error::local("not a MIME type"))?;
        let headers = request.headers_mut();
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        headers.insert("x-goog-upload-protocol", HeaderValue::from_static("resumable"));
        headers.insert("x-goog-upload-command", HeaderValue::from_static("start"));
        headers.insert("x-goog-upload-header-content-length", HeaderValue::from(upload.size));
        headers.insert("x-goog-upload-header-content-type", mime);
        let file = json!({"file": {
            "name": upload.name.to_string(),
            "displayName": upload.display_name,
            "mimeType": upload.mime_type,
            "sizeBytes": upload.size.to_string(),
        }});
        *request.body_mut() = Some(file.to_string().into());
        let response = self.send(request, Some(key), self.config.request_timeout).await?;
        let session = header(response.headers(), "x-goog-upload-url").and_then(|u| Url::parse(u).ok());
        let mut session = session.ok_or_else(|| Error::local("an upload that was started without a URL"))?;
        let base = &self.config.base_url;
        let pinned = session.set_scheme(base.scheme()).is_ok()
            && session.set_host(base.host_str()).is_ok()
            && session.set_port(base.port()).is_ok()
            && session.set_username("").is_ok()
            && session.set_password(None).is_ok();
        if pinned {
            Ok(Session { url: session })
        } else {
            Err(Error::local("an upload that was started with an unusable URL"))
        }
    }

    /// Sends one chunk whole, going on where the server says it stands.
    async fn put_chunk(
        &self,
        session: &Url,
        offset: u64,
        chunk: &Bytes,
        last: bool,
    ) -> Result<Progress, Error> {
        let end = offset + chunk.len() as u64;
        let mut at = offset;
        let mut tries = 1;
        loop {
            let rest = chunk.slice(usize::try_from(at - offset).unwrap_or(0)..);
            let command = if last { "upload, finalize" } else { "upload" };
            let error = match self.upload_command(session, command, Some((at, rest))).await {
                Ok((Some("final"), response)) => return complete(response).await,
                Ok((Some(_), _)) => return Ok(Progress::At(end)),
                Ok((None, _)) => Error::local("an answer to a chunk without the state of the upload"),
                Err(e) if e.is_refusal() => return Err(e),
                Err(e) => e,
            };
            if tries == CHUNK_TRIES {
                return Err(error);
            }
            tries += 1;
            // Where does it stand? An answer that can't be used ends the upload; the caller starts anew.
            // Nor is a refusal of the question a refusal of the file: it may be no command that Gemini knows.
            match self.upload_command(session, "query", None).await {
                Ok((Some("final"), response)) => return complete(response).await,
                Ok((Some("active"), response)) => {
                    let size = header(response.headers(), "x-goog-upload-size-received");
                    at = match size.and_then(|s| s.parse().ok()) {
                        Some(size) if size == end && !last => return Ok(Progress::At(end)),
                        Some(size) if (offset..=end).contains(&size) => size,
                        _ => return Err(error),
                    };
                }
                _ => return Err(error),
            }
        }
    }

    async fn upload_command(
        &self,
        session: &Url,
        command: &str,
        chunk: Option<(u64, Bytes)>,
    ) -> Result<(Option<&'static str>, Response), Error> {
        let mut request = Request::new(Method::POST, session.clone());
        let command = HeaderValue::from_str(command).map_err(|_| Error::local("not a command"))?;
        request.headers_mut().insert("x-goog-upload-command", command);
        if let Some((offset, bytes)) = chunk {
            request.headers_mut().insert("x-goog-upload-offset", HeaderValue::from(offset));
            *request.body_mut() = Some(bytes.into());
        }
        let response = self.send(request, None, self.config.chunk_timeout).await?;
        let state = match header(response.headers(), "x-goog-upload-status") {
            Some("final") => Some("final"),
            Some("active") => Some("active"),
            _ => None,
        };
        Ok((state, response))
    }

    /// The file as it is now.
    pub async fn get_file(&self, key: &ApiKey, name: &FileName) -> Result<File, Error> {
        let answer = self.json(key, Method::GET, self.versioned(&name.to_string(), &[]), None).await?;
        File::parse(&answer).ok_or_else(|| Error::local("an answer with status 200 that names no file"))
    }

    /// Deletes the file.
    pub async fn delete_file(&self, key: &ApiKey, name: &FileName) -> Result<(), Error> {
        self.json(key, Method::DELETE, self.versioned(&name.to_string(), &[]), None).await.map(|_| ())
    }

    /// The content of a result file.
    pub async fn download(&self, key: &ApiKey, name: &FileName) -> Result<Download, Error> {
        let path = format!("/download/{}/{name}:download", self.config.api_version);
        let request = Request::new(Method::GET, self.url(&path, &[("alt", "media")]));
        let response = self.send_streaming(request, key).await?;
        let idle = self.config.idle_timeout;
        let stream = response.bytes_stream().map_err(Error::transport).boxed();
        let stream = futures::stream::try_unfold(stream, move |mut stream| async move {
            match tokio::time::timeout(idle, stream.next()).await {
                Ok(Some(chunk)) => Ok(Some((chunk?, stream))),
                Ok(None) => Ok(None),
                Err(_) => Err(Error::local("the download stood still")),
            }
        });
        Ok(Download { stream: stream.boxed() })
    }
}

async fn complete(response: Response) -> Result<Progress, Error> {
    let answer = json_body(response).await?;
    File::parse(&answer["file"])
        .map(Progress::Complete)
        .ok_or_else(|| Error::local("an upload that was finalized without naming its file"))
}

/// Up to a chunk, and never more than `rest`.
async fn next_chunk(body: &mut (impl AsyncRead + Unpin), rest: u64) -> Result<Bytes, Error> {
    let size = usize::try_from(rest).unwrap_or(usize::MAX).min(CHUNK_BYTES);
    let mut chunk = BytesMut::zeroed(size);
    body.read_exact(&mut chunk)
        .await
        .map_err(|e| Error::local(format!("the input could not be read: {}", e.kind())))?;
    Ok(chunk.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_hash_is_base64_of_hexadecimal_text() {
        let hex = "597b3600e0ba0bd1d9d9c1bd5dd6dd4bb2ef6ae4e5ff3b7dd4c5eab5b0d6c6d7";
        assert_eq!(sha256_hex(&STANDARD.encode(hex)).as_deref(), Some(hex));
        assert_eq!(sha256_hex(&STANDARD.encode(hex.to_uppercase())).as_deref(), Some(hex));
        for bad in [
            hex.to_owned(),
            STANDARD.encode([7; 32]),
            STANDARD.encode(&hex[..63]),
            String::new(),
            "?".to_owned(),
        ] {
            assert_eq!(sha256_hex(&bad), None, "{bad}");
        }
        let not_hex = STANDARD.encode("z".repeat(64));
        assert_eq!(sha256_hex(&not_hex), None);
    }

    #[test]
    fn a_file_is_read() {
        let file =
            File::parse(&json!({"name": "files/t5snrshrqff1", "displayName": "in.jsonl", "sizeBytes": "202",
            "sha256Hash": STANDARD.encode("a".repeat(64)), "state": "ACTIVE", "source": "UPLOADED"}))
            .unwrap();
        assert_eq!(
            (file.name.to_string().as_str(), file.size, file.is_active()),
            ("files/t5snrshrqff1", Some(202), true)
        );
        assert_eq!(file.sha256_hex, Some("a".repeat(64)));
        for state in [json!("PROCESSING"), json!("FAILED"), json!(null), json!("STATE_ACTIVE")] {
            let bare = File::parse(&json!({"name": "files/a", "sizeBytes": 7, "state": state})).unwrap();
            assert!(!bare.is_active() && bare.sha256_hex.is_none() && bare.size == Some(7), "{state}");
        }
        for bad in [json!({}), json!({"name": 7}), json!({"name": "files/../x"}), json!([]), json!(null)] {
            assert!(File::parse(&bad).is_none(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_hash_is_survived(text in "\\PC{0,90}", bytes in prop::collection::vec(any::<u8>(), 0..90)) {
            for text in [text, STANDARD.encode(bytes)] {
                prop_assert!(sha256_hex(&text).is_none_or(|h| h.len() == 64));
            }
        }
    }
}
