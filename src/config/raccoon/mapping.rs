//! What each of Raccoon's settings is here.

use std::collections::BTreeMap;

use toml::Value;

use super::Taken;
use super::env_file::Variable;
use crate::config::{ForwardConfig, KafkaProperty, keys};
use crate::forward::{ForwardConfigError, validate};

/// What Raccoon does not run without, and the key that says the same here.
pub(super) const REQUIRED: [(&str, &str); 2] = [
    ("SERVER_WEBSOCKET_CONN_ID_HEADER", "ingest.connection_id_header"),
    ("PUBLISHER_KAFKA_CLIENT_BOOTSTRAP_SERVERS", "forward.brokers"),
];

const KAFKA_PREFIX: &str = "PUBLISHER_KAFKA_CLIENT_";
const BUFFERS: &str = "buffers follow the messages, within ingest.in_flight_bytes_max";
const NO_WORKERS: &str = "there are no workers and no queue in memory: the log on disk takes their place, bounded by \
                          wal.bytes_max";
const NO_STATSD: &str = "there is no StatsD: let Prometheus scrape /metrics on admin.listen";
const NO_TLS: &str = "gRPC over TLS is not served: clients that expect it would fail. Let a TLS proxy stand in front, and set it \
                      to false here";
const TLS_OFF: &str = "gRPC over TLS is not served, and SERVER_GRPC_TLS_ENABLED is not true";
const ACK_ON_DECODE: &str = "Raccoon acks once a batch is decoded. Here an ack always says more: the batch is synced to this \
                             host's disk";
const ACK_ON_KAFKA: &str = "Raccoon acks once Kafka has the batch. Here an ack always says that the batch is synced to this host's \
                            disk: it comes also while Kafka is away, and delivery follows";
const DEDUP_STAYS: &str = "a retry of a batch that is durable is always acked and not stored twice, also across connections: same \
                           id, req_guid and events. To store it twice set wal.dedup.enabled = false";
const PROMETHEUS_OFF: &str = "METRIC_PROMETHEUS_ENABLED is not true; metrics are served on admin.listen all the same";

/// A setting that is taken, or why it must not be passed over.
pub(super) type Outcome = Result<Taken, String>;

/// The settings of a file, of which some depend on others.
pub(super) struct File<'a>(BTreeMap<&'a str, &'a Variable>);

impl<'a> File<'a> {
    /// Of a name that comes twice the last one counts.
    pub fn new(variables: &'a [Variable]) -> File<'a> {
        File(variables.iter().map(|variable| (variable.name.as_str(), variable)).collect())
    }

    fn value(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|variable| variable.value.as_str())
    }

    fn is_true(&self, name: &str) -> bool {
        self.value(name).is_some_and(|value| flag(value) == Ok(true))
    }

