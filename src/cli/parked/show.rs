//! `ringtail parked show`: everything about single events.

use std::collections::BTreeSet;
use std::process::ExitCode;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ringtail::admin::{ParkedLine, ParkedList};
use ringtail::forward::{ParkedEvent, ParkedFilter};

use super::super::backlog::print;
use super::super::config::LogArgs;
use super::list::time;
use super::perform;

/// Print everything about single parked events, with their payloads
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ringtail parked show 17\n  ringtail parked show 17 --json | jq -r .payload | base64 -d\n\n\
    The payload stands below the rest: as text if it is UTF-8 (control characters escaped), else in base64. With --json it is\n\
    always base64.\n\n\
    Exit codes: 0; 1 if an event is not there or damaged; 64 for bad usage."
)]
pub struct ShowArgs {
    #[command(flatten)]
    log: LogArgs,
    /// JSON lines
    #[arg(long)]
    json: bool,
    /// Ids, as `ringtail parked list` prints them
    #[arg(value_name = "ID", required = true)]
    ids: Vec<u64>,
}

/// Runs the command.
pub async fn run(args: ShowArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let ids: BTreeSet<u64> = args.ids.iter().copied().collect();
    let filter = ParkedFilter { ids: ids.clone(), ..ParkedFilter::default() };
    let mut missing = ids;
    let outcome = perform(&config, &ParkedList { filter, summary: false }, &mut |line| {
        let ParkedLine::Event(event) = line else { return Ok(()) };
        missing.remove(&event.id);
        print(&if args.json { serde_json::to_string(&event)? + "\n" } else { describe(&event) })
    })
    .await?;
    if missing.len() as u64 > outcome.damaged {
        for id in &missing {
            eprintln!("ringtail: parked event {id} is not there, or cannot be read");
        }
    }
    Ok(if missing.is_empty() { outcome.code() } else { ExitCode::FAILURE })
}

fn describe(event: &ParkedEvent) -> String {
    let about = &event.about;
    let key = about.key.as_deref().map_or_else(|| "(none)".into(), |key| key.escape_debug().to_string());
    let mut text = format!(
        "id             {}\n\
         reason         {}\n\
         error          {}\n\
         topic          {}\n\
         key            {key}\n\
         type           {}\n\
         group          {}\n\
         connection id  {}\n\
         req_guid       {}\n\
         sequence       {}\n\
         received       {}\n\
         parked         {}\n",
        event.id,
        about.reason.as_str(),
        about.error.escape_debug(),
        about.topic.escape_debug(),
        about.event_type.escape_debug(),
        about.group.escape_debug(),
        about.connection_id.escape_debug(),
        about.req_guid.escape_debug(),
        about.sequence.0,
        time(about.received_at_ms),
        time(about.parked_at_ms),
    );
    let bytes = event.payload.len();
    match std::str::from_utf8(&event.payload) {
        Ok(payload) => text += &format!("payload        {bytes} bytes of text\n\n{}\n\n", printable(payload)),
        Err(_) => {
            text +=
                &format!("payload        {bytes} bytes, in base64\n\n{}\n\n", BASE64_STANDARD.encode(&event.payload));
        }
    }
    text
}

/// Without what a terminal could take for a command.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_control() && !matches!(char, '\n' | '\t') {
            printable.extend(char.escape_debug());
        } else {
            printable.push(char);
        }
    }
    printable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_but_text() {
        assert_eq!(printable("a\tb\nü\u{1b}[31m\r\u{9b}"), "a\tb\nü\\u{1b}[31m\\r\\u{9b}");
    }
}
