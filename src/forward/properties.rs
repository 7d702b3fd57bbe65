//! `[forward]` as librdkafka properties: our defaults, the operator's own, and the ones that the promises rest on.

use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;

use super::kafka::{self, ProducerError, Properties};
use super::router::{Router, is_topic_name};
use crate::config::{Delivery, ForwardConfig, KafkaProperty};

/// Least `forward.in_flight_bytes_max`.
const IN_FLIGHT_BYTES_MIN: ByteSize = ByteSize::mib(1);

/// Longest that librdkafka waits for a topic to appear; the lane waits for the rest of `topic_grace`. Short, because
/// librdkafka counts from the topic's first use, even while no broker is there, and because a topic that appears
/// late stays unknown for so long again.
const TOPIC_PROPAGATION_MS_MAX: u128 = 5_000;

/// Batch limit assumed by [`validate`], which does not know `ingest.batch_bytes_max`: the largest there can be.
const BATCH_BYTES_MAX: u64 = 16 << 20;

/// Bytes of a Kafka record besides its payload: its key (an id of at most 1 KiB, or a type or batch name) and framing.
const RECORD_OVERHEAD_BYTES: u64 = 1 << 20;

/// With exactly-once delivery: the longest that a partition without a leader may hold up a transaction, and the longest that
/// the broker keeps one of a client that went away.
const MESSAGE_TIMEOUT_MS: u32 = 30_000;
const TRANSACTION_TIMEOUT_MS: u32 = 60_000;

/// Bounds of `forward.commit_interval`.
const COMMIT_INTERVAL_MIN: Duration = Duration::from_millis(10);
const COMMIT_INTERVAL_MAX: Duration = Duration::from_secs(30);

const PROMISE_DURABLE: &str = "an event leaves the log only once every in-sync replica has it";
const PROMISE_ORDER: &str = "it keeps retries in order and free of duplicates";
const PROMISE_FOREVER: &str = "events are retried until Kafka takes them; what it never can is parked";
const OWN_BOUND: &str = "\"in_flight_bytes_max\" bounds what the client holds";
const OWN_REPORTS: &str = "the forwarder relies on its reports";
const OWN_BROKERS: &str = "the brokers are given as \"brokers\"";

/// Properties that may not be set, and why.
const REFUSED: &[(&str, &str)] = &[
    ("acks", PROMISE_DURABLE),
    ("request.required.acks", PROMISE_DURABLE),
    ("enable.idempotence", PROMISE_ORDER),
    ("enable.gapless.guarantee", "one refused event would stop every topic"),
    ("queuing.strategy", PROMISE_ORDER),
    ("message.timeout.ms", PROMISE_FOREVER),
    ("delivery.timeout.ms", PROMISE_FOREVER),
    ("retries", PROMISE_FOREVER),
    ("message.send.max.retries", PROMISE_FOREVER),
    ("bootstrap.servers", OWN_BROKERS),
    ("metadata.broker.list", OWN_BROKERS),
    ("test.mock.num.brokers", OWN_BROKERS),
    ("transactional.id", "it is given as \"transactional_id\""),
    ("transaction.timeout.ms", PROMISE_ORDER),
    ("topic.metadata.propagation.max.ms", "it follows from \"topic_grace\""),
    ("statistics.interval.ms", OWN_REPORTS),
    ("delivery.report.only.error", OWN_REPORTS),
    ("dr_cb", OWN_REPORTS),
    ("dr_msg_cb", OWN_REPORTS),
    ("enabled_events", OWN_REPORTS),
    ("log.queue", OWN_REPORTS),
    ("queue.buffering.max.messages", OWN_BOUND),
    ("queue.buffering.max.kbytes", OWN_BOUND),
    ("queue.buffering.max.ms", "its name here is \"linger.ms\""),
];

/// Most requests in flight per broker for which an idempotent producer keeps order.
const REQUESTS_IN_FLIGHT_MAX: i64 = 5;

