use std::sync::OnceLock;

use super::*;
use crate::batch::Client;
use crate::proto;
use crate::wal::Wal;
use proptest::prelude::*;
use prost::Message;

/// Most records of a test.
const RECORDS: usize = 20;

/// Places in the order of a log. Only a log can make them.
fn positions() -> &'static [Position] {
    static POSITIONS: OnceLock<Vec<Position>> = OnceLock::new();
    POSITIONS.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let config = crate::config::WalConfig {
            directory: directory.path().into(),
            segment_bytes: bytesize::ByteSize::mib(8),
            free_bytes_min: bytesize::ByteSize::b(0),
            ..Default::default()
        };
        let wal = Wal::open(&config, 1 << 20, crate::metrics::Metrics::new()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for _ in 0..RECORDS {
            runtime.block_on(wal.append(batch(&[])).unwrap()).unwrap();
        }
        let mut reader = wal.reader();
        std::iter::from_fn(|| reader.next_record().unwrap()).map(|record| record.end).collect()
    })
}

/// A batch received at 1000: one event for each payload size, its number for a type.
fn batch(sizes: &[usize]) -> Batch {
    let event = |(at, size): (usize, &usize)| proto::Event {
        r#type: at.to_string(),
        event_bytes: vec![at as u8; *size].into(),
    };
    let events = sizes.iter().enumerate().map(event).collect();
    let request = proto::SendEventRequest { events, ..Default::default() };
    Batch {
        received_at_ms: 1000,
        client: Client { group: "g".into(), id: "i".into() },
        request: Request::parse(request.encode_to_vec().into()).unwrap(),
    }
}

/// A record for each list of payload sizes, as the log's reader returns them.
pub(in crate::forward) fn records(sizes: &[Vec<usize>]) -> Vec<Record> {
    let record = |(at, sizes): (usize, &Vec<usize>)| Record {
        sequence: Sequence(at as u64 + 1),
        batch: batch(sizes),
        end: positions()[at],
    };
    sizes.iter().enumerate().map(record).collect()
}

/// Takes `record` in.
pub(in crate::forward) fn open_events(in_flight: &mut InFlight, record: &Record) -> Vec<EventRef> {
    let slot = in_flight.push(Side::Backlog, record);
    let count = record.batch.request.event_count() as usize;
    in_flight.set_lanes(slot, vec![None; count]);
    (0..count).map(|index| InFlight::event_ref(slot, index)).collect()
}

#[test]
fn the_watermark_waits_for_the_oldest() {
    let records = records(&[vec![1, 2], vec![3], vec![], vec![4]]);
    let mut in_flight = InFlight::default();
    let events: Vec<_> = records.iter().map(|record| open_events(&mut in_flight, record)).collect();
    assert_eq!(in_flight.events(), 4);
    in_flight.delivered(events[1][0], 1500);
    in_flight.delivered(events[0][1], 1500);
    assert_eq!(in_flight.advance(Side::Backlog, |_| unreachable!()).end, None);
    in_flight.parked(events[0][0], ParkReason::TooLarge, 1, 1700);
    let mut delays = Vec::new();
    let passed = in_flight.advance(Side::Backlog, |delay| delays.push(delay));
    assert_eq!(passed.end, Some(records[2].end));
    assert_eq!((passed.delivered_events, passed.delivered_bytes), (2, 5));
    assert_eq!(passed.parked[ParkReason::TooLarge as usize], 1);
    assert_eq!(delays, [700, 500]);
    assert_eq!((in_flight.events(), in_flight.records()), (1, 1));
    in_flight.clear();
    assert_eq!((in_flight.events(), in_flight.bytes(), in_flight.records()), (0, 0, 0));
}

#[test]
fn what_was_in_the_spill_is_counted_once_with_its_record_or_after_it() {
    let records = records(&[vec![1], vec![2, 3, 4, 5, 6]]);
    let mut in_flight = InFlight::default();
    let first = open_events(&mut in_flight, &records[0])[0];
    let (lane, dead) = (LaneId(0), LaneId(1));
    for (event, number) in open_events(&mut in_flight, &records[1]).into_iter().zip(10..) {
        in_flight.spilled(event, (lane, number), number - 8, 1500);
    }
    let mut passed = Passed::default();
    in_flight.worked_off((lane, 10), Fate::Delivered { payload_bytes: 2 }, &mut passed);
    in_flight.worked_off((lane, 11), Fate::Parked(ParkReason::TooLarge), &mut passed);
    in_flight.worked_off((lane, 12), Fate::Lost, &mut passed);
    in_flight.redirected((lane, 13), (dead, 20));
    in_flight.worked_off((lane, 13), Fate::Redirected, &mut passed);
    in_flight.worked_off((dead, 20), Fate::Delivered { payload_bytes: 5 }, &mut passed);
    let counts = |passed: &Passed| {
        (passed.delivered_events, passed.delivered_bytes, passed.parked[ParkReason::TooLarge as usize], passed.lost)
    };
    assert_eq!(counts(&passed), (0, 0, 0, 0), "the log shows them again if the producer breaks");
    assert_eq!(in_flight.spilled_events(), 1);
    in_flight.delivered(first, 1500);
    assert_eq!(counts(&in_flight.advance(Side::Backlog, |_| {})), (3, 8, 1, 1));
    assert_eq!(in_flight.spilled_events(), 0);
    in_flight.worked_off((lane, 14), Fate::Delivered { payload_bytes: 6 }, &mut passed);
    assert_eq!(counts(&passed), (1, 6, 0, 0), "it is in the spill alone");
}

