//! Draining a backlog beside the bare Kafka client: the forwarder, at least once and exactly once, and a librdkafka producer with
//! the same settings that sends the same events from memory.
//!
//! ```text
//! cargo bench --bench drain                                        # into the in-process mock
//! RINGTAIL_BENCH_BROKERS=127.0.0.1:9092 cargo bench --bench drain  # into a real Kafka, which makes topics by itself
//! RINGTAIL_BENCH_EVENTS=25000000 RINGTAIL_BENCH_ROUNDS=1 RINGTAIL_BENCH_DIRECTORY=/mnt/disk cargo bench --bench drain   # 5 GB
//! RINGTAIL_BENCH_IN_FLIGHT_MIB=64 cargo bench --bench drain        # another forward.in_flight_bytes_max
//! ```
//!
//! All run in turn, several times, on the same broker: the ratios of one run can be compared, the figures of two runs cannot.
//! The backlog is read from the log on disk, and its page cache is dropped before (as root; otherwise it is warm).
//! Exactly once needs the broker to commit transactions as a real one does, and is left out with the mock.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytesize::ByteSize;
use prost::Message;
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use ringtail::batch::{Batch, Client, Request, now_ms};
use ringtail::config::{DedupConfig, Delivery, ForwardConfig, KafkaProperty, WalConfig};
use ringtail::forward::Forwarder;
use ringtail::metrics::Metrics;
use ringtail::proto;
use ringtail::wal::{Commit, Wal};

const EVENTS_PER_BATCH: u64 = 20;
const CLIENTS: u64 = 100;
/// Payloads that differ.
const PAYLOADS: u64 = 4096;

/// How big, and where.
struct Bench {
    brokers: String,
    is_real: bool,
    events: u64,
    payload_bytes: usize,
    directory: PathBuf,
    compression: &'static str,
    in_flight_bytes_max: ByteSize,
    rounds: u64,
}

fn main() {
    let brokers = std::env::var("RINGTAIL_BENCH_BROKERS").ok();
    let mock = MockCluster::new(1).expect("start the mock");
    let number = |name: &str, default| std::env::var(name).map_or(default, |value| value.parse().expect("a number"));
    let temporary = tempfile::tempdir().expect("make a directory");
    let directory = std::env::var_os("RINGTAIL_BENCH_DIRECTORY").map_or(temporary.path().to_owned(), PathBuf::from);
    println!("| case | bare events/s | drain events/s | ratio | exactly once events/s | to at least once |");
    println!("|---|---|---|---|---|---|");
    for (payload_bytes, compression) in [(200, "none"), (1000, "none"), (1000, "lz4")] {
        let bench = Bench {
            brokers: brokers.clone().unwrap_or_else(|| mock.bootstrap_servers()),
            is_real: brokers.is_some(),
            events: number("RINGTAIL_BENCH_EVENTS", 2_000_000) * 200 / payload_bytes as u64,
            payload_bytes,
            directory: directory.clone(),
            compression,
            in_flight_bytes_max: ByteSize::mib(number("RINGTAIL_BENCH_IN_FLIGHT_MIB", 32)),
            rounds: number("RINGTAIL_BENCH_ROUNDS", 3),
        };
        bench.run();
    }
}

