//! `make bench-io`: a job of a gigabyte, whose requests come from an S3 server and whose results go back to it.
//!
//! Its speed is told as a share of that of a plain copy: a program that reads the same object from the same server and
//! writes it to another one there, and looks at nothing, with the same client (requests that are signed, parts of 5 MiB,
//! two on their way) on the same cores. It is made in the midst of each job, when its input has been sent and its batch
//! runs, so that both find the same machine: other work on it, and whether its memory is fresh, makes a difference of
//! several times. The median of the rounds counts. What is not a matter of time is a hard limit: memory, one batch, and
//! that results are in input order, each once, with the hash that the status names, also if the operator is killed three
//! times on the way.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use aws_lc_rs::digest;
use gemini_batch_operator::api::GeminiBatchJob;
use gemini_batch_operator::api::crd::crd;
use gemini_batch_operator::store::{Access, Location, Purpose, SecretData, Settings, Store, Stores};
use jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::conditions::is_crd_established;
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::machine::{self, Usage};
use crate::numbers::{median, mib};
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
    /// How many such jobs, with a copy in each.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

const BUCKET: &str = "bench";
const ACCESS_KEY: &str = "AKIABENCH";
const SECRET_KEY: &str = "bench-secret-key";
const NAMESPACE: &str = "default";
const LARGE: &str = "large.jsonl";
const KEYS: &str = "keys.jsonl";
const COPY: &str = "copy";

/// The whole run ends by then, one way or the other.
const DEADLINE: Duration = Duration::from_hours(1);
/// A job ends by then, kills included.
const JOB_DEADLINE: Duration = Duration::from_mins(20);
const STEP: Duration = Duration::from_millis(50);
const SHARE: f64 = 0.5;
const RSS_KIB: u64 = 64 * 1024;
/// Less than a line takes that says nothing but its key.
const SHORTEST: usize = 0;

/// Measures. Returns the hard statements that do not hold.
pub fn measure(args: &Args) -> anyhow::Result<Vec<String>> {
    if cfg!(debug_assertions) {
        bail!("measuring a debug build says nothing: use 'make bench-io'");
    }
    ensure!(args.requests > 0 && args.keys > 0 && args.rounds > 0, "there must be requests, keys and rounds");
    let line = args.megabytes * 1_000_000 / args.requests;
    ensure!(line > 200, "the lines would be too short: fewer requests, or more bytes");
    machine::allow_open_files(4096)?;
    // With a thread for each core, as the operator has them: copies may use them all as well.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let dir = std::env::temp_dir().join(format!("gbo-bench-io-{}", std::process::id()));
        std::fs::create_dir(&dir)?;
        let result = with_control_plane(args, &dir).await;
        // The data is large, the logs are what helps.
        let _ = std::fs::remove_dir_all(dir.join("data"));
        let result = result.with_context(|| format!("logs are in {}", dir.display()))?;
        std::fs::remove_dir_all(&dir)?;
        Ok(result)
    })
}

/// Runs all of it, and ends the control plane in order, whatever becomes of the rest: it has children of its own.
async fn with_control_plane(args: &Args, dir: &Path) -> anyhow::Result<Vec<String>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    say("starting S3 server and control plane");
    let control_plane = ControlPlane::start(&args.devcluster, dir).await?;
    let result = tokio::select! {
        result = tokio::time::timeout(DEADLINE, run(args, dir, &control_plane)) => match result {
            Ok(result) => result,
            Err(_) => Err(anyhow!("the run took more than {} minutes", DEADLINE.as_secs() / 60)),
        },
        _ = terminate.recv() => Err(anyhow!("stopped")),
        _ = interrupt.recv() => Err(anyhow!("stopped")),
    };
    let stopped = control_plane.stop().await;
    let result = result?;
    stopped?;
    Ok(result)
}

/// Everything that is measured with.
struct Bench<'a> {
    args: &'a Args,
    dir: &'a Path,
    client: Client,
    control_plane: &'a ControlPlane,
    server: Part,
    store: Store,
    endpoint: String,
    table: Table,
}

