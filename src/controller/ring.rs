//! The key ring's Secret: created if it is not there, read otherwise, read again now and then, rotated and
//! retired. Client required.
//!
//! A ring that vanished is never silently replaced by another one while jobs run: their callbacks would be
//! refused, and their API keys could not be recognised. A controller that has it in memory writes the same
//! ring back and raises an alarm; one that starts without it refuses to.
//!
//! All that holds with callbacks off, too: the ring also has the cluster id in the names of batches and the key of the
//! fingerprints. Only retired keys are not looked for then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, ObjectReference, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ListParams, PostParams};
use kube::runtime::events::{Event, EventType};
use kube::runtime::reflector::Store;
use kube::{Api, Client, ResourceExt as _};
use tokio_util::sync::CancellationToken;

use super::decide;
use super::namespaces;
use super::run::Context;
use super::watched::Watched;
use crate::api::{CONTROLLER_MANAGER, GeminiBatchJob};
use crate::callback::keyring::{KeyRing, KeyRingError, SECRET_KEY};

/// How often the Secret is read again.
const REREAD: SignedDuration = SignedDuration::from_mins(1);

/// Why there is no key ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The API server refused or did not answer.
    #[error("the key ring in Secret {secret} can't be had: {cause}")]
    Kubernetes {
        /// Name of the Secret.
        secret: String,
        /// What the API server said.
        cause: kube::Error,
    },
    /// The Secret holds something else.
    #[error("Secret {secret} does not hold a key ring under {SECRET_KEY}: {cause}")]
    Content {
        /// Name of the Secret.
        secret: String,
        /// What is wrong.
        cause: KeyRingError,
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
    /// It is gone, and jobs need it.
    #[error(
        "the key ring in Secret {secret} is gone, but {jobs} unfinished jobs were submitted with it: restore the \
         Secret from a backup. If it is lost for good, start once with --recreate-key-ring: the callbacks of those \
         jobs will then be refused (the sweep finds their ends), and a job whose API key can't be recognised says \
         CredentialsChanged"
    )]
    Vanished {
        /// Name of the Secret.
        secret: String,
        /// How many jobs.
        jobs: usize,
    },
    /// A rotation that can't be.
    #[error("the key ring in Secret {secret} can't be rotated: {cause}")]
    Rotation {
        /// Name of the Secret.
        secret: String,
        /// Why.
        cause: KeyRingError,
    },
    /// There is nothing to rotate.
    #[error(
        "there is no Secret {secret} in this namespace: the controller creates the key ring when it starts"
    )]
    Missing {
        /// Name of the Secret.
        secret: String,
    },
}

/// Where the ring is, and what an administrator says about it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Namespace of the operator.
    pub namespace: String,
    /// Name of the Secret.
    pub secret: String,
    /// `--cluster-id`.
    pub cluster_id: Option<String>,
    /// The namespaces whose jobs are worked on; all if none is named.
    pub watch_namespaces: BTreeSet<String>,
    /// Whether a ring may be made although jobs were submitted with one that is gone.
    pub recreate: bool,
}

/// The ring that is there, or a new one. If another replica was faster, theirs.
pub async fn ensure(client: &Client, place: &Place, now: Timestamp) -> Result<KeyRing, RingError> {
    let secret = place.secret.as_str();
    let failed = |cause| RingError::Kubernetes { secret: secret.to_owned(), cause };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &place.namespace);
    let ring = if let Some(there) = secrets.get_opt(secret).await.map_err(failed)? {
        parse(secret, &there)?
    } else {
        let jobs = submitted_jobs(client, &place.watch_namespaces).await.map_err(failed)?;
        if jobs > 0 && !place.recreate {
            return Err(RingError::Vanished { secret: secret.to_owned(), jobs });
        }
        let id = match &place.cluster_id {
            Some(id) => id.clone(),
            None => kube_system_uid(client).await.map_err(failed)?,
        };
        let ring = KeyRing::generate(&id, now)
            .map_err(|cause| RingError::Content { secret: secret.to_owned(), cause })?;
        match secrets.create(&post(), &object(&place.namespace, secret, &ring)).await {
            Ok(_) => {
                tracing::info!(secret, "created the key ring");
                ring
            }
            Err(e) if super::output::is(&e, 409) => {
                parse(secret, &secrets.get(secret).await.map_err(failed)?)?
            }
            Err(e) => return Err(failed(e)),
        }
    };
    match &place.cluster_id {
        Some(flag) if *flag != ring.cluster_id => Err(RingError::OtherCluster {
            secret: secret.to_owned(),
            ring: ring.cluster_id.clone(),
            flag: flag.clone(),
        }),
        _ => Ok(ring),
    }
}

