"""The README's commands, run as they stand, its links, and the bundled models that it names."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import minitron
from minitron import NemotronConfig
from minitron.assets import stated_losses
from minitron.cli import app

ROOT = Path(__file__).parents[2]
OWN_FOLDERS = ("benchmarks", "docs", "examples", "recipes", "studies", "tests")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


# Those that name a checkpoint of the reader's own have tests elsewhere.
EXAMPLES = [
    commands
    for block in blocks("console")
    if (commands := [line for line in block.splitlines() if line.startswith("minitron ") and "nemotron-4b" not in line])
]


@pytest.mark.parametrize("commands", EXAMPLES, ids=lambda commands: commands[0][:40])
def test_example(commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a block, in their order, in a folder with the repository's examples and nothing else."""
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
        assert done.stdout.strip()


def test_there_is_an_example_for_every_job() -> None:
    verbs = {shlex.split(command)[1] for commands in EXAMPLES for command in commands}
    assert {"generate", "prune", "distill", "eval", "convert"} <= verbs


def test_the_picture_is_drawn_from_the_committed_measurements() -> None:
    path = ROOT / "scripts" / "readme_picture.py"
    spec = importlib.util.spec_from_file_location("readme_picture", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PICTURE.relative_to(ROOT).as_posix() in README
    assert script.PICTURE.read_text(encoding="utf-8") == script.picture(), "run python scripts/readme_picture.py"


def test_the_tree_names_every_folder() -> None:
    """Each line's paths exist; no folder of the package, and none of the repository's own, is missing."""
    lines = blocks("text")[0].splitlines()
    assert lines[0] == "src/minitron/"
    inside = [
        word for line in lines if line.startswith("  ") for word in line.split()[:2] if re.search(r"\.py$|/$", word)
    ]
    beside = [line.split()[0] for line in lines[1:] if not line.startswith("  ")]
    package = ROOT / "src" / "minitron"
    assert all((package / name).exists() for name in inside), inside
    assert {f"{path.parent.name}/" for path in package.glob("*/__init__.py")} <= set(inside)
    assert {f"{name}/" for name in OWN_FOLDERS} == set(beside)


@pytest.mark.parametrize("page", [README, *(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://|#|mailto:|reference/)([^)#\s]+)", page):  # reference/ is generated
        assert (ROOT / target).exists() or (ROOT / "docs" / target).exists(), target


def test_bundled_models_are_small_and_have_cards() -> None:
    folders = [minitron.bundled_model(), minitron.bundled_model("half")]
    assert sum((folder / "model.safetensors").stat().st_size for folder in folders) <= 32e6
    for folder, made_by in zip(folders, ("minitron train", "minitron compress"), strict=True):
        card = (folder / "README.md").read_text(encoding="utf-8")
        for word in ("licence", "nats per token", "bits per byte", made_by, "African Storybook"):
            assert word.lower() in card.lower(), word
        assert all(f"| {text} | {loss:.3f} |" in card for text, loss in stated_losses(folder).items())


def test_the_bundled_child_is_half_of_its_parent() -> None:
    parent, child = (NemotronConfig.from_pretrained(minitron.bundled_model(name)) for name in ("default", "half"))
    share = child.num_non_embedding_parameters() / parent.num_non_embedding_parameters()
    assert 0.45 <= share <= 0.52
    with pytest.raises(ValueError, match=r"name is 'third'; it must be one of default, half"):
        minitron.bundled_model("third")  # type: ignore[arg-type]
