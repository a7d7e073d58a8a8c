//! From what the user wrote to the JSON Lines that Gemini gets. Pure: no client required.
//!
//! Gemini refuses a whole file for one bad line, so each line is checked here first. Messages name the
//! line and never quote it: it may hold a prompt.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::identity::hex;
use super::memory::Stored;
use super::request;
use super::shards::plan::Plan;
use super::{InputFacts, Problem};
use crate::api::{InputRequest, Method, Reason};

/// A longer key would not fit into messages and manifests; Google names no limit.
const MAX_KEY_BYTES: usize = 1024;

/// An input that was checked line by line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// What is uploaded: one request a line, no blank lines, a newline at the end.
    pub bytes: Bytes,
    /// SHA-256 of `bytes` in hexadecimal.
    pub sha256: String,
    /// The same of all requests of the job. A further attempt carries only some of them.
    pub whole_sha256: String,
    /// The keys in input order.
    pub keys: Vec<String>,
    /// Where it is split, if it is.
    pub plan: Option<Arc<Plan>>,
}

impl Input {
    /// What a decision needs to know of it.
    #[must_use]
    pub fn facts(&self) -> InputFacts {
        InputFacts {
            sha256: self.sha256.clone(),
            whole_sha256: self.whole_sha256.clone(),
            count: i64::try_from(self.keys.len()).unwrap_or(i64::MAX),
            bytes: i64::try_from(self.bytes.len()).unwrap_or(i64::MAX),
        }
    }

    /// Those requests whose key is not among `answered`.
    #[must_use]
    pub fn without(self, answered: &HashSet<String>) -> Self {
        let mut bytes = Vec::with_capacity(self.bytes.len());
        let mut keys = Vec::new();
        for (key, line) in self.keys.into_iter().zip(self.bytes.split_inclusive(|b| *b == b'\n')) {
            if !answered.contains(&key) {
                bytes.extend_from_slice(line);
                keys.push(key);
            }
        }
        Self {
            sha256: hex(&Sha256::digest(&bytes)),
            bytes: bytes.into(),
            keys,
            whole_sha256: self.whole_sha256,
            plan: self.plan,
        }
    }
}

/// What an attempt carries: here, or where it lies.
#[derive(Debug)]
pub enum Carried {
    /// In memory.
    Whole(Input),
    /// In an object store.
    Stored(Arc<Stored>),
}

impl Carried {
    /// What a decision needs to know of it.
    #[must_use]
    pub fn facts(&self) -> InputFacts {
        match self {
            Self::Whole(input) => input.facts(),
            Self::Stored(stored) => stored.facts.clone(),
        }
    }

    /// Where it is split, if it is.
    #[must_use]
    pub fn plan(&self) -> Option<&Arc<Plan>> {
        match self {
            Self::Whole(input) => input.plan.as_ref(),
            Self::Stored(stored) => stored.plan.as_ref(),
        }
    }
}

/// The requests that stand in the job itself.
pub fn from_requests(requests: &[InputRequest], method: Method, max_bytes: u64) -> Result<Input, Problem> {
    let mut lines = String::new();
    for (index, item) in requests.iter().enumerate() {
        let request = match (&item.prompt, &item.request) {
            (Some(prompt), None) => request::short_form(method, prompt),
            (None, Some(request)) if request.is_object() => request.clone(),
            (None, Some(_)) => {
                return Err(Problem::new(
                    Reason::InputInvalid,
                    format!(
                        "spec.input.requests[{index}] has a request that is not an object: it must be a message \
                         {}, like {}",
                        request::message_name(method),
                        request::example(method)
                    ),
                ));
            }
            _ => {
                return Err(Problem::new(
                    Reason::InputInvalid,
                    format!("spec.input.requests[{index}] needs exactly one of prompt and request"),
                ));
            }
        };
        lines.push_str(&json!({"key": item.key, "request": request}).to_string());
        lines.push('\n');
    }
    from_lines(lines.as_bytes(), "spec.input.requests", method, max_bytes)
}

