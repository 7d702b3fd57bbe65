//! How a fault ends: everything drained, the books balanced, the process live, and a row of the table of faults.

#![allow(dead_code, reason = "each test uses its own part")]

use std::time::Duration;

use crate::kafka::Kafka;
use crate::service::Service;
use crate::traffic::{Findings, Ledger, Traffic};

/// Longest that a backlog may take to drain.
const DRAIN_PATIENCE: Duration = Duration::from_secs(180);

/// What was done.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub name: &'static str,
    pub what: &'static str,
    /// Exactly once is asked for.
    pub exactly_once: bool,
}

/// Ends the traffic and checks what became of it: nothing is lost. `elsewhere` are records that Kafka once had and the test
/// itself removed.
pub fn finish(
    fault: Fault,
    service: &mut Service,
    traffic: Traffic,
    kafka: &Kafka,
    elsewhere: Vec<(String, String, Vec<u8>)>,
) -> Findings {
    finish_ledger(fault, service, &traffic.stop(), kafka, elsewhere)
}

/// The same when the traffic has ended.
pub fn finish_ledger(
    fault: Fault,
    service: &mut Service,
    ledger: &Ledger,
    kafka: &Kafka,
    elsewhere: Vec<(String, String, Vec<u8>)>,
) -> Findings {
    service.wait_until_drained(DRAIN_PATIENCE);
    service.sample_memory();
    assert_eq!(service.get("/livez").0, 200, "live");
    let books = service.assert_books_balance();
    let mut parked = service.parked();
    let parked_events = parked.len();
    parked.extend(elsewhere);
    let findings = ledger.check_with(kafka, fault.exactly_once, &parked);
    let Findings { acked, delivered, duplicates, lost, .. } = &findings;
    let peak_rss = service.peak_rss_kib() as f64 / 1024.0;
    println!(
        "| {} | {} | {acked} | {delivered} | {duplicates} | {parked_events} | {lost} | {peak_rss:.0} MiB |",
        fault.name, fault.what
    );
    println!("{books} events came in this life; {findings:?}");
    assert_eq!(*lost, 0, "acked events are neither delivered nor parked");
    assert!(*acked > 0, "there was traffic");
    if fault.exactly_once {
        assert_eq!(*duplicates, 0, "events are delivered more than once");
    }
    findings
}
