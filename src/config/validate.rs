//! The limits of the configuration that no type can state. They stand in the docs of the fields too.
//!
//! What may be in `[forward.kafka]` the forward stage says, which knows librdkafka; it is asked last.

use std::net::SocketAddr;
use std::time::Duration;

use bytesize::ByteSize;
use hyper::Method;
use hyper::header::{HeaderName, HeaderValue};
use tracing_subscriber::EnvFilter;

use super::{Config, ForwardConfig, HttpConfig, IngestConfig, LogConfig, WalConfig, keys, size};
use crate::batch::CLIENT_NAME_BYTES_MAX;
use crate::forward::ForwardConfigError;

/// Longest name of a Kafka topic, in bytes.
const TOPIC_BYTES_MAX: usize = 249;

/// A value that breaks its limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The key: `wal.bytes_max`.
    pub key: String,
    /// The limit, as the end of a sentence that begins with the key and its value.
    pub message: String,
}

impl From<ForwardConfigError> for Violation {
    fn from(error: ForwardConfigError) -> Violation {
        let property = |name: &str| keys::join(keys::KAFKA, name);
        let (key, message) = match &error {
            ForwardConfigError::Refused { name, why } => (property(name), format!("cannot be set: {why}")),
            ForwardConfigError::RequestsInFlight { name } => (property(name), error.to_string()),
            ForwardConfigError::NoTls { .. } => (property("security.protocol"), error.to_string()),
            ForwardConfigError::Kafka(kafka) => {
                let key = kafka.property.as_deref().map_or(keys::KAFKA.into(), property);
                (key, format!("the Kafka client does not take it: {}", kafka.message))
            }
            ForwardConfigError::Broker { .. } => ("forward.brokers".into(), error.to_string()),
            ForwardConfigError::Topic { .. } => ("forward.topic".into(), error.to_string()),
            ForwardConfigError::InFlight { .. } => ("forward.in_flight_bytes_max".into(), error.to_string()),
            ForwardConfigError::LiveFirst => ("forward.live_first".into(), error.to_string()),
            ForwardConfigError::CommitInterval => ("forward.commit_interval".into(), error.to_string()),
            ForwardConfigError::DeadLetterTopic { .. } => ("forward.dead_letter_topic".into(), error.to_string()),
            ForwardConfigError::PasswordFile { .. } => ("forward.kafka_password_file".into(), error.to_string()),
            ForwardConfigError::CursorTopic { .. } => ("forward.cursor_topic".into(), error.to_string()),
            ForwardConfigError::RetryDelay => ("forward.retry_delay_min".into(), error.to_string()),
        };
        Violation { key, message }
    }
}

impl Config {
    /// Checks every limit, those between two values included.
    ///
    /// # Errors
    /// Every value that breaks its limit.
    pub fn validate(&self) -> Result<(), Vec<Violation>> {
        let mut check = Check(Vec::new());
        self.ingest.validate(&self.wal, &mut check);
        self.ingest.http.validate(&mut check);
        self.wal.validate(&mut check);
        self.forward.validate(&mut check);
        self.log.validate(&mut check);
        self.validate_listeners(&mut check);
        if check.0.is_empty() { Ok(()) } else { Err(check.0) }
    }

    fn validate_listeners(&self, check: &mut Check) {
        let listeners = [
            ("ingest.http.listen", self.ingest.http.listen),
            ("ingest.grpc.listen", self.ingest.grpc.listen),
            ("admin.listen", self.admin.listen),
        ];
        for (at, (key, address)) in listeners.iter().enumerate() {
            for (other_key, other) in &listeners[..at] {
                let free = !overlap(*address, *other);
                check.that(free, key, || format!("must not be the address of {other_key}, {other}"));
            }
        }
    }
}

/// Whether two listeners cannot both be bound.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let any = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && (any || one.ip() == other.ip())
}

struct Check(Vec<Violation>);

impl Check {
    fn that(&mut self, holds: bool, key: &str, message: impl FnOnce() -> String) {
        if !holds {
            self.0.push(Violation { key: key.to_owned(), message: message() });
        }
    }

    fn at_least_one(&mut self, value: u64, key: &str) {
        self.that(value >= 1, key, || "must be at least 1".into());
    }

    fn size_min(&mut self, value: ByteSize, min: ByteSize, key: &str) {
        self.that(value >= min, key, || format!("must be at least {}", size::exact(min)));
    }

    fn size_max(&mut self, value: ByteSize, max: ByteSize, key: &str) {
        self.that(value <= max, key, || format!("must be at most {}", size::exact(max)));
    }

