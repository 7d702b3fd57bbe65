// Fetches /status every 2 seconds. Everything is set as text, never as markup.
"use strict";

const PERIOD_MS = 2000;
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

function show(id, text, bad) {
  const element = document.getElementById(id);
  element.textContent = text;
  element.classList.toggle("bad", Boolean(bad));
}

function count(value) {
  return Number.isFinite(value) ? value.toLocaleString("en") : "–";
}

function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return (unit === 0 ? value : value.toFixed(1)) + " " + UNITS[unit];
}

function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 120) return Math.round(value) + " s";
  if (value < 7200) return Math.round(value / 60) + " min";
  return (value / 3600).toFixed(1) + " h";
}

function showLog(wal) {
  const oldest = wal.oldest_pending_received_at_ms;
  show("pending", count(wal.pending_events));
  show("oldest", oldest ? seconds((Date.now() - oldest) / 1000) : "–");
  show("disk", bytes(wal.disk_bytes) + " of " + bytes(wal.disk_limit_bytes), wal.full);
}

function showKafka(forward) {
  if (!forward) {
    show("kafka", "not forwarding");
    for (const id of ["in-flight", "drain", "error"]) show(id, "–");
    return;
  }
  const error = forward.last_error;
  show("kafka", forward.connected ? "connected" : "not connected", !forward.connected);
  show("in-flight", count(forward.in_flight_events));
  show("drain", seconds(forward.drain_seconds));
  show("error", error ? String(error.message || error) : "none");
}

async function refresh() {
  try {
    const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(PERIOD_MS) });
    const status = await answer.json();
    show("version", status.version);
    show("state", status.ready ? "ready" : status.not_ready_reason, !status.ready);
    for (const protocol of ["websocket", "rest", "grpc"]) show(protocol, count(status.connections[protocol]));
    show("parked", count(status.parked.events), status.parked.events > 0);
    showLog(status.wal || {});
    showKafka(status.forward);
  } catch (error) {
    show("state", "no answer", true);
  }
  setTimeout(refresh, PERIOD_MS);
}

refresh();
