//! The forwarder against librdkafka's in-process mock cluster. The mock keeps 5 MiB a partition and no more, so the data
//! sets are small.

#[path = "forward/books.rs"]
mod books;
#[path = "support/environment.rs"]
mod environment;
#[path = "forward/live_first.rs"]
mod live_first;
#[path = "forward/parked_books.rs"]
mod parked_books;
#[path = "support/small_log.rs"]
mod small_log;
#[path = "support/turns.rs"]
mod turns;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytesize::ByteSize;
use prost::Message as _;
use rdkafka::bindings::rd_kafka_resp_err_t as Code;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Headers as _;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::RDKafkaApiKey;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use ringtail::batch::{Batch, Client, Request, now_ms};
use ringtail::config::{
    DedupConfig, Delivery, ForwardConfig, KafkaProperty, ParkedConfig, WalConfig, WhenAged, WhenFull, WhenParkedFull,
};
use ringtail::forward::{Forwarder, ParkReason, ParkedDropReason, ParkedEvent, ParkedStore, Requeue, RequeueError};
use ringtail::metrics::Metrics;
use ringtail::proto;
use ringtail::wal::{ParkedBooks, Wal};
use small_log::small_log;

const DEADLINE: Duration = Duration::from_secs(60);
const BATCH_BYTES_MAX: u64 = 4 << 20;

type Cluster = MockCluster<'static, DefaultProducerContext>;

/// A log, a mock cluster, and what one forwarder needs.
struct Setup {
    cluster: Cluster,
    config: ForwardConfig,
    metrics: Arc<Metrics>,
    wal: Wal,
    _directory: tempfile::TempDir,
}

impl Setup {
    fn new() -> Setup {
        Setup::with_log(|_| {})
    }

    /// With a log that was changed.
    fn with_log(edit: impl FnOnce(&mut WalConfig)) -> Setup {
        Setup::with_brokers(1, edit)
    }

    fn with_brokers(brokers: i32, edit: impl FnOnce(&mut WalConfig)) -> Setup {
        let cluster = MockCluster::new(brokers).unwrap();
        let config = ForwardConfig {
            brokers: cluster.bootstrap_servers().split(',').map(str::to_owned).collect(),
            topic: "%s".into(),
            retry_delay_min: Duration::from_millis(10),
            retry_delay_max: Duration::from_millis(50),
            topic_grace: DEADLINE,
            kafka: [
                // An outage of seconds must not make the tests wait for seconds.
                ("reconnect.backoff.max.ms", 50),
                ("reconnect.backoff.ms", 10),
                ("retry.backoff.ms", 10),
                ("topic.metadata.refresh.interval.ms", 100),
            ]
            .map(|(name, value)| (name.to_owned(), KafkaProperty::Integer(value)))
            .into(),
            ..ForwardConfig::default()
        };
        let directory = tempfile::tempdir().unwrap();
        let metrics = Metrics::new();
        let mut wal_config = WalConfig {
            // These tests send equal batches and want to see each of them.
            dedup: DedupConfig { enabled: false, ..DedupConfig::default() },
            ..small_log(directory.path())
        };
        edit(&mut wal_config);
        let wal = Wal::open(&wal_config, 64 << 20, metrics.clone()).unwrap();
        Setup { cluster, config, metrics, wal, _directory: directory }
    }

    /// In a new process, with a log that was changed.
    fn reopened(self, edit: impl FnOnce(&mut WalConfig)) -> Setup {
        self.reopened_with(edit, |_| {})
    }

    /// In a new process, after something was done to the log's directory.
    fn reopened_after(self, between: impl FnOnce(&std::path::Path)) -> Setup {
        self.reopened_with(|_| {}, between)
    }

    fn reopened_with(self, edit: impl FnOnce(&mut WalConfig), between: impl FnOnce(&std::path::Path)) -> Setup {
        self.wal.close();
        let Setup { cluster, config, wal, _directory, .. } = self;
        let mut wal_config = wal.config().clone();
        edit(&mut wal_config);
        drop(wal);
        between(_directory.path());
        let metrics = Metrics::new();
        let wal = Wal::open(&wal_config, 64 << 20, metrics.clone()).unwrap();
        Setup { cluster, config, metrics, wal, _directory }
    }

    fn topic(&self, name: &str, partitions: i32) {
        self.cluster.create_topic(name, partitions, 1).unwrap();
    }

    /// Makes a topic that may not be written.
    fn closed_topic(&self, name: &str) {
        self.topic(name, 1);
        self.close_topic(name);
    }

    /// It may not be written any more.
    fn close_topic(&self, name: &str) {
        self.cluster.topic_error(name, Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED).unwrap();
    }

    /// It may be written now.
    fn open_topic(&self, name: &str) {
        self.cluster.topic_error(name, Code::RD_KAFKA_RESP_ERR_NO_ERROR).unwrap();
    }

    fn start(&self) -> Forwarder {
        Forwarder::start(&self.config, BATCH_BYTES_MAX, self.wal.clone(), self.metrics.clone()).unwrap()
    }

    /// Commits one batch of `client`: events as (type, payload).
    fn send(&self, client: &str, events: &[(&str, Vec<u8>)]) {
        self.send_received_at(now_ms(), client, events);
    }

    fn send_received_at(&self, received_at_ms: u64, client: &str, events: &[(&str, Vec<u8>)]) {
        let events = events
            .iter()
            .map(|(r#type, payload)| proto::Event { r#type: (*r#type).into(), event_bytes: payload.clone().into() })
            .collect();
        let request = proto::SendEventRequest { req_guid: format!("guid-{client}"), events, ..Default::default() };
        let batch = Batch {
            received_at_ms,
            client: Client { group: "group".into(), id: client.into() },
            request: Request::parse(Bytes::from(request.encode_to_vec())).unwrap(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let commit = self.wal.append(batch).unwrap();
        runtime.block_on(commit).unwrap();
    }

    fn wait_for_empty_log(&self, forwarder: &Forwarder) {
        wait_until("the log is empty", || {
            assert!(forwarder.heartbeat_age() < Duration::from_secs(30));
            self.wal.status().is_drained()
        });
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.metrics.handle().render();
        let samples =
            text.lines().filter_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '{'])));
        samples.map(|sample| sample.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap() as u64).sum()
    }

