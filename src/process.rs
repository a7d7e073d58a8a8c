//! Builds the parts of `run` and keeps them until a signal.
//!
//! SIGTERM and SIGINT stop everything in order and end with success. A part that ends by itself, or panics,
//! ends the process with an error: a half-dead operator must not look alive.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::HeaderValue;
use http::header::USER_AGENT;
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::admin::{self, Admin};
use crate::broken;
use crate::callback::keyring;
use crate::clock::Clock;
use crate::config::{RotateKeysArgs, RunArgs};
use crate::controller::identity::new_send_id;
use crate::controller::metrics::Metrics;
use crate::controller::policy::{DefaultCredential, Policy};
use crate::controller::{Timings, ring, run as controller};
use crate::gemini;
use crate::lease::{self, Elector};
use crate::receiver::server::open_files_limit;
use crate::receiver::tls::Tls;
use crate::receiver::{self, Receiver, Upstreams};
use crate::store::{self, Stores};

/// Runs the parts that the role asks for until SIGTERM or SIGINT.
pub async fn run(args: &RunArgs) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let grace = if broken::without("grace") { 0 } else { args.resend_grace_seconds };
    let timings = Timings { resend_grace: SignedDuration::from_secs(i64::from(grace)), ..Timings::default() };
    let mut parts = start(args, kube_config().await?, timings, &stop).await?;

    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = parts.join_next() => ended,
    };
    let by_itself = ended.is_some();
    tracing::info!("stopping");
    stop.cancel();
    let mut results: Vec<_> = ended.into_iter().collect();
    while let Some(result) = parts.join_next().await {
        results.push(result);
    }
    for result in results {
        result.context("a part of the operator panicked")??;
    }
    if by_itself {
        bail!("a part of the operator ended by itself");
    }
    Ok(())
}

/// Builds and starts the parts.
pub async fn start(
    args: &RunArgs,
    mut kube_config: kube::Config,
    timings: Timings,
    stop: &CancellationToken,
) -> anyhow::Result<JoinSet<anyhow::Result<()>>> {
    let clock = Clock::scaled(args.clock_origin_unix_ms, args.clock_factor);
    // Who wrote what is seen in the API server's audit log.
    let agent = HeaderValue::from_static(concat!("gemini-batch-operator/", env!("CARGO_PKG_VERSION")));
    kube_config.headers.push((USER_AGENT, agent));
    let namespace = args.namespace.clone().unwrap_or_else(|| kube_config.default_namespace.clone());
    args.check()?;
    let external_url = args.callback_base().cloned();
    let mut registry = Registry::default();
    let mut ready: Vec<admin::ReadyCheck> = Vec::new();
    let mut parts: JoinSet<anyhow::Result<()>> = JoinSet::new();

    if args.role.has_controller() {
        let client = Client::try_from(kube_config.clone())?;
        let place = ring::Place {
            namespace: namespace.clone(),
            secret: args.key_ring_secret.clone(),
            cluster_id: args.cluster_id.clone(),
            watch_namespaces: args.watch_namespaces(),
            recreate: args.recreate_key_ring,
        };
        let key_ring = ring::ensure(&client, &place, clock.now()).await?;
        let reporter = Reporter { controller: "gemini-batch-operator".to_owned(), instance: None };
        let lease = lease_config(args, &namespace);
        let leads = Gauge::default();
        let ours = registry.sub_registry_with_prefix("gemini_batch");
        ours.register("leader", "1 while this controller leads, 0 while it waits", leads.clone());
        let metrics = Metrics::register(ours);
        metrics.register_common(&mut registry);
        // Renewals that are tried again behind our back for minutes would be worse than none.
        let impatient = receiver::hint::kube_client(kube_config.clone())?;
        let elector = Elector::new(impatient, lease, clock, leads);
        let stores = Stores::new(store_settings(args, timings.stores))?;
        let ctx = Arc::new(controller::Context::new(
            client.clone(),
            gemini_client(args, clock)?,
            key_ring,
            external_url.clone(),
            clock,
            Timings { sweep: SignedDuration::from_secs(i64::from(args.sweep_seconds())), ..timings },
            args.max_input_bytes,
            args.concurrency,
            args.max_active_batches,
            Recorder::new(client, reporter),
            args.watch_namespaces(),
            metrics,
            elector.leadership(),
            policy(args, &namespace),
            stores,
            args.transfers,
        ));
        let check = Arc::clone(&ctx);
        ready.push(Box::new(move || check.ready()));
        let stop = stop.clone();
        parts.spawn(async move {
            elector.run(stop, |turn| controller::run(Arc::clone(&ctx), place.clone(), turn)).await;
            Ok(())
        });
    }

    // Without callbacks there is nothing to receive, and no port that the internet could reach.
    if external_url.is_none() {
        tracing::info!(
            seconds = args.sweep_seconds(),
            "callbacks are off: Gemini is asked for the batches of each API key"
        );
    }
    if let Some(external_url) = external_url.filter(|_| args.role.has_receiver()) {
        let upstreams = Upstreams {
            jwks_url: args.jwks_url(),
            allow_insecure: args.allow_insecure_upstream,
            ring_namespace: namespace,
            ring_name: args.key_ring_secret.clone(),
        };
        let receiver = Arc::new(Receiver::in_cluster(
            receiver_config(args, external_url)?,
            upstreams,
            kube_config,
            Arc::new(move || clock.now()),
            registry.sub_registry_with_prefix("gemini_batch"),
        )?);
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("the receiver can't listen on {}", args.listen))?;
        tracing::info!(address = %listener.local_addr()?, "receiving callbacks");
        let check = Arc::clone(&receiver);
        ready.push(Box::new(move || check.ready()));
        let stop = stop.clone();
        parts.spawn(async move {
            receiver.run(listener, stop).await;
            Ok(())
        });
    }

    let listener = TcpListener::bind(args.admin_listen)
        .await
        .with_context(|| format!("health and metrics can't be served on {}", args.admin_listen))?;
    let stop = stop.clone();
    parts.spawn(async move { Ok(admin::serve(listener, Admin { ready, registry }, stop).await?) });
    Ok(parts)
}

