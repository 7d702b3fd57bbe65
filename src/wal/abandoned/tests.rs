//! Commits that find no room, on the store in memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::oneshot;

use crate::config::WalConfig;
use crate::metrics::Metrics;
use crate::wal::appender::Waiting;
use crate::wal::memory::{Faults, MemoryStore, NoRoom, small_shape};
use crate::wal::store::Store;
use crate::wal::syncer::{self, Group};
use crate::wal::tests::{await_spares, batch, drain, number, open_memory, stored, until, wait};
use crate::wal::{AppendError, CommitError, Stored, Wal};

/// Of a refused group, everything is on disk, nothing, or some of it.
const NO_ROOM: [NoRoom; 6] = [
    NoRoom::Write,
    NoRoom::Flush,
    NoRoom::Sync(0),
    NoRoom::Sync(u32::MAX),
    NoRoom::Sync(0x5555_5555),
    NoRoom::Sync(0xaaaa_aaaa),
];

fn set_no_room(store: &MemoryStore, no_room: Option<NoRoom>) {
    store.set_faults(Faults { no_room, ..Faults::default() });
}

/// Five batches are acked, one after the other.
fn open_with_five(store: &MemoryStore) -> Wal {
    let wal = open_memory(store);
    for number in 1..=5 {
        assert_eq!(wait(wal.append(batch(number, 100)).unwrap()), Ok(number));
    }
    await_spares(&wal);
    wal
}

/// Six more find no room, in as many chunks: 6 to 11. One of them takes several slots.
fn refuse_six(wal: &Wal) {
    let commits: Vec<_> =
        (6..=11).map_while(|number| wal.append(batch(number, if number == 8 { 900 } else { 300 })).ok()).collect();
    assert!(!commits.is_empty());
    for commit in commits {
        assert_eq!(wait(commit), Err(CommitError::Full));
    }
    assert!(wal.status().full && !wal.status().failed);
    assert_eq!(wal.append(batch(12, 10)).unwrap_err(), AppendError::Full);
}

fn accept_again(wal: &Wal, store: &MemoryStore) {
    set_no_room(store, None);
    until("there is room again", || !wal.status().full);
}

fn assert_nothing_is_wrong(wal: &Wal) {
    assert!(wal.losses().is_empty(), "{:?}", wal.losses());
    assert_eq!(wal.status().quarantined_segments, 0);
    assert!(wal.shared.log().segments.values().all(|segment| !segment.damaged));
    assert_eq!(wal.shared.queue().bytes, 0, "refused batches still take room in the queue");
}

#[test]
fn a_commit_without_room_is_refused_and_the_log_goes_on_once_there_is_some() {
    for no_room in NO_ROOM {
        println!("{no_room:?}");
        let (store, metrics) = (MemoryStore::default(), Metrics::new());
        let (config, shape) = (WalConfig::default(), small_shape());
        let wal = Wal::open_in(&config, 1 << 20, shape, Arc::new(store.clone()), metrics.clone(), None).unwrap();
        for number in 1..=5 {
            assert_eq!(wait(wal.append(batch(number, 100)).unwrap()), Ok(number));
        }
        await_spares(&wal);
        // One reader is in the middle of the segment, one at its end, and one begins when it is full.
        let (mut middle, mut end) = (wal.reader(), wal.reader());
        assert_eq!(number(&middle.next_record().unwrap().unwrap().batch), 1);
        assert_eq!(drain(&mut end), [1, 2, 3, 4, 5]);
        set_no_room(&store, Some(no_room));
        refuse_six(&wal);
        assert_eq!(wal.status().next_sequence, 6);
        assert_eq!(drain(&mut wal.peek()), [1, 2, 3, 4, 5]);
        // It has the segment open without sled, and not yet cut.
        until("sled has let go", || !store.is_held(1));
        assert_eq!(number(&middle.next_record().unwrap().unwrap().batch), 2);
        accept_again(&wal, &store);
        // Refused batches, which the log does not know, and others, under the sequences that those could not get.
        let later = || (7..=10).chain(106..=116);
        for (sequence, number) in (6..).zip(later()) {
            assert_eq!(wait(wal.append(batch(number, 200)).unwrap()), Ok(sequence));
        }
        assert_eq!(drain(&mut middle), (3..=5).chain(later()).collect::<Vec<_>>());
        assert_eq!(drain(&mut end), later().collect::<Vec<_>>());
        let mut reader = wal.reader();
        for _ in 1..=3 {
            wal.deliver(reader.next_record().unwrap().unwrap().end);
        }
        assert_eq!((wal.status().pending_batches, wal.status().pending_events), (17, 17));
        assert_nothing_is_wrong(&wal);
        drop((middle, end, reader));
        wal.close();
        drop(wal);
        assert!(metrics.handle().render().contains("ringtail_wal_committed_events_total 20"));

        let wal = open_memory(&store);
        assert_eq!(drain(&mut wal.reader()), [4, 5].into_iter().chain(later()).collect::<Vec<_>>());
        for number in (1..=5).chain(later()) {
            assert_eq!(stored(&wal, batch(number, if number > 5 { 200 } else { 100 })), Stored::Before);
        }
        assert_eq!(wait(wal.append(batch(21, 10)).unwrap()), Ok(21));
        assert_nothing_is_wrong(&wal);
        wal.close();
    }
}

