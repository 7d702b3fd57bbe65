//! What must hold of a damaged log.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use ringtail::config::ForwardConfig;
use ringtail::forward::{Forwarder, ParkedError, ParkedStore};
use ringtail::metrics::Metrics;
use ringtail::wal::{Loss, OfflineLog, Wal};

use super::PATIENCE;
use super::build::{Built, Written, append, open};
use super::damage::Damage;
use super::small_log::small_log;

/// Batches appended to the damaged log.
const NEW_BATCHES: u64 = 20;

/// What was found, summed up over images.
#[derive(Debug, Default)]
pub struct Found {
    images: u64,
    pub lost_batches: u64,
    images_with_loss: u64,
    quarantined: u64,
    parked_missing: u64,
}

/// What one life of the log reads.
struct Life {
    sequences: BTreeSet<u64>,
    losses: BTreeSet<u64>,
}

/// Opens, reads, appends to, delivers and opens again the image in `path`. Panics at anything that must not be.
pub fn check(built: &Built, damage: &Damage, path: &Path) -> Found {
    let mut new = BTreeMap::new();
    let whole = carve(path);
    // What holds no record is worth nothing.
    let existing = holding_records(&path.join("wal"));
    let (first, parked_missing, last_sequence) = {
        let (wal, metrics) = open(path);
        let first = live(built, &new, damage, &wal, &metrics);
        let not_read: BTreeSet<u64> =
            whole.difference(&first.sequences).copied().filter(|sequence| *sequence >= built.cursor).collect();
        assert!(damage.meta || not_read.is_empty(), "whole on disk, and not read: {}", runs(not_read.iter()));
        let parked_missing = check_parked(built, &wal).missing();
        new = append(&wal, &mut StdRng::seed_from_u64(1), NEW_BATCHES);
        let last = wal.status().next_sequence - 1;
        let mut reader = wal.reader();
        while let Some(record) = reader.next_record().expect("it is readable") {
            if let Some(written) = new.get(&record.sequence.0) {
                assert_eq!(record.batch.request.as_bytes(), &written.request, "a new batch, {}", record.sequence.0);
            }
        }
        drop(reader);
        assert!(damage.meta || new.keys().all(|sequence| *sequence >= built.tail()), "a sequence is used twice");
        wal.close();
        (first, parked_missing, last)
    };
    // A restart finds the same.
    {
        let (wal, metrics) = open(path);
        let again = live(built, &new, damage, &wal, &metrics);
        let expected: BTreeSet<u64> = first.sequences.iter().chain(new.keys()).copied().collect();
        assert_eq!(again.sequences, expected, "the second restart reads something else");
        assert_eq!(again.losses, first.losses, "the second restart reports something else");
        let parked = check_parked(built, &wal);
        assert_eq!(parked.missing(), parked_missing);
        // So often it is opened, and only the service counts.
        check_lost(&parked, damage, &wal, &metrics);
        assert_eq!(wal.status().next_sequence - 1, last_sequence);
        let mut reader = wal.reader();
        while let Some(record) = reader.next_record().expect("it is readable") {
            wal.deliver(record.end);
        }
        drop(reader);
        assert_eq!(wal.status().pending_batches, 0);
        wal.close();
    }
    // Everything is delivered, and every segment that lost something is kept.
    let (wal, metrics) = open(path);
    assert_eq!(wal.status().pending_batches, 0);
    assert!(wal.reader().next_record().expect("it is readable").is_none());
    assert_eq!(dropped(&metrics), 0);
    assert_eq!(sequences(&wal.losses()), first.losses, "the ledger forgets");
    let quarantined = wal.status().quarantined_segments;
    wal.close();
    let kept: BTreeSet<u64> = list(&path.join("quarantine"));
    for sequence in &first.losses {
        let segment = built.batches.get(sequence).and_then(|batch| batch.segment);
        let Some(segment) = segment.filter(|segment| existing.contains(segment)) else { continue };
        if !damage.unmarked.contains(&segment) {
            assert!(kept.contains(&segment), "segment {segment} lost {sequence} and is not kept: {kept:?}");
        }
    }
    Found {
        images: 1,
        lost_batches: first.losses.len() as u64,
        images_with_loss: u64::from(!first.losses.is_empty()),
        quarantined,
        parked_missing,
    }
}

/// The sequences of what is whole in the segments' files.
fn carve(path: &Path) -> BTreeSet<u64> {
    let log = OfflineLog::open(&small_log(path)).expect("nobody has it open");
    let segments = log.segments().expect("the segments are listed");
    let records = segments.iter().flat_map(|segment| segment.records().expect("its file is searched"));
    records.map(|record| record.expect("it is readable").sequence.0).collect()
}

