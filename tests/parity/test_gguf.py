"""GGUF files, judged by llama.cpp (through xllamacpp), by the gguf package, by transformers and sentencepiece."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import data_folder, random_state, sentencepiece_model, tiny_config

from minitron.checkpoint.gguf.read import open_gguf
from minitron.checkpoint.gguf.write import q4_0, q8_0, write_gguf
from minitron.checkpoint.hf import write_hf
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.spm import read_spm, tokenizer_config, tokenizer_json
from minitron.checkpoint.tensors import ByteRange, Checkpoint, from_tensor
from minitron.config import NemotronConfig

gguf = pytest.importorskip("gguf")

SHAPE = {"vocab_size": 448, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 160, "pad_token_id": 0}  # fmt: skip
IDS = [2, 50, 60, 71, 9, 300, 17]
TEXTS = ["the quick brown fox", " two  spaces", "Zürich 東京 \U0001f600", "tabs\tand\nlines\n", "wizards quietly 123"]


def with_tokenizer(folder: Path, config: NemotronConfig, dtype: torch.dtype = torch.float32) -> Checkpoint:
    state = random_state(config, dtype)
    for name, tensor in state.items():
        if "norm" not in name:
            tensor *= 4  # else all logits of a random model are nearly equal and their order is noise
    path = sentencepiece_model(folder)
    model = read_spm(path.read_bytes(), path)
    texts = {"tokenizer.json": tokenizer_json(model), "tokenizer_config.json": tokenizer_config(model, 64)}
    tensors = {name: from_tensor(tensor) for name, tensor in state.items()}
    return Checkpoint(config, tensors, {"tokenizer.model": ByteRange.whole(path)}, texts)


@contextmanager
def llama_cpp(path: Path, **options: float) -> Iterator[Any]:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, -1
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    for name, value in options.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    # A server that is destroyed before its loop runs hangs. An answer that went through the loop shows that it runs.
    ask_llama_cpp(server, "completion", {"prompt": [1], "n_predict": 1})
    yield server


def ask_llama_cpp(server: Any, path: str, content: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps(content).encode()
    request = urllib.request.Request(f"{server.listening_address}/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def llama_cpp_ids(server: Any, text: str) -> list[int]:
    return ask_llama_cpp(server, "tokenize", {"content": text, "add_special": True})["tokens"]


def upstream_log_probs(checkpoint: Checkpoint) -> torch.Tensor:
    from transformers.models.nemotron import NemotronConfig as UpstreamConfig
    from transformers.models.nemotron import NemotronForCausalLM

    model = NemotronForCausalLM(UpstreamConfig(**{**checkpoint.config.to_dict(), "rope_scaling": None})).eval()
    state = {name: tensor.load().float() for name, tensor in checkpoint.tensors.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "three quarters rotate": {"partial_rotary_factor": 0.75, "rope_theta": 500.0, "norm_eps": 1e-3},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn with attention": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.5,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn with mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 2.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_agrees_with_transformers(tmp_path: Path, variant: str) -> None:
    checkpoint = with_tokenizer(tmp_path, tiny_config(**{**SHAPE, **VARIANTS[variant]}))
    write_gguf(checkpoint, tmp_path / "model.gguf", quantization="f32")
    expected = upstream_log_probs(checkpoint)
    assert_top_ten(tmp_path / "model.gguf", expected, 2e-4)


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 2e-3), ("f16", 2e-3), ("q8_0", 0.1), ("q4_0", 1.5)])
def test_llama_cpp_runs_every_type(tmp_path: Path, kind: str, bound: float) -> None:
    """The bounds are what the format loses: the file is read back here and run by transformers for the exact value."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    checkpoint = with_tokenizer(tmp_path, tiny_config(**SHAPE), dtype)
    write_gguf(checkpoint, tmp_path / "model.gguf", quantization=kind)
    read_back = open_gguf(tmp_path / "model.gguf")
    # llama.cpp quantizes activations to 8 bits for quantized matrices, which a float model does not.
    assert_top_ten(
        tmp_path / "model.gguf", upstream_log_probs(read_back), 0.1 if kind.startswith("q") else 3e-2, order=False
    )
    lost = (upstream_log_probs(read_back) - upstream_log_probs(checkpoint)).abs().max()
    assert lost < bound


