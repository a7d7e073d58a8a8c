//! The keys of an input that may have millions: whether they are unique, and which of them have a result. Pure, apart
//! from a temporary directory for what is too much for memory.
//!
//! A key is kept as a hash of 128 bits with its line, 24 bytes however long it is. They are sorted in pieces; pieces that
//! are full go to files without a name, which vanish with the process, and are merged at the end.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read as _, Seek as _, Write as _};

use rand::RngExt as _;
use sha2::{Digest as _, Sha256};

use super::join::{Lent, Scratch};

/// Keys in memory before they go to a file: 12 MiB.
const IN_MEMORY: usize = 512 * 1024;
const RECORD_BYTES: usize = 24;
const BUFFER_BYTES: usize = 16 << 10;

/// A key by its hash, and the line it stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    hash: [u8; 16],
    line: u64,
}

/// Hashes keys in a way that nobody can find two keys for beforehand.
#[derive(Clone, Debug)]
pub struct Hasher([u8; 16]);

impl Default for Hasher {
    fn default() -> Self {
        Self(rand::rng().random())
    }
}

impl Hasher {
    fn hash(&self, key: &str) -> [u8; 16] {
        let whole: [u8; 32] = Sha256::new().chain_update(self.0).chain_update(key).finalize().into();
        let mut half = [0; 16];
        half.copy_from_slice(&whole[..16]);
        half
    }
}

/// Takes keys in any order.
#[derive(Debug)]
pub struct Sorter {
    hasher: Hasher,
    scratch: Scratch,
    capacity: usize,
    buffer: Vec<Record>,
    runs: Vec<(File, Lent)>,
}

impl Sorter {
    /// An empty one. `scratch`: where files go if there are many.
    #[must_use]
    pub fn new(hasher: &Hasher, scratch: Scratch) -> Self {
        Self { hasher: hasher.clone(), scratch, capacity: IN_MEMORY, buffer: Vec::new(), runs: Vec::new() }
    }

    /// Takes a key. Memory is bounded if [`Sorter::spill`] is called whenever [`Sorter::is_full`].
    pub fn push(&mut self, key: &str, line: u64) {
        self.buffer.push(Record { hash: self.hasher.hash(key), line });
    }

    /// Whether it is time for [`Sorter::spill`].
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.buffer.len() >= self.capacity
    }

    /// Writes what is in memory to a file. Takes a tenth of a second, and is not asynchronous.
    pub fn spill(&mut self) -> io::Result<()> {
        self.buffer.sort_unstable();
        let (file, lent) = self.scratch.lend((self.buffer.len() * RECORD_BYTES) as u64)?;
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
        for record in self.buffer.drain(..) {
            file.write_all(&record.hash)?;
            file.write_all(&record.line.to_be_bytes())?;
        }
        let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        self.runs.push((file, lent));
        Ok(())
    }

    /// All keys, by hash and line. Not asynchronous either, nor is reading them.
    pub fn sorted(mut self) -> io::Result<Sorted> {
        self.buffer.sort_unstable();
        let mut runs: Vec<Run> = self
            .runs
            .into_iter()
            .map(|(file, lent)| Run::File(BufReader::with_capacity(BUFFER_BYTES, file), lent))
            .collect();
        runs.push(Run::Memory(self.buffer.into_iter()));
        let mut heads = BinaryHeap::with_capacity(runs.len());
        for (index, run) in runs.iter_mut().enumerate() {
            if let Some(record) = run.next()? {
                heads.push(Reverse((record, index)));
            }
        }
        Ok(Sorted { runs, heads })
    }
}

#[derive(Debug)]
enum Run {
    Memory(std::vec::IntoIter<Record>),
    File(BufReader<File>, #[expect(dead_code, reason = "given back when it is dropped")] Lent),
}

impl Run {
    fn next(&mut self) -> io::Result<Option<Record>> {
        let file = match self {
            Self::Memory(records) => return Ok(records.next()),
            Self::File(file, _) => file,
        };
        let mut bytes = [0; RECORD_BYTES];
        match file.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(e),
        }
        let (mut hash, mut line) = ([0; 16], [0; 8]);
        hash.copy_from_slice(&bytes[..16]);
        line.copy_from_slice(&bytes[16..]);
        Ok(Some(Record { hash, line: u64::from_be_bytes(line) }))
    }
}

/// Keys in order.
#[derive(Debug)]
pub struct Sorted {
    runs: Vec<Run>,
    heads: BinaryHeap<Reverse<(Record, usize)>>,
}

impl Sorted {
    fn next(&mut self) -> io::Result<Option<Record>> {
        let Some(mut head) = self.heads.peek_mut() else { return Ok(None) };
        let Reverse((record, index)) = *head;
        match self.runs.get_mut(index).map_or(Ok(None), Run::next)? {
            Some(next) => *head = Reverse((next, index)),
            None => drop(PeekMut::pop(head)),
        }
        Ok(Some(record))
    }

