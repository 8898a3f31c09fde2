"""The report: what goes in is on the page, and nothing in it can run."""

from __future__ import annotations

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
    page = render(a_report())
    elements = Elements(page).found
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in elements}
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value


def test_page_says_everything() -> None:
    page = render(a_report())
    for part in ("Half of it is left.", "2L", "dropped after 2 steps", "forward KL", "minitron compress big small"):
        assert part in page
    assert "alert(" in page  # the sample's text, escaped
    assert page.count("<svg") == 4


def test_plots_are_xml_in_the_colour_of_the_page() -> None:
    page = render(a_report())
    for piece in page.split("<svg")[1:]:
        svg = "<svg" + piece[: piece.index("</svg>")] + "</svg>"
        xml.dom.minidom.parseString(svg)
        assert "currentColor" in svg
        assert "#010203" not in svg


def test_same_facts_same_page() -> None:
    assert render(a_report()) == render(a_report())


def test_without_matplotlib_there_are_tables_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render(a_report())
    assert PLOTS_MISSING.split(":")[0] in page
    assert "<svg" not in page
    assert "Half of it is left." in page
