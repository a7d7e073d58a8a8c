//! What the body of a delivery says, as far as anybody needs it: a type for people, an event time, a batch id.
//!
//! Read leniently. The token already names the job and attempt, so a delivery whose body cannot be read is still
//! a hint that something happened; and nothing here decides anything, since one authenticated GET does.

use jiff::Timestamp;
use serde_json::Value;

/// The largest body that the receiver reads. Events are a few hundred bytes.
pub const MAX_BODY: usize = 64 * 1024;
const MAX_BATCH_ID_LEN: usize = 64;
/// An event time outside these (2000 to 2100) is not one; and the API server refuses years beyond 9999.
const TIMES: std::ops::Range<i64> = 946_684_800..4_102_444_800;

/// What happened, in the spelling of the current guide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// `batch.succeeded`, which the launch guide spelled `batch.completed`.
    Succeeded,
    /// `batch.failed`
    Failed,
    /// `batch.expired`
    Expired,
    /// `batch.cancelled`: documented in places, never seen.
    Cancelled,
    /// Anything else, and a body that cannot be read.
    Unknown,
}

impl EventType {
    /// The word for `status.callback.type` and for metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "batch.succeeded",
            Self::Failed => "batch.failed",
            Self::Expired => "batch.expired",
            Self::Cancelled => "batch.cancelled",
            Self::Unknown => "unknown",
        }
    }

    fn read(text: &str) -> Self {
        match text {
            "batch.succeeded" | "batch.completed" => Self::Succeeded,
            "batch.failed" => Self::Failed,
            "batch.expired" => Self::Expired,
            "batch.cancelled" => Self::Cancelled,
            _ => Self::Unknown,
        }
    }
}

/// The envelope of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventType,
    /// When, as the sender says.
    pub time: Option<Timestamp>,
    /// The batch it is about, without `batches/`. Safe to put into a URL.
    pub batch_id: Option<String>,
}

impl Event {
    /// Reads a body. Whatever is missing or strange is left out.
    #[must_use]
    pub fn read(body: &[u8]) -> Self {
        let envelope: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let text = |value: &'_ Value| value.as_str().map(str::to_owned);
        Self {
            kind: envelope["type"].as_str().map_or(EventType::Unknown, EventType::read),
            time: text(&envelope["timestamp"])
                .and_then(|t| t.parse::<Timestamp>().ok())
                .filter(|t| TIMES.contains(&t.as_second())),
            batch_id: envelope["data"]["id"].as_str().and_then(batch_id).map(str::to_owned),
        }
    }

    /// The same for a delivery whose signature does not cover the body: ids and times in it prove nothing.
    #[must_use]
    pub fn read_unsigned(body: &[u8]) -> Self {
        Self { time: None, batch_id: None, ..Self::read(body) }
    }
}

/// `^(batches/)?[A-Za-z0-9_-]{1,64}$`, without the prefix.
fn batch_id(text: &str) -> Option<&str> {
    let id = text.strip_prefix("batches/").unwrap_or(text);
    let plain = (1..=MAX_BATCH_ID_LEN).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    plain.then_some(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Event {
        Event::read(&serde_json::to_vec(value).unwrap())
    }

    #[test]
    fn reads_the_envelope_of_the_guide() {
        let event = read(&json!({
            "type": "batch.succeeded", "version": "v1", "timestamp": "2026-09-01T10:00:00Z",
            "data": {"id": "batch_123456", "output_file_uri": "gs://x"}
        }));
        assert_eq!(event.kind, EventType::Succeeded);
        assert_eq!(event.time, Some("2026-09-01T10:00:00Z".parse().unwrap()));
        assert_eq!(event.batch_id.as_deref(), Some("batch_123456"));
    }

    #[test]
    fn the_limit_that_the_receiver_and_its_documentation_share() {
        assert_eq!(MAX_BODY, 65_536);
    }

    #[test]
    fn types_in_all_their_spellings() {
        for (text, kind, word) in [
            ("batch.succeeded", EventType::Succeeded, "batch.succeeded"),
            ("batch.completed", EventType::Succeeded, "batch.succeeded"),
            ("batch.failed", EventType::Failed, "batch.failed"),
            ("batch.expired", EventType::Expired, "batch.expired"),
            ("batch.cancelled", EventType::Cancelled, "batch.cancelled"),
            ("interaction.completed", EventType::Unknown, "unknown"),
            ("", EventType::Unknown, "unknown"),
        ] {
            let event = read(&json!({"type": text}));
            assert_eq!((event.kind, event.kind.as_str()), (kind, word));
        }
    }

    #[test]
    fn ids_are_plain_or_dropped() {
        let id = |text: &str| read(&json!({"data": {"id": text}})).batch_id;
        for good in ["b", "batch_123456", "a-B_9", &"x".repeat(64)] {
            assert_eq!(id(good).as_deref(), Some(good));
            assert_eq!(id(&format!("batches/{good}")).as_deref(), Some(good));
        }
        for bad in [
            "",
            "batches/",
            "batches/batches/x",
            "../x",
            "batches/../files/x",
            "a/b",
            "%2e%2e",
            "x\n",
            "x y",
            "ä",
            "a.b",
            "a?b",
            "a:cancel",
            "models/x",
            &"x".repeat(65),
            &format!("batches/{}", "x".repeat(65)),
        ] {
            assert_eq!(id(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        let nothing = Event { kind: EventType::Unknown, time: None, batch_id: None };
        for body in [
            &b""[..],
            b"{",
            b"null",
            b"[]",
            b"7",
            b"\"x\"",
            &[0xff, 0xfe],
            b"{\"type\":7,\"data\":[],\"timestamp\":1}",
        ] {
            assert_eq!(Event::read(body), nothing);
        }
        let event = read(&json!({"type": 7, "timestamp": "yesterday", "data": {"id": "b"}}));
        assert_eq!(event, Event { batch_id: Some("b".into()), ..nothing });
        for (text, ok) in [
            ("2000-01-01T00:00:00Z", true),
            ("1999-12-31T23:59:59Z", false),
            ("2099-12-31T23:59:59.999999999Z", true),
            ("2100-01-01T00:00:00Z", false),
            ("-009999-01-01T00:00:00Z", false),
            ("2026-09-01T12:00:00.5+02:00", true),
            ("2026-09-01", false),
        ] {
            assert_eq!(read(&json!({"timestamp": text})).time.is_some(), ok, "{text}");
        }
    }

    #[test]
    fn an_unsigned_body_gives_no_ids_and_no_times() {
        let body = br#"{"type":"batch.failed","timestamp":"2026-09-01T10:00:00Z","data":{"id":"b"}}"#;
        let expected = Event { kind: EventType::Failed, time: None, batch_id: None };
        assert_eq!(Event::read_unsigned(body), expected);
    }

    proptest! {
        #[test]
        fn nothing_panics_and_ids_are_always_plain(bytes: Vec<u8>, id in ".{0,80}") {
            let _ = Event::read(&bytes);
            if let Some(id) = read(&json!({"data": {"id": id}})).batch_id {
                prop_assert!(id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
            }
        }
    }
}
