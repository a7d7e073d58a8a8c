//! Standard Webhooks signatures: what the three headers must look like, and `v1a` (Ed25519) and `v1` (HMAC).
//!
//! The libraries out there disagree in many corners; these are our answers:
//!
//! - `webhook-timestamp` matches `^[1-9][0-9]{0,11}$`;
//! - `webhook-id` is 1 to 256 visible ASCII characters without `.` and `,`. Signed is `id.timestamp.body`, so an
//!   id with a dot could borrow from the timestamp; a comma would be two header lines folded into one. Google
//!   was seen to send `msg_` and a UUID, but promises nothing, so all else is allowed;
//! - `webhook-signature` is a list of entries separated by spaces, of which the first four count. An entry is
//!   `label,base64` with exactly one comma and the one strict spelling of base64. Whatever else it is, it is
//!   skipped: never fatal, never a match;
//! - the MAC is over the bytes of the body as they came.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signature, VerifyingKey};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use zeroize::{Zeroize as _, Zeroizing};

use super::jwks::Ed25519Key;
use super::verdict::{Delivery, Refusal, Scheme};

/// How many entries of one `webhook-signature` are looked at.
pub const MAX_ENTRIES: usize = 4;
const MAX_ID_LEN: usize = 256;
const MAX_TIMESTAMP_DIGITS: usize = 12;
const MAX_JWT_LEN: usize = 8 * 1024;
const MAC_LEN: usize = 32;
const MIN_SECRET_LEN: usize = 24;
const MAX_SECRET_LEN: usize = 64;

/// A delivery whose id and timestamp are well formed.
#[derive(Clone, Copy)]
pub struct Signed<'a> {
    /// `webhook-id`
    pub id: &'a [u8],
    /// `webhook-timestamp`, in seconds since 1970.
    pub timestamp: i64,
    digits: &'a [u8],
    signature: &'a [u8],
    body: &'a [u8],
}

/// One entry of `webhook-signature` that is well formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry<'a> {
    V1a([u8; 64]),
    V1([u8; MAC_LEN]),
    Jwt(&'a str),
}

impl Entry<'_> {
    pub(super) fn scheme(&self) -> Scheme {
        match self {
            Self::V1a(_) => Scheme::V1a,
            Self::V1(_) => Scheme::V1,
            Self::Jwt(_) => Scheme::Jwt,
        }
    }

    fn read(bytes: &[u8]) -> Option<Entry<'_>> {
        let text = str::from_utf8(bytes).ok()?;
        let Some((label, value)) = text.split_once(',') else {
            let is_jwt = text.len() <= MAX_JWT_LEN && text.split('.').count() == 3;
            return is_jwt.then_some(Entry::Jwt(text));
        };
        // any further comma is not base64
        match label {
            "v1a" => Some(Entry::V1a(decode_exactly(value)?)),
            "v1" => Some(Entry::V1(decode_exactly(value)?)),
            _ => None,
        }
    }
}

/// Strict base64 of exactly so many bytes: one spelling only. The length is looked at first, so that nothing is
/// allocated for a header full of letters.
fn decode_exactly<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != N.div_ceil(3) * 4 {
        return None;
    }
    STANDARD.decode(text).ok()?.try_into().ok()
}

impl<'a> Signed<'a> {
    pub(super) fn read(delivery: &Delivery<'a>) -> Result<Self, Refusal> {
        let id_ok = (1..=MAX_ID_LEN).contains(&delivery.id.len())
            && delivery.id.iter().all(|b| b.is_ascii_graphic() && *b != b'.' && *b != b',');
        if !id_ok {
            return Err(Refusal::IdInvalid);
        }
        Ok(Self {
            id: delivery.id,
            timestamp: read_timestamp(delivery.timestamp).ok_or(Refusal::TimestampInvalid)?,
            digits: delivery.timestamp,
            signature: delivery.signature,
            body: delivery.body,
        })
    }

    /// The entries that count and are well formed.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'a>> + use<'a> {
        self.signature
            .split(|b| *b == b' ')
            .filter(|entry| !entry.is_empty())
            .take(MAX_ENTRIES)
            .filter_map(Entry::read)
    }

    /// The text that is signed.
    fn text(&self) -> Vec<u8> {
        [self.id, b".", self.digits, b".", self.body].concat()
    }
}

