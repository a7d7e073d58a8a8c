//! The simulator as a process: for demos, for tests of whole processes, for SDKs in other languages.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use gemini_simulator::{Clock, Config, Simulator, Switches};
use tokio::signal::unix::{SignalKind, signal};

/// Simulates the Gemini API as far as it is known: files, batches, webhooks. Controls are under /_sim/.
#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:8787")]
    listen: SocketAddr,
    /// How much faster than Google it works
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    speed: f64,
    /// Seconds that a batch waits, before --speed
    #[arg(long, default_value_t = 10.0)]
    pending_seconds: f64,
    /// Seconds that a batch runs, before --speed
    #[arg(long, default_value_t = 50.0)]
    running_seconds: f64,
    /// Share of requests that fail, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    fail_rate: f64,
    /// An API key to accept; may be repeated. Without any, every key is accepted
    #[arg(long = "api-key")]
    api_keys: Vec<String>,
    /// Batches of one project that may be active at once
    #[arg(long, default_value_t = 100)]
    max_active: usize,
    /// Changes a switch, as PUT /_sim/switches names them, to a JSON value; may be repeated
    #[arg(long = "switch", value_name = "NAME=VALUE", value_parser = switch)]
    switches: Vec<(String, serde_json::Value)>,
    /// A file that the address is written to once it listens
    #[arg(long)]
    port_file: Option<PathBuf>,
    /// The moment (Unix milliseconds) from which on the clock runs faster
    #[arg(long, default_value_t = 0)]
    clock_origin_unix_ms: i64,
    /// How many times faster the clock on the wire runs
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    clock_factor: f64,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if n.is_finite() && n > 0.0 => Ok(n),
        _ => Err("must be a number above 0".to_owned()),
    }
}

fn switch(text: &str) -> Result<(String, serde_json::Value), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    Ok((name.to_owned(), serde_json::from_str(value).map_err(|e| e.to_string())?))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let keys = (!args.api_keys.is_empty())
        .then(|| args.api_keys.iter().map(|k| (k.clone(), "project".to_owned())).collect());
    let mut switches = Switches::default();
    switches.change(args.switches.into_iter().collect()).map_err(anyhow::Error::msg).context("--switch")?;
    let simulator = Simulator::start(Config {
        listen: args.listen,
        speed: args.speed,
        clock: Clock::scaled(args.clock_origin_unix_ms, args.clock_factor),
        keys,
        max_active: args.max_active,
        pending: Duration::try_from_secs_f64(args.pending_seconds).context("--pending-seconds")?,
        running: Duration::try_from_secs_f64(args.running_seconds).context("--running-seconds")?,
        fail_rate: args.fail_rate,
        switches,
    })
    .await
    .with_context(|| format!("can't listen on {}", args.listen))?;
    if let Some(path) = &args.port_file {
        std::fs::write(path, simulator.address().to_string())
            .with_context(|| format!("can't write {}", path.display()))?;
    }
    writeln!(std::io::stderr(), "listening on {}", simulator.base_url())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
