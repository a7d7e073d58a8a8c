//! The one function that decides whether a delivery is believed, and the reasons it can give.
//!
//! [`verify`] is what the receiver calls and what `gemini-batch-operator verify` calls: there is no second
//! opinion. It takes the headers, the raw body, keys, a policy and the time, and touches nothing else. The
//! token in the URL is checked before (see [`super::token`]): a signature alone only proves "some Gemini job".

use http::HeaderMap;
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};

use super::jwks::KeySet;
use super::jwt;
use super::keyring::hex;
use super::signature::{self, Entry, HmacSecret, Signed};

/// How old a delivery may be whose URL carries our token. Google retries for 24 hours and may not refresh the
/// timestamp; a replay is harmless there, since a hint only makes the controller look.
pub const PAST_TOKEN_BOUND: SignedDuration = SignedDuration::from_hours(26);
/// How old a delivery to a fixed address may be: what every Standard Webhooks library allows.
pub const PAST_STATIC: SignedDuration = SignedDuration::from_secs(300);
/// How far a sender's clock may be ahead of ours.
pub const FUTURE: SignedDuration = SignedDuration::from_secs(300);

const MAX_HINT_ID_LEN: usize = 128;

/// How a delivery is signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Ed25519, `v1a,…`: what deliveries to per-request webhooks were really seen to carry.
    V1a,
    /// An RS256 JWT: what Google's guide says they carry.
    Jwt,
    /// HMAC-SHA256, `v1,…`: webhooks that are set up per project.
    V1,
}

impl Scheme {
    /// The word for metrics, logs and flags.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1a => "v1a",
            Self::Jwt => "jwt",
            Self::V1 => "v1",
        }
    }
}

impl std::str::FromStr for Scheme {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "v1a" => Ok(Self::V1a),
            "jwt" => Ok(Self::Jwt),
            "v1" => Ok(Self::V1),
            _ => Err("expected v1a, jwt or v1".to_owned()),
        }
    }
}

/// A delivery as it came in: three headers, each exactly once, and the bytes of the body as they were sent.
#[derive(Clone, Copy)]
pub struct Delivery<'a> {
    /// `webhook-id`
    pub id: &'a [u8],
    /// `webhook-timestamp`
    pub timestamp: &'a [u8],
    /// `webhook-signature`
    pub signature: &'a [u8],
    /// The body, unparsed.
    pub body: &'a [u8],
}

impl<'a> Delivery<'a> {
    /// Picks the three headers. A header that is missing or there twice is refused: which of two values a
    /// sender meant, and which one a proxy looked at, is anybody's guess.
    pub fn from_headers(headers: &'a HeaderMap, body: &'a [u8]) -> Result<Self, Refusal> {
        let once = |name: &'static str| {
            let mut values = headers.get_all(name).iter();
            let first = values.next().ok_or(Refusal::HeaderMissing(name))?;
            match values.next() {
                None => Ok(first.as_bytes()),
                Some(_) => Err(Refusal::HeaderRepeated(name)),
            }
        };
        Ok(Self {
            id: once("webhook-id")?,
            timestamp: once("webhook-timestamp")?,
            signature: once("webhook-signature")?,
            body,
        })
    }
}

/// What a delivery may be checked against. Never taken from the delivery itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Keys<'a> {
    /// Google's public keys.
    pub public: Option<&'a KeySet>,
    /// Secrets of webhooks that are set up per project; several while one is being rotated.
    pub secrets: &'a [HmacSecret],
    /// Which Ed25519 key to try first: [`Accepted::key`] of the last success. Without key ids in Google's set
    /// this saves two thirds of the work.
    pub first: usize,
}

/// What is accepted.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The schemes that count. Entries of any other are skipped.
    pub schemes: Vec<Scheme>,
    /// How old a delivery may be.
    pub past: SignedDuration,
    /// How far in the future its timestamp may be.
    pub future: SignedDuration,
    /// The audiences that a JWT may be for. Empty: none is.
    pub audience: Vec<String>,
}

impl Policy {
    /// For a delivery whose URL carries our token: Ed25519 and JWT, 26 hours back.
    #[must_use]
    pub fn token_bound(audience: Vec<String>) -> Self {
        Self { schemes: vec![Scheme::V1a, Scheme::Jwt], past: PAST_TOKEN_BOUND, future: FUTURE, audience }
    }

