//! A real API server for the whole test binary; for each test a namespace, a simulator and an operator of
//! its own, in this process or as the built binary.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock};
use std::time::{Duration, Instant};

use clap::Parser as _;
use gemini_batch_operator::api::{GeminiBatchJob, conditions};
use gemini_batch_operator::config::{Cli, Command as Sub, RunArgs};
use gemini_batch_operator::controller::Timings;
use gemini_batch_operator::{process, store, telemetry};
use gemini_simulator::{Config, LogEntry, Op, Simulator};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{conditions::is_crd_established, wait::await_condition};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// Longer than anything takes on a loaded machine; a test that gets here has failed.
pub const PATIENCE: Duration = Duration::from_secs(90);

pub const MODEL: &str = "gemini-2.5-flash";

/// A control plane.
pub struct Cluster {
    kubeconfig: PathBuf,
    binary: PathBuf,
    child: Mutex<Child>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Its components end with it.
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The one that most tests share. It ends when this process does.
pub fn shared_cluster() -> Arc<Cluster> {
    static CLUSTER: OnceLock<Arc<Cluster>> = OnceLock::new();
    Arc::clone(CLUSTER.get_or_init(|| Arc::new(Cluster::start())))
}

impl Cluster {
    /// A new one, with the CRD installed. For tests that stop its API server.
    pub fn start() -> Self {
        let root = env!("CARGO_MANIFEST_DIR");
        let binary = std::env::var("GBO_DEVCLUSTER").unwrap_or_else(|_| {
            let out = Command::new(format!("{root}/hack/devcluster/ensure.sh"))
                .stderr(Stdio::inherit())
                .output()
                .expect("hack/devcluster/ensure.sh builds the control plane; it needs bash and Go");
            assert!(
                out.status.success(),
                "the control plane could not be built: run `make test`, or see above"
            );
            String::from_utf8(out.stdout).unwrap().trim().to_owned()
        });
        let mut child = Command::new(&binary)
            .arg("up")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("the control plane {binary} can't be started ({e}): run `make test`"));
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.trim().is_empty(), "the control plane did not come up: try `{binary} up` by hand");
        let kubeconfig = PathBuf::from(line.trim());
        // The CRD is installed once, before any test goes on.
        let config = kubeconfig.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let client = Client::try_from(kube_config(&config).await).unwrap();
                let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
                let crd = gemini_batch_operator::api::crd::crd();
                let params = PatchParams::apply("test").force();
                crds.patch(&crd.name_any(), &params, &Patch::Apply(&crd)).await.unwrap();
                await_condition(crds, &crd.name_any(), is_crd_established()).await.unwrap();
                published(&client).await;
            });
        })
        .join()
        .unwrap();
        Self { kubeconfig, binary: binary.into(), child: Mutex::new(child) }
    }

    /// `stop`, `start`, `restart`, `pause` or `resume` of a component; returns when it is done.
    pub fn ctl(&self, command: &str, component: &str) {
        let dir = self.kubeconfig.parent().unwrap();
        let out = Command::new(&self.binary)
            .args(["ctl", "--dir"])
            .arg(dir)
            .args([command, component])
            .output()
            .unwrap();
        assert!(out.status.success(), "{command} {component}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

/// The schema is served a moment after the resource is; `kubectl explain` needs it.
async fn published(client: &Client) {
    let start = Instant::now();
    loop {
        let index = http::Request::get("/openapi/v3").body(Vec::new()).unwrap();
        let index: Value = client.request(index).await.unwrap();
        if index["paths"].get("apis/geminibatch.dev/v1alpha1").is_some() {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "the API server does not publish the schema");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub async fn kube_config(path: &Path) -> kube::Config {
    let file = Kubeconfig::read_from(path).unwrap();
    kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap()
}

/// An operator, or another program, as a process of its own.
pub struct Process {
    child: Child,
    pub log: PathBuf,
}

impl Process {
    /// Kills it, as the kernel would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it ends by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the process did not end: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether it has not ended.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Everything a test needs.
pub struct Env {
    pub client: Client,
    pub namespace: String,
    pub sim: Simulator,
    pub port: u16,
    pub admin_port: u16,
    pub cluster: Arc<Cluster>,
    extra: Vec<String>,
    stop: CancellationToken,
    dir: tempfile::TempDir,
}

/// Faster than a user would want, slower than a test would need.
pub fn timings() -> Timings {
    let quick = |list: &[i64]| list.iter().map(|ms| SignedDuration::from_millis(*ms)).collect::<Vec<_>>();
    Timings {
        hint_pauses: quick(&[100, 300, 600]),
        search_pauses: quick(&[200, 400, 800]),
        result_pauses: quick(&[100, 200, 400]),
        look_window: SignedDuration::from_secs(2),
        recheck: SignedDuration::from_millis(800),
        quota_first: SignedDuration::from_millis(300),
        quota_longest: SignedDuration::from_secs(2),
        trouble_first: SignedDuration::from_millis(100),
        trouble_longest: SignedDuration::from_secs(1),
        gone_after: SignedDuration::from_secs(1),
        cancel_pauses: quick(&[100, 300, 600]),
        stores: store::Timeouts {
            connect: Duration::from_secs(2),
            idle: Duration::from_secs(2),
            resume: Duration::from_millis(20),
        },
        ..Timings::default()
    }
}

impl Env {
    /// A namespace, a simulator whose batches take a tenth of a second, and the Secret `gemini`.
    pub async fn new() -> Self {
        Self::with(Config { speed: 600.0, ..Config::default() }, &[]).await
    }

    pub async fn with(config: Config, extra: &[&str]) -> Self {
        Self::on(shared_cluster(), config, extra).await
    }

    /// A simulator and an operator whose clocks both run `factor` times as fast.
    pub async fn scaled(factor: f64, extra: &[&str]) -> Self {
        Self::on_scaled(shared_cluster(), Self::scaled_config(factor), extra).await
    }

    pub fn scaled_config(factor: f64) -> Config {
        let origin = jiff::Timestamp::now().as_millisecond();
        Config { speed: factor, clock: gemini_simulator::Clock::scaled(origin, factor), ..Config::default() }
    }

    /// The operator's clock agrees with the simulator's.
    pub async fn on_scaled(cluster: Arc<Cluster>, config: Config, extra: &[&str]) -> Self {
        let origin = format!("--clock-origin-unix-ms={}", config.clock.origin);
        let factor = format!("--clock-factor={}", config.clock.factor);
        // A lease that lasts milliseconds can't be held on a busy machine: it keeps its real length.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "factors are small whole numbers"
        )]
        let scale = config.clock.factor.ceil() as u32;
        let lease = [
            format!("--lease-seconds={}", 15 * scale),
            format!("--lease-renew-deadline-seconds={}", 10 * scale),
            format!("--lease-retry-seconds={}", 2 * scale),
            // The same goes for a create, and the grace is longer than both.
            format!("--create-timeout-seconds={}", 180 * scale),
            format!("--resend-grace-seconds={}", 600 * scale),
        ];
        let more = [origin.as_str(), factor.as_str()].into_iter().chain(lease.iter().map(String::as_str));
        let extra: Vec<&str> = extra.iter().copied().chain(more).collect();
        Self::on(cluster, config, &extra).await
    }

    /// The same on a cluster of the test's own.
    pub async fn on(cluster: Arc<Cluster>, config: Config, extra: &[&str]) -> Self {
        let client = Client::try_from(kube_config(&cluster.kubeconfig).await).unwrap();
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let namespace = serde_json::from_value(json!({"metadata": {"generateName": "t-"}})).unwrap();
        let namespace = namespaces.create(&PostParams::default(), &namespace).await.unwrap().name_any();
        let sim = Simulator::start(config).await.unwrap();
        let (port, admin_port) = (free_port(), free_port());
        let dir = tempfile::tempdir().unwrap();
        let extra = extra.iter().map(|s| (*s).to_owned()).collect();
        let stop = CancellationToken::new();
        let env = Self { client, namespace, sim, port, admin_port, cluster, extra, stop, dir };
        env.secret("gemini", &json!({"apiKey": "test-key"})).await;
        env
    }

    fn args(&self) -> Vec<String> {
        let port = self.port;
        let mut args: Vec<String> = [
            "gemini-batch-operator",
            "run",
            &format!("--namespace={0}", self.namespace),
            &format!("--watch-namespaces={0}", self.namespace),
            "--cluster-id=test",
            &format!("--gemini-base-url={}", self.sim.base_url()),
            "--allow-insecure-upstream",
            &format!("--external-url=http://127.0.0.1:{port}"),
            "--allow-insecure-callbacks",
            // An operator that is started again after a crash need not wait for its own lease to expire.
            "--lease-identity=operator",
            &format!("--listen=127.0.0.1:{port}"),
            &format!("--admin-listen=127.0.0.1:{}", self.admin_port),
        ]
        .map(str::to_owned)
        .to_vec();
        args.extend(self.extra.clone());
        args
    }

    /// Runs the operator in this process until the test ends.
    pub async fn operator(&self) -> &Self {
        self.operator_with(timings()).await
    }

    pub async fn operator_with(&self, timings: Timings) -> &Self {
        let Sub::Run(args) = Cli::parse_from(self.args()).command else {
            unreachable!("the arguments say run")
        };
        let args: RunArgs = *args;
        start_logging();
        let config = kube_config(&self.cluster.kubeconfig).await;
        let mut parts = process::start(&args, config, timings, &self.stop).await.unwrap();
        tokio::spawn(async move { while parts.join_next().await.is_some() {} });
        self
    }

    /// Starts the built binary. `crash_at` ends it at that step.
    pub fn spawn(&self, crash_at: Option<&str>) -> Process {
        self.spawn_with(crash_at, &[])
    }

    /// The same with more flags, or other values of those it has.
    pub fn spawn_with(&self, crash_at: Option<&str>, flags: &[&str]) -> Process {
        self.spawn_as(&self.cluster.kubeconfig, crash_at, flags, &[])
    }

    /// The same as somebody else than the administrator, and `without` some of the flags.
    pub fn spawn_as(
        &self,
        kubeconfig: &Path,
        crash_at: Option<&str>,
        flags: &[&str],
        without: &[&str],
    ) -> Process {
        let point = crash_at.map(|at| ("GBO_CRASH_AT", at));
        self.spawn_at(kubeconfig, point.as_slice(), flags, without)
    }

    /// One that panics at that step.
    pub fn spawn_panicking(&self, at: &str) -> Process {
        self.spawn_at(&self.cluster.kubeconfig, &[("GBO_PANIC_AT", at)], &[], &[])
    }

    /// One with more in its environment.
    pub fn spawn_in(&self, environment: &[(&str, &str)], flags: &[&str]) -> Process {
        self.spawn_at(&self.cluster.kubeconfig, environment, flags, &[])
    }

    fn spawn_at(
        &self,
        kubeconfig: &Path,
        environment: &[(&str, &str)],
        flags: &[&str],
        without: &[&str],
    ) -> Process {
        let name = |flag: &str| flag.split('=').next().unwrap_or_default().to_owned();
        let mut args = self.args().split_off(1);
        args.retain(|arg| !flags.iter().chain(without).any(|flag| name(flag) == name(arg)));
        let log = self.dir.path().join(format!("operator-{}.log", rand_suffix()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemini-batch-operator"));
        command
            .args(args)
            .args(flags)
            .env("GBO_LOG_LEVEL", "info,gemini_batch_operator=debug")
            .env("KUBECONFIG", kubeconfig)
            .env_remove("GBO_CRASH_AT")
            .stderr(std::fs::File::create(&log).unwrap());
        command.envs(environment.iter().copied());
        Process { child: command.spawn().unwrap(), log }
    }

    /// A `--listen` flag of its own for one more receiver, and what a callback URL is there.
    pub fn another_receiver(&self, uri: &str) -> (String, String) {
        let port = free_port();
        (format!("--listen=127.0.0.1:{port}"), uri.replace(&format!(":{}/", self.port), &format!(":{port}/")))
    }

    pub fn kubeconfig(&self) -> &Path {
        &self.cluster.kubeconfig
    }

    /// The administrator's kubeconfig with this token for its only credential.
    pub fn kubeconfig_with(&self, token: &str) -> PathBuf {
        let admin = std::fs::read_to_string(&self.cluster.kubeconfig).unwrap();
        let mut config: Value = serde_yaml::from_str(&admin).unwrap();
        for user in config["users"].as_array_mut().unwrap() {
            user["user"] = json!({ "token": token });
        }
        self.file(&format!("{}.kubeconfig", rand_suffix()), &config.to_string())
    }

    /// The administrator's kubeconfig, acting as somebody else.
    pub fn kubeconfig_as(&self, user: &str) -> PathBuf {
        let admin = std::fs::read_to_string(&self.cluster.kubeconfig).unwrap();
        let mut config: Value = serde_yaml::from_str(&admin).unwrap();
        for entry in config["users"].as_array_mut().unwrap() {
            entry["user"]["as"] = json!(user);
        }
        self.file(&format!("{}.kubeconfig", rand_suffix()), &config.to_string())
    }

    /// The same kubeconfig with the test's namespace as the current one.
    pub fn current_here(&self, kubeconfig: &Path) -> PathBuf {
        let config = std::fs::read_to_string(kubeconfig).unwrap();
        let mut config: Value = serde_yaml::from_str(&config).unwrap();
        for entry in config["contexts"].as_array_mut().unwrap() {
            entry["context"]["namespace"] = json!(self.namespace);
        }
        self.file(&format!("{}.kubeconfig", rand_suffix()), &config.to_string())
    }

    /// Starts another program on the cluster of this kubeconfig. What it says on stderr is its log.
    pub fn start(&self, program: &Path, args: &[&str], kubeconfig: &Path) -> Process {
        let log = self.dir.path().join(format!("program-{}.log", rand_suffix()));
        let child = Command::new(program)
            .args(args)
            .env("KUBECONFIG", kubeconfig)
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap_or_else(|e| panic!("{} can't be started: {e}", program.display()));
        Process { child, log }
    }

    /// A file of the test's own.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn jobs(&self) -> Api<GeminiBatchJob> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn config_maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub async fn secret(&self, name: &str, data: &Value) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let body =
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data});
        secrets.patch(name, &PatchParams::apply("test").force(), &Patch::Apply(&body)).await.unwrap();
    }

    pub async fn config_map(&self, name: &str, data: &Value) {
        let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data});
        let params = PatchParams::apply("test").force();
        self.config_maps().patch(name, &params, &Patch::Apply(&body)).await.unwrap();
    }

    /// Creates a job from its spec.
    pub async fn create(&self, name: &str, spec: Value) -> GeminiBatchJob {
        self.try_create(name, spec).await.unwrap()
    }

    pub async fn try_create(&self, name: &str, spec: Value) -> Result<GeminiBatchJob, kube::Error> {
        let job = serde_json::from_value(json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": name}, "spec": spec}))
        .unwrap();
        self.jobs().create(&PostParams::default(), &job).await
    }

    pub async fn delete(&self, name: &str) {
        self.jobs().delete(name, &DeleteParams::default()).await.unwrap();
    }

    /// Waits until the job is as wanted, and says how it is if it does not become so.
    pub async fn until(
        &self,
        name: &str,
        what: &str,
        wanted: impl Fn(&GeminiBatchJob) -> bool,
    ) -> GeminiBatchJob {
        let jobs = self.jobs();
        let condition = |job: Option<&GeminiBatchJob>| job.is_some_and(&wanted);
        if let Ok(job) = tokio::time::timeout(PATIENCE, await_condition(jobs, name, condition)).await {
            job.unwrap().unwrap()
        } else {
            let job = self.jobs().get_opt(name).await.unwrap();
            panic!(
                "{name} did not become {what}:\n{}\nlast requests: {:?}\nlast deliveries: {:#?}",
                serde_json::to_string_pretty(&job.map(|j| j.status)).unwrap(),
                self.ops().iter().rev().take(30).collect::<Vec<_>>(),
                self.sim.deliveries().iter().rev().take(3).collect::<Vec<_>>(),
            );
        }
    }

    pub async fn finished(&self, name: &str) -> GeminiBatchJob {
        self.until(name, "finished", |j| is_true(j, conditions::FINISHED)).await
    }

    /// Finished, and everything remote cleaned up.
    pub async fn cleaned(&self, name: &str) -> GeminiBatchJob {
        self.until(name, "cleaned up", |j| is_true(j, conditions::FINISHED) && j.finalizers().is_empty())
            .await
    }

    pub async fn stalled(&self, name: &str, reason: &str) -> GeminiBatchJob {
        self.until(name, &format!("stalled by {reason}"), |j| {
            condition(j, conditions::STALLED).is_some_and(|(s, r, _)| s == "True" && r == reason)
        })
        .await
    }

    pub async fn gone(&self, name: &str) {
        let absent = |job: Option<&GeminiBatchJob>| job.is_none();
        let waited = tokio::time::timeout(PATIENCE, await_condition(self.jobs(), name, absent)).await;
        assert!(waited.is_ok(), "{name} was not deleted: {:#?}", self.jobs().get(name).await);
    }

    /// Operations that the simulator received, apart from key fetches.
    pub fn ops(&self) -> Vec<Op> {
        self.log().into_iter().map(|e| e.op).collect()
    }

    pub fn log(&self) -> Vec<LogEntry> {
        self.sim.log().into_iter().filter(|e| e.op != Op::Jwks).collect()
    }

    /// What `/metrics` says.
    pub async fn metrics(&self) -> String {
        let url = format!("http://127.0.0.1:{}/metrics", self.admin_port);
        reqwest::get(url).await.unwrap().text().await.unwrap()
    }

    /// Until Gemini was asked for this so often.
    pub async fn until_asked(&self, op: Op, times: usize) {
        let start = Instant::now();
        while self.count(op) < times {
            assert!(start.elapsed() < PATIENCE, "{} of {times} requests {op:?}", self.count(op));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn count(&self, op: Op) -> usize {
        self.ops().into_iter().filter(|o| *o == op).count()
    }

    /// What was asked of the API server, by everybody, as its audit log has it.
    pub fn audited(&self) -> Vec<Value> {
        let log = self.cluster.kubeconfig.parent().unwrap().join("audit.log");
        let log = std::fs::read_to_string(log).unwrap();
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Writes of the operator in this namespace, from the API server's audit log: `(resource, verb)`.
    pub fn audited_writes(&self) -> Vec<(String, String)> {
        self.audited()
            .into_iter()
            .filter(|e| e["stage"] == "ResponseComplete" && e["objectRef"]["namespace"] == *self.namespace)
            .filter(|e| e["userAgent"].as_str().unwrap_or_default().starts_with("gemini-batch-operator"))
            .filter(|e| {
                ["create", "update", "patch", "delete"].contains(&e["verb"].as_str().unwrap_or_default())
            })
            .map(|e| {
                let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
                let resource = text(&e["objectRef"]["resource"]);
                // The receivers name themselves in their writes.
                let hint = text(&e["requestURI"]).contains("fieldManager=gemini-batch-receiver");
                (if hint { "hints".to_owned() } else { resource }, text(&e["verb"]))
            })
            .collect()
    }
}

impl Drop for Env {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// For whoever looks into a test: `GBO_TEST_LOG=debug`.
fn start_logging() {
    static LOG: Once = Once::new();
    if let Ok(level) = std::env::var("GBO_TEST_LOG") {
        LOG.call_once(|| telemetry::init(&level, telemetry::LogFormat::Text).unwrap());
    }
}

/// Runs the real kubectl in the test's namespace: its output, or what it complained about.
pub fn kubectl(env: &Env, args: &[&str]) -> Result<String, String> {
    let out = Command::new(env.cluster.binary.with_file_name("kubectl"))
        .arg(format!("--kubeconfig={}", env.cluster.kubeconfig.display()))
        .arg(format!("--namespace={}", env.namespace))
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if out.status.success() { Ok(text(out.stdout)) } else { Err(text(out.stderr)) }
}

/// Runs a script that calls kubectl, as a user whose current context is the test's namespace.
pub fn script_in(env: &Env, script: &str, args: &[&str]) -> std::process::Output {
    let others = std::env::var_os("PATH").unwrap_or_default();
    let mut path = vec![env.cluster.binary.parent().unwrap().to_owned()];
    path.extend(std::env::split_paths(&others));
    let path = std::env::join_paths(path).unwrap();
    let config = env.current_here(&env.cluster.kubeconfig);
    Command::new(script).args(args).env("KUBECONFIG", &config).env("PATH", path).output().unwrap()
}

/// A port below those that the kernel gives to clients, and given to no other test of this process.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let pid = u16::try_from(std::process::id() % 100).unwrap();
        let port = 20_000 + (pid * 100 + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn rand_suffix() -> u32 {
    rand::random()
}

pub fn is_true(job: &GeminiBatchJob, type_: &str) -> bool {
    job.status.as_ref().is_some_and(|s| conditions::is_true(&s.conditions, type_))
}

/// `(status, reason, message)`.
pub fn condition(job: &GeminiBatchJob, type_: &str) -> Option<(String, String, String)> {
    let c = conditions::get(&job.status.as_ref()?.conditions, type_)?;
    Some((c.status.clone(), c.reason.clone(), c.message.clone()))
}

pub fn ready(job: &GeminiBatchJob) -> (String, String, String) {
    condition(job, conditions::READY).unwrap_or_default()
}

pub fn state(job: &GeminiBatchJob) -> &'static str {
    job.status.as_ref().map(|s| s.state).unwrap_or_default().as_str()
}

/// `(total, succeeded, failed)`.
pub fn counts(job: &GeminiBatchJob) -> (i64, i64, i64) {
    let r = job.status.as_ref().and_then(|s| s.requests).unwrap_or_default();
    (r.total, r.succeeded, r.failed)
}

/// A spec with inline prompts, keys k1, k2, …, and the output ConfigMap `out` if wanted.
pub fn spec(prompts: &[&str], output: Option<&str>) -> Value {
    let requests: Vec<Value> =
        prompts.iter().enumerate().map(|(i, p)| json!({"key": format!("k{}", i + 1), "prompt": p})).collect();
    with_input(json!({ "requests": requests }), output)
}

#[expect(clippy::needless_pass_by_value, reason = "callers build the value in place")]
pub fn with_input(input: Value, output: Option<&str>) -> Value {
    let mut spec = json!({"model": MODEL, "credentials": {"secretRef": {"name": "gemini"}}, "input": input});
    if let Some(name) = output {
        spec["output"] = json!({"configMap": {"name": name}});
    }
    spec
}

/// One line of JSON Lines input.
pub fn line(key: &str, prompt: &str) -> String {
    json!({"key": key, "request": {"contents": [{"parts": [{"text": prompt}]}]}}).to_string()
}
