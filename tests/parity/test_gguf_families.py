"""GGUF files of Nemotron's relatives, judged by llama.cpp (through xllamacpp) and by transformers' own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.family_samples import KINDS, configs, kind_config, small_config, small_model
from test_gguf import IDS, _scale_bytes, assert_top_ten
from transformers import AutoModelForCausalLM

from minitron.checkpoint.gguf.read import open_gguf
from minitron.checkpoint.gguf.rotary_rows import half_split, interleaved
from minitron.checkpoint.gguf.settings import ROPE_KEY, llama3_factors
from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.hf import write_hf
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.spm import read_spm, tokenizer_config, tokenizer_json
from minitron.checkpoint.tensors import ByteRange, Checkpoint, from_tensor
from minitron.convert import ConversionOptions, convert
from minitron.families import FAMILIES

gguf = pytest.importorskip("gguf")

SHAPE = {"vocab_size": 448, "hidden_size": 64, "intermediate_size": 160, "pad_token_id": 0}
# llama.cpp's Qwen3 has no biases.
WRITTEN = {
    "llama": {},
    "llama-3": {"head_dim": 32},
    "llama-biased": {},
    "smollm": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"head_dim": 24},
    "qwen2": {},
    "qwen2-tied": {},
    "qwen3": {"head_dim": 32},
}


def checkpoint_of(config: Any, folder: Path | None = None) -> Checkpoint:
    """A random model as a checkpoint; with a tokenizer made in `folder`."""
    state = dict(small_model(config).state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    tensors = {name: from_tensor(tensor) for name, tensor in state.items()}
    if folder is None:
        return Checkpoint(config, tensors)
    path = sentencepiece_model(folder)
    model = read_spm(path.read_bytes(), path)
    texts = {"tokenizer.json": tokenizer_json(model), "tokenizer_config.json": tokenizer_config(model, 64)}
    return Checkpoint(config, tensors, {"tokenizer.model": ByteRange.whole(path)}, texts)


def log_probs(checkpoint: Checkpoint) -> torch.Tensor:
    """Of transformers' own class."""
    model = small_model(checkpoint.config)
    state = {name: tensor.load().float() for name, tensor in checkpoint.tensors.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", WRITTEN)
def test_llama_cpp_agrees_with_transformers(tmp_path: Path, kind: str) -> None:
    checkpoint = checkpoint_of(kind_config(kind, **{**SHAPE, **WRITTEN[kind]}), tmp_path)
    write_gguf(checkpoint, tmp_path / "model.gguf", quantization="f32")
    assert_top_ten(tmp_path / "model.gguf", log_probs(checkpoint), 2e-4)


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_llama_cpp_runs_every_type(tmp_path: Path, kind: str) -> None:
    checkpoint = checkpoint_of(kind_config("smollm", **{**SHAPE, **WRITTEN["smollm"]}), tmp_path)
    write_gguf(checkpoint, tmp_path / "model.gguf", quantization=kind)
    assert_top_ten(tmp_path / "model.gguf", log_probs(open_gguf(tmp_path / "model.gguf")), 0.1, order=False)


@pytest.mark.parametrize("kind", ["llama", "smollm", "qwen2", "qwen3"])
def test_transformers_reads_what_is_written(tmp_path: Path, kind: str) -> None:
    usual = {"head_dim": 128} if kind == "qwen3" else {}  # transformers reads no other width of heads
    checkpoint = checkpoint_of(kind_config(kind, **{**SHAPE, **WRITTEN[kind], **usual}))
    write_gguf(checkpoint, tmp_path / "model.gguf", quantization="f32")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(found[name], tensor.load()), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nemotron"])
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    checkpoint = checkpoint_of(kind_config(kind))
    write_hf(checkpoint, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model.gguf", ConversionOptions(quantize="f32"))
    report = convert(tmp_path / "model.gguf", tmp_path / "back")
    assert report.verified
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "back"))
    rope = before.pop("rope_parameters"), after.pop("rope_parameters")
    assert rope[1] == pytest.approx(rope[0])
    assert after["architectures"] == [FAMILIES[checkpoint.config.model_type].architecture]
    for name in ("model_type", "tie_word_embeddings", "rms_norm_eps", "hidden_act"):
        assert before[name] == after[name], name
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(found[name], tensor.load()), name


