//! The configuration: one struct per table of `ringtail.toml`. Each field states its meaning and limits; the defaults
//! stand below the types and, documented for operators, in `config/ringtail.toml`.
//!
//! [`Config::load`] composes defaults, file, environment and flags, remembers where each value came from, and reports
//! every problem at once; [`Config::validate`] checks what a type cannot say. Both run before any port is bound.

mod change;
mod keys;
mod load;
mod property;
mod raccoon;
mod show;
mod size;
#[cfg(test)]
mod tests;
mod validate;
mod window;

pub use change::Changes;
pub use load::{ConfigError, DEFAULT_FILE, FileText, FileTexts, Files, Loaded, Override, Problem, Source};
pub use property::KafkaProperty;
pub use raccoon::{RaccoonEnv, RaccoonSetting, Taken};
pub use show::{Setting, TEMPLATE};
pub use validate::Violation;
pub use window::{TimeWindow, TimeWindowError};

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// Everything `ringtail serve` can be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who may send, and how much.
    pub ingest: IngestConfig,
    /// The write-ahead log on disk.
    pub wal: WalConfig,
    /// Replay into Kafka.
    pub forward: ForwardConfig,
    /// Metrics, health, status.
    pub admin: AdminConfig,
    /// What is logged, and how.
    pub log: LogConfig,
}

/// `[ingest]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IngestConfig {
    /// Header that carries the connection's id. A valid HTTP header name; not ending in `-bin`, which gRPC takes for
    /// binary.
    pub connection_id_header: String,
    /// Header that carries the connection's group; empty: every connection is in the default group.
    /// Otherwise as `connection_id_header`, and not the same.
    pub connection_group_header: String,
    /// Group of a connection that names none. At most 1024 bytes.
    pub connection_group_default: String,
    /// Open WebSocket connections; one more is refused. At least 1.
    pub connections_max: usize,
    /// Largest request, in bytes of protobuf or JSON. At least 1 KiB, at most 16 MiB and half of
    /// `wal.segment_bytes`.
    #[serde(with = "size")]
    pub batch_bytes_max: ByteSize,
    /// Most events in one request. At least 1.
    pub batch_events_max: u32,
    /// Bytes of batches admitted and not yet durable, over all connections; more is refused with "try again".
    /// At least `batch_bytes_max`.
    #[serde(with = "size")]
    pub in_flight_bytes_max: ByteSize,
    /// Batches one WebSocket connection may have waiting for their commit before it is no longer read. At least 1.
    pub connection_in_flight_batches_max: usize,
    /// Bytes of the same. One batch is always allowed.
    #[serde(with = "size")]
    pub connection_in_flight_bytes_max: ByteSize,
    /// How often a WebSocket client is pinged. At least 100 ms.
    #[serde(with = "humantime_serde")]
    pub ping_interval: Duration,
    /// A WebSocket client that sent no pong for so long is disconnected. Longer than `ping_interval`.
    #[serde(with = "humantime_serde")]
    pub pong_timeout: Duration,
    /// A client that does not take an answer for so long is disconnected. At least 10 ms.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// A client that has begun a request and not finished it for so long is disconnected. At least 10 ms.
    #[serde(with = "humantime_serde")]
    pub read_timeout: Duration,
    /// WebSocket and REST.
    pub http: HttpConfig,
    /// gRPC.
    pub grpc: GrpcConfig,
}

/// `[ingest.http]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Address of WebSocket and REST. Port 0: any free one.
    pub listen: SocketAddr,
    /// Refuse WebSocket upgrades whose `Origin` is neither this host nor in `cors_allowed_origins`.
    pub check_origin: bool,
    /// Answer CORS requests of browsers. Needs at least one allowed origin.
    pub cors_enabled: bool,
    /// Origins that may send; `["*"]`: any.
    pub cors_allowed_origins: Vec<String>,
    /// Methods that may be used.
    pub cors_allowed_methods: Vec<String>,
    /// Request headers that may be sent.
    pub cors_allowed_headers: Vec<String>,
    /// Whether cookies may be sent; not together with a `*` in the lists above.
    pub cors_allow_credentials: bool,
    /// How long a browser may remember a preflight answer.
    #[serde(with = "humantime_serde")]
    pub cors_max_age: Duration,
}

/// `[ingest.grpc]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrpcConfig {
    /// Address of gRPC. Port 0: any free one.
    pub listen: SocketAddr,
}

