//! Batches: create with synchronous validation, get, list, cancel, delete; and their work.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::api::{Answer, Subject};
use crate::error::{ApiError, default_message, default_status};
use crate::files;
use crate::state::{BatchRec, Caller, Inner, Outcome, Shared, State, random_id, tokens};
use crate::webhooks;
use crate::work::{self, Plan, Request};

pub(crate) const MAX_INLINE_BYTES: usize = 20 << 20;
/// A batch that is not over by then expires.
const LONGEST_LIFE: Duration = Duration::from_hours(48);

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

/// An int64, which JSON may give as a string.
fn int64(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

pub(crate) fn only(value: &Value, known: &[&str], place: &str) -> Result<(), ApiError> {
    let unknown = value.as_object().and_then(|o| o.keys().find(|k| !known.contains(&k.as_str())));
    match unknown {
        None => Ok(()),
        Some(name) => {
            let at = if place.is_empty() { String::new() } else { format!(" at '{place}'") };
            Err(ApiError::invalid(format!(
                "Invalid JSON payload received. Unknown name \"{name}\"{at}: Cannot find field."
            )))
        }
    }
}

/// Fields of a request that is part of a batch.
fn request_fields(embed: bool) -> &'static [&'static str] {
    if embed {
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
    }
}

fn content_field(embed: bool) -> &'static str {
    if embed { "content" } else { "contents" }
}

/// `models/NAME`, or `tunedModels/NAME` as it is.
fn full_model(model: &str) -> String {
    if model.contains('/') { model.to_owned() } else { format!("models/{model}") }
}

