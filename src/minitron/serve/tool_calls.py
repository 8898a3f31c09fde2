"""Tool calls in a model's text: the forms in which chat templates ask for them, a parser that streams, and grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ..chat import parse_reply
from .errors import ApiError
from .grammar import GrammarMask, json_rule, lark_mask
from .schema import ChatRequest, NamedTool, Tool
from .served import ServedModel
from .tool_prompt import needs_prompt

Delta = dict[str, Any]
SHAPE_OF_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')


@dataclass(frozen=True)
class ToolFormat:
    """How a chat template wants a call to be written: a JSON object between two marks."""

    opening: str
    """Empty where the whole answer is the call."""
    closing: str
    arguments: str
    """The key of the arguments."""
    before: str
    """White space between the opening mark and the object."""
    after: str
    """White space between the object and the closing mark."""


NEMOTRON = ToolFormat("<toolcall>", "</toolcall>", "arguments", " ", " ")
HERMES = ToolFormat("<tool_call>", "</tool_call>", "arguments", "\n", "\n")
LLAMA_3 = ToolFormat("", "", "parameters", "", "")


def tool_format(model: ServedModel) -> ToolFormat:
    """The form that the model's chat template asks for.

    Raises:
        ApiError: the template does not mention tools, or mentions them in a form that is not known.
    """
    template = model.tokenizer.chat_template or ""
    template = template if isinstance(template, str) else " ".join(map(str, template.values()))
    if "<toolcall>" in template:
        return NEMOTRON
    if "<tool_call>" in template:
        return HERMES
    if "tools" in template and "parameters" in template:
        return LLAMA_3
    if needs_prompt(template):
        return HERMES
    raise ApiError(
        f"the chat template of the model {model.name!r} has no tools; leave tools out, or use another model",
        param="tools",
        code="no_tools",
    )


# --- grammars ------------------------------------------------------------------------------------------------------


def tool_mask(model: ServedModel, request: ChatRequest, largest: int) -> GrammarMask | None:
    """The grammar of an answer that must be a call; None if it need not be.

    Raises:
        ApiError: a schema of the tools is too large or not supported.
    """
    choice = request.tool_choice
    if not request.tools or choice in (None, "auto", "none"):
        return None
    tools: Sequence[Tool] = request.tools
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    form = tool_format(model)
    several = bool(form.opening) and request.parallel_tool_calls is not False and choice == "required"
    rules = [f"call_{index}: {json_rule(_call_schema(tool, form))}" for index, tool in enumerate(tools)]
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    one = f"{_mark(model, form.opening, '', form.before)} ({calls}) {_mark(model, form.closing, form.after, '')}"
    start = f'start: call ("\\n" call)*\ncall: {one}' if several else f"start: call\ncall: {one}"
    return lark_mask(model, "\n".join([start, *rules]), largest, "tools")


def _mark(model: ServedModel, mark: str, before: str, after: str) -> str:
    """A mark with white space as part of a grammar: a token of its own where the tokenizer has one."""
    if not mark:
        return ""
    if mark in model.tokenizer.get_added_vocab():
        parts = [json.dumps(before) if before else "", mark, json.dumps(after) if after else ""]
        return " ".join(part for part in parts if part)
    return json.dumps(before + mark + after)


def _call_schema(tool: Tool, form: ToolFormat) -> dict[str, Any]:
    arguments = tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    definitions = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}
    plain = {key: value for key, value in arguments.items() if key not in definitions}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, form.arguments: plain},
        "required": ["name", form.arguments],
        "additionalProperties": False,
        **definitions,
    }


# --- parsing -------------------------------------------------------------------------------------------------------


class ToolCallParser:
    """Turns pieces of text into deltas of an assistant's message: content, and calls whose arguments are streamed.

    What stands between the marks and is no call stays in the content, marks included. A call whose arguments are not
    valid JSON is a call with these arguments, as its first pieces have been sent when that shows. However the text is
    cut into pieces, they add up to the same message.
    """

    def __init__(self, form: ToolFormat, most: int | None = None) -> None:
        """Begin an answer in a form, of which at most `most` calls are reported."""
        self._form, self._most = form, most
        self._text = ""  # outside: what may become a mark; inside: everything since the opening mark
        self._inside = False
        self._space = ""  # before the opening mark
        self._begun = False
        self._sent = 0
        self._lead = True
        self.calls = 0
        """Calls so far."""

    def push(self, piece: str) -> list[Delta]:
        """What a piece of text adds."""
        self._text += piece
        found: list[Delta] = []
        while True:
            before = self._text, self._inside
            found += self._within() if self._inside else self._outside()
            if (self._text, self._inside) == before:
                return found

    def finish(self) -> list[Delta]:
        """What the end of the text adds."""
        found: list[Delta] = []
        if self._inside:
            found = self._close(self._text, "")
        elif self._text:
            found = self._content(self._text)
        self._text = ""
        return found

    def _outside(self) -> list[Delta]:
        opening = self._form.opening
        if not opening:
            return self._bare()
        at = self._text.find(opening)
        if at >= 0:
            before = self._text[:at]
            self._space = before[len(before.rstrip()) :]
            found = self._content(before.rstrip())
            self._text, self._inside, self._begun, self._sent = self._text[at + len(opening) :], True, False, 0
            return found
        certain = _without_part_of(opening, self._text).rstrip()  # white space before a call does not count
        keep = len(self._text) - len(certain)
        found = self._content(self._text[: len(self._text) - keep])
        self._text = self._text[len(self._text) - keep :]
        return found

    def _bare(self) -> list[Delta]:
        """Without marks, an answer that begins with a brace is a call, and any other is text."""
        start = self._text.lstrip()
        if not start:
            return []
        if start.startswith("{") and self._lead:
            self._text, self._inside, self._begun, self._sent = start, True, False, 0
            return []
        found = self._content(self._text)
        self._text = ""
        return found

    def _within(self) -> list[Delta]:
        closing = self._form.closing
        at = self._text.find(closing) if closing else -1
        if at >= 0:
            body, rest = self._text[:at], self._text[at + len(closing) :]
            found = self._close(body, closing)
            self._text, self._inside = rest, False
            return found
        return self._stream(_without_part_of(closing, self._text))

    def _stream(self, body: str) -> list[Delta]:
        """The arguments as far as they are certain."""
        shape = SHAPE_OF_CALL.match(body)
        name = None if shape is None else _unescaped(shape[1])
        if shape is None or name is None or self._full:
            return []
        end = _value_end(body, shape.end())
        found: list[Delta] = []
        if not self._begun:
            found.append(self._head(name))
            self._begun, self._sent = True, shape.end()
        if end > self._sent:
            found.append(self._arguments(body[self._sent : end]))
            self._sent = end
        return found

    def _close(self, body: str, closing: str) -> list[Delta]:
        """The end of a call, or of what turned out to be none: then it stays text, marks and white space included."""
        found = self._stream(body)  # also of a text that came at once: it is a call where its pieces are one
        if self._begun:
            self._begun, self.calls = False, self.calls + 1
            return found
        calls = parse_reply(f"<toolcall>{body}</toolcall>").get("tool_calls")
        if calls is None:
            return self._content(f"{self._space}{self._form.opening}{body}{closing}")
        for call in calls:
            if not self._full:
                found.append(self._head(call["function"]["name"]))
                found.append(self._arguments(json.dumps(call["function"]["arguments"], ensure_ascii=False)))
                self.calls += 1
        return found

    @property
    def _full(self) -> bool:
        return self._most is not None and self.calls >= self._most

    def _content(self, text: str) -> list[Delta]:
        if self._lead:
            text = text.lstrip() if self.calls else text
        if not text or (self.calls and not text.strip()):
            return []
        self._lead = False
        return [{"content": text}]

    def _head(self, name: str) -> Delta:
        call = {"index": self.calls, "id": f"call_{uuid4().hex[:24]}", "type": "function"}
        return {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}

    def _arguments(self, text: str) -> Delta:
        return {"tool_calls": [{"index": self.calls, "function": {"arguments": text}}]}


def _without_part_of(mark: str, text: str) -> str:
    """A text without what may be the beginning of a mark at its end."""
    part = max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[: len(text) - part]


def _unescaped(content: str) -> str | None:
    """The value of a JSON string's content; None if it is not valid."""
    try:
        return json.loads(f'"{content}"')
    except ValueError:
        return None


def _value_end(text: str, start: int) -> int:
    """The end of the JSON value at `start`, or of the text if the value is not complete."""
    depth, quoted, escaped = 0, False, False
    for at in range(start, len(text)):
        character = text[at]
        if quoted:
            quoted = escaped or character != '"'
            escaped = not escaped and character == "\\"
            if not quoted and depth == 0:
                return at + 1
        elif character == '"':
            quoted = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            if depth == 0:
                return at
            depth -= 1
            if depth == 0:
                return at + 1
        elif depth == 0 and character == ",":
            return at
    return len(text)


def merged(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The message that deltas add up to: `content`, and `tool_calls` if there are any."""
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        content.append(delta.get("content") or "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                head = {key: value for key, value in call.items() if key != "index"}
                calls.append({**head, "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    text = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    return {**message, "tool_calls": calls} if calls else message
