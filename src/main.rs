//! `ringtail`: arguments in, exit code out.

mod cli;

use std::process::ExitCode;

/// glibc keeps what it freed; this gives it back after a burst.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = match cli::Cli::from_args() {
        Ok(cli) => cli,
        Err(exit_code) => return exit_code,
    };
    run(cli).unwrap_or_else(|error| {
        eprintln!("ringtail: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(cli: cli::Cli) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(cli.run())
}
