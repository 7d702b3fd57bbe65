//! The whole catalogue of metrics, with their handles.
//!
//! Every handle is made once, here, so that recording costs an atomic add and every name is described in one place.
//! Gauges that describe a state (backlog, disk, memory) are set by [`crate::admin`] when Prometheus scrapes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{
    Counter, CounterFn, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::batch::now_ms;
use crate::forward::{DropReason, FailureReason, ParkReason, ParkedDropReason};
use crate::ingest::{CloseReason, Protocol, RejectReason};

const LATENCY_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const DELAY_BUCKETS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 43_200.0, 172_800.0,
    604_800.0,
];
const GROUP_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];

/// Handles of every metric.
pub struct Metrics {
    recorder: PrometheusRecorder,
    sums: Sums,
    /// One set a protocol: WebSocket, REST, gRPC.
    ingest: [IngestMetrics; 3],
    /// `ingest.connections_max`
    pub connections_limit: Gauge,
    /// The log.
    pub wal: WalMetrics,
    /// The forwarder.
    pub forward: ForwardMetrics,
}

/// Sums of some counters, over all their labels, since the start: what `/status` tells of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Totals {
    /// Events of decoded requests, before admission.
    pub received_events: u64,
    /// Requests refused and never acked.
    pub rejected_batches: u64,
    /// Events made durable.
    pub committed_events: u64,
    /// Request bytes made durable.
    pub committed_bytes: u64,
    /// Events acked by Kafka.
    pub delivered_events: u64,
}

#[derive(Default)]
struct Sums {
    received_events: Arc<AtomicU64>,
    rejected_batches: Arc<AtomicU64>,
    committed_events: Arc<AtomicU64>,
    committed_bytes: Arc<AtomicU64>,
    delivered_events: Arc<AtomicU64>,
}

/// `ringtail_ingest_*`, for one protocol.
pub struct IngestMetrics {
    /// Open connections.
    pub connections: Gauge,
    /// Connections accepted.
    pub connections_opened: Counter,
    connections_closed: Vec<(CloseReason, Counter)>,
    /// Decoded requests.
    pub received_batches: Counter,
    /// Their events.
    pub received_events: Counter,
    /// Their bytes, as protobuf.
    pub received_bytes: Counter,
    rejected_batches: Vec<(RejectReason, Counter)>,
    /// Retries of durable batches, acked and not stored again.
    pub duplicate_batches: Counter,
    /// From request read to ack written.
    pub ack_duration: Histogram,
}

/// `ringtail_wal_*`
pub struct WalMetrics {
    /// Durable batches.
    pub committed_batches: Counter,
    /// Durable events.
    pub committed_events: Counter,
    /// Durable request bytes.
    pub committed_bytes: Counter,
    /// One group commit, sync included.
    pub commit_duration: Histogram,
    /// Batches per group commit.
    pub commit_group_batches: Histogram,
    /// Committed, not yet delivered, parked or dropped: batches.
    pub pending_batches: Gauge,
    /// The same in events.
    pub pending_events: Gauge,
    /// The same in request bytes.
    pub pending_bytes: Gauge,
    /// Age of the oldest pending batch.
    pub oldest_pending_age: Gauge,
    /// Disk used.
    pub disk_bytes: Gauge,
    /// `wal.bytes_max`.
    pub disk_limit_bytes: Gauge,
    /// Free on the file system.
    pub free_bytes: Gauge,
    /// Disk that the log may still take, by both limits.
    pub headroom_bytes: Gauge,
    /// Disk that a backlog may take, by both limits.
    pub capacity_bytes: Gauge,
    /// 1 while batches are refused for space.
    pub full: Gauge,
    /// Segments on disk, spares included.
    pub segments: Gauge,
    /// Segments set aside as damaged.
    pub quarantined_segments: Gauge,
    /// Small databases set aside as damaged.
    pub quarantined_stores: Gauge,
}

