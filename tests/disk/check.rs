//! Opens what a power cut left and compares it with what was promised before the cut.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Mutex, Once, PoisonError};

use ringtail::batch::Batch;
use ringtail::forward::{ParkedStore, spill_contents};
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;

use crate::load::{BAD_TYPE, HELD_TYPE, Load, Name};
use crate::small_log::small_log;

/// What a log must hold.
pub struct Promise<'a> {
    pub load: &'a Load,
    /// Batches that were acked before the cut.
    pub acked: &'a HashSet<Name>,
    /// Events that Kafka had.
    pub delivered: &'a HashSet<(Name, usize)>,
}

/// What was found.
#[derive(Debug, Default, Clone, Copy)]
pub struct Found {
    pub acked: usize,
    /// In the log though nobody had seen the ack.
    pub unacked: usize,
    /// Acked batches that the cursor had passed.
    pub passed: usize,
    pub parked: usize,
    pub spilled: usize,
    pub segments: u64,
}

impl std::ops::AddAssign for Found {
    fn add_assign(&mut self, other: Found) {
        self.acked += other.acked;
        self.unacked += other.unacked;
        self.passed += other.passed;
        self.parked += other.parked;
        self.spilled += other.spilled;
        self.segments += other.segments;
    }
}

/// Opens the log in `directory` and holds it against the promise.
///
/// # Errors
/// What is wrong with it.
pub fn check(directory: &Path, promise: &Promise) -> Result<Found, String> {
    // What is logged belongs to one check: tests that run at the same time take turns.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    complaints();
    let metrics = Metrics::new();
    let wal = Wal::open(&small_log(directory), 1 << 20, metrics.clone())
        .map_err(|error| format!("does not open: {error:?}"))?;
    let status = wal.status();
    let result = read(&wal, promise);
    wal.close();
    let mut found = result?;
    found.segments = status.segments;
    if (status.quarantined_segments, status.quarantined_stores) != (0, 0) {
        return Err(format!("something is in quarantine: {:#?}", complaints()));
    }
    let dropped = "ringtail_forward_dropped_events_total{reason=\"damaged\"} 0";
    if !metrics.handle().render().lines().any(|line| line == dropped) {
        return Err("events were counted as lost".to_owned());
    }
    let errors: Vec<String> = complaints().into_iter().filter(|line| line.contains("ERROR ringtail")).collect();
    if errors.is_empty() { Ok(found) } else { Err(format!("it complains: {errors:#?}")) }
}

fn read(wal: &Wal, promise: &Promise) -> Result<Found, String> {
    let mut found = Found::default();
    let mut in_log = HashSet::new();
    let mut numbers = HashMap::new();
    let mut previous = None;
    let mut reader = wal.reader();
    while let Some(record) = reader.next_record().map_err(|error| format!("cannot be read: {error:?}"))? {
        let sequence = record.sequence.0;
        if previous.is_some_and(|previous| sequence != previous + 1) {
            return Err(format!("sequence {sequence} after {previous:?}"));
        }
        previous = Some(sequence);
        let name = check_batch(&record.batch, promise.load)?;
        // Rising numbers: nothing is there twice, and a client's batches are in the order of sending.
        if let Some(last) = numbers.insert(name.0, name.1).filter(|last| *last >= name.1) {
            return Err(format!("{name:?} after number {last}"));
        }
        found.unacked += usize::from(!promise.acked.contains(&name));
        in_log.insert(name);
    }
    let parked = read_parked(wal, promise.load)?;
    found.parked = parked.len();
    let spilled = read_spilled(wal, promise.load)?;
    found.spilled = spilled.len();
    if let Some(event) = spilled.iter().find(|(name, _)| in_log.contains(name)) {
        return Err(format!("{event:?} is in the spill and in the log"));
    }
    found.acked = promise.acked.len();
    let mut lost = Vec::new();
    for name in promise.acked.difference(&in_log) {
        found.passed += 1;
        for (event, (kind, _)) in promise.load.events(*name).into_iter().enumerate() {
            let event_ref = (*name, event);
            let there = match kind {
                BAD_TYPE => parked.contains(&event_ref),
                HELD_TYPE if parked.contains(&event_ref) => true,
                _ => promise.delivered.contains(&event_ref) || spilled.contains(&event_ref),
            };
            if !there {
                lost.push((*name, event, kind));
            }
        }
    }
    lost.sort_unstable();
    lost.dedup_by_key(|(name, ..)| *name);
    if lost.is_empty() {
        Ok(found)
    } else {
        Err(format!("{} acked batches are lost: {:?}", lost.len(), &lost[..lost.len().min(9)]))
    }
}

