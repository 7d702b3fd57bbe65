//! One frame: the sentence, the path of a batch as three boxes, charts, what is parked, the last errors. Made for 80x24;
//! more room goes to the charts and the errors.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Gauge, Paragraph, Sparkline, Wrap};

use super::status::{Answer, Sample, Status};
use super::words::{State, bytes, count, duration, judge, plural, rate, reloaded};

/// Draws what there is to show.
pub fn draw(frame: &mut Frame<'_>, answer: &Answer) {
    let [title, sentence, path, charts, last, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(3),
        Constraint::Length(8),
        Constraint::Min(5),
        Constraint::Min(4),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    draw_title(frame, title, answer);
    draw_sentence(frame, sentence, answer);
    frame.render_widget(Line::from(" q ends ").dim(), keys);
    let Some(status) = &answer.status else { return };
    let [clients, log, kafka] = Layout::horizontal([Constraint::Ratio(1, 3); 3]).areas(path);
    draw_clients(frame, clients, status);
    draw_log(frame, log, status);
    draw_kafka(frame, kafka, status);
    let [rate_in, rate_out, backlog] = Layout::horizontal([Constraint::Ratio(1, 3); 3]).areas(charts);
    let samples = &answer.history.samples;
    chart(frame, rate_in, "acked/s", Color::Cyan, samples, |sample| sample.committed_events.round() as u64);
    chart(frame, rate_out, "delivered/s", Color::Green, samples, |sample| sample.delivered_events.round() as u64);
    chart(frame, backlog, "backlog", Color::Yellow, samples, |sample| sample.pending_events);
    draw_last(frame, last, status);
}

fn draw_title(frame: &mut Frame<'_>, area: Rect, answer: &Answer) {
    let (left, right) = match &answer.status {
        Some(status) => (
            format!(" Ringtail {} on {}", status.version, status.host),
            format!("up {} ", duration(status.uptime_seconds as f64)),
        ),
        None => (format!(" Ringtail at {}", answer.authority), String::new()),
    };
    let style = Style::new().add_modifier(Modifier::REVERSED);
    frame.render_widget(Line::from(left).style(style), area);
    let width = u16::try_from(right.chars().count()).unwrap_or(0).min(area.width);
    let right_area = Rect { x: area.right() - width, width, ..area };
    frame.render_widget(Line::from(right).style(style), right_area);
}

fn draw_sentence(frame: &mut Frame<'_>, area: Rect, answer: &Answer) {
    let (state, headline, explanation) = match (&answer.status, &answer.error) {
        (None, None) => (State::Waiting, "Asking the service".to_owned(), String::new()),
        (Some(status), None) => judge(status),
        (_, Some(error)) => (State::Bad, "The service does not answer".to_owned(), error.clone()),
    };
    let (lamp, colour) = lamp(state);
    let headline = Line::from(vec![Span::raw(format!(" {lamp} ")).fg(colour).bold(), Span::raw(headline).bold()]);
    let text = vec![Line::raw(""), headline, Line::raw(format!("   {explanation}"))];
    frame.render_widget(Paragraph::new(text), area);
}

fn lamp(state: State) -> (&'static str, Color) {
    match state {
        State::Good => ("✓", Color::Green),
        State::Busy => ("↻", Color::Blue),
        State::Waiting => ("…", Color::Gray),
        State::Warning => ("!", Color::Yellow),
        State::Bad => ("✕", Color::Red),
    }
}

fn boxed<'a>(title: &'a str, colour: Color) -> Block<'a> {
    Block::new().borders(Borders::ALL).title(format!(" {title} ")).border_style(Style::new().fg(colour))
}

/// Names on the left, values on the right.
fn pairs(frame: &mut Frame<'_>, area: Rect, rows: &[(&str, String)]) {
    let width = usize::from(area.width);
    let lines = rows.iter().map(|(name, value)| {
        let gap = width.saturating_sub(name.chars().count() + value.chars().count());
        Line::from(vec![Span::raw(*name).dim(), Span::raw(" ".repeat(gap)), Span::raw(value.as_str())])
    });
    frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>()), area);
}

fn draw_clients(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let (open, limit) = (&status.connections, status.limits.connections_max);
    let refusing = status.rates.rejected_batches >= 0.1;
    let colour = if refusing || open.websocket * 10 > limit * 9 { Color::Yellow } else { Color::Green };
    let block = boxed("Clients", colour);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let refused = match refusing {
        true => format!("{}, {}/s", count(status.totals.rejected_batches), rate(status.rates.rejected_batches)),
        false => count(status.totals.rejected_batches),
    };
    let rows = [
        ("events in", format!("{}/s ▶", rate(status.rates.committed_events))),
        ("WebSocket", count(open.websocket)),
        ("  of at most", count(limit)),
        ("REST", count(open.rest)),
        ("gRPC", count(open.grpc)),
        ("refused", refused),
    ];
    pairs(frame, inner, &rows);
}

