use std::sync::Arc;

use super::super::memory::{MemoryStore, for_each_flip, small_shape};
use super::super::store::Store;
use super::super::tests::{append_all, batch, drain, number, open_memory, until};
use super::super::{Reader, Wal};
use super::*;
use crate::config::WalConfig;
use crate::metrics::Metrics;

const DAMAGED: &str = "ringtail_forward_dropped_events_total{reason=\"damaged\"}";

fn append(wal: &Wal, numbers: std::ops::RangeInclusive<u64>) {
    append_all(wal, numbers, 300);
}

/// Reads and delivers so many, as `deliver` says. The numbers.
fn pass(reader: &mut Reader, count: usize, deliver: impl Fn(super::super::Position)) -> Vec<u64> {
    let mut numbers = Vec::new();
    while numbers.len() < count
        && let Some(record) = reader.next_record().unwrap()
    {
        deliver(record.end);
        numbers.push(number(&record.batch));
    }
    numbers
}

fn ahead(wal: &Wal) -> Option<(u64, u64, u64)> {
    wal.status().delivered_ahead.map(|ahead| (ahead.first_sequence, ahead.end_sequence, ahead.events))
}

/// What is pending: events, and the number of the oldest batch, which is when it was received.
fn pending(wal: &Wal) -> (u64, Option<u64>) {
    let status = wal.status();
    assert_eq!(status.pending_events, status.pending_batches);
    assert_eq!(status.pending_bytes, status.pending_batches * batch(100, 300).request.as_bytes().len() as u64);
    (status.pending_events, status.oldest_pending_received_at_ms)
}

#[test]
fn the_cursor_passes_what_was_delivered_ahead_also_after_a_restart() {
    let store = MemoryStore::default();
    let mut wal = open_memory(&store);
    assert!(!wal.begin_ahead(), "nothing is pending");
    append(&wal, 100..=149);
    let mut backlog = wal.reader();
    assert_eq!(pass(&mut backlog, 10, |end| wal.deliver(end)), (100..=109).collect::<Vec<_>>());
    assert!(wal.begin_ahead());
    assert!(!wal.begin_ahead(), "there is one already");
    append(&wal, 150..=199);
    let mut live = wal.ahead_reader().unwrap();
    assert_eq!(pass(&mut live, 30, |end| wal.deliver_ahead(end)), (150..=179).collect::<Vec<_>>());
    assert_eq!(ahead(&wal), Some((51, 81, 30)));
    assert_eq!(pending(&wal).0, 60);
    assert_eq!(pass(&mut backlog, 20, |end| wal.deliver(end)), (110..=129).collect::<Vec<_>>());
    assert_eq!(drain(&mut backlog), (130..=149).collect::<Vec<_>>(), "it stops where the other one began");
    let expected: Vec<u64> = (130..=149).chain(180..=199).collect();
    assert_eq!(drain(&mut wal.peek()), expected);
    let undelivered = wal.undelivered();
    assert!(undelivered.contains(Sequence(31)) && !undelivered.contains(Sequence(51)));
    assert!(!undelivered.contains(Sequence(80)) && undelivered.contains(Sequence(81)));
    drop((backlog, live));
    for _ in 0..2 {
        wal.close();
        wal = open_memory(&store);
        assert_eq!(ahead(&wal), Some((51, 81, 30)));
        assert_eq!(pending(&wal), (40, Some(130)));
        assert_eq!(drain(&mut wal.reader()), (130..=149).collect::<Vec<_>>());
        assert_eq!(drain(&mut wal.ahead_reader().unwrap()), (180..=199).collect::<Vec<_>>());
        assert_eq!(drain(&mut wal.peek()), expected);
    }
    let (mut backlog, mut live) = (wal.reader(), wal.ahead_reader().unwrap());
    assert_eq!(pass(&mut live, 5, |end| wal.deliver_ahead(end)), (180..=184).collect::<Vec<_>>());
    pass(&mut backlog, 20, |end| wal.deliver(end));
    assert_eq!((ahead(&wal), wal.is_ahead()), (None, false));
    assert_eq!(wal.status().cursor_sequence, 86);
    assert_eq!(pending(&wal), (15, Some(185)));
    live.join();
    assert_eq!(pass(&mut live, 5, |end| wal.deliver(end)), (185..=189).collect::<Vec<_>>());
    live.rewind();
    // What was read ahead and is delivered when the cursor has come to it counts all the same.
    assert_eq!(pass(&mut live, 10, |end| wal.deliver_ahead(end)), (190..=199).collect::<Vec<_>>());
    assert_eq!(pending(&wal), (0, None));
    wal.close();
}

#[test]
fn a_stretch_ends_on_disk_before_the_next_one_begins() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    append(&wal, 100..=109);
    assert!(wal.begin_ahead());
    append(&wal, 110..=119);
    pass(&mut wal.ahead_reader().unwrap(), 10, |end| wal.deliver_ahead(end));
    until("the stretch is saved", || wal.shared.log().saved_ahead.is_some_and(|saved| saved.to.totals.sequence == 21));
    // The keeper cannot save the cursor's leap.
    store.set_faults(super::super::memory::Faults { put_fails: true, ..Default::default() });
    pass(&mut wal.reader(), 10, |end| wal.deliver(end));
    assert_eq!(wal.status().cursor_sequence, 21);
    append(&wal, 120..=129);
    assert!(!wal.begin_ahead(), "a crash would deliver the last one again");
    store.set_faults(super::super::memory::Faults::default());
    until("the next one begins", || wal.begin_ahead());
    wal.close();
}