    /// For a delivery to a fixed address, signed with a shared secret: five minutes either way.
    #[must_use]
    pub fn fixed_address() -> Self {
        Self { schemes: vec![Scheme::V1], past: PAST_STATIC, future: FUTURE, audience: Vec::new() }
    }

    fn accepts(&self, scheme: Scheme) -> bool {
        self.schemes.contains(&scheme)
    }
}

/// A delivery that was believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// How it was signed.
    pub scheme: Scheme,
    /// The position of the Ed25519 key that fitted.
    pub key: Option<usize>,
    /// What makes a second delivery the same one: the hash of the webhook id, or of the JWT, which binds no id.
    pub replay_key: [u8; 32],
    /// The id for `status.callback`: at most 128 of `A-Za-z0-9_-`, the same for the same replay key.
    pub hint_id: String,
    /// How many seconds ago its timestamp was (of a JWT with `iat`: that). Negative: in the future.
    pub age: i64,
}

/// Why a delivery was refused. In the order in which the checks come: of several entries in one header, the
/// one that came furthest gives the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// A header is missing.
    #[error("the {0} header is missing")]
    HeaderMissing(&'static str),
    /// A header is there more than once.
    #[error("the {0} header is there more than once")]
    HeaderRepeated(&'static str),
    /// `webhook-id` could be confused with what follows it in the signed text, or is too long.
    #[error("webhook-id must be 1 to 256 visible ASCII characters without '.' and ','")]
    IdInvalid,
    /// `webhook-timestamp` is not plain seconds.
    #[error("webhook-timestamp must be seconds since 1970 as plain digits, without sign or leading zero")]
    TimestampInvalid,
    /// Too old for the policy.
    #[error("the delivery is {0} s old, older than is accepted")]
    TooOld(i64),
    /// From the future.
    #[error("the delivery's timestamp is {0} s in the future, more than is accepted")]
    TooNew(i64),
    /// Nothing in `webhook-signature` could be read as a signature.
    #[error(
        "webhook-signature holds no well-formed entry (v1a, v1 or a JWT) among its first {}",
        signature::MAX_ENTRIES
    )]
    NoSignature,
    /// There are signatures, but of schemes that are not accepted here.
    #[error("webhook-signature is of a scheme that is not accepted here")]
    SchemeNotAccepted,
    /// There is no key of the type that the signature needs. Says nothing about the delivery: ask again later.
    #[error("there is no key to check this signature with")]
    NoKey,
    /// A JWT that cannot be read.
    #[error("the JWT is not well formed")]
    JwtMalformed,
    /// A JWT signed in another way than RS256, `none` and HMAC included.
    #[error("the JWT's algorithm is not RS256")]
    JwtAlgorithm,
    /// A JWT with `crit`: it says that who does not understand the extension must refuse it.
    #[error("the JWT demands extensions (crit)")]
    JwtCritical,
    /// A JWT that names a key which is not in the set.
    #[error("the JWT was signed with a key that is not in the key set")]
    JwtUnknownKey,
    /// No signature fits any key. Also what a changed body, id or timestamp gives.
    #[error("no signature fits any of the keys")]
    BadSignature,
    /// Genuine, but a claim is missing or of the wrong type.
    #[error("the JWT's claim {0} is missing or not readable")]
    JwtClaim(&'static str),
    /// Genuine, but no longer valid.
    #[error("the JWT has expired or was issued too long ago")]
    JwtExpired,
    /// Genuine, but not valid yet.
    #[error("the JWT is not valid yet (nbf or iat in the future)")]
    JwtNotYetValid,
    /// Genuine, but meant for somebody else.
    #[error("the JWT is for another audience")]
    JwtAudience,
}

