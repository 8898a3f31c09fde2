from __future__ import annotations

import json

import pytest

pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")

from json_schemas import DATA, FILE, check, follows, masking_model, read_schemas

from minitron.assets import bundled_model
from minitron.serve.errors import ApiError
from minitron.serve.grammar import schema_mask


@pytest.fixture(scope="module")
def model():
    return masking_model(bundled_model("half"))


@pytest.mark.skipif(not FILE.exists(), reason=f"no data sets in {DATA}")
def test_schemas_of_a_public_benchmark(model) -> None:
    """Every twentieth; `benchmarks/schemas.py` has all of them."""
    rows = read_schemas()[::20]
    found = [check(model, row, outputs=1) for row in rows]
    assert sum(one.accepted for one in found) >= 19
    assert not any(one.invalid_accepted or one.wrong_outputs for one in found)
    assert sum(one.valid for one in found) > 15
    assert sum(len(one.valid_refused) for one in found) == 0
    assert sum(one.finished for one in found) > 15


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "oneOf"),
        ({"type": "string", "format": "regex"}, "regex"),
    ],
)
def test_a_keyword_that_is_not_supported_is_named(model, schema, word) -> None:
    with pytest.raises(ApiError, match=word) as found:
        schema_mask(model, schema, 1000, "response_format")
    assert (found.value.status, found.value.code) == (400, "unsupported_schema")


def test_a_mask_ends_where_nothing_may_follow(model) -> None:
    mask = schema_mask(model, {"type": "object", "properties": {}, "additionalProperties": False}, 1000, "x")
    assert follows(mask.copy(), model, json.dumps({}), [])
    assert not follows(mask.copy(), model, "{ }", [])
    assert not follows(mask.copy(), model, "{", [])
    assert len(mask.allowed()) == model.vocabulary
