//! Composes the configuration: defaults, then the TOML file, then a Raccoon env file, then credentials, then the
//! environment, then flags.
//!
//! Every layer is a flat map from key to value and source, so that an error, and `ringtail config show`, can name the line
//! or the variable that a value came from. Problems are collected, never reported one by one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use figment::error::Kind as ErrorKind;
use figment::providers::Serialized;
use figment::value::{Dict, Map};
use figment::{Figment, Metadata, Profile, Provider};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::Config;
use super::keys::{self, Keys, Kind};
use super::raccoon::{self, RaccoonEnv};

/// The file that is read when none is named, if it exists.
pub const DEFAULT_FILE: &str = "/etc/ringtail/ringtail.toml";

/// Names the directory of what `LoadCredential=` of a unit passes.
const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// First part of the names of credentials that are values of keys: `ringtail_forward.kafka.sasl.password`.
const CREDENTIAL_PREFIX: &str = "ringtail_";

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Source {
    /// Built in.
    Default,
    /// The configuration file.
    File {
        /// Its path.
        path: PathBuf,
        /// Line of the key, from 1.
        line: usize,
    },
    /// A Raccoon env file.
    Raccoon {
        /// Its path.
        path: PathBuf,
        /// Line of the variable, from 1; none if it is Raccoon's default and not in the file.
        line: Option<usize>,
        /// Raccoon's name of it.
        variable: String,
    },
    /// A credential that systemd passed.
    Credential {
        /// Its file, in `$CREDENTIALS_DIRECTORY`.
        path: PathBuf,
    },
    /// An environment variable.
    Environment {
        /// Its name.
        variable: String,
    },
    /// A flag of the command line.
    Flag {
        /// Its name.
        flag: &'static str,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File { path, line } => write!(f, "{}:{line}", path.display()),
            Source::Raccoon { path, line: Some(line), variable } if variable.is_empty() => {
                write!(f, "{}:{line}", path.display())
            }
            Source::Raccoon { path, line: Some(line), variable } => write!(f, "{variable}, {}:{line}", path.display()),
            Source::Raccoon { path, line: None, variable } if variable.is_empty() => path.display().fmt(f),
            Source::Raccoon { line: None, variable, .. } => write!(f, "Raccoon's default of {variable}"),
            Source::Credential { path } => write!(f, "credential {}", path.display()),
            Source::Environment { variable } => write!(f, "environment variable {variable}"),
            Source::Flag { flag } => write!(f, "flag {flag}"),
        }
    }
}

/// A value that a flag of the command line sets.
#[derive(Debug, Clone)]
pub struct Override {
    /// The flag, for messages: `--directory`.
    pub flag: &'static str,
    /// The key that it sets: `wal.directory`.
    pub key: &'static str,
    /// The value, written as in an environment variable.
    pub value: String,
}

/// A configuration that passed every check.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The effective values.
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// The Raccoon env file that was taken over, if any.
    pub raccoon: Option<RaccoonEnv>,
    sources: BTreeMap<String, Source>,
}

impl Loaded {
    /// Where the value of `key` came from.
    pub fn source(&self, key: &str) -> Source {
        self.sources.get(key).cloned().unwrap_or(Source::Default)
    }
}

/// One thing that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The key, or the variable if it names no key.
    pub key: String,
    /// The value, as far as it may be shown.
    pub value: Option<String>,
    /// What is wrong, and the limit.
    pub message: String,
    /// Where it was set.
    pub source: Source,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.key)?;
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        write!(f, ": {} ({})", self.message, self.source)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and column.
        message: String,
    },
    /// Keys are unknown or values not allowed.
    #[error("the configuration has {}{}", count(problems), list(problems))]
    Invalid {
        /// All of them, never empty.
        problems: Vec<Problem>,
    },
}

fn count(problems: &[Problem]) -> String {
    if problems.len() == 1 { "a problem:".into() } else { format!("{} problems:", problems.len()) }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

/// The files that a configuration is loaded from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Files<'a> {
    /// The configuration file.
    pub config: Option<&'a Path>,
    /// A Raccoon env file.
    pub raccoon_env: Option<&'a Path>,
}

/// The same, read.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct FileTexts {
    /// The configuration file.
    pub config: Option<FileText>,
    /// A Raccoon env file.
    pub raccoon_env: Option<FileText>,
}

/// A file, read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileText {
    /// Where it was read, for messages.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

