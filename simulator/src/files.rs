//! Files: resumable upload, get, list, delete, download.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::HeaderMap;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::api::{Answer, Subject};
use crate::batches::{page_of, page_size};
use crate::error::ApiError;
use crate::state::{Caller, FileRec, Shared, UploadRec, hash, random_id};

const MAX_FILE_BYTES: usize = 2 << 30;

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

/// First call of an upload. The size comes in a header, or is not told.
pub(crate) fn start(
    shared: &Arc<Shared>,
    caller: &Caller,
    headers: &HeaderMap,
    body: &Value,
    path: &str,
    subject: &mut Subject,
) -> Result<Answer, ApiError> {
    let says = |name, word| header(headers, name).is_some_and(|v| v.to_ascii_lowercase().contains(word));
    if !says("x-goog-upload-protocol", "resumable") || !says("x-goog-upload-command", "start") {
        return Err(ApiError::invalid(
            "Only resumable uploads are simulated; they begin with the command start.",
        ));
    }
    let file = &body["file"];
    let text = |names: [&str; 2]| names.into_iter().find_map(|n| file[n].as_str()).map(ToOwned::to_owned);
    let name = match text(["name", "name"]).filter(|n| !n.is_empty()) {
        None => None,
        Some(name) => {
            let id = name.strip_prefix("files/").unwrap_or(&name).to_owned();
            let fits = id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            if id.is_empty() || id.len() > 40 || !fits || id.starts_with('-') || id.ends_with('-') {
                return Err(ApiError::invalid("* CreateFileRequest.file.name: invalid file name"));
            }
            Some(format!("files/{id}"))
        }
    };
    let display_name = text(["displayName", "display_name"]).unwrap_or_default();
    subject.file.clone_from(&name);
    subject.display_name = Some(display_name.clone());
    if display_name.len() > 512 {
        return Err(ApiError::invalid("* CreateFileRequest.file.display_name: too long"));
    }
    let size = header(headers, "x-goog-upload-header-content-length").and_then(|v| v.parse::<usize>().ok());
    if size.is_some_and(|s| s > MAX_FILE_BYTES) {
        return Err(ApiError::invalid("File size exceeds the limit: 2147483648 bytes."));
    }
    let mime_type = header(headers, "x-goog-upload-header-content-type")
        .map(ToOwned::to_owned)
        .or_else(|| text(["mimeType", "mime_type"]))
        .unwrap_or_else(|| "application/octet-stream".to_owned());
    let mut inner = shared.lock();
    let name = name.filter(|_| inner.switches.honour_file_name);
    if name.as_ref().is_some_and(|n| inner.files.contains_key(n)) {
        return Err(ApiError::new(409, "ALREADY_EXISTS", "Requested entity already exists"));
    }
    let session = random_id(40);
    let upload = UploadRec {
        name,
        display_name,
        mime_type,
        expected: size,
        content: Vec::new(),
        project: caller.project.clone(),
        done: None,
    };
    inner.uploads.insert(session.clone(), upload);
    let url = format!("{}{path}?upload_id={session}&upload_protocol=resumable", shared.base_url);
    Ok(Answer::json(json!({})).header("x-goog-upload-url", &url).header("x-goog-upload-status", "active"))
}

