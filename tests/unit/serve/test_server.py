"""The process itself: it starts, drains after a signal, and ends at once after a second one."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

pytest.importorskip("starlette", reason="pip install 'minitron[serve]'")
pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")
if os.name != "posix":
    pytest.skip("signals", allow_module_level=True)


class Process:
    def __init__(self, *options: str, program: tuple[str, ...] = ("-m", "minitron")) -> None:
        command = [sys.executable, *program, "serve", "bundled-half", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()  # type: ignore[arg-type]

    def ask(self, **body) -> dict:
        content = json.dumps({"model": "bundled-half", "prompt": "Once", **body}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", content, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


LONG = {"max_tokens": 500, "ignore_eos": True, "logprobs": 5, "temperature": 0}


def begun(server: Process) -> None:
    """Wait until a request runs."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
        if 'vllm:num_requests_running{model_name="bundled-half"} 1.0' in text:
            return
        time.sleep(0.005)
    raise AssertionError("no request runs")


def test_a_signal_drains_and_the_log_has_no_prompts() -> None:
    with Process() as server:
        found: list[dict] = []
        asking = threading.Thread(target=lambda: found.append(server.ask(**LONG, prompt="Secret words")))
        asking.start()
        begun(server)
        server.process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert found[0]["usage"]["completion_tokens"] == 500
        assert server.process.wait(60) == 0
        entries = [json.loads(line) for line in server.lines if line.startswith("{")]
        assert {entry["path"] for entry in entries} == {"/metrics", "/v1/completions"}
        assert "Secret" not in "".join(server.lines)


def _ask_in_vain(server: Process) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.ask(**LONG, n=16)


def test_a_second_signal_ends_at_once() -> None:
    with Process() as server:
        threading.Thread(target=_ask_in_vain, args=(server,), daemon=True).start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        server.process.wait(30)
        assert time.monotonic() - start < 10


def test_bad_options_are_a_sentence() -> None:
    for options, words in (
        (["--host", "0.0.0.0"], "give a file of keys"),
        (["--api-keys", "no-such-file"], "no-such-file: no such file"),
        (["no-such-model"], "no-such-model: no such file or folder"),
        (["a=bundled-half", "a=bundled"], "two models are named 'a'"),
        (["--slots", "0"], "slots is 0; it must be from 1 to 256"),
    ):
        command = [sys.executable, "-m", "minitron", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_full_disk_for_the_log_costs_no_answer() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is not here")
    with Process("--log-file", "/dev/full") as server:
        assert server.ask(max_tokens=3)["usage"]["completion_tokens"] == 3
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


BROKEN = """
import sys
from minitron.serve.scheduler import Scheduler
from minitron.cli import main

def broken(self):
    raise RuntimeError("broken")

Scheduler._decode = broken
sys.exit(main())
"""


def test_the_process_ends_with_an_error_when_its_engine_cannot_go_on(tmp_path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    with Process(program=(str(file),)) as server:
        for _ in range(10):
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.ask(max_tokens=3)
        assert server.process.wait(60) == 1
        assert not any("Traceback" in line for line in server.lines if not line.startswith("{"))
