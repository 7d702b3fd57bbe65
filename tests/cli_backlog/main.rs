//! `ringtail backlog` on logs that were built with the library and damaged on purpose, and on a running service.

mod check;
#[path = "../support/chunks.rs"]
mod chunks;
mod drain;
mod export;
mod import;
mod log;
#[path = "../support/parked.rs"]
mod parked;
#[path = "../support/process.rs"]
mod process;
mod repair;
mod running;
