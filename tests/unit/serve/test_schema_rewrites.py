from __future__ import annotations

import itertools

import jsonschema
import pytest

from minitron.serve.schema_rewrites import rewritten

VALUES = [None, True, 0, 1, 2.5, "a", "2023-02-29", "2024-02-29", [], ["a"], {}]
VALUES += [
    dict(pairs)
    for size in (1, 2, 3)
    for pairs in itertools.combinations([("a", 1), ("b", 2), ("c", "x"), ("kind", "cat"), ("kind", "dog")], size)
]
CAT = {"properties": {"kind": {"const": "cat"}}, "required": ["kind"], "type": "object"}
DOG = {"properties": {"kind": {"enum": ["dog", "fox"]}}, "required": ["kind", "a"], "type": "object"}


@pytest.mark.parametrize(
    ("schema", "gone"),
    [
        ({"type": "string", "format": "topic"}, "format"),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "oneOf"),
        ({"oneOf": [{"const": 1}, {"enum": ["a", None]}]}, "oneOf"),
        ({"oneOf": [CAT, DOG]}, "oneOf"),
        ({"oneOf": [{"$ref": "#/$defs/s"}, {"type": "array"}], "$defs": {"s": {"type": "string"}}}, "oneOf"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"dependentRequired": {"a": ["b"], "b": ["c", "a"]}, "allOf": [{"required": ["c"]}]}, "dependentRequired"),
        # Not certain, so they stay.
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, None),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, None),
        ({"oneOf": [{"const": 1}, {"const": True}]}, None),
        ({"oneOf": [{**CAT, "required": []}, DOG]}, None),
        ({"oneOf": [CAT, {**DOG, "required": ["a"]}]}, None),
        ({"oneOf": [{"type": ["string", "null"]}, {"type": ["null", "boolean"]}]}, None),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}], "anyOf": [{"type": "string"}]}, None),
        ({"enum": [{"format": "topic"}, "a"], "properties": {"format": {"type": "string"}}}, None),
    ],
)
def test_the_same_values_are_valid(schema, gone) -> None:
    found = rewritten(schema)
    assert gone is None or gone not in found
    assert gone is not None or found == schema
    before, after = jsonschema.Draft202012Validator(schema), jsonschema.Draft202012Validator(found)
    valid = [before.is_valid(value) for value in VALUES]
    assert [after.is_valid(value) for value in VALUES] == valid
    assert len(set(valid)) == 2 or gone == "format"


def test_dependencies_of_the_older_drafts() -> None:
    schema = {"dependencies": {"a": ["b"], "c": []}}
    before, after = jsonschema.Draft7Validator(schema), jsonschema.Draft7Validator(rewritten(schema))
    assert "dependencies" not in rewritten(schema)
    assert [after.is_valid(value) for value in VALUES] == [before.is_valid(value) for value in VALUES]
    kept = {"dependencies": {"a": {"required": ["b"]}}}
    assert rewritten(kept) == kept


def test_a_date_exists() -> None:
    check = jsonschema.Draft202012Validator(rewritten({"type": "string", "format": "date"}))
    dates = [f"{year}-{day}" for year in (1900, 2000, 2023, 2024) for day in ("02-28", "02-29", "03-29")]
    found = [date for date in dates if check.is_valid(date)]
    assert [date for date in dates if date not in found] == ["1900-02-29", "2023-02-29"]


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    note = {"type": "string", "format": "topic"}
    assert rewritten({"properties": {"default": note, "enum": note}, "default": note}) == {
        "properties": {"default": {"type": "string"}, "enum": {"type": "string"}},
        "default": note,
    }


def test_endless_references_and_odd_schemas_are_left_alone() -> None:
    for schema in (
        {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "string"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"oneOf": "no list"},
        {"dependencies": 3},
        {"oneOf": [{"$ref": "#/nowhere"}, {"$ref": 4}]},
        True,
        {"format": 4, "required": 5, "properties": []},
    ):
        assert rewritten(schema) == schema
