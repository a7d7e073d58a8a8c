//! Client of the Gemini REST API: batches and files. Imports none of its siblings.
//!
//! | file | what it knows |
//! | --- | --- |
//! | `key` | API keys: read, sent, never shown |
//! | `names` | resource names, checked before they enter a URL |
//! | `transport` | one HTTP exchange: headers, timeouts, limits, no redirects, no retries |
//! | `error` | what an answer that is no success means |
//! | `batches`, `files` | the calls |
//! | `results` | lines of a result file |
//!
//! The wire format is Google's v1beta as far as it is known: camelCase, int64 as strings, zero values left
//! out, Operations whose `done` is absent until the end. Everything is read leniently.

mod batches;
mod error;
mod files;
mod key;
mod names;
pub mod results;
#[cfg(test)]
mod tests;
mod transport;

pub use batches::{Batch, BatchState, NewBatch, Page, RemoteStatus, Stats};
pub use error::{Error, Hint, LineError};
pub use files::{CHUNK_BYTES, Download, File, Session, Upload};
pub use key::{ApiKey, ApiKeyError};
pub use names::{BatchName, FileName, ModelName, NameError};
pub use transport::{Client, ClientConfig, ClientConfigError};
