//! What differs between two configurations, and what of it a running service can take over.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use toml::Value;

use super::{Config, keys};

/// What a reload changes in a running service, with everything below it. `ingest.batch_bytes_max` only up to what the
/// service began with: the Kafka client is set up for that.
const LIVE: [&str; 9] = [
    "ingest.connections_max",
    "ingest.batch_bytes_max",
    "ingest.batch_events_max",
    "ingest.connection_in_flight_batches_max",
    "ingest.connection_in_flight_bytes_max",
    "forward.topic",
    "forward.pace",
    "forward.stop_timeout",
    "log.level",
];

/// What a reload would do, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Can be taken over as they are.
    pub live: Vec<String>,
    /// Take effect at the next start.
    pub restart: Vec<String>,
}

impl Config {
    /// What a service that began with `began` and now runs with `self` does to become `new`.
    pub fn changes(&self, new: &Config, began: &Config) -> Changes {
        let (running, wanted) = (flat(self), flat(new));
        let mut changes = Changes::default();
        let all = running.keys().chain(wanted.keys().filter(|key| !running.contains_key(*key)));
        for key in all.filter(|key| running.get(*key) != wanted.get(*key)) {
            let beyond = key == "ingest.batch_bytes_max" && new.ingest.batch_bytes_max > began.ingest.batch_bytes_max;
            let list = if is_live(key) && !beyond { &mut changes.live } else { &mut changes.restart };
            list.push(key.clone());
        }
        changes
    }

    /// This configuration with what a running service can take over of `new`, and began with `began`.
    #[must_use]
    pub fn reloaded(&self, new: &Config, began: &Config) -> Config {
        let mut config = self.clone();
        config.ingest.connections_max = new.ingest.connections_max;
        if new.ingest.batch_bytes_max <= began.ingest.batch_bytes_max {
            config.ingest.batch_bytes_max = new.ingest.batch_bytes_max;
        }
        config.ingest.batch_events_max = new.ingest.batch_events_max;
        config.ingest.connection_in_flight_batches_max = new.ingest.connection_in_flight_batches_max;
        config.ingest.connection_in_flight_bytes_max = new.ingest.connection_in_flight_bytes_max;
        config.forward.topic.clone_from(&new.forward.topic);
        config.forward.pace = new.forward.pace.clone();
        config.forward.stop_timeout = new.forward.stop_timeout;
        config.log.level.clone_from(&new.log.level);
        config
    }
}

fn is_live(key: &str) -> bool {
    LIVE.iter().any(|live| key.strip_prefix(live).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

fn flat(config: &Config) -> BTreeMap<String, Value> {
    let mut values = BTreeMap::new();
    collect("", keys::to_table(config), &mut values);
    values
}

fn collect(prefix: &str, table: toml::Table, values: &mut BTreeMap<String, Value>) {
    for (name, value) in table {
        let key = keys::join(prefix, &name);
        match value {
            Value::Table(table) => collect(&key, table, values),
            value => {
                values.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytesize::ByteSize;

    use super::*;
    use crate::config::KafkaProperty;

    #[test]
    fn changes_are_live_or_want_a_restart() {
        let began = Config::default();
        assert_eq!(began.changes(&began, &began), Changes::default());
        let mut new = began.clone();
        new.ingest.connections_max += 1;
        new.ingest.batch_bytes_max = ByteSize::mib(8);
        new.forward.pace.events_per_second_max = 5;
        new.forward.topic = "t".into();
        new.forward.kafka.insert("linger.ms".into(), KafkaProperty::Integer(9));
        new.wal.directory = "/elsewhere".into();
        let changes = began.changes(&new, &began);
        assert_eq!(changes.live, ["forward.pace.events_per_second_max", "forward.topic", "ingest.connections_max"]);
        let reloaded = began.reloaded(&new, &began);
        assert_eq!(reloaded.changes(&new, &began), Changes { live: Vec::new(), ..changes.clone() });
        assert_eq!(changes.restart, ["ingest.batch_bytes_max", "wal.directory", "forward.kafka.linger.ms"]);
    }

    #[test]
    fn live_keys_exist() {
        let known = flat(&Config::default());
        for live in LIVE {
            assert!(known.keys().any(|key| key == live || key.starts_with(&format!("{live}."))), "{live}");
        }
    }
}