/// `^[1-9][0-9]{0,11}$`
fn read_timestamp(digits: &[u8]) -> Option<i64> {
    let plain = digits.len() <= MAX_TIMESTAMP_DIGITS
        && matches!(digits.first(), Some(b'1'..=b'9'))
        && digits.iter().all(u8::is_ascii_digit);
    if !plain {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok()
}

/// Tries the keys, the one that matched last first, and says which one fitted.
pub(super) fn fits_ed25519(
    signed: &Signed<'_>,
    given: &[u8; 64],
    keys: &[Ed25519Key],
    first: usize,
) -> Result<usize, Refusal> {
    if keys.is_empty() {
        return Err(Refusal::NoKey);
    }
    let text = signed.text();
    let given = Signature::from_bytes(given);
    let first = first % keys.len();
    (first..keys.len())
        .chain(0..first)
        .find(|n| keys[*n].key.verify_strict(&text, &given).is_ok())
        .ok_or(Refusal::BadSignature)
}

/// Tries the secrets. All of them, whichever fits, so that time says nothing about which did.
pub(super) fn fits_hmac(
    signed: &Signed<'_>,
    given: &[u8; MAC_LEN],
    secrets: &[HmacSecret],
) -> Result<(), Refusal> {
    if secrets.is_empty() {
        return Err(Refusal::NoKey);
    }
    let fits = secrets.iter().fold(false, |fits, secret| {
        let mut mac = secret.mac();
        for part in [signed.id, b".", signed.digits, b".", signed.body] {
            mac.update(part);
        }
        mac.verify_slice(given).is_ok() | fits
    });
    if fits { Ok(()) } else { Err(Refusal::BadSignature) }
}

/// Why a key was refused when it was configured. Never quotes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Another kind of key, or none.
    #[error("expected a key that begins with {0}")]
    Prefix(&'static str),
    /// Not base64.
    #[error("what follows {0} is not base64 with its padding")]
    Encoding(&'static str),
    /// Too short to protect anything, or longer than the standard allows.
    #[error("a webhook secret has {MIN_SECRET_LEN} to {MAX_SECRET_LEN} bytes, this one has {0}")]
    SecretLength(usize),
    /// Not a public key, or one of the few for which anybody can make signatures.
    #[error("not a usable Ed25519 public key")]
    PublicKey,
}

/// The shared secret of a webhook: `whsec_…`.
#[derive(Clone)]
pub struct HmacSecret {
    /// Padded with zeros to HMAC's block size, which is what HMAC does with a shorter key.
    block: Zeroizing<[u8; MAX_SECRET_LEN]>,
}

impl HmacSecret {
    const PREFIX: &str = "whsec_";

    /// Reads `whsec_` and base64. An empty or short secret is refused here, when it is configured.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let encoded = text.strip_prefix(Self::PREFIX).ok_or(KeyError::Prefix(Self::PREFIX))?;
        let mut secret = STANDARD.decode(encoded).map_err(|_| KeyError::Encoding(Self::PREFIX))?;
        let length = secret.len();
        let mut block = Zeroizing::new([0; MAX_SECRET_LEN]);
        if (MIN_SECRET_LEN..=MAX_SECRET_LEN).contains(&length) {
            block[..length].copy_from_slice(&secret);
        }
        secret.zeroize();
        if (MIN_SECRET_LEN..=MAX_SECRET_LEN).contains(&length) {
            Ok(Self { block })
        } else {
            Err(KeyError::SecretLength(length))
        }
    }

    fn mac(&self) -> Hmac<Sha256> {
        Hmac::new((&*self.block).into())
    }
}

impl fmt::Debug for HmacSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HmacSecret(redacted)")
    }
}

/// Reads a public key as the standard writes it: `whpk_` and base64 of 32 bytes.
pub fn parse_public_key(text: &str) -> Result<Ed25519Key, KeyError> {
    const PREFIX: &str = "whpk_";
    let encoded = text.strip_prefix(PREFIX).ok_or(KeyError::Prefix(PREFIX))?;
    let bytes = STANDARD.decode(encoded).map_err(|_| KeyError::Encoding(PREFIX))?;
    Ed25519Key::from_bytes(&bytes).ok_or(KeyError::PublicKey)
}

