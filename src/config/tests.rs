use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use proptest::prelude::*;

use super::*;

/// Loads `file` and `environment` without touching the process.
fn load(file: &str, environment: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ringtail.toml");
    std::fs::write(&path, file).unwrap();
    let environment = environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Config::load_from(Some(&path), environment, &[])
}

fn problems(result: Result<Loaded, ConfigError>) -> Vec<Problem> {
    match result {
        Err(ConfigError::Invalid { problems }) => problems,
        other => panic!("expected problems, got {other:?}"),
    }
}

/// What one value of a file or of the environment is refused with.
fn refusal(file: &str, environment: &[(&str, &str)]) -> String {
    let problems = problems(load(file, environment));
    assert_eq!(problems.len(), 1, "{problems:?}");
    format!("{}: {}", problems[0].key, problems[0].message)
}

#[test]
fn the_template_is_the_default() {
    assert_eq!(load(TEMPLATE, &[]).unwrap().config, Config::default());
}

#[test]
fn the_template_names_every_key_once() {
    let named = |table: &toml::Table| {
        let mut names = BTreeSet::new();
        let mut tables = vec![(String::new(), table.clone())];
        while let Some((prefix, table)) = tables.pop() {
            for (name, value) in table {
                let key = keys::join(&prefix, &name);
                if let toml::Value::Table(table) = value {
                    tables.push((key.clone(), table));
                }
                names.insert(key);
            }
        }
        names
    };
    assert_eq!(named(&TEMPLATE.parse().unwrap()), named(&keys::to_table(&Config::default())));
}

#[test]
fn later_layers_win_and_are_remembered() {
    let file = "[wal]\ndirectory = \"/file\"\nbytes_max = \"1GiB\"\n\n[log]\nlevel = \"debug\"\n";
    let environment = [("RINGTAIL_WAL__DIRECTORY", "/environment"), ("RINGTAIL_LOG__LEVEL", "warn"), ("PATH", "/bin")];
    let environment = environment.map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ringtail.toml");
    std::fs::write(&path, file).unwrap();
    let level = Override { flag: "--log-level", key: "log.level", value: "trace".into() };
    let loaded = Config::load_from(Some(&path), environment, &[level]).unwrap();

    assert_eq!(loaded.config.wal.directory, PathBuf::from("/environment"));
    assert_eq!(loaded.config.wal.bytes_max, ByteSize::gib(1));
    assert_eq!(loaded.config.log.level, "trace");
    assert_eq!(loaded.source("wal.directory"), Source::Environment { variable: "RINGTAIL_WAL__DIRECTORY".into() });
    assert_eq!(loaded.source("wal.bytes_max"), Source::File { path, line: 3 });
    assert_eq!(loaded.source("log.level"), Source::Flag { flag: "--log-level" });
    assert_eq!(loaded.source("log.format"), Source::Default);
}

#[test]
fn environment_takes_every_type() {
    let loaded = load(
        "",
        &[
            ("RINGTAIL_FORWARD__BROKERS", "one:9092, two:9092"),
            ("RINGTAIL_INGEST__HTTP__CORS_ALLOWED_METHODS", "[\"PUT\"]"),
            ("RINGTAIL_INGEST__CONNECTIONS_MAX", "7"),
            ("RINGTAIL_INGEST__HTTP__CHECK_ORIGIN", "true"),
            ("RINGTAIL_INGEST__CONNECTION_GROUP_DEFAULT", "42"),
            ("RINGTAIL_INGEST__READ_TIMEOUT", "1m 5s"),
            ("RINGTAIL_WAL__FREE_BYTES_MIN", "12345"),
            ("RINGTAIL_FORWARD__KAFKA__LINGER_MS", "5"),
            ("RINGTAIL_FORWARD__KAFKA__SASL_PASSWORD", "007"),
        ],
    );
    let config = loaded.unwrap().config;
    assert_eq!(config.forward.brokers, ["one:9092", "two:9092"]);
    assert_eq!(config.ingest.http.cors_allowed_methods, ["PUT"]);
    assert_eq!(config.ingest.connections_max, 7);
    assert!(config.ingest.http.check_origin);
    assert_eq!(config.ingest.connection_group_default, "42");
    assert_eq!(config.ingest.read_timeout, Duration::from_secs(65));
    assert_eq!(config.wal.free_bytes_min, ByteSize::b(12345));
    assert_eq!(config.forward.kafka["linger.ms"].to_string(), "5");
    assert_eq!(config.forward.kafka["sasl.password"].to_string(), "007");

    assert!(load("", &[("RINGTAIL_FORWARD__BROKERS", "")]).unwrap().config.forward.brokers.is_empty());
}

