"""The engine on a GPU: graphs, kernels and draws there against transformers and against the same code on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import some_tokens, tiny_model
from family_samples import KINDS, kind_config, small_model
from forced_drafts import force_drafts

from minitron.engine.cuda.engine import CudaEngine
from minitron.engine.cuda.steps import TorchSteps
from minitron.engine.cuda.weights import device_weights, on_device
from minitron.engine.weights import from_model
from minitron.families import FAMILIES
from minitron.family_models import causal_lm_class

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; `make gpu` runs this"),
]


def prompt(rows: int = 1, length: int = 6) -> torch.Tensor:
    return torch.tensor([some_tokens(length, seed=row) for row in range(rows)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens_are_those_of_transformers(kind: str, rows: int) -> None:
    config = kind_config(kind)
    model = causal_lm_class(FAMILIES[config.model_type])(config)
    model.load_state_dict(small_model(config).state_dict())
    model = model.eval().cuda()
    request = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(prompt(rows).cuda(), **request)
    assert (model.last_generation.engine, model.last_generation.reason) == ("cuda", "")
    assert ours.is_cuda
    assert torch.equal(ours, model.generate(prompt(rows).cuda(), engine="off", **request))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zeros", [False, True])
def test_graphs_kernels_and_torch_give_the_logits_of_the_cpu(dtype: torch.dtype, zeros: bool) -> None:
    model = tiny_model(intermediate_size=200)
    if zeros:  # no neuron is active
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data.zero_()
    tokens = some_tokens(20)
    held = from_model(model.to(dtype)) if dtype != torch.float16 else None
    model = model.to(dtype).cuda()
    weights = device_weights(model)
    reference = CudaEngine(weights, 40, steps=TorchSteps())
    found = {"kernels": CudaEngine(weights, 40), "torch": reference}
    if held is not None:
        found["cpu"] = CudaEngine(held, 40)
    logits = {}
    for name, engine in found.items():
        engine.prefill(tokens[:9])
        logits[name] = torch.cat([engine.step(tokens[at : at + 4]).clone().cpu() for at in range(9, 17, 4)])
    size = logits["torch"].square().mean().sqrt()
    for other in logits.values():
        assert (other - logits["torch"]).square().mean().sqrt() <= (1e-4 if dtype == torch.float32 else 0.03) * size


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_weights_give_the_logits_of_the_cpu(format: Any) -> None:
    held, tokens = from_model(tiny_model(torch.bfloat16), format), some_tokens(12)
    engines = CudaEngine(held, 20), CudaEngine(on_device(held, torch.device("cuda")), 20)
    for engine in engines:
        engine.prefill(tokens[:4])
    expected, found = (engine.step(tokens[4:]).cpu() for engine in engines)
    assert (found - expected).square().mean().sqrt() <= 0.03 * expected.square().mean().sqrt()


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 21, 32, 37])
def test_steps_that_follow_each_other_are_single_steps(rows: int) -> None:
    weights, slots = device_weights(tiny_model().cuda()), list(range(rows))
    engine, single = CudaEngine(weights, 300, rows), CudaEngine(weights, 300, rows)
    for slot in slots:
        engine.prefill(some_tokens(1 + slot % 5, seed=slot), slot)
        single.prefill(some_tokens(1 + slot % 5, seed=slot), slot)
    found, last = [[] for _ in slots], slots
    for first in range(0, rows, engine.most_rows):
        some = slots[first : first + engine.most_rows]
        for slot, tokens in zip(some, zip(*engine.greedy(some, 80, (), some), strict=True), strict=True):
            found[slot] = list(tokens)
    for step in range(80):
        last = single.decode(last, slots).argmax(-1).tolist()
        assert last == [tokens[step] for tokens in found]


def test_spans_grow_and_the_cache_grows_with_new_graphs() -> None:
    model = tiny_model(max_position_embeddings=2048).cuda()
    weights, expected = device_weights(model), None
    for capacity in (1200, 300):
        engine = CudaEngine(weights, capacity)
        engine.prefill(some_tokens(250))
        rows = engine.greedy([1], 20)
        engine.reserve(1200)
        rows += engine.greedy(rows[-1], 600)
        expected = expected or rows
        assert rows == expected


def test_a_seed_gives_one_text_in_bursts_and_in_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny_model().cuda(), []
    for seconds in (0.02, 0.0):
        monkeypatch.setattr("minitron.engine.loop.BURST_SECONDS", seconds)
        torch.manual_seed(5)
        texts.append(model.generate(prompt(3).cuda(), do_sample=True, top_p=0.9, top_k=20, max_new_tokens=40))
    assert torch.equal(*texts)


@pytest.mark.parametrize("draft", ["lookup", "self"])
def test_drafts_leave_the_text(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_drafts(monkeypatch)
    model = tiny_model().cuda()
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.6}):
        texts = []
        for drafts in ({}, {"draft": draft}):
            torch.manual_seed(0)
            texts.append(model.generate(prompt(1, 4).repeat(1, 4).cuda(), max_new_tokens=40, **sampling, **drafts))
        assert torch.equal(*texts)
        assert model.last_generation.speculation.drafted > 0


def test_changed_weights_are_seen_by_captured_graphs() -> None:
    model, request = tiny_model().cuda(), {"max_new_tokens": 20, "do_sample": False}
    before = model.generate(prompt().cuda(), **request)
    for name in ("mlp.down_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm"):
        model.model.layers[0].get_submodule(name).weight.data.mul_(-1.5)
        after = model.generate(prompt().cuda(), **request)
        assert torch.equal(after, model.generate(prompt().cuda(), engine="off", **request))
        assert not torch.equal(after, before)
        before = after


def test_a_model_that_is_forgotten_gives_its_memory_back() -> None:
    model = tiny_model().cuda()
    model.generate(prompt().cuda(), max_new_tokens=5, do_sample=False)
    held = torch.cuda.memory_allocated()
    del model
    assert torch.cuda.memory_allocated() < held


def test_a_compiled_step_is_the_step() -> None:
    weights, tokens = device_weights(tiny_model().cuda()), some_tokens(6)
    plain, compiled = (
        CudaEngine(weights, 8, steps=TorchSteps()),
        CudaEngine(weights, 8, steps=TorchSteps(), compiled="inductor"),
    )
    torch.testing.assert_close(compiled.step(tokens), plain.step(tokens), rtol=1e-3, atol=1e-3)