/// Why `[forward]` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ForwardConfigError {
    /// A broker's address is empty or holds a blank or a comma.
    #[error("forward.brokers: {address:?} is not a host:port")]
    Broker {
        /// The address as given.
        address: String,
    },
    /// No event could ever be routed by the pattern.
    #[error("forward.topic: {pattern:?} makes no topic name: 1 to 249 of a-z A-Z 0-9 . _ - around the first %s")]
    Topic {
        /// The pattern as given.
        pattern: String,
    },
    /// Too little may be in flight.
    #[error("forward.in_flight_bytes_max: {value} is below the least, {least}")]
    InFlight {
        /// As given.
        value: ByteSize,
        /// The least.
        least: ByteSize,
    },
    /// The retry delays make no range.
    #[error("forward.retry_delay_min must be at least 1ms and at most forward.retry_delay_max")]
    RetryDelay,
    /// A transaction has one cursor.
    #[error(
        "forward.live_first cannot be used with forward.delivery = \"exactly_once\": its cursor in Kafka knows one place only"
    )]
    LiveFirst,
    /// Transactions would be too short or too long.
    #[error("forward.commit_interval must be 10ms to 30s")]
    CommitInterval,
    /// The dead letter topic has no name that Kafka takes.
    #[error("forward.dead_letter_topic: {name:?} is not a topic's name")]
    DeadLetterTopic {
        /// The name as given.
        name: String,
    },
    /// The topic of the cursors has no name.
    #[error("forward.cursor_topic: {name:?} is not a topic's name")]
    CursorTopic {
        /// The name as given.
        name: String,
    },
    /// A property that the promises rest on.
    #[error("forward.kafka: \"{name}\" cannot be set: {why}")]
    Refused {
        /// The property.
        name: String,
        /// What rests on it.
        why: &'static str,
    },
    /// Too many requests in flight to keep order.
    #[error("forward.kafka: \"{name}\" must be 1 to {REQUESTS_IN_FLIGHT_MAX}: {PROMISE_ORDER}")]
    RequestsInFlight {
        /// The property.
        name: String,
    },
    /// There is no password in the file for it.
    #[error("forward.kafka_password_file: cannot read {path}: {error}")]
    PasswordFile {
        /// The file as given.
        path: String,
        /// Why not.
        error: std::io::Error,
    },
    /// TLS or SASL without the code for it.
    #[error(
        "forward.kafka: \"security.protocol\" = \"{protocol}\" needs Kafka over TLS and SASL, which this binary was \
         built without: build it with the Cargo feature `kafka-tls`"
    )]
    NoTls {
        /// The protocol asked for.
        protocol: String,
    },
    /// librdkafka does not take the properties: one is unknown, or has a bad value.
    #[error("forward.kafka: {0}")]
    Kafka(#[from] ProducerError),
}

/// Checks `[forward]` as far as is possible without a broker. With no brokers (collect only) too.
///
/// # Errors
/// The first thing that is wrong, named as in the config file.
pub fn validate(config: &ForwardConfig) -> Result<(), ForwardConfigError> {
    let bad_address = |address: &&String| address.is_empty() || address.contains([',', ' ', '\t', '\n']);
    if let Some(address) = config.brokers.iter().find(bad_address) {
        return Err(ForwardConfigError::Broker { address: address.clone() });
    }
    if !is_topic_name(&Router::new(&config.topic, config.record_key).topic("x")) {
        return Err(ForwardConfigError::Topic { pattern: config.topic.clone() });
    }
    if config.in_flight_bytes_max < IN_FLIGHT_BYTES_MIN {
        let value = config.in_flight_bytes_max;
        return Err(ForwardConfigError::InFlight { value, least: IN_FLIGHT_BYTES_MIN });
    }
    if config.retry_delay_min.as_millis() == 0 || config.retry_delay_min > config.retry_delay_max {
        return Err(ForwardConfigError::RetryDelay);
    }
    if config.live_first && config.delivery == Delivery::ExactlyOnce {
        return Err(ForwardConfigError::LiveFirst);
    }
    if !(COMMIT_INTERVAL_MIN..=COMMIT_INTERVAL_MAX).contains(&config.commit_interval) {
        return Err(ForwardConfigError::CommitInterval);
    }
    if !config.dead_letter_topic.is_empty() && !is_topic_name(&config.dead_letter_topic) {
        return Err(ForwardConfigError::DeadLetterTopic { name: config.dead_letter_topic.clone() });
    }
    if !is_topic_name(&config.cursor_topic) {
        return Err(ForwardConfigError::CursorTopic { name: config.cursor_topic.clone() });
    }
    for (name, value) in &config.kafka {
        check_property(name, value)?;
    }
    let mut properties = properties(config, BATCH_BYTES_MAX);
    if let Some(password) = password(config)? {
        if config.kafka.contains_key(&password.0) {
            return Err(ForwardConfigError::Refused {
                name: password.0,
                why: "it is read from \"kafka_password_file\"",
            });
        }
        properties.push(password);
    }
    Ok(kafka::try_properties(&properties)?)
}

