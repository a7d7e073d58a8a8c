//! Objects in stores that are not Kubernetes: S3, Cloud Storage, Blob Storage, and directories that an administrator
//! mapped. Imports none of its siblings.
//!
//! | file | what it knows |
//! | --- | --- |
//! | `location` | what a URI names, and which URIs are refused |
//! | `secret` | credentials as they stand in a Secret |
//! | `endpoint` | which custom endpoints an administrator allowed, and which addresses are never talked to |
//! | `http` | one HTTP client for all stores: timeouts, no redirects, no proxies |
//! | `mapped` | directories, opened without following links |
//! | `read` | an object as a stream that goes on where it broke off |
//! | `write` | objects that are written, on a condition or as a stream |
//! | `block` | buffers whose memory goes back to the system |
//! | `error` | what an answer that is no success means |
//!
//! What is said of an error holds no text of a store's answer: it may quote a key.

mod block;
mod endpoint;
mod error;
mod http;
mod location;
mod mapped;
mod read;
mod secret;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{BackoffConfig, ObjectStore, ObjectStoreExt as _, RetryConfig};

pub use block::Block;
pub use endpoint::{EndpointError, Endpoints};
pub use error::{Error, Kind, Purpose};
pub use location::{Location, Scheme};
pub use read::{ByteStream, Reader};
pub use secret::{Credentials, SecretData};
pub use write::{Expect, MAX_WRITTEN_BYTES, Put, Version, Writer};

use endpoint::Trust;
use http::Connector;
use mapped::MappedDirectory;

/// Patience with a store.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Until a connection is there.
    pub connect: Duration,
    /// For an exchange without a byte moving.
    pub idle: Duration,
    /// Before a stream that broke off goes on: doubled each time.
    pub resume: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_mins(1),
            resume: Duration::from_millis(250),
        }
    }
}

/// What an administrator decided about stores.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Custom endpoints that jobs may name.
    pub endpoints: Endpoints,
    /// Namespaces whose jobs may use the pod's own identity; `*` stands for all.
    pub own_identity: BTreeSet<String>,
    /// Directories by the name that `file://NAME/` has.
    pub mapped: BTreeMap<String, PathBuf>,
    /// The same for those that may be written to.
    pub mapped_for_output: BTreeMap<String, PathBuf>,
    /// Patience.
    pub timeouts: Timeouts,
}

/// How a job wants to get at a place.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// What for.
    pub purpose: Purpose,
    /// The job's namespace.
    pub namespace: &'a str,
    /// The field of the job that all of this stands in, for messages.
    pub field: &'a str,
    /// Instead of the cloud's own.
    pub endpoint: Option<&'a str>,
    /// Of S3.
    pub region: Option<&'a str>,
    /// Name of the Secret, and what is in it; without it the pod's own identity is wanted.
    pub secret: Option<(&'a str, &'a SecretData)>,
}

/// Opens stores. Holds no credentials: each is opened with its own.
#[derive(Debug)]
pub struct Stores {
    settings: Settings,
    /// For the clouds themselves, and for endpoints that an administrator named.
    trusting: Connector,
    /// For endpoints that nobody named: talks to no address of the machine or its cloud.
    wary: Connector,
}

impl Stores {
    /// Nothing is connected to yet.
    pub fn new(settings: Settings) -> Result<Self, Error> {
        let trusting = Connector::new(&settings.timeouts, Trust::Named)?;
        let wary = Connector::new(&settings.timeouts, Trust::Any)?;
        Ok(Self { settings, trusting, wary })
    }

    /// Whether the pod's own identity may be used for jobs of that namespace.
    fn lends_identity(&self, namespace: &str) -> bool {
        self.settings.own_identity.contains("*") || self.settings.own_identity.contains(namespace)
    }

    /// The store that holds `at`. Nothing is asked of it yet.
    pub fn open(&self, at: &Location, access: &Access<'_>) -> Result<Store, Error> {
        let field = access.field;
        if access.region.is_some() && at.scheme != Scheme::S3 {
            return Err(Error::new(Kind::Invalid, format!("{field}.region is for s3:// only: leave it out")));
        }
        let backend = if at.scheme == Scheme::File {
            self.open_mapped(at, access)?
        } else {
            Backend::Remote(self.open_remote(at, access)?)
        };
        Ok(Store {
            backend,
            host: host(at, access),
            timeouts: self.settings.timeouts,
            root: at.root(),
            field: field.to_owned(),
            purpose: access.purpose,
        })
    }

    fn open_mapped(&self, at: &Location, access: &Access<'_>) -> Result<Backend, Error> {
        let field = access.field;
        if access.secret.is_some() || access.endpoint.is_some() {
            return Err(Error::new(
                Kind::Invalid,
                format!("file:// takes neither {field}.credentialsRef nor {field}.endpoint: leave them out"),
            ));
        }
        let (directories, what, flag) = match access.purpose {
            Purpose::Read => (&self.settings.mapped, "", "--mapped-directories"),
            Purpose::Write => {
                (&self.settings.mapped_for_output, " for results", "--mapped-output-directories")
            }
        };
        let Some(directory) = directories.get(&at.bucket) else {
            return Err(Error::new(
                Kind::NotAllowed,
                format!(
                    "{at} names a directory that no administrator mapped{what}: ask for {} among those of {flag}, or \
                     use s3://, gs:// or az://",
                    at.bucket
                ),
            ));
        };
        Ok(Backend::Mapped(MappedDirectory::new(directory.clone())))
    }

