"""The report: what goes in is on the page, and nothing in it can run."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import re
import shutil
import subprocess
import sys
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minitron import NemotronConfig
from minitron.report.facts import (
    CandidateFacts,
    Curve,
    ImportanceFacts,
    ModelFacts,
    QualityFacts,
    Report,
    SampleFacts,
    SpeedFacts,
    StageFacts,
)
from minitron.report.page import PLOTS_MISSING, render, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '</div><script>alert("x")</script><img src=x onerror=alert(1)> & "quoted"'


def a_report() -> Report:
    config = NemotronConfig(100, 32, 64, 2, 4, num_key_value_heads=2)
    shape = {"num_hidden_layers": 2, "hidden_size": 32}
    models = [
        ModelFacts(name, role, shape, config.parameter_counts(), config.num_non_embedding_parameters(), 1234)
        for name, role in (("big", "teacher"), ("small", "student"))
    ]
    return Report(
        title="big to small",
        summary=["Half of it is left."],
        models=models,
        importance=ImportanceFacts([[1.0, 0.5]] * 2, [[1.0, 0.2, 0.3, 0.4]] * 2, [1.0, 0.1], [1.0, 0.7]),
        candidates=[
            CandidateFacts("2L", 1000, 800, {"0": 5.0, "4096": 4.0}, "chosen"),
            CandidateFacts("1L", 900, 700, {"0": 6.0}, "dropped after 2 steps"),
        ],
        curves=[Curve("distill", "small", [0, 4096], [0.0, 1e9], [5.0, 4.0])],
        quality=[QualityFacts("big", "stories", "nats per token", 3.5, 0.01)],
        speed=[SpeedFacts("big", 100.0, (90.0, 110.0), 10_000, 20_000, "cpu")],
        samples=[SampleFacts("Once", {"big": HOSTILE, "small": "upon a time"})],
        stages=[StageFacts("distill", 4096, 1e9, 3.0, "forward KL")],
        commands=["minitron compress big small"],
        versions={"minitron": "0"},
        hashes={"teacher": "ab" * 32},
    )


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of the time of a page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@functools.cache
def a_page() -> str:
    return render(a_report())


class Elements(HTMLParser):
    """Names and attributes of all elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_json_round_trip(tmp_path: Path) -> None:
    write_report(a_report(), tmp_path)
    assert Report.from_json(tmp_path / "report.json") == a_report()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"models": 3}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"report\.json: not a report of minitron"):
        Report.from_json(path)


def test_page_is_self_contained_and_nothing_in_it_runs() -> None:
    page = a_page()
    elements = Elements(page).found
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in elements}
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value


def test_page_says_everything() -> None:
    page = a_page()
    for part in ("Half of it is left.", "2L", "dropped after 2 steps", "forward KL", "minitron compress big small"):
        assert part in page
    assert "alert(" in page  # the sample's text, escaped
    assert page.count("<svg") == 8  # for wide and for narrow screens


@pytest.mark.usefixtures("without_plots")
def test_the_headline_says_how_much_smaller_and_how_much_worse() -> None:
    parts = [{"mlp": 100_000}, {"mlp": 71_000}]
    models = [dataclasses.replace(model, parts=part) for model, part in zip(a_report().models, parts, strict=True)]
    quality = [QualityFacts(name, "stories", "nats per token", x) for name, x in (("big", 3.5), ("small", 4.116))]
    report = dataclasses.replace(a_report(), models=models, quality=quality)
    assert report.headlines() == {"small": "29% smaller, held-out loss +17.6%"}
    title = re.search(r"<h1>(.*?)</h1>", render(report), re.DOTALL)
    assert title is not None
    assert "29% smaller, held-out loss +17.6%" in title[1]
    more = [QualityFacts(name, "books", "nats per token", x) for name, x in (("big", 4.0), ("small", 3.9))]
    report = dataclasses.replace(report, quality=[*quality, *more])
    assert report.headlines() == {"small": "29% smaller, held-out loss +17.6% on stories and -2.5% on books"}
    assert dataclasses.replace(report, quality=[]).headlines() == {"small": "29% smaller"}


@pytest.mark.usefixtures("without_plots")
def test_a_speed_that_cannot_be_believed_is_marked() -> None:
    rows = [
        SpeedFacts("big", 5116.0, (5000.0, 5200.0), 10_000, 20_000, "cpu"),
        SpeedFacts("small", 1924.0, (1900.0, 2000.0), 6_000, 12_000, "cpu"),
    ]
    report = dataclasses.replace(a_report(), speed=rows)
    assert list(report.doubts()) == ["small"]
    assert "1,924 (doubtful)" in render(report)
    assert "slower than big (5,116), though it reads 60%" in render(report)
    busy = dataclasses.replace(rows[0], load="other programs used 1.8 of 2 cores")
    report = dataclasses.replace(report, speed=[busy])
    assert "measured on a busy machine: other programs used 1.8 of 2 cores" in render(report)
    faster = dataclasses.replace(rows[1], tokens_per_second=8000.0, first_token_seconds=0.5)
    page = render(dataclasses.replace(report, speed=[rows[0], faster]))
    assert "doubtful" not in page
    assert "0.5 s" in page