async fn run(args: &Args, dir: &Path, control_plane: &ControlPlane) -> anyhow::Result<Vec<String>> {
    let (server, endpoint) = s3_server(&args.store, dir).await?;
    let store = open(&endpoint)?;
    let file = Kubeconfig::read_from(&control_plane.kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let crds = Api::all(client.clone());
    let name = crd().name_any();
    crds.patch(&name, &PatchParams::apply("bench").force(), &Patch::Apply(&crd())).await?;
    await_condition(crds, &name, is_crd_established()).await?;
    secrets(&client).await?;
    let table = Table::default();
    let mut bench = Bench { args, dir, client, control_plane, server, store, endpoint, table };

    bench.write_input(LARGE, args.requests, args.megabytes * 1_000_000 / args.requests).await?;
    bench.write_input(KEYS, args.keys, SHORTEST).await?;
    let clean = bench.rounds().await?;
    bench.killed(&clean).await?;
    bench.many_keys().await?;
    say("");
    bench.table.print();
    bench.server.kill().await?;
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

/// A request whose line has so many bytes, and whose answer is as long as its prompt. The first one has all answers come
/// in any order.
fn line(number: usize, bytes: usize) -> String {
    const END: &str = "\"}]}]}}\n";
    let key = key(number);
    let mut line = format!(r#"{{"key":"{key}","request":{{"contents":[{{"parts":[{{"text":"{key}"#);
    if number == 0 {
        line.push_str(" [[sim:shuffle]]");
    }
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

/// What a plain copy took.
#[derive(Clone, Copy)]
struct Copied {
    took: Duration,
    /// Processor time of both sides.
    cpu: Duration,
}

/// What a job took.
struct Took {
    /// From the job to the last byte at Gemini: the input is read, checked, read again and sent.
    input: Duration,
    /// From the callback to the end of the job: the results are read, joined and written, the input is read for its keys.
    output: Duration,
    /// Processor time of operator and S3 server.
    cpu: Duration,
    /// Of the input and of the results.
    bytes: [u64; 2],
    /// Memory of the operator before the job, and the most of it, in KiB.
    idle: u64,
    peak: u64,
    /// SHA-256 of the results.
    sha256: String,
    /// The copy that was made in its midst.
    copied: Copied,
}

impl Took {
    fn both(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

/// Bytes in millions.
fn mega(bytes: u64) -> f64 {
    // exact up to 2^53
    Duration::from_micros(bytes).as_secs_f64()
}

fn speed(bytes: u64, took: Duration) -> f64 {
    mega(bytes) / took.as_secs_f64()
}

impl Bench<'_> {
    async fn write_input(&self, name: &str, requests: usize, bytes: usize) -> anyhow::Result<()> {
        let path = name.into();
        let mut writer = self.store.write(&path);
        for number in 0..requests {
            writer.write(line(number, bytes).as_bytes()).await?;
        }
        let size = writer.finish().await?;
        say(&format!("{name}: {requests} requests, {:.0} MB", mega(size)));
        Ok(())
    }

    /// Processor time so far of the S3 server and another process.
    fn spent(&self, other: u32) -> anyhow::Result<Duration> {
        let both = Usage::of(self.server.pid()?)?.cpu + Usage::of(other)?.cpu;
        Ok(Duration::from_nanos(both))
    }

    /// Reads an object and writes it to another one, which stays: memory that it frees would be at hand for the job.
    async fn copy(&self, name: &str) -> anyhow::Result<Copied> {
        let (from, to) = (self.store.head(&name.into()).await?, COPY.into());
        let (start, before) = (Instant::now(), self.spent(std::process::id())?);
        let mut reader = self.store.read(&from);
        let mut writer = self.store.write(&to);
        while let Some(bytes) = reader.next().await? {
            writer.write(&bytes).await?;
        }
        writer.finish().await?;
        let took = start.elapsed();
        let cpu = self.spent(std::process::id())?.saturating_sub(before);
        say(&format!(
            "  a plain copy: {:.1} s, {:.1} MB/s; {:.1} s of processor time",
            took.as_secs_f64(),
            speed(from.size, took),
            cpu.as_secs_f64()
        ));
        Ok(Copied { took, cpu })
    }

    /// One for each job: it holds in memory what it was ever given.
    /// Its batches run until they are ended.
    async fn simulator(&self) -> anyhow::Result<Simulator> {
        Simulator::start(&self.args.simulator, 3600, None, self.dir).await
    }

    async fn operator(&self, simulator: &Simulator) -> anyhow::Result<Operator> {
        let endpoints = [format!("--object-store-endpoints={}", self.endpoint)];
        Operator::start(&self.args.operator, self.control_plane, simulator, None, &endpoints, self.dir).await
    }

    fn jobs(&self) -> Api<GeminiBatchJob> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn create(&self, name: &str, input: &str) -> anyhow::Result<()> {
        let at = |path: &str| {
            let uri = format!("s3://{BUCKET}/{path}");
            json!({"uri": uri, "credentialsRef": {"name": "store"}, "endpoint": self.endpoint})
        };
        let job = json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob", "metadata": {"name": name},
            "spec": {
                "model": "gemini-2.5-flash",
                "credentials": {"secretRef": {"name": "gemini"}},
                "input": {"objectStore": at(input)},
                "output": {"objectStore": at(name)},
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
    async fn until(
        &self,
        name: &str,
        what: &str,
        mut done: impl AsyncFnMut(&Value) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Value> {
        let start = Instant::now();
        loop {
            let status = self.status(name).await?;
            if done(&status).await? {
                return Ok(status);
            }
            ensure!(start.elapsed() < JOB_DEADLINE, "{name} was not {what} in time: {status}");
            tokio::time::sleep(STEP).await;
        }
    }

    /// Waits for the batch. Its name.
    async fn submitted(&self, name: &str) -> anyhow::Result<String> {
        let status = self.until(name, "sent", async |s| Ok(submitted(s))).await?;
        let attempts = status["attempts"].as_array().context("no attempts")?;
        let name = attempts.iter().find_map(|attempt| attempt["batchName"].as_str());
        Ok(name.context("no batch")?.to_owned())
    }

    async fn told(&self, name: &str) -> anyhow::Result<Value> {
        self.until(name, "told the end of its batch", async |s| Ok(!s["callback"].is_null())).await
    }

    async fn complete(&self, name: &str) -> anyhow::Result<Value> {
        self.until(name, "complete", async |s| Ok(succeeded(s))).await
    }

    /// Runs a job with nothing in its way, with an operator and a simulator of its own. Its results are deleted.
    async fn job(&self, name: &str, input: &str, requests: usize) -> anyhow::Result<Took> {
        let simulator = self.simulator().await?;
        let operator = self.operator(&simulator).await?;
        let idle = operator.usage()?.rss;
        let (created, at_first) = (Timestamp::now(), self.spent(operator.pid()?)?);
        self.create(name, input).await?;
        let batch = self.submitted(name).await?;
        let sent = self.spent(operator.pid()?)?;
        let copied = self.copy(input).await?;
        simulator.finish(&batch).await?;
        self.told(name).await?;
        let (told, at_rest) = (Instant::now(), self.spent(operator.pid()?)?);
        let status = self.complete(name).await?;
        let output = told.elapsed();
        let at_last = self.spent(operator.pid()?)?;
        let peak = operator.usage()?.peak;
        operator.stop().await?;
        // What Gemini does with the input from there on is not the operator's affair.
        let arrived = uploads(&simulator).await?.last().context("nothing was sent")?.0;
        simulator.stop().await?;
        self.store.delete(&COPY.into()).await?;
        let input_bytes = self.store.head(&input.into()).await?.size;
        let (sha256, result_bytes) = self.verify(name, &status, requests).await?;
        let took = Took {
            input: Duration::try_from(arrived.duration_since(created))?,
            output,
            cpu: (sent.saturating_sub(at_first)) + at_last.saturating_sub(at_rest),
            bytes: [input_bytes, result_bytes],
            idle,
            peak,
            sha256,
            copied,
        };
        say(&format!(
            "{name}: in {:.1} s, {:.1} MB/s; out {:.1} s, {:.1} MB/s; {:.1} s of processor time; at most {:.1} MiB",
            took.input.as_secs_f64(),
            speed(input_bytes, took.input),
            output.as_secs_f64(),
            speed(result_bytes, output),
            took.cpu.as_secs_f64(),
            mib(peak)
        ));
        Ok(took)
    }

    /// Whether the results are in input order, each once, and nothing else, and have the hash that the status names. Their
    /// hash and size; they are deleted.
    async fn verify(&self, name: &str, status: &Value, requests: usize) -> anyhow::Result<(String, u64)> {
        let objects =
            status["output"]["objectStore"]["objects"].as_array().context("no objects in the status")?;
        let [results] = objects.as_slice() else {
            bail!("{name} has more or less than results: {objects:?}")
        };
        let path = format!("{name}/{}", results["name"].as_str().unwrap_or_default());
        ensure!(path.ends_with("/results.jsonl"), "{name} has no results: {objects:?}");
        let object = self.store.head(&path.as_str().into()).await?;
        let mut reader = self.store.read(&object);
        let (mut hash, mut rest, mut number) = (digest::Context::new(&digest::SHA256), Vec::new(), 0);
        while let Some(bytes) = reader.next().await? {
            hash.update(&bytes);
            rest.extend_from_slice(&bytes);
            let mut from = 0;
            while let Some(end) = rest[from..].iter().position(|b| *b == b'\n') {
                let wanted = format!(r#"{{"key":"{}","response":{{"#, key(number));
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
        self.store.delete(&object.path).await?;
        Ok((sha256, object.size))
    }

    /// Jobs with a copy in each, the last one's results for comparison.
    async fn rounds(&mut self) -> anyhow::Result<Took> {
        let mut jobs = Vec::new();
        for round in 1..=self.args.rounds {
            jobs.push(self.job(&format!("round-{round}"), LARGE, self.args.requests).await?);
        }
        let share = |of: &dyn Fn(&Took, &Copied) -> f64| {
            let all: Vec<f64> = jobs.iter().map(|job| of(job, &job.copied)).collect();
            let each: Vec<_> = all.iter().map(|share| format!("{:.0}", share * 100.0)).collect();
            (median(&all), format!("{:.0} % ({})", median(&all) * 100.0, each.join(", ")))
        };
        // Bytes of a copy are counted once, and so are those that a job takes in and those that it gives out.
        let input = jobs.first().map_or(0, |job| job.bytes[0]);
        let of_copy = |copy: &Copied| speed(input, copy.took);
        let rows = [
            (
                "MB/s in and out, of a copy's",
                share(&|job, copy| speed(job.both(), job.input + job.output) / of_copy(copy)),
            ),
            (
                "  in: read twice, checked, sent",
                share(&|job, copy| speed(job.bytes[0], job.input) / of_copy(copy)),
            ),
            (
                "  out: read, joined, written",
                share(&|job, copy| speed(job.bytes[1], job.output) / of_copy(copy)),
            ),
            (
                "MB by processor time, of a copy's",
                share(&|job, copy| speed(job.both(), job.cpu) / speed(input, copy.cpu)),
            ),
        ];
        for (what, (median, measured)) in rows {
            self.table.timed(what, ">= 50 %", measured, median >= SHARE);
        }
        let last = jobs.pop().context("no rounds")?;
        let differ = jobs.iter().any(|job| job.sha256 != last.sha256);
        ensure!(!differ, "the same input had other results");
        let highest = jobs.iter().chain([&last]).max_by_key(|job| job.peak.saturating_sub(job.idle));
        if let Some(job) = highest {
            self.table.memory(
                &format!("memory, {:.0} MB in, {:.0} MB out", mega(job.bytes[0]), mega(job.bytes[1])),
                job,
            );
        }
        Ok(last)
    }

    /// The same job, with the operator killed when half of the input is at Gemini, when half of the results have been read,
    /// and when half of them are written.
    async fn killed(&mut self, clean: &Took) -> anyhow::Result<()> {
        let name = "killed";
        let [input, results] = clean.bytes;
        let simulator = self.simulator().await?;
        let operator = self.operator(&simulator).await?;
        self.create(name, LARGE).await?;
        let half = async |s: &Value| {
            ensure!(!submitted(s), "it was not seen on its way");
            Ok(uploads(&simulator).await?.iter().map(|(_, bytes)| bytes).sum::<u64>() >= input / 2)
        };
        self.until(name, "half sent", half).await?;
        operator.kill().await?;
        say("killed: half of the input was at Gemini");

        let operator = self.operator(&simulator).await?;
        let batch = self.submitted(name).await?;
        simulator.finish(&batch).await?;
        self.told(name).await?;
        let pid = operator.pid()?;
        let half = async |s: &Value| {
            ensure!(!succeeded(s), "it was not seen on its way");
            Ok(spooled(pid, self.dir)? >= results / 2)
        };
        self.until(name, "half read", half).await?;
        operator.kill().await?;
        say("killed: half of the results were read");

        let operator = self.operator(&simulator).await?;
        let parts = self.dir.join(format!("data/{BUCKET}/.sgwtmp/multipart"));
        let half = async |s: &Value| {
            ensure!(!succeeded(s), "it was not seen on its way");
            Ok(size_below(&parts) >= results / 2)
        };
        self.until(name, "half written", half).await?;
        operator.kill().await?;
        say("killed: half of the results were written");

        let operator = self.operator(&simulator).await?;
        let status = self.complete(name).await?;
        operator.stop().await?;
        let (sha256, _) = self.verify(name, &status, self.args.requests).await?;
        let (same, others) = ("the same", "others");
        let found = if sha256 == clean.sha256 { same } else { others };
        self.table.hard("killed three times: results", same, found.to_owned(), sha256 == clean.sha256);
        let batches = simulator.get("batches").await?["batches"].as_array().map_or(0, Vec::len);
        self.table.hard("killed three times: batches", "1", batches.to_string(), batches == 1);
        simulator.stop().await
    }

    async fn many_keys(&mut self) -> anyhow::Result<()> {
        let took = self.job("keys", KEYS, self.args.keys).await?;
        self.table.memory(&format!("memory, {} keys joined", self.args.keys), &took);
        Ok(())
    }
}

impl Table {
    fn memory(&mut self, what: &str, took: &Took) {
        let above = took.peak.saturating_sub(took.idle);
        let measured = format!("{:.1} MiB, at most {:.1}", mib(above), mib(took.peak));
        self.hard(what, "<= 64 MiB above idle", measured, above <= RSS_KIB);
    }
}

fn succeeded(status: &Value) -> bool {
    status["state"] == "Succeeded"
}

fn submitted(status: &Value) -> bool {
    status["attempts"].as_array().is_some_and(|all| all.iter().any(|a| !a["batchName"].is_null()))
}

/// When each piece of an upload had arrived, and its size.
async fn uploads(simulator: &Simulator) -> anyhow::Result<Vec<(Timestamp, u64)>> {
    let log = simulator.get("log").await?;
    let entries = log["entries"].as_array().context("no log")?;
    let pieces = entries.iter().filter(|entry| entry["op"] == "UploadChunk");
    pieces
        .map(|entry| {
            let time = entry["time"].as_str().context("no time")?.parse()?;
            Ok((time, entry["bytes"].as_u64().unwrap_or_default()))
        })
        .collect()
}

/// Size of the largest file of a process below `dir`, also if it has no name any more.
fn spooled(pid: u32, dir: &Path) -> anyhow::Result<u64> {
    let mut largest = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // What is closed meanwhile is none of them.
        if std::fs::read_link(&path).is_ok_and(|to| to.starts_with(dir) && to.extension().is_none())
            && let Ok(metadata) = std::fs::metadata(&path)
        {
            largest = largest.max(metadata.len());
        }
    }
    Ok(largest)
}

/// Bytes of all files in a directory and those below it.
fn size_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
}
