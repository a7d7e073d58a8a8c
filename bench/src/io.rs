//! `make bench-io`: a job of a gigabyte, whose requests come from an S3 server and whose results go back to it.
//!
//! Its speed is told as a share of a plain copy through the same server, which is made with the same client right before
//! and after. What is not a matter of time is a hard limit: memory, and that results are in input order, each once, with
//! the hash that the status names, also if the operator is killed three times on the way.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use aws_lc_rs::digest;
use gemini_batch_operator::api::GeminiBatchJob;
use gemini_batch_operator::api::crd::crd;
use gemini_batch_operator::store::{self, Access, Location, Purpose, SecretData, Settings, Store, Stores};
use kube::api::{Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::conditions::is_crd_established;
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::machine;
use crate::numbers::mib;
use crate::parts::{ControlPlane, Operator, Part, Simulator, free_address};
use crate::say;
use crate::table::Table;

/// What the run needs, and how large it is.
#[derive(clap::Args)]
pub struct Args {
    /// The control plane's binary.
    #[arg(long)]
    devcluster: PathBuf,
    /// The operator's binary, a release build.
    #[arg(long)]
    operator: PathBuf,
    /// The simulator's binary.
    #[arg(long)]
    simulator: PathBuf,
    /// The S3 server's binary, versitygw.
    #[arg(long)]
    store: PathBuf,
    /// Size of the input, in millions of bytes. The results are about as large.
    #[arg(long, default_value_t = 1000)]
    megabytes: usize,
    /// Requests in it.
    #[arg(long, default_value_t = 500_000)]
    requests: usize,
    /// Requests of another job, which are as short as they can be: what matters there are its keys.
    #[arg(long, default_value_t = 1_000_000)]
    keys: usize,
}

const BUCKET: &str = "bench";
const ACCESS_KEY: &str = "AKIABENCH";
const SECRET_KEY: &str = "bench-secret-key";
const NAMESPACE: &str = "default";

/// The whole run ends by then, one way or the other.
const DEADLINE: Duration = Duration::from_mins(60);
/// A job ends by then, kills included.
const JOB_DEADLINE: Duration = Duration::from_mins(20);
const STEP: Duration = Duration::from_millis(50);
const SHARE: f64 = 0.5;
const RSS_KIB: u64 = 64 * 1024;
/// A line that is nothing but its key and an empty prompt.
const SHORTEST: usize = 60;

/// Measures. Returns the hard statements that do not hold.
pub fn measure(args: &Args) -> anyhow::Result<Vec<String>> {
    if cfg!(debug_assertions) {
        bail!("measuring a debug build says nothing: use 'make bench-io'");
    }
    ensure!(args.requests > 0 && args.keys > 0, "there must be requests");
    ensure!(
        args.megabytes * 1_000_000 / args.requests > 200,
        "the lines would be too short: fewer requests, or more bytes"
    );
    machine::allow_open_files(4096)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let dir = std::env::temp_dir().join(format!("gbo-bench-io-{}", std::process::id()));
        std::fs::create_dir(&dir)?;
        let result = tokio::select! {
            result = tokio::time::timeout(DEADLINE, run(args, &dir)) => result.context("the run took too long")?,
            _ = terminate.recv() => bail!("stopped"),
            _ = interrupt.recv() => bail!("stopped"),
        };
        // The data is large, the logs are what helps.
        let _ = std::fs::remove_dir_all(dir.join("data"));
        let result = result.with_context(|| format!("logs are in {}", dir.display()))?;
        std::fs::remove_dir_all(&dir)?;
        Ok(result)
    })
}

/// Everything that is measured with.
struct Bench<'a> {
    args: &'a Args,
    dir: &'a Path,
    client: Client,
    control_plane: ControlPlane,
    simulator: Simulator,
    store: Store,
    endpoint: String,
    table: Table,
}

