"""Replicas of the server on Ray Serve: one on each of some machines, more where more is asked, requests with the same
beginning sent to the same one.

    from ray import serve
    from minitron.serve.ray import deployment

    serve.run(deployment(ServeSettings(("bundled",)), least=1, most=4))

A replica is a whole server (`app.make_app` over its own engine), so every route answers as on one machine, and no
answer depends on the replica that gives it. `/metrics` is that of the replica that was asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from .settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application  # type: ignore[reportMissingImports] (an extra)

PREFIX = 256
"""Characters at the beginning of a prompt that decide which replica answers."""
HEADERS = frozenset(("content-type", "retry-after", "cache-control", "x-accel-buffering", "allow"))
"""Headers of a replica's response that are passed on."""
REMEMBERED = 256
"""Keys that a replica remembers, those used last."""
QUEUED = 8
"""Requests in progress for each replica, on average, above which there are more replicas."""


class Replica:
    """One server without a socket: the application, called with the parts of a request."""

    def __init__(self, settings: ServeSettings) -> None:
        """Load the models and start the engine's thread."""
        from .app import make_app
        from .context import Context
        from .engine_loop import EngineLoop
        from .generation import deliver
        from .served import Served, ServedModel, load_models

        models = load_models(settings, lambda sentence: None)
        schedulers = [model.scheduler for model in models if isinstance(model, ServedModel)]
        self._loop = EngineLoop(schedulers, deliver)
        self._app: Any = make_app(Context(settings, Served(models, self._loop)))
        self._loop.start()

    def check_health(self) -> None:
        """Called by Ray: a replica whose engine is dead is replaced.

        Raises:
            RuntimeError: the engine's thread has ended.
        """
        if not self._loop.alive:
            raise RuntimeError("the engine does not run")

    async def remember(self, key: str) -> str:
        """Keep in mind that prompts of this key have been answered here; see `deployment`."""
        return key

    async def respond(self, scope: dict[str, Any], body: bytes, key: str) -> Any:
        """The response to a request, piece by piece: first status and headers, then bytes."""
        if key:
            await self.remember(key)
        pieces: asyncio.Queue[Any] = asyncio.Queue()  # as large as an answer: the app never waits for a reader
        left = asyncio.Event()
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pieces.put_nowait(message)

        async def run() -> None:
            try:
                await self._app(scope, receive, send)
            finally:
                pieces.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await pieces.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [(name.decode(), value.decode()) for name, value in message.get("headers", ())]
                    yield message["status"], [pair for pair in headers if pair[0].lower() in HEADERS]
                elif message.get("body"):
                    yield message["body"]
        finally:  # the client has left, or the response has ended
            left.set()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


class Router:
    """Takes requests over HTTP and passes each to a replica: to the same one where the prompt begins the same."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Any) -> Any:
        """Answer one request."""
        from starlette.responses import StreamingResponse

        body = await request.body()
        scope = {key: request.scope[key] for key in ("type", "method", "path", "query_string", "headers")}
        scope |= {"raw_path": request.url.path.encode(), "http_version": "1.1", "scheme": "http", "root_path": "",
                  "client": None, "server": None, "asgi": {"version": "3.0"}}  # fmt: skip
        key = prefix_key(body)
        target = self._replicas.options(multiplexed_model_id=key) if key else self._replicas
        pieces = target.respond.remote(scope, body, key)
        status, headers = await anext(aiter(pieces))

        async def rest() -> AsyncIterator[bytes]:
            async for piece in pieces:
                yield piece

        return StreamingResponse(rest(), status_code=status, headers=dict(headers))


def prefix_key(body: bytes) -> str:
    """What requests share that should reach the same replica: their model and the beginning of their prompt; empty for
    a body that has neither."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(request, dict):
        return ""
    messages = request.get("messages") or request.get("input") or request.get("prompt") or ""
    first = messages[:2] if isinstance(messages, list) else messages
    if not first:
        return ""
    text = f"{request.get('model')}\0{json.dumps(first)[:PREFIX]}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def deployment(settings: ServeSettings, least: int = 1, most: int = 1, cpus: float = 1.0) -> Application:
    """An application for `ray.serve.run`: a router in front of `least` to `most` replicas.

    Args:
        settings: of every replica; host and port are those of Ray's proxy.
        least, most: numbers of replicas. Between them Ray follows the number of requests in progress.
        cpus: of a replica.

    Raises:
        ValueError: Ray Serve is not installed, or the numbers make no sense.
    """
    if not 1 <= least <= most:
        raise ValueError(f"least is {least} and most is {most}; they must be at least 1, in this order")
    try:
        from ray import serve  # type: ignore[reportMissingImports, reportAttributeAccessIssue] (an extra)
    except ImportError:
        raise ValueError("Ray Serve is missing; install it with: pip install 'minitron[ray,serve]'") from None

    class RememberingReplica(Replica):
        """Tells Ray the keys of the prompts that it has answered, as if they were models that it has loaded: Ray sends
        a request to a replica that has its model."""

        @serve.multiplexed(max_num_models_per_replica=REMEMBERED)
        async def remember(self, key: str) -> str:
            return key

    replicas: Any = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": cpus},
        autoscaling_config={"min_replicas": least, "max_replicas": most, "target_ongoing_requests": QUEUED},
        max_ongoing_requests=settings.max_waiting + settings.slots,
    )(RememberingReplica)
    router: Any = serve.deployment(name="router", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1024)(Router)
    return router.bind(replicas.bind(settings))
