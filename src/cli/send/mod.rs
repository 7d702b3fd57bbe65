//! `ringtail send`: files or stdin in, acks out.
//!
//! One event per line; empty lines are skipped, and the line's end (`\n` or `\r\n`) is not part of the event. A reader
//! thread feeds lines through a short queue, so memory stays bounded however large the input. With a window of 1 (the
//! default) a batch is sent only after the one before it is settled, which keeps the order, retries included.

mod batching;
mod input;
mod summary;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use indicatif::{ProgressBar, ProgressStyle};
use ringtail::client::{ClientOptions, Endpoint, NotAcked, Receipt, RetryPolicy, Sender};

use batching::{Batch, Batches};
use input::Input;
use summary::Summary;

const EXAMPLES: &str = "\
Examples:
  One event per line of a file:
    ringtail send --url ws://edge:8080 --id device-7 --type click events.jsonl
  What a program prints, as it prints it, over REST:
    tail -F app.log | ringtail send --url http://edge:8080 --type app-log
  Fast rather than in order, summary as JSON:
    ringtail send --url grpc://edge:8081 --window 16 --json events.jsonl

Exit code: 0 if every event was acked; 64 for bad usage; else 1.";

/// Sends events, one per line of the files or of stdin, until the server has acked them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct SendArgs {
    /// The server: ws://HOST:PORT[/PATH], http://HOST:PORT[/PATH] or grpc://HOST:PORT
    #[arg(long, default_value = "ws://127.0.0.1:8080")]
    url: Endpoint,
    /// The connection's id [default: ringtail-send-RANDOM]
    #[arg(long)]
    id: Option<String>,
    /// Header that carries the id
    #[arg(long, value_name = "NAME", default_value = "X-User-ID")]
    id_header: String,
    /// The connection's group
    #[arg(long)]
    group: Option<String>,
    /// Header that carries the group
    #[arg(long, value_name = "NAME", default_value = "X-User-Group")]
    group_header: String,
    /// Type of every event: picks the topic
    #[arg(long = "type", value_name = "TYPE", default_value = "event")]
    event_type: String,
    /// Most events in a batch
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_one)]
    batch_events: usize,
    /// Most bytes of events in a batch; a longer line makes a batch of its own
    #[arg(long, value_name = "SIZE", default_value = "256KiB")]
    batch_bytes: bytesize::ByteSize,
    /// How long a batch that is not full waits for more lines
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = humantime::parse_duration)]
    linger: Duration,
    /// Batches in flight; more than 1 gives up the order
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    window: usize,
    /// How long to wait for an answer before trying again
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// How long to retry a batch; then stop
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    retry_for: Duration,
    /// Print the summary as JSON to stdout
    #[arg(long)]
    json: bool,
    /// Files to read, in turn; "-" or none: stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Runs the command.
pub async fn run(args: SendArgs) -> anyhow::Result<ExitCode> {
    let options = args.client_options();
    if let Err(error) = options.check() {
        eprintln!("ringtail: {error}");
        return Ok(ExitCode::from(super::EXIT_USAGE));
    }
    let input = Input::open(&args.files)?;
    let progress = progress_bar(input.bytes_total);
    let sender = Sender::new(options, RetryPolicy { retry_for: args.retry_for, ..Default::default() });
    let batches = Batches::new(
        input::read_in_background(input)?,
        batching::Limits { events: args.batch_events, bytes: args.batch_bytes.as_u64(), linger: args.linger },
        args.event_type.clone(),
    );
    let mut summary = Summary::default();
    tokio::select! {
        () = send_all(&sender, batches, args.window, &mut summary, &progress) => sender.close().await,
        _ = tokio::signal::ctrl_c() => summary.interrupted = true,
    }
    progress.finish_and_clear();
    summary.finish(&sender);
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&summary)?)?;
    } else {
        eprintln!("{summary}");
    }
    Ok(if summary.all_acked() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl SendArgs {
    fn client_options(&self) -> ClientOptions {
        let id = self.id.clone().unwrap_or_else(|| format!("ringtail-send-{:08x}", rand::random::<u32>()));
        ClientOptions {
            id_header: self.id_header.clone(),
            group: self.group.clone(),
            group_header: self.group_header.clone(),
            answer_timeout: self.timeout,
            ..ClientOptions::new(self.url.clone(), id)
        }
    }
}

/// Sends batches, up to `window` at a time, until the input ends or the server was out of reach for too long. What is in
/// flight is always settled.
async fn send_all(sender: &Sender, mut batches: Batches, window: usize, summary: &mut Summary, progress: &ProgressBar) {
    let mut in_flight = FuturesUnordered::new();
    let mut more = true;
    while more || !in_flight.is_empty() {
        tokio::select! {
            batch = batches.next(), if more && in_flight.len() < window => match batch {
                Ok(Some(batch)) => {
                    summary.sent(&batch);
                    in_flight.push(deliver(sender, batch));
                }
                Ok(None) => more = false,
                Err(error) => {
                    summary.failed_to_read(&error);
                    more = error.is_one_line();
                }
            },
            Some((batch, outcome)) = in_flight.next() => {
                progress.inc(batch.input_bytes);
                if summary.settled(&batch, outcome).is_break() {
                    more = false;
                }
            }
        }
    }
}

async fn deliver(sender: &Sender, batch: Batch) -> (Batch, Result<Receipt, NotAcked>) {
    let outcome = sender.deliver(&batch.request).await;
    (batch, outcome)
}

/// A bar on a terminal, nothing elsewhere. Without a known size it counts bytes.
fn progress_bar(bytes_total: Option<u64>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match bytes_total {
        Some(bytes) => (ProgressBar::new(bytes), "{wide_bar} {bytes}/{total_bytes} acked, {eta} left"),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes} acked, {bytes_per_sec}"),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("the template is valid"))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number >= 1).ok_or_else(|| "must be a number, at least 1".into())
}
