//! Random histories on the store in memory, against a model: append, commit, read, deliver, trim, rotate, calls that fail,
//! commits that find no room, restarts, and power cuts at any sync; some of it ahead of the cursor. Every acked batch is there once, in order, under the sequence that its ack said,
//! unless it was delivered before; and a retry of it is not stored again.
//!
//! `RINGTAIL_SEED` replays the choices of a run (not the timing of the log's threads), `RINGTAIL_HISTORIES` sets their
//! number.

#[path = "../../tests/support/environment.rs"]
mod environment;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use environment::number_from_environment;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::memory::{Faults, MemoryStore, NoRoom, small_shape};
use super::tests::{batch, number, stored, until, wait};
use super::{Commit, CommitError, OpenError, Stored, Wal};
use crate::batch::Batch;
use crate::config::WalConfig;
use crate::metrics::Metrics;

/// Histories at a time: the log's own threads mostly wait for their next turn after a call that failed.
const WORKERS: usize = 8;

fn seed_and_histories() -> (u64, u64) {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(rand::random);
    let histories = number_from_environment("RINGTAIL_HISTORIES").unwrap_or(300);
    println!("RINGTAIL_SEED={seed} RINGTAIL_HISTORIES={histories}");
    (seed, histories)
}

#[test]
fn no_power_cut_loses_an_acked_batch() {
    let (seed, histories) = seed_and_histories();
    let (next, total) = (AtomicU64::new(0), Mutex::new(Counts::default()));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= histories {
                return;
            }
            let counts = random_history(seed, number);
            total.lock().unwrap().add(&counts);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(work);
        }
    });
    let total = total.into_inner().unwrap();
    println!("{total:?}");
    assert!(histories < 100 || total.covers_everything(), "{total:?}");
}

fn random_history(seed: u64, number: u64) -> Counts {
    let mut history = History::new(seed ^ number, format!("RINGTAIL_SEED={seed}, history {number}"));
    for _ in 0..history.rng.random_range(1..5) {
        let syncs = history.rng.random_range(0..60);
        let power_after_syncs = history.rng.random_bool(0.7).then_some(syncs);
        history.store.set_faults(Faults { power_after_syncs, ..Faults::default() });
        history.live();
    }
    history.counts
}

/// The same history again and again, with the power cut at its first sync, its second, and so on.
#[test]
fn no_power_cut_at_any_sync_of_a_history_loses_an_acked_batch() {
    let (seed, _) = seed_and_histories();
    for syncs in 0.. {
        let mut history = History::new(seed, format!("cut after {syncs} syncs"));
        history.faults_at_random = false;
        history.store.set_faults(Faults { power_after_syncs: Some(syncs), ..Faults::default() });
        let mut lives = 0;
        while history.counts.cuts == 0 && lives < 4 {
            history.live();
            lives += 1;
        }
        if history.counts.cuts == 0 {
            println!("{syncs} syncs, {:?}", history.counts);
            assert!(syncs > 8, "the history is short");
            return;
        }
    }
}

/// What happened, to prove that it did.
#[derive(Debug, Default)]
struct Counts {
    acked: u64,
    cuts: u64,
    restarts: u64,
    trimmed: u64,
    failed_logs: u64,
    failed_starts: u64,
    refused: u64,
    /// Queued, and then refused for lack of room.
    without_room: u64,
    /// Acked by a log that had been full.
    after_full: u64,
    retried: u64,
    /// Delivered ahead of the cursor, which then passed it.
    passed_ahead: u64,
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.acked += other.acked;
        self.cuts += other.cuts;
        self.restarts += other.restarts;
        self.trimmed += other.trimmed;
        self.failed_logs += other.failed_logs;
        self.failed_starts += other.failed_starts;
        self.refused += other.refused;
        self.without_room += other.without_room;
        self.after_full += other.after_full;
        self.retried += other.retried;
        self.passed_ahead += other.passed_ahead;
    }

    fn covers_everything(&self) -> bool {
        let Counts { acked, cuts, restarts, trimmed, failed_logs, failed_starts, refused, .. } = *self;
        let Counts { without_room, after_full, retried, passed_ahead, .. } = *self;
        let counts = [acked, cuts, restarts, trimmed, failed_logs, failed_starts, refused];
        let counts = counts.into_iter().chain([without_room, after_full, retried, passed_ahead]);
        counts.into_iter().all(|count| count > 0)
    }
}

