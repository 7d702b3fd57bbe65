// Asks /history once and /status every two seconds, and shows the answers. What is shown is set as text or as a number in
// an attribute of a drawing, never as markup: it may come from a client.
"use strict";

const PERIOD_MS = 2000;
const PATIENCE_MS = 5000;
const WINDOW_MS = 600_000;
// Of a young service the charts show less, so that there is something to see.
const WINDOWS_MS = [60_000, 120_000, 300_000, WINDOW_MS];
const GAP_MS = 5000;
const DAY = 86_400;
const SVG = "http://www.w3.org/2000/svg";

const REASONS = {
  too_large: ["Too large", "Larger than Kafka takes, even alone."],
  invalid_topic: ["No topic name", "The event's type makes no legal name of a topic."],
  unknown_topic: ["Unknown topic", "The topic did not appear in time."],
  not_authorised: ["Not allowed", "Kafka does not let Ringtail write the topic."],
  invalid_record: ["Refused", "Kafka refuses the record itself."],
  expired: ["Too old", "Older than wal.age_max."],
  damaged: ["Damaged", "Cannot be read any more."],
};
const LAMPS = { ok: "✓", busy: "↻", warn: "!", bad: "✕", wait: "…" };
const COLOURS = { ok: "#1f8a41", busy: "#2f6fd6", warn: "#c98500", bad: "#d22f3d", wait: "#7a8794" };

const byId = (id) => document.getElementById(id);