#[test]
fn kafka_properties_are_quoted_or_nested() {
    let file = "[forward.kafka]\n\"linger.ms\" = 5\ncompression.type = \"lz4\"\nsocket.keepalive.enable = true\n";
    let loaded = load(file, &[("RINGTAIL_FORWARD__KAFKA__LINGER_MS", "9")]).unwrap();
    let kafka = &loaded.config.forward.kafka;
    assert_eq!(kafka["linger.ms"], KafkaProperty::Text("9".into()));
    assert_eq!(kafka["compression.type"], KafkaProperty::Text("lz4".into()));
    assert_eq!(kafka["socket.keepalive.enable"], KafkaProperty::Bool(true));
    assert!(matches!(loaded.source("forward.kafka.compression.type"), Source::File { line: 3, .. }));

    let refused = refusal("[forward.kafka]\n\"linger.ms\" = 5\nlinger.ms = 6\n", &[]);
    assert_eq!(refused, "forward.kafka.linger.ms: is set twice, as a quoted key and as a table");
    let refused = refusal("[forward.kafka]\n\"linger.ms\" = 1.5\n", &[]);
    assert!(refused.ends_with("must be a string, a whole number or a boolean"), "{refused}");
}

#[test]
fn unknown_keys_name_the_nearest() {
    let expected = "wal.dirctory: unknown key, the nearest known key is wal.directory";
    assert_eq!(refusal("[wal]\ndirctory = \"x\"\n", &[]), expected);
    let expected = "forward.kafka: is a table, not a value";
    assert_eq!(refusal("[forward]\nkafka = []\n", &[]), expected);
    assert_eq!(refusal("[wal.directory]\nx = 1\n", &[]), "wal.directory: is map, must be a path");
    assert_eq!(refusal("wal = 1\n", &[]), "wal: is a table, not a value");
    let expected = "RINGTAIL_WAL_DIRECTORY: unknown key, the nearest known variable is RINGTAIL_WAL__DIRECTORY";
    assert_eq!(refusal("", &[("RINGTAIL_WAL_DIRECTORY", "x")]), expected);
}

