//! The key ring's Secret: created if it is not there, read otherwise, read again now and then. Client
//! required.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};
use tokio_util::sync::CancellationToken;

use super::run::Context;
use crate::api::CONTROLLER_MANAGER;
use crate::callback::keyring::{KeyRing, KeyRingError, SECRET_KEY};

/// How often the Secret is read again.
const REREAD: SignedDuration = SignedDuration::from_mins(1);

/// Why there is no key ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The API server refused or did not answer.
    #[error("the key ring in Secret {secret} can't be had: {source}")]
    Kubernetes {
        /// Name of the Secret.
        secret: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// The Secret holds something else.
    #[error("Secret {secret} does not hold a key ring under {SECRET_KEY}: {source}")]
    Content {
        /// Name of the Secret.
        secret: String,
        /// What is wrong.
        source: KeyRingError,
    },
    /// The cluster id given is not the one of the ring.
    #[error(
        "the key ring in Secret {secret} belongs to cluster id {ring}, but --cluster-id says {flag}: batches \
         that are under way bear the former. Leave --cluster-id out, or give the old one"
    )]
    OtherCluster {
        /// Name of the Secret.
        secret: String,
        /// The ring's.
        ring: String,
        /// The flag's.
        flag: String,
    },
}

/// The ring that is there, or a new one. If another replica was faster, theirs.
pub async fn ensure(
    client: &Client,
    namespace: &str,
    secret: &str,
    cluster_id: Option<&str>,
    now: Timestamp,
) -> Result<KeyRing, RingError> {
    let failed = |source| RingError::Kubernetes { secret: secret.to_owned(), source };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let ring = if let Some(there) = secrets.get_opt(secret).await.map_err(failed)? {
        parse(secret, &there)?
    } else {
        let id = match cluster_id {
            Some(id) => id.to_owned(),
            None => kube_system_uid(client).await.map_err(failed)?,
        };
        let ring = KeyRing::generate(&id, now)
            .map_err(|source| RingError::Content { secret: secret.to_owned(), source })?;
        match secrets.create(&post(), &object(namespace, secret, &ring)).await {
            Ok(_) => ring,
            Err(e) if super::output::is(&e, 409) => {
                parse(secret, &secrets.get(secret).await.map_err(failed)?)?
            }
            Err(e) => return Err(failed(e)),
        }
    };
    match cluster_id {
        Some(flag) if flag != ring.cluster_id => Err(RingError::OtherCluster {
            secret: secret.to_owned(),
            ring: ring.cluster_id.clone(),
            flag: flag.to_owned(),
        }),
        _ => Ok(ring),
    }
}

/// Reads the ring again now and then, so that a rotated one is used.
pub async fn keep_current(ctx: Arc<Context>, namespace: String, secret: String, stop: CancellationToken) {
    let secrets: Api<Secret> = Api::namespaced(ctx.client.clone(), &namespace);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = ctx.clock.sleep(REREAD) => {}
        }
        match secrets.get_opt(&secret).await {
            Ok(Some(there)) => match parse(&secret, &there) {
                Ok(ring) => *ctx.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring),
                Err(error) => {
                    tracing::error!(%error, "the key ring can't be read; the one in memory is used on");
                }
            },
            Ok(None) => tracing::error!(
                secret,
                "the key ring is gone; the one in memory is used on, but callbacks will be refused by receivers \
                 that start now"
            ),
            Err(error) => tracing::warn!(%error, "the key ring could not be read again"),
        }
    }
}

fn parse(secret: &str, there: &Secret) -> Result<KeyRing, RingError> {
    let bytes = there.data.as_ref().and_then(|d| d.get(SECRET_KEY)).map_or(&[][..], |b| &b.0[..]);
    KeyRing::parse(bytes).map_err(|source| RingError::Content { secret: secret.to_owned(), source })
}

async fn kube_system_uid(client: &Client) -> Result<String, kube::Error> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    Ok(namespaces.get("kube-system").await?.uid().unwrap_or_default())
}

fn post() -> PostParams {
    PostParams { field_manager: Some(CONTROLLER_MANAGER.to_owned()), ..PostParams::default() }
}

fn object(namespace: &str, name: &str, ring: &KeyRing) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(
                "app.kubernetes.io/managed-by".to_owned(),
                "gemini-batch-operator".to_owned(),
            )])),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(SECRET_KEY.to_owned(), ByteString(ring.to_json().to_vec()))])),
        ..Secret::default()
    }
}
