"""Nothing that is read, and nothing that somebody else wrote, is ever in the way of a target."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from minitron.files import RECORD, TargetError, check_target, new_folder, require_apart, require_folder_name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "parent" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def refusal(target: Path, *sources: Path, folder: bool = True, overwrite: bool = True) -> str:
    with pytest.raises(TargetError) as caught:
        check_target(target, folder=folder, overwrite=overwrite, sources=sources)
    return str(caught.value)


def test_targets_that_hold_their_source(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "parent")
    (tmp_path / "elsewhere").mkdir()
    for target in (
        model.parent, Path("parent"), Path("parent/model/.."), Path("elsewhere/../parent"), tmp_path / "link",
        tmp_path, Path(),
    ):  # fmt: skip
        for source in (model, Path("parent/model"), tmp_path / "link" / "model", model / "config.json"):
            assert "which is read; choose another target" in refusal(target, source), (target, source)


def test_targets_inside_their_source(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    (model / "sub").mkdir()
    for target in (model / "b.gguf", model / "sub" / "b.gguf", tmp_path / "link" / "new" / "b.gguf"):
        assert "lies inside" in refusal(target, model, folder=False)
        assert "lies inside" in refusal(target, tmp_path / "link", folder=False)
    assert "lies inside" in refusal(model / "out", model)


def test_the_same_by_whatever_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    for target in (model, tmp_path / "link", model / ".." / "model"):
        assert "source and target are the same" in refusal(target, model)
        assert "source and target are the same" in refusal(target, tmp_path / "link")
    os.link(model / "model.safetensors", tmp_path / "b.gguf")
    assert "the same" in refusal(tmp_path / "b.gguf", model / "model.safetensors", folder=False)
    assert "b.gguf: is" in refusal(tmp_path / "b.gguf", model, folder=False)


def test_a_source_that_is_a_link_in_the_target(model: Path, tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as draft:
        (draft / "here").symlink_to(model)
    for source in (tmp_path / "out" / "here", tmp_path / "out" / "here" / "config.json"):
        assert "holds" in refusal(tmp_path / "out", source)


def test_a_source_of_links_as_the_hubs_cache_has_them(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    check_target(tmp_path / "out", folder=True, sources=[snapshot])
    check_target(tmp_path / "hub" / "out", folder=True, sources=[snapshot])
    assert "which is read" in refusal(blobs, snapshot)
    assert "which is read" in refusal(tmp_path / "hub", snapshot)
    assert "which is read" in refusal(blobs / "config.json", snapshot, folder=False)


def test_neighbours_are_apart(model: Path, tmp_path: Path) -> None:
    for target in (model.with_name("model2"), model.with_name("mod"), tmp_path / "a" / "b", Path("new")):
        check_target(target, folder=True, overwrite=True, sources=[model])
    check_target(tmp_path / "b.gguf", folder=False, sources=[tmp_path / "a.gguf"])
    require_apart(model, [])


# --- what others wrote ---------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    with new_folder(tmp_path / "ours") as draft:
        (draft / "config.json").write_text("{}")
        (draft / "weights").write_bytes(bytes(4 << 20))
        (draft / "sub").mkdir()
        (draft / "sub" / "vocabulary").write_text("v")
    return tmp_path / "ours"


def test_our_own_folder_is_replaced_and_so_is_its_copy(ours: Path, tmp_path: Path) -> None:
    check_target(ours, folder=True, overwrite=True)
    shutil.copytree(ours, tmp_path / "copy", copy_function=shutil.copy2)  # with its times
    check_target(tmp_path / "copy", folder=True, overwrite=True)
    (ours / "config.json").unlink()
    check_target(ours, folder=True, overwrite=True)
    assert "is there already; pass --overwrite" in refusal(ours, overwrite=False)


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "sub/more", ".hidden", "weights.bak"])
def test_files_of_others_are_kept(ours: Path, name: str) -> None:
    (ours / name).parent.mkdir(exist_ok=True)
    (ours / name).write_text("mine")
    assert f"{name} was not written by minitron" in refusal(ours)


def test_one_edited_value_of_a_large_file_is_seen(ours: Path) -> None:
    with (ours / "weights").open("r+b") as file:
        file.seek((4 << 20) // 8)  # between two samples
        file.write(b"x")
    assert "weights was changed after minitron wrote" in refusal(ours)


def test_edited_files_are_kept(ours: Path) -> None:
    (ours / "config.json").write_text('{"rope_theta": 1}')
    with (ours / "weights").open("r+b") as file:
        file.seek(1 << 21)
        file.write(b"trained" * 100_000)
    text = refusal(ours)
    assert "config.json, weights were changed after minitron wrote" in text or (
        "weights, config.json were changed" in text
    )


def test_links_and_pipes_are_of_others(ours: Path, tmp_path: Path) -> None:
    (ours / "config.json").unlink()
    (ours / "config.json").symlink_to(tmp_path)
    assert "config.json was changed" in refusal(ours)
    (ours / "config.json").unlink()
    os.mkfifo(ours / "pipe")
    assert "pipe was not written" in refusal(ours)


def test_a_folder_without_our_record(ours: Path, model: Path) -> None:
    assert "config.json, model.safetensors were not written by minitron" in refusal(model)
    for text in ("", "[]", '{"version": 9, "files": {}}', '{"version": 1, "files": 3}'):
        (ours / RECORD).write_text(text)
        assert "were not written by minitron" in refusal(ours)


def test_folders_that_somebody_stands_in(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "below")
    assert "is the current folder" in refusal(Path())
    assert "is the current folder" in refusal(tmp_path / "empty" / "below", overwrite=False)
    monkeypatch.chdir(ours / "sub")
    assert "holds the current folder" in refusal(ours)
    assert "holds the current folder" in refusal(Path(".."))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(ours / "sub"))
    assert "holds the home folder" in refusal(ours)
    assert "is the home folder" in refusal(ours / "sub")
    with pytest.raises(TargetError, match=r"holds the current folder|disk is mounted"):
        check_target(Path("/"), folder=True, overwrite=True)


def test_files_and_folders_in_the_place_of_each_other(ours: Path, tmp_path: Path) -> None:
    assert "is a folder, and a file is to be written" in refusal(ours, folder=False)
    assert "is a file, and a folder is to be written" in refusal(ours / "weights")
    assert "weights is a file, so nothing can be written below it" in refusal(ours / "weights" / "a" / "b")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "lead in a circle" in refusal(tmp_path / "circle")


def test_names_of_files_for_folders(tmp_path: Path) -> None:
    for name in ("b.bin", "b.GGUF", "model.safetensors", "out.json", "v1.tar.gz"):
        with pytest.raises(TargetError, match="is the suffix of a file, and a folder is to be written"):
            require_folder_name(tmp_path / name)
    for name in ("b", "llama-3.1-8B", "minitron-v1.0", "run.2", ".hidden", "my.model-a"):
        require_folder_name(tmp_path / name)
    (tmp_path / "b.bin").mkdir()
    require_folder_name(tmp_path / "b.bin")
