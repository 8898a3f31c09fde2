"""Wrong programs that try to pass. None may, whatever it does to its process."""

from __future__ import annotations

import json

import pytest
from sandbox_fakes import ALL, BY_TABLE, FAKES, NEAR, Fake

from minitron.evaluate.sandbox import Checks, Limits, SandboxError, Verdict, require_isolation, run_tests

LIMITS = Limits(seconds=4.0, memory_bytes=512 << 20)
ONE = "def check(candidate):\n    assert candidate(2) == 4\n"

# Ends, descriptors, other processes, and the messages to the judge: call 0 is the program's start.
PROTOCOL = """
import json, os, struct
def send(body, length=None):
    os.write(4, struct.pack('>I', len(body) if length is None else length) + body)
def answer(call, value):
    send(json.dumps({'call': call, 'value': value}).encode())
"""
OTHERS = {
    "sys.exit": Fake("import sys\nsys.exit(0)"),
    "os._exit": Fake("import os\nos._exit(0)"),
    "sys.exit when asked": Fake("import sys\ndef f(x): sys.exit(0)"),
    "os._exit when asked": Fake("import os\ndef f(x): os._exit(0)"),
    "a handler of the end": Fake(
        PROTOCOL + "import atexit, sys\natexit.register(lambda: send(b'{\"passed\": true}'))\ndef f(x): sys.exit(0)"
    ),
    "a signal that ends": Fake("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGTERM)"),
    "signals to everybody": Fake("import os\ndef f(x): os.kill(-1, 9); os.kill(1, 9)"),
    "a verdict in every descriptor": Fake(
        "import os\n"
        "def f(x):\n"
        "    for number in range(64):\n"
        '        for text in (b\'{"passed": true, "reason": "passed"}\', b\'passed\'):\n'
        "            try: os.write(number, text)\n"
        "            except OSError: pass\n"
        "    os._exit(0)"
    ),
    "a verdict in every descriptor of every process": Fake(
        "import os, glob\n"
        "def f(x):\n"
        "    for path in glob.glob('/proc/[0-9]*/fd/*'):\n"
        '        try: os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b\'{"passed": true, "reason": "passed"}\')\n'
        "        except OSError: pass\n"
        "    os._exit(0)"
    ),
    "a child that goes on": Fake(
        PROTOCOL
        + "def f(x):\n    if os.fork(): os._exit(0)\n    os.setsid()\n    send(b'{\"passed\": true}')\n    return 0"
    ),
    "memory of process 1": Fake("def f(x):\n    open('/proc/1/mem', 'r+b').write(b'passed')\n    return 0"),
    "ptrace": Fake("import ctypes, os\ndef f(x):\n    return ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) + 5"),
    "planted bytecode": Fake(
        "import os, sys\n"
        "name = '/__pycache__/fractions.' + sys.implementation.cache_tag + '.pyc'\n"
        "open(os.path.dirname(os.__file__) + name, 'wb').write(b'')\n"
        "def f(x): return 0"
    ),
    "json is patched": Fake(
        'import json\njson.dumps = lambda *_, **__: \'{"passed": true, "reason": "passed"}\'\ndef f(x): return 0'
    ),
    "os.write is patched": Fake(
        "import os\nwrite, forged = os.write, b'\\0\\0\\0\\x10{\"passed\": true}'\n"
        "os.write = lambda to, data: write(4, forged) and len(data)\n"
        "def f(x): return 0"
    ),
    "the harness's modules are patched": Fake(
        "import sys\n"
        "for module in list(sys.modules.values()):\n"
        "    for name in ('judge', 'decode', 'encode', 'receive', 'check', '_candidate'):\n"
        "        if hasattr(module, name): setattr(module, name, lambda *_, **__: {'passed': True})\n"
        "def f(x): return 0"
    ),
    "frames hold a token": Fake(
        "import sys, os\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    for name in ('token', 'answer', 'write', 'found'):\n"
        "        for number in range(64):\n"
        "            try: os.write(number, (str(frame.f_locals[name]) + ' passed').encode())\n"
        "            except (OSError, KeyError): pass\n"
        "    frame = frame.f_back\n"
        "os._exit(0)"
    ),
    "the environment and the command line hold the tests": Fake(
        "import os, re\n"
        "def f(x):\n"
        "    text = repr(dict(os.environ))\n"
        "    for path in ('self/cmdline', '1/cmdline', 'self/environ', '1/environ', 'self/fd/0'):\n"
        "        try: text += open('/proc/' + path, errors='replace').read(100000)\n"
        "        except OSError: pass\n"
        "    found = re.search(r'candidate\\(%d\\) == (\\d+)' % x, text)\n"
        "    return int(found[1]) if found else 0"
    ),
    "memory of its own holds the tests": Fake(
        "import gc, re\n"
        "def f(x):\n"
        "    for found in gc.get_objects():\n"
        "        for text in (found.values() if type(found) is dict else ()):\n"
        "            hit = re.search(r'assert candidate\\(%d\\) == (\\d+)' % x, text) if type(text) is str else None\n"
        "            if hit: return int(hit[1])"
    ),
    "the answer to another call": Fake(
        PROTOCOL
        + "def f(x):\n    answer(x - 2, ['int', '4'])\n    answer(x, ['int', '4'])\n    answer(1, ['int', '9'])",
        ONE,
    ),
    "a verdict instead of an answer": Fake(
        PROTOCOL + 'def f(x): send(b\'{"call": 1, "passed": true, "value": true}\')'
    ),
    "a type that has no name": Fake(PROTOCOL + "def f(x): answer(1, ['builtins.eval', '4'])", ONE),
    "a pickle": Fake(
        "import pickle\nclass Alike:\n    def __reduce__(self): return eval, ('4',)\n"
        "    def __eq__(self, other): return True\ndef f(x): return Alike()",
        ONE,
    ),
    "text that is no message": Fake("import os\nos.write(4, b'passed\\n' * 100)\ndef f(x): return 0"),
    "a message without an end": Fake(PROTOCOL + "send(b'{}', 1 << 24)\nos._exit(0)"),
    "an endless message": Fake(PROTOCOL + "send(b'{}', (1 << 32) - 1)\nwhile True: os.write(4, bytes(65536))"),
    "a deep message": Fake(
        PROTOCOL + "def f(x): send(b'{\"call\": 1, \"value\": ' + b'[' * 100000 + b']' * 100000 + b'}')"
    ),
    "a deep value": Fake(
        PROTOCOL + "def f(x): send(b'{\"call\": 1, \"value\": ' + b'[\"list\", [' * 5000 + b']]' * 5000 + b'}')"
    ),
    "a list that holds itself": Fake("def f(x):\n    x = []\n    x.append(x)\n    return x"),
    "a fraction by zero": Fake(PROTOCOL + "def f(x): answer(1, ['fraction', [['int', '4'], ['int', '0']]])", NEAR),
    "an unhashable key": Fake(PROTOCOL + "def f(x): answer(1, ['dict', [['tuple', [['list', []], None]]]])"),
    "numbers of JSON": Fake(PROTOCOL + "def f(x): answer(1, float('nan'))", NEAR),
    "an integer of many digits": Fake("def f(x): return 1 << 40_000_000"),
    "an endless iterator": Fake("import itertools\ndef f(x): return itertools.count()"),
    "a module as value": Fake("import math\ndef f(x): return math"),
    "an error that ends the tests": Fake("def f(x): raise SystemExit(0)", ALL),
    "an error of a name that is none": Fake("def f(x): raise type('eval', (Exception,), {})"),
    "a generator's end": Fake("def f(x): raise GeneratorExit", BY_TABLE),
}


