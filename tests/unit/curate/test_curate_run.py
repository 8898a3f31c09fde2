"""Curation as a whole: what goes in comes out, whatever the order, the workers and the interruptions."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from curation_texts import many, ordinary

from minitron.curate import reading
from minitron.curate.exact import first_of_equal
from minitron.curate.recipe import RecipeError, load_recipe, recipe_from
from minitron.curate.run import CurationError, curate
from minitron.curate.texts import Texts
from minitron.data.documents import read_documents
from minitron.files import LockedError, TargetError, WriteError, locked


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def rows_of(out: Path) -> list[dict[str, str]]:
    import pyarrow as pa

    rows = []
    for path in sorted((out / "shards").iterdir()):
        with pa.input_stream(str(path), compression="zstd") as raw:
            rows += [json.loads(line) for line in raw.read().splitlines()]
    return rows


def bits(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [text for text in many(300, seed=5) if text.strip()]
    for number in range(6):
        write_rows(folder / f"{number}.jsonl", texts[50 * number : 50 * number + 60])  # ten of each stand in two files
    return folder


def test_every_kind_of_file_keeps_its_texts_and_says_where_they_come_from(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    source = tmp_path / "in"
    source.mkdir()
    write_rows(source / "a.jsonl", ["one", "two"])
    (source / "b.txt").write_text("three\r\nlines", encoding="utf-8")
    (source / "c.md").write_text("\ufefffour", encoding="utf-8")
    parquet.write_table(pa.table({"text": ["five"]}), source / "d.parquet")
    with gzip.open(source / "e.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "six"}\n\n{"text": "one"}\n')
    curate([str(source)], tmp_path / "out", recipe_from({}))
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows] == ["one", "two", "three\nlines", "four", "five", "six"]
    assert [(Path(row["source"]).name, row["place"]) for row in rows][:2] == [
        ("a.jsonl", "line 1"),
        ("a.jsonl", "line 2"),
    ]
    assert len({row["id"] for row in rows}) == 6
    trained_on = [text for path in sorted((tmp_path / "out" / "shards").iterdir()) for text in read_documents(path)]
    assert trained_on == [row["text"] for row in rows]


def test_a_divided_file_gives_each_line_once(tmp_path: Path) -> None:
    texts = [f"{number} " + "x" * random.Random(number).randint(0, 300) for number in range(100)]
    path = write_rows(tmp_path / "a.jsonl", texts)
    recipe = recipe_from({})
    for size in (40, 997, 10**9):
        parts = reading.plan_parts([path], "utf-8", size)
        found = [document.text for part in parts for document in reading.documents(part, recipe)]
        assert found == texts, size


def test_workers_order_and_division_make_no_difference(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("gopher")
    files = [str(path) for path in sorted(corpus.iterdir())]
    one = curate(files, tmp_path / "one", recipe)
    curate([*files[::-1], files[0]], tmp_path / "two", recipe, workers=2)
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    assert 0 < one.documents_out < one.stages["exact"].documents_in
    monkeypatch.setattr(
        "minitron.curate.run.plan_parts", lambda files, encoding: reading.plan_parts(files, encoding, 9_000)
    )
    curate(files, tmp_path / "three", recipe, workers=2)
    assert len(bits(tmp_path / "three")) > len(bits(tmp_path / "one"))
    assert [r["text"] for r in rows_of(tmp_path / "three")] == [r["text"] for r in rows_of(tmp_path / "one")]


def test_a_killed_run_continues_to_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    recipe = load_recipe("gopher")
    files = [str(path) for path in sorted(corpus.iterdir())]
    curate(files, tmp_path / "whole", recipe)
    code = (
        "import sys, minitron.curate.run as run, minitron.curate.reading as reading, os, signal\n"
        "run.plan_parts = lambda files, encoding: [(reading.Span(str(path)),) for path in files]\n"
        "real, calls = getattr(run, sys.argv[2]), []\n"
        "def work(*call):\n"
        "    calls.append(call)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(*call)\n"
        "setattr(run, sys.argv[2], work)\n"
        "from pathlib import Path\n"
        "from minitron.curate.recipe import load_recipe\n"
        "run.curate(sys.argv[3:], Path(sys.argv[1]), load_recipe('gopher'))\n"
    )
    for step in ("process_part", "write_shard"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out"), step, *files], check=False, timeout=120
        )
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "out" / "report.json").exists()
    finish = code.replace("if len(calls) == 3", "if False")
    subprocess.run(
        [sys.executable, "-c", finish, str(tmp_path / "out"), "process_part", *files], check=True, timeout=120
    )
    assert [row["text"] for row in rows_of(tmp_path / "out")] == [row["text"] for row in rows_of(tmp_path / "whole")]
    subprocess.run(
        [sys.executable, "-c", finish, str(tmp_path / "fresh"), "process_part", *files], check=True, timeout=120
    )
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def test_exact_duplicates_keep_the_first() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    digests = rng.integers(0, 4, (400, 2), dtype=np.uint64)
    kept = first_of_equal(digests)
    seen: set[tuple[int, int]] = set()
    for digest, keep in zip(map(tuple, digests.tolist()), kept.tolist(), strict=True):
        assert keep == (digest not in seen)
        seen.add(digest)


def test_bad_documents_are_counted_and_named_up_to_a_share(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"good {number}"}).encode() for number in range(10)]
    lines[1] = b"{"
    lines[3] = b'{"other": 1}'
    lines[5] = b'{"text": "\xff"}'
    lines[7] = b'{"text": "a\\u0000b"}'
    lines[8] = json.dumps({"text": "x" * 500}).encode()
    path.write_bytes(b"\n".join(lines))
    values = {"max_document_bytes": 100, "max_bad": 0.5}
    report = curate([str(path)], tmp_path / "out", recipe_from(values))
    assert report.bad == 5
    assert report.documents_out == 5
    for part in (
        "line 2: not JSON",
        "line 4: expected an object",
        "line 6: not UTF-8",
        "NUL bytes",
        "longer than max_document",
    ):
        assert any(part in sentence for sentence in report.bad_named), part
    with pytest.raises(
        CurationError, match=r"5 of 10 documents cannot be used, more than max_bad, 0\.4: .*line 2: not JSON"
    ):
        curate([str(path)], tmp_path / "strict", recipe_from({**values, "max_bad": 0.4}))


def test_a_line_that_is_too_long_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "' + b"x" * 5_000_000 + b'"}\n{"text": "last"}\n')
    found = list(reading.documents((reading.Span(str(path)),), recipe_from({"max_document_bytes": 1000})))
    assert [document.text for document in found][::2] == ["first", "last"]
    assert "longer than max_document_bytes" in found[1].text.what  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "before", "unit", "says"),
    [
        ("bomb.json.gz", b"", b"a", "can only be read whole"),
        ("bomb.json.gz", b'["', b"a", "can only be read whole"),
        ("bomb.jsonl.gz", b"\xff\xfe", b"a\0", "can only be read whole"),
        ("bomb.jsonl.gz", b'{"text": "', b"a", "longer than max_document_bytes"),
        ("bomb.txt.gz", b"", b"a", "longer than max_document_bytes"),
    ],
)
def test_a_small_file_that_unpacks_to_a_large_one_is_never_held(
    tmp_path: Path, name: str, before: bytes, unit: bytes, says: str
) -> None:
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(before)
        for _ in range(60):
            file.write(unit * 1_000_000)
    tracemalloc.start()
    try:
        found = list(
            reading.documents((reading.Span(str(tmp_path / name)),), recipe_from({"max_document_bytes": 10**5}))
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [str(one.text).count(says) for one in found] == [1]
    assert peak < 20_000_000


def test_a_full_disk_leaves_nothing_half_written_and_the_run_continues(tmp_path: Path) -> None:
    import resource

    source = write_rows(tmp_path / "in.jsonl", [f"{i} {text}" for i, text in enumerate(many(400, seed=3))])
    curate([str(source)], tmp_path / "whole", recipe_from({}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writing on fails as on a full disk
    try:
        with pytest.raises(WriteError, match=r"cannot be written: File too large"):
            curate([str(source)], tmp_path / "out", recipe_from({}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {"curate.json", ".lock"}, left
    curate([str(source)], tmp_path / "out", recipe_from({}))
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_a_damaged_archive_gives_what_is_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": ordinary(random.Random(i))}) + "\n" for i in range(200)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    found = list(reading.documents((reading.Span(str(path)),), recipe_from({})))
    assert len(found) > 10
    assert "damaged or cut short" in found[-1].text.what  # type: ignore[union-attr]


def test_folders_are_protected(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="lies inside"):
        curate([str(corpus)], corpus / "out", recipe_from({}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"is not empty and holds no curate\.json"):
        curate([str(corpus)], tmp_path / "full", recipe_from({}))
    curate([str(corpus)], tmp_path / "out", recipe_from({}))
    with pytest.raises(CurationError, match="was begun with gopher_repetition: None"):
        curate([str(corpus)], tmp_path / "out", load_recipe("gopher"))
    with pytest.raises(CurationError, match="other input files"):
        curate([str(corpus / "0.jsonl")], tmp_path / "out", recipe_from({}))
    with locked(tmp_path / "out"), pytest.raises(LockedError):
        curate([str(corpus)], tmp_path / "out", recipe_from({}))
    assert curate([str(corpus)], tmp_path / "out", recipe_from({})).documents_out


def test_changed_evaluations_are_noticed(corpus: Path, tmp_path: Path) -> None:
    items = write_rows(tmp_path / "items.jsonl", ["the quick brown fox jumps over the lazy dog every single morning"])
    recipe = recipe_from({"decontaminate": {"files": [str(items)]}})
    kept = curate([str(corpus)], tmp_path / "out", recipe).documents_out
    assert curate([str(corpus)], tmp_path / "out", recipe).documents_out == kept
    write_rows(items, [max((row["text"] for row in rows_of(tmp_path / "out")), key=len)])
    with pytest.raises(CurationError, match="other texts of the evaluations that decontaminate names"):
        curate([str(corpus)], tmp_path / "out", recipe)
    assert curate([str(corpus)], tmp_path / "new", recipe).documents_out < kept


def test_no_document_left_names_the_rules(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["short", "other"])
    for _ in range(2):  # the same command says it again
        with pytest.raises(CurationError, match=r"no document is left; removed were: gopher_quality: few words \(2\)"):
            curate([str(path)], tmp_path / "out", load_recipe("gopher"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gofer_quality": {}}, r"gofer_quality: no such field; did you mean gopher_quality\?"),
        ({"gopher_quality": {"min_words": "many"}}, "gopher_quality.min_words is 'many'; expected a whole number"),
        ({"normalize": {"unicode": "NFD"}}, "normalize.unicode is 'NFD'; expected one of 'none', 'NFC', 'NFKC'"),
        ({"max_bad": float("inf")}, "max_bad is inf; expected a finite number"),
        ({"output": True}, "output.*: expected fields and values, found True"),
        ({"max_bad": 2}, "max_bad is 2.0; expected a share from 0 to 1"),
        ({"gopher_repetition": {"top_grams": [0.1]}}, "gopher_repetition.top_grams is .*; expected a list of 3"),
    ],
)
def test_recipes_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from(values)


def test_a_recipe_file_may_start_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: gopher\ngopher_quality:\n  min_words: 7\nexact: false\n")
    recipe = load_recipe(path)
    assert recipe.gopher_quality is not None
    assert (recipe.gopher_quality.min_words, recipe.gopher_quality.max_words) == (7, 100_000)
    assert recipe.gopher_repetition is not None
    assert recipe.exact is None
    with pytest.raises(RecipeError, match="no such file, and no preset"):
        load_recipe("nothing")


def test_texts_are_one_buffer() -> None:
    import numpy as np

    texts = ["", "a", "\U0001f600", ""]
    packed = Texts.of(texts)
    assert packed.to_list() == texts
    assert packed.take(np.asarray([False, True, False, True])).to_list() == ["a", ""]
