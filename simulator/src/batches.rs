//! Batches: create with synchronous validation, get, list, cancel, delete; and their work.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::api::{Answer, Subject};
use crate::error::ApiError;
use crate::files;
use crate::state::{BatchRec, Caller, Inner, Outcome, Shared, State, random_id};
use crate::webhooks;
use crate::work::{self, Plan, Request};

const MAX_INLINE_BYTES: usize = 20 << 20;

/// Names that the service knows: anything that looks like one of Google's.
fn model_exists(model: &str) -> bool {
    let id = model.strip_prefix("models/").unwrap_or(model);
    model.starts_with("tunedModels/")
        || ["gemini-1", "gemini-2", "gemini-3", "gemini-embedding", "gemini-flash", "gemini-pro", "gemma"]
            .iter()
            .any(|known| id.starts_with(known))
}

/// A field in camelCase or `snake_case`.
fn field<'a>(value: &'a Value, camel: &str, snake: &str) -> Option<&'a Value> {
    value.get(camel).or_else(|| value.get(snake)).filter(|v| !v.is_null())
}

fn only(value: &Value, known: &[&str], place: &str) -> Result<(), ApiError> {
    let unknown = value.as_object().and_then(|o| o.keys().find(|k| !known.contains(&k.as_str())));
    match unknown {
        None => Ok(()),
        Some(name) => Err(ApiError::invalid(format!(
            "Invalid JSON payload received. Unknown name \"{name}\" at '{place}': Cannot find field."
        ))),
    }
}

pub(crate) fn create(
    shared: &Arc<Shared>,
    caller: &Caller,
    model: &str,
    embed: bool,
    body: &Value,
    size: usize,
    subject: &mut Subject,
) -> Result<Answer, ApiError> {
    if size > MAX_INLINE_BYTES {
        return Err(ApiError::invalid("Request payload size exceeds the limit: 20971520 bytes."));
    }
    only(body, &["batch"], "")?;
    let Some(batch) = body.get("batch").filter(|b| b.is_object()) else {
        return Err(ApiError::invalid("* BatchGenerateContentRequest.batch: batch is required"));
    };
    only(
        batch,
        &[
            "displayName",
            "display_name",
            "inputConfig",
            "input_config",
            "priority",
            "webhookConfig",
            "webhook_config",
            "model",
            "name",
        ],
        "batch",
    )?;
    let display_name =
        field(batch, "displayName", "display_name").and_then(Value::as_str).unwrap_or_default();
    subject.display_name = Some(display_name.to_owned());
    let Some(input) = field(batch, "inputConfig", "input_config") else {
        return Err(ApiError::invalid("* batch.input_config: input_config is required"));
    };
    only(input, &["fileName", "file_name", "requests"], "batch.input_config")?;
    let file = field(input, "fileName", "file_name").and_then(Value::as_str).map(ToOwned::to_owned);
    subject.file.clone_from(&file);
    let hooks = field(batch, "webhookConfig", "webhook_config").cloned().unwrap_or_default();
    if hooks.is_object() {
        only(&hooks, &["uris"], "batch.webhook_config")?;
    }
    let uris: Vec<String> = hooks["uris"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|u| u.as_str().map(ToOwned::to_owned))
        .collect();

    if !model_exists(model) {
        return Err(ApiError::not_found(format!(
            "{model} is not found for API version v1beta, or is not supported for batchGenerateContent. Call \
             ListModels to see the list of available models and their supported methods."
        )));
    }
    let mut inner = shared.lock();
    let requests = match (&file, input.get("requests")) {
        (Some(name), None) => from_file(&inner, shared, caller, name, embed)?,
        (None, Some(requests)) => inline(requests)?,
        _ => {
            return Err(ApiError::invalid(
                "* batch.input_config: exactly one of file_name and requests is required",
            ));
        }
    };
    if inner.active(&caller.project) >= shared.config.max_active && !inner.switches.stall_over_limit {
        return Err(ApiError::exhausted());
    }
    let now = shared.now();
    let priority = field(batch, "priority", "priority")
        .and_then(|p| p.as_i64().or_else(|| p.as_str()?.parse().ok()))
        .unwrap_or(0);
    let record = BatchRec {
        id: random_id(36),
        model: if model.contains('/') { model.to_owned() } else { format!("models/{model}") },
        embed,
        display_name: display_name.to_owned(),
        priority,
        file,
        requests,
        uris,
        key: caller.key.clone(),
        project: caller.project.clone(),
        state: State::Pending,
        created: now,
        updated: now,
        ended: None,
        output: None,
        readable_from: None,
        succeeded: 0,
        failed: 0,
        cancelled: false,
        deleted: false,
    };
    let answer = operation(&record, true);
    let name = format!("batches/{}", record.id);
    subject.batch = Some(name.clone());
    let plan = Plan::of(&record.requests);
    inner.batches.push(record);
    drop(inner);
    tokio::spawn(run(Arc::clone(shared), name, plan));
    Ok(Answer::json(answer))
}

