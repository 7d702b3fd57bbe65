//! Ringtail: a durable store-and-forward event collector.
//!
//! # Life of a batch
//!
//! 1. [`ingest`] reads a request from a WebSocket, REST or gRPC client and proves that it is a [`batch`]. Every protocol
//!    goes through one door, admission, which refuses what is too large, and says "try again" when full or stopping.
//! 2. [`wal`] appends the batch to the write-ahead log. One thread commits everything that is waiting: one write, one
//!    `fdatasync`. Only then does the client get its ack.
//! 3. [`forward`] reads the log in order and hands each event to Kafka. Delivery reports move a contiguous watermark,
//!    the watermark moves the durable cursor, and the cursor frees whole segments of the log. What Kafka can never take
//!    is parked, durably, before the cursor passes it; a topic that does not flow moves out of the way, to disk as well.
//! 4. [`admin`] shows all of it: [`metrics`], health and status.
//!
//! [`app`] wires the stages together, starts them and drains them in order. `ingest` and `forward` never import each
//! other: the log is all that connects them.

#![warn(missing_docs)]

mod accept;
pub mod admin;
pub mod app;
pub mod batch;
pub mod client;
pub mod config;
pub mod descriptors;
pub mod forward;
pub mod ingest;
pub mod inherited;
#[doc(hidden)]
pub mod kill_point;
pub mod metrics;
pub mod shutdown;
pub mod wal;

/// The wire protocol, generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("raystack.raccoon.v1beta1");
}
