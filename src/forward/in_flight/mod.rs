//! The records between the log and Kafka, in the order of the log.
//!
//! Delivery reports come back in any order. A record is done once each of its events is delivered, parked or spilled; the
//! contiguous done records at the front move the *watermark*, and only the watermark moves the log's cursor.
//!
//! While new records go ahead of a backlog, there are two rows of records, each with a watermark of its own ([`Side`]). The
//! slots of new records have higher numbers than those of the backlog, however many of these are still to come.
//!
//! - A record is counted (delivered, parked, delay) when the watermark passes it, hence exactly once, however often its
//!   events were sent. What becomes of its events in the spill before that is counted with it; later, by itself.
//! - A record is copied out of what the log's reader returned, so that one slow record pins its own bytes and no more.
//! - Bytes are charged from [`InFlight::push`] until the record is done: its request, and [`EVENT_OVERHEAD_BYTES`] an
//!   event for what the Kafka client keeps. That client's copy of the payloads comes on top, so memory is about twice
//!   the charge.
//! - A done record behind the watermark keeps only a slot of about 160 bytes, and 60 for each of its events in the spill;
//!   there are at most [`RECORDS_MAX`] slots, and [`SPILLED_MAX`] such events besides those that were in flight when there
//!   were as many.

#[cfg(test)]
pub(super) mod tests;

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

use super::ParkReason;
use super::discard::Dropped;
use super::lanes::{Fate, LaneId};
use crate::batch::{Batch, Event, Events, Request, Sequence, now_ms};
use crate::wal::{Position, Record};

/// What one event in flight is charged besides its bytes.
pub(super) const EVENT_OVERHEAD_BYTES: u64 = 256;

/// Most records between the watermark and the reader.
pub(super) const RECORDS_MAX: usize = 1 << 18;

/// No record is read while there are so many events in the spill of which the watermark has not passed the record.
pub(super) const SPILLED_MAX: u64 = 1 << 16;

/// The first slot. What is below is the number of an event in the spill.
const FRONT: u64 = 1 << 62;

// A tag is, for an event of the log, its row, the low bits of its slot and its index; for one of the spill, SPILLED, its lane,
// and the low bits of its number.
const _: () = assert!(usize::BITS >= 64, "tags need 64 bits");
/// A request of 16 MiB has no more events: each takes two bytes.
const INDEX_BITS: u32 = 23;
const SLOT_BITS: u32 = 39;
const ROW: u64 = 1 << (INDEX_BITS + SLOT_BITS);
const NUMBER_BITS: u32 = 40;
const SPILLED: u64 = 1 << 63;

/// So far from the backlog's slots are those of new records, so that neither they nor their low bits meet. New records would
/// have to begin to go ahead twelve million times for the numbers to run out.
const SIDE_DISTANCE: u64 = (1 << 40) + (1 << 32);

/// Of what may be in flight, a backlog may take one such part while new records go ahead of it. Less than a lane may have, so
/// that they find room even in a topic's lane.
const BACKLOG_PART: u64 = 8;

/// Where a record in flight was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// At the log's cursor.
    Backlog,
    /// Ahead of it.
    Live,
}

/// One event: of a record in flight, or of the spill. Sorts in the order of its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct EventRef {
    slot: u64,
    index: u32,
}

impl EventRef {
    /// The event of the spill with that number in its lane.
    pub(super) fn spilled(number: u64) -> EventRef {
        EventRef { slot: number, index: 0 }
    }

    /// Whether it is one of the spill.
    pub(super) fn is_spilled(self) -> bool {
        self.slot < FRONT
    }

    /// Its number in the spill.
    pub(super) fn number(self) -> u64 {
        self.slot
    }

    /// As [`EventRef::tag`], for an event of the spill.
    pub(super) fn spilled_tag(self, lane: LaneId) -> usize {
        (SPILLED | (u64::from(lane.0) << NUMBER_BITS) | (self.number() & ((1 << NUMBER_BITS) - 1))) as usize
    }

    /// The lane and the low bits of the number that a tag was made from; none if it was made from an event of the log.
    pub(super) fn split_spilled_tag(tag: usize) -> Option<(LaneId, u64)> {
        let tag = tag as u64;
        let lane = LaneId(((tag & !SPILLED) >> NUMBER_BITS) as u32);
        (tag & SPILLED != 0).then_some((lane, tag & ((1 << NUMBER_BITS) - 1)))
    }