#[test]
fn tags_survive_the_wrap_of_their_slot() {
    let mut in_flight = InFlight::default();
    in_flight.rows[0].front = FRONT + (1 << SLOT_BITS) - 2;
    let records = records(&[vec![1], vec![1, 1], vec![1], vec![1]]);
    let events: Vec<_> = records.iter().flat_map(|record| open_events(&mut in_flight, record)).collect();
    for event in events {
        assert_eq!(in_flight.by_tag(in_flight.tag(event)), event);
    }
}

#[test]
fn new_records_have_a_watermark_of_their_own_and_come_after_the_backlog() {
    let records = records(&vec![vec![1]; 12]);
    let mut in_flight = InFlight::default();
    let mut read = records.iter();
    let mut push = |in_flight: &mut InFlight, side| {
        let slot = in_flight.push(side, read.next().unwrap());
        in_flight.set_lanes(slot, vec![Some(LaneId(0))]);
        InFlight::event_ref(slot, 0)
    };
    let mut tags = std::collections::HashSet::new();
    for _ in 0..2 {
        let first = push(&mut in_flight, Side::Backlog);
        in_flight.begin_live();
        let live = [push(&mut in_flight, Side::Live), push(&mut in_flight, Side::Live)];
        // More of the backlog is read later, and comes before them all the same.
        let second = push(&mut in_flight, Side::Backlog);
        let in_order = [first, second, live[0], live[1]];
        assert!(in_order.is_sorted());
        let open: Vec<EventRef> = in_flight.open_events(|_| true).map(|(_, event)| event).collect();
        assert_eq!(open, in_order);
        for event in in_order {
            let tag = in_flight.tag(event);
            assert!(tags.insert(tag), "{event:?}");
            assert_eq!(in_flight.by_tag(tag), event);
        }
        assert_eq!((in_flight.events(), in_flight.backlog_events(), in_flight.records()), (4, 2, 4));
        assert!(
            in_flight.is_backlog_full(BACKLOG_PART * 2 * 257) && !in_flight.is_backlog_full(BACKLOG_PART * 3 * 257)
        );
        in_flight.delivered(live[0], 1500);
        let passed = in_flight.advance(Side::Live, |_| {});
        assert_eq!((passed.end.is_some(), passed.delivered_events), (true, 1));
        assert_eq!(in_flight.advance(Side::Backlog, |_| {}).end, None);
        in_flight.delivered(second, 1500);
        in_flight.delivered(first, 1500);
        assert_eq!(in_flight.advance(Side::Backlog, |_| {}).delivered_events, 2);
        in_flight.join();
        assert!(!in_flight.is_backlog_full(0), "nothing goes ahead");
        // What is left of the new records is what comes next in order.
        assert_eq!(in_flight.by_tag(in_flight.tag(live[1])), live[1]);
        in_flight.delivered(live[1], 1500);
        assert_eq!(in_flight.advance(Side::Backlog, |_| {}).delivered_events, 1);
        assert_eq!((in_flight.events(), in_flight.bytes(), in_flight.records()), (0, 0, 0));
    }
}

proptest! {
    /// Whatever the order of the reports, every record passes once, in order, and all is released.
    #[test]
    fn reports_in_any_order(
        sizes in proptest::collection::vec(proptest::collection::vec(0usize..40, 0..5), 1..RECORDS),
        shuffle in any::<u64>(),
    ) {
        let records = records(&sizes);
        let mut in_flight = InFlight::default();
        let mut open: Vec<_> = records.iter().flat_map(|record| open_events(&mut in_flight, record)).collect();
        let (total, mut passed_events, mut parked_events, mut bytes) = (open.len() as u64, 0, 0, 0);
        let mut end = None;
        let mut state = shuffle | 1;
        while !open.is_empty() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let event = open.swap_remove((state >> 33) as usize % open.len());
            let payload = Walk::new(&in_flight).find(event).1.payload;
            prop_assert_eq!(payload.len(), sizes[(event.slot - FRONT) as usize][event.index as usize]);
            if state >> 62 == 0 {
                let length = payload.len() as u64;
                in_flight.parked(event, ParkReason::TooLarge, length, 2000);
            } else {
                bytes += payload.len() as u64;
                in_flight.delivered(in_flight.by_tag(in_flight.tag(event)), 2000);
            }
            let passed = in_flight.advance(Side::Backlog, |_| {});
            passed_events += passed.delivered_events;
            parked_events += passed.parked.iter().sum::<u64>();
            bytes -= passed.delivered_bytes;
            end = passed.end.or(end);
            let oldest = open.iter().min().map_or(FRONT + records.len() as u64, |event| event.slot);
            let front = in_flight.rows[0].front;
            prop_assert!(front <= oldest && (open.is_empty() || front == oldest));
            prop_assert_eq!(in_flight.events(), open.len() as u64);
        }
        in_flight.advance(Side::Backlog, |_| {});
        prop_assert_eq!(passed_events + parked_events, total);
        prop_assert_eq!((in_flight.bytes(), in_flight.records(), bytes), (0, 0, 0));
        if total > 0 && !sizes.last().unwrap().is_empty() {
            prop_assert_eq!(end, records.last().map(|record| record.end));
        }
    }

    /// Found in order, in reverse, or twice: always the same event.
    #[test]
    fn a_walk_finds_each_event(picks in proptest::collection::vec(0usize..9, 1..40)) {
        let records = records(&[vec![1, 2, 3], vec![4, 5], vec![6, 7, 8, 9]]);
        let mut in_flight = InFlight::default();
        let events: Vec<_> = records.iter().flat_map(|record| open_events(&mut in_flight, record)).collect();
        let mut walk = Walk::new(&in_flight);
        for pick in picks {
            prop_assert_eq!(walk.find(events[pick]).1.payload.len(), pick + 1);
        }
    }
}