    /// What becomes of a setting. The error is a refusal.
    pub fn take(&self, variable: &Variable) -> Outcome {
        let value = variable.value.as_str();
        if let Some(last) = self.0.get(variable.name.as_str()).filter(|last| last.line != variable.line) {
            return unsupported(format!("it is set again in line {}", last.line));
        }
        if let Some(property) = kafka_property(&variable.name) {
            return kafka(&property, value);
        }
        match variable.name.as_str() {
            "SERVER_WEBSOCKET_PORT" => set("ingest.http.listen", everywhere(value)?),
            "SERVER_WEBSOCKET_MAX_CONN" => set("ingest.connections_max", whole_number(value)?),
            "SERVER_WEBSOCKET_CONN_ID_HEADER" => set("ingest.connection_id_header", value),
            "SERVER_WEBSOCKET_CONN_GROUP_HEADER" => set("ingest.connection_group_header", value),
            "SERVER_WEBSOCKET_CONN_GROUP_DEFAULT" => set("ingest.connection_group_default", value),
            "SERVER_WEBSOCKET_PING_INTERVAL_MS" => set("ingest.ping_interval", milliseconds(value)?),
            "SERVER_WEBSOCKET_PONG_WAIT_INTERVAL_MS" => set("ingest.pong_timeout", milliseconds(value)?),
            "SERVER_WEBSOCKET_WRITE_WAIT_INTERVAL_MS" => set("ingest.write_timeout", milliseconds(value)?),
            "SERVER_WEBSOCKET_READ_BUFFER_SIZE" | "SERVER_WEBSOCKET_WRITE_BUFFER_SIZE" => unsupported(BUFFERS),
            "SERVER_WEBSOCKET_PINGER_SIZE" => unsupported("every connection has a timer of its own"),
            "SERVER_WEBSOCKET_CHECK_ORIGIN" => self.check_origin(flag(value)?),
            "SERVER_GRPC_PORT" => set("ingest.grpc.listen", everywhere(value)?),
            "SERVER_GRPC_TLS_ENABLED" if flag(value)? => Err(NO_TLS.into()),
            "SERVER_GRPC_TLS_ENABLED" => so_anyway("gRPC is served without TLS"),
            "SERVER_GRPC_TLS_CERT_PATH" | "SERVER_GRPC_TLS_PUBLIC_KEY" => unsupported(TLS_OFF),
            "SERVER_CORS_ENABLED" => set("ingest.http.cors_enabled", flag(value)?),
            "SERVER_CORS_ALLOWED_ORIGIN" => set("ingest.http.cors_allowed_origins", words(value)),
            "SERVER_CORS_ALLOWED_METHODS" => set("ingest.http.cors_allowed_methods", words(value)),
            "SERVER_CORS_ALLOWED_HEADERS" => self.cors_headers(value),
            "SERVER_CORS_ALLOW_CREDENTIALS" => set("ingest.http.cors_allow_credentials", flag(value)?),
            "SERVER_CORS_PREFLIGHT_MAX_AGE_SECONDS" => set("ingest.http.cors_max_age", seconds(value)?),
            "SERVER_BATCH_DEDUP_IN_CONNECTION_ENABLED" if flag(value)? => {
                set_with("wal.dedup.enabled", true, "also across connections and restarts")
            }
            "SERVER_BATCH_DEDUP_IN_CONNECTION_ENABLED" => unsupported(DEDUP_STAYS),
            "EVENT_DISTRIBUTION_PUBLISHER_PATTERN" => set("forward.topic", value),
            "PUBLISHER_TYPE" if value.trim().eq_ignore_ascii_case("kafka") => so_anyway("events go to Kafka"),
            "PUBLISHER_TYPE" => Err("must be kafka: events go to Kafka and nowhere else".into()),
            "PUBLISHER_KAFKA_FLUSH_INTERVAL_MS" => {
                let note = "what Kafka has not acked by then stays in the log, and goes after the next start";
                set_with("forward.stop_timeout", milliseconds(value)?, note)
            }
            "METRIC_PROMETHEUS_ENABLED" => self.prometheus_enabled(flag(value)?),
            "METRIC_PROMETHEUS_PORT" if self.is_true("METRIC_PROMETHEUS_ENABLED") => {
                set_with("admin.listen", everywhere(value)?, ADMIN_IS_OPEN)
            }
            "METRIC_PROMETHEUS_PORT" => port(value).and_then(|_| unsupported(PROMETHEUS_OFF)),
            "METRIC_PROMETHEUS_PATH" if value == "/metrics" => so_anyway("metrics are served there"),
            "METRIC_PROMETHEUS_PATH" => unsupported("metrics are served at /metrics: change the scrape configuration"),
            "LOG_LEVEL" => set("log.level", log_level(value)?),
            "EVENT_ACK" => match value {
                "0" => unsupported(ACK_ON_DECODE),
                "1" => unsupported(ACK_ON_KAFKA),
                _ => Err("must be 0 or 1".into()),
            },
            name if name.starts_with("WORKER_") => unsupported(NO_WORKERS),
            name if name.starts_with("METRIC_STATSD_") => unsupported(NO_STATSD),
            name if name.starts_with(keys::ENVIRONMENT_PREFIX) => {
                unsupported("variables of Ringtail are read from its environment, not from this file")
            }
            _ => unsupported("no setting of Raccoon that is known here"),
        }
    }

    /// Raccoon's defaults that clients would miss, of what the file does not say: name, value, what becomes of it.
    pub fn defaults(&self) -> Vec<(&'static str, &'static str, Taken)> {
        let mut defaults = vec![("SERVER_WEBSOCKET_MAX_CONN", "30000"), ("SERVER_WEBSOCKET_CHECK_ORIGIN", "true")];
        if self.is_true("SERVER_CORS_ENABLED") {
            defaults.push(("SERVER_CORS_ALLOWED_METHODS", "GET HEAD POST OPTIONS"));
            defaults.push(("SERVER_CORS_ALLOWED_HEADERS", ""));
        }
        defaults.retain(|(name, _)| self.value(name).is_none());
        let take = |(name, value): (&'static str, &'static str)| {
            let variable = Variable { name: name.to_owned(), value: value.to_owned(), line: 0 };
            (name, value, self.take(&variable).expect("a default is not refused"))
        };
        defaults.into_iter().map(take).collect()
    }

    fn check_origin(&self, check: bool) -> Outcome {
        const NOT_WITH_CORS: &str = "with CORS enabled Raccoon does not check the Origin of WebSockets; to refuse those that are not \
                                     in cors_allowed_origins set it to true";
        if check && self.is_true("SERVER_CORS_ENABLED") {
            return set_with("ingest.http.check_origin", false, NOT_WITH_CORS);
        }
        set("ingest.http.check_origin", check)
    }

