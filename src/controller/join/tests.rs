use std::collections::HashMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// The same by the simplest means, with everything in memory.
#[derive(Default)]
struct Model {
    keys: Vec<String>,
    joined: bool,
    /// Source, outcome and line of each key.
    found: HashMap<String, (Source, String, String)>,
    counts: Counts,
    unmatched: String,
}

/// A line as a result file has it.
#[derive(Clone, Debug)]
struct Sent {
    source: Source,
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

    fn loose(&mut self, raw: &str) {
        self.unmatched += raw;
        self.unmatched += "\n";
    }

    /// What is no prompt was produced by the model.
    fn cost(&mut self, tokens: i64) {
        self.counts.usage.add(&Usage { prompt: 0, output: tokens, total: tokens });
    }

    fn line(&mut self, Sent { source, raw }: &Sent) {
        let Ok(Value::Object(line)) = serde_json::from_str(raw) else {
            self.counts.malformed += 1;
            return self.loose(raw);
        };
        let total =
            line.get("response").map_or(0, |r| r["usageMetadata"]["totalTokenCount"].as_i64().unwrap());
        let code = line.get("error").map(|e| e["code"].as_i64().unwrap());
        let (kind, text) = match code {
            Some(1 | 4) => ("unanswered", json!({"error": line["error"], "key": line["key"]}).to_string()),
            Some(_) => ("error", json!({"error": line["error"], "key": line["key"]}).to_string()),
            None => ("response", format!("{{\"key\":{},\"response\":{}}}", line["key"], line["response"])),
        };
        if *source < Source::PRESENT && kind == "unanswered" {
            return;
        }
        let key = line["key"].as_str().unwrap().to_owned();
        if !self.keys.contains(&key) {
            if self.joined {
                self.counts.foreign += 1;
                self.cost(total);
                return self.loose(raw);
            }
            self.keys.push(key.clone());
        }
        match self.found.get(&key) {
            Some((Source::PRESENT, ..)) => {
                self.counts.duplicate += 1;
                self.cost(total);
                return self.loose(raw);
            }
            Some((before, kind, _)) if kind != "error" || before == source => return,
            _ => {}
        }
        self.cost(total);
        self.found.insert(key, (*source, kind.to_owned(), text));
    }

    fn finish(&mut self) {
        self.counts.keys = if self.joined { self.keys.len() as i64 } else { 0 };
        for key in &self.keys {
            match self.found.get(key) {
                None => {
                    self.counts.missing += 1;
                    if self.counts.missing_sample.len() < SAMPLE {
                        self.counts.missing_sample.push(key.clone());
                    }
                }
                Some((_, kind, _)) => {
                    self.counts.succeeded += i64::from(kind == "response");
                    self.counts.failed += i64::from(kind != "response");
                    self.counts.unanswered += i64::from(kind == "unanswered");
                }
            }
        }
    }

    fn text(&self, what: What) -> String {
        let found = self.keys.iter().filter_map(|key| self.found.get(key));
        match what {
            What::Results => found.map(|(.., text)| format!("{text}\n")).collect(),
            What::Errors => found
                .filter(|(_, kind, _)| kind != "response")
                .map(|(.., text)| format!("{text}\n"))
                .collect(),
            What::Missing => {
                let missing = self.keys.iter().filter(|key| !self.found.contains_key(*key));
                missing.map(|key| format!("{}\n", json!({"key": key}))).collect()
            }
            What::Unmatched => self.unmatched.clone(),
        }
    }
}

/// What one join gives.
fn joined(limits: Limits, keys: Option<&[String]>, lines: &[Sent], keep: Keep) -> Joined {
    let mut join = match keys {
        Some(_) => Join::with_keys(limits, keep),
        None => Join::without_keys(limits, keep),
    };
    for key in keys.unwrap_or_default() {
        join.key(key).unwrap();
    }
    for Sent { source, raw } in lines {
        match ResultLine::parse(raw) {
            Ok(line) => join.line(*source, raw, &line).unwrap(),
            Err(_) => join.malformed(raw.as_bytes()).unwrap(),
        }
    }
    join.finish().unwrap()
}

