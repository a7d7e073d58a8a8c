//! The callback token: the last segment of a callback URL, which says which job and attempt it was made for.
//!
//! Google signs with keys that all its customers share, so a signature proves "some Gemini job". The token is
//! what proves "ours": whoever does not know a URL that we handed to Gemini cannot make one. It carries all
//! that the receiver needs, which therefore looks nothing up.
//!
//! Bytes, before base64url without padding:
//!
//! ```text
//! version 1 | length of key id | key id | attempt, 4 bytes, big-endian | UID | HMAC-SHA256, 32 bytes
//! ```
//!
//! The MAC covers version, cluster id, key id, namespace, name, UID and attempt, each with its length.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::Mac as _;
use jiff::Timestamp;
use url::Url;

use super::keyring::{KeyRing, RingKey, hex, valid_key_id};

const VERSION: u8 = 1;
const MAC_BYTES: usize = 32;
const ATTEMPT_BYTES: usize = 4;
const MAX_UID_LEN: usize = 64;
/// What a token of ours can be at most: 1 + 1 + 16 + 4 + 64 + 32 bytes in base64.
const MAX_TOKEN_LEN: usize = 158;
const MAX_NAMESPACE_LEN: usize = 63;
const MAX_NAME_LEN: usize = 253;

/// The job and attempt that a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobRef<'a> {
    /// Namespace of the `GeminiBatchJob`.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its `metadata.uid`: a job that is deleted and made anew gets another one.
    pub uid: &'a str,
    /// The attempt that is submitted with this token.
    pub attempt: u32,
}

/// What a token that passed says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// `metadata.uid` of the job.
    pub uid: String,
    /// The attempt it was made for.
    pub attempt: u32,
    /// The key it was made with.
    pub key_id: String,
}

/// Why a token was refused. To the caller all of them look the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Not something that we ever made: wrong length, alphabet, version or layout.
    #[error("the token in the URL is not well formed")]
    Malformed,
    /// Well formed, and names a key that the ring does not hold: a ring that was replaced, a key that was
    /// retired, or one so new that the ring must be read again.
    #[error("the token in the URL was made with a key that the key ring does not hold")]
    UnknownKey,
    /// The MAC does not fit: another job's token, another cluster's, or a guess.
    #[error("the token in the URL was not made for this job")]
    Mismatch,
}

impl Reason {
    /// A short fixed word, for metrics and logs.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Malformed => "token_malformed",
            Self::UnknownKey => "token_unknown_key",
            Self::Mismatch => "token_mismatch",
        }
    }
}

/// Makes and checks tokens.
#[derive(Clone, Copy, Debug)]
pub struct Token;

