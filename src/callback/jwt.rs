//! The RS256 JWT that Google's guide describes in `webhook-signature`.
//!
//! It binds neither the body nor the webhook id: all it proves is that Google sent something to this audience.
//! So the audience must be this very URL, a second delivery is recognised by the hash of the JWT, and ids in the
//! body are ignored.
//!
//! Only the signature check is the library's. It validates claims against the system clock, accepts a missing
//! `aud`, skips `nbf` and accepts unknown `crit`; and where it would take a key from the header (`jku`, `x5u`,
//! `jwk`), we do not even read it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, crypto};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny};
use subtle::ConstantTimeEq as _;

use super::jwks::RsaKey;
use super::verdict::{Policy, Refusal};

/// How long after `exp` a JWT still passes, for clocks that differ.
const EXPIRY_LEEWAY: i64 = 60;
/// The last second that is a date to everybody: the end of the year 9999.
const LATEST: i64 = 253_402_300_799;
const MAX_AUDIENCES: usize = 16;

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    /// Whether it is there at all: even `null` says that the sender wants something.
    #[serde(default, deserialize_with = "present")]
    crit: bool,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// Checks everything about a JWT. Returns its age by `iat`, if it has one.
pub(super) fn check(
    jwt: &str,
    keys: &[RsaKey],
    policy: &Policy,
    now: Timestamp,
) -> Result<Option<i64>, Refusal> {
    let (message, signature) = jwt.rsplit_once('.').ok_or(Refusal::JwtMalformed)?;
    let (header, payload) = message.split_once('.').ok_or(Refusal::JwtMalformed)?;
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| Refusal::JwtMalformed);
    decode(signature)?;
    let header = decode(header)?;
    // serde would read the members from an array as well
    if header.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Refusal::JwtMalformed);
    }
    let header: Header = serde_json::from_slice(&header).map_err(|_| Refusal::JwtMalformed)?;
    if header.alg != "RS256" {
        return Err(Refusal::JwtAlgorithm);
    }
    if header.crit {
        return Err(Refusal::JwtCritical);
    }
    if keys.is_empty() {
        return Err(Refusal::NoKey);
    }
    // a key id selects among Google's keys; a key that has none fits any
    let candidates = keys.iter().filter(|key| match (&header.kid, &key.kid) {
        (Some(wanted), Some(kid)) => wanted == kid,
        _ => true,
    });
    let mut refusal = Refusal::JwtUnknownKey;
    for candidate in candidates {
        if crypto::verify(signature, message.as_bytes(), &candidate.key, Algorithm::RS256) == Ok(true) {
            return check_claims(&decode(payload)?, policy, now);
        }
        refusal = Refusal::BadSignature;
    }
    Err(refusal)
}

fn check_claims(payload: &[u8], policy: &Policy, now: Timestamp) -> Result<Option<i64>, Refusal> {
    let claims: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(payload).map_err(|_| Refusal::JwtMalformed)?;
    let now = now.as_second();
    let time = |name: &'static str| match claims.get(name) {
        None => Ok(None),
        Some(value) => numeric_date(value).map(Some).ok_or(Refusal::JwtClaim(name)),
    };
    let expires = time("exp")?.ok_or(Refusal::JwtClaim("exp"))?;
    let not_before = time("nbf")?;
    let issued = time("iat")?;
    if now > expires + EXPIRY_LEEWAY || issued.is_some_and(|at| now - at > policy.past.as_secs()) {
        return Err(Refusal::JwtExpired);
    }
    if [not_before, issued].into_iter().flatten().any(|at| at - now > policy.future.as_secs()) {
        return Err(Refusal::JwtNotYetValid);
    }
    let audiences: Vec<&str> = match claims.get("aud") {
        Some(serde_json::Value::String(one)) => vec![one],
        Some(serde_json::Value::Array(several)) if several.len() <= MAX_AUDIENCES => {
            several.iter().map(|v| v.as_str().ok_or(Refusal::JwtClaim("aud"))).collect::<Result<_, _>>()?
        }
        _ => return Err(Refusal::JwtClaim("aud")),
    };
    // the URL carries the token: compared like a secret, although who sent this knows it
    let ours =
        |given: &&str| policy.audience.iter().any(|want| want.as_bytes().ct_eq(given.as_bytes()).into());
    if !audiences.iter().any(ours) {
        return Err(Refusal::JwtAudience);
    }
    Ok(issued.map(|at| now - at))
}

