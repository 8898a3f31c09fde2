"""Values between a program and its judge, and what the judge makes of good and bad programs."""

from __future__ import annotations

import collections
import enum
import json
import os
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.evaluate.sandbox import Checks, SandboxError, require_isolation, run_tests
from minitron.evaluate.sandboxed.values import MOST_BYTES, Unknown, decode, encode, receive, send

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 20000), 1 << 20000),  # more digits than Python turns into decimal text
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters()),
    st.text(st.characters(categories=["Cs"])),  # lone surrogates
    st.binary(),
    st.fractions(),
    st.decimals(allow_nan=False),
)
KEYS = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
VALUES = st.recursive(
    KEYS | st.sets(KEYS, max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


def sent(value: object) -> Any:
    return decode(json.loads(json.dumps(encode(value), ensure_ascii=False)))


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other) if isinstance(one, float | complex | Decimal) else bool(one == other)


@given(VALUES)
def test_plain_values_arrive_as_they_are(value: Any) -> None:
    assert same(sent(value), value)


class Colour(enum.IntEnum):
    RED = 3


def test_other_types_arrive_as_what_they_are_made_of() -> None:
    point = collections.namedtuple("point", "x y")(1, 2)
    for value, plain in (
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.defaultdict(list, {1: [2]}), {1: [2]}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (point, (1, 2)),
        (Colour.RED, 3),
        (type("Text", (str,), {})("x"), "x"),
        (np.int64(7), 7),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (range(1, 9, 2), range(1, 9, 2)),
    ):
        assert same(sent(value), plain), value
    for items in (
        (n for n in range(3)),
        {0: 1, 1: 1, 2: 1}.keys(),
        collections.deque([0, 1, 2]),
        np.arange(3),
    ):
        found = sent(items)
        assert found != [0, 1, 2]
        assert list(found) == [0, 1, 2]
    assert np.isnan(sent(float("nan")))


@pytest.mark.parametrize("value", [object(), len, int, Colour, json, lambda: 1])
def test_what_cannot_be_sent_supports_no_comparison(value: object) -> None:
    found = sent(value)
    assert type(found) is Unknown
    for compare in (lambda: found == value, lambda: found != value, lambda: bool(found), lambda: found < 1):
        with pytest.raises(TypeError):
            compare()


@pytest.mark.parametrize(
    "forged",
    [1, 1.5, "x", [], ["int"], ["int", 5], ["int", "x"], ["int", "1", 2], ["float", "x"], ["list", "ab"], ["list", [1]],
     ["dict", [["list", []]]], ["dict", [["tuple", [None]]]], ["set", [["list", []]]], ["bytes", "zz"],
     ["complex", [["str", "1"], ["float", "0"]]], ["fraction", [["int", "1"], ["int", "0"]]], ["decimal", "x"],
     ["unknown", 3], ["range", [["str", "1"]]], ["range", [["int", "1"], ["int", "2"], ["int", "0"]]], ["range", []],
      [["int"], "1"], {"int": "1"}, ["eval", "1"]],
)  # fmt: skip
def test_forged_values_are_refused(forged: object) -> None:
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        decode(forged)


def test_messages() -> None:
    read, write = os.pipe()
    send(write, {"call": 1, "value": encode("é" * 1000)})
    assert decode((receive(read) or {})["value"]) == "é" * 1000
    with pytest.raises(ValueError, match="at most"):
        send(write, {"value": "x" * MOST_BYTES})
    os.write(write, b"\0\0\0\2[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        receive(read)
    os.write(write, b"\0\0\0\5{}")
    os.close(write)
    assert receive(read) is None
    os.close(read)


def verdict(program: str, tests: str, prompt: str = "") -> str:
    return run_tests(program, Checks("f", f"def check(candidate):\n{tests}", prompt)).reason


@pytest.fixture(scope="module")
def _isolation() -> None:
    try:
        require_isolation()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_isolation")
def test_judge() -> None:
    honest = "from collections import Counter\ndef f(x, *rest, **named): return Counter(x)"
    tests = "    assert candidate('aab') == {'a': 2, 'b': 1}\n    assert candidate(x='a', y=[1]) == {'a': 1}\n"
    assert verdict(honest, tests) == "passed"
    # An error is one of the same built-in type, which tests may wait for.
    raising = "class Own(Exception): pass\ndef f(x): raise (ValueError if x else Own)('no %s' % x)"
    waits = (
        "    try: candidate(7)\n    except ValueError as error: assert str(error) == 'no 7'\n    else: assert False\n"
    )
    assert verdict(raising, waits) == "passed"
    assert verdict(raising, "    candidate(0)\n") == "failed: Own: no 0"
    assert verdict("def g(x): return x", "    candidate(0)\n") == "failed: NameError: name 'f' is not defined"
    assert verdict("1/0", "    pass\n") == "failed: ZeroDivisionError: division by zero"
    for tests, prompt in (("pass", "def f(:"), ("candidate([object])", ""), ("candidate(iter('a'))", "")):
        with pytest.raises(ValueError, match="'f' cannot run"):
            verdict(honest, f"    {tests}\n", prompt)
    with pytest.raises(ValueError, match="cannot run: KeyError: 'check'"):
        run_tests(honest, Checks("f", "x = 1"))


@pytest.mark.usefixtures("_isolation")
def test_a_long_reason_arrives() -> None:
    assert verdict("def f(x): raise ValueError('\U0001f600' * 10000)", "    candidate(1)\n").startswith(
        "failed: ValueErr"
    )
