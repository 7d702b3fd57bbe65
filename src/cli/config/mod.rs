//! `ringtail config`: check, show and write the configuration. Also how every command finds its configuration.

mod check;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use ringtail::config::{Config, ConfigError, DEFAULT_FILE, Files, Loaded, Override, RaccoonSetting, TEMPLATE};

/// Validate, show or write the configuration
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail config check")]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ConfigCommand {
    /// Validate the configuration, and say what a reload of the running service would do: exit code 0, or 64 with every
    /// problem named
    #[command(after_help = "Example:\n  ringtail config check --config /etc/ringtail/ringtail.toml\n\n\
        The service, if one runs on wal.directory, is asked which settings a reload would change at once and which take\n\
        effect at its next start only. That takes root or the service's user.")]
    Check(check::CheckArgs),
    /// Print the effective configuration, and where each value came from
    #[command(after_help = "Example:\n  ringtail config show --raccoon-env /etc/raccoon/.env")]
    Show(ShowArgs),
    /// Write the commented default file
    #[command(after_help = "Example:\n  ringtail config init --output /etc/ringtail/ringtail.toml")]
    Init(InitArgs),
}

/// The configuration that a command works with.
#[derive(Debug, clap::Args)]
pub struct ConfigFile {
    /// Configuration file; without it /etc/ringtail/ringtail.toml, if that exists
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Env file of a Raccoon to take over: its settings win over the configuration file's
    #[arg(long, value_name = "FILE")]
    pub raccoon_env: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct ShowArgs {
    #[command(flatten)]
    file: ConfigFile,
    /// One JSON array of keys, values and sources; with --raccoon-env an object of that and of what became of
    /// Raccoon's settings
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct InitArgs {
    /// File to write; without it the standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite the file if it exists
    #[arg(long, requires = "output")]
    force: bool,
}

impl ConfigFile {
    /// Loads and validates the configuration.
    pub fn read(&self, overrides: &[Override]) -> Result<Loaded, ConfigError> {
        Config::load_files(self.files(), overrides)
    }

    /// The same files for later: a configuration file that was found is not done without when it is gone.
    pub fn pinned(mut self, loaded: &Loaded) -> ConfigFile {
        self.config.clone_from(&loaded.file);
        self
    }

    fn files(&self) -> Files<'_> {
        Files { config: self.config.as_deref(), raccoon_env: self.raccoon_env.as_deref() }
    }

    /// Loads and validates the configuration. Problems are printed, and the exit code is returned.
    pub fn load(&self, overrides: &[Override]) -> Result<Loaded, ExitCode> {
        self.read(overrides).map_err(|error| refuse(&error))
    }
}

/// Prints what is wrong with the configuration.
fn refuse(error: &ConfigError) -> ExitCode {
    eprintln!("ringtail: {}", words(error));
    ExitCode::from(super::EXIT_USAGE)
}

/// What is wrong, with the reason behind it.
fn words(error: &ConfigError) -> String {
    let reason = std::error::Error::source(error).map(|source| format!(": {source}"));
    error.to_string() + &reason.unwrap_or_default()
}

/// The log that a command works with.
#[derive(Debug, clap::Args)]
pub struct LogArgs {
    #[command(flatten)]
    file: ConfigFile,
    /// Directory of the log, instead of wal.directory in the configuration
    #[arg(long, value_name = "DIR")]
    directory: Option<String>,
}

impl LogArgs {
    /// The configuration, with the log's directory. Problems are printed, and the exit code is returned.
    pub fn load(&self) -> Result<Config, ExitCode> {
        let directory = self.directory.iter().map(|directory| Override {
            flag: "--directory",
            key: "wal.directory",
            value: directory.clone(),
        });
        Ok(self.file.load(&directory.collect::<Vec<_>>())?.config)
    }
}

/// Runs `ringtail config`.
pub async fn run(args: ConfigArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        ConfigCommand::Check(args) => check::run(&args).await,
        ConfigCommand::Show(args) => show(&args),
        ConfigCommand::Init(args) => init(&args),
    }
}

fn describe(loaded: &Loaded) -> String {
    let file = loaded.file.as_ref().map_or("defaults, no file".into(), |path| path.display().to_string());
    match &loaded.raccoon {
        Some(env) => format!("{file}, Raccoon's {} and the environment", env.path.display()),
        None if loaded.file.is_some() => format!("{file} and the environment"),
        None => "defaults and the environment, no file".into(),
    }
}

fn show(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let loaded = match args.file.load(&[]) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let text = match (args.json, &loaded.raccoon) {
        (true, None) => serde_json::to_string_pretty(&loaded.settings())? + "\n",
        (true, Some(env)) => {
            let all = serde_json::json!({"settings": loaded.settings(), "raccoon": env});
            serde_json::to_string_pretty(&all)? + "\n"
        }
        (false, _) => format!("# {}\n{}\n{}", describe(&loaded), raccoon_comment(&loaded), loaded.to_annotated_toml()),
    };
    io::stdout().write_all(text.as_bytes()).context("write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// What became of Raccoon's settings, as comments in front of the configuration.
fn raccoon_comment(loaded: &Loaded) -> String {
    let Some(env) = &loaded.raccoon else { return String::new() };
    let (taken, without): (Vec<_>, Vec<_>) = env.settings.iter().partition(|setting| setting.unsupported().is_none());
    let lines = |settings: Vec<&RaccoonSetting>| -> String {
        settings.into_iter().map(|setting| format!("#   {}\n", one_line(&setting.to_line(loaded)))).collect()
    };
    let mut text = format!("#\n# Raccoon's settings in {}, taken over:\n{}", env.path.display(), lines(taken));
    if !without.is_empty() {
        text += &format!("#\n# Without effect, and why:\n{}", lines(without));
    }
    text
}

/// A value may hold line breaks, and a comment ends with its line.
fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn init(args: &InitArgs) -> anyhow::Result<ExitCode> {
    let Some(path) = &args.output else {
        io::stdout().write_all(TEMPLATE.as_bytes()).context("write to standard output")?;
        return Ok(ExitCode::SUCCESS);
    };
    write_template(path, args.force)?;
    eprintln!("wrote {}", path.display());
    if path != Path::new(DEFAULT_FILE) {
        eprintln!("use it with: ringtail serve --config {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn write_template(path: &Path, force: bool) -> anyhow::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true);
    if force {
        options.create(true).truncate(true)
    } else {
        options.create_new(true)
    };
    let mut file = options.open(path).map_err(|error| {
        let exists = error.kind() == io::ErrorKind::AlreadyExists;
        let hint = if exists { ", --force overwrites it" } else { "" };
        anyhow::Error::from(error).context(format!("cannot write {}{hint}", path.display()))
    })?;
    file.write_all(TEMPLATE.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}
