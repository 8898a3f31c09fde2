"""Build a release, and show that it is one: reproducible, complete, small, and working without the checkout.

    python scripts/release.py [--no-trial] [--dependencies SITE_PACKAGES]

Builds wheel and sdist twice from copies of the tracked files and compares them byte by byte; builds the wheel from the
sdist and compares that; runs `twine check`; refuses a wheel of more than 40 MB and a citation file that does not
validate; installs the wheel alone into an empty environment and runs every verb there (`scripts/try_verbs.py`). The
files are left in `dist/`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
MOST_BYTES = 40_000_000
EXTRAS = "train,eval,curate,serve,tune"
"""Extras that some verbs need."""
TOOLS = ("build>=1.2", "hatchling>=1.27", "twine>=6", "cffconvert>=2")
DATE = "1577836800"
"""Of the files in the archives, in seconds: 2020-01-01, as hatchling uses."""


def main() -> int:
    """Build, compare, try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-trial", action="store_true", help="do not install the wheel and run the verbs")
    parser.add_argument("--dependencies", type=Path, help="take the dependencies from this site-packages folder")
    parser.add_argument("--tools", type=Path, help="a Python that has build, hatchling, twine and cffconvert")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = given.tools.absolute() if given.tools else tools(folder / "tools")
        first, second = (build(python, copy_of_tracked(folder / name), folder / f"dist-{name}") for name in "ab")
        compare(first, second, "a second build")
        unpacked = unpack(next(path for path in first if path.name.endswith(".tar.gz")), folder / "sdist")
        again = [path for path in build(python, unpacked, folder / "dist-sdist") if path.suffix == ".whl"]
        compare([path for path in first if path.suffix == ".whl"], again, "the wheel that the sdist builds")
        subprocess.run([python, "-m", "twine", "check", "--strict", *first], check=True)
        subprocess.run([python.parent / "cffconvert", "--validate", "-i", ROOT / "CITATION.cff"], check=True)
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        for path in first:
            shutil.copy2(path, DIST)
        wheel = next(DIST.glob("*.whl"))
        if wheel.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{wheel.name} has {wheel.stat().st_size / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f}")
        for path in sorted(DIST.iterdir()):
            print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}  {path.stat().st_size / 1e6:.1f} MB")
        if not given.no_trial:
            program = install(wheel, folder / "empty", given.dependencies)
            return subprocess.run([sys.executable, ROOT / "scripts/try_verbs.py", program], check=False).returncode
    return 0


def tools(folder: Path) -> Path:
    """An environment with the programs that build and check."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *TOOLS], check=True)
    return python


def copy_of_tracked(folder: Path) -> Path:
    """The files that git tracks, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, folder / name
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        else:
            shutil.copyfile(source, target)
            target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
    return folder


def build(python: Path, source: Path, target: Path) -> list[Path]:
    """Wheel and sdist of a folder, sorted by name."""
    command = [python, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", target, source]
    subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": DATE}, stdout=subprocess.DEVNULL, check=True)
    return sorted(target.iterdir())


def compare(these: list[Path], those: list[Path], what: str) -> None:
    """Refuse files that are not byte by byte the same."""
    if [path.name for path in these] != [path.name for path in those]:
        raise SystemExit(f"{what} has other files: {[path.name for path in those]}")
    for one, other in zip(these, those, strict=True):
        if one.read_bytes() != other.read_bytes():
            raise SystemExit(f"{what} differs: {one.name}")
    print(f"{what} is the same: {', '.join(path.name for path in these)}")


def unpack(archive: Path, folder: Path) -> Path:
    """The one folder of an sdist."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return next(folder.iterdir())


def install(wheel: Path, folder: Path, dependencies: Path | None) -> Path:
    """The command of the wheel in an empty environment."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    if dependencies is None:
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", f"{wheel}[{EXTRAS}]"], check=True)
    else:
        subprocess.run([*pip, "--no-deps", wheel], check=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "dependencies.pth").write_text(f"{dependencies.absolute()}\n", encoding="utf-8")
    return folder / "bin" / "minitron"


if __name__ == "__main__":
    sys.exit(main())
