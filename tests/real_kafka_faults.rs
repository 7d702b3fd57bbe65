//! What a real Kafka does to the service, one fault a test, under traffic of three protocols: whatever it is, every acked event
//! arrives or is parked, in order, the others go on, memory stays bounded, and an operator is told.
//!
//! Each prints a row: `fault | what was done | acked | delivered | duplicated | parked | lost | peak RSS`. `RINGTAIL_FAULT_SECONDS`
//! (10) is how long the topic of ten stays forbidden.

#[path = "support/environment.rs"]
mod environment;
#[path = "support/http.rs"]
mod http;
#[path = "support/kafka.rs"]
mod kafka;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/row.rs"]
mod row;
#[path = "support/service.rs"]
mod service;
#[path = "support/traffic.rs"]
mod traffic;

use std::thread::sleep;
use std::time::{Duration, Instant};

use environment::number_from_environment;
use kafka::{Denied, Kafka, Options};
use proxy::Proxy;
use row::{Fault, finish};
use service::{Hosts, Service};
use traffic::{Load, TYPES, Traffic, topic};

const PATIENCE: Duration = Duration::from_secs(120);
const DELAY: &str = "ringtail_forward_delivery_delay_seconds";

fn fault(name: &'static str, what: &'static str) -> Fault {
    Fault { name, what, exactly_once: false }
}

fn start(kafka: &Kafka, forward: &str) -> Service {
    let mut service = Service::start(&kafka.bootstrap(), forward);
    wait_until_connected(&mut service, true);
    service
}

fn wait_until_connected(service: &mut Service, connected: bool) {
    let what = if connected { "kafka to be seen" } else { "the loss of kafka to be seen" };
    service.wait_for(what, PATIENCE, |service| {
        service.metric("ringtail_forward_connected", "") == f64::from(u8::from(connected))
    });
}

fn last_error(service: &Service) -> String {
    service.status()["forward"]["last_error"].to_string()
}

#[test]
fn one_topic_of_ten_that_may_not_be_written_does_not_stop_the_others() {
    forbid_one_of_ten(Denied::Write);
}

#[test]
fn one_topic_of_ten_that_may_not_even_be_seen_does_not_stop_the_others() {
    forbid_one_of_ten(Denied::Everything);
}

/// The 99th percentile of the delivery delay in seconds, and events acked a second, while nothing is wrong: over as long as a
/// fault lasts, at most five minutes.
fn undisturbed(service: &Service, traffic: &Traffic, seconds: u64) -> (f64, u64) {
    let seconds = seconds.min(300);
    let (before, acked_before) = (service.buckets(DELAY), traffic.acked());
    sleep(Duration::from_secs(seconds));
    (service.percentile(DELAY, 0.99, &before), (traffic.acked() - acked_before) / seconds)
}