@settings(max_examples=25, deadline=None)
@given(config=configs())
def test_any_shape_there_and_back(config: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("shape") / "model.gguf"
    checkpoint = checkpoint_of(config)
    write_gguf(checkpoint, path, quantization="f32")
    found = open_gguf(path)
    assert found.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(found.get(name).load(), tensor.load()), name
    assert found.config.model_type == config.model_type
    assert bool(found.config.tie_word_embeddings) == bool(config.tie_word_embeddings)


@given(heads=st.integers(1, 5), half=st.integers(1, 8), start=st.integers(0, 40), count=st.integers(0, 40))
def test_rows_in_another_order_are_read_in_any_pieces(heads: int, half: int, start: int, count: int) -> None:
    rows = heads * 2 * half
    start, stop = min(start, rows), min(start + count, rows)
    whole = torch.arange(rows)[:, None]
    # llama.cpp's converter: weights.reshape(heads, 2, half, ...).swapaxes(1, 2)
    expected = whole.reshape(heads, 2, half, 1).swapaxes(1, 2).reshape(rows, 1)
    turned = interleaved(from_tensor(whole), 2 * half)
    assert torch.equal(turned.rows(start, stop), expected[start:stop])
    assert torch.equal(half_split(turned, 2 * half).rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("type", ["Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_quantized_files_are_read_as_transformers_reads_them(tmp_path: Path, type: str, family: str) -> None:
    head_dim = 128 if family == "qwen3" else 64  # transformers reads no other width of Qwen3's heads
    config = small_config(family, hidden_size=256, intermediate_size=512, head_dim=head_dim)
    kind = gguf.GGMLQuantizationType[type]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    write_gguf(checkpoint_of(config), tmp_path / "plain.gguf", quantization="f32")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", family)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    generator = np.random.default_rng(0)
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        if len(shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        raw = generator.integers(0, 256, (shape[0], shape[1] // block * size), dtype=np.uint8)
        raw.reshape(-1, size)[:, _scale_bytes(kind)] = 0x1C  # a small float16, not an infinite one
        writer.add_tensor(tensor.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    found = open_gguf(tmp_path / "model.gguf")
    assert any(type in note for note in found.notes)
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor.load(), expected[name]), name


def rewritten(path: Path, target: Path, arch: str, changes: dict[str, Any], drop: str = "") -> None:
    """A copy of a file with other keys."""
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(target, arch)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", drop, *changes):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for name, value in changes.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_scaling_of_llama_3_without_our_key(tmp_path: Path) -> None:
    """As Meta's models are converted by llama.cpp: factors only, for a context of 8,192 tokens."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = small_config("llama", rope_parameters=rope, head_dim=64)
    write_gguf(checkpoint_of(config), tmp_path / "ours.gguf", quantization="f32")
    rewritten(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", "llama", {}, drop=ROPE_KEY)
    assert open_gguf(tmp_path / "theirs.gguf").config.rope_parameters == rope | {"partial_rotary_factor": 1.0} or (
        open_gguf(tmp_path / "theirs.gguf").config.rope_parameters == rope
    )
    inverse = small_model(config).model.rotary_emb.inv_freq.double().numpy()
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    assert np.allclose(plain / llama3_factors(rope, 64), inverse, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count is 8; a mixture of experts"),
        ({"llama.attention.sliding_window": 16}, "sliding_window is 16, shorter than the context"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4, expected that of a whole head"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length is 4, expected key_length"),
        ({"llama.block_count": 1}, "a tensor for"),
        ({"llama.attention.head_count_kv": [2, 2]}, "llama.attention.head_count_kv is .*expected a whole number"),
    ],
)
def test_what_these_classes_do_not_compute_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_gguf(checkpoint_of(small_config("llama")), tmp_path / "good.gguf", quantization="f32")
    rewritten(tmp_path / "good.gguf", tmp_path / "bad.gguf", "llama", changes)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "bad.gguf")


def test_factors_of_an_unknown_scaling_are_refused(tmp_path: Path) -> None:
    config = kind_config("llama-3")
    write_gguf(checkpoint_of(config), tmp_path / "good.gguf", quantization="f32")
    rewritten(tmp_path / "good.gguf", tmp_path / "bad.gguf", "llama", {"llama.rope.freq_base": 77.0})
    with pytest.raises(CheckpointError, match="not that of a llama3 scaling known here"):
        open_gguf(tmp_path / "bad.gguf")


def test_nemo_is_nemotrons(tmp_path: Path) -> None:
    write_hf(checkpoint_of(small_config("llama")), tmp_path / "model")
    with pytest.raises(CheckpointError, match="NeMo is written for Nemotron only"):
        convert(tmp_path / "model", tmp_path / "model.nemo")
    assert not (tmp_path / "model.nemo").exists()
