//! The Kafka client: nothing else in the program imports rdkafka.
//!
//! One idempotent librdkafka producer, polled by the forward thread alone; librdkafka's callbacks run inside
//! [`Producer::poll`] and leave what they have to say in an [`Inbox`]. librdkafka copies each event and retries for ever
//! what may succeed (`message.timeout.ms = 0`), in order per partition. What comes back as failed was therefore refused.
//!
//! Two traps of `BaseProducer::poll`: it waits for its whole timeout even when events arrive, and spins for the last
//! millisecond of it; and with no timeout it serves a single event (which may report thousands of messages).

mod transactions;

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header as KafkaHeader, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext};
use serde::Deserialize;
use tracing::{debug, info, warn};

pub(super) use transactions::{TransactionError, read_cursors};

use super::FailureReason;
use super::backoff::LogLimit;

/// Most reports taken from librdkafka before they are worked on.
const REPORTS_MAX: usize = 64 * 1024;

/// One line per kind of librdkafka message in so long.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Kinds that are told apart.
const KINDS_MAX: usize = 64;

/// librdkafka's properties, by name.
pub(super) type Properties = Vec<(String, String)>;

/// Why librdkafka or the broker refused one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failure(RDKafkaErrorCode);

impl Failure {
    /// What the forwarder makes of it.
    pub(super) fn reason(self) -> FailureReason {
        use RDKafkaErrorCode as Code;
        match self.0 {
            Code::MessageSizeTooLarge | Code::MessageBatchTooLarge => FailureReason::TooLarge,
            // An invalid topic is one that the broker will not create, for example beside a name too much like it.
            Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition | Code::InvalidTopic => {
                FailureReason::UnknownTopic
            }
            Code::TopicAuthorizationFailed => FailureReason::NotAuthorised,
            // The second says that another record of its batch was invalid: sent alone, it is not seen again.
            Code::InvalidRecord | Code::InvalidDifferentRecord | Code::InvalidTimestamp => FailureReason::InvalidRecord,
            Code::Fatal => FailureReason::ProducerFatal,
            _ => FailureReason::Other,
        }
    }

    /// The event could not even be read.
    pub(super) fn unreadable() -> Failure {
        Failure(RDKafkaErrorCode::Fail)
    }

    /// The client gave it back, or did not take it, because its transaction has failed for another reason.
    pub(super) fn is_consequence(self) -> bool {
        matches!(self.0, RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight | RDKafkaErrorCode::State)
    }

    /// It says nothing of the event or its topic.
    pub(super) fn is_circumstantial(self) -> bool {
        matches!(self.reason(), FailureReason::Other | FailureReason::ProducerFatal)
    }

