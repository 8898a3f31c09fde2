"""/v1/responses without state: input items in, output items out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from .chat_route import Choice
from .generation import Generation
from .responses_schema import ResponsesRequest
from .served import ServedModel
from .streams import event
from .tool_calls import Delta, merged

CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is incomplete, by the reason for which its text ended."""


class ResponsesAnswer:
    """The objects of one answer of /v1/responses."""

    def __init__(self, model: ServedModel, request: ResponsesRequest, choice: Choice) -> None:
        self._request, self._choice = request, choice
        self._message_id = f"msg_{uuid4().hex}"
        form = request.text.format if request.text else None
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": model.name,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": self._tool_choice(),
            "tools": [
                {**tool.model_dump(), "strict": bool(tool.strict), "parameters": tool.parameters or {}}
                for tool in request.tools or []
            ],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
        }

    def _tool_choice(self) -> Any:
        choice = self._request.tool_choice
        return choice.model_dump() if hasattr(choice, "model_dump") else choice or "auto"  # type: ignore[union-attr]

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer as one object."""
        [update] = await generation.whole()
        return self._object(self._choice.deltas(update), update.finish, generation)

    def _object(self, deltas: list[Delta], finish: str | None, generation: Generation) -> dict[str, Any]:
        usage = generation.usage()
        cut = CUT.get(finish or "")
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": cut} if cut else None,
            "output": self._items(deltas, "incomplete" if cut else "completed"),
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cache_write_tokens": 0, **usage["prompt_tokens_details"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            **generation.guard_field(0),
        }

    def _items(self, deltas: list[Delta], status: str) -> list[dict[str, Any]]:
        message = merged(deltas)
        calls = message.get("tool_calls", [])
        items = [] if calls and not message["content"] else [self._message(message["content"] or "", status)]
        return items + [_call(call["id"], call["function"], status) for call in calls]

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)],
        }

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as named events with sequence numbers."""
        number = 0

        def named(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

        begun = {**self._head, "status": "in_progress", "incomplete_details": None, "output": []}
        yield named("response.created", response=begun)
        yield named("response.in_progress", response=begun)
        items, deltas, finish = _Items(self._message_id, named), [], None
        async for _, update in generation.updates():
            for delta in self._choice.deltas(update):
                deltas.append(delta)
                for body in items.add(delta):
                    yield body
            finish = update.finish or finish
        for body in items.close():
            yield body
        whole = self._object(deltas, finish, generation)
        yield named("response.incomplete" if finish in CUT else "response.completed", response=whole)


class _Items:
    """Events of output items: the text, and then each call."""

    def __init__(self, message_id: str, named: Any) -> None:
        self._named, self._message_id = named, message_id
        self._text: str | None = None
        self._call: dict[str, Any] | None = None
        self._index = -1

    def add(self, delta: Delta) -> list[bytes]:
        """The events of one delta of a message."""
        found: list[bytes] = []
        if delta.get("content"):
            if self._text is None:
                found += [*self.close(), *self._begin_text()]
            self._text = (self._text or "") + delta["content"]
            found.append(self._named("response.output_text.delta", **self._at, delta=delta["content"], logprobs=[]))
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                found += self.close()
                self._index += 1
                self._call = {"id": call["id"], "function": {"name": call["function"]["name"], "arguments": ""}}
                item = _call(call["id"], self._call["function"], "in_progress")
                found.append(self._named("response.output_item.added", output_index=self._index, item=item))
            arguments = call["function"]["arguments"]
            if arguments and self._call is not None:
                self._call["function"]["arguments"] += arguments
                at = {"item_id": _item_id(self._call["id"]), "output_index": self._index}
                found.append(self._named("response.function_call_arguments.delta", **at, delta=arguments))
        return found

    def close(self) -> list[bytes]:
        """The events that end the item in progress."""
        if self._text is not None:
            text, self._text = self._text, None
            item = {"id": self._message_id, "type": "message", "role": "assistant", "status": "completed"}
            return [
                self._named("response.output_text.done", **self._at, text=text, logprobs=[]),
                self._named("response.content_part.done", **self._at, part=_part(text)),
                self._named(
                    "response.output_item.done", output_index=self._index, item={**item, "content": [_part(text)]}
                ),
            ]
        if self._call is not None:
            call, self._call = self._call, None
            item = _call(call["id"], call["function"], "completed")
            at = {"item_id": item["id"], "output_index": self._index}
            return [
                self._named("response.function_call_arguments.done", **at, **call["function"]),
                self._named("response.output_item.done", output_index=self._index, item=item),
            ]
        return []

    def _begin_text(self) -> list[bytes]:
        self._index += 1
        item = {"id": self._message_id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        return [
            self._named("response.output_item.added", output_index=self._index, item=item),
            self._named("response.content_part.added", **self._at, part=_part("")),
        ]

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": self._index, "content_index": 0}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item_id(call_id: str) -> str:
    return f"fc_{call_id.removeprefix('call_')}"


def _call(call_id: str, function: dict[str, Any], status: str) -> dict[str, Any]:
    return {"id": _item_id(call_id), "type": "function_call", "call_id": call_id, "status": status, **function}