fn from_file(
    inner: &Inner,
    shared: &Shared,
    caller: &Caller,
    name: &str,
    embed: bool,
) -> Result<Vec<Request>, ApiError> {
    let id = name.trim_start_matches("files/");
    let Some(file) = files::usable(&inner.files, name, &caller.project, shared.now()) else {
        return if inner.files.contains_key(name) {
            Err(ApiError::no_entity()) // of another project
        } else {
            Err(ApiError::no_file(id))
        };
    };
    let mut requests = Vec::new();
    let mut errors = Vec::new();
    for (index, line) in String::from_utf8_lossy(&file.content).lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        match parse_line(line, embed) {
            Ok(request) => requests.push(request),
            Err(what) => errors.push(format!("Error on line {}: {what}", index + 1)),
        }
    }
    if !errors.is_empty() {
        return Err(ApiError::invalid(errors.join("\n")));
    }
    if requests.is_empty() {
        return Err(ApiError::invalid("The input file has no requests."));
    }
    Ok(requests)
}

fn parse_line(line: &str, embed: bool) -> Result<Request, String> {
    let value: Value =
        serde_json::from_str(line).map_err(|e| format!("invalid JSON, near column {}", e.column()))?;
    let request =
        value.get("request").filter(|r| r.is_object()).ok_or("missing required field: 'request'")?;
    let known: &[&str] = if embed {
        &[
            "content",
            "taskType",
            "task_type",
            "title",
            "outputDimensionality",
            "output_dimensionality",
            "model",
        ]
    } else {
        &[
            "contents",
            "generationConfig",
            "generation_config",
            "systemInstruction",
            "system_instruction",
            "tools",
            "toolConfig",
            "tool_config",
            "safetySettings",
            "safety_settings",
            "cachedContent",
            "cached_content",
            "model",
            "labels",
        ]
    };
    if let Some(name) = request.as_object().and_then(|o| o.keys().find(|k| !known.contains(&k.as_str()))) {
        return Err(format!("invalid JSON, near column 1: no such field: '{name}'"));
    }
    let content = if embed { "content" } else { "contents" };
    if request.get(content).is_none() {
        return Err(format!("missing required field: '{content}'"));
    }
    let text = work::text_of(request);
    if work::directive(&text, "refuse-line").is_some() {
        return Err(format!("invalid value near \"{}\"", text.chars().take(60).collect::<String>()));
    }
    Ok(Request { key: value.get("key").cloned(), request: request.clone() })
}

fn inline(requests: &Value) -> Result<Vec<Request>, ApiError> {
    let list = requests.get("requests").and_then(Value::as_array).filter(|l| !l.is_empty());
    let list =
        list.ok_or_else(|| ApiError::invalid("* batch.input_config.requests.requests: is required"))?;
    Ok(list
        .iter()
        .map(|item| Request {
            key: item.get("metadata").and_then(|m| m.get("key")).cloned(),
            request: item.get("request").cloned().unwrap_or_default(),
        })
        .collect())
}

