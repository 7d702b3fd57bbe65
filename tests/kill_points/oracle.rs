//! What must have become of every acked event: it arrived, or it is in the log behind the cursor, or it is parked; or, if
//! its topic is held at times and not all is drained, it may be in the spill.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use ringtail::batch::Batch;
use ringtail::forward::{ParkReason, ParkedStore};
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;

use super::destination::{Place, Seen};
use super::load::{HELD_TYPE, Load, PARKED_TYPE};
use super::small_log::small_log;

/// Client and number.
type Name = (u32, u64);

/// Every batch that was acked and whose end is not known.
#[derive(Default)]
pub struct Oracle {
    /// Batches acked since the test began.
    pub acked: u64,
    /// Of them, batches found delivered or parked as a whole.
    pub settled: u64,
    /// Of them, batches that the test itself has damaged, and that the ledger of losses names.
    pub lost: u64,
    /// Events found in the parked store.
    pub parked: u64,
    open: HashSet<Name>,
    /// The batch of every sequence that was ever read from the log.
    sequences: BTreeMap<u64, Name>,
    /// Parked events that were found, and not removed then.
    kept: HashSet<(u32, Place)>,
    /// Parked events that the test has removed.
    removed: HashSet<(u32, Place)>,
    /// The test has damaged the parked store.
    pub is_parked_damaged: bool,
    /// Batches that were pending when the test damaged the log: only they may be lost.
    at_risk: HashSet<Name>,
}

/// Opens the log as the service does.
pub fn open(directory: &Path) -> Wal {
    Wal::open(&small_log(directory), 1 << 20, Metrics::new()).expect("the log opens")
}

impl Oracle {
    /// A client has seen the ack of a batch.
    pub fn ack(&mut self, client: u32, number: u64) {
        self.acked += 1;
        assert!(self.open.insert((client, number)), "{client}-{number} was acked twice");
    }

    /// A complaint about records that the test has damaged: until the cursor has passed them, each life misses them anew,
    /// also when their segment is in quarantine. Then the segment before them, which may have held them as well, is set
    /// aside too once it is delivered.
    pub fn expects(&self, complaint: &str) -> bool {
        // The topic is closed. A write to the spill was cut off by the kill.
        if complaint.contains("topic held: ") || complaint.contains("the rest of a spill file cannot be read") {
            return true;
        }
        if complaint.contains("parked events are missing") {
            return self.is_parked_damaged;
        }
        if complaint.contains("damaged segment set aside") {
            return !self.at_risk.is_empty();
        }
        let Some((_, rest)) = complaint.split_once("committed records are missing from the log first_sequence=") else {
            return false;
        };
        let sequence = rest.split(' ').next().and_then(|sequence| sequence.parse().ok()).expect("a sequence");
        self.sequences.get(&sequence).is_some_and(|name| self.at_risk.contains(name))
    }

    /// The log is about to be damaged, whole as it is: gives back the names of what is pending in it.
    pub fn note_risk(&mut self, directory: &Path, load: &Load) -> Vec<Name> {
        let pending = self.pending(directory, load);
        self.at_risk.extend(&pending);
        pending
    }

    /// The names of what is pending in the log.
    pub fn pending(&mut self, directory: &Path, load: &Load) -> Vec<Name> {
        let wal = open(directory);
        let pending = self.read(&wal, load);
        wal.close();
        pending
    }

    /// What is parked may be gone from now on: the test drops or damages it. The newest id.
    pub fn give_up_parked(&mut self, directory: &Path, load: &Load) -> u64 {
        let wal = open(directory);
        let (parked, last_id) = self.read_parked(&wal, load, false);
        wal.close();
        self.removed.extend(parked);
        last_id
    }

