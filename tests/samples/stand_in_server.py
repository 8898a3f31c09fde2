"""A stand-in for a model server: answers by rules, keeps what it was asked, on a free port of this machine."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WIDTH = 64


@dataclass
class StandIn:
    """Where it answers, and the requests it got: (path, Authorization header, body)."""

    address: str
    requests: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)


def classified(text: str) -> dict[str, Any]:
    """Spam is what says so."""
    spam = "spam" in text.lower()
    return {"data": [{"index": 0, "label": "spam" if spam else "ham", "probs": [0.9, 0.1], "num_classes": 2}]}


def embedded(texts: str | list[str]) -> dict[str, Any]:
    """Counts of words, hashed: texts of the same words are near each other."""
    data = []
    for index, text in enumerate([texts] if isinstance(texts, str) else texts):
        vector = [0.0] * WIDTH
        for word in text.lower().replace("?", "").split():
            vector[sum(map(ord, word)) % WIDTH] += 1
        data.append({"object": "embedding", "index": index, "embedding": vector})
    return {"object": "list", "data": data, "model": "stand-in", "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def answered(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """No to questions of policy, a card number to who asks for one, otherwise a story."""
    last = str(messages[-1]["content"])
    text = "No" if "violate the policy" in last else "It is 4111 1111 1111 1111." if "card" in last else "A story."
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@contextlib.contextmanager
def stand_in_server() -> Iterator[StandIn]:
    """The server, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append((self.path, self.headers.get("Authorization"), body))
            if self.path == "/classify":
                answer = classified(body["input"])
            elif self.path == "/v1/embeddings":
                answer = embedded(body["input"])
            else:
                answer = answered(body["messages"])
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = StandIn(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
