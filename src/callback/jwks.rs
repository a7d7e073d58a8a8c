//! Google's public keys, as a JWKS document lists them. Only the parsing: fetching is the receiver's work.
//!
//! Seen in the wild: three OKP/Ed25519 keys without `kid`. Documented: RSA keys with `kid`. Both are read; a key
//! of another kind, or one that we cannot use, is skipped. A document without a single usable key is an error,
//! so that whoever has a good set keeps it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::VerifyingKey;
use jsonwebtoken::DecodingKey;
use serde_json::Value;

/// The largest document that is looked at.
pub const MAX_BYTES: usize = 64 * 1024;
/// How many usable keys are taken, in the order of the document. Bounds the work for one forged signature.
pub const MAX_KEYS: usize = 8;
const MAX_KID_LEN: usize = 256;
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// A public key for `v1a`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ed25519Key {
    pub(super) key: VerifyingKey,
}

/// A public key for JWTs.
#[derive(Clone, Debug)]
pub struct RsaKey {
    pub(super) kid: Option<String>,
    pub(super) key: DecodingKey,
}

/// The usable keys of one document.
#[derive(Clone, Debug, Default)]
pub struct KeySet {
    /// For `v1a`.
    pub ed25519: Vec<Ed25519Key>,
    /// For JWTs.
    pub rsa: Vec<RsaKey>,
}

/// Why a document gave no keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwksError {
    /// Too large to be a key set.
    #[error("the key set is larger than {MAX_BYTES} bytes")]
    TooLarge,
    /// Not JSON, or not an object with an array `keys`.
    #[error("the key set is not a JSON object with an array \"keys\"")]
    Unreadable,
    /// Nothing usable in it.
    #[error("the key set holds no usable key (Ed25519, or RSA of 2048 to 8192 bits)")]
    Empty,
}

impl KeySet {
    /// Reads a JWKS document.
    pub fn parse(bytes: &[u8]) -> Result<Self, JwksError> {
        if bytes.len() > MAX_BYTES {
            return Err(JwksError::TooLarge);
        }
        let document: Value = serde_json::from_slice(bytes).map_err(|_| JwksError::Unreadable)?;
        let listed = document.get("keys").and_then(Value::as_array).ok_or(JwksError::Unreadable)?;
        let mut set = Self::default();
        for jwk in listed {
            if set.len() == MAX_KEYS {
                break;
            }
            match text(jwk, "kty") {
                Some("OKP") => set.ed25519.extend(ed25519(jwk)),
                Some("RSA") => set.rsa.extend(rsa(jwk)),
                _ => {}
            }
        }
        if set.is_empty() { Err(JwksError::Empty) } else { Ok(set) }
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ed25519.len() + self.rsa.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn text<'a>(jwk: &'a Value, member: &str) -> Option<&'a str> {
    jwk.get(member)?.as_str()
}

/// `use`, `key_ops` and `alg` may be absent, but what they say must allow checking signatures this way.
fn meant_for(jwk: &Value, algorithms: &[&str]) -> bool {
    let absent_or = |member: &str, ok: &dyn Fn(&Value) -> bool| jwk.get(member).is_none_or(ok);
    absent_or("use", &|v| v == "sig")
        && absent_or("alg", &|v| v.as_str().is_some_and(|a| algorithms.contains(&a)))
        && absent_or("key_ops", &|v| v.as_array().is_some_and(|ops| ops.iter().any(|op| op == "verify")))
}

fn ed25519(jwk: &Value) -> Option<Ed25519Key> {
    if text(jwk, "crv")? != "Ed25519" || !meant_for(jwk, &["EdDSA", "Ed25519"]) {
        return None;
    }
    Ed25519Key::from_bytes(&URL_SAFE_NO_PAD.decode(text(jwk, "x")?).ok()?)
}

