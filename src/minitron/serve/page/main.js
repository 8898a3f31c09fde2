// Starts the page: tabs, the list of models, and whether the server answers.

import { models, useKey, KeyNeeded } from "./api.js";
import { keepSettings } from "./settings.js";
import { startChat, showProblem } from "./chat.js";
import { showMetrics } from "./metrics.js";

const RETRY_MS = 3000;
const byId = (id) => document.getElementById(id);
const TABS = ["chat", "metrics"];
const STATES = { ready: "ready", gone: "server does not answer", key: "API key needed", connecting: "connecting" };

let retry = 0;

function setState(state) {
  const line = byId("server-state");
  line.className = `state ${state}`;
  line.textContent = STATES[state];
  byId("key-form").hidden = state !== "key";
  clearTimeout(retry);
  if (state === "gone") retry = setTimeout(connect, RETRY_MS);
}

const chosenBefore = keepSettings();

async function connect() {
  try {
    const found = await models();
    const select = byId("model");
    const chosen = select.value || chosenBefore;
    select.replaceChildren(...found.map((model) => new Option(model.id, model.id)));
    if (found.some((model) => model.id === chosen)) select.value = chosen;
    setState("ready");
    showProblem(null);
  } catch (error) {
    setState(error instanceof KeyNeeded ? "key" : "gone");
  }
}

function openTab(name) {
  for (const tab of TABS) {
    const selected = tab === name;
    byId(`tab-${tab}`).setAttribute("aria-selected", String(selected));
    byId(`tab-${tab}`).tabIndex = selected ? 0 : -1;
    byId(`view-${tab}`).hidden = !selected;
  }
  showMetrics(name === "metrics", setState);
}

for (const [index, tab] of TABS.entries()) {
  byId(`tab-${tab}`).addEventListener("click", () => openTab(tab));
  byId(`tab-${tab}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = TABS[(index + step + TABS.length) % TABS.length];
    openTab(next);
    byId(`tab-${next}`).focus();
  });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  connect();
});

if (matchMedia("(max-width: 48rem)").matches) byId("settings").open = false;
startChat(setState);
connect();
