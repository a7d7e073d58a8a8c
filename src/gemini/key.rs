//! API keys: read from a Secret, sent in a header, never shown.

use http::HeaderValue;
use secrecy::{ExposeSecret as _, SecretString};

/// Longer than any key that Google gives out.
const MAX_BYTES: usize = 512;

/// An API key. Its memory is wiped when it is dropped; `Debug` does not show it.
#[derive(Clone)]
pub struct ApiKey(SecretString);

/// Why something can't be an API key. The message says what to change and does not show the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiKeyError {
    /// Nothing, or white space only.
    #[error("it is empty: put the API key there")]
    Empty,
    /// Too long.
    #[error("it is longer than {MAX_BYTES} bytes: put only the API key there")]
    TooLong,
    /// Line breaks, spaces or other characters inside.
    #[error(
        "it has characters that no API key has (line breaks, spaces, quotes or non-ASCII): put only the API key there"
    )]
    Characters,
}

impl ApiKey {
    /// Takes the bytes of a Secret. White space around the key is common (`echo` adds a line break) and
    /// dropped.
    pub fn from_secret(bytes: &[u8]) -> Result<Self, ApiKeyError> {
        let key = bytes.trim_ascii();
        if key.is_empty() {
            return Err(ApiKeyError::Empty);
        }
        if key.len() > MAX_BYTES {
            return Err(ApiKeyError::TooLong);
        }
        if !key.iter().all(|b| b.is_ascii_graphic() && !b"\"'`".contains(b)) {
            return Err(ApiKeyError::Characters);
        }
        // Ascii graphic, so always UTF-8.
        let key = String::from_utf8(key.to_vec()).map_err(|_| ApiKeyError::Characters)?;
        Ok(Self(key.into()))
    }

    /// The key itself, for a keyed hash of it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// The header value, marked so that no HTTP library prints it.
    pub(super) fn header(&self) -> Result<HeaderValue, http::header::InvalidHeaderValue> {
        let mut value = HeaderValue::from_str(self.expose())?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_around_a_key_is_dropped_and_nothing_else_is_accepted() {
        assert_eq!(ApiKey::from_secret(b" AIza_x-1\r\n").unwrap().expose(), "AIza_x-1");
        for (bytes, expected) in [
            (&b""[..], ApiKeyError::Empty),
            (b" \n", ApiKeyError::Empty),
            (b"two words", ApiKeyError::Characters),
            (b"two\nlines", ApiKeyError::Characters),
            (b"\"quoted\"", ApiKeyError::Characters),
            ("schlüssel".as_bytes(), ApiKeyError::Characters),
            (&[b'a'; 513], ApiKeyError::TooLong),
        ] {
            assert_eq!(ApiKey::from_secret(bytes).unwrap_err(), expected);
        }
    }

    #[test]
    fn a_key_is_not_shown() {
        let key = ApiKey::from_secret(b"CANARY").unwrap();
        assert!(!format!("{key:?} {:?}", key.header()).contains("CANARY"));
    }
}
