//! `ringtail bench`: the load generator's command line.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ringtail::client::Endpoint;
use ringtail::client::bench::{self, BenchOptions, IdleOptions, WINDOW_MAX};

const EXAMPLES: &str = "\
Examples:
  As fast as the server acks, 100 connections:
    ringtail bench --url ws://edge:8080
  At a fixed rate, latency from the intended send time, report as JSON:
    ringtail bench --url ws://edge:8080 --rate 50000 --duration 60s --json
  Hold 10,000 connections open for a minute, after one message of 100,000 bytes on each:
    ringtail bench --url ws://edge:8080 --idle=100000 --connections 10000 --duration 60s

Exit code: 0 if every connection opened and stayed, and every batch was acked; else 1.";

/// Makes load on a server and reports acked events per second and latency.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// The server: ws://HOST:PORT[/PATH], http://HOST:PORT[/PATH] or grpc://HOST:PORT
    #[arg(long, default_value = "ws://127.0.0.1:8080")]
    url: Endpoint,
    /// Connections to open
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_one)]
    connections: usize,
    /// Batches in flight on each connection (over REST, sockets for each)
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = window)]
    window: usize,
    /// Events per second over all connections, on a fixed schedule [default: as fast as they are acked]
    #[arg(long, value_name = "EVENTS_PER_S", value_parser = rate)]
    rate: Option<f64>,
    /// Events in a batch
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    events: usize,
    /// Bytes of each event's payload, random
    #[arg(long, value_name = "N", default_value_t = 200)]
    bytes: usize,
    /// Event types, bench-0 and so on
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    types: usize,
    /// How long to measure
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// How long to make load before measuring
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration)]
    warmup: Duration,
    /// How long connecting may take, and the last answers
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Threads that make the load
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    threads: usize,
    /// Only hold the connections open, after one message of so many bytes on each, if given
    #[arg(long, value_name = "BYTES", num_args = 0..=1, require_equals = true, conflicts_with_all = ["rate", "window"])]
    idle: Option<Option<usize>>,
    /// Ids of the connections: this, "-" and a number [default: bench-RANDOM]
    #[arg(long, value_name = "ID")]
    id_prefix: Option<String>,
    /// Header that carries the id
    #[arg(long, value_name = "NAME", default_value = "X-User-ID")]
    id_header: String,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub async fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    let json = args.json;
    let options = args.into_options();
    let progress = Progress::start(&options);
    let report = bench::run(options).await;
    progress.finish();
    let report = match report {
        Ok(report) => report,
        Err(error @ bench::BenchError::InvalidOption { .. }) => {
            eprintln!("ringtail: {error}");
            return Ok(ExitCode::from(super::EXIT_USAGE));
        }
        Err(error) => return Err(error.into()),
    };
    let text = if json { serde_json::to_string_pretty(&report)? } else { report.to_string() };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl BenchArgs {
    fn into_options(self) -> BenchOptions {
        let defaults = BenchOptions::new(self.url);
        BenchOptions {
            id_prefix: self.id_prefix.unwrap_or(defaults.id_prefix),
            id_header: self.id_header,
            connections: self.connections,
            window: self.window,
            rate: self.rate,
            events_per_batch: self.events,
            event_bytes: self.bytes,
            types: self.types,
            duration: self.duration,
            warmup: if self.idle.is_some() { Duration::ZERO } else { self.warmup },
            threads: self.threads,
            answer_timeout: self.timeout,
            idle: self.idle.map(|message_bytes| IdleOptions { message_bytes }),
            endpoint: defaults.endpoint,
        }
    }
}

/// A bar on a terminal that fills with time; nothing elsewhere.
struct Progress {
    bar: ProgressBar,
    ticks: Option<tokio::task::JoinHandle<()>>,
}

impl Progress {
    fn start(options: &BenchOptions) -> Self {
        if !std::io::stderr().is_terminal() {
            return Progress { bar: ProgressBar::hidden(), ticks: None };
        }
        let seconds = (options.warmup + options.duration).as_secs();
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} s").expect("the template is valid");
        let bar = ProgressBar::new(seconds).with_style(style);
        bar.set_message(format!("{} connections to {}", options.connections, options.endpoint));
        let ticking = bar.clone();
        let ticks = tokio::spawn(async move {
            let mut every_second = tokio::time::interval(Duration::from_secs(1));
            loop {
                every_second.tick().await;
                ticking.set_position(ticking.elapsed().as_secs().min(seconds));
            }
        });
        Progress { bar, ticks: Some(ticks) }
    }

    fn finish(self) {
        if let Some(ticks) = self.ticks {
            ticks.abort();
        }
        self.bar.finish_and_clear();
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number >= 1).ok_or_else(|| "must be a number, at least 1".into())
}

fn window(text: &str) -> Result<usize, String> {
    let in_range = text.parse().ok().filter(|window| (1..=WINDOW_MAX).contains(window));
    in_range.ok_or_else(|| format!("must be a number, 1 to {WINDOW_MAX}"))
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "must be a number above 0".into())
}
