//! The destination: a mock Kafka in the test's own process, which outlives every life of the service, and readers that
//! take note of everything that arrives. One of its topics can be closed: then it refuses events.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use rdkafka::types::RDKafkaRespErr as Code;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use super::load::{EVENT_TYPE, HELD_TYPE, Load};

/// Clients spread over them by their key. The mock keeps 5 MiB of each.
const PARTITIONS: i32 = 8;
const PATIENCE: Duration = Duration::from_secs(60);

/// A place in what a client sends: the batch's number, and the event's place in it.
pub type Place = (u64, usize);

/// What arrived of one client in one topic.
#[derive(Default)]
pub struct Arrived {
    /// Every event.
    pub events: HashSet<Place>,
    /// How often one came again.
    pub duplicates: u64,
    /// How often the order went back: at most once for each life, by the rewind to the cursor.
    pub rewinds: u64,
    newest: Place,
    /// The same of a backlog that new events went ahead of.
    newest_behind: Option<Place>,
    last: Place,
    partition: Option<i32>,
}

/// What arrived, by client and topic, and how far each partition is read.
#[derive(Default)]
pub struct Seen {
    pub clients: HashMap<(u32, &'static str), Arrived>,
    positions: HashMap<(&'static str, i32), i64>,
    /// New events may go ahead of a backlog: each of the two comes in order.
    live_first: bool,
}

/// The mock and its readers.
pub struct Destination {
    flowing: Reader,
    /// None while the topic is closed: a consumer of one that it may not read is of no use later.
    held: Option<Reader>,
    // After the readers, which need it.
    cluster: MockCluster<'static, DefaultProducerContext>,
    load: Arc<Load>,
    seen: Arc<Mutex<Seen>>,
}

struct Reader {
    topic: &'static str,
    consumer: Arc<BaseConsumer>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Destination {
    /// Starts all. When this returns, the readers are reading every partition: they could not catch up with a mock that
    /// had dropped records before.
    pub fn start(load: &Arc<Load>, live_first: bool) -> Destination {
        let cluster = MockCluster::new(1).expect("start a mock cluster");
        for topic in [EVENT_TYPE, HELD_TYPE] {
            cluster.create_topic(topic, PARTITIONS, 1).expect("make the topic");
            mark(&cluster, topic);
        }
        let seen = Arc::new(Mutex::new(Seen { live_first, ..Seen::default() }));
        let flowing = Reader::start(&cluster, EVENT_TYPE, load, &seen);
        let mut destination = Destination { cluster, load: load.clone(), seen, flowing, held: None };
        destination.open();
        destination.look(|_| {});
        destination
    }

    /// `forward.brokers`
    pub fn brokers(&self) -> Vec<String> {
        vec![self.cluster.bootstrap_servers()]
    }

    /// Opens the topic that can be closed.
    pub fn open(&mut self) {
        if self.held.is_none() {
            self.cluster.topic_error(HELD_TYPE, Code::RD_KAFKA_RESP_ERR_NO_ERROR).expect("open the topic");
            self.held = Some(Reader::start(&self.cluster, HELD_TYPE, &self.load, &self.seen));
        }
    }

    /// Closes it.
    pub fn close(&mut self) {
        if self.held.is_some() {
            self.look(|_| {});
            self.held = None;
            let code = Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
            self.cluster.topic_error(HELD_TYPE, code).expect("close the topic");
        }
    }

    /// Waits until everything that arrived was read, and gives it to `look`.
    pub fn look<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        let deadline = Instant::now() + PATIENCE;
        for reader in [&self.flowing].into_iter().chain(&self.held) {
            for partition in 0..PARTITIONS {
                let (_, end) = reader
                    .consumer
                    .fetch_watermarks(reader.topic, partition, PATIENCE)
                    .expect("the end of a partition");
                while self.position(reader.topic, partition) < end {
                    assert!(Instant::now() < deadline, "what arrived is not read in time");
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
        look(&self.seen.lock().expect("the readers are well"))
    }

    fn position(&self, topic: &'static str, partition: i32) -> i64 {
        let seen = self.seen.lock().expect("the readers are well");
        seen.positions.get(&(topic, partition)).copied().unwrap_or(0)
    }
}

/// Puts a record without key and payload at the front of every partition.
fn mark(cluster: &MockCluster<'static, DefaultProducerContext>, topic: &str) {
    let config = ClientConfig::new().set("bootstrap.servers", cluster.bootstrap_servers()).clone();
    let producer: BaseProducer = config.create().expect("make a producer");
    for partition in 0..PARTITIONS {
        let record = BaseRecord::<(), ()>::to(topic).partition(partition);
        producer.send(record).map_err(|(error, _)| error).expect("queue a mark");
    }
    producer.flush(PATIENCE).expect("write the marks");
}

impl Reader {
    /// Reads a topic from where it was last read.
    fn start(
        cluster: &MockCluster<'static, DefaultProducerContext>,
        topic: &'static str,
        load: &Arc<Load>,
        seen: &Arc<Mutex<Seen>>,
    ) -> Reader {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .set("group.id", "test")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "20")
            .create()
            .expect("make a consumer");
        let mut assignment = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            let position = seen.lock().expect("the readers are well").positions.get(&(topic, partition)).copied();
            let offset = Offset::Offset(position.unwrap_or(0));
            assignment.add_partition_offset(topic, partition, offset).expect("a partition");
        }
        consumer.assign(&assignment).expect("assign the partitions");
        let (consumer, stop) = (Arc::new(consumer), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (consumer, seen, stop, load) = (consumer.clone(), seen.clone(), stop.clone(), load.clone());
            move || read(&consumer, topic, &seen, &stop, &load)
        });
        Reader { topic, consumer, stop, thread: Some(thread) }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has already failed whoever looked.
            let _ = thread.join();
        }
    }
}

fn read(consumer: &BaseConsumer, topic: &'static str, seen: &Mutex<Seen>, stop: &AtomicBool, load: &Load) {
    while !stop.load(Ordering::Relaxed) {
        let Some(message) = consumer.poll(Duration::from_millis(50)) else { continue };
        let message = message.expect("the mock is readable");
        if message.offset() == 0 {
            assert_eq!((message.key(), message.payload()), (None, None), "a mark");
            seen.lock().expect("nobody else panics with it").positions.insert((topic, message.partition()), 1);
            continue;
        }
        let (client, place) = load.identify(topic, message.payload().unwrap_or_default());
        assert_eq!(message.key(), Some(Load::id(client).as_bytes()), "the key is the client's id");
        let mut seen = seen.lock().expect("nobody else panics with it");
        let position = seen.positions.entry((topic, message.partition())).or_default();
        // Kafka's offsets have no gaps here, but the mock drops what it has no room for.
        assert_eq!(*position, message.offset(), "the mock has dropped records: read faster");
        *position += 1;
        let live_first = seen.live_first;
        seen.clients.entry((client, topic)).or_default().arrive(client, place, message.partition(), live_first);
    }
}

impl Arrived {
    fn arrive(&mut self, client: u32, place: Place, partition: i32, live_first: bool) {
        assert_eq!(*self.partition.get_or_insert(partition), partition, "one client, one partition");
        self.rewinds += u64::from(place < self.last);
        if self.events.insert(place) {
            // A rewind repeats what came before it. What comes for the first time comes in order.
            let is_behind = live_first && place < self.newest && self.newest_behind.is_none_or(|newest| place > newest);
            if is_behind {
                self.newest_behind = Some(place);
            } else {
                assert!(place > self.newest || self.events.len() == 1, "{client}: {place:?} after {:?}", self.newest);
                self.newest = place;
            }
        } else {
            self.duplicates += 1;
        }
        self.last = place;
    }
}
