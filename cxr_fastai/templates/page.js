// Films go to POST /predict one by one, a few at a time; rows and pictures come back. Nothing is loaded from elsewhere, and
// every name is set as text. The token, where one is needed, comes after # in the address and stays in memory.
"use strict";

const $ = (id) => document.getElementById(id);
const { flags: FLAGS, megabytes: MEGABYTES } = JSON.parse($("settings").textContent);
const AT_ONCE = 2; // films on their way to the server
const MOST_PICTURES = 200; // films that are shown; of the others, the numbers are
const TRIES = 20; // times that a busy server is asked again
const FORMULA = /^[=+\-@\t\r]/; // a spreadsheet would run such a cell
const [ORANGE, BLUE] = [[230, 158, 0], [0, 115, 179]];

let token = new URLSearchParams(location.hash.slice(1)).get("token");
let card = null;
const entries = [];
const waiting = [];
let sending = 0;
if (location.hash) history.replaceState(null, "", location.pathname);

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const number = (p) => (p > 0.9995 && p < 1 ? "> 0.999" : p < 0.0005 && p > 0 ? "< 0.001" : p.toFixed(3));
const authorization = () => (token ? { Authorization: `Bearer ${token}` } : {});

// ---- the model ----

async function loadModel() {
  const answer = await fetch("model", { headers: authorization() }).catch(() => null);
  if (answer?.status === 401) return askForToken();
  if (!answer?.ok) {
    announce("The server cannot be reached; trying again.");
    return void setTimeout(loadModel, 3000);
  }
  card = await answer.json();
  $("ask").hidden = true;
  const facts = {
    classes: card.classes.join(", "), network: card.arch, threshold: thresholdText(),
    "trained on": `${card.data?.films ?? "?"} films (${card.data?.source ?? "?"})`, "weights from": card.weights,
    version: card.versions?.cxr_fastai,
  };
  $("card").replaceChildren(...Object.entries(facts).filter(([, v]) => v != null).flatMap(([k, v]) => [element("dt", k), element("dd", String(v))]));
  $("model").textContent = `The model: ${card.arch}, ${card.classes.join(" or ")}`;
  $("about").hidden = false;
  legend();
  send();
}

function thresholdText() {
  const t = card.threshold;
  if (t == null) return null;
  return typeof t === "number" ? number(t) : Object.entries(t).map(([k, v]) => `${k} ${number(v)}`).join(", ");
}

function legend() {
  const what = card.positive ?? "the class that is most likely";
  const orange = element("b", "Orange"), blue = element("b", "blue");
  orange.className = "for"; blue.className = "against";
  $("legend").replaceChildren(orange, ` places speak for ${what}, `, blue, " ones against it. The map shows what the network used, not what is true.");
}

function askForToken() {
  $("wrong").hidden = !token;
  $("ask").hidden = false;
  $("token").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  $("token").value = "";
  loadModel();
});

// ---- what goes out ----

function add(files) {
  for (const file of files) {
    const node = $("entry").content.firstElementChild.cloneNode(true);
    const entry = { file, node, part: (name) => node.querySelector(name), row: null, picture: null, tries: 0 };
    entry.part("h2").textContent = file.name;
    entry.part(".film").hidden = true;
    entry.part(".film").addEventListener("click", () => enlarge(entry));
    entry.part(".again").addEventListener("click", () => { entry.tries = 0; enqueue(entry); });
    entries.push(entry);
    $("results").append(node);
    if (file.size > MEGABYTES * 2 ** 20) {
      fail(entry, `${(file.size / 2 ** 20).toFixed(0)} MB are more than the ${MEGABYTES} MB that the server takes.`);
    } else enqueue(entry);
  }
  $("drop").classList.toggle("some", entries.length > 0);
  summarise();
}

function enqueue(entry) {
  say(entry, "Waits");
  waiting.push(entry);
  send();
}

async function send() {
  if (card === null) return; // until the token is known
  while (sending < AT_ONCE && waiting.length) {
    const entry = waiting.shift();
    sending += 1;
    sendOne(entry).finally(() => { sending -= 1; summarise(); send(); });
  }
}

async function sendOne(entry) {
  const pictures = entries.indexOf(entry) < MOST_PICTURES;
  const { status, answer, retry } = await post(entry, pictures);
  if (!entries.includes(entry)) return; // cleared meanwhile
  if (status === 200) return show(entry, answer.rows[0], answer.pictures?.[0]);
  if (status === 401) { waiting.unshift(entry); card = null; return askForToken(); }
  if ((status === 429 || status === 503) && entry.tries++ < TRIES) return again(entry, retry);
  const reasons = {
    0: "The server cannot be reached. Is it still running?",
    408: "Sending took too long: the connection is slow.",
    413: "The film is larger than the server takes.",
    429: "The server stays busy.", 503: "The server stays busy.",
  };
  fail(entry, `${reasons[status] ?? "The server refused the film."}${answer?.detail ? ` (${answer.detail})` : ""}`, status !== 413);
}