    fn open_remote(&self, at: &Location, access: &Access<'_>) -> Result<Arc<dyn ObjectStore>, Error> {
        let field = access.field;
        let trust = match access.endpoint {
            Some(endpoint) => Some(self.settings.endpoints.judge(endpoint, field)?),
            None => None,
        };
        let credentials = match access.secret {
            Some((name, data)) => Some(Credentials::read(at.scheme, name, data)?),
            None if access.endpoint.is_some() => {
                return Err(Error::new(
                    Kind::NotAllowed,
                    format!(
                        "{field}.endpoint needs {field}.credentialsRef: the pod's own identity is not shown to a custom \
                         endpoint"
                    ),
                ));
            }
            None if self.lends_identity(access.namespace) => None,
            None => {
                return Err(Error::new(
                    Kind::NotAllowed,
                    format!(
                        "{field}.credentialsRef is missing, and this namespace may not use the operator's own identity. \
                         Name a Secret there, or ask the administrator to add {} to the namespaces that may \
                         (--own-identity-namespaces)",
                        access.namespace
                    ),
                ));
            }
        };
        let connector = match trust {
            Some(Trust::Any) => self.wary.clone(),
            Some(Trust::Named) | None => self.trusting.clone(),
        };
        let invalid = |e: object_store::Error| error::of_settings(&e, access.secret.map(|(name, _)| name));
        Ok(match at.scheme {
            Scheme::S3 => {
                // What the pod's environment says is for the pod's own identity alone.
                let mut builder = match &credentials {
                    None => AmazonS3Builder::from_env(),
                    Some(Credentials::S3(keys)) => keys.apply(AmazonS3Builder::new()),
                    Some(_) => AmazonS3Builder::new(),
                };
                if let Some(region) = access.region {
                    location::check_region(region, field)?;
                    builder = builder.with_region(region);
                }
                if let Some(endpoint) = access.endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                Arc::new(
                    builder
                        .with_bucket_name(&at.bucket)
                        .with_retry(retries())
                        .with_http_connector(connector)
                        .build()
                        .map_err(invalid)?,
                )
            }
            Scheme::Gs => {
                let mut builder = match &credentials {
                    None => GoogleCloudStorageBuilder::from_env(),
                    Some(Credentials::Gs(key)) => {
                        key.apply(GoogleCloudStorageBuilder::new(), access.endpoint.is_some())?
                    }
                    Some(_) => GoogleCloudStorageBuilder::new(),
                };
                if let Some(endpoint) = access.endpoint {
                    builder = builder.with_base_url(endpoint.trim_end_matches('/'));
                }
                Arc::new(
                    builder
                        .with_bucket_name(&at.bucket)
                        .with_retry(retries())
                        .with_http_connector(connector)
                        .build()
                        .map_err(invalid)?,
                )
            }
            Scheme::Az => {
                let mut builder = match &credentials {
                    None => MicrosoftAzureBuilder::from_env(),
                    Some(Credentials::Az(keys)) => keys.apply(MicrosoftAzureBuilder::new()),
                    Some(_) => MicrosoftAzureBuilder::new(),
                };
                if let Some(endpoint) = access.endpoint {
                    builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
                }
                Arc::new(
                    builder
                        .with_account(at.account.clone().unwrap_or_default())
                        .with_container_name(&at.bucket)
                        .with_retry(retries())
                        .with_http_connector(connector)
                        .build()
                        .map_err(invalid)?,
                )
            }
            Scheme::File => return Err(Error::new(Kind::Invalid, "file:// is no remote store")),
        })
    }
}

/// What does not answer, if it does not.
fn host(at: &Location, access: &Access<'_>) -> String {
    match (access.endpoint, at.scheme) {
        (Some(endpoint), _) => format!("the store at {endpoint}"),
        (None, Scheme::S3) => "S3".to_owned(),
        (None, Scheme::Gs) => "Cloud Storage".to_owned(),
        (None, Scheme::Az) => "Blob Storage".to_owned(),
        (None, Scheme::File) => format!("the directory {}", at.bucket),
    }
}

/// What passes at once is not worth a word. What does not is for [`Reader`] and the controller.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(1),
            base: 2.,
        },
        max_retries: 2,
        retry_timeout: Duration::from_secs(30),
    }
}

/// An object as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its name in the bucket.
    pub path: Path,
    /// Its size in bytes.
    pub size: u64,
    /// Changes whenever the object does. But a store may give another one in a listing than with the object itself.
    pub version: String,
}

