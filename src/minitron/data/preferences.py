"""Preferences: for a prompt, a reply that people prefer and one that they do not, in the forms that TRL reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .documents.problems import Bad
from .examples import Conversation, conversation

Replied = Conversation | tuple[str, str]
"""A conversation that ends with the reply; or prompt and reply as plain texts."""


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt."""

    chosen: Replied
    rejected: Replied
    prompt_messages: int
    """Messages before the replies; 0 for plain texts."""

    @property
    def content(self) -> str:
        """What decides whether two examples have the same prompt, so that none is on both sides of a split."""
        if isinstance(self.chosen, Conversation):
            return json.dumps(self.chosen.messages[: self.prompt_messages], sort_keys=True)
        return self.chosen[0]


def preference(fields: Mapping[str, Any]) -> Preference | Bad:
    """Makes a `Preference` of a row's `chosen`, `rejected` and `prompt`: texts, or messages in OpenAI's form.

    Without a prompt it is what both replies begin with: the same messages, or the same text.
    """
    prompt, chosen, rejected = (_parsed(fields.get(name)) for name in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        return Bad("chosen and rejected are the same, so there is nothing to prefer")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        return _of_texts(prompt, chosen, rejected)
    made = []
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        messages = _messages(prompt, reply)
        if messages is None:
            return Bad(f"{name} is {reply!r:.60} and prompt is {prompt!r:.60}; expected texts or lists of messages")
        found = conversation({"messages": messages, "tools": fields.get("tools")})
        if isinstance(found, Bad):
            return Bad(f"{name}: {found.what}")
        if found.messages[-1]["role"] != "assistant":
            return Bad(f"{name} ends with a message of the {found.messages[-1]['role']}; expected one of the assistant")
        made.append(found)
    same = _shared(made[0].messages, made[1].messages)
    # A reply that both have in common belongs to the prompt only if something follows it on both sides.
    count = min(same, *(len(each.messages) - 1 for each in made))
    while count and made[0].messages[count]["role"] != "assistant":
        count -= 1
    if not count:
        return Bad("chosen and rejected have no message in common, so there is no prompt")
    return Preference(made[0], made[1], count)


def _of_texts(prompt: str | None, chosen: str, rejected: str) -> Preference | Bad:
    if prompt is None:
        prompt = chosen[: _shared(chosen, rejected)]
        # A prompt that ends within a word is no prompt: the replies happen to begin alike.
        prompt = prompt[: max(prompt.rfind(" "), prompt.rfind("\n")) + 1].rstrip(" ")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            return Bad(f"{name} is empty")
    return Preference((prompt, chosen), (prompt, rejected), 0)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _parsed(value: Any) -> Any:
    """A value that may be messages as JSON in a string, as tables of strings have them."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _messages(prompt: Any, reply: Any) -> list[Any] | None:
    """Prompt and reply as one list of messages; None if they are neither texts nor messages."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(reply, str):
        reply = [{"role": "assistant", "content": reply}]
    if isinstance(reply, Mapping):
        reply = [reply]
    if not isinstance(reply, list | tuple) or not isinstance(prompt, list | tuple | None):
        return None
    return [*(prompt or ()), *reply]
