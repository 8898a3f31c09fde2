"""A request's sequences, from the event loop's side: hand them to the engine, await their updates, stop when the client
leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from .errors import ApiError
from .metrics import Metrics
from .scheduler import TextSequence, Update
from .served import Served, ServedModel

T = TypeVar("T")
OUTCOMES = {"refuse": "refused", "flag": "flagged", "count": "counted"}
Receive = Callable[[], Awaitable[Any]]


class ClientLeft(Exception):  # noqa: N818 (not an error)
    """The client has closed the connection; nobody reads the answer."""


class Delivery(NamedTuple):
    """Where a sequence's updates go: `TextSequence.tag`."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[tuple[int, Update]]
    choice: int
    """The sequence's index in its request."""


def deliver(updates: list[tuple[TextSequence, Update]]) -> None:
    """Pass updates from the engine's thread to those who await them; see `EngineLoop`."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Delivery, Update]]] = {}
    for sequence, update in updates:
        by_loop.setdefault(sequence.tag.loop, []).append((sequence.tag, update))
    for loop, parts in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put, parts)


def _put(parts: list[tuple[Delivery, Update]]) -> None:
    for delivery, update in parts:
        delivery.queue.put_nowait((delivery.choice, update))


class Generation:
    """The sequences of one request. Leaving its `with` block cancels what is unfinished."""

    def __init__(self, served: Served, model: ServedModel, sequences: Sequence[TextSequence], metrics: Metrics) -> None:
        self._served, self._model, self._metrics = served, model, metrics
        self.sequences = list(sequences)
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._started = time.monotonic()
        self._first = 0.0
        self._finished: dict[int, str] = {}

    def __enter__(self) -> Generation:
        loop = asyncio.get_running_loop()
        for index, sequence in enumerate(self.sequences):
            sequence.tag = Delivery(loop, self._queue, index)
        self._served.loop.submit(self._model.scheduler, *self.sequences)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for sequence in self.sequences:
            if not sequence.ended:
                self._model.scheduler.cancel(sequence)
        self._served.loop.wake()
        for index in range(len(self.sequences)):
            self._metrics.finished(self._model.name, self._finished.get(index, "abort"))
        self._count_judgements()
        self._metrics.request(self._model.name, self.sequences, self._started, self._first)

    def _count_judgements(self) -> None:
        guard = self._model.scheduler.guard
        if guard is None:
            return
        for sequence in self.sequences:
            for part, judgement in sequence.judgements.items():
                outcome = OUTCOMES[guard.action] if judgement.flagged else "passed"
                self._metrics.judged(self._model.name, part, outcome)

    def guard_field(self, index: int) -> dict[str, Any]:
        """The field of a response that says how a sequence was judged; empty without a guard, or one that counts."""
        guard = self._model.scheduler.guard
        judged = self.sequences[index].judgements
        if guard is None or guard.action == "count" or not judged:
            return {}
        return {"guard": {part: asdict(judgement) for part, judgement in judged.items()}}

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Updates with the index of their sequence, until all sequences have ended. What waits is merged.

        Raises:
            ApiError: a sequence has failed.
        """
        while len(self._finished) < len(self.sequences):
            merged: dict[int, Update] = {}
            found = [await self._queue.get()]
            while not self._queue.empty():
                found.append(self._queue.get_nowait())
            self._first = self._first or time.monotonic()
            for index, update in found:
                if update.error is not None:
                    self._finished[index] = "error"
                    raise update.error
                merged.setdefault(index, Update()).add(update)
            for index, update in merged.items():
                if update.finish is not None:
                    self._finished[index] = update.finish
                yield index, update

    async def whole(self) -> list[Update]:
        """Each sequence's updates as one.

        Raises:
            ApiError: a sequence has failed.
        """
        found = [Update() for _ in self.sequences]
        async for index, update in self.updates():
            found[index].add(update)
        return found

    def usage(self) -> dict[str, Any]:
        """The `usage` object: a prompt counts once, however many choices it has."""
        prompts = {tuple(sequence.prompt): sequence.cached for sequence in reversed(self.sequences)}
        prompt = sum(map(len, prompts))
        completion = sum(len(sequence.tokens) for sequence in self.sequences)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(prompts.values())},
        }


async def unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the client leaves.

    Args:
        receive: of ASGI, after the whole body has been received.
        work: what to await.

    Raises:
        ClientLeft: the client has closed the connection.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def too_long(model: ServedModel, prompt: int, new: int) -> ApiError:
    """The error for a prompt that leaves no room for so many new tokens."""
    return ApiError(
        # These words are OpenAI's, by which clients recognize the error.
        f"This model's maximum context length is {model.context} tokens; the request to {model.name!r} has {prompt} "
        f"tokens of prompt and asks for {new} new ones; shorten the prompt or ask for at most "
        f"{max(0, model.context - prompt)}",
        param="messages",
        code="context_length_exceeded",
    )
