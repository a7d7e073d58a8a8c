//! The body of a delivery. Input: the body.
#![no_main]

use gemini_batch_callback::callback::event::{Event, EventType};
use gemini_batch_fuzz as common;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|body: &[u8]| {
    let event = Event::read(body);
    let json: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    assert_eq!(Event::read(body), event);

    if let Some(id) = &event.batch_id {
        assert!((1..=64).contains(&id.len()) && common::is_plain(id), "{id:?}");
        let said = json["data"]["id"].as_str().expect("an id comes from where ids are");
        assert!(said == id || said == format!("batches/{id}"), "{said:?} became {id:?}");
    }
    if let Some(time) = event.time {
        // what the API server takes: a year of four digits
        assert!((946_684_800..4_102_444_800).contains(&time.as_second()));
        assert_eq!(time.to_string().parse::<jiff::Timestamp>().ok(), Some(time));
        assert!(json["timestamp"].is_string());
    }
    let words = ["batch.succeeded", "batch.failed", "batch.expired", "batch.cancelled", "unknown"];
    assert!(words.contains(&event.kind.as_str()));
    if event.kind != EventType::Unknown {
        let said = json["type"].as_str().expect("a type comes from where types are");
        assert!(said == event.kind.as_str() || said == "batch.completed");
    }

    let unsigned = Event::read_unsigned(body);
    assert_eq!(unsigned, Event { time: None, batch_id: None, ..event });
});
