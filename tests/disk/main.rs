//! Evidence below sled: power cuts and disk errors on real files, made by a library that is preloaded into the binary.

mod broken;
mod check;
mod cuts;
mod disk;
mod full;
mod http;
mod image;
mod journal;
mod kafka;
mod load;
mod model;
mod power;
#[path = "../support/process.rs"]
mod process;
mod runs;
mod service;

use rand::Rng;

fn number_from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is not a number: {value}")))
}

/// The seed of a test's choices; replays by `RINGTAIL_SEED`.
fn seed() -> u64 {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    println!("RINGTAIL_SEED={seed}");
    seed
}
