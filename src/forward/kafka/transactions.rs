//! Kafka transactions, and the cursors that they carry: records in a compacted topic, one key for each.
//!
//! Every call waits for the broker at most as long as it is told, and can be repeated until it is done.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::{ClientContext, DefaultClientContext};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::Producer as _;
use rdkafka::{Message, Offset, TopicPartitionList};
use tracing::debug;

use super::{Producer, Properties};

/// Properties of the producer that a consumer needs as well.
const CONNECTION_PREFIXES: &[&str] = &[
    "bootstrap.servers",
    "client.",
    "security.",
    "sasl.",
    "ssl.",
    "enable.ssl.",
    "socket.",
    "broker.",
    "reconnect.",
    "debug",
];

/// Longest wait for the end of somebody's transaction, at one go.
const OPEN_TRANSACTION_PATIENCE: Duration = Duration::from_millis(500);

/// A client whose errors are returned, and not logged as well.
struct Quiet;

impl ClientContext for Quiet {
    fn error(&self, error: KafkaError, reason: &str) {
        debug!(%error, "kafka client that reads cursors: {reason}");
    }

    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        debug!(facility, "kafka client that reads cursors: {message}");
    }
}

impl ConsumerContext for Quiet {}

/// Why a step of a transaction is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::forward) enum TransactionError {
    /// Not yet: repeat the call.
    #[error("{0}")]
    Retry(String),
    /// The transaction must be aborted.
    #[error("{0}")]
    Abort(String),
    /// Another producer with the same id has taken over.
    #[error("{0}")]
    Fenced(String),
    /// The producer must be replaced.
    #[error("{0}")]
    Fatal(String),
}

impl From<KafkaError> for TransactionError {
    fn from(error: KafkaError) -> TransactionError {
        let message = error.to_string();
        let code = error.rdkafka_error_code();
        let is_fenced = matches!(code, Some(RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced));
        match error {
            _ if is_fenced => TransactionError::Fenced(message),
            KafkaError::Transaction(error) if error.is_fatal() => TransactionError::Fatal(message),
            KafkaError::Transaction(error) if error.txn_requires_abort() => TransactionError::Abort(message),
            KafkaError::Transaction(error) if error.is_retriable() => TransactionError::Retry(message),
            KafkaError::Flush(_) => TransactionError::Retry(message),
            _ => TransactionError::Fatal(message),
        }
    }
}

impl Producer {
    /// Makes every earlier producer with the same transactional id powerless. Before anything else.
    pub(in crate::forward) fn init_transactions(&self, timeout: Duration) -> Result<(), TransactionError> {
        if !self.has_id.get() {
            self.client.init_transactions(timeout)?;
            self.has_id.set(true);
        }
        Ok(())
    }

    /// Begins a transaction.
    pub(in crate::forward) fn begin(&self) -> Result<(), TransactionError> {
        Ok(self.client.begin_transaction()?)
    }

    /// Commits it. Everything sent must have been reported.
    pub(in crate::forward) fn commit(&self, timeout: Duration) -> Result<(), TransactionError> {
        Ok(self.client.commit_transaction(timeout)?)
    }

    /// Aborts it. Everything sent must have been reported: librdkafka may break otherwise.
    pub(in crate::forward) fn abort(&self, timeout: Duration) -> Result<(), TransactionError> {
        Ok(self.client.abort_transaction(timeout)?)
    }

    /// Whether the fatal error of this producer is that another one has taken over.
    pub(in crate::forward) fn is_fenced(&self) -> bool {
        let fatal = self.client.client().fatal_error();
        fatal.is_some_and(|(code, _)| matches!(code, RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced))
    }
}