#[test]
fn segments_that_were_delivered_ahead_go_before_the_backlog_does() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    append(&wal, 100..=119);
    assert!(wal.begin_ahead());
    append(&wal, 120..=199);
    let segments = store.segments().unwrap();
    pass(&mut wal.ahead_reader().unwrap(), 75, |end| wal.deliver_ahead(end));
    let Stretch { from, to } = wal.shared.log().ahead.as_ref().unwrap().stretch;
    assert!(to.segment > from.segment + 2, "{from:?} {to:?}");
    let is_inside = |id: &u64| *id > from.segment && *id < to.segment;
    until("they are gone", || !store.segments().unwrap().iter().any(is_inside));
    let left = store.segments().unwrap();
    assert!(segments.iter().filter(|id| **id <= from.segment).all(|id| left.contains(id)), "{left:?}");
    wal.close();
    let wal = open_memory(&store);
    assert_eq!(pending(&wal), (25, Some(100)));
    assert_eq!(drain(&mut wal.peek()), (100..=119).chain(195..=199).collect::<Vec<_>>());
    assert_eq!(pass(&mut wal.reader(), 20, |end| wal.deliver(end)), (100..=119).collect::<Vec<_>>());
    assert_eq!(drain(&mut wal.reader()), (195..=199).collect::<Vec<_>>());
    assert!(wal.losses().is_empty());
    wal.close();
    assert!(store.quarantined().unwrap().is_empty());
}

/// The segment and slot of each record.
fn places(wal: &Wal) -> Vec<(u64, u32)> {
    let mut reader = wal.peek();
    let mut places = Vec::new();
    let mut before = None;
    while let Some(record) = reader.next_record().unwrap() {
        let (segment, slot) = (record.end.segment, record.end.slot - 1);
        assert_ne!(before.replace((segment, slot)), Some((segment, slot)));
        places.push((segment, slot));
    }
    places
}

#[test]
fn damage_on_both_sides_is_counted_once() {
    for lost in [
        vec![105..108, 108..110],
        vec![118..120, 120..123],
        vec![125..126, 126..127],
        vec![107..108, 119..121, 128..130],
    ] {
        let store = MemoryStore::default();
        let wal = open_memory(&store);
        append(&wal, 100..=119);
        assert!(wal.begin_ahead());
        append(&wal, 120..=129);
        let mut places = places(&wal);
        wal.close();
        places.reverse();
        for number in lost.iter().cloned().flatten() {
            let (segment, slot) = places[29 - (number as usize - 100)];
            store.damage(segment, slot, |value| value[60] ^= 1);
        }
        let metrics = Metrics::new();
        let (config, shape) = (WalConfig::default(), small_shape());
        let wal = Wal::open_in(&config, 1 << 20, shape, Arc::new(store.clone()), metrics.clone(), None).unwrap();
        let (mut backlog, mut live) = (wal.reader(), wal.ahead_reader().unwrap());
        let is_there = |number: &u64| !lost.iter().any(|lost| lost.contains(number));
        assert_eq!(drain(&mut live), (120..=129).filter(is_there).collect::<Vec<_>>(), "{lost:?}");
        assert_eq!(drain(&mut backlog), (100..=119).filter(is_there).collect::<Vec<_>>(), "{lost:?}");
        live.rewind();
        backlog.rewind();
        pass(&mut live, 20, |end| wal.deliver_ahead(end));
        assert_eq!(wal.status().pending_events, 20, "{lost:?}");
        pass(&mut backlog, 20, |end| wal.deliver(end));
        // At the end of the log, and of the backlog, nothing follows a loss that would tell of it.
        while wal.is_ahead() {
            assert!(backlog.next_record().unwrap().is_none(), "{lost:?}");
        }
        live.join();
        assert!(drain(&mut live).is_empty());
        assert_eq!(wal.status().pending_events, 0, "{lost:?}");
        let count: u64 = lost.iter().map(|lost| lost.end - lost.start).sum();
        let text = metrics.handle().render();
        assert!(text.contains(&format!("{DAMAGED} {count}\n")), "{lost:?}: {text}");
        assert_eq!(wal.losses().iter().map(|loss| loss.events).sum::<u64>(), count, "{lost:?}");
        wal.close();
    }
}

#[test]
fn a_damaged_stretch_is_not_believed() {
    let meta = MemoryStore::default().state("meta").unwrap();
    let meta = &*meta;
    let position = |number| Position {
        segment: number,
        slot: number as u32,
        totals: Totals { sequence: number, events: number + 1, bytes: number + 2 },
    };
    let stretch = Stretch { from: position(3), to: position(9) };
    assert_eq!(load(meta).unwrap(), None);
    put(meta, stretch).unwrap();
    assert_eq!(load(meta).unwrap(), Some(stretch));
    for_each_flip(meta, KEY, |at| assert_eq!(load(meta).unwrap(), None, "byte {at}"));
}

#[test]
fn no_segment_is_made_anew_where_one_was_delivered_ahead() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    append(&wal, 100..=119);
    assert!(wal.begin_ahead());
    append(&wal, 120..=199);
    pass(&mut wal.ahead_reader().unwrap(), 80, |end| wal.deliver_ahead(end));
    let Stretch { from, to } = wal.shared.log().ahead.as_ref().unwrap().stretch;
    assert!(to.segment > from.segment + 2, "{from:?} {to:?}");
    wal.close();
    drop(wal);
    // What nobody needs is gone, and the newest segment is lost.
    for id in store.segments().unwrap().into_iter().filter(|id| *id > from.segment) {
        store.remove(id).unwrap();
    }
    let wal = open_memory(&store);
    append(&wal, 200..=259);
    wal.close();
    drop(wal);
    let wal = open_memory(&store);
    assert_eq!(drain(&mut wal.ahead_reader().unwrap()), (200..=259).collect::<Vec<_>>());
    wal.close();
}
