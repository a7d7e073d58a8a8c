//! The names that tie a batch at Gemini to one attempt of one job. Pure: no client required.
//!
//! Gemini has no idempotency token, so identity is what we make it: a display name and an input file of
//! its own for each request to create a batch.

use rand::RngExt as _;
use sha2::{Digest, Sha256};

use crate::api::Attempt;

/// Alphabet that is allowed in Gemini's file ids.
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// Letters of a send id: 12 of 36 are 62 bits, so two sends of one attempt never share a name.
const SEND_ID_LETTERS: usize = 12;

/// Letters of a Kubernetes UID.
const UID_LETTERS: usize = 36;

/// A new random send id.
#[must_use]
pub fn new_send_id() -> String {
    let mut rng = rand::rng();
    (0..SEND_ID_LETTERS).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect()
}

/// What the batch is called at Gemini.
#[must_use]
pub fn display_name(cluster: &str, uid: &str, attempt: i32, send: &str) -> String {
    format!("gbo-{cluster}-{uid}-{attempt}-{send}")
}

/// Whose batch it is, by its display name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// UID of the job.
    pub uid: String,
    /// Number of its attempt.
    pub attempt: i32,
    /// Id of the send.
    pub send: String,
}

/// Reads what [`display_name`] made; `None` for what is not a batch of this cluster.
#[must_use]
pub fn identity_of(cluster: &str, display_name: &str) -> Option<Identity> {
    let rest = display_name.strip_prefix("gbo-")?.strip_prefix(cluster)?.strip_prefix('-')?;
    let (uid, rest) = rest.split_at_checked(UID_LETTERS)?;
    let is_uid = uid.bytes().enumerate().all(|(i, b)| match i {
        8 | 13 | 18 | 23 => b == b'-',
        _ => b.is_ascii_hexdigit(),
    });
    let (attempt, send) = rest.strip_prefix('-')?.split_once('-')?;
    let attempt = attempt.parse().ok().filter(|n| *n > 0 && is_uid)?;
    let is_send = !send.is_empty() && send.bytes().all(|b| ALPHABET.contains(&b));
    is_send.then(|| Identity { uid: uid.to_owned(), attempt, send: send.to_owned() })
}

/// Whether a batch of this display name is one of the attempt, be it of its present send or of an earlier one.
#[must_use]
pub fn is_send_of(attempt: &Attempt, display_name: &str) -> bool {
    let other_send = |prefix: &str| {
        let send = display_name.strip_prefix(prefix).filter(|_| prefix.ends_with('-'));
        send.is_some_and(|send| !send.is_empty() && !send.contains('-'))
    };
    display_name == attempt.display_name
        || attempt.display_name.strip_suffix(attempt.send_id.as_str()).is_some_and(other_send)
}

/// What the input file is called at Gemini, within its limit of 40 characters of `[a-z0-9-]`: the job's
/// identity is a hash, the send id stands in full.
#[must_use]
pub fn input_file(cluster: &str, uid: &str, attempt: i32, send: &str) -> String {
    format!("{}{attempt}-{send}", input_file_prefix(cluster, uid))
}

/// What the names of all input files of a job begin with.
#[must_use]
pub fn input_file_prefix(cluster: &str, uid: &str) -> String {
    let hash = hex(&Sha256::digest(format!("{cluster}/{uid}")));
    format!("files/gbo-{}-", &hash[..16])
}

/// Lower case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_keep_geminis_limits() {
        let uid = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";
        for attempt in [1, 10] {
            let name = input_file("c", uid, attempt, &new_send_id());
            let id = name.strip_prefix("files/").unwrap();
            assert!(id.len() <= 40, "{id}");
            assert!(id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{id}");
            assert!(!id.starts_with('-') && !id.ends_with('-'));
        }
    }

    #[test]
    fn display_names_are_read_back_and_no_others() {
        let uid = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";
        let name = display_name("c-1", uid, 10, "s3nd");
        let expected = Identity { uid: uid.to_owned(), attempt: 10, send: "s3nd".to_owned() };
        assert_eq!(identity_of("c-1", &name), Some(expected));
        assert_eq!(identity_of("c", &name), None, "a cluster whose id begins like ours");
        assert_eq!(identity_of("c-11", &name), None);
        for other in [
            "",
            "gbo-",
            "gbo-c-1",
            "gbo-c-1-",
            &format!("gbo-c-1-{uid}"),
            &format!("gbo-c-1-{uid}-1"),
            &format!("gbo-c-1-{uid}-1-"),
            &format!("gbo-c-1-{uid}-0-s"),
            &format!("gbo-c-1-{uid}--1-s"),
            &format!("gbo-c-1-{uid}-x-s"),
            &format!("gbo-c-1-{uid}-99999999999-s"),
            &format!("gbo-c-1-{uid}-1-s-s"),
            &format!("xgbo-c-1-{uid}-1-s"),
            &format!("gbo-c-1-{}-1-s", uid.replace('-', "x")),
            &format!("gbo-c-1-{}é-1-s", &uid[..35]),
        ] {
            assert_eq!(identity_of("c-1", other), None, "{other}");
        }
    }

    #[test]
    fn every_part_of_the_identity_changes_the_names() {
        let base = (display_name("c", "u", 1, "s"), input_file("c", "u", 1, "s"));
        for (c, u, n, s) in [("d", "u", 1, "s"), ("c", "v", 1, "s"), ("c", "u", 2, "s"), ("c", "u", 1, "t")] {
            assert_ne!(base.0, display_name(c, u, n, s));
            assert_ne!(base.1, input_file(c, u, n, s));
        }
        assert_ne!(new_send_id(), new_send_id());
    }

    #[test]
    fn batches_of_earlier_sends_are_the_attempts_own() {
        let attempt: Attempt = serde_json::from_value(serde_json::json!({
            "number": 1, "sendId": "second", "displayName": "gbo-c-u-v-1-second", "inputFile": "files/f",
            "credentialFingerprint": "k", "intentTime": "2026-01-01T00:00:00.000000Z"}))
        .unwrap();
        for ours in ["gbo-c-u-v-1-second", "gbo-c-u-v-1-first"] {
            assert!(is_send_of(&attempt, ours), "{ours}");
        }
        for other in [
            "gbo-c-u-v-2-first",
            "gbo-c-u-v-11-first",
            "gbo-c-u-v-1-",
            "gbo-c-u-w-1-first",
            "gbo-c-u-v-1-2-x",
            "",
        ] {
            assert!(!is_send_of(&attempt, other), "{other}");
        }
    }
}
