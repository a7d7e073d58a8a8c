//! Whether the installed `CustomResourceDefinition` knows every field of this version. Client required.
//!
//! An older one drops what it does not know from what users write: a job with `suspend: true` would be one without, and
//! be submitted. And it refuses what the operator writes. (By server-side apply it refuses, instead of dropping it
//! silently: so nothing that was recorded is ever lost by it, only late.) So nothing is submitted until the definition
//! is as new as the operator. What runs goes on as far as its status can be written.
//!
//! Asked for is the schema that the API server publishes, which every authenticated account may read
//! (`system:discovery`): no permission of our own is needed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::channel::mpsc::UnboundedSender;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaProps;
use kube::Client;
use kube::runtime::reflector::{ObjectRef, Store};
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::run::Context;
use super::watched::Watched;
use super::{Problem, decide};
use crate::api::{Reason, crd};

/// Where the API server publishes the schema of our group and version.
const PATH: &str = "/openapi/v3/apis/geminibatch.dev/v1alpha1";

/// The longest wait for it at the beginning of a turn of leadership.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is known of the installed definition.
#[derive(Debug, Default)]
pub struct SchemaCheck {
    /// A field that it lacks.
    missing: Mutex<Option<String>>,
    /// It was looked at in this turn of leadership.
    looked: AtomicBool,
    /// The API server refused a field.
    suspected: Notify,
}

impl SchemaCheck {
    /// Why nothing may be submitted; `None` as far as the definition is concerned it may.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        if !self.looked.load(Ordering::Relaxed) {
            return Some(Problem::new(
                Reason::CrdOutdated,
                "the API server has not shown the schema of GeminiBatchJob to the operator yet, which has to see that the \
                 installed CustomResourceDefinition is as new as itself; it is asked again. If this lasts, an administrator \
                 has to let every account read /openapi/v3 (the ClusterRole system:discovery)",
            ));
        }
        self.missing().map(|field| Problem::new(Reason::CrdOutdated, outdated(&field)))
    }

    /// Has the definition looked at soon, if this error is one that an older definition causes.
    pub fn suspect(&self, error: &impl std::fmt::Display) {
        if error.to_string().contains("not declared in schema") {
            self.suspected.notify_one();
        }
    }

    fn missing(&self) -> Option<String> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns whether that is news.
    fn set(&self, missing: Option<String>) -> bool {
        let mut known = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        let news = *known != missing;
        *known = missing;
        news
    }
}

/// Says which field is missing and how to mend it.
fn outdated(field: &str) -> String {
    format!(
        "the installed CustomResourceDefinition is older than the operator: it does not know {field}. Nothing is submitted \
         until an administrator installs the one of version {}: kubectl apply --server-side -f crds/",
        env!("CARGO_PKG_VERSION")
    )
}

/// Looks at the definition: the first thing in a turn of leadership.
pub async fn at_start(ctx: &Context) {
    forget(ctx);
    if tokio::time::timeout(PATIENCE, look(ctx)).await.is_err() {
        tracing::warn!("the API server did not publish the schema of jobs in time; it is asked again");
    }
}

/// At the end of a turn: whoever leads next says what there is to say.
pub fn forget(ctx: &Context) {
    ctx.schema.set(None);
    ctx.schema.looked.store(false, Ordering::Relaxed);
    ctx.metrics.crd_outdated.set(0);
}

/// Looks again now and then, sooner while it is too old or the API server refused a field, until the token is
/// cancelled. When it has been mended, the jobs that waited for it go on.
pub async fn keep_current(
    ctx: Arc<Context>,
    store: Store<Watched>,
    poke: UnboundedSender<ObjectRef<Watched>>,
    stop: CancellationToken,
) {
    loop {
        let was_outdated = ctx.schema.problem().is_some();
        let pause = if was_outdated { ctx.timings.recheck } else { ctx.timings.schema };
        tokio::select! {
            () = stop.cancelled() => return,
            () = ctx.clock.sleep(pause) => {}
            () = ctx.schema.suspected.notified() => {}
        }
        if stop.run_until_cancelled(look(&ctx)).await.is_none() {
            return;
        }
        if was_outdated && ctx.schema.problem().is_none() {
            wake_all(&ctx, &store, &poke);
        }
    }
}

/// Has every unfinished job worked on now.
fn wake_all(ctx: &Context, store: &Store<Watched>, poke: &UnboundedSender<ObjectRef<Watched>>) {
    for object in store.state() {
        if object.0.as_ref().is_ok_and(decide::is_finished) {
            continue;
        }
        if let Ok(job) = &object.0 {
            ctx.unsettle(job.metadata.uid.as_deref().unwrap_or_default());
        }
        let _ = poke.unbounded_send(ObjectRef::from_obj(&object)); // fails when the turn is over
    }
}

/// Compares once. What can't be found out changes nothing; as long as nothing was found out, nothing is submitted.
async fn look(ctx: &Context) {
    let missing = match served(&ctx.client).await {
        Ok(schema) => first_missing(&ours(), &schema, ""),
        Err(error) => {
            tracing::warn!(%error, "the schema of jobs could not be read from the API server; it is asked again");
            return;
        }
    };
    ctx.schema.looked.store(true, Ordering::Relaxed);
    ctx.metrics.crd_outdated.set(i64::from(missing.is_some()));
    if !ctx.schema.set(missing.clone()) {
        return;
    }
    if let Some(field) = missing {
        let note = outdated(&field);
        tracing::error!(field, "{note}");
        ctx.tell_administrator(Reason::CrdOutdated.as_str(), &note, None).await;
    } else {
        tracing::info!("the CustomResourceDefinition is as new as the operator; submissions go on");
    }
}

