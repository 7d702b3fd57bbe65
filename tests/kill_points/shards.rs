//! The same around the shards of the parked store (`src/wal/store/shards.rs`): every event is parked, so that there soon are
//! several. While the process runs, the test drops what was parked before.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use ringtail::admin::{ParkedDrop, control};
use ringtail::forward::ParkedFilter;
use ringtail::kill_point;

use super::environment::number_from_environment;
use super::http::wait_until;
use super::process::Process;
use super::{Test, metric};

const PARKED_ONE_IN: u32 = 1;
/// Shards before a life in which some are removed: all but the newest are.
const SHARDS: usize = 3;
/// Events that are parked then, at least.
const PARKED_MIN: u64 = 50;

/// Points that are passed where there are several shards, something is removed, or there is an older version's parked store.
pub fn needs_shards(point: &str) -> bool {
    ["shard.", "removal.", "take_over."].iter().any(|stage| point.starts_with(stage))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_parked_survives_kills_around_its_shards() {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    println!("RINGTAIL_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut test = Test::new(&mut rng, false, PARKED_ONE_IN);
    let (began, points) = (Instant::now(), kill_point::ALL.iter().filter(|point| needs_shards(point)));
    let (take_over, mut points): (Vec<&str>, Vec<&str>) = points.partition(|point| point.starts_with("take_over."));
    // First, while all is in one shard, and nothing was removed: what counts that is in another one.
    test.fill_shards(1).await;
    // Nothing of it is half made then.
    test.check(false, false);
    for point in take_over {
        test.make_older(point == "take_over.gathered");
        test.live(point, 1).await;
        println!("killed at {point}, {:?}: {}", began.elapsed(), test.check(false, false));
    }
    points.shuffle(&mut rng);
    for point in points {
        test.fill_shards(SHARDS).await;
        let last_id = test.give_up_parked();
        if matches!(point, "shard.damaged" | "shard.set_aside") {
            test.damage_shard(&mut rng);
        }
        let passages_max = if matches!(point, "shard.begun" | "shard.made") { 2 } else { 1 };
        let dropping = tokio::spawn(drop_parked(test.options.directory.clone(), last_id));
        test.live(point, rng.random_range(1..=passages_max)).await;
        dropping.abort();
        println!("killed at {point}, {:?}: {}", began.elapsed(), test.check(rng.random(), false));
    }
    test.deliver_all().await;
    test.deliver_all().await;
    println!("{}", test.check(false, true));
}

/// Drops parked events up to `until_id` as soon as the service runs, until it is killed.
async fn drop_parked(directory: PathBuf, until_id: u64) {
    let filter = ParkedFilter { until_id: Some(until_id), ..ParkedFilter::default() };
    let command = ParkedDrop { filter, dry_run: false };
    loop {
        if let Ok(Some(answer)) = control::command(&directory, &command).await {
            // Cut off by the kill.
            let _ = answer.all().await;
        }
        // There may be no service to ask.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Test {
    fn shards(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.options.directory.join("parked")) else { return Vec::new() };
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.file_name().unwrap() != "000000000000").collect()
    }

    /// A life killed under load, once there are so many shards, and something is in them.
    async fn fill_shards(&mut self, shards: usize) {
        let (mut process, addresses) = Process::start(&self.options);
        let running = self.clients.start(addresses);
        let is_parked = || metric(addresses.admin, "forward_parked_events") >= PARKED_MIN;
        wait_until("shards to be filled", || self.shards().len() >= shards && is_parked()).await;
        process.kill();
        self.clients.finish(running).await;
    }

    /// What is parked may be gone from now on. The newest id.
    fn give_up_parked(&mut self) -> u64 {
        self.oracle.lock().unwrap().give_up_parked(&self.options.directory, &self.load)
    }

    /// Turns the only shard into what a version without shards has, or puts a copy of it as one beside it.
    fn make_older(&self, beside: bool) {
        let (parked, aside) = (self.options.directory.join("parked"), self.options.directory.join("aside"));
        assert_eq!(self.shards(), [parked.join("000000000001")]);
        if beside {
            let files = std::fs::read_dir(parked.join("000000000001")).unwrap().map(|file| file.unwrap().path());
            for file in files.filter(|file| file.is_file()) {
                std::fs::copy(&file, parked.join(file.file_name().unwrap())).unwrap();
            }
        } else {
            std::fs::rename(parked.join("000000000001"), &aside).unwrap();
            std::fs::remove_dir(&parked).unwrap();
            std::fs::rename(&aside, &parked).unwrap();
        }
    }

    /// Deletes the files of a shard, but for its marker.
    fn damage_shard(&self, rng: &mut StdRng) {
        self.oracle.lock().unwrap().is_parked_damaged = true;
        let shards = self.shards();
        let shard: &Path = shards.choose(rng).unwrap();
        let files = std::fs::read_dir(shard).unwrap().map(|file| file.unwrap().path());
        for file in files.filter(|file| file.is_file() && !file.ends_with("READY")) {
            std::fs::remove_file(file).unwrap();
        }
    }
}
