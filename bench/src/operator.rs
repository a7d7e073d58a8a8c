//! `make bench`: the whole operator, with 10,000 jobs on a real API server.
//!
//! Control plane, simulator and operator are processes of their own, so that each one's time and memory can be
//! told; they share the machine's cores. Throughput is told as a share of what the same API server takes in raw
//! status patches right before and after, without the operator. Whatever is not a matter of time is a hard limit.

mod count;
mod jobs;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use gemini_batch_operator::api::crd::crd;
use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::conditions::is_crd_established;
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use self::count::{Audit, Kubernetes, OfJob};
use self::jobs::{Kind, Raw, There, Watch};
use crate::machine::{self, Usage};
use crate::numbers::{float, median, mib, percentile};
use crate::parts::{Clock, ControlPlane, Operator, Simulator};
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
    /// Jobs that are there before anything is measured, 5 % of them active.
    #[arg(long, default_value_t = 10_000)]
    present: usize,
    /// Jobs of one round of the measuring of throughput.
    #[arg(long, default_value_t = 500)]
    burst: usize,
    /// Rounds of it.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Raw status patches before, between and after the rounds.
    #[arg(long, default_value_t = 2000)]
    patches: usize,
    /// Jobs whose callbacks come one after the other, and as many whose callbacks come at once.
    #[arg(long, default_value_t = 300)]
    callbacks: usize,
}

/// As many as the operator works on at the same time by default.
const TASKS: usize = 16;

/// A batch's run time while throughput is measured.
const SECONDS: u32 = 1;

/// Pause between two callbacks that do not come at once: five a second, which would be 18,000 jobs an hour.
const PACE: Duration = Duration::from_millis(200);

/// Jobs that run an hour each, on a clock that is so much faster.
const HOUR_JOBS: usize = 100;
const HOUR_FACTOR: u32 = 240;

/// What follows the end of a job takes less: its input file and its finalizer go.
const AFTERMATH: Duration = Duration::from_secs(3);

/// The whole run ends by then, one way or the other.
const DEADLINE: Duration = Duration::from_mins(30);

const WRITES: usize = 7;
const WRITES_WITHOUT_OUTPUT: usize = 5;
const EVENTS: usize = 2;
const CALLBACK_SECONDS: f64 = 1.0;
const THROUGHPUT: f64 = 0.5;
const RSS_KIB: u64 = 128 * 1024;

/// Measures. Returns the hard statements that do not hold.
pub fn measure(args: &Args) -> anyhow::Result<Vec<String>> {
    if cfg!(debug_assertions) {
        bail!("measuring a debug build says nothing: use 'make bench'");
    }
    ensure!(
        args.burst > 0 && args.rounds > 0 && args.callbacks > 0 && args.present >= 200,
        "too few jobs to measure anything"
    );
    machine::allow_open_files(4096)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let logs = std::env::temp_dir().join(format!("gbo-bench-{}", std::process::id()));
        std::fs::create_dir(&logs)?;
        let result = tokio::select! {
            result = tokio::time::timeout(DEADLINE, run(args, &logs)) => result.context("the run took too long")?,
            _ = terminate.recv() => bail!("stopped"),
            _ = interrupt.recv() => bail!("stopped"),
        };
        let result = result.with_context(|| format!("logs are in {}", logs.display()))?;
        std::fs::remove_dir_all(&logs)?;
        Ok(result)
    })
}

/// Everything that is measured with.
struct Bench<'a> {
    args: &'a Args,
    logs: &'a Path,
    client: Client,
    control_plane: ControlPlane,
    simulator: Simulator,
    audit: Audit,
    /// Requests to Gemini that were counted already.
    seen: usize,
    table: Table,
}

