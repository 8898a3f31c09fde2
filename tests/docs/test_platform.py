"""examples/platform, very small: raw text to a guarded server, once through, and parts of it again."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "platform"
MODULES = ("run", "stages", "texts", "page")


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    pytest.importorskip("openai")
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_whole_platform(example: Any, tmp_path: Path) -> None:
    out = tmp_path / "platform"
    first = example.run(out, example.SMOKE)
    facts = {stage.name: stage.facts for stage in first.stages}
    planted, left = facts["raw"]["planted"], facts["curate"]["left"]
    assert all(planted.values())
    assert left["documents"] > 0.8 * planted["stories"]
    assert {kind for kind, count in left.items() if count} == {"documents"}
    half = json.loads((out / "compress/run/report.json").read_text())
    assert half["models"]
    answers = facts["serve"]["answers"]
    assert [row["question"] for row in answers] == [*example.QUESTIONS, example.SPAM]
    assert all(row["finish_reason"] in ("stop", "length", "content_filter") for row in answers)
    page = (out / "index.html").read_text()
    for command in ("curate", "train", "compress", "finetune", "eval", "serve"):
        assert f"minitron {command} " in page
    assert str(tmp_path) not in page
    assert not re.search(r"<(script|link|img)\b", page)
    for target in re.findall(r'href="([^"]+)"', page):
        assert (out / target).is_file(), target

    # What is done is not done again; what is missing is made again, bit for bit.
    before = {stage.name: ((stage.folder / "stage.json").stat().st_mtime_ns, stage.outputs) for stage in first.stages}
    shutil.rmtree(out / "guard")
    (out / "evaluate/stage.json").unlink()
    second = example.run(out, example.SMOKE)
    for stage in second.stages:
        written, outputs = before[stage.name]
        assert stage.outputs == outputs, stage.name
        again = stage.name in ("guard", "evaluate")
        assert ((stage.folder / "stage.json").stat().st_mtime_ns != written) == again, stage.name


def test_other_settings_begin_anew(example: Any, tmp_path: Path) -> None:
    stages = importlib.import_module("stages")
    calls = []

    def work(stage: Any) -> None:
        calls.append(stage.name)
        (stage.folder / "x").write_text(str(len(calls)))

    for settings in (1, 1, 2, 2):
        platform = stages.Platform(tmp_path, quiet=True)
        platform.stage("one", "", settings, work, ["x"])
        platform.stage("two", "", 0, work, ["x"])
    assert calls == ["one", "two", "one", "two"]
    with pytest.raises(SystemExit, match=r"none of y was made"):
        stages.Platform(tmp_path / "other", quiet=True).stage("one", "", 0, work, ["y"])


def test_a_folder_of_somebody_else_is_left_alone(example: Any, tmp_path: Path) -> None:
    stages = importlib.import_module("stages")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"train: holds no begun\.json, so it is not of this example"):
        stages.Platform(tmp_path, quiet=True).stage("train", "", 0, lambda stage: None, ["x"])
    assert (tmp_path / "train" / "mine.txt").read_text() == "mine"


def test_the_texts_are_the_same_everywhere(example: Any, tmp_path: Path) -> None:
    texts = importlib.import_module("texts")
    for name in ("a", "b"):
        texts.write_raw(tmp_path / name, 40, example.BOOK)
        texts.write_mails(tmp_path / name / "mails.jsonl", 20)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    kinds = [json.loads(line)["label"] for line in (tmp_path / "a" / "mails.jsonl").read_text().splitlines()]
    assert kinds.count("spam") == kinds.count("request") == 10
