"""`tests/unit` mirrors `src/minitron`: whoever looks for the tests of a module finds them by its path."""

from __future__ import annotations

from pathlib import Path

import minitron

PACKAGE = Path(minitron.__file__).parent
UNIT = Path(__file__).parent / "unit"
ROOMS = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py")} | {Path()}


def homes(name: str) -> set[Path]:
    """The folders where `test_NAME.py` may stand; empty if no module and no room has that name.

    A test named after a module stands in the module's folder, one named after a room in that room. A name that begins
    with a room (`cli_prune`, `engine_batches`) belongs to the room as well.
    """
    modules = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob(f"{name}.py")}
    rooms = {room for room in ROOMS if room.name and (name == room.name or name.startswith(f"{room.name}_"))}
    return modules | (rooms if not modules or name in {room.name for room in ROOMS} else set())


def misplaced(folder: Path) -> list[str]:
    """What does not stand where it should, of the tests in a folder."""
    wrong = []
    for path in sorted(folder.rglob("*")):
        at = path.relative_to(folder)
        if path.is_dir():
            if path.name != "__pycache__" and at not in ROOMS:
                wrong.append(f"{at}/: there is no such folder in src/minitron")
        elif path.suffix == ".py" and (allowed := homes(path.stem.removeprefix("test_"))) and at.parent not in allowed:
            wrong.append(f"{at}: belongs to {' or '.join(f'{home}/' for home in sorted(allowed))}")
    return wrong


def test_unit_tests_stand_where_their_modules_do() -> None:
    assert misplaced(UNIT) == []


def test_a_misplaced_test_would_be_noticed(tmp_path: Path) -> None:
    for name in ("prune/test_kl.py", "ops/test_kl.py", "test_cli_prune.py", "kernels/test_speed.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert misplaced(tmp_path) == [
        "kernels/: there is no such folder in src/minitron",
        "prune/test_kl.py: belongs to ops/",
        "test_cli_prune.py: belongs to cli/",
    ]
