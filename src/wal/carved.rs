//! The records of one segment, carved out of its file: for tools that must not change what they read, and for segments
//! that sled cannot open any more.
//!
//! What was kept of it before it was opened (`store/segments.rs`) is searched as well. Files are searched twice: once for
//! where their chunks are, and once more to read them in the order of their sequences. At most one chunk is in memory. What
//! never became durable may turn up as well: nobody got an ack for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::error::StoreError;
use super::record::{ChunkError, ChunkHeader, HEADER_BYTES, Totals, decode_chunk, split_record};
use super::salvage::Chunks;
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

/// One chunk in a file: where each of its parts is.
struct Place {
    header: ChunkHeader,
    /// File, offset and length of each.
    parts: BTreeMap<u16, (usize, u64, usize)>,
}

/// The records of a segment, by sequence.
pub struct CarvedRecords {
    files: Vec<File>,
    places: std::vec::IntoIter<Place>,
    /// What is left of the chunk that is being read, and the totals at its next record.
    body: Bytes,
    records_left: u32,
    at: Totals,
    /// Why the search of the file ended early.
    broken: Option<io::Error>,
}

impl CarvedRecords {
    /// Searches the files at `paths`. One that is not there holds nothing.
    pub(super) fn open(paths: &[PathBuf]) -> Result<CarvedRecords, StoreError> {
        let (mut files, mut found, mut broken) = (Vec::new(), BTreeMap::new(), None);
        for path in paths {
            match File::open(path) {
                Ok(file) => {
                    find(path, files.len(), &mut found, &mut broken)?;
                    files.push(file);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::io("open segment file")(error)),
            }
        }
        let mut places: Vec<Place> = found.into_values().collect();
        places.retain(|place| place.parts.len() == usize::from(place.header.parts));
        let (body, places) = (Bytes::new(), places.into_iter());
        Ok(CarvedRecords { files, places, body, records_left: 0, at: Totals::ZERO, broken })
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
        let Some(place) = self.places.next() else { return Ok(false) };
        let mut body = Vec::new();
        for (file, offset, bytes) in place.parts.values() {
            let mut value = vec![0; *bytes];
            self.files[*file].read_exact_at(&mut value, *offset).map_err(StoreError::io("read segment file"))?;
            // It was right a moment ago; a disk that changes its mind is damage all the same.
            let Ok((_, piece)) = decode_chunk(value.into()) else { return Ok(true) };
            body.extend_from_slice(&piece);
        }
        (self.body, self.records_left, self.at) = (body.into(), place.header.records, place.header.before);
        Ok(true)
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
                Ok(false) => return self.broken.take().map(|error| Err(StoreError::io("search segment file")(error))),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// First sequence, records and parts of a chunk: what its parts have in common.
type Key = (u64, u32, u16);

/// Adds the chunks of file number `file` to what was found before.
fn find(
    path: &Path,
    file: usize,
    found: &mut BTreeMap<Key, Place>,
    broken: &mut Option<io::Error>,
) -> Result<(), StoreError> {
    for chunk in Chunks::open(path).map_err(StoreError::io("open segment file"))? {
        match chunk {
            Ok((offset, header, body)) => {
                let key = (header.before.sequence, header.records, header.parts);
                let place = found.entry(key).or_insert_with(|| Place { header, parts: BTreeMap::new() });
                if place.header.before == header.before {
                    place.parts.entry(header.part).or_insert((file, offset, HEADER_BYTES + body.len()));
                }
            }
            Err(error) => *broken = Some(error),
        }
    }
    Ok(())
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
