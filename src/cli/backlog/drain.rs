//! `ringtail backlog drain`: delivers everything and ends.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::ProgressBar;
use ringtail::config::{Config, LogConfig, WalConfig, WhenFull};
use ringtail::forward::Forwarder;
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;
use serde::Serialize;

use super::super::config::LogArgs;
use super::{alone, count, print, progress_bar, require_log};

/// How often it looks whether all is delivered.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Deliver everything in a stopped log to Kafka, then end; takes no batches meanwhile
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail backlog drain\n  ringtail backlog drain --timeout 10m --json\n\n\
    Opens no port. Ctrl-C or --timeout end it cleanly: what is not delivered stays in the log.\n\n\
    Exit codes: 0 if nothing is pending any more, 1 if something is, 64 for bad usage or without forward.brokers.")]
pub struct DrainArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Give up after this time
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Print the summary as JSON to stdout
    #[arg(long)]
    json: bool,
}

/// Events by what became of them.
#[derive(Debug, Serialize)]
struct Summary {
    delivered_events: u64,
    parked_events: u64,
    /// Lost to damage, or by a policy.
    dropped_events: u64,
    pending_batches: u64,
    pending_events: u64,
    seconds: f64,
    /// The newest failure, if something is pending.
    last_error: Option<String>,
}

/// Runs the command.
pub async fn run(args: DrainArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    require_log(&config.wal.directory)?;
    if config.forward.brokers.is_empty() {
        eprintln!("ringtail: forward.brokers is empty: there is nowhere to deliver to");
        return Ok(ExitCode::from(super::super::EXIT_USAGE));
    }
    super::super::logging::init(&LogConfig { level: "warn".into(), ..config.log.clone() })?;
    ringtail::wal::exit_on_store_panic();
    let stop = ringtail::shutdown::on_signals()?;
    let began = Instant::now();
    let metrics = Metrics::new();
    // Nothing comes in, so nothing has to make room.
    let log = WalConfig { when_full: WhenFull::Reject, ..config.wal.clone() };
    let wal = alone(Wal::open(&log, 0, metrics.clone()))?;
    let batch_bytes_max = config.ingest.batch_bytes_max.as_u64();
    let forwarder = Forwarder::start(&config.forward, batch_bytes_max, wal.clone(), metrics.clone());
    let forwarder = forwarder.inspect_err(|_| wal.close())?;
    tokio::select! {
        () = drained(&wal, &forwarder) => {}
        () = stop.cancelled() => eprintln!("stopping"),
        () = after(args.timeout) => eprintln!("not done in time, stopping"),
        () = wal.failed().cancelled() => anyhow::bail!("the log failed"),
    }
    let last_error = forwarder.status().last_error.map(|error| error.message);
    let stopping = (config.clone(), wal.clone());
    tokio::task::spawn_blocking(move || close(&stopping.0, &forwarder, &stopping.1))
        .await
        .context("closing the log panicked")?;
    let status = wal.status();
    let counted = |name| total(&metrics.handle().render(), name);
    let summary = Summary {
        delivered_events: counted("ringtail_forward_delivered_events_total"),
        parked_events: counted("ringtail_forward_parked_events_total"),
        dropped_events: counted("ringtail_forward_dropped_events_total"),
        pending_batches: status.pending_batches,
        pending_events: status.pending_events,
        seconds: began.elapsed().as_secs_f64(),
        last_error: last_error.filter(|_| !status.is_drained()),
    };
    if args.json {
        print(&(serde_json::to_string_pretty(&summary)? + "\n"))?;
    } else {
        eprint!("{}", describe(&summary));
    }
    Ok(if status.is_drained() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn close(config: &Config, forwarder: &Forwarder, wal: &Wal) {
    forwarder.stop(config.forward.stop_timeout);
    wal.close();
}

/// Returns when nothing is pending.
async fn drained(wal: &Wal, forwarder: &Forwarder) {
    let total = wal.status().pending_events;
    let progress = progress_bar(total, "{wide_bar} {human_pos}/{human_len} events, {per_sec}, {eta} left{msg}");
    let _clear = Clear(&progress);
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    loop {
        ticks.tick().await;
        let pending = wal.status();
        progress.set_position(total.saturating_sub(pending.pending_events));
        progress.set_message(if forwarder.status().connected { "" } else { ", Kafka is down" });
        if pending.is_drained() {
            return;
        }
    }
}

/// Takes the bar off the terminal, also when nobody waits for it any more.
struct Clear<'a>(&'a ProgressBar);

impl Drop for Clear<'_> {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn after(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

/// A counter's value over all its labels.
fn total(metrics: &str, name: &str) -> u64 {
    let samples =
        metrics.lines().filter_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '{'])));
    samples.filter_map(|sample| sample.rsplit_once(' ')?.1.parse::<f64>().ok()).sum::<f64>() as u64
}

fn describe(summary: &Summary) -> String {
    let mut text = format!("{} delivered, {} parked", count(summary.delivered_events, "event"), summary.parked_events);
    if summary.dropped_events > 0 {
        text += &format!(", {} LOST", summary.dropped_events);
    }
    text += "\n";
    if summary.pending_batches > 0 || summary.pending_events > 0 {
        text += &format!(
            "{} in {} still pending",
            count(summary.pending_events, "event"),
            count(summary.pending_batches, "batch")
        );
        text += &summary.last_error.as_ref().map_or(String::new(), |error| format!("; the last failure: {error}"));
        text += "\n";
    }
    text
}
