//! What is done to an image.

use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};

use super::build::Built;

const PAGE_BYTES: usize = 4096;

/// What was done.
#[derive(Debug, Clone, Default)]
pub struct Damage {
    /// What it was done to, roughly: the row of the summary.
    pub target: &'static str,
    /// In words.
    pub steps: Vec<String>,
    /// `meta` was touched: cursor and end of the log may be unknown, or old.
    pub meta: bool,
    /// Segments whose marker was touched: one without records may be taken for an unfinished one.
    pub unmarked: Vec<u64>,
}

/// Damages the image in `path`: one thing of every kind in turn, seldom two or three.
pub fn damage(rng: &mut StdRng, built: &Built, path: &Path) -> Damage {
    let mut damage = Damage::default();
    let steps = if rng.random_ratio(1, 5) { rng.random_range(2..4) } else { 1 };
    for _ in 0..steps {
        one(rng, built, path, &mut damage);
    }
    if steps > 1 {
        damage.target = "several";
    }
    damage
}

fn one(rng: &mut StdRng, built: &Built, path: &Path, damage: &mut Damage) {
    let segments = list(&path.join("wal"));
    let segment = segments.choose(rng);
    let (target, file) = match (rng.random_range(0..100), segment) {
        (0..50, Some(segment)) => ("db", segment.join("db")),
        (50..56, Some(segment)) => ("conf", segment.join("conf")),
        (56..62, Some(segment)) => ("snap", snapshot(segment)),
        (62..68, Some(segment)) => ("READY", segment.join("READY")),
        (68..71, Some(segment)) => ("blobs", segment.join("blobs")),
        (71..76, Some(segment)) => ("segment", segment.clone()),
        (76..87, _) => {
            damage.meta = true;
            ("meta", any_file(&path.join("meta"), rng))
        }
        (87..98, _) => ("parked", any_file(&any_shard(&path.join("parked"), rng), rng)),
        _ => ("lock", path.join("lock")),
    };
    damage.target = target;
    if matches!(target, "READY") {
        let id = file
            .parent()
            .and_then(Path::file_name)
            .and_then(|name| name.to_str())
            .map(|name| name.parse::<u64>().unwrap());
        damage.unmarked.extend(id);
    }
    let relative = file.strip_prefix(path).unwrap();
    let older = built.older(relative, rng);
    let what = if !file.exists() {
        fs::write(&file, noise(rng, 100)).map_or_else(|error| error.to_string(), |()| "made of noise".into())
    } else if file.is_dir() {
        match rng.random_range(0..3) {
            0 if target == "blobs" => {
                fs::write(file.join("7"), noise(rng, 1000)).unwrap();
                "got a file of noise".into()
            }
            1 if target == "blobs" => {
                fs::remove_dir_all(&file).unwrap();
                fs::write(&file, noise(rng, 1000)).unwrap();
                "became a file".into()
            }
            _ => {
                fs::remove_dir_all(&file).unwrap();
                "deleted".into()
            }
        }
    } else {
        change(rng, &file, older.as_deref())
    };
    damage.steps.push(format!("{}: {what}", relative.display()));
}

/// Changes a file. Says how.
fn change(rng: &mut StdRng, file: &Path, older: Option<&Path>) -> String {
    let mut bytes = fs::read(file).unwrap();
    let length = bytes.len().max(1);
    let what = match rng.random_range(0..8) {
        0 | 1 if !bytes.is_empty() => {
            let bits = if rng.random() { 1 } else { rng.random_range(2..50) };
            for _ in 0..bits {
                let at = rng.random_range(0..length);
                bytes[at] ^= 1 << rng.random_range(0..8);
            }
            format!("{bits} bits flipped")
        }
        2 | 3 if !bytes.is_empty() => {
            let (pages, zero) = (rng.random_range(1..5), rng.random());
            let mut at = Vec::new();
            for _ in 0..pages {
                let page = rng.random_range(0..length.div_ceil(PAGE_BYTES));
                let page_bytes = &mut bytes[page * PAGE_BYTES..length.min((page + 1) * PAGE_BYTES)];
                if zero {
                    page_bytes.fill(0)
                } else {
                    rng.fill_bytes(page_bytes)
                }
                at.push(page);
            }
            format!(
                "pages {at:?} of {} filled with {}",
                length.div_ceil(PAGE_BYTES),
                if zero { "zeroes" } else { "noise" }
            )
        }
        4 => {
            bytes.truncate(rng.random_range(0..length));
            format!("cut to {} of {length}", bytes.len())
        }
        5 => {
            let extension = noise(rng, 100_000);
            bytes.extend(&extension);
            format!("extended by {} bytes of noise", extension.len())
        }
        6 => {
            fs::remove_file(file).unwrap();
            return "deleted".into();
        }
        _ => match older {
            Some(older) => {
                fs::copy(older, file).unwrap();
                return format!("replaced with an older one of {} bytes", fs::metadata(file).unwrap().len());
            }
            None => {
                bytes.fill(0);
                "filled with zeroes".into()
            }
        },
    };
    fs::write(file, bytes).unwrap();
    what
}

fn noise(rng: &mut StdRng, bytes_max: usize) -> Vec<u8> {
    let mut noise = vec![0; rng.random_range(1..bytes_max)];
    rng.fill_bytes(&mut noise);
    noise
}

fn list(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn any_file(directory: &Path, rng: &mut StdRng) -> PathBuf {
    if !directory.exists() {
        return directory.to_path_buf();
    }
    let files: Vec<PathBuf> = list(directory).into_iter().filter(|path| path.is_file()).collect();
    // Mostly the log itself.
    if rng.random() { directory.join("db") } else { files.choose(rng).cloned().unwrap_or_else(|| directory.join("db")) }
}

/// The head or a shard of a map, or the map itself if it has none.
fn any_shard(directory: &Path, rng: &mut StdRng) -> PathBuf {
    let shards = if directory.exists() { list(directory) } else { Vec::new() };
    shards.choose(rng).cloned().unwrap_or_else(|| directory.to_path_buf())
}

fn snapshot(segment: &Path) -> PathBuf {
    let name = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"snap."));
    let found = if segment.exists() { list(segment).into_iter().find(name) } else { None };
    found.unwrap_or_else(|| segment.join("snap.0000000000000001.generating"))
}
