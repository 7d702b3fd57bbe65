//! Processes are started, and mock brokers taken away, one at a time.
//!
//! A process that is being started holds a copy of every descriptor for a moment, listening sockets included. A mock broker that
//! goes down binds its port again at once, and librdkafka ends the process if that fails.

#![allow(dead_code, reason = "each test uses its own part")]

use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use rdkafka::client::ClientContext;
use rdkafka::mocking::MockCluster;

static TURN: Mutex<()> = Mutex::new(());

/// Starts a process.
pub fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Starts a process and waits for its end. Gives back what it said.
pub fn output(command: &mut Command) -> std::io::Result<Output> {
    spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?.wait_with_output()
}

/// Takes a broker away, or with -1 all of them: connections break, new ones are refused.
pub fn take_down<C: ClientContext>(cluster: &MockCluster<'_, C>, broker: i32) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    cluster.broker_down(broker).expect("take the broker away");
}
