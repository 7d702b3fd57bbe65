//! The `ringtail` command.

use std::process::ExitCode;

use clap::Parser;

mod cli;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 64 } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    cli::run(cli).await.unwrap_or_else(|error| {
        eprintln!("ringtail: {error:#}");
        ExitCode::FAILURE
    })
}