impl<'a> Files<'a> {
    /// Reads them. Without a configuration file it is [`DEFAULT_FILE`], if that exists.
    ///
    /// # Errors
    /// [`ConfigError::Read`]
    pub fn read(self) -> Result<FileTexts, ConfigError> {
        self.or_default(Path::new(DEFAULT_FILE))?.read_named()
    }

    /// With `default` as the configuration file if none is named. Only one that is not there at all counts as none: the
    /// built-in values must not take the place of a file that cannot be reached.
    pub(super) fn or_default(self, default: &'a Path) -> Result<Files<'a>, ConfigError> {
        if self.config.is_some() {
            return Ok(self);
        }
        match default.try_exists() {
            Ok(exists) => Ok(Files { config: exists.then_some(default), ..self }),
            Err(source) => Err(ConfigError::Read { path: default.to_owned(), source }),
        }
    }

    fn read_named(self) -> Result<FileTexts, ConfigError> {
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Ok(FileText { path: path.to_owned(), text }),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        };
        Ok(FileTexts {
            config: self.config.map(read).transpose()?,
            raccoon_env: self.raccoon_env.map(read).transpose()?,
        })
    }
}

impl Config {
    /// Loads the configuration from `file` (without one from [`DEFAULT_FILE`], if that exists), the process environment
    /// and flags. Later ones win. The result is validated.
    ///
    /// # Errors
    /// [`ConfigError`]; all unknown keys and all values that are not allowed are in one error.
    pub fn load(file: Option<&Path>, overrides: &[Override]) -> Result<Loaded, ConfigError> {
        Config::load_files(Files { config: file, raccoon_env: None }, overrides)
    }

    /// As [`Config::load`], with a Raccoon env file, if there is one, between the file and the environment.
    ///
    /// # Errors
    /// As [`Config::load`]; also when the env file asks for what there is not, or lacks what Raccoon requires.
    pub fn load_files(files: Files<'_>, overrides: &[Override]) -> Result<Loaded, ConfigError> {
        Config::load_texts(&files.read()?, std::env::vars_os(), overrides)
    }

    /// As [`Config::load`], with a given environment and no default file.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_from(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        overrides: &[Override],
    ) -> Result<Loaded, ConfigError> {
        Config::load_files_from(Files { config: file, raccoon_env: None }, environment, overrides)
    }

    /// As [`Config::load_files`], with a given environment and no default file.
    ///
    /// # Errors
    /// As [`Config::load_files`].
    pub fn load_files_from(
        files: Files<'_>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        overrides: &[Override],
    ) -> Result<Loaded, ConfigError> {
        Config::load_texts(&files.read_named()?, environment, overrides)
    }

    /// As [`Config::load_files_from`], of files that are read already.
    ///
    /// # Errors
    /// As [`Config::load_files`].
    pub fn load_texts(
        files: &FileTexts,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        overrides: &[Override],
    ) -> Result<Loaded, ConfigError> {
        let keys = Keys::new();
        let mut problems = Vec::new();
        let mut layers = Vec::new();
        let raccoon = files.raccoon_env.as_ref().map(|file| raccoon::take_over(file, &keys, &mut problems));
        let (raccoon, raccoon_values) = match raccoon {
            Some(raccoon::Read { env, values, defaults }) => {
                layers.push(defaults);
                (Some(env), Some(values))
            }
            None => (None, None),
        };
        if let Some(file) = &files.config {
            layers.push(read_file(file, &keys, &mut problems)?);
        }
        layers.extend(raccoon_values);
        let environment: Vec<_> = environment.into_iter().collect();
        if let Some((_, directory)) = environment.iter().find(|(name, _)| name == CREDENTIALS_DIRECTORY) {
            layers.push(read_credentials(Path::new(directory), &keys, &mut problems)?);
        }
        layers.push(read_environment(environment, &keys, &mut problems));
        layers.push(read_overrides(overrides, &keys, &mut problems));
        if let Some(env) = &raccoon {
            raccoon::check_required(env, &layers, &mut problems);
        }
        let Some(config) = extract(&mut layers, &mut problems) else { return Err(ConfigError::Invalid { problems }) };

        let sources = layers.iter().flat_map(|layer| &layer.0);
        let sources = sources.map(|(key, entry)| (key.clone(), entry.source.clone())).collect();
        let loaded = Loaded { config, file: files.config.as_ref().map(|file| file.path.clone()), raccoon, sources };
        problems.extend(loaded.violations());
        if problems.is_empty() { Ok(loaded) } else { Err(ConfigError::Invalid { problems }) }
    }
}

