//! `ringtail completions` and `ringtail man`: what a package installs beside the binary, made from the command line itself.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::shells::{Bash, Fish, Zsh};

/// Print a shell's completions
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail completions bash > /etc/bash_completion.d/ringtail")]
pub struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Write the man pages, one for each command
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Directory to write to; made if it is not there
    directory: PathBuf,
}

/// Runs `ringtail completions`.
pub fn completions(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut command = super::Cli::command();
    let mut script = Vec::new();
    match args.shell {
        Shell::Bash => clap_complete::generate(Bash, &mut command, "ringtail", &mut script),
        Shell::Zsh => clap_complete::generate(Zsh, &mut command, "ringtail", &mut script),
        Shell::Fish => clap_complete::generate(Fish, &mut command, "ringtail", &mut script),
    }
    io::stdout().write_all(&script).context("write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `ringtail man`.
pub fn man(args: &ManArgs) -> anyhow::Result<ExitCode> {
    let directory = &args.directory;
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut command = super::Cli::command().disable_help_subcommand(true);
    command.build();
    let pages = write_pages(&command, directory)?;
    eprintln!("wrote {pages} man pages to {}", directory.display());
    Ok(ExitCode::SUCCESS)
}

/// Writes the pages of a command and of those below it. Returns how many.
fn write_pages(command: &Command, directory: &Path) -> anyhow::Result<usize> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let path = directory.join(format!("{name}.1"));
    fs::write(&path, page(command, name)?).with_context(|| format!("cannot write {}", path.display()))?;
    let mut pages = 1;
    for command in command.get_subcommands() {
        pages += write_pages(command, directory)?;
    }
    Ok(pages)
}

fn page(command: &Command, name: &str) -> io::Result<String> {
    let version = concat!("ringtail ", env!("CARGO_PKG_VERSION"));
    let man = clap_mangen::Man::new(command.clone()).title(name.to_uppercase()).source(version).manual("Ringtail");
    let mut page = Vec::new();
    man.render(&mut page)?;
    let page = String::from_utf8(page).map_err(io::Error::other)?;
    // What follows the options is an example everywhere.
    Ok(page.replace(".SH EXTRA\n", ".SH EXAMPLES\n"))
}
