"""`convert` and `prune` delete nothing but what they wrote, and whatever stops them leaves what was there before."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_samples import random_state, save_reference, tiny_config
from typer.testing import CliRunner

import minitron.convert as conversion
from minitron.cli import app
from minitron.convert import ConversionOptions, convert

runner = CliRunner()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config()
    return save_reference(tmp_path / "parent" / "model", config, random_state(config))


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder by its content, links as what they point at."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refused(folder: Path, *arguments: object) -> str:
    """The sentence of a command that must change nothing in `folder`."""
    before = content(folder)
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert content(folder) == before
    return result.stderr


def test_a_target_never_deletes_its_source(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parent" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "above").symlink_to(tmp_path / "parent")
    monkeypatch.chdir(model)
    for source, target in (
        (model, model.parent), (model, tmp_path), (model, model), (model, tmp_path / "link"),
        (model, tmp_path / "above"), (tmp_path / "link", model), (tmp_path / "link", model.parent),
        (tmp_path / "above" / "model", model.parent),
        (".", ".."), (".", "."), ("../model", "../../parent"), (model, model / "out"), (model, model / "out.gguf"),
        (".", "../model/new/out.nemo"), (model, tmp_path / "link" / "out"),
    ):  # fmt: skip
        text = refused(tmp_path, "convert", source, target, "--overwrite")
        assert "which is read" in text or "are the same" in text, (source, target, text)
    for target in (model.parent, model, model / "out", tmp_path):
        text = refused(tmp_path, "prune", model, target, "--keep", "ffn=48", "--overwrite", "--no-measure")
        assert "which is read" in text or "are the same" in text, (target, text)


def test_a_file_that_is_another_name_of_the_source(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "a.gguf")
    os.link(tmp_path / "a.gguf", tmp_path / "b.gguf")
    (tmp_path / "c.gguf").symlink_to("a.gguf")
    for target in ("a.gguf", "b.gguf", "c.gguf"):
        assert "are the same" in refused(tmp_path, "convert", tmp_path / "a.gguf", tmp_path / target, "--overwrite")


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", "weights/extra.pt"])
def test_files_that_no_conversion_wrote_are_kept(model: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    convert(model, out)
    convert(model, out, ConversionOptions(overwrite=True))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    assert f"{name} was not written by minitron" in refused(tmp_path, "convert", model, out, "--overwrite")
    shutil.copytree(model, tmp_path / "download")
    assert "were not written by minitron" in refused(tmp_path, "convert", model, tmp_path / "download", "--overwrite")


def test_weights_that_were_trained_on_in_the_target_are_kept(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out")
    config = tiny_config()
    save_reference(tmp_path / "out", config, random_state(config, seed=1))
    text = refused(tmp_path, "convert", model, tmp_path / "out", "--overwrite")
    assert "after minitron wrote" in text


def test_a_source_in_the_hubs_cache(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    assert convert(snapshot, tmp_path / "out").verified
    for target in (blobs, tmp_path / "hub", snapshot, snapshot / "out"):
        refused(tmp_path, "convert", snapshot, target, "--overwrite")


@pytest.mark.parametrize(
    ("moment", "to", "error"),
    [
        ("_write", "hf", NotImplementedError),
        ("_write", "nemo", RuntimeError),
        ("_write", "gguf", MemoryError),
        ("verify", "hf", RuntimeError),
        ("verify", "nemo2", KeyboardInterrupt),
        ("verify", "gguf", RuntimeError),
    ],
)
def test_any_exception_leaves_what_was_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, to: str, error: type[BaseException]
) -> None:
    out = tmp_path / "out"
    convert(model, out, ConversionOptions(to=to, verify=False))
    before = content(tmp_path)
    done = getattr(conversion, moment)

    def stop(*arguments: object) -> None:
        done(*arguments)
        raise error("stopped")

    monkeypatch.setattr(conversion, moment, stop)
    for target in (out, tmp_path / "new" / "out"):
        with pytest.raises(error):
            convert(model, target, ConversionOptions(to=to, overwrite=True))
        assert content(tmp_path) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "parent"]


KILLED = """
import os, signal, sys
from pathlib import Path
from minitron.convert import ConversionOptions, convert
def stop(done):
    os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), ConversionOptions(overwrite=True), progress=stop)
"""


def test_what_a_killed_conversion_left_goes_with_the_next(model: Path, tmp_path: Path) -> None:
    import gzip

    convert(model, tmp_path / "a.nemo")
    with gzip.open(tmp_path / "old.nemo", "wb") as file:  # as NeMo before 1.7 wrote them; inflated while it is read
        file.write((tmp_path / "a.nemo").read_bytes())
    convert(model, tmp_path / "out")
    before = content(tmp_path)
    for target in ("out", "b.gguf"):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "old.nemo"), str(tmp_path / target)]
        assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert any("inflated" in name for name in content(tmp_path))
    convert(model, tmp_path / "c.gguf")
    (tmp_path / "c.gguf").unlink()
    assert content(tmp_path) == before


@pytest.mark.parametrize("to", ["hf", "nemo", "nemo2", "gguf"])
def test_a_full_disk_is_a_sentence(model: Path, tmp_path: Path, to: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = runner.invoke(app, ["convert", str(model), str(tmp_path / "out"), "--to", to])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'out'}")
    assert "cannot be written: File too large" in line
    assert "bytes are free" in line
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


@pytest.mark.parametrize("name", ["b.bin", "b.safetensors", "b.pt", "b.json", "b.ggml", "b.onnx", "b.tar.gz", "b.foo"])
def test_names_that_mean_another_format(model: Path, tmp_path: Path, name: str) -> None:
    text = refused(tmp_path, "convert", model, tmp_path / name)
    assert (
        "is not a format that can be written; expected a folder's name (Hugging Face), NAME.gguf or NAME.nemo" in text
    )


def test_names_that_mean_a_folder(model: Path, tmp_path: Path) -> None:
    for name in ("b", "Minitron-4.19B", "v1.0", "b.2"):
        convert(model, tmp_path / name, ConversionOptions(verify=False))
        assert (tmp_path / name / "config.json").is_file()
    convert(model, tmp_path / "b.final", ConversionOptions(to="hf", verify=False))
    assert "and --to is hf" in refused(tmp_path, "convert", model, tmp_path / "b.gguf", "--to", "hf")
    assert "is a folder, and a file" in refused(tmp_path, "convert", model, tmp_path / "b", "--to", "gguf")
    assert "is the suffix of a file" in refused(tmp_path, "prune", model, tmp_path / "b.gguf", "--keep", "ffn=48")


def test_a_folder_in_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file, and a folder" in refused(tmp_path, "convert", model, tmp_path / "file", "--overwrite")
    assert "file is a file, so nothing" in refused(tmp_path, "convert", model, tmp_path / "file" / "b.gguf")


def test_targets_that_are_links_stay_links(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for _ in range(2):
        convert(model, tmp_path / "out", ConversionOptions(overwrite=True))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "config.json").is_file()
