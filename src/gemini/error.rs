//! What an answer that is no success means.
//!
//! Google's messages can quote prompts, so of a message only known, harmless parts are kept: codes, and
//! what a fixed list of phrases recognises.

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::Value;

/// An answer that is no success, or none at all.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    /// HTTP status, if there was an answer.
    code: Option<u16>,
    /// Google's canonical status, if the answer had Google's error envelope.
    status: Option<&'static str>,
    /// What the message was recognised as.
    hint: Option<Hint>,
    /// Lines that Google found wrong in an input file, at most [`MAX_LINES`].
    lines: Vec<LineError>,
    /// How long Google asks to wait.
    retry_after: Option<SignedDuration>,
    /// What happened on our side of the wire; never holds a URL, a body or a key.
    detail: String,
}

/// What a message was recognised as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// The API key is not valid.
    ApiKey,
    /// It speaks of a file that does not exist, or not for this key.
    File,
    /// It speaks of a model.
    Model,
    /// Something is too large.
    TooLarge,
    /// The location, billing or another setting of the project does not allow it.
    Precondition,
    /// It speaks of the webhook that was asked for.
    Webhook,
}

impl Hint {
    fn text(self) -> &'static str {
        match self {
            Self::ApiKey => "API key not valid",
            Self::File => "file not found or not permitted",
            Self::Model => "model not found or not supported",
            Self::TooLarge => "too large",
            Self::Precondition => "not allowed for this project",
            Self::Webhook => "no webhook can be had for it",
        }
    }
}

/// A line of an input file that Google refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    /// Number of the line, from 1.
    pub line: u64,
    /// What is wrong, from a fixed list.
    pub what: &'static str,
}

/// Lines that are kept of an answer.
const MAX_LINES: usize = 10;

impl Error {
    /// Something on our side of the wire. `detail` must not hold URLs, bodies or keys.
    pub(crate) fn local(detail: impl Into<String>) -> Self {
        Self {
            code: None,
            status: None,
            hint: None,
            lines: Vec::new(),
            retry_after: None,
            detail: detail.into(),
        }
    }

    /// There is no API key to ask with.
    #[must_use]
    pub fn no_key() -> Self {
        Self::local("there is no API key")
    }

    /// What was asked for exists, and is not for whoever asks: told like something that does not exist.
    #[must_use]
    pub fn not_theirs() -> Self {
        Self { code: Some(404), status: Some("NOT_FOUND"), ..Self::local("it does not belong to this job") }
    }

    /// A transport error, without the URL it happened at.
    pub(super) fn transport(error: reqwest::Error) -> Self {
        let kind = if error.is_timeout() {
            "timed out"
        } else if error.is_connect() {
            "could not connect"
        } else {
            "the connection broke"
        };
        let code = error.status().map(|s| s.as_u16());
        let error = error.without_url();
        let mut detail = kind.to_owned();
        let mut source: Option<&dyn std::error::Error> = std::error::Error::source(&error);
        while let Some(link) = source {
            detail = format!("{detail}: {link}");
            source = link.source();
        }
        Self { code, ..Self::local(detail) }
    }

    /// An answer with a status other than 200.
    pub(super) fn answer(code: u16, retry_after: Option<&str>, body: &[u8], now: Timestamp) -> Self {
        let mut error = Self { code: Some(code), ..Self::local("") };
        error.retry_after = retry_after.and_then(|v| parse_retry_after(v, now));
        let Some(envelope) = Envelope::parse(body) else {
            "without Google's error envelope".clone_into(&mut error.detail);
            return error;
        };
        error.status = Some(canonical(envelope.status.as_deref()));
        let message = envelope.message.unwrap_or_default();
        let reasons: Vec<&str> =
            envelope.details.iter().filter_map(|d| d.get("reason").and_then(Value::as_str)).collect();
        error.hint = recognise(error.status, &message, &reasons);
        error.lines = line_errors(&message);
        error.retry_after = error.retry_after.or_else(|| retry_info(&envelope.details));
        error
    }

    /// HTTP status of the answer; 0 if there was none.
    #[must_use]
    pub fn http_code(&self) -> u16 {
        self.code.unwrap_or(0)
    }

