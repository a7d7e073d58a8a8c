//! `make chaos`: two controllers, the simulator and a real API server, with everything failing that can; at the end not
//! one batch too many, and not one job lost. `docs/chaos.md` says how to read it.

mod apiserver;
mod callbacks;
mod cell;
mod cluster;
mod gemini;
mod http1;
mod judge;
mod plan;
mod process;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use futures::future::try_join_all;
use rand::RngExt as _;
use tokio::signal::unix::{SignalKind, signal};

use self::cell::{Broken, Cell, Kill, Setup, lock};
use self::cluster::Cluster;
use self::judge::{Verdict, judge};
use self::plan::{Create, MOMENTS, POINTS, Scale};

/// Kills the operator at every step, with everything else failing as well, and counts the batches.
#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// Instead: show that without grace, fence or adoption there are duplicates, and with all three there are none
    #[arg(long)]
    can_fail: bool,
    /// How many kills
    #[arg(long, default_value_t = 1000)]
    kills: usize,
    /// Decides what goes wrong, and when. Default: a random one, which is printed
    #[arg(long)]
    seed: Option<u64>,
    /// The kills end after so many minutes, however many there were by then
    #[arg(long, default_value_t = 50)]
    minutes: u64,
    /// Namespaces with two controllers and a simulator each
    #[arg(long, default_value_t = 6)]
    cells: usize,
    /// Jobs of a cell at a time whose submission goes on, and nothing stands in its way
    #[arg(long, default_value_t = 6)]
    jobs: usize,
    /// How many times faster than the wall clock all clocks run. Smaller on a slower machine
    #[arg(long, default_value_t = Scale::DEFAULT.factor, value_parser = clap::value_parser!(u32).range(2..))]
    factor: u32,
    /// So many are enough, on a machine that is too slow for more. Default: all
    #[arg(long)]
    least: Option<usize>,
    /// At least so many of the kills must be between the request for a batch and the record of its name.
    /// Default: a tenth
    #[arg(long)]
    window: Option<usize>,
    /// The operator, built with crash-points and break-submission
    #[arg(long, default_value = "target/debug/gemini-batch-operator")]
    operator: PathBuf,
    /// The launcher of the control plane, hack/devcluster
    #[arg(long, env = "GBO_DEVCLUSTER")]
    devcluster: PathBuf,
    /// Keep logs here. Default: a temporary directory
    #[arg(long)]
    logs: Option<PathBuf>,
}

fn say(line: &str) {
    // a closed pipe changes nothing about the verdict
    let _ = writeln!(std::io::stdout(), "{line}");
}