/// `ringtail_forward_*`
pub struct ForwardMetrics {
    /// 1 if there are brokers to forward to, 0 if batches are only collected.
    pub enabled: Gauge,
    /// 1 while at least one broker is up.
    pub connected: Gauge,
    /// Events acked by Kafka, counted once each.
    pub delivered_events: Counter,
    /// Their payload bytes.
    pub delivered_bytes: Counter,
    delivery_failures: Vec<(FailureReason, Counter)>,
    /// Events handed to the Kafka client and not yet acked.
    pub in_flight_events: Gauge,
    /// Their bytes.
    pub in_flight_bytes: Gauge,
    /// From commit to delivery.
    pub delivery_delay: Histogram,
    /// Dead letters held now.
    pub parked_events: Gauge,
    /// What they take in the store.
    pub parked_bytes: Gauge,
    parked_events_total: Vec<(ParkReason, Counter)>,
    /// Events of held topics on disk, out of the log's way.
    pub spilled_events: Gauge,
    /// What they take there.
    pub spilled_bytes: Gauge,
    /// Topics held.
    pub held_topics: Gauge,
    /// Parked events that went back into the backlog.
    pub requeued_events: Counter,
    dead_letters: Vec<(ParkReason, Counter)>,
    parked_dropped_events: Vec<(ParkedDropReason, Counter)>,
    /// Events that were committed and cannot be read any more.
    pub dropped_events_damaged: Counter,
    /// Estimate until the backlog is empty.
    pub drain_seconds: Gauge,
}

impl Metrics {
    /// Registers and describes every metric.
    pub fn new() -> Arc<Metrics> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_group_batches".into()), GROUP_BUCKETS)
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_delay_seconds".into()), DELAY_BUCKETS))
            .and_then(|builder| {
                builder.set_buckets_for_metric(Matcher::Suffix("_duration_seconds".into()), LATENCY_BUCKETS)
            })
            .expect("the buckets are not empty")
            .build_recorder();
        let sums = Sums::default();
        let (ingest, connections_limit, wal, forward) = metrics::with_local_recorder(&recorder, || {
            describe();
            gauge!("ringtail_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
            // Must not change while the process lives: each change is taken for a restart.
            gauge!("process_start_time_seconds").set(now_ms() as f64 / 1000.0);
            let connections_limit = gauge!("ringtail_ingest_connections_limit");
            let ingest = Protocol::ALL.map(|protocol| IngestMetrics::new(protocol, &sums));
            (ingest, connections_limit, WalMetrics::new(&sums), ForwardMetrics::new(&sums))
        });
        Arc::new(Metrics { recorder, sums, ingest, connections_limit, wal, forward })
    }

    /// The metrics of one protocol.
    pub fn ingest(&self, protocol: Protocol) -> &IngestMetrics {
        &self.ingest[protocol as usize]
    }

    /// Sums of some counters since the start.
    pub fn totals(&self) -> Totals {
        let sum = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        Totals {
            received_events: sum(&self.sums.received_events),
            rejected_batches: sum(&self.sums.rejected_batches),
            committed_events: sum(&self.sums.committed_events),
            committed_bytes: sum(&self.sums.committed_bytes),
            delivered_events: sum(&self.sums.delivered_events),
        }
    }

    /// Counts events that were given up. The caller bounds the number of topics.
    pub fn count_dropped_events(&self, reason: DropReason, topic: &str, count: u64) {
        metrics::with_local_recorder(&self.recorder, || {
            let labels = [("reason", reason.as_str().to_owned()), ("topic", topic.to_owned())];
            counter!("ringtail_forward_dropped_events_total", &labels).increment(count);
        });
    }

    /// Renders the catalogue in Prometheus' text format.
    pub fn handle(&self) -> PrometheusHandle {
        self.recorder.handle()
    }
}

impl IngestMetrics {
    fn new(protocol: Protocol, sums: &Sums) -> IngestMetrics {
        let protocol = protocol.as_str();
        IngestMetrics {
            connections: gauge!("ringtail_ingest_connections", "protocol" => protocol),
            connections_opened: counter!("ringtail_ingest_connections_opened_total", "protocol" => protocol),
            connections_closed: CloseReason::ALL
                .map(|reason| {
                    let labels = [("protocol", protocol), ("reason", reason.as_str())];
                    (reason, counter!("ringtail_ingest_connections_closed_total", &labels))
                })
                .to_vec(),
            received_batches: counter!("ringtail_ingest_received_batches_total", "protocol" => protocol),
            received_events: summed(
                &sums.received_events,
                counter!("ringtail_ingest_received_events_total", "protocol" => protocol),
            ),
            received_bytes: counter!("ringtail_ingest_received_bytes_total", "protocol" => protocol),
            rejected_batches: RejectReason::ALL
                .map(|reason| {
                    let labels = [("protocol", protocol), ("reason", reason.as_str())];
                    let counter = counter!("ringtail_ingest_rejected_batches_total", &labels);
                    (reason, summed(&sums.rejected_batches, counter))
                })
                .to_vec(),
            duplicate_batches: counter!("ringtail_ingest_duplicate_batches_total", "protocol" => protocol),
            ack_duration: histogram!("ringtail_ingest_ack_duration_seconds", "protocol" => protocol),
        }
    }

