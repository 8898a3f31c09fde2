"""Does this package work with the newest, and with the oldest allowed, release of each of its dependencies?

    python scripts/compat.py                  both environments and all stages (about an hour on two cores)
    python scripts/compat.py newest --quick   a few minutes' part of it, as `make test` runs it

Makes an environment in .venv-compat/NAME which sees the packages of the running one (torch among them, which is left as
it is) behind its own, installs the direct dependencies of pyproject.toml in it, newest or oldest, and runs the stages
there, each in a process of its own. Counts of each stage go to .venv-compat/NAME/results.json as they come; a stage
that has them for the same versions and the same sources is not run again. The stage "upstream" runs transformers' own
common model tests against our classes and against upstream's (see tests/compat/upstream_common.py); they come from the
source distribution of the installed release, are unpacked into .venv-compat and are never committed.
Ends with 1 if a test failed; with 0 and a sentence if --quick finds no package index.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-compat"
EXTRAS = ("train", "eval", "plot", "gguf", "nemo")
HELD = ("torch",)
"""Left as the running environment has them: another build of torch takes several gigabytes."""

STAGES = {
    "contract": ["tests/contract"],
    "generation": [
        "tests/unit/engine/test_engine_batches.py",
        "tests/unit/test_text_stream.py",
        "tests/unit/test_masks.py",
        "tests/unit/test_release_check.py",
        "tests/unit/test_framework.py",
        "tests/unit/test_cache.py",
    ],
    "training": ["tests/unit/train/test_loop.py", "tests/unit/ops/test_packed_attention.py"],
    "conversion": [
        "tests/unit/test_convert.py",
        "tests/parity/test_upstream_checkpoints.py",
        "tests/parity/test_gguf.py",
    ],
    "upstream": ["tests/compat/upstream_common.py"],
}
UNREACHABLE = ("(from versions: none)", "NewConnectionError", "ConnectTimeout", "Could not fetch URL")
"""What pip says where it finds no package index."""

SUBJECTS = ("minitron", "upstream")
QUICK = {
    "quick": [
        "tests/unit/test_framework.py",
        "tests/unit/test_release_check.py",
        "tests/contract/test_model_rows.py",
        "tests/unit/test_masks.py::test_generate_reads_a_mask_in_every_form",
    ]
}


def main() -> int:
    """Run what the command line asks for and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="newest|oldest", help="environments; both if none is named")
    parser.add_argument("--quick", action="store_true", help="a few tests only; no package index is not a failure")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this stage; may be repeated")
    arguments = parser.parse_args()
    names = arguments.names or ["newest", "oldest"]
    if set(names) - {"newest", "oldest"}:
        parser.error(f"{', '.join(names)}: an environment is newest or oldest")
    stages = QUICK if arguments.quick else {name: STAGES[name] for name in arguments.stage or STAGES}
    failed = False
    for name in names:
        try:
            python = environment(name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: pip could not install it:\n{error.stderr.strip()[-800:]}")
            if not (arguments.quick and any(sign in error.stderr for sign in UNREACHABLE)):
                return 1
            print(f"{name}: skipped, for the package index cannot be reached")
            continue
        results = [run_stage(name, python, stage, paths) for stage, paths in stages.items()]
        print_table(name, python, dict(zip(stages, results, strict=True)))
        failed |= any(counts["failed"] for counts in results)
    return int(failed)


# --- environments --------------------------------------------------------------------------------------------------


def environment(name: str) -> Path:
    """The Python of an environment with the newest or the oldest dependencies; made or brought up to date."""
    folder = HOME / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "running_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    wanted = [f"{held}=={version(held).split('+')[0]}" for held in HELD]
    wanted += [requirement(text, name) for text in direct_dependencies()]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", "--upgrade"]
    subprocess.run([*pip, *wanted, "parameterized"], check=True, capture_output=True, text=True)
    return python


def direct_dependencies() -> list[str]:
    """Requirements of the package and of its extras, as pyproject.toml has them, without those that are held."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    return [text for text in dict.fromkeys(project["dependencies"] + extras) if bare(text) not in HELD]


def bare(text: str) -> str:
    """The name alone: `transformers>=5.18,<6` gives `transformers`."""
    return re.split(r"[<>=!~\[; ]", text, maxsplit=1)[0]


def requirement(text: str, name: str) -> str:
    """What pip is asked for: the range as it is, of which it takes the newest; or the range's lower bound alone."""
    if name == "newest":
        return text
    bound = re.search(r">=\s*([\w.]+)", text)
    if bound is None:
        raise ValueError(f"pyproject.toml: {text} has no lower bound (>=)")
    return f"{bare(text)}=={bound[1]}"


def versions(python: Path) -> dict[str, str]:
    """What is installed in an environment, of the direct dependencies."""
    names = [*HELD, *map(bare, direct_dependencies())]
    code = "import json, sys; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    return json.loads(subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True).stdout)


# --- stages ----------------------------------------------------------------------------------------------------------


def run_stage(name: str, python: Path, stage: str, paths: list[str]) -> dict[str, int]:
    """Counts of passed, failed (errors too) and skipped tests, from the file if nothing has changed since."""
    file = HOME / name / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    state = hashlib.sha256(json.dumps([versions(python), paths, sources()], sort_keys=True).encode()).hexdigest()[:16]
    found = results.get(stage)
    if found is not None and found["state"] == state:
        return found["counts"]
    if stage == "upstream":
        counts = compared(*(run_pytest(name, python, f"{stage}-{subject}", paths, subject) for subject in SUBJECTS))
    else:
        counts = counted(run_pytest(name, python, stage, paths))
    results[stage] = {"state": state, "counts": counts, "versions": versions(python)}
    file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return counts


def run_pytest(name: str, python: Path, stage: str, paths: list[str], subject: str = "") -> dict[str, str]:
    """Run tests in an environment: each test's name with "passed", "failed" or "skipped"."""
    report = HOME / name / f"{stage}.xml"
    report.unlink(missing_ok=True)
    more = {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    if subject:
        more |= {"MINITRON_SUBJECT": subject, "MINITRON_UPSTREAM_TESTS": str(upstream_tests(python))}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
    if subject:
        command += ["-o", "addopts=", "--noconftest"]  # their marks, and their reasons to skip, are not ours
    with (HOME / name / f"{stage}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        return {"pytest itself": "failed"}
    outcomes = {}
    for test in ElementTree.parse(report).iter("testcase"):
        marks = {part.tag for part in test}
        outcome = "failed" if marks & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
        outcomes[f"{test.get('classname')}::{test.get('name')}"] = outcome
    return outcomes or {"pytest itself": "failed"}


def counted(outcomes: dict[str, str]) -> dict[str, int]:
    """How many tests had each outcome."""
    return {kind: sum(outcome == kind for outcome in outcomes.values()) for kind in ("passed", "failed", "skipped")}


def compared(ours: dict[str, str], upstreams: dict[str, str]) -> dict[str, int]:
    """Counts of our classes, in which only a test that upstream's classes pass counts as failed."""
    failed = [test for test, outcome in ours.items() if outcome == "failed"]
    regressions = [test for test in failed if upstreams.get(test, "passed") == "passed"]
    for test in regressions:
        print(f"fails, and upstream passes it: {test}", flush=True)
    counts = counted(ours) | {"failed": len(regressions), "failed by upstream too": len(failed) - len(regressions)}
    return counts | {"passed by upstream": counted(upstreams)["passed"]}


def sources() -> str:
    """A hash of the package and its tests."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def upstream_tests(python: Path) -> Path:
    """The tests of the installed release of transformers, from its source distribution."""
    release = versions(python)["transformers"]
    folder = HOME / f"transformers-{release}"
    if not (folder / "tests").is_dir():
        download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", HOME]
        subprocess.run([python, "-m", "pip", *download, f"transformers=={release}"], check=True)
        with tarfile.open(HOME / f"transformers-{release}.tar.gz") as archive:
            wanted = [m for m in archive.getmembers() if m.name.split("/")[1:2] == ["tests"]]
            archive.extractall(HOME, members=wanted, filter="data")
    return folder


def print_table(name: str, python: Path, results: dict[str, dict[str, int]]) -> None:
    """The versions, and a row for each stage, as docs/compatibility.md shows them."""
    print(f"\n{name}: " + ", ".join(f"{package} {release}" for package, release in versions(python).items()))
    print("\n| stage | passed | failed | skipped | |\n| --- | ---: | ---: | ---: | --- |")
    for stage, counts in results.items():
        passed, failed, skipped, *more = counts.items()
        cells = [stage, passed[1], failed[1], skipped[1], ", ".join(f"{count} {kind}" for kind, count in more)]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
