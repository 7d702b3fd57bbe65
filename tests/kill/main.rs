//! `kill -9` at random moments under load: every batch that was acked is in the log afterwards, whole, once, in order.
//!
//! One log directory lives through many lives of the process. In each, clients of every protocol send batches that carry
//! their number; SIGKILL comes at a random moment between the start of the process, before it is ready, and a few hundred
//! milliseconds of load. Every [`LIVES_BETWEEN_CHECKS`] lives, and at the end, the log is opened in the test and compared
//! with what the clients saw. Then a part of it is delivered, so that trimming takes place.
//!
//! This cannot reveal a missing fsync, because the page cache survives the process; `ack_after_sync` does that.
//!
//! `RINGTAIL_SEED` replays the choices of a run (not the timing of the machine), `RINGTAIL_KILLS` sets their number.

#[path = "../support/environment.rs"]
mod environment;
#[path = "../support/kept.rs"]
mod kept;
mod load;
mod oracle;
#[path = "../support/process.rs"]
mod process;
#[path = "../support/small_log.rs"]
mod small_log;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use environment::number_from_environment;
use kept::KeptOnPanic;
use load::{Clients, Load};
use oracle::Oracle;
use process::{Options, Process};

/// Lives after which the log is checked.
const LIVES_BETWEEN_CHECKS: u64 = 20;
/// Largest payload: several slots of a segment.
const PAYLOAD_BYTES_MAX: usize = 700 << 10;
/// A kill comes at most so long after the process was ready.
const LOAD_TIME_MAX: Duration = Duration::from_millis(300);
/// One life in so many ends before it is ready, or about then.
const EARLY_KILL_ONE_IN: u32 = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acked_batch_survives_kill_9() {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    let kills = number_from_environment("RINGTAIL_KILLS").unwrap_or(120);
    // What the log says while the test itself opens it.
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_ansi(false).init();
    println!("RINGTAIL_SEED={seed} RINGTAIL_KILLS={kills}");
    let mut rng = StdRng::seed_from_u64(seed);
    let directory = KeptOnPanic(tempfile::tempdir().unwrap());
    let options = Options::small(&directory.0.path().join("wal"));
    let load = Load::new(&mut rng, PAYLOAD_BYTES_MAX, None);
    let oracle = Arc::new(Mutex::new(Oracle::default()));
    let mut clients = Clients::new(&load, &oracle);
    let began = Instant::now();
    let mut early_kills = 0;
    // What the last start took: the moments at which an early kill may come.
    let mut start_time = Duration::ZERO;
    for life in 1..=kills {
        let spawned = Instant::now();
        let mut process = Process::spawn(&options);
        let running = if life > 1 && rng.random_ratio(1, EARLY_KILL_ONE_IN) {
            early_kills += 1;
            None
        } else {
            let addresses = process.wait_until_ready();
            start_time = spawned.elapsed();
            Some(clients.start(addresses))
        };
        let time_max = if running.is_some() { LOAD_TIME_MAX } else { start_time };
        // Not a wait for something to happen: the random moment of the kill is the fault that is injected.
        tokio::time::sleep(time_max.mul_f64(rng.random_range(0.0..=1.0))).await;
        process.kill();
        let complaints = process.complaints();
        let expected = |line: &String| line.contains("forward.brokers is empty");
        assert!(complaints.iter().all(expected), "life {life} met damage: {complaints:#?}");
        if let Some(running) = running {
            clients.finish(running).await;
        }
        if life % LIVES_BETWEEN_CHECKS == 0 || life == kills {
            let deliver = if rng.random() { rng.random_range(0.0..=1.0) } else { 0.0 };
            let (path, oracle, load) = (options.directory.clone(), oracle.clone(), load.clone());
            let check = move || oracle.lock().unwrap().check(&path, &load, deliver);
            let summary = tokio::task::spawn_blocking(check).await.expect("the log holds what was acked");
            println!("after {life} kills, {early_kills} of them early, {:?}: {summary}", began.elapsed());
        }
    }
    let oracle = oracle.lock().unwrap();
    println!("{} batches acked, {} in the log unacked, in {:?}", oracle.acked, oracle.unacked, began.elapsed());
    assert!(kills < LIVES_BETWEEN_CHECKS || oracle.acked > kills, "there was hardly any load");
}