/// `[wal]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WalConfig {
    /// Directory of everything durable. Not empty. Created if missing.
    pub directory: PathBuf,
    /// Size of one segment: the unit in which disk is taken and given back, and what memory follows. 8 MiB to 256 MiB.
    #[serde(with = "size")]
    pub segment_bytes: ByteSize,
    /// Most disk that the log may use. At least four segments.
    #[serde(with = "size")]
    pub bytes_max: ByteSize,
    /// Space to leave free on the file system for the rest of the host.
    #[serde(with = "size")]
    pub free_bytes_min: ByteSize,
    /// What happens to new batches when the log is full.
    pub when_full: WhenFull,
    /// Batches older than this are not delivered any more; zero: there is no such age.
    #[serde(with = "humantime_serde")]
    pub age_max: Duration,
    /// What happens to what is older than `age_max`.
    pub when_aged: WhenAged,
    /// How a retried batch is known again.
    pub dedup: DedupConfig,
}

/// `[wal.dedup]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DedupConfig {
    /// Whether a retry of a durable batch is acked and not stored again.
    pub enabled: bool,
    /// Newest batches that are remembered. At least 1, at most 10 million. Each takes up to 100 bytes of memory.
    pub entries_max: usize,
    /// For how long. At least 1 s.
    #[serde(with = "humantime_serde")]
    pub age_max: Duration,
}

/// What happens when the log is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// New batches are refused with "try again"; nothing that was acked is touched.
    Reject,
    /// The oldest segments go, delivered or not, and every event in them is counted.
    DropOldest,
}

/// What happens to batches older than `age_max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenAged {
    /// Their events are counted and gone.
    Drop,
    /// Their events are kept as dead letters.
    Park,
}

/// `[forward]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ForwardConfig {
    /// Kafka bootstrap servers, `host:port`. Empty: collect only.
    pub brokers: Vec<String>,
    /// Topic; the first `%s` is replaced by the event's type. The rest must be legal in a Kafka topic's name: ASCII
    /// letters, digits, `.`, `_`, `-`, at most 249 bytes.
    pub topic: String,
    /// What the Kafka record's key is.
    pub record_key: RecordKey,
    /// How often an event may arrive.
    pub delivery: Delivery,
    /// With `exactly_once`: how long one Kafka transaction lasts. Readers that see committed records only wait so long. 10 ms
    /// to 30 s.
    #[serde(with = "humantime_serde")]
    pub commit_interval: Duration,
    /// With `exactly_once`: the id that the transactions have. Of two instances with the same one the older stops to forward.
    /// Empty: one that belongs to the log in `wal.directory`.
    pub transactional_id: String,
    /// With `exactly_once`: the compacted topic that holds the cursors. Made if it is not there.
    pub cursor_topic: String,
    /// Bytes handed to the Kafka client and not yet acked by the broker, half of it for one topic at most. At least 1 MiB.
    #[serde(with = "size")]
    pub in_flight_bytes_max: ByteSize,
    /// First delay before something that Kafka refused is tried again. At least 1 ms.
    #[serde(with = "humantime_serde")]
    pub retry_delay_min: Duration,
    /// Longest such delay. At least `retry_delay_min`.
    #[serde(with = "humantime_serde")]
    pub retry_delay_max: Duration,
    /// How long a topic may be unknown or forbidden before its events are parked.
    #[serde(with = "humantime_serde")]
    pub topic_grace: Duration,
    /// Topic for what can never be delivered to its own: sent there with the reason in headers, and parked only if that
    /// fails as well. Empty: parked at once.
    pub dead_letter_topic: String,
    /// New events do not wait for a backlog, and not for `pace`: events older than 5 s are a backlog, which drains beside them.
    /// Gives up the order between the two, also per key. The backlog gets at least a tenth of the limits of `pace`. Not with
    /// `exactly_once`.
    pub live_first: bool,
    /// How fast, and when.
    pub pace: PaceConfig,
    /// How long a clean stop waits for events that Kafka has not yet acked. They stay in the log.
    #[serde(with = "humantime_serde")]
    pub stop_timeout: Duration,
    /// How much may be parked, and for how long.
    pub parked: ParkedConfig,
    /// File with the password for Kafka (`sasl.password`), for example a systemd credential; empty: none. When it changes, and
    /// when one of the files that `ssl.….location` name does, Kafka is used with the new contents.
    pub kafka_password_file: PathBuf,
    /// Any other librdkafka property, as `"linger.ms" = 5`, except those that the promises rest on
    /// (`enable.idempotence`, `acks`, …), which are refused.
    pub kafka: BTreeMap<String, KafkaProperty>,
}

/// How often an event may arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// Once; after a crash, or when a producer breaks, what was in flight arrives again.
    AtLeastOnce,
    /// Once, for readers that see committed records only, by Kafka transactions.
    ExactlyOnce,
}

/// `[forward.pace]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PaceConfig {
    /// Most payload bytes sent in a second, on average; zero: there is no such limit.
    #[serde(with = "size")]
    pub bytes_per_second_max: ByteSize,
    /// Most events sent in a second, on average; zero: there is no such limit.
    pub events_per_second_max: u64,
    /// Times of day at which events are forwarded; empty: always.
    pub windows: Vec<TimeWindow>,
}

