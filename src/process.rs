//! Builds the parts of `run` and keeps them until a signal.
//!
//! SIGTERM and SIGINT stop everything in order and end with success. A part that ends by itself, or panics,
//! ends the process with an error: a half-dead operator must not look alive.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use http::HeaderValue;
use http::header::USER_AGENT;
use jiff::SignedDuration;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Admin};
use crate::clock::Clock;
use crate::config::RunArgs;
use crate::controller::{Timings, ring, run as controller};
use crate::gemini;
use crate::receiver::{self, Receiver, Upstreams};

/// Runs the parts that the role asks for until SIGTERM or SIGINT.
pub async fn run(args: &RunArgs) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let kube_config = kube::Config::infer()
        .await
        .context("no Kubernetes to talk to: run in a cluster, or set KUBECONFIG")?;
    let mut parts = start(args, kube_config, Timings::default(), &stop).await?;

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
    let Some(external_url) = args.external_url.clone() else {
        bail!(crate::config::ConfigError::NoExternalUrl)
    };
    let mut registry = Registry::with_prefix("gemini_batch");
    let mut ready: Vec<admin::ReadyCheck> = Vec::new();
    let mut parts: JoinSet<anyhow::Result<()>> = JoinSet::new();

    if args.role.has_controller() {
        let client = Client::try_from(kube_config.clone())?;
        let ring =
            ring::ensure(&client, &namespace, &args.key_ring_secret, args.cluster_id.as_deref(), clock.now())
                .await?;
        let reporter = Reporter { controller: "gemini-batch-operator".to_owned(), instance: None };
        let ctx = Arc::new(controller::Context::new(
            client.clone(),
            gemini_client(args)?,
            ring,
            Some(external_url.clone()),
            clock,
            Timings { sweep: SignedDuration::from_secs(i64::from(args.sweep_seconds)), ..timings },
            args.max_input_bytes,
            args.concurrency,
            Recorder::new(client, reporter),
            args.watch_namespace.clone(),
        ));
        let (namespace, secret) = (namespace.clone(), args.key_ring_secret.clone());
        let stop = stop.clone();
        parts.spawn(async move {
            let keep = ring::keep_current(Arc::clone(&ctx), namespace, secret, stop.clone());
            tokio::join!(keep, controller::run(Arc::clone(&ctx), stop.clone()));
            Ok(())
        });
    }

    if args.role.has_receiver() {
        let upstreams = Upstreams {
            jwks_url: args.jwks_url(),
            allow_insecure: args.allow_insecure_upstream,
            ring_namespace: namespace,
            ring_name: args.key_ring_secret.clone(),
        };
        let receiver = Arc::new(Receiver::in_cluster(
            receiver::Config::new(external_url),
            upstreams,
            kube_config,
            Arc::new(move || clock.now()),
            &mut registry,
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

fn gemini_client(args: &RunArgs) -> anyhow::Result<gemini::Client> {
    let config = gemini::ClientConfig {
        base_url: args.gemini_base_url.clone(),
        api_version: args.gemini_api_version.clone(),
        allow_insecure: args.allow_insecure_upstream,
        ..gemini::ClientConfig::default()
    };
    Ok(gemini::Client::new(config)?)
}
