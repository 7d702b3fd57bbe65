//! What one look cannot tell: rates, the last ten minutes, the last errors, and how the parked events divide by reason.
//!
//! [`Watch`] looks at the stages once a second and remembers, within fixed bounds. Nothing of it is durable.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::metrics::Totals;

/// Samples that are kept: ten minutes.
const SAMPLES_MAX: usize = 600;
/// Samples that `/status` repeats, for those who ask every few seconds.
const RECENT_SAMPLES: usize = 10;
/// Different errors that are kept.
const ERRORS_MAX: usize = 8;
/// Bytes of an error's message that are kept.
const MESSAGE_BYTES_MAX: usize = 600;
/// Looks that the rates go over: five seconds.
const RATE_LOOKS: usize = 5;
/// Time constant of the growth that says when the disk is full: a burst is no trend.
const GROWTH_SMOOTHING: Duration = Duration::from_secs(60);
/// Parked events are divided by reason at most so often...
const TALLY_INTERVAL_MIN: Duration = Duration::from_secs(5);
/// ...and for no more than this part of the time.
const TALLY_SHARE: u32 = 20;

/// What is looked at, once a second.
#[derive(Debug, Clone, Default)]
pub(super) struct Observation {
    pub at_ms: u64,
    pub totals: Totals,
    pub pending_events: u64,
    pub pending_bytes: u64,
    /// Disk that a backlog may take.
    pub capacity_bytes: u64,
    /// `forward` of `/status`.
    pub forward: Value,
}

/// One second of the past.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Its end, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Events made durable, a second.
    pub committed_events: f64,
    /// Events acked by Kafka, a second.
    pub delivered_events: f64,
    /// The backlog.
    pub pending_events: u64,
}

/// What happened a second, over the last five.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    pub received_events: f64,
    pub rejected_batches: f64,
    pub committed_events: f64,
    pub committed_bytes: f64,
    pub delivered_events: f64,
    /// By how much the backlog grows; negative while it shrinks. Smoothed over the last minute or so.
    pub growth_bytes: f64,
}

/// An error that was met, once or again and again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct SeenError {
    /// The newest wording.
    pub message: String,
    /// The topic it was about; none when about all.
    pub topic: Option<String>,
    /// When it was last met, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// In how many looks there was a new one.
    pub count: u64,
}

/// How the parked events divide.
#[derive(Debug, Clone, Default)]
struct Tally {
    next_id: u64,
    total: u64,
    by_reason: BTreeMap<&'static str, u64>,
}

impl Tally {
    fn add(&mut self, events: impl Iterator<Item = (u64, &'static str)>) {
        for (id, reason) in events {
            *self.by_reason.entry(reason).or_default() += 1;
            self.total += 1;
            self.next_id = id + 1;
        }
    }
}

#[derive(Default)]
pub(super) struct Watch(Mutex<State>);

#[derive(Default)]
struct State {
    /// The last ones, oldest first.
    looks: VecDeque<Look>,
    growth_bytes: Smoothed,
    /// By how much the disk for a backlog shrinks a second.
    shrinking_bytes: Smoothed,
    samples: VecDeque<Sample>,
    errors: VecDeque<SeenError>,
    tally: Option<Tally>,
    /// When the next tally may begin.
    next_tally: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    totals: Totals,
    pending_events: u64,
    pending_bytes: u64,
    capacity_bytes: u64,
}

/// A rate over the last minute or so.
#[derive(Debug, Clone, Copy, Default)]
struct Smoothed(Option<f64>);

impl Smoothed {
    /// By how much something grew within so many seconds.
    fn grew(&mut self, before: u64, now: u64, seconds: f64) {
        let rate = (now as f64 - before as f64) / seconds;
        let weight = 1.0 - (-seconds / GROWTH_SMOOTHING.as_secs_f64()).exp();
        self.0 = Some(self.0.map_or(rate, |before| before + weight * (rate - before)));
    }

