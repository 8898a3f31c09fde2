"""Which weights of a folder count: what transformers takes, with a note about what lies beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import random_state, save_reference, tiny_config
from safetensors.torch import save_file

from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import check_checkpoint, open_hf
from minitron.checkpoint.limits import CheckpointError, CheckpointNote
from minitron.checkpoint.weight_files import find_weights
from minitron.heads import NemotronForCausalLM

NAME = "model.layers.0.mlp.up_proj.weight"


def write_single(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_shards(folder: Path, state: dict[str, torch.Tensor], suffix: str = "safetensors") -> None:
    places = {name: f"part-{position % 2}.{suffix}" for position, name in enumerate(state)}
    for place in set(places.values()):
        part = {name: tensor for name, tensor in state.items() if places[name] == place}
        if suffix == "bin":
            torch.save(part, folder / place)
        else:
            save_file(part, folder / place, metadata={"format": "pt"})
    index = "pytorch_model.bin.index.json" if suffix == "bin" else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_bin(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


WRITERS: dict[str, Any] = {
    "model.safetensors": write_single,
    "model.safetensors.index.json": write_shards,
    "pytorch_model.bin": write_bin,
    "pytorch_model.bin.index.json": lambda folder, state: write_shards(folder, state, "bin"),
}


@pytest.mark.parametrize(("first", "second"), [(a, b) for i, a in enumerate(WRITERS) for b in list(WRITERS)[i + 1 :]])
def test_of_two_sets_every_reader_takes_the_one_of_transformers(tmp_path: Path, first: str, second: str) -> None:
    config = tiny_config()
    folder = save_reference(tmp_path / "hf", config, random_state(config))
    (folder / "model.safetensors").unlink()
    used, stale = random_state(config, seed=1), random_state(config, seed=2)
    WRITERS[second](folder, stale)
    WRITERS[first](folder, used)
    theirs = NemotronForCausalLM.from_pretrained(folder).state_dict()[NAME]  # transformers chooses the file
    assert torch.equal(theirs, used[NAME])
    with pytest.warns(CheckpointNote, match=f"read from {first}; .*{second}.* not used"):
        check_checkpoint(folder)
    checkpoint = open_hf(folder)
    assert torch.equal(checkpoint.tensors[NAME].load(), used[NAME])
    assert [note for note in checkpoint.notes if second in note]
    alone = save_reference(tmp_path / "alone", config, used)
    assert fingerprint(folder) == fingerprint(alone)


def test_a_stale_index_that_names_lost_shards_does_no_harm(tmp_path: Path) -> None:
    folder = save_reference(tmp_path / "hf", tiny_config(), random_state(tiny_config()))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.warns(CheckpointNote):
        check_checkpoint(folder)


def test_one_set_needs_no_note(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = save_reference(tmp_path / "hf", tiny_config(), random_state(tiny_config()))
    check_checkpoint(folder)
    assert not [warning for warning in recwarn if issubclass(warning.category, CheckpointNote)]
    found = find_weights(folder)
    assert found is not None
    assert found.notes == []


def test_variants_are_named(tmp_path: Path) -> None:
    folder = save_reference(tmp_path / "hf", tiny_config(), random_state(tiny_config()))
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.fp16\.safetensors would have to be renamed"):
        check_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    folder = save_reference(tmp_path / "hf", config, random_state(config))
    (folder / "model.safetensors").unlink()
    write_shards(folder, random_state(config))
    save_file({**random_state(config, seed=3)}, folder / "part-1.safetensors")
    with pytest.raises(CheckpointError, match=r"part-.*holds .*expected it in one shard"):
        check_checkpoint(folder)


@pytest.mark.parametrize("metadata", [None, 7, "x", []])
def test_an_index_whose_metadata_transformers_would_fail_on(tmp_path: Path, metadata: object) -> None:
    config = tiny_config()
    folder = save_reference(tmp_path / "hf", config, random_state(config))
    (folder / "model.safetensors").unlink()
    write_shards(folder, random_state(config))
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    with pytest.raises(CheckpointError, match=r"index\.json: metadata is "):
        check_checkpoint(folder)
