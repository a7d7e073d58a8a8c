//! Google's error envelope, and the errors that the simulator answers with.

use serde_json::{Value, json};

/// One refusal: what goes into `{"error": {…}}`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) code: u16,
    pub(crate) status: String,
    pub(crate) message: String,
    pub(crate) details: Option<Value>,
}

impl ApiError {
    pub(crate) fn new(code: u16, status: &str, message: impl Into<String>) -> Self {
        Self { code, status: status.to_owned(), message: message.into(), details: None }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(400, "INVALID_ARGUMENT", message)
    }

    pub(crate) fn precondition(message: impl Into<String>) -> Self {
        Self::new(400, "FAILED_PRECONDITION", message)
    }

    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self::new(403, "PERMISSION_DENIED", message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(404, "NOT_FOUND", message)
    }

    /// The 429 of batches: a lone `Help`, neither `RetryInfo` nor `QuotaFailure`.
    pub(crate) fn exhausted() -> Self {
        let mut error = Self::new(429, "RESOURCE_EXHAUSTED", default_message(429));
        error.details = Some(help());
        error
    }

    /// A file that is gone, expired or somebody else's looks the same: 403, not 404.
    pub(crate) fn no_file(id: &str) -> Self {
        Self::denied(format!("You do not have permission to access the File {id} or it may not exist."))
    }

    pub(crate) fn no_entity() -> Self {
        Self::not_found("Requested entity was not found.")
    }

    pub(crate) fn bad_key() -> Self {
        let mut error = Self::invalid("API key not valid. Please pass a valid API key.");
        error.details = Some(json!([{
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": "API_KEY_INVALID",
            "domain": "googleapis.com",
            "metadata": {"service": "generativelanguage.googleapis.com"},
        }]));
        error
    }

    pub(crate) fn no_key() -> Self {
        Self::denied(
            "Method doesn't allow unregistered callers (callers without established identity). \
             Please use API Key or other form of API consumer identity to call this API.",
        )
    }

    pub(crate) fn envelope(&self) -> Value {
        let mut error = json!({"code": self.code, "message": self.message, "status": self.status});
        if let (Some(details), Some(object)) = (&self.details, error.as_object_mut()) {
            object.insert("details".to_owned(), details.clone());
        }
        json!({ "error": error })
    }
}

/// The details that a captured 429 of the batch service held.
pub(crate) fn help() -> Value {
    json!([{
        "@type": "type.googleapis.com/google.rpc.Help",
        "links": [{
            "description": "Learn more about Gemini API quotas",
            "url": "https://ai.google.dev/gemini-api/docs/rate-limits",
        }],
    }])
}

/// The canonical status word of an HTTP code.
pub(crate) fn default_status(code: u16) -> &'static str {
    match code {
        400 => "INVALID_ARGUMENT",
        401 => "UNAUTHENTICATED",
        403 => "PERMISSION_DENIED",
        404 => "NOT_FOUND",
        409 => "ALREADY_EXISTS",
        429 => "RESOURCE_EXHAUSTED",
        499 => "CANCELLED",
        500 => "INTERNAL",
        501 => "UNIMPLEMENTED",
        503 => "UNAVAILABLE",
        504 => "DEADLINE_EXCEEDED",
        _ => "UNKNOWN",
    }
}

/// A message as Google words it for that code.
pub(crate) fn default_message(code: u16) -> &'static str {
    match code {
        429 => {
            "You exceeded your current quota, please check your plan and billing details. For more information \
             on this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits."
        }
        500 => {
            "An internal error has occurred. Please retry or report in https://developers.generativeai.google/guide/troubleshooting"
        }
        503 => "The model is overloaded. Please try again later.",
        504 => "The request timed out. Please try again.",
        _ => "The simulator was told to answer so.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quota_error_holds_only_help() {
        let envelope = ApiError::exhausted().envelope();
        assert_eq!(envelope["error"]["code"], 429);
        assert_eq!(envelope["error"]["status"], "RESOURCE_EXHAUSTED");
        let details = envelope["error"]["details"].as_array().unwrap();
        assert_eq!(details.len(), 1);
        assert_eq!(details[0]["@type"], "type.googleapis.com/google.rpc.Help");
    }

    #[test]
    fn plain_errors_carry_no_details() {
        let envelope = ApiError::no_entity().envelope();
        assert_eq!(
            envelope,
            json!({"error": {"code": 404, "message": "Requested entity was not found.", "status": "NOT_FOUND"}})
        );
    }
}
