//! `ringtail config check`: is the configuration valid, and what would a reload of the running service do?

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fmt, io};

use anyhow::Context;
use ringtail::admin::control::{self, Foretold};
use ringtail::config::{Changes, ConfigError, Loaded, Problem};
use serde::Serialize;

use super::{ConfigFile, describe, refuse};
use crate::cli::EXIT_USAGE;

#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    file: ConfigFile,
    /// Print one JSON object on standard output instead: valid, error, problems, file, without_effect (of Raccoon's
    /// settings), service (its reload: not_running, taken with what it changes, refused with the reason, or unknown). The
    /// exit code is 0 if it is valid and not refused
    #[arg(long)]
    json: bool,
}

/// Runs `ringtail config check`.
pub async fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let checked = check(&args.file).await;
    if args.json {
        let verdict = checked.as_ref().map_or_else(Verdict::invalid, Checked::verdict);
        serde_json::to_writer_pretty(io::stdout().lock(), &verdict).context("write to standard output")?;
        println!();
    }
    let Checked { loaded, service } = match checked {
        Ok(checked) => checked,
        Err(error) => return Ok(refuse(&error)),
    };
    if !args.json {
        eprintln!("the configuration is valid ({})", describe(&loaded));
        without_effect(&loaded).iter().for_each(|line| eprintln!("  {line}"));
        eprintln!("{service}");
    }
    Ok(if service.is_refusal() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS })
}

/// A valid configuration.
struct Checked {
    loaded: Loaded,
    service: Service,
}

async fn check(file: &ConfigFile) -> Result<Checked, ConfigError> {
    let loaded = file.read(&[])?;
    let directory = loaded.config.wal.directory.clone();
    let reload = match control::foretell_reload(&directory, &file.files().read()?).await {
        Ok(Some(Foretold::Taken(changes))) => Reload::Taken(changes),
        Ok(Some(Foretold::Refused(reason))) => Reload::Refused { reason },
        Ok(None) => Reload::NotRunning,
        // The configuration itself is valid all the same.
        Err(error) => Reload::Unknown { error: format!("{:#}", anyhow::Error::from(error)) },
    };
    Ok(Checked { loaded, service: Service { directory, reload } })
}

/// Raccoon's settings that Ringtail does not have, a line each.
fn without_effect(loaded: &Loaded) -> Vec<String> {
    let settings = loaded.raccoon.iter().flat_map(|env| &env.settings);
    settings.filter(|setting| setting.unsupported().is_some()).map(|setting| setting.to_line(loaded)).collect()
}

/// The service on `wal.directory`.
#[derive(Debug, Serialize)]
struct Service {
    directory: PathBuf,
    #[serde(flatten)]
    reload: Reload,
}

/// What a reload of it would do.
#[derive(Debug, Serialize)]
#[serde(tag = "reload", rename_all = "snake_case")]
enum Reload {
    NotRunning,
    Taken(Changes),
    /// With its own environment and credentials.
    Refused {
        reason: String,
    },
    /// It could not be asked.
    Unknown {
        error: String,
    },
}

impl Service {
    fn is_refusal(&self) -> bool {
        matches!(self.reload, Reload::Refused { .. })
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directory = self.directory.display();
        let service = format!("the service that runs on {directory}");
        match &self.reload {
            Reload::NotRunning => write!(f, "no service runs on {directory}: not compared with one"),
            Reload::Taken(changes) => write!(f, "{service}: {}", foretell(changes)),
            Reload::Refused { reason } => {
                write!(f, "ringtail: {service} would refuse it, with its own environment and credentials: {reason}")
            }
            Reload::Unknown { error } => write!(f, "not compared with {service}: {error}"),
        }
    }
}

/// What a reload would do, in a line.
fn foretell(Changes { live, restart }: &Changes) -> String {
    let at_once = format!("a reload changes {}", live.join(", "));
    let later = format!("only its next start changes {}", restart.join(", "));
    match (live.is_empty(), restart.is_empty()) {
        (true, true) => "has these settings already".into(),
        (false, true) => at_once,
        (true, false) => later,
        (false, false) => format!("{at_once}; {later}"),
    }
}

/// What `--json` prints.
#[derive(Debug, Default, Serialize)]
struct Verdict<'a> {
    valid: bool,
    /// What is wrong, in words.
    error: Option<String>,
    /// Each key that is unknown, and each value that is not allowed.
    problems: &'a [Problem],
    file: Option<&'a Path>,
    without_effect: Vec<String>,
    service: Option<&'a Service>,
}

impl Verdict<'_> {
    fn invalid(error: &ConfigError) -> Verdict<'_> {
        let problems = match error {
            ConfigError::Invalid { problems } => &problems[..],
            ConfigError::Read { .. } | ConfigError::Syntax { .. } => &[],
        };
        Verdict { error: Some(super::words(error)), problems, ..Verdict::default() }
    }
}

impl Checked {
    fn verdict(&self) -> Verdict<'_> {
        Verdict {
            valid: true,
            file: self.loaded.file.as_deref(),
            without_effect: without_effect(&self.loaded),
            service: Some(&self.service),
            ..Verdict::default()
        }
    }
}
