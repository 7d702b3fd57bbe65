//! Where log lines go, and in what form.

use std::io::{self, IsTerminal};

use anyhow::Context;
use ringtail::config::{LogConfig, LogFormat};
use tracing_subscriber::EnvFilter;

/// Sets up logging to stderr. Once in a process.
pub fn init(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.level).with_context(|| format!("log.level = {:?}", config.level))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match config.format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
