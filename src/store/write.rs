//! Objects that are written: small ones whole, on a condition if that is wanted, and large ones as a stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{
    MultipartUpload, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, UpdateVersion,
};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::error::{self, Error, Kind};
use super::mapped::Draft;
use super::{Backend, Block, Store};

/// Bytes of a part of a stream. All but the last have this size: some stores want them equal, S3 no smaller, and of ten
/// thousand of them at most.
const PART_BYTES: usize = 5 << 20;
/// The largest object that can be written: so many parts, and no more, does S3 put together.
pub const MAX_WRITTEN_BYTES: u64 = 10_000 * PART_BYTES as u64;
/// Parts on their way at the same time, beside the one that is being filled.
const PARTS_AT_ONCE: usize = 2;
/// After each try in vain to take parts back.
const TAKE_BACK_PAUSES: [Duration; 3] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30)];

/// What was seen of an object, to be sure that it is still the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    tag: Option<String>,
    number: Option<String>,
}

/// What must be there before an object is written.
#[derive(Clone, Copy, Debug)]
pub enum Expect<'a> {
    /// Nothing.
    Absent,
    /// What was seen.
    Same(&'a Version),
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is written.
    Done,
    /// Something else is there: nothing was written.
    Occupied,
}

impl Store {
    /// A small object, whole; `None` if there is none. One of more than `limit` bytes is an error.
    pub async fn fetch(&self, path: &Path, limit: u64) -> Result<Option<(Bytes, Version)>, Error> {
        let too_large =
            || Error::new(Kind::TooLarge, format!("{} has more than {limit} bytes", self.uri(path)));
        match &self.backend {
            Backend::Remote(store) => {
                let got = match self.in_time(store.get(path)).await? {
                    Ok(got) => got,
                    Err(e) if error::is_absent(&e) => return Ok(None),
                    Err(e) => return Err(self.error(&e, path)),
                };
                if got.meta.size > limit {
                    return Err(too_large());
                }
                let version = Version { tag: got.meta.e_tag.clone(), number: got.meta.version.clone() };
                let bytes = self.in_time(got.bytes()).await?.map_err(|e| self.error(&e, path))?;
                Ok(Some((bytes, version)))
            }
            Backend::Mapped(directory) => match directory.fetch(path, limit).await {
                Ok(Some((bytes, version))) => Ok(Some((bytes, Version { tag: Some(version), number: None }))),
                Ok(None) => Err(too_large()),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(self.mapped_error(&e, path)),
            },
        }
    }

    /// Writes a small object. A store that knows no conditions is asked first and then told, which leaves a moment for
    /// others.
    pub async fn put(&self, path: &Path, content: Bytes, expect: Expect<'_>) -> Result<Put, Error> {
        let store = match &self.backend {
            Backend::Remote(store) => store,
            Backend::Mapped(directory) => {
                let expected = match expect {
                    Expect::Absent => None,
                    Expect::Same(version) => Some(version.tag.clone().unwrap_or_default()),
                };
                let put = directory.put(path, content, expected).await;
                return put
                    .map(|done| if done { Put::Done } else { Put::Occupied })
                    .map_err(|e| self.mapped_error(&e, path));
            }
        };
        let mode = match expect {
            Expect::Absent => PutMode::Create,
            Expect::Same(version) => {
                PutMode::Update(UpdateVersion { e_tag: version.tag.clone(), version: version.number.clone() })
            }
        };
        let payload = PutPayload::from(content);
        let put = self.in_time(store.put_opts(path, payload.clone(), PutOptions::from(mode))).await?;
        match put {
            Ok(_) => Ok(Put::Done),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. }
                | object_store::Error::NotModified { .. },
            ) => Ok(Put::Occupied),
            // It was to be replaced, and is gone.
            Err(e) if matches!(expect, Expect::Same(_)) && error::is_absent(&e) => Ok(Put::Occupied),
            Err(e) if error::knows_no_conditions(&e) => {
                let there = self.fetch(path, u64::MAX).await?.map(|(_, version)| version);
                if there.as_ref() != expected_version(expect) {
                    return Ok(Put::Occupied);
                }
                let put = self.in_time(store.put(path, payload)).await?;
                put.map(|_| Put::Done).map_err(|e| self.error(&e, path))
            }
            Err(e) => Err(self.error(&e, path)),
        }
    }

    /// Deletes an object, if it is there.
    pub async fn delete(&self, path: &Path) -> Result<(), Error> {
        match &self.backend {
            Backend::Remote(store) => match self.in_time(store.delete(path)).await? {
                Err(e) if !error::is_absent(&e) => Err(self.error(&e, path)),
                _ => Ok(()),
            },
            Backend::Mapped(directory) => match directory.delete(path).await {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.mapped_error(&e, path)),
                _ => Ok(()),
            },
        }
    }

    /// Begins to write an object. Nobody sees it before [`Writer::finish`].
    #[must_use]
    pub fn write(&self, path: &Path) -> Writer<'_> {
        Writer { store: self, path: path.clone(), buffer: None, size: 0, to: To::Nowhere }
    }
}