/// The process ends at once, or with the power, or later: what was refused may come back, once and in its place.
#[test]
fn a_process_that_ends_before_the_segment_is_cut_loses_nothing() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for no_room in NO_ROOM.repeat(8) {
        for is_cut in [false, true] {
            println!("{no_room:?}, power cut {is_cut}");
            let mut store = MemoryStore::default();
            let wal = open_with_five(&store);
            set_no_room(&store, Some(no_room));
            refuse_six(&wal);
            let after = store.after_power_cut(&mut rng);
            wal.close();
            drop(wal);
            set_no_room(&store, None);
            store = if is_cut { after } else { store };

            let wal = open_memory(&store);
            let read = drain(&mut wal.reader());
            let end = read.len() as u64 + 1;
            assert!(end >= 6 && read == (1..end).collect::<Vec<_>>(), "{read:?}");
            for number in 6..=20 {
                let bytes = if number == 8 { 900 } else { 300 };
                let expected = if number < end { Stored::Before } else { Stored::New(crate::batch::Sequence(number)) };
                assert_eq!(stored(&wal, batch(number, bytes)), expected, "{number}");
            }
            assert_eq!(drain(&mut wal.reader()), (1..=20).collect::<Vec<_>>());
            assert_nothing_is_wrong(&wal);
            wal.close();
        }
    }
}

/// There is room, and then again none: before anything was acked in the new segment, and after.
#[test]
fn segments_are_abandoned_again_and_again() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    let mut next = 6;
    for (round, no_room) in NO_ROOM.repeat(2).into_iter().enumerate() {
        await_spares(&wal);
        set_no_room(&store, Some(no_room));
        assert_eq!(wait(wal.append(batch(next, 100)).unwrap()), Err(CommitError::Full), "round {round}");
        accept_again(&wal, &store);
        if round % 3 > 0 {
            assert_eq!(wait(wal.append(batch(next, 100)).unwrap()), Ok(next));
            next += 1;
        }
    }
    let mut reader = wal.reader();
    while let Some(record) = reader.next_record().unwrap() {
        assert_eq!(record.sequence.0, number(&record.batch));
        wal.deliver(record.end);
    }
    assert_eq!((wal.status().next_sequence, wal.status().pending_events), (next, 0));
    assert_nothing_is_wrong(&wal);
    until("the abandoned segments are trimmed", || store.segments().unwrap().len() <= 4);
    drop(reader);
    wal.close();
}

