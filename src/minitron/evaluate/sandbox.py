"""Run programs written by a model where they can do no harm: no network, no files of the machine except the
interpreter's, read-only, and limits on time, memory, processes and file sizes.

Linux namespaces and a filter for system calls isolate them (`sandboxed/main.py`). Where the system allows neither,
nothing is run.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

_START = "import sys; sys.path.insert(0, sys.argv[1]); from sandboxed.main import main; del sys.path[0]; main()"
_SOLUTIONS = re.compile(r"human[-_]?eval.*\.(jsonl?|gz|zst|xz|zip|parquet|arrow|csv)$", re.IGNORECASE)
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store")
_STARTING_SECONDS = 20


class SandboxError(OSError):
    """The machine offers no way to isolate a program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 3.0
    """Time limit of a program; the value of the HumanEval paper's own harness."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    processes: int = 4
    """Processes and threads at a time."""
    file_bytes: int = 8 << 20
    """Of each file."""
    disk_bytes: int = 32 << 20
    """Size of the temporary folder, which is in memory."""


@dataclass(frozen=True)
class Checks:
    """The tests of a problem. A judge runs them, in a sandbox and a process of its own."""

    entry_point: str
    """The function that a program defines."""
    source: str
    """Defines `check(candidate)`, which raises if the function is wrong."""
    prompt: str = ""
    """Source with the functions, other than `entry_point`, that the tests use."""


@dataclass(frozen=True)
class Verdict:
    """How the tests of a program ended."""

    passed: bool
    """The judge reached the end of the tests without an exception."""
    reason: str
    """"passed", "timed out ...", "failed: AssertionError: ...", "killed by SIGSEGV", ... Part of it may come
    from the program."""


def run_tests(program: str, checks: Checks, limits: Limits = Limits()) -> Verdict:
    """Run a program's function through tests: the program in one sandbox, the tests in another.

    Only plain values pass between them (`sandboxed/values.py`). So whatever the program does to its own process can
    change the values that it returns, but never the verdict on them.

    Raises:
        SandboxError: this machine cannot isolate a program, so it was not run.
        ValueError: the tests themselves cannot run.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"programs written by a model are only run on Linux; this is {sys.platform}")
    shared = {"visible": _visible_folders(), **vars(limits), "entry_point": checks.entry_point}
    shared["hidden"] = _solutions()
    judged = shared | {"role": "program", "program": program, "wall_seconds": limits.seconds}
    # RLIMIT_CPU limits the judge's own computing; here it waits for the program, which has a limit.
    judging = shared | {"role": "judge", "tests": checks.source, "prompt": checks.prompt}
    judging["wall_seconds"] = 2 * limits.seconds + _STARTING_SECONDS
    with contextlib.ExitStack() as stack:
        requests, answers = os.pipe(), os.pipe()
        judge = stack.enter_context(_Sandboxed(judging | {"requests": requests[1], "answers": answers[0]}))
        other = stack.enter_context(_Sandboxed(judged | {"requests": requests[0], "answers": answers[1]}))
        found = judge.result(judging["wall_seconds"] + _STARTING_SECONDS)
        ended = found is not None and found.get("ended")
        told = other.result(_STARTING_SECONDS if ended else 0)
    for result in (found, told):
        if result is not None and "error" in result:
            raise SandboxError(
                f"this machine grants no isolation for programs written by a model ({result['error']}); "
                f"it takes Linux 5.14 or newer with user namespaces"
            )
    if found is None:
        return Verdict(False, "the tests ended without a result")
    if found.get("invalid"):
        raise ValueError(f"the tests of {checks.entry_point!r} cannot run: {found['reason']}")
    return Verdict(found["passed"], told["reason"] if ended and told is not None else found["reason"])


def require_isolation() -> None:
    """Check that programs can be run here.

    Raises:
        SandboxError: this machine cannot isolate them.
    """
    run_tests("", Checks("answer", "def check(candidate): pass"))


def _visible_folders() -> list[str]:
    """What an interpreter needs to run."""
    stdlib = os.path.dirname(os.path.realpath(os.__file__))
    prefixes = (sys.prefix, sys.base_prefix)
    own = [*prefixes, *map(os.path.realpath, prefixes), stdlib]
    # Parents come first, so that nothing inside them is mounted twice.
    return sorted({path for path in (*_SYSTEM_FOLDERS, *own) if os.path.isdir(path) and path != "/"})


@functools.cache
def _solutions() -> list[str]:
    """Files of installed packages with the problems and their solutions: a program could look up its answer."""
    prefixes = (sys.prefix, sys.base_prefix, "/usr", "/usr/local")
    found = set()
    for folder in {os.path.realpath(path) for prefix in prefixes for path in glob.glob(f"{prefix}/lib*/python3*")}:
        for where, _, names in os.walk(folder):
            below = where[len(folder) :]
            found.update(os.path.join(where, name) for name in names if _SOLUTIONS.search(f"{below}/{name}"))
    return sorted({os.path.realpath(path) for path in found if os.path.isfile(path)})


class _Sandboxed:
    """A process that `sandboxed/main.py` isolates; it and its children end with the block."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="minitron-sandbox-")
        pipes = (job["requests"], job["answers"])
        self.child = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _START, os.path.dirname(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=pipes,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for pipe in pipes:
            os.close(pipe)
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.child.stdin as file:
            file.write(json.dumps(job | {"root": self.folder.name}).encode())
        self.child.stdin = None

    def __enter__(self) -> _Sandboxed:
        return self

    def result(self, seconds: float) -> dict[str, Any] | None:
        """Its result; None if it did not end in time or reported nothing."""
        try:
            output = self.child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            return None
        return json.loads(output) if output else None

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)  # stage 1 dies with its parent, and the rest with stage 1
        self.child.communicate()
        self.folder.cleanup()
