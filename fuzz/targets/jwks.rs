//! A key set document. Input: the document.
#![no_main]

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use gemini_batch_callback::callback::jwks::{JwksError, KeySet, MAX_BYTES, MAX_KEYS};
use gemini_batch_callback::callback::{Delivery, Keys, verify};
use gemini_batch_fuzz as common;
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

fuzz_target!(|document: &[u8]| {
    let parsed = KeySet::parse(document);
    let json: Option<Value> = serde_json::from_slice(document).ok();
    let listed = json.as_ref().and_then(|d| d.get("keys")).and_then(Value::as_array);
    let set = match parsed {
        Ok(set) => set,
        Err(error) => {
            match error {
                JwksError::TooLarge => assert!(document.len() > MAX_BYTES),
                JwksError::Unreadable => assert!(listed.is_none()),
                JwksError::Empty => assert!(listed.is_some()),
            }
            return;
        }
    };
    assert!(document.len() <= MAX_BYTES);
    assert!(!set.is_empty() && set.len() <= MAX_KEYS);
    assert_eq!(set.len(), set.ed25519.len() + set.rsa.len());
    assert!(set.len() <= listed.map_or(0, Vec::len));

    // another spelling of the same document holds the same keys
    let again = serde_json::to_vec(&json).expect("was read");
    if again.len() <= MAX_BYTES {
        let again = KeySet::parse(&again).expect("the same document");
        assert_eq!((&again.ed25519, again.rsa.len()), (&set.ed25519, set.rsa.len()));
    }

    let now = Timestamp::from_second(common::T).expect("a time");
    let policy = common::policy();
    let passes = |signature: &str| {
        let delivery = Delivery {
            id: common::ID,
            timestamp: common::SENT,
            signature: signature.as_bytes(),
            body: common::BODY,
        };
        verify(&delivery, &Keys { public: Some(&set), secrets: &[], first: 0 }, &policy, now).is_ok()
    };
    // a genuine signature passes with its own key only
    let holds = |x: &str| listed.is_some_and(|keys| keys.iter().any(|k| k["kty"] == "OKP" && k["x"] == x));
    assert!(!passes(common::VECTOR_D) || holds(common::X_D));
    assert!(!passes(common::VECTOR_E) || holds(common::X_E));
    assert!(!passes(common::VECTOR_A));
    // what keys of small order accept for any message: no such key may be in a set
    let mut identity = [0; 64];
    identity[0] = 1;
    for forged in [[0; 64], identity] {
        assert!(!passes(&format!("v1a,{}", STANDARD.encode(forged))));
    }
    // With exponent 1 every message is its own signature: no such key counts, and none of the shortest or the longest
    // modulus accepts it.
    let more_than_one = |e: &Value| {
        let bytes = e.as_str().and_then(|e| URL_SAFE_NO_PAD.decode(e).ok()).unwrap_or_default();
        bytes.iter().any(|b| *b > 1) || bytes.iter().filter(|b| **b == 1).count() > 1
    };
    let rsa = listed.into_iter().flatten().filter(|k| k["kty"] == "RSA" && more_than_one(&k["e"]));
    assert!(set.rsa.len() <= rsa.count());
    for bytes in [256, 1024] {
        assert!(!passes(&exponent_one(bytes)));
    }
});

/// A JWT whose signature is its own padded hash.
fn exponent_one(bytes: usize) -> String {
    const SHA256: &[u8] = b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20";
    let claims = format!(r#"{{"aud":"{}","exp":{}}}"#, common::URL, common::T + 60);
    let message =
        format!("{}.{}", URL_SAFE_NO_PAD.encode(br#"{"alg":"RS256"}"#), URL_SAFE_NO_PAD.encode(claims));
    let hash = Sha256::digest(message.as_bytes());
    let padding = vec![0xff; bytes - 3 - SHA256.len() - hash.len()];
    let signature = [b"\x00\x01", padding.as_slice(), b"\x00", SHA256, &hash].concat();
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
}
