//! A stretch of the log that was delivered ahead of the cursor (`forward.live_first`): new records do not wait for a backlog.
//!
//! ```text
//! ── delivered ──┤ backlog ├── delivered ahead ──┤ new records ├
//!             cursor     from                    to           tail
//! ```
//!
//! There is one such stretch at most. The reader at the cursor stops at `from`; when everything before that is delivered, the
//! cursor goes to `to`, and the stretch is no more. It is saved with the cursor: whatever power cuts leave of the two, both say
//! only what is true, so that something is delivered twice at worst. The segments inside it go as soon as it is durable.
//!
//! ```text
//! key    "ahead"
//! value  version u8 │ from, to: segment u64, slot u32, sequence, events, bytes u64 │ crc32c u32
//! ```

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;

use bytes::BufMut;

use super::checksum::{append_checksum, strip_checksum};
use super::cursor::{get_position, put_position};
use super::error::StoreError;
use super::log::{Log, Position, Segment};
use super::record::Totals;
use super::store::StateDb;
use super::{Reader, Wal, WalStatus};
use crate::batch::Sequence;
use crate::kill_point;

const KEY: &[u8] = b"ahead";
const VERSION: u8 = 1;
const BYTES: usize = 1 + 2 * (8 + 4 + 24) + 4;

/// Where it begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub from: Position,
    pub to: Position,
}

/// The stretch that is being delivered ahead.
pub(super) struct Ahead {
    pub stretch: Stretch,
    /// As [`Log::received`], from its end on.
    pub received: Received,
}

/// When chunks not yet delivered were received: (first sequence, ms since the epoch), ascending.
#[derive(Default)]
pub(super) struct Received(VecDeque<(u64, u64)>);

/// Which records are not delivered yet: what a reader still shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undelivered {
    /// The first of them.
    pub cursor: Sequence,
    /// The end of the log.
    pub tail: Sequence,
    /// In between, the records that were delivered ahead of the first of them; none if there are none.
    pub ahead: Option<Range<Sequence>>,
}

impl Undelivered {
    /// Those from `cursor` on and before `tail`, without what `stretch` says.
    pub(super) fn new(cursor: Sequence, tail: Sequence, stretch: Option<Stretch>) -> Undelivered {
        let ahead = stretch.map(|stretch| stretch.from.sequence()..stretch.to.sequence());
        Undelivered { cursor, tail, ahead: ahead.filter(|ahead| !ahead.is_empty() && ahead.end > cursor) }
    }

    /// Those from `cursor` on and before `tail`.
    #[cfg(test)]
    pub(crate) fn between(cursor: Sequence, tail: Sequence) -> Undelivered {
        Undelivered::new(cursor, tail, None)
    }

    /// The same without those before `sequence`.
    #[must_use]
    pub fn since(self, sequence: Sequence) -> Undelivered {
        Undelivered { cursor: self.cursor.max(sequence), ..self }
    }

    /// Whether the record at `sequence` is one of them.
    pub fn contains(&self, sequence: Sequence) -> bool {
        (self.cursor..self.tail).contains(&sequence) && !self.is_ahead(sequence)
    }

    /// Whether the record at `sequence` was delivered ahead of the first of them.
    pub fn is_ahead(&self, sequence: Sequence) -> bool {
        self.ahead.as_ref().is_some_and(|ahead| ahead.contains(&sequence))
    }
}

/// Records that were delivered ahead of the cursor (`forward.live_first`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeliveredAhead {
    /// The first of them.
    pub first_sequence: u64,
    /// The one after the last.
    pub end_sequence: u64,
    /// Events in them.
    pub events: u64,
}

impl WalStatus {
    /// The records that are not delivered yet.
    pub fn undelivered(&self) -> Undelivered {
        let ahead = self.delivered_ahead.map(|ahead| Sequence(ahead.first_sequence)..Sequence(ahead.end_sequence));
        Undelivered { cursor: Sequence(self.cursor_sequence), tail: Sequence(self.next_sequence), ahead }
    }
}

impl Wal {
    /// From now on, what is committed is delivered ahead of the cursor: [`Wal::reader`]'s stops where the log ends now, and
    /// [`Wal::ahead_reader`]'s begins there. False if that cannot be now, or is so already.
    pub fn begin_ahead(&self) -> bool {
        self.shared.log().begin_ahead()
    }

    /// A reader of what is delivered ahead of the cursor, from the first record on that is not; none if nothing is delivered
    /// ahead. That is also saved with the cursor.
    pub fn ahead_reader(&self) -> Option<Reader> {
        Reader::ahead(self.shared.clone())
    }

    /// As [`Wal::deliver`], for a record of [`Wal::ahead_reader`]'s. The cursor goes to the last such `position` as soon as
    /// everything before the first is delivered.
    pub fn deliver_ahead(&self, position: Position) {
        self.move_cursor(|log| log.deliver_ahead(position));
    }

    /// Whether something is, or may be, delivered ahead of the cursor: the cursor's reader does not come to the end of the log.
    pub fn is_ahead(&self) -> bool {
        self.shared.log().ahead.is_some()
    }

    /// The records that are not delivered yet.
    pub fn undelivered(&self) -> Undelivered {
        self.shared.log().undelivered()
    }
}

impl Received {
    /// Notes when the records from `sequence` on were received.
    pub fn note(&mut self, sequence: u64, received_at_ms: u64) {
        if self.0.back().is_none_or(|(last, _)| *last < sequence) {
            self.0.push_back((sequence, received_at_ms));
        }
    }

