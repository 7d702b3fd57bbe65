//! The power fails: at any sync point of a run, before it takes effect and after, and in the middle of a write.
//!
//! A run is made once, its journal then cut at many moments: at each, what was not synced is lost or kept by the dice. A
//! test without a failing disk proves nothing, so two of them do not believe in some of the syncs, and must see losses.
//!
//! `RINGTAIL_SEED` replays the dice (not the run, which is the machine's), `RINGTAIL_CUTS` sets the number of cuts,
//! `RINGTAIL_CUT_SERVICES` on how many of the images the service then runs.

use std::sync::Arc;
use std::time::Instant;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::cuts::{Outcome, cut};
use crate::disk::Disk;
use crate::environment::number_from_environment;
use crate::journal::{Change, records};
use crate::load::{Clients, Load};
use crate::model::{Disbelief, Model};
use crate::order::Order;
use crate::process::{Options, Process};
use crate::runs::{Run, abandon, collect, forward, park, spill};
use crate::seed;

/// Cuts of a plain run.
const CUTS: usize = 40;
/// Images on which the service then runs.
const SERVICES: usize = 2;
/// Cuts on a disk that loses what it must not.
const CONTROL_CUTS: usize = 16;

/// Cuts the power on a disk that is as it should be.
async fn assert_nothing_is_lost(run: &Run, began: Instant, rng: &mut StdRng) -> Outcome {
    let acked = run.clients.acks().len();
    println!("{acked} batches acked, journal of {} MiB, in {:?}", run.journal.len() >> 20, began.elapsed());
    let cuts = number_from_environment("RINGTAIL_CUTS").map_or(CUTS, |cuts| cuts as usize);
    let services = number_from_environment("RINGTAIL_CUT_SERVICES").map_or(SERVICES, |services| services as usize);
    let outcome = cut(run, cuts, services, Disbelief::default(), rng).await;
    let Outcome { cuts, sync_points, failures, found, services } = &outcome;
    println!(
        "{cuts} cuts at {sync_points} sync points and elsewhere, the service then ran on {services}: {} failed",
        failures.len()
    );
    println!(
        "acked {}, unacked {}, passed {}, parked {}, spilled {}, in {:?}",
        found.acked,
        found.unacked,
        found.passed,
        found.parked,
        found.spilled,
        began.elapsed()
    );
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(found.acked > 0, "there was hardly any load");
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_that_was_acked() {
    let mut rng = StdRng::seed_from_u64(seed());
    let began = Instant::now();
    let run = collect(&mut rng).await;
    assert_nothing_is_lost(&run, began, &mut rng).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_that_was_not_delivered_or_parked() {
    let mut rng = StdRng::seed_from_u64(seed());
    let began = Instant::now();
    let run = forward(&mut rng).await;
    let Order { marked, written, removed, .. } = run.order;
    println!("{marked} segments marked, {written} writes, {removed} segments removed, in order");
    assert!(marked > 0 && written > 0 && removed > 0, "hardly anything was done to segments");
    let outcome = assert_nothing_is_lost(&run, began, &mut rng).await;
    assert!(outcome.found.passed > 0 && outcome.found.parked > 0, "nothing was delivered or parked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_that_was_acked_around_commits_without_room() {
    let mut rng = StdRng::seed_from_u64(seed());
    let began = Instant::now();
    let run = abandon(&mut rng).await;
    assert_nothing_is_lost(&run, began, &mut rng).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_that_was_spilled() {
    let mut rng = StdRng::seed_from_u64(seed());
    let began = Instant::now();
    let run = spill(&mut rng).await;
    let outcome = assert_nothing_is_lost(&run, began, &mut rng).await;
    assert!(outcome.found.passed > 0 && outcome.found.spilled > 0, "nothing was spilled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_that_was_parked_in_several_shards() {
    let mut rng = StdRng::seed_from_u64(seed());
    let began = Instant::now();
    let run = park(&mut rng).await;
    let is_shard = |path: &str| path.strip_prefix("parked/").is_some_and(|name| !name.contains('/'));
    let makes_shard = |change: &_| matches!(change, Change::MakeDirectory { path } if is_shard(path));
    let shards = records(&run.journal).filter(|record| makes_shard(&record.change)).count();
    println!("{shards} shards");
    // While it puts so much into the newest one that another begins, the one before is closed.
    assert!(shards > 3, "hardly anything was parked at once");
    let outcome = assert_nothing_is_lost(&run, began, &mut rng).await;
    assert!(outcome.found.passed > 0 && outcome.found.parked > 0, "nothing was parked");
}

/// Also if it makes the directories above its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_directory_of_the_log_is_durable_before_the_first_ack() {
    let disk = Arc::new(Disk::new());
    let options = Options { directory: disk.root().join("var/lib/ringtail"), ..disk.options() };
    let (mut process, addresses) = Process::start(&options);
    let mut clients = Clients::new(&Load::new(seed(), 1 << 10), &disk);
    clients.send(addresses, 64 << 10).await;
    assert!(process.stop().success());
    let first_ack = clients.acks().into_values().min().expect("something was acked");
    let journal = disk.journal();
    let mut model = Model::new(&journal, Disbelief::default());
    for record in records(&journal).take_while(|record| record.end <= first_ack) {
        model.apply(&record.change);
    }
    let log = ["", "/meta", "/meta/READY", "/quarantine", "/wal", "/wal/000000000001", "/wal/000000000001/READY"];
    let log = log.map(|path| format!("var/lib/ringtail{path}"));
    for path in ["var", "var/lib"].into_iter().chain(log.iter().map(String::as_str)) {
        assert!(model.is_durable(path), "a batch is acked while {path} may be lost");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_syncs_of_the_spill_acked_batches_are_lost() {
    let mut rng = StdRng::seed_from_u64(seed());
    let run = spill(&mut rng).await;
    let disbelief = Disbelief { of_spill_syncs: true, ..Disbelief::default() };
    assert_batches_are_lost(&cut(&run, CONTROL_CUTS, 0, disbelief, &mut rng).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_syncs_of_segments_acked_batches_are_lost() {
    let mut rng = StdRng::seed_from_u64(seed());
    let run = collect(&mut rng).await;
    let disbelief = Disbelief { of_db_syncs: true, ..Disbelief::default() };
    assert_batches_are_lost(&cut(&run, CONTROL_CUTS, 0, disbelief, &mut rng).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_syncs_of_directories_acked_batches_are_lost() {
    let mut rng = StdRng::seed_from_u64(seed());
    let run = collect(&mut rng).await;
    let disbelief = Disbelief { of_directory_syncs: true, ..Disbelief::default() };
    assert_batches_are_lost(&cut(&run, CONTROL_CUTS, 0, disbelief, &mut rng).await);
}

fn assert_batches_are_lost(outcome: &Outcome) {
    let lost = outcome.failures.iter().filter(|failure| failure.contains("acked batches are lost")).count();
    println!("{} cuts: {} failed, {lost} of them lost acked batches", outcome.cuts, outcome.failures.len());
    assert!(lost > 0, "the test sees no loss where there must be some: {:#?}", outcome.failures);
}
