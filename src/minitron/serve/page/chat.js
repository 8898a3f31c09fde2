// The conversation: what was said, the answer that is being generated, and how they are shown.

import { streamChat, KeyNeeded, ServerGone } from "./api.js";
import { requestSettings, systemMessage } from "./settings.js";

const STORE = "minitron.conversation";
const byId = (id) => document.getElementById(id);
const list = byId("messages");
const MESSAGE = byId("prompt").placeholder;
const NAMES = { user: "You", assistant: "Model", tool: "Tool" };

let messages = JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
let running = null; // AbortController of the answer that is being generated
let onState = () => {};

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as HTML: answers are not trusted
  return made;
}

function keep() {
  sessionStorage.setItem(STORE, JSON.stringify(messages));
}

// --- showing ---------------------------------------------------------------------------------------------------

function showMessage(message) {
  const item = element("li", `message ${message.role}`);
  item.append(element("h2", "", NAMES[message.role] ?? message.role));
  const text = element("div", "text");
  item.append(text);
  fill(item, message);
  list.append(item);
  byId("empty").hidden = true;
  return item;
}

function fill(item, message) {
  const text = item.querySelector(".text");
  const tokens = message.tokens ?? [];
  if (tokens.length) text.append(...tokens.slice(text.childElementCount).map((token) => tokenButton(item, token)));
  else text.textContent = message.content ?? "";
  text.hidden = !message.content && Boolean(message.tool_calls?.length);
  item.querySelectorAll(".call, .about").forEach((old) => old.remove());
  for (const call of message.tool_calls ?? []) {
    item.append(element("pre", "call", `${call.function.name}(${call.function.arguments})`));
  }
  if (message.about) item.append(element("p", "about", message.about));
}

// A token that can be pressed: the less probable it was, the darker its background. It shows what else was probable.
// It is no <button>, in which text does not wrap.
function tokenButton(item, token) {
  const button = element("span", "token", token.token);
  const probability = Math.exp(token.logprob);
  button.role = "button";
  button.tabIndex = 0;
  button.style.setProperty("--doubt", (1 - probability).toFixed(3));
  button.title = percent(probability);
  button.addEventListener("click", () => showAlternatives(item, token));
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    showAlternatives(item, token);
  });
  return button;
}

