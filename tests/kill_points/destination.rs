//! The destination: a mock Kafka in the test's own process, which outlives every life of the service, and a reader that
//! takes note of everything that arrives.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use super::load::{EVENT_TYPE, Load};

/// Clients spread over them by their key. The mock keeps 5 MiB of each.
const PARTITIONS: i32 = 8;
const PATIENCE: Duration = Duration::from_secs(60);

/// A place in what a client sends: the batch's number, and the event's place in it.
pub type Place = (u64, usize);

/// What arrived of one client.
#[derive(Default)]
pub struct Arrived {
    /// Every event.
    pub events: HashSet<Place>,
    /// How often one came again.
    pub duplicates: u64,
    /// How often the order went back: at most once for each life, by the rewind to the cursor.
    pub rewinds: u64,
    newest: Place,
    last: Place,
    partition: Option<i32>,
}

/// What arrived, by client, and how far each partition is read.
#[derive(Default)]
pub struct Seen {
    pub clients: HashMap<u32, Arrived>,
    positions: [i64; PARTITIONS as usize],
}

/// The mock and its reader.
pub struct Destination {
    cluster: MockCluster<'static, DefaultProducerContext>,
    consumer: Arc<BaseConsumer>,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Destination {
    /// Starts both. When this returns, the reader is reading every partition: it could not catch up with a mock that had
    /// dropped records before.
    pub fn start(load: &Arc<Load>) -> Destination {
        let cluster = MockCluster::new(1).expect("start a mock cluster");
        cluster.create_topic(EVENT_TYPE, PARTITIONS, 1).expect("make the topic");
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .set("group.id", "test")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "20")
            .create()
            .expect("make a consumer");
        let mut assignment = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            assignment.add_partition_offset(EVENT_TYPE, partition, Offset::Beginning).expect("a partition");
        }
        consumer.assign(&assignment).expect("assign the partitions");
        let (consumer, seen, stop) = (Arc::new(consumer), Arc::default(), Arc::new(AtomicBool::new(false)));
        let reader = std::thread::spawn({
            let (consumer, seen, stop, load) = (consumer.clone(), Arc::clone(&seen), stop.clone(), load.clone());
            move || read(&consumer, &seen, &stop, &load)
        });
        let destination = Destination { cluster, consumer, seen, stop, reader: Some(reader) };
        destination.mark();
        destination.look(|_| {});
        destination
    }

    /// Puts a record without key and payload at the front of every partition.
    fn mark(&self) {
        let config = ClientConfig::new().set("bootstrap.servers", self.brokers().remove(0)).clone();
        let producer: BaseProducer = config.create().expect("make a producer");
        for partition in 0..PARTITIONS {
            let record = BaseRecord::<(), ()>::to(EVENT_TYPE).partition(partition);
            producer.send(record).map_err(|(error, _)| error).expect("queue a mark");
        }
        producer.flush(PATIENCE).expect("write the marks");
    }

    /// `forward.brokers`
    pub fn brokers(&self) -> Vec<String> {
        vec![self.cluster.bootstrap_servers()]
    }

    /// Waits until everything that arrived was read, and gives it to `look`.
    pub fn look<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        let deadline = Instant::now() + PATIENCE;
        for partition in 0..PARTITIONS {
            let (_, end) =
                self.consumer.fetch_watermarks(EVENT_TYPE, partition, PATIENCE).expect("the end of a partition");
            while self.seen.lock().expect("the reader is well").positions[partition as usize] < end {
                assert!(Instant::now() < deadline, "what arrived is not read in time");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        look(&self.seen.lock().expect("the reader is well"))
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // A panic there has already failed whoever looked.
            let _ = reader.join();
        }
    }
}

fn read(consumer: &BaseConsumer, seen: &Mutex<Seen>, stop: &AtomicBool, load: &Load) {
    while !stop.load(Ordering::Relaxed) {
        let Some(message) = consumer.poll(Duration::from_millis(50)) else { continue };
        let message = message.expect("the mock is readable");
        if message.offset() == 0 {
            assert_eq!((message.key(), message.payload()), (None, None), "a mark");
            seen.lock().expect("nobody else panics with it").positions[message.partition() as usize] = 1;
            continue;
        }
        let (client, place) = load.identify(EVENT_TYPE, message.payload().unwrap_or_default());
        assert_eq!(message.key(), Some(Load::id(client).as_bytes()), "the key is the client's id");
        let mut seen = seen.lock().expect("nobody else panics with it");
        let position = &mut seen.positions[message.partition() as usize];
        // Kafka's offsets have no gaps here, but the mock drops what it has no room for.
        assert_eq!(*position, message.offset(), "the mock has dropped records: read faster");
        *position += 1;
        seen.clients.entry(client).or_default().arrive(client, place, message.partition());
    }
}

impl Arrived {
    fn arrive(&mut self, client: u32, place: Place, partition: i32) {
        assert_eq!(*self.partition.get_or_insert(partition), partition, "one client, one partition");
        self.rewinds += u64::from(place < self.last);
        if self.events.insert(place) {
            // A rewind repeats what came before it. What comes for the first time comes in order.
            assert!(place > self.newest || self.events.len() == 1, "{client}: {place:?} after {:?}", self.newest);
            self.newest = place;
        } else {
            self.duplicates += 1;
        }
        self.last = place;
    }
}
