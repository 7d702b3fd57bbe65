//! `forward.live_first`: new records go ahead of a backlog.
//!
//! It begins when the next record to be read has been older than [`BACKLOG_AGE_MIN`] for [`PATIENCE`], with a connection: a small
//! backlog is gone by then. From then on two readers feed the client: one goes on at the cursor, the other begins with what is
//! committed from now on. The log keeps what the second one has delivered as one stretch (`wal/ahead/`); when everything
//! before it is delivered, the second reader is the only one again. There are never more than two: during another outage the
//! second one waits, and goes on where it was.
//!
//! The backlog gets an eighth of what may be in flight, the first look at room that is short every eighth time, and is all
//! that `forward.pace` holds back: new records count for its limits, but do not wait. A tenth of the limits is left to the backlog
//! even if they use all of them.

use std::time::{Duration, Instant};

use tracing::info;

use super::super::backoff::Every;
use super::super::in_flight::{Passed, Side};
use super::Replay;
use crate::batch::now_ms;
use crate::wal::{ReadError, Reader, Wal};

/// Records received longer ago are a backlog.
const BACKLOG_AGE_MIN: Duration = Duration::from_secs(5);

/// How long there must be one.
const PATIENCE: Duration = Duration::from_secs(1);

/// Every so many turns the backlog is read first: it goes on even if there are more new records than Kafka takes.
const BACKLOG_TURN: u32 = 8;

/// How often that is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// See the module.
pub(super) struct LiveFirst {
    is_on: bool,
    /// Reads new records, while they go ahead.
    reader: Option<Reader>,
    /// The log has a stretch that was delivered ahead, and which the other reader does not enter.
    is_split: bool,
    turn: u32,
    look: Every,
    behind_since: Option<Instant>,
    began: Instant,
    /// Events that the watermarks have passed since.
    backlog_events: u64,
    live_events: u64,
}

impl LiveFirst {
    /// Takes up again what an earlier process has left, if it is on. If it is not, the records in order, without those that were
    /// delivered ahead.
    pub(super) fn new(is_on: bool, wal: &Wal, now: Instant) -> LiveFirst {
        LiveFirst {
            is_on,
            reader: if is_on { wal.ahead_reader() } else { None },
            is_split: wal.is_ahead(),
            turn: 0,
            look: Every::new(LOOK_INTERVAL),
            behind_since: None,
            began: now,
            backlog_events: 0,
            live_events: 0,
        }
    }

    /// The reader of new records, while they go ahead.
    pub(super) fn reader(&mut self) -> Option<&mut Reader> {
        self.reader.as_mut()
    }

    /// What is read in this turn, in order.
    pub(super) fn turn(&mut self) -> &'static [Side] {
        if self.reader.is_none() {
            return &[Side::Backlog];
        }
        self.turn = (self.turn + 1) % BACKLOG_TURN;
        if self.turn == 0 { &[Side::Backlog, Side::Live] } else { &[Side::Live, Side::Backlog] }
    }

    /// The reader whose next record may be one that is committed now; none if that is not read.
    pub(super) fn newest_reader<'a>(&'a self, other: &'a Reader) -> Option<&'a Reader> {
        self.reader.as_ref().or((!self.is_split).then_some(other))
    }

    /// Counts what the watermarks have passed.
    pub(super) fn passed(&mut self, backlog: &Passed, live: &Passed) {
        self.backlog_events += backlog.delivered_events;
        self.live_events += live.delivered_events;
    }
}

impl Replay {
    /// New records go ahead.
    pub(super) fn is_live(&self) -> bool {
        self.live_first.reader.is_some()
    }

    /// Whether `forward.pace` lets the next record of a side go.
    pub(super) fn is_time_for(&mut self, side: Side, now_ms: u64) -> Result<bool, ReadError> {
        Ok(side == Side::Live || self.pace.may_send() || self.does_next_not_wait(now_ms)?)
    }