async function again(entry, seconds) {
  for (let left = seconds; left > 0; left--) {
    say(entry, `The server is busy; goes on by itself in ${left} s`);
    await pause(1);
    if (!entries.includes(entry)) return;
  }
  enqueue(entry);
}

// XMLHttpRequest, since fetch does not tell how much of a film has been sent.
function post(entry, pictures) {
  return new Promise((done) => {
    const request = new XMLHttpRequest(), form = new FormData();
    form.append("files", entry.file);
    request.open("POST", `predict?pictures=${pictures}`);
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => {
      const share = event.total ? event.loaded / event.total : 0;
      say(entry, share < 1 ? `Sending, ${Math.round(100 * share)} %` : "Being read", share < 1 ? share : null);
    };
    request.upload.onload = () => say(entry, "Being read", null);
    request.onloadend = () => {
      let answer = null;
      try { answer = JSON.parse(request.responseText); } catch { /* no answer of ours; the status says it */ }
      const retry = Math.min(120, Number(request.getResponseHeader("Retry-After")) || 2);
      done({ status: request.status, answer, retry });
    };
    request.send(form);
  });
}

// ---- what comes back ----

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Show what is being done: `share` of it as a bar, a moving bar for null, none for undefined.
function say(entry, text, share) {
  const bar = entry.part("progress");
  entry.part(".state").textContent = text;
  entry.part(".state").className = "state";
  entry.part(".again").hidden = true;
  entry.node.classList.remove("bare");
  bar.hidden = share === undefined;
  if (share == null) bar.removeAttribute("value"); else bar.value = share;
}

function fail(entry, reason, retry = false) {
  say(entry, reason);
  entry.part(".state").className = "state problem";
  entry.part(".again").hidden = !retry;
  entry.node.classList.add("bare");
  announce(`${entry.file.name}: ${reason}`);
}

function show(entry, row, picture) {
  entry.row = row;
  entry.file = { name: entry.file.name }; // the film itself is needed no more
  say(entry, "");
  if (row.error !== null) return fail(entry, `Not read: ${row.error}.`);
  const found = row.label === null ? "no verdict" : row.label ? row.label.split("|").join(", ") : "no finding";
  const verdict = entry.part(".verdict");
  verdict.hidden = false;
  verdict.textContent = found;
  if (row.label !== null) verdict.classList.add(isPositive(row) ? "yes" : "no");
  entry.part(".state").textContent = words(row);
  entry.part(".numbers").replaceChildren(...gauges(row));
  const flags = entry.part(".flags");
  flags.hidden = row.flags.length === 0;
  flags.querySelector("ul").replaceChildren(...row.flags.map((flag) => element("li", FLAGS[flag] ? `${flag}: ${FLAGS[flag]}` : flag)));
  if (picture) paint(entry, picture); else entry.node.classList.add("bare");
  announce(`${row.path}: ${found}, probability ${row.probability === null ? "not given" : number(row.probability)}${row.flags.length ? `, with ${row.flags.length} remarks` : ""}`);
}

function isPositive(row) {
  return card.positive ? row.label === card.positive : card.task === "multilabel" && row.label !== "";
}

function words(row) {
  if (row.label === null) return "The film is too unlike those of training.";
  if (card.task === "multilabel") return row.label ? "These reach their thresholds." : "No finding reaches its threshold.";
  if (card.task === "multiclass") return "The likeliest of all classes.";
  return `The probability of ${card.positive} ${row.probability >= row.threshold ? "reaches" : "is below"} the threshold.`;
}

// One bar for a binary verdict, one a class otherwise, the likeliest first.
function gauges(row) {
  if (row.label === null) return [];
  if (typeof row.threshold === "number") return [gauge(card.positive, row.probability, row.threshold)];
  const sorted = Object.entries(row.probabilities).sort((a, b) => b[1] - a[1]);
  return sorted.map(([name, p]) => gauge(name, p, row.threshold?.[name] ?? null, row.label.split("|").includes(name)));
}

function gauge(name, p, threshold, found = p >= threshold) {
  const box = element("div", "", found ? "number yes" : "number no"), line = element("p"), bar = element("div", "", "gauge");
  const fill = element("i");
  line.append(element("span", `Probability of ${name}`), element("b", number(p)));
  fill.style.width = `${100 * p}%`;
  bar.append(fill);
  bar.setAttribute("aria-hidden", "true"); // the numbers say it
  box.append(line, bar);
  if (threshold !== null) {
    const tick = element("s");
    tick.style.left = `${100 * threshold}%`;
    bar.append(tick);
    box.append(element("p", `Threshold ${number(threshold)}`, "quiet"));
  }
  return box;
}

function announce(text) {
  $("status").textContent = text;
}

