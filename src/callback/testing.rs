//! What the tests of this module and of the receiver sign with: keys that are no secret.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use jsonwebtoken::{Algorithm, EncodingKey};
use serde_json::{Value, json};

const RSA_PEM: &[u8] = include_bytes!("testdata/rsa2048.pem");
pub(crate) const RSA_N: &str = "vf-eKhgU3KLGHv61ILUoBChsYo8esnzD6_qUdQSOPATluP7yG0v0CfCTBz9GIiNfWukT79Azi-atmsHfF1oVEYUaliNk1Qrd_chFW3wGQu34e2wfUXA45BKCH4NeImtj5yP_YhrjlOOVJf-bg5ccOP5RfW6xc_XH7rfZ8SSYp20hzI2PcjuGGFA78ihtcAFtt2LJlRu2_YCUQpFOtpGamQ897sx7FuwN1PmsB8ZnlfsZ6n5yLECPCAFOiw_RR7THPwrWu_aVfZvSi97N1tDwsgJrQtTzCHBoV1Gf2aceiRmz-4mciT-zGVq3fPhIgeenoZ-OH92cFWFUH6n0a7WfMw";

/// The Ed25519 key whose seed is this byte, 32 times.
pub(crate) fn signing_key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

pub(crate) fn jwk(seed: u8) -> Value {
    let x = URL_SAFE_NO_PAD.encode(signing_key(seed).verifying_key().as_bytes());
    json!({"kty": "OKP", "crv": "Ed25519", "x": x})
}

pub(crate) fn rsa_jwk(kid: &str) -> Value {
    json!({"kty": "RSA", "alg": "RS256", "use": "sig", "kid": kid, "n": RSA_N, "e": "AQAB"})
}

pub(crate) fn jwks(keys: &[Value]) -> Vec<u8> {
    serde_json::to_vec(&json!({"keys": keys})).unwrap()
}

pub(crate) fn sign_v1a(seed: u8, id: &str, timestamp: &str, body: &[u8]) -> String {
    let text = [id.as_bytes(), b".", timestamp.as_bytes(), b".", body].concat();
    format!("v1a,{}", STANDARD.encode(signing_key(seed).sign(&text).to_bytes()))
}

/// A JWT signed with RS256, whatever its header says.
pub(crate) fn sign_jwt(header: &Value, claims: &Value) -> String {
    let part = |v: &Value| URL_SAFE_NO_PAD.encode(serde_json::to_vec(v).unwrap());
    let message = format!("{}.{}", part(header), part(claims));
    let key = EncodingKey::from_rsa_pem(RSA_PEM).unwrap();
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::RS256).unwrap();
    format!("{message}.{signature}")
}
