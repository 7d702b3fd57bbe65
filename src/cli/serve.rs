//! `ringtail serve`: the service.

use std::process::ExitCode;

use ringtail::app::{App, Reloader};
use ringtail::config::{Changes, Loaded};
use ringtail::inherited::Inherited;
use ringtail::{shutdown, wal};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::config::ConfigFile;
use super::logging::{self, LogLevel};

/// Run the service: take batches from clients, keep them on disk, forward them to Kafka
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail serve --config /etc/ringtail/ringtail.toml\n\n\
    In the place of a Raccoon:\n  ringtail config show --raccoon-env /etc/raccoon/.env\n  \
    ringtail serve --raccoon-env /etc/raccoon/.env\n\n\
    Exit codes: 0 after a clean stop, 64 for bad usage or configuration, 1 for anything else.")]
pub struct ServeArgs {
    #[command(flatten)]
    file: ConfigFile,
}

/// Runs `ringtail serve` until SIGTERM or SIGINT.
pub async fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let loaded = match args.file.load(&[]) {
        Ok(loaded) => loaded,
        Err(exit_code) => return Ok(exit_code),
    };
    let log_level = logging::init(&loaded.config.log)?;
    // SAFETY: nothing else in this process takes them.
    let inherited = unsafe { Inherited::take() };
    // From here on a SIGHUP waits, and does not end the process.
    let hangup = signal(SignalKind::hangup())?;
    wal::exit_on_store_panic();
    let stop = shutdown::on_signals()?;
    let file = loaded.file.as_ref().map_or("none".into(), |file| file.display().to_string());
    let directory = loaded.config.wal.directory.display();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = file, %directory, "starting");
    report_raccoon(&loaded);
    let file = args.file.pinned(&loaded);
    let app = tokio::select! {
        app = App::start_on(loaded.config, loaded.file, inherited) => app?,
        () = stop.cancelled() => {
            shutdown::notify_stopping("the log was being opened");
            tracing::info!("stopped while the log was being opened");
            // Not by returning: the runtime would wait until the log is open.
            std::process::exit(0);
        }
    };
    tokio::spawn(reload_on(hangup, Reload { file, log_level, reloader: app.reloader() }, stop.clone()));
    if let Err(error) = app.run(stop).await {
        tracing::error!("{error}");
        shutdown::notify_status(&error.to_string());
        // Not by returning: the runtime would wait for a thread that hangs with the log.
        std::process::exit(1);
    }
    Ok(ExitCode::SUCCESS)
}

/// What a reload needs.
struct Reload {
    file: ConfigFile,
    log_level: LogLevel,
    reloader: Reloader,
}

/// Reads the configuration again at each SIGHUP, until the service stops.
async fn reload_on(mut hangup: Signal, reload: Reload, stop: CancellationToken) {
    while let Some(Some(())) = stop.run_until_cancelled(hangup.recv()).await {
        shutdown::notify_reloading();
        let status = reload.run();
        // "Ready" takes back a "stopping".
        if !stop.is_cancelled() {
            shutdown::notify_ready(&status);
        }
    }
}

impl Reload {
    /// Takes over what can change while the service runs. Says in a line what came of it.
    fn run(&self) -> String {
        let loaded = match self.file.read(&[]) {
            Ok(loaded) => loaded,
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                tracing::error!(error, "reload refused, nothing has changed");
                self.reloader.refuse(error);
                return "reload refused, nothing has changed: see the log".into();
            }
        };
        let Changes { live, restart } = self.reloader.apply(&loaded.config);
        if let Err(error) = self.log_level.set(&loaded.config.log.level) {
            tracing::error!(error = format!("{error:#}"), "log.level has not changed");
        }
        tracing::info!(changed = live.join(", "), "configuration read again");
        if !restart.is_empty() {
            tracing::warn!(keys = restart.join(", "), "changed in the configuration, takes effect at the next start");
        }
        "configuration read again".into()
    }
}

/// Says once what was taken over and what has no effect.
fn report_raccoon(loaded: &Loaded) {
    let Some(env) = &loaded.raccoon else { return };
    let without = env.settings.iter().filter(|setting| setting.unsupported().is_some()).count();
    let (taken, file) = (env.settings.len() - without, env.path.display());
    tracing::info!(%file, taken, without_effect = without, "raccoon settings taken over");
    for setting in &env.settings {
        if let Some(reason) = setting.unsupported() {
            tracing::warn!(setting = setting.variable, reason, "raccoon setting has no effect");
        }
    }
}
