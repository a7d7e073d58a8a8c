//! Between the controllers and the simulator: holds creates back, loses them and their answers, and knows the moments at
//! which to kill.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gemini_simulator::{Effect, Fault, Op, Simulator};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;

use crate::http1::{self, Answer, Cut, Whole};
use crate::plan::{self, Create, Moment, Scale, Upload};
use crate::process::Operator;

/// A job, as the proxy needs to know it.
#[derive(Clone, Debug)]
pub struct Known {
    pub number: u64,
    pub name: String,
    pub own_secret: bool,
}

/// What the proxy shares with the rest of its cell.
pub struct Gemini {
    seed: u64,
    cell: u64,
    scale: Scale,
    pub sim: Simulator,
    client: reqwest::Client,
    /// Jobs by UID.
    jobs: Mutex<HashMap<String, Known>>,
    /// Creates of each job so far, by UID.
    creates: Mutex<HashMap<String, u64>>,
    uploads: AtomicU64,
    /// For each controller: whom to kill, and when.
    armed: [Mutex<Option<(Moment, Operator)>>; 2],
    /// Creates that are still on their way.
    travelling: AtomicUsize,
    /// What became of creates that arrived late: the status, or 0 for none.
    late: Mutex<Vec<u16>>,
    /// How often each thing was done to a create.
    done: Mutex<HashMap<&'static str, u64>>,
    /// No more of it: everything is to come to rest.
    calm: std::sync::atomic::AtomicBool,
    /// Whose key is to be rotated, and who wants to know that it was.
    rotate: UnboundedSender<(String, tokio::sync::oneshot::Sender<()>)>,
    /// Set for a run that shows what happens without a protection: what becomes of every first create.
    always: Option<Create>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `(uid, attempt, send)` of a display name.
pub fn parse(display_name: &str) -> Option<(&str, u32, &str)> {
    let rest = display_name.strip_prefix("gbo-chaos-")?;
    let (rest, send) = rest.rsplit_once('-')?;
    let (uid, attempt) = rest.rsplit_once('-')?;
    Some((uid, attempt.parse().ok()?, send))
}

impl Gemini {
    pub fn new(
        sim: Simulator,
        (seed, cell): (u64, u64),
        scale: Scale,
        rotate: UnboundedSender<(String, tokio::sync::oneshot::Sender<()>)>,
        always: Option<Create>,
    ) -> anyhow::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            seed,
            cell,
            scale,
            sim,
            client: http1::client(None)?,
            jobs: Mutex::default(),
            creates: Mutex::default(),
            uploads: AtomicU64::new(0),
            armed: [Mutex::new(None), Mutex::new(None)],
            travelling: AtomicUsize::new(0),
            late: Mutex::default(),
            done: Mutex::default(),
            calm: std::sync::atomic::AtomicBool::new(false),
            rotate,
            always,
        }))
    }

    /// Listens for one of the controllers; returns the base URL.
    pub async fn listen(self: &Arc<Self>, slot: usize) -> anyhow::Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let base = format!("http://{}", listener.local_addr()?);
        let (own, gemini) = (base.clone(), Arc::clone(self));
        tokio::spawn(http1::serve(listener, move |request| {
            let (gemini, own) = (Arc::clone(&gemini), own.clone());
            async move { gemini.handle(slot, request, &own).await }
        }));
        Ok(base)
    }

    pub fn learn(&self, uid: String, job: Known) {
        lock(&self.jobs).insert(uid, job);
    }

    /// Has a controller killed at that moment of its next create or upload.
    pub fn arm(&self, slot: usize, moment: Moment, operator: Operator) {
        *lock(&self.armed[slot]) = Some((moment, operator));
    }

    /// Whether the moment has not come yet; it will not come any more.
    pub fn disarm(&self, slot: usize) -> bool {
        lock(&self.armed[slot]).take().is_some()
    }

    /// Nothing more goes wrong from now on.
    pub fn calm(&self) {
        self.calm.store(true, Ordering::SeqCst);
    }

    /// Creates that are still on their way.
    pub fn travelling(&self) -> usize {
        self.travelling.load(Ordering::SeqCst)
    }

    /// What became of the creates that arrived late.
    pub fn late(&self) -> Vec<u16> {
        lock(&self.late).clone()
    }

    /// How often each thing was done.
    pub fn done(&self) -> HashMap<&'static str, u64> {
        lock(&self.done).clone()
    }

    fn count(&self, what: &'static str) {
        *lock(&self.done).entry(what).or_default() += 1;
    }

    async fn handle(self: &Arc<Self>, slot: usize, request: Whole, own: &str) -> Result<Answer, Cut> {
        let upload = request.target.starts_with("/upload/");
        if request.target.ends_with(":batchGenerateContent") {
            return self.create(slot, request).await;
        }
        if upload && request.target.contains("upload_id=") {
            return self.upload(slot, request).await;
        }
        let mut answer = self.forward(request).await?;
        // What follows an upload's first request comes here as well.
        let url = answer.headers().get("x-goog-upload-url").and_then(|v| v.to_str().ok());
        if let Some(url) = url.map(|url| url.replace(&self.sim.base_url(), own)) {
            let url = http::HeaderValue::from_str(&url).map_err(|_| Cut)?;
            answer.headers_mut().insert("x-goog-upload-url", url);
        }
        Ok(answer)
    }

    async fn forward(&self, request: Whole) -> Result<Answer, Cut> {
        request.forward(&self.client, &self.sim.base_url()).await
    }

    /// Forwards later, whatever becomes of the connection that it came over.
    fn forward_later(self: &Arc<Self>, request: Whole, after: Duration) {
        self.travelling.fetch_add(1, Ordering::SeqCst);
        let gemini = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let answer = gemini.forward(request).await;
            lock(&gemini.late).push(answer.map_or(0, |a| a.status().as_u16()));
            gemini.travelling.fetch_sub(1, Ordering::SeqCst);
        });
    }

    /// Forwards now, and to its end whatever becomes of the connection that it came over.
    async fn forward_surely(self: &Arc<Self>, request: Whole) -> Result<Answer, Cut> {
        let gemini = Arc::clone(self);
        tokio::spawn(async move { gemini.forward(request).await }).await.map_err(|_| Cut)?
    }

    /// Whom to kill now, if this is such a moment.
    fn due(&self, slot: usize, create: bool) -> Option<(Moment, Operator)> {
        let mut armed = lock(&self.armed[slot]);
        if armed.as_ref().is_some_and(|(moment, _)| moment.is_create() == create) {
            return armed.take();
        }
        None
    }

    async fn create(self: &Arc<Self>, slot: usize, request: Whole) -> Result<Answer, Cut> {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let display_name = body["batch"]["displayName"].as_str().unwrap_or_default().to_owned();
        if let Some((moment, operator)) = self.due(slot, true) {
            return self.kill_at(moment, &operator, request).await;
        }
        let uid = parse(&display_name).map(|(uid, ..)| uid.to_owned()).unwrap_or_default();
        let job = lock(&self.jobs).get(&uid).cloned();
        let number = {
            let mut creates = lock(&self.creates);
            let number = creates.entry(uid).or_default();
            *number += 1;
            *number - 1
        };
        let fate = match (&job, self.calm.load(Ordering::SeqCst), self.always) {
            (_, false, Some(always)) if number == 0 => always,
            (_, _, Some(_)) | (_, true, _) | (None, ..) => Create::Fine,
            (Some(job), false, None) => {
                plan::create(self.seed, self.cell, job.number, number, job.own_secret, &self.scale)
            }
        };
        let fault =
            |effect| Fault { op: Op::BatchCreate, contains: display_name.clone(), skip: 0, times: 1, effect };
        let status = |code, commit, envelope| Effect::Status { code, commit, envelope, retry_after: None };
        let (what, effect) = match fate {
            Create::Fine => ("fine", None),
            Create::Unavailable => ("503, nothing created", Some(status(503, false, true))),
            Create::CommittedUnavailable => ("created, then 503", Some(status(503, true, true))),
            Create::CommittedReset => ("created, then reset", Some(Effect::Reset { commit: true })),
            Create::Reset => ("reset, nothing created", Some(Effect::Reset { commit: false })),
            Create::Truncated => ("created, answer truncated", Some(Effect::Truncate)),
            Create::CommittedForeign400 => ("created, then a foreign 400", Some(status(400, true, false))),
            Create::Quota => ("429", Some(status(429, false, true))),
            Create::Slow { after } => {
                let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
                ("answered late", Some(Effect::DelayAnswer { millis }))
            }
            Create::CommittedLate { after } => {
                self.count("503, created later");
                self.forward_later(request, after);
                let error = json!({"error": {"code": 503, "message": "The service is currently unavailable.", "status": "UNAVAILABLE"}});
                return Ok(http1::json(503, &error));
            }
            Create::HeldBack { after } => {
                self.count("held back, forwarded later");
                self.forward_later(request, after);
                return std::future::pending().await; // until the controller has had enough
            }
            Create::KeyRotated { answered } => {
                self.count("key rotated before the answer");
                let answer = self.forward_surely(request).await;
                if let Some(job) = job {
                    let (told, done) = tokio::sync::oneshot::channel();
                    let _ = self.rotate.send((job.name, told));
                    let _ = done.await;
                }
                return if answered { answer } else { Err(Cut) };
            }
        };
        self.count(what);
        if let Some(effect) = effect {
            self.sim.fault(fault(effect));
        }
        self.forward_surely(request).await
    }

    /// The controller dies at this moment of its create or upload.
    async fn kill_at(
        self: &Arc<Self>,
        moment: Moment,
        operator: &Operator,
        request: Whole,
    ) -> Result<Answer, Cut> {
        match moment {
            Moment::CreateLost | Moment::UploadLost => operator.signal(Signal::KILL),
            Moment::CreateArrives => {
                operator.signal(Signal::KILL);
                let _ = self.forward_surely(request).await;
            }
            Moment::CreateFrozen => {
                operator.signal(Signal::STOP);
                return self.forward_surely(request).await;
            }
            Moment::CreateLate => {
                operator.signal(Signal::KILL);
                let mut rng = plan::stream(self.seed, "late", &[self.cell, self.late().len() as u64]);
                let share = rand::RngExt::random_range(&mut rng, 0.1..2.5);
                self.forward_later(request, self.scale.real(self.scale.grace).mul_f64(share));
            }
            Moment::CreateCommitted | Moment::UploadDone => {
                let _ = self.forward_surely(request).await;
                operator.signal(Signal::KILL);
            }
            Moment::CreateAnswered => {
                let answer = self.forward_surely(request).await;
                let operator = operator.clone();
                tokio::spawn(async move {
                    // The answer is on its way, and the record is some milliseconds of work.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    operator.signal(Signal::KILL);
                });
                return answer;
            }
        }
        Err(Cut)
    }

    async fn upload(self: &Arc<Self>, slot: usize, request: Whole) -> Result<Answer, Cut> {
        if let Some((moment, operator)) = self.due(slot, false) {
            return self.kill_at(moment, &operator, request).await;
        }
        let fate = if self.calm.load(Ordering::SeqCst) || self.always.is_some() {
            Upload::Fine
        } else {
            plan::upload(self.seed, self.cell, self.uploads.fetch_add(1, Ordering::SeqCst))
        };
        let header = |value: Option<&str>| Effect::Header {
            name: "x-goog-upload-status".to_owned(),
            value: value.map(ToOwned::to_owned),
        };
        let effect = match fate {
            Upload::Fine => None,
            Upload::FinalizeLost => Some(Effect::Reset { commit: true }),
            Upload::StillActive => Some(header(Some("active"))),
            Upload::NoStatus => Some(header(None)),
            Upload::Unavailable => {
                Some(Effect::Status { code: 503, commit: false, envelope: true, retry_after: None })
            }
        };
        if let Some(effect) = effect {
            self.count("upload disturbed");
            self.sim.fault(Fault { op: Op::UploadChunk, contains: String::new(), skip: 0, times: 1, effect });
        }
        self.forward_surely(request).await
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn display_names_are_taken_apart() {
        let uid = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";
        assert_eq!(parse(&format!("gbo-chaos-{uid}-2-abc123")), Some((uid, 2, "abc123")));
        assert_eq!(parse("gbo-other-x-1-s"), None);
        assert_eq!(parse(""), None);
    }
}
