//! Why a batch was refused, and what each protocol answers then: one table.

/// Why a batch was refused. Also the `reason` label of `ringtail_ingest_rejected_batches_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RejectReason {
    /// It does not decode.
    BadRequest,
    /// More bytes than `ingest.batch_bytes_max`.
    TooLarge,
    /// More events than `ingest.batch_events_max`.
    TooManyEvents,
    /// Too many bytes wait for their commit.
    Overloaded,
    /// The log is full.
    Full,
    /// Ringtail is stopping.
    Stopping,
    /// The log failed; the process is about to end.
    LogFailed,
}

impl RejectReason {
    /// Every reason.
    pub const ALL: [RejectReason; 7] = [
        RejectReason::BadRequest,
        RejectReason::TooLarge,
        RejectReason::TooManyEvents,
        RejectReason::Overloaded,
        RejectReason::Full,
        RejectReason::Stopping,
        RejectReason::LogFailed,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            RejectReason::BadRequest => "bad_request",
            RejectReason::TooLarge => "too_large",
            RejectReason::TooManyEvents => "too_many_events",
            RejectReason::Overloaded => "overloaded",
            RejectReason::Full => "full",
            RejectReason::Stopping => "stopping",
            RejectReason::LogFailed => "log_failed",
        }
    }
}
