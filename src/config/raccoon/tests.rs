use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::config::{Config, ConfigError, Files, KafkaProperty, Loaded};

/// Every setting that Raccoon's documentation names, with a value that its own sample has or could have.
const ALL: &str = r#"
SERVER_WEBSOCKET_PORT="8090"
SERVER_WEBSOCKET_MAX_CONN="20000"
SERVER_WEBSOCKET_READ_BUFFER_SIZE="10240"
SERVER_WEBSOCKET_WRITE_BUFFER_SIZE="10240"
SERVER_WEBSOCKET_CONN_ID_HEADER="X-Device"
SERVER_WEBSOCKET_CONN_GROUP_HEADER=X-Group
SERVER_WEBSOCKET_CONN_GROUP_DEFAULT=none
SERVER_WEBSOCKET_PING_INTERVAL_MS=20000
SERVER_WEBSOCKET_PONG_WAIT_INTERVAL_MS=50000
SERVER_WEBSOCKET_WRITE_WAIT_INTERVAL_MS=4000
SERVER_WEBSOCKET_PINGER_SIZE=1
SERVER_WEBSOCKET_CHECK_ORIGIN="true"
SERVER_GRPC_PORT=8091
SERVER_GRPC_TLS_ENABLED=false
SERVER_GRPC_TLS_CERT_PATH=/etc/cert.pem
SERVER_GRPC_TLS_PUBLIC_KEY=/etc/key.pem
SERVER_CORS_ENABLED="true"
SERVER_CORS_ALLOWED_ORIGIN="http://localhost:3000 http://localhost:8080"
SERVER_CORS_ALLOWED_METHODS="GET HEAD POST OPTIONS"
SERVER_CORS_ALLOWED_HEADERS="Authorization x-device"
SERVER_CORS_ALLOW_CREDENTIALS=true
SERVER_CORS_PREFLIGHT_MAX_AGE_SECONDS=60
SERVER_BATCH_DEDUP_IN_CONNECTION_ENABLED=true
WORKER_BUFFER_CHANNEL_SIZE=5
WORKER_BUFFER_FLUSH_TIMEOUT_MS=5000
WORKER_POOL_SIZE=5
WORKER_KAFKA_DELIVERY_CHANNEL_SIZE=100
EVENT_DISTRIBUTION_PUBLISHER_PATTERN="raccoon-%s"
PUBLISHER_TYPE=kafka
PUBLISHER_KAFKA_CLIENT_BOOTSTRAP_SERVERS="kafka-1:9092,kafka-2:9092" # "kafka:9092" for docker compose setup
PUBLISHER_KAFKA_CLIENT_ACKS="1"
PUBLISHER_KAFKA_CLIENT_RETRIES="2"
PUBLISHER_KAFKA_CLIENT_RETRY_BACKOFF_MS="100"
PUBLISHER_KAFKA_CLIENT_STATISTICS_INTERVAL_MS=5000
PUBLISHER_KAFKA_CLIENT_QUEUE_BUFFERING_MAX_MESSAGES=100000
PUBLISHER_KAFKA_CLIENT_QUEUE_BUFFERING_MAX_MS=7
PUBLISHER_KAFKA_CLIENT_MAX_IN_FLIGHT=1000
PUBLISHER_KAFKA_CLIENT_COMPRESSION_TYPE=zstd
PUBLISHER_KAFKA_CLIENT_SASL_PASSWORD='p$ssword'
PUBLISHER_KAFKA_FLUSH_INTERVAL_MS=1500
METRIC_RUNTIME_STATS_RECORD_INTERVAL_MS=1000
METRIC_PROMETHEUS_ENABLED="true"
METRIC_PROMETHEUS_PATH=/metrics
METRIC_PROMETHEUS_PORT=9099
METRIC_STATSD_ADDRESS=":8125"
METRIC_STATSD_FLUSH_PERIOD_MS=1000
LOG_LEVEL="fatal"
EVENT_ACK=1
"#;

const LEAST: &str = "SERVER_WEBSOCKET_CONN_ID_HEADER=X-User-ID\nPUBLISHER_KAFKA_CLIENT_BOOTSTRAP_SERVERS=kafka:9092\n";

fn load_all(file: &str, raccoon: &str, environment: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let (config, env) = (directory.path().join("ringtail.toml"), directory.path().join("raccoon.env"));
    std::fs::write(&config, file).unwrap();
    std::fs::write(&env, raccoon).unwrap();
    let environment = environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Config::load_files_from(Files { config: Some(&config), raccoon_env: Some(&env) }, environment, &[])
}