    /// Nothing is there but what was received from `sequence` on, then.
    pub fn begin(&mut self, sequence: u64, received_at_ms: u64) {
        self.0.clear();
        self.note(sequence, received_at_ms);
    }

    /// Everything before `sequence` is delivered.
    pub fn pass(&mut self, sequence: u64) {
        while self.0.get(1).is_some_and(|(next, _)| *next <= sequence) {
            self.0.pop_front();
        }
    }

    /// When the oldest was received.
    pub fn oldest(&self) -> Option<u64> {
        self.0.front().map(|(_, at)| *at)
    }
}

impl Log {
    /// From now on the cursor's reader stops where the log ends now, and what follows is delivered ahead. False: it cannot be,
    /// because nothing is pending, or because there is such a stretch already, or because the last one is not over on disk.
    pub fn begin_ahead(&mut self) -> bool {
        let is_over = |saved: Stretch| self.saved_cursor.totals.sequence >= saved.to.totals.sequence;
        if self.ahead.is_some() || self.pending().sequence == 0 || !self.saved_ahead.is_none_or(is_over) {
            return false;
        }
        let last = self.segments.last_key_value().map_or(self.cursor.segment, |(id, _)| *id);
        let (segment, slot) = self.open_end().unwrap_or((last + 1, 0));
        let at = Position { segment, slot, totals: self.tail };
        self.ahead = Some(Ahead { stretch: Stretch { from: at, to: at }, received: Received::default() });
        true
    }

    /// Everything in the stretch before `position` is delivered. If the cursor has come to it, this is its place.
    pub fn deliver_ahead(&mut self, position: Position) {
        let position = self.before_the_cut(position);
        let Some(ahead) = &mut self.ahead else { return self.deliver(position) };
        if position.totals.sequence >= ahead.stretch.to.totals.sequence {
            ahead.stretch.to = position;
            ahead.received.pass(position.totals.sequence);
        }
    }

    /// A cursor that has come to the stretch goes on behind it.
    pub fn pass_ahead(&mut self) {
        let has_come = |ahead: &mut Ahead| self.cursor.totals.sequence >= ahead.stretch.from.totals.sequence;
        let Some(Ahead { stretch, received }) = self.ahead.take_if(has_come) else { return };
        if stretch.to.totals.sequence > self.cursor.totals.sequence {
            self.cursor = stretch.to;
        }
        self.received = received;
    }

    /// The records that are not delivered yet.
    pub fn undelivered(&self) -> Undelivered {
        let stretch = self.ahead.as_ref().map(|ahead| ahead.stretch);
        Undelivered::new(self.cursor.sequence(), Sequence(self.tail.sequence), stretch)
    }

    /// Records, events and bytes of the stretch.
    pub fn delivered_ahead(&self) -> Totals {
        let Some(Ahead { stretch: Stretch { from, to }, .. }) = &self.ahead else {
            return Totals { sequence: 0, events: 0, bytes: 0 };
        };
        Totals {
            sequence: to.totals.sequence - from.totals.sequence,
            events: to.totals.events - from.totals.events,
            bytes: to.totals.bytes - from.totals.bytes,
        }
    }

    /// The same for people.
    pub fn delivered_ahead_status(&self) -> Option<DeliveredAhead> {
        let Range { start, end } = self.undelivered().ahead?;
        let events = self.delivered_ahead().events;
        Some(DeliveredAhead { first_sequence: start.0, end_sequence: end.0, events })
    }

    /// Notes when the records from `sequence` on, which were just committed, were received, if nothing older is pending there.
    pub fn note_committed(&mut self, sequence: u64, received_at_ms: u64) {
        if self.pending().sequence == 0 {
            self.received.begin(sequence, received_at_ms);
        } else if let Some(ahead) = &mut self.ahead
            && ahead.stretch.to.totals.sequence >= sequence
        {
            ahead.received.begin(sequence, received_at_ms);
        }
    }

    /// The first segment that nobody needs, as far as that is durable: before the cursor, or within the stretch.
    pub fn first_delivered_segment(&self) -> Option<(u64, Segment)> {
        let before = self.segments.range(..self.saved_cursor.segment).next();
        let within = self.saved_ahead.and_then(|Stretch { from, to }| {
            let inside = from.segment + 1..to.segment.max(from.segment + 1);
            self.segments.range(inside).next()
        });
        before.or(within).map(|(id, segment)| (*id, *segment))
    }
}

/// Saves a stretch, in the place of any other. Durable with the next sync of `meta`.
pub(super) fn put(meta: &dyn StateDb, stretch: Stretch) -> Result<(), StoreError> {
    let mut value = Vec::with_capacity(BYTES);
    value.put_u8(VERSION);
    [stretch.from, stretch.to].into_iter().for_each(|position| put_position(&mut value, position));
    append_checksum(&mut value);
    meta.put(KEY, &value)?;
    kill_point::pass("ahead.written");
    Ok(())
}

/// The saved stretch, which the cursor may have passed; none if there was never one, or when what is there is not right.
pub(super) fn load(meta: &dyn StateDb) -> Result<Option<Stretch>, StoreError> {
    let Some(value) = meta.get(KEY)? else { return Ok(None) };
    let decoded = decode(&value);
    if decoded.is_none() {
        tracing::warn!("what was delivered ahead of the cursor is not known any more; it is delivered again");
    }
    Ok(decoded)
}

fn decode(value: &[u8]) -> Option<Stretch> {
    if value.len() != BYTES || value[0] != VERSION {
        return None;
    }
    let mut rest = &strip_checksum(value)?[1..];
    Some(Stretch { from: get_position(&mut rest), to: get_position(&mut rest) })
}
