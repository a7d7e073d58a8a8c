//! What is remembered of keys and lines, in as few bytes as it takes.

use crate::controller::retry::Standing;
use crate::gemini::results::Usage;

/// Takes the fields of a record one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// A record has the size that its fields need, so none is ever missing.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn i64(&mut self) -> i64 {
        i64::from_le_bytes(self.take())
    }

    fn i32(&mut self) -> i32 {
        i32::from_le_bytes(self.take())
    }

    fn u8(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }
}

/// Puts fields into a record one after the other.
fn record<const N: usize>(fields: &[&[u8]]) -> [u8; N] {
    let mut record = [0; N];
    let bytes = fields.iter().copied().flatten();
    record.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    record
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// Which attempt it came from.
    pub attempt: i32,
    pub standing: Standing,
    /// Google's code of an error.
    pub code: Option<i32>,
}

impl Kind {
    const SIZE: usize = 10;

    fn to_bytes(self) -> [u8; Self::SIZE] {
        let standing = match self.standing {
            Standing::Response => 0,
            Standing::Failed => 1,
            Standing::Retryable => 2,
            Standing::Unanswered => 3,
        };
        let code = self.code.unwrap_or_default().to_le_bytes();
        record(&[&self.attempt.to_le_bytes(), &[standing, u8::from(self.code.is_some())], &code])
    }

    fn from(fields: &mut Fields<'_>) -> Self {
        let attempt = fields.i32();
        let standing = match fields.u8() {
            0 => Standing::Response,
            1 => Standing::Failed,
            2 => Standing::Retryable,
            _ => Standing::Unanswered,
        };
        let has_code = fields.u8() == 1;
        let code = fields.i32();
        Self { attempt, standing, code: has_code.then_some(code) }
    }
}

/// Where in the spool a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub offset: u64,
    pub len: u64,
}

impl Place {
    pub const SIZE: usize = 16;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        record(&[&self.offset.to_le_bytes(), &self.len.to_le_bytes()])
    }

    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut fields = Fields(bytes);
        Self { offset: fields.u64(), len: fields.u64() }
    }
}

/// A key that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub hash: [u8; 16],
    /// Its place in the input, from 0.
    pub position: u32,
}

impl Key {
    pub const SIZE: usize = 20;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        record(&[&self.hash, &self.position.to_le_bytes()])
    }

    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut fields = Fields(bytes);
        Self { hash: fields.take(), position: fields.u32() }
    }
}

/// A line with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub hash: [u8; 16],
    /// How many lines came before it.
    pub number: u32,
    /// Read as one of an earlier attempt.
    pub early: bool,
    pub kind: Kind,
    pub place: Place,
    pub usage: Usage,
}

impl Line {
    pub const SIZE: usize = 16 + 4 + 1 + Kind::SIZE + Place::SIZE + 24;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        record(&[
            &self.hash,
            &self.number.to_le_bytes(),
            &[u8::from(self.early)],
            &self.kind.to_bytes(),
            &self.place.to_bytes(),
            &self.usage.prompt.to_le_bytes(),
            &self.usage.output.to_le_bytes(),
            &self.usage.total.to_le_bytes(),
        ])
    }

    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            hash: fields.take(),
            number: fields.u32(),
            early: fields.u8() == 1,
            kind: Kind::from(&mut fields),
            place: Place { offset: fields.u64(), len: fields.u64() },
            usage: Usage { prompt: fields.i64(), output: fields.i64(), total: fields.i64() },
        }
    }
}

/// A key while its part is joined, and the line that counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub hash: [u8; 16],
    pub position: u32,
    pub line: Option<Found>,
}

/// What is needed of a line while its part is joined.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub number: u32,
    pub early: bool,
    pub kind: Kind,
    pub place: Place,
}

impl From<Line> for Found {
    fn from(Line { number, early, kind, place, .. }: Line) -> Self {
        Self { number, early, kind, place }
    }
}

impl From<Key> for Entry {
    fn from(Key { hash, position }: Key) -> Self {
        Self { hash, position, line: None }
    }
}

/// The line that counts for the request at that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub position: u32,
    pub kind: Kind,
    pub place: Place,
}

impl Slot {
    pub const SIZE: usize = 4 + Kind::SIZE + Place::SIZE;

    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        record(&[&self.position.to_le_bytes(), &self.kind.to_bytes(), &self.place.to_bytes()])
    }

    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            position: fields.u32(),
            kind: Kind::from(&mut fields),
            place: Place { offset: fields.u64(), len: fields.u64() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_come_back_as_they_went(
            hash: [u8; 16],
            (number, position, early) in any::<(u32, u32, bool)>(),
            (attempt, standing, code) in any::<(i32, u8, Option<i32>)>(),
            (offset, len) in any::<(u64, u64)>(),
            (prompt, output, total) in any::<(i64, i64, i64)>(),
        ) {
            let standings = [Standing::Response, Standing::Failed, Standing::Retryable, Standing::Unanswered];
            let kind = Kind { attempt, standing: standings[usize::from(standing % 4)], code };
            let place = Place { offset, len };
            let usage = Usage { prompt, output, total };
            let line = Line { hash, number, early, kind, place, usage };
            prop_assert_eq!(Line::from_bytes(&line.to_bytes()), line);
            let slot = Slot { position, kind, place };
            prop_assert_eq!(Slot::from_bytes(&slot.to_bytes()), slot);
            let key = Key { hash, position };
            prop_assert_eq!(Key::from_bytes(&key.to_bytes()), key);
            prop_assert_eq!(Place::from_bytes(&place.to_bytes()), place);
        }
    }
}