    /// Every committed event is delivered or parked.
    fn assert_books_balance(&self, committed: u64) {
        let delivered = self.metric("ringtail_forward_delivered_events_total");
        let parked = self.metric("ringtail_forward_parked_events_total");
        let dropped = self.metric("ringtail_forward_dropped_events_total");
        let all = delivered + parked + dropped;
        assert_eq!(all, committed, "delivered {delivered}, parked {parked}, dropped {dropped}");
        wait_until("nothing is in flight", || self.metric("ringtail_forward_in_flight_events") == 0);
        let dropped_later = self.metric("ringtail_forward_parked_dropped_events_total");
        assert_eq!(self.metric("ringtail_forward_parked_events") + dropped_later, parked);
    }

    fn parked(&self) -> Vec<ParkedEvent> {
        ParkedStore::open(self.wal.parked()).unwrap().events(0).collect::<Result<_, _>>().unwrap()
    }

    /// Reads all of `topic` from its beginning.
    fn consumer(&self, topic: &str, partitions: i32) -> BaseConsumer {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.cluster.bootstrap_servers())
            .set("group.id", "test")
            .set("enable.auto.commit", "false")
            .create()
            .unwrap();
        let mut assignment = TopicPartitionList::new();
        for partition in 0..partitions {
            assignment.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&assignment).unwrap();
        consumer
    }

    fn headers_of_first(&self, topic: &str) -> HashMap<String, String> {
        let consumer = self.consumer(topic, 1);
        let message = consumer.poll(DEADLINE).expect("a record").unwrap();
        let headers = message.headers().expect("headers").iter();
        let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap().to_vec()).unwrap();
        headers.map(|header| (header.key.to_owned(), text(header.value))).collect()
    }

    /// Reads `topic` until there were `count` records: (key, value), in order per partition.
    fn consume(&self, topic: &str, partitions: i32, count: usize) -> Vec<(Option<String>, Vec<u8>)> {
        let consumer = self.consumer(topic, partitions);
        let mut records = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        while records.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} records in {topic}", records.len());
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(50)) {
                let key = message.key().map(|key| String::from_utf8(key.to_vec()).unwrap());
                records.push((key, message.payload().unwrap().to_vec()));
            }
        }
        records
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn number(at: u64) -> Vec<u8> {
    at.to_be_bytes().to_vec()
}

/// The numbers sent under each key, in the order of arrival.
fn by_key(records: Vec<(Option<String>, Vec<u8>)>) -> HashMap<String, Vec<u64>> {
    let mut numbers: HashMap<String, Vec<u64>> = HashMap::new();
    for (key, value) in records {
        let number = u64::from_be_bytes(value[..8].try_into().unwrap());
        numbers.entry(key.unwrap()).or_default().push(number);
    }
    numbers
}

#[test]
fn events_arrive_once_in_order_per_key_and_the_books_balance() {
    let setup = Setup::new();
    setup.topic("click", 4);
    let forwarder = setup.start();
    for batch in 0..200 {
        let events: Vec<_> = (0..5).map(|at| ("click", number(batch / 10 * 5 + at))).collect();
        setup.send(&format!("device-{}", batch % 10), &events);
    }
    let numbers = by_key(setup.consume("click", 4, 1000));
    assert_eq!(numbers.len(), 10);
    for (key, numbers) in numbers {
        assert_eq!(numbers, (0..100).collect::<Vec<_>>(), "{key}");
    }
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(1000);
    assert_eq!(setup.metric("ringtail_forward_delivered_bytes_total"), 8000);
    assert_eq!(setup.metric("ringtail_forward_delivery_delay_seconds_count"), 200);
    wait_until("a broker is up", || forwarder.status().connected);
    let status = forwarder.status();
    assert_eq!((status.delivered_events, status.in_flight_events, status.brokers), (1000, 0, 1));
    forwarder.stop(DEADLINE);
    setup.send("device-0", &[("click", number(100))]);
    assert_eq!(setup.wal.status().pending_batches, 1);
}

#[test]
fn an_empty_id_makes_no_key_and_an_empty_payload_stays_empty() {
    let setup = Setup::new();
    setup.topic("click", 1);
    let forwarder = setup.start();
    setup.send("", &[("click", Vec::new())]);
    setup.send("", &[]);
    assert_eq!(setup.consume("click", 1, 1), [(None, Vec::new())]);
    setup.wait_for_empty_log(&forwarder);
}