def isolation_is_there() -> bool:
    try:
        require_isolation()
    except SandboxError:
        return False
    return True


pytestmark = pytest.mark.skipif(not isolation_is_there(), reason="this machine grants no namespaces")


def judged(fake: Fake) -> Verdict:
    return run_tests(fake.prompt + fake.program, Checks("f", fake.tests, fake.prompt), LIMITS)


@pytest.fixture(scope="module")
def passed_alone() -> list[str]:
    """Fakes that pass where their tests run in the same process. Each is a child of one program in the sandbox."""
    whole = [f"{fake.prompt}{fake.program}\n{fake.tests}\ncheck(f)" for fake in FAKES.values()]
    program = (
        f"import os\nPROGRAMS = {whole!r}\n"
        "def outcome(number):\n"
        "    if (pid := os.fork()) == 0:\n"
        "        exec(PROGRAMS[number], {'__name__': 'whole'})\n"
        "        os._exit(7)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
    )
    tests = (
        f"def check(candidate):\n    raise ValueError([candidate(n) for n in range({len(whole)})])\n"  # for its reason
    )
    reason = run_tests(program, Checks("outcome", tests), LIMITS).reason
    statuses = json.loads(reason.removeprefix("failed: ValueError: "))
    return [name for name, status in zip(FAKES, statuses, strict=True) if status == 7]


@pytest.mark.parametrize("name", FAKES)
def test_a_fake_passes_only_where_it_is_its_own_judge(name: str, passed_alone: list[str]) -> None:
    assert name in passed_alone
    assert not judged(FAKES[name]).passed


@pytest.mark.parametrize("name", OTHERS)
def test_a_program_that_forges_its_end_or_its_answers_fails(name: str) -> None:
    assert not judged(OTHERS[name]).passed
