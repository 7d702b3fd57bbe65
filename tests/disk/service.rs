//! The service on a disk that a test commands, its clients, and its Kafka.

use std::collections::HashSet;
use std::process::ExitStatus;
use std::sync::Arc;

use ringtail::client::ClientError;

use crate::check::{Found, Promise, check};
use crate::disk::Disk;
use crate::http::{get, status, wait_until};
use crate::kafka::Kafka;
use crate::load::{Clients, Load};
use crate::process::{Addresses, Options, Process};

/// A service that forwards to a Kafka, which is away at first.
pub struct Service {
    pub disk: Arc<Disk>,
    pub load: Arc<Load>,
    pub clients: Clients,
    pub kafka: Kafka,
    pub process: Process,
    pub addresses: Addresses,
    options: Options,
}

impl Service {
    /// Starts it on an empty disk.
    pub fn start(seed: u64) -> Service {
        let disk = Arc::new(Disk::new());
        let load = Load::new(seed, 200 << 10);
        let kafka = Kafka::start(&load, &disk);
        let options = kafka.forward(disk.options(), "connection_id");
        Service::start_with(disk, load, kafka, options)
    }

    /// Starts it on an empty disk, with a Kafka that is there and refuses one topic.
    pub fn start_closed(seed: u64) -> Service {
        let disk = Arc::new(Disk::new());
        let load = Load::with_held(seed, 100 << 10);
        let kafka = Kafka::start_closed(&load, &disk);
        let options = kafka.forward_spilling(disk.options());
        Service::start_with(disk, load, kafka, options)
    }

    fn start_with(disk: Arc<Disk>, load: Arc<Load>, kafka: Kafka, options: Options) -> Service {
        let clients = Clients::new(&load, &disk);
        let (process, addresses) = Process::start(&options);
        Service { disk, load, clients, kafka, process, addresses, options }
    }

    /// Starts it again after its end.
    pub fn restart(&mut self) {
        (self.process, self.addresses) = Process::start(&self.options);
    }

    /// Starts it again, to watch how it fails.
    pub fn spawn(&mut self) {
        self.process = Process::spawn(&self.options);
    }

    /// Clients send so many bytes, or until one is refused.
    pub async fn send(&mut self, bytes: usize) {
        self.clients.send(self.addresses, bytes).await;
    }

    /// Code and body of `/readyz`.
    pub fn readyz(&self) -> (u16, String) {
        get(self.addresses.admin, "/readyz")
    }

    /// A number of the log's status.
    pub fn wal(&self, name: &str) -> u64 {
        status(self.addresses.admin)["wal"][name].as_u64().expect("the status has numbers")
    }

    /// Events in the spill.
    pub fn spilled(&self) -> u64 {
        status(self.addresses.admin)["forward"]["spilled_events"].as_u64().expect("the status has numbers")
    }

    /// Fails unless a batch is refused over REST as it must be: 503, and an answer that says so.
    pub async fn assert_refuses(&mut self, reason: &str) {
        match self.clients.send_one(self.addresses).await {
            Err(ClientError::Refused(refusal)) => {
                assert_eq!(refusal.http_status, Some(503), "{refusal:?}");
                assert!(refusal.retryable && refusal.reason.contains(reason), "{refusal:?}");
            }
            other => panic!("not a refusal: {other:?}"),
        }
    }

    /// Waits until batches are accepted, and sends some.
    pub async fn wait_until_accepting(&mut self) {
        wait_until("batches to be accepted", || self.readyz() == (200, "ready\n".to_owned())).await;
        let acked = self.clients.acks().len();
        self.send(64 << 10).await;
        assert!(self.clients.acks().len() > acked, "it says that it is ready, and acks nothing");
    }

    /// Waits until everything is delivered or parked.
    pub async fn wait_until_delivered(&self) {
        self.kafka.wait_until_delivered(self.addresses, &self.clients).await;
    }

    /// Stops it.
    pub fn stop(&mut self) {
        let status: ExitStatus = self.process.stop();
        assert!(status.success(), "{status}\n{}", self.process.log_end());
    }

    /// Holds the log of the stopped service against what its clients saw.
    pub fn check(&self) -> Found {
        let acked: HashSet<_> = self.clients.acks().into_keys().collect();
        let delivered = self.kafka.deliveries().into_keys().collect();
        let promise = Promise { load: &self.load, acked: &acked, delivered: &delivered };
        let found = check(&self.disk.root(), &promise).unwrap_or_else(|error| panic!("{error}"));
        println!("{found:?}");
        found
    }
}