fn forbid_one_of_ten(denied: Denied) {
    const IN_FLIGHT_MAX: u64 = 2 << 20;
    let seconds = number_from_environment("RINGTAIL_FAULT_SECONDS").unwrap_or(10);
    let kafka = Kafka::start_with(Options { acls: true, ..Options::default() });
    for event_type in TYPES {
        kafka.create_topic(&topic(event_type), 4, &[]);
    }
    let forward = format!("topic_grace = \"24h\"\nin_flight_bytes_max = \"{IN_FLIGHT_MAX}B\"");
    let mut service = start(&kafka, &forward);
    let load =
        Load { clients_per_protocol: 10, types: 10, apart: true, pause: Duration::from_millis(50), ..Load::default() };
    println!("seed {}", load.seed);
    let traffic = Traffic::start(service.ports(), load);
    traffic.flow(&mut service, 5000);
    let (good, good_rate) = undisturbed(&service, &traffic, seconds);

    let bad = topic(TYPES[3]);
    kafka.deny(&bad, denied);
    service.wait_for("the topic to be held", PATIENCE, |service| service.forward_number("held_topics") == 1);
    assert_eq!(service.logged("topic held"), 1, "{}", service.life_log());
    service.wait_for("events of it to go to disk", PATIENCE, |service| service.forward_number("spilled_events") > 0);
    let before = service.buckets(DELAY);
    let acked_before = traffic.acked();
    let (began, delivered_before) = (Instant::now(), service.delivered());
    let mut in_flight_most = 0;
    while began.elapsed() < Duration::from_secs(seconds) {
        in_flight_most = in_flight_most.max(service.forward_number("in_flight_bytes"));
        sleep(Duration::from_millis(100));
    }
    let with_bad = service.percentile(DELAY, 0.99, &before);
    let rate = (traffic.acked() - acked_before) / seconds;
    let delivered_rate = (service.delivered() - delivered_before) / seconds as f64;
    println!(
        "{denied:?}: p99 of the delivery delay is {good:.4} s at {good_rate} events/s without, {with_bad:.4} s at {rate} \
         events/s with the bad topic, of which {delivered_rate:.0} were delivered; at most {in_flight_most} bytes in flight, \
         {} events on disk",
        service.forward_number("spilled_events")
    );
    assert!(delivered_rate > rate as f64 * 0.8, "the nine flow: {delivered_rate} of {rate} events/s");
    // A record more than the bound may be in flight.
    assert!(in_flight_most <= IN_FLIGHT_MAX + (64 << 10), "{in_flight_most}");
    let held = &service.status()["forward"]["held"][0];
    assert_eq!(held["topic"], bad, "{held}");
    assert!(held["error"].as_str().is_some_and(|error| error.to_lowercase().contains("auth")), "{held}");
    assert!(last_error(&service).contains(&bad), "{}", last_error(&service));

    kafka.allow(&bad);
    service.wait_for("the topic to flow again", PATIENCE, |service| service.forward_number("held_topics") == 0);
    let (good, good_rate) = undisturbed(&service, &traffic, seconds);
    println!("{denied:?}: after it p99 is {good:.4} s at {good_rate} events/s");
    let what = if denied == Denied::Write {
        "WRITE denied by an ACL, later allowed"
    } else {
        "no access by ACLs, later allowed"
    };
    let findings = finish(fault("one bad topic of ten", what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.duplicates, findings.parked, findings.out_of_order), (0, 0, 0));
    assert_eq!(service.forward_number("held_topics"), 0);
    assert_eq!(service.logged("topic flows again"), 1, "{}", service.life_log());
}

