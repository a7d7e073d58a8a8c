//! What an answer that is no success means. Pure: no client required.
//!
//! Codes from a fixed list are passed on, texts never: a store's answer may quote a key id, a policy or a whole request.

use std::error::Error as _;

use super::endpoint::Forbidden;

/// What somebody has to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The job has to be changed.
    Invalid,
    /// An administrator has to allow it, or the job has to be changed.
    NotAllowed,
    /// The Secret holds no credentials for this store.
    Credentials,
    /// The store refuses the credentials.
    Denied,
    /// The object or the bucket does not exist.
    NotFound,
    /// It is more than allowed.
    TooLarge,
    /// The object is not the one any more that was seen before.
    Changed,
    /// Something else is in the way, which is not overwritten.
    Conflict,
    /// Nobody: it is tried again.
    Unavailable,
}

/// What went wrong, and what to change. Holds no secret and no text of an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What somebody has to do about it.
    pub kind: Kind,
    message: String,
}

impl Error {
    /// An error.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Codes of S3, Cloud Storage and Blob Storage that say what is wrong with credentials.
const DENIED: [&str; 17] = [
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AccountProblem",
    "AllAccessDisabled",
    "AuthenticationFailed",
    "AuthorizationPermissionMismatch",
    "AuthorizationFailure",
    "InsufficientAccountPermissions",
    "invalid_grant",
    "invalid_client",
    "unauthorized_client",
    "RequestTimeTooSkewed",
    "AccessDenied",
    "XAdminUserNotFound", // Versity's gateway: no such key
];

/// What was to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// An object was to be read.
    #[default]
    Read,
    /// An object was to be written.
    Write,
}

const NO_BUCKET: [&str; 4] =
    ["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist", "bucket does not exist"];

/// What the whole chain of an error says, for looking up codes in it. Never shown.
fn chain(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text.push('\n');
        text.push_str(&e.to_string());
        source = e.source();
    }
    text
}

fn forbidden(error: &object_store::Error) -> Option<Forbidden> {
    let mut source = error.source();
    while let Some(e) = source {
        if let Some(forbidden) = e.downcast_ref::<Forbidden>() {
            return Some(forbidden.clone());
        }
        source = e.source();
    }
    None
}

/// Whether it says more than its status code.
pub(super) fn says_more(error: &object_store::Error) -> bool {
    let text = chain(error);
    DENIED.iter().chain(&NO_BUCKET).any(|code| text.contains(code))
}

/// Whether the object does not exist, though its bucket does.
pub(super) fn is_absent(error: &object_store::Error) -> bool {
    if !matches!(error, object_store::Error::NotFound { .. }) {
        return false;
    }
    let text = chain(error);
    !NO_BUCKET.iter().any(|code| text.contains(code))
}

/// Whether the store does not know what to write on a condition means.
pub(super) fn knows_no_conditions(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::NotImplemented { .. })
        || status(&chain(error)) == Some(501)
        || chain(error).contains("NotImplemented")
}

/// The answer to a request about `uri`, sent to `host` because of what stands in `field`.
pub(super) fn of(error: &object_store::Error, host: &str, uri: &str, field: &str, purpose: Purpose) -> Error {
    let reads = purpose == Purpose::Read;
    if let Some(forbidden) = forbidden(error) {
        return forbidden.explain(field);
    }
    let text = chain(error);
    let denied = |status: &str| {
        let code = DENIED.iter().find(|code| text.contains(*code)).unwrap_or(&status);
        Error::new(
            Kind::Denied,
            format!(
                "{host} refuses access to {uri} ({code}): put valid credentials into the Secret that \
                 {field}.credentialsRef names, or allow those that are there to {}",
                if reads {
                    "read it (and to list the bucket, for a prefix)"
                } else {
                    "read and write objects below that place"
                }
            ),
        )
    };
    let named = DENIED.iter().any(|code| text.contains(code));
    let no_bucket = NO_BUCKET.iter().any(|code| text.contains(code));
    match error {
        object_store::Error::NotFound { .. } if no_bucket || !reads => Error::new(
            Kind::NotFound,
            format!("the bucket of {uri} does not exist: create it, or correct {field}"),
        ),
        // Some servers say that they don't know the key by a 404.
        object_store::Error::NotFound { .. } if named => denied("HTTP 404"),
        object_store::Error::NotFound { .. } => Error::new(
            Kind::NotFound,
            format!("{uri} does not exist: put the object there, or correct {field}"),
        ),
        object_store::Error::PermissionDenied { .. } => denied("HTTP 403"),
        object_store::Error::Unauthenticated { .. } => denied("HTTP 401"),
        object_store::Error::Precondition { .. } | object_store::Error::NotModified { .. } => {
            Error::new(Kind::Changed, format!("{uri} was changed while it was read"))
        }
        object_store::Error::InvalidPath { .. } => Error::new(
            Kind::Invalid,
            format!(
                "{uri} has an object whose name has \".\", \"..\" or nothing between two slashes: rename it"
            ),
        ),
        _ if text.contains("Received redirect without LOCATION")
            || text.contains("PermanentRedirect")
            || text.contains("AuthorizationHeaderMalformed") =>
        {
            Error::new(
                Kind::Invalid,
                format!(
                    "{host} says that the bucket of {uri} is in another region: set {field}.region to its own"
                ),
            )
        }
        _ if named => denied("refused"),
        _ => {
            let (kind, what) = passing(&text);
            let more = if kind == Kind::Invalid {
                format!("; check {field}")
            } else {
                "; it is tried again".to_owned()
            };
            let done = if reads { "read" } else { "written to" };
            Error::new(kind, format!("{host} can't be {done} ({what}){more}"))
        }
    }
}