fn expected_version(expect: Expect<'_>) -> Option<&Version> {
    match expect {
        Expect::Absent => None,
        Expect::Same(version) => Some(version),
    }
}

/// An object that is being written as a stream. What was sent is taken back if it is dropped before its end.
pub struct Writer<'a> {
    store: &'a Store,
    path: Path,
    /// Less than a part.
    buffer: Option<Block>,
    size: u64,
    to: To,
}

enum To {
    /// It may be small.
    Nowhere,
    Parts(Parts),
    File(Draft),
}

impl Writer<'_> {
    /// Bytes held in memory, apart from parts that are on their way.
    #[must_use]
    pub fn held(&self) -> usize {
        self.buffer.as_ref().map_or(0, Block::len)
    }

    /// Adds bytes; waits while enough are on their way.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let buffer = self.buffer.get_or_insert_with(|| Block::new(PART_BYTES));
            bytes = buffer.push(bytes);
            if buffer.is_full()
                && let Some(part) = self.buffer.take()
            {
                self.part(part.freeze()).await?;
            }
        }
        Ok(())
    }

    async fn part(&mut self, part: Bytes) -> Result<(), Error> {
        let Self { store, path, .. } = self;
        self.size += part.len() as u64;
        if matches!(self.to, To::Nowhere) {
            self.to = match &store.backend {
                Backend::Remote(remote) => {
                    let upload = store.in_time(begin(Arc::clone(remote), path.clone())).await?;
                    To::Parts(Parts::new(upload.map_err(|e| store.error(&e, path))?))
                }
                Backend::Mapped(directory) => {
                    To::File(directory.draft(path).await.map_err(|e| store.mapped_error(&e, path))?)
                }
            };
        }
        match &mut self.to {
            To::Parts(parts) => parts.put(part).await.map_err(|e| store.error(&e, path)),
            To::File(draft) => draft.write(part).await.map_err(|e| store.mapped_error(&e, path)),
            To::Nowhere => Ok(()),
        }
    }

    /// All bytes are there: now it is an object. Its size.
    pub async fn finish(mut self) -> Result<u64, Error> {
        let rest = self.buffer.take().map(Block::freeze).unwrap_or_default();
        let is_small = matches!(self.to, To::Nowhere);
        if let (true, Backend::Remote(remote)) = (is_small, &self.store.backend) {
            let size = rest.len() as u64;
            let put = self.store.in_time(remote.put(&self.path, rest.into())).await?;
            return put.map(|_| size).map_err(|e| self.store.error(&e, &self.path));
        }
        if is_small || !rest.is_empty() {
            self.part(rest).await?;
        }
        let to = std::mem::replace(&mut self.to, To::Nowhere);
        let Self { store, path, .. } = &self;
        match to {
            To::Parts(parts) => parts.finish().await.map_err(|e| store.error(&e, path))?,
            To::File(draft) => draft.finish().await.map_err(|e| store.mapped_error(&e, path))?,
            To::Nowhere => {}
        }
        Ok(self.size)
    }

    /// Takes back what was sent, and waits until that is done.
    pub async fn abort(mut self) {
        if let To::Parts(parts) = std::mem::replace(&mut self.to, To::Nowhere) {
            parts.abort().await;
        }
    }
}

