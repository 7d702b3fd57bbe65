//! `ringtail parked export`: parked events as JSON lines that `ringtail backlog import` takes, or their payloads alone.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use prost::Message;
use ringtail::admin::{ParkedLine, ParkedList};
use ringtail::config::Config;
use ringtail::forward::{ParkedAbout, ParkedEvent};
use ringtail::proto;
use serde::Serialize;

use super::super::backlog::count;
use super::super::backlog::export::write_file;
use super::super::config::LogArgs;
use super::filter::FilterArgs;
use super::{Outcome, perform};

const HELP: &str = "\
Examples:
  ringtail parked export --topic clickstream-page-log --output parked.jsonl
  ringtail parked export --reason too_large --lines | jq .

Writes one JSON object an event and line:
  id, reason, error, topic, key, event_type, group, connection_id, req_guid, sequence, received_at_ms, parked_at_ms
  payload          the event's bytes, in base64
  request          a protobuf SendEventRequest with this event alone, in base64
`ringtail backlog import` puts the event into a log, for the topic of its type. What is exported stays parked:
`ringtail parked drop` takes it out.

--raw writes the payloads alone, each after its length as a protobuf varint, as `ringtail backlog export --raw` does.
--lines writes one payload a line, and refuses those that hold a line break.

Exit codes: 0; 1 if an event is damaged or refused; 64 for bad usage.";

/// Write parked events as JSON lines, or the payloads alone
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub struct ExportArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Payloads alone, each after its length as a varint
    #[arg(long)]
    raw: bool,
    /// Payloads alone, one a line
    #[arg(long, conflicts_with = "raw")]
    lines: bool,
    /// Leave `payload` out: half the size, and imports just the same
    #[arg(long, conflicts_with_all = ["raw", "lines"])]
    compact: bool,
    /// File to write, which must not exist; it appears when it is complete and durable. Without it the standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    filter: FilterArgs,
}

/// What a line holds.
#[derive(Serialize)]
struct Line<'a> {
    id: u64,
    #[serde(flatten)]
    about: &'a ParkedAbout,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<String>,
    request: String,
}

#[derive(Clone, Copy)]
enum Form {
    Json { payloads: bool },
    Raw,
    Lines,
}

/// Runs the command.
pub async fn run(args: ExportArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let form = match (args.raw, args.lines) {
        (true, _) => Form::Raw,
        (_, true) => Form::Lines,
        _ => Form::Json { payloads: !args.compact },
    };
    let command = ParkedList { filter: args.filter.filter(), summary: false };
    let (outcome, refused) = match &args.output {
        None => {
            let mut output = BufWriter::new(io::stdout());
            let done = export(&config, &command, form, &mut output).await?;
            output.flush().context("write to standard output")?;
            done
        }
        Some(path) => {
            let runtime = tokio::runtime::Handle::current();
            tokio::task::block_in_place(|| {
                write_file(path, |output| runtime.block_on(export(&config, &command, form, output)))
            })?
        }
    };
    let progress = outcome.progress;
    eprintln!("exported {}, {}", count(progress.events - refused, "event"), bytesize::ByteSize::b(progress.bytes));
    Ok(if refused == 0 { outcome.code() } else { ExitCode::FAILURE })
}

/// Writes the events; also says how many were refused.
async fn export(
    config: &Config,
    command: &ParkedList,
    form: Form,
    output: &mut dyn Write,
) -> anyhow::Result<(Outcome, u64)> {
    let mut refused = 0;
    let outcome = perform(config, command, &mut |line| {
        let ParkedLine::Event(event) = line else { return Ok(()) };
        if matches!(form, Form::Lines) && event.payload.contains(&b'\n') {
            eprintln!("ringtail: the payload of parked event {} holds a line break, left out", event.id);
            refused += 1;
            return Ok(());
        }
        write_event(&event, form, output).context("write the export")
    })
    .await?;
    Ok((outcome, refused))
}

fn write_event(event: &ParkedEvent, form: Form, output: &mut dyn Write) -> io::Result<()> {
    match form {
        Form::Raw => {
            let mut length = Vec::new();
            prost::encode_length_delimiter(event.payload.len(), &mut length).expect("a Vec has room");
            output.write_all(&length)?;
            output.write_all(&event.payload)
        }
        Form::Lines => {
            output.write_all(&event.payload)?;
            output.write_all(b"\n")
        }
        Form::Json { payloads } => {
            let about = &event.about;
            let request = proto::SendEventRequest {
                req_guid: about.req_guid.clone(),
                sent_time: None,
                events: vec![proto::Event {
                    event_bytes: event.payload.to_vec().into(),
                    r#type: about.event_type.clone(),
                }],
            };
            let line = Line {
                id: event.id,
                about,
                payload: payloads.then(|| BASE64_STANDARD.encode(&event.payload)),
                request: BASE64_STANDARD.encode(request.encode_to_vec()),
            };
            serde_json::to_writer(&mut *output, &line)?;
            output.write_all(b"\n")
        }
    }
}
