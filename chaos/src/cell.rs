//! One cell: a namespace, a simulator, two controllers, and everything that goes wrong between them. Several cells share
//! a control plane, so that many kills fit into an hour: most of the time each of them waits for a lease to expire.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use gemini_simulator::{Clock, Config, Effect, Fault, Op, Simulator, Switches};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use rand::RngExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::apiserver::ApiProxy;
use crate::callbacks;
use crate::cluster::{Cluster, insist};
use crate::gemini::{Gemini, Known};
use crate::plan::{self, Create, Life, Moment, POINTS, Scale, Weather};
use crate::process::{Operator, Standing};

/// The key that jobs begin with, one of the same project, and one of another.
pub const KEYS: [(&str, &str); 3] = [("key-a", "project"), ("key-b", "project"), ("key-c", "elsewhere")];

/// After so many kills the submissions that are not confirmed get the time to be.
const KILLS_BETWEEN_RESTS: usize = 12;

/// Between the end of a controller that is to stay and its next start.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// Unfinished jobs of a cell at most, as a multiple of those whose submission goes on.
const MOST_UNFINISHED: usize = 8;

/// How a run is set up.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub scale: Scale,
    pub operator: PathBuf,
    /// Jobs of a cell at a time whose submission goes on, and nothing stands in its way.
    pub jobs: usize,
    /// Kills of a cell.
    pub kills: usize,
    /// The origin of all clocks, in Unix milliseconds.
    pub origin: i64,
    /// The protection that is left out, and the fault that it is there for.
    pub broken: Option<Broken>,
    /// Where logs and kubeconfigs are.
    pub dir: PathBuf,
}

/// A run that shows what happens without a protection.
#[derive(Clone, Copy, Debug)]
pub struct Broken {
    /// `GBO_BREAK`; nothing is left out if it is empty.
    pub protection: &'static str,
    /// What becomes of the first create of each job.
    pub create: Create,
    /// Simulated seconds after which batches are listed.
    pub list_lag: f64,
    /// How many jobs.
    pub jobs: usize,
}

/// A job that was created.
#[derive(Clone, Debug)]
pub struct Record {
    pub name: String,
    pub uid: String,
    pub plan: plan::Job,
}

/// A kill.
#[derive(Clone, Debug)]
pub struct Kill {
    /// Where it hit.
    pub label: String,
    /// Whether that is between the request for the batch and the record of its name.
    pub window: bool,
    /// Whether any job of the process was there.
    pub any_window: bool,
}

/// What happened, for the report.
#[derive(Debug, Default)]
pub struct Tally {
    pub kills: Vec<Kill>,
    pub stops: usize,
    pub terminations: usize,
    /// Processes that ended and should not have, with what was odd about it.
    pub odd: Vec<String>,
    /// Times in which nobody led for long.
    pub leaderless: Vec<String>,
    /// From a kill to the next leader.
    pub takeovers: Vec<Duration>,
    /// From a kill in the midst of a job's submission to the record of its batch.
    pub recoveries: Vec<(Duration, String)>,
}

/// What the last look at the jobs showed.
#[derive(Debug, Default)]
struct Board {
    active: usize,
    unconfirmed: usize,
    /// Without a batch, and without anything in the way.
    fresh: usize,
    /// Jobs that were hit in the midst of their submission, and since when.
    hit: HashMap<String, Instant>,
}

/// One cell.
pub struct Cell {
    pub number: u64,
    pub setup: Setup,
    pub client: Client,
    pub namespace: String,
    pub gemini: Arc<Gemini>,
    pub api: [Arc<ApiProxy>; 2],
    kubeconfigs: [PathBuf; 2],
    urls: [String; 2],
    ports: [u16; 2],
    external: String,
    pub records: Mutex<Vec<Record>>,
    pub tally: Mutex<Tally>,
    board: Mutex<Board>,
    /// No more jobs are created.
    full: AtomicBool,
    /// No more faults.
    calm: AtomicBool,
    /// No faults of the API server for a while.
    resting: AtomicBool,
    pub done: AtomicBool,
    pub killed: AtomicUsize,
    lives: [AtomicU64; 2],
}