    fn rate(self) -> f64 {
        rounded(self.0.unwrap_or_default())
    }
}

/// The answer of `/history`.
#[derive(Debug, Serialize)]
pub(super) struct History {
    pub samples: Vec<Sample>,
}

impl Watch {
    /// Takes in how things are now.
    pub fn observe(&self, now: Instant, observation: Observation) {
        let mut state = self.state();
        state.note_error(&observation.forward);
        let Observation { totals, pending_events, pending_bytes, capacity_bytes, .. } = observation;
        let look = Look { at: now, totals, pending_events, pending_bytes, capacity_bytes };
        let Some(last) = state.looks.back().copied() else { return state.looks.push_back(look) };
        let seconds = now.saturating_duration_since(last.at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        if state.looks.len() > RATE_LOOKS {
            state.looks.pop_front();
        }
        state.looks.push_back(look);
        state.growth_bytes.grew(last.pending_bytes, look.pending_bytes, seconds);
        // From rest: what a new log reserves in its first second is no trend.
        state.shrinking_bytes.0.get_or_insert(0.0);
        state.shrinking_bytes.grew(look.capacity_bytes, last.capacity_bytes, seconds);
        let now = look.rates_since(&last);
        if state.samples.len() == SAMPLES_MAX {
            state.samples.pop_front();
        }
        state.samples.push_back(Sample {
            at_ms: observation.at_ms,
            committed_events: rounded(now.committed_events),
            delivered_events: rounded(now.delivered_events),
            pending_events: observation.pending_events,
        });
    }

    pub fn rates(&self) -> Rates {
        let state = self.state();
        let rates = match (state.looks.front(), state.looks.back()) {
            (Some(first), Some(last)) if first.at < last.at => last.rates_since(first),
            _ => Rates::default(),
        };
        Rates {
            received_events: rounded(rates.received_events),
            rejected_batches: rounded(rates.rejected_batches),
            committed_events: rounded(rates.committed_events),
            committed_bytes: rounded(rates.committed_bytes),
            delivered_events: rounded(rates.delivered_events),
            growth_bytes: state.growth_bytes.rate(),
        }
    }

    /// Seconds until `headroom_bytes` are used up, by what is no backlog, and by the backlog, if that grows at all; none while
    /// they do not grow together.
    pub fn full_seconds(&self, headroom_bytes: u64, backlog_grows: bool) -> Option<f64> {
        let state = self.state();
        let of_backlog = state.growth_bytes.rate();
        let of_backlog = if backlog_grows { of_backlog } else { of_backlog.min(0.0) };
        let growth = of_backlog + state.shrinking_bytes.rate().max(0.0);
        (growth > 0.0).then(|| (headroom_bytes as f64 / growth).round())
    }

    /// Seconds until the backlog is empty, as it went in the last five; none while it does not shrink.
    pub fn drain_seconds(&self) -> Option<f64> {
        let state = self.state();
        let (first, last) = (state.looks.front()?, state.looks.back()?);
        if last.pending_events == 0 {
            return Some(0.0);
        }
        let seconds = last.at.saturating_duration_since(first.at).as_secs_f64();
        let shrunk = first.pending_events.checked_sub(last.pending_events).filter(|shrunk| *shrunk > 0)?;
        Some((last.pending_events as f64 * seconds / shrunk as f64).ceil())
    }

    /// The last samples, oldest first.
    pub fn recent(&self) -> Vec<Sample> {
        let state = self.state();
        let skipped = state.samples.len().saturating_sub(RECENT_SAMPLES);
        state.samples.iter().skip(skipped).copied().collect()
    }

    pub fn history(&self) -> History {
        History { samples: self.state().samples.iter().copied().collect() }
    }

    /// The last errors, newest first.
    pub fn errors(&self) -> Vec<SeenError> {
        self.state().errors.iter().cloned().collect()
    }

    /// The parked events by reason, as last counted; none before they were.
    pub fn parked_by_reason(&self) -> Option<BTreeMap<&'static str, u64>> {
        self.state().tally.as_ref().map(|tally| tally.by_reason.clone())
    }

    /// Whether the parked events, of which there are `count`, are to be divided anew now.
    pub fn wants_tally(&self, now: Instant, count: u64) -> bool {
        let state = self.state();
        let counted = state.tally.as_ref().map(|tally| tally.total);
        counted != Some(count) && state.next_tally.is_none_or(|at| now >= at)
    }

