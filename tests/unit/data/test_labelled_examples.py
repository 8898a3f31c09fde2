"""Labelled rows and conversations from files: what is read, what is refused and where, and splits that do not leak."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minitron.data.annotated import Question
from minitron.data.documents import DataError
from minitron.data.documents.problems import Bad
from minitron.data.examples import (
    Conversation,
    Examples,
    Labelled,
    RowFormat,
    conversation,
    labelled,
    overlap,
    read_examples,
    split_examples,
)

ROWS = [{"text": 'Buy\nnow, "cheap"', "label": "spam"}, {"text": "See you; at noon", "label": "ham"}]
WANTED = [Labelled(row["text"], None, row["label"]) for row in ROWS]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(folder: Path, name: str, content: str) -> str:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


CSV = 'label,text\nspam,"Buy\nnow, ""cheap"""\nham,See you; at noon\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl.gz", lines(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.csv", CSV),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n").replace("Buy\r\nnow", "Buy\nnow")),
        ("a.tsv", 'label\ttext\nspam\t"Buy\nnow, ""cheap"""\nham\tSee you; at noon\n'),
        ("other.jsonl", lines([{"sentence": r["text"], "category": r["label"], "id": 1} for r in ROWS])),
    ],
)
def test_every_kind_of_file_gives_the_same(tmp_path: Path, name: str, content: str) -> None:
    found = read_examples([written(tmp_path, name, content)], "classify", labelled("one"), RowFormat())
    assert found.items == WANTED


def test_tables_and_folders(tmp_path: Path) -> None:
    table = arrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with arrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found = read_examples([str(tmp_path)], "classify", labelled("one"), RowFormat())
    assert found.items == WANTED * 2
    assert found.places[1] == f"{tmp_path / 'a.parquet'}, row 2"


def test_named_fields_and_columns(tmp_path: Path) -> None:
    file = written(tmp_path, "a.csv", "3,Fears,Unions say\n4,Race,A team\n")
    rows = RowFormat({"text": "title", "pair": "body"}, ("label", "title", "body"))
    found = read_examples([file], "classify", labelled("one"), rows)
    assert found.items == [Labelled("Fears", "Unions say", "3"), Labelled("Race", "A team", "4")]


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("one", 3, "3"), ("one", " spam ", "spam"), ("several", "a|b", ("a", "b")),
        ("several", ["x", "x", 2], ("x", "2")),
        ("several", [], ()), ("number", "2.5", 2.5), ("number", 7, 7.0),
    ],
)  # fmt: skip
def test_labels(kind: str, value: Any, wanted: Any) -> None:
    found = labelled(kind)({"text": "t", "label": value})
    assert isinstance(found, Labelled)
    assert found.label == wanted


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("one", {"text": "t", "label": 1.5}, "label is 1.5; expected a name or an integer"),
        ("one", {"text": "t", "label": True}, "label is true; expected a name"),
        ("one", {"text": "t", "label": " "}, 'label is " "; expected a name'),
        ("one", {"text": " \n", "label": "a"}, 'text is " \\n"; expected a text'),
        ("one", {"text": 5, "label": "a"}, "text is 5; expected a text"),
        ("several", {"text": "t", "label": 5}, "label is 5; expected a list of names"),
        ("number", {"text": "t", "label": "nan"}, 'label is "nan"; expected a finite number'),
        ("number", {"text": "t", "label": "five"}, "expected a finite number"),
    ],
)
def test_labels_that_are_none(kind: str, fields: dict[str, Any], message: str) -> None:
    found = labelled(kind)(fields)
    assert isinstance(found, Bad)
    assert message in found.what


