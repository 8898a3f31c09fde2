"""Does each extra bring what the commands need that ask for it?

    python scripts/try_extras.py dist/minitron-0.2.0-py3-none-any.whl                 all extras
    python scripts/try_extras.py WHEEL gguf nemo                                      some of them
    python scripts/try_extras.py WHEEL --dependencies .venv/lib/python3.11/site-packages --no-plain gguf

The wheel is installed with its own dependencies and no extra into one environment. There, the commands of each extra
must end with a sentence that names it. Then each extra gets an environment of its own, which also sees the packages of
the first one, and there the same commands must work. Extras that need a GPU or a cluster are installed, and what they
bring is imported. Versions are those of constraints.txt. With `--dependencies` the packages of that folder stand for
those of the wheel; since extras may be among them, `--no-plain` leaves out the first part.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

from try_verbs import try_server, write_inputs

ROOT = Path(__file__).parents[1]
TUNING = "train --model bundled --data text.jsonl --steps 1 --batch 2 --sequence 32"
HELLASWAG = {
    "ind": 0, "activity_label": "Sitting", "ctx_a": "The cat sat.", "ctx_b": "then it", "ctx": "The cat sat. then it",
    "endings": ["ran to the sea.", "sat on the mat.", "said hello.", "was a dog."], "label": "1",
}  # fmt: skip
TRIALS: dict[str, tuple[str, ...]] = {
    "train": (f"{TUNING} --tune lora --out runs/lora", f"{TUNING} --optimizer adamw8bit --out runs/8bit"),
    "eval": ("eval bundled --tasks hellaswag --data tasks --limit 2 --shots 0",),
    "curate": ("curate text.jsonl -o clean --format parquet",),
    "serve": ("serve bundled --port 0",),
    "tune": ("finetune bundled --task classify --data rows.jsonl --epochs 1 --batch 4 --tune head --out runs/labels",),
    "plot": ("bench --rounds 1 -n 4 --prompt-tokens 8 --peers none --plot roofline.png",),
    "gguf": ("convert bundled bundled.gguf", "inspect bundled.gguf"),
    "nemo": ("convert bundled bundled.nemo", "inspect bundled.nemo"),
}
"""Commands that an extra is for."""
IMPORTED = {"ray": "ray.data", "gpu": "triton", "docs": "mkdocs, material, mkdocstrings"}
"""What extras bring that cannot be tried here."""
LEFT_OUT = {"dev"}
SECONDS = 1200


def main() -> int:
    """Try the extras; 0 if all work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("extras", nargs="*", help="all if none is given")
    parser.add_argument("--dependencies", type=Path, help="take the wheel's dependencies from this folder")
    parser.add_argument("--no-plain", action="store_true", help="do not try the commands without the extras")
    given = parser.parse_args()
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]) - LEFT_OUT
    if declared != {*TRIALS, *IMPORTED}:
        print(f"extras without a trial, or trials without an extra: {sorted(declared ^ {*TRIALS, *IMPORTED})}")
        return 1
    if wrong := sorted(set(given.extras) - declared):
        parser.error(f"no extra {', '.join(wrong)}; there are {', '.join(sorted(declared))}")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = environment(folder / "plain", given.wheel, "", given.dependencies)
        for extra in given.extras or sorted(declared):
            start = time.perf_counter()
            problem = (
                None if given.no_plain or extra in IMPORTED else without(extra, plain, folder / f"without-{extra}")
            )
            if problem is None:
                own = environment(folder / extra, given.wheel, extra, site_packages(plain))
                problem = with_extra(extra, own, folder / f"with-{extra}")
            print(f"{extra:8} {time.perf_counter() - start:6.1f} s  {problem or 'ok'}", flush=True)
            failed += [extra] if problem else []
    print(f"failed: {', '.join(failed)}" if failed else "all extras work")
    return bool(failed)


def environment(folder: Path, wheel: Path, extra: str, base: Path | None) -> Path:
    """A new environment with the wheel and an extra, which sees the packages of `base` behind its own."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    if base is not None:
        (site_packages(folder) / "base.pth").write_text(f"{base.absolute()}\n", encoding="utf-8")
    without_dependencies = ["--no-deps"] if base is not None and not extra else []
    target = f"{wheel.absolute()}[{extra}]" if extra else str(wheel.absolute())
    subprocess.run([*pip, *without_dependencies, target], check=True, stdout=subprocess.DEVNULL)
    return folder


def site_packages(folder: Path) -> Path:
    """Where an environment's packages are."""
    return next((folder / "lib").glob("python*/site-packages"))


def minitron_in(place: Path) -> list[str]:
    """The command of an environment, which has no script of its own where it sees the wheel in another one."""
    return [str(place / "bin" / "python"), "-m", "minitron"]


def run(command: str, place: Path, work: Path) -> subprocess.CompletedProcess[str]:
    """A command of the installed wheel, in a folder with inputs."""
    if not work.exists():
        work.mkdir()
        write_inputs(work)
        tasks = work / "tasks" / "hellaswag"
        tasks.mkdir(parents=True)
        (tasks / "validation.jsonl").write_text(2 * (json.dumps(HELLASWAG) + "\n"), encoding="utf-8")
    return subprocess.run(
        [*minitron_in(place), *shlex.split(command)], cwd=work, env=variables(work), capture_output=True,
        text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def variables(work: Path) -> dict[str, str]:
    """The environment variables of a command: nothing of the checkout, no network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"HF_HUB_OFFLINE": "1", "MINITRON_CACHE": str(work / "cache")}


def without(extra: str, plain: Path, work: Path) -> str | None:
    """What is wrong with the errors of an extra's commands where it is missing."""
    for command in TRIALS[extra]:
        if command.startswith("inspect"):
            continue
        done = run(command, plain, work)
        if done.returncode == 0:
            return f"works without the extra: {command}"
        if f"minitron[{extra}]" not in done.stderr or "Traceback" in done.stderr:
            return f"{command}: does not name the extra: {done.stderr.strip().splitlines()[-1:]}"
    return None


def with_extra(extra: str, place: Path, work: Path) -> str | None:
    """What went wrong with an extra's commands where it is installed."""
    if extra in IMPORTED:
        done = subprocess.run(
            [place / "bin" / "python", "-c", f"import {IMPORTED[extra]}"], capture_output=True, text=True, check=False
        )
        return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    for command in TRIALS[extra]:
        if extra == "serve":
            run("--help", place, work)
            words = [*minitron_in(place), *shlex.split(command)]
            if problem := try_server("serve", words, str(work), variables(work)):
                return problem
        elif (done := run(command, place, work)).returncode:
            return f"{command}: exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