fn draw_log(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let Some(log) = &status.wal else {
        frame.render_widget(boxed("Log", Color::Gray), area);
        return;
    };
    // Whichever is less: the log's own limit, or what the file system has left for it.
    let room = log.disk_bytes + status.forecast.headroom_bytes;
    let used = if room > 0 { (log.disk_bytes as f64 / room as f64).min(1.0) } else { 0.0 };
    let colour = match () {
        () if log.full || log.failed => Color::Red,
        () if used >= 0.8 || log.damaged_parts() > 0 => Color::Yellow,
        () => Color::Green,
    };
    let block = boxed("Log", colour);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [rows, gauge] = Layout::vertical([Constraint::Length(5), Constraint::Length(1)]).areas(inner);
    let full = match status.forecast.full_seconds {
        _ if log.full => "now".to_owned(),
        Some(seconds) => duration(seconds),
        None => "not filling".to_owned(),
    };
    let oldest = if log.pending_events > 0 { duration(status.waited()) } else { "–".to_owned() };
    let pending = [
        ("waiting", plural(log.pending_events, "event", "events")),
        ("", bytes(log.pending_bytes)),
        ("oldest", oldest),
        ("disk full in", full),
        ("disk", format!("{} of {}", bytes(log.disk_bytes), bytes(room))),
    ];
    pairs(frame, rows, &pending);
    frame.render_widget(Gauge::default().ratio(used).gauge_style(Style::new().fg(colour)), gauge);
}

fn draw_kafka(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let forward = status.forward.as_ref();
    let (state, colour) = match forward {
        None => ("not configured", Color::Gray),
        Some(forward) if forward.connected => ("connected", Color::Green),
        Some(_) if status.is_connecting() => ("connecting", Color::Gray),
        Some(_) => ("unreachable", Color::Yellow),
    };
    let block = boxed("Kafka", colour);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let waits = status.wal.as_ref().is_some_and(|log| log.pending_events > 0);
    let drained = match status.forecast.drain_seconds {
        _ if !waits => "nothing waits".to_owned(),
        _ if forward.is_some_and(|forward| forward.connected) && status.waited() < 2.0 => "at once".to_owned(),
        Some(seconds) => duration(seconds),
        None => "not shrinking".to_owned(),
    };
    let number = |value: Option<u64>| value.map_or("–".to_owned(), count);
    let rows = [
        ("▶ events out", format!("{}/s", rate(status.rates.delivered_events))),
        ("state", state.to_owned()),
        ("brokers up", number(forward.map(|forward| if forward.connected { forward.brokers } else { 0 }))),
        ("in flight", number(forward.map(|forward| forward.in_flight_events))),
        ("topics held", number(forward.map(|forward| forward.held_topics))),
        ("drained in", drained),
    ];
    pairs(frame, inner, &rows);
}

/// The newest samples, as many as there are columns, with the largest of them in the title.
fn chart(
    frame: &mut Frame<'_>,
    area: Rect,
    title: &str,
    colour: Color,
    samples: &[Sample],
    of: impl Fn(&Sample) -> u64,
) {
    let columns = usize::from(area.width.saturating_sub(2));
    let values: Vec<u64> = samples[samples.len().saturating_sub(columns)..].iter().map(of).collect();
    let most = values.iter().copied().max().unwrap_or(0);
    let title = format!("{title}, max {}", count(most));
    let block = boxed(&title, Color::DarkGray);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    // The newest is on the right.
    let width = u16::try_from(values.len()).unwrap_or(u16::MAX).min(inner.width);
    let right = Rect { x: inner.right() - width, width, ..inner };
    frame.render_widget(Sparkline::default().data(values).max(most.max(1)).style(Style::new().fg(colour)), right);
}

fn draw_last(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let block = boxed("Parked, last reload and errors", Color::DarkGray);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let lost = status.parked.lost_events;
    let mut lines = vec![match &status.parked.by_reason {
        _ if lost > 0 => {
            let (held, lost) = (count(status.parked.events), count(lost));
            Line::raw(format!("parked: {held}, and {lost} lost to damage: see the log")).fg(Color::Red)
        }
        _ if status.parked.events == 0 => Line::raw("parked: none"),
        None => Line::raw(format!("parked: {}", count(status.parked.events))),
        Some(reasons) => {
            let reasons: Vec<_> = reasons
                .iter()
                .map(|(reason, events)| format!("{} {}", count(*events), reason.replace('_', " ")))
                .collect();
            Line::raw(format!("parked: {} ({})", count(status.parked.events), reasons.join(", "))).fg(Color::Yellow)
        }
    }];
    if let Some(reload) = &status.reload {
        let (state, what) = reloaded(reload);
        let colour = if state == State::Good { Color::Reset } else { lamp(state).1 };
        let ago = duration(status.since(reload.at_ms));
        lines.push(Line::raw(format!("reload {ago} ago: {what}")).fg(colour));
    }
    if status.errors.is_empty() {
        lines.push(Line::raw("errors: none since the start").dim());
    }
    for error in &status.errors {
        let ago = duration(status.since(error.at_ms));
        let often = if error.count > 1 { format!(", {} times", count(error.count)) } else { String::new() };
        let about = error.topic.as_ref().map_or(String::new(), |topic| format!(", {topic}"));
        lines.push(Line::from(vec![
            Span::raw(format!("{ago} ago{often}{about}: ")).dim(),
            Span::raw(error.message.clone()),
        ]));
    }
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: true }), inner);
}
