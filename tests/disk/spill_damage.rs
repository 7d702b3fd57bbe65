//! Files of the spill of a stopped log are damaged: the next start delivers what is readable, byte for byte, and counts the
//! rest exactly.

use std::collections::HashSet;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use ringtail::forward::spill_contents;
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;

use crate::http::{get, wait_until};
use crate::load::Load;
use crate::seed;
use crate::service::Service;
use crate::small_log::small_log;

const IMAGES: usize = 6;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_spill_is_delivered_as_far_as_it_can_be_read() {
    let mut rng = StdRng::seed_from_u64(seed());
    let mut lost = 0;
    for image in 0..IMAGES {
        let mut service = Service::start_closed(rng.random());
        for _ in 0..2 {
            service.send(4 << 20).await;
            wait_until("events to be spilled", || service.spilled() > 0).await;
            // Each life has a file of its own.
            service.stop();
            service.restart();
        }
        service.stop();
        // Also settles it: nothing of it is in the log then.
        let wal = Wal::open(&small_log(&service.disk.root()), 1 << 20, Metrics::new()).unwrap();
        let contents = spill_contents(&wal).unwrap();
        wal.close();
        drop(wal);
        assert_eq!(contents.lost, 0);
        let spilled: HashSet<_> =
            contents.events.iter().map(|(_, payload)| Load::parse_payload(payload).unwrap()).collect();
        assert!(!spilled.is_empty());
        let what = damage(&service, image, &mut rng);
        service.kafka.set_closed(false);
        service.restart();
        wait_until("the log to be empty", || service.wal("pending_events") == 0 && service.spilled() == 0).await;
        let (_, metrics) = get(service.addresses.admin, "/metrics");
        let counted = metrics.lines().find_map(|line| {
            line.strip_prefix("ringtail_forward_dropped_events_total{reason=\"damaged\"} ")?.parse::<usize>().ok()
        });
        let counted = counted.expect("the metric is there");
        let delivered = || spilled.iter().filter(|event| service.kafka.has(event)).count();
        wait_until(&format!("what is left of {} with {what}, {counted} lost", spilled.len()), || {
            delivered() + counted == spilled.len()
        })
        .await;
        println!("{what}: {} spilled, {counted} lost", spilled.len());
        lost += counted;
        // It goes on.
        service.send(64 << 10).await;
        wait_until("the log to be empty", || service.wal("pending_events") == 0).await;
        service.stop();
    }
    assert!(lost > 0, "nothing was damaged");
}

/// Damages a file of the spill that has something in it, and says how.
fn damage(service: &Service, image: usize, rng: &mut StdRng) -> String {
    let files = std::fs::read_dir(service.disk.root().join("spill")).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<_> = files.filter(|file| !file.ends_with("state") && !file.ends_with("id")).collect();
    files.sort_unstable();
    let path = &files[rng.random_range(0..files.len())];
    let mut bytes = std::fs::read(path).unwrap();
    let at = rng.random_range(0..bytes.len());
    match image % 3 {
        0 => {
            bytes[at] ^= 1 << rng.random_range(0..8);
            std::fs::write(path, &bytes).unwrap();
            format!("a bit flipped at {at} of {}", bytes.len())
        }
        1 => {
            std::fs::write(path, &bytes[..at]).unwrap();
            format!("{} truncated to {at}", bytes.len())
        }
        _ => {
            std::fs::remove_file(path).unwrap();
            format!("a file of {} removed", bytes.len())
        }
    }
}