/// Later calls of an upload.
pub(crate) fn command(
    shared: &Arc<Shared>,
    session: &str,
    headers: &HeaderMap,
    body: &Bytes,
    subject: &mut Subject,
) -> Result<Answer, ApiError> {
    let now = shared.now();
    let command = header(headers, "x-goog-upload-command").unwrap_or_default().to_ascii_lowercase();
    let mut inner = shared.lock();
    let Some(upload) = inner.uploads.get_mut(session) else {
        return Err(ApiError::not_found("The upload does not exist or has expired."));
    };
    subject.file.clone_from(&upload.name);
    let words: Vec<&str> = command.split(',').map(str::trim).collect();
    if words.contains(&"query") {
        let state = if upload.done.is_some() { "final" } else { "active" };
        let size = upload.content.len().to_string();
        let done = upload.done.clone();
        let answer = match done.and_then(|n| inner.files.get(&n).cloned()) {
            Some(file) => Answer::json(json!({"file": view(shared, &file)})),
            None => Answer::json(json!({})),
        };
        return Ok(answer.header("x-goog-upload-status", state).header("x-goog-upload-size-received", &size));
    }
    if words.contains(&"cancel") {
        inner.uploads.remove(session);
        return Ok(Answer::json(json!({})).header("x-goog-upload-status", "cancelled"));
    }
    if let Some(done) = upload.done.clone() {
        let file = inner.files.get(&done).map(|f| view(shared, f));
        return Ok(Answer::json(json!({"file": file})).header("x-goog-upload-status", "final"));
    }
    if words.contains(&"upload") {
        let offset: usize = header(headers, "x-goog-upload-offset")
            .and_then(|v| v.parse().ok())
            .ok_or_else(|| ApiError::invalid("Missing or invalid X-Goog-Upload-Offset"))?;
        // Bytes that are there already are passed over: the SDK sends a chunk again whose answer it can't read.
        let Some(known) = upload.content.len().checked_sub(offset) else {
            return Err(ApiError::invalid("The offset does not match what was received"));
        };
        upload.content.extend_from_slice(body.get(known..).unwrap_or_default());
    }
    if !words.contains(&"finalize") {
        return Ok(Answer::json(json!({})).header("x-goog-upload-status", "active"));
    }
    if upload.expected.is_some_and(|e| e != upload.content.len()) {
        return Err(ApiError::invalid("The size does not match what was announced"));
    }
    let name = upload.name.clone().unwrap_or_else(|| format!("files/{}", random_id(12)));
    let file = FileRec {
        name: name.clone(),
        display_name: upload.display_name.clone(),
        mime_type: upload.mime_type.clone(),
        sha256: hash(&upload.content),
        content: Bytes::from(std::mem::take(&mut upload.content)),
        project: upload.project.clone(),
        created: now,
    };
    upload.done = Some(name.clone());
    subject.file = Some(name.clone());
    let answer = view(shared, &file);
    inner.files.insert(name, file);
    Ok(Answer::json(json!({"file": answer})).header("x-goog-upload-status", "final"))
}

fn view(shared: &Shared, file: &FileRec) -> Value {
    let expires = file.created.checked_add(SignedDuration::from_hours(48)).unwrap_or(Timestamp::MAX);
    let mut view = json!({
        "name": file.name,
        "mimeType": file.mime_type,
        "sizeBytes": file.content.len().to_string(),
        "createTime": file.created.to_string(),
        "updateTime": file.created.to_string(),
        "expirationTime": expires.to_string(),
        "sha256Hash": STANDARD.encode(&file.sha256),
        "uri": format!("{}/v1beta/{}", shared.base_url, file.name),
        "state": "ACTIVE",
        "source": "UPLOADED",
    });
    if !file.display_name.is_empty() {
        view["displayName"] = json!(file.display_name);
    }
    view
}

/// A file that this caller may use: there, not expired, of its project.
pub(crate) fn usable<'a>(
    files: &'a std::collections::BTreeMap<String, FileRec>,
    name: &str,
    project: &str,
    now: Timestamp,
) -> Option<&'a FileRec> {
    files.get(name).filter(|f| {
        f.project == project && f.created.checked_add(SignedDuration::from_hours(48)).is_ok_and(|t| t > now)
    })
}

pub(crate) fn get(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    let id = name.trim_start_matches("files/");
    if id.starts_with("batch-") {
        return Ok(Answer::json(result_view(shared, id, &result(shared, caller, id)?)));
    }
    let inner = shared.lock();
    match usable(&inner.files, name, &caller.project, shared.now()) {
        Some(file) => Ok(Answer::json(view(shared, file))),
        None => Err(ApiError::no_file(id)),
    }
}

