//! `--raccoon-env`: the service in the place of a Raccoon, told by Raccoon's own file.

#[path = "support/turns.rs"]
mod turns;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::mocking::MockCluster;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const PATIENCE: Duration = Duration::from_secs(60);
const TOPIC: &str = "raccoon-page";

/// The binary, without the configuration of whoever runs the tests.
fn ringtail() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"RINGTAIL_")) {
        command.env_remove(name);
    }
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = turns::output(ringtail().args(arguments)).unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn write(directory: &Path, text: &str) -> String {
    let path = directory.join("raccoon.env");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Killed when dropped.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn config_show_prints_what_became_of_each_setting() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(
        directory.path(),
        "SERVER_WEBSOCKET_CONN_ID_HEADER=X-Device\nEVENT_ACK=1\nPUBLISHER_KAFKA_CLIENT_BOOTSTRAP_SERVERS=kafka:9092\n\
         PUBLISHER_KAFKA_CLIENT_SASL_PASSWORD=geheim\n",
    );
    let (code, shown, _) = run(&["config", "show", "--raccoon-env", &file]);
    assert_eq!(code, Some(0));
    for line in [
        "#   line 1: SERVER_WEBSOCKET_CONN_ID_HEADER=X-Device -> ingest.connection_id_header = \"X-Device\"",
        "#   line 2: EVENT_ACK=1 -> NO EFFECT: Raccoon acks once Kafka has the batch. ",
        "#   line 4: PUBLISHER_KAFKA_CLIENT_SASL_PASSWORD=<redacted> -> forward.kafka.sasl.password = \"<redacted>\"",
        "#   default: SERVER_WEBSOCKET_MAX_CONN=30000 -> ingest.connections_max = 30000",
    ] {
        assert!(shown.contains(line), "{line}\n{shown}");
    }
    assert!(!shown.contains("geheim"), "{shown}");
    // The mapping is a comment: the whole is a configuration file.
    let table: toml::Table = shown.parse().unwrap();
    assert_eq!(table["ingest"]["connections_max"].as_integer(), Some(30_000));

    let (_, json, _) = run(&["config", "show", "--json", "--raccoon-env", &file]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let acks = &json["raccoon"]["settings"][1];
    assert_eq!(
        (&acks["variable"], &acks["line"], &acks["taken"]),
        (&"EVENT_ACK".into(), &2.into(), &"unsupported".into())
    );
    let settings = json["settings"].as_array().unwrap();
    let header = settings.iter().find(|setting| setting["key"] == "ingest.connection_id_header").unwrap();
    assert_eq!(header["source"]["variable"], "SERVER_WEBSOCKET_CONN_ID_HEADER");
    assert!(!json.to_string().contains("geheim"));

    let (code, _, checked) = run(&["config", "check", "--raccoon-env", &file]);
    assert!(code == Some(0) && checked.contains("line 2: EVENT_ACK=1 -> NO EFFECT"), "{checked}");
}

#[test]
fn what_is_refused_keeps_the_service_from_starting() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "SERVER_GRPC_TLS_ENABLED=true\nPUBLISHER_TYPE=pubsub\n");
    for arguments in [["config", "show"].as_slice(), &["config", "check"], &["serve"]] {
        let (code, shown, said) = run(&[arguments, &["--raccoon-env", &file]].concat());
        assert_eq!((code, shown.as_str()), (Some(64), ""), "{said}");
        for part in ["SERVER_GRPC_TLS_ENABLED = true", "raccoon.env:1", "PUBLISHER_TYPE = pubsub", "CONN_ID_HEADER"] {
            assert!(said.contains(part), "{part} in {said}");
        }
    }
}

/// `ringtail serve --raccoon-env`, on free ports and a log in `directory`. Gives back what it logged, too.
fn serve(directory: &Path, file: &str) -> (Serving, SocketAddr, String) {
    let mut command = ringtail();
    command.args(["serve", "--raccoon-env", file]).env("RINGTAIL_WAL__DIRECTORY", directory.join("wal"));
    for key in ["INGEST__HTTP__LISTEN", "INGEST__GRPC__LISTEN", "ADMIN__LISTEN"] {
        command.env(format!("RINGTAIL_{key}"), "127.0.0.1:0");
    }
    command.env("RINGTAIL_WAL__FREE_BYTES_MIN", "0B").stderr(Stdio::piped());
    let mut serving = Serving(turns::spawn(&mut command).unwrap());
    let mut log = BufReader::new(serving.0.stderr.take().unwrap()).lines();
    let mut said = String::new();
    let http = loop {
        let line = log.next().expect("it becomes ready").unwrap();
        said += &line;
        if let Some((_, rest)) = line.split_once(" ready http=") {
            break rest.split(' ').next().unwrap().parse().unwrap();
        }
    };
    // What it says later must not fill the pipe.
    std::thread::spawn(move || log.for_each(drop));
    (serving, http, said)
}

/// Sends one event over REST as `d-1`, which must be acked.
fn post(http: SocketAddr, req_guid: &str) {
    let body = format!(r#"{{"req_guid":"{req_guid}","events":[{{"type":"page","event_bytes":"aGVsbG8="}}]}}"#);
    let mut stream = TcpStream::connect(http).unwrap();
    write!(
        stream,
        "POST /api/v1/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nX-Device: d-1\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// Waits for the event at `offset` of the topic: its key and value.
fn event(brokers: &str, offset: i64) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "test")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(TOPIC, 0, Offset::Offset(offset)).unwrap();
    consumer.assign(&assignment).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "the event does not arrive");
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
            return (message.key().map(<[u8]>::to_vec), message.payload().map(<[u8]>::to_vec));
        }
    }
}

#[test]
fn the_service_takes_the_place_of_a_raccoon_and_leaves_it_again() {
    const BROKER: i32 = 1;
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic(TOPIC, 1, 1).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let brokers = cluster.bootstrap_servers();
    let file = write(
        directory.path(),
        &format!(
            "SERVER_WEBSOCKET_CONN_ID_HEADER=X-Device\nPUBLISHER_KAFKA_CLIENT_BOOTSTRAP_SERVERS=\"{brokers}\"\n\
             EVENT_DISTRIBUTION_PUBLISHER_PATTERN=raccoon-%s\nPUBLISHER_KAFKA_CLIENT_ACKS=1\n\
             PUBLISHER_KAFKA_FLUSH_INTERVAL_MS=200\n"
        ),
    );
    let (mut serving, http, said) = serve(directory.path(), &file);
    assert!(said.contains("raccoon settings taken over") && said.contains("without_effect=1"), "{said}");
    assert!(said.contains("setting=\"PUBLISHER_KAFKA_CLIENT_ACKS\""), "{said}");
    post(http, "1");
    assert_eq!(event(&brokers, 0), (Some(b"d-1".to_vec()), Some(b"hello".to_vec())));

    // Back to the Raccoon, with a batch left in the log.
    turns::take_down(&cluster, BROKER);
    post(http, "2");
    // SAFETY: kill has no preconditions; the child has not been waited for, so the id is its own.
    assert_eq!(unsafe { libc::kill(serving.0.id() as libc::pid_t, libc::SIGTERM) }, 0);
    assert!(serving.0.wait().unwrap().success());
    cluster.broker_up(BROKER).unwrap();
    let log = directory.path().join("wal");
    let (code, _, said) = run(&["backlog", "drain", "--raccoon-env", &file, "--directory", log.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(event(&brokers, 1), (Some(b"d-1".to_vec()), Some(b"hello".to_vec())));
}