    /// Whether it is certain that the call had no effect: 400, 401, 403, 404 or 429 with Google's error
    /// envelope. Everything else that is no success is an *unknown outcome*.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        self.status.is_some() && matches!(self.code, Some(400 | 401 | 403 | 404 | 429))
    }

    /// A refusal for lack of quota.
    #[must_use]
    pub fn is_quota(&self) -> bool {
        self.is_refusal() && self.code == Some(429)
    }

    /// A refusal of the API key itself.
    #[must_use]
    pub fn is_credentials(&self) -> bool {
        self.is_refusal()
            && (self.code == Some(401)
                || self.hint == Some(Hint::ApiKey)
                || (self.code == Some(403) && self.hint != Some(Hint::File)))
    }

    /// What was asked for does not exist, or not for this key: Google answers 404, and for files 403.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.is_refusal()
            && (self.code == Some(404) || (self.code == Some(403) && self.hint == Some(Hint::File)))
    }

    /// Refused because of the state that the thing, or the project, is in.
    #[must_use]
    pub fn is_precondition(&self) -> bool {
        self.is_refusal() && self.status == Some("FAILED_PRECONDITION")
    }

    /// A batch was refused because of the webhook that was asked for with it.
    #[must_use]
    pub fn is_webhook(&self) -> bool {
        self.is_refusal() && self.code == Some(400) && self.hint == Some(Hint::Webhook)
    }

    /// What the message was recognised as.
    #[must_use]
    pub fn hint(&self) -> Option<Hint> {
        self.hint
    }

    /// Lines that Google found wrong in an input file.
    #[must_use]
    pub fn lines(&self) -> &[LineError] {
        &self.lines
    }

    /// How long Google asks to wait, if it does.
    #[must_use]
    pub fn retry_after(&self) -> Option<SignedDuration> {
        self.retry_after
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.status) {
            (Some(code), Some(status)) => write!(f, "HTTP {code} {status}")?,
            (Some(code), None) => write!(f, "HTTP {code}")?,
            (None, _) => f.write_str("no answer")?,
        }
        if let Some(hint) = self.hint {
            write!(f, ": {}", hint.text())?;
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        for line in &self.lines {
            write!(f, "; line {}: {}", line.line, line.what)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({self})")
    }
}

impl std::error::Error for Error {}

/// Google's error envelope.
#[derive(Deserialize)]
struct Envelope {
    status: Option<String>,
    message: Option<String>,
    details: Vec<Value>,
}

impl Envelope {
    /// `{"error":{…}}`, or an array with one such element.
    fn parse(body: &[u8]) -> Option<Self> {
        let mut value: Value = serde_json::from_slice(body).ok()?;
        if let Value::Array(list) = &mut value {
            if list.len() != 1 {
                return None;
            }
            value = list.remove(0);
        }
        let error = value.get("error")?.as_object()?;
        let text = |name: &str| error.get(name).and_then(Value::as_str).map(ToOwned::to_owned);
        let envelope = Self {
            status: text("status"),
            message: text("message"),
            details: error.get("details").and_then(Value::as_array).cloned().unwrap_or_default(),
        };
        (envelope.status.is_some() || error.get("code").is_some_and(Value::is_number)).then_some(envelope)
    }
}

/// Only names that Google documents are passed on.
fn canonical(status: Option<&str>) -> &'static str {
    const KNOWN: [&str; 16] = [
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
    ];
    status.and_then(|s| KNOWN.into_iter().find(|known| *known == s)).unwrap_or("UNKNOWN")
}

fn recognise(status: Option<&str>, message: &str, reasons: &[&str]) -> Option<Hint> {
    // A message about lines quotes the user's text: nothing else is read out of it.
    if message.contains("Error on line ") {
        return None;
    }
    let says = |text: &str| message.contains(text);
    if reasons.contains(&"API_KEY_INVALID") || says("API key not valid") || says("API key expired") {
        Some(Hint::ApiKey)
    } else if says("webhookConfig") || says("webhook_config") {
        // Before the others: it may name the batch, its model or its file beside it.
        Some(Hint::Webhook)
    } else if says("or it may not exist") || says("files/") || says("File ") {
        Some(Hint::File)
    } else if says("models/") || says("tunedModels/") {
        Some(Hint::Model)
    } else if says("exceeds the limit") || says("too large") {
        Some(Hint::TooLarge)
    } else if status == Some("FAILED_PRECONDITION") {
        Some(Hint::Precondition)
    } else {
        None
    }
}