fn rsa(jwk: &Value) -> Option<RsaKey> {
    if !meant_for(jwk, &["RS256"]) {
        return None;
    }
    let number = |member| {
        let bytes = URL_SAFE_NO_PAD.decode(text(jwk, member)?).ok()?;
        let zeros = bytes.iter().take_while(|b| **b == 0).count();
        Some(bytes[zeros..].to_vec())
    };
    let (n, e) = (number("n")?, number("e")?);
    let bits = n.len() * 8 - n.first()?.leading_zeros() as usize;
    let odd = |bytes: &[u8]| bytes.last().is_some_and(|b| b % 2 == 1);
    // an exponent of 1 makes every text its own signature; beyond 33 bits the library refuses
    let e_ok = odd(&e) && e != [1] && e.len() <= 4;
    let kid = text(jwk, "kid").map(str::to_owned);
    let kid_ok = kid.as_ref().is_none_or(|k| k.len() <= MAX_KID_LEN);
    (RSA_BITS.contains(&bits) && odd(&n) && e_ok && kid_ok)
        .then(|| RsaKey { kid, key: DecodingKey::from_rsa_raw_components(&n, &e) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::callback::testing::{RSA_N, jwk, jwks, rsa_jwk};

    fn with(mut jwk: Value, member: &str, value: Value) -> Value {
        jwk[member] = value;
        jwk
    }

    #[test]
    fn reads_what_google_was_seen_to_serve() {
        let set = KeySet::parse(&jwks(&[jwk(1), jwk(2), jwk(3)])).unwrap();
        assert_eq!((set.ed25519.len(), set.rsa.len(), set.len()), (3, 0, 3));
        let set = KeySet::parse(&jwks(&[rsa_jwk("a"), jwk(1)])).unwrap();
        assert_eq!((set.ed25519.len(), set.rsa.len(), set.len()), (1, 1, 2));
        assert_eq!(set.rsa[0].kid.as_deref(), Some("a"));
    }

    #[test]
    fn unusable_keys_are_skipped_and_none_at_all_is_an_error() {
        let n = |bytes: usize| URL_SAFE_NO_PAD.encode(vec![0xff; bytes]);
        let unusable = [
            json!(null),
            json!([]),
            json!("x"),
            json!({}),
            json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}),
            json!({"kty": "oct", "k": "AAAA"}),
            with(jwk(1), "crv", json!("X25519")),
            with(jwk(1), "crv", json!(null)),
            with(jwk(1), "x", json!("AAAA")),
            with(jwk(1), "x", json!(7)),
            with(jwk(1), "x", json!(URL_SAFE_NO_PAD.encode([0; 32]))),
            with(jwk(1), "x", json!(format!("{}=", jwk(1)["x"].as_str().unwrap()))),
            with(jwk(1), "use", json!("enc")),
            with(jwk(1), "alg", json!("RS256")),
            with(jwk(1), "alg", json!("HS256")),
            with(jwk(1), "key_ops", json!(["sign"])),
            with(rsa_jwk("a"), "alg", json!("PS256")),
            with(rsa_jwk("a"), "alg", json!("EdDSA")),
            with(rsa_jwk("a"), "use", json!("enc")),
            with(rsa_jwk("a"), "n", json!(n(255))),
            with(rsa_jwk("a"), "n", json!(n(1025))),
            with(rsa_jwk("a"), "n", json!(URL_SAFE_NO_PAD.encode([&[0], &vec![0xff; 255][..]].concat()))),
            with(rsa_jwk("a"), "n", json!(URL_SAFE_NO_PAD.encode([&vec![0xff; 255][..], &[0xfe]].concat()))),
            with(rsa_jwk("a"), "n", json!(URL_SAFE_NO_PAD.encode([&[0x7f], &vec![0xff; 255][..]].concat()))),
            with(rsa_jwk("a"), "n", json!("")),
            with(rsa_jwk("a"), "n", json!(format!("{RSA_N}="))),
            with(rsa_jwk("a"), "e", json!("AQ")),
            with(rsa_jwk("a"), "e", json!("AAAB")),
            with(rsa_jwk("a"), "e", json!("Ag")),
            with(rsa_jwk("a"), "e", json!("")),
            with(rsa_jwk("a"), "e", json!(URL_SAFE_NO_PAD.encode([1; 5]))),
            with(rsa_jwk("a"), "kid", json!("k".repeat(257))),
        ];
        for key in &unusable {
            assert_eq!(
                KeySet::parse(&jwks(std::slice::from_ref(key))).unwrap_err(),
                JwksError::Empty,
                "{key}"
            );
        }
        let mut all = unusable.to_vec();
        all.push(jwk(9));
        assert_eq!(KeySet::parse(&jwks(&all)).unwrap().len(), 1, "they do not hide the good one");
        assert_eq!(KeySet::parse(&jwks(&[])).unwrap_err(), JwksError::Empty);
    }

    #[test]
    fn members_that_allow_our_use_are_fine() {
        for key in [
            with(jwk(1), "use", json!("sig")),
            with(jwk(1), "alg", json!("EdDSA")),
            with(jwk(1), "alg", json!("Ed25519")),
            with(jwk(1), "key_ops", json!(["verify"])),
            with(jwk(1), "kid", json!("k")),
            with(rsa_jwk("a"), "n", json!(URL_SAFE_NO_PAD.encode(vec![0xff; 1024]))),
            with(rsa_jwk("a"), "n", json!(URL_SAFE_NO_PAD.encode([&[0], &vec![0xff; 256][..]].concat()))),
            with(rsa_jwk("a"), "e", json!("Aw")),
            with(rsa_jwk("a"), "e", json!(URL_SAFE_NO_PAD.encode([1; 4]))),
            with(rsa_jwk("a"), "kid", json!("k".repeat(256))),
            with(rsa_jwk("a"), "kid", json!(7)),
        ] {
            assert_eq!(KeySet::parse(&jwks(std::slice::from_ref(&key))).unwrap().len(), 1, "{key}");
        }
    }

    #[test]
    fn at_most_eight_keys_and_64_kib() {
        let many: Vec<Value> = (1..=20).map(jwk).collect();
        let set = KeySet::parse(&jwks(&many)).unwrap();
        assert_eq!(set.len(), 8);
        assert_eq!(set.ed25519[0], KeySet::parse(&jwks(&[jwk(1)])).unwrap().ed25519[0]);
        let mixed: Vec<Value> = (1..=7).map(jwk).chain([rsa_jwk("a"), rsa_jwk("b")]).collect();
        assert_eq!(KeySet::parse(&jwks(&mixed)).unwrap().rsa.len(), 1);

        let mut document = jwks(&[jwk(1)]);
        document.resize(64 * 1024, b' ');
        assert!(KeySet::parse(&document).is_ok());
        document.push(b' ');
        assert_eq!(KeySet::parse(&document).unwrap_err(), JwksError::TooLarge);
    }

    #[test]
    fn other_documents_are_unreadable() {
        let deep = "[".repeat(60_000);
        for other in
            ["", "null", "[]", "{}", "{\"keys\":{}}", "{\"keys\":null}", "<html>", "{\"keys\":[]", &deep]
        {
            assert_eq!(KeySet::parse(other.as_bytes()).unwrap_err(), JwksError::Unreadable, "{other:.20}");
        }
        assert_eq!(KeySet::parse(&[0xff, 0xfe]).unwrap_err(), JwksError::Unreadable);
        assert!(KeySet::default().is_empty());
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes: Vec<u8>, text in "\\{\"keys\":\\[\\{\"kty\":\"(OKP|RSA)\",\"[a-z]{1,3}\":\".{0,40}\"\\}\\]\\}") {
            let _ = KeySet::parse(&bytes);
            let _ = KeySet::parse(text.as_bytes());
        }
    }
}
