"""Run the tests whose oracles are too heavy, or too choosy, for the environment of `make test`.

    python scripts/oracles.py          what `make oracles` runs; three minutes on two busy cores

These are megatron-core, which names dependencies that need a GPU and is installed without them, and datatrove and NeMo
Curator, which get an environment of their own with all they want. Both lie in `.venv-oracles`, where only their tests
look for them. Ends with 1 and one sentence if the package index lacks one of them.
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
CURATORS = ["datatrove==0.10.1", "nemo-curator==1.4.0"]
TESTS = {
    "MINITRON_MEGATRON": "tests/parity/test_megatron_core.py",
    "MINITRON_CURATORS": "tests/parity/test_curators.py",
}
"""The variable that says where an oracle is, and its tests."""


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


def install_environment(requirements: list[str], folder: Path) -> str | None:
    """As `install`, of packages with their dependencies into an environment with a Python of its own."""
    if folder.is_dir():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder)
        return (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
    return None


def main(home: Path = HOME) -> int:
    """Install what is missing and run the tests; 0 if all of them passed."""
    folder = home / MEGATRON.replace("==", "-")
    home.mkdir(exist_ok=True)
    problem = install(MEGATRON, folder)
    if problem:
        print(f"{MEGATRON} cannot be installed here, so its tests did not run: {problem}")
        return 1
    curators = home / "curators"
    problem = install_environment(CURATORS, curators)
    if problem:
        print(f"{', '.join(CURATORS)} cannot be installed here, so their tests did not run: {problem}")
        return 1
    environment = {
        **os.environ,
        "MINITRON_MEGATRON": str(folder),
        "MINITRON_CURATORS": str(curators / "bin" / "python"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS.values()]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