/// `Error on line 7: …` for each line, of which only the number and a category are kept.
fn line_errors(message: &str) -> Vec<LineError> {
    const CATEGORIES: [(&str, &str); 6] = [
        ("no such field", "it has a field that Gemini does not know"),
        ("invalid JSON", "it is not valid JSON"),
        ("Invalid JSON", "it is not valid JSON"),
        ("required", "a field is missing"),
        ("missing", "a field is missing"),
        ("too large", "it is too large"),
    ];
    message
        .split("Error on line ")
        .skip(1)
        .take(MAX_LINES)
        .filter_map(|part| {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            let line = digits.parse().ok()?;
            let what = CATEGORIES
                .iter()
                .find(|(phrase, _)| part.contains(phrase))
                .map_or("Gemini refuses it", |c| c.1);
            Some(LineError { line, what })
        })
        .collect()
}

/// `google.rpc.RetryInfo`, if there is one: `"retryDelay": "17s"`.
fn retry_info(details: &[Value]) -> Option<SignedDuration> {
    let delay = details.iter().find_map(|d| d.get("retryDelay").and_then(Value::as_str))?;
    let seconds: f64 = delay.strip_suffix('s')?.parse().ok()?;
    bounded(SignedDuration::try_from_secs_f64(seconds).ok()?)
}

/// At most a day counts.
fn bounded(wait: SignedDuration) -> Option<SignedDuration> {
    wait.is_positive().then(|| wait.min(SignedDuration::from_hours(24)))
}

