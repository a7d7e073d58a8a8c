//! What a URI names. Pure: no client required.
//!
//! | URI | |
//! | --- | --- |
//! | `s3://BUCKET/KEY` | S3 and what speaks like it |
//! | `gs://BUCKET/KEY` | Google Cloud Storage |
//! | `az://ACCOUNT/CONTAINER/KEY` | Azure Blob Storage |
//! | `file://NAME/PATH` | a directory that an administrator mapped to NAME |
//!
//! Keys are taken as they stand: nothing is decoded, so `%2e%2e` is no way up.

use std::fmt;

use object_store::path::Path;

use super::error::{Error, Kind};

/// Which kind of store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// S3.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
    /// A mapped directory.
    File,
}

impl Scheme {
    /// As it stands in a URI.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
            Self::File => "file",
        }
    }
}

/// A place in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// Which kind of store.
    pub scheme: Scheme,
    /// The storage account, with `az://`.
    pub account: Option<String>,
    /// Bucket, container, or the name of the mapped directory.
    pub bucket: String,
    /// Name of the object, or what the names of several begin with.
    pub path: Path,
}

impl Location {
    /// One object. `field` is where the URI stands, for messages.
    pub fn object(uri: &str, field: &str) -> Result<Self, Error> {
        let at = Self::parse(uri, field)?;
        if at.path.is_root() || uri.ends_with('/') {
            return Err(invalid(
                field,
                "must name an object, and not end with a /: several objects are a prefix",
            ));
        }
        Ok(at)
    }

    /// All objects below. `field` is where the URI stands, for messages.
    pub fn prefix(uri: &str, field: &str) -> Result<Self, Error> {
        if !uri.ends_with('/') {
            return Err(invalid(field, "must end with a /: all objects below it are meant"));
        }
        Self::parse(uri, field)
    }

    fn parse(uri: &str, field: &str) -> Result<Self, Error> {
        let known = [Scheme::S3, Scheme::Gs, Scheme::Az, Scheme::File];
        let found = known.into_iter().find_map(|scheme| {
            let rest = uri.strip_prefix(scheme.as_str())?.strip_prefix("://")?;
            Some((scheme, rest))
        });
        let Some((scheme, rest)) = found else {
            return Err(invalid(
                field,
                "must be like s3://BUCKET/KEY, gs://BUCKET/KEY, az://ACCOUNT/CONTAINER/KEY or file://NAME/PATH",
            ));
        };
        let (account, rest) = if scheme == Scheme::Az {
            let (account, rest) = rest.split_once('/').unwrap_or((rest, ""));
            if !(3..=24).contains(&account.len())
                || !account.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
            {
                return Err(invalid(
                    field,
                    "must name the storage account and the container, like az://ACCOUNT/CONTAINER/KEY",
                ));
            }
            (Some(account.to_owned()), rest)
        } else {
            (None, rest)
        };
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        check_bucket(bucket, field)?;
        if key.len() > 1024 {
            return Err(invalid(field, "names an object by more than 1024 bytes"));
        }
        // Refuses "." and ".." among the parts, empty ones and control characters. It would strip one / in front.
        let path = Some(key).filter(|key| !key.starts_with('/')).map(Path::parse);
        let Some(Ok(path)) = path else {
            return Err(invalid(
                field,
                "must not have \".\", \"..\", nothing or control characters between two slashes",
            ));
        };
        Ok(Self { scheme, account, bucket: bucket.to_owned(), path })
    }

    /// What the URI of every object of the same bucket begins with.
    #[must_use]
    pub fn root(&self) -> String {
        let scheme = self.scheme.as_str();
        match &self.account {
            Some(account) => format!("{scheme}://{account}/{}/", self.bucket),
            None => format!("{scheme}://{}/", self.bucket),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.root(), self.path)
    }
}

/// It becomes a part of a path or a file name.
fn check_bucket(bucket: &str, field: &str) -> Result<(), Error> {
    let good = (1..=222).contains(&bucket.len())
        && bucket.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if good {
        Ok(())
    } else {
        Err(invalid(
            field,
            "must name a bucket by letters, digits, '.', '_' and '-', like s3://my-bucket/in.jsonl",
        ))
    }
}