function show(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

function mark(id, name, value) {
  const element = byId(id);
  if (element.dataset[name] !== value) element.dataset[name] = value;
}

// ---- words ----

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function count(value) {
  return isNumber(value) ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : "–";
}

function rate(value) {
  if (!isNumber(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: value > 0 && value < 10 ? 1 : 0 });
}

function plural(value, one, many) {
  return count(value) + " " + (value === 1 ? one : many);
}

function bytes(value) {
  if (!isNumber(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return (unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)) + "\u00a0" + units[unit];
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  // Number and unit stay on one line.
  const minutes = Math.round(seconds / 60);
  if (seconds < 1) return "under 1\u00a0s";
  if (seconds < 60 || (seconds < 90 && seconds % 60 !== 0)) return Math.round(seconds) + "\u00a0s";
  if (minutes < 90) return minutes + "\u00a0min";
  if (seconds < 2 * DAY) return Math.floor(minutes / 60) + "\u00a0h " + (minutes % 60) + "\u00a0min";
  if (seconds < 365 * DAY) return Math.round(seconds / DAY) + "\u00a0days";
  return "over a year";
}

function clock(ms) {
  return new Date(ms).toLocaleTimeString("en-GB");
}

// ---- what it means ----

// A service that has just started is not yet cut off.
function isConnecting({ forward, uptime_seconds }) {
  return Boolean(forward) && !forward.connected && uptime_seconds < 6;
}

// The one sentence: state of the lamp, headline, explanation.
function judge(status) {
  const { wal, forward, forecast } = status;
  const pending = wal ? wal.pending_events : 0;
  const waited = wal && wal.oldest_pending_received_at_ms ? (status.now_ms - wal.oldest_pending_received_at_ms) / 1000 : 0;
  const full = isNumber(forecast.full_seconds) ? "At the present rate the disk is full in " + duration(forecast.full_seconds) + "."
    : "At the present rate the disk does not fill.";
  if (wal && wal.failed) return ["bad", "The log has failed", "The process ends and is started again; what was acked is safe."];
  if (!status.live) return ["bad", "No progress", "A loop of the service hangs. Under systemd the watchdog starts it again."];
  if (status.phase === "starting") return ["wait", "Starting", "The log is being opened."];
  if (status.phase === "stopping") return ["wait", "Stopping", "What was admitted is made durable and acked; the rest stays in the log."];
  if (wal && wal.full) {
    return ["bad", "The log is full: batches are refused", "What was acked is safe. It accepts again by itself once Kafka takes " +
      "events, or the log is given more disk."];
  }
  if (!forward) return ["ok", "Collecting only", "No brokers are configured: " + plural(pending, "event is", "events are") + " kept on disk. " + full];
  if (isConnecting(status)) return ["wait", "Connecting to Kafka", "Events are accepted meanwhile."];
  if (!forward.connected) {
    const since = forward.disconnected_since_ms ? " for " + duration((status.now_ms - forward.disconnected_since_ms) / 1000) : "";
    return ["warn", "Kafka is unreachable" + since, "Events are accepted and kept on disk; nothing is lost. " + full +
      " Once Kafka is back, delivery goes on by itself."];
  }
  // What takes longer than days is no catching up.
  if (pending > 0 && waited > 5 && isNumber(forecast.drain_seconds) && forecast.drain_seconds < 7 * DAY) {
    return ["busy", "Catching up: drained in about " + duration(Math.max(1, forecast.drain_seconds)), plural(pending, "event waits", "events wait") +
      " on disk, and more goes out than comes in."];
  }
  if (pending > 0 && waited > 60) {
    return ["warn", "Kafka is reachable, but events wait", "The oldest for " + duration(waited) + ". A topic is refused or has no leader, " +
      "or more comes in than Kafka takes: see the last errors. " + full];
  }
  if (wal && wal.quarantined_segments > 0) {
    return ["warn", plural(wal.quarantined_segments, "damaged segment is", "damaged segments are") + " set aside",
      "The rest goes on. Look after the disk, then: ringtail backlog check."];
  }
  if (status.parked.events > 0) {
    return ["warn", plural(status.parked.events, "event is", "events are") + " parked", "Kafka can never take them as they are; " +
      "the rest flows. More below."];
  }
  return ["ok", "All is well", "What comes in goes out to Kafka."];
}

// ---- the path ----

function showPath(status) {
  const { wal, forward, forecast, rates, connections, limits } = status;
  const open = connections.websocket + connections.rest + connections.grpc;
  show("connections", count(open));
  show("connections-unit", open === 1 ? "connection" : "connections");
  show("websocket", count(connections.websocket) + " of " + count(limits.connections_max));
  show("rest", count(connections.rest));
  show("grpc", count(connections.grpc));
  const refusing = rates.rejected_batches >= 0.1;
  show("rejected", count(status.totals.rejected_batches) + (refusing ? ", " + rate(rates.rejected_batches) + "/s" : ""));
  byId("rejected").classList.toggle("alarm", refusing);
  const crowded = connections.websocket > 0.9 * limits.connections_max;
  mark("clients", "state", crowded ? "warn" : "ok");

  show("rate-in", rate(rates.committed_events));
  const refused = Boolean(wal && (wal.full || wal.failed));
  mark("pipe-in", "flow", refused ? "blocked" : rates.committed_events >= 0.1 ? "flows" : "idle");
  show("note-in", refused ? "refused" : "acked once on disk");

  showLog(status);

  const connected = Boolean(forward && forward.connected);
  show("rate-out", forward ? rate(rates.delivered_events) : "–");
  const cut = Boolean(forward) && !connected && !isConnecting(status);
  mark("pipe-out", "flow", cut ? "blocked" : rates.delivered_events >= 0.1 ? "flows" : "idle");
  show("note-out", !forward ? "no brokers configured" : cut ? "waits on disk" : "in order, until acked");
  mark("kafka", "state", cut ? "warn" : "ok");
  show("connected", !forward ? "Not configured" : connected ? "Connected" : cut ? "Unreachable" : "Connecting");
  show("brokers", forward ? count(connected ? forward.brokers : 0) : "–");
  const inFlight = forward ? plural(forward.in_flight_events, "event", "events") : "–";
  show("in-flight", inFlight + (forward && forward.held_topics > 0 ? ", " + plural(forward.held_topics, "topic", "topics") + " refused" : ""));
  const oldest = wal && wal.oldest_pending_received_at_ms;
  const flowing = connected && oldest && status.now_ms - oldest < 2000;
  show("drain", !oldest ? "nothing waits" : flowing ? "at once" : isNumber(forecast.drain_seconds) ? duration(forecast.drain_seconds) : "not shrinking");
  show("delivered", forward ? count(status.totals.delivered_events) : "–");
}

function showLog({ wal, forecast, now_ms, phase }) {
  if (!wal) return show("pending", phase === "starting" ? "opening" : "–");
  show("pending", count(wal.pending_events));
  show("pending-unit", (wal.pending_events === 1 ? "event waits" : "events wait") + (wal.pending_bytes > 0 ? ", " + bytes(wal.pending_bytes) : ""));
  const oldest = wal.oldest_pending_received_at_ms;
  show("oldest", oldest ? duration(Math.max(0, now_ms - oldest) / 1000) : "–");
  show("disk", bytes(wal.disk_bytes) + " of " + bytes(wal.disk_bytes + forecast.headroom_bytes));
  const room = wal.disk_bytes + forecast.headroom_bytes;
  const used = room > 0 ? Math.min(100, Math.round((100 * wal.disk_bytes) / room)) : 0;
  byId("fill").style.width = used + "%";
  byId("meter").setAttribute("aria-valuenow", String(used));
  byId("meter").setAttribute("aria-valuetext", used + " percent of " + bytes(room));
  mark("meter", "state", wal.full ? "bad" : used >= 80 ? "warn" : "ok");
  show("full", wal.full ? "now" : isNumber(forecast.full_seconds) ? duration(forecast.full_seconds) : "not filling");
  byId("damage").hidden = wal.quarantined_segments === 0;
  show("damaged", count(wal.quarantined_segments));
  byId("damaged").classList.add("alarm");
  mark("log", "state", wal.full || wal.failed ? "bad" : used >= 80 || wal.quarantined_segments > 0 ? "warn" : "ok");
}

// ---- lists ----

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showParked(parked) {
  const some = parked.events > 0;
  show("parked-summary", some ? plural(parked.events, "event", "events") + " that Kafka can never take, kept on disk with the reason."
    : "None. Kafka took everything that it was given.");
  const reasons = Object.entries(parked.by_reason || {}).sort((a, b) => b[1] - a[1]);
  byId("parked-hint").hidden = !some;
  byId("parked-table").hidden = !some || reasons.length === 0;
  byId("parked").replaceChildren(...reasons.map(([reason, events]) => {
    const [title, meaning] = Object.hasOwn(REASONS, reason) ? REASONS[reason] : [reason, ""];
    const row = element("tr");
    const cell = element("td", title);
    cell.append(element("small", meaning));
    row.append(cell, element("td", count(events), "number"));
    return row;
  }));
}

let shownErrors = "";

function showErrors({ errors, now_ms }) {
  show("errors-summary", errors.length === 0 ? "None since the start." : "Of the way to Kafka, newest first.");
  // Not anew every time: somebody may be selecting text.
  const key = JSON.stringify(errors);
  if (key !== shownErrors) {
    shownErrors = key;
    byId("errors").replaceChildren(...errors.map((error) => {
      const item = element("li");
      item.append(element("p", ""), element("code", error.message));
      return item;
    }));
  }
  errors.forEach((error, at) => {
    const often = error.count > 1 ? ", met " + count(error.count) + " times" : "";
    const about = error.topic === null ? "" : ", topic " + error.topic;
    const ago = duration(Math.max(0, now_ms - error.at_ms) / 1000) + " ago";
    byId("errors").children[at].firstChild.textContent = clock(error.at_ms) + ", " + ago + often + about;
  });
}

// ---- charts ----

let samples = [];

function draw(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

function niceCeiling(value) {
  if (value <= 10) return 10;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((top) => top >= value);
}

function short(value) {
  return value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 });
}

class Chart {
  constructor(id, lines, readout) {
    this.holder = byId(id + "-chart");
    this.readoutId = id + "-readout";
    this.lines = lines;
    this.readout = readout;
    this.at = null;
    this.svg = draw("svg", { "aria-hidden": "true", focusable: "false" });
    this.holder.append(this.svg);
    this.holder.addEventListener("pointermove", (event) => this.point(event));
    this.holder.addEventListener("pointerleave", () => this.moveTo(null));
    this.holder.addEventListener("blur", () => this.moveTo(null));
    this.holder.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.render()).observe(this.holder);
  }

  render() {
    const width = this.holder.clientWidth;
    const height = this.holder.clientHeight;
    if (width < 80) return;
    const [left, right, top, bottom] = [44, width - 4, 8, height - 22];
    const end = samples.length > 0 ? samples[samples.length - 1].at_ms : Date.now();
    const span = samples.length > 0 ? end - samples[0].at_ms : 0;
    const shown = WINDOWS_MS.find((window) => window >= span) || WINDOW_MS;
    const most = niceCeiling(Math.max(0, ...this.lines.flatMap(({ of }) => samples.map(of))));
    this.x = (at) => right - ((end - at) / shown) * (right - left);
    const y = (value) => bottom - (value / most) * (bottom - top);
    const parts = [];
    for (const value of [0, most / 2, most]) {
      parts.push(draw("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
      parts.push(draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    parts.push(draw("text", { x: left, y: height - 4 }, duration(shown / 1000) + " ago"));
    parts.push(draw("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, duration(shown / 2000)));
    parts.push(draw("text", { x: right, y: height - 4, "text-anchor": "end" }, "now"));
    for (const { of, className, area } of this.lines) {
      for (const run of runs()) {
        const points = run.map((sample) => this.x(sample.at_ms).toFixed(1) + " " + y(of(sample)).toFixed(1));
        const path = "M" + points.join("L");
        const [first, last] = [this.x(run[0].at_ms), this.x(run[run.length - 1].at_ms)];
        if (area) parts.push(draw("path", { class: "area", d: path + "L" + last + " " + bottom + "L" + first + " " + bottom + "Z" }));
        parts.push(draw("path", { class: className, d: path }));
      }
    }
    const sample = this.at === null ? undefined : nearest(this.at);
    if (sample) {
      const x = this.x(sample.at_ms);
      parts.push(draw("line", { class: "cursor", x1: x, x2: x, y1: top, y2: bottom }));
      const ago = end - sample.at_ms < 1500 ? "Now" : duration((end - sample.at_ms) / 1000) + " ago";
      show(this.readoutId, ago + ", " + clock(sample.at_ms) + ": " + this.readout(sample));
    } else {
      show(this.readoutId, "");
    }
    this.svg.setAttribute("viewBox", "0 0 " + width + " " + height);
    this.svg.replaceChildren(...parts);
  }

  moveTo(at) {
    this.at = at;
    this.render();
  }

  point(event) {
    if (!this.x || samples.length === 0) return;
    const x = event.clientX - this.holder.getBoundingClientRect().left;
    this.moveTo(samples.reduce((best, sample) => (Math.abs(this.x(sample.at_ms) - x) < Math.abs(this.x(best.at_ms) - x) ? sample : best)).at_ms);
  }

  key(event) {
    const steps = { ArrowLeft: -5, ArrowRight: 5, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") return this.moveTo(null);
    if (!(event.key in steps) || samples.length === 0) return;
    event.preventDefault();
    const from = this.at === null ? samples.length - 1 : samples.indexOf(nearest(this.at));
    const to = Math.min(samples.length - 1, Math.max(0, from + steps[event.key]));
    this.moveTo(samples[to].at_ms);
  }
}

function nearest(at) {
  return samples.find((sample) => sample.at_ms >= at) || samples[samples.length - 1];
}

// Stretches without a gap, such as a restart makes.
function runs() {
  const found = [];
  for (const sample of samples) {
    const run = found[found.length - 1];
    if (run && sample.at_ms - run[run.length - 1].at_ms < GAP_MS) run.push(sample);
    else found.push([sample]);
  }
  return found;
}

const ratesChart = new Chart("rates", [
  { of: (sample) => sample.committed_events, className: "in" },
  { of: (sample) => sample.delivered_events, className: "out" },
], (sample) => "in " + rate(sample.committed_events) + "/s, out " + rate(sample.delivered_events) + "/s");
const backlogChart = new Chart("backlog", [
  { of: (sample) => sample.pending_events, className: "pending", area: true },
], (sample) => plural(sample.pending_events, "event waits", "events wait"));

function takeSamples(news) {
  const last = samples.length > 0 ? samples[samples.length - 1].at_ms : 0;
  samples = samples.concat(news.filter((sample) => sample.at_ms > last));
  const end = samples.length > 0 ? samples[samples.length - 1].at_ms : 0;
  samples = samples.filter((sample) => sample.at_ms > end - WINDOW_MS);
}

function showCharts() {
  ratesChart.render();
  backlogChart.render();
  if (samples.length === 0) return;
  const last = samples[samples.length - 1];
  const most = (of) => Math.max(...samples.map(of));
  show("rates-summary", "Now " + rate(last.committed_events) + " in and " + rate(last.delivered_events) + " out; at most " +
    rate(most((sample) => sample.committed_events)) + " in and " + rate(most((sample) => sample.delivered_events)) + " out.");
  const before = samples[Math.max(0, samples.length - 11)];
  const change = last.pending_events - before.pending_events;
  const trend = change > 0 ? "growing" : change < 0 ? "shrinking" : "steady";
  show("backlog-summary", "Now " + plural(last.pending_events, "event", "events") + ", " + trend + "; at most " + count(most((sample) => sample.pending_events)) + ".");
  if (byId("numbers").open) showMinutes();
}

function showMinutes() {
  const minutes = new Map();
  for (const sample of samples) {
    const minute = Math.floor(sample.at_ms / 60_000);
    minutes.set(minute, (minutes.get(minute) || []).concat(sample));
  }
  const mean = (list, of) => list.reduce((sum, sample) => sum + of(sample), 0) / list.length;
  byId("minutes").replaceChildren(...[...minutes.values()].reverse().map((list) => {
    const last = list[list.length - 1];
    const row = element("tr");
    row.append(element("td", clock(last.at_ms)), element("td", rate(mean(list, (sample) => sample.committed_events))),
      element("td", rate(mean(list, (sample) => sample.delivered_events))), element("td", count(last.pending_events)));
    return row;
  }));
}

byId("numbers").addEventListener("toggle", showCharts);

// ---- the loop ----

function showBanner([state, headline, explanation], host) {
  const before = byId("banner").dataset.state;
  mark("banner", "state", state);
  show("lamp", LAMPS[state]);
  show("headline", headline);
  show("explain", explanation);
  document.title = [headline, host, "Ringtail"].filter(Boolean).join(" · ");
  if (before !== state) {
    // Said once by a screen reader; the numbers in it change too often to be said each time.
    show("announce", headline + ". " + explanation);
    const circle = '<svg xmlns="' + SVG + '" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="' + COLOURS[state] + '"/></svg>';
    byId("icon").href = "data:image/svg+xml," + encodeURIComponent(circle);
  }
}

let life = null;
let host = "";

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw new Error("status " + answer.status);
  return answer.json();
}

async function refresh() {
  let status;
  try {
    status = await ask("status");
    if (status.started_at_ms !== life) {
      // Another process: the past is its own, but what this page has seen of the one before stays.
      takeSamples((await ask("history")).samples);
      life = status.started_at_ms;
    }
  } catch (error) {
    document.body.dataset.stale = "";
    showBanner(["bad", "No answer from the service", "It is down, or the way to it is. What is shown below is the last that it said."], host);
    return;
  }
  delete document.body.dataset.stale;
  host = status.host;
  show("host", host);
  show("about", "Ringtail " + status.version + ", up for " + duration(Math.max(1, status.uptime_seconds)));
  showBanner(judge(status), host);
  takeSamples(status.recent);
  showPath(status);
  showCharts();
  showParked(status.parked);
  showErrors(status);
  show("updated", "Last answer " + clock(Date.now()));
}

let timer = null;

async function loop() {
  clearTimeout(timer);
  if (document.hidden) return;
  await refresh();
  clearTimeout(timer);
  timer = setTimeout(loop, PERIOD_MS);
}

document.addEventListener("visibilitychange", () => {
  // The samples of the time away are in the history.
  if (!document.hidden) {
    life = null;
    loop();
  }
});
loop();
