//! Where an event goes: its topic, from the pattern and the event's type, and its record key.

use crate::batch::{Client, Request};
use crate::config::RecordKey;

/// Longest name that Kafka takes for a topic, in bytes.
const TOPIC_BYTES_MAX: usize = 249;

/// The routing rules of `[forward]`.
#[derive(Debug, Clone)]
pub(super) struct Router {
    before: Box<str>,
    /// What follows the event's type; none when the pattern has no place for it.
    after: Option<Box<str>>,
    record_key: RecordKey,
}

impl Router {
    /// Splits `pattern` at its first `%s`.
    pub(super) fn new(pattern: &str, record_key: RecordKey) -> Router {
        match pattern.split_once("%s") {
            Some((before, after)) => Router { before: before.into(), after: Some(after.into()), record_key },
            None => Router { before: pattern.into(), after: None, record_key },
        }
    }

    /// The topic of events of `event_type`, whether Kafka takes such a name or not.
    pub(super) fn topic(&self, event_type: &str) -> String {
        match &self.after {
            Some(after) => [&self.before, event_type, after].concat(),
            None => self.before.to_string(),
        }
    }

    /// What tells topics apart: the event's type, or nothing when all share one topic.
    pub(super) fn lane_name<'a>(&self, event_type: &'a str) -> &'a str {
        if self.after.is_some() { event_type } else { "" }
    }

    /// The record's key. What is empty makes no key: such events spread over the partitions, and have no order.
    pub(super) fn key<'a>(&self, client: &'a Client, request: &'a Request, event_type: &'a str) -> Option<&'a str> {
        let key = match self.record_key {
            RecordKey::ConnectionId => &client.id,
            RecordKey::Group => &client.group,
            RecordKey::EventType => event_type,
            RecordKey::ReqGuid => request.req_guid(),
            RecordKey::None => "",
        };
        (!key.is_empty()).then_some(key)
    }
}

/// Tells the topic of an event, to those who only want to know.
#[derive(Debug, Clone)]
pub struct Topics(Router);

impl Topics {
    /// The topics that `pattern` (`forward.topic`) makes.
    pub fn new(pattern: &str) -> Topics {
        Topics(Router::new(pattern, RecordKey::None))
    }

    /// The topic of events of `event_type`, whether Kafka takes such a name or not.
    pub fn topic(&self, event_type: &str) -> String {
        self.0.topic(event_type)
    }
}

/// Whether Kafka takes `name` for a topic.
pub(super) fn is_topic_name(name: &str) -> bool {
    (1..=TOPIC_BYTES_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn the_first_place_holder_is_replaced() {
        let router = Router::new("a-%s-%s", RecordKey::None);
        assert_eq!(router.topic("x"), "a-x-%s");
        assert_eq!(Router::new("clickstream-%s-log", RecordKey::None).topic(""), "clickstream--log");
        assert_eq!(Router::new("%s", RecordKey::None).topic("%s"), "%s");
        let one_topic = Router::new("all", RecordKey::None);
        assert_eq!(one_topic.topic("x"), "all");
        assert_eq!(one_topic.lane_name("x"), one_topic.lane_name("y"));
    }

    #[test]
    fn topic_names() {
        for name in ["a", "A.b_c-9", "...", &"x".repeat(249)] {
            assert!(is_topic_name(name), "{name}");
        }
        for name in ["", ".", "..", "a b", "a/b", "ä", "a\0", "%s", &"x".repeat(250)] {
            assert!(!is_topic_name(name), "{name}");
        }
    }

    #[test]
    fn keys() {
        let client = Client { group: "g".into(), id: "i".into() };
        let nobody = Client { group: "g".into(), id: "".into() };
        let request = Request::parse(Bytes::from_static(b"\x0a\x02rq")).unwrap();
        let key = |record_key, client| Router::new("%s", record_key).key(client, &request, "t");
        assert_eq!(key(RecordKey::ConnectionId, &client), Some("i"));
        assert_eq!(key(RecordKey::ConnectionId, &nobody), None);
        assert_eq!(key(RecordKey::Group, &client), Some("g"));
        assert_eq!(key(RecordKey::EventType, &client), Some("t"));
        assert_eq!(key(RecordKey::ReqGuid, &client), Some("rq"));
        assert_eq!(key(RecordKey::None, &client), None);
    }
}
