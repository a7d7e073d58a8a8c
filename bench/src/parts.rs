//! The processes that are measured, each of its own: control plane, simulator, operator.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::machine::Usage;

/// Longer than any part takes to come up or to stop.
const PATIENCE: Duration = Duration::from_mins(2);

/// A child that ends with this process, and when it is dropped.
pub struct Part {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Part {
    /// Starts one, whose log goes to a file of its own.
    pub fn start(name: &'static str, command: &mut Command, logs: &Path) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = std::fs::File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("could not start {name}"))?;
        Ok(Self { name, child, log })
    }

    /// Its process id.
    pub fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().with_context(|| format!("{} has ended, see {}", self.name, self.log.display()))
    }

    /// Fails if it has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}), see {}", self.name, self.log.display()),
        }
    }

    /// Ends it without asking.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Asks it to end, and waits until it has.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let pid = i32::try_from(self.pid()?)?;
        kill_process(Pid::from_raw(pid).context("no process id")?, Signal::TERM)?;
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        let status = ended.with_context(|| format!("{} does not stop", self.name))??;
        ensure!(
            status.success(),
            "{} did not stop in order ({status}), see {}",
            self.name,
            self.log.display()
        );
        Ok(())
    }
}

/// etcd, API server and controller manager.
pub struct ControlPlane {
    part: Part,
    binary: PathBuf,
    pub kubeconfig: PathBuf,
}

impl ControlPlane {
    pub async fn start(binary: &Path, logs: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(binary);
        command.arg("up").stdout(Stdio::piped());
        let mut part = Part::start("control-plane", &mut command, logs)?;
        let output = part.child.stdout.take().context("no output")?;
        let line = tokio::time::timeout(PATIENCE, BufReader::new(output).lines().next_line()).await;
        let line = line.context("the control plane does not come up")??;
        let kubeconfig =
            line.with_context(|| format!("the control plane ended, see {}", part.log.display()))?;
        Ok(Self { part, binary: binary.to_owned(), kubeconfig: kubeconfig.trim().into() })
    }

    fn dir(&self) -> &Path {
        self.kubeconfig.parent().unwrap_or(Path::new("."))
    }

    pub fn audit_log(&self) -> PathBuf {
        self.dir().join("audit.log")
    }

    /// Process ids of API server and etcd.
    pub async fn pids(&self) -> anyhow::Result<[u32; 2]> {
        let out =
            Command::new(&self.binary).args(["ctl", "--dir"]).arg(self.dir()).arg("status").output().await?;
        let text = String::from_utf8(out.stdout)?;
        let pid = |name: &str| -> anyhow::Result<u32> {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
            let pid = line.and_then(|line| line.rsplit(' ').next()).and_then(|pid| pid.parse().ok());
            pid.with_context(|| format!("{name} does not run: {text}"))
        };
        Ok([pid("kube-apiserver")?, pid("etcd")?])
    }

    pub async fn stop(self) -> anyhow::Result<()> {
        self.part.stop().await
    }
}

/// A clock that both the simulator and the operator go by.
#[derive(Clone, Copy)]
pub struct Clock {
    pub origin_ms: i64,
    pub factor: u32,
}

/// The simulator of the Gemini API.
pub struct Simulator {
    part: Part,
    pub url: String,
    http: reqwest::Client,
}

