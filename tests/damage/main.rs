//! Damage on disk: whatever happens to the files of a closed log, what is read is what was written, and what is missing is
//! exactly what the log says is missing.
//!
//! A log is built on real sled files: several segments, a part of it delivered, some events parked. Then image after image
//! of it is damaged (`damage.rs`) and opened through the library as the service does (`check.rs`): bits are flipped, pages
//! zeroed or filled with noise, files cut, extended, deleted or replaced with an older copy of themselves.
//!
//! What no log can know, and is therefore not asked for:
//! - that its newest or its oldest records are gone, when `meta` is lost or old as well: the saved end and the saved cursor
//!   are the only witnesses;
//! - what was delivered, when `meta` is lost or old: then everything still in the log comes again, and records that
//!   were delivered may be reported missing; and how many parked events there were;
//! - which parked events are missing, where damage brought back some that were removed: those are set off against them.
//!
//! `RINGTAIL_SEED` replays a run, `RINGTAIL_IMAGES` sets the number of images, `RINGTAIL_IMAGE` tries one of them alone.

mod build;
mod check;
mod damage;
#[path = "../support/environment.rs"]
mod environment;
#[path = "../support/parked.rs"]
mod parked;
#[path = "../support/small_log.rs"]
mod small_log;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use build::Built;
use damage::Damage;
use environment::number_from_environment;

/// Longest that one image may take: only to end a test that hangs.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn nothing_is_lost_in_silence_and_no_wrong_byte_is_read() {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    let images = number_from_environment("RINGTAIL_IMAGES").unwrap_or(40);
    let only = number_from_environment("RINGTAIL_IMAGE");
    println!("RINGTAIL_SEED={seed} RINGTAIL_IMAGES={images}");
    let escaped = watch_panics();
    let began = Instant::now();
    let built = Arc::new(Built::new(&mut StdRng::seed_from_u64(seed)));
    println!("{} in {:?}", built.summary(), began.elapsed());

    let next = AtomicU64::new(only.unwrap_or(0));
    let end = only.map_or(images, |only| only + 1);
    let failures = Mutex::new(Vec::new());
    let found: Mutex<BTreeMap<&str, check::Found>> = Mutex::default();
    let work = || {
        loop {
            let image = next.fetch_add(1, Ordering::Relaxed);
            if image >= end {
                return;
            }
            let (damage, result) = try_image(&built, seed ^ (image << 32), only.is_some());
            match result {
                Ok(result) => found.lock().unwrap().entry(damage.target).or_default().add(&result),
                Err(message) => {
                    println!("RINGTAIL_IMAGE={image}: {message}\n  {:?}", damage.steps);
                    failures.lock().unwrap().push(image);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(8) {
            scope.spawn(work);
        }
    });
    let (failures, found) = (failures.into_inner().unwrap(), found.into_inner().unwrap());
    for (target, found) in &found {
        println!("{target:8} {found}");
    }
    println!("{images} images in {:?}", began.elapsed());
    let escaped = escaped.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(escaped.is_empty(), "panics that would end the process: {escaped:?}");
    assert!(failures.is_empty(), "RINGTAIL_SEED={seed}: {} images failed: {failures:?}", failures.len());
    let lost: u64 = found.values().map(|found| found.lost_batches).sum();
    assert!(images < 40 || lost > 0, "the images are not damaged");
}

/// Makes an image, damages it, and checks it. Says what was done, and what is wrong.
fn try_image(built: &Arc<Built>, seed: u64, aloud: bool) -> (Damage, Result<check::Found, String>) {
    let directory = build::directory();
    let path = directory.path().join("wal");
    build::copy(&built.path(), &path);
    let damage = damage::damage(&mut StdRng::seed_from_u64(seed), built, &path);
    if aloud {
        println!("{damage:#?}");
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false).with_test_writer().init();
    }
    let (told, done) = mpsc::channel();
    std::thread::spawn({
        let (built, damage) = (built.clone(), damage.clone());
        // What is wrong is the panic's message.
        let check = move || catch_unwind(AssertUnwindSafe(|| check::check(&built, &damage, &path)));
        move || told.send(check())
    });
    let result = match done.recv_timeout(PATIENCE) {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(panic)) => {
            let message = panic.downcast_ref::<String>().cloned();
            Err(message.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default())
        }
        Err(_) => Err("it hangs".into()),
    };
    (damage, result)
}

/// Keeps quiet about panics of sled that are caught, and takes note of those that would end the process.
fn watch_panics() -> Arc<Mutex<Vec<String>>> {
    let escaped: Arc<Mutex<Vec<String>>> = Arc::default();
    let watched = escaped.clone();
    let inner = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if name.starts_with("sled-io") {
            watched.lock().unwrap_or_else(PoisonError::into_inner).push(info.to_string());
        } else if info.location().is_none_or(|location| !location.file().contains("sled-0.34")) {
            inner(info);
        }
    }));
    escaped
}