impl Refusal {
    /// A short fixed word, for metrics and logs.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::HeaderMissing(_) => "header_missing",
            Self::HeaderRepeated(_) => "header_repeated",
            Self::IdInvalid => "id_invalid",
            Self::TimestampInvalid => "timestamp_invalid",
            Self::TooOld(_) => "too_old",
            Self::TooNew(_) => "too_new",
            Self::NoSignature => "no_signature",
            Self::SchemeNotAccepted => "scheme_not_accepted",
            Self::NoKey => "no_key",
            Self::JwtMalformed => "jwt_malformed",
            Self::JwtAlgorithm => "jwt_algorithm",
            Self::JwtCritical => "jwt_crit",
            Self::JwtUnknownKey => "jwt_unknown_key",
            Self::BadSignature => "bad_signature",
            Self::JwtClaim(_) => "jwt_claim",
            Self::JwtExpired => "jwt_expired",
            Self::JwtNotYetValid => "jwt_not_yet_valid",
            Self::JwtAudience => "jwt_audience",
        }
    }

    /// Whether newer public keys could turn this refusal into an acceptance: the moment to fetch them.
    #[must_use]
    pub fn newer_keys_might_help(self) -> bool {
        matches!(self, Self::NoKey | Self::JwtUnknownKey | Self::BadSignature)
    }
}

/// The checks that need neither body nor key, so that the receiver can make them before it reads the body.
pub fn check_headers<'a>(
    delivery: &Delivery<'a>,
    policy: &Policy,
    now: Timestamp,
) -> Result<Signed<'a>, Refusal> {
    let signed = Signed::read(delivery)?;
    // whole seconds as plain numbers: at most 12 digits, so nothing here overflows
    let age = now.as_second() - signed.timestamp;
    if age > policy.past.as_secs() {
        return Err(Refusal::TooOld(age));
    }
    if age < -policy.future.as_secs() {
        return Err(Refusal::TooNew(-age));
    }
    Ok(signed)
}

/// Decides about one delivery.
pub fn verify(
    delivery: &Delivery<'_>,
    keys: &Keys<'_>,
    policy: &Policy,
    now: Timestamp,
) -> Result<Accepted, Refusal> {
    let signed = check_headers(delivery, policy, now)?;
    let age = now.as_second() - signed.timestamp;
    let mut worst = Refusal::NoSignature;
    for entry in signed.entries() {
        match check_entry(&entry, &signed, keys, policy, now) {
            Ok(Fit { scheme, key, jwt_age }) => {
                let (replay_key, hint_id) = match entry {
                    Entry::Jwt(text) => {
                        let hash = Sha256::digest(text.as_bytes());
                        (hash.into(), format!("jwt-{}", hex(&hash[..16])))
                    }
                    _ => (Sha256::digest(signed.id).into(), hint_id(signed.id)),
                };
                return Ok(Accepted { scheme, key, replay_key, hint_id, age: jwt_age.unwrap_or(age) });
            }
            Err(refusal) => worst = worst.max(refusal),
        }
    }
    Err(worst)
}

struct Fit {
    scheme: Scheme,
    key: Option<usize>,
    jwt_age: Option<i64>,
}

/// The label chooses the type of key; a key never chooses how it is used.
fn check_entry(
    entry: &Entry<'_>,
    signed: &Signed<'_>,
    keys: &Keys<'_>,
    policy: &Policy,
    now: Timestamp,
) -> Result<Fit, Refusal> {
    let scheme = entry.scheme();
    if !policy.accepts(scheme) {
        return Err(Refusal::SchemeNotAccepted);
    }
    match entry {
        Entry::V1a(given) => {
            let public = keys.public.map_or(&[][..], |k| &k.ed25519);
            let key = signature::fits_ed25519(signed, given, public, keys.first)?;
            Ok(Fit { scheme, key: Some(key), jwt_age: None })
        }
        Entry::V1(given) => {
            signature::fits_hmac(signed, given, keys.secrets)?;
            Ok(Fit { scheme, key: None, jwt_age: None })
        }
        Entry::Jwt(text) => {
            let public = keys.public.map_or(&[][..], |k| &k.rsa);
            let jwt_age = jwt::check(text, public, policy, now)?;
            Ok(Fit { scheme, key: None, jwt_age })
        }
    }
}

