//! `make bench-receiver`: the receiver beside bare axum, in one run, over loopback.
//!
//! Every server is a process of its own on one core; the load has the other. Ours and the bare one take turns, round
//! by round, so that whatever else the machine does meets both. What is compared is a ratio: absolute numbers say
//! more about the machine. Some statements are hard, and the exit code is 1 if one of them does not hold.

mod load;
mod mail;
pub mod server;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use bytes::Bytes;

use self::load::{Connections, Outcome, healthz};
use self::mail::{Event, Senders};
use self::server::{Counts, Kind, Server};
use crate::machine::{self, Usage};
use crate::numbers::{median, mib};
use crate::say;

const ROUNDS: usize = 7;
const CONNECTIONS: usize = 64;
/// Requests to warm up with.
const WARM_UP: usize = 2_000;

const FLOOD: &str = "flood";
const FLOOD_CONNECTIONS: usize = 2_000;
const FLOOD_REQUESTS: usize = 100_000;
const FLOOD_MORE_KIB: u64 = 8 * 1024;
const FLOOD_HEALTHZ: Duration = Duration::from_secs(1);

/// The whole run ends by then, one way or the other.
const DEADLINE: Duration = Duration::from_mins(10);

/// Measures the cases whose name contains `only`. Returns the hard statements that do not hold.
pub fn measure(only: &str) -> anyhow::Result<Vec<String>> {
    if cfg!(debug_assertions) {
        bail!("measuring a debug build says nothing: use 'make bench-receiver'");
    }
    let [server_core, load_core] = machine::two_cores()?;
    // one for each connection, and some to spare; the servers inherit it
    machine::allow_open_files(FLOOD_CONNECTIONS as u64 + 200)?;
    machine::pin(load_core)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let run = async {
            let senders = Senders::new()?;
            cases(&senders, server_core, only).await?;
            if FLOOD.contains(only) { flood(&senders, server_core).await } else { Ok(Vec::new()) }
        };
        tokio::time::timeout(DEADLINE, run).await.context("the run took too long")?
    })
}

/// One comparison.
struct Case<'a> {
    name: &'static str,
    /// What ours should reach of the bare one's speed.
    goal: Option<f64>,
    ours: Kind,
    bare: Kind,
    /// The answers of ours and of the bare one.
    statuses: [u16; 2],
    /// In each round.
    requests: usize,
    /// The requests of a round. Fewer than `requests` are sent over and over again.
    make: Box<dyn Fn(usize) -> anyhow::Result<Vec<Bytes>> + 'a>,
}

async fn cases(senders: &Senders, core: usize, only: &str) -> anyhow::Result<()> {
    let (n, e) = senders.rsa();
    let keys = |count| Kind::Ed25519 { keys: senders.ed25519(count) };
    let receiver = |count| Kind::Receiver { jwks: senders.ed25519_jwks(count) };
    // accepted deliveries are all different, and of different jobs, else they would be duplicates or throttled
    let fresh = |count: usize, round: usize| (0..count).map(move |n| Event::new(round * count + n, round));
    let all = [
        Case {
            name: "wrong token, against a bare 404",
            goal: Some(0.9),
            ours: receiver(3),
            bare: Kind::NotFound,
            statuses: [401, 404],
            requests: 60_000,
            make: Box::new(move |round| fresh(500, round).map(|event| senders.wrong_token(&event)).collect()),
        },
        Case {
            name: "v1a, one key",
            goal: Some(0.8),
            ours: receiver(1),
            bare: keys(1),
            statuses: [200, 200],
            requests: 8_000,
            make: Box::new(move |round| {
                Ok(fresh(8_000, round).map(|event| senders.v1a(&event, 2)).collect())
            }),
        },
        Case {
            name: "v1a, three keys, the last signs (remembered after the first)",
            goal: Some(0.8),
            ours: receiver(3),
            bare: keys(3),
            statuses: [200, 200],
            requests: 8_000,
            make: Box::new(move |round| {
                Ok(fresh(8_000, round).map(|event| senders.v1a(&event, 2)).collect())
            }),
        },
        Case {
            // the search goes up from the key that fitted last: the one before it is found last
            name: "v1a, three keys sign in turn (the remembered one never fits)",
            goal: Some(0.8),
            ours: receiver(3),
            bare: keys(3),
            statuses: [200, 200],
            requests: 5_000,
            make: Box::new(move |round| {
                let signed = fresh(5_000, round).enumerate().map(|(n, event)| senders.v1a(&event, 2 - n % 3));
                Ok(signed.collect())
            }),
        },
        Case {
            name: "JWT (RS256)",
            goal: None,
            ours: Kind::Receiver { jwks: senders.rsa_jwks() },
            bare: Kind::Rs256 { n, e },
            statuses: [200, 200],
            requests: 4_000,
            make: Box::new(move |round| fresh(4_000, round).map(|event| senders.jwt(&event)).collect()),
        },
        Case {
            name: "forged v1a (good token), three keys",
            goal: None,
            ours: receiver(3),
            bare: keys(3),
            statuses: [401, 401],
            requests: 5_000,
            make: Box::new(move |round| Ok(fresh(500, round).map(|event| senders.forged(&event)).collect())),
        },
    ];
    say(&format!(
        "receiver beside bare axum: {ROUNDS} rounds each in turn, {CONNECTIONS} connections, server on one core"
    ));
    for case in all.iter().filter(|case| case.name.contains(only)) {
        run(case, core).await?;
    }
    Ok(())
}

