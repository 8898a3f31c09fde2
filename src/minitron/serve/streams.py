"""Server-sent events: an answer that is sent as it is written."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, suppress
from typing import Any

from .errors import ApiError, failed
from .generation import ClientLeft, unless_client_leaves

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any], name: str | None = None) -> bytes:
    """One event with a JSON object."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream:
    """An ASGI response of events. When the client leaves, or does not read, the source of events is closed."""

    def __init__(self, events: AsyncIterator[bytes], send_seconds: float, resources: ExitStack) -> None:
        """Prepare a response.

        Args:
            events: an async generator. What it raises becomes a last event with an error object.
            send_seconds: how long the client may take to read a piece.
            resources: closed when the response has ended, however it ends.
        """
        self._events, self._seconds, self._resources = events, send_seconds, resources

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events until they end or the client leaves."""
        with self._resources, suppress(ClientLeft, TimeoutError, OSError):
            await unless_client_leaves(receive, self._send_all(send))

    async def _send_all(self, send: Any) -> None:
        async def put(body: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await asyncio.wait_for(send(message), self._seconds)

        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            try:
                async for body in events:
                    await put(body)
            except ApiError as error:
                await put(event(error.body) + DONE)
            except (OSError, TimeoutError, asyncio.CancelledError):
                raise
            except Exception:
                await put(event(failed("the answer could not be finished").body) + DONE)
                await put(b"", more=False)
                raise
        await put(b"", more=False)
