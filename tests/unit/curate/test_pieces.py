"""Repeated paragraphs and lines against plain Python, and in whole runs."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from curation_texts import many

from minitron.curate import pieces, reading
from minitron.curate.recipe import Exact, recipe_from
from minitron.curate.run import curate
from minitron.curate.texts import Texts


def expected(texts: list[str], settings: Exact) -> list[str]:
    """What stays of texts one after another; a set of pieces seen is all it needs."""
    seen: set[tuple[str, str]] = set()

    def again(kind: str, piece: str) -> bool:
        if len(piece) < settings.min_characters:
            return False
        known = (kind, piece) in seen
        seen.add((kind, piece))
        return known

    made = []
    for text in texts:
        dropped = False
        out = ""
        for part in re.findall(r"[^\n]+(?:\n[^\n]+)*\n*|\n+", text) if settings.paragraphs else [text]:
            body = part.rstrip("\n") if settings.paragraphs else part
            gone = settings.paragraphs and again("paragraph", body)
            dropped |= gone
            kept = ""
            for line in re.findall(r"[^\n]*\n|[^\n]+", body) if settings.lines else [body]:
                drop = settings.lines and again("line", line.removesuffix("\n"))
                dropped |= drop
                kept += "" if drop else line
            if not gone:
                out += kept + part[len(body) :]
        made.append(out.rstrip("\n") if dropped else text)
    return made


def texts_with_repeats(seed: int) -> list[str]:
    rng = random.Random(seed)
    lines = [f"{'line ' * rng.randint(0, 9)}{number}" for number in range(12)]
    texts = many(60, seed=seed)
    for _ in range(200):
        parts = ["\n".join(rng.choices(lines, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))]
        texts.append(rng.choice(["", "\n", "\n\n"]) + "".join(part + "\n" * rng.randint(1, 3) for part in parts))
    return [text for text in texts if not re.search(r"^\n", text)] + ["a\n\n\nb", "same " * 20, "same " * 20, ""]


@pytest.mark.parametrize(("paragraphs", "lines"), [(True, False), (False, True), (True, True)])
def test_what_came_before_is_dropped(tmp_path: Path, paragraphs: bool, lines: bool) -> None:
    settings = Exact(paragraphs=paragraphs, lines=lines, min_characters=15)
    texts = texts_with_repeats(4)
    packed = Texts.of(texts)
    hashes = pieces.piece_hashes(packed, settings)
    half = len(hashes) // 3
    paths = [tmp_path / "0.npy", tmp_path / "1.npy"]
    np.save(paths[0], hashes[:half])
    np.save(paths[1], hashes[half:])
    repeated, firsts = pieces.repeated_pieces(paths)
    drop = np.concatenate(
        [pieces.to_drop(hashes[:half], 0, repeated, firsts), pieces.to_drop(hashes[half:], half, repeated, firsts)]
    )
    after, gone = pieces.without_pieces(packed, settings, drop)
    wanted = expected(texts, settings)
    assert after.to_list() == wanted
    assert wanted != texts
    assert (gone[0] > 0, gone[1] > 0) == (paragraphs, lines)


def test_buckets_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    np.save(tmp_path / "0.npy", rng.integers(0, 300, 500, dtype=np.uint64))
    np.save(tmp_path / "1.npy", rng.integers(0, 300, 500, dtype=np.uint64))
    paths = [tmp_path / "0.npy", tmp_path / "1.npy"]
    whole = pieces.repeated_pieces(paths)
    monkeypatch.setattr(pieces, "BUCKET_PIECES", 130)
    divided = pieces.repeated_pieces(paths)
    assert all(np.array_equal(a, b) for a, b in zip(whole, divided, strict=True))
    every = np.concatenate([np.load(path) for path in paths]).tolist()
    assert dict(zip(*(part.tolist() for part in whole), strict=True)) == {
        value: every.index(value) for value in set(every) if every.count(value) > 1
    }


def test_a_run_gives_the_same_texts_however_files_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in texts_with_repeats(7) if text.strip() and "\r" not in text]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = recipe_from(
        {
            "normalize": False,
            "exact": {"documents": False, "lines": True, "paragraphs": True, "min_characters": 15},
            "output": {"format": "jsonl"},
            "near": {},
        }
    )
    found = []
    for workers, size in ((1, 10**9), (2, 3_000)):
        monkeypatch.setattr(
            "minitron.curate.run.plan_parts",
            lambda files, encoding, size=size: reading.plan_parts(files, encoding, size),
        )
        report = curate([str(source)], tmp_path / f"out-{size}", recipe, workers=workers)
        rows = [
            json.loads(line)
            for path in sorted((tmp_path / f"out-{size}" / "shards").iterdir())
            for line in path.read_text().split("\n")[:-1]
        ]
        found.append([row["text"] for row in rows])
        assert report.stages["exact_pieces"].dropped["lines"] > 50
    assert found[0] == found[1]
    wanted = expected(texts, recipe.exact)  # type: ignore[arg-type]
    assert set(found[0]) <= set(wanted)
