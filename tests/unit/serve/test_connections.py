"""Clients that are slow, silent, many, or do not speak HTTP, and an engine that dies: nothing is lost for others."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

pytest.importorskip("starlette", reason="pip install 'minitron[serve]'")
pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")
httpx = pytest.importorskip("httpx", reason="pip install 'minitron[serve]'")

from live_server import live_server  # noqa: E402
from scripted_model import scripted_model  # noqa: E402

from minitron.serve.connections import SPARE_FILES, Connection, connections  # noqa: E402
from minitron.serve.settings import ServeSettings  # noqa: E402

HELLO = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Impatient(Connection):
    head_seconds = 1.5


@pytest.fixture(scope="module")
def server():
    settings = ServeSettings(("scripted",), body_seconds=3.0, max_waiting=8)
    with live_server(settings, [scripted_model()], Impatient) as found:
        yield found


def connected(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=300)


def everything(connection: socket.socket) -> tuple[int, dict]:
    """The status and the error object of the answer after which the server closes the connection."""
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def answered(server) -> bool:
    found = httpx.post(f"{server.url}/v1/chat/completions", json=HELLO, timeout=300)
    return found.json()["choices"][0]["message"]["content"] == "You said: Hello"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (HEAD, 408, "timeout"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", 408, "timeout"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "invalid_http"),
        (HEAD + b"X: " + b"x" * 30_000, 400, "invalid_http"),
    ],
)
def test_what_is_no_request_gets_an_error_object(server, sent, status, code) -> None:
    with connected(server) as connection:
        connection.sendall(sent)
        assert answered(server)
        found = everything(connection)
    assert (found[0], found[1]["code"]) == (status, code)
    assert set(found[1]) == {"message", "type", "param", "code"}


def test_a_head_that_drips_is_not_waited_for(server) -> None:
    """Each byte alone would come in time (slow loris)."""
    start = time.monotonic()
    with connected(server) as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        while time.monotonic() - start < 20:
            connection.sendall(b"x")
            time.sleep(0.05)
    assert time.monotonic() - start < 15


def test_a_silent_connection_is_closed(server) -> None:
    with connected(server) as connection:
        assert connection.recv(100) == b""


def test_a_client_that_closes_its_sending_half_has_left(server) -> None:
    """In a head, in a body, and after a whole request: the connection ends, and nothing runs on."""
    body = json.dumps(HELLO).encode()
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for sent in (HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", whole):
        with connected(server) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            found = b""
            while part := connection.recv(1 << 16):
                found += part
        assert found == b"" or sent == whole  # which may be answered before the end of its sending half is seen
    assert answered(server)
    scheduler = next(iter(server.context.served.writing)).scheduler
    assert scheduler.num_running + scheduler.num_waiting == 0


def test_a_client_that_does_not_read_its_stream_holds_nobody_up(server) -> None:
    body = json.dumps({**HELLO, "stream": True, "n": 4}).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(connected(server))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert answered(server)


def test_one_connection_too_many_is_refused_and_others_go_on() -> None:
    crowd = type("Crowd", (Connection,), {"most_connections": 10})
    with (
        live_server(ServeSettings(("scripted",)), [scripted_model()], crowd) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        assert client.get("/health").status_code == 200
        with contextlib.ExitStack() as stack:
            for _ in range(9):
                stack.enter_context(connected(server))
            found = everything(stack.enter_context(connected(server)))
            assert (found[0], found[1]["code"]) == (503, "too_many_connections")
            assert client.get("/health").status_code == 200  # over the connection that was there before
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        raise AssertionError("the server does not take connections again")


def test_connections_leave_open_files_for_other_things() -> None:
    assert connections(None).most_connections is None
    assert connections(10_000).most_connections == 10_000 - SPARE_FILES


def test_a_dead_engine_is_not_ready_and_requests_end_with_an_error(monkeypatch) -> None:
    model = scripted_model()
    with live_server(ServeSettings(("scripted",)), [model]) as server, httpx.Client(base_url=server.url) as web:
        assert web.get("/ready").status_code == 200

        def broken(tokens, slots):
            raise RuntimeError("broken")

        monkeypatch.setattr(model.scheduler.engine, "decode", broken)
        first = web.post("/v1/chat/completions", json=HELLO)
        streamed = web.post("/v1/chat/completions", json={**HELLO, "stream": True})
        assert first.status_code == 500
        assert first.json()["error"]["code"] == "engine_error"
        assert "broken" not in first.text
        assert streamed.status_code == 503
        assert [web.get(path).status_code for path in ("/ready", "/health")] == [503, 200]
        assert web.get("/ready").json()["error"]["code"] == "unavailable"
