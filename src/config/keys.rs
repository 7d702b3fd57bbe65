//! The names of the configuration's keys, read off the serialised default, so that they are written down only once.
//!
//! A key is written with dots from the top: `ingest.http.listen`. Below [`KAFKA`] every name is allowed and may hold
//! dots itself: `forward.kafka.linger.ms`.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::Config;

/// The table whose keys are librdkafka's.
pub(super) const KAFKA: &str = "forward.kafka";

/// First part of the name of every environment variable that is read.
pub(super) const ENVIRONMENT_PREFIX: &str = "RINGTAIL_";

/// What a key holds: how text from the environment is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Integer,
    Flag,
    List,
}

/// Every known key and table.
pub(super) struct Keys {
    kinds: BTreeMap<String, Kind>,
    tables: BTreeSet<String>,
}

impl Keys {
    pub(super) fn new() -> Keys {
        let mut keys = Keys { kinds: BTreeMap::new(), tables: BTreeSet::from([String::new()]) };
        keys.collect("", &to_table(&Config::default()));
        keys
    }

    fn collect(&mut self, prefix: &str, table: &Table) {
        for (name, value) in table {
            let key = join(prefix, name);
            let kind = match value {
                Value::Table(table) => {
                    self.collect(&key, table);
                    self.tables.insert(key);
                    continue;
                }
                Value::Boolean(_) => Kind::Flag,
                Value::Integer(_) => Kind::Integer,
                Value::Array(_) => Kind::List,
                _ => Kind::Text,
            };
            self.kinds.insert(key, kind);
        }
    }

    /// What `key` holds; none if there is no such key.
    pub(super) fn kind(&self, key: &str) -> Option<Kind> {
        if kafka_property(key).is_some() {
            return Some(Kind::Text);
        }
        self.kinds.get(key).copied()
    }

    pub(super) fn is_table(&self, key: &str) -> bool {
        self.tables.contains(key)
    }

    /// The known keys most like `wrong`; several only if they are equally like it. Never empty.
    pub(super) fn nearest(&self, wrong: &str) -> Vec<String> {
        nearest(wrong, self.kinds.keys().cloned(), '.')
    }

    /// The known environment variables most like `wrong`.
    pub(super) fn nearest_variables(&self, wrong: &str) -> Vec<String> {
        nearest(wrong, self.kinds.keys().map(|key| variable(key)), '_')
    }
}

/// The environment variable of a key.
pub(super) fn variable(key: &str) -> String {
    format!("{ENVIRONMENT_PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

/// The key that an environment variable names; it need not be known. None if the name has another prefix.
pub(super) fn key_of_variable(name: &str) -> Option<String> {
    let rest = name.strip_prefix(ENVIRONMENT_PREFIX)?;
    let key = rest.to_ascii_lowercase().replace("__", ".");
    Some(match kafka_property(&key) {
        Some(property) => join(KAFKA, &property.replace('_', ".")),
        None => key,
    })
}

/// The librdkafka property that a key names.
pub(super) fn kafka_property(key: &str) -> Option<&str> {
    key.strip_prefix(KAFKA)?.strip_prefix('.').filter(|property| !property.is_empty())
}

/// The parts of a key: one for each table, the last for the value.
pub(super) fn segments(key: &str) -> Vec<&str> {
    match kafka_property(key) {
        Some(property) => KAFKA.split('.').chain([property]).collect(),
        None => key.split('.').collect(),
    }
}

pub(super) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// The configuration as a TOML table.
pub(super) fn to_table(config: &Config) -> Table {
    Table::try_from(config).expect("every field of the configuration has a TOML form")
}

/// Whether a value must not be shown.
pub(super) fn is_secret(key: &str) -> bool {
    const SECRETS: [&str; 2] = ["sasl.oauthbearer.config", "ssl.key.pem"];
    kafka_property(key).is_some_and(|property| {
        SECRETS.contains(&property) || ["password", "secret", "passphrase"].iter().any(|word| property.contains(word))
    })
}

/// Likeness of whole names; the same last part counts as much as everything else, because a key put into the wrong
/// table is as common a mistake as a misspelt one.
fn nearest(wrong: &str, known: impl Iterator<Item = String>, separator: char) -> Vec<String> {
    let last = |name: &str| name.rsplit(separator).next().map(str::to_owned);
    let likeness = |known: &str| {
        let same_last = if last(known) == last(wrong) { 0.5 } else { 0.0 };
        strsim::normalized_damerau_levenshtein(wrong, known) + same_last
    };
    let scored: Vec<(f64, String)> = known.map(|known| (likeness(&known), known)).collect();
    let best = scored.iter().map(|(score, _)| *score).fold(f64::MIN, f64::max);
    scored.into_iter().filter(|(score, _)| *score >= best).map(|(_, known)| known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_name_keys() {
        assert_eq!(key_of_variable("RINGTAIL_WAL__DIRECTORY").as_deref(), Some("wal.directory"));
        assert_eq!(key_of_variable("RINGTAIL_INGEST__HTTP__LISTEN").as_deref(), Some("ingest.http.listen"));
        assert_eq!(key_of_variable("RINGTAIL_FORWARD__KAFKA__LINGER_MS").as_deref(), Some("forward.kafka.linger.ms"));
        assert_eq!(key_of_variable("PATH"), None);
        for key in Keys::new().kinds.keys() {
            assert_eq!(key_of_variable(&variable(key)).as_deref(), Some(key.as_str()));
        }
    }

    #[test]
    fn nearest_key() {
        let keys = Keys::new();
        assert_eq!(keys.nearest("wal.dirctory"), ["wal.directory"]);
        assert_eq!(keys.nearest("directory"), ["wal.directory"]);
        assert_eq!(keys.nearest("ingest.listen"), ["ingest.grpc.listen", "ingest.http.listen"]);
        assert_eq!(keys.nearest_variables("RINGTAIL_WAL_DIRECTORY"), ["RINGTAIL_WAL__DIRECTORY"]);
    }

    #[test]
    fn secrets_are_known() {
        for property in ["sasl.password", "ssl.key.password", "ssl.key.pem", "sasl.oauthbearer.client.secret"] {
            assert!(is_secret(&join(KAFKA, property)), "{property}");
        }
        assert!(!is_secret("forward.kafka.linger.ms"));
        assert!(!is_secret("wal.directory"));
    }
}
