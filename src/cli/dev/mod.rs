//! `ringtail dev`: the whole path in one process, with an outage, to look at.

mod broker;
mod demo;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use bytesize::ByteSize;
use ringtail::app::{Addresses, App};
use ringtail::config::{Config, KafkaProperty, LogConfig};
use ringtail::shutdown;
use tokio_util::sync::CancellationToken;

use super::logging;
use broker::{Arrived, Broker};
use demo::Demo;

/// See the whole path at work on this machine: clients, log, an embedded broker, and an outage
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail dev\n\n\
    Everything runs on loopback, the log is in a temporary directory. Ctrl-C ends it and removes the log.")]
pub struct DevArgs {
    /// Do not print the events that arrive
    #[arg(long)]
    quiet: bool,
}

/// Runs `ringtail dev` until Ctrl-C.
pub async fn run(args: DevArgs) -> anyhow::Result<ExitCode> {
    // The outage is staged: what the Kafka client says about it would only disturb.
    logging::init(&LogConfig {
        level: "warn,ringtail::forward=error,rdkafka=off,librdkafka=off".into(),
        ..LogConfig::default()
    })?;
    let stop = shutdown::on_signals()?;
    let directory =
        tempfile::Builder::new().prefix("ringtail-dev-").tempdir().context("make a directory for the log")?;
    let broker = Broker::start()?;
    let mut arrivals = broker.arrivals()?;
    let mut config = config(&broker);
    config.wal.directory = directory.path().into();
    let app = App::start(config).await?;
    let (addresses, wal) = (app.addresses(), app.wal());
    let mut service = tokio::spawn(app.run(stop.clone()));

    println!("ringtail {}, everything in one process:", env!("CARGO_PKG_VERSION"));
    println!("  clients → ws/http {} · grpc {}", addresses.http, addresses.grpc);
    println!("  log     → {}", directory.path().display());
    println!("  broker  → {} (embedded, in memory)", broker.address());
    let demo = Demo::new(addresses, wal, &broker, args.quiet);
    let show = async {
        demo.run(&mut arrivals).await?;
        print_invitation(addresses);
        show_arrivals(&mut arrivals, args.quiet, &stop).await;
        anyhow::Ok(())
    };
    tokio::select! {
        shown = stop.run_until_cancelled(show) => {
            shown.transpose()?;
            println!("\nstopping");
            service.await
        }
        // Before Ctrl-C only by a failure of the log.
        ended = &mut service => ended,
    }
    .context("the service panicked")??;
    Ok(ExitCode::SUCCESS)
}

fn config(broker: &Broker) -> Config {
    let mut config = Config::default();
    config.ingest.http.listen = loopback(8080);
    config.ingest.grpc.listen = loopback(8081);
    config.admin.listen = loopback(9464);
    config.wal.free_bytes_min = ByteSize::b(0);
    config.wal.bytes_max = ByteSize::gib(1);
    config.forward.brokers = vec![broker.address()];
    config.forward.stop_timeout = Duration::from_secs(2);
    // The staged outage lasts seconds: come back at once.
    config.forward.kafka.insert("reconnect.backoff.max.ms".into(), KafkaProperty::Integer(250));
    config
}

/// The usual port if it is free, any other if not.
fn loopback(port: u16) -> SocketAddr {
    let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    if TcpListener::bind(usual).is_ok() { usual } else { (Ipv4Addr::LOCALHOST, 0).into() }
}

fn print_invitation(addresses: Addresses) {
    let Addresses { http, grpc, admin } = addresses;
    println!("\nNow send your own. Paste into another terminal:\n");
    println!("  curl http://{http}/api/v1/events -H 'X-User-ID: me' -H 'Content-Type: application/json' \\");
    println!("    -d '{{\"req_guid\":\"1\",\"events\":[{{\"type\":\"hello\",\"event_bytes\":\"aGVsbG8=\"}}]}}'");
    println!("  echo 'hello again' | ringtail send --url ws://{http} --id me --type hello");
    println!("  echo 'and again' | ringtail send --url grpc://{grpc} --id me --type hello");
    println!("  curl http://{admin}/status");
    println!("  curl http://{admin}/metrics\n");
    println!("(without an installed ringtail: cargo run --release -- send …)");
    println!("The status page is http://{admin}/. Ctrl-C ends this.\n");
}

async fn show_arrivals(arrivals: &mut tokio::sync::mpsc::Receiver<Arrived>, quiet: bool, stop: &CancellationToken) {
    while let Some(Some(event)) = stop.run_until_cancelled(arrivals.recv()).await {
        if !quiet {
            print_arrival(&event);
        }
    }
}

fn print_arrival(event: &Arrived) {
    let Arrived { topic, partition, offset, key, value } = event;
    let (key, value) = (printable(key), printable(value));
    println!("  arrived  {topic} [{partition}] @{offset}  key {key}  {value}");
}

/// The beginning of `bytes` as text, whatever they are.
fn printable(bytes: &[u8]) -> String {
    const SHOWN: usize = 60;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]).replace(char::is_control, "·");
    if bytes.len() > SHOWN { format!("{text}… ({} bytes)", bytes.len()) } else { text }
}
