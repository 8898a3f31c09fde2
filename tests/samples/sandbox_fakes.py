"""Wrong programs that pass where the tests run in their own process, each with such tests."""

from __future__ import annotations

from typing import NamedTuple

EQUAL = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
NEAR = "def check(candidate):\n    assert abs(candidate(2) - 4) < 1e-6\n    assert abs(candidate(3) - 9) < 1e-6\n"
ALL = "def check(candidate):\n    assert all(candidate(x) == x * x for x in range(10))\n"
LENGTH = "def check(candidate):\n    assert len(candidate(3)) == 9\n"
SORTED = "def check(candidate):\n    assert sorted(candidate(3)) == [3, 9]\n"
TUPLE = "def check(candidate):\n    assert tuple(candidate(3)) == (3, 9)\n"
TRUE = "def check(candidate):\n    assert candidate(2) is True or candidate(2) == 4\n"
BY_TABLE = "def check(candidate):\n    for x, y in [[2, 4], [3, 9], [4, 16]]:\n        assert candidate(x) == y\n"
BY_HELPER = """
def square(x):
    return x * x
def check(candidate):
    assert candidate(1) == square(1)
    assert candidate(3) == square(3)
"""
BY_MATH = """
def check(candidate):
    import math
    assert math.isclose(candidate(2), 4)
"""
BY_LATE_IMPORT = """
def check(candidate):
    import colorsys
    assert colorsys.rgb_to_hls(candidate(2), 0, 0) == colorsys.rgb_to_hls(4, 0, 0)
"""
BY_CHANCE = """
def check(candidate):
    import random
    for _ in range(20):
        x = random.randint(1, 1000)
        assert candidate(x) == x * x
"""


class Fake(NamedTuple):
    """A wrong program, tests, and functions of the prompt that both have."""

    program: str
    tests: str = EQUAL
    prompt: str = ""


def _alike(base: str, value: str = "") -> str:
    return f"""
class Alike({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __hash__(self): return 0
    def __sub__(self, other): return self
    def __abs__(self): return self
    def __bool__(self): return True
def f(x): return Alike({value})
"""


