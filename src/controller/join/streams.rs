//! Joined lines, one kind of them from the first to the last.

use std::io;

use bytes::Bytes;
use serde_json::json;

use super::records::{Kind, Place, Slot};
use super::scratch::{Reads, Records};
use super::{Joined, NAME_BYTES, slot_part};
use crate::controller::retry::Standing;
use crate::gemini::results::{Outcome, ResultLine};

/// Which lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Of each request with a result: `key` and `response` or `error`, in input order.
    Results,
    /// Those of them with an error.
    Errors,
    /// Of each request without a result: `key`, in input order.
    Missing,
    /// Lines that repeat a key, have one that was not sent, or can't be read: as they came.
    Unmatched,
}

/// A long line is passed on in pieces of this size.
const PIECE: u64 = 1 << 20;

/// Reads lines of one kind.
pub struct Stream<'a> {
    of: &'a Joined,
    what: What,
    lines: Reads<'a>,
    names: Reads<'a>,
    slots: Slots,
    places: Records<'a, { Place::SIZE }>,
    number: u32,
    /// What is left of a line that is passed on as it came.
    rest: Option<Place>,
}

/// What belongs to a place.
pub(super) enum At {
    /// There is no such place.
    End,
    /// No line.
    Nothing,
    Line(Kind, Place),
}

/// What belongs to each place, one part of the places at a time.
pub(super) struct Slots {
    position: u32,
    part: usize,
    first: u32,
    lines: Vec<Option<(Kind, Place)>>,
}

impl Default for Slots {
    fn default() -> Self {
        Self { position: 0, part: usize::MAX, first: 0, lines: Vec::new() }
    }
}

impl Slots {
    fn held(&self) -> usize {
        self.lines.capacity() * size_of::<Option<(Kind, Place)>>()
    }

    /// What belongs to the next place.
    pub(super) fn next(&mut self, of: &Joined) -> io::Result<At> {
        let Joined { positions, parts, .. } = *of;
        if self.position >= positions {
            return Ok(At::End);
        }
        let part = slot_part(self.position, positions, parts);
        if part != self.part {
            // The first place of a part is where the one before it ends.
            (self.part, self.first) = (part, self.position);
            self.lines.clear();
            let size = usize::try_from(positions).unwrap_or(usize::MAX) / parts + 1;
            self.lines.resize(size, None);
            let mut slots = of.slots.records(part);
            while let Some(bytes) = slots.next()? {
                let Slot { position, kind, place } = Slot::from_bytes(&bytes);
                let index = usize::try_from(position - self.first).unwrap_or(usize::MAX);
                if let Some(slot) = self.lines.get_mut(index) {
                    *slot = Some((kind, place));
                }
            }
        }
        let index = usize::try_from(self.position - self.first).unwrap_or(usize::MAX);
        self.position += 1;
        let line = self.lines.get(index).copied().flatten();
        Ok(line.map_or(At::Nothing, |(kind, place)| At::Line(kind, place)))
    }
}

impl<'a> Stream<'a> {
    pub(super) fn new(of: &'a Joined, what: What) -> Self {
        Self {
            of,
            what,
            lines: Reads::new(&of.lines),
            names: Reads::new(&of.names),
            slots: Slots::default(),
            places: of.places.records(0),
            number: 0,
            rest: None,
        }
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn held(&self) -> usize {
        self.lines.held() + self.names.held() + self.slots.held()
    }

    /// Some of the next lines, of about so many bytes together: more only if a line has more. `None` at the end.
    pub fn next(&mut self, bytes: usize) -> io::Result<Option<Bytes>> {
        let mut chunk = Vec::with_capacity(bytes);
        while chunk.len() < bytes {
            let more = match self.what {
                What::Results => self.result(&mut chunk, |_| true)?,
                What::Errors => self.result(&mut chunk, |kind| kind.standing != Standing::Response)?,
                What::Missing => self.missing(&mut chunk)?,
                What::Unmatched => self.unmatched(&mut chunk)?,
            };
            if !more {
                break;
            }
        }
        Ok(Some(chunk.into()).filter(|chunk: &Bytes| !chunk.is_empty()))
    }

    fn result(&mut self, out: &mut Vec<u8>, wanted: impl Fn(Kind) -> bool) -> io::Result<bool> {
        let (kind, place) = match self.slots.next(self.of)? {
            At::End => return Ok(false),
            At::Nothing => return Ok(true),
            At::Line(kind, place) => (kind, place),
        };
        if wanted(kind) {
            let line = self.lines.at(place.offset, size(place.len)?)?;
            render(line, self.of.names_attempts.then_some(kind.attempt), out)?;
        }
        Ok(true)
    }

    fn missing(&mut self, out: &mut Vec<u8>) -> io::Result<bool> {
        if !self.of.with_keys {
            return Ok(false);
        }
        let at = self.slots.next(self.of)?;
        let Some(name) = self.names.line(NAME_BYTES)? else { return Ok(false) };
        if matches!(at, At::Nothing) {
            out.extend_from_slice(b"{\"key\":");
            out.extend_from_slice(name);
            out.extend_from_slice(b"}\n");
        }
        Ok(true)
    }

    fn unmatched(&mut self, out: &mut Vec<u8>) -> io::Result<bool> {
        let Some(Place { offset, len }) = (match self.rest.take() {
            Some(rest) => Some(rest),
            None => self.next_loose()?,
        }) else {
            return Ok(false);
        };
        let now = len.min(PIECE);
        out.extend_from_slice(self.lines.at(offset, size(now)?)?);
        if now < len {
            self.rest = Some(Place { offset: offset + now, len: len - now });
        } else {
            out.push(b'\n');
        }
        Ok(true)
    }

    fn next_loose(&mut self) -> io::Result<Option<Place>> {
        while let Some(bytes) = self.places.next()? {
            let number = self.number;
            self.number += 1;
            if self.of.loose.has(number) {
                return Ok(Some(Place::from_bytes(&bytes)));
            }
        }
        Ok(None)
    }
}

fn size(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(io::Error::other)
}

/// A line of the results.
fn render(raw: &[u8], attempt: Option<i32>, out: &mut Vec<u8>) -> io::Result<()> {
    // It was read before, so it can be read again.
    let line = std::str::from_utf8(raw).ok().and_then(|raw| ResultLine::parse(raw).ok());
    let line = line.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let key = json!(line.key.as_deref().unwrap_or_default());
    match line.outcome {
        Outcome::Response(response) => {
            out.extend_from_slice(b"{\"key\":");
            out.extend_from_slice(key.to_string().as_bytes());
            if let Some(attempt) = attempt {
                out.extend_from_slice(format!(",\"attempt\":{attempt}").as_bytes());
            }
            // The response is kept byte by byte: it was paid for.
            out.extend_from_slice(b",\"response\":");
            out.extend_from_slice(response.get().as_bytes());
            out.push(b'}');
        }
        Outcome::Error { code, message } => {
            let mut error = serde_json::Map::new();
            if let Some(code) = code {
                error.insert("code".to_owned(), json!(code));
            }
            if let Some(message) = message {
                error.insert("message".to_owned(), json!(message));
            }
            let mut line = json!({"key": key, "error": error});
            if let Some(attempt) = attempt {
                line["attempt"] = json!(attempt);
            }
            out.extend_from_slice(line.to_string().as_bytes());
        }
    }
    out.push(b'\n');
    Ok(())
}