function showAlternatives(item, token) {
  item.querySelector(".alternatives")?.remove();
  const table = element("table", "alternatives");
  table.append(element("caption", "", `Instead of ${JSON.stringify(token.token)}, ${percent(Math.exp(token.logprob))}:`));
  for (const other of token.top_logprobs ?? []) {
    const row = table.insertRow();
    row.insertCell().textContent = JSON.stringify(other.token);
    row.insertCell().textContent = percent(Math.exp(other.logprob));
  }
  item.append(table);
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 2 : 1)}%`;
}

export function showProblem(error) {
  const box = byId("problem");
  box.hidden = !error;
  box.textContent = error ? error.message : "";
}

function scrollDown(always) {
  const near = list.scrollHeight - list.scrollTop - list.clientHeight < 120;
  if (always || near) list.scrollTop = list.scrollHeight;
}

function buttons() {
  byId("stop").hidden = !running;
  byId("send").hidden = Boolean(running);
  byId("regenerate").disabled = Boolean(running) || !messages.some((message) => message.role !== "assistant");
  byId("clear").disabled = Boolean(running) || !messages.length;
  const call = openCall();
  byId("prompt").placeholder = call ? `Result of ${call.function.name} (${call.id})` : MESSAGE;
}

// --- generating ------------------------------------------------------------------------------------------------

// What is sent back to the server: without tokens and notes, which only the page needs.
function spoken(message) {
  const { role, content, tool_calls, tool_call_id } = message;
  return { role, content: content ?? null, ...(tool_calls ? { tool_calls } : {}), ...(tool_call_id ? { tool_call_id } : {}) };
}

function addDelta(answer, delta, logprobs) {
  if (delta.content) answer.content += delta.content;
  for (const token of logprobs?.content ?? []) answer.tokens.push(token);
  for (const part of delta.tool_calls ?? []) {
    answer.tool_calls ??= [];
    const call = (answer.tool_calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (part.id) call.id = part.id;
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
}

const ENDS = { length: "stopped at the largest number of tokens", content_filter: "refused by the guard" };

async function generate() {
  let settings;
  try {
    settings = requestSettings();
  } catch (error) {
    return showProblem(error);
  }
  showProblem(null);
  const body = { ...settings, messages: [...systemMessage(), ...messages.map(spoken)] };
  const answer = { role: "assistant", content: "", tokens: [] };
  const item = showMessage(answer);
  const text = item.querySelector(".text");
  text.classList.add("waiting");
  running = new AbortController();
  buttons();
  scrollDown(true);
  const begin = performance.now();
  let first = 0, received = 0, usage = null, end = null;
  try {
    for await (const chunk of streamChat(body, running.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      end = choice.finish_reason ?? end;
      addDelta(answer, choice.delta ?? {}, choice.logprobs);
      if (choice.delta?.content || choice.delta?.tool_calls) {
        first ||= performance.now();
        received += 1;
      }
      fill(item, answer);
      scrollDown();
      if (first) showSpeed(received, first, begin);
    }
    onState("ready");
  } catch (error) {
    if (error.name === "AbortError") end = "stopped";
    else failed(error, answer, item);
  }
  text.classList.remove("waiting");
  running = null;
  if (usage) showSpeed(usage.completion_tokens, first, begin);
  answer.about = about(end, usage);
  if (list.contains(item)) {
    messages.push(answer);
    fill(item, answer);
    byId("announcement").textContent = `Model: ${answer.content || "a tool call"}`;
  }
  keep();
  buttons();
}

function failed(error, answer, item) {
  if (!answer.content && !answer.tool_calls) item.remove(); // nothing was said
  if (error instanceof ServerGone) onState("gone");
  if (error instanceof KeyNeeded) onState("key");
  showProblem(new Error(`${error.message} Your message is kept: Regenerate tries again.`));
}

function about(end, usage) {
  const parts = [];
  if (end === "stopped") parts.push("stopped by you");
  else if (ENDS[end]) parts.push(ENDS[end]);
  else if (!end) parts.push("incomplete");
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}, ${usage.completion_tokens} generated`);
  return parts.join(" · ");
}

function showSpeed(tokens, first, begin) {
  const seconds = (performance.now() - first) / 1000;
  const speed = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s, ` : "";
  byId("speed").textContent = `${speed}first after ${((first - begin) / 1000).toFixed(2)} s`;
}

// --- what a person does ----------------------------------------------------------------------------------------

// The first tool call that has no result yet, if the model waits for one.
function openCall() {
  const results = messages.slice(messages.findLastIndex((message) => message.role === "assistant") + 1);
  const calls = messages.findLast((message) => message.role === "assistant")?.tool_calls ?? [];
  if (results.some((message) => message.role === "user")) return undefined;
  return calls.find((call) => !results.some((result) => result.tool_call_id === call.id));
}

function send() {
  const field = byId("prompt");
  const text = field.value.trim();
  if (!text || running) return;
  const call = openCall();
  messages.push(call ? { role: "tool", content: text, tool_call_id: call.id } : { role: "user", content: text });
  keep();
  showMessage(messages.at(-1));
  field.value = "";
  if (openCall()) buttons(); // the model waits for the results of all its calls
  else generate();
}

function regenerate() {
  if (running) return;
  while (messages.at(-1)?.role === "assistant") messages.pop();
  keep();
  list.replaceChildren();
  messages.forEach(showMessage);
  generate();
}

function clear() {
  messages = [];
  keep();
  list.replaceChildren();
  byId("empty").hidden = false;
  byId("speed").textContent = "";
  showProblem(null);
  buttons();
  byId("prompt").focus();
}

export function startChat(state) {
  onState = state;
  messages.forEach(showMessage);
  buttons();
  scrollDown(true);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("regenerate").addEventListener("click", regenerate);
  byId("clear").addEventListener("click", clear);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
}
