//! The verdict: what the API server holds against what the simulator knows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use gemini_simulator::{BatchView, LogEntry, Op};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DynamicObject, ListParams};
use kube::{Api, ResourceExt as _};
use serde_json::Value;

use crate::cell::{Cell, Record, attempt, jobs, lock, prompt, reason};
use crate::cluster::insist;
use crate::gemini::parse;

/// What a run came to.
#[derive(Debug, Default)]
pub struct Verdict {
    pub jobs: usize,
    pub succeeded: usize,
    pub batches: usize,
    /// Attempts, by the number of creates that reached the simulator for each.
    pub creates: BTreeMap<usize, usize>,
    /// Attempts for which more than one batch was created.
    pub duplicates: Vec<String>,
    /// Those of which more than one was not cancelled.
    pub running: Vec<String>,
    pub lost: Vec<String>,
    pub stuck: Vec<String>,
    pub mismatches: Vec<String>,
    /// All that is known of the jobs above.
    pub evidence: String,
}

impl Verdict {
    /// Nothing was duplicated and left so, lost, stuck or wrong.
    pub fn is_good(&self) -> bool {
        self.running.is_empty() && self.lost.is_empty() && self.stuck.is_empty() && self.mismatches.is_empty()
    }

    pub fn add(&mut self, other: Self) {
        self.jobs += other.jobs;
        self.succeeded += other.succeeded;
        self.batches += other.batches;
        for (number, attempts) in other.creates {
            *self.creates.entry(number).or_default() += attempts;
        }
        self.duplicates.extend(other.duplicates);
        self.running.extend(other.running);
        self.lost.extend(other.lost);
        self.stuck.extend(other.stuck);
        self.mismatches.extend(other.mismatches);
        self.evidence += &other.evidence;
    }
}

/// Judges a cell that has come to rest.
pub async fn judge(cell: &Cell) -> anyhow::Result<Verdict> {
    let api = jobs(&cell.client, &cell.namespace);
    let all = ListParams::default();
    let list = insist("listing jobs", || api.list(&all)).await?;
    let maps: Api<ConfigMap> = Api::namespaced(cell.client.clone(), &cell.namespace);
    let maps = insist("listing results", || maps.list(&all)).await?;
    let maps: BTreeMap<String, ConfigMap> = maps.items.into_iter().map(|m| (m.name_any(), m)).collect();
    let there: BTreeMap<String, DynamicObject> =
        list.items.into_iter().map(|j| (j.uid().unwrap_or_default(), j)).collect();
    let records = lock(&cell.records).clone();
    let (batches, log) = (cell.gemini.sim.batches(), cell.gemini.sim.log());
    let mut verdict = weigh(&records, &there, &maps, &batches, &log);
    let bad: BTreeSet<&str> =
        [&verdict.duplicates, &verdict.running, &verdict.lost, &verdict.stuck, &verdict.mismatches]
            .into_iter()
            .flatten()
            .filter_map(|text| text.split([':', ' ']).next())
            .collect();
    let mut evidence = String::new();
    for name in bad.into_iter().take(5) {
        if let Some(record) = records.iter().find(|r| r.name == name) {
            evidence += &about(cell, record, there.get(&record.uid), &batches, &log);
        }
    }
    verdict.evidence = evidence;
    for text in [
        &mut verdict.duplicates,
        &mut verdict.running,
        &mut verdict.lost,
        &mut verdict.stuck,
        &mut verdict.mismatches,
    ]
    .into_iter()
    .flatten()
    {
        text.insert_str(0, &format!("{}/", cell.namespace));
    }
    Ok(verdict)
}

/// The comparison itself. Pure.
fn weigh(
    records: &[Record],
    there: &BTreeMap<String, DynamicObject>,
    maps: &BTreeMap<String, ConfigMap>,
    batches: &[BatchView],
    log: &[LogEntry],
) -> Verdict {
    let mut verdict = Verdict { jobs: records.len(), batches: batches.len(), ..Verdict::default() };
    let name_of = |uid: &str| {
        records.iter().find(|r| r.uid == uid).map_or_else(|| format!("unknown {uid}"), |r| r.name.clone())
    };
    let mut creates: BTreeMap<(&str, u32), usize> = BTreeMap::new();
    for entry in log.iter().filter(|e| e.op == Op::BatchCreate) {
        let display_name = entry.body.as_ref().and_then(|b| b["batch"]["displayName"].as_str());
        if let Some((uid, number, _)) = display_name.and_then(parse) {
            *creates.entry((uid, number)).or_default() += 1;
        }
    }
    for number in creates.into_values() {
        *verdict.creates.entry(number).or_default() += 1;
    }
    let mut by_attempt: BTreeMap<(&str, u32), Vec<&BatchView>> = BTreeMap::new();
    for batch in batches {
        match parse(&batch.display_name) {
            Some((uid, number, _)) => by_attempt.entry((uid, number)).or_default().push(batch),
            None => verdict.mismatches.push(format!("{}: a batch of nobody", batch.display_name)),
        }
        if !records.iter().any(|r| batch.display_name.contains(&r.uid)) {
            verdict.mismatches.push(format!("{}: a batch of no job", batch.display_name));
        }
    }
    for ((uid, number), all) in by_attempt.iter().filter(|(_, all)| all.len() > 1) {
        let what = format!("{}: attempt {number} has {} batches", name_of(uid), all.len());
        if all.iter().filter(|b| !b.cancelled && !b.deleted).count() > 1 {
            verdict.running.push(what.clone());
        }
        verdict.duplicates.push(what);
    }
    for record in records {
        let Some(job) = there.get(&record.uid) else {
            verdict.lost.push(format!("{}: it does not exist any more", record.name));
            continue;
        };
        let of_job = batches.iter().filter(|b| parse(&b.display_name).is_some_and(|(u, ..)| u == record.uid));
        weigh_job(&mut verdict, record, job, maps, &of_job.collect::<Vec<_>>());
    }
    verdict
}