    fn duration_min(&mut self, value: Duration, min_ms: u64, key: &str) {
        self.that(value >= Duration::from_millis(min_ms), key, || format!("must be at least {min_ms}ms"));
    }
}

impl IngestConfig {
    fn validate(&self, wal: &WalConfig, check: &mut Check) {
        self.validate_headers(check);
        check.at_least_one(self.connections_max as u64, "ingest.connections_max");
        check.size_min(self.batch_bytes_max, ByteSize::kib(1), "ingest.batch_bytes_max");
        check.size_max(self.batch_bytes_max, ByteSize::mib(16), "ingest.batch_bytes_max");
        let fits = self.batch_bytes_max.as_u64() <= wal.segment_bytes.as_u64() / 2;
        check.that(fits, "ingest.batch_bytes_max", || {
            format!("must be at most half of wal.segment_bytes, {}", size::exact(wal.segment_bytes))
        });
        check.at_least_one(self.batch_events_max.into(), "ingest.batch_events_max");
        check.that(self.in_flight_bytes_max >= self.batch_bytes_max, "ingest.in_flight_bytes_max", || {
            format!("must be at least ingest.batch_bytes_max, {}", size::exact(self.batch_bytes_max))
        });
        let batches = self.connection_in_flight_batches_max as u64;
        check.at_least_one(batches, "ingest.connection_in_flight_batches_max");
        check.duration_min(self.ping_interval, 100, "ingest.ping_interval");
        check.that(self.pong_timeout > self.ping_interval, "ingest.pong_timeout", || {
            format!("must be longer than ingest.ping_interval, {}", humantime::format_duration(self.ping_interval))
        });
        check.duration_min(self.write_timeout, 10, "ingest.write_timeout");
        check.duration_min(self.read_timeout, 10, "ingest.read_timeout");
    }

    fn validate_headers(&self, check: &mut Check) {
        const ID: &str = "ingest.connection_id_header";
        const GROUP: &str = "ingest.connection_group_header";
        let (id, group) = (&self.connection_id_header, &self.connection_group_header);
        check.that(is_client_header(id), ID, || CLIENT_HEADER.into());
        check.that(group.is_empty() || is_client_header(group), GROUP, || format!("{CLIENT_HEADER}, or empty"));
        let same = !group.is_empty() && id.eq_ignore_ascii_case(group);
        check.that(!same, GROUP, || format!("must not be the same as {ID}"));
        check.that(
            self.connection_group_default.len() <= CLIENT_NAME_BYTES_MAX,
            "ingest.connection_group_default",
            || format!("must have at most {CLIENT_NAME_BYTES_MAX} bytes"),
        );
    }
}

const CLIENT_HEADER: &str = "must be a valid HTTP header name that does not end in -bin";

/// gRPC would take a header that ends in `-bin` for base64.
fn is_client_header(name: &str) -> bool {
    name.parse::<HeaderName>().is_ok() && !name.to_ascii_lowercase().ends_with("-bin")
}

impl HttpConfig {
    fn validate(&self, check: &mut Check) {
        const ORIGINS: &str = "ingest.http.cors_allowed_origins";
        const METHODS: &str = "ingest.http.cors_allowed_methods";
        const HEADERS: &str = "ingest.http.cors_allowed_headers";
        let (origins, methods, headers) =
            (&self.cors_allowed_origins, &self.cors_allowed_methods, &self.cors_allowed_headers);
        check.that(!self.cors_enabled || !origins.is_empty(), ORIGINS, || {
            "must name at least one origin when ingest.http.cors_enabled is true".into()
        });
        check.that(origins.iter().all(|origin| is_origin(origin)), ORIGINS, || {
            "must hold origins such as \"https://example.org\", or \"*\"".into()
        });
        check.that(methods.iter().all(|method| method.parse::<Method>().is_ok()), METHODS, || {
            "must hold valid HTTP methods, or \"*\"".into()
        });
        let valid_headers = headers.iter().all(|header| header.parse::<HeaderName>().is_ok());
        check.that(valid_headers, HEADERS, || "must hold valid HTTP header names, or \"*\"".into());
        for (key, list) in [(ORIGINS, origins), (METHODS, methods), (HEADERS, headers)] {
            let any = list.iter().any(|item| item == "*");
            check.that(!any || list.len() == 1, key, || "must not name others beside \"*\"".into());
            check.that(!any || !self.cors_allow_credentials, key, || {
                "must not be \"*\" when ingest.http.cors_allow_credentials is true".into()
            });
        }
    }
}