def test_one_point_is_no_plot() -> None:
    curve = Curve("distill", "small", [24576], [1e9], [4.1234])
    candidates = [CandidateFacts("2L", 1000, 800, {"0": 5.0}, "chosen")]
    page = render(dataclasses.replace(a_report(), curves=[curve], candidates=candidates))
    assert page.count("<svg") == 4
    assert "4.1234 nats per token after 24.58k tokens" in page


@pytest.mark.usefixtures("without_plots")
def test_a_role_is_not_said_twice() -> None:
    report = a_report()
    models = [dataclasses.replace(report.models[0], name="teacher"), report.models[1]]
    page = render(dataclasses.replace(report, models=models))
    assert not re.search(r"teacher\s*(<[^>]*>\s*)*teacher", page[page.index("<table") :])


def test_every_cell_carries_the_name_of_its_column() -> None:
    """On a narrow screen the head of a table is hidden and rows become blocks."""
    cells = [attributes for tag, attributes in Elements(a_page()).found if tag == "td"]
    assert cells
    assert all("data-label" in attributes for attributes in cells)


def a_large_report() -> Report:
    """Long names, many models, many numbers."""
    long = "a-student-with-a-very-long-name-" * 3
    report = a_report()
    shape = {f"num_key_value_heads_{i}": 10**9 for i in range(8)}
    models = [dataclasses.replace(report.models[1], name=f"{long}{i}", shape=shape) for i in range(3)]
    models = [dataclasses.replace(report.models[0], shape=shape), *models]
    names = [model.name for model in models]
    return dataclasses.replace(
        report,
        title=long,
        summary=[long * 3],
        models=models,
        quality=[QualityFacts(name, long, "nats per token", 3.5, 0.01) for name in names],
        speed=[SpeedFacts(name, 1e5, (1e5, 2e5), 10**12, 10**12, "transformers", 12.5, long) for name in names],
        candidates=[CandidateFacts(long * 2, 10**9, 10**9, {str(10**n): 4.0 for n in range(9)}, "chosen")],
        samples=[SampleFacts(long * 2, dict.fromkeys(names, long * 9))],
        commands=["minitron compress " + long * 3],
        stages=[StageFacts(long, 10**12, 1e20, 1e6, long)],
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to show the page with")
def test_nothing_scrolls_sideways(tmp_path: Path) -> None:
    """At the widths of a small phone, a phone, a tablet and a screen, in a browser."""
    shown = [(width, page) for page in (a_page(), render(a_large_report())) for width in (320, 390, 720, 1280)]
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(page)}"></iframe>' for w, page in shown)
    script = """addEventListener("load", () => document.body.textContent = "found " + JSON.stringify(
      [...document.querySelectorAll("iframe")].map(f => f.contentDocument.documentElement).map(
        e => [e.clientWidth, e.scrollWidth, ...[...e.querySelectorAll("main *:not(svg *)")].map(
          x => Math.ceil(x.getBoundingClientRect().right))])))"""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{script}</script>", encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r"found (\[.*\])", done.stdout)
    assert match is not None, done.stdout[-500:] + done.stderr[-500:]
    for (width, _), (inner, scroll, *rights) in zip(shown, json.loads(match[1]), strict=True):
        assert width - 40 < inner <= width
        assert scroll <= inner, f"{width} pixels: the page is {scroll} wide"
        assert max(rights) <= inner, f"{width} pixels: something reaches to {max(rights)}"


def test_plots_are_xml_in_the_colour_of_the_page() -> None:
    page = a_page()
    for piece in page.split("<svg")[1:]:
        svg = "<svg" + piece[: piece.index("</svg>")] + "</svg>"
        xml.dom.minidom.parseString(svg)
        assert "currentColor" in svg
        assert "#010203" not in svg


def test_same_facts_same_page() -> None:
    assert render(a_report()) == a_page()


@pytest.mark.usefixtures("without_plots")
def test_without_matplotlib_there_are_tables_and_a_note() -> None:
    page = render(a_report())
    assert PLOTS_MISSING.split(":")[0] in page
    assert "<svg" not in page
    assert "Half of it is left." in page
