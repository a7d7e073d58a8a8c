//! The control plane: etcd, the real kube-apiserver and its controllers, by `hack/devcluster`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::conditions::is_crd_established;
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

const CRD: &str = include_str!("../../crds/geminibatchjobs.yaml");

/// How long the API server may take to be back.
const PATIENCE: Duration = Duration::from_mins(2);

/// A control plane. It ends with this value, and with this process.
pub struct Cluster {
    binary: PathBuf,
    pub kubeconfig: PathBuf,
    _child: Child,
}

impl Cluster {
    /// Starts one, with the CRD installed.
    pub async fn start(binary: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(binary)
            .arg("up")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("the control plane {} can't be started", binary.display()))?;
        let out = child.stdout.take().context("no output")?;
        let line = BufReader::new(out).lines().next_line().await?.unwrap_or_default();
        ensure!(!line.trim().is_empty(), "the control plane did not come up: try `{} up`", binary.display());
        let cluster = Self { binary: binary.to_owned(), kubeconfig: line.trim().into(), _child: child };
        let client = cluster.client().await?;
        let crds: Api<CustomResourceDefinition> = Api::all(client);
        let crd: CustomResourceDefinition = serde_yaml::from_str(CRD)?;
        let params = PatchParams::apply("chaos").force();
        crds.patch(&crd.name_any(), &params, &Patch::Apply(&crd)).await?;
        tokio::time::timeout(PATIENCE, await_condition(crds, &crd.name_any(), is_crd_established()))
            .await??;
        Ok(cluster)
    }

    /// A client of the API server itself.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let file = Kubeconfig::read_from(&self.kubeconfig)?;
        let mut config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        config.read_timeout = Some(Duration::from_secs(10));
        config.write_timeout = Some(Duration::from_secs(10));
        config.connect_timeout = Some(Duration::from_secs(5));
        Ok(Client::try_from(config)?)
    }

    /// `restart`, `pause` or `resume` of the API server; returns when it is done.
    pub async fn api_server(&self, command: &str) -> anyhow::Result<()> {
        let dir = self.kubeconfig.parent().context("the kubeconfig is in no directory")?;
        let out = Command::new(&self.binary)
            .args(["ctl", "--dir"])
            .arg(dir)
            .args([command, "kube-apiserver"])
            .output()
            .await?;
        ensure!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }
}

/// Tries until it works: the API server is away every now and then, on purpose.
pub async fn insist<T, F: Future<Output = Result<T, kube::Error>>>(
    what: &str,
    mut call: impl FnMut() -> F,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        match call().await {
            Ok(done) => return Ok(done),
            // Written before, and the answer was lost.
            Err(kube::Error::Api(status)) if status.code == 422 || status.code == 403 => {
                bail!("{what}: {status:?}")
            }
            Err(error) if start.elapsed() > PATIENCE => return Err(error).context(what.to_owned()),
            Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
        }
    }
}