async fn run(args: &Args, dir: &Path) -> anyhow::Result<Vec<String>> {
    say("starting S3 server, control plane and simulator");
    let (server, endpoint) = s3_server(&args.store, dir).await?;
    let store = open(&endpoint)?;
    let control_plane = ControlPlane::start(&args.devcluster, dir).await?;
    let file = Kubeconfig::read_from(&control_plane.kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let crds = Api::all(client.clone());
    let name = crd().name_any();
    crds.patch(&name, &PatchParams::apply("bench").force(), &Patch::Apply(&crd())).await?;
    await_condition(crds, &name, is_crd_established()).await?;
    secrets(&client).await?;
    let simulator = Simulator::start(&args.simulator, 1, None, dir).await?;
    let table = Table::default();
    let mut bench = Bench { args, dir, client, control_plane, simulator, store, endpoint, table };

    let line = args.megabytes * 1_000_000 / args.requests;
    bench.write_input("large.jsonl", args.requests, line).await?;
    bench.write_input("keys.jsonl", args.keys, SHORTEST).await?;

    let before = bench.copy("large.jsonl").await?;
    let clean = bench.undisturbed().await?;
    let after = bench.copy("large.jsonl").await?;
    bench.tell(&clean, before.midpoint(after));
    bench.killed(&clean).await?;
    bench.many_keys().await?;

    say("");
    bench.table.print();
    bench.simulator.stop().await?;
    bench.control_plane.stop().await?;
    server.kill().await?;
    Ok(bench.table.broken)
}

async fn s3_server(binary: &Path, dir: &Path) -> anyhow::Result<(Part, String)> {
    let at = free_address()?;
    for sub in [format!("data/{BUCKET}"), "meta".to_owned()] {
        std::fs::create_dir_all(dir.join(sub))?;
    }
    let mut command = Command::new(binary);
    command.args(["--quiet", "--port", &at.to_string(), "--access", ACCESS_KEY, "--secret", SECRET_KEY]);
    command.args(["posix", "--sidecar"]).arg(dir.join("meta")).arg(dir.join("data"));
    command.current_dir(dir).stdout(Stdio::null());
    let mut server = Part::start("s3", &mut command, dir)?;
    let start = Instant::now();
    while tokio::net::TcpStream::connect(at).await.is_err() {
        server.check()?;
        ensure!(start.elapsed() < Duration::from_mins(1), "the S3 server does not come up");
        tokio::time::sleep(STEP).await;
    }
    Ok((server, format!("http://{at}")))
}

fn open(endpoint: &str) -> anyhow::Result<Store> {
    let settings = Settings { endpoints: endpoint.parse()?, ..Settings::default() };
    let secret: SecretData = [("accessKeyId", ACCESS_KEY), ("secretAccessKey", SECRET_KEY)]
        .map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()))
        .into();
    let access = Access {
        purpose: Purpose::Write,
        namespace: NAMESPACE,
        field: "bench",
        endpoint: Some(endpoint),
        region: None,
        secret: Some(("store", &secret)),
    };
    let at = Location::directory(&format!("s3://{BUCKET}/any"), "bench")?;
    Ok(Stores::new(settings)?.open(&at, &access)?)
}

async fn secrets(client: &Client) -> anyhow::Result<()> {
    let all: Api<k8s_openapi::api::core::v1::Secret> = Api::namespaced(client.clone(), NAMESPACE);
    for body in [
        json!({"metadata": {"name": "gemini"}, "stringData": {"apiKey": "bench"}}),
        json!({"metadata": {"name": "store"},
            "stringData": {"accessKeyId": ACCESS_KEY, "secretAccessKey": SECRET_KEY}}),
    ] {
        all.create(&PostParams::default(), &serde_json::from_value(body)?).await?;
    }
    Ok(())
}

fn key(number: usize) -> String {
    format!("k{number:07}")
}