pub(crate) fn create(
    shared: &Arc<Shared>,
    caller: &Caller,
    model: &str,
    path: &str,
    body: &Value,
    size: usize,
    subject: &mut Subject,
) -> Result<Answer, ApiError> {
    let embed = path.ends_with(":asyncBatchEmbedContent");
    let version = if path.starts_with("/v1/") { "v1" } else { "v1beta" };
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
    let user_metadata = field(&hooks, "userMetadata", "user_metadata").cloned();
    if hooks.is_object() {
        let refused = shared.lock().switches.user_metadata_refused;
        let known: &[&str] = if refused { &["uris"] } else { &["uris", "userMetadata", "user_metadata"] };
        only(&hooks, known, "batch.webhook_config")?;
    }
    let uris: Vec<String> = hooks["uris"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|u| u.as_str().map(ToOwned::to_owned))
        .collect();

    if !model_exists(model) {
        return Err(ApiError::not_found(format!(
            "{model} is not found for API version {version}, or is not supported for {}. Call ListModels \
              to see the list of available models and their supported methods.",
            if embed { "asyncBatchEmbedContent" } else { "batchGenerateContent" }
        )));
    }
    let model = full_model(model);
    let mut inner = shared.lock();
    let requests = match (&file, input.get("requests")) {
        (Some(name), None) => from_file(&inner, shared, caller, name, embed)?,
        (None, Some(requests)) => {
            inline(requests, embed, inner.switches.other_model_refused.then_some(model.as_str()))?
        }
        _ => {
            return Err(ApiError::invalid(
                "* batch.input_config: exactly one of file_name and requests is required",
            ));
        }
    };
    if inner.active(&caller.project) >= shared.config.max_active && !inner.switches.stall_over_limit {
        return Err(ApiError::exhausted());
    }
    if let Some(limit) = inner.switches.enqueued_token_limit
        && inner.enqueued(&caller.project, &model) + tokens(&requests) > limit
    {
        return Err(ApiError::exhausted());
    }
    let now = shared.now();
    let priority = field(batch, "priority", "priority").and_then(int64).unwrap_or(0);
    let record = BatchRec {
        id: random_id(36),
        model,
        embed,
        display_name: display_name.to_owned(),
        priority,
        file,
        requests,
        uris,
        user_metadata,
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
    let answer = operation(&record, View::Whole);
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
    let there = files::usable(&inner.files, name, &caller.project, shared.now());
    // `deleted_files` is empty unless the switch says that a deleted file still serves a create.
    let Some(file) = there.or_else(|| inner.deleted_files.get(name).filter(|f| f.project == caller.project))
    else {
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
    let known = request_fields(embed);
    if let Some(name) = request.as_object().and_then(|o| o.keys().find(|k| !known.contains(&k.as_str()))) {
        let column = line.find(&format!("\"{name}\"")).map_or(1, |at| at + 1);
        return Err(format!("invalid JSON, near column {column}: no such field: '{name}'"));
    }
    let content = content_field(embed);
    if request.get(content).is_none() {
        return Err(format!("missing required field: '{content}'"));
    }
    let text = work::text_of(request);
    if work::directive(&text, "refuse-line").is_some() {
        return Err(format!("invalid value near \"{}\"", text.chars().take(60).collect::<String>()));
    }
    let label = value.get("key").map(|key| ("key", key.clone()));
    Ok(Request { label, request: request.clone() })
}

/// Requests in the create itself. `model`: the only one that they may name.
fn inline(requests: &Value, embed: bool, model: Option<&str>) -> Result<Vec<Request>, ApiError> {
    const PLACE: &str = "batch.input_config.requests";
    only(requests, &["requests"], PLACE)?;
    let list = requests.get("requests").and_then(Value::as_array).filter(|l| !l.is_empty());
    let list =
        list.ok_or_else(|| ApiError::invalid("* batch.input_config.requests.requests: is required"))?;
    let mut found = Vec::with_capacity(list.len());
    for (index, item) in list.iter().enumerate() {
        let place = format!("{PLACE}.requests[{index}]");
        only(item, &["request", "metadata"], &place)?;
        let missing = |what: &str| ApiError::invalid(format!("* {place}.{what}: is required"));
        let request = item.get("request").filter(|r| r.is_object()).ok_or_else(|| missing("request"))?;
        only(request, request_fields(embed), &format!("{place}.request"))?;
        let content = content_field(embed);
        request.get(content).ok_or_else(|| missing(&format!("request.{content}")))?;
        let own = request.get("model").and_then(Value::as_str).map(full_model);
        if own.is_some_and(|own| model.is_some_and(|model| own != model)) {
            return Err(ApiError::invalid(format!("* {place}.request.model: is not the model of the batch")));
        }
        let label = item.get("metadata").filter(|m| m.is_object()).map(|m| ("metadata", m.clone()));
        found.push(Request { label, request: request.clone() });
    }
    Ok(found)
}

/// How much of an operation is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    /// All, by GET.
    Whole,
    /// In listings, without inline results.
    Listed,
    /// The same with the counts of the beginning.
    ListedStale,
}

/// The Operation, as Google shows it.
pub(crate) fn operation(batch: &BatchRec, view: View) -> Value {
    let name = format!("batches/{}", batch.id);
    let kind = if batch.embed { "EmbedContentBatch" } else { "GenerateContentBatch" };
    let type_of =
        |suffix: &str| format!("type.googleapis.com/google.ai.generativelanguage.v1main.{kind}{suffix}");
    let mut stats = json!({"requestCount": batch.requests.len().to_string()});
    let (succeeded, failed) =
        if view == View::ListedStale { (0, 0) } else { (batch.succeeded, batch.failed) };
    let pending = batch.requests.len().saturating_sub(succeeded + failed);
    for (field, count) in [
        ("successfulRequestCount", succeeded),
        ("failedRequestCount", failed),
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
            } else if view == View::Whole {
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
    let list: Vec<Value> =
        String::from_utf8_lossy(lines).lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let field = if batch.embed { "inlinedEmbedContentResponses" } else { "inlinedResponses" };
    let inner = if batch.embed { "inlinedResponses" } else { field };
    json!({field: {inner: list}})
}

pub(crate) fn get(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    let mut inner = shared.lock();
    let limit = inner.switches.inline_get_limit.unwrap_or(usize::MAX);
    let batch = inner.visible(name, caller)?;
    if batch.file.is_none() && batch.output.as_ref().is_some_and(|o| o.len() > limit) {
        return Err(ApiError::new(504, default_status(504), default_message(504)));
    }
    Ok(Answer::json(operation(batch, View::Whole)))
}

pub(crate) fn list(shared: &Shared, caller: &Caller, query: &[(String, String)]) -> Result<Answer, ApiError> {
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
    let (page, next) = page_of(&all, size, switches.empty_pages, query)?;
    let view = if switches.stale_stats_in_list { View::ListedStale } else { View::Listed };
    let mut answer = json!({});
    if !page.is_empty() {
        answer["operations"] = page.iter().map(|b| operation(b, view)).collect();
    }
    if let Some(next) = next {
        answer["nextPageToken"] = json!(next);
    }
    Ok(Answer::json(answer))
}

pub(crate) fn page_size(query: &[(String, String)], default: usize, max: usize) -> usize {
    let given = query.iter().find(|(k, _)| k == "pageSize" || k == "page_size");
    given.and_then(|(_, v)| v.parse().ok()).filter(|n| *n > 0).unwrap_or(default).min(max)
}

/// A page and the token of the next one. `empty`: before each page comes one without anything.
pub(crate) fn page_of<'a, T>(
    all: &'a [T],
    size: usize,
    empty: bool,
    query: &[(String, String)],
) -> Result<(&'a [T], Option<String>), ApiError> {
    let token = query.iter().find(|(k, _)| k == "pageToken" || k == "page_token");
    let token = token.map_or("", |(_, v)| v.as_str());
    let (word, from) = token.split_once('-').unwrap_or(("at", if token.is_empty() { "0" } else { token }));
    let from: usize = match (word, from.parse::<usize>()) {
        ("at" | "full", Ok(from)) => from.min(all.len()),
        _ => return Err(ApiError::invalid("Page token is not valid.")),
    };
    if empty && word == "at" {
        return Ok((&[], Some(format!("full-{from}"))));
    }
    let to = (from + size).min(all.len());
    Ok((&all[from..to], (to < all.len()).then(|| format!("at-{to}"))))
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

/// What the discovery document calls an update: the fields of the mask, and the batch itself as the answer.
pub(crate) fn update(
    shared: &Shared,
    caller: &Caller,
    name: &str,
    query: &[(String, String)],
    body: &Value,
) -> Result<Answer, ApiError> {
    let mask = query.iter().find(|(k, _)| k == "updateMask" || k == "update_mask");
    let mask = mask.map_or("", |(_, v)| v.as_str());
    let mut inner = shared.lock();
    let batch = inner.visible(name, caller)?;
    for path in mask.split(',').filter(|p| !p.is_empty()) {
        match path {
            "displayName" | "display_name" => {
                let text = field(body, "displayName", "display_name").and_then(Value::as_str);
                text.unwrap_or_default().clone_into(&mut batch.display_name);
            }
            "priority" => batch.priority = field(body, path, path).and_then(int64).unwrap_or(0),
            _ => return Err(ApiError::invalid(format!("* update_mask: {path} can't be updated"))),
        }
    }
    batch.updated = shared.now();
    Ok(Answer::json(operation(batch, View::Whole)["metadata"].take()))
}

/// The life of a batch, unless somebody ends it before. It ends after two days at the latest.
async fn run(shared: Arc<Shared>, name: String, plan: Plan) {
    tokio::select! {
        () = shared.stop.cancelled() => {}
        () = work_on(&shared, &name, &plan) => {}
        () = tokio::time::sleep(shared.pace().real(LONGEST_LIFE)) => {
            shared.finish(&name, Outcome::Expired);
        }
    }
}

async fn work_on(shared: &Arc<Shared>, name: &str, plan: &Plan) {
    let real = |d: Duration| shared.pace().real(d);
    if plan.stall {
        return std::future::pending().await;
    }
    // Over the limit none of the waiting ones starts, until cancellations bring their number back below.
    let over_limit = || {
        let mut inner = shared.lock();
        let project = inner.batch(name).map(|b| b.project.clone()).unwrap_or_default();
        inner.switches.stall_over_limit && inner.active(&project) > shared.config.max_active
    };
    let running = plan
        .work_seconds
        .map_or(shared.config.running, |s| Duration::try_from_secs_f64(s).unwrap_or_default());
    tokio::time::sleep(real(shared.config.pending)).await;
    while over_limit() {
        tokio::time::sleep(real(Duration::from_secs(10))).await;
    }
    let now = shared.now();
    match shared.lock().unfinished(name) {
        Some(batch) => (batch.state, batch.updated) = (State::Running, now),
        None => return,
    }
    webhooks::announce_early(shared, name, plan);
    tokio::time::sleep(real(running)).await;
    shared.finish(name, plan.outcome.unwrap_or(Outcome::Succeeded));
}

impl Shared {
    /// Ends a batch, unless it has ended, and tells about it.
    pub(crate) fn finish(self: &Arc<Self>, name: &str, outcome: Outcome) -> bool {
        let now = self.now();
        let mut inner = self.lock();
        let lag = inner.switches.output_lag_seconds;
        let mut tries = std::mem::take(&mut inner.tries);
        let Some(batch) = inner.unfinished(name) else {
            inner.tries = tries;
            return false;
        };
        let plan = Plan::of(&batch.requests);
        let with_output = outcome == Outcome::Succeeded || plan.partial;
        if with_output {
            let unfinished = batch.cancelled;
            let (fail_rate, tries) = (self.config.fail_rate, &mut tries);
            let done = work::results(&batch.requests, batch.embed, fail_rate, unfinished, tries);
            batch.output = Some(done.content);
            (batch.succeeded, batch.failed) = (done.succeeded, done.failed);
        }
        batch.state = State::Ended(outcome);
        batch.updated = now;
        batch.ended = Some(now);
        batch.readable_from = Some(self.in_seconds(plan.output_lag_seconds.unwrap_or(lag)));
        inner.tries = tries;
        drop(inner);
        webhooks::announce(self, name, outcome, &plan);
        true
    }
}