/// One disk through several lives of the log.
struct History {
    name: String,
    rng: StdRng,
    store: MemoryStore,
    next: u64,
    /// What was sent, by number.
    batches: BTreeMap<u64, Batch>,
    /// Number of every acked batch by its sequence.
    acked: BTreeMap<u64, u64>,
    /// Batches that were refused, and then acked as retries.
    retried: BTreeSet<u64>,
    delivered: BTreeSet<u64>,
    /// Batches that found no room in this life.
    without_room: Vec<u64>,
    counts: Counts,
    /// Calls fail at random, and the power may also be cut when a life has ended, between two syncs.
    faults_at_random: bool,
    metrics: Arc<Metrics>,
}

impl History {
    fn new(seed: u64, name: String) -> History {
        let (store, acked, batches) = (MemoryStore::default(), BTreeMap::new(), BTreeMap::new());
        let (retried, delivered) = (BTreeSet::new(), BTreeSet::new());
        let rng = StdRng::seed_from_u64(seed);
        let (counts, metrics) = (Counts::default(), Metrics::new());
        History {
            name,
            rng,
            store,
            next: 1,
            batches,
            acked,
            retried,
            delivered,
            without_room: Vec::new(),
            counts,
            faults_at_random: true,
            metrics,
        }
    }

    fn open(&self) -> Result<Wal, OpenError> {
        let (config, store) = (WalConfig::default(), Arc::new(self.store.clone()));
        Wal::open_in(&config, 1 << 20, small_shape(), store, self.metrics.clone(), None)
    }

    /// One life, which ends with a power cut if the power is off by then, and a look at what is there afterwards.
    fn live(&mut self) {
        self.store.change_faults(Faults::default());
        match self.open() {
            Ok(wal) => self.work(&wal),
            Err(error) => {
                assert!(self.store.is_off(), "{}: {error:?}", self.name);
                self.counts.failed_starts += 1;
            }
        }
        if self.store.is_off() || (self.faults_at_random && self.rng.random_bool(0.2)) {
            self.store = self.store.after_power_cut(&mut self.rng);
            self.counts.cuts += 1;
        } else {
            self.counts.restarts += 1;
        }
        let faults = self.store.faults();
        self.store.set_faults(Faults::default());
        self.check();
        // The look itself takes no part in counting the syncs.
        self.store.set_faults(faults);
    }

    fn work(&mut self, wal: &Wal) {
        let mut reader = wal.reader();
        let mut live = wal.ahead_reader();
        let (mut flying, mut passed) = (Vec::new(), BTreeSet::new());
        self.retry_refused(wal);
        for _ in 0..self.rng.random_range(0..80) {
            self.change_faults();
            if self.rng.random_bool(0.7) {
                let large = self.rng.random_bool(0.1);
                let bytes = if large { self.rng.random_range(500..1500) } else { self.rng.random_range(8..300) };
                self.batches.insert(self.next, batch(self.next, bytes));
                match wal.append(self.batches[&self.next].clone()) {
                    Ok(commit) => flying.push((self.next, commit)),
                    Err(_) => self.counts.refused += 1,
                }
                self.next += 1;
                if self.rng.random_bool(0.5) {
                    continue;
                }
            }
            self.land(&mut flying);
            self.end_full(wal);
            while self.rng.random_bool(0.8) {
                if live.is_none() && self.rng.random_bool(0.05) && wal.begin_ahead() {
                    live = wal.ahead_reader();
                }
                let ahead = live.as_mut().filter(|_| self.rng.random_bool(0.4));
                let is_ahead = ahead.is_some();
                let Some(record) = ahead.unwrap_or(&mut reader).next_record().unwrap() else { break };
                self.check_ack(record.sequence.0, number(&record.batch));
                if is_ahead {
                    wal.deliver_ahead(record.end)
                } else {
                    wal.deliver(record.end)
                }
                assert!(passed.insert(record.sequence.0), "{}: {} twice", self.name, record.sequence.0);
                self.delivered.insert(number(&record.batch));
                if let Some(mut joined) = live.take_if(|_| !wal.is_ahead()) {
                    joined.join();
                    reader = joined;
                    self.counts.passed_ahead += 1;
                }
            }
        }
        self.land(&mut flying);
        self.without_room.clear();
        drop((reader, live));
        let segments = wal.status().segments;
        self.counts.failed_logs += u64::from(wal.status().failed);
        let faults = self.store.faults();
        wal.close();
        self.counts.trimmed += segments.saturating_sub(wal.status().segments);
        if faults.is_none() && !wal.status().failed {
            // Everything was saved: not even a duplicate comes again.
            let again = self.open().unwrap();
            let mut reader = again.peek();
            while let Some(record) = reader.next_record().unwrap() {
                assert!(!passed.contains(&record.sequence.0), "{}: {} again", self.name, record.sequence.0);
            }
            drop(reader);
            again.close();
        }
    }