/// A request whose line has so many bytes, and whose answer is as long as its prompt.
fn line(number: usize, bytes: usize) -> String {
    let key = key(number);
    let mut line = format!(r#"{{"key":"{key}","request":{{"contents":[{{"parts":[{{"text":"{key}"#);
    const END: &str = "\"}]}]}}\n";
    if let Some(room) = bytes.checked_sub(line.len() + END.len()).filter(|room| *room > 32) {
        let _ = write!(line, " [[sim:big={room}]] "); // writing to a String cannot fail
        let filler = "Why do the stars twinkle, and what would they think of us? ";
        while line.len() + END.len() < bytes {
            let rest = bytes - line.len() - END.len();
            line.push_str(&filler[..rest.min(filler.len())]);
        }
    }
    line.push_str(END);
    line
}

/// What a job took.
struct Took {
    /// From the job to the batch: the input is read, checked, and sent.
    input: Duration,
    /// From the end of the batch to the end of the job: results are read, joined and written.
    output: Duration,
    /// Of the input and of the results.
    bytes: [f64; 2],
    /// Memory of the operator before the job, and the most of it, in KiB.
    idle: u64,
    peak: u64,
    /// SHA-256 of the results.
    sha256: String,
    batch: String,
}

/// Bytes in millions.
fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

impl Bench<'_> {
    async fn write_input(&self, name: &str, requests: usize, bytes: usize) -> anyhow::Result<()> {
        let mut writer = self.store.write(&name.into());
        for number in 0..requests {
            writer.write(line(number, bytes).as_bytes()).await?;
        }
        let size = writer.finish().await?;
        say(&format!("{name}: {requests} requests, {:.0} MB", mega(size)));
        Ok(())
    }

    /// Reads an object and writes another one, with nothing in between. MB/s.
    async fn copy(&self, name: &str) -> anyhow::Result<f64> {
        let object = self.store.head(&name.into()).await?;
        let start = Instant::now();
        let mut reader = self.store.read(&object);
        let mut writer = self.store.write(&"copy".into());
        while let Some(bytes) = reader.next().await? {
            writer.write(&bytes).await?;
        }
        writer.finish().await?;
        let speed = mega(object.size) / start.elapsed().as_secs_f64();
        self.store.delete(&"copy".into()).await?;
        say(&format!("a plain copy: {speed:.1} MB/s"));
        Ok(speed)
    }

    async fn operator(&self) -> anyhow::Result<Operator> {
        let temporary = self.dir.join("data/tmp");
        std::fs::create_dir_all(&temporary)?;
        let more = [format!("--object-store-endpoints={}", self.endpoint)];
        Operator::start(&self.args.operator, &self.control_plane, &self.simulator, None, &more, self.dir)
            .await
    }

    fn jobs(&self) -> Api<GeminiBatchJob> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn create(&self, name: &str, input: &str) -> anyhow::Result<()> {
        let at =
            |uri: String| json!({"uri": uri, "credentialsRef": {"name": "store"}, "endpoint": self.endpoint});
        let job = json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob", "metadata": {"name": name},
            "spec": {
                "model": "gemini-2.5-flash",
                "credentials": {"secretRef": {"name": "gemini"}},
                "input": {"objectStore": at(format!("s3://{BUCKET}/{input}"))},
                "output": {"objectStore": at(format!("s3://{BUCKET}/{name}"))},
            },
        });
        self.jobs().create(&PostParams::default(), &serde_json::from_value(job)?).await?;
        Ok(())
    }

    /// The job's status. Fails if it will not end well.
    async fn status(&self, name: &str) -> anyhow::Result<Value> {
        let job = self.jobs().get(name).await?;
        let status = serde_json::to_value(&job.status)?;
        let state = status["state"].as_str().unwrap_or_default();
        ensure!(!["Failed", "Cancelled"].contains(&state), "{name} is {state}: {status}");
        Ok(status)
    }

    /// Looks at the job until `done`, for so long at most.
    async fn until(&self, name: &str, what: &str, done: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let start = Instant::now();
        loop {
            let status = self.status(name).await?;
            if done(&status) {
                return Ok(status);
            }
            ensure!(start.elapsed() < JOB_DEADLINE, "{name} was not {what} in time: {status}");
            tokio::time::sleep(STEP).await;
        }
    }

    /// Runs a job with nothing in its way. Its operator ends with it.
    async fn job(&self, name: &str, input: &str, requests: usize) -> anyhow::Result<Took> {
        let operator = self.operator().await?;
        let idle = operator.usage()?.rss;
        let start = Instant::now();
        self.create(name, input).await?;
        self.until(name, "submitted", submitted).await?;
        let sent = start.elapsed();
        self.until(name, "told the end of its batch", |s| !s["callback"].is_null()).await?;
        let ended = Instant::now();
        let status = self.until(name, "complete", |s| s["state"] == "Succeeded").await?;
        let output = ended.elapsed();
        let peak = operator.usage()?.peak;
        operator.stop().await?;
        let size = self.store.head(&input.into()).await?.size;
        let (sha256, results) = self.verify(name, &status, requests).await?;
        Ok(Took {
            input: sent,
            output,
            bytes: [mega(size), mega(results)],
            idle,
            peak,
            sha256,
            batch: batch(&status),
        })
    }

    /// Whether the results are in input order, each once, and have the hash that the status names.
    async fn verify(&self, name: &str, status: &Value, requests: usize) -> anyhow::Result<(String, u64)> {
        let objects =
            status["output"]["objectStore"]["objects"].as_array().context("no objects in the status")?;
        let named =
            |suffix: &str| objects.iter().find(|o| o["name"].as_str().is_some_and(|n| n.ends_with(suffix)));
        let results = named("results.jsonl").with_context(|| format!("no results: {status}"))?;
        let path = format!("{name}/{}", results["name"].as_str().unwrap_or_default());
        let object = self.store.head(&path.as_str().into()).await?;
        let mut reader = self.store.read(&object);
        let (mut hash, mut rest, mut number) = (digest::Context::new(&digest::SHA256), Vec::new(), 0);
        while let Some(bytes) = reader.next().await? {
            hash.update(&bytes);
            rest.extend_from_slice(&bytes);
            let mut from = 0;
            while let Some(end) = rest[from..].iter().position(|b| *b == b'\n') {
                let wanted = format!(r#"{{"key":"{}","response":"#, key(number));
                ensure!(
                    rest[from..].starts_with(wanted.as_bytes()),
                    "{path}: line {} is not the answer to {}",
                    number + 1,
                    key(number)
                );
                number += 1;
                from += end + 1;
            }
            rest.drain(..from);
        }
        ensure!(
            number == requests && rest.is_empty(),
            "{path}: {number} whole lines for {requests} requests"
        );
        let sha256 = hash.finish().as_ref().iter().fold(String::new(), |mut all, byte| {
            let _ = write!(all, "{byte:02x}"); // writing to a String cannot fail
            all
        });
        ensure!(results["sha256"] == sha256.as_str(), "{path} has another hash than the status says");
        ensure!(
            results["lines"] == requests,
            "{path} has {requests} lines, the status says {}",
            results["lines"]
        );
        Ok((sha256, object.size))
    }

    async fn undisturbed(&self) -> anyhow::Result<Took> {
        let took = self.job("undisturbed", "large.jsonl", self.args.requests).await?;
        say(&format!(
            "a job: {:.1} s from its creation to the batch, {:.1} s from the callback to Complete; results of {:.0} MB",
            took.input.as_secs_f64(),
            took.output.as_secs_f64(),
            took.bytes[1]
        ));
        Ok(took)
    }

    fn tell(&mut self, took: &Took, copy: f64) {
        let speeds = [took.bytes[0] / took.input.as_secs_f64(), took.bytes[1] / took.output.as_secs_f64()];
        for (what, speed) in
            [("input: read twice, checked, sent", speeds[0]), ("results: read, joined, written", speeds[1])]
        {
            self.table.timed(
                what,
                ">= 50 % of a plain copy",
                format!("{speed:.1} MB/s, {:.0} % of {copy:.1}", speed / copy * 100.0),
                speed >= copy * SHARE,
            );
        }
        self.memory(&format!("memory, {:.0} MB in and {:.0} MB out", took.bytes[0], took.bytes[1]), took);
    }

    fn memory(&mut self, what: &str, took: &Took) {
        self.table.hard(
            what,
            "<= 64 MiB above idle",
            format!("{:.1} MiB, idle {:.1}", mib(took.peak), mib(took.idle)),
            took.peak.saturating_sub(took.idle) <= RSS_KIB,
        );
    }

    /// The same job, with the operator killed while the input is on its way, while results are read, and while they are
    /// written or soon before or after.
    async fn killed(&mut self, clean: &Took) -> anyhow::Result<()> {
        let name = "killed";
        let operator = self.operator().await?;
        self.create(name, "large.jsonl").await?;
        tokio::time::sleep(clean.input.mul_f64(0.75)).await;
        let early = !submitted(&self.status(name).await?);
        operator.kill().await?;
        let operator = self.operator().await?;
        self.until(name, "told the end of its batch", |s| !s["callback"].is_null()).await?;
        tokio::time::sleep(clean.output.mul_f64(0.3)).await;
        operator.kill().await?;
        let operator = self.operator().await?;
        tokio::time::sleep(clean.output.mul_f64(0.8)).await;
        let late = self.status(name).await?["state"] != "Succeeded";
        operator.kill().await?;
        let operator = self.operator().await?;
        let status = self.until(name, "complete", |s| s["state"] == "Succeeded").await?;
        operator.stop().await?;
        let (sha256, _) = self.verify(name, &status, self.args.requests).await?;
        self.table.hard(
            "killed three times: results",
            "the same",
            if sha256 == clean.sha256 { "the same" } else { "others" }.to_owned(),
            sha256 == clean.sha256,
        );
        let creates = self.creates().await?;
        let paid = creates.iter().filter(|name| ![&clean.batch].contains(name)).count();
        self.table.hard("killed three times: batches", "1", paid.to_string(), paid == 1);
        let hit = u8::from(early) + 1 + u8::from(late);
        self.table.hard("killed three times: kills that hit", "3", hit.to_string(), hit == 3);
        Ok(())
    }

    /// The batches that Gemini was asked for.
    async fn creates(&self) -> anyhow::Result<Vec<String>> {
        let log = self.simulator.get("batches").await?;
        let batches = log.as_array().or(log["batches"].as_array()).context("no batches")?;
        Ok(batches.iter().filter_map(|b| b["name"].as_str()).map(ToOwned::to_owned).collect())
    }

    async fn many_keys(&mut self) -> anyhow::Result<()> {
        let took = self.job("keys", "keys.jsonl", self.args.keys).await?;
        say(&format!(
            "{} keys: {:.1} s from the job's creation to the batch, {:.1} s from the callback to Complete",
            self.args.keys,
            took.input.as_secs_f64(),
            took.output.as_secs_f64()
        ));
        self.memory(&format!("memory, {} keys joined", self.args.keys), &took);
        Ok(())
    }
}

fn submitted(status: &Value) -> bool {
    status["attempts"].as_array().is_some_and(|all| all.iter().any(|a| !a["batchName"].is_null()))
}

fn batch(status: &Value) -> String {
    let attempts = status["attempts"].as_array();
    attempts.and_then(|all| all[0]["batchName"].as_str()).unwrap_or_default().to_owned()
}