    /// Connections closed for `reason`.
    pub fn connections_closed(&self, reason: CloseReason) -> &Counter {
        find(&self.connections_closed, reason)
    }

    /// Batches refused for `reason`.
    pub fn rejected_batches(&self, reason: RejectReason) -> &Counter {
        find(&self.rejected_batches, reason)
    }
}

impl WalMetrics {
    fn new(sums: &Sums) -> WalMetrics {
        WalMetrics {
            committed_batches: counter!("ringtail_wal_committed_batches_total"),
            committed_events: summed(&sums.committed_events, counter!("ringtail_wal_committed_events_total")),
            committed_bytes: summed(&sums.committed_bytes, counter!("ringtail_wal_committed_bytes_total")),
            commit_duration: histogram!("ringtail_wal_commit_duration_seconds"),
            commit_group_batches: histogram!("ringtail_wal_commit_group_batches"),
            pending_batches: gauge!("ringtail_wal_pending_batches"),
            pending_events: gauge!("ringtail_wal_pending_events"),
            pending_bytes: gauge!("ringtail_wal_pending_bytes"),
            oldest_pending_age: gauge!("ringtail_wal_oldest_pending_age_seconds"),
            disk_bytes: gauge!("ringtail_wal_disk_bytes"),
            disk_limit_bytes: gauge!("ringtail_wal_disk_limit_bytes"),
            free_bytes: gauge!("ringtail_wal_free_bytes"),
            headroom_bytes: gauge!("ringtail_wal_headroom_bytes"),
            capacity_bytes: gauge!("ringtail_wal_capacity_bytes"),
            full: gauge!("ringtail_wal_full"),
            segments: gauge!("ringtail_wal_segments"),
            quarantined_segments: gauge!("ringtail_wal_quarantined_segments"),
            quarantined_stores: gauge!("ringtail_wal_quarantined_stores"),
        }
    }
}

impl ForwardMetrics {
    fn new(sums: &Sums) -> ForwardMetrics {
        for reason in DropReason::ALL {
            // A topic's series begins with its first drop, which no increase would show.
            counter!("ringtail_forward_dropped_events_total", "reason" => reason.as_str()).absolute(0);
        }
        ForwardMetrics {
            enabled: gauge!("ringtail_forward_enabled"),
            connected: gauge!("ringtail_forward_connected"),
            delivered_events: summed(&sums.delivered_events, counter!("ringtail_forward_delivered_events_total")),
            delivered_bytes: counter!("ringtail_forward_delivered_bytes_total"),
            delivery_failures: FailureReason::ALL
                .map(|reason| {
                    (reason, counter!("ringtail_forward_delivery_failures_total", "reason" => reason.as_str()))
                })
                .to_vec(),
            in_flight_events: gauge!("ringtail_forward_in_flight_events"),
            in_flight_bytes: gauge!("ringtail_forward_in_flight_bytes"),
            delivery_delay: histogram!("ringtail_forward_delivery_delay_seconds"),
            parked_events: gauge!("ringtail_forward_parked_events"),
            parked_bytes: gauge!("ringtail_forward_parked_bytes"),
            parked_events_total: ParkReason::ALL
                .map(|reason| (reason, counter!("ringtail_forward_parked_events_total", "reason" => reason.as_str())))
                .to_vec(),
            spilled_events: gauge!("ringtail_forward_spilled_events"),
            spilled_bytes: gauge!("ringtail_forward_spilled_bytes"),
            held_topics: gauge!("ringtail_forward_held_topics"),
            requeued_events: counter!("ringtail_forward_requeued_events_total"),
            dead_letters: ParkReason::ALL
                .map(|reason| {
                    (reason, counter!("ringtail_forward_dead_letter_events_total", "reason" => reason.as_str()))
                })
                .to_vec(),
            parked_dropped_events: ParkedDropReason::ALL
                .map(|reason| {
                    (reason, counter!("ringtail_forward_parked_dropped_events_total", "reason" => reason.as_str()))
                })
                .to_vec(),
            dropped_events_damaged: counter!("ringtail_forward_dropped_events_total", "reason" => "damaged"),
            drain_seconds: gauge!("ringtail_forward_drain_seconds"),
        }
    }

