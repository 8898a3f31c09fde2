"""Files of a checkpoint that are links to elsewhere: their text must not end up in what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_samples import random_state, save_reference, tiny_config
from text_checkpoint import save_byte_tokenizer
from typer.testing import CliRunner

from minitron import load_tokenizer
from minitron.cli import app
from minitron.convert import convert
from minitron.files.links import LinkedFileError

NAMES = ["chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "additional_chat_templates/x.jinja"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config(vocab_size=260, num_hidden_layers=1)
    folder = save_reference(tmp_path / "model", config, random_state(config, torch.bfloat16))
    save_byte_tokenizer(folder)
    (tmp_path / "secret").write_text('{"password": "hunter2"}')
    return folder


def linked(model: Path, name: str, target: Path) -> None:
    place = model / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target)


@pytest.mark.parametrize("name", NAMES)
def test_links_to_elsewhere_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    linked(model, name, tmp_path / "secret")
    with pytest.raises(LinkedFileError, match=rf"{name}: a link to .*secret, outside of the checkpoint"):
        load_tokenizer(model)
    for target in ("out", "out.nemo", "out.gguf"):
        result = CliRunner().invoke(app, ["convert", str(model), str(tmp_path / target)])
        assert result.exit_code == 2, result.output
        assert "outside of the checkpoint" in result.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path.name for path in files if b"hunter2" in path.read_bytes()] == ["secret"]


def test_a_folder_that_is_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("hunter2")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    for read in (load_tokenizer, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(LinkedFileError, match="outside of the checkpoint"):
            read(model)


@pytest.mark.parametrize("through", ["blobs", "own", "folder"])
def test_links_that_stay_inside_are_followed(model: Path, tmp_path: Path, through: str) -> None:
    """Links inside the folder, those of the hub's cache, and a folder that is itself reached by a link."""
    if through == "own":
        (model / "tokenizer.json").rename(model / "real.json")
        linked(model, "tokenizer.json", Path("real.json"))
    elif through == "blobs":
        blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for path in model.iterdir():
            path.rename(blobs / path.name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
        model = snapshot
    else:
        (tmp_path / "link").symlink_to(model)
        model = tmp_path / "link"
    assert load_tokenizer(model)("a").input_ids
    convert(model, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert load_tokenizer(tmp_path / "out")("a").input_ids == load_tokenizer(model)("a").input_ids


def test_a_blob_that_is_a_link_itself(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots"
    blobs.mkdir(parents=True)
    snapshot.mkdir()
    (blobs / "x").symlink_to(tmp_path / "secret")
    model = model.rename(snapshot / "1")
    linked(model, "chat_template.jinja", Path("../../blobs/x"))
    with pytest.raises(LinkedFileError, match="outside of the checkpoint"):
        load_tokenizer(model)
