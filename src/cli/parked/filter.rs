//! Which parked events are wanted.

use std::time::{SystemTime, UNIX_EPOCH};

use ringtail::forward::{ParkReason, ParkedFilter};

use super::super::backlog::filter::parse_time;

/// Filters. Those of different kinds must all hold; of several of the same kind one must.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Filters (of different kinds all must hold, of several of one kind one)")]
pub struct FilterArgs {
    /// Only events for this topic
    #[arg(long)]
    topic: Vec<String>,
    /// Only events parked for this reason
    #[arg(long, value_parser = parse_reason)]
    reason: Vec<ParkReason>,
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Vec<String>,
    /// Only events of clients in this group
    #[arg(long)]
    group: Vec<String>,
    /// Only events of the client with this id
    #[arg(long, value_name = "ID")]
    connection_id: Vec<String>,
    /// Only events with this record key
    #[arg(long)]
    key: Vec<String>,
    /// Only events of batches from this sequence on
    #[arg(long, value_name = "N")]
    from_sequence: Option<u64>,
    /// Only events of batches up to this sequence
    #[arg(long, value_name = "N")]
    until_sequence: Option<u64>,
    /// Only events received at this time or later: 2026-01-31T12:00:00Z, or how long ago: 2h
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    from: Option<SystemTime>,
    /// Only events received before this time
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<SystemTime>,
    /// Only events parked at this time or later
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    parked_from: Option<SystemTime>,
    /// Only events parked before this time
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    parked_until: Option<SystemTime>,
    /// Only this event
    #[arg(long, value_name = "ID")]
    id: Vec<u64>,
    /// Only events with ids from here on
    #[arg(long, value_name = "ID")]
    from_id: Option<u64>,
    /// Only events with ids up to here
    #[arg(long, value_name = "ID")]
    until_id: Option<u64>,
    /// At most so many events, the oldest ones
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
}

impl FilterArgs {
    /// The same for the store.
    pub fn filter(self) -> ParkedFilter {
        ParkedFilter {
            topics: self.topic,
            reasons: self.reason,
            event_types: self.event_type,
            groups: self.group,
            connection_ids: self.connection_id,
            keys: self.key,
            from_sequence: self.from_sequence,
            until_sequence: self.until_sequence,
            received_from_ms: self.from.map(to_ms),
            received_until_ms: self.until.map(to_ms),
            parked_from_ms: self.parked_from.map(to_ms),
            parked_until_ms: self.parked_until.map(to_ms),
            ids: self.id.into_iter().collect(),
            from_id: self.from_id,
            until_id: self.until_id,
            limit: self.limit,
        }
    }
}

fn to_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn parse_reason(text: &str) -> Result<ParkReason, String> {
    let reason = ParkReason::ALL.into_iter().find(|reason| reason.as_str() == text);
    reason.ok_or_else(|| format!("one of {}", ParkReason::ALL.map(ParkReason::as_str).join(", ")))
}