fn load(raccoon: &str) -> Loaded {
    load_all("", raccoon, &[]).unwrap()
}

/// What a file that has `LEAST` and more lines is refused with.
fn refusals(lines: &str) -> Vec<String> {
    match load_all("", &format!("{LEAST}{lines}"), &[]) {
        Err(ConfigError::Invalid { problems }) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{lines}: {other:?}"),
    }
}

fn taken<'a>(loaded: &'a Loaded, variable: &str) -> &'a RaccoonSetting {
    let settings = &loaded.raccoon.as_ref().unwrap().settings;
    settings.iter().find(|setting| setting.variable == variable).unwrap_or_else(|| panic!("{variable} is passed over"))
}

#[test]
fn a_whole_file_is_taken_over() {
    let loaded = load(ALL);
    let config = &loaded.config;
    assert_eq!(config.ingest.http.listen, ([0, 0, 0, 0], 8090).into());
    assert_eq!(config.ingest.grpc.listen, ([0, 0, 0, 0], 8091).into());
    assert_eq!(config.admin.listen, ([0, 0, 0, 0], 9099).into());
    assert_eq!(config.ingest.connections_max, 20_000);
    assert_eq!(config.ingest.connection_id_header, "X-Device");
    assert_eq!(config.ingest.connection_group_header, "X-Group");
    assert_eq!(config.ingest.connection_group_default, "none");
    assert_eq!(config.ingest.ping_interval, Duration::from_secs(20));
    assert_eq!(config.ingest.pong_timeout, Duration::from_secs(50));
    assert_eq!(config.ingest.write_timeout, Duration::from_secs(4));
    let http = &config.ingest.http;
    assert!(http.cors_enabled && http.cors_allow_credentials && !http.check_origin);
    assert_eq!(http.cors_allowed_origins, ["http://localhost:3000", "http://localhost:8080"]);
    assert_eq!(http.cors_allowed_methods, ["GET", "HEAD", "POST", "OPTIONS"]);
    assert_eq!(http.cors_allowed_headers, ["Content-Type", "X-Group", "X-Device", "Authorization"]);
    assert_eq!(http.cors_max_age, Duration::from_secs(60));
    assert_eq!(config.forward.topic, "raccoon-%s");
    assert_eq!(config.forward.brokers, ["kafka-1:9092", "kafka-2:9092"]);
    assert_eq!(config.forward.stop_timeout, Duration::from_millis(1500));
    let property = |name: &str| config.forward.kafka.get(name).map(KafkaProperty::to_string);
    assert_eq!(property("retry.backoff.ms").as_deref(), Some("100"));
    assert_eq!(property("linger.ms").as_deref(), Some("7"));
    assert_eq!(property("compression.type").as_deref(), Some("zstd"));
    assert_eq!(property("sasl.password").as_deref(), Some("p$ssword"));
    assert_eq!(config.forward.kafka.len(), 4);
    assert_eq!(config.log.level, "error");

    // Every line is told of, once, in the order of the file, and what has no effect says why.
    let settings = &loaded.raccoon.as_ref().unwrap().settings;
    let names = ALL.lines().filter_map(|line| Some(line.split_once('=')?.0));
    assert!(names.eq(settings.iter().map(|setting| setting.variable.as_str())));
    let without: BTreeSet<_> =
        settings.iter().filter(|s| s.unsupported().is_some()).map(|s| s.variable.as_str()).collect();
    let expected = "SERVER_WEBSOCKET_READ_BUFFER_SIZE SERVER_WEBSOCKET_WRITE_BUFFER_SIZE SERVER_WEBSOCKET_PINGER_SIZE \
                    SERVER_GRPC_TLS_CERT_PATH SERVER_GRPC_TLS_PUBLIC_KEY WORKER_BUFFER_CHANNEL_SIZE WORKER_POOL_SIZE \
                    WORKER_BUFFER_FLUSH_TIMEOUT_MS WORKER_KAFKA_DELIVERY_CHANNEL_SIZE PUBLISHER_KAFKA_CLIENT_ACKS \
                    PUBLISHER_KAFKA_CLIENT_RETRIES PUBLISHER_KAFKA_CLIENT_STATISTICS_INTERVAL_MS \
                    PUBLISHER_KAFKA_CLIENT_QUEUE_BUFFERING_MAX_MESSAGES PUBLISHER_KAFKA_CLIENT_MAX_IN_FLIGHT \
                    METRIC_RUNTIME_STATS_RECORD_INTERVAL_MS METRIC_STATSD_ADDRESS METRIC_STATSD_FLUSH_PERIOD_MS EVENT_ACK";
    assert_eq!(without, expected.split_whitespace().collect());
    assert!(settings.iter().filter_map(RaccoonSetting::unsupported).all(|reason| reason.len() > 20));
}

