"""How the user calls this program, so that hints can be copied into the shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

NAME = "minitron"


def program() -> str:
    """The words before the verb: `minitron` where the shell finds this installation by that name.

    Otherwise the script as it was called, such as `.venv/bin/minitron`, or `python -m minitron`.
    """
    called = Path(sys.argv[0])
    on_path = shutil.which(NAME)
    if on_path is not None and _is_ours(Path(on_path), called):
        return NAME
    if called.stem == NAME and called.is_file():
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(_python())} -m {NAME}"


def _is_ours(script: Path, called: Path) -> bool:
    """Whether `script` is what was called, or is installed beside the Python that runs."""
    if called.is_file() and script.samefile(called):
        return True
    return script.parent.resolve() == Path(sysconfig.get_path("scripts")).resolve()


def _python() -> str:
    """`python` or `python3` where the shell finds this Python by it, else its path, relative to here if that is below.

    Links are not followed: the Python of a virtual environment is a link to one that does not know the environment.
    """
    here = os.path.abspath(sys.executable)
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found is not None and os.path.abspath(found) == here:
            return name
    below = os.path.relpath(here)
    return here if below.startswith(os.pardir) or os.sep not in below else below
