//! Where log lines go, and in what form.
//!
//! Lines for journald carry their priority in front (`<4>`), as journald reads it from a service's stderr, so that `journalctl -p
//! warning` works. They are not sent to journald as fields: `journalctl` shows the message alone, and the error, the topic or
//! the count that belongs to it would be out of sight. `log.format = "json"` is for those who want fields.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use ringtail::config::{LogConfig, LogFormat};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// Changes what is logged.
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// `log.level` is another one.
    pub fn set(&self, level: &str) -> anyhow::Result<()> {
        self.0.reload(filter(level)?).context("change log.level")
    }
}

fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(level).with_context(|| format!("log.level = {level:?}"))
}

/// Sets up logging to stderr. Once in a process.
pub fn init(config: &LogConfig) -> anyhow::Result<LogLevel> {
    let (filter, handle) = reload::Layer::new(filter(&config.level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines: Box<dyn Layer<_> + Send + Sync> = match config.format {
        LogFormat::Json => lines.json().boxed(),
        LogFormat::Text if is_journal() => {
            lines.with_ansi(false).event_format(ForJournal(Format::default().without_time())).boxed()
        }
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(LogLevel(handle))
}

/// Whether stderr goes to journald: `JOURNAL_STREAM` names its device and inode.
fn is_journal() -> bool {
    let stderr = io::stderr().as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    let (Ok(stream), Ok(stderr)) = (std::env::var("JOURNAL_STREAM"), stderr) else { return false };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}

/// A line with its priority in front; journald has the time.
struct ForJournal(Format<Full, ()>);

impl<S, N> FormatEvent<S, N> for ForJournal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(line, "<{priority}>")?;
        self.0.format_event(context, line, event)
    }
}
