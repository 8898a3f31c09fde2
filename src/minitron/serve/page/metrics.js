// The live metrics: Prometheus text, read every two seconds while the tab is open.

import { KeyNeeded, metrics } from "./api.js";

const EVERY_MS = 2000;
const POINTS = 90;
const byId = (id) => document.getElementById(id);

// What is plotted. `rate` is the growth of a counter per second; `mean` that of a histogram's sum per observation.
const PLOTS = [
  { title: "Generated tokens per second", metric: "generation_tokens_total", kind: "rate", digits: 1 },
  { title: "Prompt tokens per second", metric: "prompt_tokens_total", kind: "rate", digits: 1 },
  { title: "Requests running", metric: "num_requests_running", kind: "value", digits: 0 },
  { title: "Requests waiting", metric: "num_requests_waiting", kind: "value", digits: 0 },
  { title: "KV cache in use", metric: "kv_cache_usage_perc", kind: "share", digits: 1, unit: "%" },
  { title: "Prefix cache hits, share of prompt tokens", metric: "prefix_cache", kind: "hits", digits: 1, unit: "%" },
  { title: "Time to first token, recent mean", metric: "time_to_first_token_seconds", kind: "mean", digits: 3, unit: " s" },
];

// Samples of a Prometheus exposition: [{ name, labels, value }]; names lose the prefix before a colon.
export function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^([A-Za-z_:][\w:]*)(\{.*\})?\s+(\S+)/.exec(line);
    if (match) found.push({ name: match[1], labels: match[2] ?? "", value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return found;
}

function total(samples, name) {
  const of = samples.filter((sample) => sample.name === name || sample.name.endsWith(`:${name}`));
  return of.length ? of.reduce((sum, sample) => sum + sample.value, 0) : undefined;
}

function growth(now, before, name) {
  const [to, from] = [total(now, name), total(before, name)];
  return to === undefined || from === undefined || to < from ? undefined : to - from;
}

function valueOf(plot, now, before, seconds) {
  if (plot.kind === "value") return total(now, plot.metric);
  if (plot.kind === "share") return 100 * total(now, plot.metric);
  if (!before) return undefined;
  if (plot.kind === "rate") return growth(now, before, plot.metric) / seconds;
  if (plot.kind === "hits") {
    const asked = growth(now, before, `${plot.metric}_queries_total`);
    return asked ? (100 * growth(now, before, `${plot.metric}_hits_total`)) / asked : undefined;
  }
  const count = growth(now, before, `${plot.metric}_count`);
  return count ? growth(now, before, `${plot.metric}_sum`) / count : undefined;
}

const figures = PLOTS.map((plot) => {
  const figure = document.createElement("figure");
  figure.className = "plot";
  figure.innerHTML = `<figcaption></figcaption><strong>-</strong>
    <svg viewBox="0 0 100 40" preserveAspectRatio="none" role="img"><path></path></svg>
    <div class="range"><span>3 minutes ago</span><span>now</span></div>`;
  figure.querySelector("figcaption").textContent = plot.title;
  figure.querySelector("svg").setAttribute("aria-label", `${plot.title}, the last three minutes`);
  return { ...plot, figure, points: [] };
});

function draw(plot) {
  const known = plot.points.filter(Number.isFinite);
  const last = known.at(-1);
  plot.figure.querySelector("strong").textContent =
    last === undefined ? "-" : `${last.toFixed(plot.digits)}${plot.unit ?? ""}`;
  const top = Math.max(...known, 1e-9);
  let path = "", pen = "M";
  plot.points.forEach((value, index) => {
    if (!Number.isFinite(value)) return void (pen = "M");
    const x = (100 * (POINTS - plot.points.length + index)) / (POINTS - 1);
    path += `${pen}${x.toFixed(2)} ${(38 - (36 * value) / top).toFixed(2)}`;
    pen = "L";
  });
  plot.figure.querySelector("path").setAttribute("d", path);
}

function showTable(samples) {
  const rows = samples.filter((sample) => !sample.name.endsWith("_bucket") && !sample.name.endsWith("_created"));
  byId("metrics-table").tBodies[0].replaceChildren(
    ...rows.map((sample) => {
      const row = document.createElement("tr");
      for (const text of [sample.name, sample.labels.slice(1, -1), String(sample.value)]) row.insertCell().textContent = text;
      row.lastChild.className = "number";
      return row;
    }),
  );
}

let before = null;
let readAt = 0;
let timer = 0;

async function readOnce(state) {
  try {
    const now = parse(await metrics());
    const at = performance.now();
    for (const plot of figures) {
      plot.points.push(valueOf(plot, now, before, (at - readAt) / 1000));
      if (plot.points.length > POINTS) plot.points.shift();
      draw(plot);
    }
    [before, readAt] = [now, at];
    showTable(now);
    byId("metrics-note").hidden = true;
    state("ready");
  } catch (error) {
    byId("metrics-note").hidden = false;
    byId("metrics-note").textContent = error.message;
    state(error instanceof KeyNeeded ? "key" : "gone");
    before = null;
  }
}

export function showMetrics(open, state) {
  clearInterval(timer);
  if (!open) return;
  if (!byId("plots").children.length) byId("plots").append(...figures.map((plot) => plot.figure));
  readOnce(state);
  timer = setInterval(() => readOnce(state), EVERY_MS);
}