async fn run(args: &Args, logs: &Path) -> anyhow::Result<Vec<String>> {
    say("starting control plane and simulator");
    let control_plane = ControlPlane::start(&args.devcluster, logs).await?;
    let file = Kubeconfig::read_from(&control_plane.kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let crds = Api::all(client.clone());
    let name = crd().name_any();
    crds.patch(&name, &PatchParams::apply("bench").force(), &Patch::Apply(&crd())).await?;
    await_condition(crds, &name, is_crd_established()).await?;
    let simulator = Simulator::start(&args.simulator, SECONDS, None, logs).await?;
    let audit = Audit::from_now(control_plane.audit_log())?;
    let table = Table::default();
    let mut bench = Bench { args, logs, client, control_plane, simulator, audit, seen: 0, table };

    let status = bench.one_job().await?;
    bench.fill(&status).await?;
    let operator = bench.memory().await?;
    let operator = bench.throughput(operator, &status).await?;
    bench.callbacks().await?;
    let end = operator.usage()?;
    let jobs = jobs::present(&bench.client).await?;
    say(&format!(
        "memory at the end, {jobs} jobs: {:.1} MiB, at most {:.1} MiB",
        mib(end.rss),
        mib(end.peak)
    ));
    operator.stop().await?;
    bench.an_hour().await?;
    say("");
    bench.table.print();
    bench.simulator.stop().await?;
    bench.control_plane.stop().await?;
    Ok(bench.table.broken)
}

impl Bench<'_> {
    async fn operator(&self) -> anyhow::Result<Operator> {
        Operator::start(&self.args.operator, &self.control_plane, &self.simulator, None, &[], self.logs).await
    }

    /// One job, from which the status of those is taken that have finished already.
    async fn one_job(&self) -> anyhow::Result<Value> {
        let operator = self.operator().await?;
        say(&format!("memory without any job: {:.1} MiB", mib(operator.usage()?.rss)));
        jobs::namespace(&self.client, "first", 1).await?;
        let watch = Watch::start(&self.client, "first", "Succeeded");
        jobs::create(&self.client, "first", 1, Kind::Runs, true).await?;
        watch.all(1).await?;
        let status = jobs::status(&self.client, "first", 0).await?;
        operator.stop().await?;
        Ok(status)
    }

    /// 10,000 jobs: 95 % finished, 5 % at Gemini.
    async fn fill(&self, status: &Value) -> anyhow::Result<()> {
        let active = self.args.present / 20;
        let rest = self.args.present - active;
        say(&format!("{rest} jobs that have finished"));
        jobs::namespace(&self.client, "rest", 0).await?;
        jobs::create_finished(&self.client, "rest", rest, status).await?;
        say(&format!("{active} jobs that are at Gemini"));
        jobs::namespace(&self.client, "active", active).await?;
        let operator = self.operator().await?;
        self.stalled("active", active, true).await?;
        operator.stop().await
    }

    /// Jobs that are at Gemini until they are told to end.
    async fn stalled(&self, namespace: &str, count: usize, output: bool) -> anyhow::Result<()> {
        let watch = Watch::start(&self.client, namespace, "Running");
        jobs::create(&self.client, namespace, count, Kind::Stalls, output).await?;
        watch.all(count).await?;
        Ok(())
    }

    /// Of an operator that starts with all jobs present.
    async fn memory(&mut self) -> anyhow::Result<Operator> {
        let start = Instant::now();
        let operator = self.operator().await?;
        let took = start.elapsed();
        // what the list leads to is over by then
        tokio::time::sleep(Duration::from_secs(5)).await;
        let usage = operator.usage()?;
        let present = jobs::present(&self.client).await?;
        say(&format!(
            "memory with {present} jobs: {:.1} MiB, at most {:.1} MiB; leading and listed {:.1} s after the start",
            mib(usage.rss),
            mib(usage.peak),
            took.as_secs_f64()
        ));
        self.table.hard(
            &format!("memory with {} jobs of 20 KiB", self.args.present),
            "<= 128 MiB RSS",
            format!("{:.1} MiB, at most {:.1}", mib(usage.rss), mib(usage.peak)),
            usage.peak <= RSS_KIB && present >= i64::try_from(self.args.present)?,
        );
        Ok(operator)
    }

    /// Raw status patches, while the operator is not there.
    async fn raw(&self, raw: Raw, status: &Value) -> anyhow::Result<Speed> {
        let jobs = self.args.present - self.args.present / 20;
        let patches = self.args.patches;
        let meter = Meter::start(self, None).await?;
        let start = Instant::now();
        jobs::raw_patches(&self.client, "rest", jobs, TASKS, patches, raw, status).await?;
        Ok(Speed::of(patches, start.elapsed(), &meter.stop()?))
    }

    /// Bursts of jobs, and raw patches around each while the operator is not there.
    async fn throughput(&mut self, first: Operator, status: &Value) -> anyhow::Result<Operator> {
        let burst = self.args.burst;
        say(&format!(
            "throughput: {} rounds of {burst} jobs; before and after, raw patches by {TASKS} tasks at once",
            self.args.rounds
        ));
        first.stop().await?;
        self.audit.count("none")?;
        count::gemini(&self.simulator, &mut self.seen).await?;
        let (mut by_clock, mut by_cpu, mut latencies) = (Vec::new(), Vec::new(), Vec::new());
        let mut requests: BTreeMap<String, usize> = BTreeMap::new();
        let mut kubernetes = Kubernetes::default();
        let mut before = self.raw(Raw::Merge, status).await?;
        for round in 0..self.args.rounds {
            let namespace = format!("burst-{round}");
            jobs::namespace(&self.client, &namespace, burst).await?;
            let watch = Watch::start(&self.client, &namespace, "Succeeded");
            let operator = self.operator().await?;
            let meter = Meter::start(self, Some(&operator)).await?;
            let start = Instant::now();
            jobs::create(&self.client, &namespace, burst, Kind::Runs, true).await?;
            let complete = watch.all(burst).await?;
            let took = start.elapsed();
            let spent = meter.stop()?;
            drop(watch);
            latencies.extend(receipts(&complete));
            tokio::time::sleep(AFTERMATH).await;
            let counted = self.audit.count(&namespace)?;
            for (op, n) in count::gemini(&self.simulator, &mut self.seen).await? {
                *requests.entry(op).or_default() += n;
            }
            operator.stop().await?;
            let after = self.raw(Raw::Merge, status).await?;

            let (writes, _) = counted.of_jobs(|job| job.until_terminal);
            let jobs = Speed::of(burst, took, &spent);
            let raw = Speed::between(before, after);
            let ratios = [jobs.a_second * writes / raw.a_second, writes * raw.cpu / jobs.cpu];
            say(&format!(
                "  round {}: {:.1} jobs/s x {writes:.2} writes = {:.0}/s; raw patches {:.0}/s before, {:.0}/s after: {:.1} % ({:.1} % by processor time)",
                round + 1,
                jobs.a_second,
                jobs.a_second * writes,
                before.a_second,
                after.a_second,
                ratios[0] * 100.0,
                ratios[1] * 100.0
            ));
            say(&format!(
                "    processor time: {:.1} ms for a raw patch; for a job {:.1} ms: {}",
                raw.cpu * 1000.0,
                jobs.cpu * 1000.0,
                spent.of_each(burst)
            ));
            by_clock.push(ratios[0]);
            by_cpu.push(ratios[1]);
            before = after;
            kubernetes.add_all(&namespace, counted);
        }
        let applied = self.raw(Raw::Apply, status).await?;
        say(&format!(
            "  for comparison, raw server-side apply of the whole status: {:.0}/s, {:.1} ms of processor time",
            applied.a_second,
            applied.cpu * 1000.0
        ));
        let operator = self.operator().await?;

        let list = |ratios: &[f64]| {
            ratios.iter().map(|r| format!("{:.0}", r * 100.0)).collect::<Vec<_>>().join(", ")
        };
        self.table.timed(
            "jobs/s x writes, of raw status patches/s",
            ">= 50 %",
            format!("{:.1} % (rounds: {})", median(&by_clock) * 100.0, list(&by_clock)),
            median(&by_clock) >= THROUGHPUT,
        );
        self.table.timed(
            "the same by processor time of all parts",
            "",
            format!("{:.1} % (rounds: {})", median(&by_cpu) * 100.0, list(&by_cpu)),
            median(&by_cpu) >= THROUGHPUT,
        );
        say(&format!(
            "  callback received -> Complete meanwhile: p50 {:.3} s, p99 {:.3} s",
            percentile(&latencies, 50),
            percentile(&latencies, 99)
        ));
        self.tell_kubernetes("with output", &kubernetes, WRITES);
        self.tell_gemini(&requests, burst * self.args.rounds);
        Ok(operator)
    }

    fn tell_kubernetes(&mut self, which: &str, counted: &Kubernetes, limit: usize) {
        let (mean, most) = counted.of_jobs(|job| job.until_terminal);
        let (reads, most_reads) = counted.of_jobs(|job| job.reads);
        let refused = counted.of_jobs(|job| job.refused).0;
        let each = |n: usize| float(n) / float(counted.jobs.len().max(1));
        say(&format!(
            "  API server, for each job {which}: {mean:.2} writes until terminal (at most {most}), {refused:.3} refused, {:.2} Events, {reads:.2} reads of job and output (at most {most_reads}), {:.2} of its Secret",
            each(counted.events),
            each(counted.secret_reads),
        ));
        self.table.hard(
            &format!("Kubernetes writes until terminal, {which}"),
            &format!("<= {limit}"),
            format!("{mean:.2}, at most {most}"),
            most <= limit,
        );
        self.table.hard(
            &format!("Events, {which}"),
            &format!("<= {EVENTS}"),
            format!("{:.2}", each(counted.events)),
            each(counted.events) <= float(EVENTS),
        );
    }

    fn tell_gemini(&mut self, requests: &BTreeMap<String, usize>, jobs: usize) {
        let of = |op: &str| requests.get(op).copied().unwrap_or_default();
        let each = |op: &str| float(of(op)) / float(jobs);
        say(&format!("  Gemini, requests in all for {jobs} jobs: {requests:?}"));
        self.table.hard(
            "Gemini requests for each job",
            "create 1, GET 1, deletion 1",
            format!("{:.2}, {:.2}, {:.2}", each("BatchCreate"), each("BatchGet"), each("FileDelete")),
            of("BatchCreate") == jobs && of("BatchGet") <= jobs && of("FileDelete") <= jobs,
        );
    }

    /// How long after a callback a job is complete.
    async fn callbacks(&mut self) -> anyhow::Result<()> {
        let n = self.args.callbacks;
        say(&format!("{n} jobs whose callbacks come {} ms apart", PACE.as_millis()));
        let (asked, complete) = self.ended("paced", true, PACE).await?;
        let received = receipts(&complete);
        let (p50, p99) = (percentile(&received, 50), percentile(&received, 99));
        say(&format!(
            "  callback received -> Complete: p50 {p50:.3} s, p99 {p99:.3} s, at most {:.3} s",
            percentile(&received, 100)
        ));
        say(&format!(
            "  batch ended -> Complete: p50 {:.3} s, p99 {:.3} s",
            percentile(&asked, 50),
            percentile(&asked, 99)
        ));
        self.table.timed(
            "callback received -> Complete",
            "p99 <= 1 s",
            format!("p50 {p50:.3} s, p99 {p99:.3} s"),
            p99 <= CALLBACK_SECONDS,
        );
        say(&format!("{n} jobs without output whose callbacks come all at once"));
        let (asked, complete) = self.ended("at-once", false, Duration::ZERO).await?;
        let received = receipts(&complete);
        say(&format!(
            "  callback received -> Complete: p50 {:.3} s, p99 {:.3} s; batch ended -> Complete: p50 {:.3} s, p99 {:.3} s",
            percentile(&received, 50),
            percentile(&received, 99),
            percentile(&asked, 50),
            percentile(&asked, 99)
        ));
        tokio::time::sleep(AFTERMATH).await;
        let counted = self.audit.count("at-once")?;
        self.tell_kubernetes("without output", &counted, WRITES_WITHOUT_OUTPUT);
        Ok(())
    }

    /// Jobs that are ended one after the other: seconds from when each was told to end until it was complete, and
    /// when it was.
    async fn ended(
        &self,
        namespace: &str,
        output: bool,
        pause: Duration,
    ) -> anyhow::Result<(Vec<f64>, BTreeMap<String, There>)> {
        let n = self.args.callbacks;
        jobs::namespace(&self.client, namespace, n).await?;
        self.stalled(namespace, n, output).await?;
        let watch = Watch::start(&self.client, namespace, "Succeeded");
        let views = self.simulator.get("batches").await?;
        let prefix = format!("/v1/callbacks/{namespace}/");
        let mut asked = BTreeMap::new();
        for batch in views["batches"].as_array().context("no batches")? {
            let Some((_, rest)) = batch["uris"][0].as_str().and_then(|uri| uri.split_once(&prefix)) else {
                continue;
            };
            let (job, _) = rest.split_once('/').context("a callback URL without a token")?;
            asked.insert(job.to_owned(), Timestamp::now());
            self.simulator.finish(batch["name"].as_str().unwrap_or_default()).await?;
            tokio::time::sleep(pause).await;
        }
        let complete = watch.all(n).await?;
        let waited = complete.iter().filter_map(|(job, there)| Some(seconds(*asked.get(job)?, there.seen)));
        Ok((waited.collect(), complete))
    }

    /// What jobs cost that run an hour.
    async fn an_hour(&mut self) -> anyhow::Result<()> {
        say(&format!("{HOUR_JOBS} jobs that run an hour each, on a clock {HOUR_FACTOR} times as fast"));
        let namespace = "hour";
        jobs::namespace(&self.client, namespace, HOUR_JOBS).await?;
        let clock = Clock { origin_ms: Timestamp::now().as_millisecond(), factor: HOUR_FACTOR };
        let simulator = Simulator::start(&self.args.simulator, 3600, Some(clock), self.logs).await?;
        let own = Some((namespace, clock));
        let operator =
            Operator::start(&self.args.operator, &self.control_plane, &simulator, own, &[], self.logs)
                .await?;
        let watch = Watch::start(&self.client, namespace, "Succeeded");
        jobs::create(&self.client, namespace, HOUR_JOBS, Kind::Runs, true).await?;
        watch.all(HOUR_JOBS).await?;
        tokio::time::sleep(AFTERMATH).await;
        let requests = count::gemini(&simulator, &mut 0).await?;
        operator.stop().await?;
        simulator.stop().await?;
        let of = |op: &str| requests.get(op).copied().unwrap_or_default();
        let poller = HOUR_JOBS * 3600 / 30;
        say(&format!("  Gemini, requests in all: {requests:?}"));
        // On this clock a sweep comes every two and a half seconds. On a busy machine it sees ends whose callbacks still
        // wait, which costs these jobs a second GET.
        self.table.timed(
            "the same, of 100 jobs that run an hour",
            "create 1, GET 1",
            format!(
                "{} creates, {} GETs, {} lists; a 30 s poller: {poller} GETs",
                of("BatchCreate"),
                of("BatchGet"),
                of("BatchList")
            ),
            of("BatchCreate") == HOUR_JOBS && of("BatchGet") <= HOUR_JOBS,
        );
        self.table.hard(
            "no loops of GETs, even so",
            "create 1, GET <= 2",
            format!("{} creates, {} GETs", of("BatchCreate"), of("BatchGet")),
            of("BatchCreate") == HOUR_JOBS && of("BatchGet") <= 2 * HOUR_JOBS,
        );
        Ok(())
    }
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64()
}

