//! Parked events that no forwarder has parked.

use ringtail::batch::Sequence;
use ringtail::forward::{ParkReason, ParkedAbout};

/// Why an event for `topic` would have been parked, and where it would have come from.
pub fn about(topic: &str, reason: ParkReason) -> ParkedAbout {
    ParkedAbout {
        reason,
        error: "said Kafka".into(),
        topic: topic.into(),
        key: None,
        event_type: "t".into(),
        group: String::new(),
        connection_id: "device-7".into(),
        req_guid: "r".into(),
        sequence: Sequence(3),
        received_at_ms: 1,
        parked_at_ms: 2,
        spill_number: None,
    }
}
