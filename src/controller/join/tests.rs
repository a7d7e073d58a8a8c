use std::collections::HashMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::api::GeminiBatchJob;

/// The attempt whose results are collected.
const PRESENT: i32 = 4;

/// The second attempt was cut short.
fn judge() -> Judge {
    let job: GeminiBatchJob = serde_json::from_value(json!({
        "metadata": {"name": "j"}, "spec": {"model": "m"}, "status": {}
    }))
    .unwrap();
    Judge::of(&job).and(2, true)
}

/// The same by the simplest means, with everything in memory.
#[derive(Default)]
struct Model {
    keys: Vec<String>,
    joined: bool,
    found: HashMap<String, Of>,
    counts: Counts,
    /// Lines in the order of their arrival, and whether they belong to no request.
    lines: Vec<(String, bool)>,
}

/// The line that a key has.
#[derive(Clone)]
struct Of {
    attempt: i32,
    early: bool,
    standing: Standing,
    line: usize,
    text: String,
}

/// A line as a result file has it.
#[derive(Clone, Debug)]
struct Sent {
    attempt: i32,
    early: bool,
    raw: String,
}

impl Model {
    fn of(keys: Option<&[String]>, lines: &[Sent]) -> Self {
        let mut model =
            Self { keys: keys.unwrap_or_default().to_vec(), joined: keys.is_some(), ..Self::default() };
        for line in lines {
            model.line(line);
        }
        model.finish();
        model
    }

    fn line(&mut self, Sent { attempt, early, raw }: &Sent) {
        self.lines.push((raw.clone(), true));
        let number = self.lines.len() - 1;
        let Ok(Value::Object(line)) = serde_json::from_str(raw) else {
            self.counts.malformed += 1;
            return;
        };
        let tokens =
            line.get("response").map_or(0, |r| r["usageMetadata"]["totalTokenCount"].as_i64().unwrap());
        let standing = match line.get("error").map(|e| e["code"].as_i64().unwrap()) {
            Some(1 | 4) if *attempt == 2 => Standing::Unanswered,
            Some(_) => Standing::Failed,
            None => Standing::Response,
        };
        let text = match standing {
            Standing::Response => {
                format!("{{\"key\":{},\"attempt\":{attempt},\"response\":{}}}", line["key"], line["response"])
            }
            _ => json!({"error": line["error"], "key": line["key"], "attempt": attempt}).to_string(),
        };
        let key = line["key"].as_str().unwrap().to_owned();
        let new = Of { attempt: *attempt, early: *early, standing, line: number, text };
        let old = self.found.get(&key).cloned();
        if let Some(old) = &old
            && !early
            && old.early
            && old.attempt == *attempt
        {
            self.lines[number].1 = false;
            return;
        }
        // What is no prompt was produced by the model.
        self.counts.usage.add(&Usage { prompt: 0, output: tokens, total: tokens });
        if !self.keys.contains(&key) {
            if self.joined {
                self.counts.foreign += 1;
                return;
            }
            self.keys.push(key.clone());
        }
        if let Some(old) = old {
            let better = old.standing != Standing::Response
                && (new.standing == Standing::Response || new.attempt > old.attempt);
            if !better {
                self.counts.duplicate += 1;
                return;
            }
            if old.attempt == new.attempt {
                self.counts.duplicate += 1;
                self.lines[old.line].1 = true;
            }
        }
        self.lines[number].1 = false;
        self.found.insert(key, new);
    }

    fn finish(&mut self) {
        self.counts.keys = if self.joined { i64::try_from(self.keys.len()).unwrap() } else { 0 };
        for key in &self.keys {
            let Some(Of { attempt, standing, text, .. }) = self.found.get(key) else {
                self.counts.missing += 1;
                if self.counts.missing_sample.len() < SAMPLE {
                    self.counts.missing_sample.push(key.clone());
                }
                continue;
            };
            let tally = self.counts.by_attempt.entry(*attempt).or_default();
            if *standing == Standing::Response {
                tally.succeeded += 1;
                self.counts.succeeded += 1;
                continue;
            }
            tally.failed += 1;
            self.counts.failed += 1;
            self.counts.unanswered += i64::from(*standing == Standing::Unanswered);
            if self.counts.failed_sample.len() < SAMPLE {
                let code = serde_json::from_str::<Value>(text).unwrap()["error"]["code"].as_i64();
                self.counts.failed_sample.push((key.clone(), code.map(|c| i32::try_from(c).unwrap())));
            }
        }
    }