/// What one server did in all rounds.
#[derive(Default)]
struct Side {
    per_second: Vec<f64>,
    per_cpu_second: Vec<f64>,
    latencies: Vec<u32>,
}

impl Side {
    async fn round(
        &mut self,
        server: &Server,
        requests: &Rc<[Bytes]>,
        total: usize,
        status: u16,
    ) -> anyhow::Result<()> {
        let mut connections = Connections::open(server.address(), CONNECTIONS).await?;
        let before = server.usage()?;
        let outcome = connections.send(requests, total).await?;
        let cpu = server.usage()?.cpu - before.cpu;
        expect(&outcome, status, total)?;
        let total = f64::from(u32::try_from(total)?);
        self.per_second.push(total / outcome.took.as_secs_f64());
        self.per_cpu_second.push(total / Duration::from_nanos(cpu).as_secs_f64());
        self.latencies.extend(outcome.latencies);
        Ok(())
    }

    fn describe(&mut self, name: &str, [before, after]: [Usage; 2]) -> String {
        self.latencies.sort_unstable();
        let percentile = |p: usize| f64::from(self.latencies[(self.latencies.len() - 1) * p / 100]) / 1000.0;
        format!(
            "  {name:<9} {:>7.0} req/s  {:>7.0} per second of its core  p50 {:>6.2} ms  p99 {:>6.2} ms  memory {:>5.1} -> {:>5.1} MiB",
            median(&self.per_second),
            median(&self.per_cpu_second),
            percentile(50),
            percentile(99),
            mib(before.rss),
            mib(after.rss),
        )
    }
}

fn expect(outcome: &Outcome, status: u16, total: usize) -> anyhow::Result<()> {
    ensure!(
        outcome.statuses.len() == 1 && outcome.statuses.get(&status) == Some(&total),
        "{total} answers {status} were expected, these came: {:?}",
        outcome.statuses
    );
    Ok(())
}

async fn run(case: &Case<'_>, core: usize) -> anyhow::Result<()> {
    let servers = [Server::start(case.ours.clone(), core)?, Server::start(case.bare.clone(), core)?];
    let before = [servers[0].usage()?, servers[1].usage()?];
    let mut sides = [Side::default(), Side::default()];

    let warm_up: Rc<[Bytes]> = (case.make)(ROUNDS)?.into_iter().take(WARM_UP).collect();
    for (server, status) in servers.iter().zip(case.statuses) {
        let total = warm_up.len();
        Side::default().round(server, &warm_up, total, status).await.context(case.name)?;
    }
    for round in 0..ROUNDS {
        let requests: Rc<[Bytes]> = (case.make)(round)?.into();
        // whoever begins has the colder machine: by turns
        for side in [round % 2, (round + 1) % 2] {
            sides[side]
                .round(&servers[side], &requests, case.requests, case.statuses[side])
                .await
                .context(case.name)?;
        }
    }
    let ratio = |of: fn(&Side) -> &Vec<f64>| {
        let each: Vec<f64> = of(&sides[0]).iter().zip(of(&sides[1])).map(|(a, b)| a / b).collect();
        median(&each)
    };
    let by_cpu = ratio(|side| &side.per_cpu_second);
    let by_clock = ratio(|side| &side.per_second);
    let verdict = match case.goal {
        None => String::new(),
        Some(goal) if by_cpu >= goal => format!(", goal {:.0} %: met", goal * 100.0),
        Some(goal) => format!(", goal {:.0} %: MISSED", goal * 100.0),
    };
    say(case.name);
    for (n, name) in ["receiver", "bare"].into_iter().enumerate() {
        say(&sides[n].describe(name, [before[n], servers[n].usage()?]));
    }
    say(&format!(
        "  ratio     {:.1} % per second of its core{verdict} ({:.1} % by the clock)",
        by_cpu * 100.0,
        by_clock * 100.0
    ));
    Ok(())
}