    /// A failure of that kind.
    #[cfg(test)]
    pub(super) fn of(reason: FailureReason) -> Failure {
        Failure(match reason {
            FailureReason::TooLarge => RDKafkaErrorCode::MessageSizeTooLarge,
            FailureReason::UnknownTopic => RDKafkaErrorCode::UnknownTopic,
            FailureReason::NotAuthorised => RDKafkaErrorCode::TopicAuthorizationFailed,
            FailureReason::InvalidRecord => RDKafkaErrorCode::InvalidRecord,
            FailureReason::ProducerFatal => RDKafkaErrorCode::Fatal,
            FailureReason::Other => RDKafkaErrorCode::NetworkException,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why there is no producer: librdkafka's own words.
#[derive(Debug, thiserror::Error)]
#[error("{}{message}", property.as_ref().map(|name| format!("\"{name}\": ")).unwrap_or_default())]
pub struct ProducerError {
    /// The property that it does not take, if it names one.
    pub property: Option<String>,
    /// What is wrong.
    pub message: String,
}

/// An event that librdkafka reports.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reported {
    /// As it was sent with.
    pub(super) tag: usize,
    /// Its size.
    pub(super) payload_bytes: u32,
}

/// What librdkafka reported since the last poll.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Delivered events.
    pub(super) delivered: Vec<Reported>,
    /// Failed ones.
    pub(super) failed: Vec<(Reported, Failure)>,
    /// Brokers with a connection, by the newest statistics.
    pub(super) brokers_up: Option<u32>,
    /// librdkafka says that it has lost every broker.
    pub(super) all_brokers_down: bool,
    /// The newest error that is not about one event.
    pub(super) error: Option<String>,
    /// Topics that the broker did not let into the transaction.
    pub(super) refused_topics: Vec<(String, Failure)>,
    /// Callbacks so far.
    served: usize,
}

impl Inbox {
    /// Empties it, and keeps its memory.
    pub(super) fn clear(&mut self) {
        self.delivered.clear();
        self.failed.clear();
        self.refused_topics.clear();
        (self.brokers_up, self.all_brokers_down, self.error, self.served) = (None, false, None, 0);
    }
}

/// One librdkafka producer.
pub(super) struct Producer {
    client: BaseProducer<Context>,
    /// It has the transactional id: librdkafka does not let it be asked for twice.
    has_id: Cell<bool>,
}

impl Producer {
    /// Starts librdkafka. It connects by itself, in the background.
    ///
    /// # Errors
    /// When it does not take the properties or cannot start its threads.
    pub(super) fn new(properties: &Properties) -> Result<Producer, ProducerError> {
        let mut config: ClientConfig = properties.iter().cloned().collect();
        let debug = properties.iter().any(|(name, _)| name == "debug");
        config.set_log_level(if debug { RDKafkaLogLevel::Debug } else { RDKafkaLogLevel::Info });
        let client = config.create_with_context(Context::default()).map_err(|error| ProducerError::from(&error))?;
        Ok(Producer { client, has_id: Cell::new(false) })
    }

    /// Hands one event over. librdkafka copies it and will report `tag` exactly once.
    ///
    /// # Errors
    /// librdkafka refuses it on the spot, and `tag` will not be reported.
    pub(super) fn send(&self, topic: &str, key: Option<&str>, payload: &[u8], tag: usize) -> Result<(), Failure> {
        self.send_with(topic, key, payload, tag, None)
    }

    /// The same with headers, as (name, value).
    ///
    /// # Errors
    /// As [`Producer::send`].
    pub(super) fn send_with_headers<'a>(
        &self,
        topic: &str,
        key: Option<&str>,
        payload: &[u8],
        tag: usize,
        headers: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<(), Failure> {
        let add = |headers: Option<OwnedHeaders>, (key, value)| {
            Some(headers.unwrap_or_default().insert(KafkaHeader { key, value: Some(value) }))
        };
        self.send_with(topic, key, payload, tag, headers.fold(None, add))
    }

    fn send_with(
        &self,
        topic: &str,
        key: Option<&str>,
        payload: &[u8],
        tag: usize,
        headers: Option<OwnedHeaders>,
    ) -> Result<(), Failure> {
        let mut record = BaseRecord::<str, [u8], usize>::with_opaque_to(topic, tag).payload(payload);
        (record.key, record.headers) = (key, headers);
        self.client
            .send(record)
            .map_err(|(error, _)| Failure(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::InvalidArgument)))
    }

    /// Replaces `inbox` by what was reported since the last call, after `wait`.
    pub(super) fn poll(&self, wait: Duration, inbox: &mut Inbox) {
        inbox.clear();
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
        let context = self.client.context();
        loop {
            let before = context.inbox().served;
            self.client.poll(Duration::ZERO);
            let served = context.inbox().served;
            if served == before || served > REPORTS_MAX {
                break;
            }
        }
        std::mem::swap(inbox, &mut context.inbox());
    }

    /// The error that makes this producer useless, if there was one.
    pub(super) fn fatal_error(&self) -> Option<String> {
        self.client.client().fatal_error().map(|(_, message)| message)
    }
}

/// Tries `properties` on a producer that connects to nothing.
///
/// # Errors
/// librdkafka does not take them; the message names the property where librdkafka does.
pub(super) fn try_properties(properties: &Properties) -> Result<(), ProducerError> {
    let without_brokers = properties.iter().filter(|(name, _)| name != "bootstrap.servers").cloned().collect();
    Producer::new(&without_brokers).map(drop)
}

impl From<&KafkaError> for ProducerError {
    fn from(error: &KafkaError) -> ProducerError {
        let (property, message) = match error {
            KafkaError::ClientConfig(_, description, name, _) => (Some(name.clone()), description.clone()),
            KafkaError::ClientCreation(description) => (None, description.clone()),
            other => (None, other.to_string()),
        };
        ProducerError { property, message }
    }
}

/// What librdkafka calls back, always from inside a poll.
#[derive(Default)]
struct Context {
    inbox: Mutex<Inbox>,
    logged: Mutex<HashMap<String, LogLimit>>,
}

impl Context {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The inbox, in a callback.
    fn served(&self) -> MutexGuard<'_, Inbox> {
        let mut inbox = self.inbox();
        inbox.served += 1;
        inbox
    }