impl Loaded {
    fn violations(&self) -> Vec<Problem> {
        let violations = self.config.validate().err().unwrap_or_default();
        let settings = self.settings();
        let shown = |key: &str| settings.iter().find(|setting| setting.key == key).map(|setting| setting.shown());
        violations
            .into_iter()
            .map(|violation| Problem {
                value: shown(&violation.key),
                source: self.source(&violation.key),
                message: violation.message,
                key: violation.key,
            })
            .collect()
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub value: Value,
    pub source: Source,
}

/// The values that one place sets.
#[derive(Debug, Default)]
pub(super) struct Layer(BTreeMap<String, Entry>);

impl Layer {
    pub(super) fn insert(&mut self, key: &str, entry: Entry) {
        self.0.insert(key.to_owned(), entry);
    }

    pub(super) fn sets(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }
}

impl Provider for &Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named("layer")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let mut root = Dict::new();
        for (key, entry) in &self.0 {
            let segments = keys::segments(key);
            let (name, tables) = segments.split_last().expect("a key has a last part");
            let mut table = &mut root;
            for segment in tables {
                let next = table.entry((*segment).to_owned()).or_insert_with(|| Dict::new().into());
                let figment::value::Value::Dict(_, next) = next else {
                    unreachable!("keys are checked against tables")
                };
                table = next;
            }
            table.insert((*name).to_owned(), figment::value::Value::serialize(&entry.value)?);
        }
        Ok(Profile::Default.collect(root))
    }
}

fn read_file(
    FileText { path, text }: &FileText,
    keys: &Keys,
    problems: &mut Vec<Problem>,
) -> Result<Layer, ConfigError> {
    let syntax = |error: toml::de::Error| ConfigError::Syntax {
        path: path.clone(),
        message: error.to_string().trim_end().to_owned(),
    };
    let table: Table = text.parse().map_err(syntax)?;
    let spanned = toml::de::DeTable::parse(text).map_err(syntax)?;
    let mut lines = BTreeMap::new();
    collect_lines("", spanned.get_ref(), text, &mut lines);

    let mut layer = Layer::default();
    let mut file = FileReader { path, keys, lines, layer: &mut layer, problems };
    file.read("", table);
    Ok(layer)
}

/// Line of every key, nested tables and all.
fn collect_lines(prefix: &str, table: &toml::de::DeTable<'_>, text: &str, lines: &mut BTreeMap<String, usize>) {
    for (name, value) in table {
        let key = keys::join(prefix, name.get_ref());
        let line = 1 + text.as_bytes()[..name.span().start].iter().filter(|byte| **byte == b'\n').count();
        if let Some(table) = value.get_ref().as_table() {
            collect_lines(&key, table, text, lines);
        }
        lines.insert(key, line);
    }
}

struct FileReader<'a> {
    path: &'a Path,
    keys: &'a Keys,
    lines: BTreeMap<String, usize>,
    layer: &'a mut Layer,
    problems: &'a mut Vec<Problem>,
}

impl FileReader<'_> {
    fn read(&mut self, prefix: &str, table: Table) {
        for (name, value) in table {
            let key = keys::join(prefix, &name);
            let source = Source::File { path: self.path.to_owned(), line: self.lines.get(&key).copied().unwrap_or(1) };
            match value {
                // Below `forward.kafka`, `linger.ms = 5` is the property "linger.ms", not a table.
                Value::Table(table) if self.keys.is_table(&key) || keys::kafka_property(&key).is_some() => {
                    self.read(&key, table);
                }
                value if self.keys.kind(&key).is_some() => {
                    if let Some(twice) = self.layer.0.insert(key.clone(), Entry { value, source }) {
                        let message = "is set twice, as a quoted key and as a table".to_owned();
                        self.problems.push(Problem { key, value: None, message, source: twice.source });
                    }
                }
                _ => self.problems.push(unknown(self.keys, key, source)),
            }
        }
    }
}

fn unknown(keys: &Keys, key: String, source: Source) -> Problem {
    let message = if keys.is_table(&key) {
        "is a table, not a value".to_owned()
    } else {
        format!("unknown key, the nearest known key is {}", keys.nearest(&key).join(" or "))
    };
    Problem { key, value: None, message, source }
}