// Proxies and simulators are on the way of every request: on a busy machine they need more than one turn in so many.
#[tokio::main(worker_threads = 8)]
async fn main() -> ExitCode {
    let args = Args::parse();
    let whole = async { if args.can_fail { can_fail(&args).await } else { chaos(&args).await } };
    let ended = tokio::select! {
        result = whole => result,
        () = interrupted() => Err(anyhow::anyhow!("interrupted")),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "gemini-batch-chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn interrupted() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

struct Ground {
    cluster: Arc<Cluster>,
    dir: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

async fn ground(args: &Args) -> anyhow::Result<Ground> {
    ensure!(args.operator.exists(), "{} does not exist: use 'make chaos'", args.operator.display());
    let temporary = if args.logs.is_none() { Some(tempfile::tempdir()?) } else { None };
    let dir =
        temporary.as_ref().map(|t| t.path().to_owned()).or(args.logs.clone()).context("no directory")?;
    std::fs::create_dir_all(&dir)?;
    let cluster = Arc::new(Cluster::start(&args.devcluster).await?);
    Ok(Ground { cluster, dir, _temporary: temporary })
}

fn setup(args: &Args, seed: u64, dir: PathBuf) -> Setup {
    Setup {
        seed,
        scale: Scale { factor: args.factor, ..Scale::DEFAULT },
        operator: args.operator.clone(),
        jobs: args.jobs,
        kills: args.kills.div_ceil(args.cells.max(1)),
        // In the past, so that clocks can be put back without standing still.
        origin: jiff::Timestamp::now().as_millisecond() - 120_000,
        broken: None,
        dir,
    }
}

/// The run itself. Whether all is well.
async fn chaos(args: &Args) -> anyhow::Result<bool> {
    let seed = args.seed.unwrap_or_else(|| rand::rng().random_range(0..1_000_000));
    let s = Scale { factor: args.factor, ..Scale::DEFAULT };
    say(&format!("seed {seed}: `make chaos SEED={seed}` repeats it"));
    say(&format!(
        "{} kills over {} cells; clocks {} times as fast: lease {} s ({:.1} s real), create timeout {} s, grace {} s ({:.1} s real)",
        args.kills,
        args.cells,
        s.factor,
        s.lease,
        s.real(s.lease).as_secs_f64(),
        s.create,
        s.grace,
        s.real(s.grace).as_secs_f64()
    ));
    let start = Instant::now();
    let ground = ground(args).await?;
    let mut cells = Vec::new();
    for number in 0..args.cells {
        cells.push(Cell::new(&ground.cluster, number as u64, setup(args, seed, ground.dir.clone())).await?);
    }
    let deadline = Instant::now() + Duration::from_secs(args.minutes * 60);
    let restarts = tokio::spawn(disturb_api_server(Arc::clone(&ground.cluster), seed, cells.clone()));
    let progress = tokio::spawn(tell(cells.clone(), start));
    let running = try_join_all(cells.iter().map(|cell| cell.run(deadline))).await?;
    progress.abort();
    let restarts = restarts.await?;
    let mut verdict = Verdict::default();
    for cell in &cells {
        verdict.add(judge(cell).await?);
    }
    drop(running);
    let kills: Vec<Kill> = cells.iter().flat_map(|c| lock(&c.tally).kills.clone()).collect();
    report(&cells, &kills, &verdict, restarts, args.factor);
    let window = kills.iter().filter(|k| k.window).count();
    let wanted = args.window.unwrap_or(args.kills / 10);
    // A duplicate that was healed is one all the same: behind the fence there should be none.
    let odd = cells.iter().any(|c| !lock(&c.tally).odd.is_empty());
    let mut good = verdict.is_good() && verdict.duplicates.is_empty() && !odd;
    let least = args.least.unwrap_or(args.kills);
    if kills.len() < least {
        say(&format!("NOT MET: {least} kills were wanted, there were {}", kills.len()));
        good = false;
    }
    if window < wanted {
        say(&format!("NOT MET: {wanted} kills between request and record were wanted, there were {window}"));
        good = false;
    }
    say(&format!("took {} s, seed {seed}", start.elapsed().as_secs()));
    if !good {
        say(&verdict.evidence);
        say(&format!("FAILED, seed {seed}"));
    }
    Ok(good)
}

/// Restarts the API server every now and then, or freezes it. Returns how often, once all cells want calm.
async fn disturb_api_server(cluster: Arc<Cluster>, seed: u64, cells: Vec<Arc<Cell>>) -> (usize, usize) {
    let (mut restarts, mut freezes) = (0, 0);
    let mut rng = plan::stream(seed, "api server", &[]);
    loop {
        let pause = Duration::from_millis(rng.random_range(8_000..45_000));
        let start = Instant::now();
        while start.elapsed() < pause {
            if cells.iter().any(|c| c.is_calm()) {
                return (restarts, freezes);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        if rng.random_bool(0.5) {
            restarts += usize::from(cluster.api_server("restart").await.is_ok());
        } else {
            let frozen = Duration::from_millis(rng.random_range(500..4000));
            freezes += usize::from(cluster.api_server("pause").await.is_ok());
            tokio::time::sleep(frozen).await;
            while cluster.api_server("resume").await.is_err() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn tell(cells: Vec<Arc<Cell>>, start: Instant) {
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let each: Vec<String> = cells
            .iter()
            .map(|cell| {
                let (unfinished, unconfirmed) = cell.unfinished();
                let (kills, jobs) = (cell.killed.load(Ordering::SeqCst), lock(&cell.records).len());
                format!("{kills} kills, {jobs} jobs, {unfinished} unfinished, {unconfirmed} unconfirmed")
            })
            .collect();
        say(&format!("{:5} s  {}", start.elapsed().as_secs(), each.join(" | ")));
    }
}

fn report(
    cells: &[Arc<Cell>],
    kills: &[Kill],
    verdict: &Verdict,
    (restarts, freezes): (usize, usize),
    factor: u32,
) {
    say("");
    say("kills at each step");
    let mut by_label: BTreeMap<&str, (usize, bool)> = BTreeMap::new();
    for kill in kills {
        let entry = by_label.entry(&kill.label).or_insert((0, kill.window));
        entry.0 += 1;
    }
    let order: Vec<&str> =
        POINTS.iter().map(|p| p.1).chain(MOMENTS.iter().map(|(moment, _)| moment.label())).collect();
    let place = |label: &&str| order.iter().position(|o| o == label).unwrap_or(usize::MAX);
    let mut lines: Vec<(&str, (usize, bool))> = by_label.into_iter().collect();
    lines.sort_by_key(|(label, _)| (place(label), *label));
    for (label, (count, window)) in lines {
        say(&format!("{count:6}  {label}{}", if window { "  *" } else { "" }));
    }
    let window = kills.iter().filter(|k| k.window).count();
    let any = kills.iter().filter(|k| k.any_window).count();
    say(&format!("{:6}  kills in all", kills.len()));
    say(&format!("{window:6}  of them between the request for a batch and the record of its name (*)"));
    say(&format!("{any:6}  of them with any job in that state, wherever the kill was aimed"));

    let mut done: BTreeMap<&str, u64> = BTreeMap::new();
    let mut late: BTreeMap<u16, usize> = BTreeMap::new();
    let (mut stops, mut terminations, mut api) = (0, 0, 0);
    let mut takeovers: Vec<Duration> = Vec::new();
    let mut recoveries: Vec<(Duration, String)> = Vec::new();
    let (mut odd, mut leaderless) = (Vec::new(), Vec::new());
    for cell in cells {
        for (what, count) in cell.gemini.done() {
            *done.entry(what).or_default() += count;
        }
        for status in cell.gemini.late() {
            *late.entry(status).or_default() += 1;
        }
        let tally = lock(&cell.tally);
        stops += tally.stops;
        terminations += tally.terminations;
        takeovers.extend(&tally.takeovers);
        let named = tally.recoveries.iter().map(|(d, name)| (*d, format!("{}/{name}", cell.namespace)));
        recoveries.extend(named);
        odd.extend(tally.odd.clone());
        leaderless.extend(tally.leaderless.clone());
        api += cell.api.iter().map(|proxy| proxy.failed()).sum::<u64>();
    }
    say("");
    say("what else went wrong, on purpose");
    say(&format!("{stops:6}  times a leader was stopped for longer than its lease"));
    say(&format!("{terminations:6}  times SIGTERM was sent and obeyed"));
    say(&format!("{restarts:6}  restarts of the API server, {freezes} times it was frozen"));
    say(&format!(
        "{api:6}  requests of controllers to the API server failed, were refused, or lost their answer"
    ));
    for (what, count) in done {
        say(&format!("{count:6}  creates and uploads: {what}"));
    }
    for (status, count) in late {
        let what = match status {
            200 => "made a batch".to_owned(),
            403 | 404 => "failed: its input file was gone".to_owned(),
            code => format!("failed ({code})"),
        };
        say(&format!("{count:6}  creates that arrived late: {what}"));
    }
    say("");
    say("result");
    say(&format!(
        "{:6}  jobs, {} of them succeeded, {} batches",
        verdict.jobs, verdict.succeeded, verdict.batches
    ));
    for (number, attempts) in &verdict.creates {
        say(&format!("{attempts:6}  attempts with {number} creates that reached Gemini"));
    }
    let longest = takeovers.iter().max().copied().unwrap_or_default();
    say(&format!(
        "{:6.1}  s at most from a kill to the next leader ({} times)",
        longest.as_secs_f64(),
        takeovers.len()
    ));
    let slowest = recoveries.iter().max().cloned().unwrap_or_default();
    say(&format!(
        "{:6.1}  s at most from a kill between request and record to the record ({} jobs; slowest {}), {:.0} s on the operator's clock",
        slowest.0.as_secs_f64(),
        recoveries.len(),
        slowest.1,
        slowest.0.as_secs_f64() * f64::from(factor)
    ));
    for (what, list) in [
        ("attempts with more than one batch created", &verdict.duplicates),
        ("attempts with more than one batch left running", &verdict.running),
        ("jobs lost", &verdict.lost),
        ("jobs stuck", &verdict.stuck),
        ("jobs that ended otherwise than their batch", &verdict.mismatches),
        ("processes that ended or panicked by themselves", &odd),
        ("times without a leader for half a minute", &leaderless),
    ] {
        say(&format!("{:6}  {what}", list.len()));
        for one in list.iter().take(10) {
            say(&format!("          {one}"));
        }
    }
}

/// For each protection: without it there are duplicates under the fault it is there for, with it there are none.
async fn can_fail(args: &Args) -> anyhow::Result<bool> {
    // A longer grace: what happens without it has to happen within it, also on a slow machine.
    let s = Scale { factor: args.factor, grace: 160, ..Scale::DEFAULT };
    let grace = s.real(s.grace);
    // Answer lost, and shown in listings only after a while: for as long, the grace waits.
    let lagging = |protection| Broken {
        protection,
        create: Create::CommittedUnavailable,
        list_lag: f64::from(s.grace) * 0.8,
        jobs: 4,
    };
    // It arrives when the next one has been sent: the fence makes it fail.
    let late = |protection| Broken {
        protection,
        create: Create::CommittedLate { after: grace * 2 },
        list_lag: 0.0,
        jobs: 4,
    };
    // Answer lost, and found by looking for it.
    let lost = |protection| Broken { protection, create: Create::CommittedReset, list_lag: 0.0, jobs: 4 };
    let cases = [
        ("no grace", true, lagging("grace")),
        ("no fence", true, late("fence")),
        ("no adoption", true, lost("adoption")),
        ("all there, the grace's fault", false, lagging("")),
        ("all there, the fence's fault", false, late("")),
        ("all there, the adoption's fault", false, lost("")),
    ];
    let ground = ground(args).await?;
    let mut cells = Vec::new();
    for (number, (.., broken)) in cases.iter().enumerate() {
        let setup = Setup { broken: Some(*broken), scale: s, ..setup(args, 0, ground.dir.clone()) };
        cells.push(Cell::new(&ground.cluster, number as u64, setup).await?);
    }
    let running = try_join_all(cells.iter().map(|cell| cell.run(Instant::now()))).await?;
    let mut good = true;
    for ((name, expected, _), cell) in cases.iter().zip(&cells) {
        let verdict = judge(cell).await?;
        let found = verdict.duplicates.len();
        let as_expected = (found > 0) == *expected && (*expected || verdict.is_good());
        say(&format!(
            "{}  {name}: {found} of {} attempts with more than one batch",
            if as_expected { "ok    " } else { "FAILED" },
            verdict.jobs
        ));
        if !as_expected {
            say(&format!("{verdict:?}"));
            say(&verdict.evidence);
        }
        good &= as_expected;
    }
    drop(running);
    Ok(good)
}
