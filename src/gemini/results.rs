//! Lines of a result file, in all the shapes that Google was seen to write.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use memchr::memchr;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::batches::int64;

/// A longer line is not held in memory; it counts as unreadable.
pub const MAX_LINE_BYTES: usize = 32 << 20;

/// A line.
#[derive(Clone, Debug)]
pub struct ResultLine<'a> {
    /// The key of the request it answers.
    pub key: Option<Cow<'a, str>>,
    /// What came of it.
    pub outcome: Outcome<'a>,
    /// What it cost.
    pub usage: Usage,
}

/// What came of a request. A blocked prompt is a response, and so is an answer that was cut off.
#[derive(Clone, Debug)]
pub enum Outcome<'a> {
    /// The response, as it came.
    Response(&'a RawValue),
    /// An error; `message` may quote the request.
    Error {
        /// `google.rpc.Code`.
        code: Option<i32>,
        /// In Google's words.
        message: Option<String>,
    },
}

/// Tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: i64,
    /// Of the answer, thoughts included.
    pub output: i64,
    /// Of both.
    pub total: i64,
}

impl Usage {
    /// Adds what another line cost.
    pub fn add(&mut self, other: &Self) {
        self.prompt = self.prompt.saturating_add(other.prompt);
        self.output = self.output.saturating_add(other.output);
        self.total = self.total.saturating_add(other.total);
    }
}

/// A line that is none of the known shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a line of a result file")]
pub struct Malformed;

impl<'a> ResultLine<'a> {
    /// Reads a line.
    pub fn parse(line: &'a str) -> Result<Self, Malformed> {
        #[derive(Deserialize)]
        struct Line<'a> {
            #[serde(borrow, default)]
            key: Option<Cow<'a, str>>,
            #[serde(borrow, default)]
            response: Option<&'a RawValue>,
            #[serde(default)]
            error: Option<Value>,
            #[serde(default)]
            status: Option<Value>,
            #[serde(default)]
            metadata: Option<Value>,
        }
        if !line.trim_start().starts_with('{') {
            return Err(Malformed);
        }
        let parsed: Line<'a> = serde_json::from_str(line).map_err(|_| Malformed)?;
        let key = parsed.key.or_else(|| {
            let key = parsed.metadata.as_ref()?.get("key")?.as_str()?.to_owned();
            Some(Cow::Owned(key))
        });
        let failure = parsed.error.filter(|e| !e.is_null()).or(parsed.status.filter(|s| !s.is_null()));
        let (outcome, usage) = match (failure, parsed.response.filter(|r| r.get().starts_with('{'))) {
            (None, Some(response)) => (Outcome::Response(response), usage_of(response)),
            (Some(Value::Object(error)), _) => {
                let code = error.get("code").and_then(int64).and_then(|c| i32::try_from(c).ok());
                let message = error.get("message").and_then(Value::as_str).map(ToOwned::to_owned);
                (Outcome::Error { code, message }, Usage::default())
            }
            (Some(Value::String(text)), _) => {
                (Outcome::Error { code: None, message: Some(text) }, Usage::default())
            }
            _ => return Err(Malformed),
        };
        Ok(Self { key, outcome, usage })
    }
}

fn usage_of(response: &RawValue) -> Usage {
    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct Response {
        usage_metadata: Value,
        token_count: Value,
    }
    let response: Response = serde_json::from_str(response.get()).unwrap_or_default();
    let count = |field: &str| int64(&response.usage_metadata[field]).unwrap_or(0).max(0);
    // Older embeddings say `tokenCount`.
    let prompt = count("promptTokenCount").max(int64(&response.token_count).unwrap_or(0));
    let answered = count("candidatesTokenCount").saturating_add(count("thoughtsTokenCount"));
    let total = match count("totalTokenCount") {
        0 => prompt.saturating_add(answered),
        total => total,
    };
    // What is neither prompt nor named otherwise was produced by the model.
    Usage {
        prompt,
        output: answered.max(total.saturating_sub(prompt).min(total)).min(total.max(answered)),
        total,
    }
}

/// A line with its line break.
#[derive(Debug)]
pub struct RawLine {
    bytes: Bytes,
    cut: bool,
}

impl RawLine {
    /// All of it.
    #[must_use]
    pub fn with_break(&self) -> &[u8] {
        &self.bytes
    }

    /// Without its line break.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        let line = self.bytes.strip_suffix(b"\n").unwrap_or(&self.bytes);
        line.strip_suffix(b"\r").unwrap_or(line)
    }

    /// Whether it is only a piece of a line that is too long.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Whether its line ends with it. The last piece of a file need not say so.
    #[must_use]
    pub fn ends(&self) -> bool {
        self.bytes.ends_with(b"\n")
    }

    /// As text, if it is complete and is text.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        if self.cut { None } else { std::str::from_utf8(self.content()).ok() }
    }
}

/// Splits a stream into lines, of which one is in memory.
pub struct Lines<S> {
    stream: S,
    buffer: BytesMut,
    ended: bool,
    limit: usize,
    /// The beginning of the present line was given out already, because it is too long.
    in_long_line: bool,
}

