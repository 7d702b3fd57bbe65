//! What a check found, for people and programs.

use serde::{Deserialize, Serialize};

use crate::wal::Loss;

/// What a check found.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CheckReport {
    /// Segments of the log.
    pub segments: u64,
    /// Good chunks in them.
    pub chunks: u64,
    /// Batches in those, the ones already delivered included.
    pub batches: u64,
    /// Events in those.
    pub events: u64,
    /// First record not yet delivered; none if none was saved.
    pub cursor_sequence: Option<u64>,
    /// The next batch gets this sequence, or a later one.
    pub next_sequence: u64,
    /// What is wrong with files.
    pub problems: Vec<Problem>,
    /// Committed records, not yet delivered, that are not where they belong.
    pub missing: Vec<Missing>,
    /// The ledger of losses: what the service found missing.
    pub losses: Vec<LedgerEntry>,
    /// Segments that were set aside.
    pub quarantined: Vec<Quarantined>,
}

/// Something wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind of problem.
    pub kind: ProblemKind,
    /// The segment; none for what is not in one.
    pub segment: Option<u64>,
    /// The slot in it.
    pub slot: Option<u32>,
    /// The first sequence that the good chunks around it leave open; none if none is.
    pub first_sequence: Option<u64>,
    /// The last one.
    pub last_sequence: Option<u64>,
    /// More about it.
    pub detail: String,
}

/// Kinds of problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The file system does not give it back.
    Unreadable,
    /// The segment does not open.
    DoesNotOpen,
    /// The marker `READY` is not there, but the segment is needed.
    MarkerMissing,
    /// A slot does not hold what was written to it.
    DamagedChunk,
    /// The segment is not there.
    SegmentMissing,
    /// Chunks are gone without a trace, behind the last one that is good.
    ChunksMissing,
    /// The cursor and the ledger of losses cannot be read.
    MetaDamaged,
    /// Parked events cannot be read.
    ParkedDamaged,
    /// A small map was set aside.
    StateQuarantined,
}

/// Committed records that are not where they belong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The first of them.
    pub first_sequence: u64,
    /// The last of them.
    pub last_sequence: u64,
    /// Events in them.
    pub events: u64,
    /// How many of them can be carved out of a file.
    pub salvageable_batches: u64,
    /// The ledger of losses knows.
    pub in_ledger: bool,
}

/// An entry in the ledger of losses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// The loss.
    #[serde(flatten)]
    pub loss: Loss,
    /// How many of its batches can be carved out of a file.
    pub salvageable_batches: u64,
}

/// A segment that was set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// Its number.
    pub segment: u64,
    /// Batches that can be carved out of it.
    pub batches: u64,
    /// How many of those stand in the ledger of losses; the others were delivered before.
    pub lost_batches: u64,
    /// First sequence in it.
    pub first_sequence: Option<u64>,
    /// Last sequence in it.
    pub last_sequence: Option<u64>,
}

impl ProblemKind {
    /// Records may be missing because of it.
    pub(super) fn loses_records(self) -> bool {
        matches!(self, ProblemKind::Unreadable | ProblemKind::DoesNotOpen | ProblemKind::DamagedChunk)
    }
}

impl CheckReport {
    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty() && self.missing.is_empty() && self.losses.is_empty() && self.quarantined.is_empty()
    }
}

impl Problem {
    /// A problem of `kind` about no segment.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Problem {
        Problem { kind, segment: None, slot: None, first_sequence: None, last_sequence: None, detail: detail.into() }
    }
}
