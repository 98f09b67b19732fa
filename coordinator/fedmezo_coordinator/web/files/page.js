// The page of a coordinator: it reads what the coordinator sends, and sends nothing itself.
import { Chart } from "./charts.js";

const WORKERS_EVERY_MS = 2000;
const AGAIN_AFTER_MS = 3000;
const STATES = ["measuring", "ready", "slow", "diverged", "away", "done"];
const KINDS = {
  failed: "Failed", paused: "Paused", digest_mismatch: "Digest mismatch", divergence: "Divergence",
  outlier: "Outlier", straggler: "Straggler", away: "Away", complaint: "Complaint",
  excluded: "Excluded", declined: "Declined", replica: "Replica", overload: "Overload",
};
const COLUMNS = [
  // Key, heading, how to write it, classes. The first is a row's heading.
  ["worker", "Worker", (row) => row.worker, "text"],
  ["state", "State", (row) => row.state, "text"],
  ["rounds", "Rounds", (row) => count(row.rounds), "wide"],
  ["loss", "Loss", (row) => decimal(row.loss, 4), ""],
  ["rate", "Rate", (row) => short(row.rate), "wide"],
  ["answer_s", "Took", (row) => (row.answer_s === null ? "-" : `${row.answer_s.toFixed(1)} s`), ""],
  ["size", "Size", (row) => decimal(row.size, 2), "wide"],
  ["agreement", "Agreement", (row) => decimal(row.agreement, 1), "wide"],
  ["up", "Up", (row) => bytes(row.up), "wide"],
  ["down", "Down", (row) => bytes(row.down), "wide"],
];

const get = (id) => document.getElementById(id);
const curves = { losses: [], heldout_losses: [], heldout_accuracies: [], answers: [] };
const query = { sort: "worker", order: "up", state: "", name: "", page: 0 };
let wanted = nameInAddress();
let shown = "";
let stream = null;
let retry = 0;
let fetching = false;

// ------------------------------------------------------------ how values are written

function count(value) { return value.toLocaleString("en"); }
function progress(run) { return run.rounds ? `${count(run.round)} of ${count(run.rounds)}` : count(run.round); }
function decimal(value, digits) { return value === null || value === undefined ? "-" : value.toFixed(digits); }
function short(value) { return value === null || value === undefined ? "-" : String(Number(value.toPrecision(3))); }
function percent(value) { return `${(100 * value).toFixed(1)} %`; }
function bytes(value) {
  for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
    if (value < 1000 || unit === "TB") return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return "";
}
function duration(minutes) {
  if (minutes < 1) return "less than a minute";
  const hours = Math.floor(minutes / 60);
  return hours ? `${count(hours)} h ${Math.round(minutes % 60)} min` : `${Math.round(minutes)} min`;
}

function made(name, text = null, className = "") {
  const element = document.createElement(name);
  if (text !== null) element.textContent = text;
  if (className) element.className = className;
  return element;
}
function write(id, text) {
  const element = get(id);
  if (element.textContent !== text) element.textContent = text;
}
// Replace the children of a list, unless they say the same as before.
function fill(id, items) {
  const list = get(id);
  const before = [...list.children].map((item) => item.outerHTML).join();
  if (before !== items.map((item) => item.outerHTML).join()) list.replaceChildren(...items);
}

// ------------------------------------------------------------ the live stream

function nameInAddress() {
  return new URLSearchParams(location.hash.slice(1)).get("run") ?? "";
}

function connect() {
  disconnect();
  if (document.hidden) return link("", "Resting");
  stream = new EventSource(`/live?run=${encodeURIComponent(wanted)}`);
  stream.addEventListener("open", () => link("on", "Live"));
  stream.addEventListener("error", () => {
    link("off", "No connection");
    if (stream.readyState === EventSource.CLOSED) refused();
  });
  const on = (name, work) => stream.addEventListener(name, (event) => work(JSON.parse(event.data)));
  on("starting", showStart);
  on("runs", showRuns);
  on("run", showRun);
  on("events", showEvents);
  on("curves", takeCurves);
  on("over", over);
  for (const name of Object.keys(curves)) curves[name] = [];
}

function disconnect() {
  clearTimeout(retry);
  if (stream !== null) stream.close();
  stream = null;
}

// The stream ended with a refusal: it comes back by itself only after a lost connection.
async function refused() {
  const ended = stream;
  let status = 0;
  try {
    status = (await fetch("/live", { method: "HEAD" })).status;
  } catch {
    // The coordinator is gone; it may come back.
  }
  if (stream !== ended) return;  // Another run was chosen meanwhile, or nobody looks any more.
  if (status === 403) over();
  else again();
}

function over() {
  disconnect();
  link("off", "Not open to you");
  get("run").hidden = true;
  get("nothing").hidden = false;
  write("nothing", "Your right to look has ended. An observer or operator gets a new link with: fedmezo page");
}

function again() {
  clearTimeout(retry);
  retry = setTimeout(connect, AGAIN_AFTER_MS);
}