/// The schema of a job as the API server has it now.
async fn served(client: &Client) -> Result<Value, kube::Error> {
    let request = http::Request::get(PATH).body(Vec::new()).map_err(kube::Error::HttpError)?;
    let mut document: Value = client.request(request).await?;
    let schemas = document["components"]["schemas"].as_object_mut().map(std::mem::take).unwrap_or_default();
    Ok(schemas
        .into_iter()
        .find(|(name, _)| name.ends_with(".GeminiBatchJob"))
        .map_or(Value::Null, |(_, s)| s))
}

/// The same of this version: spec and status. The rest is Kubernetes' own.
fn ours() -> Value {
    let schema: Option<JSONSchemaProps> =
        crd::crd().spec.versions.into_iter().next().and_then(|v| v.schema?.open_api_v3_schema);
    serde_json::to_value(schema).unwrap_or_default()
}

/// The path of the first field or value that `theirs` lacks.
fn first_missing(ours: &Value, theirs: &Value, path: &str) -> Option<String> {
    if theirs["x-kubernetes-preserve-unknown-fields"] == true {
        return None;
    }
    for (name, schema) in ours["properties"].as_object().into_iter().flatten() {
        let here = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match theirs["properties"].get(name) {
            None => return Some(here),
            Some(there) => {
                if let Some(missing) = first_missing(schema, there, &here) {
                    return Some(missing);
                }
            }
        }
    }
    // What is longer than they allow could not be written.
    if let (Some(needed), Some(allowed)) = (ours["maxLength"].as_u64(), theirs["maxLength"].as_u64())
        && allowed < needed
    {
        return Some(format!("room for {needed} characters in {path}"));
    }
    let known = theirs["enum"].as_array();
    let value = known.and_then(|known| ours["enum"].as_array()?.iter().find(|v| !known.contains(v)));
    if let Some(value) = value {
        return Some(format!("the value {value} of {path}"));
    }
    for (inside, sign) in [("items", "[]"), ("additionalProperties", ".*")] {
        if ours[inside].is_object()
            && let Some(missing) = first_missing(&ours[inside], &theirs[inside], &format!("{path}{sign}"))
        {
            return Some(missing);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our schema, changed at the place that a JSON pointer names.
    fn without(pointer: &str, name: &str) -> Value {
        let mut theirs = ours();
        let parent = theirs.pointer_mut(pointer).unwrap();
        assert!(parent.as_object_mut().unwrap().remove(name).is_some(), "{pointer} has {name}");
        theirs
    }

    #[test]
    fn a_field_that_is_missing_at_any_depth_is_named() {
        assert_eq!(first_missing(&ours(), &ours(), ""), None);
        for (pointer, name, said) in [
            ("/properties", "status", "status"),
            ("/properties/spec/properties", "suspend", "spec.suspend"),
            (
                "/properties/spec/properties/input/properties/requests/items/properties",
                "prompt",
                "spec.input.requests[].prompt",
            ),
            (
                "/properties/status/properties/attempts/items/properties",
                "resends",
                "status.attempts[].resends",
            ),
            (
                "/properties/status/properties/attempts/items/properties/refusal/properties",
                "code",
                "status.attempts[].refusal.code",
            ),
        ] {
            assert_eq!(first_missing(&ours(), &without(pointer, name), "").as_deref(), Some(said));
        }
        assert_eq!(first_missing(&ours(), &Value::Null, "").as_deref(), Some("spec"));
    }

    #[test]
    fn a_value_that_is_missing_is_named() {
        let mut theirs = ours();
        let states = theirs.pointer_mut("/properties/status/properties/state/enum").unwrap();
        states.as_array_mut().unwrap().retain(|v| v != "Queued");
        let missing = first_missing(&ours(), &theirs, "");
        assert_eq!(missing.as_deref(), Some("the value \"Queued\" of status.state"));
    }

    #[test]
    fn room_that_is_missing_is_named() {
        let mut theirs = ours();
        let hint = "/properties/status/properties/attempts/items/properties/observedHint/maxLength";
        *theirs.pointer_mut(hint).unwrap() = 128.into();
        let missing = first_missing(&ours(), &theirs, "");
        assert_eq!(missing.as_deref(), Some("room for 192 characters in status.attempts[].observedHint"));
    }

    #[test]
    fn a_newer_definition_is_no_older_one() {
        let mut theirs = ours();
        theirs["properties"]["spec"]["properties"]["later"] = serde_json::json!({"type": "string"});
        assert_eq!(first_missing(&ours(), &theirs, ""), None);
    }

    #[test]
    fn it_is_said_how_to_mend_it() {
        let text = outdated("spec.suspend");
        assert!(
            text.contains("does not know spec.suspend")
                && text.contains("kubectl apply --server-side -f crds/")
        );
        assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
    }
}
