//! Deterministic answers that depend on the request, and what directives in prompts make of them.
//!
//! A directive stands in a prompt as `[[sim:NAME]]` or `[[sim:NAME=VALUE]]`, so that tests which share a
//! simulator stay independent. `[[sim:error=14]]` fails a request with that code whenever it is asked,
//! `[[sim:error=14x2]]` the first two times that a batch carries it.

use std::collections::HashMap;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::state::{Outcome, hash};

/// A request of a batch.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// What its answer is known by: the field `key` of a line, or `metadata` of an inline request.
    pub(crate) label: Option<(&'static str, Value)>,
    pub(crate) request: Value,
}

/// Tokens of a text, four characters each.
pub(crate) fn tokens_of(text: &str) -> usize {
    text.len().div_ceil(4).max(1)
}

/// The value of a directive; empty for one without.
pub(crate) fn directive(text: &str, name: &str) -> Option<String> {
    let mut rest = text;
    while let Some(at) = rest.find("[[sim:") {
        rest = &rest[at + 6..];
        let end = rest.find("]]")?;
        let (found, value) = rest[..end].split_once('=').unwrap_or((&rest[..end], ""));
        if found == name {
            return Some(value.to_owned());
        }
        rest = &rest[end..];
    }
    None
}

/// All text of a request.
pub(crate) fn text_of(request: &Value) -> String {
    match request {
        Value::Object(fields) => {
            fields
                .iter()
                .map(|(name, value)| {
                    if name == "text" {
                        value.as_str().unwrap_or_default().to_owned()
                    } else {
                        text_of(value)
                    }
                })
                .collect()
        }
        Value::Array(items) => items.iter().map(text_of).collect(),
        _ => String::new(),
    }
}

/// What the whole batch is told to do.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a directive of its own")]
pub(crate) struct Plan {
    pub(crate) outcome: Option<Outcome>,
    pub(crate) stall: bool,
    pub(crate) work_seconds: Option<f64>,
    pub(crate) output_lag_seconds: Option<f64>,
    pub(crate) no_event: bool,
    pub(crate) shuffle: bool,
    pub(crate) partial: bool,
    pub(crate) hook: Vec<String>,
}

impl Plan {
    pub(crate) fn of(requests: &[Request]) -> Self {
        let mut plan = Self::default();
        for text in requests.iter().map(|r| text_of(&r.request)).filter(|t| t.contains("[[sim:")) {
            match directive(&text, "job").as_deref() {
                Some("fail") => plan.outcome = Some(Outcome::Failed),
                Some("expire") => plan.outcome = Some(Outcome::Expired),
                Some("cancel") => plan.outcome = Some(Outcome::Cancelled),
                Some("stall") => plan.stall = true,
                _ => {}
            }
            let seconds = |name| directive(&text, name).and_then(|v| v.parse().ok());
            plan.work_seconds = plan.work_seconds.or_else(|| seconds("work"));
            plan.output_lag_seconds = plan.output_lag_seconds.or_else(|| seconds("output-lag"));
            plan.no_event |= directive(&text, "no-event").is_some();
            plan.shuffle |= directive(&text, "shuffle").is_some();
            plan.partial |= directive(&text, "partial").is_some();
            plan.hook.extend(directive(&text, "hook"));
        }
        plan
    }
}

/// The result file.
pub(crate) struct Results {
    pub(crate) content: Bytes,
    pub(crate) succeeded: usize,
    pub(crate) failed: usize,
}

/// How often each request was worked on that fails a number of times only.
pub(crate) type Tries = HashMap<String, u32>;

/// Works on all requests. `unfinished` ones get the error of a cancelled batch.
pub(crate) fn results(
    requests: &[Request],
    embed: bool,
    fail_rate: f64,
    unfinished: bool,
    tries: &mut Tries,
) -> Results {
    let plan = Plan::of(requests);
    let mut lines: Vec<Value> = Vec::new();
    let (mut succeeded, mut failed) = (0, 0);
    for (index, request) in requests.iter().enumerate() {
        let text = text_of(&request.request);
        let mut line = if unfinished && index % 2 == 1 {
            json!({"error": {"code": 1, "message": "The operation was cancelled."}})
        } else {
            fails_for_now(request, &text, tries)
                .unwrap_or_else(|| answer(&request.request, &text, embed, fail_rate))
        };
        if let (Some((field, label)), Some(fields)) = (&request.label, line.as_object_mut()) {
            fields.insert((*field).to_owned(), label.clone());
        }
        if directive(&text, "no-key").is_some()
            && let Some(fields) = line.as_object_mut()
        {
            fields.retain(|name, _| !matches!(name.as_str(), "key" | "metadata"));
        }
        if line.get("response").is_some() {
            succeeded += 1;
        } else {
            failed += 1;
        }
        if let Some(key) = directive(&text, "foreign") {
            let mut foreign = line.clone();
            match &request.label {
                Some(("metadata", _)) => foreign["metadata"] = json!({"key": key}),
                _ => foreign["key"] = json!(key),
            }
            lines.push(foreign);
        }
        if directive(&text, "duplicate").is_some() {
            lines.push(line.clone());
        }
        if directive(&text, "missing").is_none() {
            lines.push(line);
        }
    }
    if plan.shuffle {
        lines.sort_by_cached_key(|l| hash(l.to_string().as_bytes()));
    }
    if plan.partial {
        lines.truncate(lines.len().div_ceil(2));
    }
    let content: String = lines.iter().flat_map(|l| [l.to_string(), "\n".to_owned()]).collect();
    Results { content: content.into(), succeeded, failed }
}

