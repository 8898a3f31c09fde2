"""Reading a request's body in bounded time and memory."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from .context import Context
from .errors import ApiError
from .generation import ClientLeft
from .schema import Body, parse

M = TypeVar("M", bound=Body)


async def read(request: Request, context: Context, kind: type[M]) -> M:
    """The checked body of a request.

    Raises:
        ApiError: it is too large, comes too slowly, is of another content type, or is wrong.
        ClientLeft: the client has closed the connection.
    """
    kind_of_body = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind_of_body != "application/json":
        raise ApiError(
            f"the content type is {kind_of_body!r}; it must be application/json", status=415, param="Content-Type"
        )
    try:
        body = await asyncio.wait_for(_collect(request, context.settings.max_body), context.settings.body_seconds)
    except TimeoutError:
        raise ApiError(
            f"the body did not come within {context.settings.body_seconds:g} s", status=408, code="timeout"
        ) from None
    except ClientDisconnect:
        raise ClientLeft from None
    if len(body) > 1 << 16:
        return await asyncio.to_thread(parse, kind, body)
    return parse(kind, body)


async def _collect(request: Request, most: int) -> bytes:
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > most:
        raise _too_large(most)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(
        f"the body has more than {most} bytes, which is the most that this server takes",
        status=413,
        code="body_too_large",
    )