def test_bad_rows_are_named_all_at_once(tmp_path: Path) -> None:
    rows = [ROWS[0], {"text": "no label"}, {"text": None, "label": "a"}, {"text": "t", "label": {"a": 1}}]
    file = written(tmp_path, "a.jsonl", lines(rows) + "[1, 2]\n{broken\n")
    with pytest.raises(DataError) as caught:
        read_examples([file], "classify", labelled("one"), RowFormat())
    message = str(caught.value)
    for part in (
        f"{file}, line 2: the field 'label' (or 'labels', 'class', 'category', 'target') is missing",
        f"{file}, line 3: the field 'text'",
        "is empty; the row has the fields: text, label",
        f'{file}, line 4: label is {{"a": 1}}',
        f"{file}, line 5: expected an object; found a list of 2",
        f"{file}, line 6: not JSON",
    ):
        assert part in message
    found = read_examples([file], "classify", labelled("one"), RowFormat(skip_bad=True))
    assert found.items == WANTED[:1]
    assert "5 bad documents in 1 file were skipped" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,y,z\n", "a.csv, line 2: 3 values for 2 columns: text, label"),
        ("a.csv", 'text,label\n"x,y\n', "a.csv: not CSV"),
        ("a.csv", "text,text\nx,y\n", "a column is named twice"),
        ("a.txt", "text", "unknown kind of file for labelled rows"),
        ("a.jsonl", "\n", "no row at all"),
        ("a.jsonl", '{"text": "a\\u0000b", "label": 1}x', "not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples([written(tmp_path, name, content)], "classify", labelled("one"), RowFormat())


def test_a_field_that_the_task_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="field 'body' is not one of task classify: text, pair, label"):
        read_examples(
            [written(tmp_path, "a.jsonl", lines(ROWS))], "classify", labelled("one"), RowFormat({"body": "x"})
        )


# --- conversations -----------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        json.dumps([USER, ASSISTANT]),
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{**USER, "tool_calls": None}, {**ASSISTANT, "tool_call_id": None}],
    ],
)
def test_forms_of_conversations(messages: Any) -> None:
    assert conversation({"messages": messages}) == Conversation((USER, ASSISTANT))


def test_calls_of_tools_stay() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        USER, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"}, ASSISTANT,
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert conversation({"messages": messages, "tools": tools}) == Conversation(tuple(messages), tuple(tools))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], "no message of the assistant"),
        ([USER, USER, ASSISTANT], "messages 1 and 2 are both of the user"),
        ([USER, {"role": "system", "content": "x"}, ASSISTANT], "message 2 has the role 'system'; only the first"),
        ([{"role": "boss", "content": "x"}], 'message 1: role is "boss"; expected one of system'),
        ([{"role": "assistant", "content": None}], "message 1: content is null; expected a text"),
        ([], "messages is []; expected a list of messages"),
        ("[oops", "expected a list"),
        ([7], "message 1: 7 is no object"),
    ],
)
def test_conversations_that_are_none(messages: Any, message: str) -> None:
    found = conversation({"messages": messages})
    assert isinstance(found, Bad)
    assert message in found.what


# --- splitting ---------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "B ", "c", "d d", "D  d", "e", "f"]), min_size=6, max_size=60),
    st.integers(0, 9),
)
def test_splits_share_no_text_and_lose_none(texts: list[str], seed: int) -> None:
    items = [Labelled(text, None, str(i)) for i, text in enumerate(texts)]
    examples = Examples(items, [str(i) for i in range(len(items))])
    distinct = {" ".join(text.split()).casefold() for text in texts}
    if len(distinct) < 3:
        with pytest.raises(DataError, match="different texts are too few"):
            split_examples(examples, (0.2, 0.2), seed)
        return
    parts = split_examples(examples, (0.2, 0.2), seed)
    assert sorted(place for part in parts for place in part.places) == sorted(examples.places)
    seen = [{" ".join(item.text.split()).casefold() for item in part.items} for part in parts]
    assert seen[0].isdisjoint(seen[1] | seen[2])
    assert seen[1].isdisjoint(seen[2])
    assert all(seen)
    again = split_examples(examples, (0.2, 0.2), seed)
    assert [part.places for part in again] == [part.places for part in parts]


def test_questions_about_a_passage_stay_in_one_part() -> None:
    items = [Question(f"Passage {n // 4} has facts.", f"Question {n}?", ("facts",), 14) for n in range(40)]
    parts = split_examples(Examples(items, [str(n) for n in range(40)]), (0.2, 0.2), 3)
    passages = [{item.context for item in part.items} for part in parts]
    assert [len(each) for each in passages] == [6, 2, 2]
    assert sum(len(part.items) for part in parts) == 40
    assert not passages[0] & passages[1] | passages[0] & passages[2] | passages[1] & passages[2]


def test_texts_of_another_part_that_training_has_too_are_counted() -> None:
    train, other = (
        Examples([Labelled(text, None, "a") for text in texts], list(texts))
        for texts in (["The sea.", "A dog."], ["the  SEA.", "A cat.", "A  dog."])
    )
    assert overlap(train, other, "test") == (
        "2 of 3 test rows have texts that training rows have too, so scores on them say little about new texts"
    )
    assert overlap(train, Examples([Labelled("A cat.", None, "a")], ["x"]), "test") is None