/// An id that fits into a status field, whatever the sender chose: as it is if it is plain and short, else its
/// readable beginning and a hash, so that different ids stay different.
fn hint_id(id: &[u8]) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'-';
    let readable = |bytes: &[u8]| -> String {
        bytes.iter().map(|b| if plain(b) { char::from(*b) } else { '_' }).collect()
    };
    if id.len() <= MAX_HINT_ID_LEN && id.iter().all(plain) {
        return readable(id);
    }
    let hash = Sha256::digest(id);
    format!("{}-{}", readable(&id[..id.len().min(64)]), hex(&hash[..16]))
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use hmac::{KeyInit as _, Mac as _};
    use http::HeaderValue;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::callback::signature::parse_public_key;
    use crate::callback::testing::{jwk, jwks, rsa_jwk, sign_jwt, sign_v1a};

    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const SENT: &str = "1614265330";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const T: i64 = 1_614_265_330;
    const SECRET_A: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const VECTOR_A: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    const KEY_D: &str = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=";
    const VECTOR_D: &str =
        "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg==";
    const VECTOR_E: &str =
        "v1a,Ykcu7AtGZGmZxFEH1Gaa2Nd7feY/CTuruoL4fqgnKwfbHU4DhemoVHZdvGfIvKvn4BIgwktLGGPGIr/i9nK7AA==";
    const URL: &str = "https://h.example/v1/callbacks/ns/job/token";

    fn m(signature: &str) -> Delivery<'_> {
        Delivery {
            id: ID.as_bytes(),
            timestamp: SENT.as_bytes(),
            signature: signature.as_bytes(),
            body: BODY,
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn all_schemes() -> Policy {
        let mut policy = Policy::token_bound(vec![URL.into()]);
        policy.schemes.push(Scheme::V1);
        policy
    }

    fn everything() -> (KeySet, Vec<HmacSecret>) {
        let mut set = KeySet::parse(&jwks(&[jwk(7), jwk(1), rsa_jwk("a")])).unwrap();
        set.ed25519.push(parse_public_key(KEY_D).unwrap());
        (set, vec![HmacSecret::parse(SECRET_A).unwrap()])
    }

    /// With all keys, all schemes, at the time of the message.
    fn judge(delivery: &Delivery<'_>) -> Result<Accepted, Refusal> {
        let (set, secrets) = everything();
        verify(delivery, &Keys { public: Some(&set), secrets: &secrets, first: 0 }, &all_schemes(), at(T))
    }

    #[test]
    fn the_vectors_pass() {
        for (vector, scheme, key) in
            [(VECTOR_A, Scheme::V1, None), (VECTOR_D, Scheme::V1a, Some(2)), (VECTOR_E, Scheme::V1a, Some(1))]
        {
            let accepted = judge(&m(vector)).unwrap();
            assert_eq!((accepted.scheme, accepted.key, accepted.age), (scheme, key, 0));
            assert_eq!(accepted.hint_id, ID);
        }
        assert_eq!(sign_v1a(1, ID, SENT, BODY), VECTOR_E);
    }

    #[test]
    fn entries_that_do_not_fit_neither_harm_nor_help() {
        let bad = VECTOR_D.replace("hnO3", "hnO4");
        for header in [
            format!("{VECTOR_D} {bad}"),
            format!("{bad} {VECTOR_D}"),
            format!("v2,x {VECTOR_D}"),
            format!("nocomma {VECTOR_D}"),
            format!("v1a,two,commas {VECTOR_D}"),
            format!("{bad}  {VECTOR_D}"),
            format!("   {VECTOR_D}   "),
            format!("v1,!!! {VECTOR_D}"),
            format!("v1a {VECTOR_D}"),
            format!("{VECTOR_A} {VECTOR_D}"),
            format!("{VECTOR_D},x {VECTOR_D}"),
            format!("{VECTOR_D}, {VECTOR_D}"),
            format!("a.b.c {VECTOR_D}"),
            format!("v9,x v8,x v7,x {VECTOR_D}"),
            format!("\u{e9},x {VECTOR_D}"),
        ] {
            assert!(judge(&m(&header)).is_ok(), "{header}");
        }
        for (header, refusal) in [
            (String::new(), Refusal::NoSignature),
            (" ".into(), Refusal::NoSignature),
            ("x".into(), Refusal::NoSignature),
            (format!("{VECTOR_D},x"), Refusal::NoSignature),
            (VECTOR_D.replace("v1a,", "v1,"), Refusal::NoSignature),
            (VECTOR_D.replace("v1a,", "v2,"), Refusal::NoSignature),
            (VECTOR_D.replace("v1a,", ""), Refusal::NoSignature),
            (VECTOR_D.replace("v1a,", "V1a,"), Refusal::NoSignature),
            (VECTOR_D.replace("g==", "h=="), Refusal::NoSignature),
            (VECTOR_D.replace("==", ""), Refusal::NoSignature),
            (VECTOR_A.replace("OE=", "OF="), Refusal::NoSignature),
            (VECTOR_A.replace('+', "-").replace('/', "_"), Refusal::NoSignature),
            (bad.clone(), Refusal::BadSignature),
            (format!("{bad} x"), Refusal::BadSignature),
            (VECTOR_A.replace("g0hM", "g0hN"), Refusal::BadSignature),
        ] {
            assert_eq!(judge(&m(&header)), Err(refusal), "{header}");
        }
        let invalid = [VECTOR_D.as_bytes(), &[b' ', 0xff, 0xfe]].concat();
        assert!(judge(&Delivery { signature: &invalid, ..m("") }).is_ok(), "bytes that are no text");
    }

    #[test]
    fn only_the_first_four_entries_count() {
        let fifth = format!("v9,x v9,x v9,x v9,x {VECTOR_D}");
        assert_eq!(judge(&m(&fifth)), Err(Refusal::NoSignature));
        let hundred = format!("{}{VECTOR_D}", format!("{} ", VECTOR_D.replace("hnO3", "hnO4")).repeat(100));
        assert_eq!(judge(&m(&hundred)), Err(Refusal::BadSignature));
    }

    #[test]
    fn the_public_key_is_no_hmac_secret() {
        for key in [&KEY_D[5..], KEY_D] {
            let bytes = STANDARD.decode(key).unwrap_or_else(|_| key.as_bytes().to_vec());
            let mut mac = hmac::Hmac::<Sha256>::new_from_slice(&bytes).unwrap();
            mac.update(format!("{ID}.{SENT}.").as_bytes());
            mac.update(BODY);
            let forged = format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()));
            assert_eq!(judge(&m(&forged)), Err(Refusal::BadSignature));
        }
    }

    #[test]
    fn every_signed_byte_counts() {
        for vector in [VECTOR_A, VECTOR_D, VECTOR_E] {
            let good = m(vector);
            assert!(judge(&good).is_ok());
            for (what, other) in [
                ("id", Delivery { id: b"msg_p5jXN8AQM9LWM0D4loKWxJel", ..good }),
                ("timestamp", Delivery { timestamp: b"1614265331", ..good }),
                ("body", Delivery { body: br#"{"test": 2432232315}"#, ..good }),
                ("space", Delivery { body: br#"{"test":2432232314}"#, ..good }),
                ("newline", Delivery { body: b"{\"test\": 2432232314}\n", ..good }),
                ("empty", Delivery { body: b"", ..good }),
            ] {
                assert_eq!(judge(&other), Err(Refusal::BadSignature), "{what}");
            }
        }
    }

    #[test]
    fn any_body_can_be_signed() {
        for body in [&b""[..], b".", &[0xff, 0, 0xfe], &vec![b'x'; 100_000]] {
            let signature = sign_v1a(1, "i", SENT, body);
            assert!(judge(&Delivery { id: b"i", signature: signature.as_bytes(), body, ..m("") }).is_ok());
        }
    }

    #[test]
    fn ids_cannot_borrow_from_the_timestamp() {
        let long = "x".repeat(256);
        for good in ["x", "msg_0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11", "a:b/c+d=e~", &long] {
            let signature = sign_v1a(1, good, SENT, BODY);
            assert!(judge(&Delivery { id: good.as_bytes(), ..m(&signature) }).is_ok(), "{good}");
        }
        let longer = "x".repeat(257);
        for bad in
            ["", ".", "a.b", "msg_1.1614265330", "a b", "a,b", "msg_1, msg_1", "a\n", "a\0", "é", &longer]
        {
            let signature = sign_v1a(1, bad, SENT, BODY);
            let delivery = Delivery { id: bad.as_bytes(), ..m(&signature) };
            assert_eq!(judge(&delivery), Err(Refusal::IdInvalid), "{bad:?}");
        }
        // signed for id "msg_1" at 1614265330 with body "1.x"; shifted by one dot
        let signature = sign_v1a(1, "msg_1", SENT, b"1.x");
        let shifted = Delivery {
            id: b"msg_1.1614265330",
            timestamp: b"1",
            signature: signature.as_bytes(),
            body: b"x",
        };
        assert_eq!(judge(&shifted), Err(Refusal::IdInvalid));
    }

    #[test]
    fn odd_timestamps_are_refused_even_when_signed() {
        for bad in
            ["", "0123", "+123", "123abc", "1.7e9", "1_700", "-9223372036854775808", "9223372036854775807"]
        {
            let signature = sign_v1a(1, ID, bad, BODY);
            let delivery = Delivery { timestamp: bad.as_bytes(), ..m(&signature) };
            assert_eq!(judge(&delivery), Err(Refusal::TimestampInvalid), "{bad}");
        }
    }

    #[test]
    fn the_window() {
        let (set, secrets) = everything();
        let keys = Keys { public: Some(&set), secrets: &secrets, first: 0 };
        let age =
            |policy: &Policy, vector, age: i64| verify(&m(vector), &keys, policy, at(T + age)).map(|a| a.age);
        let bound = Policy::token_bound(vec![]);
        assert_eq!(age(&bound, VECTOR_D, 26 * 3600), Ok(93_600));
        assert_eq!(age(&bound, VECTOR_D, 26 * 3600 + 1), Err(Refusal::TooOld(93_601)));
        assert_eq!(age(&bound, VECTOR_D, -300), Ok(-300));
        assert_eq!(age(&bound, VECTOR_D, -301), Err(Refusal::TooNew(301)));
        let fixed = Policy::fixed_address();
        assert_eq!(age(&fixed, VECTOR_A, 300), Ok(300));
        assert_eq!(age(&fixed, VECTOR_A, 301), Err(Refusal::TooOld(301)));
        assert_eq!(age(&fixed, VECTOR_A, -300), Ok(-300));
        assert_eq!(age(&fixed, VECTOR_A, -301), Err(Refusal::TooNew(301)));

        let far = Delivery { timestamp: b"999999999999", ..m(VECTOR_D) };
        assert!(matches!(verify(&far, &keys, &bound, at(T)), Err(Refusal::TooNew(_))));
        assert!(matches!(verify(&far, &keys, &bound, Timestamp::MIN), Err(Refusal::TooNew(_))));
        assert!(matches!(verify(&m(VECTOR_D), &keys, &bound, Timestamp::MAX), Err(Refusal::TooOld(_))));
    }

    #[test]
    fn only_configured_schemes_count() {
        let (set, secrets) = everything();
        let keys = Keys { public: Some(&set), secrets: &secrets, first: 0 };
        let jwt = sign_jwt(&json!({"alg": "RS256"}), &json!({"aud": URL, "exp": T + 60}));
        let all = [(Scheme::V1a, VECTOR_D), (Scheme::V1, VECTOR_A), (Scheme::Jwt, jwt.as_str())];
        for (only, _) in all {
            let policy = Policy { schemes: vec![only], ..all_schemes() };
            for (scheme, header) in all {
                let verdict = verify(&m(header), &keys, &policy, at(T)).map(|a| a.scheme);
                let expected = if only == scheme { Ok(scheme) } else { Err(Refusal::SchemeNotAccepted) };
                assert_eq!(verdict, expected);
            }
        }
        assert_eq!(Policy::token_bound(vec![]).schemes, [Scheme::V1a, Scheme::Jwt]);
        assert_eq!(Policy::fixed_address().schemes, [Scheme::V1]);
    }

    #[test]
    fn without_keys_nothing_is_decided() {
        let jwt = sign_jwt(&json!({"alg": "RS256"}), &json!({"aud": URL, "exp": T + 60}));
        for header in [VECTOR_A, VECTOR_D, &jwt] {
            assert_eq!(verify(&m(header), &Keys::default(), &all_schemes(), at(T)), Err(Refusal::NoKey));
        }
    }

    #[test]
    fn the_key_that_matched_last_is_tried_first_and_the_others_after_it() {
        let (set, _) = everything();
        for first in 0..7 {
            let keys = Keys { public: Some(&set), secrets: &[], first };
            assert_eq!(verify(&m(VECTOR_E), &keys, &all_schemes(), at(T)).unwrap().key, Some(1));
        }
        // the same key twice: which of the two is found says where the search began
        let twice = KeySet::parse(&jwks(&[jwk(1), jwk(7), jwk(1)])).unwrap();
        for (first, found) in [(0, 0), (1, 2), (2, 2), (3, 0)] {
            let keys = Keys { public: Some(&twice), secrets: &[], first };
            assert_eq!(verify(&m(VECTOR_E), &keys, &all_schemes(), at(T)).unwrap().key, Some(found));
        }
    }

    #[test]
    fn during_a_rotation_either_secret_will_do() {
        let other = HmacSecret::parse(&format!("whsec_{}", STANDARD.encode([5; 32]))).unwrap();
        let ours = HmacSecret::parse(SECRET_A).unwrap();
        for secrets in
            [vec![ours.clone(), other.clone()], vec![other.clone(), ours.clone()], vec![ours.clone(), ours]]
        {
            let keys = Keys { public: None, secrets: &secrets, first: 0 };
            assert!(verify(&m(VECTOR_A), &keys, &all_schemes(), at(T)).is_ok());
        }
        let keys = Keys { public: None, secrets: &[other], first: 0 };
        assert_eq!(verify(&m(VECTOR_A), &keys, &all_schemes(), at(T)), Err(Refusal::BadSignature));
    }

    #[test]
    fn a_jwt_is_its_own_replay_key() {
        let jwt = sign_jwt(&json!({"alg": "RS256"}), &json!({"aud": URL, "exp": T + 60, "iat": T - 5}));
        let one = judge(&m(&jwt)).unwrap();
        let same = judge(&Delivery { id: b"another", body: b"{}", ..m(&jwt) }).unwrap();
        assert_eq!((one.replay_key, &one.hint_id), (same.replay_key, &same.hint_id));
        assert_eq!((one.scheme, one.age, one.key), (Scheme::Jwt, 5, None));
        assert!(one.hint_id.starts_with("jwt-") && one.hint_id.len() == 36);
        let later = sign_jwt(&json!({"alg": "RS256"}), &json!({"aud": URL, "exp": T + 61, "iat": T - 5}));
        assert_ne!(judge(&m(&later)).unwrap().replay_key, one.replay_key);
    }

    #[test]
    fn an_id_is_its_deliverys_replay_key() {
        let first = judge(&m(VECTOR_D)).unwrap();
        let retry = sign_v1a(1, ID, "1614265340", BODY);
        let retry = judge(&Delivery { timestamp: b"1614265340", ..m(&retry) }).unwrap();
        assert_eq!(first.replay_key, retry.replay_key);
        let other = sign_v1a(1, "other", SENT, BODY);
        let other = judge(&Delivery { id: b"other", ..m(&other) }).unwrap();
        assert_ne!(first.replay_key, other.replay_key);
    }

    #[test]
    fn hint_ids_are_short_plain_and_distinct() {
        let plain =
            |id: &str| id.len() <= 128 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
        assert_eq!(hint_id(b"msg_1-a"), "msg_1-a");
        let longest = "x".repeat(128);
        assert_eq!(hint_id(longest.as_bytes()), longest);
        let longer = "x".repeat(129);
        let ids = ["a:b", "a/b", "a_b", &longer, &"x".repeat(130), &longest];
        let made: std::collections::HashSet<String> = ids.iter().map(|i| hint_id(i.as_bytes())).collect();
        assert_eq!(made.len(), ids.len());
        assert!(made.iter().all(|id| plain(id)));
        assert!(hint_id(b"a:b").starts_with("a_b-"));
        assert_eq!(hint_id(b"a:b").len(), 3 + 1 + 32);
        assert_eq!(hint_id(longer.as_bytes()).len(), 64 + 1 + 32);
    }

    #[test]
    fn each_header_exactly_once() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("webhook-id", ID), ("webhook-timestamp", SENT), ("webhook-signature", VECTOR_D)]
        {
            headers.insert(name, HeaderValue::from_str(value).unwrap());
        }
        let read = |headers: &HeaderMap| Delivery::from_headers(headers, BODY).and_then(|d| judge(&d));
        assert!(read(&headers).is_ok());
        for name in ["webhook-id", "webhook-timestamp", "webhook-signature"] {
            let mut twice = headers.clone();
            twice.append(name, headers[name].clone());
            assert_eq!(read(&twice), Err(Refusal::HeaderRepeated(name)));
            let mut missing = headers.clone();
            missing.remove(name);
            assert_eq!(read(&missing), Err(Refusal::HeaderMissing(name)));
        }
    }

    #[test]
    fn the_furthest_entry_gives_the_reason() {
        let expired = sign_jwt(&json!({"alg": "RS256"}), &json!({"aud": URL, "exp": T - 100}));
        let bad = VECTOR_D.replace("hnO3", "hnO4");
        for header in [format!("{bad} {expired}"), format!("{expired} {bad}")] {
            assert_eq!(judge(&m(&header)), Err(Refusal::JwtExpired));
        }
    }

    #[test]
    fn reasons_are_distinct_words_and_say_when_to_fetch_keys() {
        let all = [
            Refusal::HeaderMissing("x"),
            Refusal::HeaderRepeated("x"),
            Refusal::IdInvalid,
            Refusal::TimestampInvalid,
            Refusal::TooOld(1),
            Refusal::TooNew(1),
            Refusal::NoSignature,
            Refusal::SchemeNotAccepted,
            Refusal::NoKey,
            Refusal::JwtMalformed,
            Refusal::JwtAlgorithm,
            Refusal::JwtCritical,
            Refusal::JwtUnknownKey,
            Refusal::BadSignature,
            Refusal::JwtClaim("x"),
            Refusal::JwtExpired,
            Refusal::JwtNotYetValid,
            Refusal::JwtAudience,
        ];
        let words: std::collections::HashSet<_> = all.iter().map(|r| r.reason()).collect();
        assert_eq!(words.len(), all.len());
        assert!(
            words.iter().all(|w| !w.is_empty()
                && w.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'))
        );
        let fetch: Vec<_> = all.iter().filter(|r| r.newer_keys_might_help()).collect();
        assert_eq!(fetch, [&Refusal::NoKey, &Refusal::JwtUnknownKey, &Refusal::BadSignature]);
        for scheme in [Scheme::V1a, Scheme::Jwt, Scheme::V1] {
            assert_eq!(scheme.as_str().parse(), Ok(scheme));
        }
        assert!("v2".parse::<Scheme>().is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_signed_passes(id in "[!-+\\--\\-/-~]{1,256}", body: Vec<u8>, age in -300i64..=93_600) {
            let signature = sign_v1a(1, &id, SENT, &body);
            let delivery = Delivery { id: id.as_bytes(), timestamp: SENT.as_bytes(), signature: signature.as_bytes(), body: &body };
            let (set, _) = everything();
            let keys = Keys { public: Some(&set), secrets: &[], first: 0 };
            prop_assert_eq!(verify(&delivery, &keys, &all_schemes(), at(T + age)).unwrap().age, age);
        }

        #[test]
        fn a_flipped_bit_anywhere_is_refused(which in 0usize..4, position: usize, bit in 0u8..8) {
            let mut parts = [ID.as_bytes().to_vec(), SENT.as_bytes().to_vec(), VECTOR_E.as_bytes().to_vec(), BODY.to_vec()];
            let position = position % parts[which].len();
            parts[which][position] ^= 1 << bit;
            let [id, timestamp, signature, body] = &parts;
            let verdict = judge(&Delivery { id, timestamp, signature, body });
            prop_assert!(verdict.is_err());
        }

        #[test]
        fn nothing_panics(id: Vec<u8>, timestamp: Vec<u8>, signature: Vec<u8>, body: Vec<u8>, text in "(v1a?,[A-Za-z0-9+/=]{0,90} ?){0,6}") {
            let delivery = Delivery { id: &id, timestamp: &timestamp, signature: &signature, body: &body };
            prop_assert!(judge(&delivery).is_err());
            let verdict = judge(&Delivery { signature: text.as_bytes(), body: &body, ..m("") });
            prop_assert!(verdict.is_err());
        }
    }
}