impl Ed25519Key {
    /// `None` for what is no point of the curve, and for the weak points, for which anybody can sign.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let key = VerifyingKey::from_bytes(bytes.try_into().ok()?).ok()?;
        (!key.is_weak()).then_some(Self { key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_plain_seconds() {
        for good in ["1", "9", "1614265330", "999999999999"] {
            assert_eq!(read_timestamp(good.as_bytes()), Some(good.parse().unwrap()));
        }
        for bad in [
            "",
            "0",
            "0123",
            "+123",
            "-1",
            "123abc",
            "abc",
            "1.7e9",
            "1_700",
            ".5",
            "5.",
            " 1",
            "1 ",
            "1\n",
            "0x10",
            "1000000000000",
            "9223372036854775807",
            "-9223372036854775808",
            "１２",
            "1,1",
            "1, 1",
            "NaN",
        ] {
            assert_eq!(read_timestamp(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(read_timestamp(&[b'1', 0xff]), None);
        assert_eq!(read_timestamp(&[b'9'; 4096]), None);
    }

    #[test]
    fn secrets_are_judged_when_they_are_configured() {
        let secret = |n: usize| format!("whsec_{}", STANDARD.encode(vec![7; n]));
        for n in [24, 32, 64] {
            assert!(HmacSecret::parse(&secret(n)).is_ok(), "{n}");
        }
        for n in [0, 1, 23, 65, 100] {
            assert_eq!(HmacSecret::parse(&secret(n)).unwrap_err(), KeyError::SecretLength(n));
        }
        for other in [
            "",
            "whsec",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=",
        ] {
            assert_eq!(HmacSecret::parse(other).unwrap_err(), KeyError::Prefix("whsec_"));
        }
        for other in
            ["whsec_*", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw=", "whsec_ MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
        {
            assert_eq!(HmacSecret::parse(other).unwrap_err(), KeyError::Encoding("whsec_"));
        }
        assert_eq!(format!("{:?}", HmacSecret::parse(&secret(24)).unwrap()), "HmacSecret(redacted)");
    }

    #[test]
    fn public_keys_are_judged_when_they_are_configured() {
        assert!(parse_public_key("whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=").is_ok());
        assert_eq!(
            parse_public_key("whsk_AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=").unwrap_err(),
            KeyError::Prefix("whpk_")
        );
        assert_eq!(
            parse_public_key("whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4").unwrap_err(),
            KeyError::Encoding("whpk_")
        );
        assert_eq!(parse_public_key("whpk_AAAA").unwrap_err(), KeyError::PublicKey);
        // the neutral element and another point of small order: anybody can sign for them
        for weak in [[1u8, 0], [0, 0]] {
            let mut bytes = [0; 32];
            bytes[..2].copy_from_slice(&weak);
            let text = format!("whpk_{}", STANDARD.encode(bytes));
            assert_eq!(parse_public_key(&text).unwrap_err(), KeyError::PublicKey);
        }
    }

    #[test]
    fn entries_are_well_formed_or_nothing() {
        let v1a = format!("v1a,{}", STANDARD.encode([1; 64]));
        let v1 = format!("v1,{}", STANDARD.encode([1; 32]));
        assert_eq!(Entry::read(v1a.as_bytes()), Some(Entry::V1a([1; 64])));
        assert_eq!(Entry::read(v1.as_bytes()), Some(Entry::V1([1; 32])));
        assert_eq!(Entry::read(b"a.b.c"), Some(Entry::Jwt("a.b.c")));
        let long = format!("a.b.{}", "c".repeat(8 * 1024 - 4));
        assert!(Entry::read(long.as_bytes()).is_some());
        for bad in [
            format!("{v1a},"),
            format!("{v1a},x"),
            format!(",{v1a}"),
            format!("V1A{}", &v1a[3..]),
            format!("v2{}", &v1[2..]),
            format!("v1{}", &v1a[3..]),
            format!("v1a{}", &v1[2..]),
            v1.replace(',', ""),
            v1.replace(',', ";"),
            v1.replace('=', ""),
            v1.replace("BA", "B-"),
            v1.replace("E=", "F="),
            format!("{v1a}\t{v1a}"),
            "v1a".into(),
            "v1a,".into(),
            ",".into(),
            "a.b".into(),
            "a.b.c.d".into(),
            format!("{long}c"),
        ] {
            assert_eq!(Entry::read(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(Entry::read(&[b'v', b'1', b',', 0xff]), None);
    }
}