def test_betas_of_yarn_are_an_option_of_llama_cpp(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 6.0, "beta_slow": 0.5,
            "original_max_position_embeddings": 32, "rope_theta": 100.0}  # fmt: skip
    checkpoint = with_tokenizer(tmp_path, tiny_config(**{**SHAPE, "rope_parameters": rope}))
    notes = write_gguf(checkpoint, tmp_path / "model.gguf", quantization="f32")
    assert any("--yarn-beta-fast 6.0 --yarn-beta-slow 0.5" in note for note in notes)
    expected = upstream_log_probs(checkpoint)
    assert_top_ten(tmp_path / "model.gguf", expected, 2e-4, yarn_beta_fast=6.0, yarn_beta_slow=0.5)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 6.0, "beta_slow": 0.5,
     "attention_factor": 1.25},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_scaling_there_and_back(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = tiny_config(**{**SHAPE, "rope_parameters": dict(rope)})
    tensors = {name: from_tensor(tensor) for name, tensor in random_state(config).items()}
    write_gguf(Checkpoint(config, tensors), tmp_path / "model.gguf", quantization="f32")
    found = open_gguf(tmp_path / "model.gguf").config.rope_parameters
    assert found == pytest.approx(config.rope_parameters, abs=1e-6) if rope.get("factor") else config.rope_parameters


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "factor": 2.0,
         "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_scaling_that_llama_cpp_has_not_is_refused(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = tiny_config(**{**SHAPE, "rope_parameters": rope})
    tensors = {name: from_tensor(tensor) for name, tensor in random_state(config).items()}
    with pytest.raises(CheckpointError, match=f"rope_type is '{rope['rope_type']}'; llama.cpp's Nemotron scales RoPE"):
        write_gguf(Checkpoint(config, tensors), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("factors", "good"), [([1.0] * 4, True), ([1.0, 1.0, 4.0, 8.0], False)])
def test_factors_per_frequency(tmp_path: Path, factors: list[float], good: bool) -> None:
    """llama.cpp refuses a Nemotron with such a tensor; here ones are read as what they are, others refused too."""
    checkpoint = with_tokenizer(tmp_path, tiny_config(**SHAPE))
    write_gguf(checkpoint, tmp_path / "plain.gguf", quantization="f32")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "nemotron")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, item)
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if good:
        found = open_gguf(tmp_path / "model.gguf")
        assert all(torch.equal(found.get(n).load(), t.load()) for n, t in checkpoint.tensors.items() if "norm" not in n)
        return
    with pytest.raises(CheckpointError, match="factors per frequency"):
        open_gguf(tmp_path / "model.gguf")
    with pytest.raises(RuntimeError, match="server"), llama_cpp(tmp_path / "model.gguf"):
        pass


def assert_top_ten(path: Path, expected: torch.Tensor, bound: float, *, order: bool = True, **options: float) -> None:
    with llama_cpp(path, **options) as server:
        request = {"prompt": IDS, "n_predict": 1, "temperature": 0.0, "logprobs": 10, "cache_prompt": False}
        answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == 10
    if order:
        assert [entry["id"] for entry in top] == expected.topk(10).indices.tolist()
    for entry in top:
        assert abs(entry["logprob"] - expected[entry["id"]].item()) < bound


def test_llama_cpp_splits_text_as_sentencepiece_does(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    checkpoint = with_tokenizer(tmp_path, tiny_config(**SHAPE))
    write_gguf(checkpoint, tmp_path / "model.gguf", quantization="bf16")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    with llama_cpp(tmp_path / "model.gguf") as server:
        for text in TEXTS:
            assert llama_cpp_ids(server, text) == oracle.encode(text), text


def test_llama_cpp_splits_text_as_byte_level_bpe_does(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = data_folder()
    if folder is None:
        pytest.skip("the data folder is not at hand (MINITRON_DATA)")
    path = folder / "tokenizers" / "smollm2_tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    config = tiny_config(**{**SHAPE, "vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 1})
    state = {name: from_tensor(tensor) for name, tensor in random_state(config, torch.bfloat16).items()}
    checkpoint = Checkpoint(config, state, {"tokenizer.json": ByteRange.whole(path)})
    assert write_gguf(checkpoint, tmp_path / "model.gguf", quantization="q8_0") == []
    with llama_cpp(tmp_path / "model.gguf") as server:
        for text in TEXTS:
            assert llama_cpp_ids(server, text) == tokenizer.encode(text, add_special_tokens=False).ids, text
    again = Tokenizer.from_str(open_gguf(tmp_path / "model.gguf").texts["tokenizer.json"])
    assert all(again.encode(text).ids == tokenizer.encode(text).ids for text in TEXTS)


