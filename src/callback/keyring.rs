//! The key ring: the secrets that callback tokens are made with, as they are kept in one Kubernetes Secret.
//!
//! The controller creates the ring, rotates and retires keys; receivers only read it. Every replica reads it
//! on its own schedule, so a new key first only verifies (for [`PROPAGATION`]) and signs afterwards, and an
//! old key stays until nothing signed with it can come back (jobs that used it, plus [`AFTERLIFE`]).
//!
//! The ring also holds a key for fingerprints that never rotates: a keyed hash of an API key says "same key
//! as last time" without being of use to anyone who reads it in a status.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::{Zeroize as _, Zeroizing};

/// The key under which the ring is stored in its Secret's `data`.
pub const SECRET_KEY: &str = "keyring.json";
/// How long a new key only verifies. Receivers re-read the ring far more often than this.
pub const PROPAGATION: SignedDuration = SignedDuration::from_mins(5);
/// How long after the last job that used it a key is kept: Google retries a delivery for 24 hours.
pub const AFTERLIFE: SignedDuration = SignedDuration::from_hours(26);
/// A signer may work from a ring it read a while ago: until this long after its successor took over, a key is
/// still counted as in use.
pub const HANDOVER_MARGIN: SignedDuration = SignedDuration::from_hours(1);
/// The most keys that a ring may hold.
pub const MAX_KEYS: usize = 16;

const VERSION: u32 = 1;
const MAX_STORED_BYTES: usize = 64 * 1024;
const KEY_BYTES: usize = 32;
const MAX_ID_LEN: usize = 16;
const MAX_CLUSTER_ID_LEN: usize = 63;

/// A 32-byte secret. Wiped when dropped, never printed, never compared with `==`.
#[derive(Clone)]
pub struct KeyBytes(Zeroizing<[u8; KEY_BYTES]>);

impl KeyBytes {
    fn random() -> Self {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        rand::fill(bytes.as_mut_slice());
        Self(bytes)
    }

    fn decode(text: &SecretText) -> Option<Self> {
        let decoded = Zeroizing::new(STANDARD.decode(&text.0).ok()?);
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        if decoded.len() != KEY_BYTES || decoded.iter().all(|b| *b == 0) {
            return None;
        }
        bytes.copy_from_slice(&decoded);
        Some(Self(bytes))
    }

    fn encode(&self) -> SecretText {
        SecretText(STANDARD.encode(self.0.as_slice()))
    }

    /// HMAC-SHA256 over the given parts, each preceded by its length, so that no two lists of parts give the
    /// same input.
    pub(super) fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        // HMAC pads a short key with zeros to its block size: with the block built here, nothing can fail.
        let mut block = Zeroizing::new([0u8; 64]);
        block[..KEY_BYTES].copy_from_slice(self.0.as_slice());
        let mut mac = Hmac::<Sha256>::new((&*block).into());
        for part in parts {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac
    }
}

impl fmt::Debug for KeyBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyBytes(redacted)")
    }
}

/// One key of the ring.
#[derive(Clone, Debug)]
pub struct RingKey {
    /// Names the key inside tokens: 1 to 16 of `a-z0-9`.
    pub id: String,
    /// The secret itself.
    pub secret: KeyBytes,
    /// When it entered the ring.
    pub created: Timestamp,
    /// Since when no unfinished job has been known that could have used it.
    pub unused_since: Option<Timestamp>,
}

/// The keys that tokens are made with, the cluster they are made for, and the fingerprint key.
#[derive(Clone, Debug)]
pub struct KeyRing {
    /// Which installation the tokens are for: 1 to 63 of `A-Za-z0-9-`. Part of every MAC.
    pub cluster_id: String,
    /// Key of [`KeyRing::fingerprint`]. Never rotates.
    pub fingerprint_key: KeyBytes,
    /// Never empty, oldest first, ids unique.
    pub keys: Vec<RingKey>,
}

