"""Replicas behind Ray Serve: the parts that need no cluster. `scripts/ray_serve.py` runs two replicas."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

pytest.importorskip("starlette", reason="pip install 'minitron[serve]'")
pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")

from minitron.serve.ray import Replica, deployment, prefix_key
from minitron.serve.settings import ServeSettings

SCOPE = {
    "type": "http", "http_version": "1.1", "scheme": "http", "root_path": "", "query_string": b"", "client": None,
    "server": None, "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0"},
}  # fmt: skip


def body(text: str, model: str = "m", **given: object) -> bytes:
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "?"}, {"role": "user", "content": "x"}]
    return json.dumps({"model": model, "messages": messages, **given}).encode()


def test_conversations_that_begin_the_same_have_one_key() -> None:
    assert prefix_key(body("Be kind.")) == prefix_key(body("Be kind.", temperature=0))
    assert prefix_key(body("Be kind.")) != prefix_key(body("Be rude."))
    assert prefix_key(body("Be kind.")) != prefix_key(body("Be kind.", "other"))
    later = json.loads(body("Be kind."))
    later["messages"][2]["content"] = "another turn"
    assert prefix_key(json.dumps(later).encode()) == prefix_key(body("Be kind."))
    for nothing in (b"", b"[1]", b"{", b'{"model": "m"}', b"[" * 100_000):
        assert prefix_key(nothing) == ""


@pytest.fixture(scope="module")
def replica():
    found = Replica(ServeSettings(("half=bundled-half",), slots=2, max_context=128))
    yield found
    found._loop.stop()


def respond(replica: Replica, path: str, method: str = "POST", content: bytes = b"", most: int | None = None):
    async def collect() -> list:
        found = []
        pieces = replica.respond({**SCOPE, "path": path, "raw_path": path.encode(), "method": method}, content, "k")
        async for piece in pieces:
            found.append(piece)
            if most is not None and len(found) == most:
                break
        await pieces.aclose()
        return found

    return asyncio.run(collect())


def test_a_replica_answers_as_the_server_does(replica) -> None:
    (status, headers), *pieces = respond(replica, "/v1/models", "GET")
    assert status == 200
    assert dict(headers)["content-type"] == "application/json"
    assert json.loads(b"".join(pieces))["data"][0]["id"] == "half"
    (status, _), *pieces = respond(replica, "/v1/chat/completions", content=b"{")
    assert status == 400
    assert "error" in json.loads(b"".join(pieces))


def test_a_stream_comes_in_pieces_and_ends_when_nobody_reads(replica) -> None:
    asked = {"model": "half", "prompt": "Once", "max_tokens": 100, "stream": True, "temperature": 0, "ignore_eos": True}
    (status, _), *pieces = respond(replica, "/v1/completions", content=json.dumps({**asked, "max_tokens": 9}).encode())
    assert status == 200
    assert pieces[-1].endswith(b"[DONE]\n\n")
    respond(replica, "/v1/completions", content=json.dumps(asked).encode(), most=3)
    ended = threading.Event()
    for _ in range(200):
        if replica._loop.idle:
            break
        ended.wait(0.05)
    assert replica._loop.idle


def test_a_dead_engine_is_not_healthy(replica, monkeypatch) -> None:
    replica.check_health()
    monkeypatch.setattr(replica._loop, "dead", RuntimeError("gone"))
    with pytest.raises(RuntimeError, match="the engine does not run"):
        replica.check_health()


def test_numbers_of_replicas_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="least is 3 and most is 2"):
        deployment(ServeSettings(), least=3, most=2)
