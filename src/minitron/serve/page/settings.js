// The settings beside the conversation: kept in the tab, read into the fields of a request.

const STORE = "minitron.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const TEXTS = ["model", "system", "schema", "tools"];
const byId = (id) => document.getElementById(id);

export function keepSettings() {
  const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
  for (const id of [...NUMBERS, ...TEXTS]) if (id in kept) byId(id).value = kept[id];
  byId("logprobs").checked = kept.logprobs ?? false;
  byId("settings").addEventListener("input", () => {
    const values = Object.fromEntries([...NUMBERS, ...TEXTS].map((id) => [id, byId(id).value]));
    sessionStorage.setItem(STORE, JSON.stringify({ ...values, logprobs: byId("logprobs").checked }));
  });
  return kept.model;
}

function json(id, name) {
  const field = byId(id);
  const text = field.value.trim();
  field.removeAttribute("aria-invalid");
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    field.setAttribute("aria-invalid", "true");
    byId("settings").open = true;
    field.focus();
    throw new Error(`${name} is not valid JSON: ${error.message}`);
  }
}

function number(id) {
  const field = byId(id);
  field.toggleAttribute("aria-invalid", false);
  if (!field.checkValidity()) {
    field.setAttribute("aria-invalid", "true");
    byId("settings").open = true;
    field.focus();
    throw new Error(`${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`);
  }
  return field.value === "" ? undefined : field.valueAsNumber;
}

// The fields of a chat completion besides its messages. Fields that are empty are left to the server's defaults.
export function requestSettings() {
  const schema = json("schema", "The JSON schema");
  const tools = json("tools", "The list of tools");
  return {
    model: byId("model").value,
    ...Object.fromEntries(NUMBERS.map((id) => [id, number(id)])),
    ...(byId("logprobs").checked ? { logprobs: true, top_logprobs: 5 } : {}),
    ...(schema ? { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } } : {}),
    ...(tools ? { tools } : {}),
  };
}

export function systemMessage() {
  const text = byId("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}
