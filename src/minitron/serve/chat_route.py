"""/v1/chat/completions: a conversation in, the assistant's next message out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from .context import Context
from .generation import Generation
from .grammar import GrammarMask, schema_mask
from .guard import REFUSAL
from .requests import chat_limit, chat_prompt, sequences_of
from .scheduler import TextSequence, Update
from .schema import ChatRequest, ResponseFormat
from .served import ServedModel
from .streams import DONE, event
from .token_texts import token_texts
from .tool_calls import Delta, ToolCallParser, merged, tool_format, tool_mask


class Choice:
    """One answer that is being written: updates in, deltas of the message out."""

    def __init__(self, index: int, parser: ToolCallParser | None) -> None:
        self.index, self._parser = index, parser

    def deltas(self, update: Update) -> list[Delta]:
        """What an update adds to the message."""
        if self._parser is None:
            return [{"content": update.text}] if update.text else []
        found = self._parser.push(update.text)
        return found + self._parser.finish() if update.finish else found

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason for the end, which is tool_calls if there are some."""
        called = self._parser is not None and self._parser.calls > 0
        return "tool_calls" if reason == "stop" and called else reason


def chat_sequences(context: Context, model: ServedModel, request: ChatRequest) -> list[TextSequence]:
    """The sequences of a request.

    Raises:
        ApiError: something in the request is wrong for this model.
    """
    prompt = chat_prompt(model, request)
    mask = tool_mask(model, request, context.settings.max_schema)
    mask = mask or format_mask(context, model, request.response_format)
    count = request.n or 1
    return sequences_of(
        model,
        request,
        [prompt],
        limit=chat_limit(request),
        ends=model.chat_ends,
        seconds=context.settings.request_seconds,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        masks=None if mask is None else [mask.copy() for _ in range(count)],
    )


def format_mask(context: Context, model: ServedModel, form: ResponseFormat | None) -> GrammarMask | None:
    """The grammar of a response format; None if any text is allowed."""
    if form is None or form.type == "text":
        return None
    if form.json_schema is None or form.json_schema.schema_ is None:
        schema: Any = {"type": "object"}
    else:
        schema = form.json_schema.schema_
    return schema_mask(model, schema, context.settings.max_schema, "response_format")


def choices_of(model: ServedModel, request: ChatRequest) -> list[Choice]:
    """The choices of a request, each with a parser of tool calls if the model may call tools."""
    with_tools = bool(request.tools) and request.tool_choice != "none"
    most = 1 if request.parallel_tool_calls is False else None
    form = tool_format(model) if with_tools else None
    return [Choice(index, ToolCallParser(form, most) if form else None) for index in range(request.n or 1)]


class ChatAnswer:
    """The objects of one answer of /v1/chat/completions."""

    def __init__(self, model: ServedModel, request: ChatRequest, choices: Sequence[Choice]) -> None:
        self._model, self._request, self._choices = model, request, choices
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model.name}

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer as one object."""
        found = []
        for choice, update in zip(self._choices, await generation.whole(), strict=True):
            message = merged(choice.deltas(update))
            finish = choice.finish_reason(update.finish)
            logprobs = self._logprobs(update)
            if finish == "content_filter":
                message["refusal"] = REFUSAL
            guard = generation.guard_field(choice.index)
            found.append(
                {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": finish, **guard}
            )
        return {**self._head, "object": "chat.completion", "choices": found, "usage": generation.usage()}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as events: role, content, reason for the end, usage if wanted, and [DONE]."""
        for choice in self._choices:
            yield self._chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})
        async for index, update in generation.updates():
            choice = self._choices[index]
            deltas = choice.deltas(update)
            logprobs = self._logprobs(update) if update.logprobs else None
            if logprobs and not deltas:
                deltas = [{"content": ""}]
            for at, delta in enumerate(deltas):
                yield self._chunk(index, delta, logprobs if at == 0 else None)
            if update.finish == "content_filter":
                yield self._chunk(index, {"refusal": REFUSAL})
            if update.finish is not None:
                guard = generation.guard_field(index)
                yield self._chunk(index, {}, finish=choice.finish_reason(update.finish), guard=guard)
        if self._request.include_usage:
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": generation.usage()})
        yield DONE

    def _chunk(
        self, index: int, delta: Delta, logprobs: Any = None, finish: str | None = None, guard: Any = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, **(guard or {})}
        usage = {"usage": None} if self._request.include_usage else {}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    def _logprobs(self, update: Update) -> dict[str, Any] | None:
        return token_texts(self._model).chat_logprobs(update.logprobs) if self._request.logprobs else None
