//! `ringtail top`: the status page in a terminal, over the admin port.
//!
//! Asks `/status` every [`PERIOD`]. `view.rs` draws it; `status.rs` says what of it is known here, so that an older or newer
//! service is shown as far as it goes.

mod status;
mod view;
mod words;

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::config::ConfigFile;
use status::{Answer, History, Status};

/// Time between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// Longest that the service may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Size of a frame that goes elsewhere than to a terminal.
const FRAME: (u16, u16) = (80, 24);

/// Show the path of a batch live in the terminal: clients, log, Kafka
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail top\n\nOf another host, through ssh:\n  \
    ssh -L 9464:127.0.0.1:9464 edge-17\n  ringtail top --url http://127.0.0.1:9464\n\n\
    q ends it. Exit codes: 0, 1 if with --once the service did not answer, 64 for bad usage.")]
pub struct TopArgs {
    #[command(flatten)]
    file: ConfigFile,
    /// Address of the service's admin port; without it admin.listen in the configuration
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Print one frame as text and end
    #[arg(long)]
    once: bool,
    /// With --once, print the service's own answer, /status of its admin port, as JSON
    #[arg(long, requires = "once")]
    json: bool,
}

/// Runs `ringtail top`.
pub async fn run(args: TopArgs) -> anyhow::Result<ExitCode> {
    let authority = match &args.url {
        Some(url) => match parse_url(url) {
            Some(authority) => authority,
            None => {
                eprintln!("ringtail: {url:?} is not a URL such as http://127.0.0.1:9464");
                return Ok(ExitCode::from(super::EXIT_USAGE));
            }
        },
        None => match args.file.load(&[]) {
            Ok(loaded) => local(loaded.config.admin.listen).to_string(),
            Err(exit_code) => return Ok(exit_code),
        },
    };
    if args.json {
        let status: serde_json::Value = get(&authority, "/status").await?;
        return print(&(serde_json::to_string_pretty(&status)? + "\n"));
    }
    if args.once {
        return once(&authority).await;
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        eprintln!("ringtail: top needs a terminal; --once prints one frame as text");
        return Ok(ExitCode::from(super::EXIT_USAGE));
    }
    let mut terminal = ratatui::try_init().context("set up the terminal")?;
    let result = live(&authority, &mut terminal).await;
    ratatui::restore();
    result.map(|()| ExitCode::SUCCESS)
}

/// Host and port of `http://host:port/`; the port is 9464 if it says none.
fn parse_url(url: &str) -> Option<String> {
    let uri: hyper::Uri = if url.contains("://") { url.parse() } else { format!("http://{url}").parse() }.ok()?;
    let plain = uri.scheme_str() == Some("http") && matches!(uri.path(), "/" | "" | "/status");
    let (host, port) = (uri.host().filter(|_| plain)?, uri.port_u16().unwrap_or(9464));
    Some(format!("{host}:{port}"))
}

/// Where a service of this host answers that listens on `address`.
fn local(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    address
}

async fn once(authority: &str) -> anyhow::Result<ExitCode> {
    let answer = Answer { status: Some(get(authority, "/status").await?), ..Answer::new(authority) };
    let answer = Answer { history: get(authority, "/history").await?, ..answer };
    let mut terminal = Terminal::new(TestBackend::new(FRAME.0, FRAME.1))?;
    terminal.draw(|frame| view::draw(frame, &answer))?;
    print(&as_text(terminal.backend().buffer()))
}

fn print(text: &str) -> anyhow::Result<ExitCode> {
    io::stdout().write_all(text.as_bytes()).context("write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn as_text(buffer: &Buffer) -> String {
    let rows = buffer.content.chunks(usize::from(buffer.area.width));
    let rows = rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned() + "\n");
    rows.collect()
}

async fn live(authority: &str, terminal: &mut ratatui::DefaultTerminal) -> anyhow::Result<()> {
    let mut keys = keys();
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let stop = ringtail::shutdown::on_signals().context("handle signals")?;
    let mut answer = Answer::new(authority);
    terminal.draw(|frame| view::draw(frame, &answer))?;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            key = keys.recv() => match key {
                Some(Key::Redraw) => {}
                Some(Key::End) | None => return Ok(()),
            },
            _ = ticks.tick() => look(authority, &mut answer).await,
        }
        terminal.draw(|frame| view::draw(frame, &answer))?;
    }
}

/// Asks the service. What it said last is still shown if it does not answer.
async fn look(authority: &str, answer: &mut Answer) {
    match get::<Status>(authority, "/status").await {
        Ok(status) => {
            let known = !answer.history.samples.is_empty() && answer.error.is_none();
            if let (false, Ok(history)) = (known, get::<History>(authority, "/history").await) {
                answer.history = history;
            }
            answer.history.extend(&status.recent);
            (answer.status, answer.error) = (Some(status), None);
        }
        Err(error) => answer.error = Some(format!("{error:#}")),
    }
}

enum Key {
    Redraw,
    End,
}

/// Keys and changes of the terminal's size, read by a thread that the end of the process ends.
fn keys() -> mpsc::Receiver<Key> {
    let (send, receive) = mpsc::channel(8);
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            let key = match event {
                Event::Resize(..) => Key::Redraw,
                Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => Key::End,
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::End,
                    _ => continue,
                },
                _ => continue,
            };
            if send.blocking_send(key).is_err() {
                return;
            }
        }
    });
    receive
}

async fn get<T: serde::de::DeserializeOwned>(authority: &str, path: &str) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(PATIENCE, ask(authority, path)).await;
    let body = answer.unwrap_or_else(|_| bail!("no answer within {} seconds", PATIENCE.as_secs()));
    let body = body.with_context(|| format!("no answer from {authority}"))?;
    serde_json::from_slice(&body).with_context(|| format!("{authority}{path} is not that of a Ringtail"))
}

async fn ask(authority: &str, path: &str) -> anyhow::Result<Bytes> {
    let stream = TcpStream::connect(authority).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, authority).body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        bail!("it answered {}", response.status());
    }
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    Ok(body.map_err(|error| anyhow::anyhow!(error))?.to_bytes())
}
