//! What is counted while load is made, and the report of it.

use std::cell::{RefCell, RefMut};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{BenchOptions, ClientError, Schedule};
use crate::proto;

/// Latencies are kept to three digits up to so many microseconds; longer ones count as this.
const LATENCY_US_MAX: u64 = 600_000_000;

/// Different reasons that are told apart; further ones are counted as "other".
const REASONS_MAX: usize = 32;

/// One thread's counts.
#[derive(Debug)]
pub(super) struct Stats {
    schedule: Option<Schedule>,
    latency_us: Histogram<u64>,
    acked_batches: u64,
    rejected: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    unanswered: u64,
    unsent: u64,
    open_at_end: u64,
}

impl Stats {
    pub(super) fn new(schedule: impl Into<Option<Schedule>>) -> Self {
        Stats {
            schedule: schedule.into(),
            latency_us: Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("the bounds are valid"),
            acked_batches: 0,
            rejected: BTreeMap::new(),
            errors: BTreeMap::new(),
            unanswered: 0,
            unsent: 0,
            open_at_end: 0,
        }
    }

    /// From now on acks are measured.
    pub(super) fn start(&mut self, schedule: Schedule) {
        self.schedule = Some(schedule);
    }

    /// An ack that came `now`, for a batch whose latency runs from `since`.
    pub(super) fn record_ack(&mut self, since: Instant, now: Instant) {
        let Some(schedule) = &self.schedule else { return };
        if schedule.measures(now) {
            self.acked_batches += 1;
        }
        // An answer that comes after the end belongs to the latencies all the same: leaving it out would flatter.
        if schedule.measures(since) {
            self.record_latency(since, now);
        }
    }

    fn record_latency(&mut self, since: Instant, now: Instant) {
        let latency = u64::try_from(now.saturating_duration_since(since).as_micros()).unwrap_or(u64::MAX);
        self.latency_us.saturating_record(latency.max(1));
    }

    /// An ack of the one batch of an idle connection: it counts whenever it comes.
    pub(super) fn record_idle_ack(&mut self, since: Instant, now: Instant) {
        self.acked_batches += 1;
        self.record_latency(since, now);
    }

    /// An answer that refused a batch.
    pub(super) fn record_rejection(&mut self, code: i32, reason: &str) {
        let code = proto::Code::try_from(code).unwrap_or_default().as_str_name();
        let reason = if reason.is_empty() { code.into() } else { format!("{code}: {reason}") };
        count(&mut self.rejected, reason);
    }

    /// A connection that failed, or an answer that never came. A refusal counts as a rejection.
    pub(super) fn record_error(&mut self, error: &ClientError) {
        match error {
            ClientError::Refused(refusal) => count(&mut self.rejected, refusal.to_string()),
            error => count(&mut self.errors, describe(error)),
        }
    }

    /// What a sender left behind: batches without answer, batches due and never sent.
    pub(super) fn record_leftovers(&mut self, unanswered: u64, unsent: u64) {
        self.unanswered += unanswered;
        self.unsent += unsent;
    }

    /// A connection that was still open at the end.
    pub(super) fn record_open_at_end(&mut self) {
        self.open_at_end += 1;
    }

    /// Adds another thread's counts.
    pub(super) fn add(&mut self, other: &Stats) {
        self.latency_us.add(&other.latency_us).expect("all histograms have the same bounds");
        self.acked_batches += other.acked_batches;
        for (reasons, more) in [(&mut self.rejected, &other.rejected), (&mut self.errors, &other.errors)] {
            for (reason, batches) in more {
                *reasons.entry(reason.clone()).or_default() += batches;
            }
        }
        self.unanswered += other.unanswered;
        self.unsent += other.unsent;
        self.open_at_end += other.open_at_end;
    }

