"""The engine on Nemotron's relatives, against transformers' own classes in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_models import logits_of, some_tokens, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.family_samples import KINDS, MODELS, configs, kind_config, small_config, small_model
from torch import nn

from minitron.engine.cpu import gemv
from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.matrix import Format
from minitron.engine.reference import ReferenceEngine
from minitron.engine.weights import from_model, weight_bytes
from minitron.engine_hook import GenerationReport
from minitron.families import FAMILIES
from minitron.family_models import causal_lm_class

ENGINES = {"reference": ReferenceEngine, "cpu": CpuEngine}
RELATIVE_KINDS = [kind for kind in KINDS if kind != "nemotron"]
PROMPTS = 6


def decoding_model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The class that `minitron.load` uses, with the weights of transformers' own."""
    model = causal_lm_class(FAMILIES[config.model_type])(config)
    model.load_state_dict(small_model(config, seed).state_dict())
    return model.to(dtype).eval()


def exact_logits(config: Any, tokens: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of transformers' own class, whose weights are rounded to `dtype` first."""
    model = small_model(config, seed).to(dtype).double()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", RELATIVE_KINDS)
def test_logits_are_no_worse_than_transformers(kind: str, dtype: torch.dtype, sample: str) -> None:
    config, tokens = kind_config(sample), some_tokens(24)
    model = decoding_model(config, dtype)
    with torch.inference_mode():
        own = model(torch.tensor([tokens])).logits[0, 9:].double()
    exact = exact_logits(config, tokens, dtype=dtype)[9:]
    found = logits_of(ENGINES[kind](from_model(model), 24), tokens, 9, 4)
    error, allowed = (found - exact).square().mean().sqrt(), (own - exact).square().mean().sqrt()
    assert error <= 1.1 * allowed + 1e-6


@settings(max_examples=40, deadline=None)
@given(config=configs(), seed=st.integers(0, 1000), read=st.integers(0, 20))
def test_any_shape_gives_the_exact_logits(config: Any, seed: int, read: int) -> None:
    tokens = some_tokens(21, config.vocab_size, seed)
    exact = exact_logits(config, tokens, seed)[read:]
    found = logits_of(CpuEngine(from_model(decoding_model(config, seed=seed)), 21), tokens, read, 5)
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("sample", ["llama-biased", "smollm", "qwen3"])
@pytest.mark.parametrize("format", ["bf12", "int8", "int4"])
def test_packed_weights_give_the_logits_of_the_same_numbers(format: Format, sample: str) -> None:
    model, tokens = decoding_model(kind_config(sample, intermediate_size=131), torch.bfloat16), some_tokens(24)
    weights = from_model(model, format)
    expected = logits_of(ReferenceEngine(unpacked(weights), 24), tokens, 8, 8)
    size = expected.square().mean().sqrt()
    for engine in ENGINES.values():
        found = logits_of(engine(weights, 24), tokens, 8, 3)
        assert (found - expected).square().mean().sqrt() <= 0.03 * size


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_thread_counts_and_pieces_give_the_same_bits(format: Format) -> None:
    config = kind_config("qwen3", intermediate_size=700, num_attention_heads=8, num_key_value_heads=4)
    weights, tokens = from_model(decoding_model(config, torch.bfloat16), format), some_tokens(30)
    expected = logits_of(CpuEngine(weights, 30, threads=1), tokens, 3, 1)
    for threads in (1, 2, 3):
        for piece in (1, 5, 8):
            found = logits_of(CpuEngine(weights, 30, threads=threads), tokens, 3, piece)
            assert torch.equal(found, expected), (threads, piece)


@pytest.mark.parametrize("sample", ["llama-3", "qwen2", "qwen3-biased"])
def test_a_prefill_by_torch_is_that_of_single_steps(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuEngine, "short_prompt", 8)
    config, tokens = kind_config(sample), some_tokens(60)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        weights = from_model(decoding_model(config, dtype))
        steps = logits_of(CpuEngine(weights, 60), tokens, 0, 1)[50:]
        found = logits_of(CpuEngine(weights, 60), tokens, 50, 1)
        assert (found - steps).abs().max() <= bound * steps.abs().max()


# --- generate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", RELATIVE_KINDS)
def test_greedy_tokens_are_those_of_transformers(sample: str) -> None:
    config = kind_config(sample)
    model, upstream = decoding_model(config), small_model(config)
    for seed in range(PROMPTS):
        ids = torch.tensor([some_tokens(3 + 7 * seed, seed=seed)])
        report = GenerationReport()
        found = model.generate(ids, max_new_tokens=12, do_sample=False, report=report)
        assert report.engine == "cpu", report.reason
        expected = upstream.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(found, expected)


def test_batches_drafts_and_caches_of_a_relative() -> None:
    config = kind_config("smollm")
    model, upstream = decoding_model(config), small_model(config)
    rows = [some_tokens(length, seed=length) for length in (3, 9, 6)]
    ids = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    options: Any = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    expected = upstream.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    assert model.last_generation.engine == "cpu"
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-3)
    keys = [cache.layers[1].keys for cache in (found.past_key_values, expected.past_key_values)]
    assert torch.allclose(keys[0][0, :, 6:], keys[1][0, :, 6:], atol=1e-4)
    plain = model.generate(ids[1:2], max_new_tokens=20, do_sample=False)
    for draft in ("self", "lookup", decoding_model(config, seed=5)):
        assert torch.equal(model.generate(ids[1:2], max_new_tokens=20, do_sample=False, draft=draft), plain)
        assert model.last_generation.speculation is not None


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def _gelu(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def _window(model: Any) -> None:
    model.config.sliding_window = 8


def _norm(model: Any) -> None:
    model.model.layers[1].self_attn.q_norm = nn.Identity()


def _eps(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 1.0


@pytest.mark.parametrize(
    ("sample", "change", "reason"),
    [
        ("llama", _hook, "a hook on LlamaMLP"),
        ("qwen2", _gelu, "the activation is GELU"),
        ("mistral", _window, "a sliding window"),
        ("qwen3", _norm, "Identity in place of Qwen3RMSNorm"),
        ("llama", _eps, "norms with several eps"),
    ],
)
def test_a_changed_model_runs_in_torch(sample: str, change: Any, reason: str) -> None:
    model = decoding_model(kind_config(sample))
    change(model)
    ids = torch.tensor([some_tokens(5)])
    found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert model.last_generation.engine == "transformers"
    assert reason in model.last_generation.reason
    upstream = MODELS[model.config.model_type]
    assert torch.equal(found, upstream.generate(model, ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_length_runs_in_torch(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 16}
    factors = {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4} if kind == "longrope" else {}
    model = decoding_model(small_config("llama", rope_parameters=rope | factors))
    model.generate(torch.tensor([some_tokens(5)]), max_new_tokens=2, do_sample=False)
    assert model.last_generation.reason == f"rope_type '{kind}'"


def test_code_of_transformers_that_was_replaced_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoding_model(kind_config("llama"))
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(norm, "forward", lambda self, x: 0 * x)
    model.generate(torch.tensor([some_tokens(5)]), max_new_tokens=2, do_sample=False)
    assert model.last_generation.reason == "LlamaRMSNorm.forward was replaced"


# --- small parts -------------------------------------------------------------------------------------------------


def test_silu_of_every_size() -> None:
    x = np.concatenate([np.linspace(-120, 120, 4001), [0.0, -0.0, 1e-30, -1e-30]]).astype(np.float32)
    found = np.full_like(x, 3.0)
    gemv.times_silu(x, found)
    expected = 3 * gemv.silu_reference(x)
    assert np.allclose(found, expected, rtol=3e-6, atol=1e-30)
    broken = np.ones(1, np.float32)
    gemv.times_silu(np.full(1, np.nan, np.float32), broken)
    assert np.isnan(broken[0])


@pytest.mark.parametrize("sample", ["llama", "smollm", "qwen3"])
@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_weight_bytes_are_those_of_the_weights(sample: str, format: Format) -> None:
    model = decoding_model(kind_config(sample))
    weights = from_model(model, format)
    assert weight_bytes(model.config, format) == weights.nbytes
    assert weights.bytes_per_token(0.1) == weights.bytes_per_token()  # no neuron can be skipped