#[test]
fn an_outage_loses_nothing_and_memory_stays_bounded() {
    let mut setup = Setup::new();
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.topic("click", 4);
    let forwarder = setup.start();
    setup.send("a", &[("click", number(0))]);
    wait_until("the first event is delivered", || setup.wal.status().pending_batches == 0);
    turns::take_down(&setup.cluster, 1);
    wait_until("the broker is missed", || !forwarder.status().connected);
    let record_bytes_max = 10 * (300 + 256);
    for batch in 0..500 {
        let events: Vec<_> = (1..=10).map(|at| ("click", [number(batch * 10 + at), vec![0; 200]].concat())).collect();
        setup.send("a", &events);
        assert!(forwarder.status().in_flight_bytes <= (1 << 20) + record_bytes_max);
    }
    // One topic may have a quarter of it.
    wait_until("in flight is full", || forwarder.status().in_flight_bytes >= 1 << 18);
    assert!(forwarder.status().disconnected_since_ms.is_some());
    assert!(forwarder.status().in_flight_events < 5000);
    setup.cluster.broker_up(1).unwrap();
    let numbers = by_key(setup.consume("click", 4, 5001));
    assert_eq!(numbers["a"], (0..=5000).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(5001);
    wait_until("the broker is back", || forwarder.status().connected);
    assert_eq!(forwarder.status().disconnected_since_ms, None);
}

#[test]
fn retriable_refusals_are_retried_in_order() {
    let setup = Setup::new();
    setup.topic("click", 1);
    setup.cluster.request_errors(
        RDKafkaApiKey::Produce,
        &[
            Code::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
            Code::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
            // The client gives these back to us.
            Code::RD_KAFKA_RESP_ERR_UNSUPPORTED_COMPRESSION_TYPE,
            Code::RD_KAFKA_RESP_ERR_POLICY_VIOLATION,
        ],
    );
    for at in 0..100 {
        setup.send("a", &[("click", number(at))]);
    }
    let forwarder = setup.start();
    let numbers = by_key(setup.consume("click", 1, 100));
    assert_eq!(numbers["a"], (0..100).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(100);
    assert!(setup.metric("ringtail_forward_delivery_failures_total{reason=\"other\"}") >= 2);
    assert!(forwarder.status().last_error.is_some_and(|error| error.topic.as_deref() == Some("click")));
}

#[test]
fn what_is_too_large_in_company_is_delivered_alone() {
    let setup = Setup::new();
    setup.topic("click", 1);
    // Refuses the batch, its two halves, and then a quarter: fewer than it takes to refuse an event alone.
    let error = Code::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
    setup.cluster.request_errors(RDKafkaApiKey::Produce, &[error; 3]);
    let events: Vec<_> = (0..64).map(|at| ("click", number(at))).collect();
    setup.send("a", &events);
    let forwarder = setup.start();
    let numbers = by_key(setup.consume("click", 1, 64));
    assert_eq!(numbers["a"], (0..64).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(64);
    assert_eq!(setup.parked(), []);
}

#[test]
fn what_is_too_large_alone_is_parked_whole() {
    let setup = Setup::new();
    setup.topic("click", 1);
    let error = Code::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
    setup.cluster.request_errors(RDKafkaApiKey::Produce, &[error; 2]);
    let payload: Vec<u8> = (0..700_000u32).map(|at| at as u8).collect();
    setup.send("a", &[("click", payload.clone())]);
    let forwarder = setup.start();
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(1);
    let parked = setup.parked();
    assert_eq!(parked.len(), 1);
    assert_eq!(parked[0].payload, payload);
    assert_eq!(parked[0].about.reason, ParkReason::TooLarge);
    assert_eq!(parked[0].about.topic, "click");
    assert_eq!(parked[0].about.key.as_deref(), Some("a"));
    assert_eq!(parked[0].about.req_guid, "guid-a");
    setup.send("a", &[("click", number(1))]);
    assert_eq!(setup.consume("click", 1, 1), [(Some("a".into()), number(1))]);
    assert_eq!(forwarder.parked().count(), 1);
}

#[test]
fn an_invalid_topic_is_parked_and_the_others_flow() {
    let setup = Setup::new();
    setup.topic("click", 1);
    let forwarder = setup.start();
    setup.send("a", &[("click", number(0)), ("not a topic", number(1)), ("click", number(2)), ("", number(3))]);
    let numbers = by_key(setup.consume("click", 1, 2));
    assert_eq!(numbers["a"], [0, 2]);
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(4);
    let parked = setup.parked();
    assert!(parked.iter().all(|event| event.about.reason == ParkReason::InvalidTopic));
    assert_eq!(parked.iter().map(|event| event.payload.to_vec()).collect::<Vec<_>>(), [number(1), number(3)]);
    assert_eq!(setup.metric("ringtail_forward_delivered_bytes_total"), 16);
}

#[test]
fn a_forbidden_topic_is_held_in_order_while_the_others_flow() {
    let setup = Setup::new();
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    for at in 0..50 {
        setup.send("a", &[("closed", number(at)), ("open", number(at))]);
    }
    assert_eq!(by_key(setup.consume("open", 1, 50))["a"], (0..50).collect::<Vec<_>>());
    wait_until("the topic is held", || forwarder.status().held_topics == 1);
    assert!(setup.wal.status().pending_batches > 0);
    setup.open_topic("closed");
    assert_eq!(by_key(setup.consume("closed", 1, 50))["a"], (0..50).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(100);
    assert_eq!(setup.parked(), []);
    wait_until("no topic is held", || forwarder.status().held_topics == 0);
}

/// Sends 4 MB of one topic, which is several times what may be in flight, and little of another.
fn send_much_of(setup: &Setup, topic: &str, numbers: std::ops::Range<u64>) {
    for at in numbers {
        setup.send("a", &[(topic, [number(at), vec![7; 10_000]].concat()), ("open", number(at))]);
    }
}

/// Runs `ringtail backlog` on the log in `directory`. What it printed, and what it said on the side.
fn backlog(directory: &std::path::Path, arguments: &[&str]) -> (String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ringtail"));
    let output = turns::output(command.arg("backlog").args(arguments).arg("--directory").arg(directory)).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {said}");
    (String::from_utf8(output.stdout).unwrap(), said)
}

/// A time window of `forward.pace` that begins and ends so many hours from now.
fn window(from: i64, until: i64) -> ringtail::config::TimeWindow {
    let now = jiff::Zoned::now().time();
    let hours = |hours: i64| now.wrapping_add(jiff::Span::new().hours(hours)).strftime("%H:%M").to_string();
    format!("{}-{}", hours(from), hours(until)).parse().unwrap()
}

/// One that is closed for hours.
fn closed_window() -> ringtail::config::TimeWindow {
    window(2, 3)
}

fn without_failures(setup: &Setup, forwarder: &Forwarder, moved_events: u64) {
    wait_until("the topic is out of the way", || {
        assert!(forwarder.heartbeat_age() < Duration::from_secs(30));
        assert!(forwarder.status().in_flight_bytes <= (1 << 20) + 20_000);
        let status = forwarder.status();
        status.spilled_events > 0 && status.spilled_events + status.in_flight_events == moved_events
    });
    // Both are read one after the other, and the log counts what is delivered only when everything before has left it.
    wait_until("the books to balance", || {
        let delivered = setup.metric("ringtail_forward_delivered_events_total");
        let committed = setup.metric("ringtail_wal_committed_events_total");
        delivered > 0 && delivered + setup.wal.status().pending_events == committed
    });
    assert_eq!(setup.metric("ringtail_forward_parked_events_total"), 0);
}

#[test]
fn a_forbidden_topic_moves_out_of_the_way_and_comes_back_in_order() {
    let mut setup = Setup::new();
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    send_much_of(&setup, "closed", 0..400);
    assert_eq!(by_key(setup.consume("open", 1, 400))["a"], (0..400).collect::<Vec<_>>());
    without_failures(&setup, &forwarder, 400);
    wait_until("the status names the topic", || {
        let held = forwarder.status().held;
        let is_named = held.len() == 1 && held[0].topic == "closed" && held[0].spilled_events > 0;
        is_named && held[0].error.as_deref().is_some_and(|error| error.contains("uthoriz"))
    });

    // The next process goes on, and what comes then queues up behind.
    forwarder.stop(Duration::from_secs(1));
    drop(forwarder);
    let forwarder = setup.start();
    send_much_of(&setup, "closed", 400..420);
    wait_until("the rest flows", || {
        let status = forwarder.status();
        status.held_topics == 1 && status.spilled_events + status.in_flight_events == 420
    });
    setup.open_topic("closed");
    assert_eq!(by_key(setup.consume("closed", 1, 420))["a"], (0..420).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(840);
    wait_until("no topic is held", || forwarder.status().held_topics == 0);
    assert_eq!(forwarder.status().spilled_events, 0);
}

#[test]
fn a_topic_without_a_leader_moves_out_of_the_way_and_comes_back_once() {
    let mut setup = Setup::with_brokers(2, |_| {});
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    for (topic, broker) in [("open", 1), ("stuck", 2)] {
        setup.topic(topic, 1);
        setup.cluster.partition_leader(topic, 0, Some(broker)).unwrap();
    }
    let forwarder = setup.start();
    send_much_of(&setup, "stuck", 0..1);
    setup.wait_for_empty_log(&forwarder);
    turns::take_down(&setup.cluster, 2);
    send_much_of(&setup, "stuck", 1..400);
    assert_eq!(by_key(setup.consume("open", 1, 400))["a"], (0..400).collect::<Vec<_>>());
    without_failures(&setup, &forwarder, 399);
    setup.cluster.broker_up(2).unwrap();
    assert_eq!(by_key(setup.consume("stuck", 1, 400))["a"], (0..400).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(800);
    wait_until("no topic is held", || forwarder.status().held_topics == 0);
}

#[test]
fn a_spilled_topic_is_parked_after_its_grace() {
    let mut setup = Setup::new();
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.config.topic_grace = Duration::from_secs(2);
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    send_much_of(&setup, "closed", 0..300);
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(600);
    let numbers: Vec<u64> =
        setup.parked().iter().map(|event| u64::from_be_bytes(*event.payload.first_chunk().unwrap())).collect();
    assert_eq!(numbers, (0..300).collect::<Vec<_>>());
    let parked = &setup.parked()[299].about;
    assert_eq!((parked.topic.as_str(), parked.key.as_deref(), parked.group.as_str()), ("closed", Some("a"), "group"));
    assert_eq!(forwarder.status().spilled_events, 0);
}

#[test]
fn an_unknown_topic_is_parked_after_its_grace_and_recovers() {
    let mut setup = Setup::new();
    setup.config.topic_grace = Duration::from_millis(300);
    setup.topic("open", 1);
    setup.cluster.topic_error("late", Code::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART).unwrap();
    let forwarder = setup.start();
    for at in 0..50 {
        setup.send("a", &[("late", number(at)), ("open", number(at))]);
    }
    assert_eq!(by_key(setup.consume("open", 1, 50))["a"], (0..50).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    let parked = setup.parked();
    assert!(parked.iter().all(|event| event.about.reason == ParkReason::UnknownTopic));
    assert_eq!(
        parked.iter().map(|event| event.payload.to_vec()).collect::<Vec<_>>(),
        (0..50).map(number).collect::<Vec<_>>()
    );
    setup.assert_books_balance(100);

    setup.cluster.topic_error("late", Code::RD_KAFKA_RESP_ERR_NO_ERROR).unwrap();
    let mut sent = 100;
    wait_until("the topic takes events again", || {
        sent += 1;
        setup.send("a", &[("late", number(sent))]);
        setup.wait_for_empty_log(&forwarder);
        setup.metric("ringtail_forward_delivered_events_total") > 50
    });
    setup.assert_books_balance(sent);
}

#[test]
fn a_broken_producer_is_replaced() {
    let setup = Setup::new();
    setup.topic("click", 1);
    let error = Code::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED;
    setup.cluster.request_errors(RDKafkaApiKey::InitProducerId, &[error; 3]);
    for at in 0..100 {
        setup.send("a", &[("click", number(at)), ("no topic", number(at))]);
    }
    let forwarder = setup.start();
    let numbers = by_key(setup.consume("click", 1, 100));
    assert_eq!(numbers["a"], (0..100).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    assert!(setup.metric("ringtail_forward_delivery_failures_total{reason=\"producer_fatal\"}") >= 1);
    assert_eq!(setup.metric("ringtail_forward_delivered_events_total"), 100);
    assert_eq!(setup.metric("ringtail_forward_parked_events_total"), 100);
}

#[test]
fn a_stop_keeps_its_deadline_and_the_next_start_goes_on() {
    let setup = Setup::new();
    setup.topic("click", 1);
    let forwarder = setup.start();
    setup.send("a", &[("click", number(0))]);
    setup.wait_for_empty_log(&forwarder);
    turns::take_down(&setup.cluster, 1);
    for at in 1..20 {
        setup.send("a", &[("click", number(at))]);
    }
    let begun = Instant::now();
    forwarder.stop(Duration::from_secs(1));
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!(setup.wal.status().pending_batches, 19);
    setup.cluster.broker_up(1).unwrap();
    let forwarder = setup.start();
    assert_eq!(by_key(setup.consume("click", 1, 20))["a"], (0..20).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
}

/// Sends batches of one event of 100 KB, each with its number, alternating between two types.
fn send_numbered(setup: &Setup, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let mut payload = number.to_be_bytes().to_vec();
        payload.resize(100_000, 0);
        setup.send("client", &[(["even", "odd"][number as usize % 2], payload)]);
    }
}

fn number_of(payload: &[u8]) -> u32 {
    u32::from_be_bytes(*payload.first_chunk().unwrap())
}

#[test]
fn a_full_log_drops_the_oldest_if_told_to_and_counts_every_event() {
    let setup = Setup::with_log(|log| {
        log.when_full = WhenFull::DropOldest;
        // Room for little more than the segment in use and the two spares.
        log.bytes_max = ByteSize::mib(50);
    });
    for topic in ["even", "odd"] {
        setup.topic(topic, 1);
    }
    turns::take_down(&setup.cluster, -1);
    let forwarder = setup.start();
    // Twice what fits. No commit is refused, `send` checks that.
    send_numbered(&setup, 0..800);
    let topics =
        |topic| setup.metric(&format!("ringtail_forward_dropped_events_total{{reason=\"full\",topic=\"{topic}\"}}"));
    // What is left is the end of the log, without a gap.
    let dropped = || setup.metric("ringtail_forward_dropped_events_total") as u32;
    wait_until("nothing more is dropped", || {
        // Only looks: a segment may go while it is read, and that is no loss.
        let (before, mut reader) = (dropped(), setup.wal.peek());
        let left = std::iter::from_fn(|| reader.next_record().unwrap());
        let left: Vec<u32> =
            left.map(|record| number_of(record.batch.request.events().next().unwrap().payload)).collect();
        before > 300 && left == (before..800).collect::<Vec<_>>() && before == dropped()
    });
    setup.cluster.broker_up(-1).unwrap();
    setup.wait_for_empty_log(&forwarder);
    let (even, odd) = (topics("even"), topics("odd"));
    assert!(even.abs_diff(odd) <= 1, "{even} and {odd}");
    setup.assert_books_balance(800);
    assert_eq!(setup.metric("ringtail_forward_delivered_events_total"), 800 - even - odd);
}

#[test]
fn a_full_log_without_brokers_drops_the_oldest_as_well() {
    let mut setup = Setup::with_log(|log| {
        log.when_full = WhenFull::DropOldest;
        log.bytes_max = ByteSize::mib(50);
    });
    setup.config.brokers.clear();
    let _forwarder = setup.start();
    send_numbered(&setup, 0..800);
    wait_until("the books balance", || {
        let dropped = setup.metric("ringtail_forward_dropped_events_total");
        dropped > 300 && dropped + setup.wal.status().pending_events == 800
    });
    assert_eq!(setup.metric("ringtail_forward_delivered_events_total"), 0);
}

#[test]
fn batches_that_are_too_old_are_dropped_or_parked() {
    for (when_aged, brokers) in
        [(WhenAged::Drop, true), (WhenAged::Park, true), (WhenAged::Drop, false), (WhenAged::Park, false)]
    {
        let mut setup = Setup::with_log(|log| {
            log.age_max = Duration::from_secs(3600);
            log.when_aged = when_aged;
        });
        setup.topic("t", 1);
        if !brokers {
            setup.config.brokers.clear();
        }
        let two_hours_ago = now_ms() - 7_200_000;
        for number in 0..10u8 {
            setup.send_received_at(two_hours_ago, "client", &[("t", vec![number]), ("old", vec![number])]);
        }
        for number in 10..20u8 {
            setup.send("client", &[("t", vec![number])]);
        }
        let forwarder = setup.start();
        let fresh = if brokers { 0 } else { 10 };
        wait_until("the old ones are gone", || setup.wal.status().pending_batches == fresh);
        let expired = |name: &str, topic: &str| setup.metric(&format!("{name}{{reason=\"expired\"{topic}}}"));
        match when_aged {
            WhenAged::Drop => {
                for topic in ["t", "old"] {
                    let topic = format!(",topic=\"{topic}\"");
                    assert_eq!(expired("ringtail_forward_dropped_events_total", &topic), 10);
                }
            }
            WhenAged::Park => {
                assert_eq!(expired("ringtail_forward_parked_events_total", ""), 20);
                let parked = setup.parked();
                assert_eq!(parked.len(), 20);
                assert!(parked.iter().all(|event| event.about.reason == ParkReason::Expired));
            }
        }
        setup.assert_books_balance(30 - fresh);
        if brokers {
            let arrived: Vec<_> = setup.consume("t", 1, 10).into_iter().map(|(_, value)| value[0]).collect();
            assert_eq!(arrived, (10..20).collect::<Vec<_>>());
        }
        forwarder.stop(DEADLINE);
    }
}

#[test]
fn what_grows_old_in_flight_is_dropped_without_a_broker() {
    let setup = Setup::with_log(|log| log.age_max = Duration::from_secs(1));
    setup.topic("t", 1);
    turns::take_down(&setup.cluster, -1);
    let forwarder = setup.start();
    setup.send("client", &[("t", vec![1])]);
    wait_until("it is in flight", || setup.metric("ringtail_forward_in_flight_events") == 1);
    wait_until("it is dropped", || setup.metric("ringtail_forward_dropped_events_total") == 1);
    setup.cluster.broker_up(-1).unwrap();
    setup.send("client", &[("t", vec![2])]);
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(2);
    assert_eq!(setup.consume("t", 1, 1)[0].1, [2]);
}

#[test]
fn what_was_spilled_for_too_long_is_dropped_or_parked() {
    for (when_aged, delivery) in [
        (WhenAged::Drop, Delivery::AtLeastOnce),
        (WhenAged::Park, Delivery::AtLeastOnce),
        (WhenAged::Drop, Delivery::ExactlyOnce),
        (WhenAged::Park, Delivery::ExactlyOnce),
    ] {
        println!("{when_aged:?}, {delivery:?}");
        let mut setup = exactly_once();
        setup.config.delivery = delivery;
        setup.config.in_flight_bytes_max = ByteSize::mib(1);
        setup.topic("open", 1);
        setup.closed_topic("closed");
        let forwarder = setup.start();
        let two_hours_ago = now_ms() - 7_200_000;
        for at in 0..400 {
            let received_at_ms = if at < 300 { two_hours_ago } else { now_ms() };
            let events = [("closed", [number(at), vec![7; 10_000]].concat()), ("open", number(at))];
            setup.send_received_at(received_at_ms, "a", &events);
        }
        let held_are = |forwarder: &Forwarder, spilled_min, events| {
            let status = forwarder.status();
            status.spilled_events >= spilled_min && status.spilled_events + status.in_flight_events == events
        };
        wait_until("the topic is out of the way", || held_are(&forwarder, 300, 400));
        forwarder.stop(Duration::from_secs(5));
        drop(forwarder);
        let pending = setup.wal.status().pending_events;

        let setup = setup.reopened(|log| {
            log.age_max = Duration::from_secs(3600);
            log.when_aged = when_aged;
        });
        let forwarder = setup.start();
        let name = match when_aged {
            WhenAged::Drop => "ringtail_forward_dropped_events_total{reason=\"expired\",topic=\"closed\"}",
            WhenAged::Park => "ringtail_forward_parked_events_total{reason=\"expired\"}",
        };
        wait_until("the old ones are gone", || setup.metric(name) == 300);
        wait_until("the others are kept", || held_are(&forwarder, 0, 100));
        let parked = if when_aged == WhenAged::Park { 300 } else { 0 };
        assert_eq!(setup.parked().len(), parked);
        setup.open_topic("closed");
        assert_eq!(by_key(setup.consume("closed", 1, 100))["a"], (300..400).collect::<Vec<_>>());
        setup.wait_for_empty_log(&forwarder);
        setup.assert_books_balance(pending);

        // What an operator puts back is not too old again.
        if when_aged == WhenAged::Park {
            forwarder.requeuer().requeue(&setup.parked(), None).unwrap();
            assert_eq!(by_key(setup.consume("closed", 1, 400))["a"], (300..400).chain(0..300).collect::<Vec<_>>());
        }
        forwarder.stop(DEADLINE);
    }
}

#[test]
fn what_is_spilled_and_grows_old_in_the_client_is_dropped() {
    let mut setup = Setup::with_brokers(2, |_| {});
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.topic("stuck", 1);
    setup.cluster.partition_leader("stuck", 0, Some(2)).unwrap();
    let forwarder = setup.start();
    setup.send("a", &[("stuck", number(0))]);
    setup.wait_for_empty_log(&forwarder);
    turns::take_down(&setup.cluster, 2);
    // The first ones are soon too old. What follows is not for long: nothing of the log asks for an end.
    let received_at_ms = now_ms() - 90_000;
    for at in 1..=400 {
        let received_at_ms = if at <= 300 { received_at_ms } else { now_ms() };
        setup.send_received_at(received_at_ms, "a", &[("stuck", [number(at), vec![7; 10_000]].concat())]);
    }
    wait_until("the topic is out of the way", || forwarder.status().spilled_events >= 300);
    forwarder.stop(Duration::from_secs(5));
    drop(forwarder);

    // With so much room in the client that nothing of the spill needs to make some.
    setup.config.in_flight_bytes_max = ForwardConfig::default().in_flight_bytes_max;
    let setup = setup.reopened(|log| log.age_max = Duration::from_secs(100));
    let forwarder = setup.start();
    wait_until("the old ones are gone", || setup.metric("ringtail_forward_dropped_events_total") == 300);
    setup.cluster.broker_up(2).unwrap();
    let expected: Vec<u64> = [0].into_iter().chain(301..=400).collect();
    assert_eq!(by_key(setup.consume("stuck", 1, 101))["a"], expected);
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(400);
}

fn exactly_once() -> Setup {
    let mut setup = Setup::new();
    setup.config.delivery = Delivery::ExactlyOnce;
    setup.config.commit_interval = Duration::from_millis(50);
    setup.topic("ringtail-cursors", 1);
    setup
}

#[test]
fn transactions_carry_the_cursor() {
    let setup = exactly_once();
    setup.topic("click", 2);
    let forwarder = setup.start();
    for at in 0..500 {
        setup.send("a", &[("click", number(at)), ("not a topic", number(at))]);
    }
    assert_eq!(by_key(setup.consume("click", 2, 500))["a"], (0..500).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(1000);
    wait_until("the broker is counted", || forwarder.status().brokers > 0);
    assert_eq!(forwarder.status().brokers, 1, "its coordinator is no other one");
    forwarder.stop(Duration::from_secs(5));
    let cursors = setup.consume("ringtail-cursors", 1, 1);
    let id = format!("ringtail-{}", setup.wal.id());
    assert_eq!(cursors[0].0.as_deref(), Some(id.as_str()));

    // The next one takes over, and goes on where that one was.
    drop(forwarder);
    let forwarder = setup.start();
    setup.send("a", &[("click", number(500))]);
    assert_eq!(by_key(setup.consume("click", 2, 501))["a"], (0..=500).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
}

#[test]
fn a_topic_that_fails_its_transaction_is_worked_off_beside_the_others() {
    let setup = exactly_once();
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    for at in 0..50 {
        setup.send("a", &[("closed", number(at)), ("open", number(at)), ("not a topic", number(at))]);
    }
    wait_until("the rest is delivered and the cursor passed it", || {
        assert!(forwarder.heartbeat_age() < Duration::from_secs(30));
        setup.metric("ringtail_forward_delivered_events_total") == 50 && setup.wal.status().pending_events == 50
    });
    assert_eq!((forwarder.status().held_topics, forwarder.status().spilled_events), (1, 50));
    setup.open_topic("closed");
    assert_eq!(by_key(setup.consume("closed", 1, 50))["a"], (0..50).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(150);
    // Also of transactions that were aborted and repeated.
    let parked: Vec<Vec<u8>> = setup.parked().iter().map(|event| event.payload.to_vec()).collect();
    assert_eq!(parked, (0..50).map(number).collect::<Vec<_>>());
    wait_until("no topic is held", || forwarder.status().held_topics == 0);
}

#[test]
fn a_busy_topic_that_failed_its_transaction_catches_up_in_order() {
    let setup = exactly_once();
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    let mut sent = 0;
    let mut send = || {
        setup.send("a", &[("closed", number(sent)), ("open", number(sent))]);
        sent += 1;
    };
    wait_until("events of it go to disk", || {
        send();
        forwarder.status().spilled_events > 20
    });
    setup.open_topic("closed");
    // There is never a transaction's time without a new event.
    wait_until("it is no longer held", || {
        send();
        forwarder.status().held_topics == 0
    });
    send();
    assert_eq!(by_key(setup.consume("closed", 1, sent as usize))["a"], (0..sent).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(2 * sent);
    assert_eq!(forwarder.status().held_topics, 0);
    forwarder.stop(DEADLINE);
}

#[test]
fn parked_events_over_the_limits_go_and_are_counted_apart() {
    let mut setup = Setup::new();
    let limits = |bytes_max, age_max| ParkedConfig { bytes_max, when_full: WhenParkedFull::DropOldest, age_max };
    setup.config.parked = limits(ByteSize::kib(100), Duration::ZERO);
    let forwarder = setup.start();
    for _ in 0..20 {
        setup.send("client", &[("not a topic", vec![7; 10_000])]);
    }
    setup.wait_for_empty_log(&forwarder);
    let dropped =
        |reason: &str| setup.metric(&format!("ringtail_forward_parked_dropped_events_total{{reason=\"{reason}\"}}"));
    wait_until("enough is dropped", || setup.metric("ringtail_forward_parked_bytes") <= 100 << 10);
    let store = forwarder.parked();
    assert_eq!((store.count(), store.ever(), dropped("parked_full")), (9, 20, 11));
    assert_eq!(setup.parked().iter().map(|event| event.id).collect::<Vec<_>>(), (12..=20).collect::<Vec<_>>());
    setup.assert_books_balance(20);

    // While the forwarder parks, the operator drops.
    setup.send("client", &[("not a topic", vec![8])]);
    store.drop_events(&[12, 13], ParkedDropReason::Operator).unwrap();
    setup.wait_for_empty_log(&forwarder);
    assert_eq!((store.count(), dropped("operator")), (8, 2));
    setup.assert_books_balance(21);
    assert_eq!(setup.wal.parked_notes().noted().books, ParkedBooks { ever: 21, removed: 13 });
    forwarder.stop(DEADLINE);
    drop(forwarder);

    let text = setup.metrics.handle().render();
    assert!(!text.contains("ringtail_forward_dropped_events_total{reason=\"operator"), "{text}");
    let expired = ParkedStore::open(setup.wal.parked()).unwrap();
    assert_eq!(expired.count(), 8);
    // A second from when the last one was parked.
    setup.config.parked = limits(ByteSize::b(0), Duration::from_secs(1));
    let forwarder = setup.start();
    wait_until("all are too old", || forwarder.parked().count() == 0);
    let dropped = setup.metric("ringtail_forward_parked_dropped_events_total{reason=\"parked_expired\"}");
    assert_eq!((dropped, setup.metric("ringtail_forward_dropped_events_total")), (8, 0));
    assert_eq!(forwarder.parked().ever(), 21);
    forwarder.stop(DEADLINE);
}

#[test]
fn requeued_events_are_delivered_in_order_also_to_another_topic() {
    let mut setup = Setup::new();
    setup.config.topic_grace = Duration::from_millis(300);
    setup.topic("other", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    for at in 0..20 {
        setup.send("a", &[("closed", number(at)), ("not a topic", number(at))]);
    }
    wait_until("all is parked", || forwarder.status().parked_events == 40);
    let requeuer = forwarder.requeuer();
    let parked = |topic: &str| -> Vec<ParkedEvent> {
        forwarder.parked().events(0).map(Result::unwrap).filter(|event| event.about.topic == topic).collect()
    };
    let remove = |events: &[ParkedEvent]| {
        let ids: Vec<u64> = events.iter().map(|event| event.id).collect();
        forwarder.parked().remove(&ids).unwrap();
    };
    let nameless = parked("not a topic");
    let error = requeuer.requeue(&nameless, None).unwrap_err();
    assert!(matches!(error, RequeueError::Topic { ref topic } if topic == "not a topic"), "{error}");
    requeuer.requeue(&nameless, Some("other")).unwrap();
    remove(&nameless);
    assert_eq!(by_key(setup.consume("other", 1, 20))["a"], (0..20).collect::<Vec<_>>());

    setup.open_topic("closed");
    let refused = parked("closed");
    requeuer.requeue(&refused, None).unwrap();
    remove(&refused);
    setup.send("a", &[("closed", number(20))]);
    assert_eq!(by_key(setup.consume("closed", 1, 21))["a"], (0..21).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.metric("ringtail_forward_requeued_events_total"), 40);
    assert_eq!(setup.metric("ringtail_forward_delivered_events_total"), 41);
    assert_eq!((forwarder.status().parked_events, forwarder.status().spilled_events), (0, 0));
}

#[test]
fn dead_letters_go_to_their_topic_with_the_reason() {
    let mut setup = Setup::new();
    setup.config.dead_letter_topic = "dead".into();
    setup.topic("dead", 1);
    setup.topic("click", 1);
    let forwarder = setup.start();
    for at in 0..30 {
        setup.send("a", &[("not a topic", number(at)), ("click", number(at))]);
    }
    assert_eq!(by_key(setup.consume("dead", 1, 30))["a"], (0..30).collect::<Vec<_>>());
    assert_eq!(by_key(setup.consume("click", 1, 30))["a"], (0..30).collect::<Vec<_>>());
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(60);
    assert_eq!(setup.metric("ringtail_forward_dead_letter_events_total"), 30);
    assert_eq!(setup.parked(), []);
    let headers = setup.headers_of_first("dead");
    assert_eq!(headers["ringtail.reason"], "invalid_topic");
    assert_eq!(headers["ringtail.topic"], "not a topic");
    assert_eq!((headers["ringtail.sequence"].as_str(), headers["ringtail.connection_id"].as_str()), ("1", "a"));
}

#[test]
fn a_dead_letter_topic_that_is_refused_parks_what_it_was_sent() {
    let mut setup = Setup::new();
    setup.config.dead_letter_topic = "dead".into();
    setup.config.topic_grace = Duration::from_millis(300);
    setup.closed_topic("dead");
    let forwarder = setup.start();
    for at in 0..10 {
        setup.send("a", &[("not a topic", number(at))]);
    }
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(10);
    let parked = setup.parked();
    let numbers: Vec<Vec<u8>> = parked.iter().map(|event| event.payload.to_vec()).collect();
    assert_eq!(numbers, (0..10).map(number).collect::<Vec<_>>());
    assert_eq!((parked[0].about.topic.as_str(), parked[0].about.reason), ("dead", ParkReason::NotAuthorised));
}

#[test]
fn outside_its_windows_nothing_is_forwarded() {
    let mut setup = Setup::new();
    setup.config.pace.windows = vec![closed_window()];
    setup.topic("click", 1);
    let forwarder = setup.start();
    setup.send("a", &[("click", number(0))]);
    wait_until("kafka is there", || forwarder.status().connected);
    assert_eq!((forwarder.status().delivered_events, forwarder.status().in_flight_events), (0, 0));
    forwarder.stop(Duration::from_secs(5));
    drop(forwarder);
    setup.config.pace.windows.push(window(-2, 2));
    let forwarder = setup.start();
    assert_eq!(setup.consume("click", 1, 1)[0].1, number(0));
    setup.wait_for_empty_log(&forwarder);
}

/// A segment that the disk does not read, until this is dropped.
struct BrokenSegment(std::path::PathBuf);

impl BrokenSegment {
    fn new(setup: &Setup, id: u64) -> BrokenSegment {
        let path = setup._directory.path().join(format!("wal/{id:012}/db"));
        std::fs::rename(&path, path.with_extension("whole")).unwrap();
        // Too many symbolic links: no damage, and not missing.
        std::os::unix::fs::symlink("db", &path).unwrap();
        BrokenSegment(path)
    }
}

impl Drop for BrokenSegment {
    fn drop(&mut self) {
        std::fs::rename(self.0.with_extension("whole"), &self.0).unwrap();
    }
}

#[test]
fn a_log_that_cannot_be_read_outside_its_windows_is_reported_and_retried_with_patience() {
    let setup = Setup::new();
    setup.topic("click", 1);
    for at in 0..150 {
        setup.send("a", &[("click", [number(at), vec![7; 100_000]].concat())]);
    }
    let mut setup = setup.reopened(|_| {});
    setup.config.pace.windows = vec![closed_window()];
    let broken = BrokenSegment::new(&setup, 1);
    let forwarder = setup.start();
    wait_until("it is reported", || forwarder.status().last_error.is_some());
    drop(broken);
    setup.config.pace.windows.clear();
    forwarder.reload(&setup.config);
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.metric("ringtail_forward_delivered_events_total"), 150);
    forwarder.stop(DEADLINE);
}

#[test]
fn what_is_spilled_is_part_of_an_export() {
    let mut setup = Setup::new();
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    send_much_of(&setup, "closed", 0..300);
    without_failures(&setup, &forwarder, 300);
    forwarder.stop(Duration::from_secs(5));
    drop(forwarder);
    setup.wal.close();
    let Setup { wal, _directory: directory, .. } = setup;
    drop(wal);
    let (export, _) = backlog(directory.path(), &["export", "--type", "closed"]);
    let lines = export.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let sequences: Vec<u64> = lines.map(|line| line["sequence"].as_u64().unwrap()).collect();
    assert_eq!(sequences, (1..=300).collect::<Vec<_>>(), "each event once, in order");
    let status: serde_json::Value = serde_json::from_str(&backlog(directory.path(), &["status", "--json"]).0).unwrap();
    assert!(status["pending_events"].as_u64().unwrap() >= 300, "{status}");
}

/// A log that begins anew uses the sequences of what is in the spill again.
#[test]
fn what_is_spilled_is_part_of_an_export_also_when_the_log_was_lost() {
    let mut setup = Setup::new();
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    send_much_of(&setup, "closed", 0..300);
    without_failures(&setup, &forwarder, 300);
    let spilled = forwarder.status().spilled_events;
    forwarder.stop(Duration::from_secs(5));
    drop(forwarder);
    let setup = setup.reopened_after(|directory| {
        ["meta", "wal"].iter().for_each(|name| std::fs::remove_dir_all(directory.join(name)).unwrap());
    });
    let forwarder = setup.start();
    wait_until("the topic goes on from the spill", || forwarder.status().held_topics == 1);
    forwarder.stop(Duration::from_secs(5));
    drop(forwarder);
    for at in 300..700 {
        setup.send("a", &[("closed", number(at))]);
    }
    setup.wal.close();
    let Setup { wal, _directory: directory, .. } = setup;
    drop(wal);
    let (export, _) = backlog(directory.path(), &["export", "--type", "closed"]);
    assert_eq!(export.lines().count() as u64, spilled + 400);
}

#[test]
fn a_reload_changes_the_topic_of_what_comes_and_the_pace() {
    let mut setup = Setup::new();
    ["click", "new-click", "new-closed"].iter().for_each(|topic| setup.topic(topic, 1));
    setup.closed_topic("closed");
    let forwarder = setup.start();
    setup.send("a", &[("click", number(0)), ("closed", number(0))]);
    wait_until("the topic is held", || forwarder.status().held_topics == 1);

    setup.config.topic = "new-%s".into();
    setup.config.pace.windows = vec![closed_window()];
    let wait_for_a_turn = || {
        let asked_at = Instant::now();
        wait_until("the loop has turned", || forwarder.heartbeat_age() < asked_at.elapsed());
    };
    forwarder.reload(&setup.config);
    wait_for_a_turn();
    setup.send("a", &[("click", number(1)), ("closed", number(1))]);
    wait_for_a_turn();
    wait_for_a_turn();
    assert!(forwarder.status().in_flight_events <= 2, "outside the window nothing is read");

    setup.config.pace.windows.clear();
    forwarder.reload(&setup.config);
    assert_eq!(setup.consume("new-click", 1, 1)[0].1, number(1));
    assert_eq!(setup.consume("new-closed", 1, 1)[0].1, number(1));
    setup.open_topic("closed");
    assert_eq!(setup.consume("closed", 1, 1)[0].1, number(0), "what was held keeps its topic");
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(4);
}