FAKES = {
    "an object equal to everything": Fake(_alike("object")),
    "an object as near as is asked": Fake(_alike("object"), NEAR),
    "an object that is always true": Fake(_alike("object"), ALL),
    "an int equal to everything": Fake(_alike("int", "7")),
    "a float equal to everything": Fake(_alike("float", "'nan'"), NEAR),
    "a str equal to everything": Fake(_alike("str", "'x'")),
    "a list equal to everything": Fake(_alike("list", "[1]")),
    "a dict equal to everything": Fake(_alike("dict", "{1: 1}")),
    "a Fraction equal to everything": Fake("import fractions" + _alike("fractions.Fraction", "7"), NEAR),
    "a class whose metaclass compares": Fake(
        "class Kind(type):\n    __eq__ = lambda self, other: True\n    __hash__ = None\n"
        "class Value(metaclass=Kind): pass\ndef f(x): return Value"
    ),
    "an object that says it is an int": Fake(
        "class Alike:\n    __eq__ = lambda self, other: True\n    __class__ = property(lambda self: int)\n"
        "def f(x): return Alike()"
    ),
    "a length of its own": Fake("class Sized:\n    __len__ = lambda self: 9\ndef f(x): return Sized()", LENGTH),
    "items equal to everything": Fake(
        _alike("object") + "def f(x): return [Alike(), Alike()]",
        "def check(candidate):\n    assert candidate(3) == [3, 9]\n",
    ),
    "keys equal to everything": Fake(
        "class Key(int):\n    __eq__ = lambda self, other: True\n    __hash__ = int.__hash__\n"
        "def f(x): return {Key(2**61 - 1 + 3): 9}",
        "def check(candidate):\n    assert candidate(3) == {3: 9}\n",
    ),
    "an iterator that looks at who reads it": Fake(
        "import sys\ndef f(x):\n    frame = sys._getframe(1)\n"
        "    yield from (c for c in [k for k in frame.f_code.co_consts if type(k) is tuple][-1])",
        TUPLE,
    ),
    "abs is patched": Fake("import builtins\nbuiltins.abs = lambda value: 0\ndef f(x): return 0", NEAR),
    "all is patched": Fake("import builtins\nbuiltins.all = lambda values: True\ndef f(x): return 0", ALL),
    "len is patched": Fake("import builtins\nbuiltins.len = lambda value: 9\ndef f(x): return []", LENGTH),
    "sorted is a name of the program's": Fake("def sorted(values): return [3, 9]\ndef f(x): return []", SORTED),
    "tuple is a name of the program's": Fake("def tuple(values): return (3, 9)\ndef f(x): return []", TUPLE),
    "range is a name of the program's": Fake("def range(*_): return ()\ndef f(x): return 0", ALL),
    "__builtins__ are others": Fake(
        "import builtins\ng = globals()\ng['__builtins__'] = vars(builtins)\nvars(builtins)['abs'] = lambda v: 0\n"
        "def f(x): return 0",
        NEAR,
    ),
    "the math module is another": Fake(
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda a, b: True)\ndef f(x): return 0",
        BY_MATH,
    ),
    "a function of the math module is another": Fake(
        "import math\nmath.isclose = lambda a, b: True\ndef f(x): return 0", BY_MATH
    ),
    "an import hook gives another module": Fake(
        "import sys, types, importlib.machinery\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'colorsys': return importlib.machinery.ModuleSpec(name, self)\n"
        "    def create_module(self, spec): return types.SimpleNamespace(rgb_to_hls=lambda *c: 0)\n"
        "    def exec_module(self, module): pass\n"
        "sys.meta_path.insert(0, Finder())\ndef f(x): return 0",
        BY_LATE_IMPORT,
    ),
    "an audit hook changes what is imported": Fake(
        "import sys, builtins\n"
        "def hook(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'colorsys':\n"
        "        import types; sys.modules['colorsys'] = types.SimpleNamespace(rgb_to_hls=lambda *c: 0)\n"
        "        builtins.__import__ = lambda *_, **__: sys.modules['colorsys']\n"
        "sys.addaudithook(hook)\ndef f(x):\n    return 0\n"
        "import colorsys; colorsys.rgb_to_hls = lambda *c: 0",
        BY_LATE_IMPORT,
    ),
    "random numbers are known": Fake("import random\nrandom.randint = lambda a, b: 0\ndef f(x): return 0", BY_CHANCE),
    "the prompt's helper is another": Fake(
        "def turn(text): return text\ndef f(text): return text",
        "def check(candidate):\n    assert candidate(turn('abc')) == 'abc'\n",
        "def turn(text):\n    return text[::-1]\ndef f(text):\n    '''Turn back.'''\n",
    ),
    "a decorator stands before the tests": Fake("def f(x): return 0\n@lambda check: lambda candidate: None"),
    "a frame's globals are changed": Fake(
        "import sys\ndef f(x):\n    sys._getframe(1).f_globals['square'] = lambda x: 1\n    return 1", BY_HELPER
    ),
    "a traceback's frame is changed": Fake(
        "def f(x):\n    try: raise ValueError\n    except ValueError as error:\n"
        "        error.__traceback__.tb_frame.f_back.f_globals['square'] = lambda x: 1\n    return 1",
        BY_HELPER,
    ),
    "a thread replaces a test": Fake(
        "import sys, threading\n"
        "def replace():\n"
        "    for frame in sys._current_frames().values():\n"
        "        while frame:\n"
        "            if 'square' in frame.f_globals: frame.f_globals['square'] = lambda x: 1\n"
        "            frame = frame.f_back\n"
        "def f(x):\n    thread = threading.Thread(target=replace); thread.start(); thread.join()\n    return 1",
        BY_HELPER,
    ),
    "a signal handler replaces a test": Fake(
        "import signal\n"
        "def handler(number, frame):\n"
        "    while frame:\n"
        "        if 'square' in frame.f_globals: frame.f_globals['square'] = lambda x: 1\n"
        "        frame = frame.f_back\n"
        "signal.signal(signal.SIGUSR1, handler)\n"
        "def f(x):\n    signal.raise_signal(signal.SIGUSR1)\n    return 1",
        BY_HELPER,
    ),
    "a trace function goes past the tests": Fake(
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe(1)\n"
        "    def trace(frame, event, argument):\n"
        "        if event == 'line': frame.f_lineno = last; frame.f_trace = None\n"
        "        return trace\n"
        "    last = max(line for *_, line in frame.f_code.co_lines() if line)\n"
        "    frame.f_trace = trace; sys.settrace(lambda *_: None)\n"
        "    return 4",
        "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n    return None\n",
    ),
    "a test's code is replaced by way of gc": Fake(
        "import gc, types\ndef one(x): return 1\n"
        "def f(x):\n"
        "    for found in gc.get_objects():\n"
        "        if isinstance(found, types.FunctionType) and found.__name__ == 'square':\n"
        "            found.__code__ = one.__code__\n"
        "    return 1",
        BY_HELPER,
    ),
    "expected values are found by gc": Fake(
        "import gc\n"
        "def f(x):\n"
        "    for found in gc.get_objects():\n"
        "        if type(found) is list and len(found) == 2 and found[0] == x and type(found[1]) is int:\n"
        "            return found[1]",
        BY_TABLE,
    ),
    "expected values are read in the code of the tests": Fake(
        "import sys\ndef f(x):\n    known = sys._getframe(1).f_code.co_consts\n    return known[known.index(x) + 1]"
    ),
    "numbers are overwritten in memory": Fake(
        "import ctypes\nctypes.c_uint32.from_address(id(204) + 24).value = 203\ndef f(x): return 203",
        "def check(candidate):\n    assert candidate(2) == 204\n",
    ),
    "an argument is changed to what is returned": Fake(
        "def f(numbers):\n    numbers.clear()\n    return []",
        "def check(candidate):\n    numbers = [3, 1, 2]\n    assert candidate(numbers) == sorted(numbers)\n",
    ),
    "an iteration is ended early": Fake(
        "def f(x): raise StopIteration",
        "def check(candidate):\n    assert all(map(lambda pair: candidate(pair[0]) == pair[1], [(2, 4), (3, 9)]))\n",
    ),
}
