//! The token of a callback URL, and the key ring. Input: namespace, name and UID, each ended by a line feed, then
//! the token. An input that begins with `{` is a stored key ring as well.
#![no_main]

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use gemini_batch_callback::callback::keyring::{KeyRing, MAX_KEYS};
use gemini_batch_callback::callback::token::{JobRef, Token, callback_url};
use gemini_batch_fuzz as common;
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;
use url::Url;

/// Two keys: `k1` signs before 2001, `k2` after.
const RING: &[u8] = br#"{"version":1,"clusterId":"fuzz",
    "fingerprintKey":"AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=",
    "keys":[{"id":"k1","secret":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","created":"2000-01-01T00:00:00Z"},
            {"id":"k2","secret":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=","created":"2001-01-01T00:00:00Z"}]}"#;

static BOTH: LazyLock<KeyRing> = LazyLock::new(|| KeyRing::parse(RING).expect("a good ring"));
static EXTERNAL: LazyLock<Url> = LazyLock::new(|| Url::parse("https://h.example/gbo/").expect("a URL"));

fuzz_target!(|input: &[u8]| {
    if input.starts_with(b"{") {
        a_stored_ring(input);
    }
    let Ok(input) = std::str::from_utf8(input) else { return };
    let mut parts = input.splitn(4, '\n');
    let [namespace, name, uid, token] = [(); 4].map(|()| parts.next().unwrap_or_default());

    // whatever passes is the one spelling of what we would have made
    if let Ok(claims) = Token::verify(&BOTH, namespace, name, token) {
        let job = JobRef { namespace, name, uid: &claims.uid, attempt: claims.attempt };
        assert!(minted(&job).iter().any(|(id, ours)| *id == claims.key_id && *ours == token));
    }

    // and what we make passes, for its job and no other
    let attempt = u32::try_from(token.len()).unwrap_or(u32::MAX).wrapping_mul(0x9e37_79b9);
    let job = JobRef { namespace, name, uid, attempt };
    let possible = namespace.len() <= 63
        && name.len() <= 253
        && (1..=64).contains(&uid.len())
        && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    for (key_id, ours) in minted(&job) {
        let verdict = Token::verify(&BOTH, namespace, name, &ours);
        assert_eq!(verdict.is_ok(), possible, "{verdict:?}");
        let Ok(claims) = verdict else { continue };
        assert_eq!((claims.uid.as_str(), claims.attempt, claims.key_id.as_str()), (uid, attempt, key_id));
        assert!(Token::verify(&BOTH, &format!("{namespace}x"), name, &ours).is_err());
        assert!(Token::verify(&BOTH, namespace, &format!("{name}x"), &ours).is_err());
        if namespace != name {
            assert!(Token::verify(&BOTH, name, namespace, &ours).is_err());
        }
        // bytes of the fuzzer's over ours
        let mut bytes = URL_SAFE_NO_PAD.decode(&ours).expect("we made it");
        let before = bytes.clone();
        for (n, b) in token.bytes().enumerate() {
            let place = (n * 37 + usize::from(b)) % bytes.len();
            bytes[place] ^= b;
        }
        if bytes != before {
            assert!(Token::verify(&BOTH, namespace, name, &URL_SAFE_NO_PAD.encode(bytes)).is_err());
        }
        for other in [format!("{ours}="), format!("{ours}A"), format!(" {ours}"), ours[1..].to_owned()] {
            assert!(Token::verify(&BOTH, namespace, name, &other).is_err());
        }
        if is_kubernetes_name(namespace) && is_kubernetes_name(name) {
            let url = callback_url(&EXTERNAL, &job, &ours);
            let expected = format!("https://h.example/gbo/v1/callbacks/{namespace}/{name}/{ours}");
            assert_eq!(url.as_str(), expected);
        }
    }
    let shown = Token::log_prefix(token).to_string();
    assert!(shown.len() == 8 && shown.bytes().all(|b| b.is_ascii_hexdigit()));
});

/// The token of a job with either key of the ring.
fn minted(job: &JobRef<'_>) -> [(&'static str, String); 2] {
    [("k1", 946_700_000), ("k2", 1_000_000_000)].map(|(id, second)| {
        let now = Timestamp::from_second(second).expect("a time");
        (id, Token::mint(&BOTH, now, job))
    })
}

/// RFC 1123: what the API server lets a namespace or a job be called.
fn is_kubernetes_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    !name.is_empty()
        && name.split('.').all(|label| {
            label.bytes().all(|b| inner(b) || b == b'-')
                && label.bytes().next().is_some_and(inner)
                && label.bytes().last().is_some_and(inner)
        })
}

fn a_stored_ring(document: &[u8]) {
    let Ok(ring) = KeyRing::parse(document) else { return };
    assert!((1..=MAX_KEYS).contains(&ring.keys.len()));
    assert!((1..=63).contains(&ring.cluster_id.len()));
    assert!(ring.keys.is_sorted_by_key(|k| k.created));
    assert!(ring.keys.iter().all(|k| (1..=16).contains(&k.id.len()) && common::is_plain(&k.id)));
    // what is written is what is read
    let again = KeyRing::parse(&ring.to_json()).expect("we wrote it");
    let seen =
        |r: &KeyRing| r.keys.iter().map(|k| (k.id.clone(), k.created, k.unused_since)).collect::<Vec<_>>();
    assert_eq!((&again.cluster_id, seen(&again)), (&ring.cluster_id, seen(&ring)));
    let now = Timestamp::from_second(common::T).expect("a time");
    let job = JobRef { namespace: "ns", name: "job", uid: "u", attempt: 1 };
    let token = Token::mint(&ring, now, &job);
    assert_eq!(token, Token::mint(&again, now, &job));
    assert!(Token::verify(&again, "ns", "job", &token).is_ok());
    assert!(Token::verify(&BOTH, "ns", "job", &token).is_err());
}
