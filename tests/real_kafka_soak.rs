//! Everything at once, for a while: three protocols, a broker that stops and is killed, a service that is killed; and
//! then every acked event must be in Kafka, with its bytes, its key, in its order.
//!
//! `RINGTAIL_SOAK_SECONDS` (60) is how long traffic flows; a fifth of it has no broker. `RINGTAIL_SOAK_SEED` repeats the
//! traffic of a run. `RINGTAIL_BINARY` names another binary to run.

#[path = "support/environment.rs"]
mod environment;
#[path = "support/http.rs"]
mod http;
#[path = "support/kafka.rs"]
mod kafka;
#[path = "support/service.rs"]
mod service;
#[path = "support/traffic.rs"]
mod traffic;

use std::time::{Duration, Instant};

use environment::number_from_environment;
use kafka::Kafka;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use service::Service;
use traffic::{Findings, Load, Traffic};

const SECONDS: u64 = 60;
const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);
const DRAIN_PATIENCE: Duration = Duration::from_secs(300);
/// Kafka's and the test's hiccups aside, a broken run shows by far less.
const ACKED_PER_SECOND_MIN: u64 = 100;

/// What happens to the parts, in fractions of the whole.
#[derive(Debug, Clone, Copy)]
enum Fault {
    KillService,
    StopBroker,
    StartBroker,
    KillBroker,
}

const FAULTS: [(f64, Fault); 6] = [
    (0.15, Fault::KillService),
    (0.30, Fault::StopBroker),
    (0.40, Fault::KillService),
    (0.50, Fault::StartBroker),
    (0.70, Fault::KillBroker),
    (0.85, Fault::KillService),
];
/// A fault may come so much earlier or later; the outage stays as long as it is.
const JITTER: f64 = 0.03;

struct Soak {
    kafka: Kafka,
    service: Service,
    traffic: Traffic,
    began: Instant,
    highest_backlog: (u64, u64),
    outage_began: Option<Instant>,
    outage: Duration,
    restarts: Vec<Duration>,
}

impl Soak {
    fn start(load: Load) -> Soak {
        let kafka = Kafka::start();
        let service = Service::start(&kafka.bootstrap(), "");
        let traffic = Traffic::start(service.ports(), load);
        Soak {
            kafka,
            service,
            traffic,
            began: Instant::now(),
            highest_backlog: (0, 0),
            outage_began: None,
            outage: Duration::ZERO,
            restarts: Vec::new(),
        }
    }

    /// Lets traffic flow until so long after the start.
    fn run_until(&mut self, after: Duration) {
        while self.began.elapsed() < after {
            self.sample();
            std::thread::sleep(SAMPLE_INTERVAL.min(after.saturating_sub(self.began.elapsed())));
        }
    }

    fn sample(&mut self) {
        let (events, bytes) = self.service.backlog();
        let highest = self.highest_backlog;
        self.highest_backlog = (highest.0.max(events), highest.1.max(bytes));
    }

    fn inject(&mut self, fault: Fault) {
        self.sample();
        println!("{:6.1} s: {fault:?}, {} acked", self.began.elapsed().as_secs_f64(), self.traffic.acked());
        match fault {
            Fault::KillService => {
                self.service.kill();
                let began = Instant::now();
                self.service.restart();
                self.restarts.push(began.elapsed());
            }
            Fault::StopBroker => {
                self.kafka.stop();
                self.outage_began = Some(Instant::now());
            }
            Fault::StartBroker => {
                self.kafka.restart();
                self.outage = self.outage_began.take().expect("it was stopped").elapsed();
            }
            Fault::KillBroker => {
                self.kafka.kill();
                self.kafka.restart();
            }
        }
    }

    /// Ends the traffic, drains, reads back, and prints the summary.
    fn finish(mut self, seed: u64) -> Findings {
        self.sample();
        let traffic_seconds = self.began.elapsed().as_secs_f64();
        let ledger = self.traffic.stop();
        let stopped = Instant::now();
        self.service.wait_until_drained(DRAIN_PATIENCE);
        let drain = stopped.elapsed();
        self.service.sample_memory();
        assert_eq!(self.service.metric("ringtail_forward_parked_events", ""), 0.0);
        assert!(self.service.stop().success(), "a clean stop exits with 0");
        let reading = Instant::now();
        let findings = ledger.check(&self.kafka);
        let Findings { acked, delivered, duplicates, lost, out_of_order, .. } = &findings;
        let (events, bytes) = self.highest_backlog;
        println!(
            "soak: seed={seed} acked={acked} delivered={delivered} duplicates={duplicates} lost={lost} \
             out_of_order={out_of_order} peak_rss_mib={:.1} highest_backlog_events={events} \
             highest_backlog_mib={:.1} traffic_s={traffic_seconds:.1} outage_s={:.1} drain_s={:.2} read_s={:.1} \
             restart_s={:.2?} failures={} resent_batches={} given_up_batches={}",
            self.service.peak_rss_kib() as f64 / 1024.0,
            bytes as f64 / f64::from(1 << 20),
            self.outage.as_secs_f64(),
            drain.as_secs_f64(),
            reading.elapsed().as_secs_f64(),
            self.restarts.iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
            findings.failures,
            findings.resent_batches,
            findings.given_up_batches,
        );
        findings
    }
}

#[test]
fn nothing_acked_is_lost_whatever_is_killed() {
    let seed = number_from_environment("RINGTAIL_SOAK_SEED").unwrap_or_else(rand::random);
    let seconds = number_from_environment("RINGTAIL_SOAK_SECONDS").unwrap_or(SECONDS);
    println!("seed {seed}, {seconds} s");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut soak = Soak::start(Load { seed, ..Load::default() });
    for (at, fault) in FAULTS {
        let jitter = match fault {
            Fault::StopBroker | Fault::StartBroker => 0.0,
            Fault::KillService | Fault::KillBroker => random.random_range(-JITTER..JITTER),
        };
        soak.run_until(Duration::from_secs(seconds).mul_f64(at + jitter));
        soak.inject(fault);
    }
    soak.run_until(Duration::from_secs(seconds));
    let findings = soak.finish(seed);
    assert_eq!(findings.lost, 0, "acked events are not in Kafka");
    assert_eq!(findings.out_of_order, 0, "first occurrences are not in the order they were sent");
    assert!(findings.delivered >= findings.acked, "what is delivered was sent, what was acked is delivered");
    assert!(findings.acked >= seconds * ACKED_PER_SECOND_MIN, "hardly any traffic: {findings:?}");
}
