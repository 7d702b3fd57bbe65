//! Finds chunks in a segment's file without any help from sled.
//!
//! sled keeps a slot's value in one piece, uncompressed, so a chunk is found by its magic number and proven by its checksum.
//! A slot is written once, but sled may have kept an older copy of a leaf: a chunk can turn up twice.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memchr::memmem;

use super::error::StoreError;
use super::record::{CHUNK_BYTES_MAX, ChunkHeader, HEADER_BYTES, MAGIC_BYTES, chunk_bytes, decode_header};

/// Bytes read at a time. More than a chunk can have.
const WINDOW_BYTES: usize = 4 << 20;
const _: () = assert!(WINDOW_BYTES > CHUNK_BYTES_MAX);
/// What a disk may fail to read alone.
const BLOCK_BYTES: usize = 4 << 10;

/// What becomes of a file that the disk does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// An error, which may pass.
    Fails,
    /// The blocks that cannot be read count as zeroes: the chunks in them are lost, the others are not.
    Zeroes,
}

/// Something that begins like a chunk.
pub(super) struct Found {
    /// Where it is in the file.
    pub offset: u64,
    /// Its bytes, as far as its header can be believed.
    pub bytes: usize,
    /// None: it is not, or not any more, what was written.
    pub header: Option<ChunkHeader>,
}

/// What begins like a chunk in a file, in the order of the offsets.
pub(super) struct Chunks<'a> {
    file: &'a File,
    unreadable: Unreadable,
    window: Vec<u8>,
    /// Offset of the window in the file.
    offset: u64,
    /// Where to search on, in the window.
    at: usize,
    ended: bool,
    /// What counts as zeroes because it could not be read, in order.
    unread: Vec<Range<u64>>,
}

/// Searches `file` from its front.
pub(super) fn chunks(file: &File, unreadable: Unreadable) -> Chunks<'_> {
    Chunks { file, unreadable, window: Vec::new(), offset: 0, at: 0, ended: false, unread: Vec::new() }
}

impl Chunks<'_> {
    /// What of the part searched so far counts as zeroes because it could not be read: ranges of offsets, in order.
    pub fn unread(&self) -> &[Range<u64>] {
        &self.unread
    }

    /// Drops what was searched and reads on.
    fn read_on(&mut self) -> io::Result<()> {
        self.window.drain(..self.at);
        self.offset += self.at as u64;
        self.at = 0;
        let wanted = WINDOW_BYTES - self.window.len();
        let next = self.offset + self.window.len() as u64;
        let left = usize::try_from(self.file.metadata()?.len().saturating_sub(next)).unwrap_or(usize::MAX);
        let (read, unread) = read_at(self.file, next, wanted.min(left), self.unreadable)?;
        self.window.extend(read);
        self.unread.extend(unread);
        self.ended = left <= wanted;
        Ok(())
    }
}

impl Iterator for Chunks<'_> {
    type Item = io::Result<Found>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            // Short of the end, a chunk that begins here must be in the window as a whole.
            let complete = self.ended || self.window.len() - self.at >= CHUNK_BYTES_MAX;
            if !complete {
                if let Err(error) = self.read_on() {
                    self.ended = true;
                    self.at = self.window.len();
                    return Some(Err(error));
                }
                continue;
            }
            let unsearched = &self.window[self.at..];
            let searched = if self.ended { unsearched } else { &unsearched[..unsearched.len() - CHUNK_BYTES_MAX + 4] };
            let Some(found) = memmem::find(searched, &MAGIC_BYTES) else {
                self.at += searched.len().saturating_sub(if self.ended { 0 } else { 3 });
                if self.ended {
                    return None;
                }
                continue;
            };
            let candidate = &unsearched[found..];
            let offset = self.offset + (self.at + found) as u64;
            let bytes = candidate.get(..HEADER_BYTES).and_then(chunk_bytes).unwrap_or(0).min(candidate.len());
            let header = decode_header(&candidate[..bytes]).ok().map(|(header, _)| header);
            // In a damaged one there may be the front of another.
            self.at += found + if header.is_some() { bytes } else { MAGIC_BYTES.len() };
            return Some(Ok(Found { offset, bytes: bytes.max(MAGIC_BYTES.len()), header }));
        }
    }
}

/// What was read; and which offsets of the file are zeroes in it instead.
type Read = (Vec<u8>, Vec<Range<u64>>);

/// Reads `bytes` at `offset`, which the file must hold.
pub(super) fn read_at(file: &File, offset: u64, bytes: usize, unreadable: Unreadable) -> io::Result<Read> {
    let mut value = vec![0; bytes];
    match file.read_exact_at(&mut value, offset) {
        Err(_) if unreadable == Unreadable::Zeroes => {}
        read => return read.map(|()| (value, Vec::new())),
    }
    let (mut at, mut unread) = (0, Vec::new());
    while at < bytes {
        let next = offset + at as u64;
        let end = bytes.min(at + BLOCK_BYTES - next as usize % BLOCK_BYTES);
        if file.read_exact_at(&mut value[at..end], next).is_err() {
            value[at..end].fill(0);
            unread.push(next..offset + end as u64);
        }
        at = end;
    }
    Ok((value, unread))
}

/// Whether a file holds at least one chunk. A file that is not there holds none.
pub(super) fn holds_chunks(path: &Path) -> Result<bool, StoreError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file.map_err(StoreError::io("search segment"))?,
    };
    for found in chunks(&file, Unreadable::Fails) {
        if found.map_err(StoreError::io("search segment"))?.header.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::record::{Totals, encode_chunk};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn every_whole_chunk_is_found_wherever_it_lies() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut image, mut expected) = (Vec::new(), Vec::new());
        let mut value = Vec::new();
        for sequence in 1..200 {
            let noise = rng.random_range(0..40_000);
            image.extend(std::iter::repeat_with(|| rng.random::<u8>()).take(noise));
            // Something that begins like a chunk and is none.
            image.extend(&MAGIC_BYTES[..rng.random_range(0..=4)]);
            let body = vec![0; rng.random_range(1..100_000)];
            let before = Totals { sequence, events: 1, bytes: 2 };
            encode_chunk(&ChunkHeader { before, records: 1, part: 0, parts: 1, unsynced: 0 }, &body, &mut value);
            if sequence % 5 == 0 {
                let at = rng.random_range(0..value.len());
                value[at] ^= 1;
            } else {
                expected.push((image.len() as u64, sequence, value.len()));
            }
            image.extend(&value);
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        std::fs::write(&path, &image).unwrap();
        let found: Vec<_> = chunks(&File::open(&path).unwrap(), Unreadable::Fails)
            .filter_map(|found| {
                let found = found.unwrap();
                Some((found.offset, found.header?.before.sequence, found.bytes))
            })
            .collect();
        assert!(found == expected, "{} of {} found", found.len(), expected.len());
        assert!(image.len() > 2 * WINDOW_BYTES);
        assert!(!holds_chunks(&directory.path().join("none")).unwrap());
    }
}
