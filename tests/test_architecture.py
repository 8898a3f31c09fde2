"""The shape of the package: sizes of files and functions, layers, no import cycle, and light imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitron

PACKAGE = Path(minitron.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 80

# A file imports files of its own layer or of a lower one. A new part of the package gets its place here.
LAYERS = {
    0: [
        *("characters", "config", "dtypes", "engine_choices", "families", "files", "framework", "load_meter"),
        *("memory", "presets", "quiet", "rope_parameters", "shapes", "submodules", "supported", "tested"),
        *("version", "world"),
    ],
    1: ["assets", "chat", "data", "ops", "pages", "template_child", "templates", "tokenizer", "written_code"],
    2: [
        *(
            "cache",
            "checkpoint",
            "engine_hook",
            "family_models",
            "finite",
            "head_pruning",
            "heads",
            "locate",
            "masks",
            "model",
            "outputs",
        ),
        "sampling_parameters",
    ],
    3: [
        *(
            "bench",
            "convert",
            "converted",
            "engine",
            "light",
            "loading",
            "prune",
            "registration",
            "release_check",
            "stop_texts",
            "text_stream",
        ),
        "train",
    ],
    4: ["compress", "curate", "distill", "doctor", "evaluate", "report", "serve", "tune"],
    5: ["__main__", "cli"],
}
LAYER_OF = {part: layer for layer, parts in LAYERS.items() for part in parts}


def module_of(path: Path) -> str:
    """`checkpoint/hf.py` as `checkpoint.hf`, `ops/__init__.py` as `ops`, the package's own as ``."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}

ALLOWED_CYCLES: dict[tuple[str, str], str] = {}
"""(importing module, imported module): why this one import may close a cycle."""


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of this package that a file imports, wherever in the file, with the line."""
    package = list(path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "minitron"]
            found = [name.removeprefix("minitron").lstrip(".") for name in names]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "minitron"):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            stem = (node.module or "") if node.level else (node.module or "").removeprefix("minitron").lstrip(".")
            prefix = ".".join([*base, *([stem] if stem else [])])
            candidates = [f"{prefix}.{alias.name}".lstrip(".") for alias in node.names]
            found = [name if name in MODULES else prefix for name in candidates]
        else:
            continue
        for name in found:
            yield name, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # The body: a verb of the command line has a line of signature for each of its options.
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or first.lineno) - first.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_the_same_or_a_lower_layer(path: Path) -> None:
    here = module_of(path).split(".")[0]
    if not here:
        return  # the package's own __init__ names everything, lazily
    assert here in LAYER_OF, f"{here} has no layer in this test's table"
    for module, line in imports_of(path):
        there = module.split(".")[0]
        if there:
            assert LAYER_OF[there] <= LAYER_OF[here], f"line {line}: {here} must not import {there}"


def test_the_checkpoint_layer_never_imports_the_model() -> None:
    for path in FILES:
        if module_of(path).startswith("checkpoint"):
            imported = {module.split(".")[0] for module, _ in imports_of(path)}
            assert not imported & {"model", "heads", "cache", "outputs"}, path


def test_no_import_cycle() -> None:
    """Imports inside functions and for type checkers count: a file that needs another one to be understood comes after
    it. `ALLOWED_CYCLES` lists the exceptions."""
    graph = {
        module: {
            found
            for found, _ in imports_of(path)
            if found in MODULES and found != module and (module, found) not in ALLOWED_CYCLES
        }
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                walk(other, (*above, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_upstreams_implementation_is_never_imported() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.startswith("transformers.models.nemotron") for name in names), path


def test_there_is_no_file_for_everything() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "common_utils", "helpers", "misc")]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


HEAVY = "[m for m in ('torch', 'transformers', 'numpy', 'safetensors', 'tokenizers') if m in sys.modules]"


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports a test file by its name alone: of two files of one name, the second is not collected."""
    by_name: dict[str, list[str]] = {}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        if path.name != "conftest.py":
            by_name.setdefault(path.name, []).append(str(path))
    assert {name: paths for name, paths in by_name.items() if len(paths) > 1} == {}


def test_importing_the_package_is_light() -> None:
    done = run(f"import sys, minitron; minitron.__version__; dir(minitron); print({HEAVY})")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_of_the_command_line_is_light_and_quick() -> None:
    code = f"""
import sys
from minitron.cli import main
try:
    sys.argv = ["minitron", "--help"]
    main()
except SystemExit as end:
    assert not end.code, end.code
print({HEAVY})
"""
    times = []
    for _ in range(3):
        start = sum(os.times()[2:4])  # processor time of children: another program's load does not count
        done = run(code)
        times.append(sum(os.times()[2:4]) - start)
        assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert min(times) < 2.0, times  # half a second on an idle machine


def test_every_public_name_exists() -> None:
    for name in minitron.__all__:
        assert getattr(minitron, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has: "):
        minitron.nothing  # noqa: B018