#[test]
fn a_broker_that_comes_back_empty_as_another_cluster_gets_what_follows() {
    let mut kafka = Kafka::start();
    let mut service = start(&kafka, "");
    let traffic = Traffic::start(service.ports(), Load::default());
    traffic.flow(&mut service, 10_000);
    let name = "empty broker, other cluster id";
    finish(fault(name, "before"), &mut service, traffic, &kafka, Vec::new());

    kafka.kill();
    wait_until_connected(&mut service, false);
    let traffic = Traffic::start(service.ports(), Load::default());
    traffic.flow(&mut service, 5000);
    kafka.wipe();
    kafka.restart();
    traffic.flow(&mut service, 10_000);
    let what = "killed, data directory removed and formatted with another id";
    let findings = finish(fault(name, what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
    assert_eq!(service.logged("kafka back"), 1, "{}", service.life_log());
}

#[test]
fn a_topic_that_is_deleted_while_being_written_goes_on_when_it_is_made_again() {
    let proxy = Proxy::start();
    let properties = vec![("auto.create.topics.enable".to_owned(), "false".to_owned())];
    let kafka = Kafka::start_with(Options { properties, advertised_port: Some(proxy.port()), ..Options::default() });
    proxy.set_target(kafka.port());
    for event_type in &TYPES[..4] {
        kafka.create_topic(&topic(event_type), 4, &[]);
    }
    let mut service = start(&kafka, "topic_grace = \"1h\"\nin_flight_bytes_max = \"2MiB\"");
    let traffic = Traffic::start(service.ports(), Load::default());
    traffic.flow(&mut service, 10_000);
    // What goes with the topic must be known: nothing new reaches it meanwhile.
    proxy.blackhole(true);
    let deleted = topic(TYPES[1]);
    let text = |key: Option<Vec<u8>>| String::from_utf8(key.expect("every record has a key")).unwrap();
    let (mut gone, mut before) = (kafka.read_topic(&deleted), 0);
    while gone.len() > before {
        before = gone.len();
        gone = kafka.read_topic(&deleted);
    }
    let gone: Vec<_> = gone.into_iter().map(|record| (deleted.clone(), text(record.key), record.value)).collect();
    kafka.delete_topic(&deleted);
    proxy.blackhole(false);
    service.wait_for("the topic to be held", PATIENCE, |service| service.forward_number("held_topics") == 1);
    service.wait_for_deliveries(10_000.0);
    assert!(service.logged("topic held") >= 1, "{}", service.life_log());
    assert!(last_error(&service).to_lowercase().contains("unknown"), "{}", last_error(&service));
    kafka.create_topic(&deleted, 4, &[]);
    service.wait_for("the topic to flow", PATIENCE, |service| service.forward_number("held_topics") == 0);
    traffic.flow(&mut service, 5000);
    let what = "deleted under load, made again 10,000 events later";
    let findings = finish(fault("topic deleted", what), &mut service, traffic, &kafka, gone);
    assert_eq!(findings.out_of_order, 0);
}

#[test]
fn when_a_topics_size_limit_is_lowered_what_is_too_large_is_parked() {
    let kafka = Kafka::start();
    for event_type in &TYPES[..4] {
        kafka.create_topic(&topic(event_type), 4, &[]);
    }
    let mut service = start(&kafka, "");
    let traffic = Traffic::start(service.ports(), Load { pause: Duration::from_millis(150), ..Load::default() });
    traffic.flow(&mut service, 5000);
    kafka.configure_topic(&topic(TYPES[1]), &[("max.message.bytes", "400")]);
    traffic.flow(&mut service, 2000);
    let what = "max.message.bytes of a topic lowered to 400 under load";
    let findings = finish(fault("size limit lowered", what), &mut service, traffic, &kafka, Vec::new());
    assert!(findings.parked > 0, "some events are too large now");
    let parked = service.parked();
    assert!(parked.iter().all(|(found, _, payload)| *found == topic(TYPES[1]) && payload.len() > 200));
    assert_eq!(service.metric("ringtail_forward_parked_events_total", "reason=\"too_large\""), parked.len() as f64);
}

#[test]
fn a_frozen_broker_costs_nothing_but_time() {
    let kafka = Kafka::start();
    let mut service = start(&kafka, "");
    let traffic = Traffic::start(service.ports(), Load::default());
    traffic.flow(&mut service, 10_000);
    kafka.freeze();
    traffic.flow(&mut service, 10_000);
    sleep(Duration::from_secs(5));
    kafka.thaw();
    let thawed = Instant::now();
    service.wait_for_deliveries(1000.0);
    println!("flows again after {:?}", thawed.elapsed());
    traffic.flow(&mut service, 5000);
    let findings = finish(fault("broker frozen", "SIGSTOP, SIGCONT"), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.duplicates, findings.parked, findings.out_of_order), (0, 0, 0));
}

#[test]
fn a_broker_that_is_killed_costs_nothing_but_time() {
    let mut kafka = Kafka::start();
    let mut service = start(&kafka, "");
    let traffic = Traffic::start(service.ports(), Load::default());
    for _ in 0..3 {
        traffic.flow(&mut service, 8000);
        kafka.kill();
        wait_until_connected(&mut service, false);
        assert!(last_error(&service).contains("message"), "{}", last_error(&service));
        traffic.flow(&mut service, 4000);
        kafka.restart();
        let restarted = Instant::now();
        service.wait_for_deliveries(1000.0);
        println!("flows again after {:?}", restarted.elapsed());
    }
    let findings =
        finish(fault("broker killed", "SIGKILL and restart, 3 times"), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
    assert_eq!((service.logged("kafka lost"), service.logged("kafka back")), (3, 3), "{}", service.life_log());
}

#[test]
fn a_connection_that_swallows_everything_is_replaced() {
    let proxy = Proxy::start();
    let kafka = Kafka::start_with(Options { advertised_port: Some(proxy.port()), ..Options::default() });
    proxy.set_target(kafka.port());
    let mut service = start(&kafka, "[forward.kafka]\n\"socket.timeout.ms\" = 5000");
    let traffic = Traffic::start(service.ports(), Load::default());
    traffic.flow(&mut service, 10_000);
    proxy.blackhole(true);
    traffic.flow(&mut service, 5000);
    wait_until_connected(&mut service, false);
    assert!(last_error(&service).to_lowercase().contains("timed out"), "{}", last_error(&service));
    traffic.flow(&mut service, 5000);
    // What was swallowed never arrives.
    proxy.cut();
    proxy.blackhole(false);
    let back = Instant::now();
    service.wait_for_deliveries(1000.0);
    println!("flows again after {:?}", back.elapsed());
    let what = "a proxy forwards nothing until librdkafka gives up, then the old connections break";
    let findings = finish(fault("connection blackholed", what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
    assert_eq!((service.logged("kafka lost"), service.logged("kafka back")), (1, 1), "{}", service.life_log());
}

#[test]
fn a_name_that_cannot_be_resolved_for_a_while_is_asked_for_again() {
    const NAME: &str = "kafka.invalid";
    let mut kafka = Kafka::start_with(Options { advertised_host: Some(NAME), ..Options::default() });
    // Nobody knows it at the start either.
    let mut service = Service::start_among(Some(Hosts::none()), &kafka.bootstrap(), "");
    let traffic = Traffic::start(service.ports(), Load::default());
    let told = |service: &mut Service| last_error(service).contains("resolve");
    service.wait_for("the error to be told", PATIENCE, told);
    traffic.flow(&mut service, 5000);
    assert_eq!((service.delivered(), service.get("/readyz").0), (0.0, 200));
    service.set_hosts(&[NAME]);
    service.wait_for_deliveries(5000.0);

    // A connection that is there needs no name.
    service.set_hosts(&[]);
    service.wait_for_deliveries(5000.0);
    kafka.kill();
    kafka.restart();
    wait_until_connected(&mut service, false);
    service.wait_for("the error to be told", PATIENCE, told);
    let delivered = service.delivered();
    traffic.flow(&mut service, 5000);
    assert_eq!(service.delivered(), delivered);
    service.kill();
    service.restart();
    traffic.flow(&mut service, 2000);
    service.set_hosts(&[NAME]);
    service.wait_for_deliveries(10_000.0);
    let what = "the broker's name not known at the start; then gone, the broker killed and started, ringtail killed";
    let findings = finish(fault("DNS gone", what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}

#[test]
fn new_events_that_go_first_and_the_backlog_all_arrive() {
    let mut kafka = Kafka::start();
    let settings = "live_first = true\nin_flight_bytes_max = \"1MiB\"\npace.events_per_second_max = 4000";
    let mut service = start(&kafka, settings);
    let traffic = Traffic::start(service.ports(), Load { pause: Duration::from_millis(300), ..Load::default() });
    traffic.flow(&mut service, 2000);
    kafka.kill();
    traffic.flow(&mut service, 20_000);
    kafka.restart();
    service.wait_for("new events to go ahead", PATIENCE, |service| service.status()["forward"]["live_first"] == true);
    service.wait_for_deliveries(4000.0);
    // The stretch that went ahead is known after a kill.
    service.kill();
    service.restart();
    assert!(service.backlog().0 > 0, "the backlog drains still");
    service.wait_for_deliveries(2000.0);
    kafka.kill();
    kafka.restart();
    service.wait_for_deliveries(2000.0);
    let what =
        "live_first, a backlog of 20,000 events at 4,000/s beside new ones; ringtail and the broker killed meanwhile";
    let findings = finish(fault("new events first", what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!(findings.parked, 0);
    assert!(findings.out_of_order > 0, "none went ahead");
}

#[test]
fn a_slow_link_is_used_and_not_given_up() {
    const BYTES_PER_SECOND: u64 = 64 << 10;
    let proxy = Proxy::start();
    let kafka = Kafka::start_with(Options { advertised_port: Some(proxy.port()), ..Options::default() });
    proxy.set_target(kafka.port());
    let mut service = start(&kafka, "");
    let traffic = Traffic::start(service.ports(), Load { pause: Duration::from_millis(20), ..Load::default() });
    traffic.flow(&mut service, 5000);
    proxy.limit(BYTES_PER_SECOND);
    let (began, delivered_before, bytes_before) = (Instant::now(), service.delivered(), proxy.forwarded());
    sleep(Duration::from_secs(number_from_environment("RINGTAIL_FAULT_SECONDS").unwrap_or(20)));
    let (events, bytes) = (service.delivered() - delivered_before, proxy.forwarded() - bytes_before);
    let seconds = began.elapsed().as_secs_f64();
    println!("in {seconds:.1} s {events} events delivered with {bytes} bytes sent; {}", last_error(&service));
    assert!(service.backlog().0 > 0, "the link is too slow for the traffic");
    proxy.limit(0);
    let what = "64 KiB/s towards the broker for 20 s";
    let findings = finish(fault("slow link", what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}