/// A result file.
struct ResultFile {
    content: Bytes,
    created: Timestamp,
    expires: Timestamp,
}

fn result(shared: &Shared, caller: &Caller, id: &str) -> Result<ResultFile, ApiError> {
    let now = shared.now();
    let mut inner = shared.lock();
    let life = SignedDuration::try_from_secs_f64(inner.switches.output_life_hours * 3600.0);
    let batch = inner.visible(id.trim_start_matches("batch-"), caller).map_err(|_| ApiError::no_file(id))?;
    let (Some(created), Some(content)) = (batch.ended, &batch.output) else {
        return Err(ApiError::no_file(id));
    };
    let expires = created.checked_add(life.unwrap_or(SignedDuration::MAX)).unwrap_or(Timestamp::MAX);
    let readable = batch.file.is_some() && batch.readable_from.is_none_or(|t| t <= now) && now < expires;
    if !readable {
        return Err(ApiError::no_file(id));
    }
    Ok(ResultFile { content: content.clone(), created, expires })
}

/// What GET shows of it.
fn result_view(shared: &Shared, id: &str, file: &ResultFile) -> Value {
    let ResultFile { content, created, expires } = file;
    let uri = format!("{}/v1beta/files/{id}", shared.base_url);
    json!({
        "name": format!("files/{id}"),
        "mimeType": "application/jsonl",
        "sizeBytes": content.len().to_string(),
        "createTime": created.to_string(),
        "updateTime": created.to_string(),
        "expirationTime": expires.to_string(),
        "sha256Hash": STANDARD.encode(hash(content)),
        "uri": uri,
        "downloadUri": format!("{uri}:download?alt=media"),
        "state": "ACTIVE",
        "source": "GENERATED",
    })
}

pub(crate) fn delete(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    let mut inner = shared.lock();
    let id = name.trim_start_matches("files/");
    if id.starts_with("batch-") && inner.switches.delete_output_refused {
        return Err(ApiError::invalid(
            "* DeleteFileRequest.name: the name of a file cannot be more than 40 characters",
        ));
    }
    if usable(&inner.files, name, &caller.project, shared.now()).is_none() {
        return Err(ApiError::no_file(id));
    }
    if let Some(file) = inner.files.remove(name)
        && !inner.switches.create_needs_file
    {
        inner.deleted_files.insert(name.to_owned(), file);
    }
    Ok(Answer::json(json!({})))
}

pub(crate) fn list(shared: &Shared, caller: &Caller, query: &[(String, String)]) -> Result<Answer, ApiError> {
    let inner = shared.lock();
    let now = shared.now();
    let mut all: Vec<&FileRec> = inner
        .files
        .values()
        .filter(|f| usable(&inner.files, &f.name, &caller.project, now).is_some())
        .collect();
    all.sort_by_key(|f| std::cmp::Reverse(f.created));
    let size = page_size(query, 10, 100).min(inner.switches.page_limit.max(1));
    let (page, next) = page_of(&all, size, inner.switches.empty_pages, query)?;
    let mut answer = json!({});
    if !page.is_empty() {
        answer["files"] = page.iter().map(|f| view(shared, f)).collect();
    }
    if let Some(next) = next {
        answer["nextPageToken"] = json!(next);
    }
    Ok(Answer::json(answer))
}

/// Result files only: uploads can't be downloaded.
pub(crate) fn download(shared: &Shared, caller: &Caller, name: &str) -> Result<Answer, ApiError> {
    let id = name.trim_start_matches("files/");
    if !id.starts_with("batch-") {
        let inner = shared.lock();
        return Err(match usable(&inner.files, name, &caller.project, shared.now()) {
            Some(_) => ApiError::invalid("Only files generated by the API can be downloaded."),
            None => ApiError::no_file(id),
        });
    }
    Ok(Answer::bytes("application/jsonl", result(shared, caller, id)?.content))
}
