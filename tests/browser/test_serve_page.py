"""The page of `minitron serve` in a real browser: streams, stops, reloads, and a server that goes away."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
STARTED = re.compile(r"listening on (http://\S+)")
PATIENCE_MS = 120_000


class Server:
    """`minitron serve` on a port, which can be ended and started again."""

    def __init__(self, log: Path) -> None:
        self.log, self.port = log, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "minitron", "serve", "--port", str(self.port), "--log-file", str(self.log)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := STARTED.search(line):
                self.address = found.group(1)
                self.port = int(self.address.rsplit(":", 1)[1])
                return
        raise AssertionError(f"the server ended with {self.process.wait()}")

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("serve") / "serve.log")
    yield running
    running.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(server.address)
    opened.wait_for_selector("#server-state.ready")
    yield opened
    context.close()
    assert errors == []
    assert {url for url in requests if not url.startswith((server.address, "data:"))} == set()


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page: Any, count: int = 1) -> str:
    """The note under the last answer, once there are `count` of them."""
    page.wait_for_function(f"document.querySelectorAll('.about').length == {count}")
    return page.locator(".about").last.text_content()


def test_an_answer_streams_and_stays_after_a_reload(page: Any) -> None:
    page.fill("#max_tokens", "12")
    page.fill("#seed", "1")
    ask(page, "Tell me a story.")
    assert "12 generated" in ended(page)
    answer = page.locator(".message.assistant .text").text_content()
    assert answer.strip()
    page.reload()
    assert page.locator(".message.assistant .text").text_content() == answer
    assert page.input_value("#max_tokens") == "12"
    page.click("#regenerate")
    page.wait_for_selector("#send:visible")
    assert page.locator(".message.assistant .text").text_content() == answer  # the same seed
    page.click("#clear")
    assert page.locator(".message").count() == 0


def test_stop_ends_an_answer(page: Any) -> None:
    page.fill("#max_tokens", "480")
    page.fill("#temperature", "2")
    ask(page, "Tell me a very long story.")
    page.wait_for_function("document.querySelector('.message.assistant .text').textContent.length > 3")
    page.keyboard.press("Escape")
    assert "stopped by you" in ended(page)


def test_probabilities_of_a_token(page: Any) -> None:
    page.check("#logprobs")
    page.fill("#max_tokens", "5")
    ask(page, "Hi")
    ended(page)
    page.locator(".token").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".alternatives tr").count() == 5
    shares = [float(cell.rstrip("%")) for cell in page.locator(".alternatives td:last-child").all_text_contents()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.1


def test_settings_that_cannot_be_meant(page: Any) -> None:
    page.fill("#schema", "{oops")
    ask(page, "Hi")
    assert "The JSON schema is not valid JSON" in page.text_content("#problem")
    page.fill("#schema", "")
    page.fill("#temperature", "9")
    ask(page, "Hi")
    assert page.text_content("#problem").startswith("Temperature:")
    assert page.locator(".message.assistant").count() == 0


def test_metrics_by_keyboard(page: Any) -> None:
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#view-metrics:visible .plot")
    page.wait_for_function("document.querySelectorAll('#metrics-table tbody tr').length > 5")
    assert page.get_attribute("#tab-metrics", "aria-selected") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_on_a_phone(browser: Any, server: Server, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.address)
    page.wait_for_selector("#server-state.ready", timeout=PATIENCE_MS)
    for tab in ("#tab-chat", "#tab-metrics"):
        page.click(tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_a_server_that_goes_away_and_comes_back(page: Any, server: Server) -> None:
    server.end()
    ask(page, "Are you there?")
    page.wait_for_selector("#problem:visible")
    assert "The server does not answer. Your message is kept" in page.text_content("#problem")
    assert page.text_content("#server-state") == "server does not answer"
    server.start()
    page.wait_for_selector("#server-state.ready")
    page.fill("#max_tokens", "5")
    page.click("#regenerate")
    assert "generated" in ended(page)