#[test]
fn every_problem_is_reported_at_once_with_its_place() {
    let file =
        "[ingest]\nping_interval = \"50ms\"\nconnections_max = \"many\"\nnonsense = 1\n[wal]\nwhen_full = \"panic\"\n";
    let environment = [("RINGTAIL_WAL__SEGMENT_BYTES", "1MiB"), ("RINGTAIL_FORWARD__TOPIC", "a b")];
    let text = load(file, &environment).unwrap_err().to_string();
    assert!(text.starts_with("the configuration has 7 problems:"), "{text}");
    for expected in [
        "ingest.ping_interval = \"50ms\": must be at least 100ms (",
        "ringtail.toml:2)",
        "ingest.connections_max: is string \"many\", must be a whole number, not negative (",
        "ringtail.toml:3)",
        "ingest.nonsense: unknown key",
        "wal.when_full: is \"panic\", must be one of reject, drop_oldest (",
        "ringtail.toml:6)",
        "wal.segment_bytes = \"1MiB\": must be at least 8MiB (environment variable RINGTAIL_WAL__SEGMENT_BYTES)",
        "ingest.batch_bytes_max = \"4MiB\": must be at most half of wal.segment_bytes, 1MiB (default)",
        "forward.topic = \"a b\": must be a Kafka topic name",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[test]
fn files_that_cannot_be_used() {
    let missing = Config::load_from(Some(std::path::Path::new("/nonexistent/ringtail.toml")), [], &[]);
    assert!(matches!(missing, Err(ConfigError::Read { .. })));
    let default = |path| Files::default().or_default(std::path::Path::new(path)).map(|files| files.config.is_some());
    assert!(!default("/nonexistent/ringtail.toml").unwrap());
    // Not absent, but out of reach, as behind a directory that may not be entered.
    assert!(matches!(default("/dev/null/ringtail.toml"), Err(ConfigError::Read { .. })));
    let broken = load("[wal\n", &[]).unwrap_err();
    assert!(matches!(broken, ConfigError::Syntax { .. }));
    assert!(broken.to_string().contains("line 1"), "{broken}");
}

#[test]
fn show_names_sources_and_hides_secrets() {
    let file = "[forward.kafka]\n\"sasl.password\" = \"hunter2\"\n\"linger.ms\" = 5\n";
    let loaded = load(file, &[("RINGTAIL_LOG__LEVEL", "debug")]).unwrap();
    let shown = loaded.to_annotated_toml();
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(!serde_json::to_string(&loaded.settings()).unwrap().contains("hunter2"));
    assert!(shown.contains("\"sasl.password\" = \"<redacted>\""), "{shown}");
    assert!(shown.contains("level = \"debug\"  # environment variable RINGTAIL_LOG__LEVEL"), "{shown}");
    assert!(shown.contains("\"linger.ms\" = 5"), "{shown}");

    let mut reloaded = load(&shown.replace("<redacted>", "hunter2"), &[]).unwrap().config;
    assert_eq!(reloaded, loaded.config);
    reloaded.forward.kafka.clear();
    reloaded.log.level = "info".into();
    assert_eq!(reloaded, Config::default());
}

#[test]
fn a_secret_of_the_wrong_type_is_not_printed() {
    let refused = refusal("[forward.kafka]\n\"sasl.password\" = 12.34\n", &[]);
    assert_eq!(refused, "forward.kafka.sasl.password: has the wrong type");
}

proptest! {
    #[test]
    fn loading_never_panics(file in "[a-z\\[\\]\\.=\"0-9\n ]{0,80}", key in "[A-Z_]{0,30}", value in ".{0,20}") {
        let _ = load(&file, &[(&format!("RINGTAIL_{key}"), &value)]);
    }
}

/// One value that is refused for each limit, and one beside it that is taken.
#[test]
fn limits() {
    let cases = [
        ("[ingest]\nconnection_id_header = \"\"", "connection_id_header = \"X-Id\""),
        ("[ingest]\nconnection_id_header = \"x id\"", "connection_id_header = \"x_id\""),
        ("[ingest]\nconnection_id_header = \"x-id-bin\"", "connection_id_header = \"x-bin-id\""),
        ("[ingest]\nconnection_group_header = \"x-user-id\"", "connection_group_header = \"x-group\""),
        ("[ingest]\nconnections_max = 0", "connections_max = 1"),
        ("[ingest]\nbatch_bytes_max = 1023", "batch_bytes_max = 1024"),
        ("[ingest]\nbatch_events_max = 0", "batch_events_max = 1"),
        ("[ingest]\nin_flight_bytes_max = \"3MiB\"", "in_flight_bytes_max = \"4MiB\""),
        ("[ingest]\nconnection_in_flight_batches_max = 0", "connection_in_flight_batches_max = 1"),
        ("[ingest]\nping_interval = \"99ms\"", "ping_interval = \"100ms\""),
        ("[ingest]\npong_timeout = \"30s\"", "pong_timeout = \"31s\""),
        ("[ingest]\nwrite_timeout = \"9ms\"", "write_timeout = \"10ms\""),
        ("[ingest]\nread_timeout = \"9ms\"", "read_timeout = \"10ms\""),
        ("[ingest.http]\nlisten = \"0.0.0.0:8081\"", "listen = \"0.0.0.0:8082\""),
        ("[ingest.http]\nlisten = \"[::1]:9464\"\n[admin]\nlisten=\"[::1]:9464\"", "listen = \"[::1]:9464\""),
        ("[ingest.http]\ncors_enabled = true", "cors_enabled = true\ncors_allowed_origins = [\"*\"]"),
        ("[ingest.http]\ncors_allowed_origins = [\"example.org\"]", "cors_allowed_origins = [\"https://example.org\"]"),
        (
            "[ingest.http]\ncors_allow_credentials = true\ncors_allowed_origins = [\"*\"]",
            "cors_allow_credentials = true\ncors_allowed_origins = [\"https://example.org:8443\"]",
        ),
        ("[ingest.http]\ncors_allowed_headers = [\"a b\"]", "cors_allowed_headers = [\"*\"]"),
        ("[ingest.http]\ncors_allowed_methods = [\"a b\"]", "cors_allowed_methods = [\"*\"]"),
        ("[wal]\ndirectory = \"\"", "directory = \"data\""),
        ("[wal]\nsegment_bytes = \"7MiB\"\n[ingest]\nbatch_bytes_max = 1024", "segment_bytes = \"8MiB\""),
        ("[wal]\nsegment_bytes = \"257MiB\"", "segment_bytes = \"256MiB\""),
        ("[wal]\nbytes_max = \"127MiB\"", "bytes_max = \"128MiB\""),
        ("[forward]\nbrokers = [\"kafka:0\"]", "brokers = [\"kafka\"]"),
        ("[forward]\nbrokers = [\"\"]", "brokers = [\"[::1]:9092\"]"),
        ("[forward]\ntopic = \"\"", "topic = \"%s\""),
        ("[forward]\ntopic = \"%s-%s\"", "topic = \"events\""),
        ("[forward]\nin_flight_bytes_max = \"1023KiB\"", "in_flight_bytes_max = \"1MiB\""),
        ("[forward]\nretry_delay_min = \"0s\"", "retry_delay_min = \"1ms\""),
        ("[forward]\nretry_delay_max = \"99ms\"", "retry_delay_max = \"100ms\""),
        ("[forward]\ndelivery = \"exactly_once\"\nlive_first = true", "live_first = true"),
        ("[log]\nlevel = \"inof\"", "level = \"info,ringtail::wal=debug\""),
    ];
    for (refused, taken) in cases {
        let table = refused.lines().next().unwrap();
        refusal(refused, &[]);
        let taken = format!("{table}\n{taken}\n");
        assert!(load(&taken, &[]).is_ok(), "{taken}");
    }
}

#[test]
fn what_the_kafka_client_does_not_take_is_refused_where_it_was_set() {
    for (property, value, words) in [
        ("lingre.ms", "5", "lingre.ms"),
        ("linger.ms", "\"soon\"", "Invalid value"),
        ("enable.idempotence", "false", "cannot be set"),
        ("max.in.flight", "6", "1 to 5"),
    ] {
        let file = format!("[forward.kafka]\n\"compression.type\" = \"lz4\"\n\"{property}\" = {value}\n");
        let problems = problems(load(&file, &[]));
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].key, format!("forward.kafka.{property}"));
        assert!(problems[0].message.contains(words), "{}", problems[0].message);
        assert!(matches!(problems[0].source, Source::File { line: 3, .. }), "{}", problems[0].source);
    }
}
