//! Collects all that a decision needs. Client required; changes nothing.

use bytes::Bytes;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client, ResourceExt};

use super::Problem;
use super::input::{self, Input};
use crate::api::{GeminiBatchJob, Reason};
use crate::callback::keyring::KeyRing;
use crate::gemini::ApiKey;

/// An API key and its fingerprint.
pub struct Credential {
    /// The key. Redacts itself.
    pub key: ApiKey,
    /// A keyed hash of it: the only form in which it is ever written down.
    pub fingerprint: String,
}

/// Reads the API key. What is wrong with it is a `Problem`, what is wrong with the API server an error.
pub async fn credential(
    client: &Client,
    ring: &KeyRing,
    job: &GeminiBatchJob,
) -> Result<Result<Credential, Problem>, kube::Error> {
    let at = &job.spec.credentials.secret_ref;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let name = &at.name;
    let secret = match secrets.get_opt(name).await {
        Ok(Some(secret)) => secret,
        Ok(None) => {
            return Ok(Err(Problem::new(
                Reason::CredentialsNotFound,
                format!(
                    "Secret {name} does not exist in this namespace: create it with the API key under {}",
                    at.key
                ),
            )));
        }
        Err(e) if super::output::is(&e, 403) => {
            return Ok(Err(Problem::new(
                Reason::CredentialsNotFound,
                format!("the operator may not read Secret {name}: an administrator has to allow it"),
            )));
        }
        Err(e) => return Err(e),
    };
    let Some(value) = secret.data.as_ref().and_then(|d| d.get(&at.key)) else {
        return Ok(Err(Problem::new(
            Reason::CredentialsNotFound,
            format!(
                "Secret {name} has no key {}: add it, or name another one in spec.credentials.secretRef.key",
                at.key
            ),
        )));
    };
    Ok(match ApiKey::from_secret(&value.0) {
        Ok(key) => Ok(Credential { fingerprint: ring.fingerprint(key.expose().as_bytes()), key }),
        Err(e) => Err(Problem::new(
            Reason::CredentialsInvalid,
            format!("key {} of Secret {name} can't be a Gemini API key: {e}", at.key),
        )),
    })
}

/// Reads and checks the input, unless it is somebody else's file.
pub async fn input(
    client: &Client,
    job: &GeminiBatchJob,
    max_bytes: u64,
) -> Result<Result<Input, Problem>, kube::Error> {
    if let Some(requests) = &job.spec.input.requests {
        return Ok(input::from_requests(requests, max_bytes));
    }
    let Some(at) = &job.spec.input.config_map else {
        return Ok(Err(Problem::new(
            Reason::InputInvalid,
            "spec.input needs exactly one of requests, configMap and geminiFile",
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
    Ok(match content {
        Some(content) => input::from_lines(&content, &format!("ConfigMap {name}, key {}", at.key), max_bytes),
        None => Err(Problem::new(
            Reason::InputNotFound,
            format!("ConfigMap {name} has no key {}: add it", at.key),
        )),
    })
}
