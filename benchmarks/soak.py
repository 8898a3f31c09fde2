"""Hours of mixed requests to one server: right ones, cancelled ones, bad ones, and clients that are killed.

    python benchmarks/soak.py --hours 2 [--model bundled] [--every 0.3] [--log soak.jsonl] [--smoke]

Every right request was answered alone when the run began; its answer must be the same ever after. Counts answers that
differ, bad requests that get something else than their error, and requests that do not end. Memory is the server's
resident memory; its drift compares the last tenth of the run with the second tenth, when the caches are filled.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

TEXT = "the fox and the crow met a boy in the wood and told him of a king who had lost his way home"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
BAD: list[tuple[str, bytes, int]] = [
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b'{"model": "model", "messages": []}', 400),
    ("/v1/completions", b'{"model": "model", "prompt": "\xff"}', 400),
    ("/v1/completions", b'{"model": "model", "prompt": "a", "temperature": NaN}', 400),
    ("/v1/completions", b'{"model": "model", "prompt": "a", "n": 1000000000}', 400),
    ("/v1/completions", b'{"model": "model", "prompt": "a", "max_tokens": -1}', 400),
    ("/v1/completions", b'{"model": "other", "prompt": "a"}', 404),
    ("/v1/embeddings", b'{"model": "model", "input": []}', 400),
    ("/v1/responses", b'{"model": "model", "input": "a", "store": true}', 400),
    ("/v1/nothing", b"{}", 404),
]
PATIENCE = 600.0
"""Seconds after which a request counts as stuck; a busy machine may stop for minutes."""
KILLED_CLIENT = """
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(sys.stdin.buffer.read())
print(connection.recv(64) is not None, flush=True)
time.sleep(60)
"""

Request = tuple[str, dict[str, Any]]


def text_of(chance: random.Random, most: int) -> str:
    return " ".join(chance.choice(TEXT.split()) for _ in range(chance.randint(1, most)))


def request_of(chance: random.Random, beginnings: list[str]) -> Request:
    """A right request whose prompt often begins as another's does."""
    prompt = text_of(chance, 120)
    if beginnings and chance.random() < 0.5:
        prompt = f"{chance.choice(beginnings)} {text_of(chance, 12)}"
    beginnings.append(prompt)
    body: dict[str, Any] = {"model": "model", "max_tokens": chance.randint(1, 40), "seed": chance.randrange(1000)}
    body["temperature"] = chance.choice((0, 0, 0.8, 1.3))
    for name, values in (
        ("top_p", (0.9,)),
        ("top_k", (20,)),
        ("repetition_penalty", (1.2,)),
        ("frequency_penalty", (0.4,)),
        ("n", (2,)),
        ("stop", (["the", " king"],)),
    ):
        if chance.random() < 0.2:
            body[name] = chance.choice(values)
    kind = chance.choice(("text", "text", "text", "chat", "chat", "schema", "tool", "responses", "embeddings"))
    messages = [{"role": "user", "content": prompt}]
    if kind == "text":
        logprobs = {"logprobs": 3} if chance.random() < 0.2 else {}
        return "/v1/completions", {**body, **logprobs, "prompt": prompt, "echo": chance.random() < 0.1}
    if kind == "embeddings":
        return "/v1/embeddings", {"model": "model", "input": [prompt, "a fox"]}
    if kind == "responses":
        kept = {key: body[key] for key in ("model", "temperature")}
        return "/v1/responses", {**kept, "temperature": 0, "input": prompt, "max_output_tokens": body["max_tokens"]}
    body["max_tokens"] = 60 if kind in ("schema", "tool") else body["max_tokens"]
    if kind == "schema":
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}
        body.pop("stop", None)
    if kind == "tool":
        body |= {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        body.pop("stop", None)
    return "/v1/chat/completions", {**body, "messages": messages}


def connection_to(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)


def post(port: int, path: str, content: bytes) -> tuple[int, bytes]:
    with contextlib.closing(connection_to(port)) as connection:
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def essence(answer: Any) -> Any:
    """An answer without what differs from one time to the next: identifiers, times, and what came from the cache."""
    if isinstance(answer, dict):
        gone = ("id", "call_id", "item_id", "created", "created_at", "prompt_tokens_details", "input_tokens_details")
        return {key: essence(value) for key, value in answer.items() if key not in gone}
    return [essence(one) for one in answer] if isinstance(answer, list) else answer


def texts_of_stream(content: bytes) -> dict[int, tuple[str, str | None]]:
    """Text and reason for the end of each choice of a stream; text of a chat with its calls' arguments."""
    found: dict[int, tuple[str, str | None]] = {}
    lines = [line[6:] for line in content.split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]", lines[-1]
    for line in lines[:-1]:
        for choice in json.loads(line).get("choices", ()):
            delta = choice.get("delta", {})
            text = choice.get("text") or delta.get("content") or ""
            text += "".join(call["function"]["arguments"] for call in delta.get("tool_calls", ()))
            before = found.get(choice["index"], ("", None))
            found[choice["index"]] = before[0] + text, before[1] or choice["finish_reason"]
    return found


def texts_of_whole(answer: dict[str, Any]) -> dict[int, tuple[str, str | None]]:
    found = {}
    for choice in answer["choices"]:
        message = choice.get("message", {})
        text = choice.get("text") or message.get("content") or ""
        text += "".join(call["function"]["arguments"] for call in message.get("tool_calls", ()))
        found[choice["index"]] = text, choice["finish_reason"]
    return found


class Soak:
    """Clients of one server, and what they have found."""

    def __init__(self, port: int, pid: int, seed: int, pool: int, log: Path | None) -> None:
        self.port, self.pid, self.chance, self.log = port, pid, random.Random(seed), log
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.lock = threading.Lock()
        beginnings: list[str] = []
        self.requests = [request_of(self.chance, beginnings) for _ in range(pool)]
        self.expected = [self._alone(*request) for request in self.requests]

    def _alone(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, content = post(self.port, path, json.dumps(body).encode())
        assert status == 200, (body, content)
        return json.loads(content)

    def note(self, kind: str, problem: str | None = None) -> None:
        with self.lock:
            self.counts[kind] += 1
            if problem is not None:
                self.counts["problems"] += 1
                self.problems = [*self.problems, problem[:2000]][:50]

    def one(self, kind: str, seed: int) -> None:
        """One request of a kind; whatever goes wrong is noted."""
        try:
            problem = getattr(self, f"_{kind}")(random.Random(seed))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.note(kind, None if problem is None else f"{kind}: {problem}")

    # --- kinds of requests; each returns what is wrong, or None ------------------------------------------------------

    def _right(self, chance: random.Random) -> str | None:
        index = chance.randrange(len(self.requests))
        path, body = self.requests[index]
        expected = self.expected[index]
        if "completions" in path and chance.random() < 0.5:
            status, content = post(self.port, path, json.dumps({**body, "stream": True}).encode())
            if status != 200:
                return f"{status} {content[:300]!r} for {body}"
            found, wanted = texts_of_stream(content), texts_of_whole(expected)
            return None if found == wanted else f"stream of {body}: {found} instead of {wanted}"
        status, content = post(self.port, path, json.dumps(body).encode())
        if status != 200:
            return f"{status} {content[:300]!r} for {body}"
        found = json.loads(content)
        return None if essence(found) == essence(expected) else f"{body}: {found} instead of {expected}"

    def _bad(self, chance: random.Random) -> str | None:
        path, content, wanted = chance.choice(BAD)
        status, answer = post(self.port, path, content)
        error = json.loads(answer).get("error", {})
        if status != wanted or set(error) != {"message", "type", "param", "code"}:
            return f"{content!r} got {status} {answer!r}"
        return None

    def _bytes_of(self, chance: random.Random) -> bytes:
        path, body = chance.choice(self.requests)
        body = {**body, "stream": True} if "completions" in path else body
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        return head.encode() + b"\r\n\r\n" + content

    def _cancelled(self, chance: random.Random) -> str | None:
        """The client leaves: before its request is whole, before the answer, or within it; in order or with a reset."""
        sent = self._bytes_of(chance)
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            connection.sendall(sent[: chance.randrange(len(sent))] if chance.random() < 0.3 else sent)
            time.sleep(chance.random() * 0.2)
            if chance.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return None

    def _killed(self, chance: random.Random) -> str | None:
        """A client process that is killed while it gets its answer."""
        command = [sys.executable, "-S", "-c", KILLED_CLIENT, str(self.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(self._bytes_of(chance))
            client.stdin.close()
            client.stdout.readline()
            client.send_signal(signal.SIGKILL)
        return None

    # --- the run -----------------------------------------------------------------------------------------------------

    def resident(self) -> int:
        """Bytes of the server that are in memory."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def run(self, seconds: float, every: float, most: int) -> dict[str, Any]:
        """Send requests until the time is over and all have ended; what was found."""
        begin = last = time.monotonic()
        memory: list[int] = []
        threads: list[threading.Thread] = []
        while time.monotonic() - begin < seconds:
            kind = self.chance.choices(("right", "bad", "cancelled", "killed"), (70, 12, 15, 3))[0]
            threads = [thread for thread in threads if thread.is_alive()]
            if len(threads) < most:
                threads.append(threading.Thread(target=self.one, args=(kind, self.chance.getrandbits(60)), daemon=True))
                threads[-1].start()
            time.sleep(self.chance.expovariate(1 / every))
            if time.monotonic() - last > min(30.0, seconds / 40):
                last = time.monotonic()
                memory.append(self.resident())
                self._write({"minutes": round((last - begin) / 60, 1), "resident": memory[-1], **self.counts})
        for thread in threads:
            thread.join(PATIENCE)
        stuck = sum(thread.is_alive() for thread in threads)
        return {**self.result(memory, stuck), "hours": round((time.monotonic() - begin) / 3600, 3)}

    def result(self, memory: list[int], stuck: int) -> dict[str, Any]:
        tenth = max(1, len(memory) // 10)
        early, late = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
        return {
            "requests": {key: value for key, value in sorted(self.counts.items()) if key != "problems"},
            "problems": self.counts["problems"],
            "first_problems": self.problems,
            "stuck": stuck,
            "left_in_the_server": self._left(),
            "resident_early": early,
            "resident_late": late,
            "drift_percent": round(100 * (late / early - 1), 2),
        }

    def _left(self) -> float:
        """Sequences that the server still runs or queues when no client is there."""
        found = 1.0
        for _ in range(100):
            with contextlib.closing(connection_to(self.port)) as connection:
                connection.request("GET", "/metrics")
                text = connection.getresponse().read().decode()
            counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", text, re.M)
            found = sum(map(float, counts))
            if not found:
                break
            time.sleep(0.1)
        return found

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps({**entry, "last_problem": self.problems[-1] if self.problems else None})
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


@contextlib.contextmanager
def server(model: str, options: list[str]) -> Any:
    """The process of a server, and its port."""
    command = [sys.executable, "-m", "minitron", "serve", f"model={model}", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on http://\S+:(\d+)", line):
                break
            print(line, end="", file=sys.stderr)
        else:
            raise RuntimeError("the server did not start")
        rest = threading.Thread(target=process.stderr.read, daemon=True)  # or its pipe fills, and the server waits
        rest.start()
        try:
            yield process, int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            rest.join()


def main() -> int:
    """Run and print the result as JSON; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--hours", type=float, default=2)
    parser.add_argument("--every", type=float, default=0.3, help="mean seconds between two requests")
    parser.add_argument("--clients", type=int, default=12, help="largest number of requests at once")
    parser.add_argument("--pool", type=int, default=200, help="different right requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--serve-options", default="--threads 1 --prefix-cache 16000000 --body-seconds 600")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    hours, pool, every = (5 / 3600, 12, 0.05) if options.smoke else (options.hours, options.pool, options.every)
    with server(options.model, options.serve_options.split()) as (process, port):
        soak = Soak(port, process.pid, options.seed, pool, options.log)
        found = soak.run(3600 * hours, every, options.clients)
    found["exit_code"] = process.returncode
    print(json.dumps(found, indent=2))
    wrong = found["problems"] or found["stuck"] or found["left_in_the_server"] or found["exit_code"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
