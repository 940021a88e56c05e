# SPDX-License-Identifier: BSD-3-Clause
"""The page for people: one document without anything from elsewhere, and the policy that lets nothing else run in it.

It only shows. It reads /api/stream, and /api/samples and /api/events when that begins. Whatever a node has said goes
into it as text. Only what has changed is touched, so that focus, selection and a screen reader stay where they are.
"""

from __future__ import annotations

import base64
import hashlib
import re

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Replication</title>
<link rel="icon" href="data:,">
<style>
:root { --back: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --good: #1a7f37;
  --warn: #9a6700; --bad: #cf222e; --one: #0969da; --two: #bc4c00; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --card: #161b22; --text: #e6edf3; --soft: #9aa4af;
  --line: #30363d; --good: #3fb950; --warn: #d29922; --bad: #ff7b72; --one: #58a6ff; --two: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.45 system-ui, sans-serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: .75rem 1rem; }
header { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; align-items: baseline; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: .75rem 0 .25rem; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
:focus-visible { outline: 3px solid var(--one); outline-offset: 2px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin-bottom: 1rem; }
article, .events { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem;
  min-width: 0; }
article { border-left: .35rem solid var(--soft); }
article.good { border-left-color: var(--good); } article.warn { border-left-color: var(--warn); }
article.bad { border-left-color: var(--bad); }
.top { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .25rem 1rem; align-items: baseline; }
.kind { color: var(--soft); }
.verdict { margin: .25rem 0 .5rem; font-weight: 600; }
.good .verdict { color: var(--good); } .warn .verdict { color: var(--warn); } .bad .verdict { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .75rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
progress, meter { width: 100%; height: .9rem; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 1rem; }
figure { margin: .5rem 0 0; min-width: 0; } figcaption { font-size: .85rem; color: var(--soft); }
svg { width: 100%; height: 4rem; display: block; background: var(--back); border-radius: .25rem; }
polyline { fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.l0 { stroke: var(--one); } .l1 { stroke: var(--two); } .k0 { color: var(--one); } .k1 { color: var(--two); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .9rem; } code { font-size: .95em; }
.hidden { display: none; }
@media (max-width: 40rem) { .plots { grid-template-columns: 1fr; } thead { display: none; }
  tr { display: block; border-bottom: 1px solid var(--line); } td { display: inline; border: 0; } }
</style>
</head>
<body>
<a class="skip" href="#nodes">To the nodes</a>
<header>
  <h1>Replication</h1>
  <span id="summary" role="status" aria-live="polite">Loading</span>
  <span id="live" role="status" aria-live="polite"></span>
</header>
<main>
  <noscript><p>This page needs JavaScript.
    The same is in <code>/api/state</code> and <code>/metrics</code>.</p></noscript>
  <div id="nodes" tabindex="-1"></div>
  <section class="events" aria-labelledby="events-title">
    <h2 id="events-title">Last events</h2>
    <p id="no-events">None yet.</p>
    <table class="hidden"><thead><tr><th scope="col">Time</th><th scope="col">Node</th><th scope="col">Event</th>
      <th scope="col">What</th></tr></thead><tbody></tbody></table>
  </section>
</main>
<footer>This page only shows. Commands are given with <code>replctl</code> on the host. Metrics:
  <a href="/metrics">/metrics</a>.</footer>
<script>
"use strict";
const nodes = new Map(), cards = new Map(), samples = new Map();
let offset = 0, events = [], ids = 0;
const now = () => Date.now() / 1000 + offset;
const has = (value) => typeof value === "number" && isFinite(value);
const object = (value) => value && typeof value === "object" && !Array.isArray(value) ? value : {};
const list = (value) => Array.isArray(value) ? value.filter((item) => item && typeof item === "object") : [];

function bytes(value) {
  if (!has(value)) return "-";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < 5) { value /= 1024; unit++; }
  return `${unit ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}
function seconds(value) {
  if (!has(value)) return "-";
  if (value < 1) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${(value / 3600).toFixed(1)} h` : `${Math.round(value / 86400)} days`;
}
function make(name, parent, text, className) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.append(element);
  return element;
}
// Only what has changed is touched, so that focus, selection and a screen reader stay where they are.
function say(element, text) { if (element.textContent !== text) element.textContent = text; }

function verdict(node) {
  const status = object(node.status), link = object(status.link), age = ageOf(node);
  if (!node.up) return ["bad", `Does not answer: ${node.trouble || "unknown"}`];
  if (status.consistent === false) return ["bad", "No valid checkpoint"];
  if (status.stage === "failover-failed") return ["bad", "The commit has failed"];
  if (status.error) return ["bad", String(object(status.error).desc || "A failure is latched")];
  if (status.stage === "none") return ["warn", "Replication is not started"];
  if (status.stage === "failover") return ["warn", "Failed over; the commit is at work"];
  if (status.stage === "done") return ["warn",
    status.mode === "secondary" ? "Owns the disk, unprotected" : "Stopped"];
  if (String(link.reason || "").toLowerCase().includes("split brain")) return ["bad", String(link.reason)];
  if (link.state !== "in-sync") return ["warn",
    `Link ${link.state || "unknown"}${link.reason ? `: ${link.reason}` : ""}`];
  if (status["checkpoint-obstacle"]) return ["warn", String(status["checkpoint-obstacle"])];
  if (age === null) return ["warn", "In sync, without a checkpoint yet"];
  return age > 60 ? ["warn", `In sync, but the last checkpoint is ${seconds(age)} old`] : ["good", "Protected"];
}
function ageOf(node) {
  const age = object(object(node.status).checkpoint).age;
  return has(age) ? age + Math.max(0, now() - node.looked) : null;
}
function figures(node) {
  const status = object(node.status), link = object(status.link), failover = object(node.failover), age = ageOf(node);
  const disks = list(status.disks);
  const sum = (key) => disks.reduce((all, disk) => all + (has(disk[key]) ? disk[key] : 0), 0);
  const rows = [["Stage", String(status.stage || "-")],
    ["Link", [link.state, link.reason].filter(Boolean).join(": ") || "-"],
    ["Last checkpoint", age === null ? "never" : `${seconds(age)} old`]];
  const stall = object(status["longest-stall"]);
  if (has(stall.seconds)) rows.push(["Longest request of the hour", `${seconds(stall.seconds)} ${stall.operation} on `
    + `${stall.export}${stall["under-way"] === true ? ", under way" : ""}: ${stall.text}`]);
  if (status.mode === "primary") rows.push(["Queue", bytes(sum("forward-queue-bytes"))]);
  rows.push([status.mode === "primary" ? "Secondary lacks" : "Lost here", bytes(sum("out-of-sync-bytes"))]);
  if (node.up && status.mode === "secondary" && "allowed" in failover && ["none", "running"].includes(status.stage)) {
    rows.push(["Failover now", failover.allowed
      ? `loses the last ${seconds(age)}, then commits ${bytes(failover["bytes-to-commit"])} in about `
        + seconds(failover["predicted-seconds"])
      : `refused: ${failover.reason || "unknown"}`]);
  }
  for (const disk of disks) rows.push([`Disk ${disk.name}`, bytes(disk.size)]);
  return rows;
}
function card(name) {
  const element = make("article"), title = make("h2", null, name), top = make("div", element, undefined, "top");
  title.id = `node-${++ids}`;
  element.setAttribute("aria-labelledby", title.id);
  top.append(title);
  const made = { element, kind: make("span", top, "", "kind"), verdict: make("p", element, "", "verdict"),
    rows: new Map(),
    facts: make("dl", element), bars: make("div", element), barsOf: new Map(), speeds: new Map() };
  const plots = make("div", element, undefined, "plots");
  made.plots = [plot(plots, ["written", "read"]), plot(plots, ["checkpoint"])];
  return made;
}
function showRows(made, rows) {
  const wanted = new Set(rows.map(([name]) => name));
  for (const [name, [term, value]] of made.rows) {
    if (!wanted.has(name)) { term.remove(); value.remove(); made.rows.delete(name); }
  }
  for (const [name, text] of rows) {
    if (!made.rows.has(name)) made.rows.set(name, [make("dt", made.facts, name), make("dd", made.facts)]);
    say(made.rows.get(name)[1], text);
  }
}
function showBar(made, key, kind, title, part, whole) {
  if (!made.barsOf.has(key)) {
    const label = make("label", made.bars), bar = document.createElement(kind), text = make("span", label);
    label.append(document.createElement("br"), bar);
    made.barsOf.set(key, { label, text, bar });
  }
  const { text, bar } = made.barsOf.get(key);
  say(text, title);
  bar.max = whole || 1;
  bar.value = whole ? part : 1;
  if (kind === "meter") { bar.high = 0.8 * bar.max; bar.optimum = 0; bar.low = 0.6 * bar.max; }
}
function showBars(made, node) {
  const kept = new Set();
  for (const job of list(node.jobs)) {
    const part = job["current-progress"], whole = job["total-progress"];
    if (job.type === "backup" || !has(part) || !has(whole)) continue;
    const key = `job ${job.id}`, before = made.speeds.get(key), gone = before ? node.looked - before.time : 0;
    if (!before || gone > 0) {
      const speed = before && gone > 0 ? (part - before.part) / gone : null;
      const smooth = before && has(before.speed) && speed !== null ? 0.7 * before.speed + 0.3 * speed : speed;
      made.speeds.set(key, { time: node.looked, part, speed: smooth });
    }
    const speed = made.speeds.get(key).speed;
    const left = job.error ? `failed: ${job.error}` : speed > 0 ? `${seconds((whole - part) / speed)} left` : "";
    showBar(made, key, "progress", `${job.id}: ${bytes(part)} of ${bytes(whole)} ${left}`, part, whole);
    kept.add(key);
  }
  for (const disk of list(object(node.status).disks)) for (const overlay of ["active", "hidden"]) {
    const held = disk[`${overlay}-bytes`];
    const limit = has(disk[`${overlay}-limit-bytes`]) ? disk[`${overlay}-limit-bytes`] : disk.size;
    if (!node.up || !has(held) || !has(limit)) continue;
    const key = `overlay ${disk.name} ${overlay}`;
    showBar(made, key, "meter", `${disk.name} ${overlay}: ${bytes(held)} of at most ${bytes(limit)}`, held, limit);
    kept.add(key);
  }
  for (const [key, { label }] of made.barsOf) {
    if (!kept.has(key)) { label.remove(); made.barsOf.delete(key); made.speeds.delete(key); }
  }
}
function plot(parent, names) {
  const figure = make("figure", parent), caption = make("figcaption", figure);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 3600 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  figure.append(svg);
  const lines = names.map((_, index) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    line.setAttribute("class", `l${index}`);
    svg.append(line);
    return line;
  });
  const texts = names.map((_, index) => make("span", caption, "", `k${index}`));
  return { svg, lines, texts, names };
}
function draw(made, keys, unit) {
  const { svg, lines, texts, names, all } = made, end = now();
  const values = keys.flatMap((key) => all.map((one) => one[key]).filter(has)), top = Math.max(...values, 1e-9);
  const said = keys.map((key, index) => {
    const points = all.filter((one) => has(one[key]));
    lines[index].setAttribute("points", points.map((one) =>
      `${Math.round(3600 - (end - one.time))},${(98 - 94 * one[key] / top).toFixed(1)}`).join(" "));
    const last = points.length ? points[points.length - 1][key] : null;
    const most = Math.max(...points.map((one) => one[key]));
    const text = `${names[index]} ${unit(last)}, at most ${points.length ? unit(most) : "-"} `;
    say(texts[index], text);
    return text;
  });
  svg.setAttribute("aria-label", `The last hour: ${said.join("; ")}`);
}
function showPlots(name) {
  const made = cards.get(name), all = samples.get(name) || [];
  if (!made) return;
  for (const one of made.plots) one.all = all;
  draw(made.plots[0], ["write_rate", "read_rate"], (value) => `${bytes(value)}${has(value) ? "/s" : ""}`);
  draw(made.plots[1], ["checkpoint_s"], seconds);
}
function show(name) {
  const node = nodes.get(name), made = cards.get(name), [mood, text] = verdict(node), status = object(node.status);
  made.element.className = mood;
  say(made.kind, status.mode ? String(status.mode) : "");
  say(made.verdict, text);
  showRows(made, node.up ? figures(node) : [["Down for", seconds(now() - node.since)], ["Socket", node.path]]);
  showBars(made, node);
}
// The two nodes of a pair stand side by side if both are on this host.
function arrange() {
  const place = document.getElementById("nodes"), left = new Set(nodes.keys()), wanted = [];
  for (const [name, node] of [...nodes].sort(([a], [b]) => a.localeCompare(b))) {
    if (!left.delete(name)) continue;
    const peer = [...left].find((other) => {
      const mine = object(node.status), its = object(nodes.get(other).status);
      return mine.node && its["peer-node"] === mine.node && mine["peer-node"] === its.node;
    });
    if (peer) left.delete(peer);
    wanted.push(peer ? [name, peer] : [name]);
  }
  const key = JSON.stringify(wanted);
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  for (const [name, made] of cards) if (!nodes.has(name)) { made.element.remove(); cards.delete(name); }
  place.replaceChildren(...wanted.map((names) => {
    const pair = make("section", null, undefined, "pair");
    pair.setAttribute("aria-label", names.length > 1 ? `Pair ${names.join(" and ")}` : names[0]);
    for (const name of names) {
      if (!cards.has(name)) cards.set(name, card(name));
      pair.append(cards.get(name).element);
    }
    return pair;
  }));
  for (const name of nodes.keys()) showPlots(name);
}
function showAll() {
  arrange();
  for (const name of nodes.keys()) show(name);
  const moods = [...nodes.values()].map((node) => verdict(node)[0]);
  const count = (mood) => moods.filter((one) => one === mood).length;
  say(document.getElementById("summary"), nodes.size
    ? `${nodes.size} nodes: ${count("good")} protected, ${count("warn")} to look at, ${count("bad")} in trouble`
   : "No nodes");
}
function showEvents() {
  const table = document.querySelector("table"), body = table.tBodies[0];
  table.classList.toggle("hidden", !events.length);
  document.getElementById("no-events").classList.toggle("hidden", events.length > 0);
  body.replaceChildren(...events.slice(-50).reverse().map((event) => {
    const row = document.createElement("tr"), stamp = object(event.timestamp);
    make("td", row, has(stamp.seconds) ? new Date(stamp.seconds * 1000).toLocaleString() : "-");
    make("td", row, String(event.node));
    make("td", row, String(event.event));
    make("td", row, Object.entries(object(event.data)).filter(([, value]) => value !== null).map(([key, value]) =>
      `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", "));
    return row;
  }));
}
async function load(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(answer.status);
  return answer.json();
}
async function loadSamples() {
  try {
    for (const [name, all] of Object.entries(await load("/api/samples"))) { samples.set(name, all); showPlots(name); }
  } catch { /* the stream says so */ }
}
function listen() {
  const stream = new EventSource("/api/stream"), live = document.getElementById("live");
  stream.onopen = () => say(live, "live");
  stream.onerror = () => say(live, "No connection to the monitor; what is shown is old");
  stream.addEventListener("state", async (message) => {
    const state = JSON.parse(message.data);
    offset = state.time - Date.now() / 1000;
    nodes.clear();
    for (const node of state.nodes) nodes.set(node.name, node);
    showAll();
    await loadSamples();
    try { events = await load("/api/events"); showEvents(); } catch { /* the stream says so */ }
  });
  stream.addEventListener("node", (message) => {
    const node = JSON.parse(message.data);
    nodes.set(node.name, node);
    showAll();
  });
  stream.addEventListener("event", (message) => {
    events.push(JSON.parse(message.data));
    events.splice(0, events.length - 500);
    showEvents();
  });
  stream.addEventListener("nodes", async () => {
    try {
      const state = await load("/api/state"), there = new Set(state.nodes.map((node) => node.name));
      for (const name of [...nodes.keys()]) if (!there.has(name)) nodes.delete(name);
      showAll();
    } catch { /* the stream says so */ }
  });
}
listen();
setInterval(showAll, 1000);
setInterval(loadSamples, 10000);
</script>
</body>
</html>
"""


def _policy(page: str) -> str:
    """Content-Security-Policy: the page's own script and style, by their digests, and the monitor's own answers."""
    found = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {found['script']}; style-src {found['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


POLICY = _policy(PAGE)
