"""The process: it loads the models, starts the engine's thread, listens, and ends in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import uvicorn

from .app import make_app
from .connections import connections
from .context import Context
from .engine_loop import EngineLoop
from .gate import JsonLines
from .generation import deliver
from .served import Served, ServedModel, load_models
from .settings import ServeSettings

LARGEST_HEADERS = 64 << 10
KEEP_ALIVE_SECONDS = 30
"""How long an idle connection stays open."""
_log = logging.getLogger("minitron.serve")


class _Server(uvicorn.Server):
    """Takes nothing new after a first signal, and ends at once after a second one."""

    context: Context

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal has come."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.context.draining = True


def serve(settings: ServeSettings, say: Callable[[str], object]) -> int:
    """Serve until a signal comes; the exit code.

    Args:
        settings: what to serve, and how.
        say: called with sentences for the terminal.

    Raises:
        FileNotFoundError, ValueError, OSError: a model cannot be loaded, or the port is taken.
    """
    _start_log(settings)
    open_files = _raise_limit_of_files()
    models = load_models(settings, say)
    died: list[BaseException] = []

    def engine_died(error: BaseException) -> None:
        died.append(error)
        server.should_exit = True

    loop = EngineLoop([model.scheduler for model in models if isinstance(model, ServedModel)], deliver, engine_died)
    context = Context(settings, Served(models, loop))
    config = uvicorn.Config(
        make_app(context),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        h11_max_incomplete_event_size=LARGEST_HEADERS,
        http=connections(open_files),
        backlog=4096,
    )
    server = _Server(config)
    server.context = context
    loop.start()
    before = {kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(_run(server, settings, say))
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if not server.force_exit:
            loop.stop()
    return 1 if died else 0


async def _run(server: _Server, settings: ServeSettings, say: Callable[[str], object]) -> None:
    serving = asyncio.ensure_future(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ports = [socket.getsockname()[1] for one in server.servers for socket in one.sockets]
        port = ports[0] if ports else settings.port
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"listening on http://{host}:{port} (Ctrl-C ends)")
    await serving


def _start_log(settings: ServeSettings) -> None:
    handler: logging.Handler = (
        logging.StreamHandler(sys.stderr) if settings.log_file is None else logging.FileHandler(settings.log_file)
    )
    handler.setFormatter(JsonLines())
    logging.raiseExceptions = False  # a full disk must not fill the terminal, nor end an answer
    for name in ("minitron.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "minitron.serve" else logging.WARNING)


def _raise_limit_of_files() -> int | None:
    """Allow as many open connections as the system permits; how many files that are, None if there is no limit."""
    if os.name != "posix":
        return None
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return None if most == resource.RLIM_INFINITY else most
