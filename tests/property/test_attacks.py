"""Checkpoints made to hang, crash or exhaust: each ends in a sentence, soon, and in little memory.

The bounds are the ones that docs/security.md states; time is that of the processor, so that a busy machine does not
count, and may be three times as long here.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import random_state, save_reference, tiny_config
from hostile_samples import ATTACKS, raw_tar, tar_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from minitron.checkpoint.hf import config_from
from minitron.checkpoint.json_settings import check_generation_config
from minitron.checkpoint.limits import MIB, CheckpointError
from minitron.checkpoint.pickles import load_inert
from minitron.checkpoint.tar_read import tar_files
from minitron.checkpoint.yaml_values import parse_yaml

pytest.importorskip("yaml")
pytest.importorskip("gguf")

MOST_SECONDS = 6.0
MOST_BYTES = 200 * MIB
PATIENCE = 120.0


class Child:
    """A process that opens checkpoints; a new one if the last one crashed or hung."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def open(self, path: Path) -> dict[str, Any]:
        if self.process is None:
            program = [sys.executable, str(Path(__file__).with_name("attack_child.py"))]
            self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(str(path)) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        answer = process.stdout.readline() if ready else ""
        if answer:
            return json.loads(answer)
        self.close()
        return {"kind": "hung" if not ready else "crashed", "text": "", "seconds": PATIENCE, "bytes": 0}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    found = Child()
    yield found
    found.close()


def test_the_child_opens_a_good_checkpoint(tmp_path: Path, child: Child) -> None:
    good = save_reference(tmp_path / "good", tiny_config(), random_state(tiny_config()))
    assert child.open(good)["kind"] == "opened"


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(tmp_path: Path, child: Child, name: str) -> None:
    path = ATTACKS[name](tmp_path / "it")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    answer = child.open(path)
    for file in files:
        file.unlink(missing_ok=True)
    assert answer["kind"] == "refused", answer
    assert len(answer["text"]) <= 1100
    assert answer["text"].isprintable()
    assert answer["seconds"] <= MOST_SECONDS, answer
    assert answer["bytes"] <= MOST_BYTES + size, answer


# --- structured generation -----------------------------------------------------------------------------------------

ODD: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(),
        st.sampled_from(["", "x", "float32", "relu2", "linear", "yarn", "/", "a/b", "\x1b[2J", "0", "__class__"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
CONFIG_KEYS = sorted({*tiny_config().to_dict(), "num_labels", "rope_scaling", "kv_channels", "dtype", "torch_dtype"})
GENERATION_KEYS = sorted({*vars(GenerationConfig()), "num_beams", "to_dict", "__class__", "from_dict"})
QUIET = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@QUIET
@given(st.dictionaries(st.sampled_from(CONFIG_KEYS), ODD, min_size=1, max_size=3))
def test_odd_configs_are_read_or_refused(values: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointError):
        config_from({**tiny_config().to_dict(), **values}, "config.json").to_dict()


@QUIET
@given(values=st.dictionaries(st.sampled_from(GENERATION_KEYS), ODD, min_size=1, max_size=3))
def test_odd_generation_configs_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    folder = tmp_path_factory.mktemp("g")
    (folder / "generation_config.json").write_text(json.dumps(values))
    with contextlib.suppress(CheckpointError):
        check_generation_config(folder)
        GenerationConfig.from_pretrained(folder)  # what is let through, transformers takes


OPCODES = [bytes([code]) for code in range(256)]
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(
        [b"K\x01", b"h\x00", b"q\x00", b"X\x01\x00\x00\x00a", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"]
    ),
)


@QUIET
@given(st.lists(PIECES, max_size=40))
def test_any_sequence_of_opcodes_is_read_or_refused(pieces: list[bytes]) -> None:
    with contextlib.suppress(CheckpointError):
        load_inert(b"\x80\x04" + b"".join(pieces) + b".", "it")


@QUIET
@given(st.lists(st.sampled_from([*"[]{}:,-?&a*b!!int 1:2'\"\n", "<<", "!!float ", "&a ", "*a ", "\n  "]), max_size=40))
def test_any_yaml_is_read_or_refused(pieces: list[str]) -> None:
    with contextlib.suppress(CheckpointError):
        parse_yaml("".join(pieces).encode(), "it")


@QUIET
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(b"0567xgLKSD\0"), st.binary(max_size=600), st.integers(0, 700)), max_size=4
    )
)
def test_any_tar_headers_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, kinds: Any) -> None:
    parts = [part for kind, data, size in kinds for part in (tar_header(bytes([kind]), size), data)]
    path = raw_tar(tmp_path_factory.mktemp("t") / "it", *parts)
    with contextlib.suppress(CheckpointError):
        tar_files(path)
