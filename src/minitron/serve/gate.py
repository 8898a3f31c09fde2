"""What every request passes: API keys, and a line in the log."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .context import Context
from .errors import ApiError

OPEN_ROUTES = ("/health", "/ready")
"""Routes that need no key: load balancers ask them."""
PAGE = Path(__file__).with_name("page")
"""Files that a browser gets at /. They need no key: they ask for one, and send it with what they request."""
LONGEST_KEY = 1024
_log = logging.getLogger("minitron.serve.access")


class ApiKeys:
    """The keys of a server, kept as digests and compared in constant time."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, file: Path) -> ApiKeys:
        """The keys of a file, one a line; empty lines and lines that begin with # do not count.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it has no keys.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; --api-keys names a file with one key a line")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{file} has no keys; write one a line")
        return cls(keys)

    def know(self, key: str) -> bool:
        """Whether a key is one of these. Every key is compared, so that the time says nothing."""
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class Gate:
    """ASGI middleware: refuses requests without a key, and logs every response."""

    def __init__(self, app: Any, context: Context) -> None:
        self._app, self._context = app, context
        file = context.settings.api_keys
        self._keys = None if file is None else ApiKeys.read(Path(file))
        files = [path.relative_to(PAGE) for path in PAGE.rglob("*") if path.is_file()]
        self._open = {*OPEN_ROUTES, "/", *(f"/{path.as_posix()}" for path in files)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 0, time.monotonic()

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, noting)
            else:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, noting)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")
            self._context.metrics.response(route, status)
            client = (scope.get("client") or ("",))[0]
            entry = {"method": scope["method"], "path": scope["path"], "status": status, "client": client}
            _log.info("request", extra={"fields": {**entry, "seconds": round(seconds, 4)}})

    def _refusal(self, scope: Any) -> ApiError | None:
        if self._keys is None or scope["path"] in self._open or scope["method"] == "OPTIONS":
            return None
        given = Headers(scope=scope).get("authorization", "")
        kind, _, key = given.partition(" ")
        if kind.lower() == "bearer" and len(key) <= LONGEST_KEY and self._keys.know(key.strip()):
            return None
        what = "the API key is not known" if given else "there is no API key"
        return ApiError(
            f"{what}; send the header `Authorization: Bearer KEY`",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class JsonLines(logging.Formatter):
    """Log records as JSON, one a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