/// Unfinished jobs whose callbacks and API keys depend on a ring.
async fn submitted_jobs(client: &Client, among: &BTreeSet<String>) -> Result<usize, kube::Error> {
    let mut submitted_jobs = 0;
    for jobs in namespaces::jobs(client, among) {
        match jobs.list(&ListParams::default()).await {
            // One that can't be read may need the ring as well.
            Ok(list) => {
                let needs_ring = |job: &&Watched| job.0.as_ref().map_or(true, |j| submitted(j).is_some());
                submitted_jobs += list.iter().filter(needs_ring).count();
            }
            Err(e) if super::output::is(&e, 404) => {} // no CRD yet, so no jobs
            Err(e) => return Err(e),
        }
    }
    Ok(submitted_jobs)
}

/// When an unfinished job was submitted, if it was.
fn submitted(job: &GeminiBatchJob) -> Option<Timestamp> {
    let attempt = decide::current_attempt(job)?;
    (!decide::is_finished(job)).then_some(attempt.intent_time.0)
}

/// Adds a key to the ring; for the subcommand `rotate-keys`. Returns the new key's id.
pub async fn rotate(
    client: &Client,
    namespace: &str,
    secret: &str,
    now: Timestamp,
) -> Result<String, RingError> {
    let failed = |cause| RingError::Kubernetes { secret: secret.to_owned(), cause };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    loop {
        let there = secrets.get_opt(secret).await.map_err(failed)?;
        let there = there.ok_or_else(|| RingError::Missing { secret: secret.to_owned() })?;
        let mut ring = parse(secret, &there)?;
        let id = match ring.rotate(now) {
            Ok(key) => key.id.clone(),
            Err(cause) => return Err(RingError::Rotation { secret: secret.to_owned(), cause }),
        };
        match replace(&secrets, &there, &ring).await {
            Ok(()) => return Ok(id),
            Err(e) if super::output::is(&e, 409) => {} // somebody wrote meanwhile: theirs is the base
            Err(e) => return Err(failed(e)),
        }
    }
}

/// Reads the ring again now and then, so that a rotated one is used; writes it back if it has vanished;
/// removes keys that nothing needs any more. `store` is the watch's cache of jobs.
pub async fn keep_current(ctx: Arc<Context>, place: Place, store: Store<Watched>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = ctx.clock.sleep(REREAD) => {}
        }
        let Some(done) = stop.run_until_cancelled(once(&ctx, &place, &store)).await else { return };
        if let Err(error) = done {
            tracing::error!(%error, "the key ring could not be read again; the one in memory is used on");
        }
    }
}

/// Reads the ring again: it may have been rotated while somebody else led.
pub async fn reread(ctx: &Context, place: &Place) -> Result<(), RingError> {
    let secret = place.secret.as_str();
    let secrets: Api<Secret> = Api::namespaced(ctx.client.clone(), &place.namespace);
    let there = secrets
        .get_opt(secret)
        .await
        .map_err(|cause| RingError::Kubernetes { secret: secret.to_owned(), cause })?;
    // One that is gone, or another one, is dealt with at the next turn of `keep_current`. Keys may have been retired by
    // whoever led meanwhile.
    if let Some(there) = there {
        let ring = parse(secret, &there)?;
        if ring.is_same_installation(&ctx.ring()) {
            *ctx.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
        }
    }
    Ok(())
}

