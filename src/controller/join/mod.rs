//! Joins the lines of result files with the requests that they answer, in bounded memory. Pure: no client required, files
//! in a temporary directory at most.
//!
//! By key only, never by order: Gemini's lines come in any order, and some do not come. A file has up to 2 GB and a million
//! lines, so neither lines nor keys are held in memory. A line is spooled as it came; what is remembered of it, and of each
//! key, is a record of a few dozen bytes that bears a hash of the key. Records are kept in parts by that hash, so that at
//! the end one part after the other can be joined, and what comes of it in parts by the place in the input, so that
//! the results can be read in input order. What is small never leaves memory.
//!
//! ```text
//! keys  ──► table of keys by hash ──┐
//!                                   ├──► join, part by part ──► table of slots by place ──► results, errors, missing
//! lines ─┬► table of lines by hash ─┘                      └──► which lines belong to no request ──► unmatched
//!        └► spool ◄──────────────────────────────────────────────────── read again as it is written
//! ```

mod records;
mod scratch;
mod streams;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BinaryHeap};
use std::io;

use serde_json::json;
use sha2::{Digest, Sha256};

use self::records::{Entry, Found, Key, Kind, Line, Place, Slot};
pub use self::scratch::{Lent, Scratch, Spool};
use self::scratch::{Reads, Table};
use self::streams::{At, Slots};
pub use self::streams::{Stream, What};
use super::retry::{self, Judge, Standing};
use crate::api::conditions::cut;
use crate::gemini::results::{Outcome, ResultLine, Usage};

/// Failed and missing keys that are remembered by name.
const SAMPLE: usize = 20;
/// Bytes of a key by which it is named. One that was sent has no more.
const NAME_BYTES: usize = 1024;
/// Parts of each table: of 30 million keys, more than fit into an input of 2 GB, one part takes 20 MB.
const PARTS: usize = 128;

/// How much of a join may be in memory. Beyond that it goes to the temporary directory.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of the lines, and again of the keys' text.
    pub lines: usize,
    /// Bytes of each of the four tables.
    pub table: usize,
    /// Parts of a table.
    pub parts: usize,
    /// Where what does not fit goes.
    pub scratch: Scratch,
}

impl Limits {
    /// At most 8 MiB of lines, keys and tables altogether; a job whose results fit into a `ConfigMap` writes nothing to
    /// the temporary directory. One part of the keys while they are joined comes on top.
    #[must_use]
    pub fn new(scratch: Scratch) -> Self {
        Self { lines: 2 << 20, table: 1 << 20, parts: PARTS, scratch }
    }
}

/// Whether lines are wanted, or only counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Lines as well.
    Lines,
    /// Only what came of each key: see [`Joined::each`].
    Keys,
    /// Counts.
    Counts,
}

/// A join that is being fed: first all keys, in input order, then the lines.
#[derive(Debug)]
pub struct Join {
    limits: Limits,
    keep: Keep,
    judge: Judge,
    /// Whose result file is going to be read.
    attempt: i32,
    /// Whether the keys are known. If not, the order of results is that of their arrival.
    joined: bool,
    /// As JSON, a line for each key or, if they are not known, for each line.
    names: Spool,
    lines: Spool,
    keys: Table<{ Key::SIZE }>,
    arrived: Table<{ Line::SIZE }>,
    places: Table<{ Place::SIZE }>,
    key_count: u32,
    line_count: u32,
    /// A line that is too long to be held comes in pieces.
    open: Option<Place>,
    /// Lines that belong to no request.
    loose: Bits,
    out: Counts,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// Requests, if their keys are known.
    pub keys: i64,
    /// Requests with a response.
    pub succeeded: i64,
    /// Requests with an error.
    pub failed: i64,
    /// The first of them, with Google's code where there is one.
    pub failed_sample: Vec<(String, Option<i32>)>,
    /// Those of the failed requests that were never answered.
    pub unanswered: i64,
    /// Those that `spec.retryPolicy` sends again, if it allows a further attempt.
    pub retryable: i64,
    /// Which attempt the lines of requests came from.
    pub by_attempt: BTreeMap<i32, Tally>,
    /// Requests without any line.
    pub missing: i64,
    /// The first of them.
    pub missing_sample: Vec<String>,
    /// Lines whose key has another one that counts.
    pub duplicate: i64,
    /// Lines whose key was not sent, or that have none.
    pub foreign: i64,
    /// Lines that can't be read.
    pub malformed: i64,
    /// Tokens, summed over all lines.
    pub usage: Usage,
}

/// Lines that came from one attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Responses.
    pub succeeded: i64,
    /// Errors.
    pub failed: i64,
}

/// One bit for each line.
#[derive(Clone, Debug, Default)]
struct Bits(Vec<u8>);