    fn text(&self, what: What) -> String {
        let found = self.keys.iter().filter_map(|key| self.found.get(key));
        let with_break = |text: &String| format!("{text}\n");
        match what {
            What::Results => found.map(|of| with_break(&of.text)).collect(),
            What::Errors => {
                found.filter(|of| of.standing != Standing::Response).map(|of| with_break(&of.text)).collect()
            }
            What::Missing => {
                let missing = self.keys.iter().filter(|key| self.joined && !self.found.contains_key(*key));
                missing.map(|key| with_break(&json!({"key": key}).to_string())).collect()
            }
            What::Unmatched => {
                self.lines.iter().filter(|(_, loose)| *loose).map(|(raw, _)| with_break(raw)).collect()
            }
        }
    }
}

/// What one join gives.
fn joined(limits: Limits, keys: Option<&[String]>, lines: &[Sent], keep: Keep) -> Joined {
    let mut join = match keys {
        Some(_) => Join::with_keys(limits, keep, PRESENT, judge()),
        None => Join::without_keys(limits, keep, PRESENT, judge()),
    };
    for key in keys.unwrap_or_default() {
        join.key(key).unwrap();
    }
    for Sent { attempt, early, raw } in lines {
        match ResultLine::parse(raw) {
            Ok(line) if *early => join.earlier(raw, &line, *attempt).unwrap(),
            Ok(line) => join.line(raw, &line).unwrap(),
            Err(_) => join.malformed(raw.as_bytes()).unwrap(),
        }
    }
    join.finish().unwrap()
}

fn read(joined: &Joined, what: What, chunk: usize) -> String {
    let mut stream = joined.stream(what);
    let mut all = Vec::new();
    while let Some(bytes) = stream.next(chunk).unwrap() {
        all.extend_from_slice(&bytes);
    }
    String::from_utf8(all).unwrap()
}

fn limits(lines: usize, table: usize, parts: usize) -> Limits {
    Limits { lines, table, parts, scratch: Scratch::new(std::env::temp_dir(), u64::MAX) }
}

const ALL: [What; 4] = [What::Results, What::Errors, What::Missing, What::Unmatched];

fn response(key: &str, answer: &str, tokens: i64) -> String {
    format!(
        "{{\"key\":{},\"response\":{}}}",
        json!(key),
        json!({"a": answer, "usageMetadata": {"totalTokenCount": tokens}})
    )
}

fn error(key: &str, code: i32) -> String {
    json!({"key": key, "error": {"code": code, "message": "m"}}).to_string()
}

/// Lines of few keys, so that everything that can happen to a key does.
fn any_line() -> impl Strategy<Value = Sent> {
    let key = prop_oneof![
        (0..12u8).prop_map(|n| format!("k{n}")),
        (0..3u8).prop_map(|n| format!("foreign\n\"{n}"))
    ];
    let raw = (key, 0..8u8, "[a-zä\"]{0,20}", 0..1000i64).prop_map(|(key, kind, text, tokens)| match kind {
        0..4 => response(&key, &text, tokens),
        4 => error(&key, 3),
        5 => error(&key, 8),
        6 => error(&key, 1),
        _ => format!("not a line {text}"),
    });
    // As one of an earlier attempt also what this one stored before it was interrupted.
    (1..6i32, raw).prop_map(|(n, raw)| Sent { attempt: n.min(PRESENT), early: n <= PRESENT, raw })
}

