// The charts: rates and backlog over the last minutes, their values at a cursor, and the same as a table.

const WINDOW_MS = 600_000;
// Of a young service the charts show less, so that there is something to see.
const WINDOWS_MS = [60_000, 120_000, 300_000, WINDOW_MS];
const GAP_MS = 5000;

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
        if (area) parts.push(draw("path", { class: "area", d: `${path}L${last} ${bottom}L${first} ${bottom}Z` }));
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
    const distance = (sample) => Math.abs(this.x(sample.at_ms) - x);
    this.moveTo(samples.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best)).at_ms);
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
  const [mostIn, mostOut] = [most((sample) => sample.committed_events), most((sample) => sample.delivered_events)];
  show("rates-summary", `Now ${rate(last.committed_events)} in and ${rate(last.delivered_events)} out; ` +
    `at most ${rate(mostIn)} in and ${rate(mostOut)} out.`);
  const change = last.pending_events - samples[Math.max(0, samples.length - 6)].pending_events;
  const trend = change > 0 ? "growing" : change < 0 ? "shrinking" : "steady";
  const mostPending = count(most((sample) => sample.pending_events));
  show("backlog-summary", `Now ${plural(last.pending_events, "event", "events")}, ${trend}; at most ${mostPending}.`);
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
