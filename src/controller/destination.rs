//! Where a job's results go. Pure: no client required.

use std::fmt;

use crate::api::{GeminiBatchJob, ObjectStoreOutput, Output, OutputStatus, StoredOutput};

/// Counts, token usage and names.
pub const MANIFEST_KEY: &str = "manifest.json";

/// Where results go.
#[derive(Clone, Debug, PartialEq)]
pub enum Destination {
    /// The `ConfigMap` of that name.
    ConfigMap(String),
    /// A place in an object store.
    Store(ObjectStoreOutput),
}

impl Destination {
    /// Where the results of the job shall go.
    #[must_use]
    pub fn of(job: &GeminiBatchJob) -> Option<Self> {
        Self::in_output(job.spec.output.as_ref()?)
    }

    /// Where `spec.output` says.
    #[must_use]
    pub fn in_output(output: &Output) -> Option<Self> {
        match (&output.config_map, &output.object_store) {
            (Some(map), _) => Some(Self::ConfigMap(map.name.clone())),
            (None, Some(store)) => Some(Self::Store(store.clone())),
            (None, None) => None,
        }
    }

    /// Whether a job's status names results there.
    #[must_use]
    pub fn is_in(&self, output: &OutputStatus) -> bool {
        match self {
            Self::ConfigMap(name) => output.config_map.as_ref() == Some(name),
            Self::Store(store) => output.object_store.as_ref().is_some_and(|there| {
                let place = there.manifest.strip_suffix(MANIFEST_KEY);
                place.and_then(|place| place.strip_suffix('/')) == Some(store.uri.trim_end_matches('/'))
            }),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConfigMap(name) => write!(f, "ConfigMap {name}"),
            Self::Store(store) => f.write_str(&store.uri),
        }
    }
}

/// Where results are, for the status.
#[derive(Clone, Debug, PartialEq)]
pub enum Placed {
    /// In the `ConfigMap` of that name.
    ConfigMap(String),
    /// In these objects.
    Store(StoredOutput),
}

impl Placed {
    /// In words of the status.
    #[must_use]
    pub fn status(&self) -> OutputStatus {
        match self.clone() {
            Self::ConfigMap(name) => OutputStatus { config_map: Some(name), ..OutputStatus::default() },
            Self::Store(stored) => OutputStatus { object_store: Some(stored), ..OutputStatus::default() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_where_the_status_names_their_manifest() {
        let at = |uri: &str| {
            Destination::Store(serde_json::from_value(serde_json::json!({ "uri": uri })).unwrap())
        };
        let manifest = format!("s3://b/o/{MANIFEST_KEY}");
        let output = OutputStatus {
            object_store: Some(StoredOutput { manifest, ..StoredOutput::default() }),
            ..OutputStatus::default()
        };
        assert!(at("s3://b/o").is_in(&output) && at("s3://b/o/").is_in(&output));
        assert!(
            !at("s3://b").is_in(&output)
                && !at("s3://b/o/o").is_in(&output)
                && !at("gs://b/o").is_in(&output)
        );
        assert!(!Destination::ConfigMap("o".to_owned()).is_in(&output));
        assert!(!at("s3://b/o").is_in(&OutputStatus::default()));
    }
}