    /// The first event of the spill from `number` on whose number has those low bits.
    pub(super) fn spilled_near(number: u64, low: u64) -> EventRef {
        EventRef::spilled(number + (low.wrapping_sub(number) & ((1 << NUMBER_BITS) - 1)))
    }

    #[cfg(test)]
    pub(super) fn slot(self) -> u64 {
        self.slot
    }

    #[cfg(test)]
    pub(super) fn new(slot: u64, index: u32) -> EventRef {
        EventRef { slot: FRONT + slot, index }
    }
}

/// The records in flight.
pub(super) struct InFlight {
    rows: [Row; 2],
    /// Which row is the backlog's.
    backlog: usize,
    /// The other one is in use.
    is_live: bool,
    /// Charges of all records that the watermark has not passed, done or not.
    span_bytes: u64,
    /// The slots of events in the spill of which the watermark has not passed the record.
    spilled: HashMap<Spilled, u64>,
}

/// An event in the spill: its lane, and its number there.
pub(super) type Spilled = (LaneId, u64);

/// The records of one side.
struct Row {
    slots: VecDeque<Slot>,
    /// Number of the front slot; numbers count up and are never reused.
    front: u64,
    bytes: u64,
    events: u64,
}

struct Slot {
    end: Position,
    /// Events neither delivered nor parked.
    remaining: u32,
    events: u32,
    /// Of the events that were not parked.
    payload_bytes: u64,
    charge: u64,
    delay_ms: u64,
    parked: Option<Box<ParkedCounts>>,
    /// Events that went to the spill.
    spilled: Vec<Spilled>,
    /// What became of them there.
    worked_off: Option<Box<Passed>>,
    /// The record was given up.
    dropped: Option<Box<Dropped>>,
    /// What it takes to send or park its events; dropped once there is none left.
    live: Option<Box<Live>>,
}

/// Events by the reason they were parked for, in the order of [`ParkReason::ALL`].
pub(super) type ParkedCounts = [u64; ParkReason::ALL.len()];

/// A record that still has events to deliver.
pub(super) struct Live {
    /// Its place in the log.
    pub(super) sequence: Sequence,
    /// Its own copy of the batch.
    pub(super) batch: Batch,
    /// The lane of each open event; none where the topic's name is invalid.
    lanes: Vec<Option<LaneId>>,
}

/// What the watermark passed, or what is done for in the spill.
#[derive(Debug, Default)]
pub(super) struct Passed {
    /// Where the watermark is now, if it moved.
    pub(super) end: Option<Position>,
    /// Events delivered.
    pub(super) delivered_events: u64,
    /// Their payload bytes.
    pub(super) delivered_bytes: u64,
    /// Events parked.
    pub(super) parked: ParkedCounts,
    /// Events given up.
    pub(super) dropped: Vec<Dropped>,
    /// Events lost to damage.
    pub(super) lost: u64,
}

impl Passed {
    /// Adds what became of one event.
    fn add(&mut self, fate: Fate) {
        match fate {
            Fate::Delivered { payload_bytes } => {
                self.delivered_events += 1;
                self.delivered_bytes += payload_bytes;
            }
            Fate::Parked(reason) => self.parked[reason as usize] += 1,
            Fate::Dropped(dropped) => self.dropped.push(dropped),
            Fate::Lost => self.lost += 1,
            Fate::Redirected => {}
        }
    }

    /// Adds all of `more`, which moved no watermark.
    fn extend(&mut self, more: Passed) {
        self.delivered_events += more.delivered_events;
        self.delivered_bytes += more.delivered_bytes;
        self.parked.iter_mut().zip(more.parked).for_each(|(total, count)| *total += count);
        self.dropped.extend(more.dropped);
        self.lost += more.lost;
    }
}

impl Default for InFlight {
    fn default() -> InFlight {
        let row = || Row { slots: VecDeque::new(), front: FRONT, bytes: 0, events: 0 };
        InFlight { rows: [row(), row()], backlog: 0, is_live: false, span_bytes: 0, spilled: HashMap::new() }
    }
}