/// One bucket, container or mapped directory.
#[derive(Debug)]
pub struct Store {
    backend: Backend,
    host: String,
    timeouts: Timeouts,
    /// `s3://BUCKET/` and so on, before a name to make a URI.
    root: String,
    field: String,
    purpose: Purpose,
}

#[derive(Debug)]
enum Backend {
    Remote(Arc<dyn ObjectStore>),
    Mapped(MappedDirectory),
}

impl Store {
    /// The URI of an object in it.
    #[must_use]
    pub fn uri(&self, path: &Path) -> String {
        format!("{}{path}", self.root)
    }

    fn error(&self, e: &object_store::Error, path: &Path) -> Error {
        error::of(e, &self.host, &self.uri(path), &self.field, self.purpose)
    }

    /// One object as it is now.
    pub async fn head(&self, path: &Path) -> Result<Object, Error> {
        match &self.backend {
            Backend::Remote(store) => match self.in_time(store.head(path)).await? {
                Ok(meta) => Ok(object(meta)),
                // The answer to HEAD has no body, so it does not say what is wrong.
                Err(e) => match self.in_time(store.get(path)).await? {
                    Ok(got) => Ok(object(got.meta)),
                    Err(again @ object_store::Error::Generic { .. }) => Err(self.error(&again, path)),
                    Err(again) if error::says_more(&again) => Err(self.error(&again, path)),
                    Err(_) => Err(self.error(&e, path)),
                },
            },
            Backend::Mapped(directory) => directory.head(path).await.map_err(|e| self.mapped_error(&e, path)),
        }
    }

    /// The objects whose names begin with `prefix/`, in name order; all of the bucket, if it is the root. Empty ones are
    /// left out: folders are such, and markers.
    pub async fn list(&self, prefix: &Path, most: usize) -> Result<Vec<Object>, Error> {
        let mut found = match &self.backend {
            Backend::Remote(store) => {
                let mut stream = store.list((!prefix.is_root()).then_some(prefix));
                let mut found = Vec::new();
                while let Some(meta) =
                    self.in_time(stream.try_next()).await?.map_err(|e| self.error(&e, prefix))?
                {
                    found.push(object(meta));
                    if found.len() > most {
                        break;
                    }
                }
                found
            }
            Backend::Mapped(directory) => {
                directory.list(prefix, most).await.map_err(|e| self.mapped_error(&e, prefix))?
            }
        };
        if found.len() > most {
            return Err(Error::new(
                Kind::TooLarge,
                format!(
                    "{}/ holds more than {most} objects: put them into fewer, or name a narrower prefix",
                    self.uri(prefix)
                ),
            ));
        }
        found.retain(|object| object.size > 0);
        found.sort_by(|a, b| a.path.as_ref().cmp(b.path.as_ref()));
        Ok(found)
    }

    /// The object from that byte on, and the version that it has.
    async fn stream(&self, object: &Object, from: u64) -> Result<(String, ByteStream), Error> {
        match &self.backend {
            Backend::Remote(store) => {
                let options = object_store::GetOptions {
                    range: (from > 0).then_some(object_store::GetRange::Offset(from)),
                    ..object_store::GetOptions::default()
                };
                let got = self
                    .in_time(store.get_opts(&object.path, options))
                    .await?
                    .map_err(|e| self.error(&e, &object.path))?;
                let now = self::object(got.meta.clone());
                if now.size != object.size {
                    return Err(self.changed(&object.path));
                }
                let (host, uri, field) = (self.host.clone(), self.uri(&object.path), self.field.clone());
                let purpose = self.purpose;
                let stream = got.into_stream().map_err(move |e| error::of(&e, &host, &uri, &field, purpose));
                Ok((now.version, Box::pin(stream)))
            }
            Backend::Mapped(directory) => {
                let (now, stream) = directory
                    .read(&object.path, from)
                    .await
                    .map_err(|e| self.mapped_error(&e, &object.path))?;
                if now.size != object.size {
                    return Err(self.changed(&object.path));
                }
                let uri = self.uri(&object.path);
                let purpose = self.purpose;
                Ok((now.version, Box::pin(stream.map_err(move |e| mapped::error(&e, &uri, purpose)))))
            }
        }
    }

    fn changed(&self, path: &Path) -> Error {
        Error::new(Kind::Changed, format!("{} was changed while it was read", self.uri(path)))
    }

    fn mapped_error(&self, e: &std::io::Error, path: &Path) -> Error {
        mapped::error(e, &self.uri(path), self.purpose)
    }

    /// Nothing waits for ever, whatever a store or its client does.
    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Error> {
        tokio::time::timeout(self.timeouts.idle, work).await.map_err(|_| {
            Error::new(Kind::Unavailable, format!("{} does not answer in time; it is tried again", self.host))
        })
    }
}

fn object(meta: object_store::ObjectMeta) -> Object {
    // The time for those that give no tag.
    let version = match (meta.version, meta.e_tag) {
        (_, Some(tag)) => tag,
        (Some(version), None) => version,
        (None, None) => meta.last_modified.timestamp_micros().to_string(),
    };
    Object { path: meta.location, size: meta.size, version }
}