fn weigh_job(
    verdict: &mut Verdict,
    record: &Record,
    job: &DynamicObject,
    maps: &BTreeMap<String, ConfigMap>,
    batches: &[&BatchView],
) {
    let name = &record.name;
    let state = job.data["status"]["state"].as_str().unwrap_or_default();
    verdict.succeeded += usize::from(state == "Succeeded");
    if reason(job, "Finished").is_none() {
        let why = reason(job, "Stalled").unwrap_or("not stalled");
        verdict.stuck.push(format!("{name}: {state}, {why}"));
        return;
    }
    let recorded = attempt(job)["batchName"].as_str();
    let Some(batch) = batches.iter().find(|b| Some(b.name.as_str()) == recorded) else {
        let paid = batches.iter().any(|b| b.state == "SUCCEEDED");
        let what = format!("{name}: {state}, and the simulator does not know its batch");
        let list = if paid { &mut verdict.lost } else { &mut verdict.mismatches };
        list.push(what);
        return;
    };
    let wanted = match batch.state.as_str() {
        "SUCCEEDED" => "Succeeded",
        "CANCELLED" => "Cancelled",
        _ => "Failed",
    };
    let said = attempt(job)["remoteState"].as_str().unwrap_or_default();
    if state != wanted || said != batch.state {
        verdict.mismatches.push(format!("{name}: {state} ({said}), but the batch is {}", batch.state));
    }
    if batch.state == "SUCCEEDED" {
        let counts = &job.data["status"]["requests"];
        if counts["succeeded"].as_u64() != u64::try_from(record.plan.requests).ok() {
            verdict.lost.push(format!("{name}: counts {counts}, of {} requests", record.plan.requests));
        } else if record.plan.stored
            && let Err(what) = stored(record, maps)
        {
            verdict.lost.push(format!("{name}: {what}"));
        }
    }
}

/// Whether the ConfigMap has the answer to each of the job's own prompts, once.
fn stored(record: &Record, maps: &BTreeMap<String, ConfigMap>) -> Result<(), String> {
    let map = record.name.replace("job-", "out-");
    let data = maps.get(&map).and_then(|m| m.data.as_ref()).ok_or_else(|| format!("no ConfigMap {map}"))?;
    let lines = data.get("results.jsonl").ok_or_else(|| format!("no results in {map}"))?;
    let mut found: Vec<(String, bool)> = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .map(|line| {
            let key = line["key"].as_str().unwrap_or_default().to_owned();
            let number = key.trim_start_matches('k').parse().unwrap_or(0);
            let right = line["response"].to_string().contains(&prompt(&record.name, number));
            (key, right)
        })
        .collect();
    found.sort();
    let wanted: Vec<(String, bool)> = (1..=record.plan.requests).map(|n| (format!("k{n}"), true)).collect();
    if found == wanted { Ok(()) } else { Err(format!("{map} holds {found:?}")) }
}