    /// Whether to log a message of that facility now: with how many like it were left out since the last one. What says
    /// something new is not left out.
    fn admit(&self, facility: &str, message: &str) -> Option<u64> {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = format!("{facility}: {}", gist(message));
        let kind = if logged.len() < KINDS_MAX || logged.contains_key(&kind) { kind } else { facility.to_owned() };
        logged.entry(kind).or_insert_with(|| LogLimit::new(LOG_INTERVAL)).admit(Instant::now())
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, tag: usize) {
        let mut inbox = self.served();
        let (Ok(message) | Err((_, message))) = result;
        let reported = Reported { tag, payload_bytes: message.payload_len() as u32 };
        match result {
            Ok(_) => inbox.delivered.push(reported),
            Err((error, _)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
                inbox.failed.push((reported, Failure(code)));
            }
        }
    }
}

impl ClientContext for Context {
    fn stats_raw(&self, statistics: &[u8]) {
        let mut inbox = self.served();
        match serde_json::from_slice::<Statistics>(statistics) {
            Ok(statistics) => inbox.brokers_up = Some(statistics.brokers_up()),
            Err(error) => debug!(%error, "kafka client statistics not understood"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(suppressed) = self.admit("error callback", reason) {
            warn!(%error, suppressed, "kafka client: {reason}");
        }
        let mut inbox = self.served();
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            // Not an error of its own: what made them go down tells more.
            inbox.all_brokers_down = true;
        } else {
            inbox.error = Some(reason.to_owned());
        }
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        drop(self.served());
        if matches!(level, RDKafkaLogLevel::Debug) {
            debug!(facility, "kafka client: {message}");
            return;
        }
        if facility == "REQTMOUT" {
            // The client breaks the connection then, without an error of its own.
            self.inbox().error = Some(message.to_owned());
        }
        if facility == "ADDPARTS" {
            self.inbox().refused_topics.extend(refused_topic(message));
        }
        let Some(suppressed) = self.admit(facility, message) else { return };
        match level {
            // It is tried again by itself; if that lasts, the forwarder says what waits for it.
            _ if facility == "GETPID" => info!(facility, suppressed, "kafka client: {message}"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info | RDKafkaLogLevel::Debug => {
                info!(facility, suppressed, "kafka client: {message}");
            }
            // Whatever it calls critical: the forwarder goes on, or says itself that it does not.
            _ => warn!(facility, suppressed, "kafka client: {message}"),
        }
    }
}

/// What a message of librdkafka's says, whichever broker it is about, and whatever was counted: `broker:9092/1: Connect to …
/// failed: Connection refused (after 0ms in state CONNECT, 3 identical …)` says "Connection refused".
fn gist(message: &str) -> String {
    let said = message.split(" (after ").next().unwrap_or_default();
    let said = said.rsplit(": ").next().unwrap_or_default();
    said.chars().filter(|letter| !letter.is_ascii_digit()).collect()
}

/// The topic that was not let into a transaction. librdkafka tells of it in its log alone: the events of every topic in the
/// transaction come back alike.
fn refused_topic(message: &str) -> Option<(String, Failure)> {
    let (topic, rest) = message.split_once("Failed to add partition \"")?.1.split_once('"')?;
    let error = rest.split_once("to transaction: ")?.1;
    let code = match error {
        _ if error.contains("Topic authorization failed") => RDKafkaErrorCode::TopicAuthorizationFailed,
        // Because of another partition; or of the producer.
        _ if error.contains("attempted") => return None,
        _ => RDKafkaErrorCode::Fail,
    };
    Some((topic.to_owned(), Failure(code)))
}

/// The little that is read of librdkafka's statistics.
#[derive(Deserialize)]
struct Statistics<'a> {
    #[serde(borrow, default)]
    brokers: HashMap<Cow<'a, str>, BrokerStatistics<'a>>,
}

#[derive(Deserialize)]
struct BrokerStatistics<'a> {
    #[serde(borrow)]
    state: Cow<'a, str>,
    #[serde(borrow)]
    nodename: Cow<'a, str>,
}