fn is_origin(origin: &str) -> bool {
    let host = origin.split_once("://").filter(|(scheme, _)| !scheme.is_empty()).map(|(_, host)| host);
    let host = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', ' ', ',']));
    origin == "*" || (host && HeaderValue::from_str(origin).is_ok())
}

impl WalConfig {
    fn validate(&self, check: &mut Check) {
        const SEGMENTS_MIN: u64 = 4;
        check.that(!self.directory.as_os_str().is_empty(), "wal.directory", || "must not be empty".into());
        check.size_min(self.segment_bytes, ByteSize::mib(8), "wal.segment_bytes");
        check.size_max(self.segment_bytes, ByteSize::mib(256), "wal.segment_bytes");
        let min = ByteSize::b(self.segment_bytes.as_u64().saturating_mul(SEGMENTS_MIN));
        check.that(self.bytes_max >= min, "wal.bytes_max", || {
            format!("must be at least {SEGMENTS_MIN} times wal.segment_bytes, {}", size::exact(min))
        });
        let age = self.age_max;
        check.that(age.is_zero() || age >= Duration::from_secs(1), "wal.age_max", || {
            "must be at least 1s, or 0s for none".into()
        });
        const ENTRIES_MAX: usize = 10_000_000;
        let entries = self.dedup.entries_max;
        check.at_least_one(entries as u64, "wal.dedup.entries_max");
        check.that(entries <= ENTRIES_MAX, "wal.dedup.entries_max", || format!("must be at most {ENTRIES_MAX}"));
        check.duration_min(self.dedup.age_max, 1000, "wal.dedup.age_max");
    }
}

impl ForwardConfig {
    fn validate(&self, check: &mut Check) {
        check.that(self.brokers.iter().all(|broker| is_broker(broker)), "forward.brokers", || {
            "must hold addresses such as \"kafka-1:9092\"".into()
        });
        check.that(is_topic(&self.topic), "forward.topic", || {
            format!(
                "must be a Kafka topic name (ASCII letters, digits, '.', '_', '-', at most {TOPIC_BYTES_MAX} bytes) \
                 with at most one %s"
            )
        });
        check.size_min(self.in_flight_bytes_max, ByteSize::mib(1), "forward.in_flight_bytes_max");
        check.duration_min(self.retry_delay_min, 1, "forward.retry_delay_min");
        check.that(self.retry_delay_max >= self.retry_delay_min, "forward.retry_delay_max", || {
            format!("must be at least forward.retry_delay_min, {}", humantime::format_duration(self.retry_delay_min))
        });
        let (bytes, age) = (self.parked.bytes_max, self.parked.age_max);
        check.that(bytes.as_u64() == 0 || bytes >= ByteSize::mib(16), "forward.parked.bytes_max", || {
            "must be at least 16MiB, or 0 for none".into()
        });
        check.that(age.is_zero() || age >= Duration::from_secs(1), "forward.parked.age_max", || {
            "must be at least 1s, or 0s for none".into()
        });
        // What the Kafka client takes it says itself, about the first property that it does not.
        if !check.0.iter().any(|violation| violation.key.starts_with("forward."))
            && let Err(error) = crate::forward::validate(self)
        {
            check.0.push(error.into());
        }
    }
}

fn is_broker(broker: &str) -> bool {
    let address = broker.split_once("://").map_or(broker, |(_, address)| address);
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) => (host, port.parse::<u16>().is_ok_and(|port| port != 0)),
        None => (address, true),
    };
    port && !host.is_empty() && !host.contains([' ', ',', '/'])
}

fn is_topic(pattern: &str) -> bool {
    let name = pattern.replacen("%s", "x", 1);
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=TOPIC_BYTES_MAX).contains(&name.len()) && name.bytes().all(legal) && name != "." && name != ".."
}

impl LogConfig {
    fn validate(&self, check: &mut Check) {
        const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
        // To the filter a misspelt level is the name of a module.
        let words = self.level.split(',').map(str::trim);
        let bare = |word: &str| !word.contains(['=', '[']);
        let known = words.filter(|word| bare(word)).all(|word| LEVELS.contains(&word.to_ascii_lowercase().as_str()));
        check.that(known && EnvFilter::builder().parse(&self.level).is_ok(), "log.level", || {
            "must be error, warn, info, debug, trace, off, or a filter such as \"info,ringtail::wal=debug\"".into()
        });
    }
}