/// In a few words of our own.
fn passing(text: &str) -> (Kind, String) {
    if let Some(status) = status(text) {
        // What a store does not understand, it will not understand the next time; nor will it be where it says it is not.
        let kind = if (300..500).contains(&status) && ![408, 425, 429].contains(&status) {
            Kind::Invalid
        } else {
            Kind::Unavailable
        };
        let elsewhere =
            if (300..400).contains(&status) { ", which leads elsewhere and is not followed" } else { "" };
        return (kind, format!("HTTP {status}{elsewhere}"));
    }
    let lower = text.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|w| lower.contains(w));
    // Not "timeout": `object_store` tells of its own settings.
    let what = if says(&["timed out"]) {
        "it does not answer in time"
    } else if says(&["dns error", "failed to lookup", "name or service not known"]) {
        "its name can't be resolved"
    } else if says(&["certificate", "tls handshake", "handshakefailure"]) {
        "no secure connection can be made"
    } else if says(&["connection refused", "error trying to connect", "tcp connect"]) {
        "it can't be connected to"
    } else {
        "the connection broke off"
    };
    (Kind::Unavailable, what.to_owned())
}

/// The status code, in the words of `object_store`.
fn status(text: &str) -> Option<u16> {
    let after = text.split("non-2xx status code: ").nth(1)?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// A store that can't be opened with what the Secret, or the pod, has.
pub(super) fn of_settings(_: &object_store::Error, secret: Option<&str>) -> Error {
    match secret {
        Some(name) => Error::new(
            Kind::Credentials,
            format!("what Secret {name} holds can't be used: see docs/inputs-and-results.md"),
        ),
        None => Error::new(
            Kind::NotAllowed,
            "the operator's own identity is not set up for this store: an administrator has to see to that, or name a \
             Secret in credentialsRef",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: text.to_owned().into() }
    }

    fn told(error: &object_store::Error) -> (Kind, String) {
        let e = of(error, "the store at http://x", "s3://b/k", "spec.input.objectStore", Purpose::Read);
        (e.kind, e.to_string())
    }

    #[test]
    fn answers_are_told_apart_and_never_quoted() {
        let canary = "CANARY-AKIA";
        let status = |code: &str| {
            generic(&format!("Server returned non-2xx status code: {code}: <Key>{canary}</Key>"))
        };
        let permission = |text: &str| object_store::Error::PermissionDenied {
            path: "k".into(),
            source: format!("{text} {canary}").into(),
        };
        let missing = |text: &str| object_store::Error::NotFound {
            path: "k".into(),
            source: format!("{text} {canary}").into(),
        };
        for (error, kind, says) in [
            (status("503 Service Unavailable"), Kind::Unavailable, "HTTP 503"),
            (status("500 Internal Server Error"), Kind::Unavailable, "HTTP 500"),
            (status("308 Permanent Redirect"), Kind::Invalid, "HTTP 308, which leads elsewhere"),
            (status("429 Too Many Requests"), Kind::Unavailable, "HTTP 429"),
            (status("400 Bad Request"), Kind::Invalid, "HTTP 400"),
            (status("400 Bad Request: ExpiredToken"), Kind::Denied, "ExpiredToken"),
            (status("400: AuthorizationHeaderMalformed"), Kind::Invalid, "region"),
            (generic(&format!("operation timed out {canary}")), Kind::Unavailable, "in time"),
            (generic(&format!("Connection refused {canary}")), Kind::Unavailable, "connected"),
            (generic(&format!("dns error {canary}")), Kind::Unavailable, "resolved"),
            (generic("max_retries: 2, retry_timeout: 30s - closed"), Kind::Unavailable, "broke off"),
            (generic(canary), Kind::Unavailable, "broke off"),
            (permission("InvalidAccessKeyId"), Kind::Denied, "InvalidAccessKeyId"),
            (permission("odd"), Kind::Denied, "HTTP 403"),
            (missing("NoSuchBucket"), Kind::NotFound, "the bucket of s3://b/k does not exist"),
            (missing("InvalidAccessKeyId"), Kind::Denied, "InvalidAccessKeyId"),
            (missing("NoSuchKey"), Kind::NotFound, "s3://b/k does not exist"),
        ] {
            let (found, message) = told(&error);
            assert_eq!(found, kind, "{message}");
            assert!(message.contains(says) && !message.contains("CANARY"), "{message}");
        }
    }
}