    /// Clients send again what they saw no ack for. The ack of a retry is worth as much as any other.
    fn retry_refused(&mut self, wal: &Wal) {
        if !self.faults_at_random {
            return;
        }
        let acked: BTreeSet<u64> = self.acked.values().copied().collect();
        let unacked = (1..self.next).filter(|number| !acked.contains(number) && !self.retried.contains(number));
        for number in unacked.collect::<Vec<_>>() {
            if let Ok(commit) = wal.append(self.batches[&number].clone())
                && tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(commit).is_ok()
            {
                self.counts.retried += 1;
                self.retried.insert(number);
            }
        }
    }

    /// Now and then something begins or ceases to fail. The power stays as it is.
    fn change_faults(&mut self) {
        if !self.faults_at_random || !self.rng.random_bool(0.05) {
            return;
        }
        let mut faults = self.store.faults();
        match self.rng.random_range(0..14) {
            10.. => {
                let no_room = [NoRoom::Write, NoRoom::Flush, NoRoom::Sync(self.rng.random())];
                let no_room = no_room[self.rng.random_range(0..3)];
                faults.no_room = faults.no_room.is_none().then_some(no_room);
                faults.no_room_once = self.rng.random();
            }
            0 => faults.prepare_fails ^= true,
            1..4 => faults.housekeeping_fails ^= true,
            4..7 => faults.put_fails ^= true,
            7 => faults.sync_fails ^= true,
            _ => faults.segments_max = faults.segments_max.is_none().then_some(4),
        }
        self.store.change_faults(faults);
    }

    /// Now and then room is made, and the log goes on by itself. What it has refused is new to it.
    fn end_full(&mut self, wal: &Wal) {
        let faults = self.store.faults();
        if !wal.status().full || wal.status().failed || self.store.is_off() || !self.rng.random_bool(0.1) {
            return;
        }
        self.store.change_faults(Faults::default());
        let is_over = || !wal.status().full || wal.status().failed || self.store.is_off();
        until("the log has room again", is_over);
        self.store.change_faults(Faults { no_room: None, segments_max: None, ..faults });
        for number in std::mem::take(&mut self.without_room) {
            let Ok(commit) = wal.append(self.batches[&number].clone()) else { continue };
            let mut flying = vec![(number, commit)];
            self.land(&mut flying);
            self.counts.after_full += u64::from(self.acked.values().any(|acked| *acked == number));
        }
    }

    fn land(&mut self, flying: &mut Vec<(u64, Commit)>) {
        for (number, commit) in flying.drain(..) {
            match wait(commit) {
                Ok(sequence) => {
                    self.counts.acked += 1;
                    let before = self.acked.insert(sequence, number);
                    assert_eq!(before, None, "{}: sequence {sequence} was acked twice", self.name);
                }
                Err(CommitError::Full) => {
                    self.counts.without_room += 1;
                    self.without_room.push(number);
                }
                Err(CommitError::Poisoned) => {}
            }
        }
    }

    fn check_ack(&self, sequence: u64, number: u64) {
        if let Some(acked) = self.acked.get(&sequence) {
            assert_eq!(*acked, number, "{}: sequence {sequence} holds another batch", self.name);
        }
    }

    /// Opens the log and looks for everything that was acked.
    fn check(&mut self) {
        let wal = self.open().unwrap();
        let (mut reader, mut live) = (wal.reader(), wal.ahead_reader());
        let (mut read, mut last) = (BTreeSet::new(), 0);
        let mut next = || match reader.next_record().unwrap() {
            None => live.as_mut().and_then(|live| live.next_record().unwrap()),
            record => record,
        };
        while let Some(record) = next() {
            let (sequence, number) = (record.sequence.0, number(&record.batch));
            self.check_ack(sequence, number);
            assert!(sequence > last, "{}: {sequence} after {last}", self.name);
            assert!(read.insert(number), "{}: {number} twice", self.name);
            last = sequence;
        }
        for number in self.acked.values().chain(&self.retried).filter(|number| !self.delivered.contains(number)) {
            assert!(read.contains(number), "{}: {number} was acked and is gone: {read:?}", self.name);
        }
        let losses = wal.losses();
        assert!(losses.is_empty(), "{}: a power cut is no damage: {losses:?}", self.name);
        assert_eq!(wal.status().quarantined_segments, 0, "{}: a power cut is no damage", self.name);
        for number in self.acked.values().chain(&self.retried) {
            let retried = stored(&wal, self.batches[number].clone());
            assert_eq!(retried, Stored::Before, "{}: a retry of {number} was stored again", self.name);
        }
        drop((reader, live));
        wal.close();
    }
}
