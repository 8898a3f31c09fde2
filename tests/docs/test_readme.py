"""The README's commands, run as they stand, its links, and the bundled models that it names."""

from __future__ import annotations

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
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


# Those that name a checkpoint of the reader's own have tests elsewhere.
COMMANDS = [
    line
    for block in blocks("console")
    for line in block.splitlines()
    if line.startswith("minitron ") and "nemotron-4b" not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


@pytest.mark.parametrize("page", [README, *(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page):
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
