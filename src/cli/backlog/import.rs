//! `ringtail backlog import`: puts exported batches into a stopped log.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use indicatif::ProgressBar;
use ringtail::batch::{Batch, CLIENT_NAME_BYTES_MAX, Client, Request};
use serde::Deserialize;

use super::super::config::LogArgs;
use super::restore::{QUEUE_BYTES_MAX, Restorer};
use super::{count, open_wal, progress_bar};

/// Longest line that is read: that of the largest request, with payloads, and some.
const LINE_BYTES_MAX: u64 = 128 << 20;

/// Put exported batches into a stopped log, behind what it holds
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail backlog import --dry-run backlog.jsonl\n  \
    ringtail backlog import backlog.jsonl\n  \
    ringtail backlog export --directory /mnt/old | ringtail backlog import -\n\n\
    Reads what `ringtail backlog export` writes. Nothing is deduplicated: what is imported twice is delivered twice. A bad\n\
    line is named, nothing of it is imported, and the others are.\n\n\
    Exit codes: 0; 1 if a line was bad or the log is full; 64 for bad usage.")]
pub struct ImportArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Only verify the lines; works while the service runs
    #[arg(long)]
    dry_run: bool,
    /// Files to read, in turn; "-": the standard input
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

/// What a line must hold.
#[derive(Deserialize)]
struct Line {
    received_at_ms: u64,
    group: String,
    connection_id: String,
    request: String,
}

/// A batch that waits for its commit.
struct Pending {
    events: u64,
    input_bytes: u64,
    /// For the message that says how far it came.
    line: u64,
    file: usize,
}

/// Runs the command.
pub async fn run(args: ImportArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let request_bytes_max = config.ingest.batch_bytes_max.as_u64() as usize;
    if args.dry_run {
        let mut checked = Checked::default();
        for_each_batch(&args.files, request_bytes_max, &mut checked.bad, async |batch, _| {
            checked.batches += 1;
            checked.events += u64::from(batch.request.event_count());
            Ok(())
        })
        .await?;
        eprintln!("{} with {} can be imported", count(checked.batches, "batch"), count(checked.events, "event"));
        return Ok(checked.code());
    }
    let wal = open_wal(&config.wal, QUEUE_BYTES_MAX)?;
    let mut restorer = Restorer::new(&wal);
    let mut checked = Checked::default();
    let progress = progress_bar(input_bytes(&args.files), "{wide_bar} {bytes}/{total_bytes} imported, {eta} left");
    let mut last = None;
    let mut settle = |restorer: &mut Restorer<'_, Pending>, checked: &mut Checked, progress: &ProgressBar| {
        if let Some(pending) = restorer.committed.last() {
            last = Some((pending.file, pending.line));
        }
        for pending in restorer.committed.drain(..).chain(restorer.committed_behind.drain(..)) {
            checked.batches += 1;
            checked.events += pending.events;
            progress.inc(pending.input_bytes);
        }
    };
    let mut bad = 0;
    let pushed = for_each_batch(&args.files, request_bytes_max, &mut bad, async |batch, pending| {
        let pushed = restorer.push(batch, pending).await;
        settle(&mut restorer, &mut checked, &progress);
        Ok(pushed?)
    })
    .await;
    let finished = restorer.finish().await;
    settle(&mut restorer, &mut checked, &progress);
    checked.bad = bad;
    progress.finish_and_clear();
    wal.close();
    eprintln!("imported {} with {}", count(checked.batches, "batch"), count(checked.events, "event"));
    let result = pushed.and(finished.map_err(Into::into));
    if result.is_err()
        && let Some((file, line)) = last
    {
        eprintln!("everything up to {}, line {line}, is imported", name(&args.files[file]));
    }
    result.context("the rest is not imported")?;
    Ok(checked.code())
}

#[derive(Default)]
struct Checked {
    batches: u64,
    events: u64,
    bad: u64,
}

impl Checked {
    fn code(&self) -> ExitCode {
        if self.bad == 0 {
            return ExitCode::SUCCESS;
        }
        eprintln!("{} BAD", count(self.bad, "line"));
        ExitCode::FAILURE
    }
}

/// Gives the batch of every good line to `take`, and says what is wrong with the others.
async fn for_each_batch(
    files: &[PathBuf],
    request_bytes_max: usize,
    bad: &mut u64,
    mut take: impl AsyncFnMut(Batch, Pending) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for (file, path) in files.iter().enumerate() {
        let mut input: Box<dyn BufRead> = if path == Path::new("-") {
            Box::new(io::stdin().lock())
        } else {
            let open = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
            Box::new(BufReader::with_capacity(1 << 20, open))
        };
        let mut text = Vec::new();
        for line in 1.. {
            text.clear();
            let read = input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut text);
            if read.with_context(|| format!("cannot read {}", name(path)))? == 0 {
                break;
            }
            if text.len() as u64 == LINE_BYTES_MAX && !text.ends_with(b"\n") {
                anyhow::bail!("{}, line {line}, is too long to be a batch", name(path));
            }
            if text.trim_ascii().is_empty() {
                continue;
            }
            match parse(&text, request_bytes_max) {
                Ok(batch) => {
                    let (events, input_bytes) = (u64::from(batch.request.event_count()), text.len() as u64);
                    take(batch, Pending { events, input_bytes, line, file }).await?;
                }
                Err(error) => {
                    eprintln!("{}, line {line}: {error:#}", name(path));
                    *bad += 1;
                }
            }
        }
    }
    Ok(())
}

fn parse(text: &[u8], request_bytes_max: usize) -> anyhow::Result<Batch> {
    let Line { received_at_ms, group, connection_id, request } = serde_json::from_slice(text)?;
    for (name, value) in [("group", &group), ("connection_id", &connection_id)] {
        anyhow::ensure!(value.len() <= CLIENT_NAME_BYTES_MAX, "{name} is longer than {CLIENT_NAME_BYTES_MAX} bytes");
    }
    let request = BASE64_STANDARD.decode(request).context("request is not base64")?;
    let bytes = request.len();
    anyhow::ensure!(
        bytes <= request_bytes_max,
        "the request has {bytes} bytes, ingest.batch_bytes_max is {request_bytes_max}"
    );
    let request = Request::parse(request.into())?;
    Ok(Batch { received_at_ms, client: Client { group: group.into(), id: connection_id.into() }, request })
}

fn name(path: &Path) -> String {
    if path == Path::new("-") { "standard input".into() } else { path.display().to_string() }
}

/// Bytes of all files; of the standard input nobody knows.
fn input_bytes(files: &[PathBuf]) -> u64 {
    files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|metadata| metadata.len()).sum()
}