    /// Raccoon allows those that it needs itself, too.
    fn cors_headers(&self, value: &str) -> Outcome {
        let needed = ["SERVER_WEBSOCKET_CONN_GROUP_HEADER", "SERVER_WEBSOCKET_CONN_ID_HEADER"];
        let needed = needed.into_iter().filter_map(|name| self.value(name)).filter(|header| !header.is_empty());
        let mut headers = vec!["Content-Type".to_owned()];
        let given = value.split([' ', ',', '\t']).filter(|word| !word.is_empty());
        for header in needed.chain(given) {
            if !headers.iter().any(|known| known.eq_ignore_ascii_case(header)) {
                headers.push(header.to_owned());
            }
        }
        if headers.iter().any(|header| header == "*") {
            headers = vec!["*".to_owned()];
        }
        set("ingest.http.cors_allowed_headers", headers)
    }

    fn prometheus_enabled(&self, enabled: bool) -> Outcome {
        if !enabled {
            return so_anyway("metrics are always served, on admin.listen");
        }
        if self.value("METRIC_PROMETHEUS_PORT").is_some() {
            return so_anyway("metrics are always served");
        }
        set_with("admin.listen", "0.0.0.0:9090", ADMIN_IS_OPEN)
    }
}

const ADMIN_IS_OPEN: &str =
    "as with Raccoon every host may read it, the status page included: narrow it with admin.listen";

/// The librdkafka property that a variable names.
pub(super) fn kafka_property(name: &str) -> Option<String> {
    let property = name.strip_prefix(KAFKA_PREFIX).filter(|property| !property.is_empty())?;
    Some(property.to_ascii_lowercase().replace('_', "."))
}

fn kafka(property: &str, value: &str) -> Outcome {
    if property == "bootstrap.servers" || property == "metadata.broker.list" {
        let brokers = value.split(',').map(str::trim).filter(|broker| !broker.is_empty());
        return set("forward.brokers", brokers.map(str::to_owned).collect::<Vec<_>>());
    }
    let property = if property == "queue.buffering.max.ms" { "linger.ms" } else { property };
    let kafka = [(property.to_owned(), KafkaProperty::Text(value.to_owned()))].into();
    match validate(&ForwardConfig { kafka, ..ForwardConfig::default() }) {
        Err(ForwardConfigError::Refused { why, .. }) => unsupported(format!("it is not open to choice here: {why}")),
        Err(ForwardConfigError::RequestsInFlight { .. }) => {
            unsupported("more than 5 would break the order of events: 5 are in flight")
        }
        // What else is wrong with it is said when all values are checked together.
        _ => set(&keys::join(keys::KAFKA, property), value),
    }
}

fn set(key: &str, value: impl Into<Value>) -> Outcome {
    Ok(Taken::Mapped { keys: [(key.to_owned(), value.into())].into(), note: None })
}

fn set_with(key: &str, value: impl Into<Value>, note: &str) -> Outcome {
    Ok(Taken::Mapped { keys: [(key.to_owned(), value.into())].into(), note: Some(note.to_owned()) })
}

fn so_anyway(note: &str) -> Outcome {
    Ok(Taken::Mapped { keys: BTreeMap::new(), note: Some(note.to_owned()) })
}

fn unsupported(reason: impl Into<String>) -> Outcome {
    Ok(Taken::Unsupported { reason: reason.into() })
}

fn port(value: &str) -> Result<u16, String> {
    value.trim().parse().ok().filter(|port| *port != 0).ok_or_else(|| "must be a port, 1 to 65535".into())
}

fn everywhere(value: &str) -> Result<String, String> {
    Ok(format!("0.0.0.0:{}", port(value)?))
}

fn whole_number(value: &str) -> Result<i64, String> {
    value.trim().parse().map_err(|_| "must be a whole number".into())
}

fn milliseconds(value: &str) -> Result<String, String> {
    Ok(format!("{}ms", unsigned(value)?))
}

fn seconds(value: &str) -> Result<String, String> {
    Ok(format!("{}s", unsigned(value)?))
}

fn unsigned(value: &str) -> Result<u64, String> {
    value.trim().parse().map_err(|_| "must be a whole number, not negative".into())
}

/// As Go's `strconv.ParseBool`.
fn flag(value: &str) -> Result<bool, String> {
    match value.trim() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("must be true or false".into()),
    }
}

fn words(value: &str) -> Vec<String> {
    value.split([' ', ',', '\t']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn log_level(value: &str) -> Result<&'static str, String> {
    Ok(match value.trim().to_ascii_lowercase().as_str() {
        "panic" | "fatal" | "error" => "error",
        "warn" | "warning" => "warn",
        "info" => "info",
        "debug" => "debug",
        "trace" => "trace",
        _ => return Err("must be panic, fatal, error, warn, info, debug or trace".into()),
    })
}
