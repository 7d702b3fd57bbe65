//! What a repair does to an open log: looks at the segments that were set aside, strikes what was recovered off the
//! ledger of losses, and removes a segment that nobody wants any more.
//!
//! For a log that is open for the repair alone: a reader that finds losses meanwhile would write them down again.

use super::Wal;
use super::carved::{Run, Runs};
use super::error::StoreError;
use super::losses::{self, Loss};
use super::offline::{self, SegmentFiles};

impl Wal {
    /// The segments that were set aside, by number.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn quarantined(&self) -> Result<Vec<SegmentFiles>, StoreError> {
        offline::quarantined(&self.shared.config.directory)
    }

    /// The ledger of losses, by sequence.
    pub fn losses(&self) -> Vec<Loss> {
        self.shared.log().losses.values().copied().collect()
    }

    /// Strikes single records off the ledger of losses: they are in the log again. What is left of a loss stays there. Durable on
    /// return.
    ///
    /// # Errors
    /// [`StoreError`]: some of them may still stand there.
    pub fn recovered(&self, records: &[Run]) -> Result<(), StoreError> {
        self.strike_off(|loss| Some(rest_of(loss, records)).filter(|rest| rest != &[*loss]))
    }

    /// Whether a segment is in the log, and not set aside.
    pub fn holds_segment(&self, id: u64) -> bool {
        self.shared.log().segments.contains_key(&id)
    }

    /// Strikes losses off the ledger for which nothing more can be done: the operator has decided. Durable on return.
    ///
    /// # Errors
    /// [`StoreError`]: some of them may still stand there.
    pub fn write_off(&self, losses: &[Loss]) -> Result<(), StoreError> {
        self.strike_off(|loss| losses.contains(loss).then(Vec::new))
    }

    /// Removes a segment that was set aside, for good.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn discard(&self, segment: &SegmentFiles) -> Result<(), StoreError> {
        assert!(segment.quarantined, "a segment in use is not discarded");
        std::fs::remove_dir_all(&segment.path).map_err(StoreError::io("remove segment"))?;
        let space = self.shared.store.space()?;
        self.shared.log().space = space;
        Ok(())
    }

    /// Replaces losses by what is left of them, if `rest` says so.
    fn strike_off(&self, rest: impl Fn(&Loss) -> Option<Vec<Loss>>) -> Result<(), StoreError> {
        let meta = &*self.shared.meta;
        for loss in self.losses() {
            let Some(rest) = rest(&loss) else { continue };
            // In this order: a loss that stands there twice is better than one that stands nowhere.
            rest.iter().try_for_each(|rest| losses::put(meta, rest))?;
            if rest.iter().all(|rest| rest.first_sequence != loss.first_sequence) {
                losses::remove(meta, &loss)?;
            }
            let mut log = self.shared.log();
            log.losses.remove(&loss.first_sequence);
            log.losses.extend(rest.into_iter().map(|rest| (rest.first_sequence, rest)));
        }
        meta.sync()
    }
}

/// What is left of a loss without `records`. Events of what is left before the first of them and after the last are known as
/// a sum only: if there are both, they are shared out by the number of batches.
fn rest_of(loss: &Loss, records: &[Run]) -> Vec<Loss> {
    let within = |run: &&Run| run.first.sequence >= loss.first_sequence && run.end.sequence <= loss.end_sequence;
    let runs: Runs = records.iter().filter(within).copied().collect();
    let runs: Vec<&Run> = runs.iter().collect();
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return vec![*loss] };
    let between = last.end.events - first.first.events;
    let outside = loss.events.saturating_sub(between);
    let (batches_before, batches_after) =
        (first.first.sequence - loss.first_sequence, loss.end_sequence - last.end.sequence);
    let share = u128::from(outside) * u128::from(batches_before);
    let events_before = share.checked_div(u128::from(batches_before + batches_after)).unwrap_or(0) as u64;
    let part = |first_sequence, end_sequence, events| Loss { first_sequence, end_sequence, events, ..*loss };
    let mut rest = vec![part(loss.first_sequence, first.first.sequence, events_before)];
    for pair in runs.windows(2) {
        let (from, to) = (pair[0].end, pair[1].first);
        rest.push(part(from.sequence, to.sequence, to.events - from.events));
    }
    rest.push(part(last.end.sequence, loss.end_sequence, outside - events_before));
    rest.retain(|rest| rest.first_sequence < rest.end_sequence);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::record::Totals;

    /// Two events a batch.
    fn run(first: u64, end: u64) -> Run {
        let at = |sequence| Totals { sequence, events: 2 * sequence, bytes: 9 * sequence };
        Run { first: at(first), end: at(end) }
    }

    #[test]
    fn what_is_left_of_a_loss_keeps_its_events() {
        let loss = Loss { first_sequence: 10, end_sequence: 20, events: 20, segment: 3, found_at_ms: 7 };
        let rest = |runs: &[(u64, u64)]| -> Vec<(u64, u64, u64)> {
            // Record by record, as they come.
            let records = runs.iter().flat_map(|(first, end)| (*first..*end).map(|at| run(at, at + 1)));
            let rest = rest_of(&loss, &records.collect::<Vec<_>>());
            rest.iter().map(|loss| (loss.first_sequence, loss.end_sequence, loss.events)).collect()
        };
        assert_eq!(rest(&[]), [(10, 20, 20)]);
        assert_eq!(rest(&[(10, 20)]), []);
        assert_eq!(rest(&[(5, 12), (18, 40)]), [(12, 18, 12)], "what stands in other losses");
        assert_eq!(rest(&[(10, 12)]), [(12, 20, 16)]);
        assert_eq!(rest(&[(18, 20)]), [(10, 18, 16)]);
        assert_eq!(rest(&[(12, 14)]), [(10, 12, 4), (14, 20, 12)]);
        assert_eq!(rest(&[(10, 12), (13, 16), (19, 20)]), [(12, 13, 2), (16, 19, 6)]);
        // The sum of both ends is shared out.
        assert_eq!(rest(&[(11, 13), (15, 16)]), [(10, 11, 2), (13, 15, 4), (16, 20, 8)]);
    }
}
