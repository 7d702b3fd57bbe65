//! What `ringtail dev` shows: acks and arrivals, an outage, the backlog growing and draining, and that nothing is missing.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ringtail::app::Addresses;
use ringtail::client::{ClientOptions, Endpoint, RetryPolicy, Sender, new_req_guid, sent_time_now};
use ringtail::proto::{Event, SendEventRequest};
use ringtail::wal::Wal;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::broker::{Arrived, Broker};
use super::print_arrival;

const CALM: Duration = Duration::from_secs(5);
const OUTAGE: Duration = Duration::from_secs(8);
/// How long draining may take before the demonstration is called failed.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// Events a batch, and how often each client sends one.
const BATCH_EVENTS: u64 = 10;
const BATCH_INTERVAL: Duration = Duration::from_millis(50);
/// Arriving events to print before only their number is.
const SHOWN: usize = 5;

/// The demonstration.
pub struct Demo<'a> {
    addresses: Addresses,
    wal: Wal,
    broker: &'a Broker,
    quiet: bool,
    acked: Arc<Mutex<HashSet<Vec<u8>>>>,
    arrived: HashSet<Vec<u8>>,
    duplicates: u64,
    began: Instant,
}

impl<'a> Demo<'a> {
    pub fn new(addresses: Addresses, wal: Wal, broker: &'a Broker, quiet: bool) -> Demo<'a> {
        let began = Instant::now();
        Demo { addresses, wal, broker, quiet, acked: Arc::default(), arrived: HashSet::new(), duplicates: 0, began }
    }

    /// Runs it to its end: every acked event has arrived.
    pub async fn run(mut self, arrivals: &mut mpsc::Receiver<Arrived>) -> anyhow::Result<()> {
        println!("\n── Clients send over WebSocket, REST and gRPC. A batch is acked once it is on disk.");
        let finish = CancellationToken::new();
        // When this is dropped, because of an error or Ctrl-C, the clients end too.
        let _finish_on_drop = finish.clone().drop_guard();
        let clients = self.start_clients(&finish)?;
        self.watch(arrivals, "up", |demo, began| began.elapsed() >= CALM && !demo.arrived.is_empty()).await?;

        self.broker.down()?;
        println!("\n── The broker goes away. Clients notice nothing: acks go on, the backlog grows on disk.");
        self.watch(arrivals, "DOWN", |_, began| began.elapsed() >= OUTAGE).await?;
        let backlog = self.wal.status().pending_events;

        self.broker.up()?;
        println!("\n── The broker returns. The backlog of {backlog} events drains while clients go on sending.");
        self.watch(arrivals, "up", |demo, _| demo.wal.status().pending_events < 100).await?;
        finish.cancel();
        for client in clients {
            client.await.context("a client panicked")??;
        }
        self.watch(arrivals, "up", |demo, _| demo.wal.status().pending_events == 0 && demo.missing() == 0).await?;

        let (acked, arrived, duplicates) = (self.acked_count(), self.arrived.len(), self.duplicates);
        println!(
            "\n── Backlog 0. {acked} events acked, {arrived} different ones arrived, 0 missing, {duplicates} twice."
        );
        Ok(())
    }

    fn start_clients(
        &self,
        finish: &CancellationToken,
    ) -> anyhow::Result<Vec<tokio::task::JoinHandle<anyhow::Result<()>>>> {
        let Addresses { http, grpc, .. } = self.addresses;
        let clients = [
            ("phone", format!("ws://{http}"), "click"),
            ("web-shop", format!("http://{http}"), "order"),
            ("thermostat", format!("grpc://{grpc}"), "reading"),
        ];
        let start = |(id, url, event_type): (&'static str, String, &'static str)| {
            let options = ClientOptions::new(url.parse::<Endpoint>()?, id);
            let sender = Sender::new(options, RetryPolicy::default());
            Ok(tokio::spawn(send(sender, id, event_type, self.acked.clone(), finish.clone())))
        };
        clients.into_iter().map(start).collect()
    }

    /// Prints a line a second until `done`.
    async fn watch(
        &mut self,
        arrivals: &mut mpsc::Receiver<Arrived>,
        kafka: &str,
        done: impl Fn(&Demo<'_>, Instant) -> bool,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut checks = interval(Duration::from_millis(50));
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(event) = arrivals.recv() => self.arrive(event),
                _ = checks.tick() => if done(self, began) {
                    self.print_line(kafka);
                    return Ok(());
                },
                _ = ticks.tick() => self.print_line(kafka),
            }
            let late = DRAIN_MAX + OUTAGE;
            ensure!(began.elapsed() < late, "nothing came of it within {} seconds: this is a bug", late.as_secs());
        }
    }

    fn arrive(&mut self, event: Arrived) {
        if self.arrived.len() < SHOWN && !self.quiet {
            print_arrival(&event);
        }
        if !self.arrived.insert(event.value) {
            self.duplicates += 1;
        }
    }

    fn print_line(&self, kafka: &str) {
        let (seconds, acked, arrived) = (self.began.elapsed().as_secs(), self.acked_count(), self.arrived.len());
        let backlog = self.wal.status().pending_events;
        println!("  {seconds:>3} s   acked {acked:>7}   arrived {arrived:>7}   backlog {backlog:>6}   broker {kafka}");
    }

    fn acked_count(&self) -> usize {
        self.acked.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Acked events that have not arrived.
    fn missing(&self) -> usize {
        let acked = self.acked.lock().unwrap_or_else(PoisonError::into_inner);
        acked.difference(&self.arrived).count()
    }
}

/// One client: a batch every now and then until told to finish.
async fn send(
    sender: Sender,
    id: &'static str,
    event_type: &'static str,
    acked: Arc<Mutex<HashSet<Vec<u8>>>>,
    finish: CancellationToken,
) -> anyhow::Result<()> {
    let mut ticks = interval(BATCH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    while finish.run_until_cancelled(ticks.tick()).await.is_some() {
        let payloads: Vec<Vec<u8>> = (number..number + BATCH_EVENTS)
            .map(|number| format!(r#"{{"from":"{id}","number":{number}}}"#).into_bytes())
            .collect();
        number += BATCH_EVENTS;
        let events =
            payloads.iter().map(|payload| Event { event_bytes: payload.clone().into(), r#type: event_type.into() });
        let request =
            SendEventRequest { req_guid: new_req_guid(), sent_time: Some(sent_time_now()), events: events.collect() };
        sender.deliver(&request).await.map_err(|error| anyhow::anyhow!("{id}: not acked: {}", error.error))?;
        acked.lock().unwrap_or_else(PoisonError::into_inner).extend(payloads);
    }
    sender.close().await;
    Ok(())
}