/// A controller and how its life is to end.
struct Slot {
    operator: Operator,
    life: Option<Life>,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The custom resource, without the operator's types: a mistake in them can't hide here.
pub fn jobs(client: &Client, namespace: &str) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("geminibatch.dev", "v1alpha1", "GeminiBatchJob");
    let resource = ApiResource::from_gvk_with_plural(&kind, "geminibatchjobs");
    Api::namespaced_with(client.clone(), namespace, &resource)
}

/// The last attempt of a job.
pub fn attempt(job: &DynamicObject) -> &Value {
    let attempts = job.data["status"]["attempts"].as_array();
    attempts.and_then(|all| all.iter().max_by_key(|a| a["number"].as_i64())).unwrap_or(&Value::Null)
}

/// `reason` of a condition that is true.
pub fn reason<'a>(job: &'a DynamicObject, condition: &str) -> Option<&'a str> {
    let all = job.data["status"]["conditions"].as_array()?;
    all.iter().find(|c| c["type"] == condition && c["status"] == "True")?["reason"].as_str()
}

/// A prompt that its answer can be recognised by.
pub fn prompt(job: &str, key: usize) -> String {
    format!("{job} asks k{key}")
}

impl Cell {
    /// Sets one up. Nothing runs yet.
    pub async fn new(cluster: &Cluster, number: u64, setup: Setup) -> anyhow::Result<Arc<Self>> {
        let client = cluster.client().await?;
        let namespace = format!("cell-{number}");
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let body = serde_json::from_value(json!({"metadata": {"name": namespace}}))?;
        namespaces.create(&PostParams::default(), &body).await?;

        let factor = f64::from(setup.scale.factor);
        let sim = Simulator::start(Config {
            speed: factor,
            clock: Clock::scaled(setup.origin, factor),
            keys: Some(KEYS.iter().map(|(k, p)| ((*k).to_owned(), (*p).to_owned())).collect()),
            max_active: 10_000,
            pending: Duration::from_secs(5),
            running: Duration::from_secs(20),
            ..Config::default()
        })
        .await?;
        let (rotate, rotations) = unbounded_channel();
        let always = setup.broken.map(|b| b.create);
        let gemini = Gemini::new(sim, (setup.seed, number), setup.scale, rotate, always)?;
        let mut api = Vec::new();
        let mut kubeconfigs = Vec::new();
        let mut urls = Vec::new();
        for slot in 0..2_usize {
            let (proxy, config) =
                ApiProxy::start(&cluster.kubeconfig, setup.seed, [number, slot as u64]).await?;
            let path = setup.dir.join(format!("cell-{number}-{slot}.kubeconfig"));
            std::fs::write(&path, config)?;
            api.push(proxy);
            kubeconfigs.push(path);
            urls.push(gemini.listen(slot).await?);
        }
        let ports = [free_port()?, free_port()?];
        let balancer = TcpListener::bind("127.0.0.1:0").await?;
        let external = format!("http://{}", balancer.local_addr()?);
        tokio::spawn(callbacks::balance(balancer, ports));
        let two = |what: &str| anyhow::anyhow!("two {what} were made");
        let cell = Arc::new(Self {
            number,
            setup,
            client,
            namespace,
            gemini,
            api: api.try_into().map_err(|_| two("proxies"))?,
            kubeconfigs: kubeconfigs.try_into().map_err(|_| two("kubeconfigs"))?,
            urls: urls.try_into().map_err(|_| two("addresses"))?,
            ports,
            external,
            records: Mutex::default(),
            tally: Mutex::default(),
            board: Mutex::default(),
            full: AtomicBool::new(false),
            calm: AtomicBool::new(false),
            resting: AtomicBool::new(false),
            done: AtomicBool::new(false),
            killed: AtomicUsize::new(0),
            lives: [AtomicU64::new(0), AtomicU64::new(0)],
        });
        cell.secret("gemini", KEYS[0].0).await?;
        tokio::spawn(Arc::clone(&cell).rotate_keys(rotations));
        Ok(cell)
    }