/// JSON Lines as they stand in `source`, which is how messages call the place.
pub fn from_lines(content: &[u8], source: &str, method: Method, max_bytes: u64) -> Result<Input, Problem> {
    let too_large = |bytes: usize| {
        Problem::new(
            Reason::InputTooLarge,
            format!(
                "{source} holds {bytes} bytes; at most {max_bytes} bytes are allowed: \
                 split the requests over several jobs"
            ),
        )
    };
    if content.len() as u64 > max_bytes {
        return Err(too_large(content.len()));
    }
    let text = std::str::from_utf8(content).map_err(|e| {
        let line = content[..e.valid_up_to()].split(|b| *b == b'\n').count();
        Problem::new(Reason::InputInvalid, format!("{source}: line {line} is not valid UTF-8"))
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);

    let mut bytes = Vec::with_capacity(text.len() + 1);
    let mut keys = Vec::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let key = check_line(line, method).map_err(|what| {
            Problem::new(
                Reason::InputInvalid,
                format!(
                    "{source}: line {number} {what}. Each line must be a JSON object like \
                     {{\"key\": \"…\", \"request\": {}}}",
                    request::example(method)
                ),
            )
        })?;
        if let Some(first) = seen.insert(key.clone(), number) {
            return Err(Problem::new(
                Reason::InputInvalid,
                format!(
                    "{source}: lines {first} and {number} have the same key; keys must be unique, \
                     they join each result with its request"
                ),
            ));
        }
        keys.push(key);
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
    }
    if keys.is_empty() {
        return Err(Problem::new(
            Reason::InputInvalid,
            format!("{source} holds no requests: add at least one line"),
        ));
    }
    // A byte for the last newline may have come on top.
    if bytes.len() as u64 > max_bytes {
        return Err(too_large(bytes.len()));
    }
    let sha256 = hex(&Sha256::digest(&bytes));
    Ok(Input { whole_sha256: sha256.clone(), sha256, bytes: bytes.into(), keys, plan: None })
}

