"""Plain values as JSON, between the process of the tests and the process of the program.

Decoded values have exactly built-in types, so that a comparison or a call in a test runs no code of the program: no
subclass with its own `__eq__`, no pickle. Integers and floats are sent as hexadecimal digits, which are exact.
"""

import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MOST_BYTES = 16 << 20
"""Of a message."""
MOST_ITEMS = 1_000_000
"""Most items taken from an iterator, which may be endless."""


class Unknown:
    """A value that cannot be sent. Comparing it or testing its truth is an error, so no test passes because of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        raise TypeError(f"the program returned a value of type {self.name!r}, which cannot be compared")

    def __bool__(self) -> bool:
        raise TypeError(f"the program returned a value of type {self.name!r}, which is neither true nor false")


def encode(value: object) -> Any:
    """A value in a form that `json` can write.

    A subclass becomes its built-in base (a `Counter` becomes a dict). A number of another library becomes the value of
    its `item()`. Anything else that can be iterated becomes an iterator over its items, and the rest `Unknown`.

    Raises:
        RecursionError: too deeply nested, or a list that contains itself.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, (name, encoded, _) in _KINDS.items():
        if isinstance(value, kind):
            return [name, encoded(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of NumPy
        return encode(value.item())  # type: ignore[attr-defined]
    if isinstance(value, Iterable) and not isinstance(value, type):
        items = list(itertools.islice(value, MOST_ITEMS + 1))
        if len(items) <= MOST_ITEMS:
            return ["iterator", _items(items)]
    return ["unknown", type(value).__name__[:100]]


def decode(value: object) -> Any:
    """The value that `encode` encoded.

    Raises:
        ValueError, TypeError: not a result of `encode`; an unhashable key.
        RecursionError: too deeply nested.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in _DECODERS:
        return _DECODERS[value[0]](value[1])
    raise ValueError("not an encoded value")


def is_exact(encoded: object) -> bool:
    """Whether an encoded value arrives unchanged."""
    if not isinstance(encoded, list):
        return True
    return encoded[:1] not in (["iterator"], ["unknown"]) and all(map(is_exact, encoded))


def _items(values: Iterable[object]) -> list[Any]:
    return [encode(value) for value in values]


def _decoded_items(values: object) -> list[Any]:
    if type(values) is not list:
        raise ValueError("not a list of encoded values")
    return [decode(value) for value in values]


def _text(value: object) -> str:
    if type(value) is not str:
        raise ValueError("not a text")
    return value


def _float_pair(value: object) -> complex:
    real, imaginary = _decoded_items(value)
    return complex(real, imaginary)


def _fraction(value: object) -> Fraction:
    numerator, denominator = _decoded_items(value)
    if type(numerator) is not int or type(denominator) is not int or denominator == 0:
        raise ValueError("not a fraction")
    return Fraction(numerator, denominator)


def _range(value: object) -> range:
    numbers = _decoded_items(value)
    if any(type(number) is not int for number in numbers):
        raise ValueError("not a range")
    return range(*numbers)


def _pairs(value: object) -> list[tuple[Any, Any]]:
    found = []
    for pair in _decoded_items(value):
        if type(pair) is not tuple or len(pair) != 2:
            raise ValueError("not a pair of key and value")
        found.append(pair)
    return found


# Type, name, contents to JSON, and back. Methods of the base type are called: a subclass gives its plain contents.
_KINDS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    int: ("int", lambda value: format(int.__index__(value), "x"), lambda text: int(_text(text), 16)),
    float: ("float", float.hex, lambda text: float.fromhex(_text(text))),
    str: ("str", lambda value: str.__str__(value), _text),
    bytes: ("bytes", bytes.hex, lambda text: bytes.fromhex(_text(text))),
    list: ("list", lambda value: _items(list.__iter__(value)), _decoded_items),
    tuple: ("tuple", lambda value: _items(tuple.__iter__(value)), lambda value: tuple(_decoded_items(value))),
    dict: ("dict", lambda value: _items(tuple(pair) for pair in dict.items(value)), lambda value: dict(_pairs(value))),
    set: ("set", lambda value: _items(set.__iter__(value)), lambda value: set(_decoded_items(value))),
    frozenset: (
        "frozenset",
        lambda value: _items(frozenset.__iter__(value)),
        lambda value: frozenset(_decoded_items(value)),
    ),
    complex: ("complex", lambda value: _items((value.real, value.imag)), _float_pair),
    range: ("range", lambda value: _items((value.start, value.stop, value.step)), _range),
    Fraction: ("fraction", lambda value: _items((value.numerator, value.denominator)), _fraction),
    Decimal: ("decimal", lambda value: str(value), lambda text: Decimal(_text(text))),
}
_DECODERS: dict[str, Callable[[Any], Any]] = {name: decoded for name, _, decoded in _KINDS.values()} | {
    "iterator": lambda value: iter(_decoded_items(value)),
    "unknown": lambda text: Unknown(_text(text)),
}


# --- messages ----------------------------------------------------------------------------------------------------


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Write a message: four bytes of length, then JSON.

    Raises:
        ValueError: the message is longer than `MOST_BYTES`.
        OSError: the other end is closed.
    """
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")  # two surrogates stay two
    if len(body) > MOST_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; at most {MOST_BYTES} can be sent")
    data = struct.pack(">I", len(body)) + body
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> dict[str, Any] | None:
    """Read a message; None if the other end is closed.

    Raises:
        ValueError: not a valid message.
    """
    header = _read_exactly(descriptor, 4)
    if header is None:
        return None
    (length,) = struct.unpack(">I", header)
    if length > MOST_BYTES:
        raise ValueError(f"a message of {length} bytes; at most {MOST_BYTES} are read")
    body = _read_exactly(descriptor, length)
    if body is None:
        return None
    message = json.loads(body.decode("utf-8", "surrogatepass"))
    if type(message) is not dict:
        raise ValueError("a message that is not a JSON object")
    return message


def _read_exactly(descriptor: int, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        part = os.read(descriptor, min(length - len(data), 1 << 16))
        if not part:
            return None
        data += part
    return bytes(data)