    /// The first line whose key stood in an earlier one, and that earlier one: `(earlier, later)`. And the lines whose
    /// key is among `answered`.
    pub fn examine(mut self, mut answered: Option<Self>) -> io::Result<(Option<(u64, u64)>, Lines)> {
        let mut duplicate: Option<(u64, u64)> = None;
        let mut found = Lines::default();
        let mut before: Option<Record> = None;
        let mut other = answered.as_mut().map_or(Ok(None), Self::next)?;
        while let Some(record) = self.next()? {
            match before {
                Some(first) if first.hash == record.hash => {
                    if duplicate.is_none_or(|(_, line)| record.line < line) {
                        duplicate = Some((first.line, record.line));
                    }
                }
                _ => before = Some(record),
            }
            while other.is_some_and(|o| o.hash < record.hash) {
                other = answered.as_mut().map_or(Ok(None), Self::next)?;
            }
            if other.is_some_and(|o| o.hash == record.hash) {
                found.insert(record.line);
            }
        }
        Ok((duplicate, found))
    }
}

/// Some of the lines of an input: one bit for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines(Vec<u64>);

impl Lines {
    fn insert(&mut self, line: u64) {
        let word = usize::try_from(line / 64).unwrap_or(usize::MAX);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        if let Some(word) = self.0.get_mut(word) {
            *word |= 1 << (line % 64);
        }
    }

    /// Whether that line is among them.
    #[must_use]
    pub fn contains(&self, line: u64) -> bool {
        let word = usize::try_from(line / 64).ok().and_then(|i| self.0.get(i));
        word.is_some_and(|word| word >> (line % 64) & 1 == 1)
    }

    /// Whether there is any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};

    fn scratch(bytes: u64) -> Scratch {
        Scratch::new(std::env::temp_dir(), bytes)
    }

    fn sorter(hasher: &Hasher, capacity: usize) -> Sorter {
        Sorter { capacity, ..Sorter::new(hasher, scratch(u64::MAX)) }
    }

    fn fill<'a>(mut sorter: Sorter, keys: impl IntoIterator<Item = &'a str>) -> Sorted {
        for (line, key) in (0..).zip(keys) {
            sorter.push(key, line);
            if sorter.is_full() {
                sorter.spill().unwrap();
            }
        }
        sorter.sorted().unwrap()
    }

    #[test]
    fn memory_is_bounded_by_files_without_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(directory.path().into(), u64::MAX);
        let mut sorter = Sorter { capacity: 10, ..Sorter::new(&Hasher::default(), scratch.clone()) };
        for line in 0..1000u64 {
            sorter.push(&line.to_string(), line);
            if sorter.is_full() {
                sorter.spill().unwrap();
            }
            assert!(sorter.buffer.len() < 10);
        }
        assert_eq!(sorter.runs.len(), 100);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert_eq!(scratch.used(), 1000 * RECORD_BYTES as u64);
        let (duplicate, _) = sorter.sorted().unwrap().examine(None).unwrap();
        assert_eq!((duplicate, scratch.used()), (None, 0));
    }

    /// A pod whose volume is full is evicted, with all that it has in hand.
    #[test]
    fn no_more_goes_to_files_than_an_administrator_allows() {
        let scratch = scratch(25 * RECORD_BYTES as u64);
        let mut sorter = Sorter { capacity: 10, ..Sorter::new(&Hasher::default(), scratch.clone()) };
        let mut spills = (0..30u64).filter_map(|line| {
            sorter.push(&line.to_string(), line);
            sorter.is_full().then(|| sorter.spill())
        });
        assert!(spills.next().unwrap().is_ok() && spills.next().unwrap().is_ok());
        assert_eq!(spills.next().unwrap().unwrap_err().kind(), io::ErrorKind::StorageFull);
        drop(sorter);
        assert_eq!(scratch.used(), 0);
    }

    #[test]
    fn a_directory_that_is_full_or_gone_is_an_error() {
        let mut sorter = Sorter::new(&Hasher::default(), Scratch::new("/nonexistent".into(), u64::MAX));
        sorter.push("a", 0);
        assert!(sorter.spill().is_err());
    }

    #[test]
    fn hashes_of_one_process_say_nothing_about_those_of_another() {
        assert_ne!(Hasher::default().hash("a"), Hasher::default().hash("a"));
    }

    proptest! {
        /// However the pieces fall: the same as with a set in memory.
        #[test]
        fn duplicates_and_answers_are_found(
            keys in prop::collection::vec("[a-d]{0,3}", 0..80),
            answered in prop::collection::vec("[a-e]{0,3}", 0..40),
            capacity in 1usize..20,
        ) {
            let hasher = Hasher::default();
            let input = fill(sorter(&hasher, capacity), keys.iter().map(String::as_str));
            let others = fill(sorter(&hasher, capacity), answered.iter().map(String::as_str));
            let (duplicate, lines) = input.examine(Some(others)).unwrap();

            let mut seen: HashMap<&str, usize> = HashMap::new();
            let mut expected = None;
            for (line, key) in keys.iter().enumerate() {
                let first = *seen.entry(key).or_insert(line);
                if first != line && expected.is_none() {
                    expected = Some((first as u64, line as u64));
                }
            }
            prop_assert_eq!(duplicate, expected);
            let answered: HashSet<&String> = answered.iter().collect();
            for (line, key) in (0..).zip(&keys) {
                prop_assert_eq!(lines.contains(line), answered.contains(key), "{}", key);
            }
            prop_assert!(!lines.contains(keys.len() as u64 + 64));
        }
    }
}