/// Parts of an object: paid for, unseen, until they are put together or taken back.
struct Parts {
    upload: Option<Box<dyn MultipartUpload>>,
    under_way: JoinSet<object_store::Result<()>>,
}

impl Parts {
    fn new(upload: Box<dyn MultipartUpload>) -> Self {
        Self { upload: Some(upload), under_way: JoinSet::new() }
    }

    async fn put(&mut self, part: Bytes) -> object_store::Result<()> {
        while self.under_way.len() >= PARTS_AT_ONCE {
            self.arrived().await?;
        }
        if let Some(upload) = &mut self.upload {
            self.under_way.spawn(upload.put_part(part.into()));
        }
        Ok(())
    }

    async fn arrived(&mut self) -> object_store::Result<()> {
        match self.under_way.join_next().await {
            Some(Ok(part)) => part,
            Some(Err(source)) => Err(object_store::Error::JoinError { source }),
            None => Ok(()),
        }
    }

    async fn finish(mut self) -> object_store::Result<()> {
        while !self.under_way.is_empty() {
            self.arrived().await?;
        }
        let Some(upload) = &mut self.upload else { return Ok(()) };
        upload.complete().await?;
        self.upload = None;
        Ok(())
    }

    async fn abort(mut self) {
        if let Some(upload) = self.upload.take() {
            self.under_way.shutdown().await;
            take_back(upload).await;
        }
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.under_way.abort_all();
        // Without a runtime the process ends; a rule of the bucket takes back what is left.
        if let (Some(upload), Ok(runtime)) = (self.upload.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(take_back(upload));
        }
    }
}

/// Begins an upload. If nobody waits for the answer any more when it comes, it is taken back: nobody else would know of it.
async fn begin(store: Arc<dyn ObjectStore>, path: Path) -> object_store::Result<Box<dyn MultipartUpload>> {
    let (answer, answered) = oneshot::channel();
    let asking = tokio::spawn(async move {
        if let Err(Ok(upload)) = answer.send(store.put_multipart(&path).await) {
            take_back(upload).await;
        }
    });
    match answered.await {
        Ok(upload) => upload,
        // It ended without an answer.
        Err(_) => match asking.await {
            Err(source) => Err(object_store::Error::JoinError { source }),
            Ok(()) => std::future::pending().await,
        },
    }
}

async fn take_back(mut upload: Box<dyn MultipartUpload>) {
    for pause in TAKE_BACK_PAUSES {
        if upload.abort().await.is_ok() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
    tracing::warn!("parts of an object that was given up could not be deleted: see the bucket's rules");
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::super::{Purpose, Timeouts};
    use super::*;

    #[tokio::test]
    async fn what_is_written_in_pieces_is_put_together_in_order() {
        let memory = Arc::new(InMemory::new());
        let store = Store {
            backend: Backend::Remote(Arc::clone(&memory) as Arc<dyn ObjectStore>),
            host: "memory".to_owned(),
            timeouts: Timeouts::default(),
            root: "memory://".to_owned(),
            field: "spec.output.objectStore".to_owned(),
            purpose: Purpose::Write,
        };
        let path = Path::from("large");
        let piece: Vec<u8> = (0..=u8::MAX).cycle().take(300_001).collect();
        let mut writer = store.write(&path);
        for _ in 0..50 {
            writer.write(&piece).await.unwrap();
            assert!(writer.held() <= PART_BYTES, "{}", writer.held());
        }
        assert_eq!(writer.finish().await.unwrap(), 50 * 300_001);
        let content = memory.get(&path).await.unwrap().bytes().await.unwrap();
        assert!(content == piece.repeat(50), "all of it, in order");
    }
}
