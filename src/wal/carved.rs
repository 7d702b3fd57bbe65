//! The records of one segment, for tools: a walk through a closed segment (`closed.rs`) that passes over all damage.
//!
//! What never became durable may turn up as well: nobody got an ack for it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use bytes::Bytes;

use super::closed::ClosedSegment;
use super::error::StoreError;
use super::record::{ChunkError, Totals, split_record};
use super::search::Unreadable;
use super::slots::{Slot, read_slot};
use super::store::SegmentFile;
use crate::batch::{Batch, Sequence};

/// One batch, carved out of a segment.
#[derive(Debug, Clone)]
pub struct CarvedRecord {
    /// Its place in the order of the log.
    pub sequence: Sequence,
    /// The batch, as it was admitted.
    pub batch: Batch,
    /// What [`super::Wal::recovered`] takes once it is in the log again.
    pub run: Run,
}

/// Records that follow each other without a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Totals at the first of them.
    pub(super) first: Totals,
    /// Totals after the last.
    pub(super) end: Totals,
}

/// The records of a segment, by sequence. At most one chunk is in memory.
pub struct CarvedRecords {
    /// None if there is no file.
    segment: Option<ClosedSegment>,
    /// The next slot to read.
    slot: u32,
    /// What is left of the chunk that is being read, and the totals at its next record.
    body: Bytes,
    records_left: u32,
    at: Totals,
    /// Bytes that the disk does not read, and of which nobody was told.
    unread_bytes: u64,
}

impl CarvedRecords {
    /// Searches the file at `path`. One that is not there holds nothing.
    pub(super) fn open(path: &Path) -> Result<CarvedRecords, StoreError> {
        let segment = match ClosedSegment::open(path, Unreadable::Zeroes) {
            Err(error) if error.is_damage() => None,
            segment => Some(segment?),
        };
        let unread_bytes = segment.as_ref().map_or(0, ClosedSegment::unread_bytes);
        Ok(CarvedRecords { segment, slot: 0, body: Bytes::new(), records_left: 0, at: Totals::ZERO, unread_bytes })
    }

    fn next_in_chunk(&mut self) -> Option<Result<CarvedRecord, ChunkError>> {
        self.records_left = self.records_left.checked_sub(1)?;
        let first = self.at;
        let record = match split_record(&mut self.body) {
            Ok(record) => record,
            Err(error) => {
                self.records_left = 0;
                return Some(Err(error));
            }
        };
        let end = record.after(first);
        self.at = end;
        let carved = |batch| CarvedRecord { sequence: Sequence(first.sequence), batch, run: Run { first, end } };
        Some(record.decode().map(carved))
    }

    /// Reads the next chunk. False: there is none.
    fn next_chunk(&mut self) -> Result<bool, StoreError> {
        let Some(segment) = &self.segment else { return Ok(false) };
        let slots = segment.slots();
        while self.slot < slots {
            let slot = self.slot;
            self.slot += 1;
            if let Slot::Chunk { header, body, next_slot } = read_slot(segment, slot, slots)? {
                (self.slot, self.body, self.records_left, self.at) = (next_slot, body, header.records, header.before);
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Iterator for CarvedRecords {
    /// After an error nothing that follows is missing but what the error is about.
    type Item = Result<CarvedRecord, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_in_chunk() {
                Some(Ok(record)) => return Some(Ok(record)),
                // The checksum was right, so this was written wrong, and was never more than that.
                Some(Err(_)) => continue,
                None => {}
            }
            match self.next_chunk() {
                Ok(true) => {}
                Ok(false) => {
                    let unread_bytes = std::mem::take(&mut self.unread_bytes);
                    let error = io::Error::other(format!("the disk does not read {unread_bytes} bytes of it"));
                    return (unread_bytes > 0).then(|| Err(StoreError::io("read segment file")(error)));
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Runs by their first sequence, joined where they meet.
#[derive(Debug, Default)]
pub(super) struct Runs(BTreeMap<u64, Run>);

impl Runs {
    /// Adds one record. One that is there already stays.
    pub fn add(&mut self, record: Run) {
        if let Some((_, run)) = self.0.range_mut(..=record.first.sequence).next_back() {
            if run.end.sequence > record.first.sequence {
                return;
            }
            if run.end == record.first {
                run.end = record.end;
                return;
            }
        }
        self.0.insert(record.first.sequence, record);
    }

    /// The runs, by sequence.
    pub fn iter(&self) -> impl Iterator<Item = &Run> {
        self.0.values()
    }

    /// How many of the records from `first` to before `end` are in a run.
    pub fn count(&self, first: u64, end: u64) -> u64 {
        let covered = |run: &Run| run.end.sequence.min(end).saturating_sub(run.first.sequence.max(first));
        self.0.range(..end).map(|(_, run)| covered(run)).sum()
    }
}

impl FromIterator<Run> for Runs {
    fn from_iter<T: IntoIterator<Item = Run>>(runs: T) -> Runs {
        let mut all = Runs::default();
        runs.into_iter().for_each(|run| all.add(run));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WalConfig;
    use crate::metrics::Metrics;
    use crate::wal::tests::batch;
    use crate::wal::{Wal, offline};

    #[test]
    fn carving_finds_exactly_what_the_reader_reads() {
        let directory = tempfile::tempdir().unwrap();
        let config = WalConfig {
            directory: directory.path().into(),
            segment_bytes: bytesize::ByteSize(8 << 20),
            free_bytes_min: bytesize::ByteSize(0),
            ..WalConfig::default()
        };
        let wal = Wal::open(&config, 64 << 20, Metrics::new()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut number = 0;
        for group in 0..60 {
            // Several batches in a chunk, and some that take several chunks.
            let commits: Vec<_> = (0..group % 7 + 1)
                .map(|at| {
                    number += 1;
                    wal.append(batch(number, if at == 5 { 2_000_000 } else { 20_000 })).unwrap()
                })
                .collect();
            for commit in commits {
                runtime.block_on(commit).unwrap();
            }
        }
        let (mut reader, mut read) = (wal.reader(), Vec::new());
        while let Some(record) = reader.next_record().unwrap() {
            read.push((record.sequence, record.batch.received_at_ms, record.batch.request));
        }
        drop(reader);
        let totals = wal.shared.log().tail;
        wal.close();
        drop(wal);
        let log = offline::OfflineLog::open(&config).unwrap();
        let segments = log.segments().unwrap();
        assert!(segments.len() >= 3, "{segments:?}");
        let records: Vec<CarvedRecord> =
            segments.iter().flat_map(|segment| segment.records().unwrap()).collect::<Result<_, _>>().unwrap();
        let runs: Runs = records.iter().map(|record| record.run).collect();
        assert_eq!(runs.iter().collect::<Vec<_>>(), [&Run { first: Totals::ZERO, end: totals }]);
        assert_eq!(runs.count(3, 9), 6);
        let carved: Vec<_> =
            records.into_iter().map(|r| (r.sequence, r.batch.received_at_ms, r.batch.request)).collect();
        assert!(carved == read, "{} carved, {} read", carved.len(), read.len());
        assert_eq!(read.len() as u64, number);
    }
}
