"""Execute pickle opcodes on plain values: nothing is imported or called, and everything that is built is limited.

The interpreter's own unpickler hashes what a file uses as a key (a tuple doubled 45 times through the memo: 2**45
hashes), recurses as deep as a tuple is nested, and sets attributes on whatever it is told to. Here each opcode is a
step of a bounded number, each object is charged to a budget of memory, keys are small plain values, and a name from
the file is a `Name`: only `pickles.py` says what a name may mean. Format: Lib/pickletools.py of CPython, protocols 0
to 5.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .limits import MAX_ODD_KEYS, MAX_PICKLE_MEMORY, MAX_PICKLE_STEPS, CheckpointError, collector_paused, shown

_MAX_LINE = 4096
_MAX_INT_BYTES = 32
_MAX_KEY_PARTS = 64
_NOTHING = object()


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """Replaces an object of a class that is not looked up: its name, its arguments, its state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args
        self.state: Any = {}

    def get(self, field: str) -> Any:
        """A field of the object's state; None if it has none."""
        return self.state.get(field) if isinstance(self.state, dict) else None


class Machine:
    """Runs one pickle.

    Args:
        data: the pickle.
        where: its source, for errors.
        lookup: resolves a name from the file; raises CheckpointError for a name that is not allowed.
        call: calls what `lookup` returned with a tuple of arguments.
        persistent: returns the value of a persistent id.
    """

    def __init__(
        self,
        data: bytes,
        where: object,
        lookup: Callable[[Name], Any],
        call: Callable[[Any, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
    ) -> None:
        self._data, self._where, self._at = data, where, 0
        self._lookup, self._call, self._persistent = lookup, call, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._memory = MAX_PICKLE_MEMORY
        self._odd_keys = 0

    def run(self) -> Any:
        """The object in the pickle.

        Raises:
            CheckpointError: a limit is passed, or the file breaks the rules of the format.
        """
        with collector_paused():
            return self._run()

    def _run(self) -> Any:
        data, table = self._data, _OPCODES
        for _ in range(MAX_PICKLE_STEPS):
            opcode = data[self._at]
            self._at += 1
            if opcode == 0x2E:  # STOP
                return self._stack.pop()
            step = table[opcode]
            if step is None:
                raise CheckpointError(f"{self._where}: pickle opcode 0x{opcode:02x} is not accepted")
            step(self)
        raise CheckpointError(f"{self._where}: more than {MAX_PICKLE_STEPS:,} pickle opcodes")

    # --- bytes and budgets ---------------------------------------------------------------------------------------

    def spend(self, amount: int) -> None:
        """Charge bytes of memory."""
        self._memory -= amount
        if self._memory < 0:
            raise CheckpointError(f"{self._where}: its objects would take more than {MAX_PICKLE_MEMORY:,} bytes")

    def _take(self, count: int) -> bytes:
        start, end = self._at, self._at + count
        if end > len(self._data):
            raise CheckpointError(f"{self._where}: the pickle ends too early; the file is cut")
        self._at = end
        return self._data[start:end]

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _long(self, size: int) -> int:
        if size > _MAX_INT_BYTES:
            raise CheckpointError(f"{self._where}: a number of {size:,} bytes in the pickle")
        return int.from_bytes(self._take(size), "little", signed=True)

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + _MAX_LINE)
        if end < 0:
            raise CheckpointError(f"{self._where}: a line of the pickle is too long or does not end")
        text = self._take(end - self._at).decode("latin1")
        self._at = end + 1
        return text

    def _decimal(self) -> Any:
        text = self._line()
        if text in ("00", "01"):  # how protocol 0 spells False and True
            return text == "01"
        if len(text) > 80:
            raise CheckpointError(f"{self._where}: a number of {len(text):,} digits in the pickle")
        return int(text.rstrip("L"))

    def _bytes(self, size: int) -> bytes:
        self.spend(size + 48)
        return self._take(size)

    def _text(self, size: int) -> str:
        self.spend(size * 4 + 64)  # up to four bytes for a character
        return self._take(size).decode("utf-8", "surrogatepass")

    # --- the stack and the memo ----------------------------------------------------------------------------------

    def _push(self, value: Any, cost: int = 16) -> None:
        self._memory -= cost
        if self._memory < 0:
            self.spend(0)
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _mark(self) -> None:
        self.spend(8)
        self._marks.append(len(self._stack))

    def _pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _put(self, index: int) -> None:
        # Pickles number their memo without gaps; one that was edited may have some.
        if not 0 <= index <= self._at:
            raise CheckpointError(f"{self._where}: pickle memo index {index:,} at byte {self._at:,}")
        gap = index - len(self._memo) + 1
        if gap > 0:
            self.spend(16 * gap)
            self._memo.extend([_NOTHING] * gap)
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if not 0 <= index < len(self._memo) or self._memo[index] is _NOTHING:
            raise CheckpointError(f"{self._where}: pickle memo index {index:,} of {len(self._memo):,}")
        self._push(self._memo[index])

    # --- containers ----------------------------------------------------------------------------------------------

    def _tuple(self, items: list[Any]) -> None:
        self._push(tuple(items), 72 + 8 * len(items))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        self._tuple(items)

    def _extend(self, items: list[Any]) -> None:
        self.spend(16 * len(items))
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):  # items of list-like objects are not kept
            raise CheckpointError(f"{self._where}: the pickle appends to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            self.store(target, items[0::2], items[1::2])
        elif not isinstance(target, Inert):
            raise CheckpointError(f"{self._where}: the pickle sets items of a {type(target).__name__}")

    def store(self, target: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
        """`target[key] = value`, for keys that are safe to hash."""
        if len(keys) != len(values):
            raise CheckpointError(f"{self._where}: a key without a value in the pickle")
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str:
                self._check_key(key)
            self.spend(104)
            target[key] = value

    def make_set(self, items: Iterable[Any]) -> None:
        """Push what stands for a set. Its items are not kept, since nothing here reads one."""
        self.check_items(items)
        self._push(Inert("builtins.set", ()), 160)

    def check_items(self, items: Iterable[Any]) -> None:
        """Items of a set are hashed by whoever else reads the file (torch.load): the same limits hold."""
        for item in items:
            self.spend(32)
            if type(item) is not str:
                self._check_key(item)

    def _check_key(self, key: Any) -> None:
        """Numbers can be chosen to have equal hashes, and tuples can be too large to hash: few, and small ones."""
        if isinstance(key, Inert | Name):
            return
        self._odd_keys += 1
        if self._odd_keys > MAX_ODD_KEYS:
            raise CheckpointError(f"{self._where}: more than {MAX_ODD_KEYS:,} keys that are no texts")
        pending, parts = [key], 0
        while pending:
            part = pending.pop()
            parts += 1
            if type(part) is tuple and len(part) <= _MAX_KEY_PARTS:
                pending.extend(part)
                part = None
            plain = part is None or type(part) in (str, bytes, int, float, bool) or isinstance(part, Inert | Name)
            if not plain or parts > _MAX_KEY_PARTS:
                raise CheckpointError(f"{self._where}: a {type(key).__name__} as a key, expected a short plain value")

    # --- names and calls -----------------------------------------------------------------------------------------

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise CheckpointError(f"{self._where}: the pickle names something that is no text")
        self._push(self._lookup(Name(module, name)), 120)

    def _reduce(self, function: Any, arguments: Any) -> None:
        if type(arguments) is not tuple:
            raise CheckpointError(f"{self._where}: a call with {type(arguments).__name__} for arguments")
        self._push(self._call(function, arguments), 120)

    def _new(self, named: int) -> None:
        items = [self._stack.pop() for _ in range(named)]
        self._reduce(items[-1], items[-2])

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # a state dict has `_metadata`, which is not kept
            raise CheckpointError(f"{self._where}: the pickle sets attributes of {shown(target)}; refused")

    def _instance(self, arguments: list[Any]) -> None:
        self._reduce(arguments[0], tuple(arguments[1:]))


def _quoted(machine: Machine) -> str:
    text = machine._line()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise ValueError("a text without quotes")
    return codecs.escape_decode(text[1:-1].encode("latin1"))[0].decode("latin1")


def _latin(machine: Machine, size: int) -> str:
    return machine._bytes(size).decode("latin1")


def _old_name(machine: Machine) -> Name:
    return Name(machine._line(), machine._line())


def _stack_name(machine: Machine) -> None:
    name, module = machine._stack.pop(), machine._stack.pop()
    machine._name(module, name)


def _old_instance(machine: Machine) -> None:
    name = _old_name(machine)
    machine._reduce(machine._lookup(name), tuple(machine._since_mark()))


def _dict_of(machine: Machine) -> None:
    items = machine._since_mark()
    machine._push({}, 80)
    machine._set_items(items)


def _float(machine: Machine) -> None:
    machine._push(float(machine._line()), 40)


def _reduce(machine: Machine) -> None:
    arguments = machine._stack.pop()
    machine._reduce(machine._stack.pop(), arguments)


_STEPS: dict[bytes, Callable[[Machine], Any]] = {
    b"\x80": lambda m: m._take(1),  # PROTO
    b"\x95": lambda m: m._take(8),  # FRAME
    b"(": Machine._mark,
    b"0": Machine._pop,
    b"1": Machine._since_mark,
    b"2": lambda m: m._push(m._stack[-1]),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"I": lambda m: m._push(m._decimal(), 64),
    b"L": lambda m: m._push(m._decimal(), 64),
    b"J": lambda m: m._push(m._long(4), 48),
    b"K": lambda m: m._push(m._byte()),
    b"M": lambda m: m._push(m._number(2), 48),
    b"\x8a": lambda m: m._push(m._long(m._byte()), 64),
    b"\x8b": lambda m: m._push(m._long(m._number(4)), 64),
    b"F": _float,
    b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0], 40),
    b"S": lambda m: m._push(_quoted(m), 2 * _MAX_LINE),
    b"T": lambda m: m._push(_latin(m, m._long(4))),
    b"U": lambda m: m._push(_latin(m, m._byte())),
    b"V": lambda m: m._push(m._line().encode("latin1").decode("raw-unicode-escape"), 4 * _MAX_LINE),
    b"X": lambda m: m._push(m._text(m._number(4))),
    b"\x8c": lambda m: m._push(m._text(m._byte())),
    b"\x8d": lambda m: m._push(m._text(m._number(8))),
    b"B": lambda m: m._push(m._bytes(m._number(4))),
    b"C": lambda m: m._push(m._bytes(m._byte())),
    b"\x8e": lambda m: m._push(m._bytes(m._number(8))),
    b"\x96": lambda m: m._push(m._bytes(m._number(8))),
    b"]": lambda m: m._push([], 80),
    b"a": lambda m: m._extend([m._stack.pop()]),
    b"e": lambda m: m._extend(m._since_mark()),
    b"l": lambda m: m._push(items := m._since_mark(), 80 + 8 * len(items)),
    b")": lambda m: m._push(()),
    b"t": lambda m: m._tuple(m._since_mark()),
    b"\x85": lambda m: m._tuple_of(1),
    b"\x86": lambda m: m._tuple_of(2),
    b"\x87": lambda m: m._tuple_of(3),
    b"}": lambda m: m._push({}, 80),
    b"d": _dict_of,
    b"s": lambda m: m._set_items([m._stack.pop(), m._stack.pop()][::-1]),
    b"u": lambda m: m._set_items(m._since_mark()),
    b"\x8f": lambda m: m.make_set([]),
    b"\x90": lambda m: m.check_items(m._since_mark()),
    b"\x91": lambda m: m.make_set(m._since_mark()),
    b"g": lambda m: m._get(m._decimal()),
    b"h": lambda m: m._get(m._byte()),
    b"j": lambda m: m._get(m._number(4)),
    b"p": lambda m: m._put(m._decimal()),
    b"q": lambda m: m._put(m._byte()),
    b"r": lambda m: m._put(m._number(4)),
    b"\x94": lambda m: m._put(len(m._memo)),
    b"c": lambda m: m._push(m._lookup(_old_name(m)), 120),
    b"\x93": _stack_name,
    b"R": _reduce,
    b"b": Machine._build,
    b"i": _old_instance,
    b"o": lambda m: m._instance(m._since_mark()),
    b"\x81": lambda m: m._new(2),
    b"\x92": lambda m: m._new(3),
    b"Q": lambda m: m._push(m._persistent(m._stack.pop()), 120),
}
_OPCODES = [_STEPS.get(bytes([code])) for code in range(256)]