impl Simulator {
    /// Its batches wait and run for `seconds`, on the clock.
    pub async fn start(
        binary: &Path,
        seconds: u32,
        clock: Option<Clock>,
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let name = if clock.is_some() { "simulator-fast" } else { "simulator" };
        let port_file = logs.join(format!("{name}.port"));
        let _ = std::fs::remove_file(&port_file); // of one before it
        let mut command = Command::new(binary);
        command.args(["--listen=127.0.0.1:0", "--pending-seconds=0.2"]);
        command.arg(format!("--running-seconds={seconds}")).arg("--port-file").arg(&port_file);
        if let Some(clock) = clock {
            command.arg(format!("--speed={}", clock.factor));
            command.arg(format!("--clock-factor={}", clock.factor));
            command.arg(format!("--clock-origin-unix-ms={}", clock.origin_ms));
        }
        let mut part = Part::start(name, &mut command, logs)?;
        let start = Instant::now();
        let address = loop {
            part.check()?;
            match std::fs::read_to_string(&port_file) {
                Ok(text) if text.parse::<SocketAddr>().is_ok() => break text,
                _ => ensure!(start.elapsed() < PATIENCE, "the simulator does not come up"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        Ok(Self { part, url: format!("http://{address}"), http: reqwest::Client::new() })
    }

    pub fn pid(&self) -> anyhow::Result<u32> {
        self.part.pid()
    }

    /// What a control answers.
    pub async fn get(&self, control: &str) -> anyhow::Result<Value> {
        let answer = self.http.get(format!("{}/_sim/{control}", self.url)).send().await?;
        Ok(serde_json::from_slice(&answer.error_for_status()?.bytes().await?)?)
    }

    /// Ends a batch.
    pub async fn finish(&self, batch: &str) -> anyhow::Result<()> {
        let order = serde_json::json!({"batch": batch, "outcome": "succeeded"});
        let answer = self.http.post(format!("{}/_sim/finish", self.url)).json(&order).send().await?;
        answer.error_for_status().with_context(|| format!("ending {batch}"))?;
        Ok(())
    }

    pub async fn stop(self) -> anyhow::Result<()> {
        self.part.stop().await
    }
}

/// The operator, as `run` starts it.
pub struct Operator {
    part: Part,
}

impl Operator {
    /// Returns when it leads and has listed all jobs. On a clock of its own it works on one namespace only. `more`: flags
    /// that the measuring needs besides.
    pub async fn start(
        binary: &Path,
        control_plane: &ControlPlane,
        simulator: &Simulator,
        own: Option<(&str, Clock)>,
        more: &[String],
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let (callbacks, admin) = (free_address()?, free_address()?);
        let mut command = Command::new(binary);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("GBO_")) {
            command.env_remove(name);
        }
        command.env("KUBECONFIG", &control_plane.kubeconfig).env("TMPDIR", logs).stdout(Stdio::null());
        command.args(["run", "--allow-insecure-upstream", "--allow-insecure-callbacks"]);
        command.arg(format!("--gemini-base-url={}", simulator.url));
        command.arg(format!("--external-url=http://{callbacks}"));
        command.arg(format!("--listen={callbacks}")).arg(format!("--admin-listen={admin}")).args(more);
        let name = if let Some((namespace, clock)) = own {
            command.arg(format!("--namespace={namespace}")).arg(format!("--watch-namespaces={namespace}"));
            command.arg("--cluster-id=bench");
            command.arg(format!("--clock-origin-unix-ms={}", clock.origin_ms));
            command.arg(format!("--clock-factor={}", clock.factor));
            // The lease keeps its real length: one of milliseconds can't be held on a busy machine.
            for (flag, seconds) in [("lease", 15), ("lease-renew-deadline", 10), ("lease-retry", 2)] {
                command.arg(format!("--{flag}-seconds={}", seconds * clock.factor));
            }
            // The same goes for a create, and the grace is longer than both.
            for (flag, seconds) in [("create-timeout", 180), ("resend-grace", 600)] {
                command.arg(format!("--{flag}-seconds={}", seconds * clock.factor));
            }
            "operator-fast"
        } else {
            command.arg("--namespace=default");
            "operator"
        };
        let mut part = Part::start(name, &mut command, logs)?;
        let http = reqwest::Client::new();
        let get = async |path: &str| -> Option<String> {
            let answer = http.get(format!("http://{admin}/{path}")).send().await.ok()?;
            answer.error_for_status().ok()?.text().await.ok()
        };
        let start = Instant::now();
        loop {
            part.check()?;
            let leads = get("metrics").await.is_some_and(|m| m.lines().any(|l| l == "gemini_batch_leader 1"));
            // in this order: before it leads, it is ready with nothing listed
            if leads && get("readyz").await.is_some() {
                return Ok(Self { part });
            }
            ensure!(start.elapsed() < PATIENCE, "the operator does not come up, see {}", part.log.display());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn pid(&self) -> anyhow::Result<u32> {
        self.part.pid()
    }

    pub fn usage(&self) -> anyhow::Result<Usage> {
        Usage::of(self.part.pid()?)
    }

    /// Ends it without asking.
    pub async fn kill(self) -> anyhow::Result<()> {
        self.part.kill().await
    }

    pub async fn stop(self) -> anyhow::Result<()> {
        self.part.stop().await
    }
}

/// An address of this machine that nobody listens on.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
