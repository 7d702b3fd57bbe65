// The path of a batch as /status tells of it, and the one sentence about it.

// A service that has just started is not yet cut off.
function isConnecting({ forward, uptime_seconds }) {
  return Boolean(forward) && !forward.connected && uptime_seconds < 6;
}

// Seconds for which the oldest event has waited; 0 if none waits.
function waited({ wal, now_ms }) {
  const oldest = wal && wal.oldest_pending_received_at_ms;
  return oldest ? Math.max(0, now_ms - oldest) / 1000 : 0;
}

// What is set aside: segments, and small databases (the cursor's, or some of the parked events).
function damagedParts(wal) {
  return wal.quarantined_segments + wal.quarantined_stores;
}

// The one sentence: state of the lamp, headline, explanation. What is worst comes first.
function judge(status) {
  const { wal, forward, forecast, parked } = status;
  const pending = wal ? wal.pending_events : 0;
  const full = isNumber(forecast.full_seconds)
    ? `At the present rate the disk is full in ${duration(forecast.full_seconds)}.`
    : "At the present rate the disk does not fill.";

  if (wal && wal.failed) {
    return ["bad", "The log has failed", "The process ends and is started again; what was acked is safe."];
  }
  if (!status.live) {
    return ["bad", "No progress", "A loop of the service hangs. Under systemd the watchdog starts it again."];
  }
  if (status.phase === "starting") return ["wait", "Starting", "The log is being opened."];
  if (status.phase === "stopping") {
    return ["wait", "Stopping", "What was admitted is made durable and acked; the rest stays in the log."];
  }
  if (wal && wal.full) {
    return ["bad", "The log is full: batches are refused",
      "What was acked is safe. It accepts again by itself once Kafka takes events, or the log is given more disk."];
  }
  if (!forward) {
    const kept = plural(pending, "event is", "events are");
    return ["ok", "Collecting only", `No brokers are configured: ${kept} kept on disk. ${full}`];
  }
  if (isConnecting(status)) return ["wait", "Connecting to Kafka", "Events are accepted meanwhile."];
  if (!forward.connected) {
    const since = forward.disconnected_since_ms;
    const long = since ? ` for ${duration((status.now_ms - since) / 1000)}` : "";
    return ["warn", `Kafka is unreachable${long}`,
      `Events are accepted and kept on disk; nothing is lost. ${full} Once Kafka is back, delivery goes on by itself.`];
  }
  // What takes longer than days is no catching up.
  if (pending > 0 && waited(status) > 5 && isNumber(forecast.drain_seconds) && forecast.drain_seconds < 7 * DAY) {
    return ["busy", `Catching up: drained in about ${duration(Math.max(1, forecast.drain_seconds))}`,
      `${plural(pending, "event waits", "events wait")} on disk, and ` +
      (forward.live_first ? "new events go ahead of them." : "more goes out than comes in.")];
  }
  if (pending > 0 && forward.live_first) {
    return ["busy", "New events go ahead of the backlog", `The oldest of it has waited for ${duration(waited(status))}. ${full}`];
  }
  if (pending > 0 && waited(status) > 60) {
    return ["warn", "Kafka is reachable, but events wait",
      `The oldest for ${duration(waited(status))}. A topic is refused or has no leader, or more comes in than Kafka ` +
      `takes: see the last errors. ${full}`];
  }
  if (wal && damagedParts(wal) > 0) {
    return ["warn", `${plural(damagedParts(wal), "damaged part of the log is", "damaged parts of the log are")} set aside`,
      "The rest goes on. Look after the disk, then: ringtail backlog check."];
  }
  if (parked.events > 0) {
    return ["warn", `${plural(parked.events, "event is", "events are")} parked`,
      "Kafka can never take them as they are; the rest flows. More below."];
  }
  return ["ok", "All is well", "What comes in goes out to Kafka."];
}

function showPath(status) {
  showClients(status);
  if (status.wal) showLog(status);
  else show("pending", status.phase === "starting" ? "opening" : "–");
  showKafka(status);
}

