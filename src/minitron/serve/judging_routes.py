"""/v1/embeddings and /classify: texts in, vectors or labels out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .bodies import read
from .context import Context
from .errors import ApiError
from .generation import unless_client_leaves
from .schema import ClassifyRequest, EmbeddingsRequest
from .vectors import embed, encoded

T = TypeVar("T")


class JudgingRoutes:
    """The functions behind the routes."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def embeddings(self, http: Request) -> Response:
        """A vector for each text."""
        request = await read(http, self._context, EmbeddingsRequest)
        model = self._context.served.find(request.model)
        inputs = [
            model.encode(text) if isinstance(text, str) else model.check_ids(text, "input") for text in request.inputs
        ]
        vectors = await self._each(http, [lambda ids=ids: embed(model, ids) for ids in inputs])
        data = [
            {"object": "embedding", "index": index, "embedding": encoded(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        count = sum(map(len, inputs))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

    async def classify(self, http: Request) -> Response:
        """Labels for each text, or the answer to a question in each."""
        request = await read(http, self._context, ClassifyRequest)
        model = self._context.served.find_classifier(request.model)
        jobs = [
            lambda index=index, text=text, pair=pair: model.judge(
                index, text, request.question, pair, request.calibrated
            )
            for index, (text, pair) in enumerate(zip(request.inputs, request.pairs, strict=True))
        ]
        judged: list[tuple[dict[str, Any], int]] = await self._each(http, jobs)
        count = sum(tokens for _, tokens in judged)
        return JSONResponse(
            {
                "id": f"classify-{uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": model.name,
                "data": [found for found, _ in judged],
                "usage": {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count},
            }
        )

    async def _each(self, http: Request, jobs: list[Callable[[], T]]) -> list[T]:
        """The results of jobs in the engine's thread, one between two of its steps."""

        loop, seconds = self._context.served.loop, self._context.settings.request_seconds

        async def work() -> list[T]:
            try:
                async with asyncio.timeout(seconds):
                    return [await asyncio.wrap_future(loop.call(job)) for job in jobs]
            except TimeoutError:
                raise ApiError(
                    f"the request took longer than {seconds:g} s", status=408, kind="server_error", code="timeout"
                ) from None

        return await unless_client_leaves(http.receive, work())
