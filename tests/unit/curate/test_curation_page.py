"""The report as a page and as JSON: complete, escaped, without personal data."""

from __future__ import annotations

import itertools
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from curation_texts import ordinary

from minitron.curate.charts import histogram
from minitron.curate.distributions import EDGES, Distributions
from minitron.curate.recipe import recipe_from
from minitron.curate.run import curate, plan

SECRET = "jane.doe@example.com"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    rng = random.Random(1)
    good = [" ".join(ordinary(rng) for _ in range(4)) for _ in range(40)]
    texts = [
        *good, good[0], good[1] + " more", *(text.upper() + " and more words" for text in good[2:6]),
        f"few words {SECRET}", "<script>alert(1)</script> & few",
        f"Share on Facebook\n{good[7]}\ncaf\u00c3\u00a9 {SECRET}",
        "x" * 400,
    ]  # fmt: skip
    source = folder / "in.jsonl"
    lines = [json.dumps({"text": text}) for text in texts]
    lines.insert(3, json.dumps(f"bad row of {SECRET}"))
    source.write_text("\n".join(lines) + "\n")
    values = {
        "normalize": {"repair": True}, "boilerplate": {}, "gopher_repetition": {}, "near": {}, "max_bad": 0.1,
        "gopher_quality": {"min_words": 20, "min_stop_words": 1, "min_mean_word_length": 1},
        "tokens": {"tokenizer": "bundled"},
    }  # fmt: skip
    curate([str(source)], folder / "out", recipe_from(values))
    return folder / "out"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "rect", "line", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_the_report_holds(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)  # nothing is loaded from anywhere
    for name, stage in report["stages"].items():
        assert stage["documents_in"] - sum(stage["removed"].values()) == stage["documents_out"], name
        for rule, count in stage["removed"].items():
            assert rule in tags.text, rule
            assert len(stage["examples"][rule]) == min(3, count)
    stages = list(report["stages"].values())
    for before, after in itertools.pairwise(stages):
        assert (before["documents_out"], before["bytes_out"], before["tokens_out"]) == (
            after["documents_in"], after["bytes_in"], after["tokens_in"],
        )  # fmt: skip
    assert report["stages"]["near"]["removed"] == {"similar to a longer document": 5}
    assert report["clusters"]["near"]["clusters"] == 5
    assert "Clusters of near duplicates" in tags.text
    assert sum(report["distributions"]["bytes"]) == report["stages"]["read"]["documents_out"]
    assert sum(report["after"]["tokens"]) == stages[-1]["documents_out"]
    assert set(report["edges"]) == set(report["distributions"])
    assert [sum(values[i] for values in report["sources"].values()) for i in (0, 2)] == [
        report["stages"]["read"]["documents_out"], stages[-1]["documents_out"],
    ]  # fmt: skip
    changes = report["stages"]["boilerplate"]["changes"]
    assert changes[0]["before"].startswith("Share on Facebook")
    assert not changes[0]["after"].startswith("Share")


def test_personal_data_is_in_neither_file(out: Path) -> None:
    for name in ("report.json", "report.html"):
        text = (out / name).read_text()
        assert SECRET not in text
        assert "<EMAIL>" in text or "&lt;EMAIL&gt;" in text


def test_distributions_count_values_between_edges() -> None:
    made = Distributions()
    made.add("language score", [0.0, 0.05, 0.051, 1.0])
    other = Distributions()
    other.add("language score", [0.97, 7.0])
    made.merge(Distributions.from_dict(other.as_dict()))
    counts = made.counts["language score"].tolist()
    assert len(counts) == len(EDGES["language score"]) + 1
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (2, 1, 2, 1)


def test_bars_are_as_high_as_their_counts() -> None:
    svg = histogram("a <b>", [1, 2, 4], [0, 10, 5, 0], [0, 5, 5, 0])
    heights = [float(value) for value in re.findall(r'height="([\d.]+)"', svg)]
    assert heights == [118.0, 59.0, 59.0, 59.0]
    assert "a &lt;b&gt;" in svg


def test_a_plan_says_what_a_run_takes(out: Path) -> None:
    source = json.loads((out / "report.json").read_text())["inputs"]
    found = plan(source, recipe_from({"near": {}}), workers=2)
    assert 30 < found.documents < 80
    assert "with 2 workers" in found.sentence()
    more = plan(source, recipe_from({}), workers=1)
    assert more.seconds > found.seconds / 4
    assert found.first_bytes > more.first_bytes
