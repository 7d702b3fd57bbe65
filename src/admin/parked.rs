//! Parked events as JSON lines: the same for the control socket and for a store that is read offline.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::forward::ParkReason;

/// Parked events, oldest first. An event that cannot be read is an error of its own and need not end them.
pub type ParkedEvents = Box<dyn Iterator<Item = Result<Map<String, Value>, ParkedReadError>> + Send>;

/// Ids and reasons of parked events, oldest first.
pub type ParkedReasons = Box<dyn Iterator<Item = (u64, &'static str)> + Send>;

/// A parked event cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot read a parked event: {message}")]
pub struct ParkedReadError {
    /// The store's words.
    pub message: String,
}

/// Which parked events are wanted, and how much of each. Also the query of `/parked`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParkedFilter {
    /// Only of this topic.
    pub topic: Option<String>,
    /// Only for this reason.
    pub reason: Option<ParkReason>,
    /// Only with ids from here on.
    pub from_id: u64,
    /// At most so many.
    pub limit: Option<usize>,
    /// Without payloads, but with their size as `payload_bytes`.
    pub summary: bool,
}

impl ParkedFilter {
    /// The query of `/parked` that asks for this.
    pub fn to_query(&self) -> String {
        let mut query = format!("from_id={}&summary={}", self.from_id, self.summary);
        if let Some(topic) = &self.topic {
            query.push_str("&topic=");
            query.extend(topic.bytes().map(escape));
        }
        if let Some(reason) = self.reason {
            query.push_str(&format!("&reason={}", reason.as_str()));
        }
        if let Some(limit) = self.limit {
            query.push_str(&format!("&limit={limit}"));
        }
        query
    }

    /// The wanted ones of `events`, each as one line of JSON with its line break. An event that cannot be read is a line
    /// `{"damaged": "…"}`.
    pub fn lines(self, events: ParkedEvents) -> impl Iterator<Item = Vec<u8>> + Send {
        let limit = self.limit.unwrap_or(usize::MAX);
        let wanted = move |event: &Map<String, Value>| {
            let is = |field: &str, wanted: Option<&str>| {
                wanted.is_none_or(|wanted| event.get(field).and_then(Value::as_str) == Some(wanted))
            };
            is("topic", self.topic.as_deref()) && is("reason", self.reason.map(ParkReason::as_str))
        };
        let events = events.filter(move |event| event.as_ref().map_or(true, &wanted)).take(limit);
        events.map(move |event| match event {
            Ok(event) if self.summary => line(summary(event)),
            Ok(event) => line(event),
            Err(error) => line(Map::from_iter([("damaged".into(), error.message.into())])),
        })
    }
}

fn summary(mut event: Map<String, Value>) -> Map<String, Value> {
    let payload = event.remove("payload");
    event.insert("payload_bytes".into(), base64_bytes(payload.as_ref().and_then(Value::as_str)).into());
    event
}

fn line(event: Map<String, Value>) -> Vec<u8> {
    let mut line = serde_json::to_vec(&event).expect("a JSON object has a text");
    line.push(b'\n');
    line
}

/// Bytes behind padded base64.
fn base64_bytes(text: Option<&str>) -> usize {
    let text = text.unwrap_or_default();
    text.len() / 4 * 3 - text.bytes().rev().take_while(|byte| *byte == b'=').count()
}

fn escape(byte: u8) -> String {
    let plain = byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    if plain { char::from(byte).into() } else { format!("%{byte:02X}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn events() -> ParkedEvents {
        let event = |id: u64, topic: &str, reason: &str, payload: &str| {
            let event = json!({"id": id, "topic": topic, "reason": reason, "payload": payload});
            Ok(event.as_object().unwrap().clone())
        };
        let broken = ParkedReadError { message: "damaged".into() };
        Box::new(
            vec![
                event(1, "a", "too_large", "aGVsbG8="),
                event(2, "b", "too_large", ""),
                Err(broken),
                event(4, "a", "invalid_topic", "aGVsbG8h"),
            ]
            .into_iter(),
        )
    }

    fn ids(filter: ParkedFilter) -> Vec<Option<u64>> {
        let id = |line: Vec<u8>| serde_json::from_slice::<Value>(&line).unwrap()["id"].as_u64();
        filter.lines(events()).map(id).collect()
    }

    #[test]
    fn filters_combine_and_errors_stay() {
        assert_eq!(ids(ParkedFilter::default()), [Some(1), Some(2), None, Some(4)]);
        assert_eq!(ids(ParkedFilter { topic: Some("a".into()), ..Default::default() }), [Some(1), None, Some(4)]);
        let reason = Some(ParkReason::TooLarge);
        assert_eq!(ids(ParkedFilter { reason, limit: Some(2), ..Default::default() }), [Some(1), Some(2)]);
        assert_eq!(ids(ParkedFilter { reason, topic: Some("b".into()), ..Default::default() }), [Some(2), None]);
    }

    #[test]
    fn a_summary_has_sizes_instead_of_payloads() {
        let lines = ParkedFilter { summary: true, ..Default::default() }.lines(events());
        let sizes: Vec<_> = lines
            .map(|line| serde_json::from_slice::<Value>(&line).unwrap())
            .filter(|event| event.get("damaged").is_none())
            .inspect(|event| assert!(event.get("payload").is_none()))
            .map(|event| event["payload_bytes"].as_u64().unwrap())
            .collect();
        assert_eq!(sizes, [5, 0, 6]);
    }

    #[test]
    fn the_query_comes_back() {
        let filter = ParkedFilter {
            topic: Some("a&b=ü %s".into()),
            reason: Some(ParkReason::NotAuthorised),
            from_id: 7,
            limit: Some(3),
            summary: true,
        };
        for filter in [filter, ParkedFilter::default()] {
            let uri = format!("/parked?{}", filter.to_query()).parse().unwrap();
            let query = axum::extract::Query::<ParkedFilter>::try_from_uri(&uri).unwrap();
            assert_eq!(query.0, filter);
        }
    }
}