fn policy(args: &RunArgs, namespace: &str) -> Policy {
    if args.default_credential_secret.is_some() && args.default_credential_namespaces().is_empty() {
        tracing::warn!(
            "--default-credential-secret names an API key that no namespace may use: list those that may with \
             --default-credential-namespaces, or * for all"
        );
    }
    Policy {
        pause_submissions: args.pause_submissions,
        default_credential: args.default_credential_secret.as_ref().map(|secret| DefaultCredential {
            namespace: namespace.to_owned(),
            secret: secret.clone(),
            key: args.default_credential_key.clone(),
            namespaces: args.default_credential_namespaces(),
        }),
        home: ObjectReference {
            api_version: Some("coordination.k8s.io/v1".to_owned()),
            kind: Some("Lease".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(args.lease_name.clone()),
            ..ObjectReference::default()
        },
    }
}

fn store_settings(args: &RunArgs, timeouts: store::Timeouts) -> store::Settings {
    store::Settings {
        endpoints: args.object_store_endpoints.clone(),
        own_identity: args.own_identity_namespaces(),
        mapped: args.mapped_directories.iter().cloned().collect(),
        timeouts,
    }
}

fn lease_config(args: &RunArgs, namespace: &str) -> lease::Config {
    let seconds = |n: u32| Duration::from_secs(u64::from(n));
    let host = || std::env::var("HOSTNAME").unwrap_or_else(|_| "gemini-batch-operator".to_owned());
    lease::Config {
        namespace: namespace.to_owned(),
        name: args.lease_name.clone(),
        // A pod that is started anew is not the one that held the lease before.
        identity: args.lease_identity.clone().unwrap_or_else(|| format!("{}_{}", host(), new_send_id())),
        duration: seconds(args.lease_seconds),
        renew_deadline: seconds(args.lease_renew_deadline_seconds),
        retry: seconds(args.lease_retry_seconds),
    }
}

fn receiver_config(args: &RunArgs, external_url: Url) -> anyhow::Result<receiver::Config> {
    let seconds = |n: u32| SignedDuration::from_secs(i64::from(n));
    let tls = match (&args.tls_cert_file, &args.tls_key_file) {
        (Some(certificate), Some(key)) => Some(Tls::load(certificate.clone(), key.clone())?),
        _ => None, // clap wants both or none
    };
    let config = receiver::Config::new(external_url);
    let wanted = config.limits.connections;
    let limits = config.limits.within(open_files_limit());
    if limits.connections < wanted {
        tracing::warn!(
            connections = limits.connections,
            wanted,
            "fewer connections than wanted: the limit of open files (ulimit -n) is low"
        );
    }
    Ok(receiver::Config {
        limits,
        schemes: args.callback_schemes.clone(),
        audience: (!args.callback_audience.is_empty()).then(|| args.callback_audience.clone()),
        past: seconds(args.callback_max_age_seconds),
        future: seconds(args.callback_max_skew_seconds),
        tls: tls.map(Arc::new),
        external_url: config.external_url,
    })
}

/// Adds a key to the ring.
pub async fn rotate_keys(args: &RotateKeysArgs) -> anyhow::Result<String> {
    let config = kube_config().await?;
    let namespace = args.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config)?;
    let now = Clock::system().now();
    let id = ring::rotate(&client, &namespace, &args.key_ring_secret, now).await?;
    Ok(format!(
        "added key {id} to Secret {} of namespace {namespace}. It verifies as soon as a receiver has read it, and signs \
         new callback URLs in {} minutes. Older keys go on verifying until {} hours after the last job that used them",
        args.key_ring_secret,
        keyring::PROPAGATION.as_mins(),
        keyring::AFTERLIFE.as_hours(),
    ))
}

async fn kube_config() -> anyhow::Result<kube::Config> {
    kube::Config::infer().await.context("no Kubernetes to talk to: run in a cluster, or set KUBECONFIG")
}

fn gemini_client(args: &RunArgs, clock: Clock) -> anyhow::Result<gemini::Client> {
    // On the same clock as the grace and the lease, which it has to fit in with.
    let create_timeout = clock.real_of(Duration::from_secs(u64::from(args.create_timeout_seconds)));
    let config = gemini::ClientConfig {
        api_version: args.gemini_api_version.clone(),
        allow_insecure: args.allow_insecure_upstream,
        create_timeout,
        ..gemini::ClientConfig::new(args.gemini_base_url.clone())
    };
    Ok(gemini::Client::new(config)?)
}
