//! How the process begins and ends: signals, and what systemd is told.
//!
//! Outside systemd, where `NOTIFY_SOCKET` is not set, the notifications do nothing.

use std::io;
use std::process;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// Longest standstill of a loop that is taken for a slow disk.
const STANDSTILL_MAX: Duration = Duration::from_secs(30);

/// How often systemd is told that the log is being opened, and how long it is to wait for the next time.
const OPENING_INTERVAL: Duration = Duration::from_secs(5);
const OPENING_PATIENCE: Duration = Duration::from_secs(60);

/// Returns a token that SIGTERM or SIGINT cancels. A second SIGINT ends the process at once, with exit code 1: what was
/// acked is durable already. Must be called inside a runtime.
///
/// # Errors
/// The signal handlers cannot be installed.
pub fn on_signals() -> io::Result<CancellationToken> {
    let terminate = signal(SignalKind::terminate())?;
    let interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    tokio::spawn(watch_signals(terminate, interrupt, token.clone()));
    Ok(token)
}

async fn watch_signals(mut terminate: Signal, mut interrupt: Signal, token: CancellationToken) {
    loop {
        let name = tokio::select! {
            Some(()) = terminate.recv() => "SIGTERM",
            Some(()) = interrupt.recv() => "SIGINT",
            else => return,
        };
        if !token.is_cancelled() {
            info!(signal = name, "stopping");
            token.cancel();
        } else if name == "SIGINT" {
            warn!(signal = name, "second signal, ending at once");
            process::exit(1);
        }
    }
}

/// Tells systemd that the service accepts batches, with a line for `systemctl status`.
pub fn notify_ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Waits for the log to be opened. Tells systemd meanwhile that it is being opened, and that this takes the time it takes: a
/// start that is given up begins from the front.
pub async fn while_opening<T>(opening: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let mut ticks = tokio::time::interval(OPENING_INTERVAL);
    let mut opening = std::pin::pin!(opening);
    loop {
        tokio::select! {
            opened = &mut opening => return opened,
            _ = ticks.tick() => {
                let status = format!("opening the log, for {} seconds", began.elapsed().as_secs());
                let more = u32::try_from(OPENING_PATIENCE.as_micros()).expect("it is less than an hour");
                notify(&[NotifyState::Status(&status), NotifyState::ExtendTimeoutUsec(more)]);
            }
        }
    }
}

/// Tells systemd that the service reads its configuration again; to be followed by [`notify_ready`].
pub fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => debug!(%error, "systemd was not notified"),
    }
}

/// Tells systemd that the service is stopping, with a line for `systemctl status`.
pub fn notify_stopping(status: &str) {
    notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Changes the line of `systemctl status`. One line, without line breaks.
pub fn notify_status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "systemd was not notified");
    }
}

/// How long a loop may stand still: half of the watchdog's interval, if there is one, and never longer than 30 seconds.
pub fn progress_patience() -> Duration {
    let watchdog = sd_notify::watchdog_enabled().map(|interval| interval / 2);
    watchdog.unwrap_or(Duration::MAX).min(STANDSTILL_MAX)
}

/// Feeds systemd's watchdog, at half of the interval that the unit asks for, as long as `is_live` says so. Returns at
/// once if the unit asks for none; otherwise runs until it is dropped, so it also covers the drain.
pub async fn feed_watchdog(is_live: impl Fn() -> bool) {
    let Some(timeout) = sd_notify::watchdog_enabled() else { return };
    debug!(?timeout, "feeding the watchdog");
    feed(timeout / 2, is_live, || notify(&[NotifyState::Watchdog])).await;
}

async fn feed(period: Duration, is_live: impl Fn() -> bool, feed: impl Fn()) {
    let mut ticks = tokio::time::interval(period.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_live = true;
    loop {
        ticks.tick().await;
        let live = is_live();
        if live {
            feed();
        }
        if live != was_live {
            was_live = live;
            if live {
                warn!("making progress again");
            } else {
                error!("no progress, the watchdog is not fed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_only_while_live() {
        let live = Arc::new(AtomicBool::new(true));
        let fed = Arc::new(AtomicU32::new(0));
        let task = tokio::spawn({
            let (live, fed) = (live.clone(), fed.clone());
            let is_live = move || live.load(Ordering::Relaxed);
            let count = move || {
                fed.fetch_add(1, Ordering::Relaxed);
            };
            async move { feed(Duration::from_secs(5), is_live, count).await }
        });
        let after = async |seconds| {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            fed.swap(0, Ordering::Relaxed)
        };
        assert_eq!(after(11).await, 3);
        live.store(false, Ordering::Relaxed);
        assert_eq!(after(60).await, 0);
        live.store(true, Ordering::Relaxed);
        assert_eq!(after(10).await, 2);
        task.abort();
    }

    #[tokio::test]
    async fn sigterm_cancels_the_token() {
        let token = on_signals().unwrap();
        assert!(!token.is_cancelled());
        // SAFETY: raise has no preconditions, and on_signals has installed a handler.
        unsafe { libc::raise(libc::SIGTERM) };
        token.cancelled().await;
    }
}
