//! Evidence below sled: power cuts and disk errors on real files, made by a library that is preloaded into the binary.

mod broken;
mod check;
mod cuts;
mod disk;
#[path = "../support/environment.rs"]
mod environment;
mod full;
#[path = "../support/http.rs"]
mod http;
mod image;
mod journal;
mod kafka;
mod load;
mod model;
mod order;
#[path = "../support/parked.rs"]
mod parked;
mod power;
#[path = "../support/process.rs"]
mod process;
mod runs;
mod service;
#[path = "../support/small_log.rs"]
mod small_log;
mod spill_damage;

use environment::number_from_environment;
use rand::Rng;

/// The seed of a test's choices; replays by `RINGTAIL_SEED`.
fn seed() -> u64 {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    println!("RINGTAIL_SEED={seed}");
    seed
}
