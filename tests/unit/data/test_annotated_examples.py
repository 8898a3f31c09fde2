"""Names and questions from files: every form that is read gives the same example, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.data.annotated import Question, Tagged, bio, entities_of, question, tagged, unanswered, untagged
from minitron.data.documents import DataError
from minitron.data.documents.problems import Bad
from minitron.data.examples import RowFormat, read_examples

WORDS = ["Ada", "King", "visits", "York", "."]
TAGS = ["B-PER", "I-PER", "O", "B-LOC", "O"]
WANTED = [("PER", 0, 2), ("LOC", 3, 4)]


def names_of(item: Tagged | Bad) -> list[tuple[str, str]]:
    assert isinstance(item, Tagged), item
    return [(item.text[item.spans[a][0] : item.spans[b - 1][1]], kind) for kind, a, b in entities_of(item.tags)]


@pytest.mark.parametrize(
    "tags",
    [
        TAGS,
        ["B-PER", "L-PER", "O", "U-LOC", "O"],  # BILOU
        ["B-PER", "E-PER", "O", "S-LOC", "O"],  # BIOES
        ["I-PER", "I-PER", "O", "I-LOC", "O"],  # IOB1
    ],
)
def test_every_scheme_gives_the_same_names(tags: list[str]) -> None:
    assert names_of(tagged()({"words": WORDS, "tags": tags})) == [("Ada King", "PER"), ("York", "LOC")]
    assert entities_of(bio(tags)) == WANTED


def test_numbers_as_tags_need_names() -> None:
    row = {"words": WORDS, "tags": [1, 2, 0, 3, 0]}
    assert names_of(tagged(["O", "B-PER", "I-PER", "B-LOC"])(row)) == [("Ada King", "PER"), ("York", "LOC")]
    for names, what in (((), "tag 1 is a number; name the tags"), (("O", "B-PER"), "tag 2 has no name")):
        found = tagged(names)(row)
        assert isinstance(found, Bad)
        assert what in found.what


def test_spans_of_characters() -> None:
    text = "Ada King, of York."
    for entities in (
        [{"start": 0, "end": 8, "label": "PER"}, {"start": 13, "end": 17, "label": "LOC"}],
        [[0, 8, "PER"], [13, 17, "LOC"]],
    ):
        assert names_of(tagged()({"text": text, "entities": entities})) == [("Ada King", "PER"), ("York", "LOC")]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"words": WORDS, "tags": TAGS[:3]}, "there are 5 words and 3 tags"),
        ({"words": WORDS, "tags": ["PER", "O", "O", "O", "O"]}, "tag 'PER' is none of the schemes"),
        ({"words": ["a", " "], "tags": ["O", "O"]}, "word 2 of 2 is empty"),
        ({"words": [], "tags": []}, "expected a list of words"),
        ({"text": "Yorkshire", "entities": [[0, 4, "LOC"]]}, "begins or ends within a word"),
        ({"text": "York", "entities": [[0, 5, "LOC"]]}, "it must be 0 <= start < end <= 4"),
        ({"text": "York", "entities": [[2, 2, "LOC"]]}, "it must be 0 <= start < end <= 4"),
        ({"text": "New York", "entities": [[0, 8, "LOC"], [4, 8, "LOC"]]}, "overlaps another one"),
        ({"text": "York", "entities": [{"start": 0, "end": 4}]}, "has no label"),
        ({"text": " ", "entities": []}, "expected a text"),
        ({"text": "York"}, "neither words and tags nor text and entities"),
    ],
)
def test_what_is_wrong_with_tags_is_said(row: dict[str, Any], what: str) -> None:
    found = tagged()(row)
    assert isinstance(found, Bad)
    assert what in found.what


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=12))
def test_tags_become_the_scheme_in_which_every_name_begins_with_b(tags: list[str]) -> None:
    made = bio(tags)
    assert bio(made) == made
    assert [tag == "O" for tag in made] == [tag == "O" for tag in tags]
    before = "O"
    for tag in made:
        assert tag[0] != "I" or before[2:] == tag[2:]
        before = tag
    covered = [i for _, first, stop in entities_of(made) for i in range(first, stop)]
    assert covered == [i for i, tag in enumerate(made) if tag != "O"]


def test_conll_files_and_lines_are_read(tmp_path: Path) -> None:
    content = "".join(f"{word}\t{tag}\n" for word, tag in zip(WORDS, TAGS, strict=True))
    (tmp_path / "a.conll").write_text(f"{content}\n{content}")
    (tmp_path / "b.jsonl").write_text(json.dumps({"tokens": WORDS, "ner_tags": TAGS}) + "\n")
    found = read_examples([str(tmp_path / "a.conll"), str(tmp_path / "b.jsonl")], "ner", tagged(), RowFormat())
    assert [entities_of(item.tags) for item in found.items] == [WANTED] * 3
    assert [Path(place).name for place in found.places] == ["a.conll, line 1", "a.conll, line 7", "b.jsonl, line 1"]
    bare = read_examples([str(tmp_path / "b.jsonl")], "ner", untagged, RowFormat(unlabelled=True))
    assert (bare.items[0].words, bare.items[0].tags) == (WORDS, ())


CONTEXT = "Ada King was born in London in 1815."


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["London", "in London"], "answer_start": [21, 18]},
        [{"text": "London", "answer_start": 21}, {"text": "in London", "answer_start": 18}],
        ["London", "in London"],
    ],
)
def test_every_form_of_answers(answers: Any) -> None:
    wanted = Question(CONTEXT, "Where?", ("London", "in London"), 21)
    assert question({"context": CONTEXT, "question": "Where?", "answers": answers}) == wanted


def test_questions_without_an_answer() -> None:
    none = Question(CONTEXT, "Why?", (), None)
    row = {"context": CONTEXT, "question": "Why?"}
    for more in ({"answers": []}, {"answers": {"text": [], "answer_start": []}}, {"is_impossible": True},
                 {"is_impossible": True, "answers": [{"text": "London", "answer_start": 21}]}):  # fmt: skip
        assert question({**row, **more}) == none
    assert unanswered(row) == none


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({}, "the field 'answers' (or 'answer') is missing"),
        ({"answers": "Paris"}, "answer 'Paris' does not occur in the context"),
        ({"answers": "London", "answer_start": 20}, "is said to begin at character 20, where ' Londo' stands"),
        ({"answers": {"text": ["London"], "answer_start": []}}, None),
        ({"answers": {"text": ["London"], "answer_start": [1, 2]}}, "each needs a number"),
        ({"answers": {"text": ["London"], "answer_start": ["x"]}}, "each needs a number"),
        ({"answers": "London", "answer_start": 21.5}, "each needs a number"),
        ({"answers": "London", "answer_start": "20"}, "is said to begin at character 20"),
        ({"answers": 3}, "expected texts"),
        ({"answers": [" "]}, "the answer is empty"),
        ({"answers": "London", "context": ""}, "context is ''"),
        ({"answers": "London", "question": None}, "question is None"),
    ],
)
def test_what_is_wrong_with_answers_is_said(more: dict[str, Any], what: str | None) -> None:
    found = question({"context": CONTEXT, "question": "Where?", **more})
    if what is None:  # an answer without a place is looked for
        assert isinstance(found, Question)
        assert found.start == 21
    else:
        assert isinstance(found, Bad)
        assert what in found.what


@pytest.mark.parametrize("indent", [None, 1])
def test_squads_own_files_are_taken_apart(tmp_path: Path, indent: int | None) -> None:
    asked = [
        {"question": "Where?", "id": "1", "answers": [{"text": "London", "answer_start": 21}], "is_impossible": False},
        {"question": "Why?", "id": "2", "answers": [], "is_impossible": True},
    ]
    nested = {"version": "v2.0", "data": [{"title": "Ada", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]}
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(nested, indent=indent))
    found = read_examples([str(path)], "qa", question, RowFormat())
    assert [(item.question, item.answers) for item in found.items] == [("Where?", ("London",)), ("Why?", ())]
    assert found.places[1].endswith("article 1, paragraph 1, question 2")
    asked[0]["answers"][0]["answer_start"] = 20  # type: ignore[index]
    path.write_text(json.dumps(nested, indent=indent))
    with pytest.raises(
        DataError, match=r"dev\.json.*article 1, paragraph 1, question 1.*said to begin at character 20"
    ):
        read_examples([str(path)], "qa", question, RowFormat())
