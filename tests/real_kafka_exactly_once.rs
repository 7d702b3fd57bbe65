//! Exactly-once delivery to a real Kafka: whatever is killed, a reader that sees committed transactions only finds each acked
//! event once and in order.
//!
//! `RINGTAIL_KILLS` (5) is how often the service is killed; the broker is at every fifth time. `RINGTAIL_SEED` repeats a run.

#[path = "support/environment.rs"]
mod environment;
#[path = "support/http.rs"]
mod http;
#[path = "support/kafka.rs"]
mod kafka;
#[path = "support/row.rs"]
mod row;
#[path = "support/service.rs"]
mod service;
#[path = "support/traffic.rs"]
mod traffic;

use std::thread::sleep;
use std::time::Duration;

use environment::number_from_environment;
use kafka::{Denied, Kafka, Options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use row::{Fault, finish, finish_ledger};
use service::{Scheme, Service};
use traffic::{Load, TYPES, Traffic, topic};

const PATIENCE: Duration = Duration::from_secs(180);
const KILLS: u64 = 5;

const SETTINGS: &str = "delivery = \"exactly_once\"\ncommit_interval = \"200ms\"\n";

fn fault(name: &'static str, what: &'static str) -> Fault {
    Fault { name, what, exactly_once: true }
}

fn load(seed: u64) -> Load {
    Load { seed, clients_per_protocol: 8, schemes: &[Scheme::WebSocket], ..Load::default() }
}

#[test]
fn each_event_arrives_once_whatever_is_killed() {
    let kills = number_from_environment("RINGTAIL_KILLS").unwrap_or(KILLS);
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(rand::random);
    println!("seed {seed}, {kills} kills");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut kafka = Kafka::start();
    let mut service = Service::start(&kafka.bootstrap(), SETTINGS);
    let traffic = Traffic::start(service.ports(), load(seed));
    service.wait_for_deliveries(1000.0);
    let mut broker_kills = 0;
    for kill in 1..=kills {
        sleep(Duration::from_millis(random.random_range(200..3000)));
        if kill % 5 == 3 {
            kafka.kill();
            broker_kills += 1;
            sleep(Duration::from_millis(random.random_range(0..2000)));
            if random.random() {
                service.kill();
                service.restart();
            }
            kafka.restart();
            service.wait_for_deliveries(1000.0);
        }
        service.kill();
        println!("kill {kill}, {} acked", traffic.acked());
        sleep(Duration::from_millis(random.random_range(0..500)));
        service.restart();
        if random.random() {
            service.wait_for_deliveries(1.0);
        }
    }
    traffic.flow(&mut service, 2000);
    println!("{kills} kills of the service, {broker_kills} of the broker");
    let what = "delivery exactly_once, ringtail killed many times, the broker every fifth time";
    let findings = finish(fault("exactly once", what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}

#[test]
fn a_topic_that_is_forbidden_for_a_while_arrives_once_too() {
    let kafka = Kafka::start_with(Options { acls: true, ..Options::default() });
    for event_type in &TYPES[..4] {
        kafka.create_topic(&topic(event_type), 4, &[]);
    }
    for denied in [Denied::Write, Denied::Everything] {
        let settings = format!("{SETTINGS}topic_grace = \"24h\"");
        let mut service = Service::start(&kafka.bootstrap(), &settings);
        let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(rand::random);
        println!("seed {seed}");
        // What is left in the topics by the other round is not this one's.
        for event_type in &TYPES[..4] {
            kafka.delete_topic(&topic(event_type));
            kafka.create_topic(&topic(event_type), 4, &[]);
        }
        let traffic = Traffic::start(service.ports(), load(seed));
        service.wait_for_deliveries(2000.0);
        let bad = topic(TYPES[2]);
        kafka.deny(&bad, denied);
        service
            .wait_for("events of it to go to disk", PATIENCE, |service| service.forward_number("spilled_events") > 0);
        service.wait_for_deliveries(5000.0);
        let held = service.status()["forward"]["held"].to_string();
        assert!(held.contains(&bad) && service.forward_number("held_topics") == 1, "it alone is held: {held}");
        // The others go on over the end of the process as well.
        service.kill();
        service.restart();
        service.wait_for_deliveries(5000.0);
        assert!(service.forward_number("spilled_events") > 0);
        let held = service.status()["forward"]["held"].to_string();
        assert!(held.contains(&bad) && service.forward_number("held_topics") == 1, "it alone is held: {held}");
        kafka.allow(&bad);
        service.wait_for("the topic to be worked off", PATIENCE, |service| {
            service.forward_number("spilled_events") < 2000
        });
        service.kill();
        service.restart();
        traffic.flow(&mut service, 2000);
        let what = "delivery exactly_once, a topic denied and allowed, killed before and while that is worked off";
        let findings = finish(fault("exactly once, forbidden topic", what), &mut service, traffic, &kafka, Vec::new());
        assert_eq!((findings.parked, findings.out_of_order), (0, 0));
    }
}

/// Killed when an event is parked, and still in the spill.
#[cfg(feature = "kill-points")]
#[test]
fn what_is_refused_for_good_out_of_the_spill_is_parked_once() {
    let kafka = Kafka::start_with(Options { acls: true, ..Options::default() });
    for event_type in &TYPES[..4] {
        kafka.create_topic(&topic(event_type), 4, &[]);
    }
    let bad = topic(TYPES[2]);
    kafka.deny(&bad, Denied::Write);
    let settings = format!("{SETTINGS}topic_grace = \"24h\"");
    let mut service = Service::start(&kafka.bootstrap(), &settings);
    service.wait_for("its transactions", PATIENCE, |service| service.logged("exactly-once delivery goes on") == 1);
    assert_eq!(service.logged("WARN"), 0, "a first start is nothing to warn of:\n{}", service.life_log());
    let pause = Duration::from_millis(500);
    let traffic = Traffic::start(service.ports(), Load { clients_per_protocol: 1, pause, ..load(1) });
    service.wait_for("events of it to go to disk", PATIENCE, |service| service.forward_number("spilled_events") > 30);
    let ledger = traffic.stop();
    service.kill();
    kafka.configure_topic(&bad, &[("max.message.bytes", "400")]);
    kafka.allow(&bad);
    service.restart_until_killed_at("park.synced:3");
    service.restart();
    service.wait_for("the broker to be seen", PATIENCE, |service| service.forward_number("brokers") == 1);
    let what = "delivery exactly_once, events too large out of the spill, killed when one was parked";
    let findings = finish_ledger(fault("exactly once, too large", what), &mut service, &ledger, &kafka, Vec::new());
    assert!(findings.parked >= 3, "{findings:?}");
    assert_eq!((service.parked().len() as u64, findings.out_of_order), (findings.parked, 0));
}

/// A spill that takes the place of a lost one counts from the beginning again, and Kafka knows how far the lost one was worked
/// off.
#[test]
fn what_is_in_a_spill_that_took_the_place_of_a_lost_one_is_sent() {
    let kafka = Kafka::start_with(Options { acls: true, ..Options::default() });
    for event_type in &TYPES[..4] {
        kafka.create_topic(&topic(event_type), 4, &[]);
    }
    let mut service = Service::start(&kafka.bootstrap(), &format!("{SETTINGS}topic_grace = \"24h\""));
    let traffic = Traffic::start(service.ports(), load(rand::random()));
    let bad = topic(TYPES[2]);
    let spill = |service: &mut Service, events: u64| {
        kafka.deny(&bad, Denied::Write);
        service.wait_for("events to go to disk", PATIENCE, |service| service.forward_number("spilled_events") > events);
    };
    service.wait_for_deliveries(2000.0);
    spill(&mut service, 300);
    kafka.allow(&bad);
    service.wait_for("the spill to be empty", PATIENCE, |service| service.forward_number("spilled_events") == 0);
    assert!(service.stop().success());
    service.remove_spill();
    service.restart();
    spill(&mut service, 5000);
    service.kill();
    service.restart();
    kafka.allow(&bad);
    traffic.flow(&mut service, 2000);
    let what = "delivery exactly_once, a topic denied and allowed, its empty spill lost, denied again, killed, allowed";
    let findings = finish(fault("exactly once, lost spill", what), &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}

#[test]
fn a_second_instance_with_the_same_id_takes_over() {
    let kafka = Kafka::start();
    let settings = format!("{SETTINGS}transactional_id = \"edge-17\"\n");
    let mut first = Service::start(&kafka.bootstrap(), &settings);
    let first_traffic = Traffic::start(first.ports(), Load { clients_per_protocol: 2, ..load(1) });
    first.wait_for_deliveries(1000.0);
    let mut second = Service::start(&kafka.bootstrap(), &settings);
    first.wait_for("the first to be fenced", PATIENCE, |first| {
        first.status()["forward"]["last_error"].to_string().contains("another instance uses the transactional id")
    });
    assert_eq!(first.logged("another instance with the same forward.transactional_id forwards now"), 1);
    let delivered_before = first.delivered();
    first_traffic.flow(&mut first, 3000);
    sleep(Duration::from_secs(3));
    assert_eq!(first.delivered(), delivered_before, "the first has stopped to forward");
    assert_eq!((first.get("/readyz").0, first.get("/livez").0), (200, 200), "and goes on collecting");
    assert_eq!(first.logged("ERROR"), 1, "it is told once:\n{}", first.life_log());
    let ledger = first_traffic.stop();
    first.assert_books_balance();

    // The operator ends the second one, and the first, started again, goes on where it was.
    assert!(second.stop().success());
    assert!(first.stop().success());
    first.restart();
    let what = "a second instance with the same id, ended later; the first started again";
    let findings = finish_ledger(fault("exactly once, fenced", what), &mut first, &ledger, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}
