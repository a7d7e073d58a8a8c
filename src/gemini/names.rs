//! Resource names, checked before they enter a URL.

use std::fmt;

/// A name that can't be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(&'static str);

/// `batches/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchName(String);

/// `files/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileName(String);

/// `models/ID` or `tunedModels/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelName(String);

fn id_ok(id: &str, max: usize) -> bool {
    !id.is_empty()
        && id.len() <= max
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

impl BatchName {
    /// With or without `batches/`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let id = text.strip_prefix("batches/").unwrap_or(text);
        if id_ok(id, 64) {
            Ok(Self(format!("batches/{id}")))
        } else {
            Err(NameError("not the name of a batch"))
        }
    }

    /// The part after `batches/`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0["batches/".len()..]
    }

    /// The result file: its id is always `batch-` and the id of the batch.
    #[must_use]
    pub fn derived_output_file(&self) -> FileName {
        FileName(format!("files/batch-{}", self.id()))
    }
}

impl FileName {
    /// With or without `files/`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let id = text.strip_prefix("files/").unwrap_or(text);
        // 40 for uploads, more for result files: `batch-` and the id of the batch.
        if id_ok(id, 80) { Ok(Self(format!("files/{id}"))) } else { Err(NameError("not the name of a file")) }
    }

    /// The part after `files/`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0["files/".len()..]
    }
}

impl ModelName {
    /// With `models/`, `tunedModels/` or neither, which means `models/`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (collection, id) = match text.split_once('/') {
            None => ("models", text),
            Some((c @ ("models" | "tunedModels"), id)) => (c, id),
            Some(_) => return Err(NameError("it must be a model, models/MODEL or tunedModels/MODEL")),
        };
        let fits = id.len() <= 128
            && id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if fits {
            Ok(Self(format!("{collection}/{id}")))
        } else {
            Err(NameError("a model's name has letters, digits, '.', '_' and '-' only"))
        }
    }
}

macro_rules! show {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}
show!(BatchName, FileName, ModelName);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prefixes_are_optional_and_paths_are_refused() {
        assert_eq!(BatchName::parse("abc").unwrap().to_string(), "batches/abc");
        assert_eq!(
            BatchName::parse("batches/abc").unwrap().derived_output_file().to_string(),
            "files/batch-abc"
        );
        assert_eq!(ModelName::parse("gemini-2.5-flash").unwrap().to_string(), "models/gemini-2.5-flash");
        assert_eq!(ModelName::parse("tunedModels/x").unwrap().to_string(), "tunedModels/x");
        for bad in ["", "batches/", "a/b", "../x", "%2e", "a\nb", "batches/../files/x", &"a".repeat(65)] {
            assert!(BatchName::parse(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "models/", "..", "models/a/b", "other/x", "x:y", "x?y", "-x"] {
            assert!(ModelName::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_is_one_harmless_path_segment(text in "\\PC{0,80}") {
            for name in [
                BatchName::parse(&text).map(|n| n.to_string()),
                FileName::parse(&text).map(|n| n.to_string()),
                ModelName::parse(&text).map(|n| n.to_string()),
            ].into_iter().flatten() {
                prop_assert_eq!(name.matches('/').count(), 1);
                prop_assert!(!name.contains("..") || name.starts_with("models/") || name.starts_with("tunedModels/"));
                prop_assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b)));
            }
        }
    }
}