/// Proves that a batch is the one that was sent, byte for byte, and says which.
fn check_batch(batch: &Batch, load: &Load) -> Result<Name, String> {
    let guid = batch.request.req_guid();
    let name = Load::parse_guid(guid).ok_or_else(|| format!("batch {guid:?} was never sent"))?;
    let events = load.events(name);
    let are_equal = batch.request.event_count() as usize == events.len()
        && *batch.client.id == *format!("client-{}", name.0)
        && batch
            .request
            .events()
            .zip(&events)
            .all(|(event, (kind, payload))| event.event_type == *kind && event.payload == &payload[..]);
    if are_equal { Ok(name) } else { Err(format!("{name:?} is not what was sent")) }
}

/// The events in the parked store, each as it was sent.
fn read_parked(wal: &Wal, load: &Load) -> Result<HashSet<(Name, usize)>, String> {
    let notes = wal.parked_notes().clone();
    let store = ParkedStore::open_offline(wal.parked(), notes.clone());
    let store = store.map_err(|error| format!("the parked store does not open: {error}"))?;
    let (noted, ever) = (notes.noted().books, store.ever());
    if noted.ever > ever {
        return Err(format!("{noted:?}, and {ever} parked events are known: some would be called lost"));
    }
    let mut parked = HashSet::new();
    for event in store.events(0) {
        let event = event.map_err(|error| format!("a parked event is damaged: {error}"))?;
        let (name, number) = Load::parse_payload(&event.payload).ok_or("a parked event was never sent")?;
        let is_parked =
            |(kind, payload): &(&str, _)| matches!(*kind, BAD_TYPE | HELD_TYPE) && *payload == event.payload;
        if !load.events(name).get(number).is_some_and(is_parked) {
            return Err(format!("parked event {number} of {name:?} is not what was sent"));
        }
        parked.insert((name, number));
    }
    Ok(parked)
}

/// The events in the spill, each as it was sent. Each client's are in order; after a crash it may have some again that were
/// delivered.
fn read_spilled(wal: &Wal, load: &Load) -> Result<HashSet<(Name, usize)>, String> {
    let contents = spill_contents(wal).map_err(|error| format!("the spill cannot be read: {error:?}"))?;
    if contents.lost > 0 {
        return Err(format!("{} acked batches are lost, or events of them: the spill misses them", contents.lost));
    }
    let mut last = HashMap::new();
    let mut spilled = HashSet::new();
    for (topic, payload) in contents.events {
        let (name, number) = Load::parse_payload(&payload).ok_or("a spilled event was never sent")?;
        if topic != HELD_TYPE || load.events(name).get(number) != Some(&(HELD_TYPE, payload)) {
            return Err(format!("spilled event {number} of {name:?} is not what was sent"));
        }
        if let Some(before) = last.insert(name.0, (name.1, number)).filter(|before| *before >= (name.1, number)) {
            return Err(format!("spilled event {number} of {name:?} comes after {before:?}"));
        }
        spilled.insert((name, number));
    }
    Ok(spilled)
}

static COMPLAINTS: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Warnings and errors that were logged in this process since the last call.
fn complaints() -> Vec<String> {
    static SUBSCRIBED: Once = Once::new();
    SUBSCRIBED.call_once(|| {
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_ansi(false);
        subscriber.with_writer(|| Complaints).init();
    });
    let lines = std::mem::take(&mut *COMPLAINTS.lock().unwrap());
    String::from_utf8_lossy(&lines).lines().map(str::to_owned).collect()
}

struct Complaints;

impl std::io::Write for Complaints {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        COMPLAINTS.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