fn any_lines() -> impl Strategy<Value = Vec<Sent>> {
    // What earlier attempts left is read first.
    prop::collection::vec(any_line(), 0..60).prop_map(|mut lines| {
        lines.sort_by_key(|l| !l.early);
        lines
    })
}

proptest! {
    /// Whatever comes in whatever order, and whatever does not fit into memory: the same as by the simplest means.
    #[test]
    fn it_is_what_the_model_says(
        count in 0..14usize,
        known: bool,
        lines in any_lines(),
        (held, table, parts) in (0..3000usize, 0..3000usize, 1..9usize),
        chunk in 1..500usize,
    ) {
        let keys: Vec<String> = (0..count).map(|n| format!("k{n}")).collect();
        let keys = known.then_some(keys.as_slice());
        let model = Model::of(keys, &lines);
        let joined = joined(limits(held, table, parts), keys, &lines, Keep::Lines);
        for what in ALL {
            prop_assert_eq!(read(&joined, what, chunk), model.text(what), "{:?}", what);
        }
        prop_assert_eq!(&joined.counts, &model.counts);
    }

    /// Without lines the counts are the same, and nothing of a line is held or written.
    #[test]
    fn counts_need_no_lines(count in 0..14usize, known: bool, lines in any_lines()) {
        let keys: Vec<String> = (0..count).map(|n| format!("k{n}")).collect();
        let keys = known.then_some(keys.as_slice());
        let full = joined(limits(500, 500, 4), keys, &lines, Keep::Lines);
        let bare = joined(limits(500, 500, 4), keys, &lines, Keep::Counts);
        prop_assert_eq!(&full.counts, &bare.counts);
        prop_assert_eq!(bare.raw_bytes(), 0);
        let keyed = joined(limits(500, 500, 4), keys, &lines, Keep::Keys);
        prop_assert_eq!(&keyed.counts, &full.counts);
        let mut each = Vec::new();
        keyed.each(|key, standing| { each.push((key.to_owned(), standing)); Ok(()) }).unwrap();
        let model = Model::of(keys, &lines);
        let found = model.keys.iter().filter_map(|key| Some((key.clone(), model.found.get(key)?.standing)));
        prop_assert_eq!(each, found.collect::<Vec<_>>());
        prop_assert_eq!(read(&bare, What::Results, 100), "");
    }
}

/// 50,000 keys whose lines come from the last to the first, in 200 KiB.
#[test]
fn memory_is_bounded_whatever_the_size() {
    const MEMORY: usize = 32 << 10;
    let scratch = Scratch::new(std::env::temp_dir(), u64::MAX);
    let limits = Limits { lines: MEMORY, table: MEMORY, parts: 64, scratch: scratch.clone() };
    // Two spools; four tables, whose vectors may have room for twice what they hold; where the tables are in the file.
    let allowed = |lines: u32| 2 * MEMORY + 4 * 2 * MEMORY + lines as usize / 8 * 2 + lines as usize * 2;
    let mut join = Join::with_keys(limits, Keep::Lines, 1, judge());
    let count = 50_000;
    for n in 0..count {
        join.key(&format!("key-{n}")).unwrap();
        assert!(join.held() < allowed(n), "{n}: {} bytes", join.held());
    }
    let answer = "x".repeat(200);
    for n in (0..count).rev() {
        let raw = response(&format!("key-{n}"), &answer, 1);
        join.line(&raw, &ResultLine::parse(&raw).unwrap()).unwrap();
        assert!(join.held() < allowed(count), "{n}: {} bytes", join.held());
    }
    let joined = join.finish().unwrap();
    let raw = usize::try_from(joined.raw_bytes()).unwrap();
    assert!(joined.is_in_files() && raw > 10_000_000);
    assert!(joined.held() < allowed(count) && joined.held() * 20 < raw, "{} bytes", joined.held());
    assert!(
        joined.largest_part() < count as usize / 64 * 2 * size_of::<Entry>(),
        "{}",
        joined.largest_part()
    );
    assert_eq!((joined.counts.succeeded, joined.counts.missing), (i64::from(count), 0));
    let mut stream = joined.stream(What::Results);
    let mut next = 0;
    while let Some(chunk) = stream.next(64 << 10).unwrap() {
        assert!(stream.held() < 3 * (128 << 10), "{} bytes", stream.held());
        for line in std::str::from_utf8(&chunk).unwrap().lines() {
            assert!(line.starts_with(&format!("{{\"key\":\"key-{next}\"")), "{line}");
            next += 1;
        }
    }
    assert_eq!(next, count);
    drop(stream);
    assert!(scratch.used() > 0);
    drop(joined);
    assert_eq!(scratch.used(), 0, "what is not needed any more is given back");
}

