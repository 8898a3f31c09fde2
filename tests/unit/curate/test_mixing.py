"""Weights and random order depend on texts and seeds alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minitron.curate import reading
from minitron.curate.mixing import copies_of, random_keys, shards_of, shuffled, weight_of
from minitron.curate.recipe import Mix, RecipeError, Weight, recipe_from
from minitron.curate.run import curate
from minitron.data.documents import read_documents


def digests_of(texts: list[str]) -> np.ndarray:
    raw = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(raw, dtype=np.uint64).reshape(-1, 2)


def test_the_first_weight_that_matches_counts() -> None:
    mix = Mix((Weight("books", 3), Weight("*/crawl-1*", 0.5), Weight("web/a.jsonl", 0)))
    found = [weight_of(name, mix) for name in ("books/x/y.txt", "web/crawl-17.gz", "web/a.jsonl", "web/b.jsonl")]
    assert found == [3, 0.5, 0, 1]


def test_a_weight_is_the_mean_number_of_copies() -> None:
    texts = [f"text {number}" for number in range(20_000)]
    for weight in (0.0, 0.3, 1.0, 2.25):
        copies = copies_of(digests_of(texts), ["a"] * len(texts), Mix((Weight("a", weight),)))
        assert set(copies.tolist()) <= {int(weight), int(weight) + 1}
        error = (weight % 1 * (1 - weight % 1) / len(texts)) ** 0.5
        assert abs(copies.mean() - weight) <= 4 * error
    other = copies_of(digests_of(texts), ["a"] * len(texts), Mix((Weight("a", 0.3),), seed=1))
    assert (
        abs(other[copies_of(digests_of(texts), ["a"] * len(texts), Mix((Weight("a", 0.3),))) == 1].mean() - 0.3) < 0.03
    )


def test_a_random_order_is_one_of_texts_not_of_places() -> None:
    texts = [f"text {number}" for number in range(500)]
    copies = np.asarray([number % 3 for number in range(500)])
    documents, numbers = shuffled(digests_of(texts), copies, seed=4)
    order = [(texts[i], k) for i, k in zip(documents.tolist(), numbers.tolist(), strict=True)]
    assert Counter(name for name, _ in order) == {texts[i]: int(c) for i, c in enumerate(copies) if c}
    assert len(set(order)) == len(order)
    back = random.Random(0).sample(range(500), 500)
    documents, numbers = shuffled(digests_of([texts[i] for i in back]), copies[back], seed=4)
    assert [(texts[back[i]], k) for i, k in zip(documents.tolist(), numbers.tolist(), strict=True)] == order
    documents, _ = shuffled(digests_of(texts), copies, seed=5)
    assert [texts[i] for i in documents.tolist()] != [name for name, _ in order]


def test_keys_are_uniform_and_purposes_are_independent() -> None:
    digests = digests_of([str(number) for number in range(40_000)])
    first = random_keys(digests, 0, 1).astype(np.float64) / 2.0**64
    second = random_keys(digests, 0, 2).astype(np.float64) / 2.0**64
    counts, _ = np.histogram(first, bins=20, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 50  # chi-squared with 19 degrees of freedom: one run in 10,000
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_shards_have_at_least_the_bytes_that_were_asked_for() -> None:
    sizes = np.asarray([5, 5, 5, 30, 1, 1, 1])
    assert shards_of(sizes, 10) == [(0, 2), (2, 4), (4, 7)]
    assert shards_of(np.zeros(0, dtype=np.int64), 10) == []


def test_a_shuffled_mix_is_the_same_bits_for_any_division(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    source = tmp_path / "in"
    source.mkdir()
    for name in ("books", "web"):
        rows = "".join(json.dumps({"text": f"{name} {number} " + "word " * 40}) + "\n" for number in range(200))
        (source / f"{name}.jsonl").write_text(rows)
    values = {
        "mix": {"weights": [{"files": str(source / "books.jsonl"), "weight": 2}, {"files": "*web*", "weight": 0.5}]},
        "shuffle": {"seed": 3, "shard_bytes": 10_000},
        "output": {"format": "jsonl"},
    }
    made = []
    for workers, size in ((1, 10**9), (2, 4_000)):
        monkeypatch.setattr(
            "minitron.curate.run.plan_parts",
            lambda files, encoding, size=size: reading.plan_parts(files, encoding, size),
        )
        out = tmp_path / f"out-{size}"
        report = curate([str(source)], out, recipe_from(values), workers=workers)
        lines = [json.loads(line) for path in sorted((out / "shards").iterdir()) for line in path.open()]
        made.append([(row["id"], row["text"]) for row in lines])
        assert report.documents_out == len(lines)
        assert len(list((out / "shards").iterdir())) > 5
    assert made[0] == made[1]
    ids, texts = zip(*made[0], strict=True)
    assert len(set(ids)) == len(ids)
    counts = Counter(text.split()[0] for text in texts)
    assert counts["books"] == 400
    assert 60 < counts["web"] < 140
    position = [index for index, text in enumerate(texts) if text.startswith("web")]
    assert position[0] < 30
    assert position[-1] > len(texts) - 30
    read = [text for path in sorted((tmp_path / "out-4000" / "shards").iterdir()) for text in read_documents(path)]
    assert read == list(texts)


def test_weights_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"weight of a is -1\.0; expected 0 to 1000"):
        recipe_from({"mix": {"weights": [{"files": "a", "weight": -1}]}})
    with pytest.raises(RecipeError, match=r"mix\.weights: files is missing"):
        recipe_from({"mix": {"weights": [{"weight": 1}]}})