/// Seconds, or an HTTP date.
fn parse_retry_after(value: &str, now: Timestamp) -> Option<SignedDuration> {
    let wait = match value.trim().parse::<u32>() {
        Ok(seconds) => SignedDuration::from_secs(i64::from(seconds)),
        Err(_) => jiff::fmt::rfc2822::parse(value.trim()).ok()?.timestamp().duration_since(now),
    };
    bounded(wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn answer(code: u16, body: &Value) -> Error {
        Error::answer(code, None, body.to_string().as_bytes(), Timestamp::UNIX_EPOCH)
    }

    fn envelope(code: u16, status: &str, message: &str) -> Error {
        answer(code, &json!({"error": {"code": code, "status": status, "message": message}}))
    }

    #[test]
    fn only_the_five_codes_with_an_envelope_are_clean_refusals() {
        for code in [400, 401, 403, 404, 429] {
            assert!(envelope(code, "INVALID_ARGUMENT", "x").is_refusal(), "{code}");
            for body in [&b""[..], b"<html>", b"{}", b"{\"error\":\"x\"}", b"[]", b"{\"error\":{}}"] {
                assert!(
                    !Error::answer(code, None, body, Timestamp::UNIX_EPOCH).is_refusal(),
                    "{code} {body:?}"
                );
            }
        }
        for code in [301, 408, 409, 413, 499, 500, 502, 503, 504] {
            assert!(!envelope(code, "UNAVAILABLE", "x").is_refusal(), "{code}");
        }
        assert!(!Error::local("timed out").is_refusal());
        assert!(answer(429, &json!([{"error": {"code": 429}}])).is_quota());
    }

    #[test]
    fn refusals_are_told_apart() {
        let key = envelope(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.");
        assert!(key.is_credentials() && !key.is_absent());
        assert!(envelope(401, "UNAUTHENTICATED", "x").is_credentials());
        assert!(
            envelope(403, "PERMISSION_DENIED", "Generative Language API has not been used").is_credentials()
        );
        let file = envelope(
            403,
            "PERMISSION_DENIED",
            "You do not have permission to access the File abc or it may not exist.",
        );
        assert!(file.is_absent() && !file.is_credentials());
        let model = envelope(404, "NOT_FOUND", "models/nope is not found for API version v1beta");
        assert!(model.is_absent() && model.hint() == Some(Hint::Model));
        assert!(envelope(400, "FAILED_PRECONDITION", "User location is not supported").is_precondition());
    }

    #[test]
    fn lines_keep_their_number_and_lose_their_text() {
        let error = envelope(
            400,
            "INVALID_ARGUMENT",
            "Error on line 1: invalid JSON, near column 3: no such field: 'CANARY'\nError on line 12: CANARY",
        );
        assert_eq!(error.lines().iter().map(|l| l.line).collect::<Vec<_>>(), [1, 12]);
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("line 12") && !shown.contains("CANARY"), "{shown}");
    }

    #[test]
    fn waits_are_read_from_header_and_details() {
        let body = json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [
            {"@type": "type.googleapis.com/google.rpc.Help", "links": []},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "17.5s"}]}});
        assert_eq!(answer(429, &body).retry_after(), Some(SignedDuration::from_millis(17_500)));
        let with = |v: &str| Error::answer(429, Some(v), b"", Timestamp::UNIX_EPOCH).retry_after();
        assert_eq!(with("120"), Some(SignedDuration::from_secs(120)));
        assert_eq!(with("Thu, 01 Jan 1970 00:01:00 GMT"), Some(SignedDuration::from_secs(60)));
        for bad in ["", "-1", "soon", "0"] {
            assert_eq!(with(bad), None, "{bad}");
        }
    }

    #[test]
    fn envelopes_in_all_their_forms() {
        let error = json!({"code": 404, "status": "NOT_FOUND", "message": "x"});
        for body in [
            json!({"error": error}),
            json!([{"error": error}]),
            json!({"error": {"status": "NOT_FOUND"}}),
            json!({"error": {"code": 404}}),
            json!({"error": {"status": "NOT_FOUND", "message": 7, "details": "x"}}),
            json!({"error": {"status": "NEW_STATUS"}}),
        ] {
            assert!(answer(404, &body).is_absent(), "{body}");
        }
        for body in [
            json!([{"error": error}, {"error": error}]),
            json!([[{"error": error}]]),
            json!([]),
            json!({"error": [error]}),
            json!({"errors": error}),
            json!({"error": {"code": "404", "message": "x"}}),
            json!(null),
        ] {
            assert!(!answer(404, &body).is_refusal(), "{body}");
        }
    }

    #[test]
    fn only_documented_statuses_are_shown() {
        for status in ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DATA_LOSS"] {
            assert_eq!(envelope(400, status, "").to_string(), format!("HTTP 400 {status}"));
        }
        for status in ["CANARY", "invalid_argument", "", "NOT_FOUND "] {
            assert_eq!(envelope(400, status, "").to_string(), "HTTP 400 UNKNOWN", "{status:?}");
        }
    }

    #[test]
    fn messages_are_recognised_by_fixed_phrases() {
        for (code, status, message, expected) in [
            (400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", Some(Hint::ApiKey)),
            (400, "INVALID_ARGUMENT", "API key expired. Please renew the API key.", Some(Hint::ApiKey)),
            (
                403,
                "PERMISSION_DENIED",
                "You do not have permission to access the File x or it may not exist.",
                Some(Hint::File),
            ),
            (404, "NOT_FOUND", "files/x is not there", Some(Hint::File)),
            (404, "NOT_FOUND", "models/x is not found for API version v1beta", Some(Hint::Model)),
            (404, "NOT_FOUND", "tunedModels/x does not exist", Some(Hint::Model)),
            (
                400,
                "INVALID_ARGUMENT",
                "Request payload size exceeds the limit: 20971520 bytes.",
                Some(Hint::TooLarge),
            ),
            (
                400,
                "FAILED_PRECONDITION",
                "User location is not supported for the API use.",
                Some(Hint::Precondition),
            ),
            (
                400,
                "INVALID_ARGUMENT",
                "Invalid JSON payload received. Unknown name \"webhookConfig\" at 'batch': Cannot find field.",
                Some(Hint::Webhook),
            ),
            (
                400,
                "INVALID_ARGUMENT",
                "* batch.webhook_config: not supported for models/x with files/y",
                Some(Hint::Webhook),
            ),
            (400, "INVALID_ARGUMENT", "Error on line 1: no such field: 'webhookConfig'", None),
            (400, "INVALID_ARGUMENT", "Error on line 1: API key not valid, files/x, models/y", None),
            (429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", None),
        ] {
            assert_eq!(envelope(code, status, message).hint(), expected, "{message}");
        }
        let by_reason = json!({"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "x", "details": [
            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}});
        assert!(answer(400, &by_reason).is_credentials());
        // A refused line is not a refused key, whatever the line says.
        assert!(!envelope(400, "INVALID_ARGUMENT", "Error on line 1: API key not valid").is_credentials());
        let webhook = "Unknown name \"webhookConfig\" at 'batch': Cannot find field.";
        assert!(envelope(400, "INVALID_ARGUMENT", webhook).is_webhook());
        for (code, status) in [(404, "NOT_FOUND"), (429, "RESOURCE_EXHAUSTED"), (500, "INTERNAL")] {
            assert!(!envelope(code, status, webhook).is_webhook(), "{code}");
        }
        // Not a refusal: not a statement about the key, the file or the quota either.
        let odd = envelope(500, "FAILED_PRECONDITION", "API key not valid");
        assert!(!odd.is_credentials() && !odd.is_absent() && !odd.is_quota() && !odd.is_precondition());
    }

    #[test]
    fn categories_of_lines_are_from_a_list() {
        let of = |text: &str| {
            envelope(400, "INVALID_ARGUMENT", &format!("Error on line 3: {text}")).lines()[0].what
        };
        assert_eq!(
            of("invalid JSON, near column 1032: no such field: 'x'"),
            "it has a field that Gemini does not know"
        );
        assert_eq!(of("Invalid JSON payload"), "it is not valid JSON");
        assert_eq!(of("contents is required"), "a field is missing");
        assert_eq!(of("something new"), "Gemini refuses it");
        let many: String = (1..=50).fold(String::new(), |all, n| format!("{all}Error on line {n}: x\n"));
        assert_eq!(envelope(400, "INVALID_ARGUMENT", &many).lines().len(), MAX_LINES);
        for odd in ["Error on line x: y", "Error on line ", "Error on line 99999999999999999999999: y"] {
            assert!(envelope(400, "INVALID_ARGUMENT", odd).lines().is_empty(), "{odd}");
        }
    }

    #[test]
    fn waits_are_bounded_and_the_header_wins() {
        let now = Timestamp::UNIX_EPOCH;
        let info = |delay: &str| json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": delay}]}});
        let with = |header: Option<&str>, delay: &str| {
            Error::answer(429, header, info(delay).to_string().as_bytes(), now).retry_after()
        };
        let seconds = |s| Some(SignedDuration::from_secs(s));
        assert_eq!(with(Some("5"), "60s"), seconds(5));
        assert_eq!(with(Some("soon"), "60s"), seconds(60));
        assert_eq!(with(Some("4294967295"), "1s"), seconds(86_400));
        assert_eq!(with(Some("Fri, 01 Jan 2100 00:00:00 GMT"), "1s"), seconds(86_400));
        assert_eq!(
            with(Some("Wed, 31 Dec 1969 23:59:59 GMT"), "1s"),
            seconds(1),
            "a date that has passed says nothing"
        );
        assert_eq!(with(None, "999999999s"), seconds(86_400));
        for odd in ["-1s", "0s", "NaNs", "infs", "1e400s", "17", "", "s", "1m"] {
            assert_eq!(with(None, odd), None, "{odd}");
        }
    }

    proptest! {
        #[test]
        fn no_text_of_an_answer_is_ever_shown(code in 100u16..600, text in "CANARY[ -~]{0,80}", status in "\\PC{0,20}") {
            let text = text.replace("Error on line", "");
            for body in [text.clone(), json!({"error": {"code": code, "status": status, "message": text}}).to_string()] {
                let error = Error::answer(code, None, body.as_bytes(), Timestamp::UNIX_EPOCH);
                let shown = format!("{error} {error:?}");
                prop_assert!(!shown.contains("CANARY"));
            }
        }

        #[test]
        fn any_body_is_survived(code in 100u16..600, body in proptest::collection::vec(any::<u8>(), 0..200), after in "\\PC{0,30}") {
            let _ = Error::answer(code, Some(&after), &body, Timestamp::UNIX_EPOCH).to_string();
        }
    }
}