fn read(joined: &Joined, what: What, chunk: usize) -> (String, Streamed) {
    let mut stream = joined.stream(what);
    let mut all = Vec::new();
    while let Some(bytes) = stream.next(chunk).unwrap() {
        all.extend_from_slice(&bytes);
    }
    (String::from_utf8(all).unwrap(), stream.streamed())
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

fn error(key: &str, code: i64) -> String {
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
    (0..4u8, raw).prop_map(|(source, raw)| {
        let source = if source == 3 { Source::PRESENT } else { Source(source) };
        Sent { source, raw }
    })
}

fn any_lines() -> impl Strategy<Value = Vec<Sent>> {
    // Sources are read one after the other.
    prop::collection::vec(any_line(), 0..60).prop_map(|mut lines| {
        lines.sort_by_key(|l| l.source);
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
            let (text, streamed) = read(&joined, what, chunk);
            prop_assert_eq!(&text, &model.text(what), "{:?}", what);
            prop_assert_eq!(streamed.bytes, text.len() as u64);
            prop_assert_eq!(streamed.lines, text.matches('\n').count() as u64);
            prop_assert_eq!(streamed.sha256, crate::controller::identity::hex(&Sha256::digest(&text)));
        }
        let failed = joined.counts.failed_sample.clone();
        prop_assert_eq!(failed.len() as i64, joined.counts.failed.min(SAMPLE as i64));
        for (key, code) in failed {
            let named = format!("\"code\":{}", code.unwrap());
            let known = model.found.get(&key).is_some_and(|(.., text)| text.contains(&named));
            prop_assert!(known, "{} {}", key, named);
        }
        prop_assert_eq!(&Counts { failed_sample: Vec::new(), ..joined.counts }, &model.counts);
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
        prop_assert_eq!(read(&bare, What::Results, 100).0, "");
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
    let mut join = Join::with_keys(limits, Keep::Lines);
    let count = 50_000;
    for n in 0..count {
        join.key(&format!("key-{n}")).unwrap();
        assert!(join.held() < allowed(n), "{n}: {} bytes", join.held());
    }
    let answer = "x".repeat(200);
    for n in (0..count).rev() {
        let raw = response(&format!("key-{n}"), &answer, 1);
        join.line(Source::PRESENT, &raw, &ResultLine::parse(&raw).unwrap()).unwrap();
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
    drop((stream.streamed(), stream));
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
        .map(|key| Sent { source: Source::PRESENT, raw: response(key, &"x".repeat(900), 1) })
        .collect();
    let joined = joined(Limits::new(scratch), Some(&keys), &lines, Keep::Lines);
    assert!(!joined.is_in_files());
    assert_eq!(joined.counts.succeeded, 1000);
}

#[test]
fn a_line_that_is_too_long_is_passed_on_as_it_came_and_never_held() {
    let mut join = Join::with_keys(limits(1 << 10, 1 << 10, 4), Keep::Lines);
    join.key("k").unwrap();
    let piece = "y".repeat(64 << 10);
    for n in 0..40 {
        join.piece(piece.as_bytes(), n == 39).unwrap();
        assert!(join.held() < 8 << 10, "{} bytes", join.held());
    }
    let raw = response("k", "a", 2);
    join.line(Source::PRESENT, &raw, &ResultLine::parse(&raw).unwrap()).unwrap();
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
    assert_eq!(stream.streamed().lines, 2);
}

#[test]
fn a_full_temporary_directory_is_an_error_and_gives_back_what_was_taken() {
    let scratch = Scratch::new(std::env::temp_dir(), 10_000);
    let mut join = Join::with_keys(Limits { scratch: scratch.clone(), ..limits(500, 500, 4) }, Keep::Lines);
    let full = (0..10_000).find_map(|n| join.key(&format!("key-{n}")).err()).unwrap();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert!(scratch.used() <= 10_000);
    drop(join);
    assert_eq!(scratch.used(), 0);
}

#[test]
fn the_first_failures_are_named_in_the_order_of_their_arrival() {
    let keys: Vec<String> = (0..100).map(|n| format!("k{n}")).collect();
    let lines: Vec<Sent> =
        (0..100).rev().map(|n| Sent { source: Source::PRESENT, raw: error(&format!("k{n}"), n) }).collect();
    let joined = joined(limits(500, 500, 4), Some(&keys), &lines, Keep::Counts);
    let expected: Vec<_> = (80..100).rev().map(|n| (format!("k{n}"), Some(n))).collect();
    assert_eq!(joined.counts.failed_sample, expected);
}
