//! A buffer of some megabytes whose memory goes back to the system as soon as it is dropped.
//!
//! A large job fills and drops hundreds of them, on one thread after another. Allocators keep for later what they are given
//! back; glibc's kept tens of megabytes for as long as the process lived, in addition to what was in use. So these come
//! from the system and go back to it. Pages that were never written to take no memory.

use bytes::Bytes;
use memmap2::MmapMut;

/// A buffer of a fixed size.
#[derive(Debug)]
pub struct Block {
    memory: Memory,
    len: usize,
}

#[derive(Debug)]
enum Memory {
    System(MmapMut),
    /// The system gives no such memory (there is a limit on mappings): the allocator has to do.
    Allocator(Vec<u8>),
}

impl Block {
    /// An empty one, with room for so many bytes.
    #[must_use]
    pub fn new(size: usize) -> Self {
        let memory =
            MmapMut::map_anon(size).map_or_else(|_| Memory::Allocator(vec![0; size]), Memory::System);
        Self { memory, len: 0 }
    }

    /// Bytes in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether there is no room left.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len == self.whole().len()
    }

    /// Adds as many of the bytes as there is room for, and returns the others.
    pub fn push<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let memory: &mut [u8] = match &mut self.memory {
            Memory::System(memory) => memory,
            Memory::Allocator(memory) => memory,
        };
        let (now, rest) = bytes.split_at(bytes.len().min(memory.len() - self.len));
        let end = self.len + now.len();
        memory[self.len..end].copy_from_slice(now);
        self.len = end;
        rest
    }

    /// What is in it. The memory is given back when the last clone has gone.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn whole(&self) -> &[u8] {
        match &self.memory {
            Memory::System(memory) => memory,
            Memory::Allocator(memory) => memory,
        }
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self.whole().get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_there_is_room_for() {
        let allocated = Block { memory: Memory::Allocator(vec![0; 10]), len: 0 };
        for mut block in [Block::new(10), allocated] {
            assert!(block.is_empty() && !block.is_full());
            assert_eq!(block.push(b"Hello"), b"");
            assert_eq!((block.as_ref(), block.len()), (&b"Hello"[..], 5));
            assert_eq!(block.push(b", world"), b"ld");
            assert!(block.is_full());
            assert_eq!(block.push(b"!"), b"!");
            assert_eq!(block.freeze(), &b"Hello, wor"[..]);
        }
    }
}
