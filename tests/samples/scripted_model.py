"""A served model whose answers are scripted, behind the real tokenizer, template, scheduler, grammars and routes.

    python tests/samples/scripted_model.py      serves it on a free port, which it prints

A tiny model calls no tool with the arguments that a client's tests expect. This one does: it calls the first tool with
values from the user's message, answers a question for JSON with JSON, and says a sentence otherwise. Its engine gives
the next token of the script a large logit, so that a grammar that forbids the token is noticed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from live_server import live_server

from minitron.chat import parse_conversation
from minitron.engine.base import DecodeEngine
from minitron.loading import load
from minitron.serve.scheduler import Scheduler
from minitron.serve.served import ServedModel
from minitron.serve.settings import ServeSettings

HEADING = "<extra_id_1>Assistant\n"
TURN_END = "<extra_id_1>"
STORY = "A story. " * 50
JOKE = {"setup": "Why did the cat cross the road?", "punchline": "It was \u00bdasleep."}


def scripted(prompt: str) -> str:
    """The answer to a rendered conversation."""
    try:
        found = parse_conversation(prompt.removesuffix(HEADING))
    except ValueError:  # marks within a message
        return STORY
    last = next((turn for turn in reversed(found["messages"]) if turn["role"] != "assistant"), None)
    if last is None:
        return STORY
    text = str(last["content"])
    if found.get("tools") and last["role"] == "user":
        function = found["tools"][0].get("function", found["tools"][0])
        call = {"name": function["name"], "arguments": _arguments(function.get("parameters") or {}, text)}
        return f"<toolcall> {json.dumps(call, ensure_ascii=False)} </toolcall>"
    if "joke" in text.lower():
        return json.dumps(JOKE, ensure_ascii=False)
    return f"You said: {text[:60].strip()}" if last["role"] == "user" else f"It is {text[:60].strip()}."


def _arguments(schema: dict[str, Any], text: str) -> dict[str, Any]:
    numbers, quoted = re.findall(r"\d+", text), re.findall(r"'([^']+)'", text)
    found: dict[str, Any] = {}
    for index, (name, part) in enumerate(schema.get("properties", {}).items()):
        if part.get("enum"):
            found[name] = part["enum"][0]
        elif part.get("type") in ("integer", "number"):
            found[name] = int(numbers[index % len(numbers)]) if numbers else 3
        else:
            found[name] = JOKE.get(name) or (quoted[index % len(quoted)] if quoted else "pirate")
    return found


class ScriptedEngine(DecodeEngine):
    """An engine that computes nothing."""

    name = "scripted"

    def __init__(self, tokenizer: Any, vocabulary: int, slots: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self.kv: Any = SimpleNamespace(lengths=[0] * slots)
        self._texts: dict[int, list[int]] = {}
        self._scripts: dict[int, list[int]] = {}

    def acquire(self, room: int) -> int:
        slot = next(slot for slot in range(len(self.kv.lengths)) if slot not in self._texts)
        self._texts[slot] = []
        return slot

    def release(self, slot: int) -> None:
        del self._texts[slot]
        self._scripts.pop(slot, None)
        self.kv.lengths[slot] = 0

    def prefill(self, tokens: list[int], slot: int = 0, more: bool = False) -> None:
        self._texts[slot] += tokens
        self.kv.lengths[slot] = len(self._texts[slot])

    def decode(self, tokens: list[int], slots: list[int]) -> torch.Tensor:
        rows = torch.zeros(len(tokens), self._vocabulary)
        for row, token, slot in zip(rows, tokens, slots, strict=True):
            self.prefill([token], slot)
            row[self._next(slot)] = 100.0
        return rows

    def step(self, tokens: list[int], slot: int = 0) -> torch.Tensor:
        return torch.cat([self.decode([token], [slot]) for token in tokens])

    def _next(self, slot: int) -> int:
        end = self._tokenizer.convert_tokens_to_ids(TURN_END)
        if slot not in self._scripts:
            prompt = self._tokenizer.decode(self._texts[slot], clean_up_tokenization_spaces=False)
            answer = scripted(prompt.removeprefix("<s>")) if prompt.endswith(HEADING) else STORY
            self._scripts[slot] = [*self._tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        return self._scripts[slot].pop(0) if self._scripts[slot] else end

    def close(self) -> None:
        pass


def scripted_model(name: str = "scripted", context: int = 4096, slots: int = 8) -> ServedModel:
    """The model, with the tokenizer, template and embeddings of the bundled one."""
    loaded = load("bundled-half")
    vocabulary = loaded.model.config.vocab_size
    engine: Any = ScriptedEngine(loaded.tokenizer, vocabulary, slots)
    end = loaded.tokenizer.convert_tokens_to_ids(TURN_END)
    ends = frozenset({loaded.tokenizer.eos_token_id, end})
    scheduler = Scheduler(engine)
    return ServedModel(name, loaded.tokenizer, loaded.model, context, vocabulary, scheduler, "", ends, ends)


def main() -> None:
    """Serve the model under two names until standard input ends."""
    models: list[Any] = [scripted_model(), scripted_model("scripted-too")]
    with live_server(ServeSettings(("scripted",), max_waiting=1024), models) as server:
        print(server.port, flush=True)
        while sys.stdin.readline():
            time.sleep(0.01)


if __name__ == "__main__":
    main()