/// The error of a request that fails so many times, and not for ever.
fn fails_for_now(request: &Request, text: &str, tries: &mut Tries) -> Option<Value> {
    let value = directive(text, "error")?;
    let (code, times) = value.split_once('x')?;
    let (code, times): (i32, u32) = (code.parse().ok()?, times.parse().ok()?);
    let label = request.label.as_ref().map_or(Value::Null, |(_, label)| label.clone());
    let count = tries.entry(hash(format!("{label} {}", request.request).as_bytes())).or_default();
    *count += 1;
    (*count <= times)
        .then(|| json!({"error": {"code": code, "message": "The request could not be answered."}}))
}

fn answer(request: &Value, text: &str, embed: bool, fail_rate: f64) -> Value {
    let digest = hash(request.to_string().as_bytes());
    let prompt_tokens = tokens_of(text);
    if let Some(code) = directive(text, "error").filter(|value| !value.contains('x')) {
        let code: i32 = code.parse().unwrap_or(13);
        return json!({"error": {"code": code, "message": "The request could not be answered."}});
    }
    if directive(text, "error-no-message").is_some() {
        return json!({"error": {"code": 13}});
    }
    if directive(text, "error-echo").is_some() {
        return json!({"error": {"code": 3, "message": format!("Invalid value: {text}")}});
    }
    if directive(text, "status").is_some() {
        return json!({"status": "Bad Request: {\"error\":{\"code\":400}}"});
    }
    let share = f64::from(u32::from_str_radix(&digest[..8], 16).unwrap_or(0)) / f64::from(u32::MAX);
    if share < fail_rate {
        return json!({"error": {"code": 14, "message": "The service is currently unavailable."}});
    }
    let usage = |answer_tokens: usize| {
        json!({"promptTokenCount": prompt_tokens, "candidatesTokenCount": answer_tokens,
            "totalTokenCount": prompt_tokens + answer_tokens})
    };
    if embed {
        let wanted = request.get("outputDimensionality").or_else(|| request.get("output_dimensionality"));
        let size = wanted.and_then(Value::as_u64).unwrap_or(8).min(3072);
        let byte = |i: u64| f64::from(digest.as_bytes()[usize::try_from(i % 64).unwrap_or(0)]) / 128.0 - 0.5;
        let values: Vec<f64> = (0..size).map(byte).collect();
        let embedding = json!({ "values": values });
        if directive(text, "token-count").is_some() {
            // as users saw it in 2025
            return json!({"response": {"tokenCount": prompt_tokens.to_string(), "embedding": embedding}});
        }
        return json!({"response": {"embedding": embedding,
            "usageMetadata": {"promptTokenCount": prompt_tokens, "totalTokenCount": prompt_tokens}}});
    }
    if directive(text, "blocked").is_some() {
        return json!({"response": {"promptFeedback": {"blockReason": "SAFETY"},
            "usageMetadata": {"promptTokenCount": prompt_tokens, "totalTokenCount": prompt_tokens},
            "modelVersion": "gemini-simulated"}});
    }
    let echo: String = text.chars().take(80).collect();
    let mut words = format!("Simulated answer {} to: {echo}", &digest[..8]);
    if let Some(size) = directive(text, "big").and_then(|v| v.parse::<usize>().ok()) {
        words = "x".repeat(size.min(64 << 20));
    }
    let reason = if directive(text, "max-tokens").is_some() {
        words.truncate(20);
        "MAX_TOKENS"
    } else {
        "STOP"
    };
    let answer_tokens = words.len().div_ceil(4);
    json!({"response": {
        "candidates": [{"content": {"parts": [{"text": words}], "role": "model"}, "finishReason": reason, "index": 0}],
        "usageMetadata": usage(answer_tokens),
        "modelVersion": "gemini-simulated",
        "responseId": &digest[..20],
    }})
}