/// The Operation, as Google shows it. Lists leave inline results out.
pub(crate) fn operation(batch: &BatchRec, with_inline: bool) -> Value {
    let name = format!("batches/{}", batch.id);
    let kind = if batch.embed { "EmbedContentBatch" } else { "GenerateContentBatch" };
    let type_of =
        |suffix: &str| format!("type.googleapis.com/google.ai.generativelanguage.v1main.{kind}{suffix}");
    let mut stats = json!({"requestCount": batch.requests.len().to_string()});
    let pending = batch.requests.len().saturating_sub(batch.succeeded + batch.failed);
    for (field, count) in [
        ("successfulRequestCount", batch.succeeded),
        ("failedRequestCount", batch.failed),
        ("pendingRequestCount", pending),
    ] {
        if count > 0 {
            stats[field] = json!(count.to_string());
        }
    }
    let mut metadata = json!({
        "@type": type_of(""),
        "model": batch.model,
        "createTime": batch.created.to_string(),
        "batchStats": stats,
        "state": format!("BATCH_STATE_{}", batch.state_name()),
        "name": name,
    });
    if !batch.display_name.is_empty() {
        metadata["displayName"] = json!(batch.display_name);
    }
    if let Some(file) = &batch.file {
        metadata["inputConfig"] = json!({"fileName": file});
    }
    if batch.priority != 0 {
        metadata["priority"] = json!(batch.priority.to_string());
    }
    if !batch.embed {
        metadata["updateTime"] = json!(batch.updated.to_string());
    }
    if let Some(ended) = batch.ended {
        metadata["endTime"] = json!(ended.to_string());
    }
    let mut operation = json!({"name": name});
    match batch.state {
        State::Pending | State::Running => {}
        State::Ended(Outcome::Succeeded) => {
            operation["done"] = json!(true);
            let mut output = if batch.file.is_some() {
                json!({"responsesFile": format!("files/batch-{}", batch.id)})
            } else if with_inline {
                inlined(batch)
            } else {
                json!({})
            };
            metadata["output"] = output.clone();
            output["@type"] = json!(type_of("Output"));
            operation["response"] = output;
        }
        State::Ended(end) => {
            operation["done"] = json!(true);
            let (code, message) = match end {
                Outcome::Expired => (4, "Batch expired before it could be completed."),
                Outcome::Cancelled => (13, "Batch was cancelled."),
                _ => (13, "Batch failed without error."),
            };
            operation["error"] = json!({"code": code, "message": message});
        }
    }
    operation["metadata"] = metadata;
    operation
}

fn inlined(batch: &BatchRec) -> Value {
    let lines = batch.output.as_deref().unwrap_or_default();
    let list: Vec<Value> = String::from_utf8_lossy(lines)
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok())
        .map(|mut item: Value| {
            if let Some(key) = item.as_object_mut().and_then(|o| o.remove("key")) {
                item["metadata"] = json!({"key": key});
            }
            item
        })
        .collect();
    let field = if batch.embed { "inlinedEmbedContentResponses" } else { "inlinedResponses" };
    let inner = if batch.embed { "inlinedResponses" } else { field };
    json!({field: {inner: list}})
}

pub(crate) fn get(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    Ok(Answer::json(operation(shared.lock().visible(name, caller)?, true)))
}

pub(crate) fn list(shared: &Shared, caller: &Caller, query: &[(String, String)]) -> Answer {
    let inner = shared.lock();
    let switches = &inner.switches;
    let lag = Duration::from_secs_f64(switches.list_lag_seconds.max(0.0));
    let lag = SignedDuration::try_from(shared.pace().real(lag).mul_f64(shared.config.clock.factor))
        .unwrap_or_default();
    let newest = shared.now().checked_sub(lag).unwrap_or_default();
    let all: Vec<&BatchRec> = inner
        .batches
        .iter()
        .rev()
        .filter(|b| !b.deleted && b.created <= newest && b.seen_by(caller, switches.creator_only))
        .collect();
    let size = page_size(query, 50, 100).min(switches.page_limit.max(1));
    let (page, next) = page_of(&all, size, query);
    let mut answer = json!({});
    if !page.is_empty() {
        answer["operations"] = page.iter().map(|b| operation(b, false)).collect();
    }
    if let Some(next) = next {
        answer["nextPageToken"] = json!(next);
    }
    Answer::json(answer)
}

