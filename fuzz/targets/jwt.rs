//! A JWT in `webhook-signature`. Input: either a JWT as it would be sent; or, with a line feed in it, a header and
//! the claims, which are signed with the right key before they are judged.
#![no_main]

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use gemini_batch_callback::callback::jwks::KeySet;
use gemini_batch_callback::callback::{Accepted, Delivery, Keys, Policy, Refusal, Scheme, verify};
use gemini_batch_fuzz as common;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, EncodingKey};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

const PEM: &[u8] = include_bytes!("../../src/callback/testdata/rsa2048.pem");
const N: &str = "vf-eKhgU3KLGHv61ILUoBChsYo8esnzD6_qUdQSOPATluP7yG0v0CfCTBz9GIiNfWukT79Azi-atmsHfF1oVEYUaliNk1Qrd_chFW3wGQu34e2wfUXA45BKCH4NeImtj5yP_YhrjlOOVJf-bg5ccOP5RfW6xc_XH7rfZ8SSYp20hzI2PcjuGGFA78ihtcAFtt2LJlRu2_YCUQpFOtpGamQ897sx7FuwN1PmsB8ZnlfsZ6n5yLECPCAFOiw_RR7THPwrWu_aVfZvSi97N1tDwsgJrQtTzCHBoV1Gf2aceiRmz-4mciT-zGVq3fPhIgeenoZ-OH92cFWFUH6n0a7WfMw";
/// The JWTs that exist, apart from those that are made below: the seeds that are whole.
const KNOWN: [&str; 1] = [include_str!("../seeds/jwt/whole")];

static SIGNER: LazyLock<EncodingKey> = LazyLock::new(|| EncodingKey::from_rsa_pem(PEM).expect("a good key"));
static POLICY: LazyLock<Policy> = LazyLock::new(common::policy);
static PUBLIC: LazyLock<KeySet> = LazyLock::new(|| {
    let document = format!(r#"{{"keys":[{{"kty":"RSA","kid":"a","n":"{N}","e":"AQAB"}}]}}"#);
    KeySet::parse(document.as_bytes()).expect("a good key")
});

fuzz_target!(|input: &[u8]| {
    let mut claims = input;
    let header = common::part(&mut claims);
    if header.len() == input.len() {
        // only a JWT that was made with the key passes, in the one spelling it was made in
        if judge(input).is_ok_and(|accepted| accepted.scheme == Scheme::Jwt) {
            let mut entries = input.split(|b| *b == b' ');
            assert!(entries.any(|e| KNOWN.iter().any(|k| k.as_bytes() == e)));
        }
        return;
    }
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    // whatever is wrong with it besides, a signature that is missing or another's is refused
    for other in ["", "AAAA"] {
        assert!(judge(format!("{message}.{other}").as_bytes()).is_err());
    }
    // most inputs are no JSON at all: signing them would take all the time
    let header: Option<Value> = serde_json::from_slice(header).ok();
    let claims: Option<Value> = serde_json::from_slice(claims).ok();
    let (Some(header), Some(claims)) = (header, claims) else { return };
    let signature =
        jsonwebtoken::crypto::sign(message.as_bytes(), &SIGNER, Algorithm::RS256).expect("can be signed");
    let jwt = format!("{message}.{signature}");
    let verdict = judge(jwt.as_bytes());
    let expected = jwt.len() <= 8 * 1024
        && header.as_object().is_some_and(header_is_good)
        && claims.as_object().is_some_and(claims_are_good);
    match verdict {
        Ok(_) => assert!(expected, "accepted: {header} {claims}"),
        // the header's members may be refused for more reasons (twice the same one, say): only what is good in
        // every respect must pass, and that is looked at in its plain spelling
        Err(_) if expected => {
            let plain = format!(
                "{}.{}",
                URL_SAFE_NO_PAD.encode(header.to_string()),
                URL_SAFE_NO_PAD.encode(claims.to_string())
            );
            let signature = jsonwebtoken::crypto::sign(plain.as_bytes(), &SIGNER, Algorithm::RS256)
                .expect("can be signed");
            let verdict = judge(format!("{plain}.{signature}").as_bytes());
            assert!(verdict.is_ok() || plain.len() > 7 * 1024, "{verdict:?}: {header} {claims}");
        }
        Err(_) => {}
    }
});

fn judge(signature: &[u8]) -> Result<Accepted, Refusal> {
    let delivery = Delivery { id: common::ID, timestamp: common::SENT, signature, body: common::BODY };
    let now = Timestamp::from_second(common::T).expect("a time");
    let verdict = verify(&delivery, &Keys { public: Some(&PUBLIC), secrets: &[], first: 0 }, &POLICY, now);
    if let Ok(accepted) = &verdict {
        common::check_accepted(accepted);
    }
    verdict
}

// what the specification says, in other words than the code's

fn header_is_good(header: &Map<String, Value>) -> bool {
    let kid = match header.get("kid") {
        None | Some(Value::Null) => true,
        Some(kid) => kid == "a",
    };
    header.get("alg").is_some_and(|alg| alg == "RS256") && kid && !header.contains_key("crit")
}

fn claims_are_good(claims: &Map<String, Value>) -> bool {
    let now = common::T as f64;
    // a claim that is not there is fine if it is optional; one that is no time never is
    let within = |name: &str, required: bool, fits: &dyn Fn(f64) -> bool| match claims.get(name) {
        None => !required,
        Some(value) => {
            value.as_f64().is_some_and(|t| (0.0..=253_402_300_799.0).contains(&t) && fits(t.floor()))
        }
    };
    let audience = match claims.get("aud") {
        Some(Value::Array(all)) => {
            all.len() <= 16 && all.iter().all(Value::is_string) && all.iter().any(|a| a == common::URL)
        }
        Some(one) => one == common::URL,
        None => false,
    };
    audience
        && within("exp", true, &|t| t >= now - 60.0)
        && within("nbf", false, &|t| t <= now + 300.0)
        && within("iat", false, &|t| t <= now + 300.0 && t >= now - 93_600.0)
}
