//! A job as the watch sees it: without its payload, and whatever is in it. Pure: no client required.
//!
//! One object that can't be read must not stall the watch of all others. kube's `DeserializeGuard` is not
//! enough for that: it first reads the whole object into a tree, and `serde_json` gives up on one that is nested
//! deeper than 128 levels. A request may be (its schema is open), and so may `managedFields`, which mirror it.
//! Here both are skipped unread, which takes no recursion and no memory.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::Resource;
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::api::{GeminiBatchJob, GeminiBatchJobStatus};

/// A job without payload, or why it can't be read.
#[derive(Clone, Debug)]
pub struct Watched(pub Result<GeminiBatchJob, Unreadable>);

/// A job that this operator can't read: of a newer version, or written past the schema.
#[derive(Clone, Debug)]
pub struct Unreadable {
    /// Its metadata, as far as the controller needs them.
    pub metadata: ObjectMeta,
    /// What is wrong. Quotes nothing.
    pub error: String,
}

/// The metadata that the controller needs. `managedFields` and annotations (where `kubectl apply` keeps a copy
/// of the whole object) are not among them.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    finalizers: Option<Vec<String>>,
    owner_references: Option<Vec<OwnerReference>>,
}

/// The spec without its payload.
#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    #[expect(dead_code, reason = "named, so that it is skipped unread")]
    input: IgnoredAny,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

impl<'de> Deserialize<'de> for Watched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Object {
            metadata: Metadata,
            spec: Option<Spec>,
            // The schema bounds its depth, so a tree of it is safe.
            #[serde(default)]
            status: Value,
        }
        let Object { metadata: m, spec, status } = Object::deserialize(deserializer)?;
        let metadata = ObjectMeta {
            name: m.name,
            namespace: m.namespace,
            uid: m.uid,
            resource_version: m.resource_version,
            generation: m.generation,
            creation_timestamp: m.creation_timestamp,
            deletion_timestamp: m.deletion_timestamp,
            finalizers: m.finalizers,
            owner_references: m.owner_references,
            ..ObjectMeta::default()
        };
        let spec = spec.map_or(Value::Null, |s| Value::Object(s.rest));
        let read = || -> Result<GeminiBatchJob, serde_json::Error> {
            let mut job = GeminiBatchJob::new("", serde_json::from_value(spec)?);
            job.status = serde_json::from_value::<Option<GeminiBatchJobStatus>>(status)?;
            Ok(job)
        };
        Ok(Self(match read() {
            Ok(mut job) => {
                job.metadata = metadata;
                Ok(job)
            }
            // serde_json's messages about data can quote it, its categories do not.
            Err(e) => {
                Err(Unreadable { metadata, error: format!("{:?} error in spec or status", e.classify()) })
            }
        }))
    }
}

impl Resource for Watched {
    type DynamicType = ();
    type Scope = <GeminiBatchJob as Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        GeminiBatchJob::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        GeminiBatchJob::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        GeminiBatchJob::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        GeminiBatchJob::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|unreadable| &unreadable.metadata, Resource::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|unreadable| &mut unreadable.metadata, Resource::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request nested so deep, in a job that `kubectl apply` wrote.
    fn nested(depth: usize) -> String {
        let deep = format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth));
        format!(
            r#"{{"metadata":{{"name":"j","namespace":"n","uid":"u","resourceVersion":"7","generation":1,
                "managedFields":[{{"fieldsV1":{deep}}}],"annotations":{{"x":"payload"}}}},
               "spec":{{"model":"m","credentials":{{"secretRef":{{"name":"s"}}}},
                "input":{{"requests":[{{"key":"k","request":{deep}}}]}}}},
               "status":{{"state":"Pending","observedGeneration":-1}}}}"#
        )
    }

    #[test]
    fn payloads_are_not_read_however_deep_they_are() {
        for depth in [1, 127, 128, 5000] {
            let watched: Watched = serde_json::from_str(&nested(depth)).unwrap();
            let job = watched.0.unwrap();
            assert_eq!((job.metadata.name.as_deref(), job.spec.model.as_str()), (Some("j"), "m"));
            assert_eq!(job.spec.credentials.unwrap().secret_ref.key, "apiKey");
            assert!(job.spec.input.is_none() && job.metadata.annotations.is_none());
            assert_eq!(job.status.unwrap().observed_generation, Some(-1));
        }
        let list = format!(r#"{{"kind":"L","apiVersion":"v","metadata":{{}},"items":[{}]}}"#, nested(5000));
        assert_eq!(serde_json::from_str::<kube::core::ObjectList<Watched>>(&list).unwrap().items.len(), 1);
        let event = format!(r#"{{"type":"ADDED","object":{}}}"#, nested(5000));
        assert!(serde_json::from_str::<kube::core::WatchEvent<Watched>>(&event).is_ok());
    }

    #[test]
    fn what_cannot_be_read_keeps_its_name_and_is_not_quoted() {
        let text = nested(1).replace("\"Pending\"", "\"SECRET\"");
        let unreadable = serde_json::from_str::<Watched>(&text).unwrap().0.unwrap_err();
        assert_eq!(unreadable.metadata.uid.as_deref(), Some("u"));
        assert!(!unreadable.error.contains("SECRET"), "{}", unreadable.error);
        assert!(serde_json::from_str::<Watched>(&text.replace("\"spec\"", "\"other\"")).unwrap().0.is_err());
    }
}
