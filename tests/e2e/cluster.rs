//! The cluster, and the tools that a user has: kubectl and helm.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::checks::ensure;

/// Where the operator is installed.
pub const HOME: &str = "gemini-batch-system";
/// Where jobs are.
pub const TEAM: &str = "team-a";
/// Where jobs are that the operator may have to leave alone.
pub const OTHERS: &str = "team-b";
/// Name of the release.
pub const RELEASE: &str = "gbo";

pub struct Cluster {
    kubeconfig: PathBuf,
    kubectl: PathBuf,
    helm: PathBuf,
    /// `None` on a cluster that somebody else runs.
    own: Option<Own>,
    /// Files of this run.
    pub scratch: TempDir,
    /// What the machine had mounted before.
    mounts: Vec<String>,
}

struct Own {
    child: Child,
}

impl Cluster {
    /// Starts one, or takes the one that is given; loads the images.
    pub fn start() -> anyhow::Result<Self> {
        let devcluster = from_env("GBO_DEVCLUSTER", "the binary of hack/devcluster")?;
        let helm = from_env("GBO_HELM", "helm")?;
        let images = from_env("GBO_E2E_IMAGES", "the folder with the image archives")?;
        let kubectl = devcluster.with_file_name("kubectl");
        let scratch = tempfile::Builder::new().prefix("gbo-e2e-").tempdir()?;
        let mounts = mounts()?;
        let mut archives = vec![];
        for name in ["gemini-batch-operator.tar", "gemini-simulator.tar", "kubectl.tar"] {
            archives.push(images.join(name));
        }
        let mut cluster = if let Some(given) = std::env::var_os("E2E_KUBECONFIG") {
            let load = std::env::var("E2E_LOAD").context(
                "E2E_LOAD is missing: the command that gives an image archive to the nodes of that cluster, for example \
                 E2E_LOAD='kind load image-archive'",
            )?;
            for archive in &archives {
                let mut words = load.split_whitespace().map(str::to_owned);
                let program = words.next().context("E2E_LOAD is empty")?;
                run(Command::new(program).args(words).arg(archive))?;
            }
            Self { kubeconfig: given.into(), kubectl, helm, own: None, scratch, mounts }
        } else {
            eprintln!("starting a node: kubelet, containerd, network and DNS in namespaces of their own");
            let dir = scratch.path().join("c");
            let mut child = Command::new(&devcluster)
                .args(["up", "--node", "--dir"])
                .arg(&dir)
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| devcluster.display().to_string())?;
            let mut line = String::new();
            let out = child.stdout.take().context("no stdout")?;
            BufReader::new(out).read_line(&mut line)?;
            if line.trim().is_empty() {
                bail!("devcluster up --node did not come up, see above");
            }
            let kubeconfig = PathBuf::from(line.trim());
            let this = Self { kubeconfig, kubectl, helm, own: Some(Own { child }), scratch, mounts };
            run(Command::new(&devcluster).args(["image", "load", "--dir"]).arg(&dir).args(&archives))?;
            this
        };
        cluster.with_own_kubeconfig()?;
        for namespace in [HOME, TEAM, OTHERS] {
            cluster.kubectl(&["create", "namespace", namespace])?;
        }
        Ok(cluster)
    }

    /// A copy, whose current namespace may be changed.
    fn with_own_kubeconfig(&mut self) -> anyhow::Result<()> {
        let text = self.kubectl(&["config", "view", "--raw", "--minify", "--flatten"])?;
        self.kubeconfig = self.scratch.path().join("kubeconfig");
        std::fs::write(&self.kubeconfig, text)?;
        Ok(())
    }

    /// `kubectl ARGS`: what it printed, or an error with what it complained about.
    pub fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        run(self.kubectl_command().args(args))
    }

    /// The same with an input on stdin (`-f -`).
    pub fn kubectl_with(&self, args: &[&str], input: &str) -> anyhow::Result<String> {
        let mut command = self.kubectl_command();
        let mut child = command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("kubectl")?;
        child.stdin.take().context("no stdin")?.write_all(input.as_bytes())?;
        told(&format!("kubectl {}", args.join(" ")), &child.wait_with_output()?)
    }

    /// `kubectl ARGS -o json`.
    pub fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let args: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        Ok(serde_json::from_str(&self.kubectl(&args)?)?)
    }

    /// To be started by the caller.
    pub fn kubectl_command(&self) -> Command {
        self.with_kubeconfig(Command::new(&self.kubectl))
    }

    /// The cluster as the owner of this token sees it.
    pub fn kubeconfig_with_token(&self, token: &str) -> anyhow::Result<PathBuf> {
        let mut config: Value =
            serde_json::from_str(&self.kubectl(&["config", "view", "--raw", "--minify", "-o", "json"])?)?;
        for user in config["users"].as_array_mut().context("no users")? {
            user["user"] = serde_json::json!({"token": token});
        }
        let file = self.scratch.path().join("token.kubeconfig");
        std::fs::write(&file, config.to_string())?;
        Ok(file)
    }

    /// A program that finds the cluster.
    pub fn with_kubeconfig(&self, mut command: Command) -> Command {
        command.env("KUBECONFIG", &self.kubeconfig);
        command
    }

    /// `helm ARGS`.
    pub fn helm(&self, args: &[&str]) -> anyhow::Result<String> {
        eprintln!("   helm {}", args.join(" "));
        // Nothing of the user's own helm.
        let home = self.scratch.path().join("helm");
        run(self
            .with_kubeconfig(Command::new(&self.helm))
            .env("HELM_CONFIG_HOME", &home)
            .env("HELM_CACHE_HOME", &home)
            .env("HELM_DATA_HOME", &home)
            .args(args))
    }

    /// What an administrator would look at.
    pub fn explain(&self) {
        let looks: [&[&str]; 5] = [
            &["get", "pods", "-A", "-o", "wide"],
            &["get", "gbj", "-A", "-o", "wide"],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
            &["-n", HOME, "describe", "pods"],
            &["-n", HOME, "logs", "--prefix", "--tail=60", "-l", "app.kubernetes.io/instance=gbo"],
        ];
        for args in looks {
            eprintln!("---- kubectl {}", args.join(" "));
            match self.kubectl(args) {
                Ok(text) => eprintln!("{text}"),
                Err(error) => eprintln!("{error:#}"),
            }
        }
    }

    /// Takes down what was started, and sees it gone.
    pub fn end(mut self) -> anyhow::Result<()> {
        let Some(own) = &mut self.own else {
            for namespace in [HOME, TEAM, OTHERS, "google"] {
                self.kubectl(&["delete", "namespace", namespace, "--timeout=120s"])?;
            }
            // It outlives the chart, with all jobs; there are none any more.
            self.kubectl(&["delete", "crd", "geminibatchjobs.geminibatch.dev", "--timeout=60s"])?;
            return Ok(());
        };
        own.stop()?;
        let left: Vec<String> = mounts()?.into_iter().filter(|mount| !self.mounts.contains(mount)).collect();
        ensure(left.is_empty(), || format!("the cluster left mounts behind: {left:#?}"))?;
        let dir = self.scratch.path().display().to_string();
        let processes = processes_that_name(&dir)?;
        ensure(processes.is_empty(), || format!("the cluster left processes behind: {processes:#?}"))
    }
}

