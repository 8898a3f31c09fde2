"""/v1/completions: texts in, their continuations out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from .chat_route import format_mask
from .context import Context
from .generation import Generation
from .requests import sequences_of
from .scheduler import TextSequence, Update
from .schema import CompletionRequest
from .served import ServedModel
from .streams import DONE, event
from .token_choice import TokenLogprobs
from .token_texts import token_texts

DEFAULT_TOKENS = 16
"""New tokens where `max_tokens` is not given, as OpenAI's."""


def completion_sequences(context: Context, model: ServedModel, request: CompletionRequest) -> list[TextSequence]:
    """The sequences of a request: `n` for each prompt.

    Raises:
        ApiError: something in the request is wrong for this model.
    """
    prompts = [
        model.encode(prompt) if isinstance(prompt, str) else model.check_ids(prompt, "prompt")
        for prompt in request.prompts
    ]
    mask = format_mask(context, model, request.response_format)
    count = len(prompts) * (request.n or 1)
    return sequences_of(
        model,
        request,
        prompts,
        limit=DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens,
        ends=model.ends,
        seconds=context.settings.request_seconds,
        top_logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        masks=None if mask is None else [mask.copy() for _ in range(count)],
    )


class CompletionAnswer:
    """The objects of one answer of /v1/completions."""

    def __init__(self, model: ServedModel, request: CompletionRequest, sequences: Sequence[TextSequence]) -> None:
        self._model, self._request, self._sequences = model, request, sequences
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._offsets = [0] * len(sequences)

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer as one object."""
        choices = []
        for index, update in enumerate(await generation.whole()):
            echoed = self._echo(index)
            choices.append(
                {
                    "index": index,
                    "text": echoed + update.text,
                    "logprobs": self._logprobs(index, update, echo=bool(self._request.echo)),
                    "finish_reason": update.finish,
                    **generation.guard_field(index),
                }
            )
        return {**self._head, "choices": choices, "usage": generation.usage()}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as events: text, reason for the end, usage if wanted, and [DONE]."""
        begun: set[int] = set()
        async for index, update in generation.updates():
            echo = bool(self._request.echo) and index not in begun
            begun.add(index)
            text = (self._echo(index) if echo else "") + update.text
            if text or update.logprobs:
                yield self._chunk(index, text, self._logprobs(index, update, echo))
            if update.finish is not None:
                yield self._chunk(index, "", None, update.finish, generation.guard_field(index))
        if self._request.include_usage:
            yield event({**self._head, "choices": [], "usage": generation.usage()})
        yield DONE

    def _echo(self, index: int) -> str:
        return self._model.decode(self._sequences[index].prompt) if self._request.echo else ""

    def _chunk(self, index: int, text: str, logprobs: Any, finish: str | None = None, guard: Any = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, **(guard or {})}
        usage = {"usage": None} if self._request.include_usage else {}
        return event({**self._head, "choices": [choice], **usage})

    def _logprobs(self, index: int, update: Update, echo: bool) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        sequence = self._sequences[index]
        found: list[TokenLogprobs | None] = list(update.logprobs)
        tokens = list(update.tokens)
        if echo:
            found = [None, *sequence.reported, *found]
            tokens = [*sequence.prompt, *tokens]
        texts = token_texts(self._model)
        result = texts.completion_logprobs(found, tokens, self._offsets[index])
        self._offsets[index] += sum(len(text) for text in result["tokens"])
        return result