fn read_credentials(directory: &Path, keys: &Keys, problems: &mut Vec<Problem>) -> Result<Layer, ConfigError> {
    let failed = |path: &Path, source| ConfigError::Read { path: path.to_owned(), source };
    let mut layer = Layer::default();
    for file in std::fs::read_dir(directory).map_err(|error| failed(directory, error))? {
        let path = file.map_err(|error| failed(directory, error))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        // systemd passes others too.
        let Some(key) = name.and_then(|name| name.strip_prefix(CREDENTIAL_PREFIX)) else { continue };
        let source = Source::Credential { path: path.clone() };
        let Some(kind) = keys.kind(key) else {
            problems.push(unknown(keys, key.to_owned(), source));
            continue;
        };
        let text = std::fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
        layer.insert(key, Entry { value: parse(kind, &text), source });
    }
    Ok(layer)
}

fn read_environment(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    keys: &Keys,
    problems: &mut Vec<Problem>,
) -> Layer {
    let mut layer = Layer::default();
    for (variable, text) in environment {
        let Ok(variable) = variable.into_string() else { continue };
        let Some(key) = keys::key_of_variable(&variable) else { continue };
        let source = Source::Environment { variable: variable.clone() };
        let mut refuse = |message: String| {
            problems.push(Problem { key: variable.clone(), value: None, message, source: source.clone() });
        };
        let Some(kind) = keys.kind(&key) else {
            let nearest = keys.nearest_variables(&variable).join(" or ");
            refuse(format!("unknown key, the nearest known variable is {nearest}"));
            continue;
        };
        match text.into_string() {
            Ok(text) => {
                layer.0.insert(key, Entry { value: parse(kind, &text), source });
            }
            Err(_) => refuse("is not UTF-8".into()),
        }
    }
    layer
}

fn read_overrides(overrides: &[Override], keys: &Keys, problems: &mut Vec<Problem>) -> Layer {
    let mut layer = Layer::default();
    for Override { flag, key, value } in overrides {
        let source = Source::Flag { flag };
        match keys.kind(key) {
            Some(kind) => {
                layer.0.insert((*key).to_owned(), Entry { value: parse(kind, value), source });
            }
            None => problems.push(unknown(keys, (*key).to_owned(), source)),
        }
    }
    layer
}

/// Text of the environment or of a flag as a value. What is no such value stays text, for figment to refuse.
fn parse(kind: Kind, text: &str) -> Value {
    let text = text.trim();
    let parsed = match kind {
        Kind::Text => None,
        Kind::Integer => text.parse().ok().map(Value::Integer),
        Kind::Flag => text.parse().ok().map(Value::Boolean),
        Kind::List if text.starts_with('[') => {
            format!("list = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("list"))
        }
        Kind::List => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Some(Value::Array(items.map(Value::from).collect()))
        }
    };
    parsed.unwrap_or_else(|| Value::from(text))
}

/// Deserialises the layers. A value of the wrong type is reported and left out, so that the rest is checked too.
fn extract(layers: &mut [Layer], problems: &mut Vec<Problem>) -> Option<Config> {
    loop {
        let mut figment = Figment::from(Serialized::defaults(Config::default()));
        for layer in layers.iter() {
            figment = figment.merge(layer);
        }
        let error = match figment.extract() {
            Ok(config) => return Some(config),
            Err(error) => error,
        };
        // The path of an error may go on into a list.
        let path = error.path.join(".");
        let known = |key: &&String| path == **key || path.starts_with(&format!("{key}."));
        let key = layers.iter().rev().find_map(|layer| layer.0.keys().find(known)).cloned();
        let entries = layers.iter_mut().filter_map(|layer| layer.0.remove(key.as_ref()?));
        let source = entries.last().map_or(Source::Default, |entry| entry.source);
        let message = if keys::is_secret(&path) { "has the wrong type".to_owned() } else { explain(&error.kind) };
        let attributed = key.is_some();
        problems.push(Problem { key: key.unwrap_or(path), value: None, message, source });
        if !attributed {
            return None;
        }
    }
}

/// What is wrong with a value, in the words of the configuration rather than of Rust.
fn explain(error: &ErrorKind) -> String {
    match error {
        ErrorKind::InvalidType(found, expected) | ErrorKind::InvalidValue(found, expected) => {
            let expected = match expected.as_str() {
                "usize" | "u32" | "u64" => "a whole number, not negative",
                "path string" => "a path",
                expected => expected,
            };
            format!("is {found}, must be {expected}")
        }
        ErrorKind::UnknownVariant(found, known) => format!("is {found:?}, must be one of {}", known.join(", ")),
        other => other.to_string(),
    }
}