impl InFlight {
    /// Takes in a record, with all its events open. [`InFlight::set_lanes`] must follow before the next call.
    pub(super) fn push(&mut self, side: Side, record: &Record) -> u64 {
        let row = self.row_mut(side);
        let slot = row.front + row.slots.len() as u64;
        let request = &record.batch.request;
        let events = request.event_count();
        let charge = request.as_bytes().len() as u64 + EVENT_OVERHEAD_BYTES * u64::from(events);
        let live = Live { sequence: record.sequence, batch: copy(&record.batch), lanes: Vec::new() };
        row.bytes += charge;
        row.events += u64::from(events);
        row.slots.push_back(Slot {
            end: record.end,
            remaining: events,
            events,
            payload_bytes: request.events().map(|event| event.payload.len() as u64).sum(),
            charge,
            delay_ms: 0,
            parked: None,
            spilled: Vec::new(),
            worked_off: None,
            dropped: None,
            live: Some(Box::new(live)),
        });
        self.span_bytes += charge;
        self.finish_if_done(slot, 0);
        slot
    }

    /// Takes in a record of the backlog of which everything was delivered by an earlier process.
    pub(super) fn push_delivered(&mut self, record: &Record) {
        let request = &record.batch.request;
        self.row_mut(Side::Backlog).slots.push_back(Slot {
            end: record.end,
            remaining: 0,
            events: request.event_count(),
            payload_bytes: request.events().map(|event| event.payload.len() as u64).sum(),
            charge: 0,
            delay_ms: now_ms().saturating_sub(record.batch.received_at_ms),
            parked: None,
            spilled: Vec::new(),
            worked_off: None,
            dropped: None,
            live: None,
        });
    }

    /// Where the newest record of the backlog ends.
    pub(super) fn end(&self) -> Option<Position> {
        self.rows[self.backlog].slots.back().map(|slot| slot.end)
    }

    /// Takes in a record that is given up: nothing of it is open.
    pub(super) fn push_dropped(&mut self, side: Side, end: Position, dropped: Dropped) {
        self.row_mut(side).slots.push_back(Slot {
            end,
            remaining: 0,
            events: 0,
            payload_bytes: 0,
            charge: 0,
            delay_ms: 0,
            parked: None,
            spilled: Vec::new(),
            worked_off: None,
            dropped: Some(Box::new(dropped)),
            live: None,
        });
    }

    /// The end of the oldest record with an open event that has a topic, and when it was received. Those without one are
    /// being parked.
    pub(super) fn oldest(&self) -> Option<(Position, u64)> {
        let slot = self.in_order().find_map(|row| row.slots.front())?;
        let live = slot.live.as_ref()?;
        live.lanes.iter().any(Option::is_some).then_some((slot.end, live.batch.received_at_ms))
    }

    /// Says which lane each event of `slot` went to.
    pub(super) fn set_lanes(&mut self, slot: u64, lanes: Vec<Option<LaneId>>) {
        if let Some(live) = &mut self.slot_mut(slot).live {
            live.lanes = lanes;
        }
    }

    /// Event number `index` of `slot`.
    pub(super) fn event_ref(slot: u64, index: usize) -> EventRef {
        EventRef { slot, index: u32::try_from(index).expect("a request counts its events in 32 bits") }
    }

    /// What goes through the Kafka client and comes back with the delivery report, for an event of the log.
    pub(super) fn tag(&self, event: EventRef) -> usize {
        debug_assert!(!event.is_spilled());
        let row = ROW * self.row_of(event.slot) as u64;
        (row | ((event.slot & ((1 << SLOT_BITS) - 1)) << INDEX_BITS) | u64::from(event.index)) as usize
    }

    /// The event that [`InFlight::tag`] was made from. It must still be open.
    pub(super) fn by_tag(&self, tag: usize) -> EventRef {
        let front = self.rows[usize::from(tag as u64 & ROW != 0)].front;
        let distance = (tag as u64 >> INDEX_BITS).wrapping_sub(front) & ((1 << SLOT_BITS) - 1);
        EventRef { slot: front + distance, index: (tag & ((1 << INDEX_BITS) - 1)) as u32 }
    }

    /// From now on new records are taken in ahead of those that are there, and of those still to come before them.
    pub(super) fn begin_live(&mut self) {
        let backlog = &self.rows[self.backlog];
        let front = backlog.front + SIDE_DISTANCE;
        let live = &mut self.rows[1 - self.backlog];
        debug_assert!(live.slots.is_empty() && !self.is_live);
        live.front = front;
        self.is_live = true;
    }

    /// The backlog is done: what was ahead of it is the backlog now.
    pub(super) fn join(&mut self) {
        debug_assert!(self.rows[self.backlog].slots.is_empty());
        if std::mem::take(&mut self.is_live) {
            self.backlog = 1 - self.backlog;
        }
    }