    pub(super) fn report(&self, options: &BenchOptions, connections: usize) -> BenchReport {
        let seconds = options.duration.as_secs_f64();
        let (events, event_bytes) = match options.idle.as_ref().map(|idle| idle.message_bytes.unwrap_or(0)) {
            Some(message_bytes) => (1, message_bytes),
            None => (options.events_per_batch as u64, options.event_bytes),
        };
        let acked_events = self.acked_batches * events;
        let per_second = |amount: u64| if seconds > 0.0 { amount as f64 / seconds } else { 0.0 };
        BenchReport {
            url: options.endpoint.to_string(),
            connections: connections as u64,
            connections_open_at_end: self.open_at_end,
            measured_seconds: seconds,
            acked_batches: self.acked_batches,
            acked_events,
            acked_events_per_second: per_second(acked_events),
            acked_payload_bytes_per_second: per_second(acked_events * event_bytes as u64),
            latency_ms: (!self.latency_us.is_empty()).then(|| LatencyReport::of(&self.latency_us)),
            rejected_batches: self.rejected.clone(),
            errors: self.errors.clone(),
            unanswered_batches: self.unanswered,
            unsent_batches: self.unsent,
        }
    }
}

fn count(reasons: &mut BTreeMap<String, u64>, reason: String) {
    let room = reasons.len() < REASONS_MAX || reasons.contains_key(&reason);
    *reasons.entry(if room { reason } else { "other".into() }).or_default() += 1;
}

/// An error and its causes in one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The counts of one thread, shared by its connections.
#[derive(Debug, Clone)]
pub(super) struct SharedStats(Rc<RefCell<Stats>>);

impl Default for SharedStats {
    fn default() -> Self {
        SharedStats(Rc::new(RefCell::new(Stats::new(None))))
    }
}

impl SharedStats {
    /// For a moment without an `await`.
    pub(super) fn borrow_mut(&self) -> RefMut<'_, Stats> {
        self.0.borrow_mut()
    }

    pub(super) fn take(&self) -> Stats {
        self.0.replace(Stats::new(None))
    }
}

/// What came of the load.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// Where to.
    pub url: String,
    /// Connections that were opened.
    pub connections: u64,
    /// Of them, still open at the end.
    pub connections_open_at_end: u64,
    /// Seconds measured, without the warm-up.
    pub measured_seconds: f64,
    /// Batches acked while measuring. In idle mode, batches acked at all.
    pub acked_batches: u64,
    /// Their events.
    pub acked_events: u64,
    /// Their events per measured second.
    pub acked_events_per_second: f64,
    /// Their payload bytes per measured second.
    pub acked_payload_bytes_per_second: f64,
    /// Latency of acked batches; `None` if there were none.
    pub latency_ms: Option<LatencyReport>,
    /// Batches refused, warm-up included, by reason.
    pub rejected_batches: BTreeMap<String, u64>,
    /// Connections that could not be opened or failed, and over REST and gRPC batches that did.
    pub errors: BTreeMap<String, u64>,
    /// Batches sent and not answered, lost connections included.
    pub unanswered_batches: u64,
    /// With a rate: batches that were due and could not be sent in time.
    pub unsent_batches: u64,
}

/// Percentiles of latency, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LatencyReport {
    /// Median.
    pub p50: f64,
    /// 90 % are at most this.
    pub p90: f64,
    /// 99 % are at most this.
    pub p99: f64,
    /// 99.9 % are at most this.
    pub p99_9: f64,
    /// The longest.
    pub max: f64,
}

impl LatencyReport {
    fn of(latency_us: &Histogram<u64>) -> Self {
        let ms = |us: u64| us as f64 / 1000.0;
        let at = |quantile| ms(latency_us.value_at_quantile(quantile).min(latency_us.max()));
        LatencyReport { p50: at(0.5), p90: at(0.9), p99: at(0.99), p99_9: at(0.999), max: ms(latency_us.max()) }
    }
}

impl BenchReport {
    /// Batches that were refused.
    pub fn rejected_total(&self) -> u64 {
        self.rejected_batches.values().sum()
    }