impl Bits {
    fn set(&mut self, at: u32) {
        let byte = at as usize / 8;
        if self.0.len() <= byte {
            self.0.resize(byte + 1, 0);
        }
        if let Some(byte) = self.0.get_mut(byte) {
            *byte |= 1 << (at % 8);
        }
    }

    fn has(&self, at: u32) -> bool {
        self.0.get(at as usize / 8).is_some_and(|byte| byte & (1 << (at % 8)) != 0)
    }
}

impl Join {
    /// Of requests whose keys are given with [`Join::key`].
    #[must_use]
    pub fn with_keys(limits: Limits, keep: Keep, attempt: i32, judge: Judge) -> Self {
        Self::new(limits, keep, attempt, judge, true)
    }

    /// Of requests whose keys are not known.
    #[must_use]
    pub fn without_keys(limits: Limits, keep: Keep, attempt: i32, judge: Judge) -> Self {
        Self::new(limits, keep, attempt, judge, false)
    }

    fn new(limits: Limits, keep: Keep, attempt: i32, judge: Judge, joined: bool) -> Self {
        let Limits { lines, table, parts, ref scratch } = limits;
        Self {
            names: Spool::new(scratch, lines),
            lines: Spool::new(scratch, lines),
            keys: Table::new(scratch, parts, table),
            arrived: Table::new(scratch, parts, table),
            places: Table::new(scratch, 1, table),
            limits,
            keep,
            judge,
            attempt,
            joined,
            key_count: 0,
            line_count: 0,
            open: None,
            loose: Bits::default(),
            out: Counts::default(),
        }
    }

    /// Bytes held in memory: whatever the size of the files, at most what the limits say, but for a bit of each line.
    #[must_use]
    pub fn held(&self) -> usize {
        self.names.held()
            + self.lines.held()
            + self.keys.held()
            + self.arrived.held()
            + self.places.held()
            + self.loose.0.capacity()
    }

    /// The next key that was sent.
    pub fn key(&mut self, key: &str) -> io::Result<()> {
        let position = self.key_count;
        self.key_count = position.checked_add(1).ok_or_else(too_many)?;
        self.name(key)?;
        let hash = hash(key);
        self.keys.push(part_of(&hash, self.limits.parts), &Key { hash, position }.to_bytes())
    }

    fn name(&mut self, key: &str) -> io::Result<()> {
        self.names.append(format!("{}\n", json!(cut(key, NAME_BYTES))).as_bytes())
    }

    /// A line that an earlier attempt left; after a crash in between also one of this attempt, stored already.
    pub fn earlier(&mut self, raw: &str, line: &ResultLine<'_>, attempt: i32) -> io::Result<()> {
        self.take(raw, line, attempt, true)
    }

    /// A line of this attempt, as it came, and what it says.
    pub fn line(&mut self, raw: &str, line: &ResultLine<'_>) -> io::Result<()> {
        self.take(raw, line, self.attempt, false)
    }

    fn take(&mut self, raw: &str, line: &ResultLine<'_>, attempt: i32, early: bool) -> io::Result<()> {
        let Some(key) = line.key.as_deref() else {
            self.out.foreign += 1;
            self.out.usage.add(&line.usage);
            return self.unmatched(raw.as_bytes());
        };
        let code = if let Outcome::Error { code, .. } = line.outcome { code } else { None };
        let kind = Kind { attempt, standing: self.judge.standing(attempt, &line.outcome), code };
        let place = self.spool(raw.as_bytes())?;
        let number = self.next_line(place, key)?;
        let hash = hash(key);
        let record = Line { hash, number, early, kind, place, usage: line.usage };
        self.arrived.push(part_of(&hash, self.limits.parts), &record.to_bytes())
    }

    /// A line that belonged to no request of an earlier attempt, and was counted then.
    pub fn carried(&mut self, raw: &[u8]) -> io::Result<()> {
        self.unmatched(raw)
    }

    /// A line that can't be read.
    pub fn malformed(&mut self, raw: &[u8]) -> io::Result<()> {
        self.out.malformed += 1;
        self.unmatched(raw)
    }

    /// A piece of a line that is too long to be read. It is one line whatever its pieces are; `last`: its end.
    pub fn piece(&mut self, raw: &[u8], last: bool) -> io::Result<()> {
        let there = self.spool(raw)?;
        let mut line = self.open.take().unwrap_or(Place { len: 0, ..there });
        line.len += raw.len() as u64;
        if last {
            return self.too_long(line);
        }
        self.open = Some(line);
        Ok(())
    }

    fn too_long(&mut self, line: Place) -> io::Result<()> {
        self.out.malformed += 1;
        let number = self.next_line(line, "")?;
        self.loose.set(number);
        Ok(())
    }