impl Token {
    /// Makes the token for one attempt of one job, with the ring's signing key.
    ///
    /// A ring without keys, which [`KeyRing::parse`] refuses, gives an empty token that is never accepted.
    #[must_use]
    pub fn mint(ring: &KeyRing, now: Timestamp, job: &JobRef<'_>) -> String {
        let Some(key) = ring.signing_key(now) else { return String::new() };
        let mut bytes = vec![VERSION];
        bytes.push(u8::try_from(key.id.len()).unwrap_or(u8::MAX));
        bytes.extend_from_slice(key.id.as_bytes());
        bytes.extend_from_slice(&job.attempt.to_be_bytes());
        bytes.extend_from_slice(job.uid.as_bytes());
        bytes.extend_from_slice(&mac(ring, key, job).finalize().into_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Checks a token against the job that the URL names. The comparison takes the same time wherever the
    /// first difference is.
    pub fn verify(ring: &KeyRing, namespace: &str, name: &str, token: &str) -> Result<Claims, Reason> {
        if token.len() > MAX_TOKEN_LEN || namespace.len() > MAX_NAMESPACE_LEN || name.len() > MAX_NAME_LEN {
            return Err(Reason::Malformed);
        }
        // strict: no padding, no other alphabet, no loose bits at the end
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| Reason::Malformed)?;
        let parts = split(&bytes).ok_or(Reason::Malformed)?;
        let key = ring.key(parts.key_id).ok_or(Reason::UnknownKey)?;
        let job = JobRef { namespace, name, uid: parts.uid, attempt: parts.attempt };
        mac(ring, key, &job).verify_slice(parts.mac).map_err(|_| Reason::Mismatch)?;
        Ok(Claims { uid: parts.uid.to_owned(), attempt: parts.attempt, key_id: parts.key_id.to_owned() })
    }

    /// What may stand for a token in a log: enough to tell two apart, useless to a reader.
    #[must_use]
    pub fn log_prefix(token: &str) -> LogPrefix {
        use sha2::Digest as _;
        let hash = sha2::Sha256::digest(token.as_bytes());
        LogPrefix(hex(&hash[..4]))
    }
}

/// The first eight hex digits of a token's SHA-256.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogPrefix(String);

impl fmt::Display for LogPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where Gemini is to deliver: `{external_url}/v1/callbacks/{namespace}/{name}/{token}`. The external URL may
/// have a path of its own, with or without a slash at the end.
#[must_use]
pub fn callback_url(external_url: &Url, job: &JobRef<'_>, token: &str) -> Url {
    callback_url_of(external_url, job.namespace, job.name, token)
}

/// The same, for one who knows no more of the job than the URL says.
#[must_use]
pub fn callback_url_of(external_url: &Url, namespace: &str, name: &str, token: &str) -> Url {
    let mut url = external_url.clone();
    let base = external_url.path().trim_end_matches('/');
    url.set_path(&format!("{base}/v1/callbacks/{namespace}/{name}/{token}"));
    url.set_query(None);
    url.set_fragment(None);
    url
}

fn mac(ring: &KeyRing, key: &RingKey, job: &JobRef<'_>) -> hmac::Hmac<sha2::Sha256> {
    key.secret.mac(&[
        &[VERSION],
        ring.cluster_id.as_bytes(),
        key.id.as_bytes(),
        job.namespace.as_bytes(),
        job.name.as_bytes(),
        job.uid.as_bytes(),
        &job.attempt.to_be_bytes(),
    ])
}

struct Parts<'a> {
    key_id: &'a str,
    attempt: u32,
    uid: &'a str,
    mac: &'a [u8],
}

