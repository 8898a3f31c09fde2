"""Weights from a folder: those of its model, and no second copy of them in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_samples import random_state, save_reference, tiny_config
from engine_models import tiny_model

from minitron.checkpoint.safetensors_io import write_safetensors
from minitron.checkpoint.tensors import from_tensor
from minitron.engine import weights as weights_module
from minitron.engine.matrix import FORMATS, Format, Matrix
from minitron.engine.model_weights import weights_of
from minitron.engine.weights import EngineWeights, from_checkpoint, from_model, weight_bytes


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_gives_the_weights_of_its_model(tmp_path: Path, tied: bool, format: Format | None) -> None:
    model = tiny_model(torch.bfloat16, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    ours, theirs = from_checkpoint(tmp_path, format), from_model(model, format)
    assert torch.equal(ours.embed.data, theirs.embed.data)
    assert torch.equal(ours.head.data, theirs.head.data)
    assert (ours.head is ours.embed) is tied
    assert torch.equal(ours.norm.gain, theirs.norm.gain)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert all(torch.equal(x.data, y.data) for x, y in zip(a.matrices, b.matrices, strict=True))
        assert torch.equal(a.qkv_bias, b.qkv_bias)  # type: ignore[arg-type]
        assert torch.equal(a.mlp_norm.gain, b.mlp_norm.gain)
    assert ours.format == (format or "bf16")
    escapes = sum(m.extras.numel() - 2 * m.shape[0] - 1 for m in all_matrices(ours) if m.extras is not None)
    assert ours.nbytes == weight_bytes(model.config, ours.format) + 4 * escapes  # type: ignore[arg-type]


def all_matrices(weights: EngineWeights) -> list[Matrix]:
    ends = [weights.embed] if weights.head is weights.embed else [weights.embed, weights.head]
    return ends + [matrix for layer in weights.layers for matrix in layer.matrices]


def test_small_gains_are_kept() -> None:
    model = tiny_model(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e-3)
    assert torch.allclose(from_model(model).norm.gain, torch.tensor(1.001), atol=1e-5)


PEAK = """
import sys, torch
from pathlib import Path
from minitron.engine.weights import from_checkpoint
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
weights = from_checkpoint(Path(sys.argv[1]))
print((resident("VmHWM") - before) / weights.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=1024, intermediate_size=8192, vocab_size=32768, num_hidden_layers=12, head_dim=64)
    save_reference(tmp_path, config, random_state(config, torch.bfloat16))
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    for _ in range(3):  # a loaded machine returns freed memory late, which only ever raises the number
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if peak <= 1.05:
            return
    pytest.fail(f"peak is {peak} of the packed bytes")


SCRATCH = """
import sys, torch
from pathlib import Path
from minitron.checkpoint.safetensors_io import read_safetensors
from minitron.engine.weights import _CheckpointSource
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
torch.set_num_threads(2)
tensors = read_safetensors(Path(sys.argv[1]))
source = _CheckpointSource({**tensors, "little": tensors["big"].take_rows([(0, 64)])})
kept = []
for format, read in (("bf12", source.rows), ("int8", source.transposed)):
    read("little", format)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    matrix = read("big", format)
    print(resident("VmHWM") - before - matrix.nbytes)
    kept.append(matrix)  # its memory must not serve the next one
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch_does_not_grow_with_a_quantized_matrix(tmp_path: Path) -> None:
    """As rows or transposed, the matrix of 64 MB is read in pieces whose memory is used again."""
    numbers = (torch.randn(16384, 2048, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    write_safetensors(tmp_path / "model.safetensors", {"big": from_tensor(numbers)})
    command = [sys.executable, "-c", SCRATCH, str(tmp_path / "model.safetensors")]
    for _ in range(3):  # see above
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        most = max(map(int, done.stdout.split()))
        if most <= numbers.nbytes * 0.4:
            return
    pytest.fail(f"{most:,} bytes beside the matrix of {numbers.nbytes:,} bytes in bf16")


def test_old_names_work_and_warn() -> None:
    from minitron.engine import packed

    with pytest.warns(DeprecationWarning, match="weight_bytes"):
        assert weights_module.packed_bytes is weights_module.weight_bytes
    with pytest.warns(DeprecationWarning, match=r"use minitron\.engine\.model_weights\.weights_of"):
        assert packed.weights_of is weights_of
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = weights_module.nothing
