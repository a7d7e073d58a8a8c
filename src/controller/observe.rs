//! Collects all that a decision needs. Client required; changes nothing.

use std::sync::Arc;

use bytes::Bytes;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};

use super::input::{self, Input};
use super::policy::Policy;
use super::shards::{
    self,
    plan::{self, Limits},
};
use super::{Credential, Problem};
use crate::api::{CONTROLLER_MANAGER, GeminiBatchJob, Method, Reason};
use crate::callback::keyring::KeyRing;
use crate::gemini::ApiKey;

/// Where the API key of a job is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecretAt {
    /// Namespace of the Secret.
    pub namespace: String,
    /// Name of the Secret.
    pub name: String,
    /// Key in the Secret.
    pub key: String,
    /// It is the operator's own, not the job's.
    pub shared: bool,
}

impl SecretAt {
    /// Where the job's key is, or else the operator's own. `None` if there is neither.
    #[must_use]
    pub fn of(job: &GeminiBatchJob, policy: &Policy) -> Option<Self> {
        if let Some(at) = job.spec.credentials.as_ref().map(|c| &c.secret_ref) {
            let namespace = job.namespace().unwrap_or_default();
            return Some(Self { namespace, name: at.name.clone(), key: at.key.clone(), shared: false });
        }
        let default = policy.default_credential.as_ref().filter(|_| job.spec.has_own_input())?;
        Some(Self {
            namespace: default.namespace.clone(),
            name: default.secret.clone(),
            key: default.key.clone(),
            shared: true,
        })
    }

    fn problem(&self, reason: Reason, own: String, shared: &str) -> Problem {
        let Self { namespace, name, .. } = self;
        if self.shared {
            let operators = format!(
                "the operator's own credential, Secret {name} in namespace {namespace}, {shared}: an administrator has to \
                 mend it, or name a Secret of your own in spec.credentials.secretRef"
            );
            Problem::new(reason, operators)
        } else {
            Problem::new(reason, own)
        }
    }
}

/// Reads the API key. What is wrong with it is a `Problem`, what is wrong with the API server an error. Whether the job
/// may use it is another question: see [`Policy::withholds`].
pub async fn credential(
    client: &Client,
    ring: &KeyRing,
    policy: &Policy,
    job: &GeminiBatchJob,
) -> Result<Result<Credential, Problem>, kube::Error> {
    let Some(at) = SecretAt::of(job, policy) else {
        return Ok(Err(policy.refuses(job).unwrap_or_else(|| {
            Problem::new(
                Reason::CredentialsNotFound,
                "spec.credentials is missing: name the Secret with the API key in spec.credentials.secretRef",
            )
        })));
    };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &at.namespace);
    let SecretAt { name, key, .. } = &at;
    let missing = |own, shared: &str| Ok(Err(at.problem(Reason::CredentialsNotFound, own, shared)));
    let secret = match secrets.get_opt(name).await {
        Ok(Some(secret)) => secret,
        Ok(None) => {
            return missing(
                format!(
                    "Secret {name} does not exist in this namespace: create it with the API key under {key}"
                ),
                "does not exist",
            );
        }
        Err(e) if super::output::is(&e, 403) => {
            return missing(
                format!("the operator may not read Secret {name}: an administrator has to allow it"),
                "may not be read by the operator",
            );
        }
        Err(e) => return Err(e),
    };
    let Some(value) = secret.data.as_ref().and_then(|d| d.get(key)) else {
        return missing(
            format!(
                "Secret {name} has no key {key}: add it, or name another one in spec.credentials.secretRef.key"
            ),
            &format!("has no key {key}"),
        );
    };
    Ok(match ApiKey::from_secret(&value.0) {
        Ok(key) => Ok(Credential { fingerprint: ring.fingerprint(key.expose().as_bytes()), key }),
        Err(e) => Err(at.problem(
            Reason::CredentialsInvalid,
            format!("key {key} of Secret {name} can't be a Gemini API key: {e}"),
            &format!("can't be a Gemini API key under {key} ({e})"),
        )),
    })
}

