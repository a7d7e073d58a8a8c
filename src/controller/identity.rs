//! The names that tie a batch at Gemini to one attempt of one job. Pure: no client required.
//!
//! Gemini has no idempotency token, so identity is what we make it: a display name and an input file of
//! its own for each request to create a batch.

use rand::RngExt as _;
use sha2::{Digest, Sha256};

/// Alphabet that is allowed in Gemini's file ids.
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// Letters of a send id: 12 of 36 are 62 bits, so two sends of one attempt never share a name.
const SEND_ID_LETTERS: usize = 12;

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

/// What the input file is called at Gemini, within its limit of 40 characters of `[a-z0-9-]`: the job's
/// identity is a hash, the send id stands in full.
#[must_use]
pub fn input_file(cluster: &str, uid: &str, attempt: i32, send: &str) -> String {
    let hash = hex(&Sha256::digest(format!("{cluster}/{uid}")));
    format!("files/gbo-{}-{attempt}-{send}", &hash[..16])
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
    fn every_part_of_the_identity_changes_the_names() {
        let base = (display_name("c", "u", 1, "s"), input_file("c", "u", 1, "s"));
        for (c, u, n, s) in [("d", "u", 1, "s"), ("c", "v", 1, "s"), ("c", "u", 2, "s"), ("c", "u", 1, "t")] {
            assert_ne!(base.0, display_name(c, u, n, s));
            assert_ne!(base.1, input_file(c, u, n, s));
        }
        assert_ne!(new_send_id(), new_send_id());
    }
}