#[test]
fn no_secret_is_shown() {
    let loaded = load(ALL);
    let shown = [
        serde_json::to_string(&loaded.raccoon).unwrap(),
        serde_json::to_string(&loaded.settings()).unwrap(),
        loaded.to_annotated_toml(),
        taken(&loaded, "PUBLISHER_KAFKA_CLIENT_SASL_PASSWORD").to_line(&loaded),
    ];
    assert!(shown.iter().all(|text| !text.contains("ssword'") && !text.contains("p$ss")), "{shown:#?}");
    let bad = refusals("PUBLISHER_KAFKA_CLIENT_SASL_PASSWORD=top$secret\n");
    assert!(bad[0].contains("PUBLISHER_KAFKA_CLIENT_SASL_PASSWORD") && !bad[0].contains("secret\""), "{bad:?}");
    assert!(!bad[0].contains("top"), "{bad:?}");
}

#[test]
fn raccoons_defaults_apply_where_clients_would_notice() {
    let loaded = load(LEAST);
    assert_eq!(loaded.config.ingest.connections_max, 30_000);
    assert!(loaded.config.ingest.http.check_origin);
    assert_eq!(loaded.source("ingest.connections_max").to_string(), "Raccoon's default of SERVER_WEBSOCKET_MAX_CONN");
    assert_eq!(taken(&loaded, "SERVER_WEBSOCKET_MAX_CONN").line, None);
    // Everything else is ours.
    let ours = Config::default();
    assert_eq!(loaded.config.admin, ours.admin);
    assert_eq!((&loaded.config.wal, &loaded.config.log), (&ours.wal, &ours.log));
    assert_eq!(
        load(&format!("{LEAST}METRIC_PROMETHEUS_ENABLED=true")).config.admin.listen,
        ([0, 0, 0, 0], 9090).into()
    );
    let port = load(&format!("{LEAST}METRIC_PROMETHEUS_PORT=9091"));
    assert_eq!(port.config.admin, ours.admin);
    assert!(taken(&port, "METRIC_PROMETHEUS_PORT").unsupported().is_some());
    let cors = load(&format!("{LEAST}SERVER_CORS_ENABLED=true\nSERVER_CORS_ALLOWED_ORIGIN=https://a.example"))
        .config
        .ingest
        .http;
    assert_eq!(cors.cors_allowed_headers, ["Content-Type", "X-User-ID"]);
    assert!(cors.cors_allowed_methods.contains(&"HEAD".to_owned()));
}

#[test]
fn the_env_file_stands_between_the_file_and_the_environment() {
    let file = "[ingest]\nconnections_max = 1\nconnection_id_header = \"X-File\"\n[log]\nlevel = \"debug\"\n";
    let raccoon = format!("{LEAST}LOG_LEVEL=warn\nSERVER_WEBSOCKET_PORT=1111\n");
    let loaded = load_all(file, &raccoon, &[("RINGTAIL_INGEST__HTTP__LISTEN", "127.0.0.1:2222")]).unwrap();
    let config = &loaded.config;
    assert_eq!(config.ingest.connections_max, 1, "the file over Raccoon's default");
    assert_eq!(config.log.level, "warn", "the env file over the file");
    assert_eq!(config.ingest.connection_id_header, "X-User-ID");
    assert_eq!(config.ingest.http.listen, ([127, 0, 0, 1], 2222).into(), "the environment over both");
    let line = |variable: &str| taken(&loaded, variable).to_line(&loaded);
    assert_eq!(line("LOG_LEVEL"), "line 3: LOG_LEVEL=warn -> log.level = \"warn\"");
    assert_eq!(
        line("SERVER_WEBSOCKET_PORT"),
        "line 4: SERVER_WEBSOCKET_PORT=1111 -> ingest.http.listen = \"0.0.0.0:1111\", overridden by environment variable \
         RINGTAIL_INGEST__HTTP__LISTEN"
    );
    assert!(line("SERVER_WEBSOCKET_MAX_CONN").starts_with("default: SERVER_WEBSOCKET_MAX_CONN=30000 -> "));
    assert!(line("SERVER_WEBSOCKET_MAX_CONN").contains("overridden by "));
}

