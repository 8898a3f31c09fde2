"""Planted evaluation items are found, also with case, punctuation and white space changed; other texts stay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from curation_texts import ordinary

from minitron.curate.decontaminate import contaminated, read_evaluations, saved_evaluations
from minitron.curate.recipe import Decontaminate, RecipeError, recipe_from
from minitron.curate.texts import Texts


def item(rng: random.Random, words: int) -> str:
    return " ".join(f"word{rng.randrange(10**6)}" for _ in range(words)) + "?"


def disguised(rng: random.Random, text: str) -> str:
    words = [rng.choice([word, word.upper(), word.title()]) for word in text.rstrip("?").split()]
    return "".join(word + rng.choice([" ", ", ", "\n", " - ", "\u2003"]) for word in words)


@pytest.fixture
def settings(tmp_path: Path) -> Decontaminate:
    rng = random.Random(0)
    rows = [{"question": item(rng, 20), "choices": [item(rng, 9), item(rng, 3)]} for _ in range(50)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Decontaminate(files=(str(path),))


def rows_of(settings: Decontaminate) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(settings.files[0]).read_text().splitlines()]


def test_planted_items_are_found_and_others_stay(settings: Decontaminate) -> None:
    rng = random.Random(1)
    planted, clean = [], [ordinary(rng) for _ in range(100)]
    for row in rows_of(settings):
        question, (choice, short) = str(row["question"]), row["choices"]  # type: ignore[misc]
        for text in (question, choice):
            planted += [ordinary(rng) + "\n" + text + " " + ordinary(rng), ordinary(rng) + disguised(rng, text)]
        clean += [ordinary(rng) + " " + short, " ".join(question.split()[:12]), " ".join(choice.split()[:8])]
    found = contaminated(Texts.of([*planted, *clean]), settings, read_evaluations(settings)).tolist()
    assert found[: len(planted)] == ["items.jsonl"] * len(planted)
    assert found[len(planted) :] == [None] * len(clean)


def test_part_of_a_long_item_is_found(settings: Decontaminate) -> None:
    question = str(rows_of(settings)[0]["question"])
    part = Texts.of([" ".join(question.split()[5:18])])
    assert contaminated(part, settings, read_evaluations(settings)).tolist() == ["items.jsonl"]


def test_items_of_the_tasks_that_are_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    row = {
        "question": "Tom has three red apples and buys nine more on Sunday; how many has he?",
        "answer": "12 #### 12",
    }
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    settings = Decontaminate(tasks=("gsm8k",), data=str(tmp_path))
    texts = Texts.of([row["question"].upper(), "Tom has three red apples and that is all there is to say about him."])
    assert contaminated(texts, settings, read_evaluations(settings)).tolist() == ["gsm8k", None]
    with pytest.raises(ValueError, match="no test file of mmlu"):
        read_evaluations(Decontaminate(tasks=("mmlu",), data=str(tmp_path)))
    with pytest.raises(ValueError, match="no task 'gsm9k'; known: mmlu"):
        read_evaluations(Decontaminate(tasks=("gsm9k",), data=str(tmp_path)))


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give tasks or files"):
        recipe_from({"decontaminate": {}})
    with pytest.raises(RecipeError, match="expected 1 <= short <= ngram"):
        recipe_from({"decontaminate": {"files": ["a"], "short": 14}})
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "too short"}\n')
    with pytest.raises(ValueError, match=r"short\.jsonl has no item of at least 8 words"):
        read_evaluations(Decontaminate(files=(str(path),)))


def test_a_run_removes_planted_items(settings: Decontaminate, tmp_path: Path) -> None:
    from minitron.curate.run import curate

    rng = random.Random(2)
    path = tmp_path / "in.jsonl"
    texts = [ordinary(rng) for _ in range(10)] + [ordinary(rng) + str(rows_of(settings)[3]["question"])]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = recipe_from({"decontaminate": {"files": list(settings.files)}})
    report = curate([str(path)], tmp_path / "out", recipe)
    assert report.stages["decontaminate"].removed == {"items.jsonl": 1}
    assert report.documents_out == 10


def test_saved_evaluations_find_what_those_of_the_files_find(settings: Decontaminate, tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = rows_of(settings)
    texts = Texts.of([ordinary(rng), *(disguised(rng, str(row["question"])) for row in rows)])
    made = read_evaluations(settings)
    made.save(tmp_path)
    Path(settings.files[0]).unlink()  # a worker needs the saved ones alone
    loaded = saved_evaluations(tmp_path)
    assert loaded.digest() == made.digest()
    assert contaminated(texts, settings, loaded).tolist() == [None, *["items.jsonl"] * len(rows)]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": item(rng, 20)}) + "\n")
    read_evaluations(Decontaminate(files=(str(other),))).save(tmp_path)
    assert saved_evaluations(tmp_path).names == (str(other),), "a file that was written again is read again"


def test_parts_are_compared_with_what_was_saved(settings: Decontaminate, tmp_path: Path) -> None:
    from minitron.curate.run import curate

    rng = random.Random(4)
    path = tmp_path / "in.jsonl"
    texts = [ordinary(rng), ordinary(rng) + str(rows_of(settings)[3]["question"])]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def say(line: str) -> None:
        if line.endswith(" parts"):  # the parts follow
            Path(settings.files[0]).unlink()
            read_evaluations.cache_clear()

    recipe = recipe_from({"decontaminate": {"files": list(settings.files)}})
    assert curate([str(path)], tmp_path / "out", recipe, say=say).documents_out == 1
    assert not Path(settings.files[0]).exists()
