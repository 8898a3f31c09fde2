"""Programs written by a model, run where they can do no harm: no network, no files of the machine but read-only ones
of the interpreter, limits on time, memory, processes and file sizes.

Linux namespaces do the isolation (`sandbox_child.py`). Where the system grants none, nothing is run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store")
_STARTING_SECONDS = 20


class SandboxError(OSError):
    """The machine offers no way to isolate a program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 3.0
    """From its first line to its last; the value of the HumanEval paper's own harness."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    processes: int = 4
    """Processes and threads at a time."""
    file_bytes: int = 8 << 20
    """Of each file."""
    disk_bytes: int = 32 << 20
    """Of the temporary folder, which is in memory."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    passed: bool
    """It ran to its last line without an exception."""
    reason: str
    """"passed", "timed out ...", "failed: AssertionError: ...", "killed by SIGSEGV", ..."""


def run_program(source: str, limits: Limits = Limits()) -> Verdict:
    """Run Python source in the sandbox.

    Raises:
        SandboxError: this machine cannot isolate it, so it was not run.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"programs written by a model are only run on Linux; this is {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="minitron-sandbox-") as root:
        job = {"program": source, "root": root, "visible": _visible_folders(), **vars(limits)}
        output = _communicate(json.dumps(job), limits.seconds + _STARTING_SECONDS)
    if output is None:
        return Verdict(False, f"timed out after {limits.seconds} seconds")
    try:
        result = json.loads(output)
    except json.JSONDecodeError:
        return Verdict(False, "ended the sandbox itself")
    if "error" in result:
        raise SandboxError(
            f"this machine grants no isolation for programs written by a model ({result['error']}); "
            f"it takes Linux 5.12 or newer with user namespaces"
        )
    return Verdict(result["passed"], result["reason"])


def _visible_folders() -> list[str]:
    """What an interpreter needs to run."""
    stdlib = os.path.dirname(os.path.realpath(os.__file__))
    own = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), stdlib]
    # Folders above others come first, so that what lies in one of them is not mounted twice.
    return sorted({path for path in (*_SYSTEM_FOLDERS, *own) if os.path.isdir(path) and path != "/"})


def _communicate(job: str, seconds: float) -> bytes | None:
    """What the child writes; None where it did not end in time."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        return child.communicate(job.encode(), timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # stage 1 dies with its parent, and the rest with stage 1
            child.wait()