    fn unmatched(&mut self, raw: &[u8]) -> io::Result<()> {
        let place = self.spool(raw)?;
        let number = self.next_line(place, "")?;
        self.loose.set(number);
        Ok(())
    }

    fn spool(&mut self, raw: &[u8]) -> io::Result<Place> {
        let place = Place { offset: self.lines.len(), len: raw.len() as u64 };
        if self.keep == Keep::Lines {
            self.lines.append(raw)?;
        }
        Ok(place)
    }

    fn next_line(&mut self, place: Place, key: &str) -> io::Result<u32> {
        let number = self.line_count;
        self.line_count = number.checked_add(1).ok_or_else(too_many)?;
        if !self.joined {
            self.name(key)?;
        }
        if self.keep == Keep::Lines {
            self.places.push(0, &place.to_bytes())?;
        }
        Ok(number)
    }

    /// All lines are there: joins them.
    pub fn finish(mut self) -> io::Result<Joined> {
        if let Some(line) = self.open.take() {
            self.too_long(line)?;
        }
        let positions = if self.joined { self.key_count } else { self.line_count };
        let mut slots = Table::new(&self.limits.scratch, self.limits.parts, self.limits.table);
        let (mut missing, mut failed) = (Smallest::default(), Smallest::default());
        let mut largest = 0;
        for part in 0..self.limits.parts {
            let mut entries = self.entries(part)?;
            self.fold(part, &mut entries)?;
            largest = largest.max(entries.capacity() * size_of::<Entry>());
            for Entry { position, line, .. } in entries {
                let Some(line) = line else {
                    self.out.missing += 1;
                    missing.add((position, None));
                    continue;
                };
                if !self.count(line.kind) {
                    failed.add((position, line.kind.code));
                }
                if self.keep != Keep::Counts {
                    let slot = Slot { position, kind: line.kind, place: line.place };
                    slots.push(slot_part(position, positions, self.limits.parts), &slot.to_bytes())?;
                }
            }
        }
        self.out.keys = i64::from(self.key_count);
        self.out.missing_sample = self.named(missing)?.into_iter().map(|(key, _)| key).collect();
        self.out.failed_sample = self.named(failed)?;
        Ok(Joined {
            counts: self.out,
            with_keys: self.joined,
            names_attempts: self.attempt > 1,
            positions,
            parts: self.limits.parts,
            names: self.names,
            lines: self.lines,
            slots,
            places: self.places,
            loose: self.loose,
            largest,
        })
    }

    /// The keys of a part, by hash.
    fn entries(&self, part: usize) -> io::Result<Vec<Entry>> {
        let mut entries;
        if self.joined {
            entries = Vec::with_capacity(usize::try_from(self.keys.count(part)).unwrap_or(0));
            let mut keys = self.keys.records(part);
            while let Some(bytes) = keys.next()? {
                entries.push(Entry::from(Key::from_bytes(&bytes)));
            }
            entries.sort_unstable_by_key(|e| (e.hash, e.position));
        } else {
            // Whichever keys there are, each at the place of its first line.
            entries = Vec::new();
            let mut lines = self.arrived.records(part);
            while let Some(bytes) = lines.next()? {
                let Line { hash, number, .. } = Line::from_bytes(&bytes);
                entries.push(Entry::from(Key { hash, position: number }));
            }
            entries.sort_unstable_by_key(|e| (e.hash, e.position));
            entries.dedup_by_key(|e| e.hash);
        }
        Ok(entries)
    }

    /// Gives each key of a part its line.
    fn fold(&mut self, part: usize, entries: &mut [Entry]) -> io::Result<()> {
        let mut lines = self.arrived.records(part);
        while let Some(bytes) = lines.next()? {
            let line = Line::from_bytes(&bytes);
            let found = entries.binary_search_by_key(&line.hash, |e| e.hash).ok();
            let Some(entry) = found.and_then(|at| entries.get_mut(at)) else {
                self.out.foreign += 1;
                self.out.usage.add(&line.usage);
                self.loose.set(line.number);
                continue;
            };
            let Some(old) = entry.line else {
                self.out.usage.add(&line.usage);
                entry.line = Some(Found::from(line));
                continue;
            };
            let (before, now) = (old.kind, line.kind);
            if !line.early && old.early && before.attempt == now.attempt {
                continue; // this very line is stored already
            }
            self.out.usage.add(&line.usage);
            if !retry::replaces((before.attempt, before.standing), (now.attempt, now.standing)) {
                self.out.duplicate += 1;
                self.loose.set(line.number);
                continue;
            }
            if before.attempt == now.attempt {
                self.out.duplicate += 1;
                self.loose.set(old.number);
            }
            entry.line = Some(Found::from(line));
        }
        Ok(())
    }