/// Whether the namespace is being deleted. Asked by creating something in it as a dry run, for which the permission to
/// create ConfigMaps is enough; reading namespaces would take one for the whole cluster.
pub async fn is_terminating(client: &Client, namespace: &str) -> Result<bool, kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let probe = ConfigMap {
        metadata: ObjectMeta {
            generate_name: Some("gemini-batch-operator-".to_owned()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    };
    let params = PostParams { dry_run: true, field_manager: Some(CONTROLLER_MANAGER.to_owned()) };
    match maps.create(&params, &probe).await {
        Ok(_) => Ok(false),
        Err(kube::Error::Api(status)) => {
            let causes = status.details.iter().flat_map(|d| &d.causes);
            let terminating = causes.into_iter().any(|c| c.reason == "NamespaceTerminating");
            match status.code {
                // Gone altogether.
                404 => Ok(true),
                // Any other refusal, by a quota or a policy for example, says nothing about it.
                400..500 if status.code != 429 => Ok(terminating),
                _ => Err(kube::Error::Api(status)),
            }
        }
        Err(e) => Err(e),
    }
}

/// Reads and checks the input, unless it is somebody else's file or lies in an object store (see [`super::stored`]).
pub async fn input(
    client: &Client,
    job: &GeminiBatchJob,
    max_bytes: u64,
) -> Result<Result<Input, Problem>, kube::Error> {
    let input = job.spec.input.as_ref();
    if let Some(requests) = input.and_then(|i| i.requests.as_ref()) {
        return Ok(input::from_requests(requests, job.spec.method, max_bytes));
    }
    let Some(at) = input.and_then(|i| i.config_map.as_ref()) else {
        return Ok(Err(Problem::new(
            Reason::InputInvalid,
            "spec.input needs exactly one of requests, configMap, objectStore and geminiFile",
        )));
    };
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let name = &at.name;
    let map = match maps.get_opt(name).await {
        Ok(Some(map)) => map,
        Ok(None) => {
            return Ok(Err(Problem::new(
                Reason::InputNotFound,
                format!(
                    "ConfigMap {name} does not exist in this namespace: create it with the requests under {}",
                    at.key
                ),
            )));
        }
        Err(e) if super::output::is(&e, 403) => {
            return Ok(Err(Problem::new(
                Reason::InputNotFound,
                format!("the operator may not read ConfigMap {name}: an administrator has to allow it"),
            )));
        }
        Err(e) => return Err(e),
    };
    let content: Option<Bytes> = map
        .data
        .as_ref()
        .and_then(|d| d.get(&at.key))
        .map(|text| Bytes::copy_from_slice(text.as_bytes()))
        .or_else(|| {
            map.binary_data.as_ref().and_then(|d| d.get(&at.key)).map(|b| Bytes::copy_from_slice(&b.0))
        });
    let source = format!("ConfigMap {name}, key {}", at.key);
    Ok(match (content, &at.range) {
        (Some(content), Some(range)) => {
            let part = plan::slice(&content, range)
                .map(|part| input::from_lines(part, &source, job.spec.method, max_bytes));
            // What else it may be matters nothing: it is not what it has to be.
            match part {
                Some(Ok(part)) if part.sha256 == range.sha256 => Ok(part),
                _ => Err(plan::differs(&source, range)),
            }
        }
        (Some(content), None) => match shards::limits(job, max_bytes) {
            Some(limits) => split(&content, &source, job.spec.method, limits),
            None => input::from_lines(&content, &source, job.spec.method, max_bytes),
        },
        (None, _) => Err(Problem::new(
            Reason::InputNotFound,
            format!("ConfigMap {name} has no key {}: add it", at.key),
        )),
    })
}

/// Checks an input of which each part is sent by itself: so the whole may be larger.
fn split(content: &[u8], source: &str, method: Method, limits: Limits) -> Result<Input, Problem> {
    let whole = input::from_lines(content, source, method, u64::MAX)?;
    let plan = plan::of_content(content, source, limits)?;
    Ok(Input { plan: Some(Arc::new(plan)), ..whole })
}