/// Seconds since 1970, whole or not, up to the year 9999.
fn numeric_date(value: &serde_json::Value) -> Option<i64> {
    let seconds = if let Some(whole) = value.as_i64() {
        whole
    } else {
        let fraction = value.as_f64()?;
        #[allow(clippy::cast_precision_loss)] // LATEST is far below 2^53
        if !(0.0..=LATEST as f64).contains(&fraction) {
            return None;
        }
        #[allow(clippy::cast_possible_truncation)] // just bounded
        {
            fraction.floor() as i64
        }
    };
    (0..=LATEST).contains(&seconds).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use hmac::{KeyInit as _, Mac as _};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::callback::jwks::KeySet;
    use crate::callback::testing::{RSA_N, jwks, rsa_jwk, sign_jwt};

    const NOW: i64 = 1_800_000_000;
    const URL: &str = "https://h.example/v1/callbacks/ns/job/token";
    const HOUR: i64 = 3600;

    fn header() -> Value {
        json!({"alg": "RS256", "kid": "a"})
    }

    fn claims() -> Value {
        json!({"aud": URL, "iat": NOW - 10, "exp": NOW + HOUR})
    }

    fn with(mut value: Value, member: &str, new: Value) -> Value {
        value[member] = new;
        value
    }

    fn without(mut value: Value, member: &str) -> Value {
        value.as_object_mut().unwrap().remove(member);
        value
    }

    fn check_with(jwt: &str, keys: &[Value]) -> Result<Option<i64>, Refusal> {
        let keys = if keys.is_empty() { KeySet::default() } else { KeySet::parse(&jwks(keys)).unwrap() };
        let policy = Policy::token_bound(vec![URL.to_owned()]);
        check(jwt, &keys.rsa, &policy, Timestamp::from_second(NOW).unwrap())
    }

    fn check_jwt(jwt: &str) -> Result<Option<i64>, Refusal> {
        check_with(jwt, &[rsa_jwk("a")])
    }

    fn check_claims(claims: &Value) -> Result<Option<i64>, Refusal> {
        check_jwt(&sign_jwt(&header(), claims))
    }

    #[test]
    fn a_good_one_passes_with_its_age() {
        assert_eq!(check_claims(&claims()), Ok(Some(10)));
        assert_eq!(check_claims(&without(claims(), "iat")), Ok(None));
    }

    #[test]
    fn a_header_is_an_object() {
        for other in [json!(["RS256"]), json!(["RS256", "a"]), json!("RS256"), json!(null), json!(7)] {
            assert_eq!(check_jwt(&sign_jwt(&other, &claims())), Err(Refusal::JwtMalformed), "{other}");
        }
    }

    #[test]
    fn the_audience_is_required_and_is_this_url() {
        for (aud, expected) in [
            (json!([URL]), Ok(Some(10))),
            (json!(["https://other.example", URL]), Ok(Some(10))),
            (json!("https://h.example/v1/callbacks/ns/job/other"), Err(Refusal::JwtAudience)),
            (json!("https://h.example"), Err(Refusal::JwtAudience)),
            (json!(format!("{URL}/")), Err(Refusal::JwtAudience)),
            (json!(""), Err(Refusal::JwtAudience)),
            (json!([]), Err(Refusal::JwtAudience)),
            (json!(["https://other.example"]), Err(Refusal::JwtAudience)),
            (json!(null), Err(Refusal::JwtClaim("aud"))),
            (json!(7), Err(Refusal::JwtClaim("aud"))),
            (json!([URL, 7]), Err(Refusal::JwtClaim("aud"))),
            (json!({"aud": URL}), Err(Refusal::JwtClaim("aud"))),
            (json!(vec![URL; 16]), Ok(Some(10))),
            (json!(vec![URL; 17]), Err(Refusal::JwtClaim("aud"))),
        ] {
            assert_eq!(check_claims(&with(claims(), "aud", aud.clone())), expected, "{aud}");
        }
        assert_eq!(check_claims(&without(claims(), "aud")), Err(Refusal::JwtClaim("aud")));

        let keys = KeySet::parse(&jwks(&[rsa_jwk("a")])).unwrap();
        let jwt = sign_jwt(&header(), &claims());
        let with_audience = |audience: &[&str]| {
            let policy = Policy::token_bound(audience.iter().map(|a| (*a).to_owned()).collect());
            check(&jwt, &keys.rsa, &policy, Timestamp::from_second(NOW).unwrap())
        };
        assert_eq!(with_audience(&[]), Err(Refusal::JwtAudience), "none is configured");
        assert_eq!(with_audience(&["https://x.example"]), Err(Refusal::JwtAudience));
        assert_eq!(with_audience(&["https://x.example", URL]), Ok(Some(10)));
    }

    #[test]
    fn times_are_checked_on_our_clock() {
        let exp = |exp| check_claims(&with(claims(), "exp", exp));
        assert_eq!(exp(json!(NOW - 60)), Ok(Some(10)));
        assert_eq!(exp(json!(NOW - 61)), Err(Refusal::JwtExpired));
        assert_eq!(exp(json!(NOW + 1000 * HOUR)), Ok(Some(10)));
        #[allow(clippy::cast_precision_loss)]
        let half = NOW as f64 + 0.5;
        assert_eq!(exp(json!(half)), Ok(Some(10)));
        for bad in [
            json!("soon"),
            json!(null),
            json!(-1),
            json!(-0.5),
            json!(1e300),
            json!(u64::MAX),
            json!(i64::MIN),
            json!([NOW]),
        ] {
            assert_eq!(exp(bad.clone()), Err(Refusal::JwtClaim("exp")), "{bad}");
            assert_eq!(
                check_claims(&with(claims(), "nbf", bad.clone())),
                Err(Refusal::JwtClaim("nbf")),
                "{bad}"
            );
            assert_eq!(
                check_claims(&with(claims(), "iat", bad.clone())),
                Err(Refusal::JwtClaim("iat")),
                "{bad}"
            );
        }
        assert_eq!(exp(json!(253_402_300_799_i64)), Ok(Some(10)));
        assert_eq!(exp(json!(253_402_300_800_i64)), Err(Refusal::JwtClaim("exp")));
        assert_eq!(exp(json!(253_402_300_799.5)), Err(Refusal::JwtClaim("exp")));
        assert_eq!(exp(json!(0)), Err(Refusal::JwtExpired));
        assert_eq!(check_claims(&without(claims(), "exp")), Err(Refusal::JwtClaim("exp")));

        let nbf = |nbf: i64| check_claims(&with(claims(), "nbf", json!(nbf)));
        assert_eq!(nbf(NOW - HOUR), Ok(Some(10)));
        assert_eq!(nbf(NOW + 300), Ok(Some(10)));
        assert_eq!(nbf(NOW + 301), Err(Refusal::JwtNotYetValid));

        let iat = |iat: i64| check_claims(&with(claims(), "iat", json!(iat)));
        assert_eq!(iat(NOW + 300), Ok(Some(-300)));
        assert_eq!(iat(NOW + 301), Err(Refusal::JwtNotYetValid));
        assert_eq!(iat(NOW - 26 * HOUR), Ok(Some(26 * HOUR)));
        assert_eq!(iat(NOW - 26 * HOUR - 1), Err(Refusal::JwtExpired));
    }

    #[test]
    fn only_rs256_and_no_extensions() {
        for alg in ["none", "None", "", "HS256", "RS384", "RS512", "PS256", "ES256", "EdDSA", "rs256"] {
            let jwt = sign_jwt(&with(header(), "alg", json!(alg)), &claims());
            assert_eq!(check_jwt(&jwt), Err(Refusal::JwtAlgorithm), "{alg}");
        }
        for crit in [json!(["exp"]), json!([]), json!(null), json!("x")] {
            let jwt = sign_jwt(&with(header(), "crit", crit), &claims());
            assert_eq!(check_jwt(&jwt), Err(Refusal::JwtCritical));
        }
        for header in [
            without(header(), "alg"),
            with(header(), "alg", json!(7)),
            with(header(), "kid", json!(7)),
            json!([]),
        ] {
            assert_eq!(check_jwt(&sign_jwt(&header, &claims())), Err(Refusal::JwtMalformed));
        }
    }

    #[test]
    fn the_public_key_as_an_hmac_secret_forges_nothing() {
        for secret in [
            RSA_N.as_bytes(),
            &URL_SAFE_NO_PAD.decode(RSA_N).unwrap(),
            include_bytes!("testdata/rsa2048.pem"),
        ] {
            for alg in ["HS256", "RS256"] {
                let part = |v: &Value| URL_SAFE_NO_PAD.encode(serde_json::to_vec(v).unwrap());
                let message = format!("{}.{}", part(&json!({"alg": alg})), part(&claims()));
                let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(secret).unwrap();
                mac.update(message.as_bytes());
                let jwt = format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
                let expected = if alg == "HS256" { Refusal::JwtAlgorithm } else { Refusal::BadSignature };
                assert_eq!(check_jwt(&jwt), Err(expected));
            }
        }
    }

    #[test]
    fn keys_come_from_googles_set_only() {
        let own = json!({"kty": "RSA", "n": RSA_N, "e": "AQAB"});
        let mut other = rsa_jwk("a");
        other["n"] = json!(URL_SAFE_NO_PAD.encode([0xff; 256]));
        for member in ["jku", "x5u", "jwk", "x5c"] {
            let jwt = sign_jwt(&with(header(), member, own.clone()), &claims());
            assert_eq!(
                check_with(&jwt, std::slice::from_ref(&other)),
                Err(Refusal::BadSignature),
                "{member}"
            );
            assert_eq!(check_jwt(&jwt), Ok(Some(10)), "{member} is ignored");
        }
    }

    #[test]
    fn the_kid_selects_within_the_set() {
        let jwt = sign_jwt(&header(), &claims());
        let without_kid = sign_jwt(&json!({"alg": "RS256"}), &claims());
        let mut decoy = rsa_jwk("decoy");
        decoy["n"] = json!(URL_SAFE_NO_PAD.encode([0xff; 256]));
        assert_eq!(check_with(&jwt, &[decoy.clone(), rsa_jwk("a")]), Ok(Some(10)));
        assert_eq!(check_with(&jwt, &[rsa_jwk("b")]), Err(Refusal::JwtUnknownKey));
        assert_eq!(check_with(&jwt, &[without(rsa_jwk("a"), "kid")]), Ok(Some(10)));
        assert_eq!(check_with(&without_kid, &[decoy, rsa_jwk("b")]), Ok(Some(10)));
        assert_eq!(check_with(&jwt, &[]), Err(Refusal::NoKey));
    }

    #[test]
    fn one_spelling_only() {
        let jwt = sign_jwt(&header(), &claims());
        for other in [
            format!("{jwt}="),
            format!("{jwt}A"),
            jwt.replace('.', ".."),
            jwt.replacen('.', "", 1),
            "..".into(),
            "a.b.c".into(),
        ] {
            assert!(check_jwt(&other).is_err(), "{other}");
        }
        let payload = sign_jwt(&header(), &json!([1]));
        assert_eq!(check_jwt(&payload), Err(Refusal::JwtMalformed));
    }

    proptest! {
        #[test]
        fn a_changed_jwt_is_refused(position in 0usize..1000, letter in "[A-Za-z0-9_-]") {
            let jwt = sign_jwt(&header(), &claims());
            let position = position % jwt.len();
            let mut changed = jwt.clone();
            changed.replace_range(position..=position, &letter);
            prop_assert_eq!(check_jwt(&changed).is_ok(), changed == jwt);
        }

        #[test]
        fn nothing_panics(text in "[A-Za-z0-9_.-]{0,200}", header in ".{0,60}", payload in ".{0,60}") {
            prop_assert!(check_jwt(&text).is_err());
            let encode = |t: &str| URL_SAFE_NO_PAD.encode(t);
            let made = check_jwt(&format!("{}.{}.AAAA", encode(&header), encode(&payload)));
            prop_assert!(made.is_err());
        }
    }
}
