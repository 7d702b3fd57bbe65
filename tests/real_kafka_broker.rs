//! The harness itself: a real broker starts, keeps what it acked through `kill -9`, freezes and thaws.

#[path = "support/kafka.rs"]
mod kafka;

use std::collections::BTreeSet;
use std::time::Duration;

use kafka::{ConsumedRecord, Kafka, Options, PARTITIONS};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};

const PATIENCE: Duration = Duration::from_secs(60);

fn producer(kafka: &Kafka) -> FutureProducer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.bootstrap()).set("enable.idempotence", "true");
    config.create().unwrap()
}

async fn produce(producer: &FutureProducer, topic: &str, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let (key, value) = (format!("key-{number}"), format!("value-{number}"));
        let record = FutureRecord::to(topic).key(&key).payload(&value);
        producer.send(record, PATIENCE).await.unwrap();
    }
}

fn numbers(records: &[ConsumedRecord]) -> BTreeSet<u32> {
    let number = |record: &ConsumedRecord| {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let key = text(record.key.as_ref().unwrap());
        let value = text(&record.value);
        assert_eq!(key.strip_prefix("key-"), value.strip_prefix("value-"));
        key["key-".len()..].parse().unwrap()
    };
    records.iter().map(number).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_keeps_what_it_acked() {
    let mut kafka = Kafka::start();
    assert!(kafka.read_topic("events").is_empty(), "the topic is not there yet");
    let producer = producer(&kafka);
    produce(&producer, "events", 0..20).await;

    kafka.kill();
    kafka.restart();
    produce(&producer, "events", 20..40).await;

    kafka.freeze();
    let sending = tokio::spawn({
        let producer = producer.clone();
        async move { produce(&producer, "events", 40..41).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!sending.is_finished(), "a frozen broker acks nothing");
    kafka.thaw();
    sending.await.unwrap();

    let records = kafka.read_topic("events");
    assert_eq!(numbers(&records), (0..41).collect());
    assert_eq!(records.len(), 41);
    assert!(records.iter().all(|record| (0..PARTITIONS).contains(&record.partition)));
    for partition in 0..PARTITIONS {
        let offsets: Vec<i64> =
            records.iter().filter(|record| record.partition == partition).map(|record| record.offset).collect();
        assert_eq!(offsets, (0..offsets.len() as i64).collect::<Vec<_>>());
    }

    let pid = kafka.pid();
    kafka.stop();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_and_properties_are_as_asked_for() {
    let properties = vec![("auto.create.topics.enable".to_owned(), "false".to_owned())];
    let kafka = Kafka::start_with(Options { properties, ..Options::default() });
    kafka.create_topic("narrow", 1, &[("max.message.bytes", "1000")]);
    let producer = producer(&kafka);
    produce(&producer, "narrow", 0..3).await;
    let large = "x".repeat(2000);
    let refused = producer.send(FutureRecord::to("narrow").key("large").payload(&large), PATIENCE).await;
    assert!(refused.is_err(), "the topic refuses what is too large for it");
    let records = kafka.read_topic_committed("narrow");
    assert_eq!(numbers(&records), (0..3).collect());
    assert!(kafka.read_topic("absent").is_empty());

    let pid = kafka.pid();
    drop(kafka);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "dropping it ends the broker");
}
