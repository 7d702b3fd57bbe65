//! Numbers in words, and the one sentence about a service. As `src/admin/page/words.js` and `path.js` have them.

use super::status::{Log, Reload, Status};

const DAY: f64 = 86_400.0;

/// How bad things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Good,
    Busy,
    Waiting,
    Warning,
    Bad,
}

/// 1234567 as `1,234,567`.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group).into_owned());
    groups.collect::<Vec<_>>().join(",")
}

/// What happens a second.
pub fn rate(value: f64) -> String {
    if value > 0.0 && value < 9.95 { format!("{value:.1}") } else { count(value.max(0.0).round() as u64) }
}

pub fn plural(value: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(value), if value == 1 { one } else { many })
}

pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (value as f64, 0);
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 100.0);
    format!("{value:.decimals$} {}", UNITS[unit])
}

pub fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match seconds {
        _ if seconds < 1.0 => "under 1 s".into(),
        _ if seconds < 90.0 => format!("{seconds:.0} s"),
        _ if minutes < 90 => format!("{minutes} min"),
        _ if seconds < 2.0 * DAY => format!("{} h {} min", minutes / 60, minutes % 60),
        _ if seconds < 365.0 * DAY => format!("{:.0} days", seconds / DAY),
        _ => "over a year".into(),
    }
}

/// What became of a reload: what of it waits for a restart, and what changed.
pub fn reloaded(reload: &Reload) -> (State, String) {
    let pending = format!("restart for {}", reload.restart.join(", "));
    let result = match (&reload.error, reload.changed.is_empty()) {
        (Some(_), _) => "refused, nothing changed: see the log",
        (None, true) => "changed nothing",
        (None, false) => &format!("changed {}", reload.changed.join(", ")),
    };
    match (reload.error.is_some(), reload.restart.is_empty()) {
        (true, true) => (State::Bad, result.to_owned()),
        (true, false) => (State::Bad, format!("{result}; {pending}")),
        (false, true) => (State::Good, result.to_owned()),
        (false, false) => (State::Warning, format!("{result}; {pending}")),
    }
}