function summarise() {
  const counts = new Map(), count = (key) => counts.set(key, (counts.get(key) ?? 0) + 1);
  for (const { row, node } of entries) {
    if (row?.error === null) count(row.label === null ? "no verdict" : row.label || "no finding");
    else count(node.querySelector(".problem") ? "not read" : "under way");
  }
  const parts = [...counts].map(([name, n]) => `${n} ${name}`).join(", ");
  $("summary").textContent = `${entries.length} ${entries.length === 1 ? "film" : "films"}: ${parts}`;
  $("tools").hidden = $("above").hidden = entries.length === 0;
}

// ---- the film and its evidence ----

// The weights (n_out rows) that stretch n numbers to n_out, as Pillow's bicubic filter does: a = -0.5, cut at the border.
function cubic(n, n_out) {
  const kernel = (x) => { x = Math.abs(x); return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0; };
  return Array.from({ length: n_out }, (_, i) => {
    const centre = ((i + 0.5) * n) / n_out - 0.5;
    const weights = Array.from({ length: n }, (_, j) => kernel(centre - j));
    const sum = weights.reduce((a, b) => a + b);
    return weights.map((w) => w / sum);
  });
}

// Paint evidence (rows of numbers) as colours of their own opacity, the same as `predict.overlay`.
function paintEvidence(canvas, evidence, width, height) {
  const scale = Math.max(...evidence.flat().map(Math.abs)) || 1;
  const across = cubic(evidence[0].length, width), down = cubic(evidence.length, height);
  const wide = evidence.map((line) => across.map((w) => w.reduce((sum, weight, j) => sum + weight * line[j], 0)));
  const picture = new ImageData(width, height);
  for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++, at += 4) {
    let value = 0;
    for (let i = 0; i < evidence.length; i++) value += down[y][i] * wide[i][x];
    value = Math.max(-1, Math.min(1, value / scale));
    picture.data.set(value > 0 ? ORANGE : BLUE, at);
    picture.data[at + 3] = Math.round(255 * 0.6 * Math.abs(value) ** 1.5);
  }
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

async function paint(entry, picture) {
  const image = entry.part("img"), canvas = entry.part("canvas");
  image.src = picture.film;
  image.alt = `Film ${entry.row.path}`;
  await image.decode().catch(() => null);
  const shrink = Math.min(1, 512 / Math.max(image.naturalWidth, image.naturalHeight));
  if (picture.evidence.length) paintEvidence(canvas, picture.evidence, Math.max(1, Math.round(shrink * image.naturalWidth)), Math.max(1, Math.round(shrink * image.naturalHeight)));
  entry.part(".film").hidden = false;
  entry.part(".film").setAttribute("aria-label", `Enlarge film ${entry.row.path}`);
  setOpacity();
}

function setOpacity() {
  for (const canvas of document.querySelectorAll(".film canvas")) canvas.style.opacity = $("opacity").value / 100;
}

function enlarge(entry) {
  const dialog = $("large"), canvas = dialog.querySelector("canvas"), from = entry.part("canvas");
  dialog.querySelector("img").src = entry.part("img").src;
  dialog.querySelector("img").alt = entry.part("img").alt;
  [canvas.width, canvas.height] = [from.width, from.height];
  canvas.getContext("2d").drawImage(from, 0, 0);
  const p = entry.row.probability === null ? "" : `, ${number(entry.row.probability)}`;
  $("name").textContent = `${entry.row.path}: ${entry.part(".verdict").textContent}${p}`;
  dialog.showModal();
}

// ---- the CSV ----

function cell(value) {
  if (value === null || value === undefined) return "";
  let text = Array.isArray(value) ? value.join(" ") : typeof value === "object" ? JSON.stringify(value) : String(value);
  if (typeof value !== "number" && FORMULA.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv() {
  const rows = entries.map((entry) => entry.row ?? { path: entry.file.name, error: entry.part(".state").textContent });
  const keys = [...new Set(rows.flatMap(Object.keys))].filter((key) => key !== "probabilities");
  keys.splice(keys.indexOf("probability") + 1, 0, ...card.classes.map((name) => `p_${name}`));
  const value = (row, key) => (key.startsWith("p_") ? row.probabilities?.[key.slice(2)] : row[key]);
  return [keys.map(cell), ...rows.map((row) => keys.map((key) => cell(value(row, key))))].map((line) => `${line.join(",")}\n`).join("");
}

$("csv").addEventListener("click", () => {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "films.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

// ---- keys, mouse, drop ----

$("clear").addEventListener("click", () => {
  entries.length = waiting.length = 0;
  $("results").replaceChildren();
  $("drop").classList.remove("some");
  summarise();
  $("files").focus();
});
for (const slider of document.querySelectorAll("input.opacity")) {
  slider.addEventListener("input", () => {
    for (const other of document.querySelectorAll("input.opacity")) other.value = slider.value;
    setOpacity();
  });
}
$("files").addEventListener("change", () => { add($("files").files); $("files").value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
loadModel();
