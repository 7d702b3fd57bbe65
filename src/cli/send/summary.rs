//! What became of the events.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use ringtail::client::{NotAcked, Receipt, Sender};
use serde::Serialize;

use super::batching::Batch;
use super::input::ReadError;

/// Different errors that are told apart; further ones are counted as "other".
const ERRORS_MAX: usize = 16;

/// Counts of one run.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Batches acked.
    pub batches_acked: u64,
    /// Batches read and not acked, those in flight at an interruption included.
    pub batches_not_acked: u64,
    /// Events acked.
    pub events_acked: u64,
    /// Events read and not acked; each line that was too long is one.
    pub events_not_acked: u64,
    /// Bytes of the events acked.
    pub bytes_acked: u64,
    /// Tries beyond the first.
    pub retries: u64,
    /// Connections beyond the first.
    pub reconnects: u64,
    /// How long it took.
    pub seconds: f64,
    /// Why batches were not acked, with how many.
    pub errors: BTreeMap<String, u64>,
    /// Ctrl-C ended it: the rest of the input was not read.
    pub interrupted: bool,
    /// Some of the input was not read or not sent.
    pub incomplete: bool,
    #[serde(skip)]
    started: Instant,
}

impl Default for Summary {
    fn default() -> Self {
        Summary {
            batches_acked: 0,
            batches_not_acked: 0,
            events_acked: 0,
            events_not_acked: 0,
            bytes_acked: 0,
            retries: 0,
            reconnects: 0,
            seconds: 0.0,
            errors: BTreeMap::new(),
            interrupted: false,
            incomplete: false,
            started: Instant::now(),
        }
    }
}

impl Summary {
    /// A batch goes out: not acked until it is.
    pub fn sent(&mut self, batch: &Batch) {
        self.batches_not_acked += 1;
        self.events_not_acked += batch.request.events.len() as u64;
    }

    /// A batch is settled. `Break` if the server was out of reach for so long that the next batch need not be tried.
    pub fn settled(&mut self, batch: &Batch, outcome: Result<Receipt, NotAcked>) -> ControlFlow<()> {
        match outcome {
            Ok(_) => {
                let events = batch.request.events.len() as u64;
                self.batches_not_acked -= 1;
                self.batches_acked += 1;
                self.events_not_acked -= events;
                self.events_acked += events;
                self.bytes_acked += batch.bytes;
                ControlFlow::Continue(())
            }
            Err(not_acked) => {
                self.count_error(&not_acked.error);
                if not_acked.error.is_retryable() {
                    self.incomplete = true;
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            }
        }
    }

    /// A line, or the rest of the input, could not be read.
    pub fn failed_to_read(&mut self, error: &ReadError) {
        self.count_error(error);
        if error.is_one_line() {
            self.events_not_acked += 1;
        } else {
            self.incomplete = true;
        }
    }

    /// Nothing more will happen.
    pub fn finish(&mut self, sender: &Sender) {
        self.retries = sender.retries();
        self.reconnects = sender.reconnects();
        self.seconds = self.started.elapsed().as_secs_f64();
    }

    /// Whether the whole input was read and every event of it acked.
    pub fn all_acked(&self) -> bool {
        self.events_not_acked == 0 && !self.interrupted && !self.incomplete
    }

    fn count_error(&mut self, error: &(dyn std::error::Error + 'static)) {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        let room = self.errors.len() < ERRORS_MAX || self.errors.contains_key(&text);
        *self.errors.entry(if room { text } else { "other".into() }).or_default() += 1;
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let took = humantime::format_duration(Duration::from_millis((self.seconds * 1000.0) as u64));
        write!(
            f,
            "{} events acked in {} batches ({}), {took}",
            self.events_acked,
            self.batches_acked,
            bytesize::ByteSize(self.bytes_acked)
        )?;
        if self.retries > 0 || self.reconnects > 0 {
            write!(f, "; {} retries, {} reconnects", self.retries, self.reconnects)?;
        }
        if self.events_not_acked > 0 {
            write!(f, "\n{} events NOT acked", self.events_not_acked)?;
        }
        for (error, times) in &self.errors {
            write!(f, "\n  {times} × {error}")?;
        }
        if self.interrupted {
            write!(f, "\ninterrupted: the rest of the input was not read")?;
        } else if self.incomplete {
            write!(f, "\nstopped: the rest of the input was not sent")?;
        }
        Ok(())
    }
}
