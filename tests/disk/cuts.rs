//! Cuts the power at many moments of one run, and checks what each left.

use std::collections::HashSet;
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use tempfile::TempDir;

use crate::check::{Found, Promise, check};
use crate::image::{self, Fate};
use crate::journal::{Change, records};
use crate::load::{Acks, HELD_TYPE, Name};
use crate::model::{Disbelief, Model};
use crate::process::{Options, Process};
use crate::runs::Run;

/// One cut in so many is not at a sync point.
const ELSEWHERE_ONE_IN: usize = 4;

/// What came of the cuts.
#[derive(Default)]
pub struct Outcome {
    pub cuts: usize,
    /// Syncs in the run, times two: before and after.
    pub sync_points: usize,
    /// What is wrong with the images that are not right.
    pub failures: Vec<String>,
    /// Sums over all right ones.
    pub found: Found,
    /// Images on which the service then ran.
    pub services: usize,
}

/// Cuts the power `cuts` times; on so many of the images, `services`, the service runs before they are checked.
pub async fn cut(run: &Run, cuts: usize, services: usize, disbelief: Disbelief, rng: &mut StdRng) -> Outcome {
    let (moments, sync_points) = moments(&run.journal, cuts, rng);
    let acks = run.clients.acks();
    let mut model = Model::new(&run.journal, disbelief);
    let mut next = records(&run.journal).peekable();
    let mut outcome = Outcome { cuts, sync_points, ..Outcome::default() };
    for (number, moment) in moments.into_iter().enumerate() {
        while let Some(record) = next.next_if(|record| record.end <= moment) {
            model.apply(&record.change);
        }
        let fates = (Fate::random(rng), Fate::random(rng));
        let directory = image_directory();
        image::write(&model, fates, rng, directory.path()).expect("write the image");
        let mut acked: HashSet<_> = acks.iter().filter(|(_, seen)| **seen <= moment).map(|(name, _)| *name).collect();
        if services > 0 && number % cuts.div_ceil(services) == 0 {
            outcome.services += 1;
            acked.extend(serve(run, directory.path()).await.into_keys());
        }
        // While Kafka is away, all that it was given had been seen. Else it may have been given more than was seen.
        let is_outage = run.outages.iter().any(|outage| outage.contains(&moment));
        let is_closed = run.closed.iter().any(|closed| closed.contains(&moment));
        let is_held = |(name, event): &(Name, usize)| run.load.events(*name)[*event].0 == HELD_TYPE;
        let was_given = |event, seen: usize| seen <= moment || !(is_outage || is_closed && is_held(event));
        let deliveries = run.deliveries.iter().filter(|(event, seen)| was_given(event, **seen));
        let delivered = deliveries.map(|(event, _)| *event).collect();
        match check(directory.path(), &Promise { load: &run.load, acked: &acked, delivered: &delivered }) {
            Ok(found) => outcome.found += found,
            Err(error) => {
                outcome.failures.push(format!("cut at {moment} of {}, {fates:?}: {error}", run.journal.len()))
            }
        }
    }
    outcome
}

/// Moments of a run, as lengths of its journal, ascending: sync points in turn, others, and its end. And the number of sync points.
fn moments(journal: &[u8], cuts: usize, rng: &mut StdRng) -> (Vec<usize>, usize) {
    // A moment after the begin of a sync: it has done nothing yet. After its end: nothing has happened since.
    let is_sync = |change: &Change| matches!(change, Change::SyncBegins { .. } | Change::SyncEnds { .. });
    let (syncs, others): (Vec<_>, Vec<_>) = records(journal).partition(|record| is_sync(&record.change));
    // The end, when the run has left what it is about, is one of them.
    let mut moments = vec![journal.len()];
    moments.extend(others.choose_multiple(rng, cuts / ELSEWHERE_ONE_IN).map(|record| record.end));
    while moments.len() < cuts {
        moments.extend(syncs.choose_multiple(rng, (cuts - moments.len()).min(syncs.len())).map(|record| record.end));
    }
    moments.sort_unstable();
    (moments, syncs.len())
}

/// The service starts on what is left, takes more batches, and stops. Returns what it acked.
async fn serve(run: &Run, directory: &Path) -> Acks {
    let (mut process, addresses) = Process::start(&Options::small(directory));
    let mut clients = run.clients.anew();
    clients.send(addresses, 1 << 20).await;
    assert!(process.stop().success());
    let errors: Vec<String> = process.complaints().into_iter().filter(|line| line.contains("ERROR ringtail")).collect();
    assert!(errors.is_empty(), "the service complains: {errors:#?}");
    assert!(!clients.acks().is_empty());
    clients.acks()
}

/// In memory where that is possible: the images are many and large.
fn image_directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("ringtail-image-").tempdir_in(parent).expect("make a directory")
}
