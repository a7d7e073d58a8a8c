//! What the measuring needs of the machine: two cores, enough file descriptors, and `/proc`.

use anyhow::{Context as _, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The first two cores that this process may use: one for the servers, one for the load.
pub fn two_cores() -> anyhow::Result<[usize; 2]> {
    let allowed = sched_getaffinity(None)?;
    let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
    let both = cores.next().zip(cores.next());
    let (server, load) = both
        .context("this needs two cores: on one, server and load would take turns and measure each other")?;
    Ok([server, load])
}

/// Keeps this process, and every thread that it starts from now on, on one core.
pub fn pin(core: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("could not pin this process to core {core}"))
}

/// Lets this process, and those that it starts, have so many files open.
pub fn allow_open_files(wanted: u64) -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    ensure!(
        limit.maximum.is_none_or(|maximum| maximum >= wanted),
        "the limit of open files is too low: {wanted} are needed, 'ulimit -Hn' says {}",
        limit.maximum.unwrap_or_default()
    );
    let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).context("could not raise the limit of open files")
}

/// Memory and time of a process, as the kernel counts them.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Resident memory now, in KiB.
    pub rss: u64,
    /// The most it ever was, in KiB.
    pub peak: u64,
    /// Processor time so far, in nanoseconds.
    pub cpu: u64,
}

impl Usage {
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
            .context("the server is gone: see above for what it said")?;
        let field = |name: &str| -> anyhow::Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next());
            number.and_then(|n| n.parse().ok()).with_context(|| format!("no {name} in /proc/{pid}/status"))
        };
        // finer than the hundredths of a second in /proc/PID/stat
        let mut cpu = 0;
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let times = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            let ran = times.split(' ').next().and_then(|ran| ran.parse::<u64>().ok());
            cpu += ran.context("no time in schedstat")?;
        }
        Ok(Self { rss: field("VmRSS:")?, peak: field("VmHWM:")?, cpu })
    }
}
