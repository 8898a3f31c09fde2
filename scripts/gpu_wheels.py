"""Collect the wheels that a machine with a GPU lacks, for one that has torch with CUDA but no network.

    python scripts/gpu_wheels.py wheels              here, where the package index can be reached
    pip install --no-index --no-deps wheels/*.whl    there
    PYTHONPATH=src python benchmarks/gpu.py          there, in a copy of this repository

Versions are those that are installed here, so both machines need the same version of Python and the same kind of
processor. torch and what comes with it are skipped: there they are a build with CUDA.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

NEEDED = ("minitron", "pytest", "hypothesis", "packaging")
"""What `benchmarks/gpu.py` imports, with what that needs."""
THERE = re.compile(r"torch|triton|pytorch-triton|nvidia-.*|cuda-.*|minitron")
"""Packages that are there already, or travel as the repository."""


def wheels() -> dict[str, str]:
    """Names of packages and their versions."""
    found: dict[str, str] = {}
    waiting, seen = list(NEEDED), set[str]()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen or (THERE.fullmatch(name) and name != "minitron"):
            continue
        seen.add(name)
        if name != "minitron":
            found[name] = metadata.version(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the wheels")
    args = parser.parse_args()
    pinned = [f"{name}=={version}" for name, version in wheels().items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(args.out), *pinned], check=True)
    files = sorted(args.out.glob("*.whl"))
    print(f"{len(files)} wheels, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB, in {args.out}")


if __name__ == "__main__":
    main()