/// `[forward.parked]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParkedConfig {
    /// Bytes of parked events, with what is kept about each; zero: no such limit. At least 16 MiB. The default is an eighth
    /// of the default `wal.bytes_max`, which parked events count into: about a quarter of it on disk.
    #[serde(with = "size")]
    pub bytes_max: ByteSize,
    /// What happens when there are more.
    pub when_full: WhenParkedFull,
    /// Events parked longer ago than this are dropped; zero: there is no such age. At least 1 s.
    #[serde(with = "humantime_serde")]
    pub age_max: Duration,
}

/// What happens to parked events over `forward.parked.bytes_max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenParkedFull {
    /// Nothing is dropped, a warning is logged. They take from the log's room, up to `wal.bytes_max`.
    Keep,
    /// The oldest ones go, and every one is counted.
    DropOldest,
}

/// What the Kafka record's key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordKey {
    /// The client's id: order per device.
    ConnectionId,
    /// The client's group.
    Group,
    /// The event's type.
    EventType,
    /// The batch's name.
    ReqGuid,
    /// No key: events spread over partitions.
    None,
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// Address of metrics, health and status. Keep it on loopback or a trusted network.
    pub listen: SocketAddr,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,ringtail::wal=debug`.
    pub level: String,
    /// One line of text or one JSON object per event.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people and journald.
    Text,
    /// For log shippers.
    Json,
}

impl Default for IngestConfig {
    fn default() -> Self {
        IngestConfig {
            connection_id_header: "X-User-ID".into(),
            connection_group_header: String::new(),
            connection_group_default: "--default--".into(),
            connections_max: 10_000,
            batch_bytes_max: ByteSize::mib(4),
            batch_events_max: 50_000,
            in_flight_bytes_max: ByteSize::mib(32),
            connection_in_flight_batches_max: 64,
            connection_in_flight_bytes_max: ByteSize::mib(1),
            ping_interval: Duration::from_secs(30),
            pong_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(30),
            http: HttpConfig::default(),
            grpc: GrpcConfig::default(),
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        HttpConfig {
            listen: ([0, 0, 0, 0], 8080).into(),
            check_origin: false,
            cors_enabled: false,
            cors_allowed_origins: Vec::new(),
            cors_allowed_methods: vec!["GET".into(), "POST".into(), "OPTIONS".into()],
            cors_allowed_headers: vec!["Content-Type".into()],
            cors_allow_credentials: false,
            cors_max_age: Duration::ZERO,
        }
    }
}

impl Default for GrpcConfig {
    fn default() -> Self {
        GrpcConfig { listen: ([0, 0, 0, 0], 8081).into() }
    }
}

impl Default for WalConfig {
    fn default() -> Self {
        WalConfig {
            directory: "/var/lib/ringtail".into(),
            segment_bytes: ByteSize::mib(32),
            bytes_max: ByteSize::gib(8),
            free_bytes_min: ByteSize::mib(512),
            when_full: WhenFull::Reject,
            age_max: Duration::ZERO,
            when_aged: WhenAged::Drop,
            dedup: DedupConfig::default(),
        }
    }
}

impl Default for DedupConfig {
    fn default() -> Self {
        DedupConfig { enabled: true, entries_max: 200_000, age_max: Duration::from_secs(24 * 60 * 60) }
    }
}

impl Default for ForwardConfig {
    fn default() -> Self {
        ForwardConfig {
            brokers: vec!["127.0.0.1:9092".into()],
            topic: "clickstream-%s-log".into(),
            record_key: RecordKey::ConnectionId,
            delivery: Delivery::AtLeastOnce,
            commit_interval: Duration::from_secs(1),
            transactional_id: String::new(),
            cursor_topic: "ringtail-cursors".into(),
            in_flight_bytes_max: ByteSize::mib(32),
            retry_delay_min: Duration::from_millis(100),
            retry_delay_max: Duration::from_secs(5),
            topic_grace: Duration::from_secs(24 * 60 * 60),
            dead_letter_topic: String::new(),
            live_first: false,
            pace: PaceConfig::default(),
            stop_timeout: Duration::from_secs(10),
            parked: ParkedConfig::default(),
            kafka_password_file: PathBuf::new(),
            kafka: BTreeMap::new(),
        }
    }
}

impl Default for ParkedConfig {
    fn default() -> Self {
        ParkedConfig { bytes_max: ByteSize::gib(1), when_full: WhenParkedFull::Keep, age_max: Duration::ZERO }
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        AdminConfig { listen: ([127, 0, 0, 1], 9464).into() }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { level: "info".into(), format: LogFormat::Text }
    }
}
