//! The log that is damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng, RngCore};
use ringtail::batch::{Batch, Client, Request};
use ringtail::forward::{ParkReason, ParkedStore};
use ringtail::metrics::Metrics;
use ringtail::proto;
use ringtail::wal::{Stored, Wal};
use tempfile::TempDir;

use super::parked::about;
use super::small_log::small_log;

/// Batches in it.
const BATCHES: u64 = 2000;
/// Batches after which a copy of the files is made, that may replace newer ones.
const COPY_AFTER: [u64; 3] = [600, 1200, 1800];
const PARKED: u64 = 40;
/// Largest parked payload: several values of the store.
const PARKED_BYTES_MAX: usize = 600 << 10;

/// A closed log, and what is in it.
pub struct Built {
    directory: TempDir,
    /// By sequence.
    pub batches: BTreeMap<u64, Written>,
    /// The first one that is not delivered.
    pub cursor: u64,
    /// Payloads by id, also of those removed.
    pub parked: BTreeMap<u64, Bytes>,
    /// Those that were removed again.
    pub removed: BTreeSet<u64>,
}

/// A batch of the log.
pub struct Written {
    pub request: Bytes,
    pub events: u64,
    /// The segment it is in; unknown of those that are delivered.
    pub segment: Option<u64>,
}

/// Opens the log as the service does.
pub fn open(directory: &Path) -> (Wal, std::sync::Arc<Metrics>) {
    let metrics = Metrics::new();
    let wal = Wal::open(&small_log(directory), 64 << 20, metrics.clone())
        .unwrap_or_else(|error| panic!("it does not open: {error:?}"));
    (wal, metrics)
}

/// Commits `count` batches of random sizes, some of them together, and gives them back by sequence.
pub fn append(wal: &Wal, rng: &mut StdRng, count: u64) -> BTreeMap<u64, Written> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (mut written, mut waiting) = (BTreeMap::new(), Vec::new());
    for number in 0..count {
        let events = (0..rng.random_range(1..4)).map(|_| {
            let bytes = if rng.random_ratio(1, 200) { 100 << 10..300 << 10 } else { 0..2 << 10 };
            let mut payload = vec![0; rng.random_range(bytes)];
            rng.fill_bytes(&mut payload);
            proto::Event { r#type: "click".into(), event_bytes: payload.into() }
        });
        let events: Vec<_> = events.collect();
        let count_events = events.len() as u64;
        let request = proto::SendEventRequest { req_guid: number.to_string(), sent_time: None, events };
        let request = Bytes::from(request.encode_to_vec());
        let batch = Batch {
            received_at_ms: number,
            client: Client { group: "g".into(), id: "c".into() },
            request: Request::parse(request.clone()).unwrap(),
        };
        let commit = wal.append(batch).unwrap();
        waiting.push((commit, Written { request, events: count_events, segment: None }));
        if rng.random_ratio(2, 3) || number + 1 == count {
            for (commit, batch) in waiting.drain(..) {
                let Stored::New(sequence) = runtime.block_on(commit).unwrap() else { panic!("stored before") };
                written.insert(sequence.0, batch);
            }
        }
    }
    written
}

impl Built {
    pub fn new(rng: &mut StdRng) -> Built {
        let directory = directory();
        let path = directory.path().join("now");
        let (wal, _) = open(&path);
        let mut batches = BTreeMap::new();
        for (from, to) in [0].into_iter().chain(COPY_AFTER).zip(COPY_AFTER.into_iter().chain([BATCHES])) {
            batches.append(&mut append(&wal, rng, to - from));
            park(&wal, rng, PARKED / 4);
            if to < BATCHES {
                copy(&path, &directory.path().join(format!("after-{to}")));
            }
            // So that the copies of `meta` differ.
            deliver(&wal, to / 10);
        }
        let (cursor, store) = (wal.status().cursor_sequence, parked(&wal));
        let parked: BTreeMap<u64, Bytes> =
            store.events(0).map(|event| event.unwrap()).map(|event| (event.id, event.payload)).collect();
        let removed: BTreeSet<u64> = parked.keys().copied().filter(|_| rng.random_ratio(1, 5)).collect();
        store.remove(&removed.iter().copied().collect::<Vec<_>>()).unwrap();
        let mut reader = wal.reader();
        while let Some(record) = reader.next_record().unwrap() {
            let batch = batches.get_mut(&record.sequence.0).unwrap();
            assert_eq!(batch.request, record.batch.request.as_bytes());
            // Its fields are private, its words are not.
            let position = format!("{:?}", record.end);
            let digits = position.split_once("segment: ").unwrap().1.split(',').next().unwrap();
            batch.segment = Some(digits.parse().unwrap());
        }
        drop(reader);
        wal.close();
        assert!(wal.status().segments >= 4, "{:?}", wal.status());
        Built { directory, batches, cursor, parked, removed }
    }

    /// Its files.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("now")
    }

    /// The same file at an earlier time, or not at all.
    pub fn older(&self, relative: &Path, rng: &mut StdRng) -> Option<PathBuf> {
        let after = COPY_AFTER[rng.random_range(0..COPY_AFTER.len())];
        Some(self.directory.path().join(format!("after-{after}")).join(relative)).filter(|path| path.exists())
    }

    /// The sequence after the last one.
    pub fn tail(&self) -> u64 {
        self.batches.keys().next_back().unwrap() + 1
    }

    pub fn summary(&self) -> String {
        let bytes: usize = self.batches.values().map(|batch| batch.request.len()).sum();
        let segments: std::collections::BTreeSet<_> = self.batches.values().filter_map(|batch| batch.segment).collect();
        format!(
            "{} batches, {} KiB, {} delivered, segments {segments:?}",
            self.batches.len(),
            bytes >> 10,
            self.cursor - 1
        )
    }
}

fn deliver(wal: &Wal, count: u64) {
    let mut reader = wal.reader();
    for _ in 0..count {
        wal.deliver(reader.next_record().unwrap().unwrap().end);
    }
}

/// The parked store, with its books in the log.
fn parked(wal: &Wal) -> ParkedStore {
    ParkedStore::open_offline(wal.parked(), wal.parked_notes().clone()).unwrap()
}

fn park(wal: &Wal, rng: &mut StdRng, count: u64) {
    let store = parked(wal);
    for number in 0..count {
        let bytes = if number % 10 == 0 { rng.random_range(0..PARKED_BYTES_MAX) } else { rng.random_range(0..2000) };
        let mut payload = vec![0; bytes];
        rng.fill_bytes(&mut payload);
        store.park(&about("not a topic", ParkReason::InvalidTopic), &payload).unwrap();
    }
    store.sync().unwrap();
}

/// A directory in memory if there is one: nothing here depends on what a sync does, and thousands of them take their time.
pub fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    directory.unwrap()
}

/// Copies a directory with everything in it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            // Gone, if the log is open and its keeper has just removed it.
            let copied = std::fs::copy(entry.path(), &target);
            assert!(copied.is_ok() || !entry.path().exists(), "{copied:?}");
        }
    }
}
