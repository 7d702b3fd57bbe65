//! A mock of Kafka in the test, and what it was given. One of its topics can be closed: then it refuses events.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::RDKafkaRespErr as Code;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::disk::Disk;
use crate::http::{status, wait_until};
use crate::load::{BAD_TYPE, Clients, GOOD_TYPE, HELD_TYPE, Load, Name};
use crate::process::turns;
use crate::process::{Addresses, Options};

/// Many, because each keeps 5 MiB and no more.
const PARTITIONS: usize = 64;
const TOPICS: [&str; 2] = [GOOD_TYPE, HELD_TYPE];

/// Where each partition of each topic is read on.
type Offsets = [[i64; PARTITIONS]; TOPICS.len()];

/// Events that arrived, and how long the journal was when they were seen.
pub type Deliveries = HashMap<(Name, usize), usize>;

/// A broker with one topic.
pub struct Kafka {
    cluster: MockCluster<'static, DefaultProducerContext>,
    load: Arc<Load>,
    disk: Arc<Disk>,
    reader: Option<Reader>,
    offsets: Offsets,
    /// The topic of [`HELD_TYPE`] is closed.
    is_closed: bool,
    deliveries: Arc<Mutex<Deliveries>>,
}

/// Reads all the time while the broker is up, because the mock keeps only the last 5 MiB of a partition.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Offsets>,
}

impl Kafka {
    /// Starts the broker, which is away.
    pub fn start(load: &Arc<Load>, disk: &Arc<Disk>) -> Kafka {
        let kafka = Kafka::make(load, disk);
        turns::take_down(&kafka.cluster, 1);
        kafka
    }

    /// Starts the broker, which refuses the topic of [`HELD_TYPE`].
    pub fn start_closed(load: &Arc<Load>, disk: &Arc<Disk>) -> Kafka {
        let mut kafka = Kafka::make(load, disk);
        kafka.set_closed(true);
        kafka
    }

    fn make(load: &Arc<Load>, disk: &Arc<Disk>) -> Kafka {
        let cluster = MockCluster::new(1).expect("start the mock");
        for topic in TOPICS {
            cluster.create_topic(topic, PARTITIONS as i32, 1).expect("make the topic");
        }
        let (load, disk) = (load.clone(), disk.clone());
        let (offsets, deliveries) = ([[0; PARTITIONS]; TOPICS.len()], Arc::default());
        Kafka { cluster, load, disk, reader: None, offsets, is_closed: false, deliveries }
    }

    /// `options` with settings that forward here, and do not wait long for it.
    pub fn forward(&self, mut options: Options, record_key: &str) -> Options {
        options.brokers = vec![self.cluster.bootstrap_servers()];
        let settings =
            [("topic", "%s"), ("stop_timeout", "1s"), ("retry_delay_max", "100ms"), ("record_key", record_key)];
        options.settings.extend(settings.map(|(name, value)| format!("forward.{name} = {value:?}")));
        let settings = [("reconnect.backoff.ms", 10), ("reconnect.backoff.max.ms", 50), ("retry.backoff.ms", 10)];
        options.settings.extend(settings.map(|(name, value)| format!("forward.kafka.{name:?} = {value}")));
        options
    }

    /// The same, so that a closed topic soon moves to the spill and is never parked.
    pub fn forward_spilling(&self, options: Options) -> Options {
        let mut options = self.forward(options, "connection_id");
        let settings = [("topic_grace", "1h"), ("in_flight_bytes_max", "1MiB")];
        options.settings.extend(settings.map(|(name, value)| format!("forward.{name} = {value:?}")));
        options
    }

    /// The same, so that a closed topic soon is parked, with all that then waits for it.
    pub fn forward_parking(&self, options: Options) -> Options {
        let mut options = self.forward(options, "connection_id");
        let settings = [("topic_grace", "1s"), ("in_flight_bytes_max", "64MiB")];
        options.settings.extend(settings.map(|(name, value)| format!("forward.{name} = {value:?}")));
        options
    }

    /// Waits until events of the closed topic are in the spill, and few are in flight.
    pub async fn wait_until_spilled(&self, addresses: Addresses) {
        wait_until("events to be spilled", || {
            let forward = &status(addresses.admin)["forward"];
            forward["spilled_events"].as_u64().expect("a number") > 0
        })
        .await;
    }