/// Reads the log from the cursor to its end and compares it with what was written.
fn live(built: &Built, new: &BTreeMap<u64, Written>, damage: &Damage, wal: &Wal, metrics: &Metrics) -> Life {
    let cursor = wal.status().cursor_sequence;
    assert!(damage.meta || cursor == built.cursor, "the cursor is at {cursor}, not at {}", built.cursor);
    let mut read = BTreeSet::new();
    let mut reader = wal.reader();
    while let Some(record) = reader.next_record().expect("it is readable") {
        let sequence = record.sequence.0;
        assert!(read.last().is_none_or(|last| sequence > *last), "{sequence} after {:?}", read.last());
        let written = new.get(&sequence).or_else(|| built.batches.get(&sequence));
        let written = written.unwrap_or_else(|| panic!("{sequence} was never written"));
        assert!(record.batch.request.as_bytes() == &written.request, "{sequence} is not what was written");
        read.insert(sequence);
    }
    let losses = sequences(&wal.losses());
    let known_end = if damage.meta { read.last().map_or(0, |last| last + 1) } else { built.tail() };
    let known_start = if damage.meta { cursor.max(built.cursor) } else { built.cursor };
    let missing: BTreeSet<u64> = (known_start..known_end).filter(|sequence| !read.contains(sequence)).collect();
    let reported: BTreeSet<u64> = losses.iter().copied().filter(|sequence| *sequence >= known_start).collect();
    assert!(missing.is_subset(&reported), "lost in silence: {}", runs(missing.difference(&reported)));
    // The end may be known to a `meta` that was touched and is whole.
    let allowed = |sequence: &&u64| damage.meta && **sequence >= known_end;
    let wrongly: Vec<&u64> = reported.difference(&missing).filter(|sequence| !allowed(sequence)).collect();
    assert!(wrongly.is_empty(), "reported lost, and is not: {}", runs(wrongly.into_iter()));
    let delivered: Vec<&u64> = losses.iter().filter(|sequence| **sequence < known_start).collect();
    assert!(damage.meta || delivered.is_empty(), "reported lost, and was delivered: {}", runs(delivered.into_iter()));

    let status = wal.status();
    assert_eq!(status.lost_batches, losses.len() as u64, "a loss is counted twice: {:?}", wal.losses());
    let events: u64 = losses.iter().filter_map(|sequence| built.batches.get(sequence)).map(|batch| batch.events).sum();
    assert_eq!(status.lost_events, events, "{:?}", wal.losses());
    assert_eq!(dropped(metrics), events, "the metric counts something else: {:?}", wal.losses());
    assert!(!status.failed);
    Life { sequences: read, losses }
}

/// What is there of the parked events.
struct Parked {
    /// There should be so many.
    kept: u64,
    readable: u64,
    /// They count as held.
    unreadable: u64,
    /// Those that were removed, and are there again: sled lost what removed them.
    again: u64,
}

impl Parked {
    fn missing(&self) -> u64 {
        self.kept - (self.readable - self.again)
    }
}

/// Every parked event that is there is the one that was parked.
fn check_parked(built: &Built, wal: &Wal) -> Parked {
    let store =
        ParkedStore::open(wal.parked()).unwrap_or_else(|error| panic!("the parked store does not open: {error:?}"));
    let kept = (built.parked.len() - built.removed.len()) as u64;
    let mut parked = Parked { kept, readable: 0, unreadable: 0, again: 0 };
    for event in store.events(0) {
        match event {
            Ok(event) => {
                assert!(built.parked.get(&event.id) == Some(&event.payload), "parked event {} is another", event.id);
                parked.readable += 1;
                parked.again += u64::from(built.removed.contains(&event.id));
            }
            Err(ParkedError::Damaged { .. }) => parked.unreadable += 1,
            Err(error) => panic!("the parked store cannot be read: {error:?}"),
        }
    }
    assert_eq!(store.count(), parked.readable + parked.unreadable);
    parked
}

/// The service counts the parked events that are missing, to the event: once, and none that was removed. Those that are there
/// again are set off against them.
fn check_lost(parked: &Parked, damage: &Damage, wal: &Wal, metrics: &Arc<Metrics>) {
    let config = ForwardConfig { brokers: Vec::new(), ..ForwardConfig::default() };
    let start = || Forwarder::start(&config, 16 << 20, wal.clone(), metrics.clone()).expect("the service starts");
    let forwarder = start();
    let (lost, expected) = (forwarder.parked().lost(), parked.kept.saturating_sub(parked.readable + parked.unreadable));
    // Without the books nobody knows.
    assert!(
        lost == expected || damage.meta && lost < expected,
        "{lost} of {expected} parked events are counted as lost"
    );
    forwarder.stop(PATIENCE);
    drop(forwarder);
    let forwarder = start();
    assert_eq!(forwarder.parked().lost(), 0, "it is counted twice");
    forwarder.stop(PATIENCE);
}

fn dropped(metrics: &Metrics) -> u64 {
    let text = metrics.handle().render();
    let name = "ringtail_forward_dropped_events_total{reason=\"damaged\"} ";
    text.lines().find_map(|line| line.strip_prefix(name)).map_or(0, |value| value.parse().unwrap())
}

fn sequences(losses: &[Loss]) -> BTreeSet<u64> {
    losses.iter().flat_map(|loss| loss.first_sequence..loss.end_sequence).collect()
}

fn list(directory: &Path) -> BTreeSet<u64> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
    entries.filter_map(|name| name.to_str().and_then(|name| name.parse().ok())).collect()
}

/// The segments in `directory` whose file holds at least one chunk, whole or not.
fn holding_records(directory: &Path) -> BTreeSet<u64> {
    let mut segments = list(directory);
    segments.retain(|id| {
        let bytes = std::fs::read(directory.join(format!("{id:012}/db")));
        bytes.is_ok_and(|bytes| memchr::memmem::find(&bytes, b"RTC1").is_some())
    });
    segments
}

/// Numbers as runs.
fn runs<'a>(numbers: impl Iterator<Item = &'a u64>) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    format!("{runs:?}")
}

impl Found {
    /// Sums up.
    pub fn add(&mut self, other: &Found) {
        self.images += other.images;
        self.lost_batches += other.lost_batches;
        self.images_with_loss += other.images_with_loss;
        self.quarantined += other.quarantined;
        self.parked_missing += other.parked_missing;
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { images, lost_batches, images_with_loss, quarantined, parked_missing } = self;
        write!(
            f,
            "{images} images, {images_with_loss} with losses, {lost_batches} batches lost and reported, \
             {quarantined} segments kept, {parked_missing} parked events missing"
        )
    }
}
