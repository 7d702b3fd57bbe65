//! `ringtail parked`: the dead letters. One file per command.
//!
//! Each is a [`ParkedCommand`]: a running service does it, told through its control socket; without one it is done here, and
//! the log is locked meanwhile.

mod discard;
mod export;
mod filter;
mod list;
mod requeue;
mod show;

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use ringtail::admin::{ParkedCommand, ParkedLine, ParkedProgress, control};
use ringtail::config::Config;
use ringtail::forward::{OfflineSpill, ParkedStore};
use ringtail::wal;

use super::backlog::{alone, progress_bar, require_log};

/// Look at the dead letters and after them: events that Kafka can never take, kept with the reason
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail parked list\n\n\
    Works on a running service, and on a log that no service has open.\n\n\
    Exit codes: 0 if all is done; 1 if an event is damaged or not there, or it failed; 64 for bad usage or configuration.")]
pub struct ParkedArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    List(list::ListArgs),
    Show(show::ShowArgs),
    Export(export::ExportArgs),
    Requeue(requeue::RequeueArgs),
    Drop(discard::DropArgs),
}

/// Runs `ringtail parked`.
pub async fn run(args: ParkedArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::List(args) => list::run(args).await,
        Command::Show(args) => show::run(args).await,
        Command::Export(args) => export::run(args).await,
        Command::Requeue(args) => requeue::run(args).await,
        Command::Drop(args) => discard::run(args).await,
    }
}

/// What became of a command.
#[derive(Debug, Default)]
struct Outcome {
    progress: ParkedProgress,
    damaged: u64,
}

impl Outcome {
    fn code(&self) -> ExitCode {
        if self.damaged == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Does `command`, on the running service or here, and gives every event of its answer to `take`. Damaged ones are reported
/// and counted.
async fn perform<C: ParkedCommand>(
    config: &Config,
    command: &C,
    take: &mut dyn FnMut(ParkedLine) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let directory = &config.wal.directory;
    require_log(directory)?;
    let answer = control::command(directory, command).await?;
    let mut lines = Lines { take, outcome: Outcome::default(), ended: false, bar: ProgressBar::hidden() };
    let result = match answer {
        Some(answer) => read(answer, &mut lines).await,
        None => do_here(directory, command, &mut lines),
    };
    lines.bar.finish_and_clear();
    result?;
    if !lines.ended {
        bail!("the service broke off its answer");
    }
    Ok(lines.outcome)
}

async fn read(mut answer: control::Answer, lines: &mut Lines<'_>) -> anyhow::Result<()> {
    let mut partial = Vec::new();
    while let Some(piece) = answer.next().await? {
        partial.extend_from_slice(&piece);
        let Some(end) = partial.iter().rposition(|byte| *byte == b'\n') else { continue };
        for line in partial[..=end].split_inclusive(|byte| *byte == b'\n') {
            lines.take(serde_json::from_slice(line).context("read the service's answer")?)?;
        }
        partial.drain(..=end);
    }
    Ok(())
}

fn do_here<C: ParkedCommand>(directory: &Path, command: &C, lines: &mut Lines<'_>) -> anyhow::Result<()> {
    eprintln!("no service runs on {}, opening the parked events themselves", directory.display());
    wal::exit_on_store_panic();
    let opened = alone(wal::open_parked(directory)).context("open the parked events")?;
    let state = opened.state.clone();
    let store = if command.removes() {
        let notes = opened.notes().context("open the books of the parked events")?;
        ParkedStore::open_offline(state, notes)
    } else {
        ParkedStore::open(state)
    };
    let store = store.context("open the parked events")?;
    let mut result = Ok(());
    let spill = OfflineSpill::open(directory).context("open the spill")?;
    command.run(&store, &spill, &mut |line| {
        result = lines.take(line);
        if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    result
}

/// Takes the lines of an answer.
struct Lines<'a> {
    take: &'a mut dyn FnMut(ParkedLine) -> anyhow::Result<()>,
    outcome: Outcome,
    ended: bool,
    bar: ProgressBar,
}

impl Lines<'_> {
    fn take(&mut self, line: ParkedLine) -> anyhow::Result<()> {
        match line {
            ParkedLine::Event(_) | ParkedLine::Summary(_) => (self.take)(line),
            ParkedLine::Damaged { message, .. } => {
                self.outcome.damaged += 1;
                self.bar.suspend(|| eprintln!("ringtail: {message}"));
                Ok(())
            }
            ParkedLine::Progress(progress) => {
                if self.bar.is_hidden() {
                    self.bar =
                        progress_bar(progress.total_events, "{wide_bar} {pos}/{len} events looked at, {eta} left");
                }
                self.bar.set_position(progress.seen_events);
                Ok(())
            }
            ParkedLine::Done(progress) => {
                (self.outcome.progress, self.ended) = (progress, true);
                Ok(())
            }
            ParkedLine::Failed { message, progress } => {
                bail!("{message} ({} of {} events were done before)", progress.events, progress.total_events)
            }
        }
    }
}