def test_48_heads_are_written_right_and_said_so(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(tmp_path, tiny_config(**{**SHAPE, "num_attention_heads": 6}))
    notes = write_gguf(checkpoint, tmp_path / "model.gguf", quantization="f32")
    assert any("#23343" in note for note in notes)
    back = open_gguf(tmp_path / "model.gguf")
    assert back.get("model.layers.0.self_attn.q_proj.weight").shape == (96, 64)
    assert (back.config.head_dim, back.config.rotary_dim) == (16, 8)
    torch.testing.assert_close(upstream_log_probs(back), upstream_log_probs(checkpoint), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path: Path, variant: str) -> None:
    checkpoint = with_tokenizer(tmp_path, tiny_config(**{**SHAPE, **VARIANTS[variant]}), torch.bfloat16)
    write_gguf(checkpoint, tmp_path / "model.gguf", quantization="bf16")
    back = open_gguf(tmp_path / "model.gguf")
    assert back.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in back.tensors.items():
        expected = checkpoint.tensors[name].load()
        if name.endswith("norm.weight"):  # 1 + w in float32 rounds at 6e-8
            torch.testing.assert_close(tensor.load(), expected, rtol=2**-8, atol=6e-8)
        else:
            assert torch.equal(tensor.load(), expected), name
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "partial_rotary_factor",
                "rope_theta", "max_position_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "pad_token_id",
                "tie_word_embeddings"):  # fmt: skip
        assert getattr(back.config, key) == getattr(checkpoint.config, key), key
    assert back.config.norm_eps == pytest.approx(checkpoint.config.norm_eps, rel=1e-6)
    for key in ("rope_type", "factor", "original_max_position_embeddings"):
        assert back.config.rope_parameters.get(key) == checkpoint.config.rope_parameters.get(key)
    write_hf(back, tmp_path / "hf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    assert all(tokenizer(text, add_special_tokens=False).input_ids == oracle.encode(text) for text in TEXTS)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantization_is_that_of_the_gguf_package(kind: str) -> None:
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[0] = 0
    values[1] = torch.arange(96) - 47.5  # halves
    values[2, :32] = torch.tensor([127.0, *[x + 0.5 for x in range(31)]])  # exact ties of roundf
    expected = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[kind]).reshape(-1)
    assert np.array_equal(np.frombuffer({"Q8_0": q8_0, "Q4_0": q4_0}[kind](values), np.uint8), expected)


def write_by_the_package(path: Path, config: NemotronConfig, kind: Any, **keys: Any) -> dict[str, torch.Tensor]:
    """A GGUF with every matrix in `kind`, written by the gguf package alone; returns what the package reads back."""
    from minitron.checkpoint.names import hf_to_gguf

    writer = gguf.GGUFWriter(str(path), keys.pop("arch", "nemotron"))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(64)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(8)
    expected = {}
    generator = np.random.default_rng(0)
    for name, tensor in random_state(config).items():
        array = tensor.numpy()
        if array.ndim == 1:
            writer.add_tensor(hf_to_gguf(name), array + 1 if name.endswith("norm.weight") else array)
            expected[name] = tensor
            continue
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = generator.integers(0, 256, (array.shape[0], array.shape[1] // block * size), dtype=np.uint8)
        raw.reshape(-1, size)[:, _scale_bytes(kind)] = 0x1C  # a small float16, not an infinite one
        writer.add_tensor(hf_to_gguf(name), raw, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _scale_bytes(kind: Any) -> list[int]:
    """Where a block keeps its float16 scales."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return {"Q6_K": [size - 2, size - 1], "Q2_K": [80, 81, 82, 83], "Q3_K": [size - 2, size - 1]}.get(
        kind.name, [0, 1, 2, 3]
    )


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q4_1"])
def test_every_quantization_that_the_package_knows(tmp_path: Path, kind: str) -> None:
    config = tiny_config(vocab_size=40, hidden_size=256, intermediate_size=256, num_attention_heads=16, head_dim=16)
    expected = write_by_the_package(tmp_path / "m.gguf", config, gguf.GGMLQuantizationType[kind])
    back = open_gguf(tmp_path / "m.gguf")
    assert kind in back.notes[0]
    for name, tensor in back.tensors.items():
        torch.testing.assert_close(tensor.load(), expected[name], rtol=0, atol=1.2e-7)
        blocks = torch.cat(list(tensor.blocks(4096)))
        torch.testing.assert_close(blocks, tensor.load(), rtol=0, atol=0, equal_nan=True)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_by_the_package(tmp_path / "m.gguf", tiny_config(), gguf.GGMLQuantizationType.Q8_0, arch="mamba")
    with pytest.raises(CheckpointError, match="'mamba', expected one of 'nemotron', 'llama', 'qwen2', 'qwen3'"):
        open_gguf(tmp_path / "m.gguf")


def test_what_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    for options, match in (({"hidden_act": "gelu"}, "squared ReLU"), ({"rope_parameters": DYNAMIC}, "linear and yarn")):
        checkpoint = with_tokenizer(tmp_path, tiny_config(**{**SHAPE, **options}))
        with pytest.raises(CheckpointError, match=match):
            write_gguf(checkpoint, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
