//! Three brokers, three replicas, two of which must be in sync: the leader is killed under traffic, and nothing is lost.
//!
//! `RINGTAIL_KILLS` (2) is how often. `RINGTAIL_SEED` repeats the traffic.

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

use std::time::{Duration, Instant};

use environment::number_from_environment;
use kafka::{Cluster, Options};
use row::{Fault, finish};
use service::Service;
use traffic::{Load, TYPES, Traffic, topic};

const PATIENCE: Duration = Duration::from_secs(120);
const KILLS: u64 = 2;
const DELAY: &str = "ringtail_forward_delivery_delay_seconds";

#[test]
fn a_killed_leader_costs_nothing_but_time() {
    kill_leaders("", false);
}

#[test]
fn with_exactly_once_delivery_a_killed_leader_costs_nothing_but_time_either() {
    kill_leaders("delivery = \"exactly_once\"\ncommit_interval = \"200ms\"", true);
}

fn kill_leaders(forward: &str, exactly_once: bool) {
    let kills = number_from_environment("RINGTAIL_KILLS").unwrap_or(KILLS);
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(rand::random);
    println!("seed {seed}, {kills} kills");
    let mut cluster = Cluster::start(&Options::default());
    for event_type in &TYPES[..4] {
        cluster.nodes[0].create_topic(&topic(event_type), 3, &[("min.insync.replicas", "2")]);
    }
    let mut service = Service::start(&cluster.bootstraps().join("\",\""), forward);
    let load = Load { seed, clients_per_protocol: 2, pause: Duration::from_millis(50), ..Load::default() };
    let traffic = Traffic::start(service.ports(), load);
    service.wait_for_deliveries(2000.0);
    let before = service.buckets(DELAY);
    for kill in 1..=kills {
        let leader = cluster.nodes[0].leaders(&topic(TYPES[kill as usize % 4]))[0];
        cluster.node(leader).kill();
        let killed = Instant::now();
        service.wait_for_deliveries(3000.0);
        println!("kill {kill}, of broker {leader}: 3000 events more after {:?}", killed.elapsed());
        cluster.node(leader).restart();
        // With one replica less, the next kill would stop everything.
        service.wait_for("the replicas to be in sync", PATIENCE, |_| {
            TYPES[..4].iter().all(|event_type| cluster.nodes[0].in_sync_least(&topic(event_type)) == 3)
        });
    }
    println!(
        "delivery delay: p50 {:.3} s, p99 {:.3} s",
        service.percentile(DELAY, 0.5, &before),
        service.percentile(DELAY, 0.99, &before)
    );
    let what = "three brokers, RF 3, min ISR 2: the leader SIGKILLed and restarted, again and again";
    let name = if exactly_once { "leader killed, exactly once" } else { "leader killed" };
    let fault = Fault { name, what, exactly_once };
    let findings = finish(fault, &mut service, traffic, &cluster.nodes[0], Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}