/// All that is known of a job.
fn about(
    cell: &Cell,
    record: &Record,
    job: Option<&DynamicObject>,
    batches: &[BatchView],
    log: &[LogEntry],
) -> String {
    let mut text = format!("\n---- {}/{} ({})\n", cell.namespace, record.name, record.uid);
    let status = job.map(|j| &j.data["status"]);
    let _ = writeln!(text, "status: {}", serde_json::to_string_pretty(&status).unwrap_or_default());
    let mine = |display_name: &str| display_name.contains(&record.uid);
    for batch in batches.iter().filter(|b| mine(&b.display_name)) {
        let _ = writeln!(text, "batch: {}", serde_json::to_string(batch).unwrap_or_default());
    }
    let names: Vec<&str> =
        batches.iter().filter(|b| mine(&b.display_name)).map(|b| b.name.as_str()).collect();
    let files: BTreeSet<&str> =
        batches.iter().filter(|b| mine(&b.display_name)).filter_map(|b| b.file.as_deref()).collect();
    for entry in log.iter().filter(|e| {
        e.display_name.as_deref().is_some_and(mine)
            || e.batch.as_deref().is_some_and(|b| names.contains(&b))
            || e.file.as_deref().is_some_and(|f| files.contains(f))
            || e.body.as_ref().is_some_and(|b| b.to_string().contains(&record.uid))
    }) {
        let _ = writeln!(
            text,
            "simulator: {} {:?} {} key {:?} file {:?} -> {}",
            entry.time, entry.op, entry.path, entry.key, entry.file, entry.status
        );
    }
    for slot in 0..2 {
        let log = std::fs::read_to_string(cell.log(slot)).unwrap_or_default();
        let quoted = format!("\"{}\"", record.name);
        let lines: Vec<&str> =
            log.lines().filter(|l| l.contains(&quoted) || l.contains(&record.uid)).collect();
        for line in lines.iter().skip(lines.len().saturating_sub(60)) {
            let _ = writeln!(text, "controller {slot}: {line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use gemini_simulator::BatchView;
    use serde_json::json;

    use super::*;
    use crate::plan;

    const UID: &str = "0b0e7c1e-7f3a-4c55-9a2e-3d5c1f0e9b11";

    fn record() -> Record {
        let plan = plan::Job { requests: 1, stored: true, directive: "", own_secret: false };
        Record { name: "job-0001".to_owned(), uid: UID.to_owned(), plan }
    }

    fn batch(name: &str, state: &str, cancelled: bool) -> BatchView {
        BatchView {
            name: format!("batches/{name}"),
            display_name: format!("gbo-chaos-{UID}-1-{name}"),
            state: state.to_owned(),
            file: None,
            requests: 1,
            uris: Vec::new(),
            key: String::new(),
            deleted: false,
            cancelled,
        }
    }

    fn job(state: &str, finished: &str) -> BTreeMap<String, DynamicObject> {
        let job = serde_json::from_value(json!({
            "apiVersion": "geminibatch.dev/v1alpha1", "kind": "GeminiBatchJob",
            "metadata": {"name": "job-0001", "uid": UID},
            "status": {"state": state, "requests": {"succeeded": 1},
                "conditions": [{"type": "Finished", "status": finished, "reason": "Completed"}],
                "attempts": [{"number": 1, "batchName": "batches/a", "remoteState": "SUCCEEDED"}]}}))
        .unwrap();
        BTreeMap::from([(UID.to_owned(), job)])
    }

    fn results(line: &str) -> BTreeMap<String, ConfigMap> {
        let map = serde_json::from_value(json!({"data": {"results.jsonl": line}})).unwrap();
        BTreeMap::from([("out-0001".to_owned(), map)])
    }

    fn good() -> BTreeMap<String, ConfigMap> {
        results("{\"key\":\"k1\",\"response\":\"to: job-0001 asks k1\"}\n")
    }

    fn verdict(
        there: &BTreeMap<String, DynamicObject>,
        maps: &BTreeMap<String, ConfigMap>,
        batches: &[BatchView],
    ) -> Verdict {
        weigh(&[record()], there, maps, batches, &[])
    }

    #[test]
    fn a_job_that_is_as_it_should_be_is_good() {
        let v = verdict(&job("Succeeded", "True"), &good(), &[batch("a", "SUCCEEDED", false)]);
        assert!(v.is_good() && v.duplicates.is_empty() && v.succeeded == 1, "{v:?}");
    }

    #[test]
    fn two_batches_of_one_attempt_are_seen_and_only_a_cancelled_one_is_forgiven() {
        let job = job("Succeeded", "True");
        let v = verdict(&job, &good(), &[batch("a", "SUCCEEDED", false), batch("b", "RUNNING", false)]);
        assert!(!v.is_good() && v.duplicates.len() == 1 && v.running.len() == 1, "{v:?}");
        let v = verdict(&job, &good(), &[batch("a", "SUCCEEDED", false), batch("b", "CANCELLED", true)]);
        assert!(v.is_good() && v.duplicates.len() == 1, "{v:?}");
    }

    #[test]
    fn what_is_lost_stuck_or_wrong_is_seen() {
        let batches = [batch("a", "SUCCEEDED", false)];
        assert_eq!(verdict(&BTreeMap::new(), &good(), &batches).lost.len(), 1);
        assert_eq!(verdict(&job("Running", "False"), &good(), &batches).stuck.len(), 1);
        assert_eq!(verdict(&job("Failed", "True"), &good(), &batches).mismatches.len(), 1);
        assert_eq!(verdict(&job("Succeeded", "True"), &BTreeMap::new(), &batches).lost.len(), 1);
        let other = results("{\"key\":\"k1\",\"response\":\"to: job-0002 asks k1\"}\n");
        assert_eq!(verdict(&job("Succeeded", "True"), &other, &batches).lost.len(), 1);
        let twice = "{\"key\":\"k1\",\"response\":\"to: job-0001 asks k1\"}\n".repeat(2);
        assert_eq!(verdict(&job("Succeeded", "True"), &results(&twice), &batches).lost.len(), 1);
        // Another batch than the recorded one was paid for.
        assert_eq!(
            verdict(&job("Succeeded", "True"), &good(), &[batch("b", "SUCCEEDED", false)]).lost.len(),
            1
        );
    }
}