    /// Whether every connection could be opened and stayed open, and every batch was acked.
    pub fn is_clean(&self) -> bool {
        self.rejected_batches.is_empty() && self.errors.is_empty() && self.unanswered_batches == 0
    }
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let measured = humantime::format_duration(Duration::from_secs_f64(self.measured_seconds));
        writeln!(f, "{}: {} connections, {measured}", self.url, self.connections)?;
        writeln!(f, "  acked       {:>12.0} events/s", self.acked_events_per_second)?;
        writeln!(f, "              {:>12.1} MB/s of payload", self.acked_payload_bytes_per_second / 1e6)?;
        writeln!(f, "              {:>12} batches, {} events", self.acked_batches, self.acked_events)?;
        if let Some(latency) = &self.latency_ms {
            let LatencyReport { p50, p90, p99, p99_9, max } = latency;
            writeln!(f, "  latency     p50 {p50:.2}  p90 {p90:.2}  p99 {p99:.2}  p99.9 {p99_9:.2}  max {max:.2} ms")?;
        }
        for (reason, batches) in &self.rejected_batches {
            writeln!(f, "  rejected    {batches:>12} {reason}")?;
        }
        for (error, times) in &self.errors {
            writeln!(f, "  error       {times:>12} {error}")?;
        }
        if self.unanswered_batches > 0 {
            writeln!(f, "  unanswered  {:>12} batches", self.unanswered_batches)?;
        }
        if self.unsent_batches > 0 {
            writeln!(f, "  unsent      {:>12} batches: the rate was not reached", self.unsent_batches)?;
        }
        write!(f, "  open at end {:>12} connections", self.connections_open_at_end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> BenchOptions {
        BenchOptions {
            warmup: Duration::from_secs(1),
            duration: Duration::from_secs(2),
            ..BenchOptions::new("ws://a".parse().unwrap())
        }
    }

    #[test]
    fn only_the_measured_time_counts() {
        let options = options();
        let schedule = Schedule::starting_at(Instant::now(), &options);
        let mut stats = Stats::new(schedule);
        let at = |ms| schedule.start + Duration::from_millis(ms);
        stats.record_ack(at(500), at(900)); // in the warm-up
        stats.record_ack(at(900), at(1100)); // sent in the warm-up: an ack, but no latency
        stats.record_ack(at(1100), at(1101));
        stats.record_ack(at(2900), at(3900)); // answered after the end: a latency, but no ack
        let report = stats.report(&options, 7);
        assert_eq!((report.acked_batches, report.acked_events), (2, 40));
        assert_eq!(report.acked_events_per_second, 20.0);
        assert_eq!(report.acked_payload_bytes_per_second, 4000.0);
        let latency = report.latency_ms.unwrap();
        assert!((latency.p50 - 1.0).abs() < 0.01 && (latency.max - 1000.0).abs() < 1.0, "{latency:?}");
    }

    #[test]
    fn threads_add_up_and_reasons_are_bounded() {
        let mut total = Stats::new(None);
        let mut thread = Stats::new(None);
        for n in 0..REASONS_MAX + 5 {
            thread.record_rejection(3, &format!("reason {n:02}"));
        }
        thread.record_rejection(3, "reason 00");
        thread.record_error(&ClientError::Disconnected { source: None });
        thread.record_leftovers(2, 3);
        total.add(&thread);
        total.add(&thread);
        let report = total.report(&options(), 1);
        assert_eq!(report.rejected_batches["CODE_INTERNAL_ERROR: reason 00"], 4);
        assert_eq!(report.rejected_batches["other"], 10);
        assert_eq!(report.rejected_total(), 2 * (REASONS_MAX as u64 + 6));
        assert_eq!(report.errors["connection lost"], 2);
        assert_eq!((report.unanswered_batches, report.unsent_batches), (4, 6));
        assert!(!report.is_clean());
    }

    #[test]
    fn the_json_report_keeps_its_names() {
        let mut stats = Stats::new(None);
        stats.record_rejection(2, "");
        let json = serde_json::to_value(stats.report(&options(), 1)).unwrap();
        for name in ["acked_events_per_second", "acked_payload_bytes_per_second", "measured_seconds", "errors"] {
            assert!(json.get(name).is_some(), "{name} in {json}");
        }
        assert!(json["latency_ms"].is_null());
        assert_eq!(json["rejected_batches"]["CODE_BAD_REQUEST"], 1);
    }
}