/// It becomes a part of a host's name.
pub(super) fn check_region(region: &str, field: &str) -> Result<(), Error> {
    let good = (1..=63).contains(&region.len())
        && region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !region.starts_with('-')
        && !region.ends_with('-');
    if good {
        Ok(())
    } else {
        Err(Error::new(
            Kind::Invalid,
            format!("{field}.region must be the name of a region, like eu-central-1"),
        ))
    }
}

fn invalid(field: &str, what: &str) -> Error {
    Error::new(Kind::Invalid, format!("{field} {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn object(uri: &str) -> Result<Location, String> {
        Location::object(uri, "spec.input.objectStore.uri").map_err(|e| e.to_string())
    }

    #[test]
    fn each_kind_of_uri_names_its_bucket_and_object() {
        for (uri, scheme, account, bucket, path) in [
            ("s3://b/in.jsonl", Scheme::S3, None, "b", "in.jsonl"),
            ("gs://my.bucket_1/a/b c/%2e%2e/d", Scheme::Gs, None, "my.bucket_1", "a/b c/%2e%2e/d"),
            ("az://acc0unt/box/a/b", Scheme::Az, Some("acc0unt"), "box", "a/b"),
            ("file://data/x/y.jsonl", Scheme::File, None, "data", "x/y.jsonl"),
        ] {
            let at = object(uri).unwrap();
            assert_eq!(
                (at.scheme, at.account.as_deref(), at.bucket.as_str(), at.path.as_ref()),
                (scheme, account, bucket, path)
            );
            assert_eq!(at.to_string(), uri);
        }
    }

    #[test]
    fn nothing_leads_out_of_the_bucket() {
        for uri in [
            "s3://b/../c/x",
            "s3://b/a/../../x",
            "s3://b/./x",
            "s3://b/a//x",
            "s3://b//x",
            "s3://../x",
            "s3://b/a/..",
            "s3://b/a\u{0}b",
            "file://data/../../etc/passwd",
            "file:///etc/passwd",
            "az://account/../x",
            "s3://b:80/x",
            "s3://user@host/x",
            "s3://b?x=/y",
        ] {
            assert!(object(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_field() {
        for (uri, says) in [
            ("http://b/x", "must be like s3://"),
            ("s3:/b/x", "must be like s3://"),
            ("s3://b", "must name an object"),
            ("s3://b/dir/", "several objects are a prefix"),
            ("az://Account/box/x", "must name the storage account"),
            ("s3://-b/x", "must name a bucket"),
        ] {
            let message = object(uri).unwrap_err();
            assert!(
                message.starts_with("spec.input.objectStore.uri ") && message.contains(says),
                "{message}"
            );
        }
        assert!(object(&format!("s3://b/{}", "k".repeat(1025))).is_err());
    }

    #[test]
    fn a_prefix_ends_with_a_slash_and_may_be_the_whole_bucket() {
        let prefix = |uri| Location::prefix(uri, "f").map(|at| at.path.to_string());
        assert_eq!(prefix("s3://b/").unwrap(), "");
        assert_eq!(prefix("s3://b/a/b/").unwrap(), "a/b");
        for uri in ["s3://b", "s3://b/a", "s3://b/a//", "s3://b/../"] {
            assert!(prefix(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn a_region_is_no_host() {
        for good in ["us-east-1", "auto", "eu1"] {
            assert!(check_region(good, "f").is_ok(), "{good}");
        }
        for bad in ["", "evil.example.com/", "a.b", "A", "-a", "a-", "a@b"] {
            assert!(check_region(bad, "f").is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_passes_stays_in_its_bucket(uri in "(s3|gs|file|az)://[a-z./%]{0,30}") {
            if let Ok(at) = Location::object(&uri, "f") {
                prop_assert!(!at.path.is_root());
                prop_assert!(at.path.parts().all(|p| !["", ".", ".."].contains(&p.as_ref())));
                prop_assert!(at.bucket != "." && at.bucket != ".." && !at.bucket.contains('/'));
                prop_assert_eq!(at.to_string(), uri);
            }
        }
    }
}
