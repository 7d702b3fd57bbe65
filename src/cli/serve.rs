//! `ringtail serve`: the service.

use std::process::ExitCode;

use ringtail::app::App;
use ringtail::config::Loaded;
use ringtail::{shutdown, wal};

use super::config::ConfigFile;
use super::logging;

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
    logging::init(&loaded.config.log)?;
    wal::exit_on_store_panic();
    let stop = shutdown::on_signals()?;
    let file = loaded.file.as_ref().map_or("none".into(), |file| file.display().to_string());
    let directory = loaded.config.wal.directory.display();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = file, %directory, "starting");
    report_raccoon(&loaded);
    let app = App::start(loaded.config).await?;
    if let Err(error) = app.run(stop).await {
        tracing::error!("{error}");
        shutdown::notify_status(&error.to_string());
        // Not by returning: the runtime would wait for a thread that hangs with the log.
        std::process::exit(1);
    }
    Ok(ExitCode::SUCCESS)
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
