//! A segment that takes no more records, read from its file without sled.
//!
//! To open a Db is to change it: where sled meets a read error or a damaged message, it believes that its log ends there, and
//! overwrites what follows. What was acked must not hang on that, so sled only writes segments. They are read by looking for
//! their chunks (`search.rs`), which are kept in one piece and prove themselves.
//!
//! The slots here are the chunks that were found, in the order of their sequences: as long as none is missing, the slots that
//! they were written to. Bytes that begin like a chunk and are none keep their place between those around them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;

use super::error::StoreError;
use super::record::ChunkHeader;
use super::search::{Found, Unreadable, chunks, read_at};
use super::store::SegmentFile;

/// Takes the place of the magic number of a chunk that was cut off.
const CUT_MAGIC_BYTES: [u8; 4] = *b"RTCX";

/// The segment.
pub(super) struct ClosedSegment {
    file: File,
    unreadable: Unreadable,
    slots: Vec<Slot>,
    unread_bytes: u64,
    hidden_bytes: u64,
}

/// One chunk, or part of one.
struct Slot {
    /// None: these bytes are not as they were written, or (without places) a part that is missing.
    header: Option<ChunkHeader>,
    places: Vec<Place>,
}

/// Offset in the file, and bytes.
type Place = (u64, usize);

impl ClosedSegment {
    /// Looks for the chunks in the file at `path`.
    pub fn open(path: &Path, unreadable: Unreadable) -> Result<ClosedSegment, StoreError> {
        let file = File::open(path).map_err(|error| match error.kind() {
            // Trying again will not bring it back.
            io::ErrorKind::NotFound => {
                StoreError::io("open segment file")(io::Error::new(io::ErrorKind::InvalidData, error))
            }
            _ => StoreError::io("open segment file")(error),
        })?;
        let (mut slots, mut whole) = (Vec::new(), Vec::new());
        let mut chunks = chunks(&file, unreadable);
        for found in chunks.by_ref() {
            let Found { offset, bytes, header } = found.map_err(StoreError::io("read segment file"))?;
            whole.extend(header.map(|_| offset..offset + bytes as u64));
            slots.push(Slot { header, places: vec![(offset, bytes)] });
        }
        let unread_bytes = chunks.unread().iter().map(|unread| unread.end - unread.start).sum();
        let end = file.metadata().map_err(StoreError::io("measure segment"))?.len();
        let hidden_bytes = hidden_bytes(&whole, chunks.unread(), end);
        Ok(ClosedSegment { file, unreadable, slots: in_order(slots), unread_bytes, hidden_bytes })
    }

    /// Bytes of the file that count as zeroes because they could not be read.
    pub fn unread_bytes(&self) -> u64 {
        self.unread_bytes
    }

    /// Bytes that may belong to chunks of which not all could be read.
    pub fn hidden_bytes(&self) -> u64 {
        self.hidden_bytes
    }

    /// Takes away what the slots from `from` on hold: nobody got an ack for it. Durable on return.
    pub fn cut(path: &Path, from: u32) -> Result<(), StoreError> {
        let segment = ClosedSegment::open(path, Unreadable::Fails)?;
        let file = File::options().write(true).open(path).map_err(StoreError::io("open segment file"))?;
        for (offset, _) in segment.slots.iter().skip(from as usize).flat_map(|slot| &slot.places) {
            file.write_all_at(&CUT_MAGIC_BYTES, *offset).map_err(StoreError::io("cut segment"))?;
        }
        file.sync_data().map_err(StoreError::io("sync segment"))
    }
}

impl SegmentFile for ClosedSegment {
    fn read(&self, slot: u32) -> Result<Bytes, StoreError> {
        let Some((offset, bytes)) = self.slots.get(slot as usize).and_then(|slot| slot.places.first()) else {
            return Ok(Bytes::new());
        };
        let value = read_at(&self.file, *offset, *bytes, self.unreadable);
        value.map(|(value, _)| value.into()).map_err(StoreError::io("read segment file"))
    }

    fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    fn seek(&self, _slot: u32, sequence: u64) -> u32 {
        let passed = |slot: &Slot| slot.header.is_some_and(|header| header.end_sequence() <= sequence);
        self.slots.iter().rposition(passed).map_or(0, |last| last + 1) as u32
    }
}

/// The bytes of a file, which ends at `end`, that are between `whole` chunks and have something `unread` among them. Both are in
/// order, and never overlap.
fn hidden_bytes(whole: &[Range<u64>], unread: &[Range<u64>], end: u64) -> u64 {
    let begins = [0].into_iter().chain(whole.iter().map(|chunk| chunk.end));
    let ends = whole.iter().map(|chunk| chunk.start).chain([end]);
    let gaps = begins.zip(ends).filter(|(begin, end)| {
        let first = unread.partition_point(|unread| unread.end <= *begin);
        unread.get(first).is_some_and(|unread| unread.start < *end)
    });
    gaps.map(|(begin, end)| end - begin).sum()
}

/// Puts slots, which come in the order of their offsets, into the order of their sequences, each once, with an empty one for
/// every missing part.
fn in_order(found: Vec<Slot>) -> Vec<Slot> {
    // What is not as it was written stays behind what stood before it.
    let mut last = (0, 0);
    let mut keyed: Vec<((u64, u16), bool, Slot)> = found
        .into_iter()
        .map(|slot| {
            last = slot.header.map_or(last, |header| (header.before.sequence, header.part));
            (last, slot.header.is_none(), slot)
        })
        .collect();
    keyed.sort_by_key(|(key, damaged, _)| (*key, *damaged));
    let mut slots: Vec<Slot> = Vec::with_capacity(keyed.len());
    for (_, _, slot) in keyed {
        match (slots.last_mut(), slot.header) {
            // sled may have kept an older copy of it.
            (Some(last), Some(header)) if last.header == Some(header) => last.places.extend(slot.places),
            // It may be one of those that would be missing.
            (_, None) => slots.push(slot),
            (_, header) => {
                add_missing_parts(&mut slots, header);
                slots.push(slot);
            }
        }
    }
    add_missing_parts(&mut slots, None);
    slots
}

