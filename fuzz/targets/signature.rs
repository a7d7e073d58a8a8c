//! The three headers and the body of a delivery. Input: `webhook-id`, `webhook-timestamp` and `webhook-signature`,
//! each ended by a line feed, then the body.
#![no_main]

use std::sync::LazyLock;

use gemini_batch_callback::callback::jwks::KeySet;
use gemini_batch_callback::callback::signature::{HmacSecret, MAX_ENTRIES};
use gemini_batch_callback::callback::{Accepted, Delivery, Keys, Policy, Refusal, check_headers, verify};
use gemini_batch_fuzz as common;
use http::{HeaderMap, HeaderValue};
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;

static PUBLIC: LazyLock<KeySet> = LazyLock::new(common::public_keys);
static SECRETS: LazyLock<[HmacSecret; 1]> = LazyLock::new(common::secrets);
static POLICY: LazyLock<Policy> = LazyLock::new(common::policy);

fuzz_target!(|input: &[u8]| {
    let mut body = input;
    let [id, timestamp, signature] = [(); 3].map(|()| common::part(&mut body));
    let given = Delivery { id, timestamp, signature, body };

    nothing_passes_that_was_not_signed(&given);
    what_is_signed_passes_and_only_then(&given);
    through_headers(&given);
});

fn judge(delivery: &Delivery<'_>, now: i64) -> Result<Accepted, Refusal> {
    judge_from(0, delivery, now)
}

/// Begins with the Ed25519 key at `first`.
fn judge_from(first: usize, delivery: &Delivery<'_>, now: i64) -> Result<Accepted, Refusal> {
    let verdict =
        verify(delivery, &Keys { public: Some(&PUBLIC), secrets: &*SECRETS, first }, &POLICY, at(now));
    if let Ok(accepted) = &verdict {
        common::check_accepted(accepted);
    }
    verdict
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
}

/// All signatures that exist for these keys are the vectors'.
fn nothing_passes_that_was_not_signed(given: &Delivery<'_>) {
    let verdict = judge(given, common::T);
    // which key is tried first changes nothing but the time it takes
    assert_eq!(judge_from(usize::MAX, given, common::T), verdict);
    if verdict.is_ok() {
        assert_eq!((given.id, given.timestamp, given.body), (common::ID, common::SENT, common::BODY));
        let vectors = [common::VECTOR_A, common::VECTOR_D, common::VECTOR_E];
        assert!(
            entries(given.signature).take(MAX_ENTRIES).any(|e| vectors.iter().any(|v| v.as_bytes() == e))
        );
    }
}

/// The fuzzer cannot sign, so we do, and put the good entry behind whatever it wrote.
fn what_is_signed_passes_and_only_then(given: &Delivery<'_>) {
    let well_formed = id_is_good(given.id) && timestamp_is_good(given.timestamp);
    let sent: i64 = std::str::from_utf8(given.timestamp).ok().and_then(|t| t.parse().ok()).unwrap_or(0);
    let others = entries(given.signature).count();
    for good in [
        common::sign_v1a(given.id, given.timestamp, given.body),
        common::sign_v1(given.id, given.timestamp, given.body),
    ] {
        let signature = [given.signature, b" ", good.as_bytes()].concat();
        let delivery = Delivery { signature: &signature, ..*given };
        // whole hours past the year 9999 are no time of ours
        let now = sent.min(253_402_200_000);
        let expected = well_formed && sent == now && others < MAX_ENTRIES;
        let verdict = judge(&delivery, now);
        let by_itself = judge(given, now).is_ok();
        assert_eq!(verdict.is_ok(), expected || by_itself, "{verdict:?}");
        if !expected || by_itself {
            continue;
        }
        let accepted = verdict.expect("just looked");
        // a second delivery of the same event is recognised, whenever it is sent and whatever it carries
        let again = common::sign_v1a(given.id, b"1614265330", b"another body");
        let again = Delivery {
            timestamp: b"1614265330",
            signature: again.as_bytes(),
            body: b"another body",
            ..*given
        };
        let again = judge(&again, common::T).expect("signed");
        assert_eq!((again.replay_key, &again.hint_id), (accepted.replay_key, &accepted.hint_id));
        // the window ends where it says; without the signatures, which are most of the time
        for (age, inside) in [(93_600, true), (93_601, false), (-300, true), (-301, false)] {
            if (0..253_402_200_000).contains(&(now + age)) {
                assert_eq!(check_headers(&delivery, &POLICY, at(now + age)).is_ok(), inside, "{age}");
            }
        }
        // a body that is one byte longer is another message
        let longer = [given.body, b"."].concat();
        assert!(judge(&Delivery { body: &longer, ..delivery }, now).is_err());
    }
}

/// Headers give the same verdict as their bytes, and one that is there twice none.
fn through_headers(given: &Delivery<'_>) {
    let values = [given.id, given.timestamp, given.signature].map(HeaderValue::from_bytes);
    let [Ok(id), Ok(timestamp), Ok(signature)] = values else { return };
    let mut headers = HeaderMap::new();
    headers.insert("webhook-id", id);
    headers.insert("webhook-timestamp", timestamp);
    headers.insert("webhook-signature", signature);
    let verdict = |h: &HeaderMap| Delivery::from_headers(h, given.body).and_then(|d| judge(&d, common::T));
    assert_eq!(verdict(&headers), judge(given, common::T));
    for name in ["webhook-id", "webhook-timestamp", "webhook-signature"] {
        let mut twice = headers.clone();
        twice.append(name, headers[name].clone());
        assert_eq!(verdict(&twice), Err(Refusal::HeaderRepeated(name)));
    }
}

fn entries(signature: &[u8]) -> impl Iterator<Item = &[u8]> {
    signature.split(|b| *b == b' ').filter(|e| !e.is_empty())
}

// what the specification says, in other words than the code's

fn id_is_good(id: &[u8]) -> bool {
    !id.is_empty() && id.len() <= 256 && id.iter().all(|b| (0x21..=0x7e).contains(b) && !b".,".contains(b))
}

fn timestamp_is_good(text: &[u8]) -> bool {
    (1..=12).contains(&text.len()) && text[0] != b'0' && text.iter().all(|b| (b'0'..=b'9').contains(b))
}
