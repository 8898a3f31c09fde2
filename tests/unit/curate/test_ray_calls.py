"""A local Ray cluster against one machine, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from curation_texts import many

from minitron.curate import reading
from minitron.curate.ray_calls import StagesOfBatch, on_ray
from minitron.curate.recipe import load_recipe
from minitron.curate.run import curate


def test_the_stages_of_a_batch_keep_what_a_run_keeps(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = [text for text in many(200, seed=3) if text.strip() and "\x00" not in text]
    recipe = load_recipe("gopher", {"exact": False, "output": {"format": "jsonl"}})
    table = StagesOfBatch(recipe)(pa.table({"text": texts, "url": [f"u{i}" for i in range(len(texts))]}))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    curate([str(source)], tmp_path / "out", recipe)
    rows = [json.loads(line) for line in (tmp_path / "out" / "shards" / "000000.jsonl").open()]
    assert table.column("text").to_pylist() == [row["text"] for row in rows]
    assert table.column("url").to_pylist() == [f"u{int(row['place'].split()[1]) - 1}" for row in rows]


def test_two_ray_workers_write_the_bits_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'minitron[ray]'")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in many(300, seed=5)))
    monkeypatch.setattr(
        "minitron.curate.run.plan_parts", lambda files, encoding: reading.plan_parts(files, encoding, 20_000)
    )
    recipe = load_recipe("gopher", {"near": {}, "exact": {"lines": True}, "shuffle": {"shard_bytes": 20_000}})
    curate([str(source)], tmp_path / "one", recipe)
    try:
        report = curate([str(source)], tmp_path / "two", recipe, workers=2, each=on_ray("local", 2))
    finally:
        ray.shutdown()
    shards = [sorted((tmp_path / name / "shards").iterdir()) for name in ("one", "two")]
    assert len(shards[0]) > 2
    assert [(p.name, p.read_bytes()) for p in shards[0]] == [(p.name, p.read_bytes()) for p in shards[1]]
    assert report.documents_out


def test_without_ray_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'minitron\[ray\]'"):
        on_ray("local", 2)
