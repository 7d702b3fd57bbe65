//! Which batches and events of the log are wanted.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringtail::batch::{Batch, Event, Request};
use ringtail::forward::Topics;

/// Filters. Those of different kinds must all hold; of several of the same kind one must.
#[derive(Debug, Default, clap::Args)]
pub struct FilterArgs {
    /// Only events for this topic
    #[arg(long)]
    topic: Vec<String>,
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Vec<String>,
    /// Only batches of this group
    #[arg(long)]
    group: Vec<String>,
    /// Only batches received at this time or later: 2026-01-31T12:00:00Z, or how long ago: 2h
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    from: Option<SystemTime>,
    /// Only batches received before this time
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<SystemTime>,
    /// Only batches from this sequence on, delivered ones that are still on disk included
    #[arg(long, value_name = "N")]
    pub from_sequence: Option<u64>,
    /// Only batches up to this sequence
    #[arg(long, value_name = "N")]
    pub until_sequence: Option<u64>,
}

impl FilterArgs {
    /// What is wanted of a batch; none if nothing is.
    pub fn apply(&self, sequence: u64, batch: &Batch, topics: &Topics) -> Option<Batch> {
        let received_at = UNIX_EPOCH + Duration::from_millis(batch.received_at_ms);
        let wanted = (self.group.is_empty() || self.group.iter().any(|group| **group == *batch.client.group))
            && self.from.is_none_or(|from| received_at >= from)
            && self.until.is_none_or(|until| received_at < until)
            && self.from_sequence.is_none_or(|from| sequence >= from)
            && self.until_sequence.is_none_or(|until| sequence <= until);
        if !wanted {
            return None;
        }
        if self.topic.is_empty() && self.event_type.is_empty() {
            return Some(batch.clone());
        }
        let request = self.events(&batch.request, topics);
        (request.event_count() > 0).then(|| Batch { request, ..batch.clone() })
    }

    fn events(&self, request: &Request, topics: &Topics) -> Request {
        request.retain(|Event { event_type, .. }| {
            (self.event_type.is_empty() || self.event_type.iter().any(|wanted| wanted == event_type))
                && (self.topic.is_empty() || self.topic.contains(&topics.topic(event_type)))
        })
    }
}

/// A time, or how long ago it was.
pub(in crate::cli) fn parse_time(text: &str) -> Result<SystemTime, String> {
    if let Ok(time) = humantime::parse_rfc3339_weak(text) {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text.strip_suffix("ago").unwrap_or(text).trim_end());
    let time = ago.ok().and_then(|ago| SystemTime::now().checked_sub(ago));
    time.ok_or_else(|| "give a time (2026-01-31T12:00:00Z) or how long ago it was (2h, 30m ago)".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let at = |text: &str| parse_time(text).unwrap();
        assert_eq!(at("1970-01-01T00:01:00Z"), UNIX_EPOCH + Duration::from_secs(60));
        assert_eq!(at("1970-01-01 00:01:00"), UNIX_EPOCH + Duration::from_secs(60));
        for text in ["2h", "2h ago", "1h 60m ago"] {
            let ago = SystemTime::now().duration_since(at(text)).unwrap();
            assert!(ago > Duration::from_secs(7100) && ago < Duration::from_secs(7300), "{text}: {ago:?}");
        }
        for text in ["", "ago", "yesterday", "99999999999999years"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