    /// Opens the log, compares everything with everything, and closes it. `sweep`: parked events are removed, as an
    /// operator would. `drained`: nothing may be in the log or the spill. Says in a line what it found.
    pub fn check(&mut self, directory: &Path, load: &Load, seen: &Seen, sweep: bool, drained: bool) -> String {
        let wal = open(directory);
        let in_log: HashSet<Name> = self.read(&wal, load).into_iter().collect();
        let (parked, _) = self.read_parked(&wal, load, sweep);
        let gone: Vec<_> =
            self.kept.iter().filter(|event| !parked.contains(event) && !self.removed.contains(event)).collect();
        assert!(gone.is_empty(), "parked, and gone: {gone:?}");
        let losses = wal.losses();
        let quarantined = wal.status().quarantined_segments;
        wal.close();
        let mut lost = HashSet::new();
        for loss in &losses {
            for (_, name) in self.sequences.range(loss.first_sequence..loss.end_sequence) {
                assert!(self.at_risk.contains(name), "{name:?} is in the ledger of losses, and nobody damaged it");
                lost.insert(*name);
            }
        }
        assert!(!drained || in_log.is_empty(), "nothing is pending, and the log is not empty");
        let nothing = Default::default();
        let (mut settled, mut missing, mut waiting) = (0, Vec::new(), 0);
        self.open.retain(|name| {
            if in_log.contains(name) {
                return true;
            }
            let (client, number) = *name;
            let there = |(place, (event_type, _)): &(usize, (&'static str, _))| {
                let event = (client, (number, *place));
                let arrived = &seen.clients.get(&(client, *event_type)).unwrap_or(&nothing).events;
                let is_parked = parked.contains(&event) || self.removed.contains(&event);
                if *event_type == PARKED_TYPE { is_parked } else { arrived.contains(&event.1) }
            };
            let mut absent =
                load.events(client, number).into_iter().enumerate().filter(|event| !there(event)).peekable();
            if absent.peek().is_none() {
                settled += 1;
            } else if !drained && !lost.contains(name) && absent.all(|(_, (event_type, _))| event_type == HELD_TYPE) {
                waiting += 1;
                return true;
            } else if lost.contains(name) {
                self.lost += 1;
            } else {
                missing.push(*name);
            }
            false
        });
        self.settled += settled;
        assert!(missing.is_empty(), "acked, and neither delivered nor in the log nor parked: {missing:?}");
        if sweep {
            self.removed.extend(parked.iter().copied());
        }
        self.kept.clone_from(&parked);
        format!(
            "{} in the log, {waiting} wait in the spill, {settled} settled, {} parked, {} losses in the ledger, {quarantined} in quarantine",
            in_log.len(),
            parked.len(),
            losses.len()
        )
    }

    /// Reads the log from the cursor to its end: in order, without a gap that the ledger does not explain, each sequence
    /// with the batch that it had before.
    fn read(&mut self, wal: &Wal, load: &Load) -> Vec<Name> {
        let mut newest: HashMap<u32, u64> = HashMap::new();
        let mut expected = wal.status().cursor_sequence;
        let (mut reader, mut ahead) = (wal.reader(), wal.ahead_reader());
        let mut names = Vec::new();
        while let Some(record) = reader.next_record().expect("the log is readable").or_else(|| {
            // What was delivered ahead of the cursor is not missed.
            expected = wal.status().delivered_ahead.map_or(expected, |ahead| ahead.end_sequence.max(expected));
            ahead.as_mut()?.next_record().expect("the log is readable")
        }) {
            let sequence = record.sequence.0;
            let losses = wal.losses();
            while expected < sequence {
                let loss = losses.iter().find(|loss| (loss.first_sequence..loss.end_sequence).contains(&expected));
                expected =
                    loss.unwrap_or_else(|| panic!("{expected} is missing before {sequence}: {losses:?}")).end_sequence;
            }
            assert_eq!(expected, sequence, "out of order");
            expected += 1;
            let (client, number) = identify(&record.batch, load);
            let last = newest.insert(client, number);
            assert!(last.is_none_or(|last| number > last), "{client}-{number} after {last:?}");
            let before = *self.sequences.entry(sequence).or_insert((client, number));
            assert_eq!(before, (client, number), "sequence {sequence} holds another batch now");
            names.push((client, number));
        }
        names
    }

    /// The parked events, and the newest id.
    fn read_parked(&mut self, wal: &Wal, load: &Load, sweep: bool) -> (HashSet<(u32, Place)>, u64) {
        let notes = wal.parked_notes().clone();
        let store = ParkedStore::open_offline(wal.parked(), notes.clone()).expect("the parked store opens");
        let (noted, ever) = (notes.noted().books, store.ever());
        assert!(
            self.is_parked_damaged || noted.ever <= ever,
            "{noted:?}, and {ever} are known: some would be called lost"
        );
        let mut parked = HashSet::new();
        let mut ids = Vec::new();
        for event in store.events(0) {
            let event = event.expect("a parked event is readable");
            let (client, place) = load.identify(PARKED_TYPE, &event.payload);
            assert_eq!(event.about.reason, ParkReason::InvalidTopic);
            assert_eq!(
                (event.about.connection_id, event.about.req_guid),
                (Load::id(client), Load::name(client, place.0))
            );
            parked.insert((client, place));
            ids.push(event.id);
        }
        assert_eq!(store.count(), ids.len() as u64);
        self.parked += parked.len() as u64;
        if sweep {
            // The next start does not miss them.
            let removed = store.remove(&ids).expect("parked events can be removed");
            assert_eq!(removed.events, ids.len() as u64);
        }
        (parked, store.last_id())
    }
}

/// Proves that a batch is the one that was sent, byte for byte, and says which.
fn identify(batch: &Batch, load: &Load) -> Name {
    let (client, number) = Load::parse_name(batch.request.req_guid());
    assert_eq!(*batch.client.id, *Load::id(client));
    let sent = load.events(client, number);
    assert_eq!(batch.request.event_count() as usize, sent.len());
    for (event, (event_type, payload)) in batch.request.events().zip(&sent) {
        assert_eq!(event.event_type, *event_type);
        assert!(event.payload == &payload[..], "the payload of {client}-{number} is not the one that was sent");
    }
    (client, number)
}