impl<S, E> Lines<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    /// Lines of at most [`MAX_LINE_BYTES`].
    pub fn new(stream: S) -> Self {
        Self::with_limit(stream, MAX_LINE_BYTES)
    }

    /// Lines of at most `limit` bytes; a longer one comes in pieces without text.
    pub fn with_limit(stream: S, limit: usize) -> Self {
        Self { stream, buffer: BytesMut::new(), ended: false, limit, in_long_line: false }
    }

    /// The next line; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<RawLine>, E> {
        let mut searched = 0;
        loop {
            if let Some(at) = memchr(b'\n', &self.buffer[searched..]) {
                let bytes = self.buffer.split_to(searched + at + 1).freeze();
                let cut = std::mem::take(&mut self.in_long_line);
                return Ok(Some(RawLine { bytes, cut }));
            }
            searched = self.buffer.len();
            if searched > self.limit {
                self.in_long_line = true;
                return Ok(Some(RawLine { bytes: self.buffer.split().freeze(), cut: true }));
            }
            if self.ended {
                let cut = std::mem::take(&mut self.in_long_line);
                return Ok((searched > 0).then(|| RawLine { bytes: self.buffer.split().freeze(), cut }));
            }
            match self.stream.next().await {
                Some(chunk) => self.buffer.extend_from_slice(&chunk?),
                None => self.ended = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Error;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_shapes_of_the_contract() {
        let line = |text| ResultLine::parse(text).unwrap();
        let ok = line(
            r#"{"response":{"candidates":[],"usageMetadata":{"promptTokenCount":3,"candidatesTokenCount":"4","thoughtsTokenCount":2,"totalTokenCount":9}},"key":"k1"}"#,
        );
        assert_eq!(ok.key.as_deref(), Some("k1"));
        assert!(matches!(ok.outcome, Outcome::Response(r) if r.get().starts_with("{\"candidates\"")));
        assert_eq!(ok.usage, Usage { prompt: 3, output: 6, total: 9 });

        let failed = line(r#"{"error":{"code":3,"message":"m"},"key":"k2"}"#);
        assert!(matches!(failed.outcome, Outcome::Error { code: Some(3), message: Some(m) } if m == "m"));
        let bare = line(r#"{"error":{"code":13},"key":"k2"}"#);
        assert!(matches!(bare.outcome, Outcome::Error { code: Some(13), message: None }));
        let old = line(r#"{"status":"Bad Request: {}","key":"k3"}"#);
        assert!(matches!(old.outcome, Outcome::Error { code: None, message: Some(_) }));
        let embedding = line(r#"{"response":{"tokenCount":"1","embedding":{"values":[0.1]}},"key":"k4"}"#);
        assert_eq!(embedding.usage, Usage { prompt: 1, output: 0, total: 1 });
        let blocked = line(r#"{"response":{"promptFeedback":{"blockReason":"SAFETY"}},"key":"k5"}"#);
        assert!(matches!(blocked.outcome, Outcome::Response(_)));
        assert!(line(r#"{"response":{}}"#).key.is_none());
    }

    #[test]
    fn other_things_are_malformed() {
        for text in [
            "",
            "[]",
            "7",
            "{}",
            "{\"key\":\"k\"}",
            "{\"key\":7,\"response\":{}}",
            "{\"response\":\"x\"}",
            "{",
        ] {
            assert!(ResultLine::parse(text).is_err(), "{text}");
        }
    }

    async fn split(chunks: Vec<Vec<u8>>, limit: usize) -> Vec<(Vec<u8>, bool)> {
        let stream = futures::stream::iter(chunks.into_iter().map(|c| Ok::<_, Error>(Bytes::from(c))));
        let mut lines = Lines::with_limit(stream, limit);
        let mut all = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            all.push((line.with_break().to_vec(), line.text().is_some()));
        }
        all
    }

    #[tokio::test]
    async fn a_line_over_the_limit_comes_in_pieces_without_text() {
        let lines = split(vec![b"aaaaaa".to_vec(), b"aa\nb\n".to_vec()], 4).await;
        assert_eq!(lines, [(b"aaaaaa".to_vec(), false), (b"aa\n".to_vec(), false), (b"b\n".to_vec(), true)]);
    }

    proptest! {
        #[test]
        fn any_line_is_survived(text in "\\PC{0,60}") {
            let _ = ResultLine::parse(&text);
        }

        #[test]
        fn no_token_count_is_negative(p in any::<i64>(), c in any::<i64>(), t in any::<i64>()) {
            let text = format!(r#"{{"response":{{"usageMetadata":{{"promptTokenCount":{p},"candidatesTokenCount":{c},"totalTokenCount":{t}}}}}}}"#);
            let usage = ResultLine::parse(&text).unwrap().usage;
            prop_assert!(usage.prompt >= 0 && usage.output >= 0 && usage.total >= 0);
        }

        /// However the bytes are cut into chunks, the lines are the same, and no byte is lost.
        #[test]
        fn chunks_do_not_matter(content in "[a\n]{0,40}", cuts in prop::collection::vec(0usize..40, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(content.len())).collect();
            cuts.push(content.len());
            cuts.sort_unstable();
            let mut chunks = Vec::new();
            let mut from = 0;
            for cut in cuts {
                chunks.push(content.as_bytes()[from..cut].to_vec());
                from = cut;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let lines = runtime.block_on(split(chunks, 1000));
            prop_assert_eq!(lines.iter().flat_map(|(l, _)| l.clone()).collect::<Vec<u8>>(), content.as_bytes());
            let expected = content.split_inclusive('\n').count();
            prop_assert_eq!(lines.len(), expected);
        }
    }
}