function link(state, text) {
  get("link").className = `link ${state}`;
  write("link", text);
}

// ------------------------------------------------------------ what is shown

function showStart(found) {
  write("nothing", `The coordinator is starting${found.step ? `: ${found.step}` : ""}.`);
}

function showRuns(runs) {
  const list = get("runs");
  const items = new Map([...list.children].map((item) => [item.dataset.run, item]));
  const order = runs.map((run) => {
    let item = items.get(run.run_id);
    if (!item) {
      item = made("li");
      item.dataset.run = run.run_id;
      const anchor = made("a");
      anchor.href = `#${new URLSearchParams({ run: run.run_id })}`;
      anchor.append(made("b", run.run_id), made("span"));
      item.append(anchor);
    }
    const line = item.querySelector("span");
    const alarms = run.urgent ? `, ${count(run.urgent)} urgent` : "";
    const text = `${run.phase}, ${progress(run)}${alarms}`;
    if (line.textContent !== text) line.textContent = text;
    line.className = run.urgent ? "urgent" : "";
    return item;
  });
  if (order.length !== list.children.length || order.some((item, place) => item !== list.children[place])) {
    list.replaceChildren(...order);
  }
  markCurrent();
  const isThere = runs.some((run) => run.run_id === (wanted || shown));
  if (runs.length === 0) write("nothing", "There is no run yet.");
  else if (!isThere) write("nothing", wanted ? `There is no run ${wanted} here.` : "Choose a run.");
  get("nothing").hidden = isThere;
  if (!isThere) get("run").hidden = true;
}

function markCurrent() {
  for (const item of get("runs").children) {
    const anchor = item.querySelector("a");
    if (item.dataset.run === (wanted || shown)) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  }
}

function showRun(head) {
  const isNew = shown !== head.run_id;
  shown = head.run_id;
  get("nothing").hidden = true;
  get("run").hidden = false;
  document.title = `${head.urgent ? `(${head.urgent}) ` : ""}${head.run_id} - FedMeZO`;
  write("run-name", head.run_id);
  write("phase", head.phase);
  get("phase").className = `badge ${head.phase}`;
  write("about", [head.model, head.epoch > 1 ? `start ${head.epoch} of the run` : "",
    head.phase === "creating" ? head.reason : "",
    head.waiting_for ? `waiting for workers: ${count(head.connected)} of ${count(head.waiting_for)} are there` : "",
    head.caught_up || !head.model ? "" : "reading the journal"].filter(Boolean).join(" - "));
  get("progress").max = Math.max(head.rounds, head.round, 1);
  get("progress").value = head.round;
  const pace = head.rounds_per_minute;
  const left = pace && head.phase === "running"
    ? `, ${pace >= 10 ? pace.toFixed(0) : pace.toFixed(1)} a minute, about ${duration((head.rounds - head.round) / pace)} left` : "";
  write("progress-text", `${progress(head)} rounds${left}`);
  showAlarms(head.alarms);
  showFigures(head);
  showStates(head.states ?? {}, head.workers ?? 0);
  if (isNew) {
    query.page = 0;
    markCurrent();
    loadWorkers();
  }
}

function showAlarms(alarms) {
  const items = alarms.map((alarm) => {
    const item = made("li", null, alarm.urgent ? "urgent" : "");
    item.append(made("b", KINDS[alarm.kind] ?? alarm.kind), alarm.text);
    return item;
  });
  fill("alarms", items.length ? items : [made("li", "None", "none")]);
}

function showFigures(head) {
  const sent = (head.bytes_up ?? 0) + (head.bytes_down ?? 0);
  const weights = 2 * (head.weights_bytes ?? 0);
  const held = head.heldout;
  const best = head.best;
  const figures = [
    ["Training loss", decimal(head.loss, 4), "newest round"],
    ["Held-out loss", held ? decimal(held.loss, 4) : "-",
      head.evaluation_due ? "the last weights are being evaluated"
        : best ? `best ${decimal(best.loss, 4)}, round ${count(best.round)}` : "no evaluation yet"],
    ["Held-out accuracy", held ? percent(held.accuracy) : "-", held ? `round ${count(held.round)}` : "no evaluation yet"],
    ["Bytes sent", bytes(sent), `${bytes(head.bytes_up ?? 0)} up, ${bytes(head.bytes_down ?? 0)} down`],
    ["Weights instead", bytes(weights),
      sent && weights > sent ? `${count(Math.round(weights / sent))} times as much` : "for the same answers"],
    ["Workers", count(head.connected), `connected, of ${count(head.workers ?? 0)} seen`],
    ["Answers", count(head.answers_total), `${count(head.pairs_total)} pairs committed`],
    ["Journal", count(head.records ?? 0), "records"],
  ];
  const items = figures.map(([name, value, more]) => {
    const item = made("div");
    item.append(made("dt", name), made("dd", value), made("dd", more));
    return item;
  });
  fill("figures", items);
}