/// The one sentence: how bad, headline, explanation. What is worst comes first.
pub fn judge(status: &Status) -> (State, String, String) {
    let say = |state, headline: &str, explanation: &str| (state, headline.to_owned(), explanation.to_owned());
    let full = match status.forecast.full_seconds {
        Some(seconds) => format!("At the present rate the disk is full in {}.", duration(seconds)),
        None => "At the present rate the disk does not fill.".into(),
    };
    let pending = status.wal.as_ref().map_or(0, |log| log.pending_events);
    if status.wal.as_ref().is_some_and(|log| log.failed) {
        return say(State::Bad, "The log has failed", "The process ends and is started again; what was acked is safe.");
    }
    if !status.live {
        return say(State::Bad, "No progress", "A loop of the service hangs. Under systemd it is started again.");
    }
    match status.phase.as_str() {
        "starting" => return say(State::Waiting, "Starting", "The log is being opened."),
        "stopping" => return say(State::Waiting, "Stopping", "What was admitted is made durable and acked."),
        _ => {}
    }
    if status.wal.as_ref().is_some_and(|log| log.full) {
        let explanation = "What was acked is safe. It accepts again once Kafka takes events.";
        return say(State::Bad, "The log is full: batches are refused", explanation);
    }
    let Some(forward) = &status.forward else {
        let kept = plural(pending, "event is", "events are");
        return say(State::Good, "Collecting only", &format!("No brokers are configured: {kept} kept on disk."));
    };
    if status.is_connecting() {
        return say(State::Waiting, "Connecting to Kafka", "Events are accepted meanwhile.");
    }
    if !forward.connected {
        let since = forward.disconnected_since_ms.map(|at| status.since(at));
        let long = since.map_or(String::new(), |seconds| format!(" for {}", duration(seconds)));
        let explanation = format!("Events are kept on disk. {full}");
        return say(State::Warning, &format!("Kafka is unreachable{long}"), &explanation);
    }
    let drain = status.forecast.drain_seconds.filter(|seconds| *seconds < 7.0 * DAY);
    if let (true, true, Some(seconds)) = (pending > 0, status.waited() > 5.0, drain) {
        let headline = format!("Catching up: drained in about {}", duration(seconds.max(1.0)));
        let ahead =
            if forward.live_first { "New events go ahead of the backlog." } else { "More goes out than comes in." };
        return say(State::Busy, &headline, ahead);
    }
    if pending > 0 && forward.live_first {
        let explanation = format!("The oldest of it has waited for {}. {full}", duration(status.waited()));
        return say(State::Busy, "New events go ahead of the backlog", &explanation);
    }
    if pending > 0 && status.waited() > 60.0 {
        let explanation = format!("The oldest for {}. {full}", duration(status.waited()));
        return say(State::Warning, "Kafka is reachable, but events wait", &explanation);
    }
    let damaged = status.wal.as_ref().map_or(0, Log::damaged_parts);
    if damaged > 0 {
        let headline =
            plural(damaged, "damaged part of the log is set aside", "damaged parts of the log are set aside");
        return say(State::Warning, &headline, "Stop the service and run `ringtail backlog check`.");
    }
    if status.parked.events > 0 {
        let headline = plural(status.parked.events, "event is parked", "events are parked");
        return say(State::Warning, &headline, "Kafka can never take them as they are; the rest flows.");
    }
    say(State::Good, "All is well", "What comes in goes out to Kafka.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::top::status::Forward;

    #[test]
    fn numbers_in_words() {
        assert_eq!([count(0), count(999), count(1000), count(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([rate(0.0), rate(0.25), rate(9.96), rate(12_345.6)], ["0", "0.2", "10", "12,346"]);
        assert_eq!([bytes(0), bytes(1536), bytes(200 << 20)], ["0 B", "1.5 KiB", "200 MiB"]);
        let words = [0.5, 42.0, 600.0, 7_500.0, 864_000.0].map(duration);
        assert_eq!(words, ["under 1 s", "42 s", "10 min", "2 h 5 min", "10 days"]);
    }

    #[test]
    fn a_reload_in_words() {
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        let say = |error: Option<&str>, changed, restart| {
            let error = error.map(str::to_owned);
            reloaded(&Reload { at_ms: 1, error, changed: keys(changed), restart: keys(restart) })
        };
        assert_eq!(say(None, &[], &[]), (State::Good, "changed nothing".into()));
        let both = say(None, &["log.level", "forward.topic"], &["wal.bytes_max"]);
        assert_eq!(both, (State::Warning, "changed log.level, forward.topic; restart for wal.bytes_max".into()));
        assert_eq!(say(Some("no"), &[], &[]), (State::Bad, "refused, nothing changed: see the log".into()));
    }

    #[test]
    fn what_is_worst_is_said() {
        let forward = Some(Forward { connected: true, ..Forward::default() });
        let well = Status {
            live: true,
            phase: "serving".into(),
            uptime_seconds: 60,
            wal: Some(Log::default()),
            forward,
            ..Status::default()
        };
        assert_eq!(judge(&well).0, State::Good);
        let damaged = Log { quarantined_segments: 1, quarantined_stores: 2, ..Log::default() };
        let damaged = Status { wal: Some(damaged), ..well };
        assert_eq!(judge(&damaged).1, "3 damaged parts of the log are set aside");
        let store = Log { quarantined_stores: 1, ..Log::default() };
        let store = Status { wal: Some(store), ..damaged };
        assert_eq!(judge(&store).1, "1 damaged part of the log is set aside");
        let ahead = Forward { connected: true, live_first: true, ..Forward::default() };
        let pending = Log { pending_events: 1, ..Log::default() };
        let ahead = Status { wal: Some(pending), forward: Some(ahead), ..store };
        assert_eq!(judge(&ahead).1, "New events go ahead of the backlog");
        let cut = Status { forward: Some(Forward::default()), ..ahead };
        assert_eq!(judge(&cut).1, "Kafka is unreachable");
        let full = Status { wal: Some(Log { full: true, ..Log::default() }), ..cut };
        assert_eq!(judge(&full).0, State::Bad);
        assert_eq!(judge(&Status { live: false, ..full }).1, "No progress");
    }
}
