//! `ringtail`: arguments in, exit code out.

mod cli;

use std::process::ExitCode;

/// glibc keeps what it freed; this gives it back after a burst.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How: free pages return to the system after a second, by a thread of jemalloc's own; few arenas, because each keeps
/// some. jemalloc reads this symbol before `main`; the environment variable `MALLOC_CONF` goes on top.
#[allow(non_upper_case_globals)]
// SAFETY: the name and type are jemalloc's (`const char *malloc_conf`, weak there), and the text ends with a zero.
#[unsafe(export_name = "malloc_conf")]
static malloc_conf: Option<&'static std::ffi::c_char> =
    // SAFETY: points to the first byte of a static that is never written.
    Some(unsafe { &*c"background_thread:true,narenas:4,dirty_decay_ms:1000,muzzy_decay_ms:0".as_ptr() });

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
    ringtail::descriptors::raise_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(cli.run())
}
