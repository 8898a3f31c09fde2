"""Connections of clients that are slow, silent, many, or that do not speak HTTP."""

from __future__ import annotations

import asyncio
import http
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

HEAD_SECONDS = 30.0
"""Time in which the head of a request must have come, from the opening of the connection or the first byte."""
SPARE_FILES = 256
"""Open files that are kept for other things than connections."""


class Connection(H11Protocol):
    """uvicorn's connection with a limit on the time for a head and on their number, and errors in OpenAI's form."""

    head_seconds = HEAD_SECONDS
    most_connections: int | None = None
    """Open connections; one more is refused. None for any number."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        if self.most_connections is not None and len(self.connections) > self.most_connections:
            self._refuse(
                ApiError(
                    f"{self.most_connections} connections are open, which is the most that this server takes",
                    status=503,
                    kind="server_error",
                    code="too_many_connections",
                    headers={"Retry-After": "5"},
                )
            )
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come: a part of a head, of a body, or several requests."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        else:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(ApiError(msg, code="invalid_http"))

    def _wait_for_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        idle = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if self.transport.is_closing():
            return
        if idle:
            self.transport.close()
            return
        message = f"the head of the request did not come within {self.head_seconds:g} s"
        self._refuse(ApiError(message, status=408, code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, if the answer has not begun, and close the connection."""
        self._stop_waiting()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the route must not answer too
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            headers += [("connection", "close"), *error.headers.items()]
            reason = http.HTTPStatus(error.status).phrase.encode()
            parts = (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
        self.transport.close()


def connections(open_files: int | None) -> type[Connection]:
    """The class of connections of a process that may open so many files; None for any number."""
    most = None if open_files is None else max(16, open_files - SPARE_FILES)
    return type("Connection", (Connection,), {"most_connections": most})