    /// Takes the broker away: connections break, new ones are refused.
    pub fn down(&mut self) {
        self.stop_reading();
        turns::take_down(&self.cluster, 1);
    }

    fn stop_reading(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.stop.store(true, Ordering::Relaxed);
            self.offsets = reader.thread.join().expect("every delivery is what was sent");
        }
    }

    /// Closes the topic of [`HELD_TYPE`], or opens it again. The broker is up. A client that has used the topic notices when
    /// it asks for metadata again.
    pub fn set_closed(&mut self, closed: bool) {
        self.stop_reading();
        self.is_closed = closed;
        let closed = Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
        let code = if self.is_closed { closed } else { Code::RD_KAFKA_RESP_ERR_NO_ERROR };
        self.cluster.topic_error(HELD_TYPE, code).expect("close or open the topic");
        self.start_reading();
    }

    /// Brings it back.
    pub fn up(&mut self) {
        self.cluster.broker_up(1).expect("bring the broker back");
        self.start_reading();
    }

    fn start_reading(&mut self) {
        // A new consumer each time: one that lost its broker may take a minute to fetch again.
        let consumer = self.consumer();
        let stop = Arc::new(AtomicBool::new(false));
        let (load, disk, deliveries) = (self.load.clone(), self.disk.clone(), self.deliveries.clone());
        let (mut offsets, stopped) = (self.offsets, stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let Some(Ok(message)) = consumer.poll(Duration::from_millis(20)) else { continue };
                let payload = message.payload().expect("a payload");
                let (name, event) = Load::parse_payload(payload).expect("a payload that was sent");
                let sent = load.events(name).swap_remove(event);
                assert!(sent.0 == message.topic() && sent.1 == payload, "{name:?} is not what was sent");
                deliveries.lock().unwrap().entry((name, event)).or_insert_with(|| disk.journal_bytes());
                let topic = TOPICS.iter().position(|topic| *topic == message.topic()).expect("a known topic");
                offsets[topic][message.partition() as usize] = message.offset() + 1;
            }
            offsets
        });
        self.reader = Some(Reader { stop, thread });
    }

    /// Whether an event has arrived.
    pub fn has(&self, event: &(Name, usize)) -> bool {
        self.deliveries.lock().unwrap().contains_key(event)
    }

    /// What has arrived.
    pub fn deliveries(&self) -> Deliveries {
        self.deliveries.lock().unwrap().clone()
    }

    /// Waits until the log is empty, and every acked event was read here or parked.
    pub async fn wait_until_delivered(&self, addresses: Addresses, clients: &Clients) {
        wait_until("the log to be empty", || {
            let wal = &status(addresses.admin)["wal"];
            wal["pending_batches"] == 0 && wal["pending_events"] == 0
        })
        .await;
        wait_until("every event to be seen in Kafka", || self.missing(clients).is_empty()).await;
    }

    /// Acked events that have not arrived, and can.
    pub fn missing(&self, clients: &Clients) -> Vec<(Name, usize)> {
        let deliveries = self.deliveries.lock().unwrap();
        let events = |name| self.load.events(name).into_iter().enumerate().map(move |(at, (kind, _))| (name, at, kind));
        let is_good = |kind| kind != BAD_TYPE && !(self.is_closed && kind == HELD_TYPE);
        let good = clients.acks().into_keys().flat_map(events).filter(|(.., kind)| is_good(*kind));
        good.map(|(name, event, _)| (name, event)).filter(|event| !deliveries.contains_key(event)).collect()
    }

    fn consumer(&self) -> BaseConsumer {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.cluster.bootstrap_servers())
            .set("group.id", "test")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "error")
            .set("fetch.wait.max.ms", "20")
            .set("log_level", "0")
            .create()
            .expect("make a consumer");
        let mut assignment = TopicPartitionList::new();
        let topics = if self.is_closed { &TOPICS[..1] } else { &TOPICS[..] };
        for (topic, offsets) in topics.iter().zip(self.offsets) {
            for (partition, offset) in (0..).zip(offsets) {
                assignment.add_partition_offset(topic, partition, Offset::Offset(offset)).expect("it is new");
            }
        }
        consumer.assign(&assignment).expect("assign the partitions");
        consumer
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.stop.store(true, Ordering::Relaxed);
            // A failure of its own was reported when it happened.
            let _ = reader.thread.join();
        }
    }
}