/// The property with the password in `forward.kafka_password_file`, if there is such a file.
///
/// # Errors
/// It cannot be read.
pub(super) fn password(config: &ForwardConfig) -> Result<Option<(String, String)>, ForwardConfigError> {
    let path = &config.kafka_password_file;
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let failed = |error| ForwardConfigError::PasswordFile { path: path.display().to_string(), error };
    Ok(Some(("sasl.password".into(), read_password(path).map_err(failed)?)))
}

/// The password in a file: its contents without the end of the line.
pub(super) fn read_password(path: &Path) -> std::io::Result<String> {
    Ok(std::fs::read_to_string(path)?.trim_end_matches(['\r', '\n']).to_owned())
}

fn check_property(name: &str, value: &KafkaProperty) -> Result<(), ForwardConfigError> {
    if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
        return Err(ForwardConfigError::Refused { name: name.to_owned(), why });
    }
    let value = value.to_string();
    if name == "max.in.flight" || name == "max.in.flight.requests.per.connection" {
        let in_order = value.parse().is_ok_and(|requests| (1..=REQUESTS_IN_FLIGHT_MAX).contains(&requests));
        return if in_order { Ok(()) } else { Err(ForwardConfigError::RequestsInFlight { name: name.to_owned() }) };
    }
    if name == "security.protocol" && !cfg!(feature = "kafka-tls") && !value.eq_ignore_ascii_case("plaintext") {
        return Err(ForwardConfigError::NoTls { protocol: value });
    }
    Ok(())
}

/// For how long librdkafka itself waits for a topic to appear before it says that it is unknown.
pub(super) fn topic_propagation(config: &ForwardConfig) -> std::time::Duration {
    let ms = (config.topic_grace.as_millis() / 2).clamp(1, TOPIC_PROPAGATION_MS_MAX);
    std::time::Duration::from_millis(ms as u64)
}