impl Bench {
    fn run(&self) {
        let (mut bare, mut drained, mut exact) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            bare.push(self.bare());
            drained.push(self.drain(Delivery::AtLeastOnce));
            if self.is_real {
                exact.push(self.drain(Delivery::ExactlyOnce));
            }
        }
        let (bare, drained, exact) = (median(bare), median(drained), median(exact));
        println!(
            "| {} × {} B, {} | {bare:.0} | {drained:.0} | {:.2} | {exact:.0} | {:.2} |",
            self.events,
            self.payload_bytes,
            self.compression,
            drained / bare,
            exact / drained
        );
    }

    /// Events a second of a producer that is fed from memory.
    fn bare(&self) -> f64 {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers).set("enable.idempotence", "true").set("acks", "all");
        config.set("linger.ms", "5").set("partitioner", "murmur2_random").set("compression.type", self.compression);
        config.set("queue.buffering.max.messages", "0").set("queue.buffering.max.kbytes", "65536");
        let producer: BaseProducer = config.create().expect("make a producer");
        let payloads: Vec<Vec<u8>> = (0..PAYLOADS).map(|number| self.payload(number)).collect();
        let keys: Vec<String> = (0..CLIENTS).map(client).collect();
        // The topic is made by its first record.
        send(&producer, &keys[0], &payloads[0]);
        producer.flush(Duration::from_secs(60)).expect("reach kafka");
        let began = Instant::now();
        for at in 0..self.events {
            let number = at / EVENTS_PER_BATCH;
            send(&producer, &keys[(number % CLIENTS) as usize], &payloads[(number % PAYLOADS) as usize]);
        }
        producer.flush(Duration::from_secs(600)).expect("deliver");
        self.events as f64 / began.elapsed().as_secs_f64()
    }

    /// Events a second from the first delivery until the log is empty.
    fn drain(&self, delivery: Delivery) -> f64 {
        let directory = tempfile::tempdir_in(&self.directory).expect("make a directory");
        let config = WalConfig {
            directory: directory.path().into(),
            bytes_max: ByteSize::gib(64),
            free_bytes_min: ByteSize::b(0),
            dedup: DedupConfig { enabled: false, ..DedupConfig::default() },
            ..WalConfig::default()
        };
        let wal = Wal::open(&config, 64 << 20, Metrics::new()).expect("open the log");
        self.fill(&wal);
        wal.close();
        drop(wal);
        drop_page_cache();
        let metrics = Metrics::new();
        let wal = Wal::open(&config, 64 << 20, metrics.clone()).expect("open the log");
        let forward = ForwardConfig {
            brokers: vec![self.brokers.clone()],
            topic: "bench-%s".into(),
            delivery,
            in_flight_bytes_max: self.in_flight_bytes_max,
            kafka: [("compression.type".to_owned(), KafkaProperty::Text(self.compression.into()))].into(),
            ..ForwardConfig::default()
        };
        let forwarder = Forwarder::start(&forward, 4 << 20, wal.clone(), metrics).expect("start the forwarder");
        let wait_until = |holds: &dyn Fn() -> bool| {
            while !holds() {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        // Its connection is made by then, as the bare producer's is.
        wait_until(&|| wal.status().pending_events < self.events);
        let (began, pending) = (Instant::now(), wal.status().pending_events);
        wait_until(&|| wal.status().is_drained());
        let rate = pending as f64 / began.elapsed().as_secs_f64();
        forwarder.stop(Duration::from_secs(10));
        wal.close();
        rate
    }

    fn fill(&self, wal: &Wal) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("make a runtime");
        let wait = |commit: Commit| {
            runtime.block_on(commit).expect("a commit");
        };
        let mut commits = Vec::new();
        for number in 0..self.events / EVENTS_PER_BATCH {
            let event = proto::Event { r#type: "drain".into(), event_bytes: self.payload(number % PAYLOADS).into() };
            let request = proto::SendEventRequest {
                req_guid: number.to_string(),
                events: vec![event; EVENTS_PER_BATCH as usize],
                ..Default::default()
            };
            let batch = Batch {
                received_at_ms: now_ms(),
                client: Client { group: "bench".into(), id: client(number % CLIENTS).into() },
                request: Request::parse(Bytes::from(request.encode_to_vec())).expect("a request"),
            };
            commits.push(wal.append(batch).expect("room in the log"));
            if commits.len() == 512 {
                commits.drain(..).for_each(wait);
            }
        }
        commits.into_iter().for_each(wait);
    }

    /// Half of it compresses.
    fn payload(&self, number: u64) -> Vec<u8> {
        let noise =
            (0..self.payload_bytes as u64).map(|at| (number * 31 + at).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56);
        noise.enumerate().map(|(at, byte)| if at % 2 == 0 { b'a' } else { byte as u8 }).collect()
    }
}

fn client(number: u64) -> String {
    format!("device-{number}")
}

fn send(producer: &BaseProducer, key: &str, payload: &[u8]) {
    let mut record = BaseRecord::to("bench-drain").key(key).payload(payload);
    while let Err((error, refused)) = producer.send(record) {
        assert_eq!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), "only the queue is full");
        producer.poll(Duration::from_millis(1));
        record = refused;
    }
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Does nothing without the right to.
fn drop_page_cache() {
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
}