/// Takes the bytes of a token apart. `None` for whatever [`Token::mint`] does not make.
fn split(bytes: &[u8]) -> Option<Parts<'_>> {
    let (&version, rest) = bytes.split_first()?;
    let (&key_id_len, rest) = rest.split_first()?;
    let (key_id, rest) = rest.split_at_checked(usize::from(key_id_len))?;
    let (attempt, rest) = rest.split_first_chunk::<ATTEMPT_BYTES>()?;
    let (uid, mac) = rest.split_at_checked(rest.len().checked_sub(MAC_BYTES)?)?;
    let uid_ok =
        (1..=MAX_UID_LEN).contains(&uid.len()) && uid.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-');
    if version != VERSION || !valid_key_id(key_id) || !uid_ok {
        return None;
    }
    Some(Parts {
        key_id: str::from_utf8(key_id).ok()?,
        attempt: u32::from_be_bytes(*attempt),
        uid: str::from_utf8(uid).ok()?,
        mac,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn ring() -> KeyRing {
        KeyRing::generate("cluster-1", at(0)).unwrap()
    }

    fn job() -> JobRef<'static> {
        JobRef { namespace: "team-a", name: "nightly", uid: UID, attempt: 1 }
    }

    #[test]
    fn a_token_passes_for_its_job_only() {
        let ring = ring();
        let token = Token::mint(&ring, at(0), &job());
        assert!(token.len() < 128, "short enough for any URL: {}", token.len());
        let claims = Token::verify(&ring, "team-a", "nightly", &token).unwrap();
        assert_eq!(claims, Claims { uid: UID.into(), attempt: 1, key_id: ring.keys[0].id.clone() });
        for (namespace, name) in [
            ("team-b", "nightly"),
            ("team-a", "nightlyx"),
            ("team", "-anightly"),
            ("", ""),
            ("nightly", "team-a"),
        ] {
            assert_eq!(Token::verify(&ring, namespace, name, &token), Err(Reason::Mismatch));
        }
    }

    #[test]
    fn every_field_is_under_the_mac() {
        let ring = ring();
        let forge = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = URL_SAFE_NO_PAD.decode(Token::mint(&ring, at(0), &job())).unwrap();
            change(&mut bytes);
            Token::verify(&ring, "team-a", "nightly", &URL_SAFE_NO_PAD.encode(bytes))
        };
        assert!(forge(&|_| ()).is_ok());
        assert_eq!(forge(&|b| b[0] = 2), Err(Reason::Malformed), "version");
        assert_eq!(forge(&|b| b[2] = b'z'), Err(Reason::UnknownKey), "key id");
        assert_eq!(forge(&|b| b[13] = 2), Err(Reason::Mismatch), "attempt");
        assert_eq!(forge(&|b| b[14] = b'1'), Err(Reason::Mismatch), "UID");
        assert_eq!(forge(&|b| *b.last_mut().unwrap() ^= 1), Err(Reason::Mismatch), "MAC");
        assert_eq!(forge(&|b| b[14] = b'/'), Err(Reason::Malformed), "UID alphabet");
        assert_eq!(forge(&|b| b[2] = b'Z'), Err(Reason::Malformed), "key id alphabet");
        assert_eq!(forge(&|b| b[1] = 200), Err(Reason::Malformed), "key id length");
        assert_eq!(forge(&|b| b.truncate(14 + 32)), Err(Reason::Malformed), "no UID");
        assert_eq!(forge(&|b| b.truncate(20)), Err(Reason::Malformed), "no MAC");
    }

    #[test]
    fn the_cluster_and_the_key_are_under_the_mac() {
        let ring = ring();
        let token = Token::mint(&ring, at(0), &job());
        let mut elsewhere = ring.clone();
        elsewhere.cluster_id = "cluster-2".into();
        assert_eq!(Token::verify(&elsewhere, "team-a", "nightly", &token), Err(Reason::Mismatch));
        let mut renamed = ring.clone();
        renamed.keys[0].secret = KeyRing::generate("x", at(0)).unwrap().keys[0].secret.clone();
        assert_eq!(Token::verify(&renamed, "team-a", "nightly", &token), Err(Reason::Mismatch));
        assert_eq!(
            Token::verify(&KeyRing::generate("cluster-1", at(0)).unwrap(), "team-a", "nightly", &token),
            Err(Reason::UnknownKey)
        );
    }

    #[test]
    fn after_a_rotation_both_keys_tokens_pass() {
        let mut ring = ring();
        let before = Token::mint(&ring, at(0), &job());
        ring.rotate(at(3600)).unwrap();
        let during = Token::mint(&ring, at(3600 + 299), &job());
        let after = Token::mint(&ring, at(3600 + 300), &job());
        assert_eq!(before, during);
        assert_ne!(before, after);
        for token in [&before, &after] {
            assert!(Token::verify(&ring, "team-a", "nightly", token).is_ok());
        }
        let mut empty = ring.clone();
        empty.keys.clear();
        let none = Token::mint(&empty, at(0), &job());
        assert_eq!(Token::verify(&ring, "team-a", "nightly", &none), Err(Reason::Malformed));
    }

    #[test]
    fn only_the_one_spelling_passes() {
        let ring = ring();
        let token = Token::mint(&ring, at(0), &job());
        let mut others = vec![
            String::new(),
            format!("{token}="),
            format!("{token}A"),
            format!("{token}\n"),
            format!(" {token}"),
            token[..token.len() - 1].to_owned(),
            "A".repeat(MAX_TOKEN_LEN + 1),
            "A".repeat(1 << 16),
        ];
        // 81 to 83 bytes leave spare bits in the last character: every other value of it must fail
        for last in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/".chars() {
            let other = format!("{}{last}", &token[..token.len() - 1]);
            if other != token {
                others.push(other);
            }
        }
        for other in others {
            assert!(Token::verify(&ring, "team-a", "nightly", &other).is_err(), "{other}");
        }
        assert_eq!(Token::verify(&ring, &"n".repeat(64), "nightly", &token), Err(Reason::Malformed));
        assert_eq!(Token::verify(&ring, &"n".repeat(63), "nightly", &token), Err(Reason::Mismatch));
        assert_eq!(Token::verify(&ring, "team-a", &"n".repeat(254), &token), Err(Reason::Malformed));
        assert_eq!(Token::verify(&ring, "team-a", &"n".repeat(253), &token), Err(Reason::Mismatch));
    }

    #[test]
    fn the_longest_possible_token_fits() {
        let mut ring = ring();
        ring.keys[0].id = "k".repeat(16);
        let job = JobRef { uid: &"u".repeat(64), attempt: u32::MAX, ..job() };
        let token = Token::mint(&ring, at(0), &job);
        assert_eq!(token.len(), MAX_TOKEN_LEN);
        assert!(Token::verify(&ring, "team-a", "nightly", &token).is_ok());
        let long = JobRef { uid: &"u".repeat(65), ..job };
        assert!(Token::verify(&ring, "team-a", "nightly", &Token::mint(&ring, at(0), &long)).is_err());
    }

    #[test]
    fn urls_keep_the_prefix() {
        for (external, expected) in [
            ("https://h.example", "https://h.example/v1/callbacks/team-a/nightly/TOKEN"),
            ("https://h.example/", "https://h.example/v1/callbacks/team-a/nightly/TOKEN"),
            ("https://h.example:8443/gbo", "https://h.example:8443/gbo/v1/callbacks/team-a/nightly/TOKEN"),
            ("https://h.example/gbo/?q#f", "https://h.example/gbo/v1/callbacks/team-a/nightly/TOKEN"),
        ] {
            let external = Url::parse(external).unwrap();
            assert_eq!(callback_url(&external, &job(), "TOKEN").as_str(), expected);
        }
    }

    #[test]
    fn logs_get_a_hash() {
        let prefix = Token::log_prefix("abc").to_string();
        assert_eq!(prefix, "ba7816bf");
    }

    #[test]
    fn reasons_are_distinct_words() {
        let all = [Reason::Malformed, Reason::UnknownKey, Reason::Mismatch].map(Reason::reason);
        assert_eq!(all, ["token_malformed", "token_unknown_key", "token_mismatch"]);
    }

    proptest! {
        #[test]
        fn whatever_is_minted_passes_and_says_the_same(
            namespace in "[a-z0-9-]{1,63}", name in "[a-z0-9.-]{1,253}", uid in "[a-f0-9-]{1,64}", attempt: u32,
        ) {
            let ring = ring();
            let job = JobRef { namespace: &namespace, name: &name, uid: &uid, attempt };
            let token = Token::mint(&ring, at(0), &job);
            let claims = Token::verify(&ring, &namespace, &name, &token).unwrap();
            prop_assert_eq!(claims.uid, uid);
            prop_assert_eq!(claims.attempt, attempt);
        }

        #[test]
        fn one_flipped_bit_is_refused(bit in 0usize..640) {
            let ring = ring();
            let mut bytes = URL_SAFE_NO_PAD.decode(Token::mint(&ring, at(0), &job())).unwrap();
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Token::verify(&ring, "team-a", "nightly", &URL_SAFE_NO_PAD.encode(bytes)).is_err());
        }

        #[test]
        fn nothing_else_passes_and_nothing_panics(token in ".{0,200}", bytes: Vec<u8>) {
            let ring = ring();
            prop_assert!(Token::verify(&ring, "team-a", "nightly", &token).is_err());
            let encoded = URL_SAFE_NO_PAD.encode(&bytes);
            prop_assert!(Token::verify(&ring, "team-a", "nightly", &encoded).is_err());
            let _ = KeyRing::parse(&bytes);
        }
    }
}
