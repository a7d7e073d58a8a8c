//! The temporary directory: files without a name, of which nothing is left when the process ends, and a limit on all of
//! them together. Without the limit a pod whose volume is full is evicted, with every other transfer that it had in hand.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memchr::memchr;

/// A directory for temporary files. Cheap to clone; all clones share the limit.
#[derive(Clone, Debug)]
pub struct Scratch {
    dir: PathBuf,
    limit: u64,
    used: Arc<AtomicU64>,
}

impl Scratch {
    /// Files in `dir`, of `limit` bytes altogether.
    #[must_use]
    pub fn new(dir: PathBuf, limit: u64) -> Self {
        Self { dir, limit, used: Arc::default() }
    }

    /// Bytes in files that are open.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A file of so many bytes that somebody else writes, and the right to them.
    pub fn lend(&self, bytes: u64) -> io::Result<(File, Lent)> {
        self.take(bytes)?;
        let lent = Lent { bytes, scratch: self.clone() };
        Ok((tempfile::tempfile_in(&self.dir)?, lent))
    }

    fn file(&self) -> io::Result<ScratchFile> {
        Ok(ScratchFile { file: tempfile::tempfile_in(&self.dir)?, len: 0, scratch: self.clone() })
    }

    fn take(&self, bytes: u64) -> io::Result<()> {
        let more = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

/// The right to some bytes. Given back when it is dropped.
#[derive(Debug)]
pub struct Lent {
    bytes: u64,
    scratch: Scratch,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.scratch.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A file without a name.
#[derive(Debug)]
struct ScratchFile {
    file: File,
    len: u64,
    scratch: Scratch,
}

impl ScratchFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let more = bytes.len() as u64;
        self.scratch.take(more)?;
        let written = self.file.write_all_at(bytes, self.len);
        // What was written in part counts as well, until the file goes.
        self.len += more;
        written
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        self.scratch.used.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// Bytes that are appended and read at any place: the newest in memory, the others in a file, which there is only if it
/// is needed.
#[derive(Debug)]
pub struct Spool {
    scratch: Scratch,
    file: Option<ScratchFile>,
    tail: Vec<u8>,
    memory: usize,
}

impl Spool {
    /// Holds up to `memory` bytes in memory.
    #[must_use]
    pub fn new(scratch: &Scratch, memory: usize) -> Self {
        Self { scratch: scratch.clone(), file: None, tail: Vec::new(), memory }
    }

    /// Whether nothing was added yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes so far.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.flushed() + self.tail.len() as u64
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn held(&self) -> usize {
        self.tail.capacity()
    }

    /// Whether a file was needed.
    #[must_use]
    pub fn is_in_file(&self) -> bool {
        self.file.is_some()
    }

    /// Adds bytes at the end.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.tail.len() + bytes.len() > self.memory {
            let tail = std::mem::take(&mut self.tail);
            let file = match &mut self.file {
                Some(file) => file,
                None => self.file.insert(self.scratch.file()?),
            };
            file.append(&tail)?;
            if bytes.len() > self.memory {
                return file.append(bytes);
            }
        }
        if self.tail.len() + bytes.len() > self.tail.capacity() {
            // Grows as a vector does, but not beyond what it may hold.
            let wanted = (self.tail.capacity() * 2).max(self.tail.len() + bytes.len()).min(self.memory);
            self.tail.reserve_exact(wanted - self.tail.len());
        }
        self.tail.extend_from_slice(bytes);
        Ok(())
    }

    /// Fills the buffer with the bytes from `offset` on.
    pub fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        let flushed = self.flushed();
        if let Some(there) = &self.file
            && offset < flushed
        {
            let rest = usize::try_from(flushed - offset).unwrap_or(usize::MAX).min(buffer.len());
            let (first, second) = buffer.split_at_mut(rest);
            there.file.read_exact_at(first, offset)?;
            offset += rest as u64;
            buffer = second;
        }
        let range = usize::try_from(offset - flushed.min(offset)).ok().and_then(|from| {
            let to = from.checked_add(buffer.len())?;
            self.tail.get(from..to)
        });
        match range {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn flushed(&self) -> u64 {
        self.file.as_ref().map_or(0, |f| f.len)
    }
}

/// Reads a spool at the places that it is asked for, and ahead while these follow one another.
pub struct Reads<'a> {
    spool: &'a Spool,
    buffer: Vec<u8>,
    /// Where in the spool the buffer begins.
    start: u64,
    /// Where the last read ended.
    last: u64,
}

/// How much is read ahead.
const AHEAD: usize = 128 << 10;

impl<'a> Reads<'a> {
    /// From the beginning.
    #[must_use]
    pub fn new(spool: &'a Spool) -> Self {
        Self { spool, buffer: Vec::new(), start: 0, last: 0 }
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn held(&self) -> usize {
        self.buffer.capacity()
    }

    /// Those bytes.
    pub fn at(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let end = offset + len as u64;
        if offset < self.start || end > self.start + self.buffer.len() as u64 {
            let rest = usize::try_from(self.spool.len().saturating_sub(offset)).unwrap_or(usize::MAX);
            // Of lines in any order what comes after one is not what is wanted next.
            let ahead = if offset == self.last { AHEAD.min(rest) } else { 0 };
            self.fill(offset, len.max(ahead))?;
        }
        self.last = end;
        let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        self.buffer.get(from..from.saturating_add(len)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// The bytes up to and without the next line break; `None` at the end of the spool.
    pub fn line(&mut self, limit: usize) -> io::Result<Option<&[u8]>> {
        let offset = self.last;
        if offset >= self.spool.len() {
            return Ok(None);
        }
        let mut ahead = AHEAD;
        loop {
            let from = usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
            let there = if offset < self.start { None } else { self.buffer.get(from..) };
            if let Some(len) = there.and_then(|b| memchr(b'\n', b)) {
                self.last = offset + len as u64 + 1;
                return Ok(self.buffer.get(from..from + len));
            }
            let rest = usize::try_from(self.spool.len() - offset).unwrap_or(usize::MAX);
            if there.is_some_and(|b| b.len() >= rest) || ahead > limit.saturating_mul(2).max(AHEAD) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.fill(offset, ahead.min(rest))?;
            ahead = ahead.saturating_mul(2);
        }
    }

    fn fill(&mut self, offset: u64, len: usize) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.shrink_to(len.max(AHEAD));
        self.buffer.resize(len, 0);
        self.start = offset;
        let read = self.spool.read_exact_at(&mut self.buffer, offset);
        if read.is_err() {
            self.buffer.clear();
        }
        read
    }
}

/// Records of `N` bytes in parts, each of which keeps the order in which they came. The newest are in memory, the others in
/// a file, which there is only if it is needed.
#[derive(Debug)]
pub struct Table<const N: usize> {
    spool: Spool,
    parts: Vec<Part>,
    held: usize,
    memory: usize,
}

#[derive(Clone, Debug, Default)]
struct Part {
    /// Where in the file its records are, and how many bytes of them.
    extents: Vec<(u64, usize)>,
    tail: Vec<u8>,
    count: u64,
}

impl<const N: usize> Table<N> {
    /// So many parts, of which up to `memory` bytes are held in memory, whatever they hold.
    #[must_use]
    pub fn new(scratch: &Scratch, parts: usize, memory: usize) -> Self {
        Self { spool: Spool::new(scratch, 0), parts: vec![Part::default(); parts.max(1)], held: 0, memory }
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn held(&self) -> usize {
        let extents = size_of::<(u64, usize)>();
        self.parts.iter().map(|p| p.tail.capacity() + p.extents.capacity() * extents).sum()
    }

    /// Whether a file was needed.
    #[must_use]
    pub fn is_in_file(&self) -> bool {
        self.spool.is_in_file()
    }

    /// How many records are in the part.
    #[must_use]
    pub fn count(&self, part: usize) -> u64 {
        self.parts.get(part).map_or(0, |p| p.count)
    }

    /// Adds a record.
    pub fn push(&mut self, part: usize, record: &[u8; N]) -> io::Result<()> {
        if self.held + N > self.memory {
            for part in self.parts.iter_mut().filter(|p| !p.tail.is_empty()) {
                let tail = std::mem::take(&mut part.tail);
                part.extents.push((self.spool.len(), tail.len()));
                self.spool.append(&tail)?;
            }
            self.held = 0;
        }
        let last = self.parts.len() - 1;
        let Some(part) = self.parts.get_mut(part.min(last)) else { return Ok(()) };
        part.tail.extend_from_slice(record);
        part.count += 1;
        self.held += N;
        Ok(())
    }

    /// The records of a part, in the order in which they came.
    #[must_use]
    pub fn records(&self, part: usize) -> Records<'_, N> {
        Records { table: self, part: self.parts.get(part), extent: 0, done: 0, buffer: Vec::new(), at: 0 }
    }
}

/// The records of one part.
pub struct Records<'a, const N: usize> {
    table: &'a Table<N>,
    part: Option<&'a Part>,
    extent: usize,
    /// Bytes of the extent that were read.
    done: usize,
    buffer: Vec<u8>,
    at: usize,
}

impl<const N: usize> Records<'_, N> {
    /// The next record; `None` at the end.
    pub fn next(&mut self) -> io::Result<Option<[u8; N]>> {
        let Some(part) = self.part else { return Ok(None) };
        while self.at >= self.buffer.len() {
            let Some((offset, len)) = part.extents.get(self.extent).copied() else {
                // What follows is in memory.
                let from = self.done;
                let record = part.tail.get(from..from + N).and_then(|r| r.try_into().ok());
                self.done += N;
                return Ok(record);
            };
            let size = (len - self.done).min(AHEAD / N * N);
            self.buffer.resize(size, 0);
            self.table.spool.read_exact_at(&mut self.buffer, offset + self.done as u64)?;
            self.at = 0;
            self.done += size;
            if self.done >= len {
                (self.extent, self.done) = (self.extent + 1, 0);
            }
        }
        let record = self.buffer.get(self.at..self.at + N).and_then(|r| r.try_into().ok());
        self.at += N;
        Ok(record)
    }
}
