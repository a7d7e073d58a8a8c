//! The requests: what Google sends, and what others might.

use anyhow::{Context as _, anyhow, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use ed25519_dalek::{Signer as _, SigningKey};
use gemini_batch_operator::callback::keyring::KeyRing;
use gemini_batch_operator::callback::token::{JobRef, Token, callback_url};
use jiff::Timestamp;
use serde_json::json;
use url::Url;

/// Where callbacks go.
pub const ROUTE: &str = "/v1/callbacks/{namespace}/{name}/{token}";

/// The key ring of the receivers here. Its key is no secret: nothing else uses it.
const RING: &[u8] = br#"{"version":1,"clusterId":"bench",
    "fingerprintKey":"AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=",
    "keys":[{"id":"k1","secret":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","created":"2000-01-01T00:00:00Z"}]}"#;
/// The size of the one that was seen.
const BODY: &str = r#"{"type":"batch.succeeded","version":"v1","timestamp":"2026-11-01T10:00:00Z","data":{"id":"batches/bench-batch-123456","output_file_uri":"files/batch-bench-batch-123456"}}"#;

pub fn ring() -> anyhow::Result<KeyRing> {
    Ok(KeyRing::parse(RING)?)
}

pub fn external_url() -> anyhow::Result<Url> {
    Ok(Url::parse("https://callbacks.example")?)
}

/// Who signs: three Ed25519 keys, a stranger, and an RSA key.
pub struct Senders {
    ring: KeyRing,
    external_url: Url,
    ed25519: [SigningKey; 3],
    stranger: SigningKey,
    rsa: KeyPair,
}

impl Senders {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            ring: ring()?,
            external_url: external_url()?,
            ed25519: [1, 2, 3].map(|seed| SigningKey::from_bytes(&[seed; 32])),
            stranger: SigningKey::from_bytes(&[9; 32]),
            rsa: KeyPair::generate(KeySize::Rsa2048).map_err(|_| anyhow!("could not make an RSA key"))?,
        })
    }

    /// The last `count` of the Ed25519 keys: however many there are, the one that usually signs is the last.
    pub fn ed25519(&self, count: usize) -> Vec<[u8; 32]> {
        self.ed25519[3 - count..].iter().map(|k| k.verifying_key().to_bytes()).collect()
    }

    /// Modulus and exponent of the RSA key.
    pub fn rsa(&self) -> (Vec<u8>, Vec<u8>) {
        let public = self.rsa.public_key();
        let plain = |bytes: &[u8]| bytes.to_vec();
        (
            plain(public.modulus().big_endian_without_leading_zero()),
            plain(public.exponent().big_endian_without_leading_zero()),
        )
    }

    /// A key set of the last `count` Ed25519 keys, as Google was seen to serve it.
    pub fn ed25519_jwks(&self, count: usize) -> String {
        let jwk = |key: &[u8; 32]| json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(key)});
        json!({"keys": self.ed25519(count).iter().map(jwk).collect::<Vec<_>>()}).to_string()
    }

    /// A key set as Google's guide describes it.
    pub fn rsa_jwks(&self) -> String {
        let (n, e) = self.rsa();
        let [n, e] = [n, e].map(|number| URL_SAFE_NO_PAD.encode(number));
        json!({"keys": [{"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "a", "n": n, "e": e}]})
            .to_string()
    }

    /// Signed with the key at `key` of the three.
    pub fn v1a(&self, event: &Event, key: usize) -> Bytes {
        self.signed(event, &self.ed25519[key % 3])
    }

    /// Signed with a key that is not in the set.
    pub fn forged(&self, event: &Event) -> Bytes {
        self.signed(event, &self.stranger)
    }

    fn signed(&self, event: &Event, key: &SigningKey) -> Bytes {
        let sent = Timestamp::now().as_second();
        let text = format!("{}.{sent}.{BODY}", event.id);
        let signature = STANDARD.encode(key.sign(text.as_bytes()).to_bytes());
        request(&event.path(&self.token(event)), &event.id, sent, &format!("v1a,{signature}"))
    }

    /// For the callback's own URL, good for an hour.
    pub fn jwt(&self, event: &Event) -> anyhow::Result<Bytes> {
        let sent = Timestamp::now().as_second();
        let token = self.token(event);
        let audience = callback_url(&self.external_url, &event.job(), &token);
        let header = json!({"alg": "RS256", "kid": "a", "typ": "JWT"}).to_string();
        let claims =
            json!({"aud": audience.as_str(), "iat": sent, "exp": sent + 3600, "jti": event.id}).to_string();
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let mut signature = vec![0; self.rsa.public_modulus_len()];
        self.rsa
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature)
            .map_err(|_| anyhow!("could not sign"))?;
        let jwt = format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature));
        Ok(request(&event.path(&token), &event.id, sent, &jwt))
    }

    /// Well formed, with a UID and key id that exist; one bit of the MAC is flipped.
    pub fn wrong_token(&self, event: &Event) -> anyhow::Result<Bytes> {
        let mut bytes = URL_SAFE_NO_PAD.decode(self.token(event)).context("not our spelling")?;
        *bytes.last_mut().context("an empty token")? ^= 1;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        ensure!(token != self.token(event));
        let sent = Timestamp::now().as_second();
        let text = format!("{}.{sent}.{BODY}", event.id);
        let signature = STANDARD.encode(self.ed25519[2].sign(text.as_bytes()).to_bytes());
        Ok(request(&event.path(&token), &event.id, sent, &format!("v1a,{signature}")))
    }

    fn token(&self, event: &Event) -> String {
        Token::mint(&self.ring, Timestamp::now(), &event.job())
    }
}

/// One event of one job. Each is another delivery; and each job has only a few, as its budget of writes demands.
pub struct Event {
    uid: String,
    name: String,
    id: String,
}

impl Event {
    pub fn new(job: usize, round: usize) -> Self {
        Self {
            uid: format!("0b0e7c1e-7f3a-4c55-9a2e-{job:012x}"),
            name: format!("nightly-{job}"),
            id: format!("msg_0b0e7c1e-7f3a-4c55-{round:04x}-{job:012x}"),
        }
    }

    fn job(&self) -> JobRef<'_> {
        JobRef { namespace: "team-a", name: &self.name, uid: &self.uid, attempt: 1 }
    }

    fn path(&self, token: &str) -> String {
        format!("/v1/callbacks/team-a/{}/{token}", self.name)
    }
}

fn request(path: &str, id: &str, sent: i64, signature: &str) -> Bytes {
    let length = BODY.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: callbacks.example\r\nuser-agent: bench\r\naccept: */*\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\nwebhook-id: {id}\r\n\
         webhook-timestamp: {sent}\r\nwebhook-signature: {signature}\r\n\r\n{BODY}"
    )
    .into()
}