/// The backlog is delivered while the disk is full: the cursor stays where refused records may come back.
#[test]
fn an_abandoned_segment_that_is_delivered_goes_once_it_is_cut() {
    for is_ended in [false, true] {
        let store = MemoryStore::default();
        let mut wal = open_with_five(&store);
        let mut reader = wal.reader();
        set_no_room(&store, Some(NoRoom::Sync(u32::MAX)));
        refuse_six(&wal);
        while let Some(record) = reader.next_record().unwrap() {
            wal.deliver(record.end);
        }
        assert_eq!(wal.status().pending_events, 0);
        drop(reader);
        let mut next = 6;
        if is_ended {
            wal.close();
            drop(wal);
            set_no_room(&store, None);
            wal = open_memory(&store);
            next = wal.status().next_sequence;
            assert!(next > 6, "nothing has come back");
            assert_eq!(drain(&mut wal.reader()), (6..next).collect::<Vec<_>>());
        } else {
            accept_again(&wal, &store);
            until("the abandoned segment is gone", || !store.segments().unwrap().contains(&1));
        }
        assert_eq!(wait(wal.append(batch(next, 100)).unwrap()), Ok(next));
        assert_nothing_is_wrong(&wal);
        wal.close();
    }
}

/// From then on what is new is to be delivered ahead of the backlog: what comes back is new.
#[test]
fn what_comes_back_is_delivered_ahead_if_that_began_meanwhile() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    set_no_room(&store, Some(NoRoom::Sync(u32::MAX)));
    refuse_six(&wal);
    until("sled has let go", || !store.is_held(1));
    assert!(wal.begin_ahead());
    wal.close();
    drop(wal);
    set_no_room(&store, None);
    let wal = open_memory(&store);
    let next = wal.status().next_sequence;
    assert!(next > 6, "nothing has come back");
    assert_eq!(drain(&mut wal.ahead_reader().unwrap()), (6..next).collect::<Vec<_>>());
    assert_eq!(drain(&mut wal.reader()), [1, 2, 3, 4, 5]);
    assert_nothing_is_wrong(&wal);
    wal.close();
}

/// The commit thread waits for another segment when this one turns out to have no room.
#[test]
fn a_segment_is_abandoned_when_it_is_about_to_be_left() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    let gate = store.sync_gate();
    let held = gate.lock().unwrap();
    let first = wal.append(batch(6, 100)).unwrap();
    until("its sync has begun", || wal.shared.sync_began.load(Ordering::Relaxed) > 0);
    store.set_faults(Faults { no_room: Some(NoRoom::Sync(0)), no_room_once: true, ..Faults::default() });
    let small = wal.append(batch(7, 100)).unwrap();
    // It does not fit into the segment any more, so that another thread syncs.
    let large = wal.append(batch(8, 2800)).unwrap();
    drop(held);
    assert_eq!(wait(first), Ok(6));
    assert_eq!((wait(small), wait(large)), (Err(CommitError::Full), Err(CommitError::Full)));
    until("there is room again", || !wal.status().full);
    assert_eq!(wait(wal.append(batch(8, 2800)).unwrap()), Ok(7));
    assert_eq!(drain(&mut wal.reader()), [1, 2, 3, 4, 5, 6, 8]);
    assert_nothing_is_wrong(&wal);
    wal.close();
}

/// A sync after one that failed may succeed without having written what that one could not.
#[test]
fn what_is_written_behind_a_sync_without_room_is_not_synced_again() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    let tail = wal.shared.log().tail;
    let (batch_behind, (done, commit)) = (batch(7, 100), oneshot::channel());
    let group = Group {
        before: tail,
        tail: tail.after(&batch_behind),
        chunks: vec![vec![Waiting { bytes: 100, batch: batch_behind, fingerprint: None, done }]],
        segment: 1,
        slots_used: 7,
        file: store.prepare(99).unwrap(),
        began: Instant::now(),
    };
    wal.shared.pipeline.set_no_room();
    syncer::commit(&wal.shared, [group].into());
    assert_eq!(commit.blocking_recv().unwrap(), Err(CommitError::Full));
    assert_eq!(wal.status().next_sequence, 6);
    until("the segment is abandoned", || !wal.shared.pipeline.found_no_room());
    wal.close();
}

/// The disk spoils the last acked chunk as well: what was refused behind it does not take its place.
#[test]
fn damage_before_the_end_does_not_show_what_is_behind_it() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    set_no_room(&store, Some(NoRoom::Flush));
    refuse_six(&wal);
    store.damage(1, 4, |value| value[60] ^= 1);
    assert_eq!(drain(&mut wal.reader()), [1, 2, 3, 4]);
    let losses: Vec<_> = wal.losses().iter().map(|loss| (loss.first_sequence, loss.end_sequence)).collect();
    assert_eq!(losses, [(5, 6)]);
    wal.close();
}

