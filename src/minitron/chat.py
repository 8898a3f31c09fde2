"""Parsing of the Nemotron-Mini prompt format: the turns of a rendered conversation, and the tool calls in a reply.

Rendering, messages to text, is the Jinja template `assets/nemotron_chat.jinja`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

SYSTEM_MARK = "<extra_id_0>"
TURN_MARK = "<extra_id_1>"
_TOOL_CALL = re.compile(r"<toolcall>\s*(.*?)\s*</toolcall>", re.DOTALL)
_TOOL = re.compile(r"<tool> (.*?) </tool>", re.DOTALL)
_CONTEXT = re.compile(r"<context> (.*?) </context>", re.DOTALL)
_ROLES = {"User": "user", "Assistant": "assistant", "Tool": "tool"}


def parse_reply(text: str) -> dict[str, Any]:
    """An assistant message from generated text: `content`, and `tool_calls` if there are any.

    Everything after the next turn marker is dropped. Between <toolcall> markers is a call or a list of calls: JSON
    objects with a `name` and `arguments` (or `parameters`), plain or under `function`. Anything else stays in the
    content.
    """
    text = text.split(TURN_MARK, 1)[0].removesuffix("</s>")
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        found = _calls(match.group(1))
        calls.extend({"type": "function", "function": call} for call in found or [])
        return match.group(0) if found is None else ""

    content = _TOOL_CALL.sub(take, text).strip()
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    return message


def _calls(text: str) -> list[dict[str, Any]] | None:
    """The calls in the text between the markers, each with `name` and `arguments`; None unless all of it is calls."""
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    found = [_call(value) for value in (values if isinstance(values, list) else [values])]
    return [call for call in found if call is not None] if found and None not in found else None


def _call(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    if len(given) > 1 and given[0] != given[1]:
        return None  # ambiguous: both cannot be meant
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError):
            return None
    arguments = {} if arguments is None else arguments
    return {"name": value["name"], "arguments": arguments} if isinstance(arguments, dict) else None


def parse_conversation(text: str) -> dict[str, Any]:
    """A rendered conversation as `messages`, `tools` and `contexts`.

    Raises:
        ValueError: the text does not begin with the system marker, or a turn has no known heading.
    """
    if not text.startswith(SYSTEM_MARK + "System"):
        raise ValueError(f"the text begins with {text[:20]!r}; a conversation begins with {SYSTEM_MARK}System")
    head, *turns = text.split(TURN_MARK)
    head = head.removeprefix(SYSTEM_MARK + "System")
    tools = [json.loads(tool) for tool in _TOOL.findall(head)]
    contexts = _CONTEXT.findall(head)
    system = _CONTEXT.sub("", _TOOL.sub("", head)).strip()
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        heading, _, body = turn.partition("\n")
        if index == len(turns) - 1 and not body and heading in ("", "Assistant"):
            break  # the marker that ends the last turn, or the generation prompt
        if heading not in _ROLES:
            raise ValueError(f"turn {index} is headed {heading[:20]!r}; known headings are {', '.join(_ROLES)}")
        role = _ROLES[heading]
        messages.append(parse_reply(body) if role == "assistant" else {"role": role, "content": body.strip()})
    return {"messages": messages, "tools": tools, "contexts": contexts}


Message = dict[str, Any]


def fit_conversation(
    messages: Sequence[Message], count: Callable[[list[Message]], int], context: int, reserve: int
) -> tuple[list[Message], int]:
    """The part of a conversation that fits, and the number of oldest turns that were dropped.

    The system message and the last turn are always kept. A turn is a user's message and the messages after it.

    Args:
        messages: ends with the message to answer.
        count: gives the number of tokens of a conversation, including the heading of the answer.
        context: tokens that fit into the model's context.
        reserve: tokens to leave for the answer, as long as there is a turn that can be dropped.

    Raises:
        ValueError: the last message alone leaves no room for one new token.
    """
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    dropped = 0
    size = count(kept)
    while size + reserve > context:
        after = next((i for i in range(first + 1, len(kept)) if kept[i]["role"] == "user"), None)
        if after is None:
            break
        del kept[first:after]
        dropped += 1
        size = count(kept)
    if size >= context:
        raise ValueError(
            f"the message is too long: {size} tokens with its headings, and the model's context is {context}; "
            f"it was skipped, and the conversation continues without it"
        )
    return kept, dropped
