use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::mocking::MockCluster;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde_json::{Value, json};

use crate::log::{Log, assert_code, batch, batch_of, text};

const DEADLINE: Duration = Duration::from_secs(60);

/// Reads `count` records of a topic of one partition.
fn consume(brokers: &str, topic: &str, count: usize) -> Vec<Vec<u8>> {
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", brokers).set("group.id", "test").create().unwrap();
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
    consumer.assign(&assignment).unwrap();
    let (mut records, deadline) = (Vec::new(), Instant::now() + DEADLINE);
    while records.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} records", records.len());
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(50)) {
            records.push(message.payload().unwrap().to_vec());
        }
    }
    records
}

#[test]
fn everything_is_delivered_parked_or_known_to_be_lost() {
    let mut batches: Vec<_> = (1..=200).map(|number| batch(number, 15_000)).collect();
    batches[9] = batch_of(10, &[("click", b"ten"), ("no topic", b"parked")]);
    let log = Log::with(&batches);
    log.flip(1, 20);
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("click", 1, 1).unwrap();
    let brokers = cluster.bootstrap_servers();
    log.configure(&format!(
        "forward.brokers = [{brokers:?}]\nforward.topic = \"%s\"\nforward.in_flight_bytes_max = \"1MiB\""
    ));
    let output = log.run(&["drain", "--json", "--timeout", "60s"]);
    assert_code(&output, 0);
    let mut summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    summary.as_object_mut().unwrap().remove("seconds");
    let expected = json!({"delivered_events": 199, "parked_events": 1, "dropped_events": 1, "pending_batches": 0,
                          "pending_events": 0, "last_error": null});
    assert_eq!(summary, expected);
    let numbers: Vec<u64> = consume(&brokers, "click", 199)
        .iter()
        .map(|payload| payload.first_chunk().map_or(10, |number| u64::from_le_bytes(*number)))
        .collect();
    assert_eq!(numbers, (1..=200).filter(|number| *number != 20).collect::<Vec<_>>());
    let again = log.run(&["drain"]);
    assert_code(&again, 0);
    assert!(text(&again.stderr).contains("0 events delivered, 0 parked"), "{}", text(&again.stderr));
}

#[test]
fn what_cannot_be_delivered_in_time_stays() {
    let log = Log::with(&[batch(1, 10), batch(2, 10)]);
    log.configure("forward.brokers = [\"127.0.0.1:1\"]\nforward.stop_timeout = \"100ms\"");
    let output = log.run(&["drain", "--timeout", "300ms"]);
    assert_code(&output, 1);
    assert!(text(&output.stderr).contains("2 events in 2 batches still pending"), "{}", text(&output.stderr));
    assert_eq!(log.deliver_all().len(), 2);
}

#[test]
fn without_brokers_there_is_nothing_to_do() {
    let log = Log::with(&[batch(1, 10)]);
    log.configure("forward.brokers = []");
    let output = log.run(&["drain"]);
    assert_code(&output, 64);
    assert!(text(&output.stderr).contains("forward.brokers is empty"), "{}", text(&output.stderr));
}