#[test]
fn a_cut_that_fails_for_another_reason_ends_the_log() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    set_no_room(&store, Some(NoRoom::Flush));
    refuse_six(&wal);
    store.set_faults(Faults { sync_fails: true, ..Faults::default() });
    until("the log has failed", || wal.status().failed);
    wal.close();
}

/// What the cut wrote over is gone from the page cache alone when its own sync finds no room.
#[test]
fn a_cut_whose_own_sync_finds_no_room_is_not_taken_for_done() {
    let seed = rand::random();
    println!("seed {seed}");
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    set_no_room(&store, Some(NoRoom::Sync(u32::MAX)));
    refuse_six(&wal);
    until("a cut has failed", || store.failed_cuts() > 0);
    accept_again(&wal, &store);
    for (sequence, number) in (6..).zip(106..=112) {
        assert_eq!(wait(wal.append(batch(number, 200)).unwrap()), Ok(sequence));
    }
    let after = store.after_power_cut(&mut StdRng::seed_from_u64(seed));
    wal.close();
    drop(wal);
    let wal = open_memory(&after);
    assert_eq!(drain(&mut wal.reader()), (1..=5).chain(106..=112).collect::<Vec<_>>());
    assert_nothing_is_wrong(&wal);
    wal.close();
}

/// The last acked record is lost: the cursor waits for the cut all the same, or what comes back would be behind it and stay there.
#[test]
fn a_cursor_does_not_leave_an_abandoned_segment_by_a_loss() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    let mut reader = wal.reader();
    for _ in 1..=4 {
        wal.deliver(reader.next_record().unwrap().unwrap().end);
    }
    drop(reader);
    store.set_faults(Faults { no_room: Some(NoRoom::Sync(u32::MAX)), housekeeping_fails: true, ..Faults::default() });
    refuse_six(&wal);
    store.damage(1, 4, |value| value[60] ^= 1);
    until("sled has let go", || !store.is_held(1));
    assert_eq!(drain(&mut wal.reader()), Vec::<u64>::new());
    wal.close();
    drop(wal);
    store.set_faults(Faults::default());
    let wal = open_memory(&store);
    let read = drain(&mut wal.reader());
    let retry = stored(&wal, batch(6, 300));
    assert_eq!(retry == Stored::Before, read.contains(&6), "{read:?}");
    let losses: Vec<_> = wal.losses().iter().map(|loss| (loss.first_sequence, loss.end_sequence)).collect();
    assert_eq!(losses, [(5, 6)]);
    wal.close();
}

/// The disk seems to have room, and a commit never finds any: the log does not make one segment after the other for that.
#[test]
fn segments_without_an_ack_in_between_come_ever_more_slowly() {
    let store = MemoryStore::default();
    let wal = open_with_five(&store);
    let mut pauses = Vec::new();
    for _ in 0..4 {
        store.set_faults(Faults { no_room: Some(NoRoom::Write), no_room_once: true, ..Faults::default() });
        assert_eq!(wait(wal.append(batch(6, 100)).unwrap()), Err(CommitError::Full));
        until("the segment is abandoned", || !wal.shared.pipeline.found_no_room());
        pauses.push(wal.shared.log().next_segment_at.map(|at| at.saturating_duration_since(Instant::now())));
        wal.shared.log().next_segment_at = None;
        until("there is room again", || !wal.status().full);
    }
    assert!(pauses[0].is_none() && pauses.is_sorted() && pauses[1] < pauses[3], "{pauses:?}");
    assert_eq!(wait(wal.append(batch(6, 100)).unwrap()), Ok(6));
    store.set_faults(Faults { no_room: Some(NoRoom::Write), no_room_once: true, ..Faults::default() });
    assert_eq!(wait(wal.append(batch(7, 100)).unwrap()), Err(CommitError::Full));
    until("the segment is abandoned", || !wal.shared.pipeline.found_no_room());
    assert_eq!(wal.shared.log().next_segment_at, None);
    wal.close();
}
