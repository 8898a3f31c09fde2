"""The Nemotron-Mini prompt format, read back: turns of a rendered conversation, and tool calls in a reply.

The way out, messages to text, is the Jinja template `assets/nemotron_chat.jinja`.
"""

from __future__ import annotations

import json
import re
from typing import Any

SYSTEM_MARK = "<extra_id_0>"
TURN_MARK = "<extra_id_1>"
_TOOL_CALL = re.compile(r"<toolcall>\s*(.*?)\s*</toolcall>", re.DOTALL)
_TOOL = re.compile(r"<tool> (.*?) </tool>", re.DOTALL)
_CONTEXT = re.compile(r"<context> (.*?) </context>", re.DOTALL)
_ROLES = {"User": "user", "Assistant": "assistant", "Tool": "tool"}


def parse_reply(text: str) -> dict[str, Any]:
    """An assistant message from generated text: `content`, and `tool_calls` where there are any.

    What follows the next turn mark is dropped. A call that is not a JSON object with a `name` stays in the content.
    """
    text = text.split(TURN_MARK, 1)[0].removesuffix("</s>")
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        try:
            call = json.loads(match.group(1))
        except json.JSONDecodeError:
            return match.group(0)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return match.group(0)
        function = {"name": call["name"], "arguments": call.get("arguments", {})}
        calls.append({"type": "function", "function": function})
        return ""

    content = _TOOL_CALL.sub(take, text).strip()
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    return message


def parse_conversation(text: str) -> dict[str, Any]:
    """A rendered conversation as `messages`, `tools` and `contexts`.

    Raises:
        ValueError: the text does not begin with the system mark, or a turn has no known heading.
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
        if heading not in _ROLES:
            raise ValueError(f"turn {index} is headed {heading[:20]!r}; known headings are {', '.join(_ROLES)}")
        if heading == "Assistant" and not body and index == len(turns) - 1:
            break  # the prompt to go on
        role = _ROLES[heading]
        messages.append(parse_reply(body) if role == "assistant" else {"role": role, "content": body.strip()})
    return {"messages": messages, "tools": tools, "contexts": contexts}
