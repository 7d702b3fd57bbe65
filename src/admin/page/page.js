// Asks /history once and /status every two seconds, and shows the answers.

const PERIOD_MS = 2000;
const PATIENCE_MS = 5000;

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

function showParked(parked) {
  const some = parked.events > 0;
  const lost = parked.lost_events > 0 ? ` ${plural(parked.lost_events, "other", "others")} were lost to damage of the disk.` : "";
  show("parked-summary", some
    ? `${plural(parked.events, "event", "events")} that Kafka can never take, kept on disk with the reason.${lost}`
    : lost ? `None.${lost}` : "None. Kafka took everything that it was given.");
  byId("parked-summary").classList.toggle("alarm", lost !== "");
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

// What the last reload did, and what of the configuration waits for a restart.
function showReload({ reload, now_ms }) {
  byId("reload").hidden = !reload;
  if (!reload) return;
  const refused = reload.error !== null;
  const ago = duration(Math.max(0, now_ms - reload.at_ms) / 1000) + " ago";
  const what = refused ? "Refused: nothing changed." : reload.changed.length > 0 ? "Taken." : "Taken: nothing changed.";
  show("reload-summary", clock(reload.at_ms) + ", " + ago + ". " + what);
  byId("reload-error").hidden = !refused;
  show("reload-error", reload.error || "");
  for (const list of ["changed", "restart"]) {
    byId("reload-" + list + "-row").hidden = reload[list].length === 0;
    show("reload-" + list, reload[list].join(", "));
  }
}

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
    const circle = `<circle cx="8" cy="8" r="7" fill="${COLOURS[state]}"/>`;
    const picture = `<svg xmlns="${SVG}" viewBox="0 0 16 16">${circle}</svg>`;
    byId("icon").href = "data:image/svg+xml," + encodeURIComponent(picture);
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
    const what = "It is down, or the way to it is. What is shown below is the last that it said.";
    showBanner(["bad", "No answer from the service", what], host);
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
  showReload(status);
  show("updated", "Last answer " + clock(Date.now()));
}

let timer = null;

async function loop() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    await refresh();
  } finally {
    // Whatever happens: a page that stands still must not look alive.
    clearTimeout(timer);
    timer = setTimeout(loop, PERIOD_MS);
  }
}

document.addEventListener("visibilitychange", () => {
  // The samples of the time away are in the history.
  if (!document.hidden) {
    life = null;
    loop();
  }
});
loop();