async fn once(ctx: &Context, place: &Place, store: &Store<Watched>) -> Result<(), RingError> {
    let secret = place.secret.as_str();
    let failed = |cause| RingError::Kubernetes { secret: secret.to_owned(), cause };
    let secrets: Api<Secret> = Api::namespaced(ctx.client.clone(), &place.namespace);
    let Some(there) = secrets.get_opt(secret).await.map_err(failed)? else {
        alarm(ctx, place, Loss::Deleted).await;
        let ring = ctx.ring();
        return match secrets.create(&post(), &object(&place.namespace, secret, &ring)).await {
            Ok(_) => Ok(()),
            Err(e) if super::output::is(&e, 409) => Ok(()), // another replica was faster
            Err(e) => Err(failed(e)),
        };
    };
    let mut ring = match parse(secret, &there) {
        Ok(ring) if ctx.ring().may_become(&ring, ctx.clock.now()) => ring,
        other => {
            alarm(ctx, place, if other.is_ok() { Loss::Replaced } else { Loss::Broken }).await;
            return match replace(&secrets, &there, &ctx.ring()).await {
                Ok(()) => Ok(()),
                Err(e) if super::output::is(&e, 409) => Ok(()), // looked at again at the next turn
                Err(e) => Err(failed(e)),
            };
        }
    };
    // Without callbacks keys may stay: jobs that were sent before, and callbacks that are turned on again, may need them.
    if ctx.external_url.is_some()
        && ring.keys.len() > 1
        && ring.retire(ctx.clock.now(), oldest_submitted(store).await)
    {
        match replace(&secrets, &there, &ring).await {
            Ok(()) => tracing::info!(keys = ring.keys.len(), "noted which keys of the ring are out of use"),
            Err(e) if super::output::is(&e, 409) => return Ok(()), // read again at the next turn
            Err(e) => return Err(failed(e)),
        }
    }
    *ctx.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
    Ok(())
}

/// The earliest submission of an unfinished job, from the whole cache.
async fn oldest_submitted(store: &Store<Watched>) -> Option<Timestamp> {
    // Without a complete list nothing may be concluded: a job from before all times keeps every key.
    if store.wait_until_ready().await.is_err() {
        return Some(Timestamp::MIN);
    }
    let unfinished = |object: &Arc<Watched>| match &object.0 {
        Ok(job) => submitted(job),
        Err(_) => Some(Timestamp::MIN), // can't be read: it may need any of them
    };
    store.state().iter().filter_map(unfinished).min()
}

/// What happened to the Secret.
#[derive(Clone, Copy)]
enum Loss {
    /// It was not there.
    Deleted,
    /// It held another ring, or lacked keys that jobs need.
    Replaced,
    /// It held no ring.
    Broken,
}

/// Somebody deleted or changed the Secret. That is said where an administrator looks.
async fn alarm(ctx: &Context, place: &Place, loss: Loss) {
    let (reason, what) = match loss {
        Loss::Deleted => ("KeyRingDeleted", "was deleted"),
        Loss::Replaced => ("KeyRingReplaced", "was replaced by another one, or lost keys that jobs need,"),
        Loss::Broken => ("KeyRingReplaced", "was replaced by something that is no key ring"),
    };
    let note = format!(
        "the key ring {what} while the operator runs; the one in memory is written back. Receivers that read it meanwhile \
         refused callbacks, which Gemini sends again. To replace a ring on purpose, stop the controllers first"
    );
    tracing::error!(secret = place.secret, namespace = place.namespace, "{note}");
    ctx.metrics.keyring_restored.inc();
    let event = Event {
        type_: EventType::Warning,
        reason: reason.to_owned(),
        note: Some(note),
        action: "Restore".to_owned(),
        secondary: None,
    };
    let about = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Secret".to_owned()),
        namespace: Some(place.namespace.clone()),
        name: Some(place.secret.clone()),
        ..ObjectReference::default()
    };
    if let Err(error) = ctx.recorder.publish(&event, &about).await {
        tracing::warn!(%error, "an Event could not be written");
    }
}

async fn replace(secrets: &Api<Secret>, there: &Secret, ring: &KeyRing) -> Result<(), kube::Error> {
    let mut new = there.clone(); // with its resourceVersion: of two writers one gets a conflict
    new.data.get_or_insert_default().insert(SECRET_KEY.to_owned(), ByteString(ring.to_json().to_vec()));
    secrets.replace(&there.name_any(), &post(), &new).await.map(|_| ())
}

fn parse(secret: &str, there: &Secret) -> Result<KeyRing, RingError> {
    let bytes = there.data.as_ref().and_then(|d| d.get(SECRET_KEY)).map_or(&[][..], |b| &b.0[..]);
    KeyRing::parse(bytes).map_err(|cause| RingError::Content { secret: secret.to_owned(), cause })
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