/// Makes room for the parts between the last of `slots` and the one that follows, if that is none of them.
fn add_missing_parts(slots: &mut Vec<Slot>, next: Option<ChunkHeader>) {
    let Some(Slot { header: Some(last), .. }) = slots.last() else { return };
    let end = match next {
        Some(next) if next.before == last.before => next.part,
        _ => last.parts,
    };
    for _ in last.part + 1..end {
        slots.push(Slot { header: None, places: Vec::new() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::record::{Totals, encode_chunk};
    use crate::wal::slots::{Slot as Read, read_slot, unfinished_from};

    /// A file of these chunks: first sequence, part, parts, unsynced; two records each.
    fn segment(chunks: &[(u64, u16, u16, u32)]) -> (tempfile::TempDir, std::path::PathBuf, Vec<u64>) {
        let (mut image, mut offsets, mut value) = (vec![0; 4096], Vec::new(), Vec::new());
        for &(sequence, part, parts, unsynced) in chunks {
            let before = Totals { sequence, events: sequence, bytes: sequence };
            encode_chunk(&ChunkHeader { before, records: 2, part, parts, unsynced }, &[7; 100], &mut value);
            offsets.push(image.len() as u64);
            image.extend(&value);
            image.extend([0; 13]);
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        std::fs::write(&path, image).unwrap();
        (directory, path, offsets)
    }

    fn spoil(path: &Path, offset: u64) {
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(b"spoilt", offset + 60).unwrap();
    }

    /// What each slot holds: the first sequence of a chunk, or what is wrong.
    fn slots(path: &Path) -> Vec<Result<u64, &'static str>> {
        let file = ClosedSegment::open(path, Unreadable::Fails).unwrap();
        let (mut slot, mut seen) = (0, Vec::new());
        while slot < file.slots() {
            let (read, next) = match read_slot(&file, slot, file.slots()).unwrap() {
                Read::Chunk { header, next_slot, .. } => (Ok(header.before.sequence), next_slot),
                Read::Empty => (Err("empty"), slot + 1),
                Read::Torn => (Err("torn"), slot + 1),
                Read::Part => (Err("part"), slot + 1),
                Read::Damaged(_) => (Err("damaged"), slot + 1),
            };
            seen.push(read);
            slot = next;
        }
        seen
    }

    #[test]
    fn chunks_are_found_in_the_order_of_their_sequences_each_once() {
        let (_directory, path, _) = segment(&[(5, 0, 1, 0), (1, 0, 1, 0), (3, 1, 2, 0), (1, 0, 1, 0), (3, 0, 2, 0)]);
        assert_eq!(slots(&path), [Ok(1), Ok(3), Ok(5)]);
        let file = ClosedSegment::open(&path, Unreadable::Fails).unwrap();
        assert_eq!([0, 2, 3, 4, 5, 9].map(|sequence| file.seek(77, sequence)), [0, 0, 1, 1, 3, 4]);
    }

    #[test]
    fn what_is_damaged_keeps_its_place() {
        let (_directory, path, offsets) =
            segment(&[(1, 0, 1, 0), (3, 0, 1, 0), (5, 0, 3, 0), (5, 1, 3, 0), (5, 2, 3, 0), (7, 0, 1, 0)]);
        spoil(&path, offsets[1]);
        assert_eq!(slots(&path), [Ok(1), Err("damaged"), Ok(5), Ok(7)]);
        spoil(&path, offsets[3]);
        assert_eq!(slots(&path), [Ok(1), Err("damaged"), Err("damaged"), Err("damaged"), Err("part"), Ok(7)]);
        // A reader that comes back goes on behind what it has read.
        let file = ClosedSegment::open(&path, Unreadable::Fails).unwrap();
        assert_eq!((file.seek(0, 3), file.seek(0, 9)), (1, 6));
    }

    #[test]
    fn parts_that_are_missing_leave_room_for_them() {
        let (_directory, path, _) = segment(&[(1, 0, 3, 0), (1, 2, 3, 0), (3, 0, 1, 0), (5, 0, 3, 0)]);
        assert_eq!(
            slots(&path),
            [Err("damaged"), Err("empty"), Err("part"), Ok(3), Err("torn"), Err("empty"), Err("empty")]
        );
    }

    /// One block spoils a chunk, and whatever stands next to it between whole ones.
    #[test]
    fn what_is_not_read_hides_all_between_the_whole_chunks_around_it() {
        let whole = [100..200, 300..400];
        assert_eq!(hidden_bytes(&whole, &[], 500), 0);
        assert_eq!(hidden_bytes(&whole, &[210..220, 230..240], 500), 100);
        assert_eq!(hidden_bytes(&whole, &[0..10, 499..500], 500), 200);
        assert_eq!(hidden_bytes(&[], &[50..60, 70..80], 500), 500);
    }

    fn unfinished(chunks: &[(u64, u16, u16, u32)], spoilt: Option<usize>, durable: u64) -> Option<u32> {
        let (_directory, path, offsets) = segment(chunks);
        spoilt.inspect(|spoilt| spoil(&path, offsets[*spoilt]));
        unfinished_from(&ClosedSegment::open(&path, Unreadable::Fails).unwrap(), durable).unwrap()
    }

    #[test]
    fn only_what_was_not_durable_is_unfinished() {
        let whole = [(11, 0, 1, 0), (13, 0, 1, 2), (15, 0, 1, 2), (17, 0, 1, 2)];
        assert_eq!(unfinished(&whole, None, 11), None);
        assert_eq!(unfinished(&whole, Some(3), 11), Some(3), "the last one is torn");
        assert_eq!(unfinished(&whole, Some(2), 11), Some(2), "the last one was written first");
        assert_eq!(unfinished(&whole, Some(2), 16), None, "it was durable: the tail was saved");
        assert_eq!(unfinished(&whole, Some(1), 11), None, "it was durable: one that follows says so");
        // A whole chunk is gone.
        assert_eq!(unfinished(&[whole[0], whole[1], whole[3]], None, 11), Some(2));
        assert_eq!(unfinished(&[whole[0], whole[2], whole[3]], None, 11), None);
        // The first one of the segment: what comes before a segment is durable.
        assert_eq!(unfinished(&whole[1..2], None, 11), Some(0));
        assert_eq!(unfinished(&whole[..1], None, 11), None);
        // Rubbish before a chunk that follows: not a byte of the log is missing.
        let (_directory, path, offsets) = segment(&[(11, 0, 1, 0), (13, 0, 1, 0), (11, 0, 1, 0)]);
        spoil(&path, offsets[2]);
        let file = ClosedSegment::open(&path, Unreadable::Fails).unwrap();
        assert_eq!(unfinished_from(&file, 11).unwrap(), Some(2), "behind everything");
        let (_directory, path, offsets) = segment(&[(11, 0, 1, 0), (11, 0, 1, 0), (13, 0, 1, 2)]);
        spoil(&path, offsets[1]);
        let file = ClosedSegment::open(&path, Unreadable::Fails).unwrap();
        assert_eq!(unfinished_from(&file, 11).unwrap(), None, "the last one may have been acked");
        // A part is missing at the end.
        assert_eq!(unfinished(&[whole[0], (13, 0, 2, 0)], None, 11), Some(1));
    }

    #[test]
    fn what_is_cut_off_is_gone_and_the_rest_is_not() {
        let (_directory, path, offsets) = segment(&[(1, 0, 1, 0), (3, 0, 1, 2), (5, 0, 1, 2), (5, 0, 1, 2)]);
        spoil(&path, offsets[1]);
        ClosedSegment::cut(&path, 1).unwrap();
        assert_eq!(slots(&path), [Ok(1)]);
    }

    #[test]
    fn a_chunk_in_a_payload_is_never_one_of_the_log() {
        let header = |sequence, unsynced| {
            let before = Totals { sequence, events: sequence, bytes: sequence };
            ChunkHeader { before, records: 2, part: 0, parts: 1, unsynced }
        };
        let (mut forged, mut value) = (Vec::new(), Vec::new());
        encode_chunk(&header(u64::MAX - 9, 0), &[7; 100], &mut forged);
        // Padded, so that it lies at any distance from the multiples of eight.
        let body: Vec<u8> = (0..8).flat_map(|padding| [forged.clone(), vec![0; padding]].concat()).collect();
        let mut image = Vec::new();
        for (sequence, unsynced) in [(1, 0), (3, 2), (5, 4)] {
            encode_chunk(&header(sequence, unsynced), &body, &mut value);
            image.extend(&value);
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        let chunk = value.len();
        let write = |at: usize, bytes: &[u8]| {
            let mut image = image.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            std::fs::write(&path, image).unwrap();
        };
        for damaged in [4, 5, 10, 24, 60, chunk - 1] {
            write(chunk + damaged, &[!image[chunk + damaged]]);
            assert_eq!(slots(&path), [Ok(1), Err("damaged"), Ok(5)], "byte {damaged}");
        }
        // The magic number is gone, or the first sector was not written.
        for gone in [4, 512] {
            write(chunk, &vec![0; gone]);
            assert_eq!(slots(&path), [Ok(1), Ok(5)]);
            ClosedSegment::cut(&path, 1).unwrap();
            assert_eq!(slots(&path), [Ok(1)]);
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_damage() {
        let directory = tempfile::tempdir().unwrap();
        let opened = ClosedSegment::open(&directory.path().join("db"), Unreadable::Fails);
        assert!(opened.is_err_and(|error| error.is_damage()));
    }
}