function showClients({ connections, limits, totals, rates, wal }) {
  const open = connections.websocket + connections.rest + connections.grpc;
  show("connections", count(open));
  show("connections-unit", open === 1 ? "connection" : "connections");
  show("websocket", `${count(connections.websocket)} of ${count(limits.connections_max)}`);
  show("rest", count(connections.rest));
  show("grpc", count(connections.grpc));
  mark("clients", "state", connections.websocket > 0.9 * limits.connections_max ? "warn" : "ok");

  const refusing = rates.rejected_batches >= 0.1;
  show("rejected", count(totals.rejected_batches) + (refusing ? `, ${rate(rates.rejected_batches)}/s` : ""));
  byId("rejected").classList.toggle("alarm", refusing);

  const refused = Boolean(wal && (wal.full || wal.failed));
  show("rate-in", rate(rates.committed_events));
  show("note-in", refused ? "refused" : "acked once on disk");
  mark("pipe-in", "flow", refused ? "blocked" : rates.committed_events >= 0.1 ? "flows" : "idle");
}

function showLog(status) {
  const { wal, forecast } = status;
  const size = wal.pending_bytes > 0 ? `, ${bytes(wal.pending_bytes)}` : "";
  show("pending", count(wal.pending_events));
  show("pending-unit", (wal.pending_events === 1 ? "event waits" : "events wait") + size);
  show("oldest", wal.oldest_pending_received_at_ms ? duration(waited(status)) : "–");

  // Whichever is less: the log's own limit, or what the file system has left for it.
  const room = wal.disk_bytes + forecast.headroom_bytes;
  const used = room > 0 ? Math.min(100, Math.round((100 * wal.disk_bytes) / room)) : 0;
  show("disk", `${bytes(wal.disk_bytes)} of ${bytes(room)}`);
  byId("fill").style.width = `${used}%`;
  byId("meter").setAttribute("aria-valuenow", String(used));
  byId("meter").setAttribute("aria-valuetext", `${used} percent of ${bytes(room)}`);
  mark("meter", "state", wal.full ? "bad" : used >= 80 ? "warn" : "ok");
  show("full", wal.full ? "now" : isNumber(forecast.full_seconds) ? duration(forecast.full_seconds) : "not filling");

  const damaged = damagedParts(wal);
  byId("damage").hidden = damaged === 0;
  show("damaged", count(damaged));
  const worrying = used >= 80 || damaged > 0;
  mark("log", "state", wal.full || wal.failed ? "bad" : worrying ? "warn" : "ok");
}

function showKafka(status) {
  const { forward, rates, totals } = status;
  const connected = Boolean(forward && forward.connected);
  const cut = Boolean(forward) && !connected && !isConnecting(status);
  show("connected", !forward ? "Not configured" : connected ? "Connected" : cut ? "Unreachable" : "Connecting");
  show("note-out", !forward ? "no brokers configured" : cut ? "waits on disk" : forward.live_first ? "new events first" : "in order, until acked");
  mark("pipe-out", "flow", cut ? "blocked" : rates.delivered_events >= 0.1 ? "flows" : "idle");
  mark("kafka", "state", cut ? "warn" : "ok");
  show("drain", drainText(status, connected));
  if (!forward) {
    for (const id of ["rate-out", "brokers", "in-flight", "delivered"]) show(id, "–");
    return;
  }
  show("rate-out", rate(rates.delivered_events));
  show("brokers", count(connected ? forward.brokers : 0));
  const held = forward.held_topics > 0 ? `, ${plural(forward.held_topics, "topic", "topics")} refused` : "";
  show("in-flight", plural(forward.in_flight_events, "event", "events") + held);
  show("delivered", count(totals.delivered_events));
}

function drainText(status, connected) {
  const { wal, forecast } = status;
  if (!wal || wal.pending_events === 0) return "nothing waits";
  if (connected && waited(status) < 2) return "at once";
  return isNumber(forecast.drain_seconds) ? duration(forecast.drain_seconds) : "not shrinking";
}
