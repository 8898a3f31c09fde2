"""Run the tests whose oracles are too heavy, or too choosy, for the environment of `make test`.

    python scripts/oracles.py          what `make oracles` runs; three minutes on two busy cores

Today that is megatron-core: it names dependencies that need a GPU, so it is installed without them into
`.venv-oracles`, where only its own tests look for it. Ends with 1 and one sentence if the package index has none of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-oracles"
MEGATRON = "megatron-core==0.16.1"
TESTS = ["tests/parity/test_megatron_core.py"]


def install(requirement: str, folder: Path) -> str | None:
    """Install one package without its dependencies into a folder of its own, whole or not at all.

    Returns:
        None if it is there, otherwise the last line that pip wrote.
    """
    if folder.is_dir():
        return None
    draft = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--target", str(draft), requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(draft, ignore_errors=True)
        return (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
    draft.rename(folder)
    return None


def main(home: Path = HOME) -> int:
    """Install what is missing and run the tests; 0 if all of them passed."""
    folder = home / MEGATRON.replace("==", "-")
    home.mkdir(exist_ok=True)
    problem = install(MEGATRON, folder)
    if problem:
        print(f"{MEGATRON} cannot be installed here, so its tests did not run: {problem}")
        return 1
    environment = {**os.environ, "MINITRON_MEGATRON": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