/// Why a ring was refused. Never quotes what was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyRingError {
    /// Not the JSON document that we write.
    #[error("the key ring is not readable: {0}")]
    Unreadable(String),
    /// Written by another version of the operator.
    #[error("the key ring has version {0}, this operator reads version 1")]
    Version(u32),
    /// Cluster ids go into names at Gemini, so they are short and plain.
    #[error("the cluster id must be 1 to 63 characters of A-Z a-z 0-9 and '-'")]
    ClusterId,
    /// A key that is unusable. The position, not the key.
    #[error("key number {0} of the key ring is unusable: {1}")]
    Key(usize, &'static str),
    /// The fingerprint key is unusable.
    #[error("the fingerprint key must be 32 bytes, base64 encoded")]
    FingerprintKey,
    /// None, or so many that something is wrong.
    #[error("the key ring must hold 1 to {MAX_KEYS} keys, it holds {0}")]
    KeyCount(usize),
    /// The last rotation has not reached every replica yet.
    #[error("the newest key is younger than {} s: wait until every replica has it", PROPAGATION.as_secs())]
    RotatedTooSoon,
}

/// A secret on its way to or from JSON.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct SecretText(String);

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredRing {
    version: u32,
    cluster_id: String,
    fingerprint_key: SecretText,
    keys: Vec<StoredKey>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredKey {
    id: String,
    secret: SecretText,
    created: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unused_since: Option<Timestamp>,
}

impl KeyRing {
    /// A new ring with one key, which signs at once: there is no older one, and no replica that lacks it
    /// could be asked yet.
    pub fn generate(cluster_id: &str, now: Timestamp) -> Result<Self, KeyRingError> {
        if !valid_cluster_id(cluster_id) {
            return Err(KeyRingError::ClusterId);
        }
        let mut ring =
            Self { cluster_id: cluster_id.to_owned(), fingerprint_key: KeyBytes::random(), keys: Vec::new() };
        ring.push_new_key(now);
        Ok(ring)
    }

    /// Reads what [`KeyRing::to_json`] wrote.
    pub fn parse(bytes: &[u8]) -> Result<Self, KeyRingError> {
        if bytes.len() > MAX_STORED_BYTES {
            return Err(KeyRingError::Unreadable("larger than 64 KiB".to_owned()));
        }
        // serde_json's messages can quote the document: only the position is passed on
        let stored: StoredRing = serde_json::from_slice(bytes)
            .map_err(|e| KeyRingError::Unreadable(format!("line {}, column {}", e.line(), e.column())))?;
        if stored.version != VERSION {
            return Err(KeyRingError::Version(stored.version));
        }
        if !valid_cluster_id(&stored.cluster_id) {
            return Err(KeyRingError::ClusterId);
        }
        if stored.keys.is_empty() || stored.keys.len() > MAX_KEYS {
            return Err(KeyRingError::KeyCount(stored.keys.len()));
        }
        let fingerprint_key =
            KeyBytes::decode(&stored.fingerprint_key).ok_or(KeyRingError::FingerprintKey)?;
        let mut keys: Vec<RingKey> = Vec::with_capacity(stored.keys.len());
        for (position, key) in stored.keys.into_iter().enumerate() {
            let refuse = |why| KeyRingError::Key(position, why);
            if !valid_key_id(key.id.as_bytes()) {
                return Err(refuse("its id must be 1 to 16 characters of a-z 0-9"));
            }
            if keys.iter().any(|k| k.id == key.id) {
                return Err(refuse("its id appears twice"));
            }
            let secret =
                KeyBytes::decode(&key.secret).ok_or_else(|| refuse("not 32 bytes, base64 encoded"))?;
            keys.push(RingKey { id: key.id, secret, created: key.created, unused_since: key.unused_since });
        }
        keys.sort_by_key(|k| k.created);
        Ok(Self { cluster_id: stored.cluster_id, fingerprint_key, keys })
    }

    /// The document to store under [`SECRET_KEY`]. It holds every secret of the ring.
    #[must_use]
    pub fn to_json(&self) -> Zeroizing<Vec<u8>> {
        let stored = StoredRing {
            version: VERSION,
            cluster_id: self.cluster_id.clone(),
            fingerprint_key: self.fingerprint_key.encode(),
            keys: self
                .keys
                .iter()
                .map(|k| StoredKey {
                    id: k.id.clone(),
                    secret: k.secret.encode(),
                    created: k.created,
                    unused_since: k.unused_since,
                })
                .collect(),
        };
        // strings, a number and times: serialising them into memory cannot fail
        Zeroizing::new(serde_json::to_vec(&stored).unwrap_or_default())
    }

    /// The key that new tokens are made with: the newest that every replica has had time to read, or the
    /// oldest if none is that old. `None` only for a ring without keys, which [`KeyRing::parse`] refuses.
    #[must_use]
    pub fn signing_key(&self, now: Timestamp) -> Option<&RingKey> {
        let propagated = |k: &&RingKey| now.duration_since(k.created) >= PROPAGATION;
        self.keys
            .iter()
            .filter(propagated)
            .max_by_key(|k| k.created)
            .or_else(|| self.keys.iter().min_by_key(|k| k.created))
    }

    /// Whether this is another state of the same ring: same cluster, same fingerprint key. In constant time.
    #[must_use]
    pub fn is_same_installation(&self, other: &Self) -> bool {
        use subtle::ConstantTimeEq as _;
        let (ours, theirs) = (self.fingerprint_key.0.as_slice(), other.fingerprint_key.0.as_slice());
        self.cluster_id == other.cluster_id && bool::from(ours.ct_eq(theirs))
    }

    /// Whether `newer` can take this ring's place: the same installation, and no key missing that jobs may still
    /// need. What was added does not matter.
    #[must_use]
    pub fn may_become(&self, newer: &Self, now: Timestamp) -> bool {
        let retired =
            |key: &RingKey| key.unused_since.is_some_and(|since| now.duration_since(since) >= AFTERLIFE);
        self.is_same_installation(newer)
            && self.keys.iter().all(|key| retired(key) || newer.key(&key.id).is_some())
    }

    /// The key with this id.
    #[must_use]
    pub fn key(&self, id: &str) -> Option<&RingKey> {
        self.keys.iter().find(|k| k.id == id)
    }

    /// Adds a key. It signs from [`PROPAGATION`] on; the older keys go on verifying until
    /// [`KeyRing::retire`] removes them.
    pub fn rotate(&mut self, now: Timestamp) -> Result<&RingKey, KeyRingError> {
        if self.keys.len() >= MAX_KEYS {
            return Err(KeyRingError::KeyCount(self.keys.len() + 1));
        }
        if self.keys.iter().any(|k| now.duration_since(k.created) < PROPAGATION) {
            return Err(KeyRingError::RotatedTooSoon);
        }
        Ok(self.push_new_key(now))
    }

    /// Removes the keys that nothing needs any more, and notes which have fallen out of use. Returns whether
    /// the ring changed, and so must be stored.
    ///
    /// `oldest_unfinished` is when the oldest unfinished job was submitted (the earliest time at which a token
    /// that still matters was made), from a complete listing; `None` means there is no unfinished job.
    ///
    /// A key is out of use once its successor has signed for [`HANDOVER_MARGIN`] and every unfinished job is
    /// younger than that; it is removed when that has held for [`AFTERLIFE`]. The key that signs, and any that
    /// is newer, always stay.
    pub fn retire(&mut self, now: Timestamp, oldest_unfinished: Option<Timestamp>) -> bool {
        let oldest_needed = oldest_unfinished.map_or(now, |t| t.min(now));
        let successors: Vec<Option<Timestamp>> =
            self.keys.iter().map(|k| self.successor(k).map(|s| s.created)).collect();
        let mut changed = false;
        let mut kept = Vec::with_capacity(self.keys.len());
        for (mut key, successor) in std::mem::take(&mut self.keys).into_iter().zip(successors) {
            let in_use = successor.is_none_or(|taken_over| {
                oldest_needed.duration_since(taken_over) <= PROPAGATION + HANDOVER_MARGIN
            });
            let unused_since = if in_use { None } else { key.unused_since.or(Some(now)) };
            changed |= unused_since != key.unused_since;
            key.unused_since = unused_since;
            if unused_since.is_some_and(|since| now.duration_since(since) >= AFTERLIFE) {
                changed = true;
                continue;
            }
            kept.push(key);
        }
        self.keys = kept;
        changed
    }

    /// A keyed hash of a secret (an API key): says whether two are the same, and nothing else. 32 hex digits.
    #[must_use]
    pub fn fingerprint(&self, secret: &[u8]) -> String {
        let tag = self.fingerprint_key.mac(&[b"fingerprint v1", secret]).finalize().into_bytes();
        hex(&tag[..16])
    }

    /// The next newer key: the one that took over from this one.
    fn successor(&self, key: &RingKey) -> Option<&RingKey> {
        self.keys.iter().filter(|k| k.created > key.created).min_by_key(|k| k.created)
    }

    fn push_new_key(&mut self, now: Timestamp) -> &RingKey {
        let mut id = hex(&rand::random::<[u8; 4]>());
        while self.key(&id).is_some() {
            id = hex(&rand::random::<[u8; 4]>());
        }
        let position = self.keys.partition_point(|k| k.created <= now);
        self.keys
            .insert(position, RingKey { id, secret: KeyBytes::random(), created: now, unused_since: None });
        &self.keys[position]
    }
}

fn valid_cluster_id(id: &str) -> bool {
    (1..=MAX_CLUSTER_ID_LEN).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// What may stand for a key id in a ring or a token.
pub(super) fn valid_key_id(id: &[u8]) -> bool {
    (1..=MAX_ID_LEN).contains(&id.len()) && id.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // writing to a String cannot fail
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    const MINUTE: i64 = 60;
    const HOUR: i64 = 3600;

    #[test]
    fn survives_storage() {
        let mut ring = KeyRing::generate("cluster-1", at(0)).unwrap();
        ring.rotate(at(HOUR)).unwrap();
        ring.retire(at(3 * HOUR), None);
        let read = KeyRing::parse(&ring.to_json()).unwrap();
        assert_eq!(read.cluster_id, "cluster-1");
        assert_eq!(read.to_json(), ring.to_json());
        assert_eq!(read.fingerprint(b"key"), ring.fingerprint(b"key"));
        assert_eq!(read.keys[0].unused_since, Some(at(3 * HOUR)));
        assert_eq!(read.keys[1].unused_since, None);
    }

    #[test]
    fn a_stored_ring_has_at_most_64_kib() {
        let mut document = KeyRing::generate("c", at(0)).unwrap().to_json().to_vec();
        document.resize(64 * 1024, b' ');
        assert!(KeyRing::parse(&document).is_ok());
        document.push(b' ');
        assert!(matches!(KeyRing::parse(&document).unwrap_err(), KeyRingError::Unreadable(_)));
    }

    #[test]
    fn keys_are_random_and_printed_nowhere() {
        let a = KeyRing::generate("c", at(0)).unwrap();
        let b = KeyRing::generate("c", at(0)).unwrap();
        assert_ne!(a.to_json(), b.to_json());
        assert_ne!(a.fingerprint(b"x"), b.fingerprint(b"x"));
        assert_ne!(a.fingerprint(b"x"), a.fingerprint(b"y"));
        assert_eq!(a.fingerprint(b"x").len(), 32);
        let printed = format!("{a:?}");
        let stored: serde_json::Value = serde_json::from_slice(&a.to_json()).unwrap();
        for secret in [&stored["fingerprintKey"], &stored["keys"][0]["secret"]] {
            assert!(!printed.contains(secret.as_str().unwrap()));
        }
        assert!(!printed.contains(&format!("{:?}", a.keys[0].secret.0.as_slice())));
        assert!(printed.contains("redacted"));
    }

    #[test]
    fn a_new_key_only_verifies_until_every_replica_has_it() {
        let mut ring = KeyRing::generate("c", at(0)).unwrap();
        let first = ring.keys[0].id.clone();
        assert_eq!(ring.signing_key(at(0)).unwrap().id, first, "the only key signs at once");
        assert_eq!(ring.signing_key(at(-HOUR)).unwrap().id, first, "even for a clock that is behind");
        let second = ring.rotate(at(HOUR)).unwrap().id.clone();
        assert_ne!(first, second);
        assert_eq!(ring.signing_key(at(HOUR + 5 * MINUTE - 1)).unwrap().id, first);
        assert_eq!(ring.signing_key(at(HOUR + 5 * MINUTE)).unwrap().id, second);
        assert_eq!(ring.key(&first).unwrap().id, first, "the old one still verifies");
        assert!(ring.key("nosuchkey").is_none());
    }

    #[test]
    fn another_ring_is_told_from_a_later_state_of_the_same() {
        let ring = KeyRing::generate("c", at(0)).unwrap();
        let mut rotated = ring.clone();
        rotated.rotate(at(3600)).unwrap();
        assert!(ring.may_become(&rotated, at(3600)) && ring.may_become(&ring, at(0)));
        assert!(!rotated.may_become(&ring, at(3600)), "a key is missing that jobs may need");
        let mut retired = rotated.clone();
        retired.keys[0].unused_since = Some(at(3600));
        let mut later = retired.clone();
        later.keys.remove(0);
        let day = at(3600) + AFTERLIFE;
        assert!(retired.may_become(&later, day) && !retired.may_become(&later, at(3601)));
        assert!(!ring.may_become(&KeyRing::generate("c", at(0)).unwrap(), at(0)), "other fingerprints");
        let mut elsewhere = ring.clone();
        elsewhere.cluster_id = "d".to_owned();
        assert!(!ring.may_become(&elsewhere, at(0)));
    }

    #[test]
    fn rotation_is_bounded() {
        let mut ring = KeyRing::generate("c", at(0)).unwrap();
        assert_eq!(ring.rotate(at(5 * MINUTE - 1)).unwrap_err(), KeyRingError::RotatedTooSoon);
        for n in 1..16 {
            ring.rotate(at(n * 5 * MINUTE)).unwrap();
        }
        assert_eq!(ring.rotate(at(100 * HOUR)).unwrap_err(), KeyRingError::KeyCount(17));
        assert_eq!(ring.keys.len(), 16);
        assert!(KeyRing::parse(&ring.to_json()).is_ok());
    }

    #[test]
    fn an_old_key_outlives_its_jobs_by_26_hours() {
        let mut ring = KeyRing::generate("c", at(0)).unwrap();
        let first = ring.keys[0].id.clone();
        ring.rotate(at(100 * HOUR)).unwrap();
        let handover = 100 * HOUR + 5 * MINUTE + HOUR;

        assert!(!ring.retire(at(handover), None), "its successor has only just taken over");
        assert!(!ring.retire(at(300 * HOUR), Some(at(handover))), "a job may still have used it");
        assert!(!ring.retire(at(300 * HOUR), Some(at(0))));
        assert!(ring.retire(at(300 * HOUR), Some(at(handover + 1))), "out of use from here");
        assert_eq!(ring.keys[0].unused_since, Some(at(300 * HOUR)));
        assert!(ring.retire(at(310 * HOUR), Some(at(99 * HOUR))), "a job turned up again");
        assert_eq!(ring.keys[0].unused_since, None);
        assert!(ring.retire(at(320 * HOUR), None));
        assert!(!ring.retire(at(346 * HOUR - 1), None));
        assert!(ring.key(&first).is_some());
        assert!(ring.retire(at(346 * HOUR), None));
        assert!(ring.key(&first).is_none());
        assert_eq!(ring.keys.len(), 1);
        assert!(!ring.retire(at(10_000 * HOUR), None), "the last key always stays");
    }

    #[test]
    fn a_job_start_from_the_future_does_not_shorten_a_keys_life() {
        let mut ring = KeyRing::generate("c", at(0)).unwrap();
        ring.rotate(at(HOUR)).unwrap();
        assert!(!ring.retire(at(HOUR + MINUTE), Some(at(1000 * HOUR))));
    }

    #[test]
    fn bad_rings_are_refused_without_quoting_them() {
        let good = KeyRing::generate("c", at(0)).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&good.to_json()).unwrap();
        let with = |edit: &dyn Fn(&mut serde_json::Value)| {
            let mut copy = json.clone();
            edit(&mut copy);
            KeyRing::parse(&serde_json::to_vec(&copy).unwrap())
        };
        let text = |n: usize| serde_json::Value::String(STANDARD.encode(vec![7; n]));
        assert!(with(&|_| ()).is_ok());
        assert_eq!(with(&|v| v["version"] = 2.into()).unwrap_err(), KeyRingError::Version(2));
        for id in ["", "a/b", "ä", &"x".repeat(64)] {
            assert_eq!(with(&|v| v["clusterId"] = id.into()).unwrap_err(), KeyRingError::ClusterId, "{id}");
        }
        assert!(with(&|v| v["clusterId"] = "x".repeat(63).into()).is_ok());
        assert_eq!(with(&|v| v["keys"] = serde_json::json!([])).unwrap_err(), KeyRingError::KeyCount(0));
        let key = json["keys"][0].clone();
        let many: Vec<_> = (0..17)
            .map(|n| {
                let mut k = key.clone();
                k["id"] = format!("k{n}").into();
                k
            })
            .collect();
        assert_eq!(with(&|v| v["keys"] = many.clone().into()).unwrap_err(), KeyRingError::KeyCount(17));
        assert!(with(&|v| v["keys"] = many[..16].to_vec().into()).is_ok());
        assert!(matches!(
            with(&|v| v["keys"] = serde_json::json!([key, key])).unwrap_err(),
            KeyRingError::Key(1, _)
        ));
        for id in ["", "A", "a.b", "a-b", &"a".repeat(17)] {
            assert!(matches!(
                with(&|v| v["keys"][0]["id"] = id.into()).unwrap_err(),
                KeyRingError::Key(0, _)
            ));
        }
        assert!(with(&|v| v["keys"][0]["id"] = "a".repeat(16).into()).is_ok());
        for n in [0, 31, 33] {
            assert!(matches!(
                with(&|v| v["keys"][0]["secret"] = text(n)).unwrap_err(),
                KeyRingError::Key(0, _)
            ));
            assert_eq!(with(&|v| v["fingerprintKey"] = text(n)).unwrap_err(), KeyRingError::FingerprintKey);
        }
        let zeros: serde_json::Value = STANDARD.encode([0; 32]).into();
        assert!(with(&|v| v["keys"][0]["secret"] = zeros.clone()).is_err());
        let quoted = with(&|v| v["version"] = "canary-7f3a".into()).unwrap_err();
        assert!(!quoted.to_string().contains("canary"), "{quoted}");
        assert!(matches!(KeyRing::parse(b"").unwrap_err(), KeyRingError::Unreadable(_)));
        assert!(matches!(KeyRing::parse(&vec![b' '; 65 * 1024]).unwrap_err(), KeyRingError::Unreadable(_)));
        assert!(KeyRing::generate("no spaces", at(0)).is_err());
    }

    #[test]
    fn keys_are_kept_oldest_first_whatever_the_order_stored() {
        let mut ring = KeyRing::generate("c", at(0)).unwrap();
        ring.rotate(at(HOUR)).unwrap();
        ring.keys.reverse();
        let read = KeyRing::parse(&ring.to_json()).unwrap();
        assert!(read.keys[0].created < read.keys[1].created);
        assert_eq!(ring.signing_key(at(2 * HOUR)).unwrap().id, read.keys[1].id);
        let early = ring.rotate(at(2 * HOUR)).unwrap();
        assert_eq!(early.created, at(2 * HOUR));
    }
}