/// Seconds from callback to complete, of the jobs that had one.
fn receipts(complete: &BTreeMap<String, There>) -> Vec<f64> {
    complete.values().filter_map(|there| Some(seconds(there.received?, there.seen))).collect()
}

/// How fast something was.
#[derive(Clone, Copy)]
struct Speed {
    a_second: f64,
    /// Seconds of processor time for each, of all parts.
    cpu: f64,
}

impl Speed {
    fn of(count: usize, took: Duration, spent: &Spent) -> Self {
        let cpu: Duration = spent.0.iter().map(|(_, spent)| spent).sum();
        Self { a_second: float(count) / took.as_secs_f64(), cpu: cpu.as_secs_f64() / float(count) }
    }

    fn between(a: Self, b: Self) -> Self {
        Self { a_second: f64::midpoint(a.a_second, b.a_second), cpu: f64::midpoint(a.cpu, b.cpu) }
    }
}

/// Processor time of all parts.
struct Meter {
    parts: Vec<(&'static str, u32, Usage)>,
}

impl Meter {
    async fn start(bench: &Bench<'_>, operator: Option<&Operator>) -> anyhow::Result<Self> {
        let [api_server, etcd] = bench.control_plane.pids().await?;
        let mut all = vec![
            ("API server", api_server),
            ("etcd", etcd),
            ("simulator", bench.simulator.pid()?),
            ("benchmark", std::process::id()),
        ];
        if let Some(operator) = operator {
            all.push(("operator", operator.pid()?));
        }
        let parts = all.into_iter().map(|(name, pid)| Ok((name, pid, Usage::of(pid)?)));
        Ok(Self { parts: parts.collect::<anyhow::Result<_>>()? })
    }

    fn stop(self) -> anyhow::Result<Spent> {
        let spent = self.parts.into_iter().map(|(name, pid, before)| {
            let nanoseconds = Usage::of(pid)?.cpu.saturating_sub(before.cpu);
            Ok((name, Duration::from_nanos(nanoseconds)))
        });
        Ok(Spent(spent.collect::<anyhow::Result<_>>()?))
    }
}

/// Processor time that parts have spent.
struct Spent(Vec<(&'static str, Duration)>);

impl Spent {
    fn of_each(&self, jobs: usize) -> String {
        let each = self
            .0
            .iter()
            .map(|(name, spent)| format!("{name} {:.2}", spent.as_secs_f64() * 1000.0 / float(jobs)));
        each.collect::<Vec<_>>().join(", ")
    }
}

impl Kubernetes {
    /// Adds those of another namespace.
    fn add_all(&mut self, namespace: &str, other: Self) {
        let jobs =
            other.jobs.into_iter().map(|(name, job): (String, OfJob)| (format!("{namespace}/{name}"), job));
        self.jobs.extend(jobs);
        self.events += other.events;
        self.secret_reads += other.secret_reads;
    }
}