    /// Failed attempts of `reason`, which are retried.
    pub fn delivery_failures(&self, reason: FailureReason) -> &Counter {
        find(&self.delivery_failures, reason)
    }

    /// Events sent on to the dead letter topic for `reason`.
    pub fn dead_letters(&self, reason: ParkReason) -> &Counter {
        find(&self.dead_letters, reason)
    }

    /// Events parked for `reason`.
    pub fn parked_events_total(&self, reason: ParkReason) -> &Counter {
        find(&self.parked_events_total, reason)
    }

    /// Parked events dropped later, for `reason`. Of those that were counted as parked before: not part of the log's books.
    pub fn parked_dropped_events(&self, reason: ParkedDropReason) -> &Counter {
        find(&self.parked_dropped_events, reason)
    }
}

/// A counter that is added to a sum as well: the counters themselves cannot be read.
struct Summed {
    sum: Arc<AtomicU64>,
    counter: Counter,
}

impl CounterFn for Summed {
    fn increment(&self, value: u64) {
        self.sum.fetch_add(value, Ordering::Relaxed);
        self.counter.increment(value);
    }

    fn absolute(&self, _: u64) {
        unreachable!("what is summed is only ever incremented");
    }
}

fn summed(sum: &Arc<AtomicU64>, counter: Counter) -> Counter {
    Counter::from_arc(Arc::new(Summed { sum: sum.clone(), counter }))
}

fn find<R: PartialEq + Copy>(counters: &[(R, Counter)], reason: R) -> &Counter {
    let found = counters.iter().find(|(known, _)| *known == reason);
    &found.expect("ALL lists every reason").1
}