impl Own {
    fn stop(&mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_some() {
            bail!("the cluster ended by itself, see above");
        }
        // SIGTERM by the shell's tool: the standard library only knows SIGKILL, after which it could not tidy up.
        run(Command::new("kill").arg(self.child.id().to_string()))?;
        let status = self.child.wait()?;
        ensure(status.success(), || format!("devcluster ended with {status}"))
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.stop();
        }
    }
}

fn from_env(name: &str, what: &str) -> anyhow::Result<PathBuf> {
    let value = std::env::var_os(name).filter(|v| !v.is_empty());
    Ok(value
        .with_context(|| format!("{name} is missing ({what}): run this by `make e2e`, which sets it"))?
        .into())
}

/// Runs it to its end.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let name =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let output = command.output().with_context(|| name.clone())?;
    told(&format!("{name} {}", args.join(" ")), &output)
}

fn told(what: &str, output: &std::process::Output) -> anyhow::Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{what}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(text)
}

fn mounts() -> anyhow::Result<Vec<String>> {
    Ok(std::fs::read_to_string("/proc/mounts")?.lines().map(str::to_owned).collect())
}

fn processes_that_name(dir: &str) -> anyhow::Result<Vec<String>> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc")? {
        let Ok(line) = std::fs::read(entry?.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(dir) {
            found.push(line);
        }
    }
    Ok(found)
}
