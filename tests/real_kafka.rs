//! The service in front of a real Kafka, one promise a test. What happens when things are killed is in `real_kafka_soak`.

#[path = "support/http.rs"]
mod http;
#[path = "support/kafka.rs"]
mod kafka;
#[path = "support/service.rs"]
mod service;
#[path = "support/traffic.rs"]
mod traffic;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use kafka::{Kafka, Options};
use rand::RngCore;
use ringtail::client::{RetryPolicy, Sender, new_req_guid};
use ringtail::proto::{Event, SendEventRequest};
use service::{Scheme, Service};
use traffic::{Load, Traffic, topic};

const PATIENCE: Duration = Duration::from_secs(120);

/// Sends one batch of (type, payload), which must be acked. On a connection of its own: while the service still knows
/// the one before, it refuses it, to be tried again.
fn send(service: &Service, scheme: Scheme, id: &str, events: &[(&str, &[u8])]) {
    let events = events
        .iter()
        .map(|(event_type, payload)| Event { event_bytes: payload.to_vec().into(), r#type: (*event_type).to_owned() });
    let request = SendEventRequest { req_guid: new_req_guid(), sent_time: None, events: events.collect() };
    let sender = Sender::new(service.ports().options(scheme, id), RetryPolicy::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        sender.deliver(&request).await.unwrap();
        sender.close().await;
    });
}

/// The keys and values of a topic, by partition and offset.
fn records(kafka: &Kafka, topic: &str) -> Vec<(String, Vec<u8>)> {
    let text = |key: Option<Vec<u8>>| String::from_utf8(key.expect("every record has a key")).unwrap();
    kafka.read_topic(topic).into_iter().map(|record| (text(record.key), record.value)).collect()
}

fn values(kafka: &Kafka, topic: &str) -> Vec<Vec<u8>> {
    records(kafka, topic).into_iter().map(|(_, value)| value).collect()
}

/// What `ringtail parked list --json` prints.
fn parked(service: &Service) -> Vec<serde_json::Value> {
    let text = service.run(&["parked", "list", "--json"]);
    text.lines().map(|line| serde_json::from_str(line).expect("lines of JSON")).collect()
}

/// `promtool check metrics` has nothing to say.
#[track_caller]
fn assert_metrics_are_clean(service: &Service) {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start promtool: is Prometheus installed?");
    promtool.stdin.take().unwrap().write_all(service.metrics().as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && said.trim().is_empty(), "promtool: {said}");
}

fn without_topic_creation() -> Options {
    let properties = vec![("auto.create.topics.enable".to_owned(), "false".to_owned())];
    Options { properties, ..Options::default() }
}

#[test]
fn topic_key_and_value_are_exactly_what_was_sent() {
    let kafka = Kafka::start();
    let mut service = Service::start(&kafka.bootstrap(), "");
    let mut large = vec![0; 900_000];
    rand::rng().fill_bytes(&mut large);
    let every_byte: Vec<u8> = (0..=255).collect();
    let payloads: [&[u8]; 4] = [b"", &every_byte, &large, b"last"];
    for scheme in Scheme::ALL {
        let events: Vec<_> = payloads.iter().flat_map(|payload| [("page", *payload), ("buy", *payload)]).collect();
        send(&service, scheme, &format!("{scheme:?} \u{e4}/%s"), &events[..4]);
        send(&service, scheme, &format!("{scheme:?} \u{e4}/%s"), &events[4..]);
    }
    service.wait_until_drained(PATIENCE);
    for event_type in ["page", "buy"] {
        let found = records(&kafka, &topic(event_type));
        assert_eq!(found.len(), Scheme::ALL.len() * payloads.len());
        for scheme in Scheme::ALL {
            let key = format!("{scheme:?} \u{e4}/%s");
            let of_client: Vec<_> = found.iter().filter(|(found, _)| *found == key).map(|(_, value)| value).collect();
            assert!(of_client == payloads, "{key}, {event_type}: {} values", of_client.len());
        }
    }
    assert_eq!(service.assert_books_balance(), 24.0);
    assert_metrics_are_clean(&service);
    assert!(service.stop().success());
}

#[test]
fn what_is_too_large_for_its_topic_is_parked_and_the_rest_arrives() {
    park_what_is_too_large(false);
}

/// Here small events fail as well: together they are too large for the topic.
#[test]
fn what_is_too_large_in_a_backlog_is_parked_and_the_rest_arrives() {
    park_what_is_too_large(true);
}

fn park_what_is_too_large(outage: bool) {
    let mut kafka = Kafka::start();
    let narrow = topic("narrow");
    kafka.create_topic(&narrow, 1, &[("max.message.bytes", "2000")]);
    let mut service = Service::start(&kafka.bootstrap(), "");
    let oversize = vec![7; 5000];
    if outage {
        kafka.stop();
    }
    let number = |number: u32| number.to_be_bytes().to_vec();
    for batch in 0..10u32 {
        let numbers: Vec<Vec<u8>> = (batch * 50..batch * 50 + 50).map(number).collect();
        let mut events: Vec<(&str, &[u8])> =
            numbers.iter().flat_map(|payload| [("narrow", &payload[..]), ("wide", &payload[..])]).collect();
        if batch % 3 == 1 {
            events.insert(40, ("narrow", &oversize));
        }
        send(&service, Scheme::WebSocket, "one", &events);
    }
    if outage {
        kafka.restart();
    }
    service.wait_until_drained(PATIENCE);

    // The lane flows again: what is read from now on keeps its place.
    let numbers: Vec<Vec<u8>> = (500..550).map(number).collect();
    let events: Vec<(&str, &[u8])> = numbers.iter().map(|payload| ("narrow", &payload[..])).collect();
    send(&service, Scheme::Rest, "one", &events);
    service.wait_until_drained(PATIENCE);

    let expected: Vec<Vec<u8>> = (0..550).map(number).collect();
    assert!(values(&kafka, &topic("wide")) == expected[..500], "other topics are not disturbed");
    let arrived = values(&kafka, &narrow);
    let mut sorted = arrived.clone();
    sorted.sort();
    assert!(sorted == expected, "{} small events arrived in the narrow topic", arrived.len());
    assert!(arrived[500..] == expected[500..], "what was sent last arrived last, in order");
    // What the client held when a neighbour was refused may overtake it: see lanes.rs.
    println!("overtaken at {:?}", descents(&arrived));

    let listed = parked(&service);
    assert_eq!(listed.len(), 3, "{listed:?}");
    for event in &listed {
        assert_eq!(event["reason"], "too_large");
        assert_eq!(event["topic"], narrow);
        assert_eq!(event["key"], "one");
        assert_eq!(event["payload_bytes"], 5000);
    }
    let failures = service.metric("ringtail_forward_delivery_failures_total", "reason=\"too_large\"");
    println!("{failures} attempts were too large");
    assert!(failures >= 3.0);
    assert_eq!(service.metric("ringtail_forward_parked_events", ""), 3.0);
    assert_eq!(service.metric("ringtail_forward_parked_events_total", "reason=\"too_large\""), 3.0);
    assert_eq!(service.assert_books_balance(), 1053.0);
    assert_metrics_are_clean(&service);
}

/// Numbers that stand before a lower one.
fn descents(values: &[Vec<u8>]) -> Vec<u32> {
    let numbers: Vec<u32> = values.iter().map(|value| u32::from_be_bytes(value[..].try_into().unwrap())).collect();
    numbers.windows(2).filter(|pair| pair[0] >= pair[1]).map(|pair| pair[0]).collect()
}

#[test]
fn topics_that_do_not_exist_or_cannot_are_parked_after_their_grace() {
    let kafka = Kafka::start_with(without_topic_creation());
    kafka.create_topic(&topic("known"), 2, &[]);
    let mut service = Service::start(&kafka.bootstrap(), "topic_grace = \"3s\"");
    let long_type = "x".repeat(300);
    for number in 0..5 {
        let payload = format!("payload {number}").into_bytes();
        let types = ["known", "unknown", "no topic", long_type.as_str()];
        let events: Vec<(&str, &[u8])> = types.iter().map(|event_type| (*event_type, &payload[..])).collect();
        send(&service, Scheme::ALL[number % 3], "one", &events);
    }
    let known = |kafka: &Kafka| values(kafka, &topic("known")).len();
    service.wait_for("the known topic to flow", PATIENCE, |_| known(&kafka) == 5);
    service.wait_until_drained(PATIENCE);
    let expected: Vec<_> = (0..5).map(|number| format!("payload {number}").into_bytes()).collect();
    assert_eq!(values(&kafka, &topic("known")), expected);

    let listed = parked(&service);
    let count = |topic: &str, reason: &str| {
        listed.iter().filter(|event| event["topic"] == topic && event["reason"] == reason).count()
    };
    assert_eq!(count(&topic("unknown"), "unknown_topic"), 5);
    assert_eq!(count(&topic("no topic"), "invalid_topic"), 5);
    assert_eq!(count(&topic(&long_type), "invalid_topic"), 5);
    assert_eq!(listed.len(), 15);
    assert_eq!(service.metric("ringtail_forward_parked_events_total", "reason=\"unknown_topic\""), 5.0);
    assert_eq!(service.metric("ringtail_forward_parked_events_total", "reason=\"invalid_topic\""), 10.0);
    assert_eq!(service.assert_books_balance(), 20.0);
    assert_metrics_are_clean(&service);

    // The payloads are kept, over a restart as well.
    assert!(service.stop().success());
    service.restart();
    assert_eq!(parked(&service), listed);
    assert_eq!(service.metric("ringtail_forward_parked_events", ""), 15.0);
    assert_eq!(service.assert_books_balance(), 0.0);
}

#[test]
fn a_clean_stop_under_traffic_loses_nothing() {
    let kafka = Kafka::start();
    let mut service = Service::start(&kafka.bootstrap(), "");
    let load = Load { clients_per_protocol: 2, pause: Duration::from_millis(20), ..Load::default() };
    println!("seed {}", load.seed);
    let traffic = Traffic::start(service.ports(), load);
    for life in 1..=3 {
        let before = traffic.acked();
        service.wait_for("traffic", PATIENCE, |_| traffic.acked() >= before + 5000);
        let status = service.stop();
        assert_eq!(status.code(), Some(0), "life {life} ends with {status}");
        assert_eq!(service.logged("ERROR"), 0, "life {life}:\n{}", service.life_log());
        service.restart();
    }
    let before = traffic.acked();
    service.wait_for("traffic", PATIENCE, |_| traffic.acked() >= before + 5000);
    let mut ledger = traffic.stop();
    service.wait_until_drained(PATIENCE);
    service.assert_books_balance();
    let findings = ledger.check(&kafka);
    println!("{findings:?}");
    assert_eq!((findings.lost, findings.out_of_order), (0, 0));
    assert!(findings.acked >= 20_000);
    ledger.claim_one_more();
    assert_eq!(ledger.check(&kafka).lost, 1, "the oracle sees a loss");
}

#[test]
fn an_outage_is_told_once_and_is_not_unready() {
    let mut kafka = Kafka::start();
    let mut service = Service::start(&kafka.bootstrap(), "");
    let connected = |service: &mut Service| service.metric("ringtail_forward_connected", "");
    service.wait_for("the first connection", PATIENCE, |service| connected(service) == 1.0);
    assert_eq!(service.logged("kafka connected"), 1);
    send(&service, Scheme::WebSocket, "one", &[("page", b"before")]);
    service.wait_until_drained(PATIENCE);

    kafka.stop();
    service.wait_for("the loss to be seen", PATIENCE, |service| connected(service) == 0.0);
    for scheme in Scheme::ALL {
        send(&service, scheme, "one", &[("page", format!("during {scheme:?}").as_bytes())]);
        assert_eq!(service.get("/readyz").0, 200, "an outage is not unready");
        assert_eq!(service.get("/livez").0, 200);
    }
    assert_eq!(service.backlog().0, 3);
    assert!(!service.status()["forward"]["connected"].as_bool().unwrap());
    assert!(service.status()["forward"]["last_error"]["message"].is_string(), "{}", service.status());
    service.assert_books_balance();

    kafka.restart();
    service.wait_for("the broker to be seen", PATIENCE, |service| connected(service) == 1.0);
    service.wait_until_drained(PATIENCE);
    let expected = ["before", "during WebSocket", "during Rest", "during Grpc"].map(|text| text.as_bytes().to_vec());
    assert_eq!(values(&kafka, &topic("page")), expected);
    for line in ["kafka lost", "kafka back", "kafka connected"] {
        assert_eq!(service.logged(line), 1, "{line}:\n{}", service.life_log());
    }
    assert_eq!(service.assert_books_balance(), 4.0);
    assert_metrics_are_clean(&service);
}