function showStates(states, workers) {
  const items = STATES.filter((state) => states[state]).map((state) => {
    const item = made("li", null, `state ${state}`);
    item.append(made("b", count(states[state])), ` ${state}`);
    return item;
  });
  fill("states", workers ? items : [made("li", "No worker has joined since this start.")]);
}

function showEvents(events) {
  fill("events", events.map((event) => {
    const item = made("li");
    item.append(made("span", `round ${count(event.round)}`), made("b", event.kind), event.text);
    return item;
  }));
}

// ------------------------------------------------------------ curves

const charts = {
  loss: new Chart(get("chart-loss"), {
    title: "Loss (nats)", format: (value) => short(value),
    curves: [{ key: "losses", name: "training" }, { key: "heldout_losses", name: "held-out" }],
  }),
  accuracy: new Chart(get("chart-accuracy"), {
    title: "Held-out accuracy", format: (value) => `${Number((100 * value).toFixed(1))} %`,
    curves: [{ key: "heldout_accuracies", name: "accuracy" }],
  }),
  answers: new Chart(get("chart-answers"), {
    title: "Answers in a round", format: (value) => short(value), fromZero: true, wholeNumbers: true,
    curves: [{ key: "answers", name: "answers" }],
  }),
};

function takeCurves(news) {
  for (const [name, { at, points }] of Object.entries(news)) {
    curves[name] = curves[name].slice(0, at).concat(points);
  }
  drawCurves();
}

function drawCurves() {
  for (const chart of Object.values(charts)) chart.set(chart.curves.map(({ key }) => curves[key]));
}

// ------------------------------------------------------------ workers

function question() { return String(new URLSearchParams({ run: shown, ...query })); }

async function loadWorkers() {
  if (!shown || fetching || document.hidden) return;
  fetching = true;
  const asked = question();
  let found = null;
  try {
    const answer = await fetch(`/workers?${asked}`);
    if (answer.ok) found = await answer.json();
  } catch {
    // The stream says that there is no connection.
  } finally {
    fetching = false;
  }
  // Somebody asked for something else in the meantime: this answer would undo that.
  if (asked !== question()) loadWorkers();
  else if (found) showWorkers(found);
}

function showWorkers(found) {
  const rows = found.rows.map((row) => {
    const line = made("tr");
    COLUMNS.forEach(([key, , text, className], place) => {
      const cell = made(place ? "td" : "th", null, className);
      if (place === 0) cell.scope = "row";
      if (key === "state") cell.append(made("span", row.state, `state ${row.state}`));
      else cell.textContent = text(row);
      line.append(cell);
    });
    line.append(made("td", row.note, "note wide"));
    return line;
  });
  fill("workers", rows);
  query.page = found.page;
  write("pager-text", `${count(found.found)} worker${found.found === 1 ? "" : "s"}, page ${found.page + 1} of ${found.pages}`);
  get("pager-back").disabled = found.page === 0;
  get("pager-on").disabled = found.page + 1 >= found.pages;
}

function ask(changes) {
  Object.assign(query, { page: 0 }, changes);
  for (const head of get("worker-heads").children) {
    const isSorted = head.dataset.key === query.sort;
    if (isSorted) head.setAttribute("aria-sort", query.order === "up" ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
    const button = head.querySelector("button");
    if (button) button.textContent = head.dataset.name + (isSorted ? (query.order === "up" ? " \u25B4" : " \u25BE") : "");
  }
  loadWorkers();
}

function makeWorkerHeads() {
  const heads = COLUMNS.map(([key, name, , className]) => {
    const head = made("th", null, className);
    head.scope = "col";
    head.dataset.key = key;
    head.dataset.name = name;
    const button = made("button", name);
    button.type = "button";
    button.addEventListener("click", () => {
      const first = key === "worker" || key === "state" ? "up" : "down";
      const other = query.order === "up" ? "down" : "up";
      ask({ sort: key, order: query.sort === key ? other : first });
    });
    head.append(button);
    return head;
  });
  const note = made("th", "Note", "text wide note");
  note.scope = "col";
  get("worker-heads").replaceChildren(...heads, note);
  for (const state of STATES) get("query-state").append(new Option(state, state));
}

makeWorkerHeads();
ask({});
get("query").addEventListener("submit", (event) => event.preventDefault());
get("query-name").addEventListener("input", (event) => ask({ name: event.target.value.trim().toLowerCase() }));
get("query-state").addEventListener("change", (event) => ask({ state: event.target.value }));
get("pager-back").addEventListener("click", () => ask({ page: Math.max(query.page - 1, 0) }));
get("pager-on").addEventListener("click", () => ask({ page: query.page + 1 }));
setInterval(loadWorkers, WORKERS_EVERY_MS);
addEventListener("hashchange", () => {
  const name = nameInAddress();
  if (location.hash === "#main" || name === wanted) return;
  wanted = name;
  connect();
  drawCurves();
  get("main").focus({ preventScroll: true });
});
// A page that nobody looks at costs the coordinator nothing.
document.addEventListener("visibilitychange", () => {
  connect();
  loadWorkers();
});
connect();