/// Many connections, all with a wrong token.
async fn flood(senders: &Senders, core: usize) -> anyhow::Result<Vec<String>> {
    say(&format!(
        "{FLOOD}: {FLOOD_REQUESTS} requests with a wrong token over {FLOOD_CONNECTIONS} connections"
    ));
    let requests: Rc<[Bytes]> =
        (0..500).map(|n| senders.wrong_token(&Event::new(n, 0))).collect::<anyhow::Result<_>>()?;
    let mut peaks = Vec::new();
    let mut broken = Vec::new();
    let receiver = Kind::Receiver { jwks: senders.ed25519_jwks(3) };
    for (name, kind, status) in [("bare", Kind::NotFound, 404), ("receiver", receiver, 401)] {
        let mut server = Server::start(kind, core)?;
        let before = (server.usage()?, server.counts()?);
        let probe = Probe::start(&server)?;
        let mut connections = Connections::open(server.address(), FLOOD_CONNECTIONS).await?;
        let outcome = connections.send(&requests, FLOOD_REQUESTS).await?;
        // all connections are still open
        let (usage, counts) = (server.usage()?, server.counts()?);
        let (answers, slowest) = probe.stop()?;
        drop(connections);
        expect(&outcome, status, FLOOD_REQUESTS)?;
        say(&format!(
            "  {name:<9} {:>7.0} req/s  memory {:.1} -> at most {:.1} MiB  /healthz answered {answers} times, at most {} ms",
            f64::from(u32::try_from(FLOOD_REQUESTS)?) / outcome.took.as_secs_f64(),
            mib(before.0.rss),
            mib(usage.peak),
            slowest.as_millis()
        ));
        peaks.push(usage.peak);
        if counts != before.1 {
            broken.push(format!("no request leaves the receiver: before {:?}, after {counts:?}", before.1));
        }
        if name == "receiver" {
            let Counts { key_fetches, ring_reads, hint_writes } = before.1;
            say(&format!(
                "  requests  to the key endpoint {}, to read the key ring {}, to store hints {} (before the flood: {key_fetches}, {ring_reads}, {hint_writes})",
                counts.key_fetches - key_fetches,
                counts.ring_reads - ring_reads,
                counts.hint_writes - hint_writes
            ));
        }
        if slowest > FLOOD_HEALTHZ {
            broken.push(format!("/healthz of {name} answers within 1 s: it took {slowest:?}"));
        }
    }
    let [bare, ours] = peaks[..] else { bail!("two servers were measured") };
    let more = ours.saturating_sub(bare);
    say(&format!("  memory    {:.1} MiB more than bare axum at the most, the limit is 8", mib(more)));
    if more > FLOOD_MORE_KIB {
        broken.push(format!("at most 8 MiB more memory than bare axum: it took {:.1} MiB more", mib(more)));
    }
    Ok(broken)
}

/// Asks `/healthz` all the time, on a thread of its own.
struct Probe {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<anyhow::Result<(usize, Duration)>>,
}

impl Probe {
    fn start(server: &Server) -> anyhow::Result<Self> {
        let (admin, stop) = (server.admin(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("healthz".to_owned()).spawn(move || {
            let (mut answers, mut slowest) = (0, Duration::ZERO);
            loop {
                // at least once, and once more after the end
                let last = stopped.load(Ordering::SeqCst);
                let took = healthz(admin, FLOOD_HEALTHZ * 5).context("/healthz did not answer")?;
                slowest = slowest.max(took);
                answers += 1;
                if last {
                    return Ok((answers, slowest));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        })?;
        Ok(Self { stop, thread })
    }

    fn stop(self) -> anyhow::Result<(usize, Duration)> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| anyhow!("the thread that asks /healthz has died"))?
    }
}