    /// Jobs that are not finished, and those of them that are unconfirmed, as last seen.
    pub fn unfinished(&self) -> (usize, usize) {
        let board = lock(&self.board);
        (board.active, board.unconfirmed)
    }

    /// Whether nothing is to go wrong any more.
    pub fn is_calm(&self) -> bool {
        self.calm.load(Ordering::SeqCst)
    }

    // -------------------------------------------------------------------------- the cluster's side

    async fn secret(&self, name: &str, key: &str) -> anyhow::Result<()> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let body = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
            "stringData": {"apiKey": key}});
        let params = PatchParams::apply("chaos").force();
        let patch = Patch::Apply(&body);
        insist("writing a Secret", || secrets.patch(name, &params, &patch)).await?;
        Ok(())
    }

    async fn rotate_keys(
        self: Arc<Self>,
        mut wanted: UnboundedReceiver<(String, tokio::sync::oneshot::Sender<()>)>,
    ) {
        let mut number = 0;
        while let Some((job, told)) = wanted.recv().await {
            let mut rng = plan::stream(self.setup.seed, "rotation", &[self.number, number]);
            number += 1;
            let key = KEYS[rng.random_range(1..3)].0;
            let back = self.setup.scale.real(self.setup.scale.grace).mul_f64(rng.random_range(0.1..1.5));
            let cell = Arc::clone(&self);
            tokio::spawn(async move {
                let _ = cell.secret(&job, key).await;
                let _ = told.send(());
                tokio::time::sleep(back).await;
                let _ = cell.secret(&job, KEYS[0].0).await;
            });
        }
    }

    async fn create_job(&self, number: u64) -> anyhow::Result<()> {
        let name = format!("job-{number:04}");
        let plan = match self.setup.broken {
            None => plan::job(self.setup.seed, self.number, number),
            Some(_) => plan::Job { requests: 1, stored: false, directive: "", own_secret: false },
        };
        let secret = if plan.own_secret { name.as_str() } else { "gemini" };
        if plan.own_secret {
            self.secret(&name, KEYS[0].0).await?;
        }
        let requests: Vec<Value> = (1..=plan.requests)
            .map(|key| {
                let directive = if key == 1 { plan.directive } else { "" };
                json!({"key": format!("k{key}"), "prompt": format!("{}{directive}", prompt(&name, key))})
            })
            .collect();
        let mut spec = json!({"model": "gemini-2.5-flash", "credentials": {"secretRef": {"name": secret}},
            "input": {"requests": requests}});
        if plan.stored {
            spec["output"] = json!({"configMap": {"name": format!("out-{number:04}")}});
        }
        let body: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": name}, "spec": spec}))?;
        let api = jobs(&self.client, &self.namespace);
        let there = insist("creating a job", || async {
            match api.create(&PostParams::default(), &body).await {
                Err(kube::Error::Api(s)) if s.code == 409 => api.get(&name).await,
                other => other,
            }
        })
        .await?;
        let uid = there.uid().context("a job without a UID")?;
        let known = Known { number, name: name.clone(), own_secret: plan.own_secret };
        self.gemini.learn(uid.clone(), known);
        lock(&self.records).push(Record { name, uid, plan });
        let mut board = lock(&self.board);
        board.active += 1;
        board.fresh += 1;
        Ok(())
    }

    /// Keeps so many jobs unfinished.
    async fn create_jobs(self: Arc<Self>) -> anyhow::Result<()> {
        let wanted = self.setup.broken.map(|b| b.jobs as u64);
        let mut number = 0;
        while !self.full.load(Ordering::SeqCst) && wanted.is_none_or(|wanted| number < wanted) {
            let room = {
                let board = lock(&self.board);
                board.fresh < self.setup.jobs && board.active < self.setup.jobs * MOST_UNFINISHED
            };
            if wanted.is_some() || room {
                self.create_job(number).await?;
                number += 1;
            }
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
        Ok(())
    }

    /// Looks at the jobs that did not succeed yet, again and again.
    async fn look(self: Arc<Self>) {
        let api = jobs(&self.client, &self.namespace);
        let params = ListParams::default().fields("status.state!=Succeeded");
        while !self.done.load(Ordering::SeqCst) {
            let asked = Instant::now();
            if let Ok(list) = api.list(&params).await {
                self.looked(&list.items, asked);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn looked(&self, list: &[DynamicObject], asked: Instant) {
        let unfinished: Vec<_> = list.iter().filter(|j| reason(j, "Finished").is_none()).collect();
        let mut board = lock(&self.board);
        board.active = unfinished.len();
        board.unconfirmed =
            unfinished.iter().filter(|j| reason(j, "Stalled") == Some("SubmissionUnconfirmed")).count();
        let nameless: BTreeMap<String, bool> = unfinished
            .iter()
            .filter(|j| attempt(j)["batchName"].is_null())
            .map(|j| (j.name_any(), reason(j, "Stalled").is_none()))
            .collect();
        board.fresh = nameless.values().filter(|fresh| **fresh).count();
        let named: Vec<(String, Instant)> = board
            .hit
            .iter()
            .filter(|(name, since)| **since < asked && !nameless.contains_key(*name))
            .map(|(name, since)| (name.clone(), *since))
            .collect();
        let mut tally = lock(&self.tally);
        for (name, since) in named {
            board.hit.remove(&name);
            tally.recoveries.push((since.elapsed(), name));
        }
    }

    // --------------------------------------------------------------------------------- weather

    fn apply(&self, weather: &Weather) {
        let broken = self.setup.broken;
        self.gemini.sim.set(Switches {
            list_lag_seconds: broken.map_or(weather.list_lag, |b| b.list_lag),
            page_limit: weather.page_limit,
            empty_pages: weather.empty_pages,
            creator_only: weather.creator_only,
            stale_stats_in_list: weather.stale_stats,
            output_lag_seconds: weather.output_lag,
            // A callback names the batch: without its search the controller would find it all the same.
            lose_events: broken.is_some(),
            hooks: weather.hook.into_iter().map(ToOwned::to_owned).collect(),
            honour_file_name: !weather.other_file_names,
            enqueued_token_limit: weather.no_quota.then_some(0),
            ..Switches::default()
        });
        let ops = [Op::BatchList, Op::BatchGet, Op::FileGet, Op::FileDelete, Op::Download, Op::UploadStart];
        for op in ops {
            self.gemini.sim.clear_faults(op); // of the last weather
        }
        for (op, code) in &weather.failing {
            let effect = match code {
                0 => Effect::Reset { commit: false },
                1 => Effect::Reset { commit: true },
                code => Effect::Status { code: *code, commit: false, envelope: true, retry_after: None },
            };
            self.gemini.sim.fault(Fault {
                op: ops[op % ops.len()],
                contains: String::new(),
                skip: 0,
                times: 2,
                effect,
            });
        }
        for (proxy, api) in self.api.iter().zip(weather.api) {
            proxy.set(api);
        }
    }

    async fn change_weather(self: Arc<Self>) {
        let mut number = 0;
        while !self.calm.load(Ordering::SeqCst) {
            let mut weather = plan::weather(self.setup.seed, self.number, number, &self.setup.scale);
            number += 1;
            if self.resting.load(Ordering::SeqCst) {
                weather.api = [plan::Api::Fine; 2];
            }
            self.apply(&weather);
            tokio::time::sleep(weather.lasts).await;
        }
    }

    fn fine() -> Weather {
        Weather {
            list_lag: 0.0,
            page_limit: 100,
            empty_pages: false,
            creator_only: false,
            stale_stats: false,
            output_lag: 0.0,
            hook: None,
            other_file_names: false,
            no_quota: false,
            failing: Vec::new(),
            api: [plan::Api::Fine; 2],
            lasts: Duration::ZERO,
        }
    }

    // ------------------------------------------------------------------------------- processes

    pub fn log(&self, slot: usize) -> PathBuf {
        self.setup.dir.join(format!("cell-{}-{slot}.log", self.number))
    }

    /// Starts a controller whose life ends in a way that the seed says; or for good.
    fn start(&self, slot: usize, for_good: bool) -> anyhow::Result<Slot> {
        let number = self.lives[slot].fetch_add(1, Ordering::SeqCst);
        let life = (!for_good).then(|| plan::life(self.setup.seed, self.number, slot as u64, number));
        let s = &self.setup.scale;
        let mut rng = plan::stream(self.setup.seed, "skew", &[self.number, slot as u64, number]);
        // In seconds of the operator's clock. Callbacks that are more than 300 s ahead are refused.
        let skew = match rng.random_range(0..5) {
            _ if for_good => 0,
            0 => rng.random_range(-1500..1500_i64),
            _ => rng.random_range(-250..250_i64),
        };
        let origin = self.setup.origin - skew * 1000 / (i64::from(s.factor) - 1);
        let mut command = Command::new(&self.setup.operator);
        command
            .arg("run")
            .arg(format!("--namespace={}", self.namespace))
            .arg(format!("--watch-namespaces={}", self.namespace))
            .arg("--cluster-id=chaos")
            .arg(format!("--gemini-base-url={}", self.urls[slot]))
            .arg("--allow-insecure-upstream")
            .arg(format!("--external-url={}", self.external))
            .arg("--allow-insecure-callbacks")
            .arg(format!("--listen=127.0.0.1:{}", self.ports[slot]))
            .arg("--admin-listen=127.0.0.1:0")
            .arg(format!("--clock-origin-unix-ms={origin}"))
            .arg(format!("--clock-factor={}", s.factor))
            .arg(format!("--lease-seconds={}", s.lease))
            .arg(format!("--lease-renew-deadline-seconds={}", s.deadline))
            .arg(format!("--lease-retry-seconds={}", s.retry))
            .arg(format!("--create-timeout-seconds={}", s.create))
            .arg(format!("--resend-grace-seconds={}", s.grace))
            .arg(format!("--sweep-seconds={}", s.sweep))
            .arg("--log-format=json")
            .arg("--log-level=info,gemini_batch_operator=debug")
            .env("KUBECONFIG", &self.kubeconfigs[slot]);
        for variable in ["GBO_CRASH_AT", "GBO_STOP_AT", "GBO_BREAK"] {
            command.env_remove(variable);
        }
        match life {
            Some(Life::Crash { point, visit }) => {
                command.env("GBO_CRASH_AT", format!("{point}@{visit}"));
            }
            Some(Life::StopAt { point, .. }) => {
                command.env("GBO_STOP_AT", point);
            }
            _ => {}
        }
        if let Some(Broken { protection, .. }) = self.setup.broken.filter(|b| !b.protection.is_empty()) {
            command.env("GBO_BREAK", protection);
        }
        let operator = Operator::start(command, &self.log(slot))
            .with_context(|| format!("{} can't be started", self.setup.operator.display()))?;
        Ok(Slot { operator, life })
    }

    /// Kills until there were as many as wanted, and starts anew what ended.
    async fn kill(&self, deadline: Instant) -> anyhow::Result<[Slot; 2]> {
        let mut slots = [self.start(0, false)?, self.start(1, false)?];
        let mut since: Option<Instant> = None;
        let mut rested = 0;
        while lock(&self.tally).kills.len() < self.setup.kills && Instant::now() < deadline {
            let [a, b] = &mut slots;
            let (slot, standing) = tokio::select! {
                standing = a.operator.leads_or_ended() => (0, standing),
                standing = b.operator.leads_or_ended() => (1, standing),
                () = tokio::time::sleep(Duration::from_secs(30)) => {
                    let what = format!("{}: nobody led for 30 s", self.namespace);
                    lock(&self.tally).leaderless.push(what);
                    continue;
                }
            };
            if standing.leads {
                if let Some(since) = since.take() {
                    lock(&self.tally).takeovers.push(since.elapsed());
                }
                self.end_life(slot, &mut slots[slot]).await;
            }
            if slots[slot].operator.standing().ended.is_some() {
                self.note_end(&slots[slot], standing.leads);
                since = since.or(Some(Instant::now()));
                slots[slot] = self.start(slot, false)?;
            }
            let kills = lock(&self.tally).kills.len();
            if kills >= rested + KILLS_BETWEEN_RESTS {
                rested = kills;
                self.rest(&mut slots).await?;
            }
        }
        Ok(slots)
    }

    /// Lets the submissions that are not confirmed come to an end: that takes one leader for longer than the grace.
    /// Gemini goes on being difficult, and a leader that is to die at a step still does.
    async fn rest(&self, slots: &mut [Slot; 2]) -> anyhow::Result<()> {
        self.resting.store(true, Ordering::SeqCst);
        for proxy in &self.api {
            proxy.set(plan::Api::Fine);
        }
        for (number, slot) in slots.iter_mut().enumerate() {
            let standing = slot.operator.standing();
            if !standing.leads && standing.ended.is_none() {
                slot.operator.signal(Signal::KILL); // the next leader is to stay
                slot.operator.ended().await;
                *slot = self.start_to_stay(number)?;
            }
        }
        let longest = self.setup.scale.real(self.setup.scale.grace) * 4;
        let start = Instant::now();
        while lock(&self.board).unconfirmed > 0 && start.elapsed() < longest {
            let [a, b] = &mut *slots;
            let slot = tokio::select! {
                () = a.operator.ended() => 0,
                () = b.operator.ended() => 1,
                () = tokio::time::sleep(Duration::from_millis(200)) => continue,
            };
            self.note_end(&slots[slot], false);
            slots[slot] = self.start_to_stay(slot)?;
        }
        self.resting.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// A controller that is killed as soon as the rest is over.
    fn start_to_stay(&self, slot: usize) -> anyhow::Result<Slot> {
        Ok(Slot { life: Some(Life::Any { after: 300 }), ..self.start(slot, true)? })
    }

    /// Does to a leader what its life ends with. Afterwards it has ended, or goes on as somebody else would.
    async fn end_life(&self, slot: usize, at: &mut Slot) {
        let lease = self.setup.scale.real(self.setup.scale.lease);
        let patience = lease.mul_f64(1.5);
        // One that has only just begun has nothing to lose.
        at.operator.works_within(patience).await;
        let rare = self.setup.scale.real(self.setup.scale.grace) + patience;
        match at.life.unwrap_or(Life::Any { after: 500 }) {
            Life::Crash { point, .. } => {
                let searching = point.ends_with("Fence") || point.ends_with("FindBatch");
                if !at.operator.ended_within(if searching { rare } else { patience }).await {
                    self.kill_now(at).await;
                }
            }
            Life::Network { moment: moment @ Moment::CreateFrozen, tenths } => {
                at.life = None;
                self.gemini.arm(slot, moment, at.operator.clone());
                let stopped = at.operator.stops_within(patience).await;
                if self.gemini.disarm(slot) || !stopped {
                    at.operator.signal(Signal::STOP);
                }
                self.wake_later(at, lease * tenths / 10).await;
            }
            Life::Network { moment, .. } => {
                self.gemini.arm(slot, moment, at.operator.clone());
                let ended = at.operator.ended_within(patience).await;
                if self.gemini.disarm(slot) || !ended {
                    at.life = None;
                    self.kill_now(at).await;
                }
            }
            Life::Any { after } => {
                at.life = None;
                if !at.operator.ended_within(Duration::from_millis(after)).await {
                    self.kill_now(at).await;
                }
            }
            Life::StopAt { tenths, .. } => {
                let stopped = at.operator.stops_within(patience).await;
                at.life = None;
                if !stopped {
                    at.operator.signal(Signal::STOP);
                }
                self.wake_later(at, lease * tenths / 10).await;
            }
            Life::Stop { after, tenths } => {
                at.life = None;
                if !at.operator.ended_within(Duration::from_millis(after)).await {
                    at.operator.signal(Signal::STOP);
                    self.wake_later(at, lease * tenths / 10).await;
                }
            }
            Life::Terminate { after } => {
                if at.operator.ended_within(Duration::from_millis(after)).await {
                    at.life = None;
                    return;
                }
                at.operator.signal(Signal::TERM);
                if !at.operator.ended_within(Duration::from_secs(25)).await {
                    lock(&self.tally).odd.push(format!("{}: SIGTERM was not obeyed in 25 s", self.namespace));
                    self.kill_now(at).await;
                }
            }
        }
    }

    async fn kill_now(&self, at: &mut Slot) {
        at.operator.signal(Signal::KILL);
        at.operator.ended().await;
    }

    async fn wake_later(&self, at: &mut Slot, after: Duration) {
        lock(&self.tally).stops += 1;
        tokio::time::sleep(after).await;
        at.operator.signal(Signal::CONT);
        // It finds out by itself that it does not lead any more.
        let _ = at.operator.leads_not_within(Duration::from_secs(2)).await;
    }

    /// Writes down how a process ended.
    fn note_end(&self, at: &Slot, led: bool) {
        let Standing { ended: Some(status), .. } = at.operator.standing() else { return };
        let sending = at.operator.sending();
        if let Some(panic) = at.operator.panic() {
            lock(&self.tally).odd.push(format!("{}: {panic}", self.namespace));
        }
        {
            let mut board = lock(&self.board);
            for job in &sending {
                board.hit.entry(job.clone()).or_insert_with(Instant::now);
            }
        }
        let mut tally = lock(&self.tally);
        let killed = match (status.signal(), at.life) {
            // SIGABRT: at the step that it was told.
            (Some(6), Some(Life::Crash { point, .. })) => {
                let known = POINTS.iter().find(|(p, ..)| *p == point);
                Some((known.map_or(point, |(_, label, ..)| label).to_owned(), known.is_some_and(|k| k.3)))
            }
            (Some(9), Some(Life::Network { moment, .. })) if !moment.is_create() => {
                Some((moment.label().to_owned(), false))
            }
            (Some(9), Some(Life::Network { moment, .. })) if !sending.is_empty() => {
                Some((moment.label().to_owned(), true))
            }
            (Some(9), _) => Some((any_time(&at.operator.last_step()), false)),
            (None, Some(Life::Terminate { .. })) if status.success() => {
                tally.terminations += 1;
                None
            }
            // It could not begin while the API server was out of reach; Kubernetes would start it again.
            (None, _) if !led && at.operator.last_step().is_empty() => None,
            _ => {
                let odd = format!("{}: {status} after {}", self.namespace, at.operator.last_step());
                tally.odd.push(odd);
                None
            }
        };
        if let Some((label, window)) = killed {
            let any_window = window || !sending.is_empty();
            tally.kills.push(Kill { label, window, any_window });
            self.killed.fetch_add(1, Ordering::SeqCst);
        }
    }

    // ------------------------------------------------------------------------------- the whole

    /// Runs until there were as many kills as wanted, then lets everything come to rest. The controllers still run
    /// when it returns, and end when what it returns is dropped.
    pub async fn run(self: &Arc<Self>, deadline: Instant) -> anyhow::Result<Vec<Operator>> {
        let creator = tokio::spawn(Arc::clone(self).create_jobs());
        let looker = tokio::spawn(Arc::clone(self).look());
        let last = if self.setup.broken.is_some() {
            self.apply(&Self::fine());
            creator.await??;
            vec![self.start(0, true)?, self.start(1, true)?]
        } else {
            let weather = tokio::spawn(Arc::clone(self).change_weather());
            let slots = self.kill(deadline).await?;
            self.full.store(true, Ordering::SeqCst);
            creator.await??;
            self.calm.store(true, Ordering::SeqCst);
            weather.await?;
            self.gemini.calm();
            self.apply(&Self::fine());
            // Those that are to die at a step would go on doing so.
            let mut last = Vec::new();
            for (number, mut slot) in slots.into_iter().enumerate() {
                slot.operator.signal(Signal::KILL);
                slot.operator.ended().await;
                last.push(self.start(number, true)?);
            }
            last
        };
        let mut last: [Slot; 2] =
            last.try_into().map_err(|_| anyhow::anyhow!("two controllers were started"))?;
        tokio::select! {
            settled = self.settle() => settled?,
            never = self.keep_running(&mut last) => never?,
        }
        self.done.store(true, Ordering::SeqCst);
        looker.await?;
        Ok(last.map(|slot| slot.operator).into())
    }

    /// Starts anew what ends, as Kubernetes would: a controller that begins while the API server still restarts gives up.
    async fn keep_running(&self, slots: &mut [Slot; 2]) -> anyhow::Result<()> {
        loop {
            let [a, b] = &mut *slots;
            let slot = tokio::select! {
                () = a.operator.ended() => 0,
                () = b.operator.ended() => 1,
            };
            self.note_end(&slots[slot], false);
            tokio::time::sleep(RESTART_PAUSE).await;
            slots[slot] = self.start(slot, true)?;
        }
    }

    /// Waits until every job has ended, for long enough.
    async fn settle(&self) -> anyhow::Result<()> {
        let s = &self.setup.scale;
        // Half an hour and the longest late create on the operator's clock; longer on a busy machine.
        let patience = s.real(1800).max(Duration::from_mins(8)) + s.real(s.grace) * 5;
        let own: Vec<String> =
            lock(&self.records).iter().filter(|r| r.plan.own_secret).map(|r| r.name.clone()).collect();
        for name in &own {
            self.secret(name, KEYS[0].0).await?;
        }
        let api = jobs(&self.client, &self.namespace);
        let start = Instant::now();
        let all = ListParams::default();
        let mut keys: HashMap<String, (usize, Instant)> = HashMap::new();
        loop {
            let list = insist("listing jobs", || api.list(&all)).await?;
            let unfinished: Vec<_> = list.items.iter().filter(|j| reason(j, "Finished").is_none()).collect();
            let travelling = self.gemini.travelling();
            if (unfinished.is_empty() && travelling == 0) || start.elapsed() > patience {
                break;
            }
            // One that was sent again while its key was rotated has the other key for its own.
            for job in &unfinished {
                let name = job.name_any();
                if reason(job, "Stalled") == Some("CredentialsChanged") && own.contains(&name) {
                    let (at, since) = keys.entry(name.clone()).or_insert((0, Instant::now()));
                    if since.elapsed() > s.real(100) {
                        *at = (*at + 1) % KEYS.len();
                        *since = Instant::now();
                        self.secret(&name, KEYS[*at].0).await?;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        // A sweep or two, which would heal what there is to heal.
        tokio::time::sleep(s.real(s.sweep) * 3).await;
        Ok(())
    }
}

/// Where a kill hit that was not aimed at a step.
fn any_time(last_step: &str) -> String {
    match last_step {
        "" => "at any time, before the first step".to_owned(),
        step => format!("at any time, last step {step}"),
    }
}

/// A port below those that the kernel gives to clients.
fn free_port() -> anyhow::Result<u16> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    for _ in 0..10_000 {
        let number = u64::from(std::process::id() % 97) * 100 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(20_000 + number % 12_000)?;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no port is free")
}