pub(crate) fn page_size(query: &[(String, String)], default: usize, max: usize) -> usize {
    let given = query.iter().find(|(k, _)| k == "pageSize" || k == "page_size");
    given.and_then(|(_, v)| v.parse().ok()).filter(|n| *n > 0).unwrap_or(default).min(max)
}

/// A page and the token of the next one.
pub(crate) fn page_of<'a, T>(
    all: &'a [T],
    size: usize,
    query: &[(String, String)],
) -> (&'a [T], Option<String>) {
    let token = query.iter().find(|(k, _)| k == "pageToken" || k == "page_token");
    let from: usize =
        token.and_then(|(_, v)| v.strip_prefix("at-")?.parse().ok()).unwrap_or(0).min(all.len());
    let to = (from + size).min(all.len());
    (&all[from..to], (to < all.len()).then(|| format!("at-{to}")))
}

pub(crate) fn cancel(shared: &Arc<Shared>, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    let mut inner = shared.lock();
    let (refused, race) = (inner.switches.cancel_ended_refused, inner.switches.cancel_race);
    let batch = inner.visible(name, caller)?;
    batch.cancelled = true;
    let end = match batch.state {
        State::Ended(_) if refused => {
            return Err(ApiError::precondition("Batch is not in a state that can be cancelled."));
        }
        State::Ended(_) => None,
        State::Running if race => Some(Outcome::Succeeded),
        _ => Some(Outcome::Cancelled),
    };
    drop(inner);
    if let Some(end) = end {
        shared.finish(name, end);
    }
    Ok(Answer::json(json!({})))
}

pub(crate) fn delete(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    shared.lock().visible(name, caller)?.deleted = true;
    Ok(Answer::json(json!({})))
}

/// The life of a batch, unless somebody ends it before.
async fn run(shared: Arc<Shared>, name: String, plan: Plan) {
    let real = |d: Duration| shared.pace().real(d);
    let stalled = plan.stall || {
        let mut inner = shared.lock();
        let project = inner.batch(&name).map(|b| b.project.clone()).unwrap_or_default();
        inner.active(&project) > shared.config.max_active
    };
    if stalled {
        return;
    }
    let running = plan
        .work_seconds
        .map_or(shared.config.running, |s| Duration::try_from_secs_f64(s).unwrap_or_default());
    for (pause, state) in [(shared.config.pending, State::Running), (running, State::Running)] {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(real(pause)) => {}
        }
        let now = shared.now();
        let began = match shared.lock().batch(&name) {
            Some(batch) if !matches!(batch.state, State::Ended(_)) && !batch.deleted => {
                batch.updated = now;
                std::mem::replace(&mut batch.state, state) == State::Pending
            }
            _ => return,
        };
        if began {
            webhooks::announce_early(&shared, &name, &plan);
        }
    }
    shared.finish(&name, plan.outcome.unwrap_or(Outcome::Succeeded));
}

impl Shared {
    /// Ends a batch, unless it has ended, and tells about it.
    pub(crate) fn finish(self: &Arc<Self>, name: &str, outcome: Outcome) {
        let now = self.now();
        let mut inner = self.lock();
        let lag = inner.switches.output_lag_seconds;
        let Some(batch) = inner.batch(name).filter(|b| !matches!(b.state, State::Ended(_))) else { return };
        let plan = Plan::of(&batch.requests);
        let with_output = outcome == Outcome::Succeeded || plan.partial;
        if with_output {
            let unfinished = batch.cancelled;
            let done = work::results(&batch.requests, batch.embed, self.config.fail_rate, unfinished);
            batch.output = Some(done.content);
            (batch.succeeded, batch.failed) = (done.succeeded, done.failed);
        }
        batch.state = State::Ended(outcome);
        batch.updated = now;
        batch.ended = Some(now);
        batch.readable_from = Some(self.in_seconds(plan.output_lag_seconds.unwrap_or(lag)));
        drop(inner);
        webhooks::announce(self, name, outcome, &plan);
    }
}
