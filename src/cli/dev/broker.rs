//! The embedded broker of `ringtail dev`: librdkafka's in-process mock cluster, and a consumer that sees what arrives.
//!
//! The mock keeps 5 MiB a partition, in memory: good for a demonstration, not for data.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::sync::mpsc;

const BROKER_ID: i32 = 1;
/// How often the consumer looks for new topics.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(1);
const POLL_TIMEOUT: Duration = Duration::from_millis(100);

/// The mock cluster: one broker.
pub struct Broker {
    cluster: MockCluster<'static, DefaultProducerContext>,
    closing: Arc<AtomicBool>,
}

/// An event as it arrived in Kafka.
pub struct Arrived {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub key: Vec<u8>,
    pub value: Vec<u8>,
}

impl Broker {
    /// Starts the broker on a free port of loopback.
    pub fn start() -> anyhow::Result<Broker> {
        let cluster = MockCluster::new(1).context("start the embedded broker")?;
        Ok(Broker { cluster, closing: Arc::default() })
    }

    /// Its address.
    pub fn address(&self) -> String {
        self.cluster.bootstrap_servers()
    }

    /// Takes the broker away: connections break, new ones are refused.
    pub fn down(&self) -> anyhow::Result<()> {
        self.cluster.broker_down(BROKER_ID).context("stop the embedded broker")
    }

    /// Brings the broker back.
    pub fn up(&self) -> anyhow::Result<()> {
        self.cluster.broker_up(BROKER_ID).context("start the embedded broker")
    }

    /// Everything that arrives, in every topic.
    pub fn arrivals(&self) -> anyhow::Result<mpsc::Receiver<Arrived>> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.address())
            .set("group.id", "ringtail-dev")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "50")
            .set("reconnect.backoff.max.ms", "500")
            .set("log_level", "0")
            .create()
            .context("start a consumer")?;
        let (arrived, arrivals) = mpsc::channel(1024);
        let closing = self.closing.clone();
        std::thread::Builder::new()
            .name("dev-consumer".into())
            .spawn(move || consume(&consumer, &arrived, &closing))
            .context("start a consumer")?;
        Ok(arrivals)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
    }
}

fn consume(consumer: &BaseConsumer, arrived: &mpsc::Sender<Arrived>, closing: &AtomicBool) {
    let mut next_offsets: HashMap<(String, i32), i64> = HashMap::new();
    let mut discovered: Option<Instant> = None;
    while !closing.load(Ordering::Relaxed) {
        if discovered.is_none_or(|at| at.elapsed() > DISCOVERY_INTERVAL) {
            discovered = Some(Instant::now());
            discover(consumer, &mut next_offsets);
        }
        // Errors are those of a broker that is away.
        let Some(Ok(message)) = consumer.poll(POLL_TIMEOUT) else { continue };
        let (topic, partition, offset) = (message.topic().to_string(), message.partition(), message.offset());
        next_offsets.insert((topic.clone(), partition), offset + 1);
        let bytes = |part: Option<&[u8]>| part.unwrap_or_default().to_vec();
        let (key, value) = (bytes(message.key()), bytes(message.payload()));
        if arrived.blocking_send(Arrived { topic, partition, offset, key, value }).is_err() {
            return;
        }
    }
}

/// Adds the partitions of new topics to what is consumed.
fn discover(consumer: &BaseConsumer, next_offsets: &mut HashMap<(String, i32), i64>) {
    let Ok(metadata) = consumer.fetch_metadata(None, POLL_TIMEOUT) else { return };
    let known = next_offsets.len();
    for topic in metadata.topics() {
        for partition in topic.partitions() {
            next_offsets.entry((topic.name().to_string(), partition.id())).or_insert(0);
        }
    }
    if next_offsets.len() == known {
        return;
    }
    let mut assignment = TopicPartitionList::new();
    for ((topic, partition), offset) in next_offsets.iter() {
        // Both fail only on a topic name that Kafka itself would not have given.
        let _ = assignment.add_partition_offset(topic, *partition, Offset::Offset(*offset));
    }
    let _ = consumer.assign(&assignment);
}