/// Reads the committed values in `topic` whose keys are `id`, or begin with it and a slash; by what follows. The topic is
/// made if it is not there.
///
/// # Errors
/// The broker's or the client's words; try again.
pub(in crate::forward) fn read_cursors(
    properties: &Properties,
    topic: &str,
    id: &str,
    timeout: Duration,
) -> Result<HashMap<String, Vec<u8>>, String> {
    let deadline = Instant::now() + timeout;
    let mut config: ClientConfig = properties
        .iter()
        .filter(|(name, _)| CONNECTION_PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
        .cloned()
        .collect();
    let consumer = |isolation: &str| -> Result<BaseConsumer<Quiet>, String> {
        let mut config = config.clone();
        config.set("group.id", id).set("enable.auto.commit", "false").set("enable.partition.eof", "true");
        config.set("isolation.level", isolation).create_with_context(Quiet).map_err(|error| error.to_string())
    };
    let everything = consumer("read_uncommitted")?;
    let consumer = consumer("read_committed")?;
    let metadata = consumer.fetch_metadata(Some(topic), timeout).map_err(|error| error.to_string())?;
    let partitions: Vec<i32> = metadata
        .topics()
        .iter()
        .filter(|found| found.name() == topic && found.error().is_none())
        .flat_map(|found| found.partitions().iter().map(|partition| partition.id()))
        .collect();
    if partitions.is_empty() {
        make_compacted(&mut config, topic, timeout)?;
        return Err(format!("{topic} is being made"));
    }
    // A reader of what is committed stops before the oldest open transaction, whoever has it; what is committed behind that
    // it does not see.
    for partition in &partitions {
        let end = |consumer: &BaseConsumer<Quiet>| {
            let ends = consumer.fetch_watermarks(topic, *partition, timeout);
            ends.map(|(_, end)| end).map_err(|error| error.to_string())
        };
        let needed = end(&everything)?;
        let open_until = Instant::now() + OPEN_TRANSACTION_PATIENCE;
        while end(&consumer)? < needed {
            if Instant::now() >= open_until {
                return Err(format!("a transaction in {topic} is not finished"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let mut assignment = TopicPartitionList::new();
    for partition in &partitions {
        assignment.add_partition_offset(topic, *partition, Offset::Beginning).map_err(|error| error.to_string())?;
    }
    consumer.assign(&assignment).map_err(|error| error.to_string())?;
    let (mut open, mut values) = (partitions, HashMap::new());
    while !open.is_empty() {
        if Instant::now() >= deadline {
            return Err(format!("{topic} cannot be read in time: is it compacted?"));
        }
        match consumer.poll(Duration::from_millis(100)) {
            None => {}
            Some(Err(KafkaError::PartitionEOF(ended))) => open.retain(|partition| *partition != ended),
            Some(Err(error)) => return Err(error.to_string()),
            Some(Ok(message)) => {
                let key = message.key().and_then(|key| std::str::from_utf8(key).ok());
                let name =
                    key.and_then(|key| key.strip_prefix(id)).filter(|rest| rest.is_empty() || rest.starts_with('/'));
                if let Some(name) = name {
                    values.insert(
                        name.trim_start_matches('/').to_owned(),
                        message.payload().unwrap_or_default().to_vec(),
                    );
                }
            }
        }
    }
    Ok(values)
}

fn make_compacted(config: &mut ClientConfig, topic: &str, timeout: Duration) -> Result<(), String> {
    let admin: AdminClient<DefaultClientContext> = config.create().map_err(|error| error.to_string())?;
    // One value a commit interval and host: what is not compacted yet is read by every start.
    let new = NewTopic::new(topic, 1, TopicReplication::Fixed(-1))
        .set("cleanup.policy", "compact")
        .set("segment.ms", "600000")
        .set("segment.bytes", "1048576")
        .set("min.cleanable.dirty.ratio", "0.1");
    let options = AdminOptions::new().operation_timeout(Some(timeout)).request_timeout(Some(timeout));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    let results = runtime.block_on(admin.create_topics([&new], &options)).map_err(|error| error.to_string())?;
    for result in results {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((_, code)) => return Err(format!("{topic} cannot be made: {code}")),
        }
    }
    Ok(())
}
