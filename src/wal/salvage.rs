//! Finds chunks in a file without any help from sled: for segments that do not open, or that have lost some.
//!
//! sled keeps a slot's value in one piece, uncompressed, so a chunk is found by its magic number and proven by its checksum.
//! A slot is written once, but sled may have kept an older copy of a leaf: a chunk can turn up twice.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use memchr::memmem;

use super::error::StoreError;
use super::record::{CHUNK_BYTES_MAX, ChunkHeader, HEADER_BYTES, MAGIC_BYTES, chunk_bytes, decode_chunk};

/// Bytes read at a time. More than a chunk can have.
const WINDOW_BYTES: usize = 4 << 20;
const _: () = assert!(WINDOW_BYTES > CHUNK_BYTES_MAX);

/// The chunks, or parts of chunks, of a file, in the order of their offsets.
pub(super) struct Chunks {
    file: File,
    window: Vec<u8>,
    /// Offset of the window in the file.
    offset: u64,
    /// Where to search on, in the window.
    at: usize,
    ended: bool,
    /// Something that begins like a chunk and is none stands before this place; and before a good chunk.
    rejected: bool,
    passed_over: bool,
}

impl Chunks {
    /// Begins at the front of `path`.
    pub fn open(path: &Path) -> io::Result<Chunks> {
        Ok(Chunks {
            file: File::open(path)?,
            window: Vec::new(),
            offset: 0,
            at: 0,
            ended: false,
            rejected: false,
            passed_over: false,
        })
    }

    /// Drops what was searched and reads on.
    fn read_on(&mut self) -> io::Result<()> {
        self.window.drain(..self.at);
        self.offset += self.at as u64;
        self.at = 0;
        let wanted = WINDOW_BYTES - self.window.len();
        let read = self.file.by_ref().take(wanted as u64).read_to_end(&mut self.window)?;
        self.ended = read < wanted;
        Ok(())
    }
}

impl Iterator for Chunks {
    /// Offset in the file, header, and the records of the part.
    type Item = io::Result<(u64, ChunkHeader, Bytes)>;

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
            let bytes = candidate.get(..HEADER_BYTES).and_then(chunk_bytes).unwrap_or(0).min(candidate.len());
            match decode_chunk(Bytes::copy_from_slice(&candidate[..bytes])) {
                Ok((header, body)) => {
                    self.passed_over |= self.rejected;
                    let offset = self.offset + (self.at + found) as u64;
                    self.at += found + bytes;
                    return Some(Ok((offset, header, body)));
                }
                Err(_) => {
                    self.rejected |= bytes > 0;
                    self.at += found + MAGIC_BYTES.len();
                }
            }
        }
    }
}

/// Whether a file holds at least one chunk. A file that is not there holds none.
pub(super) fn holds_chunks(path: &Path) -> Result<bool, StoreError> {
    match Chunks::open(path) {
        Ok(mut chunks) => Ok(chunks.next().transpose().map_err(StoreError::io("search segment"))?.is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("search segment")(error)),
    }
}

/// Whether a file has lost a chunk that others follow: opening it would be dangerous for those. A file that is not there has
/// not.
pub(super) fn has_gap(path: &Path) -> Result<bool, StoreError> {
    let mut chunks = match Chunks::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        chunks => chunks.map_err(StoreError::io("search segment"))?,
    };
    let mut headers = Vec::new();
    for chunk in chunks.by_ref() {
        let Ok((_, header, _)) = chunk else { return Ok(true) };
        headers.push((header.before.sequence, header.part, header.parts, header.records));
    }
    headers.sort_unstable();
    headers.dedup();
    let follows = |pair: &[(u64, u16, u16, u32)]| {
        let ((sequence, part, parts, records), (next, next_part, ..)) = (pair[0], pair[1]);
        if part + 1 < parts {
            (next, next_part) == (sequence, part + 1)
        } else {
            (next, next_part) == (sequence + u64::from(records), 0)
        }
    };
    Ok(chunks.passed_over || !headers.windows(2).all(follows))
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
            let body: Vec<u8> = vec![sequence as u8; rng.random_range(1..100_000)];
            let before = Totals { sequence, events: 1, bytes: 2 };
            encode_chunk(&ChunkHeader { before, records: 1, part: 0, parts: 1 }, &body, &mut value);
            if sequence % 5 == 0 {
                let at = rng.random_range(0..value.len());
                value[at] ^= 1;
            } else {
                expected.push((image.len() as u64, sequence, body));
            }
            image.extend(&value);
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        std::fs::write(&path, &image).unwrap();
        let found: Vec<_> = Chunks::open(&path)
            .unwrap()
            .map(|chunk| {
                let (offset, header, body) = chunk.unwrap();
                (offset, header.before.sequence, body.to_vec())
            })
            .collect();
        assert!(found == expected, "{} of {} found", found.len(), expected.len());
        assert!(image.len() > 2 * WINDOW_BYTES);
        assert!(!holds_chunks(&directory.path().join("none")).unwrap());
    }
}