    /// Whether held topics may go on: what is new does not wait.
    pub(super) fn is_time_for_held(&self) -> bool {
        self.pace.may_send() || self.live_first.is_on
    }

    /// Whether a record of a side waits for `forward.pace`.
    pub(super) fn waits(&self, side: Side, received_at_ms: u64, now_ms: u64) -> bool {
        let is_new = !self.is_live() && !is_backlog(received_at_ms, now_ms);
        side == Side::Backlog && !(self.live_first.is_on && is_new)
    }

    /// Whether the next record is given up, or is no backlog and need not be one.
    fn does_next_not_wait(&mut self, now_ms: u64) -> Result<bool, ReadError> {
        if let Some(record) = &self.held_back {
            return Ok(self.wal.is_given_up(record.end));
        }
        let Some(received_at_ms) = self.reader.next_received_at_ms()? else { return Ok(false) };
        Ok(!self.waits(Side::Backlog, received_at_ms, now_ms) || self.reader.is_given_up())
    }

    /// Whether the next record of the backlog is given up.
    pub(super) fn is_next_given_up(&mut self) -> Result<bool, ReadError> {
        Ok(self.reader.next_received_at_ms()?.is_some() && self.reader.is_given_up())
    }

    /// Lets new records go ahead, if there has been a backlog for long enough.
    pub(super) fn begin_live(&mut self, now: Instant) {
        // A failed attempt to read counts: there are no more of them than the backoff lets.
        let is_failing = self.reading[Side::Backlog as usize].is_failing();
        if !self.live_first.is_on || self.is_live() || is_failing || !self.live_first.look.is_due(now) {
            return;
        }
        let next = self.reader.next_received_at_ms();
        let is_behind = next.is_ok_and(|next| next.is_some_and(|at| is_backlog(at, now_ms())));
        if !is_behind || !self.connection.is_up() {
            self.live_first.behind_since = None;
            return;
        }
        let since = *self.live_first.behind_since.get_or_insert(now);
        if now < since + PATIENCE || !self.wal.begin_ahead() {
            return;
        }
        let backlog = self.wal.status();
        self.live_first.reader = self.wal.ahead_reader();
        self.live_first.is_split = true;
        self.in_flight.begin_live();
        (self.live_first.began, self.live_first.behind_since) = (now, None);
        (self.live_first.backlog_events, self.live_first.live_events) = (0, 0);
        self.shared.status().live_first = true;
        info!(
            pending_events = backlog.pending_events,
            oldest_seconds = backlog.oldest_pending_received_at_ms.map(|at| now_ms().saturating_sub(at) / 1000),
            "new events go ahead of the backlog"
        );
    }

    /// The backlog is delivered, if it is: one reader goes on, behind what was delivered ahead.
    pub(super) fn join_live(&mut self, now: Instant) {
        if !self.live_first.is_split || self.wal.is_ahead() {
            return;
        }
        self.live_first.is_split = false;
        let Some(mut reader) = self.live_first.reader.take() else {
            self.reader.rewind();
            return;
        };
        reader.join();
        self.reader = reader;
        self.in_flight.join();
        self.reading.swap(Side::Backlog as usize, Side::Live as usize);
        self.shared.status().live_first = false;
        let LiveFirst { began, backlog_events, live_events, .. } = self.live_first;
        let seconds = now.saturating_duration_since(began).as_secs_f64();
        info!(seconds, backlog_events, live_events, "the backlog is delivered, events go in order again");
    }

    /// Both readers go back to what is not delivered.
    pub(super) fn rewind_readers(&mut self, now: Instant) {
        self.join_live(now);
        self.reader.rewind();
        if let Some(reader) = self.live_first.reader() {
            reader.rewind();
        }
    }
}

fn is_backlog(received_at_ms: u64, now_ms: u64) -> bool {
    u128::from(now_ms.saturating_sub(received_at_ms)) >= BACKLOG_AGE_MIN.as_millis()
}