fn describe() {
    describe_gauge!("ringtail_build_info", "Always 1; the version is a label.");
    describe_gauge!("process_start_time_seconds", "When the process began, in seconds since the Unix epoch.");
    describe_gauge!("ringtail_ingest_connections", "Open client connections.");
    describe_gauge!("ringtail_ingest_connections_limit", "Most WebSocket connections that may be open.");
    describe_counter!("ringtail_ingest_connections_opened_total", "Client connections accepted.");
    describe_counter!("ringtail_ingest_connections_closed_total", "Client connections closed, by reason.");
    describe_counter!("ringtail_ingest_received_batches_total", "Decoded requests, before admission.");
    describe_counter!("ringtail_ingest_received_events_total", "Events of decoded requests, before admission.");
    describe_counter!("ringtail_ingest_received_bytes_total", "Bytes of decoded requests, before admission.");
    describe_counter!("ringtail_ingest_rejected_batches_total", "Requests refused and never acked, by reason.");
    describe_counter!(
        "ringtail_ingest_duplicate_batches_total",
        "Retries of batches that were durable before: acked and not stored again."
    );
    describe_histogram!("ringtail_ingest_ack_duration_seconds", "From request read to ack written.");
    describe_counter!("ringtail_wal_committed_batches_total", "Batches made durable.");
    describe_counter!("ringtail_wal_committed_events_total", "Events made durable.");
    describe_counter!("ringtail_wal_committed_bytes_total", "Request bytes made durable.");
    describe_histogram!("ringtail_wal_commit_duration_seconds", "One group commit, sync included.");
    describe_histogram!("ringtail_wal_commit_group_batches", "Batches per group commit.");
    describe_gauge!(
        "ringtail_wal_pending_batches",
        "Backlog: batches committed and not yet delivered, parked or dropped."
    );
    describe_gauge!("ringtail_wal_pending_events", "Backlog in events.");
    describe_gauge!("ringtail_wal_pending_bytes", "Backlog in request bytes.");
    describe_gauge!("ringtail_wal_oldest_pending_age_seconds", "Age of the oldest pending batch.");
    describe_gauge!("ringtail_wal_disk_bytes", "Disk space used by the log.");
    describe_gauge!("ringtail_wal_disk_limit_bytes", "Most disk space that the log may use.");
    describe_gauge!("ringtail_wal_free_bytes", "Free space of the log's file system.");
    describe_gauge!("ringtail_wal_headroom_bytes", "Disk space that the log may still take before it is full.");
    describe_gauge!(
        "ringtail_wal_capacity_bytes",
        "Disk space that a backlog may take in all: less when parked events, or others on the file system, take more."
    );
    describe_gauge!("ringtail_wal_full", "1 while batches are refused for lack of space.");
    describe_gauge!("ringtail_wal_segments", "Segments on disk, prepared spares included.");
    describe_gauge!("ringtail_wal_quarantined_segments", "Damaged segments set aside.");
    describe_gauge!(
        "ringtail_wal_quarantined_stores",
        "Damaged small databases set aside: the cursor's, or a part of the parked events."
    );
    describe_gauge!(
        "ringtail_forward_enabled",
        "1 if there are brokers to forward to, 0 if batches are only collected."
    );
    describe_gauge!("ringtail_forward_connected", "1 while at least one Kafka broker is up.");
    describe_counter!("ringtail_forward_delivered_events_total", "Events acked by Kafka.");
    describe_counter!("ringtail_forward_delivered_bytes_total", "Payload bytes acked by Kafka.");
    describe_counter!(
        "ringtail_forward_delivery_failures_total",
        "Failed delivery attempts, by reason; they are retried or parked."
    );
    describe_gauge!("ringtail_forward_in_flight_events", "Events handed to the Kafka client and not yet acked.");
    describe_gauge!("ringtail_forward_in_flight_bytes", "Bytes handed to the Kafka client and not yet acked.");
    describe_histogram!("ringtail_forward_delivery_delay_seconds", "From commit to delivery.");
    describe_gauge!("ringtail_forward_parked_events", "Dead letters held now.");
    describe_gauge!(
        "ringtail_forward_spilled_events",
        "Events of topics that do not flow, moved out of the log's way; they are part of the backlog."
    );
    describe_gauge!("ringtail_forward_spilled_bytes", "Disk that these events take.");
    describe_counter!(
        "ringtail_forward_requeued_events_total",
        "Parked events put back into the backlog by the operator: pending at start + committed + requeued = delivered + \
         parked + dropped + pending now."
    );
    describe_counter!(
        "ringtail_forward_dead_letter_events_total",
        "Events sent on to forward.dead_letter_topic instead of being parked, by reason; once there, they count as delivered."
    );
    describe_gauge!("ringtail_forward_held_topics", "Topics that Kafka refuses, or takes nothing of.");
    describe_gauge!(
        "ringtail_forward_parked_bytes",
        "Bytes of dead letters held now, what is said about them included."
    );
    describe_counter!("ringtail_forward_parked_events_total", "Events parked, by reason.");
    describe_counter!(
        "ringtail_forward_parked_dropped_events_total",
        "Dead letters dropped after they were parked, by reason: the operator, a limit of forward.parked, or damage of the \
         disk. Each was counted as parked before and left the log's books then, so it is not in \
         ringtail_forward_dropped_events_total."
    );
    describe_counter!(
        "ringtail_forward_dropped_events_total",
        "Events lost after their commit, by reason: a policy that the operator chose, or damage of the disk."
    );
    describe_gauge!(
        "ringtail_forward_drain_seconds",
        "Estimated seconds until the backlog is empty; NaN while it grows."
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_go_over_all_labels() {
        let metrics = Metrics::new();
        for protocol in Protocol::ALL {
            metrics.ingest(protocol).received_events.increment(2);
            metrics.ingest(protocol).rejected_batches(RejectReason::ALL[0]).increment(1);
        }
        metrics.ingest(Protocol::Rest).rejected_batches(RejectReason::ALL[1]).increment(1);
        metrics.forward.delivered_events.increment(5);
        let totals = Totals { received_events: 6, rejected_batches: 4, delivered_events: 5, ..Totals::default() };
        assert_eq!(metrics.totals(), totals);
        let text = metrics.handle().render();
        assert!(text.contains("ringtail_ingest_received_events_total{protocol=\"rest\"} 2\n"), "{text}");
        assert!(text.contains("ringtail_forward_delivered_events_total 5\n"), "{text}");
    }
}
