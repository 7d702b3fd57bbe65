//! The disk as one power cut left it: what was certain, and of the rest what the dice let survive.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use rand::Rng;
use rand::rngs::StdRng;

use super::model::{FileChange, FileChangeKind, Model, NameChange, Names, Node, ROOT};

const PAGE_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;

/// What becomes of that which is not certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// All of it is lost.
    Lost,
    /// All of it is kept.
    Kept,
    /// Each change is lost or kept.
    Changes,
    /// Each page is lost or kept, and the last write to a file may be torn within its pages.
    Pages,
}

impl Fate {
    /// Any of them.
    pub fn random(rng: &mut StdRng) -> Fate {
        [Fate::Lost, Fate::Kept, Fate::Changes, Fate::Pages, Fate::Pages][rng.random_range(0..5)]
    }
}

/// Writes the image into `directory`, which is empty.
pub fn write(
    model: &Model,
    (names_fate, data_fate): (Fate, Fate),
    rng: &mut StdRng,
    directory: &Path,
) -> io::Result<()> {
    let mut names = model.durable_names.clone();
    let mut lost = HashSet::new();
    for change in &model.pending_names {
        // The changes of one name stay in order: none is kept that follows a lost one.
        let follows_lost = change.names.iter().any(|(name, _)| lost.contains(name));
        if !follows_lost && survives(names_fate, rng) {
            NameChange::apply(change, &mut names);
        } else {
            lost.extend(change.names.iter().map(|(name, _)| name));
        }
    }
    write_directory(model, &names, ROOT, data_fate, rng, directory)
}

/// The directory exactly as the process saw it.
pub fn write_volatile(model: &Model, directory: &Path) -> io::Result<()> {
    use rand::SeedableRng;
    write(model, (Fate::Kept, Fate::Kept), &mut StdRng::seed_from_u64(0), directory)
}

fn write_directory(
    model: &Model,
    names: &Names,
    node: usize,
    fate: Fate,
    rng: &mut StdRng,
    path: &Path,
) -> io::Result<()> {
    for ((_, name), entry) in names.range((node, String::new())..(node + 1, String::new())) {
        let path = path.join(name);
        let node = &model.nodes[*entry];
        if node.is_directory {
            std::fs::create_dir(&path)?;
            write_directory(model, names, *entry, fate, rng, &path)?;
        } else {
            std::fs::write(&path, content(node, model.journal, fate, rng))?;
        }
    }
    Ok(())
}

fn survives(fate: Fate, rng: &mut StdRng) -> bool {
    match fate {
        Fate::Lost => false,
        Fate::Kept => true,
        Fate::Changes | Fate::Pages => rng.random(),
    }
}

/// What is left of a file.
fn content(node: &Node, journal: &[u8], fate: Fate, rng: &mut StdRng) -> Vec<u8> {
    let mut content = node.durable.clone();
    let is_truncation = |change: &FileChange| matches!(change.kind, FileChangeKind::Truncate(_));
    let mut pending = &node.pending[..];
    // Truncations happen in order, and after the writes before them.
    while let Some(truncation) = pending.iter().position(is_truncation) {
        if !survives(fate, rng) {
            pending = &pending[..truncation];
            break;
        }
        for change in &pending[..=truncation] {
            change.kind.apply(&mut content, journal);
        }
        pending = &pending[truncation + 1..];
    }
    let certain_bytes = content.len();
    let mut after = content.clone();
    // A page that is kept has every write up to that one: whole pages, as the page cache writes them back.
    let keep: Vec<bool> = pending.iter().map(|_| survives(fate, rng)).collect();
    for (at, change) in pending.iter().enumerate() {
        let FileChangeKind::Write(offset, data) = &change.kind else { unreachable!("they were split off") };
        change.kind.apply(&mut after, journal);
        let (from, until) = (*offset as usize, *offset as usize + data.len());
        content.resize(content.len().max(after.len()), 0);
        for page in from / PAGE_BYTES..until.div_ceil(PAGE_BYTES) {
            let range = page * PAGE_BYTES..((page + 1) * PAGE_BYTES).min(after.len());
            let is_kept = if fate == Fate::Pages { rng.random() } else { keep[at] };
            let is_torn = fate == Fate::Pages && at + 1 == pending.len() && rng.random_ratio(1, 4);
            if is_torn {
                for sector in range.clone().step_by(SECTOR_BYTES) {
                    let sector = sector..(sector + SECTOR_BYTES).min(range.end);
                    if rng.random() {
                        content[sector.clone()].copy_from_slice(&after[sector]);
                    }
                }
            } else if is_kept {
                content[range.clone()].copy_from_slice(&after[range]);
            }
        }
    }
    // The file's new size may be lost, and what is beyond the old one with it.
    if fate == Fate::Lost {
        content.truncate(certain_bytes);
    } else if fate != Fate::Kept && content.len() > certain_bytes && rng.random_ratio(1, 3) {
        content.truncate(rng.random_range(certain_bytes..content.len()));
    }
    content
}
