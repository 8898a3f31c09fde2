"""Tools for ChatML templates that have no section for them: a prompt in the system turn, in the form of Hermes.

Each tool is a JSON schema between `<tools>` marks, a call is a JSON object between `<tool_call>` marks, and a result
stands between `<tool_response>` marks in a user's turn, as Qwen's templates write them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

INSTRUCTIONS = """You may call functions to answer the user. Their signatures are within <tools></tools> tags:
<tools>
{tools}
</tools>

To call a function, answer with a JSON object of its name and its arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>"""


def needs_prompt(template: str | None) -> bool:
    """Whether a chat template is ChatML without a section for tools."""
    text = template or ""
    return "<|im_start|>" in text and "tool" not in text


def with_tool_prompt(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Messages for a template that knows `role` and `content` alone: tools in the system turn, calls and results as
    text. Without tools, calls and results the messages are as they were.
    """
    found = [_plain(message) for message in messages]
    if not tools:
        return found
    prompt = INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if found and found[0]["role"] == "system":
        return [{**found[0], "content": f"{found[0]['content']}\n\n{prompt}"}, *found[1:]]
    return [{"role": "system", "content": prompt}, *found]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        json.dumps({"name": call["function"]["name"], "arguments": call["function"]["arguments"]}, ensure_ascii=False)
        for call in message.get("tool_calls", ())
    ]
    if not calls:
        return dict(message)
    parts = [*([content] if content else []), *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return {"role": message["role"], "content": "\n".join(parts)}
