//! Named points at which a test build ends itself as `kill -9` would, between two steps whose order a promise rests on, or
//! holds the thread that passes.
//!
//! Only with the Cargo feature `kill-points`, which no package has: without it a point is an empty function. With it,
//! the environment variable `KILL_POINT=name:n` ends the process the n-th time that it passes
//! the point called `name`, and `FREEZE_POINT=name:/file` holds the thread there for as long as the file exists.
//! (`RINGTAIL_…` would be taken for configuration.)

/// Every point, in the order of the life of a batch.
pub const ALL: &[&str] = &[
    // Batches wait, and the commit thread is about to take them. A turn of the forward loop begins.
    "commit.turn",
    "forward.turn",
    // The commit: a slot is written; all of the group is; sled has handed it to the kernel; it is durable; the reader may
    // see it and nobody was told yet.
    "commit.slot_written",
    "commit.written",
    "commit.flushed",
    "commit.synced",
    "commit.published",
    // The full segment is left; the next one is taken.
    "rotate.left",
    "rotate.taken",
    // A new segment: its directory is there; sled's files are; its slots are; all but the marker is durable; the marker is
    // written and its directory entry is not durable.
    "prepare.directory",
    "prepare.opened",
    "prepare.slots",
    "prepare.synced",
    "prepare.marked",
    // Giving back reserved disk.
    "seal.begin",
    "seal.end",
    // The cursor: not yet written; written; durable.
    "cursor.begin",
    "cursor.written",
    "cursor.synced",
    // What was delivered ahead of it: written before the cursor, durable with it.
    "ahead.written",
    // The ledger of losses: written before the cursor, durable with it.
    "losses.written",
    // A delivered segment: whole; without its marker; without its marker and its log; gone.
    "trim.begin",
    "trim.unmarked",
    "trim.half_removed",
    "trim.end",
    // A damaged segment: about to be set aside; set aside, and not durably.
    "quarantine.begin",
    "quarantine.renamed",
    // Parking: in the store; durable there, and still open in flight.
    "park.written",
    "park.synced",
    // A removal from the parked store: the log's books count it, and nothing is removed.
    "removal.noted",
    // A shard of the parked store: its directory is there; it is made; it is durable and about to be closed; it is empty and
    // about to be removed; it has lost its name, and not durably.
    "shard.begun",
    "shard.made",
    "shard.settled",
    "shard.emptied",
    "shard.removed",
    // A damaged one: another has begun if it was the newest; it is set aside.
    "shard.damaged",
    "shard.set_aside",
    // A parked store of an older version becomes a shard: it is out of the way; there is a place for it; it is there, and not
    // durably. One that was left beside shards is about to be set aside.
    "take_over.moved",
    "take_over.made",
    "take_over.done",
    "take_over.gathered",
    // A topic moves out of the way: its events are in the spill; durable there. What was delivered from there is noted.
    "spill.written",
    "spill.synced",
    "spill.saved",
    // Recovery, step by step.
    "recover.cursor_loaded",
    "recover.unfinished_removed",
    "recover.spare_removed",
    "recover.tail_found",
    "recover.end",
];

/// Passes the point called `name`, which is one of [`ALL`].
#[cfg(not(feature = "kill-points"))]
#[inline(always)]
pub fn pass(_name: &'static str) {}

/// Passes the point called `name`, which is one of [`ALL`]. Does not return if it is this one's turn to kill, and not for
/// long if it is frozen.
#[cfg(feature = "kill-points")]
pub fn pass(name: &'static str) {
    use std::path::PathBuf;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// Which point kills, and at which passage.
    static KILLS: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let (name, passage) = armed("KILL_POINT")?;
        Some((name, passage.parse().expect("KILL_POINT is name:n")))
    });
    /// Which point freezes, and the file that says when.
    static FREEZES: LazyLock<Option<(String, PathBuf)>> =
        LazyLock::new(|| armed("FREEZE_POINT").map(|(name, file)| (name, file.into())));
    static PASSED: AtomicU64 = AtomicU64::new(0);

    assert!(ALL.contains(&name), "{name} is missing in the list of kill points");
    if let Some((frozen, file)) = &*FREEZES {
        while frozen == name && file.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let Some((armed, passage)) = &*KILLS else { return };
    if armed != name || PASSED.fetch_add(1, Ordering::SeqCst) + 1 != *passage {
        return;
    }
    // SAFETY: neither call has preconditions. The signal cannot be caught, so nothing of this process runs on.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    loop {
        std::thread::park();
    }
}

/// The point that an environment variable names, and what stands behind the colon.
#[cfg(feature = "kill-points")]
fn armed(variable: &str) -> Option<(String, String)> {
    let value = std::env::var(variable).ok()?;
    let (name, rest) = value.split_once(':').unwrap_or_else(|| panic!("{variable} is name:…"));
    assert!(ALL.contains(&name), "{variable}: there is no {name}");
    Some((name.to_owned(), rest.to_owned()))
}
