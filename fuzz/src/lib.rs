//! What several targets need. Inputs are text where that is possible, so that seeds and findings can be read:
//! parts are separated by a line feed, and the last part is the rest.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signer as _, SigningKey};
use gemini_batch_callback::callback::jwks::KeySet;
use gemini_batch_callback::callback::signature::HmacSecret;
use gemini_batch_callback::callback::{Accepted, Policy, Scheme};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// The message that vectors A, D and E sign.
pub const ID: &[u8] = b"msg_p5jXN8AQM9LWM0D4loKWxJek";
pub const SENT: &[u8] = b"1614265330";
pub const BODY: &[u8] = br#"{"test": 2432232314}"#;
pub const T: i64 = 1_614_265_330;

pub const SECRET_A: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
/// The public key of vector D, and the one of vector E (seed 0x01, 32 times), as JWKS has them.
pub const X_D: &str = "1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4";
pub const X_E: &str = "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w";
pub const VECTOR_A: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
pub const VECTOR_D: &str =
    "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg==";
pub const VECTOR_E: &str =
    "v1a,Ykcu7AtGZGmZxFEH1Gaa2Nd7feY/CTuruoL4fqgnKwfbHU4DhemoVHZdvGfIvKvn4BIgwktLGGPGIr/i9nK7AA==";

pub const URL: &str = "https://h.example/v1/callbacks/ns/job/token";

/// The next part of an input, up to a line feed.
pub fn part<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    match rest.iter().position(|b| *b == b'\n') {
        Some(end) => {
            let part = &rest[..end];
            *rest = &rest[end + 1..];
            part
        }
        None => std::mem::take(rest),
    }
}

/// The keys of vectors D and E.
pub fn public_keys() -> KeySet {
    let document = format!(
        r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{X_D}"}},{{"kty":"OKP","crv":"Ed25519","x":"{X_E}"}}]}}"#
    );
    KeySet::parse(document.as_bytes()).expect("the keys of the vectors are good")
}

/// The secret of vector A.
pub fn secrets() -> [HmacSecret; 1] {
    [HmacSecret::parse(SECRET_A).expect("the secret of vector A is good")]
}

/// Every scheme, token-bound times, our URL as the audience.
pub fn policy() -> Policy {
    Policy {
        schemes: vec![Scheme::V1a, Scheme::Jwt, Scheme::V1],
        ..Policy::token_bound(vec![URL.to_owned()])
    }
}

fn text(id: &[u8], timestamp: &[u8], body: &[u8]) -> Vec<u8> {
    [id, b".", timestamp, b".", body].concat()
}

/// An entry that vector E's key makes.
pub fn sign_v1a(id: &[u8], timestamp: &[u8], body: &[u8]) -> String {
    let key = SigningKey::from_bytes(&[1; 32]);
    format!("v1a,{}", STANDARD.encode(key.sign(&text(id, timestamp, body)).to_bytes()))
}

/// An entry that vector A's secret makes.
pub fn sign_v1(id: &[u8], timestamp: &[u8], body: &[u8]) -> String {
    let secret = STANDARD.decode(&SECRET_A[6..]).expect("base64");
    let mut mac = Hmac::<Sha256>::new_from_slice(&secret).expect("any length will do");
    mac.update(&text(id, timestamp, body));
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

/// The pattern that `status.callback.webhookId` has in the CRD.
pub fn is_plain(id: &str) -> bool {
    id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// What holds for whatever was accepted.
pub fn check_accepted(accepted: &Accepted) {
    assert!(is_plain(&accepted.hint_id), "{:?}", accepted.hint_id);
    assert!((1..=128).contains(&accepted.hint_id.len()), "{:?}", accepted.hint_id);
    assert_eq!(accepted.key.is_some(), accepted.scheme == Scheme::V1a);
    if accepted.scheme == Scheme::Jwt {
        assert!(accepted.hint_id.starts_with("jwt-") && accepted.hint_id.len() == 36);
    }
}