impl Statistics<'_> {
    /// A coordinator of transactions is listed apart, and is one of the brokers.
    fn brokers_up(&self) -> u32 {
        let up = self.brokers.values().filter(|broker| matches!(&*broker.state, "UP" | "REAUTH"));
        up.map(|broker| &*broker.nodename).collect::<HashSet<_>>().len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_for_the_brokers_that_are_up() {
        let json = br#"{"name":"x","brokers":{"a:1/1":{"name":"a","state":"UP","nodename":"a:1","rtt":{"min":1}},
            "b:1/2":{"state":"DOWN","nodename":"b:1"},"c:1/3":{"state":"REAUTH","nodename":"c:1"},
            "TxnCoordinator":{"state":"UP","nodename":"c:1"}},"topics":{"t":{"partitions":{}}}}"#;
        assert_eq!(serde_json::from_slice::<Statistics>(json).unwrap().brokers_up(), 2);
        assert_eq!(serde_json::from_slice::<Statistics>(b"{}").unwrap().brokers_up(), 0);
    }

    #[test]
    fn a_topic_that_is_kept_out_of_a_transaction_is_read_from_the_log() {
        let said = |error: &str| {
            let line =
                format!("[thrd:main]: TxnCoordinator/1: Failed to add partition \"a-b\" [0] to transaction: {error}");
            refused_topic(&line).map(|(topic, failure)| (topic, failure.reason()))
        };
        let refused = ("a-b".to_owned(), FailureReason::NotAuthorised);
        assert_eq!(said("Broker: Topic authorization failed"), Some(refused));
        assert_eq!(said("Broker: The server disconnected"), Some(("a-b".into(), FailureReason::Other)));
        assert_eq!(said("Broker: Operation not attempted"), None);
        assert_eq!(said("Broker: Producer attempted an operation with an old epoch"), None);
        assert_eq!(refused_topic("Disconnected"), None);
    }

    #[test]
    fn what_says_something_new_is_logged_at_once_and_the_same_again_is_not() {
        let context = Context::default();
        let refused =
            |ms: u32| format!("b:9092/1: Connect to ipv4#1 failed: Connection refused (after {ms}ms in state CONNECT)");
        assert_eq!(context.admit("FAIL", &refused(0)), Some(0));
        assert_eq!(context.admit("FAIL", &refused(17)), None);
        let expired =
            "b:9092/1: SSL handshake failed: error:0A000086: certificate verify failed: not verified (after 9ms in x)";
        assert_eq!(context.admit("FAIL", expired), Some(0));
        assert_eq!(context.admit("FAIL", &refused(3)), None);
        // However much there is to say, not all of it is kept.
        let lines = (0..1000).filter(|at| {
            let word: String = at.to_string().chars().map(|digit| char::from(b'a' + digit as u8 - b'0')).collect();
            context.admit("FAIL", &word).is_some()
        });
        assert_eq!(lines.count(), KINDS_MAX - 2 + 1);
    }

    #[test]
    fn every_failure_has_a_reason() {
        for reason in FailureReason::ALL {
            assert_eq!(Failure::of(reason).reason(), reason);
        }
    }
}
