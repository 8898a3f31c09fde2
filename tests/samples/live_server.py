"""A server in this process, on a free port of loopback, for tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from minitron.serve.app import make_app
from minitron.serve.connections import Connection
from minitron.serve.context import Context
from minitron.serve.engine_loop import EngineLoop
from minitron.serve.generation import deliver
from minitron.serve.served import AnyModel, Served, ServedModel, load_models
from minitron.serve.settings import ServeSettings


class LiveServer:
    """Its address, and what is behind it."""

    def __init__(self, context: Context, port: int) -> None:
        self.context = context
        self.port = port
        self.url = f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def live_server(
    settings: ServeSettings, models: list[AnyModel] | None = None, connection: type[Connection] = Connection
) -> Iterator[LiveServer]:
    import uvicorn

    models = load_models(settings, lambda sentence: None) if models is None else models
    loop = EngineLoop([model.scheduler for model in models if isinstance(model, ServedModel)], deliver)
    context = Context(settings, Served(models, loop))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        config = uvicorn.Config(make_app(context), log_config=None, lifespan="off", ws="none", http=connection)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        loop.start()
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield LiveServer(context, port)
        finally:
            server.should_exit = True
            thread.join()
            loop.stop()


def keys_file(folder: Path, *keys: str) -> str:
    file = folder / "keys.txt"
    file.write_text("# comment\n\n" + "\n".join(keys) + "\n", encoding="utf-8")
    return str(file)
