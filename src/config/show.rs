//! The effective configuration for people: every value, where it came from, and no secret.

use std::collections::BTreeMap;

use serde::Serialize;
use toml::{Table, Value};

use super::keys;
use super::{Loaded, Source};

/// The commented default file, `config/ringtail.toml`.
pub const TEMPLATE: &str = include_str!("../../config/ringtail.toml");

pub(super) const REDACTED: &str = "<redacted>";

/// One value of the effective configuration.
#[derive(Debug, Clone, Serialize)]
pub struct Setting {
    /// The key, with dots from the top.
    pub key: String,
    /// The value; a fixed text in the place of a secret.
    pub value: Value,
    /// Where it came from.
    pub source: Source,
}

impl Setting {
    /// The value as TOML.
    pub fn shown(&self) -> String {
        self.value.to_string()
    }
}

impl Loaded {
    /// Every value of the effective configuration, in the order of keys.
    pub fn settings(&self) -> Vec<Setting> {
        let mut settings = Vec::new();
        collect("", keys::to_table(&self.config), &mut |key, value| {
            let value = if keys::is_secret(&key) { Value::from(REDACTED) } else { value };
            settings.push(Setting { source: self.source(&key), key, value });
        });
        settings
    }

    /// The effective configuration as TOML, each value with its source as a comment.
    pub fn to_annotated_toml(&self) -> String {
        let mut tables: BTreeMap<String, Vec<(String, Source)>> = BTreeMap::new();
        for setting in self.settings() {
            let segments = keys::segments(&setting.key);
            let (name, table) = segments.split_last().expect("a key has a last part");
            let name = if name.contains('.') { format!("{name:?}") } else { (*name).to_owned() };
            let line = format!("{name} = {}", setting.shown());
            tables.entry(table.join(".")).or_default().push((line, setting.source));
        }
        let mut text = String::new();
        for (table, lines) in tables {
            let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0);
            text.push_str(if text.is_empty() { "" } else { "\n" });
            text.push_str(&format!("[{table}]\n"));
            for (line, source) in lines {
                text.push_str(&format!("{line:width$}  # {source}\n"));
            }
        }
        text
    }
}

fn collect(prefix: &str, table: Table, take: &mut impl FnMut(String, Value)) {
    for (name, value) in table {
        let key = keys::join(prefix, &name);
        match value {
            Value::Table(table) => collect(&key, table, take),
            value => take(key, value),
        }
    }
}
