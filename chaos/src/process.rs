//! One controller process: started, watched through its log, and ended.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use tokio::sync::watch;

/// What the log of a process tells.
#[derive(Debug, Default)]
struct Seen {
    /// Whether it can still be signalled: the kernel may give its id to somebody else afterwards.
    alive: bool,
    last_step: String,
    panic: Option<String>,
    /// Jobs whose create was sent and whose batch's name is not recorded, by name.
    sending: BTreeMap<String, Instant>,
}

/// Where a process stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// It leads.
    pub leads: bool,
    /// It has decided something since.
    pub works: bool,
    /// How it ended.
    pub ended: Option<ExitStatus>,
}

/// A controller process.
#[derive(Clone)]
pub struct Operator {
    pid: Pid,
    seen: Arc<Mutex<Seen>>,
    standing: watch::Receiver<Standing>,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Operator {
    /// Starts one. Its log is added to `log`.
    pub fn start(mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true).spawn()?;
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)).context("it has no id")?;
        let lines = BufReader::new(child.stderr.take().context("no log")?);
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let seen = Arc::new(Mutex::new(Seen { alive: true, ..Seen::default() }));
        let (told, standing) = watch::channel(Standing::default());
        let reads = Arc::clone(&seen);
        tokio::spawn(async move {
            let mut lines = lines.lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let _ = writeln!(file, "{} {line}", pid.as_raw_nonzero());
                if line.contains(" panicked at ") {
                    lock(&reads).panic.get_or_insert_with(|| line.clone());
                }
                let Ok(entry) = serde_json::from_str::<Value>(&line) else { continue };
                note(&reads, &entry);
                match entry["message"].as_str() {
                    Some("leading") => told.send_modify(|s| (s.leads, s.works) = (true, false)),
                    Some("not leading any more") => told.send_modify(|s| (s.leads, s.works) = (false, false)),
                    Some("decided") => {
                        told.send_if_modified(|s| !std::mem::replace(&mut s.works, true));
                    }
                    _ => {}
                }
            }
            lock(&reads).alive = false;
            let ended = child.wait().await.ok();
            told.send_modify(|s| {
                *s = Standing { leads: false, works: false, ended: ended.or(Some(ExitStatus::default())) }
            });
        });
        Ok(Self { pid, seen, standing })
    }

    /// Sends a signal, if it is still there.
    pub fn signal(&self, signal: Signal) {
        let seen = lock(&self.seen);
        if seen.alive {
            let _ = kill_process(self.pid, signal);
        }
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// Waits until it leads or has ended.
    pub async fn leads_or_ended(&mut self) -> Standing {
        let wanted = |s: &Standing| s.leads || s.ended.is_some();
        self.standing.wait_for(wanted).await.map(|s| *s).unwrap_or_default()
    }

    /// Waits until it has ended.
    pub async fn ended(&mut self) {
        let _ = self.standing.wait_for(|s| s.ended.is_some()).await;
    }

    /// Waits until it has ended, for so long at most. Whether it did.
    pub async fn ended_within(&mut self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.ended()).await.is_ok()
    }

    /// Waits until it has decided something as a leader or has ended, for so long at most.
    pub async fn works_within(&mut self, patience: Duration) {
        let wanted = |s: &Standing| s.works || s.ended.is_some();
        let _ = tokio::time::timeout(patience, self.standing.wait_for(wanted)).await;
    }

    /// Waits until it does not lead any more, for so long at most. Whether that is so.
    pub async fn leads_not_within(&mut self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.standing.wait_for(|s| !s.leads)).await.is_ok()
    }

    /// Waits until it is stopped by a signal, for so long at most. Whether it is.
    pub async fn stops_within(&mut self, patience: Duration) -> bool {
        let since = Instant::now();
        while since.elapsed() < patience && self.standing().ended.is_none() {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", self.pid.as_raw_nonzero()));
            // The state is the first field behind the name in parentheses.
            if state.is_ok_and(|s| s.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// The last step that it logged.
    pub fn last_step(&self) -> String {
        lock(&self.seen).last_step.clone()
    }

    /// The first panic.
    pub fn panic(&self) -> Option<String> {
        lock(&self.seen).panic.clone()
    }

    /// Jobs whose create it sent, and whose batch's name it did not record.
    pub fn sending(&self) -> Vec<String> {
        lock(&self.seen).sending.keys().cloned().collect()
    }
}

fn note(seen: &Mutex<Seen>, entry: &Value) {
    let job = entry["job"].as_str().unwrap_or_default();
    let mut seen = lock(seen);
    match entry["message"].as_str().unwrap_or_default() {
        "decided" => entry["step"].as_str().unwrap_or_default().clone_into(&mut seen.last_step),
        "create: sending" => {
            seen.sending.insert(job.to_owned(), Instant::now());
        }
        // A refusal in Google's own words: there is no batch.
        "create: no batch name" if entry["clean_refusal"] == true => {
            seen.sending.remove(job);
        }
        "status" if entry["reason"] == "Submitted" => {
            seen.sending.remove(job);
        }
        _ => {}
    }
}
