//! Forward: replays the log into Kafka, in order, for ever.

/// Why a delivery attempt failed. Also the `reason` label of `ringtail_forward_delivery_failures_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureReason {
    /// The broker refused the size.
    TooLarge,
    /// The topic does not exist, or not yet.
    UnknownTopic,
    /// The topic may not be written.
    NotAuthorised,
    /// The broker refused the record.
    InvalidRecord,
    /// The producer itself broke and was rebuilt.
    ProducerFatal,
    /// Anything else.
    Other,
}

impl FailureReason {
    /// Every reason.
    pub const ALL: [FailureReason; 6] = [
        FailureReason::TooLarge,
        FailureReason::UnknownTopic,
        FailureReason::NotAuthorised,
        FailureReason::InvalidRecord,
        FailureReason::ProducerFatal,
        FailureReason::Other,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            FailureReason::TooLarge => "too_large",
            FailureReason::UnknownTopic => "unknown_topic",
            FailureReason::NotAuthorised => "not_authorised",
            FailureReason::InvalidRecord => "invalid_record",
            FailureReason::ProducerFatal => "producer_fatal",
            FailureReason::Other => "other",
        }
    }
}

/// Why an event was parked. Also the `reason` label of `ringtail_forward_parked_events_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParkReason {
    /// Too large for the broker even alone.
    TooLarge,
    /// The topic's name is not one that Kafka takes.
    InvalidTopic,
    /// The topic did not appear within `forward.topic_grace`.
    UnknownTopic,
    /// Writing the topic was not allowed within `forward.topic_grace`.
    NotAuthorised,
    /// The broker refused the record itself.
    InvalidRecord,
}

impl ParkReason {
    /// Every reason.
    pub const ALL: [ParkReason; 5] = [
        ParkReason::TooLarge,
        ParkReason::InvalidTopic,
        ParkReason::UnknownTopic,
        ParkReason::NotAuthorised,
        ParkReason::InvalidRecord,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ParkReason::TooLarge => "too_large",
            ParkReason::InvalidTopic => "invalid_topic",
            ParkReason::UnknownTopic => "unknown_topic",
            ParkReason::NotAuthorised => "not_authorised",
            ParkReason::InvalidRecord => "invalid_record",
        }
    }
}