    /// Divides the parked events by reason. `events` gives those from an id on, `count` says how many there are; both may
    /// block. New ones alone are read, unless some were removed.
    pub fn tally<I: Iterator<Item = (u64, &'static str)>>(&self, count: impl Fn() -> u64, events: impl Fn(u64) -> I) {
        let began = Instant::now();
        let mut tally = self.state().tally.clone().unwrap_or_default();
        let least = count();
        tally.add(events(tally.next_id));
        if !(least..=count()).contains(&tally.total) {
            tally = Tally::default();
            tally.add(events(0));
        }
        let now = Instant::now();
        let mut state = self.state();
        state.tally = Some(tally);
        state.next_tally = Some(now + TALLY_INTERVAL_MIN.max((now - began) * TALLY_SHARE));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn note_error(&mut self, forward: &Value) {
        let error = &forward["last_error"];
        let (Some(message), Some(at_ms)) = (error["message"].as_str(), error["at_ms"].as_u64()) else { return };
        let topic = error["topic"].as_str().map(|topic| shortened(topic).to_owned());
        let same = |seen: &SeenError| gist(&seen.message) == gist(shortened(message)) && seen.topic == topic;
        let count = match self.errors.iter().position(same) {
            Some(at) if self.errors[at].at_ms >= at_ms => return,
            Some(at) => self.errors.remove(at).map_or(0, |seen| seen.count),
            None => 0,
        };
        self.errors.push_front(SeenError { message: shortened(message).to_owned(), topic, at_ms, count: count + 1 });
        self.errors.truncate(ERRORS_MAX);
    }
}

impl Look {
    /// Without the growth, which is smoothed.
    fn rates_since(&self, before: &Look) -> Rates {
        let seconds = self.at.saturating_duration_since(before.at).as_secs_f64();
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let (now, past) = (&self.totals, &before.totals);
        Rates {
            received_events: rate(now.received_events, past.received_events),
            rejected_batches: rate(now.rejected_batches, past.rejected_batches),
            committed_events: rate(now.committed_events, past.committed_events),
            committed_bytes: rate(now.committed_bytes, past.committed_bytes),
            delivered_events: rate(now.delivered_events, past.delivered_events),
            growth_bytes: 0.0,
        }
    }
}

/// To a tenth, which is all that anybody reads; never -0.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0 + 0.0
}

fn shortened(text: &str) -> &str {
    let end = (0..=MESSAGE_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

/// What librdkafka adds in brackets differs from time to time: how long it took, how often it happened.
fn gist(message: &str) -> &str {
    message.split(" (after ").next().unwrap_or(message)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Seconds from the start, events committed and delivered so far; an event is 100 bytes.
    fn look(watch: &Watch, start: Instant, second: u64, committed: u64, delivered: u64) {
        look_at(watch, start, second, [committed, delivered, 0]);
    }

    /// The same, with the disk for a backlog.
    fn look_at(watch: &Watch, start: Instant, second: u64, [committed, delivered, capacity_bytes]: [u64; 3]) {
        let totals = Totals {
            committed_events: committed,
            committed_bytes: committed * 100,
            delivered_events: delivered,
            ..Totals::default()
        };
        let pending_events = committed - delivered;
        let observation = Observation {
            at_ms: second * 1000,
            totals,
            pending_events,
            pending_bytes: pending_events * 100,
            capacity_bytes,
            forward: Value::Null,
        };
        watch.observe(start + Duration::from_secs(second), observation);
    }

    #[test]
    fn rates_follow_and_the_past_is_bounded() {
        let (watch, start) = (Watch::default(), Instant::now());
        look(&watch, start, 0, 0, 0);
        assert!(watch.recent().is_empty());
        look(&watch, start, 1, 50, 50);
        assert_eq!(watch.rates().committed_events, 50.0);
        assert_eq!(watch.full_seconds(1000, true), None);
        let newest = Sample { at_ms: 1000, committed_events: 50.0, delivered_events: 50.0, pending_events: 0 };
        assert_eq!(watch.recent(), [newest]);
        look(&watch, start, 2, 50, 50);
        assert_eq!(watch.rates().committed_events, 25.0);
        for second in 3..1000 {
            look(&watch, start, second, second * 50, 50);
        }
        assert_eq!((watch.rates().committed_bytes, watch.rates().delivered_events), (5000.0, 0.0));
        assert_eq!(watch.full_seconds(500_000, true), Some(100.0));
        let samples = watch.history().samples;
        assert_eq!((samples.len(), samples[0].at_ms, samples[599].at_ms), (600, 400_000, 999_000));
        assert_eq!(watch.recent(), samples[590..]);
    }

    #[test]
    fn a_disk_that_others_fill_is_full_at_some_time() {
        let (watch, start) = (Watch::default(), Instant::now());
        for second in 0..600 {
            // Nothing waits, and others take 1000 bytes a second; then a backlog grows by as many.
            let committed = if second < 300 { 0 } else { (second - 299) * 10 };
            look_at(&watch, start, second, [committed, 0, 9_000_000 - second * 1000]);
            if second == 299 {
                // Within a hundredth: it began at nothing.
                assert_eq!(watch.full_seconds(500_000, true), Some(503.0));
                assert_eq!(watch.full_seconds(500_000, false), Some(503.0));
            }
        }
        assert_eq!(watch.full_seconds(500_000, true).map(|seconds| seconds.round()), Some(251.0));
        assert_eq!(watch.full_seconds(500_000, false), Some(500.0));
        for second in 600..1200 {
            look_at(&watch, start, second, [3000, 3000, 9_000_000]);
        }
        assert_eq!(watch.full_seconds(500_000, true), None);
    }

    #[test]
    fn what_a_new_log_reserves_at_once_is_no_trend() {
        let (watch, start) = (Watch::default(), Instant::now());
        for second in 0..20 {
            look_at(&watch, start, second, [0, 0, if second == 0 { 9_000_000 } else { 8_000_000 }]);
        }
        // As by a sixtieth of it each second, and less from then on.
        assert!(watch.full_seconds(500_000_000, true) > Some(60.0 * 500.0));
    }

    #[test]
    fn a_backlog_that_shrinks_is_drained_at_some_time() {
        let (watch, start) = (Watch::default(), Instant::now());
        assert_eq!(watch.drain_seconds(), None);
        look(&watch, start, 0, 0, 0);
        assert_eq!(watch.drain_seconds(), Some(0.0));
        look(&watch, start, 1, 1000, 0);
        assert_eq!(watch.drain_seconds(), None);
        for second in 2..10 {
            look(&watch, start, second, 1000, (second - 1) * 100);
        }
        // 200 are left, and 100 go a second.
        assert_eq!(watch.drain_seconds(), Some(2.0));
    }

    #[test]
    fn a_burst_is_no_trend() {
        let (watch, start) = (Watch::default(), Instant::now());
        look(&watch, start, 0, 0, 0);
        look(&watch, start, 1, 0, 0);
        look(&watch, start, 2, 600, 0);
        let growth = watch.rates().growth_bytes;
        assert!((900.0..1100.0).contains(&growth), "{growth} of 60000");
    }

    #[test]
    fn the_last_errors_are_kept_once_each() {
        let watch = Watch::default();
        let see = |message: &str, topic: Option<&str>, at_ms: u64| {
            let forward = json!({"last_error": {"message": message, "topic": topic, "at_ms": at_ms}});
            watch.observe(Instant::now(), Observation { forward, ..Observation::default() });
        };
        see("a: refused (after 3ms in state CONNECT)", None, 1);
        see("a: refused (after 3ms in state CONNECT)", None, 1);
        see("a: refused (after 0ms in state CONNECT, 4 identical error(s) suppressed)", None, 2);
        see("<b>bold</b>", Some("<i>t</i>"), 3);
        see("a: refused (after 1ms in state CONNECT)", None, 4);
        let errors = watch.errors();
        let told: Vec<_> = errors.iter().map(|error| (error.message.as_str(), error.at_ms, error.count)).collect();
        assert_eq!(told, [("a: refused (after 1ms in state CONNECT)", 4, 3), ("<b>bold</b>", 3, 1)]);
        for at_ms in 10..100 {
            see(&format!("{at_ms} {}", "ü".repeat(1000)), None, at_ms);
        }
        let errors = watch.errors();
        assert_eq!(errors.len(), ERRORS_MAX);
        assert!(errors.iter().all(|error| error.message.len() <= MESSAGE_BYTES_MAX));
    }

    #[test]
    fn parked_events_are_divided_by_reason() {
        let watch = Watch::default();
        let now = Instant::now();
        assert!(watch.wants_tally(now, 0));
        let read = std::cell::RefCell::new(Vec::new());
        let tally = |held: &[(u64, &'static str)]| {
            let count = || held.len() as u64;
            watch.tally(count, |from| {
                read.borrow_mut().push(from);
                held.iter().copied().filter(move |(id, _)| *id >= from).collect::<Vec<_>>().into_iter()
            });
            watch.parked_by_reason().unwrap()
        };
        let counts = |counts: &[(&'static str, u64)]| counts.iter().copied().collect::<BTreeMap<_, _>>();
        assert_eq!(tally(&[]), counts(&[]));
        let mut held = vec![(1, "too_large"), (2, "unknown_topic"), (3, "too_large")];
        assert!(!watch.wants_tally(now, 3), "it waits a little");
        assert!(watch.wants_tally(now + 2 * TALLY_INTERVAL_MIN, 3));
        assert_eq!(tally(&held), counts(&[("too_large", 2), ("unknown_topic", 1)]));
        assert!(!watch.wants_tally(now + 2 * TALLY_INTERVAL_MIN, 3), "nothing is new");
        held.push((4, "expired"));
        assert_eq!(tally(&held), counts(&[("expired", 1), ("too_large", 2), ("unknown_topic", 1)]));
        assert_eq!(read.take(), [0, 0, 4], "new ones alone are read");
        held.remove(0);
        assert_eq!(tally(&held), counts(&[("expired", 1), ("too_large", 1), ("unknown_topic", 1)]));
        // One went and one came.
        held.remove(0);
        held.push((5, "expired"));
        assert_eq!(tally(&held), counts(&[("expired", 2), ("too_large", 1)]));
    }
}
