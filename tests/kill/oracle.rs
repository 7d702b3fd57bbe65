//! What must be in the log.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use ringtail::batch::Batch;
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;

use super::load::Load;
use super::small_log::small_log;

/// Every batch that must be in the log, and what was found there before.
#[derive(Default)]
pub struct Oracle {
    /// Batches acked since the test began.
    pub acked: u64,
    /// Batches found in the log though nobody saw their ack.
    pub unacked: u64,
    /// Acked, and not yet found.
    new: HashSet<(u32, u64)>,
    /// Found before and not delivered, by sequence. What was found once must stay, acked or not.
    found: BTreeMap<u64, (u32, u64)>,
    /// The last sequence ever found.
    last_sequence: u64,
    /// Number of each client's last batch that was delivered.
    delivered: HashMap<u32, u64>,
}

impl Oracle {
    /// A client has seen the ack of a batch.
    pub fn ack(&mut self, client: u32, number: u64) {
        self.acked += 1;
        assert!(self.new.insert((client, number)), "{client}-{number} was acked twice");
    }

    /// Opens the log, compares it with what is known, delivers a part of it, and closes it. Says in a line what it found.
    pub fn check(&mut self, directory: &Path, load: &Load, deliver: f64) -> String {
        let wal = Wal::open(&small_log(directory), 1 << 20, Metrics::new()).expect("the log opens");
        let before = wal.status();
        assert_eq!(before.quarantined_segments, 0, "a segment was set aside");
        let ends = self.read(&wal, load);
        assert!(self.new.is_empty(), "acked batches are not in the log: {:?}", self.new);

        let deliver = (ends.len() as f64 * deliver) as usize;
        if let Some((sequence, end)) = ends[..deliver].last() {
            wal.deliver(*end);
            let rest = self.found.split_off(&(sequence + 1));
            for (client, number) in std::mem::replace(&mut self.found, rest).into_values() {
                self.delivered.insert(client, number);
            }
        }
        wal.close();
        let after = wal.status();
        assert_eq!(after.pending_batches, self.found.len() as u64);
        format!(
            "{} batches, {} KiB in {} segments ({} MiB), delivered {deliver}, {} segments left",
            ends.len(),
            before.pending_bytes >> 10,
            before.segments,
            before.disk_bytes >> 20,
            after.segments
        )
    }

    /// Reads the log from the cursor to its end. Gives back each record's sequence and the position after it.
    fn read(&mut self, wal: &Wal, load: &Load) -> Vec<(u64, ringtail::wal::Position)> {
        let mut numbers = self.delivered.clone();
        let mut found_before = std::mem::take(&mut self.found);
        let mut previous = None;
        let mut ends = Vec::new();
        let mut reader = wal.reader();
        while let Some(record) = reader.next_record().expect("the log is readable") {
            let sequence = record.sequence.0;
            let follows = previous.is_none_or(|previous| sequence == previous + 1);
            assert!(follows, "sequence {sequence} after {previous:?}");
            previous = Some(sequence);
            let (client, number) = check_batch(&record.batch, load);
            // Rising numbers: no batch is there twice, and those of a client are in the order of sending.
            let last = numbers.insert(client, number);
            assert!(last.is_none_or(|last| number > last), "{client}-{number} after {last:?}");
            match found_before.remove(&sequence) {
                Some(before) => assert_eq!(before, (client, number), "sequence {sequence} holds another batch now"),
                None => {
                    assert!(sequence > self.last_sequence, "sequence {sequence} was used before");
                    self.unacked += u64::from(!self.new.remove(&(client, number)));
                }
            }
            self.found.insert(sequence, (client, number));
            ends.push((sequence, record.end));
        }
        assert!(found_before.is_empty(), "once in the log, and gone: {found_before:?}");
        self.last_sequence = self.last_sequence.max(previous.unwrap_or(0));
        ends
    }
}

/// Proves that a batch is the one that was sent, byte for byte, and says which.
fn check_batch(batch: &Batch, load: &Load) -> (u32, u64) {
    let (client, number) = Load::parse_name(batch.request.req_guid());
    assert_eq!(*batch.client.id, *Load::id(client));
    let events = load.events(client, number);
    assert_eq!(batch.request.event_count() as usize, events.len());
    for (event, (event_type, payload)) in batch.request.events().zip(&events) {
        assert_eq!(event.event_type, *event_type);
        assert!(event.payload == &payload[..], "the payload of {client}-{number} is not the one that was sent");
    }
    (client, number)
}