    /// The lane of an open event.
    pub(super) fn lane(&self, event: EventRef) -> Option<LaneId> {
        self.live(event.slot).lanes[event.index as usize]
    }

    /// Kafka acked an open event.
    pub(super) fn delivered(&mut self, event: EventRef, now_ms: u64) {
        self.close_one(event, now_ms);
    }

    /// An open event is durably parked.
    pub(super) fn parked(&mut self, event: EventRef, reason: ParkReason, payload_bytes: u64, now_ms: u64) {
        let slot = self.slot_mut(event.slot);
        slot.parked.get_or_insert_default()[reason as usize] += 1;
        slot.payload_bytes -= payload_bytes;
        self.close_one(event, now_ms);
    }

    /// An open event is durably in the spill, at `place`.
    pub(super) fn spilled(&mut self, event: EventRef, place: Spilled, payload_bytes: u64, now_ms: u64) {
        let slot = self.slot_mut(event.slot);
        slot.spilled.push(place);
        slot.payload_bytes -= payload_bytes;
        self.spilled.insert(place, event.slot);
        self.close_one(event, now_ms);
    }

    /// An event of the spill has another place in it now.
    pub(super) fn redirected(&mut self, from: Spilled, to: Spilled) {
        if let Some(slot) = self.spilled.remove(&from) {
            self.spilled.insert(to, slot);
            self.slot_mut(slot).spilled.iter_mut().filter(|place| **place == from).for_each(|place| *place = to);
        }
    }

    /// The spill is done with an event of its own. That is counted with its record, or in `passed` if the watermark has passed
    /// that one.
    pub(super) fn worked_off(&mut self, place: Spilled, fate: Fate, passed: &mut Passed) {
        match self.spilled.remove(&place) {
            Some(slot) => self.slot_mut(slot).worked_off.get_or_insert_default().add(fate),
            None => passed.add(fate),
        }
    }

    /// The open events of the lanes that `wanted` names, in the order of the log.
    pub(super) fn open_events(&self, wanted: impl Fn(LaneId) -> bool) -> impl Iterator<Item = (LaneId, EventRef)> {
        let numbered = self.in_order().flat_map(|row| row.slots.iter().zip(row.front..));
        let lanes = numbered.filter_map(|(slot, number)| Some((&slot.live.as_ref()?.lanes, number)));
        lanes.flat_map(move |(lanes, slot)| {
            let open =
                lanes.iter().zip(0..).filter_map(move |(lane, index)| Some(((*lane)?, EventRef { slot, index })));
            open.filter(|(lane, _)| wanted(*lane)).collect::<Vec<_>>()
        })
    }

    /// Moves the watermark of one side over the done records at its front. `delay` gets the milliseconds from received to
    /// delivered, once for each record that had an event delivered.
    pub(super) fn advance(&mut self, side: Side, mut delay: impl FnMut(u64)) -> Passed {
        let mut passed = Passed::default();
        loop {
            let row = self.row_mut(side);
            if row.slots.front().is_none_or(|slot| slot.remaining > 0) {
                break;
            }
            let Some(slot) = row.slots.pop_front() else { break };
            let number = row.front;
            row.front += 1;
            let counts = slot.parked.map_or([0; ParkReason::ALL.len()], |counts| *counts);
            let parked: u64 = counts.iter().sum();
            let delivered = u64::from(slot.events) - parked - slot.spilled.len() as u64;
            self.span_bytes -= slot.charge;
            for place in slot.spilled {
                if self.spilled.get(&place) == Some(&number) {
                    self.spilled.remove(&place);
                }
            }
            if let Some(worked_off) = slot.worked_off {
                passed.extend(*worked_off);
            }
            passed.end = Some(slot.end);
            passed.delivered_events += delivered;
            passed.delivered_bytes += slot.payload_bytes;
            passed.dropped.extend(slot.dropped.map(|dropped| *dropped));
            passed.parked.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
            if delivered > 0 {
                delay(slot.delay_ms);
            }
        }
        passed
    }

    /// Forgets everything that the watermark has not passed.
    pub(super) fn clear(&mut self) {
        for row in &mut self.rows {
            row.front += row.slots.len() as u64;
            row.slots.clear();
            (row.bytes, row.events) = (0, 0);
        }
        self.span_bytes = 0;
        self.spilled.clear();
    }