    /// Counts what came of a request in the end. Whether it has a response.
    fn count(&mut self, kind: Kind) -> bool {
        let tally = self.out.by_attempt.entry(kind.attempt).or_default();
        if kind.standing == Standing::Response {
            tally.succeeded += 1;
            self.out.succeeded += 1;
            return true;
        }
        tally.failed += 1;
        self.out.failed += 1;
        self.out.unanswered += i64::from(kind.standing == Standing::Unanswered);
        self.out.retryable += i64::from(kind.standing == Standing::Retryable);
        false
    }

    /// The keys at these places.
    fn named(&self, places: Smallest) -> io::Result<Vec<(String, Option<i32>)>> {
        let mut names = Reads::new(&self.names);
        let mut found = Vec::new();
        let mut next = 0;
        for (position, code) in places.0.into_sorted_vec() {
            while next < position {
                names.line(NAME_BYTES)?;
                next += 1;
            }
            let name = names.line(NAME_BYTES)?.and_then(|name| serde_json::from_slice(name).ok());
            found.push((name.unwrap_or_default(), code));
            next += 1;
        }
        Ok(found)
    }
}

/// The first of many places, with what is known of them.
#[derive(Default)]
struct Smallest(BinaryHeap<(u32, Option<i32>)>);

impl Smallest {
    fn add(&mut self, place: (u32, Option<i32>)) {
        self.0.push(place);
        if self.0.len() > SAMPLE {
            self.0.pop();
        }
    }
}

/// Lines that were joined, to be read as often as it takes until they are stored.
#[derive(Debug)]
pub struct Joined {
    /// What was found.
    pub counts: Counts,
    with_keys: bool,
    /// Which attempt a line came from is of interest only if there were several.
    names_attempts: bool,
    positions: u32,
    parts: usize,
    names: Spool,
    lines: Spool,
    slots: Table<{ Slot::SIZE }>,
    places: Table<{ Place::SIZE }>,
    loose: Bits,
    /// Bytes of the largest part while it was joined.
    largest: usize,
}

impl Joined {
    /// Bytes held in memory, apart from what a stream holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.names.held()
            + self.lines.held()
            + self.slots.held()
            + self.places.held()
            + self.loose.0.capacity()
    }

    /// Bytes that were held on top while keys and lines were joined.
    #[must_use]
    pub fn largest_part(&self) -> usize {
        self.largest
    }

    /// Bytes of the lines as they came.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        self.lines.len()
    }

    /// Whether anything had to go to the temporary directory.
    #[must_use]
    pub fn is_in_files(&self) -> bool {
        self.names.is_in_file()
            || self.lines.is_in_file()
            || self.slots.is_in_file()
            || self.places.is_in_file()
    }

    /// Gives each key that has a line to `take`, with what it means, until that fails.
    pub fn each(&self, mut take: impl FnMut(&str, Standing) -> io::Result<()>) -> io::Result<()> {
        let mut slots = Slots::default();
        let mut names = Reads::new(&self.names);
        loop {
            let found = slots.next(self)?;
            let name = names.line(NAME_BYTES)?;
            match (found, name) {
                (At::End, _) => return Ok(()),
                (At::Line(kind, _), Some(name)) => {
                    let name: String = serde_json::from_slice(name).map_err(io::Error::other)?;
                    take(&name, kind.standing)?;
                }
                _ => {}
            }
        }
    }

    /// The lines of one kind, from the first.
    #[must_use]
    pub fn stream(&self, what: What) -> Stream<'_> {
        Stream::new(self, what)
    }
}

impl Default for Joined {
    fn default() -> Self {
        let scratch = Scratch::new(std::env::temp_dir(), 0);
        Self {
            counts: Counts::default(),
            with_keys: false,
            names_attempts: false,
            positions: 0,
            parts: 1,
            names: Spool::new(&scratch, 0),
            lines: Spool::new(&scratch, 0),
            slots: Table::new(&scratch, 1, 0),
            places: Table::new(&scratch, 1, 0),
            loose: Bits::default(),
            largest: 0,
        }
    }
}

/// 128 bits of SHA-256: nobody finds two keys with the same.
fn hash(key: &str) -> [u8; 16] {
    let mut short = [0; 16];
    short.iter_mut().zip(Sha256::digest(key)).for_each(|(to, from)| *to = from);
    short
}

fn part_of(hash: &[u8; 16], parts: usize) -> usize {
    let first = usize::from(u16::from_be_bytes([hash[0], hash[1]]));
    first * parts / (usize::from(u16::MAX) + 1)
}

fn slot_part(position: u32, positions: u32, parts: usize) -> usize {
    let part = u64::from(position) * parts as u64 / u64::from(positions.max(1));
    usize::try_from(part).unwrap_or(0)
}

fn too_many() -> io::Error {
    io::Error::other("more lines than can be counted")
}