#[test]
fn what_cannot_be_is_refused_with_its_line() {
    for (lines, expected) in [
        ("SERVER_GRPC_TLS_ENABLED=true", "gRPC over TLS is not served"),
        ("PUBLISHER_TYPE=pubsub", "must be kafka"),
        ("SERVER_WEBSOCKET_PORT=http", "must be a port"),
        ("SERVER_WEBSOCKET_MAX_CONN=many", "must be a whole number"),
        ("SERVER_WEBSOCKET_MAX_CONN=-5", "ingest.connections_max"),
        ("SERVER_WEBSOCKET_PING_INTERVAL_MS=30s", "must be a whole number"),
        ("SERVER_WEBSOCKET_PING_INTERVAL_MS=60000", "ingest.pong_timeout"),
        ("SERVER_CORS_ENABLED=yes", "must be true or false"),
        ("SERVER_CORS_ENABLED=true", "ingest.http.cors_allowed_origins"),
        ("LOG_LEVEL=loud", "must be panic, fatal"),
        ("EVENT_ACK=2", "must be 0 or 1"),
        ("EVENT_DISTRIBUTION_PUBLISHER_PATTERN=a topic", "forward.topic"),
        ("PUBLISHER_KAFKA_CLIENT_LINGRE_MS=5", "lingre.ms"),
        ("SERVER_WEBSOCKET_PORT", "is not NAME=value"),
        ("WORKER_POOL_SIZE=$COUNT", "refers to another variable"),
        ("PUBLISHER_KAFKA_CLIENT_BOOTSTRAP_SERVERS=:", "forward.brokers"),
    ] {
        let refusals = refusals(lines);
        assert_eq!(refusals.len(), 1, "{lines}: {refusals:?}");
        assert!(refusals[0].contains(expected), "{lines}: {refusals:?}");
        let place = if lines.contains("INTERVAL_MS=60000") || lines == "SERVER_CORS_ENABLED=true" {
            "default"
        } else {
            ".env:3"
        };
        assert!(refusals[0].contains(place), "{lines}: {refusals:?}");
    }
    #[cfg(not(feature = "kafka-tls"))]
    {
        let refusals = refusals("PUBLISHER_KAFKA_CLIENT_SECURITY_PROTOCOL=SASL_SSL");
        assert!(refusals[0].contains("kafka-tls") && refusals[0].contains(".env:3"), "{refusals:?}");
    }
}

#[test]
fn what_raccoon_requires_must_be_said_somewhere() {
    let problems = match load_all("", "LOG_LEVEL=info", &[]) {
        Err(ConfigError::Invalid { problems }) => problems,
        other => panic!("{other:?}"),
    };
    let keys: Vec<_> = problems.iter().map(|problem| problem.key.as_str()).collect();
    assert_eq!(keys, ["SERVER_WEBSOCKET_CONN_ID_HEADER", "PUBLISHER_KAFKA_CLIENT_BOOTSTRAP_SERVERS"]);
    let file = "[ingest]\nconnection_id_header = \"X-File\"\n";
    let environment = [("RINGTAIL_FORWARD__BROKERS", "kafka:9092")];
    assert_eq!(load_all(file, "LOG_LEVEL=info", &environment).unwrap().config.ingest.connection_id_header, "X-File");
}

#[test]
fn a_name_that_comes_twice_counts_once() {
    let loaded = load(&format!("{LEAST}LOG_LEVEL=debug\nlog_level=trace\n"));
    assert_eq!(loaded.config.log.level, "trace");
    let settings = &loaded.raccoon.as_ref().unwrap().settings;
    let lines: Vec<_> = settings.iter().filter(|setting| setting.variable == "LOG_LEVEL").collect();
    assert_eq!(lines[0].unsupported(), Some("it is set again in line 4"));
    assert_eq!(lines[1].unsupported(), None);
}

#[test]
fn a_file_that_is_not_there_is_an_error() {
    let files = Files { config: None, raccoon_env: Some(Path::new("/nonexistent/.env")) };
    assert!(matches!(Config::load_files_from(files, [], &[]), Err(ConfigError::Read { .. })));
}