    /// Bytes charged now.
    pub(super) fn bytes(&self) -> u64 {
        self.rows.iter().map(|row| row.bytes).sum()
    }

    /// Whether the backlog has its part of `bytes_max`, while new records go ahead.
    pub(super) fn is_backlog_full(&self, bytes_max: u64) -> bool {
        self.is_live && self.rows[self.backlog].bytes >= bytes_max / BACKLOG_PART
    }

    /// Open events.
    pub(super) fn events(&self) -> u64 {
        self.rows.iter().map(|row| row.events).sum()
    }

    /// Those of the backlog.
    pub(super) fn backlog_events(&self) -> u64 {
        self.rows[self.backlog].events
    }

    /// Bytes charged for all records that the watermark has not passed.
    pub(super) fn span_bytes(&self) -> u64 {
        self.span_bytes
    }

    /// Events in the spill that the log still counts.
    pub(super) fn spilled_events(&self) -> u64 {
        self.spilled.len() as u64
    }

    /// Records that the watermark has not passed.
    pub(super) fn records(&self) -> usize {
        self.rows.iter().map(|row| row.slots.len()).sum()
    }

    fn close_one(&mut self, event: EventRef, now_ms: u64) {
        let row = self.row_of(event.slot);
        self.rows[row].events -= 1;
        let slot = self.slot_mut(event.slot);
        slot.remaining -= 1;
        if let Some(live) = &mut slot.live {
            live.lanes[event.index as usize] = None;
        }
        if slot.remaining == 0 {
            let received_at_ms = slot.live.as_ref().map_or(now_ms, |live| live.batch.received_at_ms);
            self.finish_if_done(event.slot, now_ms.saturating_sub(received_at_ms));
        }
    }

    fn finish_if_done(&mut self, number: u64, delay_ms: u64) {
        let slot = self.slot_mut(number);
        if slot.remaining == 0 {
            slot.live = None;
            slot.delay_ms = delay_ms;
            let (charge, row) = (slot.charge, self.row_of(number));
            self.rows[row].bytes -= charge;
        }
    }

    fn row_mut(&mut self, side: Side) -> &mut Row {
        &mut self.rows[if side == Side::Live { 1 - self.backlog } else { self.backlog }]
    }

    /// The index of the row that holds `slot`.
    fn row_of(&self, slot: u64) -> usize {
        let live = 1 - self.backlog;
        if self.is_live && slot >= self.rows[live].front { live } else { self.backlog }
    }

    /// The rows, in the order of the log.
    fn in_order(&self) -> impl Iterator<Item = &Row> {
        [self.backlog, 1 - self.backlog].into_iter().map(|row| &self.rows[row])
    }

    fn slot_mut(&mut self, slot: u64) -> &mut Slot {
        let row = self.row_of(slot);
        let row = &mut self.rows[row];
        let at = usize::try_from(slot - row.front).expect("slots fit in memory");
        &mut row.slots[at]
    }

    fn live(&self, slot: u64) -> &Live {
        let row = &self.rows[self.row_of(slot)];
        let at = usize::try_from(slot - row.front).expect("slots fit in memory");
        row.slots[at].live.as_deref().expect("a record with an open event is live")
    }
}

fn copy(batch: &Batch) -> Batch {
    let bytes = Bytes::copy_from_slice(batch.request.as_bytes());
    let request = Request::parse(bytes).expect("the same bytes were parsed before");
    Batch { request, ..batch.clone() }
}

/// Finds events by reference; in the order of the log, without walking a request twice.
pub(super) struct Walk<'a> {
    in_flight: &'a InFlight,
    at: Option<(EventRef, Events<'a>)>,
}

impl<'a> Walk<'a> {
    /// Walks `in_flight`.
    pub(super) fn new(in_flight: &'a InFlight) -> Walk<'a> {
        Walk { in_flight, at: None }
    }

    /// The open event `wanted`, and its record.
    pub(super) fn find(&mut self, wanted: EventRef) -> (&'a Live, Event<'a>) {
        let live = self.in_flight.live(wanted.slot);
        let (skip, mut events) = match self.at.take() {
            Some((next, events)) if next.slot == wanted.slot && next <= wanted => (wanted.index - next.index, events),
            _ => (wanted.index, live.batch.request.events()),
        };
        let event = events.nth(skip as usize).expect("a reference names an event of its record");
        self.at = Some((EventRef { index: wanted.index + 1, ..wanted }, events));
        (live, event)
    }
}
