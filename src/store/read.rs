//! An object as a stream of bytes that goes on where it broke off.

use std::pin::Pin;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};

use super::error::{Error, Kind};
use super::{Object, Store};

/// Bytes as they come.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>;

/// Breaks without a byte in between, after which it is given up.
const MAX_BREAKS: u32 = 4;

/// Reads one object, and all of it is of one version: an error says so if it changed meanwhile.
pub struct Reader<'a> {
    store: &'a Store,
    object: &'a Object,
    at: u64,
    end: u64,
    stream: Option<ByteStream>,
    version: Option<String>,
    breaks: u32,
}

impl Store {
    /// Reads the object to its end.
    #[must_use]
    pub fn read<'a>(&'a self, object: &'a Object) -> Reader<'a> {
        self.read_part(object, 0, object.size)
    }

    /// Reads the object from byte `from` to byte `to`, which is not read any more.
    #[must_use]
    pub fn read_part<'a>(&'a self, object: &'a Object, from: u64, to: u64) -> Reader<'a> {
        Reader {
            store: self,
            object,
            at: from,
            end: to.min(object.size),
            stream: None,
            version: None,
            breaks: 0,
        }
    }
}

impl Reader<'_> {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while self.at < self.end {
            match self.step().await {
                Ok(mut bytes) => {
                    self.at += bytes.len() as u64;
                    if self.at > self.object.size {
                        return Err(self.store.changed(&self.object.path));
                    }
                    let beyond = usize::try_from(self.at.saturating_sub(self.end)).unwrap_or(usize::MAX);
                    bytes.truncate(bytes.len().saturating_sub(beyond));
                    if !bytes.is_empty() {
                        self.breaks = 0;
                        return Ok(Some(bytes));
                    }
                }
                Err(e) if e.kind == Kind::Unavailable && self.breaks < MAX_BREAKS => {
                    self.stream = None;
                    tokio::time::sleep(self.store.timeouts.resume * 2u32.pow(self.breaks)).await;
                    self.breaks += 1;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    async fn step(&mut self) -> Result<Bytes, Error> {
        if self.stream.is_none() {
            let (version, stream) = self.store.stream(self.object, self.at).await?;
            if self.version.as_ref().is_some_and(|before| *before != version) {
                return Err(self.store.changed(&self.object.path));
            }
            self.version = Some(version);
            self.stream = Some(stream);
        }
        let Some(stream) = &mut self.stream else { return Ok(Bytes::new()) };
        match self.store.in_time(stream.next()).await? {
            Some(bytes) => bytes,
            // Shorter than it was said to be: a connection that was closed in order, but early.
            None => Err(Error::new(
                Kind::Unavailable,
                format!("{} breaks off before its end; it is tried again", self.store.uri(&self.object.path)),
            )),
        }
    }
}
