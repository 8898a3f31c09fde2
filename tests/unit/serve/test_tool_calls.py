from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")

from minitron.serve.tool_calls import HERMES, LLAMA_3, NEMOTRON, ToolCallParser, merged

CALL = '{"name": "get", "arguments": {"city": "A \\"b\\" }]", "n": [1, {"x": null}]}}'
ARGUMENTS = json.loads(CALL)["arguments"]


def parsed(text: str, form=NEMOTRON, seed: int | None = None, most: int | None = None):
    """The message of a text that comes in random pieces (a single one without a seed), and its deltas."""
    parser, chance, deltas, at = ToolCallParser(form, most), random.Random(seed), [], 0
    while at < len(text):
        size = len(text) if seed is None else chance.randint(1, 6)
        deltas += parser.push(text[at : at + size])
        at += size
    deltas += parser.finish()
    return merged(deltas), deltas


def calls(message) -> list[tuple[str, object]]:
    return [
        (one["function"]["name"], json.loads(one["function"]["arguments"])) for one in message.get("tool_calls", [])
    ]


@pytest.mark.parametrize(
    ("text", "form", "content", "expected"),
    [
        ("Just text.", NEMOTRON, "Just text.", []),
        (f"<toolcall> {CALL} </toolcall>\n", NEMOTRON, None, [("get", ARGUMENTS)]),
        (f"Wait.\n<toolcall> {CALL} </toolcall>\n", NEMOTRON, "Wait.", [("get", ARGUMENTS)]),
        (f"<toolcall> {CALL} </toolcall>\n<toolcall>{CALL}</toolcall>", NEMOTRON, None, [("get", ARGUMENTS)] * 2),
        (f"<toolcall> [{CALL}, {CALL}] </toolcall>", NEMOTRON, None, [("get", ARGUMENTS)] * 2),
        (f"<tool_call>\n{CALL}\n</tool_call>", HERMES, None, [("get", ARGUMENTS)]),
        ('<toolcall> {"arguments": {"a": 1}, "name": "f"} </toolcall>', NEMOTRON, None, [("f", {"a": 1})]),
        ('<toolcall> {"name": "f"} </toolcall>', NEMOTRON, None, [("f", {})]),
        ('{"name": "f", "parameters": {"a": 1}}', LLAMA_3, None, [("f", {"a": 1})]),
        ("No { call", LLAMA_3, "No { call", []),
        ("a <toolcall> nonsense </toolcall> b", NEMOTRON, "a <toolcall> nonsense </toolcall> b", []),
        ("a < b <tool", NEMOTRON, "a < b <tool", []),
        ("<toolcall> unfinished", NEMOTRON, "<toolcall> unfinished", []),
        ('{"not": "a call"}', LLAMA_3, '{"not": "a call"}', []),
    ],
)
def test_calls_and_content_however_the_text_is_cut(text, form, content, expected) -> None:
    whole, _ = parsed(text, form)
    assert calls(whole) == expected
    assert whole["content"] == content
    for seed in range(30):
        message, _ = parsed(text, form, seed)
        assert calls(message) == expected
        assert message["content"] == content


def without_ids(message):
    return [one["function"] for one in message.get("tool_calls", [])], message["content"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": }', '{"a": }'),
        ('{"a": 1', '{"a": 1 '),
        ('{"a": "b', '{"a": "b '),
        ('{"a":   1}', '{"a":   1}'),
        ('{"a": 1} beside', '{"a": 1}'),
        ("nothing", "nothing "),
    ],
)
def test_malformed_arguments_are_the_same_however_the_text_is_cut(arguments, expected) -> None:
    text = f'Wait. <toolcall> {{"name": "f", "arguments": {arguments} </toolcall> after'
    whole, _ = parsed(text)
    assert without_ids(whole)[0] == [{"name": "f", "arguments": expected}]
    for seed in range(30):
        assert without_ids(parsed(text, seed=seed)[0]) == without_ids(whole)


def test_a_name_that_is_no_json_string_stays_text() -> None:
    text = '<toolcall> {"name": "\\q", "arguments": {}} </toolcall>'
    for seed in (None, 1, 2, 3):
        assert without_ids(parsed(text, seed=seed)[0]) == ([], text)


def test_arguments_are_streamed() -> None:
    _, deltas = parsed(f"<toolcall> {CALL} </toolcall>", seed=1)
    parts = [delta["tool_calls"][0] for delta in deltas]
    assert parts[0]["function"] == {"name": "get", "arguments": ""}
    assert all(set(part) == {"index", "function"} for part in parts[1:])
    assert len(parts) > 5
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == ARGUMENTS


def test_at_most_one_call_without_parallel_calls() -> None:
    text = f"<toolcall> {CALL} </toolcall>\n<toolcall> {CALL} </toolcall>"
    for seed in (None, 1, 2, 3):
        assert len(calls(parsed(text, seed=seed, most=1)[0])) == 1


def test_every_call_has_an_id_of_its_own() -> None:
    message, _ = parsed(f"<toolcall> [{CALL}, {CALL}] </toolcall>")
    assert len({one["id"] for one in message["tool_calls"]}) == 2
