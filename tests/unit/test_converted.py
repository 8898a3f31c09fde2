"""Checkpoints of every format as model arguments: converted once, anew when they change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from text_checkpoint import make_text_checkpoint
from typer.testing import CliRunner

import minitron
from minitron.cli import app
from minitron.convert import ConversionOptions, convert
from minitron.loading import checkpoint_folder

PROMPT = "the cat sat on"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    return make_text_checkpoint(tmp_path / "tiny")


def logits(model: object) -> torch.Tensor:
    loaded = minitron.load(model)  # type: ignore[arg-type]
    with torch.no_grad():
        return loaded.model(**loaded.tokenizer(PROMPT, return_tensors="pt")).logits


@pytest.mark.parametrize("name", ["m.gguf", "m.nemo", "m-nemo2"])
def test_other_formats_load_as_the_checkpoint_that_they_were_made_from(name: str, checkpoint: Path) -> None:
    target = checkpoint.parent / name
    convert(checkpoint, target, ConversionOptions(to="nemo2" if name == "m-nemo2" else None))
    torch.testing.assert_close(logits(target), logits(checkpoint))


def test_a_checkpoint_is_converted_once_and_again_when_it_has_changed(checkpoint: Path) -> None:
    file = checkpoint.parent / "m.gguf"
    convert(checkpoint, file, ConversionOptions())
    said: list[str] = []
    first = checkpoint_folder(file, said.append)
    assert checkpoint_folder(file, said.append) == first
    assert len(said) == 1
    before = file.stat()
    other = minitron.NemotronForCausalLM.from_pretrained(checkpoint)
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(checkpoint)
    convert(checkpoint, file, ConversionOptions(overwrite=True))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert checkpoint_folder(file, said.append) != first
    torch.testing.assert_close(logits(file), logits(checkpoint))


def test_verbs_take_a_gguf_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = checkpoint.parent / "m.gguf"
    convert(checkpoint, file, ConversionOptions())
    words = ["generate", "-p", PROMPT, "--temperature", "0", "-n", "5"]
    texts = []
    for model in (checkpoint, file):
        done = CliRunner().invoke(app, [words[0], str(model), *words[1:]])
        assert done.exit_code == 0, done.output
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    done = CliRunner().invoke(app, ["inspect", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert '"weights": "complete"' in done.stdout


def test_a_config_of_any_name_is_inspected_itself(checkpoint: Path) -> None:
    other = minitron.NemotronConfig.from_pretrained(checkpoint)
    other.num_hidden_layers = 7
    other.to_json_file(checkpoint / "wider.json")
    done = CliRunner().invoke(app, ["inspect", str(checkpoint / "wider.json")])
    assert done.exit_code == 0, done.output
    assert "7 layers" in done.stdout