/// The key of one line, or what is wrong with the line.
pub(super) fn check_line(line: &str, method: Method) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Line<'a> {
        key: Option<Value>,
        #[serde(borrow)]
        request: Option<&'a RawValue>,
    }
    let parsed: Line<'_> = serde_json::from_str(line).map_err(|e| match e.classify() {
        serde_json::error::Category::Data => "is not a JSON object with one key and one request".to_owned(),
        _ => format!("is not valid JSON (column {})", e.column()),
    })?;
    if !line.starts_with('{') {
        return Err("is not a JSON object".to_owned()); // serde would take an array for a struct
    }
    let key = match parsed.key {
        Some(Value::String(key)) if key.is_empty() => return Err("has an empty \"key\"".to_owned()),
        Some(Value::String(key)) if key.len() > MAX_KEY_BYTES => {
            return Err(format!("has a \"key\" of more than {MAX_KEY_BYTES} bytes"));
        }
        Some(Value::String(key)) => key,
        Some(_) => return Err("has a \"key\" that is not a string".to_owned()),
        None => return Err("has no \"key\"".to_owned()),
    };
    match parsed.request {
        Some(request) if request.get().starts_with('{') => {
            request::check(method, request).map(|()| key).map_err(ToOwned::to_owned)
        }
        Some(_) => Err("has a \"request\" that is not a JSON object".to_owned()),
        None => Err("has no \"request\"".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: u64 = 1 << 20;
    const GENERATE: Method = Method::GenerateContent;

    fn line(key: &str) -> String {
        json!({"key": key, "request": {"contents": []}}).to_string()
    }

    #[test]
    fn the_short_form_becomes_one_user_turn() {
        let item = InputRequest { key: "a".into(), prompt: Some("Hi".into()), request: None };
        let input = from_requests(&[item], GENERATE, LIMIT).unwrap();
        let sent: Value = serde_json::from_slice(&input.bytes).unwrap();
        assert_eq!(
            sent,
            json!({"key": "a", "request": {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}})
        );
        assert_eq!(input.keys, ["a"]);
    }

    #[test]
    fn a_request_in_the_job_that_is_no_object_is_named() {
        let item = InputRequest { key: "a".into(), prompt: None, request: Some(json!("SECRET")) };
        let message = from_requests(&[item], GENERATE, LIMIT).unwrap_err().message;
        assert!(
            message.starts_with("spec.input.requests[0] has a request that is not an object"),
            "{message}"
        );
        assert!(!message.contains("SECRET") && !message.contains("line"), "{message}");
    }

    #[test]
    fn an_embedding_has_one_content() {
        let item = InputRequest { key: "a".into(), prompt: Some("Hi".into()), request: None };
        let input = from_requests(&[item], Method::EmbedContent, LIMIT).unwrap();
        let sent: Value = serde_json::from_slice(&input.bytes).unwrap();
        assert_eq!(sent, json!({"key": "a", "request": {"content": {"parts": [{"text": "Hi"}]}}}));

        let embedding =
            json!({"key": "b", "request": {"content": {"parts": [{"text": "SECRET"}]}}}).to_string();
        for (line, wrong, right, says) in [
            (line("a"), Method::EmbedContent, GENERATE, "{\"content\": {\"parts\""),
            (embedding, GENERATE, Method::EmbedContent, "set spec.method to EmbedContent"),
        ] {
            assert!(from_lines(line.as_bytes(), "x", right, LIMIT).is_ok());
            let problem = from_lines(line.as_bytes(), "x", wrong, LIMIT).unwrap_err();
            assert_eq!(problem.reason, Reason::InputInvalid);
            assert!(problem.message.starts_with("x: line 1 has a \"request\" with"), "{}", problem.message);
            assert!(problem.message.contains(says), "{}", problem.message);
            assert!(!problem.message.contains("SECRET"), "{}", problem.message);
        }
    }

    #[test]
    fn lines_are_sent_as_they_are_without_blank_ones() {
        let text = format!("\u{feff}{}\r\n\n  {}", line("a"), line("b"));
        let input = from_lines(text.as_bytes(), "x", GENERATE, LIMIT).unwrap();
        assert_eq!(input.bytes, format!("{}\n{}\n", line("a"), line("b")));
        assert_eq!(input.keys, ["a", "b"]);
    }

    #[test]
    fn bad_lines_are_named_and_never_quoted() {
        let secret = "SECRET-PROMPT";
        let cases = [
            (format!("{}\nnot json {secret}", line("a")), "line 2 is not valid JSON"),
            (format!("[\"{secret}\", {{}}]"), "line 1 is not a JSON object"),
            (
                "{\"key\": \"a\", \"key\": \"b\", \"request\": {}}".to_owned(),
                "line 1 is not a JSON object with one",
            ),
            (format!("\"{secret}\""), "line 1 is not a JSON object"),
            (format!("{{\"request\": {{\"x\": \"{secret}\"}}}}"), "line 1 has no \"key\""),
            (format!("{{\"key\": \"{secret}\"}}"), "line 1 has no \"request\""),
            ("{\"key\": 7, \"request\": {}}".to_owned(), "a \"key\" that is not a string"),
            ("{\"key\": \"\", \"request\": {}}".to_owned(), "an empty \"key\""),
            (
                format!("{{\"key\": \"a\", \"request\": \"{secret}\"}}"),
                "a \"request\" that is not a JSON object",
            ),
            (format!("{}\n\n{}", line(secret), line(secret)), "lines 1 and 3 have the same key"),
            (String::new(), "holds no requests"),
            ("\n \n".to_owned(), "holds no requests"),
        ];
        for (text, expected) in cases {
            let problem = from_lines(text.as_bytes(), "ConfigMap in, key x", GENERATE, LIMIT).unwrap_err();
            assert!(problem.message.contains(expected), "{}", problem.message);
            assert!(!problem.message.contains(secret), "{}", problem.message);
            assert_eq!(problem.reason, Reason::InputInvalid);
        }
        let bytes = [line("a").as_bytes(), b"\n\xff\xfe"].concat();
        assert!(
            from_lines(&bytes, "x", GENERATE, LIMIT)
                .unwrap_err()
                .message
                .contains("line 2 is not valid UTF-8")
        );
    }

    #[test]
    fn the_limit_counts_what_is_uploaded() {
        let text = line("a");
        let size = text.len() as u64;
        assert!(from_lines(text.as_bytes(), "x", GENERATE, size + 1).is_ok());
        for limit in [size, size - 1] {
            let problem = from_lines(text.as_bytes(), "x", GENERATE, limit).unwrap_err();
            assert_eq!(problem.reason, Reason::InputTooLarge);
            assert!(problem.message.contains("split"), "{}", problem.message);
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_what_passes_passes_again(content in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(input) = from_lines(&content, "x", GENERATE, LIMIT) {
                prop_assert_eq!(&from_lines(&input.bytes, "x", GENERATE, LIMIT).unwrap(), &input);
            }
        }

        #[test]
        fn every_key_comes_back_in_order(keys in proptest::collection::hash_set("\\PC{1,20}", 1..20)) {
            let keys: Vec<String> = keys.into_iter().collect();
            let text: String = keys.iter().map(|k| line(k) + "\n").collect();
            prop_assert_eq!(from_lines(text.as_bytes(), "x", GENERATE, LIMIT).unwrap().keys, keys);
        }
    }
}