#[test]
fn a_job_of_a_config_map_needs_no_file() {
    let scratch = Scratch::new("/nowhere".into(), 0);
    let keys: Vec<String> = (0..1000).map(|n| format!("k{n}")).collect();
    let lines: Vec<Sent> = keys
        .iter()
        .map(|key| Sent { attempt: PRESENT, early: false, raw: response(key, &"x".repeat(900), 1) })
        .collect();
    let joined = joined(Limits::new(scratch), Some(&keys), &lines, Keep::Lines);
    assert!(!joined.is_in_files());
    assert_eq!(joined.counts.succeeded, 1000);
}

#[test]
fn a_line_that_is_too_long_is_passed_on_as_it_came_and_never_held() {
    let mut join = Join::with_keys(limits(1 << 10, 1 << 10, 4), Keep::Lines, 1, judge());
    join.key("k").unwrap();
    let piece = "y".repeat(64 << 10);
    for n in 0..40 {
        join.piece(piece.as_bytes(), n == 39).unwrap();
        assert!(join.held() < 8 << 10, "{} bytes", join.held());
    }
    let raw = response("k", "a", 2);
    join.line(&raw, &ResultLine::parse(&raw).unwrap()).unwrap();
    // The file may end in the midst of one.
    join.piece(b"zz", false).unwrap();
    let joined = join.finish().unwrap();
    assert_eq!((joined.counts.malformed, joined.counts.succeeded), (2, 1));
    let mut stream = joined.stream(What::Unmatched);
    let mut all = Vec::new();
    while let Some(chunk) = stream.next(1 << 10).unwrap() {
        assert!(stream.held() <= 3 << 20, "{} bytes", stream.held());
        all.extend_from_slice(&chunk);
    }
    assert_eq!(String::from_utf8(all).unwrap(), format!("{}\nzz\n", piece.repeat(40)));
}

#[test]
fn a_full_temporary_directory_is_an_error_and_gives_back_what_was_taken() {
    let scratch = Scratch::new(std::env::temp_dir(), 10_000);
    let limits = Limits { scratch: scratch.clone(), ..limits(500, 500, 4) };
    let mut join = Join::with_keys(limits, Keep::Lines, 1, judge());
    let full = (0..10_000).find_map(|n| join.key(&format!("key-{n}")).err()).unwrap();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert!(scratch.used() <= 10_000);
    drop(join);
    assert_eq!(scratch.used(), 0);
}

#[test]
fn the_first_failures_are_named_in_input_order() {
    let keys: Vec<String> = (0..100).map(|n| format!("k{n}")).collect();
    let lines: Vec<Sent> = (0..100)
        .rev()
        .map(|n| Sent { attempt: PRESENT, early: false, raw: error(&format!("k{n}"), n) })
        .collect();
    let named = |keys| joined(limits(500, 500, 4), keys, &lines, Keep::Counts).counts.failed_sample;
    let known: Vec<_> = (0..20).map(|n| (format!("k{n}"), Some(n))).collect();
    assert_eq!(named(Some(&keys)), known);
    // The order of arrival, if they are not known.
    let unknown: Vec<_> = (80..100).rev().map(|n| (format!("k{n}"), Some(n))).collect();
    assert_eq!(named(None), unknown);
}
