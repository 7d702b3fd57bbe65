//! The same while new events go ahead of a backlog (`forward.live_first`), which a time window holds back until the end.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::environment::number_from_environment;
use super::http::wait_until;
use super::process::{Options, Process};
use super::{PARKED_ONE_IN, Test, metric, passages_max};

/// Where the process is killed: around everything that the two places in the log rest on.
const POINTS: [&str; 13] = [
    "ahead.written",
    "commit.published",
    "cursor.begin",
    "cursor.synced",
    "cursor.written",
    "park.synced",
    "recover.end",
    "rotate.taken",
    "spill.saved",
    "spill.synced",
    "trim.begin",
    "trim.end",
    "trim.half_removed",
];

/// What is older does not count as new.
const BACKLOG_AGE_MIN: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_ahead_of_a_backlog_survives_kills() {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    println!("RINGTAIL_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut test = Test::new(&mut rng, true, PARKED_ONE_IN);
    let collecting = Options { brokers: Vec::new(), ..test.options.clone() };
    test.collect(&collecting).await;
    let began = Instant::now();
    let delivering = test.options.settings.clone();
    let now = jiff::Zoned::now().time();
    let hours = |hours: i64| now.wrapping_add(jiff::Span::new().hours(hours)).strftime("%H:%M").to_string();
    test.options.settings.push("forward.live_first = true".into());
    test.options.settings.push(format!("forward.pace.windows = [\"{}-{}\"]", hours(2), hours(3)));
    let backlog = test.begin_live().await;
    let mut points = POINTS;
    points.shuffle(&mut rng);
    for point in points {
        test.set_closed(point.starts_with("spill.") || rng.random());
        test.live(point, rng.random_range(1..=passages_max(point))).await;
        let summary = test.check(rng.random(), false);
        println!("killed at {point}, {:?}: {summary}", began.elapsed());
    }
    // Not one of the backlog, which was the first to be acked, has arrived by now, however often it began anew.
    let arrived = |test: &Test| {
        test.destination.look(|seen| {
            let places = |((client, _), arrived): (&(u32, _), &super::destination::Arrived)| {
                arrived.events.iter().filter(|(number, _)| backlog.contains(&(*client, *number))).count()
            };
            seen.clients.iter().map(places).sum::<usize>()
        })
    };
    assert_eq!(tokio::task::block_in_place(|| arrived(&test)), 0);
    test.options.settings = delivering;
    test.set_closed(false);
    test.deliver_all().await;
    test.deliver_all().await;
    println!("{}", test.check(false, true));
    assert!(tokio::task::block_in_place(|| arrived(&test)) > 0);
}

impl Test {
    /// A life in which new events begin to go ahead. The batches that are a backlog then.
    async fn begin_live(&mut self) -> std::collections::HashSet<(u32, u64)> {
        let backlog = self.oracle.lock().unwrap().pending(&self.options.directory, &self.load);
        let began = Instant::now();
        wait_until("it to be a backlog", || began.elapsed() > BACKLOG_AGE_MIN).await;
        let (mut process, addresses) = Process::start(&self.options);
        // Without a client there is nothing else to deliver.
        let is_live = || super::http::get(addresses.admin, "/status").1.contains("\"live_first\":true");
        wait_until("new events to go ahead", is_live).await;
        let running = self.clients.start(addresses);
        wait_until("new events to arrive", || metric(addresses.admin, "forward_delivered_events_total") > 0).await;
        process.kill();
        self.clients.finish(running).await;
        backlog.into_iter().collect()
    }
}
