"""Thousands of bad connections to one server, and an ordinary client beside them.

    python benchmarks/connections.py [--connections 10000] [--model bundled] [--smoke]

Six kinds in turn: silent ones, heads that drip in, bodies that do not come, clients that close their sending half after
a whole request or in a head, and bytes that are not HTTP. While all are open, an ordinary client asks; its answers
must be those of the same requests alone. The server must close every bad connection within its time limits, give back
memory and files, and answer as before. Prints what each kind received. The limit of open files is raised to the hard
limit; 10,000 connections need a hard limit of about 10,300 in each process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import Any

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"model": "model", "prompt": "Once", "max_tokens": 2, "temperature": 0}'
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
KINDS: dict[str, bytes] = {
    "silent": b"",
    "dripping head": b"POST /v1/completions HTTP/1.1\r\nX: ",
    "body that does not come": HEAD + b"Content-Length: 100\r\n\r\n{",
    "sending half closed after a request": WHOLE,
    "sending half closed in a head": HEAD,
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}
HALF_CLOSED = frozenset(kind for kind in KINDS if kind.startswith("sending half closed"))
EXPECTED = {
    "silent": {"closed"},
    "dripping head": {"408 timeout"},
    "body that does not come": {"408 timeout"},
    "sending half closed after a request": {"closed", "429 rate_limit_exceeded"},
    "sending half closed in a head": {"400 invalid_http", "closed"},
    "not HTTP": {"400 invalid_http"},
}
HEAD_SECONDS = 30.0
"""The server's limit for a head."""


class Server:
    """`minitron serve` in a process of its own."""

    def __init__(self, model: str, body_seconds: float) -> None:
        self.refused = 0
        """Times that the ordinary client was told to come again, because the queue was full."""
        command = [sys.executable, "-m", "minitron", "serve", f"model={model}", "--port", "0", "--log-file", os.devnull]
        command += ["--body-seconds", str(body_seconds)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise SystemExit(f"the server ended before it listened:\n{said}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, number: int) -> tuple[float, str]:
        """Seconds and text of one of ten greedy answers."""
        prompt = f"The fox and the crow met {number % 10} boys"
        body = {"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        start = time.perf_counter()
        while True:
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    text = json.load(response)["choices"][0]["text"]
                return time.perf_counter() - start, text
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise
                self.refused += 1
                time.sleep(float(error.headers["Retry-After"]))

    def megabytes(self) -> float:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def opened(port: int, count: int) -> list[tuple[str, socket.socket]]:
    """As many connections, each of which has sent its beginning."""
    found = []
    kinds = list(KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        connection = socket.create_connection(("127.0.0.1", port), timeout=300)
        connection.sendall(KINDS[kind])
        if kind in HALF_CLOSED:
            connection.shutdown(socket.SHUT_WR)
        found.append((kind, connection))
    return found


def drip(crowd: list[tuple[str, socket.socket]], ended: threading.Event) -> None:
    """Send a byte on each dripping connection every two seconds."""
    while not ended.wait(2):
        for kind, connection in crowd:
            if kind == "dripping head":
                try:
                    connection.send(b"x", socket.MSG_DONTWAIT)
                except OSError:
                    continue  # the server has closed it


def received(connection: socket.socket) -> str:
    """What the server said before it closed the connection: a status and a code, or nothing."""
    content = b""
    try:
        while part := connection.recv(1 << 16):
            content += part
    except ConnectionResetError:  # the server closed it while a byte was on its way
        pass
    except TimeoutError:
        return "still open"
    if not content:
        return "closed"
    head, _, body = content.partition(b"\r\n\r\n")
    status = head.split()[1].decode()
    return status if status == "200" else f"{status} {json.loads(body)['error']['code']}"


def measure(server: Server, count: int, asked: int, timeout: float) -> dict[str, Any]:
    """Open the connections, ask beside them, wait until the server has closed them, and ask again."""
    alone = [server.ask(number) for number in range(asked)]
    before = server.megabytes(), server.open_files()
    start = time.perf_counter()
    crowd = opened(server.port, count)
    opening = time.perf_counter() - start
    ended = threading.Event()
    dripping = threading.Thread(target=drip, args=(crowd, ended), daemon=True)
    dripping.start()
    beside = [server.ask(number) for number in range(asked)]
    during = server.megabytes(), server.open_files()
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for kind, connection in crowd:
        connection.settimeout(max(0.01, start + opening + timeout - time.perf_counter()))
        outcomes[kind][received(connection)] += 1
    closing = time.perf_counter() - start
    ended.set()
    dripping.join()
    for _, connection in crowd:
        connection.close()
    time.sleep(1)
    again = [server.ask(number) for number in range(asked)]
    texts = [text for _, text in alone]
    return {
        "connections": count,
        "limit of open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "opened in s": round(opening, 2),
        "all ended after s": round(closing, 1),
        "received": {kind: dict(found) for kind, found in outcomes.items()},
        "not as expected": sum(found[what] for kind, found in outcomes.items() for what in set(found) - EXPECTED[kind]),
        "median answer, ms: alone, beside, after": [
            round(1000 * statistics.median(seconds for seconds, _ in one), 1) for one in (alone, beside, again)
        ],
        "longest answer beside, ms": round(1000 * max(seconds for seconds, _ in beside), 1),
        "ordinary requests refused with 429, then repeated": server.refused,
        "different answers": sum(text != texts[n] for one in (beside, again) for n, (_, text) in enumerate(one)),
        "megabytes: before, during, after": [round(before[0], 1), round(during[0], 1), round(server.megabytes(), 1)],
        "open files: before, during, after": [before[1], during[1], server.open_files()],
    }


def main() -> int:
    """Run it; 0 if no answer differs, every bad connection ended as expected, and no file stays open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--model", default="bundled")
    parser.add_argument(
        "--smoke", action="store_true", help="60 connections, of which the slow kinds are not waited for"
    )
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < options.connections + 300:
        parser.error(
            f"{options.connections} connections need {options.connections + 300} open files; {most} are allowed"
        )
    count, asked = (60, 3) if options.smoke else (options.connections, 20)
    server = Server(options.model, 1.0 if options.smoke else 20.0)
    try:
        found = measure(server, count, asked, timeout=4.0 if options.smoke else 4 * HEAD_SECONDS)
        server.process.terminate()
        code = server.process.wait(60)
    finally:
        server.process.kill()
    found["status of the server's process"] = code
    print(json.dumps(found, indent=2))
    late = sum(one.get("still open", 0) for one in found["received"].values())
    wrong = found["not as expected"] - (late if options.smoke else 0)
    files = found["open files: before, during, after"]
    return 1 if wrong or found["different answers"] or files[2] > files[0] + 5 or code else 0


if __name__ == "__main__":
    sys.exit(main())