/// The producer's properties. `config` must have passed [`validate`].
pub(super) fn properties(config: &ForwardConfig, batch_bytes_max: u64) -> Properties {
    let held_bytes_max = 2 * config.in_flight_bytes_max.as_u64() + 2 * batch_bytes_max + RECORD_OVERHEAD_BYTES;
    let mut properties: std::collections::BTreeMap<&str, String> = [
        ("acks", "all".into()),
        ("bootstrap.servers", config.brokers.join(",")),
        ("client.id", "ringtail".into()),
        ("enable.idempotence", "true".into()),
        ("linger.ms", "5".into()),
        // Above the batch limit, so that it is the broker who decides what is too large.
        ("message.max.bytes", (batch_bytes_max + RECORD_OVERHEAD_BYTES).to_string()),
        ("message.timeout.ms", "0".into()),
        // Where the Java client puts the same key.
        ("partitioner", "murmur2_random".into()),
        // Out of reach: the forwarder's own bound holds first.
        ("queue.buffering.max.kbytes", (held_bytes_max / 1024).min(i32::MAX as u64).to_string()),
        ("queue.buffering.max.messages", "0".into()),
        ("reconnect.backoff.max.ms", "3000".into()),
        ("statistics.interval.ms", "1000".into()),
        // A topic that was forbidden is refused until its metadata is refreshed: by default that takes five minutes.
        ("topic.metadata.refresh.interval.ms", "10000".into()),
        ("metadata.max.age.ms", "900000".into()),
        ("topic.metadata.propagation.max.ms", topic_propagation(config).as_millis().to_string()),
    ]
    .into();
    if config.delivery == Delivery::ExactlyOnce {
        // What does not arrive in time fails its transaction, and is read again.
        properties.insert("message.timeout.ms", MESSAGE_TIMEOUT_MS.to_string());
        properties.insert("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS.to_string());
    }
    properties.extend(config.kafka.iter().map(|(name, value)| (name.as_str(), value.to_string())));
    properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: KafkaProperty) -> Result<(), ForwardConfigError> {
        validate(&ForwardConfig { kafka: [(name.to_owned(), value)].into(), ..ForwardConfig::default() })
    }

    #[test]
    fn the_default_is_valid() {
        validate(&ForwardConfig::default()).unwrap();
        validate(&ForwardConfig { brokers: Vec::new(), ..ForwardConfig::default() }).unwrap();
    }

    #[test]
    fn what_the_promises_rest_on_is_refused_by_name() {
        for (name, why) in REFUSED {
            let message = with(name, KafkaProperty::Integer(1)).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(why), "{message}");
        }
        for (requests, valid) in [(0, false), (1, true), (5, true), (6, false)] {
            assert_eq!(with("max.in.flight", KafkaProperty::Integer(requests)).is_ok(), valid, "{requests}");
        }
    }

    #[test]
    fn other_properties_pass_through_and_mistakes_are_named() {
        with("linger.ms", KafkaProperty::Integer(50)).unwrap();
        with("compression.type", KafkaProperty::Text("zstd".into())).unwrap();
        with("socket.keepalive.enable", KafkaProperty::Bool(true)).unwrap();
        let unknown = with("lingre.ms", KafkaProperty::Integer(5)).unwrap_err().to_string();
        assert!(unknown.contains("lingre.ms"), "{unknown}");
        let bad = with("linger.ms", KafkaProperty::Text("soon".into())).unwrap_err().to_string();
        assert!(bad.contains("linger.ms"), "{bad}");
    }

    #[test]
    fn a_password_is_read_from_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        let mut config = ForwardConfig { kafka_password_file: path.clone(), ..ForwardConfig::default() };
        let message = validate(&config).unwrap_err().to_string();
        assert!(message.contains("forward.kafka_password_file: cannot read"), "{message}");
        std::fs::write(&path, "open sesame \n").unwrap();
        assert_eq!(password(&config).unwrap(), Some(("sasl.password".into(), "open sesame ".into())));
        validate(&config).unwrap();
        config.kafka.insert("sasl.password".into(), KafkaProperty::Text("other".into()));
        let message = validate(&config).unwrap_err().to_string();
        assert!(message.contains("kafka_password_file"), "{message}");
    }

    #[cfg(not(feature = "kafka-tls"))]
    #[test]
    fn tls_without_its_feature_is_refused_with_the_features_name() {
        let message = with("security.protocol", KafkaProperty::Text("sasl_ssl".into())).unwrap_err().to_string();
        assert!(message.contains("kafka-tls"), "{message}");
        with("security.protocol", KafkaProperty::Text("plaintext".into())).unwrap();
    }

    #[test]
    fn limits_are_checked() {
        let default = ForwardConfig::default;
        for bad in [
            ForwardConfig { brokers: vec![String::new()], ..default() },
            ForwardConfig { brokers: vec!["a:1,b:2".into()], ..default() },
            ForwardConfig { topic: "a topic".into(), ..default() },
            ForwardConfig { topic: String::new(), ..default() },
            ForwardConfig { in_flight_bytes_max: ByteSize::kib(1), ..default() },
            ForwardConfig { retry_delay_min: std::time::Duration::ZERO, ..default() },
            ForwardConfig { retry_delay_max: std::time::Duration::from_millis(1), ..default() },
        ] {
            assert!(validate(&bad).is_err(), "{bad:?}");
        }
    }
}
