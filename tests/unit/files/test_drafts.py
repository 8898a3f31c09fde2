"""All or nothing, whatever ends the work: an error, Ctrl-C, `kill -9`, a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.files import WriteError, drafts, new_file, new_folder, write_text
from minitron.files.targets import TargetError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(target: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(target, overwrite=overwrite) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "file").write_text(text)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as draft:
        (draft / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"
    assert names(tmp_path / "a") == ["out"]


def fail_after_writing(path: Path, error: type[BaseException]) -> None:
    path.write_text("new")
    raise error


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("before", [True, False])
def test_any_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException], before: bool) -> None:
    folder, file = tmp_path / "x" / "folder", tmp_path / "x" / "file"
    if before:
        make(folder, "old")
        write_text(file, "old")
    for context, part in ((new_folder(folder, overwrite=True), "file"), (new_file(file, overwrite=True), "")):
        with pytest.raises(error), context as draft:
            fail_after_writing(draft / part, error)
    if before:
        assert names(tmp_path / "x") == ["file", "folder"]
        assert (file.read_text(), (folder / "sub" / "file").read_text()) == ("old", "old")
    else:
        assert names(tmp_path) == []  # not even the folder above


def test_an_error_in_the_swap_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", "old")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(WriteError):
        make(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from minitron.files import new_folder
from minitron.files import drafts
if sys.argv[2] == "in the swap":
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with new_folder(Path(sys.argv[1]), overwrite=True) as draft:
    (draft / "file").write_text("new")
    if sys.argv[2] == "alive":
        print("ready", flush=True)
        sys.stdin.read()
    if sys.argv[2] == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "in the swap"])
def test_what_a_killed_process_left_goes_with_the_next_draft(tmp_path: Path, moment: str) -> None:
    make(tmp_path / "out", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), moment], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert any(name.endswith(".partial") for name in names(tmp_path))
    write_text(tmp_path / "another", "x")
    assert names(tmp_path) == ["another", "out"]
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


def test_the_draft_of_a_living_process_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), "alive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        write_text(tmp_path / "another", "x")
        assert len(names(tmp_path)) == 2
        process.communicate("")
    assert process.returncode == 0
    assert names(tmp_path) == ["another", "out"]


def test_an_empty_draft_folder_of_nobody_goes(tmp_path: Path) -> None:
    (tmp_path / ".out.12345678.partial").mkdir()
    drafts.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_of_the_users_that_only_looks_like_a_draft_stays(tmp_path: Path) -> None:
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial" / "notes.txt").write_text("x")
    (tmp_path / ".download.partial").write_text("x")
    write_text(tmp_path / "a", "x")
    assert names(tmp_path) == [".download.partial", ".mine.partial", "a"]


def test_links_to_targets_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    make(tmp_path / "link", "first")
    make(tmp_path / "link", "second", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "sub" / "file").read_text() == "second"
    assert names(tmp_path / "disk") == ["out"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="is there already"), new_folder(tmp_path / "out"):
        make(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "theirs"
    with pytest.raises(TargetError, match=r"notes\.txt was not written by minitron"), new_folder(
        tmp_path / "out", overwrite=True
    ):  # fmt: skip
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_errors_speak_of_the_target_and_not_of_the_draft(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: bad$") as caught, new_folder(tmp_path / "out") as draft:
        raise ValueError(f"{draft / 'config.json'}: bad")
    assert str(caught.value) == f"{tmp_path / 'out' / 'config.json'}: bad"
    with pytest.raises(FileNotFoundError) as missing, new_folder(tmp_path / "out") as draft:
        (draft / "nothing").read_text()
    assert str(tmp_path / "out" / "nothing") in str(missing.value)


def test_long_and_odd_names(tmp_path: Path) -> None:
    for name in ("x" * 255, "ä" * 120, "-rf", " ", "a\nb", ".hidden", os.fsdecode(b"\xff\xfe")):
        write_text(tmp_path / name, "x")
        make(tmp_path / "folder" / name, "x")
        make(tmp_path / "folder" / name, "y", overwrite=True)
        assert (tmp_path / name).read_text() == "x"
        assert (tmp_path / "folder" / name / "sub" / "file").read_text() == "y"


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "out", "x")
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
