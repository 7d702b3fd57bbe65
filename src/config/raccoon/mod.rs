//! Raccoon's configuration, taken over: `--raccoon-env FILE`.
//!
//! Raccoon is told by environment variables, as a rule kept in one file of lines `NAME=value`. Every one of them becomes a
//! value of our configuration, or is reported with the reason why it has no effect, or is refused because without it the
//! service would not do what its clients or Kafka rely on. Nothing is passed over in silence ([`Taken`]).
//!
//! The values make a layer of their own, above the configuration file and below the environment. Where Raccoon's
//! default differs from ours in what clients notice, it applies as well, below the configuration file.

mod env_file;
mod mapping;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use toml::Value;

use super::keys::{self, Keys};
use super::load::{Entry, FileText, Layer, Loaded, Problem, Source};

/// A Raccoon env file that was taken over.
#[derive(Debug, Clone, Serialize)]
pub struct RaccoonEnv {
    /// The file.
    pub path: PathBuf,
    /// What became of each of its settings, in the order of the file; then Raccoon's defaults that apply.
    pub settings: Vec<RaccoonSetting>,
}

/// What became of one of Raccoon's settings.
#[derive(Debug, Clone, Serialize)]
pub struct RaccoonSetting {
    /// Raccoon's name of it.
    pub variable: String,
    /// Its value; a fixed text in the place of a secret.
    pub value: String,
    /// Line of the file, from 1; none for a default of Raccoon's that is not in the file.
    pub line: Option<usize>,
    /// What became of it.
    #[serde(flatten)]
    pub taken: Taken,
}

/// How a setting of Raccoon's is taken.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "taken", rename_all = "snake_case")]
pub enum Taken {
    /// It sets keys of ours. With none: it is so anyway.
    Mapped {
        /// Keys and their values; a fixed text in the place of a secret.
        keys: BTreeMap<String, Value>,
        /// What is worth knowing about it.
        note: Option<String>,
    },
    /// It has no effect.
    Unsupported {
        /// Why not, and what takes its place.
        reason: String,
    },
}

/// What was read of an env file.
pub(super) struct Read {
    pub env: RaccoonEnv,
    /// What the file says.
    pub values: Layer,
    /// What Raccoon's defaults say.
    pub defaults: Layer,
}

/// Maps an env file. What is refused becomes a problem.
pub(super) fn take_over(FileText { path, text }: &FileText, keys: &Keys, problems: &mut Vec<Problem>) -> Read {
    let source = |variable: &str, line: Option<usize>| Source::Raccoon {
        path: path.to_owned(),
        line,
        variable: variable.to_owned(),
    };
    let mut variables: Vec<env_file::Variable> = Vec::new();
    for line in env_file::parse(text) {
        match line {
            Ok(variable) => variables.push(variable),
            Err(error) => problems.push(Problem {
                key: error.text,
                value: None,
                message: error.message.to_owned(),
                source: source("", Some(error.line)),
            }),
        }
    }
    let file = mapping::File::new(&variables);
    let mut read = Read {
        env: RaccoonEnv { path: path.to_owned(), settings: Vec::new() },
        values: Layer::default(),
        defaults: Layer::default(),
    };
    for variable in &variables {
        let taken = match file.take(variable) {
            Ok(taken) => taken,
            Err(refusal) => {
                problems.push(Problem {
                    key: variable.name.clone(),
                    value: Some(shown(variable)),
                    message: refusal,
                    source: source(&variable.name, Some(variable.line)),
                });
                continue;
            }
        };
        read.values.set(&taken, keys, || source(&variable.name, Some(variable.line)));
        let taken = taken.redacted();
        read.env.settings.push(RaccoonSetting {
            variable: variable.name.clone(),
            value: shown(variable),
            line: Some(variable.line),
            taken,
        });
    }
    for (name, value, taken) in file.defaults() {
        read.defaults.set(&taken, keys, || source(name, None));
        read.env.settings.push(RaccoonSetting {
            variable: name.to_owned(),
            value: value.to_owned(),
            line: None,
            taken,
        });
    }
    read
}

/// What Raccoon cannot do without must be said somewhere.
pub(super) fn check_required(env: &RaccoonEnv, layers: &[Layer], problems: &mut Vec<Problem>) {
    for (variable, key) in mapping::REQUIRED {
        let in_file = env.settings.iter().any(|setting| setting.variable == variable);
        let refused = problems.iter().any(|problem| problem.key == variable);
        if !in_file && !refused && !layers.iter().any(|layer| layer.sets(key)) {
            problems.push(Problem {
                key: variable.to_owned(),
                value: None,
                message: format!("is missing, and Raccoon does not run without it: set it, or {key}"),
                source: Source::Raccoon { path: env.path.clone(), line: None, variable: String::new() },
            });
        }
    }
}

impl Taken {
    fn redacted(mut self) -> Taken {
        if let Taken::Mapped { keys, .. } = &mut self {
            for (_, value) in keys.iter_mut().filter(|(key, _)| keys::is_secret(key)) {
                *value = Value::from(super::show::REDACTED);
            }
        }
        self
    }
}

impl Layer {
    fn set(&mut self, taken: &Taken, keys: &Keys, source: impl Fn() -> Source) {
        let Taken::Mapped { keys: values, .. } = taken else { return };
        for (key, value) in values {
            debug_assert!(keys.kind(key).is_some(), "{key}");
            self.insert(key, Entry { value: value.clone(), source: source() });
        }
    }
}

fn shown(variable: &env_file::Variable) -> String {
    let secret = mapping::kafka_property(&variable.name)
        .is_some_and(|property| keys::is_secret(&keys::join(keys::KAFKA, &property)));
    if secret { super::show::REDACTED.to_owned() } else { variable.value.clone() }
}

impl RaccoonSetting {
    /// One line for people: where it is, what it says, what became of it, and what overrides that.
    pub fn to_line(&self, loaded: &Loaded) -> String {
        let RaccoonSetting { variable, value, line, taken } = self;
        let place = line.map_or_else(|| "default".into(), |line| format!("line {line}"));
        let became = match taken {
            Taken::Mapped { keys, note } => {
                let mut parts: Vec<String> =
                    keys.iter().map(|(key, value)| self.key_to_text(loaded, key, value)).collect();
                parts.extend(note.clone());
                parts.join("; ")
            }
            Taken::Unsupported { reason } => format!("NO EFFECT: {reason}"),
        };
        format!("{place}: {variable}={value} -> {became}")
    }

    fn key_to_text(&self, loaded: &Loaded, key: &str, value: &Value) -> String {
        match loaded.source(key) {
            Source::Raccoon { variable, .. } if variable == self.variable => format!("{key} = {value}"),
            other => format!("{key} = {value}, overridden by {other}"),
        }
    }

    /// Why it has no effect, if it has none.
    pub fn unsupported(&self) -> Option<&str> {
        match &self.taken {
            Taken::Unsupported { reason } => Some(reason),
            Taken::Mapped { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests;
